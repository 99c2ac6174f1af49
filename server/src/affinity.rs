//! Which requests begin alike, as one short name that a load balancer can hash: requests with the same name find each
//! other's KV where they are answered by the same server. Clients compute it from what they send, and name it in the header
//! `x-ns-llm-prefix`; so there is no tokenizer and no template in it, and `prefixAffinity` of the Node package gives the
//! same for the same request. A hint and no promise: a wrong name costs a prefix, never an answer.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use ns_llm::Prompt;
use sha2::{Digest, Sha256};

use crate::options::{MAX_REMEMBERED_PREFIXES, PREFIX_AFFINITY_BYTES};

/// What is hashed begins with it: another rule would be another name.
const RULE: &str = "ns-llm-prefix-1";

/// The name of a prompt's beginning: 16 hexadecimal digits. `model` as the client names it, `salt` its `cache_salt`.
///
/// SHA-256 over the rule's name, the model, the salt and the first [`PREFIX_AFFINITY_BYTES`] of the prompt, each of the first
/// three followed by a zero byte; of that the first 8 bytes. Of a conversation the prompt is each message's role, a zero byte,
/// its content and a zero byte; `developer` is `system`, parts of a content are joined. Token ids are 4 bytes each, lowest
/// first.
pub fn prefix_affinity(model: &str, salt: Option<&str>, prompt: &Prompt) -> String {
    let mut hash = Sha256::new();
    for field in [RULE, model, salt.unwrap_or_default()] {
        hash.update(field);
        hash.update([0]);
    }
    let mut left = PREFIX_AFFINITY_BYTES;
    let mut add = |bytes: &[u8]| {
        let taken = bytes.len().min(left);
        hash.update(&bytes[..taken]);
        left -= taken;
    };
    match prompt {
        Prompt::Text(text) => add(text.as_bytes()),
        Prompt::Tokens(ids) => {
            ids.iter().take(PREFIX_AFFINITY_BYTES.div_ceil(4)).for_each(|id| add(&id.to_le_bytes()));
        }
        Prompt::Chat(messages) => messages.iter().for_each(|message| {
            let role = if message.role == "developer" { "system" } else { message.role.as_str() };
            [role.as_bytes(), &[0], message.content.as_bytes(), &[0]].into_iter().for_each(&mut add);
        }),
    }
    hash.finalize()[..8].iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The beginnings of the newest answered prompts, newest first: what a node tells those who choose between nodes. Each belongs
/// to the key that asked, and no other is told of it. Locked for a search through a bounded list.
#[derive(Default)]
pub(crate) struct PrefixLog {
    list: Mutex<VecDeque<(Option<String>, String)>>,
}

impl PrefixLog {
    /// A prompt of `owner` was answered here.
    pub(crate) fn note(&self, owner: Option<&str>, prefix: String) {
        let mut list = self.lock();
        list.retain(|(other, known)| *known != prefix || other.as_deref() != owner);
        list.push_front((owner.map(str::to_string), prefix));
        list.truncate(MAX_REMEMBERED_PREFIXES);
    }

    /// Those of one owner.
    pub(crate) fn of(&self, owner: Option<&str>) -> Vec<String> {
        let list = self.lock();
        list.iter().filter(|(other, _)| other.as_deref() == owner).map(|(_, prefix)| prefix.clone()).collect()
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<(Option<String>, String)>> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use ns_llm::Message;
    use serde_json::Value;

    use super::*;
    use crate::messages::read_messages;

    /// The vectors that the Node package has to give, too.
    #[test]
    fn names_are_those_of_the_vectors() {
        let vectors: Value = serde_json::from_str(include_str!("../affinity-vectors.json")).expect("JSON");
        let vectors = vectors.as_array().expect("an array");
        assert!(vectors.len() >= 8);
        for vector in vectors {
            let request = &vector["request"];
            let prompt = match (&request["messages"], &request["prompt"]) {
                (Value::Null, Value::String(text)) => Prompt::Text(text.clone()),
                (Value::Null, ids) => {
                    let ids = ids.as_array().expect("token ids").iter();
                    Prompt::Tokens(ids.map(|id| id.as_u64().expect("an id") as u32).collect())
                }
                (messages, _) => Prompt::Chat(read_messages(messages.clone(), "messages").expect("valid")),
            };
            let model = request["model"].as_str().expect("a name");
            assert_eq!(prefix_affinity(model, request["cache_salt"].as_str(), &prompt), vector["prefix"], "{request}");
        }
    }

    /// What follows the beginning changes nothing; what is in it does, and so do model and salt.
    #[test]
    fn only_the_beginning_counts() {
        let of =
            |model, salt, text: &str| prefix_affinity(model, salt, &Prompt::Chat(vec![Message::new("user", text)]));
        let long = "x".repeat(PREFIX_AFFINITY_BYTES);
        let one = of("m", None, &format!("{long} and this"));
        assert_eq!(one, of("m", None, &format!("{long} or that")));
        for other in [of("n", None, &long), of("m", Some("s"), &long), of("m", None, &format!("y{long}"))] {
            assert_ne!(one, other);
        }
        assert_eq!(one.len(), 16);
    }

    /// The newest are kept, each once, and each for its owner alone.
    #[test]
    fn prefixes_are_remembered_for_their_owners() {
        let log = PrefixLog::default();
        for number in 0..MAX_REMEMBERED_PREFIXES + 3 {
            log.note(None, number.to_string());
        }
        log.note(Some("a"), "secret".to_string());
        log.note(None, "10".to_string());
        let known = log.of(None);
        assert_eq!((known[0].as_str(), known.len()), ("10", MAX_REMEMBERED_PREFIXES - 1));
        assert_eq!(known.iter().filter(|prefix| *prefix == "10").count(), 1);
        assert_eq!((log.of(Some("a")), log.of(Some("b"))), (vec!["secret".to_string()], Vec::new()));
    }
}
