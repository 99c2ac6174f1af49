//! What a request handle stands for: the request's way of being read, and how it ended. A request with a callback is
//! [`Told`] on the callback thread; one without is [`Pulled`] by the program. The two exclude each other by type.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::task::Poll;
use std::time::{Duration, Instant};

use ns_llm_core::{Canceller, Error, Event, RequestStream};

use crate::event::{Shown, ns_llm_event, ns_llm_request, ns_llm_summary, or_lost_end};
use crate::failure::Failure;
use crate::handle::{HandleKind, HandleTable};
use crate::log::Log;

/// All requests that are not freed.
pub(crate) static REQUESTS: HandleTable<LiveRequest> = HandleTable::new(HandleKind::Request);

/// One request, by the way in which it is read.
pub(crate) enum LiveRequest {
    Told(Arc<Told>),
    Pulled(Box<Pulled>),
}

impl LiveRequest {
    pub(crate) fn cancel(&self) {
        match self {
            LiveRequest::Told(told) => told.cancel(),
            LiveRequest::Pulled(pulled) => pulled.canceller.cancel(),
        }
    }

    /// The callback's side, for `function`, which is made for it alone.
    pub(crate) fn told(&self, function: &'static str) -> Result<&Told, Failure> {
        match self {
            LiveRequest::Told(told) => Ok(told),
            LiveRequest::Pulled(_) => Err(Failure::WrongReader { function, reader: "ns_llm_request_next" }),
        }
    }

    /// The program's side, for `function`, which is made for it alone.
    pub(crate) fn pulled(&self, function: &'static str) -> Result<&Pulled, Failure> {
        match self {
            LiveRequest::Pulled(pulled) => Ok(pulled),
            LiveRequest::Told(_) => Err(Failure::WrongReader { function, reader: "a callback" }),
        }
    }
}

/// A request whose events go to a callback.
pub(crate) struct Told {
    phase: Mutex<Phase>,
    /// Signalled when `phase` becomes `Ended`.
    ended: Condvar,
}

/// How a request ended.
pub(crate) type End = Result<ns_llm_summary, Error>;

/// Changes once, on the callback thread. A request that has ended holds nothing of its engine, so a handle that is
/// never freed costs no more than its summary.
enum Phase {
    Running(Canceller),
    /// The last event has been told.
    Ended(End),
}

impl Told {
    pub(crate) fn new(canceller: Canceller) -> Self {
        Told { phase: Mutex::new(Phase::Running(canceller)), ended: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Phase> {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn cancel(&self) {
        let canceller = match &*self.lock() {
            Phase::Running(canceller) => canceller.clone(),
            Phase::Ended(_) => return,
        };
        // Outside the lock: the engine's code runs here.
        canceller.cancel();
    }

    /// The last event has been told.
    pub(crate) fn settle(&self, end: End) {
        let running = std::mem::replace(&mut *self.lock(), Phase::Ended(end));
        self.ended.notify_all();
        drop(running);
    }

    /// The end, or `None` if it did not come by `deadline` (`None`: however long it takes).
    pub(crate) fn wait(&self, deadline: Option<Instant>) -> Option<End> {
        let mut phase = self.lock();
        loop {
            if let Phase::Ended(end) = &*phase {
                return Some(end.clone());
            }
            phase = match deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())) {
                None => self.ended.wait(phase).unwrap_or_else(PoisonError::into_inner),
                Some(Duration::ZERO) => return None,
                Some(left) => self.ended.wait_timeout(phase, left).unwrap_or_else(PoisonError::into_inner).0,
            };
        }
    }
}

/// A request whose events the program fetches.
pub(crate) struct Pulled {
    canceller: Canceller,
    /// The engine's.
    log: Arc<Log>,
    /// The handle is gone: whoever is in the middle of [`Pulled::next`] must not show what nobody keeps any more.
    is_freed: AtomicBool,
    /// Held by the one reader while it waits, and for nothing else.
    reading: Mutex<Reading>,
}

struct Reading {
    /// `None` once the last event was read: then nothing of the engine is held.
    stream: Option<RequestStream>,
    /// What C is looking at.
    shown: Option<Shown>,
}

impl Pulled {
    pub(crate) fn new(stream: RequestStream, log: Arc<Log>) -> Self {
        let canceller = stream.canceller();
        let reading = Mutex::new(Reading { stream: Some(stream), shown: None });
        Pulled { canceller, log, is_freed: AtomicBool::new(false), reading }
    }

    /// The next event of the request that `handle` names, kept until the next call. `timeout`: `None` waits on.
    pub(crate) fn next(&self, handle: ns_llm_request, timeout: Option<Duration>) -> Result<ns_llm_event, Failure> {
        let mut reading = match self.reading.try_lock() {
            Ok(reading) => reading,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return Err(Failure::Busy),
        };
        let Reading { stream, shown } = &mut *reading;
        *shown = None;
        // A time beyond the clock's range is as good as no limit.
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        loop {
            let event = next_event(stream.as_mut().ok_or(Failure::Ended)?, deadline);
            let event = event.ok_or(Failure::Timeout { timeout_ms: timeout.unwrap_or_default().as_millis() as u64 })?;
            if matches!(event, Ok(Event::Done(_)) | Err(_)) {
                *stream = None;
            }
            if let Err(error) = &event {
                self.log.failed(error);
            }
            if self.is_freed.load(Ordering::Acquire) {
                return Err(HandleKind::Request.bad(handle));
            }
            // An event of a kind that the header does not have is not shown.
            if let Some(new) = Shown::new(handle, event) {
                return Ok(*shown.insert(new).view());
            }
        }
    }

    /// Ends the request; a reader that waits in [`Pulled::next`] goes with a bad handle.
    pub(crate) fn free(&self) {
        self.is_freed.store(true, Ordering::Release);
        self.canceller.cancel();
    }
}

/// `None` if nothing came by `deadline`.
fn next_event(stream: &mut RequestStream, deadline: Option<Instant>) -> Option<Result<Event, Error>> {
    let event = match deadline {
        None => stream.next_event(),
        Some(deadline) => match stream.next_timeout(deadline.saturating_duration_since(Instant::now())) {
            Poll::Ready(event) => event,
            Poll::Pending => return None,
        },
    };
    Some(or_lost_end(event))
}
