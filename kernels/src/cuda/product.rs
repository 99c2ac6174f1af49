//! Products of activations with bf16 weight matrices: `x W^T`, with bias, residual sum, SwiGLU or GELU fused behind it. Three
//! kernels compute them, `matvec.cu` few rows, `matmul.cu` many and `sm90_matmul.cu` many on Hopper, and give the same bits
//! (`kernels/cuda/product.cuh` says how): the choice ([`Forms`](super::forms::Forms)) is one of speed.

use half::bf16;

use super::launch::{Argument, Place, Sizes, Slice, SliceMut, Stream, Tiles};
use super::{matmul, matvec, sm90_matmul};
pub use crate::cpu::linear::Gelu;
use crate::error::Result;

/// Numbers in the 16 bytes that kernels load: rows begin at multiples of them.
pub const VECTOR: usize = 8;
/// Columns of one accumulator; as in `product.cuh`.
pub(crate) const SLICE_COLUMNS: usize = 256;

/// Sums of a slice of 16 rows and 8 features in shared memory.
pub(crate) const SLICE_BYTES: usize = 16 * 8 * size_of::<f32>();
/// What every device since sm_80 gives a block that asks for it, less 1 KiB that the system takes.
pub(crate) const MAX_MATVEC_SHARED_BYTES: usize = 98 << 10;
/// Widest activations of a product: the sums of its slices lie in shared memory. Of a pair of matrices, half of it.
pub const MAX_COLUMNS: usize = MAX_MATVEC_SHARED_BYTES / SLICE_BYTES * SLICE_COLUMNS;

/// A weight matrix as the checkpoint has it.
#[derive(Debug, Clone, Copy)]
pub struct Matrix<'a> {
    /// `[features, columns]`
    pub weight: Slice<'a, bf16>,
    /// `[features]`
    pub bias: Option<Slice<'a, f32>>,
    /// Rows of the matrix: width of the result.
    pub features: usize,
    /// Width of the activations.
    pub columns: usize,
}

/// What becomes of the sums, all `[rows, features]`.
#[derive(Debug)]
pub enum Output<'a, 'b> {
    /// They are written.
    Store(&'b mut SliceMut<'a, f32>),
    /// They are added to what is there: the residual stream.
    Add(&'b mut SliceMut<'a, f32>),
    /// GELU of them is written.
    Gelu(Gelu, &'b mut SliceMut<'a, bf16>),
}

/// Which kernel computes a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// `matvec.cu`: at most [`MAX_MATVEC_ROWS`].
    Matvec,
    /// `matmul.cu`, tiles of 64 x 64.
    Tile64,
    /// `matmul.cu`, tiles of 128 x 128.
    Tile128,
    /// `sm90_matmul.cu`, tiles of 128 x 128: on devices of compute capability 9.0 alone.
    Warpgroups {
        /// Blocks at most, each with a share of the tiles; as many as run at the same time.
        max_blocks: u32,
    },
}

/// Most rows of [`Form::Matvec`].
pub const MAX_MATVEC_ROWS: usize = 16;
/// Fewer tiles of 128 x 128 than this leave multiprocessors of a large device without work.
const MIN_LARGE_TILES: usize = 128;

impl Form {
    /// Of those that every device has, the one that is expected to be fastest.
    pub fn for_sizes(rows: usize, features: usize) -> Form {
        match rows {
            0..=MAX_MATVEC_ROWS => Form::Matvec,
            _ if rows.div_ceil(128) * features.div_ceil(128) < MIN_LARGE_TILES => Form::Tile64,
            _ => Form::Tile128,
        }
    }
}

/// Computes `x W^T + bias` of `x` `[rows, columns]`, and with it what `output` says.
pub fn multiply(
    stream: &impl Stream,
    form: Form,
    x: Slice<'_, bf16>,
    matrix: &Matrix<'_>,
    output: Output<'_, '_>,
) -> Result<()> {
    let (sizes, product) = Product::new("multiply", form, x, matrix)?;
    let (out, place, finish) = match &output {
        Output::Store(out) => (out.argument(), out.place(), 0),
        Output::Add(out) => (out.argument(), out.place(), 1),
        Output::Gelu(Gelu::Erf, out) => (out.argument(), out.place(), 2),
        Output::Gelu(Gelu::Tanh, out) => (out.argument(), out.place(), 3),
    };
    let product = Product { is_gelu: matches!(output, Output::Gelu(..)), ..product };
    sizes.equal("elements of out", product.rows * matrix.features, place.len())?;
    sizes.aligned([("address of x", x.place()), ("address of weight", matrix.weight.place())])?;
    product.check_out(sizes, place)?;
    let [rows, columns, features] = product.arguments(sizes)?;
    let [x_tiles, tiles] = [product.tiles_of_x(x), product.tiles_of(matrix)];
    let [x, weight] = [product.operand(x, &x_tiles), product.operand(matrix.weight, &tiles)];
    let arguments = [x, weight, bias(matrix), out, rows, columns, features, Argument::Int(finish)];
    product.launch(stream, sizes, &arguments)
}

/// `out = silu(x W_gate^T + bias_gate) * (x W_up^T + bias_up)`: `x` `[rows, columns]`, `out` `[rows, features]`.
pub fn multiply_swiglu(
    stream: &impl Stream,
    form: Form,
    x: Slice<'_, bf16>,
    [gate, up]: [&Matrix<'_>; 2],
    out: &mut SliceMut<'_, bf16>,
) -> Result<()> {
    let (sizes, product) = Product::new("multiply_swiglu", form, x, gate)?;
    // Before its own sizes are looked at: rows are counted by gate's columns, which are all that kernels are told.
    sizes.equal("columns of up", gate.columns, up.columns)?;
    sizes.equal("features of up", gate.features, up.features)?;
    Product::new("multiply_swiglu", form, x, up)?;
    let (gates, ups) = (gate.weight.place(), up.weight.place());
    sizes.aligned([("address of x", x.place()), ("address of gate", gates), ("address of up", ups)])?;
    sizes.equal("elements of out", product.rows * gate.features, out.len())?;
    let [rows, columns, features] = product.arguments(sizes)?;
    let product = Product { matrices: 2, ..product };
    product.check_out(sizes, out.place())?;
    let [x_tiles, gate_tiles, up_tiles] = [product.tiles_of_x(x), product.tiles_of(gate), product.tiles_of(up)];
    let [first, second] = [(gate, &gate_tiles), (up, &up_tiles)].map(|(it, tiles)| product.operand(it.weight, tiles));
    let x = product.operand(x, &x_tiles);
    let arguments = [x, first, second, bias(gate), bias(up), out.argument(), rows, columns, features];
    product.launch(stream, sizes, &arguments)
}

fn bias(matrix: &Matrix<'_>) -> Argument<'static> {
    matrix.bias.map_or(Argument::Address(0), |bias| bias.argument())
}

/// A product whose sizes fit together.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Product {
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) features: usize,
    /// Two for gate and up.
    pub(crate) matrices: usize,
    /// Whether GELU follows.
    pub(crate) is_gelu: bool,
    form: Form,
}

impl Product {
    fn new(operation: &'static str, form: Form, x: Slice<'_, bf16>, matrix: &Matrix<'_>) -> Result<(Sizes, Product)> {
        let (sizes, &Matrix { features, columns, .. }) = (Sizes { operation }, matrix);
        let whole_vectors = columns > 0 && columns.is_multiple_of(VECTOR);
        sizes.require("columns", columns, whole_vectors, "a positive multiple of 8")?;
        sizes.require("features", features, features > 0, "at least 1")?;
        sizes.equal("elements of weight", features * columns, matrix.weight.len())?;
        sizes.equal("elements of bias", features, matrix.bias.map_or(features, |bias| bias.len()))?;
        let rows = x.len() / columns;
        sizes.equal("elements of x", rows * columns, x.len())?;
        Ok((sizes, Product { rows, columns, features, matrices: 1, is_gelu: false, form }))
    }

    fn arguments(&self, sizes: Sizes) -> Result<[Argument<'static>; 3]> {
        let rows = Argument::Int(sizes.int("rows", self.rows)?);
        let columns = Argument::Int(sizes.int("columns", self.columns)?);
        Ok([rows, columns, Argument::Int(sizes.int("features", self.features)?)])
    }

    /// Warpgroups write two numbers at once.
    fn check_out(&self, sizes: Sizes, out: Place) -> Result<()> {
        match self.form {
            Form::Warpgroups { .. } => sizes.aligned([("address of out", out)]),
            _ => Ok(()),
        }
    }

    fn tiles_of_x(&self, x: Slice<'_, bf16>) -> Tiles {
        Tiles::new(x.address(), [self.rows, self.columns], sm90_matmul::TILE)
    }

    fn tiles_of(&self, matrix: &Matrix<'_>) -> Tiles {
        let sizes = [matrix.features, matrix.columns];
        Tiles::new(matrix.weight.address(), sizes, sm90_matmul::tile_features(self.matrices))
    }

    /// An operand as the kernel of this form finds it.
    fn operand<'a>(&self, slice: Slice<'_, bf16>, tiles: &'a Tiles) -> Argument<'a> {
        match self.form {
            Form::Warpgroups { .. } => Argument::Tiles(tiles),
            _ => slice.argument(),
        }
    }

    fn launch(&self, stream: &impl Stream, sizes: Sizes, arguments: &[Argument<'_>]) -> Result<()> {
        match self.form {
            _ if self.rows == 0 => Ok(()),
            Form::Matvec => matvec::launch(stream, sizes, self, arguments),
            Form::Tile64 => matmul::launch(stream, sizes, self, matmul::Tile::Size64, arguments),
            Form::Tile128 => matmul::launch(stream, sizes, self, matmul::Tile::Size128, arguments),
            Form::Warpgroups { max_blocks } => sm90_matmul::launch(stream, sizes, self, max_blocks, arguments),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Few rows take the kernel for few; many rows of a wide matrix the large tiles.
    #[test]
    fn forms_follow_sizes() {
        assert_eq!(Form::for_sizes(1, 4096), Form::Matvec);
        assert_eq!(Form::for_sizes(16, 151_936), Form::Matvec);
        assert_eq!(Form::for_sizes(17, 4096), Form::Tile64);
        assert_eq!(Form::for_sizes(512, 1024), Form::Tile64);
        assert_eq!(Form::for_sizes(512, 4096), Form::Tile128);
        assert_eq!(Form::for_sizes(2048, 1024), Form::Tile128);
    }
}
