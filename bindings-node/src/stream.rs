//! The reading end of one request. JavaScript asks for what is next and gets everything that is ready at once.

use std::cell::RefCell;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use napi::Env;
use napi::bindgen_prelude::{BigInt, Either, FnArgs, Function, PromiseRaw};
use napi_derive::napi;
use ns_llm::{Canceller, Error, Event, RequestStream};
use serde::Serialize;

use crate::error::{Result, from_napi};
use crate::request::MAX_SAFE_INTEGER;
use crate::stats::CachedTokens;

/// Events that one read brings at most: a reader that comes late shares the event loop with the others.
const MAX_EVENTS_PER_BATCH: usize = 1_024;

/// A submitted request. Dropping it cancels the request.
#[napi]
pub struct NativeStream {
    reader: Rc<RefCell<Reader>>,
    canceller: Canceller,
}

struct Reader {
    events: RequestStream,
    /// What was read and could not be given yet; it comes before what is still to be read.
    read: Option<NativeBatch>,
    /// An error that came after events of the same batch; it is the next thing to report.
    error: Option<Error>,
}

#[napi]
impl NativeStream {
    pub(crate) fn new(events: RequestStream) -> Self {
        let canceller = events.canceller();
        NativeStream { reader: Rc::new(RefCell::new(Reader { events, read: None, error: None })), canceller }
    }

    /// The whole answer as the JSON text of its [`NativeBatch`], if it is there already, which it is when it was kept: one
    /// string crosses in place of some two hundred calls, and V8's own parser makes the objects. Not what JSON cannot say
    /// (seeds beyond 2^53, logprobs that may be infinite); that is read as everything else is.
    pub(crate) fn whole_as_json(&self) -> Option<String> {
        let mut reader = self.reader.borrow_mut();
        let mut cx = Context::from_waker(Waker::noop());
        match reader.poll_rest(&mut cx, &mut NativeBatch::default()) {
            Poll::Pending => None,
            Poll::Ready(Err(error)) => {
                reader.error = Some(error);
                None
            }
            Poll::Ready(Ok(batch)) => {
                let json = batch.is_json().then(|| serde_json::to_string(&batch).ok()).flatten();
                if json.is_none() {
                    reader.read = Some(batch);
                }
                json
            }
        }
    }

    /// Calls `onRead` once, with all events that are ready when there is one, which may be before this returns. A single
    /// token without more about it, which is what a reader that keeps up finds at each step, comes as `text`, `choice`
    /// and `tokenId` in place of a batch; after the last event both are `null`. `onRead` must not throw.
    #[napi(
        catch_unwind,
        ts_args_type = "onRead: (error: unknown, batch: NativeBatch | null, text: string | null, choice: number, tokenId: number) => void"
    )]
    pub fn read(&self, env: &Env, on_read: Function<'_, ReadArgs, ()>) -> Result<()> {
        let reader = Rc::clone(&self.reader);
        let poll = move |_: &Env, cx: &mut Context<'_>| reader.borrow_mut().poll_batch(cx).map_ok(read_args);
        crate::event_loop::callback(env, &on_read, poll).map_err(from_napi)
    }

    /// All events to the end, in one promise: nothing of them enters JavaScript before, which is not woken for them.
    #[napi(catch_unwind)]
    pub fn rest<'env>(&self, env: &'env Env) -> Result<PromiseRaw<'env, NativeBatch>> {
        let reader = Rc::clone(&self.reader);
        let mut all = NativeBatch::default();
        let poll = move |_: &Env, cx: &mut Context<'_>| reader.borrow_mut().poll_rest(cx, &mut all);
        crate::event_loop::promise(env, poll).map_err(from_napi)
    }

    /// Asks for the end: the next reading fails with `cancelled` within one step.
    #[napi(catch_unwind)]
    pub fn cancel(&self) {
        self.canceller.cancel();
    }
}

impl Reader {
    fn poll_batch(&mut self, cx: &mut Context<'_>) -> Poll<ns_llm::Result<Option<NativeBatch>>> {
        if let Some(batch) = self.read.take() {
            return Poll::Ready(Ok(Some(batch)));
        }
        if let Some(error) = self.error.take() {
            return Poll::Ready(Err(error));
        }
        let mut batch = NativeBatch::default();
        while batch.num_events() < MAX_EVENTS_PER_BATCH {
            match self.events.poll_next(cx) {
                Poll::Ready(Some(Ok(event))) => batch.push(event),
                Poll::Ready(Some(Err(error))) if batch.num_events() == 0 => return Poll::Ready(Err(error)),
                Poll::Ready(Some(Err(error))) => {
                    self.error = Some(error);
                    break;
                }
                Poll::Ready(None) if batch.num_events() == 0 => return Poll::Ready(Ok(None)),
                Poll::Pending if batch.num_events() == 0 => return Poll::Pending,
                Poll::Ready(None) | Poll::Pending => break,
            }
        }
        Poll::Ready(Ok(Some(batch)))
    }

    fn poll_rest(&mut self, cx: &mut Context<'_>, all: &mut NativeBatch) -> Poll<ns_llm::Result<NativeBatch>> {
        if self.events.poll_ended(cx).is_pending() {
            return Poll::Pending;
        }
        loop {
            match self.poll_batch(cx) {
                Poll::Ready(Ok(Some(batch))) => all.append(batch),
                Poll::Ready(Ok(None)) => return Poll::Ready(Ok(std::mem::take(all))),
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => return Poll::Pending,
            }
        }
    }
}

/// What `onRead` hears after its error: a batch, or a token as text, choice and id.
type ReadArgs = FnArgs<(Option<NativeBatch>, Option<String>, u32, u32)>;

fn read_args(batch: Option<NativeBatch>) -> ReadArgs {
    let Some(mut batch) = batch else { return (None, None, 0, 0).into() };
    match batch.take_single_token() {
        Some((delta, token_id)) => (None, Some(delta.text), delta.choice, token_id).into(),
        None => (Some(batch), None, 0, 0).into(),
    }
}

/// What is new about a request, sorted by kind: an object less per event, and the order between the kinds says nothing
/// (a choice ends after its last delta, the request after its last choice).
#[napi(object, object_from_js = false)]
#[derive(Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct NativeBatch {
    /// New tokens and text, in order.
    pub deltas: Vec<NativeDelta>,
    /// Choices that have ended, when there is one.
    pub finished: Option<Vec<NativeFinished>>,
    /// All choices have ended.
    pub done: Option<NativeSummary>,
}

impl NativeBatch {
    fn push(&mut self, event: Event) {
        match event {
            Event::Delta(delta) => self.deltas.push(delta.into()),
            Event::Finished { choice, reason } => {
                let finished = NativeFinished { choice: choice as u32, reason: reason.as_str().to_string() };
                self.finished.get_or_insert_default().push(finished);
            }
            Event::Done(summary) => self.done = Some(summary.into()),
            // A kind of event that this face does not know yet.
            _ => {}
        }
    }

    fn append(&mut self, mut batch: NativeBatch) {
        self.deltas.append(&mut batch.deltas);
        if let Some(mut finished) = batch.finished {
            self.finished.get_or_insert_default().append(&mut finished);
        }
        self.done = self.done.take().or(batch.done);
    }

    /// The delta and the token of a batch that holds nothing else.
    fn take_single_token(&mut self) -> Option<(NativeDelta, u32)> {
        let [NativeDelta { token_ids, logprobs: None, .. }] = self.deltas.as_slice() else { return None };
        let &[token_id] = token_ids.as_slice() else { return None };
        if self.num_events() > 1 {
            return None;
        }
        self.deltas.pop().map(|delta| (delta, token_id))
    }

    /// Whether JSON can say all of it.
    fn is_json(&self) -> bool {
        let done = self.done.as_ref();
        self.deltas.iter().all(|delta| delta.logprobs.is_none())
            && done.is_some_and(|done| matches!(done.seed, Either::A(_)) && done.prompt_logprobs.is_empty())
    }

    fn num_events(&self) -> usize {
        self.deltas.len() + self.finished.as_ref().map_or(0, Vec::len) + usize::from(self.done.is_some())
    }
}

/// New tokens of one choice and the text they complete.
#[napi(object, object_from_js = false)]
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct NativeDelta {
    /// Which choice, from 0.
    pub choice: u32,
    /// New text.
    pub text: String,
    /// New tokens.
    pub token_ids: Vec<u32>,
    /// One entry per token, when asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logprobs: Option<Vec<TokenLogprobs>>,
}

impl From<ns_llm::Delta> for NativeDelta {
    fn from(delta: ns_llm::Delta) -> Self {
        NativeDelta {
            choice: delta.choice as u32,
            text: delta.text,
            token_ids: delta.token_ids,
            logprobs: (!delta.logprobs.is_empty()).then(|| delta.logprobs.iter().map(TokenLogprobs::from).collect()),
        }
    }
}

/// Which choice ended, and why.
#[napi(object, object_from_js = false)]
#[derive(Serialize)]
pub struct NativeFinished {
    /// Which choice, from 0.
    pub choice: u32,
    /// Why it ended.
    #[napi(ts_type = "'stop' | 'length'")]
    pub reason: String,
}

/// A token and the natural logarithm of its probability under the model.
#[napi(object, object_from_js = false)]
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Logprob {
    /// The token.
    pub token_id: u32,
    /// Its log-probability.
    pub logprob: f64,
}

impl From<&ns_llm::Logprob> for Logprob {
    fn from(logprob: &ns_llm::Logprob) -> Self {
        Logprob { token_id: logprob.token_id, logprob: f64::from(logprob.logprob) }
    }
}

/// Logprob of a chosen token, and of the most likely ones at its position.
#[napi(object, object_from_js = false)]
#[derive(Serialize)]
pub struct TokenLogprobs {
    /// The token that was chosen (or was given, in a prompt).
    pub chosen: Logprob,
    /// The most likely tokens, best first; as many as were asked for.
    pub top: Vec<Logprob>,
}

impl From<&ns_llm::TokenLogprobs> for TokenLogprobs {
    fn from(logprobs: &ns_llm::TokenLogprobs) -> Self {
        TokenLogprobs { chosen: (&logprobs.chosen).into(), top: logprobs.top.iter().map(Logprob::from).collect() }
    }
}

/// Token counts of a request.
#[napi(object, object_from_js = false)]
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: f64,
    /// Tokens of all answers, stop tokens included.
    pub completion_tokens: f64,
    /// Tokens of the prompt that were not computed: their KV was found in the cache (of the first choice), or the whole
    /// answer was kept.
    pub cached_tokens: f64,
    /// The same by the place where it was found.
    pub cached_by_tier: CachedTokens,
    /// How often a sequence of this request was preempted.
    pub preemptions: f64,
    /// Why the rest of the prompt was not found. Not there: everything was that can be, which is all full blocks but what the
    /// last token needs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefix_miss: Option<PrefixMiss>,
}

/// Where a search for a prompt's KV ended, and why.
#[napi(object, object_from_js = false)]
#[derive(Serialize)]
pub struct PrefixMiss {
    /// Position of the first prompt token that was not found: the first of a block.
    pub token: f64,
    /// Why: nobody has computed it in this namespace, as far as is known; it was given up for others; computing it was faster
    /// than fetching it; its place failed; nothing arrived for too long; the cache was not read.
    #[napi(ts_type = "'never_seen' | 'evicted' | 'slower' | 'fault' | 'gave_up' | 'disabled'")]
    pub reason: String,
    /// Who has given it up, when it was evicted.
    #[napi(ts_type = "'pool' | 'host' | 'disk' | 'remote'")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tier: Option<String>,
}

impl From<ns_llm::PrefixMiss> for PrefixMiss {
    fn from(miss: ns_llm::PrefixMiss) -> Self {
        PrefixMiss {
            token: miss.token as f64,
            reason: miss.reason.as_str().to_string(),
            tier: miss.reason.tier().map(|tier| tier.as_str().to_string()),
        }
    }
}

impl From<ns_llm::Usage> for Usage {
    fn from(usage: ns_llm::Usage) -> Self {
        Usage {
            prompt_tokens: usage.prompt_tokens as f64,
            completion_tokens: usage.completion_tokens as f64,
            cached_tokens: usage.cached_tokens as f64,
            cached_by_tier: usage.cached_by_tier.into(),
            preemptions: usage.preemptions as f64,
            prefix_miss: usage.prefix_miss.map(PrefixMiss::from),
        }
    }
}

/// Times of a request, milliseconds.
#[napi(object, object_from_js = false)]
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Timings {
    /// From submission to the first step that computed it.
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

impl From<ns_llm::Timings> for Timings {
    fn from(timings: ns_llm::Timings) -> Self {
        Timings {
            queue_ms: timings.queue_ms,
            prompt_ms: timings.prompt_ms,
            first_token_ms: timings.first_token_ms,
            decode_ms: timings.decode_ms,
            total_ms: timings.total_ms,
        }
    }
}

/// Counts and times of a finished request.
#[napi(object, object_from_js = false)]
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct NativeSummary {
    /// Token counts.
    pub usage: Usage,
    /// Times.
    pub timings: Timings,
    /// The seed that was used: a number when that is exact, else a bigint.
    #[serde(serialize_with = "exact_seed")]
    pub seed: Either<f64, BigInt>,
    /// For each prompt token from the second on; empty when not asked for.
    pub prompt_logprobs: Vec<TokenLogprobs>,
    /// Whether the answer was kept from an earlier request.
    pub from_response_cache: bool,
}

/// A seed that is a number; the others are not written as JSON (see [`NativeBatch::is_json`]).
fn exact_seed<S: serde::Serializer>(seed: &Either<f64, BigInt>, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    match seed {
        Either::A(seed) => serializer.serialize_f64(*seed),
        Either::B(_) => Err(serde::ser::Error::custom("a seed that no number holds")),
    }
}

impl From<ns_llm::Summary> for NativeSummary {
    fn from(summary: ns_llm::Summary) -> Self {
        let seed = summary.seed;
        NativeSummary {
            usage: summary.usage.into(),
            timings: summary.timings.into(),
            seed: if seed <= MAX_SAFE_INTEGER as u64 { Either::A(seed as f64) } else { Either::B(BigInt::from(seed)) },
            prompt_logprobs: summary.prompt_logprobs.iter().map(TokenLogprobs::from).collect(),
            from_response_cache: summary.from_response_cache,
        }
    }
}
