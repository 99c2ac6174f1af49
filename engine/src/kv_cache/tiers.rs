//! Where KV blocks go when the pool is full, and come back from.

pub mod disk;

use std::io;

use thiserror::Error;

use crate::sequence::BlockKey;
use disk::Damage;

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
