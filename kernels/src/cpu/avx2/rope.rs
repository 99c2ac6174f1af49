//! Rotary embedding of one head with AVX2 and FMA, rounding to f16 with F16C. Elementwise: the compiler's vectors do.

use core::arch::x86_64::*;

use half::f16;

use crate::cpu::rope::RopeKernels;

/// The AVX2 kernels.
pub(crate) const KERNELS: RopeKernels = RopeKernels { rotate, round_f16 };

#[target_feature(enable = "avx2,fma,f16c")]
fn rotate(x: &mut [f32], cos: &[f32], sin: &[f32]) {
    let half = cos.len();
    let (first, second) = x[..2 * half].split_at_mut(half);
    for ((a, b), (&cos, &sin)) in first.iter_mut().zip(second).zip(cos.iter().zip(sin)) {
        (*a, *b) = (a.mul_add(cos, -(*b * sin)), b.mul_add(cos, *a * sin));
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn round_f16(x: &[f32], out: &mut [f16]) {
    const NEAREST_EVEN: i32 = _MM_FROUND_TO_NEAREST_INT;
    let (mut x, mut out) = (x.chunks_exact(8), out.chunks_exact_mut(8));
    for (x, out) in (&mut x).zip(&mut out) {
        // SAFETY: both chunks are 8 elements long; halves are stored as their 16 bits.
        unsafe {
            let halves = _mm256_cvtps_ph::<NEAREST_EVEN>(_mm256_loadu_ps(x.as_ptr()));
            _mm_storeu_si128(out.as_mut_ptr().cast(), halves);
        }
    }
    for (out, &x) in out.into_remainder().iter_mut().zip(x.remainder()) {
        *out = f16::from_f32(x);
    }
}
