//! Products of activations with packed weight matrices: `x W^T`, with bias, residual sum, SwiGLU or GELU fused behind it.
//!
//! A weight matrix is cut into panels of [`PANEL_ROWS`] output rows ([`PackedLinear`]); a work item is one panel (for
//! SwiGLU a gate panel and its up panel) times one block of activation rows. Up to a block of rows, that is all of a
//! decode batch, each panel is read from memory once. Beyond it, in prefill, items go through all panels before the
//! next block, so that a block of activations stays in the L2 cache while the weights stream past it.
//!
//! Row invariance: an element is one accumulator over `k = 0..in` in order, then `+ bias`, then the residual sum. Never
//! is a reduction split, so the order of items, the size of blocks and the number of threads are free.

mod operand;
mod packed;

use std::ops::Range;

pub use operand::{Operand, OperandFormat, OperandWriter};
pub use packed::{MatrixSource, PANEL_ROWS, PackedLinear, WeightFormat};

use super::dispatch::Cpu;
use super::pool::DisjointMut;
use crate::error::{Error, Result};
use operand::OperandData;
use packed::{Arrangement, PanelData};

/// Activation rows of one work item at most. More would not fit the L2 cache beside the weights ([`BLOCK_COLUMNS`]).
const MAX_BLOCK_ROWS: usize = 48;
/// Columns that all rows of a block are multiplied with before the next ones: 48 rows of them, their part of a panel and
/// the next part, which is being fetched, fit an L2 cache of 512 KiB, and a tile's rows of them the L1 cache. Even.
const BLOCK_COLUMNS: usize = 512;
/// Work items smaller than this (in multiply-adds) are claimed several at a time.
const MIN_CHUNK_MACS: usize = 1 << 16;

/// The product functions of one instruction set, by form of activations and weights.
pub(crate) struct LinearKernels {
    /// f32 activations, panel `[in, 32]` of f32.
    pub(crate) f32: PanelKernel<f32, f32>,
    /// f32 activations, panel `[in, 32]` of f16.
    pub(crate) f16: PanelKernel<f32, u16>,
    /// f32 activations, panel `[in / 2, 32, 2]` of bf16.
    pub(crate) bf16: PanelKernel<f32, u16>,
    /// bf16 activations with an even row stride, panel `[in / 2, 32, 2]` of bf16; where the instruction set has it.
    pub(crate) bf16_pairs: Option<PanelKernel<u16, u16>>,
    /// `gate[i] = silu(gate[i]) * up[i]`
    pub(crate) swiglu: unsafe fn(gate: &mut [f32], up: &[f32]),
    /// `x[i] = gelu(x[i])`, exact
    pub(crate) gelu_erf: unsafe fn(x: &mut [f32]),
    /// `x[i] = gelu(x[i])`, with the hyperbolic tangent
    pub(crate) gelu_tanh: unsafe fn(x: &mut [f32]),
}

/// The forms of GELU (Hendrycks & Gimpel 2016, arXiv:1606.08415).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gelu {
    /// `x * Phi(x)`, with the error function.
    Erf,
    /// `0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`
    Tanh,
}

/// `sums[row, j] (+)= sum over k of x[row, k] * panel[k, j]`, with `sums` `[rows, 32]`: one chain of additions per
/// element, in the order of `k`, that starts from zero or from the sum of the columns before.
///
/// # Safety
/// The CPU has the instruction set of the table that holds the function.
pub(crate) type PanelKernel<X, W> = unsafe fn(product: &PanelProduct<'_, X, W>, sums: &mut [f32]);

/// Activation rows and the panel that they are multiplied with.
pub(crate) struct PanelProduct<'a, X, W> {
    /// `[rows, columns]`, rows `x_stride` elements apart.
    pub(crate) x: &'a [X],
    pub(crate) x_stride: usize,
    /// Some of the columns of a panel: the reduction of one call.
    pub(crate) columns: usize,
    /// `columns` (rounded up to the format's group) times 32 weights.
    pub(crate) panel: &'a [W],
    /// The sums continue those of the columns before; else they start from zero.
    pub(crate) continues: bool,
}

/// `out = x W^T + bias`: `x` `[rows, in]`, `out` `[rows, out]`.
pub fn matmul(cpu: &Cpu, x: &Operand, weight: &PackedLinear, out: &mut [f32]) -> Result<()> {
    let product = Product::stacked("matmul", cpu, x, weight, out)?;
    product.run_into(out, |out, sums| out.copy_from_slice(sums));
    Ok(())
}

/// `out += x W^T + bias`: `x` `[rows, in]`, `out` `[rows, out]`.
pub fn matmul_add(cpu: &Cpu, x: &Operand, weight: &PackedLinear, out: &mut [f32]) -> Result<()> {
    let product = Product::stacked("matmul_add", cpu, x, weight, out)?;
    product.run_into(out, |out, sums| out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum));
    Ok(())
}

/// `out = silu(x W_gate^T + bias_gate) * (x W_up^T + bias_up)` (Shazeer 2020, arXiv:2002.05202): `x` `[rows, in]`, `out`
/// `[rows, intermediate]`. The weight was packed by [`PackedLinear::pack_gate_up`].
pub fn matmul_swiglu(cpu: &Cpu, x: &Operand, gate_up: &PackedLinear, out: &mut Operand) -> Result<()> {
    let operation = "matmul_swiglu";
    let product = Product::new(operation, cpu, x, gate_up, Arrangement::GateUp)?;
    expect_size(operation, "out rows", x.rows(), out.rows())?;
    expect_size(operation, "out width", gate_up.out_features(), out.width())?;
    let out = out.writer();
    product.run(|rows, pair, columns, sums| {
        let (gate, up) = sums.split_at_mut(rows.len() * PANEL_ROWS);
        product.add_bias(2 * pair, gate);
        product.add_bias(2 * pair + 1, up);
        // SAFETY: `Cpu` has the instruction set of its kernels.
        unsafe { (cpu.kernels().linear.swiglu)(gate, up) };
        for (row, sums) in rows.zip(gate.chunks_exact(PANEL_ROWS)) {
            // SAFETY: each pair of panels and block of rows is one item, so no two items write the same elements.
            unsafe { out.store(row, columns.start, &sums[..columns.len()]) };
        }
    });
    Ok(())
}

/// `out = gelu(x W^T + bias)`: `x` `[rows, in]`, `out` `[rows, out]`.
pub fn matmul_gelu(cpu: &Cpu, x: &Operand, weight: &PackedLinear, gelu: Gelu, out: &mut Operand) -> Result<()> {
    let operation = "matmul_gelu";
    let product = Product::new(operation, cpu, x, weight, Arrangement::Stacked)?;
    expect_size(operation, "out rows", x.rows(), out.rows())?;
    expect_size(operation, "out width", weight.out_features(), out.width())?;
    let apply = match gelu {
        Gelu::Erf => cpu.kernels().linear.gelu_erf,
        Gelu::Tanh => cpu.kernels().linear.gelu_tanh,
    };
    let out = out.writer();
    product.run(|rows, panel, columns, sums| {
        product.add_bias(panel, sums);
        // SAFETY: `Cpu` has the instruction set of its kernels.
        unsafe { apply(sums) };
        for (row, sums) in rows.zip(sums.chunks_exact(PANEL_ROWS)) {
            // SAFETY: each panel and block of rows is one item, so no two items write the same elements.
            unsafe { out.store(row, columns.start, &sums[..columns.len()]) };
        }
    });
    Ok(())
}

fn expect_size(operation: &'static str, dimension: &'static str, expected: usize, actual: usize) -> Result<()> {
    if expected == actual {
        return Ok(());
    }
    Err(Error::SizeMismatch { operation, dimension, expected, actual })
}

/// A product whose sizes fit together.
struct Product<'a> {
    cpu: &'a Cpu,
    x: &'a Operand,
    weight: &'a PackedLinear,
    kernel: Kernel<'a>,
}

/// Activations, weights and the function that multiplies them.
enum Kernel<'a> {
    F32(PanelKernel<f32, f32>, &'a [f32], &'a [f32]),
    Bits16(PanelKernel<f32, u16>, &'a [f32], &'a [u16]),
    Pairs16(PanelKernel<u16, u16>, &'a [u16], &'a [u16]),
}

impl<'a> Product<'a> {
    fn new(
        operation: &'static str,
        cpu: &'a Cpu,
        x: &'a Operand,
        weight: &'a PackedLinear,
        arrangement: Arrangement,
    ) -> Result<Product<'a>> {
        assert_eq!(weight.arrangement(), arrangement, "{operation}: the matrix was packed for another operation");
        expect_size(operation, "x width", weight.in_features(), x.width())?;
        let kernels = &cpu.kernels().linear;
        let kernel = match (x.data(), weight.panels()) {
            (OperandData::F32(x), PanelData::F32(panels)) => Kernel::F32(kernels.f32, x, panels),
            (OperandData::F32(x), PanelData::F16(panels)) => Kernel::Bits16(kernels.f16, x, panels),
            (OperandData::F32(x), PanelData::Bf16(panels)) => Kernel::Bits16(kernels.bf16, x, panels),
            (OperandData::Bf16(x), PanelData::Bf16(panels)) if kernels.bf16_pairs.is_some() => {
                Kernel::Pairs16(kernels.bf16_pairs.expect("checked by the guard"), x, panels)
            }
            _ => {
                let (operand, weight, isa) = (x.format().name(), weight.format().name(), cpu.isa().name());
                return Err(Error::UnsupportedFormats { operation, isa, operand, weight });
            }
        };
        Ok(Product { cpu, x, weight, kernel })
    }

    fn stacked(
        operation: &'static str,
        cpu: &'a Cpu,
        x: &'a Operand,
        weight: &'a PackedLinear,
        out: &[f32],
    ) -> Result<Product<'a>> {
        expect_size(operation, "out elements", x.rows() * weight.out_features(), out.len())?;
        Product::new(operation, cpu, x, weight, Arrangement::Stacked)
    }

    /// Computes all sums of a stacked matrix and gives each row of each panel, with its bias, to `finish`.
    fn run_into(&self, out: &mut [f32], finish: impl Fn(&mut [f32], &[f32]) + Sync) {
        let out_features = self.weight.out_features();
        let out = DisjointMut::new(out);
        self.run(|rows, panel, columns, sums| {
            self.add_bias(panel, sums);
            for (row, sums) in rows.zip(sums.chunks_exact(PANEL_ROWS)) {
                let start = row * out_features;
                // SAFETY: each panel and block of rows is one item, so no two items write the same elements.
                let out = unsafe { out.range_mut(start + columns.start..start + columns.end) };
                finish(out, &sums[..columns.len()]);
            }
        });
    }

    /// Computes all sums, item by item; `finish(rows, group, columns, sums)` gets the sums `[panels of the group, rows,
    /// 32]` of the output columns `columns` (fewer than 32 at the end).
    fn run(&self, finish: impl Fn(Range<usize>, usize, Range<usize>, &mut [f32]) + Sync) {
        let group_panels = self.weight.group_panels();
        let num_groups = self.weight.num_panels() / group_panels;
        let (num_rows, out_features) = (self.x.rows(), self.weight.out_features());
        // Even blocks: a last block of one row would go through all weights for that row.
        let num_blocks = num_rows.div_ceil(MAX_BLOCK_ROWS);
        let block_rows = num_rows.div_ceil(num_blocks.max(1));
        let item_macs = group_panels * PANEL_ROWS * self.weight.in_features() * block_rows;
        let grain = MIN_CHUNK_MACS / item_macs.max(1);
        self.cpu.pool().run(num_blocks * num_groups, grain, |items| {
            let mut sums = [0.0; 2 * MAX_BLOCK_ROWS * PANEL_ROWS];
            for item in items {
                let (block, group) = (item / num_groups, item % num_groups);
                let rows = block * block_rows..((block + 1) * block_rows).min(num_rows);
                let sums = &mut sums[..group_panels * rows.len() * PANEL_ROWS];
                for (i, sums) in sums.chunks_exact_mut(rows.len() * PANEL_ROWS).enumerate() {
                    self.panel_sums(rows.clone(), group * group_panels + i, sums);
                }
                let columns = group * PANEL_ROWS..((group + 1) * PANEL_ROWS).min(out_features);
                finish(rows, group, columns, sums);
            }
        });
    }

    /// `sums` `[rows, 32]` of one panel.
    fn panel_sums(&self, rows: Range<usize>, panel: usize, sums: &mut [f32]) {
        // SAFETY: `Cpu` has the instruction set of its kernels.
        unsafe {
            match self.kernel {
                Kernel::F32(kernel, x, panels) => self.add_blocks(kernel, x, panels, rows, panel, sums),
                Kernel::Bits16(kernel, x, panels) => self.add_blocks(kernel, x, panels, rows, panel, sums),
                Kernel::Pairs16(kernel, x, panels) => self.add_blocks(kernel, x, panels, rows, panel, sums),
            }
        }
    }

    /// Goes through a panel in blocks of columns.
    ///
    /// # Safety
    /// The CPU has the instruction set of `kernel`.
    unsafe fn add_blocks<X, W>(
        &self,
        kernel: PanelKernel<X, W>,
        x: &[X],
        panels: &[W],
        rows: Range<usize>,
        panel: usize,
        sums: &mut [f32],
    ) {
        let x_stride = self.x.stride();
        let panel = &panels[self.weight.panel_range(panel)];
        // A product without columns is one empty block: its sums are zero.
        for start in (0..self.weight.in_features().max(1)).step_by(BLOCK_COLUMNS) {
            let columns = BLOCK_COLUMNS.min(self.weight.in_features() - start);
            let panel_end = panel.len().min((start + BLOCK_COLUMNS) * PANEL_ROWS);
            let product = PanelProduct {
                x: &x[rows.start * x_stride + start..],
                x_stride,
                columns,
                panel: &panel[start * PANEL_ROWS..panel_end],
                continues: start > 0,
            };
            // SAFETY: promised by the caller.
            unsafe { kernel(&product, sums) };
        }
    }

    /// Adds a panel's bias to its `sums` `[rows, 32]`.
    fn add_bias(&self, panel: usize, sums: &mut [f32]) {
        if let Some(bias) = self.weight.panel_bias(panel) {
            for sums in sums.chunks_exact_mut(PANEL_ROWS) {
                sums.iter_mut().zip(bias).for_each(|(sum, bias)| *sum += bias);
            }
        }
    }
}
