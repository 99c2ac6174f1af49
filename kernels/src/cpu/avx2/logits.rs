//! The largest of a row of logits with AVX2. A row is up to 150,000 floats: one read from the L2 or L3 cache.

use core::arch::x86_64::*;

use crate::cpu::logits::{LogitsKernels, MaxLogit};

/// The AVX2 kernels.
pub(crate) const KERNELS: LogitsKernels = LogitsKernels { max };

/// Vectors that are folded side by side.
const VECTORS: usize = 4;
/// Floats of one step.
const STEP: usize = VECTORS * 8;

/// One pass for the value and for whether all are below infinity, then a search for the first index that has it.
#[target_feature(enable = "avx2,fma,f16c")]
fn max(logits: &[f32]) -> MaxLogit {
    let infinity = _mm256_set1_ps(f32::INFINITY);
    let mut largest = [_mm256_set1_ps(f32::NEG_INFINITY); VECTORS];
    let mut below = _mm256_castsi256_ps(_mm256_set1_epi32(-1));
    let mut steps = logits.chunks_exact(STEP);
    for step in &mut steps {
        for (i, largest) in largest.iter_mut().enumerate() {
            // SAFETY: a step is 32 floats long.
            let x = unsafe { _mm256_loadu_ps(step.as_ptr().add(8 * i)) };
            below = _mm256_and_ps(below, _mm256_cmp_ps::<_CMP_LT_OQ>(x, infinity));
            *largest = _mm256_max_ps(*largest, x);
        }
    }
    let mut lanes = [0.0; 8];
    let folded = _mm256_max_ps(_mm256_max_ps(largest[0], largest[1]), _mm256_max_ps(largest[2], largest[3]));
    // SAFETY: 8 floats.
    unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), folded) };
    let value = lanes.iter().chain(steps.remainder()).fold(f32::NEG_INFINITY, |max, &x| if x > max { x } else { max });
    let all_below_infinity = _mm256_movemask_ps(below) == 0xff && steps.remainder().iter().all(|&x| x < f32::INFINITY);
    MaxLogit { value, index: first_index(logits, value), all_below_infinity }
}

/// First index that holds `value`; 0 when none does.
#[target_feature(enable = "avx2,fma,f16c")]
fn first_index(logits: &[f32], value: f32) -> usize {
    let wanted = _mm256_set1_ps(value);
    for (i, x) in logits.chunks_exact(8).enumerate() {
        // SAFETY: a chunk is 8 floats long.
        let x = unsafe { _mm256_loadu_ps(x.as_ptr()) };
        let equal = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_EQ_OQ>(x, wanted));
        if equal != 0 {
            return 8 * i + equal.trailing_zeros() as usize;
        }
    }
    let rest = logits.len() / 8 * 8;
    logits[rest..].iter().position(|&x| x == value).map_or(0, |i| rest + i)
}
