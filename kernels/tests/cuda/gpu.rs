//! The same tests on a GPU: with [`DEVICE_VARIABLE`] set, every launch goes to that device instead of the shim, its arguments
//! through a mirror. `gpu/check` runs this where a GPU is.

use std::sync::{Arc, OnceLock};

use ns_llm_kernels::cuda::device::Device;
use ns_llm_kernels::cuda::driver::Driver;
use ns_llm_kernels::cuda::forms::Forms;
use ns_llm_kernels::cuda::launch::{Launch, Stream};
use ns_llm_kernels::cuda::memory::{self, Buffer};
use ns_llm_kernels::error::Result;

use crate::mirror::{Memory, launch_mirrored};

/// Environment variable with the number of the device that the tests run on.
const DEVICE_VARIABLE: &str = "NS_LLM_TEST_DEVICE";

/// A device, and copies in its memory.
pub(crate) struct Gpu {
    device: Arc<Device>,
    memory: Arc<memory::Memory>,
}

impl Gpu {
    /// The device that the environment names. Panics when it cannot be opened: whoever asks for a GPU wants to hear that.
    pub(crate) fn wanted() -> Option<&'static Gpu> {
        static WANTED: OnceLock<Option<Gpu>> = OnceLock::new();
        let open = || {
            let ordinal = std::env::var(DEVICE_VARIABLE).ok()?;
            let ordinal = ordinal.parse().unwrap_or_else(|_| panic!("{DEVICE_VARIABLE} is no number: {ordinal}"));
            let device = Device::open(ordinal).unwrap_or_else(|error| panic!("device {ordinal}: {error}"));
            eprintln!("tests run on {:?}", device.info());
            Some(Gpu { memory: memory::Memory::new(device.clone()), device })
        };
        WANTED.get_or_init(open).as_ref()
    }

    /// Whether it has the kernels of compute capability 9.0.
    pub(crate) fn is_hopper(&self) -> bool {
        self.device.info().compute_capability == (9, 0)
    }

    /// In which forms it computes products.
    pub(crate) fn forms(&self) -> Forms {
        Forms::of(&self.memory)
    }

    /// Launches with arguments in the host's memory, and waits.
    pub(crate) fn launch_with_copies(&self, launch: &Launch<'_>) -> Result<()> {
        launch_mirrored(self, launch)?;
        self.device.synchronize()
    }
}

impl Stream for Gpu {
    fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        self.device.launch(launch)
    }
}

impl Memory for Gpu {
    type Copy = Buffer<u8>;
    fn upload(&self, bytes: &[u8]) -> Result<Buffer<u8>> {
        self.memory.filled("a test's numbers", &[bytes])
    }
    fn address(copy: &Buffer<u8>) -> u64 {
        copy.all().address()
    }
    fn download(&self, copy: &Buffer<u8>, bytes: &mut [u8]) -> Result<()> {
        copy.download(0, bytes)
    }
}
