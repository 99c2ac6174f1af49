//! The C interface of ns-llm: everything in `include/ns_llm.h`, and nothing else, is exported from here.
//!
//! This crate converts and calls. It holds no policy: defaults, ranges and limits are the engine's. What it adds is
//! what C needs and Rust does not: ids in place of references ([`handle`]), parameter structs that may be older or
//! newer than the library ([`params`]), a border that no panic crosses ([`panic`]), and the thread that calls C back
//! ([`dispatcher`], [`callback`]).
//!
//! The chapters of the header are [`version`], [`status`], [`text`], [`engine`](mod@engine), [`event`], [`request`] and
//! [`tokenizer`], in this order; their doc comments are the manual, so they speak to a C programmer. Types and
//! constants that C sees carry their C names here too, so that one search finds both sides.

// C names are not Rust's; see above.
#![allow(non_camel_case_types)]

mod callback;
mod dispatcher;
mod handle;
mod panic;
mod params;

pub mod engine;
pub mod event;
pub mod request;
pub mod status;
pub mod text;
pub mod tokenizer;
pub mod version;
