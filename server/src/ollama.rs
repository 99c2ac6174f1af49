//! Ollama's routes, as its clients call them: lists, answers and vectors, streams as lines of JSON.

use std::sync::Arc;
use std::time::Instant;

use axum::Extension;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::Response;
use ns_llm::{EmbeddingRequest, Event, FinishReason, Message, ModelInfo, Request, Summary};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::app::{App, Served};
use crate::clock::rfc3339;
use crate::error::{ApiError, ApiResult, PlainResult};
use crate::event_body::{self, Dialect};
use crate::fields::{Fields, shown};
use crate::generation::{EngineRequest, Generation};
use crate::keys::Caller;
use crate::messages::read_messages;
use crate::ns_node;
use crate::parameters::{namespace, read_seed};
use crate::response::json_response;

/// `GET /api/version`.
pub(crate) async fn version() -> Response<Body> {
    json_response(&json!({ "version": env!("CARGO_PKG_VERSION") }))
}

/// `GET /api/tags`: every name that a model has.
pub(crate) async fn tags(State(app): State<Arc<App>>) -> Response<Body> {
    let names = |model: &Served| {
        let names = [&model.name].into_iter().chain(&model.aliases);
        names.map(|name| tag(model, name)).collect::<Vec<_>>()
    };
    let models: Vec<Value> = app.models.iter().flat_map(names).collect();
    json_response(&json!({ "models": models }))
}

/// `GET /api/ps`: what is in memory, which is all that is served, and stays.
pub(crate) async fn loaded(State(app): State<Arc<App>>) -> Response<Body> {
    let entry = |model: &Served| {
        let mut entry = tag(model, &model.name);
        entry["expires_at"] = json!("9999-12-31T23:59:59Z");
        let is_on_device = model.engine.info().device != "cpu";
        entry["size_vram"] = if is_on_device { entry["size"].clone() } else { json!(0) };
        entry["context_length"] = json!(model.engine.info().context_tokens);
        entry
    };
    json_response(&json!({ "models": app.models.iter().map(entry).collect::<Vec<_>>() }))
}

/// `POST /api/show`: what a model is.
pub(crate) async fn show(State(app): State<Arc<App>>, body: Bytes) -> PlainResult {
    let mut fields = Fields::parse(&body)?;
    // Older clients name it so.
    if let (false, Some(name)) = (fields.has("model"), fields.take("name")) {
        fields.put("model", name);
    }
    let (model, name) = named_model(&app, &mut fields)?;
    let (info, entry) = (model.engine.info(), tag(model, &name));
    let capabilities = if info.can_generate { &["completion", "embedding"][..] } else { &["embedding"] };
    let family = family(info);
    Ok(json_response(&json!({
        "modelfile": "",
        "parameters": "",
        "template": "",
        "details": entry["details"],
        "model_info": {
            "general.architecture": &family,
            "general.parameter_count": info.num_parameters,
            format!("{family}.context_length"): info.context_tokens,
            format!("{family}.embedding_length"): info.embedding_dimensions,
        },
        "capabilities": capabilities,
        "modified_at": entry["modified_at"],
    })))
}

fn family(info: &ModelInfo) -> String {
    info.architecture.trim_end_matches("ForCausalLM").to_ascii_lowercase()
}

fn tag(model: &Served, name: &str) -> Value {
    let info = model.engine.info();
    let tagged = if name.contains(':') { name.to_string() } else { format!("{name}:latest") };
    let family = family(info);
    json!({
        "name": tagged,
        "model": tagged,
        "modified_at": rfc3339(),
        "size": model.engine.memory().weights_bytes,
        "digest": digest(model, name),
        "details": {
            "parent_model": "",
            "format": "ns-llm",
            "family": &family,
            "families": [&family],
            "parameter_size": format!("{:.1}M", info.num_parameters as f64 / 1e6),
            "quantization_level": info.weights.to_ascii_uppercase(),
        },
    })
}

/// What Ollama's clients take a model's short id from: 64 hexadecimal digits that change with it.
fn digest(model: &Served, name: &str) -> String {
    let hash = Sha256::digest(format!("{name}\n{}", model.fingerprint));
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// `POST /api/generate`. A prompt is answered as a user's message where the model knows messages, unless it is `raw`.
pub(crate) async fn generate(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    body: Bytes,
) -> PlainResult {
    let mut fields = Fields::parse(&body)?;
    drop(body);
    if fields.has("text") {
        return ns_node::generate::answer(&app, &caller, fields).await;
    }
    let (model, name) = named_model(&app, &mut fields)?;
    check_unset(&fields, &["images", "suffix", "template"])?;
    let prompt = fields.text("prompt")?.unwrap_or_default();
    let system = fields.text("system")?;
    let is_raw = fields.bool("raw")?.unwrap_or(false);
    if prompt.is_empty() {
        // Ollama's way to load a model; this one is.
        let object =
            json!({ "model": name, "created_at": rfc3339(), "response": "", "done": true, "done_reason": "load" });
        return Ok(json_response(&object));
    }
    let mut request = if is_raw || !model.engine.info().has_chat_template {
        Request::prompt(prompt)
    } else {
        let system = system.into_iter().map(|text| Message::new("system", text));
        Request::chat(system.chain([Message::new("user", prompt)]).collect::<Vec<_>>())
    };
    read_options(&mut fields, model, &mut request, &caller)?;
    answer(&app, &caller, model, fields, request, Lines::new(name, Form::Generate)).await
}

/// `POST /api/chat`.
pub(crate) async fn chat(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    body: Bytes,
) -> PlainResult {
    let mut fields = Fields::parse(&body)?;
    drop(body);
    let (model, name) = named_model(&app, &mut fields)?;
    check_unset(&fields, &["tools"])?;
    let messages = fields.take("messages").unwrap_or_else(|| json!([]));
    if messages.as_array().is_some_and(Vec::is_empty) {
        // The same, of a conversation.
        let message = json!({ "role": "assistant", "content": "" });
        let object =
            json!({ "model": name, "created_at": rfc3339(), "message": message, "done": true, "done_reason": "load" });
        return Ok(json_response(&object));
    }
    let mut request = Request::chat(read_messages(messages, "messages")?);
    read_options(&mut fields, model, &mut request, &caller)?;
    answer(&app, &caller, model, fields, request, Lines::new(name, Form::Chat)).await
}

/// `POST /api/embed`: several texts; also of ns-node's older service, which names its one `text`.
pub(crate) async fn embed(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    body: Bytes,
) -> PlainResult {
    let start = Instant::now();
    let mut fields = Fields::parse(&body)?;
    drop(body);
    if fields.has("text") {
        return ns_node::generate::embed(&app, &caller, fields).await;
    }
    let (model, name) = named_model(&app, &mut fields)?;
    let inputs = fields.texts("input")?;
    if inputs.is_empty() {
        return Ok(json_response(&json!({ "model": name, "embeddings": [] })));
    }
    let num_inputs = inputs.len();
    let mut request = EmbeddingRequest::new(inputs);
    request.truncate = fields.bool("truncate")?.unwrap_or(true);
    request.dimensions = fields.count("dimensions")?;
    drop(fields);
    let generation = Generation::start(&app, &caller, model, EngineRequest::Embed(request)).await?;
    let (embeddings, summary) = generation.finish_embedding(num_inputs).await?;
    let vectors: Vec<&[f32]> = embeddings.iter().map(|embedding| embedding.values.as_slice()).collect();
    Ok(json_response(&json!({
        "model": name,
        "embeddings": vectors,
        "total_duration": start.elapsed().as_nanos() as u64,
        "load_duration": 0,
        "prompt_eval_count": summary.usage.prompt_tokens,
    })))
}

/// `POST /api/embeddings`: the older form, of one text.
pub(crate) async fn embeddings(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    body: Bytes,
) -> PlainResult {
    let mut fields = Fields::parse(&body)?;
    drop(body);
    let (model, _) = named_model(&app, &mut fields)?;
    let prompt = fields.text("prompt")?.ok_or_else(|| ApiError::invalid("prompt", "missing", "a string"))?;
    drop(fields);
    let work = EngineRequest::Embed(EmbeddingRequest::new([prompt]));
    let (embeddings, _) = Generation::start(&app, &caller, model, work).await?.finish_embedding(1).await?;
    Ok(json_response(&json!({ "embedding": embeddings[0].values })))
}

/// The model, and the name by which it was asked for, which Ollama repeats.
fn named_model<'a>(app: &'a App, fields: &mut Fields) -> ApiResult<(&'a Served, String)> {
    let name = fields.text("model")?;
    let model = app.model(name.as_deref())?;
    Ok((model, name.unwrap_or_else(|| model.name.clone())))
}

fn check_unset(fields: &Fields, names: &[&str]) -> ApiResult<()> {
    for name in names {
        match fields.get(name) {
            None => {}
            Some(Value::Array(values)) if values.is_empty() => {}
            Some(Value::String(text)) if text.is_empty() => {}
            Some(value) => return Err(ApiError::not_supported(*name, shown(value), "unset")),
        }
    }
    Ok(())
}

/// `options`, and what stands beside them.
fn read_options(fields: &mut Fields, model: &Served, request: &mut Request, caller: &Caller) -> ApiResult<()> {
    check_unset(fields, &["format"])?;
    if fields.get("think").is_some_and(|think| think != &Value::Bool(false)) {
        return Err(ApiError::not_supported("think", "given", "false"));
    }
    request.namespace = namespace(caller, None);
    request.max_tokens = Some(model.engine.info().context_tokens);
    let Some(mut options) = fields.object("options")? else { return Ok(()) };
    let sampling = &mut request.sampling;
    sampling.temperature = options.number("temperature")?;
    sampling.top_p = options.number("top_p")?;
    sampling.min_p = options.number("min_p")?;
    sampling.top_k = options.count("top_k")?.map(|top_k| u32::try_from(top_k).unwrap_or(u32::MAX));
    sampling.repetition_penalty = options.number("repeat_penalty")?;
    sampling.presence_penalty = options.number("presence_penalty")?;
    sampling.frequency_penalty = options.number("frequency_penalty")?;
    sampling.seed = read_seed(&mut options)?;
    request.stop = options.texts("stop")?;
    // Negative numbers are Ollama's ways to say "to the end of the context".
    if let Some(num_predict) = options.integer("num_predict")?
        && let Ok(max_tokens) = usize::try_from(num_predict)
    {
        request.max_tokens = Some(max_tokens);
    }
    Ok(())
}

/// The answer, as a stream unless it was asked for in one piece.
async fn answer(
    app: &Arc<App>,
    caller: &Caller,
    model: &Served,
    mut fields: Fields,
    request: Request,
    mut lines: Lines,
) -> PlainResult {
    let is_stream = fields.bool("stream")?.unwrap_or(true);
    drop(fields);
    let renamed = |error: ApiError| error.renamed("max_tokens", "num_predict");
    let generation =
        Generation::start(app, caller, model, EngineRequest::Generate(Box::new(request))).await.map_err(renamed)?;
    if is_stream {
        return Ok(event_body::stream(app, vec![generation], lines).await.map_err(renamed)?);
    }
    let (mut choices, summary) = generation.finish(1).await.map_err(renamed)?;
    let choice = choices.pop().unwrap_or_default();
    lines.reason = choice.reason;
    Ok(json_response(&lines.last(&choice.text, &summary)))
}

#[derive(Clone, Copy)]
enum Form {
    Generate,
    Chat,
}

/// An answer as lines of JSON; the last one has its counts and times.
struct Lines {
    model: String,
    form: Form,
    reason: Option<FinishReason>,
}

impl Lines {
    fn new(model: String, form: Form) -> Lines {
        Lines { model, form, reason: None }
    }

    fn object(&self, text: &str, done: bool) -> Value {
        let mut object = json!({ "model": self.model, "created_at": rfc3339(), "done": done });
        match self.form {
            Form::Generate => object["response"] = Value::from(text),
            Form::Chat => object["message"] = json!({ "role": "assistant", "content": text }),
        }
        object
    }

    /// Durations are nanoseconds.
    fn last(&self, text: &str, summary: &Summary) -> Value {
        let nanos = |ms: f64| (ms * 1e6) as u64;
        let (usage, times) = (summary.usage, summary.timings);
        let mut object = self.object(text, true);
        object["done_reason"] = Value::from(self.reason.map_or("stop", FinishReason::as_str));
        object["total_duration"] = Value::from(nanos(times.total_ms));
        object["load_duration"] = Value::from(0);
        object["prompt_eval_count"] = Value::from(usage.prompt_tokens);
        object["prompt_eval_duration"] = Value::from(nanos(times.prompt_ms));
        object["eval_count"] = Value::from(usage.completion_tokens);
        object["eval_duration"] = Value::from(nanos(times.decode_ms));
        object
    }
}

fn write_line(out: &mut String, object: &Value) {
    out.push_str(&object.to_string());
    out.push('\n');
}

impl Dialect for Lines {
    const CONTENT_TYPE: &'static str = "application/x-ndjson";

    fn event(&mut self, _source: usize, event: Event, out: &mut String) {
        match event {
            Event::Delta(delta) if !delta.text.is_empty() => write_line(out, &self.object(&delta.text, false)),
            Event::Finished { reason, .. } => self.reason = Some(reason),
            Event::Done(summary) => write_line(out, &self.last("", &summary)),
            _ => {}
        }
    }

    fn end(&mut self, _out: &mut String) {}

    fn error(&mut self, error: &ApiError, out: &mut String) {
        write_line(out, &error.to_plain_json());
    }
}
