//! Matrix products of f32 activations with f32, f16 and bf16 panels.
//!
//! A tile is some activation rows times some vectors of four output columns, all accumulators in registers. Weights are
//! converted to f32 as they are loaded. Each accumulator is one chain of FMAs over `k` in order, so all tile shapes give
//! the same bits; which shape computes a row is free: one or two rows take all 32 columns at once, so that the panel is
//! read as the one stream it is; three to six take 16 columns at a time, for 24 accumulators and 4 vectors of weights
//! among 32 registers.

use std::arch::aarch64::*;

use super::linear_quant::{Bytes, Matrices, Pairs, panel_quant};
use super::math::{gelu_erf, gelu_tanh, silu};
use super::{LANES, f16_to_f32, tiles};
use crate::cpu::linear::{CodeProducts, LinearKernels, PANEL_ROWS, PanelProduct, round_groups};

/// Any processor.
pub(crate) const KERNELS: LinearKernels = LinearKernels {
    f32: panel::<F32>,
    f16: panel::<F16>,
    bf16: panel::<Bf16>,
    bf16_pairs: None,
    quant: panel_quant::<Pairs>,
    // Codes are bytes, and lie in runs of four columns.
    code_products: CodeProducts::Wide,
    round_int8: round_groups::<false>,
    swiglu,
    gelu_erf: gelu_erf_all,
    gelu_tanh: gelu_tanh_all,
};

/// With dot products of four bytes.
pub(crate) const DOTPROD_KERNELS: LinearKernels = LinearKernels { quant: panel_quant::<Bytes>, ..KERNELS };

/// With products of matrices of bytes.
pub(crate) const I8MM_KERNELS: LinearKernels = LinearKernels { quant: panel_quant::<Matrices>, ..KERNELS };

/// Rows of a tile at most.
const TILE_ROWS: usize = 6;
/// Vectors of a panel's columns.
const PANEL_VECTORS: usize = PANEL_ROWS / LANES;

/// How a panel stores its weights. (Functions that must become part of the tile's loop are `inline(always)`, which
/// excludes `target_feature`: they have the features of the function that they end up in.)
trait PanelFormat {
    type Weight: Copy;
    /// Consecutive `k` that are stored together.
    const GROUP: usize;

    /// Weights of columns `8 * eight .. 8 * eight + 8` for the `k` with index `k_in_group` of its group.
    ///
    /// # Safety
    /// `group` points to a whole group of a panel; `eight < 4`.
    unsafe fn load(group: *const Self::Weight, k_in_group: usize, eight: usize) -> [float32x4_t; 2];
}

struct F32;
struct F16;
struct Bf16;

impl PanelFormat for F32 {
    type Weight = f32;
    const GROUP: usize = 1;

    #[inline(always)]
    unsafe fn load(group: *const f32, _k_in_group: usize, eight: usize) -> [float32x4_t; 2] {
        // SAFETY: a group is 32 numbers.
        unsafe { [vld1q_f32(group.add(8 * eight)), vld1q_f32(group.add(8 * eight + LANES))] }
    }
}

impl PanelFormat for F16 {
    type Weight = u16;
    const GROUP: usize = 1;

    #[inline(always)]
    unsafe fn load(group: *const u16, _k_in_group: usize, eight: usize) -> [float32x4_t; 2] {
        // SAFETY: a group is 32 numbers.
        unsafe { f16_to_f32(vld1q_u16(group.add(8 * eight))) }
    }
}

impl PanelFormat for Bf16 {
    type Weight = u16;
    const GROUP: usize = 2;

    #[inline(always)]
    unsafe fn load(group: *const u16, k_in_group: usize, eight: usize) -> [float32x4_t; 2] {
        // A bf16 is the upper half of an f32; the first of a pair is the lower half of its lane.
        // SAFETY: a group is 64 numbers, two for each column.
        let pairs = [0, 8].map(|offset| unsafe { vreinterpretq_u32_u16(vld1q_u16(group.add(16 * eight + offset))) });
        // SAFETY: every 64-bit ARM processor has these vectors.
        pairs.map(|pairs| unsafe {
            vreinterpretq_f32_u32(match k_in_group {
                0 => vshlq_n_u32::<16>(pairs),
                _ => vandq_u32(pairs, vdupq_n_u32(0xffff_0000)),
            })
        })
    }
}

/// `sums[row, j] (+)= sum over k of x[row, k] * panel[k, j]`
#[target_feature(enable = "neon")]
fn panel<F: PanelFormat>(product: &PanelProduct<'_, f32, F::Weight>, sums: &mut [f32]) {
    let &PanelProduct { x, x_stride, columns, panel, continues } = product;
    let num_rows = sums.len() / PANEL_ROWS;
    if num_rows == 0 {
        return;
    }
    assert!((num_rows - 1) * x_stride + columns <= x.len(), "activations of {num_rows} rows");
    assert_eq!(panel.len(), columns.next_multiple_of(F::GROUP) * PANEL_ROWS, "weights of a panel");
    for rows in tiles(0..num_rows, TILE_ROWS) {
        let tile = Tile {
            x: x[rows.start * x_stride..].as_ptr(),
            x_stride,
            columns,
            panel: panel.as_ptr(),
            continues,
            sums: sums[rows.start * PANEL_ROWS..].as_mut_ptr(),
        };
        // SAFETY: `x` and `panel` were checked above to hold the tile's rows and `columns` columns, `sums` has that many
        // rows by definition of `num_rows`.
        unsafe {
            match rows.len() {
                1 => tile.compute::<F, 1, 4>(),
                2 => tile.compute::<F, 2, 4>(),
                3 => tile.compute::<F, 3, 2>(),
                4 => tile.compute::<F, 4, 2>(),
                5 => tile.compute::<F, 5, 2>(),
                _ => tile.compute::<F, TILE_ROWS, 2>(),
            }
        }
    }
}

/// Operands of one tile. Its functions trust the pointers.
struct Tile<W> {
    /// First of the tile's rows, `[rows, columns]`.
    x: *const f32,
    x_stride: usize,
    columns: usize,
    /// `[columns, 32]`
    panel: *const W,
    /// `[rows, 32]`
    sums: *mut f32,
    continues: bool,
}

/// Sums of some rows and some times eight columns.
type Sums<const ROWS: usize, const EIGHTS: usize> = [[[float32x4_t; 2]; EIGHTS]; ROWS];

impl<W: Copy> Tile<W> {
    /// `ROWS` rows times all columns, `8 * EIGHTS` at a time.
    ///
    /// # Safety
    /// The tile has `ROWS` rows; `EIGHTS` divides 4.
    #[target_feature(enable = "neon")]
    unsafe fn compute<F: PanelFormat<Weight = W>, const ROWS: usize, const EIGHTS: usize>(&self) {
        for first in (0..PANEL_VECTORS / 2).step_by(EIGHTS) {
            // SAFETY: promised by the caller.
            unsafe { self.compute_columns::<F, ROWS, EIGHTS>(first) };
        }
    }

    /// `ROWS` rows times `8 * EIGHTS` columns, from column `8 * first` on.
    ///
    /// # Safety
    /// As for [`compute`](Self::compute); `first + EIGHTS <= 4`.
    #[inline(never)]
    #[target_feature(enable = "neon")]
    unsafe fn compute_columns<F: PanelFormat<Weight = W>, const ROWS: usize, const EIGHTS: usize>(&self, first: usize) {
        let mut accumulators: Sums<ROWS, EIGHTS> = [[[vdupq_n_f32(0.0); 2]; EIGHTS]; ROWS];
        if self.continues {
            self.each_sum(first, &mut accumulators, |sum, place| {
                // SAFETY: promised by the caller: the place is among the tile's sums.
                *sum = unsafe { vld1q_f32(place) };
            });
        }
        let (num_groups, rest) = (self.columns / F::GROUP, self.columns % F::GROUP);
        for group in 0..num_groups {
            // SAFETY: a whole group inside the panel and inside the rows.
            unsafe { self.add_group::<F, ROWS, EIGHTS>(group, F::GROUP, first, &mut accumulators) };
        }
        // SAFETY: the last group is padded in the panel, and `rest` columns of it are in the rows.
        unsafe { self.add_group::<F, ROWS, EIGHTS>(num_groups, rest, first, &mut accumulators) };
        self.each_sum(first, &mut accumulators, |sum, place| {
            // SAFETY: as above.
            unsafe { vst1q_f32(place, *sum) };
        });
    }

    /// Adds the products of the first `count` columns of a group.
    ///
    /// # Safety
    /// As for [`compute_columns`](Self::compute_columns); when `count > 0`, the group is inside the panel and `count` of
    /// its columns are inside the rows.
    #[inline(always)]
    unsafe fn add_group<F: PanelFormat<Weight = W>, const ROWS: usize, const EIGHTS: usize>(
        &self,
        group: usize,
        count: usize,
        first: usize,
        accumulators: &mut Sums<ROWS, EIGHTS>,
    ) {
        for k_in_group in 0..count {
            // SAFETY: promised by the caller.
            unsafe {
                let group_start = self.panel.add(group * F::GROUP * PANEL_ROWS);
                let weights: [[float32x4_t; 2]; EIGHTS] =
                    std::array::from_fn(|eight| F::load(group_start, k_in_group, first + eight));
                for (row, accumulators) in accumulators.iter_mut().enumerate() {
                    let x = *self.x.add(row * self.x_stride + group * F::GROUP + k_in_group);
                    for (accumulators, weights) in accumulators.iter_mut().zip(weights) {
                        for (accumulator, weights) in accumulators.iter_mut().zip(weights) {
                            *accumulator = vfmaq_n_f32(*accumulator, weights, x);
                        }
                    }
                }
            }
        }
    }

    /// Gives each accumulator and its place in memory to `visit`.
    #[inline(always)]
    fn each_sum<const ROWS: usize, const EIGHTS: usize>(
        &self,
        first: usize,
        accumulators: &mut Sums<ROWS, EIGHTS>,
        visit: impl Fn(&mut float32x4_t, *mut f32),
    ) {
        for (row, accumulators) in accumulators.iter_mut().enumerate() {
            for (eight, accumulators) in accumulators.iter_mut().enumerate() {
                for (half, accumulator) in accumulators.iter_mut().enumerate() {
                    let column = 8 * (first + eight) + LANES * half;
                    visit(accumulator, self.sums.wrapping_add(row * PANEL_ROWS + column));
                }
            }
        }
    }
}

/// `gate[i] = silu(gate[i]) * up[i]`, for whole vectors: the sums of a panel are 32 columns wide.
#[target_feature(enable = "neon")]
fn swiglu(gate: &mut [f32], up: &[f32]) {
    let (gate, gate_rest) = gate.as_chunks_mut::<LANES>();
    let (up, up_rest) = up.as_chunks::<LANES>();
    assert!(gate_rest.is_empty() && up_rest.is_empty() && gate.len() == up.len(), "whole vectors of both");
    for (gate, up) in gate.iter_mut().zip(up) {
        // SAFETY: both are four numbers long.
        unsafe { vst1q_f32(gate.as_mut_ptr(), vmulq_f32(silu(vld1q_f32(gate.as_ptr())), vld1q_f32(up.as_ptr()))) };
    }
}

/// `x[i] = gelu_erf(x[i])`, for whole vectors.
#[target_feature(enable = "neon")]
fn gelu_erf_all(x: &mut [f32]) {
    let (x, rest) = x.as_chunks_mut::<LANES>();
    assert!(rest.is_empty(), "whole vectors");
    for x in x {
        // SAFETY: it is four numbers long.
        unsafe { vst1q_f32(x.as_mut_ptr(), gelu_erf(vld1q_f32(x.as_ptr()))) };
    }
}

/// `x[i] = gelu_tanh(x[i])`, for whole vectors.
#[target_feature(enable = "neon")]
fn gelu_tanh_all(x: &mut [f32]) {
    let (x, rest) = x.as_chunks_mut::<LANES>();
    assert!(rest.is_empty(), "whole vectors");
    for x in x {
        // SAFETY: it is four numbers long.
        unsafe { vst1q_f32(x.as_mut_ptr(), gelu_tanh(vld1q_f32(x.as_ptr()))) };
    }
}
