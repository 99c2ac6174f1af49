//! Names the shared library after its ABI version, and says whether tools that some tests need are on this machine, so
//! that those tests count as ignored where they are not.

use std::env::var;
use std::process::{Command, Stdio};

fn main() {
    println!("cargo::rerun-if-env-changed=PATH");
    println!("cargo::rerun-if-changed=build.rs");
    for tool in ["valgrind", "pkg-config", "cmake"] {
        let name = tool.replace('-', "_");
        println!("cargo::rustc-check-cfg=cfg(has_{name})");
        let asked = Command::new(tool).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
        if asked.is_ok_and(|status| status.success()) {
            println!("cargo::rustc-cfg=has_{name}");
        }
    }
    if var("CARGO_CFG_TARGET_OS").as_deref() == Ok("linux") {
        println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libns_llm.so.{}", abi_version());
    }
}

/// The part of the version that programs and library must have in common: the major version, and while that is 0 the
/// minor one.
fn abi_version() -> String {
    let part = |name| var(name).expect("cargo sets the version of the package");
    match part("CARGO_PKG_VERSION_MAJOR").as_str() {
        "0" => format!("0.{}", part("CARGO_PKG_VERSION_MINOR")),
        major => major.to_string(),
    }
}
