//! Matrix products as the formula says.

use half::{bf16, f16};

use super::math::{gelu_erf, gelu_tanh, silu};
use crate::cpu::linear::{LinearKernels, PANEL_ROWS, PanelProduct};

pub(crate) const KERNELS: LinearKernels = LinearKernels {
    f32: panel_f32,
    f16: panel_f16,
    bf16: panel_bf16,
    bf16_pairs: None,
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
