//! Launches `embedding.cu`: rows by their index, out of an embedding matrix or out of activations.

use half::bf16;

use super::launch::{Argument, Launch, Sizes, Slice, SliceMut, Stream};
use crate::error::Result;

/// Numbers that a thread takes at once.
const VECTOR: usize = 8;
/// More threads of a block would have nothing to do in most models.
const MAX_THREADS: usize = 512;
/// Threads of a block of [`feed_back`], a token each: a step that decodes rarely has more.
const FEED_BACK_THREADS: usize = 256;

/// Rows `[rows, width]`, to be taken by their index.
#[derive(Debug, Clone, Copy)]
pub struct Table<'a, T> {
    /// `[rows, width]`
    pub rows: Slice<'a, T>,
    /// Numbers of a row.
    pub width: usize,
}

/// Row `indices[i]` of the table into row `i` of `out` `[indices, width]`. Where there is no such row, `out` gets NaN.
pub fn embed(
    stream: &impl Stream,
    table: &Table<'_, bf16>,
    indices: Slice<'_, u32>,
    out: &mut SliceMut<'_, f32>,
) -> Result<()> {
    launch(stream, ("embed", "embed"), table, indices, out)
}

/// Adds row `indices[i]` of the table to row `i` of `out` `[indices, width]`.
pub fn add_embedding(
    stream: &impl Stream,
    table: &Table<'_, bf16>,
    indices: Slice<'_, u32>,
    out: &mut SliceMut<'_, f32>,
) -> Result<()> {
    launch(stream, ("add_embedding", "add_embedding"), table, indices, out)
}

/// Row `indices[i]` of activations into row `i` of `out` `[indices, width]`: those that reach the output matrix.
pub fn select_rows(
    stream: &impl Stream,
    table: &Table<'_, f32>,
    indices: Slice<'_, u32>,
    out: &mut SliceMut<'_, f32>,
) -> Result<()> {
    launch(stream, ("select_rows", "select_rows"), table, indices, out)
}

/// The ids of a step's tokens, some of which the step before has chosen: `out[i]` is `chosen[sources[i]]` where there is
/// such a row, and
/// `given[i]` elsewhere; all `[tokens]` but `chosen`.
pub fn feed_back(
    stream: &impl Stream,
    given: Slice<'_, u32>,
    sources: Slice<'_, u32>,
    chosen: Slice<'_, u32>,
    out: &mut SliceMut<'_, u32>,
) -> Result<()> {
    let (sizes, num_tokens) = (Sizes { operation: "feed_back" }, given.len());
    sizes.equal("sources", num_tokens, sources.len())?;
    sizes.equal("elements of out", num_tokens, out.len())?;
    if num_tokens == 0 {
        return Ok(());
    }
    let (num_chosen, tokens) = (sizes.int("chosen", chosen.len())?, sizes.int("tokens", num_tokens)?);
    stream.launch(&Launch {
        file: "embedding",
        kernel: "feed_back",
        grid: [sizes.blocks("tokens", num_tokens.div_ceil(FEED_BACK_THREADS))?, 1, 1],
        threads: FEED_BACK_THREADS as u32,
        shared_bytes: 0,
        arguments: &[
            given.argument(),
            sources.argument(),
            chosen.argument(),
            out.argument(),
            Argument::Int(num_chosen),
            Argument::Int(tokens),
        ],
    })
}

/// Adds rows to rows, number by number: what [`add_embedding`] is where the table's rows had to be made first.
pub fn add_rows(stream: &impl Stream, rows: Slice<'_, f32>, out: &mut SliceMut<'_, f32>) -> Result<()> {
    let (sizes, elements) = (Sizes { operation: "add_rows" }, rows.len());
    sizes.require("elements", elements, elements.is_multiple_of(VECTOR), "a multiple of 8")?;
    sizes.equal("elements of out", elements, out.len())?;
    sizes.aligned([("address of rows", rows.place()), ("address of out", out.place())])?;
    if elements == 0 {
        return Ok(());
    }
    stream.launch(&Launch {
        file: "embedding",
        kernel: "add_rows",
        grid: [sizes.blocks("elements", elements.div_ceil(VECTOR * MAX_THREADS))?, 1, 1],
        threads: MAX_THREADS as u32,
        shared_bytes: 0,
        arguments: &[rows.argument(), out.argument(), Argument::Int(sizes.int("elements", elements)?)],
    })
}

/// `names`: of the operation and of its kernel.
fn launch<T>(
    stream: &impl Stream,
    (operation, kernel): (&'static str, &'static str),
    table: &Table<'_, T>,
    indices: Slice<'_, u32>,
    out: &mut SliceMut<'_, f32>,
) -> Result<()> {
    let (sizes, width) = (Sizes { operation }, table.width);
    sizes.require("width", width, width > 0 && width.is_multiple_of(VECTOR), "a positive multiple of 8")?;
    let table_rows = table.rows.len() / width;
    sizes.require("rows of the table", table_rows, table_rows > 0, "at least 1")?;
    sizes.equal("elements of the table", table_rows * width, table.rows.len())?;
    sizes.equal("elements of out", indices.len() * width, out.len())?;
    sizes.aligned([("address of the table", table.rows.place()), ("address of out", out.place())])?;
    if indices.len() == 0 {
        return Ok(());
    }
    let (table_rows, row_width) = (sizes.int("rows of the table", table_rows)?, sizes.int("width", width)?);
    stream.launch(&Launch {
        file: "embedding",
        kernel,
        grid: [sizes.blocks("indices", indices.len())?, 1, 1],
        threads: (width / VECTOR).next_multiple_of(32).min(MAX_THREADS) as u32,
        shared_bytes: 0,
        arguments: &[
            table.rows.argument(),
            indices.argument(),
            out.argument(),
            Argument::Int(table_rows),
            Argument::Int(row_width),
        ],
    })
}
