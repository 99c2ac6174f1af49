//! What a stage gave, added up while it runs: every time in a histogram of three significant figures, whose size does not
//! depend on how many there are.

use std::collections::BTreeMap;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde_json::{Value, json};

use super::target::{Failure, Sample};

/// Longest time told apart, microseconds: one hour.
const MAX_MICROS: u64 = 3_600_000_000;
const SIGNIFICANT_FIGURES: u8 = 3;

/// Times of one kind.
pub(crate) struct Times(Histogram<u64>);

impl Times {
    fn new() -> Times {
        Times(Histogram::new_with_bounds(1, MAX_MICROS, SIGNIFICANT_FIGURES).expect("bounds that a histogram can have"))
    }

    fn add(&mut self, time: Duration) {
        // Beyond the longest all are the longest.
        self.0.saturating_record((time.as_nanos() as u64).div_ceil(1_000));
    }

    pub(crate) fn ms(&self, quantile: f64) -> f64 {
        self.0.value_at_quantile(quantile) as f64 / 1e3
    }

    /// Milliseconds; nothing when there are none.
    fn report(&self) -> Value {
        if self.0.is_empty() {
            return Value::Null;
        }
        let rounded = |ms: f64| (ms * 1e3).round() / 1e3;
        json!({
            "p50": rounded(self.ms(0.5)),
            "p95": rounded(self.ms(0.95)),
            "p99": rounded(self.ms(0.99)),
            "mean": rounded(self.0.mean() / 1e3),
            "max": rounded(self.0.max() as f64 / 1e3),
        })
    }
}

/// Everything about the requests of a stage.
pub(crate) struct Figures {
    first_token: Times,
    between_tokens: Times,
    pub(crate) whole: Times,
    /// Of those that told what their engine took: the rest of their time, from sending on.
    overhead: Times,
    start_delay: Times,
    pub(crate) succeeded: u64,
    failures: BTreeMap<Failure, u64>,
    prompt_tokens: u64,
    completion_tokens: u64,
    cached_tokens: u64,
}

impl Figures {
    pub(crate) fn new() -> Figures {
        Figures {
            first_token: Times::new(),
            between_tokens: Times::new(),
            whole: Times::new(),
            overhead: Times::new(),
            start_delay: Times::new(),
            succeeded: 0,
            failures: BTreeMap::new(),
            prompt_tokens: 0,
            completion_tokens: 0,
            cached_tokens: 0,
        }
    }

    pub(crate) fn add(&mut self, outcome: &Result<Sample, Failure>) {
        let sample = match outcome {
            Ok(sample) => sample,
            Err(failure) => {
                *self.failures.entry(*failure).or_default() += 1;
                return;
            }
        };
        self.succeeded += 1;
        sample.first_token.into_iter().for_each(|time| self.first_token.add(time));
        sample.gaps.iter().for_each(|&gap| self.between_tokens.add(gap));
        self.whole.add(sample.whole);
        if let Some(engine) = sample.engine {
            self.overhead.add(sample.whole.saturating_sub(sample.start_delay).saturating_sub(engine));
        }
        self.start_delay.add(sample.start_delay);
        self.prompt_tokens += sample.prompt_tokens;
        self.completion_tokens += sample.completion_tokens;
        self.cached_tokens += sample.cached_tokens;
    }

    pub(crate) fn failed(&self) -> u64 {
        self.failures.values().sum()
    }

    /// Share of the requests that failed.
    pub(crate) fn failed_share(&self) -> f64 {
        self.failed() as f64 / (self.succeeded + self.failed()).max(1) as f64
    }

    pub(crate) fn report(&self, seconds: f64) -> Value {
        let per_second = |count: u64| (count as f64 / seconds.max(1e-9) * 100.0).round() / 100.0;
        let errors: serde_json::Map<String, Value> =
            self.failures.iter().map(|(failure, count)| (failure.to_string(), (*count).into())).collect();
        json!({
            "seconds": (seconds * 1e3).round() / 1e3,
            "requests": self.succeeded + self.failed(),
            "succeeded": self.succeeded,
            "failed": self.failed(),
            "errors": errors,
            "requests_per_s": per_second(self.succeeded),
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "completion_tokens": self.completion_tokens,
            "completion_tokens_per_s": per_second(self.completion_tokens),
            "tokens_per_s": per_second(self.prompt_tokens + self.completion_tokens),
            "first_token_ms": self.first_token.report(),
            "between_tokens_ms": self.between_tokens.report(),
            "whole_ms": self.whole.report(),
            "overhead_ms": self.overhead.report(),
            "start_delay_ms": self.start_delay.report(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Percentiles are those of the samples, to a thousandth, and failures are counted by kind and not among the times.
    #[test]
    fn figures_are_those_of_the_samples() {
        let mut figures = Figures::new();
        for ms in 1..=1_000 {
            let whole = Duration::from_millis(ms);
            let sample = Sample {
                whole,
                start_delay: Duration::from_millis(1),
                first_token: Some(whole / 2),
                gaps: vec![Duration::from_micros(10 * ms); 2],
                prompt_tokens: 3,
                completion_tokens: 2,
                cached_tokens: 1,
                engine: Some(whole - Duration::from_millis(1)),
            };
            figures.add(&Ok(sample));
        }
        let failures = [Failure::Status(503), Failure::Timeout, Failure::Status(503)];
        failures.into_iter().for_each(|failure| figures.add(&Err(failure)));
        let report = figures.report(10.0);
        let near = |value: &Value, expected: f64| {
            let value = value.as_f64().expect("a number");
            assert!((value / expected - 1.0).abs() < 2e-3, "{value} is not {expected}: {report}");
        };
        for (quantile, expected) in [("p50", 500.0), ("p95", 950.0), ("p99", 990.0), ("max", 1_000.0), ("mean", 500.5)]
        {
            near(&report["whole_ms"][quantile], expected);
            near(&report["first_token_ms"][quantile], expected / 2.0);
            near(&report["between_tokens_ms"][quantile], expected / 100.0);
        }
        assert_eq!(report["errors"], json!({ "status_503": 2, "timeout": 1 }));
        assert_eq!((report["requests"].as_u64(), report["failed"].as_u64()), (Some(1_003), Some(3)));
        near(&report["requests_per_s"], 100.0);
        near(&report["tokens_per_s"], 500.0);
        assert!(report["overhead_ms"]["max"].as_f64().expect("a number") < 0.01, "{report}");
        assert_eq!(Figures::new().report(1.0)["whole_ms"], Value::Null);
    }
}
