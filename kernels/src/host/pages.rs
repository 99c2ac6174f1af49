//! Memory straight from the system: anonymous mappings, zeroed lazily, page by page, and in huge pages where the system allows
//! it. (The global allocator would write the zeros itself, and so touch every page with 4 KiB granularity before it can be
//! made huge.)
//!
//! Buffers of a few MiB share a mapping, one behind the other: a huge page is backed as a whole, so that a buffer of 4.25 MiB
//! with pages of its own has 6. A model's matrices are like that; measured on one of 610 MiB, 170 MiB more.

use std::ptr::{NonNull, null_mut};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::HUGE_PAGE_BYTES;

/// Size of a mapping that buffers share.
const SHARED_BYTES: usize = 64 << 20;
/// Largest buffer that shares one.
const MAX_SHARING_BYTES: usize = SHARED_BYTES / 4;

/// Zeroed memory of whole pages.
pub(super) struct Pages {
    start: NonNull<u8>,
    len_bytes: usize,
    mapping: Arc<Mapping>,
}

/// Whole huge pages, aligned to one.
struct Mapping {
    start: NonNull<u8>,
    len_bytes: usize,
    is_shared: bool,
}

/// The mapping that takes the next buffer, while one of its buffers is there.
struct Sharing {
    mapping: Weak<Mapping>,
    used_bytes: usize,
}

static SHARING: Mutex<Sharing> = Mutex::new(Sharing { mapping: Weak::new(), used_bytes: 0 });

// SAFETY: the numbers of a mapping; what they point to is the buffers'.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Pages {
    /// Whole pages with room for `len_bytes`; `None` where the system has none.
    pub(super) fn zeroed(len_bytes: usize) -> Option<Pages> {
        let len_bytes = len_bytes.checked_next_multiple_of(page_bytes())?;
        if len_bytes > MAX_SHARING_BYTES {
            // Whole huge pages: the last one too is then backed by a huge page.
            let mapping = Mapping::new(len_bytes.checked_next_multiple_of(HUGE_PAGE_BYTES)?, false)?;
            return Some(Pages { start: mapping.start, len_bytes, mapping: Arc::new(mapping) });
        }
        let mut sharing = SHARING.lock().unwrap_or_else(PoisonError::into_inner);
        let with_room = sharing.mapping.upgrade().filter(|_| sharing.used_bytes + len_bytes <= SHARED_BYTES);
        let mapping = match with_room {
            Some(mapping) => mapping,
            None => {
                let mapping = Arc::new(Mapping::new(SHARED_BYTES, true)?);
                *sharing = Sharing { mapping: Arc::downgrade(&mapping), used_bytes: 0 };
                mapping
            }
        };
        // SAFETY: the bytes behind those in use, inside the mapping.
        let start = unsafe { mapping.start.byte_add(sharing.used_bytes) };
        sharing.used_bytes += len_bytes;
        Some(Pages { start, len_bytes, mapping })
    }

    /// Where they begin.
    pub(super) fn start(&self) -> NonNull<u8> {
        self.start
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        if self.mapping.is_shared {
            // Their addresses stay taken while a neighbour is there, their memory does not. A refusal does no harm.
            // SAFETY: whole pages of this buffer alone, which nobody uses any more.
            unsafe { libc::madvise(self.start.as_ptr().cast(), self.len_bytes, libc::MADV_DONTNEED) };
        }
    }
}

impl Mapping {
    /// `len_bytes`: a multiple of a huge page.
    fn new(len_bytes: usize, is_shared: bool) -> Option<Mapping> {
        let reserved = len_bytes.checked_add(HUGE_PAGE_BYTES)?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches no memory in use.
        let base = unsafe { libc::mmap(null_mut(), reserved, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            return None;
        }
        let lead = base.align_offset(HUGE_PAGE_BYTES);
        // SAFETY: `lead < HUGE_PAGE_BYTES`, so `start .. start + len_bytes` lies inside the reservation; the two ends given
        // back lie outside of it. Both are whole pages. Advice may be refused without harm.
        unsafe {
            let start = base.byte_add(lead);
            if lead > 0 {
                libc::munmap(base, lead);
            }
            libc::munmap(start.byte_add(len_bytes), HUGE_PAGE_BYTES - lead);
            libc::madvise(start, len_bytes, libc::MADV_HUGEPAGE);
            Some(Mapping { start: NonNull::new(start.cast())?, len_bytes, is_shared })
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly these bytes were left mapped, and the last buffer of them is gone.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len_bytes) };
    }
}

/// Size of an ordinary page.
fn page_bytes() -> usize {
    // SAFETY: a question without pointers.
    let bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(bytes).ok().filter(|bytes| bytes.is_power_of_two()).unwrap_or(HUGE_PAGE_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resident_bytes(pages: &Pages) -> usize {
        let mut resident = vec![0_u8; pages.len_bytes / page_bytes()];
        // SAFETY: the pages are mapped, and there is a byte for each.
        let status = unsafe { libc::mincore(pages.start.as_ptr().cast(), pages.len_bytes, resident.as_mut_ptr()) };
        assert_eq!(status, 0);
        resident.iter().filter(|&&page| page & 1 == 1).count() * page_bytes()
    }

    fn fill(pages: &Pages) {
        // SAFETY: this test's own.
        unsafe { pages.start.as_ptr().write_bytes(7, pages.len_bytes) };
    }

    /// Buffers of a few MiB lie behind one another; the memory of one that is dropped goes back while its neighbours keep
    /// theirs, and a mapping that nobody uses is gone. A large buffer has pages of its own.
    #[test]
    fn buffers_share_mappings() {
        let mut shared: Vec<Pages> = (0..20).map(|_| Pages::zeroed((4 << 20) + 5).expect("a few MiB")).collect();
        shared.iter().for_each(fill);
        // Other tests of this process may take their places between them.
        let in_mapping = |at: &Arc<Mapping>| shared.iter().filter(|pages| Arc::ptr_eq(&pages.mapping, at)).count();
        assert!(shared.iter().any(|pages| in_mapping(&pages.mapping) > 4), "they share");
        for pair in shared.windows(2).filter(|pair| Arc::ptr_eq(&pair[0].mapping, &pair[1].mapping)) {
            assert!(pair[0].start.addr().get() + pair[0].len_bytes <= pair[1].start.addr().get());
        }
        let middle = shared.iter().position(|pages| in_mapping(&pages.mapping) > 4).expect("as above") + 1;
        let dropped = shared.remove(middle);
        assert_eq!(resident_bytes(&dropped), dropped.len_bytes);
        let ghost = Pages { start: dropped.start, len_bytes: dropped.len_bytes, mapping: dropped.mapping.clone() };
        drop(dropped);
        assert_eq!(resident_bytes(&ghost), 0);
        std::mem::forget(ghost);
        let neighbour = &shared[middle - 1];
        // SAFETY: this test's own.
        let bytes = unsafe { std::slice::from_raw_parts(neighbour.start.as_ptr(), neighbour.len_bytes) };
        assert!(bytes.iter().all(|&byte| byte == 7));

        let large = Pages::zeroed(MAX_SHARING_BYTES + 1).expect("a few MiB");
        assert_eq!(large.start, large.mapping.start);
        let mapping = Arc::downgrade(&large.mapping);
        drop(large);
        assert!(mapping.upgrade().is_none());
    }
}
