//! The C interface as C programs use it: the header compiles as C11 and C++17 with every warning an error, the library
//! exports what the header declares and nothing else, and the programs in `c/` run to their end, linked shared and
//! static, and under valgrind where there is one.

#[path = "support/programs.rs"]
mod programs;
#[path = "support/project.rs"]
mod support;

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

use programs::{Linkage, WARNINGS, build, c_source, run, run_under_valgrind, scratch, succeed};
use support::{crate_dir, declared_functions, header_path, library_dir};

/// No struct of the header has a hole or a tail of padding, which an older program would leave undefined and a newer
/// library would take for a field: the compiler is asked.
#[test]
fn structs_have_no_padding() {
    let mut command = Command::new("cc");
    command.args(["-x", "c", "-std=c11", "-fsyntax-only", "-Wpadded"]).args(WARNINGS).arg(header_path());
    succeed(&mut command);
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
fn a_whole_program_works_with_the_shared_library() {
    run("smoke.c", Linkage::Shared, &["48"]);
}

/// The same program works against the static library, which needs nothing beside the system's own libraries.
#[test]
fn a_whole_program_works_with_the_static_library() {
    run("smoke.c", Linkage::Static, &["8"]);
}

/// Events that the program fetches by itself: `c/fetch.c`.
#[test]
fn events_are_fetched() {
    run("fetch.c", Linkage::Shared, &["24"]);
}

/// Vectors, all at once and one by one: `c/vectors.c`.
#[test]
fn texts_become_vectors() {
    run("vectors.c", Linkage::Shared, &[]);
}

/// What an engine says about itself, its log too: `c/figures.c`.
#[test]
fn engines_give_their_figures() {
    run("figures.c", Linkage::Shared, &[]);
}

/// Answers that are kept and given again: `c/responses.c`.
#[test]
fn answers_are_kept() {
    run("responses.c", Linkage::Shared, &[]);
}

/// KV is found again by the next engine over the same directory: `c/kv_cache.c`.
#[test]
fn kv_outlives_its_engine() {
    let folder = std::env::temp_dir().join(format!("ns-llm-c-kv-{}", std::process::id()));
    run("kv_cache.c", Linkage::Shared, &[folder.to_str().expect("UTF-8")]);
    fs::remove_dir_all(&folder).expect("it was made");
}

/// Loading the shared library and using it writes nothing and changes nothing in the process: `c/loading.c` looks before
/// and after; its output is its own word alone.
#[test]
fn loading_changes_nothing() {
    let program = build(&c_source("loading.c"), Linkage::None);
    let output = succeed(Command::new(program).arg(library_dir().join("libns_llm.so")));
    assert_eq!((output.stdout.as_slice(), output.stderr.as_slice()), (b"ok\n".as_slice(), b"".as_slice()));
}

/// Many threads on one engine: `c/threads.c` checks that each request ends once, with the same story.
#[test]
fn threads_share_an_engine() {
    run("threads.c", Linkage::Shared, &["16", "6"]);
}

/// Every function from 64 threads at once, on handles that they free under each other's feet: `c/storm.c`, under a time
/// limit. (Not under helgrind: it does not know the locks of Rust's standard library.)
#[test]
fn a_storm_of_calls_is_survived() {
    run("storm.c", Linkage::Shared, &["64", "120"]);
}

/// Freeing in any order from any place neither hangs nor loses an end: `c/lifetime.c`, under a time limit.
#[test]
fn lifetimes_end_in_any_order() {
    run("lifetime.c", Linkage::Shared, &["1000"]);
}

/// Wrong calls are told what is wrong, and other versions' structs are understood: `c/misuse.c`.
#[test]
fn misuse_is_answered() {
    run("misuse.c", Linkage::Shared, &["8"]);
}

/// A whole program touches no memory that is not its own, and leaks none.
#[test]
#[cfg_attr(not(has_valgrind), ignore = "needs valgrind")]
fn smoke_is_clean_under_valgrind() {
    run_under_valgrind(&c_source("smoke.c"), &["4", "no-chat"]);
}

/// Neither do wrong calls.
#[test]
#[cfg_attr(not(has_valgrind), ignore = "needs valgrind")]
fn misuse_is_clean_under_valgrind() {
    run_under_valgrind(&c_source("misuse.c"), &["4"]);
}

/// Neither do fetched events, whose memory the library keeps between two calls.
#[test]
#[cfg_attr(not(has_valgrind), ignore = "needs valgrind")]
fn fetching_is_clean_under_valgrind() {
    run_under_valgrind(&c_source("fetch.c"), &["4"]);
}

/// Neither do vectors.
#[test]
#[cfg_attr(not(has_valgrind), ignore = "needs valgrind")]
fn vectors_are_clean_under_valgrind() {
    run_under_valgrind(&c_source("vectors.c"), &["short"]);
}
