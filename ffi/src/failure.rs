//! Why a call failed, and how a function ends for C: [`boundary`] turns what its body returns, a panic too, into a
//! status, and keeps the sentence for `ns_llm_last_error()`.

use crate::panic::caught;
use crate::status::ns_llm_status::{self, *};
use crate::status::{keep_sentence, status_of};

/// Runs the body of an exported function; its failure becomes a status and the thread's last error.
pub(crate) fn boundary(body: impl FnOnce() -> Result<(), Failure>) -> ns_llm_status {
    match caught(body) {
        Ok(Ok(())) => NS_LLM_OK,
        Ok(Err(failure)) => report(&failure),
        Err(message) => report(&Failure::Panic { message }),
    }
}

/// Keeps the sentence of `failure` for this thread and gives its status.
fn report(failure: &Failure) -> ns_llm_status {
    keep_sentence(&failure.to_string());
    failure.status()
}

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    #[error("{argument} is NULL")]
    NullArgument { argument: &'static str },
    #[error("{handle:#x} is not a live handle of {kind}")]
    BadHandle { kind: &'static str, handle: u64 },
    #[error("no handle is left for {kind}: {limit} live, free some")]
    TooManyHandles { kind: &'static str, limit: usize },
    #[error("{argument} is not UTF-8 at byte {offset}")]
    InvalidUtf8 { argument: &'static str, offset: usize },
    #[error("{argument} is {address:#x}, must be a multiple of {alignment}")]
    Misaligned { argument: &'static str, address: usize, alignment: usize },
    #[error("{argument} asks for something that is newer than this library: {reason}")]
    Unsupported { argument: &'static str, reason: String },
    #[error("{argument} has room for {capacity}, {needed} are needed")]
    BufferTooSmall { argument: &'static str, capacity: usize, needed: usize },
    #[error("nothing came within the {timeout_ms} ms of waiting")]
    Timeout { timeout_ms: u64 },
    #[error("{function} would wait for the callback that it is called from")]
    InCallback { function: &'static str },
    #[error("engines were opened by process {owner}; this is process {process}, which was forked from it")]
    ForkedProcess { owner: u32, process: u32 },
    #[error("this request is read with {reader}, not with {function}")]
    WrongReader { function: &'static str, reader: &'static str },
    #[error("another thread is reading the events of this request")]
    Busy,
    #[error("the last event of this request was read before")]
    Ended,
    #[error("panic: {message}")]
    Panic { message: String },
    #[error(transparent)]
    Engine(#[from] ns_llm_core::Error),
}

impl Failure {
    /// A field outside its range, in the engine's own words.
    pub(crate) fn invalid(field: &'static str, value: impl ToString, expected: impl Into<String>) -> Self {
        ns_llm_core::Error::InvalidArgument { field, value: value.to_string(), expected: expected.into() }.into()
    }

    fn status(&self) -> ns_llm_status {
        match self {
            Failure::NullArgument { .. } => NS_LLM_NULL_ARGUMENT,
            Failure::BadHandle { .. } => NS_LLM_BAD_HANDLE,
            Failure::TooManyHandles { .. } => NS_LLM_OVERLOADED,
            Failure::InvalidUtf8 { .. } => NS_LLM_INVALID_UTF8,
            Failure::Misaligned { .. } => NS_LLM_MISALIGNED_POINTER,
            Failure::Unsupported { .. } => NS_LLM_UNSUPPORTED,
            Failure::BufferTooSmall { .. } => NS_LLM_BUFFER_TOO_SMALL,
            Failure::Timeout { .. } => NS_LLM_TIMEOUT,
            Failure::InCallback { .. } => NS_LLM_IN_CALLBACK,
            Failure::ForkedProcess { .. } => NS_LLM_FORKED_PROCESS,
            Failure::WrongReader { .. } => NS_LLM_WRONG_READER,
            Failure::Busy => NS_LLM_BUSY,
            Failure::Ended => NS_LLM_ENDED,
            Failure::Panic { .. } => NS_LLM_INTERNAL,
            Failure::Engine(error) => status_of(error),
        }
    }
}
