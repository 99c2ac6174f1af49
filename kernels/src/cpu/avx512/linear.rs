//! Matrix products: f32 activations with f32, f16 and bf16 panels, and bf16 activations with bf16 panels.
//!
//! A tile is up to 12 activation rows times the two vectors of a panel's 32 output columns, all accumulators in
//! registers: 24 of the 32, two for the weights, one for an activation in all lanes. Each accumulator is one chain over
//! `k` in order, from zero or from the columns before, so tiles of all heights give the same bits; which tile computes a
//! row is free.
//!
//! The f32 chains are those of AVX2, FMA by FMA: both instruction sets give the same bits. The bf16 dot product
//! (`vdpbf16ps`) adds two products a step, the one of the odd `k` first, without rounding between product and sum, and
//! takes denormals as zeros.
//!
//! The rows of one tile read a panel once, bound by memory, and prefetch a fixed distance ahead. More rows go over a panel
//! several times and fetch the next one into the L2 cache evenly over all of their work, else the first tile would wait
//! for memory and the others leave it idle.

use std::arch::asm;
use std::arch::x86_64::*;

use super::LANES;
use super::linear_quant;
use super::math::{gelu_erf, gelu_tanh, silu};
use crate::cpu::avx2;
use crate::cpu::linear::{CodeProducts, Int8Group, LinearKernels, PANEL_ROWS, PanelProduct, WideCodes, round_groups};
use crate::cpu::prefetch::CACHE_LINE_BYTES;

/// The AVX-512 kernels.
pub(crate) const KERNELS: LinearKernels = LinearKernels {
    f32: panel::<F32>,
    f16: panel::<F16>,
    bf16: panel::<Bf16>,
    bf16_pairs: None,
    quant: avx2::linear_quant::panel_quant,
    code_products: CodeProducts::Narrow,
    round_int8: round_int8::<true>,
    swiglu,
    gelu_erf: gelu_erf_all,
    gelu_tanh: gelu_tanh_all,
};

/// The kernels of a CPU that also has the dot products of bf16 and of bytes (VNNI).
pub(crate) const BF16_KERNELS: LinearKernels = LinearKernels {
    bf16_pairs: Some(panel::<Bf16Pairs>),
    quant: linear_quant::panel_quant,
    code_products: CodeProducts::Wide,
    round_int8: round_int8::<false>,
    ..KERNELS
};

/// Vectors of a panel's columns.
const VECTORS: usize = PANEL_ROWS / LANES;
/// How far ahead of its reads a single pass over a panel prefetches. Panels follow each other: near its end that is the
/// next one.
const STREAM_AHEAD_BYTES: usize = 4096;

/// How a panel stores its weights, and how they are multiplied.
trait Product {
    type Activation: Copy;
    type Weight: Copy;
    /// Consecutive `k` that are stored together.
    const GROUP: usize;
    /// Consecutive `k` that one multiplication takes: divides `GROUP`.
    const STEP: usize;
    /// Rows of the largest tile: what the compiler keeps in registers.
    const TILE_ROWS: usize;

    /// Weights of step `step` of the group, for the columns `16 * vector ..`.
    ///
    /// # Safety
    /// The CPU has AVX-512; `group` points to a whole group of a panel.
    unsafe fn weights(group: *const Self::Weight, step: usize, vector: usize) -> __m512;

    /// The activations of one step, in all lanes.
    ///
    /// # Safety
    /// The CPU has AVX-512; `STEP` activations can be read.
    unsafe fn broadcast(x: *const Self::Activation) -> __m512;

    /// `sum + x * weights`
    ///
    /// # Safety
    /// The CPU has AVX-512, and the bf16 dot product where `Self` is made of it.
    unsafe fn multiply_add(x: __m512, weights: __m512, sum: __m512) -> __m512;
}

struct F32;
struct F16;
struct Bf16;
struct Bf16Pairs;

/// The methods that the three products of f32 activations share.
macro_rules! f32_activations {
    () => {
        #[inline]
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
        unsafe fn broadcast(x: *const f32) -> __m512 {
            // SAFETY: promised by the caller.
            _mm512_set1_ps(unsafe { *x })
        }

        #[inline]
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
        unsafe fn multiply_add(x: __m512, weights: __m512, sum: __m512) -> __m512 {
            _mm512_fmadd_ps(x, weights, sum)
        }
    };
}

impl Product for F32 {
    type Activation = f32;
    type Weight = f32;
    const GROUP: usize = 1;
    const STEP: usize = 1;
    const TILE_ROWS: usize = 12;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    unsafe fn weights(group: *const f32, _step: usize, vector: usize) -> __m512 {
        // SAFETY: a group is 32 numbers, `vector < 2`.
        unsafe { _mm512_loadu_ps(group.add(vector * LANES)) }
    }
    f32_activations!();
}

impl Product for F16 {
    type Activation = f32;
    type Weight = u16;
    const GROUP: usize = 1;
    const STEP: usize = 1;
    const TILE_ROWS: usize = 12;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    unsafe fn weights(group: *const u16, _step: usize, vector: usize) -> __m512 {
        // SAFETY: a group is 32 numbers, `vector < 2`.
        _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(group.add(vector * LANES).cast()) })
    }
    f32_activations!();
}

impl Product for Bf16 {
    type Activation = f32;
    type Weight = u16;
    const GROUP: usize = 2;
    const STEP: usize = 1;
    const TILE_ROWS: usize = 8;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    unsafe fn weights(group: *const u16, step: usize, vector: usize) -> __m512 {
        // SAFETY: a group is 64 numbers, two for each column, `vector < 2`.
        let pairs = unsafe { _mm512_loadu_si512(group.add(vector * LANES * 2).cast()) };
        // A bf16 is the upper half of an f32; the first of a pair is the lower half of its lane.
        _mm512_castsi512_ps(match step {
            0 => _mm512_slli_epi32::<16>(pairs),
            _ => _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff_0000_u32 as i32)),
        })
    }
    f32_activations!();
}

impl Product for Bf16Pairs {
    type Activation = u16;
    type Weight = u16;
    const GROUP: usize = 2;
    const STEP: usize = 2;
    const TILE_ROWS: usize = 12;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    unsafe fn weights(group: *const u16, _step: usize, vector: usize) -> __m512 {
        // SAFETY: a group is 64 numbers, two for each column, `vector < 2`.
        unsafe { _mm512_loadu_ps(group.add(vector * LANES * 2).cast()) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    unsafe fn broadcast(x: *const u16) -> __m512 {
        // SAFETY: promised by the caller; a pair has no alignment of its own.
        _mm512_castsi512_ps(_mm512_set1_epi32(unsafe { x.cast::<i32>().read_unaligned() }))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    unsafe fn multiply_add(x: __m512, weights: __m512, mut sum: __m512) -> __m512 {
        // Not the intrinsic: it is only inlined into functions with its feature, and that would take a second copy of
        // all that is generic here.
        // SAFETY: promised by the caller; the instruction reads and writes registers alone.
        unsafe {
            asm!(
                "vdpbf16ps {sum}, {weights}, {x}",
                sum = inout(zmm_reg) sum,
                weights = in(zmm_reg) weights,
                x = in(zmm_reg) x,
                options(pure, nomem, nostack, preserves_flags),
            );
        }
        sum
    }
}

/// `sums[row, j] (+)= sum over k of x[row, k] * panel[k, j]`
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn panel<P: Product>(product: &PanelProduct<'_, P::Activation, P::Weight>, sums: &mut [f32]) {
    let &PanelProduct { x, x_stride, columns, panel, continues } = product;
    let num_rows = sums.len() / PANEL_ROWS;
    if num_rows == 0 {
        return;
    }
    let row_len = columns.next_multiple_of(P::STEP);
    assert!((num_rows - 1) * x_stride + row_len <= x.len(), "activations of {num_rows} rows");
    assert_eq!(panel.len(), columns.next_multiple_of(P::GROUP) * PANEL_ROWS, "weights of a panel");
    let mut prefetch = Prefetch::new(panel, num_rows.div_ceil(P::TILE_ROWS));
    let mut row = 0;
    while row < num_rows {
        let tile_rows = next_tile_rows(num_rows - row, P::TILE_ROWS);
        let tile = Tile::<P> {
            x: x[row * x_stride..].as_ptr(),
            x_stride,
            columns,
            panel: panel.as_ptr(),
            continues,
            sums: sums[row * PANEL_ROWS..].as_mut_ptr(),
        };
        // SAFETY: the CPU has the features of this function, and those of `P` by the table that it is in; `x` and `panel`
        // were checked above to hold `tile_rows` more rows and `row_len` columns, `sums` has that many rows by definition
        // of `num_rows`.
        unsafe { tile.compute_rows(tile_rows, &mut prefetch) };
        row += tile_rows;
    }
}

/// Rows of the next tile when `rows_left` are left: even shares at the end, as small tiles use the registers badly.
pub(super) fn next_tile_rows(rows_left: usize, tile_rows: usize) -> usize {
    match rows_left.div_ceil(tile_rows) {
        0 | 1 => rows_left,
        2 => rows_left.div_ceil(2),
        _ => tile_rows,
    }
}

/// Where weights are fetched from, line by line.
struct Prefetch {
    address: *const i8,
    step_bytes: usize,
}

impl Prefetch {
    /// Ahead of a single pass over `panel`; over several passes, all of the panel behind it. A prefetch of an address
    /// that is not mapped does nothing.
    fn new<W>(panel: &[W], num_passes: usize) -> Prefetch {
        match num_passes {
            1 => Prefetch {
                address: panel.as_ptr().cast::<i8>().wrapping_add(STREAM_AHEAD_BYTES),
                step_bytes: CACHE_LINE_BYTES,
            },
            _ => Prefetch { address: panel.as_ptr_range().end.cast(), step_bytes: CACHE_LINE_BYTES / num_passes },
        }
    }

    /// One step for each line of the panel that is multiplied.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    fn step<const NEAREST: bool>(&mut self) {
        match NEAREST {
            true => _mm_prefetch::<_MM_HINT_T0>(self.address),
            false => _mm_prefetch::<_MM_HINT_T1>(self.address),
        }
        self.address = self.address.wrapping_add(self.step_bytes);
    }
}

/// Operands of one tile. Its functions trust the pointers.
struct Tile<P: Product> {
    /// First of the tile's rows, `[rows, columns]`.
    x: *const P::Activation,
    x_stride: usize,
    columns: usize,
    /// `[columns, 32]`
    panel: *const P::Weight,
    /// `[rows, 32]`
    sums: *mut f32,
    continues: bool,
}

impl<P: Product> Tile<P> {
    /// A tile of 1 to 12 rows.
    ///
    /// # Safety
    /// As for [`compute`](Self::compute), with `ROWS = rows`.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    unsafe fn compute_rows(&self, rows: usize, prefetch: &mut Prefetch) {
        // SAFETY: promised by the caller.
        unsafe {
            match rows {
                1 => self.compute::<1>(prefetch),
                2 => self.compute::<2>(prefetch),
                3 => self.compute::<3>(prefetch),
                4 => self.compute::<4>(prefetch),
                5 => self.compute::<5>(prefetch),
                6 => self.compute::<6>(prefetch),
                7 => self.compute::<7>(prefetch),
                8 => self.compute::<8>(prefetch),
                9 => self.compute::<9>(prefetch),
                10 => self.compute::<10>(prefetch),
                11 => self.compute::<11>(prefetch),
                _ => self.compute::<12>(prefetch),
            }
        }
    }

    /// `ROWS` rows times 32 columns.
    ///
    /// # Safety
    /// The CPU has AVX-512 and what `P` needs; the tile has `ROWS` rows.
    #[inline(never)]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    unsafe fn compute<const ROWS: usize>(&self, prefetch: &mut Prefetch) {
        let mut accumulators = [[_mm512_setzero_ps(); VECTORS]; ROWS];
        if self.continues {
            for (row, accumulators) in accumulators.iter_mut().enumerate() {
                for (vector, accumulator) in accumulators.iter_mut().enumerate() {
                    // SAFETY: the tile has `ROWS` rows of 32 sums.
                    *accumulator = unsafe { _mm512_loadu_ps(self.sums.add(row * PANEL_ROWS + vector * LANES)) };
                }
            }
        }
        let num_groups = self.columns / P::GROUP;
        let group_bytes = size_of::<P::Weight>() * P::GROUP * PANEL_ROWS;
        let mut ahead = Prefetch { ..*prefetch };
        for group in 0..num_groups {
            for _ in 0..group_bytes / CACHE_LINE_BYTES {
                match ROWS {
                    1 => ahead.step::<true>(),
                    _ => ahead.step::<false>(),
                }
            }
            // SAFETY: a whole group inside the panel and inside the rows.
            unsafe { self.add_group(group, P::GROUP / P::STEP, &mut accumulators) };
        }
        prefetch.address = ahead.address;
        // SAFETY: the last group is padded in the panel, and `rest` columns of it (rounded up to whole steps) are in the
        // rows.
        unsafe {
            let rest = self.columns % P::GROUP;
            self.add_group(num_groups, rest.div_ceil(P::STEP), &mut accumulators);
            for (row, accumulators) in accumulators.iter().enumerate() {
                for (vector, &accumulator) in accumulators.iter().enumerate() {
                    _mm512_storeu_ps(self.sums.add(row * PANEL_ROWS + vector * LANES), accumulator);
                }
            }
        }
    }

    /// Adds the products of the first `num_steps` steps of a group.
    ///
    /// # Safety
    /// As for [`compute`](Self::compute); when `num_steps > 0`, the group is inside the panel and that many of its steps
    /// are inside the rows.
    // No feature of its own: only so can it be inlined by force, without which the accumulators live in memory.
    #[inline(always)]
    unsafe fn add_group<const ROWS: usize>(
        &self,
        group: usize,
        num_steps: usize,
        accumulators: &mut [[__m512; VECTORS]; ROWS],
    ) {
        for step in 0..num_steps {
            // SAFETY: promised by the caller.
            unsafe {
                let group_start = self.panel.add(group * P::GROUP * PANEL_ROWS);
                let mut weights = [_mm512_setzero_ps(); VECTORS];
                for (vector, weights) in weights.iter_mut().enumerate() {
                    *weights = P::weights(group_start, step, vector);
                }
                for (row, accumulators) in accumulators.iter_mut().enumerate() {
                    let x = P::broadcast(self.x.add(row * self.x_stride + group * P::GROUP + step * P::STEP));
                    for (accumulator, weights) in accumulators.iter_mut().zip(weights) {
                        *accumulator = P::multiply_add(x, weights, *accumulator);
                    }
                }
            }
        }
    }
}

/// Activations to 8 bits.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn round_int8<const WIDE: bool>(values: &[f32], groups: &mut [Int8Group], wide: &mut [WideCodes]) {
    round_groups::<WIDE>(values, groups, wide);
}

/// `gate[i] = silu(gate[i]) * up[i]`, for whole vectors: the sums of a panel are 32 columns wide.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn swiglu(gate: &mut [f32], up: &[f32]) {
    let (gate, gate_rest) = gate.as_chunks_mut::<LANES>();
    let (up, up_rest) = up.as_chunks::<LANES>();
    assert!(gate_rest.is_empty() && up_rest.is_empty() && gate.len() == up.len(), "whole vectors of both");
    for (gate, up) in gate.iter_mut().zip(up) {
        // SAFETY: both are sixteen numbers long.
        unsafe {
            let product = _mm512_mul_ps(silu(_mm512_loadu_ps(gate.as_ptr())), _mm512_loadu_ps(up.as_ptr()));
            _mm512_storeu_ps(gate.as_mut_ptr(), product);
        }
    }
}

/// `x[i] = gelu_erf(x[i])`, for whole vectors.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn gelu_erf_all(x: &mut [f32]) {
    let (x, rest) = x.as_chunks_mut::<LANES>();
    assert!(rest.is_empty(), "whole vectors");
    for x in x {
        // SAFETY: it is sixteen numbers long.
        unsafe { _mm512_storeu_ps(x.as_mut_ptr(), gelu_erf(_mm512_loadu_ps(x.as_ptr()))) };
    }
}

/// `x[i] = gelu_tanh(x[i])`, for whole vectors.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn gelu_tanh_all(x: &mut [f32]) {
    let (x, rest) = x.as_chunks_mut::<LANES>();
    assert!(rest.is_empty(), "whole vectors");
    for x in x {
        // SAFETY: it is sixteen numbers long.
        unsafe { _mm512_storeu_ps(x.as_mut_ptr(), gelu_tanh(_mm512_loadu_ps(x.as_ptr()))) };
    }
}
