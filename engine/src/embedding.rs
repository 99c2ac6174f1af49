//! Texts to vectors: what a user may ask and what comes back. Plain public values, no behaviour but the checks of
//! their ranges; the work itself is a step of its own kind beside generation (`scheduler/encode.rs`).

use crate::config::*;
use crate::error::Result;
use crate::request::{Embedding, Priority, Summary, check_timeout};

/// One input of an [`EmbeddingRequest`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EmbeddingInput {
    /// Text, encoded as the tokenizer's configuration says.
    Text(String),
    /// Token ids, taken as they are.
    Tokens(Vec<u32>),
}

impl From<&str> for EmbeddingInput {
    fn from(text: &str) -> Self {
        EmbeddingInput::Text(text.to_string())
    }
}

impl From<String> for EmbeddingInput {
    fn from(text: String) -> Self {
        EmbeddingInput::Text(text)
    }
}

impl From<Vec<u32>> for EmbeddingInput {
    fn from(ids: Vec<u32>) -> Self {
        EmbeddingInput::Tokens(ids)
    }
}

/// Inputs to turn into vectors, each for itself: what else is in the request changes no bit of a vector.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct EmbeddingRequest {
    /// One vector each.
    pub inputs: Vec<EmbeddingInput>,
    /// Whether an input longer than [`ModelInfo::max_embedding_tokens`](crate::ModelInfo::max_embedding_tokens) is cut;
    /// otherwise it is [`PromptTooLong`](crate::Error::PromptTooLong).
    pub truncate: bool,
    /// Whether vectors have unit length (L2).
    pub normalize: bool,
    /// Leading elements to keep (Kusupati et al. 2022, arXiv:2205.13147); `None`: all that the model gives.
    pub dimensions: Option<usize>,
    /// Who goes first.
    pub priority: Priority,
    /// Limit from submission to the end, milliseconds.
    pub timeout_ms: Option<u64>,
}

impl EmbeddingRequest {
    /// A request for one vector per input.
    pub fn new<I: Into<EmbeddingInput>>(inputs: impl IntoIterator<Item = I>) -> Self {
        EmbeddingRequest {
            inputs: inputs.into_iter().map(Into::into).collect(),
            truncate: true,
            normalize: true,
            dimensions: None,
            priority: Priority::Normal,
            timeout_ms: None,
        }
    }

    /// Checks every range that does not depend on a model.
    pub fn validate(&self) -> Result<()> {
        if self.inputs.is_empty() {
            return Err(invalid("input", "[]", "at least one input".to_string()));
        }
        at_most("input (entries)", self.inputs.len(), MAX_EMBEDDING_INPUTS)?;
        at_most("input (bytes)", self.input_bytes(), MAX_PROMPT_BYTES)?;
        if self.dimensions == Some(0) {
            return Err(invalid("dimensions", 0, "at least 1".to_string()));
        }
        check_timeout(self.timeout_ms)
    }

    /// Bytes of all inputs.
    pub(crate) fn input_bytes(&self) -> usize {
        let bytes = |input: &EmbeddingInput| match input {
            EmbeddingInput::Text(text) => text.len(),
            EmbeddingInput::Tokens(ids) => size_of_val(ids.as_slice()),
        };
        self.inputs.iter().map(bytes).fold(0, usize::saturating_add)
    }
}

/// Everything about a finished embedding request.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Embeddings {
    /// One per input, in their order.
    pub embeddings: Vec<Embedding>,
    /// Counts and times; `usage.prompt_tokens` is the sum over the inputs.
    pub summary: Summary,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    /// Each range is refused by its own name before any work.
    #[test]
    fn ranges_are_checked_by_name() {
        let field = |request: EmbeddingRequest| match request.validate() {
            Err(Error::InvalidArgument { field, .. }) => field,
            other => panic!("{other:?}"),
        };
        assert_eq!(field(EmbeddingRequest::new(Vec::<String>::new())), "input");
        assert_eq!(field(EmbeddingRequest::new(vec!["x"; MAX_EMBEDDING_INPUTS + 1])), "input (entries)");
        assert_eq!(field(EmbeddingRequest::new(["x".repeat(MAX_PROMPT_BYTES + 1)])), "input (bytes)");
        assert_eq!(field(EmbeddingRequest { dimensions: Some(0), ..EmbeddingRequest::new(["x"]) }), "dimensions");
        assert_eq!(field(EmbeddingRequest { timeout_ms: Some(0), ..EmbeddingRequest::new(["x"]) }), "timeout_ms");
        assert_eq!(EmbeddingRequest::new(["x"]).validate(), Ok(()));
    }
}
