//! The bytes that each token stands for, as a table made once: streaming then costs a look-up per token and never decodes
//! an answer again from its start.
//!
//! Two families of decoders are known, which between them cover the supported architectures. *Byte-level* (Radford et
//! al. 2019): each character of a token stands for one byte. *SentencePiece-like* (Kudo & Richardson 2018,
//! arXiv:1808.06226): tokens are text with `▁` for a space, `<0xNN>` for single bytes, and a space at the beginning of
//! a text that the encoder added and the decoder takes away.

use serde_json::Value;
use tokenizers::Tokenizer;

use crate::config::MAX_TOKEN_IDS;
use crate::error::{Error, Result};

/// What happens to spaces at the beginning of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LeadingSpaces {
    Kept,
    /// At most so many are dropped, however they are spread over tokens.
    Dropped(usize),
    /// All in the first token are.
    DroppedInFirstToken,
}

/// Bytes of every token.
#[derive(Debug)]
pub(super) struct PieceTable {
    bytes: Vec<u8>,
    /// `[vocab_size + 1]`: piece `i` is `bytes[starts[i]..starts[i + 1]]`.
    starts: Vec<u32>,
    pub(super) leading_spaces: LeadingSpaces,
}

impl PieceTable {
    /// `decoder`: that field of `tokenizer.json`. Ids without a token stand for nothing.
    pub(super) fn new(tokenizer: &Tokenizer, decoder: &Value) -> Result<Self> {
        let (rule, leading_spaces) = decoder_rule(decoder)?;
        let (mut bytes, mut starts) = (Vec::new(), vec![0]);
        for token_id in 0..num_ids(tokenizer)? {
            if let Some(token) = tokenizer.id_to_token(token_id) {
                append_piece(&token, &rule, &mut bytes);
            }
            let end = u32::try_from(bytes.len()).map_err(|_| unsupported("the vocabulary's texts exceed 4 GiB"))?;
            starts.push(end);
        }
        Ok(PieceTable { bytes, starts, leading_spaces })
    }

    /// Bytes of a token; empty for an id that has none.
    pub(super) fn bytes(&self, token_id: u32) -> &[u8] {
        let idx = token_id as usize;
        match self.starts.get(idx..idx + 2) {
            Some(&[start, end]) => &self.bytes[start as usize..end as usize],
            _ => &[],
        }
    }

    /// One more than the highest id that has a token.
    pub(super) fn num_ids(&self) -> usize {
        self.starts.len() - 1
    }
}

/// How a token's text becomes bytes.
enum Rule {
    ByteLevel,
    Replaced { marker: String, byte_fallback: bool },
}

/// One more than the highest id. Vocabularies may have holes, but not so that one absurd id costs gigabytes.
fn num_ids(tokenizer: &Tokenizer) -> Result<u32> {
    let num_ids = tokenizer.get_vocab(true).into_values().max().map_or(0, |id| u64::from(id) + 1);
    u32::try_from(num_ids).ok().filter(|&n| n <= MAX_TOKEN_IDS).ok_or_else(|| Error::Config {
        file: "tokenizer.json",
        field: "model.vocab".to_string(),
        reason: format!("has token id {}, at most {} is allowed", num_ids - 1, MAX_TOKEN_IDS - 1),
    })
}

fn decoder_rule(decoder: &Value) -> Result<(Rule, LeadingSpaces)> {
    let steps = match decoder["type"].as_str() {
        Some("Sequence") => decoder["decoders"].as_array().map(Vec::as_slice).unwrap_or_default(),
        _ => std::slice::from_ref(decoder),
    };
    let mut rule = Rule::Replaced { marker: String::new(), byte_fallback: false };
    let mut leading_spaces = LeadingSpaces::Kept;
    for step in steps {
        match (step["type"].as_str().unwrap_or("null"), &mut rule) {
            ("ByteLevel", _) => rule = Rule::ByteLevel,
            ("Replace", Rule::Replaced { marker, .. }) if step["content"] == " " => {
                *marker = step["pattern"]["String"].as_str().unwrap_or_default().to_string();
            }
            ("Metaspace", Rule::Replaced { marker, .. }) => {
                *marker = step["replacement"].as_str().unwrap_or("▁").to_string();
                if step["prepend_scheme"] != "never" {
                    leading_spaces = LeadingSpaces::DroppedInFirstToken;
                }
            }
            ("ByteFallback", Rule::Replaced { byte_fallback, .. }) => *byte_fallback = true,
            ("Fuse", _) => {}
            ("Strip", _) if step["content"] == " " && step["stop"] == 0 => {
                leading_spaces = LeadingSpaces::Dropped(step["start"].as_u64().unwrap_or(0) as usize);
            }
            (other, _) => return Err(unsupported(&format!("`{other}` is not supported"))),
        }
    }
    Ok((rule, leading_spaces))
}

fn unsupported(reason: &str) -> Error {
    Error::Config { file: "tokenizer.json", field: "decoder".to_string(), reason: reason.to_string() }
}

fn append_piece(token: &str, rule: &Rule, bytes: &mut Vec<u8>) {
    match rule {
        Rule::ByteLevel => {
            let start = bytes.len();
            for c in token.chars() {
                let Some(byte) = byte_of(c) else {
                    // Added tokens are plain text, and may hold characters that stand for no byte.
                    bytes.truncate(start);
                    return bytes.extend_from_slice(token.as_bytes());
                };
                bytes.push(byte);
            }
        }
        Rule::Replaced { byte_fallback: true, .. } if fallback_byte(token).is_some() => {
            bytes.extend(fallback_byte(token));
        }
        Rule::Replaced { marker, .. } if marker.is_empty() => bytes.extend_from_slice(token.as_bytes()),
        Rule::Replaced { marker, .. } => bytes.extend_from_slice(token.replace(marker.as_str(), " ").as_bytes()),
    }
}

/// The byte that a character of a byte-level token stands for: printable Latin-1 characters stand for themselves, the
/// 68 other bytes are written, in ascending order, as the characters from U+0100 on.
fn byte_of(c: char) -> Option<u8> {
    match u32::from(c) {
        code @ (0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF) => Some(code as u8),
        code @ 0x100..=0x120 => Some((code - 0x100) as u8),
        code @ 0x121..=0x142 => Some((code - 0x121 + 0x7F) as u8),
        0x143 => Some(0xAD),
        _ => None,
    }
}

/// The byte of a token of the form `<0xNN>`.
fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 { u8::from_str_radix(digits, 16).ok() } else { None }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Each of the 256 bytes is written by exactly one character.
    #[test]
    fn characters_and_bytes_are_one_to_one() {
        let mut bytes: Vec<u8> = (0..0x200).filter_map(char::from_u32).filter_map(byte_of).collect();
        assert_eq!(bytes.len(), 256);
        bytes.sort_unstable();
        bytes.dedup();
        assert_eq!(bytes.len(), 256);
        assert_eq!((byte_of('Ġ'), byte_of('Ċ'), byte_of('ł')), (Some(b' '), Some(b'\n'), Some(0xA0)));
    }

    /// A decoder that is not understood is refused by name instead of giving wrong text.
    #[test]
    fn unknown_decoders_are_refused() {
        for decoder in [json!({"type": "WordPiece"}), json!({"type": "Strip", "content": "x", "start": 1, "stop": 0})] {
            match decoder_rule(&decoder) {
                Err(Error::Config { field, reason, .. }) => {
                    assert_eq!(field, "decoder");
                    assert!(reason.contains(decoder["type"].as_str().unwrap()), "{reason}");
                }
                other => panic!("{decoder}: {:?}", other.map(|(_, spaces)| spaces)),
            }
        }
    }
}
