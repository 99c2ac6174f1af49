//! Tensors as a weights file of any format holds them: where they lie, how their numbers are written, in which order
//! their rows are; and the way from those bytes to a plain [`Tensor`].
//!
//! Formats of blocks are those of ggml: a block of consecutive numbers shares scales and is the smallest unit that can
//! be decoded. Sizes are facts of the format.

#![deny(clippy::arithmetic_side_effects, clippy::indexing_slicing)]

use std::fmt;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

use ::safetensors::Dtype;

use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};

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
    Blocks(BlockType),
}

impl fmt::Display for StoredDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StoredDtype::Plain(dtype) => write!(f, "{dtype}"),
            StoredDtype::Blocks(blocks) => f.write_str(blocks.name()),
        }
    }
}

/// Formats of blocks whose size is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "named as in the format")]
#[allow(non_camel_case_types, reason = "named as in the format")]
pub enum BlockType {
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    IQ4_NL,
    MXFP4,
}

impl BlockType {
    /// As the format calls it.
    pub fn name(self) -> &'static str {
        match self {
            BlockType::Q4_0 => "Q4_0",
            BlockType::Q4_1 => "Q4_1",
            BlockType::Q5_0 => "Q5_0",
            BlockType::Q5_1 => "Q5_1",
            BlockType::Q8_0 => "Q8_0",
            BlockType::Q2_K => "Q2_K",
            BlockType::Q3_K => "Q3_K",
            BlockType::Q4_K => "Q4_K",
            BlockType::Q5_K => "Q5_K",
            BlockType::Q6_K => "Q6_K",
            BlockType::IQ4_NL => "IQ4_NL",
            BlockType::MXFP4 => "MXFP4",
        }
    }

    /// Numbers in a block, and its bytes.
    pub fn block(self) -> (usize, usize) {
        match self {
            BlockType::Q4_0 | BlockType::IQ4_NL => (32, 18),
            BlockType::Q4_1 => (32, 20),
            BlockType::Q5_0 => (32, 22),
            BlockType::Q5_1 => (32, 24),
            BlockType::Q8_0 => (32, 34),
            BlockType::MXFP4 => (32, 17),
            BlockType::Q2_K => (256, 84),
            BlockType::Q3_K => (256, 110),
            BlockType::Q4_K => (256, 144),
            BlockType::Q5_K => (256, 176),
            BlockType::Q6_K => (256, 210),
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
    /// The type that the numbers have as a plain tensor.
    fn plain(self) -> Option<DType> {
        match self {
            StoredDtype::Plain(Dtype::F32) => Some(DType::F32),
            StoredDtype::Plain(Dtype::F16) => Some(DType::F16),
            StoredDtype::Plain(Dtype::BF16) => Some(DType::Bf16),
            StoredDtype::Plain(_) | StoredDtype::Blocks(_) => None,
        }
    }

    /// Whether [`to_plain`] can be asked for.
    pub(super) fn can_be_plain(self) -> bool {
        self.plain().is_some()
    }
}

/// Makes a plain tensor of `data`, the bytes of `stored`.
pub(super) fn to_plain(stored: &StoredTensor, data: Vec<u8>) -> Result<Tensor> {
    let no_memory = || Error::OutOfMemory {
        purpose: "reordering the rows of a tensor",
        needed_bytes: stored.num_bytes,
        available_bytes: 0,
    };
    let dtype = stored
        .dtype
        .plain()
        .ok_or_else(|| Error::TensorDtype { name: stored.name.clone(), dtype: stored.dtype.to_string() })?;
    let data = match stored.row_order {
        RowOrder::AsIs => data,
        RowOrder::InterleavedHeads(heads) => {
            halves_of_heads(&data, stored.shape.first().copied(), heads).ok_or_else(no_memory)?
        }
    };
    Ok(Tensor { name: stored.name.clone(), shape: stored.shape.clone(), dtype, data })
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

    /// The sizes of blocks are whole numbers of bytes for scales plus the bits that the name says.
    #[test]
    fn blocks_hold_what_their_names_say() {
        for (block, bits) in [(BlockType::Q4_0, 4), (BlockType::Q5_1, 5), (BlockType::Q8_0, 8), (BlockType::Q6_K, 6)] {
            let (elements, bytes) = block.block();
            assert!(bytes * 8 > elements * bits && bytes * 8 < elements * (bits + 2), "{}", block.name());
        }
    }
}
