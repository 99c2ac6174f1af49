//! Whether an engine still gets on: it has work and does some of it, or it is in trouble. Seen from outside, by looking now and
//! then at what it has done; nobody waits for it here.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use ns_llm::{Engine, RunningStep};

/// Times what steps of its size took of late, after which a step hangs.
const SLOW_STEPS: u32 = 8;
/// Times [`ServerOptions::step_stall`](crate::ServerOptions::step_stall), after which an engine's first step hangs: nothing
/// tells how long it should take.
const FIRST_STEP_STALLS: u32 = 12;

/// What was seen of one engine.
pub(crate) struct Health {
    /// See [`ServerOptions::step_stall`](crate::ServerOptions::step_stall).
    step_stall: Duration,
    /// Of its steps, and of its intake. Locked for a look.
    progress: Mutex<[Progress; 2]>,
}

/// When a stage of the engine was last seen to get on.
#[derive(Default)]
struct Progress {
    /// What it had done by then.
    done: u64,
    /// Since when it has had work and done nothing, as far as was looked.
    stuck_since: Option<Instant>,
}

impl Health {
    pub(crate) fn new(step_stall: Duration) -> Health {
        Health { step_stall, progress: Mutex::default() }
    }

    /// Why it cannot be relied on now, if it cannot: it has ended, or it has work and gets nothing done.
    pub(crate) fn trouble(&self, engine: &Engine, now: Instant) -> Option<&'static str> {
        if engine.health().is_err() {
            return Some("the engine has ended");
        }
        let stats = engine.stats();
        let mut progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        let [steps, intake] = &mut *progress;
        let (has_work, is_preparing) =
            (stats.num_sequences_running + stats.num_sequences_waiting > 0, stats.num_requests_preparing > 0);
        // A step that runs has its own time; what is between steps takes none to speak of.
        let step = engine.running_step();
        let step_hangs = step.is_some_and(|step| step.elapsed >= longest_step(&step, self.step_stall));
        let is_stuck = steps.look(has_work && step.is_none(), stats.steps_total, now, self.step_stall) || step_hangs;
        let num_admitted = stats.requests_total + stats.requests_refused;
        let intake_is_stuck = intake.look(is_preparing, num_admitted, now, self.step_stall);
        match (is_stuck, intake_is_stuck) {
            (true, _) => Some("work is waiting and no step was completed"),
            (false, true) => Some("requests are waiting and none was admitted"),
            (false, false) => None,
        }
    }
}

/// What a step may take before it hangs: some are slow and healthy, on large models, long prompts and small machines.
fn longest_step(step: &RunningStep, stall: Duration) -> Duration {
    match step.expected {
        Some(expected) => stall.max(expected.saturating_mul(SLOW_STEPS)),
        None => stall.saturating_mul(FIRST_STEP_STALLS),
    }
}

impl Progress {
    /// Whether there was work at two looks, `stall` or more apart, and nothing was done between them.
    fn look(&mut self, has_work: bool, done: u64, now: Instant, stall: Duration) -> bool {
        if !has_work || done != self.done {
            self.done = done;
            self.stuck_since = has_work.then_some(now);
            return false;
        }
        let since = *self.stuck_since.get_or_insert(now);
        now.saturating_duration_since(since) >= stall
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A step hangs when it takes many times what its like took, never before the stall time; the first one has longer.
    #[test]
    fn slow_steps_are_no_hanging_ones() {
        let longest = |expected: Option<u64>| {
            let (elapsed, expected) = (Duration::ZERO, expected.map(Duration::from_secs));
            longest_step(&RunningStep { num_tokens: 512, elapsed, expected }, Duration::from_secs(10)).as_secs()
        };
        assert_eq!((longest(Some(0)), longest(Some(1)), longest(Some(30))), (10, 10, 240));
        assert_eq!(longest(None), 120);
    }

    /// Work without a step makes an engine stuck after its time; a step, or no work, begins the time anew.
    #[test]
    fn an_engine_without_steps_is_stuck() {
        let (mut progress, start) = (Progress::default(), Instant::now());
        let mut look = |has_work, done, seconds| {
            progress.look(has_work, done, start + Duration::from_secs(seconds), Duration::from_secs(10))
        };
        assert!(!look(true, 5, 0));
        assert!(!look(true, 5, 9));
        assert!(look(true, 5, 10));
        assert!(!look(true, 6, 11), "a step was made");
        assert!(!look(false, 5, 30));
        assert!(!look(true, 5, 60), "the work is new");
        assert!(look(true, 5, 70));
    }
}
