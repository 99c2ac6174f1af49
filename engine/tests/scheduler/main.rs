//! The promises of the scheduler and of the KV blocks, without a model: tables for the edges, and seeded random
//! simulations in which every token, every block read and every end is checked.
//!
//! `NS_LLM_SIMULATIONS` sets the number of simulations, `NS_LLM_SIMULATION_SEED` the first seed.

mod fake_executor;
mod sim_tiers;
mod simulation;
mod tally;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;

use fake_executor::{VOCAB_SIZE, mix};
use ns_llm::ids::SeqId;
use ns_llm::scheduler::{MAX_PREEMPTIONS, SchedulerConfig, SequenceEvent};
use ns_llm::sequence::{EncodeSpec, SequenceSpec};
use ns_llm::{CacheUse, Error, FinishReason, Priority, SamplingParams};
use sim_tiers::{SimTiers, tiers_config};
use simulation::{Simulation, kv_cache, kv_cache_over, namespace, spec};
use tally::{Tally, outcome};

const DEFAULT_SIMULATIONS: u64 = 2_000;
const USES: [CacheUse; 6] =
    [CacheUse::Off, CacheUse::Read, CacheUse::ReadWrite, CacheUse::ReadWrite, CacheUse::ReadWrite, CacheUse::ReadWrite];

// ---- random simulations ----------------------------------------------------------------------------------------------

/// Under random requests, cancels, preemptions, deadlines and failures, on pools of 4 to 64 blocks: every sequence gets
/// exactly the tokens that its prompt implies and ends exactly once; nobody reads a block that is not its own; blocks
/// and counters add up after every step; nobody waits or is preempted beyond the documented bounds. The counters show
/// that each mechanism fired.
#[test]
fn random_simulations_keep_every_promise() {
    let num_simulations = from_env("NS_LLM_SIMULATIONS").unwrap_or(DEFAULT_SIMULATIONS);
    let first_seed = from_env("NS_LLM_SIMULATION_SEED").unwrap_or(0);
    let num_threads = std::thread::available_parallelism().map_or(1, |num| num.get() as u64);
    let tallies: Vec<Tally> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..num_threads)
            .map(|thread| {
                let seeds = (first_seed + thread..first_seed + num_simulations).step_by(num_threads as usize);
                scope.spawn(move || seeds.fold(Tally::default(), |tally, seed| tally.add(&simulate_or_name(seed))))
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
    });
    let tally = tallies.iter().fold(Tally::default(), Tally::add);
    println!("{num_simulations} simulations: {tally:#?}");
    if num_simulations >= DEFAULT_SIMULATIONS {
        tally.assert_everything_fired();
    }
}

fn from_env(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().unwrap_or_else(|_| panic!("{name} is {value}, not a number")))
}

fn simulate_or_name(seed: u64) -> Tally {
    catch_unwind(AssertUnwindSafe(|| simulate(seed))).unwrap_or_else(|panic| {
        eprintln!("seed {seed} fails; again: NS_LLM_SIMULATION_SEED={seed} NS_LLM_SIMULATIONS=1");
        resume_unwind(panic)
    })
}

/// Random numbers from a seed (SplitMix64).
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }
    /// `start..=end`, evenly.
    fn range(&mut self, start: usize, end: usize) -> usize {
        start + (self.next() % (end - start + 1) as u64) as usize
    }
    fn one_in(&mut self, n: usize) -> bool {
        self.range(1, n) == 1
    }
    fn pick<T: Copy>(&mut self, values: &[T]) -> T {
        values[self.range(0, values.len() - 1)]
    }
}

/// One random world: its sizes, and the texts that its prompts are cut from.
struct World {
    rng: Rng,
    block_tokens: usize,
    pool_tokens: usize,
    texts: Vec<Vec<u32>>,
}

fn simulate(seed: u64) -> Tally {
    let mut rng = Rng(mix(seed));
    let block_tokens = rng.pick(&[1, 4, 16]);
    let num_blocks = rng.range(4, 64);
    let pool_tokens = num_blocks * block_tokens;
    let config = SchedulerConfig {
        max_running_sequences: rng.range(1, 8),
        prefill_budget_tokens: rng.range(1, 64),
        mixed_budget_tokens: rng.range(1, 24),
        max_waiting_requests: rng.range(3, 12),
        max_waiting_tokens: rng.range(60, 400),
        max_in_flight: rng.range(1, 2),
        age_steps: rng.range(2, 40) as u64,
        ..SchedulerConfig::new(rng.range(8, 120))
    };
    let texts = (0..3).map(|_| (0..100).map(|_| rng.next() as u32 % VOCAB_SIZE).collect()).collect();
    let mut world = World { rng, block_tokens, pool_tokens, texts };
    let tiers = world.rng.one_in(2).then(|| tiers_config(block_tokens, world.rng.range(0, 16) as u64));
    let mut sim = Simulation::new(config, kv_cache_over(num_blocks, block_tokens, tiers.clone()));
    sim.tiers = tiers.map(|_| SimTiers::new(seed));
    let mut tally = Tally::default();
    let mut num_requests = world.rng.range(6, 16);
    while num_requests > 0 {
        if world.rng.one_in(4) {
            num_requests -= 1;
            tally.refused += u64::from(!world.add_request(&mut sim));
        }
        if world.rng.one_in(6) {
            tally.refused += u64::from(!world.add_encodings(&mut sim));
        }
        world.disturb(&mut sim, &mut tally);
        world.turn(&mut sim);
        tally.turns += 1;
    }
    sim.drain();
    tally.add(&outcome(&mut sim))
}

impl World {
    /// A request with random options, its prompt the beginning of a common text and a tail of its own. False: refused.
    fn add_request(&mut self, sim: &mut Simulation) -> bool {
        let rng = &mut self.rng;
        let shared = rng.range(0, (self.pool_tokens / self.block_tokens).min(6)) * self.block_tokens + rng.range(0, 2);
        let text = rng.range(0, self.texts.len() - 1);
        let mut prompt = self.texts[text][..shared.saturating_sub(1).min(100)].to_vec();
        let tail = if rng.one_in(3) { 0 } else { rng.range(0, 20) };
        prompt.extend((0..tail).map(|_| rng.next() as u32 % VOCAB_SIZE));
        if prompt.is_empty() {
            prompt.push(1);
        }
        let max_new_tokens = if rng.one_in(8) { rng.range(0, 1) } else { rng.range(2, 30) };
        let seed = rng.next();
        let owner = namespace(rng.range(0, 1) as u8);
        let template = SequenceSpec {
            priority: rng.pick(&[Priority::High, Priority::Normal, Priority::Normal, Priority::Background]),
            stop_token_ids: if rng.one_in(3) { Arc::from([3, 5]) } else { Arc::from([]) },
            deadline_ms: rng.one_in(5).then(|| sim.now_ms + rng.range(1, 60) as u64),
            timeout_ms: 60,
            namespace: owner,
            owner,
            prefix_cache: rng.pick(&USES),
            prompt_logprobs: rng.one_in(6).then(|| rng.range(0, 2)),
            logprobs: rng.one_in(3).then(|| rng.range(0, 2)),
            ..spec(prompt, max_new_tokens)
        };
        let presence_penalty = if rng.one_in(4) { 1.0 } else { 0.0 };
        let sampling = |choice| SamplingParams { seed: seed ^ choice, presence_penalty, ..SamplingParams::greedy() };
        let n = if rng.one_in(4) { rng.range(2, 4) } else { 1 };
        let choices =
            (0..n as u64).map(|choice| SequenceSpec { sampling: Arc::new(sampling(choice)), ..template.clone() });
        let stop_string_after = rng.one_in(4).then(|| rng.range(1, 10));
        let non_finite_after = rng.one_in(10).then(|| rng.range(0, 6));
        let added = sim.add_request(choices.collect(), stop_string_after, non_finite_after);
        match added {
            Ok(_) => true,
            Err(Error::Overloaded { .. } | Error::ExceedsKvPool { .. } | Error::PromptTooLong { .. }) => false,
            Err(error) => panic!("refused with {error}"),
        }
    }

    /// Inputs of an embedding request with random options. False: refused.
    fn add_encodings(&mut self, sim: &mut Simulation) -> bool {
        let rng = &mut self.rng;
        let priority = rng.pick(&[Priority::High, Priority::Normal, Priority::Background]);
        let deadline_ms = rng.one_in(5).then(|| sim.now_ms + rng.range(1, 20) as u64);
        let num_inputs = rng.range(1, 5);
        let mut input = || {
            let tokens = (0..rng.range(1, 40)).map(|_| rng.next() as u32 % VOCAB_SIZE).collect();
            EncodeSpec { priority, tokens, deadline_ms, timeout_ms: 20 }
        };
        let inputs = (0..num_inputs).map(|_| input()).collect();
        match sim.add_encodings(inputs) {
            Ok(_) => true,
            Err(Error::Overloaded { .. } | Error::PromptTooLong { .. }) => false,
            Err(error) => panic!("refused with {error}"),
        }
    }

    /// Cancels and preempts at random; also what has ended, waits, or never was.
    fn disturb(&mut self, sim: &mut Simulation, tally: &mut Tally) {
        let rng = &mut self.rng;
        sim.now_ms += rng.range(0, 3) as u64;
        if sim.now_ms.is_multiple_of(211) {
            sim.scheduler.clear_prefix_cache(sim.now_ms * 1_000);
        }
        let num_added = sim.tracked.len() + sim.encodings.len();
        if num_added == 0 {
            return;
        }
        if rng.one_in(20) {
            let seq = SeqId(rng.range(0, num_added) as u64);
            if !sim.cancel(seq) {
                tally.late_cancels += 1;
            }
            assert!(!sim.cancel(seq), "cancelling twice has no effect");
        }
        if rng.one_in(12) {
            sim.preempt(SeqId(rng.range(0, num_added) as u64));
        }
    }

    /// A turn of the worker, which now and then applies a step before it launches the next.
    fn turn(&mut self, sim: &mut Simulation) {
        if !sim.steps.is_empty() && self.rng.one_in(6) {
            sim.apply();
        }
        sim.turn();
    }
}

// ---- tables ------------------------------------------------------------------------------------------------------------

fn config(context_tokens: usize) -> SchedulerConfig {
    SchedulerConfig { age_steps: 16, ..SchedulerConfig::new(context_tokens) }
}

/// `num_tokens` tokens that depend on `name`.
fn text(name: u32, num_tokens: usize) -> Vec<u32> {
    (0..num_tokens as u32).map(|position| (position * 7 + name * 13) % VOCAB_SIZE).collect()
}

/// Runs one sequence alone and says whether it was accepted; if so it must finish.
fn runs_alone(num_blocks: usize, block_tokens: usize, prompt_tokens: usize, max_new_tokens: usize) -> bool {
    let mut sim = Simulation::new(config(10_000), kv_cache(num_blocks, block_tokens));
    let added = sim.add_request(vec![spec(text(1, prompt_tokens), max_new_tokens)], None, None);
    match added {
        Ok(_) => sim.drain(),
        Err(error) => assert!(matches!(error, Error::ExceedsKvPool { .. }), "{error}"),
    }
    sim.scheduler.counters().finished == 1
}

/// F1, F8: what fits an empty pool to the last token runs to its end; one token more is refused at once.
#[test]
fn exactly_what_fits_the_pool_is_accepted() {
    for (num_blocks, block_tokens) in [(4, 1), (4, 4), (2, 16), (1, 256)] {
        let pool_tokens = num_blocks * block_tokens;
        for prompt_tokens in 1..=pool_tokens + 2 {
            for max_new_tokens in [0usize, 1, 2, block_tokens] {
                let kv_tokens = prompt_tokens + max_new_tokens.saturating_sub(1);
                let fits = kv_tokens <= pool_tokens;
                assert_eq!(runs_alone(num_blocks, block_tokens, prompt_tokens, max_new_tokens), fits, "{kv_tokens}");
            }
        }
    }
}

/// The context bounds prompt and answer: a prompt leaves room for a token unless none is asked for, and the answer is
/// cut to what is left.
#[test]
fn context_bounds_prompt_and_answer() {
    let mut sim = Simulation::new(config(8), kv_cache(8, 4));
    for (prompt_tokens, max_new_tokens, produced) in
        [(7, 100, Some(1)), (8, 1, None), (8, 0, Some(0)), (9, 0, None), (3, 100, Some(5))]
    {
        let added = sim.add_request(vec![spec(text(1, prompt_tokens), max_new_tokens)], None, None);
        sim.drain();
        match (added, produced) {
            (Ok(ids), Some(produced)) => assert_eq!(sim.tracked[&ids[0]].received.len(), produced),
            (Err(Error::PromptTooLong { limit_tokens, context_tokens: 8, .. }), None) => {
                assert_eq!(limit_tokens, if max_new_tokens == 0 { 8 } else { 7 });
            }
            (added, _) => panic!("{prompt_tokens} + {max_new_tokens}: {added:?}"),
        }
    }
    let empty = sim.scheduler.add(vec![spec(Vec::new(), 1)], 0);
    assert!(matches!(empty, Err(Error::InvalidArgument { field: "prompt", .. })));
}

/// V1: the queue is bounded in requests and in tokens; a refused request leaves nothing behind.
#[test]
fn full_queue_refuses() {
    let limits = SchedulerConfig { max_waiting_requests: 2, max_waiting_tokens: 30, ..config(100) };
    let mut sim = Simulation::new(limits, kv_cache(64, 4));
    sim.add(spec(text(1, 20), 1));
    let refused = sim.scheduler.add(vec![spec(text(2, 11), 1)], 0).expect_err("31 tokens would wait");
    assert_eq!(refused, Error::Overloaded { queue: "waiting queue (tokens)", waiting: 20, limit: 30 });
    sim.add(spec(text(2, 10), 1));
    let refused = sim.scheduler.add(vec![spec(text(3, 1), 1)], 0).expect_err("two requests wait");
    assert_eq!(refused, Error::Overloaded { queue: "waiting queue (requests)", waiting: 2, limit: 2 });
    assert_eq!((sim.scheduler.counters().accepted, sim.scheduler.counters().overloaded_requests), (2, 2));
    sim.drain();
}

/// V6: a sequence whose deadline passes while it waits fails at it and is never computed, although others run.
#[test]
fn deadline_in_the_queue_is_never_computed() {
    let one_seat = SchedulerConfig { max_running_sequences: 1, ..config(100) };
    let mut sim = Simulation::new(one_seat, kv_cache(32, 4));
    sim.add(spec(text(1, 10), 40));
    let late = sim.add(SequenceSpec { deadline_ms: Some(20), timeout_ms: 20, ..spec(text(2, 10), 5) });
    assert_eq!(sim.scheduler.next_deadline(), Some(20));
    sim.drain();
    let late = &sim.tracked[&late];
    assert_eq!(late.end, Some(Err(Error::DeadlineExceeded { timeout_ms: 20 })));
    assert_eq!((late.started_at_step, sim.scheduler.counters().expired), (None, 1));
    assert_eq!(sim.scheduler.counters().computed_tokens, 10 + 39, "only the other sequence was computed");
}

/// A deadline also ends what already runs, within the step, and its blocks are free.
#[test]
fn deadline_ends_a_running_sequence() {
    let mut sim = Simulation::new(config(100), kv_cache(32, 4));
    let seq = sim.add(SequenceSpec { deadline_ms: Some(5), timeout_ms: 5, ..spec(text(1, 10), 50) });
    sim.drain();
    assert_eq!(sim.tracked[&seq].end, Some(Err(Error::DeadlineExceeded { timeout_ms: 5 })));
    assert!((1..6).contains(&sim.tracked[&seq].received.len()));
}

/// A high-priority request that finds no seat, or no blocks, takes them from the background at once; the background
/// request is computed again and gives the same tokens.
#[test]
fn higher_class_preempts_lower() {
    for (max_running_sequences, num_blocks) in [(1, 64), (8, 12)] {
        let limits = SchedulerConfig { max_running_sequences, ..config(100) };
        let mut sim = Simulation::new(limits, kv_cache(num_blocks, 4));
        let low = sim.add(SequenceSpec { priority: Priority::Background, ..spec(text(1, 30), 10) });
        sim.turn();
        sim.turn();
        let high = sim.add(SequenceSpec { priority: Priority::High, ..spec(text(2, 30), 10) });
        sim.turn();
        assert_eq!(sim.tracked[&high].started_at_step, Some(2), "the next step computes it");
        assert!(!sim.scheduler.is_running(low));
        sim.drain();
        assert_eq!((sim.tracked[&low].usage.preemptions, sim.tracked[&high].usage.preemptions), (1, 0));
        assert_eq!(sim.scheduler.counters().class_preemptions, 1);
        assert!(sim.scheduler.counters().recomputed_tokens > 0);
    }
}

/// A higher class does not preempt when that would not make room: nobody is stopped for nothing.
#[test]
fn nobody_is_preempted_in_vain() {
    let mut sim = Simulation::new(config(100), kv_cache(12, 4));
    sim.add(SequenceSpec { priority: Priority::High, ..spec(text(1, 24), 16) });
    sim.turn();
    let low = sim.add(SequenceSpec { priority: Priority::Background, ..spec(text(2, 4), 4) });
    sim.turn();
    assert!(sim.scheduler.is_running(low));
    sim.add(SequenceSpec { priority: Priority::High, ..spec(text(3, 40), 4) });
    sim.drain();
    assert_eq!(sim.scheduler.counters().preemptions, 0);
}

/// Blocks that the newcomer would share with the victim are no gain: both hold the same ones.
#[test]
fn shared_blocks_are_no_gain() {
    let mut sim = Simulation::new(config(100), kv_cache(12, 4));
    sim.add(SequenceSpec { priority: Priority::High, ..spec(text(1, 8), 5) });
    let low = sim.add(SequenceSpec { priority: Priority::Background, ..spec(text(2, 24), 5) });
    sim.turn();
    sim.turn();
    let high = sim.add(SequenceSpec { priority: Priority::High, ..spec(text(2, 48), 1) });
    sim.turn();
    assert!(sim.scheduler.is_running(low), "losing it would not have made room");
    sim.drain();
    assert_eq!(sim.tracked[&high].usage.cached_tokens, 24, "they did share");
}

/// The first in the queue is not overtaken for lack of blocks, although one behind it would fit: else a stream of short
/// requests would keep a long one out.
#[test]
fn lack_of_blocks_is_not_overtaken() {
    let mut sim = Simulation::new(config(100), kv_cache(12, 4));
    let runs = sim.add(spec(text(1, 28), 4));
    sim.turn();
    let long = sim.add(spec(text(2, 36), 4));
    let short = sim.add(spec(text(3, 4), 4));
    sim.turn();
    assert!(sim.scheduler.is_running(runs) && sim.scheduler.counts().waiting == 2);
    sim.drain();
    assert!(sim.tracked[&long].started_at_step <= sim.tracked[&short].started_at_step);
}

/// KV that gave logits that are not finite is never offered to others; what was computed before it is.
#[test]
fn not_finite_is_not_cached() {
    let limits = SchedulerConfig { prefill_budget_tokens: 32, ..config(200) };
    let mut sim = Simulation::new(limits, kv_cache(32, 16));
    let bad = sim.add_request(vec![spec(text(1, 60), 4)], None, Some(0)).expect("fits")[0];
    sim.drain();
    assert_eq!(sim.tracked[&bad].end, Some(Err(Error::NonFiniteLogits { position: 60 })));
    let again = sim.add(spec(text(1, 60), 4));
    sim.drain();
    assert_eq!(sim.tracked[&again].usage.cached_tokens, 32, "the first chunk was fine");
}

/// Eight seats, `num_requests` long answers that each may fill most of a pool of `pool_tokens`, nothing shared.
fn crowd(rng: &mut Rng, pool_tokens: usize, num_requests: u8) -> Simulation {
    let block_tokens = rng.pick(&[2, 4]);
    let limits = SchedulerConfig { max_running_sequences: 8, ..config(pool_tokens + 1) };
    let mut sim = Simulation::new(limits, kv_cache(pool_tokens / block_tokens, block_tokens));
    for name in 0..num_requests {
        let max_new_tokens = rng.range(pool_tokens / 3, pool_tokens - 10);
        let prompt = text(1, rng.range(1, 6));
        sim.add(SequenceSpec { namespace: namespace(name), ..spec(prompt, max_new_tokens) });
    }
    sim
}

/// F4: many long answers on a pool that holds one or two of them whole, each running to its limit. Preemption happens,
/// and what is computed again stays below 30 % of what is produced.
#[test]
fn crowded_pool_does_not_thrash() {
    let mut tally = Tally::default();
    for seed in 0..10 {
        let mut sim = crowd(&mut Rng(mix(seed)), 256, 16);
        sim.drain();
        tally = tally.add(&outcome(&mut sim));
    }
    let counters = tally.counters;
    let share = counters.recomputed_tokens as f64 / counters.generated_tokens as f64;
    println!("{} preemptions, at most {} each, {share:.3} again", counters.preemptions, tally.most_preemptions);
    assert!(counters.preemptions > 0 && share < 0.3, "{share}");
}

/// F4: a sequence that was preempted [`MAX_PREEMPTIONS`] times keeps its blocks from then on, on a pool crowded with
/// others like it and with unprotected ones, which give theirs up.
#[test]
fn protected_is_not_preempted_again() {
    let (mut num_protected, mut num_others) = (0, 0);
    for seed in 0..30 {
        let mut sim = crowd(&mut Rng(mix(seed)), 64, 8);
        for seq in (0..8).step_by(2).map(SeqId) {
            while sim.tracked[&seq].end.is_none() && sim.tracked[&seq].forced_preemptions < MAX_PREEMPTIONS as usize {
                sim.turn();
                sim.preempt(seq);
            }
        }
        sim.drain();
        for tracked in sim.tracked.values() {
            if tracked.forced_preemptions == MAX_PREEMPTIONS as usize {
                num_protected += 1;
            }
            num_others += tracked.usage.preemptions - tracked.forced_preemptions;
        }
    }
    assert!(num_protected > 50 && num_others > 10, "{num_protected} protected, {num_others} preemptions of others");
}

/// A prefix that several live requests share is computed once: the later ones wait for its blocks, then read them.
#[test]
fn shared_prefix_is_computed_once() {
    const PREFIX_TOKENS: usize = 64;
    for max_in_flight in [1, 2] {
        let chunked = SchedulerConfig { prefill_budget_tokens: 20, max_in_flight, ..config(200) };
        let mut sim = Simulation::new(chunked, kv_cache(64, 16));
        for tail in 0..4 {
            let prompt = [text(1, PREFIX_TOKENS), text(2 + tail, 5)].concat();
            sim.add(spec(prompt, 4));
        }
        sim.drain();
        let counters = sim.scheduler.counters();
        assert_eq!((counters.prefix_waits, counters.prefix_hit_tokens), (3, 3 * PREFIX_TOKENS as u64));
        assert_eq!(counters.computed_tokens, (PREFIX_TOKENS + 4 * 5 + 4 * 3) as u64);
        assert_eq!(counters.prefix_query_tokens, 4 * (PREFIX_TOKENS as u64 + 5));
    }
}

/// If the sequence that computes a shared prefix disappears, one that waited for it takes over.
#[test]
fn waiting_for_a_prefix_survives_its_owner() {
    let mut sim = Simulation::new(SchedulerConfig { max_in_flight: 2, ..config(200) }, kv_cache(64, 16));
    let owner = sim.add(spec(text(1, 100), 4));
    let waiter = sim.add(spec(text(1, 100), 4));
    assert!(sim.launch());
    assert_eq!((sim.scheduler.is_running(waiter), sim.scheduler.counters().prefix_waits), (false, 1));
    assert!(sim.cancel(owner) && sim.launch());
    assert!(sim.scheduler.is_running(waiter));
    sim.drain();
    assert_eq!(sim.tracked[&waiter].usage.cached_tokens, 0, "the owner published nothing");
}

/// The choices of one request share the full blocks of their prompt, and each has its own tokens.
#[test]
fn choices_share_their_prompt() {
    let mut sim = Simulation::new(config(200), kv_cache(64, 16));
    let choice = |seed| SequenceSpec {
        sampling: Arc::new(SamplingParams { seed, ..SamplingParams::greedy() }),
        ..spec(text(1, 50), 6)
    };
    let ids = sim.add_request((0..4).map(choice).collect(), None, None).expect("fits");
    sim.drain();
    let counters = sim.scheduler.counters();
    assert_eq!((counters.requests, counters.accepted), (1, 4));
    assert_eq!(counters.prefix_hit_tokens, 3 * 48);
    assert_eq!(counters.computed_tokens, 50 + 3 * 2 + 4 * 5);
    let answers: std::collections::BTreeSet<_> = ids.iter().map(|id| &sim.tracked[id].received).collect();
    assert_eq!(answers.len(), 4, "each choice draws with its own seed");
}

/// A prompt that is wholly cached still computes its last token; another namespace, a request that does not want to
/// read, and one that wants prompt logprobs find nothing. Only who writes the cache leaves something there.
#[test]
fn who_may_read_the_cache() {
    let mut sim = Simulation::new(config(200), kv_cache(64, 16));
    let first = spec(text(1, 64), 3);
    sim.add(first.clone());
    sim.drain();
    for (reader, cached_tokens) in [
        (first.clone(), 48),
        (SequenceSpec { namespace: namespace(9), ..first.clone() }, 0),
        (SequenceSpec { prefix_cache: CacheUse::Off, ..first.clone() }, 0),
        (SequenceSpec { prefix_cache: CacheUse::Read, ..first.clone() }, 48),
        (SequenceSpec { prompt_logprobs: Some(1), ..first.clone() }, 0),
    ] {
        let seq = sim.add(reader);
        sim.drain();
        assert_eq!(sim.tracked[&seq].usage.cached_tokens, cached_tokens);
    }
    for (name, use_of_cache, kept_tokens) in
        [(2, CacheUse::Off, 0), (3, CacheUse::Read, 0), (4, CacheUse::ReadWrite, 48)]
    {
        let writer = SequenceSpec { prefix_cache: use_of_cache, ..spec(text(name, 64), 3) };
        sim.add(writer.clone());
        sim.drain();
        let seq = sim.add(SequenceSpec { prefix_cache: CacheUse::Read, ..writer });
        sim.drain();
        assert_eq!(sim.tracked[&seq].usage.cached_tokens, kept_tokens, "kept by {use_of_cache:?}");
    }
}

/// A block from a tier whose use ends in logits that are not finite is used once: it is fetched by nobody again, and who had
/// it before computes it.
#[test]
fn restored_block_that_fails_is_not_used_again() {
    let mut sim = Simulation::new(config(200), kv_cache_over(6, 16, Some(tiers_config(16, 64))));
    sim.add(spec(text(1, 64), 2));
    sim.drain();
    sim.add(spec(text(2, 80), 2));
    sim.drain();
    assert!(sim.scheduler.counters().evictions > 0, "the first text went to host memory");
    let run = |sim: &mut Simulation, non_finite_after| {
        let seq = sim.add_request(vec![spec(text(1, 64), 2)], None, non_finite_after).expect("it can run")[0];
        sim.drain();
        sim.tracked[&seq].usage.cached_by_tier
    };
    assert!(run(&mut sim, Some(0)).host > 0, "it came back, and failed");
    let again = run(&mut sim, None);
    assert_eq!(again.host, 0, "{again:?}");
    assert!(run(&mut sim, None).pool > 0, "what was computed anew is shared");
}

/// E1: a cancel frees blocks at once in every state: waiting, in prefill, decoding, preempted; only the block that a
/// launched step writes stays pinned until that step is applied. E2: twice has no effect.
#[test]
fn cancel_frees_blocks_in_every_state() {
    for num_turns in 0..8 {
        for preempted in [false, true] {
            let chunked = SchedulerConfig { prefill_budget_tokens: 20, max_in_flight: 2, ..config(200) };
            let mut sim = Simulation::new(chunked, kv_cache(16, 16));
            let seq = sim.add(spec(text(1, 60), 20));
            (0..num_turns).for_each(|_| sim.turn());
            sim.launch();
            assert_eq!(sim.steps.len(), if num_turns == 0 { 1 } else { 2 });
            assert_eq!(preempted && sim.preempt(seq), preempted);
            assert!(sim.cancel(seq) && !sim.cancel(seq));
            let blocks = sim.scheduler.counts().blocks;
            assert_eq!(blocks.owned, 0);
            assert!(blocks.pinned > 0 && blocks.pinned <= 3, "{blocks:?}");
            let computed = sim.scheduler.counters().steps;
            sim.drain();
            assert_eq!(sim.scheduler.counters().steps, computed, "no further step is scheduled");
        }
    }
}

/// Preempted by hand after each step index in turn, with one or two steps in flight, a sequence gives the same tokens
/// (checked against its prompt) and finds its published blocks again.
#[test]
fn preempted_anywhere_gives_the_same_tokens() {
    for max_in_flight in [1, 2] {
        for step in 0..38 {
            let chunked = SchedulerConfig { prefill_budget_tokens: 7, max_in_flight, ..config(200) };
            let mut sim = Simulation::new(chunked, kv_cache(32, 4));
            let seq = sim.add(SequenceSpec { prompt_logprobs: (step % 2 == 0).then_some(1), ..spec(text(1, 30), 35) });
            (0..=step).for_each(|_| sim.turn());
            assert!(sim.preempt(seq));
            sim.drain();
            assert_eq!(sim.tracked[&seq].usage.preemptions, 1);
            assert!(step < 10 || sim.scheduler.counters().resume_hit_tokens > 0);
        }
    }
}

/// V5: under an endless stream of high-priority requests that would fill every seat, a background request is computed
/// after at most three spans of ageing and what already ran; without ageing it would starve (the control).
#[test]
fn background_does_not_starve() {
    let waited = |age_steps: u64| {
        let limits = SchedulerConfig { age_steps, max_running_sequences: 2, ..config(64) };
        let mut sim = Simulation::new(limits, kv_cache(64, 4));
        let high = |name| SequenceSpec { priority: Priority::High, ..spec(text(name, 8), 4) };
        for name in 0..4 {
            sim.add(high(name));
        }
        let low = sim.add(SequenceSpec { priority: Priority::Background, ..spec(text(99, 8), 4) });
        for name in 0..300 {
            if sim.scheduler.counts().waiting < 4 {
                sim.add(high(1000 + name));
            }
            sim.turn();
        }
        let started = sim.tracked[&low].started_at_step;
        sim.drain();
        (started.filter(|&step| step < 300), sim.scheduler.counters().promoted_by_age)
    };
    let (started, promoted) = waited(8);
    assert!(started.is_some_and(|step| (16..=32).contains(&step)), "{started:?}");
    assert_eq!(promoted, 1);
    assert_eq!(waited(1_000_000), (None, 0), "the load would starve it");
}

/// A step's budget: decoding sequences always get their token; prompts share the rest, which is smaller while someone
/// decodes; a prompt that runs is never stopped by more important ones.
#[test]
fn budget_is_shared_between_decode_and_prefill() {
    let limits = SchedulerConfig { prefill_budget_tokens: 64, mixed_budget_tokens: 24, ..config(400) };
    let mut sim = Simulation::new(limits, kv_cache(256, 4));
    let decoding = sim.add(spec(text(1, 10), 40));
    sim.turn();
    let long = sim.add(SequenceSpec { priority: Priority::Background, ..spec(text(2, 200), 4) });
    sim.launch();
    assert_eq!(planned(&sim), [(decoding, 1), (long, 23)]);
    sim.apply();
    let high = sim.add(SequenceSpec { priority: Priority::High, ..spec(text(3, 100), 4) });
    sim.launch();
    assert_eq!(planned(&sim), [(decoding, 1), (high, 7), (long, 16)]);
    sim.apply();
    sim.drain();
}

/// Tokens by sequence of the step that was launched last, in the order of its batch.
fn planned(sim: &Simulation) -> Vec<(SeqId, usize)> {
    let chunks = sim.scheduler.chunks(sim.steps.back().expect("a step is in flight"));
    chunks.iter().map(|chunk| (chunk.seq, chunk.positions.len())).collect()
}

/// A step that could not be computed ends its sequences with that error, and only them; their blocks are free.
#[test]
fn failed_step_ends_only_its_sequences() {
    let one_seat = SchedulerConfig { max_running_sequences: 1, ..config(100) };
    let mut sim = Simulation::new(one_seat, kv_cache(16, 4));
    let (bad, good) = (sim.add(spec(text(1, 10), 4)), sim.add(spec(text(2, 10), 4)));
    let step = sim.scheduler.schedule(0).expect("work");
    let events = sim.scheduler.fail_step(step, &Error::Closed);
    assert_eq!(events.len(), 1);
    assert!(
        matches!(&events[0], ns_llm::scheduler::SequenceEvent::Failed { seq, error: Error::Closed, .. } if *seq == bad)
    );
    sim.tracked.remove(&bad);
    sim.scheduler.check_invariants().expect("invariants hold");
    sim.drain();
    assert_eq!(sim.tracked[&good].end, Some(Ok(FinishReason::Length)));
}

/// A vector that is not finite ends its own sequence; a step that could not be computed ends all of its own, and the
/// next one is not touched.
#[test]
fn a_bad_vector_is_its_own_sequences_failure() {
    let mut sim = Simulation::new(config(64), kv_cache(4, 16));
    let scheduler = &mut sim.scheduler;
    let spec =
        || EncodeSpec { priority: Priority::Normal, tokens: text(1, 9).into(), deadline_ms: None, timeout_ms: 0 };
    let ids = scheduler.add_encodings(vec![spec(), spec()], 0).expect("accepted");
    let step = scheduler.schedule_encoding(0).expect("two wait");
    let events = scheduler.apply_encoding(step, Ok(vec![vec![1.0, f32::NAN], vec![1.0, 2.0]]));
    let error = Error::NonFiniteEmbedding { tokens: 9 };
    assert!(matches!(&events[0], SequenceEvent::Failed { seq, error: e, .. } if *seq == ids[0] && *e == error));
    assert!(matches!(&events[1], SequenceEvent::Encoded { seq, .. } if *seq == ids[1]));
    scheduler.add_encodings(vec![spec(), spec()], 0).expect("accepted");
    let step = scheduler.schedule_encoding(0).expect("two wait");
    let lost = Error::Internal { reason: "lost".to_string() };
    let events = scheduler.apply_encoding(step, Err(lost.clone()));
    assert!(
        events.len() == 2 && events.iter().all(|e| matches!(e, SequenceEvent::Failed { error, .. } if *error == lost))
    );
    assert_eq!((scheduler.counters().finished, scheduler.counters().failed), (1, 3));
    scheduler.check_invariants().expect("nothing is left");
    assert!(!scheduler.has_work());
}
