//! The native layer of the npm package `ns-llm`: it converts values and calls the engine. Names, defaults, overloads,
//! async iterators, `AbortSignal` and disposal live in `bindings-node/lib` (TypeScript); every check of a value's range
//! lives in the engine.
//!
//! What is deliberately not here: policy, and anything that blocks. JavaScript's thread never waits for the engine; it
//! only polls (`event_loop`). No input of a caller ends the process: wrong types and ranges are errors with a `code`,
//! panics are caught at each entry, and a closed engine answers with `closed`.

mod embedding;
mod engine;
mod error;
mod event_loop;
#[cfg(all(target_os = "linux", target_env = "gnu"))]
mod glibc;
mod gpu;
mod offload;
mod request;
mod responses;
mod server;
mod stats;
mod stream;
