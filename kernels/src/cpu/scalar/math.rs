//! Elementary functions. Own polynomials instead of the C library's, so that results do not change with it.

/// Beyond this `exp` is infinite in f32 (the exact bound is 88.722...).
pub(crate) const EXP_MAX: f32 = 89.0;
/// Below this `exp` rounds to zero, denormals included.
pub(crate) const EXP_MIN: f32 = -104.0;
/// `ln 2` in two parts (Cody & Waite 1980): `n * LN2_HIGH` is exact for all `n` that occur.
pub(crate) const LN2_HIGH: f32 = 0.693_359_4;
pub(crate) const LN2_LOW: f32 = -2.121_944_4e-4;
/// Minimax polynomial of `exp` on `[-ln 2 / 2, ln 2 / 2]` from the third coefficient on, highest degree first (the
/// coefficients of the Cephes library, S. Moshier). `exp(r) = 1 + r + r^2 * poly(r)`.
pub(crate) const EXP_POLYNOMIAL: [f32; 6] =
    [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5];

/// `e^x`, to 2 units in the last place. NaN stays NaN; infinities and overflow behave as in IEEE 754.
pub(crate) fn exp(x: f32) -> f32 {
    let x = x.clamp(EXP_MIN, EXP_MAX); // NaN passes
    let n = (x * std::f32::consts::LOG2_E).round_ties_even();
    let r = x - n * LN2_HIGH - n * LN2_LOW;
    let poly = EXP_POLYNOMIAL.iter().fold(0.0, |sum, &coefficient| sum * r + coefficient);
    let mantissa = poly * (r * r) + r + 1.0;
    // 2^n in two factors: n reaches 128 and -150, beyond the exponents of normal numbers.
    let n = n as i32;
    mantissa * power_of_two(n >> 1) * power_of_two(n - (n >> 1))
}

/// `2^n` for `-126 <= n <= 127`.
fn power_of_two(n: i32) -> f32 {
    f32::from_bits(((n + 127) as u32) << 23)
}

/// `x * sigmoid(x)` (Elfwing et al. 2017, arXiv:1702.03118).
pub(crate) fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// Where [`erf`] changes from a polynomial of `x^2` to one of the logarithm of `1 - erf`.
pub(crate) const ERF_EDGE: f32 = 1.0;
/// From here on `erf` rounds to 1.
pub(crate) const ERF_MAX: f32 = 4.0;
/// Minimax polynomial of `erf(x) / x - 1` in `x^2` on `[0, ERF_EDGE^2]`, highest degree first.
pub(crate) const ERF_SMALL: [f32; 7] =
    [7.889_119e-5, -8.020_841e-4, 5.189_535e-3, -2.685_444_4e-2, 1.128_36e-1, -3.761_262_6e-1, 1.283_791_7e-1];
/// Minimax polynomial of `ln(1 - erf(t))` on `[ERF_EDGE, ERF_MAX]`, weighted by `1 - erf(t)`, highest degree first.
pub(crate) const ERF_LARGE: [f32; 8] = [
    -2.168_685e-5,
    4.413_363_6e-4,
    -4.204_562e-3,
    2.520_825_7e-2,
    -1.084_185_8e-1,
    -6.332_199e-1,
    -1.129_578_5,
    1.880_402_3e-4,
];
/// `1 / sqrt(2)`
pub(crate) const SQRT_HALF: f32 = std::f32::consts::FRAC_1_SQRT_2;
/// `2 * sqrt(2 / pi)`, the factor inside the sigmoid of [`gelu_tanh`].
pub(crate) const GELU_TANH_FACTOR: f32 = 1.595_769;
/// Weight of the cube inside [`gelu_tanh`] (Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2).
pub(crate) const GELU_TANH_CUBE: f32 = 0.044_715;

/// The error function, to a relative error of 1.2e-7. NaN stays NaN.
pub(crate) fn erf(x: f32) -> f32 {
    let t = x.abs();
    if t < ERF_EDGE {
        let square = x * x;
        return ERF_SMALL.iter().fold(0.0, |sum, &coefficient| sum * square + coefficient) * x + x;
    }
    let t = t.min(ERF_MAX);
    let tail = exp(ERF_LARGE.iter().fold(0.0, |sum, &coefficient| sum * t + coefficient));
    if x.is_nan() { x } else { (1.0 - tail).copysign(x) }
}

/// `x * Phi(x)`, the exact form of GELU (Hendrycks & Gimpel 2016, arXiv:1606.08415).
pub(crate) fn gelu_erf(x: f32) -> f32 {
    0.5 * x * (1.0 + erf(x * SQRT_HALF))
}

/// The approximation `0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))` of GELU, as `x * sigmoid(2 ..)`: the same
/// function, and accurate where `1 + tanh` would cancel.
pub(crate) fn gelu_tanh(x: f32) -> f32 {
    let inner = x * (x * x * GELU_TANH_CUBE + 1.0);
    x / (1.0 + exp(-GELU_TANH_FACTOR * inner))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// `erf` in f64: its Taylor series below 3, the continued fraction of its complement above (Abramowitz & Stegun
    /// 1964, 7.1.5 and 7.1.14).
    pub(crate) fn erf_f64(x: f64) -> f64 {
        let t = x.abs();
        let scale = 2.0 / std::f64::consts::PI.sqrt();
        if t < 3.0 {
            let (mut term, mut sum) = (x, x);
            for n in 1..120 {
                let n = f64::from(n);
                term *= -x * x / n;
                sum += term / (2.0 * n + 1.0);
            }
            return scale * sum;
        }
        let fraction = (1..80).rev().fold(t, |fraction, n| t + f64::from(n) / 2.0 / fraction);
        (1.0 - (-t * t).exp() * scale / 2.0 / fraction).copysign(x)
    }

    /// Values at which the functions around GELU are compared: dense where they bend, sparse in the tails.
    pub(crate) fn gelu_arguments() -> impl Iterator<Item = f32> {
        let dense = (-120_000..120_000).map(|i| i as f32 / 20_000.0);
        let tails = (1..200).flat_map(|i| [1.0, -1.0].map(|sign| sign * 1.07_f32.powi(i) * 1e-3));
        dense.chain(tails)
    }

    /// The error function is right to a relative error of 1.2e-7, odd, and 1 in its tail; both forms of GELU follow
    /// their definitions in f64.
    #[test]
    fn erf_and_gelu_are_accurate() {
        assert!((erf_f64(0.5) - 0.520_499_877_813_046_5).abs() < 1e-15);
        assert!((erf_f64(3.5) - 0.999_999_256_901_627_7).abs() < 1e-15);
        for x in gelu_arguments() {
            let (got, want) = (f64::from(erf(x)), erf_f64(x.into()));
            assert!((got - want).abs() <= 1.2e-7 * want.abs(), "erf({x}) = {got}, want {want}");
            assert_eq!(erf(-x), -erf(x));
            let wide = f64::from(x);
            let want = 0.5 * wide * (1.0 + erf_f64(wide * std::f64::consts::FRAC_1_SQRT_2));
            let error = (f64::from(gelu_erf(x)) - want).abs();
            assert!(error <= 1.5e-7 * wide.abs().max(want.abs()), "gelu({x}) = {}, want {want}", gelu_erf(x));
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (wide + 0.044715 * wide.powi(3));
            let want = 0.5 * wide * (1.0 + inner.tanh());
            let error = (f64::from(gelu_tanh(x)) - want).abs();
            assert!(error <= 4e-7 * wide.abs().min(1.0).max(want.abs()), "{x}: {}, want {want}", gelu_tanh(x));
        }
        for gelu in [gelu_erf, gelu_tanh] {
            assert_eq!((gelu(0.0), gelu(100.0), gelu(-100.0), gelu(1e30)), (0.0, 100.0, 0.0, 1e30));
            assert!(gelu(f32::NAN).is_nan());
        }
    }

    /// `exp` is within 2 units in the last place of the f64 function over its whole range, and exact at the edges.
    #[test]
    fn exp_is_accurate() {
        let mut worst = (0.0_f64, 0.0_f32);
        for i in 0..400_000 {
            let x = -87.3 + i as f32 * (176.0 / 400_000.0);
            let want = f64::from(x).exp();
            if want >= f64::from(f32::MAX) {
                continue;
            }
            let ulp = f64::from(want as f32) * f64::from(f32::EPSILON);
            let error = (f64::from(exp(x)) - want).abs() / ulp;
            worst = if error > worst.0 { (error, x) } else { worst };
        }
        assert!(worst.0 <= 2.0, "{} units in the last place at x = {}", worst.0, worst.1);
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp(89.0), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
        assert_eq!(silu(0.0), 0.0);
        assert_eq!(silu(100.0), 100.0);
        assert_eq!(silu(-200.0), 0.0);
    }
}
