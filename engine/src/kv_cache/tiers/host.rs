//! The host tier: blocks that the pool has given away, in this process's memory; those that go first are of owners over
//! their quota, then the least recently used. Never holds more than its budget, which counts what it costs to remember a
//! block as well.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use super::lost::note_lost;
use crate::error::Error;
use crate::fair_lru::FairLru;
use crate::ids::OwnerKey;
use crate::storage::{RecordKey, TierStats};

/// Memory that a block takes beside its bytes: keys, links, the reference count and the allocator's own.
pub const ENTRY_BYTES: u64 = 256;

/// Blocks in memory.
#[derive(Debug)]
pub struct HostTier {
    budget_bytes: u64,
    bytes: u64,
    blocks: HashMap<RecordKey, Arc<[u8]>>,
    order: FairLru<RecordKey>,
    /// What was given up and nobody has asked for yet, oldest first; bounded.
    lost: VecDeque<RecordKey>,
    stats: TierStats,
}

impl HostTier {
    /// An empty tier. A budget of 0 holds nothing. Blocks of an owner who holds more than `quota_bytes` go
    /// first.
    pub fn new(budget_bytes: u64, quota_bytes: u64) -> Self {
        let (blocks, order) = (HashMap::new(), FairLru::new(quota_bytes));
        HostTier { budget_bytes, bytes: 0, blocks, order, lost: VecDeque::new(), stats: TierStats::default() }
    }

    /// Takes a block in, and gives up others for it. False: it is longer than the budget, or here already.
    pub fn insert(&mut self, key: RecordKey, bytes: Arc<[u8]>, owner: OwnerKey) -> bool {
        let entry_bytes = ENTRY_BYTES + bytes.len() as u64;
        if self.blocks.contains_key(&key) {
            self.order.touch(&key);
            return false;
        }
        if entry_bytes > self.budget_bytes {
            return false;
        }
        while self.bytes + entry_bytes > self.budget_bytes {
            let evicted = self.order.pop().and_then(|key| self.blocks.remove_entry(&key));
            let (key, evicted) = evicted.expect("bytes are held by blocks");
            self.bytes -= ENTRY_BYTES + evicted.len() as u64;
            note_lost(&mut self.lost, key);
            self.stats.evictions += 1;
        }
        self.bytes += entry_bytes;
        self.order.insert(key, owner, entry_bytes);
        self.blocks.insert(key, bytes);
        self.stats.stored += 1;
        true
    }

    /// A block, which was used with that. Asking for one that is not here is a miss.
    pub fn get(&mut self, key: &RecordKey) -> Option<Arc<[u8]>> {
        let found = self.blocks.get(key).cloned();
        self.order.touch(key);
        match &found {
            Some(bytes) => {
                self.stats.hits += 1;
                self.stats.hit_bytes += bytes.len() as u64;
            }
            None => self.stats.misses += 1,
        }
        found
    }

    /// What was given up since the last call, oldest first; of very many the newest.
    pub fn take_lost(&mut self) -> impl Iterator<Item = RecordKey> {
        self.lost.drain(..)
    }

    /// Whether the block is here; no use of it.
    pub fn contains(&self, key: &RecordKey) -> bool {
        self.blocks.contains_key(key)
    }

    /// Forgets a block.
    pub fn remove(&mut self, key: &RecordKey) {
        self.order.forget(key);
        if let Some(bytes) = self.blocks.remove(key) {
            self.bytes -= ENTRY_BYTES + bytes.len() as u64;
        }
    }

    /// Forgets all blocks.
    pub fn clear(&mut self) {
        self.blocks.clear();
        self.order.clear();
        self.bytes = 0;
    }

    /// What is held and what has happened.
    pub fn stats(&self) -> TierStats {
        TierStats { entries: self.blocks.len() as u64, bytes: self.bytes, ..self.stats }
    }

    /// The bytes add up and are within the budget.
    pub fn check_invariants(&self) -> crate::Result<()> {
        self.order.check_invariants()?;
        let bytes: u64 = self.blocks.values().map(|bytes| ENTRY_BYTES + bytes.len() as u64).sum();
        match bytes == self.bytes && bytes <= self.budget_bytes {
            true => Ok(()),
            false => {
                let (counted, budget) = (self.bytes, self.budget_bytes);
                Err(Error::Internal { reason: format!("{bytes} bytes are held, {counted} counted of {budget}") })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::LayoutId;
    use super::*;

    fn key(name: u8) -> RecordKey {
        RecordKey { content: [name; 32], layout: LayoutId([0; 32]) }
    }
    fn block(name: u8, bytes: usize) -> Arc<[u8]> {
        vec![name; bytes].into()
    }

    /// The block that was used least recently goes first; what was put in comes out; the counters say so.
    #[test]
    fn least_recently_used_goes_first() {
        let mut tier = HostTier::new(3 * (ENTRY_BYTES + 100), u64::MAX);
        for name in 0..3 {
            assert!(tier.insert(key(name), block(name, 100), [0; 32]));
        }
        assert!(!tier.insert(key(0), block(9, 100), [0; 32]), "it is here already, and used");
        assert!(tier.insert(key(3), block(3, 100), [0; 32]));
        assert_eq!(tier.get(&key(1)), None);
        assert_eq!(tier.get(&key(0)).as_deref(), Some(&[0; 100][..]));
        assert!(tier.insert(key(4), block(4, 100 + 256), [0; 32]), "takes the place of two smaller ones");
        assert_eq!([2, 3, 0, 4].map(|name| tier.contains(&key(name))), [false, false, true, true]);
        let stats = tier.stats();
        assert_eq!((stats.stored, stats.hits, stats.hit_bytes, stats.misses), (5, 1, 100, 1));
        assert_eq!((stats.evictions, stats.entries), (3, 2));
        tier.check_invariants().expect("sound");
    }

    /// Under random use the bytes add up and stay within the budget; a block longer than the budget is refused.
    #[test]
    fn budget_holds() {
        let mut tier = HostTier::new(10_000, u64::MAX);
        assert!(!tier.insert(key(0), block(0, 10_000), [0; 32]));
        for step in 0..3_000u32 {
            let name = (step.wrapping_mul(2_654_435_761) >> 24) as u8 % 40;
            match step % 7 {
                0 => tier.remove(&key(name)),
                1..4 => drop(tier.get(&key(name)).map(|bytes| assert!(bytes.iter().all(|byte| *byte == name)))),
                _ => drop(tier.insert(key(name), block(name, 50 * name as usize), [0; 32])),
            }
            tier.check_invariants().expect("sound");
        }
        let stats = tier.stats();
        assert!(stats.hits > 50 && stats.misses > 100 && stats.evictions > 100, "{stats:?}");
        tier.clear();
        assert_eq!((tier.stats().entries, tier.stats().bytes), (0, 0));
        assert!(!HostTier::new(0, u64::MAX).insert(key(1), block(1, 0), [0; 32]));
    }
}
