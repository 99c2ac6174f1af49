//! The kernels under test: on the CPU shim, in the schedule of the test, or where the tests run on a GPU, there.

use std::sync::OnceLock;

use ns_llm_cuda_shim as cuda_shim;
use ns_llm_kernels::cuda::launch::{Argument, Launch, Stream};
use ns_llm_kernels::error::Result;

pub(crate) use cuda_shim::{SANITIZE_VARIABLE, Schedule, entry_points, missing, sanitized};

use crate::Test;
pub(crate) use crate::mirror::{slice, slice_mut};

/// The tests of this file.
pub(crate) const TESTS: &[Test] = &[("the shim refuses what is no call of a kernel", refuses_wrong_calls)];

/// Environment variable that names a bug to plant into all kernels.
pub(crate) const PLANT_VARIABLE: &str = "NS_LLM_SHIM_PLANT";

/// Every schedule there is. The sanitizers look at addresses, for which one order is as good as another; a GPU has an order of
/// its own.
pub(crate) fn schedules() -> impl Iterator<Item = Schedule> {
    Schedule::all().take(if crate::on_gpu() || sanitized() { 1 } else { usize::MAX })
}

/// A stream that runs each kernel at once: on the CPU, or where the tests run on a GPU, there.
pub(crate) struct Shim(cuda_shim::Shim);

impl Shim {
    /// The kernels as they are, but for what [`PLANT_VARIABLE`] says.
    pub(crate) fn new(schedule: Schedule) -> Shim {
        static PLANT: OnceLock<Option<String>> = OnceLock::new();
        let plant = PLANT.get_or_init(|| std::env::var(PLANT_VARIABLE).ok()).as_deref();
        Shim(cuda_shim::Shim::new(env!("CARGO_TARGET_TMPDIR"), schedule).with_planted(plant))
    }
    /// The kernels with a bug that their source has under this macro.
    pub(crate) fn with_planted(schedule: Schedule, plant: &'static str) -> Shim {
        Shim(cuda_shim::Shim::new(env!("CARGO_TARGET_TMPDIR"), schedule).with_planted(Some(plant)))
    }
    /// Runs a kernel on the CPU, on memory as it is.
    pub(crate) fn launch_here(&self, launch: &Launch<'_>) -> Result<()> {
        self.0.launch(launch)
    }
}

impl Stream for Shim {
    fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let Some(gpu) = crate::gpu::Gpu::wanted() {
            return gpu.launch_with_copies(launch);
        }
        self.launch_here(launch)
    }
}

/// A kernel that does not exist, and arguments that are not its parameters, are errors that name them: a launcher cannot
/// pass the wrong number or size unseen.
fn refuses_wrong_calls() {
    let shim = Shim::new(Schedule::TAME);
    let refused = |kernel, arguments: &[Argument<'_>]| {
        let launch = Launch { file: "norm", kernel, grid: [1, 1, 1], threads: 32, shared_bytes: 0, arguments };
        shim.launch(&launch).expect_err("refused").to_string()
    };
    assert_eq!(refused("no_norm", &[]), "no_norm: no such kernel");
    assert_eq!(refused("rms_norm_f32", &[]), "rms_norm_f32: takes 5 arguments, was given 0");
    let wrong =
        [Argument::Address(0), Argument::Address(0), Argument::Address(0), Argument::Address(4), Argument::Int(0)];
    assert_eq!(refused("rms_norm_f32", &wrong), "rms_norm_f32: argument 3 has 4 bytes, was given 8");
}
