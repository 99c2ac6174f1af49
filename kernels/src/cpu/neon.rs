//! 128-bit vectors of ARM (Advanced SIMD, part of every 64-bit ARM processor); in [`linear_quant`] also the dot products of
//! four bytes (`sdot`: Cortex-A76, Neoverse N1, Apple A13 and later) and the products of 2 x 8 matrices of bytes (`smmla`:
//! Neoverse V1 and N2, Apple M2 and later). Every function here is a `#[target_feature]` function: it is reached through
//! the tables of [`dispatch`](super::dispatch), which checked the CPU.
//!
//! All of it has run under an emulated CPU only: the results are right, the speed is unknown. So it is kept simple, and
//! no size of a tile has been measured.
//!
//! Sums have the order of the AVX2 kernels, element by element, and so the same bits.
//!
//! Instructions whose functions in `core::arch` are not stable are written in assembly, each in a function of its own.

pub(crate) mod attention;
pub(crate) mod linear;
pub(crate) mod linear_quant;
pub(crate) mod logits;
pub(crate) mod math;
pub(crate) mod norm;
pub(crate) mod rope;

use std::arch::aarch64::*;
use std::arch::asm;
use std::ops::Range;

/// Floats of a vector.
const LANES: usize = 4;

/// Splits `rows` into tiles of at most `tile_rows`, of nearly equal size.
fn tiles(rows: Range<usize>, tile_rows: usize) -> impl Iterator<Item = Range<usize>> {
    let mut next = rows.start;
    std::iter::from_fn(move || {
        let left = rows.end - next;
        let len = left.div_ceil(left.div_ceil(tile_rows).max(1));
        next += len;
        (len > 0).then(|| next - len..next)
    })
}

/// Eight f16 as f32, exactly.
#[inline]
#[target_feature(enable = "neon")]
fn f16_to_f32(halves: uint16x8_t) -> [float32x4_t; 2] {
    let (low, high);
    // SAFETY: reads and writes the named registers alone.
    unsafe {
        asm!(
            "fcvtl {low:v}.4s, {halves:v}.4h",
            "fcvtl2 {high:v}.4s, {halves:v}.8h",
            low = out(vreg) low,
            high = lateout(vreg) high,
            halves = in(vreg) halves,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    [low, high]
}

/// Four f32 rounded to f16, to nearest even.
#[inline]
#[target_feature(enable = "neon")]
fn f32_to_f16(values: float32x4_t) -> uint16x4_t {
    let halves;
    // SAFETY: reads and writes the named registers alone.
    unsafe {
        asm!(
            "fcvtn {halves:v}.4h, {values:v}.4s",
            halves = lateout(vreg) halves,
            values = in(vreg) values,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    halves
}

/// Eight bf16 as f32, exactly.
#[inline]
#[target_feature(enable = "neon")]
fn bf16_to_f32(numbers: uint16x8_t) -> [float32x4_t; 2] {
    // A bf16 is the upper half of an f32.
    [
        vreinterpretq_f32_u32(vshll_n_u16::<16>(vget_low_u16(numbers))),
        vreinterpretq_f32_u32(vshll_high_n_u16::<16>(numbers)),
    ]
}
