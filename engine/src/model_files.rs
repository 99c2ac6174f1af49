//! The files of a model, read as far as it can be without its weights, and checked. A vocabulary of 150,000 tokens costs some
//! 0.5 s of one thread (a Zen 4), so tokenizer and chat template are built on their own while weights are loaded; what is wrong
//! with these two ends that load ([`PendingText::check`]).

use std::panic::resume_unwind;
use std::path::Path;
use std::thread::{self, JoinHandle};

use crate::chat::{ChatTemplate, SpecialTokens};
use crate::config::{EngineOptions, MAX_DECODER_EMBEDDING_TOKENS};
use crate::error::{Error, Result};
use crate::field_hash::{FieldHash, FieldTag};
use crate::loader::{GenerationConfig, ModelSource, SentenceConfig, StoredTokenizer, Weights};
use crate::model::config::ModelConfig;
use crate::tokenizer::{Tokenizer, TokenizerConfig};

/// What is in a model's folder, or its GGUF file.
pub(crate) struct ModelFiles {
    pub(crate) config: ModelConfig,
    pub(crate) generation: GenerationConfig,
    pub(crate) sentence: SentenceConfig,
    pub(crate) tokenizer_config: TokenizerConfig,
    pub(crate) eos_token_ids: Vec<u32>,
    /// Hash of the tokenizer and the chat template.
    pub(crate) text_fingerprint: [u8; 32],
    pub(crate) weights: Weights,
}

/// What makes tokens of text and text of tokens.
pub(crate) struct ModelText {
    pub(crate) tokenizer: Tokenizer,
    pub(crate) chat_template: Option<ChatTemplate>,
}

/// A [`ModelText`] that a thread is building. Dropped, it waits for the thread.
pub(crate) struct PendingText {
    thread: Option<JoinHandle<Result<ModelText>>>,
    /// What the thread has left.
    built: Option<Result<ModelText>>,
}

impl PendingText {
    fn start(stored: StoredTokenizer, config: TokenizerConfig) -> Result<PendingText> {
        let build = move || {
            let tokenizer = Tokenizer::from_json(&stored.json()?, &config)?;
            let chat_template = chat_template(&config, &tokenizer)?;
            Ok(ModelText { tokenizer, chat_template })
        };
        let thread = thread::Builder::new().name("ns-llm-tokenizer".to_string()).spawn(build);
        let thread = thread.map_err(|e| Error::Internal { reason: format!("no thread for the tokenizer: {e}") })?;
        Ok(PendingText { thread: Some(thread), built: None })
    }

    /// Fails if it is known already that [`PendingText::finish`] will. Does not wait.
    pub(crate) fn check(&mut self) -> Result<()> {
        if self.thread.as_ref().is_some_and(JoinHandle::is_finished) {
            self.wait();
        }
        match &self.built {
            Some(Err(error)) => Err(error.clone()),
            _ => Ok(()),
        }
    }

    /// Waits for it. Fails where the files are not what a tokenizer or a template can be made of.
    pub(crate) fn finish(mut self) -> Result<ModelText> {
        self.wait();
        self.built.take().expect("waited for")
    }

    fn wait(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.built = Some(thread.join().unwrap_or_else(|panic| resume_unwind(panic)));
        }
    }
}

impl Drop for PendingText {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            // Whoever drops it has an error of its own to tell.
            let _ = thread.join();
        }
    }
}

impl ModelFiles {
    /// Reads and checks them, and begins to build what is not needed for loading the weights.
    pub(crate) fn open(options: &EngineOptions) -> Result<(ModelFiles, PendingText)> {
        let source = ModelSource::open(&options.model)?;
        let config = ModelConfig::from_json(&source.config()?)?;
        let generation = source.generation_config()?;
        let sentence = sentence_config(&source, &config)?;
        let tokenizer_config = tokenizer_config(&source)?;
        let tokenizer = source.tokenizer()?;
        let files = ModelFiles {
            text_fingerprint: text_fingerprint(&tokenizer, &tokenizer_config),
            eos_token_ids: eos_token_ids(&generation, &config)?,
            weights: source.weights()?,
            config,
            generation,
            sentence,
            tokenizer_config,
        };
        let text = PendingText::start(tokenizer, files.tokenizer_config.clone())?;
        Ok((files, text))
    }

    /// Longest input that is turned into a vector by an engine of such a context, tokens. A decoder has others to serve
    /// beside.
    pub(crate) fn max_embedding_tokens(&self, context_tokens: usize) -> usize {
        let limit = if self.config.architecture.can_generate() { MAX_DECODER_EMBEDDING_TOKENS } else { usize::MAX };
        context_tokens.min(limit).min(self.sentence.max_seq_length.unwrap_or(usize::MAX))
    }
}

/// Last component of the path as the caller gave it, links resolved.
pub(crate) fn model_name(path: &Path) -> String {
    let real = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    real.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned())
}

/// What the files of sentence-transformers say, when it fits the model.
fn sentence_config(source: &ModelSource, config: &ModelConfig) -> Result<SentenceConfig> {
    let sentence = source.sentence_config()?;
    match sentence.word_embedding_dimension {
        Some(dimension) if dimension != config.hidden_size => Err(Error::Config {
            file: "1_Pooling/config.json",
            field: "word_embedding_dimension".to_string(),
            reason: format!("is {dimension}, the model's hidden_size is {}", config.hidden_size),
        }),
        _ => Ok(sentence),
    }
}

/// `tokenizer_config.json`, every part of which is optional; a `chat_template.jinja` goes before its template.
fn tokenizer_config(source: &ModelSource) -> Result<TokenizerConfig> {
    let mut config = match source.tokenizer_config()? {
        Some(file) => TokenizerConfig::parse(&file.into_value())?,
        None => TokenizerConfig::default(),
    };
    config.chat_template = source.chat_template()?.or(config.chat_template);
    Ok(config)
}

/// The compiled template, if the model has one.
fn chat_template(config: &TokenizerConfig, tokenizer: &Tokenizer) -> Result<Option<ChatTemplate>> {
    let special = SpecialTokens {
        named: config.special_tokens.clone(),
        texts: tokenizer.special_tokens().map(|(_, text)| text.to_string()).collect(),
    };
    config.chat_template.as_ref().map(|source| ChatTemplate::new(source, special)).transpose()
}

/// End tokens of `generation_config.json`, else those of `config.json`, all in the vocabulary.
fn eos_token_ids(generation: &GenerationConfig, config: &ModelConfig) -> Result<Vec<u32>> {
    let ids = if generation.eos_token_ids.is_empty() { &config.eos_token_ids } else { &generation.eos_token_ids };
    match ids.iter().find(|&&id| id as usize >= config.vocab_size) {
        None => Ok(ids.clone()),
        Some(id) => Err(Error::Config {
            file: "generation_config.json",
            field: "eos_token_id".to_string(),
            reason: format!("{id} is outside the vocabulary of {} entries", config.vocab_size),
        }),
    }
}

#[derive(Clone, Copy)]
#[repr(u8)]
enum Tag {
    What = 1,
    Tokenizer,
    AddBosToken,
    AddEosToken,
    SpecialTokenName,
    SpecialTokenText,
    ChatTemplate,
}

impl FieldTag for Tag {
    fn number(self) -> u8 {
        self as u8
    }
}

/// Whatever text becomes tokens by, and tokens text.
fn text_fingerprint(tokenizer: &StoredTokenizer, config: &TokenizerConfig) -> [u8; 32] {
    let TokenizerConfig { add_bos_token, add_eos_token, special_tokens, chat_template } = config;
    let mut hash = FieldHash::new()
        .text(Tag::What, "text of a model")
        .field(Tag::Tokenizer, &tokenizer.identity_bytes())
        .optional(Tag::AddBosToken, add_bos_token.map(u64::from))
        .optional(Tag::AddEosToken, add_eos_token.map(u64::from));
    for (name, text) in special_tokens {
        hash = hash.text(Tag::SpecialTokenName, name).text(Tag::SpecialTokenText, text);
    }
    if let Some(template) = chat_template {
        hash = hash.text(Tag::ChatTemplate, template);
    }
    hash.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whoever loads weights beside it hears early that there will be no tokenizer, and why.
    #[test]
    fn what_is_wrong_is_known_before_the_end() {
        let stored = StoredTokenizer::Json(b"[]".to_vec());
        let mut text = PendingText::start(stored, TokenizerConfig::default()).expect("a thread");
        let early = loop {
            if let Err(error) = text.check() {
                break error;
            }
            thread::yield_now();
        };
        assert_eq!(early.code(), "config");
        assert_eq!(text.check(), Err(early.clone()), "again");
        assert_eq!(text.finish().err(), Some(early));
    }
}
