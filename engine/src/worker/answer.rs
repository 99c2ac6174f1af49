//! One live request in the worker: its choices' text while it grows, its counts and its times, and the events that go
//! to its reader. Knows tokens and text, not scheduling.

use std::sync::Arc;
use std::time::Instant;

use crate::batch::SeqId;
use crate::command::VectorForm;
use crate::error::Error;
use crate::request::{Delta, Embedding, Event, FinishReason, Summary, Timings, TokenLogprobs, Usage};
use crate::stream::EventSender;
use crate::tokenizer::{TextStream, Tokenizer};

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
}

struct Choice {
    seq: SeqId,
    text: TextStream,
    /// A stop string is complete: whatever else ends the sequence at this token, it ended by that.
    has_stopped: bool,
    is_finished: bool,
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
    pub(super) fn new(sender: EventSender, submitted: Instant, summary: Summary, stop_token_ids: Arc<[u32]>) -> Self {
        Answer {
            sender,
            choices: Vec::new(),
            inputs: Vec::new(),
            stop_token_ids,
            summary,
            submitted,
            started: None,
            first_token: None,
            last_token: None,
        }
    }

    pub(super) fn add_choice(&mut self, seq: SeqId, text: TextStream) {
        self.choices.push(Choice { seq, text, has_stopped: false, is_finished: false });
    }

    pub(super) fn add_input(&mut self, seq: SeqId, form: VectorForm, truncated: bool) {
        self.inputs.push(Input { seq, form, truncated, is_finished: false });
    }

    pub(super) fn sequences(&self) -> impl Iterator<Item = SeqId> + '_ {
        self.choices.iter().map(|choice| choice.seq).chain(self.inputs.iter().map(|input| input.seq))
    }

    /// The first step that computes some of this request begins.
    pub(super) fn start(&mut self, now: Instant) {
        self.started.get_or_insert(now);
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
        self.first_token.get_or_insert(now);
        self.last_token = Some(now);
        self.summary.usage.completion_tokens += 1;
        let choice = &mut self.choices[idx];
        let mut text = String::new();
        let is_stop_token = self.stop_token_ids.contains(&token_id);
        if !is_stop_token && choice.text.push(tokenizer, token_id, &mut text) {
            choice.has_stopped = true;
        }
        let has_stopped = choice.has_stopped;
        let delta = Delta { choice: idx, text, token_ids: vec![token_id], logprobs: logprobs.into_iter().collect() };
        self.sender.send(Event::Delta(delta));
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
            self.sender.send(Event::Delta(Delta { choice: idx, text, ..Delta::default() }));
        }
        if idx == 0 {
            self.summary.usage.cached_tokens = usage.cached_tokens;
            self.summary.usage.cached_by_tier = usage.cached_by_tier;
            self.summary.usage.prefix_miss = usage.prefix_miss;
        }
        self.summary.usage.preemptions += usage.preemptions;
        self.sender.send(Event::Finished { choice: idx, reason });
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
