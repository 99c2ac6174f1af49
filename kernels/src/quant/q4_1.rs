//! Q4_1: 32 numbers of 4 bits, a scale and a minimum, 5 bits a number.

use super::{Block, BlockParts, F16Bytes, inverse, min_max, pack_nibbles};

/// | bytes | field |
/// | --- | --- |
/// | 0..2 | scale `d`, f16 |
/// | 2..4 | minimum `m`, f16 |
/// | 4..20 | `q`: byte `i` holds number `i` in its lower half and number `16 + i` in its upper half |
///
/// `x[i] = d q[i] + m`. Encoding takes `m = min x`, `d = (max x - m) / 15` and `q = floor((x - m) / d + 0.5)`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct BlockQ4_1 {
    /// Scale.
    pub d: F16Bytes,
    /// Minimum.
    pub m: F16Bytes,
    /// Pairs of numbers of 4 bits.
    pub q: [u8; 16],
}

const _: () = assert!(size_of::<BlockQ4_1>() == 20);

// SAFETY: `repr(C)`, bytes only.
unsafe impl Block<32> for BlockQ4_1 {
    fn decode(&self, out: &mut [f32; 32]) {
        let (d, m) = (self.d.to_f32(), self.m.to_f32());
        let (first, second) = out.split_at_mut(16);
        for ((first, second), &q) in first.iter_mut().zip(second).zip(&self.q) {
            *first = d * f32::from(q & 15) + m;
            *second = d * f32::from(q >> 4) + m;
        }
    }

    /// The minimum is added: `d_min` is its negative.
    fn take_apart(&self, parts: &mut BlockParts) {
        parts.set_nibbles(&self.q);
        (parts.d, parts.d_min) = (self.d.to_bits(), self.m.to_bits() ^ 0x8000);
    }

    fn encode(values: &[f32; 32]) -> Self {
        let (d, m, q) = quantize_from_min(values, 15);
        BlockQ4_1 { d, m, q: pack_nibbles(&q) }
    }
}

/// Scale, minimum and numbers of `0..=max_q` of a block that counts from its smallest value.
pub(super) fn quantize_from_min(values: &[f32; 32], max_q: u8) -> (F16Bytes, F16Bytes, [u8; 32]) {
    let (min, max) = min_max(values);
    // Limits of f16; with the first, the difference of any two finite numbers stays finite.
    let min = min.clamp(-65504.0, 65504.0);
    let d = ((max - min) / f32::from(max_q)).clamp(0.0, 65504.0);
    let inverse = inverse(d);
    let q = values.map(|value| (((value - min) * inverse + 0.5) as u8).min(max_q));
    (F16Bytes::nearest(d), F16Bytes::nearest(min), q)
}
