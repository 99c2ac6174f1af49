//! The worker's steps as slices of a time line: the step itself, what each sequence got of it, and the jobs of the tiers.
//! Called only while something is recorded.

use std::time::{Duration, Instant};

use crate::command::{RequestId, TierAnswer};
use crate::kv_cache::tiers::Outcome;
use crate::trace::{Lane, Slice, Tracer};

/// What one sequence gets of a step.
pub(super) struct PartOfStep {
    pub(super) request: RequestId,
    /// Or its input, of an embedding request.
    pub(super) choice: usize,
    pub(super) num_tokens: usize,
    /// Of the sequence, with those of this step.
    pub(super) context_tokens: usize,
    /// Its prompt is behind it.
    pub(super) is_decode: bool,
}

/// A step of generation.
pub(super) fn step(tracer: &Tracer, parts: &[PartOfStep], id: u64, start: Instant, end: Instant) {
    let tokens = |is_decode| -> u64 {
        parts.iter().filter(|part| part.is_decode == is_decode).map(|part| part.num_tokens as u64).sum()
    };
    let args = vec![
        ("step", id),
        ("sequences", parts.len() as u64),
        ("prefill_tokens", tokens(false)),
        ("decode_tokens", tokens(true)),
    ];
    tracer.add(Slice { lane: Lane::Steps, name: "step", start, end, args });
    for part in parts {
        add_part(tracer, part, if part.is_decode { "decode" } else { "prefill" }, start, end);
    }
}

/// A step of whole sequences.
pub(super) fn encoding(tracer: &Tracer, parts: &[PartOfStep], start: Instant, end: Instant) {
    let tokens = parts.iter().map(|part| part.num_tokens as u64).sum();
    let args = vec![("sequences", parts.len() as u64), ("tokens", tokens)];
    tracer.add(Slice { lane: Lane::Steps, name: "encode", start, end, args });
    parts.iter().for_each(|part| add_part(tracer, part, "encode", start, end));
}

fn add_part(tracer: &Tracer, part: &PartOfStep, name: &'static str, start: Instant, end: Instant) {
    let lane = Lane::Choice(part.request.0, part.choice);
    let args = vec![("tokens", part.num_tokens as u64), ("context_tokens", part.context_tokens as u64)];
    tracer.add(Slice { lane, name, start, end, args });
}

/// What a tier has done: it says how long that took, and it was just now.
pub(super) fn tier(tracer: &Tracer, answer: &TierAnswer) {
    let TierAnswer::Done { id, done, .. } = answer else { return };
    let (name, bytes) = match &done.outcome {
        Outcome::Found(bytes) => ("read", bytes.len() as u64),
        Outcome::Missing => ("missing", 0),
        Outcome::Stored => ("write", 0),
        Outcome::Done => ("done", 0),
        Outcome::Fault(_) => ("fault", 0),
    };
    let end = Instant::now();
    let start = end.checked_sub(Duration::from_micros(done.elapsed_us)).unwrap_or(end);
    tracer.add(Slice { lane: Lane::Tier(id.name()), name, start, end, args: vec![("bytes", bytes)] });
}
