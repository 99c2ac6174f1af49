//! For tests: the kernels of `kernels/cuda/` on the CPU. A kernel file is compiled by g++ together with the headers beside this
//! crate, which say what a GPU would do, and a [`Shim`] runs its kernels as a [`Stream`]: each launch in the schedule of the
//! stream, on memory of this process.
//!
//! [`ShimDevice`] is a whole device made of that, with memory of its own, so that whatever speaks to a [`Driver`] can be
//! tested without a GPU; [`FaultyDevice`] is one that fails when it is told to.
//!
//! [`Driver`]: ns_llm_kernels::cuda::driver::Driver

mod device;
mod faults;
mod queue;

use std::collections::{BTreeMap, hash_map::DefaultHasher};
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, OnceLock};

use ns_llm_kernels::cuda::launch::{Argument, Launch, Stream};
use ns_llm_kernels::error::{Error, Result};

pub use device::ShimDevice;
pub use faults::{Fault, FaultyDevice, IdleDevice};

/// Environment variable with which kernels are compiled with the sanitizers.
pub const SANITIZE_VARIABLE: &str = "NS_LLM_SHIM_SANITIZE";
/// Who runs when, and when copies land: `Order` and `Landing` of `block.h`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Schedule {
    order: c_uint,
    landing: c_uint,
    seed: c_uint,
}

impl Schedule {
    /// Threads by index, copies at once: the tamest.
    pub const TAME: Schedule = Schedule { order: 0, landing: 0, seed: 0 };

    /// Every order with every landing.
    pub fn all() -> impl Iterator<Item = Schedule> {
        (0..8).map(|i| Schedule { order: i % 4, landing: i / 4, seed: 7 * i })
    }
}

/// A stream that runs each kernel at once, on memory as it is.
#[derive(Debug, Clone)]
pub struct Shim {
    schedule: Schedule,
    /// Macro with which the kernels are compiled: a planted bug.
    plant: Option<&'static str>,
    /// Where compiled kernels are kept, for this process and the next.
    folder: PathBuf,
}

impl Shim {
    /// The kernels as they are; compiled ones are kept in `folder`, a test's `CARGO_TARGET_TMPDIR`.
    pub fn new(folder: impl Into<PathBuf>, schedule: Schedule) -> Shim {
        Shim { schedule, plant: None, folder: folder.into() }
    }
    /// The kernels with a bug that their source has under this macro.
    pub fn with_planted(self, plant: Option<&'static str>) -> Shim {
        Shim { plant, ..self }
    }
}

/// What this machine lacks to run kernels on the CPU.
pub fn missing() -> Option<&'static str> {
    static MISSING: OnceLock<Option<&'static str>> = OnceLock::new();
    *MISSING.get_or_init(|| {
        if cfg!(not(all(target_arch = "x86_64", target_os = "linux"))) {
            return Some("x86-64 Linux");
        }
        let compiler = Command::new("g++").arg("--version").output();
        if compiler.is_ok_and(|output| output.status.success()) { None } else { Some("g++") }
    })
}

/// `LaunchParameters` of `export.h`.
#[repr(C)]
struct LaunchParameters {
    grid: [c_uint; 3],
    block: [c_uint; 3],
    shared_bytes: usize,
    order: c_uint,
    landing: c_uint,
    seed: c_uint,
    before: KernelBefore,
}

/// `KernelBefore` of `block.h`.
#[repr(C)]
struct KernelBefore {
    run: Option<unsafe extern "C" fn(context: *mut c_void)>,
    context: *mut c_void,
}

/// What runs a kernel in front of another one, out of the middle of that one.
struct Before<'a> {
    shim: &'a Shim,
    library: Library,
    launch: &'a Launch<'a>,
    /// Once it has run.
    result: Option<Result<()>>,
}

/// `KernelBefore::run`.
///
/// # Safety
/// `context` is a [`Before`] that nobody else uses.
unsafe extern "C" fn run_before(context: *mut c_void) {
    // SAFETY: promised by the caller.
    let before = unsafe { &mut *context.cast::<Before<'_>>() };
    before.result = Some(before.shim.run(before.library, before.launch, KernelBefore::NONE));
}

impl KernelBefore {
    const NONE: KernelBefore = KernelBefore { run: None, context: std::ptr::null_mut() };
}

/// `Argument` of `export.h`.
#[repr(C)]
struct SizedArgument {
    value: *const c_void,
    bytes: usize,
}

type ShimLaunch = unsafe extern "C" fn(
    name: *const c_char,
    parameters: *const LaunchParameters,
    arguments: *const SizedArgument,
    num_arguments: usize,
    message: *mut c_char,
    message_bytes: usize,
) -> c_int;

/// Compiled files: a library runs one launch at a time, because its shared variables are its own; or two, where one
/// waits for the other.
#[derive(Clone, Copy)]
struct Library {
    launch: ShimLaunch,
}

impl Stream for Shim {
    fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        let libraries = &mut *lock_libraries();
        self.run(self.library(libraries, launch)?, launch, KernelBefore::NONE)
    }
}

impl Shim {
    /// Runs both, the second begun before the first has run, as a device may that was told so (programmatic dependent launch):
    /// one block of it goes as far as it can without the first.
    pub fn launch_early(&self, first: &Launch<'_>, second: &Launch<'_>) -> Result<()> {
        let libraries = &mut *lock_libraries();
        let mut before = Before { shim: self, library: self.library(libraries, first)?, launch: first, result: None };
        let library = self.library(libraries, second)?;
        let run = KernelBefore { run: Some(run_before), context: (&raw mut before).cast() };
        let result = self.run(library, second, run);
        before.result.unwrap_or(Ok(())).and(result)
    }

    /// Runs a kernel, and `before` in the middle of it. The list of libraries is locked.
    fn run(&self, library: Library, launch: &Launch<'_>, before: KernelBefore) -> Result<()> {
        let arguments: Vec<SizedArgument> = launch
            .arguments
            .iter()
            .map(|argument: &Argument<'_>| SizedArgument { value: argument.value(), bytes: argument.size_bytes() })
            .collect();
        let Schedule { order, landing, seed } = self.schedule;
        let parameters = LaunchParameters {
            grid: launch.grid,
            block: [launch.threads, 1, 1],
            shared_bytes: launch.shared_bytes as usize,
            order,
            landing,
            seed,
            before,
        };
        let name = CString::new(launch.kernel).expect("names have no zero byte");
        let mut message = [0; 512];
        // SAFETY: the function is `shim_launch` of `export.h`; it checks number and size of the arguments against the
        // kernel's parameters. Slices in them are the caller's promise (`Slice::from_raw`).
        let status = unsafe {
            let (arguments, num_arguments) = (arguments.as_ptr(), arguments.len());
            (library.launch)(name.as_ptr(), &parameters, arguments, num_arguments, message.as_mut_ptr(), message.len())
        };
        if status == 0 {
            return Ok(());
        }
        // SAFETY: `snprintf` ended the message with a zero byte inside the buffer.
        let reason = unsafe { CStr::from_ptr(message.as_ptr()) }.to_string_lossy().into_owned();
        Err(Error::Launch { kernel: launch.kernel, reason })
    }

    fn library(&self, libraries: &mut Libraries, launch: &Launch<'_>) -> Result<Library> {
        use std::collections::btree_map::Entry;
        match libraries.entry((launch.file, self.plant)) {
            Entry::Occupied(library) => Ok(*library.get()),
            Entry::Vacant(place) => compile(&self.folder, launch.file, self.plant)
                .and_then(|path| load(&path))
                .map(|library| *place.insert(library))
                .map_err(|reason| Error::Launch { kernel: launch.kernel, reason }),
        }
    }
}

type Libraries = BTreeMap<(&'static str, Option<&'static str>), Library>;

fn lock_libraries() -> std::sync::MutexGuard<'static, Libraries> {
    static LIBRARIES: Mutex<Libraries> = Mutex::new(BTreeMap::new());
    LIBRARIES.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn load(path: &Path) -> std::result::Result<Library, String> {
    let name = CString::new(path.as_os_str().as_encoded_bytes()).expect("paths have no zero byte");
    // SAFETY: the library was compiled from this tree; it has no constructors but those of the C++ library.
    let symbol = unsafe {
        let handle = libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL);
        if handle.is_null() {
            return Err(format!("dlopen: {}", CStr::from_ptr(libc::dlerror()).to_string_lossy()));
        }
        libc::dlsym(handle, c"shim_launch".as_ptr())
    };
    assert!(!symbol.is_null(), "{} has no shim_launch", path.display());
    // SAFETY: `export.h` defines the symbol with this type.
    Ok(Library { launch: unsafe { std::mem::transmute::<*mut c_void, ShimLaunch>(symbol) } })
}

fn kernels_folder() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// Names of the entry points in the text of a kernel file.
pub fn entry_points(text: &str) -> Vec<&str> {
    text.split("extern \"C\" __global__ void ")
        .skip(1)
        .map(|rest| {
            let rest = rest.trim_start();
            let rest = match rest.strip_prefix("__launch_bounds__(") {
                Some(bounds) => bounds.split_once(')').expect("the bounds end").1.trim_start(),
                None => rest,
            };
            rest.split('(').next().expect("a name").trim()
        })
        .collect()
}

/// The text of `cuda/FILE.cu`.
fn source(file: &str) -> String {
    let path = kernels_folder().join("cuda").join(format!("{file}.cu"));
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Compiles `cuda/FILE.cu` into a library, unless the same text was compiled before.
fn compile(folder: &Path, file: &str, plant: Option<&str>) -> std::result::Result<PathBuf, String> {
    let list: Vec<String> = entry_points(&source(file)).iter().map(|name| format!("SHIM_KERNEL({name})")).collect();
    let unit = format!("#include \"{file}.cu\"\n#include \"export.h\"\nSHIM_KERNELS({})\n", list.join(", "));
    let mut flags: Vec<String> =
        ["-std=c++17", "-O2", "-g1", "-fPIC", "-shared", "-ffp-contract=off"].map(Into::into).into();
    flags.extend(["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"].map(Into::into));
    flags.extend(plant.map(|plant| format!("-D{plant}")));
    if sanitized() {
        flags.extend(["-fsanitize=address,undefined", "-fno-sanitize-recover=all"].map(Into::into));
    }
    let stem = format!("{file}-{:016x}", fingerprint(&unit, &flags));
    let library = folder.join(format!("{stem}.so"));
    if library.exists() {
        return Ok(library);
    }
    // Under a name of this process first: another may be compiling the same.
    let unit_path = folder.join(format!("{stem}-{}.cc", std::process::id()));
    let fresh = unit_path.with_extension("so");
    std::fs::write(&unit_path, unit).map_err(|error| format!("{}: {error}", unit_path.display()))?;
    let output = Command::new("g++")
        .args(&flags)
        .args(["-include", "cuda_cpu.h", "-I"])
        .arg(kernels_folder().join("shim"))
        .arg("-I")
        .arg(kernels_folder().join("cuda"))
        .arg(&unit_path)
        .arg("-o")
        .arg(&fresh)
        .output()
        .map_err(|error| format!("g++: {error}"))?;
    if !output.status.success() {
        return Err(format!("g++ refuses {file}.cu:\n{}", String::from_utf8_lossy(&output.stderr)));
    }
    std::fs::remove_file(&unit_path).and_then(|()| std::fs::rename(&fresh, &library)).map_err(|e| e.to_string())?;
    Ok(library)
}

/// Whether kernels are compiled with the sanitizers.
pub fn sanitized() -> bool {
    std::env::var_os(SANITIZE_VARIABLE).is_some()
}

/// Of all that goes into a library.
fn fingerprint(unit: &str, flags: &[String]) -> u64 {
    let mut hasher = DefaultHasher::new();
    (unit, flags).hash(&mut hasher);
    for folder in ["cuda", "shim"] {
        let entries = std::fs::read_dir(kernels_folder().join(folder)).expect("the folder is there");
        let files = entries.flatten().map(|entry| entry.path()).filter(|path| path.is_file());
        let mut paths: Vec<PathBuf> = files.collect();
        paths.sort();
        for path in paths {
            std::fs::read(path).expect("readable").hash(&mut hasher);
        }
    }
    hasher.finish()
}
