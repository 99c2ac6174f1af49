//! `POST /v1/chat/completions`: a conversation and its answer, whole or in chunks.

use std::sync::Arc;

use axum::Extension;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::Response;
use ns_llm::{Engine, Event, FinishReason, Request, TokenLogprobs, Usage};
use serde::Serialize;

use crate::app::{App, Served};
use crate::error::{ApiError, ApiResult};
use crate::event_body::{self, Dialect};
use crate::fields::Fields;
use crate::generation::{EngineRequest, FinishedChoice, Generation};
use crate::keys::Caller;
use crate::messages::read_messages;
use crate::openai::{DONE, Head, TimingsObject, TokenEntry, UsageObject, write_data};
use crate::parameters::{read_max_tokens, read_shared, read_stream};
use crate::response::json_response;

#[derive(Serialize)]
struct ChatCompletion {
    #[serde(flatten)]
    head: Head,
    choices: Vec<ChatChoice>,
    usage: UsageObject,
    timings: TimingsObject,
}

#[derive(Serialize)]
struct ChatChoice {
    index: usize,
    message: ChatMessage,
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<&'static str>,
}

#[derive(Serialize)]
struct ChatMessage {
    role: &'static str,
    content: String,
    refusal: Option<String>,
}

#[derive(Serialize)]
struct ChatLogprobs {
    content: Vec<ChatTokenLogprob>,
    refusal: Option<()>,
}

#[derive(Serialize)]
struct ChatTokenLogprob {
    #[serde(flatten)]
    chosen: TokenEntry,
    top_logprobs: Vec<TokenEntry>,
}

#[derive(Serialize)]
struct ChatChunk<'a> {
    #[serde(flatten)]
    head: &'a Head,
    choices: &'a [ChunkChoice],
    /// With `include_usage`: null but in the last chunk.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<UsageObject>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    timings: Option<TimingsObject>,
}

#[derive(Serialize)]
struct ChunkChoice {
    index: usize,
    delta: ChunkDelta,
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<&'static str>,
}

#[derive(Default, Serialize)]
struct ChunkDelta {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
}

/// The route.
pub(crate) async fn create(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    body: Bytes,
) -> ApiResult<Response<Body>> {
    let mut fields = Fields::parse(&body)?;
    drop(body);
    let model = app.model(fields.text("model")?.as_deref())?;
    let messages = fields.require("messages", "an array of {role, content}")?;
    let mut request = Request::chat(read_messages(messages, "messages")?);
    read_shared(&mut fields, &mut request, &caller)?;
    request.logprobs = read_logprobs(&mut fields)?;
    let (max_tokens, max_tokens_name) = read_max_tokens(&mut fields)?;
    // Without a limit an answer may take what is left of the context.
    request.max_tokens = Some(max_tokens.unwrap_or(model.engine.info().context_tokens));
    let (is_stream, with_usage) = read_stream(&mut fields)?;
    drop(fields);
    let n = request.n;
    let named = |error: ApiError| error.renamed("max_tokens", max_tokens_name).renamed("logprobs", "top_logprobs");
    let generation =
        Generation::start(&app, &caller, model, EngineRequest::Generate(Box::new(request))).await.map_err(named)?;
    if is_stream {
        let chunks = Chunks::new(&app, model, n, with_usage);
        return event_body::stream(&app, vec![generation], chunks).await.map_err(named);
    }
    let head = Head::new(&app, model, "chatcmpl-", "chat.completion");
    let (choices, summary) = generation.finish(n).await.map_err(named)?;
    let choices = choices.into_iter().enumerate().map(|(index, choice)| chat_choice(&model.engine, index, choice));
    let (usage, timings) = (UsageObject::from(summary.usage), TimingsObject::from(&summary));
    Ok(json_response(&ChatCompletion { head, choices: choices.collect(), usage, timings }))
}

fn read_logprobs(fields: &mut Fields) -> ApiResult<Option<usize>> {
    let wanted = fields.bool("logprobs")?.unwrap_or(false);
    match fields.count("top_logprobs")? {
        top if wanted => Ok(Some(top.unwrap_or(0))),
        // Clients that fill in every field send a zero.
        None | Some(0) => Ok(None),
        Some(top) => Err(ApiError::invalid("top_logprobs", top.to_string(), "unset unless logprobs is true")),
    }
}

fn chat_choice(engine: &Engine, index: usize, choice: FinishedChoice) -> ChatChoice {
    ChatChoice {
        index,
        message: ChatMessage { role: "assistant", content: choice.text, refusal: None },
        logprobs: chat_logprobs(engine, &choice.logprobs),
        finish_reason: choice.reason.map(FinishReason::as_str),
    }
}

fn chat_logprobs(engine: &Engine, logprobs: &[TokenLogprobs]) -> Option<ChatLogprobs> {
    let entry = |logprobs: &TokenLogprobs| ChatTokenLogprob {
        chosen: TokenEntry::new(engine, logprobs.chosen),
        top_logprobs: logprobs.top.iter().map(|&top| TokenEntry::new(engine, top)).collect(),
    };
    (!logprobs.is_empty()).then(|| ChatLogprobs { content: logprobs.iter().map(entry).collect(), refusal: None })
}

/// The answer in chunks: the role with the first of each choice, the reason of its end with the last.
struct Chunks {
    engine: Engine,
    head: Head,
    has_started: Vec<bool>,
    with_usage: bool,
    usage: Usage,
    timings: Option<TimingsObject>,
}

impl Chunks {
    fn new(app: &App, model: &Served, n: usize, with_usage: bool) -> Chunks {
        Chunks {
            engine: model.engine.clone(),
            head: Head::new(app, model, "chatcmpl-", "chat.completion.chunk"),
            has_started: vec![false; n],
            with_usage,
            usage: Usage::default(),
            timings: None,
        }
    }

    fn write(&self, out: &mut String, choice: ChunkChoice) {
        let usage = self.with_usage.then_some(None);
        write_data(out, &ChatChunk { head: &self.head, choices: &[choice], usage, timings: None });
    }

    /// The role, unless it was told.
    fn role(&mut self, index: usize) -> Option<&'static str> {
        (!std::mem::replace(&mut self.has_started[index], true)).then_some("assistant")
    }
}

impl Dialect for Chunks {
    fn event(&mut self, _source: usize, event: Event, out: &mut String) {
        match event {
            Event::Delta(delta) => {
                let (index, role) = (delta.choice, self.role(delta.choice));
                // What may still become a stop string is held back: there may be a token and no text yet.
                if role.is_none() && delta.text.is_empty() && delta.logprobs.is_empty() {
                    return;
                }
                let logprobs = chat_logprobs(&self.engine, &delta.logprobs);
                let delta = ChunkDelta { role, content: Some(delta.text) };
                self.write(out, ChunkChoice { index, delta, logprobs, finish_reason: None });
            }
            Event::Finished { choice: index, reason } => {
                // A choice that ended without a token has a role all the same.
                if let Some(role) = self.role(index) {
                    let delta = ChunkDelta { role: Some(role), content: Some(String::new()) };
                    self.write(out, ChunkChoice { index, delta, logprobs: None, finish_reason: None });
                }
                let delta = ChunkDelta::default();
                self.write(out, ChunkChoice { index, delta, logprobs: None, finish_reason: Some(reason.as_str()) });
            }
            Event::Done(summary) => {
                self.usage = summary.usage;
                self.timings = Some(TimingsObject::from(&summary));
            }
            _ => {}
        }
    }

    fn end(&mut self, out: &mut String) {
        if self.with_usage {
            let usage = Some(Some(UsageObject::from(self.usage)));
            write_data(out, &ChatChunk { head: &self.head, choices: &[], usage, timings: self.timings });
        }
        out.push_str(DONE);
    }

    fn error(&mut self, error: &ApiError, out: &mut String) {
        write_data(out, &error.to_json());
        out.push_str(DONE);
    }
}
