//! What kernels read of a step, on the device: copied once, used by all layers.

use std::ops::Range;
use std::sync::Arc;

use ns_llm_kernels::cpu::attention::AttentionSequence;
use ns_llm_kernels::cuda::attention::{AttentionPlan, DevicePlan, PrefillTile, SequenceRows};
use ns_llm_kernels::cuda::embedding::feed_back;
use ns_llm_kernels::cuda::launch::Slice;
use ns_llm_kernels::cuda::memory::{Buffer, Memory};
use ns_llm_kernels::error::Result;

use super::bucket::{self, Bucket, Places};
use crate::backend::AttentionShape;
use crate::batch::Batch;

/// What it is for, in errors.
const PURPOSE: &str = "a step's tokens on the device";

/// The arrays of one batch.
pub(super) struct Step {
    /// Where the batch is: another one has another step.
    batch: usize,
    num_tokens: usize,
    /// Of a step without a bucket, one behind the other: `token_ids`, `positions`, `slots` (all `[tokens]`), rows of the
    /// outputs, block tables, and where ids are fed back, `[tokens]` where from. Of one with a bucket as [`Places`] says.
    numbers: Buffer<u32>,
    positions: usize,
    slots: usize,
    output_rows: Range<usize>,
    block_tables: Range<usize>,
    /// Ids that are given, and rows of the step before that give others; `None`: all are given.
    sources: Option<usize>,
    given: usize,
    /// All ids, where some are fed back.
    token_ids: Option<Buffer<u32>>,
    /// Who computes which attention; the same for all layers of one shape.
    attention: Option<PlannedAttention>,
    bucket: Option<Bucket>,
}

struct PlannedAttention {
    /// Query heads, KV heads, width of a head.
    heads: [usize; 3],
    plan: AttentionPlan,
    /// `None`: they are among the step's numbers.
    on_device: Option<(Buffer<SequenceRows>, Buffer<PrefillTile>)>,
}

impl Step {
    pub(super) fn new(memory: &Arc<Memory>, batch: &Batch) -> Result<Step> {
        let num_tokens = batch.num_tokens();
        let output_rows = 3 * num_tokens..3 * num_tokens + batch.outputs.len();
        let block_tables = output_rows.end..output_rows.end + batch.block_tables.len();
        let sources = (!batch.feedback.is_empty()).then_some(block_tables.end);
        let mut numbers = Vec::with_capacity(block_tables.end + num_tokens);
        numbers.extend_from_slice(&batch.token_ids);
        numbers.extend_from_slice(&batch.positions);
        numbers.extend_from_slice(&batch.slots);
        // Rows were counted in 32 bits when positions were.
        numbers.extend(batch.outputs.iter().map(|output| output.token_row as u32));
        numbers.extend(batch.block_tables.iter().map(|block| block.0));
        if sources.is_some() {
            numbers.extend(bucket::sources(batch));
        }
        let mut buffer = memory.scratch(PURPOSE, numbers.len())?;
        buffer.upload(0, &numbers)?;
        Ok(Step {
            batch: std::ptr::from_ref(batch).addr(),
            num_tokens,
            numbers: buffer,
            positions: num_tokens,
            slots: 2 * num_tokens,
            output_rows,
            block_tables,
            sources,
            given: 0,
            token_ids: None,
            attention: None,
            bucket: None,
        })
    }

    /// A step whose numbers are, or will be, in `numbers`; `batch` is the bucket's own.
    pub(super) fn of_bucket(bucket: Bucket, batch: &Batch, numbers: Buffer<u32>) -> Step {
        let Places { given, sources, positions, slots, output_rows, .. } = bucket.places();
        Step {
            batch: std::ptr::from_ref(batch).addr(),
            num_tokens: bucket.rows,
            positions,
            slots,
            output_rows: output_rows..output_rows + bucket.rows,
            // Each sequence says where its own begins.
            block_tables: 0..numbers.len(),
            sources: Some(sources),
            given,
            numbers,
            token_ids: None,
            attention: None,
            bucket: Some(bucket),
        }
    }

    pub(super) fn is_of(&self, batch: &Batch) -> bool {
        self.batch == std::ptr::from_ref(batch).addr() && self.num_tokens == batch.num_tokens()
    }

    pub(super) fn bucket(&self) -> Option<Bucket> {
        self.bucket
    }

    pub(super) fn numbers(&self) -> &Buffer<u32> {
        &self.numbers
    }

    pub(super) fn into_numbers(self) -> Buffer<u32> {
        self.numbers
    }

    /// Takes ids from `chosen`, the tokens of the step before, where the batch says so.
    pub(super) fn feed_back(&mut self, memory: &Arc<Memory>, chosen: Option<&Buffer<u32>>) -> Result<()> {
        let Some(sources) = self.sources else { return Ok(()) };
        let chosen = chosen.expect("tokens are fed back behind a step that was launched");
        let mut token_ids = memory.scratch(PURPOSE, self.num_tokens)?;
        let given = self.slice(self.given);
        feed_back(memory.driver(), given, self.slice(sources), chosen.all(), &mut token_ids.all_mut())?;
        self.token_ids = Some(token_ids);
        Ok(())
    }

    /// `[tokens]` of the numbers, from `start` on.
    fn slice(&self, start: usize) -> Slice<'_, u32> {
        self.numbers.slice(start..start + self.num_tokens)
    }

    pub(super) fn token_ids(&self) -> Slice<'_, u32> {
        self.token_ids.as_ref().map_or_else(|| self.slice(self.given), |token_ids| token_ids.all())
    }

    pub(super) fn positions(&self) -> Slice<'_, u32> {
        self.slice(self.positions)
    }

    pub(super) fn slots(&self) -> Slice<'_, u32> {
        self.slice(self.slots)
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
            self.attention = Some(match self.bucket {
                None => PlannedAttention::new(memory, batch, heads)?,
                Some(bucket) => PlannedAttention::of_bucket(bucket, self.numbers.len(), heads)?,
            });
        }
        let planned = self.attention.as_ref().expect("it was planned above");
        let (sequences, tiles) = match (&planned.on_device, self.bucket) {
            (Some((sequences, tiles)), _) => (sequences.all(), tiles.all()),
            (None, Some(bucket)) => (self.numbers.view(bucket.places().sequences, bucket.rows), Slice::NOTHING),
            (None, None) => unreachable!("a step without a bucket has its own"),
        };
        let block_tables = self.numbers.slice(self.block_tables.clone());
        Ok(DevicePlan { plan: &planned.plan, sequences, tiles, block_tables })
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
        Ok(PlannedAttention { heads, plan, on_device: Some((sequences, tiles)) })
    }

    fn of_bucket(bucket: Bucket, num_blocks: usize, heads: [usize; 3]) -> Result<PlannedAttention> {
        let plan = AttentionPlan::of_bucket(bucket.rows, bucket.context_tokens(), num_blocks, heads)?;
        Ok(PlannedAttention { heads, plan, on_device: None })
    }
}
