//! Paged attention (Kwon et al. 2023, arXiv:2309.06180) on a device: who of a step's sequences is computed by which kernel.
//!
//! Both kernels give the same bits for a row (`attention.cuh` says how), so the choice is one of speed: few rows go to
//! `attention_decode.cu`, which splits the keys of a sequence, many to `attention_prefill.cu`, which splits its queries.

use std::ops::Range;

use super::attention_decode;
use super::attention_prefill;
use super::kv_blocks::{KvBlocks, KvDtype};
use super::launch::{DeviceStruct, Sizes, Slice, SliceMut, Stream};
use crate::cpu::attention::AttentionSequence;
use crate::error::{Error, Result};
use crate::host::Plain;

/// Keys of a span (`kSpanKeys`), the part of a sequence that a block of decode has. Part of the numerics.
pub const SPAN_KEYS: usize = 256;
/// Rows of a warp's products (`kTileRows`). A sequence with no more is computed by `attention_decode.cu`.
pub(super) const TILE_ROWS: usize = 16;
/// Threads of a block of either kernel.
pub(super) const THREADS: u32 = 128;
/// Width of heads that there are kernels for.
pub const HEAD_DIMS: [usize; 6] = [32, 64, 80, 96, 128, 256];
/// The widest head that `attention_prefill.cu` takes.
const MAX_PREFILL_HEAD_DIM: usize = 128;

/// Name in errors.
pub(super) const SIZES: Sizes = Sizes { operation: "paged_attention" };

/// Constants of the attention of one layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionLayer {
    /// Which layer's blocks are read.
    pub layer_idx: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Factor of the scores, above 0.
    pub scale: f32,
    /// A query sees this many keys, its own with them; `None`: all.
    pub sliding_window_tokens: Option<usize>,
    /// Whether a query sees no key behind its own.
    pub causal: bool,
}

/// Type of numbers that attention reads as queries or writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ActivationType {
    /// IEEE 754 single precision.
    F32,
    /// IEEE 754 half precision.
    F16,
    /// bfloat16.
    Bf16,
}

/// Rows of activations in a device's memory: `rows` rows, `stride` numbers from one to the next.
#[derive(Debug, Clone, Copy)]
pub struct ActivationRows<'a> {
    /// All bytes, those between the rows too.
    pub bytes: Slice<'a, u8>,
    /// How a number is stored.
    pub activation_type: ActivationType,
    /// Numbers between two rows; even.
    pub stride: usize,
}

/// `AttentionSequence` of `attention.cuh`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct SequenceRows {
    first_row: u32,
    num_queries: u32,
    first_position: u32,
    first_block: u32,
}

/// `PrefillTile` of `attention_prefill.cu`: 64 rows of a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct PrefillTile {
    sequence: u32,
    tile: u32,
}

// SAFETY: `repr(C)`, of `u32` alone: every bit pattern is a value, and there is no padding.
unsafe impl Plain for SequenceRows {}
// SAFETY: as above.
unsafe impl Plain for PrefillTile {}

/// A step, ready to be copied to the device; made once for all layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttentionPlan {
    /// Those of decode first.
    pub sequences: Vec<SequenceRows>,
    /// Of the others.
    pub tiles: Vec<PrefillTile>,
    /// How many of `sequences` are decode's.
    pub(super) num_decode: usize,
    /// Queries of one of them at most.
    pub(super) max_queries: usize,
    /// Spans that one of them has at most, whatever its window.
    pub(super) max_spans: usize,
    group: usize,
    num_heads: usize,
    head_dim: usize,
    /// Rows that the sequences need in queries and results.
    num_rows: usize,
    /// Entries of the block tables.
    num_blocks: usize,
    /// Tokens that a block must hold at least, so that each sequence's blocks hold all of its tokens.
    min_block_tokens: usize,
}

/// A plan on the device.
#[derive(Debug, Clone, Copy)]
pub struct DevicePlan<'a> {
    /// What it says.
    pub plan: &'a AttentionPlan,
    /// [`AttentionPlan::sequences`]
    pub sequences: Slice<'a, SequenceRows>,
    /// [`AttentionPlan::tiles`]
    pub tiles: Slice<'a, PrefillTile>,
    /// Blocks of all sequences.
    pub block_tables: Slice<'a, u32>,
}

/// Working memory of decode, in numbers of 32 bits; see [`AttentionPlan::scratch_len`].
#[derive(Debug)]
pub struct AttentionScratch<'a> {
    /// Outputs and softmax states of spans.
    pub partials: SliceMut<'a, f32>,
    /// Counts arrivals; zeros between launches.
    pub arrivals: SliceMut<'a, u32>,
}

/// `AttentionArguments` of `attention.cuh`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct AttentionArguments {
    q: u64,
    out: u64,
    kv: u64,
    block_tables: u64,
    sequences: u64,
    block_stride: i64,
    head_stride: i32,
    q_stride: i32,
    num_heads: i32,
    num_kv_heads: i32,
    block_shift: u32,
    window: i32,
    causal: i32,
    scale_log2: f32,
    q_type: i32,
    out_type: i32,
}

const _: () = assert!(size_of::<AttentionArguments>() == 6 * 8 + 10 * 4);

// SAFETY: `repr(C)`, as `attention.cuh` has it; the assertion shows that nothing lies between the fields.
unsafe impl DeviceStruct for AttentionArguments {}

/// Attention of the plan's rows of `q` over the blocks of their sequences; `out` is `[rows, num_heads * head_dim]`. Rows
/// of `out` that belong to no sequence are left as they are.
///
/// The blocks of the tables and the rows are on the device and cannot be looked at here: they are the plan's.
pub fn paged_attention(
    stream: &impl Stream,
    layer: &AttentionLayer,
    batch: &DevicePlan<'_>,
    q: &ActivationRows<'_>,
    kv: &KvBlocks<'_>,
    scratch: &mut AttentionScratch<'_>,
    (out, out_type): (&mut SliceMut<'_, u8>, ActivationType),
) -> Result<()> {
    let (plan, layout) = (batch.plan, kv.layout);
    layout.check(SIZES)?;
    SIZES.equal("heads", plan.num_heads, layer.num_heads)?;
    SIZES.equal("kv heads", plan.num_heads / plan.group, layout.num_kv_heads)?;
    SIZES.equal("head_dim", plan.head_dim, layout.head_dim)?;
    SIZES.equal("sequences", plan.sequences.len(), batch.sequences.len())?;
    SIZES.equal("tiles", plan.tiles.len(), batch.tiles.len())?;
    let width = plan.num_heads * plan.head_dim;
    SIZES.require("q stride", q.stride, q.stride >= width && q.stride.is_multiple_of(2), "even, and a row at least")?;
    let q_len = if plan.num_rows == 0 { 0 } else { (plan.num_rows - 1) * q.stride + width };
    at_least("bytes of q", q_len * q.activation_type.size_bytes(), q.bytes.len())?;
    at_least("bytes of out", plan.num_rows * width * out_type.size_bytes(), out.len())?;
    at_least("block tables", plan.num_blocks, batch.block_tables.len())?;
    // A table that is too short would be read on into the next sequence's, and what is there is anybody's block.
    at_least("block_tokens, of as many blocks as each sequence has", plan.min_block_tokens, layout.block_tokens)?;
    let (queries, results) = (("address of q", q.bytes.place()), ("address of out", out.place()));
    SIZES.aligned([queries, results, ("address of the blocks", kv.elements.place())])?;
    let (partials, arrivals) = plan.scratch_len();
    at_least("partials", partials, scratch.partials.len())?;
    at_least("arrivals", arrivals, scratch.arrivals.len())?;
    let window = layer.sliding_window_tokens.unwrap_or(i32::MAX as usize).min(i32::MAX as usize);
    SIZES.require("sliding_window_tokens", window, window > 0, "at least 1: a query sees its own key")?;
    if !layer.causal {
        SIZES.require("sliding_window_tokens", window, window == i32::MAX as usize, "none: it is not causal")?;
    }
    let arguments = AttentionArguments {
        q: q.bytes.address(),
        out: out.address(),
        kv: kv.layer(SIZES, layer.layer_idx)?,
        block_tables: batch.block_tables.address(),
        sequences: batch.sequences.address(),
        block_stride: layout.block_len() as i64,
        head_stride: SIZES.int("block_tokens", layout.head_len())?,
        q_stride: SIZES.int("q stride", q.stride)?,
        num_heads: SIZES.int("heads", layer.num_heads)?,
        num_kv_heads: SIZES.int("kv heads", layout.num_kv_heads)?,
        block_shift: layout.block_shift(),
        window: window as i32,
        causal: i32::from(layer.causal),
        scale_log2: layer.scale * std::f32::consts::LOG2_E,
        q_type: q.activation_type.code(),
        out_type: out_type.code(),
    };
    if plan.num_decode > 0 {
        attention_decode::launch(stream, &arguments, plan, layout.dtype, scratch)?;
    }
    if !plan.tiles.is_empty() {
        attention_prefill::launch(stream, &arguments, plan, layout.dtype, batch.tiles)?;
    }
    Ok(())
}

fn at_least(dimension: &'static str, limit: usize, actual: usize) -> Result<()> {
    match actual >= limit {
        true => Ok(()),
        false => Err(Error::SizeMismatch { operation: SIZES.operation, dimension, expected: limit, actual }),
    }
}

impl AttentionPlan {
    /// Who computes what, for `num_heads` query heads and `num_kv_heads` kv heads of `head_dim`. Sequences without rows are
    /// left out.
    pub fn new(
        sequences: &[AttentionSequence],
        num_heads: usize,
        num_kv_heads: usize,
        head_dim: usize,
    ) -> Result<AttentionPlan> {
        SIZES.require("head_dim", head_dim, HEAD_DIMS.contains(&head_dim), "32, 64, 80, 96, 128 or 256")?;
        let whole_groups = num_kv_heads > 0 && num_heads > 0 && num_heads.is_multiple_of(num_kv_heads);
        SIZES.require("heads", num_heads, whole_groups, "a multiple of the kv heads, not 0")?;
        let group = num_heads / num_kv_heads;
        let is_decode = |s: &&AttentionSequence| s.rows.len() * group <= TILE_ROWS || head_dim > MAX_PREFILL_HEAD_DIM;
        let present = || sequences.iter().filter(|s| !s.rows.is_empty());
        let (decode, prefill): (Vec<_>, Vec<_>) = present().partition(is_decode);
        let mut plan = AttentionPlan {
            sequences: Vec::with_capacity(sequences.len()),
            tiles: Vec::new(),
            num_decode: decode.len(),
            max_queries: decode.iter().map(|s| s.rows.len()).max().unwrap_or(0),
            max_spans: decode.iter().map(|s| (s.first_position + s.rows.len()).div_ceil(SPAN_KEYS)).max().unwrap_or(0),
            group,
            num_heads,
            head_dim,
            num_rows: present().map(|s| s.rows.end).max().unwrap_or(0),
            num_blocks: present().map(|s| s.blocks.end).max().unwrap_or(0),
            min_block_tokens: present().map(min_block_tokens).max().unwrap_or(0),
        };
        for &sequence in decode.iter().chain(&prefill) {
            plan.sequences.push(SequenceRows::new(sequence)?);
        }
        for (i, sequence) in prefill.iter().enumerate() {
            let tiles = (sequence.rows.len() * group).div_ceil(attention_prefill::BLOCK_ROWS);
            let index = SIZES.blocks("sequences", decode.len() + i)?;
            let tiles: Range<u32> = 0..SIZES.blocks("tiles of a sequence", tiles)?;
            plan.tiles.extend(tiles.map(|tile| PrefillTile { sequence: index, tile }));
        }
        Ok(plan)
    }

    /// One query of each of up to `num_rows` sequences, whose contexts have up to `max_context_tokens` tokens: what a
    /// captured step has in place of the plan of its batch, with [`SequenceRows`] that are written anew for each launch.
    /// They are not looked at here: the blocks of each sequence lie among `num_blocks` entries of block tables and hold
    /// its tokens.
    pub fn of_bucket(
        num_rows: usize,
        max_context_tokens: usize,
        num_blocks: usize,
        [num_heads, num_kv_heads, head_dim]: [usize; 3],
    ) -> Result<AttentionPlan> {
        let none = AttentionPlan::new(&[], num_heads, num_kv_heads, head_dim)?;
        SIZES.int("position", max_context_tokens)?;
        let max_spans = max_context_tokens.div_ceil(SPAN_KEYS);
        let sequences = vec![SequenceRows::NONE; num_rows];
        Ok(AttentionPlan { sequences, num_decode: num_rows, max_queries: 1, max_spans, num_rows, num_blocks, ..none })
    }

    /// How many numbers of 32 bits the partial results and the arrivals take.
    pub fn scratch_len(&self) -> (usize, usize) {
        let num_kv_heads = self.num_heads / self.group;
        let partial_rows = self.num_decode * self.max_queries * self.num_heads * self.max_spans;
        (partial_rows * (self.head_dim + 2), self.num_decode * num_kv_heads * self.tiles_per_head())
    }

    /// Tiles of 16 rows that a kv head of a sequence of decode has at most.
    pub(super) fn tiles_per_head(&self) -> usize {
        (self.max_queries * self.group).div_ceil(TILE_ROWS)
    }
    /// Numbers of the outputs among the partial results; the softmax states follow.
    pub(super) fn partial_outputs_len(&self) -> usize {
        self.num_decode * self.max_queries * self.num_heads * self.max_spans * self.head_dim
    }
    pub(super) fn num_kv_heads(&self) -> usize {
        self.num_heads / self.group
    }
    pub(super) fn head_dim(&self) -> usize {
        self.head_dim
    }
}

/// Tokens that a block must hold, so that the sequence's blocks hold its tokens.
fn min_block_tokens(sequence: &AttentionSequence) -> usize {
    match sequence.blocks.len() {
        0 => usize::MAX,
        num_blocks => (sequence.first_position + sequence.rows.len()).div_ceil(num_blocks),
    }
}

impl SequenceRows {
    /// No rows.
    pub const NONE: SequenceRows = SequenceRows { first_row: 0, num_queries: 0, first_position: 0, first_block: 0 };

    /// One query, in row `row`, at `position`, of a sequence whose block table begins at entry `first_block`.
    pub fn one(row: u32, position: u32, first_block: u32) -> SequenceRows {
        SequenceRows { first_row: row, num_queries: 1, first_position: position, first_block }
    }

    /// As it lies in memory.
    pub fn words(&self) -> [u32; 4] {
        [self.first_row, self.num_queries, self.first_position, self.first_block]
    }

    fn new(sequence: &AttentionSequence) -> Result<SequenceRows> {
        let last_position = sequence.first_position + sequence.rows.len();
        SIZES.int("position", last_position)?;
        Ok(SequenceRows {
            first_row: SIZES.blocks("rows", sequence.rows.start)?,
            num_queries: SIZES.blocks("rows", sequence.rows.len())?,
            first_position: sequence.first_position as u32,
            first_block: SIZES.blocks("block tables", sequence.blocks.start)?,
        })
    }
}

impl ActivationType {
    /// Bytes of a number.
    pub fn size_bytes(self) -> usize {
        match self {
            ActivationType::F32 => 4,
            ActivationType::F16 | ActivationType::Bf16 => 2,
        }
    }
    /// `ActivationType` of `attention.cuh`.
    fn code(self) -> i32 {
        match self {
            ActivationType::F32 => 0,
            ActivationType::F16 => 1,
            ActivationType::Bf16 => 2,
        }
    }
}

/// The entry point for a type and a width, of `names` for f16 and for bf16 in the order of [`HEAD_DIMS`].
pub(super) fn kernel_of(names: &[[&'static str; 2]], dtype: KvDtype, head_dim: usize) -> &'static str {
    let of_width = HEAD_DIMS.iter().position(|&width| width == head_dim).expect("a plan has one of these widths");
    match dtype {
        KvDtype::F16 => names[of_width][0],
        KvDtype::Bf16 => names[of_width][1],
    }
}
