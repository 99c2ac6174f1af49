//! Matrix products of 8-bit activations with quantized panels, by AVX-512 VNNI.
//!
//! `vpdpbusd` multiplies four bytes without sign with four bytes with sign and adds them to a sum of 32 bits, in which no
//! format's sums overflow. So all codes are bytes without sign here: those that have one, and levels of tables, carry an
//! offset of 128 ([`CodeProducts::Wide`](crate::cpu::linear::CodeProducts)). The sum of each half of a group is multiplied
//! with its integer scale, where there are any.
//!
//! A chunk of 256 columns of the panel is taken apart once, into the L1 cache, and then multiplied with all rows: up to
//! eight of them a tile, times the two vectors of a panel's 32 output columns. Formats with two integer scales a group
//! need a second set of sums, and take six. For one or two rows, which are bound by memory, the codes are taken from the
//! planes as they are multiplied.
//!
//! Integer sums are exact, so their order is free; what is rounded is done in the order that [`QuantProduct`] gives.

use std::arch::x86_64::*;
use std::cell::RefCell;
use std::hint::black_box;

use super::LANES;
use super::linear::next_tile_rows;
use crate::cpu::avx2::linear_quant::unpack_scales;
use crate::cpu::linear::{CHUNK_GROUPS, CodeMeaning, Int8Group, PANEL_ROWS, QuantLayout, QuantProduct, UnpackedChunk};

/// Vectors of a panel's columns.
const VECTORS: usize = PANEL_ROWS / LANES;
/// Columns that one instruction multiplies and adds up.
const RUN: usize = 4;
/// Runs of a group of 32 columns.
const STEPS: usize = 32 / RUN;
const CACHE_LINE_BYTES: usize = 64;

thread_local! {
    static UNPACKED: RefCell<Box<UnpackedChunk>> = RefCell::new(UnpackedChunk::zeroed());
}

/// See [`QuantProduct`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
pub(crate) fn panel_quant(product: &QuantProduct<'_>, sums: &mut [f32]) {
    UNPACKED.with_borrow_mut(|chunk| {
        let layout = product.layout;
        let has_table = layout.unsigned_levels().is_some();
        match (layout.meaning, layout.low_bits, layout.high_bits, layout.halves) {
            (CodeMeaning::Signed, ..) => panic!("codes with sign have no products here"),
            (CodeMeaning::Offset(_), 8, ..) => panel::<Codes<false, 8, 0, 0, false>>(product, chunk, sums),
            (CodeMeaning::Offset(_), 4, 0, _) if has_table => {
                panel::<Codes<false, 4, 0, 0, true>>(product, chunk, sums)
            }
            (CodeMeaning::Offset(_), 4, 0, _) => panel::<Codes<false, 4, 0, 0, false>>(product, chunk, sums),
            (CodeMeaning::Offset(_), 4, 1, _) => panel::<Codes<false, 4, 1, 0, false>>(product, chunk, sums),
            (CodeMeaning::Offset(_), 4, ..) => panel::<Codes<false, 4, 2, 2, false>>(product, chunk, sums),
            (CodeMeaning::Offset(_), ..) => panel::<Codes<false, 2, 1, 2, false>>(product, chunk, sums),
            (CodeMeaning::Minimum, 4, 0, 0) => panel::<Codes<true, 4, 0, 0, false>>(product, chunk, sums),
            (CodeMeaning::Minimum, 4, 0, _) => panel::<Codes<true, 4, 0, 1, false>>(product, chunk, sums),
            (CodeMeaning::Minimum, 4, _, 0) => panel::<Codes<true, 4, 1, 0, false>>(product, chunk, sums),
            (CodeMeaning::Minimum, 4, ..) => panel::<Codes<true, 4, 1, 1, false>>(product, chunk, sums),
            (CodeMeaning::Minimum, ..) => panel::<Codes<true, 2, 0, 2, false>>(product, chunk, sums),
        }
    });
}

/// All chunks of a panel, for all rows.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
fn panel<F: Format>(product: &QuantProduct<'_>, unpacked: &mut UnpackedChunk, sums: &mut [f32]) {
    let &QuantProduct { x, groups_per_row, panel, layout } = product;
    let num_rows = sums.len() / PANEL_ROWS;
    assert_eq!(panel.len(), layout.panel_bytes(groups_per_row * 32), "bytes of a panel");
    assert!(x.len() >= num_rows * groups_per_row, "activations of {num_rows} rows");
    assert_eq!((layout.low_bits, layout.high_bits, layout.halves), (F::LOW, F::HIGH, F::HALVES), "format of a panel");
    layout.begin(unpacked);
    sums.fill(0.0);
    let levels = layout.unsigned_levels().unwrap_or_default();
    let is_direct = num_rows <= 2;
    let passes = num_rows.div_ceil(F::TILE_ROWS).max(1);
    for (bytes, first_group) in panel.chunks(layout.chunk_bytes()).zip((0..groups_per_row).step_by(CHUNK_GROUPS)) {
        let num_groups = CHUNK_GROUPS.min(groups_per_row - first_group);
        if !is_direct {
            unpack_codes::<F>(layout, bytes, num_groups, &levels, unpacked);
        }
        for (g, group) in layout.groups(bytes).take(num_groups).enumerate() {
            unpack_scales(layout, &group, g, unpacked);
        }
        // The next chunk, or panel, lies behind this one. A prefetch of an address that is not mapped does nothing.
        let mut prefetch =
            Prefetch { address: bytes.as_ptr_range().end.cast(), step_bytes: bytes.len() / (passes * num_groups) };
        let mut row = 0;
        while row < num_rows {
            let tile_rows = next_tile_rows(num_rows - row, F::TILE_ROWS);
            let x = &x[row * groups_per_row + first_group..];
            let sums = &mut sums[row * PANEL_ROWS..][..tile_rows * PANEL_ROWS];
            assert!(x.len() >= (tile_rows - 1) * groups_per_row + num_groups, "activations of a tile");
            let tile = Tile {
                x: x.as_ptr(),
                groups_per_row,
                num_groups,
                chunk: unpacked,
                planes: bytes[layout.header_bytes()..].as_ptr(),
                group_bytes: layout.group_bytes(),
                levels: &levels,
                sums: sums.as_mut_ptr(),
            };
            // SAFETY: the CPU has the features of this function; activations and sums of `tile_rows` rows were checked;
            // the chunk has `num_groups` groups of planes of the format, and was taken apart, with codes unless they are
            // not read.
            unsafe {
                match (tile_rows, is_direct) {
                    (1, true) => tile.run::<F, true, 1>(&mut prefetch),
                    (2, true) => tile.run::<F, true, 2>(&mut prefetch),
                    (1, false) => tile.run::<F, false, 1>(&mut prefetch),
                    (2, false) => tile.run::<F, false, 2>(&mut prefetch),
                    (3, _) => tile.run::<F, false, 3>(&mut prefetch),
                    (4, _) => tile.run::<F, false, 4>(&mut prefetch),
                    (5, _) => tile.run::<F, false, 5>(&mut prefetch),
                    (6, _) => tile.run::<F, false, 6>(&mut prefetch),
                    (7, _) => tile.run::<F, false, 7>(&mut prefetch),
                    _ => tile.run::<F, false, 8>(&mut prefetch),
                }
            }
            row += tile_rows;
        }
    }
}

/// The codes of a chunk, as [`QuantLayout::unpack_codes`] does.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
fn unpack_codes<F: Format>(
    layout: &QuantLayout,
    chunk: &[u8],
    num_groups: usize,
    levels: &[u8; 16],
    out: &mut UnpackedChunk,
) {
    for (g, group) in layout.groups(chunk).take(num_groups).enumerate() {
        assert_eq!((group.low.len(), group.high.len()), (128 * F::LOW, 128 * F::HIGH), "bytes of planes");
        for (i, out) in out.codes_mut(g).as_chunks_mut::<{ RUN * LANES }>().0.iter_mut().enumerate() {
            // SAFETY: the CPU has the features of this function; the planes have the format's size, the high one lies
            // behind the low one, and a group has 16 times 64 codes; 64 bytes are written to as many.
            unsafe {
                let codes = codes_of_planes::<F>(group.low.as_ptr(), i / VECTORS, i % VECTORS, levels);
                _mm512_storeu_si512(out.as_mut_ptr().cast(), codes);
            }
        }
    }
}

/// Sixteen times four codes, from the planes. (Functions that must become part of the tile's loop are `inline(always)`,
/// which excludes `target_feature`: they have the features of the function that they end up in.)
///
/// # Safety
/// The CPU has AVX-512 with VNNI; `planes` points to the planes of a group of the format; `step < 8`, `vector < 2`.
#[inline(always)]
unsafe fn codes_of_planes<F: Format>(planes: *const u8, step: usize, vector: usize, levels: &[u8; 16]) -> __m512i {
    // SAFETY: promised by the caller: the vector is inside each plane.
    unsafe {
        let code = (step * PANEL_ROWS + vector * LANES) * RUN;
        let bits = |plane: *const u8, bits: usize| {
            let plane_bytes = 128 * bits;
            let bytes = _mm512_loadu_si512(plane.add(code % plane_bytes).cast());
            if bits == 8 {
                return bytes;
            }
            let place = _mm_cvtsi32_si128((bits * (code / plane_bytes)) as i32);
            _mm512_and_si512(_mm512_srl_epi16(bytes, place), _mm512_set1_epi8((1 << bits) - 1))
        };
        let low = bits(planes, F::LOW);
        if F::TABLE {
            let levels = _mm_loadu_si128(levels.as_ptr().cast());
            return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(levels), low);
        }
        if F::HIGH == 0 {
            return low;
        }
        let high = bits(planes.add(128 * F::LOW), F::HIGH);
        _mm512_or_si512(low, _mm512_sll_epi16(high, _mm_cvtsi32_si128(F::LOW as i32)))
    }
}

/// What the compiler knows of a format.
trait Format {
    /// Sums of activations are subtracted as floats, else as integers.
    const FLOAT_MINS: bool;
    /// Bits of a code in the low plane.
    const LOW: usize;
    /// Bits of a code in the high plane.
    const HIGH: usize;
    /// Integer scales of a group.
    const HALVES: usize;
    /// Codes are indices of levels.
    const TABLE: bool;
    /// Rows of the largest tile: what the compiler keeps in registers.
    const TILE_ROWS: usize = if Self::HALVES == 2 { 6 } else { 8 };
}

struct Codes<const FLOAT_MINS: bool, const LOW: usize, const HIGH: usize, const HALVES: usize, const TABLE: bool>;

impl<const FLOAT_MINS: bool, const LOW: usize, const HIGH: usize, const HALVES: usize, const TABLE: bool> Format
    for Codes<FLOAT_MINS, LOW, HIGH, HALVES, TABLE>
{
    const FLOAT_MINS: bool = FLOAT_MINS;
    const LOW: usize = LOW;
    const HIGH: usize = HIGH;
    const HALVES: usize = HALVES;
    const TABLE: bool = TABLE;
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
            unsafe { _mm_prefetch::<_MM_HINT_T1>(self.address.wrapping_add(line)) };
        }
        self.address = self.address.wrapping_add(self.step_bytes);
    }
}

#[inline(always)]
fn zero() -> __m512i {
    // SAFETY: a vector of zero bits, whatever the CPU.
    unsafe { std::mem::zeroed() }
}

/// # Safety
/// The CPU has AVX-512; `number` points to four bytes.
#[inline(always)]
unsafe fn broadcast(number: *const i32) -> __m512i {
    // SAFETY: promised by the caller.
    unsafe { _mm512_set1_epi32(number.read_unaligned()) }
}

/// Operands of one tile. Its functions trust the pointers.
struct Tile<'a> {
    /// First group of the first row.
    x: *const Int8Group,
    groups_per_row: usize,
    num_groups: usize,
    chunk: &'a UnpackedChunk,
    /// Planes of the chunk's first group.
    planes: *const u8,
    group_bytes: usize,
    /// What codes stand for in formats with a table.
    levels: &'a [u8; 16],
    /// `[rows, 32]`
    sums: *mut f32,
}

#[expect(clippy::needless_range_loop, reason = "iterators are not always inlined, and then the sums live in memory")]
impl Tile<'_> {
    #[inline(always)]
    fn group(&self, row: usize, g: usize) -> *const Int8Group {
        self.x.wrapping_add(row * self.groups_per_row + g)
    }

    /// `ROWS` rows times 32 columns, all groups.
    ///
    /// # Safety
    /// The CPU has AVX-512 with VNNI; the tile has `ROWS` rows and its groups have the format; unless `DIRECT`, the codes
    /// were taken apart.
    #[inline(never)]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
    unsafe fn run<F: Format, const DIRECT: bool, const ROWS: usize>(&self, prefetch: &mut Prefetch) {
        let mut ahead = Prefetch { ..*prefetch };
        for g in 0..self.num_groups {
            ahead.step();
            // Sums stay in memory from group to group: the registers are the integer sums'.
            let sums = black_box(self.sums);
            // SAFETY: promised by the caller.
            unsafe {
                let dots = self.dots::<F, DIRECT, ROWS>(g);
                // Formats with integer scales have one scale for the chunk, which stands in its first group.
                let scale_group = if F::HALVES == 0 { g } else { 0 };
                for vector in 0..VECTORS {
                    let lane = vector * LANES;
                    let d = _mm512_load_ps(self.chunk.d[scale_group].as_ptr().add(lane));
                    let d_min = _mm512_load_ps(self.chunk.d_min[scale_group].as_ptr().add(lane));
                    let mins = _mm512_load_si512(self.chunk.mins[g].as_ptr().add(lane).cast());
                    for row in 0..ROWS {
                        let (x, dot) = (self.group(row, g), dots[row][vector]);
                        let min = _mm512_madd_epi16(mins, broadcast((&raw const (*x).sums).cast()));
                        let part = match F::FLOAT_MINS {
                            true => {
                                let min = _mm512_mul_ps(d_min, _mm512_cvtepi32_ps(min));
                                _mm512_fmsub_ps(d, _mm512_cvtepi32_ps(dot), min)
                            }
                            false => _mm512_mul_ps(d, _mm512_cvtepi32_ps(_mm512_sub_epi32(dot, min))),
                        };
                        let sum = sums.add(row * PANEL_ROWS + lane);
                        let x_scale = _mm512_set1_ps((*x).scale);
                        _mm512_storeu_ps(sum, _mm512_fmadd_ps(part, x_scale, _mm512_loadu_ps(sum)));
                    }
                }
            }
        }
        prefetch.address = ahead.address;
    }

    /// Integer products of a group: `dots[row][vector] = sum over halves of scales (codes . x)`.
    ///
    /// # Safety
    /// As for [`run`](Self::run); the tile has the group.
    #[inline(always)]
    unsafe fn dots<F: Format, const DIRECT: bool, const ROWS: usize>(&self, g: usize) -> [[__m512i; VECTORS]; ROWS] {
        let codes = self.chunk.codes(g).as_ptr();
        let planes = self.planes.wrapping_add(g * self.group_bytes);
        let mut dots = [[zero(); VECTORS]; ROWS];
        let num_parts = F::HALVES.max(1);
        for part in 0..num_parts {
            let mut parts = [[zero(); VECTORS]; ROWS];
            for step in 0..STEPS / num_parts {
                let step = part * (STEPS / num_parts) + step;
                // SAFETY: promised by the caller.
                unsafe {
                    let mut weights = [zero(); VECTORS];
                    for vector in 0..VECTORS {
                        weights[vector] = match DIRECT {
                            true => codes_of_planes::<F>(planes, step, vector, self.levels),
                            false => {
                                let code = (step * PANEL_ROWS + vector * LANES) * RUN;
                                _mm512_load_si512(codes.add(code).cast())
                            }
                        };
                    }
                    for row in 0..ROWS {
                        let x = broadcast((&raw const (*self.group(row, g)).codes).cast::<i32>().add(step));
                        for vector in 0..VECTORS {
                            parts[row][vector] = _mm512_dpbusd_epi32(parts[row][vector], weights[vector], x);
                        }
                    }
                }
            }
            if F::HALVES == 0 {
                return parts;
            }
            for vector in 0..VECTORS {
                // SAFETY: promised by the caller.
                unsafe {
                    let pairs = self.chunk.scales[g][part].as_ptr().add(vector * LANES);
                    // Scales are doubled into pairs of 16 bits.
                    let scales = _mm512_srai_epi32::<16>(_mm512_load_si512(pairs.cast()));
                    for row in 0..ROWS {
                        let scaled = _mm512_mullo_epi32(parts[row][vector], scales);
                        dots[row][vector] = _mm512_add_epi32(dots[row][vector], scaled);
                    }
                }
            }
        }
        dots
    }
}
