//! A tensor as a checkpoint holds it: name, shape, encoding and bytes. No arithmetic; a backend packs it.

use crate::error::{Error, Result};
pub use ns_llm_kernels::dtype::{DType, Encoding};
pub use ns_llm_kernels::quant::{self, QuantType};

/// Owned tensor, row-major, little-endian.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    /// Path in the checkpoint, such as `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// Sizes, outermost axis first.
    pub shape: Vec<usize>,
    /// How the numbers are written. Blocks lie along the innermost axis.
    pub encoding: Encoding,
    /// `encoding.size_bytes(shape.product())` bytes.
    pub data: Vec<u8>,
}

impl Tensor {
    /// Numbers in the tensor.
    pub fn num_elements(&self) -> usize {
        self.shape.iter().product()
    }
    /// All numbers.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.num_elements()];
        self.encoding.decode(&self.data, &mut values);
        values
    }
    /// Fails unless the shape is `expected`.
    pub fn expect_shape(&self, expected: &[usize]) -> Result<()> {
        if self.shape == expected {
            return Ok(());
        }
        Err(Error::TensorShape { name: self.name.clone(), expected: expected.to_vec(), actual: self.shape.clone() })
    }
}
