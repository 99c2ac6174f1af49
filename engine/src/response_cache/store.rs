//! Bytes by key, within a budget: those of an owner over his share go first, of them the least recently used; none is found
//! beyond its time, and what a tag or a version has made invalid is gone, also when it was still being computed at that moment.
//!
//! Invariants ([`ResponseStore::check_invariants`]): the bytes of all entries are their sum and never above the budget; each
//! entry stands once in the order of expiry and once under each of its tags, and nothing else does.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::Arc;

use super::key::ResponseKey;
use super::ttl::adaptive_ttl_ms;
use crate::config::{
    MAX_REMEMBERED_INVALIDATIONS, MAX_RESPONSE_BYTES, RESPONSE_ENTRY_BYTES, RESPONSE_TAG_BYTES, ResponseCacheOptions,
};
use crate::fair_lru::FairLru;
use crate::ids::OwnerKey;
use crate::stats::ResponseCacheStats;

/// How an entry is kept.
#[derive(Debug, Clone, Default)]
pub struct EntryOptions {
    /// Names under which it can be made invalid.
    pub tags: Arc<[Arc<str>]>,
    /// How long it is found, milliseconds; `None`: as the cache says.
    pub ttl_ms: Option<u64>,
    /// Whom it counts for.
    pub owner: OwnerKey,
}

/// When somebody began to compute what is to be stored: what has become invalid since then is not stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ticket {
    version: u64,
    invalidations: u64,
}

#[derive(Debug)]
struct Entry {
    value: Arc<[u8]>,
    tags: Arc<[Arc<str>]>,
    /// Of the budget.
    bytes: u64,
    used: EntryUse,
    /// Its time to live, before its use is looked at.
    base_ttl_ms: u64,
    expires_ms: u64,
}

/// When an entry was stored and found, milliseconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EntryUse {
    /// When it was stored.
    pub stored_ms: u64,
    /// When it was found last, or else stored.
    pub last_used_ms: u64,
    /// How often it was found.
    pub hits: u64,
}

/// The entries, and the ways to them. Freeing many takes time, so [`ResponseStore::clear`] hands them out: whoever holds a
/// lock drops them after it.
#[derive(Debug)]
pub struct Contents {
    /// Only looked up, never iterated where the order matters.
    entries: HashMap<ResponseKey, Entry>,
    order: FairLru<ResponseKey>,
    by_expiry: BTreeSet<(u64, ResponseKey)>,
    by_tag: HashMap<Arc<str>, HashSet<ResponseKey>>,
    bytes: u64,
}

/// Entries that were given up. Values are large, and freeing them takes time: whoever holds a lock drops them after it.
#[derive(Debug, Default)]
pub struct Freed(Vec<Entry>);

/// The response cache of one engine.
#[derive(Debug)]
pub struct ResponseStore {
    options: ResponseCacheOptions,
    /// Of the budget, what one owner may keep when others need room.
    owner_share: f64,
    contents: Contents,
    freed: Freed,
    /// The latest tags that were made invalid, oldest first, each with its number.
    invalidated: VecDeque<(u64, Arc<str>)>,
    num_invalidations: u64,
    counters: ResponseCacheStats,
}

impl ResponseStore {
    /// An empty one. `owner_share`: of the budget, what one owner may keep when others need room.
    pub fn new(options: ResponseCacheOptions, owner_share: f64) -> Self {
        ResponseStore {
            options,
            owner_share,
            contents: Contents::new(options.max_bytes, owner_share),
            freed: Freed::default(),
            invalidated: VecDeque::new(),
            num_invalidations: 0,
            counters: ResponseCacheStats::default(),
        }
    }

    /// Whether anything can be kept.
    pub fn is_on(&self) -> bool {
        self.options.max_bytes > 0
    }

    /// How long an entry is found that does not say so itself, milliseconds.
    pub fn ttl_ms(&self) -> u64 {
        self.options.ttl_ms
    }

    /// Part of every key.
    pub fn version(&self) -> u64 {
        self.options.version
    }

    /// For what will be computed from now on.
    pub fn ticket(&self) -> Ticket {
        Ticket { version: self.options.version, invalidations: self.num_invalidations }
    }

    /// The value of `key`, which becomes the most recently used.
    pub fn get(&mut self, key: &ResponseKey, now_ms: u64) -> Option<(Arc<[u8]>, EntryUse)> {
        if self.drop_if_expired(key, now_ms) {
            self.counters.misses += 1;
            return None;
        }
        let Some(entry) = self.contents.entries.get_mut(key) else {
            self.counters.misses += 1;
            return None;
        };
        self.contents.order.touch(key);
        self.counters.hits += 1;
        entry.used.hits += 1;
        entry.used.last_used_ms = now_ms;
        if self.options.adaptive_ttl {
            let EntryUse { stored_ms, hits, .. } = entry.used;
            let ttl_ms = adaptive_ttl_ms(entry.base_ttl_ms, hits, now_ms.saturating_sub(stored_ms));
            self.contents.by_expiry.remove(&(entry.expires_ms, *key));
            entry.expires_ms = stored_ms.saturating_add(ttl_ms);
            self.contents.by_expiry.insert((entry.expires_ms, *key));
        }
        Some((entry.value.clone(), entry.used))
    }

    /// Whether `key` would be found. Counts as no use.
    pub fn contains(&self, key: &ResponseKey, now_ms: u64) -> bool {
        self.contents.entries.get(key).is_some_and(|entry| now_ms < entry.expires_ms)
    }

    /// Keeps a value, in the place of an earlier one of that key. False when it is not kept: it is too large, or has become
    /// invalid since its `ticket`.
    pub fn put(
        &mut self,
        key: ResponseKey,
        value: Arc<[u8]>,
        options: EntryOptions,
        ticket: Ticket,
        now_ms: u64,
    ) -> bool {
        if self.is_outdated(&options.tags, ticket) {
            self.counters.outdated += 1;
            return false;
        }
        let is_kept = self.insert(key, value, options, now_ms);
        match is_kept {
            true => self.counters.stores += 1,
            false => self.counters.too_large += 1,
        }
        is_kept
    }

    /// An entry has come back from another tier: it is kept here too, if there is room. False: it has become invalid since
    /// its `ticket`, and is not to be used.
    pub fn promote(
        &mut self,
        key: ResponseKey,
        value: Arc<[u8]>,
        options: EntryOptions,
        ticket: Ticket,
        now_ms: u64,
    ) -> bool {
        let is_valid = !self.is_outdated(&options.tags, ticket);
        if is_valid {
            self.insert(key, value, options, now_ms);
        }
        is_valid
    }

    /// False: it is larger than an entry may be.
    fn insert(&mut self, key: ResponseKey, value: Arc<[u8]>, options: EntryOptions, now_ms: u64) -> bool {
        self.remove(&key);
        let tag_bytes: u64 = options.tags.iter().map(|tag| tag.len() as u64 + RESPONSE_TAG_BYTES).sum();
        let bytes = value.len() as u64 + tag_bytes + RESPONSE_ENTRY_BYTES;
        if value.len() > MAX_RESPONSE_BYTES || bytes > self.options.max_bytes || self.options.max_entries == 0 {
            return false;
        }
        self.make_room(bytes, now_ms);
        let base_ttl_ms = options.ttl_ms.unwrap_or(self.options.ttl_ms);
        let expires_ms = now_ms.saturating_add(base_ttl_ms);
        let used = EntryUse { stored_ms: now_ms, last_used_ms: now_ms, hits: 0 };
        let entry = Entry { value, tags: options.tags, bytes, used, base_ttl_ms, expires_ms };
        self.contents.insert(key, entry, options.owner);
        true
    }

    /// What was given up since the last call, to be freed.
    pub fn take_freed(&mut self) -> Freed {
        std::mem::take(&mut self.freed)
    }

    /// Counts a value that was too large to be collected.
    pub fn refuse_too_large(&mut self) {
        self.counters.too_large += 1;
    }

    /// Gives one entry up; whether it was there.
    pub fn remove(&mut self, key: &ResponseKey) -> bool {
        let removed = self.contents.remove(key);
        let was_there = removed.is_some();
        self.freed.0.extend(removed);
        was_there
    }

    /// Gives up every entry with this tag, and does not store what is being computed with it; how many entries that were.
    pub fn invalidate(&mut self, tag: &str) -> usize {
        self.num_invalidations += 1;
        if self.invalidated.len() == MAX_REMEMBERED_INVALIDATIONS {
            self.invalidated.pop_front();
        }
        self.invalidated.push_back((self.num_invalidations, tag.into()));
        let keys =
            self.contents.by_tag.get(tag).map(|keys| keys.iter().copied().collect::<Vec<_>>()).unwrap_or_default();
        self.freed.0.extend(keys.iter().filter_map(|key| self.contents.remove(key)));
        self.counters.invalidated += keys.len() as u64;
        keys.len()
    }

    /// From now on everything that was stored under another version is not found, and what is being computed is not stored.
    pub fn set_version(&mut self, version: u64) -> Contents {
        if version == self.options.version {
            return self.emptied();
        }
        self.options.version = version;
        self.clear()
    }

    /// Gives everything up.
    pub fn clear(&mut self) -> Contents {
        self.counters.invalidated += self.contents.entries.len() as u64;
        // What is being computed now has no tag of its own here: it counts as older than all that is remembered.
        self.num_invalidations += 1;
        self.invalidated.clear();
        let empty = self.emptied();
        std::mem::replace(&mut self.contents, empty)
    }

    fn emptied(&self) -> Contents {
        Contents::new(self.options.max_bytes, self.owner_share)
    }

    /// Gives everything up and keeps nothing any more.
    pub fn close(&mut self) -> Contents {
        self.options.max_bytes = 0;
        self.clear()
    }

    /// Gives up what is beyond its time; how many that were.
    pub fn prune(&mut self, now_ms: u64) -> usize {
        let mut count = 0;
        while let Some(&(expires_ms, key)) = self.contents.by_expiry.first() {
            if now_ms < expires_ms {
                break;
            }
            self.remove(&key);
            count += 1;
        }
        self.counters.expired += count as u64;
        count
    }

    /// Counts since it was made, and what it holds.
    pub fn stats(&self) -> ResponseCacheStats {
        ResponseCacheStats {
            entries: self.contents.entries.len() as u64,
            bytes: self.contents.bytes,
            max_bytes: self.options.max_bytes,
            version: self.options.version,
            ..self.counters
        }
    }

    /// Whether something that concerns an entry with `tags` has become invalid since `ticket`. When that is too long ago to be
    /// known, it has.
    fn is_outdated(&self, tags: &[Arc<str>], ticket: Ticket) -> bool {
        if ticket.version != self.options.version {
            return true;
        }
        let since = self.num_invalidations - ticket.invalidations;
        let known = self.invalidated.iter().filter(|(number, _)| *number > ticket.invalidations);
        since > known.clone().count() as u64 || known.into_iter().any(|(_, tag)| tags.contains(tag))
    }

    /// What is beyond its time goes first, then what was not used for longest.
    fn make_room(&mut self, bytes: u64, now_ms: u64) {
        let (max_bytes, max_entries) = (self.options.max_bytes - bytes, self.options.max_entries - 1);
        let is_full = |c: &Contents| c.bytes > max_bytes || c.entries.len() as u64 > max_entries;
        if is_full(&self.contents) {
            self.prune(now_ms);
        }
        while is_full(&self.contents) {
            let Some(key) = self.contents.order.pop() else { break };
            self.remove(&key);
            self.counters.evictions += 1;
        }
    }

    fn drop_if_expired(&mut self, key: &ResponseKey, now_ms: u64) -> bool {
        let is_expired = self.contents.entries.get(key).is_some_and(|entry| now_ms >= entry.expires_ms);
        if is_expired {
            self.remove(key);
            self.counters.expired += 1;
        }
        is_expired
    }

    /// See the head of this file.
    pub fn check_invariants(&self) -> Result<(), String> {
        let Contents { entries, order, by_expiry, by_tag, bytes } = &self.contents;
        let check = |holds: bool, what: &str| if holds { Ok(()) } else { Err(what.to_string()) };
        order.check_invariants().map_err(|error| error.to_string())?;
        check(order.len() == entries.len() && order.iter().all(|key| entries.contains_key(key)), "the order differs")?;
        check(*bytes == entries.values().map(|entry| entry.bytes).sum::<u64>(), "bytes are not the sum")?;
        check(*bytes <= self.options.max_bytes, "more bytes than the budget")?;
        check(entries.len() as u64 <= self.options.max_entries, "more entries than allowed")?;
        check(by_expiry.len() == entries.len(), "the order of expiry has another length")?;
        for (key, entry) in entries {
            check(by_expiry.contains(&(entry.expires_ms, *key)), "an entry is missing in the order of expiry")?;
            let is_tagged = |tag| by_tag.get(tag).is_some_and(|keys: &HashSet<_>| keys.contains(key));
            check(entry.tags.iter().all(is_tagged), "an entry is missing under a tag")?;
        }
        for (tag, keys) in by_tag {
            check(!keys.is_empty(), "a tag without entries")?;
            let has_tag = |key| entries.get(key).is_some_and(|entry| entry.tags.contains(tag));
            check(keys.iter().all(has_tag), "a tag names an entry that does not have it")?;
        }
        Ok(())
    }
}

impl Contents {
    fn new(max_bytes: u64, owner_share: f64) -> Self {
        let order = FairLru::new((max_bytes as f64 * owner_share) as u64);
        Contents { entries: HashMap::new(), order, by_expiry: BTreeSet::new(), by_tag: HashMap::new(), bytes: 0 }
    }

    fn insert(&mut self, key: ResponseKey, entry: Entry, owner: OwnerKey) {
        self.bytes += entry.bytes;
        self.by_expiry.insert((entry.expires_ms, key));
        for tag in entry.tags.iter() {
            self.by_tag.entry(tag.clone()).or_default().insert(key);
        }
        self.order.insert(key, owner, entry.bytes);
        self.entries.insert(key, entry);
    }

    fn remove(&mut self, key: &ResponseKey) -> Option<Entry> {
        let entry = self.entries.remove(key)?;
        self.order.forget(key);
        self.bytes -= entry.bytes;
        self.by_expiry.remove(&(entry.expires_ms, *key));
        for tag in entry.tags.iter() {
            if let Some(keys) = self.by_tag.get_mut(tag) {
                keys.remove(key);
                if keys.is_empty() {
                    self.by_tag.remove(tag);
                }
            }
        }
        Some(entry)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TTL_MS: u64 = 1_000;

    fn store(max_entries: u64) -> ResponseStore {
        // Entries of 100 bytes without tags.
        let max_bytes = max_entries * (RESPONSE_ENTRY_BYTES + 100);
        ResponseStore::new(ResponseCacheOptions { max_bytes, ttl_ms: TTL_MS, ..ResponseCacheOptions::default() }, 1.0)
    }

    fn key(name: u8) -> ResponseKey {
        ResponseKey([name; 32])
    }

    fn tagged(tags: &[&str]) -> EntryOptions {
        EntryOptions { tags: tags.iter().map(|&tag| tag.into()).collect(), ttl_ms: None, ..EntryOptions::default() }
    }

    fn put(store: &mut ResponseStore, name: u8, options: EntryOptions, now_ms: u64) -> bool {
        let ticket = store.ticket();
        store.put(key(name), vec![name; 100].into(), options, ticket, now_ms)
    }

    fn found(store: &mut ResponseStore, now_ms: u64) -> Vec<u8> {
        (0..=9).filter(|&name| store.contains(&key(name), now_ms)).collect()
    }

    /// The flood of one owner takes from others no more than what his share and unused room allow.
    #[test]
    fn flood_of_one_owner_leaves_others_theirs() {
        for (share, num_left) in [(1.0, 0), (0.5, 40)] {
            let max_bytes = 100 * (RESPONSE_ENTRY_BYTES + 100);
            let options = ResponseCacheOptions { max_bytes, ttl_ms: TTL_MS, ..ResponseCacheOptions::default() };
            let mut store = ResponseStore::new(options, share);
            let name = |name: u32| ResponseKey(std::array::from_fn(|i| name.to_le_bytes()[i % 4]));
            for number in 0..10_000 {
                let owner = if number < 40 { [1; 32] } else { [2; 32] };
                let (options, ticket) = (EntryOptions { owner, ..EntryOptions::default() }, store.ticket());
                assert!(store.put(name(number), vec![0; 100].into(), options, ticket, 0));
            }
            let left = (0..40).filter(|&number| store.contains(&name(number), 0)).count();
            assert_eq!((left, store.stats().entries), (num_left, 100), "{share}");
            store.check_invariants().expect("sound");
        }
    }

    /// However an entry is given up, its value is handed out and not freed meanwhile: that takes time, and somebody holds a
    /// lock.
    #[test]
    fn values_are_freed_by_who_asks_for_them() {
        type GiveUp = fn(&mut ResponseStore);
        let ways: [(&str, GiveUp); 6] = [
            ("a tag", |store| assert_eq!(store.invalidate("t"), 1)),
            ("age", |store| assert_eq!(store.prune(TTL_MS), 1)),
            ("age, when it is asked for", |store| assert!(store.get(&key(0), TTL_MS).is_none())),
            ("room", |store| assert!(put(store, 1, EntryOptions::default(), 0))),
            ("another value", |store| assert!(put(store, 0, EntryOptions::default(), 0))),
            ("its name", |store| assert!(store.remove(&key(0)))),
        ];
        for (why, give_up) in ways {
            // With its tag it leaves no room for another one.
            let (mut store, value): (_, Arc<[u8]>) = (store(2), vec![0; 20].into());
            let ticket = store.ticket();
            assert!(store.put(key(0), value.clone(), tagged(&["t"]), ticket, 0), "{why}");
            give_up(&mut store);
            assert_eq!(Arc::strong_count(&value), 2, "{why}: not yet");
            drop(store.take_freed());
            assert_eq!(Arc::strong_count(&value), 1, "{why}");
            store.check_invariants().expect("sound");
        }
    }

    /// The least recently used entry goes when there is no room; being found is a use, being asked for is none.
    #[test]
    fn the_least_recently_used_goes() {
        let mut store = store(3);
        (0..3).for_each(|name| assert!(put(&mut store, name, EntryOptions::default(), 0)));
        let (value, used) = store.get(&key(0), 1).expect("was put");
        assert_eq!((&value[..], used), ([0; 100].as_slice(), EntryUse { stored_ms: 0, last_used_ms: 1, hits: 1 }));
        assert!(store.contains(&key(1), 1));
        assert!(put(&mut store, 3, EntryOptions::default(), 1));
        assert_eq!(found(&mut store, 1), [0, 2, 3]);
        let stats = store.stats();
        assert_eq!((stats.hits, stats.misses, stats.stores, stats.evictions, stats.entries), (1, 0, 4, 1, 3));
        assert_eq!(stats.bytes, stats.max_bytes);
    }

    /// An entry is found until its time is over and not a millisecond longer; its own time goes before the cache's; what is
    /// over makes room before what is used.
    #[test]
    fn time_is_kept() {
        let mut store = store(2);
        put(&mut store, 0, EntryOptions::default(), 0);
        put(&mut store, 1, EntryOptions { ttl_ms: Some(10), ..EntryOptions::default() }, 0);
        assert!(store.get(&key(1), 9).is_some() && store.get(&key(1), 10).is_none());
        assert_eq!((store.stats().expired, store.stats().misses), (1, 1));
        put(&mut store, 1, EntryOptions { ttl_ms: Some(10), ..EntryOptions::default() }, 20);
        assert!(store.get(&key(1), 21).is_some(), "the most recently used, and the first to expire");
        put(&mut store, 2, EntryOptions::default(), 40);
        assert_eq!(found(&mut store, 40), [0, 2]);
        assert_eq!(store.stats().evictions, 0);
        assert!(store.get(&key(0), TTL_MS - 1).is_some() && store.get(&key(0), TTL_MS).is_none());
        assert_eq!((store.prune(2 * TTL_MS), store.stats().entries, store.stats().bytes), (1, 0, 0));
    }

    /// With adaptive time, use makes an entry live longer than the base, and being used rarely shorter.
    #[test]
    fn use_sets_the_time() {
        let options = ResponseCacheOptions { max_bytes: 1 << 20, ttl_ms: 60_000, ..ResponseCacheOptions::default() };
        let mut store = ResponseStore::new(ResponseCacheOptions { adaptive_ttl: true, ..options }, 1.0);
        for name in 0..3 {
            put(&mut store, name, EntryOptions::default(), 0);
        }
        (0..200).for_each(|i| assert!(store.get(&key(0), i * 295).is_some()));
        assert!(store.get(&key(1), 20_000).is_some(), "one hit in twenty seconds");
        assert_eq!(found(&mut store, 59_999), [0, 2]);
        assert_eq!(found(&mut store, 119_999), [0]);
        assert!(found(&mut store, 120_000).is_empty());
        store.check_invariants().expect("holds");
    }

    /// A tag takes its entries along, and no others; also those that were being computed when it became invalid.
    #[test]
    fn tags_are_invalidated() {
        let mut store = store(9);
        put(&mut store, 0, tagged(&["a"]), 0);
        put(&mut store, 1, tagged(&["a", "b"]), 0);
        put(&mut store, 2, tagged(&["b"]), 0);
        put(&mut store, 3, EntryOptions::default(), 0);
        let before = store.ticket();
        assert_eq!(store.invalidate("a"), 2);
        assert_eq!(found(&mut store, 1), [2, 3]);
        assert!(!store.put(key(4), [0; 9].into(), tagged(&["c", "a"]), before, 1), "was being computed");
        assert!(store.put(key(4), [0; 9].into(), tagged(&["c"]), before, 1));
        assert!(put(&mut store, 5, tagged(&["a"]), 1), "computed afterwards");
        assert_eq!((store.invalidate("a"), store.invalidate("none")), (1, 0));
        assert_eq!((store.stats().invalidated, store.stats().outdated), (3, 1));
        store.check_invariants().expect("holds");
    }

    /// What was being computed so long ago that the invalidations since are not all known is not stored.
    #[test]
    fn forgotten_invalidations_count() {
        let mut store = store(9);
        let before = store.ticket();
        (0..MAX_REMEMBERED_INVALIDATIONS).for_each(|i| assert_eq!(store.invalidate(&i.to_string()), 0));
        assert!(store.put(key(0), [0; 9].into(), tagged(&["x"]), before, 0), "all are known");
        store.invalidate("one more");
        assert!(!store.put(key(1), [0; 9].into(), tagged(&["x"]), before, 0));
    }

    /// Another version, and clearing, leave nothing, and nothing that was being computed comes after them.
    #[test]
    fn versions_and_clearing_leave_nothing() {
        let mut store = store(9);
        put(&mut store, 0, tagged(&["a"]), 0);
        let before = store.ticket();
        drop(store.set_version(0));
        assert_eq!(found(&mut store, 1), [0], "the same version");
        drop(store.set_version(7));
        assert_eq!((found(&mut store, 1), store.stats().bytes, store.version()), (vec![], 0, 7));
        assert!(!store.put(key(1), [0; 9].into(), tagged(&[]), before, 1));
        let before = store.ticket();
        drop(store.clear());
        assert!(!store.put(key(1), [0; 9].into(), tagged(&[]), before, 1));
        assert!(put(&mut store, 1, tagged(&[]), 1));
        drop(store.close());
        assert!(!put(&mut store, 1, tagged(&[]), 1) && !store.is_on());
    }

    /// What is larger than the budget, or than an entry may be, is not kept, and pushes nothing out but its older self.
    #[test]
    fn large_values_are_not_kept() {
        let mut store = store(2);
        put(&mut store, 0, EntryOptions::default(), 0);
        put(&mut store, 1, EntryOptions::default(), 0);
        let ticket = store.ticket();
        assert!(!store.put(key(1), vec![0; 2_000].into(), EntryOptions::default(), ticket, 0));
        assert_eq!((found(&mut store, 0), store.stats().too_large), (vec![0], 1));
        let options = ResponseCacheOptions { max_bytes: 1 << 30, max_entries: 1, ..ResponseCacheOptions::default() };
        let mut roomy = ResponseStore::new(options, 1.0);
        for (len, is_kept) in [(MAX_RESPONSE_BYTES, true), (MAX_RESPONSE_BYTES + 1, false)] {
            assert_eq!(roomy.put(key(0), vec![0; len].into(), EntryOptions::default(), ticket, 0), is_kept, "{len}");
        }
        assert!(put(&mut roomy, 1, EntryOptions::default(), 0) && put(&mut roomy, 2, EntryOptions::default(), 0));
        assert_eq!((found(&mut roomy, 0), roomy.stats().evictions), (vec![2], 1), "one entry at most");
    }

    /// Random stores, look-ups, invalidations and jumps of time against a plain model: what is found is what was stored last
    /// and is still valid, the budget is never exceeded, and all invariants hold after every step.
    #[test]
    fn random_use_keeps_the_promises() {
        struct Model {
            value: Vec<u8>,
            tags: Vec<&'static str>,
            expires_ms: u64,
        }
        const TAGS: [&str; 3] = ["a", "b", "c"];
        let (mut hits, mut evictions, mut expired, mut outdated) = (0, 0, 0, 0);
        for seed in 0..60_u64 {
            let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
            let mut draw = |bound: u64| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 33) % bound
            };
            let mut store = store(1 + draw(6));
            store.options.max_entries = 1 + draw(9);
            let mut model: HashMap<u8, Model> = HashMap::new();
            let mut ticket = store.ticket();
            let mut invalid_since: Vec<&str> = Vec::new();
            let mut now_ms = 0;
            for _ in 0..600 {
                let name = draw(10) as u8;
                match draw(10) {
                    0..=3 => {
                        let tags: Vec<&str> = TAGS.into_iter().filter(|_| draw(3) == 0).collect();
                        let value = vec![draw(256) as u8; draw(900) as usize];
                        let ttl_ms = (draw(2) == 0).then(|| 1 + draw(2 * TTL_MS));
                        let options = EntryOptions { ttl_ms, ..tagged(&tags) };
                        let is_old = draw(4) == 0;
                        let given = if is_old { ticket } else { store.ticket() };
                        let may = !is_old || !tags.iter().any(|tag| invalid_since.contains(tag));
                        if store.put(key(name), value.clone().into(), options, given, now_ms) {
                            assert!(may, "seed {seed}: what had become invalid was stored");
                            let expires_ms = now_ms + ttl_ms.unwrap_or(TTL_MS);
                            model.insert(name, Model { value, tags, expires_ms });
                        } else if may {
                            // Too large: its older self is gone too.
                            model.remove(&name);
                        }
                    }
                    4..=7 => {
                        let expected = model.get(&name).filter(|entry| now_ms < entry.expires_ms);
                        match (store.get(&key(name), now_ms), expected) {
                            (Some((found, _)), Some(entry)) => assert_eq!(found[..], entry.value[..], "seed {seed}"),
                            (Some(_), None) => panic!("seed {seed}: {name} was found and is not valid"),
                            // It may have been evicted.
                            (None, _) => drop(model.remove(&name)),
                        }
                    }
                    8 => {
                        let tag = TAGS[draw(3) as usize];
                        store.invalidate(tag);
                        invalid_since.push(tag);
                        model.retain(|_, entry| !entry.tags.contains(&tag));
                        if draw(2) == 0 {
                            (ticket, invalid_since) = (store.ticket(), Vec::new());
                        }
                    }
                    _ => now_ms += draw(TTL_MS / 2),
                }
                store.check_invariants().unwrap_or_else(|error| panic!("seed {seed}: {error}"));
            }
            let stats = store.stats();
            (hits, evictions) = (hits + stats.hits, evictions + stats.evictions);
            (expired, outdated) = (expired + stats.expired, outdated + stats.outdated);
        }
        assert!(
            hits > 1_000 && evictions > 1_000 && expired > 200 && outdated > 100,
            "{hits} {evictions} {expired} {outdated}"
        );
    }
}
