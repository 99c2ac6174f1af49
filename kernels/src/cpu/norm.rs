//! RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467): `x / sqrt(mean(x^2) + eps) * weight`, row by row. The order of the
//! sum of squares depends on the width alone.

use crate::cpu::Cpu;
use crate::cpu::linear::Operand;
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
    let out = out.writer();
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
    if x.len() < MIN_PARALLEL_ELEMENTS {
        norm_rows(0..rows);
    } else {
        cpu.pool().run(rows, rows.div_ceil(4 * cpu.pool().num_threads()), norm_rows);
    }
    Ok(())
}
