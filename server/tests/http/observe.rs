//! What those who watch are told: the truth about engines and queue, and numbers that Prometheus can read.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::time::Duration;

use ns_llm_server::{Model, ServerOptions};
use serde_json::{Value, json};

use crate::client::{Answer, Running, demo_engine, demo_options, request};

/// Every line is a comment or a number; each series is told once, after its kind.
fn series(text: &str) -> HashMap<String, f64> {
    let mut series = HashMap::new();
    let mut kinds: HashMap<&str, &str> = HashMap::new();
    for line in text.lines() {
        if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (name, kind) = kind.split_once(' ').expect("a name and a kind");
            assert!(kinds.insert(name, kind).is_none(), "{name} is told twice");
        } else if !line.starts_with('#') {
            let (name, value) = line.rsplit_once(' ').expect("a series and a number");
            let family = name.split('{').next().expect("a name");
            let base = ["_bucket", "_sum", "_count"].iter().find_map(|end| family.strip_suffix(end)).unwrap_or(family);
            assert!(kinds.contains_key(base) || kinds.contains_key(family), "{family} has no kind");
            assert!(series.insert(name.to_string(), value.parse().expect("a number")).is_none(), "{name} twice");
        }
    }
    series
}

/// Counters are the engine's, histograms count each request once, with vLLM's names and buckets.
#[test]
fn metrics_are_counted() {
    let running = Running::start();
    for stream in [false, true] {
        let body = json!({ "prompt": "Once upon a time", "max_tokens": 5, "ignore_eos": true, "stream": stream });
        assert_eq!(running.post("/v1/completions", &body).status, 200);
    }
    running.post("/v1/embeddings", &json!({ "input": "a fox" })).ok();
    let answer = running.get("/metrics");
    assert_eq!(answer.header("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
    let series = series(&answer.body);
    let value = |name: &str| series.get(name).copied().unwrap_or_else(|| panic!("{name} is missing"));
    let stats = running.engine.stats();
    assert_eq!(value("ns_llm:generation_tokens_total{model_name=\"demo\"}"), 10.0);
    assert_eq!(value("ns_llm:prompt_tokens_total{model_name=\"demo\"}"), stats.prompt_tokens_total as f64);
    assert_eq!(value("ns_llm:request_success_total{model_name=\"demo\",finished_reason=\"length\"}"), 2.0);
    for (name, count) in [
        ("time_to_first_token_seconds", 2.0),
        ("e2e_request_latency_seconds", 2.0),
        ("request_prompt_tokens", 2.0),
        // Five tokens have four times between them.
        ("inter_token_latency_seconds", 8.0),
        ("iteration_time_seconds", stats.steps_total as f64),
        ("iteration_tokens_total", stats.steps_total as f64),
    ] {
        assert_eq!(value(&format!("ns_llm:{name}_count{{model_name=\"demo\"}}")), count, "{name}");
        assert_eq!(value(&format!("ns_llm:{name}_bucket{{model_name=\"demo\",le=\"+Inf\"}}")), count);
        assert!(value(&format!("ns_llm:{name}_sum{{model_name=\"demo\"}}")) > 0.0);
    }
    assert!(series.contains_key("ns_llm:time_to_first_token_seconds_bucket{model_name=\"demo\",le=\"0.001\"}"));
    assert!(series.contains_key("ns_llm:e2e_request_latency_seconds_bucket{model_name=\"demo\",le=\"7680\"}"));
    for gauge in ["request_queue_depth", "active_requests", "avg_latency_ms", "gpu_utilization"] {
        assert!(value(gauge).is_finite());
    }
    assert!(value("avg_latency_ms") > 0.0);
}

/// The response cache and the tiers of the prefix cache are counted where they are hit, in the metrics as in ns-node's shape.
#[test]
fn caches_are_told_by_tier() {
    let mut engine = demo_options();
    engine.response_cache.max_bytes = 1 << 20;
    // Host memory takes what the pool, of one sequence and a half, gives up.
    engine = engine.kv_bytes(6 << 20);
    engine.kv_host_bytes = 32 << 20;
    let running = Running::over(engine, ServerOptions::default());
    let ask = |prompt: &str| running.post("/v1/completions", &json!({ "prompt": prompt, "max_tokens": 1 })).ok();
    let prompt = |idx: usize| format!("{idx}: {}", "A fox who lived in a wood met a hare. ".repeat(8));
    (0..2).for_each(|_| drop(ask(&prompt(0))));
    let value = |name: &str| {
        let series = series(&running.get("/metrics").body);
        series.get(name).copied().unwrap_or_else(|| panic!("{name} is missing"))
    };
    let of = |name: &str, tier: &str| value(&format!("ns_llm:{name}{{model_name=\"demo\",tier=\"{tier}\"}}"));
    assert_eq!((of("response_cache_hits_total", "memory"), of("response_cache_entries", "memory")), (1.0, 1.0));
    assert_eq!(value("ns_llm:response_cache_misses_total{model_name=\"demo\"}"), 1.0);
    assert!(of("response_cache_bytes", "memory") > 0.0 && of("response_cache_hits_total", "disk") == 0.0);
    // Until the first prompt's blocks are in host memory, and found there.
    let mut idx = 1;
    while of("kv_tier_blocks", "host") < 64.0 {
        ask(&prompt(idx));
        idx += 1;
        assert!(idx < 400, "nothing is given up");
    }
    let again = json!({ "prompt": prompt(0), "max_tokens": 2 });
    let usage = running.post("/v1/completions", &again).ok()["usage"]["prompt_tokens_details"].clone();
    let from_host = usage["cached_by_tier"]["host"].as_u64().expect("a count");
    assert!(from_host > 0, "{usage}");
    assert!(of("kv_tier_hits_total", "host") > 0.0 && of("cached_tokens_total", "host") >= from_host as f64);
    let stats = running.get("/api/kv-cache/stats").ok();
    let host = &stats["tiers"][0];
    assert_eq!((&host["name"], host["hits"].as_f64()), (&json!("host"), Some(of("kv_tier_hits_total", "host"))));
    assert!(host["entries"].as_u64() >= Some(64) && host["bytes"].as_u64() > Some(64 * 16));
    assert_eq!(stats["stores"], host["stores"]);
    assert!(stats["prefix"]["hitTokensByTier"]["host"].as_u64() >= Some(from_host));
    let responses = &stats["responses"];
    assert_eq!((&responses["enabled"], &responses["hits"]["memory"]), (&json!(true), &json!(1)));
    assert!(responses["entries"]["memory"].as_u64() > Some(1) && responses["misses"].as_u64() > Some(1));
}

/// Dashboards that cannot be changed get vLLM's own names.
#[test]
fn names_may_be_vllms() {
    let running = Running::with(ServerOptions { vllm_metric_names: true, ..ServerOptions::default() });
    let series = series(&running.get("/metrics").body);
    assert!(series.contains_key("vllm:num_requests_running{model_name=\"demo\"}"));
    assert!(!series.keys().any(|name| name.starts_with("ns_llm:")));
}

/// A trace is there only where it was asked for; it shows steps and, under the ids that clients gave, what each request got of
/// them; one at a time; and a client that hangs up ends its own.
#[test]
fn traces_are_recorded_on_demand() {
    let closed = Running::start();
    assert_eq!(closed.get("/trace?seconds=0.1").status, 404);
    drop(closed);
    let running = Running::with(ServerOptions { trace_route: true, ..ServerOptions::default() });
    for wrong in ["0", "-1", "61", "x"] {
        let answer = running.get(&format!("/trace?seconds={wrong}"));
        assert_eq!((answer.status, &answer.json()["error"]["param"]), (400, &json!("seconds")), "{wrong}");
    }
    let mut impatient = running.connect();
    impatient.write_all(request("GET", "/trace?seconds=60", &[], "").as_bytes()).expect("sent");
    // It runs when another one is refused; then its client is gone, and with it the recording.
    while running.get("/trace?seconds=0.001").status != 409 {}
    drop(impatient);
    let parent = "traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let body = json!({ "prompt": "Once upon a time", "max_tokens": 4, "ignore_eos": true }).to_string();
    let trace = loop {
        let mut recording = running.connect();
        recording.write_all(request("GET", "/trace?seconds=1", &[], "").as_bytes()).expect("sent");
        let answer = running.send("POST", "/v1/completions", &["X-Request-Id: from-outside", parent], &body);
        assert_eq!((answer.status, answer.header("x-request-id")), (200, Some("from-outside")));
        let trace = Answer::read(&mut recording);
        // The first one may still be running; and a slow machine may not have begun in time.
        if trace.status == 200 && trace.body.contains("from-outside") {
            break trace.ok();
        }
    };
    let events = trace["traceEvents"].as_array().expect("a list");
    let lane = events.iter().find(|event| event["args"]["name"].as_str().is_some_and(|n| n.contains("from-outside")));
    let lane = lane.expect("its lane");
    assert!(lane["args"]["name"].as_str().expect("a name").contains("0af7651916cd43dd8448eb211c80319c"), "{lane}");
    let slices: Vec<&str> = events
        .iter()
        .filter(|event| event["ph"] == "X" && (&event["pid"], &event["tid"]) == (&lane["pid"], &lane["tid"]))
        .filter_map(|event| event["name"].as_str())
        .collect();
    assert!(slices.contains(&"decode"), "{slices:?}");
    let steps = events.iter().filter(|event| event["name"] == "step").count();
    assert!(steps >= 3, "{steps} steps of one prompt and four tokens");
}

/// A collector gets a span of each request, child of its client's, with its parts in order; what a collector does not take is
/// counted, and harms nobody.
#[test]
fn spans_reach_a_collector() {
    let collector = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let endpoint = format!("http://{}", collector.local_addr().expect("bound"));
    let running = Running::with(ServerOptions { otlp_endpoint: Some(endpoint), ..ServerOptions::default() });
    let parent = "traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let body = json!({ "prompt": "Once upon a time", "max_tokens": 4, "ignore_eos": true }).to_string();
    assert_eq!(running.send("POST", "/v1/completions", &["X-Request-Id: mine", parent], &body).status, 200);
    let (mut stream, _) = collector.accept().expect("a connection");
    let mut bytes = Vec::new();
    let posted = loop {
        let mut piece = [0; 4_096];
        let length = stream.read(&mut piece).expect("a request");
        assert!(length > 0, "it ended early");
        bytes.extend_from_slice(&piece[..length]);
        let text = String::from_utf8_lossy(&bytes);
        if let Some(body) = text.split_once("\r\n\r\n").and_then(|(_, body)| serde_json::from_str::<Value>(body).ok()) {
            assert!(text.starts_with("POST /v1/traces HTTP/1.1\r\n"), "{text}");
            break body;
        }
    };
    stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}").expect("sent");
    drop(stream);
    let spans = posted["resourceSpans"][0]["scopeSpans"][0]["spans"].as_array().expect("spans").clone();
    let names: Vec<_> = spans.iter().map(|span| span["name"].as_str().expect("a name")).collect();
    assert_eq!(names, ["generate", "queue", "prefill", "decode"]);
    assert_eq!(spans[0]["parentSpanId"], "b7ad6b7169203331");
    let nanos = |span: &Value, name: &str| span[name].as_str().expect("digits").parse::<u64>().expect("a number");
    for (idx, span) in spans.iter().enumerate() {
        assert_eq!(span["traceId"], "0af7651916cd43dd8448eb211c80319c");
        assert!(idx == 0 || span["parentSpanId"] == spans[0]["spanId"], "{span}");
        assert!(nanos(span, "startTimeUnixNano") <= nanos(span, "endTimeUnixNano"), "{span}");
        assert!(idx < 2 || span["startTimeUnixNano"] == spans[idx - 1]["endTimeUnixNano"], "{span}");
    }
    let attribute = |name: &str| {
        let attributes = spans[0]["attributes"].as_array().expect("a list");
        attributes.iter().find(|attribute| attribute["key"] == name).map(|found| found["value"].clone())
    };
    assert_eq!(attribute("gen_ai.request.id"), Some(json!({ "stringValue": "mine" })));
    assert_eq!(attribute("gen_ai.usage.completion_tokens"), Some(json!({ "intValue": "4" })));
    let spans_are = |outcome: &str, count: usize| {
        let line = format!("\nns_llm:otlp_spans_total{{outcome=\"{outcome}\"}} {count}\n");
        while !running.get("/metrics").body.contains(&line) {
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    spans_are("sent", 4);
    drop(collector);
    assert_eq!(running.send("POST", "/v1/completions", &[], &body).status, 200);
    spans_are("dropped", 4);
}

/// Health and readiness tell of an engine that has ended, among several.
#[test]
fn an_engine_that_ended_is_told() {
    let (first, second) = (demo_engine(), demo_engine());
    let models = vec![Model::new(first.clone()), Model { name: "second".to_string(), ..Model::new(second.clone()) }];
    let running = Running::serving(first, models, ServerOptions::default());
    assert_eq!(running.get("/health").ok()["status"], "ok");
    let ready = running.get("/ready").ok();
    assert_eq!((&ready["ready"], &ready["models"][1]["id"]), (&json!(true), &json!("second")));
    second.close();
    let health = running.get("/health");
    assert_eq!((health.status, &health.json()["status"]), (503, &json!("unhealthy")));
    let ready = running.get("/ready");
    assert_eq!((ready.status, &ready.json()["reason"]), (503, &json!("the engine has ended")));
    assert_eq!(
        (&ready.json()["models"][0]["ready"], &ready.json()["models"][1]["ready"]),
        (&json!(true), &json!(false))
    );
    let closed = running.post("/v1/completions", &json!({ "model": "second", "prompt": "A" }));
    assert_eq!((closed.status, &closed.json()["error"]["code"]), (503, &json!("closed")));
    assert_eq!(running.post("/v1/completions", &json!({ "prompt": "A", "max_tokens": 1 })).status, 200);
}
