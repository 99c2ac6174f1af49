//! Activations in the form that matrix products read: f32, bf16 where the instruction set multiplies bf16 directly, and
//! 8 bits with a scale for each 32 columns for quantized weights.

use half::bf16;

use super::super::dispatch::Cpu;
use super::super::pool::DisjointMut;
use super::int8::{self, Int8Rows, Int8Writer, RoundKernel};
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
    /// Eight bits and a scale for each 32 columns, for products with quantized weights.
    Int8,
    /// Both, for a model that has both kinds of weights.
    F32AndInt8,
}

impl OperandFormat {
    /// Name in errors and reports.
    pub fn name(self) -> &'static str {
        match self {
            OperandFormat::F32 => "f32",
            OperandFormat::Bf16 => "bf16",
            OperandFormat::Int8 => "int8",
            OperandFormat::F32AndInt8 => "f32 and int8",
        }
    }
    /// The form in which `cpu` wants the activations that are multiplied with weights of this format.
    pub fn for_weights(cpu: &Cpu, weights: WeightFormat) -> OperandFormat {
        match weights {
            WeightFormat::Bf16 if cpu.kernels().linear.bf16_pairs.is_some() => OperandFormat::Bf16,
            WeightFormat::F32 | WeightFormat::F16 | WeightFormat::Bf16 => OperandFormat::F32,
            WeightFormat::Quant(_) => OperandFormat::Int8,
        }
    }
    /// A form that serves the products of both. (Products that take bf16 take f32, too.)
    pub fn and(self, other: OperandFormat) -> OperandFormat {
        match (self, other) {
            (a, b) if a == b => a,
            (OperandFormat::F32 | OperandFormat::Bf16, OperandFormat::F32 | OperandFormat::Bf16) => OperandFormat::F32,
            _ => OperandFormat::F32AndInt8,
        }
    }
}

/// Activations `[rows, width]`. Rows may be further apart than `width`: the layout belongs to the kernels.
#[derive(Debug, Clone)]
pub struct Operand {
    format: OperandFormat,
    rows: usize,
    width: usize,
    /// Elements from one row of `plain` to the next.
    stride: usize,
    plain: PlainRows,
    int8: Option<Int8Rows>,
}

/// Numbers one by one.
#[derive(Debug, Clone)]
pub(super) enum PlainRows {
    None,
    F32(Vec<f32>),
    Bf16(Vec<u16>),
}

impl Operand {
    /// Zeros `[rows, width]`.
    pub fn zeros(format: OperandFormat, rows: usize, width: usize) -> Operand {
        let (plain, int8) = match format {
            OperandFormat::F32 => (PlainRows::F32(Vec::new()), None),
            OperandFormat::Bf16 => (PlainRows::Bf16(Vec::new()), None),
            OperandFormat::Int8 => (PlainRows::None, Some(Int8Rows::default())),
            OperandFormat::F32AndInt8 => (PlainRows::F32(Vec::new()), Some(Int8Rows::default())),
        };
        let mut operand = Operand { format, rows: 0, width: 0, stride: 0, plain, int8 };
        operand.resize(rows, width);
        operand
    }
    /// `values` `[rows, width]` in another form. Panics unless there are `rows * width` of them.
    pub fn from_f32(format: OperandFormat, rows: usize, width: usize, values: &[f32]) -> Operand {
        let mut operand = Operand::zeros(format, rows, width);
        operand.store_rows(values);
        operand
    }
    /// Replaces all rows. Panics unless there are `rows * width` values.
    pub fn store_rows(&mut self, values: &[f32]) {
        assert_eq!(values.len(), self.rows * self.width, "elements of [{}, {}]", self.rows, self.width);
        let width = self.width.max(1);
        // SAFETY: it needs no instruction set.
        let writer = unsafe { self.writer_with(int8::round_groups::<true>) };
        for (row, values) in values.chunks_exact(width).enumerate() {
            // SAFETY: one thread, one row after the other.
            unsafe { writer.store(row, 0, values) };
        }
    }
    /// Changes the shape and keeps the allocation. What the elements hold afterwards is not specified (but finite, if
    /// all that was ever stored is): the caller writes all of them.
    pub fn resize(&mut self, rows: usize, width: usize) {
        (self.rows, self.width) = (rows, width);
        match &mut self.plain {
            PlainRows::None => {}
            PlainRows::F32(data) => {
                self.stride = width;
                data.resize(rows * self.stride, 0.0);
            }
            PlainRows::Bf16(data) => {
                // Products read pairs along a row. A row's last pair is completed by zero: it meets a zero weight.
                self.stride = width.next_multiple_of(2);
                data.clear();
                data.resize(rows * self.stride, 0);
            }
        }
        if let Some(int8) = &mut self.int8 {
            int8.resize(rows, width);
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
        self.format
    }
    /// Writes rows from several threads, each its own elements.
    pub fn writer(&mut self, cpu: &Cpu) -> OperandWriter<'_> {
        // SAFETY: `Cpu` has the instruction set of its kernels.
        unsafe { self.writer_with(cpu.kernels().linear.round_int8) }
    }
    /// # Safety
    /// The CPU has the instruction set of `round`.
    unsafe fn writer_with(&mut self, round: RoundKernel) -> OperandWriter<'_> {
        let (width, stride) = (self.width, self.stride);
        let plain = match &mut self.plain {
            PlainRows::None => PlainWriter::None,
            PlainRows::F32(data) => PlainWriter::F32(DisjointMut::new(data)),
            PlainRows::Bf16(data) => PlainWriter::Bf16(DisjointMut::new(data)),
        };
        // SAFETY: promised by the caller.
        let int8 = self.int8.as_mut().map(|int8| unsafe { int8.writer(round) });
        OperandWriter { width, stride, plain, int8 }
    }
    /// One row as f32.
    pub fn row_into(&self, row: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.width, "elements of a row");
        let range = row * self.stride..row * self.stride + self.width;
        match (&self.plain, &self.int8) {
            (PlainRows::F32(data), _) => out.copy_from_slice(&data[range]),
            (PlainRows::Bf16(data), _) => {
                out.iter_mut().zip(&data[range]).for_each(|(out, &bits)| *out = bf16::from_bits(bits).to_f32());
            }
            (PlainRows::None, int8) => int8.as_ref().expect("one of both").row_into(row, out),
        }
    }
    /// Replaces all rows by the rows `first_row..` of an operand of the same format and width, bit for bit. Panics unless
    /// it is one and has them.
    pub(in crate::cpu) fn copy_rows_from(&mut self, x: &Operand, first_row: usize) {
        assert_eq!((self.format, self.width), (x.format, x.width), "format and width of both");
        let range = first_row * self.stride..(first_row + self.rows) * self.stride;
        match (&mut self.plain, &x.plain) {
            (PlainRows::F32(out), PlainRows::F32(x)) => out.copy_from_slice(&x[range]),
            (PlainRows::Bf16(out), PlainRows::Bf16(x)) => out.copy_from_slice(&x[range]),
            _ => {}
        }
        if let (Some(out), Some(x)) = (&mut self.int8, &x.int8) {
            out.copy_rows_from(x, first_row, self.rows);
        }
    }
    pub(super) fn plain(&self) -> &PlainRows {
        &self.plain
    }
    pub(super) fn int8(&self) -> Option<&Int8Rows> {
        self.int8.as_ref()
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
    plain: PlainWriter<'a>,
    int8: Option<Int8Writer<'a>>,
}

enum PlainWriter<'a> {
    None,
    F32(DisjointMut<'a, f32>),
    Bf16(DisjointMut<'a, u16>),
}

impl OperandWriter<'_> {
    /// Stores `values` at `row`, from element `column` on, in the operand's form. Forms with scales take whole groups:
    /// `column` is a multiple of 32, and so is the number of values except at the end of a row; panics otherwise.
    ///
    /// # Safety
    /// No other thread stores to the same elements at the same time.
    pub unsafe fn store(&self, row: usize, column: usize, values: &[f32]) {
        assert!(column + values.len() <= self.width, "{} values at {column} of {}", values.len(), self.width);
        let start = row * self.stride + column;
        let range = start..start + values.len();
        // SAFETY: inside the row (checked above; `range_mut` checks the end); the caller vouches for no overlap.
        unsafe {
            match &self.plain {
                PlainWriter::None => {}
                PlainWriter::F32(data) => data.range_mut(range).copy_from_slice(values),
                PlainWriter::Bf16(data) => encode_bf16(values, data.range_mut(range)),
            }
            if let Some(int8) = &self.int8 {
                int8.store(row, column, values, self.width);
            }
        }
    }
}
