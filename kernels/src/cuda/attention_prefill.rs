//! Launches `attention_prefill.cu`: paged attention of sequences with many queries.

use super::attention::{AttentionArguments, AttentionPlan, PrefillTile, SIZES, THREADS, kernel_of};
use super::kv_blocks::KvDtype;
use super::launch::{Argument, Launch, MAX_GRID_YZ, Slice, Stream};
use crate::error::Result;

/// Rows of a block (`kBlockRows`).
pub(super) const BLOCK_ROWS: usize = 64;

/// By width of the heads, f16 and bf16. A plan leaves wider heads to decode.
const KERNELS: [[&str; 2]; 5] = [
    ["attention_prefill_f16_32", "attention_prefill_bf16_32"],
    ["attention_prefill_f16_64", "attention_prefill_bf16_64"],
    ["attention_prefill_f16_80", "attention_prefill_bf16_80"],
    ["attention_prefill_f16_96", "attention_prefill_bf16_96"],
    ["attention_prefill_f16_128", "attention_prefill_bf16_128"],
];

/// The sequences of the plan's tiles.
pub(super) fn launch(
    stream: &impl Stream,
    arguments: &AttentionArguments,
    plan: &AttentionPlan,
    dtype: KvDtype,
    tiles: Slice<'_, PrefillTile>,
) -> Result<()> {
    let num_kv_heads = plan.num_kv_heads();
    SIZES.require("kv heads", num_kv_heads, num_kv_heads <= MAX_GRID_YZ, "at most 65,535")?;
    stream.launch(&Launch {
        file: "attention_prefill",
        kernel: kernel_of(&KERNELS, dtype, plan.head_dim()),
        grid: [SIZES.blocks("tiles", tiles.len())?, num_kv_heads as u32, 1],
        threads: THREADS,
        shared_bytes: shared_bytes(plan.head_dim()),
        arguments: &[Argument::of(arguments), tiles.argument()],
    })
}

/// `PrefillShared` of `attention_prefill.cu`: 64 keys, values and queries, and the outputs of 64 rows.
fn shared_bytes(head_dim: usize) -> u32 {
    (384 * (head_dim + 8) + 256 * head_dim) as u32
}
