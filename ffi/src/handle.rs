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
//! After `fork` the child has the tables but none of the threads, so every use there is [`Failure::ForkedProcess`].

use std::sync::{Arc, OnceLock, PoisonError, RwLock};

use crate::failure::Failure;

/// Objects of one kind that may live at once; the next one is refused as overload.
const MAX_SLOTS: usize = 1 << INDEX_BITS;
const INDEX_BITS: u32 = 24;
const KIND_SHIFT: u32 = 56;

/// The process that made the first handle.
static OWNER_PID: OnceLock<u32> = OnceLock::new();

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
    /// Shared by every thread that calls the library; held for a lookup or an assignment, never while C is called.
    slots: RwLock<Slots<T>>,
}

struct Slots<T> {
    slots: Vec<Slot<T>>,
    /// Slots that hold nothing and may be used again.
    vacant: Vec<usize>,
}

struct Slot<T> {
    generation: u32,
    object: Option<Arc<T>>,
}

impl<T> HandleTable<T> {
    pub(crate) const fn new(kind: HandleKind) -> Self {
        HandleTable { kind, slots: RwLock::new(Slots { slots: Vec::new(), vacant: Vec::new() }) }
    }

    /// Gives `object` an id.
    pub(crate) fn insert(&self, object: Arc<T>) -> Result<u64, Failure> {
        OWNER_PID.get_or_init(std::process::id);
        check_process()?;
        let mut table = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        let index = table.vacant.pop().unwrap_or(table.slots.len());
        if index == MAX_SLOTS {
            return Err(Failure::TooManyHandles { kind: self.kind.name(), limit: MAX_SLOTS });
        }
        if index == table.slots.len() {
            table.slots.push(Slot { generation: 1, object: None });
        }
        let slot = &mut table.slots[index];
        slot.object = Some(object);
        Ok(self.id(index, slot.generation))
    }

    /// The object behind `handle`.
    pub(crate) fn get(&self, handle: u64) -> Result<Arc<T>, Failure> {
        check_process()?;
        let table = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        let slot = table.slots.get(index_of(handle));
        let object = slot.filter(|slot| self.id(index_of(handle), slot.generation) == handle);
        object.and_then(|slot| slot.object.clone()).ok_or(self.bad(handle))
    }

    /// Ends the life of `handle`; the object lives on with those who looked it up.
    pub(crate) fn remove(&self, handle: u64) -> Result<Arc<T>, Failure> {
        check_process()?;
        let index = index_of(handle);
        let mut table = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        let slot = table.slots.get_mut(index).filter(|slot| self.id(index, slot.generation) == handle);
        let slot = slot.ok_or(self.bad(handle))?;
        let object = slot.object.take().ok_or(self.bad(handle))?;
        if let Some(next) = slot.generation.checked_add(1) {
            slot.generation = next;
            table.vacant.push(index);
        }
        Ok(object)
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

/// Refuses the child of a fork, if the parent had made a handle. Asked before any lock is taken: another thread may
/// have held it at the fork.
pub(crate) fn check_process() -> Result<(), Failure> {
    let process = std::process::id();
    match OWNER_PID.get() {
        Some(&owner) if owner != process => Err(Failure::ForkedProcess { owner, process }),
        _ => Ok(()),
    }
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
        table.slots.write().unwrap().slots[0].generation = u32::MAX;
        let last = table.insert(Arc::new(())).unwrap();
        assert_eq!(index_of(last), 0);
        table.remove(last).unwrap();
        assert!(table.get(last).is_err());
        assert_eq!(index_of(table.insert(Arc::new(())).unwrap()), 1);
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
