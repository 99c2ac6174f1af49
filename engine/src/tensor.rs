//! A tensor as a checkpoint holds it: name, shape, element type and bytes. No arithmetic; a backend packs it.

use crate::error::{Error, Result};
pub use ns_llm_kernels::dtype::{DType, encode_bf16, encode_f16};
pub use ns_llm_kernels::quant::{self, QuantType};

/// Owned tensor, row-major, little-endian.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    /// Path in the checkpoint, such as `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// Sizes, outermost axis first.
    pub shape: Vec<usize>,
    /// Element type.
    pub dtype: DType,
    /// `shape.product() * dtype.size_bytes()` bytes.
    pub data: Vec<u8>,
}

impl Tensor {
    /// Fails unless the shape is `expected`.
    pub fn expect_shape(&self, expected: &[usize]) -> Result<()> {
        if self.shape == expected {
            return Ok(());
        }
        Err(Error::TensorShape { name: self.name.clone(), expected: expected.to_vec(), actual: self.shape.clone() })
    }
}
