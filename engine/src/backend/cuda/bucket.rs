//! Steps that look alike to kernels: those in which each row is the last token of a sequence and asks for the next one.
//! Their number of rows is rounded up to a power of two, and so is the number of spans of 256 keys that attention splits
//! the longest context into; what is left of a step is then numbers in a buffer of fixed layout, which is written by one
//! copy. So all steps of a bucket are the same launches with the same arguments, and can be captured once.
//!
//! Rows that are nobody's write no key, see none, and draw a token that nobody reads. No row's bits depend on the bucket:
//! kernels give them in any number of rows, and the split of attention is one of positions.

use ns_llm_kernels::cuda::attention::{SPAN_KEYS, SequenceRows};
use ns_llm_kernels::cuda::sampling::SamplingRow;

use super::device_rows::{DeviceRows, on_device};
use crate::backend::StepLimits;
use crate::batch::{Batch, OutputKind, OutputRow};
use crate::ids::SeqId;

/// A slot that no block has: nothing is written.
const NO_SLOT: u32 = u32::MAX;
/// No row of the step before.
const NO_SOURCE: u32 = u32::MAX;
/// Numbers of a row of a sequence in attention.
const SEQUENCE_WORDS: usize = size_of::<SequenceRows>() / size_of::<u32>();
/// Numbers of a row: how it is sampled, its sequence, and five of one number.
const ROW_WORDS: usize = SamplingRow::NUM_WORDS + SEQUENCE_WORDS + 5;
/// Room for biases and histories of all rows, in numbers; a step with more is launched kernel by kernel.
const ASKED_WORDS: usize = 1 << 16;
/// Most entries of block tables that there is room for. Sequences may share blocks, so those of a step are not bounded by
/// the pool.
const MAX_TABLE_WORDS: usize = 1 << 22;

/// Most rows. Steps of more take milliseconds, so that launching their kernels one by one does not show.
const MAX_ROWS: usize = 256;
/// Most bytes of partial results of attention. Steps that have more (many sequences with long contexts) take long enough
/// that launching their kernels one by one does not show.
const MAX_PARTIAL_BYTES: usize = 64 << 20;

/// What all steps that are captured together have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Bucket {
    pub(super) rows: usize,
    /// Of the longest context.
    pub(super) spans: usize,
}

/// Where the numbers of a bucket begin, in the order in which they lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Places {
    pub(super) sampling: usize,
    pub(super) sequences: usize,
    pub(super) given: usize,
    pub(super) sources: usize,
    pub(super) positions: usize,
    pub(super) slots: usize,
    pub(super) output_rows: usize,
    /// Biases, histories and block tables, as long as they happen to be.
    rest: usize,
}

impl Bucket {
    /// Where the step belongs; `None`: it is none of these.
    pub(super) fn of(batch: &Batch, limits: &StepLimits) -> Option<Bucket> {
        let rows = batch.num_tokens();
        let is_alone = |(row, output): (usize, &OutputRow)| output.token_row == row && on_device(output).is_some();
        let decodes = batch.sequences.len() == rows
            && batch.outputs.len() == rows
            && batch.outputs.iter().enumerate().all(is_alone);
        if rows == 0 || rows > max_rows(limits) || !decodes {
            return None;
        }
        let context_tokens = batch.sequences.iter().map(|sequence| sequence.context_tokens).max()?;
        let bucket = Bucket {
            rows: rows.next_power_of_two().min(max_rows(limits)),
            spans: context_tokens.div_ceil(SPAN_KEYS).next_power_of_two(),
        };
        (bucket.partials_len(limits) * size_of::<f32>() <= MAX_PARTIAL_BYTES).then_some(bucket)
    }

    /// Numbers of the partial results of attention.
    fn partials_len(&self, limits: &StepLimits) -> usize {
        self.rows * self.spans * limits.num_heads * (limits.head_dim + 2)
    }

    /// Most bytes of partial results of a bucket within these limits, and of those of all buckets together: they are rows
    /// times spans, in powers of two but for the largest number of rows, and steps with the same product share them.
    pub(super) fn partial_bytes(limits: &StepLimits) -> usize {
        let spans = limits.context_tokens.div_ceil(SPAN_KEYS).next_power_of_two();
        let largest = Bucket { rows: max_rows(limits), spans };
        let bytes = (largest.partials_len(limits) * size_of::<f32>()).min(MAX_PARTIAL_BYTES);
        // Two series that double, and what sizes are rounded up by.
        5 * bytes
    }

    /// All numbers of rows that buckets have.
    pub(super) fn all_rows(limits: &StepLimits) -> impl Iterator<Item = usize> {
        let (max_rows, powers) = (max_rows(limits), std::iter::successors(Some(1_usize), |rows| rows.checked_mul(2)));
        powers.take_while(move |rows| *rows < max_rows).chain([max_rows])
    }

    /// Tokens of the longest context that it takes.
    pub(super) fn context_tokens(&self) -> usize {
        self.spans * SPAN_KEYS
    }

    /// Numbers that the buffer of all buckets holds.
    pub(super) fn buffer_len(limits: &StepLimits) -> usize {
        let tables = max_rows(limits).saturating_mul(limits.context_tokens.div_ceil(limits.block_tokens));
        max_rows(limits) * ROW_WORDS + ASKED_WORDS + tables.min(MAX_TABLE_WORDS)
    }

    pub(super) fn places(&self) -> Places {
        let sequences = self.rows * SamplingRow::NUM_WORDS;
        let given = sequences + self.rows * SEQUENCE_WORDS;
        let [sources, positions, slots, output_rows, end] = std::array::from_fn(|i| given + (i + 1) * self.rows);
        // An entry of the biases is two numbers, and is counted in entries.
        Places { sampling: 0, sequences, given, sources, positions, slots, output_rows, rest: end.next_multiple_of(2) }
    }

    /// The numbers of a step, row by row; `None`: there are more than `max_len`.
    pub(super) fn numbers(&self, batch: &Batch, max_len: usize) -> Option<Vec<u32>> {
        let places = self.places();
        let mut asks = DeviceRows::default();
        for output in &batch.outputs {
            asks.push(on_device(output), output.position);
        }
        let first_history = places.rest + 2 * asks.bias.len();
        let first_table = first_history + asks.history.len();
        let len = first_table + batch.block_tables.len();
        if len > max_len {
            return None;
        }
        let mut numbers = vec![0; len];
        let mut write = |start: usize, values: &[u32]| numbers[start..start + values.len()].copy_from_slice(values);
        for row in 0..self.rows {
            let sampling = asks.rows.get(row).map_or(SamplingRow::GREEDY, |asked| SamplingRow {
                first_bias: asked.first_bias + (places.rest / 2) as u32,
                first_history: asked.first_history + first_history as u32,
                ..*asked
            });
            let sequence = batch.sequences.get(row).map_or(SequenceRows::NONE, |sequence| {
                let position = sequence.context_tokens - 1;
                SequenceRows::one(row as u32, position as u32, (first_table + sequence.blocks.start) as u32)
            });
            let number = |values: &[u32], nobodys: u32| values.get(row).copied().unwrap_or(nobodys);
            write(places.sampling + row * SamplingRow::NUM_WORDS, &sampling.words());
            write(places.sequences + row * SEQUENCE_WORDS, &sequence.words());
            write(places.given + row, &[number(&batch.token_ids, 0)]);
            write(places.sources + row, &[NO_SOURCE]);
            write(places.positions + row, &[number(&batch.positions, 0)]);
            write(places.slots + row, &[number(&batch.slots, NO_SLOT)]);
            write(places.output_rows + row, &[row as u32]);
        }
        for feedback in &batch.feedback {
            write(places.sources + feedback.token_row, &[feedback.output_row as u32]);
        }
        for (i, bias) in asks.bias.iter().enumerate() {
            write(places.rest + 2 * i, &[bias.token_id, bias.bias.to_bits()]);
        }
        write(first_history, &asks.history);
        for (i, block) in batch.block_tables.iter().enumerate() {
            write(first_table + i, &[block.0]);
        }
        Some(numbers)
    }

    /// A batch of as many rows: what a model sees of a step whose numbers are on the device.
    pub(super) fn batch(&self) -> Batch {
        let output = |row| {
            let kind = OutputKind::Score { target: 0, top: 0 };
            OutputRow { token_row: row, seq: SeqId(0), position: 0, kind }
        };
        Batch {
            token_ids: vec![0; self.rows],
            positions: vec![0; self.rows],
            slots: vec![NO_SLOT; self.rows],
            outputs: (0..self.rows).map(output).collect(),
            ..Batch::default()
        }
    }
}

/// Rows of the largest bucket.
pub(super) fn max_rows(limits: &StepLimits) -> usize {
    limits.max_sequences.min(MAX_ROWS)
}

/// Where each token's id comes from, for a step that is in no bucket: rows of the step before.
pub(super) fn sources(batch: &Batch) -> Vec<u32> {
    let mut sources = vec![NO_SOURCE; batch.num_tokens()];
    for feedback in &batch.feedback {
        sources[feedback.token_row] = feedback.output_row as u32;
    }
    sources
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: StepLimits = StepLimits {
        max_tokens: 64,
        max_sequences: 24,
        context_tokens: 4_096,
        block_tokens: 16,
        num_heads: 8,
        head_dim: 64,
        max_graphs: 8,
    };

    /// Numbers of rows are powers of two up to the most that there can be, which is one itself; parts of a bucket do not overlap.
    #[test]
    fn buckets_cover_all_steps() {
        let all_rows = |max_sequences| Bucket::all_rows(&StepLimits { max_sequences, ..LIMITS }).collect::<Vec<_>>();
        assert_eq!(all_rows(24), [1, 2, 4, 8, 16, 24]);
        assert_eq!(all_rows(1), [1]);
        assert_eq!(all_rows(8), [1, 2, 4, 8]);
        assert_eq!(all_rows(4_096).last(), Some(&MAX_ROWS));
        for rows in all_rows(24) {
            let places = Bucket { rows, spans: 1 }.places();
            assert_eq!(places.sequences, 16 * rows);
            assert_eq!(places.given - places.sequences, 4 * rows);
            assert_eq!(places.rest, (25 * rows).next_multiple_of(2));
            assert!(Bucket::buffer_len(&LIMITS) >= places.rest + ASKED_WORDS);
        }
    }

    /// A prompt, or a batch of more sequences than run, is none of these.
    #[test]
    fn other_steps_have_no_bucket() {
        let bucket = Bucket { rows: 2, spans: 1 };
        assert_eq!(Bucket::of(&bucket.batch(), &LIMITS), None, "rows that score");
        assert_eq!(Bucket::of(&Batch::default(), &LIMITS), None, "no row");
    }
}
