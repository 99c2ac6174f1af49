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

#[cfg(test)]
mod tests {
    use super::*;

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
