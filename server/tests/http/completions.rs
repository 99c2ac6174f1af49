//! `/v1/completions`: prompts of all forms, continued, whole and in chunks.

use ns_llm::Request;
use serde_json::{Value, json};

use crate::client::Running;

fn texts(object: &Value) -> Vec<&str> {
    let choices = object["choices"].as_array().expect("choices");
    assert!(choices.iter().enumerate().all(|(idx, choice)| choice["index"] == idx));
    choices.iter().map(|choice| choice["text"].as_str().expect("a text")).collect()
}

/// Each form of a prompt gives the engine's own continuation; several prompts give their choices in order.
#[test]
fn prompts_of_all_forms_are_continued() {
    let running = Running::start();
    let prompts = ["Once upon a time", "The little dog"];
    let own: Vec<String> = prompts
        .iter()
        .map(|prompt| running.engine.complete(Request::prompt(*prompt).max_tokens(12).temperature(0.0)).expect("text"))
        .map(|completion| completion.choices[0].text.clone())
        .collect();
    let ids: Vec<Vec<u32>> = prompts.iter().map(|prompt| running.engine.tokenize(prompt, true).expect("ids")).collect();
    let ask = |prompt: Value| {
        let body = json!({ "model": "demo", "prompt": prompt, "max_tokens": 12, "temperature": 0 });
        running.post("/v1/completions", &body).ok()
    };
    let one = ask(json!(prompts[0]));
    assert_eq!((texts(&one), &one["object"]), (vec![own[0].as_str()], &json!("text_completion")));
    assert_eq!(texts(&ask(json!(ids[0]))), [own[0].as_str()]);
    let both = ask(json!(prompts));
    assert_eq!(texts(&both), own.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(both["usage"]["completion_tokens"], 24);
    assert_eq!(texts(&ask(json!(ids))), texts(&both));
    // Without a limit there are sixteen tokens.
    let default = running.post("/v1/completions", &json!({ "prompt": prompts[0], "ignore_eos": true })).ok();
    assert_eq!(default["usage"]["completion_tokens"], 16);
}

/// Chunks of several prompts and choices are told apart by index and join to the answer in one piece.
#[test]
fn chunks_join_to_the_answers() {
    let running = Running::start();
    let mut body =
        json!({ "prompt": ["A", "B"], "n": 2, "max_tokens": 10, "temperature": 0.9, "seed": -3, "logprobs": 1 });
    let whole = running.post("/v1/completions", &body).ok();
    assert_eq!(texts(&whole).len(), 4);
    (body["stream"], body["stream_options"]) = (json!(true), json!({ "include_usage": true }));
    let chunks = running.post("/v1/completions", &body).chunks();
    assert_eq!(chunks.last().expect("chunks")["usage"]["total_tokens"], whole["usage"]["total_tokens"]);
    for (idx, text) in texts(&whole).iter().enumerate() {
        let of_choice = || chunks.iter().map(|chunk| &chunk["choices"][0]).filter(|choice| choice["index"] == idx);
        assert_eq!(of_choice().filter_map(|choice| choice["text"].as_str()).collect::<String>(), *text);
        let list = |name: &str| {
            let lists = of_choice().filter_map(|choice| choice["logprobs"][name].as_array());
            Value::from(lists.flatten().cloned().collect::<Vec<_>>())
        };
        let logprobs = &whole["choices"][idx]["logprobs"];
        for name in ["tokens", "token_logprobs", "text_offset"] {
            assert_eq!(&list(name), &logprobs[name], "{name}");
        }
        assert_eq!(logprobs["tokens"].as_array().map(Vec::len), Some(10));
    }
}
