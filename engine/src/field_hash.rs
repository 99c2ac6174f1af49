//! A hash over named fields: what things are found by that outlive a process, or must never be taken for one another. Each
//! field is its tag, its length and its bytes, so no two different lists of fields have the same bytes. What is hashed is
//! named field by field: never the `Debug` text of a type, which changes with the name of a private field.

use sha2::{Digest, Sha256};

/// Names of the fields of one kind of hash. A number that was used for one field is never used for another.
pub trait FieldTag: Copy {
    /// The number of the name.
    fn number(self) -> u8;
}

/// SHA-256 over the fields that were given so far. One that is meant to be apart from all others begins with a field that
/// says what it is.
pub struct FieldHash<T> {
    hasher: Sha256,
    tags: std::marker::PhantomData<T>,
}

impl<T: FieldTag> FieldHash<T> {
    /// Over nothing yet.
    #[allow(clippy::new_without_default, reason = "a hash over nothing is of no use")]
    pub fn new() -> Self {
        FieldHash { hasher: Sha256::new(), tags: std::marker::PhantomData }
    }

    /// Bytes.
    pub fn field(mut self, tag: T, bytes: &[u8]) -> Self {
        self.begin(tag, bytes.len());
        self.hasher.update(bytes);
        self
    }

    /// A text.
    pub fn text(self, tag: T, text: &str) -> Self {
        self.field(tag, text.as_bytes())
    }

    /// A count or a size.
    pub fn number(self, tag: T, number: u64) -> Self {
        self.field(tag, &number.to_le_bytes())
    }

    /// A number that may be absent.
    pub fn optional(self, tag: T, number: Option<u64>) -> Self {
        match number {
            None => self.field(tag, &[]),
            Some(number) => self.number(tag, number),
        }
    }

    /// A switch.
    pub fn flag(self, tag: T, is_set: bool) -> Self {
        self.field(tag, &[u8::from(is_set)])
    }

    /// A number with a fraction, bit for bit.
    pub fn float(self, tag: T, value: f32) -> Self {
        self.field(tag, &value.to_bits().to_le_bytes())
    }

    /// A list of numbers, without a copy of a long one.
    pub fn numbers(mut self, tag: T, numbers: &[u32]) -> Self {
        self.begin(tag, numbers.len() * 4);
        let mut bytes = [0; 1024];
        for chunk in numbers.chunks(bytes.len() / 4) {
            for (to, number) in bytes.chunks_exact_mut(4).zip(chunk) {
                to.copy_from_slice(&number.to_le_bytes());
            }
            self.hasher.update(&bytes[..chunk.len() * 4]);
        }
        self
    }

    /// The hash.
    pub fn finish(self) -> [u8; 32] {
        self.hasher.finalize().into()
    }

    fn begin(&mut self, tag: T, num_bytes: usize) {
        self.hasher.update([tag.number()]);
        self.hasher.update((num_bytes as u64).to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[derive(Clone, Copy)]
    enum Tag {
        A = 1,
        B,
    }

    impl FieldTag for Tag {
        fn number(self) -> u8 {
            self as u8
        }
    }

    fn hash() -> FieldHash<Tag> {
        FieldHash::new()
    }

    /// Bytes that move from one field to the next, another tag, another order and another number of fields are other hashes.
    #[test]
    fn fields_are_delimited() {
        let hashes = [
            hash(),
            hash().text(Tag::A, "ab"),
            hash().text(Tag::B, "ab"),
            hash().text(Tag::A, "a").text(Tag::B, "b"),
            hash().text(Tag::A, "ab").text(Tag::B, ""),
            hash().text(Tag::B, "").text(Tag::A, "ab"),
            hash().text(Tag::A, "").text(Tag::B, "ab"),
            hash().text(Tag::A, "").text(Tag::A, ""),
            hash().text(Tag::A, ""),
        ];
        let hashes: Vec<[u8; 32]> = hashes.into_iter().map(FieldHash::finish).collect();
        assert_eq!(hashes.iter().collect::<HashSet<_>>().len(), hashes.len());
    }

    /// A long list is hashed as its bytes in one piece; nothing is what is absent.
    #[test]
    fn numbers_are_little_endian() {
        let numbers: Vec<u32> = (0..1_000).map(|i| i * 7_919).collect();
        let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        assert_eq!(hash().numbers(Tag::A, &numbers).finish(), hash().field(Tag::A, &bytes).finish());
        assert_eq!(hash().optional(Tag::A, Some(7)).finish(), hash().number(Tag::A, 7).finish());
        assert_eq!(hash().optional(Tag::A, None).finish(), hash().field(Tag::A, &[]).finish());
    }

    /// The encoding, as a number that everything relies on which is found by such a hash.
    #[test]
    fn encoding_is_stable() {
        let encoded = [&[1][..], &2u64.to_le_bytes(), b"ab", &[2], &8u64.to_le_bytes(), &3u64.to_le_bytes()].concat();
        let expected: [u8; 32] = Sha256::digest(encoded).into();
        assert_eq!(hash().text(Tag::A, "ab").number(Tag::B, 3).finish(), expected);
    }
}
