//! What a backend asks of a device beside running kernels: what it is, and its memory. The CUDA driver is one
//! ([`device`](super::device), with the feature `cuda`); the tests' CPU shim is another. So the code above runs on a GPU, on a CPU that
//! plays one, and on a driver that fails on purpose.

use super::launch::Stream;
use crate::error::Result;

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
}

/// A device that is open. Kernels, fills and copies happen one after the other, in the order of calls; a copy to the host has
/// arrived when the call returns, and the source of a copy from the host may be overwritten then.
pub trait Driver: Stream + Send + Sync {
    /// What it is.
    fn info(&self) -> &DeviceInfo;
    /// Bytes of its memory that are free now, whoever has the rest.
    fn free_memory_bytes(&self) -> Result<u64>;
    /// Memory, aligned to 256 bytes; what it holds is anything.
    /// [`Error::OutOfMemory`](crate::error::Error::OutOfMemory) names `purpose`.
    fn allocate(&self, purpose: &'static str, num_bytes: usize) -> Result<u64>;
    /// Gives memory back, once the kernels that use it have run. There is nobody to tell an error to.
    ///
    /// # Safety
    /// `address` is from [`allocate`](Self::allocate), and nothing uses it that is enqueued from now on.
    unsafe fn free(&self, address: u64);
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
