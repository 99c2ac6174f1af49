//! The worker: the one thread that owns model, KV blocks and scheduler. Its loop: take commands, schedule a step, launch
//! it, collect its tokens, tell the readers. It sleeps when there is nothing to do.
//!
//! Invariants: every request that reaches it gets exactly one last event, also when a step fails or something panics;
//! cancelling and cleaning up never wait for a step to be scheduled; a reader can never hold it up.

mod answer;
mod tiering;
mod timeline;

use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crate::batch::{Batch, BatchSequence};
use crate::command::{Command, Prepared, PreparedInput, PreparedWork, RequestId, TierAnswer, VectorForm};
use crate::config::{CLOSE_WRITES_MS, MAX_BLOCKS_READ_TOGETHER, MIN_MEASURED_PREFILL_TOKENS};
use crate::error::{Error, Result, panic_text};
use crate::executor::Executor;
use crate::ids::{BlockId, SeqId};
use crate::instruments::Instruments;
use crate::kv_cache::{BlockTransfer, KeptBlock};
use crate::request::{CacheTier, FinishReason, Origin, Summary, Usage};
use crate::scheduler::{Scheduler, SequenceEvent, Step};
use crate::stats::{Histograms, KvTierStats, Stats};
use crate::storage::TierStats;
use crate::stream::{Delivery, EventSender};
use crate::text_model::TextModel;
use crate::tier_thread::TierThread;
use crate::tokenizer::{TextStart, TextStream};
use answer::{AfterToken, Answer};
use tiering::Tiering;
use timeline::PartOfStep;

/// Everything that the worker thread owns.
pub(crate) struct Worker<E: Executor> {
    executor: E,
    scheduler: Scheduler,
    text: Arc<TextModel>,
    commands: Receiver<Command>,
    /// Came while the tiers were heard; before all that is still in `commands`.
    set_aside: VecDeque<Command>,
    instruments: Arc<Instruments>,
    epoch: Instant,
    answers: HashMap<RequestId, Answer>,
    /// Whose sequence: request and choice.
    owners: HashMap<SeqId, (RequestId, usize)>,
    /// Launched and not yet collected, oldest first.
    in_flight: VecDeque<Launched>,
    tiering: Tiering,
    /// Sequences are live, and none of them can be computed before something arrives.
    is_waiting: bool,
    /// Why nothing can be computed any more.
    lost: Option<Error>,
    totals: Totals,
}

/// A step on its way, and when it began.
struct Launched {
    step: Step,
    start: Instant,
    /// What each sequence gets of it, when that is recorded.
    slices: Vec<PartOfStep>,
}

/// Counters of requests; those of tokens and blocks are the scheduler's.
#[derive(Default)]
struct Totals {
    admitted: u64,
    refused: u64,
    /// Admitted, and ended by themselves, by their readers, or in an error.
    finished: u64,
    cancelled: u64,
    failed: u64,
}

/// Whether the loop goes on.
#[derive(PartialEq)]
enum Turn {
    Continue,
    Close,
    /// The engine cannot go on.
    Fail(Error),
}

impl<E: Executor> Worker<E> {
    pub(crate) fn new(
        executor: E,
        scheduler: Scheduler,
        text: Arc<TextModel>,
        commands: Receiver<Command>,
        instruments: Arc<Instruments>,
        tier_threads: Vec<TierThread>,
        epoch: Instant,
    ) -> Self {
        let worker = Worker {
            executor,
            scheduler,
            text,
            commands,
            instruments,
            epoch,
            answers: HashMap::new(),
            owners: HashMap::new(),
            in_flight: VecDeque::new(),
            set_aside: VecDeque::new(),
            tiering: Tiering::new(tier_threads),
            is_waiting: false,
            lost: None,
            totals: Totals::default(),
        };
        worker.publish_stats();
        worker
    }

    /// Runs until it is told to close, or until a defect makes going on impossible. All requests are settled, and
    /// `ended` says why, when it returns.
    pub(crate) fn run(mut self, ended: &OnceLock<Error>) {
        let last = loop {
            // A panic is a defect of this library: it ends this engine, typed, and nothing else.
            match catch_unwind(AssertUnwindSafe(|| self.turn())) {
                Ok(Turn::Continue) => {}
                Ok(Turn::Close) => break Error::Closed,
                Ok(Turn::Fail(error)) => break error,
                Err(panic) => break Error::Internal { reason: panic_text(panic.as_ref()) },
            }
        };
        // First, so that whoever sees its stream end finds the engine closed and the request counted.
        let _ = ended.set(last.clone());
        self.totals.failed += self.answers.len() as u64;
        let idle = Stats { num_sequences_running: 0, num_sequences_waiting: 0, kv_blocks_used: 0, ..self.stats() };
        self.publish(idle);
        for (_, answer) in self.answers.drain() {
            answer.fail(last.clone());
        }
        let refuse = |command| match command {
            Command::Run(prepared) => prepared.sender.end(Err(last.clone())),
            Command::Flush(reply) | Command::Clear(reply) => drop(reply.send(Err(last.clone()))),
            _ => {}
        };
        self.set_aside.drain(..).for_each(refuse);
        let (scheduler, tiering) = (&mut self.scheduler, &mut self.tiering);
        // After a defect they may be in any state.
        let finish = || finish_writes(scheduler, tiering, &self.commands, self.epoch, refuse);
        let is_idle = catch_unwind(AssertUnwindSafe(finish)).unwrap_or(false);
        self.tiering.end(is_idle, &last);
        while let Ok(command) = self.commands.try_recv() {
            refuse(command);
        }
    }

    /// One turn of the loop.
    fn turn(&mut self) -> Turn {
        if self.take_commands() == Turn::Close {
            return Turn::Close;
        }
        let expired = self.scheduler.expire(self.now_ms());
        self.deliver(expired);
        self.is_waiting = false;
        while self.lost.is_none() && self.in_flight.len() < self.max_in_flight() {
            let step = self.scheduler.schedule(self.now_ms());
            // Also without a step: what was planned and taken back may have moved blocks.
            if let Err(error) = self.move_blocks() {
                return Turn::Fail(error);
            }
            let Some(step) = step else {
                self.is_waiting = self.in_flight.is_empty();
                break;
            };
            self.launch(step);
        }
        self.collect();
        self.encode();
        if let Some(error) = self.lost.take() {
            return Turn::Fail(error);
        }
        // What the tiers have written during the step makes room for what the step has computed.
        self.hear_tiers();
        if let Err(error) = self.move_blocks() {
            return Turn::Fail(error);
        }
        self.drive_tiers();
        self.publish_stats();
        Turn::Continue
    }

    /// Steps that may be launched and not collected now. A step of whole sequences comes when no other is in flight:
    /// while some wait, the host is not ahead.
    fn max_in_flight(&self) -> usize {
        if self.scheduler.has_encodings() { 1 } else { self.executor.max_in_flight() }
    }

    /// Carries out what the scheduler wants moved between the pool and the tiers.
    fn move_blocks(&mut self) -> Result<()> {
        let now_us = self.now_us();
        let mut leaving: Vec<(BlockId, KeptBlock)> = Vec::new();
        for transfer in self.scheduler.take_transfers() {
            match transfer {
                BlockTransfer::Keep { block, kept } => {
                    if self.scheduler.kv().would_keep(&kept, now_us) {
                        leaving.push((block, kept));
                    } else {
                        self.scheduler.pass_over_block(&kept, now_us);
                    }
                    if leaving.len() == MAX_BLOCKS_READ_TOGETHER {
                        self.keep_blocks(&mut leaving, now_us)?;
                    }
                }
                BlockTransfer::Restore { block, bytes } => {
                    // In their order: it may be one of those.
                    self.keep_blocks(&mut leaving, now_us)?;
                    // It is shared already: if it cannot be written, nothing that follows is right.
                    self.executor.write_block(block, &bytes)?;
                }
            }
        }
        self.keep_blocks(&mut leaving, now_us)
    }

    /// Reads blocks together and gives them to the tiers.
    fn keep_blocks(&mut self, leaving: &mut Vec<(BlockId, KeptBlock)>, now_us: u64) -> Result<()> {
        if leaving.is_empty() {
            return Ok(());
        }
        let blocks: Vec<BlockId> = leaving.iter().map(|(block, _)| *block).collect();
        match self.executor.read_blocks(&blocks) {
            Ok(read) => {
                for ((_, kept), bytes) in leaving.drain(..).zip(read) {
                    self.scheduler.keep_block(&kept, bytes, now_us);
                }
            }
            // Every later call would fail as this one, after as long a wait.
            Err(error @ Error::DeviceLost { .. }) => return Err(error),
            // A cache may forget, what cannot be read as well, as long as it says so.
            Err(_) => {
                for (_, kept) in leaving.drain(..) {
                    self.scheduler.pass_over_block(&kept, now_us);
                }
            }
        }
        Ok(())
    }

    fn drive_tiers(&mut self) {
        let now_us = self.now_us();
        if let Some(tiers) = self.scheduler.tiers() {
            self.tiering.drive(tiers, now_us);
        }
    }

    fn launch(&mut self, step: Step) {
        self.mark_started(step.started.iter().copied());
        let batch = self.scheduler.batch(&step);
        let slices = if self.instruments.tracer.is_on() { self.parts_of(&batch) } else { Vec::new() };
        let start = Instant::now();
        // Behind another one it begins when that one ends.
        if self.in_flight.is_empty() {
            self.instruments.pace.begin(step.num_tokens, start);
        }
        match self.executor.launch(&batch) {
            Ok(()) => self.in_flight.push_back(Launched { step, start, slices }),
            Err(error) => {
                // Steps are applied in order: those before the failed one first. Only its own sequences end.
                while !self.in_flight.is_empty() {
                    self.collect();
                }
                self.instruments.pace.end(start, false);
                let events = self.failed(step, &error);
                self.deliver(events);
            }
        }
    }

    /// Who gets how much of a step, for the time line.
    fn parts_of(&self, batch: &Batch) -> Vec<PartOfStep> {
        let part = |sequence: &BatchSequence| {
            let &(request, choice) = self.owners.get(&sequence.seq)?;
            let answer = self.answers.get(&request)?;
            if let Some(label) = answer.label() {
                self.instruments.tracer.label(request.0, label);
            }
            let num_tokens = sequence.rows.len();
            let is_decode = sequence.context_tokens - num_tokens >= answer.prompt_tokens();
            Some(PartOfStep { request, choice, num_tokens, context_tokens: sequence.context_tokens, is_decode })
        };
        batch.sequences.iter().filter_map(part).collect()
    }

    /// The sequences of a step that failed end. Where the device is gone, they end with all others, once the engine says
    /// why: whoever sees the end of a stream finds it closed.
    fn failed(&mut self, step: Step, error: &Error) -> Vec<SequenceEvent> {
        self.note_lost(error);
        if self.lost.is_some() { Vec::new() } else { self.scheduler.fail_step(step, error) }
    }

    fn note_lost(&mut self, error: &Error) {
        if matches!(error, Error::DeviceLost { .. }) {
            self.lost.get_or_insert_with(|| error.clone());
        }
    }

    /// The first step that computes some of these sequences begins.
    fn mark_started(&mut self, seqs: impl Iterator<Item = SeqId>) {
        let now = Instant::now();
        for seq in seqs {
            if let Some(answer) = self.owners.get(&seq).and_then(|(id, _)| self.answers.get_mut(id)) {
                answer.start(now);
            }
        }
    }

    /// Applies the oldest step in flight, if there is one.
    fn collect(&mut self) {
        let Some(Launched { step, start, slices }) = self.in_flight.pop_front() else { return };
        let collected = self.executor.collect();
        let end = Instant::now();
        self.note_end_of_step(collected.is_ok(), end);
        let events = match collected {
            Ok(sampled) => {
                self.instruments.meters.step(step.num_tokens, end.saturating_duration_since(start));
                if !slices.is_empty() {
                    timeline::step(&self.instruments.tracer, &slices, step.id, start, end);
                }
                self.note_prefill(step.num_tokens, start);
                self.scheduler.apply(step, &sampled, self.now_ms())
            }
            Err(error) => self.failed(step, &error),
        };
        self.deliver(events);
    }

    /// The oldest step has ended, or has failed: the next one in flight, if there is one, now has the device.
    fn note_end_of_step(&self, is_whole: bool, end: Instant) {
        let pace = &self.instruments.pace;
        pace.end(end, is_whole);
        if let Some(next) = self.in_flight.front() {
            pace.begin(next.step.num_tokens, end);
        }
    }

    /// How fast tokens are computed decides whether fetching them is worth it.
    fn note_prefill(&mut self, num_tokens: usize, start: Instant) {
        let now_us = self.now_us();
        if let Some(tiers) = self.scheduler.tiers()
            && num_tokens >= MIN_MEASURED_PREFILL_TOKENS
        {
            tiers.note_prefill(num_tokens as u64, start.elapsed().as_micros() as u64, now_us);
        }
    }

    /// One step of whole sequences, if any wait and no other step is in flight.
    fn encode(&mut self) {
        if !self.in_flight.is_empty() || self.lost.is_some() {
            return;
        }
        let Some(step) = self.scheduler.schedule_encoding(self.now_ms()) else { return };
        self.is_waiting = false;
        self.mark_started(step.sequences());
        let batch = step.batch(self.executor.encode_block_tokens());
        let slices = if self.instruments.tracer.is_on() { self.parts_of(&batch) } else { Vec::new() };
        let start = Instant::now();
        self.instruments.pace.begin(batch.token_ids.len(), start);
        let vectors = self.executor.encode(&batch);
        let end = Instant::now();
        self.instruments.pace.end(end, vectors.is_ok());
        self.instruments.meters.step(batch.token_ids.len(), end.saturating_duration_since(start));
        if let Err(error) = &vectors {
            self.note_lost(error);
        }
        if !slices.is_empty() {
            timeline::encoding(&self.instruments.tracer, &slices, start, end);
        }
        if self.lost.is_none() {
            let events = self.scheduler.apply_encoding(step, vectors);
            self.deliver(events);
        }
    }

    /// Takes what is there; sleeps for the next command when there is nothing else to do.
    fn take_commands(&mut self) -> Turn {
        let is_idle = self.in_flight.is_empty() && (self.is_waiting || !self.scheduler.has_work());
        if is_idle && self.set_aside.is_empty() {
            self.publish_stats();
            let longest_sleep = self.longest_sleep();
            match self.commands.recv_timeout(longest_sleep) {
                Ok(command) => {
                    if self.take(command) == Turn::Close {
                        return Turn::Close;
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Turn::Close,
            }
        }
        while let Some(command) = self.set_aside.pop_front() {
            if self.take(command) == Turn::Close {
                return Turn::Close;
            }
        }
        loop {
            match self.commands.try_recv() {
                Ok(command) => {
                    if self.take(command) == Turn::Close {
                        return Turn::Close;
                    }
                }
                Err(TryRecvError::Empty) => return Turn::Continue,
                Err(TryRecvError::Disconnected) => return Turn::Close,
            }
        }
    }

    /// Takes what the tiers' threads have said, before what was said to this one: that waits for the next turn.
    fn hear_tiers(&mut self) {
        if self.scheduler.tiers().is_none() {
            return;
        }
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::Tier(answer) => {
                    // It may be what a sequence waits for.
                    self.is_waiting = false;
                    self.hear(answer);
                }
                command => self.set_aside.push_back(command),
            }
        }
    }

    fn hear(&mut self, answer: TierAnswer) {
        if self.instruments.tracer.is_on() {
            timeline::tier(&self.instruments.tracer, &answer);
        }
        if let TierAnswer::Flushed { .. } = answer {
            // Before the reply: whoever has it finds counted what was stored.
            self.publish_stats();
        }
        let now_us = self.now_us();
        if let Some(tiers) = self.scheduler.tiers() {
            self.tiering.answer(tiers, answer, now_us);
        }
        self.drive_tiers();
    }

    /// Until the next moment at which something happens by itself.
    fn longest_sleep(&mut self) -> Duration {
        if !self.scheduler.has_work() {
            return Duration::from_secs(3_600);
        }
        let deadline_us = self.scheduler.next_deadline().map(|deadline_ms| deadline_ms.saturating_mul(1_000));
        let restore_us = self.scheduler.tiers().and_then(|tiers| tiers.next_deadline_us());
        let next_us = [deadline_us, restore_us].into_iter().flatten().min();
        // The scheduler's clock counts whole milliseconds.
        next_us.map_or(Duration::from_secs(1), |us| Duration::from_micros(us.saturating_sub(self.now_us()) + 1_000))
    }

    fn take(&mut self, command: Command) -> Turn {
        match command {
            Command::Run(prepared) => self.admit(*prepared),
            Command::Refused => self.totals.refused += 1,
            Command::Cancel(id) => self.cancel(id),
            Command::Tier(answer) => self.hear(answer),
            Command::Flush(reply) => {
                self.tiering.flush(self.scheduler.tiers(), reply);
                self.drive_tiers();
            }
            Command::Clear(reply) => {
                let now_us = self.now_us();
                self.scheduler.clear_prefix_cache(now_us);
                self.publish_stats();
                self.tiering.clear(reply);
                self.tiering.settle_clears(self.scheduler.tiers().map(|tiers| &*tiers));
                self.drive_tiers();
            }
            Command::Close => return Turn::Close,
        }
        Turn::Continue
    }

    fn admit(&mut self, prepared: Prepared) {
        // The slot is given back when the request waits in the scheduler, or is refused.
        let Prepared { id, work, sender, origin, slot: _slot } = prepared;
        if sender.is_cancelled() {
            self.totals.refused += 1;
            sender.end(Err(Error::Cancelled));
            return;
        }
        match work {
            PreparedWork::Generate { specs, stop, seed, recorder } => {
                let usage = Usage { prompt_tokens: specs[0].prompt.len(), ..Usage::default() };
                let stop_token_ids = specs[0].stop_token_ids.clone();
                let Some((sender, seqs)) = self.accept(sender, |scheduler, now_ms| scheduler.add(specs, now_ms)) else {
                    return;
                };
                let summary = Summary { usage, seed, ..Summary::default() };
                let answer = Answer::new(sender, origin, id, summary, self.instruments.clone());
                let mut answer = answer.stopped_by(stop_token_ids).recorded_by(recorder);
                for (choice, seq) in seqs.into_iter().enumerate() {
                    self.owners.insert(seq, (id, choice));
                    let text = TextStream::new(&self.text.tokenizer, TextStart::Continuation, stop.clone());
                    answer.add_choice(seq, text);
                }
                self.answers.insert(id, answer);
            }
            PreparedWork::Embed(inputs, form) => self.admit_embedding(id, inputs, form, sender, origin),
        }
    }

    fn admit_embedding(
        &mut self,
        id: RequestId,
        inputs: Vec<PreparedInput>,
        form: VectorForm,
        sender: EventSender,
        origin: Origin,
    ) {
        let truncated: Vec<bool> = inputs.iter().map(|input| input.truncated).collect();
        let specs = inputs.into_iter().map(|input| input.spec).collect();
        let accepted = self.accept(sender, |scheduler, now_ms| scheduler.add_encodings(specs, now_ms));
        let Some((sender, seqs)) = accepted else { return };
        let mut answer = Answer::new(sender, origin, id, Summary::default(), self.instruments.clone());
        for (input, (seq, truncated)) in seqs.into_iter().zip(truncated).enumerate() {
            self.owners.insert(seq, (id, input));
            answer.add_input(seq, form, truncated);
        }
        self.answers.insert(id, answer);
    }

    /// Gives a request's sequences to the scheduler; a refusal is the request's end.
    fn accept(
        &mut self,
        sender: EventSender,
        add: impl FnOnce(&mut Scheduler, u64) -> Result<Vec<SeqId>>,
    ) -> Option<(EventSender, Vec<SeqId>)> {
        let now_ms = self.now_ms();
        match add(&mut self.scheduler, now_ms) {
            Ok(seqs) => {
                self.totals.admitted += 1;
                sender.admit();
                Some((sender, seqs))
            }
            Err(error) => {
                self.totals.refused += 1;
                sender.end(Err(error));
                None
            }
        }
    }

    fn cancel(&mut self, id: RequestId) {
        if let Some(answer) = self.remove(id) {
            self.totals.cancelled += 1;
            self.publish_stats();
            answer.fail(Error::Cancelled);
        }
    }

    /// Forgets a request; its sequences end and their blocks are free.
    fn remove(&mut self, id: RequestId) -> Option<Answer> {
        let answer = self.answers.remove(&id)?;
        for seq in answer.sequences() {
            self.owners.remove(&seq);
            self.scheduler.cancel(seq);
        }
        Some(answer)
    }

    /// Tells the readers. What an event says is in the statistics before its reader hears of it.
    fn deliver(&mut self, events: Vec<SequenceEvent>) {
        if events.is_empty() {
            return;
        }
        self.publish_stats();
        let _delivery = Delivery::start();
        for event in events {
            // A sequence without an owner belongs to a request that was cancelled: what comes late is dropped.
            let Some(&(id, choice)) = self.owners.get(&event.seq()) else { continue };
            match event {
                SequenceEvent::Token { seq, token_id, logprobs, .. } => {
                    let Some(answer) = self.answers.get_mut(&id) else { continue };
                    if answer.push_token(&self.text.tokenizer, choice, token_id, logprobs, Instant::now())
                        == AfterToken::StopFound
                    {
                        let ended = self.scheduler.finish(seq, FinishReason::Stop);
                        self.deliver(ended.into_iter().collect());
                    }
                }
                SequenceEvent::PromptLogprobs { logprobs, .. } => {
                    if let Some(answer) = self.answers.get_mut(&id) {
                        answer.push_prompt_logprobs(logprobs);
                    }
                }
                SequenceEvent::Encoded { seq, values, usage } => {
                    self.owners.remove(&seq);
                    if let Some(answer) = self.answers.get_mut(&id) {
                        answer.push_vector(choice, values, usage);
                    }
                    self.settle(id);
                }
                SequenceEvent::Finished { seq, reason, usage } => self.finish(id, choice, seq, reason, usage),
                SequenceEvent::Failed { error, .. } => {
                    if let Some(answer) = self.remove(id) {
                        self.totals.failed += 1;
                        self.publish_stats();
                        answer.fail(error);
                    }
                }
            }
        }
    }

    fn finish(&mut self, id: RequestId, choice: usize, seq: SeqId, reason: FinishReason, usage: Usage) {
        self.owners.remove(&seq);
        let Some(answer) = self.answers.get_mut(&id) else { return };
        answer.finish_choice(choice, reason, usage);
        self.settle(id);
    }

    /// Ends a request whose last part has ended.
    fn settle(&mut self, id: RequestId) {
        if self.answers.get(&id).is_some_and(Answer::is_finished) {
            self.totals.finished += 1;
            // Before the last event: whoever has seen it finds it counted.
            self.publish_stats();
            if let Some(answer) = self.answers.remove(&id) {
                answer.end(Instant::now());
            }
        }
    }

    fn now_ms(&self) -> u64 {
        self.epoch.elapsed().as_millis() as u64
    }
    fn now_us(&self) -> u64 {
        self.epoch.elapsed().as_micros() as u64
    }

    fn publish_stats(&self) {
        self.publish(self.stats());
    }

    fn publish(&self, stats: Stats) {
        self.instruments.publish(stats);
    }

    fn stats(&self) -> Stats {
        let (counters, counts) = (self.scheduler.counters(), self.scheduler.counts());
        let blocks = counts.blocks;
        Stats {
            num_sequences_running: counts.running,
            num_sequences_waiting: counts.waiting,
            // Counted where they are taken.
            num_requests_preparing: 0,
            kv_blocks_total: self.scheduler.kv().num_blocks(),
            kv_blocks_used: blocks.owned + blocks.pinned,
            kv_blocks_cached: blocks.cached,
            kv_blocks_free: blocks.free,
            requests_total: self.totals.admitted,
            requests_finished: self.totals.finished,
            requests_cancelled: self.totals.cancelled,
            requests_failed: self.totals.failed,
            requests_refused: self.totals.refused,
            prompt_tokens_total: counters.prompt_tokens,
            prefix_cache_queries_total: counters.prefix_query_tokens,
            prefix_cache_hits_total: counters.prefix_hit_tokens,
            prefix_cache_hits_by_tier: counters.prefix_hits_by_tier,
            generation_tokens_total: counters.generated_tokens,
            embedding_tokens_total: counters.encoded_tokens,
            computed_tokens_total: counters.computed_tokens + counters.encoded_tokens,
            preemptions_total: counters.preemptions,
            steps_total: counters.steps + counters.encode_steps,
            // Kept beside, and added when somebody asks.
            histograms: Histograms::default(),
            kv_tiers: self.scheduler.kv().tier_stats().map(tier_stats).collect(),
            cuda_graphs: self.executor.graph_stats(),
            uptime_ms: self.now_ms(),
        }
    }
}

/// Gives the tiers a while to write what waits to be written. Whether they have done everything.
fn finish_writes(
    scheduler: &mut Scheduler,
    tiering: &mut Tiering,
    commands: &Receiver<Command>,
    epoch: Instant,
    refuse: impl Fn(Command),
) -> bool {
    let end = Instant::now() + Duration::from_millis(CLOSE_WRITES_MS);
    let Some(tiers) = scheduler.tiers() else { return true };
    loop {
        tiering.drive(tiers, epoch.elapsed().as_micros() as u64);
        if tiering.is_idle(tiers) {
            return true;
        }
        match commands.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Ok(Command::Tier(answer)) => tiering.answer(tiers, answer, epoch.elapsed().as_micros() as u64),
            Ok(command) => refuse(command),
            Err(_) => return false,
        }
    }
}

fn tier_stats((tier, stats): (CacheTier, TierStats)) -> KvTierStats {
    let TierStats { entries, bytes, hits, hit_bytes, misses, stored, evictions, faults } = stats;
    KvTierStats { name: tier.as_str(), blocks: entries, bytes, hits, hit_bytes, misses, stored, evictions, faults }
}
