//! The end of a server: what runs may finish, what is new is refused, and the deadline is kept.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use ns_llm_server::ServerOptions;
use serde_json::json;

use crate::client::{Answer, Running, request};

fn stream_of(max_tokens: usize) -> String {
    let body = json!({ "prompt": "Once", "stream": true, "ignore_eos": true, "max_tokens": max_tokens });
    request("POST", "/v1/completions", &[], &body.to_string())
}

/// What has begun may finish: streams to their last token, a body that is on its way to its answer. Meanwhile new work and
/// the readiness probe are told 503. Then the server ends, and not before.
#[test]
fn running_answers_finish() {
    let long = Duration::from_secs(900);
    let mut running = Running::with(ServerOptions { grace: long, body_timeout: long, ..ServerOptions::default() });
    let mut streams: Vec<_> = (0..4).map(|_| running.connect()).collect();
    for stream in &mut streams {
        stream.write_all(stream_of(200).as_bytes()).expect("sent");
        stream.read_exact(&mut [0; 15]).expect("it runs");
    }
    // Its body is asked for, and comes late: nothing ends while it is on its way.
    let mut late = running.connect();
    let head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 15\r\nExpect: 100-continue\r\n\r\n";
    late.write_all(head.as_bytes()).expect("sent");
    let mut go_on = [0; 25];
    late.read_exact(&mut go_on).expect("it is asked for");
    assert_eq!(&go_on, b"HTTP/1.1 100 Continue\r\n\r\n");
    running.begin_stop();
    let refused = loop {
        let answer = running.get("/ready");
        if answer.status == 503 {
            break answer;
        }
        std::thread::sleep(Duration::from_millis(1));
    };
    assert_eq!(refused.json()["reason"], "the server is stopping");
    assert_eq!(refused.header("connection"), Some("close"));
    let new = running.post("/v1/completions", &json!({ "prompt": "A" }));
    assert_eq!(
        (new.status, &new.json()["error"]["code"], new.header("retry-after")),
        (503, &json!("closed"), Some("1"))
    );
    assert_eq!(running.get("/health").status, 200, "it lives");
    for mut stream in streams {
        let mut rest = String::new();
        stream.read_to_string(&mut rest).expect("whole");
        assert!(rest.ends_with("data: [DONE]\n\n\r\n0\r\n\r\n") && rest.contains("\"length\""), "{rest}");
    }
    assert!(!running.has_stopped(), "a request is still on its way");
    late.write_all(br#"{"prompt": "A"}"#).expect("sent");
    assert_eq!(Answer::read(&mut late).status, 503, "it had not begun to run");
    let start = Instant::now();
    while !running.has_stopped() {
        assert!(start.elapsed() < Duration::from_secs(600), "it does not end");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(running.idle_stats().requests_finished, 4);
}

/// At the deadline what still runs is ended with an error that says why, whatever its clients do.
#[test]
fn the_deadline_ends_the_rest() {
    let mut running = Running::with(ServerOptions { grace: Duration::from_millis(100), ..ServerOptions::default() });
    let mut streams: Vec<_> = (0..3).map(|_| running.connect()).collect();
    for stream in &mut streams {
        // One that will not end before its time is over, on any machine.
        stream.write_all(stream_of(1_900).as_bytes()).expect("sent");
        stream.read_exact(&mut [0; 15]).expect("it runs");
    }
    let mut idle = running.connect();
    running.begin_stop();
    for (idx, mut stream) in streams.into_iter().enumerate() {
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
        let rest = String::from_utf8_lossy(&rest).into_owned();
        let is_told = rest.contains(r#""code":"closed""#) && rest.contains("data: [DONE]");
        assert!(is_told || rest.contains("\"length\""), "stream {idx}: {rest}");
    }
    let start = Instant::now();
    while !running.has_stopped() {
        assert!(start.elapsed() < Duration::from_secs(600), "it does not end");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(Answer::read(&mut idle).status, 0, "an idle connection is closed");
    let stats = running.idle_stats();
    assert!(stats.requests_cancelled > 0, "the deadline came first: {stats:?}");
}
