//! Changes of the kinds that break parsers.

/// Deterministic numbers (SplitMix64, Steele et al. 2014).
#[derive(Debug, Clone)]
pub struct Random(pub u64);

impl Random {
    /// The next number.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    /// One of `0..limit`; 0 where there is none.
    pub fn below(&mut self, limit: usize) -> usize {
        (self.bits() >> 11) as usize % limit.max(1)
    }
}

/// Numbers at which arithmetic breaks.
const EXTREMES: [u64; 10] = [0, 1, 0x7F, 0x80, 0xFFFF, 0xFFFF_FFFF, 1 << 31, 1 << 32, 1 << 63, u64::MAX];
/// What a text may hold in the place of a number, a string, a list or a block.
const WORDS: [&str; 20] = [
    "0",
    "-1",
    "1e999",
    "0.5",
    "18446744073709551616",
    "9007199254740993",
    "null",
    "true",
    "[]",
    "{}",
    "\"\"",
    "\\u0000",
    "\\ud800",
    "[[[[[[[[",
    "\"a\":",
    ",",
    "{{",
    "%}",
    "(a+)+$",
    "\u{10ffff}",
];

/// One to four changes: bits, extreme numbers, words, pieces moved, doubled, cut out, taken from `other`, or off. Most of
/// them within the first `reach` bytes.
pub fn mutate(bytes: &mut Vec<u8>, other: &[u8], reach: usize, random: &mut Random) {
    for _ in 0..=random.below(4) {
        if bytes.is_empty() {
            bytes.push(random.bits() as u8);
            bytes.extend(&other[..other.len().min(64)]);
        }
        let reach = if random.below(8) == 0 { bytes.len() } else { reach.min(bytes.len()) };
        let at = random.below(reach);
        let end = (at + 1 + random.below(16)).min(bytes.len());
        match random.below(9) {
            0 => bytes[at] ^= 1 << random.below(8),
            1 => bytes[at] = random.bits() as u8,
            2 => {
                let (extreme, width) = (EXTREMES[random.below(EXTREMES.len())], [1, 2, 4, 8][random.below(4)]);
                let extreme = extreme.wrapping_sub(random.below(3) as u64).to_le_bytes();
                bytes.iter_mut().skip(at).zip(&extreme[..width]).for_each(|(byte, new)| *byte = *new);
            }
            3 => drop(bytes.drain(at..end)),
            4 => {
                let piece = bytes[at..end].to_vec();
                let to = random.below(bytes.len());
                bytes.splice(to..to, piece);
            }
            5 => drop(bytes.splice(at..end, WORDS[random.below(WORDS.len())].bytes())),
            6 => replace_number(bytes, at, random),
            7 if !other.is_empty() => {
                let from = random.below(other.len());
                let piece = &other[from..(from + 1 + random.below(64)).min(other.len())];
                drop(bytes.splice(at..end, piece.iter().copied()));
            }
            _ => bytes.truncate(if random.below(8) == 0 { at } else { bytes.len() }),
        }
    }
}

/// The next number in decimal digits becomes another.
fn replace_number(bytes: &mut Vec<u8>, from: usize, random: &mut Random) {
    let Some(start) = bytes[from..].iter().position(u8::is_ascii_digit).map(|place| from + place) else { return };
    let end = bytes[start..].iter().position(|byte| !byte.is_ascii_digit()).map_or(bytes.len(), |len| start + len);
    let number = EXTREMES[random.below(EXTREMES.len())].wrapping_add(random.below(3) as u64);
    drop(bytes.splice(start..end, number.to_string().into_bytes()));
}
