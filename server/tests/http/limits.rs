//! Limits of a request: sizes, times, framing. Each is answered for what it is, or hung up.

use std::io::{Read, Write};
use std::process::Command;
use std::time::Duration;

use ns_llm_server::options::MAX_HELD_BODIES;
use ns_llm_server::{ApiKey, ServerOptions};
use serde_json::json;

use crate::client::{Answer, Running, request, resident_bytes, scaled};

/// Heads beyond their limits are refused, within them accepted.
#[test]
fn heads_are_bounded() {
    let running = Running::start();
    let with = |headers: Vec<String>| {
        let headers: Vec<&str> = headers.iter().map(String::as_str).collect();
        running.send("GET", "/health", &headers, "").status
    };
    let many = |n: usize| (0..n).map(|idx| format!("X-Header-{idx}: x")).collect::<Vec<_>>();
    assert_eq!((with(many(60)), with(many(70))), (200, 431));
    assert_eq!(
        (with(vec![format!("X-Large: {}", "x".repeat(8_000))]), with(vec![format!("X-Large: {}", "x".repeat(40_000))])),
        (200, 431)
    );
    let target = |n: usize| running.get(&format!("/health?{}", "x".repeat(n))).status;
    assert_eq!((target(8_000), target(9_000)), (200, 414));
}

/// A body that announces too much is refused unread; one that says nothing is cut off where the limit is.
#[test]
fn bodies_are_bounded() {
    let running = Running::with(ServerOptions { max_body_bytes: 1_000, ..ServerOptions::default() });
    let fits = json!({ "prompt": "x".repeat(900) });
    assert_eq!(running.post("/tokenize", &fits).status, 200);
    let announced =
        "POST /tokenize HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 99999999999\r\n\r\n";
    let answer = running.raw(announced.as_bytes());
    assert_eq!((answer.status, &answer.json()["error"]["code"]), (413, &json!("body_too_large")));
    let chunk = format!("200\r\n{}\r\n", "x".repeat(0x200));
    let chunked =
        "POST /tokenize HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n";
    let answer = running.raw(format!("{chunked}{chunk}{chunk}{chunk}0\r\n\r\n").as_bytes());
    assert_eq!((answer.status, &answer.json()["error"]["code"]), (413, &json!("body_too_large")));
}

/// Bodies that are in memory at once have a limit, and those of one key half of it: what that key sends beyond it is
/// refused with a time to come again, another key is not touched, and what is hung up or answered makes room.
#[test]
fn held_bodies_are_bounded() {
    let secrets = ["the-secret-of-the-crowd", "the-secret-of-the-other"];
    let keys = ["crowd", "other"].iter().zip(secrets).map(|(name, secret)| ApiKey::new(name, secret).expect("valid"));
    let max_body_bytes = 64 << 10;
    let running = Running::with(ServerOptions {
        max_body_bytes,
        api_keys: keys.collect(),
        body_timeout: Duration::from_secs(1_000),
        ..ServerOptions::default()
    });
    let bearer = |secret: &str| format!("Authorization: Bearer {secret}");
    let of_bytes = |bytes: usize| {
        let around = json!({ "prompt": "x", "padding": "" }).to_string().len();
        json!({ "prompt": "x", "padding": "y".repeat(bytes - around) }).to_string()
    };
    let (largest, small) = (of_bytes(max_body_bytes), of_bytes(100));
    let ask = |secret: &str, body: &str| running.send("POST", "/tokenize", &[&bearer(secret)], body);
    // All of each but its last byte, until so many are held that there is no room for a small one.
    let mut begun = Vec::new();
    let refused = loop {
        let mut stream = running.connect();
        let text = request("POST", "/tokenize", &[&bearer(secrets[0])], &largest);
        stream.write_all(&text.as_bytes()[..text.len() - 1]).expect("sent");
        begun.push(stream);
        let answer = ask(secrets[0], &small);
        if answer.status != 200 {
            break answer;
        }
    };
    assert!(begun.len() >= MAX_HELD_BODIES / 2, "{}", begun.len());
    assert_eq!((refused.status, refused.header("retry-after")), (503, Some("1")));
    assert_eq!(refused.json()["error"]["code"], "overloaded");
    assert_eq!(ask(secrets[1], &largest).status, 200);
    drop(begun);
    while ask(secrets[0], &small).status != 200 {}
    // Answered bodies are not counted any more.
    (0..MAX_HELD_BODIES).for_each(|_| assert_eq!(ask(secrets[0], &largest).status, 200));
}

/// What is not HTTP, or frames its body in two ways, never gets to a route.
#[test]
fn malformed_requests_are_refused() {
    let running = Running::start();
    let body = r#"{"prompt": "x"}"#;
    let cases = [
        "nonsense\r\n\r\n".to_string(),
        "GET /health\r\n\r\n".to_string(),
        "GET /health HTTP/3.0\r\n\r\n".to_string(),
        "GET /hea lth HTTP/1.1\r\nHost: localhost\r\n\r\n".to_string(),
        "GET /health HTTP/1.1\r\nHost localhost\r\n\r\n".to_string(),
        "GET /health HTTP/1.1\r\nHost: localhost\r\nA\0B: x\r\n\r\n".to_string(),
        "\u{16}\u{3}\u{1}\u{2}\0\u{1}\0\u{1}\r\n\r\n".to_string(),
        format!("POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 15\r\nContent-Length: 16\r\n\r\n{body}"),
        format!("POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: +15\r\n\r\n{body}"),
        "POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: identity\r\n\r\n".to_string(),
        "POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n".to_string(),
        "POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\nx"
            .to_string(),
    ];
    for case in cases {
        let answer = running.raw(case.as_bytes());
        assert!(answer.status == 400 || answer.status == 0, "{case:?}: {answer:?}");
    }
    // Both framings: the length must not smuggle a second request.
    let both = "POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    let mut stream = running.connect();
    stream.write_all(both.as_bytes()).expect("sent");
    let mut all = String::new();
    let _ = stream.read_to_string(&mut all);
    assert!(!all.contains("uptime_seconds") || all.matches("HTTP/1.1 ").count() == 2, "{all}");
    assert_eq!(running.get("/health").status, 200);
}

/// A head that does not come is hung up; a body that does not come is told so; neither delays anybody else.
#[test]
fn slow_clients_are_hung_up() {
    let times = ServerOptions {
        head_timeout: Duration::from_secs(2),
        body_timeout: Duration::from_millis(200),
        ..ServerOptions::default()
    };
    let running = Running::with(times);
    for beginning in ["", "GET /health HTTP/1.1\r\nHost: loc"] {
        let mut stream = running.connect();
        stream.write_all(beginning.as_bytes()).expect("sent");
        assert_eq!(running.get("/health").status, 200, "others are served meanwhile");
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
        assert!(rest.is_empty() || rest.starts_with(b"HTTP/1.1 408"), "{beginning:?}");
    }
    let answer = running.raw(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{\"pro");
    assert_eq!((answer.status, &answer.json()["error"]["code"]), (408, &json!("body_timeout")));
}

/// Readers that take nothing of their streams are hung up after their time, and their requests cancelled; until then no more
/// than a little of each answer waits here.
#[test]
fn stalled_readers_cost_little() {
    let count = scaled(1, 200);
    let running =
        Running::with(ServerOptions { stall_timeout: Duration::from_millis(500), ..ServerOptions::default() });
    // In the long form the pool of KV blocks is in memory before anything is measured.
    let whole_pool = json!({ "prompt": "A", "ignore_eos": true, "max_tokens": scaled(2, 1_900), "n": 8 });
    assert_eq!(running.post("/v1/completions", &whole_pool).status, 200);
    let before = resident_bytes();
    // The system takes some megabytes on a reader's behalf: the answer has to be longer than that.
    let body =
        json!({ "prompt": "Once", "stream": true, "ignore_eos": true, "max_tokens": 1_900, "n": 8, "logprobs": 20 });
    let whole = request("POST", "/v1/completions", &[], &body.to_string());
    let stalled: Vec<_> = (0..count)
        .map(|_| {
            let mut stream = running.connect();
            stream.write_all(whole.as_bytes()).expect("sent");
            stream
        })
        .collect();
    let (mut most, mut stats) = (0, running.engine.stats());
    while stats.requests_cancelled + stats.requests_finished < 1 + count as u64 {
        most = most.max(resident_bytes().unwrap_or(0));
        std::thread::sleep(Duration::from_millis(5));
        stats = running.engine.stats();
    }
    assert_eq!((stats.requests_cancelled as usize, stats.kv_blocks_used), (count, 0), "{stats:?}");
    assert_eq!(running.get("/health").status, 200);
    if let (Some(before), true) = (before, scaled(0, 1) == 1) {
        let grown = most.saturating_sub(before);
        println!("{count} stalled readers: {} KiB", grown >> 10);
        assert!(grown <= 64 << 20, "{grown} bytes");
    }
    drop(stalled);
}

/// A reader that takes a little now and then is hung up, too, when the time of its request is over.
#[test]
fn dripping_readers_are_hung_up() {
    let running = Running::with(ServerOptions {
        stall_timeout: Duration::from_millis(900),
        request_timeout: Duration::from_millis(100),
        body_timeout: Duration::from_secs(900),
        ..ServerOptions::default()
    });
    // Each sign is several tokens: the answer is longer than what the system takes on the reader's behalf.
    let body = json!({ "prompt": "\u{e000} ".repeat(700_000) }).to_string();
    let mut dripping = running.connect();
    dripping.write_all(request("POST", "/tokenize", &[], &body).as_bytes()).expect("sent");
    let (mut bytes, mut piece) = (Vec::new(), vec![0; 64 << 10]);
    // Until it is hung up, or the answer is whole.
    while let Ok(taken @ 1..) = dripping.read(&mut piece) {
        bytes.extend_from_slice(&piece[..taken]);
        std::thread::sleep(Duration::from_millis(50));
    }
    let answer = Answer::parse(&bytes);
    let announced = answer.header("content-length").and_then(|bytes| bytes.parse::<usize>().ok());
    assert!(announced.is_none_or(|announced| answer.body.len() < announced), "it took {} bytes", answer.body.len());
}

/// A connection that is kept open serves one request after the other.
#[test]
fn connections_are_kept() {
    let running = Running::start();
    let mut stream = running.connect();
    for number in 0..3 {
        let close = if number == 2 { "Connection: close\r\n" } else { "" };
        stream.write_all(format!("GET /health HTTP/1.1\r\nHost: localhost\r\n{close}\r\n").as_bytes()).expect("sent");
        if number < 2 {
            let mut bytes = Vec::new();
            while !bytes.ends_with(b"}") {
                let mut byte = [0];
                stream.read_exact(&mut byte).expect("an answer");
                bytes.push(byte[0]);
            }
            assert_eq!(Answer::parse(&bytes).status, 200);
        }
    }
    assert_eq!(Answer::read(&mut stream).status, 200);
}

/// Connections that do nothing, or that have sent half a head, cost little memory each, and others are answered beside them.
#[cfg(target_os = "linux")]
#[test]
fn idle_connections_cost_little() {
    // The other tests of this program hold memory too: it is measured in a process of its own.
    const ALONE: &str = "NS_LLM_TEST_ALONE";
    if std::env::var_os(ALONE).is_none() {
        let mut alone = Command::new(std::env::current_exe().expect("this program"));
        alone.args(["--exact", "limits::idle_connections_cost_little", "--nocapture"]).env(ALONE, "1");
        let output = alone.output().expect("it starts");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"), "it ran");
        return;
    }
    let running = Running::with(ServerOptions { head_timeout: Duration::from_secs(3_600), ..ServerOptions::default() });
    let open = |num: usize| {
        let connections: Vec<_> = (0..num).map(|_| running.connect()).collect();
        for mut stream in connections.iter().step_by(2) {
            stream.write_all(b"GET /health HTTP/1.1\r\nHost: ").expect("sent");
        }
        // Accepted in order: once this one is answered, they all are.
        assert_eq!(running.get("/health").status, 200);
        connections
    };
    let first = open(20);
    let resident = || resident_bytes().expect("Linux tells");
    let before = resident();
    let idle = open(400);
    let bytes = resident().saturating_sub(before);
    assert!(bytes <= 400 * (32 << 10), "{} KiB each", bytes / 400 / 1024);
    let body = json!({ "prompt": "A", "max_tokens": 2 });
    assert_eq!(running.post("/v1/completions", &body).status, 200);
    drop((first, idle));
}
