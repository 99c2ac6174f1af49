//! From one row of logits to one token. Pure over slices: knows no tensor, backend, thread or clock. The draw depends on
//! the row's logits, its parameters and history, its seed and its position, and on nothing else.
//!
//! The order, which is that of the field (it is what recommended parameters are tuned for):
//!
//! 1. Check: a NaN, `+inf` or nothing but `-inf` ends the sequence. Single `-inf` are masked tokens, never chosen.
//! 2. Logprobs, when asked for, of the raw logits: they describe the model, not the parameters.
//! 3. Logit bias.
//! 4. Repetition penalty over prompt and answer; then frequency and presence penalties over the answer.
//! 5. Temperature 0: the largest logit, the lowest id among equals. The rest is skipped.
//! 6. Temperature.
//! 7. Top-k: the k largest, lowest ids first among equals.
//! 8. Top-p: the shortest prefix of what is left whose renormalised probabilities reach p.
//! 9. Min-p: what has at least `min_p` of the best one's probability.
//! 10. Draw from what is left, renormalised.
//!
//! Temperature comes before truncation, so a hot draw also widens the nucleus. Top-k comes before top-p, so that p is a
//! share of the k; min-p comes last: it compares with the best token, so only its order to top-p could matter, and
//! before it a removed tail would raise every share that top-p adds up.

mod penalties;
mod rng;
mod truncate;
mod weights;

use std::sync::Arc;

use crate::batch::{Outcome, OutputKind, OutputRow, RowSampling};
use crate::error::{Error, Result};
use crate::request::{Logprob, SamplingParams, TokenLogprobs};
use penalties::Occurrences;
pub use rng::{choice_seed, random_at};
use truncate::Candidate;
use weights::{Softmax, log_sum_exp};

/// Working memory of [`sample_row`]. Holds nothing from one row to the next but its allocations; each thread that samples
/// has its own.
#[derive(Debug, Default)]
pub struct SamplerScratch {
    candidates: Vec<Candidate>,
    raw_logits: Vec<f32>,
    occurrences: Occurrences,
}

/// Does with one row of logits (`[vocab_size]`, overwritten) what `row` asks for.
///
/// Panics when a token id of `row` is outside the vocabulary: [`check_token_ids`] refuses those at admission.
pub fn sample_row(logits: &mut [f32], row: &OutputRow, scratch: &mut SamplerScratch) -> Outcome {
    let Some(max) = finite_max(logits) else {
        return Outcome::NonFinite;
    };
    match &row.kind {
        OutputKind::Score { target, top } => {
            let reported = best_tokens(logits, *top, scratch);
            Outcome::Scored(token_logprobs(logits, log_sum_exp(logits, max), *target, reported))
        }
        OutputKind::Sample(sampling) => {
            let reported = sampling.logprobs.map(|top| {
                scratch.raw_logits.clear();
                scratch.raw_logits.extend_from_slice(logits);
                best_tokens(logits, top, scratch)
            });
            let token_id = choose(logits, sampling, row.position, scratch);
            let logprobs = reported.map(|reported| {
                let raw_logits = &scratch.raw_logits;
                token_logprobs(raw_logits, log_sum_exp(raw_logits, max), token_id, reported)
            });
            Outcome::Token { token_id, logprobs }
        }
    }
}

/// Refuses token ids of a request that the vocabulary does not have.
pub fn check_token_ids(field: &'static str, token_ids: impl IntoIterator<Item = u32>, vocab_size: usize) -> Result<()> {
    match token_ids.into_iter().find(|&token_id| token_id as usize >= vocab_size) {
        None => Ok(()),
        Some(token_id) => Err(Error::InvalidArgument {
            field,
            value: token_id.to_string(),
            expected: format!("a token id below {vocab_size}"),
        }),
    }
}

/// Steps 3 to 10: the next token.
fn choose(logits: &mut [f32], sampling: &RowSampling, position: usize, scratch: &mut SamplerScratch) -> u32 {
    let params = &*sampling.params;
    penalties::apply_logit_bias(logits, &params.logit_bias);
    penalties::apply_penalties(logits, sampling, &mut scratch.occurrences);
    let max = finite_max(logits).expect("bias and penalties keep finite logits finite");
    if params.temperature == 0.0 {
        return logits.iter().position(|&logit| logit == max).expect("the maximum is one of the logits") as u32;
    }
    let candidates = &mut scratch.candidates;
    let total = truncate_to(candidates, logits, params, Softmax::new(max, params.temperature));
    // The upper half of a 128-bit product maps 64 random bits onto 0..total; no token's probability is off by more
    // than 2^-64.
    let random = random_at(params.seed, position as u64);
    let target = (u128::from(random) * u128::from(total)) >> 64;
    truncate::token_at(candidates, target as u64)
}

/// Steps 6 to 9: fills `candidates` with the tokens that may be drawn and returns the sum of their weights.
fn truncate_to(candidates: &mut Vec<Candidate>, logits: &[f32], params: &SamplingParams, softmax: Softmax) -> u64 {
    let top_k = params.top_k as usize;
    let mut total = if top_k > 0 && top_k < logits.len() {
        truncate::top_k(logits, top_k, candidates);
        truncate::weigh(candidates, softmax)
    } else {
        truncate::keep_all(logits, softmax, candidates)
    };
    if params.top_p < 1.0 {
        total = truncate::top_p(candidates, total, params.top_p);
    }
    if params.min_p > 0.0 {
        total = truncate::min_p(candidates, params.min_p);
    }
    total
}

/// The largest logit; `None` when one is NaN or `+inf`, or when all are `-inf`.
fn finite_max(logits: &[f32]) -> Option<f32> {
    const LANES: usize = 16;
    let mut max = [f32::NEG_INFINITY; LANES];
    let mut bad = [false; LANES];
    for chunk in logits.chunks(LANES) {
        for ((max, bad), &logit) in max.iter_mut().zip(&mut bad).zip(chunk) {
            *max = if logit > *max { logit } else { *max };
            *bad |= logit.is_nan() | (logit == f32::INFINITY);
        }
    }
    let max = max.into_iter().fold(f32::NEG_INFINITY, f32::max);
    (!bad.contains(&true) && max != f32::NEG_INFINITY).then_some(max)
}

/// The `top` tokens with the largest logits, best first, each with its logit in the place of the logprob.
fn best_tokens(logits: &[f32], top: usize, scratch: &mut SamplerScratch) -> Vec<Logprob> {
    if top == 0 {
        return Vec::new();
    }
    truncate::top_k(logits, top, &mut scratch.candidates);
    truncate::sort(&mut scratch.candidates);
    scratch.candidates.iter().map(|c| Logprob { token_id: c.token_id, logprob: c.logit }).collect()
}

/// Log-softmax of the chosen and the reported tokens.
fn token_logprobs(logits: &[f32], log_sum: f64, chosen: u32, reported: Vec<Logprob>) -> TokenLogprobs {
    let logprob = |logit: f32| (f64::from(logit) - log_sum) as f32;
    let top: Arc<[Logprob]> =
        reported.into_iter().map(|best| Logprob { logprob: logprob(best.logprob), ..best }).collect();
    TokenLogprobs { chosen: Logprob { token_id: chosen, logprob: logprob(logits[chosen as usize]) }, top }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::SeqId;
    use crate::request::{SamplingDefaults, SamplingOptions};

    fn sampling(change: impl FnOnce(&mut SamplingParams)) -> RowSampling {
        let mut params = SamplingParams { temperature: 1.0, ..SamplingParams::greedy() };
        change(&mut params);
        RowSampling { params: Arc::new(params), history: Vec::new(), prompt_tokens: 0, logprobs: None }
    }

    fn output_row(position: usize, sampling: RowSampling) -> OutputRow {
        OutputRow { token_row: 0, seq: SeqId(0), position, kind: OutputKind::Sample(sampling) }
    }

    fn sample(logits: &[f32], position: usize, sampling: &RowSampling, scratch: &mut SamplerScratch) -> u32 {
        match sample_row(&mut logits.to_vec(), &output_row(position, sampling.clone()), scratch) {
            Outcome::Token { token_id, .. } => token_id,
            other => panic!("no token but {other:?}"),
        }
    }

    /// Draws at 20,000 positions and compares the counts with `expected` probabilities (chi-square).
    fn check_distribution(name: &str, logits: &[f32], sampling: RowSampling, expected: &[f64]) {
        const DRAWS: usize = 20_000;
        let mut scratch = SamplerScratch::default();
        let mut counts = vec![0u32; logits.len()];
        (0..DRAWS).for_each(|position| counts[sample(logits, position, &sampling, &mut scratch) as usize] += 1);
        let mut chi_square = 0.0;
        for (token_id, (&count, &probability)) in counts.iter().zip(expected).enumerate() {
            let mean = probability * DRAWS as f64;
            assert!(probability > 0.0 || count == 0, "{name}: token {token_id} cannot be drawn");
            if probability > 0.0 {
                chi_square += (f64::from(count) - mean).powi(2) / mean;
            }
        }
        let freedom = expected.iter().filter(|&&p| p > 0.0).count() as f64 - 1.0;
        let limit = freedom + 5.0 * (2.0 * freedom).sqrt();
        assert!(chi_square <= limit, "{name}: chi-square {chi_square}, {freedom} degrees of freedom: {counts:?}");
    }

    fn normalised(weights: &[f64]) -> Vec<f64> {
        let total: f64 = weights.iter().sum();
        weights.iter().map(|weight| weight / total).collect()
    }

    /// Draws follow the exact probabilities of the documented order, for each step alone and for all together.
    #[test]
    fn draws_follow_the_exact_distribution() {
        let logits = [8f32, 4.0, 2.0, 1.0, 1.0, 0.25].map(f32::ln);
        let check = |name, sampling, weights: &[f64]| check_distribution(name, &logits, sampling, &normalised(weights));
        check("plain", sampling(|_| ()), &[8.0, 4.0, 2.0, 1.0, 1.0, 0.25]);
        check("temperature", sampling(|p| p.temperature = 2.0), &[8.0, 4.0, 2.0, 1.0, 1.0, 0.25].map(f64::sqrt));
        check("top-k with a tie", sampling(|p| p.top_k = 4), &[8.0, 4.0, 2.0, 1.0, 0.0, 0.0]);
        check("top-p", sampling(|p| p.top_p = 0.8), &[8.0, 4.0, 2.0, 0.0, 0.0, 0.0]);
        check("min-p", sampling(|p| p.min_p = 0.2), &[8.0, 4.0, 2.0, 0.0, 0.0, 0.0]);
        // Of the three that top-k leaves, 12 of 14 parts reach 0.8; of these two both have a quarter of the best.
        let all = sampling(|p| (p.top_k, p.top_p, p.min_p) = (3, 0.8, 0.25));
        check("top-k, top-p, min-p", all, &[8.0, 4.0, 0.0, 0.0, 0.0, 0.0]);
        // Temperature comes first: at 4 the weights are 1.68, 1.41, 1.19, 1, 1, 0.71, so that 0.8 needs five.
        let hot = sampling(|p| (p.temperature, p.top_p) = (4.0, 0.8));
        check("temperature before top-p", hot, &[8f64, 4.0, 2.0, 1.0, 1.0, 0.0].map(|w| w.powf(0.25)));
        let biased = sampling(|p| p.logit_bias = vec![(0, -100.0), (5, 16f32.ln())]);
        check("bias", biased, &[0.0, 4.0, 2.0, 1.0, 1.0, 4.0]);
    }

    /// Presence penalty acts through the whole path: a token of the answer loses weight, one of the prompt does not.
    #[test]
    fn penalties_reach_the_draw() {
        let mut row = sampling(|p| p.presence_penalty = 2f32.ln());
        row.history = vec![0, 1];
        row.prompt_tokens = 1;
        check_distribution("presence", &[0.0, 0.0, 0.0], row, &normalised(&[2.0, 1.0, 2.0]));
    }

    /// Greedy takes the lowest id among equal maxima; a bias of 100 decides, one of -100 excludes.
    #[test]
    fn greedy_ties_and_bias() {
        let mut scratch = SamplerScratch::default();
        let greedy = |bias: &[(u32, f32)]| sampling(|p| (p.temperature, p.logit_bias) = (0.0, bias.to_vec()));
        let logits = [1.0, 3.0, 3.0, -2.0];
        assert_eq!(sample(&logits, 0, &greedy(&[]), &mut scratch), 1);
        assert_eq!(sample(&logits, 0, &greedy(&[(3, 100.0)]), &mut scratch), 3);
        assert_eq!(sample(&logits, 0, &greedy(&[(1, -100.0)]), &mut scratch), 2);
    }

    /// The smallest temperatures draw among the maxima only, the largest nearly evenly; neither overflows.
    #[test]
    fn extreme_temperatures() {
        let logits = [5.0, 5.0, 4.999, -80.0];
        for temperature in [f32::from_bits(1), 1e-30, 1e-5] {
            let cold = sampling(|p| p.temperature = temperature);
            check_distribution("cold", &logits, cold, &[0.5, 0.5, 0.0, 0.0]);
        }
        let hot = sampling(|p| p.temperature = 100.0);
        let expected = normalised(&logits.map(|l| (f64::from(l) / 100.0).exp()));
        check_distribution("hot", &logits, hot, &expected);
    }

    /// The token depends on (seed, position) and the row alone: what the scratch was used for before cannot show, and
    /// other seeds and positions do differ.
    #[test]
    fn same_seed_and_position_same_token() {
        let logits: Vec<f32> = (0..500).map(|i| (random_at(3, i) % 1000) as f32 / 200.0).collect();
        let row = |seed| sampling(|p| (p.seed, p.top_k, p.top_p) = (seed, 200, 0.95));
        let mut used = SamplerScratch::default();
        let mut tokens = std::collections::HashSet::new();
        for position in 0..200 {
            let mut other = sampling(|p| (p.seed, p.repetition_penalty) = (9, 1.5));
            other.history = vec![1, 2, 3];
            sample(&logits[..100 + position], position, &other, &mut used);
            let token = sample(&logits, position, &row(5), &mut used);
            assert_eq!(token, sample(&logits, position, &row(5), &mut SamplerScratch::default()));
            tokens.insert((token, sample(&logits, position, &row(6), &mut used)));
        }
        assert!(tokens.len() > 150, "only {} different pairs", tokens.len());
    }

    /// One NaN, `+inf`, or nothing but `-inf` ends the row, wherever it stands; a single `-inf` is a masked token.
    #[test]
    fn non_finite_logits() {
        let mut scratch = SamplerScratch::default();
        for bad in [f32::NAN, f32::INFINITY] {
            for idx in 0..40 {
                let mut logits = vec![0.5; 40];
                logits[idx] = bad;
                let outcome = sample_row(&mut logits, &output_row(0, sampling(|_| ())), &mut scratch);
                assert_eq!(outcome, Outcome::NonFinite, "{bad} at {idx}");
            }
        }
        let mut masked = [f32::NEG_INFINITY; 40];
        assert_eq!(sample_row(&mut masked, &output_row(0, sampling(|_| ())), &mut scratch), Outcome::NonFinite);
        masked[17] = -3.0;
        assert_eq!(sample(&masked, 0, &sampling(|_| ()), &mut scratch), 17);
        let score = OutputRow { kind: OutputKind::Score { target: 0, top: 1 }, ..output_row(0, sampling(|_| ())) };
        assert_eq!(sample_row(&mut [f32::NAN, 0.0], &score, &mut scratch), Outcome::NonFinite);
    }

    /// Logprobs are the log-softmax of the raw logits, whatever bias, penalty and temperature do to the choice; the best
    /// come first, equal ones by id; a given token is scored in the same way.
    #[test]
    fn logprobs_are_of_the_raw_logits() {
        let logits = [1.0, 2.0, 2.0, f32::NEG_INFINITY, 0.0];
        let sum: f64 = logits.iter().map(|&l| f64::from(l).exp()).sum();
        let exact = |id: usize| (f64::from(logits[id]) - sum.ln()) as f32;
        let mut row = sampling(|p| (p.temperature, p.logit_bias) = (0.0, vec![(4, 50.0)]));
        row.logprobs = Some(3);
        let mut scratch = SamplerScratch::default();
        let outcome = sample_row(&mut logits.to_vec(), &output_row(0, row), &mut scratch);
        let Outcome::Token { token_id: 4, logprobs: Some(logprobs) } = outcome else { panic!("{outcome:?}") };
        assert!((logprobs.chosen.logprob - exact(4)).abs() < 1e-6);
        assert_eq!(logprobs.top.iter().map(|best| best.token_id).collect::<Vec<_>>(), [1, 2, 0]);
        assert!(logprobs.top.iter().all(|best| (best.logprob - exact(best.token_id as usize)).abs() < 1e-6));

        let kind = OutputKind::Score { target: 3, top: 0 };
        let score = OutputRow { kind, ..output_row(0, sampling(|_| ())) };
        let Outcome::Scored(scored) = sample_row(&mut logits.to_vec(), &score, &mut scratch) else { panic!() };
        assert_eq!(scored.chosen, Logprob { token_id: 3, logprob: f32::NEG_INFINITY });
        assert!(scored.top.is_empty());
    }

    /// Ids outside the vocabulary are refused by field, value and limit; the last id inside is not.
    #[test]
    fn token_ids_outside_the_vocabulary_are_refused() {
        assert_eq!(check_token_ids("stop_token_ids", [0, 99], 100), Ok(()));
        let error = check_token_ids("logit_bias", [5, 100, 7], 100).unwrap_err();
        assert_eq!(error.to_string(), "logit_bias is 100, must be a token id below 100");
        assert_eq!(error.code(), "invalid_argument");
    }

    /// The request goes before the model's recommendation, and that before the neutral value; bias is sorted, once each.
    #[test]
    fn parameters_resolve_in_order() {
        let defaults = SamplingDefaults { temperature: Some(0.6), top_k: Some(20), ..SamplingDefaults::default() };
        let options = SamplingOptions {
            temperature: Some(0.9),
            logit_bias: vec![(9, 1.0), (2, 2.0), (9, 3.0)],
            ..SamplingOptions::default()
        };
        let params = SamplingParams::resolve(&options, &defaults, 77);
        let expected = SamplingParams {
            temperature: 0.9,
            top_k: 20,
            logit_bias: vec![(2, 2.0), (9, 3.0)],
            seed: 77,
            ..SamplingParams::greedy()
        };
        assert_eq!(params, expected);
        let neutral = SamplingParams::resolve(&SamplingOptions::default(), &SamplingDefaults::default(), 0);
        assert_eq!(neutral, SamplingParams::greedy());
    }
}
