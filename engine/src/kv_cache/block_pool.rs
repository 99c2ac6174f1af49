//! Who holds which block: reference counts, the free list, and the blocks that nobody holds but that keep their
//! contents for later, least recently used first. Knows neither tokens nor sequences.
//!
//! Invariant: every block is exactly one of *free* (in the free list: no references, pins or key), *cached* (in the
//! LRU list: a key, no references or pins), *pinned* (no references, but a launched step still writes it) and *owned*
//! (referenced by at least one table). A block with a key is full and is never pinned: nobody writes it.

use std::collections::VecDeque;

use crate::error::{Error, Result};
use crate::fair_lru::FairLru;
use crate::ids::{BlockId, BlockKey, OwnerKey};

#[derive(Debug, Default, Clone)]
struct Block {
    /// Tables that hold it.
    num_refs: u32,
    /// Launched steps that write it.
    num_pins: u32,
    /// Its entry in the prefix index, and whose it is.
    key: Option<(BlockKey, OwnerKey)>,
    /// How often it was allocated.
    num_allocations: u64,
}

/// The blocks of one KV pool.
#[derive(Debug)]
pub(super) struct BlockPool {
    blocks: Vec<Block>,
    /// First in, first out: a block rests as long as possible before it is used again.
    free: VecDeque<BlockId>,
    cached: FairLru<BlockId>,
    /// Blocks with pins and without references.
    num_pinned: usize,
}

impl BlockPool {
    /// `owner_quota`: cached blocks beyond which those of an owner go first.
    pub(super) fn new(num_blocks: usize, owner_quota: u64) -> Self {
        let num_ids = u32::try_from(num_blocks).expect("block ids are 32 bits wide");
        BlockPool {
            blocks: vec![Block::default(); num_blocks],
            free: (0..num_ids).map(BlockId).collect(),
            cached: FairLru::new(owner_quota),
            num_pinned: 0,
        }
    }

    pub(super) fn num_blocks(&self) -> usize {
        self.blocks.len()
    }
    pub(super) fn num_free(&self) -> usize {
        self.free.len()
    }
    pub(super) fn num_cached(&self) -> usize {
        self.cached.len()
    }
    pub(super) fn num_pinned(&self) -> usize {
        self.num_pinned
    }
    pub(super) fn num_owned(&self) -> usize {
        self.num_blocks() - self.num_free() - self.num_cached() - self.num_pinned()
    }
    pub(super) fn num_allocations(&self, id: BlockId) -> u64 {
        self.block(id).num_allocations
    }
    pub(super) fn key(&self, id: BlockId) -> Option<BlockKey> {
        self.block(id).key.map(|(key, _)| key)
    }
    pub(super) fn num_refs(&self, id: BlockId) -> u32 {
        self.block(id).num_refs
    }

    /// A block with one reference, and the key that it loses, with its owner, when it held a cached block. Free blocks go
    /// first; then cached ones in the order of [`FairLru`]. `None`: all are owned or pinned.
    pub(super) fn allocate(&mut self) -> Option<(BlockId, Option<(BlockKey, OwnerKey)>)> {
        let id = match self.free.pop_front() {
            Some(id) => id,
            None => self.cached.pop()?,
        };
        let block = self.block_mut(id);
        debug_assert!(block.num_refs == 0 && block.num_pins == 0);
        block.num_refs = 1;
        block.num_allocations += 1;
        Some((id, block.key.take()))
    }

    /// One more table holds a block with a key.
    pub(super) fn share(&mut self, id: BlockId) {
        let block = self.block_mut(id);
        assert!(block.key.is_some(), "only published blocks are shared");
        block.num_refs += 1;
        if block.num_refs == 1 {
            self.cached.forget(&id);
        }
    }

    /// One table less holds it.
    pub(super) fn release(&mut self, id: BlockId) {
        let block = self.block_mut(id);
        assert!(block.num_refs > 0, "block {} is released once too often", id.0);
        block.num_refs -= 1;
        if block.num_refs > 0 {
            return;
        }
        if block.num_pins > 0 {
            self.num_pinned += 1;
        } else {
            self.give_back(id);
        }
    }

    /// A step that writes it was launched: it is not given away before [`BlockPool::unpin`].
    pub(super) fn pin(&mut self, id: BlockId) {
        let block = self.block_mut(id);
        assert!(block.num_refs == 1 && block.key.is_none(), "block {} is written while it is shared", id.0);
        block.num_pins += 1;
    }

    /// The step was applied.
    pub(super) fn unpin(&mut self, id: BlockId) {
        let block = self.block_mut(id);
        assert!(block.num_pins > 0, "block {} is unpinned once too often", id.0);
        block.num_pins -= 1;
        if block.num_pins == 0 && block.num_refs == 0 {
            self.num_pinned -= 1;
            self.give_back(id);
        }
    }

    /// The block is full and has an entry in the prefix index from now on.
    pub(super) fn set_key(&mut self, id: BlockId, key: BlockKey, owner: OwnerKey) {
        let block = self.block_mut(id);
        assert!(block.num_refs > 0 && block.num_pins == 0 && block.key.is_none(), "block {} is not at rest", id.0);
        block.key = Some((key, owner));
    }

    /// The block has lost its entry in the prefix index: it is free when nobody holds it any more.
    pub(super) fn clear_key(&mut self, id: BlockId) {
        let block = self.block_mut(id);
        assert!(block.num_refs > 0, "block {} is held by whoever found it bad", id.0);
        block.key = None;
    }

    /// No block has an entry in the prefix index any more: what nobody holds is free.
    pub(super) fn clear_keys(&mut self) {
        while let Some(id) = self.cached.pop() {
            self.block_mut(id).key = None;
            self.free.push_back(id);
        }
        self.blocks.iter_mut().for_each(|block| block.key = None);
    }

    fn give_back(&mut self, id: BlockId) {
        match self.block(id).key {
            Some((_, owner)) => self.cached.insert(id, owner, 1),
            None => self.free.push_back(id),
        }
    }

    fn block(&self, id: BlockId) -> &Block {
        &self.blocks[id.0 as usize]
    }
    fn block_mut(&mut self, id: BlockId) -> &mut Block {
        &mut self.blocks[id.0 as usize]
    }

    /// Compares everything the pool believes with the tables' references and the launched steps' pins, both counted
    /// from outside: `[num_blocks]` each.
    pub(super) fn check_invariants(&self, table_refs: &[u32], step_pins: &[u32]) -> Result<()> {
        let mut places = vec![0u32; self.num_blocks()];
        for id in self.free.iter().chain(self.cached.iter()) {
            places[id.0 as usize] += 1;
        }
        for id in &self.free {
            let block = self.block(*id);
            violated(block.key.is_some(), || format!("free block {} has a key", id.0))?;
        }
        for id in self.cached.iter() {
            violated(self.block(*id).key.is_none(), || format!("cached block {} has no key", id.0))?;
        }
        self.cached.check_invariants()?;
        let mut num_pinned = 0;
        for (idx, block) in self.blocks.iter().enumerate() {
            let held = block.num_refs > 0 || block.num_pins > 0;
            num_pinned += usize::from(block.num_refs == 0 && block.num_pins > 0);
            violated(places[idx] != u32::from(!held), || {
                format!("block {idx} is in {} lists with {} references", places[idx], block.num_refs)
            })?;
            violated(block.num_refs != table_refs[idx], || {
                format!("block {idx} counts {} references, tables hold {}", block.num_refs, table_refs[idx])
            })?;
            violated(block.num_pins != step_pins[idx], || {
                format!("block {idx} counts {} pins, steps hold {}", block.num_pins, step_pins[idx])
            })?;
            violated(block.num_pins > 0 && (block.key.is_some() || block.num_refs > 1), || {
                format!("block {idx} is written while it is shared")
            })?;
        }
        violated(num_pinned != self.num_pinned, || format!("{num_pinned} blocks are pinned, not {}", self.num_pinned))
    }
}

/// [`Error::Internal`] with `reason` when `broken`.
pub(crate) fn violated(broken: bool, reason: impl FnOnce() -> String) -> Result<()> {
    if broken { Err(Error::Internal { reason: reason() }) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMESPACE: OwnerKey = [0; 32];

    fn key(name: u8) -> BlockKey {
        BlockKey([name; 32])
    }

    /// A pool whose blocks 0.. are cached, released in the order of `releases`.
    fn cached(num_blocks: usize, releases: &[u32]) -> BlockPool {
        let mut pool = BlockPool::new(num_blocks, u64::MAX);
        for idx in 0..num_blocks {
            let (id, _) = pool.allocate().expect("free");
            pool.set_key(id, key(idx as u8), NAMESPACE);
        }
        releases.iter().for_each(|&id| pool.release(BlockId(id)));
        pool
    }

    /// Free blocks go before cached ones, and of those the one that was used least recently; sharing a cached block
    /// saves it. When nothing is left there is `None`, not a failure.
    #[test]
    fn least_recently_used_block_goes_first() {
        let mut pool = cached(4, &[2, 0, 3, 1]);
        pool.share(BlockId(0));
        pool.release(BlockId(0));
        pool.share(BlockId(3));
        let given: Vec<_> = std::iter::from_fn(|| pool.allocate()).collect();
        assert_eq!(
            given,
            [
                (BlockId(2), Some((key(2), NAMESPACE))),
                (BlockId(1), Some((key(1), NAMESPACE))),
                (BlockId(0), Some((key(0), NAMESPACE)))
            ]
        );
        assert_eq!((pool.num_owned(), pool.num_free(), pool.num_cached()), (4, 0, 0));
        pool.check_invariants(&[1; 4], &[0; 4]).expect("all are owned");
    }

    /// A block that a launched step writes is neither free nor cached after its release until the step is applied.
    #[test]
    fn pinned_block_is_not_given_away() {
        let mut pool = BlockPool::new(1, u64::MAX);
        let (id, _) = pool.allocate().expect("free");
        pool.pin(id);
        pool.pin(id);
        pool.release(id);
        pool.unpin(id);
        assert_eq!((pool.allocate(), pool.num_pinned()), (None, 1));
        pool.check_invariants(&[0], &[1]).expect("one step still writes it");
        pool.unpin(id);
        assert_eq!((pool.num_pinned(), pool.num_free(), pool.num_allocations(id)), (0, 1, 1));
        assert_eq!(pool.allocate(), Some((id, None)));
        assert_eq!(pool.num_allocations(id), 2);
    }

    /// The check sees every kind of damage: wrong references, wrong pins, a block in two lists or in none, a written
    /// block that has a key, a free block that has one, a cached block that has none.
    #[test]
    fn check_sees_damage() {
        type Damage = fn(&mut BlockPool);
        let damages: [Damage; 7] = [
            |pool| pool.blocks[0].num_refs += 1,
            |pool| pool.blocks[0].num_pins += 1,
            |pool| pool.free.push_back(BlockId(1)),
            |pool| pool.cached.clear(),
            |pool| pool.blocks[1].key = None,
            |pool| pool.blocks[2].key = Some((key(9), NAMESPACE)),
            |pool| pool.num_pinned += 1,
        ];
        let sound = || {
            let mut pool = cached(3, &[1, 2]);
            pool.allocate().expect("cached");
            pool.allocate().expect("cached");
            pool.release(BlockId(2));
            pool.set_key(BlockId(1), key(1), NAMESPACE);
            pool.release(BlockId(1));
            pool
        };
        sound().check_invariants(&[1, 0, 0], &[0; 3]).expect("0 is owned, 1 cached, 2 free");
        for (idx, damage) in damages.iter().enumerate() {
            let mut pool = sound();
            damage(&mut pool);
            assert!(pool.check_invariants(&[1, 0, 0], &[0; 3]).is_err(), "damage {idx} was not seen");
        }
    }

    /// Giving back twice, sharing what is not published and writing what is shared are defects of this crate: they
    /// stop at once instead of corrupting somebody's KV.
    #[test]
    fn misuse_is_caught() {
        type Misuse = fn(&mut BlockPool);
        let misuses: [Misuse; 4] = [
            |pool| pool.release(BlockId(1)),
            |pool| pool.share(BlockId(2)),
            |pool| pool.pin(BlockId(0)),
            |pool| pool.unpin(BlockId(2)),
        ];
        for (idx, misuse) in misuses.iter().enumerate() {
            let mut pool = cached(3, &[1]);
            pool.blocks[2].key = None;
            let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| misuse(&mut pool)));
            assert!(caught.is_err(), "misuse {idx} was not caught");
        }
    }
}
