//! Where a block is fetched, and whether that is worth it.

use super::{Source, StoredKey, Tier, TierId, Tiers, Wanted};
use crate::sequence::{NamespaceKey, RestoreId};

impl Tiers {
    /// Where a block is to be fetched. `None`: nowhere.
    pub(super) fn source(&self, key: &StoredKey, now_us: u64) -> Option<Source> {
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

    /// How many of the first blocks are fetched: all, but from the first tier on that is slower than computing. What waits
    /// in the tier's queue counts as its time.
    pub(super) fn num_worth_fetching(&self, sources: &[Source], now_us: u64) -> usize {
        for tier in &self.tiers {
            let Some(first) = sources.iter().position(|source| *source == Source::Tier(tier.id)) else { continue };
            let num_blocks = sources.iter().filter(|source| **source == Source::Tier(tier.id)).count();
            let load_bytes = ((num_blocks + tier.reads.len()) * self.config.block_bytes) as u64;
            let compute_tokens = ((sources.len() - first) * self.config.block_tokens) as u64;
            let load_us = tier.read_rate.estimate_us(load_bytes);
            let compute_us = self.prefill_rate.estimate_us(compute_tokens);
            let is_slower = load_us.zip(compute_us).is_some_and(|(load_us, compute_us)| load_us > compute_us);
            if is_slower {
                // One block now and then says whether it still is.
                let is_trial = tier.read_rate.is_stale(now_us) && tier.reads.is_empty();
                return first + usize::from(is_trial);
            }
        }
        sources.len()
    }

    pub(super) fn want(&mut self, key: StoredKey, tier: TierId, namespace: NamespaceKey, restore: RestoreId) {
        let wanted = self.wanted.entry(key).or_insert_with(|| Wanted { tier, namespace, waiting: Vec::new() });
        let is_new = wanted.waiting.is_empty();
        wanted.waiting.push(restore);
        if is_new {
            self.tier_mut(tier).reads.push_back(key);
        }
    }
}
