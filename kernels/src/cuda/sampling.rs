//! Launches `sampling.cu`: from rows of logits to tokens, with the results of the engine's sampler.

use super::launch::{Argument, Launch, Sizes, Slice, SliceMut, Stream};
use crate::error::Result;
use crate::host::Plain;

/// Threads of a block (`kSamplingThreads`).
const THREADS: u32 = 1024;
/// Tokens of a vocabulary at most: sums of so many weights fit 64 bits.
pub const MAX_VOCAB_SIZE: usize = 1 << 23;
/// What is written for a row that is not finite.
pub const NO_TOKEN: u32 = u32::MAX;

/// How the token of a row is chosen: `SamplingRow` of `sampling.cu`. Values are in the ranges that a request may have.
#[derive(Debug, Clone, Copy, PartialEq)]
#[repr(C)]
pub struct SamplingRow {
    /// Seed of the request.
    pub seed: u64,
    /// Position of the token that is drawn.
    pub position: u64,
    /// 0: the largest logit.
    pub temperature: f32,
    /// 0: all.
    pub top_k: u32,
    /// 1: all.
    pub top_p: f32,
    /// 0: all.
    pub min_p: f32,
    /// 1: none.
    pub repetition_penalty: f32,
    /// 0: none.
    pub presence_penalty: f32,
    /// 0: none.
    pub frequency_penalty: f32,
    /// Where its entries of the bias begin.
    pub first_bias: u32,
    /// How many they are; each token once.
    pub num_bias: u32,
    /// Where its tokens in the history begin, prompt first.
    pub first_history: u32,
    /// How many they are; 0 where no penalty is asked for.
    pub num_history: u32,
    /// How many of them are the prompt.
    pub prompt_tokens: u32,
}

impl SamplingRow {
    /// The largest logit, changed by nothing.
    pub const GREEDY: SamplingRow = SamplingRow {
        seed: 0,
        position: 0,
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        first_bias: 0,
        num_bias: 0,
        first_history: 0,
        num_history: 0,
        prompt_tokens: 0,
    };
    /// Numbers of 32 bits that a row takes.
    pub const NUM_WORDS: usize = size_of::<SamplingRow>() / size_of::<u32>();

    /// As it lies in memory.
    pub fn words(&self) -> [u32; SamplingRow::NUM_WORDS] {
        let [seed_low, seed_high] = halves(self.seed);
        let [position_low, position_high] = halves(self.position);
        [
            seed_low,
            seed_high,
            position_low,
            position_high,
            self.temperature.to_bits(),
            self.top_k,
            self.top_p.to_bits(),
            self.min_p.to_bits(),
            self.repetition_penalty.to_bits(),
            self.presence_penalty.to_bits(),
            self.frequency_penalty.to_bits(),
            self.first_bias,
            self.num_bias,
            self.first_history,
            self.num_history,
            self.prompt_tokens,
        ]
    }
}

/// Lower and upper half, in the order of a little-endian memory, which every host of a CUDA device has.
fn halves(value: u64) -> [u32; 2] {
    [value as u32, (value >> 32) as u32]
}

/// What is added to one token's logit.
#[derive(Debug, Clone, Copy, PartialEq)]
#[repr(C)]
pub struct LogitBias {
    /// Whose logit.
    pub token_id: u32,
    /// How much.
    pub bias: f32,
}

// SAFETY: `repr(C)`, two `u64` and twelve fields of 4 bytes: every bit pattern is a value, and there is no padding.
unsafe impl Plain for SamplingRow {}
// SAFETY: as above, of two fields of 4 bytes.
unsafe impl Plain for LogitBias {}

/// Rows to choose tokens for, in a device's memory. Token ids of bias and history are below the size of the vocabulary.
#[derive(Debug, Clone, Copy)]
pub struct SamplingBatch<'a> {
    /// One for each row of logits.
    pub rows: Slice<'a, SamplingRow>,
    /// Entries of all rows.
    pub bias: Slice<'a, LogitBias>,
    /// Tokens of all rows.
    pub history: Slice<'a, u32>,
}

/// Chooses a token for each row of `logits` `[rows, vocab_size]`, which are overwritten; [`NO_TOKEN`] for a row with a NaN,
/// `+inf` or nothing but `-inf`. `occurrences` `[rows, vocab_size]` holds zeros between launches.
pub fn sample_rows(
    stream: &impl Stream,
    logits: &mut SliceMut<'_, f32>,
    batch: &SamplingBatch<'_>,
    occurrences: &mut SliceMut<'_, u32>,
    tokens: &mut SliceMut<'_, u32>,
) -> Result<()> {
    let (sizes, num_rows) = (Sizes { operation: "sample_rows" }, batch.rows.len());
    sizes.equal("tokens", num_rows, tokens.len())?;
    if num_rows == 0 {
        return Ok(());
    }
    let vocab_size = logits.len() / num_rows;
    sizes.equal("logits", num_rows * vocab_size, logits.len())?;
    sizes.require("vocab_size", vocab_size, (1..=MAX_VOCAB_SIZE).contains(&vocab_size), "1 to 8,388,608")?;
    if batch.history.len() > 0 {
        sizes.equal("occurrences", logits.len(), occurrences.len())?;
    }
    stream.launch(&Launch {
        file: "sampling",
        kernel: "sample_rows",
        grid: [sizes.blocks("rows", num_rows)?, 1, 1],
        threads: THREADS,
        shared_bytes: 0,
        arguments: &[
            logits.argument(),
            Argument::Int(vocab_size as i32),
            batch.rows.argument(),
            batch.bias.argument(),
            batch.history.argument(),
            occurrences.argument(),
            tokens.argument(),
        ],
    })
}
