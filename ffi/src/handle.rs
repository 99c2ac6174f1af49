//! Handles: 64-bit ids that C holds in place of pointers.
//!
//! ```text
//! 63    56 55                     24 23              0
//! [ kind ] [      generation       ] [  slot index   ]
//! ```
//!
//! An id is looked up, never dereferenced: a freed, foreign, random or zero id is [`Failure::BadHandle`], not a crash.
//! Freeing advances the generation of the slot; a slot whose generations are used up is retired. So:
//!
//! - an id stands for one object, once, for the life of the process;
//! - no id is 0, and no id of one kind is an id of another;
//! - whoever looked an object up keeps it alive by its `Arc`, whatever is freed meanwhile.
//!
//! Slots never move, so a lookup takes the lock of its own slot and no other: two threads meet only at one object.
//! After `fork` the child has the tables but none of the threads, so every use there is [`Failure::ForkedProcess`].

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use crate::failure::Failure;
use crate::process::{check_process, claim_process};

/// Objects of one kind that may live at once; the next one is refused as overload.
const MAX_SLOTS: usize = 1 << INDEX_BITS;
const INDEX_BITS: u32 = 24;
const KIND_SHIFT: u32 = 56;
/// Slots of the first chunk; each further chunk has as many as all before it.
const FIRST_CHUNK_SLOTS: usize = 1 << FIRST_CHUNK_BITS;
const FIRST_CHUNK_BITS: u32 = 6;
const NUM_CHUNKS: usize = (INDEX_BITS - FIRST_CHUNK_BITS + 1) as usize;

/// What a handle stands for; its number is the top byte of the id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HandleKind {
    Engine = 0x45,
    Request = 0x52,
}

impl HandleKind {
    fn name(self) -> &'static str {
        match self {
            HandleKind::Engine => "an engine",
            HandleKind::Request => "a request",
        }
    }

    /// The answer to a handle that stands for nothing of this kind.
    pub(crate) fn bad(self, handle: u64) -> Failure {
        Failure::BadHandle { kind: self.name(), handle }
    }
}

/// All live objects of one kind.
pub(crate) struct HandleTable<T> {
    kind: HandleKind,
    /// Each is made when its first slot is needed, and stays.
    chunks: [OnceLock<Chunk<T>>; NUM_CHUNKS],
    /// Held to choose a slot or to give one back, never together with a slot's lock or while C is called.
    free: Mutex<Free>,
}

type Chunk<T> = Box<[Mutex<Slot<T>>]>;

struct Slot<T> {
    generation: u32,
    object: Option<Arc<T>>,
}

/// Slots that may be given out.
struct Free {
    /// Those that held something before.
    vacant: Vec<usize>,
    /// All from here on never did.
    first_unused: usize,
}

impl<T> HandleTable<T> {
    pub(crate) const fn new(kind: HandleKind) -> Self {
        let free = Mutex::new(Free { vacant: Vec::new(), first_unused: 0 });
        HandleTable { kind, chunks: [const { OnceLock::new() }; NUM_CHUNKS], free }
    }

    /// Gives `object` an id.
    pub(crate) fn insert(&self, object: Arc<T>) -> Result<u64, Failure> {
        claim_process();
        check_process()?;
        let index = self.take_vacant()?;
        let (chunk, offset) = place_of(index);
        let slots = self.chunks[chunk].get_or_init(|| (0..chunk_slots(chunk)).map(|_| Mutex::default()).collect());
        let mut slot = lock(&slots[offset]);
        slot.object = Some(object);
        Ok(self.id(index, slot.generation))
    }

    /// The object behind `handle`.
    pub(crate) fn get(&self, handle: u64) -> Result<Arc<T>, Failure> {
        check_process()?;
        let slot = self.slot_of(handle)?;
        slot.object.clone().ok_or_else(|| self.bad(handle))
    }

    /// Ends the life of `handle`; the object lives on with those who looked it up.
    pub(crate) fn remove(&self, handle: u64) -> Result<Arc<T>, Failure> {
        check_process()?;
        let mut slot = self.slot_of(handle)?;
        let object = slot.object.take().ok_or_else(|| self.bad(handle))?;
        let next = slot.generation.checked_add(1);
        slot.generation = next.unwrap_or(slot.generation);
        drop(slot);
        if next.is_some() {
            lock(&self.free).vacant.push(index_of(handle));
        }
        Ok(object)
    }

    /// A slot that holds nothing, for the caller alone.
    fn take_vacant(&self) -> Result<usize, Failure> {
        let mut free = lock(&self.free);
        if let Some(index) = free.vacant.pop() {
            return Ok(index);
        }
        if free.first_unused == MAX_SLOTS {
            return Err(Failure::TooManyHandles { kind: self.kind.name(), limit: MAX_SLOTS });
        }
        free.first_unused += 1;
        Ok(free.first_unused - 1)
    }

    /// The slot that `handle` names, in the generation that it names.
    fn slot_of(&self, handle: u64) -> Result<MutexGuard<'_, Slot<T>>, Failure> {
        let index = index_of(handle);
        let (chunk, offset) = place_of(index);
        let slot = self.chunks[chunk].get().map(|slots| lock(&slots[offset]));
        slot.filter(|slot| self.id(index, slot.generation) == handle).ok_or_else(|| self.bad(handle))
    }

    fn id(&self, index: usize, generation: u32) -> u64 {
        (self.kind as u64) << KIND_SHIFT | u64::from(generation) << INDEX_BITS | index as u64
    }

    fn bad(&self, handle: u64) -> Failure {
        self.kind.bad(handle)
    }
}

fn index_of(handle: u64) -> usize {
    (handle & (MAX_SLOTS as u64 - 1)) as usize
}

/// The chunk of a slot, and its place in there: chunk 0 ends at slot 64, chunk 1 at 128, chunk 2 at 256.
fn place_of(index: usize) -> (usize, usize) {
    match (index >> FIRST_CHUNK_BITS).checked_ilog2() {
        None => (0, index),
        Some(doublings) => (doublings as usize + 1, index - (FIRST_CHUNK_SLOTS << doublings)),
    }
}

fn chunk_slots(chunk: usize) -> usize {
    FIRST_CHUNK_SLOTS << chunk.saturating_sub(1)
}

/// A slot that nothing was in yet.
impl<T> Default for Slot<T> {
    fn default() -> Self {
        Slot { generation: 1, object: None }
    }
}

/// The lock, whatever happened to a thread that held it: each change under it is a single assignment.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A freed id never comes back to life, also when its slot is used again: the slot is reused a thousand times.
    #[test]
    fn freed_ids_stay_dead() {
        let table = HandleTable::new(HandleKind::Request);
        let mut dead = Vec::new();
        for round in 0..1000 {
            let handle = table.insert(Arc::new(round)).unwrap();
            assert_eq!(index_of(handle), 0, "the slot was not reused, so the test shows nothing");
            assert_eq!(*table.get(handle).unwrap(), round);
            assert_eq!(*table.remove(handle).unwrap(), round);
            dead.push(handle);
        }
        for handle in dead {
            assert!(matches!(table.get(handle), Err(Failure::BadHandle { .. })), "{handle:#x}");
            assert!(matches!(table.remove(handle), Err(Failure::BadHandle { .. })), "{handle:#x}");
        }
    }

    /// A slot at its last generation is retired, so that no id is given twice: the counter is set to its end.
    #[test]
    fn worn_out_slots_are_retired() {
        let table = HandleTable::new(HandleKind::Request);
        let first = table.insert(Arc::new(())).unwrap();
        table.remove(first).unwrap();
        lock(&table.chunks[0].get().unwrap()[0]).generation = u32::MAX;
        let last = table.insert(Arc::new(())).unwrap();
        assert_eq!(index_of(last), 0);
        table.remove(last).unwrap();
        assert!(table.get(last).is_err());
        assert_eq!(index_of(table.insert(Arc::new(())).unwrap()), 1);
    }

    /// Every index has one place: chunks are filled without gaps and to their ends, the last one by the last index.
    #[test]
    fn each_index_has_its_own_place() {
        let mut expected = (0, 0);
        for index in 0..1 << 14 {
            assert_eq!(place_of(index), expected, "{index}");
            expected.1 += 1;
            if expected.1 == chunk_slots(expected.0) {
                expected = (expected.0 + 1, 0);
            }
        }
        assert_eq!(place_of(MAX_SLOTS - 1), (NUM_CHUNKS - 1, chunk_slots(NUM_CHUNKS - 1) - 1));
    }

    /// Lookups, insertions and removals of several threads at once: each finds its own objects, also across the border
    /// of a chunk, and those of the others are gone when they were removed.
    #[test]
    fn threads_do_not_disturb_each_other() {
        const OBJECTS: usize = 3 * FIRST_CHUNK_SLOTS;
        let table = HandleTable::new(HandleKind::Request);
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let table = &table;
                scope.spawn(move || {
                    for round in 0..50 {
                        let object = |number| (thread, round, number);
                        let insert = |number| table.insert(Arc::new(object(number))).unwrap();
                        let handles: Vec<u64> = (0..OBJECTS).map(insert).collect();
                        for (number, &handle) in handles.iter().enumerate() {
                            assert_eq!(*table.get(handle).unwrap(), object(number));
                        }
                        for (number, &handle) in handles.iter().enumerate() {
                            assert_eq!(*table.remove(handle).unwrap(), object(number));
                            assert!(table.get(handle).is_err());
                        }
                    }
                });
            }
        });
        let free = lock(&table.free);
        assert_eq!(free.first_unused, free.vacant.len(), "slots were lost");
        assert!(free.first_unused > FIRST_CHUNK_SLOTS, "only one chunk was used");
    }

    /// Kinds do not mix, and neither 0, small numbers nor each single changed bit finds an object.
    #[test]
    fn foreign_ids_find_nothing() {
        let engines = HandleTable::new(HandleKind::Engine);
        let requests = HandleTable::new(HandleKind::Request);
        let engine = engines.insert(Arc::new(())).unwrap();
        let request = requests.insert(Arc::new(())).unwrap();
        assert!(engines.get(request).is_err() && requests.get(engine).is_err());
        for handle in (0..1000).chain((0..64).map(|bit| engine ^ 1 << bit)).chain([u64::MAX, 1 << 63]) {
            assert!(engines.get(handle).is_err(), "{handle:#x}");
        }
        assert!(engines.get(engine).is_ok());
    }
}
