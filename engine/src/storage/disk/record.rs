//! The bytes of a segment file, and what must hold before any of them is believed. All numbers are little-endian.
//!
//! ```text
//! segment:  [ segment header | zeros to the page ] [ record ] [ record ] ..        each begins on a page of 4 KiB
//! record:   [ header, 144 bytes | payload | zeros to the page ]
//!
//! header:     0 magic          8   "nsllmKVR"
//!             8 version        4   1
//!            12 header bytes   4   144
//!            16 payload bytes  8
//!            24 sequence       8   grows within a segment
//!            32 nonce         16   that of the segment: random, drawn when the file is created
//!            48 content       32
//!            80 layout id     32
//!           112 payload check 16   XXH3-128 of bytes 0..112 and the payload
//!           128 header check  16   XXH3-128 of bytes 0..128
//! ```
//!
//! On the first page, at byte 64, a segment may say whom its records count for: magic "nsllmKVO", 16 bytes of the owner's hash,
//! XXH3-128 of both. A page without that, or with a damaged one, is of no owner in particular; nothing but which segment
//! goes first depends on it.
//!
//! The checksum of the payload covers the key, so that a payload under another key is damage; the nonce and the growing
//! sequence keep a record from being believed in another file, in space that was cut and written again, and inside of
//! another record's payload. A checksum finds accidents, it is no proof against an adversary: each field is checked against
//! its range as well, and nothing is allocated from a length before that.

use twox_hash::XxHash3_128;

use crate::storage::fault::Damage;
use crate::storage::key::{LayoutId, RecordKey};

/// Records begin at multiples of this.
pub const PAGE_BYTES: u64 = 4096;
/// Version of these formats. A file's name carries it, so that no damage inside a file looks like a newer version.
pub const FORMAT_VERSION: u32 = 1;
/// Bytes of a record's header.
pub const HEADER_BYTES: usize = 144;
/// Numbers of segments and records stay below this: counting on from one that was read cannot overflow.
pub const MAX_NUMBER: u64 = 1 << 62;

const RECORD_MAGIC: [u8; 8] = *b"nsllmKVR";
const SEGMENT_MAGIC: [u8; 8] = *b"nsllmKVS";
const OWNER_MAGIC: [u8; 8] = *b"nsllmKVO";
/// Where the owner's mark is on the first page, and its bytes.
const OWNER_AT: usize = 64;
const OWNER_BYTES: usize = 40;
/// Bytes of a segment's header: magic, version, its own length, segment number, nonce, checksum.
const SEGMENT_HEADER_BYTES: usize = 56;
/// Bytes of a record's header that the checksum of its payload covers.
const PAYLOAD_CHECK_AT: usize = 112;
const HEADER_CHECK_AT: usize = 128;

/// Random bytes of one segment file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Nonce(pub [u8; 16]);

/// Beginning of the hash of an owner. Zeros: of no owner in particular.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct SegmentOwner(pub [u8; 16]);

/// First page of the segment file `segment`.
pub fn segment_page(segment: u64, nonce: Nonce, owner: SegmentOwner) -> Vec<u8> {
    let mut page = Vec::with_capacity(PAGE_BYTES as usize);
    page.extend(SEGMENT_MAGIC);
    page.extend(FORMAT_VERSION.to_le_bytes());
    page.extend((SEGMENT_HEADER_BYTES as u32).to_le_bytes());
    page.extend(segment.to_le_bytes());
    page.extend(nonce.0);
    page.extend(checksum(&page).to_le_bytes());
    debug_assert_eq!(page.len(), SEGMENT_HEADER_BYTES);
    if owner != SegmentOwner::default() {
        page.resize(OWNER_AT, 0);
        page.extend(OWNER_MAGIC);
        page.extend(owner.0);
        page.extend(checksum(&page[OWNER_AT..]).to_le_bytes());
    }
    page.resize(PAGE_BYTES as usize, 0);
    page
}

/// Whom the records of a segment count for, whose first page is `page`.
pub fn parse_segment_owner(page: &[u8]) -> SegmentOwner {
    let mark = page.get(OWNER_AT..OWNER_AT + OWNER_BYTES).filter(|mark| mark.starts_with(&OWNER_MAGIC));
    let is_sound = |mark: &&[u8]| checksum(&mark[..24]) == u128::from_le_bytes(field(mark, 24));
    mark.filter(is_sound).map_or(SegmentOwner::default(), |mark| SegmentOwner(field(mark, 8)))
}

/// The nonce of the segment file `segment`, whose first page is `page`.
pub fn parse_segment_page(page: &[u8], segment: u64) -> Result<Nonce, Damage> {
    let header = page.get(..SEGMENT_HEADER_BYTES).ok_or(Damage::Truncated)?;
    check_start(header, SEGMENT_MAGIC, SEGMENT_HEADER_BYTES)?;
    if checksum(&header[..40]) != u128::from_le_bytes(field(header, 40)) {
        return Err(Damage::HeaderChecksum);
    }
    if u64::from_le_bytes(field(header, 16)) != segment {
        return Err(Damage::Key);
    }
    Ok(Nonce(field(header, 24)))
}

/// What the header of a record says, once it is checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordHeader {
    /// What the payload is found by.
    pub key: RecordKey,
    /// Of the segment.
    pub nonce: Nonce,
    /// Place among all records.
    pub sequence: u64,
    /// Length of the payload.
    pub payload_bytes: u64,
    payload_check: u128,
}

/// What a header must agree with.
#[derive(Debug, Clone, Copy)]
pub struct Expected {
    /// Nonce of the segment.
    pub nonce: Nonce,
    /// Sequence of the record before.
    pub last_sequence: Option<u64>,
    /// Longest payload.
    pub max_payload_bytes: u64,
    /// Bytes of the file from the header on.
    pub rest_bytes: u64,
}

impl RecordHeader {
    /// A record as it is written: header, payload, zeros to the page.
    pub fn record(key: RecordKey, nonce: Nonce, sequence: u64, payload: &[u8]) -> Vec<u8> {
        let record_bytes = record_bytes(payload.len() as u64) as usize;
        let mut record = Vec::with_capacity(record_bytes);
        record.extend(RECORD_MAGIC);
        record.extend(FORMAT_VERSION.to_le_bytes());
        record.extend((HEADER_BYTES as u32).to_le_bytes());
        record.extend((payload.len() as u64).to_le_bytes());
        record.extend(sequence.to_le_bytes());
        record.extend(nonce.0);
        record.extend(key.content);
        record.extend(key.layout.0);
        record.extend(payload_checksum(&record, payload).to_le_bytes());
        record.extend(checksum(&record).to_le_bytes());
        debug_assert_eq!(record.len(), HEADER_BYTES);
        record.extend(payload);
        record.resize(record_bytes, 0);
        record
    }

    /// Checks everything that can be checked without the payload.
    pub fn parse(header: &[u8], expected: &Expected) -> Result<Self, Damage> {
        let header = header.get(..HEADER_BYTES).ok_or(Damage::Truncated)?;
        check_start(header, RECORD_MAGIC, HEADER_BYTES)?;
        if checksum(&header[..HEADER_CHECK_AT]) != u128::from_le_bytes(field(header, HEADER_CHECK_AT)) {
            return Err(Damage::HeaderChecksum);
        }
        let parsed = RecordHeader {
            key: RecordKey { content: field(header, 48), layout: LayoutId(field(header, 80)) },
            nonce: Nonce(field(header, 32)),
            sequence: u64::from_le_bytes(field(header, 24)),
            payload_bytes: u64::from_le_bytes(field(header, 16)),
            payload_check: u128::from_le_bytes(field(header, PAYLOAD_CHECK_AT)),
        };
        if parsed.nonce != expected.nonce {
            return Err(Damage::Nonce);
        }
        let last = expected.last_sequence;
        if parsed.sequence >= MAX_NUMBER || last.is_some_and(|last| parsed.sequence <= last) {
            return Err(Damage::Sequence { found: parsed.sequence, last: last.unwrap_or(0) });
        }
        // A whole record ends with its page, so only the rest of the file in whole pages counts.
        let rest_bytes = (expected.rest_bytes / PAGE_BYTES * PAGE_BYTES).saturating_sub(HEADER_BYTES as u64);
        let limit_bytes = expected.max_payload_bytes.min(rest_bytes);
        if parsed.payload_bytes > limit_bytes {
            return Err(Damage::Length { found_bytes: parsed.payload_bytes, limit_bytes });
        }
        Ok(parsed)
    }

    /// Checks that `payload` is what was written after this header, whose bytes are `header`.
    pub fn check_payload(&self, header: &[u8], payload: &[u8]) -> Result<(), Damage> {
        let covered = header.get(..PAYLOAD_CHECK_AT).ok_or(Damage::Truncated)?;
        match payload_checksum(covered, payload) == self.payload_check {
            true => Ok(()),
            false => Err(Damage::PayloadChecksum),
        }
    }
}

/// Bytes that a record of `payload_bytes` takes in its file.
pub fn record_bytes(payload_bytes: u64) -> u64 {
    (HEADER_BYTES as u64 + payload_bytes).next_multiple_of(PAGE_BYTES)
}

fn check_start(header: &[u8], magic: [u8; 8], header_bytes: usize) -> Result<(), Damage> {
    if field::<8>(header, 0) != magic {
        return Err(Damage::Magic);
    }
    let (version, length) = (u32::from_le_bytes(field(header, 8)), u32::from_le_bytes(field(header, 12)));
    match (version, length as usize) == (FORMAT_VERSION, header_bytes) {
        true => Ok(()),
        false => Err(Damage::Version),
    }
}

/// `N` bytes at `offset` of a header whose length was checked.
fn field<const N: usize>(header: &[u8], offset: usize) -> [u8; N] {
    header[offset..offset + N].try_into().expect("N bytes")
}

fn checksum(bytes: &[u8]) -> u128 {
    XxHash3_128::oneshot(bytes)
}

fn payload_checksum(covered: &[u8], payload: &[u8]) -> u128 {
    let mut hasher = XxHash3_128::new();
    hasher.write(covered);
    hasher.write(payload);
    hasher.finish_128()
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONCE: Nonce = Nonce([7; 16]);
    const KEY: RecordKey = RecordKey { content: [1; 32], layout: LayoutId([2; 32]) };

    fn expected() -> Expected {
        Expected { nonce: NONCE, last_sequence: Some(4), max_payload_bytes: 6000, rest_bytes: 8192 }
    }

    /// Makes the header's checksum right again after a change: only the other checks can see it.
    fn reseal(record: &mut [u8]) {
        let check = checksum(&record[..HEADER_CHECK_AT]).to_le_bytes();
        record[HEADER_CHECK_AT..HEADER_BYTES].copy_from_slice(&check);
    }

    /// What is written is read again, up to the longest payload, and fills whole pages.
    #[test]
    fn record_survives() {
        for length in [0, 1, 3951, 3952, 3953, 6000] {
            let payload: Vec<u8> = (0..length).map(|i| (i * 7 % 251) as u8).collect();
            let record = RecordHeader::record(KEY, NONCE, 5, &payload);
            assert_eq!(record.len() as u64, record_bytes(length as u64));
            assert_eq!(record.len() % 4096, 0);
            let header = RecordHeader::parse(&record, &expected()).expect("sound");
            assert_eq!((header.key, header.sequence, header.payload_bytes), (KEY, 5, length as u64));
            header.check_payload(&record, &record[HEADER_BYTES..HEADER_BYTES + length]).expect("sound");
        }
        let page = segment_page(9, NONCE, SegmentOwner::default());
        assert_eq!((page.len(), parse_segment_page(&page, 9)), (4096, Ok(NONCE)));
    }

    /// Each way in which a header can lie has its own name, also when its checksum is right.
    #[test]
    fn each_lie_is_named() {
        let lie = |change: fn(&mut Vec<u8>)| {
            let mut record = RecordHeader::record(KEY, NONCE, 5, &[3; 100]);
            change(&mut record);
            RecordHeader::parse(&record, &expected()).expect_err("a lie")
        };
        assert_eq!(lie(|record| record.truncate(HEADER_BYTES - 1)), Damage::Truncated);
        assert_eq!(lie(|record| record[0] ^= 1), Damage::Magic);
        assert_eq!(lie(|record| record[8] += 1), Damage::Version);
        assert_eq!(lie(|record| record[12] += 1), Damage::Version);
        assert_eq!(lie(|record| record[48] ^= 1), Damage::HeaderChecksum);
        let with = |offset: usize, value: u64| {
            let mut record = RecordHeader::record(KEY, NONCE, 5, &[3; 100]);
            record[offset..offset + 8].copy_from_slice(&value.to_le_bytes());
            reseal(&mut record);
            RecordHeader::parse(&record, &expected()).expect_err("a lie")
        };
        assert_eq!(with(32, 8), Damage::Nonce);
        for found in [0, 4, MAX_NUMBER, u64::MAX] {
            assert_eq!(with(24, found), Damage::Sequence { found, last: 4 });
        }
        for found_bytes in [6001, 8192, 1 << 40, u64::MAX] {
            assert_eq!(with(16, found_bytes), Damage::Length { found_bytes, limit_bytes: 6000 });
        }
        let short = Expected { rest_bytes: 8191, ..expected() };
        let record = RecordHeader::record(KEY, NONCE, 5, &[3; 4000]);
        let limit_bytes = 4096 - HEADER_BYTES as u64;
        assert_eq!(
            RecordHeader::parse(&record, &short),
            Err(Damage::Length { found_bytes: 4000, limit_bytes }),
            "the page of the record's end is not whole"
        );
        let page = segment_page(9, NONCE, SegmentOwner::default());
        assert_eq!(parse_segment_page(&page, 8), Err(Damage::Key));
        assert_eq!(parse_segment_page(&page[..20], 9), Err(Damage::Truncated));
    }

    /// No bit of a record can flip unseen, but for those of the padding, which nobody reads; and a payload belongs to
    /// its key, layout and segment.
    #[test]
    fn every_bit_counts() {
        let record = RecordHeader::record(KEY, NONCE, 5, &[3; 300]);
        let is_sound = |record: &[u8]| {
            RecordHeader::parse(record, &expected())
                .and_then(|header| header.check_payload(record, &record[HEADER_BYTES..HEADER_BYTES + 300]))
        };
        is_sound(&record).expect("sound");
        for bit in 0..(HEADER_BYTES + 300) * 8 {
            let mut flipped = record.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(is_sound(&flipped).is_err(), "bit {bit}");
        }
        let other = [
            RecordHeader::record(RecordKey { content: [9; 32], ..KEY }, NONCE, 5, &[4; 300]),
            RecordHeader::record(RecordKey { layout: LayoutId([9; 32]), ..KEY }, NONCE, 5, &[4; 300]),
            RecordHeader::record(KEY, NONCE, 6, &[4; 300]),
        ];
        for other in other {
            let swapped = [&other[..HEADER_BYTES], &record[HEADER_BYTES..]].concat();
            assert_eq!(is_sound(&swapped), Err(Damage::PayloadChecksum));
        }
    }
}
