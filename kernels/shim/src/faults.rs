//! Devices for tests of what happens around the kernels: one that computes nothing and is fast, and one that fails from a
//! given call on.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use ns_llm_kernels::cuda::driver::{DeviceInfo, Driver, Mark, Replay};
use ns_llm_kernels::cuda::launch::{Launch, Stream};
use ns_llm_kernels::error::{Error, Result};

use crate::device::{HostMemory, driver_on_host_memory};
use crate::queue::Work;

/// A device whose kernels do nothing, so that every result is zero: for tests of memory, order and faults.
pub struct IdleDevice {
    memory: Arc<HostMemory>,
}

impl IdleDevice {
    /// With `memory_bytes` of memory.
    pub fn new(memory_bytes: u64) -> Arc<IdleDevice> {
        let memory = HostMemory::new("a device that does nothing", memory_bytes, 0, None);
        Arc::new(IdleDevice { memory: Arc::new(memory) })
    }

    /// Bytes that are allocated now.
    pub fn used_bytes(&self) -> u64 {
        self.memory.used_bytes()
    }
}

impl Stream for IdleDevice {
    fn launch(&self, _: &Launch<'_>) -> Result<()> {
        Ok(())
    }
}

driver_on_host_memory!(IdleDevice);

/// How a device fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// There is no memory for whoever asks for some.
    OutOfMemory,
    /// Every call fails: the device is gone.
    Lost,
    /// Kernels cannot be launched.
    Launch,
    /// The next kernel never ends, and a call that waits for it would not return.
    Hang,
    /// Nothing can be captured.
    Capture,
}

/// Longest time that what is enqueued on a device that hangs may take.
const MAX_WAIT: Duration = Duration::from_millis(20);

/// A device that works until a given call, and then has a fault until it is healed.
pub struct FaultyDevice {
    inner: Arc<dyn Driver>,
    fault: Fault,
    num_calls: AtomicU64,
    /// The first call that meets the fault.
    from_call: Mutex<Option<u64>>,
    num_faults: AtomicU64,
    num_endless_calls: AtomicU64,
    /// A kernel that never ends was launched.
    hangs: AtomicBool,
    is_abandoned: AtomicBool,
    num_replays: AtomicU64,
    /// The captured step with which the fault begins.
    from_replay: Mutex<Option<u64>>,
    this: Weak<FaultyDevice>,
}

/// A captured step of a device that may fail when it runs.
struct FaultyStep {
    inner: Box<dyn Replay>,
    device: Arc<FaultyDevice>,
}

impl Replay for FaultyStep {
    unsafe fn launch(&mut self) -> Result<()> {
        let replay = self.device.num_replays.fetch_add(1, Ordering::Relaxed);
        if Some(replay) == *self.device.from_replay.lock().unwrap_or_else(PoisonError::into_inner) {
            self.device.fail_from(Some(self.device.num_calls()));
        }
        self.device.launched("cuGraphLaunch")?;
        // SAFETY: promised by the caller.
        unsafe { self.inner.launch() }
    }
}

impl FaultyDevice {
    /// `inner`, until it is [told](Self::fail_from) to fail.
    pub fn new(inner: Arc<dyn Driver>, fault: Fault) -> Arc<FaultyDevice> {
        let [num_calls, num_faults, num_endless_calls, num_replays] = std::array::from_fn(|_| AtomicU64::new(0));
        let [hangs, is_abandoned] = std::array::from_fn(|_| AtomicBool::new(false));
        let from_call = Mutex::new(None);
        Arc::new_cyclic(|this| FaultyDevice {
            inner,
            fault,
            num_calls,
            from_call,
            num_faults,
            num_endless_calls,
            hangs,
            is_abandoned,
            num_replays,
            from_replay: Mutex::default(),
            this: this.clone(),
        })
    }

    /// Calls so far.
    pub fn num_calls(&self) -> u64 {
        self.num_calls.load(Ordering::Relaxed)
    }
    /// Calls that failed.
    pub fn num_faults(&self) -> u64 {
        self.num_faults.load(Ordering::Relaxed)
    }
    /// Captured steps that were launched, or would have been.
    pub fn num_replays(&self) -> u64 {
        self.num_replays.load(Ordering::Relaxed)
    }
    /// Calls that would never have returned.
    pub fn num_endless_calls(&self) -> u64 {
        self.num_endless_calls.load(Ordering::Relaxed)
    }
    /// Whether it was given up.
    pub fn is_abandoned(&self) -> bool {
        self.is_abandoned.load(Ordering::Relaxed)
    }
    /// The fault begins at call `call`, counted from 0; `None`: it ends.
    pub fn fail_from(&self, call: Option<u64>) {
        *self.from_call.lock().unwrap_or_else(PoisonError::into_inner) = call;
    }

    /// The fault begins when a captured step is launched for the `replay`th time, counted from 0.
    pub fn fail_from_replay(&self, replay: u64) {
        *self.from_replay.lock().unwrap_or_else(PoisonError::into_inner) = Some(replay);
    }

    /// Counts a call, which fails if it is one of those that the fault is about.
    fn call(&self, name: &'static str, concerned: bool, error: impl FnOnce() -> Error) -> Result<()> {
        let call = self.num_calls.fetch_add(1, Ordering::Relaxed);
        let from = *self.from_call.lock().unwrap_or_else(PoisonError::into_inner);
        if from.is_none_or(|from| call < from) {
            return Ok(());
        }
        match self.fault {
            Fault::Lost => {
                self.num_faults.fetch_add(1, Ordering::Relaxed);
                Err(Error::DeviceLost { call: name, reason: "a test took it away".to_owned() })
            }
            Fault::Hang if concerned => {
                self.num_faults.fetch_add(1, Ordering::Relaxed);
                self.hangs.store(true, Ordering::Relaxed);
                Ok(())
            }
            _ if concerned => {
                self.num_faults.fetch_add(1, Ordering::Relaxed);
                Err(error())
            }
            _ => Ok(()),
        }
    }

    /// A call that waits for the device.
    fn waits(&self) {
        self.num_endless_calls.fetch_add(u64::from(self.hangs.load(Ordering::Relaxed)), Ordering::Relaxed);
    }

    /// A kernel, or as many as were captured.
    fn launched(&self, kernel: &'static str) -> Result<()> {
        let refused = || Error::Launch { kernel, reason: "a test forbade it".to_owned() };
        self.call(kernel, matches!(self.fault, Fault::Launch | Fault::Hang), refused)
    }

    fn other(&self, name: &'static str) -> Result<()> {
        self.call(name, false, || unreachable!("only a lost device fails here"))
    }
}

impl Stream for FaultyDevice {
    fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        self.launched(launch.kernel)?;
        self.inner.launch(launch)
    }
}

impl Driver for FaultyDevice {
    fn info(&self) -> &DeviceInfo {
        self.inner.info()
    }
    fn free_memory_bytes(&self) -> Result<u64> {
        self.other("cuMemGetInfo")?;
        self.inner.free_memory_bytes()
    }
    fn is_idle(&self) -> Result<bool> {
        self.other("cuStreamQuery")?;
        Ok(!self.hangs.load(Ordering::Relaxed) && self.inner.is_idle()?)
    }
    fn max_wait(&self) -> Duration {
        MAX_WAIT
    }
    fn abandon(&self) {
        self.is_abandoned.store(true, Ordering::Relaxed);
    }
    fn allocate(&self, purpose: &'static str, num_bytes: usize) -> Result<u64> {
        let full = || Error::OutOfMemory { purpose, needed_bytes: num_bytes as u64, available_bytes: 0 };
        self.call("cuMemAlloc", self.fault == Fault::OutOfMemory, full)?;
        self.inner.allocate(purpose, num_bytes)
    }
    unsafe fn free(&self, address: u64) {
        // A driver waits for the kernels before it takes memory back, unless the device was given up.
        if !self.is_abandoned() {
            self.waits();
        }
        // Whatever the state of a device, its memory is no longer ours.
        // SAFETY: promised by the caller.
        unsafe { self.inner.free(address) };
    }
    fn allocate_pinned(&self, num_bytes: usize) -> Result<u64> {
        let (purpose, needed_bytes) = ("pinned memory of the host", num_bytes as u64);
        let full = || Error::OutOfMemory { purpose, needed_bytes, available_bytes: 0 };
        self.call("cuMemHostAlloc", self.fault == Fault::OutOfMemory, full)?;
        self.inner.allocate_pinned(num_bytes)
    }
    unsafe fn free_pinned(&self, address: u64) {
        if !self.is_abandoned() {
            self.waits();
        }
        // What a device that is gone has left undone: it is done now, so that the one inside has nothing to do with this memory.
        let _ = self.inner.is_idle();
        // SAFETY: promised by the caller.
        unsafe { self.inner.free_pinned(address) };
    }
    unsafe fn download_pinned(&self, target: u64, address: u64, num_bytes: usize) -> Result<()> {
        self.other("cuMemcpyDtoHAsync")?;
        // SAFETY: promised by the caller.
        unsafe { self.inner.download_pinned(target, address, num_bytes) }
    }
    unsafe fn upload_pinned(&self, address: u64, source: u64, num_bytes: usize) -> Result<()> {
        self.other("cuMemcpyHtoDAsync")?;
        // SAFETY: promised by the caller.
        unsafe { self.inner.upload_pinned(address, source, num_bytes) }
    }
    fn new_mark(&self) -> Result<Mark> {
        self.other("cuEventCreate")?;
        self.inner.new_mark()
    }
    unsafe fn free_mark(&self, mark: Mark) {
        // SAFETY: promised by the caller.
        unsafe { self.inner.free_mark(mark) };
    }
    unsafe fn put_mark(&self, mark: Mark) -> Result<()> {
        self.other("cuEventRecord")?;
        // SAFETY: promised by the caller.
        unsafe { self.inner.put_mark(mark) }
    }
    unsafe fn is_passed(&self, mark: Mark) -> Result<bool> {
        self.other("cuEventQuery")?;
        // SAFETY: promised by the caller.
        Ok(!self.hangs.load(Ordering::Relaxed) && unsafe { self.inner.is_passed(mark) }?)
    }
    fn capture(&self, enqueue: &mut dyn FnMut() -> Result<()>) -> Result<Box<dyn Replay>> {
        let refused = || Error::CudaDriver { call: "cuStreamBeginCapture", reason: "a test forbade it".to_owned() };
        self.call("cuStreamBeginCapture", self.fault == Fault::Capture, refused)?;
        let inner = self.inner.capture(enqueue)?;
        let device = self.this.upgrade().expect("a device is behind a pointer that counts");
        Ok(Box::new(FaultyStep { inner, device }))
    }
    unsafe fn fill(&self, address: u64, byte: u8, num_bytes: usize) -> Result<()> {
        self.other("cuMemsetD8Async")?;
        // SAFETY: promised by the caller.
        unsafe { self.inner.fill(address, byte, num_bytes) }
    }
    unsafe fn upload(&self, address: u64, source: &[u8]) -> Result<()> {
        self.other("cuMemcpyHtoDAsync")?;
        // SAFETY: promised by the caller.
        unsafe { self.inner.upload(address, source) }
    }
    unsafe fn download(&self, target: &mut [u8], address: u64) -> Result<()> {
        self.other("cuMemcpyDtoHAsync")?;
        self.waits();
        // SAFETY: promised by the caller.
        unsafe { self.inner.download(target, address) }
    }
}
