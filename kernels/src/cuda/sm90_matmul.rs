//! Launches `sm90_matmul.cu`: products of many rows by warpgroups, on devices of compute capability 9.0.

use super::launch::{Argument, Launch, Sizes, Stream};
use super::product::Product;
use crate::error::Result;

/// Rows and features of a block's tile.
pub(crate) const TILE: usize = 128;
/// Two warpgroups that multiply and a warp that copies.
const THREADS: u32 = 2 * 128 + 32;
/// Stages of 64 columns in shared memory, and bytes of one.
const STAGES: usize = 6;
const STAGE_BYTES: usize = 2 * TILE * 128;
/// Two barriers a stage.
const BARRIER_BYTES: usize = STAGES * 2 * 8;
/// Tiles begin at multiples of this, and the block's memory perhaps not.
const PATTERN_BYTES: usize = 1024;
/// Dynamic shared memory of a block, and the most that a kernel of the file has beside it.
const DYNAMIC_BYTES: usize = PATTERN_BYTES + STAGES * STAGE_BYTES + BARRIER_BYTES;
pub(crate) const SHARED_BYTES: usize = DYNAMIC_BYTES + (8 << 10);

/// Features of one matrix in a tile: with gate and up, half of them are gate's and half up's.
pub(crate) fn tile_features(matrices: usize) -> usize {
    TILE / matrices
}

/// Launches `product`, whose sizes fit together, in at most `max_blocks` blocks.
pub(crate) fn launch(
    stream: &impl Stream,
    sizes: Sizes,
    product: &Product,
    max_blocks: u32,
    arguments: &[Argument<'_>],
) -> Result<()> {
    let tiles = product.rows.div_ceil(TILE) * product.features.div_ceil(tile_features(product.matrices));
    let num_blocks = sizes.blocks("tiles", tiles)?.min(max_blocks);
    stream.launch(&Launch {
        file: "sm90_matmul",
        kernel: match (product.matrices, product.is_gelu) {
            (1, false) => "sm90_matmul",
            (1, true) => "sm90_matmul_gelu",
            _ => "sm90_matmul_swiglu",
        },
        grid: [num_blocks, 1, 1],
        threads: THREADS,
        shared_bytes: DYNAMIC_BYTES as u32,
        arguments,
    })
}
