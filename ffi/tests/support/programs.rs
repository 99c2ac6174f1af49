//! C programs of the tests: built against the header and the library with every warning an error, and run with a limit.

#![allow(dead_code, reason = "each test program uses its own part")]

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::support::{crate_dir, header_path, library_dir};

const C11: &[&str] = &["-std=c11", "-D_POSIX_C_SOURCE=200809L"];
pub(crate) const WARNINGS: &[&str] = &["-Wall", "-Wextra", "-Wpedantic", "-Werror"];

/// A program that takes longer hangs. Alone on two cores the slowest, under valgrind, takes 10 s.
const TIME_LIMIT: Duration = Duration::from_secs(300);

/// How a program finds the library.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Linkage {
    Shared,
    Static,
    /// The program loads it by itself.
    None,
}

/// Folder of the model that ships.
pub(crate) fn model() -> PathBuf {
    crate_dir().join("../models/demo")
}

pub(crate) fn scratch(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(name)
}

/// Runs a command and fails with what it wrote when it does not succeed in time.
pub(crate) fn succeed(command: &mut Command) -> Output {
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let child = child.unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let watchdog = Watchdog::over(&child);
    let output = child.wait_with_output().unwrap();
    watchdog.finish(command);
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}: {}\n{stdout}\n{stderr}", output.status);
    output
}

/// Ends a process that hangs, so that the test fails and does not hang with it.
struct Watchdog {
    started: Instant,
    done: std::sync::mpsc::Sender<()>,
    thread: thread::JoinHandle<()>,
}

impl Watchdog {
    fn over(child: &Child) -> Watchdog {
        let process = child.id().to_string();
        let (done, waiting) = std::sync::mpsc::channel();
        let thread = thread::spawn(move || {
            if waiting.recv_timeout(TIME_LIMIT).is_err() {
                let _ = Command::new("kill").args(["-KILL", &process]).status();
            }
        });
        Watchdog { started: Instant::now(), done, thread }
    }

    fn finish(self, command: &Command) {
        let _ = self.done.send(());
        let _ = self.thread.join();
        assert!(self.started.elapsed() < TIME_LIMIT, "{command:?} did not end within {TIME_LIMIT:?}");
    }
}

/// Compiles one C source against the header and the library.
pub(crate) fn build(source: &Path, linkage: Linkage) -> PathBuf {
    let library = library_dir();
    let stem = source.file_stem().and_then(OsStr::to_str).expect("a source has a name");
    // Tests run at the same time, and two of them may build the same source.
    static NUM_BUILT: AtomicUsize = AtomicUsize::new(0);
    let program = scratch(&format!("{stem}-{linkage:?}-{}", NUM_BUILT.fetch_add(1, Ordering::Relaxed)));
    let mut compiler = Command::new("cc");
    compiler.args(C11).args(WARNINGS).args(["-g", "-O1", "-pthread", "-o"]).arg(&program).arg(source);
    compiler.arg("-I").arg(header_path().parent().unwrap()).arg("-I").arg(crate_dir().join("tests/c")).arg("-lm");
    match linkage {
        Linkage::Shared => {
            let run_path = format!("-Wl,-rpath,{}", library.display());
            compiler.arg("-L").arg(library).args(["-Wl,-Bdynamic", "-lns_llm", &run_path])
        }
        Linkage::None => compiler.arg("-ldl"),
        Linkage::Static => compiler.arg(library.join("libns_llm.a")).args(["-ldl", "-lm", "-lrt"]),
    };
    succeed(&mut compiler);
    program
}

pub(crate) fn c_source(name: &str) -> PathBuf {
    crate_dir().join("tests/c").join(name)
}

/// Builds a program and runs it on the model that ships.
pub(crate) fn run(source: &str, linkage: Linkage, arguments: &[&str]) -> Output {
    succeed(Command::new(build(&c_source(source), linkage)).arg(model()).args(arguments))
}

/// What valgrind looks for: no invalid access, no use of uninitialised memory, nothing lost.
pub(crate) const VALGRIND: &[&str] = &[
    "--quiet",
    "--error-exitcode=99",
    "--leak-check=full",
    "--errors-for-leak-kinds=definite",
    "--show-leak-kinds=definite",
];

/// Builds a program and runs it under valgrind, on the model that ships.
pub(crate) fn run_under_valgrind(source: &Path, arguments: &[&str]) {
    let mut valgrind = Command::new("valgrind");
    valgrind.args(VALGRIND).arg(build(source, Linkage::Shared)).arg(model()).args(arguments);
    // Valgrind knows the instructions of every machine that the portable kernels use.
    succeed(valgrind.env("NS_LLM_ISA", "portable"));
}
