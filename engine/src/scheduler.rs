//! The continuous-batching scheduler (Yu et al. 2022, "Orca"; chunked prefill as in Agrawal et al. 2024,
//! arXiv:2403.02310): decides who computes how many tokens in each step, and turns the results into events.
//! A sequence simply has computed tokens that must catch up with its tokens; prefill and decode are one loop.
//!
//! A pure state machine: no thread, clock, channel, tensor, log or random number. Time is an argument, milliseconds
//! on any clock that does not run backwards. The caller's loop:
//!
//! ```text
//! events of expire(now);  step = schedule(now);  launch(batch(&step));  ..  events of apply(step, collected, now)
//! ```
//!
//! With `max_in_flight` 2 the next step may be scheduled and launched before the last one is applied. Its tokens that
//! are not known yet come from the last step's outputs ([`Feedback`](crate::batch::Feedback)); a stop is then seen
//! one step late, and the surplus token is dropped.
//!
//! **Settling.** Each added sequence has exactly one final event, [`SequenceEvent::Finished`] or
//! [`SequenceEvent::Failed`]: from [`Scheduler::apply`], [`Scheduler::expire`] or [`Scheduler::fail_step`], or as the
//! `Some` of [`Scheduler::finish`] or [`Scheduler::cancel`]. After it nothing more is said of the sequence. Sequences that
//! are encoded to vectors ([`Scheduler::add_encodings`]) end in [`Scheduler::apply_encoding`], or in the same other ways.
//!
//! **Order of admission.** Classes High, Normal, Background; first come, first served inside a class; a class rises by
//! one rank for every `age_steps` steps that its longest-waiting sequence has waited. A sequence that lacks blocks or a
//! seat is not overtaken. One whose next prefix block is just being computed by another waits for it and lets others
//! pass meanwhile, for at most `3 * age_steps` steps.
//!
//! **No starvation.** A sequence H that is never preempted by hand is first computed at most
//! `3 * age_steps + (1 + MAX_PREEMPTIONS) * sum of max_kv_tokens + 2` steps after it was added, where the sum runs over
//! the live sequences that were added before H and those that run `3 * age_steps` steps after. Why: after
//! `2 * age_steps` steps H's class has rank 0, so only older ones go before it; after `3 * age_steps` it waits for no
//! prefix; from then on nobody else is admitted before H; every step computes at least one token of one of them, and
//! each computes no token more than `1 + MAX_PREEMPTIONS` times.
//!
//! **Progress.** In each step every decoding sequence gets its token (unless the pool is dry or its penalties wait for
//! the token before), and the prompt that has run longest gets at least a few tokens.

mod apply;
mod budget;
mod encode;
mod preempt;
mod schedule;
mod waiting;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use crate::batch::Batch;
use crate::config;
use crate::error::{Error, Result};
use crate::ids::{BlockId, SeqId};
use crate::kv_cache::tiers::Tiers;
use crate::kv_cache::{BlockCounts, BlockTransfer, KeptBlock, KvCache, violated};
use crate::request::{CachedTokens, FinishReason, TokenLogprobs, Usage};
use crate::sequence::{Chunk, Sequence, SequenceSpec};
use encode::EncodeQueue;
pub use encode::EncodeStep;
pub use preempt::MAX_PREEMPTIONS;
use waiting::{Waiting, WaitingQueue};

/// Limits of a scheduler; fixed for its life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SchedulerConfig {
    /// Longest sequence, prompt and answer.
    pub context_tokens: usize,
    /// Longest sequence that is encoded to a vector.
    pub max_encode_tokens: usize,
    /// Sequences that may run at once.
    pub max_running_sequences: usize,
    /// Tokens of a step while no sequence decodes.
    pub prefill_budget_tokens: usize,
    /// Tokens of a step while some sequence decodes.
    pub mixed_budget_tokens: usize,
    /// Requests that may wait.
    pub max_waiting_requests: usize,
    /// Prompt tokens that may wait, beyond the first request.
    pub max_waiting_tokens: usize,
    /// Steps that may be launched and not applied: 1, or 2 with the host one step behind.
    pub max_in_flight: usize,
    /// Steps of waiting that lift a class by one rank.
    pub age_steps: u64,
}

impl SchedulerConfig {
    /// The defaults, for sequences of at most `context_tokens`.
    pub fn new(context_tokens: usize) -> Self {
        SchedulerConfig {
            context_tokens,
            max_encode_tokens: context_tokens.min(config::MAX_DECODER_EMBEDDING_TOKENS),
            max_running_sequences: config::DEFAULT_MAX_RUNNING_SEQUENCES,
            prefill_budget_tokens: config::DEFAULT_PREFILL_BUDGET_TOKENS,
            mixed_budget_tokens: config::DEFAULT_MIXED_BUDGET_TOKENS,
            max_waiting_requests: config::DEFAULT_MAX_WAITING_REQUESTS,
            max_waiting_tokens: config::MAX_WAITING_TOKENS,
            max_in_flight: 1,
            age_steps: config::AGE_STEPS,
        }
    }

    /// Most rows that a step can have.
    pub fn max_step_tokens(&self) -> usize {
        let prompts = self.prefill_budget_tokens.max(self.mixed_budget_tokens).max(budget::MIN_PREFILL_TOKENS);
        self.max_running_sequences + prompts
    }
}

/// A scheduled step. Its batch is built before anything else happens to the scheduler; then it is launched, and
/// applied in the order of scheduling.
#[derive(Debug, PartialEq, Eq)]
pub struct Step {
    /// Counts the steps of this scheduler from 0.
    pub id: u64,
    /// Rows to compute.
    pub num_tokens: usize,
    /// Sequences that are computed for the first time.
    pub started: Vec<SeqId>,
}

/// Something new about a sequence. Its last event is `Finished`, `Encoded` or `Failed`.
#[derive(Debug, Clone, PartialEq)]
pub enum SequenceEvent {
    /// A new token.
    Token {
        /// Whose it is.
        seq: SeqId,
        /// The token.
        token_id: u32,
        /// When asked for.
        logprobs: Option<TokenLogprobs>,
    },
    /// Logprobs of the next prompt tokens, in order, from the second token of the prompt on.
    PromptLogprobs {
        /// Whose they are.
        seq: SeqId,
        /// One per token.
        logprobs: Vec<TokenLogprobs>,
    },
    /// It has become a vector; its last event.
    Encoded {
        /// Which one.
        seq: SeqId,
        /// The vector.
        values: Vec<f32>,
        /// Its token counts.
        usage: Usage,
    },
    /// It has ended.
    Finished {
        /// Which one.
        seq: SeqId,
        /// Why.
        reason: FinishReason,
        /// Its token counts.
        usage: Usage,
    },
    /// It has ended in an error.
    Failed {
        /// Which one.
        seq: SeqId,
        /// What happened.
        error: Error,
        /// Its token counts.
        usage: Usage,
    },
}

impl SequenceEvent {
    /// Whose event it is.
    pub fn seq(&self) -> SeqId {
        match *self {
            SequenceEvent::Token { seq, .. }
            | SequenceEvent::PromptLogprobs { seq, .. }
            | SequenceEvent::Encoded { seq, .. }
            | SequenceEvent::Finished { seq, .. }
            | SequenceEvent::Failed { seq, .. } => seq,
        }
    }
}

/// What was done so far. Counters only grow, and count sequences unless they say otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// Requests accepted.
    pub requests: u64,
    /// Accepted; always the sum of finished, cancelled, failed and live ones.
    pub accepted: u64,
    /// Ended by themselves or by [`Scheduler::finish`].
    pub finished: u64,
    /// Ended by [`Scheduler::cancel`].
    pub cancelled: u64,
    /// Ended in an error.
    pub failed: u64,
    /// Steps scheduled.
    pub steps: u64,
    /// Prompt tokens of accepted sequences.
    pub prompt_tokens: u64,
    /// Prompt tokens of the sequences that looked into the prefix cache when they were first admitted.
    pub prefix_query_tokens: u64,
    /// Those of them that were found.
    pub prefix_hit_tokens: u64,
    /// The same by the place where they were.
    pub prefix_hits_by_tier: CachedTokens,
    /// Tokens that preempted sequences found in the cache when they came back.
    pub resume_hit_tokens: u64,
    /// Tokens of either kind that came from the tiers.
    pub restored_tokens: u64,
    /// Tokens computed.
    pub computed_tokens: u64,
    /// Those of them that the same sequence had computed before it was preempted.
    pub recomputed_tokens: u64,
    /// New tokens.
    pub generated_tokens: u64,
    /// Tokens of sequences that were encoded to vectors.
    pub encoded_tokens: u64,
    /// Steps that encoded.
    pub encode_steps: u64,
    /// Tokens that were chosen for sequences that had ended, and were dropped.
    pub surplus_tokens: u64,
    /// Times that a sequence lost its blocks, by hand too.
    pub preemptions: u64,
    /// Those of them that made room for a better class.
    pub class_preemptions: u64,
    /// Cached blocks that were given away.
    pub evictions: u64,
    /// Waited for a prefix block that another sequence was computing.
    pub prefix_waits: u64,
    /// Admitted before a better class because their class had waited long.
    pub promoted_by_age: u64,
    /// Ended because their deadline passed.
    pub expired: u64,
    /// Requests that were refused because the queue was full.
    pub overloaded_requests: u64,
}

/// What there is now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Sequences that wait.
    pub waiting: usize,
    /// Sequences that run.
    pub running: usize,
    /// Steps that are launched and not applied.
    pub in_flight: usize,
    /// Blocks of the pool.
    pub blocks: BlockCounts,
}

/// A scheduled step that is not applied.
#[derive(Debug)]
struct InFlight {
    id: u64,
    chunks: Vec<Chunk>,
    /// Blocks its rows are written to, once per chunk.
    written: Vec<BlockId>,
}

/// The scheduler of one model: its sequences, and the blocks that they hold.
#[derive(Debug)]
pub struct Scheduler {
    config: SchedulerConfig,
    kv: KvCache,
    /// All live sequences: each waits or runs.
    sequences: BTreeMap<SeqId, Sequence>,
    waiting: WaitingQueue,
    /// Live too, of the other kind of work.
    encodings: EncodeQueue,
    /// In the order of admission.
    running: Vec<SeqId>,
    deadlines: BTreeSet<(u64, SeqId)>,
    in_flight: VecDeque<InFlight>,
    next_id: u64,
    counters: Counters,
}

impl Scheduler {
    /// A scheduler over an empty pool.
    pub fn new(config: SchedulerConfig, kv: KvCache) -> Self {
        assert!((1..=2).contains(&config.max_in_flight), "one or two steps in flight");
        assert!(config.max_running_sequences > 0 && config.age_steps > 0 && config.context_tokens > 0);
        Scheduler {
            config,
            kv,
            sequences: BTreeMap::new(),
            waiting: WaitingQueue::default(),
            encodings: EncodeQueue::default(),
            running: Vec::new(),
            deadlines: BTreeSet::new(),
            in_flight: VecDeque::new(),
            next_id: 0,
            counters: Counters::default(),
        }
    }

    /// Accepts the choices of one request, all or none, and queues them. `max_new_tokens` is cut to what the context
    /// leaves. Refuses what could not run on an empty pool, what exceeds the context, and what the queue has no room
    /// for.
    pub fn add(&mut self, specs: Vec<SequenceSpec>, now_ms: u64) -> Result<Vec<SeqId>> {
        let specs = specs.into_iter().map(|spec| self.checked(spec, now_ms)).collect::<Result<Vec<_>>>()?;
        let new_tokens: usize = specs.iter().map(|spec| spec.prompt.len()).sum();
        self.check_queue(new_tokens).inspect_err(|_| self.counters.overloaded_requests += 1)?;
        let request = SeqId(self.next_id);
        self.counters.requests += 1;
        Ok(specs.into_iter().map(|spec| self.enqueue_new(request, spec)).collect())
    }

    fn checked(&self, mut spec: SequenceSpec, now_ms: u64) -> Result<SequenceSpec> {
        let context_tokens = self.config.context_tokens;
        let prompt_tokens = spec.prompt.len();
        if prompt_tokens == 0 {
            let expected = "at least one token".to_string();
            return Err(Error::InvalidArgument { field: "prompt", value: "empty".to_string(), expected });
        }
        let limit_tokens = context_tokens - usize::from(spec.max_new_tokens > 0);
        if prompt_tokens > limit_tokens {
            return Err(Error::PromptTooLong { prompt_tokens, limit_tokens, context_tokens });
        }
        spec.max_new_tokens = spec.max_new_tokens.min(context_tokens - prompt_tokens);
        let (needed_blocks, pool_blocks) = (self.kv.blocks_for(spec.max_kv_tokens()), self.kv.num_blocks());
        if needed_blocks > pool_blocks {
            return Err(Error::ExceedsKvPool { needed_blocks, pool_blocks });
        }
        if spec.deadline_ms.is_some_and(|deadline| deadline <= now_ms) {
            return Err(Error::DeadlineExceeded { timeout_ms: spec.timeout_ms });
        }
        Ok(spec)
    }

    fn check_queue(&self, new_tokens: usize) -> Result<()> {
        let waiting = self.waiting.num_requests() + self.encodings.waiting.num_requests();
        let limit = self.config.max_waiting_requests;
        if waiting >= limit {
            return Err(Error::Overloaded { queue: "waiting queue (requests)", waiting, limit });
        }
        let tokens = self.waiting.num_tokens() + self.encodings.waiting.num_tokens();
        let limit = self.config.max_waiting_tokens;
        if waiting > 0 && tokens + new_tokens > limit {
            return Err(Error::Overloaded { queue: "waiting queue (tokens)", waiting: tokens, limit });
        }
        Ok(())
    }

    fn enqueue_new(&mut self, request: SeqId, spec: SequenceSpec) -> SeqId {
        let id = SeqId(self.next_id);
        self.next_id += 1;
        self.counters.accepted += 1;
        self.counters.prompt_tokens += spec.prompt.len() as u64;
        if let Some(deadline_ms) = spec.deadline_ms {
            self.deadlines.insert((deadline_ms, id));
        }
        self.sequences.insert(id, Sequence::new(id, request, spec));
        self.enqueue(id);
        id
    }

    fn enqueue(&mut self, id: SeqId) {
        let seq = &self.sequences[&id];
        let (request, priority, prompt_tokens) = (seq.request, seq.spec.priority, seq.spec.prompt.len());
        self.waiting.insert(id, Waiting { request, priority, prompt_tokens, since_step: self.counters.steps });
    }

    /// The batch of the step that was scheduled last.
    pub fn batch(&self, step: &Step) -> Batch {
        let scheduled = self.in_flight.back().expect("a step was scheduled");
        assert_eq!(scheduled.id, step.id, "the batch is that of the newest step");
        let chunks = scheduled.chunks.iter().map(|chunk| (chunk, &self.sequences[&chunk.seq]));
        Batch::build(chunks, self.kv.block_tokens())
    }

    /// Ends a sequence that the caller found finished (a stop string). Its final event, or `None` when it was not live.
    pub fn finish(&mut self, seq: SeqId, reason: FinishReason) -> Option<SequenceEvent> {
        let usage = self.remove(seq)?;
        self.counters.finished += 1;
        Some(SequenceEvent::Finished { seq, reason, usage })
    }

    /// Ends a sequence in any state and frees its blocks at once (those that a launched step writes: when it is
    /// applied). Its final event, which is [`Error::Cancelled`], or `None` when it was not live: cancelling again, late or
    /// an unknown sequence has no effect.
    pub fn cancel(&mut self, seq: SeqId) -> Option<SequenceEvent> {
        let usage = self.remove(seq)?;
        self.counters.cancelled += 1;
        Some(SequenceEvent::Failed { seq, error: Error::Cancelled, usage })
    }

    /// Takes a running sequence's blocks and puts it back into the queue, to be computed again. Tokens of launched
    /// steps still count. False when it does not run.
    pub fn preempt(&mut self, seq: SeqId) -> bool {
        let Some(place) = self.running.iter().position(|&id| id == seq) else { return false };
        self.running.remove(place);
        let sequence = self.sequences.get_mut(&seq).expect("a running sequence is live");
        self.kv.release(sequence);
        sequence.num_preemptions += 1;
        sequence.reset_progress();
        self.counters.preemptions += 1;
        self.enqueue(seq);
        true
    }

    /// Ends every sequence whose deadline has passed. To be called before [`Scheduler::schedule`].
    pub fn expire(&mut self, now_ms: u64) -> Vec<SequenceEvent> {
        let mut events = Vec::new();
        while let Some(&(deadline_ms, seq)) = self.deadlines.first() {
            if deadline_ms > now_ms {
                break;
            }
            let timeout_ms = match self.encodings.timeout_ms(seq) {
                Some(timeout_ms) => timeout_ms,
                None => self.sequences[&seq].spec.timeout_ms,
            };
            self.counters.expired += 1;
            events.push(self.fail(seq, Error::DeadlineExceeded { timeout_ms }));
        }
        events
    }

    fn fail(&mut self, seq: SeqId, error: Error) -> SequenceEvent {
        let usage = self.remove(seq).expect("only live sequences fail");
        self.counters.failed += 1;
        SequenceEvent::Failed { seq, error, usage }
    }

    fn remove(&mut self, seq: SeqId) -> Option<Usage> {
        if let Some(spec) = self.encodings.remove(seq) {
            if let Some(deadline_ms) = spec.deadline_ms {
                self.deadlines.remove(&(deadline_ms, seq));
            }
            return Some(Usage { prompt_tokens: spec.tokens.len(), ..Usage::default() });
        }
        let mut sequence = self.sequences.remove(&seq)?;
        if self.waiting.remove(seq).is_none() {
            self.running.retain(|&id| id != seq);
        }
        if let Some(deadline_ms) = sequence.spec.deadline_ms {
            self.deadlines.remove(&(deadline_ms, seq));
        }
        self.kv.release(&mut sequence);
        Some(sequence.usage())
    }

    /// Whether any sequence is live or any step in flight.
    pub fn has_work(&self) -> bool {
        !self.sequences.is_empty() || !self.in_flight.is_empty() || self.encodings.len() > 0
    }
    /// Whether whole sequences wait to be encoded.
    pub fn has_encodings(&self) -> bool {
        self.encodings.len() > 0
    }
    /// The earliest deadline of a live sequence.
    pub fn next_deadline(&self) -> Option<u64> {
        self.deadlines.first().map(|&(deadline_ms, _)| deadline_ms)
    }
    /// A live sequence.
    pub fn sequence(&self, seq: SeqId) -> Option<&Sequence> {
        self.sequences.get(&seq)
    }
    /// Live sequences, oldest first.
    pub fn sequences(&self) -> impl Iterator<Item = &Sequence> {
        self.sequences.values()
    }
    /// Whether the sequence runs (it is neither waiting nor ended).
    pub fn is_running(&self, seq: SeqId) -> bool {
        self.running.contains(&seq)
    }
    /// What is to go from the pool to the tiers or back, in this order: before the next step is launched.
    pub fn take_transfers(&mut self) -> Vec<BlockTransfer> {
        self.kv.take_transfers()
    }
    /// Forgets what is cached for later ([`KvCache::clear`]).
    pub fn clear_prefix_cache(&mut self, now_us: u64) {
        self.kv.clear(now_us);
    }
    /// Gives a block to the tiers, once they have been asked ([`KvCache::would_keep`]).
    pub fn keep_block(&mut self, block: &KeptBlock, bytes: Arc<[u8]>, now_us: u64) {
        self.kv.keep(block, bytes, now_us);
    }
    /// The block is not given to them after all.
    pub fn pass_over_block(&mut self, block: &KeptBlock, now_us: u64) {
        self.kv.pass_over(block, now_us);
    }
    /// The tiers, if there are any.
    pub fn tiers(&mut self) -> Option<&mut Tiers> {
        self.kv.tiers()
    }
    /// The block manager.
    pub fn kv(&self) -> &KvCache {
        &self.kv
    }
    /// The limits.
    pub fn config(&self) -> &SchedulerConfig {
        &self.config
    }
    /// What was done so far.
    pub fn counters(&self) -> Counters {
        Counters { evictions: self.kv.num_evictions(), ..self.counters }
    }
    /// What there is now.
    pub fn counts(&self) -> Counts {
        Counts {
            waiting: self.waiting.len() + self.encodings.len(),
            running: self.running.len(),
            in_flight: self.in_flight.len(),
            blocks: self.kv.counts(),
        }
    }

    /// Checks every stated invariant of sequences, queue and blocks; [`Error::Internal`] names the first that is
    /// violated.
    pub fn check_invariants(&self) -> Result<()> {
        let c = &self.counters;
        let ended = c.finished + c.cancelled + c.failed;
        let live = self.sequences.len() + self.encodings.len();
        violated(c.accepted != ended + live as u64, || "sequences do not add up".to_string())?;
        violated(self.waiting.len() + self.running.len() != self.sequences.len(), || {
            "a sequence neither waits nor runs".to_string()
        })?;
        violated(self.encodings.waiting.len() != self.encodings.len(), || {
            "a sequence to be encoded does not wait".to_string()
        })?;
        violated(self.running.len() > self.config.max_running_sequences, || "too many run".to_string())?;
        for seq in self.sequences.values() {
            self.check_sequence(seq)?;
        }
        let pinned = self.in_flight.iter().flat_map(|step| step.written.iter().copied());
        self.kv.check_invariants(self.sequences.values(), pinned)
    }

    fn check_sequence(&self, seq: &Sequence) -> Result<()> {
        let say = |what: &'static str| move || format!("{:?}: {what}", seq.id);
        let waits = self.waiting.contains(seq.id);
        violated(waits == self.running.contains(&seq.id), say("it must either wait or run"))?;
        violated(waits && !(seq.blocks.is_empty() && seq.num_scheduled == 0), say("it waits and holds blocks"))?;
        violated(seq.restore.is_some() && (waits || seq.num_in_flight > 0), say("it computes what is on its way"))?;
        let known = seq.tokens.len() + seq.num_pending;
        violated(seq.num_computed > seq.num_scheduled || seq.num_scheduled > known, say("progress is out of order"))?;
        violated(self.kv.blocks_for(seq.num_scheduled) > seq.blocks.len(), say("its table does not cover its tokens"))?;
        violated(seq.num_new_tokens() > seq.spec.max_new_tokens, say("it has too many tokens"))?;
        let chunks = self.in_flight.iter().flat_map(|step| &step.chunks).filter(|chunk| chunk.seq == seq.id);
        let (num_chunks, num_samples) =
            chunks.fold((0, 0), |(chunks, samples), chunk| (chunks + 1, samples + usize::from(chunk.samples)));
        violated(num_chunks != seq.num_in_flight, say("its chunks in flight do not add up"))?;
        violated(num_samples != seq.num_pending, say("its pending tokens do not add up"))
    }
}
