//! Operations on the CPU. Each family has safe entry points that check sizes and split the work over a [`pool`], a
//! scalar form written for the eye, and one form per instruction set; [`dispatch`] chooses between them.

pub mod attention;
pub mod dispatch;
pub mod embedding;
pub mod kv_blocks;
pub mod linear;
pub mod logits;
pub mod norm;
pub mod pool;
pub mod pooling;
pub mod rope;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(target_arch = "x86_64")]
mod prefetch;
mod scalar;

pub use dispatch::{Cpu, Isa};

/// Version of the numerics of these operations: it changes when any of them may give other bits than before. What was
/// computed with another one is not used.
pub const NUMERICS_VERSION: u32 = 1;
