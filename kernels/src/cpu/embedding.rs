//! Whole rows out of a packed matrix (embeddings), copied or added; and rows of an operand.

use crate::cpu::Cpu;
use crate::cpu::linear::{Operand, PackedLinear};
use crate::cpu::norm::MIN_PARALLEL_ELEMENTS;
use crate::cpu::pool::DisjointMut;
use crate::error::{Error, Result};

/// Row `token_ids[i]` of the embedding matrix into row `i` of `out` `[tokens, in_features]`.
pub fn embed(cpu: &Cpu, embedding: &PackedLinear, token_ids: &[u32], out: &mut [f32]) -> Result<()> {
    check(("embed", "token id"), embedding, token_ids, out.len())?;
    run_rows(cpu, embedding, token_ids, out, |row, id| embedding.row_into(id, row));
    Ok(())
}

/// Adds row `indices[i]` of an embedding matrix (of positions, of token types) to row `i` of `rows` `[tokens,
/// in_features]`.
pub fn add_embedding(cpu: &Cpu, embedding: &PackedLinear, indices: &[u32], rows: &mut [f32]) -> Result<()> {
    check(("add_embedding", "row"), embedding, indices, rows.len())?;
    run_rows(cpu, embedding, indices, rows, |row, idx| {
        let mut added = vec![0.0; row.len()];
        embedding.row_into(idx, &mut added);
        row.iter_mut().zip(added).for_each(|(x, added)| *x += added);
    });
    Ok(())
}

/// `names`: of the operation and of its indices.
fn check(names: (&'static str, &'static str), embedding: &PackedLinear, indices: &[u32], len: usize) -> Result<()> {
    let (operation, index) = names;
    let (width, limit) = (embedding.in_features(), embedding.out_features());
    if len != indices.len() * width {
        let (expected, actual) = (indices.len() * width, len);
        return Err(Error::SizeMismatch { operation, dimension: "elements of out", expected, actual });
    }
    match indices.iter().find(|&&idx| idx as usize >= limit) {
        None => Ok(()),
        Some(&idx) => Err(Error::IndexOutOfRange { operation, index, value: idx as usize, limit }),
    }
}

/// Gives each row of `out` and its index to `write`.
fn run_rows(
    cpu: &Cpu,
    embedding: &PackedLinear,
    indices: &[u32],
    out: &mut [f32],
    write: impl Fn(&mut [f32], usize) + Sync,
) {
    let (width, is_small) = (embedding.in_features(), out.len() < MIN_PARALLEL_ELEMENTS);
    let out = DisjointMut::new(out);
    let write_rows = |rows: std::ops::Range<usize>| {
        for row in rows {
            // SAFETY: each row is written by the one thread that has it among its items.
            write(unsafe { out.range_mut(row * width..(row + 1) * width) }, indices[row] as usize);
        }
    };
    match is_small {
        true => write_rows(0..indices.len()),
        false => cpu.pool().run(indices.len(), 8, write_rows),
    }
}

/// Rows `first_row..first_row + out.rows()` of `x` into `out`, bit for bit. They have the same width and format.
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
    out.copy_rows_from(x, first_row);
    Ok(())
}
