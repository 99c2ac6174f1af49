//! The border between Rust and C. A panic that reached an `extern "C"` function would abort the process; every exported
//! function therefore runs its whole body inside [`boundary`] (or [`boundary_or`], where there is no status to return),
//! which turns a panic into `NS_LLM_INTERNAL`. A test of this crate reads the sources and finds the function that does
//! not.
//!
//! What this cannot catch: exhausted memory, an overflowing stack, a second panic while the first unwinds. The engine
//! bounds its sizes and recursion so that they do not happen.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::status::{Failure, ns_llm_status, report};

#[cfg(not(panic = "unwind"))]
compile_error!("the C interface promises that no panic ends the process: build it with panic = \"unwind\"");

/// Runs the body of an exported function; its failure becomes a status and the thread's last error.
pub(crate) fn boundary(body: impl FnOnce() -> Result<(), Failure>) -> ns_llm_status {
    // Unwind safety: what a panic may leave half done is behind locks whose poison is ignored only where each critical
    // section is one assignment (see `handle` and `dispatcher`); nothing else outlives the call.
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => ns_llm_status::NS_LLM_OK,
        Ok(Err(failure)) => report(&failure),
        Err(payload) => report(&Failure::Panic { message: message_of(&*payload) }),
    }
}

/// Runs the body of an exported function that has no status; `fallback` is returned in place of a panic.
pub(crate) fn boundary_or<T>(fallback: T, body: impl FnOnce() -> T) -> T {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or(fallback)
}

/// What a panic said.
pub(crate) fn message_of(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().copied();
    text.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("(no message)").to_string()
}

#[cfg(test)]
mod tests {
    use std::ffi::CStr;

    use super::*;
    use crate::status::ns_llm_last_error;

    /// A panic in a body is a status and a text, and the thread goes on: shown by panicking and then succeeding.
    #[test]
    fn panic_becomes_internal() {
        let status = boundary(|| panic!("injected {}", 7));
        assert_eq!(status, ns_llm_status::NS_LLM_INTERNAL);
        // SAFETY: NULL for the size is allowed; the text is NUL-terminated and lives until this thread fails again.
        let text = unsafe { CStr::from_ptr(ns_llm_last_error(std::ptr::null_mut())) };
        assert!(text.to_str().unwrap().contains("injected 7"), "{text:?}");
        assert_eq!(boundary(|| Ok(())), ns_llm_status::NS_LLM_OK);
        assert_eq!(boundary_or(3, || panic!("injected")), 3);
    }

    /// No exported function can unwind into C: each body in the sources of this crate starts with a boundary.
    #[test]
    fn every_exported_body_is_inside_a_boundary() {
        let mut num_exported = 0;
        for entry in std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/src")).unwrap() {
            let source = std::fs::read_to_string(entry.unwrap().path()).unwrap();
            for function in source.split("#[unsafe(no_mangle)]\n").skip(1) {
                let name = function.lines().next().unwrap_or_default();
                let body = function.split_once("{\n").expect("a function has a body").1.trim_start();
                assert!(body.starts_with("boundary(") || body.starts_with("boundary_or("), "{name}: {body:.60}");
                num_exported += 1;
            }
        }
        assert!(num_exported >= 10, "found only {num_exported} exported functions");
    }
}
