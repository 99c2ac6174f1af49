//! Matrix products of f32 activations with f32, f16 and bf16 panels.
//!
//! A tile is some activation rows times some vectors of eight output columns, all accumulators in registers. Weights are
//! converted to f32 as they are loaded. Each accumulator is one chain of FMAs over `k` in order, so all tile shapes give
//! the same bits; which shape computes a row is free:
//!
//! - 1 or 2 rows are bound by memory: all 32 columns at once, so that the panel is read as the one stream it is, with
//!   prefetches a fixed distance ahead.
//! - 3 to 6 rows: 16 columns at a time, mostly 5 rows: 10 FMAs for each 2 weight vectors and 5 broadcasts, with registers
//!   left to take bf16 pairs apart. (6 rows are 8 % slower with bf16, and not faster with f16; 3 rows times 32 columns
//!   spill, and are 40 % slower than twice 16.)
//!
//! Many rows go over a panel several times. They fetch the next panel into the L2 cache evenly over all of their work on
//! this one, else the first tile would wait for memory and the others leave it idle.

use std::arch::x86_64::*;

use super::linear_quant::panel_quant;
use super::math::{gelu_erf, gelu_tanh, silu};
use crate::cpu::linear::{CodeProducts, Int8Group, LinearKernels, PANEL_ROWS, PanelProduct, WideCodes, round_groups};
use crate::cpu::prefetch::CACHE_LINE_BYTES;

pub(crate) const KERNELS: LinearKernels = LinearKernels {
    f32: panel::<F32>,
    f16: panel::<F16>,
    bf16: panel::<Bf16>,
    bf16_pairs: None,
    quant: panel_quant,
    code_products: CodeProducts::Narrow,
    round_int8,
    swiglu,
    gelu_erf: gelu_erf_all,
    gelu_tanh: gelu_tanh_all,
};

/// Rows of most tiles.
const TILE_ROWS: usize = 5;
/// Lanes of a vector.
const LANES: usize = 8;
/// How far ahead one or two rows prefetch. Measured on Zen 3 with two threads, beside a plain read of memory: 1 KiB 1.0 to
/// 1.2 times its speed, 4 and 16 KiB 0.9 to 1.1, none 0.8 to 1.1.
const STREAM_AHEAD_BYTES: usize = 1024;

/// How a panel stores its weights. (Functions that must become part of the tile's loop are `inline(always)`, which
/// excludes `target_feature`: they have the features of the function that they end up in.)
trait PanelFormat {
    type Weight: Copy;
    /// Consecutive `k` that are stored together.
    const GROUP: usize;

    /// Weights of columns `8 * vector .. 8 * vector + 8` for the `k` with index `k_in_group` of its group.
    ///
    /// # Safety
    /// The CPU has AVX2 and F16C; `group` points to a whole group of a panel.
    unsafe fn load(group: *const Self::Weight, k_in_group: usize, vector: usize) -> __m256;
}

struct F32;
struct F16;
struct Bf16;

impl PanelFormat for F32 {
    type Weight = f32;
    const GROUP: usize = 1;

    #[inline(always)]
    unsafe fn load(group: *const f32, _k_in_group: usize, vector: usize) -> __m256 {
        // SAFETY: a group is 32 numbers, `vector < 4`.
        unsafe { _mm256_loadu_ps(group.add(vector * LANES)) }
    }
}

impl PanelFormat for F16 {
    type Weight = u16;
    const GROUP: usize = 1;

    #[inline(always)]
    unsafe fn load(group: *const u16, _k_in_group: usize, vector: usize) -> __m256 {
        // SAFETY: a group is 32 numbers, `vector < 4`.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(group.add(vector * LANES).cast())) }
    }
}

impl PanelFormat for Bf16 {
    type Weight = u16;
    const GROUP: usize = 2;

    #[inline(always)]
    unsafe fn load(group: *const u16, k_in_group: usize, vector: usize) -> __m256 {
        // SAFETY: a group is 64 numbers, two for each column, `vector < 4`.
        let pairs = unsafe { _mm256_loadu_si256(group.add(vector * LANES * 2).cast()) };
        // A bf16 is the upper half of an f32; the first of a pair is the lower half of its lane.
        // SAFETY: the CPU has AVX2 (promise of the caller).
        unsafe {
            _mm256_castsi256_ps(match k_in_group {
                0 => _mm256_slli_epi32::<16>(pairs),
                _ => _mm256_and_si256(pairs, _mm256_set1_epi32(0xffff_0000_u32 as i32)),
            })
        }
    }
}

/// `sums[row, j] (+)= sum over k of x[row, k] * panel[k, j]`
#[target_feature(enable = "avx2,fma,f16c")]
fn panel<F: PanelFormat>(product: &PanelProduct<'_, f32, F::Weight>, sums: &mut [f32]) {
    let &PanelProduct { x, x_stride, columns, panel, continues } = product;
    let num_rows = sums.len() / PANEL_ROWS;
    if num_rows == 0 {
        return;
    }
    assert!((num_rows - 1) * x_stride + columns <= x.len(), "activations of {num_rows} rows");
    assert_eq!(panel.len(), columns.next_multiple_of(F::GROUP) * PANEL_ROWS, "weights of a panel");
    let num_tiles = num_rows.div_ceil(TILE_ROWS);
    // The next panel lies behind this one. A prefetch of an address that is not mapped does nothing.
    let mut prefetch = Prefetch {
        address: panel.as_ptr_range().end.cast(),
        step_bytes: CACHE_LINE_BYTES.min(size_of_val(panel) / (2 * num_tiles * columns.div_ceil(F::GROUP)).max(1)),
    };
    let mut row = 0;
    while row < num_rows {
        let tile_rows = next_tile_rows(num_rows - row);
        let tile = Tile {
            x: x[row * x_stride..].as_ptr(),
            x_stride,
            columns,
            panel: panel.as_ptr(),
            continues,
            sums: sums[row * PANEL_ROWS..].as_mut_ptr(),
        };
        // SAFETY: the CPU has the features of this function; `x` and `panel` were checked above to hold `tile_rows`
        // more rows and `columns` columns, `sums` has that many rows by definition of `num_rows`.
        unsafe {
            match tile_rows {
                1 => tile.stream::<F, 1>(),
                2 => tile.stream::<F, 2>(),
                3 => tile.compute::<F, 3>(&mut prefetch),
                4 => tile.compute::<F, 4>(&mut prefetch),
                5 => tile.compute::<F, 5>(&mut prefetch),
                _ => tile.compute::<F, 6>(&mut prefetch),
            }
        }
        row += tile_rows;
    }
}

/// Rows of the next tile when `rows_left` are left: five, and at the end shares of four to six where that is possible.
fn next_tile_rows(rows_left: usize) -> usize {
    match rows_left {
        0..=6 => rows_left,
        7 | 8 => 4,
        11 | 12 => 6,
        _ => 5,
    }
}

/// Where the next panel's bytes are fetched from, step by step.
struct Prefetch {
    address: *const i8,
    step_bytes: usize,
}

impl Prefetch {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn step(&mut self) {
        _mm_prefetch::<_MM_HINT_T1>(self.address);
        self.address = self.address.wrapping_add(self.step_bytes);
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

impl<W: Copy> Tile<W> {
    /// `ROWS` rows, one half of the columns after the other.
    ///
    /// # Safety
    /// The CPU has AVX2, FMA and F16C; the tile has `ROWS` rows.
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn compute<F: PanelFormat<Weight = W>, const ROWS: usize>(&self, prefetch: &mut Prefetch) {
        // SAFETY: promised by the caller.
        unsafe {
            self.compute_half::<F, ROWS>(0, prefetch);
            self.compute_half::<F, ROWS>(2, prefetch);
        }
    }

    /// `ROWS` rows times the columns of two vectors, from vector `first` on.
    ///
    /// # Safety
    /// As for [`compute`](Self::compute); `first` is 0 or 2.
    #[inline(never)]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn compute_half<F: PanelFormat<Weight = W>, const ROWS: usize>(
        &self,
        first: usize,
        prefetch: &mut Prefetch,
    ) {
        // SAFETY: promised by the caller.
        let mut accumulators = unsafe { self.first_sums::<ROWS, 2>(first) };
        let num_groups = self.columns / F::GROUP;
        let mut ahead = Prefetch { ..*prefetch };
        for group in 0..num_groups {
            ahead.step();
            // SAFETY: a whole group inside the panel and inside the rows.
            unsafe { self.add_group::<F, ROWS, 2>(group, F::GROUP, first, &mut accumulators) };
        }
        prefetch.address = ahead.address;
        // SAFETY: the last group is padded in the panel, and `rest` columns of it are in the rows.
        unsafe {
            let rest = self.columns % F::GROUP;
            self.add_group::<F, ROWS, 2>(num_groups, rest, first, &mut accumulators);
            self.store_sums(first, &accumulators);
        }
    }

    /// Adds the products of the first `count` columns of a group.
    ///
    /// # Safety
    /// As for [`compute`](Self::compute); when `count > 0`, the group is inside the panel and `count` of its columns are
    /// inside the rows.
    #[inline(always)]
    unsafe fn add_group<F: PanelFormat<Weight = W>, const ROWS: usize, const VECTORS: usize>(
        &self,
        group: usize,
        count: usize,
        first: usize,
        accumulators: &mut [[__m256; VECTORS]; ROWS],
    ) {
        for k_in_group in 0..count {
            // SAFETY: promised by the caller.
            unsafe {
                let group_start = self.panel.add(group * F::GROUP * PANEL_ROWS);
                let mut weights = [_mm256_setzero_ps(); VECTORS];
                for (vector, weights) in weights.iter_mut().enumerate() {
                    *weights = F::load(group_start, k_in_group, first + vector);
                }
                for (row, accumulators) in accumulators.iter_mut().enumerate() {
                    let x = _mm256_broadcast_ss(&*self.x.add(row * self.x_stride + group * F::GROUP + k_in_group));
                    for (accumulator, weights) in accumulators.iter_mut().zip(weights) {
                        *accumulator = _mm256_fmadd_ps(x, weights, *accumulator);
                    }
                }
            }
        }
    }

    /// What the accumulators start from.
    ///
    /// # Safety
    /// As for [`compute`](Self::compute).
    #[inline(always)]
    unsafe fn first_sums<const ROWS: usize, const VECTORS: usize>(&self, first: usize) -> [[__m256; VECTORS]; ROWS] {
        // SAFETY: promised by the caller.
        unsafe {
            let mut accumulators = [[_mm256_setzero_ps(); VECTORS]; ROWS];
            if self.continues {
                for (row, accumulators) in accumulators.iter_mut().enumerate() {
                    for (vector, accumulator) in accumulators.iter_mut().enumerate() {
                        *accumulator = _mm256_loadu_ps(self.sums.add(row * PANEL_ROWS + (first + vector) * LANES));
                    }
                }
            }
            accumulators
        }
    }

    /// # Safety
    /// As for [`compute`](Self::compute).
    #[inline(always)]
    unsafe fn store_sums<const ROWS: usize, const VECTORS: usize>(
        &self,
        first: usize,
        accumulators: &[[__m256; VECTORS]; ROWS],
    ) {
        for (row, accumulators) in accumulators.iter().enumerate() {
            for (vector, &accumulator) in accumulators.iter().enumerate() {
                // SAFETY: promised by the caller.
                unsafe { _mm256_storeu_ps(self.sums.add(row * PANEL_ROWS + (first + vector) * LANES), accumulator) };
            }
        }
    }

    /// `ROWS` rows times all columns, at the speed of memory.
    ///
    /// # Safety
    /// The CPU has AVX2, FMA and F16C; the tile has `ROWS` rows.
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn stream<F: PanelFormat<Weight = W>, const ROWS: usize>(&self) {
        // SAFETY: promised by the caller.
        let mut accumulators = unsafe { self.first_sums::<ROWS, 4>(0) };
        let num_groups = self.columns / F::GROUP;
        let group_bytes = size_of::<W>() * F::GROUP * PANEL_ROWS;
        for group in 0..num_groups {
            let ahead = self.panel.cast::<i8>().wrapping_add(group * group_bytes + STREAM_AHEAD_BYTES);
            for line in (0..group_bytes).step_by(CACHE_LINE_BYTES) {
                _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(line));
            }
            // SAFETY: a whole group inside the panel and inside the rows.
            unsafe { self.add_group::<F, ROWS, 4>(group, F::GROUP, 0, &mut accumulators) };
        }
        // SAFETY: the last group is padded in the panel, and `rest` columns of it are in the rows.
        unsafe {
            self.add_group::<F, ROWS, 4>(num_groups, self.columns % F::GROUP, 0, &mut accumulators);
            self.store_sums(0, &accumulators);
        }
    }
}

/// Activations to 8 bits.
#[target_feature(enable = "avx2,fma")]
fn round_int8(values: &[f32], groups: &mut [Int8Group], wide: &mut [WideCodes]) {
    round_groups::<true>(values, groups, wide);
}

/// `gate[i] = silu(gate[i]) * up[i]`, for whole vectors: the sums of a panel are 32 columns wide.
#[target_feature(enable = "avx2,fma,f16c")]
fn swiglu(gate: &mut [f32], up: &[f32]) {
    let (gate, gate_rest) = gate.as_chunks_mut::<LANES>();
    let (up, up_rest) = up.as_chunks::<LANES>();
    assert!(gate_rest.is_empty() && up_rest.is_empty() && gate.len() == up.len(), "whole vectors of both");
    for (gate, up) in gate.iter_mut().zip(up) {
        // SAFETY: both are eight numbers long.
        unsafe {
            let product = _mm256_mul_ps(silu(_mm256_loadu_ps(gate.as_ptr())), _mm256_loadu_ps(up.as_ptr()));
            _mm256_storeu_ps(gate.as_mut_ptr(), product);
        }
    }
}

/// `x[i] = gelu_erf(x[i])`, for whole vectors.
#[target_feature(enable = "avx2,fma,f16c")]
fn gelu_erf_all(x: &mut [f32]) {
    let (x, rest) = x.as_chunks_mut::<LANES>();
    assert!(rest.is_empty(), "whole vectors");
    for x in x {
        // SAFETY: it is eight numbers long.
        unsafe { _mm256_storeu_ps(x.as_mut_ptr(), gelu_erf(_mm256_loadu_ps(x.as_ptr()))) };
    }
}

/// `x[i] = gelu_tanh(x[i])`, for whole vectors.
#[target_feature(enable = "avx2,fma,f16c")]
fn gelu_tanh_all(x: &mut [f32]) {
    let (x, rest) = x.as_chunks_mut::<LANES>();
    assert!(rest.is_empty(), "whole vectors");
    for x in x {
        // SAFETY: it is eight numbers long.
        unsafe { _mm256_storeu_ps(x.as_mut_ptr(), gelu_tanh(_mm256_loadu_ps(x.as_ptr()))) };
    }
}
