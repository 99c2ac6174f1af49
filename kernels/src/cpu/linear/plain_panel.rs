//! Weights one by one in panels:
//!
//! ```text
//! f32, f16   [out / 32][in][32]         one load gives the weights of 8 or 16 output rows for one k
//! bf16       [out / 32][in / 2][32][2]  pairs along k: a 32-bit lane is (k, k + 1) of one output row, which a shift and
//!                                       a mask turn into two f32 lanes, and a bf16 dot product reads as it is
//! ```
//!
//! An odd `in` of bf16 is padded with zero to the next even one.

use std::ops::Range;

use half::{bf16, f16};

use super::super::dispatch::Cpu;
use super::super::pool::DisjointMut;
use super::packed::{MatrixSource, PANEL_ROWS, RowSource};
use crate::dtype::{DType, Encoding, encode_bf16, encode_f16};
use crate::host::{HugeBuffer, Plain};

/// Columns that are converted at once while packing: 32 rows of them fit the L1 cache, and they are whole blocks of any
/// format.
const PACK_COLUMNS: usize = 256;

/// How a panel of single numbers stores them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PlainFormat {
    F32,
    F16,
    Bf16,
}

impl PlainFormat {
    /// Bytes of a panel, if a `usize` counts them.
    pub(super) fn panel_bytes(self, in_features: usize) -> Option<usize> {
        match self {
            PlainFormat::F32 => in_features.checked_mul(4 * PANEL_ROWS),
            PlainFormat::F16 => in_features.checked_mul(2 * PANEL_ROWS),
            PlainFormat::Bf16 => in_features.checked_next_multiple_of(2)?.checked_mul(2 * PANEL_ROWS),
        }
    }
    /// Copies the weights into the panels, on all threads.
    pub(super) fn fill(self, cpu: &Cpu, out: &mut HugeBuffer, in_features: usize, row_source: &RowSource<'_>) {
        match self {
            PlainFormat::F32 => fill_panels(cpu, out.as_mut_slice(), in_features, row_source, read_f32),
            PlainFormat::F16 => fill_panels(cpu, out.as_mut_slice(), in_features, row_source, read_f16),
            PlainFormat::Bf16 => fill_panels(cpu, out.as_mut_slice(), in_features, row_source, read_pairs),
        }
    }
    /// One row of a panel as f32.
    pub(super) fn row_into(self, panel: &[u8], row: usize, out: &mut [f32]) {
        let out = out.iter_mut().enumerate();
        let bits16 = |idx: usize| u16::from_ne_bytes([panel[2 * idx], panel[2 * idx + 1]]);
        match self {
            PlainFormat::F32 => {
                let numbers = panel.as_chunks::<4>().0;
                out.for_each(|(k, out)| *out = f32::from_ne_bytes(numbers[k * PANEL_ROWS + row]));
            }
            PlainFormat::F16 => out.for_each(|(k, out)| *out = f16::from_bits(bits16(k * PANEL_ROWS + row)).to_f32()),
            PlainFormat::Bf16 => out.for_each(|(k, out)| *out = bf16::from_bits(bits16(bf16_index(row, k))).to_f32()),
        }
    }
}

/// Place of row `row`, column `k` in a bf16 panel.
fn bf16_index(row: usize, k: usize) -> usize {
    (k / 2 * PANEL_ROWS + row) * 2 + k % 2
}

/// What a panel stores for one row and one group of columns.
trait Lane: Plain + Default {
    /// Columns of a group.
    const COLUMNS: usize;
}
impl Lane for f32 {
    const COLUMNS: usize = 1;
}
/// The bits of an f16.
impl Lane for u16 {
    const COLUMNS: usize = 1;
}
/// The bits of two bf16, the first in the lower half.
impl Lane for u32 {
    const COLUMNS: usize = 2;
}

/// Reads columns of a source row, at most [`PACK_COLUMNS`], as lanes.
type ReadLanes<L> = fn(source: &MatrixSource<'_>, row: usize, columns: Range<usize>, lanes: &mut [L]);

/// Fills all panels, each from beginning to end.
fn fill_panels<L: Lane>(cpu: &Cpu, out: &mut [L], in_features: usize, row_source: &RowSource<'_>, read: ReadLanes<L>) {
    let panel_len = in_features.div_ceil(L::COLUMNS) * PANEL_ROWS;
    let num_panels = out.len().checked_div(panel_len).unwrap_or(0);
    let out = DisjointMut::new(out);
    cpu.pool().run(num_panels, 1, |panels| {
        for panel in panels {
            // SAFETY: each panel is one item.
            let out = unsafe { out.range_mut(panel * panel_len..(panel + 1) * panel_len) };
            fill_panel(out, in_features, |row| row_source(panel, row), read);
        }
    });
}

/// Transposes the lanes of 32 rows, a square at a time that fits the L1 cache.
fn fill_panel<'a, L: Lane>(
    out: &mut [L],
    in_features: usize,
    row_source: impl Fn(usize) -> Option<(&'a MatrixSource<'a>, usize)>,
    read: ReadLanes<L>,
) {
    // Rows that do not exist stay zero.
    let mut lanes = [[L::default(); PACK_COLUMNS]; PANEL_ROWS];
    let squares = out.chunks_mut(PACK_COLUMNS / L::COLUMNS * PANEL_ROWS);
    for (start, out) in (0..in_features).step_by(PACK_COLUMNS).zip(squares) {
        let columns = start..(start + PACK_COLUMNS).min(in_features);
        let num_lanes = out.len() / PANEL_ROWS;
        for (row, lanes) in lanes.iter_mut().enumerate() {
            if let Some((source, source_row)) = row_source(row) {
                read(source, source_row, columns.clone(), &mut lanes[..num_lanes]);
            }
        }
        for (idx, out) in out.chunks_exact_mut(PANEL_ROWS).enumerate() {
            out.iter_mut().zip(&lanes).for_each(|(out, lanes)| *out = lanes[idx]);
        }
    }
}

fn read_f32(source: &MatrixSource<'_>, row: usize, columns: Range<usize>, lanes: &mut [f32]) {
    source.encoding.decode(source.column_bytes(row, columns), lanes);
}

fn read_f16(source: &MatrixSource<'_>, row: usize, columns: Range<usize>, lanes: &mut [u16]) {
    read_bits16(source, row, columns, DType::F16, encode_f16, lanes);
}

fn read_pairs(source: &MatrixSource<'_>, row: usize, columns: Range<usize>, lanes: &mut [u32]) {
    let mut bits = [0; PACK_COLUMNS];
    let num_columns = columns.len();
    read_bits16(source, row, columns, DType::Bf16, encode_bf16, &mut bits[..num_columns]);
    let (pairs, _) = bits.as_chunks::<2>();
    lanes.iter_mut().zip(pairs).for_each(|(lane, pair)| *lane = u32::from(pair[0]) | u32::from(pair[1]) << 16);
}

/// Reads numbers as `target` (f16 or bf16), rounded by `encode` unless they are stored as `target` already.
fn read_bits16(
    source: &MatrixSource<'_>,
    row: usize,
    columns: Range<usize>,
    target: DType,
    encode: fn(&[f32], &mut [u16]),
    bits: &mut [u16],
) {
    let bytes = source.column_bytes(row, columns);
    if source.encoding == Encoding::Plain(target) {
        let (numbers, _) = bytes.as_chunks::<2>();
        bits.iter_mut().zip(numbers).for_each(|(bits, &number)| *bits = u16::from_le_bytes(number));
    } else {
        let mut values = [0.0; PACK_COLUMNS];
        let values = &mut values[..bits.len()];
        source.encoding.decode(bytes, values);
        encode(values, bits);
    }
}
