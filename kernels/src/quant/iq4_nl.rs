//! IQ4_NL: 32 indices of 4 bits into a table of uneven levels and a scale, 4.5 bits a number.

use super::scale_search::sum;
use super::{Block, BlockParts, F16Bytes, inverse, pack_nibbles, signed_peak};

/// The levels that the format fixes: dense around zero, where weights are.
pub(crate) const LEVELS: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// | bytes | field |
/// | --- | --- |
/// | 0..2 | scale `d`, f16 |
/// | 2..18 | `q`: byte `i` holds index `i` in its lower half and index `16 + i` in its upper half |
///
/// `x[i] = d LEVELS[q[i]]`. Encoding searches for the scale of least squared error: from several starts, nearest levels and
/// the scale that fits them best, in turns (Lloyd 1982).
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct BlockIq4Nl {
    /// Scale.
    pub d: F16Bytes,
    /// Pairs of indices of 4 bits.
    pub q: [u8; 16],
}

const _: () = assert!(size_of::<BlockIq4Nl>() == 18);

/// What lies half way between two neighbouring levels.
const MIDDLES: [f32; 15] = {
    let (mut middles, mut i) = ([0.0; 15], 0);
    while i < 15 {
        middles[i] = 0.5 * (LEVELS[i] as f32 + LEVELS[i + 1] as f32);
        i += 1;
    }
    middles
};
/// Rounds of fitting scale to levels and levels to scale, from each start.
const LLOYD_ROUNDS: usize = 3;

// SAFETY: `repr(C)`, bytes only.
unsafe impl Block<32> for BlockIq4Nl {
    fn decode(&self, out: &mut [f32; 32]) {
        let d = self.d.to_f32();
        let (first, second) = out.split_at_mut(16);
        for ((first, second), &q) in first.iter_mut().zip(second).zip(&self.q) {
            *first = d * f32::from(LEVELS[usize::from(q & 15)]);
            *second = d * f32::from(LEVELS[usize::from(q >> 4)]);
        }
    }

    fn take_apart(&self, parts: &mut BlockParts) {
        parts.set_nibbles(&self.q);
        parts.d = self.d.to_bits();
    }

    fn encode(values: &[f32; 32]) -> Self {
        let values = &values.map(|value| value.clamp(-127.0 * 65504.0, 127.0 * 65504.0));
        let peak = signed_peak(values);
        let (mut best, mut least) = (F16Bytes::nearest(0.0), f32::INFINITY);
        // The peak at the lowest or at the highest level, and up to a tenth beyond (clipped) or below it.
        for percent in (90..=110).step_by(10) {
            for end in [-127.0, 113.0] {
                let mut scale = peak / (end * 0.01 * percent as f32);
                for _ in 0..LLOYD_ROUNDS {
                    let d = F16Bytes::nearest(scale);
                    let levels = nearest_levels(values, d).map(|index| f32::from(LEVELS[index as usize]));
                    let error = sum::<32>(|i| (values[i] - d.to_f32() * levels[i]).powi(2));
                    if error < least {
                        (best, least) = (d, error);
                    }
                    scale = sum::<32>(|i| values[i] * levels[i]) / sum::<32>(|i| levels[i] * levels[i]);
                }
            }
        }
        BlockIq4Nl { d: best, q: pack_nibbles(&nearest_levels(values, best).map(|index| index as u8)) }
    }
}

/// Index of the nearest level of each number, the lower of two.
fn nearest_levels(values: &[f32; 32], d: F16Bytes) -> [i32; 32] {
    let inverse = inverse(d.to_f32());
    // One up for each midpoint below: no search, no branch, and all numbers side by side.
    let mut indices = [0; 32];
    for middle in MIDDLES {
        for (index, &value) in indices.iter_mut().zip(values) {
            *index += i32::from(value * inverse > middle);
        }
    }
    indices
}
