//! # Tokenizer
//!
//! Text to token ids and back, with the tokenizer of an engine's model.

use std::ffi::c_char;

use ns_llm_core::config::MAX_PROMPT_BYTES;

use crate::engine::{ENGINES, ns_llm_engine};
use crate::failure::{Failure, boundary};
use crate::status::ns_llm_status;
use crate::text::{Out, fill_buffer, ns_llm_text, read_array, read_text};

/// A flag of ns_llm_tokenize(): adds the tokens that the model's configuration puts around a prompt.
pub const NS_LLM_TOKENIZE_ADD_SPECIAL: u32 = 1;

/// Writes the tokens of a text. Names of special tokens in it become special tokens.
///
/// Ownership:  `text` and `buffer` are the caller's.
/// Threads:    any, also concurrently, also inside a callback.
/// NULL:       `text` may be NULL if `text_size` is 0, `buffer` if `capacity` is 0 (to ask for the number of tokens);
///             `out_num` must not be NULL.
/// Returns:    NS_LLM_OK; NS_LLM_BUFFER_TOO_SMALL; NS_LLM_BAD_HANDLE; NS_LLM_NULL_ARGUMENT; NS_LLM_MISALIGNED_POINTER;
///             NS_LLM_INVALID_UTF8; NS_LLM_INVALID_ARGUMENT if the text has more than 4 MiB; NS_LLM_UNSUPPORTED about
///             `flags`; NS_LLM_TOKENIZER; NS_LLM_CLOSED; NS_LLM_FORKED_PROCESS; NS_LLM_INTERNAL.
/// On failure: `buffer` is unchanged. `*out_num` is the number of tokens after NS_LLM_BUFFER_TOO_SMALL, else 0.
///
/// # Safety
/// `text` points to `text_size` readable bytes, `buffer` to `capacity` writable values and `out_num` to a writable
/// `size_t`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ns_llm_tokenize(
    engine: ns_llm_engine,
    text: *const c_char,
    text_size: usize,
    flags: u32,
    buffer: *mut u32,
    capacity: usize,
    out_num: *mut usize,
) -> ns_llm_status {
    boundary(|| {
        // SAFETY: promised by the caller.
        let out = unsafe { Out::new("out_num", out_num, 0) }?;
        if flags & !NS_LLM_TOKENIZE_ADD_SPECIAL != 0 {
            return Err(Failure::Unsupported { argument: "flags", reason: format!("{flags:#x}") });
        }
        let live = ENGINES.get(engine)?;
        // SAFETY: promised by the caller.
        let text = unsafe { read_text("text", ns_llm_text { data: text, size: text_size }, MAX_PROMPT_BYTES) }?;
        let ids = live.engine.tokenize(&text, flags & NS_LLM_TOKENIZE_ADD_SPECIAL != 0)?;
        // SAFETY: promised by the caller.
        unsafe { fill_buffer(buffer, capacity, &out, &ids) }
    })
}

/// Writes the text of tokens. Bytes that are not UTF-8 become U+FFFD.
///
/// Ownership:  `token_ids` and `buffer` are the caller's; the text has no NUL at its end.
/// Threads:    any, also concurrently, also inside a callback.
/// NULL:       `token_ids` may be NULL if `num_token_ids` is 0, `buffer` if `capacity` is 0 (to ask for the size);
///             `out_size` must not be NULL.
/// Returns:    NS_LLM_OK; NS_LLM_BUFFER_TOO_SMALL; NS_LLM_BAD_HANDLE; NS_LLM_NULL_ARGUMENT; NS_LLM_MISALIGNED_POINTER;
///             NS_LLM_INVALID_ARGUMENT if there are more than 1048576 tokens or one is not in the vocabulary;
///             NS_LLM_TOKENIZER; NS_LLM_CLOSED; NS_LLM_FORKED_PROCESS; NS_LLM_INTERNAL.
/// On failure: `buffer` is unchanged. `*out_size` is the size that is needed after NS_LLM_BUFFER_TOO_SMALL, else 0.
///
/// # Safety
/// `token_ids` points to `num_token_ids` readable values, `buffer` to `capacity` writable bytes and `out_size` to a
/// writable `size_t`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ns_llm_detokenize(
    engine: ns_llm_engine,
    token_ids: *const u32,
    num_token_ids: usize,
    buffer: *mut c_char,
    capacity: usize,
    out_size: *mut usize,
) -> ns_llm_status {
    boundary(|| {
        // SAFETY: promised by the caller.
        let out = unsafe { Out::new("out_size", out_size, 0) }?;
        let live = ENGINES.get(engine)?;
        let limit = MAX_PROMPT_BYTES / size_of::<u32>();
        // SAFETY: promised by the caller.
        let ids = unsafe { read_array("token_ids", token_ids, num_token_ids, limit) }?;
        let text = live.engine.detokenize(&ids)?;
        // SAFETY: promised by the caller.
        unsafe { fill_buffer(buffer.cast::<u8>(), capacity, &out, text.as_bytes()) }
    })
}
