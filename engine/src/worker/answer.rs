//! One live request in the worker: its choices' text while it grows, its counts and its times, and the events that go
//! to its reader. Knows tokens and text, not scheduling.

use std::sync::Arc;
use std::time::Instant;

use crate::command::{RequestId, VectorForm};
use crate::error::Error;
use crate::ids::SeqId;
use crate::instruments::Instruments;
use crate::request::{Delta, Embedding, Event, FinishReason, Origin, Summary, Timings, TokenLogprobs, Usage};
use crate::responses::Recorder;
use crate::stream::EventSender;
use crate::tokenizer::{TextStream, Tokenizer};
use crate::trace::{Lane, Slice};

/// A request between admission and its last event.
pub(super) struct Answer {
    sender: EventSender,
    /// Of a generation.
    choices: Vec<Choice>,
    /// Of an embedding request.
    inputs: Vec<Input>,
    stop_token_ids: Arc<[u32]>,
    summary: Summary,
    submitted: Instant,
    started: Option<Instant>,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
    instruments: Arc<Instruments>,
    /// Its number, and what its caller calls it.
    id: RequestId,
    label: Option<Arc<str>>,
    /// Of a generation that the response cache is to keep.
    recorder: Option<Box<Recorder>>,
}

struct Choice {
    seq: SeqId,
    text: TextStream,
    /// A stop string is complete: whatever else ends the sequence at this token, it ended by that.
    has_stopped: bool,
    is_finished: bool,
    last_token: Option<Instant>,
}

struct Input {
    seq: SeqId,
    form: VectorForm,
    truncated: bool,
    is_finished: bool,
}

/// What the worker must do after a token.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum AfterToken {
    /// Go on.
    Continue,
    /// A stop string is complete: end the sequence.
    StopFound,
}

impl Answer {
    pub(super) fn new(
        sender: EventSender,
        origin: Origin,
        id: RequestId,
        summary: Summary,
        instruments: Arc<Instruments>,
    ) -> Self {
        Answer {
            id,
            label: origin.label,
            instruments,
            sender,
            choices: Vec::new(),
            inputs: Vec::new(),
            stop_token_ids: Arc::default(),
            summary,
            submitted: origin.arrived,
            started: None,
            first_token: None,
            last_token: None,
            recorder: None,
        }
    }

    /// Their text is not part of the answer.
    pub(super) fn stopped_by(mut self, stop_token_ids: Arc<[u32]>) -> Self {
        self.stop_token_ids = stop_token_ids;
        self
    }

    /// Everything that its reader hears is also told to `recorder`.
    pub(super) fn recorded_by(mut self, recorder: Option<Box<Recorder>>) -> Self {
        self.recorder = recorder;
        self
    }

    pub(super) fn add_choice(&mut self, seq: SeqId, text: TextStream) {
        self.choices.push(Choice { seq, text, has_stopped: false, is_finished: false, last_token: None });
    }

    pub(super) fn add_input(&mut self, seq: SeqId, form: VectorForm, truncated: bool) {
        self.inputs.push(Input { seq, form, truncated, is_finished: false });
    }

    pub(super) fn sequences(&self) -> impl Iterator<Item = SeqId> + '_ {
        self.choices.iter().map(|choice| choice.seq).chain(self.inputs.iter().map(|input| input.seq))
    }

    /// The first step that computes some of this request begins.
    pub(super) fn start(&mut self, now: Instant) {
        if self.started.is_some() {
            return;
        }
        self.started = Some(now);
        if self.instruments.tracer.is_on() {
            let (lane, start) = (Lane::Choice(self.id.0, 0), self.submitted);
            self.instruments.tracer.add(Slice { lane, name: "queued", start, end: now, args: Vec::new() });
        }
    }

    /// What its caller calls it.
    pub(super) fn label(&self) -> Option<&Arc<str>> {
        self.label.as_ref()
    }

    /// Tokens of the prompt of a generation.
    pub(super) fn prompt_tokens(&self) -> usize {
        self.summary.usage.prompt_tokens
    }

    /// A token of choice `idx`. The text of a stop token is not part of the answer.
    pub(super) fn push_token(
        &mut self,
        tokenizer: &Tokenizer,
        idx: usize,
        token_id: u32,
        logprobs: Option<TokenLogprobs>,
        now: Instant,
    ) -> AfterToken {
        let meters = &self.instruments.meters;
        if self.first_token.is_none() {
            self.first_token = Some(now);
            meters.first_token(now.saturating_duration_since(self.submitted));
        }
        self.last_token = Some(now);
        self.summary.usage.completion_tokens += 1;
        let choice = &mut self.choices[idx];
        if let Some(last) = choice.last_token.replace(now) {
            meters.next_token(now.saturating_duration_since(last));
        }
        let mut text = String::new();
        let is_stop_token = self.stop_token_ids.contains(&token_id);
        if !is_stop_token && choice.text.push(tokenizer, token_id, &mut text) {
            choice.has_stopped = true;
        }
        let has_stopped = choice.has_stopped;
        let delta = Delta { choice: idx, text, token_ids: vec![token_id], logprobs: logprobs.into_iter().collect() };
        self.send(delta);
        if has_stopped { AfterToken::StopFound } else { AfterToken::Continue }
    }

    pub(super) fn push_prompt_logprobs(&mut self, logprobs: Vec<TokenLogprobs>) {
        self.summary.prompt_logprobs.extend(logprobs);
    }

    /// Choice `idx` has ended; text that was held back comes out, unless a stop string cut it off.
    pub(super) fn finish_choice(&mut self, idx: usize, reason: FinishReason, usage: Usage) {
        let choice = &mut self.choices[idx];
        choice.is_finished = true;
        let mut text = String::new();
        choice.has_stopped |= choice.text.finish(&mut text);
        let reason = if choice.has_stopped { FinishReason::Stop } else { reason };
        if !text.is_empty() {
            self.send(Delta { choice: idx, text, ..Delta::default() });
        }
        if idx == 0 {
            self.summary.usage.cached_tokens = usage.cached_tokens;
            self.summary.usage.cached_by_tier = usage.cached_by_tier;
            self.summary.usage.prefix_miss = usage.prefix_miss;
        }
        self.summary.usage.preemptions += usage.preemptions;
        if let Some(recorder) = &mut self.recorder {
            recorder.finish(idx, reason);
        }
        self.sender.send(Event::Finished { choice: idx, reason });
    }

    fn send(&mut self, delta: Delta) {
        if let Some(recorder) = &mut self.recorder {
            recorder.push(&delta);
        }
        self.sender.send(Event::Delta(delta));
    }

    /// The vector of input `idx`, as the model gives it.
    pub(super) fn push_vector(&mut self, idx: usize, mut values: Vec<f32>, usage: Usage) {
        let input = &mut self.inputs[idx];
        input.is_finished = true;
        values.truncate(input.form.dimensions);
        if input.form.normalize {
            normalize(&mut values);
        }
        self.summary.usage.prompt_tokens += usage.prompt_tokens;
        let embedding = Embedding { values, tokens: usage.prompt_tokens, truncated: input.truncated };
        self.sender.send(Event::Embedding { input: idx, embedding });
    }

    pub(super) fn is_finished(&self) -> bool {
        self.choices.iter().all(|choice| choice.is_finished) && self.inputs.iter().all(|input| input.is_finished)
    }

    /// Sends the last event.
    pub(super) fn end(mut self, now: Instant) {
        let ms = |from: Instant, to: Instant| to.saturating_duration_since(from).as_secs_f64() * 1e3;
        let started = self.started.unwrap_or(now);
        let first_token = self.first_token.unwrap_or(now);
        self.summary.timings = Timings {
            queue_ms: ms(self.submitted, started),
            prompt_ms: ms(started, first_token),
            first_token_ms: ms(self.submitted, first_token),
            decode_ms: self.last_token.map_or(0.0, |last| ms(first_token, last)),
            total_ms: ms(self.submitted, now),
        };
        let summary = std::mem::take(&mut self.summary);
        if !self.choices.is_empty() {
            self.instruments.meters.finished(&summary, self.choices.len());
        }
        // Before the last event: whoever has seen it finds the answer kept.
        if let Some(recorder) = self.recorder.take() {
            recorder.store(&summary);
        }
        self.sender.end(Ok(Event::Done(summary)));
    }

    /// Ends the request with an error.
    pub(super) fn fail(self, error: Error) {
        self.sender.end(Err(error));
    }
}

/// To unit length; a vector of zeros stays one. The squares are summed in double precision, in order.
fn normalize(values: &mut [f32]) {
    let length = values.iter().map(|&value| f64::from(value) * f64::from(value)).sum::<f64>().sqrt();
    if length > 0.0 {
        values.iter_mut().for_each(|value| *value = (f64::from(*value) / length) as f32);
    }
}
