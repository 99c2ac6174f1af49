//! Launches `matvec.cu`: products of at most 16 rows.

use super::launch::{Argument, Launch, Sizes, Stream};
use super::product::{MAX_MATVEC_ROWS, MAX_MATVEC_SHARED_BYTES, Product, SLICE_BYTES, SLICE_COLUMNS};
use crate::error::Result;

/// Features of a block.
const TILE_FEATURES: usize = 8;
/// Warps of a block at most. With as many slices in flight two blocks fill a multiprocessor.
const MAX_WARPS: usize = 8;

/// Launches `product`, whose sizes fit together.
pub(crate) fn launch(stream: &impl Stream, sizes: Sizes, product: &Product, arguments: &[Argument<'_>]) -> Result<()> {
    sizes.require("rows", product.rows, product.rows <= MAX_MATVEC_ROWS, "at most 16")?;
    let num_slices = product.columns.div_ceil(SLICE_COLUMNS);
    let shared_bytes = num_slices * product.matrices * SLICE_BYTES;
    let expected = "at most 50,176, or half as many for gate and up";
    sizes.require("columns", product.columns, shared_bytes <= MAX_MATVEC_SHARED_BYTES, expected)?;
    stream.launch(&Launch {
        file: "matvec",
        kernel: if product.matrices == 2 { "matvec_swiglu" } else { "matvec" },
        grid: [sizes.blocks("features", product.features.div_ceil(TILE_FEATURES))?, 1, 1],
        threads: 32 * num_slices.min(MAX_WARPS) as u32,
        shared_bytes: shared_bytes as u32,
        arguments,
    })
}
