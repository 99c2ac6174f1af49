//! Norms, row by row. RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467): `x / sqrt(mean(x^2) + eps) * weight`.
//! LayerNorm (Ba et al. 2016, arXiv:1607.06450): `(x - mean(x)) / sqrt(variance(x) + eps) * weight + bias`, the variance
//! taken around the mean in a second pass: the difference of mean square and squared mean cancels where the mean is
//! large. The order of each sum depends on the width alone.

use crate::cpu::Cpu;
use crate::cpu::linear::Operand;
use crate::cpu::pool::DisjointMut;
use crate::error::{Error, Result};

/// Fewer elements than this are computed by the caller: waking the pool would cost more than it saves.
pub(crate) const MIN_PARALLEL_ELEMENTS: usize = 32 << 10;

/// Function pointers of one instruction set.
pub(crate) struct NormKernels {
    /// `1 / sqrt(mean(x^2) + eps)`
    pub(crate) inverse_rms: unsafe fn(&[f32], f32) -> f32,
    /// `out = x * factor * weight`
    pub(crate) scale: unsafe fn(&[f32], f32, &[f32], &mut [f32]),
    /// `x = x * factor * weight`
    pub(crate) scale_in_place: unsafe fn(&mut [f32], f32, &[f32]),
    /// `sum(x)`
    pub(crate) sum: unsafe fn(&[f32]) -> f32,
    /// `sum((x - center)^2)`
    pub(crate) sum_of_squares_around: unsafe fn(&[f32], f32) -> f32,
    /// `out = (x - center) * factor * weight + bias`
    pub(crate) center_and_scale: unsafe fn(&CenteredRow<'_>, &mut [f32]),
}

/// A part of a row with what LayerNorm makes of it.
pub(crate) struct CenteredRow<'a> {
    pub(crate) x: &'a [f32],
    /// Mean of the row.
    pub(crate) center: f32,
    /// `1 / sqrt(variance + eps)`
    pub(crate) factor: f32,
    pub(crate) weight: &'a [f32],
    pub(crate) bias: &'a [f32],
}

/// Weight and bias `[width]` and epsilon of a LayerNorm.
#[derive(Debug, Clone, Copy)]
pub struct LayerNorm<'a> {
    /// `[width]`
    pub weight: &'a [f32],
    /// `[width]`
    pub bias: &'a [f32],
    /// Added to the variance.
    pub eps: f32,
}

/// Elements that are scaled at once, on the stack, before they take the operand's form.
const SEGMENT: usize = 512;

/// Normalises each row of `x` `[rows, weight.len()]` into `out` of the same shape.
pub fn rms_norm(cpu: &Cpu, x: &[f32], weight: &[f32], eps: f32, out: &mut Operand) -> Result<()> {
    let (rows, width) = (out.rows(), weight.len());
    let equal = |dimension, expected, actual| match expected == actual {
        true => Ok(()),
        false => Err(Error::SizeMismatch { operation: "rms_norm", dimension, expected, actual }),
    };
    equal("out width", width, out.width())?;
    equal("elements of x", rows * width, x.len())?;
    let kernels = &cpu.kernels().norm;
    let out = out.writer(cpu);
    let norm_rows = |rows: std::ops::Range<usize>| {
        let mut scaled = [0.0; SEGMENT];
        for row in rows {
            let x = &x[row * width..(row + 1) * width];
            // SAFETY: a `Cpu` holds only kernels of an instruction set that this machine has.
            let factor = unsafe { (kernels.inverse_rms)(x, eps) };
            for (segment, (x, weight)) in x.chunks(SEGMENT).zip(weight.chunks(SEGMENT)).enumerate() {
                let scaled = &mut scaled[..x.len()];
                // SAFETY: as above; each row is stored by the one thread that has it among its items.
                unsafe {
                    (kernels.scale)(x, factor, weight, scaled);
                    out.store(row, segment * SEGMENT, scaled);
                }
            }
        }
    };
    run_rows(cpu, rows, x.len(), norm_rows);
    Ok(())
}

/// LayerNorm of each row of `x` `[rows, width]` into `out` of the same shape.
pub fn layer_norm(cpu: &Cpu, x: &[f32], norm: &LayerNorm<'_>, out: &mut Operand) -> Result<()> {
    let (rows, width) = (out.rows(), norm.weight.len());
    norm.check("layer_norm", rows, out.width(), x.len())?;
    let out = out.writer(cpu);
    run_rows(cpu, rows, x.len(), |rows| {
        let mut segment = [0.0; SEGMENT];
        for row in rows {
            norm.segments(cpu, &x[row * width..(row + 1) * width], &mut segment, |start, normed| {
                // SAFETY: each row is stored by the one thread that has it among its items.
                unsafe { out.store(row, start, normed) };
            });
        }
    });
    Ok(())
}

/// LayerNorm of each row of `x` `[rows, width]` in place; the result goes to `out` of the same shape too, in the form
/// that products read.
pub fn layer_norm_in_place(cpu: &Cpu, x: &mut [f32], norm: &LayerNorm<'_>, out: &mut Operand) -> Result<()> {
    let (rows, width, len) = (out.rows(), norm.weight.len(), x.len());
    norm.check("layer_norm_in_place", rows, out.width(), len)?;
    let out = out.writer(cpu);
    let x = DisjointMut::new(x);
    run_rows(cpu, rows, len, |rows| {
        let mut normed = vec![0.0; width];
        let mut segment = [0.0; SEGMENT];
        for row in rows {
            // SAFETY: each row belongs to the one thread that has it among its items.
            let x = unsafe { x.range_mut(row * width..(row + 1) * width) };
            norm.segments(cpu, x, &mut segment, |start, values| {
                normed[start..start + values.len()].copy_from_slice(values);
            });
            x.copy_from_slice(&normed);
            // SAFETY: as above.
            unsafe { out.store(row, 0, &normed) };
        }
    });
    Ok(())
}

impl LayerNorm<'_> {
    fn check(&self, operation: &'static str, rows: usize, out_width: usize, x_len: usize) -> Result<()> {
        let equal = |dimension, expected, actual| match expected == actual {
            true => Ok(()),
            false => Err(Error::SizeMismatch { operation, dimension, expected, actual }),
        };
        let width = self.weight.len();
        equal("bias", width, self.bias.len())?;
        equal("out width", width, out_width)?;
        equal("elements of x", rows * width, x_len)
    }

    /// Gives the normalised row `x` to `store`, a segment and where it begins at a time.
    fn segments(&self, cpu: &Cpu, x: &[f32], segment: &mut [f32; SEGMENT], mut store: impl FnMut(usize, &[f32])) {
        let (kernels, width) = (&cpu.kernels().norm, x.len() as f32);
        // SAFETY: a `Cpu` holds only kernels of an instruction set that this machine has.
        let (center, variance) = unsafe {
            let center = (kernels.sum)(x) / width;
            (center, (kernels.sum_of_squares_around)(x, center) / width)
        };
        let factor = 1.0 / (variance + self.eps).sqrt();
        let parameters = self.weight.chunks(SEGMENT).zip(self.bias.chunks(SEGMENT));
        for (idx, (x, (weight, bias))) in x.chunks(SEGMENT).zip(parameters).enumerate() {
            let normed = &mut segment[..x.len()];
            // SAFETY: as above.
            unsafe { (kernels.center_and_scale)(&CenteredRow { x, center, factor, weight, bias }, normed) };
            store(idx * SEGMENT, normed);
        }
    }
}

/// Runs `work` over all rows, on several threads where the rows have enough elements.
fn run_rows(cpu: &Cpu, rows: usize, elements: usize, work: impl Fn(std::ops::Range<usize>) + Sync) {
    if elements < MIN_PARALLEL_ELEMENTS {
        work(0..rows);
    } else {
        cpu.pool().run(rows, rows.div_ceil(4 * cpu.pool().num_threads()), work);
    }
}
