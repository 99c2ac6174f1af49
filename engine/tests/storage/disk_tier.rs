//! Promise: the disk tier always opens, never returns bytes that were not stored under the key, loses at most what was not
//! flushed, and never exceeds its budget; whatever the disk does. `NS_LLM_SOAK=1` runs the large forms.
//!
//! | | Promise | Test, here unless another file is named |
//! | --- | --- | --- |
//! | G1 | Killed at random moments: opens, no wrong byte, nothing flushed is lost | `disk_tier_kill.rs` (`NS_LLM_KILLS`) |
//! | G2 | Power failure and every n-th call failing in six ways | `every_call_may_fail_in_six_ways`, `random_faults_never_show` |
//! | G3 | Any flip or overwrite is a miss or right | `flipped_and_overwritten_bytes_are_misses`, `record.rs` |
//! | G4 | A payload belongs to its key, file and layout | `keys_are_bound_to_payloads`, `records_are_bound_to_their_place` |
//! | G5 | Refusals of the system are counted, and over when their cause is | `full_disk_serves_what_it_has`, the six ways; `tiers.rs`: `failing_tier_is_left_alone` |
//! | G6 | A failed sync drops the segment | `failed_sync_drops_the_segment` |
//! | G7 | A restore is staged | a record holds all layers and is checked before its bytes leave the tier: G2 and G3 |
//! | G8 | What led to an error is not used again | `quarantine_outlives_a_restart`; `tiers.rs`: `quarantined_block_stays_away` |
//! | G9 | Bytes within the budget, no drift | `accounting_does_not_drift`; each call of G2; the kill test |
//! | G10 | Opening time | `opening_reads_headers_only`: calls are counted; the time of 100,000 blocks in the large form |
//! | G11 | One writer, readers are safe, no stale lock | `one_writer_and_many_readers`, `reader_changes_nothing`, the kill test |
//! | G12 | A newer format is left alone | `newer_version_is_left_alone`; there is no older one |
//! | G13 | A panic is an unclean end | nothing is done at a clean end, so every test that drops a tier shows it |
//! | G14 | Private, and wiped by one call | `directory_is_private`, `real_files_are_found_again_and_wiped` |
//! | M7 | One owner's flood leaves others their share, after a restart too | `flood_of_one_owner_leaves_others_theirs` |
//! | G15 | A stalled disk costs a bounded time | `tiers.rs`: `stalled_tier_costs_the_budget_once`, in simulated time |
//!
//! Less than the charter: a file system of limited size and a read-only mount (G5) need the rights to mount, the simulated
//! disk stands for them; pairs of processes that start and die at random (G11) are one child at a time.

use std::collections::BTreeSet;
use std::sync::Arc;

use ns_llm::sampler::random_at;
use ns_llm::storage::disk::{Access, Directory, DiskOptions, DiskStore, PAGE_BYTES, SegmentFiles, draw_seed};
use ns_llm::storage::{Damage, Fault, LayoutId, RecordKey};

use crate::sim_disk::{FAULT_KINDS, FaultKind, SimDisk};

/// Longest block of these tests, bytes: some take one page, some two.
const MAX_PAYLOAD_BYTES: u64 = 6_000;
/// 44 pages, in segments of three: about 20 blocks.
const BUDGET_BYTES: u64 = 44 * PAGE_BYTES;
const LAYOUT: LayoutId = LayoutId([7; 32]);

fn key(name: u64) -> RecordKey {
    let mut content = [0; 32];
    content[..8].copy_from_slice(&name.to_le_bytes());
    RecordKey { content, layout: LAYOUT }
}

/// The content of a block is a function of its key, as it is in the engine.
fn payload(key: &RecordKey) -> Arc<[u8]> {
    let seed = u64::from_le_bytes(key.content[..8].try_into().expect("8 bytes"));
    let length = random_at(seed, 0) % (MAX_PAYLOAD_BYTES + 1);
    (0..length).map(|i| (random_at(seed, 1 + i / 8) >> (i % 8 * 8)) as u8).collect()
}

fn options() -> DiskOptions {
    DiskOptions::new(BUDGET_BYTES, MAX_PAYLOAD_BYTES).expect("room for two segments")
}

fn open(disk: &SimDisk) -> Result<DiskStore, Fault> {
    let seed = random_at(disk.seed(), disk.num_calls()).to_le_bytes();
    DiskStore::open(Box::new(disk.clone()), Access::Write, options(), std::array::from_fn(|i| seed[i % 8]))
}

/// How often a random test runs: `few`, or a hundred times as often.
fn rounds(few: u64) -> u64 {
    if std::env::var_os("NS_LLM_SOAK").is_some() { few * 100 } else { few }
}

/// A disk with two segments of known blocks, 0 to 3, and one that is just being filled.
fn filled() -> (SimDisk, Vec<RecordKey>) {
    let disk = SimDisk::new(1);
    let mut tier = open(&disk).expect("an empty disk");
    let keys: Vec<RecordKey> = (0..7).map(key).collect();
    for key in &keys {
        assert!(tier.put(*key, &payload(key)).expect("room"));
    }
    tier.flush().expect("syncs");
    assert!(disk.contents().len() >= 3, "several segments");
    (disk, keys)
}

/// What is known of the tier's blocks while a scenario runs.
struct Scenario {
    disk: SimDisk,
    tier: Option<DiskStore>,
    /// Flushed, and not reported as lost since.
    acknowledged: BTreeSet<RecordKey>,
    /// Bits may flip: then also what was flushed may be lost.
    bits_flip: bool,
    /// What the files may take.
    limit_bytes: u64,
    hits: u64,
    faults: u64,
    evictions: u64,
}

impl Scenario {
    fn new(disk: SimDisk, bits_flip: bool) -> Self {
        let acknowledged = BTreeSet::new();
        let limit_bytes = BUDGET_BYTES;
        Scenario { disk, tier: None, acknowledged, bits_flip, limit_bytes, hits: 0, faults: 0, evictions: 0 }
    }

    /// Opens the tier if it is closed; the directory may not even be listed.
    fn open(&mut self) -> bool {
        if self.tier.is_some() {
            return true;
        }
        let Ok(tier) = open(&self.disk) else {
            self.disk.start_if_down();
            return false;
        };
        tier.check_invariants().expect("sound after opening");
        // A power failure may bring removed files back until the tier opens, and they may refuse to go then.
        self.disk.take_max_bytes();
        self.limit_bytes = BUDGET_BYTES.max(tier.stats().bytes);
        assert!(self.limit_bytes == BUDGET_BYTES || tier.stats().faults > 0, "{:?}", tier.stats());
        let all_read = tier.stats().faults == 0 && !self.bits_flip;
        let is_lost = |key: &&RecordKey| !tier.contains(key);
        let lost = self.acknowledged.iter().filter(is_lost).count();
        assert!(lost == 0 || !all_read, "{lost} flushed blocks were lost, {:?}", tier.report());
        self.acknowledged.retain(|key| tier.contains(key));
        self.tier = Some(tier);
        true
    }

    fn close(&mut self) {
        let Some(tier) = self.tier.take() else { return };
        self.evictions += tier.stats().evictions;
    }

    fn put(&mut self, name: u64) -> bool {
        let Some(tier) = &mut self.tier else { return false };
        let stored = tier.put(key(name), &payload(&key(name)));
        self.after(stored.is_err());
        stored.is_ok()
    }

    fn get(&mut self, name: u64) -> bool {
        let Some(tier) = &mut self.tier else { return false };
        let got = tier.get(&key(name));
        if let Ok(Some(bytes)) = &got {
            assert_eq!(*bytes, payload(&key(name)), "block {name} is wrong");
            self.hits += 1;
        }
        self.after(got.is_err());
        matches!(got, Ok(Some(_)))
    }

    fn flush(&mut self) {
        let Some(tier) = &mut self.tier else { return };
        let flushed = tier.flush();
        if flushed.is_ok() {
            self.acknowledged.extend(tier.keys());
        }
        self.after(flushed.is_err());
    }

    fn after(&mut self, is_fault: bool) {
        let Some(tier) = &mut self.tier else { return };
        tier.check_invariants().expect("sound");
        for key in tier.take_lost() {
            self.acknowledged.remove(&key);
            assert!(!tier.contains(&key), "reported as lost");
        }
        self.faults += u64::from(is_fault);
        let max_bytes = self.disk.take_max_bytes();
        assert!(max_bytes <= self.limit_bytes, "{max_bytes} bytes of {}", self.limit_bytes);
        if self.disk.start_if_down() {
            self.close();
        }
    }

    /// Fills the tier beyond its budget, reads hits and misses, flushes, restarts, quarantines, verifies.
    fn run(&mut self) {
        for name in 0..34 {
            self.open();
            self.put(name);
            self.get(name / 2);
            self.get(name.saturating_sub(3));
            if name % 9 == 8 {
                self.flush();
            }
            if name % 15 == 14 {
                self.close();
            }
            if name == 20
                && let Some(tier) = &mut self.tier
            {
                tier.quarantine(&key(19));
                assert!(!tier.contains(&key(19)));
                self.after(false);
            }
            if name == 32
                && let Some(tier) = &mut self.tier
            {
                read_all(tier);
                self.after(false);
            }
        }
    }

    /// The disk is well again: everything works, and what there is, is right.
    fn check_recovery(&mut self) {
        self.disk.heal();
        self.close();
        assert!(self.open(), "the tier must open");
        let held = self.tier.as_ref().expect("open").stats().entries;
        let mut right = 0;
        for name in 0..60 {
            right += u64::from(self.get(name));
        }
        assert!(right <= held && (right == held || self.bits_flip || self.faults > 0), "{right} of {held}");
        let missing: Vec<_> = self.acknowledged.iter().filter(|key| !self.contains(key)).collect();
        assert!(missing.is_empty(), "flushed and lost: {missing:?}");
        assert!(self.put(100) && self.get(100), "nothing is left of the fault");
        self.close();
        assert!(self.open() && self.get(100), "it is found again");
    }

    fn contains(&self, key: &RecordKey) -> bool {
        self.tier.as_ref().is_some_and(|tier| tier.contains(key))
    }
}

/// Each call of a scenario of more than 200 fails once, in each of six ways: no wrong byte, no opening that fails
/// afterwards, nothing flushed that is lost (but by flipped bits), never more bytes than the budget, and everything
/// works again when the fault is over.
#[test]
fn every_call_may_fail_in_six_ways() {
    let well = SimDisk::new(0);
    let mut scenario = Scenario::new(well.clone(), false);
    scenario.run();
    scenario.close();
    let num_calls = well.num_calls();
    assert!(num_calls >= 200, "{num_calls} calls");
    assert!(scenario.hits > 20 && scenario.evictions > 5 && scenario.faults == 0, "{}", scenario.evictions);
    for kind in FAULT_KINDS {
        let (mut injected, mut faults, mut hits) = (0, 0, 0);
        for call in 0..num_calls {
            let disk = SimDisk::new(call);
            disk.fail(call, kind);
            let mut scenario = Scenario::new(disk.clone(), kind == FaultKind::BitFlip);
            scenario.run();
            scenario.check_recovery();
            injected += disk.num_injected();
            faults += scenario.faults;
            hits += scenario.hits;
        }
        println!("{kind:?}: {num_calls} calls, {injected} faults injected, {faults} seen by the caller, {hits} hits");
        assert!(injected >= num_calls / 8 && hits > num_calls * 20, "{kind:?}: {injected} faults, {hits} hits");
        assert!(faults > 0, "{kind:?} was never seen");
    }
}

/// The same with several faults of random kinds in one run, at random calls.
#[test]
fn random_faults_never_show() {
    let (mut injected, mut crashes) = (0, 0);
    for seed in 0..rounds(60) {
        let disk = SimDisk::new(seed);
        let mut scenario = Scenario::new(disk.clone(), true);
        for part in 0..4 {
            let kind = FAULT_KINDS[(random_at(seed, part) % 6) as usize];
            disk.fail(disk.num_calls() + random_at(seed, 10 + part) % 300, kind);
            scenario.run();
            crashes += u64::from(kind == FaultKind::Crash);
        }
        if seed.is_multiple_of(2) {
            scenario.close();
            disk.crash();
            disk.start_if_down();
        }
        scenario.check_recovery();
        injected += disk.num_injected();
    }
    assert!(injected > rounds(60) && crashes > rounds(5), "{injected} faults, {crashes} crashes");
}

/// Any bit of any file may flip, any range may be overwritten: a hit is right or none. Nothing panics, and opening
/// succeeds. Every bit of the first pages and of the headers is tried, and random ones of the rest.
#[test]
fn flipped_and_overwritten_bytes_are_misses() {
    let (disk, keys) = filled();
    let sound = disk.contents();
    let mut misses = 0;
    let mut check = |files| {
        disk.set_contents(files);
        let mut tier = open(&disk).expect("opens");
        for key in &keys {
            match tier.get(key) {
                Ok(Some(bytes)) => assert_eq!(bytes, payload(key)),
                Ok(None) | Err(Fault::Damaged(_)) => misses += 1,
                Err(other) => panic!("{other}"),
            }
        }
        tier.check_invariants().expect("sound");
    };
    check(sound.clone());
    for (id, bytes) in &sound {
        let headers = (0..bytes.len()).step_by(PAGE_BYTES as usize).flat_map(|page| page..page + 144);
        let bits = headers.flat_map(|byte| [byte * 8, byte * 8 + 7]);
        let random = (0..rounds(300)).map(|i| random_at(*id, i) as usize % (bytes.len() * 8));
        for bit in bits.chain(random) {
            let mut files = sound.clone();
            files.get_mut(id).expect("listed")[bit / 8] ^= 1 << (bit % 8);
            check(files);
        }
        for round in 0..rounds(100) {
            let mut files = sound.clone();
            let file = files.get_mut(id).expect("listed");
            let start = random_at(round, 1) as usize % file.len();
            let length = 1 + random_at(round, 2) as usize % (file.len() - start).min(9_000);
            let value = random_at(round, 3);
            file[start..start + length].iter_mut().enumerate().for_each(|(i, byte)| {
                *byte = if value.is_multiple_of(3) { 0 } else { random_at(value, i as u64) as u8 };
            });
            file.truncate(if value.is_multiple_of(5) { start } else { file.len() });
            check(files);
        }
    }
    assert!(misses > 1_000, "{misses} misses");
}

/// A record is believed in its own place only: not in another file, not after a record with a higher number, not inside of
/// another record's payload.
#[test]
fn records_are_bound_to_their_place() {
    let (disk, keys) = filled();
    let sound = disk.contents();
    let ids: Vec<u64> = sound.keys().copied().collect();
    let body = |id: u64| sound[&id][PAGE_BYTES as usize..].to_vec();
    // Whole records of the first file, behind those of the last.
    let mut moved = sound.clone();
    let target = moved.get_mut(&ids[ids.len() - 1]).expect("listed");
    target.extend(body(ids[0]));
    moved.remove(&ids[0]);
    disk.set_contents(moved);
    let tier = open(&disk).expect("opens");
    assert!(!tier.contains(&keys[0]), "a record of another file is believed");
    assert!(tier.report().damaged_records > 0 && tier.report().cut_bytes > 0);
    // The same records once more behind themselves: old numbers.
    let mut doubled = sound.clone();
    doubled.get_mut(&ids[0]).expect("listed").extend(body(ids[0]));
    disk.set_contents(doubled);
    let mut tier = open(&disk).expect("opens");
    assert_eq!(tier.report().cut_bytes, body(ids[0]).len() as u64, "numbers do not fall");
    assert_eq!(tier.get(&keys[0]), Ok(Some(payload(&keys[0]))));
    // A file under another number.
    let mut renamed = sound.clone();
    let bytes = renamed.remove(&ids[0]).expect("listed");
    renamed.insert(77, bytes);
    disk.set_contents(renamed);
    let tier = open(&disk).expect("opens");
    assert_eq!(tier.report().damaged_segments, 1);
    assert!(!disk.contents().contains_key(&77), "it is removed");
    // A record that is the payload of another one, which begins on a page, and whose own header is gone.
    let (disk, outer) = (SimDisk::new(2), key(500));
    let inner = &sound[&ids[0]][PAGE_BYTES as usize..2 * PAGE_BYTES as usize];
    let mut disguise = vec![0; PAGE_BYTES as usize - 144];
    disguise.extend(&inner[..2_000]);
    let mut tier = open(&disk).expect("opens");
    tier.put(outer, &disguise).expect("room");
    drop(tier);
    let mut files = disk.contents();
    files.get_mut(&0).expect("the first")[PAGE_BYTES as usize] ^= 1;
    disk.set_contents(files);
    let tier = open(&disk).expect("opens");
    assert_eq!((tier.stats().entries, tier.report().damaged_records), (0, 1));
}

/// Swapped payloads, another key and another layout are misses.
#[test]
fn keys_are_bound_to_payloads() {
    let disk = SimDisk::new(3);
    let mut tier = open(&disk).expect("opens");
    let keys = [key(1), key(2)];
    tier.put(keys[0], &[1; 1_000]).expect("room");
    tier.put(keys[1], &[2; 1_000]).expect("room");
    let other = RecordKey { layout: LayoutId([8; 32]), ..keys[0] };
    assert_eq!(tier.get(&other), Ok(None));
    let mut files = disk.contents();
    let file = files.get_mut(&0).expect("the first");
    let page = PAGE_BYTES as usize;
    let (first, second) = file.split_at_mut(2 * page);
    first[page + 144..page + 1_144].swap_with_slice(&mut second[144..1_144]);
    disk.set_contents(files);
    for key in &keys {
        assert_eq!(tier.get(key), Err(Fault::Damaged(Damage::PayloadChecksum)));
        assert_eq!(tier.get(key), Ok(None), "it is forgotten");
    }
    assert_eq!(tier.take_lost(), keys);
    assert!(tier.put(keys[0], &[1; 1_000]).expect("room"), "it may be stored again");
    assert_eq!(tier.get(&keys[0]), Ok(Some(Arc::from([1; 1_000]))));
}

/// After a hundred thousand operations with restarts the counted bytes are those of the files, never above the budget;
/// the least recently used segment goes first.
#[test]
fn accounting_does_not_drift() {
    let disk = SimDisk::new(4);
    let mut tier = open(&disk).expect("opens");
    let (mut hits, mut misses, mut evictions) = (0, 0, 0);
    for step in 0..rounds(10_000) {
        let name = random_at(9, step) % 200;
        match random_at(10, step) % 500 {
            0 => {
                evictions += tier.stats().evictions;
                tier = open(&disk).expect("opens");
            }
            1 => tier.quarantine(&key(name)),
            2 => tier.flush().expect("syncs"),
            3..200 => match tier.get(&key(name)).expect("no fault") {
                Some(bytes) => (hits, _) = (hits + 1, assert_eq!(bytes, payload(&key(name)))),
                None => misses += 1,
            },
            _ => drop(tier.put(key(name), &payload(&key(name))).expect("room")),
        }
        tier.take_lost();
        let bytes: u64 = disk.contents().values().map(|file| file.len() as u64).sum();
        assert_eq!(tier.stats().bytes, bytes, "step {step}");
        assert!(disk.take_max_bytes() <= BUDGET_BYTES);
    }
    tier.check_invariants().expect("sound");
    assert!(hits > 100 && misses > 100 && evictions > 100, "{hits} hits, {misses} misses, {evictions} evictions");
    tier.clear().expect("removes");
    assert_eq!((tier.stats().entries, tier.stats().bytes, disk.contents().len()), (0, 0, 0));

    let hot = key(1_000);
    tier.put(hot, &payload(&hot)).expect("room");
    for name in 0..200 {
        tier.put(key(name), &payload(&key(name))).expect("room");
        tier.get(&hot).expect("no fault").expect("what is used stays");
    }
    assert!(!tier.contains(&key(10)) && tier.contains(&key(199)));
}

/// A sync that fails is not tried again: the segment is gone, and what is asked for is a miss.
#[test]
fn failed_sync_drops_the_segment() {
    for kind in [FaultKind::Error, FaultKind::Torn] {
        for sync in 0..2 {
            let disk = SimDisk::new(5);
            let mut tier = open(&disk).expect("opens");
            tier.put(key(1), &payload(&key(1))).expect("room");
            disk.fail(disk.num_calls() + sync, kind);
            let fault = tier.flush().expect_err("the sync fails");
            let operation = ["sync a segment", "sync the directory"][sync as usize];
            assert!(matches!(fault, Fault::Io { operation: found, .. } if found == operation), "{fault}");
            assert_eq!((tier.get(&key(1)), tier.report().dropped_segments), (Ok(None), 1));
            assert_eq!(tier.take_lost(), [key(1)]);
            assert!(disk.contents().is_empty(), "the file is removed");
            tier.put(key(1), &payload(&key(1))).expect("room");
            tier.flush().expect("a new file is synced");
        }
    }
}

/// While the disk is full nothing is stored and what is there is served; afterwards all is as before. Each kind of refusal
/// of the system is a fault with its kind.
#[test]
fn full_disk_serves_what_it_has() {
    let (disk, keys) = filled();
    let mut tier = open(&disk).expect("opens");
    disk.fail(disk.num_calls(), FaultKind::NoSpace);
    let fault = tier.put(key(50), &payload(&key(50))).expect_err("no space");
    assert!(matches!(fault, Fault::Io { kind: std::io::ErrorKind::StorageFull, .. }), "{fault}");
    assert_eq!(tier.get(&keys[6]), Ok(Some(payload(&keys[6]))));
    assert!(tier.put(key(50), &payload(&key(50))).is_err(), "still full");
    disk.heal();
    assert!(tier.put(key(50), &payload(&key(50))).expect("room"));
    assert_eq!(tier.get(&key(50)), Ok(Some(payload(&key(50)))));
    assert_eq!(tier.stats().faults, 2);
}

/// Files of a newer version stay as they are, and the tier stays off.
#[test]
fn newer_version_is_left_alone() {
    let (disk, _) = filled();
    let before = disk.contents();
    disk.set_version(2);
    assert_eq!(open(&disk).err(), Some(Fault::NewerFormat { found: 2, known: 1 }));
    assert_eq!(disk.contents(), before);
    disk.set_version(1);
    assert_eq!(open(&disk).expect("opens").stats().entries, 7);
}

/// A block that led to an error is never used again, also after a restart.
#[test]
fn quarantine_outlives_a_restart() {
    let (disk, keys) = filled();
    let mut tier = open(&disk).expect("opens");
    tier.quarantine(&keys[0]);
    assert_eq!(tier.get(&keys[0]), Ok(None));
    assert!(tier.take_lost().contains(&keys[0]));
    let tier = open(&disk).expect("opens");
    assert!(!tier.contains(&keys[0]) && tier.contains(&keys[6]));
}

/// Opening costs one listing, and two calls a segment and one a block at most: what 100,000 blocks take is known from
/// that. The large form measures it on real files.
#[test]
fn opening_reads_headers_only() {
    let (disk, keys) = filled();
    let before = disk.num_calls();
    let tier = open(&disk).expect("opens");
    let num_calls = disk.num_calls() - before;
    assert!(num_calls <= 1 + tier.report().segments + keys.len() as u64, "{num_calls} calls");
    if std::env::var_os("NS_LLM_SOAK").is_none() {
        return;
    }
    let folder = Folder::new("open");
    let options = DiskOptions::new(1 << 30, 3_000).expect("room");
    let mut tier = folder.tier(options).expect("opens");
    for name in 0..100_000 {
        tier.put(key(name), &name.to_le_bytes()).expect("room");
    }
    drop(tier);
    let start = std::time::Instant::now();
    let tier = folder.tier(options).expect("opens");
    println!("100,000 blocks: opened in {:?}", start.elapsed());
    assert_eq!(tier.stats().entries, 100_000);
    assert!(start.elapsed().as_secs_f64() <= 1.0, "{:?}", start.elapsed());
}

/// Reads what there is: how many records are as they were written, were not, and could not be read.
fn read_all(store: &mut DiskStore) -> (u64, u64, u64) {
    let keys: Vec<RecordKey> = store.keys().copied().collect();
    let (mut intact, mut damaged, mut unreadable) = (0, 0, 0);
    for key in keys {
        match store.get(&key) {
            Ok(found) => intact += u64::from(found == Some(payload(&key))),
            Err(Fault::Damaged(_)) => damaged += 1,
            Err(_) => unreadable += 1,
        }
    }
    (intact, damaged, unreadable)
}

/// A read finds the damaged record among the intact ones, and forgets it.
#[test]
fn reading_finds_damage() {
    let (disk, keys) = filled();
    let mut tier = open(&disk).expect("opens");
    assert_eq!(read_all(&mut tier), (7, 0, 0));
    let mut files = disk.contents();
    let long = keys.iter().find(|key| payload(key).len() > 4_200).expect("one takes two pages");
    let needle = &payload(long)[4_100..4_200];
    for file in files.values_mut() {
        if let Some(at) = file.windows(100).position(|window| window == needle) {
            file[at] ^= 1;
        }
    }
    disk.set_contents(files);
    assert_eq!(read_all(&mut tier), (6, 1, 0));
    assert_eq!(read_all(&mut tier), (6, 0, 0));
    disk.fail(disk.num_calls(), FaultKind::Error);
    assert_eq!(read_all(&mut tier), (5, 0, 1));
}

/// Sizes are checked by name; a block that is longer than the tier was told is refused.
#[test]
fn sizes_have_limits() {
    assert_eq!(DiskOptions::new(6 * PAGE_BYTES - 1, 6_000).expect_err("too small").code(), "invalid_argument");
    assert_eq!(DiskOptions::new(1 << 40, u64::MAX).expect_err("too small").code(), "invalid_argument");
    let options = DiskOptions::new(6 * PAGE_BYTES, 6_000).expect("two segments");
    assert_eq!(options.segment_bytes(), 3 * PAGE_BYTES);
    let mut tier = open(&SimDisk::new(6)).expect("opens");
    let fault = tier.put(key(1), &[0; 6_001]).expect_err("too long");
    assert_eq!(fault, Fault::TooLong { bytes: 6_001, limit_bytes: 6_000 });
    // With less budget than last time the oldest go at opening.
    let (disk, keys) = filled();
    let small = DiskOptions::new(6 * PAGE_BYTES, 6_000).expect("two segments");
    let tier = DiskStore::open(Box::new(disk.clone()), Access::Write, small, [0; 16]).expect("opens");
    assert!(tier.stats().bytes <= 6 * PAGE_BYTES && !tier.contains(&keys[0]) && tier.contains(&keys[6]));
}

/// A folder of this test's own, removed at its end.
struct Folder(std::path::PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("ns-llm-disk-tier-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).expect("a temporary folder");
        Folder(path)
    }
    fn directory(&self) -> Directory {
        Directory::open(&self.0.join("kv")).expect("a private directory")
    }
    fn tier(&self, options: DiskOptions) -> Result<DiskStore, Fault> {
        let directory = self.directory();
        let access = directory.access();
        DiskStore::open(Box::new(directory), access, options, draw_seed())
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// On real files: stored, found after a restart, wiped by one call.
#[test]
fn real_files_are_found_again_and_wiped() {
    let folder = Folder::new("real");
    let mut tier = folder.tier(options()).expect("opens");
    for name in 0..60 {
        tier.put(key(name), &payload(&key(name))).expect("room");
    }
    tier.flush().expect("syncs");
    let held = tier.stats().entries;
    assert!(tier.stats().evictions > 0 && held > 5, "{:?}", tier.stats());
    drop(tier);
    let mut tier = folder.tier(options()).expect("opens");
    assert_eq!(tier.stats().entries, held);
    assert_eq!(read_all(&mut tier), (held, 0, 0));
    let path = folder.0.join("kv");
    let bytes_on_disk = || -> u64 {
        let entries = std::fs::read_dir(&path).expect("readable").flatten();
        entries.map(|entry| entry.metadata().expect("readable").len()).sum()
    };
    assert_eq!(bytes_on_disk(), tier.stats().bytes);
    tier.clear().expect("removes");
    assert_eq!((bytes_on_disk(), std::fs::read_dir(&path).expect("readable").count()), (0, 1), "the lock stays");
}

/// One process writes; another reads what there was when it came, never writes, and takes an evicted block for a miss.
/// The lock is free as soon as its holder is gone.
#[test]
fn one_writer_and_many_readers() {
    let folder = Folder::new("lock");
    let mut writer = folder.tier(options()).expect("opens");
    writer.put(key(1), &payload(&key(1))).expect("room");
    let mut reader = folder.tier(options()).expect("opens");
    assert_eq!((writer.access(), reader.access()), (Access::Write, Access::Read));
    assert_eq!(reader.get(&key(1)), Ok(Some(payload(&key(1)))));
    assert_eq!(reader.put(key(2), &[0]), Err(Fault::ReadOnly));
    assert_eq!(reader.clear(), Err(Fault::ReadOnly));
    for name in 100..160 {
        writer.put(key(name), &payload(&key(name))).expect("room");
    }
    assert!(!writer.contains(&key(1)));
    // A removed file is there as long as somebody has it open.
    assert_eq!(reader.get(&key(1)), Ok(Some(payload(&key(1)))));
    assert_eq!(folder.tier(options()).expect("opens").get(&key(1)), Ok(None));
    drop(writer);
    assert_eq!(folder.directory().access(), Access::Write, "the lock is free");

    let (disk, keys) = filled();
    let mut writer = open(&disk).expect("opens");
    let mut reader = DiskStore::open(Box::new(disk.clone()), Access::Read, options(), [0; 16]).expect("opens");
    writer.clear().expect("removes");
    assert_eq!(reader.get(&keys[0]), Ok(None), "the writer has removed it");
    assert_eq!((reader.stats().faults, reader.stats().misses), (0, 1));
}

/// A reader cuts and removes nothing, whatever it finds.
#[test]
fn reader_changes_nothing() {
    let (disk, _) = filled();
    let mut files = disk.contents();
    files.values_mut().for_each(|file| file.extend([1; 5_000]));
    files.insert(90, vec![0; 4096]);
    disk.set_contents(files.clone());
    let mut reader = DiskStore::open(Box::new(disk.clone()), Access::Read, options(), [0; 16]).expect("opens");
    assert_eq!(reader.stats().entries, 7);
    reader.quarantine(&key(3));
    assert!(!reader.contains(&key(3)));
    reader.flush().expect("nothing to do");
    assert_eq!(disk.contents(), files);
}

/// The directory is 0700 and its files 0600; links, foreign files and pipes are left alone; a directory that others may
/// enter is made private, or refused when it holds something else.
#[cfg(unix)]
#[test]
fn directory_is_private() {
    use std::os::unix::fs::{PermissionsExt, symlink};
    let folder = Folder::new("private");
    let path = folder.0.join("kv");
    let mode = |path: &std::path::Path| std::fs::metadata(path).expect("there").permissions().mode() & 0o777;
    let mut tier = folder.tier(options()).expect("opens");
    tier.put(key(1), &payload(&key(1))).expect("room");
    assert_eq!(mode(&path), 0o700);
    for entry in std::fs::read_dir(&path).expect("readable").flatten() {
        assert_eq!(mode(&entry.path()), 0o600, "{entry:?}");
    }
    drop(tier);
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("ours");
    drop(folder.tier(options()).expect("opens"));
    assert_eq!(mode(&path), 0o700, "made private again");

    // Foreign things, one of them under a name of the tier.
    let secret = folder.0.join("secret");
    std::fs::write(&secret, [5; 5_000]).expect("writes");
    symlink(&secret, path.join("v1-00000000000000ff.segment")).expect("links");
    std::fs::write(path.join("notes.txt"), "mine").expect("writes");
    std::fs::create_dir(path.join("v1-00000000000000fe.segment")).expect("makes");
    let mut tier = folder.tier(options()).expect("opens");
    assert_eq!((tier.stats().entries, tier.report().damaged_segments, tier.report().segments), (1, 0, 1));
    tier.clear().expect("removes");
    assert_eq!(std::fs::read(&secret).expect("there"), [5; 5_000]);
    assert_eq!(std::fs::read(path.join("notes.txt")).expect("there"), b"mine");
    assert!(path.join("v1-00000000000000fe.segment").is_dir());
    let mut directory = folder.directory();
    assert!(directory.read_at(0xff, 0, &mut [0; 8]).is_err(), "links are not followed");
    assert!(directory.read_at(0xfe, 0, &mut [0; 8]).is_err(), "folders are not opened");
    drop(directory);

    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("ours");
    let error = Directory::open(&path).expect_err("others may enter, and it holds other files");
    assert!(error.to_string().contains("0700"), "{error}");
    let link = folder.0.join("link");
    symlink(&path, &link).expect("links");
    assert_eq!(Directory::open(&link).expect_err("a link").code(), "io");
    let file = folder.0.join("file");
    std::fs::write(&file, "x").expect("writes");
    assert_eq!(Directory::open(&file).expect_err("a file").code(), "io");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700)).expect("ours");
    std::fs::remove_file(path.join("lock")).expect("there");
    symlink(&secret, path.join("lock")).expect("links");
    assert_eq!(Directory::open(&path).expect_err("the lock is a link").code(), "io");
}

/// With a share for each owner, the flood of one takes from the other what is over his own share and nothing else, in all
/// orders of writing and after a restart; without one it takes everything. The budget holds, and blocks are found whoever
/// they count for.
#[test]
fn flood_of_one_owner_leaves_others_theirs() {
    let budget_bytes = 400 * PAGE_BYTES;
    let open_with = |disk: &SimDisk, share: f64| {
        let options = DiskOptions::new(budget_bytes, MAX_PAYLOAD_BYTES).expect("room").owner_share(share);
        let seed = disk.num_calls().to_le_bytes();
        DiskStore::open(Box::new(disk.clone()), Access::Write, options, std::array::from_fn(|i| seed[i % 8]))
    };
    let (quiet, loud) = ([1; 32], [2; 32]);
    for (share, keeps) in [(0.5, true), (1.0, false)] {
        let disk = SimDisk::new(7);
        let mut tier = open_with(&disk, share).expect("an empty disk");
        let mine: Vec<RecordKey> = (0..60).map(key).collect();
        let mut others = 1_000..;
        let mut flood = |tier: &mut DiskStore, count: usize| {
            for name in others.by_ref().take(count) {
                assert_eq!(tier.put_for(&loud, key(name), &payload(&key(name))), Ok(true));
                tier.check_invariants().expect("sound");
            }
        };
        for key in &mine {
            tier.put_for(&quiet, *key, &payload(key)).expect("room");
            flood(&mut tier, 3);
        }
        flood(&mut tier, 500);
        let is_here = |tier: &mut DiskStore| mine.iter().filter(|key| tier.get(key) == Ok(Some(payload(key)))).count();
        assert_eq!(is_here(&mut tier), if keeps { 60 } else { 0 }, "{share}");
        assert!(
            tier.report().evicted_segments > 10 && tier.stats().bytes > budget_bytes * 3 / 4,
            "{:?}",
            tier.report()
        );
        drop(tier);
        // Who owns what is found again in the files.
        let mut tier = open_with(&disk, share).expect("opens");
        flood(&mut tier, 500);
        assert_eq!(is_here(&mut tier), if keeps { 60 } else { 0 }, "{share}, after a restart");
        assert!(tier.report().evicted_segments > 10 && disk.take_max_bytes() <= budget_bytes);
        drop(tier);
        // An engine without shares finds the same blocks, and what it writes later is what counts.
        let mut tier = open_with(&disk, 1.0).expect("opens");
        assert_eq!(is_here(&mut tier), if keeps { 60 } else { 0 });
        tier.replace(&quiet, mine[0], b"newer").expect("room");
        drop(tier);
        let mut tier = open_with(&disk, share).expect("opens");
        assert_eq!(tier.get(&mine[0]).map(|found| found.is_some_and(|it| *it == *b"newer")), Ok(true), "{share}");
        tier.check_invariants().expect("sound");
    }
}

/// Segments of several owners are written side by side, so a later record may lie in an older file: it counts, also after a
/// restart.
#[test]
fn later_record_in_an_older_file_counts() {
    let disk = SimDisk::new(3);
    let open_with = |share: f64| {
        let options = DiskOptions::new(400 * PAGE_BYTES, MAX_PAYLOAD_BYTES).expect("room").owner_share(share);
        DiskStore::open(Box::new(disk.clone()), Access::Write, options, [5; 16]).expect("opens")
    };
    for (share, value) in [(1.0, b"first"), (0.5, b"other"), (1.0, b"later")] {
        let mut tier = open_with(share);
        tier.replace(&[1; 32], key(1), value).expect("room");
        tier.put(key(2 + share as u64), b"beside").expect("room");
        tier.check_invariants().expect("sound");
    }
    assert_eq!(disk.contents().len(), 2, "the last one went to the first file");
    for share in [0.5, 1.0] {
        let mut tier = open_with(share);
        assert_eq!(tier.get(&key(1)).map(|found| found.is_some_and(|it| *it == *b"later")), Ok(true));
        tier.check_invariants().expect("sound");
    }
}
