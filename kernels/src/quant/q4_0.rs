//! Q4_0: 32 numbers of 4 bits and a scale, 4.5 bits a number.

use super::{Block, BlockParts, F16Bytes, inverse, pack_nibbles, signed_peak};

/// | bytes | field |
/// | --- | --- |
/// | 0..2 | scale `d`, f16 |
/// | 2..18 | `q`: byte `i` holds number `i` in its lower half and number `16 + i` in its upper half |
///
/// `x[i] = d (q[i] - 8)`. Encoding gives the number of largest magnitude the level -8, which has no positive twin:
/// `d = peak / -8`, and `q = floor(x / d + 8.5)`, at most 15.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct BlockQ4_0 {
    /// Scale.
    pub d: F16Bytes,
    /// Pairs of numbers of 4 bits, each 8 too large.
    pub q: [u8; 16],
}

const _: () = assert!(size_of::<BlockQ4_0>() == 18);

// SAFETY: `repr(C)`, bytes only.
unsafe impl Block<32> for BlockQ4_0 {
    fn decode(&self, out: &mut [f32; 32]) {
        let d = self.d.to_f32();
        let (first, second) = out.split_at_mut(16);
        for ((first, second), &q) in first.iter_mut().zip(second).zip(&self.q) {
            *first = d * (f32::from(q & 15) - 8.0);
            *second = d * (f32::from(q >> 4) - 8.0);
        }
    }

    fn take_apart(&self, parts: &mut BlockParts) {
        parts.set_nibbles(&self.q);
        parts.d = self.d.to_bits();
    }

    fn encode(values: &[f32; 32]) -> Self {
        let d = (signed_peak(values) / -8.0).clamp(-65504.0, 65504.0);
        let inverse = inverse(d);
        // A negative sum becomes 0 in the conversion.
        let q = values.map(|value| ((value * inverse + 8.5) as u8).min(15));
        BlockQ4_0 { d: F16Bytes::nearest(d), q: pack_nibbles(&q) }
    }
}
