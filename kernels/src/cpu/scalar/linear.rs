//! Matrix products as the formula says.

use half::{bf16, f16};

use super::math::{gelu_erf, gelu_tanh, silu};
use crate::cpu::linear::{
    CHUNK_GROUPS, CodeMeaning, CodeProducts, Int8Group, LinearKernels, PANEL_ROWS, PanelProduct, QuantProduct,
    UnpackedChunk, round_groups,
};

pub(crate) const KERNELS: LinearKernels = LinearKernels {
    f32: panel_f32,
    f16: panel_f16,
    bf16: panel_bf16,
    bf16_pairs: None,
    quant: panel_quant,
    code_products: CodeProducts::Narrow,
    round_int8: round_groups::<true>,
    swiglu,
    gelu_erf: |x| x.iter_mut().for_each(|x| *x = gelu_erf(*x)),
    gelu_tanh: |x| x.iter_mut().for_each(|x| *x = gelu_tanh(*x)),
};

fn panel_f32(product: &PanelProduct<'_, f32, f32>, sums: &mut [f32]) {
    panel(product, sums, |panel, k, j| panel[k * PANEL_ROWS + j]);
}

fn panel_f16(product: &PanelProduct<'_, f32, u16>, sums: &mut [f32]) {
    panel(product, sums, |panel, k, j| f16::from_bits(panel[k * PANEL_ROWS + j]).to_f32());
}

fn panel_bf16(product: &PanelProduct<'_, f32, u16>, sums: &mut [f32]) {
    panel(product, sums, |panel, k, j| bf16::from_bits(panel[(k / 2 * PANEL_ROWS + j) * 2 + k % 2]).to_f32());
}

/// `sums[row, j] (+)= sum over k of x[row, k] * weight(k, j)`
fn panel<W>(product: &PanelProduct<'_, f32, W>, sums: &mut [f32], weight: impl Fn(&[W], usize, usize) -> f32) {
    for (row, sums) in sums.chunks_exact_mut(PANEL_ROWS).enumerate() {
        let x = &product.x[row * product.x_stride..][..product.columns];
        if !product.continues {
            sums.fill(0.0);
        }
        for (k, x) in x.iter().enumerate() {
            for (j, sum) in sums.iter_mut().enumerate() {
                *sum += x * weight(product.panel, k, j);
            }
        }
    }
}

fn swiglu(gate: &mut [f32], up: &[f32]) {
    for (gate, up) in gate.iter_mut().zip(up) {
        *gate = silu(*gate) * up;
    }
}

fn panel_quant(product: &QuantProduct<'_>, sums: &mut [f32]) {
    let &QuantProduct { x, groups_per_row, panel, layout, .. } = product;
    let mut chunk = UnpackedChunk::zeroed();
    layout.begin(&mut chunk);
    sums.fill(0.0);
    for (bytes, first_group) in panel.chunks(layout.chunk_bytes()).zip((0..groups_per_row).step_by(CHUNK_GROUPS)) {
        let num_groups = CHUNK_GROUPS.min(groups_per_row - first_group);
        layout.unpack(bytes, num_groups, &mut chunk);
        for (row, sums) in sums.chunks_exact_mut(PANEL_ROWS).enumerate() {
            let x = &x[row * groups_per_row + first_group..][..num_groups];
            for (g, x) in x.iter().enumerate() {
                let dots = integer_dots(layout.meaning, &chunk, g, x);
                for (j, (sum, dot)) in sums.iter_mut().zip(dots).enumerate() {
                    let mins = chunk.mins[g][j];
                    let min = i32::from(mins as i16) * i32::from(x.sums[0]) + (mins >> 16) * i32::from(x.sums[1]);
                    let part = match layout.meaning {
                        CodeMeaning::Signed => chunk.d[g][j] * dot as f32,
                        CodeMeaning::Offset(_) => chunk.d[g][j] * (dot - min) as f32,
                        CodeMeaning::Minimum => chunk.d[g][j].mul_add(dot as f32, -(chunk.d_min[g][j] * min as f32)),
                    };
                    *sum = part.mul_add(x.scale, *sum);
                }
            }
        }
    }
}

/// `scales . (codes . x)` over the halves of a group, for all rows of the panel.
fn integer_dots(meaning: CodeMeaning, chunk: &UnpackedChunk, g: usize, x: &Int8Group) -> [i32; PANEL_ROWS] {
    let mut dots = [0; PANEL_ROWS];
    if meaning == CodeMeaning::Signed {
        for (codes, x) in chunk.signed_codes(g).chunks_exact(2 * PANEL_ROWS).zip(x.codes.as_chunks::<2>().0) {
            for (dot, codes) in dots.iter_mut().zip(codes.as_chunks::<2>().0) {
                *dot += i32::from(codes[0]) * i32::from(x[0]) + i32::from(codes[1]) * i32::from(x[1]);
            }
        }
        return dots;
    }
    let (first, second) = (&chunk.scales[g][0], &chunk.scales[g][chunk.last_half]);
    let steps = chunk.codes(g).chunks_exact(4 * PANEL_ROWS).zip(x.codes.as_chunks::<4>().0);
    for (step, (codes, x)) in steps.enumerate() {
        let scales = if step < 4 { first } else { second };
        for ((dot, codes), &scale) in dots.iter_mut().zip(codes.as_chunks::<4>().0).zip(scales) {
            let products = codes.iter().zip(x).map(|(&code, &x)| i32::from(code) * i32::from(x));
            *dot += i32::from(scale as i16) * products.sum::<i32>();
        }
    }
    dots
}
