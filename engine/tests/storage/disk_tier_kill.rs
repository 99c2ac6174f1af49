//! Promise: a process that writes to the disk tier may be killed at any moment. The next opening succeeds, the lock is free
//! at once, every block that is returned is right, and no block is lost that the killed process had been told was stored.
//!
//! The writer is a child: this test program itself, asked for the test `child_writes_until_it_is_killed` only.
//! `NS_LLM_KILLS` sets how often it is killed.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use ns_llm::sampler::random_at;
use ns_llm::storage::disk::{Access, Directory, DiskOptions, DiskStore, draw_seed};
use ns_llm::storage::{LayoutId, RecordKey};

/// Where the child writes.
const FOLDER: &str = "NS_LLM_KILL_TEST_FOLDER";
/// Number of its first block.
const FIRST: &str = "NS_LLM_KILL_TEST_FIRST";
/// Bytes of the tier.
const BUDGET: &str = "NS_LLM_KILL_TEST_BUDGET";
const MAX_PAYLOAD_BYTES: u64 = 200_000;

fn key(name: u64) -> RecordKey {
    let mut content = [0; 32];
    content[..8].copy_from_slice(&name.to_le_bytes());
    RecordKey { content, layout: LayoutId([0; 32]) }
}

fn payload(name: u64) -> Vec<u8> {
    let length = random_at(name, 0) % MAX_PAYLOAD_BYTES;
    (0..length).map(|i| (name + i * 31 + (i >> 9)) as u8).collect()
}

fn open(folder: &Path, budget_bytes: u64) -> DiskStore {
    let directory = Directory::open(folder).expect("a private directory");
    assert_eq!(directory.access(), Access::Write, "the lock of a killed process is free at once");
    let options = DiskOptions::new(budget_bytes, MAX_PAYLOAD_BYTES).expect("room");
    DiskStore::open(Box::new(directory), Access::Write, options, draw_seed()).expect("always opens")
}

/// Not a test of its own: stores blocks and tells of each until it is killed.
#[test]
#[ignore = "run by killed_writer_loses_nothing, as a child"]
fn child_writes_until_it_is_killed() {
    let number = |name: &str| -> u64 { std::env::var(name).expect("set by the parent").parse().expect("a number") };
    let mut tier = open(&PathBuf::from(std::env::var_os(FOLDER).expect("set by the parent")), number(BUDGET));
    for name in number(FIRST).. {
        tier.put(key(name), &payload(name)).expect("room");
        println!("stored {name}");
        if name % 16 == 0 {
            tier.flush().expect("syncs");
        }
        tier.get(&key(name / 2)).expect("no fault");
    }
}

/// Starts the child, kills it after `delay`, and returns the blocks that it said were stored.
fn kill_child(folder: &Path, first: u64, budget_bytes: u64, delay: Duration) -> BTreeSet<u64> {
    let mut child = Command::new(std::env::current_exe().expect("this program"))
        .args([
            "--exact",
            "disk_tier_kill::child_writes_until_it_is_killed",
            "--ignored",
            "--nocapture",
            "--test-threads=1",
        ])
        .env(FOLDER, folder)
        .env(FIRST, first.to_string())
        .env(BUDGET, budget_bytes.to_string())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("the child starts");
    let output = child.stdout.take().expect("piped");
    let reader = std::thread::spawn(move || {
        let lines = BufReader::new(output).lines().map_while(Result::ok);
        // The test program's own words may stand before the first; a line that the kill cut short is no number.
        let told = lines.filter_map(|line| line.split_once("stored ").and_then(|(_, name)| name.parse().ok()));
        told.collect::<BTreeSet<u64>>()
    });
    // The delay counts from the first block: how long a process takes to start says nothing.
    let start = Instant::now();
    while std::fs::read_dir(folder).map_or(0, Iterator::count) < 2 && start.elapsed() < Duration::from_secs(20) {
        std::thread::sleep(Duration::from_millis(1));
    }
    std::thread::sleep(delay);
    child.kill().expect("it runs");
    child.wait().expect("it ends");
    let mut told = reader.join().expect("reads to the end");
    // Its last line may lack digits.
    told.retain(|name| *name >= first);
    told
}

#[test]
fn killed_writer_loses_nothing() {
    let kills: u64 = std::env::var("NS_LLM_KILLS").map_or(20, |text| text.parse().expect("NS_LLM_KILLS is a number"));
    let root = std::env::temp_dir().join(format!("ns-llm-kill-{}", std::process::id()));
    let (mut right, mut told, mut cut_bytes, mut evictions) = (0, 0, 0, 0);
    // With room for everything: nothing that was told may be missing. With little: all that is there is right.
    for (name, budget_bytes) in [("wide", 2 << 30), ("narrow", 8 << 20)] {
        let mut folder = root.join(name);
        let (mut stored, mut first) = (BTreeSet::new(), 1);
        for kill in 0..kills / 2 {
            if kill % 25 == 0 {
                // So that the wide one never fills.
                folder = root.join(format!("{name}-{kill}"));
                stored.clear();
            }
            let delay = Duration::from_micros(random_at(kill, 7) % 60_000);
            let new = kill_child(&folder, first, budget_bytes, delay);
            first = new.last().map_or(first, |last| last + 2);
            told += new.len();
            stored.extend(new);
            let mut tier = open(&folder, budget_bytes);
            tier.check_invariants().expect("sound");
            cut_bytes += tier.report().cut_bytes;
            let names = stored.iter().copied().chain([first - 1, first]);
            for name in names.collect::<Vec<_>>() {
                match tier.get(&key(name)).expect("a kill damages nothing but the end") {
                    Some(bytes) => right += usize::from(assert_payload(name, &bytes)),
                    None if stored.contains(&name) => {
                        assert!(budget_bytes == 8 << 20, "block {name} was stored and is lost");
                        evictions += 1;
                    }
                    None => {}
                }
            }
            assert!(tier.report().damaged_records <= 1, "more than the end is torn at kill {kill}");
            assert!(tier.stats().bytes <= budget_bytes && tier.stats().faults == 0);
        }
    }
    std::fs::remove_dir_all(&root).expect("ours");
    println!("{kills} kills: {told} blocks told, {right} read right, {evictions} evicted, {cut_bytes} bytes cut");
    assert!(told as u64 > kills * 5 && right > told / 4 && evictions > 0, "{told} told, {right} right");
}

/// True when the bytes are those of the block; a wrong byte fails the test.
fn assert_payload(name: u64, bytes: &[u8]) -> bool {
    let expected = payload(name);
    assert!(bytes == expected, "block {name}: {} bytes instead of {}", bytes.len(), expected.len());
    true
}
