//! Q5_K: 256 numbers of 5 bits, groups of 32 with scale and min of 6 bits each; 5.5 bits a number.

use super::q4_k::decode_groups;
use super::scale_search::{Limits, search_scales_and_mins};
use super::{Block, BlockParts, F16Bytes, PackedScales, bit_planes};

/// | bytes | field |
/// | --- | --- |
/// | 0..2 | scale of the scales `d`, f16 |
/// | 2..4 | scale of the mins `d_min`, f16 |
/// | 4..16 | eight scales and eight mins: [`PackedScales`] |
/// | 16..48 | fifth bits: bit `k` of byte `j` belongs to number `32 k + j` |
/// | 48..176 | lower four bits, as in Q4_K |
///
/// `x[i] = (d scale[g]) q[i] - (d_min min[g])`, `g = i / 32`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct BlockQ5K {
    /// Scale of the scales.
    pub d: F16Bytes,
    /// Scale of the mins.
    pub d_min: F16Bytes,
    /// Scale and min of each group.
    pub scales: PackedScales,
    /// Fifth bits.
    pub q_high: [u8; 32],
    /// Lower four bits.
    pub q_low: [u8; 128],
}

const _: () = assert!(size_of::<BlockQ5K>() == 176);

impl BlockQ5K {
    /// All codes.
    fn codes(&self) -> [u8; 256] {
        let mut q = bit_planes::unpack::<4, 32>(&self.q_low);
        for (q, high) in q.iter_mut().zip(bit_planes::unpack::<1, 32>(&self.q_high)) {
            *q |= high << 4;
        }
        q
    }
}

// SAFETY: `repr(C)`, bytes only.
unsafe impl Block<256> for BlockQ5K {
    fn decode(&self, out: &mut [f32; 256]) {
        decode_groups(self.d, self.d_min, &self.scales, &self.codes(), out);
    }
    fn take_apart(&self, parts: &mut BlockParts) {
        parts.q = self.codes();
        parts.set_group_scales(&self.scales);
        (parts.d, parts.d_min) = (self.d.to_bits(), self.d_min.to_bits());
    }

    fn encode(values: &[f32; 256]) -> Self {
        let found = search_scales_and_mins::<8, 32>(values, Limits { q: 31.0, scale: 63.0 });
        BlockQ5K {
            d: found.d,
            d_min: found.d_min,
            scales: PackedScales::pack(&found.scales, &found.mins),
            q_high: bit_planes::pack::<1, 32, 32>(&found.q.map(|q| q >> 4)),
            q_low: bit_planes::pack::<4, 32, 128>(&found.q),
        }
    }
}
