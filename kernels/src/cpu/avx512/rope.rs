//! Rotary embedding of one head, and rounding to f16. The rotation is elementwise: the compiler's vectors do.

use std::arch::x86_64::*;

use half::f16;

use super::{LANES, first_lanes};
use crate::cpu::rope::RopeKernels;

/// The AVX-512 kernels.
pub(crate) const KERNELS: RopeKernels = RopeKernels { rotate, round_f16 };

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn rotate(x: &mut [f32], cos: &[f32], sin: &[f32]) {
    let half = cos.len();
    let (first, second) = x[..2 * half].split_at_mut(half);
    for ((a, b), (&cos, &sin)) in first.iter_mut().zip(second).zip(cos.iter().zip(sin)) {
        (*a, *b) = (a.mul_add(cos, -(*b * sin)), b.mul_add(cos, *a * sin));
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn round_f16(x: &[f32], out: &mut [f16]) {
    const NEAREST_EVEN: i32 = _MM_FROUND_TO_NEAREST_INT;
    for (x, out) in x.chunks(LANES).zip(out.chunks_mut(LANES)) {
        let lanes = first_lanes(x.len().min(out.len()));
        // SAFETY: only the lanes that both chunks have are read and written; halves are stored as their 16 bits.
        unsafe {
            let halves = _mm512_cvtps_ph::<NEAREST_EVEN>(_mm512_maskz_loadu_ps(lanes, x.as_ptr()));
            _mm256_mask_storeu_epi16(out.as_mut_ptr().cast(), lanes, halves);
        }
    }
}
