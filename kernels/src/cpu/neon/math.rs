//! Elementary functions on four lanes. Each lane is computed alone: a result does not depend on its neighbours.

use std::arch::aarch64::*;

use crate::cpu::scalar::math::{
    ERF_EDGE, ERF_LARGE, ERF_MAX, ERF_SMALL, EXP_MAX, EXP_MIN, EXP_POLYNOMIAL, GELU_TANH_CUBE, GELU_TANH_FACTOR,
    LN2_HIGH, LN2_LOW, SQRT_HALF,
};

/// `e^x` as in the scalar form, with fused multiply-adds.
#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn exp(x: float32x4_t) -> float32x4_t {
    // NaN passes minimum and maximum.
    let x = vminq_f32(vmaxq_f32(x, vdupq_n_f32(EXP_MIN)), vdupq_n_f32(EXP_MAX));
    let n = vrndnq_f32(vmulq_n_f32(x, std::f32::consts::LOG2_E));
    let r = vfmsq_f32(x, n, vdupq_n_f32(LN2_HIGH));
    let r = vfmsq_f32(r, n, vdupq_n_f32(LN2_LOW));
    let poly = polynomial(&EXP_POLYNOMIAL, r);
    let mantissa = vaddq_f32(vfmaq_f32(r, poly, vmulq_f32(r, r)), vdupq_n_f32(1.0));
    let n = vcvtq_s32_f32(n);
    let half = vshrq_n_s32::<1>(n);
    let rest = vsubq_s32(n, half);
    vmulq_f32(vmulq_f32(mantissa, power_of_two(half)), power_of_two(rest))
}

#[inline]
#[target_feature(enable = "neon")]
fn power_of_two(n: int32x4_t) -> float32x4_t {
    vreinterpretq_f32_s32(vshlq_n_s32::<23>(vaddq_s32(n, vdupq_n_s32(127))))
}

/// `x * sigmoid(x)`
#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn silu(x: float32x4_t) -> float32x4_t {
    vdivq_f32(x, vaddq_f32(vdupq_n_f32(1.0), exp(vnegq_f32(x))))
}

/// The polynomial with these coefficients, highest degree first.
#[inline]
#[target_feature(enable = "neon")]
fn polynomial(coefficients: &[f32], x: float32x4_t) -> float32x4_t {
    let mut sum = vdupq_n_f32(coefficients[0]);
    for &coefficient in &coefficients[1..] {
        sum = vfmaq_f32(vdupq_n_f32(coefficient), sum, x);
    }
    sum
}

/// The error function as in the scalar form: both of its branches, and a choice.
#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn erf(x: float32x4_t) -> float32x4_t {
    let t = vabsq_f32(x);
    let small = vfmaq_f32(x, polynomial(&ERF_SMALL, vmulq_f32(x, x)), x);
    // NaN passes the minimum.
    let bounded = vminq_f32(t, vdupq_n_f32(ERF_MAX));
    let large = vsubq_f32(vdupq_n_f32(1.0), exp(polynomial(&ERF_LARGE, bounded)));
    let large = vbslq_f32(vdupq_n_u32(1 << 31), x, large);
    vbslq_f32(vcltq_f32(t, vdupq_n_f32(ERF_EDGE)), small, large)
}

/// `x * Phi(x)`
#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn gelu_erf(x: float32x4_t) -> float32x4_t {
    let twice_phi = vaddq_f32(vdupq_n_f32(1.0), erf(vmulq_n_f32(x, SQRT_HALF)));
    vmulq_f32(vmulq_n_f32(x, 0.5), twice_phi)
}

/// The approximation with a hyperbolic tangent, as in the scalar form.
#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn gelu_tanh(x: float32x4_t) -> float32x4_t {
    let one = vdupq_n_f32(1.0);
    let cube = vfmaq_f32(one, vmulq_f32(x, x), vdupq_n_f32(GELU_TANH_CUBE));
    let inner = vmulq_n_f32(vmulq_f32(x, cube), -GELU_TANH_FACTOR);
    vdivq_f32(x, vaddq_f32(one, exp(inner)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::scalar;

    fn apply(function: unsafe fn(float32x4_t) -> float32x4_t, x: f32) -> f32 {
        // SAFETY: every 64-bit ARM processor has these vectors.
        unsafe { vgetq_lane_f32::<0>(function(vdupq_n_f32(x))) }
    }

    /// The vector `erf` and both forms of GELU are the scalar ones to rounding, NaN and the tails included.
    #[test]
    fn erf_and_gelu_are_the_scalar_ones() {
        type Pair = (unsafe fn(float32x4_t) -> float32x4_t, fn(f32) -> f32);
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
    /// edges.
    #[test]
    fn exp_is_accurate() {
        for i in 0..400_000 {
            let x = -87.3 + i as f32 * (176.0 / 400_000.0);
            let (got, want) = (apply(exp, x), f64::from(x).exp());
            if want < f64::from(f32::MAX) {
                let ulp = f64::from(want as f32) * f64::from(f32::EPSILON);
                assert!((f64::from(got) - want).abs() <= 2.0 * ulp, "exp({x}) = {got}, want {want}");
            }
        }
        for x in [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 89.0, -104.0, -95.0] {
            let (got, want) = (apply(exp, x), scalar::math::exp(x));
            assert!(got == want || got.is_nan() && want.is_nan(), "exp({x}) = {got}, scalar {want}");
        }
    }
}
