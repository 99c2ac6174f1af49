//! The numbers by which GGUF files name the types of their tensors: those that this engine reads, and the names of the
//! others, so that a file is refused with the word that its user knows.

#![deny(clippy::arithmetic_side_effects, clippy::indexing_slicing)]

use ::safetensors::Dtype;

use crate::loader::stored::StoredDtype;
use crate::tensor::QuantType;

/// The type of the number `id`; for an unknown one its name, if it has one.
pub(super) fn tensor_type(id: u32) -> Result<StoredDtype, String> {
    let plain = match id {
        0 => Dtype::F32,
        1 => Dtype::F16,
        24 => Dtype::I8,
        25 => Dtype::I16,
        26 => Dtype::I32,
        27 => Dtype::I64,
        28 => Dtype::F64,
        30 => Dtype::BF16,
        other => {
            let blocks = QuantType::from_ggml_id(other).map(StoredDtype::Blocks);
            return blocks.ok_or_else(|| unread_name(other).map_or(format!("number {other}"), str::to_string));
        }
    };
    Ok(StoredDtype::Plain(plain))
}

/// The number of a type that a file can be written with.
pub(super) fn type_id(dtype: StoredDtype) -> Option<u32> {
    match dtype {
        StoredDtype::Plain(Dtype::F32) => Some(0),
        StoredDtype::Plain(Dtype::F16) => Some(1),
        StoredDtype::Plain(Dtype::BF16) => Some(30),
        StoredDtype::Plain(_) => None,
        StoredDtype::Blocks(blocks) => Some(blocks.ggml_id()),
    }
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
        StoredDtype::Blocks(blocks) => (widened(blocks.block_values()), widened(blocks.block_bytes())),
    }
}
