//! How fast a tier is, and computing: measured as they are used; time is an argument, microseconds on any clock that does not
//! run backwards.

use crate::storage::breaker::MAX_REST_US;

/// Weight of the newest measurement in a running mean.
const NEWEST_WEIGHT: f64 = 0.25;

/// A rate, as a running mean of amounts per second.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Rate {
    per_second: Option<f64>,
    measured_at_us: u64,
}

impl Rate {
    /// `amount` took `elapsed_us`.
    pub fn measure(&mut self, amount: u64, elapsed_us: u64, now_us: u64) {
        let newest = amount as f64 * 1e6 / elapsed_us.max(1) as f64;
        let mean = self.per_second.map_or(newest, |mean| mean + NEWEST_WEIGHT * (newest - mean));
        *self = Rate { per_second: Some(mean), measured_at_us: now_us };
    }
    /// Amounts per second; `None`: never measured.
    pub fn per_second(&self) -> Option<f64> {
        self.per_second
    }
    /// How long `amount` would take, microseconds.
    pub fn estimate_us(&self, amount: u64) -> Option<f64> {
        self.per_second.map(|per_second| amount as f64 * 1e6 / per_second.max(1e-9))
    }
    /// The last measurement is so old that it may not hold any more.
    pub fn is_stale(&self, now_us: u64) -> bool {
        now_us.saturating_sub(self.measured_at_us) >= MAX_REST_US
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A rate is what was measured, follows what changes, and says nothing before.
    #[test]
    fn rate_is_measured() {
        let mut rate = Rate::default();
        assert_eq!((rate.per_second(), rate.estimate_us(1)), (None, None));
        rate.measure(1_000, 1_000_000, 5);
        assert_eq!((rate.per_second(), rate.estimate_us(500)), (Some(1_000.0), Some(500_000.0)));
        (0..40).for_each(|_| rate.measure(1_000, 100_000, 6));
        assert!(rate.per_second().is_some_and(|rate| (9_990.0..10_000.0).contains(&rate)), "{rate:?}");
        assert!(!rate.is_stale(5 + MAX_REST_US) && rate.is_stale(6 + MAX_REST_US));
        rate.measure(1, 0, 7);
        assert!(rate.per_second().is_some_and(f64::is_finite));
    }
}
