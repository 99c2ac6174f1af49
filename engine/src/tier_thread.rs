//! The thread of a tier: does the jobs that the worker gives it, one after the other, so that nobody waits for a disk or a
//! network where tokens are made. It decides nothing ([`kv_cache::tiers`](crate::kv_cache::tiers) does), but that a read goes
//! before all else that waits: a sequence waits for it. It answers through the worker's own commands, which wakes it.
//!
//! Invariant: each job and each flush has exactly one answer, also when the tier panics; reads in their order, and all
//! else in its own.

mod stores;

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Instant;

use crate::command::{Command, TierAnswer};
use crate::error::{Error, Result, panic_text};
use crate::kv_cache::tiers::{Done, Job, JobId, Outcome, TierStore};
use crate::storage::{Fault, TierId};

/// What the thread is asked to do.
enum Work {
    Job(JobId, Job),
    Flush,
}

/// What waits to be done.
#[derive(Default)]
struct Waiting {
    reads: VecDeque<Work>,
    rest: VecDeque<Work>,
}

impl Waiting {
    /// What is to be done next; waits for it. `None`: nothing will come any more.
    fn next(&mut self, todo: &Receiver<Work>) -> Option<Work> {
        if self.reads.is_empty() && self.rest.is_empty() {
            self.take(todo.recv().ok()?);
        }
        todo.try_iter().for_each(|work| self.take(work));
        self.reads.pop_front().or_else(|| self.rest.pop_front())
    }

    fn take(&mut self, work: Work) {
        match &work {
            Work::Job(_, Job::Read(_)) => self.reads.push_back(work),
            _ => self.rest.push_back(work),
        }
    }
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
    pub(crate) fn give(&self, id: JobId, job: Job) {
        // A thread that is gone answers nothing, and its tier counts as hanging.
        let _ = self.work.send(Work::Job(id, job));
    }
    /// Asks for a flush after the writes that were given before.
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
    let mut waiting = Waiting::default();
    while let Some(work) = waiting.next(todo) {
        let answer = match work {
            Work::Job(job_id, job) => {
                let start = Instant::now();
                let outcome = catch_unwind(AssertUnwindSafe(|| store.run(job)))
                    .unwrap_or_else(|panic| Outcome::Fault(panicked(panic.as_ref())));
                let lost = catch_unwind(AssertUnwindSafe(|| store.take_lost())).unwrap_or_default();
                let elapsed_us = start.elapsed().as_micros() as u64;
                TierAnswer::Done { id, job: job_id, done: Done { outcome, elapsed_us }, lost }
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::mpsc::SyncSender;

    use super::*;
    use crate::storage::{LayoutId, RecordKey};

    /// Does a job when it is allowed to.
    struct Slow {
        begun: SyncSender<()>,
        may_end: Receiver<()>,
    }

    impl TierStore for Slow {
        fn id(&self) -> TierId {
            TierId::Disk
        }
        fn run(&mut self, job: Job) -> Outcome {
            self.begun.send(()).expect("the test listens");
            self.may_end.recv().expect("the test allows it");
            match job {
                Job::Read(_) => Outcome::Found(Arc::new([])),
                _ => Outcome::Stored,
            }
        }
        fn take_lost(&mut self) -> Vec<RecordKey> {
            Vec::new()
        }
        fn flush(&mut self) -> std::result::Result<(), Fault> {
            Ok(())
        }
    }

    /// A read waits for the one job that is being done, and for none of the writes that were given before it; a flush for all
    /// of these.
    #[test]
    fn reads_go_before_writes() {
        let (commands, answers) = channel();
        let (begun, has_begun) = std::sync::mpsc::sync_channel(0);
        let (allow, may_end) = channel();
        let thread = TierThread::spawn(Box::new(Slow { begun, may_end }), commands).expect("starts");
        let key = RecordKey { content: [1; 32], layout: LayoutId([2; 32]) };
        thread.give(JobId(0), Job::Write(key, Arc::new([]), [0; 32]));
        has_begun.recv().expect("it works");
        (1..5).for_each(|id| thread.give(JobId(id), Job::Write(key, Arc::new([]), [0; 32])));
        thread.flush();
        [5, 6].into_iter().for_each(|id| thread.give(JobId(id), Job::Read(key)));
        for idx in 0..7 {
            if idx > 0 {
                has_begun.recv().expect("it works");
            }
            allow.send(()).expect("it waits");
        }
        thread.end(true);
        let order: Vec<Option<u64>> = answers
            .iter()
            .map(|answer| match answer {
                Command::Tier(TierAnswer::Done { job, .. }) => Some(job.0),
                _ => None,
            })
            .collect();
        assert_eq!(order, [Some(0), Some(5), Some(6), Some(1), Some(2), Some(3), Some(4), None]);
    }
}
