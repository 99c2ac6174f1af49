//! Requests that nobody would write, a seeded stream of them: JSON bodies changed in their structure and in their bytes, heads
//! with odd paths and headers. Whatever comes, the answer is an answer: no panic, no 500, and an error that says what is wrong.

use std::time::Duration;

use axum::http::{HeaderName, HeaderValue, Method, Request};
use ns_llm_server::{Bytes, Model, Server, ServerOptions};
use serde_json::{Value, json};

use crate::client::{Random, demo_engine, scaled};
use crate::mounted::finish_text;

/// What each route with a body is asked for, before it is changed.
fn corpus() -> Vec<(&'static str, Value)> {
    let messages = json!([
        { "role": "system", "content": "Be kind." },
        { "role": "user", "content": [{ "type": "text", "text": "A fox?" }] },
    ]);
    let sampling = json!({ "model": "demo", "max_tokens": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 4, "min_p": 0.1, "seed": 7,
        "stop": ["a", "b"], "stop_token_ids": [3], "logit_bias": { "5": -1 }, "n": 1, "repetition_penalty": 1.1,
        "presence_penalty": 0.5, "frequency_penalty": 0.5, "priority": "high", "timeout_ms": 1000, "cache_salt": "x",
        "stream": false, "cache_prompt": true, "ignore_eos": false });
    let with = |name: &str, value: Value| {
        let mut body = sampling.clone();
        body[name] = value;
        body
    };
    let mut chat = with("messages", messages.clone());
    (chat["logprobs"], chat["top_logprobs"]) = (json!(true), json!(2));
    let mut stream = with("messages", messages.clone());
    (stream["stream"], stream["stream_options"]) = (json!(true), json!({ "include_usage": true }));
    let options = json!({ "num_predict": 2, "temperature": 0.1, "top_k": 3, "stop": ["x"], "seed": 1 });
    vec![
        ("/v1/chat/completions", chat),
        ("/v1/chat/completions", stream),
        ("/v1/completions", with("prompt", json!(["Once", [1, 2, 3]]))),
        ("/v1/completions", with("prompt", json!("Once"))),
        (
            "/v1/embeddings",
            json!({ "model": "demo", "input": ["a", [1, 2]], "dimensions": 8, "encoding_format": "base64" }),
        ),
        (
            "/v1/responses",
            json!({ "model": "demo", "input": messages, "instructions": "x", "max_output_tokens": 2, "store": true,
            "metadata": { "a": "b" }, "stream": false, "previous_response_id": null }),
        ),
        ("/tokenize", json!({ "model": "demo", "prompt": "a fox", "add_special_tokens": true })),
        ("/detokenize", json!({ "tokens": [1, 2, 300] })),
        (
            "/api/generate",
            json!({ "model": "demo", "prompt": "Once", "stream": false, "raw": true, "options": options }),
        ),
        ("/api/generate", json!({ "text": "Once", "max_tokens": 2, "temperature": 0.3, "stream": true })),
        ("/api/generate/stream", json!({ "text": "Once", "maxTokens": 2 })),
        ("/api/chat", json!({ "model": "demo", "messages": messages, "options": options, "stream": true })),
        ("/api/embed", json!({ "model": "demo", "input": ["a", "b"], "truncate": true })),
        ("/api/embed", json!({ "text": "a" })),
        ("/api/embeddings", json!({ "prompt": "a" })),
        ("/api/show", json!({ "model": "demo" })),
        ("/api/gpu/can-handle", json!({ "requiredVram": 100 })),
        ("/api/kv-cache/prune", json!({})),
        ("/api/performance/clear", json!({})),
        ("/v1/responses/resp_0/cancel", json!({})),
    ]
}

/// A value that was not expected.
fn odd_value(random: &mut Random) -> Value {
    let values = [
        Value::Null,
        json!(true),
        json!(-1),
        json!(0),
        json!(1.5),
        json!(u64::MAX),
        json!(i64::MIN),
        json!(1e308),
        json!(1e-320),
        json!(""),
        json!("\u{0}\u{feff}\u{202e}\u{1f98a}"),
        json!("<|im_start|>{{ messages }}{% for x in y %}"),
        json!("x".repeat(20_000)),
        json!([]),
        json!({}),
        json!([[[[[[]]]]]]),
        json!({ "type": "image_url", "role": "tool", "content": null }),
        json!(vec![0; 3_000]),
        json!(["a", 1, null, {}]),
    ];
    values[random.below(values.len())].clone()
}

/// Changes one place: a value for another, a field away, a field beside it, an element twice.
fn change(value: &mut Value, random: &mut Random) {
    let goes_deeper = random.below(3) > 0;
    match value {
        Value::Object(map) if goes_deeper && !map.is_empty() => {
            let key = map.keys().nth(random.below(map.len())).cloned().unwrap_or_default();
            match random.below(6) {
                0 => drop(map.remove(&key)),
                1 => drop(map.insert(format!("{key}s"), odd_value(random))),
                _ => change(&mut map[&key], random),
            }
        }
        Value::Array(values) if goes_deeper && !values.is_empty() => {
            let idx = random.below(values.len());
            match random.below(6) {
                0 => drop(values.remove(idx)),
                1 => values.push(values[idx].clone()),
                _ => change(&mut values[idx], random),
            }
        }
        value => *value = odd_value(random),
    }
}

const PUNCTUATION: &[u8] = b"{}[]\",:\\0-e\xff";

/// Changes bytes: flips, cuts, doubles.
fn damage(bytes: &mut Vec<u8>, random: &mut Random) {
    if bytes.is_empty() {
        return;
    }
    let at = random.below(bytes.len());
    match random.below(5) {
        0 => bytes[at] ^= 1 << random.below(8),
        1 => bytes[at] = PUNCTUATION[random.below(PUNCTUATION.len())],
        2 => bytes.truncate(at),
        3 => bytes.insert(at, random.below(256) as u8),
        _ => bytes.extend_from_within(at..),
    }
}

fn odd_header(random: &mut Random) -> (&'static str, Vec<u8>) {
    let names = [
        "content-type",
        "content-encoding",
        "content-length",
        "x-request-id",
        "origin",
        "authorization",
        "expect",
        "host",
    ];
    let values: [&[u8]; 8] =
        [b"", b"gzip", b"99999999999999999999", b"-1", b"\xff\xfe", b"https://x", b"Bearer ", b"application/xml"];
    (names[random.below(names.len())], values[random.below(values.len())].to_vec())
}

/// A path of the table with something odd in its place, or after it.
fn odd_path(random: &mut Random) -> (Method, String) {
    let routes = Server::routes();
    let (method, path) = routes[random.below(routes.len())];
    let ids = ["x", "%ff", "%00", "..%2f..", "a%2Fb", "\u{e9}", "resp_", "%", "%zz", "demo"];
    let id = ids[random.below(ids.len())];
    let queries =
        ["", "?", "?window=1e400", "?window=-1&limit=0", "?minutes=NaN&x", "?limit=99999999999999999999", "?%ff=%"];
    let path = path.replace("{*id}", id).replace("{id}", id).replace("{key}", id);
    let methods = [method, "HEAD", "OPTIONS", "PUT", "DELETE", "GET"];
    let method = methods[random.below(methods.len())].parse().expect("a method");
    (method, path + queries[random.below(queries.len())])
}

fn request(random: &mut Random, corpus: &[(&'static str, Value)]) -> Option<Request<Bytes>> {
    let (path, body) = &corpus[random.below(corpus.len())];
    let mut body = body.clone();
    for _ in 0..random.below(3) {
        change(&mut body, random);
    }
    let mut bytes = body.to_string().into_bytes();
    if random.below(4) == 0 {
        for _ in 0..=random.below(3) {
            damage(&mut bytes, random);
        }
    }
    let (mut method, mut target) = (Method::POST, path.to_string());
    if random.below(5) == 0 {
        (method, target) = odd_path(random);
    }
    // What HTTP's own parser refuses does not get here.
    let mut request =
        Request::builder().method(method).uri(target).header("host", "localhost").body(Bytes::from(bytes)).ok()?;
    if random.below(8) == 0 {
        let (name, value) = odd_header(random);
        let value = HeaderValue::from_bytes(&value).expect("a value that HTTP has");
        request.headers_mut().insert(HeaderName::from_static(name), value);
    }
    Some(request)
}

/// No request brings a panic or a 500, and each refusal is JSON that says why in few words and names nothing of the inside.
#[test]
fn no_request_is_too_odd() {
    let options = ServerOptions {
        // What asks for long answers gets short ones.
        request_timeout: Duration::from_millis(20),
        timer: Some(Server::thread_timer()),
        ..ServerOptions::default()
    };
    let server = Server::new(vec![Model::new(demo_engine())], options).expect("valid");
    let (corpus, mut random) = (corpus(), Random(11));
    let (mut answered, mut refused) = (0, 0);
    let count = scaled(1_000, 1_000_000);
    for number in 0..count {
        let Some(request) = request(&mut random, &corpus) else { continue };
        let what = format!("{number}: {} {} {:?}", request.method(), request.uri(), request.headers());
        let body = String::from_utf8_lossy(&request.body()[..request.body().len().min(300)]).into_owned();
        let is_head = request.method() == Method::HEAD;
        let (status, answer) = finish_text(server.ask(request));
        assert!(status < 500 || [501, 503].contains(&status), "{what}\n{body}\n{status} {answer}");
        match status {
            200..=299 => answered += 1,
            _ => refused += 1,
        }
        if status >= 400 && !is_head {
            let error = serde_json::from_str::<Value>(&answer).unwrap_or_else(|_| panic!("{what}\n{status} {answer}"))
                ["error"]
                .take();
            let message =
                error["message"].as_str().or(error.as_str()).unwrap_or_else(|| panic!("{what}\n{status} {answer}"));
            assert!(!message.is_empty() && message.len() < 800, "{what}\n{message}");
            assert!(!message.contains(".rs") && !message.contains("panicked"), "{what}\n{message}");
        }
    }
    assert!(answered > count / 20 && refused > count / 20, "{answered} answered, {refused} refused");
}
