//! What a tier is asked and what it answers. [`Tiers`](super::Tiers) decides; a [`TierStore`] does.

use std::sync::Arc;

use crate::ids::OwnerKey;
use crate::storage::{Fault, RecordKey, TierId};

/// What is to be done on a tier.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Job {
    /// Read a block: [`Outcome::Found`], [`Outcome::Missing`] or [`Outcome::Fault`].
    Read(RecordKey),
    /// Store a block, which counts for an owner: [`Outcome::Stored`] or [`Outcome::Fault`].
    Write(RecordKey, Arc<[u8]>, OwnerKey),
    /// See to it that the block is never read again: [`Outcome::Done`] or [`Outcome::Fault`].
    Quarantine(RecordKey),
    /// Give up every block: [`Outcome::Done`] or [`Outcome::Fault`].
    Clear,
}

/// What became of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The block, checked.
    Found(Arc<[u8]>),
    /// It is not there.
    Missing,
    /// It is there now.
    Stored,
    /// What was asked for beside reading and writing has been done.
    Done,
    /// The tier failed.
    Fault(Fault),
}

/// Identity of a job that was given to a tier, in the order in which they were given; never used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct JobId(pub u64);

/// A job that was done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Done {
    /// What became of it.
    pub outcome: Outcome,
    /// How long it took, microseconds.
    pub elapsed_us: u64,
}

/// What does a tier's jobs, one after the other. It may wait for a disk or a network.
pub trait TierStore: Send {
    /// Which tier it is.
    fn id(&self) -> TierId;
    /// Does one job.
    fn run(&mut self, job: Job) -> Outcome;
    /// Keys of blocks that were there and are not any more, since the last call.
    fn take_lost(&mut self) -> Vec<RecordKey>;
    /// Waits until what was stored would outlive a failure of power.
    fn flush(&mut self) -> Result<(), Fault>;
}
