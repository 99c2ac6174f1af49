//! Q6_K: 256 numbers of 6 bits, groups of 16 with a scale of 8 bits; 6.5625 bits a number.

use super::scale_search::{Limits, search_scales};
use super::{Block, BlockParts, F16Bytes, bit_planes};

/// | bytes | field |
/// | --- | --- |
/// | 0..128 | lower four bits: two planes of 64 bytes; of the first, the lower halves are numbers 0 to 63, the upper 64 to 127 |
/// | 128..192 | upper two bits: two planes of 32 bytes; of the first, bits 0 and 1 are numbers 0 to 31, 2 and 3 the next, .. |
/// | 192..208 | scale of each group, signed |
/// | 208..210 | scale of the scales `d`, f16 |
///
/// `x[i] = (d scale[g]) (q[i] - 32)`, `g = i / 16`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct BlockQ6K {
    /// Lower four bits.
    pub q_low: [u8; 128],
    /// Upper two bits.
    pub q_high: [u8; 64],
    /// Scale of each group.
    pub scales: [i8; 16],
    /// Scale of the scales.
    pub d: F16Bytes,
}

const _: () = assert!(size_of::<BlockQ6K>() == 210);

impl BlockQ6K {
    /// All codes.
    fn codes(&self) -> [u8; 256] {
        let mut q = bit_planes::unpack::<4, 64>(&self.q_low);
        for (q, high) in q.iter_mut().zip(bit_planes::unpack::<2, 32>(&self.q_high)) {
            *q |= high << 4;
        }
        q
    }
}

// SAFETY: `repr(C)`, bytes only.
unsafe impl Block<256> for BlockQ6K {
    fn decode(&self, out: &mut [f32; 256]) {
        let (d, q) = (self.d.to_f32(), self.codes());
        let groups = out.as_chunks_mut::<16>().0.iter_mut().zip(q.as_chunks::<16>().0);
        for ((out, q), &scale) in groups.zip(&self.scales) {
            let scale = d * f32::from(scale);
            for (out, &q) in out.iter_mut().zip(q) {
                *out = scale * (f32::from(q) - 32.0);
            }
        }
    }

    fn take_apart(&self, parts: &mut BlockParts) {
        (parts.q, parts.scales, parts.d) = (self.codes(), self.scales, self.d.to_bits());
    }

    fn encode(values: &[f32; 256]) -> Self {
        let found = search_scales::<16, 16>(values, Limits { q: 32.0, scale: 128.0 });
        let q = found.q.map(|q| (q + 32) as u8);
        BlockQ6K {
            q_low: bit_planes::pack::<4, 64, 128>(&q),
            q_high: bit_planes::pack::<2, 32, 64>(&q.map(|q| q >> 4)),
            scales: found.scales,
            d: found.d,
        }
    }
}
