//! Tokens of the prompts that came lately. Where answers are kept, the same prompts come again, and turning their text into
//! tokens is most of what is left to do for them: some 100 microseconds for a kilobyte.
//!
//! Invariants: what one namespace has asked makes nothing faster for another; the tokens are bounded. It is state of the intake
//! thread, and nobody else's.

use std::ops::Range;
use std::sync::Arc;

use lru::LruCache;
use sha2::{Digest, Sha256};

use crate::config::MAX_ENCODED_PROMPT_TOKENS;
use crate::error::Result;
use crate::sequence::NamespaceKey;

/// Everything on which the tokens of a prompt depend, but the model.
pub(super) struct PromptText<'a> {
    pub(super) namespace: &'a NamespaceKey,
    pub(super) text: &'a str,
    /// Of a rendered conversation: where special tokens are text. `None`: it is a prompt as it stands.
    pub(super) content: Option<&'a [Range<usize>]>,
}

/// The least recently used ones give way.
pub(super) struct EncodedPrompts {
    /// `None`: nothing is kept.
    entries: Option<LruCache<[u8; 32], Arc<[u32]>>>,
    num_tokens: usize,
}

impl EncodedPrompts {
    pub(super) fn new(is_on: bool) -> EncodedPrompts {
        EncodedPrompts { entries: is_on.then(LruCache::unbounded), num_tokens: 0 }
    }

    /// Its tokens: those that are kept, or what `encode` gives.
    pub(super) fn get(
        &mut self,
        prompt: &PromptText<'_>,
        encode: impl FnOnce() -> Result<Vec<u32>>,
    ) -> Result<Arc<[u32]>> {
        let Some(entries) = &mut self.entries else { return encode().map(Arc::from) };
        let key = key(prompt);
        if let Some(ids) = entries.get(&key) {
            return Ok(ids.clone());
        }
        let ids: Arc<[u32]> = encode()?.into();
        if ids.len() <= MAX_ENCODED_PROMPT_TOKENS {
            self.num_tokens += ids.len();
            entries.put(key, ids.clone());
            while self.num_tokens > MAX_ENCODED_PROMPT_TOKENS || entries.len() > MAX_ENCODED_PROMPT_TOKENS / 16 {
                let Some((_, given_up)) = entries.pop_lru() else { break };
                self.num_tokens -= given_up.len();
            }
        }
        Ok(ids)
    }
}

fn key(prompt: &PromptText<'_>) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(prompt.namespace);
    hash.update((prompt.text.len() as u64).to_le_bytes());
    hash.update(prompt.text);
    if let Some(content) = prompt.content {
        hash.update([1]);
        for range in content {
            hash.update((range.start as u64).to_le_bytes());
            hash.update((range.end as u64).to_le_bytes());
        }
    }
    hash.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    /// The same prompt of the same namespace is encoded once; any other is encoded; errors are not kept; and there is a bound.
    #[test]
    fn the_same_prompt_is_encoded_once() {
        let (own, other): (NamespaceKey, NamespaceKey) = ([1; 32], [2; 32]);
        let range = 0..1;
        let content = [std::slice::from_ref(&range), &[]];
        let prompts = [
            (&own, "a b", None),
            (&own, "a c", None),
            (&other, "a b", None),
            (&own, "a b", Some(content[0])),
            (&own, "a b", Some(content[1])),
        ];
        let mut encoded = EncodedPrompts::new(true);
        for (number, &(namespace, text, content)) in prompts.iter().enumerate() {
            let prompt = PromptText { namespace, text, content };
            assert_eq!(encoded.get(&prompt, || Err(Error::Closed)), Err(Error::Closed));
            let ids = vec![number as u32; 3];
            assert_eq!(encoded.get(&prompt, || Ok(ids.clone())).as_deref(), Ok(&ids[..]));
            assert_eq!(encoded.get(&prompt, || unreachable!("it is kept")).as_deref(), Ok(&ids[..]));
        }
        let large = PromptText { namespace: &own, text: "large", content: None };
        encoded.get(&large, || Ok(vec![0; MAX_ENCODED_PROMPT_TOKENS])).expect("encoded");
        assert_eq!(
            (encoded.num_tokens, encoded.entries.as_ref().map(LruCache::len)),
            (MAX_ENCODED_PROMPT_TOKENS, Some(1))
        );
        let (mut off, mut times) = (EncodedPrompts::new(false), 0);
        for _ in 0..2 {
            let counted = || {
                times += 1;
                Ok(vec![1])
            };
            off.get(&large, counted).expect("encoded");
        }
        assert_eq!(times, 2);
    }
}
