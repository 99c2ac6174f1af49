//! Elementary functions on sixteen lanes. Each lane is computed alone: a result does not depend on its neighbours.

use std::arch::x86_64::*;

use crate::cpu::scalar::math::{
    ERF_EDGE, ERF_LARGE, ERF_MAX, ERF_SMALL, EXP_MAX, EXP_MIN, EXP_POLYNOMIAL, GELU_TANH_CUBE, GELU_TANH_FACTOR,
    LN2_HIGH, LN2_LOW, SQRT_HALF,
};

/// `e^x` as in the scalar form, with fused multiply-adds.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(crate) fn exp(x: __m512) -> __m512 {
    // The operand order makes NaN pass: min and max return the second one then.
    let x = _mm512_min_ps(_mm512_set1_ps(EXP_MAX), _mm512_max_ps(_mm512_set1_ps(EXP_MIN), x));
    const NEAREST_WHOLE: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    let n = _mm512_roundscale_ps::<NEAREST_WHOLE>(_mm512_mul_ps(x, _mm512_set1_ps(std::f32::consts::LOG2_E)));
    let r = _mm512_fnmadd_ps(n, _mm512_set1_ps(LN2_HIGH), x);
    let r = _mm512_fnmadd_ps(n, _mm512_set1_ps(LN2_LOW), r);
    let mut poly = _mm512_set1_ps(EXP_POLYNOMIAL[0]);
    for &coefficient in &EXP_POLYNOMIAL[1..] {
        poly = _mm512_fmadd_ps(poly, r, _mm512_set1_ps(coefficient));
    }
    let mantissa = _mm512_add_ps(_mm512_fmadd_ps(poly, _mm512_mul_ps(r, r), r), _mm512_set1_ps(1.0));
    // `mantissa * 2^n`, rounded once: no need for two factors.
    _mm512_scalef_ps(mantissa, n)
}

/// `x * sigmoid(x)`
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(crate) fn silu(x: __m512) -> __m512 {
    let negated = _mm512_xor_ps(x, _mm512_set1_ps(-0.0));
    _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0), exp(negated)))
}

/// The polynomial with these coefficients, highest degree first.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn polynomial(coefficients: &[f32], x: __m512) -> __m512 {
    let mut sum = _mm512_set1_ps(coefficients[0]);
    for &coefficient in &coefficients[1..] {
        sum = _mm512_fmadd_ps(sum, x, _mm512_set1_ps(coefficient));
    }
    sum
}

/// The error function as in the scalar form: both of its branches, and a choice.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(crate) fn erf(x: __m512) -> __m512 {
    let sign = _mm512_set1_ps(-0.0);
    let t = _mm512_andnot_ps(sign, x);
    let small = _mm512_fmadd_ps(polynomial(&ERF_SMALL, _mm512_mul_ps(x, x)), x, x);
    // The operand order makes NaN pass.
    let bounded = _mm512_min_ps(_mm512_set1_ps(ERF_MAX), t);
    let large = _mm512_sub_ps(_mm512_set1_ps(1.0), exp(polynomial(&ERF_LARGE, bounded)));
    let large = _mm512_or_ps(large, _mm512_and_ps(sign, x));
    _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(t, _mm512_set1_ps(ERF_EDGE)), large, small)
}

/// `x * Phi(x)`
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(crate) fn gelu_erf(x: __m512) -> __m512 {
    let twice_phi = _mm512_add_ps(_mm512_set1_ps(1.0), erf(_mm512_mul_ps(x, _mm512_set1_ps(SQRT_HALF))));
    _mm512_mul_ps(_mm512_mul_ps(_mm512_set1_ps(0.5), x), twice_phi)
}

/// The approximation with a hyperbolic tangent, as in the scalar form.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(crate) fn gelu_tanh(x: __m512) -> __m512 {
    let one = _mm512_set1_ps(1.0);
    let cube = _mm512_fmadd_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(GELU_TANH_CUBE), one);
    let inner = _mm512_mul_ps(_mm512_set1_ps(-GELU_TANH_FACTOR), _mm512_mul_ps(x, cube));
    _mm512_div_ps(x, _mm512_add_ps(one, exp(inner)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::scalar;

    /// The vector `erf` and both forms of GELU are the scalar ones to rounding, NaN and the tails included; skipped
    /// where the CPU has no AVX-512.
    #[test]
    fn erf_and_gelu_are_the_scalar_ones() {
        if !crate::cpu::Isa::available().contains(&crate::cpu::Isa::Avx512) {
            return;
        }
        let apply = |function: unsafe fn(__m512) -> __m512, x: f32| {
            // SAFETY: the CPU has AVX-512 (checked above).
            unsafe { _mm512_cvtss_f32(function(_mm512_set1_ps(x))) }
        };
        type Pair = (unsafe fn(__m512) -> __m512, fn(f32) -> f32);
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
    /// edges; skipped where the CPU has no AVX-512.
    #[test]
    fn exp_is_accurate() {
        if !crate::cpu::Isa::available().contains(&crate::cpu::Isa::Avx512) {
            return;
        }
        // SAFETY: the CPU has AVX-512 (checked above).
        let exp16 = |x: [f32; 16]| unsafe {
            std::mem::transmute::<__m512, [f32; 16]>(exp(std::mem::transmute::<[f32; 16], __m512>(x)))
        };
        for i in 0..10_000 {
            let x: [f32; 16] = std::array::from_fn(|lane| -87.3 + (16 * i + lane) as f32 * (176.0 / 160_000.0));
            for (x, got) in x.into_iter().zip(exp16(x)) {
                let want = f64::from(x).exp();
                if want < f64::from(f32::MAX) {
                    let ulp = f64::from(want as f32) * f64::from(f32::EPSILON);
                    assert!((f64::from(got) - want).abs() <= 2.0 * ulp, "exp({x}) = {got}, want {want}");
                }
            }
        }
        let mut edges = [0.0; 16];
        edges[..8].copy_from_slice(&[-0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 89.0, -104.0, -95.0, 88.7]);
        for (x, got) in edges.into_iter().zip(exp16(edges)) {
            let want = scalar::math::exp(x);
            let ulp = want.abs().max(f32::MIN_POSITIVE) * f32::EPSILON;
            assert!(
                got == want || got.is_nan() && want.is_nan() || (got - want).abs() <= ulp,
                "exp({x}) = {got}, scalar {want}"
            );
        }
    }
}
