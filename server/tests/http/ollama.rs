//! Ollama's routes: lines of JSON that its clients read, and the engine's own answers in them.

use ns_llm::{EmbeddingRequest, Message, Request};
use ns_llm_server::{ApiKey, ServerOptions};
use serde_json::{Value, json};

use crate::client::{Answer, Running};

fn lines(answer: &Answer) -> Vec<Value> {
    assert_eq!((answer.status, answer.header("content-type")), (200, Some("application/x-ndjson")), "{answer:?}");
    assert!(answer.body.ends_with('\n'));
    answer.body.lines().map(|line| serde_json::from_str(line).expect("a line of JSON")).collect()
}

/// Every name of a model is listed with a tag, so that a caller who looks for one finds it.
#[test]
fn names_are_listed() {
    let running = Running::start();
    let tags = running.get("/api/tags").ok();
    let names: Vec<&str> =
        tags["models"].as_array().expect("a list").iter().filter_map(|it| it["name"].as_str()).collect();
    assert_eq!(names, ["demo:latest", "llama3.2:latest"]);
    assert_eq!(tags["models"][0]["details"]["family"], "qwen3");
    let digest = |idx: usize| tags["models"][idx]["digest"].as_str().expect("a digest");
    assert!(digest(0).len() == 64 && digest(0).bytes().all(|byte| byte.is_ascii_hexdigit()) && digest(0) != digest(1));
    assert!(running.get("/api/version").ok()["version"].is_string());
}

/// What Ollama's command line asks for before it says anything: whether somebody is there, with a page or without and before it
/// has a key, what the model is by either name of the field, and what is loaded.
#[test]
fn a_command_line_finds_its_way() {
    let key = ApiKey::new("one", "the-secret-of-the-first").expect("valid");
    for (page, length) in [(true, 1_000), (false, 1)] {
        let running = Running::with(ServerOptions { page, api_keys: vec![key.clone()], ..ServerOptions::default() });
        let (head, get) = (running.send("HEAD", "/", &[], ""), running.get("/"));
        assert_eq!((head.status, head.body.as_str(), get.status), (200, "", 200));
        assert!(get.body.len() >= length, "{}", get.body);
    }
    let running = Running::start();
    for name in ["model", "name"] {
        let shown = running.post("/api/show", &json!({ name: "llama3.2" })).ok();
        assert_eq!(shown["model_info"]["general.architecture"], "qwen3");
        assert_eq!(shown["capabilities"], json!(["completion", "embedding"]));
        assert_eq!(running.post("/api/show", &json!({ name: "other" })).status, 404);
    }
    let loaded = &running.get("/api/ps").ok()["models"][0];
    let context_tokens = running.engine.info().context_tokens;
    assert_eq!((&loaded["name"], &loaded["size_vram"]), (&json!("demo:latest"), &json!(0)));
    assert_eq!(loaded["context_length"], context_tokens);
    assert!(loaded["size"].as_u64().is_some_and(|bytes| bytes > 1 << 20) && loaded["expires_at"].is_string());
}

/// Both kinds of answers are the engine's, streamed by default, and in one piece when asked for.
#[test]
fn answers_are_the_engines_own() {
    let running = Running::start();
    let own = |request: Request| {
        running.engine.complete(request.max_tokens(5).temperature(0.0)).expect("it answers").choices[0].text.clone()
    };
    let options = json!({ "temperature": 0, "num_predict": 5 });
    let asked = own(Request::chat([Message::new("user", "A fox")]));
    let chat = json!({ "model": "llama3.2", "messages": [{ "role": "user", "content": "A fox" }], "options": options });
    let streamed = lines(&running.post("/api/chat", &chat));
    let (last, pieces) = streamed.split_last().expect("lines");
    assert_eq!(pieces.iter().filter_map(|line| line["message"]["content"].as_str()).collect::<String>(), asked);
    assert!(pieces.iter().all(|line| line["done"] == false && line["model"] == "llama3.2"));
    assert_eq!((&last["done"], &last["done_reason"], &last["eval_count"]), (&json!(true), &json!("length"), &json!(5)));
    assert!(last["total_duration"].as_u64().is_some_and(|nanos| nanos > 0));
    let whole = |path: &str, mut body: Value| {
        body["stream"] = json!(false);
        running.post(path, &body).ok()
    };
    let in_one = whole("/api/chat", chat);
    assert_eq!((&in_one["message"]["content"], &in_one["done"]), (&json!(asked), &json!(true)));
    let generate = json!({ "model": "demo", "prompt": "A fox", "options": options });
    assert_eq!(whole("/api/generate", generate.clone())["response"], asked);
    let streamed = lines(&running.post("/api/generate", &generate));
    assert_eq!(streamed.iter().filter_map(|line| line["response"].as_str()).collect::<String>(), asked);
    let raw = json!({ "prompt": "A fox", "raw": true, "options": options });
    assert_eq!(whole("/api/generate", raw)["response"], own(Request::prompt("A fox")));
    assert_eq!(running.post("/api/generate", &json!({ "model": "demo" })).ok()["done_reason"], "load");
    for body in [json!({ "model": "demo", "messages": [] }), json!({ "model": "demo", "keep_alive": "5m" })] {
        let loaded = running.post("/api/chat", &body).ok();
        assert_eq!((&loaded["done_reason"], &loaded["message"]["content"]), (&json!("load"), &json!("")));
    }
}

/// Both forms of vectors.
#[test]
fn vectors_are_the_engines_own() {
    let running = Running::start();
    let own = running.engine.embed(EmbeddingRequest::new(["a fox", "a hare"])).expect("vectors");
    let vector = |value: &Value| -> Vec<f32> { serde_json::from_value(value.clone()).expect("numbers") };
    let embed = running.post("/api/embed", &json!({ "model": "llama3.2", "input": ["a fox", "a hare"] })).ok();
    for (idx, embedding) in own.embeddings.iter().enumerate() {
        assert_eq!(vector(&embed["embeddings"][idx]), embedding.values);
    }
    let older = running.post("/api/embeddings", &json!({ "model": "llama3.2:latest", "prompt": "a fox" })).ok();
    assert_eq!(vector(&older["embedding"]), own.embeddings[0].values);
}

/// Errors are texts, as Ollama's are; what is missing is said by name.
#[test]
fn errors_are_texts() {
    let running = Running::start();
    let message = json!([{ "role": "user", "content": "Hi" }]);
    for (path, body, status, word) in [
        ("/api/chat", json!({ "model": "other", "messages": message }), 404, "other"),
        ("/api/chat", json!({ "messages": "Hi" }), 400, "messages"),
        ("/api/chat", json!({ "messages": message, "format": "json" }), 400, "format"),
        ("/api/chat", json!({ "messages": message, "tools": [{}] }), 400, "tools"),
        ("/api/chat", json!({ "messages": message, "options": { "temperature": "hot" } }), 400, "options.temperature"),
        ("/api/generate", json!({ "prompt": "x", "images": ["aaaa"] }), 400, "images"),
        ("/api/generate", json!({ "prompt": "x", "options": { "num_predict": 100_000_000 } }), 400, "num_predict"),
        ("/api/embeddings", json!({}), 400, "prompt"),
        ("/api/nothing", json!({}), 404, "route"),
    ] {
        let answer = running.post(path, &body);
        assert_eq!(answer.status, status, "{path} {body}: {}", answer.body);
        let json = answer.json();
        let text = json["error"].as_str().or(json["error"]["message"].as_str()).expect("a text");
        assert!(text.contains(word), "{text}");
    }
}
