//! # Errors
//!
//! Every function that can fail returns a status, and leaves a sentence about it that names the field, the value and
//! the limit, or the file and the place in it: see ns_llm_last_error(). Decide by the status, show the sentence.

use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char, c_int};
use std::ptr;

use crate::panic::boundary_or;

/// How a call ended. Numbers are never reused and never change their meaning; newer libraries may return new ones, so
/// treat an unknown number as a failure. 1 to 99 are about the call itself, 100 to 199 about a request, 200 to 299
/// about its life, 300 to 399 about files, 400 to 499 about the machine.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ns_llm_status {
    /// It worked.
    NS_LLM_OK = 0,

    /// A pointer that must point to something is NULL.
    NS_LLM_NULL_ARGUMENT = 1,
    /// A handle was never given, was freed, or belongs to something of another kind.
    NS_LLM_BAD_HANDLE = 2,
    /// A text is not UTF-8.
    NS_LLM_INVALID_UTF8 = 3,
    /// A pointer is not aligned for what it points to.
    NS_LLM_MISALIGNED_POINTER = 4,
    /// The caller's header is newer than this library, and an option that the library does not know is in use.
    NS_LLM_UNSUPPORTED = 5,
    /// The result does not fit the caller's buffer; the size that is needed was written.
    NS_LLM_BUFFER_TOO_SMALL = 6,
    /// The time given for waiting passed. Nothing changed; wait again.
    NS_LLM_TIMEOUT = 7,
    /// The function waits for callbacks to return, so it cannot be called from inside one.
    NS_LLM_IN_CALLBACK = 8,
    /// This process was forked from one that had opened an engine, whose threads stayed there. Fork first, then open.
    NS_LLM_FORKED_PROCESS = 9,
    /// The request is read in the other of the two ways: with a callback, or with ns_llm_request_next().
    NS_LLM_WRONG_READER = 10,
    /// Another thread is in the middle of the same call, and the two would take each other's events.
    NS_LLM_BUSY = 11,
    /// The last event was read before; there will be no other.
    NS_LLM_ENDED = 12,

    /// A field is outside its range.
    NS_LLM_INVALID_ARGUMENT = 100,
    /// The prompt does not fit the context.
    NS_LLM_PROMPT_TOO_LONG = 101,
    /// Prompt and answer need more KV blocks than the engine has, even alone.
    NS_LLM_EXCEEDS_KV_POOL = 102,
    /// A queue is full. Nothing was lost; try again later.
    NS_LLM_OVERLOADED = 103,
    /// The model's chat template refused the messages or broke one of its bounds.
    NS_LLM_TEMPLATE = 104,
    /// Text could not be turned into tokens.
    NS_LLM_TOKENIZER = 105,
    /// Messages were given, but the model has no chat template.
    NS_LLM_NO_CHAT_TEMPLATE = 106,
    /// The model is not made for what was asked, such as writing text with an embedding model.
    NS_LLM_NOT_SUPPORTED = 107,

    /// The caller cancelled.
    NS_LLM_CANCELLED = 200,
    /// The request did not end within its timeout.
    NS_LLM_DEADLINE_EXCEEDED = 201,
    /// The model computed a value that is not finite. Only this request ended.
    NS_LLM_NON_FINITE_LOGITS = 202,
    /// The engine was freed.
    NS_LLM_CLOSED = 203,
    /// A defect of this library. The process is unharmed; free the engine and open a new one.
    NS_LLM_INTERNAL = 204,
    /// The model computed a vector that is not finite. Only this request ended.
    NS_LLM_NON_FINITE_EMBEDDING = 205,

    /// A file or folder could not be read.
    NS_LLM_IO = 300,
    /// A file that the model needs is not there.
    NS_LLM_MISSING_FILE = 301,
    /// A configuration file is not what it should be.
    NS_LLM_CONFIG = 302,
    /// A weights file is damaged or lies about itself.
    NS_LLM_WEIGHTS = 303,
    /// A tensor that the model needs is in no file.
    NS_LLM_MISSING_TENSOR = 304,
    /// The files hold tensors that the model has no use for.
    NS_LLM_UNUSED_TENSORS = 305,
    /// A tensor has another shape than the configuration says.
    NS_LLM_TENSOR_SHAPE = 306,
    /// A tensor has an element type that cannot be used there.
    NS_LLM_TENSOR_DTYPE = 307,
    /// The model's architecture is not known.
    NS_LLM_UNKNOWN_ARCHITECTURE = 308,
    /// A file is not the JSON that it should be.
    NS_LLM_INVALID_JSON = 309,
    /// Weights that are to be quantized are not finite.
    NS_LLM_NON_FINITE_WEIGHTS = 310,

    /// Memory for weights or KV could not be had.
    NS_LLM_OUT_OF_MEMORY = 400,
    /// The device that was asked for is not there.
    NS_LLM_DEVICE_UNAVAILABLE = 401,
    /// A cache tier could not bring to its medium what it holds. Requests are not touched by it.
    NS_LLM_STORAGE = 402,
    /// The device was lost while it computed. Every request of the engine ends with this; free it, and open another.
    NS_LLM_DEVICE_LOST = 403,
    /// Some of what a cache tier was to keep since the last flush was not stored. Requests are not touched by it.
    NS_LLM_NOT_STORED = 404,
}

use ns_llm_status::*;

/// Every status with its name. Those of engine errors carry the engine's own codes, so that one name means the same in
/// Rust, C and JavaScript.
const NAMES: &[(ns_llm_status, &CStr)] = &[
    (NS_LLM_OK, c"ok"),
    (NS_LLM_NULL_ARGUMENT, c"null_argument"),
    (NS_LLM_BAD_HANDLE, c"bad_handle"),
    (NS_LLM_INVALID_UTF8, c"invalid_utf8"),
    (NS_LLM_MISALIGNED_POINTER, c"misaligned_pointer"),
    (NS_LLM_UNSUPPORTED, c"unsupported"),
    (NS_LLM_BUFFER_TOO_SMALL, c"buffer_too_small"),
    (NS_LLM_TIMEOUT, c"timeout"),
    (NS_LLM_IN_CALLBACK, c"in_callback"),
    (NS_LLM_FORKED_PROCESS, c"forked_process"),
    (NS_LLM_WRONG_READER, c"wrong_reader"),
    (NS_LLM_BUSY, c"busy"),
    (NS_LLM_ENDED, c"ended"),
    (NS_LLM_INVALID_ARGUMENT, c"invalid_argument"),
    (NS_LLM_PROMPT_TOO_LONG, c"prompt_too_long"),
    (NS_LLM_EXCEEDS_KV_POOL, c"exceeds_kv_pool"),
    (NS_LLM_OVERLOADED, c"overloaded"),
    (NS_LLM_TEMPLATE, c"template"),
    (NS_LLM_TOKENIZER, c"tokenizer"),
    (NS_LLM_NO_CHAT_TEMPLATE, c"no_chat_template"),
    (NS_LLM_NOT_SUPPORTED, c"not_supported"),
    (NS_LLM_CANCELLED, c"cancelled"),
    (NS_LLM_DEADLINE_EXCEEDED, c"deadline_exceeded"),
    (NS_LLM_NON_FINITE_LOGITS, c"non_finite_logits"),
    (NS_LLM_CLOSED, c"closed"),
    (NS_LLM_INTERNAL, c"internal"),
    (NS_LLM_NON_FINITE_EMBEDDING, c"non_finite_embedding"),
    (NS_LLM_IO, c"io"),
    (NS_LLM_MISSING_FILE, c"missing_file"),
    (NS_LLM_CONFIG, c"config"),
    (NS_LLM_WEIGHTS, c"weights"),
    (NS_LLM_MISSING_TENSOR, c"missing_tensor"),
    (NS_LLM_UNUSED_TENSORS, c"unused_tensors"),
    (NS_LLM_TENSOR_SHAPE, c"tensor_shape"),
    (NS_LLM_TENSOR_DTYPE, c"tensor_dtype"),
    (NS_LLM_UNKNOWN_ARCHITECTURE, c"unknown_architecture"),
    (NS_LLM_INVALID_JSON, c"invalid_json"),
    (NS_LLM_NON_FINITE_WEIGHTS, c"non_finite_weights"),
    (NS_LLM_OUT_OF_MEMORY, c"out_of_memory"),
    (NS_LLM_DEVICE_UNAVAILABLE, c"device_unavailable"),
    (NS_LLM_STORAGE, c"storage"),
    (NS_LLM_DEVICE_LOST, c"device_lost"),
    (NS_LLM_NOT_STORED, c"not_stored"),
];

/// Longest text of ns_llm_last_error(), bytes; what is longer is cut at a character.
const MAX_ERROR_BYTES: usize = 4096;

/// The status of an engine error: the one of the same name.
pub(crate) fn status_of(error: &ns_llm_core::Error) -> ns_llm_status {
    let found = NAMES.iter().find(|(_, name)| name.to_bytes() == error.code().as_bytes());
    // A code without a status does not exist: a test compares the engine's list with this one.
    found.map_or(NS_LLM_INTERNAL, |&(status, _)| status)
}

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::default();
}

/// Keeps a sentence for this thread.
pub(crate) fn keep_sentence(sentence: &str) {
    let mut text = sentence.replace('\0', "\u{fffd}");
    while text.len() > MAX_ERROR_BYTES {
        text.truncate(
            (MAX_ERROR_BYTES - 3..=MAX_ERROR_BYTES).rev().find(|&end| text.is_char_boundary(end)).unwrap_or(0),
        );
    }
    let text = CString::new(text).expect("every NUL was replaced");
    // A thread that is ending has no storage any more; its caller has the status at least.
    let _ = LAST_ERROR.try_with(|last| last.replace(text));
}

/// The sentence about the last call on this thread that failed; "" if none did.
///
/// Ownership:  the text is the library's and ends with NUL. It is valid until the next call on this thread that fails,
///             or the end of the thread. Calls that succeed leave it as it is, so ask right after a failure.
/// Threads:    any; each thread has its own.
/// NULL:       `out_size` may be NULL; otherwise it receives the size in bytes, without the NUL.
/// Cannot fail and never returns NULL.
///
/// # Safety
/// `out_size` is NULL or points to a writable `size_t`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ns_llm_last_error(out_size: *mut usize) -> *const c_char {
    boundary_or(c"".as_ptr(), || {
        let (text, size) = LAST_ERROR
            .try_with(|last| last.try_borrow().map_or((c"".as_ptr(), 0), |text| (text.as_ptr(), text.count_bytes())))
            .unwrap_or((c"".as_ptr(), 0));
        if let Some(out_size) = ptr::NonNull::new(out_size) {
            // SAFETY: not NULL, so the caller promised a writable `size_t`; an unaligned one is written bytewise.
            unsafe { out_size.as_ptr().write_unaligned(size) };
        }
        text
    })
}

/// The name of a status: lower case, such as "prompt_too_long"; "unknown" for a number that this library does not have.
/// Names are as stable as the numbers, and are the `code` of errors in Rust and JavaScript.
///
/// Ownership:  the text is the library's, ends with NUL and lives as long as the library is loaded.
/// Threads:    any. Cannot fail.
#[unsafe(no_mangle)]
pub extern "C" fn ns_llm_status_name(status: c_int) -> *const c_char {
    boundary_or(c"unknown".as_ptr(), || {
        let found = NAMES.iter().find(|&&(known, _)| known as c_int == status);
        found.map_or(c"unknown", |&(_, name)| name).as_ptr()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Texts in quotes that the engine's `Error::code` returns, read from its source.
    fn engine_codes() -> Vec<String> {
        let source = include_str!("../../engine/src/error.rs");
        let arms = source.lines().filter(|line| line.trim_start().starts_with("Error::") && line.contains("=> \""));
        arms.filter_map(|arm| arm.split('"').nth(1).map(str::to_string)).collect()
    }

    /// Each engine error has its own status and each status above 99 an engine error: both lists are compared.
    #[test]
    fn statuses_and_engine_codes_are_the_same_list() {
        let mut codes = engine_codes();
        assert!(codes.len() > 20, "{codes:?}");
        let mut names: Vec<String> = NAMES
            .iter()
            .filter(|(status, _)| *status as c_int >= 100)
            .map(|(_, name)| name.to_str().unwrap().to_string())
            .collect();
        codes.sort();
        names.sort();
        assert_eq!(codes, names);
    }

    /// The names are the constants in lower case, and the table misses none: both are read from this file.
    #[test]
    fn names_follow_the_constants() {
        let source = include_str!("status.rs");
        let (enumeration, _) = source.split_once("\n}\n").unwrap();
        let constants: Vec<&str> =
            enumeration.lines().filter_map(|line| line.trim().strip_prefix("NS_LLM_")?.split(' ').next()).collect();
        let names: Vec<String> = NAMES.iter().map(|(_, name)| name.to_str().unwrap().to_uppercase()).collect();
        assert_eq!(constants, names);
        for (status, name) in NAMES {
            assert_eq!(ns_llm_status_name(*status as c_int), name.as_ptr());
        }
        assert_eq!(ns_llm_status_name(-7), c"unknown".as_ptr());
    }

    /// A long text with NULs in it arrives as a C string that is cut at a character.
    #[test]
    fn last_error_is_a_bounded_c_string() {
        keep_sentence(&format!("\0{}", "ä".repeat(MAX_ERROR_BYTES)));
        let mut size = 0;
        // SAFETY: `size` is a writable `usize`; the text is NUL-terminated and this thread does not fail meanwhile.
        let text = unsafe { CStr::from_ptr(ns_llm_last_error(&mut size)) };
        assert_eq!(text.count_bytes(), size);
        assert!(size <= MAX_ERROR_BYTES && size > MAX_ERROR_BYTES - 4, "{size}");
        assert!(text.to_str().unwrap().starts_with("\u{fffd}ä"));
    }
}
