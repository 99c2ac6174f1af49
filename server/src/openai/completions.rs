//! `POST /v1/completions`: one prompt or several, continued, whole or in chunks. Choice `i` of prompt `p` has the index
//! `p * n + i`.

use std::sync::Arc;

use axum::Extension;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::Response;
use ns_llm::{Engine, Event, FinishReason, Prompt, Request, TokenLogprobs};
use serde::Serialize;
use serde_json::{Map, Value};

use crate::app::{App, Served};
use crate::error::{ApiError, ApiResult};
use crate::event_body::{self, Dialect};
use crate::fields::{Fields, shown, token_ids};
use crate::generation::{EngineRequest, FinishedChoice, Generation};
use crate::keys::Caller;
use crate::openai::{DONE, Head, MIN_LOGPROB, TokenEntry, UsageObject, write_data};
use crate::options::MAX_PROMPTS;
use crate::parameters::{read_max_tokens, read_shared, read_stream};
use crate::response::json_response;

/// New tokens when a request does not say, as OpenAI has it.
const DEFAULT_MAX_TOKENS: usize = 16;

#[derive(Serialize)]
struct TextCompletion {
    #[serde(flatten)]
    head: Head,
    choices: Vec<TextChoice>,
    usage: UsageObject,
}

#[derive(Serialize)]
struct TextChunk<'a> {
    #[serde(flatten)]
    head: &'a Head,
    choices: &'a [TextChoice],
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<UsageObject>>,
}

#[derive(Serialize)]
struct TextChoice {
    index: usize,
    text: String,
    logprobs: Option<TextLogprobs>,
    finish_reason: Option<&'static str>,
}

/// The older form of logprobs: lists side by side.
#[derive(Serialize)]
struct TextLogprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<f32>,
    top_logprobs: Vec<Map<String, Value>>,
    /// Where each token's text begins in that of the choice, in characters.
    text_offset: Vec<usize>,
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
    let prompts = read_prompts(fields.require("prompt", "a string, token ids, or an array of either")?)?;
    let mut request = Request::prompt("");
    read_shared(&mut fields, &mut request, &caller)?;
    request.logprobs = fields.count("logprobs")?;
    let (max_tokens, max_tokens_name) = read_max_tokens(&mut fields)?;
    request.max_tokens = Some(max_tokens.unwrap_or(DEFAULT_MAX_TOKENS));
    let n = request.n;
    if let Some(best_of) = fields.count("best_of")?
        && best_of != n
    {
        return Err(ApiError::not_supported("best_of", best_of.to_string(), format!("n, which is {n}")));
    }
    let (is_stream, with_usage) = read_stream(&mut fields)?;
    drop(fields);
    let named = |error: ApiError| error.renamed("max_tokens", max_tokens_name);
    let works = prompts.into_iter().map(|prompt| {
        let mut request = request.clone();
        request.prompt = prompt;
        EngineRequest::Generate(Box::new(request))
    });
    let generations = Generation::start_all(&app, &caller, model, works.collect()).await.map_err(named)?;
    if is_stream {
        let chunks = Chunks::new(&app, model, generations.len(), n, with_usage);
        return event_body::stream(&app, generations, chunks).await.map_err(named);
    }
    let head = Head::new(&app, model, "cmpl-", "text_completion");
    let (mut all, mut usage) = (Vec::new(), UsageObject::default());
    for generation in generations {
        let (choices, summary) = generation.finish(n).await.map_err(named)?;
        usage.add(&summary.usage);
        let first = all.len();
        all.extend(
            choices.into_iter().enumerate().map(|(idx, choice)| text_choice(&model.engine, first + idx, choice)),
        );
    }
    Ok(json_response(&TextCompletion { head, choices: all, usage }))
}

fn read_prompts(value: Value) -> ApiResult<Vec<Prompt>> {
    let expected = "a string, token ids, or an array of either";
    let values = match value {
        Value::String(text) => return Ok(vec![Prompt::Text(text)]),
        Value::Array(values) => values,
        other => return Err(ApiError::invalid("prompt", shown(&other), expected)),
    };
    if values.first().is_some_and(Value::is_number) {
        return Ok(vec![Prompt::Tokens(token_ids(&values, "prompt")?)]);
    }
    if values.is_empty() || values.len() > MAX_PROMPTS {
        let value = format!("an array of {}", values.len());
        return Err(ApiError::invalid("prompt", value, format!("1 to {MAX_PROMPTS} prompts")));
    }
    let prompt = |(idx, value): (usize, Value)| match value {
        Value::String(text) => Ok(Prompt::Text(text)),
        Value::Array(ids) => Ok(Prompt::Tokens(token_ids(&ids, &format!("prompt[{idx}]"))?)),
        other => Err(ApiError::invalid(format!("prompt[{idx}]"), shown(&other), "a string or token ids")),
    };
    values.into_iter().enumerate().map(prompt).collect()
}

fn text_choice(engine: &Engine, index: usize, choice: FinishedChoice) -> TextChoice {
    let logprobs = text_logprobs(engine, &choice.logprobs, &mut 0);
    TextChoice { index, text: choice.text, logprobs, finish_reason: choice.reason.map(FinishReason::as_str) }
}

/// `offset`: characters before the first of these tokens; moved behind the last.
fn text_logprobs(engine: &Engine, logprobs: &[TokenLogprobs], offset: &mut usize) -> Option<TextLogprobs> {
    if logprobs.is_empty() {
        return None;
    }
    let mut lists = TextLogprobs { tokens: vec![], token_logprobs: vec![], top_logprobs: vec![], text_offset: vec![] };
    for TokenLogprobs { chosen, top } in logprobs {
        let chosen = TokenEntry::new(engine, *chosen);
        lists.text_offset.push(*offset);
        *offset += chosen.token.chars().count();
        lists.token_logprobs.push(chosen.logprob);
        lists.tokens.push(chosen.token);
        let pair =
            |top: &ns_llm::Logprob| (TokenEntry::new(engine, *top).token, Value::from(top.logprob.max(MIN_LOGPROB)));
        lists.top_logprobs.push(top.iter().map(pair).collect());
    }
    Some(lists)
}

/// The answers in chunks.
struct Chunks {
    engine: Engine,
    head: Head,
    n: usize,
    /// Characters of each choice so far, as its logprobs count them.
    offsets: Vec<usize>,
    with_usage: bool,
    usage: UsageObject,
}

impl Chunks {
    fn new(app: &App, model: &Served, num_prompts: usize, n: usize, with_usage: bool) -> Chunks {
        Chunks {
            engine: model.engine.clone(),
            head: Head::new(app, model, "cmpl-", "text_completion"),
            n,
            offsets: vec![0; num_prompts * n],
            with_usage,
            usage: UsageObject::default(),
        }
    }

    fn write(&self, out: &mut String, choice: TextChoice) {
        let usage = self.with_usage.then_some(None);
        write_data(out, &TextChunk { head: &self.head, choices: &[choice], usage });
    }
}

impl Dialect for Chunks {
    fn event(&mut self, source: usize, event: Event, out: &mut String) {
        match event {
            Event::Delta(delta) => {
                if delta.text.is_empty() && delta.logprobs.is_empty() {
                    return;
                }
                let index = source * self.n + delta.choice;
                let logprobs = text_logprobs(&self.engine, &delta.logprobs, &mut self.offsets[index]);
                self.write(out, TextChoice { index, text: delta.text, logprobs, finish_reason: None });
            }
            Event::Finished { choice, reason } => {
                let index = source * self.n + choice;
                let finish_reason = Some(reason.as_str());
                self.write(out, TextChoice { index, text: String::new(), logprobs: None, finish_reason });
            }
            Event::Done(summary) => self.usage.add(&summary.usage),
            _ => {}
        }
    }

    fn end(&mut self, out: &mut String) {
        if self.with_usage {
            write_data(out, &TextChunk { head: &self.head, choices: &[], usage: Some(Some(self.usage)) });
        }
        out.push_str(DONE);
    }

    fn error(&mut self, error: &ApiError, out: &mut String) {
        write_data(out, &error.to_json());
        out.push_str(DONE);
    }
}
