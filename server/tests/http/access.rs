//! Who is let in: keys on every route, hosts and pages that may ask, rates of a key, caches apart from each other.

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::time::Duration;

use ns_llm_server::{ApiKey, Model, Server, ServerOptions};
use serde_json::json;

use crate::client::{Running, demo_engine, request};

const SECRET: &str = "the-first-secret-of-all";
const OTHER: &str = "another-secret-of-ours";

fn keys() -> Vec<ApiKey> {
    vec![ApiKey::new("one", SECRET).expect("valid"), ApiKey::new("two", OTHER).expect("valid")]
}

fn bearer(secret: &str) -> String {
    format!("Authorization: Bearer {secret}")
}

/// Each route of the table, and what is no route, is 401 without a key and with a wrong one; with the right one it is not.
#[test]
fn every_route_needs_a_key() {
    let running = Running::with(ServerOptions { api_keys: keys(), ..ServerOptions::default() });
    let routes = Server::routes();
    assert!(routes.len() >= 10, "{routes:?}");
    let unknown = ("GET", "/nothing/here");
    for (method, path) in routes.into_iter().chain([unknown]) {
        let path = path.replace(['{', '}', '*'], "");
        let body = if method == "POST" { "{}" } else { "" };
        for headers in
            [vec![], vec![bearer("a-wrong-secret-of-length")], vec![format!("Authorization: Basic {SECRET}")]]
        {
            let headers: Vec<&str> = headers.iter().map(String::as_str).collect();
            let answer = running.send(method, &path, &headers, body);
            assert_eq!(answer.status, 401, "{method} {path} {headers:?}");
            assert_eq!(answer.header("www-authenticate"), Some("Bearer"));
            assert!(answer.json()["error"].is_object() || path.starts_with("/api/"), "{}", answer.body);
        }
        let answer = running.send(method, &path, &[&bearer(SECRET)], body);
        assert_ne!(answer.status, 401, "{method} {path}");
        assert_ne!((answer.status, path.as_str()), (404, "/health"));
    }
    assert_eq!(running.send("GET", "/v1/models", &[&format!("x-api-key: {OTHER}")], "").status, 200);
}

/// Probes are open to all where that was asked for, and nothing else is.
#[test]
fn probes_may_be_open() {
    let options = ServerOptions { api_keys: keys(), public_probes: true, ..ServerOptions::default() };
    let running = Running::with(options);
    assert_eq!((running.get("/health").status, running.get("/ready").status), (200, 200));
    assert_eq!((running.get("/metrics").status, running.get("/v1/models").status), (401, 401));
}

/// What touches all callers needs a key that is marked for it; other keys are told so, and nothing has changed.
#[test]
fn only_admins_touch_what_is_everybodys() {
    let mut keys = keys();
    keys[1].is_admin = true;
    let options = ServerOptions { api_keys: keys, trace_route: true, ..ServerOptions::default() };
    let running = Running::with(options);
    let body = json!({ "prompt": "A fox who lived in a wood met a hare. ".repeat(3), "max_tokens": 1 }).to_string();
    assert_eq!(running.send("POST", "/v1/completions", &[&bearer(SECRET)], &body).status, 200);
    let cached = || running.engine.stats().kv_blocks_cached;
    let measured = || {
        let metrics = running.send("GET", "/api/performance/metrics", &[&bearer(SECRET)], "").ok();
        metrics["requests"]["total"].as_u64().expect("a count")
    };
    assert!(cached() > 0 && measured() == 1);
    let routes = [("POST", "/api/kv-cache/clear"), ("POST", "/api/performance/clear"), ("GET", "/trace?seconds=0.01")];
    for (method, path) in routes {
        let refused = running.send(method, path, &[&bearer(SECRET)], "");
        let error = refused.json();
        let told = error["error"]["message"].as_str().or(error["error"].as_str()).expect("a text");
        assert!(refused.status == 403 && told.contains("admin"), "{path}: {refused:?}");
    }
    assert!(cached() > 0 && measured() == 1);
    for (method, path) in routes {
        assert_eq!(running.send(method, path, &[&bearer(OTHER)], "").status, 200, "{path}");
    }
    assert_eq!((cached(), measured()), (0, 0));
}

/// An address that others reach is refused without a key.
#[test]
fn open_addresses_need_a_key() {
    let engine = demo_engine();
    let models = || vec![Model::new(engine.clone())];
    let everywhere = SocketAddr::from(([0, 0, 0, 0], 0));
    let open = Server::new(models(), ServerOptions::default()).expect("valid").bind(everywhere);
    let error = open.expect_err("refused").to_string();
    assert!(error.contains("0.0.0.0") && error.contains("API key"), "{error}");
    let twice = [models(), models()].concat();
    assert!(Server::new(twice, ServerOptions::default()).is_err_and(|error| error.to_string().contains("demo")));
    assert!(Server::new(Vec::new(), ServerOptions::default()).is_err());
}

/// Only its own names are answered for, so that no page can have its name point here.
#[test]
fn other_hosts_are_refused() {
    let running = Running::start();
    let ask =
        |host: &str| running.raw(format!("GET /health HTTP/1.1\r\n{host}Connection: close\r\n\r\n").as_bytes()).status;
    for (host, status) in [
        ("Host: localhost\r\n", 200),
        ("Host: LOCALHOST:8080\r\n", 200),
        ("Host: 127.0.0.1:1\r\n", 200),
        ("Host: [::1]:80\r\n", 200),
        ("Host: evil.example\r\n", 421),
        ("Host: localhost.evil.example\r\n", 421),
        ("Host: evil.example:localhost\r\n", 421),
        ("Host: localhost\r\nHost: evil.example\r\n", 400),
        ("Host: \r\n", 421),
        ("", 400),
    ] {
        assert_eq!(ask(host), status, "{host:?}");
    }
    let absolute =
        running.raw(b"GET http://evil.example/health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    assert_eq!(absolute.status, 421);
}

/// Pages of other sites may neither ask nor read; those that are named may, and never with `*`.
#[test]
fn pages_need_leave() {
    let options = ServerOptions { cors_origins: vec!["https://app.example".into()], ..ServerOptions::default() };
    let running = Running::with(options);
    let stranger = running.send("GET", "/v1/models", &["Origin: https://evil.example"], "");
    assert_eq!((stranger.status, stranger.header("access-control-allow-origin")), (403, None));
    let own = running.send("GET", "/v1/models", &["Origin: http://localhost"], "");
    assert_eq!((own.status, own.header("access-control-allow-origin")), (200, None));
    let named = running.send("GET", "/v1/models", &["Origin: https://app.example"], "");
    assert_eq!((named.status, named.header("access-control-allow-origin")), (200, Some("https://app.example")));
    assert_eq!(named.header("access-control-allow-credentials"), None);
    let preflight = ["Origin: https://app.example", "Access-Control-Request-Method: POST"];
    let preflight = running.send("OPTIONS", "/v1/chat/completions", &preflight, "");
    assert_eq!((preflight.status, preflight.header("access-control-allow-methods")), (204, Some("GET, POST, DELETE")));
    // OpenAI's client in a browser sends headers that tell of itself.
    let wanted = "authorization,content-type,x-stainless-arch,x-stainless-os";
    let asks = format!("Access-Control-Request-Headers: {wanted}");
    let from = |origin: &str| {
        let headers = [&format!("Origin: {origin}"), "Access-Control-Request-Method: POST", asks.as_str()];
        let answer = running.send("OPTIONS", "/v1/chat/completions", &headers, "");
        (answer.status, answer.header("access-control-allow-headers").map(str::to_string))
    };
    assert_eq!(from("https://app.example"), (204, Some(wanted.to_string())));
    assert_eq!(from("https://evil.example"), (403, None));
    let nobody = running.get("/v1/models");
    assert_eq!((nobody.status, nobody.header("access-control-allow-origin")), (200, None));
}

/// A key's rate of requests is kept, its neighbour's is not touched, and looking costs nothing.
#[test]
fn rates_are_kept_per_key() {
    let mut keys = keys();
    keys[0].requests_per_minute = Some(2);
    let running = Running::with(ServerOptions { api_keys: keys, ..ServerOptions::default() });
    let ask = |secret: &str| running.send("POST", "/tokenize", &[&bearer(secret)], r#"{"prompt": "x"}"#);
    assert_eq!((ask(SECRET).status, ask(SECRET).status), (200, 200));
    let refused = ask(SECRET);
    assert_eq!((refused.status, &refused.json()["error"]["type"]), (429, &json!("rate_limit_error")));
    assert!(
        refused
            .header("retry-after")
            .and_then(|seconds| seconds.parse::<u64>().ok())
            .is_some_and(|s| (1..=30).contains(&s))
    );
    assert_eq!(ask(OTHER).status, 200);
    assert_eq!(running.send("GET", "/v1/models", &[&bearer(SECRET)], "").status, 200);
}

/// A key's tokens are paid after the fact: the request that overdraws is answered, the next one is not.
#[test]
fn tokens_are_paid_per_key() {
    let mut keys = keys();
    keys[0].tokens_per_minute = Some(10);
    let running = Running::with(ServerOptions { api_keys: keys, ..ServerOptions::default() });
    let body = json!({ "prompt": "Once upon a time", "max_tokens": 30, "ignore_eos": true }).to_string();
    let ask = |secret: &str| running.send("POST", "/v1/completions", &[&bearer(secret)], &body);
    assert_eq!(ask(SECRET).status, 200);
    let refused = ask(SECRET);
    assert_eq!((refused.status, &refused.json()["error"]["code"]), (429, &json!("rate_limited")));
    assert_eq!(ask(OTHER).status, 200);
}

/// Hanging up does not make an answer free: what was computed is paid, read or not, and the prompt with it.
#[test]
fn those_who_hang_up_pay() {
    let mut keys = keys();
    (keys[0].tokens_per_minute, keys[1].tokens_per_minute) = (Some(60), Some(60));
    let running = Running::with(ServerOptions { api_keys: keys, ..ServerOptions::default() });
    let ask = |secret: &str, body: &serde_json::Value| {
        let mut stream = running.connect();
        let text = request("POST", "/v1/completions", &[&bearer(secret)], &body.to_string());
        stream.write_all(text.as_bytes()).expect("sent");
        stream
    };
    let status = |secret: &str| {
        running.send("POST", "/v1/completions", &[&bearer(secret)], r#"{"prompt": "A", "max_tokens": 1}"#).status
    };
    // A long prompt, read to its first token.
    let long =
        json!({ "prompt": "Once upon a time ".repeat(60), "stream": true, "ignore_eos": true, "max_tokens": 900 });
    let mut stream = ask(SECRET, &long);
    stream.read_exact(&mut [0; 16]).expect("it runs");
    drop(stream);
    running.idle_stats();
    assert_eq!(status(SECRET), 429);
    // A short prompt and an answer in one piece, of which nothing is read.
    let whole = json!({ "prompt": "A", "ignore_eos": true, "max_tokens": 1_900 });
    let computed = running.engine.stats().generation_tokens_total;
    let stream = ask(OTHER, &whole);
    while running.engine.stats().generation_tokens_total < computed + 100 {
        std::thread::sleep(Duration::from_millis(1));
    }
    drop(stream);
    running.idle_stats();
    assert_eq!(status(OTHER), 429);
}

/// What one key's prompts left in the cache is not found by another, nor under another salt.
#[test]
fn caches_are_apart() {
    let running = Running::with(ServerOptions { api_keys: keys(), ..ServerOptions::default() });
    let prompt = "A long enough beginning of a story about a fox and a hare who lived in a wood. ".repeat(3);
    let cached = |secret: &str, salt: Option<&str>| {
        let body = json!({ "prompt": prompt, "max_tokens": 1, "cache_salt": salt }).to_string();
        let answer = running.send("POST", "/v1/completions", &[&bearer(secret)], &body).ok();
        answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().expect("a count")
    };
    assert_eq!(cached(SECRET, None), 0);
    assert!(cached(SECRET, None) >= 16, "its own is found");
    assert_eq!(cached(OTHER, None), 0);
    assert_eq!(cached(SECRET, Some("pepper")), 0);
    assert!(cached(SECRET, Some("pepper")) >= 16);
}

/// A client's own id comes back; one that cannot be repeated is replaced.
#[test]
fn requests_have_ids() {
    let running = Running::start();
    let id = |headers: &[&str]| running.send("GET", "/health", headers, "").header("x-request-id").map(str::to_string);
    assert_eq!(id(&["X-Request-Id: abc-123"]).as_deref(), Some("abc-123"));
    for unfit in ["X-Request-Id: a b", &format!("X-Request-Id: {}", "x".repeat(200)), "X-Other: 1"] {
        assert!(id(&[unfit]).is_some_and(|id| id.starts_with("req_") && id.len() < 40), "{unfit}");
    }
    assert_ne!(id(&[]), id(&[]));
}
