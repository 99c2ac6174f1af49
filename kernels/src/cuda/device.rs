//! A CUDA device that is open: its context, its kernels, and the one stream on which they run. The driver's library is loaded
//! when the first device is asked for; where there is none, or an old one, that is a typed error.
//!
//! A device whose kernels do not end is given up: nothing is asked of it any more that would wait for it, its memory and
//! its context stay as they are until the process ends, and it cannot be opened again.
//!
//! Threads: a device may be used from any thread. Each call makes the device's context current on its thread first, because
//! the driver keeps that per thread.

use std::collections::BTreeSet;
use std::ffi::{OsString, c_void};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

use super::driver::{DeviceInfo, Driver, Mark, Replay};
use super::driver_error::{describe, failed, is_lost};
use super::graph::Graph;
use super::launch::{Argument, Launch, Stream, Tiles};
use super::module::{HAS_CODE_FOR_HOPPER, Modules};
use crate::error::{Error, Result};

/// The driver that the embedded kernels need, as the driver counts: 13.0, which came with 580.
const NEEDED_DRIVER: i32 = 13_000;
/// Oldest compute capability that kernels are compiled for: `cp.async` and bf16 on tensor cores came with it.
const NEEDED_CAPABILITY: (i32, i32) = (8, 0);

/// Environment variable that lets kernels be launched before those in front of them have run, when it says "on". Whether
/// that pays has not been measured.
pub const PROGRAMMATIC_LAUNCH_VARIABLE: &str = "NS_LLM_CUDA_PROGRAMMATIC_LAUNCH";
/// The compute capability from which devices can do that.
const PROGRAMMATIC_CAPABILITY: (i32, i32) = (9, 0);

/// Numbers of the devices that were given up.
static ABANDONED: Mutex<BTreeSet<usize>> = Mutex::new(BTreeSet::new());

fn abandoned() -> MutexGuard<'static, BTreeSet<usize>> {
    ABANDONED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An open device.
pub struct Device {
    ordinal: usize,
    handle: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    modules: Option<Modules>,
    info: DeviceInfo,
    /// Whether kernels are launched before those in front of them have run (programmatic dependent launch): they wait
    /// themselves, by `wait_for_kernels_before` in `kernels/cuda/ptx.cuh`.
    launches_early: bool,
    /// Itself: what was captured keeps its device.
    this: Weak<Device>,
}

// SAFETY: the driver's handles may be used from any thread once the context is current there, which `enter` sees to;
// `Modules` has a lock of its own.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

impl Device {
    /// How many devices there are. Refuses without a driver, and with one that is too old.
    pub fn count() -> Result<usize> {
        // SAFETY: looks for the library and calls nothing in it. Without this question the next call would panic.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::NoCudaDriver);
        }
        let mut version = 0;
        // SAFETY: the library is there, and every driver has the function; it needs no context and writes one number.
        let status = unsafe { sys::cuDriverGetVersion(&mut version) };
        status.result().map_err(failed("cuDriverGetVersion"))?;
        check_driver(version)?;
        match result::init() {
            Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => return Ok(0),
            initialized => initialized.map_err(failed("cuInit"))?,
        }
        let count = result::device::get_count().map_err(failed("cuDeviceGetCount"))?;
        Ok(usize::try_from(count).unwrap_or(0))
    }

    /// Opens device `ordinal` and loads its kernels.
    pub fn open(ordinal: usize) -> Result<Arc<Device>> {
        let count = Device::count()?;
        if ordinal >= count {
            return Err(Error::NoCudaDevice { ordinal, count });
        }
        // The process has one context of each device, and what hangs in it hangs for everybody.
        if abandoned().contains(&ordinal) {
            let reason = format!("device {ordinal} was given up in this process, because its kernels did not end");
            return Err(Error::DeviceLost { call: "cuDevicePrimaryCtxRetain", reason });
        }
        let handle = result::device::get(ordinal as i32).map_err(failed("cuDeviceGet"))?;
        let info = device_info(handle)?;
        check_capability(&info)?;
        // SAFETY: the handle is that of a device.
        let context = unsafe { result::primary_ctx::retain(handle) }.map_err(failed("cuDevicePrimaryCtxRetain"))?;
        // From here on `drop` gives back what there is.
        let stream = std::ptr::null_mut();
        let launches_early =
            HAS_CODE_FOR_HOPPER && launches_early(&info, std::env::var_os(PROGRAMMATIC_LAUNCH_VARIABLE));
        let mut device =
            Device { ordinal, handle, context, stream, modules: None, info, launches_early, this: Weak::new() };
        device.enter()?;
        let kind = result::stream::StreamKind::NonBlocking;
        device.stream = result::stream::create(kind).map_err(failed("cuStreamCreate"))?;
        device.modules = Some(Modules::load(&device.info)?);
        Ok(Arc::new_cyclic(|this| {
            device.this = this.clone();
            device
        }))
    }

    /// Waits until all that was enqueued has run.
    pub fn synchronize(&self) -> Result<()> {
        self.enter()?;
        // SAFETY: the stream lives as long as the device.
        unsafe { result::stream::synchronize(self.stream) }.map_err(failed("cuStreamSynchronize"))
    }

    /// Makes the context current on this thread.
    pub(super) fn enter(&self) -> Result<()> {
        // SAFETY: the context is retained until the device is dropped.
        unsafe { result::ctx::set_current(self.context) }.map_err(failed("cuCtxSetCurrent"))
    }

    pub(super) fn stream(&self) -> sys::CUstream {
        self.stream
    }

    /// Whether nothing may wait for it any more.
    pub(super) fn is_abandoned(&self) -> bool {
        abandoned().contains(&self.ordinal)
    }
}

impl Stream for Device {
    fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        self.enter()?;
        let modules = self.modules.as_ref().expect("a device that is open has its kernels");
        let function = modules.function(launch.file, launch.kernel)?;
        let map_of = |argument: &Argument<'_>| match argument {
            Argument::Tiles(tiles) => tensor_map(tiles).map(Some),
            _ => Ok(None),
        };
        let maps = launch.arguments.iter().map(map_of).collect::<Result<Vec<_>>>()?;
        let value_of = |(argument, map): (&Argument<'_>, &Option<sys::CUtensorMap>)| {
            map.as_ref().map_or(argument.value(), |map| (&raw const *map).cast()).cast_mut()
        };
        let mut values: Vec<*mut c_void> = launch.arguments.iter().zip(&maps).map(value_of).collect();
        let mut value = sys::CUlaunchAttributeValue { pad: [0; 64] };
        value.programmaticStreamSerializationAllowed = 1;
        let id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        let mut early = sys::CUlaunchAttribute { id, pad: [0; 4], value };
        let config = sys::CUlaunchConfig {
            gridDimX: launch.grid[0],
            gridDimY: launch.grid[1],
            gridDimZ: launch.grid[2],
            blockDimX: launch.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shared_bytes,
            hStream: self.stream,
            attrs: &mut early,
            numAttrs: u32::from(self.launches_early),
        };
        // SAFETY: the function is one of this context; arguments and attribute are copied before the call returns, and tests run each
        // launcher against its kernel's own parameters. What addresses point to is the promise of the slices they came from, and
        // kernels that are launched early wait themselves.
        let status = unsafe { sys::cuLaunchKernelEx(&config, function, values.as_mut_ptr(), std::ptr::null_mut()) };
        status.result().map_err(|error| match is_lost(error.0) {
            true => Error::DeviceLost { call: launch.kernel, reason: describe(error) },
            false => Error::Launch { kernel: launch.kernel, reason: describe(error) },
        })
    }
}

impl Driver for Device {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn free_memory_bytes(&self) -> Result<u64> {
        self.enter()?;
        let (free, _) = result::mem_get_info().map_err(failed("cuMemGetInfo"))?;
        Ok(free as u64)
    }

    fn is_idle(&self) -> Result<bool> {
        self.enter()?;
        // SAFETY: the stream lives as long as the device.
        match unsafe { sys::cuStreamQuery(self.stream) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            status => status.result().map(|()| true).map_err(failed("cuStreamQuery")),
        }
    }

    fn abandon(&self) {
        abandoned().insert(self.ordinal);
    }

    fn allocate(&self, purpose: &'static str, num_bytes: usize) -> Result<u64> {
        self.enter()?;
        // SAFETY: the context is current.
        unsafe { result::malloc_sync(num_bytes) }.map_err(|error| match error.0 {
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => Error::OutOfMemory {
                purpose,
                needed_bytes: num_bytes as u64,
                available_bytes: result::mem_get_info().map_or(0, |(free, _)| free as u64),
            },
            _ => failed("cuMemAlloc")(error),
        })
    }

    unsafe fn free(&self, address: u64) {
        if !self.is_abandoned() && self.enter().is_ok() {
            // SAFETY: promised by the caller; the driver waits for kernels that use it.
            let _ = unsafe { result::free_sync(address) };
        }
    }

    fn allocate_pinned(&self, num_bytes: usize) -> Result<u64> {
        self.enter()?;
        // SAFETY: the context is current.
        let address = unsafe { result::malloc_host(num_bytes, 0) }.map_err(|error| match error.0 {
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                let (purpose, needed_bytes) = ("pinned memory of the host", num_bytes as u64);
                Error::OutOfMemory { purpose, needed_bytes, available_bytes: 0 }
            }
            _ => failed("cuMemHostAlloc")(error),
        })?;
        Ok(address as u64)
    }

    unsafe fn free_pinned(&self, address: u64) {
        if !self.is_abandoned() && self.enter().is_ok() {
            // SAFETY: promised by the caller.
            let _ = unsafe { result::free_host(address as *mut c_void) };
        }
    }

    unsafe fn download_pinned(&self, target: u64, address: u64, num_bytes: usize) -> Result<()> {
        self.enter()?;
        // SAFETY: promised by the caller; the stream orders the copy behind the kernels.
        let status = unsafe { sys::cuMemcpyDtoHAsync_v2(target as *mut c_void, address, num_bytes, self.stream) };
        status.result().map_err(failed("cuMemcpyDtoHAsync"))
    }

    unsafe fn upload_pinned(&self, address: u64, source: u64, num_bytes: usize) -> Result<()> {
        self.enter()?;
        // SAFETY: promised by the caller; the stream orders the copy.
        let status = unsafe { sys::cuMemcpyHtoDAsync_v2(address, source as *const c_void, num_bytes, self.stream) };
        status.result().map_err(failed("cuMemcpyHtoDAsync"))
    }

    fn new_mark(&self) -> Result<Mark> {
        self.enter()?;
        // Asked, never slept on; and nobody wants to know when it was passed.
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING;
        let event = result::event::create(flags).map_err(failed("cuEventCreate"))?;
        Ok(Mark(event as u64))
    }

    unsafe fn free_mark(&self, mark: Mark) {
        if !self.is_abandoned() && self.enter().is_ok() {
            // SAFETY: promised by the caller.
            let _ = unsafe { result::event::destroy(mark.0 as sys::CUevent) };
        }
    }

    unsafe fn put_mark(&self, mark: Mark) -> Result<()> {
        self.enter()?;
        // SAFETY: promised by the caller; event and stream are of one context.
        unsafe { result::event::record(mark.0 as sys::CUevent, self.stream) }.map_err(failed("cuEventRecord"))
    }

    unsafe fn is_passed(&self, mark: Mark) -> Result<bool> {
        self.enter()?;
        // SAFETY: promised by the caller.
        match unsafe { sys::cuEventQuery(mark.0 as sys::CUevent) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            status => status.result().map(|()| true).map_err(failed("cuEventQuery")),
        }
    }

    fn capture(&self, enqueue: &mut dyn FnMut() -> Result<()>) -> Result<Box<dyn Replay>> {
        let device = self.this.upgrade().expect("an open device is behind a pointer that counts");
        Ok(Box::new(Graph::capture(&device, enqueue)?))
    }

    unsafe fn fill(&self, address: u64, byte: u8, num_bytes: usize) -> Result<()> {
        self.enter()?;
        // SAFETY: promised by the caller; the stream orders it.
        unsafe { result::memset_d8_async(address, byte, num_bytes, self.stream) }.map_err(failed("cuMemsetD8Async"))
    }

    /// The driver copies pageable memory to a place of its own before it returns, so nothing waits here.
    unsafe fn upload(&self, address: u64, source: &[u8]) -> Result<()> {
        self.enter()?;
        // SAFETY: promised by the caller. Vectors and slices are pageable memory, of which the call has made a copy, or which
        // it has read, when it returns ("API synchronization behavior" of the driver's manual).
        unsafe { result::memcpy_htod_async(address, source, self.stream) }.map_err(failed("cuMemcpyHtoDAsync"))
    }

    unsafe fn download(&self, target: &mut [u8], address: u64) -> Result<()> {
        self.enter()?;
        // SAFETY: promised by the caller; the bytes have arrived when `synchronize` returns, and are borrowed until then.
        unsafe { result::memcpy_dtoh_async(target, address, self.stream) }.map_err(failed("cuMemcpyDtoHAsync"))?;
        self.synchronize()
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // A context that cannot be entered any more (the device was lost) has nothing left to give back, and one that
        // hangs gives nothing.
        if self.is_abandoned() || self.enter().is_err() {
            return;
        }
        // SAFETY: this is their owner, and nothing runs on the stream any more once it is synchronized. Errors are those of
        // kernels that ran before, which have been told to who waited for them.
        unsafe {
            if !self.stream.is_null() {
                let _ = result::stream::synchronize(self.stream);
                let _ = result::stream::destroy(self.stream);
            }
            self.modules = None;
            let _ = result::primary_ctx::release(self.handle);
        }
    }
}

fn device_info(handle: sys::CUdevice) -> Result<DeviceInfo> {
    use sys::CUdevice_attribute_enum as Attribute;
    let attribute = |attribute| {
        // SAFETY: the handle is that of a device.
        unsafe { result::device::get_attribute(handle, attribute) }.map_err(failed("cuDeviceGetAttribute"))
    };
    // SAFETY: as above.
    let memory_bytes = unsafe { result::device::total_mem(handle) }.map_err(failed("cuDeviceTotalMem"))?;
    Ok(DeviceInfo {
        name: result::device::get_name(handle).map_err(failed("cuDeviceGetName"))?,
        compute_capability: (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        num_multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        memory_bytes: memory_bytes as u64,
        max_shared_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        has_tensor_maps: has_tensor_maps(),
    })
}

fn launches_early(info: &DeviceInfo, variable: Option<OsString>) -> bool {
    variable.is_some_and(|value| value == "on") && info.compute_capability >= PROGRAMMATIC_CAPABILITY
}

/// Whether the driver has the function; a call of one that it has not would panic.
fn has_tensor_maps() -> bool {
    // SAFETY: the library is there, since it told about the device; the symbol is looked for and not used.
    unsafe { sys::culib().get::<*const c_void>(b"cuTensorMapEncodeTiled\0") }.is_ok()
}

/// The driver's form of `tiles`. What is outside of the matrix reads as zeros.
fn tensor_map(tiles: &Tiles) -> Result<sys::CUtensorMap> {
    let mut map = sys::CUtensorMap { opaque: [0; 16] };
    let (sizes, row_bytes) = ([tiles.columns, tiles.rows], [tiles.columns * size_of::<u16>() as u64]);
    let (tile, steps) = ([Tiles::COLUMNS, tiles.tile_rows as u32], [1; 2]);
    // SAFETY: only devices whose driver has the function are given tiles (`Forms::of`); the arrays have as many numbers
    // as a map of rank two takes, and it reads nothing at `address`.
    let status = unsafe {
        sys::cuTensorMapEncodeTiled(
            &mut map,
            sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            sizes.len() as u32,
            tiles.address as *mut c_void,
            sizes.as_ptr(),
            row_bytes.as_ptr(),
            tile.as_ptr(),
            steps.as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    };
    status.result().map(|()| map).map_err(failed("cuTensorMapEncodeTiled"))
}

fn check_driver(found: i32) -> Result<()> {
    match found >= NEEDED_DRIVER {
        true => Ok(()),
        false => Err(Error::CudaDriverTooOld { found: version_text(found), needed: version_text(NEEDED_DRIVER) }),
    }
}

/// 12_080 is 12.8.
fn version_text(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

fn check_capability(info: &DeviceInfo) -> Result<()> {
    if info.compute_capability >= NEEDED_CAPABILITY {
        return Ok(());
    }
    let text = |(major, minor): (i32, i32)| format!("{major}.{minor}");
    let (found, needed) = (text(info.compute_capability), text(NEEDED_CAPABILITY));
    Err(Error::UnsupportedCudaDevice { name: info.name.clone(), found, needed })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(compute_capability: (i32, i32)) -> DeviceInfo {
        DeviceInfo {
            name: "Old One".to_owned(),
            compute_capability,
            num_multiprocessors: 1,
            memory_bytes: 0,
            max_shared_bytes: 0,
            has_tensor_maps: false,
        }
    }

    /// Without a driver every entry is that error, not a panic; with one, a device that does not exist is refused by its number.
    #[test]
    fn a_machine_without_a_driver_is_told_so() {
        // SAFETY: looks for the library and calls nothing in it.
        if unsafe { sys::is_culib_present() } {
            let error = Device::open(1000).err().expect("no machine has so many");
            assert!(
                matches!(error, Error::NoCudaDevice { ordinal: 1000, .. } | Error::CudaDriverTooOld { .. }),
                "{error}"
            );
            return;
        }
        assert_eq!(Device::count(), Err(Error::NoCudaDriver));
        assert_eq!(Device::open(0).err(), Some(Error::NoCudaDriver));
        assert!(Error::NoCudaDriver.to_string().contains("libcuda"));
    }

    /// Kernels are launched early where that was asked for and the device can do it.
    #[test]
    fn kernels_are_launched_early_on_request() {
        let launches = |variable: Option<&str>, compute_capability| {
            launches_early(&device(compute_capability), variable.map(OsString::from))
        };
        assert!(launches(Some("on"), (9, 0)) && launches(Some("on"), (12, 0)));
        assert!(!launches(Some("on"), (8, 9)), "the instruction is not there");
        assert!(!launches(None, (9, 0)) && !launches(Some("off"), (9, 0)));
    }

    /// Drivers and devices below what the kernels are compiled for are refused with both numbers; the first that will do is not.
    #[test]
    fn old_drivers_and_devices_are_refused() {
        assert_eq!(check_driver(NEEDED_DRIVER), Ok(()));
        let error = check_driver(12_080).expect_err("too old").to_string();
        assert_eq!(error, "the CUDA driver supports CUDA 12.8, needed is 13.0 (driver 580 or later)");
        assert_eq!(check_capability(&device((8, 0))), Ok(()));
        let error = check_capability(&device((7, 5))).expect_err("too old").to_string();
        assert_eq!(error, "device `Old One` has compute capability 7.5, needed is 8.0");
    }
}
