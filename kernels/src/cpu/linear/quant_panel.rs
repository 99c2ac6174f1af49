//! Quantized weights in panels: the layout, the way from blocks to it, and from it to what the products multiply.
//!
//! A panel has 32 output rows and is cut into *chunks* of 256 columns, a chunk into *groups* of 32, the columns that share
//! one scale of the activations. In a group the codes of all rows lie in *runs* of two or four columns, the order in which
//! integer dot products take them:
//!
//! ```text
//! code c = (step * 32 + row) * run + k         step: which run of the group's columns, k: column of the run
//! plane of b bits, P = 128 b bytes             code c is at bits b (c / P) of byte c % P
//! group of 32-column formats                   [low plane][high plane][d f16 x 32]([d_min f16 x 32])
//! chunk of 256-column formats                  [d f16 x 32]([d_min f16 x 32]) [group; 8]
//! group of them                                [low plane][high plane][scales i8, halves x 32]([mins u8, halves x 32])
//! ```
//!
//! (`d` of MXFP4 is a bf16, which holds its powers of two.)
//!
//! So a plane becomes codes by one shift and one mask of whole vectors, a thread reads one linear stream, and a weight
//! takes the bits that it has in a file, but for scales of less than a byte, which are bytes here (Q3_K, Q4_K and Q5_K 1/8 bit
//! more a weight, MXFP4 1/4, Q2_K 1/2).

use super::packed::PANEL_ROWS;
use crate::quant::{BlockParts, IQ4_NL_LEVELS, MXFP4_LEVELS, QuantType, taking_apart};

/// Columns of a chunk: a block of the K formats.
pub(crate) const CHUNK_COLUMNS: usize = 256;
/// Columns of a group.
pub(crate) const GROUP_COLUMNS: usize = 32;
/// Groups of a whole chunk.
pub(crate) const CHUNK_GROUPS: usize = CHUNK_COLUMNS / GROUP_COLUMNS;
/// Codes of a group, all rows.
pub(crate) const GROUP_CODES: usize = GROUP_COLUMNS * PANEL_ROWS;
/// 32 numbers of two bytes.
const LANE_HALVES_BYTES: usize = 2 * PANEL_ROWS;

/// Which integer products an instruction set has, and so in which runs codes lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CodeProducts {
    /// Of bytes without sign and bytes with, summed in 16 bits: codes beyond 7 bits overflow, and are widened to 16.
    Narrow,
    /// The same summed in 32 bits: any codes fit.
    Wide,
}

/// What a code stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CodeMeaning {
    /// Itself, or a level of a table, as a number of 16 bits with sign; runs of two.
    Signed,
    /// Itself, less this; runs of four.
    Offset(u8),
    /// Itself; each group has a minimum that is subtracted; runs of four.
    Minimum,
}

/// How a format's panels are laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct QuantLayout {
    pub(crate) quant_type: QuantType,
    pub(crate) meaning: CodeMeaning,
    /// Bits of a code in the low plane.
    pub(crate) low_bits: usize,
    /// Bits of a code in the high plane, 0 without one.
    pub(crate) high_bits: usize,
    /// Integer scales of a group; 0: none, `d` is the group's own.
    pub(crate) halves: usize,
    /// What the codes stand for where they are indices. Planes keep the indices; levels are looked up as they are unpacked.
    levels: Option<&'static [i8; 16]>,
}

/// What is added to levels and to signed codes to make them codes without sign.
const LEVEL_OFFSET: u8 = 128;

impl QuantLayout {
    pub(crate) fn new(quant_type: QuantType, products: CodeProducts) -> QuantLayout {
        let signed = match products {
            CodeProducts::Narrow => CodeMeaning::Signed,
            CodeProducts::Wide => CodeMeaning::Offset(LEVEL_OFFSET),
        };
        let (meaning, [low_bits, high_bits], halves, levels) = match quant_type {
            QuantType::Q8_0 => (signed, [8, 0], 0, None),
            QuantType::Q4_0 => (CodeMeaning::Offset(8), [4, 0], 0, None),
            QuantType::Q4_1 => (CodeMeaning::Minimum, [4, 0], 0, None),
            QuantType::Q5_0 => (CodeMeaning::Offset(16), [4, 1], 0, None),
            QuantType::Q5_1 => (CodeMeaning::Minimum, [4, 1], 0, None),
            QuantType::Q2_K => (CodeMeaning::Minimum, [2, 0], 2, None),
            QuantType::Q3_K => (CodeMeaning::Offset(4), [2, 1], 2, None),
            QuantType::Q4_K => (CodeMeaning::Minimum, [4, 0], 1, None),
            QuantType::Q5_K => (CodeMeaning::Minimum, [4, 1], 1, None),
            QuantType::Q6_K => (CodeMeaning::Offset(32), [4, 2], 2, None),
            QuantType::IQ4_NL => (signed, [4, 0], 0, Some(&IQ4_NL_LEVELS)),
            QuantType::MXFP4 => (signed, [4, 0], 0, Some(&MXFP4_LEVELS)),
        };
        QuantLayout { quant_type, meaning, low_bits, high_bits, halves, levels }
    }

    /// Consecutive columns that lie together.
    fn run(&self) -> usize {
        if self.meaning == CodeMeaning::Signed { 2 } else { 4 }
    }
    /// What each code is too large by; in formats of minimums their factor, 1, as of codes with sign, which ask for none.
    pub(crate) fn offset(&self) -> i16 {
        match self.meaning {
            CodeMeaning::Offset(offset) => i16::from(offset),
            CodeMeaning::Signed | CodeMeaning::Minimum => 1,
        }
    }
    /// The levels of formats with a table, without sign: with their offset.
    pub(crate) fn unsigned_levels(&self) -> Option<[u8; 16]> {
        self.levels.map(|levels| levels.map(|level| (level as u8).wrapping_add(LEVEL_OFFSET)))
    }
    fn has_minimum(&self) -> bool {
        self.meaning == CodeMeaning::Minimum
    }
    fn low_bytes(&self) -> usize {
        GROUP_CODES * self.low_bits / 8
    }
    fn high_bytes(&self) -> usize {
        GROUP_CODES * self.high_bits / 8
    }
    /// Bytes of `d` and `d_min` of all rows.
    fn scale_bytes(&self) -> usize {
        LANE_HALVES_BYTES * (1 + usize::from(self.has_minimum()))
    }
    pub(crate) fn header_bytes(&self) -> usize {
        if self.halves == 0 { 0 } else { self.scale_bytes() }
    }
    pub(crate) fn group_bytes(&self) -> usize {
        let scales = match self.halves {
            0 => self.scale_bytes(),
            halves => halves * PANEL_ROWS * (1 + usize::from(self.has_minimum())),
        };
        self.low_bytes() + self.high_bytes() + scales
    }
    /// Bytes of a whole chunk.
    pub(crate) fn chunk_bytes(&self) -> usize {
        self.header_bytes() + CHUNK_GROUPS * self.group_bytes()
    }
    /// Bytes of a panel; `in_features` is a multiple of the format's block.
    pub(crate) fn panel_bytes(&self, in_features: usize) -> usize {
        in_features / CHUNK_COLUMNS * self.chunk_bytes()
            + in_features % CHUNK_COLUMNS / GROUP_COLUMNS * self.group_bytes()
    }

    /// Writes the blocks of up to 32 rows, each those of all columns, into a panel.
    pub(crate) fn store_rows(&self, panel: &mut [u8], rows: &[&[u8]]) {
        match self.quant_type.block_values() {
            GROUP_COLUMNS => self.store_blocks::<1>(panel, rows),
            _ => self.store_blocks::<CHUNK_GROUPS>(panel, rows),
        }
    }

    fn store_blocks<const BLOCK_GROUPS: usize>(&self, panel: &mut [u8], rows: &[&[u8]]) {
        let take_apart = taking_apart(self.quant_type);
        let block_bytes = self.quant_type.block_bytes();
        let chunk_blocks = const { CHUNK_GROUPS / BLOCK_GROUPS };
        let (group_bytes, plane_bytes) = (self.group_bytes(), self.low_bytes() + self.high_bytes());
        let mut parts: [BlockParts; CHUNK_GROUPS] = Default::default();
        let mut codes = [[0; GROUP_CODES]; CHUNK_GROUPS];
        for (idx, chunk) in panel.chunks_mut(self.chunk_bytes()).enumerate() {
            let (header, groups) = chunk.split_at_mut(self.header_bytes());
            let num_blocks = groups.len() / group_bytes / BLOCK_GROUPS;
            for (row, blocks) in rows.iter().enumerate() {
                let blocks = &blocks[idx * chunk_blocks * block_bytes..][..num_blocks * block_bytes];
                take_apart(blocks, &mut parts);
                let groups = groups.chunks_exact_mut(BLOCK_GROUPS * group_bytes);
                for ((parts, groups), codes) in parts.iter().zip(groups).zip(codes.as_chunks_mut::<BLOCK_GROUPS>().0) {
                    self.store_scales(header, row, parts);
                    for (g, group) in groups.chunks_exact_mut(group_bytes).enumerate() {
                        self.scatter(&parts.q.as_chunks().0[g], row, &mut codes[g]);
                        self.store_group_scales(&mut group[plane_bytes..], row, g, parts);
                    }
                }
            }
            for (group, codes) in groups.chunks_exact_mut(group_bytes).zip(&codes) {
                let (low, rest) = group.split_at_mut(self.low_bytes());
                let high = &mut rest[..self.high_bytes()];
                match self.low_bits {
                    8 => low.copy_from_slice(codes),
                    4 => fold::<4, 0>(low, codes),
                    2 => fold::<2, 0>(low, codes),
                    bits => unreachable!("no format has a low plane of {bits} bits"),
                }
                match (self.high_bits, self.low_bits) {
                    (0, _) => {}
                    (1, 4) => fold::<1, 4>(high, codes),
                    (1, 2) => fold::<1, 2>(high, codes),
                    (2, 4) => fold::<2, 4>(high, codes),
                    planes => unreachable!("no format has planes of {planes:?} bits"),
                }
            }
        }
    }

    fn store_group_scales(&self, scales: &mut [u8], row: usize, g: usize, parts: &BlockParts) {
        if self.halves == 0 {
            return self.store_scales(scales, row, parts);
        }
        let (scales, mins) = scales.split_at_mut(self.halves * PANEL_ROWS);
        for half in 0..self.halves {
            scales[half * PANEL_ROWS + row] = parts.scales[g * self.halves + half] as u8;
        }
        for half in 0..mins.len() / PANEL_ROWS {
            mins[half * PANEL_ROWS + row] = parts.mins[g * self.halves + half];
        }
    }

    /// The codes of one row of a group to their places among those of all rows.
    fn scatter(&self, q: &[u8; GROUP_COLUMNS], row: usize, codes: &mut [u8; GROUP_CODES]) {
        if self.run() == 2 {
            let steps = codes.as_chunks_mut::<2>().0.as_chunks_mut::<PANEL_ROWS>().0;
            return steps.iter_mut().zip(q.as_chunks().0).for_each(|(step, q)| step[row] = *q);
        }
        // The offset turns the highest bit of a signed code over. As words: the compiler takes bytes one by one.
        let is_signed_in_file = self.low_bits == 8 && self.meaning == CodeMeaning::Offset(LEVEL_OFFSET);
        let flip = if is_signed_in_file { u32::from_ne_bytes([LEVEL_OFFSET; 4]) } else { 0 };
        let steps = codes.as_chunks_mut::<4>().0.as_chunks_mut::<PANEL_ROWS>().0;
        for (step, q) in steps.iter_mut().zip(q.as_chunks().0) {
            step[row] = (u32::from_ne_bytes(*q) ^ flip).to_ne_bytes();
        }
    }

    /// `d` and `d_min` of a row, behind one another by rows.
    fn store_scales(&self, bytes: &mut [u8], row: usize, parts: &BlockParts) {
        for (numbers, number) in bytes.chunks_exact_mut(LANE_HALVES_BYTES).zip([parts.d, parts.d_min]) {
            numbers[2 * row..2 * row + 2].copy_from_slice(&number.to_le_bytes());
        }
    }

    /// Takes `num_groups` groups of a chunk apart.
    pub(crate) fn unpack(&self, chunk: &[u8], num_groups: usize, out: &mut UnpackedChunk) {
        self.unpack_codes(chunk, num_groups, out);
        for (g, group) in self.groups(chunk).take(num_groups).enumerate() {
            self.unpack_integers(&group, g, out);
            self.unpack_scales(group.d, g, out);
        }
    }

    /// The codes alone.
    #[inline(always)]
    pub(crate) fn unpack_codes(&self, chunk: &[u8], num_groups: usize, out: &mut UnpackedChunk) {
        for (g, group) in self.groups(chunk).take(num_groups).enumerate() {
            match self.meaning {
                CodeMeaning::Signed => self.unpack_signed(group.low, out.signed_codes_mut(g)),
                _ => self.unpack_unsigned(group.low, group.high, out.codes_mut(g)),
            }
        }
    }

    /// Where the parts of each group of a chunk lie.
    #[inline(always)]
    pub(crate) fn groups<'a>(&self, chunk: &'a [u8]) -> impl Iterator<Item = GroupBytes<'a>> {
        let layout = *self;
        let (header, groups) = chunk.split_at(self.header_bytes());
        groups.chunks_exact(self.group_bytes()).map(move |group| {
            let (low, rest) = group.split_at(layout.low_bytes());
            let (high, rest) = rest.split_at(layout.high_bytes());
            let (scales, rest) = rest.split_at(layout.halves * PANEL_ROWS);
            let (d, mins) = if layout.halves == 0 { (rest, &[][..]) } else { (header, rest) };
            GroupBytes { low, high, scales, mins, d }
        })
    }

    #[inline(always)]
    fn unpack_unsigned(&self, low: &[u8], high: &[u8], out: &mut [u8; GROUP_CODES]) {
        match self.low_bits {
            8 => out.copy_from_slice(low),
            4 => unpack_plane::<4, 0>(low, out),
            _ => unpack_plane::<2, 0>(low, out),
        }
        match (self.high_bits, self.low_bits) {
            (0, _) => {}
            (1, 4) => unpack_plane::<1, 4>(high, out),
            (1, _) => unpack_plane::<1, 2>(high, out),
            _ => unpack_plane::<2, 4>(high, out),
        }
        if let Some(levels) = self.unsigned_levels() {
            out.iter_mut().for_each(|code| *code = levels[usize::from(*code)]);
        }
    }

    #[inline(always)]
    fn unpack_signed(&self, low: &[u8], out: &mut [i16; GROUP_CODES]) {
        match self.levels {
            None => out.iter_mut().zip(low).for_each(|(out, &code)| *out = i16::from(code as i8)),
            Some(levels) => {
                let (first, second) = out.split_at_mut(GROUP_CODES / 2);
                for ((first, second), &byte) in first.iter_mut().zip(second).zip(low) {
                    *first = i16::from(levels[usize::from(byte & 15)]);
                    *second = i16::from(levels[usize::from(byte >> 4)]);
                }
            }
        }
    }

    /// Integer scales and minimums of group `g` as 16-bit products take them: a scale twice, the minimums of both halves as a pair.
    fn unpack_integers(&self, group: &GroupBytes<'_>, g: usize, out: &mut UnpackedChunk) {
        for (out, scales) in out.scales[g].iter_mut().zip(group.scales.as_chunks::<PANEL_ROWS>().0) {
            out.iter_mut().zip(scales).for_each(|(out, &scale)| *out = doubled(i32::from(scale as i8)));
        }
        let factors = if group.mins.is_empty() { group.scales } else { group.mins };
        let factors = factors.as_chunks::<PANEL_ROWS>().0;
        let (Some(first), Some(second)) = (factors.first(), factors.last()) else { return };
        let offset = i32::from(self.offset());
        for ((out, &first), &second) in out.mins[g].iter_mut().zip(first).zip(second) {
            *out = pair(offset * i32::from(first as i8), offset * i32::from(second as i8));
        }
    }

    fn unpack_scales(&self, bytes: &[u8], g: usize, out: &mut UnpackedChunk) {
        let (d, d_min) = bytes.split_at(LANE_HALVES_BYTES);
        let d = d.as_chunks::<2>().0;
        if self.quant_type == QuantType::MXFP4 {
            let bf16 = |bytes: [u8; 2]| f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16);
            out.d[g].iter_mut().zip(d).for_each(|(out, &bytes)| *out = bf16(bytes));
        } else {
            out.d[g].iter_mut().zip(d).for_each(|(out, &bytes)| *out = f16_to_f32(u16::from_le_bytes(bytes)));
        }
        for (out, &bytes) in out.d_min[g].iter_mut().zip(d_min.as_chunks::<2>().0) {
            *out = f16_to_f32(u16::from_le_bytes(bytes));
        }
    }

    /// The integers that count for formats without integer scales.
    pub(crate) fn begin(&self, out: &mut UnpackedChunk) {
        out.last_half = usize::from(self.halves == 2);
        if self.halves == 0 {
            out.scales.iter_mut().for_each(|scales| scales[0].fill(doubled(1)));
            out.mins.iter_mut().for_each(|mins| mins.fill(doubled(i32::from(self.offset()))));
        }
    }

    /// Numbers of one row of a panel.
    pub(crate) fn row_into(&self, panel: &[u8], row: usize, out: &mut [f32]) {
        let mut chunk = UnpackedChunk::zeroed();
        self.begin(&mut chunk);
        for (bytes, out) in panel.chunks(self.chunk_bytes()).zip(out.chunks_mut(CHUNK_COLUMNS)) {
            self.unpack(bytes, out.len() / GROUP_COLUMNS, &mut chunk);
            for (g, out) in out.chunks_mut(GROUP_COLUMNS).enumerate() {
                for (column, out) in out.iter_mut().enumerate() {
                    *out = self.number(&chunk, g, row, column);
                }
            }
        }
    }

    /// One number of an unpacked chunk, by the products and sums that the format fixes.
    fn number(&self, chunk: &UnpackedChunk, g: usize, row: usize, column: usize) -> f32 {
        let (run, half) = (self.run(), column / 16 * usize::from(self.halves == 2));
        let code = (column / run * PANEL_ROWS + row) * run + column % run;
        let integer = |pairs: i32, half: usize| (pairs >> (16 * half)) as i16;
        let scale = chunk.d[g][row] * f32::from(integer(chunk.scales[g][half][row], 0));
        match self.meaning {
            CodeMeaning::Signed => chunk.d[g][row] * f32::from(chunk.signed_codes(g)[code]),
            CodeMeaning::Offset(offset) => scale * (f32::from(chunk.codes(g)[code]) - f32::from(offset)),
            CodeMeaning::Minimum => {
                let min = chunk.d_min[g][row] * f32::from(integer(chunk.mins[g][row], half));
                scale * f32::from(chunk.codes(g)[code]) - min
            }
        }
    }
}

/// What the compiler knows of a layout of codes without sign.
pub(crate) trait PanelCodes {
    /// Groups have minimums, else codes an offset.
    const MINIMUM: bool;
    /// Bits of a code in the low plane.
    const LOW: usize;
    /// Bits of a code in the high plane.
    const HIGH: usize;
    /// Integer scales of a group.
    const HALVES: usize;
    /// Codes are indices of levels.
    const TABLE: bool;

    /// Bytes of a group's planes.
    const PLANE_BYTES: usize = GROUP_CODES / 8 * (Self::LOW + Self::HIGH);
    /// Bytes of `d` and `d_min` of all rows.
    const SCALE_BYTES: usize = LANE_HALVES_BYTES * (1 + Self::MINIMUM as usize);
    /// Bytes before a chunk's first group.
    const HEADER_BYTES: usize = if Self::HALVES == 0 { 0 } else { Self::SCALE_BYTES };
    const GROUP_BYTES: usize = Self::PLANE_BYTES
        + match Self::HALVES {
            0 => Self::SCALE_BYTES,
            halves => halves * PANEL_ROWS * (1 + Self::MINIMUM as usize),
        };

    /// Whether a layout is this one.
    fn describes(layout: &QuantLayout) -> bool {
        let bits = (layout.low_bits, layout.high_bits, layout.halves) == (Self::LOW, Self::HIGH, Self::HALVES);
        let bytes = (layout.header_bytes(), layout.group_bytes()) == (Self::HEADER_BYTES, Self::GROUP_BYTES);
        bits && bytes && layout.has_minimum() == Self::MINIMUM && layout.levels.is_some() == Self::TABLE
    }
}

/// The parameters are the constants of [`PanelCodes`].
pub(crate) struct Codes<
    const MINIMUM: bool,
    const LOW: usize,
    const HIGH: usize,
    const HALVES: usize,
    const TABLE: bool = false,
>;

impl<const MINIMUM: bool, const LOW: usize, const HIGH: usize, const HALVES: usize, const TABLE: bool> PanelCodes
    for Codes<MINIMUM, LOW, HIGH, HALVES, TABLE>
{
    const MINIMUM: bool = MINIMUM;
    const LOW: usize = LOW;
    const HIGH: usize = HIGH;
    const HALVES: usize = HALVES;
    const TABLE: bool = TABLE;
}

/// The parts of a group.
pub(crate) struct GroupBytes<'a> {
    pub(crate) low: &'a [u8],
    pub(crate) high: &'a [u8],
    /// `[halves][32]`
    pub(crate) scales: &'a [u8],
    /// `[halves][32]`, empty without minimums that are integers.
    pub(crate) mins: &'a [u8],
    /// `d`, and `d_min` where there are minimums.
    pub(crate) d: &'a [u8],
}

/// Puts bits `SHIFT..SHIFT + BITS` of all codes of a group into their plane.
fn fold<const BITS: usize, const SHIFT: usize>(plane: &mut [u8], codes: &[u8; GROUP_CODES]) {
    plane.fill(0);
    for (place, codes) in codes.chunks_exact(GROUP_CODES * BITS / 8).enumerate() {
        for (byte, code) in plane.iter_mut().zip(codes) {
            *byte |= (code >> SHIFT & ((1 << BITS) - 1)) << (place * BITS);
        }
    }
}

/// Bits `SHIFT..SHIFT + BITS` of all codes, from their plane; the lowest ones replace what was there.
#[inline(always)]
fn unpack_plane<const BITS: usize, const SHIFT: usize>(plane: &[u8], out: &mut [u8; GROUP_CODES]) {
    for (place, out) in out.chunks_exact_mut(GROUP_CODES * BITS / 8).enumerate() {
        for (out, &byte) in out.iter_mut().zip(plane) {
            let bits = (byte >> (BITS * place) & ((1 << BITS) - 1)) << SHIFT;
            *out = if SHIFT == 0 { bits } else { *out | bits };
        }
    }
}

/// Two numbers of 16 bits in one of 32, the first in the lower half.
fn pair(first: i32, second: i32) -> i32 {
    first & 0xffff | second << 16
}

fn doubled(number: i32) -> i32 {
    pair(number, number)
}

/// As the `half` crate, without a branch and without a question to the CPU.
fn f16_to_f32(bits: u16) -> f32 {
    let bits = u32::from(bits);
    let (sign, magnitude) = ((bits & 0x8000) << 16, (bits & 0x7fff) << 13);
    // Exponents of f16 are 112 smaller; the product is exact, for subnormal numbers too.
    let finite = (f32::from_bits(magnitude) * f32::from_bits((127 + 112) << 23)).to_bits();
    let special = magnitude | 0x7f80_0000;
    f32::from_bits(sign | if bits & 0x7c00 == 0x7c00 { special } else { finite })
}

/// A chunk of a panel as products read it.
#[repr(C, align(64))]
pub(crate) struct UnpackedChunk {
    /// Codes of each group, as in the planes: a byte each, or 16 bits each where they are signed.
    codes: [[i16; GROUP_CODES]; CHUNK_GROUPS],
    /// Integer scales by half and row, doubled; formats of one scale use the first.
    pub(crate) scales: [[[i32; PANEL_ROWS]; 2]; CHUNK_GROUPS],
    /// Factors of the sums of activations over the first and the second half, by row.
    pub(crate) mins: [[i32; PANEL_ROWS]; CHUNK_GROUPS],
    /// Scale by row.
    pub(crate) d: [[f32; PANEL_ROWS]; CHUNK_GROUPS],
    /// Scale of the minimums by row.
    pub(crate) d_min: [[f32; PANEL_ROWS]; CHUNK_GROUPS],
    /// Index of the scales of the second half: 0 where both have the same.
    pub(crate) last_half: usize,
}

impl UnpackedChunk {
    pub(crate) fn zeroed() -> Box<UnpackedChunk> {
        Box::new(UnpackedChunk {
            codes: [[0; GROUP_CODES]; CHUNK_GROUPS],
            scales: [[[0; PANEL_ROWS]; 2]; CHUNK_GROUPS],
            mins: [[0; PANEL_ROWS]; CHUNK_GROUPS],
            d: [[0.0; PANEL_ROWS]; CHUNK_GROUPS],
            d_min: [[0.0; PANEL_ROWS]; CHUNK_GROUPS],
            last_half: 0,
        })
    }
    /// Codes of a group, 16 bits each.
    #[inline(always)]
    pub(crate) fn signed_codes(&self, g: usize) -> &[i16; GROUP_CODES] {
        &self.codes[g]
    }
    #[inline(always)]
    fn signed_codes_mut(&mut self, g: usize) -> &mut [i16; GROUP_CODES] {
        &mut self.codes[g]
    }
    /// Codes of a group, a byte each: groups lie behind one another in half of the room.
    #[inline(always)]
    pub(crate) fn codes(&self, g: usize) -> &[u8; GROUP_CODES] {
        assert!(g < CHUNK_GROUPS);
        // SAFETY: inside the array, which has twice as many bytes; bytes have no alignment and no invalid values.
        unsafe { &*self.codes.as_ptr().cast::<[u8; GROUP_CODES]>().add(g) }
    }
    #[inline(always)]
    pub(crate) fn codes_mut(&mut self, g: usize) -> &mut [u8; GROUP_CODES] {
        assert!(g < CHUNK_GROUPS);
        // SAFETY: as in `codes`; `&mut self` makes it exclusive.
        unsafe { &mut *self.codes.as_mut_ptr().cast::<[u8; GROUP_CODES]>().add(g) }
    }
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;

    /// Own conversion is that of the `half` crate for every f16.
    #[test]
    fn f16_becomes_f32() {
        for bits in 0..=u16::MAX {
            let (got, want) = (f16_to_f32(bits), f16::from_bits(bits).to_f32());
            assert!(got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(), "{bits:04x}");
        }
    }
}
