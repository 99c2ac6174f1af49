//! 256-bit vectors with FMA and f16 conversion. Every function here is a `#[target_feature]` function: it is reached
//! through the tables of [`dispatch`](super::dispatch), which checked the CPU.

pub(crate) mod attention;
pub(crate) mod linear;
pub(crate) mod linear_quant;
mod linear_quant_rows;
pub(crate) mod logits;
pub(crate) mod math;
pub(crate) mod norm;
pub(crate) mod rope;
