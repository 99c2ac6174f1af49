//! Where a model runs: the CPU, or a CUDA device that is there, that the kernels can use, and that the model fits. Said
//! once, with the reason, before any weight is read.

use std::sync::Arc;

use ns_llm_kernels::cuda::driver::Driver;
use ns_llm_kernels::error::Error as KernelError;

use crate::backend::cuda::device_error;
use crate::config::Device;
use crate::error::{DeviceRefusal, Error, Result};

/// The CUDA devices of a machine: its own, or in tests others.
pub trait CudaDevices: Send {
    /// Opens the device of this number.
    fn open(&self, ordinal: usize) -> std::result::Result<Arc<dyn Driver>, KernelError>;
    /// Whether there can be any: a build without CUDA support has none.
    fn is_built(&self) -> bool {
        true
    }
}

/// Those of this machine.
pub struct MachineDevices;

#[cfg(feature = "cuda")]
impl CudaDevices for MachineDevices {
    fn open(&self, ordinal: usize) -> std::result::Result<Arc<dyn Driver>, KernelError> {
        Ok(ns_llm_kernels::cuda::device::Device::open(ordinal)?)
    }
}

#[cfg(not(feature = "cuda"))]
impl CudaDevices for MachineDevices {
    fn open(&self, _: usize) -> std::result::Result<Arc<dyn Driver>, KernelError> {
        Err(KernelError::NoCudaDriver)
    }
    fn is_built(&self) -> bool {
        false
    }
}

/// Where a model runs, and why there.
#[derive(Clone)]
pub(crate) struct Place {
    pub(crate) target: Target,
    /// As in [`ModelInfo::device_reason`](crate::ModelInfo::device_reason).
    pub(crate) reason: String,
}

/// What computes.
#[derive(Clone)]
pub(crate) enum Target {
    /// Cores of this machine.
    Cpu,
    /// A device that is open.
    Cuda(CudaTarget),
}

/// A CUDA device that is open.
#[derive(Clone)]
pub(crate) struct CudaTarget {
    pub(crate) driver: Arc<dyn Driver>,
    pub(crate) ordinal: usize,
}

impl Target {
    /// As in [`ModelInfo::device`](crate::ModelInfo::device).
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Target::Cpu => "cpu",
            Target::Cuda(_) => "cuda",
        }
    }

    /// As in [`ModelInfo::device_name`](crate::ModelInfo::device_name).
    pub(crate) fn name(&self) -> String {
        match self {
            Target::Cpu => "cpu".to_string(),
            Target::Cuda(cuda) => format!("{} {}", cuda.name(), cuda.driver.info().name),
        }
    }
}

impl CudaTarget {
    /// As a user names it.
    pub(crate) fn name(&self) -> String {
        Device::Cuda(self.ordinal).to_string()
    }

    /// Bytes of its memory that nobody has.
    pub(crate) fn free_memory_bytes(&self) -> Result<u64> {
        self.driver.free_memory_bytes().map_err(|error| refusal(self.name(), error))
    }

    /// The architecture whose code runs; newer ones run that of the last.
    pub(crate) fn architecture(&self) -> &'static str {
        match self.driver.info().compute_capability {
            (8, 0..6) => "sm_80",
            (8, 6..9) => "sm_86",
            (8, _) => "sm_89",
            (9, _) => "sm_90",
            (10, _) => "sm_100",
            (12, _) => "sm_120",
            _ => "compute_80",
        }
    }
}

/// The place that `wanted` asks for; `plan` says what the model would take on a target, or why it cannot run there.
pub(crate) fn place<P>(
    wanted: Device,
    devices: &dyn CudaDevices,
    mut plan: impl FnMut(&Target) -> Result<P>,
) -> Result<(Place, P)> {
    let mut on_cuda = |ordinal| {
        let target = Target::Cuda(open(devices, ordinal)?);
        let planned = plan(&target)?;
        Ok((target, planned))
    };
    let reason = match wanted {
        Device::Cuda(ordinal) => {
            let (target, planned) = on_cuda(ordinal)?;
            return Ok((Place { target, reason: "it was asked for".to_string() }, planned));
        }
        Device::Auto => match on_cuda(0) {
            Ok((target, planned)) => {
                let reason = "the first CUDA device, which the model fits".to_string();
                return Ok((Place { target, reason }, planned));
            }
            Err(Error::DeviceUnavailable { reason, .. }) => format!("no CUDA device: {reason}"),
            Err(error) => format!("not on the CUDA device: {error}"),
        },
        Device::Cpu => "it was asked for".to_string(),
    };
    let planned = plan(&Target::Cpu)?;
    Ok((Place { target: Target::Cpu, reason }, planned))
}

fn open(devices: &dyn CudaDevices, ordinal: usize) -> Result<CudaTarget> {
    let device = Device::Cuda(ordinal).to_string();
    if !devices.is_built() {
        return Err(Error::DeviceUnavailable { device, reason: DeviceRefusal::NotBuilt });
    }
    match devices.open(ordinal) {
        Ok(driver) => Ok(CudaTarget { driver, ordinal }),
        Err(error) => Err(refusal(device, error)),
    }
}

/// Why a device could not be opened.
fn refusal(device: String, error: KernelError) -> Error {
    let reason = match error {
        KernelError::NoCudaDriver => DeviceRefusal::NoDriver,
        KernelError::CudaDriverTooOld { found, needed } => DeviceRefusal::DriverTooOld { found, needed },
        KernelError::NoCudaDevice { ordinal, count } => DeviceRefusal::NoSuchDevice { ordinal, count },
        KernelError::UnsupportedCudaDevice { name, found, needed } => {
            DeviceRefusal::DeviceTooOld { name, found, needed }
        }
        KernelError::CudaDriver { .. } => DeviceRefusal::Driver { reason: error.to_string() },
        other => return device_error(&device, other),
    };
    Error::DeviceUnavailable { device, reason }
}
