//! Q5_0: 32 numbers of 5 bits and a scale, 5.5 bits a number.

use super::{Block, BlockParts, F16Bytes, inverse, pack_fifth_bits, pack_nibbles, signed_peak};

/// | bytes | field |
/// | --- | --- |
/// | 0..2 | scale `d`, f16 |
/// | 2..6 | the fifth bits: bit `i` of this little-endian number belongs to number `i` |
/// | 6..22 | lower four bits: byte `i` holds those of number `i` in its lower half, of `16 + i` in its upper half |
///
/// `x[i] = d (q[i] - 16)`. Encoding gives the number of largest magnitude the level -16: `d = peak / -16`, and
/// `q = floor(x / d + 16.5)`, at most 31.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct BlockQ5_0 {
    /// Scale.
    pub d: F16Bytes,
    /// Fifth bits.
    pub q_high: [u8; 4],
    /// Pairs of lower four bits of numbers that are 16 too large.
    pub q_low: [u8; 16],
}

const _: () = assert!(size_of::<BlockQ5_0>() == 22);

// SAFETY: `repr(C)`, bytes only.
unsafe impl Block<32> for BlockQ5_0 {
    fn decode(&self, out: &mut [f32; 32]) {
        let (d, q) = (self.d.to_f32(), unpack(&self.q_low, self.q_high));
        for (out, q) in out.iter_mut().zip(q) {
            *out = d * (f32::from(q) - 16.0);
        }
    }

    fn take_apart(&self, parts: &mut BlockParts) {
        parts.set_codes(unpack(&self.q_low, self.q_high));
        parts.d = self.d.to_bits();
    }

    fn encode(values: &[f32; 32]) -> Self {
        let d = (signed_peak(values) / -16.0).clamp(-65504.0, 65504.0);
        let inverse = inverse(d);
        let q = values.map(|value| ((value * inverse + 16.5) as u8).min(31));
        BlockQ5_0 { d: F16Bytes::nearest(d), q_high: pack_fifth_bits(&q), q_low: pack_nibbles(&q) }
    }
}

/// The 32 numbers of 5 bits.
pub(super) fn unpack(q_low: &[u8; 16], q_high: [u8; 4]) -> [u8; 32] {
    let mut q = [0; 32];
    for (i, &byte) in q_low.iter().enumerate() {
        (q[i], q[16 + i]) = (byte & 15, byte >> 4);
    }
    for (q, high) in q.as_chunks_mut::<8>().0.iter_mut().zip(q_high) {
        for (bit, q) in q.iter_mut().enumerate() {
            // Eight fixed masks, not eight different shifts: vectors of bytes have no such shift.
            *q |= if high & (1 << bit) != 0 { 16 } else { 0 };
        }
    }
    q
}
