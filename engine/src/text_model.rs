//! What a model's files say about text, as they were loaded.

use crate::chat::ChatTemplate;
use crate::request::SamplingDefaults;
use crate::tokenizer::Tokenizer;

/// What a model's files say about text. Immutable; shared by the engine's handle, intake and worker.
pub struct TextModel {
    /// Text to tokens and back.
    pub tokenizer: Tokenizer,
    /// Messages to text; `None` when the model has none.
    pub chat_template: Option<ChatTemplate>,
    /// Sampling where a request says nothing.
    pub sampling_defaults: SamplingDefaults,
    /// The model's end tokens.
    pub eos_token_ids: Vec<u32>,
    /// Entries of the output matrix: ids below this exist.
    pub vocab_size: usize,
    /// Longest sequence of this engine.
    pub context_tokens: usize,
    /// Longest input that is turned into a vector, tokens.
    pub max_embedding_tokens: usize,
    /// Elements of a vector.
    pub embedding_dimensions: usize,
    /// Hash of all that the engine's answers depend on besides a request.
    pub identity: [u8; 32],
}
