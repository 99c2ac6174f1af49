//! Text to ids and back, through the `tokenizers` crate. Knows no model, template or request; one [`Tokenizer`] is shared
//! by all threads.
//!
//! Beside plain encoding there is one for texts of which a part came from a user: special tokens written in that part
//! stay text ([`Tokenizer::encode_with_content`]). Decoding is a table of bytes per token (`tokenizer/pieces.rs`), so
//! that a stream costs the same per token however long it is (`tokenizer/stream.rs`).

mod added;
mod config;
mod pieces;
mod stop;
mod stream;

use std::ops::Range;

use serde::Deserialize;
use serde_json::Value;
use tokenizers::models::bpe::BPE;
use tokenizers::models::unigram::Unigram;
use tokenizers::models::wordpiece::WordPiece;
use tokenizers::{
    DecoderWrapper, Model, NormalizedString, Normalizer, NormalizerWrapper, OffsetReferential, OffsetType,
    PostProcessorWrapper, PreTokenizedString, PreTokenizer, PreTokenizerWrapper, Token, TokenizerImpl,
};

use crate::config::MAX_JSON_BYTES;
use crate::error::{Error, Result};
use added::{AddedTokens, Found};
pub use config::TokenizerConfig;
use pieces::PieceTable;
pub use stop::{StopMatcher, StopStrings};
pub use stream::{TextDecoder, TextStart, TextStream};

const FILE: &str = "tokenizer.json";

/// A vocabulary and its rules.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    added: AddedTokens,
    pieces: PieceTable,
    /// `[num_ids]` whether the token is special.
    special: Vec<bool>,
    /// Ids that go before a prompt.
    prefix: Vec<u32>,
    /// Ids that go behind a prompt.
    suffix: Vec<u32>,
}

/// The parts of `tokenizer.json` that are read here, too.
#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct Outline {
    #[serde(default)]
    decoder: Value,
    #[serde(default)]
    model: Option<ModelKind>,
}

/// Files of old versions do not say of which kind their model is.
#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct ModelKind {
    #[serde(rename = "type")]
    kind: Option<String>,
}

/// A tokenizer with a model of one kind, all else of any.
type With<M> = TokenizerImpl<M, NormalizerWrapper, PreTokenizerWrapper, PostProcessorWrapper, DecoderWrapper>;

impl Tokenizer {
    /// Reads `tokenizer.json`, and the choices that `tokenizer_config.json` makes.
    pub fn from_json(tokenizer_json: &[u8], config: &TokenizerConfig) -> Result<Self> {
        if tokenizer_json.len() as u64 > MAX_JSON_BYTES {
            return Err(file_error("(file)", format!("has {} bytes, at most {MAX_JSON_BYTES}", tokenizer_json.len())));
        }
        let file: Outline = serde_json::from_slice(tokenizer_json).map_err(|e| file_error("(root)", e.to_string()))?;
        let kind = file.model.and_then(|model| model.kind);
        let mut inner = parse(tokenizer_json, kind.as_deref()).map_err(|e| file_error("(root)", e.to_string()))?;
        // Files may keep the settings of their training; a prompt is neither cut nor filled up silently.
        inner.with_truncation(None).map_err(|e| file_error("truncation", e.to_string()))?;
        inner.with_padding(None);
        let pieces = PieceTable::new(&inner, &file.decoder)?;
        let added = AddedTokens::new(inner.get_added_tokens_decoder());
        let mut special = vec![false; pieces.num_ids()];
        added.special().for_each(|(token_id, _)| special[token_id as usize] = true);
        let mut tokenizer = Tokenizer { inner, added, pieces, special, prefix: Vec::new(), suffix: Vec::new() };
        tokenizer.set_prompt_frame(config)?;
        Ok(tokenizer)
    }

    /// Ids of `text`. Special tokens written in it count. `add_special`: with what the configuration puts around a
    /// prompt.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, false).map_err(encode_error)?;
        if !add_special {
            return Ok(encoding.get_ids().to_vec());
        }
        Ok([&self.prefix, encoding.get_ids(), &self.suffix].concat())
    }

    /// Ids of `text` with what the configuration puts around a prompt, cut to `limit_tokens` inside of that; and how many
    /// there were.
    pub fn encode_truncated(&self, text: &str, limit_tokens: usize) -> Result<(Vec<u32>, usize)> {
        let ids = self.encode(text, false)?;
        let num_around = self.prefix.len() + self.suffix.len();
        let kept = ids.len().min(limit_tokens.saturating_sub(num_around));
        Ok(([&self.prefix, &ids[..kept], &self.suffix].concat(), ids.len() + num_around))
    }

    /// Ids of `text`, in which the text of special tokens is text.
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_with_content(text, std::slice::from_ref(&(0..text.len())))
    }

    /// Ids of `text`, of which the ranges `content` came from somebody who may not write special tokens. An occurrence
    /// that touches none of them counts; any other is text. An empty range forbids occurrences across its place.
    ///
    /// When this makes no difference the ids are exactly those of [`Tokenizer::encode`]: text on both sides of a
    /// range's border is always encoded together.
    pub fn encode_with_content(&self, text: &str, content: &[Range<usize>]) -> Result<Vec<u32>> {
        let counts = |token: Range<usize>| !touches(content, &token);
        let all = self.added.find(text, |_| true);
        let own = self.added.find(text, counts);
        let num_special = own.iter().filter(|found| self.is_special(found.token_id)).count();
        let allowed = |ids: &[u32]| ids.iter().filter(|&&id| self.is_special(id)).count() <= num_special;
        if all == own {
            let ids = self.encode(text, false)?;
            if allowed(&ids) {
                return Ok(ids);
            }
        }
        let ids = self.encode_between(text, &own)?;
        if allowed(&ids) {
            return Ok(ids);
        }
        // A model of whole words can yield a special token from plain text: cut such words behind their first letter.
        self.encode_between(text, &self.cut_words(text, &own))
    }

    /// Text of `ids`; bytes that are not UTF-8 become U+FFFD, ids without a token nothing.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let mut decoder = TextDecoder::new(self, TextStart::Beginning, skip_special);
        let mut text = String::new();
        ids.iter().for_each(|&token_id| decoder.push(self, token_id, &mut text));
        decoder.finish(&mut text);
        text
    }

    /// One more than the highest id. The model's output can be wider (rows of padding).
    pub fn vocab_size(&self) -> usize {
        self.special.len()
    }
    /// Whether the token is special: it controls, and leaves no text in an answer.
    pub fn is_special(&self, token_id: u32) -> bool {
        self.special.get(token_id as usize).copied().unwrap_or(false)
    }
    /// All special tokens with their texts, the longest first.
    pub fn special_tokens(&self) -> impl Iterator<Item = (u32, &str)> {
        self.added.special()
    }
    /// The id of a token, by the text that the vocabulary has for it.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }
    /// The bytes that a token stands for; empty when there is no such token.
    pub fn token_bytes(&self, token_id: u32) -> &[u8] {
        self.pieces.bytes(token_id)
    }

    /// Finds out what `tokenizer.json` puts around a text, and lets the configuration overrule it.
    fn set_prompt_frame(&mut self, config: &TokenizerConfig) -> Result<()> {
        let ids = |add_special| {
            let encoding = self.inner.encode_fast("a", add_special).map_err(encode_error)?;
            Ok(encoding.get_ids().to_vec())
        };
        let (bare, framed): (Vec<u32>, Vec<u32>) = (ids(false)?, ids(true)?);
        let inside = (0..=framed.len().saturating_sub(bare.len())).find(|&at| framed[at..].starts_with(&bare));
        let Some(at) = inside else {
            return Err(file_error("post_processor", "changes the tokens of a text".to_string()));
        };
        let token = |name: &'static str, wanted: Option<bool>| match (wanted, config.special_tokens.get(name)) {
            (None, _) => Ok(None),
            (Some(false), _) => Ok(Some(Vec::new())),
            (Some(true), Some(text)) => match self.inner.token_to_id(text) {
                Some(token_id) => Ok(Some(vec![token_id])),
                None => Err(config_error(name, format!("`{text}` is not in the vocabulary"))),
            },
            (Some(true), None) => Err(config_error(name, "is not set, but is to be added".to_string())),
        };
        let prefix = token("bos_token", config.add_bos_token)?;
        let suffix = token("eos_token", config.add_eos_token)?;
        self.suffix = suffix.unwrap_or_else(|| framed[at + bare.len()..].to_vec());
        self.prefix = prefix.unwrap_or_else(|| framed[..at].to_vec());
        Ok(())
    }

    /// Ids of `text` with the tokens of `found` in their places and everything else as text. An entry with the id
    /// [`CUT`] only keeps what is before it and behind it apart.
    fn encode_between(&self, text: &str, found: &[Found]) -> Result<Vec<u32>> {
        let mut parts = PreTokenizedString::from(text);
        parts.split(|_, whole| Ok(split_at(&whole, found))).map_err(encode_error)?;
        if let Some(normalizer) = self.inner.get_normalizer() {
            parts.normalize(|part| normalizer.normalize(part)).map_err(encode_error)?;
        }
        if let Some(pre_tokenizer) = self.inner.get_pre_tokenizer() {
            pre_tokenizer.pre_tokenize(&mut parts).map_err(encode_error)?;
        }
        parts.tokenize(|part| self.inner.get_model().tokenize(part.get())).map_err(encode_error)?;
        let splits = parts.get_splits(OffsetReferential::Original, OffsetType::Byte);
        Ok(splits.iter().filter_map(|(_, _, tokens)| tokens.as_ref()).flatten().map(|token| token.id).collect())
    }

    /// `own`, and a cut behind the first character of each special token's text that is not among them.
    fn cut_words(&self, text: &str, own: &[Found]) -> Vec<Found> {
        let taken = |token: &Range<usize>| own.iter().any(|found| overlap(&found.range, token));
        let others = self.added.find(text, |token| !taken(&token));
        let mut found = own.to_vec();
        for other in others.into_iter().filter(|other| self.is_special(other.token_id) && !taken(&other.range)) {
            let first = text[other.range.clone()].chars().next().map_or(0, char::len_utf8);
            let place = other.range.start + first;
            found.push(Found { token_id: CUT, range: place..place });
        }
        found.sort_by_key(|found| found.range.start);
        found
    }
}

/// Parses `tokenizer.json`. The library finds out itself of which kind the model is, and keeps it as a tree several times over
/// for that: with 150,000 tokens on one core of a Zen 4 some 0.6 s, where a model of a known kind takes 0.2 s. What is wrong
/// with a file is told as the library tells it.
fn parse(json: &[u8], model_kind: Option<&str>) -> serde_json::Result<tokenizers::Tokenizer> {
    parse_directly(json, model_kind).map_or_else(|| serde_json::from_slice(json), Ok)
}

fn parse_directly(json: &[u8], model_kind: Option<&str>) -> Option<tokenizers::Tokenizer> {
    match model_kind? {
        "BPE" => serde_json::from_slice::<With<BPE>>(json).ok().map(Into::into),
        "Unigram" => serde_json::from_slice::<With<Unigram>>(json).ok().map(Into::into),
        "WordPiece" => serde_json::from_slice::<With<WordPiece>>(json).ok().map(Into::into),
        _ => None,
    }
}

/// Stands for a place between two parts of a text, not for a token.
const CUT: u32 = u32::MAX;

/// The parts of `whole` between the tokens of `found`, and these.
fn split_at(whole: &NormalizedString, found: &[Found]) -> Vec<(NormalizedString, Option<Vec<Token>>)> {
    let slice = |range: Range<usize>| {
        whole.slice(tokenizers::normalizer::Range::Original(range)).expect("found on character boundaries")
    };
    let (mut parts, mut at) = (Vec::new(), 0);
    for Found { token_id, range } in found {
        if at < range.start {
            parts.push((slice(at..range.start), None));
        }
        if *token_id != CUT {
            let token = slice(range.clone());
            let value = token.get().to_string();
            let offsets = (0, value.len());
            parts.push((token, Some(vec![Token::new(*token_id, value, offsets)])));
        }
        at = range.end;
    }
    if at < whole.get().len() {
        parts.push((slice(at..whole.get().len()), None));
    }
    parts
}

/// Whether two ranges have a byte in common, or one is a place inside the other.
fn overlap(a: &Range<usize>, b: &Range<usize>) -> bool {
    a.start < b.end && b.start < a.end
}

/// Whether a range touches one of `content`, which are in order and apart.
fn touches(content: &[Range<usize>], range: &Range<usize>) -> bool {
    let first = content.partition_point(|content| content.end <= range.start);
    content[first..].first().is_some_and(|content| overlap(content, range))
}

fn encode_error(error: tokenizers::Error) -> Error {
    Error::Tokenizer { reason: error.to_string() }
}

fn file_error(field: &str, reason: String) -> Error {
    Error::Config { file: FILE, field: field.to_string(), reason }
}

fn config_error(field: &str, reason: String) -> Error {
    Error::Config { file: "tokenizer_config.json", field: field.to_string(), reason }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// `tokenizer.json` with this model, around which there is some of everything.
    fn file(model: Value) -> Value {
        json!({
            "version": "1.0", "truncation": null, "padding": null,
            "added_tokens": [
                {"id": 0, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true},
                {"id": 9, "content": "new", "single_word": true, "lstrip": true, "rstrip": false, "normalized": true, "special": false},
            ],
            "normalizer": {"type": "NFC"}, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null,
            "decoder": {"type": "Fuse"}, "model": model,
        })
    }

    /// A model of a known kind is read directly, and is then the one that the library reads; what is read in no direct way,
    /// the library reads.
    #[test]
    fn known_models_are_those_of_the_library() {
        let vocab = json!({"<s>": 0, "a": 1, "b": 2, "ab": 3, "a\"\u{e9}": 4, "\u{e9}": 5, "\"": 6, "a\"": 7});
        let pairs = json!([["a", "b"], ["a", "\""], ["a\"", "\u{e9}"]]);
        let bpe = |merges: &Value| {
            json!({"type": "BPE", "dropout": null, "unk_token": "<s>", "continuing_subword_prefix": null,
                   "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": true,
                   "vocab": vocab, "merges": merges})
        };
        let untyped = |mut model: Value| {
            model.as_object_mut().expect("a model").remove("type");
            model
        };
        let pieces = json!([["<s>", 0.0], ["a", -1.5], ["b", -2.25], ["ab", -0.125]]);
        let unigram = json!({"type": "Unigram", "unk_id": 0, "vocab": pieces, "byte_fallback": true});
        let word_piece = json!({"type": "WordPiece", "unk_token": "<s>", "continuing_subword_prefix": "##",
                                "max_input_chars_per_word": 7, "vocab": vocab});
        for (name, model, is_direct) in [
            ("pairs", bpe(&pairs), true),
            ("pairs in one text", bpe(&json!(["a b"])), true),
            ("no kind", untyped(bpe(&pairs)), false),
            ("scores", unigram, true),
            ("words", word_piece, true),
            ("whole words", json!({"type": "WordLevel", "unk_token": "<s>", "vocab": vocab}), false),
        ] {
            let json = file(model.clone()).to_string();
            let kind = model["type"].as_str();
            assert_eq!(parse_directly(json.as_bytes(), kind).is_some(), is_direct, "{name}");
            let parsed = parse(json.as_bytes(), kind).unwrap_or_else(|e| panic!("{name}: {e}"));
            let of_library = tokenizers::Tokenizer::from_bytes(&json).unwrap_or_else(|e| panic!("{name}: {e}"));
            assert_eq!(json!(parsed), json!(of_library), "{name}");
            assert_eq!(parsed.get_vocab(true), of_library.get_vocab(true), "{name}");
        }
        // The library takes a kind that is written with escapes; its models do not.
        let escaped = file(bpe(&pairs)).to_string().replace("\"BPE\"", "\"B\\u0050E\"");
        assert!(parse_directly(escaped.as_bytes(), Some("BPE")).is_none());
        assert!(parse(escaped.as_bytes(), Some("BPE")).is_ok(), "as the library");
    }
}
