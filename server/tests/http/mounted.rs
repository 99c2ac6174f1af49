//! The router alone: a service that another server mounts, without a socket and without a runtime.

use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, Wake};
use std::thread::Thread;
use std::time::{Duration, Instant};

use axum::body::{Body, HttpBody};
use axum::http::{Request, Response};
use ns_llm_server::{Model, Server, ServerOptions};
use serde_json::json;
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
    let next = std::future::poll_fn(|cx| Pin::new(&mut *body).poll_frame(cx));
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
