//! Devices for these tests: the shim with the demo model's kernels, and lists of devices as an engine looks them up.

use std::path::PathBuf;
use std::sync::Arc;

use ns_llm::device::CudaDevices;
use ns_llm::{Device, Engine, EngineOptions};
use ns_llm_cuda_shim::{Schedule, Shim, ShimDevice};
use ns_llm_kernels::cuda::driver::Driver;
use ns_llm_kernels::error::Error;

use crate::demo;

/// Memory of a test's device: enough for the demo model, its steps and a small pool.
pub(crate) const MEMORY_BYTES: u64 = 256 << 20;

/// Environment variable with the number of the GPU that these tests run on instead of the shim (`gpu/check`).
const DEVICE_VARIABLE: &str = "NS_LLM_TEST_DEVICE";
/// Environment variable with the folder of the demo model, where this repository is not.
const MODEL_VARIABLE: &str = "NS_LLM_TEST_MODEL";

/// Whether tests run on a GPU.
pub(crate) fn on_gpu() -> bool {
    cfg!(feature = "cuda") && std::env::var_os(DEVICE_VARIABLE).is_some()
}

/// The demo model.
pub(crate) fn model() -> PathBuf {
    std::env::var_os(MODEL_VARIABLE).map_or_else(demo::path, PathBuf::from)
}

/// A device that runs kernels in the tamest order: what hostile ones show is the kernels' own tests' to say.
pub(crate) fn shim() -> Arc<ShimDevice> {
    ShimDevice::new(kernels(), MEMORY_BYTES)
}

/// The same, which begins no kernel before the one in front of it has run.
pub(crate) fn shim_in_order() -> Arc<ShimDevice> {
    ShimDevice::in_order(kernels(), MEMORY_BYTES)
}

fn kernels() -> Shim {
    Shim::new(env!("CARGO_TARGET_TMPDIR"), Schedule::TAME)
}

/// The shim, or the GPU that the environment names. Panics when that cannot be opened: whoever asks for a GPU wants to hear that.
pub(crate) fn device() -> Arc<dyn Driver> {
    #[cfg(feature = "cuda")]
    if let Ok(ordinal) = std::env::var(DEVICE_VARIABLE) {
        let ordinal = ordinal.parse().unwrap_or_else(|_| panic!("{DEVICE_VARIABLE} is no number: {ordinal}"));
        return ns_llm_kernels::cuda::device::Device::open(ordinal)
            .unwrap_or_else(|error| panic!("device {ordinal}: {error}"));
    }
    shim()
}

/// One device, with number 0.
pub(crate) struct One(pub(crate) Arc<dyn Driver>);

impl CudaDevices for One {
    fn open(&self, ordinal: usize) -> Result<Arc<dyn Driver>, Error> {
        match ordinal {
            0 => Ok(self.0.clone()),
            ordinal => Err(Error::NoCudaDevice { ordinal, count: 1 }),
        }
    }
}

/// Options for the demo model on that device: small steps, because a CPU that plays a GPU is slow.
pub(crate) fn options(change: impl FnOnce(&mut EngineOptions)) -> EngineOptions {
    let mut options = EngineOptions::new(model()).threads(1).kv_bytes(2 << 20);
    options.device = Device::Cuda(0);
    options.prefill_budget_tokens = 64;
    options.mixed_budget_tokens = 64;
    options.max_running_sequences = 8;
    change(&mut options);
    options
}

/// The demo model on a shim.
pub(crate) fn open(change: impl FnOnce(&mut EngineOptions)) -> Engine {
    Engine::open_among(options(change), One(device())).expect("the demo model opens on the shim")
}
