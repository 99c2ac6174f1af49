//! Tiers of a simulated world: they hold blocks in maps, take their time, fail, and lose blocks, all at random from a seed.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use ns_llm::kv_cache::tiers::{Done, Job, JobId, Outcome, Tiers, TiersConfig};
use ns_llm::storage::{Damage, Fault, LayoutId, RecordKey, TierId};

use crate::fake_executor::{block_bytes, mix};

/// How long a restore waits without progress.
pub const LOAD_BUDGET_MS: u64 = 20;

/// Host memory for `host_blocks` blocks, and the tiers of [`SimTiers`] below it.
pub fn tiers_config(block_tokens: usize, host_blocks: u64) -> TiersConfig {
    let bytes = block_bytes(block_tokens);
    TiersConfig {
        layout: LayoutId([3; 32]),
        block_tokens,
        block_bytes: bytes,
        host_bytes: host_blocks * (bytes as u64 + ns_llm::kv_cache::tiers::host::ENTRY_BYTES),
        write_queue_bytes: 4 * bytes as u64,
        load_budget_us: LOAD_BUDGET_MS * 1_000,
        tiers: vec![TierId::Disk, TierId::Remote],
    }
}

/// What happened, to show that it did.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct TierTally {
    pub reads: u64,
    pub writes: u64,
    pub faults: u64,
    pub losses: u64,
    pub clears: u64,
}

impl TierTally {
    pub fn events(&self) -> [u64; 5] {
        [self.reads, self.writes, self.faults, self.losses, self.clears]
    }
}

/// See the head of this file.
#[derive(Debug)]
pub struct SimTiers {
    state: u64,
    stores: [SimStore; 2],
    pub tally: TierTally,
}

#[derive(Debug, Default)]
struct SimStore {
    blocks: HashMap<RecordKey, Arc<[u8]>>,
    /// Sorted, so that a draw means the same in each run.
    keys: Vec<RecordKey>,
    /// With the moment at which each is done.
    jobs: VecDeque<(JobId, Job, u64)>,
}

impl SimTiers {
    pub fn new(seed: u64) -> Self {
        SimTiers { state: seed, stores: Default::default(), tally: TierTally::default() }
    }

    fn draw(&mut self, bound: u64) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.state) % bound
    }

    /// Takes new jobs and finishes those whose time has come. Now and then one takes longer than anyone waits.
    pub fn serve(&mut self, tiers: &mut Tiers, now_ms: u64) {
        let now_us = now_ms * 1_000;
        for (place, id) in [TierId::Disk, TierId::Remote].into_iter().enumerate() {
            while let Some((job_id, job)) = tiers.next_job(id, now_us) {
                let takes_ms = if self.draw(40) == 0 { 2 * LOAD_BUDGET_MS } else { self.draw(4) };
                let before_ms = self.stores[place].jobs.back().map_or(now_ms, |(_, _, end_ms)| *end_ms);
                self.stores[place].jobs.push_back((job_id, job, before_ms.max(now_ms) + takes_ms));
            }
            while self.stores[place].jobs.front().is_some_and(|(_, _, end_ms)| *end_ms <= now_ms) {
                let (job_id, job, _) = self.stores[place].jobs.pop_front().expect("just seen");
                let outcome = self.run(place, job);
                self.tally.faults += u64::from(matches!(outcome, Outcome::Fault(_)));
                let elapsed_us = self.draw(2_000);
                tiers.complete(id, job_id, Done { outcome, elapsed_us }, now_us);
                let lost = self.lose(place);
                tiers.lost(id, lost);
            }
        }
    }

    fn run(&mut self, place: usize, job: Job) -> Outcome {
        match self.draw(12) {
            0 => {
                let kind = std::io::ErrorKind::Other;
                return Outcome::Fault(Fault::Io { operation: "simulate", kind, reason: "a fault".to_string() });
            }
            1 if matches!(job, Job::Read(_)) => return Outcome::Fault(Fault::Damaged(Damage::PayloadChecksum)),
            2 if matches!(job, Job::Read(_)) => return Outcome::Found(Arc::new([0xaa; 5])),
            _ => {}
        }
        let store = &mut self.stores[place];
        match job {
            Job::Read(key) => match store.blocks.get(&key) {
                Some(bytes) => {
                    self.tally.reads += 1;
                    Outcome::Found(bytes.clone())
                }
                None => Outcome::Missing,
            },
            Job::Write(key, bytes, _) => {
                self.tally.writes += 1;
                if store.blocks.insert(key, bytes).is_none() {
                    let at = store.keys.partition_point(|other| *other < key);
                    store.keys.insert(at, key);
                }
                Outcome::Stored
            }
            Job::Quarantine(key) => {
                store.blocks.remove(&key);
                store.keys.retain(|other| *other != key);
                Outcome::Done
            }
            Job::Clear => {
                store.blocks.clear();
                store.keys.clear();
                self.tally.clears += 1;
                Outcome::Done
            }
        }
    }

    /// A block that has gone; the tiers hear of it.
    fn lose(&mut self, place: usize) -> Vec<RecordKey> {
        let num_keys = self.stores[place].keys.len() as u64;
        if num_keys == 0 || self.draw(10) > 0 {
            return Vec::new();
        }
        let at = self.draw(num_keys) as usize;
        let store = &mut self.stores[place];
        let key = store.keys.remove(at);
        store.blocks.remove(&key);
        self.tally.losses += 1;
        vec![key]
    }
}
