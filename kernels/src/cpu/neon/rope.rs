//! Rotary embedding of one head, and rounding to f16. Rotation is elementwise: the compiler's vectors do.

use std::arch::aarch64::*;

use half::f16;

use super::{LANES, f32_to_f16};
use crate::cpu::rope::RopeKernels;

/// The NEON kernels.
pub(crate) const KERNELS: RopeKernels = RopeKernels { rotate, round_f16 };

#[target_feature(enable = "neon")]
fn rotate(x: &mut [f32], cos: &[f32], sin: &[f32]) {
    let half = cos.len();
    let (first, second) = x[..2 * half].split_at_mut(half);
    for ((a, b), (&cos, &sin)) in first.iter_mut().zip(second).zip(cos.iter().zip(sin)) {
        (*a, *b) = (a.mul_add(cos, -(*b * sin)), b.mul_add(cos, *a * sin));
    }
}

#[target_feature(enable = "neon")]
fn round_f16(x: &[f32], out: &mut [f16]) {
    let (mut x, mut out) = (x.chunks_exact(LANES), out.chunks_exact_mut(LANES));
    for (x, out) in (&mut x).zip(&mut out) {
        // SAFETY: both chunks are 4 elements long; halves are stored as their 16 bits.
        unsafe { vst1_u16(out.as_mut_ptr().cast(), f32_to_f16(vld1q_f32(x.as_ptr()))) };
    }
    for (out, &x) in out.into_remainder().iter_mut().zip(x.remainder()) {
        *out = f16::from_f32(x);
    }
}
