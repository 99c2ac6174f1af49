//! The bytes of a value in a store that nodes share, and what must hold before any of them is believed. All numbers are
//! little-endian.
//!
//! ```text
//!   0 magic          8   "nsllmKVN"
//!   8 version        4   1
//!  12 header bytes   4   144
//!  16 payload bytes  8
//!  24 zeros          8
//!  32 content       32
//!  64 layout id     32
//!  96 check         16   XXH3-128 of bytes 0..96 and the payload
//! 112 code          32   HMAC-SHA256 of bytes 0..112 and the payload, or zeros when there is no secret
//! 144 payload
//! ```
//!
//! The check covers the whole key, so a payload under another key is damage. It finds accidents; only the code, which
//! needs the secret, is proof against a store that means harm.

#![deny(clippy::arithmetic_side_effects, clippy::indexing_slicing)]

use hmac::Mac;
use twox_hash::XxHash3_128;

use super::secret::Secret;
use crate::storage::fault::Damage;
use crate::storage::key::RecordKey;

/// Version of the format. The names of records carry it too, so that versions do not meet.
pub const VERSION: u32 = 1;
/// Bytes before the payload.
pub const HEADER_BYTES: usize = 144;

const MAGIC: &[u8; 8] = b"nsllmKVN";
const CODE_DOMAIN: &[u8] = b"ns-llm remote record\0";
const CHECK_AT: usize = 96;
const CODE_AT: usize = 112;
const CODE_BYTES: usize = HEADER_BYTES - CODE_AT;

/// A record as it is stored.
pub(super) fn record(key: &RecordKey, payload: &[u8], secret: Option<&Secret>) -> Vec<u8> {
    let mut record = Vec::with_capacity(HEADER_BYTES.saturating_add(payload.len()));
    record.extend(start(key, payload.len() as u64));
    record.extend(checksum(&record, payload).to_le_bytes());
    match secret {
        None => record.extend([0; CODE_BYTES]),
        Some(secret) => {
            let code = secret.code(&[CODE_DOMAIN, &record, payload]).finalize().into_bytes();
            record.extend(code);
        }
    }
    debug_assert_eq!(record.len(), HEADER_BYTES);
    record.extend(payload);
    record
}

/// Checks that `value` is the record of `key` and of nothing else, whole.
pub(super) fn check(value: &[u8], key: &RecordKey, secret: Option<&Secret>) -> Result<(), Damage> {
    let (header, payload) = value.split_at_checked(HEADER_BYTES).ok_or(Damage::Truncated)?;
    let (covered, code) = header.split_at_checked(CODE_AT).ok_or(Damage::Truncated)?;
    let (found, check) = covered.split_at_checked(CHECK_AT).ok_or(Damage::Truncated)?;
    // All bytes of a sound beginning are known before it is read; the rest only says what is wrong with another.
    if found != start(key, payload.len() as u64) {
        return Err(difference(found, payload.len() as u64));
    }
    if check != checksum(found, payload).to_le_bytes() {
        return Err(Damage::PayloadChecksum);
    }
    match secret {
        None if code == [0; CODE_BYTES] => Ok(()),
        Some(secret) if secret.code(&[CODE_DOMAIN, covered, payload]).verify_slice(code).is_ok() => Ok(()),
        _ => Err(Damage::Code),
    }
}

/// Everything before the check.
fn start(key: &RecordKey, payload_bytes: u64) -> Vec<u8> {
    let mut start = Vec::with_capacity(CHECK_AT);
    start.extend(MAGIC);
    start.extend(VERSION.to_le_bytes());
    start.extend((HEADER_BYTES as u32).to_le_bytes());
    start.extend(payload_bytes.to_le_bytes());
    start.extend([0; 8]);
    start.extend(key.content);
    start.extend(key.layout.0);
    start
}

/// The first thing in which `found` is not the start of the record that was asked for, with a payload of `payload_bytes`.
fn difference(found: &[u8], payload_bytes: u64) -> Damage {
    let field = |at: usize| found.get(at..).and_then(|rest| rest.first_chunk::<8>()).copied().unwrap_or_default();
    let declared_bytes = u64::from_le_bytes(field(16));
    let version = u64::from(VERSION) | (HEADER_BYTES as u64) << 32;
    if &field(0) != MAGIC {
        Damage::Magic
    } else if u64::from_le_bytes(field(8)) != version || field(24) != [0; 8] {
        Damage::Version
    } else if declared_bytes != payload_bytes {
        Damage::Length { found_bytes: declared_bytes, limit_bytes: payload_bytes }
    } else {
        Damage::Key
    }
}

fn checksum(start: &[u8], payload: &[u8]) -> u128 {
    let mut hasher = XxHash3_128::new();
    hasher.write(start);
    hasher.write(payload);
    hasher.finish_128()
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects, clippy::indexing_slicing, reason = "a test may panic")]
mod tests {
    use super::*;
    use crate::storage::key::LayoutId;

    const KEY: RecordKey = RecordKey { content: [1; 32], layout: LayoutId([2; 32]) };
    const PAYLOAD: [u8; 300] = [3; 300];

    fn secret(letter: u8) -> Secret {
        Secret::new(&[letter; 32])
    }

    /// Makes the checksum right again after a change: only the other checks can see it.
    fn reseal(record: &mut [u8]) {
        let (header, payload) = record.split_at(HEADER_BYTES);
        let check = checksum(&header[..CHECK_AT], payload).to_le_bytes();
        record[CHECK_AT..CODE_AT].copy_from_slice(&check);
    }

    /// What is written is read again, with a secret and without, and belongs to its key and its secret.
    #[test]
    fn record_belongs_to_key_and_secret() {
        for secret in [None, Some(secret(b'a'))] {
            for payload in [&[][..], &PAYLOAD] {
                let record = record(&KEY, payload, secret.as_ref());
                assert_eq!(record.len(), HEADER_BYTES + payload.len());
                assert_eq!(check(&record, &KEY, secret.as_ref()), Ok(()));
                let other = RecordKey { content: [9; 32], ..KEY };
                assert_eq!(check(&record, &other, secret.as_ref()), Err(Damage::Key));
                let other = RecordKey { layout: LayoutId([9; 32]), ..KEY };
                assert_eq!(check(&record, &other, secret.as_ref()), Err(Damage::Key));
            }
        }
        let (open, keyed) = (record(&KEY, &PAYLOAD, None), record(&KEY, &PAYLOAD, Some(&secret(b'a'))));
        assert_eq!(check(&keyed, &KEY, None), Err(Damage::Code));
        assert_eq!(check(&open, &KEY, Some(&secret(b'a'))), Err(Damage::Code));
        assert_eq!(check(&keyed, &KEY, Some(&secret(b'b'))), Err(Damage::Code));
    }

    /// No bit flips unseen, no byte is missing or added unseen. With a secret also when the checksum was made right again.
    #[test]
    fn every_bit_counts() {
        for secret in [None, Some(secret(b'a'))] {
            let sound = record(&KEY, &PAYLOAD, secret.as_ref());
            for bit in 0..sound.len() * 8 {
                let mut flipped = sound.clone();
                flipped[bit / 8] ^= 1 << (bit % 8);
                assert!(check(&flipped, &KEY, secret.as_ref()).is_err(), "bit {bit}");
                reseal(&mut flipped);
                let is_check = (CHECK_AT..CODE_AT).contains(&(bit / 8));
                let is_seen = check(&flipped, &KEY, secret.as_ref()).is_err();
                assert!(is_seen || is_check || secret.is_none(), "resealed bit {bit}");
            }
            for len in 0..sound.len() {
                assert!(check(&sound[..len], &KEY, secret.as_ref()).is_err(), "{len} bytes");
            }
            assert!(check(&[&sound[..], &[0]].concat(), &KEY, secret.as_ref()).is_err(), "one byte too many");
        }
    }

    /// Each way to lie has its name, also when the checksum is right.
    #[test]
    fn each_lie_is_named() {
        let lie = |at: usize, value: u8| {
            let mut record = record(&KEY, &PAYLOAD, None);
            record[at] = value;
            reseal(&mut record);
            check(&record, &KEY, None).expect_err("a lie")
        };
        assert_eq!(lie(0, b'N'), Damage::Magic);
        assert_eq!(lie(8, 2), Damage::Version);
        assert_eq!(lie(12, 0), Damage::Version);
        assert_eq!(lie(24, 1), Damage::Version);
        assert_eq!(lie(23, 0x80), Damage::Length { found_bytes: (1 << 63) + 300, limit_bytes: 300 });
        assert_eq!(lie(33, 0), Damage::Key);
        assert_eq!(lie(70, 0), Damage::Key);
        assert_eq!(lie(120, 1), Damage::Code);
        assert_eq!(check(&[0; HEADER_BYTES - 1], &KEY, None), Err(Damage::Truncated));
    }
}
