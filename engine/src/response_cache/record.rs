//! An entry as it lies in a tier beyond the process, and a mark that makes entries invalid there.
//!
//! ```text
//! entry:  magic 4 "nsRE" | version u32 | begun u64 | stored u64 | expires u64 | tags u32 | (bytes u32 | text) .. | value
//! mark:   magic 4 "nsRI" | version u32 | at u64
//! ```
//!
//! All numbers are little-endian, all times milliseconds since 1970. These are the payloads of the tiers' own records, which
//! bind them to their keys with a checksum, and with a keyed code where nodes share a secret; so there is no second one
//! here. Reading believes nothing all the same: every length is that of bytes that are there, and every time has a range.
//!
//! **What a mark says.** What was begun before it, or in the same millisecond, is not to be used any more: an entry that was
//! stored after the mark may have been computed from what the mark made invalid.

use std::sync::Arc;

use crate::config::{MAX_CLOCK_SKEW_MS, MAX_NAME_BYTES, MAX_RESPONSE_BYTES, MAX_RESPONSE_TAGS, MAX_RESPONSE_TTL_MS};

const ENTRY_MAGIC: [u8; 4] = *b"nsRE";
const MARK_MAGIC: [u8; 4] = *b"nsRI";
const VERSION: u32 = 1;
/// Bytes before the tags.
const START_BYTES: usize = 36;
/// Longest entry.
pub const MAX_ENTRY_BYTES: usize = START_BYTES + MAX_RESPONSE_TAGS * (4 + MAX_NAME_BYTES) + MAX_RESPONSE_BYTES;

/// An entry with everything that its use depends on beside its key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredEntry {
    /// When its computation began.
    pub begun_ms: u64,
    /// When it was stored.
    pub stored_ms: u64,
    /// From when on it is not found.
    pub expires_ms: u64,
    /// Names under which it can be made invalid.
    pub tags: Arc<[Arc<str>]>,
    /// An encoded [`CachedAnswer`](super::CachedAnswer).
    pub value: Arc<[u8]>,
}

impl StoredEntry {
    /// Its bytes.
    pub fn encode(&self) -> Vec<u8> {
        let tag_bytes: usize = self.tags.iter().map(|tag| 4 + tag.len()).sum();
        let mut bytes = Vec::with_capacity(START_BYTES + tag_bytes + self.value.len());
        bytes.extend(ENTRY_MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        for time_ms in [self.begun_ms, self.stored_ms, self.expires_ms] {
            bytes.extend(time_ms.to_le_bytes());
        }
        bytes.extend((self.tags.len() as u32).to_le_bytes());
        for tag in self.tags.iter() {
            bytes.extend((tag.len() as u32).to_le_bytes());
            bytes.extend(tag.bytes());
        }
        bytes.extend(&*self.value);
        bytes
    }

    /// The entry of these bytes; `None`: they are none.
    pub fn decode(bytes: &[u8]) -> Option<StoredEntry> {
        let mut reader = Reader(bytes);
        reader.start(ENTRY_MAGIC)?;
        let (begun_ms, stored_ms, expires_ms) = (reader.u64()?, reader.u64()?, reader.u64()?);
        let is_ordered = begun_ms <= stored_ms && stored_ms <= expires_ms;
        if !is_ordered || expires_ms - stored_ms > MAX_RESPONSE_TTL_MS {
            return None;
        }
        let num_tags = reader.u32().filter(|&num| num as usize <= MAX_RESPONSE_TAGS)?;
        let tags = (0..num_tags).map(|_| reader.tag()).collect::<Option<Arc<[_]>>>()?;
        let value: Arc<[u8]> = Some(reader.0).filter(|value| value.len() <= MAX_RESPONSE_BYTES)?.into();
        Some(StoredEntry { begun_ms, stored_ms, expires_ms, tags, value })
    }

    /// Whether it may be used at `now_ms`, as far as times go. One from the future was stored by a clock that is wrong.
    pub fn is_current(&self, now_ms: u64) -> bool {
        now_ms < self.expires_ms && self.stored_ms <= now_ms.saturating_add(MAX_CLOCK_SKEW_MS)
    }
}

/// The bytes of a mark.
pub fn encode_mark(at_ms: u64) -> Vec<u8> {
    let mut bytes = MARK_MAGIC.to_vec();
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend(at_ms.to_le_bytes());
    bytes
}

/// When the mark of these bytes was made; `None`: they are none.
pub fn decode_mark(bytes: &[u8]) -> Option<u64> {
    let mut reader = Reader(bytes);
    reader.start(MARK_MAGIC)?;
    reader.u64().filter(|_| reader.0.is_empty())
}

/// What is left to be read.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }
    fn u32(&mut self) -> Option<u32> {
        self.take(4)?.try_into().ok().map(u32::from_le_bytes)
    }
    fn u64(&mut self) -> Option<u64> {
        self.take(8)?.try_into().ok().map(u64::from_le_bytes)
    }
    fn start(&mut self, magic: [u8; 4]) -> Option<()> {
        let is_known = self.take(4)? == magic && self.u32()? == VERSION;
        is_known.then_some(())
    }
    fn tag(&mut self) -> Option<Arc<str>> {
        let num_bytes = self.u32().filter(|&num| num as usize <= MAX_NAME_BYTES)?;
        std::str::from_utf8(self.take(num_bytes as usize)?).ok().map(Arc::from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(num_tags: usize) -> StoredEntry {
        let tags = (0..num_tags).map(|i| Arc::from("ä".repeat(i))).collect();
        let (begun_ms, stored_ms, expires_ms) = (1_000, 2_000, 3_000);
        StoredEntry { begun_ms, stored_ms, expires_ms, tags, value: vec![7; 300].into() }
    }

    /// What is written is read again; cut within what has a length it is nothing; a changed bit is nothing or another entry
    /// within its ranges, never a panic.
    #[test]
    fn entries_come_back() {
        for num_tags in [0, 1, MAX_RESPONSE_TAGS] {
            let entry = entry(num_tags);
            let bytes = entry.encode();
            assert_eq!(StoredEntry::decode(&bytes), Some(entry.clone()));
            let start = bytes.len() - entry.value.len();
            assert!((0..start).all(|end| StoredEntry::decode(&bytes[..end]).is_none()));
            let mut others = 0;
            for bit in 0..start * 8 {
                let mut changed = bytes.clone();
                changed[bit / 8] ^= 1 << (bit % 8);
                if let Some(other) = StoredEntry::decode(&changed) {
                    assert!(other.begun_ms <= other.stored_ms && other.stored_ms <= other.expires_ms);
                    assert_eq!(other.encode(), changed, "bit {bit}");
                    others += 1;
                }
            }
            assert!(others > 10 && others < start * 8, "{others}");
        }
        let long = StoredEntry { value: vec![0; MAX_RESPONSE_BYTES + 1].into(), ..entry(0) };
        assert_eq!(StoredEntry::decode(&long.encode()), None);
        let full = StoredEntry { value: vec![0; MAX_RESPONSE_BYTES].into(), ..entry(0) };
        assert!(full.encode().len() <= MAX_ENTRY_BYTES && StoredEntry::decode(&full.encode()).is_some());
    }

    /// An entry lives from when it was stored until its end, on a clock that may be a little behind.
    #[test]
    fn entries_have_their_time() {
        let at = |now_ms| StoredEntry { stored_ms: 100_000, expires_ms: 200_000, ..entry(0) }.is_current(now_ms);
        assert!(at(100_000) && at(199_999) && !at(200_000));
        assert!(at(100_000 - MAX_CLOCK_SKEW_MS) && !at(99_999 - MAX_CLOCK_SKEW_MS));
        let endless = StoredEntry { expires_ms: 2_000 + MAX_RESPONSE_TTL_MS + 1, ..entry(0) };
        assert_eq!(StoredEntry::decode(&endless.encode()), None, "nothing lives that long");
    }

    /// A mark is sixteen bytes that say when, and nothing else is a mark.
    #[test]
    fn marks_come_back() {
        let bytes = encode_mark(u64::MAX - 1);
        assert_eq!(decode_mark(&bytes), Some(u64::MAX - 1));
        assert!((0..bytes.len()).all(|end| decode_mark(&bytes[..end]).is_none()));
        assert_eq!(decode_mark(&[&bytes[..], &[0]].concat()), None);
        assert_eq!((decode_mark(&entry(0).encode()), StoredEntry::decode(&bytes)), (None, None));
    }
}
