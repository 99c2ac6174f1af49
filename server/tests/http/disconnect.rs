//! Clients that go away: whatever they had asked for ends with them, and nothing of it is left.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::time::{Duration, Instant};

use ns_llm_server::ServerOptions;
use serde_json::json;

use crate::client::{PATIENCE, Running, request, resident_bytes, scaled};

fn endless(stream: bool) -> String {
    let body = json!({ "prompt": "Once upon a time", "stream": stream, "ignore_eos": true, "max_tokens": 1_900 });
    request("POST", "/v1/completions", &[], &body.to_string())
}

/// What this process holds.
#[derive(Debug)]
struct Held {
    threads: usize,
    files: usize,
    bytes: usize,
}

/// In the long form, which is run alone: other tests of this process have threads and files of their own.
fn held() -> Option<Held> {
    let count = |folder: &str| std::fs::read_dir(folder).ok().map(Iterator::count);
    let is_alone = scaled(0, 1) == 1;
    is_alone.then_some(())?;
    Some(Held { threads: count("/proc/self/task")?, files: count("/proc/self/fd")?, bytes: resident_bytes()? })
}

/// Thousands of times connect, send, go: at once, after the head, after the first bytes; nothing stays behind.
#[test]
fn disconnects_leave_nothing() {
    let running = Running::start();
    // What is made once is there before anything is measured.
    assert_eq!(running.post("/v1/completions", &json!({ "prompt": "A", "max_tokens": 2 })).status, 200);
    let before = held();
    for number in 0..scaled(1_000, 10_000) {
        let mut stream = running.connect();
        let whole = endless(number % 2 == 0);
        let part = match number % 5 {
            0 => &whole[..whole.len() / 2],
            1 => &whole[..20],
            _ => &whole[..],
        };
        stream.write_all(part.as_bytes()).expect("sent");
        match number % 50 {
            7 | 8 => {
                // The head, when it comes, comes with the first token.
                let mut first = [0; 16];
                if number % 2 == 0 && number % 5 > 1 {
                    stream.read_exact(&mut first).expect("an answer");
                    assert_eq!(&first, b"HTTP/1.1 200 OK\r");
                }
            }
            9 => stream.shutdown(Shutdown::Write).expect("half closed"),
            _ => {}
        }
    }
    // Connections that were made may still wait to be read when the engine has nothing to do.
    let start = Instant::now();
    let queue = || running.get("/ready").ok()["queue"].clone();
    while (&queue()["running"], &queue()["waiting"]) != (&json!(0), &json!(0)) {
        assert!(start.elapsed() < PATIENCE, "requests are left: {}", queue());
        std::thread::sleep(Duration::from_millis(2));
    }
    let stats = running.idle_stats();
    assert!(stats.requests_total > 0 && stats.requests_cancelled > 0, "{stats:?}");
    assert_eq!(stats.requests_total, stats.requests_finished + stats.requests_cancelled + stats.requests_failed);
    assert_eq!((stats.kv_blocks_used, stats.requests_failed), (0, 0), "{stats:?}");
    assert!(running.get("/metrics").body.contains("\nactive_requests 0\n"));
    if let (Some(before), Some(after)) = (before, held()) {
        let grown = after.bytes.saturating_sub(before.bytes);
        assert!(
            after.threads <= before.threads && after.files <= before.files && grown < 16 << 20,
            "{before:?} {after:?}"
        );
    }
    // And it still answers.
    assert_eq!(running.post("/v1/completions", &json!({ "prompt": "A", "max_tokens": 2 })).status, 200);
}

/// A client that hangs up while it waits for its turn gives its turn to the next.
#[test]
fn those_who_wait_may_go() {
    let running = Running::with(ServerOptions { max_running_requests: 1, ..ServerOptions::default() });
    let mut first = running.connect();
    first.write_all(endless(true).as_bytes()).expect("sent");
    let mut begun = [0; 8];
    first.read_exact(&mut begun).expect("it runs");
    let waiting: Vec<_> = (0..5)
        .map(|_| {
            let mut stream = running.connect();
            stream.write_all(endless(false).as_bytes()).expect("sent");
            stream
        })
        .collect();
    while running.get("/ready").ok()["queue"]["waiting"] != 5 {
        std::thread::sleep(Duration::from_millis(2));
    }
    drop(waiting);
    while running.get("/ready").ok()["queue"]["waiting"] != 0 {
        std::thread::sleep(Duration::from_millis(2));
    }
    drop(first);
    assert_eq!(running.post("/v1/completions", &json!({ "prompt": "A", "max_tokens": 2 })).status, 200);
    let stats = running.idle_stats();
    assert_eq!((stats.requests_total, stats.requests_cancelled), (2, 1), "those who waited were never submitted");
}
