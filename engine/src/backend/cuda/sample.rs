//! The end of a step on a CUDA device: logits of the output rows, a tile at a time. Tokens are chosen on the device,
//! which gives those of the sampler on the CPU; rows that also want logprobs are read back, and the sampler has them.

use std::collections::BTreeMap;
use std::sync::Arc;

use ns_llm_kernels::cuda::driver::wait;
use ns_llm_kernels::cuda::memory::Memory;
use ns_llm_kernels::cuda::sampling::{LogitBias, NO_TOKEN, SamplingBatch, SamplingRow, sample_rows};
use ns_llm_kernels::error::Result as KernelResult;

use super::bucket::Bucket;
use super::device_rows::{DeviceRows, on_device};
use super::{ACTIVATIONS, Buffer, CudaBackend, CudaLinear, CudaOperand};
use crate::batch::{Outcome, OutputRow, Sampled};
use crate::error::Result;
use crate::sampler::{SamplerScratch, sample_row};

/// Rows whose logits exist at the same time: 64 rows of 150,000 logits are 38 MB.
pub(super) const TILE_ROWS: usize = 64;

/// What sampling keeps from step to step.
#[derive(Default)]
pub(super) struct HostSampler {
    scratch: SamplerScratch,
    /// Counters of tokens, which sampling leaves at zero.
    occurrences: Option<Buffer<u32>>,
}

/// What the host found for rows that also want logprobs, by row.
pub(super) type HostRows = BTreeMap<usize, Outcome>;

/// Logits of `x` `[outputs, hidden_size]` and what `outputs` asks of them.
pub(super) fn sample(
    b: &CudaBackend,
    x: &CudaOperand,
    output: &CudaLinear,
    outputs: &[OutputRow],
) -> Result<Vec<Sampled>> {
    let mut chosen = b.memory.scratch(ACTIVATIONS, outputs.len()).map_err(|error| b.failed(error))?;
    let mut host_rows = enqueue(b, x, output, outputs, &mut chosen)?;
    let mut tokens = vec![0; outputs.len()];
    chosen.download(0, &mut tokens).map_err(|error| b.failed(error))?;
    let sampled = outputs.iter().zip(tokens).enumerate().map(|(row, (asks, token_id))| Sampled {
        seq: asks.seq,
        position: asks.position,
        outcome: host_rows.remove(&row).unwrap_or_else(|| outcome_of(token_id)),
    });
    Ok(sampled.collect())
}

/// What a token that was chosen on the device says.
pub(super) fn outcome_of(token_id: u32) -> Outcome {
    match token_id {
        NO_TOKEN => Outcome::NonFinite,
        token_id => Outcome::Token { token_id, logprobs: None },
    }
}

/// Enqueues the choice of a token for each row, into `chosen` `[outputs]` or more. Rows that also want logprobs are
/// waited for, and chosen on the host; those that only score a token leave any in `chosen`.
pub(super) fn enqueue(
    b: &CudaBackend,
    x: &CudaOperand,
    output: &CudaLinear,
    outputs: &[OutputRow],
    chosen: &mut Buffer<u32>,
) -> Result<HostRows> {
    assert!(chosen.len() >= outputs.len(), "{} outputs of a step, of {}", outputs.len(), chosen.len());
    let mut host_rows = HostRows::new();
    for (tile, asks) in outputs.chunks(TILE_ROWS).enumerate() {
        let first = tile * TILE_ROWS;
        let mut logits = b.floats(asks.len(), output.features)?.values;
        b.product(x, first..first + asks.len(), output, &mut logits, false)?;
        // Read first: the device overwrites them.
        for (row, asks) in asks.iter().enumerate().filter(|(_, asks)| on_device(asks).is_none()) {
            let mut logits = b.read(&logits, row * output.features..(row + 1) * output.features)?;
            host_rows.insert(first + row, sample_row(&mut logits, asks, &mut b.lock(&b.sampler).scratch));
        }
        let of_tile = host_rows.range(first..).count();
        if of_tile < asks.len() {
            choose(b, &mut logits, asks, (first, chosen)).map_err(|error| b.failed(error))?;
        }
        // The next step may be launched before anybody has seen these.
        for (&row, outcome) in host_rows.range(first..) {
            let token_id = match outcome {
                Outcome::Token { token_id, .. } => *token_id,
                Outcome::Scored(_) | Outcome::NonFinite => NO_TOKEN,
            };
            chosen.upload(row, &[token_id]).map_err(|error| b.failed(error))?;
        }
    }
    Ok(host_rows)
}

/// The same for a step of a bucket: how rows choose is among its `numbers`.
pub(super) fn enqueue_bucket(
    b: &CudaBackend,
    x: &CudaOperand,
    output: &CudaLinear,
    bucket: Bucket,
    numbers: &Buffer<u32>,
) -> Result<()> {
    let mut chosen = b.lock(&b.chosen);
    let chosen = chosen.as_mut().expect("a pipeline has them");
    for first in (0..bucket.rows).step_by(TILE_ROWS) {
        let rows = TILE_ROWS.min(bucket.rows - first);
        let mut logits = b.floats(rows, output.features)?.values;
        b.product(x, first..first + rows, output, &mut logits, false)?;
        let mut sampler = b.lock(&b.sampler);
        let mut choose = || {
            // As many as any step needs, so that others never replace those that a captured step uses.
            let counters = counters(&b.memory, &mut sampler.occurrences, TILE_ROWS * output.features)?;
            let batch = SamplingBatch {
                rows: numbers.view(bucket.places().sampling + first * SamplingRow::NUM_WORDS, rows),
                bias: numbers.view(0, numbers.len() / 2),
                history: numbers.all(),
            };
            let counters = &mut counters.slice_mut(0..logits.len());
            let tokens = &mut chosen.slice_mut(first..first + rows);
            sample_rows(b.driver(), &mut logits.all_mut(), &batch, counters, tokens)
        };
        choose().map_err(|error| b.failed(error))?;
    }
    Ok(())
}

/// A token for each row of `logits` `[asks, vocab_size]`, from row `first` of `chosen` on; rows that are not the device's
/// get one that nobody reads.
fn choose(
    b: &CudaBackend,
    logits: &mut Buffer<f32>,
    asks: &[OutputRow],
    (first, chosen): (usize, &mut Buffer<u32>),
) -> KernelResult<()> {
    let mut rows = DeviceRows::default();
    for asks in asks {
        rows.push(on_device(asks), asks.position);
    }
    let mut sampler = b.lock(&b.sampler);
    let mut device_rows: Buffer<SamplingRow> = b.memory.scratch(ACTIVATIONS, rows.rows.len())?;
    device_rows.upload(0, &rows.rows)?;
    let mut bias: Buffer<LogitBias> = b.memory.scratch(ACTIVATIONS, rows.bias.len())?;
    bias.upload(0, &rows.bias)?;
    let mut history = b.memory.scratch(ACTIVATIONS, rows.history.len())?;
    history.upload(0, &rows.history)?;
    let num_counters = if rows.history.is_empty() { 0 } else { logits.len() };
    let occurrences = counters(&b.memory, &mut sampler.occurrences, num_counters)?;
    let batch = SamplingBatch { rows: device_rows.all(), bias: bias.all(), history: history.all() };
    let counters = &mut occurrences.slice_mut(0..num_counters);
    let tokens = &mut chosen.slice_mut(first..first + asks.len());
    sample_rows(b.driver(), &mut logits.all_mut(), &batch, counters, tokens)
}

/// At least `len` counters, all of them zero.
fn counters<'a>(
    memory: &Arc<Memory>,
    counters: &'a mut Option<Buffer<u32>>,
    len: usize,
) -> KernelResult<&'a mut Buffer<u32>> {
    if counters.as_ref().is_none_or(|counters| counters.len() < len) {
        if counters.is_some() {
            // A driver frees behind what runs, and would wait for ever for a step that hangs.
            wait(&**memory.driver())?;
        }
        *counters = Some(memory.zeroed(ACTIVATIONS, len)?);
    }
    Ok(counters.as_mut().expect("there are some now"))
}
