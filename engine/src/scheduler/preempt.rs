//! Who loses its blocks when they run short, and how much room an admission must leave so that this stays rare.
//!
//! Rule 1: the victim is of the worst rank (its class, as lifted by waiting when it was admitted), and of that the
//! youngest; so the oldest of the best rank always makes progress. Rule 2: a sequence that was preempted
//! [`MAX_PREEMPTIONS`] times is protected: it is admitted again only when there is room for its full length beside what
//! the protected ones that run may still need, later admissions keep that room free, and it is no victim while an
//! unprotected sequence runs. Hence nobody is preempted more than [`MAX_PREEMPTIONS`] times for lack of blocks or seats:
//! unprotected sequences may use the room that is set aside, but they give it back, and the protected ones among
//! themselves never run short.

use std::cmp::Reverse;

use crate::ids::SeqId;
use crate::sequence::Sequence;

/// Preemptions after which a sequence is protected.
pub const MAX_PREEMPTIONS: u32 = 3;

/// Tokens of growth per running sequence that an admission leaves room for: the steps that all may hope to run
/// undisturbed. It rises with the most preemptions that one of them has behind it, so a crowded pool calms down. To set
/// aside the full length from the start would waste the pool: most answers end long before their limit.
const HEADROOM_TOKENS: [usize; MAX_PREEMPTIONS as usize] = [16, 64, 256];

/// Orders running sequences from the one that keeps its blocks longest to the first victim.
pub(super) fn standing(seq: &Sequence) -> (Reverse<bool>, usize, SeqId) {
    (Reverse(is_protected(seq)), seq.rank, seq.id)
}

/// Whether it can be a victim only of other protected sequences.
pub(super) fn is_protected(seq: &Sequence) -> bool {
    seq.num_preemptions >= MAX_PREEMPTIONS
}

/// Tokens of `grower`'s future growth that must stay available at an admission; `usize::MAX`: all that it may need.
/// `most_preemptions`: of the admitted and the running sequences.
pub(super) fn headroom_tokens(grower: &Sequence, most_preemptions: u32) -> usize {
    if is_protected(grower) {
        return usize::MAX;
    }
    HEADROOM_TOKENS[(most_preemptions as usize).min(HEADROOM_TOKENS.len() - 1)]
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::request::{CacheUse, Priority, SamplingParams};
    use crate::sequence::SequenceSpec;

    fn sequence(id: u64, rank: usize, num_preemptions: u32) -> Sequence {
        let spec = SequenceSpec {
            priority: Priority::Normal,
            prompt: Arc::from([1]),
            max_new_tokens: 1,
            stop_token_ids: Arc::from([]),
            deadline_ms: None,
            timeout_ms: 0,
            namespace: [0; 32],
            owner: [0; 32],
            prefix_cache: CacheUse::ReadWrite,
            prompt_logprobs: None,
            logprobs: None,
            sampling: Arc::new(SamplingParams::greedy()),
        };
        let mut sequence = Sequence::new(SeqId(id), SeqId(id), spec);
        (sequence.rank, sequence.num_preemptions) = (rank, num_preemptions);
        sequence
    }

    /// Victims: worst rank first, of these the youngest; whoever was preempted often enough comes last.
    #[test]
    fn victims_are_the_youngest_of_the_worst_rank() {
        let sequences = [sequence(1, 2, 0), sequence(2, 0, 0), sequence(3, 2, 2), sequence(4, 1, 0), sequence(5, 2, 3)];
        let mut order: Vec<_> = sequences.iter().map(standing).collect();
        order.sort_unstable_by(|a, b| b.cmp(a));
        let victims: Vec<u64> = order.into_iter().map(|(.., id)| id.0).collect();
        assert_eq!(victims, [3, 1, 4, 2, 5]);
    }

    /// The more preemptions there were, the more room an admission leaves; for a protected sequence all that it may
    /// need stays free, whoever is admitted.
    #[test]
    fn headroom_grows_with_preemptions() {
        let plain = sequence(1, 1, 0);
        let headroom: Vec<usize> = (0..5).map(|num| headroom_tokens(&plain, num)).collect();
        assert_eq!(headroom, [16, 64, 256, 256, 256]);
        assert_eq!(headroom_tokens(&sequence(2, 1, MAX_PREEMPTIONS), 0), usize::MAX);
    }
}
