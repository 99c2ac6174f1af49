//! The router alone: a service that another server mounts, without a socket and without a runtime.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;
use std::time::{Duration, Instant};

use axum::body::{Body, HttpBody};
use axum::http::{Request, Response};
use ns_llm_server::{ApiKey, BodySender, Bytes, Exchange, LocalAddress, Model, Server, ServerOptions};
use serde_json::{Value, json};
use tower::ServiceExt;

use crate::client::demo_engine;

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// The smallest executor there is.
fn block_on<T>(work: impl Future<Output = T>) -> T {
    let waker = Arc::new(Unpark(std::thread::current())).into();
    let mut work = pin!(work);
    loop {
        match work.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(value) => return value,
            Poll::Pending => std::thread::park(),
        }
    }
}

fn frame(body: &mut Body) -> Option<String> {
    let next = poll_fn(|cx| Pin::new(&mut *body).poll_frame(cx));
    let frame = block_on(next)?.expect("bodies do not fail");
    Some(String::from_utf8(frame.into_data().expect("data").to_vec()).expect("text"))
}

fn ask(server: &Server, body: serde_json::Value) -> Response<Body> {
    let request = Request::post("/v1/completions").header("host", "localhost").body(Body::from(body.to_string()));
    block_on(server.router().oneshot(request.expect("a request"))).expect("a router answers always")
}

/// Frames come as they are made, with any executor; dropping the body cancels the request.
#[test]
fn the_router_needs_no_runtime() {
    let engine = demo_engine();
    let server = Server::new(vec![Model::new(engine.clone())], ServerOptions::default()).expect("valid");
    let mut response = ask(&server, json!({ "prompt": "Once", "stream": true, "max_tokens": 400, "ignore_eos": true }));
    assert_eq!(response.status(), 200);
    let mut frames = Vec::new();
    while let Some(frame) = frame(response.body_mut()) {
        frames.push(frame);
    }
    assert!(frames.len() > 1, "in pieces");
    assert!(frames.concat().ends_with("data: [DONE]\n\n"));
    let mut response =
        ask(&server, json!({ "prompt": "Once", "stream": true, "max_tokens": 1_900, "ignore_eos": true }));
    assert!(frame(response.body_mut()).is_some());
    let before = engine.stats().requests_cancelled;
    drop(response);
    while engine.stats().requests_cancelled == before {
        std::thread::yield_now();
    }
    let denied = ask(&server, json!({ "prompt": 5 }));
    assert_eq!(denied.status(), 400);
}

fn server_with(options: ServerOptions) -> Server {
    Server::new(vec![Model::new(demo_engine())], options).expect("valid")
}

/// Status and body of an exchange, read to its end.
fn finish(exchange: Exchange) -> (u16, Value) {
    let (status, body) = finish_text(exchange);
    (status, serde_json::from_str(&body).expect("JSON"))
}

/// The same, whatever the body is.
pub(crate) fn finish_text(mut exchange: Exchange) -> (u16, String) {
    let head = block_on(poll_fn(|cx| exchange.poll_head(cx))).expect("it goes on");
    let mut body: Vec<u8> = head.piece.as_deref().unwrap_or_default().to_vec();
    while let Some(piece) = block_on(poll_fn(|cx| exchange.poll_piece(cx))) {
        assert!(!head.is_whole, "the head said that there was no more");
        body.extend_from_slice(&piece);
    }
    (head.status, String::from_utf8(body).expect("text"))
}

fn send(sender: &BodySender, piece: &str) -> bool {
    let mut piece = Some(Bytes::copy_from_slice(piece.as_bytes()));
    block_on(poll_fn(|cx| sender.poll_send(cx, &mut piece)))
}

/// Whether the head of the answer is there without a byte of the body.
fn is_refused_unread(exchange: &mut Exchange) -> Option<u16> {
    match exchange.poll_head(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(head) => head.map(|head| head.status),
        Poll::Pending => None,
    }
}

/// A body comes in pieces as the router asks for them; a head that is refused is refused without one; a body that ends early
/// is told, and cancelling tells its sender.
#[test]
fn bodies_come_when_they_are_asked_for() {
    let server = server_with(ServerOptions { max_body_bytes: 1_000, ..ServerOptions::default() });
    let post = || Request::post("/tokenize").header("host", "localhost");
    let whole = server.ask(post().body(Bytes::from_static(br#"{"prompt": "a red fox"}"#)).expect("valid"));
    let (status, expected) = finish(whole);
    assert_eq!(status, 200);

    let (mut exchange, sender) = server.ask_with_body(post().body(()).expect("valid"));
    assert_eq!(is_refused_unread(&mut exchange), None);
    let asked = r#"{"prompt": "a red fox"}"#;
    let sending = std::thread::spawn(move || {
        let wanted = asked.split_inclusive(' ').map(|piece| send(&sender, piece)).collect::<Vec<_>>();
        sender.end();
        wanted
    });
    assert_eq!(finish(exchange), (200, expected));
    assert_eq!(sending.join().expect("it sends"), [true; 4]);

    let (mut exchange, sender) = server.ask_with_body(post().header("content-length", "1001").body(()).expect("valid"));
    assert_eq!(is_refused_unread(&mut exchange), Some(413));
    assert!(!send(&sender, "x"), "nobody reads it");

    let (mut exchange, sender) = server.ask_with_body(post().body(()).expect("valid"));
    assert_eq!(is_refused_unread(&mut exchange), None);
    assert!(send(&sender, "{"));
    drop(sender);
    let (status, error) = finish(exchange);
    assert_eq!((status, &error["error"]["code"]), (400, &json!("body_unreadable")));

    let (mut exchange, sender) = server.ask_with_body(post().body(()).expect("valid"));
    assert_eq!(is_refused_unread(&mut exchange), None);
    exchange.cancel();
    assert!(!send(&sender, "{"));
    assert!(matches!(exchange.poll_head(&mut Context::from_waker(Waker::noop())), Poll::Ready(None)));
}

/// A timer that needs no runtime keeps the times of bodies, of pings and of the queue.
#[test]
fn times_are_kept_without_a_runtime() {
    let server = server_with(ServerOptions {
        body_timeout: Duration::from_millis(20),
        timer: Some(Server::thread_timer()),
        ..ServerOptions::default()
    });
    let request = Request::post("/tokenize").header("host", "localhost").body(()).expect("valid");
    let (exchange, _sender) = server.ask_with_body(request);
    let (status, error) = finish(exchange);
    assert_eq!((status, &error["error"]["code"]), (408, &json!("body_timeout")));
}

/// Connections that came in from outside need a key, or a host that has said who may call.
#[test]
fn open_connections_need_a_key() {
    let engine = demo_engine();
    let ask = |options: ServerOptions, address: &str| {
        let server = Server::new(vec![Model::new(engine.clone())], options).expect("valid");
        let mut request = Request::get("/health").header("host", "localhost").body(Bytes::new()).expect("valid");
        request.extensions_mut().insert(LocalAddress(address.parse().expect("an address")));
        request.headers_mut().insert("x-api-key", "a-secret-of-some-length".parse().expect("a value"));
        finish(server.ask(request))
    };
    for own in ["127.0.0.1", "::1", "::ffff:127.0.0.1"] {
        assert_eq!(ask(ServerOptions::default(), own).0, 200, "{own}");
    }
    for open in ["192.168.1.2", "::ffff:192.168.1.2", "2001:db8::1"] {
        let (status, error) = ask(ServerOptions::default(), open);
        assert_eq!((status, &error["error"]["code"]), (403, &json!("open_to_all")), "{open}");
    }
    let key = ApiKey::unnamed("a-secret-of-some-length").expect("valid");
    assert_eq!(ask(ServerOptions { api_keys: vec![key], ..ServerOptions::default() }, "192.168.1.2").0, 200);
    assert_eq!(ask(ServerOptions { behind_auth: true, ..ServerOptions::default() }, "192.168.1.2").0, 200);
}

/// What a host asks before it gives a request to the router is what the router would say.
#[test]
fn paths_are_known_as_they_are_routed() {
    let server = server_with(ServerOptions::default());
    let is_routed = |path: &str| {
        let request = Request::builder().method("PATCH").uri(path).header("host", "localhost").body(Bytes::new());
        finish(server.ask(request.expect("valid"))).1["error"]["code"] == "method_not_allowed"
    };
    let mut paths: Vec<String> = Server::routes().iter().map(|(_, path)| path.replace(['{', '}', '*'], "")).collect();
    assert!(paths.iter().all(|path| server.has_path(path)));
    let near =
        ["/x", "/v1", "/v1/models/", "/v1/models/a/b", "/v1/responses/", "/v1/responses/a/b", "/v1/responses/a/cancel"];
    paths.extend(near.map(str::to_string));
    paths.extend(
        ["/v1/models//", "/v1/chat/completions/", "//health", "/Health", "/api/kv-cache//exists"].map(str::to_string),
    );
    for path in paths {
        assert_eq!(server.has_path(&path), is_routed(&path), "{path}");
    }
}

/// A reader that does not take its answer holds no place: it is given back when the engine has ended the request.
#[test]
fn slow_readers_hold_no_place() {
    let engine = demo_engine();
    let options = ServerOptions { max_running_requests: 1, ..ServerOptions::default() };
    let server = Server::new(vec![Model::new(engine.clone())], options).expect("valid");
    let mut slow = ask(&server, json!({ "prompt": "Once", "stream": true, "max_tokens": 50, "ignore_eos": true }));
    let num_running = || {
        let request = Request::get("/ready").header("host", "localhost").body(Body::empty()).expect("a request");
        let mut ready = block_on(server.router().oneshot(request)).expect("a router answers always");
        let ready: serde_json::Value = serde_json::from_str(&frame(ready.body_mut()).expect("a body")).expect("JSON");
        ready["queue"]["running"].as_u64().expect("a count")
    };
    let start = Instant::now();
    while num_running() > 0 {
        assert!(start.elapsed() < Duration::from_secs(600), "nobody reads, and its place is not given back");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(ask(&server, json!({ "prompt": "A", "max_tokens": 1 })).status(), 200, "the place is free");
    let mut text = String::new();
    while let Some(frame) = frame(slow.body_mut()) {
        text += &frame;
    }
    assert!(text.contains("\"length\"") && text.ends_with("data: [DONE]\n\n"), "it is whole: {text}");
}
