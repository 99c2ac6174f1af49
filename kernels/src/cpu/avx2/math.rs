//! Elementary functions on eight lanes. Each lane is computed alone: a result does not depend on its neighbours.

use std::arch::x86_64::*;

use crate::cpu::scalar::math::{EXP_MAX, EXP_MIN, EXP_POLYNOMIAL, LN2_HIGH, LN2_LOW};

/// `e^x` as in the scalar form, with fused multiply-adds.
#[inline]
#[target_feature(enable = "avx2,fma")]
pub(crate) fn exp(x: __m256) -> __m256 {
    // The operand order makes NaN pass: min and max return the second one then.
    let x = _mm256_min_ps(_mm256_set1_ps(EXP_MAX), _mm256_max_ps(_mm256_set1_ps(EXP_MIN), x));
    const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    let n = _mm256_round_ps::<NEAREST>(_mm256_mul_ps(x, _mm256_set1_ps(std::f32::consts::LOG2_E)));
    let r = _mm256_fnmadd_ps(n, _mm256_set1_ps(LN2_HIGH), x);
    let r = _mm256_fnmadd_ps(n, _mm256_set1_ps(LN2_LOW), r);
    let mut poly = _mm256_set1_ps(EXP_POLYNOMIAL[0]);
    for &coefficient in &EXP_POLYNOMIAL[1..] {
        poly = _mm256_fmadd_ps(poly, r, _mm256_set1_ps(coefficient));
    }
    let mantissa = _mm256_add_ps(_mm256_fmadd_ps(poly, _mm256_mul_ps(r, r), r), _mm256_set1_ps(1.0));
    let n = _mm256_cvtps_epi32(n);
    let half = _mm256_srai_epi32::<1>(n);
    let rest = _mm256_sub_epi32(n, half);
    _mm256_mul_ps(_mm256_mul_ps(mantissa, power_of_two(half)), power_of_two(rest))
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn power_of_two(n: __m256i) -> __m256 {
    _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(n, _mm256_set1_epi32(127))))
}

/// `x * sigmoid(x)`
#[inline]
#[target_feature(enable = "avx2,fma")]
pub(crate) fn silu(x: __m256) -> __m256 {
    let one = _mm256_set1_ps(1.0);
    let negated = _mm256_xor_ps(x, _mm256_set1_ps(-0.0));
    _mm256_div_ps(x, _mm256_add_ps(one, exp(negated)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::scalar;

    /// The vector `exp` is within 2 units in the last place of the f64 function, and agrees with the scalar one at the
    /// edges; skipped where the CPU has no AVX2.
    #[test]
    fn exp_is_accurate() {
        if !crate::cpu::Isa::available().contains(&crate::cpu::Isa::Avx2) {
            return;
        }
        let exp8 = |x: [f32; 8]| {
            let mut out = [0.0; 8];
            // SAFETY: the CPU has AVX2 and FMA (checked above); both arrays are one vector long.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr(), exp(_mm256_loadu_ps(x.as_ptr()))) };
            out
        };
        for i in 0..50_000 {
            let x: [f32; 8] = std::array::from_fn(|lane| -87.3 + (8 * i + lane) as f32 * (176.0 / 400_000.0));
            for (x, got) in x.into_iter().zip(exp8(x)) {
                let want = f64::from(x).exp();
                if want < f64::from(f32::MAX) {
                    let ulp = f64::from(want as f32) * f64::from(f32::EPSILON);
                    assert!((f64::from(got) - want).abs() <= 2.0 * ulp, "exp({x}) = {got}, want {want}");
                }
            }
        }
        let edges = [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 89.0, -104.0, -95.0];
        for (x, got) in edges.into_iter().zip(exp8(edges)) {
            let want = scalar::math::exp(x);
            assert!(got == want || got.is_nan() && want.is_nan(), "exp({x}) = {got}, scalar {want}");
        }
    }
}
