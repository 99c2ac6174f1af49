//! KV blocks of floats as 8-bit integers and back, for places where KV is kept and not computed with: half the bytes of f16.
//!
//! Each token has, in each head, one scale for its key and one for its value: `max |x| / 127`. An element is rounded to the
//! nearest of 255 multiples of it, so its error is at most half a scale, and that of a token depends on that token alone. A
//! token of which some element is no finite number comes back as no numbers: what is computed from it fails as it would have.
//!
//! An encoded head: its elements in the order that they had, one byte each, then f32 scales, of the keys `[block_tokens]` and
//! of the values `[block_tokens]`. On a CPU that is byte for byte a head of a pool of 8-bit integers.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// Version of this rounding: it changes when any block may come back with other bits than before.
pub const VERSION: u32 = 1;

/// Largest 8-bit element.
const LEVELS: f32 = 127.0;
/// Added to a number of at most 22 bits, it leaves the nearest integer in the low bits of the sum: 1.5 * 2^23.
const ROUNDING: f32 = 12_582_912.0;

/// How an element of the blocks is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Float {
    /// IEEE 754 single precision.
    F32,
    /// IEEE 754 half precision.
    F16,
    /// bfloat16.
    Bf16,
}

impl Float {
    /// Bytes of one.
    fn size_bytes(self) -> usize {
        match self {
            Float::F32 => 4,
            Float::F16 | Float::Bf16 => 2,
        }
    }
}

/// How the blocks lie: heads of all layers one behind the other, each with its keys and then its values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Int8Blocks {
    /// Layers times heads of a layer.
    pub num_heads: usize,
    /// Tokens of a block.
    pub block_tokens: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Elements between the values of two tokens.
    pub value_stride: usize,
    /// Keys lie as `[head_dim][block_tokens]`, else as `[block_tokens][head_dim]`.
    pub keys_are_transposed: bool,
    /// Type of the elements.
    pub float: Float,
}

impl Int8Blocks {
    fn keys_len(&self) -> usize {
        self.head_dim * self.block_tokens
    }
    /// Elements of a head, keys and values.
    fn head_len(&self) -> usize {
        self.keys_len() + self.block_tokens * self.value_stride
    }
    fn encoded_head_bytes(&self) -> usize {
        self.head_len() + 2 * self.block_tokens * size_of::<f32>()
    }
    /// Bytes of a block of floats.
    pub fn block_bytes(&self) -> usize {
        self.num_heads * self.head_len() * self.float.size_bytes()
    }
    /// Bytes of an encoded block.
    pub fn encoded_bytes(&self) -> usize {
        self.num_heads * self.encoded_head_bytes()
    }

    /// A block in 8 bits. Panics for bytes of another length.
    pub fn encode(&self, block: &[u8]) -> Vec<u8> {
        assert_eq!(block.len(), self.block_bytes());
        let mut encoded = Vec::with_capacity(self.encoded_bytes());
        let mut numbers = vec![0.0; self.head_len()];
        let mut scales = vec![0.0; 2 * self.block_tokens];
        for head in block.chunks_exact(self.head_len() * self.float.size_bytes()) {
            self.float.read(head, &mut numbers);
            let (keys, values) = numbers.split_at(self.keys_len());
            let (key_scales, value_scales) = scales.split_at_mut(self.block_tokens);
            match self.keys_are_transposed {
                true => encode_columns(keys, key_scales, &mut encoded),
                false => encode_rows(keys, self.head_dim, key_scales, &mut encoded),
            }
            encode_rows(values, self.value_stride, value_scales, &mut encoded);
            encoded.extend(scales.iter().flat_map(|scale| scale.to_ne_bytes()));
        }
        encoded
    }

    /// Writes what was encoded as `encoded` to `block`. Panics for bytes of another length.
    pub fn decode(&self, encoded: &[u8], block: &mut [u8]) {
        assert_eq!((encoded.len(), block.len()), (self.encoded_bytes(), self.block_bytes()));
        let mut numbers = vec![0.0; self.head_len()];
        let mut scales = vec![0.0; 2 * self.block_tokens];
        let heads = block.chunks_exact_mut(self.head_len() * self.float.size_bytes());
        for (head, encoded) in heads.zip(encoded.chunks_exact(self.encoded_head_bytes())) {
            let (levels, scale_bytes) = encoded.split_at(self.head_len());
            Float::F32.read(scale_bytes, &mut scales);
            let (keys, values) = numbers.split_at_mut(self.keys_len());
            let (key_levels, value_levels) = levels.split_at(self.keys_len());
            let (key_scales, value_scales) = scales.split_at(self.block_tokens);
            match self.keys_are_transposed {
                true => decode_columns(key_levels, key_scales, keys),
                false => decode_rows(key_levels, self.head_dim, key_scales, keys),
            }
            decode_rows(value_levels, self.value_stride, value_scales, values);
            self.float.write(&numbers, head);
        }
    }
}

/// Tokens are rows of `width` elements.
fn encode_rows(numbers: &[f32], width: usize, scales: &mut [f32], encoded: &mut Vec<u8>) {
    for (row, scale) in numbers.chunks_exact(width).zip(scales) {
        let (largest, poison) = row.iter().fold((0.0_f32, 0.0), |(largest, poison), x| {
            // Zero, but no number if `x` is none or infinite.
            (largest.max(x.abs()), poison + x * 0.0)
        });
        *scale = largest / LEVELS + poison;
        let inverse = inverse(*scale);
        encoded.extend(row.iter().map(|x| level(x * inverse)));
    }
}

/// Tokens are columns.
fn encode_columns(numbers: &[f32], scales: &mut [f32], encoded: &mut Vec<u8>) {
    let block_tokens = scales.len();
    let mut poison = vec![0.0; block_tokens];
    scales.fill(0.0);
    for row in numbers.chunks_exact(block_tokens) {
        for ((largest, poison), x) in scales.iter_mut().zip(&mut poison).zip(row) {
            *largest = largest.max(x.abs());
            *poison += x * 0.0;
        }
    }
    scales.iter_mut().zip(&poison).for_each(|(scale, poison)| *scale = *scale / LEVELS + poison);
    let inverses: Vec<f32> = scales.iter().map(|scale| inverse(*scale)).collect();
    for row in numbers.chunks_exact(block_tokens) {
        encoded.extend(row.iter().zip(&inverses).map(|(x, inverse)| level(x * inverse)));
    }
}

fn decode_rows(levels: &[u8], width: usize, scales: &[f32], numbers: &mut [f32]) {
    let rows = levels.chunks_exact(width).zip(numbers.chunks_exact_mut(width));
    for ((levels, numbers), scale) in rows.zip(scales) {
        numbers.iter_mut().zip(levels).for_each(|(number, level)| *number = f32::from(*level as i8) * scale);
    }
}

fn decode_columns(levels: &[u8], scales: &[f32], numbers: &mut [f32]) {
    for (levels, numbers) in levels.chunks_exact(scales.len()).zip(numbers.chunks_exact_mut(scales.len())) {
        let elements = numbers.iter_mut().zip(levels).zip(scales);
        elements.for_each(|((number, level), scale)| *number = f32::from(*level as i8) * scale);
    }
}

/// What elements are multiplied with. A token of zeros, of numbers that are too small to divide by, or of no numbers at all
/// has zeros as its elements: the scale alone says which.
fn inverse(scale: f32) -> f32 {
    if scale >= f32::MIN_POSITIVE { scale.recip() } else { 0.0 }
}

/// The nearest integer of -127 to 127 as a byte. Branchless, so that it becomes vector code on any CPU.
fn level(x: f32) -> u8 {
    (x + ROUNDING).to_bits() as u8
}

impl Float {
    /// The numbers of `bytes`.
    fn read(self, bytes: &[u8], numbers: &mut [f32]) {
        let pairs = || bytes.chunks_exact(2).map(|it| [it[0], it[1]]);
        match self {
            Float::F32 => {
                let words = bytes.chunks_exact(4).map(|it| f32::from_ne_bytes([it[0], it[1], it[2], it[3]]));
                numbers.iter_mut().zip(words).for_each(|(number, word)| *number = word);
            }
            Float::F16 => {
                let halves: Vec<f16> = pairs().map(f16::from_ne_bytes).collect();
                halves.convert_to_f32_slice(numbers);
            }
            Float::Bf16 => {
                let halves: Vec<bf16> = pairs().map(bf16::from_ne_bytes).collect();
                halves.convert_to_f32_slice(numbers);
            }
        }
    }

    /// The bytes of `numbers`.
    fn write(self, numbers: &[f32], bytes: &mut [u8]) {
        match self {
            Float::F32 => {
                let words = bytes.chunks_exact_mut(4).zip(numbers);
                words.for_each(|(word, number)| word.copy_from_slice(&number.to_ne_bytes()));
            }
            Float::F16 => {
                let mut halves = vec![f16::ZERO; numbers.len()];
                halves.convert_from_f32_slice(numbers);
                let pairs = bytes.chunks_exact_mut(2).zip(halves);
                pairs.for_each(|(pair, half)| pair.copy_from_slice(&half.to_ne_bytes()));
            }
            Float::Bf16 => {
                let mut halves = vec![bf16::ZERO; numbers.len()];
                halves.convert_from_f32_slice(numbers);
                let pairs = bytes.chunks_exact_mut(2).zip(halves);
                pairs.for_each(|(pair, half)| pair.copy_from_slice(&half.to_ne_bytes()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocks(float: Float, keys_are_transposed: bool) -> Int8Blocks {
        let (num_heads, block_tokens, head_dim) = (4, 32, 20);
        let value_stride = if keys_are_transposed { 24 } else { 20 };
        Int8Blocks { num_heads, block_tokens, head_dim, value_stride, keys_are_transposed, float }
    }

    /// The token of an element, and whether it is of a key.
    fn token_of(blocks: &Int8Blocks, element: usize) -> (usize, bool) {
        let place = element % blocks.head_len();
        match place.checked_sub(blocks.keys_len()) {
            None if blocks.keys_are_transposed => (place % blocks.block_tokens, true),
            None => (place / blocks.head_dim, true),
            Some(place) => (place / blocks.value_stride, false),
        }
    }

    fn bytes_of(blocks: &Int8Blocks, numbers: &[f32]) -> Vec<u8> {
        let mut bytes = vec![0; blocks.block_bytes()];
        blocks.float.write(numbers, &mut bytes);
        bytes
    }

    fn numbers_of(blocks: &Int8Blocks, bytes: &[u8]) -> Vec<f32> {
        let mut numbers = vec![0.0; blocks.num_heads * blocks.head_len()];
        blocks.float.read(bytes, &mut numbers);
        numbers
    }

    fn there_and_back(blocks: &Int8Blocks, bytes: &[u8]) -> Vec<u8> {
        let encoded = blocks.encode(bytes);
        assert_eq!(encoded.len(), blocks.encoded_bytes());
        let mut decoded = vec![0xaa; bytes.len()];
        blocks.decode(&encoded, &mut decoded);
        decoded
    }

    /// In every type and order, what comes back is within half a scale of its own token, though tokens of very different size
    /// lie beside each other; zeros stay zeros, and a token with one element that is no number becomes no numbers, whole and
    /// alone.
    #[test]
    fn elements_come_back_within_half_a_scale() {
        let types = [(Float::F32, 1e-6), (Float::F16, 1e-3), (Float::Bf16, 8e-3)];
        for (float, rounding, is_transposed) in types.into_iter().flat_map(|(f, r)| [(f, r, true), (f, r, false)]) {
            let blocks = blocks(float, is_transposed);
            let mut numbers: Vec<f32> = (0..blocks.num_heads * blocks.head_len())
                .map(|i| (((i * 7_919) % 2_003) as f32 / 1_001.5 - 1.0, token_of(&blocks, i).0))
                .map(|(x, token)| if token == 3 { 0.0 } else { x * 4_f32.powi(token as i32 % 5 - 2) })
                .collect();
            let (lost, infinite) = (5, blocks.head_len() + blocks.keys_len() + 7);
            (numbers[lost], numbers[infinite]) = (f32::NAN, f32::INFINITY);
            let before = numbers_of(&blocks, &bytes_of(&blocks, &numbers));
            let after = numbers_of(&blocks, &there_and_back(&blocks, &bytes_of(&blocks, &numbers)));
            let of = |i: usize| (i / blocks.head_len(), token_of(&blocks, i));
            let mut largest = std::collections::HashMap::new();
            for (i, x) in before.iter().enumerate() {
                let entry = largest.entry(of(i)).or_insert(0.0_f32);
                *entry = entry.max(x.abs());
            }
            let (mut worst, mut num_rounded) = ((0, 0.0_f32), 0);
            for (i, (before, after)) in before.iter().zip(&after).enumerate() {
                if [of(lost), of(infinite)].contains(&of(i)) {
                    assert!(after.is_nan(), "{float:?}: element {i} is {after}");
                    continue;
                }
                assert!(after.is_finite(), "{float:?}: element {i} is {after}");
                let beyond = (before - after).abs() - largest[&of(i)] * (0.5 / LEVELS + rounding);
                worst = if beyond > worst.1 { (i, beyond) } else { worst };
                num_rounded += usize::from(before != after);
            }
            assert_eq!(worst.1, 0.0, "{float:?}: element {} is {} too far off", worst.0, worst.1);
            assert!(num_rounded > before.len() / 2, "{float:?}: {num_rounded} were rounded");
        }
    }

    /// Numbers that are too small for a scale become zeros, the largest ones stay within the type.
    #[test]
    fn extremes_stay_within_the_type() {
        for float in [Float::F32, Float::F16, Float::Bf16] {
            let blocks = blocks(float, true);
            let largest = match float {
                Float::F32 => f32::MAX / 2.0,
                Float::F16 => f16::MAX.to_f32(),
                Float::Bf16 => bf16::MAX.to_f32(),
            };
            for x in [1e-42, -largest, largest] {
                let numbers = vec![x; blocks.num_heads * blocks.head_len()];
                let after = numbers_of(&blocks, &there_and_back(&blocks, &bytes_of(&blocks, &numbers)));
                let expected = if x.abs() < 1e-40 { 0.0 } else { x };
                let worst = after.iter().map(|y| (y / 127.0 - expected / 127.0).abs()).fold(0.0, f32::max);
                assert!(
                    worst <= expected.abs() * 1e-4 && after.iter().all(|y| y.is_finite()),
                    "{float:?} {x}: {worst}"
                );
            }
        }
    }

    /// Half the bytes of f16, but for the scales.
    #[test]
    fn eight_bits_are_half_of_sixteen() {
        let blocks = Int8Blocks { head_dim: 128, value_stride: 128, ..blocks(Float::F16, true) };
        let ratio = blocks.block_bytes() as f64 / blocks.encoded_bytes() as f64;
        assert!((1.9..2.0).contains(&ratio), "{ratio}");
    }
}
