//! The KV cache of one model: gives sequences their blocks, shares full blocks between sequences with the same
//! history, keeps the blocks of ended sequences until their place is needed, and fetches from the tiers what it had to
//! give away. Paged as in Kwon et al. 2023 (arXiv:2309.06180); blocks are found by content, so a prefix is shared also with
//! sequences that ended long ago. Owns no KV numbers of the pool: it decides about block ids, the executor holds what they
//! stand for. What is to go from the pool to the tiers or back is a list of [`BlockTransfer`]s.
//!
//! Invariants ([`KvCache::check_invariants`]): every block is exactly one of free, cached, owned and pinned; reference
//! counts equal the tables' references; no block is twice in one table; the index names full blocks under their right
//! keys; a block that a launched step writes is in one table only and not in the index.

mod block_pool;
mod prefix_index;
pub mod tiers;

use std::num::NonZeroUsize;
use std::sync::Arc;

use lru::LruCache;

use crate::config::MAX_LOST_BLOCKS;
use crate::error::Result;
use crate::ids::{BlockId, BlockKey, OwnerKey, SeqId};
use crate::request::{CacheTier, CacheUse, CachedTokens, MissReason, PrefixMiss};
use crate::sequence::Sequence;
use crate::storage::TierStats;
use block_pool::BlockPool;
pub(crate) use block_pool::violated;
pub use prefix_index::KvIdentity;
use prefix_index::PrefixIndex;
use tiers::{Begun, Tiers, TiersConfig};

/// Sizes and identity of a pool.
#[derive(Debug, Clone, PartialEq)]
pub struct KvCacheConfig {
    /// Blocks of the pool, at least one.
    pub num_blocks: usize,
    /// Tokens of a block, at least one.
    pub block_tokens: usize,
    /// What the blocks' contents depend on besides tokens.
    pub identity: KvIdentity,
    /// Whether blocks are shared at all.
    pub prefix_cache: bool,
    /// Share of the pool, and of host memory below it, that the cached blocks of one owner may keep when others need room.
    pub owner_share: f64,
    /// Where blocks are kept beside the pool; `None`, or blocks that are not shared: nowhere.
    pub tiers: Option<TiersConfig>,
}

/// Why a block is to be kept in the tiers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeepReason {
    /// It has become full: the tiers that outlive the process get it.
    Published,
    /// The pool gives it away: host memory gets it too.
    Evicted,
}

/// A block that the tiers are offered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeptBlock {
    /// What it is.
    pub key: BlockKey,
    /// Whose it is.
    pub owner: OwnerKey,
    /// Why.
    pub reason: KeepReason,
}

/// Contents that go from the pool to the tiers or back. All that there are are carried out in their order, before the next
/// step is launched and after those that were launched before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BlockTransfer {
    /// What the block holds now is to be given to [`KvCache::keep`], if [`KvCache::would_keep`] says so.
    Keep {
        /// Where it is.
        block: BlockId,
        /// What it is, and why.
        kept: KeptBlock,
    },
    /// The block is to hold these bytes.
    Restore {
        /// Where they go.
        block: BlockId,
        /// What a tier has kept.
        bytes: Arc<[u8]>,
    },
}

/// What it takes to admit a sequence now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdmissionPlan {
    /// Published blocks of its prefix.
    pub cached: Vec<BlockId>,
    /// Blocks that must be available: new ones, and those of `cached` that nobody holds now.
    pub needed_blocks: usize,
    /// Its next prefix block is just being computed by this sequence.
    pub waits_for: Option<SeqId>,
}

/// How many blocks are in which state; their sum is the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BlockCounts {
    /// Hold nothing.
    pub free: usize,
    /// Held by nobody; keep their contents until they are needed.
    pub cached: usize,
    /// Held by live sequences.
    pub owned: usize,
    /// Held by nobody, but a launched step still writes them.
    pub pinned: usize,
}

/// The block manager.
#[derive(Debug)]
pub struct KvCache {
    config: KvCacheConfig,
    pool: BlockPool,
    index: PrefixIndex,
    tiers: Option<Tiers>,
    transfers: Vec<BlockTransfer>,
    num_evictions: u64,
    /// Blocks that were here or in a tier, and who gave them up last.
    lost: LruCache<BlockKey, CacheTier>,
}

impl KvCache {
    /// An empty pool.
    pub fn new(config: KvCacheConfig) -> Self {
        assert!(config.num_blocks > 0 && config.block_tokens > 0, "a pool has blocks and a block has tokens");
        KvCache {
            pool: BlockPool::new(config.num_blocks, (config.num_blocks as f64 * config.owner_share) as u64),
            index: PrefixIndex::new(&config.identity),
            tiers: config.tiers.clone().filter(|_| config.prefix_cache).map(|it| Tiers::new(it, config.owner_share)),
            transfers: Vec::new(),
            config,
            num_evictions: 0,
            lost: LruCache::new(NonZeroUsize::new(MAX_LOST_BLOCKS).expect("not zero")),
        }
    }

    /// Tokens of a block.
    pub fn block_tokens(&self) -> usize {
        self.config.block_tokens
    }
    /// Blocks of the pool.
    pub fn num_blocks(&self) -> usize {
        self.config.num_blocks
    }
    /// Blocks that `num_tokens` tokens of one sequence take.
    pub fn blocks_for(&self, num_tokens: usize) -> usize {
        num_tokens.div_ceil(self.config.block_tokens)
    }
    /// Blocks that can be given out now.
    pub fn num_available(&self) -> usize {
        self.pool.num_free() + self.pool.num_cached()
    }
    /// Blocks that become available when the launched steps are applied.
    pub fn num_pinned(&self) -> usize {
        self.pool.num_pinned()
    }
    /// Cached blocks that were given away.
    pub fn num_evictions(&self) -> u64 {
        self.num_evictions
    }
    /// Blocks by state.
    pub fn counts(&self) -> BlockCounts {
        let pool = &self.pool;
        BlockCounts {
            free: pool.num_free(),
            cached: pool.num_cached(),
            owned: pool.num_owned(),
            pinned: pool.num_pinned(),
        }
    }
    /// How often the block was given out: KV written before the last time is not its holder's.
    pub fn num_allocations(&self, block: BlockId) -> u64 {
        self.pool.num_allocations(block)
    }
    /// Blocks that an admission by `plan` would gain if the sequence lost its own: those that nobody else holds and
    /// that are not part of the plan. (The same prefix has the same places in both tables.)
    pub fn num_gained_blocks(&self, seq: &Sequence, plan: &AdmissionPlan) -> usize {
        let gained = |&(idx, id): &(usize, &BlockId)| self.pool.num_refs(*id) == 1 && plan.cached.get(idx) != Some(id);
        seq.blocks.iter().enumerate().filter(gained).count()
    }

    /// Finds the cached prefix of a waiting sequence, and what else it needs for the tokens it has.
    pub fn plan_admission(&self, seq: &mut Sequence) -> AdmissionPlan {
        let num_blocks = self.blocks_for(seq.tokens.len());
        if !self.config.prefix_cache {
            return AdmissionPlan { cached: Vec::new(), needed_blocks: num_blocks, waits_for: None };
        }
        let shareable = seq.max_cached_tokens() / self.config.block_tokens;
        self.extend_keys(seq, shareable);
        let keys = &seq.block_keys[..shareable];
        let cached: Vec<BlockId> = keys.iter().map_while(|key| self.index.get(key)).collect();
        let waits_for = keys.get(cached.len()).and_then(|key| self.index.claimed_by(key));
        let num_idle = cached.iter().filter(|&&id| self.pool.num_refs(id) == 0).count();
        AdmissionPlan { needed_blocks: num_blocks - cached.len() + num_idle, cached, waits_for }
    }

    /// Gives a waiting sequence the blocks of its plan: the cached prefix counts as computed, the rest is new and
    /// covers all tokens it has. The blocks are given at once and not chunk by chunk, so that a prompt that was begun
    /// can always be finished.
    pub fn admit(&mut self, seq: &mut Sequence, plan: AdmissionPlan) {
        assert!(seq.blocks.is_empty() && plan.needed_blocks <= self.num_available(), "the plan must fit");
        for &id in &plan.cached {
            self.pool.share(id);
        }
        let num_cached_tokens = plan.cached.len() * self.config.block_tokens;
        seq.num_published = plan.cached.len();
        seq.blocks = plan.cached;
        seq.num_scheduled = num_cached_tokens;
        seq.num_computed = num_cached_tokens;
        let fits = self.extend(seq, seq.tokens.len());
        assert!(fits, "the plan counted the blocks");
        if self.publishes(seq) {
            let num_full = seq.tokens.len() / self.config.block_tokens;
            self.extend_keys(seq, num_full);
            for key in &seq.block_keys[seq.num_published..num_full] {
                self.index.claim(*key, seq.id);
            }
        }
    }

    /// Grows the table until it covers `num_tokens`. False, with the table as far as it came, when no block is left.
    pub fn extend(&mut self, seq: &mut Sequence, num_tokens: usize) -> bool {
        while seq.blocks.len() < self.blocks_for(num_tokens) {
            let Some((id, evicted)) = self.pool.allocate() else { return false };
            if let Some((key, owner)) = evicted {
                self.index.remove(&key);
                self.num_evictions += 1;
                self.lost.put(key, CacheTier::Pool);
                self.note_keep(id, key, owner, KeepReason::Evicted);
            }
            seq.blocks.push(id);
        }
        true
    }

    fn publishes(&self, seq: &Sequence) -> bool {
        self.config.prefix_cache && seq.spec.prefix_cache == CacheUse::ReadWrite
    }

    /// Offers the sequence's computed full blocks to others.
    pub fn publish(&mut self, seq: &mut Sequence) {
        if !self.publishes(seq) {
            return;
        }
        let num_full = seq.num_computed / self.config.block_tokens;
        self.extend_keys(seq, num_full);
        for idx in seq.num_published..num_full {
            let (key, id) = (seq.block_keys[idx], seq.blocks[idx]);
            self.index.unclaim(&key, seq.id);
            if self.index.insert(key, id) {
                self.pool.set_key(id, key, seq.spec.owner);
                self.note_keep(id, key, seq.spec.owner, KeepReason::Published);
            }
        }
        seq.num_published = seq.num_published.max(num_full);
    }

    /// Takes all blocks back, and calls off what is on its way to them. Published ones stay cached; the end of a prefix is
    /// given away before its beginning, which more sequences share.
    pub fn release(&mut self, seq: &mut Sequence) {
        if let Some((tiers, restore)) = self.tiers.as_mut().zip(seq.restore.take()) {
            tiers.cancel(restore);
        }
        for key in seq.block_keys.iter().skip(seq.num_published) {
            self.index.unclaim(key, seq.id);
        }
        for id in seq.blocks.drain(..).rev() {
            self.pool.release(id);
        }
    }

    /// A step that writes these blocks was launched; they are not given to anyone else before [`KvCache::unpin`].
    pub fn pin(&mut self, blocks: &[BlockId]) {
        blocks.iter().for_each(|&id| self.pool.pin(id));
    }
    /// The step was applied.
    pub fn unpin(&mut self, blocks: &[BlockId]) {
        blocks.iter().for_each(|&id| self.pool.unpin(id));
    }

    fn note_keep(&mut self, block: BlockId, key: BlockKey, owner: OwnerKey, reason: KeepReason) {
        if self.tiers.is_some() {
            self.transfers.push(BlockTransfer::Keep { block, kept: KeptBlock { key, owner, reason } });
        }
    }

    fn extend_keys(&self, seq: &mut Sequence, num_blocks: usize) {
        let (namespace, block_tokens) = (&seq.spec.namespace, self.config.block_tokens);
        self.index.extend_keys(&mut seq.block_keys, namespace, &seq.tokens, block_tokens, num_blocks);
    }

    /// Begins to fetch what follows the cached prefix of a sequence that was just admitted, as far as the tiers have it and
    /// that is faster than computing it. It is computed from where [`KvCache::advance_restore`] ends.
    pub fn begin_restore(&mut self, seq: &mut Sequence, now_us: u64) {
        let mut begun = Begun::default();
        if let Some(tiers) = &mut self.tiers {
            let shareable = seq.max_cached_tokens() / self.config.block_tokens;
            let missing = seq.block_keys.get(seq.num_published..shareable).unwrap_or(&[]);
            let missing: Vec<_> = missing.iter().map(|key| tiers.record_key(*key)).collect();
            begun = tiers.begin(&missing, seq.spec.owner, now_us);
            seq.restore = begun.restore;
            seq.restored = seq.num_published..seq.num_published;
        }
        if !seq.has_started {
            seq.prefix_miss = self.first_miss(seq, &begun);
        }
    }

    /// The first block of a prompt that is neither cached nor on its way, and why.
    fn first_miss(&mut self, seq: &Sequence, begun: &Begun) -> Option<PrefixMiss> {
        let block_tokens = self.config.block_tokens;
        let idx = seq.num_published + begun.num_blocks;
        // Of a prompt that is cached whole the last token is still computed.
        if idx >= (seq.spec.prompt.len() - 1) / block_tokens {
            return None;
        }
        let reason = match seq.block_keys.get(idx) {
            Some(_) if begun.has_slower => MissReason::Slower,
            Some(&key) if self.config.prefix_cache && idx < seq.max_cached_tokens() / block_tokens => {
                self.why_missing(key)
            }
            _ => MissReason::Disabled,
        };
        Some(PrefixMiss { token: idx * block_tokens, reason })
    }

    /// Why a block is neither in the pool nor to be fetched.
    fn why_missing(&mut self, key: BlockKey) -> MissReason {
        if let Some(tiers) = &mut self.tiers {
            for (key, tier) in tiers.take_lost() {
                self.lost.put(key, tier);
            }
            if tiers.is_withheld(&tiers.record_key(key)) {
                return MissReason::Fault;
            }
        }
        self.lost.peek(&key).map_or(MissReason::NeverSeen, |&tier| MissReason::Evicted(tier))
    }

    /// Takes over what has arrived of the prefix that a sequence waits for: it counts as computed and is shared with others
    /// at once. Tells how many tokens that were, by their source.
    pub fn advance_restore(&mut self, seq: &mut Sequence, now_us: u64) -> CachedTokens {
        let mut restored = CachedTokens::default();
        let Some((tiers, restore)) = self.tiers.as_mut().zip(seq.restore) else { return restored };
        let arrived = tiers.poll(restore, now_us);
        if arrived.has_ended {
            seq.restore = None;
        }
        for block in arrived.blocks {
            let (key, id) = (seq.block_keys[seq.num_published], seq.blocks[seq.num_published]);
            assert_eq!(block.key.content, key.0, "blocks come back in the order of the prefix");
            self.transfers.push(BlockTransfer::Restore { block: id, bytes: block.bytes });
            self.index.unclaim(&key, seq.id);
            if self.index.insert(key, id) {
                self.pool.set_key(id, key, seq.spec.owner);
            }
            seq.num_published += 1;
            *restored.at_mut(block.source) += self.config.block_tokens;
        }
        seq.restored.end = seq.num_published;
        if let Some(mut reason) = arrived.cut
            && !seq.has_started
        {
            if reason == MissReason::NeverSeen {
                // By that tier; another may have had it.
                reason = self.why_missing(seq.block_keys[seq.num_published]);
            }
            seq.prefix_miss = Some(PrefixMiss { token: seq.num_published * self.config.block_tokens, reason });
        }
        seq.num_computed += restored.total();
        seq.num_scheduled = seq.num_computed;
        restored
    }

    /// What was computed from a sequence's blocks is unusable: those of them that came from the tiers are not used again, nor
    /// shared any more.
    pub fn quarantine_restored(&mut self, seq: &Sequence) {
        let Some(tiers) = &mut self.tiers else { return };
        for idx in seq.restored.clone() {
            let (key, id) = (seq.block_keys[idx], seq.blocks[idx]);
            tiers.quarantine(tiers.record_key(key));
            if self.index.get(&key) == Some(id) {
                self.index.remove(&key);
                self.pool.clear_key(id);
            }
        }
    }

    /// Forgets everything that is cached for later, here and in the tiers, but for a store that nodes share. Live sequences
    /// keep what they hold, and what they compute from now on is cached again.
    pub fn clear(&mut self, now_us: u64) {
        self.index.clear();
        self.pool.clear_keys();
        self.transfers.retain(|transfer| matches!(transfer, BlockTransfer::Restore { .. }));
        self.lost.clear();
        if let Some(tiers) = &mut self.tiers {
            tiers.clear(now_us);
        }
    }

    /// What is to be moved now; the caller does it, in this order.
    pub fn take_transfers(&mut self) -> Vec<BlockTransfer> {
        std::mem::take(&mut self.transfers)
    }
    /// Whether any tier would take the block: else it need not be read.
    pub fn would_keep(&self, block: &KeptBlock, now_us: u64) -> bool {
        self.tiers.as_ref().is_some_and(|tiers| match block.reason {
            KeepReason::Published => tiers.would_persist(&tiers.record_key(block.key), &block.owner, now_us),
            KeepReason::Evicted => tiers.would_spill(&tiers.record_key(block.key), &block.owner, now_us),
        })
    }
    /// The block is not given to the tiers after all: none would take it now, or it could not be read.
    pub fn pass_over(&mut self, block: &KeptBlock, now_us: u64) {
        if let Some(tiers) = &mut self.tiers {
            tiers.pass_over(&tiers.record_key(block.key), &block.owner, now_us);
        }
    }
    /// Gives a block to the tiers.
    pub fn keep(&mut self, block: &KeptBlock, bytes: Arc<[u8]>, now_us: u64) {
        let Some(tiers) = &mut self.tiers else { return };
        let key = tiers.record_key(block.key);
        match block.reason {
            KeepReason::Published => tiers.persist(key, bytes, block.owner, now_us),
            KeepReason::Evicted => tiers.spill(key, bytes, block.owner, now_us),
        }
    }
    /// What each tier holds and did.
    pub fn tier_stats(&self) -> impl Iterator<Item = (CacheTier, TierStats)> {
        self.tiers.iter().flat_map(|tiers| {
            let below = tiers.ids().map(|id| (id.place(), tiers.tier_stats(id)));
            std::iter::once((CacheTier::Host, tiers.host_stats())).chain(below)
        })
    }
    /// The tiers, if there are any: whoever drives them asks for their jobs.
    pub fn tiers(&mut self) -> Option<&mut Tiers> {
        self.tiers.as_mut()
    }

    /// Checks everything against the live sequences and the blocks that launched steps write (a block once per step).
    pub fn check_invariants<'a>(
        &self,
        sequences: impl Iterator<Item = &'a Sequence>,
        pinned: impl Iterator<Item = BlockId>,
    ) -> Result<()> {
        let mut table_refs = vec![0u32; self.num_blocks()];
        let mut last_holder = vec![None; self.num_blocks()];
        let mut num_unpublished = 0;
        for seq in sequences {
            for id in &seq.blocks {
                table_refs[id.0 as usize] += 1;
                let before = last_holder[id.0 as usize].replace(seq.id);
                violated(before == Some(seq.id), || format!("block {} is twice in the table of {:?}", id.0, seq.id))?;
            }
            self.check_keys(seq)?;
            num_unpublished += seq.block_keys.len().saturating_sub(seq.num_published);
        }
        let mut step_pins = vec![0u32; self.num_blocks()];
        pinned.for_each(|id| step_pins[id.0 as usize] += 1);
        self.pool.check_invariants(&table_refs, &step_pins)?;
        violated(self.index.num_claims() > num_unpublished, || "a block is claimed by nobody".to_string())?;
        self.tiers.as_ref().map_or(Ok(()), Tiers::check_invariants)?;
        self.check_index()
    }

    /// The sequence's keys are those of its tokens; its keyed blocks carry them; only computed blocks have one.
    fn check_keys(&self, seq: &Sequence) -> Result<()> {
        let mut keys = Vec::new();
        let (namespace, num_keys) = (&seq.spec.namespace, seq.block_keys.len());
        self.index.extend_keys(&mut keys, namespace, &seq.tokens, self.config.block_tokens, num_keys);
        violated(keys != seq.block_keys, || format!("keys of {:?} are not those of its tokens", seq.id))?;
        for (idx, &id) in seq.blocks.iter().enumerate() {
            if let Some(key) = self.pool.key(id) {
                violated(idx >= seq.num_published || keys[idx] != key, || {
                    format!("block {} of {:?} has a wrong key", id.0, seq.id)
                })?;
            }
        }
        Ok(())
    }

    /// Index and keyed blocks are the same set.
    fn check_index(&self) -> Result<()> {
        let ids = (0..self.num_blocks() as u32).map(BlockId);
        let keyed: Vec<_> = ids.filter_map(|id| Some((id, self.pool.key(id)?))).collect();
        for (id, key) in &keyed {
            violated(self.index.get(key) != Some(*id), || format!("block {} is not under its key", id.0))?;
        }
        violated(keyed.len() != self.index.len(), || "the index names blocks that have no key".to_string())
    }
}
