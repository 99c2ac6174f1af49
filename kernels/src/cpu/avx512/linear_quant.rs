//! Matrix products of 8-bit activations with quantized panels, by AVX-512 VNNI.
//!
//! `vpdpbusd` multiplies four bytes without sign with four bytes with sign and adds them to a sum of 32 bits, in which no
//! format's sums overflow. So all codes are bytes without sign here: those that have one, and levels of tables, carry an
//! offset of 128 ([`CodeProducts::Wide`](crate::cpu::linear::CodeProducts)). What codes are too large by is the same for all
//! columns, `-offset sum(x)`: sums of products start from it.
//!
//! Products of bytes and of floats go to the same two ports, so what is done once a group decides: two operations of
//! floats beside eight products where the format has an offset, three where it has minimums, two more where a group has two
//! scales. That is why integers are multiplied with their scales as floats. All of it is exact until the rounding that
//! [`QuantProduct`] names, because it fits the 24 bits of a float: a sum has less than 2^20; a group's integer scale times a
//! sum less than 2^23 (of Q6_K, the largest, 128 * 32 * 127 * 16), two of them less than 2^24; `d` times an integer scale 11
//! and 8 bits.
//!
//! A tile is up to eight rows (six where groups have two scales) times the two vectors of a panel's 32 output columns. It
//! takes the codes from the panel's planes as it goes, if that is one tile; for more of them a chunk of 256 columns is taken
//! apart once, into the L1 cache.

use std::arch::asm;
use std::arch::x86_64::*;
use std::cell::RefCell;
use std::hint::black_box;
use std::mem::offset_of;

use super::LANES;
use super::linear::next_tile_rows;
use crate::cpu::linear::{
    CHUNK_GROUPS, CodeMeaning, Codes, GROUP_CODES, Int8Group, PANEL_ROWS, PanelCodes, QuantLayout, QuantProduct,
};
use crate::cpu::prefetch::Prefetch;
use crate::quant::QuantType;

/// Vectors of a panel's columns.
const VECTORS: usize = PANEL_ROWS / LANES;
/// Columns that one instruction multiplies and adds up.
const RUN: usize = 4;

/// Codes of a chunk, a byte each.
#[repr(C, align(64))]
struct ChunkCodes([[u8; GROUP_CODES]; CHUNK_GROUPS]);

thread_local! {
    static CODES: RefCell<Box<ChunkCodes>> = RefCell::new(Box::new(ChunkCodes([[0; GROUP_CODES]; CHUNK_GROUPS])));
}

/// See [`QuantProduct`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
pub(crate) fn panel_quant(product: &QuantProduct<'_>, sums: &mut [f32]) {
    let layout = product.layout;
    let has_table = layout.unsigned_levels().is_some();
    match (layout.meaning, layout.low_bits, layout.high_bits, layout.halves) {
        (CodeMeaning::Signed, ..) => panic!("codes with sign have no products here"),
        (CodeMeaning::Offset(_), 8, ..) => panel::<Codes<false, 8, 0, 0>>(product, sums),
        (CodeMeaning::Offset(_), 4, 0, _) if has_table => panel::<Codes<false, 4, 0, 0, true>>(product, sums),
        (CodeMeaning::Offset(_), 4, 0, _) => panel::<Codes<false, 4, 0, 0>>(product, sums),
        (CodeMeaning::Offset(_), 4, 1, _) => panel::<Codes<false, 4, 1, 0>>(product, sums),
        (CodeMeaning::Offset(_), 4, ..) => panel::<Codes<false, 4, 2, 2>>(product, sums),
        (CodeMeaning::Offset(_), ..) => panel::<Codes<false, 2, 1, 2>>(product, sums),
        (CodeMeaning::Minimum, 4, 0, 0) => panel::<Codes<true, 4, 0, 0>>(product, sums),
        (CodeMeaning::Minimum, 4, 0, _) => panel::<Codes<true, 4, 0, 1>>(product, sums),
        (CodeMeaning::Minimum, 4, _, 0) => panel::<Codes<true, 4, 1, 0>>(product, sums),
        (CodeMeaning::Minimum, 4, ..) => panel::<Codes<true, 4, 1, 1>>(product, sums),
        (CodeMeaning::Minimum, ..) => panel::<Codes<true, 2, 0, 2>>(product, sums),
    }
}

/// All chunks of a panel, for all rows.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
fn panel<F: PanelCodes>(product: &QuantProduct<'_>, sums: &mut [f32]) {
    let &QuantProduct { x, groups_per_row, panel, layout, .. } = product;
    let num_rows = sums.len() / PANEL_ROWS;
    assert_eq!(panel.len(), layout.panel_bytes(groups_per_row * 32), "bytes of a panel");
    assert!(x.len() >= num_rows * groups_per_row, "activations of {num_rows} rows");
    assert!(F::describes(layout), "{:?} is another format", layout.quant_type);
    sums.fill(0.0);
    let levels = layout.unsigned_levels().unwrap_or_default();
    // Codes of a byte lie in their plane as they are multiplied.
    let is_direct = F::LOW == 8 || num_rows <= tile_rows::<F>();
    let passes = num_rows.div_ceil(tile_rows::<F>()).max(1);
    CODES.with_borrow_mut(|codes| {
        for (bytes, first_group) in panel.chunks(layout.chunk_bytes()).zip((0..groups_per_row).step_by(CHUNK_GROUPS)) {
            let num_groups = CHUNK_GROUPS.min(groups_per_row - first_group);
            if !is_direct {
                unpack_codes::<F>(bytes, num_groups, &levels, codes);
            }
            let mut prefetch = Prefetch::behind(bytes, passes * num_groups);
            let mut row = 0;
            while row < num_rows {
                let rows = next_tile_rows(num_rows - row, tile_rows::<F>());
                let x = &x[row * groups_per_row + first_group..];
                let sums = &mut sums[row * PANEL_ROWS..][..rows * PANEL_ROWS];
                assert!(x.len() >= (rows - 1) * groups_per_row + num_groups, "activations of a tile");
                let tile = Tile {
                    x: x.as_ptr(),
                    groups_per_row,
                    num_groups,
                    layout,
                    chunk: bytes.as_ptr(),
                    codes,
                    levels: &levels,
                    sums: sums.as_mut_ptr(),
                };
                // SAFETY: the CPU has the features of this function; activations and sums of `rows` rows were checked;
                // the chunk has `num_groups` groups of the format, whose codes were taken apart unless they are not read.
                unsafe {
                    match is_direct {
                        true => tile.run_rows::<F, true>(rows, &mut prefetch),
                        false => tile.run_rows::<F, false>(rows, &mut prefetch),
                    }
                }
                row += rows;
            }
        }
    });
}

/// The codes of a chunk, as [`QuantLayout::unpack_codes`] does.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
fn unpack_codes<F: PanelCodes>(chunk: &[u8], num_groups: usize, levels: &[u8; 16], out: &mut ChunkCodes) {
    for (g, out) in out.0.iter_mut().take(num_groups).enumerate() {
        let planes = &chunk[F::HEADER_BYTES + g * F::GROUP_BYTES..][..F::PLANE_BYTES];
        for (i, out) in out.as_chunks_mut::<{ RUN * LANES }>().0.iter_mut().enumerate() {
            // SAFETY: the CPU has the features of this function; these are the planes of a group, which has 16 times 64
            // codes; 64 bytes are written to as many.
            unsafe {
                let codes = codes_of_planes::<F>(planes.as_ptr(), i / VECTORS, i % VECTORS, levels);
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
unsafe fn codes_of_planes<F: PanelCodes>(planes: *const u8, step: usize, vector: usize, levels: &[u8; 16]) -> __m512i {
    // SAFETY: promised by the caller: the vector is inside each plane.
    unsafe {
        let code = (step * PANEL_ROWS + vector * LANES) * RUN;
        let bits = |plane: *const u8, bits: usize| {
            let plane_bytes = 128 * bits;
            let bytes = load(plane.add(code % plane_bytes));
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

/// Rows of the largest tile: what the compiler keeps in registers.
const fn tile_rows<F: PanelCodes>() -> usize {
    if F::HALVES == 2 { 6 } else { 8 }
}

/// 64 bytes. Assembly, as [`multiply_add`] is: the compiler would load the codes of all steps first, and spill them.
///
/// # Safety
/// The CPU has AVX-512; `bytes` points to 64 bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn load(bytes: *const u8) -> __m512i {
    let loaded;
    // SAFETY: promised by the caller.
    unsafe {
        asm!(
            "vmovdqu64 {loaded}, zmmword ptr [{bytes}]",
            loaded = lateout(zmm_reg) loaded,
            bytes = in(reg) bytes,
            options(readonly, nostack, preserves_flags),
        );
    }
    loaded
}

/// Adds the products of a row's activations of the steps `STEP` and `STEP + 1` with those codes to its sums.
///
/// # Safety
/// The CPU has AVX-512 with VNNI; `x` points to a group, which has the steps.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn multiply_add<const STEP: usize>(
    x: *const Int8Group,
    codes: &[[__m512i; VECTORS]; 2],
    sums: &mut [__m512i; VECTORS],
) {
    let (_first, _second): (__m512i, __m512i);
    // SAFETY: promised by the caller.
    unsafe {
        asm!(
            "vpbroadcastd {first}, dword ptr [{x} + {place}]",
            "vpbroadcastd {second}, dword ptr [{x} + {place} + 4]",
            "vpdpbusd {left}, {first_left}, {first}",
            "vpdpbusd {right}, {first_right}, {first}",
            "vpdpbusd {left}, {second_left}, {second}",
            "vpdpbusd {right}, {second_right}, {second}",
            first = out(zmm_reg) _first,
            second = out(zmm_reg) _second,
            x = in(reg) x,
            place = const offset_of!(Int8Group, codes) + RUN * STEP,
            first_left = in(zmm_reg) codes[0][0],
            first_right = in(zmm_reg) codes[0][1],
            second_left = in(zmm_reg) codes[1][0],
            second_right = in(zmm_reg) codes[1][1],
            left = inout(zmm_reg) sums[0],
            right = inout(zmm_reg) sums[1],
            options(readonly, nostack, preserves_flags),
        );
    }
}

/// # Safety
/// The CPU has AVX-512; `number` points to four bytes.
#[inline(always)]
unsafe fn broadcast(number: *const i32) -> __m512i {
    // SAFETY: promised by the caller.
    unsafe { _mm512_set1_epi32(number.read_unaligned()) }
}

/// Sixteen f16 as floats.
///
/// # Safety
/// The CPU has AVX-512; `numbers` points to 32 bytes.
#[inline(always)]
unsafe fn f16_as_floats(numbers: *const u8) -> __m512 {
    // SAFETY: promised by the caller.
    unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(numbers.cast())) }
}

/// Sixteen bytes with sign as integers of 32 bits.
///
/// # Safety
/// The CPU has AVX-512; `numbers` points to 16 bytes.
#[inline(always)]
unsafe fn integers(numbers: *const u8) -> __m512i {
    // SAFETY: promised by the caller.
    unsafe { _mm512_cvtepi8_epi32(_mm_loadu_si128(numbers.cast())) }
}

/// Operands of one tile. Its functions trust the pointers.
struct Tile<'a> {
    /// First group of the first row.
    x: *const Int8Group,
    groups_per_row: usize,
    num_groups: usize,
    layout: &'a QuantLayout,
    /// The chunk in the panel.
    chunk: *const u8,
    /// Its codes, where they were taken apart.
    codes: &'a ChunkCodes,
    /// What codes stand for in formats with a table.
    levels: &'a [u8; 16],
    /// `[rows, 32]`
    sums: *mut f32,
}

/// Scales of a group for sixteen columns.
#[derive(Clone, Copy)]
struct Scales {
    /// `d`, times the integer scale of groups that have one.
    d: __m512,
    /// `d_min`, times the integer minimum of groups that have one.
    d_min: __m512,
    /// Minimums of groups that have two, as pairs of 16 bits.
    mins: __m512i,
}

#[expect(clippy::needless_range_loop, reason = "iterators are not always inlined, and then the sums live in memory")]
impl Tile<'_> {
    /// A tile of 1 to 8 rows.
    ///
    /// # Safety
    /// As for [`run`](Self::run), with `ROWS = rows`.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
    unsafe fn run_rows<F: PanelCodes, const DIRECT: bool>(&self, rows: usize, prefetch: &mut Prefetch) {
        // SAFETY: promised by the caller.
        unsafe {
            match rows {
                1 => self.run::<F, DIRECT, 1>(prefetch),
                2 => self.run::<F, DIRECT, 2>(prefetch),
                3 => self.run::<F, DIRECT, 3>(prefetch),
                4 => self.run::<F, DIRECT, 4>(prefetch),
                5 => self.run::<F, DIRECT, 5>(prefetch),
                6 => self.run::<F, DIRECT, 6>(prefetch),
                7 => self.run::<F, DIRECT, 7>(prefetch),
                _ => self.run::<F, DIRECT, 8>(prefetch),
            }
        }
    }

    /// `ROWS` rows times 32 columns, all groups.
    ///
    /// # Safety
    /// The CPU has AVX-512 with VNNI; the tile has `ROWS` rows and its groups have the format; unless `DIRECT`, the codes
    /// were taken apart.
    #[inline(never)]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
    unsafe fn run<F: PanelCodes, const DIRECT: bool, const ROWS: usize>(&self, prefetch: &mut Prefetch) {
        let mut ahead = *prefetch;
        for g in 0..self.num_groups {
            ahead.step();
            // Sums stay in memory from group to group: the registers are the integer sums'. Each row's place is kept in a
            // register: left to itself, the compiler adds them up from row to row in each step.
            let sums = black_box(self.sums);
            let rows: [*const Int8Group; ROWS] = std::array::from_fn(|row| black_box(self.group(row, g)));
            // SAFETY: promised by the caller.
            unsafe {
                let dots = self.dots::<F, DIRECT, ROWS>(g, &rows);
                let scales = [self.scales::<F>(g, 0), self.scales::<F>(g, 1)];
                for row in 0..ROWS {
                    let x = rows[row];
                    let (x_scale, x_sums) = (_mm512_set1_ps((*x).scale), broadcast((&raw const (*x).sums).cast()));
                    for vector in 0..VECTORS {
                        let Scales { d, .. } = scales[vector];
                        let part = match F::MINIMUM {
                            true => _mm512_fmsub_ps(d, dots[row][vector], scales[vector].min::<F>(x_sums)),
                            false => _mm512_mul_ps(d, dots[row][vector]),
                        };
                        let sum = sums.add(row * PANEL_ROWS + vector * LANES);
                        _mm512_storeu_ps(sum, _mm512_fmadd_ps(part, x_scale, _mm512_loadu_ps(sum)));
                    }
                }
            }
        }
        *prefetch = ahead;
    }

    /// Products of a group: `dots[row][vector] = codes . x`, less their offset; `scales (codes . x)` where a group has two.
    ///
    /// # Safety
    /// As for [`run`](Self::run); the tile has the group, and `rows` are its places in the rows.
    #[inline(always)]
    unsafe fn dots<F: PanelCodes, const DIRECT: bool, const ROWS: usize>(
        &self,
        g: usize,
        rows: &[*const Int8Group; ROWS],
    ) -> [[__m512; VECTORS]; ROWS] {
        // SAFETY: promised by the caller.
        unsafe {
            let mut dots = [[_mm512_setzero_ps(); VECTORS]; ROWS];
            if F::HALVES < 2 {
                let mut sums = self.first_sums::<F, ROWS>(rows, [1, 1]);
                self.add_steps::<F, DIRECT, ROWS, 0>(g, rows, &mut sums);
                self.add_steps::<F, DIRECT, ROWS, 2>(g, rows, &mut sums);
                self.add_steps::<F, DIRECT, ROWS, 4>(g, rows, &mut sums);
                self.add_steps::<F, DIRECT, ROWS, 6>(g, rows, &mut sums);
                for row in 0..ROWS {
                    for vector in 0..VECTORS {
                        dots[row][vector] = _mm512_cvtepi32_ps(sums[row][vector]);
                    }
                }
                return dots;
            }
            let mut sums = self.first_sums::<F, ROWS>(rows, [1, 0]);
            self.add_steps::<F, DIRECT, ROWS, 0>(g, rows, &mut sums);
            self.add_steps::<F, DIRECT, ROWS, 2>(g, rows, &mut sums);
            for vector in 0..VECTORS {
                let scale = _mm512_cvtepi32_ps(integers(self.group_numbers::<F>(g).add(vector * LANES)));
                for row in 0..ROWS {
                    dots[row][vector] = _mm512_mul_ps(scale, _mm512_cvtepi32_ps(sums[row][vector]));
                }
            }
            let mut sums = self.first_sums::<F, ROWS>(rows, [0, 1]);
            self.add_steps::<F, DIRECT, ROWS, 4>(g, rows, &mut sums);
            self.add_steps::<F, DIRECT, ROWS, 6>(g, rows, &mut sums);
            for vector in 0..VECTORS {
                let scales = self.group_numbers::<F>(g).add(PANEL_ROWS + vector * LANES);
                let scale = _mm512_cvtepi32_ps(integers(scales));
                for row in 0..ROWS {
                    let dot = _mm512_cvtepi32_ps(sums[row][vector]);
                    dots[row][vector] = _mm512_fmadd_ps(scale, dot, dots[row][vector]);
                }
            }
            dots
        }
    }

    /// What sums start from: `-offset` times the sums of activations of the halves that have a 1.
    ///
    /// # Safety
    /// As for [`dots`](Self::dots).
    #[inline(always)]
    unsafe fn first_sums<F: PanelCodes, const ROWS: usize>(
        &self,
        rows: &[*const Int8Group; ROWS],
        halves: [i16; 2],
    ) -> [[__m512i; VECTORS]; ROWS] {
        // SAFETY: promised by the caller.
        unsafe {
            let mut sums = [[_mm512_setzero_si512(); VECTORS]; ROWS];
            if F::MINIMUM {
                return sums;
            }
            let factors = halves.map(|half| -half * self.layout.offset());
            let factors = broadcast(factors.as_ptr().cast());
            for row in 0..ROWS {
                let x_sums = broadcast((&raw const (*rows[row]).sums).cast());
                sums[row] = [_mm512_madd_epi16(factors, x_sums); VECTORS];
            }
            sums
        }
    }

    /// Adds the products of the steps `STEP` and `STEP + 1`.
    ///
    /// # Safety
    /// As for [`dots`](Self::dots).
    #[inline(always)]
    unsafe fn add_steps<F: PanelCodes, const DIRECT: bool, const ROWS: usize, const STEP: usize>(
        &self,
        g: usize,
        rows: &[*const Int8Group; ROWS],
        sums: &mut [[__m512i; VECTORS]; ROWS],
    ) {
        // SAFETY: promised by the caller.
        unsafe {
            let unpacked = self.codes.0.as_ptr().cast::<u8>().add(g * GROUP_CODES);
            let planes = self.planes::<F>(g);
            let mut codes = [[_mm512_setzero_si512(); VECTORS]; 2];
            for step in 0..2 {
                for vector in 0..VECTORS {
                    codes[step][vector] = match DIRECT {
                        true => codes_of_planes::<F>(planes, STEP + step, vector, self.levels),
                        false => load(unpacked.add(((STEP + step) * PANEL_ROWS + vector * LANES) * RUN)),
                    };
                }
            }
            for row in 0..ROWS {
                multiply_add::<STEP>(rows[row], &codes, &mut sums[row]);
            }
        }
    }

    /// # Safety
    /// As for [`run`](Self::run); the tile has the group, `vector < 2`.
    #[inline(always)]
    unsafe fn scales<F: PanelCodes>(&self, g: usize, vector: usize) -> Scales {
        // SAFETY: promised by the caller: all of it is inside the chunk.
        unsafe {
            let numbers = self.group_numbers::<F>(g).add(vector * LANES);
            let header = if F::HALVES == 0 { self.group_numbers::<F>(g) } else { self.chunk };
            let header = header.add(2 * vector * LANES);
            let mut scales = Scales {
                d: match self.layout.quant_type {
                    QuantType::MXFP4 => {
                        let bf16 = _mm512_cvtepu16_epi32(_mm256_loadu_si256(header.cast()));
                        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bf16))
                    }
                    _ => f16_as_floats(header),
                },
                d_min: _mm512_setzero_ps(),
                mins: _mm512_setzero_si512(),
            };
            if F::MINIMUM {
                scales.d_min = f16_as_floats(header.add(2 * PANEL_ROWS));
            }
            if F::HALVES == 1 {
                scales.d = _mm512_mul_ps(scales.d, _mm512_cvtepi32_ps(integers(numbers)));
            }
            if F::MINIMUM && F::HALVES == 1 {
                scales.d_min = _mm512_mul_ps(scales.d_min, _mm512_cvtepi32_ps(integers(numbers.add(PANEL_ROWS))));
            }
            if F::MINIMUM && F::HALVES == 2 {
                let [first, second] = [2, 3].map(|part| integers(numbers.add(part * PANEL_ROWS)));
                scales.mins = _mm512_or_si512(first, _mm512_slli_epi32::<16>(second));
            }
            scales
        }
    }

    #[inline(always)]
    fn group(&self, row: usize, g: usize) -> *const Int8Group {
        self.x.wrapping_add(row * self.groups_per_row + g)
    }
    #[inline(always)]
    fn planes<F: PanelCodes>(&self, g: usize) -> *const u8 {
        self.chunk.wrapping_add(F::HEADER_BYTES + g * F::GROUP_BYTES)
    }
    /// What lies behind a group's planes: its scales and minimums.
    #[inline(always)]
    fn group_numbers<F: PanelCodes>(&self, g: usize) -> *const u8 {
        self.planes::<F>(g).wrapping_add(F::PLANE_BYTES)
    }
}

impl Scales {
    /// What a row with these sums of activations, as a pair in all lanes, has too much because of the group's minimums.
    ///
    /// # Safety
    /// The CPU has AVX-512.
    #[inline(always)]
    unsafe fn min<F: PanelCodes>(&self, x_sums: __m512i) -> __m512 {
        // SAFETY: promised by the caller.
        unsafe {
            let factors = if F::HALVES == 2 { self.mins } else { _mm512_set1_epi16(1) };
            _mm512_mul_ps(self.d_min, _mm512_cvtepi32_ps(_mm512_madd_epi16(factors, x_sums)))
        }
    }
}
