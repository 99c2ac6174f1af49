//! RMSNorm and LayerNorm of one row with AVX2 and FMA. Sums have 32 chains, folded in a fixed order, then the rest of
//! the row one by one: the order depends on the width alone.

use core::arch::x86_64::*;

use crate::cpu::norm::{CenteredRow, NormKernels};

/// The AVX2 kernels.
pub(crate) const KERNELS: NormKernels =
    NormKernels { inverse_rms, scale, scale_in_place, sum, sum_of_squares_around, center_and_scale };

/// Independent chains of the sum: four vectors, which hides the latency of the multiply-add.
const CHAINS: usize = 32;
/// Floats of a vector.
const LANES: usize = 8;

#[target_feature(enable = "avx2,fma,f16c")]
fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    let add = |sum, value| _mm256_fmadd_ps(value, value, sum);
    let sum = chained_sum(x, add, |sum, value| value.mul_add(value, sum));
    1.0 / (sum / x.len() as f32 + eps).sqrt()
}

#[target_feature(enable = "avx2,fma,f16c")]
fn sum(x: &[f32]) -> f32 {
    chained_sum(x, |sum, value| _mm256_add_ps(sum, value), |sum, value| sum + value)
}

#[target_feature(enable = "avx2,fma,f16c")]
fn sum_of_squares_around(x: &[f32], center: f32) -> f32 {
    let centers = _mm256_set1_ps(center);
    let add = |sum, value| {
        let difference = _mm256_sub_ps(value, centers);
        _mm256_fmadd_ps(difference, difference, sum)
    };
    chained_sum(x, add, |sum, value| (value - center).mul_add(value - center, sum))
}

/// `add` over the row, a chain in each lane of four vectors; the chains are folded by halves, then the rest of the row is
/// added one by one. (Left to itself the compiler makes vectors of two.)
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn chained_sum(x: &[f32], add: impl Fn(__m256, __m256) -> __m256, add_one: impl Fn(f32, f32) -> f32) -> f32 {
    let (lines, rest) = x.as_chunks::<CHAINS>();
    let mut chains = [_mm256_setzero_ps(); CHAINS / LANES];
    for line in lines {
        for (chain, value) in chains.iter_mut().zip(line.as_chunks::<LANES>().0) {
            // SAFETY: it is eight numbers long.
            *chain = add(*chain, unsafe { _mm256_loadu_ps(value.as_ptr()) });
        }
    }
    let [a, b, c, d] = chains;
    let eight = _mm256_add_ps(_mm256_add_ps(a, c), _mm256_add_ps(b, d));
    let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    let one = _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    rest.iter().fold(one, |sum, &value| add_one(sum, value))
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

#[target_feature(enable = "avx2,fma,f16c")]
fn center_and_scale(row: &CenteredRow<'_>, out: &mut [f32]) {
    let &CenteredRow { x, center, factor, weight, bias } = row;
    for ((out, &x), (&weight, &bias)) in out.iter_mut().zip(x).zip(weight.iter().zip(bias)) {
        *out = ((x - center) * factor).mul_add(weight, bias);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sums have the bits of 32 chains folded by halves and then the rest one by one, written out: the order that stored
    /// keys and values rely on. Skipped where the CPU has no AVX2.
    #[test]
    fn the_order_of_a_sum_is_fixed() {
        if !crate::cpu::Isa::available().contains(&crate::cpu::Isa::Avx2) {
            return;
        }
        for width in [1, 31, 32, 33, 64, 100, 1000] {
            let x: Vec<f32> = (0..width).map(|i| ((i * 7919 + 13) % 1009) as f32 / 97.0 - 5.0).collect();
            let mut chains = [0.0_f32; CHAINS];
            for line in x.chunks_exact(CHAINS) {
                chains.iter_mut().zip(line).for_each(|(sum, x)| *sum = x.mul_add(*x, *sum));
            }
            for half in [16, 8, 4, 2, 1] {
                (0..half).for_each(|i| chains[i] += chains[i + half]);
            }
            let sum = x.chunks_exact(CHAINS).remainder().iter().fold(chains[0], |sum, x| x.mul_add(*x, sum));
            let expected = 1.0 / (sum / width as f32 + 1e-6).sqrt();
            // SAFETY: the CPU has AVX2 and FMA (checked above).
            let (actual, around_zero) = unsafe { (inverse_rms(&x, 1e-6), sum_of_squares_around(&x, 0.0)) };
            assert_eq!((actual.to_bits(), around_zero.to_bits()), (expected.to_bits(), sum.to_bits()), "width {width}");
        }
    }
}
