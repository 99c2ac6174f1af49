//! # Events
//!
//! What a request has to say arrives as a sequence of events, in this order: any number of DELTA, one FINISHED for each
//! choice, and as the very last either DONE or FAILED. Whatever happens to an accepted request - it ends, it is
//! cancelled, its handle or its engine is freed - it gets exactly one last event.

use std::ffi::c_void;
use std::ptr;

use ns_llm_core::{Delta, Error, Event, FinishReason, Summary};

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
    /// New tokens of one choice, and the text that they complete: `choice`, `text`, `token_ids`.
    NS_LLM_EVENT_DELTA = 1,
    /// One choice has ended: `choice`, `finish_reason`.
    NS_LLM_EVENT_FINISHED = 2,
    /// The last event of a request that ended by itself: `summary`.
    NS_LLM_EVENT_DONE = 3,
    /// The last event of any other: `status` says why, `text` says it in a sentence.
    NS_LLM_EVENT_FAILED = 4,
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

/// Counts and times of a request that ended by itself. Times are milliseconds.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ns_llm_summary {
    /// `sizeof(ns_llm_summary)`: set by whoever owns the struct.
    pub struct_size: usize,
    /// Tokens of the prompt.
    pub prompt_tokens: u64,
    /// Tokens of all choices, stop tokens included.
    pub completion_tokens: u64,
    /// Tokens of the prompt that were found in the prefix cache and not computed.
    pub cached_tokens: u64,
    /// How often the request lost its KV to others and was computed again (its tokens are the same).
    pub preemptions: u64,
    /// The seed that was used. Give it again to get the same answer.
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
}

// SAFETY: `repr(C)`, begins with a `usize`, all numbers.
unsafe impl SizedStruct for ns_llm_summary {}

/// One event. The struct and everything in it belong to the library and are valid until the callback returns; copy what
/// you keep. Fields that its kind does not name are zero or empty; `text.data` is never NULL.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ns_llm_event {
    /// Size of the struct as the library knows it. Fields that you know and an older library does not lie beyond it.
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
    /// Why the choice ended.
    pub finish_reason: ns_llm_finish_reason,
    /// Why the request failed: what ns_llm_request_wait() returns.
    pub status: ns_llm_status,
    /// Counts and times, or NULL.
    pub summary: *const ns_llm_summary,
}

/// Receives the events of a request, on the engine's callback thread: one thread per engine, made by
/// ns_llm_engine_open(), with a stack of 2 MiB. Events of one engine never overlap, so a callback that blocks holds up
/// the events of all its requests (but not their computing).
///
/// Returns `true` to go on, `false` to cancel the request: then only its last event still comes. What the last event
/// returns is ignored. A callback may call any function of this header, freeing its own request and engine included,
/// except those that say NS_LLM_IN_CALLBACK. It must return: no longjmp, no C++ exception.
pub type ns_llm_event_callback =
    Option<unsafe extern "C" fn(event: *const ns_llm_event, user_data: *mut c_void) -> bool>;

/// Who hears the events of one request.
pub(crate) struct Listener {
    pub(crate) function: unsafe extern "C" fn(*const ns_llm_event, *mut c_void) -> bool,
    pub(crate) user_data: UserData,
    /// Handle of the request.
    pub(crate) request: ns_llm_request,
}

impl Listener {
    /// Tells an event that is not the last; `false` means that the listener wants no more.
    pub(crate) fn tell(&self, event: &Event) -> bool {
        match event {
            Event::Delta(delta) => self.tell_delta(delta),
            Event::Finished { choice, reason } => self.call(&ns_llm_event {
                choice: *choice as u32,
                finish_reason: finish_reason(*reason),
                ..self.blank(ns_llm_event_kind::NS_LLM_EVENT_FINISHED)
            }),
            // `Done` goes through `tell_end`; kinds that this header does not have are not told.
            _ => true,
        }
    }

    fn tell_delta(&self, delta: &Delta) -> bool {
        self.call(&ns_llm_event {
            choice: delta.choice as u32,
            text: ns_llm_text::view(&delta.text),
            token_ids: delta.token_ids.as_ptr(),
            num_token_ids: delta.token_ids.len(),
            ..self.blank(ns_llm_event_kind::NS_LLM_EVENT_DELTA)
        })
    }

    /// Tells the last event.
    pub(crate) fn tell_end(&self, end: &Result<Summary, Error>) {
        match end {
            Ok(summary) => {
                let summary = summary.into();
                self.call(&ns_llm_event { summary: &summary, ..self.blank(ns_llm_event_kind::NS_LLM_EVENT_DONE) })
            }
            Err(error) => self.call(&ns_llm_event {
                text: ns_llm_text::view(&error.to_string()),
                status: status_of(error),
                ..self.blank(ns_llm_event_kind::NS_LLM_EVENT_FAILED)
            }),
        };
    }

    fn blank(&self, kind: ns_llm_event_kind) -> ns_llm_event {
        ns_llm_event {
            struct_size: size_of::<ns_llm_event>(),
            request: self.request,
            kind,
            choice: 0,
            text: ns_llm_text::view(""),
            token_ids: ptr::null(),
            num_token_ids: 0,
            finish_reason: ns_llm_finish_reason::NS_LLM_FINISH_OTHER,
            status: ns_llm_status::NS_LLM_OK,
            summary: ptr::null(),
        }
    }

    fn call(&self, event: &ns_llm_event) -> bool {
        // SAFETY: the caller of ns_llm_generate() promised that the function may be called on this thread with its
        // `user_data` until the last event has returned; `event` and what it points to live until then.
        as_callback(|| unsafe { (self.function)(event, self.user_data.0) })
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
        }
    }
}
