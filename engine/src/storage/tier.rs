//! Which store it is, and its figures.

use crate::request::CacheTier;

/// Stores as tiers below memory, in the order in which they are tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TierId {
    /// [`DiskStore`](super::disk::DiskStore). What it holds is known.
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

/// What a store holds and what became of what it was asked. Counters only grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TierStats {
    /// Records held now.
    pub entries: u64,
    /// Bytes held now, with everything that the store adds to them.
    pub bytes: u64,
    /// Records that were asked for and given.
    pub hits: u64,
    /// Bytes of them.
    pub hit_bytes: u64,
    /// Records that were asked for and not there.
    pub misses: u64,
    /// Records that were taken in.
    pub stored: u64,
    /// Records that were given up for others.
    pub evictions: u64,
    /// Calls that failed, damaged records included.
    pub faults: u64,
}
