//! Encoding whole sequences to vectors: a kind of work beside generation, without KV blocks, without chunks and without
//! a step in flight. A caller schedules a step, computes it and applies it before anything else happens.
//!
//! **Order.** The same classes and the same ageing as for generation, counted in steps of this kind; the two kinds do
//! not overtake each other, because the caller's loop runs one step of each in turn.
//! **No starvation.** A sequence is computed, or ends, within `2 * age_steps + k` steps of this kind after it was added,
//! where `k` counts the live sequences of this kind that were added before it and with it. Why: after `2 * age_steps`
//! steps its class has rank 0, so only older ones go before it, and each step takes at least the first of the queue.

use std::collections::BTreeMap;

use super::waiting::{Waiting, WaitingQueue};
use super::{Scheduler, SequenceEvent};
use crate::batch::Batch;
use crate::config::MAX_ENCODE_STEP_SEQUENCES;
use crate::error::{Error, Result};
use crate::ids::SeqId;
use crate::request::Usage;
use crate::sequence::EncodeSpec;

/// Whole sequences to compute together, in the order of their rows.
#[derive(Debug)]
pub struct EncodeStep {
    sequences: Vec<(SeqId, EncodeSpec)>,
}

impl EncodeStep {
    /// Whose they are.
    pub fn sequences(&self) -> impl Iterator<Item = SeqId> + '_ {
        self.sequences.iter().map(|(seq, _)| *seq)
    }
    /// Rows to compute.
    pub fn num_tokens(&self) -> usize {
        self.sequences.iter().map(|(_, spec)| spec.tokens.len()).sum()
    }
    /// The step as flat arrays, over blocks of its own: `block_tokens` each, counted from 0.
    pub fn batch(&self, block_tokens: usize) -> Batch {
        Batch::whole_sequences(self.sequences.iter().map(|(seq, spec)| (*seq, &*spec.tokens)), block_tokens)
    }
}

/// The sequences that wait to be encoded.
#[derive(Debug, Default)]
pub(super) struct EncodeQueue {
    specs: BTreeMap<SeqId, EncodeSpec>,
    pub(super) waiting: WaitingQueue,
    num_steps: u64,
}

impl EncodeQueue {
    pub(super) fn len(&self) -> usize {
        self.specs.len()
    }
    pub(super) fn timeout_ms(&self, seq: SeqId) -> Option<u64> {
        self.specs.get(&seq).map(|spec| spec.timeout_ms)
    }
    /// `None`: it does not wait here.
    pub(super) fn remove(&mut self, seq: SeqId) -> Option<EncodeSpec> {
        self.waiting.remove(seq)?;
        self.specs.remove(&seq)
    }
}

impl Scheduler {
    /// Accepts the sequences of one request, all or none, and queues them.
    pub fn add_encodings(&mut self, specs: Vec<EncodeSpec>, now_ms: u64) -> Result<Vec<SeqId>> {
        for spec in &specs {
            self.check_encoding(spec, now_ms)?;
        }
        let new_tokens: usize = specs.iter().map(|spec| spec.tokens.len()).sum();
        self.check_queue(new_tokens).inspect_err(|_| self.counters.overloaded_requests += 1)?;
        let request = SeqId(self.next_id);
        self.counters.requests += 1;
        Ok(specs.into_iter().map(|spec| self.enqueue_encoding(request, spec)).collect())
    }

    fn check_encoding(&self, spec: &EncodeSpec, now_ms: u64) -> Result<()> {
        let (prompt_tokens, limit_tokens) = (spec.tokens.len(), self.config.max_encode_tokens);
        if prompt_tokens == 0 {
            let expected = "at least one token".to_string();
            return Err(Error::InvalidArgument { field: "input", value: "empty".to_string(), expected });
        }
        if prompt_tokens > limit_tokens {
            let context_tokens = self.config.context_tokens;
            return Err(Error::PromptTooLong { prompt_tokens, limit_tokens, context_tokens });
        }
        match spec.deadline_ms.is_some_and(|deadline| deadline <= now_ms) {
            true => Err(Error::DeadlineExceeded { timeout_ms: spec.timeout_ms }),
            false => Ok(()),
        }
    }

    fn enqueue_encoding(&mut self, request: SeqId, spec: EncodeSpec) -> SeqId {
        let id = SeqId(self.next_id);
        self.next_id += 1;
        self.counters.accepted += 1;
        if let Some(deadline_ms) = spec.deadline_ms {
            self.deadlines.insert((deadline_ms, id));
        }
        let (priority, prompt_tokens) = (spec.priority, spec.tokens.len());
        let since_step = self.encodings.num_steps;
        self.encodings.waiting.insert(id, Waiting { request, priority, prompt_tokens, since_step });
        self.encodings.specs.insert(id, spec);
        id
    }

    /// The next step of whole sequences: the first in order, and those behind it as long as the step's token budget
    /// holds all of each. `None`: none waits. Sequences whose deadline has passed are not begun.
    pub fn schedule_encoding(&mut self, now_ms: u64) -> Option<EncodeStep> {
        let decoding = self.running.iter().any(|id| self.sequences[id].is_decoding());
        let budget = if decoding { self.config.mixed_budget_tokens } else { self.config.prefill_budget_tokens };
        let order =
            self.encodings.waiting.first(self.encodings.num_steps, self.config.age_steps, MAX_ENCODE_STEP_SEQUENCES);
        let mut step = EncodeStep { sequences: Vec::new() };
        for (_, seq) in order {
            let spec = &self.encodings.specs[&seq];
            if spec.deadline_ms.is_some_and(|deadline| deadline <= now_ms) {
                continue;
            }
            if !step.sequences.is_empty() && step.num_tokens() + spec.tokens.len() > budget {
                break;
            }
            let spec = self.encodings.remove(seq).expect("it waits");
            step.sequences.push((seq, spec));
        }
        if step.sequences.is_empty() {
            return None;
        }
        self.encodings.num_steps += 1;
        Some(step)
    }

    /// Takes a step's vectors, one per sequence in order, or why it could not be computed. Each sequence of the step has
    /// its final event here.
    pub fn apply_encoding(&mut self, step: EncodeStep, vectors: Result<Vec<Vec<f32>>>) -> Vec<SequenceEvent> {
        self.counters.encode_steps += 1;
        let vectors = match vectors {
            Ok(vectors) => vectors.into_iter().map(Ok).collect(),
            Err(error) => vec![Err(error); step.sequences.len()],
        };
        assert_eq!(vectors.len(), step.sequences.len(), "one vector per sequence");
        let settled = step.sequences.into_iter().zip(vectors);
        settled.map(|((seq, spec), vector)| self.settle_encoding(seq, &spec, vector)).collect()
    }

    fn settle_encoding(&mut self, seq: SeqId, spec: &EncodeSpec, vector: Result<Vec<f32>>) -> SequenceEvent {
        if let Some(deadline_ms) = spec.deadline_ms {
            self.deadlines.remove(&(deadline_ms, seq));
        }
        let usage = Usage { prompt_tokens: spec.tokens.len(), ..Usage::default() };
        let failed = |error| SequenceEvent::Failed { seq, error, usage };
        match vector {
            Ok(values) if values.iter().all(|value| value.is_finite()) => {
                self.counters.finished += 1;
                self.counters.encoded_tokens += spec.tokens.len() as u64;
                SequenceEvent::Encoded { seq, values, usage }
            }
            Ok(_) => {
                self.counters.failed += 1;
                failed(Error::NonFiniteEmbedding { tokens: spec.tokens.len() })
            }
            Err(error) => {
                self.counters.failed += 1;
                failed(error)
            }
        }
    }
}
