//! Element types of stored numbers, their sizes, and their conversion to f32.

use half::f16;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};

use crate::error::{Error, Result};
use crate::quant::{self, QuantType};

/// How the numbers of a matrix are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Encoding {
    /// One by one.
    Plain(DType),
    /// In blocks along a row.
    Blocks(QuantType),
}

impl Encoding {
    /// Name of the element type or of the block format.
    pub fn name(self) -> &'static str {
        match self {
            Encoding::Plain(dtype) => dtype.name(),
            Encoding::Blocks(quant_type) => quant_type.name(),
        }
    }
    /// Bytes of `num_values` numbers; refuses a count that is no whole number of blocks, or whose bytes no `usize` counts.
    pub fn size_bytes(self, num_values: usize) -> Result<usize> {
        match self {
            Encoding::Plain(dtype) => dtype.checked_size_bytes(num_values),
            Encoding::Blocks(quant_type) => quant_type.size_bytes(num_values),
        }
    }
    /// Reads numbers at any alignment as f32. Panics unless `bytes` holds as many as `out`.
    pub fn decode(self, bytes: &[u8], out: &mut [f32]) {
        match self {
            Encoding::Plain(dtype) => dtype.decode(bytes, out),
            Encoding::Blocks(quant_type) => quant::decode(quant_type, bytes, out).expect("the bytes of whole blocks"),
        }
    }
}

impl From<DType> for Encoding {
    fn from(dtype: DType) -> Encoding {
        Encoding::Plain(dtype)
    }
}

impl From<QuantType> for Encoding {
    fn from(quant_type: QuantType) -> Encoding {
        Encoding::Blocks(quant_type)
    }
}

/// How one number is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE 754 single precision.
    F32,
    /// IEEE 754 half precision.
    F16,
    /// bfloat16: the upper half of an f32.
    Bf16,
}

impl DType {
    /// Bytes of one element.
    pub fn size_bytes(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::Bf16 => 2,
        }
    }
    fn checked_size_bytes(self, num_values: usize) -> Result<usize> {
        let (operation, dimension, expected) = ("size_bytes", "number of values", "addressable");
        let size_bytes = num_values.checked_mul(self.size_bytes());
        size_bytes.ok_or(Error::InvalidSize { operation, dimension, value: num_values, expected })
    }
    /// Name as in a safetensors header.
    pub fn name(self) -> &'static str {
        match self {
            DType::F32 => "F32",
            DType::F16 => "F16",
            DType::Bf16 => "BF16",
        }
    }
    /// Reads little-endian numbers of this type, at any alignment, as f32 (exact). Panics unless `bytes` holds as many
    /// numbers as `out`.
    pub fn decode(self, bytes: &[u8], out: &mut [f32]) {
        assert_eq!(bytes.len(), out.len() * self.size_bytes(), "bytes of {} {} numbers", out.len(), self.name());
        match self {
            DType::F32 => decode_each(bytes, out, f32::from_le_bytes),
            DType::F16 => {
                // In pieces, because `half` looks at the CPU's features once per slice.
                let mut piece = [f16::ZERO; 64];
                for (bytes, out) in bytes.chunks(2 * piece.len()).zip(out.chunks_mut(piece.len())) {
                    let piece = &mut piece[..out.len()];
                    decode_each(bytes, piece, f16::from_le_bytes);
                    piece.convert_to_f32_slice(out);
                }
            }
            DType::Bf16 => {
                decode_each(bytes, out, |number| f32::from_bits(u32::from(u16::from_le_bytes(number)) << 16))
            }
        }
    }
}

fn decode_each<T, const BYTES: usize>(bytes: &[u8], out: &mut [T], decode: impl Fn([u8; BYTES]) -> T) {
    let (numbers, _) = bytes.as_chunks::<BYTES>();
    for (out, &number) in out.iter_mut().zip(numbers) {
        *out = decode(number);
    }
}

/// Bit patterns of `values` rounded to f16, to nearest even.
pub fn encode_f16(values: &[f32], out: &mut [u16]) {
    out.reinterpret_cast_mut::<f16>().convert_from_f32_slice(values);
}

/// Bit patterns of `values` rounded to bf16, to nearest even.
pub fn encode_bf16(values: &[f32], out: &mut [u16]) {
    assert_eq!(values.len(), out.len(), "numbers to round");
    for (out, &value) in out.iter_mut().zip(values) {
        *out = bf16_bits(value);
    }
}

/// As `half::bf16::from_f32`, without a branch, so that loops over it become vector code.
fn bf16_bits(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    // A NaN stays one, also when the bits that make it one are all in the lower half.
    let nan = bits >> 16 | 0x40;
    (if value.is_nan() { nan } else { rounded }) as u16
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    /// Own rounding to bf16 is that of the `half` crate for every upper half with lower halves around the rounding
    /// points; and what is encoded is decoded again.
    #[test]
    fn bf16_rounds_to_nearest_even() {
        for upper in 0..=u16::MAX {
            for lower in [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let value = f32::from_bits(u32::from(upper) << 16 | lower);
                assert_eq!(bf16_bits(value), bf16::from_f32(value).to_bits(), "{value:e}");
            }
        }
    }

    /// Every f16 and every bf16 that is a number survives decoding to f32 and encoding again.
    #[test]
    fn half_formats_round_trip() {
        let bits: Vec<u16> = (0..=u16::MAX).filter(|&bits| !f16::from_bits(bits).is_nan()).collect();
        let bytes: Vec<u8> = bits.iter().flat_map(|bits| bits.to_le_bytes()).collect();
        let (mut values, mut again) = (vec![0.0; bits.len()], vec![0; bits.len()]);
        DType::F16.decode(&bytes, &mut values);
        encode_f16(&values, &mut again);
        assert!(again == bits);
        DType::Bf16.decode(&bytes, &mut values);
        encode_bf16(&values, &mut again);
        let numbers = bits.iter().zip(&again).filter(|&(&bits, _)| !bf16::from_bits(bits).is_nan());
        assert!(numbers.clone().count() > 60_000 && numbers.clone().all(|(a, b)| a == b));
    }
}
