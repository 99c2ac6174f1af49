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

/// `wanted`, or where rows of `width` numbers are no whole number of its blocks, the next larger type of 32 numbers a block,
/// or else f16. The choices are those that quantized files are known by.
pub fn fitting(wanted: QuantType, width: usize) -> Encoding {
    let smaller_blocks = match wanted {
        QuantType::Q2_K | QuantType::Q3_K => QuantType::Q4_0,
        QuantType::Q4_K => QuantType::Q5_0,
        QuantType::Q5_K => QuantType::Q5_1,
        QuantType::Q6_K => QuantType::Q8_0,
        other => other,
    };
    let fits = |quant_type: &QuantType| width.is_multiple_of(quant_type.block_values());
    let found = [wanted, smaller_blocks].into_iter().find(fits);
    found.map_or(Encoding::Plain(DType::F16), Encoding::Blocks)
}
