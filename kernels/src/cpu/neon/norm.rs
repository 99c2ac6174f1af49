//! RMSNorm and LayerNorm of one row. Sums have 32 chains, folded in a fixed order, then the rest of the row one by one:
//! the order depends on the width alone.

use std::arch::aarch64::*;

use super::LANES;
use crate::cpu::norm::{CenteredRow, NormKernels};

/// The NEON kernels.
pub(crate) const KERNELS: NormKernels =
    NormKernels { inverse_rms, scale, scale_in_place, sum, sum_of_squares_around, center_and_scale };

/// Independent chains of the sum.
const CHAINS: usize = 32;

#[target_feature(enable = "neon")]
fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    let sum = chained_sum(x, |sum, value| vfmaq_f32(sum, value, value), |sum, value| value.mul_add(value, sum));
    1.0 / (sum / x.len() as f32 + eps).sqrt()
}

#[target_feature(enable = "neon")]
fn sum(x: &[f32]) -> f32 {
    chained_sum(x, |sum, value| vaddq_f32(sum, value), |sum, value| sum + value)
}

#[target_feature(enable = "neon")]
fn sum_of_squares_around(x: &[f32], center: f32) -> f32 {
    let add = |sum, value| {
        let difference = vsubq_f32(value, vdupq_n_f32(center));
        vfmaq_f32(sum, difference, difference)
    };
    chained_sum(x, add, |sum, value| (value - center).mul_add(value - center, sum))
}

/// `add` over the row, a chain in each lane of eight vectors; the chains are folded by halves, then the rest of the row is
/// added one by one.
#[inline]
#[target_feature(enable = "neon")]
fn chained_sum(
    x: &[f32],
    add: impl Fn(float32x4_t, float32x4_t) -> float32x4_t,
    add_one: impl Fn(f32, f32) -> f32,
) -> f32 {
    let (lines, rest) = x.as_chunks::<CHAINS>();
    let mut chains = [vdupq_n_f32(0.0); CHAINS / LANES];
    for line in lines {
        for (chain, value) in chains.iter_mut().zip(line.as_chunks::<LANES>().0) {
            // SAFETY: it is four numbers long.
            *chain = add(*chain, unsafe { vld1q_f32(value.as_ptr()) });
        }
    }
    for half in [4, 2, 1] {
        for i in 0..half {
            chains[i] = vaddq_f32(chains[i], chains[i + half]);
        }
    }
    let two = vadd_f32(vget_low_f32(chains[0]), vget_high_f32(chains[0]));
    let one = vget_lane_f32::<0>(two) + vget_lane_f32::<1>(two);
    rest.iter().fold(one, |sum, &value| add_one(sum, value))
}

#[target_feature(enable = "neon")]
fn scale(x: &[f32], factor: f32, weight: &[f32], out: &mut [f32]) {
    for ((out, &x), &weight) in out.iter_mut().zip(x).zip(weight) {
        *out = x * factor * weight;
    }
}

#[target_feature(enable = "neon")]
fn scale_in_place(x: &mut [f32], factor: f32, weight: &[f32]) {
    for (x, &weight) in x.iter_mut().zip(weight) {
        *x = *x * factor * weight;
    }
}

#[target_feature(enable = "neon")]
fn center_and_scale(row: &CenteredRow<'_>, out: &mut [f32]) {
    let &CenteredRow { x, center, factor, weight, bias } = row;
    for ((out, &x), (&weight, &bias)) in out.iter_mut().zip(x).zip(weight.iter().zip(bias)) {
        *out = ((x - center) * factor).mul_add(weight, bias);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sums have the bits of 32 chains folded by halves and then the rest one by one, written out: the order that stored
    /// keys and values rely on.
    #[test]
    fn the_order_of_a_sum_is_fixed() {
        for width in [1, 31, 32, 33, 64, 100, 1000] {
            let x: Vec<f32> = (0..width).map(|i| ((i * 7919 + 13) % 1009) as f32 / 97.0 - 5.0).collect();
            let mut chains = [0.0_f32; CHAINS];
            for line in x.chunks_exact(CHAINS) {
                chains.iter_mut().zip(line).for_each(|(sum, x)| *sum = x.mul_add(*x, *sum));
            }
            for half in [16, 8, 4, 2, 1] {
                (0..half).for_each(|i| chains[i] += chains[i + half]);
            }
            let sum = x.chunks_exact(CHAINS).remainder().iter().fold(chains[0], |sum, x| x.mul_add(*x, sum));
            let expected = 1.0 / (sum / width as f32 + 1e-6).sqrt();
            // SAFETY: every 64-bit ARM processor has these vectors.
            let (actual, around_zero) = unsafe { (inverse_rms(&x, 1e-6), sum_of_squares_around(&x, 0.0)) };
            assert_eq!((actual.to_bits(), around_zero.to_bits()), (expected.to_bits(), sum.to_bits()), "width {width}");
        }
    }
}
