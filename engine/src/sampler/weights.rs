//! From logits to unnormalised probabilities, in arithmetic that does not depend on the order of summation.
//!
//! A weight is `exp((logit - max) / temperature)` in fixed point with [`WEIGHT_BITS`] fraction bits, so the best token
//! weighs `2^40` and sums of up to 2^23 weights are exact in 64 bits: truncation and draw may select, split and
//! reorder as they like without changing a result. Tokens of less than about 1e-12 of the best one's probability
//! weigh nothing and are never drawn.
//!
//! The exponential is this file's own: the C library's differs between systems in the last bit, and this one can be
//! vectorised by the compiler.

/// Fraction bits of a weight.
const WEIGHT_BITS: u32 = 40;
/// Weight of the most likely token.
const ONE: f32 = (1u64 << WEIGHT_BITS) as f32;
/// Parts in which [`log_sum_exp`] sums, in a fixed pattern: enough for two registers of eight.
const LANES: usize = 16;

/// Turns logits into weights.
#[derive(Debug, Clone, Copy)]
pub(super) struct Softmax {
    max: f32,
    temperature: f32,
}

impl Softmax {
    /// `max`: the largest logit, finite. `temperature`: above 0, subnormal values included.
    pub(super) fn new(max: f32, temperature: f32) -> Self {
        Softmax { max, temperature }
    }

    /// The weight of a logit that is not above the maximum.
    #[inline]
    pub(super) fn weight(&self, logit: f32) -> u64 {
        // A division, not a product with the reciprocal: 1 / temperature overflows for the smallest temperatures.
        (exp((logit - self.max) / self.temperature) * ONE) as u64
    }
}

/// `ln(sum(exp(logits)))`; `max` is the largest of them.
pub(super) fn log_sum_exp(logits: &[f32], max: f32) -> f64 {
    let mut lanes = [0f64; LANES];
    let mut chunks = logits.chunks_exact(LANES);
    for chunk in &mut chunks {
        for (sum, &logit) in lanes.iter_mut().zip(chunk) {
            *sum += f64::from(exp(logit - max));
        }
    }
    let rest: f64 = chunks.remainder().iter().map(|&logit| f64::from(exp(logit - max))).sum();
    f64::from(max) + (lanes.iter().sum::<f64>() + rest).ln()
}

/// `e^x` for `x <= 0`, with a relative error below 2e-7; 0 below the smallest normal result. `x` may be `-inf`.
///
/// `x = n ln 2 + r` with `|r| <= ln 2 / 2`; `e^r` by its Taylor polynomial of degree 7, `2^n` by its exponent bits.
#[inline]
pub(super) fn exp(x: f32) -> f32 {
    /// Leading bits of ln 2, with enough zeros behind that `n * LN2_HIGH` is exact (Cody & Waite 1980).
    const LN2_HIGH: f32 = 355.0 / 512.0;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    /// Adding and subtracting this rounds to the nearest integer.
    const ROUND: f32 = 12_582_912.0;
    const SMALLEST: f32 = -87.0;

    let clamped = x.max(SMALLEST);
    let n = (clamped * std::f32::consts::LOG2_E + ROUND) - ROUND;
    let r = (clamped - n * LN2_HIGH) - n * LN2_LOW;
    let p = 1.0 / 5040.0;
    let p = p * r + 1.0 / 720.0;
    let p = p * r + 1.0 / 120.0;
    let p = p * r + 1.0 / 24.0;
    let p = p * r + 1.0 / 6.0;
    let p = p * r + 0.5;
    let p = p * r + 1.0;
    let p = p * r + 1.0;
    let power_of_two = f32::from_bits(((n as i32 + 127) as u32) << 23);
    if x < SMALLEST { 0.0 } else { p * power_of_two }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The exponential is within 2e-7 of the exact value over its whole range, exact at 0 and 0 for a masked logit.
    #[test]
    fn exponential_is_accurate() {
        for step in 0..=870_000 {
            let x = -(step as f32) * 1e-4;
            let exact = f64::from(x).exp();
            let error = (f64::from(exp(x)) - exact).abs() / exact;
            assert!(error < 2e-7, "exp({x}) is off by {error}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(f32::MIN), 0.0);
    }

    /// Weights are ordered as logits are, the best weighs 2^40, and no temperature gives more or a NaN.
    #[test]
    fn weights_follow_the_logits() {
        for temperature in [f32::from_bits(1), f32::MIN_POSITIVE, 0.01, 1.0, 100.0] {
            let softmax = Softmax::new(3.0, temperature);
            assert_eq!(softmax.weight(3.0), 1 << WEIGHT_BITS);
            let weights: Vec<u64> = (0..1000).map(|i| softmax.weight(3.0 - i as f32 * 0.05)).collect();
            assert!(weights.is_sorted_by(|a, b| a >= b), "temperature {temperature}");
            assert_eq!(softmax.weight(f32::NEG_INFINITY), 0);
        }
    }

    /// The logarithm of the sum agrees with one in double precision, for lengths around the lanes' edges.
    #[test]
    fn log_sum_exp_is_accurate() {
        for len in [1, 15, 16, 17, 1000] {
            let logits: Vec<f32> = (0..len).map(|i| ((i * 37) % 101) as f32 * 0.17 - 9.0).collect();
            let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let exact = logits.iter().map(|&l| f64::from(l).exp()).sum::<f64>().ln();
            let got = log_sum_exp(&logits, max);
            assert!((got - exact).abs() < 1e-6, "{len} logits: {got} instead of {exact}");
        }
    }
}
