//! Which process this is. A forked child has its parent's memory and none of its threads, so nothing in here works there.
//!
//! To ask the system at each call would cost more than all the rest of a call. So a page is marked that Linux gives to no
//! child: there it reads as zeros, however the child came to be (a handler of `pthread_atfork` would not see a bare
//! `clone`). Only where the mark is missing, because the process is another or the system has no such pages, is it asked.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};

use crate::failure::Failure;

/// The process that made the first handle.
static OWNER: OnceLock<Owner> = OnceLock::new();

struct Owner {
    pid: u32,
    /// 1 in this process and 0 in its children; `None` where the system has no such pages.
    mark: Option<&'static AtomicU8>,
}

/// Makes this process the owner of all handles, if there is none yet.
pub(crate) fn claim_process() {
    OWNER.get_or_init(|| Owner { pid: std::process::id(), mark: mark() });
}

/// Refuses the child of a fork, if the parent had made a handle. Asked before any lock is taken: another thread may
/// have held it at the fork.
pub(crate) fn check_process() -> Result<(), Failure> {
    match OWNER.get() {
        None => Ok(()),
        Some(owner) if owner.mark.is_some_and(|mark| mark.load(Ordering::Relaxed) == 1) => Ok(()),
        Some(owner) => ask_system(owner.pid),
    }
}

#[cold]
fn ask_system(owner: u32) -> Result<(), Failure> {
    let process = std::process::id();
    if owner == process { Ok(()) } else { Err(Failure::ForkedProcess { owner, process }) }
}

/// A marked byte on a page of its own that no child gets, for the life of the process.
#[cfg(target_os = "linux")]
fn mark() -> Option<&'static AtomicU8> {
    const PAGE_BYTES: usize = 4096;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping wherever there is room touches no memory that is in use.
    let page = unsafe { libc::mmap(std::ptr::null_mut(), PAGE_BYTES, protection, flags, -1, 0) };
    if page == libc::MAP_FAILED {
        return None;
    }
    // SAFETY: the page was mapped just now and nobody else knows of it. Kernels before 4.14 refuse, and are asked instead.
    if unsafe { libc::madvise(page, PAGE_BYTES, libc::MADV_WIPEONFORK) } != 0 {
        // SAFETY: as above.
        unsafe { libc::munmap(page, PAGE_BYTES) };
        return None;
    }
    // SAFETY: the page is readable, writable, zeroed, never unmapped, and used as this one byte only.
    let mark = unsafe { &*page.cast::<AtomicU8>() };
    mark.store(1, Ordering::Relaxed);
    Some(mark)
}

#[cfg(not(target_os = "linux"))]
fn mark() -> Option<&'static AtomicU8> {
    None
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    /// The mark is there in this process and gone in a forked child, so that the fast answer is given here and only here.
    #[test]
    fn a_child_has_no_mark() {
        let mark = mark().expect("this kernel has pages that no child gets");
        assert_eq!(mark.load(Ordering::Relaxed), 1);
        // SAFETY: the child calls nothing but `_exit`.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let status = i32::from(mark.load(Ordering::Relaxed));
            // SAFETY: ends the child without running what is the parent's.
            unsafe { libc::_exit(status) };
        }
        let mut status = -1;
        // SAFETY: `status` is writable, and the child is ours.
        assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
        assert!(libc::WIFEXITED(status), "{status}");
        assert_eq!(libc::WEXITSTATUS(status), 0, "the child saw the mark of its parent");
        assert_eq!(mark.load(Ordering::Relaxed), 1);
    }
}
