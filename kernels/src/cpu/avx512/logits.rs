//! The largest of a row of logits. A row is up to 150,000 floats: one read from the L2 or L3 cache.

use std::arch::x86_64::*;

use super::{LANES, first_lanes};
use crate::cpu::logits::{LogitsKernels, MaxLogit};

/// The AVX-512 kernels.
pub(crate) const KERNELS: LogitsKernels = LogitsKernels { max };

/// Vectors that are folded side by side.
const VECTORS: usize = 4;

/// One pass for the value and for whether all are below infinity, then a search for the first index that has it.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn max(logits: &[f32]) -> MaxLogit {
    let (lowest, infinity) = (_mm512_set1_ps(f32::NEG_INFINITY), _mm512_set1_ps(f32::INFINITY));
    let mut largest = [lowest; VECTORS];
    let mut below = __mmask16::MAX;
    let mut fold = |vector: usize, x: __m512| {
        below &= _mm512_cmp_ps_mask::<_CMP_LT_OQ>(x, infinity);
        // NaN is not kept: the second operand is returned then.
        largest[vector] = _mm512_max_ps(x, largest[vector]);
    };
    let mut steps = logits.chunks_exact(VECTORS * LANES);
    for step in &mut steps {
        for vector in 0..VECTORS {
            // SAFETY: a step is four vectors long.
            fold(vector, unsafe { _mm512_loadu_ps(step.as_ptr().add(vector * LANES)) });
        }
    }
    for chunk in steps.remainder().chunks(LANES) {
        // SAFETY: only the lanes that the chunk has are read; the others are the lowest value.
        fold(0, unsafe { _mm512_mask_loadu_ps(lowest, first_lanes(chunk.len()), chunk.as_ptr()) });
    }
    let largest = _mm512_max_ps(_mm512_max_ps(largest[0], largest[1]), _mm512_max_ps(largest[2], largest[3]));
    let value = _mm512_reduce_max_ps(largest);
    MaxLogit { value, index: first_index(logits, value), all_below_infinity: below == __mmask16::MAX }
}

/// First index that holds `value`; 0 when none does.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn first_index(logits: &[f32], value: f32) -> usize {
    let wanted = _mm512_set1_ps(value);
    for (i, chunk) in logits.chunks(LANES).enumerate() {
        let lanes = first_lanes(chunk.len());
        // SAFETY: only the lanes that the chunk has are read.
        let x = unsafe { _mm512_maskz_loadu_ps(lanes, chunk.as_ptr()) };
        let equal = _mm512_mask_cmp_ps_mask::<_CMP_EQ_OQ>(lanes, x, wanted);
        if equal != 0 {
            return LANES * i + equal.trailing_zeros() as usize;
        }
    }
    0
}
