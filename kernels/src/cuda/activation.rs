//! Launches `activation.cu`: SwiGLU and GELU of a product that has neither fused, and rounding to bf16.

use half::bf16;

use super::launch::{Argument, Launch, MAX_GRID_YZ, Place, Sizes, Slice, SliceMut, Stream};
use crate::cpu::linear::Gelu;
use crate::error::Result;

/// Numbers that a thread takes.
const VECTOR: usize = 8;
/// Any number of whole warps would do: threads know nothing of each other.
const THREADS: usize = 256;

/// `out = silu(gate) * up`: `gate_up` `[rows, 2 width]`, each row gate and then up; `out` `[rows, width]`.
pub fn swiglu(stream: &impl Stream, gate_up: Slice<'_, f32>, width: usize, out: &mut SliceMut<'_, bf16>) -> Result<()> {
    launch_swiglu(stream, "swiglu", gate_up, width, (out.argument(), out.place()))
}

/// The same in f32, to be rounded to 8 bits.
pub fn swiglu_rows(
    stream: &impl Stream,
    gate_up: Slice<'_, f32>,
    width: usize,
    out: &mut SliceMut<'_, f32>,
) -> Result<()> {
    launch_swiglu(stream, "swiglu_rows", gate_up, width, (out.argument(), out.place()))
}

/// `out`: argument and place.
fn launch_swiglu(
    stream: &impl Stream,
    kernel: &'static str,
    gate_up: Slice<'_, f32>,
    width: usize,
    (out, place): (Argument<'_>, Place),
) -> Result<()> {
    let sizes = Sizes { operation: kernel };
    sizes.require("width", width, width > 0 && width.is_multiple_of(VECTOR), "a positive multiple of 8")?;
    let rows = place.len() / width;
    sizes.equal("elements of out", rows * width, place.len())?;
    sizes.equal("elements of gate and up", 2 * rows * width, gate_up.len())?;
    sizes.aligned([("address of gate and up", gate_up.place()), ("address of out", place)])?;
    sizes.require("rows", rows, rows <= MAX_GRID_YZ, "at most 65,535")?;
    if rows == 0 {
        return Ok(());
    }
    stream.launch(&Launch {
        file: "activation",
        kernel,
        grid: [sizes.blocks("width", width.div_ceil(VECTOR * THREADS))?, rows as u32, 1],
        threads: THREADS as u32,
        shared_bytes: 0,
        arguments: &[gate_up.argument(), out, Argument::Int(sizes.int("width", width)?)],
    })
}

/// Rounds each number to bf16.
pub fn round_rows(stream: &impl Stream, x: Slice<'_, f32>, out: &mut SliceMut<'_, bf16>) -> Result<()> {
    launch_elements(stream, "round_rows", x, (out.argument(), out.place()), None)
}

/// `out = gelu(x)`, number by number.
pub fn gelu(stream: &impl Stream, form: Gelu, x: Slice<'_, f32>, out: &mut SliceMut<'_, bf16>) -> Result<()> {
    launch_elements(stream, "gelu", x, (out.argument(), out.place()), Some(form))
}

/// The same in f32, to be rounded to 8 bits.
pub fn gelu_rows(stream: &impl Stream, form: Gelu, x: Slice<'_, f32>, out: &mut SliceMut<'_, f32>) -> Result<()> {
    launch_elements(stream, "gelu_rows", x, (out.argument(), out.place()), Some(form))
}

/// A kernel that takes each number for itself. `out`: argument and place.
fn launch_elements(
    stream: &impl Stream,
    kernel: &'static str,
    x: Slice<'_, f32>,
    (out, place): (Argument<'_>, Place),
    form: Option<Gelu>,
) -> Result<()> {
    let (sizes, elements) = (Sizes { operation: kernel }, x.len());
    sizes.require("elements", elements, elements.is_multiple_of(VECTOR), "a multiple of 8")?;
    sizes.equal("elements of out", elements, place.len())?;
    sizes.aligned([("address of x", x.place()), ("address of out", place)])?;
    if elements == 0 {
        return Ok(());
    }
    let mut arguments = vec![x.argument(), out, Argument::Int(sizes.int("elements", elements)?)];
    arguments.extend(form.map(|form| Argument::Int((form == Gelu::Tanh).into())));
    stream.launch(&Launch {
        file: "activation",
        kernel,
        grid: [sizes.blocks("elements", elements.div_ceil(VECTOR * THREADS))?, 1, 1],
        threads: THREADS as u32,
        shared_bytes: 0,
        arguments: &arguments,
    })
}
