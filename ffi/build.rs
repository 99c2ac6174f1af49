//! Says whether valgrind is on this machine, so that the tests which need it count as ignored where it is not.
//! Nothing of this goes into the library.

use std::process::{Command, Stdio};

fn main() {
    println!("cargo::rustc-check-cfg=cfg(has_valgrind)");
    println!("cargo::rerun-if-env-changed=PATH");
    println!("cargo::rerun-if-changed=build.rs");
    let asked = Command::new("valgrind").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    if asked.is_ok_and(|status| status.success()) {
        println!("cargo::rustc-cfg=has_valgrind");
    }
}
