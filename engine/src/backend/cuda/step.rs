//! What kernels read of a step, on the device: copied once, used by all layers.

use std::ops::Range;
use std::sync::Arc;

use ns_llm_kernels::cpu::attention::AttentionSequence;
use ns_llm_kernels::cuda::attention::{AttentionPlan, DevicePlan, PrefillTile, SequenceRows};
use ns_llm_kernels::cuda::launch::Slice;
use ns_llm_kernels::cuda::memory::{Buffer, Memory};
use ns_llm_kernels::error::Result;

use crate::backend::AttentionShape;
use crate::batch::Batch;

/// What it is for, in errors.
const PURPOSE: &str = "a step's tokens on the device";

/// The arrays of one batch.
pub(super) struct Step {
    /// Where the batch is: another one has another step.
    batch: usize,
    num_tokens: usize,
    /// One behind the other: `token_ids`, `positions`, `slots` (all `[tokens]`), rows of the outputs, block tables.
    numbers: Buffer<u32>,
    output_rows: Range<usize>,
    block_tables: Range<usize>,
    /// Who computes which attention; the same for all layers of one shape.
    attention: Option<PlannedAttention>,
}

struct PlannedAttention {
    /// Query heads, KV heads, width of a head.
    heads: [usize; 3],
    plan: AttentionPlan,
    sequences: Buffer<SequenceRows>,
    tiles: Buffer<PrefillTile>,
}

impl Step {
    pub(super) fn new(memory: &Arc<Memory>, batch: &Batch) -> Result<Step> {
        let num_tokens = batch.num_tokens();
        let output_rows = 3 * num_tokens..3 * num_tokens + batch.outputs.len();
        let block_tables = output_rows.end..output_rows.end + batch.block_tables.len();
        let mut numbers = Vec::with_capacity(block_tables.end);
        numbers.extend_from_slice(&batch.token_ids);
        numbers.extend_from_slice(&batch.positions);
        numbers.extend_from_slice(&batch.slots);
        // Rows were counted in 32 bits when positions were.
        numbers.extend(batch.outputs.iter().map(|output| output.token_row as u32));
        numbers.extend(batch.block_tables.iter().map(|block| block.0));
        let mut buffer = memory.scratch(PURPOSE, numbers.len())?;
        buffer.upload(0, &numbers)?;
        let batch = std::ptr::from_ref(batch).addr();
        Ok(Step { batch, num_tokens, numbers: buffer, output_rows, block_tables, attention: None })
    }

    pub(super) fn is_of(&self, batch: &Batch) -> bool {
        self.batch == std::ptr::from_ref(batch).addr() && self.num_tokens == batch.num_tokens()
    }

    pub(super) fn token_ids(&self) -> Slice<'_, u32> {
        self.numbers.slice(0..self.num_tokens)
    }

    pub(super) fn positions(&self) -> Slice<'_, u32> {
        self.numbers.slice(self.num_tokens..2 * self.num_tokens)
    }

    pub(super) fn slots(&self) -> Slice<'_, u32> {
        self.numbers.slice(2 * self.num_tokens..3 * self.num_tokens)
    }

    pub(super) fn output_rows(&self) -> Slice<'_, u32> {
        self.numbers.slice(self.output_rows.clone())
    }

    /// Who computes which rows of attention of this shape.
    pub(super) fn attention(
        &mut self,
        memory: &Arc<Memory>,
        batch: &Batch,
        shape: &AttentionShape,
    ) -> Result<DevicePlan<'_>> {
        let heads = [shape.num_heads, shape.num_kv_heads, shape.head_dim];
        if self.attention.as_ref().is_none_or(|planned| planned.heads != heads) {
            self.attention = Some(PlannedAttention::new(memory, batch, heads)?);
        }
        let planned = self.attention.as_ref().expect("it was planned above");
        Ok(DevicePlan {
            plan: &planned.plan,
            sequences: planned.sequences.all(),
            tiles: planned.tiles.all(),
            block_tables: self.numbers.slice(self.block_tables.clone()),
        })
    }
}

impl PlannedAttention {
    fn new(memory: &Arc<Memory>, batch: &Batch, heads: [usize; 3]) -> Result<PlannedAttention> {
        let sequences = batch.sequences.iter().map(|sequence| AttentionSequence {
            rows: sequence.rows.clone(),
            first_position: sequence.context_tokens - sequence.rows.len(),
            blocks: sequence.blocks.clone(),
        });
        let [num_heads, num_kv_heads, head_dim] = heads;
        let plan = AttentionPlan::new(&sequences.collect::<Vec<_>>(), num_heads, num_kv_heads, head_dim)?;
        let mut sequences = memory.scratch(PURPOSE, plan.sequences.len())?;
        sequences.upload(0, &plan.sequences)?;
        let mut tiles = memory.scratch(PURPOSE, plan.tiles.len())?;
        tiles.upload(0, &plan.tiles)?;
        Ok(PlannedAttention { heads, plan, sequences, tiles })
    }
}
