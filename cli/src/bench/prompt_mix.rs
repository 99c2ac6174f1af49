//! A mix of prompts in which some are asked far more often than others: lengths of 100 B to 10 KB, spread evenly over the
//! magnitudes, and ranks drawn by Zipf's law (rank to the power of -1). The same numbers give the same prompts. The engine's
//! bench of its caches draws from it too, so it knows nothing of engines and servers.

/// SplitMix64 (Steele et al. 2014).
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Evenly in 0.0 to 1.0.
    pub(crate) fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }
}

const WORDS: [&str; 32] = [
    "the", "little", "cat", "ran", "to", "a", "big", "tree", "and", "saw", "old", "house", "where", "one", "girl",
    "was", "happy", "with", "her", "red", "ball", "they", "went", "home", "when", "sun", "came", "up", "over", "that",
    "blue", "lake",
];

/// Prompt `name`, of at most about `max_bytes`.
pub(crate) fn prompt(name: u64, max_bytes: usize) -> String {
    let mut rng = Rng(name.wrapping_mul(0x1234_5678_9abc_def1));
    let num_bytes = ((100.0 * 100_f64.powf(rng.unit())) as usize).min(max_bytes);
    let mut text = format!("Story {name}:");
    while text.len() < num_bytes {
        text.push(' ');
        text.push_str(WORDS[(rng.next() % WORDS.len() as u64) as usize]);
    }
    text
}

/// Draws ranks by Zipf's law.
pub(crate) struct Zipf {
    /// Sum of the weights up to each rank.
    sums: Vec<f64>,
}

impl Zipf {
    pub(crate) fn new(num_ranks: usize) -> Self {
        let weights = (1..=num_ranks).map(|rank| 1.0 / rank as f64);
        Zipf {
            sums: weights
                .scan(0.0, |sum, weight| {
                    *sum += weight;
                    Some(*sum)
                })
                .collect(),
        }
    }

    /// From 0, the one that comes most often.
    pub(crate) fn draw(&self, rng: &mut Rng) -> u64 {
        let at = rng.unit() * self.sums[self.sums.len() - 1];
        self.sums.partition_point(|sum| *sum < at) as u64
    }
}
