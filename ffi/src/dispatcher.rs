//! The callback thread of an engine: it takes the events of all the engine's requests from their streams and tells them
//! to C, one at a time.
//!
//! It is a small executor. Each stream is polled with a waker that puts the request's handle into the thread's mailbox,
//! so the thread sleeps until some request has something to say, and requests take turns of a few events. One thread
//! per request was rejected: a full queue would be a thousand threads; calling from the engine's worker too: a slow
//! callback would hold up every sequence.
//!
//! Invariants: a request that was accepted by [`Dispatcher::watch`] gets exactly one last event, and is settled after
//! the callback has returned from it. [`Dispatcher::close`] comes after everything that `watch` accepted, and the
//! thread ends when it has heard of it and settled every request.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, JoinHandle};

use ns_llm_core::{Error, Event, RequestStream};

use crate::callback::in_callback;
use crate::event::{Listener, or_lost_end};
use crate::live_request::{End, Told};
use crate::log::Log;
use crate::panic::caught;

/// Stack of the callback thread, where the program's own code runs; the header promises it.
const STACK_BYTES: usize = 2 << 20;

/// Events that one request may tell before the others have their turn. Unread deltas are merged, so there are rarely two.
const MAX_EVENTS_A_TURN: usize = 8;

/// The handle on the thread.
pub(crate) struct Dispatcher {
    /// `None` once closed. Held by `watch` and `close` for the length of a send, so that nothing is sent after `Close`.
    mailbox: Mutex<Option<Sender<Message>>>,
    /// Taken by the one who joins.
    thread: Mutex<Option<JoinHandle<()>>>,
}

enum Message {
    /// A new request.
    Watch(Watched),
    /// The request of this handle has something to say.
    Ready(u64),
    /// No more requests will come.
    Close,
}

/// One request, its events and who hears them.
pub(crate) struct Watched {
    pub(crate) stream: RequestStream,
    pub(crate) listener: Listener,
    pub(crate) request: Arc<Told>,
}

impl Dispatcher {
    pub(crate) fn start(log: Arc<Log>) -> Result<Dispatcher, Error> {
        let (mailbox, messages) = channel();
        let callbacks = Callbacks { mailbox: mailbox.clone(), messages, watched: HashMap::new(), closing: false, log };
        let builder = thread::Builder::new().name("ns-llm-callback".to_string()).stack_size(STACK_BYTES);
        let thread = builder.spawn(|| callbacks.run()).map_err(|error| Error::Internal {
            reason: format!("the callback thread could not be started: {error}"),
        })?;
        Ok(Dispatcher { mailbox: Mutex::new(Some(mailbox)), thread: Mutex::new(Some(thread)) })
    }

    /// Takes over a request: from now on its listener hears of it, last of its end.
    pub(crate) fn watch(&self, watched: Watched) -> Result<(), Error> {
        let mailbox = self.mailbox.lock().unwrap_or_else(PoisonError::into_inner);
        let mailbox = mailbox.as_ref().ok_or(Error::Closed)?;
        mailbox.send(Message::Watch(watched)).map_err(|_| Error::Closed)
    }

    /// Takes no more requests and waits until those it has are settled, unless called from inside a callback: then they
    /// are settled when that has returned. Idempotent. Ending the requests is the engine's part.
    pub(crate) fn close(&self) {
        self.take_no_more();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread.filter(|_| !in_callback()) {
            let _ = thread.join();
        }
    }

    fn take_no_more(&self) {
        if let Some(mailbox) = self.mailbox.lock().unwrap_or_else(PoisonError::into_inner).take() {
            // A failed send means that the thread has ended, which is all that is wanted.
            let _ = mailbox.send(Message::Close);
        }
    }
}

/// The thread ends with the requests that it has; nobody waits for it here, because it may be the one that drops this.
impl Drop for Dispatcher {
    fn drop(&mut self) {
        self.take_no_more();
    }
}

/// What the thread owns.
struct Callbacks {
    /// For the wakers.
    mailbox: Sender<Message>,
    messages: Receiver<Message>,
    /// By handle.
    watched: HashMap<u64, Turn>,
    closing: bool,
    log: Arc<Log>,
}

/// A request between its turns.
struct Turn {
    watched: Watched,
    bell: Arc<Bell>,
    /// The listener wants to hear no more than the end.
    refused: bool,
    /// The last event is being told, or was.
    is_last_told: bool,
}

/// Wakes the thread for one request, at most once per turn.
struct Bell {
    request: u64,
    mailbox: Sender<Message>,
    rung: AtomicBool,
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }
    fn wake_by_ref(self: &Arc<Self>) {
        if !self.rung.swap(true, Ordering::AcqRel) {
            // The thread ends only when no request is left, so a failed send wakes nobody who still listens.
            let _ = self.mailbox.send(Message::Ready(self.request));
        }
    }
}

impl Callbacks {
    fn run(mut self) {
        while !(self.closing && self.watched.is_empty()) {
            // Always a message: this thread holds a sender itself.
            let Ok(message) = self.messages.recv() else { return };
            match message {
                Message::Watch(watched) => self.welcome(watched),
                Message::Ready(request) => self.advance(request),
                Message::Close => self.closing = true,
            }
        }
    }

    fn welcome(&mut self, watched: Watched) {
        let request = watched.listener.request;
        let bell = Arc::new(Bell { request, mailbox: self.mailbox.clone(), rung: AtomicBool::new(false) });
        self.watched.insert(request, Turn { watched, bell: bell.clone(), refused: false, is_last_told: false });
        bell.wake_by_ref();
    }

    /// Gives one request its turn.
    fn advance(&mut self, request: u64) {
        let Some(turn) = self.watched.get_mut(&request) else { return };
        // A panic is a defect that this request alone hears of: the others' thread goes on.
        let advanced = caught(|| turn.advance(&self.log));
        if let Some(end) = advanced.unwrap_or_else(|reason| turn.give_up(reason)) {
            self.settle(request, end);
        }
    }

    /// Forgets a request whose last event was told, and lets those go on who wait for it.
    fn settle(&mut self, request: u64, end: End) {
        if let Some(Turn { watched: Watched { stream, request, .. }, .. }) = self.watched.remove(&request) {
            drop(stream);
            request.settle(end);
        }
    }
}

impl Turn {
    /// Tells the events that are there; the end if the last was among them.
    fn advance(&mut self, log: &Log) -> Option<End> {
        self.bell.rung.store(false, Ordering::Release);
        let waker = Waker::from(self.bell.clone());
        for _ in 0..MAX_EVENTS_A_TURN {
            let Poll::Ready(event) = self.watched.stream.poll_next(&mut Context::from_waker(&waker)) else {
                return None;
            };
            let end = self.tell(or_lost_end(event), log);
            if end.is_some() {
                return end;
            }
        }
        waker.wake();
        None
    }

    /// Tells one event; the end if it is the last.
    fn tell(&mut self, event: Result<Event, Error>, log: &Log) -> Option<End> {
        let end = match &event {
            Ok(Event::Done(summary)) => Some(Ok(summary.into())),
            Err(error) => {
                log.failed(error);
                Some(Err(error.clone()))
            }
            Ok(_) => None,
        };
        self.is_last_told = end.is_some();
        // What was computed before a refusal took effect is not told.
        if end.is_some() || !self.refused {
            let wants_more = self.watched.listener.tell(event);
            if end.is_none() && !wants_more {
                self.refused = true;
                self.watched.request.cancel();
            }
        }
        end
    }

    /// The end of a request whose turn panicked.
    fn give_up(&mut self, reason: String) -> Option<End> {
        let error = Error::Internal { reason };
        if !self.is_last_told {
            // A second panic here leaves the listener without its last event; those who wait go on all the same.
            let _ = caught(|| self.watched.listener.tell(Err(error.clone())));
        }
        Some(Err(error))
    }
}
