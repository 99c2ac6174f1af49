//! `/v1/responses`: an answer as an object that is kept for a while, can be asked for again, continued and cancelled; its
//! stream is of named events.

use std::sync::Arc;

use axum::Extension;
use axum::body::{Body, Bytes};
use axum::extract::{Path, State};
use axum::http::Response;
use ns_llm::{Canceller, Event, FinishReason, Message, Request, Usage};
use serde_json::{Value, json};

use crate::app::{App, Served};
use crate::clock::unix_seconds;
use crate::error::{ApiError, ApiResult};
use crate::event_body::{self, Dialect};
use crate::fields::{Fields, shown};
use crate::generation::{EngineRequest, Generation};
use crate::keys::Caller;
use crate::messages::read_messages;
use crate::options::{MAX_METADATA_KEY_CHARS, MAX_METADATA_PAIRS, MAX_METADATA_VALUE_CHARS, MAX_USER_CHARS};
use crate::parameters::{is_text_type, read_shared};
use crate::response::json_response;
use crate::stored::StoredResponse;

/// `POST /v1/responses`.
pub(crate) async fn create(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    body: Bytes,
) -> ApiResult<Response<Body>> {
    let mut fields = Fields::parse(&body)?;
    drop(body);
    let model = app.model(fields.text("model")?.as_deref())?;
    check_supported(&fields)?;
    let mut draft = Draft::read(&app, &caller, model, &mut fields)?;
    let instructions = draft.instructions.as_ref().map(|text| Message::new("system", text));
    let mut request = Request::chat(instructions.into_iter().chain(draft.messages.clone()).collect::<Vec<_>>());
    let is_stream = fields.bool("stream")?.unwrap_or(false);
    let max_output_tokens = fields.count("max_output_tokens")?;
    draft.object["max_output_tokens"] = json!(max_output_tokens);
    for name in ["temperature", "top_p"] {
        draft.object[name] = fields.get(name).cloned().unwrap_or(Value::Null);
    }
    draft.object["user"] = json!(read_user(&mut fields)?);
    read_shared(&mut fields, &mut request, &caller)?;
    drop(fields);
    if request.n != 1 {
        return Err(ApiError::not_supported("n", request.n.to_string(), "1"));
    }
    request.max_tokens = Some(max_output_tokens.unwrap_or(model.engine.info().context_tokens));
    let named = |error: ApiError| error.renamed("max_tokens", "max_output_tokens");
    let generation =
        Generation::start(&app, &caller, model, EngineRequest::Generate(Box::new(request))).await.map_err(named)?;
    if is_stream {
        let events = Events::new(draft, generation.canceller());
        return event_body::stream(&app, vec![generation], events).await.map_err(named);
    }
    let (mut choices, summary) = generation.finish(1).await.map_err(named)?;
    let choice = choices.pop().unwrap_or_default();
    draft.finish(choice.text, choice.reason, summary.usage);
    draft.save(None);
    Ok(json_response(&draft.object))
}

/// `GET /v1/responses/{id}`.
pub(crate) async fn get(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> ApiResult<Response<Body>> {
    Ok(json_response(&find(&app, &caller, &id)?.object))
}

/// `DELETE /v1/responses/{id}`.
pub(crate) async fn delete(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> ApiResult<Response<Body>> {
    if !app.stored.remove(&id, caller.name()) {
        return Err(not_found(&id));
    }
    Ok(json_response(&json!({ "id": id, "object": "response.deleted", "deleted": true })))
}

/// `POST /v1/responses/{id}/cancel`: ends one that is still growing; one that has ended stays what it is.
pub(crate) async fn cancel(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> ApiResult<Response<Body>> {
    let stored = app.stored.cancel(&id, caller.name()).ok_or_else(|| not_found(&id))?;
    Ok(json_response(&stored.object))
}

fn find(app: &App, caller: &Caller, id: &str) -> ApiResult<StoredResponse> {
    app.stored.get(id, caller.name()).ok_or_else(|| not_found(id))
}

fn not_found(id: &str) -> ApiError {
    let shown: String = id.chars().take(64).collect();
    ApiError::not_found("response_not_found", format!("response {shown:?} is not kept here"))
}

/// A parameter, which values of it ask for nothing, and what they are.
type Check<'a> = (&'a str, &'a dyn Fn(&Value) -> bool, &'a str);

/// What only this route knows, and cannot be followed.
fn check_supported(fields: &Fields) -> ApiResult<()> {
    let format_is_text =
        |text: &Value| text.get("format").is_none_or(|format| format.is_null() || is_text_type(format));
    let no_effort =
        |reasoning: &Value| reasoning.get("effort").is_none_or(|effort| effort.is_null() || effort == "none");
    let checks: [Check<'_>; 5] = [
        ("text", &format_is_text, "{\"format\": {\"type\": \"text\"}}"),
        ("reasoning", &no_effort, "without effort"),
        ("truncation", &|value| value == "disabled", "\"disabled\""),
        ("conversation", &|_| false, "unset"),
        ("prompt", &|_| false, "unset"),
    ];
    for (name, is_neutral, expected) in checks {
        match fields.get(name) {
            Some(value) if !is_neutral(value) => return Err(ApiError::not_supported(name, shown(value), expected)),
            _ => {}
        }
    }
    Ok(())
}

/// A response on its way.
struct Draft {
    app: Arc<App>,
    owner: Option<String>,
    is_stored: bool,
    id: String,
    instructions: Option<String>,
    message_id: String,
    /// OpenAI's object of all this, as far as it has come; written here, and read by clients alone.
    object: Value,
    /// The conversation, without instructions, which belong to one answer alone.
    messages: Vec<Message>,
}

impl Draft {
    fn read(app: &Arc<App>, caller: &Caller, model: &Served, fields: &mut Fields) -> ApiResult<Draft> {
        let previous = fields.text("previous_response_id")?;
        let mut messages = match &previous {
            Some(id) => find(app, caller, id)?.messages,
            None => Vec::new(),
        };
        messages.extend(read_input(fields.require("input", "a string or an array of messages")?)?);
        let is_stored = fields.bool("store")?.unwrap_or(true);
        let (id, instructions) = (app.new_id("resp_"), fields.text("instructions")?);
        let object = json!({
            "id": id,
            "object": "response",
            "created_at": unix_seconds(),
            "status": "in_progress",
            "error": null,
            "incomplete_details": null,
            "instructions": instructions,
            "metadata": read_metadata(fields)?,
            "model": model.name,
            "output": [],
            "parallel_tool_calls": true,
            "previous_response_id": previous,
            "reasoning": { "effort": null, "summary": null },
            "store": is_stored,
            "text": { "format": { "type": "text" } },
            "tool_choice": "auto",
            "tools": [],
            "truncation": "disabled",
            "usage": null,
        });
        let (app, owner) = (app.clone(), caller.name().map(str::to_string));
        let message_id = app.new_id("msg_");
        Ok(Draft { app, owner, is_stored, id, instructions, message_id, object, messages })
    }

    fn part(text: &str) -> Value {
        json!({ "type": "output_text", "text": text, "annotations": [], "logprobs": [] })
    }

    fn item(&self, text: Option<&str>, status: &str) -> Value {
        let content = text.map_or(json!([]), |text| json!([Draft::part(text)]));
        json!({ "id": self.message_id, "type": "message", "status": status, "role": "assistant", "content": content })
    }

    /// Complete, or as complete as its limit let it be; its one item, and whether it is complete.
    fn finish(&mut self, text: String, reason: Option<FinishReason>, usage: Usage) -> (Value, bool) {
        let is_whole = reason != Some(FinishReason::Length);
        let status = if is_whole { "completed" } else { "incomplete" };
        self.object["status"] = json!(status);
        if !is_whole {
            self.object["incomplete_details"] = json!({ "reason": "max_output_tokens" });
        }
        let item = self.item(Some(&text), status);
        self.object["output"] = json!([item]);
        self.object["usage"] = json!({
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": { "cached_tokens": usage.cached_tokens },
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": { "reasoning_tokens": 0 },
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        });
        self.messages.push(Message::new("assistant", text));
        (item, is_whole)
    }

    /// Keeps it as it is now, for the first time.
    fn save(&self, canceller: Option<Canceller>) {
        if self.is_stored {
            self.app.stored.put(self.as_it_is(canceller));
        }
    }

    /// Keeps what has become of one that was kept while it grew.
    fn save_end(&self) {
        if self.is_stored {
            self.app.stored.replace(self.as_it_is(None));
        }
    }

    fn as_it_is(&self, canceller: Option<Canceller>) -> StoredResponse {
        StoredResponse {
            id: self.id.clone(),
            owner: self.owner.clone(),
            object: self.object.clone(),
            messages: self.messages.clone(),
            canceller,
        }
    }
}

/// Texts by name, within OpenAI's limits: they are kept with the response.
fn read_metadata(fields: &mut Fields) -> ApiResult<Value> {
    let expected = format!(
        "at most {MAX_METADATA_PAIRS} pairs of a name of {MAX_METADATA_KEY_CHARS} and a text of {MAX_METADATA_VALUE_CHARS} \
         characters"
    );
    let pairs = match fields.take("metadata") {
        None => return Ok(json!({})),
        Some(Value::Object(pairs)) => pairs,
        Some(other) => return Err(ApiError::invalid("metadata", shown(&other), expected)),
    };
    let fits = |text: &str, max_chars: usize| text.chars().nth(max_chars).is_none();
    if pairs.len() > MAX_METADATA_PAIRS || pairs.keys().any(|name| !fits(name, MAX_METADATA_KEY_CHARS)) {
        return Err(ApiError::invalid("metadata", format!("an object of {} pairs", pairs.len()), expected));
    }
    let wrong = |value: &Value| value.as_str().is_none_or(|text| !fits(text, MAX_METADATA_VALUE_CHARS));
    match pairs.values().find(|value| wrong(value)) {
        Some(value) => Err(ApiError::invalid("metadata", format!("an object with {}", shown(value)), expected)),
        None => Ok(Value::Object(pairs)),
    }
}

fn read_user(fields: &mut Fields) -> ApiResult<Option<String>> {
    let user = fields.text("user")?;
    match &user {
        Some(text) if text.chars().nth(MAX_USER_CHARS).is_some() => {
            let value = format!("{} bytes", text.len());
            Err(ApiError::invalid("user", value, format!("at most {MAX_USER_CHARS} characters")))
        }
        _ => Ok(user),
    }
}

/// A text, or messages; items of other kinds are of tools.
fn read_input(value: Value) -> ApiResult<Vec<Message>> {
    let Value::Array(items) = value else {
        return match value {
            Value::String(text) => Ok(vec![Message::new("user", text)]),
            other => Err(ApiError::invalid("input", shown(&other), "a string or an array of messages")),
        };
    };
    for (idx, item) in items.iter().enumerate() {
        match item.get("type") {
            None | Some(Value::Null) => {}
            Some(kind) if kind == "message" => {}
            Some(kind) => {
                return Err(ApiError::not_supported(format!("input[{idx}].type"), shown(kind), "\"message\""));
            }
        }
    }
    read_messages(Value::Array(items), "input")
}

/// The stream of a response: what begins, each piece of text, and what has ended, numbered.
struct Events {
    draft: Draft,
    text: String,
    reason: Option<FinishReason>,
    has_begun: bool,
    has_ended: bool,
    sequence_number: u64,
}

impl Events {
    fn new(draft: Draft, canceller: Canceller) -> Events {
        draft.save(Some(canceller));
        Events { draft, text: String::new(), reason: None, has_begun: false, has_ended: false, sequence_number: 0 }
    }

    fn write(&mut self, out: &mut String, name: &str, mut data: Value) {
        data["type"] = json!(name);
        data["sequence_number"] = json!(self.sequence_number);
        self.sequence_number += 1;
        out.push_str(&format!("event: {name}\ndata: {data}\n\n"));
    }

    /// About the one text of the one message.
    fn write_part(&mut self, out: &mut String, name: &str, mut data: Value) {
        data["item_id"] = json!(self.draft.message_id);
        (data["output_index"], data["content_index"]) = (json!(0), json!(0));
        self.write(out, name, data);
    }

    fn begin(&mut self, out: &mut String) {
        if std::mem::replace(&mut self.has_begun, true) {
            return;
        }
        let response = self.draft.object.clone();
        self.write(out, "response.created", json!({ "response": response }));
        self.write(out, "response.in_progress", json!({ "response": response }));
        let item = self.draft.item(None, "in_progress");
        self.write(out, "response.output_item.added", json!({ "output_index": 0, "item": item }));
        self.write_part(out, "response.content_part.added", json!({ "part": Draft::part("") }));
    }

    fn finish(&mut self, usage: Usage, out: &mut String) {
        let text = std::mem::take(&mut self.text);
        self.write_part(out, "response.output_text.done", json!({ "text": text, "logprobs": [] }));
        self.write_part(out, "response.content_part.done", json!({ "part": Draft::part(&text) }));
        let (item, is_whole) = self.draft.finish(text, self.reason, usage);
        self.write(out, "response.output_item.done", json!({ "output_index": 0, "item": item }));
        let response = self.draft.object.clone();
        let name = if is_whole { "response.completed" } else { "response.incomplete" };
        self.write(out, name, json!({ "response": response }));
        self.end_as_it_is();
    }

    fn end_as_it_is(&mut self) {
        self.has_ended = true;
        self.draft.save_end();
    }
}

impl Dialect for Events {
    fn event(&mut self, _source: usize, event: Event, out: &mut String) {
        self.begin(out);
        match event {
            Event::Delta(delta) if !delta.text.is_empty() => {
                self.text.push_str(&delta.text);
                self.write_part(out, "response.output_text.delta", json!({ "delta": delta.text, "logprobs": [] }));
            }
            Event::Finished { reason, .. } => self.reason = Some(reason),
            Event::Done(summary) => self.finish(summary.usage, out),
            _ => {}
        }
    }

    fn end(&mut self, _out: &mut String) {}

    fn error(&mut self, error: &ApiError, out: &mut String) {
        self.begin(out);
        let status = if error.code == "cancelled" { "cancelled" } else { "failed" };
        self.draft.object["status"] = json!(status);
        self.draft.object["error"] = json!({ "code": error.code, "message": error.message });
        let response = self.draft.object.clone();
        self.write(out, "response.failed", json!({ "response": response }));
        self.end_as_it_is();
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        // Its client has gone, and the answer with it.
        if !self.has_ended {
            self.draft.object["status"] = json!("cancelled");
            self.end_as_it_is();
        }
    }
}
