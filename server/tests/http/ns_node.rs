//! The routes of ns-node and of its older service: their streams, byte by byte, and the shapes that their pages read.

use ns_llm::{EmbeddingRequest, Request};
use serde_json::{Value, json};

use crate::client::Running;

const TEXT: &str = "Once upon a time";

fn own_text(running: &Running) -> String {
    let request = Request::prompt(TEXT).max_tokens(8).temperature(0.0);
    running.engine.complete(request).expect("it answers").choices[0].text.clone()
}

/// Frames as name and data; most have no name.
fn frames(body: &str) -> Vec<(&str, &str)> {
    let frame = |frame| -> (&str, &str) {
        let (name, data) = match str::strip_prefix(frame, "event: ").and_then(|named| named.split_once('\n')) {
            Some((name, data)) => (name, data),
            None => ("", frame),
        };
        (name, data.strip_prefix("data: ").expect("data"))
    };
    body.strip_suffix("\n\n").expect("whole frames").split("\n\n").map(frame).collect()
}

/// The older service's answer in one piece, and its stream of `meta`, `token` and `done`.
#[test]
fn ns_llm_streams_named_events() {
    let running = Running::start();
    let own = own_text(&running);
    let whole = running.post("/api/generate", &json!({ "text": TEXT, "max_tokens": 8 })).ok();
    assert_eq!((&whole["text"], &whole["tokens_generated"], &whole["model"]), (&json!(own), &json!(8), &json!("demo")));
    let answer = running.post("/api/generate", &json!({ "text": TEXT, "max_tokens": 8, "stream": true }));
    let frames = frames(&answer.body);
    assert_eq!(frames[0], ("meta", r#"{"model":"demo","received":16}"#));
    assert_eq!(frames[frames.len() - 1], ("done", r#"{"done":true,"token_count":8}"#));
    let tokens = frames[1..frames.len() - 1].iter().enumerate().map(|(idx, (name, data))| {
        let data: Value = serde_json::from_str(data).expect("JSON");
        assert_eq!((*name, &data["idx"]), ("token", &json!(idx)));
        data["token"].as_str().expect("text").to_string()
    });
    assert_eq!(tokens.collect::<String>(), own);
}

/// ns-node's stream of `stream_token`, and the event that ends it.
#[test]
fn ns_node_streams_tokens() {
    let running = Running::start();
    let answer = running.post("/api/generate/stream", &json!({ "text": TEXT, "maxTokens": 8 }));
    assert_eq!(answer.header("content-type"), Some("text/event-stream"));
    let frames = frames(&answer.body);
    assert_eq!(frames[frames.len() - 1], ("done", "[DONE]"));
    let tokens = frames[..frames.len() - 1].iter().map(|(name, data)| {
        let data: Value = serde_json::from_str(data).expect("JSON");
        assert_eq!((*name, &data["done"]), ("", &json!(false)));
        data["stream_token"].as_str().expect("text").to_string()
    });
    assert_eq!(tokens.collect::<String>(), own_text(&running));
    let refused = running.post("/api/generate/stream", &json!({ "text": "" }));
    assert_eq!((refused.status, &refused.json()["error"]), (400, &json!("text is \"\", must be not empty")));
}

/// The older service's one vector.
#[test]
fn one_text_becomes_one_vector() {
    let running = Running::start();
    let own = running.engine.embed(EmbeddingRequest::new(["a fox"])).expect("a vector");
    let answer = running.post("/api/embed", &json!({ "text": "a fox" })).ok();
    let values: Vec<f32> = serde_json::from_value(answer["embedding"].clone()).expect("numbers");
    assert_eq!(values, own.embeddings[0].values);
    assert_eq!(
        (&answer["dimensions"], &answer["tokens"]),
        (&json!(values.len()), &json!(own.summary.usage.prompt_tokens))
    );
}

/// The cache's numbers are those of what was really found.
#[test]
fn the_cache_is_told() {
    let running = Running::start();
    let prompt = "A long enough beginning of a story about a fox and a hare who lived in a wood.";
    for _ in 0..4 {
        running.post("/v1/completions", &json!({ "prompt": prompt, "max_tokens": 1 })).ok();
    }
    let stats = running.get("/api/kv-cache/stats").ok();
    assert_eq!((&stats["hits"], &stats["misses"], &stats["hitRate"]), (&json!(3), &json!(1), &json!(75.0)));
    let engine = running.engine.stats();
    assert_eq!(stats["prefix"]["hitTokens"], engine.prefix_cache_hits_total);
    assert!(engine.prefix_cache_hits_total >= 48 && stats["memorySize"].as_u64().is_some_and(|blocks| blocks > 0));
    for field in [
        "evictions",
        "stores",
        "retrievals",
        "diskReads",
        "diskWrites",
        "federatedQueries",
        "totalRequests",
        "diskSize",
    ] {
        assert!(stats[field].is_u64(), "{field}");
    }
    assert_eq!(running.get("/api/kv-cache/..%2F..%2Fsecret/exists").ok(), json!({ "exists": false }));
    assert_eq!(running.send("DELETE", "/api/kv-cache/abc", &[], "").ok(), json!({ "success": false }));
    assert_eq!(running.post("/api/kv-cache/prune", &json!({})).ok()["success"], true);
    // Cleared, it is empty, and fills again.
    assert_eq!(running.post("/api/kv-cache/clear", &json!({})).ok()["success"], true);
    assert_eq!(running.get("/api/kv-cache/stats").ok()["memorySize"], 0);
    for _ in 0..2 {
        running.post("/v1/completions", &json!({ "prompt": prompt, "max_tokens": 1 })).ok();
    }
    let after = running.get("/api/kv-cache/stats").ok();
    assert_eq!((&after["hits"], &after["misses"]), (&json!(4), &json!(2)));
}

/// What was answered is in the performance routes, with their types, and can be forgotten.
#[test]
fn performance_is_told() {
    let running = Running::start();
    let idle = running.get("/api/performance/metrics").ok();
    assert_eq!(
        (&idle["requests"]["successRate"], &idle["throughput"]["tokensPerSecond"]),
        (&json!("0.00"), &json!("0.00"))
    );
    assert_eq!(running.get("/api/performance/report").ok()["summary"]["grade"], "N/A");
    running.post("/v1/completions", &json!({ "prompt": "A", "max_tokens": 8, "ignore_eos": true })).ok();
    running.post("/v1/embeddings", &json!({ "input": "a fox" })).ok();
    let metrics = running.get("/api/performance/metrics?window=600000").ok();
    assert_eq!((&metrics["requests"]["total"], &metrics["requests"]["successRate"]), (&json!(2), &json!("100.00")));
    assert_eq!(metrics["timeWindow"], "600s");
    for name in ["ttft", "endToEnd", "perToken", "embedding"] {
        for part in ["p50", "p95", "p99", "avg"] {
            assert!(metrics["latency"][name][part].as_f64().is_some_and(|ms| ms > 0.0), "{name}.{part}: {metrics}");
        }
    }
    assert!(
        metrics["throughput"]["tokensPerSecond"]
            .as_str()
            .is_some_and(|rate| rate.parse::<f64>().is_ok_and(|rate| rate > 0.0))
    );
    assert!(metrics["resources"]["memory"]["process"]["rss"].as_u64().is_some_and(|bytes| bytes > 1 << 20));
    let report = running.get("/api/performance/report").ok();
    assert!(
        report["summary"]["score"].as_u64().is_some_and(|score| score <= 100) && report["recommendations"].is_array()
    );
    assert_eq!(running.get("/api/performance/bottlenecks?limit=1").ok()["analyzed"], 1);
    assert_eq!(running.post("/api/performance/clear", &json!({})).ok()["success"], true);
    assert_eq!(running.get("/api/performance/metrics").ok()["requests"]["total"], 0);
}

/// The machine is described in ns-node's shapes, with a GPU or without.
#[test]
fn devices_are_told() {
    let running = Running::start();
    let status = running.get("/api/gpu/status").ok();
    let capabilities = &status["capabilities"];
    assert_eq!(capabilities["hasGpu"], !ns_llm::gpus().is_empty());
    assert_eq!(capabilities["providers"].as_array().and_then(|all| all.last()), Some(&json!("cpu")));
    assert!(capabilities["totalVram"].is_u64() && status["cpuInfo"]["cores"].as_u64().is_some_and(|cores| cores > 0));
    assert_eq!(running.post("/api/gpu/can-handle", &json!({ "requiredVram": 1 })).ok()["capable"], true);
    assert_eq!(running.post("/api/gpu/can-handle", &json!({ "requiredVram": 1e12 })).ok()["capable"], false);
    assert!(running.get("/api/gpu/utilization?minutes=5").ok()["trend"].is_string());
    assert_eq!(running.get("/api/gpu/metadata").ok()["gpu"]["available"], capabilities["hasGpu"]);
    assert_eq!(running.get("/api/gpu/peers").ok(), json!({ "peers": [], "count": 0 }));
}
