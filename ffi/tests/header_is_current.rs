//! `include/ns_llm.h` is written from the doc comments of this crate; here it is written again and compared.
//! `NS_LLM_UPDATE_HEADER=1 cargo test -p ns-llm-ffi --test header_is_current` puts the new text in its place.
//!
//! The header is a book: a front page, then one chapter per source file in the order of [`CHAPTERS`], each with the
//! `//!` of the file as its introduction, types before functions. (cbindgen alone would put all types of all chapters
//! first.)

#[path = "support/project.rs"]
mod support;

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use support::{crate_dir, header_path};

/// Source files whose public items C sees, in reading order.
const CHAPTERS: &[&str] = &[
    "version",
    "status",
    "text",
    "log",
    "engine",
    "figures",
    "responses",
    "event",
    "request",
    "embedding",
    "tokenizer",
];

const FRONT_PAGE: &str = include_str!("../header/front_page.txt");

const OPENING: &str = "#ifndef NS_LLM_H
#define NS_LLM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern \"C\" {
#endif
";

const CLOSING: &str = "
#ifdef __cplusplus
} /* extern \"C\" */
#endif

#endif /* NS_LLM_H */
";

/// The whole header as it should be.
fn header() -> String {
    let config = cbindgen::Config::from_file(crate_dir().join("cbindgen.toml")).unwrap();
    let mut header = format!("{}\n{OPENING}", comment(FRONT_PAGE.lines()));
    for chapter in CHAPTERS {
        let source = crate_dir().join(format!("src/{chapter}.rs"));
        header.push_str(&introduction(&source));
        if *chapter == "version" {
            header.push_str(&version_macros());
        }
        header.push_str(&chapter_body(&source, &config));
    }
    header + CLOSING
}

/// The `//!` lines at the top of a file, as a comment under a rule.
fn introduction(source: &Path) -> String {
    let text = fs::read_to_string(source).unwrap();
    let lines: Vec<&str> = text.lines().map_while(|line| line.strip_prefix("//!")).map(str::trim).collect();
    let (title, rest) = lines.split_first().expect("a chapter has an introduction");
    let title = title.strip_prefix("# ").expect("an introduction begins with a title");
    let rule = format!("{title} {}", "-".repeat(110 - title.len()));
    format!("\n{}\n", comment(std::iter::once(rule.as_str()).chain(rest.iter().copied())))
}

fn comment<'a>(lines: impl Iterator<Item = &'a str>) -> String {
    let body: String = lines.fold(String::new(), |mut body, line| {
        writeln!(body, "{}", format!(" * {line}").trim_end()).unwrap();
        body
    });
    format!("/*\n{body} */\n")
}

/// The version as macros, computed from the package's version: cbindgen cannot evaluate it.
fn version_macros() -> String {
    let [major, minor, patch] =
        [env!("CARGO_PKG_VERSION_MAJOR"), env!("CARGO_PKG_VERSION_MINOR"), env!("CARGO_PKG_VERSION_PATCH")];
    format!(
        "/** The version of this header. */
#define NS_LLM_VERSION_MAJOR {major}
#define NS_LLM_VERSION_MINOR {minor}
#define NS_LLM_VERSION_PATCH {patch}

/** The version of this header as one number, which grows with the version. */
#define NS_LLM_VERSION_NUMBER (NS_LLM_VERSION_MAJOR * 1000000 + NS_LLM_VERSION_MINOR * 1000 + NS_LLM_VERSION_PATCH)

/** What this header and the library must have in common; see above. */
#define NS_LLM_ABI_VERSION (NS_LLM_VERSION_MAJOR == 0 ? NS_LLM_VERSION_MINOR : NS_LLM_VERSION_MAJOR * 1000)

"
    )
}

/// Types, constants and functions of one file, in C.
fn chapter_body(source: &Path, config: &cbindgen::Config) -> String {
    let mut config = config.clone();
    // cbindgen leaves out what no function of the same file uses; in a book of chapters that is a mistake.
    config.export.include = public_types(source);
    let bindings = cbindgen::Builder::new().with_config(config).with_src(source).generate().unwrap();
    let mut body = Vec::new();
    bindings.write(&mut body);
    // What Rust calls a safety section is, to a C programmer, what the call relies on.
    let body = String::from_utf8(body).unwrap().replace(" * # Safety\n", " * The caller promises:\n");
    on_one_line(body.trim_start())
}

/// Names of the public structs, enumerations and aliases in a file.
fn public_types(source: &Path) -> Vec<String> {
    let text = fs::read_to_string(source).unwrap();
    let declared = text.lines().filter_map(|line| {
        let rest = ["pub struct ", "pub enum ", "pub type "].iter().find_map(|keyword| line.strip_prefix(keyword))?;
        rest.split([' ', '<', ';']).next()
    });
    declared.map(str::to_string).collect()
}

/// Comments of one sentence take one line, not three.
fn on_one_line(body: &str) -> String {
    let lines: Vec<&str> = body.lines().collect();
    let mut short = String::new();
    let mut rest = lines.as_slice();
    while let [line, tail @ ..] = rest {
        rest = tail;
        match tail {
            [sentence, end, after @ ..] if line.trim() == "/**" && end.trim() == "*/" => {
                writeln!(short, "{line}{} */", sentence.trim_start().trim_start_matches('*')).unwrap();
                rest = after;
            }
            _ => writeln!(short, "{line}").unwrap(),
        }
    }
    short
}

/// The committed header is what the sources say now: both are compared line by line.
#[test]
fn committed_header_is_current() {
    let current = header();
    if std::env::var_os("NS_LLM_UPDATE_HEADER").is_some() {
        fs::create_dir_all(header_path().parent().unwrap()).unwrap();
        fs::write(header_path(), &current).unwrap();
    }
    let committed = fs::read_to_string(header_path()).unwrap_or_default();
    if let Some(line) = (0..).zip(current.lines().zip(committed.lines())).find(|(_, (new, old))| new != old) {
        panic!(
            "include/ns_llm.h is not current from line {}: {:?}; see NS_LLM_UPDATE_HEADER above",
            line.0 + 1,
            line.1
        );
    }
    assert_eq!(current.len(), committed.len(), "include/ns_llm.h is not current at its end");
}

/// Each exported function is in the book, and says what a reader must know: its comment is looked through.
#[test]
fn every_function_is_described() {
    let header = header();
    let functions = support::declared_functions(&header);
    assert!(functions.len() >= 12, "{functions:?}");
    for function in &functions {
        let comment = comment_before(&header, function);
        assert!(comment.contains("Threads:"), "{function} does not speak of threads:\n{comment}");
        assert!(
            comment.contains("Returns:") || comment.contains("Cannot fail"),
            "{function} does not say what it returns:\n{comment}"
        );
    }
    for rust in ["# Safety", "Option<", "usize", "u64", "fn("] {
        assert!(!header.contains(rust), "{rust:?} is no C");
    }
}

/// The comment above the declaration of `function`.
fn comment_before(header: &str, function: &str) -> String {
    let lines: Vec<&str> = header.lines().collect();
    let declares = |line: &&str| !line.starts_with([' ', '/']) && line.contains(&format!("{function}("));
    let declaration = lines.iter().position(declares).expect("the function is declared");
    let start = lines[..declaration].iter().rposition(|line| line.starts_with("/**")).expect("it has a comment");
    lines[start..declaration].join("\n")
}
