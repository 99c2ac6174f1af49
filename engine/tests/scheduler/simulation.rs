//! The scheduler and the fake executor, driven as the worker drives them, with everything checked on the way: tokens
//! against what the prompt alone implies, one final event per sequence, every invariant after every step.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use ns_llm::executor::Executor;
use ns_llm::ids::{NamespaceKey, SeqId};
use ns_llm::kv_cache::tiers::TiersConfig;
use ns_llm::kv_cache::{BlockTransfer, KvCache, KvCacheConfig, KvIdentity};
use ns_llm::scheduler::{MAX_PREEMPTIONS, Scheduler, SchedulerConfig, SequenceEvent, Step};
use ns_llm::sequence::{EncodeSpec, SequenceSpec};
use ns_llm::{CacheUse, Error, FinishReason, Priority, Result, SamplingParams, Usage};

use crate::fake_executor::{Digest, FakeExecutor};
use crate::sim_tiers::{LOAD_BUDGET_MS, SimTiers};

/// A specification with every option off.
pub fn spec(prompt: impl Into<Arc<[u32]>>, max_new_tokens: usize) -> SequenceSpec {
    SequenceSpec {
        priority: Priority::Normal,
        prompt: prompt.into(),
        max_new_tokens,
        stop_token_ids: Arc::from([]),
        deadline_ms: None,
        timeout_ms: 0,
        namespace: [0; 32],
        owner: [0; 32],
        prefix_cache: CacheUse::ReadWrite,
        prompt_logprobs: None,
        logprobs: None,
        sampling: Arc::new(SamplingParams::greedy()),
    }
}

/// A pool of the test's model, with nothing below it.
pub fn kv_cache(num_blocks: usize, block_tokens: usize) -> KvCache {
    kv_cache_over(num_blocks, block_tokens, None)
}

/// A pool of the test's model.
pub fn kv_cache_over(num_blocks: usize, block_tokens: usize, tiers: Option<TiersConfig>) -> KvCache {
    let identity = KvIdentity {
        fingerprint: [7; 32],
        kv_layout: "fake".to_string(),
        numerics_id: "fake".to_string(),
        adapter: String::new(),
    };
    KvCache::new(KvCacheConfig { num_blocks, block_tokens, identity, prefix_cache: true, owner_share: 0.5, tiers })
}

/// What is known of an added sequence without looking into the scheduler, and what came of it.
#[derive(Debug)]
pub struct Tracked {
    pub spec: SequenceSpec,
    /// All tokens that it produces if nothing but itself ends it.
    pub answer: Vec<u32>,
    /// How it then ends; `None`: its logits are not finite after the answer.
    pub ending: Option<FinishReason>,
    /// Tokens after which the worker finds a stop string.
    pub stop_string_after: Option<usize>,
    pub received: Vec<u32>,
    pub num_scored: usize,
    pub end: Option<std::result::Result<FinishReason, Error>>,
    pub usage: Usage,
    pub forced_preemptions: usize,
    pub added_at_step: u64,
    pub started_at_step: Option<u64>,
    /// Steps during which somebody waited for a tier, when it was added.
    added_at_restoring_step: u64,
    /// Preemptions when the scheduler last had its way, those by hand included.
    num_preemptions: u32,
    /// Sum of `max_kv_tokens` in the documented bound of waiting.
    bound_tokens: u64,
}

/// What is known of an added sequence that is to become a vector, and what came of it.
#[derive(Debug)]
pub struct TrackedEncoding {
    pub spec: EncodeSpec,
    pub end: Option<std::result::Result<(), Error>>,
    added_at_step: u64,
    /// Sequences of its kind that were live when it was added.
    num_older: u64,
}

/// A scheduler with its executor and clock.
pub struct Simulation {
    pub scheduler: Scheduler,
    pub executor: FakeExecutor,
    pub now_ms: u64,
    pub tracked: BTreeMap<SeqId, Tracked>,
    pub encodings: BTreeMap<SeqId, TrackedEncoding>,
    pub steps: VecDeque<Step>,
    /// What the pool's tiers are made of.
    pub tiers: Option<SimTiers>,
    /// Most preemptions by hand of one sequence so far.
    max_forced: usize,
    /// Steps launched while a running sequence waited for blocks from a tier.
    restoring_steps: u64,
}

impl Simulation {
    pub fn new(config: SchedulerConfig, kv: KvCache) -> Self {
        let executor = FakeExecutor::new(kv.num_blocks(), kv.block_tokens(), config.max_in_flight);
        let scheduler = Scheduler::new(config, kv);
        let (tracked, encodings, steps) = (BTreeMap::new(), BTreeMap::new(), VecDeque::new());
        let (tiers, max_forced, restoring_steps) = (None, 0, 0);
        Simulation { scheduler, executor, now_ms: 0, tracked, encodings, steps, tiers, max_forced, restoring_steps }
    }

    /// Adds a request of one choice that must be accepted.
    pub fn add(&mut self, spec: SequenceSpec) -> SeqId {
        self.add_request(vec![spec], None, None).expect("the request can run")[0]
    }

    /// Adds a request; each choice finds a stop string after `stop_string_after` tokens, or has logits that are not
    /// finite after `non_finite_after` tokens.
    pub fn add_request(
        &mut self,
        specs: Vec<SequenceSpec>,
        stop_string_after: Option<usize>,
        non_finite_after: Option<usize>,
    ) -> Result<Vec<SeqId>> {
        let live_tokens: u64 = self.scheduler.sequences().map(|seq| seq.spec.max_kv_tokens() as u64).sum();
        let siblings: u64 = specs.iter().map(|spec| (spec.prompt.len() + spec.max_new_tokens) as u64).sum();
        let added_at_step = self.scheduler.counters().steps;
        let ids = self.scheduler.add(specs, self.now_ms)?;
        for &id in &ids {
            let spec = self.scheduler.sequence(id).expect("just added").spec.clone();
            let (answer, ending) = expected_answer(&spec, non_finite_after);
            let non_finite_at = non_finite_after.map(|num| spec.prompt.len() + num);
            self.executor.register(id, spec.namespace, &spec.prompt, non_finite_at);
            let tracked = Tracked {
                spec,
                answer,
                ending,
                stop_string_after,
                received: Vec::new(),
                num_scored: 0,
                end: None,
                usage: Usage::default(),
                forced_preemptions: 0,
                added_at_step,
                started_at_step: None,
                added_at_restoring_step: self.restoring_steps,
                num_preemptions: 0,
                bound_tokens: live_tokens + siblings,
            };
            self.tracked.insert(id, tracked);
        }
        Ok(ids)
    }

    /// Adds the inputs of one embedding request.
    pub fn add_encodings(&mut self, specs: Vec<EncodeSpec>) -> Result<Vec<SeqId>> {
        let num_older = self.encodings.values().filter(|tracked| tracked.end.is_none()).count() + specs.len();
        let added_at_step = self.scheduler.counters().encode_steps;
        let ids = self.scheduler.add_encodings(specs.clone(), self.now_ms)?;
        for (&id, spec) in ids.iter().zip(specs) {
            let num_older = num_older as u64;
            self.encodings.insert(id, TrackedEncoding { spec, end: None, added_at_step, num_older });
        }
        Ok(ids)
    }

    /// One step of whole sequences, as the worker runs it: only while no other step is in flight.
    pub fn encode(&mut self) -> bool {
        if !self.steps.is_empty() {
            return false;
        }
        let expired = self.scheduler.expire(self.now_ms);
        expired.into_iter().for_each(|event| self.hear(event));
        let Some(step) = self.scheduler.schedule_encoding(self.now_ms) else { return false };
        let config = self.scheduler.config();
        let limit_tokens = config.max_encode_tokens.max(config.prefill_budget_tokens).max(config.mixed_budget_tokens);
        assert!((1..=limit_tokens).contains(&step.num_tokens()));
        let (age_steps, now) = (config.age_steps, self.scheduler.counters().encode_steps);
        for seq in step.sequences() {
            let tracked = &self.encodings[&seq];
            assert!(tracked.spec.deadline_ms.is_none_or(|deadline| deadline > self.now_ms), "begun after its deadline");
            let (waited, bound) = (now - tracked.added_at_step, 2 * age_steps + tracked.num_older);
            assert!(waited <= bound, "{seq:?} waited {waited} steps, the bound is {bound}");
        }
        let vectors = self.executor.encode(&step.batch(self.executor.encode_block_tokens()));
        let events = self.scheduler.apply_encoding(step, vectors);
        events.into_iter().for_each(|event| self.hear(event));
        self.check();
        true
    }

    pub fn cancel(&mut self, seq: SeqId) -> bool {
        let event = self.scheduler.cancel(seq);
        let was_live = event.is_some();
        let generates = self.tracked.get(&seq).is_some_and(|tracked| tracked.end.is_none());
        let encodes = self.encodings.get(&seq).is_some_and(|tracked| tracked.end.is_none());
        assert_eq!(was_live, generates || encodes);
        event.into_iter().for_each(|event| self.hear(event));
        was_live
    }

    pub fn preempt(&mut self, seq: SeqId) -> bool {
        let preempted = self.scheduler.preempt(seq);
        if preempted {
            let tracked = self.tracked.get_mut(&seq).expect("tracked");
            tracked.forced_preemptions += 1;
            tracked.num_preemptions += 1;
            self.max_forced = self.max_forced.max(tracked.forced_preemptions);
        }
        preempted
    }

    /// Schedules and launches a step if one can be. False when there was none.
    pub fn launch(&mut self) -> bool {
        let expired = self.scheduler.expire(self.now_ms);
        expired.into_iter().for_each(|event| self.hear(event));
        self.note_waiting();
        let scheduled = self.scheduler.schedule(self.now_ms);
        self.check_preemptions();
        self.move_blocks();
        let restores = self.scheduler.sequences().any(|seq| seq.restore.is_some());
        let Some(step) = scheduled else {
            let generates = self.scheduler.sequences().next().is_some();
            let stuck = self.steps.is_empty() && generates && !restores;
            assert!(!stuck, "nothing runs though sequences are live: {:?}", self.scheduler.counts());
            return false;
        };
        self.restoring_steps += u64::from(restores);
        self.note_started(&step);
        let batch = self.scheduler.batch(&step);
        assert_eq!(batch.num_tokens(), step.num_tokens);
        assert!(step.num_tokens <= self.scheduler.config().max_step_tokens());
        self.executor.launch(&batch).expect("the fake does not fail");
        self.steps.push_back(step);
        self.check();
        true
    }

    /// Moves blocks between the pool and the tiers, as the worker does before each launch.
    fn move_blocks(&mut self) {
        self.executor.note_allocations(self.scheduler.kv());
        let now_us = self.now_ms * 1_000;
        for transfer in self.scheduler.take_transfers() {
            match transfer {
                BlockTransfer::Keep { block, kept } => {
                    if self.scheduler.kv().would_keep(&kept, now_us) {
                        let bytes = self.executor.read_blocks(&[block]).expect("the fake does not fail").remove(0);
                        self.scheduler.keep_block(&kept, bytes, now_us);
                    }
                }
                BlockTransfer::Restore { block, bytes } => {
                    self.executor.write_block(block, &bytes).expect("the fake does not fail");
                }
            }
        }
        if let Some((sim, tiers)) = self.tiers.as_mut().zip(self.scheduler.tiers()) {
            sim.serve(tiers, self.now_ms);
        }
    }

    /// Applies the oldest launched step. Stop strings are found in what it brought.
    pub fn apply(&mut self) {
        let step = self.steps.pop_front().expect("a step was launched");
        let sampled = self.executor.collect().expect("the fake does not fail");
        let events = self.scheduler.apply(step, &sampled, self.now_ms);
        events.into_iter().for_each(|event| self.hear(event));
        self.move_blocks();
        self.check();
        let found =
            |tracked: &Tracked| tracked.end.is_none() && tracked.stop_string_after == Some(tracked.received.len());
        let found: Vec<_> = self.tracked.iter().filter(|(_, tracked)| found(tracked)).map(|(&seq, _)| seq).collect();
        for seq in found {
            let event = self.scheduler.finish(seq, FinishReason::Stop).expect("it is live");
            self.hear(event);
        }
    }

    /// One turn of the worker: launch what can be, then apply once no more steps may be in flight.
    pub fn turn(&mut self) {
        let max_in_flight = self.scheduler.config().max_in_flight;
        let launched = self.steps.len() < max_in_flight && self.launch();
        if self.steps.len() == max_in_flight || (!launched && !self.steps.is_empty()) {
            self.apply();
        }
        self.encode();
    }

    /// Runs until nothing is live.
    pub fn drain(&mut self) {
        let live_tokens: usize = self.scheduler.sequences().map(|seq| seq.spec.max_kv_tokens() + 1).sum();
        // A restore may end without a block each time that its budget is over.
        let waits = if self.tiers.is_some() { 2 * LOAD_BUDGET_MS as usize } else { 1 };
        let max_turns = 100 + self.encodings.len() + 2 * (1 + self.max_preemptions()) * live_tokens * waits;
        for _ in 0..max_turns {
            if !self.scheduler.has_work() {
                return self.check_idle();
            }
            self.now_ms += 1;
            self.turn();
        }
        panic!("{:?} after {max_turns} turns", self.scheduler.counts());
    }

    /// Nothing is live: every sequence had its end, and every block is free or cached.
    pub fn check_idle(&self) {
        assert!(self.tracked.values().all(|tracked| tracked.end.is_some()), "a sequence was not settled");
        assert!(self.encodings.values().all(|tracked| tracked.end.is_some()), "a vector was not settled");
        let (counts, counters) = (self.scheduler.counts(), self.scheduler.counters());
        assert_eq!((counts.waiting, counts.running, counts.in_flight), (0, 0, 0));
        assert_eq!(counts.blocks.free + counts.blocks.cached, self.scheduler.kv().num_blocks());
        assert_eq!(counters.accepted, counters.finished + counters.cancelled + counters.failed);
        assert_eq!(self.scheduler.next_deadline(), None);
        let received: usize = self.tracked.values().map(|tracked| tracked.received.len()).sum();
        assert_eq!(counters.generated_tokens, received as u64);
    }

    fn max_preemptions(&self) -> usize {
        MAX_PREEMPTIONS as usize + self.max_forced
    }

    fn check(&self) {
        self.scheduler.check_invariants().expect("invariants hold");
        let (counts, counters) = (self.scheduler.counts(), self.scheduler.counters());
        let blocks = counts.blocks;
        let ended = counters.finished + counters.cancelled + counters.failed;
        assert_eq!(blocks.free + blocks.cached + blocks.owned + blocks.pinned, self.scheduler.kv().num_blocks());
        assert_eq!(counters.accepted, ended + (counts.waiting + counts.running) as u64);
        let unsettled = self.tracked.values().filter(|tracked| tracked.end.is_none()).count()
            + self.encodings.values().filter(|tracked| tracked.end.is_none()).count();
        assert_eq!(unsettled, counts.waiting + counts.running, "the caller and the scheduler disagree on who lives");
    }

    /// What scheduling did: nobody who was preempted [`MAX_PREEMPTIONS`] times is preempted again, but by hand.
    fn check_preemptions(&mut self) {
        for seq in self.scheduler.sequences() {
            let tracked = self.tracked.get_mut(&seq.id).expect("tracked");
            let preempted = seq.num_preemptions > tracked.num_preemptions;
            assert!(!preempted || tracked.num_preemptions < MAX_PREEMPTIONS, "{:?} was protected", seq.id);
            tracked.num_preemptions = seq.num_preemptions;
        }
    }

    /// The bound of waiting counts those that run `3 * age_steps` steps after the arrival.
    fn note_waiting(&mut self) {
        let (step, age_steps) = (self.scheduler.counters().steps, self.scheduler.config().age_steps);
        let running = self.scheduler.sequences().filter(|seq| self.scheduler.is_running(seq.id));
        let running_tokens: u64 = running.map(|seq| seq.spec.max_kv_tokens() as u64).sum();
        for tracked in self.tracked.values_mut() {
            if tracked.started_at_step.is_none() && step == tracked.added_at_step + 3 * age_steps {
                tracked.bound_tokens += running_tokens;
            }
        }
    }

    fn note_started(&mut self, step: &Step) {
        let age_steps = self.scheduler.config().age_steps;
        let runs = 1 + self.max_preemptions() as u64;
        for seq in &step.started {
            let tracked = self.tracked.get_mut(seq).expect("tracked");
            assert!(tracked.spec.deadline_ms.is_none_or(|deadline| deadline > self.now_ms), "begun after its deadline");
            assert_eq!(tracked.started_at_step.replace(step.id), None, "begun twice");
            let waited = step.id - tracked.added_at_step;
            let restoring = self.restoring_steps - tracked.added_at_restoring_step;
            let bound = 3 * age_steps + runs * tracked.bound_tokens + 2 + restoring;
            assert!(waited <= bound, "{seq:?} waited {waited} steps, the bound is {bound}");
        }
    }

    /// Takes an event and compares it with what the prompt implies.
    pub fn hear(&mut self, event: SequenceEvent) {
        match event {
            SequenceEvent::Token { seq, token_id, logprobs } => {
                let tracked = self.live(seq);
                let index = tracked.received.len();
                assert_eq!(Some(&token_id), tracked.answer.get(index), "{seq:?} gets a wrong token at {index}");
                assert_eq!(logprobs.map(|logprobs| logprobs.top.len()), tracked.spec.logprobs);
                tracked.received.push(token_id);
            }
            SequenceEvent::PromptLogprobs { seq, logprobs } => {
                let tracked = self.live(seq);
                for logprob in logprobs {
                    let (before, target) = (&tracked.spec.prompt[..=tracked.num_scored], tracked.num_scored + 1);
                    let digest = digest_of(&tracked.spec.namespace, before);
                    assert_eq!(logprob.chosen.token_id, tracked.spec.prompt[target]);
                    assert_eq!(logprob.chosen.logprob, digest.logprob(logprob.chosen.token_id));
                    tracked.num_scored += 1;
                }
            }
            SequenceEvent::Finished { seq, reason, usage } => {
                let tracked = self.end(seq, Ok(reason), usage);
                if tracked.received.len() == tracked.answer.len() && tracked.ending.is_some() {
                    assert_eq!(Some(reason), tracked.ending);
                } else {
                    assert_eq!(tracked.stop_string_after, Some(tracked.received.len()), "{seq:?} ended early");
                    assert_eq!(reason, FinishReason::Stop);
                }
                if tracked.spec.prompt_logprobs.is_some() {
                    assert_eq!(tracked.num_scored, tracked.spec.prompt.len() - 1);
                }
            }
            SequenceEvent::Encoded { seq, values, usage } => {
                let tracked = self.encodings.get_mut(&seq).expect("tracked");
                let digest = digest_of(&NamespaceKey::default(), &tracked.spec.tokens);
                assert_eq!(values, [digest.logprob(0), digest.logprob(1)], "{seq:?} gets another's vector");
                assert_eq!(usage.prompt_tokens, tracked.spec.tokens.len());
                assert_eq!(tracked.end.replace(Ok(())), None, "{seq:?} ends twice");
            }
            SequenceEvent::Failed { seq, error, .. } if self.encodings.contains_key(&seq) => {
                let tracked = self.encodings.get_mut(&seq).expect("tracked");
                let is_late = tracked.spec.deadline_ms.is_some_and(|deadline| deadline <= self.now_ms);
                assert!(error == Error::Cancelled || is_late, "{seq:?} failed: {error}");
                assert_eq!(tracked.end.replace(Err(error)), None, "{seq:?} ends twice");
            }
            SequenceEvent::Failed { seq, error, usage } => {
                let now_ms = self.now_ms;
                let tracked = self.end(seq, Err(error.clone()), usage);
                match error {
                    Error::NonFiniteLogits { position } => {
                        assert_eq!((tracked.ending, &tracked.received), (None, &tracked.answer));
                        assert_eq!(position, tracked.spec.prompt.len() + tracked.answer.len());
                    }
                    Error::DeadlineExceeded { timeout_ms } => {
                        assert!(tracked.spec.deadline_ms.is_some_and(|deadline| deadline <= now_ms));
                        assert_eq!(timeout_ms, tracked.spec.timeout_ms);
                    }
                    Error::Cancelled => {}
                    other => panic!("{seq:?} failed: {other}"),
                }
            }
        }
    }

    fn live(&mut self, seq: SeqId) -> &mut Tracked {
        let tracked = self.tracked.get_mut(&seq).expect("tracked");
        assert!(tracked.end.is_none(), "an event of {seq:?} after its end");
        tracked
    }

    fn end(&mut self, seq: SeqId, end: std::result::Result<FinishReason, Error>, usage: Usage) -> &Tracked {
        let tracked = self.live(seq);
        let counted = (usage.prompt_tokens, usage.completion_tokens);
        assert_eq!(counted, (tracked.spec.prompt.len(), tracked.received.len()));
        let automatic = usage.preemptions - tracked.forced_preemptions;
        assert!(automatic <= MAX_PREEMPTIONS as usize, "{seq:?} was preempted {automatic} times");
        tracked.end = Some(end);
        tracked.usage = usage;
        tracked
    }
}

/// Every token of the answer and its end, from the specification alone.
fn expected_answer(spec: &SequenceSpec, non_finite_after: Option<usize>) -> (Vec<u32>, Option<FinishReason>) {
    let mut digest = digest_of(&spec.namespace, &spec.prompt);
    let mut answer = Vec::new();
    while answer.len() < spec.max_new_tokens {
        if non_finite_after == Some(answer.len()) {
            return (answer, None);
        }
        let token = digest.next_token(spec.sampling.seed);
        answer.push(token);
        digest = digest.push(token);
        if spec.stop_token_ids.contains(&token) {
            return (answer, Some(FinishReason::Stop));
        }
    }
    (answer, Some(FinishReason::Length))
}

fn digest_of(namespace: &NamespaceKey, tokens: &[u32]) -> Digest {
    tokens.iter().fold(Digest::new(namespace), |digest, &token| digest.push(token))
}

/// A namespace for tests.
pub fn namespace(name: u8) -> NamespaceKey {
    [name; 32]
}
