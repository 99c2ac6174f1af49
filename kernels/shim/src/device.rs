//! A device made of the shim: kernels run on the CPU, and its memory is memory of this process, of a size that the test
//! chooses. Nothing that was not allocated is copied, and what was not written reads as NaN. What is enqueued runs when
//! somebody waits for it ([`queue`](crate::queue)); of two kernels in a row the second is often begun before the first has run.

use std::alloc::{Layout, alloc, dealloc};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ns_llm_kernels::cuda::driver::{DeviceInfo, Driver, Mark, Replay};
use ns_llm_kernels::cuda::launch::{Launch, Stream};
use ns_llm_kernels::error::{Error, Result};

use crate::Shim;
use crate::queue::{Captured, OwnedLaunch, Queue, Work};

/// What the driver aligns allocations to.
const ALIGNMENT: usize = 256;
/// What unwritten memory holds: NaN as a number, no valid index.
const POISON: u8 = 0xff;

/// A device whose kernels run on the CPU.
pub struct ShimDevice {
    memory: Arc<HostMemory>,
}

/// Memory of this process that plays a device's, and what is to be done with it.
pub(crate) struct HostMemory {
    pub(crate) info: DeviceInfo,
    /// `None`: kernels do nothing.
    kernels: Option<Shim>,
    /// What unwritten memory holds.
    pub(crate) unwritten: u8,
    /// Bytes by address, and which allocation it is.
    allocations: Mutex<BTreeMap<u64, Allocation>>,
    /// Memory that plays the host's pinned.
    pinned: Mutex<BTreeMap<u64, Box<[u8]>>>,
    queue: Mutex<Queue>,
    /// Copies there that have arrived, and how many times something was waited for that brought some.
    arrived: Mutex<(u64, u64)>,
    /// Allocations and marks so far.
    num_made: AtomicU64,
    num_captures: AtomicU64,
    num_replays: AtomicU64,
    /// Whether a kernel may be begun before the one in front of it has run.
    begins_early: bool,
    /// Kernels behind which there was another one that might have been begun early, and how many of these were.
    num_followed: AtomicU64,
    num_early: AtomicU64,
}

#[derive(Debug, Clone, Copy)]
struct Allocation {
    num_bytes: usize,
    number: u64,
}

/// A captured step.
struct CapturedStep {
    memory: Arc<HostMemory>,
    step: Arc<Vec<Captured>>,
}

impl ShimDevice {
    /// With `memory_bytes` of memory.
    pub fn new(kernels: Shim, memory_bytes: u64) -> Arc<ShimDevice> {
        let memory = HostMemory::new("a CPU that plays a GPU", memory_bytes, POISON, Some(kernels));
        Arc::new(ShimDevice { memory: Arc::new(memory) })
    }

    /// The same, but no kernel is begun before the one in front of it has run.
    pub fn in_order(kernels: Shim, memory_bytes: u64) -> Arc<ShimDevice> {
        let mut memory = HostMemory::new("a CPU that plays a GPU", memory_bytes, POISON, Some(kernels));
        memory.begins_early = false;
        Arc::new(ShimDevice { memory: Arc::new(memory) })
    }

    /// The same of another compute capability, with what a device of it has.
    pub fn of_capability(kernels: Shim, memory_bytes: u64, compute_capability: (i32, i32)) -> Arc<ShimDevice> {
        let mut memory = HostMemory::new("a CPU that plays a GPU", memory_bytes, POISON, Some(kernels));
        memory.info.compute_capability = compute_capability;
        if compute_capability >= (9, 0) {
            (memory.info.max_shared_bytes, memory.info.has_tensor_maps) = (227 << 10, true);
        }
        Arc::new(ShimDevice { memory: Arc::new(memory) })
    }

    /// Bytes that are allocated now.
    pub fn used_bytes(&self) -> u64 {
        self.memory.used_bytes()
    }

    /// Copies to pinned memory so far, and how many waits brought them.
    pub fn pinned_copies(&self) -> (u64, u64) {
        *held(&self.memory.arrived)
    }

    /// Steps that were captured, and how many times one ran, so far.
    pub fn captures(&self) -> (u64, u64) {
        (self.memory.num_captures.load(Ordering::Relaxed), self.memory.num_replays.load(Ordering::Relaxed))
    }

    /// Kernels that were begun before the one in front of them had run, so far.
    pub fn early_kernels(&self) -> u64 {
        self.memory.num_early.load(Ordering::Relaxed)
    }
}

impl Stream for ShimDevice {
    fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        self.memory.enqueue(Work::Launch(OwnedLaunch::new(launch)))
    }
}

impl Replay for CapturedStep {
    unsafe fn launch(&mut self) -> Result<()> {
        self.memory.num_replays.fetch_add(1, Ordering::Relaxed);
        self.memory.enqueue(Work::Replay(self.step.clone()))
    }
}

impl HostMemory {
    pub(crate) fn new(name: &str, memory_bytes: u64, unwritten: u8, kernels: Option<Shim>) -> HostMemory {
        let info = DeviceInfo {
            name: name.to_owned(),
            compute_capability: (8, 0),
            num_multiprocessors: 1,
            memory_bytes,
            max_shared_bytes: 99 << 10,
            has_tensor_maps: false,
        };
        let [num_made, num_captures, num_replays, num_followed, num_early] = std::array::from_fn(|_| AtomicU64::new(0));
        HostMemory {
            info,
            kernels,
            unwritten,
            allocations: Mutex::default(),
            pinned: Mutex::default(),
            queue: Mutex::default(),
            arrived: Mutex::default(),
            num_made,
            num_captures,
            num_replays,
            begins_early: true,
            num_followed,
            num_early,
        }
    }

    pub(crate) fn used_bytes(&self) -> u64 {
        held(&self.allocations).values().map(|allocation| allocation.num_bytes as u64).sum()
    }

    /// Full of poison.
    pub(crate) fn allocate_pinned(&self, num_bytes: usize) -> Result<u64> {
        self.forbid_in_capture("cuMemHostAlloc")?;
        let mut memory = vec![POISON; num_bytes].into_boxed_slice();
        let address = memory.as_mut_ptr() as u64;
        held(&self.pinned).insert(address, memory);
        Ok(address)
    }

    pub(crate) fn free_pinned(&self, address: u64) {
        let freed = held(&self.pinned).remove(&address);
        assert!(freed.is_some(), "pinned memory that is freed was allocated, and is freed once");
    }

    /// A driver refuses these while a step is captured, and the capture is over.
    pub(crate) fn forbid_in_capture(&self, call: &'static str) -> Result<()> {
        match held(&self.queue).capturing {
            None => Ok(()),
            Some(_) => Err(Error::CudaDriver { call, reason: "not while a step is captured".to_owned() }),
        }
    }

    pub(crate) fn enqueue(&self, work: Work) -> Result<()> {
        let mut queue = held(&self.queue);
        if queue.capturing.is_some() {
            let is_kernel = matches!(work, Work::Launch(_) | Work::Fill { .. });
            let allocations = work.addresses().into_iter().filter_map(|address| self.allocation_at(address)).collect();
            let capturing = queue.capturing.as_mut().expect("a step is captured");
            capturing.push(Captured { work, allocations });
            let reason = || "not while a step is captured".to_owned();
            return if is_kernel { Ok(()) } else { Err(Error::CudaDriver { call: "a copy", reason: reason() }) };
        }
        // A device that has nothing to do begins at once; kernels and what pinned memory has to do with are as late as
        // they may be.
        let is_plain = matches!(work, Work::Fill { .. } | Work::Upload { .. });
        if is_plain && queue.waiting.is_empty() {
            drop(queue);
            return self.carry_out(&work, &mut None);
        }
        queue.waiting.push_back(work);
        Ok(())
    }

    /// Runs what was enqueued, up to and with `end`; all of it where there is none. A kernel that fails takes the rest with it.
    pub(crate) fn run(&self, end: Option<Mark>) -> Result<()> {
        let mut copies = 0;
        let mut pending = None;
        let result = loop {
            // Not held while it runs.
            let next = held(&self.queue).waiting.pop_front();
            let Some(work) = next else { break self.run_pending(&mut pending) };
            copies += u64::from(matches!(work, Work::DownloadPinned { .. }));
            let result = self.carry_out(&work, &mut pending);
            if result.is_err() {
                held(&self.queue).waiting.clear();
                break result;
            }
            if matches!(work, Work::Mark(mark) if Some(mark) == end) {
                break Ok(());
            }
        };
        let mut arrived = held(&self.arrived);
        *arrived = (arrived.0 + copies, arrived.1 + u64::from(copies > 0));
        result
    }

    /// Runs the kernel whose turn has come, if there is one.
    fn run_pending(&self, pending: &mut Option<OwnedLaunch>) -> Result<()> {
        match (pending.take(), &self.kernels) {
            (Some(launch), Some(kernels)) => launch.run(|launch| kernels.launch(launch)),
            _ => Ok(()),
        }
    }

    /// The turn of a kernel has come behind another one: it is begun before that one has run, or waits until it is known what is
    /// behind itself.
    fn run_behind(&self, pending: &mut Option<OwnedLaunch>, next: &OwnedLaunch) -> Result<()> {
        let Some(kernels) = &self.kernels else { return Ok(()) };
        // Two times in three; which kernels these are is another thing from step to step.
        let is_early = || self.begins_early && self.num_followed.fetch_add(1, Ordering::Relaxed) % 3 != 2;
        if let Some(first) = pending.take_if(|_| is_early()) {
            self.num_early.fetch_add(1, Ordering::Relaxed);
            return first.run(|first| next.run(|next| kernels.launch_early(first, next)));
        }
        self.run_pending(pending)?;
        *pending = Some(next.clone());
        Ok(())
    }

    /// `pending` is a kernel whose turn has come; how it runs depends on what is behind it.
    fn carry_out(&self, work: &Work, pending: &mut Option<OwnedLaunch>) -> Result<()> {
        if !matches!(work, Work::Launch(_) | Work::Replay(_)) {
            self.run_pending(pending)?;
        }
        match work {
            Work::Launch(launch) => self.run_behind(pending, launch)?,
            &Work::Fill { address, byte, num_bytes } => self.fill(address, byte, num_bytes),
            Work::Upload { address, bytes } => self.upload(*address, bytes),
            &Work::UploadPinned { address, source, num_bytes } => {
                let pinned = held(&self.pinned);
                let (start, memory) = pinned.range(..=source).next_back().expect("the source is pinned memory");
                let offset = (source - start) as usize;
                self.upload(address, &memory[offset..offset + num_bytes]);
            }
            &Work::DownloadPinned { target, address, num_bytes } => {
                let mut pinned = held(&self.pinned);
                let (start, memory) = pinned.range_mut(..=target).next_back().expect("the target is pinned memory");
                let offset = (target - start) as usize;
                self.download(&mut memory[offset..offset + num_bytes], address);
            }
            Work::Replay(step) => {
                for Captured { work, allocations } in &**step {
                    for &(address, number) in allocations {
                        let found = self.allocation_at(address).is_some_and(|(_, found)| found == number);
                        assert!(found, "a captured step uses memory at {address:#x} that was freed since");
                    }
                    self.carry_out(work, pending)?;
                }
            }
            Work::Mark(_) => {}
        }
        Ok(())
    }

    /// The allocation in which the address lies, by the address itself.
    fn allocation_at(&self, address: u64) -> Option<(u64, u64)> {
        let allocations = held(&self.allocations);
        let (start, allocation) = allocations.range(..=address).next_back()?;
        (address < start + allocation.num_bytes as u64).then_some((address, allocation.number))
    }

    /// At the first question never: whoever asks has to be ready to wait.
    pub(crate) fn is_passed(&self, mark: Mark) -> Result<bool> {
        self.forbid_in_capture("cuEventQuery")?;
        {
            let mut queue = held(&self.queue);
            if !queue.waiting.iter().any(|work| matches!(work, Work::Mark(waiting) if *waiting == mark)) {
                return Ok(true);
            }
            if !queue.asked.contains(&mark) {
                queue.asked.push(mark);
                return Ok(false);
            }
            queue.asked.retain(|asked| *asked != mark);
        }
        self.run(Some(mark))?;
        Ok(true)
    }

    pub(crate) fn allocate(&self, purpose: &'static str, num_bytes: usize) -> Result<u64> {
        self.forbid_in_capture("cuMemAlloc")?;
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
        held(&self.allocations).insert(start as u64, Allocation { num_bytes, number: self.next_number() });
        Ok(start as u64)
    }

    pub(crate) fn next_number(&self) -> u64 {
        self.num_made.fetch_add(1, Ordering::Relaxed)
    }

    /// A driver waits for what was enqueued before.
    pub(crate) fn free(&self, address: u64) {
        // Nobody is told an error.
        let _ = self.run(None);
        let freed = held(&self.allocations).remove(&address).expect("freed memory was allocated, and is freed once");
        let layout = Layout::from_size_align(freed.num_bytes, ALIGNMENT).expect("as it was allocated");
        // SAFETY: the address was in the list of what `alloc` gave with this layout, and is no more.
        unsafe { dealloc(address as *mut u8, layout) };
    }

    /// Panics unless the bytes are inside one allocation.
    pub(crate) fn check(&self, address: u64, num_bytes: usize) {
        let allocations = held(&self.allocations);
        let found = allocations.range(..=address).next_back();
        let fits = found.is_some_and(|(start, it)| address + num_bytes as u64 <= start + it.num_bytes as u64);
        assert!(fits, "{num_bytes} bytes at {address:#x} are not inside an allocation");
    }

    fn fill(&self, address: u64, byte: u8, num_bytes: usize) {
        self.check(address, num_bytes);
        // SAFETY: the bytes are inside an allocation.
        unsafe { (address as *mut u8).write_bytes(byte, num_bytes) };
    }

    fn upload(&self, address: u64, source: &[u8]) {
        self.check(address, source.len());
        // SAFETY: the bytes are inside an allocation, which no slice of this process overlaps.
        unsafe { (address as *mut u8).copy_from_nonoverlapping(source.as_ptr(), source.len()) };
    }

    pub(crate) fn download(&self, target: &mut [u8], address: u64) {
        self.check(address, target.len());
        // SAFETY: as in `upload`; all bytes were written when they were allocated.
        unsafe { (address as *const u8).copy_to_nonoverlapping(target.as_mut_ptr(), target.len()) };
    }

    pub(crate) fn capture(
        memory: &Arc<HostMemory>,
        enqueue: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Box<dyn Replay>> {
        memory.forbid_in_capture("cuStreamBeginCapture")?;
        held(&memory.queue).capturing = Some(Vec::new());
        let enqueued = enqueue();
        let captured = held(&memory.queue).capturing.take().expect("a step is captured");
        enqueued?;
        memory.num_captures.fetch_add(1, Ordering::Relaxed);
        Ok(Box::new(CapturedStep { memory: memory.clone(), step: Arc::new(captured) }))
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        let left = std::mem::take(&mut *held(&self.allocations));
        let (panics, pinned) = (std::thread::panicking(), held(&self.pinned).is_empty());
        assert!(pinned || panics, "pinned memory was never freed");
        assert!(left.is_empty() || panics, "{} allocations were never freed", left.len());
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
                self.memory.forbid_in_capture("cuStreamQuery")?;
                self.memory.run(None)?;
                Ok(true)
            }
            fn allocate_pinned(&self, num_bytes: usize) -> Result<u64> {
                self.memory.allocate_pinned(num_bytes)
            }
            unsafe fn free_pinned(&self, address: u64) {
                self.memory.free_pinned(address);
            }
            unsafe fn download_pinned(&self, target: u64, address: u64, num_bytes: usize) -> Result<()> {
                self.memory.check(address, num_bytes);
                self.memory.enqueue(Work::DownloadPinned { target, address, num_bytes })
            }
            unsafe fn upload_pinned(&self, address: u64, source: u64, num_bytes: usize) -> Result<()> {
                self.memory.check(address, num_bytes);
                self.memory.enqueue(Work::UploadPinned { address, source, num_bytes })
            }
            fn new_mark(&self) -> Result<Mark> {
                Ok(Mark(self.memory.next_number()))
            }
            unsafe fn free_mark(&self, _: Mark) {}
            unsafe fn put_mark(&self, mark: Mark) -> Result<()> {
                self.memory.enqueue(Work::Mark(mark))
            }
            unsafe fn is_passed(&self, mark: Mark) -> Result<bool> {
                self.memory.is_passed(mark)
            }
            fn capture(&self, enqueue: &mut dyn FnMut() -> Result<()>) -> Result<Box<dyn Replay>> {
                HostMemory::capture(&self.memory, enqueue)
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
                self.memory.check(address, num_bytes);
                self.memory.enqueue(Work::Fill { address, byte, num_bytes })
            }
            unsafe fn upload(&self, address: u64, source: &[u8]) -> Result<()> {
                self.memory.check(address, source.len());
                self.memory.enqueue(Work::Upload { address, bytes: source.to_vec() })
            }
            unsafe fn download(&self, target: &mut [u8], address: u64) -> Result<()> {
                self.memory.forbid_in_capture("cuMemcpyDtoH")?;
                self.memory.run(None)?;
                self.memory.download(target, address);
                Ok(())
            }
        }
    };
}
pub(crate) use driver_on_host_memory;

driver_on_host_memory!(ShimDevice);
