//! RMSNorm of one row with AVX2 and FMA. The sum of squares has 32 chains, folded in a fixed order, then the rest of
//! the row one by one: the order depends on the width alone.

use crate::cpu::norm::NormKernels;

/// The AVX2 kernels.
pub(crate) const KERNELS: NormKernels = NormKernels { inverse_rms, scale, scale_in_place };

/// Independent chains of the sum: four vectors, which hides the latency of the multiply-add.
const CHAINS: usize = 32;

#[target_feature(enable = "avx2,fma,f16c")]
fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    let mut chains = [0.0_f32; CHAINS];
    let mut lines = x.chunks_exact(CHAINS);
    for line in &mut lines {
        for (sum, &value) in chains.iter_mut().zip(line) {
            *sum = value.mul_add(value, *sum);
        }
    }
    let mut width = CHAINS;
    while width > 1 {
        width /= 2;
        for i in 0..width {
            chains[i] += chains[i + width];
        }
    }
    let sum = lines.remainder().iter().fold(chains[0], |sum, &value| value.mul_add(value, sum));
    1.0 / (sum / x.len() as f32 + eps).sqrt()
}

#[target_feature(enable = "avx2,fma,f16c")]
fn scale(x: &[f32], factor: f32, weight: &[f32], out: &mut [f32]) {
    for ((out, &x), &weight) in out.iter_mut().zip(x).zip(weight) {
        *out = x * factor * weight;
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn scale_in_place(x: &mut [f32], factor: f32, weight: &[f32]) {
    for (x, &weight) in x.iter_mut().zip(weight) {
        *x = *x * factor * weight;
    }
}
