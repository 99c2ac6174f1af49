//! The worker's dealings with the threads of the tiers: gives them the jobs that the tiers' state machine wants done, and
//! tells it what became of them. Nothing here waits.

use std::collections::VecDeque;
use std::sync::mpsc::SyncSender;

use crate::command::TierAnswer;
use crate::error::{Error, Result};
use crate::kv_cache::tiers::{ClearState, Tiers};
use crate::storage::{Fault, TierId};
use crate::tier_thread::TierThread;

/// The threads, and who waits for a flush.
pub(super) struct Tiering {
    threads: Vec<TierThread>,
    /// In the order in which they came; only the first is under way.
    flushes: VecDeque<Flush>,
    /// Who waits until the tiers have given everything up.
    clears: Vec<SyncSender<Result<()>>>,
}

/// Somebody waits until what was queued for writing when he asked is on the medium.
struct Flush {
    reply: SyncSender<Result<()>>,
    /// Writes that had been queued by then, by tier.
    num_queued: Vec<(TierId, u64)>,
    /// Whether the tiers have been asked; then, how many have not answered.
    num_unanswered: Option<usize>,
    result: Result<()>,
}

impl Flush {
    /// The first failure is told.
    fn fail(&mut self, error: Error) {
        if self.result.is_ok() {
            self.result = Err(error);
        }
    }

    /// What a tier was to have and has not is a failure too. The first one is told, others by the next flush.
    fn note_unstored(&mut self, tiers: &mut Tiers) {
        let ids: Vec<TierId> = tiers.ids().collect();
        if let Some((id, (count, reason))) = ids.into_iter().find_map(|id| Some((id, tiers.take_unstored(id)?))) {
            self.fail(Error::NotStored { tier: id.name(), count, what: "KV blocks", reason });
        }
    }
}

impl Tiering {
    pub(super) fn new(threads: Vec<TierThread>) -> Self {
        Tiering { threads, flushes: VecDeque::new(), clears: Vec::new() }
    }

    /// Gives each tier what it is to do next.
    pub(super) fn drive(&mut self, tiers: &mut Tiers, now_us: u64) {
        for thread in &self.threads {
            while let Some((id, job)) = tiers.next_job(thread.id(), now_us) {
                thread.give(id, job);
            }
        }
        let Some(flush) = self.flushes.front_mut() else { return };
        let is_written = |&(id, num_queued): &(TierId, u64)| tiers.num_writes_settled(id) >= num_queued;
        if flush.num_unanswered.is_none() && flush.num_queued.iter().all(is_written) {
            self.threads.iter().for_each(TierThread::flush);
            flush.num_unanswered = Some(self.threads.len());
            flush.note_unstored(tiers);
        }
        self.settle_flush();
    }

    /// Takes what a tier's thread has to say.
    pub(super) fn answer(&mut self, tiers: &mut Tiers, answer: TierAnswer, now_us: u64) {
        match answer {
            TierAnswer::Done { id, job, done, lost } => {
                tiers.complete(id, job, done, now_us);
                tiers.lost(id, lost);
                self.settle_clears(Some(tiers));
            }
            TierAnswer::Flushed { id, result } => {
                let flush = self.flushes.front_mut().expect("one that was asked for");
                flush.num_unanswered = flush.num_unanswered.map(|num| num - 1);
                if let Err(fault) = result {
                    flush.fail(storage_error(id, &fault));
                }
                self.settle_flush();
            }
        }
    }

    /// Begins a flush; without tiers there is nothing to wait for.
    pub(super) fn flush(&mut self, tiers: Option<&mut Tiers>, reply: SyncSender<Result<()>>) {
        let Some(tiers) = tiers else {
            // Whoever asked may have gone.
            let _ = reply.send(Ok(()));
            return;
        };
        let num_queued = self.threads.iter().map(|it| (it.id(), tiers.num_writes_queued(it.id()))).collect();
        self.flushes.push_back(Flush { reply, num_queued, num_unanswered: None, result: Ok(()) });
    }

    /// Somebody waits until the tiers have given everything up.
    pub(super) fn clear(&mut self, reply: SyncSender<Result<()>>) {
        self.clears.push(reply);
    }

    /// Tells those who wait, when no tier is still to do it.
    pub(super) fn settle_clears(&mut self, tiers: Option<&Tiers>) {
        let states = || tiers.into_iter().flat_map(|tiers| tiers.ids().map(|id| (id, tiers.clear_state(id))));
        if states().any(|(_, state)| *state == ClearState::Pending) {
            return;
        }
        let failure = states().find_map(|(id, state)| match state {
            ClearState::Failed(fault) => Some(storage_error(id, fault)),
            _ => None,
        });
        for reply in self.clears.drain(..) {
            // Whoever asked may have gone.
            let _ = reply.send(failure.clone().map_or(Ok(()), Err));
        }
    }

    fn settle_flush(&mut self) {
        while self.flushes.front().is_some_and(|flush| flush.num_unanswered == Some(0)) {
            if let Some(flush) = self.flushes.pop_front() {
                // Whoever asked may have gone.
                let _ = flush.reply.send(flush.result);
            }
        }
    }

    /// Whether the tiers have done all that there was to do.
    pub(super) fn is_idle(&self, tiers: &Tiers) -> bool {
        self.flushes.is_empty() && self.threads.iter().all(|thread| tiers.is_idle(thread.id()))
    }

    /// Ends the threads; whoever waits for a flush is told `last`.
    pub(super) fn end(self, is_idle: bool, last: &Error) {
        for reply in self.flushes.into_iter().map(|flush| flush.reply).chain(self.clears) {
            let _ = reply.send(Err(last.clone()));
        }
        self.threads.into_iter().for_each(|thread| thread.end(is_idle));
    }
}

fn storage_error(id: TierId, fault: &Fault) -> Error {
    Error::Storage { tier: id.name(), reason: fault.to_string() }
}
