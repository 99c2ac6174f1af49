//! What travels between the engine's threads: from a handle to the intake thread a [`Submission`], from there to the
//! worker a [`Prepared`] inside a [`Command`]. Everything else comes back through the request's event channel.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::SyncSender;

use crate::config::MAX_PENDING_PROMPT_BYTES;
use crate::embedding::EmbeddingRequest;
use crate::error::{Error, Result};
use crate::kv_cache::tiers::{Done, JobId};
use crate::request::{Origin, Prompt, Request};
use crate::responses::Recorder;
use crate::sequence::{EncodeSpec, SequenceSpec};
use crate::storage::{Fault, RecordKey, TierId};
use crate::stream::EventSender;
use crate::tokenizer::StopStrings;

/// Identity of a request for the life of an engine; never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct RequestId(pub(crate) u64);

/// What the world may ask of the worker.
pub(crate) enum Command {
    /// Run a request.
    Run(Box<Prepared>),
    /// Intake has refused a request (for the counters).
    Refused,
    /// The reader of a request wants no more.
    Cancel(RequestId),
    /// A tier has done what it was asked.
    Tier(TierAnswer),
    /// Reply when everything that was to be written so far is on the medium.
    Flush(SyncSender<Result<()>>),
    /// Forget what is cached for later, and reply when it is gone.
    Clear(SyncSender<Result<()>>),
    /// End everything.
    Close,
}

/// What the thread of a tier says.
pub(crate) enum TierAnswer {
    /// One of its jobs is done; these blocks went for it.
    Done { id: TierId, job: JobId, done: Done, lost: Vec<RecordKey> },
    /// Whether what it had stored is on the medium.
    Flushed { id: TierId, result: Result<(), Fault> },
}

/// What a user asks for.
pub(crate) enum Work {
    Generate(Box<Request>),
    Embed(EmbeddingRequest),
}

impl Work {
    /// Bytes of its prompts.
    fn prompt_bytes(&self) -> usize {
        match self {
            Work::Embed(request) => request.input_bytes(),
            Work::Generate(request) => match &request.prompt {
                Prompt::Text(text) => text.len(),
                Prompt::Tokens(ids) => size_of_val(ids.as_slice()),
                Prompt::Chat(messages) => messages.iter().map(|m| m.role.len() + m.content.len()).sum(),
            },
        }
    }
}

/// A request on its way in.
pub(crate) struct Submission {
    pub(crate) id: RequestId,
    pub(crate) work: Work,
    pub(crate) sender: EventSender,
    pub(crate) origin: Origin,
    pub(crate) slot: PendingSlot,
}

/// A request that the scheduler can take.
pub(crate) struct Prepared {
    pub(crate) id: RequestId,
    pub(crate) work: PreparedWork,
    pub(crate) sender: EventSender,
    pub(crate) origin: Origin,
    pub(crate) slot: PendingSlot,
}

/// The sequences of a request.
pub(crate) enum PreparedWork {
    /// One per choice. `recorder` keeps the answer when it is complete.
    Generate { specs: Vec<SequenceSpec>, stop: StopStrings, seed: u64, recorder: Option<Box<Recorder>> },
    /// One per input.
    Embed(Vec<PreparedInput>, VectorForm),
}

/// One input of an embedding request.
pub(crate) struct PreparedInput {
    pub(crate) spec: EncodeSpec,
    /// It lost its end.
    pub(crate) truncated: bool,
}

/// What is done with a vector before it goes to its reader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct VectorForm {
    /// Leading elements to keep.
    pub(crate) dimensions: usize,
    /// To unit length.
    pub(crate) normalize: bool,
}

/// Requests, and bytes of their prompts, that are on their way to the scheduler. Counted by atomics: callers of any
/// thread take a slot, whichever thread admits or refuses the request gives it back.
pub(crate) struct Pending {
    max_requests: usize,
    requests: AtomicUsize,
    prompt_bytes: AtomicUsize,
}

/// A place among the pending requests; given back when dropped.
pub(crate) struct PendingSlot {
    pending: Arc<Pending>,
    prompt_bytes: usize,
}

impl Pending {
    pub(crate) fn new(max_requests: usize) -> Arc<Self> {
        Arc::new(Pending { max_requests, requests: AtomicUsize::new(0), prompt_bytes: AtomicUsize::new(0) })
    }

    /// Requests that are pending now.
    pub(crate) fn num_requests(&self) -> usize {
        self.requests.load(Ordering::Acquire)
    }

    /// A place for `work`, unless too many requests or bytes are pending. One request always fits.
    pub(crate) fn take(self: &Arc<Self>, work: &Work) -> Result<PendingSlot> {
        let prompt_bytes = work.prompt_bytes();
        // The slot gives back what was added, also when the request is refused below.
        let requests = self.requests.fetch_add(1, Ordering::AcqRel);
        let bytes = self.prompt_bytes.fetch_add(prompt_bytes, Ordering::AcqRel);
        let slot = PendingSlot { pending: self.clone(), prompt_bytes };
        let overloaded = |queue, waiting, limit| Err(Error::Overloaded { queue, waiting, limit });
        if requests >= self.max_requests {
            return overloaded("intake queue (requests)", requests, self.max_requests);
        }
        if bytes > 0 && bytes.saturating_add(prompt_bytes) > MAX_PENDING_PROMPT_BYTES {
            return overloaded("intake queue (bytes of prompts)", bytes, MAX_PENDING_PROMPT_BYTES);
        }
        Ok(slot)
    }
}

impl Drop for PendingSlot {
    fn drop(&mut self) {
        self.pending.requests.fetch_sub(1, Ordering::AcqRel);
        self.pending.prompt_bytes.fetch_sub(self.prompt_bytes, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Slots are bounded in requests and in bytes, and come back when they are dropped or refused.
    #[test]
    fn slots_are_bounded_and_come_back() {
        let pending = Pending::new(2);
        let small = Work::Generate(Request::prompt("x").into());
        let first = pending.take(&small).expect("empty");
        let second = pending.take(&small).expect("one of two");
        assert!(matches!(pending.take(&small), Err(Error::Overloaded { waiting: 2, limit: 2, .. })));
        drop(first);
        let large = Work::Generate(Request::prompt("y".repeat(MAX_PENDING_PROMPT_BYTES)).into());
        assert!(matches!(pending.take(&large), Err(Error::Overloaded { limit: MAX_PENDING_PROMPT_BYTES, .. })));
        drop(second);
        let alone = pending.take(&large).expect("one request always fits");
        drop(alone);
        assert_eq!((pending.requests.load(Ordering::Relaxed), pending.prompt_bytes.load(Ordering::Relaxed)), (0, 0));
    }
}
