//! Whether a store works: one that keeps failing is left alone for a while. Time is an argument, microseconds on any clock
//! that does not run backwards.

/// Faults in a row after which a store is left alone.
pub const MAX_FAULTS: u32 = 5;
/// How long it is left alone at first; each trial that fails doubles it.
pub const FIRST_REST_US: u64 = 1_000_000;
/// How long it is left alone at most: a disk that is no longer full is in use again after this.
pub const MAX_REST_US: u64 = 30_000_000;

/// Leaves a store alone that keeps failing, and tries it again after a while: a circuit breaker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Breaker {
    faults_in_a_row: u32,
    rests_until_us: Option<u64>,
    next_rest_us: u64,
    num_rests: u64,
}

impl Default for Breaker {
    fn default() -> Self {
        Breaker { faults_in_a_row: 0, rests_until_us: None, next_rest_us: FIRST_REST_US, num_rests: 0 }
    }
}

impl Breaker {
    /// Whether the store may be asked now: it works, or its rest is over and it is to be tried.
    pub fn allows(&self, now_us: u64) -> bool {
        self.rests_until_us.is_none_or(|until_us| now_us >= until_us)
    }
    /// Whether it has rested, and what is asked of it now says whether it works again.
    pub fn is_on_trial(&self) -> bool {
        self.rests_until_us.is_some()
    }
    /// A call worked.
    pub fn succeeded(&mut self, now_us: u64) {
        if self.allows(now_us) {
            *self = Breaker { num_rests: self.num_rests, ..Breaker::default() };
        }
    }
    /// A call failed. True: the store rests from now on. What ends while it rests was asked before, and says nothing new.
    pub fn failed(&mut self, now_us: u64) -> bool {
        if !self.allows(now_us) {
            return false;
        }
        self.faults_in_a_row += 1;
        // One that has rested has one trial.
        let rests = self.rests_until_us.is_some() || self.faults_in_a_row >= MAX_FAULTS;
        if rests {
            self.rests_until_us = Some(now_us + self.next_rest_us);
            self.next_rest_us = (2 * self.next_rest_us).min(MAX_REST_US);
            self.num_rests += 1;
        }
        rests
    }
    /// How often the store was left alone.
    pub fn num_rests(&self) -> u64 {
        self.num_rests
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A store is left alone after five faults in a row, not after five in all; then it has one trial at a time, after
    /// rests that double up to 30 seconds; a success ends all that.
    #[test]
    fn failing_tier_rests() {
        let mut breaker = Breaker::default();
        for _ in 0..3 {
            (1..MAX_FAULTS).for_each(|_| assert!(!breaker.failed(0)));
            breaker.succeeded(0);
        }
        (1..MAX_FAULTS).for_each(|_| assert!(!breaker.failed(7)));
        assert!(breaker.allows(7) && breaker.failed(7) && !breaker.allows(8));
        let mut now_us = 7;
        for rest_us in [1, 2, 4, 8, 16, 30, 30].map(|seconds| seconds * 1_000_000) {
            assert!(!breaker.allows(now_us + rest_us - 1), "{rest_us}");
            now_us += rest_us;
            assert!(breaker.allows(now_us) && breaker.failed(now_us));
        }
        assert_eq!(breaker.num_rests(), 8);
        now_us += MAX_REST_US;
        breaker.succeeded(now_us);
        assert!(breaker.allows(now_us) && !breaker.failed(now_us));
    }

    /// Of many calls that were given before a rest, and end in it, none makes it longer or ends it.
    #[test]
    fn calls_of_before_do_not_count() {
        let mut breaker = Breaker::default();
        let rests: Vec<bool> = (0..MAX_FAULTS).map(|_| breaker.failed(0)).collect();
        assert_eq!(rests.last(), Some(&true));
        (1..20).for_each(|now_us| assert!(!breaker.failed(now_us)));
        breaker.succeeded(20);
        assert!(!breaker.allows(FIRST_REST_US - 1) && breaker.allows(FIRST_REST_US));
        assert_eq!(breaker.num_rests(), 1);
    }
}
