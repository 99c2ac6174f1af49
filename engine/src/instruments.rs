//! What a running engine shows of itself. Written by its threads, read by its handles; nobody waits for more than a copy.

use std::sync::{Mutex, PoisonError};

use crate::stats::{Meters, Pace, Stats};
use crate::trace::Tracer;

/// One of each, shared by intake, worker and the engine's handles.
pub(crate) struct Instruments {
    /// Written by the worker after each turn of its loop.
    stats: Mutex<Stats>,
    pub(crate) meters: Meters,
    pub(crate) pace: Pace,
    pub(crate) tracer: Tracer,
}

impl Instruments {
    pub(crate) fn new() -> Instruments {
        Instruments { stats: Mutex::default(), meters: Meters::new(), pace: Pace::new(), tracer: Tracer::default() }
    }

    /// Takes the worker's new counts; they have no histograms.
    pub(crate) fn publish(&self, stats: Stats) {
        *self.stats.lock().unwrap_or_else(PoisonError::into_inner) = stats;
    }

    /// All counts, with their histograms.
    pub(crate) fn stats(&self) -> Stats {
        let stats = self.stats.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Stats { histograms: self.meters.read(), ..stats }
    }
}
