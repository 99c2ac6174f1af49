//! With the feature `cuda`: compiles each `cuda/*.cu` to a fat binary and writes the table that embeds them. Without it:
//! nothing.

#[path = "toolkit.rs"]
#[allow(unreachable_pub, reason = "also a module of the tests")]
mod toolkit;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if std::env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    println!("cargo::rerun-if-changed=toolkit.rs");
    println!("cargo::rerun-if-changed=cuda");
    for variable in [toolkit::NVCC_VARIABLE, toolkit::HOME_VARIABLE, toolkit::ARCHITECTURES_VARIABLE] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR"));
    let root = kernels.parent().expect("kernels/ has a parent");
    let Some(nvcc) = toolkit::nvcc(root) else { panic!("feature `cuda` needs nvcc: {}", toolkit::HINT) };
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets it"));
    let mut table = "pub(super) static FATBINS: &[(&str, &[u8])] = &[\n".to_owned();
    for source in toolkit::sources(kernels) {
        let stem = source.file_stem().expect("it has an extension").to_string_lossy();
        let fatbin = out.join(format!("{stem}.fatbin"));
        let output = toolkit::compilation(&nvcc, &source, &fatbin).output();
        let output = output.unwrap_or_else(|error| panic!("{}: {error} ({})", nvcc.display(), toolkit::HINT));
        let messages = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "nvcc refuses {}:\n{messages}", source.display());
        writeln!(table, "    ({stem:?}, include_bytes!({fatbin:?})),").expect("a string grows");
    }
    let newest = toolkit::architectures().iter().map(|architecture| toolkit::number(architecture)).max();
    writeln!(table, "];\npub(super) const NEWEST_ARCHITECTURE: u32 = {};", newest.unwrap_or(0))
        .expect("a string grows");
    std::fs::write(out.join("fatbins.rs"), table).expect("OUT_DIR is writable");
}
