//! Matrices on a CUDA device: in which form each is kept, how many bytes that takes (said once, for those who load and those who
//! plan), and how it gets there.
//!
//! | stored | kept |
//! | --- | --- |
//! | bf16 | bf16 |
//! | f32, f16 | bf16, rounded |
//! | Q8_0, Q4_K | the same, multiplied with activations of 8 bits |
//! | other quantized types | bf16, rounded once more |
//!
//! Matrices that are multiplied together (q, k and v; gate and up) share a form: bf16 where theirs differ.

use std::borrow::Cow;
use std::sync::Arc;

use half::{bf16, f16};
use ns_llm_kernels::cuda::driver::Driver;
use ns_llm_kernels::cuda::embedding;
use ns_llm_kernels::cuda::launch::Slice;
use ns_llm_kernels::cuda::matmul_quant::{QuantMatrix, QuantWeights, embed_quant, split_q8_0};
use ns_llm_kernels::cuda::memory::{Buffer, Memory};
use ns_llm_kernels::cuda::product::Matrix;
use ns_llm_kernels::error::Result as KernelResult;

use crate::backend::{LinearPart, LinearWeight};
use crate::config::WeightFormat;
use crate::error::{Error, Result};
use crate::tensor::{DType, Encoding, QuantType, Tensor, quant};

/// What it is for, in errors.
const PURPOSE: &str = "weights on the device";
/// Numbers that are converted at a time while a matrix is loaded.
const CHUNK_VALUES: usize = 1 << 20;

/// How a matrix is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Bf16,
    Q8_0,
    Q4K,
}

/// A matrix, or several that are multiplied with the same input, one behind the other.
pub struct CudaLinear {
    weights: DeviceWeights,
    /// `[features]`
    bias: Option<Buffer<f32>>,
    /// Rows of all parts.
    pub(super) features: usize,
    /// Width of the input.
    pub(super) columns: usize,
    /// Whether the first half of the rows are gates of the second.
    is_gate_up: bool,
}

/// The numbers of a matrix.
pub enum DeviceWeights {
    /// `[features, columns]`
    Bf16(Buffer<bf16>),
    /// Codes `[features, columns]`, scales `[features, columns / 32]`.
    Q8_0 {
        /// Codes.
        codes: Buffer<i8>,
        /// Scales.
        scales: Buffer<f16>,
    },
    /// Blocks as in a GGUF file.
    Q4K(Buffer<u8>),
}

/// Bytes of a matrix as it is kept when the user wants `wanted`; `None` if no `u64` counts them.
pub(crate) fn packed_bytes(wanted: WeightFormat, weight: &LinearWeight<'_>) -> Option<u64> {
    let parts = parts_of(weight);
    let form = form_of(wanted, &parts);
    let mut num_bytes: u64 = 0;
    for part in &parts {
        let values = part.weight.shape.iter().try_fold(1_u64, |product, &size| product.checked_mul(size as u64))?;
        num_bytes = num_bytes.checked_add(match form {
            Form::Bf16 => values.checked_mul(2)?,
            Form::Q8_0 => values.checked_add(values / 16)?,
            Form::Q4K => values / 256 * 144,
        })?;
        if parts.iter().any(|part| part.bias.is_some()) {
            num_bytes = num_bytes.checked_add(4 * *part.weight.shape.first()? as u64)?;
        }
    }
    Some(num_bytes)
}

fn parts_of<'a>(weight: &LinearWeight<'a>) -> Vec<LinearPart<'a>> {
    match weight {
        LinearWeight::Stacked(parts) => parts.to_vec(),
        LinearWeight::GateUp { gate, up } => vec![*gate, *up],
    }
}

/// The form that all parts share.
fn form_of(wanted: WeightFormat, parts: &[LinearPart<'_>]) -> Form {
    let forms = parts.iter().map(|part| {
        let width = part.weight.shape.last().copied().unwrap_or(0);
        let quantized = match (wanted, part.weight.encoding) {
            (WeightFormat::Auto, Encoding::Blocks(stored)) => stored,
            (WeightFormat::Quant(quant_type), _) => quant_type,
            _ => return Form::Bf16,
        };
        match quantized {
            QuantType::Q8_0 if width.is_multiple_of(QuantType::Q8_0.block_values()) => Form::Q8_0,
            QuantType::Q4_K if width.is_multiple_of(QuantType::Q4_K.block_values()) => Form::Q4K,
            _ => Form::Bf16,
        }
    });
    let forms: Vec<Form> = forms.collect();
    match forms.split_first() {
        Some((first, rest)) if rest.iter().all(|form| form == first) => *first,
        _ => Form::Bf16,
    }
}

impl CudaLinear {
    /// Takes a matrix to the device; `failed` makes an error of what the device says.
    pub(super) fn load(
        memory: &Arc<Memory>,
        wanted: WeightFormat,
        weight: &LinearWeight<'_>,
        failed: impl Fn(ns_llm_kernels::error::Error) -> Error,
    ) -> Result<CudaLinear> {
        let parts = parts_of(weight);
        let (mut features, mut columns) = (0, None);
        for LinearPart { weight: Tensor { name, shape, .. }, .. } in &parts {
            let (actual, expected) = (shape.clone(), vec![0, columns.unwrap_or(0)]);
            match *shape.as_slice() {
                [rows, width] if columns.is_none_or(|columns| columns == width) => {
                    (features, columns) = (features + rows, Some(width));
                }
                _ => return Err(Error::TensorShape { name: name.clone(), expected, actual }),
            }
        }
        let columns = columns.unwrap_or(0);
        let is_gate_up = matches!(weight, LinearWeight::GateUp { .. });
        let weights = match form_of(wanted, &parts) {
            Form::Bf16 => load_bf16(memory, &parts, features * columns).map_err(&failed)?,
            Form::Q8_0 => {
                let blocks = blocks_of(QuantType::Q8_0, &parts)?;
                let split: Vec<_> = blocks.iter().map(|blocks| split_q8_0(blocks)).collect();
                let codes: Vec<&[i8]> = split.iter().map(|(codes, _)| codes.as_slice()).collect();
                let scales: Vec<&[f16]> = split.iter().map(|(_, scales)| scales.as_slice()).collect();
                DeviceWeights::Q8_0 {
                    codes: memory.filled(PURPOSE, &codes).map_err(&failed)?,
                    scales: memory.filled(PURPOSE, &scales).map_err(&failed)?,
                }
            }
            Form::Q4K => {
                let blocks = blocks_of(QuantType::Q4_K, &parts)?;
                let blocks: Vec<&[u8]> = blocks.iter().map(|blocks| blocks.as_ref()).collect();
                DeviceWeights::Q4K(memory.filled(PURPOSE, &blocks).map_err(&failed)?)
            }
        };
        let bias = biases_of(&parts)?.map(|bias| memory.filled(PURPOSE, &[&bias])).transpose().map_err(&failed)?;
        Ok(CudaLinear { weights, bias, features, columns, is_gate_up })
    }

    /// Bytes on the device.
    pub(super) fn len_bytes(&self) -> u64 {
        let weights = match &self.weights {
            DeviceWeights::Bf16(weights) => weights.size_bytes(),
            DeviceWeights::Q8_0 { codes, scales } => codes.size_bytes() + scales.size_bytes(),
            DeviceWeights::Q4K(blocks) => blocks.size_bytes(),
        };
        (weights + self.bias.as_ref().map_or(0, |bias| bias.size_bytes())) as u64
    }

    /// For products in bf16.
    pub(super) fn bf16(&self) -> Option<Matrix<'_>> {
        let DeviceWeights::Bf16(weights) = &self.weights else { return None };
        Some(Matrix {
            weight: weights.all(),
            bias: self.bias.as_ref().map(|bias| bias.all()),
            features: self.features,
            columns: self.columns,
        })
    }

    /// Gate and up apart, for the product that takes both.
    pub(super) fn gate_and_up(&self) -> Option<[Matrix<'_>; 2]> {
        let DeviceWeights::Bf16(weights) = &self.weights else { return None };
        let (features, columns) = (self.features / 2, self.columns);
        let half = |idx: usize| Matrix {
            weight: weights.slice(idx * features * columns..(idx + 1) * features * columns),
            bias: self.bias.as_ref().map(|bias| bias.slice(idx * features..(idx + 1) * features)),
            features,
            columns,
        };
        self.is_gate_up.then(|| [half(0), half(1)])
    }

    /// For products with activations of 8 bits.
    pub(super) fn quantized(&self) -> Option<QuantMatrix<'_>> {
        let weights = match &self.weights {
            DeviceWeights::Bf16(_) => return None,
            DeviceWeights::Q8_0 { codes, scales } => QuantWeights::Q8_0 { codes: codes.all(), scales: scales.all() },
            DeviceWeights::Q4K(blocks) => QuantWeights::Q4K { blocks: blocks.all() },
        };
        let bias = self.bias.as_ref().map(|bias| bias.all());
        Some(QuantMatrix { weights, bias, features: self.features, columns: self.columns })
    }

    /// Rows of the matrix by their index: `out` `[indices, columns]`.
    pub(super) fn embed(
        &self,
        driver: &Arc<dyn Driver>,
        indices: Slice<'_, u32>,
        out: &mut Buffer<f32>,
    ) -> KernelResult<()> {
        match (&self.weights, self.quantized()) {
            (DeviceWeights::Bf16(weights), _) => {
                let table = embedding::Table { rows: weights.all(), width: self.columns };
                embedding::embed(driver, &table, indices, &mut out.all_mut())
            }
            (_, Some(matrix)) => embed_quant(driver, &matrix, indices, &mut out.all_mut()),
            (_, None) => unreachable!("what is not bf16 is quantized"),
        }
    }

    /// Adds rows of the matrix by their index to `out` `[indices, columns]`.
    pub(super) fn add_embedding(
        &self,
        memory: &Arc<Memory>,
        indices: Slice<'_, u32>,
        out: &mut Buffer<f32>,
    ) -> KernelResult<()> {
        let driver = memory.driver();
        if let DeviceWeights::Bf16(weights) = &self.weights {
            let table = embedding::Table { rows: weights.all(), width: self.columns };
            return embedding::add_embedding(driver, &table, indices, &mut out.all_mut());
        }
        let mut rows = memory.scratch(PURPOSE, out.len())?;
        self.embed(driver, indices, &mut rows)?;
        embedding::add_rows(driver, rows.all(), &mut out.all_mut())
    }
}

/// All parts in bf16, chunk by chunk, so that no second copy of a matrix is ever held here.
fn load_bf16(memory: &Arc<Memory>, parts: &[LinearPart<'_>], len: usize) -> KernelResult<DeviceWeights> {
    let mut buffer: Buffer<bf16> = memory.filled(PURPOSE, &[])?;
    if len > 0 {
        buffer = memory.zeroed(PURPOSE, len)?;
    }
    let mut start = 0;
    for LinearPart { weight, .. } in parts {
        let (encoding, values) = (weight.encoding, weight.num_elements());
        // A multiple of every block, so that a chunk begins with one.
        for first in (0..values).step_by(CHUNK_VALUES) {
            let len = CHUNK_VALUES.min(values - first);
            let bytes = encoding.size_bytes(first)?..encoding.size_bytes(first + len)?;
            if encoding == Encoding::Plain(DType::Bf16) {
                buffer.upload_bytes(2 * (start + first), &weight.data[bytes])?;
                continue;
            }
            let mut floats = vec![0.0; len];
            encoding.decode(&weight.data[bytes], &mut floats);
            let rounded: Vec<bf16> = floats.iter().map(|&value| bf16::from_f32(value)).collect();
            buffer.upload(start + first, &rounded)?;
        }
        start += values;
    }
    Ok(DeviceWeights::Bf16(buffer))
}

/// The blocks of each part, made here where it is stored otherwise.
fn blocks_of<'a>(wanted: QuantType, parts: &[LinearPart<'a>]) -> Result<Vec<Cow<'a, [u8]>>> {
    let blocks = parts.iter().map(|LinearPart { weight, .. }| {
        if weight.encoding == Encoding::Blocks(wanted) {
            return Ok(Cow::Borrowed(weight.data.as_slice()));
        }
        let values = weight.to_f32();
        if values.iter().any(|value| !value.is_finite()) {
            return Err(Error::NonFiniteWeights { name: weight.name.clone() });
        }
        let internal = |error: ns_llm_kernels::error::Error| Error::Internal { reason: error.to_string() };
        let mut blocks = vec![0; wanted.size_bytes(values.len()).map_err(internal)?];
        quant::encode(wanted, &values, &mut blocks).map_err(internal)?;
        Ok(Cow::Owned(blocks))
    });
    blocks.collect()
}

/// The biases of all parts, zeros where a part has none; `None` where no part has one.
fn biases_of(parts: &[LinearPart<'_>]) -> Result<Option<Vec<f32>>> {
    if parts.iter().all(|part| part.bias.is_none()) {
        return Ok(None);
    }
    let mut all = Vec::new();
    for LinearPart { weight, bias } in parts {
        let rows = weight.shape.first().copied().unwrap_or(0);
        match bias {
            Some(bias) => {
                bias.expect_shape(&[rows])?;
                all.extend(bias.to_f32());
            }
            None => all.resize(all.len() + rows, 0.0),
        }
    }
    Ok(Some(all))
}
