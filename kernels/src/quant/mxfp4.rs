//! MXFP4: 32 floats of 4 bits and a power of two, 4.25 bits a number (Open Compute Project, "OCP Microscaling Formats (MX)
//! Specification" 1.0, 2023, section 5).

use super::{Block, BlockParts, pack_nibbles, signed_peak};

/// Twice the numbers that sign (bit 3), exponent (bits 1 and 2) and mantissa (bit 0) stand for.
pub(crate) const LEVELS: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// | bytes | field |
/// | --- | --- |
/// | 0 | exponent `e` |
/// | 1..17 | `q`: byte `i` holds float `i` in its lower half and float `16 + i` in its upper half |
///
/// `x[i] = 2^(e - 128) LEVELS[q[i]]`. The specification calls 255 NaN; files know only powers of two, and 255 is the
/// next. Encoding puts the largest magnitude into the upper binade of the levels, as the specification proposes:
/// `e = floor(log2(max |x|)) - 2 + 127`, and takes the nearest level, the one of smaller magnitude of two.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct BlockMxfp4 {
    /// Exponent, 128 too large for twice the floats.
    pub e: u8,
    /// Pairs of floats of 4 bits.
    pub q: [u8; 16],
}

const _: () = assert!(size_of::<BlockMxfp4>() == 17);

// SAFETY: `repr(C)`, bytes only.
unsafe impl Block<32> for BlockMxfp4 {
    fn decode(&self, out: &mut [f32; 32]) {
        let d = power_of_two(self.e);
        let (first, second) = out.split_at_mut(16);
        for ((first, second), &q) in first.iter_mut().zip(second).zip(&self.q) {
            *first = d * f32::from(LEVELS[usize::from(q & 15)]);
            *second = d * f32::from(LEVELS[usize::from(q >> 4)]);
        }
    }

    fn take_apart(&self, parts: &mut BlockParts) {
        parts.set_nibbles(&self.q);
        parts.d = (power_of_two(self.e).to_bits() >> 16) as u16;
    }

    fn encode(values: &[f32; 32]) -> Self {
        // The exponent field of an f32 is floor(log2) + 127, and 0 where that is below what `e` reaches.
        let exponent = signed_peak(values).abs().to_bits() >> 23;
        let e = exponent.saturating_sub(2) as u8;
        let d = power_of_two(e);
        BlockMxfp4 { e, q: pack_nibbles(&values.map(|value| nearest_level(value, d))) }
    }
}

/// `2^(e - 128)`; the two smallest are subnormal.
fn power_of_two(e: u8) -> f32 {
    f32::from_bits(if e < 2 { 0x0020_0000 << e } else { (u32::from(e) - 1) << 23 })
}

fn nearest_level(value: f32, d: f32) -> u8 {
    let magnitude = value.abs();
    // Of all magnitudes the nearest; counting the midpoints below gives the smaller of two.
    let index: u8 = (0..7).map(|i| u8::from(magnitude > d * (0.5 * f32::from(LEVELS[i] + LEVELS[i + 1])))).sum();
    // There is a negative zero, but nothing writes it.
    if value < 0.0 && index > 0 { index | 8 } else { index }
}
