//! Copies of whole rows: embeddings out of a packed matrix, and rows of an operand.

use crate::cpu::Cpu;
use crate::cpu::linear::{Operand, PackedLinear};
use crate::cpu::norm::MIN_PARALLEL_ELEMENTS;
use crate::cpu::pool::DisjointMut;
use crate::error::{Error, Result};

/// Row `token_ids[i]` of the embedding matrix into row `i` of `out` `[tokens, in_features]`.
pub fn embed(cpu: &Cpu, embedding: &PackedLinear, token_ids: &[u32], out: &mut [f32]) -> Result<()> {
    let (operation, width) = ("embed", embedding.in_features());
    if out.len() != token_ids.len() * width {
        let (expected, actual) = (token_ids.len() * width, out.len());
        return Err(Error::SizeMismatch { operation, dimension: "elements of out", expected, actual });
    }
    let limit = embedding.out_features();
    if let Some(&token_id) = token_ids.iter().find(|&&token_id| token_id as usize >= limit) {
        return Err(Error::IndexOutOfRange { operation, index: "token id", value: token_id as usize, limit });
    }
    let is_small = out.len() < MIN_PARALLEL_ELEMENTS;
    let out = DisjointMut::new(out);
    let copy_rows = |rows: std::ops::Range<usize>| {
        for row in rows {
            // SAFETY: each row is written by the one thread that has it among its items.
            embedding.row_into(token_ids[row] as usize, unsafe { out.range_mut(row * width..(row + 1) * width) });
        }
    };
    match is_small {
        true => copy_rows(0..token_ids.len()),
        false => cpu.pool().run(token_ids.len(), 8, copy_rows),
    }
    Ok(())
}

/// Rows `first_row..first_row + out.rows()` of `x` into `out`, which has the same width and format.
pub fn copy_rows(x: &Operand, first_row: usize, out: &mut Operand) -> Result<()> {
    let (operation, rows) = ("copy_rows", out.rows());
    if out.width() != x.width() {
        let (expected, actual) = (x.width(), out.width());
        return Err(Error::SizeMismatch { operation, dimension: "width of out", expected, actual });
    }
    if first_row + rows > x.rows() {
        let (value, limit) = (first_row + rows, x.rows() + 1);
        return Err(Error::IndexOutOfRange { operation, index: "end of the rows", value, limit });
    }
    let mut row = vec![0.0; x.width()];
    let out = out.writer();
    for i in 0..rows {
        x.row_into(first_row + i, &mut row);
        // SAFETY: one thread, one row after the other.
        unsafe { out.store(i, 0, &row) };
    }
    Ok(())
}
