//! Launches `matmul_quant.cu`: activations rounded to 8 bits, and products of such rows with weights that stay quantized.

use half::f16;

use super::launch::{Argument, Launch, MAX_GRID_YZ, Sizes, Slice, SliceMut, Stream};
use super::product::{MAX_MATVEC_SHARED_BYTES, SLICE_BYTES, SLICE_COLUMNS};
use crate::error::Result;
use crate::quant::{BlockQ8_0, QuantType};

/// Columns that have one scale.
pub const GROUP_COLUMNS: usize = 32;
/// Rows and features of a block.
const TILE_ROWS: usize = 16;
const TILE_FEATURES: usize = 8;
/// Warps of a block at most, of products and of rounding.
const MAX_WARPS: usize = 8;

/// Activations in 8 bits, `[rows, columns]`, with scale and sum of codes of each group `[rows, columns / 32]`.
#[derive(Debug)]
pub struct QuantRowsMut<'a> {
    /// Codes.
    pub codes: SliceMut<'a, i8>,
    /// What a code of one stands for.
    pub scales: SliceMut<'a, f32>,
    /// Sums of codes, for weights that have a minimum.
    pub sums: SliceMut<'a, i32>,
}

/// The same, to read.
#[derive(Debug, Clone, Copy)]
pub struct QuantRows<'a> {
    /// Codes.
    pub codes: Slice<'a, i8>,
    /// What a code of one stands for.
    pub scales: Slice<'a, f32>,
    /// Sums of codes.
    pub sums: Slice<'a, i32>,
}

/// Weights as kernels read them.
#[derive(Debug, Clone, Copy)]
pub enum QuantWeights<'a> {
    /// Q8_0 with codes and scales apart ([`split_q8_0`]): a block of 34 bytes has no alignment.
    Q8_0 {
        /// `[features, columns]`
        codes: Slice<'a, i8>,
        /// `[features, columns / 32]`
        scales: Slice<'a, f16>,
    },
    /// Q4_K, blocks as in a GGUF file: `[features, columns / 256, 144]`.
    Q4K {
        /// Bytes.
        blocks: Slice<'a, u8>,
    },
}

/// A quantized weight matrix.
#[derive(Debug, Clone, Copy)]
pub struct QuantMatrix<'a> {
    /// `[features, columns]`
    pub weights: QuantWeights<'a>,
    /// `[features]`
    pub bias: Option<Slice<'a, f32>>,
    /// Rows of the matrix: width of the result.
    pub features: usize,
    /// Width of the activations.
    pub columns: usize,
}

/// What becomes of the sums, `[rows, features]`.
#[derive(Debug)]
pub enum QuantOutput<'a, 'b> {
    /// They are written.
    Store(&'b mut SliceMut<'a, f32>),
    /// They are added to what is there.
    Add(&'b mut SliceMut<'a, f32>),
}

/// Codes `[values]` and scales `[values / 32]` of blocks of Q8_0 one behind the other. Panics unless there are whole blocks.
pub fn split_q8_0(blocks: &[u8]) -> (Vec<i8>, Vec<f16>) {
    const SCALE_BYTES: usize = size_of::<f16>();
    let (blocks, rest) = blocks.as_chunks::<{ size_of::<BlockQ8_0>() }>();
    assert!(rest.is_empty(), "{} bytes behind the last block of Q8_0", rest.len());
    let codes = blocks.iter().flat_map(|block| block[SCALE_BYTES..].iter().map(|&code| code as i8)).collect();
    (codes, blocks.iter().map(|block| f16::from_le_bytes([block[0], block[1]])).collect())
}

/// Rounds each group of 32 columns of `x` `[rows, columns]` to 8 bits.
pub fn quantize_rows(
    stream: &impl Stream,
    x: Slice<'_, f32>,
    columns: usize,
    out: &mut QuantRowsMut<'_>,
) -> Result<()> {
    let sizes = Sizes { operation: "quantize_rows" };
    let whole_groups = columns > 0 && columns.is_multiple_of(GROUP_COLUMNS);
    sizes.require("columns", columns, whole_groups, "a positive multiple of 32")?;
    let rows = x.len() / columns;
    sizes.equal("elements of x", rows * columns, x.len())?;
    sizes.equal("codes", x.len(), out.codes.len())?;
    sizes.equal("scales", x.len() / GROUP_COLUMNS, out.scales.len())?;
    sizes.equal("sums", x.len() / GROUP_COLUMNS, out.sums.len())?;
    sizes.aligned([("address of x", x.place()), ("address of codes", out.codes.place())])?;
    if rows == 0 {
        return Ok(());
    }
    let width = Argument::Int(sizes.int("columns", columns)?);
    stream.launch(&Launch {
        file: "matmul_quant",
        kernel: "quantize_rows",
        grid: [sizes.blocks("rows", rows)?, 1, 1],
        threads: 32 * (columns / GROUP_COLUMNS).min(MAX_WARPS) as u32,
        shared_bytes: 0,
        arguments: &[x.argument(), out.codes.argument(), out.scales.argument(), out.sums.argument(), width],
    })
}

/// Computes `x W^T + bias`, and with it what `output` says. Every 16 rows read the weights once.
pub fn multiply_quant(
    stream: &impl Stream,
    x: &QuantRows<'_>,
    matrix: &QuantMatrix<'_>,
    output: QuantOutput<'_, '_>,
) -> Result<()> {
    let (sizes, &QuantMatrix { features, columns, .. }) = (Sizes { operation: "multiply_quant" }, matrix);
    let num_slices = columns.div_ceil(SLICE_COLUMNS);
    let rows = check_product(sizes, x, matrix)?;
    let shared_bytes = num_slices * SLICE_BYTES;
    sizes.require("columns", columns, shared_bytes <= MAX_MATVEC_SHARED_BYTES, "at most 50,176")?;
    let feature_tiles = features.div_ceil(TILE_FEATURES);
    sizes.require("features", features, feature_tiles <= MAX_GRID_YZ, "at most 524,280")?;
    let (out, out_len, finish) = match &output {
        QuantOutput::Store(out) => (out.argument(), out.len(), 0),
        QuantOutput::Add(out) => (out.argument(), out.len(), 1),
    };
    sizes.equal("elements of out", rows * features, out_len)?;
    if rows == 0 {
        return Ok(());
    }
    let (kernel, mut arguments) = match matrix.weights {
        QuantWeights::Q8_0 { codes, scales } => {
            ("matvec_q8_0", vec![x.codes.argument(), x.scales.argument(), codes.argument(), scales.argument()])
        }
        QuantWeights::Q4K { blocks } => {
            ("matvec_q4_k", vec![x.codes.argument(), x.scales.argument(), x.sums.argument(), blocks.argument()])
        }
    };
    arguments.extend([matrix.bias.map_or(Argument::Address(0), |bias| bias.argument()), out]);
    for (dimension, size) in [("rows", rows), ("columns", columns), ("features", features)] {
        arguments.push(Argument::Int(sizes.int(dimension, size)?));
    }
    arguments.push(Argument::Int(finish));
    stream.launch(&Launch {
        file: "matmul_quant",
        kernel,
        grid: [sizes.blocks("rows", rows.div_ceil(TILE_ROWS))?, feature_tiles as u32, 1],
        threads: 32 * num_slices.min(MAX_WARPS) as u32,
        shared_bytes: shared_bytes as u32,
        arguments: &arguments,
    })
}

/// Threads of a block of [`embed_quant`], which has a row of hundreds of numbers at least.
const EMBED_THREADS: u32 = 256;

/// Row `indices[i]` of the matrix into row `i` of `out` `[indices, columns]`. Where there is no such row, `out` gets NaN.
pub fn embed_quant(
    stream: &impl Stream,
    matrix: &QuantMatrix<'_>,
    indices: Slice<'_, u32>,
    out: &mut SliceMut<'_, f32>,
) -> Result<()> {
    let (sizes, &QuantMatrix { features, columns, .. }) = (Sizes { operation: "embed_quant" }, matrix);
    check_weights(sizes, matrix)?;
    sizes.equal("elements of out", indices.len() * columns, out.len())?;
    if indices.len() == 0 {
        return Ok(());
    }
    let (kernel, mut arguments) = match matrix.weights {
        QuantWeights::Q8_0 { codes, scales } => ("embed_q8_0", vec![codes.argument(), scales.argument()]),
        QuantWeights::Q4K { blocks } => ("embed_q4_k", vec![blocks.argument()]),
    };
    arguments.extend([indices.argument(), out.argument()]);
    for (dimension, size) in [("features", features), ("columns", columns)] {
        arguments.push(Argument::Int(sizes.int(dimension, size)?));
    }
    stream.launch(&Launch {
        file: "matmul_quant",
        kernel,
        grid: [sizes.blocks("indices", indices.len())?, 1, 1],
        threads: EMBED_THREADS,
        shared_bytes: 0,
        arguments: &arguments,
    })
}

/// Returns the number of rows.
fn check_product(sizes: Sizes, x: &QuantRows<'_>, matrix: &QuantMatrix<'_>) -> Result<usize> {
    let columns = matrix.columns;
    check_weights(sizes, matrix)?;
    let rows = x.codes.len() / columns;
    sizes.equal("codes of x", rows * columns, x.codes.len())?;
    sizes.equal("scales of x", rows * columns / GROUP_COLUMNS, x.scales.len())?;
    sizes.equal("sums of x", rows * columns / GROUP_COLUMNS, x.sums.len())?;
    sizes.aligned([("address of x", x.codes.place())])?;
    Ok(rows)
}

fn check_weights(sizes: Sizes, matrix: &QuantMatrix<'_>) -> Result<()> {
    let &QuantMatrix { features, columns, bias, weights } = matrix;
    sizes.require("features", features, features > 0, "at least 1")?;
    match weights {
        QuantWeights::Q8_0 { codes, scales } => {
            let whole_groups = columns > 0 && columns.is_multiple_of(GROUP_COLUMNS);
            sizes.require("columns", columns, whole_groups, "a positive multiple of 32")?;
            sizes.equal("codes of the weights", features * columns, codes.len())?;
            sizes.equal("scales of the weights", features * columns / GROUP_COLUMNS, scales.len())?;
            sizes.aligned([("address of the weights", codes.place())])?;
        }
        QuantWeights::Q4K { blocks } => {
            let whole_blocks = columns > 0 && columns.is_multiple_of(QuantType::Q4_K.block_values());
            sizes.require("columns", columns, whole_blocks, "a positive multiple of 256")?;
            sizes.equal("bytes of the weights", QuantType::Q4_K.size_bytes(features * columns)?, blocks.len())?;
            sizes.aligned([("address of the weights", blocks.place())])?;
        }
    }
    sizes.equal("elements of bias", features, bias.map_or(features, |bias| bias.len()))
}
