//! Q3_K: 256 numbers of 3 bits, groups of 16 with a scale of 6 bits; 3.4375 bits a number.

use super::scale_search::{Limits, search_scales};
use super::{Block, BlockParts, F16Bytes, bit_planes};

/// | bytes | field |
/// | --- | --- |
/// | 0..32 | third bits: bit `k` of byte `j` belongs to number `32 k + j` |
/// | 32..96 | lower two bits: two planes of 32 bytes; of the first, bits 0 and 1 are numbers 0 to 31, 2 and 3 the next, .. |
/// | 96..104 | lower four bits of the scales: byte `j` holds those of scale `j` in its lower half, of `8 + j` in its upper |
/// | 104..108 | upper two bits of the scales: those of scale `j` are bits `2 (j / 4)` and the next of byte `j mod 4` |
/// | 108..110 | scale of the scales `d`, f16 |
///
/// `x[i] = (d (scale[g] - 32)) (q[i] - 4)`, `g = i / 16`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct BlockQ3K {
    /// Third bits.
    pub q_high: [u8; 32],
    /// Lower two bits.
    pub q_low: [u8; 64],
    /// Lower four bits of the scales, each 32 too large.
    pub scales_low: [u8; 8],
    /// Their upper two bits.
    pub scales_high: [u8; 4],
    /// Scale of the scales.
    pub d: F16Bytes,
}

const _: () = assert!(size_of::<BlockQ3K>() == 110);

impl BlockQ3K {
    /// All codes.
    fn codes(&self) -> [u8; 256] {
        let mut q = bit_planes::unpack::<2, 32>(&self.q_low);
        for (q, high) in q.iter_mut().zip(bit_planes::unpack::<1, 32>(&self.q_high)) {
            *q |= high << 2;
        }
        q
    }
    /// Scale of group `g`.
    fn scale(&self, g: usize) -> i8 {
        let low = self.scales_low[g % 8] >> (4 * (g / 8)) & 15;
        let high = self.scales_high[g % 4] >> (2 * (g / 4)) & 3;
        (low | high << 4) as i8 - 32
    }
}

// SAFETY: `repr(C)`, bytes only.
unsafe impl Block<256> for BlockQ3K {
    fn decode(&self, out: &mut [f32; 256]) {
        let (d, q) = (self.d.to_f32(), self.codes());
        let groups = out.as_chunks_mut::<16>().0.iter_mut().zip(q.as_chunks::<16>().0);
        for (g, (out, q)) in groups.enumerate() {
            let scale = d * f32::from(self.scale(g));
            for (out, &q) in out.iter_mut().zip(q) {
                *out = scale * (f32::from(q) - 4.0);
            }
        }
    }

    fn take_apart(&self, parts: &mut BlockParts) {
        parts.q = self.codes();
        parts.scales = std::array::from_fn(|g| self.scale(g));
        parts.d = self.d.to_bits();
    }

    fn encode(values: &[f32; 256]) -> Self {
        let found = search_scales::<16, 16>(values, Limits { q: 4.0, scale: 32.0 });
        let q = found.q.map(|q| (q + 4) as u8);
        let scales = found.scales.map(|scale| (scale + 32) as u8);
        let high = |j: usize| (0..4).fold(0, |byte, k| byte | scales[4 * k + j] >> 4 << (2 * k));
        BlockQ3K {
            q_high: bit_planes::pack::<1, 32, 32>(&q.map(|q| q >> 2)),
            q_low: bit_planes::pack::<2, 32, 64>(&q),
            scales_low: std::array::from_fn(|j| scales[j] & 15 | scales[8 + j] << 4),
            scales_high: std::array::from_fn(high),
            d: found.d,
        }
    }
}
