//! How long steps take, and since when one runs: enough to tell a step that is slow from a device that hangs. Written by the
//! worker at both ends of a step, read by whoever watches the engine.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::stats::RunningStep;

/// Steps are told apart by their tokens' powers of two; the last class holds all that are larger.
const NUM_CLASSES: usize = 21;
/// A longer step is forgotten by this part with each shorter one of its class, so that one bad moment is not for ever.
const FORGET_PART: u32 = 16;

/// Shared by the worker and the engine's handles.
pub(crate) struct Pace {
    /// Locked for some arithmetic, twice a step.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Tokens of the oldest step that runs, and when it began.
    running: Option<(usize, Instant)>,
    /// The longest of late, by class.
    longest: [Option<Duration>; NUM_CLASSES],
}

impl Pace {
    pub(crate) fn new() -> Pace {
        Pace { state: Mutex::default() }
    }

    /// A step of so many tokens runs since `start`.
    pub(crate) fn begin(&self, num_tokens: usize, start: Instant) {
        self.lock().running = Some((num_tokens, start));
    }

    /// It has ended. What failed teaches nothing about the next one.
    pub(crate) fn end(&self, end: Instant, is_whole: bool) {
        let mut state = self.lock();
        if let (Some((num_tokens, start)), true) = (state.running.take(), is_whole) {
            let took = end.saturating_duration_since(start);
            let longest = &mut state.longest[class_of(num_tokens)];
            *longest = Some(longest.map_or(took, |longest| took.max(longest - longest / FORGET_PART)));
        }
    }

    /// The step that runs now.
    pub(crate) fn running(&self, now: Instant) -> Option<RunningStep> {
        let state = self.lock();
        let (num_tokens, start) = state.running?;
        let expected = state.expected(class_of(num_tokens));
        Some(RunningStep { num_tokens, elapsed: now.saturating_duration_since(start), expected })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// What a step of this class should take at most: what such steps took; else a smaller one's time for as many times
    /// its tokens, since together they are computed no slower than one by one; else a larger one's.
    fn expected(&self, class: usize) -> Option<Duration> {
        let smaller = (0..=class).rev().find_map(|known| Some(self.longest[known]? * (1 << (class - known))));
        smaller.or_else(|| self.longest[class..].iter().find_map(|known| *known))
    }
}

fn class_of(num_tokens: usize) -> usize {
    (num_tokens.max(1).ilog2() as usize).min(NUM_CLASSES - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A step is expected to take what its like took of late, or what smaller ones would in its place; without any, nothing is
    /// known. What failed teaches nothing, and what was slow once is forgotten.
    #[test]
    fn steps_are_expected_by_what_was_measured() {
        let (pace, start) = (Pace::new(), Instant::now());
        let ms = Duration::from_millis;
        let expected = |num_tokens| {
            pace.begin(num_tokens, start);
            let running = pace.running(start + ms(7)).expect("it runs");
            assert_eq!((running.num_tokens, running.elapsed), (num_tokens, ms(7)));
            pace.end(start + ms(7), false);
            running.expected
        };
        assert_eq!(pace.running(start), None);
        assert_eq!(expected(512), None);
        let took = |num_tokens, time| {
            pace.begin(num_tokens, start);
            pace.end(start + time, true);
            assert_eq!(pace.running(start), None);
        };
        took(300, ms(900));
        assert_eq!((expected(256), expected(511)), (Some(ms(900)), Some(ms(900))), "of its class");
        assert_eq!((expected(1_024), expected(1)), (Some(ms(3_600)), Some(ms(900))), "scaled up, never down");
        took(1, ms(20));
        assert_eq!((expected(1), expected(2), expected(256)), (Some(ms(20)), Some(ms(40)), Some(ms(900))));
        took(1, ms(1_600));
        took(1, ms(20));
        assert_eq!(expected(1), Some(ms(1_500)), "one bad moment");
        (0..100).for_each(|_| took(1, ms(20)));
        assert_eq!(expected(1), Some(ms(20)));
        assert_eq!(expected(usize::MAX), Some(ms(900) * (1 << 12)));
    }
}
