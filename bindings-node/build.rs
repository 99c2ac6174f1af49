//! Link settings of a Node addon, among them `-z nodelete`: Node unloads an addon when the worker thread that loaded it
//! ends, while threads of the engine may still run its code.

use std::env;

fn main() {
    napi_build::setup();
    let is = |name: &str, value: &str| env::var(name).is_ok_and(|found| found == value);
    if is("PROFILE", "release") && is("CARGO_CFG_TARGET_OS", "linux") {
        // Node looks up the names that an addon exports; the table of all others is a fifth of the file.
        println!("cargo:rustc-cdylib-link-arg=-Wl,--strip-all");
    }
}
