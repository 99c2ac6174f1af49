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
use crate::kv_cache::tiers::disk::DiskTier;
use crate::kv_cache::tiers::remote::RemoteTier;
use crate::kv_cache::tiers::{Fault, LayoutId, StoredKey, TierId};
use crate::response_cache::{ResponseKey, decode_mark, encode_mark, mark_key};
use crate::sequence::{BlockKey, OwnerKey};

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
    tier: DiskTier,
    /// All that are on disk.
    marks: HashMap<ResponseKey, u64>,
}

impl DiskAnswers {
    /// Reads the marks. If one of them cannot be read, nothing that is there is used.
    pub(crate) fn open(tier: DiskTier) -> Self {
        let mut answers = DiskAnswers { tier, marks: HashMap::new() };
        let is_sound = answers.tier.report().inner_damage == 0 && answers.read_marks().is_some();
        if !is_sound {
            // What cannot be removed is not found either: the tier has forgotten it, and finds it damaged next time.
            let _ = answers.clear(0);
        }
        answers
    }

    fn read_marks(&mut self) -> Option<()> {
        let keys: Vec<StoredKey> = self.tier.keys().filter(|key| key.layout == mark_layout()).copied().collect();
        for key in keys {
            let at_ms = self.tier.get(&key).ok()?.and_then(|bytes| decode_mark(&bytes))?;
            self.marks.insert(ResponseKey(key.block.0), at_ms);
        }
        Some(())
    }

    /// Writes the marks again whose segments went.
    fn keep_marks(&mut self) -> Result<(), Fault> {
        for _ in 0..MAX_REWRITES {
            let lost: Vec<StoredKey> =
                self.tier.take_lost().into_iter().filter(|key| key.layout == mark_layout()).collect();
            if lost.is_empty() {
                return Ok(());
            }
            for key in lost {
                if let Some(&at_ms) = self.marks.get(&ResponseKey(key.block.0)) {
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
        let found = self.tier.get(&stored(key, entry_layout()));
        self.keep_marks()?;
        found
    }

    fn put(&mut self, key: &ResponseKey, owner: &OwnerKey, entry: &[u8], _ttl_ms: u64) -> Result<(), Fault> {
        let stored = self.tier.replace(owner, stored(key, entry_layout()), entry);
        self.keep_marks()?;
        stored
    }

    fn mark(&mut self, key: &ResponseKey, at_ms: u64) -> Result<(), Fault> {
        if self.marks.len() >= MAX_RESPONSE_MARKS && !self.marks.contains_key(key) {
            return self.clear(at_ms);
        }
        self.tier.replace(&OwnerKey::default(), stored(key, mark_layout()), &encode_mark(at_ms))?;
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
    tier: RemoteTier,
    /// Of the engine: its answers are a key space of their own.
    identity: [u8; 32],
}

impl RemoteAnswers {
    pub(crate) fn new(tier: RemoteTier, identity: [u8; 32]) -> Self {
        RemoteAnswers { tier, identity }
    }
}

impl AnswerStore for RemoteAnswers {
    fn id(&self) -> TierId {
        TierId::Remote
    }

    fn get(&mut self, key: &ResponseKey) -> Result<Option<Arc<[u8]>>, Fault> {
        Ok(self.tier.get(&stored(key, entry_layout()))?.map(Into::into))
    }

    fn put(&mut self, key: &ResponseKey, _owner: &OwnerKey, entry: &[u8], ttl_ms: u64) -> Result<(), Fault> {
        let ttl_s = ttl_ms.div_ceil(1_000).clamp(1, self.tier.max_ttl_s());
        self.tier.replace(&stored(key, entry_layout()), entry, ttl_s)
    }

    fn mark(&mut self, key: &ResponseKey, at_ms: u64) -> Result<(), Fault> {
        self.tier.replace(&stored(key, mark_layout()), &encode_mark(at_ms), MARK_TTL_S)
    }

    fn marked_ms(&mut self, key: &ResponseKey) -> Result<Option<u64>, Fault> {
        let found = self.tier.get(&stored(key, mark_layout()))?;
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

fn stored(key: &ResponseKey, layout: LayoutId) -> StoredKey {
    StoredKey { block: BlockKey(key.0), layout }
}

fn entry_layout() -> LayoutId {
    LayoutId(Sha256::digest("ns-llm answers v1").into())
}

fn mark_layout() -> LayoutId {
    LayoutId(Sha256::digest("ns-llm answers' marks v1").into())
}
