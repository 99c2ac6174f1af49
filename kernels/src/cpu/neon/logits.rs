//! The largest of a row of logits. A row is up to 150,000 floats: one read from a cache.

use std::arch::aarch64::*;

use super::LANES;
use crate::cpu::logits::{LogitsKernels, MaxLogit};

/// The NEON kernels.
pub(crate) const KERNELS: LogitsKernels = LogitsKernels { max };

/// Vectors that are folded side by side.
const VECTORS: usize = 4;
/// Floats of one step.
const STEP: usize = VECTORS * LANES;

/// One pass for the value and for whether all are below infinity, then a search for the first index that has it.
#[target_feature(enable = "neon")]
fn max(logits: &[f32]) -> MaxLogit {
    let infinity = vdupq_n_f32(f32::INFINITY);
    let mut largest = [vdupq_n_f32(f32::NEG_INFINITY); VECTORS];
    let mut below = vdupq_n_u32(u32::MAX);
    let (steps, rest) = logits.as_chunks::<STEP>();
    for step in steps {
        for (largest, x) in largest.iter_mut().zip(step.as_chunks::<LANES>().0) {
            // SAFETY: it is four floats long.
            let x = unsafe { vld1q_f32(x.as_ptr()) };
            below = vandq_u32(below, vcltq_f32(x, infinity));
            *largest = vmaxnmq_f32(*largest, x);
        }
    }
    let folded = vmaxnmq_f32(vmaxnmq_f32(largest[0], largest[1]), vmaxnmq_f32(largest[2], largest[3]));
    let value = rest.iter().fold(vmaxnmvq_f32(folded), |max, &x| if x > max { x } else { max });
    let all_below_infinity = vminvq_u32(below) == u32::MAX && rest.iter().all(|&x| x < f32::INFINITY);
    MaxLogit { value, index: first_index(logits, value), all_below_infinity }
}

/// First index that holds `value`; 0 when none does.
#[target_feature(enable = "neon")]
fn first_index(logits: &[f32], value: f32) -> usize {
    let wanted = vdupq_n_f32(value);
    let (vectors, _) = logits.as_chunks::<LANES>();
    let has_value = |x: &&[f32; LANES]| {
        // SAFETY: it is four floats long.
        vmaxvq_u32(vceqq_f32(unsafe { vld1q_f32(x.as_ptr()) }, wanted)) != 0
    };
    let before = LANES * vectors.iter().take_while(|x| !has_value(x)).count();
    logits[before..].iter().position(|&x| x == value).map_or(0, |i| before + i)
}
