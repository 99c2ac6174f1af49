//! Promise: whatever happens to the bytes of a segment file, no block is wrong and nothing panics; and a survey of the files
//! sees every change of a byte that anyone reads. Every byte of a segment is changed in turn; then many at once.

use ns_llm::sampler::random_at;
use ns_llm::storage::disk::{Access, DiskOptions, DiskStore, PAGE_BYTES, Survey, record_bytes, survey};
use ns_llm::storage::{Fault, LayoutId, RecordKey};

use crate::sim_disk::SimDisk;

const MAX_PAYLOAD_BYTES: u64 = 6_000;
/// Bytes of a record's header.
const HEADER_BYTES: u64 = 144;
/// One page and a few records: all in one segment.
const BLOCKS: [u64; 3] = [700, 5_000, 30];

fn key(name: u64) -> RecordKey {
    RecordKey { content: [name as u8 + 1; 32], layout: LayoutId([7; 32]) }
}

fn payload(name: u64) -> Vec<u8> {
    (0..BLOCKS[name as usize]).map(|i| random_at(name, i) as u8).collect()
}

fn open(disk: &SimDisk, access: Access) -> Result<DiskStore, Fault> {
    let options = DiskOptions::new(1 << 20, MAX_PAYLOAD_BYTES).expect("room");
    DiskStore::open(Box::new(disk.clone()), access, options, [5; 16])
}

fn filled() -> SimDisk {
    let disk = SimDisk::new(1);
    let mut tier = open(&disk, Access::Write).expect("an empty disk");
    for name in 0..BLOCKS.len() as u64 {
        tier.put(key(name), &payload(name)).expect("room");
    }
    tier.flush().expect("syncs");
    disk
}

/// A disk with one segment of these bytes.
fn disk_of(bytes: &[u8]) -> SimDisk {
    let disk = SimDisk::new(1);
    disk.set_contents([(0, bytes.to_vec())].into());
    disk
}

/// Every block that the tier gives is right; says how many it gives.
fn count_right(bytes: &[u8], what: &str) -> usize {
    let mut right = 0;
    for access in [Access::Read, Access::Write] {
        right = 0;
        let mut tier = open(&disk_of(bytes), access).expect("always opens");
        for name in 0..BLOCKS.len() as u64 {
            if let Ok(Some(found)) = tier.get(&key(name)) {
                assert!(*found == *payload(name), "{what}: block {name} is wrong");
                right += 1;
            }
        }
        let keys: Vec<RecordKey> = tier.keys().copied().collect();
        assert!(keys.iter().all(|found| (0..3).any(|name| *found == key(name))), "{what}: a key out of nothing");
        tier.check_invariants().expect("sound");
    }
    right
}

fn surveyed(bytes: &[u8]) -> Survey {
    survey(&mut disk_of(bytes), true).expect("no faults")
}

/// Bytes that nobody reads: zeros up to the end of a page.
fn is_padding(at: u64) -> bool {
    if at < PAGE_BYTES {
        return at >= 56;
    }
    let mut start = PAGE_BYTES;
    for payload_bytes in BLOCKS {
        if at < start + record_bytes(payload_bytes) {
            return at >= start + HEADER_BYTES + payload_bytes;
        }
        start += record_bytes(payload_bytes);
    }
    true
}

#[test]
fn every_byte_of_a_segment_counts() {
    let sound = filled().contents().remove(&0).expect("one segment");
    let untouched = surveyed(&sound);
    assert_eq!((untouched.records, untouched.live, untouched.damaged, untouched.torn_bytes), (3, 3, 0, 0));
    assert_eq!(count_right(&sound, "untouched"), 3);
    let (mut seen, mut unseen) = (0, 0);
    for at in 0..sound.len() {
        // Of the many bytes that nobody reads some are enough.
        if is_padding(at as u64) && at % 32 != 0 {
            continue;
        }
        let mut changed = sound.clone();
        changed[at] ^= 1 << (at % 8);
        let what = format!("byte {at}");
        let (right, found) = (count_right(&changed, &what), surveyed(&changed));
        if is_padding(at as u64) {
            assert_eq!((right, found.damaged, found.records), (3, 0, 3), "{what} is read by nobody");
            unseen += 1;
        } else {
            assert!(right < 3 && found.damaged == 1 && found.records == right as u64, "{what}: {found:?}");
            seen += 1;
        }
    }
    assert!(seen == 56 + 3 * 144 + 5_730 && unseen > 150, "{seen} seen, {unseen} not");
}

#[test]
fn every_length_of_a_segment_is_torn_or_whole() {
    let sound = filled().contents().remove(&0).expect("one segment");
    for len in 0..sound.len() {
        let (right, found) = (count_right(&sound[..len], &format!("{len} bytes")), surveyed(&sound[..len]));
        assert_eq!(found.damaged, 0, "{len} bytes: {found:?}");
        assert!(
            found.records == right as u64 && (found.torn_bytes > 0 || right > 0 || len <= 4_096),
            "{len}: {found:?}"
        );
    }
}

#[test]
fn random_changes_never_show() {
    let sound = filled().contents().remove(&0).expect("one segment");
    let rounds = if std::env::var_os("NS_LLM_SOAK").is_some() { 200_000 } else { 2_000 };
    let (mut damaged, mut right) = (0, 0);
    for seed in 0..rounds {
        let mut draw = {
            let mut count = 0;
            move |bound: usize| {
                count += 1;
                (random_at(seed, count) % bound as u64) as usize
            }
        };
        let mut changed = sound.clone();
        for _ in 0..=draw(4) {
            let from = draw(changed.len());
            let to = (from + 1 + draw(200)).min(changed.len());
            match draw(5) {
                0 => changed[from..to].iter_mut().for_each(|byte| *byte = draw(256) as u8),
                1 => changed[from..to].fill(0),
                2 => changed.truncate(from.max(1)),
                // A page of one place stands in another.
                3 => {
                    let pages = changed.len() / 4_096;
                    if pages > 1 {
                        let (source, target) = (draw(pages) * 4_096, draw(pages) * 4_096);
                        changed.copy_within(source..source + 4_096, target);
                    }
                }
                _ => changed.extend_from_within(from..to),
            }
        }
        right += count_right(&changed, &format!("seed {seed}"));
        damaged += surveyed(&changed).damaged;
    }
    assert!(right > 100 && damaged > 100, "{right} right, {damaged} damaged");
}
