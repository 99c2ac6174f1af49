//! Vectors of texts on their way to JavaScript: one object in, one promise, each vector a `Float32Array` over the very
//! memory that the engine wrote.

use std::cell::RefCell;
use std::rc::Rc;
use std::task::{Context, Poll};

use napi::Env;
use napi::bindgen_prelude::{Float32Array, PromiseRaw};
use napi_derive::napi;
use ns_llm::{Canceller, Embedding, Error, Event, RequestStream, Summary};

use crate::error::{Result, from_napi};
use crate::stream::{Timings, Usage};

/// A submitted embedding request. Dropping it cancels the request.
#[napi]
pub struct NativeEmbedding {
    events: Rc<RefCell<RequestStream>>,
    num_inputs: usize,
    canceller: Canceller,
}

#[napi]
impl NativeEmbedding {
    pub(crate) fn new(events: RequestStream, num_inputs: usize) -> Self {
        let canceller = events.canceller();
        NativeEmbedding { events: Rc::new(RefCell::new(events)), num_inputs, canceller }
    }

    /// All vectors. Works once.
    #[napi(catch_unwind)]
    pub fn result<'env>(&self, env: &'env Env) -> Result<PromiseRaw<'env, NativeEmbeddings>> {
        let events = Rc::clone(&self.events);
        let mut embeddings = vec![Embedding::default(); self.num_inputs];
        let poll = move |_: &Env, cx: &mut Context<'_>| poll_all(&mut events.borrow_mut(), cx, &mut embeddings);
        crate::event_loop::promise(env, poll).map_err(from_napi)
    }

    /// Asks for the end: the promise rejects with `cancelled` within one step.
    #[napi(catch_unwind)]
    pub fn cancel(&self) {
        self.canceller.cancel();
    }
}

fn poll_all(
    events: &mut RequestStream,
    cx: &mut Context<'_>,
    embeddings: &mut Vec<Embedding>,
) -> Poll<ns_llm::Result<NativeEmbeddings>> {
    loop {
        match events.poll_next(cx) {
            Poll::Ready(Some(Ok(Event::Embedding { input, embedding }))) => embeddings[input] = embedding,
            Poll::Ready(Some(Ok(Event::Done(summary)))) => {
                return Poll::Ready(Ok(NativeEmbeddings::new(std::mem::take(embeddings), summary)));
            }
            // An embedding request has no other events.
            Poll::Ready(Some(Ok(_))) => {}
            Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(error)),
            Poll::Ready(None) => return Poll::Ready(Err(Error::Closed)),
            Poll::Pending => return Poll::Pending,
        }
    }
}

/// Vectors of one request, and its counts and times.
#[napi(object, object_from_js = false)]
pub struct NativeEmbeddings {
    /// One vector per input.
    pub vectors: Vec<Float32Array>,
    /// Tokens that each was computed from.
    pub tokens: Vec<u32>,
    /// Whether each input was longer and lost its end.
    pub truncated: Vec<bool>,
    /// Token counts.
    pub usage: Usage,
    /// Times.
    pub timings: Timings,
}

impl NativeEmbeddings {
    fn new(embeddings: Vec<Embedding>, summary: Summary) -> Self {
        NativeEmbeddings {
            tokens: embeddings.iter().map(|embedding| embedding.tokens as u32).collect(),
            truncated: embeddings.iter().map(|embedding| embedding.truncated).collect(),
            vectors: embeddings.into_iter().map(|embedding| Float32Array::new(embedding.values)).collect(),
            usage: summary.usage.into(),
            timings: summary.timings.into(),
        }
    }
}
