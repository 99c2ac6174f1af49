//! Weight matrices in the layout that the products read.
//!
//! Panels of 32 output rows, one behind the other, each one contiguous stream (several streams at once cost 12 to 30 % of
//! the memory bandwidth). `plain_panel.rs` and `quant_panel.rs` say what is in them. Rows are padded with zeros to 32. For
//! SwiGLU panels of gate and up alternate, so that one work item has both factors of its outputs.
//!
//! Matrices that are stacked may have different formats (of q, k and v, one is often stored in more bits): neighbours of
//! one format make a section with panels of its own.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use super::super::dispatch::Cpu;
use super::super::pool::DisjointMut;
use super::plain_panel::PlainFormat;
use super::quant_panel::{CodeProducts, QuantLayout};
use crate::dtype::{DType, Encoding};
use crate::error::{Error, Result};
use crate::host::HugeBuffer;
use crate::quant::{self, QuantType};

/// Output rows of one panel.
pub const PANEL_ROWS: usize = 32;

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
    /// Blocks of integers with scales, multiplied with activations of 8 bits. `in` is a multiple of the format's block.
    Quant(QuantType),
}

impl WeightFormat {
    /// Name in errors and reports.
    pub fn name(self) -> &'static str {
        match self {
            WeightFormat::F32 => "f32",
            WeightFormat::F16 => "f16",
            WeightFormat::Bf16 => "bf16",
            WeightFormat::Quant(quant_type) => quant_type.name(),
        }
    }
    /// Whether rows of `in_features` numbers can be stored so: whole blocks only.
    pub fn accepts(self, in_features: usize) -> bool {
        match self {
            WeightFormat::Quant(quant_type) => in_features.is_multiple_of(quant_type.block_values()),
            WeightFormat::F32 | WeightFormat::F16 | WeightFormat::Bf16 => true,
        }
    }
    /// Bytes of a packed matrix `[out, in]`: the rows padded to whole panels. `None` if no `usize` counts them or rows of
    /// that length cannot be stored so.
    pub fn packed_bytes(self, out_features: usize, in_features: usize) -> Option<usize> {
        let panel_bytes = self.accepts(in_features).then(|| self.panel_bytes(in_features))??;
        out_features.div_ceil(PANEL_ROWS).checked_mul(panel_bytes)
    }
    fn panel_bytes(self, in_features: usize) -> Option<usize> {
        // The order of the codes, which depends on the instruction set, does not change their number.
        match self.panel_format(CodeProducts::Narrow) {
            PanelFormat::Plain(format) => format.panel_bytes(in_features),
            // Never more than four bytes a weight.
            PanelFormat::Quant(layout) => {
                in_features.checked_mul(4 * PANEL_ROWS).map(|_| layout.panel_bytes(in_features))
            }
        }
    }
    fn panel_format(self, products: CodeProducts) -> PanelFormat {
        match self {
            WeightFormat::F32 => PanelFormat::Plain(PlainFormat::F32),
            WeightFormat::F16 => PanelFormat::Plain(PlainFormat::F16),
            WeightFormat::Bf16 => PanelFormat::Plain(PlainFormat::Bf16),
            WeightFormat::Quant(quant_type) => PanelFormat::Quant(QuantLayout::new(quant_type, products)),
        }
    }
}

/// What is in the panels of a section.
#[derive(Debug, Clone, Copy)]
pub(super) enum PanelFormat {
    Plain(PlainFormat),
    Quant(QuantLayout),
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

impl From<Encoding> for WeightFormat {
    fn from(encoding: Encoding) -> WeightFormat {
        match encoding {
            Encoding::Plain(dtype) => dtype.into(),
            Encoding::Blocks(quant_type) => WeightFormat::Quant(quant_type),
        }
    }
}

/// A matrix as a checkpoint holds it.
#[derive(Debug, Clone, Copy)]
pub struct MatrixSource<'a> {
    /// `[out, in]` row-major, little-endian, at any alignment; blocks lie along the rows.
    pub bytes: &'a [u8],
    /// How `bytes` are to be read.
    pub encoding: Encoding,
    /// Rows.
    pub out_features: usize,
    /// Columns.
    pub in_features: usize,
    /// `[out]`
    pub bias: Option<&'a [f32]>,
}

impl MatrixSource<'_> {
    fn check(&self, operation: &'static str, in_features: usize, format: WeightFormat) -> Result<()> {
        let expect = |dimension, expected: Option<usize>, actual: usize| match expected {
            Some(expected) if expected == actual => Ok(()),
            _ => Err(Error::SizeMismatch { operation, dimension, expected: expected.unwrap_or(usize::MAX), actual }),
        };
        expect("in_features", Some(in_features), self.in_features)?;
        if !format.accepts(in_features) || !WeightFormat::from(self.encoding).accepts(in_features) {
            let (dimension, value, expected) = ("in_features", in_features, "a multiple of the format's block");
            return Err(Error::InvalidSize { operation, dimension, value, expected });
        }
        let elements = self.out_features.checked_mul(self.in_features);
        let bytes = elements.and_then(|elements| self.encoding.size_bytes(elements).ok());
        expect("bytes", bytes, self.bytes.len())?;
        expect("bias", Some(self.out_features), self.bias.map_or(self.out_features, <[f32]>::len))
    }
    /// A whole row, as stored.
    fn row_bytes(&self, row: usize) -> &[u8] {
        let row_bytes = self.bytes.len() / self.out_features;
        &self.bytes[row * row_bytes..(row + 1) * row_bytes]
    }
    /// The elements `columns` of a row, as stored: whole blocks.
    pub(super) fn column_bytes(&self, row: usize, columns: Range<usize>) -> &[u8] {
        let bytes_before = |column: usize| match self.encoding {
            Encoding::Plain(dtype) => column * dtype.size_bytes(),
            Encoding::Blocks(quant_type) => column / quant_type.block_values() * quant_type.block_bytes(),
        };
        &self.row_bytes(row)[bytes_before(columns.start)..bytes_before(columns.end)]
    }
}

/// Which matrices the panels belong to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Arrangement {
    /// The panels of each section have its output rows, 32 each.
    Stacked,
    /// Panels `2 p` and `2 p + 1` have the rows `32 p ..` of gate and of up; one section.
    GateUp,
}

/// A weight matrix `[out, in]` with its bias, packed.
#[derive(Debug)]
pub struct PackedLinear {
    arrangement: Arrangement,
    out_features: usize,
    in_features: usize,
    sections: Vec<Section>,
    /// `[panels, 32]`, zeros where a part has none.
    bias: Option<Vec<f32>>,
}

/// Panels of one format.
#[derive(Debug)]
pub(super) struct Section {
    format: WeightFormat,
    pub(super) panel_format: PanelFormat,
    /// Panels of the matrix that lie here.
    panels: Range<usize>,
    /// Output rows (of gate, or of up).
    rows: Range<usize>,
    panel_bytes: usize,
    bytes: HugeBuffer,
}

/// Where panel rows come from: `None` for padding.
pub(super) type RowSource<'a> = dyn Fn(usize, usize) -> Option<(&'a MatrixSource<'a>, usize)> + Sync + 'a;

impl PackedLinear {
    /// Packs matrices that are multiplied with the same input, stacked along the output axis (q, k and v for example), each
    /// in its format, on all threads. Elements are rounded to nearest even where a format is narrower, and encoded as
    /// [`quant::encode`] does where it has blocks and the source has not the same ones. Codes of blocks lie as the
    /// instruction set of `cpu` takes them.
    pub fn pack(cpu: &Cpu, parts: &[(MatrixSource<'_>, WeightFormat)]) -> Result<PackedLinear> {
        let in_features = parts.first().map_or(0, |(part, _)| part.in_features);
        for (part, format) in parts {
            part.check("pack", in_features, *format)?;
        }
        let (mut sections, mut bias) = (Vec::new(), Vec::new());
        let (mut first_panel, mut first_row) = (0, 0);
        for parts in parts.chunk_by(|(_, a), (_, b)| a == b) {
            let row_source = |panel: usize, row: usize| {
                let mut row = panel * PANEL_ROWS + row;
                for (part, _) in parts {
                    match row.checked_sub(part.out_features) {
                        None => return Some((part, row)),
                        Some(rest) => row = rest,
                    }
                }
                None
            };
            let num_rows = parts.iter().fold(0_usize, |rows, (part, _)| rows.saturating_add(part.out_features));
            let num_panels = num_rows.div_ceil(PANEL_ROWS);
            let mut section = Section::zeroed(cpu, parts[0].1, num_panels, in_features)?;
            section.fill(cpu, in_features, &row_source)?;
            push_bias(&mut bias, num_panels, &row_source);
            (section.panels, section.rows) = (first_panel..first_panel + num_panels, first_row..first_row + num_rows);
            (first_panel, first_row) = (section.panels.end, section.rows.end);
            sections.push(section);
        }
        let bias = all_or_none(bias);
        Ok(PackedLinear { arrangement: Arrangement::Stacked, out_features: first_row, in_features, sections, bias })
    }

    /// Packs the gate and the up projection of a SwiGLU feed-forward, both `[intermediate, in]`.
    pub fn pack_gate_up(
        cpu: &Cpu,
        gate: MatrixSource<'_>,
        up: MatrixSource<'_>,
        format: WeightFormat,
    ) -> Result<PackedLinear> {
        let (in_features, out_features) = (gate.in_features, gate.out_features);
        gate.check("pack_gate_up", in_features, format)?;
        up.check("pack_gate_up", in_features, format)?;
        if out_features != up.out_features {
            let (expected, actual) = (out_features, up.out_features);
            return Err(Error::SizeMismatch { operation: "pack_gate_up", dimension: "up rows", expected, actual });
        }
        let row_source = |panel: usize, row: usize| {
            let row = panel / 2 * PANEL_ROWS + row;
            let part = if panel.is_multiple_of(2) { &gate } else { &up };
            (row < part.out_features).then_some((part, row))
        };
        let num_panels = 2 * out_features.div_ceil(PANEL_ROWS);
        let mut section = Section::zeroed(cpu, format, num_panels, in_features)?;
        section.fill(cpu, in_features, &row_source)?;
        (section.panels, section.rows) = (0..num_panels, 0..out_features);
        let mut bias = Vec::new();
        push_bias(&mut bias, num_panels, &row_source);
        let (sections, bias) = (vec![section], all_or_none(bias));
        Ok(PackedLinear { arrangement: Arrangement::GateUp, out_features, in_features, sections, bias })
    }

    /// Output rows (of gate, or of up, when both are packed together).
    pub fn out_features(&self) -> usize {
        self.out_features
    }
    /// Columns: the width of the activations.
    pub fn in_features(&self) -> usize {
        self.in_features
    }
    /// How the weights are stored, by section.
    pub fn formats(&self) -> impl Iterator<Item = WeightFormat> {
        self.sections.iter().map(|section| section.format)
    }
    /// Bytes of the packed weights: what one decode step reads.
    pub fn len_bytes(&self) -> usize {
        self.sections.iter().map(|section| section.bytes.len_bytes()).sum()
    }
    /// One row of a stacked matrix as f32 (an embedding, when the matrix is also the embedding table). Panics unless
    /// `row < out_features` and `out` has `in_features` elements.
    pub fn row_into(&self, row: usize, out: &mut [f32]) {
        assert_eq!(self.arrangement, Arrangement::Stacked, "rows are read from stacked matrices");
        assert!(row < self.out_features, "row {row} of {}", self.out_features);
        assert_eq!(out.len(), self.in_features, "elements of a row");
        let section = self.sections.iter().find(|section| section.rows.contains(&row)).expect("checked above");
        let row = row - section.rows.start;
        let panel = section.panel(section.panels.start + row / PANEL_ROWS);
        match section.panel_format {
            PanelFormat::Plain(format) => format.row_into(panel, row % PANEL_ROWS, out),
            PanelFormat::Quant(layout) => layout.row_into(panel, row % PANEL_ROWS, out),
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
        self.sections.last().map_or(0, |section| section.panels.end)
    }
    pub(super) fn sections(&self) -> &[Section] {
        &self.sections
    }
    pub(super) fn section(&self, panel: usize) -> &Section {
        self.sections.iter().find(|section| section.panels.contains(&panel)).expect("a panel of this matrix")
    }
    pub(super) fn panel_bias(&self, panel: usize) -> Option<&[f32]> {
        self.bias.as_ref().map(|bias| &bias[panel * PANEL_ROWS..(panel + 1) * PANEL_ROWS])
    }
    /// Output columns of a group of panels, fewer than 32 at the end of a section.
    pub(super) fn group_columns(&self, group: usize) -> Range<usize> {
        let section = self.section(group * self.group_panels());
        let first = section.rows.start + (group - section.panels.start / self.group_panels()) * PANEL_ROWS;
        first..(first + PANEL_ROWS).min(section.rows.end)
    }
}

impl Section {
    fn zeroed(cpu: &Cpu, format: WeightFormat, num_panels: usize, in_features: usize) -> Result<Section> {
        let panel_bytes = format.panel_bytes(in_features);
        let bytes = panel_bytes.and_then(|panel| panel.checked_mul(num_panels));
        // A size beyond usize is refused by the allocation.
        let bytes = HugeBuffer::zeroed("packed weights", bytes.unwrap_or(usize::MAX))?;
        let panel_format = format.panel_format(cpu.kernels().linear.code_products);
        let panel_bytes = panel_bytes.unwrap_or(0);
        Ok(Section { format, panel_format, panels: 0..0, rows: 0..0, panel_bytes, bytes })
    }

    /// Copies the weights into the panels, on all threads. Fails at a number that blocks have no place for.
    fn fill(&mut self, cpu: &Cpu, in_features: usize, row_source: &RowSource<'_>) -> Result<()> {
        let layout = match self.panel_format {
            PanelFormat::Plain(format) => {
                format.fill(cpu, &mut self.bytes, in_features, row_source);
                return Ok(());
            }
            PanelFormat::Quant(layout) => layout,
        };
        let panel_bytes = self.panel_bytes;
        let num_panels = self.bytes.len_bytes().checked_div(panel_bytes).unwrap_or(0);
        let out = DisjointMut::new(self.bytes.as_mut_slice::<u8>());
        let failure = Mutex::new(None);
        cpu.pool().run(num_panels, 1, |panels| {
            let mut encoded: [EncodedRow; PANEL_ROWS] = Default::default();
            for panel in panels {
                // SAFETY: each panel is one item.
                let out = unsafe { out.range_mut(panel * panel_bytes..(panel + 1) * panel_bytes) };
                let rows = (0..PANEL_ROWS).map_while(|row| row_source(panel, row)).zip(&mut encoded);
                let rows = rows.map(|((source, row), encoded)| encoded.blocks(source, row, layout.quant_type));
                match rows.collect::<Result<Vec<&[u8]>>>() {
                    Ok(rows) => layout.store_rows(out, &rows),
                    Err(error) => *failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error),
                }
            }
        });
        let failure = failure.into_inner().unwrap_or_else(PoisonError::into_inner);
        failure.map_or(Ok(()), Err)
    }

    /// The bytes of one panel of the matrix.
    pub(super) fn panel(&self, panel: usize) -> &[u8] {
        let idx = panel - self.panels.start;
        &self.bytes.as_slice::<u8>()[idx * self.panel_bytes..(idx + 1) * self.panel_bytes]
    }
}

/// One row on its way to blocks.
#[derive(Default)]
struct EncodedRow {
    values: Vec<f32>,
    blocks: Vec<u8>,
}

impl EncodedRow {
    /// The blocks of a row: as they are stored, or encoded.
    fn blocks<'a>(&'a mut self, source: &'a MatrixSource<'_>, row: usize, quant_type: QuantType) -> Result<&'a [u8]> {
        let stored = source.row_bytes(row);
        if source.encoding == Encoding::Blocks(quant_type) {
            return Ok(stored);
        }
        self.values.resize(source.in_features, 0.0);
        source.encoding.decode(stored, &mut self.values);
        self.blocks.resize(quant_type.size_bytes(source.in_features)?, 0);
        quant::encode(quant_type, &self.values, &mut self.blocks)?;
        Ok(&self.blocks)
    }
}

/// Appends the bias of a section's rows.
fn push_bias(bias: &mut Vec<Option<f32>>, num_panels: usize, row_source: &RowSource<'_>) {
    let rows = (0..num_panels).flat_map(|panel| (0..PANEL_ROWS).map(move |row| (panel, row)));
    bias.extend(rows.map(|(panel, row)| {
        let (part, row) = row_source(panel, row)?;
        Some(part.bias?[row])
    }));
}

fn all_or_none(bias: Vec<Option<f32>>) -> Option<Vec<f32>> {
    bias.iter().any(Option::is_some).then(|| bias.into_iter().map(Option::unwrap_or_default).collect())
}
