//! Where a block is fetched, and whether that is worth it.

use super::{Job, Tier, Tiers, Wanted};
use crate::ids::{OwnerKey, RestoreId};
use crate::storage::{RecordKey, TierId};

/// Where a block is fetched from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    /// Memory of this process, at once.
    Host,
    /// A store, by a job.
    Tier(TierId),
}

impl Tiers {
    /// Where a block is to be fetched. `None`: nowhere.
    pub(super) fn source(&self, key: &RecordKey, now_us: u64) -> Option<Source> {
        if self.quarantined.contains(key) {
            return None;
        }
        if self.host.contains(key) {
            return Some(Source::Host);
        }
        let may_hold = |tier: &&Tier| tier.id == TierId::Remote || tier.held.contains(key);
        let answers = |tier: &&Tier| {
            let hangs = !tier.jobs.is_empty() && now_us >= tier.job_since_us.saturating_add(self.config.load_budget_us);
            tier.breaker.allows(now_us) && !hangs
        };
        if let Some(wanted) = self.wanted.get(key) {
            // It is being fetched already, and from there or not at all.
            return Some(self.tier(wanted.tier)).filter(answers).map(|tier| Source::Tier(tier.id));
        }
        self.tiers.iter().filter(may_hold).find(answers).map(|tier| Source::Tier(tier.id))
    }

    /// How many of the first blocks are fetched: all, but from the first tier on that is slower than computing. What the tier
    /// does before counts as its time: reads that were given or wait, and one write that it may be at.
    pub(super) fn num_worth_fetching(&self, sources: &[Source], now_us: u64) -> usize {
        for tier in &self.tiers {
            let Some(first) = sources.iter().position(|source| *source == Source::Tier(tier.id)) else { continue };
            let num_blocks = sources.iter().filter(|source| **source == Source::Tier(tier.id)).count();
            let num_reads = num_blocks + tier.reads.len() + tier.num_given_reads();
            let block_bytes = self.config.block_bytes as u64;
            let writes = tier.jobs.iter().any(|(_, job)| matches!(job, Job::Write(..)));
            let write_us = tier.write_rate.estimate_us(block_bytes).filter(|_| writes).unwrap_or(0.0);
            let load_us = tier.read_rate.estimate_us(num_reads as u64 * block_bytes).map(|us| us + write_us);
            let compute_us = self.compute_us(sources.len() - first);
            let is_slower = load_us.zip(compute_us).is_some_and(|(load_us, compute_us)| load_us > compute_us);
            if is_slower {
                // One block now and then says whether it still is.
                let is_trial = tier.read_rate.is_stale(now_us) && tier.reads.is_empty();
                return first + usize::from(is_trial);
            }
        }
        sources.len()
    }

    /// How long the blocks of a restore are waited for, however often something arrives: as long as computing them would
    /// take, and the load budget. Before that was measured, each block may take the load budget.
    pub(super) fn longest_wait_us(&self, sources: &[Source]) -> u64 {
        let num_blocks = sources.iter().filter(|source| **source != Source::Host).count();
        let budget_us = self.config.load_budget_us;
        match self.compute_us(num_blocks) {
            Some(compute_us) => budget_us.saturating_add(compute_us as u64),
            None => budget_us.saturating_mul(num_blocks as u64 + 1),
        }
    }

    /// How long computing so many blocks takes, if that was measured.
    fn compute_us(&self, num_blocks: usize) -> Option<f64> {
        self.prefill_rate.estimate_us((num_blocks * self.config.block_tokens) as u64)
    }

    pub(super) fn want(&mut self, key: RecordKey, tier: TierId, owner: OwnerKey, restore: RestoreId) {
        let wanted = self.wanted.entry(key).or_insert_with(|| Wanted { tier, owner, waiting: Vec::new() });
        let is_new = wanted.waiting.is_empty();
        wanted.waiting.push(restore);
        if is_new {
            self.tier_mut(tier).reads.push_back(key);
        }
    }
}

impl Tier {
    /// Whether a block is neither there nor on its way there.
    pub(super) fn lacks(&self, key: &RecordKey) -> bool {
        !self.held.contains(key) && !self.writing.contains(key)
    }

    /// Reads that were given and are not done.
    pub(super) fn num_given_reads(&self) -> usize {
        self.jobs.iter().filter(|(_, job)| matches!(job, Job::Read(_))).count()
    }
}
