//! What changes single logits before a token is chosen: the caller's bias, and penalties for tokens seen before
//! (repetition: Keskar et al. 2019, arXiv:1909.05858; presence and frequency as in OpenAI's interface).
//!
//! Invariants: a masked logit (`-inf`) stays masked and a finite one stays finite, whatever the parameters.

use crate::batch::RowSampling;
use crate::request::SamplingParams;

/// Occurrences of each token, kept between rows so that a vocabulary-sized array is not cleared for each token.
#[derive(Debug, Default)]
pub(super) struct Occurrences {
    /// `[vocab_size]`; zero wherever `seen` does not name the token.
    counts: Vec<Count>,
    /// Tokens that occur, in the order of their first occurrence.
    seen: Vec<u32>,
}

#[derive(Debug, Default, Clone, Copy)]
struct Count {
    in_all: u32,
    in_answer: u32,
}

/// Adds the caller's bias. `logits`: `[vocab_size]`.
pub(super) fn apply_logit_bias(logits: &mut [f32], logit_bias: &[(u32, f32)]) {
    for &(token_id, bias) in logit_bias {
        change(&mut logits[token_id as usize], |logit| logit + bias);
    }
}

/// Applies the three penalties, each token once: repetition to what occurs in prompt or answer, then frequency and
/// presence to what occurs in the answer. `logits`: `[vocab_size]`.
pub(super) fn apply_penalties(logits: &mut [f32], row: &RowSampling, occurrences: &mut Occurrences) {
    if !row.params.reads_history() {
        return;
    }
    occurrences.count(row, logits.len());
    for &token_id in &occurrences.seen {
        let count = occurrences.counts[token_id as usize];
        change(&mut logits[token_id as usize], |logit| penalised(logit, &row.params, count.in_answer));
    }
    occurrences.clear();
}

fn penalised(logit: f32, params: &SamplingParams, in_answer: u32) -> f32 {
    let penalty = params.repetition_penalty;
    let logit = if logit > 0.0 { logit / penalty } else { logit * penalty };
    if in_answer == 0 {
        return logit;
    }
    logit - params.frequency_penalty * in_answer as f32 - params.presence_penalty
}

/// Replaces a logit that is not masked; an overflow becomes the largest finite value of its sign.
fn change(logit: &mut f32, f: impl Fn(f32) -> f32) {
    if *logit != f32::NEG_INFINITY {
        *logit = f(*logit).clamp(f32::MIN, f32::MAX);
    }
}

impl Occurrences {
    fn count(&mut self, row: &RowSampling, vocab_size: usize) {
        self.clear();
        self.counts.resize(vocab_size, Count::default());
        for (idx, &token_id) in row.history.iter().enumerate() {
            let count = &mut self.counts[token_id as usize];
            if count.in_all == 0 {
                self.seen.push(token_id);
            }
            count.in_all += 1;
            count.in_answer += u32::from(idx >= row.prompt_tokens);
        }
    }

    fn clear(&mut self) {
        for token_id in self.seen.drain(..) {
            self.counts[token_id as usize] = Count::default();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn row(history: &[u32], prompt_tokens: usize, change: impl FnOnce(&mut SamplingParams)) -> RowSampling {
        let mut params = SamplingParams::greedy();
        change(&mut params);
        RowSampling { params: Arc::new(params), history: history.to_vec(), prompt_tokens, logprobs: None }
    }

    /// Repetition reads prompt and answer, frequency and presence the answer only; working memory is clean afterwards.
    #[test]
    fn each_penalty_reads_its_part_of_the_history() {
        let mut occurrences = Occurrences::default();
        let history = [0, 1, 1, 2, 2, 2];
        let cases: [(&str, RowSampling, [f32; 4]); 4] = [
            ("repetition", row(&history, 3, |p| p.repetition_penalty = 2.0), [2.0, -8.0, 2.0, 4.0]),
            ("presence", row(&history, 2, |p| p.presence_penalty = 0.5), [4.0, -4.5, 3.5, 4.0]),
            ("frequency", row(&history, 2, |p| p.frequency_penalty = 0.5), [4.0, -4.5, 2.5, 4.0]),
            ("none", row(&history, 2, |_| ()), [4.0, -4.0, 4.0, 4.0]),
        ];
        for (name, row, expected) in cases {
            let mut logits = [4.0, -4.0, 4.0, 4.0];
            apply_penalties(&mut logits, &row, &mut occurrences);
            assert_eq!(logits, expected, "{name}");
            assert!(occurrences.seen.is_empty() && occurrences.counts.iter().all(|count| count.in_all == 0));
        }
    }

    /// No legal parameter makes a finite logit infinite, and a masked token stays masked.
    #[test]
    fn finite_stays_finite_and_masked_stays_masked() {
        let strongest = row(&[0, 1, 2], 0, |p| {
            p.repetition_penalty = f32::MIN_POSITIVE;
            p.frequency_penalty = -2.0;
            p.presence_penalty = -2.0;
        });
        let mut logits = [f32::MAX, f32::MIN, f32::NEG_INFINITY];
        apply_penalties(&mut logits, &strongest, &mut Occurrences::default());
        apply_logit_bias(&mut logits, &[(0, 100.0), (1, -100.0), (2, 100.0)]);
        assert_eq!(logits[0], f32::MAX);
        assert!(logits[1].is_finite());
        assert_eq!(logits[2], f32::NEG_INFINITY);
    }
}
