//! One error type for the whole engine. Each variant holds what makes its message useful: the field, the value and
//! the limit; or the file, the tensor and both shapes. [`Error::code`] is a stable string, the same in Rust, C
//! and JavaScript. There is no catch-all variant: a new way to fail is a new variant with its own test.

use std::path::PathBuf;

use thiserror::Error;

/// Result of everything that can fail in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, and where. Messages start in lower case and end without a dot.
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum Error {
    // ---- the request -------------------------------------------------------------------------------------------
    /// A field of a request or of the options is outside its range.
    #[error("{field} is {value}, must be {expected}")]
    InvalidArgument {
        /// Name of the field as the caller wrote it.
        field: &'static str,
        /// The value, as text.
        value: String,
        /// The closed range or set that is allowed, in words.
        expected: String,
    },
    /// The prompt has more tokens than the context, or leaves no room for one new token; or an input of an embedding
    /// request that may not be cut is longer than the model embeds.
    #[error(
        "prompt has {prompt_tokens} tokens, at most {limit_tokens} are possible with a context of {context_tokens}"
    )]
    PromptTooLong {
        /// Length of the prompt.
        prompt_tokens: usize,
        /// Longest prompt that is allowed.
        limit_tokens: usize,
        /// Context length of this engine.
        context_tokens: usize,
    },
    /// The request could not run even if it were alone: its prompt and answer need more blocks than the pool has.
    #[error("request needs {needed_blocks} KV blocks, the pool has {pool_blocks}")]
    ExceedsKvPool {
        /// Blocks for prompt and answer.
        needed_blocks: usize,
        /// All blocks of the pool.
        pool_blocks: usize,
    },
    /// The waiting queue is full. Nothing was lost; try again later.
    #[error("{queue} holds {waiting} of at most {limit}, try again later")]
    Overloaded {
        /// Which bound was hit, with its unit, such as "waiting queue (requests)".
        queue: &'static str,
        /// What is waiting now.
        waiting: usize,
        /// The bound.
        limit: usize,
    },
    /// The chat template refused the messages, or broke one of its bounds.
    #[error("chat template: {reason}")]
    Template {
        /// What the template engine said, or the bound that was broken.
        reason: String,
    },
    /// Text could not be turned into tokens.
    #[error("tokenizer: {reason}")]
    Tokenizer {
        /// What the tokenizer said.
        reason: String,
    },
    /// The model has no chat template, so messages cannot be rendered.
    #[error("the model has no chat template; give a plain prompt or set one")]
    NoChatTemplate,

    /// The model is not made for what was asked.
    #[error("{architecture} does not {feature}")]
    NotSupported {
        /// What was asked, as a verb, such as "generate text".
        feature: &'static str,
        /// As in `config.json`.
        architecture: String,
    },

    // ---- the life of a request ----------------------------------------------------------------------------------
    /// The caller cancelled the request.
    #[error("the request was cancelled")]
    Cancelled,
    /// The deadline of the request passed before it ended.
    #[error("the request did not end within its {timeout_ms} ms")]
    DeadlineExceeded {
        /// The limit that the request was given.
        timeout_ms: u64,
    },
    /// The logits of this sequence were not finite. Only this sequence ended.
    #[error("logits of the sequence at position {position} are not finite")]
    NonFiniteLogits {
        /// Position of the token that was to be sampled.
        position: usize,
    },
    /// The vector of this input was not finite. Only this request ended.
    #[error("the vector of an input of {tokens} tokens is not finite")]
    NonFiniteEmbedding {
        /// Length of the input.
        tokens: usize,
    },
    /// A weight that is to be quantized is NaN or infinite, for which blocks have no place.
    #[error("weights `{name}` have numbers that are not finite and cannot be quantized")]
    NonFiniteWeights {
        /// Name of the tensor, of several that are packed together all names.
        name: String,
    },
    /// The engine was closed.
    #[error("the engine is closed")]
    Closed,
    /// The engine's worker ended in a way that is a defect of this library. The process lives; open a new engine.
    #[error("internal failure: {reason}")]
    Internal {
        /// What is known.
        reason: String,
    },

    // ---- files ---------------------------------------------------------------------------------------------------
    /// A file or folder could not be read.
    #[error("{path}: {reason}", path = .path.display())]
    Io {
        /// The path as the caller gave it, or a file inside it.
        path: PathBuf,
        /// What the operating system said.
        reason: String,
    },
    /// A file that the model needs is not there.
    #[error("{path} has no {missing}", path = .path.display())]
    MissingFile {
        /// The model folder.
        path: PathBuf,
        /// What was looked for.
        missing: &'static str,
    },
    /// A configuration file is not what it should be.
    #[error("{file}: field `{field}`: {reason}")]
    Config {
        /// File name, such as "config.json", or "GGUF metadata".
        file: &'static str,
        /// The field, with dots for nesting.
        field: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A file is not JSON, or its outermost value is not an object.
    #[error("{file} is not valid JSON at line {line}, column {column}: {reason}")]
    InvalidJson {
        /// File name.
        file: String,
        /// Line, from 1.
        line: usize,
        /// Column, from 1.
        column: usize,
        /// What the parser said.
        reason: String,
    },
    /// A weights file is damaged or lies about itself.
    #[error("{file} at byte {offset}: {reason}")]
    Weights {
        /// File name.
        file: String,
        /// Where in the file.
        offset: u64,
        /// What is wrong there.
        reason: String,
    },
    /// The model needs a tensor that no file has.
    #[error("tensor `{name}` is missing")]
    MissingTensor {
        /// Its path in the checkpoint.
        name: String,
    },
    /// The files hold tensors that the model has no use for: most likely the configuration does not fit the weights.
    #[error("{count} tensors are not used by the model, the first is `{name}`")]
    UnusedTensors {
        /// How many.
        count: usize,
        /// The first in alphabetical order.
        name: String,
    },
    /// A tensor has another shape than the configuration says.
    #[error("tensor `{name}` has shape {actual:?}, the model needs {expected:?}")]
    TensorShape {
        /// Its path in the checkpoint.
        name: String,
        /// What the configuration asks for, outermost axis first.
        expected: Vec<usize>,
        /// What the file has.
        actual: Vec<usize>,
    },
    /// A tensor has an element type that cannot be used there.
    #[error("tensor `{name}` is {dtype}, which is not supported here")]
    TensorDtype {
        /// Its path in the checkpoint.
        name: String,
        /// The type as the file calls it.
        dtype: String,
    },
    /// The architecture in `config.json` is not known.
    #[error("architecture `{name}` is not supported (supported: {supported})")]
    UnknownArchitecture {
        /// As in `config.json`.
        name: String,
        /// The list.
        supported: &'static str,
    },

    // ---- the machine ----------------------------------------------------------------------------------------------
    /// Memory for weights or KV could not be had.
    #[error("{purpose} needs {needed_bytes} bytes, {available_bytes} are available")]
    OutOfMemory {
        /// What it was for.
        purpose: &'static str,
        /// What was asked.
        needed_bytes: u64,
        /// What is there, or the limit that was set.
        available_bytes: u64,
    },
    /// The device that was asked for is not there.
    #[error("device `{device}` is not available: {reason}")]
    DeviceUnavailable {
        /// As the caller named it.
        device: String,
        /// Why not.
        reason: DeviceRefusal,
    },
    /// The device was lost while it computed: a kernel broke a rule, or the hardware failed. All requests of the engine
    /// end with this, and it is closed; the process lives, and may open another engine.
    #[error("device `{device}` was lost: {reason}")]
    DeviceLost {
        /// Which device.
        device: String,
        /// What its driver said.
        reason: String,
    },
    /// Since it was asked last, a cache tier was to keep things and has not: too much waited, it failed, or it may not be
    /// written. The requests that they came from are not touched; it is told once.
    #[error("{tier} tier: {count} {what} were not stored since the last flush: {reason}")]
    NotStored {
        /// Which tier: "disk", "remote".
        tier: &'static str,
        /// How many.
        count: u64,
        /// What they are: "KV blocks", "answers".
        what: &'static str,
        /// Why the last of them was not.
        reason: String,
    },
    /// A cache tier could not bring to its medium what it holds. The requests that it served are not touched.
    #[error("{tier} tier: {reason}")]
    Storage {
        /// Which tier: "disk", "remote".
        tier: &'static str,
        /// What it said.
        reason: String,
    },
}

impl Error {
    /// Stable name of the kind of error, in snake case. Once published it never changes its meaning.
    pub fn code(&self) -> &'static str {
        match self {
            Error::InvalidArgument { .. } => "invalid_argument",
            Error::PromptTooLong { .. } => "prompt_too_long",
            Error::ExceedsKvPool { .. } => "exceeds_kv_pool",
            Error::Overloaded { .. } => "overloaded",
            Error::Template { .. } => "template",
            Error::Tokenizer { .. } => "tokenizer",
            Error::NoChatTemplate => "no_chat_template",
            Error::NotSupported { .. } => "not_supported",
            Error::Cancelled => "cancelled",
            Error::DeadlineExceeded { .. } => "deadline_exceeded",
            Error::NonFiniteLogits { .. } => "non_finite_logits",
            Error::NonFiniteEmbedding { .. } => "non_finite_embedding",
            Error::NonFiniteWeights { .. } => "non_finite_weights",
            Error::Closed => "closed",
            Error::Internal { .. } => "internal",
            Error::Io { .. } => "io",
            Error::MissingFile { .. } => "missing_file",
            Error::Config { .. } => "config",
            Error::InvalidJson { .. } => "invalid_json",
            Error::Weights { .. } => "weights",
            Error::MissingTensor { .. } => "missing_tensor",
            Error::UnusedTensors { .. } => "unused_tensors",
            Error::TensorShape { .. } => "tensor_shape",
            Error::TensorDtype { .. } => "tensor_dtype",
            Error::UnknownArchitecture { .. } => "unknown_architecture",
            Error::OutOfMemory { .. } => "out_of_memory",
            Error::DeviceUnavailable { .. } => "device_unavailable",
            Error::DeviceLost { .. } => "device_lost",
            Error::NotStored { .. } => "not_stored",
            Error::Storage { .. } => "storage",
        }
    }
}

/// Why a device cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum DeviceRefusal {
    /// The library was built without it.
    #[error("this build has no CUDA support")]
    NotBuilt,
    /// No driver is installed.
    #[error("no CUDA driver is installed (libcuda.so.1 could not be loaded)")]
    NoDriver,
    /// The driver cannot run the kernels.
    #[error("the CUDA driver supports CUDA {found}, needed is {needed} (driver 580 or later)")]
    DriverTooOld {
        /// Newest CUDA version of the driver.
        found: String,
        /// That of the kernels.
        needed: String,
    },
    /// There is no such device.
    #[error("there is no CUDA device {ordinal} (devices: {count})")]
    NoSuchDevice {
        /// Which was asked for, from 0.
        ordinal: usize,
        /// How many there are.
        count: usize,
    },
    /// The device is older than the kernels.
    #[error("`{name}` has compute capability {found}, needed is {needed}")]
    DeviceTooOld {
        /// As the driver calls it.
        name: String,
        /// What it has.
        found: String,
        /// What the kernels were compiled for.
        needed: String,
    },
    /// There is no kernel for something that the model needs.
    #[error("there is no CUDA kernel for {missing}")]
    NoKernel {
        /// What is missing.
        missing: String,
    },
    /// The driver refused a call.
    #[error("{reason}")]
    Driver {
        /// Call and answer.
        reason: String,
    },
}

/// What a panic said, if it said something. For the boundaries of this project's crates.
#[doc(hidden)]
pub fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
        (Some(text), _) => (*text).to_string(),
        (_, Some(text)) => text.clone(),
        _ => "a panic without a text".to_string(),
    }
}
