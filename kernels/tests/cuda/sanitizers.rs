//! The tests on the shim once more, with kernels compiled with the address and the undefined-behaviour sanitizer. What
//! kernels read and write then is memory of the sanitizer's allocator: a byte behind an array ends the run.

use std::process::Command;
use std::sync::OnceLock;

use crate::Test;
use crate::shim;

/// The tests of this file.
pub(crate) const TESTS: &[Test] = &[
    ("kernels are clean under the sanitizers", kernels_are_clean),
    ("the sanitizers see an access behind the end", an_access_behind_the_end_shows),
];

/// What this machine lacks for it.
pub(crate) fn missing() -> Option<&'static str> {
    shim::missing().or_else(|| library().is_none().then_some("g++ with the address sanitizer"))
}

/// The sanitizer's library, which has to be in the process before the kernels are.
fn library() -> Option<&'static str> {
    static LIBRARY: OnceLock<Option<String>> = OnceLock::new();
    let found = LIBRARY.get_or_init(|| {
        let output = Command::new("g++").arg("-print-file-name=libasan.so").output().ok()?;
        let path = String::from_utf8(output.stdout).ok()?.trim().to_owned();
        // g++ gives the bare name back when it has no such file.
        std::path::Path::new(&path).is_absolute().then_some(path)
    });
    found.as_deref()
}

/// This test program with the sanitizers and only the tests whose name contains `filter`: its success and all it said.
fn run(filter: &str, plant: Option<&str>) -> (bool, String) {
    let mut command = Command::new(std::env::current_exe().expect("a running program has a path"));
    command.args([filter, "--test-threads", "1"]).env(shim::SANITIZE_VARIABLE, "1");
    command.env("LD_PRELOAD", library().expect("the test is ignored without it"));
    // Fibers change stacks under the sanitizer: what it says of returning from them is not so.
    command.env("ASAN_OPTIONS", "detect_leaks=0:detect_stack_use_after_return=0");
    command.envs(plant.map(|plant| (shim::PLANT_VARIABLE, plant)));
    let output = command.output().expect("the program runs");
    let said = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    (output.status.success(), said)
}

/// One test of each kernel, through every schedule.
fn kernels_are_clean() {
    for filter in ["scalar", "taken by their index", "lie in their slots", "that of f64", "those of the sampler"] {
        let (success, said) = run(filter, None);
        assert!(success, "with the sanitizers:\n{said}");
        assert!(said.contains("test result: ok.") && !said.contains(" 0 passed"), "nothing ran:\n{said}");
    }
}

/// A kernel that reads a row behind the last one is stopped: the sanitizers are really there.
fn an_access_behind_the_end_shows() {
    let (success, said) = run("lie in their slots", Some("PLANT_ROW_BEHIND_THE_END"));
    assert!(!success, "the planted access went unseen:\n{said}");
    assert!(said.contains("heap-buffer-overflow"), "{said}");
}
