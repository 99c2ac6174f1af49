//! # Request
//!
//! A request is one prompt and its answer. Submitting one returns at once; its events come to a callback, or are fetched
//! with ns_llm_request_next(). Each accepted request has a handle that the program frees.

use std::ffi::c_void;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ns_llm_core::config::{
    MAX_LOGIT_BIAS, MAX_MESSAGES, MAX_NAME_BYTES, MAX_PROMPT_BYTES, MAX_RESPONSE_TAGS, MAX_STOP_STRING_BYTES,
    MAX_STOP_STRINGS, MAX_STOP_TOKENS,
};
use ns_llm_core::{CacheUse, Message, Priority, Prompt, Request, RequestStream, SamplingOptions};

use crate::callback::{UserData, in_callback};
use crate::dispatcher::Watched;
use crate::engine::{ENGINES, LiveEngine, ns_llm_engine};
use crate::event::{Listener, ns_llm_event, ns_llm_event_callback, ns_llm_request, ns_llm_summary};
use crate::failure::{Failure, boundary};
use crate::live_request::{LiveRequest, Pulled, REQUESTS, Told};
use crate::params::{SizedStruct, at, check_struct, read_struct, write_struct};
use crate::status::ns_llm_status;
use crate::text::{Out, ns_llm_text, read_array, read_text};

/// One turn of a conversation.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ns_llm_message {
    /// "system", "user", "assistant", or what the model's chat template knows.
    pub role: ns_llm_text,
    /// What was said. Names of special tokens in here are plain text.
    pub content: ns_llm_text,
}

/// Added to the logit of one token.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ns_llm_logit_bias {
    /// The token.
    pub token_id: u32,
    /// -100 to 100.
    pub bias: f32,
}

/// Who goes first. Waiting raises a request's rank, so none waits for ever.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ns_llm_priority {
    /// The default.
    NS_LLM_PRIORITY_NORMAL = 0,
    /// Before the others.
    NS_LLM_PRIORITY_HIGH = 1,
    /// When there is room.
    NS_LLM_PRIORITY_BACKGROUND = 2,
}

/// What part the engine's response cache has in a request.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ns_llm_response_cache {
    /// As READ_WRITE where the answer is the same each time (greedy, or with a seed), else OFF.
    NS_LLM_RESPONSE_CACHE_AUTO = 0,
    /// None.
    NS_LLM_RESPONSE_CACHE_OFF = 1,
    /// A kept answer is given; a computed one is not kept.
    NS_LLM_RESPONSE_CACHE_READ = 2,
    /// A kept answer is given, and a computed one is kept; also if it is drawn without a seed, so that all such requests of a
    /// namespace get the same.
    NS_LLM_RESPONSE_CACHE_READ_WRITE = 3,
}

/// A bit of `ns_llm_request_params.set`: `max_tokens` holds a value.
pub const NS_LLM_SET_MAX_TOKENS: u64 = 1;
/// A bit of `ns_llm_request_params.set`: `seed` holds a value.
pub const NS_LLM_SET_SEED: u64 = 2;
/// A bit of `ns_llm_request_params.set`: `temperature` holds a value.
pub const NS_LLM_SET_TEMPERATURE: u64 = 4;
/// A bit of `ns_llm_request_params.set`: `top_k` holds a value.
pub const NS_LLM_SET_TOP_K: u64 = 8;
/// A bit of `ns_llm_request_params.set`: `top_p` holds a value.
pub const NS_LLM_SET_TOP_P: u64 = 16;
/// A bit of `ns_llm_request_params.set`: `min_p` holds a value.
pub const NS_LLM_SET_MIN_P: u64 = 32;
/// A bit of `ns_llm_request_params.set`: `repetition_penalty` holds a value.
pub const NS_LLM_SET_REPETITION_PENALTY: u64 = 64;
/// A bit of `ns_llm_request_params.set`: `presence_penalty` holds a value.
pub const NS_LLM_SET_PRESENCE_PENALTY: u64 = 128;
/// A bit of `ns_llm_request_params.set`: `frequency_penalty` holds a value.
pub const NS_LLM_SET_FREQUENCY_PENALTY: u64 = 256;

/// A bit of `ns_llm_request_params.set`: `logprobs` holds a value.
pub const NS_LLM_SET_LOGPROBS: u64 = 512;

const ALL_SET_BITS: u64 = NS_LLM_SET_LOGPROBS * 2 - 1;

/// A flag of `ns_llm_request_params`: the model's end tokens do not end the answer (for measurements).
pub const NS_LLM_REQUEST_IGNORE_EOS: u32 = 1;
/// A flag of `ns_llm_request_params`: KV of earlier prompts is not used for this one, nor its own for others.
pub const NS_LLM_REQUEST_NO_PREFIX_CACHE: u32 = 2;
/// A flag of `ns_llm_request_params`: the last event brings the logprob of each token of the prompt from the second on.
pub const NS_LLM_REQUEST_PROMPT_LOGPROBS: u32 = 4;
/// A flag of `ns_llm_request_params`: ns_llm_generate() does not wait until the request is admitted, so it never blocks;
/// what it could not find out is told by NS_LLM_EVENT_FAILED. For event loops.
pub const NS_LLM_REQUEST_DO_NOT_WAIT: u32 = 8;
/// A flag of `ns_llm_request_params`: KV of earlier prompts is used for this one, but its own is not kept for others.
pub const NS_LLM_REQUEST_READ_PREFIX_CACHE_ONLY: u32 = 16;

const ALL_FLAGS: u32 = NS_LLM_REQUEST_READ_PREFIX_CACHE_ONLY * 2 - 1;

/// What to generate. Zero is the default of every field but `struct_size` and the prompt. Where zero is also a value of
/// its own, as in temperature 0, the field has a bit in `set`: with the bit the field is the value, also if it is zero;
/// without it the field must be zero, and the model's generation_config.json decides, or else the neutral value.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct ns_llm_request_params {
    /// `sizeof(ns_llm_request_params)`.
    pub struct_size: usize,
    /// Which of the fields that have a bit hold a value: any of the `NS_LLM_SET_` bits.
    pub set: u64,
    /// What to continue: a text, in which names of special tokens count as special tokens. Exactly one of
    /// `prompt.data`, `prompt_token_ids` and `messages` is not NULL. At most 4 MiB.
    pub prompt: ns_llm_text,
    /// What to continue: tokens.
    pub prompt_token_ids: *const u32,
    /// Number of `prompt_token_ids`.
    pub num_prompt_token_ids: usize,
    /// What to answer: a conversation, rendered by the model's chat template.
    pub messages: *const ns_llm_message,
    /// Number of `messages`; at most 4096, and 4 MiB in all.
    pub num_messages: usize,
    /// Most new tokens of each choice. Unset: 64. 0 computes the prompt only.
    pub max_tokens: usize,
    /// Key of the draws. Unset: drawn, and reported in the summary.
    pub seed: u64,
    /// 0 is greedy: the most likely token, always. 0 to 100.
    pub temperature: f32,
    /// Keep the `top_k` most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the most likely tokens whose probabilities add up to this. Above 0, to 1.
    pub top_p: f32,
    /// Keep tokens that have at least this share of the best one's probability. 0 to 1.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens seen in prompt or answer. Above 0, to 100; 1 is
    /// neutral.
    pub repetition_penalty: f32,
    /// Taken from the logit of each token seen in the answer. -2 to 2.
    pub presence_penalty: f32,
    /// Taken from the logit of each token, as often as it was seen in the answer. -2 to 2.
    pub frequency_penalty: f32,
    /// A value of `ns_llm_priority`.
    pub priority: u32,
    /// Number of choices, 1 to 8. 0: 1.
    pub n: u32,
    /// Any of the `NS_LLM_REQUEST_` flags.
    pub flags: u32,
    /// Limit from submission to the end, milliseconds, after which the request fails with NS_LLM_DEADLINE_EXCEEDED. 0:
    /// none.
    pub timeout_ms: u64,
    /// Texts that end a choice; they are not part of the answer.
    pub stop: *const ns_llm_text,
    /// Number of `stop`; at most 16, of at most 256 bytes each.
    pub num_stop: usize,
    /// Tokens that end a choice, besides the model's own end tokens.
    pub stop_token_ids: *const u32,
    /// Number of `stop_token_ids`; at most 64.
    pub num_stop_token_ids: usize,
    /// Biases of tokens.
    pub logit_bias: *const ns_llm_logit_bias,
    /// Number of `logit_bias`; at most 1024.
    pub num_logit_bias: usize,
    /// Requests share KV of common prefixes only within one namespace; what stands before its first line break is its owner, by
    /// whom `kv_namespace_share` counts. NULL: the namespace of the engine. At most 512
    /// bytes.
    pub cache_namespace: ns_llm_text,
    /// How many of the likeliest tokens to report in each new token's place, 0 to 20; with 0, the chosen one's logprob
    /// alone. Unset: no logprobs.
    pub logprobs: usize,
    /// A value of `ns_llm_response_cache`.
    pub response_cache: u32,
    /// 0.
    pub reserved: u32,
    /// How long the kept answer is given, milliseconds. 0: as the engine's parameters say.
    pub response_ttl_ms: u64,
    /// Names under which the kept answer can be forgotten: see ns_llm_responses_invalidate().
    pub response_tags: *const ns_llm_text,
    /// Number of `response_tags`; at most 16, of at most 512 bytes each.
    pub num_response_tags: usize,
}

// SAFETY: `repr(C)`, begins with a `usize`; numbers and raw pointers.
unsafe impl SizedStruct for ns_llm_request_params {}

/// For functions that wait: no limit.
pub const NS_LLM_FOREVER: u64 = u64::MAX;

/// Submits one request. Returns when it is checked, turned into tokens and queued, so what is wrong with it is said
/// here, unless NS_LLM_REQUEST_DO_NOT_WAIT is among its flags. With a `callback` the answer arrives there, the first events
/// perhaps before this function has returned. Without, fetch it with ns_llm_request_next().
///
/// Ownership:  `params` and what it points to are copied. `user_data` is the program's, and must stay valid until the
///             last event has returned. `*out_request` is a new handle; free it with ns_llm_request_free(), before or
///             after the engine, as you like.
/// Threads:    any, also concurrently on one engine, also inside a callback.
/// NULL:       `callback` and `user_data` may be NULL; `params` and `out_request` must not be.
/// Returns:    NS_LLM_OK; NS_LLM_OVERLOADED (try later); NS_LLM_PROMPT_TOO_LONG; NS_LLM_EXCEEDS_KV_POOL;
///             NS_LLM_DEADLINE_EXCEEDED; NS_LLM_TEMPLATE, NS_LLM_NO_CHAT_TEMPLATE or NS_LLM_TOKENIZER about the prompt; NS_LLM_NOT_SUPPORTED if the
///             model makes vectors only; NS_LLM_NULL_ARGUMENT, NS_LLM_MISALIGNED_POINTER, NS_LLM_INVALID_UTF8,
///             NS_LLM_INVALID_ARGUMENT or NS_LLM_UNSUPPORTED about the parameters; NS_LLM_BAD_HANDLE; NS_LLM_CLOSED if
///             the engine is being freed; NS_LLM_FORKED_PROCESS; NS_LLM_INTERNAL.
/// On failure: `*out_request` is 0, and `callback` was not and will not be called.
///
/// # Safety
/// `params` points to a `size_t` and to as many readable bytes as that says, and its texts and arrays are readable.
/// `callback` may be called with `user_data` on the engine's callback thread until the last event has returned.
/// `out_request` points to a writable `ns_llm_request`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ns_llm_generate(
    engine: ns_llm_engine,
    params: *const ns_llm_request_params,
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
        let request = unsafe { read_request(&params) }?;
        let stream = match params.flags & NS_LLM_REQUEST_DO_NOT_WAIT {
            0 => live.engine.generate(request),
            _ => live.engine.submit(request),
        };
        let stream = stream.inspect_err(|error| live.log.failed(error))?;
        begin(&live, stream, callback, UserData(user_data), &out)
    })
}

/// Gives a submitted request its handle and its reader.
pub(crate) fn begin(
    live: &LiveEngine,
    stream: RequestStream,
    callback: ns_llm_event_callback,
    user_data: UserData,
    out: &Out<ns_llm_request>,
) -> Result<(), Failure> {
    let Some(function) = callback else {
        out.set(REQUESTS.insert(Arc::new(LiveRequest::Pulled(Box::new(Pulled::new(stream, live.log.clone())))))?);
        return Ok(());
    };
    let request = Arc::new(Told::new(stream.canceller()));
    let handle = REQUESTS.insert(Arc::new(LiveRequest::Told(request.clone())))?;
    // Before the first event: a callback that shares memory with this thread finds the handle there.
    out.set(handle);
    let listener = Listener { function, user_data, request: handle };
    live.dispatcher.watch(Watched { stream, listener, request }).map_err(|closed| {
        out.set(0);
        let _ = REQUESTS.remove(handle);
        closed.into()
    })
}

/// Fetches the next event of a request that was submitted without a callback, and waits for it if need be. A FAILED event
/// is fetched like any other: the status says how fetching went, not how the request did. After the last event there is
/// NS_LLM_ENDED for ever, so a program reads until this returns anything but NS_LLM_OK.
///
/// Ownership:  `*out_event` is the caller's; what it points to is the library's, and valid until the next call for the same
///             request, whatever that returns, or until the request is freed.
/// Threads:    any, also inside a callback, which then holds up the other events of its engine; one at a time for one
///             request. If another thread frees the request meanwhile, NS_LLM_BAD_HANDLE.
/// NULL:       `out_event` must not be NULL, and its `struct_size` must be set.
/// Returns:    NS_LLM_OK; NS_LLM_ENDED; NS_LLM_TIMEOUT if nothing came within `timeout_ms` (NS_LLM_FOREVER: wait on; 0:
///             just ask); NS_LLM_BUSY if another thread is in this function for the same request; NS_LLM_WRONG_READER if
///             the request has a callback; NS_LLM_BAD_HANDLE; NS_LLM_NULL_ARGUMENT; NS_LLM_MISALIGNED_POINTER;
///             NS_LLM_INVALID_ARGUMENT about `struct_size`; NS_LLM_FORKED_PROCESS; NS_LLM_INTERNAL.
/// On failure: `*out_event` is unchanged, and no event is lost.
///
/// # Safety
/// `out_event` points to a `size_t` and to as many writable bytes as that says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ns_llm_request_next(
    request: ns_llm_request,
    timeout_ms: u64,
    out_event: *mut ns_llm_event,
) -> ns_llm_status {
    boundary(|| {
        // Refuse a bad struct before an event is taken for it.
        // SAFETY: promised by the caller.
        unsafe { check_struct("out_event", out_event) }?;
        let live = REQUESTS.get(request)?;
        let timeout = (timeout_ms != NS_LLM_FOREVER).then(|| Duration::from_millis(timeout_ms));
        let event = live.pulled("ns_llm_request_next")?.next(request, timeout)?;
        // SAFETY: promised by the caller.
        unsafe { write_struct("out_event", out_event, &event) }
    })
}

/// Waits until the last event of a request has been told to its callback, and says how it ended.
///
/// Ownership:  `*out_summary` is the caller's.
/// Threads:    any but a callback, also several for one request.
/// NULL:       `out_summary` may be NULL; otherwise its `struct_size` must be set.
/// Returns:    how the request ended: NS_LLM_OK, or the `status` of its NS_LLM_EVENT_FAILED, such as NS_LLM_CANCELLED;
///             NS_LLM_TIMEOUT if it has not ended within `timeout_ms` (NS_LLM_FOREVER: wait on; 0: just ask);
///             NS_LLM_IN_CALLBACK inside a callback; NS_LLM_WRONG_READER if the request has no callback;
///             NS_LLM_BAD_HANDLE; NS_LLM_MISALIGNED_POINTER; NS_LLM_INVALID_ARGUMENT about `struct_size`;
///             NS_LLM_FORKED_PROCESS; NS_LLM_INTERNAL.
/// On failure: `*out_summary` is unchanged.
///
/// # Safety
/// `out_summary` is NULL, or points to a `size_t` and to as many writable bytes as that says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ns_llm_request_wait(
    request: ns_llm_request,
    timeout_ms: u64,
    out_summary: *mut ns_llm_summary,
) -> ns_llm_status {
    boundary(|| {
        let live = REQUESTS.get(request)?;
        let told = live.told("ns_llm_request_wait")?;
        if in_callback() {
            return Err(Failure::InCallback { function: "ns_llm_request_wait" });
        }
        if !out_summary.is_null() {
            // Refuse a bad struct before waiting for minutes to find out.
            // SAFETY: promised by the caller.
            unsafe { check_struct("out_summary", out_summary) }?;
        }
        // A time beyond the clock's range is as good as no limit.
        let deadline = Instant::now().checked_add(Duration::from_millis(timeout_ms));
        let deadline = deadline.filter(|_| timeout_ms != NS_LLM_FOREVER);
        let summary = told.wait(deadline).ok_or(Failure::Timeout { timeout_ms })??;
        if !out_summary.is_null() {
            // SAFETY: promised by the caller.
            unsafe { write_struct("out_summary", out_summary, &summary) }?;
        }
        Ok(())
    })
}

/// Asks a request to end. Returns at once; the last event comes within about one step, with NS_LLM_CANCELLED unless the
/// request had ended already. Cancelling again, or after the end, changes nothing.
///
/// Threads:    any, also inside a callback.
/// Returns:    NS_LLM_OK; NS_LLM_BAD_HANDLE (also for 0); NS_LLM_FORKED_PROCESS; NS_LLM_INTERNAL.
#[unsafe(no_mangle)]
pub extern "C" fn ns_llm_request_cancel(request: ns_llm_request) -> ns_llm_status {
    boundary(|| {
        REQUESTS.get(request)?.cancel();
        Ok(())
    })
}

/// Cancels a request that has not ended, and frees its handle.
///
/// If it has a callback: outside of callbacks this returns when the last event has been told, so `user_data` is the
/// program's own again; this takes about one step, and as long as the callback that is running, so do not hold a lock that
/// the callback takes. Inside a callback it returns at once, and the last event comes after that callback has returned.
/// Without a callback it returns at once, and what the last event pointed to is gone.
///
/// Ownership:  `request` is dead afterwards.
/// Threads:    any, also inside a callback. Other threads that are in ns_llm_request_wait() go on waiting, for its end;
///             one that is in ns_llm_request_next() gets NS_LLM_BAD_HANDLE.
/// NULL:       0 is allowed and does nothing.
/// Returns:    NS_LLM_OK; NS_LLM_BAD_HANDLE if it is not a request or was freed before; NS_LLM_FORKED_PROCESS;
///             NS_LLM_INTERNAL.
/// On failure: nothing changed.
#[unsafe(no_mangle)]
pub extern "C" fn ns_llm_request_free(request: ns_llm_request) -> ns_llm_status {
    boundary(|| {
        if request != 0 {
            match &*REQUESTS.remove(request)? {
                LiveRequest::Pulled(pulled) => pulled.free(),
                LiveRequest::Told(told) => {
                    told.cancel();
                    if !in_callback() {
                        // How it ended was told to the callback; here only that it has matters.
                        let _ = told.wait(None);
                    }
                }
            }
        }
        Ok(())
    })
}

/// # Safety
/// Every text and array of `params` is readable.
unsafe fn read_request(params: &ns_llm_request_params) -> Result<Request, Failure> {
    let (flags, set) = (params.flags & !ALL_FLAGS, params.set & !ALL_SET_BITS);
    if flags != 0 || set != 0 {
        return Err(Failure::Unsupported { argument: "params", reason: format!("flags {flags:#x}, set {set:#x}") });
    }
    // SAFETY: promised by the caller.
    let mut request = match unsafe { read_prompt(params) }? {
        Prompt::Text(text) => Request::prompt(text),
        Prompt::Tokens(ids) => Request::tokens(ids),
        Prompt::Chat(messages) => Request::chat(messages),
    };
    request.max_tokens = optional(params, NS_LLM_SET_MAX_TOKENS, "max_tokens", params.max_tokens)?;
    // SAFETY: promised by the caller.
    request.sampling = unsafe { read_sampling(params) }?;
    // SAFETY: promised by the caller.
    request.stop =
        unsafe { read_texts("stop", params.stop, params.num_stop, MAX_STOP_STRINGS, MAX_STOP_STRING_BYTES) }?;
    // SAFETY: promised by the caller.
    request.stop_token_ids =
        unsafe { read_array("stop_token_ids", params.stop_token_ids, params.num_stop_token_ids, MAX_STOP_TOKENS) }?;
    request.ignore_eos = params.flags & NS_LLM_REQUEST_IGNORE_EOS != 0;
    request.prefix_cache = prefix_cache_use(params.flags)?;
    request.logprobs = optional(params, NS_LLM_SET_LOGPROBS, "logprobs", params.logprobs)?;
    request.prompt_logprobs = params.flags & NS_LLM_REQUEST_PROMPT_LOGPROBS != 0;
    request.n = params.n.max(1) as usize;
    request.priority = priority(params.priority)?;
    request.timeout_ms = (params.timeout_ms != 0).then_some(params.timeout_ms);
    if !params.cache_namespace.data.is_null() || params.cache_namespace.size != 0 {
        // SAFETY: promised by the caller.
        request.namespace = Some(unsafe { read_text("cache_namespace", params.cache_namespace, MAX_NAME_BYTES) }?);
    }
    if params.reserved != 0 {
        return Err(Failure::invalid("reserved", params.reserved, "0"));
    }
    request.response_cache = response_cache(params.response_cache)?;
    request.response_ttl_ms = (params.response_ttl_ms != 0).then_some(params.response_ttl_ms);
    // SAFETY: promised by the caller.
    request.response_tags = unsafe {
        read_texts("response_tags", params.response_tags, params.num_response_tags, MAX_RESPONSE_TAGS, MAX_NAME_BYTES)
    }?;
    Ok(request)
}

/// # Safety
/// The text and arrays of the prompt are readable.
unsafe fn read_prompt(params: &ns_llm_request_params) -> Result<Prompt, Failure> {
    let given = [!params.prompt.data.is_null(), !params.prompt_token_ids.is_null(), !params.messages.is_null()];
    match given {
        [true, false, false] => {
            // SAFETY: promised by the caller.
            Ok(Prompt::Text(unsafe { read_text("prompt", params.prompt, MAX_PROMPT_BYTES) }?))
        }
        [false, true, false] => {
            let limit = MAX_PROMPT_BYTES / size_of::<u32>();
            // SAFETY: promised by the caller.
            let ids =
                unsafe { read_array("prompt_token_ids", params.prompt_token_ids, params.num_prompt_token_ids, limit) };
            Ok(Prompt::Tokens(ids?))
        }
        // SAFETY: promised by the caller.
        [false, false, true] => Ok(Prompt::Chat(unsafe { read_messages(params) }?)),
        [false, false, false] => Err(Failure::NullArgument { argument: "prompt" }),
        _ => {
            let num = given.iter().filter(|&&given| given).count();
            Err(Failure::invalid("prompt", format!("given {num} times"), "one of text, tokens and messages"))
        }
    }
}

/// # Safety
/// The messages and their texts are readable.
unsafe fn read_messages(params: &ns_llm_request_params) -> Result<Vec<Message>, Failure> {
    // SAFETY: promised by the caller.
    let messages = unsafe { read_array("messages", params.messages, params.num_messages, MAX_MESSAGES) }?;
    // The sum first: thousands of messages of the largest size must not be copied to be refused.
    let bytes = messages.iter().fold(0usize, |sum, m| sum.saturating_add(m.role.size).saturating_add(m.content.size));
    if bytes > MAX_PROMPT_BYTES {
        return Err(Failure::invalid("messages (bytes)", bytes, format!("at most {MAX_PROMPT_BYTES}")));
    }
    let read = |message: &ns_llm_message| {
        // SAFETY: promised by the caller.
        let role = unsafe { read_text("messages[].role", message.role, MAX_PROMPT_BYTES) }?;
        // SAFETY: promised by the caller.
        let content = unsafe { read_text("messages[].content", message.content, MAX_PROMPT_BYTES) }?;
        Ok(Message::new(role, content))
    };
    messages.iter().map(read).collect()
}

/// # Safety
/// The array of biases is readable.
unsafe fn read_sampling(params: &ns_llm_request_params) -> Result<SamplingOptions, Failure> {
    // SAFETY: promised by the caller.
    let bias = unsafe { read_array("logit_bias", params.logit_bias, params.num_logit_bias, MAX_LOGIT_BIAS) }?;
    let number = |bit, field, value| optional::<f32>(params, bit, field, value);
    let mut sampling = SamplingOptions::default();
    sampling.seed = optional(params, NS_LLM_SET_SEED, "seed", params.seed)?;
    sampling.temperature = number(NS_LLM_SET_TEMPERATURE, "temperature", params.temperature)?;
    sampling.top_k = optional(params, NS_LLM_SET_TOP_K, "top_k", params.top_k)?;
    sampling.top_p = number(NS_LLM_SET_TOP_P, "top_p", params.top_p)?;
    sampling.min_p = number(NS_LLM_SET_MIN_P, "min_p", params.min_p)?;
    sampling.repetition_penalty =
        number(NS_LLM_SET_REPETITION_PENALTY, "repetition_penalty", params.repetition_penalty)?;
    sampling.presence_penalty = number(NS_LLM_SET_PRESENCE_PENALTY, "presence_penalty", params.presence_penalty)?;
    sampling.frequency_penalty = number(NS_LLM_SET_FREQUENCY_PENALTY, "frequency_penalty", params.frequency_penalty)?;
    sampling.logit_bias = bias.iter().map(|entry| (entry.token_id, entry.bias)).collect();
    Ok(sampling)
}

/// # Safety
/// `texts` points to `num` texts, and they are readable.
unsafe fn read_texts(
    field: &'static str,
    texts: *const ns_llm_text,
    num: usize,
    max_num: usize,
    max_bytes: usize,
) -> Result<Vec<String>, Failure> {
    // SAFETY: promised by the caller.
    let texts = unsafe { read_array(field, texts, num, max_num) }?;
    // SAFETY: promised by the caller.
    texts.into_iter().map(|text| unsafe { read_text(field, text, max_bytes) }).collect()
}

fn response_cache(value: u32) -> Result<Option<CacheUse>, Failure> {
    const VALUES: [Option<CacheUse>; 4] = [None, Some(CacheUse::Off), Some(CacheUse::Read), Some(CacheUse::ReadWrite)];
    at(&VALUES, value).ok_or_else(|| Failure::invalid("response_cache", value, "a value of ns_llm_response_cache"))
}

/// A field with a bit in `set`. A value without its bit is refused: the caller meant something by it.
fn optional<T: Default + PartialEq + ToString>(
    params: &ns_llm_request_params,
    bit: u64,
    field: &'static str,
    value: T,
) -> Result<Option<T>, Failure> {
    if params.set & bit != 0 {
        return Ok(Some(value));
    }
    if value != T::default() {
        return Err(Failure::invalid(field, value, format!("0 while its bit {bit:#x} is not in `set`")));
    }
    Ok(None)
}

/// What the flags say of the prefix cache.
fn prefix_cache_use(flags: u32) -> Result<CacheUse, Failure> {
    let (off, read_only) = (NS_LLM_REQUEST_NO_PREFIX_CACHE, NS_LLM_REQUEST_READ_PREFIX_CACHE_ONLY);
    match (flags & off != 0, flags & read_only != 0) {
        (false, false) => Ok(CacheUse::ReadWrite),
        (false, true) => Ok(CacheUse::Read),
        (true, false) => Ok(CacheUse::Off),
        (true, true) => {
            Err(Failure::invalid("flags", flags, "at most one of NO_PREFIX_CACHE and READ_PREFIX_CACHE_ONLY"))
        }
    }
}

/// The priority that a field of C names.
pub(crate) fn priority(value: u32) -> Result<Priority, Failure> {
    const VALUES: [Priority; 3] = [Priority::Normal, Priority::High, Priority::Background];
    at(&VALUES, value).ok_or_else(|| Failure::invalid("priority", value, "a value of ns_llm_priority"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::tests::check_names;

    /// The values of C's enums are those of the engine, under the engine's names.
    #[test]
    fn values_of_enums_are_the_engines() {
        check_names("NS_LLM_PRIORITY_", Priority::ALL.len(), priority, Priority::from_name);
        let from_name = |name: &str| if name == "AUTO" { Ok(None) } else { CacheUse::from_name(name).map(Some) };
        check_names("NS_LLM_RESPONSE_CACHE_", CacheUse::ALL.len() + 1, response_cache, from_name);
    }
}
