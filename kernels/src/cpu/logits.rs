//! The largest of a row of logits: all that a greedy token needs. Choosing by temperature, top-k, ... is not done here.
//!
//! The result depends on the row alone: one thread runs it.

use crate::cpu::Cpu;

/// Function pointers of one instruction set.
pub(crate) struct LogitsKernels {
    /// See [`max_logit`].
    pub(crate) max: unsafe fn(&[f32]) -> MaxLogit,
}

/// The largest of a row of logits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MaxLogit {
    /// Its value; negative infinity for an empty row.
    pub value: f32,
    /// The lowest index that has it. Means nothing unless `all_below_infinity`.
    pub index: usize,
    /// Whether no logit is NaN or `+inf`. A `-inf` is a token that cannot be chosen.
    pub all_below_infinity: bool,
}

/// The largest logit; the lowest index wins a tie.
pub fn max_logit(cpu: &Cpu, logits: &[f32]) -> MaxLogit {
    // SAFETY: a `Cpu` holds only kernels of an instruction set that this machine has.
    unsafe { (cpu.kernels().logits.max)(logits) }
}
