//! Copies that nobody waits for at once: what a step reads goes to the device, and what it found comes back, while the
//! host prepares the next. A transfer has pinned memory for both directions and a mark behind what it started; whoever
//! wants its result waits for the mark alone, so that a step behind it may be under way already.

use std::sync::Arc;

use super::driver::{Mark, wait, wait_for};
use super::memory::{Buffer, Memory};
use crate::error::Result;

/// The copies of one step.
pub struct Transfer {
    memory: Arc<Memory>,
    mark: Mark,
    /// Pinned memory: what goes to the device, then what comes back.
    address: u64,
    outward_len: usize,
    homeward_len: usize,
    /// Numbers that are on their way back. The mark lies behind them.
    expected: Option<usize>,
    /// Copies were started, and no mark lies behind them yet.
    is_unmarked: bool,
}

impl Transfer {
    /// For up to `outward_len` numbers to the device and `homeward_len` back.
    pub fn new(memory: &Arc<Memory>, outward_len: usize, homeward_len: usize) -> Result<Transfer> {
        let driver = memory.driver();
        let mark = driver.new_mark()?;
        let num_bytes = (outward_len + homeward_len).max(1) * size_of::<u32>();
        let address = driver.allocate_pinned(num_bytes).inspect_err(|_| {
            // SAFETY: nobody has the mark.
            unsafe { driver.free_mark(mark) }
        })?;
        let memory = memory.clone();
        Ok(Transfer { memory, mark, address, outward_len, homeward_len, expected: None, is_unmarked: false })
    }

    /// Most numbers that go to the device at once.
    pub fn outward_len(&self) -> usize {
        self.outward_len
    }

    /// Starts copying `values` to the beginning of `buffer`, behind what was enqueued before. Panics when they do not
    /// fit, and unless the last step's were taken.
    pub fn send(&mut self, values: &[u32], buffer: &mut Buffer<u32>) -> Result<()> {
        assert!(self.expected.is_none() && !self.is_unmarked, "the last step's numbers were never taken");
        assert!(values.len() <= self.outward_len && values.len() <= buffer.len(), "{} numbers", values.len());
        self.is_unmarked = true;
        // SAFETY: the memory is this transfer's, as long as that; nothing reads it, because what was sent before has been
        // waited for. The copy reads it before the mark, and it is not written again until that is passed.
        unsafe {
            (self.address as *mut u8).copy_from_nonoverlapping(values.as_ptr().cast(), size_of_val(values));
            self.memory.driver().upload_pinned(buffer.address(), self.address, size_of_val(values))
        }
    }

    /// Starts copying the first `len` numbers of `buffer` back, behind what was enqueued before. Panics when they do not fit.
    pub fn fetch(&mut self, buffer: &Buffer<u32>, len: usize) -> Result<()> {
        assert!(self.expected.is_none(), "the last step's numbers were never taken");
        assert!(len <= self.homeward_len && len <= buffer.len(), "{len} numbers");
        self.is_unmarked = true;
        // SAFETY: both ranges were checked; nobody reads what arrives before the mark is passed.
        unsafe {
            self.memory.driver().download_pinned(self.homeward(), buffer.address(), len * size_of::<u32>())?;
            self.memory.driver().put_mark(self.mark)?;
        }
        (self.expected, self.is_unmarked) = (Some(len), false);
        Ok(())
    }

    /// Waits until what [`Transfer::fetch`] started has arrived, and gives it. Panics when nothing was started.
    pub fn take(&mut self) -> Result<Vec<u32>> {
        let len = self.expected.expect("something is on its way");
        // SAFETY: the mark is this transfer's, and lies behind the copy.
        unsafe { wait_for(&**self.memory.driver(), self.mark) }?;
        self.expected = None;
        let mut numbers = vec![0_u32; len];
        // SAFETY: as many numbers have arrived there.
        unsafe {
            (self.homeward() as *const u8).copy_to_nonoverlapping(numbers.as_mut_ptr().cast(), size_of_val(&*numbers))
        };
        Ok(numbers)
    }

    /// Forgets a step that was begun and will not be fetched, once what was enqueued of it has run.
    pub fn abandon(&mut self) -> Result<()> {
        wait(&**self.memory.driver())?;
        (self.expected, self.is_unmarked) = (None, false);
        Ok(())
    }

    /// Where what comes back arrives.
    fn homeward(&self) -> u64 {
        self.address + (self.outward_len * size_of::<u32>()) as u64
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        let driver = self.memory.driver();
        if self.expected.is_some() || self.is_unmarked {
            // Nothing may arrive in memory that is somebody else's by then. A device that is lost brings nothing any
            // more, and one that was given up keeps what is its own.
            let _ = wait(&**driver);
        }
        // SAFETY: both are freed once, and no copy is under way.
        unsafe {
            driver.free_pinned(self.address);
            driver.free_mark(self.mark);
        }
    }
}
