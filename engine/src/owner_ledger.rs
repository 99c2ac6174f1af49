//! What was stored for each owner in a place where it ends with its time: so that none stores more there than he may, where
//! nobody here decides what goes first. Owns no clock; time is an argument, seconds.
//!
//! Time is counted in parts of the time to live, and what was stored in a part counts until that part is over everywhere: an
//! owner never has more than the limit, and may store again at most a part too late.

use std::num::NonZeroUsize;

use lru::LruCache;

use crate::config::MAX_KNOWN_OWNERS;
use crate::ids::OwnerKey;

/// Parts of the time to live.
const PARTS: u64 = 16;

/// Bytes by owner.
#[derive(Debug)]
pub(crate) struct Ledger {
    limit_bytes: u64,
    /// Seconds of a part.
    part_s: u64,
    /// Of too many the one who stored longest ago is forgotten, and begins anew.
    owners: LruCache<OwnerKey, Stored>,
}

/// What one owner has stored.
#[derive(Debug, Clone, Copy, Default)]
struct Stored {
    /// The latest part in which something was.
    last_part: u64,
    /// By part, the latest `PARTS` and the one that is going on.
    bytes: [u64; PARTS as usize + 1],
}

impl Stored {
    /// Forgets what has ended by `part`.
    fn advance(&mut self, part: u64) {
        let len = self.bytes.len() as u64;
        let first = part.saturating_sub(len - 1).max(self.last_part + 1);
        (first..=part).for_each(|ended| self.bytes[(ended % len) as usize] = 0);
        self.last_part = self.last_part.max(part);
    }
}

impl Ledger {
    /// Nothing stored yet. Each owner may have `limit_bytes`, which are kept for `ttl_s`.
    pub(crate) fn new(limit_bytes: u64, ttl_s: u64) -> Self {
        let max_owners = NonZeroUsize::new(MAX_KNOWN_OWNERS).expect("not zero");
        Ledger { limit_bytes, part_s: ttl_s.div_ceil(PARTS).max(1), owners: LruCache::new(max_owners) }
    }

    /// What each owner may have.
    pub(crate) fn limit_bytes(&self) -> u64 {
        self.limit_bytes
    }

    /// Whether an owner may store so much now.
    pub(crate) fn allows(&self, owner: &OwnerKey, bytes: u64, now_s: u64) -> bool {
        let mut stored = self.owners.peek(owner).copied().unwrap_or_default();
        stored.advance(now_s / self.part_s);
        stored.bytes.iter().sum::<u64>().saturating_add(bytes) <= self.limit_bytes
    }

    /// He does.
    pub(crate) fn note(&mut self, owner: &OwnerKey, bytes: u64, now_s: u64) {
        let part = now_s / self.part_s;
        let stored = self.owners.get_or_insert_mut(*owner, Stored::default);
        stored.advance(part);
        stored.bytes[(part % (PARTS + 1)) as usize] += bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// In no stretch of the time to live does an owner store more than he may, and after it he may again; another's storing
    /// changes nothing, and the memory for owners is bounded.
    #[test]
    fn nobody_stores_more_than_he_may() {
        let (limit_bytes, ttl_s) = (1_000, 160);
        let mut ledger = Ledger::new(limit_bytes, ttl_s);
        let mut stored: Vec<(u64, u64)> = Vec::new();
        for now_s in 0..2_000 {
            let bytes = 30 + now_s % 50;
            if ledger.allows(&[1; 32], bytes, now_s) {
                ledger.note(&[1; 32], bytes, now_s);
                stored.push((now_s, bytes));
            }
            ledger.note(&[2; 32], 1_000_000, now_s);
            let alive: u64 = stored.iter().filter(|(at_s, _)| now_s < at_s + ttl_s).map(|(_, bytes)| bytes).sum();
            assert!(alive <= limit_bytes, "{alive} bytes at {now_s} s");
        }
        let total: u64 = stored.iter().map(|(_, bytes)| bytes).sum();
        assert!(total > 9 * limit_bytes, "{total} bytes in more than twelve times the time to live");
        assert!(!ledger.allows(&[2; 32], 1, 2_000) && ledger.allows(&[2; 32], 1_000, 2_000 + 2 * ttl_s));
        assert!(!ledger.allows(&[3; 32], 1_001, 0), "more than there may ever be");
        for number in 0..MAX_KNOWN_OWNERS as u64 + 10 {
            ledger.note(&std::array::from_fn(|i| number.to_le_bytes()[i % 8]), 1, 3_000);
        }
        assert_eq!(ledger.owners.len(), MAX_KNOWN_OWNERS);
    }
}
