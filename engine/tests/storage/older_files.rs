//! What was written by an earlier build is found by this one: files of a cache directory and values of a shared store that
//! were written once and are kept beside this test. They change only with the version of their format. (Answers in the same
//! fixtures are read by the tests of `response_tiers/store.rs`.)

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use ns_llm::storage::disk::{Access, Directory, DiskOptions, DiskStore, draw_seed};
use ns_llm::storage::remote::{RemoteOptions, RemoteStore, ValueStore};
use ns_llm::storage::{Fault, LayoutId, RecordKey};

fn written_by_v1() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/storage/written_by_v1")
}

fn key(name: u8) -> RecordKey {
    RecordKey { content: [name; 32], layout: LayoutId([7; 32]) }
}

fn payload(name: u8) -> Vec<u8> {
    (0..300 + usize::from(name)).map(|i| (i * 7) as u8 ^ name).collect()
}

/// Segments of two owners, in which one block was stored again by the second: each block is found, and that one as it was
/// stored last; what is stored beside them now does not disturb them.
#[test]
fn segments_of_version_1_are_read() {
    let path = std::env::temp_dir().join(format!("ns-llm-older-files-{}", std::process::id()));
    std::fs::create_dir_all(&path).expect("a folder");
    for segment in ["v1-0000000000000000.segment", "v1-0000000000000001.segment"] {
        std::fs::copy(written_by_v1().join(segment), path.join(segment)).expect("copied");
    }
    let options = DiskOptions::new(64 << 20, 6_000).expect("room").owner_share(0.5);
    for life in 0..2 {
        let directory = Directory::open(&path).expect("ours");
        let mut store = DiskStore::open(Box::new(directory), Access::Write, options, draw_seed()).expect("understood");
        store.check_invariants().expect("sound");
        let report = store.report();
        assert_eq!((report.cut_bytes, report.damaged_records, report.damaged_segments), (0, 0, 0));
        for (name, stored) in [(1, 11), (2, 2), (3, 3)] {
            assert_eq!(store.get(&key(name)).expect("sound").as_deref(), Some(&*payload(stored)), "{name}");
        }
        assert_eq!(store.stats().entries, 3 + life);
        assert_eq!(store.put_for(&[1; 32], key(4), &payload(4)), Ok(life == 0));
        store.flush().expect("a disk");
    }
    assert_eq!(
        std::fs::read_dir(&path).expect("ours").count(),
        3,
        "two segments, one of which has grown, and the lock"
    );
    std::fs::remove_dir_all(&path).expect("removed");
}

/// Values by name, as a server would hold them.
struct Values(HashMap<&'static str, Vec<u8>>);

impl ValueStore for Values {
    fn get(&mut self, name: &str, _: u64) -> Result<Option<Vec<u8>>, Fault> {
        Ok(self.0.get(name).cloned())
    }
    fn put(&mut self, _: &str, _: &[u8], _: u64) -> Result<bool, Fault> {
        unreachable!("nothing is stored here")
    }
    fn replace(&mut self, _: &str, _: &[u8], _: u64) -> Result<(), Fault> {
        unreachable!("nothing is stored here")
    }
    fn remove(&mut self, _: &str) -> Result<(), Fault> {
        unreachable!("only what is damaged is removed")
    }
}

/// A block of nodes that share a secret is found under the name that it was stored under, and passes every check.
#[test]
fn values_of_version_1_are_read() {
    let name = "ns-llm:kv:1:26ffa6d2:0606060606060606060606060606060606060606060606060606060606060606:\
                0707070707070707070707070707070707070707070707070707070707070707";
    let value = std::fs::read(written_by_v1().join("remote/block")).expect("a fixture");
    let options = RemoteOptions::new(6_000).secret(b"sixteen bytes at least").expect("long enough");
    let mut store = RemoteStore::new(Box::new(Values(HashMap::from([(name, value)]))), options);
    assert_eq!(store.get(&key(6)), Ok(Some(payload(6))));
    assert_eq!(store.get(&key(7)), Ok(None));
}
