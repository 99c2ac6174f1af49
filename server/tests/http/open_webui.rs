//! What Open WebUI asks of a server, call by call, as its backend writes it with either kind of connection: each is answered
//! with what that backend reads of the answer.

use ns_llm_server::{ApiKey, ServerOptions};
use serde_json::{Value, json};

use crate::client::{Answer, Running};

const SECRET: &str = "a-secret-of-some-length";
/// Who is signed in travels with each call.
const HEADERS: [&str; 8] = [
    "Authorization: Bearer a-secret-of-some-length",
    "Accept: */*",
    "Accept-Encoding: gzip, deflate, br, zstd",
    "User-Agent: Python/3.11 aiohttp/3.12.15",
    "X-OpenWebUI-User-Name: Ada%20Lovelace",
    "X-OpenWebUI-User-Id: 6f1e6f3e-0f0a-4f3e-9d3a-2f6f0d4b1c11",
    "X-OpenWebUI-User-Email: ada@example.com",
    "X-OpenWebUI-User-Role: admin",
];

/// What is read of an answer: a JSON pointer that must lead to a value of this kind.
type Read = (&'static str, fn(&Value) -> bool);

struct Call {
    what: &'static str,
    method: &'static str,
    path: &'static str,
    body: Value,
    reads: &'static [Read],
}

fn call(what: &'static str, method: &'static str, path: &'static str, body: Value, reads: &'static [Read]) -> Call {
    Call { what, method, path, body, reads }
}

fn calls() -> Vec<Call> {
    let user = |content: &str| json!({ "role": "user", "content": content });
    let task = "### Task:\nGenerate a concise, 3-5 word title summarizing the chat history.\n### Output:\nJSON format: \
                { \"title\": \"your concise title here\" }\n### Chat History:\n<chat_history>\nUSER: A fox?\n</chat_history>";
    let history = json!([
        { "role": "system", "content": "You tell stories." }, user("Tell me of a fox."),
        { "role": "assistant", "content": "There was a fox." },
        { "role": "user", "content": [{ "type": "text", "text": "And of a hare." }] },
    ]);
    vec![
        // A connection of OpenAI's kind: its check and its list, a chat, and the tasks around it.
        call("list of models", "GET", "/v1/models", Value::Null, &[("/data/0/id", Value::is_string)]),
        call(
            "title",
            "POST",
            "/v1/chat/completions",
            json!({ "model": "demo", "messages": [user(task)], "stream": false, "max_completion_tokens": 12 }),
            &[("/choices/0/message/content", Value::is_string)],
        ),
        call(
            "tags, with the limit that older models get",
            "POST",
            "/v1/chat/completions",
            json!({ "model": "demo", "messages": [user(task)], "stream": false, "max_tokens": 12 }),
            &[("/choices/0/message/content", Value::is_string), ("/usage/total_tokens", Value::is_u64)],
        ),
        call(
            "an answer with every parameter of the side bar",
            "POST",
            "/v1/chat/completions",
            json!({ "model": "demo", "messages": history, "stream": false, "temperature": 0.8, "top_p": 0.9, "top_k": 40,
                    "min_p": 0.0, "frequency_penalty": 0.1, "presence_penalty": 0.1, "repeat_penalty": 1.1, "seed": 7,
                    "stop": ["###"], "logit_bias": { "5": -100 }, "max_tokens": 12, "chat_id": "local", "id": "x" }),
            &[("/choices/0/finish_reason", Value::is_string)],
        ),
        call(
            "vectors of a document",
            "POST",
            "/v1/embeddings",
            json!({ "input": ["A red fox.", "A hare."], "model": "demo" }),
            &[("/data/1/embedding/0", Value::is_number)],
        ),
        // A connection of Ollama's kind.
        call("version", "GET", "/api/version", Value::Null, &[("/version", Value::is_string)]),
        call(
            "list of models, Ollama's",
            "GET",
            "/api/tags",
            Value::Null,
            &[("/models/0/model", Value::is_string), ("/models/0/name", Value::is_string)],
        ),
        call("loaded models", "GET", "/api/ps", Value::Null, &[("/models/0/expires_at", Value::is_string)]),
        call(
            "a model's card",
            "POST",
            "/api/show",
            json!({ "model": "llama3.2" }),
            &[("/details/family", Value::is_string), ("/capabilities", Value::is_array)],
        ),
        call(
            "title, Ollama's",
            "POST",
            "/api/chat",
            json!({ "model": "llama3.2", "messages": [user(task)], "stream": false, "options": { "num_predict": 12 } }),
            &[("/message/content", Value::is_string), ("/eval_count", Value::is_u64)],
        ),
        call(
            "vectors, Ollama's",
            "POST",
            "/api/embed",
            json!({ "input": ["A red fox."], "model": "llama3.2", "truncate": true }),
            &[("/embeddings/0/0", Value::is_number)],
        ),
        call(
            "a raw completion",
            "POST",
            "/api/generate",
            json!({ "model": "llama3.2", "prompt": "A fox", "stream": false, "options": { "num_predict": 4 } }),
            &[("/response", Value::is_string), ("/done", Value::is_boolean)],
        ),
    ]
}

fn send(running: &Running, method: &str, path: &str, body: &Value) -> Answer {
    running.send(method, path, &HEADERS, &if body.is_null() { String::new() } else { body.to_string() })
}

/// Every call is answered, with what is read of it in its place.
#[test]
fn each_call_is_answered() {
    let keys = vec![ApiKey::new("webui", SECRET).expect("valid")];
    let running = Running::with(ServerOptions { api_keys: keys, ..ServerOptions::default() });
    for Call { what, method, path, body, reads } in calls() {
        let answer = send(&running, method, path, &body).ok();
        for (pointer, is_kind) in reads {
            assert!(answer.pointer(pointer).is_some_and(is_kind), "{what}: {pointer} of {answer}");
        }
    }
    // Its chat itself: chunks with a role, text, a reason, and the counts that it asks for.
    let chat = json!({ "stream": true, "model": "demo", "messages": [{ "role": "user", "content": "A fox?" }],
                       "stream_options": { "include_usage": true }, "max_tokens": 8, "temperature": 0 });
    let chunks = send(&running, "POST", "/v1/chat/completions", &chat).chunks();
    let text: String = chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    assert!(!text.is_empty() && chunks.last().expect("counts")["usage"]["completion_tokens"].is_u64());
    let lines = json!({ "model": "llama3.2", "stream": true, "messages": [{ "role": "user", "content": "A fox?" }],
                        "options": { "num_predict": 8, "temperature": 0 }, "keep_alive": "5m" });
    let answer = send(&running, "POST", "/api/chat", &lines);
    assert_eq!((answer.status, answer.header("content-type")), (200, Some("application/x-ndjson")));
    let lines: Vec<Value> = answer.body.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert!(lines.last().is_some_and(|last| last["done"] == true && last["eval_count"].is_u64()), "{lines:?}");
}
