//! Numbers in a device's memory: allocated, filled, read back, and lent to kernels.

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::sys::CUresult;
use cudarc::driver::{result, sys};

use super::device::{Device, failed};
use super::launch::{Slice, SliceMut};
use crate::error::{Error, Result};
use crate::host::Plain;

/// An array that a device owns. Dropping it waits for the kernels that may still use it.
pub struct Buffer<T> {
    device: Arc<Device>,
    address: sys::CUdeviceptr,
    len: usize,
    numbers: PhantomData<T>,
}

impl<T: Plain> Buffer<T> {
    /// `len` zeros; `purpose` is named when there is no room.
    pub fn zeroed(device: &Arc<Device>, purpose: &'static str, len: usize) -> Result<Buffer<T>> {
        let buffer = Buffer::allocate(device, purpose, len)?;
        // SAFETY: the range is the allocation; the stream orders it before all kernels.
        unsafe { result::memset_d8_async(buffer.address, 0, buffer.size_bytes(), device.stream()) }
            .map_err(failed("cuMemsetD8Async"))?;
        Ok(buffer)
    }

    /// These numbers.
    pub fn from_slice(device: &Arc<Device>, purpose: &'static str, values: &[T]) -> Result<Buffer<T>> {
        let mut buffer = Buffer::allocate(device, purpose, values.len())?;
        buffer.write(values)?;
        Ok(buffer)
    }

    fn allocate(device: &Arc<Device>, purpose: &'static str, len: usize) -> Result<Buffer<T>> {
        let out_of_memory =
            |needed_bytes, available_bytes| Error::OutOfMemory { purpose, needed_bytes, available_bytes };
        let bytes = len.checked_mul(size_of::<T>());
        let bytes = bytes.ok_or_else(|| out_of_memory(u64::MAX, device.info().memory_bytes))?;
        device.enter()?;
        // SAFETY: the context is current. No byte at all is nothing that the driver allocates.
        let address = unsafe { result::malloc_sync(bytes.max(1)) }.map_err(|error| match error.0 {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                out_of_memory(bytes as u64, result::mem_get_info().map_or(0, |(free, _)| free as u64))
            }
            _ => failed("cuMemAlloc")(error),
        })?;
        Ok(Buffer { device: device.clone(), address, len, numbers: PhantomData })
    }

    /// How many numbers.
    #[allow(clippy::len_without_is_empty, reason = "sizes are compared, emptiness is never asked")]
    pub fn len(&self) -> usize {
        self.len
    }

    fn size_bytes(&self) -> usize {
        self.len * size_of::<T>()
    }

    /// Overwrites all numbers, behind the kernels that were launched before. Panics unless there are as many.
    pub fn write(&mut self, values: &[T]) -> Result<()> {
        assert_eq!(values.len(), self.len, "numbers for a buffer");
        self.device.enter()?;
        // SAFETY: both ranges are as long; the copy has ended when `synchronize` returns, and `values` are borrowed until then.
        unsafe { result::memcpy_htod_async(self.address, values, self.device.stream()) }
            .map_err(failed("cuMemcpyHtoDAsync"))?;
        self.device.synchronize()
    }

    /// Waits for the kernels that were launched before, and reads all numbers into `out`. Panics unless it is as long.
    pub fn read_into(&self, out: &mut [T]) -> Result<()> {
        assert_eq!(out.len(), self.len, "numbers of a buffer");
        self.device.enter()?;
        // SAFETY: as in `write`; every bit pattern is a number.
        unsafe { result::memcpy_dtoh_async(out, self.address, self.device.stream()) }
            .map_err(failed("cuMemcpyDtoHAsync"))?;
        self.device.synchronize()
    }

    /// For kernels that read. Panics when the range is not inside.
    pub fn slice(&self, range: Range<usize>) -> Slice<'_, T> {
        let address = self.address_of(&range);
        // SAFETY: dropping the buffer waits for kernels that were launched with the slice; the borrow keeps it from being
        // dropped before they are launched, and from being written meanwhile. It was filled when it was made.
        unsafe { Slice::from_raw(address, range.len()) }
    }

    /// For kernels that write. Panics when the range is not inside.
    pub fn slice_mut(&mut self, range: Range<usize>) -> SliceMut<'_, T> {
        let address = self.address_of(&range);
        // SAFETY: as in `slice`; the borrow is exclusive, and kernels of one stream run one after the other.
        unsafe { SliceMut::from_raw(address, range.len()) }
    }

    fn address_of(&self, range: &Range<usize>) -> u64 {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {} numbers", self.len);
        self.address + (range.start * size_of::<T>()) as u64
    }
}

impl<T> Drop for Buffer<T> {
    fn drop(&mut self) {
        if self.device.enter().is_ok() {
            // SAFETY: allocated once, freed once; the driver waits for kernels that use it. There is nobody to tell an error to.
            let _ = unsafe { result::free_sync(self.address) };
        }
    }
}
