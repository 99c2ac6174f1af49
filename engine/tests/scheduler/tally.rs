//! What happened in simulations, summed up: a simulation in which a mechanism never fired has shown nothing about it.

use ns_llm::scheduler::{Counters, MAX_PREEMPTIONS};
use ns_llm::{CachedTokens, Error, FinishReason};

use crate::simulation::Simulation;

/// What happened in simulations, summed up.
#[derive(Debug, Default, Clone, Copy)]
pub struct Tally {
    pub counters: Counters,
    pub turns: u64,
    pub slot_reads: u64,
    pub stopped: u64,
    pub full_length: u64,
    pub non_finite: u64,
    pub late_cancels: u64,
    pub encoded: u64,
    pub unencoded: u64,
    pub refused: u64,
    pub most_preemptions: u64,
    /// Prompt tokens from host memory, disk and the shared store.
    pub restored_from: [u64; 3],
    /// Reads, writes, faults, losses and clearings of the tiers below host memory.
    pub tier_events: [u64; 5],
    pub gave_up: u64,
    pub late: u64,
}

impl Tally {
    /// Both together.
    pub fn add(self, other: &Tally) -> Tally {
        let (a, b) = (self.counters, other.counters);
        let mut prefix_hits_by_tier = a.prefix_hits_by_tier;
        prefix_hits_by_tier += b.prefix_hits_by_tier;
        let counters = Counters {
            requests: a.requests + b.requests,
            accepted: a.accepted + b.accepted,
            finished: a.finished + b.finished,
            cancelled: a.cancelled + b.cancelled,
            failed: a.failed + b.failed,
            steps: a.steps + b.steps,
            prompt_tokens: a.prompt_tokens + b.prompt_tokens,
            prefix_query_tokens: a.prefix_query_tokens + b.prefix_query_tokens,
            prefix_hit_tokens: a.prefix_hit_tokens + b.prefix_hit_tokens,
            prefix_hits_by_tier,
            resume_hit_tokens: a.resume_hit_tokens + b.resume_hit_tokens,
            restored_tokens: a.restored_tokens + b.restored_tokens,
            computed_tokens: a.computed_tokens + b.computed_tokens,
            recomputed_tokens: a.recomputed_tokens + b.recomputed_tokens,
            generated_tokens: a.generated_tokens + b.generated_tokens,
            encoded_tokens: a.encoded_tokens + b.encoded_tokens,
            encode_steps: a.encode_steps + b.encode_steps,
            surplus_tokens: a.surplus_tokens + b.surplus_tokens,
            preemptions: a.preemptions + b.preemptions,
            class_preemptions: a.class_preemptions + b.class_preemptions,
            evictions: a.evictions + b.evictions,
            prefix_waits: a.prefix_waits + b.prefix_waits,
            promoted_by_age: a.promoted_by_age + b.promoted_by_age,
            expired: a.expired + b.expired,
            overloaded_requests: a.overloaded_requests + b.overloaded_requests,
        };
        Tally {
            counters,
            turns: self.turns + other.turns,
            slot_reads: self.slot_reads + other.slot_reads,
            stopped: self.stopped + other.stopped,
            full_length: self.full_length + other.full_length,
            non_finite: self.non_finite + other.non_finite,
            late_cancels: self.late_cancels + other.late_cancels,
            encoded: self.encoded + other.encoded,
            unencoded: self.unencoded + other.unencoded,
            refused: self.refused + other.refused,
            most_preemptions: self.most_preemptions.max(other.most_preemptions),
            restored_from: std::array::from_fn(|i| self.restored_from[i] + other.restored_from[i]),
            tier_events: std::array::from_fn(|i| self.tier_events[i] + other.tier_events[i]),
            gave_up: self.gave_up + other.gave_up,
            late: self.late + other.late,
        }
    }

    /// Names the mechanism that did not.
    pub fn assert_everything_fired(&self) {
        let c = &self.counters;
        let fired = [
            ("finished", c.finished),
            ("cancelled", c.cancelled),
            ("failed", c.failed),
            ("prefix hits", c.prefix_hit_tokens),
            ("resume hits", c.resume_hit_tokens),
            ("restored", c.restored_tokens),
            ("found in host memory", self.restored_from[0]),
            ("found on disk", self.restored_from[1]),
            ("found in the shared store", self.restored_from[2]),
            ("reads of tiers", self.tier_events[0]),
            ("writes to tiers", self.tier_events[1]),
            ("faults of tiers", self.tier_events[2]),
            ("losses of tiers", self.tier_events[3]),
            ("clearings of tiers", self.tier_events[4]),
            ("restores that gave up", self.gave_up),
            ("blocks that came too late", self.late),
            ("recomputed", c.recomputed_tokens),
            ("surplus", c.surplus_tokens),
            ("preemptions", c.preemptions),
            ("class preemptions", c.class_preemptions),
            ("evictions", c.evictions),
            ("prefix waits", c.prefix_waits),
            ("promoted by age", c.promoted_by_age),
            ("expired", c.expired),
            ("overloaded", c.overloaded_requests),
            ("slot reads", self.slot_reads),
            ("stopped", self.stopped),
            ("full length", self.full_length),
            ("not finite", self.non_finite),
            ("late cancels", self.late_cancels),
            ("encoded", self.encoded),
            ("encode steps of several", c.encoded_tokens.saturating_sub(c.encode_steps)),
            ("cancelled or expired before encoding", self.unencoded),
            ("refused", self.refused),
            ("preempted to the bound", u64::from(self.most_preemptions == u64::from(MAX_PREEMPTIONS))),
        ];
        for (mechanism, count) in fired {
            assert!(count > 0, "{mechanism} never happened");
        }
    }
}

/// What happened in one.
pub fn outcome(sim: &mut Simulation) -> Tally {
    let found = |place: fn(&CachedTokens) -> usize| {
        sim.tracked.values().map(|tracked| place(&tracked.usage.cached_by_tier) as u64).sum::<u64>()
    };
    let tier_counters = sim.scheduler.tiers().map(|tiers| tiers.counters()).unwrap_or_default();
    let ends = || sim.tracked.values().map(|tracked| tracked.end.as_ref().expect("settled"));
    let automatic = sim.tracked.values().map(|tracked| tracked.usage.preemptions - tracked.forced_preemptions);
    Tally {
        counters: sim.scheduler.counters(),
        restored_from: [found(|cached| cached.host), found(|cached| cached.disk), found(|cached| cached.remote)],
        tier_events: sim.tiers.as_ref().map_or([0; 5], |tiers| tiers.tally.events()),
        gave_up: tier_counters.gave_up,
        late: tier_counters.late,
        slot_reads: sim.executor.num_reads,
        stopped: ends().filter(|end| **end == Ok(FinishReason::Stop)).count() as u64,
        full_length: ends().filter(|end| **end == Ok(FinishReason::Length)).count() as u64,
        encoded: sim.encodings.values().filter(|tracked| tracked.end == Some(Ok(()))).count() as u64,
        unencoded: sim.encodings.values().filter(|tracked| matches!(tracked.end, Some(Err(_)))).count() as u64,
        non_finite: ends().filter(|end| matches!(end, Err(Error::NonFiniteLogits { .. }))).count() as u64,
        most_preemptions: automatic.max().unwrap_or(0) as u64,
        ..Tally::default()
    }
}
