//! Matrix products of 8-bit activations with quantized panels.
//!
//! A chunk of 256 columns of the panel is taken apart once, into the L1 cache, and then multiplied with all rows, a few at
//! a time. A tile is some rows times some vectors of eight output columns. For codes without sign a 32-bit lane holds four
//! columns: `vpmaddubsw` multiplies them and adds pairs, as many of which are summed in 16 bits as cannot overflow, before
//! `vpmaddwd` multiplies with the integer scales and widens. Signed codes were widened to 16 bits and go through
//! `vpmaddwd` alone: bytes with sign have no such product.
//!
//! Integer sums are exact, so their order is free; what is rounded is done in the order that [`QuantProduct`] gives.

use std::arch::x86_64::*;
use std::cell::RefCell;

use crate::cpu::linear::{CHUNK_GROUPS, CodeMeaning, Int8Group, PANEL_ROWS, QuantProduct, UnpackedChunk};

/// Rows of most tiles.
const TILE_ROWS: usize = 6;
/// 32-bit lanes of a vector.
const LANES: usize = 8;
const CACHE_LINE_BYTES: usize = 64;

thread_local! {
    static UNPACKED: RefCell<Box<UnpackedChunk>> = RefCell::new(UnpackedChunk::zeroed());
}

/// See [`QuantProduct`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn panel_quant(product: &QuantProduct<'_>, sums: &mut [f32]) {
    UNPACKED.with_borrow_mut(|chunk| {
        match (product.layout.meaning, product.layout.code_bits(), product.layout.halves) {
            (CodeMeaning::Signed, ..) => panel::<Signed>(product, chunk, sums),
            (CodeMeaning::Offset(_), 6, _) => panel::<Unsigned<false, 2, 2>>(product, chunk, sums),
            (CodeMeaning::Offset(_), _, 2) => panel::<Unsigned<false, 4, 2>>(product, chunk, sums),
            (CodeMeaning::Offset(_), 5, _) => panel::<Unsigned<false, 4, 1>>(product, chunk, sums),
            (CodeMeaning::Offset(_), ..) => panel::<Unsigned<false, 8, 1>>(product, chunk, sums),
            (CodeMeaning::Minimum, _, 2) => panel::<Unsigned<true, 4, 2>>(product, chunk, sums),
            (CodeMeaning::Minimum, 5, _) => panel::<Unsigned<true, 4, 1>>(product, chunk, sums),
            (CodeMeaning::Minimum, ..) => panel::<Unsigned<true, 8, 1>>(product, chunk, sums),
        }
    });
}

/// All chunks of a panel, for all rows.
#[target_feature(enable = "avx2,fma,f16c")]
fn panel<P: Products>(product: &QuantProduct<'_>, unpacked: &mut UnpackedChunk, sums: &mut [f32]) {
    let &QuantProduct { x, groups_per_row, panel, layout } = product;
    let num_rows = sums.len() / PANEL_ROWS;
    assert_eq!(panel.len(), layout.panel_bytes(groups_per_row * 32), "bytes of a panel");
    assert!(x.len() >= num_rows * groups_per_row, "activations of {num_rows} rows");
    layout.begin(unpacked);
    sums.fill(0.0);
    for (bytes, first_group) in panel.chunks(layout.chunk_bytes()).zip((0..groups_per_row).step_by(CHUNK_GROUPS)) {
        let num_groups = CHUNK_GROUPS.min(groups_per_row - first_group);
        layout.unpack(bytes, num_groups, unpacked);
        let passes = if num_rows <= 2 { 1 } else { 2 * num_rows.div_ceil(TILE_ROWS) };
        // The next chunk, or panel, lies behind this one. A prefetch of an address that is not mapped does nothing.
        let mut prefetch =
            Prefetch { address: bytes.as_ptr_range().end.cast(), step_bytes: bytes.len() / (passes * num_groups) };
        let mut row = 0;
        while row < num_rows {
            let tile_rows = next_tile_rows(num_rows - row);
            let x = &x[row * groups_per_row + first_group..];
            let sums = &mut sums[row * PANEL_ROWS..][..tile_rows * PANEL_ROWS];
            assert!(x.len() >= (tile_rows - 1) * groups_per_row + num_groups, "activations of a tile");
            let tile = Tile { x: x.as_ptr(), groups_per_row, num_groups, chunk: unpacked, sums: sums.as_mut_ptr() };
            // SAFETY: the CPU has the features of this function; activations and sums of `tile_rows` rows were checked.
            unsafe {
                match tile_rows {
                    1 => tile.run::<P, 1, 4>(0, &mut prefetch),
                    2 => tile.run::<P, 2, 4>(0, &mut prefetch),
                    3 => tile.run_halves::<P, 3>(&mut prefetch),
                    4 => tile.run_halves::<P, 4>(&mut prefetch),
                    5 => tile.run_halves::<P, 5>(&mut prefetch),
                    _ => tile.run_halves::<P, 6>(&mut prefetch),
                }
            }
            row += tile_rows;
        }
    }
}

/// Rows of the next tile when `rows_left` are left: six, and at the end shares of four and five where that is possible.
fn next_tile_rows(rows_left: usize) -> usize {
    match rows_left {
        0..=6 => rows_left,
        7 | 8 => 4,
        9 | 10 => 5,
        _ => TILE_ROWS,
    }
}

/// Where the next bytes are fetched from, step by step.
struct Prefetch {
    address: *const i8,
    step_bytes: usize,
}

impl Prefetch {
    #[inline(always)]
    fn step(&mut self) {
        for line in (0..self.step_bytes).step_by(CACHE_LINE_BYTES) {
            // SAFETY: a prefetch has no effect that could be seen.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(self.address.wrapping_add(line)) };
        }
        self.address = self.address.wrapping_add(self.step_bytes);
    }
}

/// Integer products of a group: `dots[row][vector] = sum over halves of scales (codes . x)`. (Functions that must become
/// part of the tile's loop are `inline(always)`, which excludes `target_feature`: they have the features of the function
/// that they end up in.)
trait Products {
    /// Whether sums of activations are subtracted as integers, as floats, or not at all.
    const MINS: Mins;

    /// # Safety
    /// The CPU has AVX2; the tile has `ROWS` rows and the group; `first + VECTORS <= 4`.
    unsafe fn dots<const ROWS: usize, const VECTORS: usize>(
        tile: &Tile<'_>,
        g: usize,
        first: usize,
    ) -> [[__m256i; VECTORS]; ROWS];
}

#[derive(PartialEq, Eq)]
enum Mins {
    None,
    Integer,
    Float,
}

/// Codes of 16 bits.
struct Signed;

/// Codes of a byte, of which `DEPTH` runs are summed in 16 bits, with `HALVES` scales of a group.
struct Unsigned<const FLOAT_MINS: bool, const DEPTH: usize, const HALVES: usize>;

impl Products for Signed {
    const MINS: Mins = Mins::None;

    #[inline(always)]
    unsafe fn dots<const ROWS: usize, const VECTORS: usize>(
        tile: &Tile<'_>,
        g: usize,
        first: usize,
    ) -> [[__m256i; VECTORS]; ROWS] {
        let codes = tile.chunk.signed_codes(g).as_ptr();
        // SAFETY: promised by the caller.
        unsafe {
            let mut dots = [[_mm256_setzero_si256(); VECTORS]; ROWS];
            for step in 0..16 {
                let mut weights = [_mm256_setzero_si256(); VECTORS];
                for (vector, weights) in weights.iter_mut().enumerate() {
                    *weights = _mm256_load_si256(codes.add((step * PANEL_ROWS + (first + vector) * LANES) * 2).cast());
                }
                for (row, dots) in dots.iter_mut().enumerate() {
                    let x = broadcast((*tile.group(row, g)).wide.as_ptr().add(2 * step).cast());
                    for (dot, weights) in dots.iter_mut().zip(weights) {
                        *dot = _mm256_add_epi32(*dot, _mm256_madd_epi16(weights, x));
                    }
                }
            }
            dots
        }
    }
}

impl<const FLOAT_MINS: bool, const DEPTH: usize, const HALVES: usize> Products for Unsigned<FLOAT_MINS, DEPTH, HALVES> {
    const MINS: Mins = if FLOAT_MINS { Mins::Float } else { Mins::Integer };

    #[inline(always)]
    unsafe fn dots<const ROWS: usize, const VECTORS: usize>(
        tile: &Tile<'_>,
        g: usize,
        first: usize,
    ) -> [[__m256i; VECTORS]; ROWS] {
        let codes = tile.chunk.codes(g).as_ptr();
        // SAFETY: promised by the caller.
        unsafe {
            let mut dots = [[_mm256_setzero_si256(); VECTORS]; ROWS];
            for start in (0..8).step_by(DEPTH) {
                let mut pairs = [[_mm256_setzero_si256(); VECTORS]; ROWS];
                for step in start..start + DEPTH {
                    let mut weights = [_mm256_setzero_si256(); VECTORS];
                    for (vector, weights) in weights.iter_mut().enumerate() {
                        let code = (step * PANEL_ROWS + (first + vector) * LANES) * 4;
                        *weights = _mm256_load_si256(codes.add(code).cast());
                    }
                    for (row, pairs) in pairs.iter_mut().enumerate() {
                        let x = broadcast((*tile.group(row, g)).codes.as_ptr().add(4 * step).cast());
                        for (pair, weights) in pairs.iter_mut().zip(weights) {
                            let products = _mm256_maddubs_epi16(weights, x);
                            *pair = if step == start { products } else { _mm256_add_epi16(*pair, products) };
                        }
                    }
                }
                let scales = &tile.chunk.scales[g][if HALVES == 2 { start / 4 } else { 0 }];
                for vector in 0..VECTORS {
                    let scales = _mm256_load_si256(scales.as_ptr().add((first + vector) * LANES).cast());
                    for (dots, pairs) in dots.iter_mut().zip(&pairs) {
                        let scaled = _mm256_madd_epi16(pairs[vector], scales);
                        dots[vector] = if start == 0 { scaled } else { _mm256_add_epi32(dots[vector], scaled) };
                    }
                }
            }
            dots
        }
    }
}

/// # Safety
/// The CPU has AVX2; `number` points to four bytes.
#[inline(always)]
unsafe fn broadcast(number: *const i32) -> __m256i {
    // SAFETY: promised by the caller.
    unsafe { _mm256_set1_epi32(number.read_unaligned()) }
}

/// Operands of one tile. Its functions trust the pointers.
struct Tile<'a> {
    /// First group of the first row.
    x: *const Int8Group,
    groups_per_row: usize,
    num_groups: usize,
    chunk: &'a UnpackedChunk,
    /// `[rows, 32]`
    sums: *mut f32,
}

impl Tile<'_> {
    #[inline(always)]
    fn group(&self, row: usize, g: usize) -> *const Int8Group {
        self.x.wrapping_add(row * self.groups_per_row + g)
    }

    /// # Safety
    /// As for [`run`](Self::run).
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn run_halves<P: Products, const ROWS: usize>(&self, prefetch: &mut Prefetch) {
        // SAFETY: promised by the caller.
        unsafe {
            self.run::<P, ROWS, 2>(0, prefetch);
            self.run::<P, ROWS, 2>(2, prefetch);
        }
    }

    /// `ROWS` rows times `VECTORS` vectors of columns from `first` on, all groups.
    ///
    /// # Safety
    /// The CPU has AVX2 and FMA; the tile has `ROWS` rows; `first + VECTORS <= 4`.
    #[inline(never)]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn run<P: Products, const ROWS: usize, const VECTORS: usize>(&self, first: usize, prefetch: &mut Prefetch) {
        for g in 0..self.num_groups {
            prefetch.step();
            // SAFETY: promised by the caller.
            unsafe {
                let dots = P::dots::<ROWS, VECTORS>(self, g, first);
                for vector in 0..VECTORS {
                    let lane = (first + vector) * LANES;
                    let d = _mm256_load_ps(self.chunk.d[g].as_ptr().add(lane));
                    for (row, dots) in dots.iter().enumerate() {
                        let x = &*self.group(row, g);
                        let part = match P::MINS {
                            Mins::None => _mm256_mul_ps(d, _mm256_cvtepi32_ps(dots[vector])),
                            Mins::Integer => {
                                let dot = _mm256_sub_epi32(dots[vector], self.mins(x, g, lane));
                                _mm256_mul_ps(d, _mm256_cvtepi32_ps(dot))
                            }
                            Mins::Float => {
                                let d_min = _mm256_load_ps(self.chunk.d_min[g].as_ptr().add(lane));
                                let min = _mm256_mul_ps(d_min, _mm256_cvtepi32_ps(self.mins(x, g, lane)));
                                _mm256_fmsub_ps(d, _mm256_cvtepi32_ps(dots[vector]), min)
                            }
                        };
                        let sum = self.sums.add(row * PANEL_ROWS + lane);
                        let added = _mm256_fmadd_ps(part, _mm256_broadcast_ss(&x.scale), _mm256_loadu_ps(sum));
                        _mm256_storeu_ps(sum, added);
                    }
                }
            }
        }
    }

    /// `sum over halves h of mins[h] s[h]` of eight columns.
    ///
    /// # Safety
    /// As for [`run`](Self::run); `lane + 8 <= 32`.
    #[inline(always)]
    unsafe fn mins(&self, x: &Int8Group, g: usize, lane: usize) -> __m256i {
        // SAFETY: promised by the caller.
        unsafe {
            let mins = _mm256_load_si256(self.chunk.mins[g].as_ptr().add(lane).cast());
            _mm256_madd_epi16(mins, broadcast(x.sums.as_ptr().cast()))
        }
    }
}
