//! RMSNorm and LayerNorm of one row, written for the eye.

use crate::cpu::norm::{CenteredRow, NormKernels};

/// The portable kernels.
pub(crate) const KERNELS: NormKernels =
    NormKernels { inverse_rms, scale, scale_in_place, sum, sum_of_squares_around, center_and_scale };

/// `1 / sqrt(mean(x^2) + eps)`
fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    let mut sum = 0.0;
    for &value in x {
        sum += value * value;
    }
    1.0 / (sum / x.len() as f32 + eps).sqrt()
}

/// `out = x * factor * weight`
fn scale(x: &[f32], factor: f32, weight: &[f32], out: &mut [f32]) {
    for ((out, &x), &weight) in out.iter_mut().zip(x).zip(weight) {
        *out = x * factor * weight;
    }
}

/// `x = x * factor * weight`
fn scale_in_place(x: &mut [f32], factor: f32, weight: &[f32]) {
    for (x, &weight) in x.iter_mut().zip(weight) {
        *x = *x * factor * weight;
    }
}

fn sum(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |sum, x| sum + x)
}

/// `sum((x - center)^2)`
fn sum_of_squares_around(x: &[f32], center: f32) -> f32 {
    x.iter().fold(0.0, |sum, x| sum + (x - center) * (x - center))
}

/// `out = (x - center) * factor * weight + bias`
fn center_and_scale(row: &CenteredRow<'_>, out: &mut [f32]) {
    let &CenteredRow { x, center, factor, weight, bias } = row;
    for (i, out) in out.iter_mut().enumerate() {
        *out = (x[i] - center) * factor * weight[i] + bias[i];
    }
}
