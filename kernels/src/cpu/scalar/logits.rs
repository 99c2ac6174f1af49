//! The largest of a row of logits, written for the eye.

use crate::cpu::logits::{LogitsKernels, MaxLogit};

/// The portable kernels.
pub(crate) const KERNELS: LogitsKernels = LogitsKernels { max };

fn max(logits: &[f32]) -> MaxLogit {
    let mut best = MaxLogit { value: f32::NEG_INFINITY, index: 0, all_below_infinity: true };
    for (index, &value) in logits.iter().enumerate() {
        best.all_below_infinity &= value < f32::INFINITY;
        if value > best.value {
            (best.value, best.index) = (value, index);
        }
    }
    best
}
