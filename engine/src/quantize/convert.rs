//! The numbers of a tensor from one way to write them to another, rows on all threads, through f32.

use std::collections::TryReserveError;
use std::sync::atomic::{AtomicUsize, Ordering};

use ns_llm_kernels::cpu::pool::Pool;
use ns_llm_kernels::dtype::{encode_bf16, encode_f16};

use crate::tensor::{DType, Encoding, quant};

/// Numbers that a thread converts at once, at least one row.
const CONVERTED_AT_ONCE: usize = 1 << 14;

/// Rows of a tensor as it is stored.
pub(super) struct Rows<'a> {
    pub(super) bytes: &'a [u8],
    pub(super) encoding: Encoding,
    /// As written.
    pub(super) num_rows: usize,
    /// As written.
    pub(super) width: usize,
    pub(super) order: StoredOrder,
}

/// How numbers lie that are written row by row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StoredOrder {
    /// The same.
    Rows,
    /// Rows of so many heads, in halves that are written as neighbours (see [`interleaved`]).
    HalvesOfHeads(usize),
    /// Column by column, of numbers one by one.
    Columns,
}

/// Why numbers could not be converted.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum ConversionError {
    NoMemory(TryReserveError),
    /// A row has numbers that are not finite, for which blocks have no form.
    NotFinite {
        row: usize,
    },
}

/// The same numbers, written as `encoding`, into `out`, whose content is replaced.
///
/// Panics unless rows are whole blocks of both types and these are floats, and columns are stored one by one: the caller
/// has chosen types that are.
pub(super) fn convert(
    pool: &Pool,
    rows: &Rows<'_>,
    encoding: Encoding,
    out: &mut Vec<u8>,
) -> Result<(), ConversionError> {
    let [row_bytes, out_row_bytes] =
        [rows.encoding, encoding].map(|encoding| encoding.size_bytes(rows.width).expect("rows are whole blocks"));
    let num_bytes = out_row_bytes * rows.num_rows;
    out.clear();
    out.try_reserve_exact(num_bytes).map_err(ConversionError::NoMemory)?;
    out.resize(num_bytes, 0);
    let rows_at_once = (CONVERTED_AT_ONCE / rows.width).max(1);
    let mut pieces: Vec<_> = out.chunks_mut(out_row_bytes * rows_at_once).enumerate().collect();
    let first_bad_row = AtomicUsize::new(usize::MAX);
    pool.for_each_mut(&mut pieces, |(piece_idx, piece)| {
        let (mut values, mut column) = (vec![0.0; rows.width], Vec::new());
        for (i, out) in piece.chunks_mut(out_row_bytes).enumerate() {
            let row = *piece_idx * rows_at_once + i;
            let stored_row = match rows.order {
                StoredOrder::HalvesOfHeads(heads) => interleaved(row, rows.num_rows / heads),
                StoredOrder::Rows | StoredOrder::Columns => row,
            };
            let stored = match rows.order {
                StoredOrder::Columns => {
                    rows.gather_column(row, &mut column);
                    column.as_slice()
                }
                _ => &rows.bytes[stored_row * row_bytes..][..row_bytes],
            };
            // The same blocks again would be rounded a second time.
            if rows.encoding == encoding {
                out.copy_from_slice(stored);
                continue;
            }
            rows.encoding.decode(stored, &mut values);
            if encode(encoding, &values, out).is_err() {
                first_bad_row.fetch_min(stored_row, Ordering::Relaxed);
            }
        }
    });
    match first_bad_row.into_inner() {
        usize::MAX => Ok(()),
        row => Err(ConversionError::NotFinite { row }),
    }
}

impl Rows<'_> {
    /// The numbers of a stored column, which is written as row `idx`, into `out`.
    fn gather_column(&self, idx: usize, out: &mut Vec<u8>) {
        let number_bytes = self.encoding.size_bytes(1).expect("numbers one by one");
        out.clear();
        let stored_rows = self.bytes.chunks_exact(number_bytes * self.num_rows);
        out.extend(stored_rows.flat_map(|stored| &stored[idx * number_bytes..][..number_bytes]));
    }
}

/// Which row of a head's two halves goes to `row` when dimension `i` of the first half is to be followed by dimension `i`
/// of the second, for heads of `head_rows`.
fn interleaved(row: usize, head_rows: usize) -> usize {
    let (head, place) = (row / head_rows, row % head_rows);
    head * head_rows + place % 2 * (head_rows / 2) + place / 2
}

fn encode(encoding: Encoding, values: &[f32], out: &mut [u8]) -> ns_llm_kernels::error::Result<()> {
    let halves = |encode: fn(&[f32], &mut [u16]), out: &mut [u8]| {
        let mut halves = vec![0; values.len()];
        encode(values, &mut halves);
        out.as_chunks_mut().0.iter_mut().zip(halves).for_each(|(out, half)| *out = half.to_le_bytes());
    };
    match encoding {
        Encoding::Blocks(blocks) => return quant::encode(blocks, values, out),
        Encoding::Plain(DType::F32) => {
            out.as_chunks_mut().0.iter_mut().zip(values).for_each(|(out, value)| *out = value.to_le_bytes());
        }
        Encoding::Plain(DType::F16) => halves(encode_f16, out),
        Encoding::Plain(DType::Bf16) => halves(encode_bf16, out),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::QuantType;
    use ns_llm_kernels::cpu::pool::PoolPriority;

    const F32: Encoding = Encoding::Plain(DType::F32);
    const Q8_0: Encoding = Encoding::Blocks(QuantType::Q8_0);

    fn converted(rows: &Rows<'_>, encoding: Encoding) -> Result<Vec<u8>, ConversionError> {
        let mut out = vec![1; 3];
        convert(&Pool::new(2, PoolPriority::Normal).unwrap(), rows, encoding, &mut out).map(|()| out)
    }

    fn bytes(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|value| value.to_le_bytes()).collect()
    }

    /// Many rows on two threads are the rows one by one; blocks of the same type stay as they are.
    #[test]
    fn rows_are_converted_one_by_one() {
        let (num_rows, width) = (1000, 64);
        let values: Vec<f32> = (0..num_rows * width).map(|i| (i * 37 % 101) as f32 - 50.0).collect();
        let mut expected = vec![0; QuantType::Q8_0.size_bytes(values.len()).unwrap()];
        quant::encode(QuantType::Q8_0, &values, &mut expected).unwrap();
        let rows = Rows { bytes: &bytes(&values), encoding: F32, num_rows, width, order: StoredOrder::Rows };
        assert!(converted(&rows, Q8_0).unwrap() == expected);
        let again = Rows { bytes: &expected, encoding: Q8_0, ..rows };
        assert!(converted(&again, Q8_0).unwrap() == expected);
        // To f32, and from there to bf16 and back, as exactly as the types are.
        for (encoding, worst) in [(F32, 0.25), (Encoding::Plain(DType::F16), 0.28), (Encoding::Plain(DType::Bf16), 0.5)]
        {
            let back = converted(&again, encoding).unwrap();
            let mut numbers = vec![0.0; values.len()];
            encoding.decode(&back, &mut numbers);
            let error = numbers.iter().zip(&values).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(error <= worst, "{encoding:?}: {error}");
        }
    }

    /// Two heads of four rows: halves become neighbours.
    #[test]
    fn heads_are_interleaved() {
        let values: Vec<f32> = (0..8).map(|row| row as f32).collect();
        let order = StoredOrder::HalvesOfHeads(2);
        let rows = Rows { bytes: &bytes(&values), encoding: F32, num_rows: 8, width: 1, order };
        assert_eq!(converted(&rows, F32).unwrap(), bytes(&[0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]));
    }

    /// Three columns of two numbers become three rows, as they are and in another type.
    #[test]
    fn columns_become_rows() {
        let stored = bytes(&[1.0, 2.0, 3.0, -1.0, -2.0, -3.0]);
        let rows = Rows { bytes: &stored, encoding: F32, num_rows: 3, width: 2, order: StoredOrder::Columns };
        let turned = [1.0, -1.0, 2.0, -2.0, 3.0, -3.0];
        assert_eq!(converted(&rows, F32).unwrap(), bytes(&turned));
        let halves: Vec<u8> = turned.iter().flat_map(|&value| half::bf16::from_f32(value).to_le_bytes()).collect();
        assert_eq!(converted(&rows, Encoding::Plain(DType::Bf16)).unwrap(), halves);
    }

    /// The first row that has no form in blocks is named.
    #[test]
    fn numbers_that_are_none_are_refused() {
        let mut values = vec![1.0; 4 * 32];
        (values[70], values[100]) = (f32::NAN, f32::INFINITY);
        let rows = Rows { bytes: &bytes(&values), encoding: F32, num_rows: 4, width: 32, order: StoredOrder::Rows };
        assert_eq!(converted(&rows, Q8_0), Err(ConversionError::NotFinite { row: 2 }));
        assert!(converted(&rows, F32).is_ok());
    }
}
