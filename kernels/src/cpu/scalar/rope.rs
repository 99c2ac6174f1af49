//! Rotary embedding of one head and rounding to f16, written for the eye.

use half::f16;

use crate::cpu::rope::RopeKernels;

/// The portable kernels.
pub(crate) const KERNELS: RopeKernels = RopeKernels { rotate, round_f16 };

/// Turns the pairs (`x[i]`, `x[i + half]`) by the angles whose cosines and sines are given, `half = cos.len()`.
fn rotate(x: &mut [f32], cos: &[f32], sin: &[f32]) {
    let half = cos.len();
    let (first, second) = x[..2 * half].split_at_mut(half);
    for i in 0..half {
        let (a, b) = (first[i], second[i]);
        first[i] = a * cos[i] - b * sin[i];
        second[i] = b * cos[i] + a * sin[i];
    }
}

/// Rounds to nearest even.
fn round_f16(x: &[f32], out: &mut [f16]) {
    for (out, &x) in out.iter_mut().zip(x) {
        *out = f16::from_f32(x);
    }
}
