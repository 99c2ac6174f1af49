//! The C interface of ns-llm: everything in `include/ns_llm.h`, and nothing else, is exported from here.
//!
//! This crate converts and calls. It holds no policy: defaults, ranges and limits are the engine's. What it adds is what
//! C needs and Rust does not: ids in place of references ([`handle`]), refusals in a forked child ([`process`]),
//! parameter structs that may be older or newer than the library ([`params`]), a border that no panic crosses ([`panic`],
//! [`failure`]), the thread that calls C back ([`dispatcher`], [`callback`]), and a request that waits for its reader
//! ([`live_request`]).
//!
//! The chapters of the header are [`version`], [`status`], [`text`], [`log`], [`engine`](mod@engine), [`figures`],
//! [`responses`], [`event`], [`request`], [`embedding`] and [`tokenizer`], in this order; their doc comments are the
//! manual, so they speak to a C programmer. Types and constants that C sees carry their C names here too, so that one
//! search finds both sides.
//!
//! Who may name whom goes one way, from the last of these to the first: `panic`, `status`, `failure`, `text` and `params`,
//! `process`, `handle` and `callback`, `log`, `event`, `live_request`, `dispatcher`, `engine`, and the chapters that use an engine.

// C names are not Rust's; see above.
#![allow(non_camel_case_types)]

mod callback;
mod dispatcher;
mod failure;
mod handle;
mod live_request;
mod panic;
mod params;
mod process;

pub mod embedding;
pub mod engine;
pub mod event;
pub mod figures;
pub mod log;
pub mod request;
pub mod responses;
pub mod status;
pub mod text;
pub mod tokenizer;
pub mod version;

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    /// Modules of this crate name each other one way only: their `use` lines are read, and each module is put above all
    /// that it names.
    #[test]
    fn modules_have_no_circle() {
        let mut uses: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for entry in std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/src")).unwrap() {
            let path = entry.unwrap().path();
            let source = std::fs::read_to_string(&path).unwrap();
            let code = source.split("\n#[cfg(test)]").next().unwrap_or_default();
            let named = code.lines().filter_map(|line| line.strip_prefix("use crate::")?.split("::").next());
            let module = path.file_stem().unwrap().to_string_lossy().into_owned();
            uses.insert(module, named.map(str::to_string).collect());
        }
        assert!(uses.len() > 10 && uses["request"].contains("engine"), "{uses:?}");
        let mut placed = BTreeSet::new();
        while placed.len() < uses.len() {
            let next = uses.iter().find(|(name, names)| !placed.contains(*name) && names.is_subset(&placed));
            let left = uses.keys().filter(|name| !placed.contains(*name)).collect::<Vec<_>>();
            placed.insert(next.unwrap_or_else(|| panic!("a circle among {left:?}")).0.clone());
        }
    }
}
