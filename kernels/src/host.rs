//! What the machine is and can: memory in huge pages, memory and cores that this process may use, thread priority;
//! and in [`gpu`], which GPUs it has.
//! Everything else in this crate is portable because only this module asks the operating system. Outside Linux each
//! function falls back to what the standard library offers.

pub mod gpu;
#[cfg(target_os = "linux")]
mod pages;

use std::alloc::Layout;
use std::ptr::NonNull;

use crate::error::{Error, Result};

/// Size of a huge page on x86-64 and on aarch64 with 4 KiB base pages.
const HUGE_PAGE_BYTES: usize = 2 << 20;
/// Alignment of every buffer: a cache line, and a 512-bit vector.
const ALIGN_BYTES: usize = 64;
/// Smallest buffer that is worth pages of the system.
#[cfg(target_os = "linux")]
const MIN_PAGES_BYTES: usize = HUGE_PAGE_BYTES / 8;

/// Numbers that any bit pattern, all zeros included, is a valid value of.
///
/// # Safety
/// The type has no padding, no invalid bit pattern, no destructor, and an alignment of at most 64 bytes.
pub unsafe trait Plain: Copy + Send + Sync + 'static {}
macro_rules! plain {
    ($($type:ty),*) => { $(
        // SAFETY: an integer or an IEEE number: every bit pattern is a value, and there is no padding.
        unsafe impl Plain for $type {}
    )* };
}
plain!(u8, i8, u16, i16, u32, i32, u64, f32, half::f16, half::bf16);

/// Zeroed memory for weights and KV blocks, in 2 MiB pages where it is not small (measured: 6 to 19 % more read bandwidth
/// than with 4 KiB pages). Pages are taken from the system when they are first written.
/// Allocation fails with an error, it never aborts the process.
pub struct HugeBuffer {
    start: NonNull<u8>,
    len_bytes: usize,
    _memory: Memory,
}

/// Who has the memory of a buffer, and gives it back.
enum Memory {
    #[cfg(target_os = "linux")]
    System {
        _pages: pages::Pages,
    },
    Allocator {
        _allocation: Allocation,
    },
}

/// Memory of the global allocator.
struct Allocation {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: the buffer owns its memory like a `Box<[u8]>` does.
unsafe impl Send for HugeBuffer {}
// SAFETY: shared access is read-only, as in a `Box<[u8]>`.
unsafe impl Sync for HugeBuffer {}

impl HugeBuffer {
    /// `len_bytes` zero bytes, aligned to 64. `purpose` is named in the error.
    pub fn zeroed(purpose: &'static str, len_bytes: usize) -> Result<HugeBuffer> {
        let out_of_memory = || Error::OutOfMemory {
            purpose,
            needed_bytes: len_bytes as u64,
            available_bytes: available_memory_bytes().unwrap_or(0),
        };
        // Linux overcommits: it would hand out more than there is, and kill the process when the pages are touched.
        let is_large = len_bytes >= HUGE_PAGE_BYTES;
        if is_large && available_memory_bytes().is_some_and(|available| available < len_bytes as u64) {
            return Err(out_of_memory());
        }
        #[cfg(target_os = "linux")]
        if len_bytes >= MIN_PAGES_BYTES {
            let pages = pages::Pages::zeroed(len_bytes).ok_or_else(out_of_memory)?;
            return Ok(HugeBuffer { start: pages.start(), len_bytes, _memory: Memory::System { _pages: pages } });
        }
        let allocation = Allocation::zeroed(len_bytes).ok_or_else(out_of_memory)?;
        Ok(HugeBuffer { start: allocation.start, len_bytes, _memory: Memory::Allocator { _allocation: allocation } })
    }
    /// Length in bytes.
    pub fn len_bytes(&self) -> usize {
        self.len_bytes
    }
    /// The whole buffer as numbers; a rest that is shorter than one number is left out.
    pub fn as_slice<T: Plain>(&self) -> &[T] {
        // SAFETY: `start` is aligned to 64 bytes, `len_bytes` are initialised (to zero), and
        // `T: Plain` has no invalid bit pattern.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().cast(), self.len_bytes / size_of::<T>()) }
    }
    /// As [`as_slice`](Self::as_slice), for writing.
    pub fn as_mut_slice<T: Plain>(&mut self) -> &mut [T] {
        // SAFETY: as in `as_slice`; `&mut self` makes it exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().cast(), self.len_bytes / size_of::<T>()) }
    }
}

impl Allocation {
    fn zeroed(len_bytes: usize) -> Option<Allocation> {
        let layout = Layout::from_size_align(len_bytes.max(1), ALIGN_BYTES).ok()?;
        // SAFETY: the layout's size is not zero.
        let start = NonNull::new(unsafe { std::alloc::alloc_zeroed(layout) })?;
        Some(Allocation { start, layout })
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // SAFETY: the allocator gave `start` for this layout.
        unsafe { std::alloc::dealloc(self.start.as_ptr(), self.layout) };
    }
}

impl std::fmt::Debug for HugeBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HugeBuffer").field("len_bytes", &self.len_bytes).finish_non_exhaustive()
    }
}

/// Bytes that this process can still take: what the machine has left, or what its control group leaves, whichever is
/// less. `None` where the system does not say.
pub fn available_memory_bytes() -> Option<u64> {
    let machine = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| mem_available_bytes(&text));
    let read_number = |path: &str| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    // Version 2 first, then version 1; in a container the group's own files appear at these paths. "max" parses as none.
    let group = [
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat", "inactive_file "),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
            "/sys/fs/cgroup/memory/memory.stat",
            "total_inactive_file ",
        ),
    ]
    .into_iter()
    .find_map(|(limit, used, statistics, cache)| {
        // What is used includes file pages that the kernel gives away when asked, such as a checkpoint just read.
        let statistics = std::fs::read_to_string(statistics).unwrap_or_default();
        let cached = statistics.lines().find_map(|line| line.strip_prefix(cache)?.parse::<u64>().ok()).unwrap_or(0);
        Some(read_number(limit)?.saturating_sub(read_number(used)?.saturating_sub(cached)))
    });
    machine.into_iter().chain(group).min()
}

fn mem_available_bytes(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// Cores that this process may run on: its affinity mask and CPU quota are respected.
pub fn usable_cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// Lowers the calling thread's priority a little (nice +4), so that compute gives way to the host program's own
/// threads. A refusal is no error: the thread then runs as before.
pub fn lower_thread_priority() {
    #[cfg(target_os = "linux")]
    // SAFETY: plain system calls without pointers. On Linux the priority belongs to the thread, not to the process.
    unsafe {
        const NICE_STEP: libc::c_int = 4;
        let thread_id = libc::syscall(libc::SYS_gettid) as libc::id_t;
        let nice = libc::getpriority(libc::PRIO_PROCESS, thread_id);
        libc::setpriority(libc::PRIO_PROCESS, thread_id, nice + NICE_STEP);
    }
}

/// Gives freed memory back to the system. Loading and tokenizing run on short-lived threads, and glibc keeps what each of
/// them frees in an arena of its own: without this, a process that opens and closes models would seem to grow.
///
/// glibc's function is looked up at run time: a library that was linked for glibc then also loads where musl stands in
/// for it, which has no such function and no need of it.
pub fn return_free_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        type MallocTrim = unsafe extern "C" fn(pad: usize) -> libc::c_int;
        // SAFETY: the name ends with NUL.
        let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"malloc_trim".as_ptr()) };
        if !found.is_null() {
            // SAFETY: the function of this name has this type, in every libc that has it. It may be called at any time,
            // from any thread: it only returns pages that hold no allocation.
            unsafe { std::mem::transmute::<*mut libc::c_void, MallocTrim>(found)(0) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Buffers are zero, aligned, and writable to the last byte, whoever has their memory.
    #[test]
    fn buffers_are_zeroed_and_aligned() {
        for len_bytes in [0, 1, 63, 4096, HUGE_PAGE_BYTES / 8, HUGE_PAGE_BYTES, 3 * HUGE_PAGE_BYTES + 5, 20 << 20] {
            let mut buffer = HugeBuffer::zeroed("test", len_bytes).expect("a few MiB");
            assert_eq!(buffer.as_slice::<u8>().as_ptr() as usize % ALIGN_BYTES, 0, "{len_bytes} bytes");
            assert_eq!(buffer.as_slice::<u8>().len(), len_bytes);
            assert!(buffer.as_slice::<u8>().iter().all(|&byte| byte == 0));
            assert_eq!(buffer.as_slice::<f32>().len(), len_bytes / 4);
            buffer.as_mut_slice::<u8>().fill(7);
            assert!(buffer.as_slice::<u8>().iter().all(|&byte| byte == 7));
        }
    }

    /// Asking for more than any machine has is an error that names the purpose, not an abort.
    #[test]
    fn impossible_size_is_an_error() {
        for len_bytes in [1 << 50, usize::MAX, isize::MAX as usize] {
            let error = HugeBuffer::zeroed("impossible", len_bytes).expect_err("more than there is");
            assert!(
                matches!(error, Error::OutOfMemory { purpose: "impossible", needed_bytes, .. } if needed_bytes == len_bytes as u64)
            );
        }
    }

    /// The figure of /proc/meminfo is read in KiB; a text without it gives none.
    #[test]
    fn available_memory_is_parsed() {
        assert_eq!(mem_available_bytes("MemTotal: 9 kB\nMemAvailable:    2048 kB\n"), Some(2 << 20));
        assert_eq!(mem_available_bytes("MemTotal: 9 kB\n"), None);
        assert_eq!(mem_available_bytes("MemAvailable: 99999999999999999999 kB"), None);
        assert!(usable_cores() >= 1);
        #[cfg(target_os = "linux")]
        assert!(available_memory_bytes().is_some_and(|bytes| bytes > 0));
    }

    /// Lowering the priority changes the calling thread alone.
    #[cfg(target_os = "linux")]
    #[test]
    fn priority_belongs_to_the_thread() {
        // SAFETY: a system call without pointers; 0 is the calling thread.
        let nice = || unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
        let before = nice();
        let lowered = std::thread::spawn(move || {
            lower_thread_priority();
            nice()
        });
        assert_eq!(lowered.join().expect("no panic"), (before + 4).min(19));
        assert_eq!(nice(), before);
    }
}
