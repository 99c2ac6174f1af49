//! Weight matrices in the layout that the products read.
//!
//! Panels of 32 output rows, one behind the other, each one contiguous stream of `in * 32` weights (several streams at
//! once cost 12 to 30 % of the memory bandwidth):
//!
//! ```text
//! f32, f16   [out / 32][in][32]         one load gives the weights of 8 or 16 output rows for one k
//! bf16       [out / 32][in / 2][32][2]  pairs along k: a 32-bit lane is (k, k + 1) of one output row, which a shift and
//!                                       a mask turn into two f32 lanes, and a bf16 dot product reads as it is
//! ```
//!
//! Rows are padded with zeros to 32, an odd `in` of bf16 to the next even one. For SwiGLU panels of gate and up
//! alternate, so that one work item has both factors of its outputs.

use std::ops::Range;

use half::{bf16, f16};

use super::super::dispatch::Cpu;
use super::super::pool::DisjointMut;
use crate::dtype::{DType, encode_bf16, encode_f16};
use crate::error::{Error, Result};
use crate::host::{HugeBuffer, Plain};

/// Output rows of one panel.
pub const PANEL_ROWS: usize = 32;
/// Columns that are converted at once while packing: 32 rows of them fit the L1 cache.
const PACK_COLUMNS: usize = 64;

/// How packed weights are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum WeightFormat {
    /// IEEE 754 single precision.
    F32,
    /// IEEE 754 half precision.
    F16,
    /// bfloat16, in pairs along `in`.
    Bf16,
}

impl WeightFormat {
    /// Name in errors and reports.
    pub fn name(self) -> &'static str {
        match self {
            WeightFormat::F32 => "f32",
            WeightFormat::F16 => "f16",
            WeightFormat::Bf16 => "bf16",
        }
    }
    fn size_bytes(self) -> usize {
        match self {
            WeightFormat::F32 => 4,
            WeightFormat::F16 | WeightFormat::Bf16 => 2,
        }
    }
    /// `in` is padded to a multiple of this.
    fn in_multiple(self) -> usize {
        match self {
            WeightFormat::F32 | WeightFormat::F16 => 1,
            WeightFormat::Bf16 => 2,
        }
    }
}

impl From<DType> for WeightFormat {
    fn from(dtype: DType) -> WeightFormat {
        match dtype {
            DType::F32 => WeightFormat::F32,
            DType::F16 => WeightFormat::F16,
            DType::Bf16 => WeightFormat::Bf16,
        }
    }
}

/// A matrix as a checkpoint holds it.
#[derive(Debug, Clone, Copy)]
pub struct MatrixSource<'a> {
    /// `[out, in]` row-major, little-endian, at any alignment.
    pub bytes: &'a [u8],
    /// Element type of `bytes`.
    pub dtype: DType,
    /// Rows.
    pub out_features: usize,
    /// Columns.
    pub in_features: usize,
    /// `[out]`
    pub bias: Option<&'a [f32]>,
}

impl MatrixSource<'_> {
    fn check(&self, operation: &'static str, in_features: usize) -> Result<()> {
        let expect = |dimension, expected: Option<usize>, actual: usize| match expected {
            Some(expected) if expected == actual => Ok(()),
            _ => Err(Error::SizeMismatch { operation, dimension, expected: expected.unwrap_or(usize::MAX), actual }),
        };
        expect("in_features", Some(in_features), self.in_features)?;
        let elements = self.out_features.checked_mul(self.in_features);
        let bytes = elements.and_then(|elements| elements.checked_mul(self.dtype.size_bytes()));
        expect("bytes", bytes, self.bytes.len())?;
        expect("bias", Some(self.out_features), self.bias.map_or(self.out_features, <[f32]>::len))
    }
    /// The elements `columns` of a row, as stored.
    fn row_bytes(&self, row: usize, columns: Range<usize>) -> &[u8] {
        let (size, start) = (self.dtype.size_bytes(), row * self.in_features);
        &self.bytes[(start + columns.start) * size..(start + columns.end) * size]
    }
}

/// Which matrices the panels belong to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Arrangement {
    /// Panel `p` has the output rows `32 p ..`.
    Stacked,
    /// Panels `2 p` and `2 p + 1` have the rows `32 p ..` of gate and of up.
    GateUp,
}

/// A weight matrix `[out, in]` with its bias, packed.
#[derive(Debug)]
pub struct PackedLinear {
    format: WeightFormat,
    arrangement: Arrangement,
    out_features: usize,
    in_features: usize,
    panels: HugeBuffer,
    /// `[panels, 32]`, zeros where a part has none.
    bias: Option<Vec<f32>>,
}

/// The packed weights by type.
pub(super) enum PanelData<'a> {
    F32(&'a [f32]),
    F16(&'a [u16]),
    Bf16(&'a [u16]),
}

/// Where panel rows come from: `None` for padding.
type RowSource<'a> = dyn Fn(usize, usize) -> Option<(&'a MatrixSource<'a>, usize)> + Sync + 'a;

impl PackedLinear {
    /// Packs matrices that are multiplied with the same input, stacked along the output axis (q, k and v for example),
    /// on all threads. Elements are rounded to nearest even where `format` is narrower.
    pub fn pack(cpu: &Cpu, parts: &[MatrixSource<'_>], format: WeightFormat) -> Result<PackedLinear> {
        let in_features = parts.first().map_or(0, |part| part.in_features);
        let mut out_features = 0_usize;
        for part in parts {
            part.check("pack", in_features)?;
            out_features = out_features.saturating_add(part.out_features);
        }
        let row_source = |panel: usize, row: usize| {
            let mut row = panel * PANEL_ROWS + row;
            for part in parts {
                match row.checked_sub(part.out_features) {
                    None => return Some((part, row)),
                    Some(rest) => row = rest,
                }
            }
            None
        };
        let mut packed = PackedLinear::zeroed(format, Arrangement::Stacked, out_features, in_features)?;
        packed.fill(cpu, &row_source);
        Ok(packed)
    }

    /// Packs the gate and the up projection of a SwiGLU feed-forward, both `[intermediate, in]`.
    pub fn pack_gate_up(
        cpu: &Cpu,
        gate: MatrixSource<'_>,
        up: MatrixSource<'_>,
        format: WeightFormat,
    ) -> Result<PackedLinear> {
        gate.check("pack_gate_up", gate.in_features)?;
        up.check("pack_gate_up", gate.in_features)?;
        if gate.out_features != up.out_features {
            let (expected, actual) = (gate.out_features, up.out_features);
            return Err(Error::SizeMismatch { operation: "pack_gate_up", dimension: "up rows", expected, actual });
        }
        let row_source = |panel: usize, row: usize| {
            let row = panel / 2 * PANEL_ROWS + row;
            let part = if panel.is_multiple_of(2) { &gate } else { &up };
            (row < part.out_features).then_some((part, row))
        };
        let mut packed = PackedLinear::zeroed(format, Arrangement::GateUp, gate.out_features, gate.in_features)?;
        packed.fill(cpu, &row_source);
        Ok(packed)
    }

    fn zeroed(format: WeightFormat, arrangement: Arrangement, out: usize, in_features: usize) -> Result<PackedLinear> {
        let panels_per_group = if arrangement == Arrangement::GateUp { 2 } else { 1 };
        let bytes = out
            .checked_next_multiple_of(PANEL_ROWS)
            .and_then(|out| out.checked_mul(panels_per_group))
            .zip(in_features.checked_next_multiple_of(format.in_multiple()))
            .and_then(|(out, in_padded)| out.checked_mul(in_padded)?.checked_mul(format.size_bytes()));
        // A size beyond usize is refused by the allocation.
        let panels = HugeBuffer::zeroed("packed weights", bytes.unwrap_or(usize::MAX))?;
        Ok(PackedLinear { format, arrangement, out_features: out, in_features, panels, bias: None })
    }

    /// Copies the weights into the panels, on all threads.
    fn fill(&mut self, cpu: &Cpu, row_source: &RowSource<'_>) {
        self.fill_bias(row_source);
        let in_features = self.in_features;
        match self.format {
            WeightFormat::F32 => fill_panels(cpu, self.panels.as_mut_slice(), in_features, row_source, read_f32),
            WeightFormat::F16 => fill_panels(cpu, self.panels.as_mut_slice(), in_features, row_source, read_f16),
            WeightFormat::Bf16 => fill_panels(cpu, self.panels.as_mut_slice(), in_features, row_source, read_pairs),
        }
    }

    fn fill_bias(&mut self, row_source: &RowSource<'_>) {
        let rows = (0..self.num_panels()).flat_map(|panel| (0..PANEL_ROWS).map(move |row| (panel, row)));
        let bias = rows.map(|(panel, row)| {
            let (part, row) = row_source(panel, row)?;
            Some(part.bias?[row])
        });
        let bias: Vec<Option<f32>> = bias.collect();
        self.bias = bias.iter().any(Option::is_some).then(|| bias.into_iter().map(Option::unwrap_or_default).collect());
    }

    /// Output rows (of gate, or of up, when both are packed together).
    pub fn out_features(&self) -> usize {
        self.out_features
    }
    /// Columns: the width of the activations.
    pub fn in_features(&self) -> usize {
        self.in_features
    }
    /// How the weights are stored.
    pub fn format(&self) -> WeightFormat {
        self.format
    }
    /// Bytes of the packed weights: what one decode step reads.
    pub fn len_bytes(&self) -> usize {
        self.panels.len_bytes()
    }
    /// One row of a stacked matrix as f32 (an embedding, when the matrix is also the embedding table). Panics unless
    /// `row < out_features` and `out` has `in_features` elements.
    pub fn row_into(&self, row: usize, out: &mut [f32]) {
        assert_eq!(self.arrangement, Arrangement::Stacked, "rows are read from stacked matrices");
        assert!(row < self.out_features, "row {row} of {}", self.out_features);
        assert_eq!(out.len(), self.in_features, "elements of a row");
        let panel = self.panel_range(row / PANEL_ROWS);
        let row = row % PANEL_ROWS;
        let out = out.iter_mut().enumerate();
        match self.panels() {
            PanelData::F32(data) => {
                let data = &data[panel];
                out.for_each(|(k, out)| *out = data[k * PANEL_ROWS + row]);
            }
            PanelData::F16(data) => {
                let data = &data[panel];
                out.for_each(|(k, out)| *out = f16::from_bits(data[k * PANEL_ROWS + row]).to_f32());
            }
            PanelData::Bf16(data) => {
                let data = &data[panel];
                out.for_each(|(k, out)| *out = bf16::from_bits(data[bf16_index(row, k)]).to_f32());
            }
        }
    }

    pub(super) fn arrangement(&self) -> Arrangement {
        self.arrangement
    }
    /// Panels whose columns are finished together.
    pub(super) fn group_panels(&self) -> usize {
        match self.arrangement {
            Arrangement::Stacked => 1,
            Arrangement::GateUp => 2,
        }
    }
    pub(super) fn num_panels(&self) -> usize {
        self.out_features.div_ceil(PANEL_ROWS) * self.group_panels()
    }
    /// The elements of one panel in [`panels`](Self::panels).
    pub(super) fn panel_range(&self, panel: usize) -> Range<usize> {
        panel * self.panel_len()..(panel + 1) * self.panel_len()
    }
    pub(super) fn panel_bias(&self, panel: usize) -> Option<&[f32]> {
        self.bias.as_ref().map(|bias| &bias[panel * PANEL_ROWS..(panel + 1) * PANEL_ROWS])
    }
    pub(super) fn panels(&self) -> PanelData<'_> {
        match self.format {
            WeightFormat::F32 => PanelData::F32(self.panels.as_slice()),
            WeightFormat::F16 => PanelData::F16(self.panels.as_slice()),
            WeightFormat::Bf16 => PanelData::Bf16(self.panels.as_slice()),
        }
    }
    fn panel_len(&self) -> usize {
        self.in_features.next_multiple_of(self.format.in_multiple()) * PANEL_ROWS
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
    source.dtype.decode(source.row_bytes(row, columns), lanes);
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
    let bytes = source.row_bytes(row, columns);
    if source.dtype == target {
        let (numbers, _) = bytes.as_chunks::<2>();
        bits.iter_mut().zip(numbers).for_each(|(bits, &number)| *bits = u16::from_le_bytes(number));
    } else {
        let mut values = [0.0; PACK_COLUMNS];
        let values = &mut values[..bits.len()];
        source.dtype.decode(bytes, values);
        encode(values, bits);
    }
}
