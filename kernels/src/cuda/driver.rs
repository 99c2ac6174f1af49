//! What a backend asks of a device beside running kernels: what it is, and its memory. The CUDA driver is one
//! ([`device`](super::device), with the feature `cuda`); the tests' CPU shim is another. So the code above runs on a GPU,
//! on a CPU that plays one, and on a driver that fails on purpose.

use std::time::{Duration, Instant};

use super::launch::Stream;
use crate::error::{Error, Result};

/// Longest time that a device may take for what was enqueued: hundreds of times as long as the longest step. Behind it the device
/// is given up, because a kernel that hangs cannot be ended from outside.
pub const MAX_WAIT: Duration = Duration::from_secs(60);
/// While a wait is this short, it is looked all the time whether it is over: a sleep would take as long as a short step.
const BUSY_WAIT: Duration = Duration::from_millis(5);
/// Time between two looks behind that.
const LOOK_INTERVAL: Duration = Duration::from_micros(50);

/// What a device is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// As the driver calls it.
    pub name: String,
    /// Major and minor number: (9, 0) is Hopper.
    pub compute_capability: (i32, i32),
    /// Streaming multiprocessors.
    pub num_multiprocessors: i32,
    /// All of its memory.
    pub memory_bytes: u64,
    /// Most shared memory that a block can have.
    pub max_shared_bytes: i32,
    /// Whether the driver encodes tensor maps, by which Hopper's copies find their tiles.
    pub has_tensor_maps: bool,
}

/// A device that is open. Kernels, fills and copies happen one after the other, in the order of calls; a copy to the host
/// has arrived when the call returns, and the source of a copy from the host may be overwritten then. Whoever reads back
/// waits first, by [`wait`], which knows when to stop.
pub trait Driver: Stream + Send + Sync {
    /// What it is.
    fn info(&self) -> &DeviceInfo;
    /// Bytes of its memory that are free now, whoever has the rest.
    fn free_memory_bytes(&self) -> Result<u64>;
    /// Whether all that was enqueued has run. Does not wait.
    fn is_idle(&self) -> Result<bool>;
    /// Longest time that what was enqueued may take.
    fn max_wait(&self) -> Duration {
        MAX_WAIT
    }
    /// The device is given up: from now on nothing is asked of it that would wait for it. Its memory is lost to this process.
    fn abandon(&self);
    /// Memory, aligned to 256 bytes; what it holds is anything.
    /// [`Error::OutOfMemory`](crate::error::Error::OutOfMemory) names `purpose`.
    fn allocate(&self, purpose: &'static str, num_bytes: usize) -> Result<u64>;
    /// Gives memory back, once the kernels that use it have run. There is nobody to tell an error to.
    ///
    /// # Safety
    /// `address` is from [`allocate`](Self::allocate), and nothing uses it that is enqueued from now on.
    unsafe fn free(&self, address: u64);
    /// Memory of this process that the device reaches by itself (pinned): copies there need no other thread's help, and
    /// are under way together. [`Error::OutOfMemory`] where there is none to be had.
    fn allocate_pinned(&self, num_bytes: usize) -> Result<u64>;
    /// Gives it back.
    ///
    /// # Safety
    /// `address` is from [`allocate_pinned`](Self::allocate_pinned), and no copy to it is under way.
    unsafe fn free_pinned(&self, address: u64);
    /// Starts a copy to pinned memory, at `target`. It has arrived when the device [is idle](Self::is_idle).
    ///
    /// # Safety
    /// As many bytes from `address` on are inside one allocation, from `target` on inside one of pinned memory; nobody
    /// reads these until they have arrived.
    unsafe fn download_pinned(&self, target: u64, address: u64, num_bytes: usize) -> Result<()>;
    /// Starts a copy from pinned memory, which is read when the copy's turn comes.
    ///
    /// # Safety
    /// As many bytes from `source` on are inside one allocation of pinned memory, from `address` on inside one
    /// allocation; nobody writes the source until a mark behind the copy is passed.
    unsafe fn upload_pinned(&self, address: u64, source: u64, num_bytes: usize) -> Result<()>;
    /// A new mark, which can be put behind what was enqueued.
    fn new_mark(&self) -> Result<Mark>;
    /// Gives it back.
    ///
    /// # Safety
    /// The mark is from [`new_mark`](Self::new_mark), and nobody uses it any more.
    unsafe fn free_mark(&self, mark: Mark);
    /// Puts a mark behind all that was enqueued; where it was before is forgotten.
    ///
    /// # Safety
    /// The mark is from [`new_mark`](Self::new_mark).
    unsafe fn put_mark(&self, mark: Mark) -> Result<()>;
    /// Whether all before the mark has run. Does not wait.
    ///
    /// # Safety
    /// The mark is from [`new_mark`](Self::new_mark), and was put.
    unsafe fn is_passed(&self, mark: Mark) -> Result<bool>;
    /// Notes the kernels and fills that `enqueue` enqueues, in place of running them. It may not wait, copy, or ask for
    /// memory. Whatever it does, the device runs again what is enqueued when this returns.
    fn capture(&self, enqueue: &mut dyn FnMut() -> Result<()>) -> Result<Box<dyn Replay>>;
    /// Sets every byte.
    ///
    /// # Safety
    /// The bytes are inside one allocation.
    unsafe fn fill(&self, address: u64, byte: u8, num_bytes: usize) -> Result<()>;
    /// Copies to the device.
    ///
    /// # Safety
    /// As many bytes from `address` on are inside one allocation.
    unsafe fn upload(&self, address: u64, source: &[u8]) -> Result<()>;
    /// Copies from the device.
    ///
    /// # Safety
    /// As many bytes from `address` on are inside one allocation.
    unsafe fn download(&self, target: &mut [u8], address: u64) -> Result<()>;
}

/// A place among what was enqueued (an event, as CUDA says).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mark(pub u64);

/// Kernels that were captured: they run as one.
pub trait Replay: Send {
    /// Enqueues all of them, with the arguments that they had.
    ///
    /// # Safety
    /// Every buffer that they were launched with is still there, and lent to nobody else.
    unsafe fn launch(&mut self) -> Result<()>;
}

/// Waits until all that was enqueued has run. [`Error::DeviceLost`] when that takes longer than [`Driver::max_wait`]; the
/// device is then given up.
pub fn wait(driver: &dyn Driver) -> Result<()> {
    wait_until(driver, "cuStreamQuery", || driver.is_idle())
}

/// The same for what lies before the mark.
///
/// # Safety
/// As [`Driver::is_passed`] wants it.
pub unsafe fn wait_for(driver: &dyn Driver, mark: Mark) -> Result<()> {
    // SAFETY: promised by the caller.
    wait_until(driver, "cuEventQuery", || unsafe { driver.is_passed(mark) })
}

fn wait_until(driver: &dyn Driver, call: &'static str, has_run: impl Fn() -> Result<bool>) -> Result<()> {
    let start = Instant::now();
    while !has_run()? {
        let waited = start.elapsed();
        if waited > driver.max_wait() {
            driver.abandon();
            let reason = format!("what was enqueued has not ended after {} ms", waited.as_millis());
            return Err(Error::DeviceLost { call, reason });
        }
        if waited < BUSY_WAIT { std::thread::yield_now() } else { std::thread::sleep(LOOK_INTERVAL) }
    }
    Ok(())
}
