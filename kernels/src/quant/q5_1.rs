//! Q5_1: 32 numbers of 5 bits, a scale and a minimum, 6 bits a number.

use super::q4_1::quantize_from_min;
use super::q5_0::unpack;
use super::{Block, BlockParts, F16Bytes, pack_fifth_bits, pack_nibbles};

/// | bytes | field |
/// | --- | --- |
/// | 0..2 | scale `d`, f16 |
/// | 2..4 | minimum `m`, f16 |
/// | 4..8 | the fifth bits: bit `i` of this little-endian number belongs to number `i` |
/// | 8..24 | lower four bits: byte `i` holds those of number `i` in its lower half, of `16 + i` in its upper half |
///
/// `x[i] = d q[i] + m`. Encoding takes `m = min x`, `d = (max x - m) / 31` and `q = floor((x - m) / d + 0.5)`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct BlockQ5_1 {
    /// Scale.
    pub d: F16Bytes,
    /// Minimum.
    pub m: F16Bytes,
    /// Fifth bits.
    pub q_high: [u8; 4],
    /// Pairs of lower four bits.
    pub q_low: [u8; 16],
}

const _: () = assert!(size_of::<BlockQ5_1>() == 24);

// SAFETY: `repr(C)`, bytes only.
unsafe impl Block<32> for BlockQ5_1 {
    fn decode(&self, out: &mut [f32; 32]) {
        let (d, m, q) = (self.d.to_f32(), self.m.to_f32(), unpack(&self.q_low, self.q_high));
        for (out, q) in out.iter_mut().zip(q) {
            *out = d * f32::from(q) + m;
        }
    }

    /// The minimum is added: `d_min` is its negative.
    fn take_apart(&self, parts: &mut BlockParts) {
        parts.set_codes(unpack(&self.q_low, self.q_high));
        (parts.d, parts.d_min) = (self.d.to_bits(), self.m.to_bits() ^ 0x8000);
    }

    fn encode(values: &[f32; 32]) -> Self {
        let (d, m, q) = quantize_from_min(values, 31);
        BlockQ5_1 { d, m, q_high: pack_fifth_bits(&q), q_low: pack_nibbles(&q) }
    }
}
