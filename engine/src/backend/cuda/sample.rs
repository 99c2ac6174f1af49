//! The end of a step on a CUDA device: logits of the output rows, a tile at a time. Tokens are chosen on the device, which gives those
//! of the sampler on the CPU; rows that also want logprobs are read back, and the sampler has them.

use ns_llm_kernels::cuda::sampling::{LogitBias, NO_TOKEN, SamplingBatch, SamplingRow, sample_rows};

use super::{ACTIVATIONS, Buffer, CudaBackend, CudaLinear, CudaOperand};
use crate::batch::{Outcome, OutputKind, OutputRow, RowSampling, Sampled};
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

/// The rows of a tile as the device takes them.
#[derive(Default)]
struct DeviceRows {
    rows: Vec<SamplingRow>,
    bias: Vec<LogitBias>,
    history: Vec<u32>,
}

/// Logits of `x` `[outputs, hidden_size]` and what `outputs` asks of them.
pub(super) fn sample(
    b: &CudaBackend,
    x: &CudaOperand,
    output: &CudaLinear,
    outputs: &[OutputRow],
) -> Result<Vec<Sampled>> {
    let mut sampled = Vec::with_capacity(outputs.len());
    for (tile, asks) in outputs.chunks(TILE_ROWS).enumerate() {
        let first = tile * TILE_ROWS;
        let mut logits = b.floats(asks.len(), output.features)?.values;
        b.product(x, first..first + asks.len(), output, &mut logits, false)?;
        let mut outcomes: Vec<Option<Outcome>> = Vec::with_capacity(asks.len());
        // Read first: the device overwrites them.
        for (row, asks) in asks.iter().enumerate() {
            outcomes.push(match on_device(asks) {
                Some(_) => None,
                None => {
                    let mut logits = b.read(&logits, row * output.features..(row + 1) * output.features)?;
                    Some(sample_row(&mut logits, asks, &mut b.lock(&b.sampler).scratch))
                }
            });
        }
        if outcomes.iter().any(Option::is_none) {
            let tokens = chosen_on_device(b, &mut logits, asks)?;
            for (outcome, token_id) in outcomes.iter_mut().zip(tokens) {
                outcome.get_or_insert(match token_id {
                    NO_TOKEN => Outcome::NonFinite,
                    token_id => Outcome::Token { token_id, logprobs: None },
                });
            }
        }
        sampled.extend(asks.iter().zip(outcomes).map(|(asks, outcome)| Sampled {
            seq: asks.seq,
            position: asks.position,
            outcome: outcome.expect("each row was chosen on the host or on the device"),
        }));
    }
    Ok(sampled)
}

/// How a row chooses its token, if the token is all that it asks for.
fn on_device(asks: &OutputRow) -> Option<&RowSampling> {
    match &asks.kind {
        OutputKind::Sample(sampling) => sampling.logprobs.is_none().then_some(sampling),
        OutputKind::Score { .. } => None,
    }
}

/// A token for each row of `logits` `[asks, vocab_size]`; rows that are not the device's get one that nobody reads.
fn chosen_on_device(b: &CudaBackend, logits: &mut Buffer<f32>, asks: &[OutputRow]) -> Result<Vec<u32>> {
    let mut rows = DeviceRows::default();
    for asks in asks {
        rows.push(on_device(asks), asks.position);
    }
    let mut sampler = b.lock(&b.sampler);
    let mut choose = || {
        let mut tokens: Buffer<u32> = b.memory.scratch(ACTIVATIONS, asks.len())?;
        let mut device_rows: Buffer<SamplingRow> = b.memory.scratch(ACTIVATIONS, rows.rows.len())?;
        device_rows.upload(0, &rows.rows)?;
        let mut bias: Buffer<LogitBias> = b.memory.scratch(ACTIVATIONS, rows.bias.len())?;
        bias.upload(0, &rows.bias)?;
        let mut history = b.memory.scratch(ACTIVATIONS, rows.history.len())?;
        history.upload(0, &rows.history)?;
        let num_counters = if rows.history.is_empty() { 0 } else { logits.len() };
        if sampler.occurrences.as_ref().is_none_or(|counters| counters.len() < num_counters) {
            sampler.occurrences = Some(b.memory.zeroed(ACTIVATIONS, num_counters)?);
        }
        let occurrences = sampler.occurrences.as_mut().expect("there are some now");
        let batch = SamplingBatch { rows: device_rows.all(), bias: bias.all(), history: history.all() };
        let counters = &mut occurrences.slice_mut(0..num_counters);
        sample_rows(b.driver(), &mut logits.all_mut(), &batch, counters, &mut tokens.all_mut())?;
        let mut chosen = vec![0; asks.len()];
        tokens.download(0, &mut chosen)?;
        Ok(chosen)
    };
    choose().map_err(|error| b.failed(error))
}

impl DeviceRows {
    fn push(&mut self, sampling: Option<&RowSampling>, position: usize) {
        let (first_bias, first_history) = (self.bias.len(), self.history.len());
        let mut row = SamplingRow {
            seed: 0,
            position: position as u64,
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            first_bias: first_bias as u32,
            num_bias: 0,
            first_history: first_history as u32,
            num_history: 0,
            prompt_tokens: 0,
        };
        if let Some(RowSampling { params, history, prompt_tokens, .. }) = sampling {
            self.bias.extend(params.logit_bias.iter().map(|&(token_id, bias)| LogitBias { token_id, bias }));
            self.history.extend_from_slice(history);
            row = SamplingRow {
                seed: params.seed,
                temperature: params.temperature,
                top_k: params.top_k,
                top_p: params.top_p,
                min_p: params.min_p,
                repetition_penalty: params.repetition_penalty,
                presence_penalty: params.presence_penalty,
                frequency_penalty: params.frequency_penalty,
                num_bias: (self.bias.len() - first_bias) as u32,
                num_history: history.len() as u32,
                prompt_tokens: *prompt_tokens as u32,
                ..row
            };
        }
        self.rows.push(row);
    }
}
