//! Vocabularies of word pieces (Wu et al. 2016, arXiv:1609.08144), as BERT's: the longest piece that a word begins with,
//! then the longest that goes on, and so to its end. Files write `▁` before a piece that begins a word and nothing
//! before one that goes on; `tokenizer.json` writes nothing before the first and `##` before the second.

#![deny(clippy::arithmetic_side_effects, clippy::indexing_slicing)]

use std::borrow::Cow;

use serde_json::{Value as Json, json};

use super::metadata::{self, Metadata};
use super::vocabulary::{TokenType, Vocabulary};
use crate::error::Result;

/// Before a piece that goes on.
pub(super) const CONTINUING: &str = "##";
/// BERT's own limit.
pub(super) const MAX_WORD_CHARS: usize = 100;
/// Before a piece that begins a word, in files.
const BEGINNING: char = '▁';

/// Keys that name special tokens, the first that is there counts; the role; the id where files say nothing: that of the
/// published vocabularies.
const CLS: Role = (&["tokenizer.ggml.cls_token_id", "tokenizer.ggml.bos_token_id"], "cls_token", 101);
/// The format's own spelling.
const SEP: Role = (&["tokenizer.ggml.seperator_token_id"], "sep_token", 102);
const UNKNOWN: Role = (&["tokenizer.ggml.unknown_token_id"], "unk_token", 100);

type Role = (&'static [&'static str], &'static str, u64);

/// How `tokenizer.json` writes a piece.
pub(super) fn text(token: &str, kind: TokenType) -> Cow<'_, str> {
    // Older files have nothing before special tokens, and do not say that they are such.
    let is_bracketed = token.len() > 2 && token.starts_with('[') && token.ends_with(']');
    match token.strip_prefix(BEGINNING).filter(|piece| !piece.is_empty()) {
        _ if kind != TokenType::Normal => Cow::Borrowed(token),
        Some(piece) => Cow::Borrowed(piece),
        None if is_bracketed => Cow::Borrowed(token),
        None => Cow::Owned(format!("{CONTINUING}{token}")),
    }
}

/// The other way round: how files write a piece that is no special token. `None` where they have no form for it.
pub(super) fn text_in_file(token: &str) -> Option<String> {
    let written = match token.strip_prefix(CONTINUING) {
        _ if token.starts_with('[') && token.ends_with(']') => token.to_string(),
        Some(piece) => piece.to_string(),
        None => format!("{BEGINNING}{token}"),
    };
    (text(&written, TokenType::Normal) == token).then_some(written)
}

/// `normalizer` of `tokenizer.json`. Accents go with the capitals unless the file says otherwise.
pub(super) fn normalizer(metadata: &Metadata) -> Result<Json> {
    let lowercase = metadata.boolean("tokenizer.ggml.normalizer.lowercase")?.unwrap_or(true);
    let strip_accents = metadata.boolean("tokenizer.ggml.normalizer.strip_accents")?.unwrap_or(lowercase);
    Ok(json!({"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
        "strip_accents": strip_accents, "lowercase": lowercase}))
}

/// The special tokens of a text, with their ids.
pub(super) struct Frame<'a> {
    cls: (u32, &'a str),
    sep: (u32, &'a str),
    unknown: (u32, &'a str),
}

impl<'a> Frame<'a> {
    pub(super) fn of(metadata: &Metadata, vocabulary: &Vocabulary<'a>) -> Result<Self> {
        let token = |(keys, _, default): Role| {
            for key in keys {
                if let Some(token) = vocabulary.id_and_text(metadata, key)? {
                    return Ok(token);
                }
            }
            let reason = || format!("is missing, and its default, {default}, is no token");
            let key = keys.first().copied().unwrap_or_default();
            vocabulary.with_id(default).ok_or_else(|| metadata::error(key, reason()))
        };
        Ok(Frame { cls: token(CLS)?, sep: token(SEP)?, unknown: token(UNKNOWN)? })
    }

    /// Stands for a word that cannot be put together.
    pub(super) fn unknown(&self) -> &'a str {
        self.unknown.1
    }

    /// Fields of `tokenizer_config.json`.
    pub(super) fn names(&self) -> impl Iterator<Item = (String, Json)> {
        let roles = [(CLS, self.cls), (SEP, self.sep), (UNKNOWN, self.unknown)];
        roles.into_iter().map(|((_, role, _), (_, token))| (role.to_string(), json!(token)))
    }

    /// `post_processor` of `tokenizer.json`.
    pub(super) fn post_processor(&self) -> Json {
        let token = |(id, token): (u32, &str)| json!([token, id]);
        json!({"type": "BertProcessing", "sep": token(self.sep), "cls": token(self.cls)})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pieces come back out of the file; those of which it would make others are refused.
    #[test]
    fn pieces_go_there_and_back() {
        for (token, written) in
            [("a", "▁a"), ("##a", "a"), ("[unused7]", "[unused7]"), ("#", "▁#"), ("[", "▁["), ("▁", "▁▁"), ("##[", "[")]
        {
            assert_eq!(text_in_file(token).as_deref(), Some(written));
            assert_eq!(text(written, TokenType::Normal), token);
        }
        for token in ["##▁a", "##[a]", "[]"] {
            assert_eq!(text_in_file(token), None, "{token}");
        }
    }
}
