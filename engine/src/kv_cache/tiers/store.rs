//! What a tier is asked and what it answers: keys, jobs, outcomes, faults, counts. [`Tiers`](super::Tiers) decides; a
//! [`TierStore`] does.

use std::io;
use std::sync::Arc;

use thiserror::Error;

use super::disk::Damage;
use crate::request::CacheTier;
use crate::sequence::{BlockKey, OwnerKey};

/// Hash of what a block's bytes mean: number format, shape, order. A tier holds bytes and knows no more of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LayoutId(pub [u8; 32]);

/// What the content of a block is found by in a tier. One block may be stored in several layouts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StoredKey {
    /// Everything that the numbers depend on.
    pub block: BlockKey,
    /// How they are written down.
    pub layout: LayoutId,
}

/// Why a tier could not do what it was asked. It never leaves the engine: a fault is a miss, and is counted; so it is not
/// a variant of [`Error`](crate::Error), whose codes are promises to users.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Fault {
    /// The system refused.
    #[error("{operation}: {reason}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// What the system said, as a kind.
        kind: io::ErrorKind,
        /// The same, as text.
        reason: String,
    },
    /// What was stored is not what was written. It is forgotten.
    #[error("a stored block is damaged: {0}")]
    Damaged(#[from] Damage),
    /// The directory was written by a newer version; it is left as it is.
    #[error("format version {found} is newer than {known}")]
    NewerFormat {
        /// The newest that was found.
        found: u32,
        /// The newest that is known here.
        known: u32,
    },
    /// The block is longer than the tier was told that blocks are.
    #[error("a block of {bytes} bytes, at most {limit_bytes} are possible")]
    TooLong {
        /// Its length.
        bytes: u64,
        /// The limit.
        limit_bytes: u64,
    },
    /// Another process writes to this tier.
    #[error("another process writes to this tier")]
    ReadOnly,
    /// A server refused a command.
    #[error("{operation}: the server answers {code}")]
    Refused {
        /// The command.
        operation: &'static str,
        /// First word of the answer; the rest may repeat what was sent.
        code: String,
    },
    /// A server answered what it must not.
    #[error("{operation}: {reason}")]
    Protocol {
        /// The command.
        operation: &'static str,
        /// What is wrong with the answer.
        reason: String,
    },
    /// Nothing more could be evicted to make room.
    #[error("{held_bytes} of {budget_bytes} bytes are held by what cannot be evicted")]
    Full {
        /// What is held.
        held_bytes: u64,
        /// The budget.
        budget_bytes: u64,
    },
}

/// What a tier holds and what became of what it was asked. Counters only grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TierStats {
    /// Blocks held now.
    pub entries: u64,
    /// Bytes held now, with everything that the tier adds to them.
    pub bytes: u64,
    /// Blocks that were asked for and given.
    pub hits: u64,
    /// Bytes of them.
    pub hit_bytes: u64,
    /// Blocks that were asked for and not there.
    pub misses: u64,
    /// Blocks that were taken in.
    pub stored: u64,
    /// Blocks that were given up for others.
    pub evictions: u64,
    /// Calls that failed, damaged blocks included.
    pub faults: u64,
}

/// Tiers that are asked by jobs, in the order in which they are tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TierId {
    /// [`disk::DiskTier`]. What it holds is known.
    Disk,
    /// A store that nodes share. What it holds is known when it was asked.
    Remote,
}

impl TierId {
    /// Name as in reports.
    pub fn name(self) -> &'static str {
        self.place().as_str()
    }
    /// The same among all places.
    pub fn place(self) -> CacheTier {
        match self {
            TierId::Disk => CacheTier::Disk,
            TierId::Remote => CacheTier::Remote,
        }
    }
}

/// What is to be done on a tier.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Job {
    /// Read a block: [`Outcome::Found`], [`Outcome::Missing`] or [`Outcome::Fault`].
    Read(StoredKey),
    /// Store a block, which counts for an owner: [`Outcome::Stored`] or [`Outcome::Fault`].
    Write(StoredKey, Arc<[u8]>, OwnerKey),
    /// See to it that the block is never read again: [`Outcome::Missing`] or [`Outcome::Fault`].
    Quarantine(StoredKey),
    /// Give up every block: [`Outcome::Missing`] or [`Outcome::Fault`].
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
    fn take_lost(&mut self) -> Vec<StoredKey>;
    /// Waits until what was stored would outlive a failure of power.
    fn flush(&mut self) -> Result<(), Fault>;
}
