//! Promise: `ns-llm cache` says what is in a directory of KV blocks and whether it is as it was written, also while an engine
//! writes; removes what it is told to and nothing else; and refuses what is no such directory.
#![cfg(unix)]

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use ns_llm::sampler::random_at;
use ns_llm::storage::disk::{Access, Directory, DiskOptions, DiskStore, draw_seed};
use ns_llm::storage::{LayoutId, RecordKey};
use serde_json::Value;

const PAYLOAD_BYTES: u64 = 10_000;
/// A record of such a payload: with its header three pages.
const RECORD_BYTES: u64 = 3 * 4_096;
/// One page, then four records.
const SEGMENT_BYTES: u64 = 4_096 + 4 * RECORD_BYTES;

/// A directory that is removed in the end, with a place for other files beside the cache.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("cache-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).expect("the build's temporary folder is writable");
        Folder(path)
    }
    /// The cache itself.
    fn cache(&self) -> PathBuf {
        self.0.join("kv")
    }
    fn segment(&self, number: u64) -> PathBuf {
        self.cache().join(format!("v1-{number:016x}.segment"))
    }
    fn segments(&self) -> BTreeSet<String> {
        let names = fs::read_dir(self.cache()).expect("there").map(|entry| entry.expect("readable").file_name());
        names.map(|name| name.to_string_lossy().into_owned()).filter(|name| name != "lock").collect()
    }
    fn open(&self) -> DiskStore {
        self.open_with(16 * SEGMENT_BYTES)
    }
    fn open_with(&self, budget_bytes: u64) -> DiskStore {
        let directory = Directory::open(&self.cache()).expect("a private directory");
        let access = directory.access();
        let options = DiskOptions::new(budget_bytes, PAYLOAD_BYTES).expect("room");
        DiskStore::open(Box::new(directory), access, options, draw_seed()).expect("opens")
    }
    /// Stores the blocks `names`, four in a segment.
    fn fill(&self, names: std::ops::Range<u64>) {
        Folder::fill_tier(self.open(), names);
    }
    /// The same beneath, where answers are.
    fn fill_answers(&self, names: std::ops::Range<u64>) {
        let directory = Directory::open(&self.answers()).expect("a private directory");
        let options = DiskOptions::new(16 * SEGMENT_BYTES, PAYLOAD_BYTES).expect("room");
        let tier = DiskStore::open(Box::new(directory), Access::Write, options, draw_seed()).expect("opens");
        Folder::fill_tier(tier, names);
    }
    fn answers(&self) -> PathBuf {
        self.cache().join("answers")
    }
    fn fill_tier(mut tier: DiskStore, names: std::ops::Range<u64>) {
        for name in names {
            tier.put(key(name), &payload(name)).expect("room");
        }
        tier.flush().expect("syncs");
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn key(name: u64) -> RecordKey {
    let mut block = [0; 32];
    block[..8].copy_from_slice(&name.to_le_bytes());
    RecordKey { content: block, layout: LayoutId([7; 32]) }
}

fn payload(name: u64) -> Vec<u8> {
    (0..PAYLOAD_BYTES / 8).flat_map(|i| random_at(name, i).to_le_bytes()).collect()
}

fn cache(command: &str, directory: &Path, more: &[&str]) -> Output {
    let mut program = Command::new(env!("CARGO_BIN_EXE_ns-llm"));
    program.args(["cache", command, "--kv-cache-dir"]).arg(directory).args(more);
    program.output().expect("the program starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("text")
}

/// The last line is one JSON object; says whether the program succeeded.
fn report(command: &str, directory: &Path, more: &[&str]) -> (Value, bool) {
    let output = cache(command, directory, &[&["--json"], more].concat());
    let stdout = text(&output.stdout);
    let last = stdout.lines().last().unwrap_or_else(|| panic!("nothing said: {}", text(&output.stderr)));
    (serde_json::from_str(last).expect("JSON"), output.status.success())
}

fn number(report: &Value, field: &str) -> u64 {
    report[field].as_u64().unwrap_or_else(|| panic!("{field} in {report}"))
}

/// Why the command failed.
fn refusal(command: &str, directory: &Path, more: &[&str]) -> String {
    let output = cache(command, directory, more);
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(1), String::new()));
    text(&output.stderr)
}

fn flip(path: &Path, offset: u64) {
    let file = OpenOptions::new().read(true).write(true).open(path).expect("there");
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).expect("in the file");
    file.write_all_at(&[byte[0] ^ 0x10], offset).expect("writable");
}

/// What was stored is counted, as text and as JSON, and nothing is wrong with it.
#[test]
fn stat_and_verify_count_what_is_there() {
    let folder = Folder::new("counts");
    folder.fill(0..10);
    for command in ["stat", "verify"] {
        let (report, is_fine) = report(command, &folder.cache(), &[]);
        assert!(is_fine && report["has_writer"] == false && report["format_version"] == 1, "{report}");
        for (field, expected) in [
            ("segments", 3),
            ("records", 10),
            ("live", 10),
            ("payload_bytes", 10 * PAYLOAD_BYTES),
            ("bytes", 3 * 4_096 + 10 * RECORD_BYTES),
            ("damaged", 0),
            ("torn_bytes", 0),
            ("other_versions", 0),
        ] {
            assert_eq!(number(&report, field), expected, "{command}: {field}");
        }
        let shown = text(&cache(command, &folder.cache(), &[]).stdout);
        assert!(shown.contains("10 in 10 records") && shown.contains("3 segments of format 1"), "{shown}");
    }
    assert_eq!(folder.segments().len(), 3, "looking changes nothing");
}

/// Damage to a payload, a record's header and a file's first page: `verify` lists each place and fails, `stat` sees what
/// headers say. A torn end is none, for the next opening cuts it. Neither changes a file.
#[test]
fn verify_finds_damage() {
    let folder = Folder::new("damage");
    folder.fill(0..12);
    let last_record = 4_096 + 3 * RECORD_BYTES;
    let (sound, _) = report("verify", &folder.cache(), &[]);
    assert_eq!((number(&sound, "segments"), number(&sound, "records")), (3, 12));

    flip(&folder.segment(0), 4_096 + RECORD_BYTES + 5_000);
    flip(&folder.segment(1), last_record + 50);
    flip(&folder.segment(2), 20);
    let before: Vec<_> = (0..3).map(|number| fs::read(folder.segment(number)).expect("there")).collect();
    let (found, is_fine) = report("verify", &folder.cache(), &[]);
    assert!(!is_fine);
    let places: Vec<_> = found["damage"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|place| (place["file"].as_str().expect("a name"), number(place, "offset"), place["reason"].to_string()))
        .collect();
    let expected = [
        ("v1-0000000000000000.segment", 4_096 + RECORD_BYTES, "payload"),
        ("v1-0000000000000001.segment", last_record, "header"),
        ("v1-0000000000000002.segment", 0, "first page"),
    ];
    assert_eq!(places.len(), 3, "{found}");
    for ((file, offset, reason), expected) in places.iter().zip(expected) {
        assert_eq!((*file, *offset, reason.contains(expected.2)), (expected.0, expected.1, true), "{reason}");
    }
    assert_eq!((number(&found, "damaged"), number(&found, "records"), number(&found, "live")), (3, 6, 6));
    let output = cache("verify", &folder.cache(), &[]);
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert!(stdout.contains("v1-0000000000000001.segment at byte") && stderr.contains("3 damaged places"), "{stderr}");
    assert_eq!(output.status.code(), Some(1));

    let (headers, is_fine) = report("stat", &folder.cache(), &[]);
    assert!(is_fine, "looking does not fail");
    assert_eq!((number(&headers, "damaged"), number(&headers, "records")), (2, 7));

    // The process died while it wrote the last record of the first segment.
    let file = OpenOptions::new().write(true).open(folder.segment(0)).expect("there");
    file.set_len(last_record + 7_000).expect("writable");
    let (torn, _) = report("verify", &folder.cache(), &[]);
    assert_eq!((number(&torn, "torn_bytes"), number(&torn, "damaged"), number(&torn, "records")), (7_000, 3, 5));
    for number in 1..3 {
        assert!(fs::read(folder.segment(number)).expect("there") == before[number as usize], "{number} was changed");
    }
}

/// While an engine has the directory: looking works, also at files that are just being written and evicted, and removing is
/// refused.
#[test]
fn directory_in_use_is_only_looked_at() {
    let folder = Folder::new("in-use");
    folder.fill(0..8);
    let mut tier = folder.open();
    let (report_before, _) = report("stat", &folder.cache(), &[]);
    assert_eq!(report_before["has_writer"], true);
    for (command, more) in [("clear", &[][..]), ("prune", &["--max-mib", "0"])] {
        let error = refusal(command, &folder.cache(), more);
        assert!(error.contains("another process writes"), "{error}");
    }
    assert_eq!(folder.segments().len(), 2);
    let is_done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut name = 100;
            while !is_done.load(Ordering::Relaxed) {
                tier.put(key(name), &payload(name)).expect("room");
                name += 1;
            }
            (tier.report().evicted_segments, tier.access())
        });
        let mut seen = BTreeSet::new();
        for _ in 0..10 {
            let (found, is_fine) = report("verify", &folder.cache(), &[]);
            assert!(is_fine && found["has_writer"] == true, "{found}");
            seen.insert(number(&found, "records"));
        }
        is_done.store(true, Ordering::Relaxed);
        let (evicted, access) = writer.join().expect("no panic");
        assert!(evicted > 0 && access == Access::Write, "{evicted} evicted, {access:?}");
        assert!(!seen.contains(&0), "{seen:?}");
    });
}

/// The oldest segments go until the rest fits, or what is too old goes; the blocks that are left are found again.
#[test]
fn prune_removes_the_oldest() {
    let folder = Folder::new("prune");
    // In segments of an eighth of a MiB.
    let num_blocks = 160;
    let mut tier = folder.open_with(2 << 20);
    for name in 0..num_blocks {
        tier.put(key(name), &payload(name)).expect("room");
    }
    drop(tier);
    let (before, _) = report("stat", &folder.cache(), &[]);
    assert!(number(&before, "bytes") > 3 << 19, "{before}");
    let (segments, bytes) = (number(&before, "segments"), number(&before, "bytes"));

    let (pruned, is_fine) = report("prune", &folder.cache(), &["--max-mib", "1"]);
    assert!(is_fine && number(&pruned, "kept_bytes") <= 1 << 20 && number(&pruned, "kept_segments") > 1, "{pruned}");
    assert_eq!(number(&pruned, "removed_bytes") + number(&pruned, "kept_bytes"), bytes);
    assert_eq!(number(&pruned, "removed_segments") + number(&pruned, "kept_segments"), segments);
    let mut tier = folder.open_with(2 << 20);
    let found: Vec<u64> = (0..num_blocks).filter(|&name| tier.contains(&key(name))).collect();
    assert!(!found.contains(&0) && found.contains(&(num_blocks - 1)) && found.len() > 20, "{found:?}");
    for name in found {
        assert_eq!(tier.get(&key(name)), Ok(Some(payload(name).into())));
    }
    drop(tier);

    // One file is made old: only it goes.
    let names = folder.segments();
    let old = names.iter().nth(1).expect("several");
    let file = File::options().write(true).open(folder.cache().join(old)).expect("there");
    file.set_modified(SystemTime::now() - Duration::from_secs(5 * 3_600)).expect("ours");
    let (pruned, _) = report("prune", &folder.cache(), &["--max-age-hours", "4"]);
    assert_eq!(number(&pruned, "removed_segments"), 1);
    assert!(!folder.segments().contains(old));
    let (untouched, _) = report("prune", &folder.cache(), &["--max-age-hours", "4", "--max-mib", "1"]);
    assert_eq!(number(&untouched, "removed_segments"), 0);

    let output = cache("prune", &folder.cache(), &[]);
    assert!(!output.status.success() && text(&output.stderr).contains("--max-mib"), "without a limit");
}

/// The answers beneath are shown, checked, pruned and cleared as well: apart, so that each says what it is; pruned last and all
/// at once, since what makes some of them invalid lies among them.
#[test]
fn answers_are_looked_after_as_well() {
    let folder = Folder::new("answers");
    folder.fill(0..8);
    let (without, _) = report("stat", &folder.cache(), &[]);
    assert_eq!(without["answers"], Value::Null);
    folder.fill_answers(0..4);
    let (found, is_fine) = report("verify", &folder.cache(), &[]);
    assert!(is_fine && number(&found, "records") == 8, "{found}");
    let answers = &found["answers"];
    assert_eq!((number(answers, "records"), number(answers, "segments"), number(answers, "damaged")), (4, 1, 0));
    let shown = text(&cache("stat", &folder.cache(), &[]).stdout);
    assert!(shown.contains("8 in 8 records") && shown.contains("answers    4 in 4 records"), "{shown}");

    let segment = folder.answers().join("v1-0000000000000000.segment");
    flip(&segment, 4_096 + RECORD_BYTES + 5_000);
    let (found, is_fine) = report("verify", &folder.cache(), &[]);
    assert_eq!((is_fine, number(&found, "damaged"), number(&found["answers"], "damaged")), (false, 0, 1));

    // Both have young files: none is too old. Then KV goes before answers, and answers when they alone are too much.
    let (untouched, _) = report("prune", &folder.cache(), &["--max-age-hours", "4"]);
    assert_eq!((number(&untouched, "removed_segments"), number(&untouched, "kept_segments")), (0, 3));
    let mut tier = DiskStore::open(
        Box::new(Directory::open(&folder.answers()).expect("private")),
        Access::Write,
        DiskOptions::new(64 * SEGMENT_BYTES, PAYLOAD_BYTES).expect("room"),
        draw_seed(),
    )
    .expect("opens");
    for name in 10..100 {
        tier.put(key(name), &payload(name)).expect("room");
    }
    drop(tier);
    let (before, _) = report("stat", &folder.cache(), &[]);
    let answer_bytes = number(&before["answers"], "bytes");
    assert!(answer_bytes > 1 << 20 && answer_bytes < 2 << 20, "{before}");
    let (pruned, _) = report("prune", &folder.cache(), &["--max-mib", "2"]);
    assert_eq!(number(&pruned, "removed_segments"), 0, "both fit");
    let (pruned, _) = report("prune", &folder.cache(), &["--max-mib", "1"]);
    let (after, _) = report("stat", &folder.cache(), &[]);
    assert_eq!((number(&after["answers"], "segments"), number(&after, "segments")), (0, 2), "{pruned}");

    folder.fill_answers(200..204);
    let (removed, _) = report("clear", &folder.cache(), &[]);
    assert_eq!((number(&removed, "removed_segments"), number(&removed, "kept_segments")), (3, 0));
    let (after, _) = report("stat", &folder.cache(), &[]);
    assert_eq!((number(&after["answers"], "records"), number(&after, "records")), (0, 0));
}

/// `clear` removes segments of every version, `prune` those of its own, and neither anything else: no link or folder that has
/// the name of one, no file of others.
#[test]
fn only_segments_are_removed() {
    for (command, more, num_removed) in [("prune", &["--max-mib", "0"][..], 2), ("clear", &[], 3)] {
        let folder = Folder::new(&format!("only-{command}"));
        folder.fill(0..8);
        let (beside, newer) = (folder.0.join("precious"), folder.cache().join("v7-0000000000000001.segment"));
        fs::write(&beside, "not ours").expect("writable");
        fs::write(folder.cache().join("notes.txt"), "not ours").expect("writable");
        fs::write(&newer, "from the future").expect("writable");
        fs::create_dir(folder.cache().join("v1-00000000000000aa.segment")).expect("writable");
        std::os::unix::fs::symlink(&beside, folder.cache().join("v1-00000000000000ff.segment")).expect("writable");
        let (found, _) = report("stat", &folder.cache(), &[]);
        assert_eq!((number(&found, "segments"), number(&found, "other_versions")), (2, 1));

        let (removed, is_fine) = report(command, &folder.cache(), more);
        assert!(is_fine && number(&removed, "kept_segments") == 0, "{removed}");
        assert_eq!((number(&removed, "removed_segments"), newer.exists()), (num_removed, command == "prune"));
        assert_eq!(fs::read_to_string(&beside).expect("there"), "not ours");
        let mut left = folder.segments();
        left.remove("v7-0000000000000001.segment");
        let expected = ["notes.txt", "v1-00000000000000aa.segment", "v1-00000000000000ff.segment"];
        assert_eq!(left, expected.map(String::from).into());
    }
}

/// What is no directory of KV blocks is refused by every command, with a reason, and stays as it is.
#[test]
fn other_directories_are_refused() {
    let folder = Folder::new("refused");
    folder.fill(0..4);
    let make = |name: &str| {
        let path = folder.0.join(name);
        fs::create_dir(&path).expect("writable");
        path
    };
    let (empty, foreign) = (make("empty"), make("foreign"));
    for name in ["lock", "data", "v1-1.segment", "v01-0000000000000001.segment"] {
        fs::write(foreign.join(name), "not ours").expect("writable");
    }
    let (file, link, missing) = (folder.0.join("file"), folder.0.join("link"), folder.0.join("missing"));
    fs::write(&file, "not ours").expect("writable");
    std::os::unix::fs::symlink(folder.cache(), &link).expect("writable");
    for (path, reason) in [
        (&missing, "No such file"),
        (&file, "not a directory"),
        (&link, "a link"),
        (&empty, "no KV cache"),
        (&foreign, "no KV cache"),
    ] {
        for (command, more) in [("stat", &[][..]), ("verify", &[]), ("clear", &[]), ("prune", &["--max-mib", "0"])] {
            let error = refusal(command, path, more);
            assert!(error.starts_with("ns-llm: ") && error.contains(reason), "{command} {}: {error}", path.display());
        }
    }
    assert!(!missing.exists() && fs::read_dir(&empty).expect("there").count() == 0, "nothing was made");
    assert_eq!(fs::read_dir(&foreign).expect("there").count(), 4);
    assert_eq!(folder.segments().len(), 1, "nothing was removed through the link");
}
