//! The numbers by which GGUF files name the types of their tensors: those that this engine reads, and the names of the
//! others, so that a file is refused with the word that its user knows.

#![deny(clippy::arithmetic_side_effects, clippy::indexing_slicing)]

use ::safetensors::Dtype;

use crate::loader::stored::{BlockType, StoredDtype};

/// The type of the number `id`; for an unknown one its name, if it has one.
pub(super) fn tensor_type(id: u32) -> Result<StoredDtype, String> {
    use StoredDtype::{Blocks, Plain};
    Ok(match id {
        0 => Plain(Dtype::F32),
        1 => Plain(Dtype::F16),
        2 => Blocks(BlockType::Q4_0),
        3 => Blocks(BlockType::Q4_1),
        6 => Blocks(BlockType::Q5_0),
        7 => Blocks(BlockType::Q5_1),
        8 => Blocks(BlockType::Q8_0),
        10 => Blocks(BlockType::Q2_K),
        11 => Blocks(BlockType::Q3_K),
        12 => Blocks(BlockType::Q4_K),
        13 => Blocks(BlockType::Q5_K),
        14 => Blocks(BlockType::Q6_K),
        20 => Blocks(BlockType::IQ4_NL),
        24 => Plain(Dtype::I8),
        25 => Plain(Dtype::I16),
        26 => Plain(Dtype::I32),
        27 => Plain(Dtype::I64),
        28 => Plain(Dtype::F64),
        30 => Plain(Dtype::BF16),
        39 => Blocks(BlockType::MXFP4),
        other => return Err(unread_name(other).map_or_else(|| format!("number {other}"), str::to_string)),
    })
}

fn unread_name(id: u32) -> Option<&'static str> {
    Some(match id {
        4 => "Q4_2",
        5 => "Q4_3",
        9 => "Q8_1",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        29 => "IQ1_M",
        31 => "Q4_0_4_4",
        32 => "Q4_0_4_8",
        33 => "Q4_0_8_8",
        34 => "TQ1_0",
        35 => "TQ2_0",
        36 => "IQ4_NL_4_4",
        37 => "IQ4_NL_4_8",
        38 => "IQ4_NL_8_8",
        _ => return None,
    })
}

/// Numbers in the smallest unit of a type, and its bytes.
pub(super) fn unit(dtype: StoredDtype) -> (u64, u64) {
    let widened = |size: usize| u64::try_from(size).unwrap_or(u64::MAX);
    match dtype {
        StoredDtype::Plain(dtype) => (1, widened(dtype.bitsize()).div_euclid(8)),
        StoredDtype::Blocks(blocks) => {
            let (elements, bytes) = blocks.block();
            (widened(elements), widened(bytes))
        }
    }
}
