//! What the tests of the header and of the C programs share: where things are, and the library as C programs link it.

#![allow(dead_code, reason = "each test program uses its own part")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Folder of this crate.
pub(crate) fn crate_dir() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The committed header.
pub(crate) fn header_path() -> PathBuf {
    crate_dir().join("../include/ns_llm.h")
}

/// Names of the functions that a header declares.
pub(crate) fn declared_functions(header: &str) -> Vec<String> {
    let code =
        header.lines().filter(|line| !line.starts_with(" *") && !line.starts_with("/*") && !line.starts_with('#'));
    let mut names: Vec<String> = code
        .filter(|line| !line.starts_with([' ', '}']) && !line.starts_with("typedef"))
        .filter_map(|line| line.split('(').next().filter(|before| before.len() < line.len()))
        .filter_map(|before| before.rsplit([' ', '*']).next())
        .filter(|name| name.starts_with("ns_llm_"))
        .map(str::to_string)
        .collect();
    names.sort();
    names
}

/// Folder that holds `libns_llm.so` and `libns_llm.a`, built now with the profile of this test.
///
/// Cargo builds a library for its integration tests only if Rust can link it, and this one is made for C alone (an rlib
/// would collide with the engine's, which has the same name). So the test asks cargo, for the whole workspace: which
/// features of a dependency are on depends on what is built together, and as `cargo test --workspace` has built it all
/// before, nothing is compiled twice.
pub(crate) fn library_dir() -> &'static Path {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| {
        let test = std::env::current_exe().unwrap();
        // target/PROFILE/deps/test-HASH
        let profile_dir = test.ancestors().nth(2).expect("a test lies in the target folder").to_path_buf();
        let profile = match profile_dir.file_name().and_then(|name| name.to_str()) {
            Some("debug") => "dev",
            Some(name) => name,
            None => unreachable!("the folder of a profile has its name"),
        };
        let built = Command::new(env!("CARGO"))
            .args(["build", "--quiet", "--workspace", "--lib", "--profile", profile])
            .arg("--target-dir")
            .arg(profile_dir.parent().unwrap())
            .current_dir(crate_dir())
            .status()
            .expect("cargo runs");
        assert!(built.success(), "the library was not built");
        link_soname(&profile_dir);
        profile_dir
    })
}

/// Gives the shared library the name beside its own that programs linked with it look for, as an installation does.
fn link_soname(dir: &Path) {
    // Made aside and moved there, because several test programs do this at once.
    let (aside, name) = (dir.join(format!("soname-{}", std::process::id())), dir.join(soname()));
    let _ = std::fs::remove_file(&aside);
    std::os::unix::fs::symlink("libns_llm.so", &aside).expect("the target folder is writable");
    std::fs::rename(&aside, name).expect("the target folder is writable");
}

/// The name by which programs find the shared library: it has the part of the version that must not change.
pub(crate) fn soname() -> String {
    match env!("CARGO_PKG_VERSION_MAJOR") {
        "0" => concat!("libns_llm.so.0.", env!("CARGO_PKG_VERSION_MINOR")).to_string(),
        major => format!("libns_llm.so.{major}"),
    }
}
