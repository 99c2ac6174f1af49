//! The C interface as C programs use it: the header compiles as C11 and C++17 with every warning an error, the library
//! exports what the header declares and nothing else, and the programs in `c/` run to their end, linked shared and
//! static, and under valgrind where there is one.

#[path = "support/project.rs"]
mod support;

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use support::{crate_dir, declared_functions, header_path, library_dir};

const C11: &[&str] = &["-std=c11", "-D_POSIX_C_SOURCE=200809L"];
const WARNINGS: &[&str] = &["-Wall", "-Wextra", "-Wpedantic", "-Werror"];

/// A program that takes longer hangs. Alone on two cores the slowest, under valgrind, takes 10 s.
const TIME_LIMIT: Duration = Duration::from_secs(300);

/// How a program finds the library.
#[derive(Clone, Copy, Debug)]
enum Linkage {
    Shared,
    Static,
}

/// Folder of the model that ships.
fn model() -> PathBuf {
    crate_dir().join("../models/demo")
}

fn scratch(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(name)
}

/// Runs a command and fails with what it wrote when it does not succeed in time.
fn succeed(command: &mut Command) -> Output {
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
fn build(source: &Path, linkage: Linkage) -> PathBuf {
    let library = library_dir();
    let stem = source.file_stem().and_then(OsStr::to_str).expect("a source has a name");
    // Tests run at the same time, and two of them may build the same source.
    static NUM_BUILT: AtomicUsize = AtomicUsize::new(0);
    let program = scratch(&format!("{stem}-{linkage:?}-{}", NUM_BUILT.fetch_add(1, Ordering::Relaxed)));
    let mut compiler = Command::new("cc");
    compiler.args(C11).args(WARNINGS).args(["-g", "-O1", "-pthread", "-o"]).arg(&program).arg(source);
    compiler.arg("-I").arg(header_path().parent().unwrap());
    match linkage {
        Linkage::Shared => {
            let run_path = format!("-Wl,-rpath,{}", library.display());
            compiler.arg("-L").arg(library).args(["-Wl,-Bdynamic", "-lns_llm", &run_path])
        }
        Linkage::Static => compiler.arg(library.join("libns_llm.a")).args(["-ldl", "-lm", "-lrt"]),
    };
    succeed(&mut compiler);
    program
}

fn c_source(name: &str) -> PathBuf {
    crate_dir().join("tests/c").join(name)
}

/// Builds a program and runs it on the model that ships.
fn run(source: &str, linkage: Linkage, arguments: &[&str]) -> Output {
    succeed(Command::new(build(&c_source(source), linkage)).arg(model()).args(arguments))
}

/// The header alone is a whole C11 and a whole C++17 program, without a warning.
#[test]
fn header_compiles_as_c_and_cpp() {
    for (compiler, language, standard) in [("cc", "c", "-std=c11"), ("c++", "c++", "-std=c++17")] {
        let source = scratch(&format!("header_alone.{language}"));
        fs::write(&source, "#include \"ns_llm.h\"\n#include \"ns_llm.h\"\nint main(void) { return NS_LLM_OK; }\n")
            .unwrap();
        let mut command = Command::new(compiler);
        command.args(["-x", language, standard, "-fsyntax-only"]).args(WARNINGS).arg(&source);
        succeed(command.arg("-I").arg(header_path().parent().unwrap()));
    }
}

/// What the shared library exports is what the header declares: the symbol table is compared with the header's
/// functions.
#[test]
fn exports_are_the_headers_functions() {
    let output = succeed(Command::new("nm").args(["-D", "--defined-only"]).arg(library_dir().join("libns_llm.so")));
    let table = String::from_utf8(output.stdout).unwrap();
    let exported: BTreeSet<&str> = table.lines().filter_map(|line| line.split_whitespace().nth(2)).collect();
    let header = fs::read_to_string(header_path()).unwrap();
    let declared = declared_functions(&header);
    assert!(declared.len() >= 12, "{declared:?}");
    assert_eq!(exported, declared.iter().map(String::as_str).collect());
}

/// Nobody escapes the misuse test: each declared function is called there.
#[test]
fn misuse_calls_every_function() {
    let program = fs::read_to_string(c_source("misuse.c")).unwrap() + &fs::read_to_string(c_source("check.h")).unwrap();
    for function in declared_functions(&fs::read_to_string(header_path()).unwrap()) {
        let harmless = ["ns_llm_version", "ns_llm_version_number"];
        assert!(harmless.contains(&function.as_str()) || program.contains(&format!("{function}(")), "{function}");
    }
}

/// The program on the front page of the header is compiled as it stands there, and tells a story.
#[test]
fn front_page_program_tells_a_story() {
    let header = fs::read_to_string(header_path()).unwrap();
    let (front_page, _) = header.split_once("*/").unwrap();
    let body: String =
        front_page.lines().filter_map(|line| line.strip_prefix(" *     ")).flat_map(|l| [l, "\n"]).collect();
    assert!(body.contains("int main"), "{body}");
    let source = scratch("front_page.c");
    fs::write(&source, format!("#include <stdio.h>\n#include \"ns_llm.h\"\n{body}")).unwrap();
    let output = succeed(Command::new(build(&source, Linkage::Shared)).current_dir(crate_dir().join("..")));
    assert!(output.stdout.len() > 20, "{:?}", String::from_utf8_lossy(&output.stdout));
}

/// A whole program works against the shared library: `c/smoke.c` checks each answer.
#[test]
fn smoke_runs_shared() {
    run("smoke.c", Linkage::Shared, &["48"]);
}

/// The same program works against the static library, which needs nothing beside the system's own libraries.
#[test]
fn smoke_runs_static() {
    run("smoke.c", Linkage::Static, &["8"]);
}

/// Many threads on one engine: `c/threads.c` checks that each request ends once, with the same story.
#[test]
fn threads_share_an_engine() {
    run("threads.c", Linkage::Shared, &["16", "6"]);
}

/// Freeing in any order from any place neither hangs nor loses an end: `c/lifetime.c`, under a time limit.
#[test]
fn lifetimes_end_in_any_order() {
    run("lifetime.c", Linkage::Shared, &["50"]);
}

/// Wrong calls are answered with a status: `c/misuse.c` makes some thousands of them.
#[test]
fn misuse_is_answered() {
    run("misuse.c", Linkage::Shared, &["8"]);
}

/// Runs a program under valgrind: no invalid access, no use of uninitialised memory, nothing lost.
fn run_under_valgrind(source: &str, arguments: &[&str]) {
    let program = build(&c_source(source), Linkage::Shared);
    let mut valgrind = Command::new("valgrind");
    valgrind.args([
        "--quiet",
        "--error-exitcode=99",
        "--leak-check=full",
        "--errors-for-leak-kinds=definite",
        "--show-leak-kinds=definite",
    ]);
    valgrind.arg(program).arg(model()).args(arguments);
    // Valgrind knows the instructions of every machine that the portable kernels use.
    succeed(valgrind.env("NS_LLM_ISA", "portable"));
}

/// A whole program touches no memory that is not its own, and leaks none.
#[test]
#[cfg_attr(not(has_valgrind), ignore = "needs valgrind")]
fn smoke_is_clean_under_valgrind() {
    run_under_valgrind("smoke.c", &["4", "no-chat"]);
}

/// Neither do wrong calls.
#[test]
#[cfg_attr(not(has_valgrind), ignore = "needs valgrind")]
fn misuse_is_clean_under_valgrind() {
    run_under_valgrind("misuse.c", &["4"]);
}
