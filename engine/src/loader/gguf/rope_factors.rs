//! The tensor `rope_freqs.weight`: by what each rotary frequency is divided. Converters write it for models whose
//! frequencies were stretched as in Llama 3.1 (arXiv:2407.21783) and leave the parameters of that formula out. They
//! are found again here, so that the frequencies are computed as for the original checkpoint, bit for bit; factors that
//! do not follow the formula are refused.

#![deny(clippy::arithmetic_side_effects, clippy::indexing_slicing)]

/// Name of the tensor.
pub const TENSOR: &str = "rope_freqs.weight";

/// Parameters of the formula, as in `config.json`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Stretching {
    /// By what the slowest frequencies are divided.
    pub factor: f64,
    /// Frequencies of fewer turns in the original context are the slowest.
    pub low_freq_factor: f64,
    /// Frequencies of more turns stay as they are.
    pub high_freq_factor: f64,
    /// Context of the first training, tokens.
    pub original_positions: u64,
}

/// The parameters that give `factors`, one for each pair of a head's dimensions. All published models have these but
/// for `factor`, which is that of the slowest frequencies.
pub(super) fn recognise(factors: &[f32], rope_theta: f64, original_positions: Option<u64>) -> Option<Stretching> {
    let stretching = Stretching {
        factor: f64::from(factors.iter().copied().reduce(f32::max)?),
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_positions: original_positions.unwrap_or(8192),
    };
    let follows = |(pair, &factor): (usize, &f32)| {
        let expected = stretching.divisor(pair, factors.len(), rope_theta);
        // The files hold single precision; a NaN follows nothing.
        (f64::from(factor) - expected).abs() <= 1e-4 * expected
    };
    (stretching.factor >= 1.0 && factors.iter().enumerate().all(follows)).then_some(stretching)
}

impl Stretching {
    /// What `rope_freqs.weight` holds for heads of `num_pairs` pairs; `None` if nobody could tell the parameters from
    /// that.
    pub fn divisors(&self, num_pairs: usize, rope_theta: f64) -> Option<Vec<f32>> {
        let divisors: Vec<f32> = (0..num_pairs).map(|pair| self.divisor(pair, num_pairs, rope_theta) as f32).collect();
        let recognised = recognise(&divisors, rope_theta, Some(self.original_positions));
        (recognised == Some(*self)).then_some(divisors)
    }

    /// By what the frequency of pair `pair` of `num_pairs` is divided.
    fn divisor(&self, pair: usize, num_pairs: usize, rope_theta: f64) -> f64 {
        let frequency = rope_theta.powf(-(pair as f64) / num_pairs as f64);
        let turns = self.original_positions as f64 * frequency / std::f64::consts::TAU;
        if turns > self.high_freq_factor {
            1.0
        } else if turns < self.low_freq_factor {
            self.factor
        } else {
            let blend = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor);
            1.0 / ((1.0 - blend) / self.factor + blend)
        }
    }
}

#[cfg(test)]
#[expect(clippy::indexing_slicing, reason = "places of the tests' own")]
mod tests {
    use super::*;

    /// Factors of the formula are recognised with their parameters, others are not: shown for a head of 64 at the base
    /// of Llama 3.2, where all three cases of the formula occur.
    #[test]
    fn only_the_formula_is_recognised() {
        let stretching =
            Stretching { factor: 32.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_positions: 8192 };
        let factors: Vec<f32> = (0..32).map(|pair| stretching.divisor(pair, 32, 5e5) as f32).collect();
        let between = factors.iter().filter(|&&factor| factor > 1.0 && factor < 32.0).count();
        assert!(factors[0] == 1.0 && factors[31] == 32.0 && between > 1, "{factors:?}");
        assert_eq!(recognise(&factors, 5e5, None), Some(stretching));
        assert_eq!(recognise(&factors, 1e4, None), None);
        assert_eq!(recognise(&factors, 5e5, Some(4096)), None);
        assert_eq!(recognise(&[], 5e5, None), None);
        for (idx, value) in [(0, 1.01), (31, 31.9), (16, f32::NAN), (0, f32::INFINITY)] {
            let mut changed = factors.clone();
            changed[idx] = value;
            assert_eq!(recognise(&changed, 5e5, None), None, "{idx} = {value}");
        }
    }
}
