//! What was asked of this server: how it ended, and the newest operations one by one, for the performance routes. Bounded;
//! counts of tokens and blocks, and all histograms, are the engine's own.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ns_llm::FinishReason;

use crate::options::MAX_OPERATIONS;

/// How the generations of one model ended. Their times are in the engine's own histograms.
#[derive(Debug, Clone, Default)]
pub(crate) struct ModelMetrics {
    /// Choices, by why they ended: "stop", "length".
    pub(crate) finished: [u64; 2],
    /// Given up by their callers; ended in an error.
    pub(crate) aborted: u64,
    pub(crate) failed: u64,
}

/// What was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Generate,
    Embed,
}

/// How it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OperationOutcome {
    Success,
    Failed,
    /// By its caller.
    Cancelled,
}

/// One request that has ended.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Operation {
    pub(crate) kind: Kind,
    pub(crate) outcome: OperationOutcome,
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

    /// An operation has ended. `reasons`: of the choices of one that succeeded.
    pub(crate) fn end(&self, model: usize, operation: Operation, reasons: &[FinishReason]) {
        let mut state = self.lock();
        state.active -= 1;
        state.num_ended += 1;
        state.total_ms += operation.total_ms();
        if state.operations.len() == MAX_OPERATIONS {
            state.operations.pop_front();
        }
        state.operations.push_back(operation);
        if operation.kind == Kind::Generate {
            if operation.outcome == OperationOutcome::Success {
                let counter = if operation.cached_tokens > 0 { &mut state.hits } else { &mut state.misses };
                *counter += 1;
            }
            let metrics = &mut state.models[model];
            match operation.outcome {
                OperationOutcome::Success => {
                    for reason in reasons {
                        metrics.finished[usize::from(*reason == FinishReason::Length)] += 1;
                    }
                }
                OperationOutcome::Cancelled => metrics.aborted += 1,
                OperationOutcome::Failed => metrics.failed += 1,
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

    /// Forgets the operations; what only grows stays.
    pub(crate) fn clear(&self, now: Instant) {
        let mut state = self.lock();
        state.operations.clear();
        state.cleared = Some(now);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Operations are counted once by their ends, bounded, shown by window, and forgotten on demand.
    #[test]
    fn operations_are_bounded_and_windowed() {
        let (metrics, start) = (Metrics::new(1), Instant::now());
        let at = |second: u64| start + Duration::from_secs(second);
        let operation = |second| Operation {
            kind: Kind::Generate,
            outcome: OperationOutcome::Cancelled,
            started: at(second),
            ended: at(second + 1),
            tokens: 3,
            cached_tokens: 0,
            first_token_ms: Some(500.0),
        };
        for second in 0..(MAX_OPERATIONS as u64 + 5) {
            metrics.begin();
            metrics.end(0, operation(second), &[]);
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
