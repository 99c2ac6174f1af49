//! A whole answer, and its bytes. Entries are kept encoded: an entry's size is then exactly its length, and the same bytes can
//! lie in another tier.
//!
//! ```text
//! answer:    magic 4 "nsRA" | version u32 | seed u64 | prompt tokens u32 | completion tokens u32 | choices u32 |
//!            prompt logprobs | choice ..
//! choice:    reason u8 | text bytes u32 | text | tokens u32 | token u32 .. | logprobs
//! logprobs:  entries u32 | entry ..
//! entry:     token u32 | logprob f32 | top u32 | (token u32 | logprob f32) ..
//! ```
//!
//! All numbers are little-endian. Reading believes nothing: no length is allocated before so many bytes are there, each field
//! has a range, and what is left over is an error. A reader of a tier takes every error as a miss.

use std::sync::Arc;

use thiserror::Error;

use crate::config::{MAX_CHOICES, MAX_LOGPROBS};
use crate::request::{FinishReason, Logprob, Request, TokenLogprobs};

const MAGIC: [u8; 4] = *b"nsRA";
const VERSION: u32 = 1;
/// Smallest encoding of one entry of logprobs.
const MIN_ENTRY_BYTES: usize = 12;

/// A finished request's answer.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct CachedAnswer {
    /// The seed that it was computed with.
    pub seed: u64,
    /// Tokens of its prompt.
    pub prompt_tokens: u32,
    /// Tokens of all choices.
    pub completion_tokens: u32,
    /// For each prompt token from the second on, when asked for.
    pub prompt_logprobs: Vec<TokenLogprobs>,
    /// By index.
    pub choices: Vec<CachedChoice>,
}

/// One choice of it.
#[derive(Debug, Clone, PartialEq)]
pub struct CachedChoice {
    /// All of its text.
    pub text: String,
    /// All of its tokens.
    pub token_ids: Vec<u32>,
    /// One entry per token when asked for.
    pub logprobs: Vec<TokenLogprobs>,
    /// Why it ended.
    pub reason: FinishReason,
}

/// Why bytes are no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum DecodeError {
    /// They end before what must be there.
    #[error("the bytes end within `{field}`")]
    Truncated {
        /// What was read.
        field: &'static str,
    },
    /// A field has a value that it cannot have.
    #[error("`{field}` is {value}, must be {expected}")]
    Range {
        /// Which field.
        field: &'static str,
        /// What it says.
        value: u64,
        /// What it may be, in words.
        expected: &'static str,
    },
    /// Text is not UTF-8.
    #[error("the text of choice {choice} is not UTF-8")]
    Text {
        /// Which choice.
        choice: usize,
    },
    /// There are bytes after the end.
    #[error("{count} bytes follow the end")]
    Surplus {
        /// How many.
        count: usize,
    },
}

impl CachedAnswer {
    /// Bytes of [`CachedAnswer::encode`] at most, without encoding.
    pub fn encoded_bytes(&self) -> usize {
        let logprobs = |entries: &[TokenLogprobs]| 4 + entries.iter().map(|e| 12 + 8 * e.top.len()).sum::<usize>();
        let choice = |c: &CachedChoice| 9 + c.text.len() + 4 * c.token_ids.len() + logprobs(&c.logprobs);
        28 + logprobs(&self.prompt_logprobs) + self.choices.iter().map(choice).sum::<usize>()
    }

    /// Its bytes.
    pub fn encode(&self) -> Arc<[u8]> {
        let mut bytes = Vec::with_capacity(self.encoded_bytes());
        bytes.extend(MAGIC);
        put(&mut bytes, VERSION);
        bytes.extend(self.seed.to_le_bytes());
        put(&mut bytes, self.prompt_tokens);
        put(&mut bytes, self.completion_tokens);
        put_len(&mut bytes, self.choices.len());
        put_logprobs(&mut bytes, &self.prompt_logprobs);
        for CachedChoice { text, token_ids, logprobs, reason } in &self.choices {
            bytes.push(match reason {
                FinishReason::Stop => 0,
                FinishReason::Length => 1,
            });
            put_len(&mut bytes, text.len());
            bytes.extend(text.bytes());
            put_len(&mut bytes, token_ids.len());
            token_ids.iter().for_each(|&id| put(&mut bytes, id));
            put_logprobs(&mut bytes, logprobs);
        }
        bytes.into()
    }

    /// The answer of these bytes.
    pub fn decode(bytes: &[u8]) -> Result<CachedAnswer, DecodeError> {
        let mut reader = Reader { bytes };
        let magic = u32::from_le_bytes(MAGIC);
        reader.number("magic", u64::from(magic)..=u64::from(magic), "that of an answer")?;
        reader.number("version", u64::from(VERSION)..=u64::from(VERSION), "1")?;
        let seed = reader.wide("seed")?;
        let prompt_tokens = reader.u32("prompt_tokens")?;
        let completion_tokens = reader.u32("completion_tokens")?;
        let num_choices = reader.number("choices", 1..=MAX_CHOICES as u64, "1 to 8")?;
        let prompt_logprobs = reader.logprobs("prompt_logprobs")?;
        let choices = (0..num_choices).map(|choice| reader.choice(choice)).collect::<Result<Vec<_>, _>>()?;
        match reader.bytes.len() {
            0 => Ok(CachedAnswer { seed, prompt_tokens, completion_tokens, prompt_logprobs, choices }),
            count => Err(DecodeError::Surplus { count }),
        }
    }

    /// Whether this can be the answer to `request` at all. Its key says so already; a tier beyond the process may lie.
    pub fn fits(&self, request: &Request, prompt_tokens: usize, max_tokens: usize, vocab_size: usize) -> bool {
        let fits = |choice: &CachedChoice| {
            let logprobs = if request.logprobs.is_some() { choice.token_ids.len() } else { 0 };
            choice.token_ids.len() <= max_tokens
                && choice.logprobs.len() == logprobs
                && choice.token_ids.iter().all(|&id| (id as usize) < vocab_size)
        };
        let prompt_logprobs = if request.prompt_logprobs { prompt_tokens.saturating_sub(1) } else { 0 };
        self.choices.len() == request.n
            && self.prompt_tokens as usize == prompt_tokens
            && self.completion_tokens as usize == self.choices.iter().map(|c| c.token_ids.len()).sum::<usize>()
            && self.prompt_logprobs.len() == prompt_logprobs
            && self.choices.iter().all(fits)
    }

    /// An answer of `num_choices` choices that have said nothing yet.
    pub fn begin(num_choices: usize) -> Self {
        let (text, token_ids, logprobs) = (String::new(), Vec::new(), Vec::new());
        let choice = CachedChoice { text, token_ids, logprobs, reason: FinishReason::Length };
        CachedAnswer { choices: vec![choice; num_choices], ..CachedAnswer::default() }
    }
}

fn put(bytes: &mut Vec<u8>, number: u32) {
    bytes.extend(number.to_le_bytes());
}

/// Entries are bounded by [`MAX_RESPONSE_BYTES`](crate::config::MAX_RESPONSE_BYTES), so a length always fits; one that did
/// not would make bytes that are refused when they are read.
fn put_len(bytes: &mut Vec<u8>, len: usize) {
    put(bytes, u32::try_from(len).unwrap_or(u32::MAX));
}

fn put_logprobs(bytes: &mut Vec<u8>, entries: &[TokenLogprobs]) {
    let put_one = |bytes: &mut Vec<u8>, logprob: &Logprob| {
        put(bytes, logprob.token_id);
        put(bytes, logprob.logprob.to_bits());
    };
    put_len(bytes, entries.len());
    for TokenLogprobs { chosen, top } in entries {
        put_one(bytes, chosen);
        put_len(bytes, top.len());
        top.iter().for_each(|logprob| put_one(bytes, logprob));
    }
}

/// What is left to be read.
struct Reader<'a> {
    bytes: &'a [u8],
}

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize, field: &'static str) -> Result<&'a [u8], DecodeError> {
        let (taken, rest) = self.bytes.split_at_checked(count).ok_or(DecodeError::Truncated { field })?;
        self.bytes = rest;
        Ok(taken)
    }

    fn u32(&mut self, field: &'static str) -> Result<u32, DecodeError> {
        let bytes = self.take(4, field)?;
        Ok(u32::from_le_bytes(bytes.try_into().expect("four bytes were taken")))
    }

    fn wide(&mut self, field: &'static str) -> Result<u64, DecodeError> {
        let bytes = self.take(8, field)?;
        Ok(u64::from_le_bytes(bytes.try_into().expect("eight bytes were taken")))
    }

    fn number(
        &mut self,
        field: &'static str,
        range: std::ops::RangeInclusive<u64>,
        expected: &'static str,
    ) -> Result<usize, DecodeError> {
        let value = u64::from(self.u32(field)?);
        match range.contains(&value) {
            true => Ok(value as usize),
            false => Err(DecodeError::Range { field, value, expected }),
        }
    }

    /// A count of things of at least `unit` bytes, all of which must still be there.
    fn count(&mut self, field: &'static str, unit: usize) -> Result<usize, DecodeError> {
        let count = self.u32(field)? as usize;
        match count.checked_mul(unit) {
            Some(bytes) if bytes <= self.bytes.len() => Ok(count),
            _ => Err(DecodeError::Truncated { field }),
        }
    }

    fn logprob(&mut self) -> Result<Logprob, DecodeError> {
        Ok(Logprob { token_id: self.u32("logprobs")?, logprob: f32::from_bits(self.u32("logprobs")?) })
    }

    fn logprobs(&mut self, field: &'static str) -> Result<Vec<TokenLogprobs>, DecodeError> {
        let count = self.count(field, MIN_ENTRY_BYTES)?;
        let entry = |reader: &mut Self| {
            let chosen = reader.logprob()?;
            let num_top = reader.number("top logprobs", 0..=MAX_LOGPROBS as u64, "0 to 20")?;
            let top = (0..num_top).map(|_| reader.logprob()).collect::<Result<Arc<[_]>, _>>()?;
            Ok(TokenLogprobs { chosen, top })
        };
        (0..count).map(|_| entry(self)).collect()
    }

    fn choice(&mut self, choice: usize) -> Result<CachedChoice, DecodeError> {
        let reason = match self.take(1, "reason")?[0] {
            0 => FinishReason::Stop,
            1 => FinishReason::Length,
            value => {
                let (field, value) = ("reason", u64::from(value));
                return Err(DecodeError::Range { field, value, expected: "0 or 1" });
            }
        };
        let num_bytes = self.count("text", 1)?;
        let text = std::str::from_utf8(self.take(num_bytes, "text")?).map_err(|_| DecodeError::Text { choice })?;
        let num_tokens = self.count("tokens", 4)?;
        let token_ids = (0..num_tokens).map(|_| self.u32("tokens")).collect::<Result<Vec<_>, _>>()?;
        let logprobs = self.logprobs("logprobs")?;
        Ok(CachedChoice { text: text.to_string(), token_ids, logprobs, reason })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logprobs(count: u32, num_top: u32) -> Vec<TokenLogprobs> {
        let logprob = |token_id| Logprob { token_id, logprob: -0.25 * token_id as f32 };
        (0..count).map(|id| TokenLogprobs { chosen: logprob(id), top: (0..num_top).map(logprob).collect() }).collect()
    }

    fn answer() -> CachedAnswer {
        let choice = |text: &str, token_ids: &[u32], num_top, reason| CachedChoice {
            text: text.to_string(),
            token_ids: token_ids.to_vec(),
            logprobs: logprobs(token_ids.len() as u32, num_top),
            reason,
        };
        CachedAnswer {
            seed: u64::MAX - 1,
            prompt_tokens: 3,
            completion_tokens: 3,
            prompt_logprobs: logprobs(2, 1),
            choices: vec![
                choice("später", &[7, 8], 2, FinishReason::Length),
                choice("", &[9], 20, FinishReason::Stop),
                choice("x", &[], 0, FinishReason::Stop),
            ],
        }
    }

    /// What is read is what was written, bit for bit, and the bytes are as many as were announced.
    #[test]
    fn answers_come_back() {
        for answer in [answer(), CachedAnswer::begin(1), CachedAnswer::begin(MAX_CHOICES)] {
            let bytes = answer.encode();
            assert_eq!(bytes.len(), answer.encoded_bytes());
            assert_eq!(CachedAnswer::decode(&bytes), Ok(answer));
        }
    }

    /// Cut anywhere, or with a byte more, it is an error: every partial answer is a miss.
    #[test]
    fn partial_bytes_are_refused() {
        let bytes = answer().encode();
        for end in 0..bytes.len() {
            assert!(CachedAnswer::decode(&bytes[..end]).is_err(), "cut at {end} of {}", bytes.len());
        }
        assert_eq!(CachedAnswer::decode(&[&bytes[..], &[0]].concat()), Err(DecodeError::Surplus { count: 1 }));
    }

    /// Every bit flipped, and random bytes overwritten, gives an error or another answer, never a panic, and no more memory
    /// than the bytes account for.
    #[test]
    fn lies_are_errors_or_other_answers() {
        let original = answer();
        let bytes = original.encode();
        let (mut errors, mut others) = (0, 0);
        let mut check = |changed: &[u8]| match CachedAnswer::decode(changed) {
            Err(_) => errors += 1,
            Ok(other) => {
                // Each length was paid for in bytes; NaN logprobs differ from themselves.
                assert_eq!(other.encode()[..], changed[..]);
                others += 1;
            }
        };
        for bit in 0..bytes.len() * 8 {
            let mut changed = bytes.to_vec();
            changed[bit / 8] ^= 1 << (bit % 8);
            check(&changed);
        }
        let mut state = 1_u64;
        for _ in 0..20_000 {
            let mut changed = bytes.to_vec();
            for _ in 0..4 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let at = (state >> 33) as usize % changed.len();
                changed[at] = (state >> 20) as u8;
            }
            check(&changed);
        }
        assert!(errors > 1_000 && others > 1_000, "{errors} errors, {others} other answers");
    }

    /// An answer of another shape than the request asks for does not fit.
    #[test]
    fn answers_of_another_shape_do_not_fit() {
        let mut request = Request::tokens([1, 2, 3]);
        (request.n, request.logprobs, request.prompt_logprobs) = (3, Some(20), true);
        let good = answer();
        assert!(good.fits(&request, 3, 2, 10));
        assert!(!good.fits(&request, 3, 2, 9), "a token outside the vocabulary");
        assert!(!good.fits(&request, 3, 1, 10), "more tokens than asked for");
        assert!(!good.fits(&request, 4, 2, 10), "another prompt");
        for change in
            [(|r: &mut Request| r.n = 2) as fn(&mut Request), |r| r.logprobs = None, |r| r.prompt_logprobs = false]
        {
            let mut other = request.clone();
            change(&mut other);
            assert!(!good.fits(&other, 3, 2, 10), "{other:?}");
        }
    }
}
