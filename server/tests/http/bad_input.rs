//! Bad requests: each is refused with OpenAI's error object, its own status and the name of what is wrong, before any work.

use serde_json::{Value, json};

use crate::client::Running;

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";
const VECTORS: &str = "/v1/embeddings";

fn message() -> Value {
    json!([{ "role": "user", "content": "Hi" }])
}

/// Field by field: status, code and parameter.
#[test]
fn each_fault_is_named() {
    let running = Running::start();
    let chat = |name: &str, value: Value| (CHAT, json!({ "messages": message(), name: value }));
    let invalid = [
        (chat("temperature", json!(-1)), "temperature"),
        (chat("temperature", json!("hot")), "temperature"),
        (chat("temperature", json!(1e300)), "temperature"),
        (chat("top_p", json!(0)), "top_p"),
        (chat("top_p", json!(1.5)), "top_p"),
        (chat("top_k", json!(-2)), "top_k"),
        (chat("min_p", json!(2)), "min_p"),
        (chat("repetition_penalty", json!(0)), "repetition_penalty"),
        (chat("presence_penalty", json!(3)), "presence_penalty"),
        (chat("frequency_penalty", json!(-3)), "frequency_penalty"),
        (chat("n", json!(0)), "n"),
        (chat("n", json!(9)), "n"),
        (chat("n", json!(1.5)), "n"),
        (chat("max_tokens", json!(-5)), "max_tokens"),
        (chat("max_tokens", json!(10_000_000)), "max_tokens"),
        (chat("max_completion_tokens", json!(10_000_000)), "max_completion_tokens"),
        (chat("stop", json!(7)), "stop"),
        (chat("stop", json!([""])), "stop"),
        (chat("stop", json!(["x", 3])), "stop[1]"),
        (chat("stop", json!(vec!["x"; 17])), "stop"),
        (chat("seed", json!("seven")), "seed"),
        (chat("logit_bias", json!([1])), "logit_bias"),
        (chat("logit_bias", json!({ "x": 1 })), "logit_bias"),
        (chat("logit_bias", json!({ "1": 101 })), "logit_bias"),
        (chat("logit_bias", json!({ "4000000": 1 })), "logit_bias"),
        (chat("logprobs", json!(5)), "logprobs"),
        (chat("top_logprobs", json!(5)), "top_logprobs"),
        ((CHAT, json!({ "messages": message(), "logprobs": true, "top_logprobs": 21 })), "top_logprobs"),
        (chat("stream", json!("yes")), "stream"),
        (chat("stream_options", json!({ "include_usage": true })), "stream_options"),
        (chat("priority", json!("urgent")), "priority"),
        (chat("timeout_ms", json!(0)), "timeout_ms"),
        (chat("cache_salt", json!("x".repeat(300))), "cache_salt"),
        (chat("stop_token_ids", json!([4_000_000])), "stop_token_ids"),
        (chat("messages", json!([])), "messages"),
        (chat("messages", json!("Hi")), "messages"),
        ((CHAT, json!({})), "messages"),
        ((CHAT, json!([])), "body"),
        ((TEXT, json!({})), "prompt"),
        ((TEXT, json!({ "prompt": [] })), "prompt"),
        ((TEXT, json!({ "prompt": ["a", 1] })), "prompt[1]"),
        ((TEXT, json!({ "prompt": [1, "a"] })), "prompt[1]"),
        ((TEXT, json!({ "prompt": [4_000_000] })), "prompt"),
        ((TEXT, json!({ "prompt": "a", "logprobs": 21 })), "logprobs"),
        ((TEXT, json!({ "prompt": vec!["a"; 65] })), "prompt"),
        ((VECTORS, json!({})), "input"),
        ((VECTORS, json!({ "input": [] })), "input"),
        ((VECTORS, json!({ "input": 5 })), "input"),
        ((VECTORS, json!({ "input": "a", "dimensions": 0 })), "dimensions"),
        ((VECTORS, json!({ "input": "a", "dimensions": 100_000 })), "dimensions"),
        ((VECTORS, json!({ "input": "a", "encoding_format": "hex" })), "encoding_format"),
        (("/tokenize", json!({})), "prompt"),
        (("/detokenize", json!({ "tokens": "x" })), "tokens"),
    ];
    for ((path, body), param) in invalid {
        let answer = running.post(path, &body);
        assert_eq!(answer.status, 400, "{path} {body}: {}", answer.body);
        let error = &answer.json()["error"];
        assert_eq!((&error["param"], &error["code"]), (&json!(param), &json!("invalid_argument")), "{path} {body}");
        assert_eq!(error["type"], "invalid_request_error");
        assert!(error["message"].as_str().is_some_and(|text| text.starts_with(param)), "{error}");
    }
    assert_eq!(running.engine.stats().requests_total, 0, "nothing was computed");
}

/// What is not there yet is refused by name, where ignoring it would give another answer.
#[test]
fn what_is_missing_is_said() {
    let running = Running::start();
    let chat = |name: &str, value: Value| (CHAT, json!({ "messages": message(), name: value }));
    let cases = [
        (chat("tools", json!([{ "type": "function", "function": { "name": "f" } }])), "tools"),
        (chat("tool_choice", json!("required")), "tool_choice"),
        (chat("response_format", json!({ "type": "json_object" })), "response_format"),
        (chat("response_format", json!({ "type": "json_schema", "json_schema": {} })), "response_format"),
        (chat("functions", json!([{}])), "functions"),
        (chat("modalities", json!(["audio"])), "modalities"),
        (chat("guided_json", json!({})), "guided_json"),
        (chat("messages", json!([{ "role": "tool", "content": "x", "tool_call_id": "1" }])), "messages[0].role"),
        ((TEXT, json!({ "prompt": "a", "echo": true })), "echo"),
        ((TEXT, json!({ "prompt": "a", "suffix": "b" })), "suffix"),
        ((TEXT, json!({ "prompt": "a", "best_of": 3 })), "best_of"),
    ];
    for ((path, body), param) in cases {
        let answer = running.post(path, &body);
        let error = &answer.json()["error"];
        assert_eq!(
            (answer.status, &error["param"], &error["code"]),
            (400, &json!(param), &json!("not_supported")),
            "{body}"
        );
    }
}

/// Bodies that are no JSON objects, models that are not there, routes and methods that do not exist.
#[test]
fn other_faults_have_their_statuses() {
    let running = Running::start();
    for body in ["{", "nonsense", "\"text\"", "{\"a\": 1} x", "\u{0}"] {
        let answer = running.send("POST", CHAT, &[], body);
        assert_eq!((answer.status, &answer.json()["error"]["param"]), (400, &json!("body")), "{body}");
    }
    let deep = format!("{{\"messages\": {}{}}}", "[".repeat(100_000), "]".repeat(100_000));
    assert!(
        running.send("POST", CHAT, &[], &deep).json()["error"]["message"].as_str().is_some_and(|m| m.contains("64"))
    );
    let code = |answer: crate::client::Answer| (answer.status, answer.json()["error"]["code"].clone());
    let other_model = json!({ "model": "gpt-4", "messages": message() });
    assert_eq!(code(running.post(CHAT, &other_model)), (404, json!("model_not_found")));
    assert_eq!(code(running.get("/v2/nothing")), (404, json!("unknown_route")));
    assert_eq!(code(running.get(CHAT)), (405, json!("method_not_allowed")));
    assert_eq!(
        code(running.send("POST", CHAT, &["Content-Encoding: gzip"], "{}")),
        (415, json!("encoding_not_supported"))
    );
}

/// No error repeats a path, an address, or the place in the source that made it.
#[test]
fn errors_name_no_internals() {
    let running = Running::start();
    let bodies = [
        json!({ "messages": "x" }),
        json!({ "messages": [{ "role": "user", "content": "y".repeat(100_000) }] }),
        json!({ "model": "../../etc/passwd", "messages": message() }),
        json!({ "messages": message(), "temperature": [] }),
    ];
    for body in bodies {
        let answer = running.post(CHAT, &body);
        assert!(answer.status >= 400, "{}", answer.body);
        for sign in [".rs", "/home", "/root", "src/", "0x", "panicked", "127.0.0.1"] {
            assert!(!answer.body.contains(sign), "{sign}: {}", answer.body);
        }
        assert!(answer.body.len() < 600, "{}", answer.body);
    }
}
