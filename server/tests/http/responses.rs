//! `/v1/responses`: made, streamed, asked for again, continued, cancelled, deleted; by its owner alone.

use std::io::{BufRead, BufReader, Write};

use ns_llm::{Message, Request};
use ns_llm_server::{ApiKey, ServerOptions};
use serde_json::{Value, json};

use crate::client::{Answer, Running, request};

fn events(answer: &Answer) -> Vec<Value> {
    assert_eq!((answer.status, answer.header("content-type")), (200, Some("text/event-stream")), "{answer:?}");
    let frames = answer.body.trim_end().split("\n\n").enumerate();
    let event = |(number, frame): (usize, &str)| {
        let (name, data) = frame.split_once('\n').expect("a name and data");
        let data: Value = serde_json::from_str(data.strip_prefix("data: ").expect("data")).expect("JSON");
        assert_eq!(name.strip_prefix("event: "), data["type"].as_str(), "{frame}");
        assert_eq!(data["sequence_number"], number);
        data
    };
    frames.map(event).collect()
}

fn text(response: &Value) -> &str {
    response["output"][0]["content"][0]["text"].as_str().expect("a text")
}

/// The object is the engine's answer; it is found again, continued with all that was said, and deleted.
#[test]
fn responses_are_kept_and_continued() {
    let running = Running::start();
    let ask = json!({ "model": "demo", "input": "Tell me of a fox.", "temperature": 0, "max_output_tokens": 4 });
    let first = running.post("/v1/responses", &ask).ok();
    let own = running
        .engine
        .complete(Request::chat([Message::new("user", "Tell me of a fox.")]).max_tokens(4).temperature(0.0));
    let own = own.expect("it answers");
    assert_eq!((text(&first), &first["object"]), (own.choices[0].text.as_str(), &json!("response")));
    assert_eq!(
        (&first["status"], &first["incomplete_details"]["reason"]),
        (&json!("incomplete"), &json!("max_output_tokens"))
    );
    assert_eq!(first["usage"]["output_tokens"], 4);
    let id = first["id"].as_str().expect("an id");
    let path = format!("/v1/responses/{id}");
    assert_eq!(running.get(&path).ok(), first);
    let next = json!({ "input": [{ "role": "user", "content": [{ "type": "input_text", "text": "And then?" }] }],
                       "previous_response_id": id, "temperature": 0, "max_output_tokens": 4, "instructions": "Be kind." });
    let second = running.post("/v1/responses", &next).ok();
    let said =
        [("system", "Be kind."), ("user", "Tell me of a fox."), ("assistant", text(&first)), ("user", "And then?")];
    let messages: Vec<Message> = said.into_iter().map(|(role, text)| Message::new(role, text)).collect();
    let own = running.engine.complete(Request::chat(messages).max_tokens(4).temperature(0.0)).expect("it answers");
    assert_eq!(text(&second), own.choices[0].text);
    assert_eq!(running.send("DELETE", &path, &[], "").ok()["deleted"], true);
    assert_eq!(running.get(&path).status, 404);
    let unkept = running.post("/v1/responses", &json!({ "input": "A", "store": false, "max_output_tokens": 1 })).ok();
    assert_eq!(running.get(&format!("/v1/responses/{}", unkept["id"].as_str().expect("an id"))).status, 404);
}

/// Events come in their order, with names and numbers, and their deltas join to the text that is kept.
#[test]
fn events_join_to_the_response() {
    let running = Running::start();
    let ask =
        json!({ "input": "Tell me of a fox.", "stream": true, "max_output_tokens": 4, "seed": 1, "temperature": 0.9 });
    let events = events(&running.post("/v1/responses", &ask));
    let names: Vec<&str> = events.iter().map(|event| event["type"].as_str().expect("a name")).collect();
    let begin =
        ["response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"];
    let end =
        ["response.output_text.done", "response.content_part.done", "response.output_item.done", "response.incomplete"];
    assert_eq!((&names[..4], &names[names.len() - 4..]), (&begin[..], &end[..]));
    assert!(names[4..names.len() - 4].iter().all(|name| *name == "response.output_text.delta"));
    let joined: String = events.iter().filter_map(|event| event["delta"].as_str()).collect();
    let response = &events[events.len() - 1]["response"];
    assert_eq!(joined, text(response));
    assert_eq!(&running.get(&format!("/v1/responses/{}", response["id"].as_str().expect("an id"))).ok(), response);
}

/// One that is growing is found by its id and ended from another connection; its own stream says so.
#[test]
fn a_growing_response_is_cancelled() {
    let running = Running::start();
    let ask = json!({ "input": "Tell me of a fox.", "stream": true, "ignore_eos": true });
    let mut stream = running.connect();
    stream.write_all(request("POST", "/v1/responses", &[], &ask.to_string()).as_bytes()).expect("sent");
    let mut lines = BufReader::new(stream).lines().map(|line| line.expect("a line"));
    let created = lines.find_map(|line| line.strip_prefix("data: ").map(str::to_string)).expect("an event");
    let created: Value = serde_json::from_str(&created).expect("JSON");
    let path = format!("/v1/responses/{}", created["response"]["id"].as_str().expect("an id"));
    assert_eq!(running.get(&path).ok()["status"], "in_progress");
    let cancelled = running.post(&format!("{path}/cancel"), &json!({})).ok();
    assert_eq!(cancelled["status"], "cancelled");
    assert!(lines.any(|line| line == "event: response.failed"));
    assert_eq!(running.idle_stats().requests_cancelled, 1);
    assert_eq!(running.get(&path).ok()["status"], "cancelled");
    assert_eq!(running.post(&format!("{path}/cancel"), &json!({})).ok()["status"], "cancelled", "twice is once");
}

/// One that is deleted while it grows is ended, and does not come back at its end.
#[test]
fn a_deleted_response_stays_deleted() {
    let running = Running::start();
    let ask = json!({ "input": "Tell me of a fox.", "stream": true, "ignore_eos": true });
    let mut stream = running.connect();
    stream.write_all(request("POST", "/v1/responses", &[], &ask.to_string()).as_bytes()).expect("sent");
    let mut lines = BufReader::new(stream).lines().map(|line| line.expect("a line"));
    let created = lines.find_map(|line| line.strip_prefix("data: ").map(str::to_string)).expect("an event");
    let created: Value = serde_json::from_str(&created).expect("JSON");
    let path = format!("/v1/responses/{}", created["response"]["id"].as_str().expect("an id"));
    assert_eq!(running.send("DELETE", &path, &[], "").ok()["deleted"], true);
    assert!(lines.any(|line| line == "event: response.failed"), "its stream is told");
    assert_eq!(running.idle_stats().requests_cancelled, 1);
    assert_eq!(running.get(&path).status, 404);
}

/// What is kept with a response has OpenAI's limits, and comes back as it was given.
#[test]
fn what_is_kept_is_bounded() {
    let running = Running::start();
    let ask = |name: &str, value: Value| {
        running.post("/v1/responses", &json!({ "input": "A", "max_output_tokens": 1, name: value }))
    };
    let pairs = |n: usize| Value::Object((0..n).map(|idx| (format!("key {idx}"), json!("x"))).collect());
    assert_eq!(ask("metadata", pairs(16)).ok()["metadata"], pairs(16));
    assert_eq!(ask("metadata", json!({ "k".repeat(64): "é".repeat(512) })).status, 200);
    assert_eq!(ask("user", json!("somebody")).ok()["user"], "somebody");
    for (name, value) in [
        ("metadata", pairs(17)),
        ("metadata", json!({ "k".repeat(65): "x" })),
        ("metadata", json!({ "k": "x".repeat(513) })),
        ("metadata", json!({ "k": 1 })),
        ("metadata", json!("x")),
        ("user", json!("x".repeat(513))),
        ("user", json!({})),
    ] {
        let answer = ask(name, value.clone());
        assert_eq!((answer.status, &answer.json()["error"]["param"]), (400, &json!(name)), "{value}");
    }
}

/// Another key finds nothing of it; what cannot be followed is refused by name.
#[test]
fn responses_belong_to_their_keys() {
    let secrets = ["the-secret-of-the-first", "the-secret-of-the-other"];
    let keys = secrets.map(|secret| ApiKey::unnamed(secret).expect("valid")).to_vec();
    let running = Running::with(ServerOptions { api_keys: keys, ..ServerOptions::default() });
    let send = |who: usize, method: &str, path: &str, body: &str| {
        running.send(method, path, &[&format!("Authorization: Bearer {}", secrets[who])], body)
    };
    let made = send(0, "POST", "/v1/responses", r#"{"input": "A", "max_output_tokens": 1}"#).ok();
    let path = format!("/v1/responses/{}", made["id"].as_str().expect("an id"));
    assert_eq!((send(0, "GET", &path, "").status, send(1, "GET", &path, "").status), (200, 404));
    assert_eq!(send(1, "DELETE", &path, "").status, 404);
    assert_eq!(send(1, "POST", &format!("{path}/cancel"), "{}").status, 404);
    let continued = json!({ "input": "B", "previous_response_id": made["id"] }).to_string();
    assert_eq!(send(1, "POST", "/v1/responses", &continued).status, 404);
    for (name, value) in [
        ("tools", json!([{ "type": "web_search" }])),
        ("background", json!(true)),
        ("text", json!({ "format": { "type": "json_schema" } })),
        ("reasoning", json!({ "effort": "high" })),
        ("truncation", json!("auto")),
    ] {
        let answer = send(0, "POST", "/v1/responses", &json!({ "input": "A", name: value }).to_string());
        assert_eq!((answer.status, &answer.json()["error"]["param"]), (400, &json!(name)), "{}", answer.body);
    }
}
