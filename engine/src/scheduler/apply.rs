//! Applying a step's results: progress becomes real, full blocks are published, tokens become events.

use super::{InFlight, Scheduler, SequenceEvent, Step};
use crate::batch::{Outcome, Sampled};
use crate::error::Error;
use crate::request::{FinishReason, TokenLogprobs};
use crate::sequence::Chunk;

impl Scheduler {
    /// Takes the results of the oldest step in flight, one per row of its batch's outputs, in their order. Results of
    /// sequences that have ended are dropped; a failure belongs to its sequence. Ends what is past its deadline.
    pub fn apply(&mut self, step: Step, sampled: &[Sampled], now_ms: u64) -> Vec<SequenceEvent> {
        let chunks = self.take_oldest(&step);
        let num_outputs: usize = chunks.iter().map(Chunk::num_outputs).sum();
        assert_eq!(sampled.len(), num_outputs, "one result per output row");
        let mut events = Vec::new();
        let mut rest = sampled;
        for chunk in chunks {
            let (results, after) = rest.split_at(chunk.num_outputs());
            rest = after;
            assert!(results.iter().all(|result| result.seq == chunk.seq), "results come in the order of the outputs");
            self.apply_chunk(&chunk, results, &mut events);
        }
        events.extend(self.expire(now_ms));
        events
    }

    /// Ends every sequence of the oldest step in flight with `error`: it could not be computed.
    pub fn fail_step(&mut self, step: Step, error: &Error) -> Vec<SequenceEvent> {
        let chunks = self.take_oldest(&step);
        let mut live = chunks.iter().map(|chunk| chunk.seq).collect::<Vec<_>>();
        live.retain(|seq| self.sequences.contains_key(seq));
        live.into_iter().map(|seq| self.fail(seq, error.clone())).collect()
    }

    fn take_oldest(&mut self, step: &Step) -> Vec<Chunk> {
        let InFlight { id, chunks, written } = self.in_flight.pop_front().expect("the step is in flight");
        assert_eq!(id, step.id, "steps are applied in the order in which they were scheduled");
        self.kv.unpin(&written);
        chunks
    }

    fn apply_chunk(&mut self, chunk: &Chunk, results: &[Sampled], events: &mut Vec<SequenceEvent>) {
        self.counters.computed_tokens += chunk.positions.len() as u64;
        let Some(seq) = self.sequences.get_mut(&chunk.seq) else {
            self.counters.surplus_tokens += u64::from(chunk.samples);
            return;
        };
        seq.num_in_flight -= 1;
        seq.num_pending -= usize::from(chunk.samples);
        let again = seq.most_computed.min(chunk.positions.end).saturating_sub(chunk.positions.start);
        self.counters.recomputed_tokens += again as u64;
        seq.most_computed = seq.most_computed.max(chunk.positions.end);
        if let Some(bad) = results.iter().find(|result| result.outcome == Outcome::NonFinite) {
            // Its blocks of this chunk are not published: their numbers may be as bad as the logits. Nor is what it was
            // computed from believed again.
            self.kv.quarantine_restored(&self.sequences[&chunk.seq]);
            events.push(self.fail(chunk.seq, Error::NonFiniteLogits { position: bad.position }));
            return;
        }
        let ended = self.take_results(chunk, results, events);
        let seq = self.sequences.get_mut(&chunk.seq).expect("only an end removes it");
        if seq.num_preemptions == chunk.run {
            seq.num_computed = chunk.positions.end;
            self.kv.publish(seq);
        }
        let prompt_was_all = seq.spec.max_new_tokens == 0 && seq.num_computed == seq.spec.prompt.len();
        if let Some(reason) = ended.or(prompt_was_all.then_some(FinishReason::Length)) {
            events.extend(self.finish(chunk.seq, reason));
        }
    }

    /// Books the chunk's logprobs and its new token, also when the sequence has been preempted since: they are right
    /// whatever became of its blocks. Tells whether the token ends it.
    fn take_results(
        &mut self,
        chunk: &Chunk,
        results: &[Sampled],
        events: &mut Vec<SequenceEvent>,
    ) -> Option<FinishReason> {
        let seq = self.sequences.get_mut(&chunk.seq).expect("the sequence is live");
        let (scored, chosen) = results.split_at(chunk.scores.len());
        if !scored.is_empty() {
            debug_assert_eq!(chunk.scores.start, seq.next_score, "each prompt token is scored once, in order");
            seq.next_score = chunk.scores.end;
            events
                .push(SequenceEvent::PromptLogprobs { seq: seq.id, logprobs: scored.iter().map(scores_of).collect() });
        }
        let (token_id, logprobs) = token_of(chosen.first()?);
        let index = seq.tokens.len() - seq.spec.prompt.len();
        seq.tokens.push(token_id);
        self.counters.generated_tokens += 1;
        events.push(SequenceEvent::Token { seq: seq.id, token_id, logprobs });
        if seq.spec.stop_token_ids.contains(&token_id) {
            Some(FinishReason::Stop)
        } else {
            (index + 1 == seq.spec.max_new_tokens).then_some(FinishReason::Length)
        }
    }
}

fn scores_of(result: &Sampled) -> TokenLogprobs {
    match &result.outcome {
        Outcome::Scored(logprobs) => logprobs.clone(),
        other => panic!("a row that scores a prompt token gave {other:?}"),
    }
}

fn token_of(result: &Sampled) -> (u32, Option<TokenLogprobs>) {
    match &result.outcome {
        Outcome::Token { token_id, logprobs } => (*token_id, logprobs.clone()),
        other => panic!("a row that chooses a token gave {other:?}"),
    }
}
