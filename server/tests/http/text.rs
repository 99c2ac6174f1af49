//! `/tokenize`, `/detokenize` and `/v1/models`.

use ns_llm_server::options::MAX_DETOKENIZE_IDS;
use serde_json::json;

use crate::client::Running;

/// Text becomes the engine's ids and comes back as itself, in both servers' names.
#[test]
fn text_becomes_tokens_and_back() {
    let running = Running::start();
    let text = "Once upon a time, 猫 🦊";
    let ids = running.engine.tokenize(text, false).expect("ids");
    for name in ["prompt", "content"] {
        let answer = running.post("/tokenize", &json!({ name: text, "add_special_tokens": false })).ok();
        assert_eq!((&answer["tokens"], &answer["count"]), (&json!(ids), &json!(ids.len())));
    }
    let back = running.post("/detokenize", &json!({ "tokens": ids })).ok();
    assert_eq!((&back["prompt"], &back["content"]), (&json!(text), &json!(text)));
    let outside = running.post("/detokenize", &json!({ "tokens": [1, 4_000_000] }));
    assert_eq!((outside.status, &outside.json()["error"]["param"]), (400, &json!("tokens")));
    // Refused by their number, before anybody looks at them: the last one is no token.
    let mut many = vec![1; MAX_DETOKENIZE_IDS];
    many.push(4_000_000);
    let refused = running.post("/detokenize", &json!({ "tokens": many }));
    let message = &refused.json()["error"]["message"];
    assert!(refused.status == 400 && message.as_str().is_some_and(|text| text.contains("at most")), "{message}");
}

/// Models are listed by name and found by any of their names.
#[test]
fn models_are_listed() {
    let running = Running::start();
    let list = running.get("/v1/models").ok();
    assert_eq!(
        (&list["object"], &list["data"][0]["id"], &list["data"][0]["object"]),
        (&json!("list"), &json!("demo"), &json!("model"))
    );
    assert_eq!(running.get("/v1/models/llama3.2").ok()["id"], "demo");
    let unknown = running.get("/v1/models/some/other");
    assert_eq!((unknown.status, &unknown.json()["error"]["code"]), (404, &json!("model_not_found")));
}
