//! Tensors as a weights file of any format holds them: where they lie, how their numbers are written, in which order
//! their rows are; and the way from those bytes to a [`Tensor`].

#![deny(clippy::arithmetic_side_effects, clippy::indexing_slicing)]

use std::fmt;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

use ::safetensors::Dtype;

use crate::error::{Error, Result};
use crate::tensor::{DType, Encoding, QuantType, Tensor};

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
    /// What a tensor of this type can be read as; `None`: no model can use it.
    pub fn encoding(self) -> Option<Encoding> {
        match self {
            StoredDtype::Plain(Dtype::F32) => Some(DType::F32.into()),
            StoredDtype::Plain(Dtype::F16) => Some(DType::F16.into()),
            StoredDtype::Plain(Dtype::BF16) => Some(DType::Bf16.into()),
            StoredDtype::Plain(_) => None,
            StoredDtype::Blocks(blocks) => Some(blocks.into()),
        }
    }
}

/// Makes a tensor of `data`, the bytes of `stored`.
pub(super) fn to_tensor(stored: &StoredTensor, data: Vec<u8>) -> Result<Tensor> {
    let unsupported = || Error::TensorDtype { name: stored.name.clone(), dtype: stored.dtype.to_string() };
    let encoding = stored.dtype.encoding().ok_or_else(unsupported)?;
    if stored.row_order != RowOrder::AsIs && stored.shape.len() < 2 && matches!(stored.dtype, StoredDtype::Blocks(_)) {
        return Err(unsupported());
    }
    // Rows of a matrix are whole blocks, so they can be moved as they are.
    let data = match stored.row_order {
        RowOrder::AsIs => data,
        RowOrder::InterleavedHeads(heads) => {
            halves_of_heads(&data, stored.shape.first().copied(), heads).ok_or(Error::OutOfMemory {
                purpose: "reordering the rows of a tensor",
                needed_bytes: stored.num_bytes,
                available_bytes: 0,
            })?
        }
    };
    Ok(Tensor { name: stored.name.clone(), shape: stored.shape.clone(), encoding, data })
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
}
