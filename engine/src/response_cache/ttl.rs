//! How long an entry lives when its time follows its use: what is asked for often is kept longer than what was asked for
//! once. The steps and their shares of the base are those of a cache that serves web pages; a rate needs no tuning.

/// Time to live of an entry, milliseconds from when it was stored. An entry that was never found has the base: how it
/// will be used is not known yet. From then on its hits per second since it was stored decide.
pub fn adaptive_ttl_ms(base_ms: u64, hits: u64, age_ms: u64) -> u64 {
    if hits == 0 {
        return base_ms;
    }
    // The first second counts whole: one hit right after storing says little.
    let hits_per_1000_s = hits.saturating_mul(1_000_000) / age_ms.max(1_000);
    let (numerator, denominator) = match hits_per_1000_s {
        1_001.. => (2, 1),
        501..=1_000 => (1, 1),
        101..=500 => (1, 2),
        _ => (1, 6),
    };
    (base_ms.saturating_mul(numerator) / denominator).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// With a base of an hour: two hours above one hit a second, one above a half, a half above a tenth, else ten minutes.
    #[test]
    fn use_decides() {
        let minutes = |hits, age_s: u64| adaptive_ttl_ms(3_600_000, hits, age_s * 1_000) / 60_000;
        let table =
            [(0, 5, 60), (2, 0, 120), (1, 0, 60), (101, 100, 120), (100, 100, 60), (51, 100, 60), (50, 100, 30)];
        for (hits, age_s, expected) in table.into_iter().chain([(11, 100, 30), (10, 100, 10), (1, 3_000, 10)]) {
            assert_eq!(minutes(hits, age_s), expected, "{hits} hits in {age_s} s");
        }
    }

    /// No value of the arguments overflows, and nothing lives for no time at all.
    #[test]
    fn extremes_are_times() {
        for base in [1, 3, u64::MAX] {
            for (hits, age) in [(u64::MAX, 0), (u64::MAX, u64::MAX), (1, u64::MAX), (0, 0)] {
                assert!(adaptive_ttl_ms(base, hits, age) >= 1, "{base} {hits} {age}");
            }
        }
    }
}
