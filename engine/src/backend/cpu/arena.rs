//! Buffers for activations that live for a few operations. Each is taken from a shelf of its size class and goes back
//! there when it is dropped, last in, first out: the same sequence of operations gets the same addresses in each step,
//! and once every class has been used nothing is allocated any more.
//!
//! A class is a power of two of elements: at most half of a buffer is unused, and a few batch sizes share one class.

use std::collections::HashMap;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ns_llm_kernels::cpu::linear::{Operand, OperandFormat};

/// Smallest class, elements.
const MIN_CLASS: usize = 256;

/// Shelves of free buffers. Shared by the backend and by its buffers that are in use; the lock is held for a push or a
/// pop only.
#[derive(Default)]
pub(super) struct Arena {
    shelves: Mutex<Shelves>,
}

#[derive(Default)]
struct Shelves {
    floats: HashMap<usize, Vec<Vec<f32>>>,
    operands: HashMap<(OperandFormat, usize), Vec<Operand>>,
    num_allocations: u64,
}

impl Arena {
    /// At least `len` floats; what they hold is not specified.
    pub(super) fn floats(self: &Arc<Self>, len: usize) -> Floats {
        let class = class_of(len);
        let mut shelves = self.lock();
        let reused = shelves.floats.entry(class).or_default().pop();
        let values = reused.unwrap_or_else(|| {
            shelves.num_allocations += 1;
            vec![0.0; class]
        });
        Floats { values, len, arena: Arc::clone(self) }
    }

    /// An operand `[rows, width]`; what it holds is not specified.
    pub(super) fn operand(self: &Arc<Self>, format: OperandFormat, rows: usize, width: usize) -> CpuOperand {
        // Some formats pad a row to the next even length.
        let class = class_of(rows * width.next_multiple_of(2));
        let mut shelves = self.lock();
        let reused = shelves.operands.entry((format, class)).or_default().pop();
        let mut operand = reused.unwrap_or_else(|| {
            shelves.num_allocations += 1;
            Operand::zeros(format, 1, class)
        });
        operand.resize(rows, width);
        CpuOperand { operand: Some(operand), class, arena: Arc::clone(self) }
    }

    /// How many buffers were allocated so far.
    #[cfg(test)]
    pub(super) fn num_allocations(&self) -> u64 {
        self.lock().num_allocations
    }

    fn lock(&self) -> MutexGuard<'_, Shelves> {
        self.shelves.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn class_of(len: usize) -> usize {
    len.next_power_of_two().max(MIN_CLASS)
}

/// Floats on loan from an [`Arena`].
pub(super) struct Floats {
    values: Vec<f32>,
    len: usize,
    arena: Arc<Arena>,
}

impl Deref for Floats {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &self.values[..self.len]
    }
}

impl DerefMut for Floats {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.values[..self.len]
    }
}

impl Drop for Floats {
    fn drop(&mut self) {
        let values = std::mem::take(&mut self.values);
        self.arena.lock().floats.entry(values.len()).or_default().push(values);
    }
}

/// An operand on loan from an [`Arena`].
pub struct CpuOperand {
    /// `None` only while it is dropped.
    operand: Option<Operand>,
    class: usize,
    arena: Arc<Arena>,
}

impl Deref for CpuOperand {
    type Target = Operand;
    fn deref(&self) -> &Operand {
        self.operand.as_ref().expect("taken by drop alone")
    }
}

impl DerefMut for CpuOperand {
    fn deref_mut(&mut self) -> &mut Operand {
        self.operand.as_mut().expect("taken by drop alone")
    }
}

impl Drop for CpuOperand {
    fn drop(&mut self) {
        if let Some(operand) = self.operand.take() {
            let shelf = (operand.format(), self.class);
            self.arena.lock().operands.entry(shelf).or_default().push(operand);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Buffers of one class are the same memory again, in the same order, and a second round allocates nothing.
    #[test]
    fn buffers_are_reused() {
        let arena = Arc::new(Arena::default());
        let round = || {
            let (a, b) = (arena.floats(1000), arena.floats(600));
            let operand = arena.operand(OperandFormat::F32, 3, 100);
            assert_eq!((a.len(), b.len(), operand.rows(), operand.width()), (1000, 600, 3, 100));
            (a.as_ptr() as usize, b.as_ptr() as usize)
        };
        round();
        let (warm, addresses) = (arena.num_allocations(), round());
        assert_eq!(warm, 3);
        assert_eq!(round(), addresses);
        assert_eq!(arena.num_allocations(), warm);
        assert_eq!(arena.operand(OperandFormat::F32, 2, 140).rows(), 2);
        assert_eq!(arena.num_allocations(), warm, "[2, 140] and [3, 100] are of one class");
    }
}
