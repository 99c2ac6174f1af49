//! What NVML says of devices, through a library that plays it: compiled here, loaded as the driver's own is.

use std::path::{Path, PathBuf};
use std::process::Command;

use ns_llm_kernels::host::gpu::{Gpu, GpuVendor, nvidia_gpus_of};

use crate::Test;

/// The tests of this file.
pub(crate) const TESTS: &[Test] = &[
    ("what NVML tells of devices lands in its field and unit", devices_are_told),
    ("a library without a driver is none, and what a device does not tell is none", absence_is_graceful),
];

/// Two devices: one that tells everything, and one that tells only its name, as a slice of a device or an old driver
/// does. The status is one of `nvmlReturn_t`: 0, or 3, `NVML_ERROR_NOT_SUPPORTED`.
const DEVICES: &str = r#"
#include <string.h>
struct Memory { unsigned version; unsigned long long total, reserved, free, used; };
struct Utilization { unsigned gpu, memory; };
static char devices[2];
static int is_second(void* device) { return device == &devices[1]; }
int nvmlInit_v2() { return INIT_STATUS; }
int nvmlShutdown() { return 0; }
int nvmlDeviceGetCount_v2(unsigned* count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void** device) { *device = &devices[index]; return 0; }
int nvmlDeviceGetName(void* device, char* name, unsigned length) {
    strncpy(name, is_second(device) ? "A slice" : "NVIDIA H200", length);
    return 0;
}
int nvmlDeviceGetMemoryInfo_v2(void* device, struct Memory* memory) {
    memory->total = 150ull << 30, memory->reserved = 1ull << 30;
    memory->free = 100ull << 30, memory->used = 49ull << 30;
    return is_second(device) ? 3 : 0;
}
int nvmlDeviceGetUtilizationRates(void* device, struct Utilization* rates) {
    rates->gpu = 87, rates->memory = 12;
    return is_second(device) ? 3 : 0;
}
int nvmlDeviceGetTemperature(void* device, int sensor, unsigned* celsius) {
    *celsius = 61;
    return is_second(device) || sensor != 0 ? 3 : 0;
}
int nvmlDeviceGetPowerUsage(void* device, unsigned* milliwatts) {
    *milliwatts = 512250;
    return is_second(device) ? 3 : 0;
}
int nvmlDeviceGetCudaComputeCapability(void* device, int* major, int* minor) {
    *major = 9, *minor = 0;
    return is_second(device) ? 3 : 0;
}
"#;

/// A library made of [`DEVICES`], whose start has this status.
fn library(name: &str, init_status: u32) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let stem = format!("nvml-{name}-{}", std::process::id());
    let (source, library) = (folder.join(format!("{stem}.c")), folder.join(format!("{stem}.so")));
    std::fs::write(&source, DEVICES).expect("the build's folder is writable");
    let define = format!("-DINIT_STATUS={init_status}");
    let arguments = ["-x", "c", "-shared", "-fPIC", &define, "-o"];
    let output = Command::new("g++").args(arguments).arg(&library).arg(&source).output().expect("g++ runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    std::fs::remove_file(source).expect("it was written");
    library
}

/// Sizes, percent, degrees, watts and compute capability of the first; memory in use is what is not free, because some is
/// the driver's own.
fn devices_are_told() {
    let library = library("two", 0);
    let gpus = nvidia_gpus_of(&library).expect("it opens");
    std::fs::remove_file(library).expect("it was made");
    let full = Gpu {
        vendor: GpuVendor::Nvidia,
        index: 0,
        name: "NVIDIA H200".to_owned(),
        memory_total_bytes: Some(150 << 30),
        memory_used_bytes: Some(50 << 30),
        utilization_percent: Some(87.0),
        temperature_celsius: Some(61.0),
        power_watts: Some(512.25),
        compute_capability: Some((9, 0)),
    };
    let slice = Gpu {
        name: "A slice".to_owned(),
        memory_total_bytes: None,
        memory_used_bytes: None,
        utilization_percent: None,
        temperature_celsius: None,
        power_watts: None,
        compute_capability: None,
        ..full.clone()
    };
    assert_eq!(gpus, [full, slice]);
}

/// No file, a file that is no library, and a library that finds no driver (status 9, `NVML_ERROR_DRIVER_NOT_LOADED`).
fn absence_is_graceful() {
    assert_eq!(nvidia_gpus_of(Path::new("/nonexistent/libnvidia-ml.so.1")), None);
    assert_eq!(nvidia_gpus_of(&Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml")), None);
    let library = library("idle", 9);
    assert_eq!(nvidia_gpus_of(&library), None);
    std::fs::remove_file(library).expect("it was made");
}
