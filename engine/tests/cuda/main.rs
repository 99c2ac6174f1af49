//! Promise: an engine on a CUDA device gives what the CPU gives, within the rounding of bf16, and keeps every other
//! promise: bits that depend on nothing but the request, cached blocks that equal computed ones, typed errors when the
//! device fails. Shown without a GPU: the device is the CPU shim, which runs the same kernels (`kernels/shim/`), or one
//! that does nothing and fails when it is told to.
//!
//! Own harness, because what is missing is known only when the tests run: without g++ those that need the shim are
//! counted as ignored.

mod choice;
mod engines;
mod faults;
mod graphs;
mod models;
mod shim;

#[path = "../support/demo.rs"]
mod demo;
#[path = "../support/direct_run.rs"]
mod direct_run;
#[path = "../support/tiny_model.rs"]
mod tiny_model;

use libtest_mimic::{Arguments, Trial};

/// Name of a test and its body, which panics when it fails.
type Test = (&'static str, fn());

fn main() {
    let arguments = Arguments::from_args();
    let on_device = [models::TESTS, engines::TESTS, graphs::TESTS].concat();
    if shim::on_gpu() {
        libtest_mimic::run(&arguments, trials(&on_device, None)).exit();
    }
    let mut all = trials(&on_device, ns_llm_cuda_shim::missing());
    all.extend(trials(engines::TESTS_OF_THE_SHIM, ns_llm_cuda_shim::missing()));
    all.extend(trials(&[choice::TESTS, faults::TESTS, graphs::TESTS_OF_FAULTS].concat(), None));
    libtest_mimic::run(&arguments, all).exit();
}

fn trials(tests: &[Test], missing: Option<&str>) -> Vec<Trial> {
    let trial = |&(name, test): &Test| {
        let label = missing.map_or(name.to_owned(), |missing| format!("{name}, needs {missing}"));
        let body = move || {
            test();
            Ok(())
        };
        Trial::test(label, body).with_ignored_flag(missing.is_some())
    };
    tests.iter().map(trial).collect()
}
