//! Elementary functions on eight lanes. Each lane is computed alone: a result does not depend on its neighbours.

use std::arch::x86_64::*;

use crate::cpu::scalar::math::{
    ERF_EDGE, ERF_LARGE, ERF_MAX, ERF_SMALL, EXP_MAX, EXP_MIN, EXP_POLYNOMIAL, GELU_TANH_CUBE, GELU_TANH_FACTOR,
    LN2_HIGH, LN2_LOW, SQRT_HALF,
};

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

/// The polynomial with these coefficients, highest degree first.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn polynomial(coefficients: &[f32], x: __m256) -> __m256 {
    let mut sum = _mm256_set1_ps(coefficients[0]);
    for &coefficient in &coefficients[1..] {
        sum = _mm256_fmadd_ps(sum, x, _mm256_set1_ps(coefficient));
    }
    sum
}

/// The error function as in the scalar form: both of its branches, and a choice.
#[inline]
#[target_feature(enable = "avx2,fma")]
pub(crate) fn erf(x: __m256) -> __m256 {
    let sign = _mm256_set1_ps(-0.0);
    let t = _mm256_andnot_ps(sign, x);
    let small = _mm256_fmadd_ps(polynomial(&ERF_SMALL, _mm256_mul_ps(x, x)), x, x);
    // The operand order makes NaN pass.
    let bounded = _mm256_min_ps(_mm256_set1_ps(ERF_MAX), t);
    let large = _mm256_sub_ps(_mm256_set1_ps(1.0), exp(polynomial(&ERF_LARGE, bounded)));
    let large = _mm256_or_ps(large, _mm256_and_ps(sign, x));
    _mm256_blendv_ps(large, small, _mm256_cmp_ps::<_CMP_LT_OQ>(t, _mm256_set1_ps(ERF_EDGE)))
}

/// `x * Phi(x)`
#[inline]
#[target_feature(enable = "avx2,fma")]
pub(crate) fn gelu_erf(x: __m256) -> __m256 {
    let twice_phi = _mm256_add_ps(_mm256_set1_ps(1.0), erf(_mm256_mul_ps(x, _mm256_set1_ps(SQRT_HALF))));
    _mm256_mul_ps(_mm256_mul_ps(_mm256_set1_ps(0.5), x), twice_phi)
}

/// The approximation with a hyperbolic tangent, as in the scalar form.
#[inline]
#[target_feature(enable = "avx2,fma")]
pub(crate) fn gelu_tanh(x: __m256) -> __m256 {
    let one = _mm256_set1_ps(1.0);
    let cube = _mm256_fmadd_ps(_mm256_mul_ps(x, x), _mm256_set1_ps(GELU_TANH_CUBE), one);
    let inner = _mm256_mul_ps(_mm256_set1_ps(-GELU_TANH_FACTOR), _mm256_mul_ps(x, cube));
    _mm256_div_ps(x, _mm256_add_ps(one, exp(inner)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::scalar;

    /// The vector `erf` and both forms of GELU are the scalar ones to rounding, NaN and the tails included; skipped
    /// where the CPU has no AVX2.
    #[test]
    fn erf_and_gelu_are_the_scalar_ones() {
        if !crate::cpu::Isa::available().contains(&crate::cpu::Isa::Avx2) {
            return;
        }
        let apply = |function: unsafe fn(__m256) -> __m256, x: f32| {
            // SAFETY: the CPU has AVX2 and FMA (checked above).
            unsafe { _mm256_cvtss_f32(function(_mm256_set1_ps(x))) }
        };
        type Pair = (unsafe fn(__m256) -> __m256, fn(f32) -> f32);
        let pairs: [Pair; 3] =
            [(erf, scalar::math::erf), (gelu_erf, scalar::math::gelu_erf), (gelu_tanh, scalar::math::gelu_tanh)];
        for (i, (vector, scalar)) in pairs.into_iter().enumerate() {
            for x in scalar::math::tests::gelu_arguments().chain([1e30, -1e30, f32::INFINITY]) {
                let (got, want) = (apply(vector, x), scalar(x));
                // Near -5 both forms of GELU are differences of almost equal numbers.
                let size = if i == 0 { want.abs() } else { x.abs().min(1.0).max(want.abs()) };
                assert!(got == want || (got - want).abs() <= 4e-7 * size, "function {i} of {x}: {got}, scalar {want}");
            }
            assert!(apply(vector, f32::NAN).is_nan());
        }
    }

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
