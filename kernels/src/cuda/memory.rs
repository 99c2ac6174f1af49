//! A device's memory: what lasts (weights, KV blocks) is taken from the driver and given back to it; what a step needs is
//! kept for the next step, because asking a driver for memory waits for the device.
//!
//! That memory is used again at once when its buffer is dropped: whatever is enqueued later runs later. Steps that are
//! captured have memory of their own, which nobody else gets, because what was captured goes on using it.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::driver::{Driver, Replay, wait};
use super::launch::{Slice, SliceMut};
use crate::error::{Error, Result};
use crate::host::Plain;

/// Sizes are rounded up to a multiple of this, and above to an eighth of their power of two, so that steps of nearly the same
/// size share buffers.
const MIN_SCRATCH_BYTES: usize = 4_096;
/// Pinned memory at least, so that several pieces are under way together. A larger piece gets as much as it is.
const MIN_STAGING_BYTES: usize = 16 << 20;
/// What memory holds before it is written, in builds with assertions: NaN as a number, no valid index.
const POISON: u8 = 0xff;

/// The memory of one device.
pub struct Memory {
    driver: Arc<dyn Driver>,
    /// Addresses that nobody uses.
    idle: Mutex<Idle>,
    /// Where pieces arrive that are read back several at a time; made for the first of them.
    staging: Mutex<Option<Staging>>,
}

/// Memory of steps that lies idle, by size.
#[derive(Default)]
struct Idle {
    of_steps: BTreeMap<usize, Vec<u64>>,
    of_captured: BTreeMap<usize, Vec<u64>>,
    /// Whether the step at hand is one that is captured, or is about to be.
    is_captured: bool,
    /// Captured steps that there are.
    num_captured: usize,
    /// Lasting memory that was dropped while there were some: they may use it.
    dropped: Vec<u64>,
}

/// What becomes of a buffer's memory when it is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kept {
    /// It is given back to the driver.
    Lasting,
    /// So many bytes lie idle for the next step.
    ForSteps(usize),
    /// For those that are captured.
    ForCaptured(usize),
}

/// A step that was captured. While there is one, no memory of the device is given back that it may use.
pub struct CapturedStep {
    memory: Arc<Memory>,
    replay: Box<dyn Replay>,
}

/// While it lives, scratch comes from the memory of captured steps.
pub struct CapturedScratch<'a> {
    memory: &'a Memory,
}

/// Pinned memory.
#[derive(Debug, Clone, Copy)]
struct Staging {
    address: u64,
    num_bytes: usize,
}

/// An array in a device's memory.
pub struct Buffer<T> {
    memory: Arc<Memory>,
    address: u64,
    len: usize,
    kept: Kept,
    numbers: std::marker::PhantomData<T>,
}

impl Memory {
    /// The memory of this device.
    pub fn new(driver: Arc<dyn Driver>) -> Arc<Memory> {
        Arc::new(Memory { driver, idle: Mutex::default(), staging: Mutex::default() })
    }

    /// Whose memory it is.
    pub fn driver(&self) -> &Arc<dyn Driver> {
        &self.driver
    }

    /// `len` zeros that last; `purpose` is named when there is no room.
    pub fn zeroed<T: Plain>(self: &Arc<Self>, purpose: &'static str, len: usize) -> Result<Buffer<T>> {
        let buffer = self.lasting(purpose, len)?;
        if len > 0 {
            // SAFETY: the bytes are the buffer's.
            unsafe { self.driver.fill(buffer.address, 0, buffer.size_bytes()) }?;
        }
        Ok(buffer)
    }

    /// Numbers that last, one slice behind the other.
    pub fn filled<T: Plain>(self: &Arc<Self>, purpose: &'static str, parts: &[&[T]]) -> Result<Buffer<T>> {
        let mut buffer = self.lasting(purpose, parts.iter().map(|part| part.len()).sum())?;
        let mut start = 0;
        for part in parts {
            buffer.upload(start, part)?;
            start += part.len();
        }
        Ok(buffer)
    }

    /// Room for `len` numbers during a step. They hold anything, in builds with assertions poison.
    pub fn scratch<T: Plain>(self: &Arc<Self>, purpose: &'static str, len: usize) -> Result<Buffer<T>> {
        let num_bytes = scratch_size(self.size_of::<T>(purpose, len)?);
        let (kept, address) = match self.take_idle(num_bytes) {
            (kept, Some(address)) => (kept, address),
            (kept, None) => (kept, self.allocate(purpose, num_bytes)?),
        };
        let (Kept::ForSteps(num_bytes) | Kept::ForCaptured(num_bytes)) = kept else { unreachable!("scratch is kept") };
        let buffer = Buffer { memory: self.clone(), address, len, kept, numbers: std::marker::PhantomData };
        if cfg!(debug_assertions) {
            // SAFETY: the bytes are the buffer's.
            unsafe { self.driver.fill(address, POISON, num_bytes) }?;
        }
        Ok(buffer)
    }

    fn lasting<T: Plain>(self: &Arc<Self>, purpose: &'static str, len: usize) -> Result<Buffer<T>> {
        // No byte at all is nothing that a driver allocates.
        let address = self.allocate(purpose, self.size_of::<T>(purpose, len)?.max(1))?;
        Ok(Buffer { memory: self.clone(), address, len, kept: Kept::Lasting, numbers: std::marker::PhantomData })
    }

    fn size_of<T>(&self, purpose: &'static str, len: usize) -> Result<usize> {
        len.checked_mul(size_of::<T>()).ok_or(Error::OutOfMemory {
            purpose,
            needed_bytes: u64::MAX,
            available_bytes: self.driver.info().memory_bytes,
        })
    }

    /// From the driver; when it has no more, what lies idle here is given back to it first.
    fn allocate(&self, purpose: &'static str, num_bytes: usize) -> Result<u64> {
        match self.driver.allocate(purpose, num_bytes) {
            Err(Error::OutOfMemory { .. }) if self.give_back_idle() => self.driver.allocate(purpose, num_bytes),
            allocated => allocated,
        }
    }

    /// From now on, until the guard is dropped, scratch is that of captured steps. A step that asks for the same sizes in
    /// the same order as one before it then gets all of them without asking the driver, whatever ran in between.
    pub fn captured_scratch(&self) -> CapturedScratch<'_> {
        self.lock_idle().is_captured = true;
        CapturedScratch { memory: self }
    }

    /// Notes what `enqueue` launches, as [`Driver::capture`] does, with the scratch of captured steps.
    pub fn capture(self: &Arc<Self>, enqueue: &mut dyn FnMut() -> Result<()>) -> Result<CapturedStep> {
        let _scratch = self.captured_scratch();
        let replay = self.driver.capture(enqueue)?;
        self.lock_idle().num_captured += 1;
        Ok(CapturedStep { memory: self.clone(), replay })
    }

    /// Gives the scratch of captured steps back. Panics while there are some.
    pub fn forget_captured(&self) {
        let mut idle = self.lock_idle();
        assert_eq!(idle.num_captured, 0, "captured steps would go on using it");
        let of_captured = std::mem::take(&mut idle.of_captured);
        drop(idle);
        self.free_all(&of_captured);
    }

    fn lock_idle(&self) -> MutexGuard<'_, Idle> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Of a plain step the smallest that is large enough, however large: a step of few tokens runs in the memory of one
    /// of many. Of a captured one exactly this size: what another step left there is then no reason to find something
    /// smaller, and in the end nothing.
    fn take_idle(&self, num_bytes: usize) -> (Kept, Option<u64>) {
        let mut idle = self.lock_idle();
        let is_captured = idle.is_captured;
        let pool = if is_captured { &mut idle.of_captured } else { &mut idle.of_steps };
        let largest = if is_captured { num_bytes } else { usize::MAX };
        let kept = if is_captured { Kept::ForCaptured } else { Kept::ForSteps };
        let Some((&size, addresses)) = pool.range_mut(num_bytes..=largest).next() else {
            return (kept(num_bytes), None);
        };
        let address = addresses.pop();
        if addresses.is_empty() {
            pool.remove(&size);
        }
        (kept(size), address)
    }

    /// Pinned memory for pieces of this size; `None` where there is none to be had.
    fn staging_for(&self, staging: &mut Option<Staging>, piece_bytes: usize) -> Option<Staging> {
        if let Some(too_small) = staging.take_if(|staging| staging.num_bytes < piece_bytes) {
            // SAFETY: it is forgotten, and every copy to it has arrived when the lock is given back.
            unsafe { self.driver.free_pinned(too_small.address) };
        }
        if staging.is_none() {
            let num_bytes = piece_bytes.max(MIN_STAGING_BYTES);
            *staging = self.driver.allocate_pinned(num_bytes).ok().map(|address| Staging { address, num_bytes });
        }
        *staging
    }

    /// Whether there was anything. Captured steps keep their own.
    fn give_back_idle(&self) -> bool {
        let of_steps = std::mem::take(&mut self.lock_idle().of_steps);
        self.free_all(&of_steps);
        !of_steps.is_empty()
    }

    fn free_all(&self, idle: &BTreeMap<usize, Vec<u64>>) {
        for &address in idle.values().flatten() {
            // SAFETY: idle memory is an allocation that no buffer has.
            unsafe { self.driver.free(address) };
        }
    }
}

impl CapturedStep {
    /// Enqueues all of it, on the memory with which it was captured.
    pub fn launch(&mut self) -> Result<()> {
        // SAFETY: what it uses is kept by `Memory`: scratch until `forget_captured`, which is not called while this
        // exists, lasting memory until the last captured step is dropped. Kernels of one stream run one after the other.
        unsafe { self.replay.launch() }
    }
}

impl Drop for CapturedStep {
    fn drop(&mut self) {
        let mut idle = self.memory.lock_idle();
        idle.num_captured -= 1;
        let dropped = if idle.num_captured == 0 { std::mem::take(&mut idle.dropped) } else { Vec::new() };
        drop(idle);
        for address in dropped {
            // SAFETY: its buffer was dropped, and no captured step is left to use it. A driver frees behind what still runs.
            unsafe { self.memory.driver.free(address) };
        }
    }
}

impl Drop for CapturedScratch<'_> {
    fn drop(&mut self) {
        self.memory.lock_idle().is_captured = false;
    }
}

/// The size that is really taken for a buffer of a step.
pub fn scratch_size(num_bytes: usize) -> usize {
    let step = (num_bytes.max(1).next_power_of_two() / 8).max(MIN_SCRATCH_BYTES);
    num_bytes.max(1).div_ceil(step) * step
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.give_back_idle();
        self.forget_captured();
        let staging = self.staging.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(Staging { address, .. }) = staging {
            // SAFETY: it is freed once; who reads pieces back has waited for them, or has given the device up.
            unsafe { self.driver.free_pinned(address) };
        }
    }
}

impl<T: Plain> Buffer<T> {
    /// How many numbers.
    #[allow(clippy::len_without_is_empty, reason = "sizes are compared, emptiness is never asked")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Bytes of these.
    pub fn size_bytes(&self) -> usize {
        self.len * size_of::<T>()
    }

    /// Overwrites numbers from `start` on, behind the kernels that were launched before. Panics unless they are inside.
    pub fn upload(&mut self, start: usize, values: &[T]) -> Result<()> {
        if values.is_empty() {
            return Ok(());
        }
        let address = self.address_of(&(start..start + values.len()));
        // SAFETY: a plain type has no padding, so all bytes are initialized.
        let bytes = unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) };
        // SAFETY: the range was checked to be inside.
        unsafe { self.memory.driver.upload(address, bytes) }
    }

    /// Waits for the kernels that were launched before, and reads numbers from `start` on. Panics unless they are inside.
    pub fn download(&self, start: usize, out: &mut [T]) -> Result<()> {
        if out.is_empty() {
            return Ok(());
        }
        let address = self.address_of(&(start..start + out.len()));
        // SAFETY: every bit pattern of a plain type is a value.
        let bytes = unsafe { std::slice::from_raw_parts_mut(out.as_mut_ptr().cast(), size_of_val(out)) };
        wait(&*self.memory.driver)?;
        // SAFETY: the range was checked to be inside.
        unsafe { self.memory.driver.download(bytes, address) }
    }

    /// Overwrites bytes from `start_byte` on. Panics unless they are inside.
    pub fn upload_bytes(&mut self, start_byte: usize, bytes: &[u8]) -> Result<()> {
        assert!(start_byte + bytes.len() <= self.size_bytes(), "{} bytes at {start_byte}", bytes.len());
        // SAFETY: the range was checked to be inside; every bit pattern of a plain type is a value.
        unsafe { self.memory.driver.upload(self.address + start_byte as u64, bytes) }
    }

    /// Waits for the kernels that were launched before, and reads bytes from `start_byte` on. Panics unless they are inside.
    pub fn download_bytes(&self, start_byte: usize, out: &mut [u8]) -> Result<()> {
        assert!(start_byte + out.len() <= self.size_bytes(), "{} bytes at {start_byte}", out.len());
        wait(&*self.memory.driver)?;
        // SAFETY: the range was checked to be inside.
        unsafe { self.memory.driver.download(out, self.address + start_byte as u64) }
    }

    /// Waits for the kernels that were launched before, and reads pieces of `piece_bytes` bytes that begin at these
    /// bytes: as many as there is pinned memory for are under way together. Panics unless they are inside.
    pub fn download_pieces(&self, starts: &[usize], piece_bytes: usize) -> Result<Vec<Arc<[u8]>>> {
        let mut staging = self.memory.staging.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(staging) = self.memory.staging_for(&mut staging, piece_bytes) else {
            let read = |&start: &usize| {
                let mut bytes = vec![0; piece_bytes];
                self.download_bytes(start, &mut bytes)?;
                Ok(bytes.into())
            };
            return starts.iter().map(read).collect();
        };
        let mut pieces: Vec<Arc<[u8]>> = Vec::with_capacity(starts.len());
        for round in starts.chunks((staging.num_bytes / piece_bytes.max(1)).max(1)) {
            let started = round.iter().enumerate().try_for_each(|(i, &start)| {
                assert!(start + piece_bytes <= self.size_bytes(), "{piece_bytes} bytes at {start}");
                let (target, address) = (staging.address + (i * piece_bytes) as u64, self.address + start as u64);
                // SAFETY: both ranges were checked; the lock keeps others from the pinned memory, which is read behind
                // the wait alone.
                unsafe { self.memory.driver.download_pinned(target, address, piece_bytes) }
            });
            // In any case: what was started arrives in memory that the next round uses.
            wait(&*self.memory.driver)?;
            started?;
            for i in 0..round.len() {
                let start = (staging.address as usize + i * piece_bytes) as *const u8;
                // SAFETY: as many bytes have arrived there, and the lock keeps them until they are copied.
                pieces.push(unsafe { std::slice::from_raw_parts(start, piece_bytes) }.into());
            }
        }
        Ok(pieces)
    }

    /// For kernels that read. Panics when the range is not inside.
    pub fn slice(&self, range: Range<usize>) -> Slice<'_, T> {
        let address = self.address_of(&range);
        // SAFETY: memory of a buffer that is dropped is freed, or used again, behind the kernels that were launched with the
        // slice; the borrow keeps it from being written from the host meanwhile.
        unsafe { Slice::from_raw(address, range.len()) }
    }

    /// For kernels that read all of it.
    pub fn all(&self) -> Slice<'_, T> {
        self.slice(0..self.len)
    }

    /// `len` numbers of another type, from number `start` on, for kernels that read. Panics when they are not inside, or not aligned.
    pub fn view<U: Plain>(&self, start: usize, len: usize) -> Slice<'_, U> {
        let end = start * size_of::<T>() + len * size_of::<U>();
        assert!(end <= self.size_bytes(), "{len} numbers from {start} on, of {} bytes", self.size_bytes());
        let address = self.address + (start * size_of::<T>()) as u64;
        assert!(address.is_multiple_of(align_of::<U>() as u64), "number {start} is not aligned");
        // SAFETY: as in `slice`; every bit pattern of a plain type is a value.
        unsafe { Slice::from_raw(address, len) }
    }

    /// All of it as bytes, for kernels that are told the type.
    pub fn bytes(&self) -> Slice<'_, u8> {
        // SAFETY: as in `slice`; the bytes are the numbers'.
        unsafe { Slice::from_raw(self.address, self.size_bytes()) }
    }

    /// For kernels that write. Panics when the range is not inside.
    pub fn slice_mut(&mut self, range: Range<usize>) -> SliceMut<'_, T> {
        let address = self.address_of(&range);
        // SAFETY: as in `slice`; the borrow is exclusive, and kernels of one stream run one after the other.
        unsafe { SliceMut::from_raw(address, range.len()) }
    }

    /// For kernels that write all of it.
    pub fn all_mut(&mut self) -> SliceMut<'_, T> {
        self.slice_mut(0..self.len)
    }

    /// All of it as bytes, for kernels that are told the type.
    pub fn bytes_mut(&mut self) -> SliceMut<'_, u8> {
        // SAFETY: as in `slice_mut`; the bytes are the numbers'.
        unsafe { SliceMut::from_raw(self.address, self.size_bytes()) }
    }

    /// Where it begins, for copies that are under way together ([`transfer`](super::transfer)).
    pub(super) fn address(&self) -> u64 {
        self.address
    }

    fn address_of(&self, range: &Range<usize>) -> u64 {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {} numbers", self.len);
        self.address + (range.start * size_of::<T>()) as u64
    }
}

impl<T> Drop for Buffer<T> {
    fn drop(&mut self) {
        let mut idle = self.memory.lock_idle();
        let (pool, num_bytes) = match self.kept {
            Kept::ForSteps(num_bytes) => (&mut idle.of_steps, num_bytes),
            Kept::ForCaptured(num_bytes) => (&mut idle.of_captured, num_bytes),
            Kept::Lasting if idle.num_captured > 0 => return idle.dropped.push(self.address),
            Kept::Lasting => {
                drop(idle);
                // SAFETY: allocated for this buffer, and freed once.
                return unsafe { self.memory.driver.free(self.address) };
            }
        };
        pool.entry(num_bytes).or_default().push(self.address);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sizes grow with what is asked, by an eighth at most where they are large, and near sizes are one.
    #[test]
    fn scratch_sizes_are_few() {
        assert_eq!(scratch_size(0), MIN_SCRATCH_BYTES);
        assert_eq!(scratch_size(4_096), 4_096);
        for num_bytes in (100_000..10_000_000).step_by(77_777) {
            let size = scratch_size(num_bytes);
            assert!(size >= num_bytes && size <= num_bytes + num_bytes / 4, "{num_bytes}: {size}");
        }
        let sizes: std::collections::BTreeSet<_> = (1 << 20..1 << 21).step_by(1000).map(scratch_size).collect();
        assert!(sizes.len() <= 9, "{sizes:?}");
    }
}
