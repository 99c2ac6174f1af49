//! Launches `attention_decode.cu`: paged attention of sequences with few queries, their keys split over blocks.

use super::attention::{AttentionArguments, AttentionPlan, AttentionScratch, SIZES, THREADS, kernel_of};
use super::kv_blocks::KvDtype;
use super::launch::{Argument, DeviceStruct, Launch, MAX_GRID_YZ, Stream};
use crate::error::Result;

/// By width of the heads, f16 and bf16.
const KERNELS: [[&str; 2]; 6] = [
    ["attention_decode_f16_32", "attention_decode_bf16_32"],
    ["attention_decode_f16_64", "attention_decode_bf16_64"],
    ["attention_decode_f16_80", "attention_decode_bf16_80"],
    ["attention_decode_f16_96", "attention_decode_bf16_96"],
    ["attention_decode_f16_128", "attention_decode_bf16_128"],
    ["attention_decode_f16_256", "attention_decode_bf16_256"],
];

/// `AttentionPartials` of `attention_decode.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct AttentionPartials {
    outputs: u64,
    states: u64,
    arrivals: u64,
}

// SAFETY: `repr(C)`, three fields of one size, as `attention_decode.cu` has it.
unsafe impl DeviceStruct for AttentionPartials {}

/// The first `num_decode` sequences of the plan.
pub(super) fn launch(
    stream: &impl Stream,
    arguments: &AttentionArguments,
    plan: &AttentionPlan,
    dtype: KvDtype,
    scratch: &mut AttentionScratch<'_>,
) -> Result<()> {
    let tiles = plan.num_kv_heads() * plan.tiles_per_head();
    SIZES.require("tiles of a sequence", tiles, tiles <= MAX_GRID_YZ, "at most 65,535")?;
    SIZES.require("spans of a sequence", plan.max_spans, plan.max_spans <= MAX_GRID_YZ, "at most 65,535")?;
    let outputs = scratch.partials.address();
    let partials = AttentionPartials {
        outputs,
        states: outputs + (plan.partial_outputs_len() * size_of::<f32>()) as u64,
        arrivals: scratch.arrivals.address(),
    };
    let max_queries = SIZES.int("rows", plan.max_queries)?;
    stream.launch(&Launch {
        file: "attention_decode",
        kernel: kernel_of(&KERNELS, dtype, plan.head_dim()),
        grid: [SIZES.blocks("sequences", plan.num_decode)?, tiles as u32, plan.max_spans as u32],
        threads: THREADS,
        shared_bytes: shared_bytes(plan.head_dim()),
        arguments: &[Argument::of(arguments), Argument::of(&partials), Argument::Int(max_queries)],
    })
}

/// `DecodeShared` of `attention_decode.cu`: four warps with two tiles of 32 keys and 16 states each; 16 queries; a count.
fn shared_bytes(head_dim: usize) -> u32 {
    (512 * (head_dim + 9) + 32 * (head_dim + 8) + 4) as u32
}
