//! What keeps answers beyond the process: entries by key, and marks that make entries invalid. A directory
//! ([`DiskAnswers`]) and a store that nodes share ([`RemoteAnswers`]), both over the records that KV blocks have there.
//!
//! **Marks on disk** are read when the directory is opened, and kept in memory. When the segment goes in which a mark lay, the
//! mark is written again. A directory in which a mark may have been damaged gives everything up.
//!
//! **Marks in a shared store** live longer than any entry may; a store that throws values away before their time may throw
//! away a mark. Clearing is a mark there: values end with their time.

use std::collections::HashMap;
use std::sync::Arc;

use sha2::{Digest, Sha256};

use crate::config::{MAX_REMOTE_TTL_S, MAX_RESPONSE_MARKS};
use crate::ids::OwnerKey;
use crate::response_cache::{ResponseKey, decode_mark, encode_mark, mark_key};
use crate::storage::disk::DiskStore;
use crate::storage::remote::RemoteStore;
use crate::storage::{Fault, LayoutId, RecordKey, TierId};

/// How long a mark is kept in a shared store: longer than an entry that was being stored when the mark was made.
const MARK_TTL_S: u64 = MAX_REMOTE_TTL_S + 86_400;
/// How often marks that lost their segments are written again, each time for those that lost theirs by that.
const MAX_REWRITES: usize = 8;

/// Entries and marks. It may wait for a disk or a network.
pub(crate) trait AnswerStore: Send {
    /// Which tier it is.
    fn id(&self) -> TierId;
    /// The entry of a key, as it was stored.
    fn get(&mut self, key: &ResponseKey) -> Result<Option<Arc<[u8]>>, Fault>;
    /// Stores an entry that is of use for `ttl_ms` and counts for an owner, in the place of one that is there.
    fn put(&mut self, key: &ResponseKey, owner: &OwnerKey, entry: &[u8], ttl_ms: u64) -> Result<(), Fault>;
    /// Makes a mark; a later one of the same key counts.
    fn mark(&mut self, key: &ResponseKey, at_ms: u64) -> Result<(), Fault>;
    /// When a mark was made.
    fn marked_ms(&mut self, key: &ResponseKey) -> Result<Option<u64>, Fault>;
    /// Gives up every entry that was begun until `at_ms`.
    fn clear(&mut self, at_ms: u64) -> Result<(), Fault>;
    /// Waits until what was stored would outlive a failure of power.
    fn flush(&mut self) -> Result<(), Fault>;
    /// Entries and bytes that are held, as far as that is known.
    fn held(&self) -> (u64, u64);
}

/// Answers in a directory that only this process writes.
pub(crate) struct DiskAnswers {
    tier: DiskStore,
    /// All that are on disk.
    marks: HashMap<ResponseKey, u64>,
}

impl DiskAnswers {
    /// Reads the marks. If one of them cannot be read, nothing that is there is used.
    pub(crate) fn open(tier: DiskStore) -> Self {
        let mut answers = DiskAnswers { tier, marks: HashMap::new() };
        let is_sound = answers.tier.report().inner_damage == 0 && answers.read_marks().is_some();
        if !is_sound {
            // What cannot be removed is not found either: the tier has forgotten it, and finds it damaged next time.
            let _ = answers.clear(0);
        }
        answers
    }

    fn read_marks(&mut self) -> Option<()> {
        let keys: Vec<RecordKey> = self.tier.keys().filter(|key| key.layout == mark_layout()).copied().collect();
        for key in keys {
            let at_ms = self.tier.get(&key).ok()?.and_then(|bytes| decode_mark(&bytes))?;
            self.marks.insert(ResponseKey(key.content), at_ms);
        }
        Some(())
    }

    /// Writes the marks again whose segments went.
    fn keep_marks(&mut self) -> Result<(), Fault> {
        for _ in 0..MAX_REWRITES {
            let lost: Vec<RecordKey> =
                self.tier.take_lost().into_iter().filter(|key| key.layout == mark_layout()).collect();
            if lost.is_empty() {
                return Ok(());
            }
            for key in lost {
                if let Some(&at_ms) = self.marks.get(&ResponseKey(key.content)) {
                    self.tier.replace(&OwnerKey::default(), key, &encode_mark(at_ms))?;
                }
            }
        }
        // The marks are more than the directory holds beside anything else.
        self.clear(0)
    }
}

impl AnswerStore for DiskAnswers {
    fn id(&self) -> TierId {
        TierId::Disk
    }

    fn get(&mut self, key: &ResponseKey) -> Result<Option<Arc<[u8]>>, Fault> {
        let found = self.tier.get(&record_key(key, entry_layout()));
        self.keep_marks()?;
        found
    }

    fn put(&mut self, key: &ResponseKey, owner: &OwnerKey, entry: &[u8], _ttl_ms: u64) -> Result<(), Fault> {
        let stored = self.tier.replace(owner, record_key(key, entry_layout()), entry);
        self.keep_marks()?;
        stored
    }

    fn mark(&mut self, key: &ResponseKey, at_ms: u64) -> Result<(), Fault> {
        if self.marks.len() >= MAX_RESPONSE_MARKS && !self.marks.contains_key(key) {
            return self.clear(at_ms);
        }
        self.tier.replace(&OwnerKey::default(), record_key(key, mark_layout()), &encode_mark(at_ms))?;
        self.marks.insert(*key, at_ms);
        self.keep_marks()
    }

    fn marked_ms(&mut self, key: &ResponseKey) -> Result<Option<u64>, Fault> {
        Ok(self.marks.get(key).copied())
    }

    fn clear(&mut self, _at_ms: u64) -> Result<(), Fault> {
        self.marks.clear();
        let cleared = self.tier.clear();
        self.tier.take_lost();
        cleared
    }

    fn flush(&mut self) -> Result<(), Fault> {
        let flushed = self.tier.flush();
        self.keep_marks()?;
        flushed
    }

    fn held(&self) -> (u64, u64) {
        let stats = self.tier.stats();
        (stats.entries - self.marks.len() as u64, stats.bytes)
    }
}

/// Answers in a store that nodes share.
pub(crate) struct RemoteAnswers {
    tier: RemoteStore,
    /// Of the engine: its answers are a key space of their own.
    identity: [u8; 32],
}

impl RemoteAnswers {
    pub(crate) fn new(tier: RemoteStore, identity: [u8; 32]) -> Self {
        RemoteAnswers { tier, identity }
    }
}

impl AnswerStore for RemoteAnswers {
    fn id(&self) -> TierId {
        TierId::Remote
    }

    fn get(&mut self, key: &ResponseKey) -> Result<Option<Arc<[u8]>>, Fault> {
        Ok(self.tier.get(&record_key(key, entry_layout()))?.map(Into::into))
    }

    fn put(&mut self, key: &ResponseKey, _owner: &OwnerKey, entry: &[u8], ttl_ms: u64) -> Result<(), Fault> {
        let ttl_s = ttl_ms.div_ceil(1_000).clamp(1, self.tier.max_ttl_s());
        self.tier.replace(&record_key(key, entry_layout()), entry, ttl_s)
    }

    fn mark(&mut self, key: &ResponseKey, at_ms: u64) -> Result<(), Fault> {
        self.tier.replace(&record_key(key, mark_layout()), &encode_mark(at_ms), MARK_TTL_S)
    }

    fn marked_ms(&mut self, key: &ResponseKey) -> Result<Option<u64>, Fault> {
        let found = self.tier.get(&record_key(key, mark_layout()))?;
        // Whatever stands there instead of a mark, it says that there was one.
        Ok(found.map(|bytes| decode_mark(&bytes).unwrap_or(u64::MAX)))
    }

    fn clear(&mut self, at_ms: u64) -> Result<(), Fault> {
        self.mark(&mark_key(&self.identity, None), at_ms)
    }

    fn flush(&mut self) -> Result<(), Fault> {
        Ok(())
    }

    fn held(&self) -> (u64, u64) {
        (0, 0)
    }
}

fn record_key(key: &ResponseKey, layout: LayoutId) -> RecordKey {
    RecordKey { content: key.0, layout }
}

fn entry_layout() -> LayoutId {
    LayoutId(Sha256::digest("ns-llm answers v1").into())
}

fn mark_layout() -> LayoutId {
    LayoutId(Sha256::digest("ns-llm answers' marks v1").into())
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::path::{Path, PathBuf};

    use super::*;
    use crate::response_cache::StoredEntry;
    use crate::storage::disk::{Access, Directory, DiskOptions, draw_seed};
    use crate::storage::remote::{RemoteOptions, ValueStore};

    /// What an earlier build has written, kept beside the tests of the storage.
    fn written_by_v1() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/storage/written_by_v1")
    }

    fn entry(name: u8, tag: &str) -> StoredEntry {
        let value = (0..300 + usize::from(name)).map(|i| (i * 7) as u8 ^ name).collect();
        StoredEntry { begun_ms: 100, stored_ms: 200, expires_ms: 1_200, tags: [Arc::from(tag)].into(), value }
    }

    fn found(answers: &mut dyn AnswerStore, name: u8) -> Option<StoredEntry> {
        answers.get(&ResponseKey([name; 32])).expect("sound").and_then(|bytes| StoredEntry::decode(&bytes))
    }

    /// Answers and a mark in a segment that an earlier build wrote are found.
    #[test]
    fn answers_on_disk_of_version_1_are_read() {
        let path = std::env::temp_dir().join(format!("ns-llm-older-answers-{}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a folder");
        let segment = "v1-0000000000000000.segment";
        std::fs::copy(written_by_v1().join("answers").join(segment), path.join(segment)).expect("copied");
        let options = DiskOptions::new(1 << 30, crate::response_cache::MAX_ENTRY_BYTES as u64).expect("room");
        let directory = Directory::open(&path).expect("ours");
        let store = DiskStore::open(Box::new(directory), Access::Write, options, draw_seed()).expect("understood");
        let mut answers = DiskAnswers::open(store);
        assert_eq!(found(&mut answers, 4), Some(entry(4, "docs")));
        assert_eq!(found(&mut answers, 5), Some(entry(5, "news")));
        assert_eq!(answers.marked_ms(&mark_key(&[9; 32], Some("docs"))), Ok(Some(150)));
        assert_eq!(answers.marked_ms(&mark_key(&[9; 32], Some("news"))), Ok(None));
        drop(answers);
        std::fs::remove_dir_all(&path).expect("removed");
    }

    struct Values(HashMap<&'static str, &'static str>);

    impl ValueStore for Values {
        fn get(&mut self, name: &str, _: u64) -> Result<Option<Vec<u8>>, Fault> {
            Ok(self
                .0
                .get(name)
                .map(|file| std::fs::read(written_by_v1().join("remote").join(file)).expect("a fixture")))
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

    /// The same of an answer and a mark in a shared store, by their names there.
    #[test]
    fn shared_answers_of_version_1_are_read() {
        let answer = "ns-llm:answer:1:open:0404040404040404040404040404040404040404040404040404040404040404:\
                      14b7226c6eeb3a864a5bafa0217158ed20bd32e21e5f49f0cdbc46cf689ad3bc";
        let mark = "ns-llm:answer:1:open:07044d1966d4a8b4738397363ac03d9cb6f5d658b52c50121d3ce4a73b49e0e7:\
                    a572b89c64552108a6f491208bad4c0d551245c45fbd6aa988b7e922ffa95d26";
        let values = Values(HashMap::from([(answer, "answer"), (mark, "mark")]));
        let store = RemoteStore::new(Box::new(values), RemoteOptions::new(6_000).kind("answer"));
        let mut answers = RemoteAnswers::new(store, [9; 32]);
        assert_eq!(found(&mut answers, 4), Some(entry(4, "docs")));
        assert_eq!(answers.marked_ms(&mark_key(&[9; 32], Some("docs"))), Ok(Some(150)));
    }
}
