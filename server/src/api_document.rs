//! `GET /openapi.json`: every route in OpenAPI 3.1, from the table of routes and from what is told of each here. Names, types and
//! ranges of parameters are those that the routes read: a test sends each of them with a wrong type. `server/openapi.json` is a
//! copy for those who have no server at hand.

use std::sync::OnceLock;

use axum::body::{Body, Bytes};
use axum::http::Response;
use ns_llm::Priority;
use ns_llm::config::{MAX_CHOICES, MAX_LOGPROBS, MAX_STOP_STRINGS};
use serde_json::{Map, Value, json};

use crate::options::MAX_PROMPTS;
use crate::response::typed;
use crate::routes;

/// The route.
pub(crate) async fn get() -> Response<Body> {
    static DOCUMENT: OnceLock<Bytes> = OnceLock::new();
    typed("application/json", DOCUMENT.get_or_init(|| Bytes::from(document().to_string())).clone())
}

/// What is told of a route.
struct Described {
    method: &'static str,
    path: &'static str,
    summary: &'static str,
    /// Of its body; none: it reads no body.
    body: Vec<Property>,
    answer: Success,
}

/// What a route answers when it succeeds.
enum Success {
    /// One JSON object that has these members.
    Object(&'static [&'static str]),
    /// The same, or where `stream` says so events.
    ObjectOrStream(&'static [&'static str], &'static str),
    /// A text of this type.
    Text(&'static str),
}

/// A parameter of a body.
struct Property {
    name: &'static str,
    schema: Value,
    about: &'static str,
    /// A body is not one without it: what it may be, for an example.
    required: Option<Value>,
}

fn optional(name: &'static str, schema: Value, about: &'static str) -> Property {
    Property { name, schema, about, required: None }
}

fn required(name: &'static str, schema: Value, about: &'static str, example: Value) -> Property {
    Property { name, schema, about, required: Some(example) }
}

// Null is as good as nothing everywhere.
fn text() -> Value {
    json!({ "type": ["string", "null"] })
}

fn switch() -> Value {
    json!({ "type": ["boolean", "null"] })
}

fn number(min: f64, max: f64) -> Value {
    json!({ "type": ["number", "null"], "minimum": min, "maximum": max })
}

fn count(min: usize) -> Value {
    json!({ "type": ["integer", "null"], "minimum": min })
}

fn count_to(min: usize, max: usize) -> Value {
    json!({ "type": ["integer", "null"], "minimum": min, "maximum": max })
}

fn integer() -> Value {
    json!({ "type": ["integer", "null"] })
}

fn array_of(items: Value) -> Value {
    json!({ "type": ["array", "null"], "items": items })
}

fn object_of(properties: Value) -> Value {
    json!({ "type": ["object", "null"], "properties": properties })
}

fn token_ids() -> Value {
    array_of(json!({ "type": "integer", "minimum": 0 }))
}

fn texts(max: usize) -> Value {
    json!({ "anyOf": [
        { "type": "string" },
        { "type": "array", "items": { "type": "string" }, "maxItems": max },
        { "type": "null" },
    ] })
}

fn text_or_ids(max: usize) -> Value {
    let ids = json!({ "type": "array", "items": { "type": "integer", "minimum": 0 } });
    json!({ "anyOf": [
        { "type": "string" },
        ids,
        { "type": "array", "items": { "anyOf": [{ "type": "string" }, ids] }, "minItems": 1, "maxItems": max },
    ] })
}

fn messages() -> Value {
    let part = json!({ "type": "object", "required": ["type", "text"],
        "properties": { "type": { "enum": ["text", "input_text", "output_text"] }, "text": { "type": "string" } } });
    json!({ "type": "array", "minItems": 1, "items": { "type": "object", "required": ["role", "content"], "properties": {
        "role": { "enum": ["system", "developer", "user", "assistant"] },
        "content": { "anyOf": [{ "type": "string" }, { "type": "array", "items": part }] },
    } } })
}

fn messages_or_none() -> Value {
    let mut schema = messages();
    (schema["type"], schema["minItems"]) = (json!(["array", "null"]), json!(0));
    schema
}

fn example_messages() -> Value {
    json!([{ "role": "user", "content": "What is the capital of France?" }])
}

fn model() -> Property {
    optional("model", text(), "One of `GET /v1/models`; the first one when it is not given.")
}

fn streams(about: &'static str) -> Property {
    optional("stream", switch(), about)
}

/// What every generating route of OpenAI's kind reads.
fn sampling() -> Vec<Property> {
    vec![
        optional("temperature", number(0.0, 100.0), "0 takes the most likely token."),
        optional(
            "top_p",
            json!({ "type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 1 }),
            "Share of probability that is kept.",
        ),
        optional("min_p", number(0.0, 1.0), "Share of the best token's probability below which none is kept."),
        optional(
            "top_k",
            json!({ "type": ["integer", "null"], "minimum": -1 }),
            "Number of tokens that are kept; 0 and -1: all.",
        ),
        optional(
            "repetition_penalty",
            json!({ "type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 100 }),
            "Of tokens in prompt and answer; 1 is none.",
        ),
        optional("presence_penalty", number(-2.0, 2.0), "Of tokens in the answer, once."),
        optional("frequency_penalty", number(-2.0, 2.0), "Of tokens in the answer, each time."),
        optional(
            "logit_bias",
            json!({ "type": ["object", "null"], "additionalProperties": { "type": "number", "minimum": -100, "maximum": 100 },
                    "propertyNames": { "pattern": "^[0-9]+$" } }),
            "Added to logits, by token id.",
        ),
        optional("seed", integer(), "The same request with the same seed has the same answer."),
        optional("stop", texts(MAX_STOP_STRINGS), "Where the answer ends; not part of it."),
        optional("stop_token_ids", token_ids(), "Tokens at which the answer ends."),
        optional("ignore_eos", switch(), "Goes on where the model would end."),
        optional("cache_prompt", switch(), "False: KV of earlier prompts is not used."),
        optional("cache_salt", text(), "Only requests with the same salt share cached KV."),
        optional("service_tier", text(), "`priority` goes first, `flex` last."),
        optional("timeout_ms", count(1), "Limit of the request's time, waiting included."),
    ]
}

fn priority() -> Property {
    let names: Vec<_> = Priority::ALL.iter().map(|priority| priority.name()).collect();
    let schema = json!({ "anyOf": [{ "type": "integer" }, { "enum": names }, { "type": "null" }] });
    optional("priority", schema, "A class, or a number: lower first.")
}

/// How many answers, and how long.
fn choices() -> Vec<Property> {
    vec![
        optional("n", count_to(1, MAX_CHOICES), "Number of answers."),
        optional("max_tokens", count(0), "Most new tokens of each answer."),
        optional("max_completion_tokens", count(0), "The newer name of `max_tokens`."),
        streams("Whether the answer comes in events."),
        optional(
            "stream_options",
            object_of(json!({ "include_usage": { "type": ["boolean", "null"] } })),
            "With `stream` alone: whether counts come with the events.",
        ),
    ]
}

/// Ollama's `options`.
fn options() -> Property {
    let schema = object_of(json!({
        "temperature": number(0.0, 100.0),
        "top_p": { "type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 1 },
        "min_p": number(0.0, 1.0),
        "top_k": count(0),
        "repeat_penalty": { "type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 100 },
        "presence_penalty": number(-2.0, 2.0),
        "frequency_penalty": number(-2.0, 2.0),
        "seed": integer(),
        "stop": texts(MAX_STOP_STRINGS),
        "num_predict": integer(),
    }));
    optional("options", schema, "How to sample, and how long the answer may be.")
}

fn joined(lists: impl IntoIterator<Item = Vec<Property>>) -> Vec<Property> {
    lists.into_iter().flatten().collect()
}

/// What is told, one entry for each route of the table.
fn described() -> Vec<Described> {
    let get = |path, summary, answer| Described { method: "GET", path, summary, body: Vec::new(), answer };
    let post = |path, summary, body, answer| Described { method: "POST", path, summary, body, answer };
    let delete = |path, summary, answer| Described { method: "DELETE", path, summary, body: Vec::new(), answer };
    let own_text = || {
        vec![
            model(),
            required("text", json!({ "type": "string", "minLength": 1 }), "What to continue.", json!("Once")),
            optional("max_tokens", count(0), "Most new tokens."),
            optional("maxTokens", count(0), "The same."),
            optional("temperature", number(0.0, 100.0), "0, the default, takes the most likely token."),
            optional("seed", integer(), "The same request with the same seed has the same answer."),
            optional("stop", texts(MAX_STOP_STRINGS), "Where the answer ends; not part of it."),
            optional("timeout", count(1), "Limit of the request's time, milliseconds."),
        ]
    };
    let chat_body = joined([
        vec![model(), required("messages", messages(), "The conversation so far.", example_messages())],
        sampling(),
        vec![priority()],
        choices(),
        vec![
            optional("logprobs", switch(), "Whether each token comes with its logprob."),
            optional("top_logprobs", count_to(0, MAX_LOGPROBS), "With `logprobs`: alternatives of each token."),
        ],
    ]);
    let completion_body = joined([
        vec![model(), required("prompt", text_or_ids(MAX_PROMPTS), "What to continue, one or several.", json!("Once"))],
        sampling(),
        vec![priority()],
        choices(),
        vec![
            optional("logprobs", count_to(0, MAX_LOGPROBS), "Alternatives of each token."),
            optional("best_of", count(1), "As many as `n`."),
        ],
    ]);
    let embedding_body = vec![
        model(),
        required("input", text_or_ids(2_048), "What to turn into vectors, one or several.", json!("a red fox")),
        optional("encoding_format", json!({ "enum": ["float", "base64", null] }), "How vectors are written."),
        optional("dimensions", count(1), "The first numbers of each vector alone."),
        priority(),
        optional("timeout_ms", count(1), "Limit of the request's time."),
    ];
    let input = json!({ "anyOf": [{ "type": "string" }, messages()] });
    let response_body = joined([
        vec![
            model(),
            required("input", input, "A message of the user, or several messages.", json!("Tell me of a fox.")),
            optional("instructions", text(), "A message of the system, for this answer alone."),
            optional("previous_response_id", text(), "The answer that this one goes on from."),
            optional("store", switch(), "Whether the answer can be asked for again. Default true."),
            optional("max_output_tokens", count(0), "Most new tokens."),
            streams("Whether the answer comes in named events."),
        ],
        sampling(),
        vec![priority()],
    ]);
    let stream = "text/event-stream";
    vec![
        get("/openapi.json", "This document.", Success::Object(&["openapi", "info", "paths"])),
        get("/health", "Whether the server lives.", Success::Object(&["status", "uptime_seconds"])),
        get(
            "/ready",
            "Whether new requests should be sent here, and why not.",
            Success::Object(&["ready", "queue", "models"]),
        ),
        get(
            "/trace",
            "Chrome's trace events of the next seconds, where they may be asked for; for keys that are marked as admin.",
            Success::Object(&["traceEvents"]),
        ),
        get(
            "/metrics",
            "Counts and times for Prometheus: requests, tokens, steps, the prefix cache and its tiers, the response cache \
             (`response_cache_hits_total`, `_misses_total`, `_entries`, `_bytes`).",
            Success::Text("text/plain"),
        ),
        get("/v1/models", "What is served.", Success::Object(&["object", "data"])),
        get("/v1/models/{*id}", "One model.", Success::Object(&["id", "object", "created", "owned_by"])),
        post(
            "/v1/chat/completions",
            "The answer to a conversation.",
            chat_body,
            Success::ObjectOrStream(&["id", "object", "created", "model", "choices", "usage"], stream),
        ),
        post(
            "/v1/completions",
            "Text that continues prompts.",
            completion_body,
            Success::ObjectOrStream(&["id", "object", "created", "model", "choices", "usage"], stream),
        ),
        post(
            "/v1/embeddings",
            "Vectors of texts.",
            embedding_body,
            Success::Object(&["object", "data", "model", "usage"]),
        ),
        post(
            "/v1/responses",
            "An answer that is kept and can be continued.",
            response_body,
            Success::ObjectOrStream(&["id", "object", "status", "output"], stream),
        ),
        get("/v1/responses/{id}", "A kept answer.", Success::Object(&["id", "object", "status", "output"])),
        delete("/v1/responses/{id}", "Forgets an answer.", Success::Object(&["id", "object", "deleted"])),
        post("/v1/responses/{id}/cancel", "Ends an answer that grows.", Vec::new(), Success::Object(&["id", "status"])),
        post(
            "/tokenize",
            "Token ids of a text.",
            vec![
                model(),
                required("prompt", json!({ "type": "string" }), "The text.", json!("a red fox")),
                optional("add_special_tokens", switch(), "Whether the tokens around a prompt are added. Default true."),
            ],
            Success::Object(&["count", "max_model_len", "tokens"]),
        ),
        post(
            "/detokenize",
            "Text of token ids.",
            vec![
                model(),
                required(
                    "tokens",
                    json!({ "type": "array", "items": { "type": "integer", "minimum": 0 } }),
                    "The ids.",
                    json!([1, 2]),
                ),
            ],
            Success::Object(&["prompt", "content"]),
        ),
        get("/api/version", "The server's version.", Success::Object(&["version"])),
        get("/api/tags", "Every name of every model.", Success::Object(&["models"])),
        get("/api/ps", "Models in memory.", Success::Object(&["models"])),
        post(
            "/api/show",
            "What a model is.",
            vec![model()],
            Success::Object(&["details", "model_info", "capabilities"]),
        ),
        post(
            "/api/generate",
            "Ollama's: text that continues a prompt. With a `text` in place of a `prompt`: that of ns-node's older service, which answers with `text`.",
            vec![
                model(),
                optional("prompt", text(), "What to continue; without it nothing is done."),
                optional("system", text(), "A message of the system before it."),
                optional("raw", switch(), "Whether the prompt is taken as it is."),
                streams("Whether the answer comes in lines of JSON. Default true."),
                options(),
            ],
            Success::ObjectOrStream(&[], "application/x-ndjson"),
        ),
        post(
            "/api/chat",
            "Ollama's: the answer to a conversation.",
            vec![
                model(),
                optional("messages", messages_or_none(), "The conversation so far; without it nothing is done."),
                streams("Whether the answer comes in lines of JSON. Default true."),
                options(),
            ],
            Success::ObjectOrStream(&[], "application/x-ndjson"),
        ),
        post(
            "/api/embed",
            "Ollama's: vectors of texts. With a `text` in place of an `input`: that of ns-node's older service, of that one.",
            vec![
                model(),
                optional("input", texts(2_048), "The texts."),
                optional("truncate", switch(), "Whether a text that is too long is cut. Default true."),
                optional("dimensions", count(1), "The first numbers of each vector alone."),
            ],
            Success::Object(&["model", "embeddings"]),
        ),
        post(
            "/api/embeddings",
            "Ollama's older form: the vector of a text.",
            vec![model(), required("prompt", json!({ "type": "string" }), "The text.", json!("a red fox"))],
            Success::Object(&["embedding"]),
        ),
        post("/api/generate/stream", "ns-node's: tokens as events.", own_text(), Success::Text(stream)),
        get("/api/gpu/status", "The GPUs, and how busy they are.", Success::Object(&[])),
        post(
            "/api/gpu/can-handle",
            "Whether a GPU has so much memory left.",
            vec![optional("requiredVram", json!({ "type": ["number", "null"] }), "Mebibytes.")],
            Success::Object(&[]),
        ),
        get("/api/gpu/utilization", "The course of the GPUs' load.", Success::Object(&[])),
        get("/api/gpu/metadata", "What a network of nodes asks of one.", Success::Object(&[])),
        get("/api/gpu/peers", "Other nodes.", Success::Object(&[])),
        get(
            "/api/kv-cache/stats",
            "Counts of the prefix cache, of each tier (entries, bytes, hits), and of the response cache (hits and entries by tier, \
             misses, bytes).",
            Success::Object(&["hits", "misses", "hitRate", "prefix", "tiers", "responses"]),
        ),
        post(
            "/api/kv-cache/clear",
            "Empties the prefix cache and the response cache; for keys that are marked as admin.",
            Vec::new(),
            Success::Object(&[]),
        ),
        post(
            "/api/kv-cache/prune",
            "Gives up answers that are out of date.",
            Vec::new(),
            Success::Object(&["success", "pruned"]),
        ),
        get("/api/kv-cache/{key}/exists", "Whether there is an entry.", Success::Object(&["exists"])),
        delete("/api/kv-cache/{key}", "Forgets an entry.", Success::Object(&["success"])),
        get("/api/performance/metrics", "How fast the server answers.", Success::Object(&[])),
        get("/api/performance/report", "The same, judged.", Success::Object(&[])),
        get("/api/performance/bottlenecks", "What holds it up.", Success::Object(&[])),
        post(
            "/api/performance/clear",
            "Forgets what was measured; for keys that are marked as admin.",
            Vec::new(),
            Success::Object(&[]),
        ),
    ]
}

/// The whole document.
pub(crate) fn document() -> Value {
    let described = described();
    let mut paths = Map::new();
    for route in routes::table() {
        let told = described.iter().find(|told| (told.method, told.path) == (route.method, route.path));
        // `{*id}` may have slashes, which OpenAPI has no way to say.
        let path = route.path.replace("{*", "{");
        let entry = paths.entry(path.clone()).or_insert_with(|| json!({}));
        entry[route.method.to_lowercase()] = operation(&path, route.method, told);
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "ns-llm",
            "version": env!("CARGO_PKG_VERSION"),
            "summary": "Language models over HTTP, in the dialects of OpenAI, Ollama and ns-node.",
            "license": { "name": "MIT OR Apache-2.0" },
        },
        "security": [{ "bearer": [] }, { "header": [] }, {}],
        "paths": paths,
        "components": {
            "securitySchemes": {
                "bearer": { "type": "http", "scheme": "bearer" },
                "header": { "type": "apiKey", "in": "header", "name": "x-api-key" },
            },
            "schemas": {
                "Error": { "type": "object", "required": ["error"], "properties": { "error": {
                    "type": "object",
                    "required": ["message", "type", "param", "code"],
                    "properties": {
                        "message": { "type": "string" },
                        "type": { "type": "string" },
                        "param": { "type": ["string", "null"] },
                        "code": { "type": "string" },
                    },
                } } },
                "PlainError": {
                    "type": "object",
                    "required": ["error"],
                    // What is wrong with the head of a request is told before its route is known.
                    "properties": { "error": { "type": ["string", "object"] } },
                },
            },
        },
    })
}

fn operation(path: &str, method: &str, told: Option<&Described>) -> Value {
    let Some(told) = told else { return json!({ "summary": "", "responses": { "200": { "description": "" } } }) };
    let names = path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'));
    let parameters: Vec<Value> = names
        .map(|name| json!({ "name": name, "in": "path", "required": true, "schema": { "type": "string", "minLength": 1 } }))
        .collect();
    let name = format!("{}{}", method.to_lowercase(), path.replace(['/', '-', '.', '{', '}'], "_"));
    let mut operation = json!({
        "operationId": name,
        "summary": told.summary,
        "parameters": parameters,
        "responses": responses(path, &told.answer),
    });
    if !told.body.is_empty() {
        operation["requestBody"] = request_body(&told.body);
    }
    operation
}

fn request_body(properties: &[Property]) -> Value {
    let (mut schemas, mut example) = (Map::new(), Map::new());
    for Property { name, schema, about, required } in properties {
        let mut schema = schema.clone();
        schema["description"] = json!(about);
        schemas.insert(name.to_string(), schema);
        if let Some(value) = required {
            example.insert(name.to_string(), value.clone());
        }
    }
    let required: Vec<&str> = example.keys().map(String::as_str).collect();
    let schema = json!({ "type": "object", "required": required, "properties": schemas });
    json!({ "required": true, "content": { "application/json": { "schema": schema, "example": example } } })
}

fn responses(path: &str, answer: &Success) -> Value {
    let object = |members: &[&str]| json!({ "schema": { "type": "object", "required": members } });
    let content = match answer {
        Success::Object(members) => json!({ "application/json": object(members) }),
        Success::ObjectOrStream(members, stream) => json!({
            "application/json": object(members),
            // Events and lines: each is an object of its own.
            *stream: {},
        }),
        Success::Text(content_type) => json!({ *content_type: {} }),
    };
    let error = if path.starts_with("/api/") { "PlainError" } else { "Error" };
    let schema = json!({ "$ref": format!("#/components/schemas/{error}") });
    let mut responses = json!({ "200": { "description": "The answer.", "content": content } });
    let refused = json!({ "description": "What is wrong.", "content": { "application/json": { "schema": schema } } });
    responses["default"] = refused;
    if path == "/ready" || path == "/health" {
        responses["503"] = json!({ "description": "It is not.", "content": content });
    }
    responses
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each route is told of, and nothing is told of a route that is not there.
    #[test]
    fn every_route_is_told_of() {
        let mut told: Vec<_> = described().iter().map(|told| (told.method, told.path)).collect();
        let mut routes: Vec<_> = routes::table().iter().map(|route| (route.method, route.path)).collect();
        told.sort_unstable();
        routes.sort_unstable();
        assert_eq!(told, routes, "`described` in server/src/api_document.rs beside `table` in server/src/routes.rs");
    }
}
