//! Launches `norm.cu`: RMSNorm of rows, into bf16 for products or into f32; with a sum in front of it.

use half::bf16;

use super::launch::{Argument, Launch, Sizes, Slice, SliceMut, Stream};
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
    let rows = Rows::new("rms_norm", norm, x.len(), out.len())?;
    rows.launch(stream, "rms_norm_bf16", &[x.argument(), norm.weight.argument(), out.argument()])
}

/// The same in f32, for results that no product reads.
pub fn rms_norm_rows(
    stream: &impl Stream,
    x: Slice<'_, f32>,
    norm: &RmsNorm<'_>,
    out: &mut SliceMut<'_, f32>,
) -> Result<()> {
    let rows = Rows::new("rms_norm_rows", norm, x.len(), out.len())?;
    rows.launch(stream, "rms_norm_f32", &[x.argument(), norm.weight.argument(), out.argument()])
}

/// `hidden += added`, then the norm of `hidden` into `out`; all `[rows, width]`.
pub fn add_rms_norm(
    stream: &impl Stream,
    hidden: &mut SliceMut<'_, f32>,
    added: Slice<'_, f32>,
    norm: &RmsNorm<'_>,
    out: &mut SliceMut<'_, bf16>,
) -> Result<()> {
    let rows = Rows::new("add_rms_norm", norm, hidden.len(), out.len())?;
    rows.sizes.equal("elements of added", hidden.len(), added.len())?;
    let arguments = [hidden.argument(), added.argument(), norm.weight.argument(), out.argument()];
    rows.launch(stream, "add_rms_norm_bf16", &arguments)
}

/// Rows whose sizes fit together.
struct Rows {
    sizes: Sizes,
    rows: usize,
    width: usize,
    eps: f32,
}

impl Rows {
    fn new(operation: &'static str, norm: &RmsNorm<'_>, x_len: usize, out_len: usize) -> Result<Rows> {
        let (sizes, width) = (Sizes { operation }, norm.weight.len());
        sizes.require("width", width, width > 0 && width.is_multiple_of(VECTOR), "a positive multiple of 4")?;
        let rows = x_len / width;
        sizes.equal("elements of x", rows * width, x_len)?;
        sizes.equal("elements of out", rows * width, out_len)?;
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
