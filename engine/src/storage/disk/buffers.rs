//! Memory that payloads are read into, used again: a large record of fresh memory costs more to touch than to read.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::config::MAX_TIER_READS;

/// Smaller ones are cheap, and of many lengths.
const MIN_BUFFER_BYTES: usize = 1 << 16;

/// The last payloads that were read. Once nobody else has one, its memory serves the next of the same length.
///
/// Invariant: at most [`MAX_TIER_READS`] of them, as many as may be on their way to the pool anyway.
#[derive(Default)]
pub(super) struct ReadBuffers {
    read: VecDeque<Arc<[u8]>>,
}

impl ReadBuffers {
    /// `num_bytes` bytes that nobody else has; what they hold is of no meaning.
    pub(super) fn take(&mut self, num_bytes: usize) -> Arc<[u8]> {
        let is_free = |buffer: &mut Arc<[u8]>| buffer.len() == num_bytes && Arc::get_mut(buffer).is_some();
        let free = self.read.iter_mut().position(is_free).and_then(|idx| self.read.remove(idx));
        // Made where it will stay.
        free.unwrap_or_else(|| std::iter::repeat_n(0, num_bytes).collect())
    }

    /// Remembers what is handed out; of very many the last.
    pub(super) fn note(&mut self, payload: &Arc<[u8]>) {
        if payload.len() < MIN_BUFFER_BYTES {
            return;
        }
        if self.read.len() == MAX_TIER_READS {
            self.read.pop_front();
        }
        self.read.push_back(Arc::clone(payload));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_has_is_used_again() {
        let mut buffers = ReadBuffers::default();
        let first = buffers.take(MIN_BUFFER_BYTES);
        buffers.note(&first);
        let place = first.as_ptr();
        let second = buffers.take(MIN_BUFFER_BYTES);
        assert_ne!(second.as_ptr(), place, "somebody has the first");
        drop(first);
        let other_length = buffers.take(MIN_BUFFER_BYTES + 1);
        assert_ne!(other_length.as_ptr(), place);
        let third = buffers.take(MIN_BUFFER_BYTES);
        assert_eq!(third.as_ptr(), place, "nobody has it any more");
        assert_eq!(buffers.read.len(), 0, "it is his alone");
        let small = buffers.take(MIN_BUFFER_BYTES - 1);
        buffers.note(&small);
        assert_eq!(buffers.read.len(), 0, "small ones are not kept");
    }

    #[test]
    fn few_are_kept() {
        let mut buffers = ReadBuffers::default();
        let held: Vec<_> = (0..3 * MAX_TIER_READS).map(|_| buffers.take(MIN_BUFFER_BYTES)).collect();
        held.iter().for_each(|payload| buffers.note(payload));
        assert_eq!(buffers.read.len(), MAX_TIER_READS);
    }
}
