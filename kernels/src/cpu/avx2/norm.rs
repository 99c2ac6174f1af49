//! RMSNorm and LayerNorm of one row with AVX2 and FMA. Sums have 32 chains, folded in a fixed order, then the rest of
//! the row one by one: the order depends on the width alone.

use crate::cpu::norm::{CenteredRow, NormKernels};

/// The AVX2 kernels.
pub(crate) const KERNELS: NormKernels =
    NormKernels { inverse_rms, scale, scale_in_place, sum, sum_of_squares_around, center_and_scale };

/// Independent chains of the sum: four vectors, which hides the latency of the multiply-add.
const CHAINS: usize = 32;

#[target_feature(enable = "avx2,fma,f16c")]
fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (chained_sum(x, |sum, value| value.mul_add(value, sum)) / x.len() as f32 + eps).sqrt()
}

#[target_feature(enable = "avx2,fma,f16c")]
fn sum(x: &[f32]) -> f32 {
    chained_sum(x, |sum, value| sum + value)
}

#[target_feature(enable = "avx2,fma,f16c")]
fn sum_of_squares_around(x: &[f32], center: f32) -> f32 {
    chained_sum(x, |sum, value| (value - center).mul_add(value - center, sum))
}

/// `add` over the row: chain by chain, the chains folded by halves, then the rest of the row one by one.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn chained_sum(x: &[f32], add: impl Fn(f32, f32) -> f32) -> f32 {
    let mut chains = [0.0_f32; CHAINS];
    let mut lines = x.chunks_exact(CHAINS);
    for line in &mut lines {
        for (sum, &value) in chains.iter_mut().zip(line) {
            *sum = add(*sum, value);
        }
    }
    let mut width = CHAINS;
    while width > 1 {
        width /= 2;
        for i in 0..width {
            chains[i] += chains[i + width];
        }
    }
    lines.remainder().iter().fold(chains[0], |sum, &value| add(sum, value))
}

#[target_feature(enable = "avx2,fma,f16c")]
fn scale(x: &[f32], factor: f32, weight: &[f32], out: &mut [f32]) {
    for ((out, &x), &weight) in out.iter_mut().zip(x).zip(weight) {
        *out = x * factor * weight;
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn scale_in_place(x: &mut [f32], factor: f32, weight: &[f32]) {
    for (x, &weight) in x.iter_mut().zip(weight) {
        *x = *x * factor * weight;
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn center_and_scale(row: &CenteredRow<'_>, out: &mut [f32]) {
    let &CenteredRow { x, center, factor, weight, bias } = row;
    for ((out, &x), (&weight, &bias)) in out.iter_mut().zip(x).zip(weight.iter().zip(bias)) {
        *out = ((x - center) * factor).mul_add(weight, bias);
    }
}
