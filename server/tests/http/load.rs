//! Many at once: nothing is lost, nothing is mixed up, and what is too much is refused with a time to come again.

use std::io::{Read, Write};
use std::time::Duration;

use ns_llm::Request;
use ns_llm_server::{ApiKey, ServerOptions};
use serde_json::{Value, json};

use crate::client::{Answer, Running, request};

/// Two hundred streams at once get each the whole of their own answer, and no other's.
#[test]
fn two_hundred_streams_lose_no_token() {
    let running = Running::start();
    let body = |idx: usize| {
        json!({ "prompt": format!("Story {}", idx % 10), "stream": true, "max_tokens": 8, "seed": idx, "temperature": 1,
                "ignore_eos": true, "stream_options": { "include_usage": true } })
    };
    let mut streams: Vec<_> = (0..200).map(|_| running.connect()).collect();
    for (idx, stream) in streams.iter_mut().enumerate() {
        stream.write_all(request("POST", "/v1/completions", &[], &body(idx).to_string()).as_bytes()).expect("sent");
    }
    for (idx, mut stream) in streams.into_iter().enumerate() {
        let chunks = Answer::read(&mut stream).chunks();
        let text: String = chunks.iter().filter_map(|chunk| chunk["choices"][0]["text"].as_str()).collect();
        let mut request =
            Request::prompt(format!("Story {}", idx % 10)).max_tokens(8).temperature(1.0).seed(idx as u64);
        request.ignore_eos = true;
        let own = running.engine.complete(request).expect("it answers");
        assert_eq!(text, own.choices[0].text, "stream {idx}");
        assert_eq!(chunks.last().expect("usage")["usage"]["completion_tokens"], 8);
    }
    let stats = running.idle_stats();
    assert_eq!((stats.requests_finished, stats.requests_cancelled), (400, 0));
}

/// Beyond the queue a request is refused at once, with a time to come again; those in it are answered.
#[test]
fn the_queue_is_bounded() {
    let running =
        Running::with(ServerOptions { max_running_requests: 1, max_waiting_requests: 2, ..ServerOptions::default() });
    let endless = json!({ "prompt": "A", "stream": true, "ignore_eos": true, "max_tokens": 1_900 }).to_string();
    let short = json!({ "prompt": "A", "max_tokens": 2 });
    let mut first = running.connect();
    first.write_all(request("POST", "/v1/completions", &[], &endless).as_bytes()).expect("sent");
    first.read_exact(&mut [0; 8]).expect("it runs");
    let mut waiting: Vec<_> = (0..2).map(|_| running.connect()).collect();
    for stream in &mut waiting {
        stream.write_all(request("POST", "/v1/completions", &[], &short.to_string()).as_bytes()).expect("sent");
    }
    let ready = loop {
        let ready = running.get("/ready");
        if ready.json()["queue"]["waiting"] == 2 {
            break ready;
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    assert_eq!((ready.status, &ready.json()["reason"]), (503, &json!("the queue of requests is full")));
    let refused = running.post("/v1/completions", &short);
    assert_eq!((refused.status, &refused.json()["error"]["code"]), (503, &json!("overloaded")));
    assert_eq!(refused.header("retry-after"), Some("1"));
    assert!(running.get("/metrics").body.contains("\nrequest_queue_depth 2\n"));
    drop(first);
    for mut stream in waiting {
        assert_eq!(Answer::read(&mut stream).status, 200);
    }
    assert_eq!(running.get("/ready").status, 200);
}

/// Many prompts of one request have a place each: they take turns with the requests of others.
#[test]
fn prompts_take_places_one_by_one() {
    let running = Running::with(ServerOptions { max_running_requests: 2, ..ServerOptions::default() });
    let many = json!({ "prompt": vec!["A"; 40], "ignore_eos": true, "max_tokens": 40, "stream": true });
    let mut crowd = running.connect();
    crowd.write_all(request("POST", "/v1/completions", &[], &many.to_string()).as_bytes()).expect("sent");
    let mut most = 0;
    loop {
        let stats = running.engine.stats();
        most = most.max(stats.num_requests_running + stats.num_requests_waiting);
        if stats.requests_finished == 40 {
            break;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    // One that has just ended may still be counted.
    assert!((1..=4).contains(&most), "{most} were at the engine at once");
    let chunks = Answer::read(&mut crowd).chunks();
    let ends = chunks.iter().filter(|chunk| chunk["choices"][0]["finish_reason"] == "length").count();
    assert_eq!(ends, 40);
}

/// A request whose time passes while it waits is told so, and is never computed.
#[test]
fn deadlines_hold_in_the_queue() {
    let running = Running::with(ServerOptions { max_running_requests: 1, ..ServerOptions::default() });
    let endless = json!({ "prompt": "A", "stream": true, "ignore_eos": true, "max_tokens": 1_900 }).to_string();
    let mut first = running.connect();
    first.write_all(request("POST", "/v1/completions", &[], &endless).as_bytes()).expect("sent");
    first.read_exact(&mut [0; 8]).expect("it runs");
    let late = running.post("/v1/completions", &json!({ "prompt": "B", "timeout_ms": 50 }));
    assert_eq!((late.status, &late.json()["error"]["code"]), (408, &json!("deadline_exceeded")));
    assert_eq!(running.engine.stats().requests_total, 1);
}

/// One key's crowd does not stand before another's first request.
#[test]
fn keys_share_fairly() {
    let secrets = ["the-secret-of-the-crowd", "the-secret-of-the-other"];
    let keys =
        [("crowd", secrets[0]), ("other", secrets[1])].map(|(name, secret)| ApiKey::new(name, secret).expect("valid"));
    let options = ServerOptions { api_keys: keys.to_vec(), max_running_requests: 1, ..ServerOptions::default() };
    let running = Running::with(options);
    let ask = |secret: &str, body: &Value| {
        let mut stream = running.connect();
        let header = format!("Authorization: Bearer {secret}");
        stream.write_all(request("POST", "/v1/completions", &[&header], &body.to_string()).as_bytes()).expect("sent");
        stream
    };
    let endless = json!({ "prompt": "A", "stream": true, "ignore_eos": true, "max_tokens": 1_900 });
    let mut first = ask(secrets[0], &endless);
    first.read_exact(&mut [0; 8]).expect("it runs");
    let long = json!({ "prompt": "A", "ignore_eos": true, "max_tokens": 300 });
    let crowd: Vec<_> = (0..40).map(|_| ask(secrets[0], &long)).collect();
    let queue = || {
        let header = format!("Authorization: Bearer {}", secrets[1]);
        running.send("GET", "/ready", &[&header], "").json()["queue"]["waiting"].as_u64().expect("a count")
    };
    while queue() < 40 {
        std::thread::sleep(Duration::from_millis(2));
    }
    let mut other = ask(secrets[1], &json!({ "prompt": "B", "max_tokens": 1 }));
    while queue() < 41 {
        std::thread::sleep(Duration::from_millis(2));
    }
    drop(first);
    assert_eq!(Answer::read(&mut other).status, 200);
    assert!(running.engine.stats().requests_total <= 10, "most of the crowd still waits: {:?}", running.engine.stats());
    drop(crowd);
}
