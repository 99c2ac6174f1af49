//! Launches `matmul.cu`: products of many rows, in tiles.

use super::launch::{Argument, Launch, MAX_GRID_YZ, Sizes, Stream};
use super::product::Product;
use crate::error::Result;

/// Stages of 64 columns in shared memory.
const STAGES: usize = 3;
/// Bytes of a stage's row, of activations or of weights.
const STAGE_ROW_BYTES: usize = 64 * 2;

/// Rows and features of a block's tile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tile {
    /// 64 x 64 by 4 warps.
    Size64,
    /// 128 x 128 by 8 warps.
    Size128,
}

/// Launches `product`, whose sizes fit together.
pub(crate) fn launch(
    stream: &impl Stream,
    sizes: Sizes,
    product: &Product,
    tile: Tile,
    arguments: &[Argument<'_>],
) -> Result<()> {
    let (size, threads) = match tile {
        Tile::Size64 => (64, 128),
        Tile::Size128 => (128, 256),
    };
    // Half of a tile's features are those of gate, half the same of up.
    let feature_tiles = product.features.div_ceil(size / product.matrices);
    sizes.require("features", product.features, feature_tiles <= MAX_GRID_YZ, "at most 65,535 tiles")?;
    stream.launch(&Launch {
        file: "matmul",
        kernel: match (tile, product.matrices) {
            (Tile::Size64, 1) => "matmul_64",
            (Tile::Size64, _) => "matmul_swiglu_64",
            (Tile::Size128, 1) => "matmul_128",
            (Tile::Size128, _) => "matmul_swiglu_128",
        },
        grid: [sizes.blocks("rows", product.rows.div_ceil(size))?, feature_tiles as u32, 1],
        threads,
        shared_bytes: (STAGES * 2 * size * STAGE_ROW_BYTES) as u32,
        arguments,
    })
}
