//! The end of a step on the CPU: logits of the output rows, a tile at a time, and what each row asks of them.

use std::sync::{Mutex, PoisonError};

use ns_llm_kernels::cpu::linear::{PackedLinear, matmul};
use ns_llm_kernels::cpu::logits::max_logit;
use ns_llm_kernels::cpu::{Cpu, embedding};

use super::arena::{Arena, CpuOperand};
use super::internal;
use crate::batch::{Outcome, OutputKind, OutputRow, Sampled};
use crate::error::Result;
use crate::sampler::{SamplerScratch, sample_row};
use std::sync::Arc;

/// Rows whose logits exist at the same time: 32 rows of 150,000 logits are 19 MB.
const TILE_ROWS: usize = 32;

/// Working memory of the threads that sample: as many as ever sampled at once.
#[derive(Default)]
pub(super) struct SamplerScratches(Mutex<Vec<SamplerScratch>>);

impl SamplerScratches {
    fn with<R>(&self, body: impl FnOnce(&mut SamplerScratch) -> R) -> R {
        let lock = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut scratch = lock().pop().unwrap_or_default();
        let result = body(&mut scratch);
        lock().push(scratch);
        result
    }
}

/// A row of logits on its way to an outcome.
struct Row<'a> {
    logits: &'a mut [f32],
    asks: &'a OutputRow,
    outcome: Option<Outcome>,
}

/// Logits of `x` `[outputs, hidden_size]` and what `outputs` asks of them.
pub(super) fn sample(
    cpu: &Cpu,
    arena: &Arc<Arena>,
    scratches: &SamplerScratches,
    (x, output): (&CpuOperand, &PackedLinear),
    outputs: &[OutputRow],
) -> Result<Vec<Sampled>> {
    assert_eq!(x.rows(), outputs.len(), "one row per output");
    let vocab_size = output.out_features();
    let mut sampled = Vec::with_capacity(outputs.len());
    for (tile, asks) in outputs.chunks(TILE_ROWS).enumerate() {
        let mut logits = arena.floats(asks.len() * vocab_size);
        if outputs.len() <= TILE_ROWS {
            matmul(cpu, x, output, &mut logits).map_err(internal)?;
        } else {
            let mut rows = arena.operand(x.format(), asks.len(), x.width());
            embedding::copy_rows(x, tile * TILE_ROWS, &mut rows).map_err(internal)?;
            matmul(cpu, &rows, output, &mut logits).map_err(internal)?;
        }
        let rows = logits.chunks_exact_mut(vocab_size.max(1)).zip(asks);
        let mut rows: Vec<Row<'_>> = rows.map(|(logits, asks)| Row { logits, asks, outcome: None }).collect();
        cpu.pool().for_each_mut(&mut rows, |row| row.outcome = Some(outcome(cpu, scratches, row.logits, row.asks)));
        sampled.extend(rows.into_iter().map(|row| Sampled {
            seq: row.asks.seq,
            position: row.asks.position,
            outcome: row.outcome.expect("each row was visited"),
        }));
    }
    Ok(sampled)
}

/// What [`sample_row`] says; when only the largest logit matters, found in one pass.
fn outcome(cpu: &Cpu, scratches: &SamplerScratches, logits: &mut [f32], asks: &OutputRow) -> Outcome {
    if !is_plain_greedy(asks) {
        return scratches.with(|scratch| sample_row(logits, asks, scratch));
    }
    let max = max_logit(cpu, logits);
    if !max.all_below_infinity || max.value == f32::NEG_INFINITY {
        return Outcome::NonFinite;
    }
    Outcome::Token { token_id: max.index as u32, logprobs: None }
}

/// Whether the row asks for the token with the largest logit and for nothing else.
fn is_plain_greedy(asks: &OutputRow) -> bool {
    let OutputKind::Sample(sampling) = &asks.kind else { return false };
    let params = &sampling.params;
    params.temperature == 0.0 && sampling.logprobs.is_none() && params.logit_bias.is_empty() && !params.reads_history()
}

#[cfg(test)]
mod tests {
    use ns_llm_kernels::cpu::Isa;
    use ns_llm_kernels::cpu::pool::{Pool, PoolPriority};

    use super::*;
    use crate::batch::RowSampling;
    use crate::ids::SeqId;
    use crate::request::SamplingParams;

    /// The short cut for greedy rows says what the sampler says: on ties, masked tokens and rows that are not finite,
    /// at every length around a vector, with every instruction set.
    #[test]
    fn greedy_short_cut_is_the_sampler() {
        let params = Arc::new(SamplingParams::greedy());
        let sampling = RowSampling { params, history: Vec::new(), prompt_tokens: 0, logprobs: None };
        let asks = OutputRow { token_row: 0, seq: SeqId(1), position: 5, kind: OutputKind::Sample(sampling) };
        assert!(is_plain_greedy(&asks));
        let mut scratch = SamplerScratch::default();
        let mut outcomes = [0, 0];
        for isa in Isa::available() {
            let pool = Arc::new(Pool::new(1, PoolPriority::Normal).expect("starts no thread"));
            let cpu = Cpu::with_isa(isa, pool).expect("available");
            for len in [1, 7, 8, 9, 31, 32, 33, 64, 100, 1000] {
                for special in [0.0, 3.0, -0.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                    for at in [0, len / 2, len - 1] {
                        let mut logits: Vec<f32> = (0..len).map(|i| ((i * 7919) % 13) as f32 / 4.0).collect();
                        logits[at] = special;
                        let got = outcome(&cpu, &SamplerScratches::default(), &mut logits.clone(), &asks);
                        let want = sample_row(&mut logits, &asks, &mut scratch);
                        assert_eq!(got, want, "{isa:?}, {len} logits, {special} at {at}");
                        outcomes[usize::from(got == Outcome::NonFinite)] += 1;
                    }
                }
            }
        }
        assert!(outcomes.iter().all(|&count| count > 0), "both outcomes occur: {outcomes:?}");
    }
}
