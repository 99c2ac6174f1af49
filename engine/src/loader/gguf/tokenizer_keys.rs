//! The other way round from `gguf/vocabulary.rs`: a `tokenizer.json` as the keys of a GGUF file. What the format has no
//! words for is refused by the field's name, so that nobody gets a file that reads text in another way.
//!
//! Byte-pair encoding of bytes (with the name of a known tokenizer) or of SentencePiece's kind, and BERT's word pieces
//! (`gguf/word_piece.rs`). The second has scores in the format where `tokenizer.json` has merges; the merges of one token
//! are neighbours there, in the order of scores, so a token's place in that order is a score as good as the lost one.

#![deny(clippy::arithmetic_side_effects, clippy::indexing_slicing)]

use std::collections::HashMap;

use serde::Deserialize;
use serde_json::Value as Json;

use super::metadata::{Metadata, Strings};
use super::pre_tokenizer::PreTokenizer;
use super::word_piece;
use crate::error::{Error, Result};

const FILE: &str = "tokenizer.json";
/// What stands for a space in SentencePiece's vocabularies.
const SPACE: &str = "▁";

// The numbers of the format.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

#[derive(Deserialize)]
struct TokenizerFile {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    #[serde(default)]
    normalizer: Json,
    #[serde(default)]
    pre_tokenizer: Json,
    model: Model,
}

#[derive(Deserialize)]
struct AddedToken {
    id: u32,
    content: String,
    #[serde(default)]
    special: bool,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
}

/// Every field is optional here, so that another kind of model is refused by its name.
#[derive(Deserialize)]
struct Model {
    #[serde(rename = "type")]
    kind: Option<String>,
    #[serde(default)]
    vocab: Json,
    #[serde(default)]
    merges: Vec<Merge>,
    #[serde(default)]
    byte_fallback: bool,
    #[serde(default)]
    ignore_merges: bool,
    max_input_chars_per_word: Option<usize>,
    unk_token: Option<String>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair(String, String),
    Text(String),
}

impl Merge {
    fn pair(&self) -> Option<(&str, &str)> {
        match self {
            Merge::Pair(left, right) => Some((left, right)),
            Merge::Text(text) => text.split_once(' '),
        }
    }
}

/// Sets the keys of vocabulary, merges or scores, and the way text is cut. The vocabulary gets `rows` entries, as many as
/// the embedding has.
pub fn set_vocabulary(metadata: &mut Metadata, tokenizer_json: &[u8], rows: usize) -> Result<()> {
    let file: TokenizerFile = serde_json::from_slice(tokenizer_json).map_err(|e| Error::InvalidJson {
        file: FILE.to_string(),
        line: e.line(),
        column: e.column(),
        reason: e.to_string(),
    })?;
    let kind = file.model.kind.as_deref().unwrap_or("BPE");
    let prefix = file.model.continuing_subword_prefix.as_deref().unwrap_or_default();
    let expected_prefix = match kind {
        "BPE" => "",
        "WordPiece" => word_piece::CONTINUING,
        _ => {
            let reason = format!("is {kind:?}; only \"BPE\" and \"WordPiece\" can be written into a GGUF file");
            return Err(error("model.type", reason));
        }
    };
    let has_suffix = file.model.end_of_word_suffix.as_ref().is_some_and(|suffix| !suffix.is_empty());
    for (field, is_other) in
        [("model.continuing_subword_prefix", prefix != expected_prefix), ("model.end_of_word_suffix", has_suffix)]
    {
        if is_other {
            return Err(error(field, "is set to something for which a GGUF file has no words"));
        }
    }
    for token in &file.added_tokens {
        let flags = [("single_word", token.single_word), ("lstrip", token.lstrip), ("rstrip", token.rstrip)];
        if let Some((flag, _)) = flags.into_iter().find(|(_, is_set)| *is_set) {
            let field = format!("added_tokens.{}.{flag}", token.id);
            return Err(error(&field, "is true, for which a GGUF file has no words"));
        }
    }
    let mut tokens = Tokens::read(&file, rows)?;
    match (kind, file.model.byte_fallback) {
        ("WordPiece", _) => set_word_pieces(metadata, &file, &mut tokens)?,
        (_, false) => set_byte_level(metadata, &file)?,
        (_, true) => set_sentence_piece(metadata, &file, &mut tokens)?,
    }
    metadata.set("tokenizer.ggml.tokens", tokens.texts.iter().collect::<Strings>());
    metadata.set("tokenizer.ggml.token_type", tokens.types.as_slice());
    Ok(())
}

/// Texts and types by id.
struct Tokens {
    texts: Vec<String>,
    types: Vec<i32>,
}

impl Tokens {
    fn read(file: &TokenizerFile, rows: usize) -> Result<Tokens> {
        let vocab = file.model.vocab.as_object().ok_or_else(|| error("model.vocab", "is not an object"))?;
        let mut found: Vec<Option<(&str, i32)>> = vec![None; rows];
        let mut put = |field: &str, id: Option<u64>, text, kind| {
            let id = id.ok_or_else(|| error(field, "is no token id"))?;
            let place = usize::try_from(id)
                .ok()
                .and_then(|id| found.get_mut(id))
                .ok_or_else(|| error(field, format!("is {id}, the embedding has {rows} rows")))?;
            *place = Some((text, kind));
            Ok(())
        };
        for (text, id) in vocab {
            put(&format!("model.vocab[{text:?}]"), id.as_u64(), text.as_str(), NORMAL)?;
        }
        for token in &file.added_tokens {
            let kind = if token.special { CONTROL } else { USER_DEFINED };
            put("added_tokens.id", Some(token.id.into()), token.content.as_str(), kind)?;
        }
        // Rows without a token have an entry each, as converters write it.
        let entry = |(id, token): (usize, Option<(&str, i32)>)| {
            token.map_or_else(|| (format!("[PAD{id}]"), UNUSED), |(text, kind)| (text.to_string(), kind))
        };
        let (texts, types) = found.into_iter().enumerate().map(entry).unzip();
        Ok(Tokens { texts, types })
    }
}

fn set_byte_level(metadata: &mut Metadata, file: &TokenizerFile) -> Result<()> {
    let pre_tokenizer = PreTokenizer::recognise(&file.pre_tokenizer).ok_or_else(|| {
        error("pre_tokenizer", "cuts text in a way that a GGUF file has no name for, as far as this engine knows")
    })?;
    // The names imply what goes before cutting. Composed characters are what nearly all text consists of, so Qwen's
    // name also stands for a tokenizer that leaves out to compose them.
    let is_implied = file.normalizer.is_null() || file.normalizer == pre_tokenizer.normalizer();
    if !is_implied {
        return Err(error("normalizer", format!("is not the one of {:?} in GGUF files", pre_tokenizer.name())));
    }
    if file.model.ignore_merges != pre_tokenizer.ignores_merges() {
        let reason = format!("is {}, the other way than {:?} has it", file.model.ignore_merges, pre_tokenizer.name());
        return Err(error("model.ignore_merges", reason));
    }
    let merges = file.model.merges.iter().enumerate().map(|(idx, merge)| {
        let (left, right) = pair(idx, merge)?;
        match left.contains(' ') || right.contains(' ') {
            true => Err(error(&format!("model.merges[{idx}]"), "has a space inside a token")),
            false => Ok(format!("{left} {right}")),
        }
    });
    metadata.set("tokenizer.ggml.model", "gpt2");
    metadata.set("tokenizer.ggml.pre", pre_tokenizer.name());
    metadata.set("tokenizer.ggml.merges", merges.collect::<Result<Vec<_>>>()?.iter().collect::<Strings>());
    Ok(())
}

fn set_sentence_piece(metadata: &mut Metadata, file: &TokenizerFile, tokens: &mut Tokens) -> Result<()> {
    let add_space_prefix = adds_space_prefix(&file.normalizer, &file.pre_tokenizer).ok_or_else(|| {
        error("normalizer", "does not write spaces as SentencePiece does, the only way that GGUF files have a word for")
    })?;
    let scores = scores(&file.model.merges)?;
    // What no merge makes is below all that some merge does.
    let lowest = -(scores.len() as f32) - 1.0;
    let mut by_id = Vec::with_capacity(tokens.texts.len());
    for (text, kind) in tokens.texts.iter().zip(&mut tokens.types) {
        if *kind == NORMAL && is_byte(text) {
            *kind = BYTE;
        } else if file.model.unk_token.as_ref() == Some(text) {
            *kind = UNKNOWN;
        }
        by_id.push(match *kind {
            NORMAL => scores.get(text.as_str()).copied().unwrap_or(lowest),
            _ => 0.0,
        });
    }
    metadata.set("tokenizer.ggml.model", "llama");
    metadata.set("tokenizer.ggml.pre", "default");
    metadata.set("tokenizer.ggml.scores", by_id.as_slice());
    metadata.set("tokenizer.ggml.add_space_prefix", add_space_prefix);
    Ok(())
}

/// Pieces are written as `word_piece::text` reads them.
fn set_word_pieces(metadata: &mut Metadata, file: &TokenizerFile, tokens: &mut Tokens) -> Result<()> {
    let is_bert = |step: &Json, kind: &str| step.get("type").is_some_and(|found| found == kind);
    if !is_bert(&file.pre_tokenizer, "BertPreTokenizer") {
        return Err(error("pre_tokenizer", "is not BERT's, the only one that GGUF files have a word for"));
    }
    let flag = |name: &str| file.normalizer.get(name).and_then(Json::as_bool);
    let cleans = [flag("clean_text"), flag("handle_chinese_chars")] == [Some(true); 2];
    let Some(lowercase) = flag("lowercase").filter(|_| cleans && is_bert(&file.normalizer, "BertNormalizer")) else {
        return Err(error("normalizer", "is not BERT's, the only one that GGUF files have a word for"));
    };
    let max_chars = file.model.max_input_chars_per_word.unwrap_or(word_piece::MAX_WORD_CHARS);
    if max_chars != word_piece::MAX_WORD_CHARS {
        let reason = format!("is {max_chars}, readers of GGUF files take {}", word_piece::MAX_WORD_CHARS);
        return Err(error("model.max_input_chars_per_word", reason));
    }
    let unknown = file.model.unk_token.as_deref().and_then(|unknown| tokens.texts.iter().position(|t| t == unknown));
    let unknown = unknown.ok_or_else(|| error("model.unk_token", "is no token"))?;
    for (idx, (text, kind)) in tokens.texts.iter_mut().zip(&tokens.types).enumerate() {
        if *kind == NORMAL {
            let refuse = || error(&format!("model.vocab[{text:?}]"), "has no form in a GGUF file");
            *text = word_piece::text_in_file(text).ok_or_else(refuse)?;
        } else if idx == unknown && *kind != CONTROL {
            return Err(error("model.unk_token", "is no special token"));
        }
    }
    metadata.set("tokenizer.ggml.model", "bert");
    metadata.set("tokenizer.ggml.pre", "default");
    metadata.set("tokenizer.ggml.unknown_token_id", u32::try_from(unknown).unwrap_or(u32::MAX));
    metadata.set("tokenizer.ggml.normalizer.lowercase", lowercase);
    // Unless it says otherwise, accents go with the capitals.
    metadata.set("tokenizer.ggml.normalizer.strip_accents", flag("strip_accents").unwrap_or(lowercase));
    Ok(())
}

/// A score for each token that some merge makes: minus its place among them.
fn scores(merges: &[Merge]) -> Result<HashMap<String, f32>> {
    let mut scores: HashMap<String, f32> = HashMap::new();
    let mut last = String::new();
    for (idx, merge) in merges.iter().enumerate() {
        let (left, right) = pair(idx, merge)?;
        let merged = format!("{left}{right}");
        if merged == last {
            continue;
        }
        let score = -(scores.len() as f32);
        if scores.insert(merged.clone(), score).is_some() {
            let reason = format!("makes {merged:?} again: merges in this order follow from no scores of tokens");
            return Err(error(&format!("model.merges[{idx}]"), reason));
        }
        last = merged;
    }
    Ok(scores)
}

fn pair(idx: usize, merge: &Merge) -> Result<(&str, &str)> {
    merge.pair().ok_or_else(|| error(&format!("model.merges[{idx}]"), "is not two tokens and a space between them"))
}

/// `<0x00>` to `<0xFF>`.
fn is_byte(text: &str) -> bool {
    let digits = text.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    digits.is_some_and(|digits| digits.len() == 2 && u8::from_str_radix(digits, 16).is_ok())
}

/// Whether a space goes before a text; `None` where spaces are not simply written as `▁`.
fn adds_space_prefix(normalizer: &Json, pre_tokenizer: &Json) -> Option<bool> {
    let text = |step: &Json, pointer: &str, expected: &str| step.pointer(pointer).is_some_and(|text| text == expected);
    if normalizer.is_null() {
        let is_known = text(pre_tokenizer, "/type", "Metaspace") && text(pre_tokenizer, "/replacement", SPACE);
        // The format has one word for "always" and "first". They differ behind special tokens alone, where its readers put
        // a space too.
        return match (is_known, pre_tokenizer.get("prepend_scheme").and_then(Json::as_str)) {
            (true, Some("always" | "first")) => Some(true),
            (true, Some("never")) => Some(false),
            (true, None) => pre_tokenizer.get("add_prefix_space")?.as_bool(),
            _ => None,
        };
    }
    let steps = match normalizer.get("normalizers") {
        Some(steps) if text(normalizer, "/type", "Sequence") => steps.as_array()?.as_slice(),
        _ => std::slice::from_ref(normalizer),
    };
    let replaces = |step: &Json| {
        text(step, "/type", "Replace") && text(step, "/pattern/String", " ") && text(step, "/content", SPACE)
    };
    let prepends = |step: &Json| text(step, "/type", "Prepend") && text(step, "/prepend", SPACE);
    match (pre_tokenizer.is_null(), steps) {
        (true, [replace]) if replaces(replace) => Some(false),
        (true, [prepend, replace]) if prepends(prepend) && replaces(replace) => Some(true),
        _ => None,
    }
}

fn error(field: &str, reason: impl Into<String>) -> Error {
    Error::Config { file: FILE, field: field.to_string(), reason: reason.into() }
}

#[cfg(test)]
#[expect(clippy::indexing_slicing, reason = "places of the tests' own")]
mod tests {
    use serde_json::json;

    use super::super::vocabulary;
    use super::*;

    fn sentence_piece() -> Json {
        json!({
            "added_tokens": [{"id": 0, "content": "<unk>", "special": true}, {"id": 1, "content": "<s>", "special": true}],
            "normalizer": {"type": "Sequence", "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ]},
            "pre_tokenizer": null,
            "model": {
                "type": "BPE", "unk_token": "<unk>", "byte_fallback": true, "fuse_unk": true,
                "vocab": {"<unk>": 0, "<s>": 1, "<0x0A>": 2, "▁": 3, "a": 4, "b": 5, "ab": 6, "▁a": 7, "▁ab": 8},
                "merges": [["a", "b"], ["▁", "a"], ["▁", "ab"], ["▁a", "b"]],
            },
        })
    }

    fn written(tokenizer: &Json, rows: usize) -> Result<Metadata> {
        let mut metadata = Metadata::default();
        set_vocabulary(&mut metadata, tokenizer.to_string().as_bytes(), rows)?;
        Ok(metadata)
    }

    /// A vocabulary of SentencePiece's kind comes back with its merges in their order, its roles, and rows filled up.
    #[test]
    fn scores_stand_for_merges() {
        let tokenizer = sentence_piece();
        let metadata = written(&tokenizer, 11).unwrap();
        assert_eq!(
            metadata.integers("tokenizer.ggml.token_type", 11).unwrap().unwrap(),
            [2, 3, 6, 1, 1, 1, 1, 1, 1, 5, 5]
        );
        let back: Json = serde_json::from_slice(&vocabulary::tokenizer_json(&metadata).unwrap()).unwrap();
        assert_eq!(back["model"]["vocab"], tokenizer["model"]["vocab"]);
        assert_eq!(back["normalizer"], tokenizer["normalizer"]);
        let merges = |file: &Json| file["model"]["merges"].as_array().unwrap().clone();
        // Of one token's pairs, that with the longest first part goes first.
        assert_eq!(merges(&back)[..2], merges(&tokenizer)[..2]);
        assert_eq!(merges(&back).len(), 4);
    }

    /// What would be another tokenizer in the file is refused by the name of its field.
    #[test]
    fn refuses_what_the_format_cannot_say() {
        let good = sentence_piece();
        type Change = fn(&mut Json);
        let changes: [(&str, Change); 9] = [
            ("model.type", |t| t["model"]["type"] = json!("Unigram")),
            ("model.continuing_subword_prefix", |t| t["model"]["type"] = json!("WordPiece")),
            ("model.continuing_subword_prefix", |t| t["model"]["continuing_subword_prefix"] = json!("##")),
            ("model.vocab", |t| t["model"]["vocab"] = json!([])),
            ("added_tokens.id", |t| t["added_tokens"][0]["id"] = json!(11)),
            ("normalizer", |t| t["normalizer"] = json!({"type": "NFC"})),
            ("model.merges[4]", |t| t["model"]["merges"].as_array_mut().unwrap().push(json!("a b"))),
            ("pre_tokenizer", |t| t["model"]["byte_fallback"] = json!(false)),
            ("model.ignore_merges", |t| {
                t["model"]["byte_fallback"] = json!(false);
                t["model"]["ignore_merges"] = json!(true);
                t["normalizer"] = json!(null);
                t["pre_tokenizer"] = PreTokenizer::Gpt2.json();
            }),
        ];
        for (field, change) in changes {
            let mut tokenizer = good.clone();
            change(&mut tokenizer);
            let e = written(&tokenizer, 11).expect_err(field).to_string();
            assert!(e.contains(&format!("field `{field}`")), "{field}: {e}");
        }
        assert_eq!(written(&json!({"model": 1}), 1).unwrap_err().code(), "invalid_json");
    }
}
