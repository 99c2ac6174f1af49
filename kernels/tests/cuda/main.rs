//! The CUDA kernels without a GPU: every kernel, through its launcher, on the CPU shim (`kernels/shim/`) against the scalar
//! operations of `cpu::`; and what the compiler says of their registers.
//!
//! Own harness, because what is missing is known only when the tests run: without g++ or without the CUDA toolkit the tests
//! that need it are counted as ignored.

mod attention;
mod check;
mod elementwise;
mod norm;
mod product;
mod sampler;
mod sampling;
mod scalar;
mod shim;

use libtest_mimic::{Arguments, Trial};

/// Name of a test and its body, which panics when it fails.
type Test = (&'static str, fn());

fn main() {
    let arguments = Arguments::from_args();
    let on_shim: Vec<Test> =
        [attention::TESTS, elementwise::TESTS, norm::TESTS, product::TESTS, sampling::TESTS, shim::TESTS].concat();
    let missing = shim::missing();
    let trials = on_shim.into_iter().map(|(name, test)| trial(name, missing, test));
    libtest_mimic::run(&arguments, trials.collect()).exit();
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
