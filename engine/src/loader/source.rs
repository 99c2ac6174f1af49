//! Where a model comes from: a folder of several files, or one GGUF file that says the same. Everything after the
//! loader sees no difference.

use std::borrow::Cow;
use std::path::Path;

use super::gguf::{GgufModel, GgufTokenizer};
use super::{GenerationConfig, JsonFile, ModelFolder, SentenceConfig, Weights};
use crate::error::Result;

/// The files of one model.
#[derive(Debug)]
pub enum ModelSource {
    /// As the Hugging Face hub lays them out.
    Folder(ModelFolder),
    /// One file, or a split one.
    Gguf(Box<GgufModel>),
}

impl ModelSource {
    /// A regular file is opened as GGUF, everything else as a folder.
    pub fn open(path: &Path) -> Result<ModelSource> {
        if path.is_file() {
            return Ok(ModelSource::Gguf(Box::new(GgufModel::open(path)?)));
        }
        ModelFolder::open(path).map(ModelSource::Folder)
    }

    /// `config.json`.
    pub fn config(&self) -> Result<JsonFile> {
        match self {
            ModelSource::Folder(folder) => folder.config(),
            ModelSource::Gguf(model) => model.config(),
        }
    }

    /// `generation_config.json`.
    pub fn generation_config(&self) -> Result<GenerationConfig> {
        match self {
            ModelSource::Folder(folder) => folder.generation_config(),
            ModelSource::Gguf(model) => model.generation_config(),
        }
    }

    /// What the files of sentence-transformers say.
    pub fn sentence_config(&self) -> Result<SentenceConfig> {
        match self {
            ModelSource::Folder(folder) => folder.sentence_config(),
            ModelSource::Gguf(model) => model.sentence_config(),
        }
    }

    /// `tokenizer_config.json`, if there is one.
    pub fn tokenizer_config(&self) -> Result<Option<JsonFile>> {
        match self {
            ModelSource::Folder(folder) => folder.tokenizer_config(),
            ModelSource::Gguf(model) => model.tokenizer_config().map(Some),
        }
    }

    /// A template that goes before that of `tokenizer_config.json`.
    pub fn chat_template(&self) -> Result<Option<String>> {
        match self {
            ModelSource::Folder(folder) => folder.chat_template(),
            ModelSource::Gguf(_) => Ok(None),
        }
    }

    /// The tokenizer, as it is stored.
    pub fn tokenizer(&self) -> Result<StoredTokenizer> {
        Ok(match self {
            ModelSource::Folder(folder) => StoredTokenizer::Json(folder.tokenizer_json()?),
            ModelSource::Gguf(model) => StoredTokenizer::Gguf(model.tokenizer()),
        })
    }

    /// The weights, with checked headers.
    pub fn weights(self) -> Result<Weights> {
        match self {
            ModelSource::Folder(folder) => folder.weights(),
            ModelSource::Gguf(model) => model.weights(),
        }
    }
}

/// A tokenizer as a model's files hold it.
#[derive(Debug)]
pub enum StoredTokenizer {
    /// `tokenizer.json`.
    Json(Vec<u8>),
    /// In keys of a GGUF file.
    Gguf(GgufTokenizer),
}

impl StoredTokenizer {
    /// `tokenizer.json`. Of a GGUF file it is written here, and its vocabulary checked.
    pub fn json(&self) -> Result<Cow<'_, [u8]>> {
        match self {
            StoredTokenizer::Json(json) => Ok(Cow::Borrowed(json)),
            StoredTokenizer::Gguf(tokenizer) => tokenizer.json().map(Cow::Owned),
        }
    }

    /// Bytes that are others where [`StoredTokenizer::json`] is, at a small part of its cost: what a tokenizer is known by.
    pub fn identity_bytes(&self) -> Cow<'_, [u8]> {
        match self {
            StoredTokenizer::Json(json) => Cow::Borrowed(json),
            StoredTokenizer::Gguf(tokenizer) => Cow::Owned(tokenizer.identity_bytes()),
        }
    }
}
