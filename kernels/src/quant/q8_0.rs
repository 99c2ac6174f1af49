//! Q8_0: 32 signed bytes and a scale, 8.5 bits a number.

use super::{Block, BlockParts, F16Bytes, inverse, signed_peak};

/// | bytes | field |
/// | --- | --- |
/// | 0..2 | scale `d`, f16 |
/// | 2..34 | `q`, signed, one number a byte |
///
/// `x[i] = d q[i]`. Encoding takes `d = max |x| / 127` and rounds `x / d` to nearest, halves away from zero.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct BlockQ8_0 {
    /// Scale.
    pub d: F16Bytes,
    /// Signed numbers.
    pub q: [i8; 32],
}

const _: () = assert!(size_of::<BlockQ8_0>() == 34);

// SAFETY: `repr(C)`, bytes only.
unsafe impl Block<32> for BlockQ8_0 {
    fn decode(&self, out: &mut [f32; 32]) {
        let d = self.d.to_f32();
        for (out, &q) in out.iter_mut().zip(&self.q) {
            *out = f32::from(q) * d;
        }
    }

    fn take_apart(&self, parts: &mut BlockParts) {
        parts.set_codes(self.q.into_iter().map(|q| q as u8));
        parts.d = self.d.to_bits();
    }

    fn encode(values: &[f32; 32]) -> Self {
        let d = (signed_peak(values).abs() / 127.0).min(65504.0);
        let inverse = inverse(d);
        BlockQ8_0 { d: F16Bytes::nearest(d), q: values.map(|value| round_half_away(value * inverse)) }
    }
}

/// Nearest integer, halves away from zero; beyond ±127 that limit. (`f32::round` is a call for each number on machines
/// whose oldest instructions cannot round.)
fn round_half_away(value: f32) -> i8 {
    let value = value.clamp(-127.0, 127.0);
    let whole = value as i32;
    let rest = value - whole as f32;
    (whole + (2.0 * rest) as i32) as i8
}

#[cfg(test)]
mod tests {
    use super::round_half_away;

    /// Own rounding is that of the standard library around every half and at the last bit beside it.
    #[test]
    fn halves_round_away_from_zero() {
        for half in -300..=300 {
            let value = half as f32 / 2.0;
            for value in [value.next_down(), value, value.next_up()] {
                assert_eq!(f32::from(round_half_away(value)), value.round().clamp(-127.0, 127.0), "{value:e}");
            }
        }
    }
}
