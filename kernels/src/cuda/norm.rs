//! Launches `norm.cu`: RMSNorm and LayerNorm of rows, into bf16 for products or into f32.

use half::bf16;

use super::launch::{Argument, Launch, Place, Sizes, Slice, SliceMut, Stream};
use crate::error::Result;

/// Numbers that a thread takes at once.
const VECTOR: usize = 4;
/// A whole warp at least; beyond this more threads only wait at the barrier.
const THREADS: std::ops::RangeInclusive<usize> = 32..=512;

/// A norm's weight `[width]` and epsilon.
#[derive(Debug, Clone, Copy)]
pub struct RmsNorm<'a> {
    /// `[width]`
    pub weight: Slice<'a, f32>,
    /// Added to the mean square.
    pub eps: f32,
}

/// `out = x / sqrt(mean(x^2) + eps) * weight` of each row: `x` and `out` `[rows, width]`.
pub fn rms_norm(
    stream: &impl Stream,
    x: Slice<'_, f32>,
    norm: &RmsNorm<'_>,
    out: &mut SliceMut<'_, bf16>,
) -> Result<()> {
    let rows = Rows::new("rms_norm", norm, x.place(), out.place())?;
    rows.launch(stream, "rms_norm_bf16", &[x.argument(), norm.weight.argument(), out.argument()])
}

/// The same in f32, for results that no product reads.
pub fn rms_norm_rows(
    stream: &impl Stream,
    x: Slice<'_, f32>,
    norm: &RmsNorm<'_>,
    out: &mut SliceMut<'_, f32>,
) -> Result<()> {
    let rows = Rows::new("rms_norm_rows", norm, x.place(), out.place())?;
    rows.launch(stream, "rms_norm_f32", &[x.argument(), norm.weight.argument(), out.argument()])
}

/// A LayerNorm's weight and bias `[width]`, and epsilon.
#[derive(Debug, Clone, Copy)]
pub struct LayerNorm<'a> {
    /// `[width]`
    pub weight: Slice<'a, f32>,
    /// `[width]`
    pub bias: Slice<'a, f32>,
    /// Added to the variance.
    pub eps: f32,
}

/// `out = (x - mean(x)) / sqrt(variance(x) + eps) * weight + bias` of each row: `x` and `out` `[rows, width]`.
pub fn layer_norm(
    stream: &impl Stream,
    x: Slice<'_, f32>,
    norm: &LayerNorm<'_>,
    out: &mut SliceMut<'_, bf16>,
) -> Result<()> {
    let rows = Rows::centered("layer_norm", norm, x.place(), out.place())?;
    rows.launch(
        stream,
        "layer_norm_bf16",
        &[x.argument(), norm.weight.argument(), norm.bias.argument(), out.argument()],
    )
}

/// The same in f32, for results that no product reads.
pub fn layer_norm_rows(
    stream: &impl Stream,
    x: Slice<'_, f32>,
    norm: &LayerNorm<'_>,
    out: &mut SliceMut<'_, f32>,
) -> Result<()> {
    let rows = Rows::centered("layer_norm_rows", norm, x.place(), out.place())?;
    rows.launch(stream, "layer_norm_f32", &[x.argument(), norm.weight.argument(), norm.bias.argument(), out.argument()])
}

/// Both at once, for a residual stream that is normed itself; all `[rows, width]`.
pub fn layer_norm_both(
    stream: &impl Stream,
    x: Slice<'_, f32>,
    norm: &LayerNorm<'_>,
    normed: &mut SliceMut<'_, f32>,
    out: &mut SliceMut<'_, bf16>,
) -> Result<()> {
    let rows = Rows::centered("layer_norm_both", norm, x.place(), out.place())?;
    rows.sizes.equal("elements of normed", x.len(), normed.len())?;
    rows.sizes.aligned([("address of normed", normed.place())])?;
    let (weight, bias) = (norm.weight.argument(), norm.bias.argument());
    rows.launch(stream, "layer_norm_both", &[x.argument(), weight, bias, normed.argument(), out.argument()])
}

/// Rows whose sizes fit together.
struct Rows {
    sizes: Sizes,
    rows: usize,
    width: usize,
    eps: f32,
}

impl Rows {
    fn centered(operation: &'static str, norm: &LayerNorm<'_>, x: Place, out: Place) -> Result<Rows> {
        let &LayerNorm { weight, bias, eps } = norm;
        let rows = Rows::new(operation, &RmsNorm { weight, eps }, x, out)?;
        rows.sizes.equal("elements of bias", rows.width, bias.len())?;
        rows.sizes.aligned([("address of bias", bias.place())])?;
        Ok(rows)
    }

    fn new(operation: &'static str, norm: &RmsNorm<'_>, x: Place, out: Place) -> Result<Rows> {
        let (sizes, width) = (Sizes { operation }, norm.weight.len());
        sizes.require("width", width, width > 0 && width.is_multiple_of(VECTOR), "a positive multiple of 4")?;
        let rows = x.len() / width;
        sizes.equal("elements of x", rows * width, x.len())?;
        sizes.equal("elements of out", rows * width, out.len())?;
        let weight = norm.weight.place();
        sizes.aligned([("address of x", x), ("address of weight", weight), ("address of out", out)])?;
        Ok(Rows { sizes, rows, width, eps: norm.eps })
    }

    /// One block a row. Its threads are a function of the width alone, as the order of the sum is.
    fn launch(&self, stream: &impl Stream, kernel: &'static str, slices: &[Argument<'_>]) -> Result<()> {
        if self.rows == 0 {
            return Ok(());
        }
        let mut arguments = slices.to_vec();
        arguments.extend([Argument::Int(self.sizes.int("width", self.width)?), Argument::Float(self.eps)]);
        let threads = (self.width / VECTOR).next_multiple_of(32).clamp(*THREADS.start(), *THREADS.end());
        stream.launch(&Launch {
            file: "norm",
            kernel,
            grid: [self.sizes.blocks("rows", self.rows)?, 1, 1],
            threads: threads as u32,
            shared_bytes: 0,
            arguments: &arguments,
        })
    }
}
