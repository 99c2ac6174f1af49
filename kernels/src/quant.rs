//! The quantized block formats of GGUF files: what each stores, byte by byte, and its scalar conversion from and to f32.
//!
//! A tensor of such a type is a run of blocks of 32 or 256 numbers along its innermost axis. A block holds small integers
//! `q` and what turns them into numbers again: one scale `d` (`x = d q`), or a scale and a minimum (`x = d q + m`), or, in
//! the "K" formats, a scale for each group of 16 or 32 numbers that is itself a small integer times the block's `d`.
//!
//! Decoding is exact in a sense: every format fixes which products and sums of f32 a number is, so any two right decoders
//! agree in every bit. Encoding is a choice. The formats of 32 take the one that their format's reference takes, so that a
//! model quantized here equals one quantized elsewhere; the K formats and IQ4_NL search for the least squared error
//! (`scale_search.rs`).
//!
//! Deliberately not here: products with quantized weights. Those repack blocks for their instruction set; this is what
//! they must agree with.

mod bit_planes;
mod iq4_nl;
mod mxfp4;
mod parts;
mod q2_k;
mod q3_k;
mod q4_0;
mod q4_1;
mod q4_k;
mod q5_0;
mod q5_1;
mod q5_k;
mod q6_k;
mod q8_0;
mod scale_search;

use half::f16;

pub use self::iq4_nl::BlockIq4Nl;
pub(crate) use self::iq4_nl::LEVELS as IQ4_NL_LEVELS;
pub use self::mxfp4::BlockMxfp4;
pub(crate) use self::mxfp4::LEVELS as MXFP4_LEVELS;
pub(crate) use self::parts::BlockParts;
pub use self::q2_k::BlockQ2K;
pub use self::q3_k::BlockQ3K;
pub use self::q4_0::BlockQ4_0;
pub use self::q4_1::BlockQ4_1;
pub use self::q4_k::{BlockQ4K, PackedScales};
pub use self::q5_0::BlockQ5_0;
pub use self::q5_1::BlockQ5_1;
pub use self::q5_k::BlockQ5K;
pub use self::q6_k::BlockQ6K;
pub use self::q8_0::BlockQ8_0;
use crate::error::{Error, Result};

/// A block format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types, reason = "the names are the formats' own")]
pub enum QuantType {
    /// 32 numbers of 8 bits and a scale.
    Q8_0,
    /// 32 numbers of 4 bits and a scale.
    Q4_0,
    /// 32 numbers of 4 bits, a scale and a minimum.
    Q4_1,
    /// 32 numbers of 5 bits and a scale.
    Q5_0,
    /// 32 numbers of 5 bits, a scale and a minimum.
    Q5_1,
    /// 256 numbers of 2 bits; groups of 16 with a scale and a minimum of 4 bits each.
    Q2_K,
    /// 256 numbers of 3 bits; groups of 16 with a scale of 6 bits.
    Q3_K,
    /// 256 numbers of 4 bits; groups of 32 with a scale and a minimum of 6 bits each.
    Q4_K,
    /// 256 numbers of 5 bits; groups of 32 with a scale and a minimum of 6 bits each.
    Q5_K,
    /// 256 numbers of 6 bits; groups of 16 with a scale of 8 bits.
    Q6_K,
    /// 32 indices of 4 bits into a table of unevenly spaced levels, and a scale.
    IQ4_NL,
    /// 32 floats of 4 bits (1 sign, 2 exponent, 1 mantissa) and a power of two.
    MXFP4,
}

impl QuantType {
    /// Every format that is known here.
    pub const ALL: [QuantType; 12] = [
        QuantType::Q8_0,
        QuantType::Q4_0,
        QuantType::Q4_1,
        QuantType::Q5_0,
        QuantType::Q5_1,
        QuantType::Q2_K,
        QuantType::Q3_K,
        QuantType::Q4_K,
        QuantType::Q5_K,
        QuantType::Q6_K,
        QuantType::IQ4_NL,
        QuantType::MXFP4,
    ];

    /// Name as options and file names write it.
    pub fn name(self) -> &'static str {
        self.format().name
    }
    /// The format of that name, in any case.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|quant_type| quant_type.name().eq_ignore_ascii_case(name))
    }
    /// Number of the type in a GGUF file.
    pub fn ggml_id(self) -> u32 {
        self.format().ggml_id
    }
    /// The format of that number in a GGUF file.
    pub fn from_ggml_id(ggml_id: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|quant_type| quant_type.ggml_id() == ggml_id)
    }
    /// Numbers in one block.
    pub fn block_values(self) -> usize {
        self.format().block_values
    }
    /// Bytes of one block.
    pub fn block_bytes(self) -> usize {
        self.format().block_bytes
    }
    /// Bytes of `num_values` numbers; refuses a count that is no whole number of blocks, and one whose bytes no `usize`
    /// can count.
    pub fn size_bytes(self, num_values: usize) -> Result<usize> {
        let (operation, dimension, value) = ("quant::size_bytes", "number of values", num_values);
        if !num_values.is_multiple_of(self.block_values()) {
            let expected = if self.block_values() == 32 { "a multiple of 32" } else { "a multiple of 256" };
            return Err(Error::InvalidSize { operation, dimension, value, expected });
        }
        let expected = "addressable when quantized";
        let size_bytes = (num_values / self.block_values()).checked_mul(self.block_bytes());
        size_bytes.ok_or(Error::InvalidSize { operation, dimension, value, expected })
    }

    /// The one table of what differs from format to format.
    fn format(self) -> Format {
        match self {
            QuantType::Q8_0 => Format::of::<BlockQ8_0, 32>("q8_0", 8),
            QuantType::Q4_0 => Format::of::<BlockQ4_0, 32>("q4_0", 2),
            QuantType::Q4_1 => Format::of::<BlockQ4_1, 32>("q4_1", 3),
            QuantType::Q5_0 => Format::of::<BlockQ5_0, 32>("q5_0", 6),
            QuantType::Q5_1 => Format::of::<BlockQ5_1, 32>("q5_1", 7),
            QuantType::Q2_K => Format::of::<BlockQ2K, 256>("q2_k", 10),
            QuantType::Q3_K => Format::of::<BlockQ3K, 256>("q3_k", 11),
            QuantType::Q4_K => Format::of::<BlockQ4K, 256>("q4_k", 12),
            QuantType::Q5_K => Format::of::<BlockQ5K, 256>("q5_k", 13),
            QuantType::Q6_K => Format::of::<BlockQ6K, 256>("q6_k", 14),
            QuantType::IQ4_NL => Format::of::<BlockIq4Nl, 32>("iq4_nl", 20),
            QuantType::MXFP4 => Format::of::<BlockMxfp4, 32>("mxfp4", 39),
        }
    }
}

/// Numbers of the blocks in `bytes`, at any alignment, into `out`, which must hold exactly as many.
///
/// Any bytes decode: a block whose scale is infinite or NaN gives infinities and NaNs.
pub fn decode(quant_type: QuantType, bytes: &[u8], out: &mut [f32]) -> Result<()> {
    check_size("quant::decode", quant_type, out.len(), bytes.len())?;
    (quant_type.format().decode)(bytes, out);
    Ok(())
}

/// Blocks of `values` into `bytes`, which must hold exactly as many.
///
/// Every finite number can be stored: one beyond what the format's f16 scales reach becomes the nearest that they do. A
/// NaN or an infinity is refused before anything is written.
pub fn encode(quant_type: QuantType, values: &[f32], bytes: &mut [u8]) -> Result<()> {
    check_size("quant::encode", quant_type, values.len(), bytes.len())?;
    if let Some(value_idx) = values.iter().position(|value| !value.is_finite()) {
        return Err(Error::NonFiniteValue { operation: "quant::encode", value_idx });
    }
    (quant_type.format().encode)(values, bytes);
    Ok(())
}

/// What takes whole blocks of a format apart, as many as there are parts for; parts without a block keep what they held. Asked
/// for once, outside of loops over blocks.
pub(crate) fn taking_apart(quant_type: QuantType) -> fn(&[u8], &mut [BlockParts]) {
    quant_type.format().take_apart
}

fn check_size(operation: &'static str, quant_type: QuantType, num_values: usize, actual: usize) -> Result<()> {
    let expected = quant_type.size_bytes(num_values)?;
    match actual == expected {
        true => Ok(()),
        false => Err(Error::SizeMismatch { operation, dimension: "bytes of blocks", expected, actual }),
    }
}

/// A block of `VALUES` numbers as it lies in a file.
///
/// # Safety
///
/// The type is `repr(C)` and consists of bytes: its alignment is 1, it has no padding, and any bytes are a value of it.
pub(crate) unsafe trait Block<const VALUES: usize>: Sized {
    /// The numbers that the block stands for.
    fn decode(&self, out: &mut [f32; VALUES]);
    /// The integers and scales that they are made of.
    fn take_apart(&self, parts: &mut BlockParts);
    /// The block that stands for finite `values`, as nearly as the format's rule or search says.
    fn encode(values: &[f32; VALUES]) -> Self;
}

/// One row of the table of formats.
struct Format {
    name: &'static str,
    ggml_id: u32,
    block_values: usize,
    block_bytes: usize,
    decode: fn(&[u8], &mut [f32]),
    encode: fn(&[f32], &mut [u8]),
    take_apart: fn(&[u8], &mut [BlockParts]),
}

impl Format {
    fn of<B: Block<VALUES>, const VALUES: usize>(name: &'static str, ggml_id: u32) -> Self {
        Format {
            name,
            ggml_id,
            block_values: VALUES,
            block_bytes: size_of::<B>(),
            decode: |bytes, out| {
                for (block, out) in blocks_of::<B, VALUES>(bytes).iter().zip(out.as_chunks_mut().0) {
                    block.decode(out);
                }
            },
            encode: |values, bytes| {
                for (block, values) in blocks_of_mut::<B, VALUES>(bytes).iter_mut().zip(values.as_chunks().0) {
                    *block = B::encode(values);
                }
            },
            take_apart: |bytes, parts| {
                for (block, parts) in blocks_of::<B, VALUES>(bytes).iter().zip(parts) {
                    block.take_apart(parts);
                }
            },
        }
    }
}

/// The whole blocks in `bytes`, where they lie.
pub(crate) fn blocks_of<B: Block<VALUES>, const VALUES: usize>(bytes: &[u8]) -> &[B] {
    const { assert!(align_of::<B>() == 1) };
    // SAFETY: `Block` promises that any bytes are a `B`, which may lie anywhere; the length is rounded down.
    unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast(), bytes.len() / size_of::<B>()) }
}

fn blocks_of_mut<B: Block<VALUES>, const VALUES: usize>(bytes: &mut [u8]) -> &mut [B] {
    const { assert!(align_of::<B>() == 1) };
    // SAFETY: as above; a `B` has no padding, so whatever is written leaves initialised bytes.
    unsafe { std::slice::from_raw_parts_mut(bytes.as_mut_ptr().cast(), bytes.len() / size_of::<B>()) }
}

/// An f16 as it lies in a file: two bytes, the lower first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub struct F16Bytes([u8; 2]);

impl F16Bytes {
    fn to_bits(self) -> u16 {
        u16::from_le_bytes(self.0)
    }
    /// Exactly this number. With branches, not with a question to the CPU, so that it is inlined into the loop over blocks.
    pub fn to_f32(self) -> f32 {
        f16::from_le_bytes(self.0).to_f32_const()
    }
    /// The nearest f16, ties to even. What is beyond the largest becomes the largest: an infinite scale would make NaN of
    /// the block's zeros.
    fn nearest(value: f32) -> Self {
        let largest = f16::MAX.to_f32_const();
        F16Bytes(f16::from_f32(value.clamp(-largest, largest)).to_le_bytes())
    }
}

/// `1 / d`, or 0 where that is no number: such a `d` is zero as f16, too.
fn inverse(d: f32) -> f32 {
    let inverse = 1.0 / d;
    if inverse.is_finite() { inverse } else { 0.0 }
}

/// Two numbers of 4 bits a byte: the lower halves are the first `BYTES` numbers, the upper halves the rest.
fn pack_nibbles<const BYTES: usize>(q: &[u8]) -> [u8; BYTES] {
    std::array::from_fn(|i| (q[i] & 15) | q[BYTES + i] << 4)
}

/// Bit 4 of each of 32 numbers, number `i` at bit `i`.
fn pack_fifth_bits(q: &[u8; 32]) -> [u8; 4] {
    let bits = q.iter().enumerate().fold(0, |bits, (i, &q)| bits | u32::from(q >> 4 & 1) << i);
    bits.to_le_bytes()
}

/// The value of largest magnitude, with its sign; the first of several.
fn signed_peak(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |peak: f32, &value| if value.abs() > peak.abs() { value } else { peak })
}

/// Smallest and largest value.
fn min_max(values: &[f32]) -> (f32, f32) {
    let wider = |(min, max), &value| (if value < min { value } else { min }, if value > max { value } else { max });
    values.iter().fold((values[0], values[0]), wider)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every f16 is read as the number that it is, and written back with the same bits; infinities as the largest.
    #[test]
    fn scales_are_read_exactly() {
        for bits in 0..=u16::MAX {
            let (bytes, f) = (F16Bytes(bits.to_le_bytes()), f16::from_bits(bits));
            assert!(bytes.to_f32() == f.to_f32() || f.is_nan() && bytes.to_f32().is_nan(), "{bits:04x}");
            match f.is_finite() {
                true => assert_eq!(F16Bytes::nearest(bytes.to_f32()), bytes),
                false if !f.is_nan() => assert_eq!(F16Bytes::nearest(f.to_f32()).to_f32().abs(), 65504.0),
                false => {}
            }
        }
    }
}
