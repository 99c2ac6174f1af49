//! Products of activations with packed weight matrices: `x W^T`, with bias, residual sum, SwiGLU or GELU fused behind it.
//!
//! A weight matrix is cut into panels of [`PANEL_ROWS`] output rows ([`PackedLinear`]); a work item is one panel (for
//! SwiGLU a gate panel and its up panel) times one block of activation rows. Up to a block of rows, that is all of a
//! decode batch, each panel is read from memory once. Beyond it, in prefill, items go through all panels before the
//! next block, so that a block of activations stays in the L2 cache while the weights stream past it.
//!
//! Row invariance: an element is one accumulator over `k = 0..in` in order, then `+ bias`, then the residual sum. Never
//! is a reduction split (with quantized weights: exact integers within a group of 32 columns, then the groups in order), so the
//! order of items, the size of blocks and the number of threads are free.

mod int8;
mod operand;
mod packed;
mod plain_panel;
mod quant_panel;

use std::mem::MaybeUninit;
use std::ops::Range;

pub use operand::{Operand, OperandFormat, OperandWriter};
pub use packed::{MatrixSource, PANEL_ROWS, PackedLinear, WeightFormat};

use super::dispatch::Cpu;
use super::pool::DisjointMut;
use crate::error::{Error, Result};
pub(crate) use int8::{Int8Group, Int8Rows, RoundKernel, WideCodes, round_groups};
use operand::PlainRows;
use packed::{Arrangement, PanelFormat};
use plain_panel::PlainFormat;
pub(crate) use quant_panel::{
    CHUNK_GROUPS, CodeMeaning, CodeProducts, Codes, GROUP_CODES, GroupBytes, PanelCodes, QuantLayout, UnpackedChunk,
};

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
    /// int8 activations, quantized panel whose codes lie as `code_products` says.
    pub(crate) quant: QuantKernel,
    pub(crate) code_products: CodeProducts,
    /// Activations to 8 bits, in the form that `quant` reads.
    pub(crate) round_int8: RoundKernel,
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

/// `sums[row, j] = sum over groups g of` what [`QuantProduct`] says, in the order of `g`, with `sums` `[rows, 32]`.
///
/// # Safety
/// As for [`PanelKernel`].
pub(crate) type QuantKernel = unsafe fn(product: &QuantProduct<'_>, sums: &mut [f32]);

/// Rows of 8-bit activations and a quantized panel.
///
/// With `q` the codes of a row of the panel in a group of 32 columns, `x` those of an activation row, `s` the sums of
/// `x` over the halves of the group, and integer scales and factors by half:
///
/// ```text
/// dot  = sum over halves h of scales[h] (q . x over h)            exact, in integers
/// min  = sum over halves h of mins[h] s[h]                        exact, in integers
/// part = d (dot)                                  signed codes
///        d (dot - min)                            codes with an offset; the difference in integers
///        fma(d, dot, -(d_min min))                codes with a minimum
/// sum  = fma(part, scale of x, sum)               group by group
/// ```
///
/// All that is rounded is the last two lines, so that every instruction set gives the same bits.
pub(crate) struct QuantProduct<'a> {
    /// First group of the first row.
    pub(crate) x: &'a [Int8Group],
    /// Codes of the same groups in 16 bits.
    pub(crate) wide: &'a [WideCodes],
    /// Groups from one row to the next: those of all columns.
    pub(crate) groups_per_row: usize,
    pub(crate) panel: &'a [u8],
    pub(crate) layout: &'a QuantLayout,
}

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
    let out = out.writer(cpu);
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
    let out = out.writer(cpu);
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

/// The same memory as zeros.
fn zeroed(sums: &mut [MaybeUninit<f32>]) -> &mut [f32] {
    sums.fill(MaybeUninit::new(0.0));
    // SAFETY: all of them have just been written.
    unsafe { std::slice::from_raw_parts_mut(sums.as_mut_ptr().cast(), sums.len()) }
}

/// A product whose sizes fit together.
struct Product<'a> {
    cpu: &'a Cpu,
    x: &'a Operand,
    weight: &'a PackedLinear,
}

/// Activations and panels of one section, and the function that multiplies them.
enum Kernel<'a> {
    F32(PanelKernel<f32, f32>, &'a [f32]),
    Bits16(PanelKernel<f32, u16>, &'a [f32]),
    Pairs16(PanelKernel<u16, u16>, &'a [u16]),
    Quant(QuantKernel, &'a Int8Rows, QuantLayout),
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
        let product = Product { cpu, x, weight };
        for (section, format) in weight.sections().iter().zip(weight.formats()) {
            if let PanelFormat::Quant(layout) = section.panel_format {
                let expected = QuantLayout::new(layout.quant_type, cpu.kernels().linear.code_products);
                assert_eq!(layout, expected, "{operation}: the matrix was packed for another instruction set");
            }
            if product.kernel(section.panel_format).is_none() {
                let (operand, weight, isa) = (x.format().name(), format.name(), cpu.isa().name());
                return Err(Error::UnsupportedFormats { operation, isa, operand, weight });
            }
        }
        Ok(product)
    }

    /// How activations in the form at hand are multiplied with such panels, if they can be.
    fn kernel(&self, panels: PanelFormat) -> Option<Kernel<'a>> {
        let kernels = &self.cpu.kernels().linear;
        Some(match (panels, self.x.plain()) {
            (PanelFormat::Quant(layout), _) => Kernel::Quant(kernels.quant, self.x.int8()?, layout),
            (PanelFormat::Plain(PlainFormat::F32), PlainRows::F32(x)) => Kernel::F32(kernels.f32, x),
            (PanelFormat::Plain(PlainFormat::F16), PlainRows::F32(x)) => Kernel::Bits16(kernels.f16, x),
            (PanelFormat::Plain(PlainFormat::Bf16), PlainRows::F32(x)) => Kernel::Bits16(kernels.bf16, x),
            (PanelFormat::Plain(PlainFormat::Bf16), PlainRows::Bf16(x)) => Kernel::Pairs16(kernels.bf16_pairs?, x),
            (PanelFormat::Plain(_), _) => return None,
        })
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
                match <&mut [f32; PANEL_ROWS]>::try_from(&mut *out) {
                    // Of a length that the compiler knows.
                    Ok(out) => finish(out, &sums[..PANEL_ROWS]),
                    Err(_) => finish(out, &sums[..columns.len()]),
                }
            }
        });
    }

    /// Computes all sums, item by item; `finish(rows, group, columns, sums)` gets the sums `[panels of the group, rows,
    /// 32]` of the output columns `columns` (fewer than 32 at the end).
    fn run(&self, finish: impl Fn(Range<usize>, usize, Range<usize>, &mut [f32]) + Sync) {
        let group_panels = self.weight.group_panels();
        let num_groups = self.weight.num_panels() / group_panels;
        let num_rows = self.x.rows();
        // Even blocks: a last block of one row would go through all weights for that row.
        let num_blocks = num_rows.div_ceil(MAX_BLOCK_ROWS);
        let block_rows = num_rows.div_ceil(num_blocks.max(1));
        let item_macs = group_panels * PANEL_ROWS * self.weight.in_features() * block_rows;
        let grain = MIN_CHUNK_MACS / item_macs.max(1);
        self.cpu.pool().run(num_blocks * num_groups, grain, |items| {
            // Only as many as there are rows are ever touched.
            let mut sums = [const { MaybeUninit::<f32>::uninit() }; 2 * MAX_BLOCK_ROWS * PANEL_ROWS];
            for item in items {
                let (block, group) = (item / num_groups, item % num_groups);
                let rows = block * block_rows..((block + 1) * block_rows).min(num_rows);
                let sums = zeroed(&mut sums[..group_panels * rows.len() * PANEL_ROWS]);
                for (i, sums) in sums.chunks_exact_mut(rows.len() * PANEL_ROWS).enumerate() {
                    self.panel_sums(rows.clone(), group * group_panels + i, sums);
                }
                finish(rows, group, self.weight.group_columns(group), sums);
            }
        });
    }

    /// `sums` `[rows, 32]` of one panel.
    fn panel_sums(&self, rows: Range<usize>, panel: usize, sums: &mut [f32]) {
        let section = self.weight.section(panel);
        let bytes = section.panel(panel);
        // SAFETY: `Cpu` has the instruction set of its kernels; panels of 16 and 32-bit numbers are aligned to them, as
        // their sizes are and the buffer's start is.
        unsafe {
            match self.kernel(section.panel_format).expect("checked when the product was made") {
                Kernel::F32(kernel, x) => self.add_blocks(kernel, x, bytes.align_to().1, rows, sums),
                Kernel::Bits16(kernel, x) => self.add_blocks(kernel, x, bytes.align_to().1, rows, sums),
                Kernel::Pairs16(kernel, x) => self.add_blocks(kernel, x, bytes.align_to().1, rows, sums),
                Kernel::Quant(kernel, x, layout) => {
                    let (wide, groups_per_row) = (x.wide_from(rows.start), x.groups_per_row());
                    let x = x.groups_from(rows.start);
                    kernel(&QuantProduct { x, wide, groups_per_row, panel: bytes, layout: &layout }, sums);
                }
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
        panel: &[W],
        rows: Range<usize>,
        sums: &mut [f32],
    ) {
        let x_stride = self.x.stride();
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
