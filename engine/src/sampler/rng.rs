//! Random numbers without a state: a pure function of (seed, position). Whether a sequence runs alone, in a batch, or
//! again after a preemption, the number at a position is the same, and no draw can disturb another one's.
//!
//! The generator is SplitMix64 (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators") read as a
//! counter-based one: its n-th output is `mix(start + (n + 1) * GOLDEN_GAMMA)`, so position n is reached without the
//! n - 1 before it. The start is the mixed seed, which keeps neighbouring seeds from sharing a shifted stream.

use sha2::{Digest, Sha256};

/// 2^64 divided by the golden ratio, made odd.
const GOLDEN_GAMMA: u64 = 0x9E37_79B9_7F4A_7C15;

/// The random number of `seed` at `position`, uniform over all 64-bit values.
pub fn random_at(seed: u64, position: u64) -> u64 {
    let start = mix(seed.wrapping_add(GOLDEN_GAMMA));
    mix(start.wrapping_add(position.wrapping_add(1).wrapping_mul(GOLDEN_GAMMA)))
}

/// SplitMix64's finaliser (variant 13 of David Stafford's mixers): every input bit reaches every output bit.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Seed of choice `choice_idx` of a request with seed `seed`.
///
/// Choice 0 uses the seed itself, so that a request for one answer and the first answer of a request for several are
/// the same. Choice i uses the first eight bytes, little-endian, of SHA-256 over `"ns-llm choice seed"`, the seed and
/// i (both as 64-bit little-endian numbers): each choice can be asked for again alone, by its own seed.
pub fn choice_seed(seed: u64, choice_idx: usize) -> u64 {
    if choice_idx == 0 {
        return seed;
    }
    let digest = Sha256::new()
        .chain_update(b"ns-llm choice seed")
        .chain_update(seed.to_le_bytes())
        .chain_update((choice_idx as u64).to_le_bytes())
        .finalize();
    u64::from_le_bytes(std::array::from_fn(|i| digest[i]))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The numbers are those of an independent implementation: an answer with a seed is the same in every release.
    #[test]
    fn golden_numbers() {
        for (seed, position, expected) in [
            (0, 0, 0xa706_dd2f_4d19_7e6f),
            (0, 1, 0xb382_a305_f441_4f5e),
            (1, 0, 0x5e41_ab08_7439_611e),
            (42, 1000, 0xb1fc_8c82_4d52_4899),
            (u64::MAX, u64::MAX, 0x4450_18e3_0581_0b78),
        ] {
            assert_eq!(random_at(seed, position), expected, "seed {seed}, position {position}");
        }
    }

    /// Choice 0 draws as a request for one answer does; the others have seeds of their own, as documented.
    #[test]
    fn golden_choice_seeds() {
        assert_eq!(choice_seed(7, 0), 7);
        assert_eq!(choice_seed(7, 1), 0xb78e_e2d7_a88b_0e21);
        assert_eq!(choice_seed(7, 2), 0x76b9_c1c9_eda4_64ff);
        assert_eq!(choice_seed(u64::MAX, 7), 0x27bf_bb68_e4d0_ff13);
    }

    /// Numbers are evenly spread along positions and along seeds, also neighbouring ones (chi-square, 256 cells).
    #[test]
    fn evenly_spread() {
        let along_positions = |i| random_at(12, i);
        let along_seeds = |i| random_at(i, 12);
        for (name, number) in
            [("positions", &along_positions as &dyn Fn(u64) -> u64), ("seeds", &along_seeds as &dyn Fn(u64) -> u64)]
        {
            for shift in [0, 24, 56] {
                let mut cells = [0u32; 256];
                (0..65_536).for_each(|i| cells[(number(i) >> shift & 255) as usize] += 1);
                let chi_square: f64 = cells.iter().map(|&n| (f64::from(n) - 256.0).powi(2) / 256.0).sum();
                // 255 degrees of freedom: mean 255, standard deviation 22.6.
                assert!((155.0..355.0).contains(&chi_square), "{name}, bits from {shift}: {chi_square}");
            }
        }
    }
}
