//! Where KV blocks go when the pool is full, and come back from: memory of the host, disk, a store that nodes share. This is
//! the state machine that decides: which block is where, whether fetching it beats computing it again, what is read and
//! written next, and what is given up. It owns no thread, clock, file or socket. Whoever drives a tier asks
//! [`Tiers::next_job`], does the job, and tells [`Tiers::complete`]; time is an argument, microseconds.
//!
//! - **A cache may forget, never lie, never block.** A fault is a miss. A block counts as stored when the tier has said so.
//!   The write queue is bounded; beyond it blocks are not stored.
//! - **Staged.** A restore hands out whole, checked blocks, in the order of the prefix. A block is all layers in one piece of
//!   bytes; a piece of another length is damage.
//! - **Measured.** Bytes per second of each tier and tokens per second of prefill are measured as they are used. A tier is
//!   skipped once it is slower than computing; what was never measured, or long ago, is tried.
//! - **Bounded waiting.** Reads go before writes. A restore that made no progress for `load_budget_us` ends with what it had,
//!   and so does one that has taken that much longer than computing its blocks would have. A tier whose job hangs that long
//!   gets no new reads, and one that keeps failing is left alone for a while ([`Breaker`]).
//! - What arrives too late is kept in host memory.
//! - **What was not stored is known**, until somebody asks ([`Tiers::take_unstored`]).
//!
//! Invariants: [`Tiers::check_invariants`].

mod clear;
mod held;
pub mod host;
mod job;
mod lost;
pub mod rate;
mod source;

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::num::NonZeroUsize;
use std::sync::Arc;

use lru::LruCache;

use crate::config::{MAX_QUARANTINED_BLOCKS, MAX_TIER_READS};
use crate::error::Error as EngineError;
use crate::ids::{BlockKey, OwnerKey, RestoreId};
use crate::owner_ledger::Ledger;
use crate::request::{CacheTier, MissReason};
use crate::storage::{Breaker, Damage, Fault, LayoutId, RecordKey, TierId, TierStats, Unstored};
pub use clear::ClearState;
use held::Held;
use host::HostTier;
pub use job::{Done, Job, JobId, Outcome, TierStore};
use lost::note_lost;
use rate::Rate;
use source::Source;

/// Why a tier that rests has not stored something.
const LEFT_ALONE: &str = "it failed several times and was left alone for a while";

/// Sizes and limits; fixed for the life of the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TiersConfig {
    /// What the bytes of a block mean.
    pub layout: LayoutId,
    /// Tokens of a block.
    pub block_tokens: usize,
    /// Bytes of a stored block; any other length is damage.
    pub block_bytes: usize,
    /// Memory of the host tier.
    pub host_bytes: u64,
    /// Bytes that may wait to be written to one tier.
    pub write_queue_bytes: u64,
    /// How long a restore waits without progress, microseconds.
    pub load_budget_us: u64,
    /// Tiers that are there.
    pub tiers: Vec<TierId>,
}

/// A block that came back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RestoredBlock {
    /// What it is found by.
    pub key: RecordKey,
    /// All of it.
    pub bytes: Arc<[u8]>,
    /// Where it was.
    pub source: CacheTier,
}

/// What a restore has brought since it was asked last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Arrived {
    /// The next blocks of the prefix.
    pub blocks: Vec<RestoredBlock>,
    /// Nothing more will come.
    pub has_ended: bool,
    /// Why it ended before all had come.
    pub cut: Option<MissReason>,
}

/// What a restore begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Begun {
    /// `None`: nothing is fetched.
    pub restore: Option<RestoreId>,
    /// Blocks that are fetched.
    pub num_blocks: usize,
    /// Whether more are there, which are computed since that is faster.
    pub has_slower: bool,
}

/// What was decided so far. Counters only grow, and count blocks unless they say otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TiersCounters {
    /// Handed out by restores.
    pub restored: u64,
    /// Not fetched because computing them was estimated to be faster.
    pub skipped_slower: u64,
    /// Restores that ended early because nothing arrived for too long.
    pub gave_up: u64,
    /// Arrived when nobody waited any more.
    pub late: u64,
    /// Not written because the queue was full or the tier was left alone.
    pub dropped_writes: u64,
}

/// A block that waits to be written.
#[derive(Debug)]
struct QueuedWrite {
    key: RecordKey,
    bytes: Arc<[u8]>,
    owner: OwnerKey,
}

#[derive(Debug)]
struct Tier {
    id: TierId,
    /// Blocks that it said it has. `Remote` may have more.
    held: Held,
    reads: VecDeque<RecordKey>,
    writes: VecDeque<QueuedWrite>,
    /// Keys of `writes` and of the write that is being done.
    writing: HashSet<RecordKey>,
    write_queue_bytes: u64,
    num_writes_queued: u64,
    /// Why nothing is written there.
    refusal: Option<Fault>,
    /// What owners have stored there, where each may store so much only.
    ledger: Option<Ledger>,
    /// What it was to have and has not.
    unstored: Unstored<RecordKey>,
    quarantines: VecDeque<RecordKey>,
    /// What was given to be done, in that order. Reads are done before the others.
    jobs: VecDeque<(JobId, Job)>,
    /// Since when one of them is being done.
    job_since_us: u64,
    next_job: JobId,
    /// Jobs before this one were given before all was given up.
    first_valid_job: JobId,
    clear: ClearState,
    read_rate: Rate,
    write_rate: Rate,
    breaker: Breaker,
    stats: TierStats,
}

#[derive(Debug)]
struct Restore {
    keys: Vec<RecordKey>,
    /// One per key, as they arrive; those that were handed out are gone.
    blocks: Vec<Option<RestoredBlock>>,
    /// Leading blocks that were handed out.
    num_given: usize,
    /// Nothing changed since, microseconds.
    progress_us: u64,
    /// When it ends whatever arrives, microseconds.
    ends_us: u64,
    /// Why the keys are not all that were asked for.
    cut: Option<MissReason>,
}

impl Restore {
    /// When it ends if nothing arrives.
    fn deadline_us(&self, load_budget_us: u64) -> u64 {
        self.progress_us.saturating_add(load_budget_us).min(self.ends_us)
    }
    fn is_complete(&self) -> bool {
        self.num_given == self.keys.len()
    }
    /// The block at `idx` will not come: what follows is of no use.
    fn cut(&mut self, idx: usize, reason: MissReason) {
        self.keys.truncate(idx);
        self.blocks.truncate(idx);
        self.cut = Some(reason);
    }
}

/// A block that is being fetched.
#[derive(Debug)]
struct Wanted {
    /// From where.
    tier: TierId,
    /// Whom it counts for: all who can read a block have one owner.
    owner: OwnerKey,
    waiting: Vec<RestoreId>,
}

/// The state machine of the tiers of one model.
#[derive(Debug)]
pub struct Tiers {
    config: TiersConfig,
    host: HostTier,
    tiers: Vec<Tier>,
    restores: BTreeMap<RestoreId, Restore>,
    /// Who waits for a block, and from which tier it comes.
    wanted: HashMap<RecordKey, Wanted>,
    quarantined: LruCache<RecordKey, ()>,
    /// What tiers have given up and nobody has asked for yet, oldest first; bounded.
    lost: VecDeque<(RecordKey, TierId)>,
    prefill_rate: Rate,
    next_restore: u64,
    counters: TiersCounters,
}

impl Tiers {
    /// Empty tiers.
    /// `owner_share`: of host memory, what one owner may keep when others need room.
    pub fn new(config: TiersConfig, owner_share: f64) -> Self {
        assert!(config.block_tokens > 0 && config.block_bytes > 0, "a block has tokens and bytes");
        let tier = |&id: &TierId| Tier {
            id,
            held: Held::of(id),
            reads: VecDeque::new(),
            writes: VecDeque::new(),
            writing: HashSet::new(),
            write_queue_bytes: 0,
            num_writes_queued: 0,
            refusal: None,
            ledger: None,
            unstored: Unstored::default(),
            quarantines: VecDeque::new(),
            jobs: VecDeque::new(),
            job_since_us: 0,
            next_job: JobId(0),
            first_valid_job: JobId(0),
            clear: ClearState::Done,
            read_rate: Rate::default(),
            write_rate: Rate::default(),
            breaker: Breaker::default(),
            stats: TierStats::default(),
        };
        Tiers {
            host: HostTier::new(config.host_bytes, (config.host_bytes as f64 * owner_share) as u64),
            tiers: config.tiers.iter().map(tier).collect(),
            restores: BTreeMap::new(),
            wanted: HashMap::new(),
            quarantined: LruCache::new(NonZeroUsize::new(MAX_QUARANTINED_BLOCKS).expect("not zero")),
            lost: VecDeque::new(),
            prefill_rate: Rate::default(),
            next_restore: 0,
            counters: TiersCounters::default(),
            config,
        }
    }

    /// Under what a block is stored here.
    pub fn record_key(&self, block: BlockKey) -> RecordKey {
        RecordKey { content: block.0, layout: self.config.layout }
    }

    /// What a tier held when it was opened.
    pub fn found(&mut self, id: TierId, keys: impl IntoIterator<Item = RecordKey>) {
        self.tier_mut(id).held.extend(keys);
    }
    /// What a tier has given up.
    pub fn lost(&mut self, id: TierId, keys: impl IntoIterator<Item = RecordKey>) {
        for key in keys {
            let tier = self.tier_mut(id);
            if tier.held.remove(&key) {
                tier.stats.evictions += 1;
                note_lost(&mut self.lost, (key, id));
            }
        }
    }
    /// What was given up since the last call, and where; of very many the newest.
    pub fn take_lost(&mut self) -> impl Iterator<Item = (BlockKey, CacheTier)> {
        let below = self.lost.drain(..).map(|(key, id)| (BlockKey(key.content), id.place()));
        self.host.take_lost().map(|key| (BlockKey(key.content), CacheTier::Host)).chain(below)
    }
    /// Whether a block that [`Tiers::begin`] has no source for is there all the same: in a tier that does not answer now, or
    /// not to be used again.
    pub fn is_withheld(&self, key: &RecordKey) -> bool {
        self.quarantined.contains(key) || self.tiers.iter().any(|tier| tier.held.contains(key))
    }
    /// Prefill of `num_tokens` took `elapsed_us`.
    pub fn note_prefill(&mut self, num_tokens: u64, elapsed_us: u64, now_us: u64) {
        self.prefill_rate.measure(num_tokens, elapsed_us, now_us);
    }

    /// Whether [`Tiers::spill`] would keep the block anywhere: else it need not be read.
    pub fn would_spill(&self, key: &RecordKey, owner: &OwnerKey, now_us: u64) -> bool {
        (self.config.host_bytes > 0 && !self.host.contains(key)) || self.would_persist(key, owner, now_us)
    }
    /// Whether [`Tiers::persist`] would write the block to any tier.
    pub fn would_persist(&self, key: &RecordKey, owner: &OwnerKey, now_us: u64) -> bool {
        self.tiers.iter().any(|tier| tier.lacks(key) && self.why_not_written(tier, owner, now_us).is_none())
    }
    /// The block that [`Tiers::would_persist`] asked about is not given to the tiers after all.
    pub fn pass_over(&mut self, key: &RecordKey, owner: &OwnerKey, now_us: u64) {
        if self.quarantined.contains(key) {
            return;
        }
        for idx in 0..self.tiers.len() {
            if self.tiers[idx].lacks(key) {
                let reason = self.why_not_written(&self.tiers[idx], owner, now_us);
                self.counters.dropped_writes += 1;
                self.tiers[idx].unstored.note(*key, reason.as_deref().unwrap_or("it could not be read from the pool"));
            }
        }
    }

    /// The pool gives a block away: it is kept in host memory and, where it is not yet, in the tiers below.
    pub fn spill(&mut self, key: RecordKey, bytes: Arc<[u8]>, owner: OwnerKey, now_us: u64) {
        if bytes.len() != self.config.block_bytes || self.quarantined.contains(&key) {
            return;
        }
        self.host.insert(key, Arc::clone(&bytes), owner);
        self.persist(key, bytes, owner, now_us);
    }

    /// A block that was computed is to outlive the process: it is written behind, if there is room in the queue.
    pub fn persist(&mut self, key: RecordKey, bytes: Arc<[u8]>, owner: OwnerKey, now_us: u64) {
        if bytes.len() != self.config.block_bytes || self.quarantined.contains(&key) {
            return;
        }
        for idx in 0..self.tiers.len() {
            if !self.tiers[idx].lacks(&key) {
                continue;
            }
            let reason = self.why_not_written(&self.tiers[idx], &owner, now_us);
            let tier = &mut self.tiers[idx];
            if let Some(reason) = reason {
                self.counters.dropped_writes += 1;
                tier.unstored.note(key, &reason);
                continue;
            }
            if let Some(ledger) = &mut tier.ledger {
                ledger.note(&owner, bytes.len() as u64, now_us / 1_000_000);
            }
            tier.write_queue_bytes += bytes.len() as u64;
            tier.num_writes_queued += 1;
            tier.writing.insert(key);
            tier.writes.push_back(QueuedWrite { key, bytes: Arc::clone(&bytes), owner });
        }
    }

    /// Why one block more cannot be written to a tier now; `None`: it can.
    fn why_not_written(&self, tier: &Tier, owner: &OwnerKey, now_us: u64) -> Option<Cow<'static, str>> {
        let limit_bytes = self.config.write_queue_bytes;
        if let Some(refusal) = &tier.refusal {
            Some(Cow::Owned(refusal.to_string()))
        } else if !tier.breaker.allows(now_us) {
            Some(Cow::Borrowed(LEFT_ALONE))
        } else if tier.write_queue_bytes + self.config.block_bytes as u64 > limit_bytes {
            Some(Cow::Owned(format!("{limit_bytes} bytes may wait to be written, and did")))
        } else if let Some(ledger) = &tier.ledger
            && !ledger.allows(owner, self.config.block_bytes as u64, now_us / 1_000_000)
        {
            let limit_bytes = ledger.limit_bytes();
            Some(Cow::Owned(format!("its owner may store {limit_bytes} bytes there in their time to live, and has")))
        } else {
            None
        }
    }

    /// The tier is not written: another process does, or it is not understood.
    pub fn forbid_writes(&mut self, id: TierId, refusal: Fault) {
        self.tier_mut(id).refusal = Some(refusal);
    }
    /// How many blocks a tier was to have and has not, since the last call, and why the last of them is not there.
    pub fn take_unstored(&mut self, id: TierId) -> Option<(u64, String)> {
        self.tier_mut(id).unstored.take()
    }
    /// Each owner may store `limit_bytes` in a tier within `ttl_s` seconds, for which they are kept.
    pub fn limit_owners(&mut self, id: TierId, limit_bytes: u64, ttl_s: u64) {
        self.tier_mut(id).ledger = Some(Ledger::new(limit_bytes, ttl_s));
    }
    /// How many writes were queued for a tier so far.
    pub fn num_writes_queued(&self, id: TierId) -> u64 {
        self.tier(id).num_writes_queued
    }
    /// How many of them have been done, have failed or were given up.
    pub fn num_writes_settled(&self, id: TierId) -> u64 {
        let tier = self.tier(id);
        tier.num_writes_queued - tier.writing.len() as u64
    }

    /// Begins to fetch the prefix `keys`, as far as it is somewhere and fetching is worth it.
    pub fn begin(&mut self, keys: &[RecordKey], owner: OwnerKey, now_us: u64) -> Begun {
        let mut sources = Vec::new();
        for key in keys {
            match self.source(key, now_us) {
                Some(source) => sources.push(source),
                None => break,
            }
        }
        let num_worth = self.num_worth_fetching(&sources, now_us);
        self.counters.skipped_slower += (sources.len() - num_worth) as u64;
        let has_slower = num_worth < sources.len();
        if num_worth == 0 {
            return Begun { has_slower, ..Begun::default() };
        }
        let id = RestoreId(self.next_restore);
        self.next_restore += 1;
        let mut blocks = Vec::new();
        for (key, source) in keys.iter().zip(&sources[..num_worth]) {
            blocks.push(match source {
                Source::Host => {
                    let bytes = self.host.get(key).expect("it is there");
                    Some(RestoredBlock { key: *key, bytes, source: CacheTier::Host })
                }
                Source::Tier(tier_id) => {
                    self.want(*key, *tier_id, owner, id);
                    None
                }
            });
        }
        let keys = keys[..num_worth].to_vec();
        let ends_us = now_us.saturating_add(self.longest_wait_us(&sources[..num_worth]));
        self.restores.insert(id, Restore { keys, blocks, num_given: 0, progress_us: now_us, ends_us, cut: None });
        Begun { restore: Some(id), num_blocks: num_worth, has_slower }
    }

    /// The blocks that have arrived since the last call, and whether that was all: because all came, because what follows
    /// cannot, or because nothing arrived for too long. A restore that is not known has ended.
    pub fn poll(&mut self, id: RestoreId, now_us: u64) -> Arrived {
        let Some(restore) = self.restores.get_mut(&id) else {
            return Arrived { blocks: Vec::new(), has_ended: true, cut: None };
        };
        let blocks: Vec<RestoredBlock> =
            restore.blocks[restore.num_given..].iter_mut().map_while(Option::take).collect();
        restore.num_given += blocks.len();
        self.counters.restored += blocks.len() as u64;
        let is_complete = restore.is_complete();
        let gives_up = now_us >= restore.deadline_us(self.config.load_budget_us);
        let cut = if is_complete { restore.cut } else { gives_up.then_some(MissReason::GaveUp) };
        if is_complete || gives_up {
            self.restores.remove(&id);
            self.counters.gave_up += u64::from(!is_complete);
        }
        Arrived { blocks, has_ended: is_complete || gives_up, cut }
    }

    /// When the next restore gives up if nothing arrives.
    pub fn next_deadline_us(&self) -> Option<u64> {
        self.restores.values().map(|restore| restore.deadline_us(self.config.load_budget_us)).min()
    }

    /// Nobody waits for the restore any more.
    pub fn cancel(&mut self, id: RestoreId) {
        self.restores.remove(&id);
    }

    /// The use of a block ended in an error of the engine: it is not used again.
    pub fn quarantine(&mut self, key: RecordKey) {
        self.quarantined.put(key, ());
        self.host.remove(&key);
        self.fail_wanted(&key, MissReason::Fault);
        for tier in &mut self.tiers {
            tier.held.remove(&key);
            // What waits to be written would stand behind the quarantine, and be found after a restart.
            if let Some(idx) = tier.writes.iter().position(|waiting| waiting.key == key) {
                let write = tier.writes.remove(idx).expect("found there");
                tier.write_queue_bytes -= write.bytes.len() as u64;
                tier.writing.remove(&key);
            }
            tier.quarantines.push_back(key);
            if tier.quarantines.len() > MAX_QUARANTINED_BLOCKS {
                tier.quarantines.pop_front();
            }
        }
    }

    /// What a tier is to do next; `None`: nothing, or it has enough to do. It does reads first, for somebody waits for them,
    /// and everything else in the order in which it was given. Writes are given as they come: the next step of the model
    /// may be long.
    pub fn next_job(&mut self, id: TierId, now_us: u64) -> Option<(JobId, Job)> {
        if !self.tier(id).breaker.allows(now_us) {
            self.drop_queues(id);
            return None;
        }
        let tier = self.tier(id);
        let num_reads = tier.num_given_reads();
        if tier.breaker.is_on_trial() && !tier.jobs.is_empty() {
            return None;
        }
        let clear = tier.next_clear();
        let can_read = clear.is_none() && num_reads < MAX_TIER_READS;
        let job = clear.or_else(|| if can_read { self.next_read(id).map(Job::Read) } else { None });
        let tier = self.tier_mut(id);
        let job = job.or_else(|| tier.quarantines.pop_front().map(Job::Quarantine)).or_else(|| {
            let QueuedWrite { key, bytes, owner } = tier.writes.pop_front()?;
            Some(Job::Write(key, bytes, owner))
        })?;
        if tier.jobs.is_empty() {
            tier.job_since_us = now_us;
        }
        let job_id = tier.next_job;
        tier.next_job.0 += 1;
        tier.jobs.push_back((job_id, job.clone()));
        Some((job_id, job))
    }

    /// A job that was given to a tier is done.
    pub fn complete(&mut self, id: TierId, job_id: JobId, done: Done, now_us: u64) {
        let Done { outcome, elapsed_us } = done;
        let tier = self.tier_mut(id);
        let place = tier.jobs.iter().position(|(given, _)| *given == job_id).expect("it was given, and is done once");
        let (_, job) = tier.jobs.remove(place).expect("found there");
        tier.job_since_us = now_us;
        let is_stale = job_id < tier.first_valid_job;
        // The tier gets on: who waits for it goes on waiting.
        let is_awaited = |restore: &Restore| {
            let next = restore.keys.get(restore.num_given);
            next.and_then(|key| self.wanted.get(key)).is_some_and(|wanted| wanted.tier == id)
        };
        self.restores.values_mut().filter(|it| is_awaited(it)).for_each(|restore| restore.progress_us = now_us);
        let outcome = self.checked(outcome);
        if let Outcome::Fault(_) = outcome {
            let tier = self.tier_mut(id);
            tier.stats.faults += 1;
            tier.breaker.failed(now_us);
        } else {
            self.tier_mut(id).breaker.succeeded(now_us);
        }
        match job {
            Job::Read(key) if is_stale => self.complete_stale_read(id, key, outcome, now_us),
            Job::Read(key) => self.complete_read(id, key, outcome, elapsed_us, now_us),
            Job::Write(key, bytes, _) => {
                let is_quarantined = self.quarantined.contains(&key);
                let tier = self.tier_mut(id);
                tier.write_queue_bytes -= bytes.len() as u64;
                tier.writing.remove(&key);
                match outcome {
                    Outcome::Stored => {
                        tier.stats.stored += 1;
                        tier.write_rate.measure(bytes.len() as u64, elapsed_us, now_us);
                        if !is_quarantined && !is_stale {
                            tier.held.insert(key);
                            tier.unstored.is_stored(&key);
                        }
                    }
                    Outcome::Fault(fault) if !is_quarantined && !is_stale => {
                        tier.unstored.note(key, &fault.to_string())
                    }
                    _ => {}
                }
            }
            // Once more, when the tier works again.
            Job::Quarantine(key) if matches!(outcome, Outcome::Fault(_)) => {
                self.tier_mut(id).quarantines.push_front(key)
            }
            Job::Quarantine(_) => {}
            Job::Clear => {
                let tier = self.tier_mut(id);
                // Asked for once more meanwhile, it is done once more.
                if !is_stale {
                    tier.clear = match outcome {
                        Outcome::Fault(fault) => ClearState::Failed(fault),
                        _ => ClearState::Done,
                    };
                }
            }
        }
        if !self.tier(id).breaker.allows(now_us) {
            self.drop_queues(id);
        }
    }

    /// Whether a tier has done all that there is to do.
    pub fn is_idle(&self, id: TierId) -> bool {
        let tier = self.tier(id);
        let has_queued = !tier.reads.is_empty() || !tier.writes.is_empty() || !tier.quarantines.is_empty();
        tier.jobs.is_empty() && !has_queued && tier.clear != ClearState::Pending
    }
    /// The tiers that are there.
    pub fn ids(&self) -> impl Iterator<Item = TierId> {
        self.tiers.iter().map(|tier| tier.id)
    }

    /// Statistics of host memory.
    pub fn host_stats(&self) -> TierStats {
        self.host.stats()
    }
    /// Statistics of a tier, as this machine has seen it.
    pub fn tier_stats(&self, id: TierId) -> TierStats {
        let (tier, block_bytes) = (self.tier(id), self.config.block_bytes as u64);
        TierStats { entries: tier.held.len() as u64, bytes: tier.held.len() as u64 * block_bytes, ..tier.stats }
    }
    /// How often a tier was left alone because it kept failing.
    pub fn num_rests(&self, id: TierId) -> u64 {
        self.tier(id).breaker.num_rests()
    }
    /// What was decided.
    pub fn counters(&self) -> TiersCounters {
        self.counters
    }

    /// Queues are within their bounds and add up; what restores wait for is being fetched; nothing quarantined is held.
    pub fn check_invariants(&self) -> crate::Result<()> {
        self.host.check_invariants()?;
        let broken = |reason: String| Err(EngineError::Internal { reason });
        for tier in &self.tiers {
            let in_job = tier.jobs.iter().filter_map(|(_, job)| match job {
                Job::Write(key, bytes, _) => Some((key, bytes)),
                _ => None,
            });
            let writes = tier.writes.iter().map(|write| (&write.key, &write.bytes)).chain(in_job);
            let (keys, bytes): (HashSet<RecordKey>, Vec<u64>) = writes.map(|(key, b)| (*key, b.len() as u64)).unzip();
            let queued_bytes: u64 = bytes.iter().sum();
            if keys != tier.writing || bytes.len() != keys.len() || queued_bytes != tier.write_queue_bytes {
                return broken(format!("{:?} counts {} bytes of {queued_bytes}", tier.id, tier.write_queue_bytes));
            }
            if queued_bytes > self.config.write_queue_bytes {
                return broken(format!("{queued_bytes} bytes wait for {:?}", tier.id));
            }
            if let Some(key) = tier.held.keys().find(|key| self.quarantined.contains(key)) {
                return broken(format!("{key:?} is quarantined and held by {:?}", tier.id));
            }
        }
        for (id, restore) in &self.restores {
            let awaited = restore.keys.iter().zip(&restore.blocks).skip(restore.num_given);
            for (key, _) in awaited.filter(|(_, block)| block.is_none()) {
                let Some(Wanted { tier: tier_id, waiting, .. }) = self.wanted.get(key) else {
                    return broken(format!("{id:?} waits for {key:?}, which nobody fetches"));
                };
                let tier = self.tier(*tier_id);
                let is_read = tier.reads.contains(key) || tier.jobs.iter().any(|(_, job)| *job == Job::Read(*key));
                if !is_read || !waiting.contains(id) {
                    return broken(format!("{id:?} waits in vain for {key:?} from {tier_id:?}"));
                }
            }
        }
        Ok(())
    }
}

// Jobs.
impl Tiers {
    /// The next read that somebody still waits for.
    fn next_read(&mut self, id: TierId) -> Option<RecordKey> {
        while let Some(key) = self.tier_mut(id).reads.pop_front() {
            let waiting = self.wanted.get(&key).map_or(&[][..], |wanted| &wanted.waiting);
            if waiting.iter().any(|restore| self.restores.get(restore).is_some_and(|it| it.keys.contains(&key))) {
                return Some(key);
            }
            self.wanted.remove(&key);
        }
        None
    }

    /// A block of another length is damage, whoever has checked it.
    fn checked(&self, outcome: Outcome) -> Outcome {
        let expected = self.config.block_bytes;
        match outcome {
            Outcome::Found(bytes) if bytes.len() != expected => {
                let (found_bytes, limit_bytes) = (bytes.len() as u64, expected as u64);
                Outcome::Fault(Fault::Damaged(Damage::Length { found_bytes, limit_bytes }))
            }
            other => other,
        }
    }

    fn complete_read(&mut self, id: TierId, key: RecordKey, outcome: Outcome, elapsed_us: u64, now_us: u64) {
        match outcome {
            Outcome::Found(bytes) => {
                let tier = self.tier_mut(id);
                tier.read_rate.measure(bytes.len() as u64, elapsed_us, now_us);
                tier.stats.hits += 1;
                tier.stats.hit_bytes += bytes.len() as u64;
                if !self.quarantined.contains(&key) {
                    self.tier_mut(id).held.insert(key);
                    self.deliver(id, key, bytes, now_us);
                }
            }
            Outcome::Fault(fault) => {
                if let Fault::Damaged(_) = fault {
                    self.tier_mut(id).held.remove(&key);
                }
                self.fail_wanted(&key, MissReason::Fault);
            }
            // Whatever a tier calls it, it brought nothing.
            Outcome::Missing | Outcome::Stored | Outcome::Done => {
                let tier = self.tier_mut(id);
                tier.stats.misses += 1;
                let was_held = tier.held.remove(&key);
                let reason = if was_held { MissReason::Evicted(id.place()) } else { MissReason::NeverSeen };
                self.fail_wanted(&key, reason);
            }
        }
    }

    /// A block that was given up while it was read: only for those who wait.
    fn complete_stale_read(&mut self, id: TierId, key: RecordKey, outcome: Outcome, now_us: u64) {
        match outcome {
            Outcome::Found(bytes) if !self.quarantined.contains(&key) => {
                self.hand_out(id, key, &bytes, now_us);
            }
            _ => self.fail_wanted(&key, MissReason::NeverSeen),
        }
    }

    /// Gives a block to all who wait for it; to host memory when nobody does; and to the tiers that lack it.
    fn deliver(&mut self, from: TierId, key: RecordKey, bytes: Arc<[u8]>, now_us: u64) {
        let (wanted, is_late) = self.hand_out(from, key, &bytes, now_us);
        // One that was quarantined meanwhile is wanted by nobody at all.
        let owner = wanted.map_or(OwnerKey::default(), |wanted| wanted.owner);
        if is_late {
            self.counters.late += 1;
            self.host.insert(key, Arc::clone(&bytes), owner);
        }
        self.persist(key, bytes, owner, now_us);
    }

    /// Gives a block to all who wait for it. Who wanted it, and whether nobody waits any more.
    fn hand_out(&mut self, from: TierId, key: RecordKey, bytes: &Arc<[u8]>, now_us: u64) -> (Option<Wanted>, bool) {
        let wanted = self.wanted.remove(&key);
        let mut is_late = true;
        for id in wanted.iter().flat_map(|wanted| &wanted.waiting) {
            let Some(restore) = self.restores.get_mut(id) else { continue };
            let Some(idx) = restore.keys.iter().position(|other| *other == key) else { continue };
            restore.blocks[idx] = Some(RestoredBlock { key, bytes: Arc::clone(bytes), source: from.place() });
            restore.progress_us = now_us;
            is_late = false;
        }
        (wanted, is_late)
    }

    /// A block will not come: who waits for it does with what is before it.
    fn fail_wanted(&mut self, key: &RecordKey, reason: MissReason) {
        let Some(Wanted { tier, waiting, .. }) = self.wanted.remove(key) else { return };
        self.tier_mut(tier).reads.retain(|other| other != key);
        for id in waiting {
            let Some(restore) = self.restores.get_mut(&id) else { continue };
            if let Some(idx) = restore.keys.iter().position(|other| other == key) {
                restore.cut(idx, reason);
            }
        }
    }

    /// The tier is left alone: what waits for it does not come, what was to be written is not.
    fn drop_queues(&mut self, id: TierId) {
        let reads: Vec<RecordKey> = self.tier_mut(id).reads.drain(..).collect();
        reads.iter().for_each(|key| self.fail_wanted(key, MissReason::Fault));
        let tier = self.tier_mut(id);
        let dropped = tier.drop_writes();
        dropped.iter().for_each(|key| tier.unstored.note(*key, LEFT_ALONE));
        self.counters.dropped_writes += dropped.len() as u64;
    }

    fn tier(&self, id: TierId) -> &Tier {
        self.tiers.iter().find(|tier| tier.id == id).expect("only tiers of the configuration are named")
    }
    fn tier_mut(&mut self, id: TierId) -> &mut Tier {
        self.tiers.iter_mut().find(|tier| tier.id == id).expect("only tiers of the configuration are named")
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;
    use crate::storage::breaker::{FIRST_REST_US, MAX_FAULTS, MAX_REST_US};

    const OWNER: OwnerKey = [0; 32];
    const BLOCK_BYTES: usize = 1_000;
    const BUDGET_US: u64 = 50_000;

    fn key(name: u32) -> RecordKey {
        let mut content = [0; 32];
        content[..4].copy_from_slice(&name.to_le_bytes());
        RecordKey { content, layout: LayoutId([0; 32]) }
    }
    fn keys(names: std::ops::Range<u32>) -> Vec<RecordKey> {
        names.map(key).collect()
    }
    fn block(key: &RecordKey) -> Arc<[u8]> {
        (0..BLOCK_BYTES).map(|i| key.content[i % 4].wrapping_add(i as u8)).collect()
    }
    fn machine(host_blocks: u64, tiers: &[TierId]) -> Tiers {
        let config = TiersConfig {
            layout: LayoutId([0; 32]),
            block_tokens: 16,
            block_bytes: BLOCK_BYTES,
            host_bytes: host_blocks * (BLOCK_BYTES as u64 + host::ENTRY_BYTES),
            write_queue_bytes: 4 * BLOCK_BYTES as u64,
            load_budget_us: BUDGET_US,
            tiers: tiers.to_vec(),
        };
        Tiers::new(config, 1.0)
    }
    fn io_fault() -> Outcome {
        Outcome::Fault(Fault::Io { operation: "read", kind: io::ErrorKind::Other, reason: "simulated".to_string() })
    }
    /// Does all reads of a tier, each in `each_us`, with `outcome`.
    fn serve(
        tiers: &mut Tiers,
        id: TierId,
        now_us: &mut u64,
        each_us: u64,
        outcome: impl Fn(&Job) -> Outcome,
    ) -> usize {
        let mut num_jobs = 0;
        while let Some((job_id, job)) = tiers.next_job(id, *now_us) {
            *now_us += each_us;
            tiers.complete(id, job_id, Done { outcome: outcome(&job), elapsed_us: each_us }, *now_us);
            tiers.check_invariants().expect("sound");
            num_jobs += 1;
        }
        num_jobs
    }
    fn works(job: &Job) -> Outcome {
        match job {
            Job::Read(key) => Outcome::Found(block(key)),
            Job::Write(..) => Outcome::Stored,
            Job::Quarantine(_) | Job::Clear => Outcome::Done,
        }
    }
    fn names(blocks: &[RestoredBlock]) -> Vec<RecordKey> {
        assert!(blocks.iter().all(|it| it.bytes == block(&it.key)), "a wrong block");
        blocks.iter().map(|it| it.key).collect()
    }
    /// The rest of a restore that ends with it.
    fn rest(tiers: &mut Tiers, id: RestoreId, now_us: u64) -> Vec<RecordKey> {
        let arrived = tiers.poll(id, now_us);
        assert!(arrived.has_ended, "it goes on");
        names(&arrived.blocks)
    }

    /// A prefix comes back in order from host memory and disk together, block by block as it arrives.
    #[test]
    fn prefix_comes_back_from_two_tiers() {
        let mut tiers = machine(2, &[TierId::Disk]);
        let mut now_us = 0;
        for key in keys(0..5) {
            tiers.spill(key, block(&key), OWNER, now_us);
            serve(&mut tiers, TierId::Disk, &mut now_us, 10, works);
        }
        assert_eq!((tiers.host_stats().entries, tiers.host_stats().evictions), (2, 3));
        assert_eq!(tiers.tier_stats(TierId::Disk).stored, 5);
        let id = tiers.begin(&keys(0..9), OWNER, now_us).restore.expect("some of it is there");
        assert_eq!(
            tiers.poll(id, now_us),
            Arrived { blocks: vec![], has_ended: false, cut: None },
            "the first three are on disk"
        );
        let (job_id, job) = tiers.next_job(TierId::Disk, now_us).expect("a read");
        tiers.complete(TierId::Disk, job_id, Done { outcome: works(&job), elapsed_us: 10 }, now_us);
        let first = tiers.poll(id, now_us);
        assert_eq!((names(&first.blocks), first.has_ended), (keys(0..1), false), "as they arrive");
        assert_eq!(serve(&mut tiers, TierId::Disk, &mut now_us, 10, works), 2);
        let last = tiers.poll(id, now_us);
        let sources: Vec<CacheTier> = last.blocks.iter().map(|block| block.source).collect();
        assert_eq!((names(&last.blocks), last.has_ended), (keys(1..5), true));
        let (disk, host) = (CacheTier::Disk, CacheTier::Host);
        assert_eq!(sources, [disk, disk, host, host]);
        assert_eq!(rest(&mut tiers, id, now_us), [], "handed out once");
        assert_eq!(tiers.begin(&keys(20..22), OWNER, now_us).restore, None);
        assert_eq!((tiers.tier_stats(TierId::Disk).hits, tiers.counters().restored), (3, 5));
    }

    /// Whatever a read brings but the block ends the prefix there: a fault, nothing, a block of another length.
    #[test]
    fn fault_ends_the_prefix() {
        let lies: [fn() -> Outcome; 4] = [
            io_fault,
            || Outcome::Missing,
            || Outcome::Found(vec![1; BLOCK_BYTES - 1].into()),
            || Outcome::Fault(Fault::Damaged(Damage::PayloadChecksum)),
        ];
        for (idx, lie) in lies.iter().enumerate() {
            let mut tiers = machine(0, &[TierId::Disk]);
            let mut now_us = 0;
            tiers.found(TierId::Disk, keys(0..4));
            let id = tiers.begin(&keys(0..4), OWNER, now_us).restore.expect("all is there");
            let outcome = |job: &Job| if *job == Job::Read(key(2)) { lie() } else { works(job) };
            assert_eq!(serve(&mut tiers, TierId::Disk, &mut now_us, 10, outcome), 3, "what follows is not read");
            assert_eq!(rest(&mut tiers, id, now_us), keys(0..2), "lie {idx}");
            let stats = tiers.tier_stats(TierId::Disk);
            assert_eq!((stats.faults, stats.misses), (u64::from(idx != 1), u64::from(idx == 1)), "lie {idx}");
            let is_held = idx == 0;
            assert_eq!(stats.entries, 3 + u64::from(is_held), "what is damaged or missing is forgotten");
        }
    }

    /// A tier that is slower than computing is skipped, by measurement; after a while one block is tried again.
    #[test]
    fn slow_tier_is_skipped() {
        let mut tiers = machine(0, &[TierId::Disk]);
        let mut now_us = 0;
        tiers.found(TierId::Disk, keys(0..100));
        // 16 tokens take 1,000 us.
        tiers.note_prefill(16_000, 1_000_000, now_us);
        let id = tiers.begin(&keys(0..2), OWNER, now_us).restore.expect("never measured, so it is tried");
        serve(&mut tiers, TierId::Disk, &mut now_us, 5_000, works);
        assert_eq!(rest(&mut tiers, id, now_us).len(), 2);
        assert_eq!(tiers.begin(&keys(10..20), OWNER, now_us).restore, None, "5 ms instead of 1 ms a block");
        assert_eq!(tiers.counters().skipped_slower, 10);
        now_us += MAX_REST_US;
        let id = tiers.begin(&keys(10..20), OWNER, now_us).restore.expect("a trial");
        assert_eq!(serve(&mut tiers, TierId::Disk, &mut now_us, 20, works), 1, "of one block");
        assert_eq!(rest(&mut tiers, id, now_us).len(), 1);
        assert!(tiers.begin(&keys(20..30), OWNER, now_us).restore.is_some(), "it is fast now");
    }

    /// A disk that hangs costs the load budget once; then nobody waits for it, and what it brings at last is kept.
    #[test]
    fn stalled_tier_costs_the_budget_once() {
        let mut tiers = machine(4, &[TierId::Disk]);
        tiers.found(TierId::Disk, keys(0..4));
        let id = tiers.begin(&keys(0..4), OWNER, 0).restore.expect("all is there");
        assert_eq!(tiers.next_job(TierId::Disk, 0), Some((JobId(0), Job::Read(key(0)))));
        assert_eq!(tiers.next_deadline_us(), Some(BUDGET_US));
        assert!(!tiers.poll(id, BUDGET_US - 1).has_ended);
        assert_eq!(rest(&mut tiers, id, BUDGET_US), []);
        assert_eq!(tiers.begin(&keys(0..4), OWNER, BUDGET_US).restore, None, "it hangs");
        assert_eq!(tiers.next_job(TierId::Disk, BUDGET_US), None, "nobody waits for more");
        let done = Done { outcome: works(&Job::Read(key(0))), elapsed_us: 10_000_000 };
        tiers.complete(TierId::Disk, JobId(0), done, 10_000_000);
        let counters = tiers.counters();
        assert_eq!((counters.gave_up, counters.late, tiers.host_stats().entries), (1, 1, 1));
        assert_eq!(tiers.next_job(TierId::Disk, 10_000_000), None, "nobody waits for the rest");
        let id = tiers.begin(&keys(0..1), OWNER, 10_000_000).restore.expect("in host memory");
        assert_eq!(rest(&mut tiers, id, 10_000_000), keys(0..1));
        tiers.check_invariants().expect("sound");
    }

    /// A tier that keeps failing is left alone: no reads, no writes, nobody waits; after its rest it has a trial.
    #[test]
    fn failing_tier_is_left_alone() {
        let mut tiers = machine(0, &[TierId::Disk]);
        let mut now_us = 0;
        tiers.found(TierId::Disk, keys(0..20));
        tiers.persist(key(50), block(&key(50)), OWNER, now_us);
        let ids: Vec<_> = (0..8).map(|i| tiers.begin(&[key(i)], OWNER, now_us).restore.expect("there")).collect();
        let num_jobs = serve(&mut tiers, TierId::Disk, &mut now_us, 10, |_| io_fault());
        assert_eq!((num_jobs, tiers.num_rests(TierId::Disk)), (MAX_FAULTS as usize, 1));
        assert!(ids.iter().all(|id| rest(&mut tiers, *id, now_us).is_empty()), "nobody waits for it");
        assert_eq!(tiers.begin(&keys(10..12), OWNER, now_us).restore, None);
        tiers.persist(key(51), block(&key(51)), OWNER, now_us);
        assert_eq!((tiers.counters().dropped_writes, tiers.next_job(TierId::Disk, now_us)), (2, None));
        now_us += FIRST_REST_US;
        let id = tiers.begin(&keys(10..12), OWNER, now_us).restore.expect("a trial");
        assert_eq!(serve(&mut tiers, TierId::Disk, &mut now_us, 10, works), 2);
        assert_eq!(rest(&mut tiers, id, now_us), keys(10..12));
        assert_eq!(tiers.tier_stats(TierId::Disk).faults, u64::from(MAX_FAULTS));
    }

    /// The write queue is bounded: what does not fit is not stored, and nothing counts as stored before it is.
    #[test]
    fn write_queue_is_bounded() {
        let mut tiers = machine(0, &[TierId::Disk]);
        let mut now_us = 0;
        for key in keys(0..10) {
            tiers.persist(key, block(&key), OWNER, now_us);
            tiers.persist(key, block(&key), OWNER, now_us);
        }
        assert!(tiers.counters().dropped_writes >= 6, "the queue holds four");
        assert_eq!(tiers.begin(&keys(0..4), OWNER, now_us).restore, None, "queued is not stored");
        assert_eq!(serve(&mut tiers, TierId::Disk, &mut now_us, 10, works), 4);
        assert_eq!(tiers.tier_stats(TierId::Disk).entries, 4);
        tiers.persist(key(20), block(&key(20)), OWNER, now_us);
        serve(&mut tiers, TierId::Disk, &mut now_us, 10, |_| io_fault());
        assert_eq!(tiers.tier_stats(TierId::Disk).entries, 4, "a write that failed stored nothing");
        tiers.lost(TierId::Disk, keys(0..2));
        assert_eq!(
            (tiers.begin(&keys(0..4), OWNER, now_us).restore, tiers.tier_stats(TierId::Disk).evictions),
            (None, 2)
        );
        tiers.persist(key(30), vec![0; 3].into(), OWNER, now_us);
        assert_eq!(tiers.next_job(TierId::Disk, now_us), None, "not a block");
    }

    /// A tier that was given writes only one by one would store one block for each step of a large model, and lose the rest of
    /// a long prompt to the bound of the queue. A read is given beside them, and may be done before them.
    #[test]
    fn writes_are_given_as_they_come() {
        let mut tiers = machine(0, &[TierId::Disk]);
        tiers.found(TierId::Disk, keys(10..11));
        keys(0..4).iter().for_each(|key| tiers.persist(*key, block(key), OWNER, 0));
        let mut jobs: Vec<(JobId, Job)> = std::iter::from_fn(|| tiers.next_job(TierId::Disk, 0)).collect();
        assert_eq!(jobs.len(), 4, "all at once");
        let id = tiers.begin(&keys(10..11), OWNER, 0).restore.expect("it is there");
        jobs.insert(1, tiers.next_job(TierId::Disk, 0).expect("also while it writes"));
        let mut now_us = 0;
        for (place, (job_id, job)) in jobs.iter().enumerate() {
            now_us += BUDGET_US / 4;
            assert_eq!(tiers.poll(id, now_us).has_ended, place > 1, "the tier gets on");
            tiers.complete(TierId::Disk, *job_id, Done { outcome: works(job), elapsed_us: BUDGET_US / 4 }, now_us);
            if place == 1 {
                assert_eq!(rest(&mut tiers, id, now_us), keys(10..11));
            }
        }
        assert_eq!((tiers.tier_stats(TierId::Disk).stored, tiers.counters().gave_up), (4, 0));
        tiers.check_invariants().expect("sound");
    }

    /// However often something arrives, a restore ends when it has taken as long as computing its blocks would have, and the
    /// load budget.
    #[test]
    fn wait_has_a_hard_end() {
        for is_measured in [false, true] {
            let mut tiers = machine(0, &[TierId::Disk]);
            tiers.found(TierId::Disk, keys(0..16));
            if is_measured {
                // A block of 16 tokens takes 10 ms to compute.
                tiers.note_prefill(1_600, 1_000_000, 0);
            }
            let id = tiers.begin(&keys(0..16), OWNER, 0).restore.expect("never measured, so it is tried");
            // Each block comes within the load budget, and so never too late for that.
            let (mut now_us, mut blocks) = (0, Vec::new());
            let arrived = loop {
                let (job_id, job) = tiers.next_job(TierId::Disk, now_us).expect("there is more to read");
                now_us += BUDGET_US - 1;
                tiers.complete(TierId::Disk, job_id, Done { outcome: works(&job), elapsed_us: BUDGET_US - 1 }, now_us);
                let arrived = tiers.poll(id, now_us);
                blocks.extend(names(&arrived.blocks));
                if arrived.has_ended {
                    break arrived;
                }
                assert!(tiers.next_deadline_us().is_some_and(|deadline_us| deadline_us > now_us));
            };
            let longest_us = if is_measured { 16 * 10_000 + BUDGET_US } else { 17 * BUDGET_US };
            let (num_blocks, cut) = if is_measured { (5, Some(MissReason::GaveUp)) } else { (16, None) };
            assert_eq!((blocks, arrived.cut), (keys(0..num_blocks), cut));
            assert!(now_us <= longest_us + BUDGET_US, "{now_us}");
            assert_eq!(tiers.counters().gave_up, u64::from(is_measured));
        }
    }

    /// What a tier does before counts when it is decided whether to ask it: reads that it was given, and a write.
    #[test]
    fn jobs_under_way_count_as_time() {
        let mut tiers = machine(0, &[TierId::Disk]);
        let mut now_us = 0;
        tiers.found(TierId::Disk, keys(0..100));
        let id = tiers.begin(&keys(0..1), OWNER, now_us).restore.expect("there");
        tiers.persist(key(200), block(&key(200)), OWNER, now_us);
        // A read and a write take 1 ms each, a block 2.5 ms to compute.
        serve(&mut tiers, TierId::Disk, &mut now_us, 1_000, works);
        assert_eq!(rest(&mut tiers, id, now_us).len(), 1);
        tiers.note_prefill(16_000, 2_500_000, now_us);
        let idle = tiers.begin(&keys(10..11), OWNER, now_us).restore.expect("1 ms against 2.5 ms");
        assert_eq!(serve(&mut tiers, TierId::Disk, &mut now_us, 1_000, works), 1);
        assert_eq!(rest(&mut tiers, idle, now_us).len(), 1);
        tiers.persist(key(201), block(&key(201)), OWNER, now_us);
        assert!(tiers.next_job(TierId::Disk, now_us).is_some(), "a write");
        let other = tiers.begin(&keys(11..12), OWNER, now_us).restore;
        assert!(other.is_some(), "2 ms against 2.5 ms");
        assert!(tiers.next_job(TierId::Disk, now_us).is_some(), "a read");
        assert_eq!(tiers.begin(&keys(20..21), OWNER, now_us).restore, None, "3 ms against 2.5 ms");
        assert_eq!(tiers.counters().skipped_slower, 1);
    }

    /// What a store that nodes share was told to have is remembered within a bound, the oldest forgotten; so it is asked for
    /// all the same, and stored again when it is computed.
    #[test]
    fn what_a_shared_store_has_is_remembered_within_a_bound() {
        use crate::config::MAX_REMOTE_KNOWN_BLOCKS;
        let mut tiers = machine(0, &[TierId::Remote]);
        let mut now_us = 0;
        tiers.persist(key(0), block(&key(0)), OWNER, now_us);
        assert_eq!(serve(&mut tiers, TierId::Remote, &mut now_us, 10, works), 1);
        tiers.persist(key(0), block(&key(0)), OWNER, now_us);
        assert_eq!(serve(&mut tiers, TierId::Remote, &mut now_us, 10, works), 0, "it is known to be there");
        tiers.found(TierId::Remote, keys(1..MAX_REMOTE_KNOWN_BLOCKS as u32 + 1));
        assert_eq!(tiers.tier_stats(TierId::Remote).entries, MAX_REMOTE_KNOWN_BLOCKS as u64);
        tiers.persist(key(0), block(&key(0)), OWNER, now_us);
        assert_eq!(serve(&mut tiers, TierId::Remote, &mut now_us, 10, works), 1, "it was forgotten");
        let id = tiers.begin(&keys(1..2), OWNER, now_us).restore.expect("forgotten, and asked for");
        assert_eq!(serve(&mut tiers, TierId::Remote, &mut now_us, 10, works), 1);
        assert_eq!(rest(&mut tiers, id, now_us), keys(1..2));
    }

    /// An owner stores in a shared place what he may and no more, which a flush tells; others do as ever, and after its time he
    /// may again.
    #[test]
    fn owner_stores_what_he_may_in_a_shared_store() {
        let mut tiers = machine(0, &[TierId::Remote]);
        tiers.limit_owners(TierId::Remote, 3 * BLOCK_BYTES as u64, 100);
        let mut now_us = 0;
        let store = |tiers: &mut Tiers, name: u32, owner: OwnerKey, now_us: &mut u64| {
            let would = tiers.would_persist(&key(name), &owner, *now_us);
            tiers.persist(key(name), block(&key(name)), owner, *now_us);
            assert_eq!(serve(tiers, TierId::Remote, now_us, 10, works), usize::from(would));
            would
        };
        let stored = (0..10).filter(|&name| store(&mut tiers, name, [1; 32], &mut now_us)).count();
        assert_eq!(stored, 3);
        assert!(store(&mut tiers, 50, [2; 32], &mut now_us), "another owner");
        let (count, reason) = tiers.take_unstored(TierId::Remote).expect("seven were not");
        assert!(count == 7 && reason.contains("may store 3000 bytes"), "{count}: {reason}");
        now_us += 120_000_000;
        assert!(store(&mut tiers, 9, [1; 32], &mut now_us));
    }

    /// Whatever keeps a block from being stored is told once: no room in the queue, a write that fails, a tier that rests, one
    /// that may not be written, a block that nobody could read. What is stored later after all, or given up on purpose, is not.
    #[test]
    fn what_was_not_stored_is_told() {
        let mut tiers = machine(0, &[TierId::Disk]);
        let mut now_us = 0;
        let told = |tiers: &mut Tiers| tiers.take_unstored(TierId::Disk);
        keys(0..6).iter().for_each(|key| tiers.persist(*key, block(key), OWNER, now_us));
        serve(&mut tiers, TierId::Disk, &mut now_us, 10, works);
        tiers.persist(key(5), block(&key(5)), OWNER, now_us);
        serve(&mut tiers, TierId::Disk, &mut now_us, 10, works);
        let (count, reason) = told(&mut tiers).expect("the queue holds four");
        assert!(count == 1 && reason.contains("4000 bytes may wait"), "{count}: {reason}");
        assert_eq!(told(&mut tiers), None, "once");
        keys(10..14).iter().for_each(|key| tiers.persist(*key, block(key), OWNER, now_us));
        assert!(!tiers.would_persist(&key(14), &OWNER, now_us));
        tiers.pass_over(&key(14), &OWNER, now_us);
        tiers.pass_over(&key(10), &OWNER, now_us);
        serve(&mut tiers, TierId::Disk, &mut now_us, 10, works);
        assert_eq!(told(&mut tiers).map(|(count, _)| count), Some(1), "what is on its way is not missing");
        tiers.pass_over(&key(15), &OWNER, now_us);
        assert!(told(&mut tiers).is_some_and(|(count, reason)| count == 1 && reason.contains("read from the pool")));
        keys(20..24).iter().for_each(|key| tiers.persist(*key, block(key), OWNER, now_us));
        serve(&mut tiers, TierId::Disk, &mut now_us, 10, |_| io_fault());
        assert_eq!(told(&mut tiers), Some((4, "read: simulated".to_string())));
        keys(30..34).iter().for_each(|key| tiers.persist(*key, block(key), OWNER, now_us));
        serve(&mut tiers, TierId::Disk, &mut now_us, 10, |_| io_fault());
        tiers.persist(key(34), block(&key(34)), OWNER, now_us);
        assert_eq!(told(&mut tiers), Some((5, LEFT_ALONE.to_string())), "one failed, three were dropped, one refused");
        tiers.persist(key(35), block(&key(35)), OWNER, now_us);
        tiers.clear(now_us);
        assert_eq!(told(&mut tiers), None, "given up on purpose");
        now_us += MAX_REST_US;
        tiers.forbid_writes(TierId::Disk, Fault::ReadOnly);
        tiers.persist(key(40), block(&key(40)), OWNER, now_us);
        assert!(told(&mut tiers).is_some_and(|(count, reason)| count == 1 && reason.contains("another process")));
        tiers.check_invariants().expect("sound");
    }

    /// What led to an error comes from no tier again, and is not stored again.
    #[test]
    fn quarantined_block_stays_away() {
        let mut tiers = machine(4, &[TierId::Disk, TierId::Remote]);
        let mut now_us = 0;
        tiers.spill(key(0), block(&key(0)), OWNER, now_us);
        for id in [TierId::Disk, TierId::Remote] {
            serve(&mut tiers, id, &mut now_us, 10, works);
        }
        tiers.quarantine(key(0));
        tiers.spill(key(0), block(&key(0)), OWNER, now_us);
        assert_eq!(tiers.begin(&keys(0..1), OWNER, now_us).restore, None);
        assert_eq!(tiers.next_job(TierId::Disk, now_us), Some((JobId(1), Job::Quarantine(key(0)))));
        (1..3 * MAX_QUARANTINED_BLOCKS as u32).for_each(|name| tiers.quarantine(key(name)));
        assert!(tiers.tier(TierId::Disk).quarantines.len() <= MAX_QUARANTINED_BLOCKS);
        tiers.check_invariants().expect("sound");
    }

    /// A block that another node stored is asked for without knowing, shared by all who want it, and kept on disk.
    #[test]
    fn remote_block_is_asked_for_once_and_kept() {
        let mut tiers = machine(0, &[TierId::Disk, TierId::Remote]);
        let mut now_us = 0;
        let ids = [0, 1].map(|_| tiers.begin(&keys(0..2), OWNER, now_us).restore.expect("may be there"));
        let outcome = |job: &Job| if *job == Job::Read(key(1)) { Outcome::Missing } else { works(job) };
        assert_eq!(serve(&mut tiers, TierId::Remote, &mut now_us, 10, outcome), 2, "each block once");
        for id in ids {
            assert_eq!(rest(&mut tiers, id, now_us), keys(0..1));
        }
        assert_eq!(serve(&mut tiers, TierId::Disk, &mut now_us, 10, works), 1);
        assert_eq!(tiers.tier_stats(TierId::Disk).entries, 1);
    }

    /// Random loads over tiers that fail, lose, lie and hang at random: what is restored is right and a prefix of what was
    /// asked for, every restore ends within its budget, and the invariants hold after each step.
    #[test]
    fn random_loads_restore_right_prefixes() {
        let (mut restored, mut total) = (0, TiersCounters::default());
        let (mut faults, mut rests) = (0, 0);
        for seed in 0..300u64 {
            let mut draws = 0;
            let mut draw = |bound: u64| {
                draws += 1;
                // SplitMix64.
                let mut z = (seed * 1_000_003 + draws).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
                (z ^ (z >> 31)) % bound.max(1)
            };
            let mut tiers = machine(seed % 5, &[TierId::Disk, TierId::Remote]);
            let mut held: [HashSet<RecordKey>; 2] = Default::default();
            let mut busy: [VecDeque<(JobId, Outcome)>; 2] = Default::default();
            // With the keys that are still to come.
            let mut open: Vec<(RestoreId, Vec<RecordKey>)> = Vec::new();
            let mut now_us = 0;
            for _ in 0..500 {
                now_us += draw(5_000);
                let name = draw(30) as u32;
                let tier = draw(2) as usize;
                let id = [TierId::Disk, TierId::Remote][tier];
                match draw(10) {
                    0 | 1 => tiers.spill(key(name), block(&key(name)), OWNER, now_us),
                    2 => tiers.persist(key(name), block(&key(name)), OWNER, now_us),
                    3 => tiers.note_prefill(512, 1 + draw(3_000_000), now_us),
                    4 if draw(20) == 0 => tiers.quarantine(key(name)),
                    5 => {
                        let wanted = keys(name..name + draw(6) as u32);
                        open.extend(tiers.begin(&wanted, OWNER, now_us).restore.map(|id| (id, wanted)));
                    }
                    6 if draw(4) == 0 && !open.is_empty() => tiers.cancel(open.swap_remove(0).0),
                    _ if busy[tier].len() <= draw(3) as usize => {
                        let Some((job_id, job)) = tiers.next_job(id, now_us) else { continue };
                        let outcome = match (&job, draw(8)) {
                            (_, 0) => io_fault(),
                            (Job::Read(_), 1) => Outcome::Found(vec![0; draw(2_000) as usize * 2 + 1].into()),
                            (Job::Read(key), _) if !held[tier].contains(key) => Outcome::Missing,
                            (Job::Write(key, ..), _) => {
                                held[tier].insert(*key);
                                Outcome::Stored
                            }
                            (job, _) => works(job),
                        };
                        busy[tier].push_back((job_id, outcome));
                    }
                    _ => {
                        now_us += if draw(10) == 0 { 2 * BUDGET_US } else { 0 };
                        // Reads overtake writes, so the order is any.
                        let place = draw(busy[tier].len() as u64) as usize;
                        let (job_id, outcome) = busy[tier].remove(place).expect("at work");
                        let elapsed_us = draw(10_000);
                        tiers.complete(id, job_id, Done { outcome, elapsed_us }, now_us);
                        if draw(10) == 0 && held[tier].remove(&key(name)) {
                            tiers.lost(id, [key(name)]);
                        }
                    }
                }
                tiers.check_invariants().unwrap_or_else(|error| panic!("seed {seed}: {error}"));
                open.retain_mut(|(id, wanted)| {
                    let arrived = tiers.poll(*id, now_us);
                    restored += arrived.blocks.len();
                    let next: Vec<RecordKey> = wanted.drain(..arrived.blocks.len()).collect();
                    assert_eq!(names(&arrived.blocks), next, "seed {seed}");
                    !arrived.has_ended
                });
            }
            now_us += BUDGET_US;
            for (id, wanted) in open {
                let last = rest(&mut tiers, id, now_us);
                assert_eq!(last, wanted[..last.len()], "seed {seed}");
            }
            let counters = tiers.counters();
            total.gave_up += counters.gave_up;
            total.late += counters.late;
            total.skipped_slower += counters.skipped_slower;
            total.dropped_writes += counters.dropped_writes;
            for id in [TierId::Disk, TierId::Remote] {
                (faults, rests) = (faults + tiers.tier_stats(id).faults, rests + tiers.num_rests(id));
            }
        }
        assert!(restored > 500 && faults > 1_000 && rests > 0, "{restored} restored, {faults} faults, {rests} rests");
        assert!(total.gave_up > 0 && total.late > 0 && total.dropped_writes > 0, "{total:?}");
        assert!(total.skipped_slower > 0, "{total:?}");
    }
}
