//! The bytes that each token stands for, as a table made once: streaming then costs a look-up per token and never decodes
//! an answer again from its start.
//!
//! Three families of decoders are known, which between them cover the supported architectures. *Byte-level* (Radford et
//! al. 2019): each character of a token stands for one byte. *SentencePiece-like* (Kudo & Richardson 2018,
//! arXiv:1808.06226): tokens are text with `▁` for a space, `<0xNN>` for single bytes, and a space at the beginning of
//! a text that the encoder added and the decoder takes away. *WordPiece* (Wu et al. 2016, arXiv:1609.08144): a token begins
//! a word unless `##` stands before it.

use serde_json::Value;
use tokenizers::{ModelWrapper, Tokenizer};

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
        let (rule, leading_spaces) = match tokenizer.get_model() {
            // Files of encoders may have no decoder, for nothing is decoded there. The library puts spaces between tokens
            // then.
            ModelWrapper::WordPiece(_) if decoder.is_null() => {
                (Rule::WordPiece { prefix: String::new(), cleanup: false }, LeadingSpaces::Dropped(1))
            }
            _ => decoder_rule(decoder)?,
        };
        let (mut bytes, mut starts) = (Vec::new(), vec![0]);
        // Copying the vocabulary only to find its highest id would cost more than all the rest here.
        let (mut num_left, mut num_ids) = (tokenizer.get_vocab_size(true), 0);
        for token_id in 0..MAX_TOKEN_IDS {
            if num_left == 0 {
                break;
            }
            if let Some(token) = tokenizer.id_to_token(token_id) {
                append_piece(&token, &rule, &mut bytes);
                (num_left, num_ids) = (num_left - 1, token_id as usize + 1);
            }
            let end = u32::try_from(bytes.len()).map_err(|_| unsupported("the vocabulary's texts exceed 4 GiB"))?;
            starts.push(end);
        }
        // Of texts that share an id one is found.
        if num_left > 0 {
            check_highest_id(tokenizer)?;
            starts.truncate(num_ids + 1);
            starts.shrink_to_fit();
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
    Replaced {
        marker: String,
        byte_fallback: bool,
    },
    /// Spaces before all tokens but those that begin with `prefix`; `cleanup`: and but punctuation.
    WordPiece {
        prefix: String,
        cleanup: bool,
    },
}

/// What the library's `cleanup` joins to the word before.
const JOINED: [&str; 9] = [".", "?", "!", ",", "n't", "'m", "'s", "'ve", "'re"];

/// Vocabularies may have holes, and texts that share an id, but not so that one absurd id costs gigabytes.
fn check_highest_id(tokenizer: &Tokenizer) -> Result<()> {
    match tokenizer.get_vocab(true).into_values().max() {
        Some(highest @ MAX_TOKEN_IDS..) => Err(Error::Config {
            file: "tokenizer.json",
            field: "model.vocab".to_string(),
            reason: format!("has token id {highest}, at most {} is allowed", MAX_TOKEN_IDS - 1),
        }),
        _ => Ok(()),
    }
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
            ("WordPiece", _) => {
                let prefix = step["prefix"].as_str().unwrap_or("##").to_string();
                rule = Rule::WordPiece { prefix, cleanup: step["cleanup"].as_bool().unwrap_or(true) };
                leading_spaces = LeadingSpaces::Dropped(1);
            }
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
        Rule::WordPiece { prefix, cleanup } => match token.strip_prefix(prefix.as_str()) {
            Some(rest) if !prefix.is_empty() => bytes.extend_from_slice(rest.as_bytes()),
            _ => {
                if !(*cleanup && JOINED.iter().any(|joined| token.starts_with(joined))) {
                    bytes.push(b' ');
                }
                bytes.extend_from_slice(token.as_bytes());
            }
        },
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

    /// Pieces of a WordPiece vocabulary, one behind the other, are the library's own decoding, with and without its
    /// cleaning of punctuation, and without any decoder.
    #[test]
    fn word_pieces_are_joined_as_the_library_does() {
        let words = ["play", "##ing", "##s", "it", "'", "s", ".", ",", "!", "n't", "'re", "(", "a", "do", "[CLS]"];
        let word_piece = |cleanup| json!({"type": "WordPiece", "prefix": "##", "cleanup": cleanup});
        for decoder in [word_piece(true), word_piece(false), Value::Null] {
            let vocab: serde_json::Map<_, _> =
                words.iter().enumerate().map(|(id, word)| (word.to_string(), json!(id))).collect();
            let tokenizer = json!({
                "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
                "pre_tokenizer": null, "post_processor": null, "decoder": decoder,
                "model": {"type": "WordPiece", "unk_token": "a", "continuing_subword_prefix": "##",
                          "max_input_chars_per_word": 100, "vocab": vocab},
            });
            let tokenizer = Tokenizer::from_bytes(tokenizer.to_string()).unwrap();
            let table = PieceTable::new(&tokenizer, &decoder).unwrap();
            for first in (0..words.len() as u32).filter(|&id| !words[id as usize].starts_with("##")) {
                for second in 0..words.len() as u32 {
                    let ids = [first, second, (first + second) % words.len() as u32, 0, 1];
                    let bytes: Vec<u8> = ids.iter().flat_map(|&id| table.bytes(id).to_vec()).collect();
                    let text = String::from_utf8(bytes).unwrap();
                    let expected = tokenizer.decode(&ids, false).unwrap();
                    assert_eq!(text.strip_prefix(' ').unwrap_or(&text), expected, "{ids:?}");
                }
            }
            assert_eq!(table.leading_spaces, LeadingSpaces::Dropped(1));
        }
    }

    /// Vocabularies have holes, texts that share an id, and added tokens behind the others; ids end where limits say.
    #[test]
    fn ids_may_have_holes_and_several_texts() {
        let with = |vocab: Value, added: &[&str]| {
            let added: Vec<Value> = added
                .iter()
                .map(|text| {
                    json!({"id": 0, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
                           "normalized": false, "special": false})
                })
                .collect();
            let tokenizer = json!({
                "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
                "pre_tokenizer": null, "post_processor": null, "decoder": {"type": "Fuse"},
                "model": {"type": "BPE", "vocab": vocab, "merges": []},
            });
            let tokenizer = Tokenizer::from_bytes(tokenizer.to_string()).unwrap();
            PieceTable::new(&tokenizer, &json!({"type": "Fuse"}))
        };
        let pieces = |table: &PieceTable| -> Vec<String> {
            let ids = 0..table.num_ids() as u32;
            ids.map(|id| String::from_utf8(table.bytes(id).to_vec()).unwrap()).collect()
        };
        assert_eq!(pieces(&with(json!({}), &[]).unwrap()), [""; 0]);
        assert_eq!(pieces(&with(json!({"a": 1, "b": 4}), &[]).unwrap()), ["", "a", "", "", "b"]);
        // The library numbers added tokens from the size of the vocabulary on.
        assert_eq!(pieces(&with(json!({"a": 0, "b": 1}), &["new"]).unwrap()), ["a", "b", "new"]);
        let shared = with(json!({"a": 0, "b": 0, "c": 2}), &[]).unwrap();
        assert!(["a", "b"].contains(&pieces(&shared)[0].as_str()), "{shared:?}");
        assert_eq!(pieces(&shared)[1..], ["", "c"]);
        assert!(shared.starts.capacity() < 100, "{}", shared.starts.capacity());
        let highest = with(json!({"a": 0, "b": MAX_TOKEN_IDS - 1}), &[]).unwrap();
        assert_eq!((highest.num_ids() as u32, highest.bytes(MAX_TOKEN_IDS - 1)), (MAX_TOKEN_IDS, &b"b"[..]));
        let error = with(json!({"a": 0, "b": MAX_TOKEN_IDS}), &[]).unwrap_err().to_string();
        assert!(error.contains("has token id 4194304, at most 4194303 is allowed"), "{error}");
    }

    /// A decoder that is not understood is refused by name instead of giving wrong text.
    #[test]
    fn unknown_decoders_are_refused() {
        for decoder in [json!({"type": "CTC"}), json!({"type": "Strip", "content": "x", "start": 1, "stop": 0})] {
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
