//! Many at once: nothing is lost, nothing is mixed up, and what is too much is refused with a time to come again.

use std::io::{Read, Write};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use ns_llm::{EmbeddingRequest, Engine, Request, RequestStream};
use ns_llm_server::{ApiKey, ServerOptions};
use serde_json::{Value, json};

use crate::client::{Answer, Running, request, scaled};

/// Hundreds of streams at once get each the whole of their own answer, and no other's.
#[test]
fn many_streams_lose_no_token() {
    let num_streams = scaled(64, 500);
    let running = Running::start();
    let body = |idx: usize| {
        json!({ "prompt": format!("Story {}", idx % 10), "stream": true, "max_tokens": 8, "seed": idx, "temperature": 1,
                "ignore_eos": true, "stream_options": { "include_usage": true } })
    };
    let mut streams: Vec<_> = (0..num_streams).map(|_| running.connect()).collect();
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
    assert_eq!((stats.requests_finished, stats.requests_cancelled), (2 * num_streams as u64, 0));
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
        most = most.max(stats.num_sequences_running + stats.num_sequences_waiting);
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

/// Many times what fits, at once: who is refused is told so at once and costs nothing, who is accepted gets all of its
/// answer, and nothing was computed that nobody got; afterwards everything is as before.
#[test]
fn overload_wastes_nothing() {
    let running =
        Running::with(ServerOptions { max_running_requests: 2, max_waiting_requests: 6, ..ServerOptions::default() });
    let body = json!({ "prompt": "Once upon a time", "ignore_eos": true, "max_tokens": 12 }).to_string();
    let (mut num_answered, mut num_refused) = (0, 0);
    // Until it was overloaded: a fast machine may answer the first before the last has come.
    while num_refused == 0 {
        let mut streams: Vec<_> = (0..80).map(|_| running.connect()).collect();
        for stream in &mut streams {
            stream.write_all(request("POST", "/v1/completions", &[], &body).as_bytes()).expect("sent");
        }
        for mut stream in streams {
            let answer = Answer::read(&mut stream);
            match answer.status {
                200 => {
                    assert_eq!(answer.json()["usage"]["completion_tokens"], 12);
                    num_answered += 1;
                }
                status => {
                    assert_eq!((status, answer.header("retry-after")), (503, Some("1")), "{answer:?}");
                    num_refused += 1;
                }
            }
        }
    }
    let stats = running.idle_stats();
    assert!(num_answered >= 8, "{num_answered} of the places were used");
    assert_eq!((stats.requests_total, stats.requests_finished), (num_answered, num_answered), "{stats:?}");
    assert_eq!(stats.generation_tokens_total, 12 * num_answered);
    assert_eq!((stats.kv_blocks_used, stats.requests_refused, stats.num_requests_preparing), (0, 0, 0), "{stats:?}");
    assert_eq!(running.get("/ready").status, 200);
}

/// A reader that, when it is woken, holds the thread that wakes it until it is told to go on.
struct HeldWaker {
    go_on: Mutex<Receiver<()>>,
    /// Hears when the thread is held.
    holds: Sender<()>,
}

impl Wake for HeldWaker {
    fn wake(self: Arc<Self>) {
        let _ = self.holds.send(());
        // Whoever waits has been let go when the sender is gone.
        let _ = self.go_on.lock().expect("one thread").recv();
    }
}

/// Makes the thread that tells next of what `begin` gives stand still until the sender is dropped.
fn stand_still(begin: impl Fn() -> RequestStream) -> (Sender<()>, RequestStream) {
    let ((go_on, wait), (holds, held)) = (channel(), channel());
    let waker = Waker::from(Arc::new(HeldWaker { go_on: Mutex::new(wait), holds }));
    let mut cx = Context::from_waker(&waker);
    loop {
        let mut stream = begin();
        let pending = loop {
            match stream.poll_next(&mut cx) {
                Poll::Ready(Some(_)) => {}
                Poll::Ready(None) => break false,
                Poll::Pending => break true,
            }
        };
        // Otherwise it has ended before it could be held up.
        if pending {
            held.recv().expect("the waker is there");
            return (go_on, stream);
        }
    }
}

/// V7: when work is there and a stage of the engine does nothing, the server is not ready and says why, and everybody who
/// waits (for a place, for a whole answer, for the next piece of a stream) is told so. When it goes on, so does the server.
#[test]
fn a_standstill_is_told() {
    // The worker is held when it tells of a token, intake when it refuses an input that is too long.
    let worker = |engine: &Engine| {
        let mut request = Request::prompt("Once upon a time").max_tokens(1_900);
        request.ignore_eos = true;
        let mut stream = engine.submit(request).expect("it is taken");
        stream.next().expect("a token").expect("no error");
        stream
    };
    let intake = |engine: &Engine| {
        let mut request = EmbeddingRequest::new(["word ".repeat(200_000)]);
        request.truncate = false;
        engine.submit_embedding(request).expect("it is taken")
    };
    type Hold = fn(&Engine) -> RequestStream;
    let stages: [(Hold, &str); 2] =
        [(worker, "work is waiting and no step was completed"), (intake, "requests are waiting and none was admitted")];
    for (hold, cause) in stages {
        let options = ServerOptions {
            max_running_requests: 2,
            step_stall: Duration::from_millis(500),
            ..ServerOptions::default()
        };
        let running = Running::with(options);
        let body = |stream| json!({ "prompt": "A", "stream": stream, "ignore_eos": true, "max_tokens": 8 }).to_string();
        let (go_on, held) = stand_still(|| hold(&running.engine));
        let mut waiting: Vec<_> = (0..3).map(|_| running.connect()).collect();
        for (idx, stream) in waiting.iter_mut().enumerate() {
            stream.write_all(request("POST", "/v1/completions", &[], &body(idx == 1)).as_bytes()).expect("sent");
        }
        for stream in &mut waiting {
            let answer = Answer::read(stream);
            assert_eq!((answer.status, answer.header("retry-after")), (503, Some("1")), "{cause}: {answer:?}");
            let error = &answer.json()["error"];
            assert_eq!(error["code"], "stalled");
            assert!(error["message"].as_str().expect("a text").ends_with(cause), "{error}");
        }
        let ready = running.get("/ready");
        assert_eq!((ready.status, &ready.json()["reason"]), (503, &json!(cause)));
        assert_eq!(running.get("/health").status, 200, "it may go on");
        drop((go_on, held));
        // A machine that is slow enough looks as if it stood still, for a while.
        while running.send("POST", "/v1/completions", &[], &body(false)).status != 200 {}
        while running.get("/ready").status != 200 {}
    }
}
