//! What `ffi/install.sh` installs is a C library like any other: programs find it with pkg-config and with CMake, shared
//! and static, also after the folder was moved. The examples are built this way, with every warning an error, and run on
//! the model that ships.

#[path = "support/programs.rs"]
mod programs;
#[path = "support/project.rs"]
mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use programs::{model, scratch, succeed};
use support::{crate_dir, library_dir, soname};

/// Installs into a folder, and moves that: nothing may remember where it was.
fn install(name: &str) -> PathBuf {
    let (first, prefix) = (scratch(&format!("{name}-first")), scratch(name));
    for old in [&first, &prefix] {
        let _ = fs::remove_dir_all(old);
    }
    let mut script = Command::new(crate_dir().join("install.sh"));
    succeed(script.arg("--prefix").arg(&first).arg("--built").arg(library_dir()));
    fs::rename(&first, &prefix).unwrap();
    prefix
}

/// The installation that tests share.
fn prefix() -> &'static Path {
    static PREFIX: OnceLock<PathBuf> = OnceLock::new();
    PREFIX.get_or_init(|| install("prefix"))
}

/// The flags that pkg-config gives for what is installed.
fn pkg_config(arguments: &[&str]) -> Vec<String> {
    let mut command = Command::new("pkg-config");
    command.args(arguments).arg("ns_llm").env("PKG_CONFIG_PATH", prefix().join("lib/pkgconfig"));
    let output = succeed(&mut command);
    String::from_utf8(output.stdout).unwrap().split_whitespace().map(str::to_string).collect()
}

fn is_cpp(source: &Path) -> bool {
    source.extension().is_some_and(|extension| extension == "cpp")
}

/// Builds an example as its first lines say.
fn build_example(name: &str) -> PathBuf {
    let source = crate_dir().join("examples").join(name);
    let program = scratch(&format!("example-{}", name.replace('.', "-")));
    let (compiler, standard) = if is_cpp(&source) { ("c++", "-std=c++17") } else { ("cc", "-std=c11") };
    let mut command = Command::new(compiler);
    command.arg(standard).args(programs::WARNINGS).args(["-g", "-O1"]).arg(&source).arg("-o").arg(&program);
    command.args(pkg_config(&["--cflags", "--libs"]));
    succeed(command.arg(format!("-Wl,-rpath,{}", prefix().join("lib").display())));
    program
}

fn stdout_of(output: Output) -> String {
    String::from_utf8(output.stdout).expect("answers are UTF-8")
}

fn run_example(name: &str, arguments: &[&str]) -> String {
    stdout_of(succeed(Command::new(build_example(name)).arg(model()).args(arguments)))
}

/// Runs an example under valgrind, on the instructions that it knows.
fn run_example_under_valgrind(name: &str, arguments: &[&str]) {
    let mut valgrind = Command::new("valgrind");
    valgrind.args(programs::VALGRIND).arg(build_example(name)).arg(model()).args(arguments);
    succeed(valgrind.env("NS_LLM_ISA", "portable"));
}

/// `complete.c` prints its prompt and a story after it, the same as the library tells elsewhere.
#[test]
#[cfg_attr(not(has_pkg_config), ignore = "needs pkg-config")]
fn complete_tells_a_story() {
    let story = run_example("complete.c", &["Once upon a time", "24"]);
    assert!(story.starts_with("Once upon a time") && story.len() > 40, "{story}");
}

/// `stream.c` prints two answers in turns: their lines alternate, and each has an end.
#[test]
#[cfg_attr(not(has_pkg_config), ignore = "needs pkg-config")]
fn stream_tells_two_stories_at_once() {
    let lines = run_example("stream.c", &["Once upon a time", "The little dog"]);
    let speakers: Vec<&str> = lines.lines().filter_map(|line| line.split(':').next()).collect();
    let turns = speakers.windows(2).filter(|pair| pair[0] != pair[1]).count();
    assert!(turns > 4, "{lines}");
    assert_eq!(lines.matches("tokens\n").count(), 2, "{lines}");
}

/// `chat.cpp` answers a question, in C++.
#[test]
#[cfg_attr(not(has_pkg_config), ignore = "needs pkg-config")]
fn chat_answers() {
    let question = scratch("question.txt");
    fs::write(&question, "What is the capital of France?\n").unwrap();
    let mut command = Command::new("sh");
    command.args(["-c", "exec \"$0\" \"$1\" < \"$2\""]).arg(build_example("chat.cpp")).arg(model()).arg(&question);
    let answer = stdout_of(succeed(&mut command));
    assert!(answer.contains("Paris"), "{answer}");
}

/// `embed.c` prints a matrix whose diagonal is 1 and which is symmetric.
#[test]
#[cfg_attr(not(has_pkg_config), ignore = "needs pkg-config")]
fn embed_compares() {
    let table = run_example("embed.c", &["a red fox", "a quick fox"]);
    let rows: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().take(2).collect()).collect();
    assert_eq!((rows.len(), rows[0][0], rows[1][1]), (2, "1.000", "1.000"), "{table}");
    assert!(rows[0][1] == rows[1][0] && rows[0][1] != "1.000", "{table}");
}

/// The examples touch no memory that is not theirs, and leak none.
#[test]
#[cfg_attr(not(all(has_pkg_config, has_valgrind)), ignore = "needs pkg-config and valgrind")]
fn examples_are_clean_under_valgrind() {
    run_example_under_valgrind("complete.c", &["Once upon a time", "4"]);
    run_example_under_valgrind("embed.c", &["a fox", "a dog"]);
}

/// A program that is linked statically as pkg-config says needs no library of ours to run.
#[test]
#[cfg_attr(not(has_pkg_config), ignore = "needs pkg-config")]
fn static_flags_are_complete() {
    let program = scratch("example-static");
    let mut command = Command::new("cc");
    command.args(["-std=c11", "-O1"]).arg(crate_dir().join("examples/complete.c")).arg("-o").arg(&program);
    command.args(pkg_config(&["--cflags"])).arg(prefix().join("lib/libns_llm.a"));
    let private = pkg_config(&["--libs", "--static"]).into_iter().filter(|flag| flag != "-lns_llm");
    succeed(command.args(private));
    let story = stdout_of(succeed(Command::new(&program).arg(model()).args(["Once upon a time", "8"])));
    assert!(story.starts_with("Once upon a time"), "{story}");
    let needed = stdout_of(succeed(Command::new("ldd").arg(&program)));
    assert!(!needed.contains("ns_llm"), "{needed}");
}

/// The shared library carries the name that programs are told to look for, and pkg-config its version.
#[test]
#[cfg_attr(not(has_pkg_config), ignore = "needs pkg-config")]
fn names_carry_the_version() {
    assert_eq!(pkg_config(&["--modversion"]), [env!("CARGO_PKG_VERSION")]);
    let lib = prefix().join("lib");
    let dynamic = stdout_of(succeed(Command::new("readelf").arg("-d").arg(lib.join("libns_llm.so"))));
    assert!(dynamic.contains(&format!("[{}]", soname())), "{dynamic}");
    assert_eq!(fs::read_link(lib.join("libns_llm.so")).unwrap(), Path::new(&soname()));
}

/// What cannot be installed is said before anything is written.
#[test]
fn wrong_calls_are_refused() {
    let install = |arguments: &[&str]| {
        let output = Command::new(crate_dir().join("install.sh")).args(arguments).output().unwrap();
        assert!(!output.status.success(), "{arguments:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(install(&["--prefix", "relative"]).contains("absolute path"));
    assert!(install(&["--prefix"]).contains("needs a value"));
    assert!(install(&["--colour"]).contains("not an option"));
    let nowhere = scratch("nothing-built");
    fs::create_dir_all(&nowhere).unwrap();
    let built = nowhere.to_str().unwrap();
    assert!(install(&["--prefix", built, "--built", built]).contains("has no libns_llm.so"));
    assert_eq!(fs::read_dir(&nowhere).unwrap().count(), 0);
}

/// CMake finds the package, builds a C and a C++ program with its targets, and refuses another ABI version.
#[test]
#[cfg_attr(not(has_cmake), ignore = "needs CMake")]
fn cmake_finds_the_package() {
    let (source, build) = (crate_dir().join("tests/cmake"), scratch("cmake-build"));
    let _ = fs::remove_dir_all(&build);
    let configure = |wanted: &str| {
        let mut command = Command::new("cmake");
        command.arg("-S").arg(&source).arg("-B").arg(&build).arg(format!("-Dns_llm_WANTED={wanted}"));
        command.arg(format!("-DCMAKE_PREFIX_PATH={}", prefix().display()));
        command
    };
    assert!(!configure("99.0").output().unwrap().status.success(), "another ABI version was accepted");
    let _ = fs::remove_dir_all(&build);
    succeed(&mut configure(env!("CARGO_PKG_VERSION")));
    succeed(Command::new("cmake").arg("--build").arg(&build));
    for program in ["embed_shared", "embed_static"] {
        let table = stdout_of(succeed(Command::new(build.join(program)).arg(model()).args(["a fox", "a dog"])));
        assert!(table.contains("1.000"), "{program}: {table}");
    }
    assert!(build.join("chat").exists());
}
