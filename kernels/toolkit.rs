//! Where nvcc is, and how kernels are compiled: what the build script and the test of the registers have in common.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Environment variable that names nvcc itself.
pub const NVCC_VARIABLE: &str = "NVCC";
/// Environment variable that names the folder of an installed toolkit.
pub const HOME_VARIABLE: &str = "CUDA_HOME";
/// Environment variable with the architectures to compile for, oldest first, separated by commas; `90` becomes `sm_90`.
pub const ARCHITECTURES_VARIABLE: &str = "NS_LLM_CUDA_ARCHITECTURES";
/// Without it: Ampere (A100) and Hopper (H100, H200). Code for 8.0 also runs on 8.6 and 8.9; for what came after the last, its
/// driver compiles the text that is beside the code.
const ARCHITECTURES: &str = "80,90";

/// How to get a compiler.
pub const HINT: &str = "run `node scripts/cuda-toolkit.mjs`, or set NVCC or CUDA_HOME";

/// The compiler: what the environment names, else what `scripts/cuda-toolkit.mjs` installed below `root`, else one on the path.
pub fn nvcc(root: &Path) -> Option<PathBuf> {
    let named = std::env::var_os(NVCC_VARIABLE).map(PathBuf::from);
    let home = std::env::var_os(HOME_VARIABLE).map(|home| PathBuf::from(home).join("bin/nvcc"));
    let installed = root.join(".cuda/nvidia/cu13/bin/nvcc");
    named.or(home).or(Some(installed).filter(|path| path.exists())).or_else(|| {
        let on_path = Command::new("nvcc").arg("--version").output();
        on_path.is_ok_and(|output| output.status.success()).then(|| PathBuf::from("nvcc"))
    })
}

/// The architectures to compile for, oldest first.
pub fn architectures() -> Vec<String> {
    let wanted = std::env::var(ARCHITECTURES_VARIABLE).unwrap_or_else(|_| ARCHITECTURES.to_owned());
    wanted.split(',').map(|architecture| architecture.trim().to_owned()).collect()
}

/// The number of an architecture: 90 of `90a`.
pub fn number(architecture: &str) -> u32 {
    let digits = architecture.trim_end_matches(|letter: char| letter.is_ascii_lowercase());
    digits
        .parse()
        .unwrap_or_else(|_| panic!("{ARCHITECTURES_VARIABLE}: `{architecture}` is no architecture, such as 90"))
}

/// A compilation of `cuda/FILE.cu` for all architectures it is meant for, into a fat binary, packed as tightly as nvcc can
/// (a fifth of what it makes otherwise). A register that spills is an error: it is cheaper to notice it here than to measure it.
pub fn compilation(nvcc: &Path, source: &Path, fatbin: &Path) -> Command {
    let stem = source.file_stem().unwrap_or_default().to_string_lossy();
    let mut command = Command::new(nvcc);
    // No fused multiply-adds but those that the source names: two kernels then round alike, and the CPU shim as they do.
    command.args(["-O3", "-std=c++17", "-fmad=false", "-fatbin", "-Xptxas", "-v,-warn-spills,-Werror"]);
    command.arg("-compress-mode=size");
    let is_for_hopper = stem.starts_with("sm90_");
    let architectures = if is_for_hopper { vec!["90a".to_owned()] } else { architectures() };
    for architecture in &architectures {
        command.arg(format!("-gencode=arch=compute_{architecture},code=sm_{architecture}"));
    }
    if let Some(newest) = architectures.last().filter(|_| !is_for_hopper) {
        // Each multiplication and sum in it says how it rounds, so no other compiler fuses them either.
        command.arg(format!("-gencode=arch=compute_{newest},code=compute_{newest}"));
    }
    command.arg("-o").arg(fatbin).arg(source);
    command
}

/// The kernel files in `cuda/`, in the order of their names.
pub fn sources(kernels: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(kernels.join("cuda")).expect("kernels/cuda is there");
    let mut sources: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    sources.retain(|path| path.extension().is_some_and(|extension| extension == "cu"));
    sources.sort();
    sources
}
