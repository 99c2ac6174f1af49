//! # Embeddings
//!
//! An embedding is the vector of a text: texts of like meaning have vectors that point the same way. Any model makes them:
//! one that was made for it, or one that writes, whose final states are averaged. Each input of a request is computed for
//! itself: what else is in the request changes no bit of its vector.

use std::ffi::c_void;

use ns_llm_core::config::{MAX_EMBEDDING_INPUTS, MAX_PROMPT_BYTES};
use ns_llm_core::{EmbeddingInput, EmbeddingRequest};

use crate::callback::UserData;
use crate::engine::{ENGINES, ns_llm_engine};
use crate::event::{ns_llm_event_callback, ns_llm_request, ns_llm_summary};
use crate::failure::{Failure, boundary};
use crate::params::{SizedStruct, check_struct, read_struct, write_struct};
use crate::request::{begin, priority};
use crate::status::ns_llm_status;
use crate::text::{Out, check_pointer, fill_buffer, ns_llm_text, read_array, read_text};

/// One input: exactly one of `text.data` and `token_ids` is not NULL.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ns_llm_embedding_input {
    /// A text, turned into tokens as the model's configuration says.
    pub text: ns_llm_text,
    /// Tokens, taken as they are.
    pub token_ids: *const u32,
    /// Number of `token_ids`.
    pub num_token_ids: usize,
}

/// A flag of `ns_llm_embedding_params`: an input that is longer than the model's `max_embedding_tokens` is refused with
/// NS_LLM_PROMPT_TOO_LONG, and not cut.
pub const NS_LLM_EMBEDDING_NO_TRUNCATE: u32 = 1;
/// A flag of `ns_llm_embedding_params`: vectors keep the length that the model gives them, which is else 1 (L2).
pub const NS_LLM_EMBEDDING_NO_NORMALIZE: u32 = 2;

/// What to turn into vectors. Zero is the default of every field but `struct_size` and the inputs.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct ns_llm_embedding_params {
    /// `sizeof(ns_llm_embedding_params)`.
    pub struct_size: usize,
    /// The inputs.
    pub inputs: *const ns_llm_embedding_input,
    /// Number of `inputs`, 1 to 2048; 4 MiB in all.
    pub num_inputs: usize,
    /// How many of a vector's leading elements to keep, for models that were trained for it. 0: all.
    pub dimensions: usize,
    /// A value of `ns_llm_priority`.
    pub priority: u32,
    /// Any of the `NS_LLM_EMBEDDING_` flags.
    pub flags: u32,
    /// Limit from submission to the end, milliseconds, after which the request fails with NS_LLM_DEADLINE_EXCEEDED. 0:
    /// none.
    pub timeout_ms: u64,
}

// SAFETY: `repr(C)`, begins with a `usize`; numbers and raw pointers.
unsafe impl SizedStruct for ns_llm_embedding_params {}

/// Turns inputs into vectors and waits for all of them. The vectors lie in `buffer` one behind the other, in the order of
/// the inputs, each of `dimensions` numbers, or of the model's `embedding_dimensions` (ns_llm_engine_info()). To stop it
/// from another thread, or to hear of an input that was cut, use ns_llm_submit_embedding().
///
/// Ownership:  `params` and what it points to are read until this function returns; `buffer` and `*out_summary` are the
///             caller's.
/// Threads:    any, also concurrently, also inside a callback, which then holds up the other events of its engine.
/// NULL:       `buffer` may be NULL if `capacity` is 0, to ask for the number of floats; `out_summary` may be NULL, else
///             its `struct_size` must be set; `params` and `out_num` must not be NULL.
/// Returns:    NS_LLM_OK; NS_LLM_BUFFER_TOO_SMALL, before anything is computed; NS_LLM_OVERLOADED (try later);
///             NS_LLM_PROMPT_TOO_LONG or NS_LLM_TOKENIZER about an input; NS_LLM_DEADLINE_EXCEEDED;
///             NS_LLM_NON_FINITE_EMBEDDING; NS_LLM_NULL_ARGUMENT, NS_LLM_MISALIGNED_POINTER, NS_LLM_INVALID_UTF8,
///             NS_LLM_INVALID_ARGUMENT or NS_LLM_UNSUPPORTED about the parameters; NS_LLM_BAD_HANDLE; NS_LLM_CLOSED if the
///             engine is being freed; NS_LLM_FORKED_PROCESS; NS_LLM_INTERNAL.
/// On failure: `buffer` and `*out_summary` are unchanged. `*out_num` is the number of floats that are needed after
///             NS_LLM_BUFFER_TOO_SMALL, else 0.
///
/// # Safety
/// `params` points to a `size_t` and to as many readable bytes as that says, and its inputs are readable. `buffer` points
/// to `capacity` writable floats, `out_num` to a writable `size_t`. `out_summary` is NULL, or points to a `size_t` and to
/// as many writable bytes as that says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ns_llm_embed(
    engine: ns_llm_engine,
    params: *const ns_llm_embedding_params,
    buffer: *mut f32,
    capacity: usize,
    out_num: *mut usize,
    out_summary: *mut ns_llm_summary,
) -> ns_llm_status {
    boundary(|| {
        // SAFETY: promised by the caller.
        let out = unsafe { Out::new("out_num", out_num, 0) }?;
        if !out_summary.is_null() {
            // SAFETY: promised by the caller.
            unsafe { check_struct("out_summary", out_summary) }?;
        }
        let live = ENGINES.get(engine)?;
        // SAFETY: promised by the caller.
        let params = unsafe { read_struct("params", params) }?;
        // SAFETY: promised by the caller, about what `params` points to.
        let request = unsafe { read_embedding_request(&params) }?;
        request.validate()?;
        // More dimensions than the model has are refused by the engine, in its own words.
        let all = live.engine.info().embedding_dimensions;
        let dimensions = request.dimensions.unwrap_or(all).min(all);
        let needed = request.inputs.len().saturating_mul(dimensions);
        if needed > capacity {
            out.set(needed);
            return Err(Failure::BufferTooSmall { argument: "buffer", capacity, needed });
        }
        // Before the work, not after it.
        check_pointer("buffer", buffer)?;
        let answer = live.engine.embed(request).inspect_err(|error| live.log.failed(error))?;
        let values: Vec<f32> = answer.embeddings.into_iter().flat_map(|embedding| embedding.values).collect();
        // SAFETY: promised by the caller.
        unsafe { fill_buffer(buffer, capacity, &out, &values) }.inspect_err(|_| out.set(0))?;
        if !out_summary.is_null() {
            // SAFETY: promised by the caller.
            unsafe { write_struct("out_summary", out_summary, &ns_llm_summary::from(&answer.summary)) }?;
        }
        Ok(())
    })
}

/// Submits inputs to be turned into vectors, and returns at once: it never waits, so what is wrong with the text of an
/// input is told by NS_LLM_EVENT_FAILED. Each vector comes as an NS_LLM_EVENT_EMBEDDING, to the `callback` or to
/// ns_llm_request_next().
///
/// Ownership:  `params` and what it points to are copied. `user_data` is the program's, and must stay valid until the
///             last event has returned. `*out_request` is a new handle; free it with ns_llm_request_free().
/// Threads:    any, also concurrently on one engine, also inside a callback.
/// NULL:       `callback` and `user_data` may be NULL; `params` and `out_request` must not be.
/// Returns:    NS_LLM_OK; NS_LLM_OVERLOADED (try later); NS_LLM_NULL_ARGUMENT, NS_LLM_MISALIGNED_POINTER,
///             NS_LLM_INVALID_UTF8, NS_LLM_INVALID_ARGUMENT or NS_LLM_UNSUPPORTED about the parameters;
///             NS_LLM_BAD_HANDLE; NS_LLM_CLOSED if the engine is being freed; NS_LLM_FORKED_PROCESS; NS_LLM_INTERNAL.
/// On failure: `*out_request` is 0, and `callback` was not and will not be called.
///
/// # Safety
/// As ns_llm_generate(), for `ns_llm_embedding_params`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ns_llm_submit_embedding(
    engine: ns_llm_engine,
    params: *const ns_llm_embedding_params,
    callback: ns_llm_event_callback,
    user_data: *mut c_void,
    out_request: *mut ns_llm_request,
) -> ns_llm_status {
    boundary(|| {
        // SAFETY: promised by the caller.
        let out = unsafe { Out::new("out_request", out_request, 0) }?;
        let live = ENGINES.get(engine)?;
        // SAFETY: promised by the caller.
        let params = unsafe { read_struct("params", params) }?;
        // SAFETY: promised by the caller, about what `params` points to.
        let request = unsafe { read_embedding_request(&params) }?;
        let stream = live.engine.submit_embedding(request).inspect_err(|error| live.log.failed(error))?;
        begin(&live, stream, callback, UserData(user_data), &out)
    })
}

/// # Safety
/// The inputs of `params`, their texts and arrays are readable.
unsafe fn read_embedding_request(params: &ns_llm_embedding_params) -> Result<EmbeddingRequest, Failure> {
    let unknown = params.flags & !(NS_LLM_EMBEDDING_NO_TRUNCATE | NS_LLM_EMBEDDING_NO_NORMALIZE);
    if unknown != 0 {
        return Err(Failure::Unsupported { argument: "params", reason: format!("flags {unknown:#x}") });
    }
    // SAFETY: promised by the caller.
    let inputs = unsafe { read_array("inputs", params.inputs, params.num_inputs, MAX_EMBEDDING_INPUTS) }?;
    // The sum first: thousands of inputs of the largest size must not be copied to be refused.
    let sizes = |input: &ns_llm_embedding_input| {
        input.text.size.saturating_add(input.num_token_ids.saturating_mul(size_of::<u32>()))
    };
    let bytes = inputs.iter().map(sizes).fold(0, usize::saturating_add);
    if bytes > MAX_PROMPT_BYTES {
        return Err(Failure::invalid("inputs (bytes)", bytes, format!("at most {MAX_PROMPT_BYTES}")));
    }
    // SAFETY: promised by the caller.
    let inputs = inputs.iter().map(|input| unsafe { read_input(input) }).collect::<Result<Vec<_>, _>>()?;
    let mut request = EmbeddingRequest::new(inputs);
    request.truncate = params.flags & NS_LLM_EMBEDDING_NO_TRUNCATE == 0;
    request.normalize = params.flags & NS_LLM_EMBEDDING_NO_NORMALIZE == 0;
    request.dimensions = (params.dimensions != 0).then_some(params.dimensions);
    request.priority = priority(params.priority)?;
    request.timeout_ms = (params.timeout_ms != 0).then_some(params.timeout_ms);
    Ok(request)
}

/// # Safety
/// The text and the array of `input` are readable.
unsafe fn read_input(input: &ns_llm_embedding_input) -> Result<EmbeddingInput, Failure> {
    match (input.text.data.is_null(), input.token_ids.is_null()) {
        // SAFETY: promised by the caller.
        (false, true) => Ok(EmbeddingInput::Text(unsafe { read_text("inputs[].text", input.text, MAX_PROMPT_BYTES) }?)),
        (true, false) => {
            let limit = MAX_PROMPT_BYTES / size_of::<u32>();
            // SAFETY: promised by the caller.
            let ids = unsafe { read_array("inputs[].token_ids", input.token_ids, input.num_token_ids, limit) };
            Ok(EmbeddingInput::Tokens(ids?))
        }
        (true, true) => Err(Failure::NullArgument { argument: "inputs[].text" }),
        (false, false) => Err(Failure::invalid("inputs[]", "text and tokens", "one of the two")),
    }
}
