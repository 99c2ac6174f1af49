//! Where answers are kept beyond the process, and how they are asked for without anybody waiting: a thread for each tier, which
//! writes behind and looks up. Whoever asks gives an [`Asker`] and hears from that thread; how long he waits is his affair.
//!
//! - **A fault is a miss**: damage, a lie, a slow or dead store, a full disk. A tier that keeps failing is left alone for a
//!   while, and one that hangs is not asked ([`Breaker`]).
//! - **Bounded**: what waits to be written, what waits to be looked up, what waits to be made invalid.
//! - **Invalid is invalid**: marks ([`Mark`]) are written before anything else is done, and a tier that cannot write one
//!   answers nothing until it can. A mark that was not written when the process ended is lost; [`ResponseTiers::flush`]
//!   says whether all are. In a shared store a mark holds for all nodes that read from there, on clocks as good as they
//!   agree; what another node has in memory already lives until its time is over.
//! - **In order**: an entry is used only when it was begun after each mark that concerns it.

mod store;

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::config::{CLOSE_WRITES_MS, MAX_RESPONSE_LOOKUPS, MAX_RESPONSE_MARKS, RESPONSE_WRITE_QUEUE_BYTES};
use crate::error::{Error, Result, panic_text};
use crate::ids::OwnerKey;
use crate::owner_ledger::Ledger;
use crate::response_cache::{ResponseKey, StoredEntry, mark_key};
use crate::storage::{Breaker, Damage, Fault, TierId, Unstored};
pub(crate) use store::{AnswerStore, DiskAnswers, RemoteAnswers};

/// Why an entry is not written to a tier that rests, or is closed.
const LEFT_ALONE: &str = "it failed several times and was left alone for a while";
/// Why an entry is not written that finds too many before it.
const QUEUE_FULL: &str = "too many bytes waited to be written";

/// Why an entry is not written whose owner has stored enough.
const OWNER_LIMIT: &str = "its owner has stored there what he may in their time to live";

/// How often a tier that is left alone is looked at when something must be written to it.
const REST_POLL: Duration = Duration::from_millis(100);

/// Who waits for an entry. Called by the threads of the tiers.
pub(crate) trait Asker: Send + Sync {
    /// Whether the answer is still of use.
    fn waits(&self) -> bool;
    /// What was found, once; `None`: nothing.
    fn answer(&self, found: Option<StoredEntry>);
}

/// A question.
pub(crate) struct LookUp {
    pub(crate) key: ResponseKey,
    /// When it was asked, milliseconds since 1970.
    pub(crate) now_ms: u64,
    pub(crate) asker: Arc<dyn Asker>,
}

/// What has become invalid, and when.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Mark {
    /// `None`: everything.
    tag: Option<Arc<str>>,
    at_ms: u64,
}

/// What waits to be written, in its order.
enum Write {
    Entry(ResponseKey, OwnerKey, StoredEntry),
    Flush(SyncSender<Result<()>>),
}

/// What a tier has done. Counters only grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct AnswerTierStats {
    /// Look-ups that found something.
    pub(crate) hits: u64,
    /// Entries written.
    pub(crate) stored: u64,
    /// Entries not written, because too much waited or the tier was left alone.
    pub(crate) dropped: u64,
    /// Calls that failed, damaged entries included.
    pub(crate) faults: u64,
    /// Entries held, as far as that is known.
    pub(crate) entries: u64,
    /// Bytes held, as far as that is known.
    pub(crate) bytes: u64,
}

#[derive(Default)]
struct State {
    marks: VecDeque<Mark>,
    lookups: VecDeque<LookUp>,
    writes: VecDeque<Write>,
    /// Of the values of `writes`.
    queued_bytes: u64,
    /// Since when the thread does what it does.
    busy_since: Option<Instant>,
    breaker: Breaker,
    last_fault: Option<Fault>,
    /// What owners have stored there, where each may store so much only.
    ledger: Option<Ledger>,
    /// What it was to have and has not.
    unstored: Unstored<ResponseKey>,
    /// Set when the tier shall end: until then it may write what waits.
    close_by: Option<Instant>,
    has_ended: bool,
    stats: AnswerTierStats,
}

/// What a tier's thread shares with those who ask it. The lock is held for a push or a pop.
struct Shared {
    id: TierId,
    identity: [u8; 32],
    /// How long a job may take before the tier counts as hanging.
    budget: Duration,
    epoch: Instant,
    state: Mutex<State>,
    /// Signalled when `state` changes.
    changed: Condvar,
}

/// What the thread does next.
enum Todo {
    Mark(Mark),
    LookUp(LookUp),
    /// The tier is left alone.
    Pass(LookUp),
    Write(ResponseKey, OwnerKey, StoredEntry),
    Flush(SyncSender<Result<()>>),
    Refuse(SyncSender<Result<()>>),
    End,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Each change is a push, a pop or a count.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }

    fn now_us(&self) -> u64 {
        self.epoch.elapsed().as_micros() as u64
    }

    /// Takes a question, unless the tier does not answer now.
    fn ask(&self, lookup: LookUp) -> std::result::Result<(), LookUp> {
        let mut state = self.lock();
        let hangs = state.busy_since.is_some_and(|since| since.elapsed() > self.budget);
        let answers = state.close_by.is_none() && state.breaker.allows(self.now_us());
        if hangs || !answers || state.lookups.len() >= MAX_RESPONSE_LOOKUPS {
            return Err(lookup);
        }
        state.lookups.push_back(lookup);
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    fn next(&self) -> Todo {
        let mut state = self.lock();
        state.busy_since = None;
        loop {
            let rests = !state.breaker.allows(self.now_us());
            if let Some(todo) = state.take(rests) {
                state.busy_since = Some(Instant::now());
                return todo;
            }
            if state.close_by.is_some() {
                return Todo::End;
            }
            state = match rests && !state.marks.is_empty() {
                true => self.changed.wait_timeout(state, REST_POLL).unwrap_or_else(PoisonError::into_inner).0,
                false => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }

    /// Counts what became of a call.
    fn note<T>(&self, result: &std::result::Result<T, Fault>, held: (u64, u64)) {
        let now_us = self.now_us();
        let mut state = self.lock();
        (state.stats.entries, state.stats.bytes) = held;
        match result {
            Ok(_) => state.breaker.succeeded(now_us),
            Err(fault) => {
                state.stats.faults += 1;
                state.last_fault = Some(fault.clone());
                // One bad entry says nothing about the next.
                if !matches!(fault, Fault::Damaged(_)) {
                    state.breaker.failed(now_us);
                }
            }
        }
    }
}

impl State {
    /// The first thing to do. `rests`: the tier is left alone.
    fn take(&mut self, rests: bool) -> Option<Todo> {
        let is_over = self.close_by.is_some_and(|close_by| Instant::now() >= close_by);
        if rests || is_over {
            self.drop_entries();
        } else if let Some(mark) = self.marks.pop_front() {
            return Some(Todo::Mark(mark));
        }
        if let Some(lookup) = self.lookups.pop_front() {
            return Some(if rests || self.close_by.is_some() { Todo::Pass(lookup) } else { Todo::LookUp(lookup) });
        }
        match self.writes.pop_front()? {
            Write::Entry(key, owner, entry) => {
                self.queued_bytes -= entry.value.len() as u64;
                Some(Todo::Write(key, owner, entry))
            }
            Write::Flush(reply) => Some(if rests || is_over { Todo::Refuse(reply) } else { Todo::Flush(reply) }),
        }
    }

    /// Entries that wait are not written.
    fn drop_entries(&mut self) {
        let (stats, unstored) = (&mut self.stats, &mut self.unstored);
        self.writes.retain(|write| match write {
            Write::Flush(_) => true,
            Write::Entry(key, ..) => {
                stats.dropped += 1;
                unstored.note(*key, LEFT_ALONE);
                false
            }
        });
        self.queued_bytes = 0;
    }
}

/// The tiers of one engine's answers, in the order in which they are asked.
pub(crate) struct ResponseTiers {
    tiers: Vec<Arc<Shared>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    budget: Duration,
    /// Questions whose askers did not wait until they were answered.
    gave_up: AtomicU64,
}

impl ResponseTiers {
    /// Starts a thread for each store. `identity`: of the engine. `budget`: how long an asker waits.
    pub(crate) fn start(stores: Vec<Box<dyn AnswerStore>>, identity: [u8; 32], budget: Duration) -> Result<Self> {
        let shared = |store: &dyn AnswerStore| {
            let (id, epoch, mut state) = (store.id(), Instant::now(), State::default());
            (state.stats.entries, state.stats.bytes) = store.held();
            let (state, changed) = (Mutex::new(state), Condvar::new());
            Arc::new(Shared { id, identity, budget, epoch, state, changed })
        };
        let tiers: Vec<Arc<Shared>> = stores.iter().map(|store| shared(&**store)).collect();
        // Made first: if a thread cannot be started, dropping it ends those that were.
        let started = ResponseTiers { tiers, threads: Mutex::default(), budget, gave_up: AtomicU64::new(0) };
        for (idx, store) in stores.into_iter().enumerate() {
            let (own, rest) = (started.tiers[idx].clone(), started.tiers[idx + 1..].to_vec());
            let name = format!("ns-llm-ans-{}", own.id.name());
            let thread = std::thread::Builder::new()
                .name(name.clone())
                .spawn(move || run(&own, store, &rest))
                .map_err(|e| Error::Internal { reason: format!("thread {name} could not be started: {e}") })?;
            started.threads.lock().unwrap_or_else(PoisonError::into_inner).push(thread);
        }
        Ok(started)
    }

    /// Each owner may store `limit_bytes` in a tier within `ttl_s` seconds, for which they are kept.
    pub(crate) fn limit_owners(&self, id: TierId, limit_bytes: u64, ttl_s: u64) {
        for tier in self.tiers.iter().filter(|tier| tier.id == id) {
            tier.change(|state| state.ledger = Some(Ledger::new(limit_bytes, ttl_s)));
        }
    }

    /// How long an asker waits.
    pub(crate) fn budget(&self) -> Duration {
        self.budget
    }

    /// Asks the first tier that answers now. False: there is none, and the asker hears nothing.
    pub(crate) fn ask(&self, lookup: LookUp) -> bool {
        ask(&self.tiers, lookup).is_ok()
    }

    /// An asker did not wait until it was answered.
    pub(crate) fn note_gave_up(&self) {
        self.gave_up.fetch_add(1, Ordering::Relaxed);
    }

    /// How often that was.
    pub(crate) fn gave_up(&self) -> u64 {
        self.gave_up.load(Ordering::Relaxed)
    }

    /// Writes an entry of an owner behind, where there is room to wait.
    pub(crate) fn write(&self, key: ResponseKey, owner: OwnerKey, entry: &StoredEntry) {
        for tier in &self.tiers {
            let now_us = tier.now_us();
            tier.change(|state| {
                let queued_bytes = state.queued_bytes + entry.value.len() as u64;
                let has_room = queued_bytes <= RESPONSE_WRITE_QUEUE_BYTES;
                let (answers, now_s) = (state.breaker.allows(now_us) && state.close_by.is_none(), now_us / 1_000_000);
                let may_store = |ledger: &Ledger| ledger.allows(&owner, entry.value.len() as u64, now_s);
                let reason = match (answers, has_room, state.ledger.as_ref().is_none_or(may_store)) {
                    (true, true, true) => None,
                    (false, ..) => Some(LEFT_ALONE),
                    (_, false, _) => Some(QUEUE_FULL),
                    (_, _, false) => Some(OWNER_LIMIT),
                };
                if let Some(reason) = reason {
                    state.stats.dropped += 1;
                    state.unstored.note(key, reason);
                    return;
                }
                if let Some(ledger) = &mut state.ledger {
                    ledger.note(&owner, entry.value.len() as u64, now_s);
                }
                state.queued_bytes = queued_bytes;
                state.writes.push_back(Write::Entry(key, owner, entry.clone()));
            });
        }
    }

    /// Makes everything with this tag invalid that was begun until now.
    pub(crate) fn invalidate(&self, tag: &str, at_ms: u64) {
        let tag: Arc<str> = tag.into();
        for tier in &self.tiers {
            let mark = Mark { tag: Some(tag.clone()), at_ms };
            tier.change(|state| match state.marks.len() < MAX_RESPONSE_MARKS {
                true => state.marks.push_back(mark),
                false => state.marks = VecDeque::from([Mark { tag: None, at_ms }]),
            });
        }
    }

    /// Makes everything invalid that was begun until now.
    pub(crate) fn clear(&self, at_ms: u64) {
        for tier in &self.tiers {
            tier.change(|state| {
                state.drop_entries();
                // On purpose.
                state.unstored.clear();
                state.marks = VecDeque::from([Mark { tag: None, at_ms }]);
            });
        }
    }

    /// Waits until what was given so far is written, marks included, and would outlive a failure of power; at most until
    /// `deadline`.
    pub(crate) fn flush(&self, deadline: Instant) -> Result<()> {
        let ask = |tier: &Arc<Shared>| {
            let (reply, flushed) = sync_channel(1);
            tier.change(|state| {
                // One that is closing drops it with its end.
                if state.close_by.is_none() {
                    state.writes.push_back(Write::Flush(reply));
                }
            });
            flushed
        };
        let asked: Vec<_> = self.tiers.iter().map(ask).collect();
        for flushed in asked {
            let left = deadline.saturating_duration_since(Instant::now());
            match flushed.recv_timeout(left) {
                Ok(result) => result?,
                Err(RecvTimeoutError::Timeout) => {
                    return Err(Error::DeadlineExceeded { timeout_ms: crate::config::FLUSH_MS });
                }
                Err(RecvTimeoutError::Disconnected) => return Err(Error::Closed),
            }
        }
        Ok(())
    }

    /// Whether every entry was written that was to be, since the last call; the first tier that lacks some is told.
    pub(crate) fn check_stored(&self) -> Result<()> {
        for tier in &self.tiers {
            if let Some((count, reason)) = tier.lock().unstored.take() {
                return Err(Error::NotStored { tier: tier.id.name(), count, what: "answers", reason });
            }
        }
        Ok(())
    }

    /// What each tier has done.
    pub(crate) fn stats(&self) -> impl Iterator<Item = (TierId, AnswerTierStats)> + '_ {
        self.tiers.iter().map(|tier| (tier.id, tier.lock().stats))
    }

    /// Tells the threads to write what waits, for a while, and to end. Does not wait.
    pub(crate) fn begin_close(&self) {
        let close_by = Instant::now() + Duration::from_millis(CLOSE_WRITES_MS);
        for tier in &self.tiers {
            tier.change(|state| state.close_by = state.close_by.or(Some(close_by)));
        }
    }

    /// The same, and waits until they have ended; one that hangs is left to itself.
    pub(crate) fn close(&self) {
        self.begin_close();
        let end = Instant::now() + Duration::from_millis(CLOSE_WRITES_MS);
        let threads = std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        for (tier, thread) in self.tiers.iter().zip(threads) {
            // An asker's reader may close the engine from this very thread.
            if thread.thread().id() == std::thread::current().id() {
                continue;
            }
            let left = end.saturating_duration_since(Instant::now());
            let (state, _) = tier
                .changed
                .wait_timeout_while(tier.lock(), left, |state| !state.has_ended)
                .unwrap_or_else(PoisonError::into_inner);
            if state.has_ended {
                drop(state);
                let _ = thread.join();
            }
        }
    }
}

impl Drop for ResponseTiers {
    fn drop(&mut self) {
        self.begin_close();
    }
}

/// Asks the first of `tiers` that answers now.
fn ask(tiers: &[Arc<Shared>], lookup: LookUp) -> std::result::Result<(), LookUp> {
    tiers
        .iter()
        .try_fold(lookup, |lookup, tier| match tier.ask(lookup) {
            Ok(()) => Err(()),
            Err(lookup) => Ok(lookup),
        })
        .map_or_else(|()| Ok(()), Err)
}

fn run(shared: &Shared, mut store: Box<dyn AnswerStore>, rest: &[Arc<Shared>]) {
    loop {
        match shared.next() {
            Todo::Mark(mark) => {
                let result = call(|| match &mark.tag {
                    Some(tag) => store.mark(&mark_key(&shared.identity, Some(tag)), mark.at_ms),
                    None => store.clear(mark.at_ms),
                });
                shared.note(&result, store.held());
                if result.is_err() {
                    shared.change(|state| state.marks.push_front(mark));
                }
            }
            Todo::LookUp(lookup) => look_up(shared, &mut *store, lookup, rest),
            Todo::Pass(lookup) => pass(lookup, rest),
            Todo::Write(key, owner, entry) => {
                let ttl_ms = entry.expires_ms - entry.stored_ms;
                let result = call(|| store.put(&key, &owner, &entry.encode(), ttl_ms));
                shared.note(&result, store.held());
                shared.change(|state| match result {
                    Ok(()) => {
                        state.stats.stored += 1;
                        state.unstored.is_stored(&key);
                    }
                    Err(fault) => {
                        state.stats.dropped += 1;
                        state.unstored.note(key, &fault.to_string());
                    }
                });
            }
            Todo::Flush(reply) => {
                let result = call(|| store.flush());
                shared.note(&result, store.held());
                // Whoever asked may have gone.
                let _ = reply.send(result.map_err(|fault| fault_error(shared.id, &fault)));
            }
            Todo::Refuse(reply) => {
                let fault = shared.lock().last_fault.clone();
                drop(reply.send(Err(fault.map_or(Error::Closed, |fault| fault_error(shared.id, &fault)))));
            }
            Todo::End => break,
        }
    }
    // Its lock is free before anybody hears of the end.
    drop(store);
    shared.change(|state| state.has_ended = true);
}

fn look_up(shared: &Shared, store: &mut dyn AnswerStore, lookup: LookUp, rest: &[Arc<Shared>]) {
    if !lookup.asker.waits() {
        lookup.asker.answer(None);
        return;
    }
    let found = call(|| find(store, &shared.identity, &lookup));
    shared.note(&found, store.held());
    match found {
        Ok(Some(entry)) => {
            shared.change(|state| state.stats.hits += 1);
            // A reader's waker runs here: its panic is not this thread's end.
            let _ = catch_unwind(AssertUnwindSafe(|| lookup.asker.answer(Some(entry))));
        }
        Ok(None) | Err(_) => pass(lookup, rest),
    }
}

/// An entry that may be used.
fn find(
    store: &mut dyn AnswerStore,
    identity: &[u8; 32],
    lookup: &LookUp,
) -> std::result::Result<Option<StoredEntry>, Fault> {
    let Some(bytes) = store.get(&lookup.key)? else { return Ok(None) };
    let entry = StoredEntry::decode(&bytes).ok_or(Fault::Damaged(Damage::Magic))?;
    if !entry.is_current(lookup.now_ms) {
        return Ok(None);
    }
    let everything = std::iter::once(None);
    for tag in everything.chain(entry.tags.iter().map(|tag| Some(&**tag))) {
        if store.marked_ms(&mark_key(identity, tag))?.is_some_and(|at_ms| entry.begun_ms <= at_ms) {
            return Ok(None);
        }
    }
    Ok(Some(entry))
}

/// The next tier is asked, or the asker told that there is nothing.
fn pass(lookup: LookUp, rest: &[Arc<Shared>]) {
    if let Err(LookUp { asker, .. }) = ask(rest, lookup) {
        let _ = catch_unwind(AssertUnwindSafe(|| asker.answer(None)));
    }
}

/// A panic in a store is a defect of this library, and a fault like any other.
fn call<T>(call: impl FnOnce() -> std::result::Result<T, Fault>) -> std::result::Result<T, Fault> {
    catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|panic| {
        let (operation, kind) = ("serve a tier of answers", std::io::ErrorKind::Other);
        Err(Fault::Io { operation, kind, reason: panic_text(panic.as_ref()) })
    })
}

fn fault_error(id: TierId, fault: &Fault) -> Error {
    Error::Storage { tier: id.name(), reason: fault.to_string() }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::sync::mpsc::{Receiver, Sender, channel};

    use super::*;

    const IDENTITY: [u8; 32] = [9; 32];
    const LONG: Duration = Duration::from_secs(60);

    /// A store in memory that fails and hangs when it is told to, and tells what it is asked.
    struct FakeStore {
        id: TierId,
        entries: HashMap<ResponseKey, Arc<[u8]>>,
        marks: HashMap<ResponseKey, u64>,
        /// Every call but `marked_ms` waits for a word first: whether it shall work.
        orders: Receiver<bool>,
        calls: Sender<&'static str>,
    }

    struct Told {
        orders: Sender<bool>,
        calls: Receiver<&'static str>,
    }

    impl Told {
        fn next(&self) -> &'static str {
            self.calls.recv_timeout(LONG).expect("a call")
        }
    }

    fn fake(id: TierId) -> (Box<dyn AnswerStore>, Told) {
        let ((orders, ordered), (calls, called)) = (channel(), channel());
        let store = FakeStore { id, entries: HashMap::new(), marks: HashMap::new(), orders: ordered, calls };
        (Box::new(store), Told { orders, calls: called })
    }

    impl FakeStore {
        fn obey(&self, call: &'static str) -> std::result::Result<(), Fault> {
            let _ = self.calls.send(call);
            match self.orders.recv() {
                Ok(true) => Ok(()),
                _ => Err(Fault::ReadOnly),
            }
        }
    }

    impl AnswerStore for FakeStore {
        fn id(&self) -> TierId {
            self.id
        }
        fn get(&mut self, key: &ResponseKey) -> std::result::Result<Option<Arc<[u8]>>, Fault> {
            self.obey("get").map(|()| self.entries.get(key).cloned())
        }
        fn put(&mut self, key: &ResponseKey, _: &OwnerKey, entry: &[u8], _: u64) -> std::result::Result<(), Fault> {
            self.obey("put").map(|()| drop(self.entries.insert(*key, entry.into())))
        }
        fn mark(&mut self, key: &ResponseKey, at_ms: u64) -> std::result::Result<(), Fault> {
            self.obey("mark")?;
            self.marks.insert(*key, at_ms);
            Ok(())
        }
        fn marked_ms(&mut self, key: &ResponseKey) -> std::result::Result<Option<u64>, Fault> {
            Ok(self.marks.get(key).copied())
        }
        fn clear(&mut self, at_ms: u64) -> std::result::Result<(), Fault> {
            self.mark(&mark_key(&IDENTITY, None), at_ms)
        }
        fn flush(&mut self) -> std::result::Result<(), Fault> {
            self.obey("flush")
        }
        fn held(&self) -> (u64, u64) {
            (self.entries.len() as u64, 0)
        }
    }

    struct Reader(Mutex<Option<Sender<Option<StoredEntry>>>>);

    impl Asker for Reader {
        fn waits(&self) -> bool {
            self.0.lock().expect("no panic").is_some()
        }
        fn answer(&self, found: Option<StoredEntry>) {
            let reader = self.0.lock().expect("no panic").take();
            reader.expect("answered once").send(found).expect("somebody listens");
        }
    }

    fn start(stores: Vec<Box<dyn AnswerStore>>, budget: Duration) -> ResponseTiers {
        ResponseTiers::start(stores, IDENTITY, budget).expect("threads start")
    }

    fn key(name: u8) -> ResponseKey {
        ResponseKey([name; 32])
    }

    fn entry(begun_ms: u64, tag: &str) -> StoredEntry {
        let tags: Arc<[Arc<str>]> = [Arc::from(tag)].into();
        StoredEntry { begun_ms, stored_ms: begun_ms, expires_ms: begun_ms + 1_000, tags, value: vec![1; 10].into() }
    }

    /// Asks; `None`: nobody takes the question.
    fn ask_for(tiers: &ResponseTiers, name: u8, now_ms: u64) -> Option<Receiver<Option<StoredEntry>>> {
        let (sender, answered) = channel();
        let asker = Arc::new(Reader(Mutex::new(Some(sender))));
        tiers.ask(LookUp { key: key(name), now_ms, asker }).then_some(answered)
    }

    fn answer_of(asked: Option<Receiver<Option<StoredEntry>>>) -> Option<StoredEntry> {
        asked.expect("somebody is asked").recv_timeout(LONG).expect("an answer")
    }

    /// What was written is found, by who may find it: not beyond its time, nor when it was begun before a mark of its tag, or
    /// of everything; marks go before look-ups, and look-ups before what waits to be written.
    #[test]
    fn only_what_is_valid_is_found() {
        let (store, told) = fake(TierId::Disk);
        let tiers = start(vec![store], LONG);
        (0..40).for_each(|_| told.orders.send(true).expect("it listens"));
        tiers.write(key(1), [0; 32], &entry(100, "a"));
        assert_eq!(told.next(), "put");
        assert_eq!(answer_of(ask_for(&tiers, 1, 200)), Some(entry(100, "a")));
        assert_eq!(answer_of(ask_for(&tiers, 2, 200)), None);
        assert_eq!(answer_of(ask_for(&tiers, 1, 1_100)), None, "its time is over");
        tiers.invalidate("b", 500);
        assert_eq!(answer_of(ask_for(&tiers, 1, 600)), Some(entry(100, "a")));
        for (at_ms, begun_ms, found) in [(500, 500, false), (500, 501, true), (502, 501, false)] {
            tiers.invalidate("a", at_ms);
            tiers.write(key(1), [0; 32], &entry(begun_ms, "a"));
            tiers.flush(Instant::now() + LONG).expect("written");
            assert_eq!(answer_of(ask_for(&tiers, 1, 600)).is_some(), found, "{begun_ms} after {at_ms}");
        }
        tiers.clear(700);
        assert_eq!(answer_of(ask_for(&tiers, 1, 600)), None);
        tiers.write(key(1), [0; 32], &entry(800, "a"));
        tiers.flush(Instant::now() + LONG).expect("written");
        assert_eq!(answer_of(ask_for(&tiers, 1, 900)), Some(entry(800, "a")));
        tiers.close();
        assert!(ask_for(&tiers, 1, 900).is_none());
    }

    /// A store that hangs is not asked again, and one that fails five times in a row neither; the next tier is. One that cannot
    /// write a mark answers nothing, and a flush says so.
    #[test]
    fn stores_that_fail_are_passed() {
        let ((disk, disk_told), (remote, remote_told)) = (fake(TierId::Disk), fake(TierId::Remote));
        let tiers = start(vec![disk, remote], Duration::from_millis(20));
        (0..40).for_each(|_| remote_told.orders.send(true).expect("it listens"));
        tiers.write(key(1), [0; 32], &entry(100, "a"));
        assert_eq!((disk_told.next(), remote_told.next()), ("put", "put"));
        std::thread::sleep(Duration::from_millis(40));
        assert_eq!(answer_of(ask_for(&tiers, 1, 200)), Some(entry(100, "a")), "from the second: the first hangs");
        disk_told.orders.send(true).expect("it listens");
        (0..200).for_each(|_| disk_told.orders.send(false).expect("it listens"));
        (0..5).for_each(|_| tiers.write(key(2), [0; 32], &entry(100, "a")));
        // It rests from the fifth on.
        while tiers.tiers[0].lock().breaker.allows(tiers.tiers[0].now_us()) {
            std::thread::yield_now();
        }
        tiers.invalidate("a", 300);
        assert!(tiers.flush(Instant::now() + LONG).is_err_and(|error| error.code() == "storage"));
        assert_eq!(answer_of(ask_for(&tiers, 1, 400)), None, "marked in the second, not asked in the first");
        let stats: Vec<_> = tiers.stats().collect();
        assert_eq!((stats[0].1.hits, stats[1].1.hits, stats[1].1.faults), (0, 1, 0));
        assert!(stats[0].1.faults >= 5);
        drop(disk_told);
        tiers.close();
    }

    /// What waits is bounded, and what is not written is counted.
    #[test]
    fn what_waits_is_bounded() {
        let (store, told) = fake(TierId::Disk);
        let tiers = start(vec![store], LONG);
        tiers.write(key(0), [0; 32], &entry(1, "a"));
        assert_eq!(told.next(), "put");
        let large = StoredEntry { value: vec![0; 1 << 20].into(), ..entry(1, "a") };
        let room = RESPONSE_WRITE_QUEUE_BYTES >> 20;
        (0..room + 3).for_each(|_| tiers.write(key(1), [0; 32], &large));
        assert_eq!(tiers.stats().next().expect("one").1.dropped, 3);
        let asked: Vec<_> = (0..MAX_RESPONSE_LOOKUPS).map(|_| ask_for(&tiers, 1, 2)).collect();
        assert!(asked.iter().all(Option::is_some) && ask_for(&tiers, 1, 2).is_none());
        drop(told);
        tiers.close();
    }
}
