//! ns-llm: a native LLM inference engine in one process.

mod command;
pub mod config;
mod engine;
mod error;
pub mod inspect;
mod intake;
mod request;
mod stats;
mod stream;
mod worker;

// The parts, public only for this repository's own tests, benches and tools. Nothing in them is stable.
#[doc(hidden)]
pub mod backend;
#[doc(hidden)]
pub mod batch;
#[doc(hidden)]
pub mod chat;
#[doc(hidden)]
pub mod executor;
#[doc(hidden)]
pub mod kv_cache;
#[doc(hidden)]
pub mod loader;
#[doc(hidden)]
pub mod memory_plan;
#[doc(hidden)]
pub mod model;
#[doc(hidden)]
pub mod open;
#[doc(hidden)]
pub mod sampler;
#[doc(hidden)]
pub mod scheduler;
#[doc(hidden)]
pub mod sequence;
#[doc(hidden)]
pub mod tensor;
#[doc(hidden)]
pub mod text_model;
#[doc(hidden)]
pub mod tokenizer;

pub use config::{Device, EngineOptions, LoadProgress, ProgressCallback, ThreadPriority, WeightFormat};
pub use engine::{Choice, Completion, Engine};
#[doc(hidden)]
pub use error::panic_text;
pub use error::{Error, Result};
pub use request::{
    Delta, Event, FinishReason, Logprob, Message, Priority, Prompt, Request, SamplingDefaults, SamplingOptions,
    SamplingParams, Summary, Timings, TokenLogprobs, Usage,
};
pub use stats::{MemoryUse, ModelInfo, Stats};
pub use stream::{Canceller, RequestStream};
