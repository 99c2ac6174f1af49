//! The vocabulary of a GGUF file, said as `tokenizer.json` and `tokenizer_config.json` say it. Every index and every
//! pair is checked here, so that errors name the key and the entry.
//!
//! Three kinds are read. Byte-level vocabularies (Radford et al. 2019) have merges; how text is cut into words before
//! merging is not in the file, which has the name of a known tokenizer instead (`gguf/pre_tokenizer.rs`).
//! SentencePiece's have scores (`gguf/sentence_piece.rs`). BERT's word pieces have neither (`gguf/word_piece.rs`).

#![deny(clippy::arithmetic_side_effects, clippy::indexing_slicing)]

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};

use serde::{Serialize, Serializer};
use serde_json::{Value as Json, json};

use super::metadata::{self, FILE, Metadata, Strings};
use super::pre_tokenizer::PreTokenizer;
use super::{sentence_piece, word_piece, writer};
use crate::config::{MAX_EOS_TOKENS, MAX_TEMPLATE_BYTES, MAX_TOKEN_IDS};
use crate::error::Result;
use crate::loader::JsonFile;

const MODEL: &str = "tokenizer.ggml.model";
const TOKENS: &str = "tokenizer.ggml.tokens";
const TOKEN_TYPES: &str = "tokenizer.ggml.token_type";
const SCORES: &str = "tokenizer.ggml.scores";
const ADD_SPACE_PREFIX: &str = "tokenizer.ggml.add_space_prefix";
const UNKNOWN: &str = "tokenizer.ggml.unknown_token_id";
const MERGES: &str = "tokenizer.ggml.merges";
const TEMPLATE: &str = "tokenizer.chat_template";

/// Changes when the same keys become another `tokenizer.json` than before.
const TRANSLATION_VERSION: u8 = 1;

/// Texts of control tokens that end an answer in known chat formats: files often name only one of several.
const END_OF_TURN: &[&str] =
    &["<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>", "<|end_of_text|>", "<|end|>", "<end_of_turn>"];

/// Kinds of vocabularies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    ByteLevel,
    SentencePiece,
    WordPiece,
}

impl Kind {
    fn of(metadata: &Metadata) -> Result<Kind> {
        match metadata.string(MODEL)?.ok_or_else(|| metadata::error(MODEL, "is missing"))? {
            "gpt2" => Ok(Kind::ByteLevel),
            "llama" => Ok(Kind::SentencePiece),
            "bert" => Ok(Kind::WordPiece),
            other => {
                let reason = format!("is {other:?}, which is not supported (supported: \"gpt2\", \"llama\", \"bert\")");
                Err(metadata::error(MODEL, reason))
            }
        }
    }
}

/// What the file says a token is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TokenType {
    Normal,
    /// A single byte of a character that is no token.
    Byte,
    /// Controls, and leaves no text.
    Control,
    /// A fixed text that is never split.
    UserDefined,
    /// Fills the vocabulary up to the rows of the embedding.
    Unused,
}

/// Texts of tokens as `tokenizer.json` has them, and their ids. (Each merge asks for three of them: of 150,000 tokens, an
/// ordered map is several times slower.)
pub(super) struct Vocab<'a> {
    ids: HashMap<Cow<'a, str>, u32>,
}

impl<'a> Vocab<'a> {
    /// The id that the text had before.
    fn insert(&mut self, text: Cow<'a, str>, id: u32) -> Option<u32> {
        self.ids.insert(text, id)
    }
    pub(super) fn contains(&self, text: &str) -> bool {
        self.ids.contains_key(text)
    }
}

impl Serialize for Vocab<'_> {
    /// In the order of ids.
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let mut entries: Vec<(&Cow<'_, str>, u32)> = self.ids.iter().map(|(text, &id)| (text, id)).collect();
        entries.sort_unstable_by_key(|&(_, id)| id);
        serializer.collect_map(entries)
    }
}

/// Tokens with their types.
pub(super) struct Vocabulary<'a> {
    tokens: Vec<&'a str>,
    types: Vec<TokenType>,
}

impl<'a> Vocabulary<'a> {
    fn read(metadata: &'a Metadata) -> Result<Self> {
        let strings = required_strings(metadata, TOKENS)?;
        let max = usize::try_from(MAX_TOKEN_IDS).unwrap_or(usize::MAX);
        if !(1..=max).contains(&strings.len()) {
            let reason = format!("has {} entries, must have 1 to {max}", strings.len());
            return Err(metadata::error(TOKENS, reason));
        }
        let tokens = strings.iter().enumerate().map(|(idx, bytes)| text(TOKENS, idx, bytes));
        let tokens = tokens.collect::<Result<Vec<_>>>()?;
        let types = match metadata.integers(TOKEN_TYPES, tokens.len())? {
            Some(types) => types.into_iter().enumerate().map(token_type).collect::<Result<_>>()?,
            None => vec![TokenType::Normal; tokens.len()],
        };
        Ok(Vocabulary { tokens, types })
    }

    /// Tokens that text can become, with their ids, which are their places.
    fn used(&self) -> impl Iterator<Item = (u32, &'a str, TokenType)> {
        let tokens = (0_u32..).zip(&self.tokens).zip(&self.types);
        tokens
            .map(|((id, token), &kind)| (id, *token, kind))
            .filter(|(_, token, kind)| *kind != TokenType::Unused && !token.is_empty())
    }

    /// The text of the token that `key` names by its id.
    fn named(&self, metadata: &Metadata, key: &str) -> Result<Option<&'a str>> {
        Ok(self.id_and_text(metadata, key)?.map(|(_, token)| token))
    }

    /// Id and text of the token that `key` names.
    pub(super) fn id_and_text(&self, metadata: &Metadata, key: &str) -> Result<Option<(u32, &'a str)>> {
        let max = self.tokens.len().saturating_sub(1).try_into().unwrap_or(u64::MAX);
        let Some(id) = metadata.integer(key, max)? else { return Ok(None) };
        match self.with_id(id) {
            Some(token) => Ok(Some(token)),
            None => Err(metadata::error(key, format!("is {id}, a token that is empty or said to be unused"))),
        }
    }

    /// Id and text of the token `id`, if text can become it.
    pub(super) fn with_id(&self, id: u64) -> Option<(u32, &'a str)> {
        let found = self.used().find(|(used, _, _)| u64::from(*used) == id);
        found.map(|(id, token, _)| (id, token))
    }
}

fn required_strings<'a>(metadata: &'a Metadata, key: &str) -> Result<&'a Strings> {
    metadata.strings(key)?.ok_or_else(|| metadata::error(key, "is missing"))
}

fn text<'a>(key: &str, idx: usize, bytes: &'a [u8]) -> Result<&'a str> {
    let text = std::str::from_utf8(bytes);
    text.map_err(|e| metadata::error(&format!("{key}[{idx}]"), format!("is not UTF-8 from byte {}", e.valid_up_to())))
}

/// By the numbers of the format.
fn token_type((idx, number): (usize, i128)) -> Result<TokenType> {
    match number {
        // Undefined, normal.
        0 | 1 => Ok(TokenType::Normal),
        6 => Ok(TokenType::Byte),
        // Stands for what is unknown; controls.
        2 | 3 => Ok(TokenType::Control),
        4 => Ok(TokenType::UserDefined),
        5 => Ok(TokenType::Unused),
        other => Err(metadata::error(&format!("{TOKEN_TYPES}[{idx}]"), format!("is {other}, types are 0 to 6"))),
    }
}

/// Fails if there are more tokens than `rows` of the embedding: text could become an id that the model does not have.
pub(super) fn fits(metadata: &Metadata, rows: usize) -> Result<()> {
    match metadata.strings(TOKENS)? {
        Some(tokens) if tokens.len() > rows => {
            Err(metadata::error(TOKENS, format!("has {} entries, the embedding has {rows} rows", tokens.len())))
        }
        _ => Ok(()),
    }
}

/// `tokenizer_config.json`.
pub(super) fn tokenizer_config(metadata: &Metadata) -> Result<JsonFile> {
    let kind = Kind::of(metadata)?;
    let vocabulary = Vocabulary::read(metadata)?;
    let mut config = serde_json::Map::new();
    for (key, name) in [
        ("tokenizer.ggml.bos_token_id", "bos_token"),
        ("tokenizer.ggml.eos_token_id", "eos_token"),
        (UNKNOWN, "unk_token"),
        ("tokenizer.ggml.padding_token_id", "pad_token"),
    ] {
        let token = vocabulary.named(metadata, key)?;
        config.extend(token.map(|token| (name.to_string(), json!(token))));
    }
    if kind == Kind::WordPiece {
        // What goes around a text is in `tokenizer.json`; an encoder has no template.
        config.extend(word_piece::Frame::of(metadata, &vocabulary)?.names());
        return Ok(JsonFile::translated(FILE, config, BTreeMap::new()));
    }
    // What is missing is told here, before weights are loaded; the rest of the vocabulary is checked beside them.
    let adds_bos = match kind {
        Kind::ByteLevel => {
            required_strings(metadata, MERGES)?;
            PreTokenizer::of(metadata)?.adds_bos()
        }
        Kind::SentencePiece | Kind::WordPiece => true,
    };
    if kind == Kind::SentencePiece && !metadata.has(SCORES) {
        return Err(metadata::error(SCORES, "is missing"));
    }
    let by_default = config.contains_key("bos_token") && adds_bos;
    for (key, name, token, default) in [
        ("tokenizer.ggml.add_bos_token", "add_bos_token", "bos_token", by_default),
        ("tokenizer.ggml.add_eos_token", "add_eos_token", "eos_token", false),
    ] {
        let adds = metadata.boolean(key)?.unwrap_or(default);
        if adds && !config.contains_key(token) {
            return Err(metadata::error(key, format!("is set, but no {token} is named")));
        }
        config.insert(name.to_string(), json!(adds));
    }
    if let Some(template) = metadata.string(TEMPLATE)? {
        if template.len() > MAX_TEMPLATE_BYTES {
            let reason = format!("has {} bytes, at most {MAX_TEMPLATE_BYTES} are allowed", template.len());
            return Err(metadata::error(TEMPLATE, reason));
        }
        config.insert("chat_template".to_string(), json!(template));
    }
    Ok(JsonFile::translated(FILE, config, BTreeMap::new()))
}

/// Ids of the tokens that end an answer: those that the file names, and control tokens whose text is known to.
pub(super) fn end_tokens(metadata: &Metadata) -> Result<Vec<u32>> {
    let vocabulary = Vocabulary::read(metadata)?;
    let max = vocabulary.tokens.len().saturating_sub(1).try_into().unwrap_or(u64::MAX);
    let mut ids: Vec<u32> = Vec::new();
    for key in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"] {
        ids.extend(metadata.integer(key, max)?.and_then(|id| u32::try_from(id).ok()));
    }
    let is_known = |token: &str| END_OF_TURN.contains(&token);
    let known = vocabulary.used().filter(|(_, token, kind)| *kind == TokenType::Control && is_known(token));
    ids.extend(known.map(|(id, _, _)| id));
    let mut seen = std::collections::HashSet::new();
    ids.retain(|id| seen.insert(*id));
    ids.truncate(MAX_EOS_TOKENS);
    Ok(ids)
}

/// The keys of a file that say what `tokenizer.json` would.
#[derive(Debug)]
pub struct GgufTokenizer(Metadata);

impl GgufTokenizer {
    pub(super) fn of(metadata: &Metadata) -> GgufTokenizer {
        GgufTokenizer(metadata.with_prefix("tokenizer."))
    }

    /// `tokenizer.json`. Checks the vocabulary.
    pub fn json(&self) -> Result<Vec<u8>> {
        tokenizer_json(&self.0)
    }

    /// Keys and values, and the version of their translation.
    pub fn identity_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![TRANSLATION_VERSION];
        writer::push_metadata(&mut bytes, &self.0);
        bytes
    }
}

/// `tokenizer.json`.
pub(super) fn tokenizer_json(metadata: &Metadata) -> Result<Vec<u8>> {
    let kind = Kind::of(metadata)?;
    let vocabulary = Vocabulary::read(metadata)?;
    let mut vocab = Vocab { ids: HashMap::with_capacity(vocabulary.tokens.len()) };
    for (id, token, token_type) in vocabulary.used() {
        let text = match kind {
            Kind::ByteLevel | Kind::SentencePiece => Cow::Borrowed(token),
            Kind::WordPiece => word_piece::text(token, token_type),
        };
        if let Some(first) = vocab.insert(text, id) {
            return Err(metadata::error(TOKENS, format!("has {token:?} twice, at {first} and {id}")));
        }
    }
    let file = match kind {
        Kind::ByteLevel => byte_level(metadata, &vocabulary, vocab)?,
        Kind::SentencePiece => scored(metadata, &vocabulary, vocab)?,
        Kind::WordPiece => word_pieces(metadata, &vocabulary, vocab)?,
    };
    serde_json::to_vec(&file).map_err(|e| metadata::error(TOKENS, e.to_string()))
}

fn byte_level<'a>(metadata: &'a Metadata, vocabulary: &Vocabulary<'a>, vocab: Vocab<'a>) -> Result<TokenizerFile<'a>> {
    let pre_tokenizer = PreTokenizer::of(metadata)?;
    let merges = merges(required_strings(metadata, MERGES)?, &vocab)?;
    Ok(TokenizerFile {
        version: "1.0",
        added_tokens: vocabulary.used().filter_map(AddedToken::new).collect(),
        normalizer: pre_tokenizer.normalizer(),
        pre_tokenizer: pre_tokenizer.json(),
        post_processor: Json::Null,
        decoder: json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}),
        model: Model::Bpe {
            unk_token: None,
            fuse_unk: false,
            byte_fallback: false,
            ignore_merges: pre_tokenizer.ignores_merges(),
            vocab,
            merges,
        },
    })
}

fn scored<'a>(metadata: &'a Metadata, vocabulary: &Vocabulary<'a>, vocab: Vocab<'a>) -> Result<TokenizerFile<'a>> {
    let scores = metadata.floats(SCORES, vocabulary.tokens.len())?;
    let scores = scores.ok_or_else(|| metadata::error(SCORES, "is missing"))?;
    let score = |id: u32| scores.get(usize::try_from(id).ok()?).copied();
    let pieces = vocabulary.used().filter(|(_, _, kind)| *kind == TokenType::Normal);
    let pieces = pieces.filter_map(|(id, piece, _)| Some((id, piece, score(id)?)));
    let merges = sentence_piece::merges(TOKENS, pieces, &vocab)?;
    let add_space_prefix = metadata.boolean(ADD_SPACE_PREFIX)?.unwrap_or(true);
    Ok(TokenizerFile {
        version: "1.0",
        added_tokens: vocabulary.used().filter_map(AddedToken::new).collect(),
        normalizer: sentence_piece::normalizer(add_space_prefix),
        pre_tokenizer: Json::Null,
        post_processor: Json::Null,
        decoder: sentence_piece::decoder(add_space_prefix),
        model: Model::Bpe {
            unk_token: vocabulary.named(metadata, UNKNOWN)?,
            fuse_unk: true,
            byte_fallback: true,
            ignore_merges: false,
            vocab,
            merges,
        },
    })
}

fn word_pieces<'a>(metadata: &'a Metadata, vocabulary: &Vocabulary<'a>, vocab: Vocab<'a>) -> Result<TokenizerFile<'a>> {
    let frame = word_piece::Frame::of(metadata, vocabulary)?;
    Ok(TokenizerFile {
        version: "1.0",
        added_tokens: vocabulary.used().filter_map(AddedToken::new).collect(),
        normalizer: word_piece::normalizer(metadata)?,
        pre_tokenizer: json!({"type": "BertPreTokenizer"}),
        post_processor: frame.post_processor(),
        decoder: json!({"type": "WordPiece", "prefix": word_piece::CONTINUING, "cleanup": true}),
        model: Model::WordPiece {
            unk_token: frame.unknown(),
            continuing_subword_prefix: word_piece::CONTINUING,
            max_input_chars_per_word: word_piece::MAX_WORD_CHARS,
            vocab,
        },
    })
}

/// Pairs of tokens that become one, most frequent first; all three are in the vocabulary.
fn merges<'a>(strings: &'a Strings, vocab: &Vocab<'_>) -> Result<Vec<(&'a str, &'a str)>> {
    let mut merges = Vec::new();
    let mut merged = String::new();
    for (idx, bytes) in strings.iter().enumerate() {
        let merge = text(MERGES, idx, bytes)?;
        let refuse = |reason: String| Err(metadata::error(&format!("{MERGES}[{idx}]"), reason));
        // No token of a byte-level vocabulary has a space in it.
        let Some((left, right)) = merge.split_once(' ').filter(|(left, right)| !left.is_empty() && !right.is_empty())
        else {
            return refuse(format!("is {merge:?}, must be two tokens and a space between them"));
        };
        merged.clear();
        merged.push_str(left);
        merged.push_str(right);
        if let Some(unknown) = [left, right, &merged].into_iter().find(|token| !vocab.contains(token)) {
            return refuse(format!("needs the token {unknown:?}, which is not in the vocabulary"));
        }
        merges.push((left, right));
    }
    Ok(merges)
}

/// As the `tokenizers` crate reads it.
#[derive(Serialize)]
struct TokenizerFile<'a> {
    version: &'static str,
    added_tokens: Vec<AddedToken<'a>>,
    normalizer: Json,
    pre_tokenizer: Json,
    post_processor: Json,
    decoder: Json,
    model: Model<'a>,
}

#[derive(Serialize)]
#[serde(tag = "type")]
enum Model<'a> {
    #[serde(rename = "BPE")]
    Bpe {
        unk_token: Option<&'a str>,
        fuse_unk: bool,
        /// Whether a word that is a token is taken whole, however it would be merged.
        ignore_merges: bool,
        byte_fallback: bool,
        vocab: Vocab<'a>,
        merges: Vec<(&'a str, &'a str)>,
    },
    WordPiece {
        unk_token: &'a str,
        continuing_subword_prefix: &'static str,
        /// A longer word is unknown.
        max_input_chars_per_word: usize,
        vocab: Vocab<'a>,
    },
}

/// A token that is found in a text before it is split into words.
#[derive(Serialize)]
struct AddedToken<'a> {
    id: u32,
    content: &'a str,
    single_word: bool,
    lstrip: bool,
    rstrip: bool,
    normalized: bool,
    special: bool,
}

impl<'a> AddedToken<'a> {
    fn new((id, content, kind): (u32, &'a str, TokenType)) -> Option<Self> {
        let special = match kind {
            TokenType::Control => true,
            TokenType::UserDefined => false,
            TokenType::Normal | TokenType::Byte | TokenType::Unused => return None,
        };
        Some(AddedToken { id, content, single_word: false, lstrip: false, rstrip: false, normalized: false, special })
    }
}
