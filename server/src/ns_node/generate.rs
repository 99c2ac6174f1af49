//! `POST /api/generate` and `/api/embed` with a `text`, as ns-node's older service has them, and `/api/generate/stream`, as
//! ns-node streams: two dialects of events, of two kinds of readers.

use std::sync::Arc;
use std::time::Instant;

use axum::Extension;
use axum::body::Bytes;
use axum::extract::State;
use ns_llm::{EmbeddingRequest, Event, FinishReason, Request};
use serde_json::{Value, json};

use crate::app::{App, Served};
use crate::error::{ApiError, ApiResult, PlainResult};
use crate::event_body::{self, Dialect};
use crate::fields::Fields;
use crate::generation::{EngineRequest, Generation};
use crate::keys::Caller;
use crate::parameters::{namespace, read_seed};
use crate::response::json_response;

/// `/api/generate`: in one piece, or as events `meta`, `token` and `done`.
pub(crate) async fn answer(app: &Arc<App>, caller: &Caller, mut fields: Fields) -> PlainResult {
    let start = Instant::now();
    let model = app.model(fields.text("model")?.as_deref())?;
    let is_stream = fields.bool("stream")?.unwrap_or(false);
    let (request, received) = read_request(&mut fields, caller)?;
    drop(fields);
    let generation = Generation::start(app, caller, model, EngineRequest::Generate(Box::new(request))).await?;
    if is_stream {
        let events = NamedEvents { model: model.name.clone(), received, idx: 0, has_begun: false };
        return Ok(event_body::stream(app, vec![generation], events).await?);
    }
    let (mut choices, summary) = generation.finish(1).await?;
    let choice = choices.pop().unwrap_or_default();
    Ok(json_response(&json!({
        "text": choice.text,
        "tokens_generated": summary.usage.completion_tokens,
        "model": model.name,
        "latency_ms": start.elapsed().as_secs_f64() * 1e3,
        "prompt_tokens": summary.usage.prompt_tokens,
        "cached_tokens": summary.usage.cached_tokens,
        "finish_reason": choice.reason.map(FinishReason::as_str),
    })))
}

/// `/api/generate/stream`: unnamed events of `stream_token`.
pub(crate) async fn stream(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    body: Bytes,
) -> PlainResult {
    let mut fields = Fields::parse(&body)?;
    drop(body);
    let model = app.model(fields.text("model")?.as_deref())?;
    let (request, _) = read_request(&mut fields, &caller)?;
    drop(fields);
    let generation = Generation::start(&app, &caller, model, EngineRequest::Generate(Box::new(request))).await?;
    Ok(event_body::stream(&app, vec![generation], TokenEvents { idx: 0 }).await?)
}

/// `/api/embed` of one `text`.
pub(crate) async fn embed(app: &Arc<App>, caller: &Caller, mut fields: Fields) -> PlainResult {
    let start = Instant::now();
    let model: &Served = app.model(fields.text("model")?.as_deref())?;
    let text = read_text(&mut fields)?;
    drop(fields);
    let work = EngineRequest::Embed(EmbeddingRequest::new([text]));
    let (mut embeddings, summary) = Generation::start(app, caller, model, work).await?.finish_embedding(1).await?;
    let values = embeddings.pop().unwrap_or_default().values;
    Ok(json_response(&json!({
        "dimensions": values.len(),
        "embedding": values,
        "model": model.name,
        "tokens": summary.usage.prompt_tokens,
        "latency_ms": start.elapsed().as_secs_f64() * 1e3,
    })))
}

fn read_text(fields: &mut Fields) -> ApiResult<String> {
    match fields.text("text")? {
        Some(text) if !text.is_empty() => Ok(text),
        Some(_) => Err(ApiError::invalid("text", "\"\"", "not empty")),
        None => Err(ApiError::invalid("text", "missing", "a string")),
    }
}

/// The request, and the characters of its text. What it does not say is as reproducible as it can be: greedy.
fn read_request(fields: &mut Fields, caller: &Caller) -> ApiResult<(Request, usize)> {
    let text = read_text(fields)?;
    let received = text.chars().count();
    let mut request = Request::prompt(text);
    request.max_tokens = match fields.count("max_tokens")? {
        Some(max_tokens) => Some(max_tokens),
        None => fields.count("maxTokens")?,
    };
    request.sampling.temperature = Some(fields.number("temperature")?.unwrap_or(0.0));
    request.sampling.seed = read_seed(fields)?;
    request.stop = fields.texts("stop")?;
    request.timeout_ms = fields.count("timeout")?.map(|timeout_ms| timeout_ms as u64);
    request.namespace = namespace(caller, None);
    Ok((request, received))
}

fn write_event(out: &mut String, name: Option<&str>, data: &Value) {
    if let Some(name) = name {
        out.push_str(&format!("event: {name}\n"));
    }
    out.push_str(&format!("data: {data}\n\n"));
}

/// `meta`, then `token` by `token`, then `done`.
struct NamedEvents {
    model: String,
    received: usize,
    /// Of the next token event.
    idx: usize,
    has_begun: bool,
}

impl Dialect for NamedEvents {
    fn event(&mut self, _source: usize, event: Event, out: &mut String) {
        if !std::mem::replace(&mut self.has_begun, true) {
            write_event(out, Some("meta"), &json!({ "model": self.model, "received": self.received }));
        }
        match event {
            Event::Delta(delta) if !delta.text.is_empty() => {
                write_event(out, Some("token"), &json!({ "token": delta.text, "idx": self.idx }));
                self.idx += 1;
            }
            Event::Done(summary) => {
                let data = json!({ "done": true, "token_count": summary.usage.completion_tokens });
                write_event(out, Some("done"), &data);
            }
            _ => {}
        }
    }

    fn end(&mut self, _out: &mut String) {}

    fn error(&mut self, error: &ApiError, out: &mut String) {
        write_event(out, Some("error"), &error.to_plain_json());
    }
}

/// `stream_token` by `stream_token`; the end is an event of its own.
struct TokenEvents {
    /// Of the next token event.
    idx: usize,
}

impl Dialect for TokenEvents {
    fn event(&mut self, _source: usize, event: Event, out: &mut String) {
        if let Event::Delta(delta) = event
            && !delta.text.is_empty()
        {
            write_event(out, None, &json!({ "stream_token": delta.text, "idx": self.idx, "done": false }));
            self.idx += 1;
        }
    }

    fn end(&mut self, out: &mut String) {
        out.push_str("event: done\ndata: [DONE]\n\n");
    }

    fn error(&mut self, error: &ApiError, out: &mut String) {
        write_event(out, Some("error"), &error.to_plain_json());
    }
}
