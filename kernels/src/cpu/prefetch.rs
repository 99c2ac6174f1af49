//! What the x86 kernels fetch before they need it.

use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};

/// Bytes that one prefetch asks for.
pub(super) const CACHE_LINE_BYTES: usize = 64;

/// Where the next bytes are fetched from, step by step, into the L2 cache.
#[derive(Clone, Copy)]
pub(super) struct Prefetch {
    address: *const i8,
    step_bytes: usize,
}

impl Prefetch {
    /// What lies behind a chunk, as long as the chunk, in so many steps: the next chunk, or panel. (A prefetch of an address
    /// that is not mapped does nothing.)
    pub(super) fn behind(chunk: &[u8], num_steps: usize) -> Prefetch {
        Prefetch { address: chunk.as_ptr_range().end.cast(), step_bytes: chunk.len() / num_steps }
    }

    #[inline(always)]
    pub(super) fn step(&mut self) {
        for line in (0..self.step_bytes).step_by(CACHE_LINE_BYTES) {
            // SAFETY: a prefetch has no effect that could be seen.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(self.address.wrapping_add(line)) };
        }
        self.address = self.address.wrapping_add(self.step_bytes);
    }
}
