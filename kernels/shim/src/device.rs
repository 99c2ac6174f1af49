//! A device made of the shim: kernels run on the CPU, and its memory is memory of this process, of a size that the test chooses.
//! Nothing that was not allocated is copied, and what was not written reads as NaN.

use std::alloc::{Layout, alloc, dealloc};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ns_llm_kernels::cuda::driver::{DeviceInfo, Driver};
use ns_llm_kernels::cuda::launch::{Launch, Stream};
use ns_llm_kernels::error::{Error, Result};

use crate::Shim;

/// What the driver aligns allocations to.
const ALIGNMENT: usize = 256;
/// What unwritten memory holds: NaN as a number, no valid index.
const POISON: u8 = 0xff;

/// A device whose kernels run on the CPU.
pub struct ShimDevice {
    kernels: Shim,
    memory: HostMemory,
}

/// Memory of this process that plays a device's.
pub(crate) struct HostMemory {
    pub(crate) info: DeviceInfo,
    /// What unwritten memory holds.
    pub(crate) unwritten: u8,
    /// Bytes by address.
    allocations: Mutex<BTreeMap<u64, usize>>,
    /// Memory that plays the host's pinned.
    pinned: Mutex<BTreeMap<u64, Box<[u8]>>>,
    /// Copies there that were started and have not arrived: target, address, bytes.
    under_way: Mutex<Vec<(u64, u64, usize)>>,
    /// Copies there that have arrived, and how many times something was waited for that brought some.
    arrived: Mutex<(u64, u64)>,
}

impl ShimDevice {
    /// With `memory_bytes` of memory.
    pub fn new(kernels: Shim, memory_bytes: u64) -> Arc<ShimDevice> {
        Arc::new(ShimDevice { kernels, memory: HostMemory::new("a CPU that plays a GPU", memory_bytes, POISON) })
    }

    /// The same of another compute capability, with what a device of it has.
    pub fn of_capability(kernels: Shim, memory_bytes: u64, compute_capability: (i32, i32)) -> Arc<ShimDevice> {
        let mut memory = HostMemory::new("a CPU that plays a GPU", memory_bytes, POISON);
        memory.info.compute_capability = compute_capability;
        if compute_capability >= (9, 0) {
            (memory.info.max_shared_bytes, memory.info.has_tensor_maps) = (227 << 10, true);
        }
        Arc::new(ShimDevice { kernels, memory })
    }

    /// Bytes that are allocated now.
    pub fn used_bytes(&self) -> u64 {
        self.memory.used_bytes()
    }

    /// Copies to pinned memory so far, and how many waits brought them.
    pub fn pinned_copies(&self) -> (u64, u64) {
        *held(&self.memory.arrived)
    }
}

impl Stream for ShimDevice {
    fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        self.kernels.launch(launch)
    }
}

impl HostMemory {
    pub(crate) fn new(name: &str, memory_bytes: u64, unwritten: u8) -> HostMemory {
        let info = DeviceInfo {
            name: name.to_owned(),
            compute_capability: (8, 0),
            num_multiprocessors: 1,
            memory_bytes,
            max_shared_bytes: 99 << 10,
            has_tensor_maps: false,
        };
        HostMemory {
            info,
            unwritten,
            allocations: Mutex::default(),
            pinned: Mutex::default(),
            under_way: Mutex::default(),
            arrived: Mutex::default(),
        }
    }

    pub(crate) fn used_bytes(&self) -> u64 {
        self.lock().values().map(|&bytes| bytes as u64).sum()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, usize>> {
        held(&self.allocations)
    }

    /// Full of what unwritten memory holds.
    pub(crate) fn allocate_pinned(&self, num_bytes: usize) -> u64 {
        let mut memory = vec![POISON; num_bytes].into_boxed_slice();
        let address = memory.as_mut_ptr() as u64;
        held(&self.pinned).insert(address, memory);
        address
    }

    pub(crate) fn free_pinned(&self, address: u64) {
        let freed = held(&self.pinned).remove(&address);
        assert!(freed.is_some(), "pinned memory that is freed was allocated, and is freed once");
    }

    /// Arrives as late as it may: when somebody waits.
    pub(crate) fn download_pinned(&self, target: u64, address: u64, num_bytes: usize) {
        self.check(address, num_bytes);
        held(&self.under_way).push((target, address, num_bytes));
    }

    /// All that is under way arrives.
    pub(crate) fn arrive(&self) {
        let under_way = std::mem::take(&mut *held(&self.under_way));
        let mut arrived = held(&self.arrived);
        *arrived = (arrived.0 + under_way.len() as u64, arrived.1 + u64::from(!under_way.is_empty()));
        for (target, address, num_bytes) in under_way {
            let mut pinned = held(&self.pinned);
            let (start, memory) = pinned.range_mut(..=target).next_back().expect("the target is pinned memory");
            let offset = (target - start) as usize;
            self.download(&mut memory[offset..offset + num_bytes], address);
        }
    }

    pub(crate) fn allocate(&self, purpose: &'static str, num_bytes: usize) -> Result<u64> {
        let available_bytes = self.info.memory_bytes.saturating_sub(self.used_bytes());
        let layout = Layout::from_size_align(num_bytes, ALIGNMENT).ok();
        let fits = |layout: &Layout| layout.size() > 0 && layout.size() as u64 <= available_bytes;
        let Some(layout) = layout.filter(fits) else {
            return Err(Error::OutOfMemory { purpose, needed_bytes: num_bytes as u64, available_bytes });
        };
        // SAFETY: the size is not 0.
        let start = unsafe { alloc(layout) };
        assert!(!start.is_null(), "{num_bytes} bytes of this process for {purpose}");
        // SAFETY: as many bytes were allocated.
        unsafe { start.write_bytes(self.unwritten, num_bytes) };
        self.lock().insert(start as u64, num_bytes);
        Ok(start as u64)
    }

    pub(crate) fn free(&self, address: u64) {
        let num_bytes = self.lock().remove(&address).expect("freed memory was allocated, and is freed once");
        let layout = Layout::from_size_align(num_bytes, ALIGNMENT).expect("as it was allocated");
        // SAFETY: the address was in the list of what `alloc` gave with this layout, and is no more.
        unsafe { dealloc(address as *mut u8, layout) };
    }

    /// Panics unless the bytes are inside one allocation.
    pub(crate) fn check(&self, address: u64, num_bytes: usize) {
        let allocations = self.lock();
        let found = allocations.range(..=address).next_back();
        let fits = found.is_some_and(|(start, bytes)| address + num_bytes as u64 <= start + *bytes as u64);
        assert!(fits, "{num_bytes} bytes at {address:#x} are not inside an allocation");
    }

    pub(crate) fn fill(&self, address: u64, byte: u8, num_bytes: usize) {
        self.check(address, num_bytes);
        // SAFETY: the bytes are inside an allocation.
        unsafe { (address as *mut u8).write_bytes(byte, num_bytes) };
    }

    pub(crate) fn upload(&self, address: u64, source: &[u8]) {
        self.check(address, source.len());
        // SAFETY: the bytes are inside an allocation, which no slice of this process overlaps.
        unsafe { (address as *mut u8).copy_from_nonoverlapping(source.as_ptr(), source.len()) };
    }

    pub(crate) fn download(&self, target: &mut [u8], address: u64) {
        self.check(address, target.len());
        // SAFETY: as in `upload`; all bytes were written when they were allocated.
        unsafe { (address as *const u8).copy_to_nonoverlapping(target.as_mut_ptr(), target.len()) };
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        let left = std::mem::take(&mut *self.lock());
        assert!(held(&self.pinned).is_empty() || std::thread::panicking(), "pinned memory was never freed");
        assert!(left.is_empty() || std::thread::panicking(), "{} allocations were never freed", left.len());
    }
}

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The operations on memory are those of [`HostMemory`].
macro_rules! driver_on_host_memory {
    ($device:ty) => {
        impl Driver for $device {
            fn info(&self) -> &DeviceInfo {
                &self.memory.info
            }
            fn free_memory_bytes(&self) -> Result<u64> {
                Ok(self.memory.info.memory_bytes.saturating_sub(self.memory.used_bytes()))
            }
            fn is_idle(&self) -> Result<bool> {
                // Kernels have run when their launch returns.
                self.memory.arrive();
                Ok(true)
            }
            fn allocate_pinned(&self, num_bytes: usize) -> Result<u64> {
                Ok(self.memory.allocate_pinned(num_bytes))
            }
            unsafe fn free_pinned(&self, address: u64) {
                self.memory.free_pinned(address);
            }
            unsafe fn download_pinned(&self, target: u64, address: u64, num_bytes: usize) -> Result<()> {
                self.memory.download_pinned(target, address, num_bytes);
                Ok(())
            }
            fn abandon(&self) {
                panic!("a device that never hangs was given up");
            }
            fn allocate(&self, purpose: &'static str, num_bytes: usize) -> Result<u64> {
                self.memory.allocate(purpose, num_bytes)
            }
            unsafe fn free(&self, address: u64) {
                self.memory.free(address);
            }
            unsafe fn fill(&self, address: u64, byte: u8, num_bytes: usize) -> Result<()> {
                // Poison is what this device has for it.
                let byte = if byte == 0 { 0 } else { self.memory.unwritten };
                self.memory.fill(address, byte, num_bytes);
                Ok(())
            }
            unsafe fn upload(&self, address: u64, source: &[u8]) -> Result<()> {
                self.memory.upload(address, source);
                Ok(())
            }
            unsafe fn download(&self, target: &mut [u8], address: u64) -> Result<()> {
                self.memory.download(target, address);
                Ok(())
            }
        }
    };
}
pub(crate) use driver_on_host_memory;

driver_on_host_memory!(ShimDevice);
