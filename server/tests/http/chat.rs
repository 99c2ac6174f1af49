//! `/v1/chat/completions`: the objects that OpenAI's clients parse, whole and in chunks, and the engine's own answer in them.

use ns_llm::{Message, Request};
use serde_json::{Value, json};

use crate::client::Running;

const MAX_TOKENS: usize = 24;
/// Longer than a block of the prefix cache.
const FOX: &str =
    "Tell me a story about a fox and a hare who lived in a wood by the river, and of what they ate in winter.";

fn body(extra: Value) -> Value {
    let mut body = json!({
        "model": "demo",
        "messages": [{ "role": "user", "content": FOX }],
        "max_tokens": MAX_TOKENS,
        "temperature": 0.8,
        "seed": 7,
    });
    for (name, value) in extra.as_object().expect("an object") {
        body[name] = value.clone();
    }
    body
}

fn text_of(chunks: &[Value], index: usize) -> String {
    let choices = chunks.iter().flat_map(|chunk| chunk["choices"].as_array().expect("choices"));
    let of_choice = choices.filter(|choice| choice["index"] == index);
    of_choice.filter_map(|choice| choice["delta"]["content"].as_str()).collect()
}

/// The answer in one piece is the engine's own, with OpenAI's names around it.
#[test]
fn an_answer_is_the_engines_own() {
    let running = Running::start();
    let answer = running.post("/v1/chat/completions", &body(json!({})));
    let request = Request::chat([Message::new("user", FOX)]);
    let own = running.engine.complete(request.max_tokens(MAX_TOKENS).temperature(0.8).seed(7)).expect("it answers");
    let object = answer.ok();
    assert_eq!(answer.header("content-type"), Some("application/json"));
    assert!(answer.header("x-request-id").is_some_and(|id| id.starts_with("req_")));
    assert!(object["id"].as_str().is_some_and(|id| id.starts_with("chatcmpl-")));
    assert_eq!((&object["object"], &object["model"]), (&json!("chat.completion"), &json!("demo")));
    assert!(object["created"].as_u64().is_some_and(|seconds| seconds > 1_600_000_000));
    assert!(
        object["system_fingerprint"]
            .as_str()
            .is_some_and(|print| print.starts_with("demo-") && print.contains("-cpu-"))
    );
    let choice = &object["choices"][0];
    assert_eq!(choice["message"], json!({ "role": "assistant", "content": own.choices[0].text, "refusal": null }));
    assert_eq!((&choice["index"], &choice["logprobs"]), (&json!(0), &Value::Null));
    assert_eq!(choice["finish_reason"], own.choices[0].finish_reason.as_str());
    let usage = own.summary.usage;
    assert_eq!(object["usage"]["prompt_tokens"], usage.prompt_tokens);
    assert_eq!(object["usage"]["completion_tokens"], usage.completion_tokens);
    assert_eq!(object["usage"]["total_tokens"], usage.prompt_tokens + usage.completion_tokens);
    assert_eq!(object["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    assert_eq!(object["timings"]["predicted_n"], usage.completion_tokens);
    // The prompt's full blocks were found by the second asking, and say so.
    let again = running.post("/v1/chat/completions", &body(json!({}))).ok();
    assert!(again["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().is_some_and(|cached| cached >= 16));
    assert_eq!(again["choices"], object["choices"]);
    let fresh = running.post("/v1/chat/completions", &body(json!({ "cache_prompt": false }))).ok();
    assert_eq!(fresh["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
}

/// Chunks begin with the role and end with the reason; joined they are the answer in one piece; usage comes last, alone
/// and only when asked for.
#[test]
fn chunks_join_to_the_answer() {
    let running = Running::start();
    let whole = running.post("/v1/chat/completions", &body(json!({}))).ok();
    let answer = running.post("/v1/chat/completions", &body(json!({ "stream": true })));
    assert_eq!(answer.header("cache-control"), Some("no-cache"));
    let chunks = answer.chunks();
    assert_eq!(text_of(&chunks, 0), whole["choices"][0]["message"]["content"].as_str().expect("text"));
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    assert!(chunks[1..].iter().all(|chunk| chunk["choices"][0]["delta"].get("role").is_none()));
    let last = &chunks[chunks.len() - 1];
    assert_eq!(last["choices"][0]["delta"], json!({}));
    assert_eq!(last["choices"][0]["finish_reason"], whole["choices"][0]["finish_reason"]);
    for chunk in &chunks {
        assert_eq!((&chunk["id"], &chunk["created"]), (&chunks[0]["id"], &chunks[0]["created"]));
        assert_eq!((&chunk["object"], chunk.get("usage")), (&json!("chat.completion.chunk"), None));
        assert_eq!(chunk["choices"].as_array().map(Vec::len), Some(1), "clients look at choices[0]");
    }
    let asked = json!({ "stream": true, "stream_options": { "include_usage": true } });
    let with_usage = running.post("/v1/chat/completions", &body(asked)).chunks();
    let (usage, before) = with_usage.split_last().expect("chunks");
    assert!(before.iter().all(|chunk| chunk["usage"].is_null() && chunk.get("usage").is_some()));
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"]["completion_tokens"], whole["usage"]["completion_tokens"]);
    assert_eq!(text_of(before, 0), text_of(&chunks, 0));
}

/// Choices are numbered, differ by their draws, and each has its own role and end, in chunks as in one piece.
#[test]
fn choices_are_told_apart() {
    let running = Running::start();
    let whole = running.post("/v1/chat/completions", &body(json!({ "n": 3 }))).ok();
    let texts: Vec<&str> =
        (0..3).map(|idx| whole["choices"][idx]["message"]["content"].as_str().expect("a text")).collect();
    assert!(texts[0] != texts[1] || texts[1] != texts[2], "three draws of one seed are three draws");
    let chunks = running.post("/v1/chat/completions", &body(json!({ "n": 3, "stream": true }))).chunks();
    for (idx, text) in texts.iter().enumerate() {
        assert_eq!(text_of(&chunks, idx), *text);
        let of_choice = || chunks.iter().map(|chunk| &chunk["choices"][0]).filter(|choice| choice["index"] == idx);
        assert_eq!(of_choice().filter(|choice| choice["delta"].get("role").is_some()).count(), 1);
        assert_eq!(of_choice().filter(|choice| !choice["finish_reason"].is_null()).count(), 1);
    }
}

/// Stop strings end an answer and are not in it; a bias decides the first token; penalties and truncation are followed.
#[test]
fn parameters_are_followed() {
    let running = Running::start();
    let whole = running.post("/v1/chat/completions", &body(json!({ "temperature": 0 }))).ok();
    let text = whole["choices"][0]["message"]["content"].as_str().expect("a text").to_string();
    let stop = text.split_whitespace().nth(3).expect("some words");
    for stops in [json!(stop), json!([stop, "never said"])] {
        let stopped = running.post("/v1/chat/completions", &body(json!({ "temperature": 0, "stop": stops }))).ok();
        let choice = &stopped["choices"][0];
        assert_eq!(
            (choice["message"]["content"].as_str(), &choice["finish_reason"]),
            (text.split(stop).next(), &json!("stop"))
        );
    }
    let ids = running.engine.tokenize(" zebra", false).expect("tokens");
    let biased = json!({ "temperature": 0, "logit_bias": { ids[0].to_string(): 100 }, "max_completion_tokens": 1 });
    let biased = running.post("/v1/chat/completions", &body(biased)).ok();
    let expected = running.engine.detokenize(&ids[..1]).expect("text");
    assert_eq!(biased["choices"][0]["message"]["content"], expected.as_str());
    assert_eq!(biased["usage"]["completion_tokens"], 1, "the newer name of the limit wins");
    // As many clients send them: null is absent, unknown names pass.
    let nulls = json!({ "temperature": 0, "tools": null, "stop": null, "user": "me", "some_new_field": { "a": 1 }, "tool_choice": "auto" });
    assert_eq!(running.post("/v1/chat/completions", &body(nulls)).ok()["choices"], whole["choices"]);
    let by_alias =
        running.post("/v1/chat/completions", &body(json!({ "model": "llama3.2:latest", "temperature": 0 }))).ok();
    assert_eq!((&by_alias["model"], &by_alias["choices"]), (&json!("demo"), &whole["choices"]));
}

/// Logprobs come with each token, best first, in chunks as in one piece.
#[test]
fn logprobs_are_reported() {
    let running = Running::start();
    let asked = json!({ "temperature": 0, "logprobs": true, "top_logprobs": 2, "max_tokens": 6 });
    let whole = running.post("/v1/chat/completions", &body(asked.clone())).ok();
    let content = whole["choices"][0]["logprobs"]["content"].as_array().expect("a list");
    assert_eq!(content.len(), 6);
    let mut bytes = Vec::new();
    for entry in content {
        assert!(entry["logprob"].as_f64().is_some_and(|logprob| logprob <= 0.0));
        assert_eq!(entry["top_logprobs"].as_array().map(Vec::len), Some(2));
        assert_eq!(entry["top_logprobs"][0]["token"], entry["token"], "greedy takes the best");
        bytes.extend(entry["bytes"].as_array().expect("bytes").iter().map(|byte| byte.as_u64().expect("a byte") as u8));
    }
    assert_eq!(
        String::from_utf8(bytes).as_deref(),
        Ok(whole["choices"][0]["message"]["content"].as_str().expect("text"))
    );
    let mut asked = asked;
    asked["stream"] = json!(true);
    let chunks = running.post("/v1/chat/completions", &body(asked)).chunks();
    let streamed = chunks.iter().filter_map(|chunk| chunk["choices"][0]["logprobs"]["content"].as_array()).flatten();
    assert_eq!(streamed.cloned().collect::<Vec<_>>(), *content);
}

/// A failure after the first chunk is an error object in the stream, which ends as a stream does.
#[test]
fn an_error_in_the_stream_is_told() {
    let running = Running::start();
    let asked = json!({ "stream": true, "ignore_eos": true, "max_tokens": 1_500, "timeout_ms": 400, "n": 8 });
    let answer = running.post("/v1/chat/completions", &body(asked));
    assert!(answer.body.ends_with("data: [DONE]\n\n") || answer.status == 408, "{}", answer.body);
    if answer.status == 200 {
        let chunks = answer.chunks();
        let error = &chunks[chunks.len() - 1]["error"];
        assert_eq!((&error["code"], &error["type"]), (&json!("deadline_exceeded"), &json!("server_error")));
        assert!(error["message"].as_str().is_some_and(|text| text.contains("ms")));
    }
    assert_eq!(running.idle_stats().requests_failed, 1);
}

/// What fails before the first chunk has its own status, also when a stream was asked for.
#[test]
fn an_early_error_has_a_status() {
    let running = Running::start();
    let long = "word ".repeat(4_000);
    let asked = json!({ "stream": true, "messages": [{ "role": "user", "content": long }] });
    let answer = running.post("/v1/chat/completions", &body(asked));
    assert_eq!((answer.status, &answer.json()["error"]["code"]), (400, &json!("prompt_too_long")));
}
