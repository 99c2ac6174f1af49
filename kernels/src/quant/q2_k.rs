//! Q2_K: 256 numbers of 2 bits, groups of 16 with scale and min of 4 bits each; 2.625 bits a number.

use super::scale_search::{Limits, search_scales_and_mins};
use super::{Block, BlockParts, F16Bytes, bit_planes};

/// | bytes | field |
/// | --- | --- |
/// | 0..16 | byte `g`: scale of group `g` (numbers `16 g..16 g + 16`) in the lower half, its min in the upper half |
/// | 16..80 | `q`: two planes of 32 bytes; of the first, bits 0 and 1 are numbers 0 to 31, bits 2 and 3 the next 32, .. |
/// | 80..82 | scale of the scales `d`, f16 |
/// | 82..84 | scale of the mins `d_min`, f16 |
///
/// `x[i] = (d scale[g]) q[i] - (d_min min[g])`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct BlockQ2K {
    /// Scale and min of each group.
    pub scales_and_mins: [u8; 16],
    /// Numbers of 2 bits.
    pub q: [u8; 64],
    /// Scale of the scales.
    pub d: F16Bytes,
    /// Scale of the mins.
    pub d_min: F16Bytes,
}

const _: () = assert!(size_of::<BlockQ2K>() == 84);

// SAFETY: `repr(C)`, bytes only.
unsafe impl Block<256> for BlockQ2K {
    fn decode(&self, out: &mut [f32; 256]) {
        let (d, d_min, q) = (self.d.to_f32(), self.d_min.to_f32(), bit_planes::unpack::<2, 32>(&self.q));
        let groups = out.as_chunks_mut::<16>().0.iter_mut().zip(q.as_chunks::<16>().0);
        for ((out, q), &packed) in groups.zip(&self.scales_and_mins) {
            let (scale, min) = (d * f32::from(packed & 15), d_min * f32::from(packed >> 4));
            for (out, &q) in out.iter_mut().zip(q) {
                *out = scale * f32::from(q) - min;
            }
        }
    }

    fn take_apart(&self, parts: &mut BlockParts) {
        parts.q = bit_planes::unpack::<2, 32>(&self.q);
        parts.scales = self.scales_and_mins.map(|packed| (packed & 15) as i8);
        parts.mins = self.scales_and_mins.map(|packed| packed >> 4);
        (parts.d, parts.d_min) = (self.d.to_bits(), self.d_min.to_bits());
    }

    fn encode(values: &[f32; 256]) -> Self {
        let found = search_scales_and_mins::<16, 16>(values, Limits { q: 3.0, scale: 15.0 });
        BlockQ2K {
            scales_and_mins: std::array::from_fn(|g| found.scales[g] | found.mins[g] << 4),
            q: bit_planes::pack::<2, 32, 64>(&found.q),
            d: found.d,
            d_min: found.d_min,
        }
    }
}
