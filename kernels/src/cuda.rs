//! Operations on CUDA devices: the mirror of [`cpu`](crate::cpu). A kernel is three files with one stem: `kernels/cuda/x.cu`,
//! its only launcher `x.rs` here, and its test in `kernels/tests/cuda/`.
//!
//! A launcher checks sizes, chooses the grid and hands a [`launch::Launch`] to a [`launch::Stream`]; it knows neither
//! driver nor device. So launchers and kernels run in tests on a stream that executes kernels on the CPU
//! (`kernels/shim/`), and only what speaks to the driver itself (`device`, `module`, `graph`, and their `driver_error`) needs the feature
//! `cuda`. Whoever
//! also needs memory asks a [`driver::Driver`], which has two forms: the device, and the shim.

pub mod activation;
pub mod attention;
mod attention_decode;
mod attention_prefill;
#[cfg(feature = "cuda")]
pub mod device;
pub mod driver;
#[cfg(feature = "cuda")]
mod driver_error;
pub mod embedding;
pub mod forms;
#[cfg(feature = "cuda")]
pub mod graph;
pub mod kv_blocks;
pub mod launch;
mod matmul;
pub mod matmul_quant;
mod matvec;
pub mod memory;
#[cfg(feature = "cuda")]
mod module;
pub mod norm;
pub mod product;
pub mod rope;
pub mod sampling;
mod sm90_matmul;
pub mod transfer;

/// Version of the numerics of these kernels: it changes when any of them may give other bits than before. What was computed
/// with another one is not used.
pub const NUMERICS_VERSION: u32 = 2;
