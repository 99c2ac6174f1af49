//! Steps on their way: a step's numbers go to the device, and its tokens come back, while the next one is prepared and
//! launched. Each of up to two steps in flight has a [`Transfer`] of its own; the tokens that a step has chosen lie in
//! one buffer on the device, where the next step finds them and leaves its own.
//!
//! Steps that have a [`Bucket`] are captured when it comes for the second time, and are launched as one from then on.
//! (The first one runs kernel by kernel, and finds all memory that they need.) The graphs that were launched least
//! recently make room for others. What goes wrong with one, but for the loss of the device, is no reason to fail: steps
//! are launched kernel by kernel from then on, and the statistics say why.

use std::collections::VecDeque;
use std::num::NonZeroUsize;
use std::sync::Arc;

use lru::LruCache;
use ns_llm_kernels::cuda::memory::{Buffer, CapturedStep, Memory};
use ns_llm_kernels::cuda::transfer::Transfer;
use ns_llm_kernels::error::{Error as KernelError, Result as KernelResult};

use super::bucket::Bucket;
use super::sample::{self, HostRows};
use super::step::Step;
use super::{CudaBackend, CudaLinear, CudaOperand};
use crate::backend::{Launched, StepLimits, UnderWay};
use crate::batch::{Batch, OutputRow, Sampled};
use crate::error::{Error, Result};
use crate::stats::CudaGraphStats;

/// Steps that may be launched and not collected.
pub(super) const MAX_IN_FLIGHT: usize = 2;
/// What it is for, in errors.
const PURPOSE: &str = "steps on their way on the device";

/// What a step needs beside the model.
pub(super) struct Pipeline {
    limits: StepLimits,
    /// Of the steps in flight in turn.
    transfers: [Transfer; MAX_IN_FLIGHT],
    /// The next step's.
    next: usize,
    /// Whose results come next, oldest first.
    under_way: VecDeque<usize>,
    /// The numbers of a step that has a bucket. Not here while a step uses them.
    numbers: Option<Buffer<u32>>,
    graphs: Graphs,
}

/// Steps that were captured, and what became of them.
struct Graphs {
    kept: LruCache<Bucket, Kept>,
    stats: CudaGraphStats,
}

/// What there is of a bucket.
enum Kept {
    /// All memory that its steps need.
    Memory,
    /// Its steps as one.
    Graph(CapturedStep),
}

/// `forward` of [`Backend::launch`](crate::backend::Backend::launch).
type Forward<'a> = dyn FnMut(&Batch) -> Result<CudaOperand> + 'a;

impl Pipeline {
    /// For steps within these limits, and the tokens that they choose.
    pub(super) fn new(memory: &Arc<Memory>, limits: StepLimits) -> KernelResult<(Pipeline, Buffer<u32>)> {
        let wants_graphs = limits.max_graphs > 0;
        let numbers_len = if wants_graphs { Bucket::buffer_len(&limits) } else { 0 };
        let max_outputs = limits.max_tokens.max(limits.max_sequences);
        let transfers =
            [Transfer::new(memory, numbers_len, max_outputs)?, Transfer::new(memory, numbers_len, max_outputs)?];
        let numbers = Some(memory.zeroed(PURPOSE, numbers_len)?);
        let kept = LruCache::new(NonZeroUsize::new(limits.max_graphs).unwrap_or(NonZeroUsize::MIN));
        let refusal = (!wants_graphs).then(|| "it was not asked for".to_owned());
        let graphs = Graphs { kept, stats: CudaGraphStats { refusal, ..CudaGraphStats::default() } };
        let under_way = VecDeque::with_capacity(MAX_IN_FLIGHT);
        let pipeline = Pipeline { limits, transfers, next: 0, under_way, numbers, graphs };
        Ok((pipeline, memory.zeroed(PURPOSE, max_outputs)?))
    }

    pub(super) fn graph_stats(&self) -> CudaGraphStats {
        let is_graph = |(_, kept): &(&Bucket, &Kept)| matches!(kept, Kept::Graph(_));
        CudaGraphStats { kept: self.graphs.kept.iter().filter(is_graph).count() as u64, ..self.graphs.stats.clone() }
    }

    /// Starts a step.
    pub(super) fn launch(
        &mut self,
        b: &CudaBackend,
        batch: &Batch,
        output: &CudaLinear,
        forward: &mut Forward<'_>,
    ) -> Result<Launched> {
        assert!(self.under_way.len() < MAX_IN_FLIGHT, "a step was launched before an older one was collected");
        let launched = self.launch_and_fetch(b, batch, output, forward);
        if launched.is_err() {
            // What it has enqueued reads and writes this transfer's memory; there is nobody to tell a second error to.
            let _ = self.transfers[self.next].abandon();
            return launched.map(Launched::UnderWay);
        }
        self.under_way.push_back(self.next);
        self.next = (self.next + 1) % MAX_IN_FLIGHT;
        launched.map(Launched::UnderWay)
    }

    /// Waits for the oldest step.
    pub(super) fn collect(&mut self, b: &CudaBackend, rows: Vec<UnderWay>) -> Result<Vec<Sampled>> {
        let transfer = self.under_way.pop_front().expect("a step is under way");
        let tokens = self.transfers[transfer].take().map_err(|error| b.failed(error))?;
        let sampled = rows.into_iter().zip(tokens).map(|(UnderWay { seq, position, outcome }, token_id)| {
            let outcome = outcome.unwrap_or_else(|| sample::outcome_of(token_id));
            Sampled { seq, position, outcome }
        });
        Ok(sampled.collect())
    }

    fn launch_and_fetch(
        &mut self,
        b: &CudaBackend,
        batch: &Batch,
        output: &CudaLinear,
        forward: &mut Forward<'_>,
    ) -> Result<Vec<UnderWay>> {
        let host_rows = match self.launch_in_bucket(b, batch, output, forward)? {
            true => HostRows::new(),
            false => launch_plain(b, batch, output, forward)?,
        };
        let chosen = b.lock(&b.chosen);
        let chosen = chosen.as_ref().expect("a pipeline has them");
        self.transfers[self.next].fetch(chosen, batch.outputs.len()).map_err(|error| b.failed(error))?;
        let mut outcomes = host_rows;
        let row = |(row, &OutputRow { seq, position, .. }): (usize, &OutputRow)| UnderWay {
            seq,
            position,
            outcome: outcomes.remove(&row),
        };
        Ok(batch.outputs.iter().enumerate().map(row).collect())
    }

    /// Whether the step has a bucket, and was launched in it.
    fn launch_in_bucket(
        &mut self,
        b: &CudaBackend,
        batch: &Batch,
        output: &CudaLinear,
        forward: &mut Forward<'_>,
    ) -> Result<bool> {
        if self.graphs.stats.refusal.is_some() {
            return Ok(false);
        }
        let Some(bucket) = Bucket::of(batch, &self.limits) else { return Ok(false) };
        let transfer = &mut self.transfers[self.next];
        let Some(numbers) = bucket.numbers(batch, transfer.outward_len()) else { return Ok(false) };
        let buffer = self.numbers.as_mut().expect("no other step uses them");
        transfer.send(&numbers, buffer).map_err(|error| b.failed(error))?;
        let launched = match self.graphs.kept.get_mut(&bucket) {
            Some(Kept::Graph(graph)) => {
                self.graphs.stats.launched += 1;
                graph.launch().map_err(|error| b.failed(error))
            }
            Some(Kept::Memory) => {
                return match self.capture(b, bucket, output, forward) {
                    Err(error) if !matches!(error, Error::DeviceLost { .. }) => self.refuse(b, &error),
                    captured => captured.map(|()| true),
                };
            }
            None => {
                let _scratch = b.memory.captured_scratch();
                enqueue(&mut self.numbers, b, bucket, output, forward).map(|()| self.keep(bucket, Kept::Memory))
            }
        };
        match launched {
            // Without graphs there may be room.
            Err(error @ Error::OutOfMemory { .. }) => self.refuse(b, &error),
            launched => launched.map(|()| true),
        }
    }

    /// Captures the steps of a bucket, and launches the one at hand as the first of them.
    fn capture(
        &mut self,
        b: &CudaBackend,
        bucket: Bucket,
        output: &CudaLinear,
        forward: &mut Forward<'_>,
    ) -> Result<()> {
        let (mut failure, numbers) = (None, &mut self.numbers);
        let captured = b.memory.capture(&mut || {
            enqueue(numbers, b, bucket, output, forward).map_err(|error| {
                let reason = error.to_string();
                failure = Some(error);
                KernelError::CudaDriver { call: "cuStreamBeginCapture", reason }
            })
        });
        let mut graph = captured.map_err(|error| failure.unwrap_or_else(|| b.failed(error)))?;
        self.graphs.stats.captured += 1;
        graph.launch().map_err(|error| b.failed(error))?;
        self.graphs.stats.launched += 1;
        self.keep(bucket, Kept::Graph(graph));
        Ok(())
    }

    fn keep(&mut self, bucket: Bucket, kept: Kept) {
        if let Some((other, Kept::Graph(_))) = self.graphs.kept.push(bucket, kept)
            && other != bucket
        {
            self.graphs.stats.evicted += 1;
        }
    }

    /// No step is captured from now on; the one at hand was not launched.
    fn refuse(&mut self, b: &CudaBackend, error: &Error) -> Result<bool> {
        self.graphs.stats.refusal = Some(error.to_string());
        self.graphs.kept.clear();
        b.memory.forget_captured();
        Ok(false)
    }
}

/// Enqueues a step of a bucket, whose numbers are on the device.
fn enqueue(
    numbers: &mut Option<Buffer<u32>>,
    b: &CudaBackend,
    bucket: Bucket,
    output: &CudaLinear,
    forward: &mut Forward<'_>,
) -> Result<()> {
    let batch = bucket.batch();
    let step = Step::of_bucket(bucket, &batch, numbers.take().expect("no other step uses them"));
    *b.lock(&b.prepared) = Some(step);
    let states = forward(&batch);
    // A model that has failed may not have come to its first operation.
    let prepared = b.lock(&b.prepared).take();
    let step = prepared.or_else(|| b.lock(&b.step).take());
    let step = step.expect("the step that was prepared");
    let sampled = states.and_then(|states| sample::enqueue_bucket(b, &states, output, bucket, step.numbers()));
    *numbers = Some(step.into_numbers());
    sampled
}

/// Launches a step kernel by kernel. What the host has to say of its rows is said when it returns.
fn launch_plain(b: &CudaBackend, batch: &Batch, output: &CudaLinear, forward: &mut Forward<'_>) -> Result<HostRows> {
    let states = forward(batch)?;
    let mut chosen = b.lock(&b.chosen);
    sample::enqueue(b, &states, output, &batch.outputs, chosen.as_mut().expect("a pipeline has them"))
}
