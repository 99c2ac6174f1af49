//! Paged attention (Kwon et al. 2023, arXiv:2309.06180) with an online softmax (Milakov & Gimelshein 2018,
//! arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135), with grouped query heads (Ainslie et al. 2023,
//! arXiv:2305.13245); causal with an optional sliding window (Jiang et al. 2023, arXiv:2310.06825), or over all keys of
//! the sequence up to the step's last one (Devlin et al. 2018, arXiv:1810.04805).
//!
//! Invariant (row invariance): the result of one query head is one fixed sequence of operations that depends on its
//! query, its position and the keys and values it sees, and on nothing else. Keys are visited in partitions of
//! [`PARTITION_TOKENS`], counted from position 0 whatever the block size, the window or the chunk of the prompt. In a
//! partition: each score is one chain of multiply-adds over `head_dim`; then the maximum, the exponentials and their
//! sum over the lanes in a fixed order; then each output is one chain of multiply-adds over the visible keys. The
//! partition's result is then merged into the running one. Tiles of many queries only run several such chains side by
//! side. A key that a query may not see is never multiplied in: its slot may hold anything, NaN too.
//!
//! Where keys and values have scales, the products are of the numbers without them: a score is multiplied by its key's
//! scale once, and a weight, after it was summed up, by its value's.
//!
//! This file walks sequences, heads and partitions; the arithmetic of one partition is in `scalar`, `avx2`, ...

use std::cell::RefCell;
use std::ops::Range;

use half::{bf16, f16};

use crate::cpu::Cpu;
use crate::cpu::kv_blocks::{CHUNK_TOKENS, KvBlocks, KvBlocksLayout, KvDtype, KvElement};
use crate::cpu::linear::{Operand, OperandWriter};
use crate::error::{Error, Result};

/// Keys that are visited at once. Part of the numerics: another value gives other bits.
pub const PARTITION_TOKENS: usize = 64;
/// Chunks of a partition.
pub(crate) const PARTITION_CHUNKS: usize = PARTITION_TOKENS / CHUNK_TOKENS;
/// Rows (query × head of the group) that share one pass over a head's keys. Enough to pay for converting the keys and
/// values of a partition, few enough that the running outputs stay in the L2 cache.
const ITEM_ROWS: usize = 96;
/// Less work than this (in multiply-adds) is done by the caller: waking the pool would cost more than it saves.
const MIN_PARALLEL_MACS: usize = 64 << 10;

/// Sizes and constants of the attention of one layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Factor of the scores.
    pub scale: f32,
    /// A query sees this many keys, its own with them; `None`: all.
    pub sliding_window_tokens: Option<usize>,
    /// Whether a query sees no key behind its own; otherwise it sees those of its sequence's last row in the step too,
    /// and there is no window.
    pub causal: bool,
}

/// The rows of one sequence in a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttentionSequence {
    /// Its rows in `q` and in the result.
    pub rows: Range<usize>,
    /// Position of the first of them; the others follow it one by one.
    pub first_position: usize,
    /// Its entries of `block_tables`, in the order of positions; they cover the last row's position.
    pub blocks: Range<usize>,
}

/// The queries of a step.
#[derive(Debug, Clone, Copy)]
pub struct AttentionBatch<'a> {
    /// `[rows, heads * head_dim]`, rows `q_stride` elements apart.
    pub q: &'a [f32],
    /// Elements between two rows of `q`.
    pub q_stride: usize,
    /// The sequences, in the order of their rows.
    pub sequences: &'a [AttentionSequence],
    /// Blocks of all sequences.
    pub block_tables: &'a [u32],
}

/// Attention of one partition, merged into the scratch; by element type of the blocks.
pub(crate) struct AttentionKernels {
    pub(crate) f32: PartitionKernel<f32>,
    pub(crate) f16: PartitionKernel<f16>,
    pub(crate) bf16: PartitionKernel<bf16>,
    pub(crate) int8: PartitionKernel<i8>,
}

/// # Safety
/// The CPU has the instruction set of the table that holds the function.
pub(crate) type PartitionKernel<E> = unsafe fn(&AttentionItem<'_>, &Partition<'_, E>, &mut Scratch);

/// Attention of each row of `batch.q` over the blocks of its own sequence, in layer `layer_idx`; `out` is `[rows, heads *
/// head_dim]`. Rows of `out` that belong to no sequence are left as they are.
pub fn paged_attention(
    cpu: &Cpu,
    (layer_idx, shape): (usize, &AttentionShape),
    batch: &AttentionBatch<'_>,
    kv: &KvBlocks,
    out: &mut Operand,
) -> Result<()> {
    shape.check(OPERATION, layer_idx, kv.layout())?;
    batch.check(shape, kv.layout(), out)?;
    let step = AttentionStep { cpu, shape, layer_idx, batch, kv, out: out.writer(cpu) };
    match kv.layout().dtype {
        KvDtype::F32 => step.run(cpu.kernels().attention.f32),
        KvDtype::F16 => step.run(cpu.kernels().attention.f16),
        KvDtype::Bf16 => step.run(cpu.kernels().attention.bf16),
        KvDtype::Int8 => step.run(cpu.kernels().attention.int8),
    }
    Ok(())
}

/// Name in errors.
const OPERATION: &str = "paged_attention";

fn below(index: &'static str, value: usize, limit: usize) -> Result<()> {
    match value < limit {
        true => Ok(()),
        false => Err(Error::IndexOutOfRange { operation: OPERATION, index, value, limit }),
    }
}

impl AttentionBatch<'_> {
    fn check(&self, shape: &AttentionShape, layout: &KvBlocksLayout, out: &Operand) -> Result<()> {
        let width = shape.num_heads * shape.head_dim;
        if out.width() != width {
            let (operation, dimension, actual) = (OPERATION, "out width", out.width());
            return Err(Error::SizeMismatch { operation, dimension, expected: width, actual });
        }
        let mut next_row = 0;
        for sequence in self.sequences {
            let Range { start, end } = sequence.rows;
            // Ascending: no two sequences write one row.
            below("end of the rows before", next_row, start + 1)?;
            below("first row of a sequence", start, end + 1)?;
            below("last row of a sequence", end, out.rows() + 1)?;
            next_row = end;
            below("first block of a sequence", sequence.blocks.start, sequence.blocks.end + 1)?;
            below("last block of a sequence", sequence.blocks.end, self.block_tables.len() + 1)?;
            if start < end {
                below("element of q", (end - 1) * self.q_stride + width - 1, self.q.len())?;
                let last_position = sequence.first_position + (end - start - 1);
                below("position", last_position, sequence.blocks.len() * layout.block_tokens)?;
            }
            for &block in &self.block_tables[sequence.blocks.clone()] {
                below("block", block as usize, layout.num_blocks)?;
            }
        }
        Ok(())
    }
}

impl AttentionShape {
    /// Elements of a row of q, k and v together.
    pub(crate) fn qkv_width(&self) -> usize {
        (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
    }
    /// Query heads per kv head.
    pub(crate) fn group(&self) -> usize {
        self.num_heads / self.num_kv_heads
    }
    /// Fails unless the shape is possible and the blocks are made for it.
    pub(crate) fn check(&self, operation: &'static str, layer_idx: usize, layout: &KvBlocksLayout) -> Result<()> {
        let equal = |dimension, expected, actual| match expected == actual {
            true => Ok(()),
            false => Err(Error::SizeMismatch { operation, dimension, expected, actual }),
        };
        equal("num_kv_heads", layout.num_kv_heads, self.num_kv_heads)?;
        equal("head_dim", layout.head_dim, self.head_dim)?;
        if self.num_heads == 0 || !self.num_heads.is_multiple_of(self.num_kv_heads) {
            let (dimension, value, expected) = ("num_heads", self.num_heads, "a multiple of num_kv_heads, not 0");
            return Err(Error::InvalidSize { operation, dimension, value, expected });
        }
        if self.sliding_window_tokens == Some(0) {
            let (dimension, value, expected) = ("sliding_window_tokens", 0, "at least 1: a query sees its own key");
            return Err(Error::InvalidSize { operation, dimension, value, expected });
        }
        if let (false, Some(value)) = (self.causal, self.sliding_window_tokens) {
            let (dimension, expected) = ("sliding_window_tokens", "none: the attention is not causal");
            return Err(Error::InvalidSize { operation, dimension, value, expected });
        }
        if layer_idx >= layout.num_layers {
            let (index, value, limit) = ("layer_idx", layer_idx, layout.num_layers);
            return Err(Error::IndexOutOfRange { operation, index, value, limit });
        }
        Ok(())
    }
}

/// One call of [`paged_attention`], its arguments checked.
struct AttentionStep<'a> {
    cpu: &'a Cpu,
    shape: &'a AttentionShape,
    layer_idx: usize,
    batch: &'a AttentionBatch<'a>,
    kv: &'a KvBlocks,
    out: OperandWriter<'a>,
}

impl AttentionStep<'_> {
    /// Items are (kv head, sequence, chunk of queries), kv heads slowest: the shares of the threads are then of equal
    /// cost also when there is one long sequence, and a thread stays with its heads.
    fn run<E: KvElement>(&self, kernel: PartitionKernel<E>) {
        let sequences = self.batch.sequences;
        let item_queries = self.item_queries();
        // Where each sequence's chunks begin: searching the sequences themselves for every item would take a time that
        // grows with their square.
        let mut first_chunks = Vec::with_capacity(sequences.len());
        let mut num_chunks = 0;
        for sequence in sequences {
            first_chunks.push(num_chunks);
            num_chunks += sequence.rows.len().div_ceil(item_queries);
        }
        let run_items = |items: Range<usize>| {
            SCRATCH.with_borrow_mut(|scratch| {
                for item in items {
                    let (kv_head, chunk) = (item / num_chunks, item % num_chunks);
                    // A sequence without rows begins where the next one does: the last one that has begun is meant.
                    let idx = first_chunks.partition_point(|&first| first <= chunk) - 1;
                    self.attend(kernel, &sequences[idx], chunk - first_chunks[idx], kv_head, scratch);
                }
            });
        };
        let num_items = num_chunks * self.shape.num_kv_heads;
        if self.num_macs() < MIN_PARALLEL_MACS {
            run_items(0..num_items);
        } else {
            self.cpu.pool().run(num_items, 1, run_items);
        }
    }

    /// Queries of an item at most.
    fn item_queries(&self) -> usize {
        (ITEM_ROWS / self.shape.group()).max(1)
    }

    /// Multiply-adds of the step at most.
    fn num_macs(&self) -> usize {
        let keys = |s: &AttentionSequence| s.rows.len() * (s.first_position + s.rows.len());
        2 * self.shape.num_heads * self.shape.head_dim * self.batch.sequences.iter().map(keys).sum::<usize>()
    }

    /// One item: all partitions that its rows see, in order, then the results into `out`.
    fn attend<E: KvElement>(
        &self,
        kernel: PartitionKernel<E>,
        sequence: &AttentionSequence,
        chunk: usize,
        kv_head: usize,
        scratch: &mut Scratch,
    ) {
        let (shape, group) = (self.shape, self.shape.group());
        let first_query = chunk * self.item_queries();
        let first_row = sequence.rows.start + first_query;
        let first_head = kv_head * group;
        let item = AttentionItem {
            q: &self.batch.q[first_row * self.batch.q_stride + first_head * shape.head_dim..],
            q_stride: self.batch.q_stride,
            num_queries: self.item_queries().min(sequence.rows.len() - first_query),
            group,
            head_dim: shape.head_dim,
            scale: shape.scale,
            first_position: sequence.first_position + first_query,
            common_end: if shape.causal { 0 } else { sequence.first_position + sequence.rows.len() },
            window: shape.sliding_window_tokens.unwrap_or(usize::MAX),
        };
        let block_table = &self.batch.block_tables[sequence.blocks.clone()];
        scratch.begin(&item);
        let first_key = (item.first_position + 1).saturating_sub(item.window);
        let first_partition = first_key / PARTITION_TOKENS * PARTITION_TOKENS;
        let end = item.common_end.max(item.first_position + item.num_queries);
        let gather = |start| Partition::<E>::gather(self.kv, self.layer_idx, kv_head, block_table, start);
        let mut partition = gather(first_partition);
        for next_start in (first_partition + PARTITION_TOKENS..end).step_by(PARTITION_TOKENS) {
            let next = gather(next_start);
            partition.soon = Some((next.keys, next.values));
            // SAFETY: a `Cpu` holds only kernels of an instruction set that this machine has.
            unsafe { kernel(&item, &partition, scratch) };
            partition = next;
        }
        // SAFETY: as above.
        unsafe { kernel(&item, &partition, scratch) };
        for row in 0..item.num_rows() {
            let column = (first_head + row % group) * shape.head_dim;
            let values = &scratch.finish_row(row)[..shape.head_dim];
            // SAFETY: rows of sequences do not overlap (checked), and an item is one thread's.
            unsafe { self.out.store(first_row + row / group, column, values) };
        }
    }
}

/// Consecutive queries of one sequence, and the heads that share one kv head: the unit of work.
pub(crate) struct AttentionItem<'a> {
    /// Query of the first row's first head, and all that follows.
    pub(crate) q: &'a [f32],
    /// Elements between two tokens of `q`.
    pub(crate) q_stride: usize,
    pub(crate) num_queries: usize,
    /// Query heads per kv head.
    pub(crate) group: usize,
    pub(crate) head_dim: usize,
    pub(crate) scale: f32,
    /// Position of the first query.
    pub(crate) first_position: usize,
    /// Every query sees the keys before this position, those behind its own too; 0 where attention is causal.
    pub(crate) common_end: usize,
    /// A query sees this many keys at most.
    pub(crate) window: usize,
}

impl AttentionItem<'_> {
    /// Rows are (query, head of the group), heads fastest.
    pub(crate) fn num_rows(&self) -> usize {
        self.num_queries * self.group
    }
    /// Where the query of row `row` starts in `q`.
    #[inline]
    pub(crate) fn q_offset(&self, row: usize) -> usize {
        row / self.group * self.q_stride + row % self.group * self.head_dim
    }
    /// Keys of the partition that begins at position `start` that row `row` sees.
    #[inline]
    pub(crate) fn visible(&self, row: usize, start: usize) -> Range<usize> {
        let own_end = self.first_position + row / self.group + 1;
        let (first, end) = (own_end.saturating_sub(self.window), own_end.max(self.common_end));
        first.saturating_sub(start).min(PARTITION_TOKENS)..end.saturating_sub(start).min(PARTITION_TOKENS)
    }
}

/// Keys and values of one partition, as four chunks of 16 tokens. A chunk behind the end of the block table is empty:
/// no query sees it.
pub(crate) struct Partition<'a, E> {
    /// Position of the first key.
    pub(crate) start: usize,
    /// Each `[head_dim][key_stride]`, of which the first 16 are the chunk.
    pub(crate) keys: [&'a [E]; PARTITION_CHUNKS],
    pub(crate) key_stride: usize,
    /// Each `[16][value_stride]`.
    pub(crate) values: [&'a [E]; PARTITION_CHUNKS],
    pub(crate) value_stride: usize,
    /// Of elements that have them.
    pub(crate) scales: Option<Scales>,
    /// Keys and values of the partition that will be read next, to be fetched while this one is computed.
    pub(crate) soon: Option<PartitionChunks<'a, E>>,
}

/// Keys and values of the chunks of a partition.
pub(crate) type PartitionChunks<'a, E> = ([&'a [E]; PARTITION_CHUNKS], [&'a [E]; PARTITION_CHUNKS]);

/// Scales of the 64 keys and values of a partition, those of empty chunks zero.
pub(crate) struct Scales {
    pub(crate) keys: [Line; PARTITION_CHUNKS],
    pub(crate) values: [Line; PARTITION_CHUNKS],
}

impl<'a, E: KvElement> Partition<'a, E> {
    fn gather(kv: &'a KvBlocks, layer_idx: usize, kv_head: usize, block_table: &[u32], start: usize) -> Self {
        let layout = kv.layout();
        let (key_stride, value_stride) = (layout.block_tokens, layout.value_stride());
        let (mut keys, mut values): ([&[E]; PARTITION_CHUNKS], [&[E]; PARTITION_CHUNKS]) = Default::default();
        let zeros = [Line([0.0; 16]); PARTITION_CHUNKS];
        let mut scales = (E::DTYPE == KvDtype::Int8).then_some(Scales { keys: zeros, values: zeros });
        for chunk in 0..PARTITION_CHUNKS {
            let token = start + chunk * CHUNK_TOKENS;
            let Some(&block_id) = block_table.get(token / layout.block_tokens) else { break };
            let head = &kv.elements::<E>()[layout.head_range(block_id as usize, layer_idx, kv_head)];
            let (head_keys, head_values) = head[..layout.scales_start()].split_at(layout.keys_len());
            let offset = token % layout.block_tokens;
            keys[chunk] = &head_keys[offset..];
            values[chunk] = &head_values[offset * value_stride..];
            if let Some(scales) = &mut scales {
                let (of_keys, of_values) = kv.scales(block_id as usize, layer_idx, kv_head);
                scales.keys[chunk].0.copy_from_slice(&of_keys[offset..][..CHUNK_TOKENS]);
                scales.values[chunk].0.copy_from_slice(&of_values[offset..][..CHUNK_TOKENS]);
            }
        }
        Partition { start, keys, key_stride, values, value_stride, scales, soon: None }
    }
}

/// 16 floats, a cache line: the unit of all scratch, so that no vector load crosses a line.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Line(pub(crate) [f32; 16]);

impl Line {
    /// The floats of consecutive lines.
    #[inline]
    pub(crate) fn floats(lines: &[Line]) -> &[f32] {
        // SAFETY: a line is 16 floats without padding, and the slice covers them all.
        unsafe { std::slice::from_raw_parts(lines.as_ptr().cast(), 16 * lines.len()) }
    }
    /// The same, for writing.
    #[inline]
    pub(crate) fn floats_mut(lines: &mut [Line]) -> &mut [f32] {
        // SAFETY: as above; the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), 16 * lines.len()) }
    }
}

/// Working memory of one thread. It grows to the largest item and is then reused.
#[derive(Default)]
pub(crate) struct Scratch {
    /// `[rows][64]`: scores, then their exponentials.
    pub(crate) scores: Vec<[Line; PARTITION_CHUNKS]>,
    /// `[rows][out_lines]` running outputs, not yet divided by `sum`.
    pub(crate) out: Vec<Line>,
    /// Lines of one row of `out`.
    pub(crate) out_lines: usize,
    /// Running softmax of each row.
    pub(crate) rows: Vec<RowState>,
    /// `[4][head_dim][16]`: keys of a partition as f32, for tiles of many rows.
    pub(crate) keys: Vec<Line>,
    /// `[head_dim / 16][64][16]`: values of a partition as f32.
    pub(crate) values: Vec<Line>,
}

/// Online softmax of one row.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RowState {
    /// Largest score so far.
    pub(crate) max: f32,
    /// Sum of `exp(score - max)` so far.
    pub(crate) sum: f32,
    /// Factor of what was there before the partition at hand.
    pub(crate) keep: f32,
    /// Factor of what the partition at hand adds.
    pub(crate) add: f32,
}

impl Scratch {
    fn begin(&mut self, item: &AttentionItem<'_>) {
        let rows = item.num_rows();
        self.out_lines = item.head_dim.div_ceil(16);
        self.scores.resize(self.scores.len().max(rows), [Line([0.0; 16]); PARTITION_CHUNKS]);
        self.out.clear();
        self.out.resize(rows * self.out_lines, Line([0.0; 16]));
        self.rows.clear();
        self.rows.resize(rows, RowState { max: f32::NEG_INFINITY, sum: 0.0, keep: 0.0, add: 0.0 });
    }

    /// Result of one row, after its last partition.
    fn finish_row(&mut self, row: usize) -> &[f32] {
        let factor = 1.0 / self.rows[row].sum;
        let values = Line::floats_mut(&mut self.out[row * self.out_lines..(row + 1) * self.out_lines]);
        values.iter_mut().for_each(|value| *value *= factor);
        values
    }
}

impl RowState {
    /// Takes in a partition with maximum `max` and sum of exponentials `sum`.
    #[inline]
    pub(crate) fn merge(&mut self, max: f32, sum: f32, exp: impl Fn(f32) -> f32) {
        let new_max = if max > self.max { max } else { self.max };
        self.keep = if self.max == f32::NEG_INFINITY { 0.0 } else { exp(self.max - new_max) };
        self.add = exp(max - new_max);
        self.sum = self.sum * self.keep + sum * self.add;
        self.max = new_max;
    }
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}
