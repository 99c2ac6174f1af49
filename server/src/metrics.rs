//! What was asked of this server and how long it took: histograms over everything, as Prometheus adds them up, and the
//! newest operations one by one, for the performance routes. Bounded; counts of tokens and blocks are the engine's own.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ns_llm::{FinishReason, Summary};

use crate::options::MAX_OPERATIONS;

/// Bounds of times to a first token, seconds: those of vLLM, as all below.
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
/// Of token counts.
const TOKEN_BOUNDS: &[f64] = &[
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10000.0, 20000.0, 50000.0, 100000.0,
];

/// How often which values came.
#[derive(Debug, Clone)]
pub(crate) struct Histogram {
    pub(crate) bounds: &'static [f64],
    /// Of each bucket alone; the last is of those above all bounds.
    counts: Vec<u64>,
    pub(crate) sum: f64,
}

impl Histogram {
    fn new(bounds: &'static [f64]) -> Histogram {
        Histogram { bounds, counts: vec![0; bounds.len() + 1], sum: 0.0 }
    }

    fn add(&mut self, value: f64) {
        self.counts[self.bounds.partition_point(|&bound| bound < value)] += 1;
        self.sum += value;
    }

    /// Values that are no larger than each bound, and at last all of them.
    pub(crate) fn cumulative(&self) -> impl Iterator<Item = u64> + '_ {
        self.counts.iter().scan(0, |total, count| {
            *total += count;
            Some(*total)
        })
    }
}

/// Times and counts of the generations of one model that ended by themselves.
#[derive(Debug, Clone)]
pub(crate) struct ModelMetrics {
    pub(crate) first_token: Histogram,
    pub(crate) inter_token: Histogram,
    pub(crate) end_to_end: Histogram,
    pub(crate) queue: Histogram,
    pub(crate) prefill: Histogram,
    pub(crate) decode: Histogram,
    pub(crate) inference: Histogram,
    pub(crate) prompt_tokens: Histogram,
    pub(crate) generation_tokens: Histogram,
    /// By why they ended: "stop", "length".
    pub(crate) finished: [u64; 2],
    /// Given up by their callers; ended in an error.
    pub(crate) aborted: u64,
    pub(crate) failed: u64,
}

impl Default for ModelMetrics {
    fn default() -> Self {
        let of = Histogram::new;
        ModelMetrics {
            first_token: of(FIRST_TOKEN_BOUNDS),
            inter_token: of(INTER_TOKEN_BOUNDS),
            end_to_end: of(REQUEST_BOUNDS),
            queue: of(REQUEST_BOUNDS),
            prefill: of(REQUEST_BOUNDS),
            decode: of(REQUEST_BOUNDS),
            inference: of(REQUEST_BOUNDS),
            prompt_tokens: of(TOKEN_BOUNDS),
            generation_tokens: of(TOKEN_BOUNDS),
            finished: [0; 2],
            aborted: 0,
            failed: 0,
        }
    }
}

/// What was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Generate,
    Embed,
}

/// How it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    Success,
    Failed,
    /// By its caller.
    Cancelled,
}

/// One request that has ended.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Operation {
    pub(crate) kind: Kind,
    pub(crate) outcome: Outcome,
    pub(crate) started: Instant,
    pub(crate) ended: Instant,
    /// Made by it.
    pub(crate) tokens: usize,
    /// Of its prompt, and found in the cache.
    pub(crate) cached_tokens: usize,
    pub(crate) first_token_ms: Option<f64>,
}

impl Operation {
    pub(crate) fn total_ms(&self) -> f64 {
        millis(self.ended.saturating_duration_since(self.started))
    }

    /// Mean time between two tokens.
    pub(crate) fn per_token_ms(&self) -> Option<f64> {
        let decode_ms = self.total_ms() - self.first_token_ms?;
        (self.tokens > 1).then(|| decode_ms / (self.tokens - 1) as f64)
    }
}

pub(crate) fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// Everything that is counted here. Locked for an addition, or for a copy.
pub(crate) struct Metrics {
    state: Mutex<State>,
}

struct State {
    models: Vec<ModelMetrics>,
    operations: VecDeque<Operation>,
    active: usize,
    /// Generations that found the beginning of their prompt in the prefix cache, and those that did not.
    hits: u64,
    misses: u64,
    /// Over all that ever ended.
    num_ended: u64,
    total_ms: f64,
    /// Operations that ended before are not shown.
    cleared: Option<Instant>,
}

impl Metrics {
    pub(crate) fn new(num_models: usize) -> Metrics {
        let state = State {
            models: vec![ModelMetrics::default(); num_models],
            operations: VecDeque::new(),
            active: 0,
            hits: 0,
            misses: 0,
            num_ended: 0,
            total_ms: 0.0,
            cleared: None,
        };
        Metrics { state: Mutex::new(state) }
    }

    /// An operation begins; it must be given to [`Metrics::end`].
    pub(crate) fn begin(&self) {
        self.lock().active += 1;
    }

    /// An operation has ended. `waited`: before the engine got it; `summary` and `reasons` of one that succeeded.
    pub(crate) fn end(
        &self,
        model: usize,
        operation: Operation,
        waited: Duration,
        success: Option<(&Summary, &[FinishReason])>,
    ) {
        let mut state = self.lock();
        state.active -= 1;
        state.num_ended += 1;
        state.total_ms += operation.total_ms();
        if state.operations.len() == MAX_OPERATIONS {
            state.operations.pop_front();
        }
        state.operations.push_back(operation);
        if operation.kind == Kind::Generate {
            if operation.outcome == Outcome::Success {
                let counter = if operation.cached_tokens > 0 { &mut state.hits } else { &mut state.misses };
                *counter += 1;
            }
            let metrics = &mut state.models[model];
            match (operation.outcome, success) {
                (Outcome::Success, Some((summary, reasons))) => metrics.add(summary, reasons, waited),
                (Outcome::Cancelled, _) => metrics.aborted += 1,
                _ => metrics.failed += 1,
            }
        }
    }

    pub(crate) fn model(&self, model: usize) -> ModelMetrics {
        self.lock().models[model].clone()
    }

    /// Operations that are going on.
    pub(crate) fn num_active(&self) -> usize {
        self.lock().active
    }

    /// Generations that found the beginning of their prompt in the prefix cache, and those that did not.
    pub(crate) fn prefix_hits(&self) -> (u64, u64) {
        let state = self.lock();
        (state.hits, state.misses)
    }

    /// Mean time of everything that ever ended, milliseconds.
    pub(crate) fn average_ms(&self) -> f64 {
        let state = self.lock();
        if state.num_ended == 0 { 0.0 } else { state.total_ms / state.num_ended as f64 }
    }

    /// Operations that ended in the last `window`, oldest first; all that are kept without one.
    pub(crate) fn operations(&self, window: Option<Duration>, now: Instant) -> Vec<Operation> {
        let state = self.lock();
        let from = window.and_then(|window| now.checked_sub(window)).max(state.cleared);
        state.operations.iter().filter(|operation| from.is_none_or(|from| operation.ended >= from)).copied().collect()
    }

    /// When the operations were last forgotten.
    pub(crate) fn cleared(&self) -> Option<Instant> {
        self.lock().cleared
    }

    /// Forgets the operations; the histograms, which only grow, stay.
    pub(crate) fn clear(&self, now: Instant) {
        let mut state = self.lock();
        state.operations.clear();
        state.cleared = Some(now);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ModelMetrics {
    fn add(&mut self, summary: &Summary, reasons: &[FinishReason], waited: Duration) {
        let (usage, times) = (summary.usage, summary.timings);
        let waited_ms = millis(waited);
        self.queue.add((waited_ms + times.queue_ms) / 1e3);
        self.prefill.add(times.prompt_ms / 1e3);
        self.decode.add(times.decode_ms / 1e3);
        self.inference.add((times.prompt_ms + times.decode_ms) / 1e3);
        self.end_to_end.add((waited_ms + times.total_ms) / 1e3);
        self.prompt_tokens.add(usage.prompt_tokens as f64);
        self.generation_tokens.add(usage.completion_tokens as f64);
        if usage.completion_tokens > 0 {
            self.first_token.add((waited_ms + times.first_token_ms) / 1e3);
        }
        // Choices grow side by side: the time between two tokens is that of one of them.
        let tokens_of_one = usage.completion_tokens as f64 / reasons.len().max(1) as f64;
        if tokens_of_one > 1.0 {
            self.inter_token.add(times.decode_ms / 1e3 / (tokens_of_one - 1.0));
        }
        for reason in reasons {
            self.finished[usize::from(*reason == FinishReason::Length)] += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A value lies in the first bucket whose bound it does not exceed, and all buckets above count it too.
    #[test]
    fn buckets_are_cumulative() {
        let mut histogram = Histogram::new(&[1.0, 2.0]);
        [0.5, 1.0, 1.5, 9.0].into_iter().for_each(|value| histogram.add(value));
        assert_eq!(histogram.cumulative().collect::<Vec<_>>(), [2, 3, 4]);
        assert_eq!(histogram.sum, 12.0);
    }

    /// Operations are counted once by their ends, bounded, shown by window, and forgotten on demand.
    #[test]
    fn operations_are_bounded_and_windowed() {
        let (metrics, start) = (Metrics::new(1), Instant::now());
        let at = |second: u64| start + Duration::from_secs(second);
        let operation = |second| Operation {
            kind: Kind::Generate,
            outcome: Outcome::Cancelled,
            started: at(second),
            ended: at(second + 1),
            tokens: 3,
            cached_tokens: 0,
            first_token_ms: Some(500.0),
        };
        for second in 0..(MAX_OPERATIONS as u64 + 5) {
            metrics.begin();
            metrics.end(0, operation(second), Duration::ZERO, None);
        }
        let now = at(MAX_OPERATIONS as u64 + 5);
        assert_eq!(metrics.operations(None, now).len(), MAX_OPERATIONS);
        assert_eq!(metrics.operations(Some(Duration::from_secs(9)), now).len(), 10);
        assert_eq!((metrics.num_active(), metrics.average_ms()), (0, 1000.0));
        assert_eq!(metrics.model(0).aborted, MAX_OPERATIONS as u64 + 5);
        assert_eq!(operation(0).per_token_ms(), Some(250.0));
        metrics.clear(now);
        assert!(metrics.operations(None, now).is_empty());
    }
}
