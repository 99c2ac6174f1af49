//! The CUDA kernels without a GPU: every kernel, through its launcher, on the CPU shim (`kernels/shim/`) against the scalar
//! operations of `cpu::`; and what the compiler says of their registers.
//!
//! Own harness, because what is missing is known only when the tests run: without g++ or without the CUDA toolkit the tests
//! that need it are counted as ignored.

mod attention;
mod budget;
mod check;
mod elementwise;
#[cfg(feature = "cuda")]
mod gpu;
mod memory;
mod mirror;
mod norm;
mod nvml;
mod product;
mod ptx;
mod quant;
mod sampler;
mod sampling;
mod sanitizers;
mod scalar;
mod shim;
mod sm90_matmul;
#[path = "../../toolkit.rs"]
#[allow(dead_code, unreachable_pub, reason = "also a module of the build script")]
mod toolkit;

use libtest_mimic::{Arguments, Trial};

/// Name of a test and its body, which panics when it fails.
type Test = (&'static str, fn());

fn main() {
    let arguments = Arguments::from_args();
    let kernels =
        [attention::TESTS, elementwise::TESTS, norm::TESTS, product::TESTS, quant::TESTS, sampling::TESTS].concat();
    if on_gpu() {
        let mut all = trials(&kernels, None);
        all.extend(trials(sm90_matmul::TESTS, no_hopper()));
        libtest_mimic::run(&arguments, all).exit();
    }
    let hopper = [sm90_matmul::TESTS, sm90_matmul::PLANTED].concat();
    let planted = [attention::PLANTED, elementwise::PLANTED, product::PLANTED, sampling::PLANTED].concat();
    let on_shim = [&kernels[..], &hopper, &planted, mirror::TESTS, nvml::TESTS, shim::TESTS].concat();
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("kernels/ has a parent");
    let no_toolkit = toolkit::nvcc(root).is_none().then_some("the CUDA toolkit");
    let mut all = trials(&on_shim, shim::missing());
    all.extend(trials(budget::TESTS, no_toolkit));
    all.extend(trials(&[budget::TESTS_OF_THE_RULE, ptx::TESTS_OF_THE_RULE, memory::TESTS].concat(), None));
    // These run the others.
    if !shim::sanitized() {
        all.extend(trials(sanitizers::TESTS, sanitizers::missing()));
    }
    libtest_mimic::run(&arguments, all).exit();
}

/// Whether the kernels run on a GPU instead of the shim, and with them only the tests that do not need the shim.
fn on_gpu() -> bool {
    #[cfg(feature = "cuda")]
    return gpu::Gpu::wanted().is_some();
    #[cfg(not(feature = "cuda"))]
    false
}

/// What the GPU lacks for the kernels of compute capability 9.0.
fn no_hopper() -> Option<&'static str> {
    #[cfg(feature = "cuda")]
    if gpu::Gpu::wanted().is_some_and(|gpu| gpu.is_hopper()) {
        return None;
    }
    Some("a device of compute capability 9.0")
}

fn trials(tests: &[Test], missing: Option<&str>) -> Vec<Trial> {
    tests.iter().map(|(name, test)| trial(name, missing, *test)).collect()
}

/// A test that is ignored, and says so in its name, where something is missing.
fn trial(name: &str, missing: Option<&str>, test: fn()) -> Trial {
    let label = missing.map_or(name.to_owned(), |missing| format!("{name}, needs {missing}"));
    let body = move || {
        test();
        Ok(())
    };
    Trial::test(label, body).with_ignored_flag(missing.is_some())
}
