//! What those who watch are told: the truth about engines and queue, and numbers that Prometheus can read.

use std::collections::HashMap;

use ns_llm_server::{Model, ServerOptions};
use serde_json::json;

use crate::client::{Running, demo_engine};

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
    for name in ["time_to_first_token_seconds", "e2e_request_latency_seconds", "inter_token_latency_seconds"] {
        assert_eq!(value(&format!("ns_llm:{name}_count{{model_name=\"demo\"}}")), 2.0, "{name}");
        assert_eq!(value(&format!("ns_llm:{name}_bucket{{model_name=\"demo\",le=\"+Inf\"}}")), 2.0);
        assert!(value(&format!("ns_llm:{name}_sum{{model_name=\"demo\"}}")) > 0.0);
    }
    assert!(series.contains_key("ns_llm:time_to_first_token_seconds_bucket{model_name=\"demo\",le=\"0.001\"}"));
    assert!(series.contains_key("ns_llm:e2e_request_latency_seconds_bucket{model_name=\"demo\",le=\"7680\"}"));
    for gauge in ["request_queue_depth", "active_requests", "avg_latency_ms", "gpu_utilization"] {
        assert!(value(gauge).is_finite());
    }
    assert!(value("avg_latency_ms") > 0.0);
}

/// Dashboards that cannot be changed get vLLM's own names.
#[test]
fn names_may_be_vllms() {
    let running = Running::with(ServerOptions { vllm_metric_names: true, ..ServerOptions::default() });
    let series = series(&running.get("/metrics").body);
    assert!(series.contains_key("vllm:num_requests_running{model_name=\"demo\"}"));
    assert!(!series.keys().any(|name| name.starts_with("ns_llm:")));
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
