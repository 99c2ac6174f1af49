//! Which blocks a tier has. A disk's own limits bound what it can have, and all of it is known. A store that nodes share has
//! no bound here: of what it was told to have, the blocks that were met most recently are remembered. One that is forgotten
//! is asked for all the same, and stored once more when it is computed, which also renews its time to live.

use std::num::NonZeroUsize;

use lru::LruCache;

use crate::config::MAX_REMOTE_KNOWN_BLOCKS;
use crate::storage::{RecordKey, TierId};

/// Keys of blocks, the most recently met ones when there are too many.
#[derive(Debug)]
pub(super) struct Held {
    keys: LruCache<RecordKey, ()>,
}

impl Held {
    /// Nothing yet.
    pub(super) fn of(id: TierId) -> Self {
        let keys = match id {
            TierId::Disk => LruCache::unbounded(),
            TierId::Remote => LruCache::new(NonZeroUsize::new(MAX_REMOTE_KNOWN_BLOCKS).expect("not zero")),
        };
        Held { keys }
    }

    /// A block is there.
    pub(super) fn insert(&mut self, key: RecordKey) {
        self.keys.put(key, ());
    }

    /// A block is not there any more; whether it was.
    pub(super) fn remove(&mut self, key: &RecordKey) -> bool {
        self.keys.pop(key).is_some()
    }

    /// Whether a block is there.
    pub(super) fn contains(&self, key: &RecordKey) -> bool {
        self.keys.contains(key)
    }

    /// How many are known.
    pub(super) fn len(&self) -> usize {
        self.keys.len()
    }

    /// All that are known.
    pub(super) fn keys(&self) -> impl Iterator<Item = &RecordKey> {
        self.keys.iter().map(|(key, ())| key)
    }

    /// Nothing is there any more.
    pub(super) fn clear(&mut self) {
        self.keys.clear();
    }
}

impl Extend<RecordKey> for Held {
    fn extend<I: IntoIterator<Item = RecordKey>>(&mut self, keys: I) {
        keys.into_iter().for_each(|key| self.insert(key));
    }
}
