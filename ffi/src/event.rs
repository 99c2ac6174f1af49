//! # Events
//!
//! What a request has to say arrives as a sequence of events. A generation tells any number of DELTA, one FINISHED for
//! each choice, and as the very last either DONE or FAILED; an embedding request tells one EMBEDDING for each input, in any
//! order, and the same last event. Whatever happens to an accepted request - it ends, it is cancelled, its engine is
//! freed - there is exactly one last event.
//!
//! There are two ways to hear them, and each request has one of the two, chosen when it is submitted: a callback, which
//! the engine calls on a thread of its own; or ns_llm_request_next(), with which the program fetches events on a thread of
//! its choice. Either way a slow reader loses nothing and slows down nobody but itself: what it has not heard yet waits,
//! merged into one DELTA a choice.

use std::ffi::c_void;
use std::ptr;

use ns_llm_core::{CacheTier, Error, Event, FinishReason, Logprob, MissReason, PrefixMiss, Summary, TokenLogprobs};

use crate::callback::{UserData, as_callback};
use crate::params::SizedStruct;
use crate::status::{ns_llm_status, status_of};
use crate::text::ns_llm_text;

/// A request: an id, not a pointer. 0 is never a request.
pub type ns_llm_request = u64;

/// What an event tells. Ignore kinds that you do not know.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ns_llm_event_kind {
    /// New tokens of one choice, and the text that they complete: `choice`, `text`, `token_ids`, and `logprobs` if they
    /// were asked for.
    NS_LLM_EVENT_DELTA = 1,
    /// One choice has ended: `choice`, `finish_reason`.
    NS_LLM_EVENT_FINISHED = 2,
    /// The last event of a request that ended by itself: `summary`, and `prompt_logprobs` if they were asked for.
    NS_LLM_EVENT_DONE = 3,
    /// The last event of any other: `status` says why, `text` says it in a sentence.
    NS_LLM_EVENT_FAILED = 4,
    /// The vector of one input of an embedding request: `input`, `embedding`, `num_input_tokens`, `is_truncated`.
    NS_LLM_EVENT_EMBEDDING = 5,
}

/// Why a choice ended.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ns_llm_finish_reason {
    /// It has not, or for a reason that is newer than this header.
    NS_LLM_FINISH_OTHER = 0,
    /// A stop text, a stop token or one of the model's end tokens.
    NS_LLM_FINISH_STOP = 1,
    /// `max_tokens`, or the end of the context.
    NS_LLM_FINISH_LENGTH = 2,
}

/// Why the prefix cache did not have all of a prompt.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ns_llm_prefix_miss {
    /// It had all that can be found: all full blocks but what the last token needs.
    NS_LLM_PREFIX_MISS_NONE = 0,
    /// Nobody has computed it in this namespace, as far as is known. What other namespaces have computed is not told.
    NS_LLM_PREFIX_MISS_NEVER_SEEN = 1,
    /// It was there; the KV pool gave it up for others.
    NS_LLM_PREFIX_MISS_EVICTED_FROM_POOL = 2,
    /// It was there; host memory gave it up for others.
    NS_LLM_PREFIX_MISS_EVICTED_FROM_HOST = 3,
    /// It was there; the disk gave it up for others.
    NS_LLM_PREFIX_MISS_EVICTED_FROM_DISK = 4,
    /// It was there; the store that nodes share gave it up for others.
    NS_LLM_PREFIX_MISS_EVICTED_FROM_REMOTE = 5,
    /// It is there; computing it was estimated to be faster than fetching it.
    NS_LLM_PREFIX_MISS_SLOWER = 6,
    /// It is there; the place failed or rests after failures, or it led to a failure and is not used again.
    NS_LLM_PREFIX_MISS_FAULT = 7,
    /// It was being fetched; nothing arrived for too long.
    NS_LLM_PREFIX_MISS_GAVE_UP = 8,
    /// The request does not read the cache, or not so far, or the engine has none.
    NS_LLM_PREFIX_MISS_DISABLED = 9,
    /// A reason that is newer than this header.
    NS_LLM_PREFIX_MISS_OTHER = 10,
}

/// Counts and times of a request that ended by itself. Times are milliseconds.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ns_llm_summary {
    /// `sizeof(ns_llm_summary)`: set by whoever owns the struct.
    pub struct_size: usize,
    /// Tokens of the prompt, or of all inputs of an embedding request.
    pub prompt_tokens: u64,
    /// Tokens of all choices, stop tokens included.
    pub completion_tokens: u64,
    /// Tokens of the prompt that were not computed: found in the prefix cache, or the whole answer was kept.
    pub cached_tokens: u64,
    /// How often the request lost its KV to others and was computed again (its tokens are the same).
    pub preemptions: u64,
    /// The seed that was used (of an embedding request: 0). Give it again to get the same answer.
    pub seed: u64,
    /// From submission to the first step that computed the request.
    pub queue_ms: f64,
    /// From that step to the first token.
    pub prompt_ms: f64,
    /// From submission to the first token.
    pub first_token_ms: f64,
    /// From the first token to the last.
    pub decode_ms: f64,
    /// From submission to the end.
    pub total_ms: f64,
    /// Of `cached_tokens`, those whose KV was in the pool.
    pub cached_pool_tokens: u64,
    /// Those that the pool had given away and host memory had kept.
    pub cached_host_tokens: u64,
    /// Those that were read from disk.
    pub cached_disk_tokens: u64,
    /// Those that came from a store that nodes share.
    pub cached_remote_tokens: u64,
    /// Why the rest of the prompt was not found: a value of `ns_llm_prefix_miss`. Ignore values that you do not know.
    pub prefix_miss: u64,
    /// Position of the first prompt token that was not found: the first of a block.
    pub prefix_miss_token: u64,
    /// 1 if the answer was kept from an earlier request and nothing was computed, else 0.
    pub from_response_cache: u64,
}

// SAFETY: `repr(C)`, begins with a `usize`, all numbers.
unsafe impl SizedStruct for ns_llm_summary {}

/// A token and the natural logarithm of its probability under the model: before temperature, penalties and truncation.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ns_llm_logprob {
    /// The token.
    pub token_id: u32,
    /// Its log-probability: 0 or less.
    pub logprob: f32,
}

/// How likely one token was, and which ones were likeliest in its place.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ns_llm_token_logprobs {
    /// The token that was chosen; in a prompt, the one that stands there.
    pub chosen: ns_llm_logprob,
    /// The likeliest, best first.
    pub top: *const ns_llm_logprob,
    /// Number of `top`: as many as were asked for.
    pub num_top: usize,
}

/// One event. Fields that its kind does not name are zero, NULL or empty; `text.data` is never NULL. What it points to is
/// the library's: in a callback it is valid until the callback returns, after ns_llm_request_next() until the next call of
/// that for the same request, or until the request is freed. Copy what you keep.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ns_llm_event {
    /// `sizeof(ns_llm_event)`: set by whoever owns the struct. In a callback that is the library: fields beyond this size
    /// are newer than the library that is running.
    pub struct_size: usize,
    /// The request: the value that ns_llm_generate() gives, also if that has not returned yet.
    pub request: ns_llm_request,
    /// What this event tells.
    pub kind: ns_llm_event_kind,
    /// Which choice, from 0.
    pub choice: u32,
    /// New text of the choice, or the sentence about a failure. Whole UTF-8 characters, never a part of a stop text;
    /// what may still become either is held back, so the text can be empty and can lag behind the tokens.
    pub text: ns_llm_text,
    /// New tokens of the choice.
    pub token_ids: *const u32,
    /// Number of `token_ids`.
    pub num_token_ids: usize,
    /// One for each of `token_ids`, if `logprobs` was set in the request.
    pub logprobs: *const ns_llm_token_logprobs,
    /// Number of `logprobs`: 0, or `num_token_ids`.
    pub num_logprobs: usize,
    /// Why the choice ended.
    pub finish_reason: ns_llm_finish_reason,
    /// Why the request failed.
    pub status: ns_llm_status,
    /// Counts and times, or NULL.
    pub summary: *const ns_llm_summary,
    /// One for each token of the prompt from the second on, if NS_LLM_REQUEST_PROMPT_LOGPROBS was set.
    pub prompt_logprobs: *const ns_llm_token_logprobs,
    /// Number of `prompt_logprobs`.
    pub num_prompt_logprobs: usize,
    /// The vector of an input.
    pub embedding: *const f32,
    /// Number of `embedding`.
    pub num_dimensions: usize,
    /// Which input, from 0.
    pub input: usize,
    /// Tokens that the vector was computed from.
    pub num_input_tokens: usize,
    /// 1 if the input was longer and lost its end, else 0.
    pub is_truncated: u64,
}

// SAFETY: `repr(C)`, begins with a `usize`. Written only, never read from C, so that not every number is a kind does no
// harm.
unsafe impl SizedStruct for ns_llm_event {}

/// Receives the events of a request, on the engine's callback thread: one thread per engine, made by
/// ns_llm_engine_open(), with a stack of 2 MiB. Events of one engine never overlap, so a callback that blocks holds up
/// the events of all its requests (but not their computing).
///
/// Returns `true` to go on, `false` to cancel the request: then only its last event still comes. What the last event
/// returns is ignored. A callback may call any function of this header, freeing its own request and engine included,
/// except those that say NS_LLM_IN_CALLBACK. It must return: no longjmp, no C++ exception.
pub type ns_llm_event_callback =
    Option<unsafe extern "C" fn(event: *const ns_llm_event, user_data: *mut c_void) -> bool>;

/// What a stream gave. One that is over without a last event is a defect of the engine, and tells that as its last.
pub(crate) fn or_lost_end(event: Option<Result<Event, Error>>) -> Result<Event, Error> {
    event.unwrap_or_else(|| Err(Error::Internal { reason: "the request ended without a last event".to_string() }))
}

/// One event with everything that C is shown of it.
pub(crate) struct Shown {
    /// Points into what is owned, which never changes: its contents do not move when this struct does.
    view: ns_llm_event,
    _owned: Owned,
}

/// What the view of an event points to.
#[derive(Default)]
struct Owned {
    text: String,
    token_ids: Vec<u32>,
    embedding: Vec<f32>,
    logprobs: Logprobs,
    summary: Option<Box<ns_llm_summary>>,
}

// SAFETY: the pointers in `view` lead to what this struct owns, and to nothing else.
unsafe impl Send for Shown {}

impl Shown {
    /// The event of a request, or `None` if it is of a kind that this header does not have.
    pub(crate) fn new(request: ns_llm_request, event: Result<Event, Error>) -> Option<Shown> {
        use ns_llm_event_kind::*;
        let mut view = blank(request);
        let mut owned = Owned::default();
        match event {
            Ok(Event::Delta(delta)) => {
                (view.kind, view.choice) = (NS_LLM_EVENT_DELTA, delta.choice as u32);
                (owned.text, owned.token_ids) = (delta.text, delta.token_ids);
                owned.logprobs = Logprobs::new(&delta.logprobs);
                (view.logprobs, view.num_logprobs) = owned.logprobs.view();
            }
            Ok(Event::Finished { choice, reason }) => {
                (view.kind, view.choice) = (NS_LLM_EVENT_FINISHED, choice as u32);
                view.finish_reason = finish_reason(reason);
            }
            Ok(Event::Embedding { input, embedding }) => {
                (view.kind, view.input) = (NS_LLM_EVENT_EMBEDDING, input);
                (view.num_input_tokens, view.is_truncated) = (embedding.tokens, u64::from(embedding.truncated));
                owned.embedding = embedding.values;
                (view.embedding, view.num_dimensions) = (owned.embedding.as_ptr(), owned.embedding.len());
            }
            Ok(Event::Done(summary)) => {
                view.kind = NS_LLM_EVENT_DONE;
                owned.logprobs = Logprobs::new(&summary.prompt_logprobs);
                (view.prompt_logprobs, view.num_prompt_logprobs) = owned.logprobs.view();
                view.summary = &raw const **owned.summary.insert(Box::new(ns_llm_summary::from(&summary)));
            }
            Err(error) => {
                (view.kind, view.status) = (NS_LLM_EVENT_FAILED, status_of(&error));
                owned.text = error.to_string();
            }
            Ok(_) => return None,
        }
        view.text = ns_llm_text::view(&owned.text);
        if !owned.token_ids.is_empty() {
            (view.token_ids, view.num_token_ids) = (owned.token_ids.as_ptr(), owned.token_ids.len());
        }
        Some(Shown { view, _owned: owned })
    }

    /// The event as C sees it, for as long as `self` lives.
    pub(crate) fn view(&self) -> &ns_llm_event {
        &self.view
    }
}

fn blank(request: ns_llm_request) -> ns_llm_event {
    ns_llm_event {
        struct_size: size_of::<ns_llm_event>(),
        request,
        kind: ns_llm_event_kind::NS_LLM_EVENT_DELTA,
        choice: 0,
        text: ns_llm_text::view(""),
        token_ids: ptr::null(),
        num_token_ids: 0,
        logprobs: ptr::null(),
        num_logprobs: 0,
        finish_reason: ns_llm_finish_reason::NS_LLM_FINISH_OTHER,
        status: ns_llm_status::NS_LLM_OK,
        summary: ptr::null(),
        prompt_logprobs: ptr::null(),
        num_prompt_logprobs: 0,
        embedding: ptr::null(),
        num_dimensions: 0,
        input: 0,
        num_input_tokens: 0,
        is_truncated: 0,
    }
}

/// Logprobs in C's form. Both vectors are empty where none were asked for.
#[derive(Default)]
struct Logprobs {
    /// `rows[i].top` points into `tops`.
    rows: Vec<ns_llm_token_logprobs>,
    _tops: Vec<ns_llm_logprob>,
}

impl Logprobs {
    fn new(tokens: &[TokenLogprobs]) -> Self {
        let tops: Vec<ns_llm_logprob> = tokens.iter().flat_map(|token| token.top.iter().map(Into::into)).collect();
        let mut rest = tops.as_slice();
        let rows = tokens.iter().map(|token| {
            let (top, after) = rest.split_at(token.top.len());
            rest = after;
            ns_llm_token_logprobs { chosen: (&token.chosen).into(), top: top.as_ptr(), num_top: top.len() }
        });
        Logprobs { rows: rows.collect(), _tops: tops }
    }

    fn view(&self) -> (*const ns_llm_token_logprobs, usize) {
        if self.rows.is_empty() { (ptr::null(), 0) } else { (self.rows.as_ptr(), self.rows.len()) }
    }
}

impl From<&Logprob> for ns_llm_logprob {
    fn from(logprob: &Logprob) -> Self {
        ns_llm_logprob { token_id: logprob.token_id, logprob: logprob.logprob }
    }
}

/// Who hears the events of one request by callback.
pub(crate) struct Listener {
    pub(crate) function: unsafe extern "C" fn(*const ns_llm_event, *mut c_void) -> bool,
    pub(crate) user_data: UserData,
    /// Handle of the request.
    pub(crate) request: ns_llm_request,
}

impl Listener {
    /// Tells an event; `false` means that the listener wants no more.
    pub(crate) fn tell(&self, event: Result<Event, Error>) -> bool {
        Shown::new(self.request, event).is_none_or(|shown| {
            // SAFETY: the caller of ns_llm_generate() promised that the function may be called on this thread with its
            // `user_data` until the last event has returned; `shown` and what it points to live until then.
            as_callback(|| unsafe { (self.function)(shown.view(), self.user_data.0) })
        })
    }
}

fn prefix_miss(miss: Option<PrefixMiss>) -> ns_llm_prefix_miss {
    use ns_llm_prefix_miss::*;
    match miss.map(|miss| miss.reason) {
        None => NS_LLM_PREFIX_MISS_NONE,
        Some(MissReason::NeverSeen) => NS_LLM_PREFIX_MISS_NEVER_SEEN,
        Some(MissReason::Evicted(CacheTier::Pool)) => NS_LLM_PREFIX_MISS_EVICTED_FROM_POOL,
        Some(MissReason::Evicted(CacheTier::Host)) => NS_LLM_PREFIX_MISS_EVICTED_FROM_HOST,
        Some(MissReason::Evicted(CacheTier::Disk)) => NS_LLM_PREFIX_MISS_EVICTED_FROM_DISK,
        Some(MissReason::Evicted(CacheTier::Remote)) => NS_LLM_PREFIX_MISS_EVICTED_FROM_REMOTE,
        Some(MissReason::Slower) => NS_LLM_PREFIX_MISS_SLOWER,
        Some(MissReason::Fault) => NS_LLM_PREFIX_MISS_FAULT,
        Some(MissReason::GaveUp) => NS_LLM_PREFIX_MISS_GAVE_UP,
        Some(MissReason::Disabled) => NS_LLM_PREFIX_MISS_DISABLED,
        Some(_) => NS_LLM_PREFIX_MISS_OTHER,
    }
}

fn finish_reason(reason: FinishReason) -> ns_llm_finish_reason {
    match reason {
        FinishReason::Stop => ns_llm_finish_reason::NS_LLM_FINISH_STOP,
        FinishReason::Length => ns_llm_finish_reason::NS_LLM_FINISH_LENGTH,
        _ => ns_llm_finish_reason::NS_LLM_FINISH_OTHER,
    }
}

impl From<&Summary> for ns_llm_summary {
    fn from(summary: &Summary) -> Self {
        let Summary { usage, timings, seed, .. } = summary;
        ns_llm_summary {
            struct_size: size_of::<ns_llm_summary>(),
            prompt_tokens: usage.prompt_tokens as u64,
            completion_tokens: usage.completion_tokens as u64,
            cached_tokens: usage.cached_tokens as u64,
            preemptions: usage.preemptions as u64,
            seed: *seed,
            queue_ms: timings.queue_ms,
            prompt_ms: timings.prompt_ms,
            first_token_ms: timings.first_token_ms,
            decode_ms: timings.decode_ms,
            total_ms: timings.total_ms,
            cached_pool_tokens: usage.cached_by_tier.pool as u64,
            cached_host_tokens: usage.cached_by_tier.host as u64,
            cached_disk_tokens: usage.cached_by_tier.disk as u64,
            cached_remote_tokens: usage.cached_by_tier.remote as u64,
            prefix_miss: prefix_miss(usage.prefix_miss) as u64,
            prefix_miss_token: usage.prefix_miss.map_or(0, |miss| miss.token as u64),
            from_response_cache: u64::from(summary.from_response_cache),
        }
    }
}
