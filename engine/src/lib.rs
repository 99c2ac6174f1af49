//! ns-llm: a native LLM inference engine in one process. Opens a model (a folder, or one GGUF file), answers any number
//! of requests at once, and shares the work of common prefixes between them.
//!
//! ```
//! use ns_llm::{EmbeddingRequest, Engine, EngineOptions, Event, Request};
//!
//! # fn main() -> ns_llm::Result<()> {
//! # let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/demo");
//! let engine = Engine::open(EngineOptions::new(model))?;
//!
//! // All at once, or event by event as they are made. Dropping a stream cancels its request.
//! let story = engine.complete(Request::prompt("Once upon a time").max_tokens(24).temperature(0.0))?;
//! let mut text = String::new();
//! for event in engine.generate(Request::prompt("Once upon a time").max_tokens(24).temperature(0.0))? {
//!     if let Event::Delta(delta) = event? {
//!         text.push_str(&delta.text);
//!     }
//! }
//! assert_eq!(text, story.choices[0].text);
//!
//! // Texts to vectors of unit length.
//! let vectors = engine.embed(EmbeddingRequest::new(["a red fox", "a quick fox"]))?;
//! assert_eq!(vectors.embeddings.len(), 2);
//! # Ok(())
//! # }
//! ```

mod command;
pub mod config;
#[doc(hidden)]
pub mod device;
mod embedding;
mod engine;
mod error;
mod field_hash;
pub mod inspect;
mod instruments;
mod intake;
pub mod kv_cache_directory;
pub mod quantize;
mod request;
mod response_tiers;
mod responses;
mod stats;
mod stream;
mod tier_thread;
mod trace;
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
mod fair_lru;
#[doc(hidden)]
pub mod ids;
#[doc(hidden)]
pub mod kv_cache;
#[doc(hidden)]
pub mod loader;
#[doc(hidden)]
pub mod memory_plan;
#[doc(hidden)]
pub mod model;
mod model_files;
#[doc(hidden)]
pub mod open;
#[doc(hidden)]
pub mod option_names;
mod owner_ledger;
#[doc(hidden)]
pub mod response_cache;
#[doc(hidden)]
pub mod sampler;
#[doc(hidden)]
pub mod scheduler;
#[doc(hidden)]
pub mod sequence;
#[doc(hidden)]
pub mod storage;
#[doc(hidden)]
pub mod tensor;
#[doc(hidden)]
pub mod text_model;
#[doc(hidden)]
pub mod tokenizer;
mod weight_levels;

pub use config::{
    Device, EngineOptions, KvDtype, KvRemoteOptions, KvTierEncoding, LoadProgress, ProgressCallback,
    ResponseCacheOptions, ThreadPriority, WeightFormat,
};
pub use embedding::{EmbeddingInput, EmbeddingRequest, Embeddings};
pub use engine::{Choice, Completion, Engine, Warmed};
#[doc(hidden)]
pub use error::panic_text;
pub use error::{DeviceRefusal, Error, Result};
pub use ns_llm_kernels::host::gpu::{Gpu, GpuVendor, gpus};
pub use ns_llm_kernels::quant::QuantType;
pub use request::{
    CacheTier, CacheUse, CachedTokens, Delta, Embedding, Event, FinishReason, Logprob, Message, MissReason, Origin,
    PrefixMiss, Priority, Prompt, Request, SamplingDefaults, SamplingOptions, SamplingParams, Summary, Timings,
    TokenLogprobs, Usage,
};
pub use response_cache::EntryUse;
pub use responses::{PutOptions, Responses};
pub use stats::{
    CudaGraphStats, Histogram, Histograms, KvTierStats, MemoryUse, ModelInfo, ResponseCacheStats, RunningStep, Stats,
};
pub use stream::{Canceller, RequestStream};
