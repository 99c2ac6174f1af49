//! What can be checked about the tree is a test, not a wish: who may import whom, what each file must say first, how long
//! it may be, who may say `unsafe`, and words that have no place in the project (STYLE.md, ARCHITECTURE.md).

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Longest source file, lines, its tests not counted. A table or one kernel may ask for an exemption here, by name.
const MAX_FILE_LINES: usize = 800;

/// Direct imports inside `engine/src`: a module and what it may name. Everything may use `error` and `config`.
const ENGINE_IMPORTS: &[(&str, &[&str])] = &[
    // The handle, and what makes it.
    (
        "engine",
        &[
            "command",
            "device",
            "embedding",
            "instruments",
            "intake",
            "memory_plan",
            "open",
            "request",
            "responses",
            "sampler",
            "stats",
            "stream",
            "text_model",
        ],
    ),
    ("inspect", &["backend", "device", "loader", "memory_plan", "model_files", "weight_levels"]),
    ("quantize", &["inspect", "loader", "model", "model_files", "tensor", "tokenizer", "weight_levels"]),
    (
        "open",
        &[
            "backend",
            "command",
            "device",
            "executor",
            "field_hash",
            "instruments",
            "intake",
            "kv_cache",
            "loader",
            "memory_plan",
            "model",
            "model_files",
            "request",
            "response_cache",
            "response_tiers",
            "responses",
            "scheduler",
            "stats",
            "storage",
            "text_model",
            "tier_thread",
            "weight_levels",
            "worker",
        ],
    ),
    // The threads.
    (
        "intake",
        &[
            "chat",
            "command",
            "embedding",
            "field_hash",
            "ids",
            "instruments",
            "request",
            "response_cache",
            "response_tiers",
            "responses",
            "sampler",
            "sequence",
            "stats",
            "stream",
            "text_model",
            "tokenizer",
        ],
    ),
    (
        "worker",
        &[
            "batch",
            "command",
            "executor",
            "ids",
            "instruments",
            "kv_cache",
            "request",
            "responses",
            "scheduler",
            "stats",
            "storage",
            "stream",
            "text_model",
            "tier_thread",
            "tokenizer",
            "trace",
        ],
    ),
    ("tier_thread", &["command", "kv_cache", "storage"]),
    ("command", &["embedding", "kv_cache", "request", "responses", "sequence", "storage", "stream", "tokenizer"]),
    ("stream", &["request"]),
    ("option_names", &["request"]),
    ("text_model", &["chat", "request", "tokenizer"]),
    // Whole answers: as they are shared, and as plain state.
    ("responses", &["ids", "request", "response_cache", "response_tiers", "stats", "storage"]),
    ("response_tiers", &["ids", "owner_ledger", "response_cache", "storage"]),
    ("response_cache", &["fair_lru", "field_hash", "ids", "request", "stats"]),
    // The core: numbers only.
    ("scheduler", &["batch", "ids", "kv_cache", "request", "sequence"]),
    ("kv_cache", &["fair_lru", "field_hash", "ids", "owner_ledger", "request", "sequence", "storage"]),
    ("fair_lru", &["ids"]),
    ("owner_ledger", &["ids"]),
    ("kv_cache_directory", &["storage"]),
    // Where records outlive the process: KV blocks and answers alike.
    ("storage", &["ids", "request"]),
    ("batch", &["ids", "request", "sequence"]),
    ("sequence", &["ids", "request"]),
    // Compute.
    ("executor", &["backend", "batch", "ids", "model", "stats"]),
    ("model", &["backend", "batch", "field_hash", "loader", "tensor"]),
    ("backend", &["batch", "ids", "sampler", "stats", "tensor"]),
    ("sampler", &["batch", "request"]),
    ("memory_plan", &["backend"]),
    ("device", &["backend"]),
    // Files and text.
    ("model_files", &["chat", "field_hash", "loader", "model", "tokenizer"]),
    ("weight_levels", &["backend", "device", "loader", "memory_plan", "model", "model_files", "tensor"]),
    ("loader", &["field_hash", "tensor"]),
    ("chat", &["request"]),
    ("tensor", &[]),
    ("tokenizer", &[]),
    ("embedding", &["request"]),
    ("ids", &[]),
    ("request", &[]),
    ("stats", &["request"]),
    ("trace", &[]),
    ("instruments", &["stats", "trace"]),
    ("config", &[]),
    ("error", &[]),
    ("field_hash", &[]),
];

struct Source {
    /// Relative to the repository, with `/`.
    path: String,
    text: String,
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("engine/ has a parent").to_path_buf()
}

fn sources(extensions: &[&str]) -> Vec<Source> {
    let root = repository();
    let mut found = Vec::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).expect("the tree is readable").flatten() {
            let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
            if path.is_dir() {
                if !matches!(name.as_str(), "target" | "node_modules" | "dist" | ".git" | ".cuda") {
                    folders.push(path);
                }
            } else if extensions.iter().any(|extension| name.ends_with(extension)) {
                let text = std::fs::read_to_string(&path).unwrap_or_default();
                let path = path.strip_prefix(&root).expect("found below the root").to_string_lossy().replace('\\', "/");
                found.push(Source { path, text });
            }
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    assert!(!found.is_empty(), "no source found below {}", root.display());
    found
}

/// The part of a Rust file before its unit tests.
fn without_tests(text: &str) -> &str {
    text.split("\n#[cfg(test)]").next().unwrap_or(text)
}

fn check(rule: &str, broken: Vec<String>) {
    assert!(broken.is_empty(), "{rule}:\n  {}", broken.join("\n  "));
}

/// Every Rust file opens with `//!`: a newcomer reads what it is before how it is done.
#[test]
fn every_file_says_what_it_is() {
    let broken = sources(&[".rs"]).into_iter().filter(|s| !s.text.starts_with("//!")).map(|s| s.path).collect();
    check("these files do not open with //!", broken);
}

/// Every file of device code and of the shim that runs it opens with `/**`; assembly is in two files, whose functions the
/// shim has twins of.
#[test]
fn device_code_says_what_it_is() {
    let mut broken = Vec::new();
    for source in sources(&[".cu", ".cuh", ".h"]).into_iter().filter(|s| s.path.starts_with("kernels/")) {
        if !source.text.starts_with("/**") {
            broken.push(format!("{} does not open with /**", source.path));
        }
        let has_assembly = source.text.contains("asm volatile") || source.text.contains("asm(");
        let homes = ["kernels/cuda/ptx.cuh", "kernels/cuda/sm90.cuh", "kernels/shim/fiber.h"];
        if has_assembly && !homes.contains(&source.path.as_str()) {
            broken.push(format!("{} has assembly", source.path));
        }
    }
    check("device code", broken);
}

/// No file outgrows what can be read in one sitting.
#[test]
fn no_file_is_too_long() {
    let broken = sources(&[".rs", ".ts", ".mjs", ".c", ".cu", ".cuh", ".h"])
        .into_iter()
        .filter(|s| s.path != "include/ns_llm.h") // generated: the comments of ffi/
        .map(|s| (without_tests(&s.text).lines().count(), s.path))
        .filter(|(lines, _)| *lines > MAX_FILE_LINES)
        .map(|(lines, path)| format!("{path}: {lines} lines"))
        .collect();
    check("these files are too long", broken);
}

/// Unsafe code lives in `kernels/`, `ffi/` and one file of the Node face.
#[test]
fn unsafe_has_an_address() {
    let broken = sources(&[".rs"])
        .into_iter()
        // A counting allocator is an unsafe trait.
        .filter(|s| {
            ![
                "kernels/",
                "ffi/",
                "bindings-node/src/event_loop.rs",
                "engine/tests/tidy.rs",
                "engine/tests/support/counting_allocator.rs",
            ]
            .iter()
            .any(|home| s.path.starts_with(home))
        })
        .filter(|s| {
            s.text.lines().any(|line| {
                ["unsafe {", "unsafe fn", "unsafe impl", "unsafe extern"].iter().any(|word| line.contains(word))
            })
        })
        .map(|s| s.path)
        .collect();
    check("unsafe outside kernels/, ffi/ and event_loop.rs", broken);
}

/// Only one page asks the CPU what it can do, and no code is chosen at compile time by CPU features.
#[test]
fn one_page_decides_cpu_features() {
    let broken = sources(&[".rs"])
        .into_iter()
        .filter(|s| s.path != "kernels/src/cpu/dispatch.rs" && s.path != "engine/tests/tidy.rs")
        .filter(|s| s.text.contains("_feature_detected!") || s.text.contains("cfg(target_feature"))
        .map(|s| s.path)
        .collect();
    check("CPU features are asked for outside dispatch.rs", broken);
}

/// Only `ffi/` exports C functions; only `kernels/` may name cudarc; no folder has a `mod.rs` or a `utils`.
#[test]
fn homes_are_kept() {
    let mut broken = Vec::new();
    for source in sources(&[".rs"]) {
        let code = &source.text;
        let is_home = |home: &str| source.path.starts_with(home) || source.path == "engine/tests/tidy.rs";
        let of_c = ["ffi/", "kernels/shim/", "bindings-node/src/event_loop.rs", "bindings-node/src/glibc.rs"];
        if code.contains("extern \"C\" fn ") && !of_c.into_iter().any(is_home) {
            broken.push(format!("{}: extern \"C\"", source.path));
        }
        if code.contains("cudarc::") && !is_home("kernels/") {
            broken.push(format!("{}: cudarc", source.path));
        }
        let name = source.path.rsplit('/').next().unwrap_or_default();
        if ["mod.rs", "utils.rs", "helpers.rs", "misc.rs", "common.rs"].contains(&name) {
            broken.push(format!("{}: a name that tells nothing", source.path));
        }
    }
    check("a home was left", broken);
}

/// Imports inside the engine go one way only (ARCHITECTURE.md, "Who may import whom").
#[test]
fn imports_go_one_way() {
    let mut broken = Vec::new();
    let mut seen = BTreeSet::new();
    for source in sources(&[".rs"]) {
        let Some(module) = source.path.strip_prefix("engine/src/").map(top_module) else { continue };
        if module == "lib" {
            continue;
        }
        seen.insert(module.clone());
        let allowed = ENGINE_IMPORTS.iter().find(|(name, _)| *name == module).map(|(_, allowed)| *allowed);
        let Some(allowed) = allowed else {
            broken.push(format!("{module}: not in the table"));
            continue;
        };
        for target in named_modules(without_tests(&source.text)) {
            if target != module
                && !["error", "config"].contains(&target.as_str())
                && !allowed.contains(&target.as_str())
            {
                broken.push(format!("{} -> {target}", source.path));
            }
        }
    }
    assert!(seen.len() > 10, "the modules were not found: {seen:?}");
    broken.sort();
    broken.dedup();
    check("imports that the table forbids", broken);
}

/// Scheduler and KV cache are plain state machines: no thread, clock, file or socket, and of the storage only its words. So
/// are the parts of the storage that both caches share.
#[test]
fn the_core_is_pure() {
    let pure = ["batch", "fair_lru", "kv_cache", "owner_ledger", "response_cache", "scheduler", "sequence"];
    let pure_files =
        ["breaker", "fault", "key", "tier", "unstored"].map(|file| format!("engine/src/storage/{file}.rs"));
    let foreign = ["std::thread", "std::fs", "std::net", "std::sync::mpsc", "Instant", "SystemTime"];
    let stores = ["storage::disk", "storage::remote"];
    let (mut broken, mut num_files) = (Vec::new(), 0);
    for source in sources(&[".rs"]) {
        let is_core = source.path.strip_prefix("engine/src/").is_some_and(|path| pure.contains(&&*top_module(path)));
        if !is_core && !pure_files.contains(&source.path) {
            continue;
        }
        num_files += 1;
        let code = without_tests(&source.text).lines().filter(|line| !line.trim_start().starts_with("//"));
        for line in code {
            let words = foreign.iter().chain(&stores).filter(|word| line.contains(*word));
            broken.extend(words.map(|word| format!("{}: {word}", source.path)));
        }
    }
    assert!(num_files > 30, "the core was not found: {num_files} files");
    check("the core is not pure", broken);
}

/// The table itself has no circle: every module can be put above all that it may use.
#[test]
fn the_table_has_no_circle() {
    let mut placed: BTreeSet<&str> = BTreeSet::new();
    while placed.len() < ENGINE_IMPORTS.len() {
        let next = ENGINE_IMPORTS
            .iter()
            .find(|(name, uses)| !placed.contains(name) && uses.iter().all(|target| placed.contains(target)));
        let rest: Vec<_> = ENGINE_IMPORTS.iter().map(|(name, _)| name).filter(|name| !placed.contains(*name)).collect();
        placed.insert(next.unwrap_or_else(|| panic!("a circle, or an unknown name, among {rest:?}")).0);
    }
}

/// `model/layers/mlp.rs` belongs to `model`.
fn top_module(path: &str) -> String {
    path.split('/').next().unwrap_or(path).trim_end_matches(".rs").to_string()
}

/// Modules named as `crate::module`, comments left out.
fn named_modules(code: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for line in code.lines().filter(|line| !line.trim_start().starts_with("//")) {
        for after in line.split("crate::").skip(1) {
            let name: String = after.chars().take_while(|c| c.is_ascii_lowercase() || *c == '_').collect();
            if !name.is_empty() {
                found.insert(name);
            }
        }
        // `use crate::{a, b::c}` on one line
        if let Some(list) = line.split("crate::{").nth(1) {
            for part in list.split([',', '}']) {
                let name: String = part.trim().chars().take_while(|c| c.is_ascii_lowercase() || *c == '_').collect();
                if !name.is_empty() {
                    found.insert(name);
                }
            }
        }
    }
    found
}

/// The codes of the engine's errors are listed in the types of the Node face (the C face has a test of its own).
#[test]
fn error_codes_are_typed_in_every_face() {
    let text = |path: &str| std::fs::read_to_string(repository().join(path)).expect("the file is there");
    let (errors, types) = (text("engine/src/error.rs"), text("bindings-node/lib/errors.ts"));
    let codes: Vec<&str> = errors
        .lines()
        .filter(|line| line.trim_start().starts_with("Error::") && line.contains("=> \""))
        .filter_map(|line| line.split('"').nth(1))
        .collect();
    assert!(codes.len() >= 20, "{codes:?}");
    let missing = codes.iter().filter(|code| !types.contains(&format!("'{code}'"))).map(|code| code.to_string());
    check("error codes that errors.ts does not know", missing.collect());
}

/// Words and paths that have no place in the project.
#[test]
fn the_project_speaks_of_itself() {
    // Split, so that this list does not find itself.
    let banned = [
        ["TO", "DO:"].concat() + " later",
        ["FIX", "ME"].concat(),
        ["X", "XX"].concat(),
        ["todo", "!("].concat(),
        ["unimpl", "emented!("].concat(),
    ];
    let broken = sources(&[".rs", ".ts", ".mjs", ".c", ".h", ".md", ".py"])
        .into_iter()
        .flat_map(|source| {
            let banned = &banned;
            source
                .text
                .lines()
                .enumerate()
                .filter(|(_, line)| banned.iter().any(|word| line.contains(word.as_str())))
                .map(|(number, _)| format!("{}:{}", source.path, number + 1))
                .collect::<Vec<_>>()
        })
        .collect();
    check("unfinished marks", broken);
}
