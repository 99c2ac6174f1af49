//! The page at `/`, and what it and those who choose between servers are told: its files need no key and allow little; where a
//! prompt was found; which prompts a server has answered.

use ns_llm::{Message, Prompt};
use ns_llm_server::{ApiKey, ServerOptions, prefix_affinity};
use serde_json::{Value, json};

use crate::client::Running;

const SECRET: &str = "the-first-secret-of-all";
const OTHER: &str = "another-secret-of-ours";

/// Its files are given to everybody under a policy that lets nothing in, once; nothing beside them is, and all of it can be left
/// out.
#[test]
fn the_page_is_open_and_strict() {
    let api_keys = vec![ApiKey::new("one", SECRET).expect("valid")];
    let running = Running::with(ServerOptions { api_keys: api_keys.clone(), ..ServerOptions::default() });
    for (path, content_type) in
        [("/", "text/html"), ("/page/main.mjs", "text/javascript"), ("/page/page.css", "text/css")]
    {
        let answer = running.get(path);
        assert_eq!(answer.status, 200, "{path}");
        assert!(answer.header("content-type").is_some_and(|value| value.starts_with(content_type)), "{path}");
        let policy = answer.header("content-security-policy").expect("a policy");
        assert!(policy.starts_with("default-src 'none'; ") && !policy.contains("unsafe"), "{policy}");
        assert_eq!(answer.header("x-content-type-options"), Some("nosniff"));
        let tag = format!("If-None-Match: {}", answer.header("etag").expect("a tag"));
        let again = running.send("GET", path, &[&tag], "");
        assert_eq!((again.status, again.body.as_str()), (304, ""), "{path}");
    }
    for (method, path) in [("POST", "/"), ("GET", "/page"), ("GET", "/page/"), ("GET", "/page/../v1/models")] {
        assert_eq!(running.send(method, path, &[], "").status, 401, "{method} {path}");
    }
    let foreign = running.send("GET", "/", &["Origin: https://elsewhere.example"], "");
    assert_eq!(foreign.status, 403);
    let without = Running::with(ServerOptions { api_keys, page: false, ..ServerOptions::default() });
    let (root, file) = (without.get("/"), without.get("/page/main.mjs"));
    assert_eq!((root.status, root.body.as_str(), file.status), (200, "ns-llm is running", 401));
}

/// An answer says where its prompt was found, and why the rest was not.
#[test]
fn where_a_prompt_was_found_is_told() {
    let running = Running::start();
    let ask = |text: &str| {
        let body = json!({ "model": "demo", "max_tokens": 2, "messages": [{ "role": "user", "content": text }] });
        running.post("/v1/chat/completions", &body).ok()["usage"]["prompt_tokens_details"].clone()
    };
    let long = "A fox and a crow sat by the river and spoke of the weather, of cheese, and of the king. ".repeat(3);
    let first = ask(&long);
    assert_eq!(first["prefix_miss"], json!({ "token": 0, "reason": "never_seen", "tier": null }));
    assert_eq!(first["cached_by_tier"], json!({ "pool": 0, "host": 0, "disk": 0, "remote": 0 }));
    let again = ask(&long);
    assert_eq!(again["prefix_miss"], Value::Null);
    assert!(again["cached_by_tier"]["pool"].as_u64().is_some_and(|tokens| tokens >= 32), "{again}");
    assert_eq!(again["cached_by_tier"]["pool"], again["cached_tokens"]);
}

/// A server names the prompts that it has answered as their clients do, and tells each key of its own.
#[test]
fn answered_prompts_are_told_to_their_owner() {
    let api_keys = vec![ApiKey::new("one", SECRET).expect("valid"), ApiKey::new("two", OTHER).expect("valid")];
    let running = Running::with(ServerOptions { api_keys, ..ServerOptions::default() });
    let key = |secret: &str| format!("Authorization: Bearer {secret}");
    let body = json!({ "model": "demo", "max_tokens": 1, "cache_salt": "s", "prompt": "Once upon a time" });
    assert_eq!(running.send("POST", "/v1/completions", &[&key(SECRET)], &body.to_string()).status, 200);
    let chat = json!({ "model": "demo", "max_tokens": 1, "messages": [{ "role": "developer", "content": [{ "type": "text", "text": "Hi" }] }] });
    assert_eq!(running.send("POST", "/v1/chat/completions", &[&key(SECRET)], &chat.to_string()).status, 200);
    let metadata = |secret: &str| running.send("GET", "/api/gpu/metadata", &[&key(secret)], "").ok();
    let text = prefix_affinity("demo", Some("s"), &Prompt::Text("Once upon a time".to_string()));
    let messages = prefix_affinity("demo", None, &Prompt::Chat(vec![Message::new("system", "Hi")]));
    let own = metadata(SECRET);
    assert_eq!(own["prefixes"], json!([messages, text]));
    assert_eq!(metadata(OTHER)["prefixes"], json!([]), "what others ask is not told");
    let model = &own["models"][0];
    let blocks = |name: &str| model["kvBlocks"][name].as_u64().expect("a count");
    assert_eq!((&model["name"], &model["device"], &own["accepting"]), (&json!("demo"), &json!("cpu"), &json!(true)));
    assert!(blocks("total") > 0 && blocks("used") + blocks("cached") + blocks("free") == blocks("total"), "{model}");
    assert_eq!((&own["queue"]["depth"], &own["queue"]["running"]), (&json!(0), &json!(0)));
}
