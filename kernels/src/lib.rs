//! The arithmetic of ns-llm: slices and sizes in, numbers out. Knows no tensor, no model and no request.
//!
//! Results are row-invariant: each element of a result is one fixed sequence of floating-point operations that depends
//! only on its own row, never on the number of rows, on the tile it was computed in, or on the number of threads.

pub mod cpu;
pub mod cuda;
pub mod dtype;
pub mod error;
pub mod host;
pub mod kv_int8;
pub mod quant;

#[cfg(target_endian = "big")]
compile_error!("packed weights hold pairs of 16-bit numbers as little-endian machines read them");
