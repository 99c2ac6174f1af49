//! Building a step: decoding sequences first, then admissions, then prompts. Nothing of a sequence's progress changes
//! before the plan is complete, so a sequence that is preempted on the way is simply taken off the plan.

use std::cmp::Reverse;

use super::budget::Budget;
use super::preempt::{headroom_tokens, is_protected, standing};
use super::{InFlight, Scheduler, Step};
use crate::ids::SeqId;
use crate::kv_cache::AdmissionPlan;
use crate::request::CachedTokens;
use crate::sequence::{Chunk, Sequence};

/// Waiting sequences that one step looks at beyond the free seats: those that wait for a prefix let others pass.
const ADMISSION_LOOKAHEAD: usize = 64;

/// Tokens to compute by sequence, in the order of the batch.
#[derive(Debug, Default)]
struct Plan {
    chunks: Vec<(SeqId, usize)>,
}

impl Plan {
    fn contains(&self, seq: SeqId) -> bool {
        self.chunks.iter().any(|&(id, _)| id == seq)
    }
    fn remove(&mut self, seq: SeqId) {
        self.chunks.retain(|&(id, _)| id != seq);
    }
}

impl Scheduler {
    /// Plans the next step. `None`: nothing can be computed now; if sequences are live, a step in flight, a deadline or a
    /// block from a tier comes first. Sequences whose deadline has passed are not begun.
    pub fn schedule(&mut self, now_ms: u64) -> Option<Step> {
        assert!(self.in_flight.len() < self.config.max_in_flight, "a step must be applied first");
        self.advance_restores(now_ms);
        let mut plan = Plan::default();
        self.plan_decodes(&mut plan);
        let mut budget = self.budget(&plan);
        self.admit(&mut plan, &budget, now_ms);
        self.plan_prefills(&mut plan, &mut budget);
        if plan.chunks.is_empty() { None } else { Some(self.commit(plan)) }
    }

    fn budget(&self, plan: &Plan) -> Budget {
        let decoding = self.running.iter().any(|id| self.sequences[id].is_decoding());
        let total = if decoding { self.config.mixed_budget_tokens } else { self.config.prefill_budget_tokens };
        Budget::new(total, plan.chunks.len())
    }

    /// Every running sequence with one token to compute gets it, and a block for it where needed. From the best
    /// standing to the worst: whoever is preempted on the way has no place on the plan yet.
    fn plan_decodes(&mut self, plan: &mut Plan) {
        let mut order: Vec<_> = self.running.iter().map(|id| standing(&self.sequences[id])).collect();
        order.sort_unstable();
        for (.., id) in order {
            let Some(seq) = self.sequences.get(&id).filter(|_| self.is_running(id)) else { continue };
            if seq.num_remaining() == 1 && seq.can_be_scheduled() && self.grow(id) {
                plan.chunks.push((id, 1));
            }
        }
    }

    /// Makes the table of a running sequence cover its next token, at the cost of those of worse standing. False when
    /// it has to wait: it was itself the victim, or blocks become free only when a launched step is applied.
    fn grow(&mut self, id: SeqId) -> bool {
        loop {
            let seq = self.sequences.get_mut(&id).expect("a running sequence is live");
            let num_tokens = seq.num_scheduled + 1;
            if self.kv.extend(seq, num_tokens) {
                return true;
            }
            if self.kv.num_pinned() > 0 {
                return false;
            }
            let victim = self.running.iter().map(|id| standing(&self.sequences[id])).max();
            let (.., victim) = victim.expect("the sequence itself runs");
            self.preempt(victim);
            if victim == id {
                return false;
            }
        }
    }

    /// Moves sequences from the queue to the running ones, in order, while there are tokens, seats and blocks for them.
    fn admit(&mut self, plan: &mut Plan, budget: &Budget, now_ms: u64) {
        let (step, age_steps) = (self.counters.steps, self.config.age_steps);
        let num_seats = self.config.max_running_sequences - self.running.len();
        for (rank, id) in self.waiting.first(step, age_steps, num_seats + ADMISSION_LOOKAHEAD) {
            if self.prompt_backlog(rank) >= budget.left() {
                break;
            }
            let seq = self.sequences.get_mut(&id).expect("a waiting sequence is live");
            if seq.num_in_flight > 0 || seq.spec.deadline_ms.is_some_and(|deadline| deadline <= now_ms) {
                continue;
            }
            let admission = self.kv.plan_admission(seq);
            if admission.waits_for.is_some() && self.may_wait_for_prefix(id) {
                continue;
            }
            let Some(admission) = self.make_room(plan, id, admission) else { break };
            self.start(id, rank, admission, now_ms);
        }
    }

    /// Prompt tokens that running sequences of the same or a better rank still have to compute: they go first.
    fn prompt_backlog(&self, rank: usize) -> usize {
        let running = self.running.iter().map(|id| &self.sequences[id]);
        // What is on its way from the tiers takes nothing of this step.
        let first = running.filter(|seq| seq.rank <= rank && seq.restore.is_none());
        first.map(Sequence::num_remaining).filter(|&num_tokens| num_tokens > 1).sum()
    }

    fn may_wait_for_prefix(&mut self, id: SeqId) -> bool {
        let since_step = self.waiting.get(id).expect("it waits").since_step;
        let may_wait = self.counters.steps - since_step < 3 * self.config.age_steps;
        let seq = self.sequences.get_mut(&id).expect("a waiting sequence is live");
        if may_wait && !seq.waited_for_prefix {
            seq.waited_for_prefix = true;
            self.counters.prefix_waits += 1;
        }
        may_wait
    }

    /// The plan by which the sequence fits now, if need be after preempting sequences of a lower class, worst standing
    /// first. None is preempted unless that makes room enough. A sequence that was lifted to this class by waiting is
    /// safe: else it would lose at once the seat that it waited for.
    fn make_room(&mut self, plan: &mut Plan, id: SeqId, admission: AdmissionPlan) -> Option<AdmissionPlan> {
        if self.fits(id, &admission, &[]) {
            return Some(admission);
        }
        let own_rank = self.sequences[&id].spec.priority as usize;
        let mut lower: Vec<_> = self.running.iter().map(|id| &self.sequences[id]).collect();
        lower.retain(|seq| seq.rank > own_rank && !is_protected(seq));
        lower.sort_unstable_by_key(|seq| Reverse(standing(seq)));
        let lower: Vec<SeqId> = lower.into_iter().map(|seq| seq.id).collect();
        let num_victims = (1..=lower.len()).find(|&n| self.fits(id, &admission, &lower[..n]))?;
        for &victim in &lower[..num_victims] {
            plan.remove(victim);
            self.preempt(victim);
            self.counters.class_preemptions += 1;
        }
        // Blocks that a launched step writes come back only when it is applied: then the next step tries again.
        let seq = self.sequences.get_mut(&id).expect("a waiting sequence is live");
        Some(self.kv.plan_admission(seq)).filter(|admission| self.fits(id, admission, &[]))
    }

    /// Whether there are a seat and the blocks for a waiting sequence, with room for growth, if `victims` did not run.
    fn fits(&self, id: SeqId, admission: &AdmissionPlan, victims: &[SeqId]) -> bool {
        let candidate = &self.sequences[&id];
        let rest = self.running.iter().filter(|id| !victims.contains(id)).map(|id| &self.sequences[id]);
        let most_preemptions = rest.clone().map(|seq| seq.num_preemptions).fold(candidate.num_preemptions, u32::max);
        let growth = |seq: &Sequence, num_held: usize| {
            let max_growth = self.kv.blocks_for(seq.spec.max_kv_tokens()) - num_held;
            max_growth.min(self.kv.blocks_for(headroom_tokens(seq, most_preemptions)))
        };
        let headroom: usize = rest.clone().map(|seq| growth(seq, seq.blocks.len())).sum();
        let own_growth = growth(candidate, self.kv.blocks_for(candidate.tokens.len()));
        let gained = victims.iter().map(|id| self.kv.num_gained_blocks(&self.sequences[id], admission));
        rest.count() < self.config.max_running_sequences
            && admission.needed_blocks + headroom + own_growth <= self.kv.num_available() + gained.sum::<usize>()
    }

    /// Gives a waiting sequence its blocks and its seat.
    fn start(&mut self, id: SeqId, rank: usize, admission: AdmissionPlan, now_ms: u64) {
        let waiting = self.waiting.remove(id).expect("it waits");
        self.counters.promoted_by_age += u64::from(self.waiting.has_better_than(waiting.priority));
        let seq = self.sequences.get_mut(&id).expect("a waiting sequence is live");
        seq.rank = rank;
        self.kv.admit(seq, admission);
        let found = CachedTokens { pool: seq.num_computed, ..CachedTokens::default() };
        // Preempted while its prefix came, it begins anew.
        if !seq.has_started {
            seq.cached = CachedTokens::default();
        }
        self.kv.begin_restore(seq, now_us(now_ms));
        self.running.push(id);
        self.book_hits(id, found);
        self.advance_restore(id, now_ms);
    }

    fn advance_restores(&mut self, now_ms: u64) {
        let waiting = self.running.iter().copied().filter(|id| self.sequences[id].restore.is_some());
        for id in waiting.collect::<Vec<_>>() {
            self.advance_restore(id, now_ms);
        }
    }

    /// Takes over what has arrived from the tiers for a running sequence.
    fn advance_restore(&mut self, id: SeqId, now_ms: u64) {
        let seq = self.sequences.get_mut(&id).expect("a running sequence is live");
        let found = self.kv.advance_restore(seq, now_us(now_ms));
        self.counters.restored_tokens += found.total() as u64;
        self.book_hits(id, found);
    }

    fn book_hits(&mut self, id: SeqId, found: CachedTokens) {
        let seq = self.sequences.get_mut(&id).expect("a running sequence is live");
        if seq.has_started {
            self.counters.resume_hit_tokens += found.total() as u64;
        } else {
            // Counted when its first step is: until then it may lose its blocks again.
            seq.cached += found;
        }
    }

    /// Shares the budget among the prompts that run: by rank, then by admission; the one that has run longest gets
    /// its minimum in any case.
    fn plan_prefills(&self, plan: &mut Plan, budget: &mut Budget) {
        let mut order: Vec<&Sequence> = self.running.iter().map(|id| &self.sequences[id]).collect();
        order.retain(|seq| !plan.contains(seq.id) && self.has_blocks_for_rest(seq));
        let oldest = order.first().map(|seq| seq.id);
        order.sort_by_key(|seq| seq.rank);
        let mut oldest_waits = true;
        for seq in order {
            oldest_waits &= Some(seq.id) != oldest;
            let num_tokens = budget.take(seq.num_remaining(), oldest_waits);
            if num_tokens > 0 {
                plan.chunks.push((seq.id, num_tokens));
            }
        }
    }

    /// A prompt has the blocks for all its tokens since its admission. What has none is a decoding sequence that has
    /// to wait.
    fn has_blocks_for_rest(&self, seq: &Sequence) -> bool {
        seq.can_be_scheduled() && self.kv.blocks_for(seq.num_scheduled + seq.num_remaining()) <= seq.blocks.len()
    }

    /// The plan becomes a step: progress is booked, blocks that it writes are pinned.
    fn commit(&mut self, plan: Plan) -> Step {
        let mut step = Step { id: self.counters.steps, num_tokens: 0, started: Vec::new() };
        let mut in_flight = InFlight { id: step.id, chunks: Vec::new(), written: Vec::new() };
        let mut num_outputs = 0;
        for (id, num_tokens) in plan.chunks {
            let seq = self.sequences.get_mut(&id).expect("a planned sequence is live");
            let chunk = seq.next_chunk(num_tokens);
            if !seq.has_started {
                seq.has_started = true;
                if seq.max_cached_tokens() > 0 {
                    self.counters.prefix_query_tokens += seq.spec.prompt.len() as u64;
                }
                self.counters.prefix_hit_tokens += seq.cached.total() as u64;
                self.counters.prefix_hits_by_tier += seq.cached;
                step.started.push(id);
            }
            num_outputs += chunk.num_outputs();
            seq.output_row = chunk.samples.then(|| num_outputs - 1);
            seq.num_pending += usize::from(chunk.samples);
            seq.num_scheduled = chunk.positions.end;
            seq.num_in_flight += 1;
            step.num_tokens += num_tokens;
            let block_tokens = self.kv.block_tokens();
            let written = chunk.positions.start / block_tokens..chunk.positions.end.div_ceil(block_tokens);
            in_flight.written.extend_from_slice(&seq.blocks[written]);
            in_flight.chunks.push(chunk);
        }
        self.kv.pin(&in_flight.written);
        self.in_flight.push_back(in_flight);
        self.counters.steps += 1;
        step
    }

    /// The parts of the sequences that a step in flight computes.
    pub fn chunks(&self, step: &Step) -> &[Chunk] {
        let in_flight = self.in_flight.iter().find(|in_flight| in_flight.id == step.id);
        in_flight.map_or(&[], |in_flight| &in_flight.chunks)
    }
}

/// The tiers measure in microseconds what the scheduler's caller tells in milliseconds.
fn now_us(now_ms: u64) -> u64 {
    now_ms.saturating_mul(1_000)
}
