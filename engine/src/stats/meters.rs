//! Histograms while they grow: counted by the worker and by intake, read by anyone, without a lock. The worker adds some
//! numbers per token; a copy is made when someone asks.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::request::Summary;
use crate::stats::{Histogram, Histograms};

/// Bounds of times to a first token, seconds: those of vLLM, as all below that do not say otherwise.
const FIRST_TOKEN_BOUNDS: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
];
/// Of times between two tokens.
const INTER_TOKEN_BOUNDS: &[f64] =
    &[0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0];
/// Of the parts of a request and of all of it.
const REQUEST_BOUNDS: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
];
/// Of a step; our own, vLLM has none.
const STEP_BOUNDS: &[f64] =
    &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0];
/// Of the tokens of a request.
const TOKEN_BOUNDS: &[f64] = &[
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10000.0, 20000.0, 50000.0, 100000.0,
];
/// Of the tokens of a step.
const STEP_TOKEN_BOUNDS: &[f64] =
    &[1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0];

/// One histogram.
struct Meter {
    bounds: &'static [f64],
    counts: Box<[AtomicU64]>,
    /// The bits of an `f64`.
    sum: AtomicU64,
}

impl Meter {
    fn new(bounds: &'static [f64]) -> Meter {
        let counts = (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect();
        Meter { bounds, counts, sum: AtomicU64::new(0.0_f64.to_bits()) }
    }

    fn add(&self, value: f64) {
        // Every value is a sum or a difference of times, or a count: finite and not negative.
        self.counts[self.bounds.partition_point(|&bound| bound < value)].fetch_add(1, Ordering::Relaxed);
        let added = |bits| Some((f64::from_bits(bits) + value).to_bits());
        // It cannot be refused.
        let _ = self.sum.fetch_update(Ordering::Relaxed, Ordering::Relaxed, added);
    }

    fn read(&self) -> Histogram {
        let counts = self.counts.iter().map(|count| count.load(Ordering::Relaxed)).collect();
        Histogram { bounds: self.bounds, counts, sum: f64::from_bits(self.sum.load(Ordering::Relaxed)) }
    }
}

/// Everything of which an engine keeps a histogram. Shared by worker, intake and the engine's handles.
pub(crate) struct Meters {
    first_token: Meter,
    inter_token: Meter,
    per_output_token: Meter,
    end_to_end: Meter,
    queue: Meter,
    prefill: Meter,
    decode: Meter,
    inference: Meter,
    step: Meter,
    prompt_tokens: Meter,
    generation_tokens: Meter,
    step_tokens: Meter,
}

impl Meters {
    pub(crate) fn new() -> Meters {
        Meters {
            first_token: Meter::new(FIRST_TOKEN_BOUNDS),
            inter_token: Meter::new(INTER_TOKEN_BOUNDS),
            per_output_token: Meter::new(INTER_TOKEN_BOUNDS),
            end_to_end: Meter::new(REQUEST_BOUNDS),
            queue: Meter::new(REQUEST_BOUNDS),
            prefill: Meter::new(REQUEST_BOUNDS),
            decode: Meter::new(REQUEST_BOUNDS),
            inference: Meter::new(REQUEST_BOUNDS),
            step: Meter::new(STEP_BOUNDS),
            prompt_tokens: Meter::new(TOKEN_BOUNDS),
            generation_tokens: Meter::new(TOKEN_BOUNDS),
            step_tokens: Meter::new(STEP_TOKEN_BOUNDS),
        }
    }

    /// A request has its first token, so long after it came.
    pub(crate) fn first_token(&self, after: Duration) {
        self.first_token.add(after.as_secs_f64());
    }

    /// A choice has another token, so long after its last.
    pub(crate) fn next_token(&self, after: Duration) {
        self.inter_token.add(after.as_secs_f64());
    }

    /// A step of so many tokens was computed.
    pub(crate) fn step(&self, num_tokens: usize, took: Duration) {
        self.step.add(took.as_secs_f64());
        self.step_tokens.add(num_tokens as f64);
    }

    /// A generation of `num_choices` has ended by itself.
    pub(crate) fn finished(&self, summary: &Summary, num_choices: usize) {
        let (usage, times) = (summary.usage, summary.timings);
        self.queue.add(times.queue_ms / 1e3);
        self.prefill.add(times.prompt_ms / 1e3);
        self.decode.add(times.decode_ms / 1e3);
        self.inference.add((times.prompt_ms + times.decode_ms) / 1e3);
        self.end_to_end.add(times.total_ms / 1e3);
        self.prompt_tokens.add(usage.prompt_tokens as f64);
        self.generation_tokens.add(usage.completion_tokens as f64);
        // Choices grow side by side: the time of a token is that of one of them.
        let tokens_of_one = usage.completion_tokens as f64 / num_choices.max(1) as f64;
        if tokens_of_one > 1.0 {
            self.per_output_token.add(times.decode_ms / 1e3 / (tokens_of_one - 1.0));
        }
    }

    pub(crate) fn read(&self) -> Histograms {
        Histograms {
            first_token_seconds: self.first_token.read(),
            inter_token_seconds: self.inter_token.read(),
            per_output_token_seconds: self.per_output_token.read(),
            end_to_end_seconds: self.end_to_end.read(),
            queue_seconds: self.queue.read(),
            prefill_seconds: self.prefill.read(),
            decode_seconds: self.decode.read(),
            inference_seconds: self.inference.read(),
            step_seconds: self.step.read(),
            prompt_tokens: self.prompt_tokens.read(),
            generation_tokens: self.generation_tokens.read(),
            step_tokens: self.step_tokens.read(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A value lies in the first bucket whose bound it does not exceed, all buckets above count it too, and a quantile is
    /// found between the bounds of its bucket.
    #[test]
    fn buckets_are_cumulative() {
        let meter = Meter::new(&[1.0, 2.0]);
        [0.5, 1.0, 1.5, 9.0].into_iter().for_each(|value| meter.add(value));
        let histogram = meter.read();
        assert_eq!(histogram.cumulative().collect::<Vec<_>>(), [2, 3, 4]);
        assert_eq!((histogram.sum, histogram.count(), histogram.mean()), (12.0, 4, 3.0));
        let quantiles = [0.25, 0.5, 0.75, 1.0].map(|share| histogram.quantile(share));
        assert_eq!(quantiles, [0.5, 1.0, 2.0, 2.0]);
        assert_eq!((Histogram::default().quantile(0.5), Histogram::default().mean()), (0.0, 0.0));
    }
}
