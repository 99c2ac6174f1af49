//! An answer that grows: the body of a streamed response. Events of the engine become text through a [`Dialect`]; what
//! is ready at once goes out in one piece, and nothing is made before the connection asks for it, so that a slow reader
//! finds merged deltas and costs no memory here. Dropping the body cancels its requests.

use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::body::{Body, Bytes, HttpBody};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::http::{HeaderName, HeaderValue, Response};
use http_body::Frame;
use ns_llm::{Error, Event};

use crate::app::App;
use crate::error::{ApiError, ApiResult};
use crate::generation::Generation;

/// A piece of a body is not filled beyond this, bytes; a single event may be longer.
const PIECE_BYTES: usize = 64 << 10;
/// What keeps a silent event stream open: a line that every reader of such streams ignores.
const PING: &str = ": ping\n\n";

/// How a client wants to hear of a request's events.
pub(crate) trait Dialect: Send + Unpin + 'static {
    /// The `Content-Type`; `text/event-stream` gets pings.
    const CONTENT_TYPE: &'static str = "text/event-stream";

    /// Writes what an event says. `source`: which of the body's requests it is of.
    fn event(&mut self, source: usize, event: Event, out: &mut String);

    /// Writes what comes after the last event of all.
    fn end(&mut self, out: &mut String);

    /// Writes the error that ends everything.
    fn error(&mut self, error: &ApiError, out: &mut String);
}

/// The body. It holds its requests until each has ended.
struct EventBody<D: Dialect> {
    app: Arc<App>,
    dialect: D,
    generations: Vec<Option<Generation>>,
    /// Written and not yet given to the connection.
    out: String,
    is_finished: bool,
    ping: Pin<Box<dyn Future<Output = ()> + Send>>,
}

/// The answer that tells of `generations` as they grow. It waits for the first event, so that a request that fails at once
/// is an error with its own status; but not for ever, so that a client is not left without a sign.
pub(crate) async fn stream<D: Dialect>(
    app: &Arc<App>,
    generations: Vec<Generation>,
    dialect: D,
) -> ApiResult<Response<Body>> {
    let mut body = EventBody {
        app: app.clone(),
        dialect,
        generations: generations.into_iter().map(Some).collect(),
        out: String::new(),
        is_finished: false,
        ping: app.sleep(app.options.ping_interval),
    };
    poll_fn(|cx| body.poll_first(cx)).await?;
    let mut response = Response::new(Body::new(body));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(D::CONTENT_TYPE));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // nginx would collect the pieces.
    headers.insert(HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));
    Ok(response)
}

impl<D: Dialect> EventBody<D> {
    /// Ready with the first event, which is then written, or with the error that comes in its place.
    fn poll_first(&mut self, cx: &mut Context<'_>) -> Poll<ApiResult<()>> {
        for (source, generation) in self.generations.iter_mut().enumerate() {
            let Some(generation) = generation else { continue };
            match generation.poll_event(cx) {
                Poll::Ready(Some(Ok(event))) => {
                    self.write(source, event);
                    return Poll::Ready(Ok(()));
                }
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(error)),
                Poll::Ready(None) => return Poll::Ready(Err(Error::Closed.into())),
                Poll::Pending => {}
            }
        }
        if self.ping.as_mut().poll(cx).is_ready() {
            self.write_ping(cx);
            return Poll::Ready(Ok(()));
        }
        Poll::Pending
    }

    /// Says that the stream lives, and when to say so again.
    fn write_ping(&mut self, cx: &mut Context<'_>) {
        if D::CONTENT_TYPE == "text/event-stream" {
            self.out.push_str(PING);
        }
        self.ping = self.app.sleep(self.app.options.ping_interval);
        // The new sleep has to be told whom to wake.
        let _ = self.ping.as_mut().poll(cx);
    }

    /// Writes all that is ready, up to the size of a piece.
    fn fill(&mut self, cx: &mut Context<'_>) {
        for source in 0..self.generations.len() {
            while let Some(generation) = &mut self.generations[source] {
                if self.out.len() >= PIECE_BYTES {
                    return;
                }
                match generation.poll_event(cx) {
                    Poll::Ready(Some(Ok(event))) => self.write(source, event),
                    Poll::Ready(Some(Err(error))) => return self.fail(&error),
                    Poll::Ready(None) => return self.fail(&Error::Closed.into()),
                    Poll::Pending => break,
                }
            }
        }
    }

    fn write(&mut self, source: usize, event: Event) {
        if matches!(event, Event::Done(_)) {
            self.generations[source] = None;
        }
        self.dialect.event(source, event, &mut self.out);
        if self.generations.iter().all(Option::is_none) {
            self.dialect.end(&mut self.out);
            self.is_finished = true;
        }
    }

    fn fail(&mut self, error: &ApiError) {
        if let (Some(detail), Some(generation)) = (&error.detail, self.generations.iter().flatten().next()) {
            self.app.report(generation.request_id(), error.code, detail);
        }
        self.generations.clear();
        self.dialect.error(error, &mut self.out);
        self.is_finished = true;
    }
}

impl<D: Dialect> HttpBody for EventBody<D> {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let this = self.get_mut();
        this.fill(cx);
        if this.out.is_empty() && !this.is_finished && this.ping.as_mut().poll(cx).is_ready() {
            this.write_ping(cx);
        }
        match (this.out.is_empty(), this.is_finished) {
            (false, _) => Poll::Ready(Some(Ok(Frame::data(Bytes::from(std::mem::take(&mut this.out)))))),
            (true, true) => Poll::Ready(None),
            (true, false) => Poll::Pending,
        }
    }

    fn is_end_stream(&self) -> bool {
        self.is_finished && self.out.is_empty()
    }
}
