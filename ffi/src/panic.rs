//! The border between Rust and C. A panic that reached an `extern "C"` function would abort the process; every exported
//! function therefore runs its whole body inside [`boundary`](crate::failure::boundary), which turns a panic into
//! `NS_LLM_INTERNAL`, or inside [`boundary_or`] where there is no status to return. A test of this crate reads the sources
//! and finds the function that does not; another injects a panic into every one.
//!
//! What this cannot catch: exhausted memory, an overflowing stack, a second panic while the first unwinds. The engine
//! bounds its sizes and recursion so that they do not happen.

use std::panic::{AssertUnwindSafe, catch_unwind};

use ns_llm_core::panic_text;

#[cfg(not(panic = "unwind"))]
compile_error!("the C interface promises that no panic ends the process: build it with panic = \"unwind\"");

/// Runs `body`; a panic is what it said.
pub(crate) fn caught<T>(body: impl FnOnce() -> T) -> Result<T, String> {
    // Unwind safety: what a panic may leave half done is behind locks whose poison is ignored only where each critical
    // section is one assignment (see `handle` and `dispatcher`); nothing else outlives the call.
    catch_unwind(AssertUnwindSafe(|| {
        #[cfg(test)]
        injection::strike();
        body()
    }))
    .map_err(|panic| panic_text(&*panic))
}

/// Runs the body of an exported function that has no status; `fallback` is returned in place of a panic.
pub(crate) fn boundary_or<T>(fallback: T, body: impl FnOnce() -> T) -> T {
    caught(body).unwrap_or(fallback)
}

#[cfg(test)]
pub(crate) mod injection {
    //! Panics where a test wants them: in the next guarded body on this thread.

    use std::cell::Cell;

    thread_local! {
        static ARMED: Cell<bool> = const { Cell::new(false) };
    }

    /// The next guarded body on this thread panics.
    pub(crate) fn arm() {
        ARMED.set(true);
    }

    /// Whether nobody panicked since [`arm`]; disarms.
    pub(crate) fn is_still_armed() -> bool {
        ARMED.replace(false)
    }

    pub(super) fn strike() {
        if ARMED.replace(false) {
            panic!("injected {}", 7);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::ffi::{CStr, c_char};
    use std::ptr::{null, null_mut};

    use super::injection;
    use crate::status::ns_llm_status::NS_LLM_INTERNAL;
    use crate::{embedding::*, engine::*, figures::*, request::*, responses::*, status::*, tokenizer::*, version::*};

    /// The sources of this crate after each `#[unsafe(no_mangle)]`.
    fn exported_functions() -> Vec<String> {
        let mut functions = Vec::new();
        for entry in std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/src")).unwrap() {
            let source = std::fs::read_to_string(entry.unwrap().path()).unwrap();
            functions.extend(source.split("#[unsafe(no_mangle)]\npub ").skip(1).map(str::to_string));
        }
        assert!(functions.len() >= 20, "found only {} exported functions", functions.len());
        functions
    }

    /// No exported function can unwind into C: each body in the sources of this crate starts with a boundary.
    #[test]
    fn every_exported_body_is_inside_a_boundary() {
        for function in exported_functions() {
            let name = function.lines().next().unwrap_or_default();
            let body = function.split_once("{\n").expect("a function has a body").1.trim_start();
            assert!(body.starts_with("boundary(") || body.starts_with("boundary_or("), "{name}: {body:.60}");
        }
    }

    /// A panic in a body is `NS_LLM_INTERNAL` with its text, and the next call on the thread works: injected into every
    /// function that has a status. The names are compared with the sources, so that none is left out.
    #[test]
    fn every_exported_function_contains_a_panic() {
        let mut tested = BTreeSet::new();
        let mut contains = |name: &'static str, call: &dyn Fn() -> ns_llm_status| {
            injection::arm();
            assert_eq!(call(), NS_LLM_INTERNAL, "{name}");
            assert!(!injection::is_still_armed(), "{name} has no boundary");
            // SAFETY: NULL for the size is allowed; the text is NUL-terminated and lives until this thread fails again.
            let text = unsafe { CStr::from_ptr(ns_llm_last_error(null_mut())) };
            assert_eq!(text.to_str().unwrap(), "panic: injected 7", "{name}");
            assert_ne!(call(), NS_LLM_INTERNAL, "{name} did not recover");
            tested.insert(name.to_string());
        };
        // SAFETY: every pointer is NULL, which each function allows or refuses.
        unsafe {
            contains("ns_llm_engine_open", &|| ns_llm_engine_open(null(), null_mut()));
            contains("ns_llm_engine_free", &|| ns_llm_engine_free(0));
            contains("ns_llm_engine_info", &|| ns_llm_engine_info(0, null_mut()));
            contains("ns_llm_engine_stats", &|| ns_llm_engine_stats(0, null_mut()));
            contains("ns_llm_engine_memory", &|| ns_llm_engine_memory(0, null_mut()));
            contains("ns_llm_engine_health", &|| ns_llm_engine_health(0));
            contains("ns_llm_engine_flush", &|| ns_llm_engine_flush(0));
            contains("ns_llm_engine_clear_prefix_cache", &|| ns_llm_engine_clear_prefix_cache(0));
            contains("ns_llm_engine_kv_tier", &|| ns_llm_engine_kv_tier(0, 0, null_mut()));
            contains("ns_llm_responses_stats", &|| ns_llm_responses_stats(0, null_mut()));
            contains("ns_llm_responses_invalidate", &|| ns_llm_responses_invalidate(0, null(), 0, null_mut()));
            contains("ns_llm_responses_clear", &|| ns_llm_responses_clear(0));
            contains("ns_llm_generate", &|| ns_llm_generate(0, null(), None, null_mut(), null_mut()));
            contains("ns_llm_request_next", &|| ns_llm_request_next(0, 0, null_mut()));
            contains("ns_llm_request_wait", &|| ns_llm_request_wait(0, 0, null_mut()));
            contains("ns_llm_request_cancel", &|| ns_llm_request_cancel(0));
            contains("ns_llm_request_free", &|| ns_llm_request_free(0));
            contains("ns_llm_embed", &|| ns_llm_embed(0, null(), null_mut(), 0, null_mut(), null_mut()));
            contains("ns_llm_submit_embedding", &|| ns_llm_submit_embedding(0, null(), None, null_mut(), null_mut()));
            contains("ns_llm_tokenize", &|| ns_llm_tokenize(0, null(), 0, 0, null_mut(), 0, null_mut()));
            contains("ns_llm_detokenize", &|| ns_llm_detokenize(0, null(), 0, null_mut(), 0, null_mut()));
        }
        let has_status = |function: &&String| function.contains(") -> ns_llm_status {");
        let name = |function: &String| {
            function.split("fn ").nth(1).and_then(|rest| rest.split('(').next()).unwrap_or_default().to_string()
        };
        let expected: BTreeSet<String> = exported_functions().iter().filter(has_status).map(name).collect();
        assert_eq!(tested, expected);
    }

    /// Functions without a status give something harmless in place of a panic.
    #[test]
    fn functions_without_a_status_contain_a_panic() {
        let text = |call: &dyn Fn() -> *const c_char| {
            injection::arm();
            // SAFETY: these functions return NUL-terminated texts of the library, whatever happens.
            let text = unsafe { CStr::from_ptr(call()) };
            assert!(!injection::is_still_armed());
            text.to_str().unwrap().to_string()
        };
        assert_eq!(text(&|| ns_llm_version()), "");
        assert_eq!(text(&|| ns_llm_status_name(0)), "unknown");
        // SAFETY: NULL for the size is allowed.
        assert_eq!(text(&|| unsafe { ns_llm_last_error(null_mut()) }), "");
        for number in [ns_llm_version_number, ns_llm_abi_version] {
            injection::arm();
            assert_eq!((number(), injection::is_still_armed()), (0, false));
        }
    }
}
