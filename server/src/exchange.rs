//! One request to the router by hand, for a host that has sockets and an event loop of its own (Node): the head goes in whole,
//! the body piece by piece as the router asks for it, and the answer comes out the same way. Nothing here waits: each end is
//! polled, and wakes whoever polled it. Dropping an exchange cancels its request.

use std::future::Future;
use std::io;
use std::mem;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};

use axum::body::{Body, Bytes, HttpBody};
use axum::http::{HeaderMap, Request, Response};
use http_body::Frame;
use tower::ServiceExt;

use crate::Server;

/// What an answer begins with.
#[derive(Debug)]
pub struct Head {
    /// HTTP's status code.
    pub status: u16,
    /// Names and values.
    pub headers: HeaderMap,
    /// What of the body was there at once.
    pub piece: Option<Bytes>,
    /// Whether that is all of it.
    pub is_whole: bool,
}

/// A request that the router has.
pub struct Exchange(State);

enum State {
    Asked(Pin<Box<dyn Future<Output = Response<Body>> + Send>>),
    Answered(Body),
    Ended,
}

impl Server {
    /// Gives the router a request with a body that is there, or empty.
    pub fn ask(&self, request: Request<Bytes>) -> Exchange {
        self.exchange(request.map(Body::from))
    }

    /// Gives the router a request whose body comes through the sender. The guard looks at the head before it asks for any of it:
    /// if [`Exchange::poll_head`] is ready at once, the body is not wanted.
    pub fn ask_with_body(&self, request: Request<()>) -> (Exchange, BodySender) {
        let slot = Arc::new(Mutex::new(Slot::default()));
        let body = Body::new(SlotBody(Arc::clone(&slot)));
        (self.exchange(request.map(|()| body)), BodySender(slot))
    }

    fn exchange(&self, request: Request<Body>) -> Exchange {
        let answer = self.router().oneshot(request);
        Exchange(State::Asked(Box::pin(async move { answer.await.unwrap_or_else(|never| match never {}) })))
    }
}

impl Exchange {
    /// The answer's head, once; `None` when the exchange has ended.
    pub fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Option<Head>> {
        let State::Asked(answer) = &mut self.0 else { return Poll::Ready(None) };
        let (parts, body) = ready!(answer.as_mut().poll(cx)).into_parts();
        self.0 = State::Answered(body);
        let (piece, is_whole) = match self.poll_piece(cx) {
            Poll::Ready(piece) => {
                let is_whole = piece.is_none() || matches!(&self.0, State::Answered(body) if body.is_end_stream());
                (piece, is_whole)
            }
            Poll::Pending => (None, false),
        };
        Poll::Ready(Some(Head { status: parts.status.as_u16(), headers: parts.headers, piece, is_whole }))
    }

    /// The next piece of the answer's body; `None` after the last one. Nothing is made before it is asked for.
    pub fn poll_piece(&mut self, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        while let State::Answered(body) = &mut self.0 {
            // Bodies of this server do not fail: an error is a piece of theirs.
            match ready!(Pin::new(body).poll_frame(cx)).and_then(Result::ok).map(Frame::into_data) {
                Some(Ok(piece)) => return Poll::Ready(Some(piece)),
                Some(Err(_trailers)) => {}
                None => self.0 = State::Ended,
            }
        }
        Poll::Ready(None)
    }

    /// Ends it: whatever was asked for is cancelled.
    pub fn cancel(&mut self) {
        self.0 = State::Ended;
    }
}

/// The way of a request's body to the router: one piece at a time. Dropped before [`BodySender::end`], the body has ended early.
pub struct BodySender(Arc<Mutex<Slot>>);

/// What the two ends of a body share. Locked by either for a move of a few words.
#[derive(Default)]
struct Slot {
    piece: Option<Bytes>,
    /// Nothing comes after `piece`; whether that is as it should be.
    end: Option<Result<(), io::ErrorKind>>,
    /// The router wants no more of it.
    is_refused: bool,
    /// Waits for the end that the other holds.
    waiting: Option<Waker>,
}

impl BodySender {
    /// Ready when the piece before was taken, and this one is on its way: whether any more is wanted. `piece` is taken out of the
    /// option when it is.
    pub fn poll_send(&self, cx: &mut Context<'_>, piece: &mut Option<Bytes>) -> Poll<bool> {
        let mut slot = lock(&self.0);
        if slot.is_refused {
            return Poll::Ready(false);
        }
        if slot.piece.is_some() {
            slot.waiting = Some(cx.waker().clone());
            return Poll::Pending;
        }
        slot.piece = piece.take().filter(|piece| !piece.is_empty());
        wake(slot);
        Poll::Ready(true)
    }

    /// Says that all of it was sent.
    pub fn end(&self) {
        self.finish(Ok(()));
    }

    fn finish(&self, end: Result<(), io::ErrorKind>) {
        let mut slot = lock(&self.0);
        slot.end.get_or_insert(end);
        wake(slot);
    }
}

impl Drop for BodySender {
    fn drop(&mut self) {
        self.finish(Err(io::ErrorKind::UnexpectedEof));
    }
}

fn lock(slot: &Mutex<Slot>) -> MutexGuard<'_, Slot> {
    slot.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Wakes the other end, without the lock.
fn wake(mut slot: MutexGuard<'_, Slot>) {
    let waiting = slot.waiting.take();
    drop(slot);
    if let Some(waker) = waiting {
        waker.wake();
    }
}

/// The reading end, as the router knows bodies.
struct SlotBody(Arc<Mutex<Slot>>);

impl HttpBody for SlotBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        let mut slot = lock(&self.0);
        if let Some(piece) = mem::take(&mut slot.piece) {
            wake(slot);
            return Poll::Ready(Some(Ok(Frame::data(piece))));
        }
        match slot.end {
            Some(Ok(())) => Poll::Ready(None),
            Some(Err(kind)) => Poll::Ready(Some(Err(kind.into()))),
            None => {
                slot.waiting = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }
}

impl Drop for SlotBody {
    fn drop(&mut self) {
        let mut slot = lock(&self.0);
        slot.is_refused = true;
        slot.piece = None;
        wake(slot);
    }
}
