//! The kernels under test: on the CPU shim, in the schedule of the test, or where the tests run on a GPU, there.

use std::sync::OnceLock;

use ns_llm_cuda_shim as cuda_shim;
use ns_llm_kernels::cuda::launch::{Argument, Launch, Stream};
use ns_llm_kernels::error::Result;

pub(crate) use cuda_shim::{SANITIZE_VARIABLE, Schedule, entry_points, missing, sanitized};

use crate::Test;
pub(crate) use crate::mirror::{slice, slice_mut};

/// The tests of this file.
pub(crate) const TESTS: &[Test] = &[
    ("the shim refuses what is no call of a kernel", refuses_wrong_calls),
    ("a kernel that is begun early waits for the one in front", early_kernels_wait),
];

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

/// Two norms in a row, the second begun before the first has run, give what they give one after the other, in every schedule
/// and with each block the early one. A kernel that reads too soon gives something else, and one that never waits is named.
fn early_kernels_wait() {
    const WIDTH: usize = 64;
    let x: Vec<f32> = (0..4 * WIDTH).map(|i| i as f32 * 0.01 - 1.0).collect();
    let weight: Vec<f32> = (0..WIDTH).map(|i| 1.0 + i as f32 * 0.5).collect();
    // Norms of the norms of `x`; what lies between is not a number until it is written.
    let norms_of_norms = |shim: &cuda_shim::Shim, early: bool| {
        let (mut between, mut out) = (vec![f32::NAN; x.len()], vec![f32::NAN; x.len()]);
        let norm = |from: u64, to: u64| {
            [
                Argument::Address(from),
                Argument::Address(weight.as_ptr() as u64),
                Argument::Address(to),
                Argument::Int(WIDTH as i32),
                Argument::Float(1e-6),
            ]
        };
        let (middle, end) = (between.as_mut_ptr() as u64, out.as_mut_ptr() as u64);
        let (first, second) = (norm(x.as_ptr() as u64, middle), norm(middle, end));
        let launch = |arguments| {
            let (file, kernel) = ("norm", "rms_norm_f32");
            Launch { file, kernel, grid: [4, 1, 1], threads: 64, shared_bytes: 0, arguments }
        };
        let (first, second) = (launch(&first), launch(&second));
        match early {
            true => shim.launch_early(&first, &second),
            false => shim.launch(&first).and_then(|()| shim.launch(&second)),
        }
        .expect("the norms run");
        out
    };
    let want = norms_of_norms(&Shim::new(Schedule::TAME).0, false);
    assert!(want.iter().all(|value| value.is_finite()));
    for schedule in Schedule::all() {
        for _ in 0..4 {
            assert_eq!(norms_of_norms(&Shim::new(schedule).0, true), want, "{schedule:?}");
        }
        let hasty = Shim::with_planted(schedule, "PLANT_EARLY_READ");
        assert_eq!(norms_of_norms(&hasty.0, false), want, "alone it has nothing to wait for");
        let got = norms_of_norms(&hasty.0, true);
        let wrong = got.chunks(WIDTH).filter(|row| row[0].is_nan()).count();
        assert_eq!(wrong, 1, "the row of the early block, {schedule:?}: {got:?}");
    }

    let (rows, mut sums) = (vec![1.0_f32; 8], vec![1.0_f32; 8]);
    let arguments = [
        Argument::Address(rows.as_ptr() as u64),
        Argument::Address(sums.as_mut_ptr() as u64),
        Argument::Int(rows.len() as i32),
    ];
    let launch = Launch {
        file: "embedding",
        kernel: "add_rows",
        grid: [1; 3],
        threads: 32,
        shared_bytes: 0,
        arguments: &arguments,
    };
    let error = Shim::with_planted(Schedule::TAME, "PLANT_NO_WAIT").launch_here(&launch).expect_err("it never waits");
    assert_eq!(error.to_string(), "add_rows: a thread has ended that never waited for the kernels in front");
}
