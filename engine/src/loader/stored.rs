//! Tensors as a weights file of any format holds them: where they lie, how their numbers are written, in which order
//! their rows are; and the way from those bytes to a plain [`Tensor`].

#![deny(clippy::arithmetic_side_effects, clippy::indexing_slicing)]

use std::fmt;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

use ::safetensors::Dtype;

use crate::error::{Error, Result};
use crate::tensor::{DType, QuantType, Tensor, encode_bf16, encode_f16, quant};

/// An open file whose header was checked.
#[derive(Debug)]
pub(super) struct WeightsFile {
    /// File name, without its folder.
    pub(super) name: String,
    pub(super) file: File,
    /// In the order of their data.
    pub(super) tensors: Vec<StoredTensor>,
}

impl WeightsFile {
    /// Reads the data of `tensor`, one of this file's, into `buffer`, whose content is replaced.
    pub(super) fn read(&mut self, tensor: &StoredTensor, mut buffer: Vec<u8>) -> Result<Vec<u8>> {
        buffer.clear();
        let seek = self.file.seek(SeekFrom::Start(tensor.offset)).map_err(|e| e.to_string());
        seek.and_then(|_| read_exactly(&mut self.file, tensor.num_bytes, buffer)).map_err(|reason| Error::Weights {
            file: self.name.clone(),
            offset: tensor.offset,
            reason: format!("tensor `{}`: {reason}", tensor.name),
        })
    }
}

/// `num_bytes` has been compared with the length of the file, so that the allocation is bounded by what is there.
pub(super) fn read_exactly(file: &mut File, num_bytes: u64, mut buffer: Vec<u8>) -> Result<Vec<u8>, String> {
    let len = usize::try_from(num_bytes).map_err(|_| format!("{num_bytes} bytes do not fit this machine's memory"))?;
    buffer.try_reserve_exact(len).map_err(|e| format!("{num_bytes} bytes: {e}"))?;
    file.take(num_bytes).read_to_end(&mut buffer).map_err(|e| e.to_string())?;
    if buffer.len() == len { Ok(buffer) } else { Err(format!("{} of {len} bytes are there", buffer.len())) }
}

/// Where a tensor lies in its file.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct StoredTensor {
    /// As models call it.
    pub(super) name: String,
    pub(super) dtype: StoredDtype,
    /// Outermost axis first.
    pub(super) shape: Vec<usize>,
    /// First byte, counted from the start of the file.
    pub(super) offset: u64,
    /// Bytes of data.
    pub(super) num_bytes: u64,
    pub(super) row_order: RowOrder,
}

/// How the numbers of a tensor are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoredDtype {
    /// One by one.
    Plain(Dtype),
    /// In blocks with scales.
    Blocks(QuantType),
}

impl fmt::Display for StoredDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StoredDtype::Plain(dtype) => write!(f, "{dtype}"),
            StoredDtype::Blocks(blocks) => f.write_str(&blocks.name().to_uppercase()),
        }
    }
}

/// In which order the outermost axis is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RowOrder {
    /// As models ask for it.
    AsIs,
    /// Rows of so many heads, in each of which dimension `i` of the first half is followed by dimension `i` of the
    /// second. Rotary embedding turns dimensions in pairs; the papers pair neighbours, transformers pairs the halves of
    /// a head. Converters to GGUF reorder q and k of the architecture `llama` from the second form to the first, and
    /// our models are written in the second.
    InterleavedHeads(usize),
}

impl StoredDtype {
    /// The type that the numbers have as a plain tensor. Blocks are decoded to `decoded`.
    fn plain(self, decoded: DType) -> Option<DType> {
        match self {
            StoredDtype::Plain(Dtype::F32) => Some(DType::F32),
            StoredDtype::Plain(Dtype::F16) => Some(DType::F16),
            StoredDtype::Plain(Dtype::BF16) => Some(DType::Bf16),
            StoredDtype::Plain(_) => None,
            StoredDtype::Blocks(_) => Some(decoded),
        }
    }

    /// Whether [`to_plain`] can be asked for.
    pub(super) fn can_be_plain(self) -> bool {
        self.plain(DType::F32).is_some()
    }
}

/// Makes a plain tensor of `data`, the bytes of `stored`. Blocks are decoded to `decoded`.
pub(super) fn to_plain(stored: &StoredTensor, data: Vec<u8>, decoded: DType) -> Result<Tensor> {
    let no_memory = |purpose| Error::OutOfMemory { purpose, needed_bytes: stored.num_bytes, available_bytes: 0 };
    let unsupported = || Error::TensorDtype { name: stored.name.clone(), dtype: stored.dtype.to_string() };
    let dtype = stored.dtype.plain(decoded).ok_or_else(unsupported)?;
    if stored.row_order != RowOrder::AsIs && stored.shape.len() < 2 && matches!(stored.dtype, StoredDtype::Blocks(_)) {
        return Err(unsupported());
    }
    // Rows of a matrix are whole blocks, so they can be moved before they are decoded.
    let data = match stored.row_order {
        RowOrder::AsIs => data,
        RowOrder::InterleavedHeads(heads) => halves_of_heads(&data, stored.shape.first().copied(), heads)
            .ok_or_else(|| no_memory("reordering the rows of a tensor"))?,
    };
    let data = match stored.dtype {
        StoredDtype::Plain(_) => data,
        StoredDtype::Blocks(blocks) => {
            decode_blocks(blocks, &data, dtype).ok_or_else(|| no_memory("decoding a quantized tensor"))?
        }
    };
    Ok(Tensor { name: stored.name.clone(), shape: stored.shape.clone(), dtype, data })
}

/// Numbers that are decoded at once: whole blocks of every format, few enough to stay in the nearest cache.
const DECODED_AT_ONCE: usize = 2048;

/// The numbers of all blocks in `bytes`, as `dtype`. `None` without memory.
fn decode_blocks(blocks: QuantType, bytes: &[u8], dtype: DType) -> Option<Vec<u8>> {
    let num_blocks = bytes.len().checked_div(blocks.block_bytes())?;
    let num_bytes = num_blocks.checked_mul(blocks.block_values())?.checked_mul(dtype.size_bytes())?;
    let mut decoded = Vec::new();
    decoded.try_reserve_exact(num_bytes).ok()?;
    decoded.resize(num_bytes, 0_u8);
    let (mut values, mut halves) = ([0.0; DECODED_AT_ONCE], [0; DECODED_AT_ONCE]);
    let chunks = bytes.chunks(blocks.size_bytes(DECODED_AT_ONCE).ok()?);
    for (chunk, out) in chunks.zip(decoded.chunks_mut(DECODED_AT_ONCE.checked_mul(dtype.size_bytes())?)) {
        let num_values = out.len().checked_div(dtype.size_bytes())?;
        let (values, halves) = (values.get_mut(..num_values)?, halves.get_mut(..num_values)?);
        quant::decode(blocks, chunk, values).expect("the bytes of whole blocks, and room for as many numbers");
        match dtype {
            DType::F32 => {
                out.as_chunks_mut().0.iter_mut().zip(values).for_each(|(out, value)| *out = value.to_le_bytes());
                continue;
            }
            DType::F16 => encode_f16(values, halves),
            DType::Bf16 => encode_bf16(values, halves),
        }
        out.as_chunks_mut().0.iter_mut().zip(halves).for_each(|(out, half)| *out = half.to_le_bytes());
    }
    Some(decoded)
}

/// Undoes [`RowOrder::InterleavedHeads`]: of each head the even rows, then the odd ones. `None` without memory.
fn halves_of_heads(data: &[u8], rows: Option<usize>, heads: usize) -> Option<Vec<u8>> {
    let row_bytes = data.len().checked_div(rows?)?;
    let head_bytes = data.len().checked_div(heads)?;
    if row_bytes == 0 || head_bytes == 0 {
        return Some(data.to_vec());
    }
    let mut reordered = Vec::new();
    reordered.try_reserve_exact(data.len()).ok()?;
    for head in data.chunks(head_bytes) {
        for parity in [0, 1] {
            head.chunks(row_bytes).skip(parity).step_by(2).for_each(|row| reordered.extend_from_slice(row));
        }
    }
    Some(reordered)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pairs of neighbours become two halves, head by head, whatever a row's width.
    #[test]
    fn heads_are_put_back_in_halves() {
        // Two heads of four rows of two bytes; the byte is the row's place in the order that models want.
        let stored = [0, 2, 1, 3, 4, 6, 5, 7].map(|row| [row, row]);
        let wanted: Vec<u8> = (0..8).flat_map(|row| [row, row]).collect();
        assert_eq!(halves_of_heads(stored.as_flattened(), Some(8), 2), Some(wanted));
    }

    /// Blocks become the same numbers in every plain type, up to its rounding, also where the last chunk is short.
    #[test]
    fn blocks_are_decoded_to_each_type() {
        let values: Vec<f32> = (0..DECODED_AT_ONCE + 256).map(|i| (i % 17) as f32 - 8.0).collect();
        let mut bytes = vec![0; QuantType::Q8_0.size_bytes(values.len()).unwrap()];
        quant::encode(QuantType::Q8_0, &values, &mut bytes).unwrap();
        for (dtype, tolerance) in [(DType::F32, 0.04), (DType::F16, 0.05), (DType::Bf16, 0.08)] {
            let decoded = decode_blocks(QuantType::Q8_0, &bytes, dtype).unwrap();
            let mut actual = vec![0.0; values.len()];
            assert_eq!(decoded.len(), values.len() * dtype.size_bytes());
            dtype.decode(&decoded, &mut actual);
            let worst = actual.iter().zip(&values).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst <= tolerance, "{dtype:?}: {worst}");
        }
    }
}
