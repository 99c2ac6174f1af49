//! RMSNorm and LayerNorm of one row. Sums have 64 chains, folded in a fixed order that depends on the width alone.

use std::arch::x86_64::*;

use super::{LANES, first_lanes};
use crate::cpu::norm::{CenteredRow, NormKernels};

/// The AVX-512 kernels.
pub(crate) const KERNELS: NormKernels =
    NormKernels { inverse_rms, scale, scale_in_place, sum, sum_of_squares_around, center_and_scale };

/// Vectors that are summed side by side, which hides the latency of the multiply-add.
const VECTORS: usize = 4;

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    let sum = chained_sum(x, |sum, value, _| _mm512_fmadd_ps(value, value, sum));
    1.0 / (sum / x.len() as f32 + eps).sqrt()
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn sum(x: &[f32]) -> f32 {
    chained_sum(x, |sum, value, _| _mm512_add_ps(sum, value))
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn sum_of_squares_around(x: &[f32], center: f32) -> f32 {
    chained_sum(x, |sum, value, lanes| {
        let difference = _mm512_maskz_sub_ps(lanes, value, _mm512_set1_ps(center));
        _mm512_fmadd_ps(difference, difference, sum)
    })
}

/// `add(sum, values, lanes)` over the row; lanes behind its end hold zeros and are not in `lanes`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn chained_sum(x: &[f32], add: impl Fn(__m512, __m512, __mmask16) -> __m512) -> f32 {
    let mut sums = [_mm512_setzero_ps(); VECTORS];
    let mut steps = x.chunks_exact(VECTORS * LANES);
    for step in &mut steps {
        for (vector, sum) in sums.iter_mut().enumerate() {
            // SAFETY: a step is four vectors long.
            let value = unsafe { _mm512_loadu_ps(step.as_ptr().add(vector * LANES)) };
            *sum = add(*sum, value, __mmask16::MAX);
        }
    }
    for (chunk, sum) in steps.remainder().chunks(LANES).zip(&mut sums) {
        let lanes = first_lanes(chunk.len());
        // SAFETY: only the lanes that the chunk has are read.
        let value = unsafe { _mm512_maskz_loadu_ps(lanes, chunk.as_ptr()) };
        *sum = add(*sum, value, lanes);
    }
    _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])))
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn scale(x: &[f32], factor: f32, weight: &[f32], out: &mut [f32]) {
    for ((out, &x), &weight) in out.iter_mut().zip(x).zip(weight) {
        *out = x * factor * weight;
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn scale_in_place(x: &mut [f32], factor: f32, weight: &[f32]) {
    for (x, &weight) in x.iter_mut().zip(weight) {
        *x = *x * factor * weight;
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn center_and_scale(row: &CenteredRow<'_>, out: &mut [f32]) {
    let &CenteredRow { x, center, factor, weight, bias } = row;
    for ((out, &x), (&weight, &bias)) in out.iter_mut().zip(x).zip(weight.iter().zip(bias)) {
        *out = ((x - center) * factor).mul_add(weight, bias);
    }
}
