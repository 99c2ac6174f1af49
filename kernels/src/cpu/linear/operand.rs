//! Activations in the form that matrix products read. Today f32, or bf16 where the instruction set multiplies bf16
//! directly; the place for int8 with scales when weights are quantized.

use half::bf16;

use super::super::dispatch::Cpu;
use super::super::pool::DisjointMut;
use super::packed::WeightFormat;
use crate::dtype::encode_bf16;

/// How activations are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum OperandFormat {
    /// As computed.
    F32,
    /// Rounded to nearest even, for products with bf16 weights.
    Bf16,
}

impl OperandFormat {
    /// Name in errors and reports.
    pub fn name(self) -> &'static str {
        match self {
            OperandFormat::F32 => "f32",
            OperandFormat::Bf16 => "bf16",
        }
    }
    /// The form in which `cpu` wants the activations that are multiplied with weights of this format.
    pub fn for_weights(cpu: &Cpu, weights: WeightFormat) -> OperandFormat {
        match weights {
            WeightFormat::Bf16 if cpu.kernels().linear.bf16_pairs.is_some() => OperandFormat::Bf16,
            WeightFormat::F32 | WeightFormat::F16 | WeightFormat::Bf16 => OperandFormat::F32,
        }
    }
}

/// Activations `[rows, width]`. Rows may be further apart than `width`: the layout belongs to the kernels.
#[derive(Debug, Clone)]
pub struct Operand {
    rows: usize,
    width: usize,
    stride: usize,
    data: OperandData,
}

#[derive(Debug, Clone)]
pub(super) enum OperandData {
    F32(Vec<f32>),
    Bf16(Vec<u16>),
}

impl Operand {
    /// Zeros `[rows, width]`.
    pub fn zeros(format: OperandFormat, rows: usize, width: usize) -> Operand {
        let data = match format {
            OperandFormat::F32 => OperandData::F32(Vec::new()),
            OperandFormat::Bf16 => OperandData::Bf16(Vec::new()),
        };
        let mut operand = Operand { rows: 0, width: 0, stride: 0, data };
        operand.resize(rows, width);
        operand
    }
    /// `values` `[rows, width]` in another form. Panics unless there are `rows * width` of them.
    pub fn from_f32(format: OperandFormat, rows: usize, width: usize, values: &[f32]) -> Operand {
        assert_eq!(values.len(), rows * width, "elements of [{rows}, {width}]");
        let mut operand = Operand::zeros(format, rows, width);
        let writer = operand.writer();
        for (row, values) in values.chunks_exact(width.max(1)).enumerate() {
            // SAFETY: one thread, one row after the other.
            unsafe { writer.store(row, 0, values) };
        }
        operand
    }
    /// Changes the shape and keeps the allocation. What the elements hold afterwards is not specified (but finite, if
    /// all that was ever stored is): the caller writes all of them.
    pub fn resize(&mut self, rows: usize, width: usize) {
        (self.rows, self.width) = (rows, width);
        match &mut self.data {
            OperandData::F32(data) => {
                self.stride = width;
                data.resize(rows * self.stride, 0.0);
            }
            OperandData::Bf16(data) => {
                // Products read pairs along a row. A row's last pair is completed by zero: it meets a zero weight.
                self.stride = width.next_multiple_of(2);
                data.clear();
                data.resize(rows * self.stride, 0);
            }
        }
    }
    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }
    /// Elements of a row.
    pub fn width(&self) -> usize {
        self.width
    }
    /// How the elements are stored.
    pub fn format(&self) -> OperandFormat {
        match self.data {
            OperandData::F32(_) => OperandFormat::F32,
            OperandData::Bf16(_) => OperandFormat::Bf16,
        }
    }
    /// Writes rows from several threads, each its own elements.
    pub fn writer(&mut self) -> OperandWriter<'_> {
        let (width, stride) = (self.width, self.stride);
        let data = match &mut self.data {
            OperandData::F32(data) => WriterData::F32(DisjointMut::new(data)),
            OperandData::Bf16(data) => WriterData::Bf16(DisjointMut::new(data)),
        };
        OperandWriter { width, stride, data }
    }
    /// One row as f32.
    pub fn row_into(&self, row: usize, out: &mut [f32]) {
        let range = row * self.stride..row * self.stride + self.width;
        match &self.data {
            OperandData::F32(data) => out.copy_from_slice(&data[range]),
            OperandData::Bf16(data) => {
                let row = &data[range];
                assert_eq!(out.len(), row.len(), "elements of a row");
                out.iter_mut().zip(row).for_each(|(out, &bits)| *out = bf16::from_bits(bits).to_f32());
            }
        }
    }
    pub(super) fn data(&self) -> &OperandData {
        &self.data
    }
    /// Elements from one row to the next.
    pub(super) fn stride(&self) -> usize {
        self.stride
    }
}

/// Shared access to an [`Operand`] for the threads of one job.
pub struct OperandWriter<'a> {
    width: usize,
    stride: usize,
    data: WriterData<'a>,
}

enum WriterData<'a> {
    F32(DisjointMut<'a, f32>),
    Bf16(DisjointMut<'a, u16>),
}

impl OperandWriter<'_> {
    /// Stores `values` at `row`, from element `column` on, in the operand's form. Formats with scales will want whole
    /// groups: `column` is a multiple of 32, and so is the number of values except at the end of a row.
    ///
    /// # Safety
    /// No other thread stores to the same elements at the same time.
    pub unsafe fn store(&self, row: usize, column: usize, values: &[f32]) {
        assert!(column + values.len() <= self.width, "{} values at {column} of {}", values.len(), self.width);
        let start = row * self.stride + column;
        let range = start..start + values.len();
        // SAFETY: inside the row (checked above; `range_mut` checks the end); the caller vouches for no overlap.
        unsafe {
            match &self.data {
                WriterData::F32(data) => data.range_mut(range).copy_from_slice(values),
                WriterData::Bf16(data) => encode_bf16(values, data.range_mut(range)),
            }
        }
    }
}
