//! `/v1/embeddings`: the engine's vectors, as numbers and as base64.

use ns_llm::EmbeddingRequest;
use serde_json::{Value, json};

use crate::client::Running;

/// Texts and token ids give the engine's vectors, one per input in order, with their tokens counted.
#[test]
fn vectors_are_the_engines_own() {
    let running = Running::start();
    let inputs = ["a red fox", "a quick brown fox"];
    let own = running.engine.embed(EmbeddingRequest::new(inputs)).expect("vectors");
    let answer = running.post("/v1/embeddings", &json!({ "model": "demo", "input": inputs })).ok();
    assert_eq!((&answer["object"], &answer["model"]), (&json!("list"), &json!("demo")));
    assert_eq!(answer["usage"]["prompt_tokens"], own.summary.usage.prompt_tokens);
    let numbers =
        |object: &Value| -> Vec<f32> { serde_json::from_value(object["embedding"].clone()).expect("numbers") };
    for (idx, embedding) in own.embeddings.iter().enumerate() {
        let object = &answer["data"][idx];
        assert_eq!((&object["object"], &object["index"]), (&json!("embedding"), &json!(idx)));
        assert_eq!(numbers(object), embedding.values, "every bit survives JSON");
    }
    let ids = running.engine.tokenize(inputs[0], true).expect("ids");
    let short = running.post("/v1/embeddings", &json!({ "input": ids, "dimensions": 8 })).ok();
    assert_eq!(numbers(&short["data"][0]).len(), 8);
    let base64 = running.post("/v1/embeddings", &json!({ "input": inputs[0], "encoding_format": "base64" })).ok();
    let text = base64["data"][0]["embedding"].as_str().expect("a text");
    assert_eq!(text.len(), (own.embeddings[0].values.len() * 4).div_ceil(3) * 4);
}

/// An input that is too long is refused, not cut.
#[test]
fn long_inputs_are_refused() {
    let running = Running::start();
    let answer = running.post("/v1/embeddings", &json!({ "input": "word ".repeat(3_000) }));
    assert_eq!((answer.status, &answer.json()["error"]["code"]), (400, &json!("prompt_too_long")));
}
