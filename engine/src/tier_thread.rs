//! The thread of a tier: does the jobs that the worker gives it, one after the other, so that nobody waits for a disk or a
//! network where tokens are made. It decides nothing ([`kv_cache::tiers`](crate::kv_cache::tiers) does) and answers through
//! the worker's own commands, which wakes it.
//!
//! Invariant: each job and each flush has exactly one answer, in their order, also when the tier panics.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Instant;

use crate::command::{Command, TierAnswer};
use crate::error::{Error, Result, panic_text};
use crate::kv_cache::tiers::{Done, Fault, Job, Outcome, TierId, TierStore};

/// What the thread is asked to do.
enum Work {
    Job(Job),
    Flush,
}

/// The worker's end of a tier's thread.
pub(crate) struct TierThread {
    id: TierId,
    work: Sender<Work>,
    thread: JoinHandle<()>,
}

impl TierThread {
    /// Starts the thread; its answers go to `commands`.
    pub(crate) fn spawn(store: Box<dyn TierStore>, commands: Sender<Command>) -> Result<TierThread> {
        let id = store.id();
        let (work, todo) = channel();
        let name = format!("ns-llm-{}", id.name());
        let thread = std::thread::Builder::new()
            .name(name.clone())
            .spawn(move || run(store, &todo, &commands))
            .map_err(|e| Error::Internal { reason: format!("thread {name} could not be started: {e}") })?;
        Ok(TierThread { id, work, thread })
    }

    /// Whose thread it is.
    pub(crate) fn id(&self) -> TierId {
        self.id
    }
    /// Gives it a job; never waits.
    pub(crate) fn give(&self, job: Job) {
        // A thread that is gone answers nothing, and its tier counts as hanging.
        let _ = self.work.send(Work::Job(job));
    }
    /// Asks for a flush after the jobs that were given before.
    pub(crate) fn flush(&self) {
        let _ = self.work.send(Work::Flush);
    }

    /// Ends the thread. `is_idle`: it has answered everything, so its end is near and is waited for: then the tier's lock is
    /// free. A tier that hangs is left to itself.
    pub(crate) fn end(self, is_idle: bool) {
        drop(self.work);
        if is_idle {
            // It catches panics.
            let _ = self.thread.join();
        }
    }
}

fn run(mut store: Box<dyn TierStore>, todo: &Receiver<Work>, commands: &Sender<Command>) {
    let id = store.id();
    for work in todo {
        let answer = match work {
            Work::Job(job) => {
                let start = Instant::now();
                let outcome = catch_unwind(AssertUnwindSafe(|| store.run(job)))
                    .unwrap_or_else(|panic| Outcome::Fault(panicked(panic.as_ref())));
                let lost = catch_unwind(AssertUnwindSafe(|| store.take_lost())).unwrap_or_default();
                let elapsed_us = start.elapsed().as_micros() as u64;
                TierAnswer::Done { id, done: Done { outcome, elapsed_us }, lost }
            }
            Work::Flush => {
                let flushed = catch_unwind(AssertUnwindSafe(|| store.flush()));
                TierAnswer::Flushed { id, result: flushed.unwrap_or_else(|panic| Err(panicked(panic.as_ref()))) }
            }
        };
        if commands.send(Command::Tier(answer)).is_err() {
            return;
        }
    }
}

/// A defect of this library, which a tier may not pass on.
fn panicked(panic: &(dyn std::any::Any + Send)) -> Fault {
    Fault::Io { operation: "serve a tier", kind: std::io::ErrorKind::Other, reason: panic_text(panic) }
}
