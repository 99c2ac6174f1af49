//! An allocator that counts, for tests that promise how much memory something takes.
#![allow(unsafe_code, reason = "a counting allocator cannot be written without")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// Counts what the current thread holds, and the most it held.
struct Counting;

thread_local! {
    static LIVE_BYTES: Cell<i64> = const { Cell::new(0) };
    static PEAK_BYTES: Cell<i64> = const { Cell::new(0) };
    static NUM_CALLS: Cell<u64> = const { Cell::new(0) };
}

fn count(bytes: i64) {
    NUM_CALLS.set(NUM_CALLS.get() + 1);
    let live = LIVE_BYTES.get() + bytes;
    LIVE_BYTES.set(live);
    PEAK_BYTES.set(PEAK_BYTES.get().max(live));
}

// SAFETY: every call goes to the system's allocator unchanged; the counters are plain cells of the thread, without
// destructors, and allocate nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as i64);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as i64));
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The most bytes that `run` held beyond what was there before.
pub fn peak_bytes_of<T>(run: impl FnOnce() -> T) -> (T, u64) {
    let before = LIVE_BYTES.get();
    PEAK_BYTES.set(before);
    let result = run();
    (result, (PEAK_BYTES.get() - before) as u64)
}

/// How often `run` asked for memory or gave some back: work that is counted, not timed.
#[allow(dead_code, reason = "each test program uses a part")]
pub fn allocator_calls_of<T>(run: impl FnOnce() -> T) -> (T, u64) {
    let before = NUM_CALLS.get();
    let result = run();
    (result, NUM_CALLS.get() - before)
}
