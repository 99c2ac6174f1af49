//! The response cache as its users share it: one store behind one lock, with a clock. Intake asks it before a request goes
//! to the worker, the worker gives it what is finished, and callers keep values of their own in the same budget.
//!
//! An engine with a directory or a shared store for KV keeps answers there too ([`response_tiers`](crate::response_tiers));
//! values of callers end with the process.
//!
//! The lock is held for a look-up or an insertion, never while something is encoded or freed ([`Responses::with`]); callers
//! of any thread.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::config::{MAX_RESPONSE_BYTES, MAX_RESPONSE_KEY_BYTES, ResponseCacheOptions, at_most};
use crate::error::Result;
use crate::ids::OwnerKey;
use crate::request::{CacheUse, Delta, FinishReason, Request, Summary, check_response_tags, check_response_ttl};
use crate::response_cache::{
    CachedAnswer, EntryOptions, EntryUse, KeyContext, KnownRequest, KnownRequests, ResponseKey, ResponseStore,
    StoredEntry, Ticket, answer_key, request_key, value_key,
};
use crate::response_tiers::{Asker, LookUp as TierLookUp, ResponseTiers};
use crate::stats::ResponseCacheStats;
use crate::storage::TierId;

/// Finished answers, and values that callers keep beside them: cheap to clone, `Send + Sync`. Of an engine
/// ([`Engine::responses`](crate::Engine::responses)), or on its own.
#[derive(Clone)]
pub struct Responses {
    inner: Arc<Inner>,
}

struct Inner {
    store: Mutex<ResponseStore>,
    known: Mutex<KnownRequests>,
    /// Requests that were answered from it.
    answers: AtomicU64,
    /// Where answers are kept beyond the process; set once, by the engine that this belongs to.
    tiers: OnceLock<ResponseTiers>,
    /// Milliseconds since 1970 when this was made, and that moment: together a clock that never goes back.
    made_unix_ms: u64,
    made: Instant,
}

/// How a value is kept.
#[derive(Debug, Clone, Default)]
pub struct PutOptions {
    /// How long it is found, milliseconds; `None`: as long as the cache's entries are.
    pub ttl_ms: Option<u64>,
    /// Names under which it can be made invalid, at most [`MAX_RESPONSE_TAGS`](crate::config::MAX_RESPONSE_TAGS).
    pub tags: Vec<String>,
}

impl Responses {
    /// An empty cache.
    pub fn new(options: ResponseCacheOptions) -> Result<Responses> {
        Responses::shared_by_owners(options, 1.0)
    }

    /// The same, of which each owner of answers may keep a share when others need room. Values of callers count as one's.
    pub(crate) fn shared_by_owners(options: ResponseCacheOptions, owner_share: f64) -> Result<Responses> {
        options.validate()?;
        let made_unix_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
        let store = Mutex::new(ResponseStore::new(options, owner_share));
        let (known, answers, tiers) = (Mutex::default(), AtomicU64::new(0), OnceLock::new());
        let inner = Inner { store, known, answers, tiers, made_unix_ms, made: Instant::now() };
        Ok(Responses { inner: Arc::new(inner) })
    }

    /// Keeps a value under a key of the caller's own. False when it is not kept: the cache is off or closed, or the value is
    /// larger than the whole of it or than [`MAX_RESPONSE_BYTES`]. An error when key or options are out of their ranges.
    pub fn put(&self, key: &str, value: &[u8], options: &PutOptions) -> Result<bool> {
        check_key(key)?;
        check_response_ttl("ttl_ms", options.ttl_ms)?;
        check_response_tags("tags", &options.tags)?;
        if value.len() > MAX_RESPONSE_BYTES {
            self.with(ResponseStore::refuse_too_large);
            return Ok(false);
        }
        let entry = EntryOptions { tags: shared(&options.tags), ttl_ms: options.ttl_ms, ..EntryOptions::default() };
        let (value, now_ms): (Arc<[u8]>, _) = (value.into(), self.now_ms());
        Ok(self.with(|store| {
            let (key, ticket) = (value_key(store.version(), key), store.ticket());
            store.is_on() && store.put(key, value, entry, ticket, now_ms)
        }))
    }

    /// The value of a key, when it is there and not too old.
    pub fn get(&self, key: &str) -> Option<Arc<[u8]>> {
        self.get_with_use(key).map(|(value, _)| value)
    }

    /// The same, and how it was used, this time included.
    pub fn get_with_use(&self, key: &str) -> Option<(Arc<[u8]>, EntryUse)> {
        let now_ms = self.now_ms();
        self.with(|store| {
            let key = value_key(store.version(), key);
            if store.is_on() { store.get(&key, now_ms) } else { None }
        })
    }

    /// Whether [`Responses::get`] would find a value. Counts as no use.
    pub fn contains(&self, key: &str) -> bool {
        let now_ms = self.now_ms();
        self.with(|store| store.contains(&value_key(store.version(), key), now_ms))
    }

    /// Gives a value up; whether it was there.
    pub fn remove(&self, key: &str) -> bool {
        self.with(|store| store.remove(&value_key(store.version(), key)))
    }

    /// Gives up every answer and value with this tag, in all namespaces, and those that are just being computed with it; how
    /// many were there, in memory.
    ///
    /// Answers on disk and in a shared store are not found any more either, from now on. That is written behind: it
    /// outlives the process once [`Engine::flush`](crate::Engine::flush) has returned. Other nodes honour it for what they
    /// read from the shared store, as exactly as the clocks agree; what they have in memory lives until its time is over.
    pub fn invalidate(&self, tag: &str) -> usize {
        let count = self.with(|store| store.invalidate(tag));
        if let Some(tiers) = self.inner.tiers.get() {
            tiers.invalidate(tag, self.now_ms());
        }
        count
    }

    /// Moves to another version, which is part of every key: nothing of the one before is found any more, also not by who
    /// comes back to it, in memory as on disk and in a shared store. For what answers depend on and the engine does not
    /// know, such as documents that prompts are made of.
    pub fn set_version(&self, version: u64) {
        let (is_same, old) = self.with(|store| (store.version() == version, store.set_version(version)));
        drop(old);
        if !is_same {
            self.clear_tiers();
        }
    }

    /// Moves to the next version, and says which that is.
    pub fn bump_version(&self) -> u64 {
        let (version, old) = self.with(|store| {
            let version = store.version().wrapping_add(1);
            (version, store.set_version(version))
        });
        drop(old);
        self.clear_tiers();
        version
    }

    /// Gives everything up: also the files of a directory, and this engine's answers in a shared store, for all nodes. That
    /// is written behind, as by [`Responses::invalidate`].
    pub fn clear(&self) {
        let old = self.with(ResponseStore::clear);
        drop(old);
        self.clear_tiers();
    }

    fn clear_tiers(&self) {
        if let Some(tiers) = self.inner.tiers.get() {
            tiers.clear(self.now_ms());
        }
    }

    /// Gives up what is too old, which otherwise happens when it is asked for or when room is needed; how many that were.
    pub fn prune(&self) -> usize {
        let now_ms = self.now_ms();
        self.with(|store| store.prune(now_ms))
    }

    /// Counts since it was made, and what it holds.
    pub fn stats(&self) -> ResponseCacheStats {
        let mut stats = ResponseCacheStats { answers: self.answers(), ..self.with(|store| store.stats()) };
        let Some(tiers) = self.inner.tiers.get() else { return stats };
        stats.tier_give_ups = tiers.gave_up();
        for (id, tier) in tiers.stats() {
            match id {
                TierId::Disk => {
                    (stats.disk_hits, stats.disk_entries, stats.disk_bytes) = (tier.hits, tier.entries, tier.bytes);
                }
                TierId::Remote => stats.remote_hits = tier.hits,
            }
            stats.tier_stores += tier.stored;
            stats.tier_drops += tier.dropped;
            stats.tier_faults += tier.faults;
        }
        stats
    }

    /// Requests that were answered from it.
    pub(crate) fn answers(&self) -> u64 {
        self.inner.answers.load(Ordering::Acquire)
    }

    /// Gives everything up in memory and keeps nothing any more; what waits to be written elsewhere is written, in bounded
    /// time.
    pub(crate) fn close(&self) {
        let old = self.with(ResponseStore::close);
        drop(old);
        if let Some(tiers) = self.inner.tiers.get() {
            tiers.close();
        }
    }

    /// Tells what writes elsewhere to come to an end, without waiting for it.
    pub(crate) fn begin_close(&self) {
        if let Some(tiers) = self.inner.tiers.get() {
            tiers.begin_close();
        }
    }

    /// Keeps answers there too from now on.
    pub(crate) fn keep_in(&self, tiers: ResponseTiers) {
        // Of one engine, which has them once.
        let _ = self.inner.tiers.set(tiers);
    }

    /// Waits until what was to be written elsewhere so far is there.
    pub(crate) fn flush(&self, deadline: Instant) -> Result<()> {
        self.inner.tiers.get().map_or(Ok(()), |tiers| tiers.flush(deadline))
    }

    /// Whether all that was to be written elsewhere since the last call was.
    pub(crate) fn check_stored(&self) -> Result<()> {
        self.inner.tiers.get().map_or(Ok(()), ResponseTiers::check_stored)
    }

    /// Does something under the lock, and frees what was given up after it.
    fn with<T>(&self, change: impl FnOnce(&mut ResponseStore) -> T) -> T {
        let mut store = self.lock();
        let result = change(&mut store);
        let freed = store.take_freed();
        drop(store);
        drop(freed);
        result
    }

    fn lock(&self) -> MutexGuard<'_, ResponseStore> {
        // Every change of the store is whole before anything in it can panic.
        self.inner.store.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now_ms(&self) -> u64 {
        self.inner.made_unix_ms.saturating_add(self.inner.made.elapsed().as_millis() as u64)
    }
}

/// What the response cache has for a request.
pub(crate) enum LookUp {
    /// The cache has no part in it.
    Off,
    /// The answer.
    Found(CachedAnswer),
    /// Nothing; what is computed may be kept. With a question, it may be somewhere beyond the process.
    Missing(Option<Box<Recorder>>, Option<Asked>),
}

/// What is asked of the tiers, and since when.
#[derive(Clone)]
pub(crate) struct Asked {
    key: ResponseKey,
    owner: OwnerKey,
    ticket: Ticket,
    now_ms: u64,
}

/// A request as intake sees it once it is tokens.
pub(crate) struct Question<'a> {
    pub(crate) request: &'a Request,
    pub(crate) identity: &'a [u8; 32],
    pub(crate) namespace: &'a [u8; 32],
    /// Whom its answer counts for.
    pub(crate) owner: OwnerKey,
    pub(crate) prompt: &'a [u32],
    pub(crate) stop_token_ids: &'a [u32],
    pub(crate) sampling: &'a crate::request::SamplingParams,
    pub(crate) max_tokens: usize,
    pub(crate) vocab_size: usize,
    /// Whether an equal request has the same prompt at any time.
    pub(crate) is_timeless: bool,
}

impl Responses {
    /// The answer to a request like one that was asked before, if it is kept. Never waits for a template or a tokenizer.
    pub(crate) fn recall(&self, request: &Request, vocab_size: usize) -> Option<CachedAnswer> {
        if request.response_cache == Some(CacheUse::Off) {
            return None;
        }
        let version = self.with(|store| store.is_on().then(|| store.version()))?;
        let KnownRequest { answer, prompt_tokens } = self.known().get(&request_key(request, version))?;
        let now_ms = self.now_ms();
        // Who does not find it here looks again, and is counted there.
        let found = self.with(|store| store.contains(&answer, now_ms).then(|| store.get(&answer, now_ms)));
        let (bytes, _) = found??;
        let max_tokens = request.max_new_tokens();
        let answer = CachedAnswer::decode(&bytes).ok()?;
        answer.fits(request, prompt_tokens, max_tokens, vocab_size).then(|| {
            self.inner.answers.fetch_add(1, Ordering::AcqRel);
            answer
        })
    }

    fn known(&self) -> MutexGuard<'_, KnownRequests> {
        self.inner.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks for the answer to a request.
    pub(crate) fn look_up(&self, question: &Question<'_>) -> LookUp {
        let &Question { request, identity, namespace, owner, prompt, stop_token_ids, sampling, .. } = question;
        let Some(cache_use) = cache_use(question) else { return LookUp::Off };
        let began = self.with(|store| store.is_on().then(|| (store.version(), store.ticket())));
        let Some((version, ticket)) = began else { return LookUp::Off };
        let context = KeyContext { identity, version, namespace, prompt, stop_token_ids, sampling };
        let key = answer_key(request, &context);
        if question.is_timeless {
            let known = KnownRequest { answer: key, prompt_tokens: prompt.len() };
            self.known().learn(request_key(request, version), known);
        }
        let now_ms = self.now_ms();
        let bytes = self.with(|store| store.get(&key, now_ms));
        let answer = bytes.and_then(|(bytes, _)| CachedAnswer::decode(&bytes).ok());
        match answer.filter(|a| a.fits(request, prompt.len(), question.max_tokens, question.vocab_size)) {
            Some(answer) => {
                // Before its events: whoever has seen the last one finds the request counted.
                self.inner.answers.fetch_add(1, Ordering::AcqRel);
                LookUp::Found(answer)
            }
            None => {
                let recorder = (cache_use == CacheUse::ReadWrite).then(|| {
                    let (tags, ttl_ms) = (shared(&request.response_tags), request.response_ttl_ms);
                    let entry = EntryOptions { tags, ttl_ms, owner };
                    let (responses, answer) = (self.clone(), CachedAnswer::begin(request.n));
                    Box::new(Recorder { responses, key, ticket, entry, answer, bytes: 0, begun_ms: now_ms })
                });
                let asked = self.inner.tiers.get().map(|_| Asked { key, owner, ticket, now_ms });
                LookUp::Missing(recorder, asked)
            }
        }
    }

    /// Asks beyond the process; never waits. How long the asker waits, or `None`: nobody can be asked now.
    pub(crate) fn ask(&self, asked: &Asked, asker: Arc<dyn Asker>) -> Option<Duration> {
        let tiers = self.inner.tiers.get()?;
        let lookup = TierLookUp { key: asked.key, now_ms: asked.now_ms, asker };
        tiers.ask(lookup).then(|| tiers.budget())
    }

    /// The asker did not wait any longer.
    pub(crate) fn note_gave_up(&self) {
        if let Some(tiers) = self.inner.tiers.get() {
            tiers.note_gave_up();
        }
    }

    /// What was found beyond the process, if it is an answer to the request and still valid; it is kept in memory then.
    pub(crate) fn take_back(
        &self,
        asked: &Asked,
        entry: StoredEntry,
        fits: impl FnOnce(&CachedAnswer) -> bool,
    ) -> Option<CachedAnswer> {
        let StoredEntry { expires_ms, tags, value, .. } = entry;
        let answer = CachedAnswer::decode(&value).ok().filter(fits)?;
        let now_ms = self.now_ms();
        let ttl_ms = Some(expires_ms.saturating_sub(now_ms).max(1));
        let options = EntryOptions { tags, ttl_ms, owner: asked.owner };
        let is_valid = self.with(|store| store.promote(asked.key, value, options, asked.ticket, now_ms));
        if !is_valid {
            return None;
        }
        self.inner.answers.fetch_add(1, Ordering::AcqRel);
        Some(answer)
    }
}

/// What part the cache has in a request; `None`: none.
fn cache_use(question: &Question<'_>) -> Option<CacheUse> {
    let Question { request, sampling, .. } = question;
    // Such a request is there to fill the prefix cache, not to be answered.
    if question.max_tokens == 0 && !request.prompt_logprobs {
        return None;
    }
    let is_repeatable = sampling.temperature == 0.0 || request.sampling.seed.is_some();
    match request.response_cache {
        Some(CacheUse::Off) => None,
        Some(named) => Some(named),
        None => is_repeatable.then_some(CacheUse::ReadWrite),
    }
}

/// Collects an answer while it is made, and gives it to the cache when it is complete. One that ends otherwise is dropped with
/// this.
pub(crate) struct Recorder {
    responses: Responses,
    key: ResponseKey,
    ticket: Ticket,
    entry: EntryOptions,
    answer: CachedAnswer,
    /// Of its texts, tokens and logprobs so far; beyond the limit nothing is collected any more, nor stored.
    bytes: usize,
    /// When it was asked for, milliseconds since 1970.
    begun_ms: u64,
}

impl Recorder {
    /// New tokens and text.
    pub(crate) fn push(&mut self, delta: &Delta) {
        let logprobs: usize = delta.logprobs.iter().map(|entry| 12 + 8 * entry.top.len()).sum();
        self.bytes = self.bytes.saturating_add(delta.text.len() + 4 * delta.token_ids.len() + logprobs);
        if self.bytes > MAX_RESPONSE_BYTES {
            self.answer.choices = Vec::new();
        }
        if let Some(choice) = self.answer.choices.get_mut(delta.choice) {
            choice.text.push_str(&delta.text);
            choice.token_ids.extend(&delta.token_ids);
            choice.logprobs.extend(delta.logprobs.iter().cloned());
        }
    }

    /// A choice has ended.
    pub(crate) fn finish(&mut self, choice: usize, reason: FinishReason) {
        if let Some(choice) = self.answer.choices.get_mut(choice) {
            choice.reason = reason;
        }
    }

    /// The request has ended as it should.
    pub(crate) fn store(self, summary: &Summary) {
        let Recorder { responses, key, ticket, entry, mut answer, bytes, begun_ms } = self;
        if bytes > MAX_RESPONSE_BYTES {
            responses.with(ResponseStore::refuse_too_large);
            return;
        }
        answer.seed = summary.seed;
        answer.prompt_tokens = summary.usage.prompt_tokens as u32;
        answer.completion_tokens = summary.usage.completion_tokens as u32;
        answer.prompt_logprobs = summary.prompt_logprobs.clone();
        let (value, stored_ms) = (answer.encode(), responses.now_ms());
        let (tags, owner) = (entry.tags.clone(), entry.owner);
        let (ttl_ms, is_kept) = responses.with(|store| {
            let ttl_ms = entry.ttl_ms.unwrap_or(store.ttl_ms());
            (ttl_ms, store.put(key, value.clone(), entry, ticket, stored_ms))
        });
        if let (Some(tiers), true) = (responses.inner.tiers.get(), is_kept) {
            let expires_ms = stored_ms.saturating_add(ttl_ms);
            tiers.write(key, owner, &StoredEntry { begun_ms, stored_ms, expires_ms, tags, value });
        }
    }
}

fn check_key(key: &str) -> Result<()> {
    at_most("key (bytes)", key.len(), MAX_RESPONSE_KEY_BYTES)
}

fn shared(tags: &[String]) -> Arc<[Arc<str>]> {
    tags.iter().map(|tag| tag.as_str().into()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{MAX_NAME_BYTES, MAX_RESPONSE_TAGS};

    fn responses(max_bytes: u64) -> Responses {
        Responses::new(ResponseCacheOptions { max_bytes, ..ResponseCacheOptions::default() }).expect("in range")
    }

    /// Values come back by name, go by name, tag, version and all at once, and one that is off keeps nothing.
    #[test]
    fn values_are_kept_by_name() {
        let responses = responses(1 << 20);
        let tagged = PutOptions { tags: vec!["t".into()], ..PutOptions::default() };
        for name in ["", "a", "../b", "\0"] {
            assert_eq!(responses.put(name, name.as_bytes(), &tagged), Ok(true));
        }
        assert_eq!(responses.get("../b").as_deref(), Some(b"../b".as_slice()));
        assert!(responses.contains("a") && responses.remove("a") && !responses.remove("a") && !responses.contains("a"));
        assert_eq!((responses.invalidate("t"), responses.get("")), (3, None));
        responses.put("a", b"1", &PutOptions::default()).expect("in range");
        assert_eq!((responses.bump_version(), responses.get("a")), (1, None));
        responses.put("a", b"2", &PutOptions::default()).expect("in range");
        responses.clear();
        assert_eq!((responses.get("a"), responses.stats().entries), (None, 0));
        let off = self::responses(0);
        assert_eq!((off.put("a", b"1", &PutOptions::default()), off.get("a")), (Ok(false), None));
        assert_eq!(off.stats(), ResponseCacheStats::default(), "nothing was counted");
    }

    /// An answer that grows beyond what may be kept is dropped while it grows, and counted; a smaller one is stored.
    #[test]
    fn answers_that_grow_too_large_are_dropped() {
        let responses = responses(1 << 30);
        let recorder = |key: u8| {
            Box::new(Recorder {
                responses: responses.clone(),
                key: ResponseKey([key; 32]),
                ticket: responses.with(|store| store.ticket()),
                entry: EntryOptions::default(),
                answer: CachedAnswer::begin(2),
                bytes: 0,
                begun_ms: 0,
            })
        };
        let delta = |bytes: usize| Delta { choice: 1, text: "x".repeat(bytes), ..Delta::default() };
        for (key, last, stores, too_large) in [(0, 1, 1, 0), (1, MAX_RESPONSE_BYTES, 1, 1)] {
            let mut recorder = recorder(key);
            recorder.push(&delta(10));
            recorder.push(&delta(last));
            recorder.push(&delta(1));
            assert!(recorder.answer.choices.iter().map(|choice| choice.text.len()).sum::<usize>() < 20);
            recorder.finish(1, FinishReason::Stop);
            recorder.store(&Summary::default());
            let stats = responses.stats();
            assert_eq!((stats.stores, stats.too_large), (stores, too_large), "{key}");
        }
    }

    /// What is out of range is refused by name.
    #[test]
    fn ranges_are_checked() {
        let responses = responses(1 << 30);
        let field = |name: &str, value: &[u8], ttl_ms, tags: Vec<String>| match responses.put(
            name,
            value,
            &PutOptions { ttl_ms, tags },
        ) {
            Err(crate::Error::InvalidArgument { field, .. }) => field,
            other => panic!("{other:?}"),
        };
        assert_eq!(field(&"x".repeat(MAX_RESPONSE_KEY_BYTES + 1), b"", None, vec![]), "key (bytes)");
        assert_eq!(field("", b"", Some(0), vec![]), "ttl_ms");
        assert_eq!(field("", b"", None, vec!["x".into(); MAX_RESPONSE_TAGS + 1]), "tags");
        assert_eq!(field("", b"", None, vec![String::new()]), "tags");
        assert_eq!(field("", b"", None, vec!["x".repeat(MAX_NAME_BYTES + 1)]), "tags");
        assert_eq!(responses.put("", &vec![0; MAX_RESPONSE_BYTES + 1], &PutOptions::default()), Ok(false));
        assert_eq!(responses.stats(), ResponseCacheStats { too_large: 1, max_bytes: 1 << 30, ..Default::default() });
    }
}
