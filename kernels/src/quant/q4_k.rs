//! Q4_K: 256 numbers of 4 bits, groups of 32 with scale and min of 6 bits each; 4.5 bits a number.

use super::scale_search::{Limits, search_scales_and_mins};
use super::{Block, BlockParts, F16Bytes, bit_planes};

/// | bytes | field |
/// | --- | --- |
/// | 0..2 | scale of the scales `d`, f16 |
/// | 2..4 | scale of the mins `d_min`, f16 |
/// | 4..16 | eight scales and eight mins: [`PackedScales`] |
/// | 16..144 | `q`: four planes of 32 bytes; of the first, the lower halves are numbers 0 to 31, the upper 32 to 63, .. |
///
/// `x[i] = (d scale[g]) q[i] - (d_min min[g])`, `g = i / 32`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct BlockQ4K {
    /// Scale of the scales.
    pub d: F16Bytes,
    /// Scale of the mins.
    pub d_min: F16Bytes,
    /// Scale and min of each group.
    pub scales: PackedScales,
    /// Numbers of 4 bits.
    pub q: [u8; 128],
}

const _: () = assert!(size_of::<BlockQ4K>() == 144);

/// Eight scales and eight mins of 6 bits, of Q4_K and Q5_K.
///
/// | bytes | bits 0 to 3 | bits 4 and 5 | bits 6 and 7 |
/// | --- | --- | --- | --- |
/// | 0..4 | scales 0 to 3 | the same scales | upper two bits of scales 4 to 7 |
/// | 4..8 | mins 0 to 3 | the same mins | upper two bits of mins 4 to 7 |
///
/// Bytes 8..12 hold the lower four bits of scales 4 to 7 in their lower halves and those of mins 4 to 7 in their upper.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub struct PackedScales([u8; 12]);

impl PackedScales {
    /// Scales, then mins.
    pub fn unpack(&self) -> ([u8; 8], [u8; 8]) {
        let PackedScales(bytes) = self;
        let upper = |byte: u8| byte >> 6 << 4;
        let scales = |g: usize| if g < 4 { bytes[g] & 63 } else { bytes[g + 4] & 15 | upper(bytes[g - 4]) };
        let mins = |g: usize| if g < 4 { bytes[g + 4] & 63 } else { bytes[g + 4] >> 4 | upper(bytes[g]) };
        (std::array::from_fn(scales), std::array::from_fn(mins))
    }

    pub(super) fn pack(scales: &[u8; 8], mins: &[u8; 8]) -> Self {
        PackedScales(std::array::from_fn(|i| match i {
            0..4 => scales[i] | scales[i + 4] >> 4 << 6,
            4..8 => mins[i - 4] | mins[i] >> 4 << 6,
            _ => scales[i - 4] & 15 | mins[i - 4] << 4,
        }))
    }
}

// SAFETY: `repr(C)`, bytes only.
unsafe impl Block<256> for BlockQ4K {
    fn decode(&self, out: &mut [f32; 256]) {
        decode_groups(self.d, self.d_min, &self.scales, &bit_planes::unpack::<4, 32>(&self.q), out);
    }

    fn take_apart(&self, parts: &mut BlockParts) {
        parts.q = bit_planes::unpack::<4, 32>(&self.q);
        parts.set_group_scales(&self.scales);
        (parts.d, parts.d_min) = (self.d.to_bits(), self.d_min.to_bits());
    }

    fn encode(values: &[f32; 256]) -> Self {
        let found = search_scales_and_mins::<8, 32>(values, Limits { q: 15.0, scale: 63.0 });
        BlockQ4K {
            d: found.d,
            d_min: found.d_min,
            scales: PackedScales::pack(&found.scales, &found.mins),
            q: bit_planes::pack::<4, 32, 128>(&found.q),
        }
    }
}

/// The numbers of eight groups of 32.
pub(super) fn decode_groups(d: F16Bytes, d_min: F16Bytes, scales: &PackedScales, q: &[u8; 256], out: &mut [f32; 256]) {
    let (d, d_min, (scales, mins)) = (d.to_f32(), d_min.to_f32(), scales.unpack());
    let groups = out.as_chunks_mut::<32>().0.iter_mut().zip(q.as_chunks::<32>().0);
    for ((out, q), (scale, min)) in groups.zip(scales.into_iter().zip(mins)) {
        let (scale, min) = (d * f32::from(scale), d_min * f32::from(min));
        for (out, &q) in out.iter_mut().zip(q) {
            *out = scale * f32::from(q) - min;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::PackedScales;

    /// Every scale and min of 6 bits comes back from every place, whatever stands in the others.
    #[test]
    fn scales_and_mins_come_back() {
        for place in 0..16 {
            for number in 0..64 {
                for others in [0, 63, 21] {
                    let at = |i: usize| if i == place { number } else { others };
                    let (scales, mins) = (std::array::from_fn(at), std::array::from_fn(|i| at(8 + i)));
                    assert_eq!(PackedScales::pack(&scales, &mins).unpack(), (scales, mins));
                }
            }
        }
    }
}
