//! Matrix products of 8-bit activations with quantized panels.
//!
//! A chunk of 256 columns of the panel is taken apart once, into the L1 cache, and then multiplied with all rows, a few at
//! a time; codes of 8 bits are taken from the planes as they are multiplied. (A few rows alone: `linear_quant_rows.rs`.) A
//! tile is some rows times some vectors of eight output columns. For codes without sign a 32-bit lane holds four columns:
//! `vpmaddubsw` multiplies them and adds pairs, as many of which are summed in 16 bits as cannot overflow, before
//! `vpmaddwd` multiplies with the integer scales and widens. Signed codes are widened to 16 bits and go through `vpmaddwd`
//! alone: bytes with sign have no such product.
//!
//! Integer sums are exact, so their order is free; what is rounded is done in the order that [`QuantProduct`] gives.

use std::arch::asm;
use std::arch::x86_64::*;
use std::cell::RefCell;
use std::hint::black_box;
use std::mem::offset_of;

use super::linear_quant_rows;
use crate::cpu::linear::{
    CHUNK_GROUPS, CodeMeaning, GroupBytes, Int8Group, PANEL_ROWS, QuantLayout, QuantProduct, UnpackedChunk, WideCodes,
};
use crate::cpu::prefetch::Prefetch;
use crate::quant::QuantType;

/// Rows of most tiles.
const TILE_ROWS: usize = 6;
/// 32-bit lanes of a vector.
pub(super) const LANES: usize = 8;

thread_local! {
    static UNPACKED: RefCell<Box<UnpackedChunk>> = RefCell::new(UnpackedChunk::zeroed());
}

/// See [`QuantProduct`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn panel_quant(product: &QuantProduct<'_>, sums: &mut [f32]) {
    let num_rows = sums.len() / PANEL_ROWS;
    if product.layout.meaning != CodeMeaning::Signed && (1..=linear_quant_rows::MAX_ROWS).contains(&num_rows) {
        return linear_quant_rows::panel_rows(product, sums);
    }
    UNPACKED.with_borrow_mut(|chunk| {
        let layout = product.layout;
        match (layout.meaning, layout.low_bits, layout.high_bits) {
            (CodeMeaning::Signed, 8, _) => panel::<Signed<true>>(product, chunk, sums),
            (CodeMeaning::Signed, ..) => panel::<Signed<false>>(product, chunk, sums),
            (CodeMeaning::Offset(_), 4, 0) => panel::<Unsigned<false, 4, 1>>(product, chunk, sums),
            (CodeMeaning::Offset(_), 4, 1) => panel::<Unsigned<false, 5, 1>>(product, chunk, sums),
            (CodeMeaning::Offset(_), 4, _) => panel::<Unsigned<false, 6, 2>>(product, chunk, sums),
            (CodeMeaning::Offset(_), ..) => panel::<Unsigned<false, 3, 2>>(product, chunk, sums),
            (CodeMeaning::Minimum, 4, 0) => panel::<Unsigned<true, 4, 1>>(product, chunk, sums),
            (CodeMeaning::Minimum, 4, _) => panel::<Unsigned<true, 5, 1>>(product, chunk, sums),
            (CodeMeaning::Minimum, ..) => panel::<Unsigned<true, 2, 2>>(product, chunk, sums),
        }
    });
}

/// All chunks of a panel, for all rows.
#[target_feature(enable = "avx2,fma,f16c")]
fn panel<P: Products>(product: &QuantProduct<'_>, unpacked: &mut UnpackedChunk, sums: &mut [f32]) {
    let &QuantProduct { x, wide, groups_per_row, panel, layout } = product;
    let num_rows = sums.len() / PANEL_ROWS;
    assert_eq!(panel.len(), layout.panel_bytes(groups_per_row * 32), "bytes of a panel");
    assert!(x.len() >= num_rows * groups_per_row, "activations of {num_rows} rows");
    assert_eq!(wide.len(), x.len(), "groups in both forms");
    if !P::DIRECT {
        layout.begin(unpacked);
    }
    sums.fill(0.0);
    let passes = if num_rows <= 2 { 1 } else { 2 * num_rows.div_ceil(TILE_ROWS) };
    for (bytes, first_group) in panel.chunks(layout.chunk_bytes()).zip((0..groups_per_row).step_by(CHUNK_GROUPS)) {
        let num_groups = CHUNK_GROUPS.min(groups_per_row - first_group);
        if !P::DIRECT {
            layout.unpack_codes(bytes, num_groups, unpacked);
            for (g, group) in layout.groups(bytes).take(num_groups).enumerate() {
                unpack_scales(layout, &group, g, unpacked);
            }
        }
        let mut prefetch = Prefetch::behind(bytes, passes * num_groups);
        let mut row = 0;
        while row < num_rows {
            let tile_rows = next_tile_rows(num_rows - row);
            let x = &x[row * groups_per_row + first_group..];
            let sums = &mut sums[row * PANEL_ROWS..][..tile_rows * PANEL_ROWS];
            assert!(x.len() >= (tile_rows - 1) * groups_per_row + num_groups, "activations of a tile");
            let tile = Tile {
                x: x.as_ptr(),
                wide: wide[row * groups_per_row + first_group..].as_ptr(),
                groups_per_row,
                num_groups,
                chunk: unpacked,
                planes: bytes[layout.header_bytes()..].as_ptr(),
                group_bytes: layout.group_bytes(),
                d: match layout.halves {
                    0 if P::DIRECT => Scales::Planes(layout.group_bytes() - 2 * PANEL_ROWS),
                    0 => Scales::Groups,
                    _ => Scales::Chunk,
                },
                sums: sums.as_mut_ptr(),
            };
            // SAFETY: the CPU has the features of this function; activations and sums of `tile_rows` rows were checked;
            // the chunk has `num_groups` groups of planes, and was taken apart, with codes unless they are not read.
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

/// Scales and minimums of group `g`, as [`QuantLayout::unpack`] does; but `d` and `d_min` that a chunk has once go to group
/// 0 alone.
#[target_feature(enable = "avx2,fma,f16c")]
fn unpack_scales(layout: &QuantLayout, group: &GroupBytes<'_>, g: usize, out: &mut UnpackedChunk) {
    let halves = |bytes: &[u8], vector: usize| {
        let bytes: &[u8; 2 * LANES] = bytes[2 * LANES * vector..][..2 * LANES].try_into().expect("16 bytes");
        // SAFETY: 16 bytes.
        unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
    };
    let integers = |bytes: &[u8], vector: usize| {
        let bytes: [u8; LANES] = bytes[LANES * vector..][..LANES].try_into().expect("8 bytes");
        _mm256_cvtepi8_epi32(_mm_cvtsi64_si128(i64::from_le_bytes(bytes)))
    };
    let store = |out: &mut [i32; PANEL_ROWS], vector: usize, integers: __m256i| {
        let out: &mut [i32; LANES] = (&mut out[LANES * vector..][..LANES]).try_into().expect("8 numbers");
        // SAFETY: 32 bytes.
        unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), integers) };
    };
    let store_floats = |out: &mut [f32; PANEL_ROWS], vector: usize, floats: __m256| {
        let out: &mut [f32; LANES] = (&mut out[LANES * vector..][..LANES]).try_into().expect("8 numbers");
        // SAFETY: 32 bytes.
        unsafe { _mm256_storeu_ps(out.as_mut_ptr(), floats) };
    };
    // Scales of a chunk are read from the first group.
    if layout.halves == 0 || g == 0 {
        for vector in 0..PANEL_ROWS / LANES {
            let d = match layout.quant_type {
                QuantType::MXFP4 => {
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(halves(group.d, vector))))
                }
                _ => _mm256_cvtph_ps(halves(group.d, vector)),
            };
            store_floats(&mut out.d[g], vector, d);
            if layout.meaning == CodeMeaning::Minimum {
                store_floats(&mut out.d_min[g], vector, _mm256_cvtph_ps(halves(&group.d[2 * PANEL_ROWS..], vector)));
            }
        }
    }
    if layout.halves == 0 {
        return;
    }
    for vector in 0..PANEL_ROWS / LANES {
        let pair = |first: __m256i, second: __m256i| _mm256_blend_epi16::<0xaa>(first, _mm256_slli_epi32::<16>(second));
        for half in 0..layout.halves {
            let scales = integers(&group.scales[half * PANEL_ROWS..], vector);
            store(&mut out.scales[g][half], vector, pair(scales, scales));
        }
        let factors = if group.mins.is_empty() { group.scales } else { group.mins };
        let second = &factors[(layout.halves - 1) * PANEL_ROWS..];
        let factors = pair(integers(factors, vector), integers(second, vector));
        let factors = match layout.meaning {
            CodeMeaning::Minimum => factors,
            _ => _mm256_mullo_epi16(factors, _mm256_set1_epi16(layout.offset())),
        };
        store(&mut out.mins[g], vector, factors);
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

/// Integer products of a group: `dots[row][vector] = sum over halves of scales (codes . x)`. (Functions that must become
/// part of the tile's loop are `inline(always)`, which excludes `target_feature`: they have the features of the function
/// that they end up in.)
trait Products {
    /// Codes and scales are read from the planes: the chunk is not taken apart.
    const DIRECT: bool;
    /// Whether sums of activations are subtracted as integers, as floats, or not at all.
    const MINS: Mins;

    /// # Safety
    /// The CPU has AVX2; the tile has `ROWS` rows and the group; `first + VECTORS <= 4`; unless `DIRECT`, the codes were
    /// taken apart.
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

/// Codes of 16 bits, from planes of 8 where `DIRECT`.
struct Signed<const DIRECT: bool>;

/// Codes of so many bits, with `HALVES` scales of a group.
struct Unsigned<const FLOAT_MINS: bool, const BITS: usize, const HALVES: usize>;

impl<const DIRECT: bool> Products for Signed<DIRECT> {
    const DIRECT: bool = DIRECT;
    const MINS: Mins = Mins::None;

    #[inline(always)]
    unsafe fn dots<const ROWS: usize, const VECTORS: usize>(
        tile: &Tile<'_>,
        g: usize,
        first: usize,
    ) -> [[__m256i; VECTORS]; ROWS] {
        // Each row's place is kept in a register: left to itself, the compiler adds them up from row to row in each step.
        let rows: [*const WideCodes; ROWS] = std::array::from_fn(|row| black_box(tile.wide(row, g)));
        let mut dots = [[zero(); VECTORS]; ROWS];
        // Steps are unrolled by hand: with one a turn, the loop is bound by its instructions, not by its products.
        let at = (tile, g, first);
        // SAFETY: promised by the caller.
        unsafe {
            Self::step::<ROWS, VECTORS, 0>(at, &rows, &mut dots);
            Self::step::<ROWS, VECTORS, 1>(at, &rows, &mut dots);
            Self::step::<ROWS, VECTORS, 2>(at, &rows, &mut dots);
            Self::step::<ROWS, VECTORS, 3>(at, &rows, &mut dots);
            Self::step::<ROWS, VECTORS, 4>(at, &rows, &mut dots);
            Self::step::<ROWS, VECTORS, 5>(at, &rows, &mut dots);
            Self::step::<ROWS, VECTORS, 6>(at, &rows, &mut dots);
            Self::step::<ROWS, VECTORS, 7>(at, &rows, &mut dots);
            Self::step::<ROWS, VECTORS, 8>(at, &rows, &mut dots);
            Self::step::<ROWS, VECTORS, 9>(at, &rows, &mut dots);
            Self::step::<ROWS, VECTORS, 10>(at, &rows, &mut dots);
            Self::step::<ROWS, VECTORS, 11>(at, &rows, &mut dots);
            Self::step::<ROWS, VECTORS, 12>(at, &rows, &mut dots);
            Self::step::<ROWS, VECTORS, 13>(at, &rows, &mut dots);
            Self::step::<ROWS, VECTORS, 14>(at, &rows, &mut dots);
            Self::step::<ROWS, VECTORS, 15>(at, &rows, &mut dots);
        }
        dots
    }
}

impl<const DIRECT: bool> Signed<DIRECT> {
    /// Adds the products of one step of two columns.
    ///
    /// # Safety
    /// As for [`Products::dots`].
    #[inline(always)]
    unsafe fn step<const ROWS: usize, const VECTORS: usize, const STEP: usize>(
        (tile, g, first): (&Tile<'_>, usize, usize),
        rows: &[*const WideCodes; ROWS],
        dots: &mut [[__m256i; VECTORS]; ROWS],
    ) {
        let codes = tile.chunk.signed_codes(g).as_ptr();
        // SAFETY: promised by the caller.
        unsafe {
            let mut weights = [zero(); VECTORS];
            for (vector, weights) in weights.iter_mut().enumerate() {
                let code = (STEP * PANEL_ROWS + (first + vector) * LANES) * 2;
                *weights = match DIRECT {
                    true => _mm256_cvtepi8_epi16(_mm_loadu_si128(tile.plane(g).add(code).cast())),
                    false => _mm256_load_si256(codes.add(code).cast()),
                };
            }
            for (row, dots) in rows.iter().zip(dots) {
                add_wide_products::<VECTORS, STEP>(dots, &weights, *row);
            }
        }
    }
}

impl<const FLOAT_MINS: bool, const BITS: usize, const HALVES: usize> Unsigned<FLOAT_MINS, BITS, HALVES> {
    const DEPTH: usize = sum_depth(BITS, HALVES);

    /// Adds the products of one step; at the end of `DEPTH` steps, what they sum to in 16 bits goes to `dots`.
    ///
    /// # Safety
    /// As for [`Products::dots`].
    #[inline(always)]
    unsafe fn step<const ROWS: usize, const VECTORS: usize, const STEP: usize>(
        (tile, g, first): (&Tile<'_>, usize, usize),
        rows: &[*const Int8Group; ROWS],
        pairs: &mut [[__m256i; VECTORS]; ROWS],
        dots: &mut [[__m256i; VECTORS]; ROWS],
    ) {
        let codes = tile.chunk.codes(g).as_ptr();
        // SAFETY: promised by the caller.
        unsafe {
            let mut weights = [zero(); VECTORS];
            for (vector, weights) in weights.iter_mut().enumerate() {
                *weights = _mm256_load_si256(codes.add(STEP * 128 + (first + vector) * 32).cast());
            }
            for (row, pairs) in rows.iter().zip(pairs.iter_mut()) {
                add_products::<VECTORS, STEP>(pairs, &weights, *row);
            }
            if !(STEP + 1).is_multiple_of(Self::DEPTH) {
                return;
            }
            let scales = &tile.chunk.scales[g][STEP / 4 * (HALVES - 1)];
            for vector in 0..VECTORS {
                let scales = _mm256_load_si256(scales.as_ptr().add((first + vector) * LANES).cast());
                for (dots, pairs) in dots.iter_mut().zip(pairs.iter_mut()) {
                    let pairs = std::mem::replace(&mut pairs[vector], zero());
                    dots[vector] = _mm256_add_epi32(dots[vector], _mm256_madd_epi16(pairs, scales));
                }
            }
        }
    }
}

impl<const FLOAT_MINS: bool, const BITS: usize, const HALVES: usize> Products for Unsigned<FLOAT_MINS, BITS, HALVES> {
    const DIRECT: bool = false;
    const MINS: Mins = if FLOAT_MINS { Mins::Float } else { Mins::Integer };

    #[inline(always)]
    unsafe fn dots<const ROWS: usize, const VECTORS: usize>(
        tile: &Tile<'_>,
        g: usize,
        first: usize,
    ) -> [[__m256i; VECTORS]; ROWS] {
        // Each row's place is kept in a register: left to itself, the compiler adds them up from row to row in each step.
        let rows: [*const Int8Group; ROWS] = std::array::from_fn(|row| black_box(tile.group(row, g)));
        let (mut pairs, mut dots) = ([[zero(); VECTORS]; ROWS], [[zero(); VECTORS]; ROWS]);
        let at = (tile, g, first);
        // SAFETY: promised by the caller.
        unsafe {
            Self::step::<ROWS, VECTORS, 0>(at, &rows, &mut pairs, &mut dots);
            Self::step::<ROWS, VECTORS, 1>(at, &rows, &mut pairs, &mut dots);
            Self::step::<ROWS, VECTORS, 2>(at, &rows, &mut pairs, &mut dots);
            Self::step::<ROWS, VECTORS, 3>(at, &rows, &mut pairs, &mut dots);
            Self::step::<ROWS, VECTORS, 4>(at, &rows, &mut pairs, &mut dots);
            Self::step::<ROWS, VECTORS, 5>(at, &rows, &mut pairs, &mut dots);
            Self::step::<ROWS, VECTORS, 6>(at, &rows, &mut pairs, &mut dots);
            Self::step::<ROWS, VECTORS, 7>(at, &rows, &mut pairs, &mut dots);
        }
        dots
    }
}

/// Steps whose products are summed in 16 bits: each adds at most `2 * 127 * (2^bits - 1)`, and a half has four.
pub(super) const fn sum_depth(bits: usize, halves: usize) -> usize {
    match (bits, halves) {
        (6, _) => 2,
        (5, _) | (_, 2) => 4,
        _ => 8,
    }
}

/// Eight times four codes of a step, from planes of `low` and `high` bits.
///
/// # Safety
/// The CPU has AVX2; `planes` points to the planes of a group, 128 bytes for each bit; `STEP < 8`, `vector < 4`.
#[inline(always)]
pub(super) unsafe fn codes_of_planes<const STEP: usize>(
    planes: *const u8,
    vector: usize,
    low: usize,
    high: usize,
) -> __m256i {
    // The bits of the step in a plane of `bits`, moved to the bits `to..` of each byte.
    let bits_of = |plane: *const u8, bits: usize, to: usize| {
        let from = bits * (STEP / bits);
        // SAFETY: promised by the caller: the vector is inside the plane.
        unsafe {
            let bytes = _mm256_loadu_si256(plane.add(STEP % bits * 128 + vector * 32).cast());
            let moved = match from > to {
                true => _mm256_srl_epi16(bytes, _mm_cvtsi32_si128((from - to) as i32)),
                false => _mm256_sll_epi16(bytes, _mm_cvtsi32_si128((to - from) as i32)),
            };
            _mm256_and_si256(moved, _mm256_set1_epi8((((1 << bits) - 1) << to) as i8))
        }
    };
    let codes = bits_of(planes, low, 0);
    if high == 0 {
        return codes;
    }
    // SAFETY: the CPU has AVX2.
    unsafe { _mm256_or_si256(codes, bits_of(planes.wrapping_add(128 * low), high, low)) }
}

/// Adds `weights[2 i] * x[0] + weights[2 i + 1] * x[1]` to each sum: two numbers of 16 bits, those of the step in a
/// group `x`, sums of 32. In assembly because the compiler takes long chains of integer additions apart into trees, for which
/// there are not enough registers.
///
/// # Safety
/// `x` points to a group, which has the step.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn add_wide_products<const VECTORS: usize, const STEP: usize>(
    sums: &mut [__m256i; VECTORS],
    weights: &[__m256i; VECTORS],
    x: *const WideCodes,
) {
    let (sums, rest) = sums.as_chunks_mut::<2>();
    assert!(rest.is_empty(), "an even number of vectors");
    for ([first, second], weights) in sums.iter_mut().zip(weights.as_chunks::<2>().0) {
        // SAFETY: reads the four bytes, and the named registers.
        unsafe {
            asm!(
                "vpbroadcastd {x}, dword ptr [{codes} + {place}]",
                "vpmaddwd {products}, {first_weights}, {x}",
                "vpmaddwd {x}, {second_weights}, {x}",
                "vpaddd {first}, {first}, {products}",
                "vpaddd {second}, {second}, {x}",
                x = out(ymm_reg) _,
                products = out(ymm_reg) _,
                codes = in(reg) x,
                place = const 4 * STEP,
                first_weights = in(ymm_reg) weights[0],
                second_weights = in(ymm_reg) weights[1],
                first = inout(ymm_reg) *first,
                second = inout(ymm_reg) *second,
                options(pure, readonly, nostack, preserves_flags)
            );
        }
    }
}

/// Adds `weights[2 i] * x[i % 2 * 2] + weights[2 i + 1] * x[i % 2 * 2 + 1]` to each sum: four bytes, those of the step in
/// group `x`, weights without sign, sums of 16 bits.
///
/// # Safety
/// `x` points to a group, which has the step.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn add_products<const VECTORS: usize, const STEP: usize>(
    sums: &mut [__m256i; VECTORS],
    weights: &[__m256i; VECTORS],
    x: *const Int8Group,
) {
    let (sums, rest) = sums.as_chunks_mut::<2>();
    assert!(rest.is_empty(), "an even number of vectors");
    for ([first, second], weights) in sums.iter_mut().zip(weights.as_chunks::<2>().0) {
        // SAFETY: reads the four bytes, and the named registers.
        unsafe {
            asm!(
                "vpbroadcastd {x}, dword ptr [{group} + {place}]",
                "vpmaddubsw {products}, {first_weights}, {x}",
                "vpmaddubsw {x}, {second_weights}, {x}",
                "vpaddw {first}, {first}, {products}",
                "vpaddw {second}, {second}, {x}",
                x = out(ymm_reg) _,
                products = out(ymm_reg) _,
                group = in(reg) x,
                place = const offset_of!(Int8Group, codes) + 4 * STEP,
                first_weights = in(ymm_reg) weights[0],
                second_weights = in(ymm_reg) weights[1],
                first = inout(ymm_reg) *first,
                second = inout(ymm_reg) *second,
                options(pure, readonly, nostack, preserves_flags)
            );
        }
    }
}

#[inline(always)]
pub(super) fn zero() -> __m256i {
    // SAFETY: a vector of zero bits, whatever the CPU.
    unsafe { std::mem::zeroed() }
}

/// # Safety
/// The CPU has AVX2; `number` points to four bytes.
#[inline(always)]
pub(super) unsafe fn broadcast(number: *const i32) -> __m256i {
    // SAFETY: promised by the caller.
    unsafe { _mm256_set1_epi32(number.read_unaligned()) }
}

/// Operands of one tile. Its functions trust the pointers.
struct Tile<'a> {
    /// First group of the first row.
    x: *const Int8Group,
    /// Its codes in 16 bits.
    wide: *const WideCodes,
    groups_per_row: usize,
    num_groups: usize,
    chunk: &'a UnpackedChunk,
    /// Planes of the chunk's first group.
    planes: *const u8,
    group_bytes: usize,
    d: Scales,
    /// `[rows, 32]`
    sums: *mut f32,
}

/// Where the scale of a group is.
#[derive(Clone, Copy)]
enum Scales {
    /// Taken apart, by group.
    Groups,
    /// Taken apart, one for the chunk.
    Chunk,
    /// As f16, so many bytes behind the group's first plane.
    Planes(usize),
}

impl Tile<'_> {
    #[inline(always)]
    fn group(&self, row: usize, g: usize) -> *const Int8Group {
        self.x.wrapping_add(row * self.groups_per_row + g)
    }
    #[inline(always)]
    fn wide(&self, row: usize, g: usize) -> *const WideCodes {
        self.wide.wrapping_add(row * self.groups_per_row + g)
    }
    #[inline(always)]
    fn plane(&self, g: usize) -> *const u8 {
        self.planes.wrapping_add(g * self.group_bytes)
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
    /// The CPU has AVX2 and FMA; the tile has `ROWS` rows; `first + VECTORS <= 4`; unless `DIRECT`, the codes were taken
    /// apart.
    #[inline(never)]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn run<P: Products, const ROWS: usize, const VECTORS: usize>(&self, first: usize, prefetch: &mut Prefetch) {
        let mut ahead = *prefetch;
        for g in 0..self.num_groups {
            ahead.step();
            // Sums stay in memory from group to group: the registers are the integer sums'.
            let sums = black_box(self.sums);
            // SAFETY: promised by the caller.
            unsafe {
                let dots = P::dots::<ROWS, VECTORS>(self, g, first);
                let mut d = [_mm256_setzero_ps(); VECTORS];
                for (vector, d) in d.iter_mut().enumerate() {
                    let lane = (first + vector) * LANES;
                    *d = match self.d {
                        Scales::Groups => _mm256_load_ps(self.chunk.d[g].as_ptr().add(lane)),
                        Scales::Chunk => _mm256_load_ps(self.chunk.d[0].as_ptr().add(lane)),
                        Scales::Planes(offset) => {
                            _mm256_cvtph_ps(_mm_loadu_si128(self.plane(g).add(offset + 2 * lane).cast()))
                        }
                    };
                }
                let d_min = &self.chunk.d_min[if let Scales::Chunk = self.d { 0 } else { g }];
                for (row, dots) in dots.iter().enumerate() {
                    let x = self.group(row, g);
                    let x_scale = _mm256_broadcast_ss(&(*x).scale);
                    let x_sums = broadcast((&raw const (*x).sums).cast());
                    for (vector, &dot) in dots.iter().enumerate() {
                        let lane = (first + vector) * LANES;
                        let min = || {
                            let mins = _mm256_load_si256(self.chunk.mins[g].as_ptr().add(lane).cast());
                            _mm256_madd_epi16(mins, x_sums)
                        };
                        let d = d[vector];
                        let part = match P::MINS {
                            Mins::None => _mm256_mul_ps(d, _mm256_cvtepi32_ps(dot)),
                            Mins::Integer => _mm256_mul_ps(d, _mm256_cvtepi32_ps(_mm256_sub_epi32(dot, min()))),
                            Mins::Float => {
                                let min =
                                    _mm256_mul_ps(_mm256_load_ps(d_min.as_ptr().add(lane)), _mm256_cvtepi32_ps(min()));
                                _mm256_fmsub_ps(d, _mm256_cvtepi32_ps(dot), min)
                            }
                        };
                        let sum = sums.add(row * PANEL_ROWS + lane);
                        _mm256_storeu_ps(sum, _mm256_fmadd_ps(part, x_scale, _mm256_loadu_ps(sum)));
                    }
                }
            }
        }
        *prefetch = ahead;
    }
}
