//! Matrix products of 8-bit activations with quantized panels.
//!
//! Codes of every format become bytes with sign: the offset of formats that have one is subtracted, levels are looked up.
//! So a product needs the sums of activations for formats with minimums alone. A chunk of 256 columns of the panel is
//! taken apart once, into the L1 cache, and then multiplied with all rows, a few at a time, eight columns of the chunk at
//! a time, by what the processor has ([`Products`]).
//!
//! Integer sums are exact, so their order is free; what is rounded is done in the order that [`QuantProduct`] gives.

use std::arch::aarch64::*;
use std::arch::asm;
use std::cell::RefCell;

use super::{LANES, bf16_to_f32, f16_to_f32, tiles};
use crate::cpu::linear::{CHUNK_GROUPS, CodeMeaning, GroupBytes, Int8Group, PANEL_ROWS, QuantLayout, QuantProduct};
use crate::quant::QuantType;

/// Rows of a tile at most.
const TILE_ROWS: usize = 6;
/// Vectors of four output columns of a panel.
const PANEL_VECTORS: usize = PANEL_ROWS / LANES;
/// Vectors of a tile.
const VECTORS: usize = 2;
/// Runs of four columns of a group, two of which are multiplied at once.
const RUN_PAIRS: usize = 4;
/// Codes of a group.
const GROUP_CODES: usize = 32 * PANEL_ROWS;

thread_local! {
    static UNPACKED: RefCell<Box<Chunk>> = RefCell::new(Box::new(Chunk {
        codes: [[0; GROUP_CODES]; CHUNK_GROUPS],
        scales: [[[0; PANEL_ROWS]; 2]; CHUNK_GROUPS],
        mins: [[[0; PANEL_ROWS]; 2]; CHUNK_GROUPS],
        d: [[0.0; PANEL_ROWS]; CHUNK_GROUPS],
        d_min: [[0.0; PANEL_ROWS]; CHUNK_GROUPS],
    }));
}

/// A chunk of a panel, taken apart.
#[repr(C, align(64))]
struct Chunk {
    /// `[pair of runs][vector][2][16]`, each 2 x 16 codes as the products read them.
    codes: [[i8; GROUP_CODES]; CHUNK_GROUPS],
    /// Integer scales of each half, by row. Not used without them.
    scales: [[[i32; PANEL_ROWS]; 2]; CHUNK_GROUPS],
    /// Factors of the sums of activations over each half, by row. Of formats with minimums.
    mins: [[[i32; PANEL_ROWS]; 2]; CHUNK_GROUPS],
    /// Scale by row.
    d: [[f32; PANEL_ROWS]; CHUNK_GROUPS],
    /// Scale of the minimums by row.
    d_min: [[f32; PANEL_ROWS]; CHUNK_GROUPS],
}

/// Integer products of one or two activation rows with four output columns, eight columns of the reduction at a time.
pub(crate) trait Products {
    /// Sums of two rows.
    type Sums: Copy;

    /// Sums of nothing.
    fn zero() -> Self::Sums;

    /// The order in which [`add`](Self::add) reads the codes of two runs: `[4 output columns][4]` each.
    ///
    /// # Safety
    /// The CPU has the products, as for all functions here. (They must become part of the tile's loop, and are
    /// `inline(always)`, which excludes `target_feature`: they have the features of the function that they end up in.)
    unsafe fn arrange(runs: [int8x16_t; 2]) -> [int8x16_t; 2];

    /// Adds the products of `codes` with eight codes of each of `ROWS` rows (1 or 2).
    ///
    /// # Safety
    /// As for [`arrange`](Self::arrange).
    unsafe fn add<const ROWS: usize>(sums: &mut Self::Sums, codes: [int8x16_t; 2], x: [int8x8_t; 2]);

    /// The sums of both rows.
    ///
    /// # Safety
    /// As for [`arrange`](Self::arrange).
    unsafe fn totals(sums: Self::Sums) -> [int32x4_t; 2];
}

/// Products of bytes to 16 bits: any processor.
pub(crate) struct Pairs;
/// Dot products of four bytes.
pub(crate) struct Bytes;
/// Products of a matrix of 2 x 8 bytes and one of 8 x 2.
pub(crate) struct Matrices;

impl Products for Pairs {
    /// Of each row: of the first two output columns and of the last two, two sums each.
    type Sums = [[int32x4_t; 2]; 2];

    #[inline(always)]
    fn zero() -> Self::Sums {
        // SAFETY: every 64-bit ARM processor has these vectors.
        [[unsafe { vdupq_n_s32(0) }; 2]; 2]
    }
    #[inline(always)]
    unsafe fn arrange(runs: [int8x16_t; 2]) -> [int8x16_t; 2] {
        runs
    }
    #[inline(always)]
    unsafe fn add<const ROWS: usize>(sums: &mut Self::Sums, [first, second]: [int8x16_t; 2], x: [int8x8_t; 2]) {
        for (sums, x) in sums.iter_mut().zip(x).take(ROWS) {
            // SAFETY: every 64-bit ARM processor has these vectors.
            unsafe {
                let x = vreinterpret_s32_s8(x);
                let x_first = vreinterpretq_s8_s32(vdupq_lane_s32::<0>(x));
                let x_second = vreinterpretq_s8_s32(vdupq_lane_s32::<1>(x));
                // Two products of at most 128 * 127 fit 16 bits.
                let low = vmull_s8(vget_low_s8(first), vget_low_s8(x_first));
                let low = vmlal_s8(low, vget_low_s8(second), vget_low_s8(x_second));
                let high = vmlal_high_s8(vmull_high_s8(first, x_first), second, x_second);
                sums[0] = vpadalq_s16(sums[0], low);
                sums[1] = vpadalq_s16(sums[1], high);
            }
        }
    }
    #[inline(always)]
    unsafe fn totals(sums: Self::Sums) -> [int32x4_t; 2] {
        // SAFETY: every 64-bit ARM processor has these vectors.
        sums.map(|[low, high]| unsafe { vpaddq_s32(low, high) })
    }
}

impl Products for Bytes {
    type Sums = [int32x4_t; 2];

    #[inline(always)]
    fn zero() -> Self::Sums {
        // SAFETY: every 64-bit ARM processor has these vectors.
        [unsafe { vdupq_n_s32(0) }; 2]
    }
    #[inline(always)]
    unsafe fn arrange(runs: [int8x16_t; 2]) -> [int8x16_t; 2] {
        runs
    }
    #[inline(always)]
    unsafe fn add<const ROWS: usize>(sums: &mut Self::Sums, [first, second]: [int8x16_t; 2], x: [int8x8_t; 2]) {
        for (sums, x) in sums.iter_mut().zip(x).take(ROWS) {
            // SAFETY: promised by the caller.
            unsafe { add_dots(sums, first, second, x) };
        }
    }
    #[inline(always)]
    unsafe fn totals(sums: Self::Sums) -> [int32x4_t; 2] {
        sums
    }
}

impl Products for Matrices {
    /// `[row][output column]`, of the first two output columns and of the last two.
    type Sums = [int32x4_t; 2];

    #[inline(always)]
    fn zero() -> Self::Sums {
        // SAFETY: every 64-bit ARM processor has these vectors.
        [unsafe { vdupq_n_s32(0) }; 2]
    }
    #[inline(always)]
    unsafe fn arrange([first, second]: [int8x16_t; 2]) -> [int8x16_t; 2] {
        // Eight codes of an output column behind one another.
        // SAFETY: every 64-bit ARM processor has these vectors.
        unsafe {
            let (first, second) = (vreinterpretq_s32_s8(first), vreinterpretq_s32_s8(second));
            [vzip1q_s32(first, second), vzip2q_s32(first, second)].map(|codes| vreinterpretq_s8_s32(codes))
        }
    }
    #[inline(always)]
    unsafe fn add<const ROWS: usize>(sums: &mut Self::Sums, codes: [int8x16_t; 2], x: [int8x8_t; 2]) {
        // SAFETY: promised by the caller.
        unsafe {
            let x = vcombine_s8(x[0], x[ROWS - 1]);
            add_matrix(&mut sums[0], codes[0], x);
            add_matrix(&mut sums[1], codes[1], x);
        }
    }
    #[inline(always)]
    unsafe fn totals([first, second]: Self::Sums) -> [int32x4_t; 2] {
        // SAFETY: every 64-bit ARM processor has these vectors.
        unsafe {
            let (first, second) = (vreinterpretq_s64_s32(first), vreinterpretq_s64_s32(second));
            [vzip1q_s64(first, second), vzip2q_s64(first, second)].map(|sums| vreinterpretq_s32_s64(sums))
        }
    }
}

/// `sums[i] += first[4 i..4 i + 4] . x[0..4] + second[4 i..4 i + 4] . x[4..8]`
///
/// # Safety
/// The CPU has dot products of bytes.
#[inline(always)]
unsafe fn add_dots(sums: &mut int32x4_t, first: int8x16_t, second: int8x16_t, x: int8x8_t) {
    // SAFETY: promised by the caller; reads and writes the named registers alone.
    unsafe {
        asm!(
            ".arch_extension dotprod",
            "sdot {sums:v}.4s, {first:v}.16b, {x:v}.4b[0]",
            "sdot {sums:v}.4s, {second:v}.16b, {x:v}.4b[1]",
            sums = inout(vreg) *sums,
            first = in(vreg) first,
            second = in(vreg) second,
            x = in(vreg) x,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
}

/// `sums[2 i + j] += x[8 i..8 i + 8] . codes[8 j..8 j + 8]`
///
/// # Safety
/// The CPU has products of matrices of bytes.
#[inline(always)]
unsafe fn add_matrix(sums: &mut int32x4_t, codes: int8x16_t, x: int8x16_t) {
    // SAFETY: promised by the caller; reads and writes the named registers alone.
    unsafe {
        asm!(
            ".arch_extension i8mm",
            "smmla {sums:v}.4s, {x:v}.16b, {codes:v}.16b",
            sums = inout(vreg) *sums,
            x = in(vreg) x,
            codes = in(vreg) codes,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
}

/// See [`QuantProduct`].
///
/// # Safety
/// The CPU has the products.
pub(crate) unsafe fn panel_quant<P: Products>(product: &QuantProduct<'_>, sums: &mut [f32]) {
    let &QuantProduct { x, groups_per_row, panel, layout, .. } = product;
    let num_rows = sums.len() / PANEL_ROWS;
    assert_eq!(panel.len(), layout.panel_bytes(groups_per_row * 32), "bytes of a panel");
    assert!(x.len() >= num_rows * groups_per_row, "activations of {num_rows} rows");
    sums.fill(0.0);
    UNPACKED.with_borrow_mut(|chunk| {
        for (bytes, first_group) in panel.chunks(layout.chunk_bytes()).zip((0..groups_per_row).step_by(CHUNK_GROUPS)) {
            let num_groups = CHUNK_GROUPS.min(groups_per_row - first_group);
            for (g, group) in layout.groups(bytes).take(num_groups).enumerate() {
                // SAFETY: promised by the caller.
                unsafe { unpack_codes::<P>(layout, &group, &mut chunk.codes[g]) };
                // SAFETY: every 64-bit ARM processor has these vectors.
                unsafe { unpack_scales(layout, &group, g, chunk) };
            }
            for rows in tiles(0..num_rows, TILE_ROWS) {
                let x = &x[rows.start * groups_per_row + first_group..];
                assert!(x.len() >= (rows.len() - 1) * groups_per_row + num_groups, "activations of a tile");
                let has_minimum = layout.meaning == CodeMeaning::Minimum;
                let sums = sums[rows.start * PANEL_ROWS..rows.end * PANEL_ROWS].as_mut_ptr();
                let tile = Tile { x: x.as_ptr(), groups_per_row, num_groups, chunk, has_minimum, sums };
                // SAFETY: promised by the caller; activations and sums of the tile's rows were checked.
                unsafe {
                    match layout.halves {
                        0 => tile.run_rows::<P, 0>(rows.len()),
                        1 => tile.run_rows::<P, 1>(rows.len()),
                        _ => tile.run_rows::<P, 2>(rows.len()),
                    }
                }
            }
        }
    });
}

/// The codes of a group, less their offset, in the order of the products.
///
/// # Safety
/// The CPU has the products.
unsafe fn unpack_codes<P: Products>(layout: &QuantLayout, group: &GroupBytes<'_>, out: &mut [i8; GROUP_CODES]) {
    let levels = layout.unsigned_levels();
    let offset = match layout.meaning {
        CodeMeaning::Signed => panic!("codes with sign are not laid out in runs of four"),
        CodeMeaning::Offset(offset) => offset,
        CodeMeaning::Minimum => 0,
    };
    let run = |run: usize, vector: usize| {
        let code = run * 4 * PANEL_ROWS + vector * 4 * LANES;
        // SAFETY: every 64-bit ARM processor has these vectors; the table has 16 bytes.
        unsafe {
            let mut codes = plane_bits(group.low, layout.low_bits, code);
            if layout.high_bits > 0 {
                let high = plane_bits(group.high, layout.high_bits, code);
                codes = vorrq_u8(codes, vshlq_u8(high, vdupq_n_s8(layout.low_bits as i8)));
            }
            if let Some(levels) = &levels {
                codes = vqtbl1q_u8(vld1q_u8(levels.as_ptr()), codes);
            }
            vreinterpretq_s8_u8(vsubq_u8(codes, vdupq_n_u8(offset)))
        }
    };
    for (idx, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (pair, vector) = (idx / PANEL_VECTORS, idx % PANEL_VECTORS);
        // SAFETY: promised by the caller; `out` has room for both vectors.
        unsafe {
            let [first, second] = P::arrange([run(2 * pair, vector), run(2 * pair + 1, vector)]);
            vst1q_s8(out.as_mut_ptr(), first);
            vst1q_s8(out.as_mut_ptr().add(16), second);
        }
    }
}

/// The bits of 16 codes from `code` on that a plane of `bits` has.
#[inline]
#[target_feature(enable = "neon")]
fn plane_bits(plane: &[u8], bits: usize, code: usize) -> uint8x16_t {
    let bytes = &plane[code % plane.len()..][..16];
    // SAFETY: 16 bytes.
    let bytes = unsafe { vld1q_u8(bytes.as_ptr()) };
    let shift = vdupq_n_s8(-((bits * (code / plane.len())) as i8));
    vandq_u8(vshlq_u8(bytes, shift), vdupq_n_u8(u8::MAX >> (8 - bits)))
}

/// Scales and minimums of group `g`.
#[target_feature(enable = "neon")]
fn unpack_scales(layout: &QuantLayout, group: &GroupBytes<'_>, g: usize, out: &mut Chunk) {
    let (d, d_min) = group.d.split_at(2 * PANEL_ROWS);
    match layout.quant_type {
        QuantType::MXFP4 => unpack_halves(d, &mut out.d[g], |halves| bf16_to_f32(halves)),
        _ => unpack_halves(d, &mut out.d[g], |halves| f16_to_f32(halves)),
    }
    for (out, scales) in out.scales[g].iter_mut().zip(group.scales.as_chunks::<PANEL_ROWS>().0) {
        out.iter_mut().zip(scales).for_each(|(out, &scale)| *out = i32::from(scale as i8));
    }
    if layout.meaning != CodeMeaning::Minimum {
        return;
    }
    unpack_halves(d_min, &mut out.d_min[g], |halves| f16_to_f32(halves));
    let mins = group.mins.as_chunks::<PANEL_ROWS>().0;
    for (half, out) in out.mins[g].iter_mut().enumerate() {
        match mins.get(half).or(mins.first()) {
            Some(mins) => out.iter_mut().zip(mins).for_each(|(out, &min)| *out = i32::from(min as i8)),
            None => out.fill(1),
        }
    }
}

/// 32 numbers of two bytes each.
#[inline]
#[target_feature(enable = "neon")]
fn unpack_halves(bytes: &[u8], out: &mut [f32; PANEL_ROWS], convert: impl Fn(uint16x8_t) -> [float32x4_t; 2]) {
    for (out, bytes) in out.as_chunks_mut::<8>().0.iter_mut().zip(bytes.as_chunks::<16>().0) {
        // SAFETY: 16 bytes are read, eight numbers are written.
        unsafe {
            let [low, high] = convert(vreinterpretq_u16_u8(vld1q_u8(bytes.as_ptr())));
            vst1q_f32(out.as_mut_ptr(), low);
            vst1q_f32(out.as_mut_ptr().add(LANES), high);
        }
    }
}

/// Operands of one tile. Its functions trust the pointers.
struct Tile<'a> {
    /// First group of the first row.
    x: *const Int8Group,
    groups_per_row: usize,
    num_groups: usize,
    chunk: &'a Chunk,
    has_minimum: bool,
    /// `[rows, 32]`
    sums: *mut f32,
}

impl Tile<'_> {
    #[inline(always)]
    fn group(&self, row: usize, g: usize) -> *const Int8Group {
        self.x.wrapping_add(row * self.groups_per_row + g)
    }

    /// All groups and columns for `num_rows` rows.
    ///
    /// # Safety
    /// As for [`run`](Self::run).
    unsafe fn run_rows<P: Products, const HALVES: usize>(&self, num_rows: usize) {
        for g in 0..self.num_groups {
            for first in (0..PANEL_VECTORS).step_by(VECTORS) {
                // SAFETY: promised by the caller.
                unsafe {
                    match num_rows {
                        1 => self.run::<P, HALVES, 1>(g, first),
                        2 => self.run::<P, HALVES, 2>(g, first),
                        3 => self.run::<P, HALVES, 3>(g, first),
                        4 => self.run::<P, HALVES, 4>(g, first),
                        5 => self.run::<P, HALVES, 5>(g, first),
                        _ => self.run::<P, HALVES, TILE_ROWS>(g, first),
                    }
                }
            }
        }
    }

    /// Adds a group's part to the sums of `ROWS` rows and the columns of `VECTORS` vectors from `first` on.
    ///
    /// # Safety
    /// The CPU has the products; the tile has `ROWS` rows and the group; `first + VECTORS <= 8`.
    #[inline(always)]
    unsafe fn run<P: Products, const HALVES: usize, const ROWS: usize>(&self, g: usize, first: usize) {
        // SAFETY: promised by the caller.
        unsafe {
            let dots = self.dots::<P, HALVES, ROWS>(g, first);
            for (row, dots) in dots.iter().enumerate() {
                let x = &*self.group(row, g);
                for (vector, &dot) in dots.iter().enumerate() {
                    let lane = (first + vector) * LANES;
                    let d = vld1q_f32(self.chunk.d[g].as_ptr().add(lane));
                    let dot = vcvtq_f32_s32(dot);
                    let part = match self.has_minimum {
                        false => vmulq_f32(d, dot),
                        true => {
                            let [of_first, of_second] =
                                [0, 1].map(|half| vld1q_s32(self.chunk.mins[g][half].as_ptr().add(lane)));
                            let min = vmulq_n_s32(of_first, i32::from(x.sums[0]));
                            let min = vmlaq_n_s32(min, of_second, i32::from(x.sums[1]));
                            let d_min = vld1q_f32(self.chunk.d_min[g].as_ptr().add(lane));
                            vfmaq_f32(vnegq_f32(vmulq_f32(d_min, vcvtq_f32_s32(min))), d, dot)
                        }
                    };
                    let sum = self.sums.add(row * PANEL_ROWS + lane);
                    vst1q_f32(sum, vfmaq_n_f32(vld1q_f32(sum), part, x.scale));
                }
            }
        }
    }

    /// `dots[row][vector] = sum over halves of scales (codes . x)`
    ///
    /// # Safety
    /// As for [`run`](Self::run).
    #[inline(always)]
    unsafe fn dots<P: Products, const HALVES: usize, const ROWS: usize>(
        &self,
        g: usize,
        first: usize,
    ) -> [[int32x4_t; VECTORS]; ROWS] {
        // SAFETY: promised by the caller.
        unsafe {
            let mut dots = [[vdupq_n_s32(0); VECTORS]; ROWS];
            let num_parts = HALVES.max(1);
            for part in 0..num_parts {
                // Of two rows each; there are more than are used.
                let mut sums = [[P::zero(); VECTORS]; TILE_ROWS / 2];
                for pair in 0..RUN_PAIRS / num_parts {
                    let pair = part * (RUN_PAIRS / num_parts) + pair;
                    let codes = self.chunk.codes[g].as_ptr().add((pair * PANEL_VECTORS + first) * 32);
                    let codes: [_; VECTORS] =
                        std::array::from_fn(|i| [vld1q_s8(codes.add(32 * i)), vld1q_s8(codes.add(32 * i + 16))]);
                    for (idx, sums) in sums.iter_mut().enumerate().take(ROWS.div_ceil(2)) {
                        let has_two = 2 * idx + 1 < ROWS;
                        let x = [2 * idx, if has_two { 2 * idx + 1 } else { 2 * idx }]
                            .map(|row| vld1_s8((*self.group(row, g)).codes.as_ptr().add(8 * pair)));
                        for (sums, codes) in sums.iter_mut().zip(codes) {
                            match has_two {
                                true => P::add::<2>(sums, codes, x),
                                false => P::add::<1>(sums, codes, x),
                            }
                        }
                    }
                }
                for (row, dots) in dots.iter_mut().enumerate() {
                    for (vector, dot) in dots.iter_mut().enumerate() {
                        let total = P::totals(sums[row / 2][vector])[row % 2];
                        *dot = match HALVES {
                            0 => total,
                            _ => {
                                let lane = (first + vector) * LANES;
                                vmlaq_s32(*dot, total, vld1q_s32(self.chunk.scales[g][part].as_ptr().add(lane)))
                            }
                        };
                    }
                }
            }
            dots
        }
    }
}
