//! 512-bit vectors: AVX-512 F, BW, VL and DQ (Intel since Skylake-SP, AMD since Zen 4), in [`linear`] also its bf16 dot
//! product and in [`linear_quant`] that of bytes (VNNI). Every function here is a `#[target_feature]` function: it is reached
//! through the tables of [`dispatch`](super::dispatch), which checked the CPU.
//!
//! Ends of rows are read and written under a mask: no element is computed by another sequence of operations because of
//! where it is.

pub(crate) mod attention;
pub(crate) mod linear;
pub(crate) mod linear_quant;
pub(crate) mod logits;
pub(crate) mod math;
pub(crate) mod norm;
pub(crate) mod rope;

use std::arch::x86_64::__mmask16;

/// Floats of a vector.
const LANES: usize = 16;

/// The first `len` lanes; all of them from 16 on.
#[inline]
fn first_lanes(len: usize) -> __mmask16 {
    !(u32::MAX << len.min(LANES)) as __mmask16
}
