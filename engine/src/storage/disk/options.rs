//! What a disk store is told and what it tells: its sizes, and what it has found and done beyond
//! [`TierStats`](crate::storage::TierStats).

use super::record::{PAGE_BYTES, record_bytes};
use crate::config::{DISK_MIN_SEGMENTS, DISK_SEGMENT_BYTES};
use crate::error::Error;

/// Sizes of a disk store; fixed for its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskOptions {
    pub(super) budget_bytes: u64,
    pub(super) max_payload_bytes: u64,
    pub(super) segment_bytes: u64,
    /// What one owner may keep when others need room; `None`: there are no owners.
    pub(super) quota_bytes: Option<u64>,
}

impl DiskOptions {
    /// A store whose files take at most `budget_bytes`, for records of at most `max_payload_bytes`.
    pub fn new(budget_bytes: u64, max_payload_bytes: u64) -> crate::Result<Self> {
        let max_segment_bytes = PAGE_BYTES + record_bytes(max_payload_bytes.min(u64::MAX / 4));
        let min_bytes = max_segment_bytes.saturating_mul(2);
        if budget_bytes < min_bytes {
            return Err(Error::InvalidArgument {
                field: "kv_disk_bytes",
                value: budget_bytes.to_string(),
                expected: format!("at least {min_bytes}, two segments of one block each"),
            });
        }
        let segment_bytes = (budget_bytes / DISK_MIN_SEGMENTS).min(DISK_SEGMENT_BYTES).max(max_segment_bytes);
        Ok(DiskOptions { budget_bytes, max_payload_bytes, segment_bytes, quota_bytes: None })
    }

    /// With less than 1.0 each owner has segments of his own, and keeps that share of the budget when others need room.
    pub fn owner_share(mut self, share: f64) -> Self {
        if share < 1.0 {
            let quota_bytes = (self.budget_bytes as f64 * share) as u64;
            // Who is over his quota has a segment that can go beside the one that he writes.
            let min_bytes = PAGE_BYTES + record_bytes(self.max_payload_bytes.min(u64::MAX / 4));
            self.segment_bytes = self.segment_bytes.min(quota_bytes / 4).max(min_bytes);
            self.quota_bytes = Some(quota_bytes);
        }
        self
    }

    /// Bytes that the files take at most.
    pub fn budget_bytes(&self) -> u64 {
        self.budget_bytes
    }
    /// Longest segment file.
    pub fn segment_bytes(&self) -> u64 {
        self.segment_bytes
    }
}

/// What opening found and what has happened since, beyond [`TierStats`](crate::storage::TierStats).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DiskReport {
    /// Segment files.
    pub segments: u64,
    /// Bytes of torn ends that were cut off.
    pub cut_bytes: u64,
    /// Runs of bytes that should have been records, at opening; and records that were damaged when they were read.
    pub damaged_records: u64,
    /// Those of the damages at opening that no torn end explains: what was stored there was whole once.
    pub inner_damage: u64,
    /// Segments whose first page was damaged.
    pub damaged_segments: u64,
    /// Segments that were removed because a sync failed or a record of theirs was quarantined.
    pub dropped_segments: u64,
    /// Segments that were evicted.
    pub evicted_segments: u64,
}
