//! Calling C: the mark of a thread that is inside a callback, and the caller's `user_data` on its way to other threads.
//!
//! Functions that wait for callbacks to return ask [`in_callback`] first: inside one they refuse, or go on without
//! waiting. So no chain of callbacks can wait for itself, also not through two engines.

use std::cell::Cell;
use std::ffi::c_void;

thread_local! {
    /// Callbacks on this thread's stack: one may open an engine, whose progress callback is a second.
    static DEPTH: Cell<usize> = const { Cell::new(0) };
}

/// Whether this thread is inside a callback of this library.
pub(crate) fn in_callback() -> bool {
    DEPTH.try_with(Cell::get).unwrap_or(0) > 0
}

/// Marks the thread while `call` runs C.
pub(crate) fn as_callback<T>(call: impl FnOnce() -> T) -> T {
    /// Takes the mark back, also if `call` panics.
    struct Mark;
    impl Drop for Mark {
        fn drop(&mut self) {
            let _ = DEPTH.try_with(|depth| depth.set(depth.get() - 1));
        }
    }
    DEPTH.with(|depth| depth.set(depth.get() + 1));
    let _mark = Mark;
    call()
}

/// The caller's pointer, which this library only hands back.
#[derive(Clone, Copy)]
pub(crate) struct UserData(pub(crate) *mut c_void);

// SAFETY: never dereferenced here; the header tells the caller on which threads the callback receives it.
unsafe impl Send for UserData {}

#[cfg(test)]
mod tests {
    use super::*;

    /// The mark nests and is taken back by a panic, and other threads do not see it.
    #[test]
    fn mark_is_per_thread_and_nests() {
        assert!(!in_callback());
        as_callback(|| {
            as_callback(|| assert!(in_callback()));
            assert!(in_callback());
            assert!(!std::thread::spawn(in_callback).join().unwrap());
            assert!(std::panic::catch_unwind(|| as_callback(|| panic!("injected"))).is_err());
            assert!(in_callback());
        });
        assert!(!in_callback());
    }
}
