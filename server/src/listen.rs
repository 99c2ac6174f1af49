//! Connections: accepts them, speaks HTTP/1.1 on each, keeps their times and number, and lets them finish when the server
//! stops. TLS belongs to a proxy before it.

use std::future::{Future, poll_fn};
use std::io;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Router;
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, Sleep, sleep, sleep_until};

use crate::app::App;
use crate::options::{MAX_HEAD_BYTES, MAX_HEADERS};

/// Pause after the system refused a connection: it is out of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// What answers get to end in after their requests were ended.
const LAST_GRACE: Duration = Duration::from_millis(900);

/// Where a server may listen: an address that is open to others needs a key.
pub(crate) fn bind(app: &App, address: SocketAddr) -> io::Result<StdListener> {
    app.options.check_address(address.ip()).map_err(|error| io::Error::new(io::ErrorKind::PermissionDenied, error))?;
    let listener = StdListener::bind(address)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Something that happened to a server.
enum Happened {
    /// It was told to end.
    Stop,
    /// The time that it had for that is over.
    Deadline,
    /// A connection is no more.
    Closed,
    /// There is a new one, or the system refused it.
    Accepted(io::Result<TcpStream>),
}

/// Serves until `stop` is ready and what ran then has ended, or was ended at its deadline. While it stops, new work is
/// refused with 503, so that a proxy goes elsewhere, and probes are told so.
pub(crate) async fn serve(
    app: &Arc<App>,
    router: &Router,
    listener: StdListener,
    stop: impl Future<Output = ()>,
) -> io::Result<()> {
    let listener = TcpListener::from_std(listener)?;
    let mut connections = JoinSet::new();
    let (stopping, is_stopping) = watch::channel(false);
    let mut stop = pin!(stop);
    let mut deadline = pin!(sleep(Duration::ZERO));
    let mut was_cancelled = false;
    let exporting = app.exporter.is_some().then(|| {
        let app = app.clone();
        AbortOnDrop(tokio::spawn(async move {
            if let Some(exporter) = &app.exporter {
                exporter.run().await;
            }
        }))
    });
    loop {
        let is_draining = app.is_stopping();
        if is_draining && connections.is_empty() {
            drop(exporting);
            if let Some(exporter) = &app.exporter {
                exporter.flush().await;
            }
            return Ok(());
        }
        let happened = poll_fn(|cx| {
            if !is_draining && stop.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Happened::Stop);
            }
            if is_draining && deadline.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Happened::Deadline);
            }
            if let Poll::Ready(Some(_)) = connections.poll_join_next(cx) {
                return Poll::Ready(Happened::Closed);
            }
            if connections.len() < app.options.max_connections {
                return listener.poll_accept(cx).map_ok(|(stream, _)| stream).map(Happened::Accepted);
            }
            Poll::Pending
        });
        match happened.await {
            Happened::Stop => {
                app.stop();
                deadline.set(sleep(app.options.grace));
                let _ = stopping.send(true);
            }
            // Whoever still does not take its answer goes without.
            Happened::Deadline if was_cancelled => return Ok(()),
            Happened::Deadline => {
                was_cancelled = true;
                app.cancel_all();
                deadline.set(sleep(LAST_GRACE));
            }
            Happened::Closed => {}
            Happened::Accepted(Ok(stream)) => {
                connections.spawn(connection(app.clone(), router.clone(), stream, is_stopping.clone()));
            }
            Happened::Accepted(Err(_)) => sleep(ACCEPT_PAUSE).await,
        }
    }
}

/// A task that ends with what it is for.
struct AbortOnDrop(JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// One connection, to its end.
async fn connection(app: Arc<App>, router: Router, stream: TcpStream, mut is_stopping: watch::Receiver<bool>) {
    // Each token is a small packet that must not wait for the next.
    let _ = stream.set_nodelay(true);
    let deadline = Arc::<Mutex<Option<Instant>>>::default();
    let io = StallGuard {
        io: TokioIo::new(stream),
        stall_timeout: app.options.stall_timeout,
        stalled: None,
        deadline: deadline.clone(),
    };
    // A reader that takes a little now and then is not stalled, and must not hold its answer for ever.
    let longest = app.options.request_timeout + app.options.stall_timeout;
    let routes = TowerToHyperService::new(router);
    let timed = service_fn(move |request: hyper::Request<hyper::body::Incoming>| {
        let (answer, deadline) = (routes.call(request), deadline.clone());
        async move {
            let answer = answer.await;
            *deadline.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now().checked_add(longest);
            answer
        }
    });
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(app.options.head_timeout);
    builder.max_headers(MAX_HEADERS).max_buf_size(MAX_HEAD_BYTES);
    let mut serving = pin!(builder.serve_connection(io, timed));
    let mut stopping = pin!(async move {
        let _ = is_stopping.wait_for(|is_stopping| *is_stopping).await;
    });
    // One that comes while the server stops still gets its answer, which is then its last.
    let mut may_go_on = !app.is_stopping();
    poll_fn(|cx| {
        if may_go_on && stopping.as_mut().poll(cx).is_ready() {
            may_go_on = false;
            serving.as_mut().graceful_shutdown();
        }
        // An error is the client's: it hung up, or spoke no HTTP and was told so.
        serving.as_mut().poll(cx).map(|_| ())
    })
    .await;
}

/// A connection whose other end has to take what is written within a time.
struct StallGuard {
    io: TokioIo<TcpStream>,
    stall_timeout: Duration,
    /// Runs while a write waits.
    stalled: Option<Pin<Box<Sleep>>>,
    /// When the last answer has to be out; set when it begins.
    deadline: Arc<Mutex<Option<Instant>>>,
}

impl StallGuard {
    /// The outcome of a write, or the end of waiting for it.
    fn watch<T>(&mut self, written: Poll<io::Result<T>>, cx: &mut Context<'_>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        let stall = Instant::now() + self.stall_timeout;
        let last = *self.deadline.lock().unwrap_or_else(PoisonError::into_inner);
        let deadline = last.map_or(stall, |last| last.min(stall));
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(sleep_until(deadline)));
        ready!(stalled.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl Read for StallGuard {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: ReadBufCursor<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_read(cx, buf)
    }
}

impl Write for StallGuard {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.io).poll_write(cx, buf);
        this.watch(written, cx)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.io).poll_write_vectored(cx, bufs);
        this.watch(written, cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let flushed = Pin::new(&mut this.io).poll_flush(cx);
        this.watch(flushed, cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(cx)
    }
}
