//! What one step may spend: tokens. A decoding sequence costs one token and is never refused (seats bound their
//! number); prompts share what is left, at least [`MIN_PREFILL_TOKENS`], so that neither side can stop the other.

/// Prompt tokens that every step with an unfinished prompt computes, however many sequences decode.
pub(super) const MIN_PREFILL_TOKENS: usize = 16;

/// Tokens of one step.
#[derive(Debug, Clone, Copy)]
pub(super) struct Budget {
    left: usize,
    min_prefill: usize,
}

impl Budget {
    /// Of `total` tokens, `num_decodes` go to sequences with one token to compute.
    pub(super) fn new(total: usize, num_decodes: usize) -> Self {
        let min_prefill = total.clamp(1, MIN_PREFILL_TOKENS);
        Budget { left: total.saturating_sub(num_decodes).max(min_prefill), min_prefill }
    }
    /// Prompt tokens that can still be given out.
    pub(super) fn left(&self) -> usize {
        self.left
    }
    /// Takes up to `wanted` tokens. With `oldest_waits`, the prompt that has run longest has had no tokens in this
    /// step yet, and its minimum is kept back: a stream of more important prompts cannot stop one that was begun.
    pub(super) fn take(&mut self, wanted: usize, oldest_waits: bool) -> usize {
        let kept = if oldest_waits { self.min_prefill } else { 0 };
        let taken = wanted.min(self.left.saturating_sub(kept));
        self.left -= taken;
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Prompts get what decoding leaves, but never less than the minimum, nor than one token of a tiny budget; what is
    /// kept back for the oldest prompt is not given to others.
    #[test]
    fn prompts_share_what_decoding_leaves() {
        for (total, num_decodes, left) in
            [(128, 0, 128), (128, 28, 100), (128, 127, 16), (128, 500, 16), (3, 9, 3), (0, 9, 1)]
        {
            assert_eq!(Budget::new(total, num_decodes).left(), left);
        }
        let mut budget = Budget::new(100, 0);
        assert_eq!((budget.take(30, true), budget.take(90, true), budget.take(90, false)), (30, 54, 16));
        assert_eq!((budget.take(1, true), budget.take(1, false), budget.left()), (0, 0, 0));
    }
}
