//! `ns-llm eval`: how good a model's answers are in this engine. Perplexity of a text in windows of 1,024 tokens with a
//! stride of 512 (each token is predicted once, with at least half a window before it where there is one), from prompt
//! logprobs; exact match of tasks by kind, greedy, answered together in one batch.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::Args;
use ns_llm::{Engine, Event, FinishReason, Message, Request, RequestStream};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::model::{ModelOptions, open_default};
use crate::{CommandResult, show};

const WINDOW_TOKENS: usize = 1024;
const STRIDE_TOKENS: usize = 512;
/// New tokens allowed beyond the expected answer's own length.
const SPARE_TOKENS: usize = 12;
/// New tokens for a task without one expected answer.
const STORY_TOKENS: usize = 400;
/// Words that such an answer must have.
const STORY_MIN_WORDS: usize = 30;
/// Tasks submitted ahead of the one that is being read.
const IN_FLIGHT: usize = 64;

#[derive(Args)]
#[command(group = clap::ArgGroup::new("what").required(true).multiple(true))]
pub(crate) struct Options {
    #[command(flatten)]
    model: ModelOptions,
    /// Text whose perplexity is measured
    #[arg(long, value_name = "FILE", group = "what")]
    text: Option<PathBuf>,
    /// Tasks, one JSON object a line: {"kind", "messages", "answer" | "must_include"}
    #[arg(long, value_name = "FILE", group = "what")]
    items: Option<PathBuf>,
    /// Print the JSON object on one line
    #[arg(long)]
    json: bool,
}

#[derive(Deserialize)]
struct Item {
    kind: String,
    messages: Vec<ItemMessage>,
    answer: Option<String>,
    #[serde(default)]
    must_include: Vec<String>,
}

#[derive(Deserialize)]
struct ItemMessage {
    role: String,
    content: String,
}

#[derive(Default)]
struct Score {
    right: usize,
    items: usize,
}

pub(crate) fn run(options: Options) -> CommandResult {
    let engine = open_default(&options.model)?;
    let mut report = serde_json::Map::new();
    if let Some(path) = &options.text {
        report.insert("text".to_string(), perplexity(&engine, &std::fs::read_to_string(path)?)?);
    }
    if let Some(path) = &options.items {
        let items: Vec<Item> =
            std::fs::read_to_string(path)?.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
        let kinds = exact_match(&engine, &items)?;
        let all = kinds.values().fold(Score::default(), |sum, score| Score {
            right: sum.right + score.right,
            items: sum.items + score.items,
        });
        let kinds: BTreeMap<_, _> = kinds.into_iter().map(|(kind, score)| (kind, to_json(&score))).collect();
        report.insert("kinds".to_string(), json!(kinds));
        report.insert("all".to_string(), to_json(&all));
    }
    let report = Value::Object(report);
    show(format_args!("{}\n", if options.json { report.to_string() } else { serde_json::to_string_pretty(&report)? }))?;
    Ok(())
}

fn to_json(score: &Score) -> Value {
    json!({ "right": score.right, "items": score.items })
}

fn perplexity(engine: &Engine, text: &str) -> Result<Value, Box<dyn std::error::Error>> {
    let ids = engine.tokenize(text, false)?;
    let (mut nats, mut tokens, mut seen) = (0.0f64, 0usize, 0usize);
    for start in (0..ids.len()).step_by(STRIDE_TOKENS) {
        let window = &ids[start..ids.len().min(start + WINDOW_TOKENS)];
        let mut request = Request::tokens(window).max_tokens(0);
        request.prompt_logprobs = true;
        let logprobs = engine.complete(request)?.summary.prompt_logprobs;
        // Entry 0 belongs to token 1 of the window; those that an earlier window has predicted are left out.
        let new = &logprobs[seen.saturating_sub(start + 1)..];
        nats -= new.iter().map(|entry| f64::from(entry.chosen.logprob)).sum::<f64>();
        tokens += new.len();
        seen = start + window.len();
        if seen == ids.len() {
            break;
        }
    }
    let loss = nats / tokens.max(1) as f64;
    let bits_per_byte = nats / std::f64::consts::LN_2 / text.len().max(1) as f64;
    Ok(json!({ "tokens": tokens, "loss": loss, "perplexity": loss.exp(), "bits_per_byte": bits_per_byte }))
}

fn exact_match(engine: &Engine, items: &[Item]) -> Result<BTreeMap<String, Score>, ns_llm::Error> {
    let mut kinds: BTreeMap<String, Score> = BTreeMap::new();
    for group in items.chunks(IN_FLIGHT) {
        let streams = group.iter().map(|item| ask(engine, item)).collect::<Result<Vec<_>, _>>()?;
        for (item, stream) in group.iter().zip(streams) {
            let score = kinds.entry(item.kind.clone()).or_default();
            score.items += 1;
            score.right += usize::from(is_right(item, stream)?);
        }
    }
    Ok(kinds)
}

fn ask(engine: &Engine, item: &Item) -> Result<RequestStream, ns_llm::Error> {
    let messages: Vec<Message> =
        item.messages.iter().map(|m| Message::new(m.role.clone(), m.content.clone())).collect();
    let max_tokens = match &item.answer {
        Some(answer) => engine.tokenize(answer, false)?.len() + SPARE_TOKENS,
        None => STORY_TOKENS,
    };
    engine.generate(Request::chat(messages).max_tokens(max_tokens).temperature(0.0))
}

fn is_right(item: &Item, stream: RequestStream) -> Result<bool, ns_llm::Error> {
    let (mut text, mut has_ended) = (String::new(), false);
    for event in stream {
        match event? {
            Event::Delta(delta) => text.push_str(&delta.text),
            Event::Finished { reason, .. } => has_ended = reason == FinishReason::Stop,
            _ => {}
        }
    }
    Ok(has_ended
        && match &item.answer {
            Some(answer) => text == *answer,
            None => {
                text.split_whitespace().count() >= STORY_MIN_WORDS
                    && item.must_include.iter().all(|part| text.contains(part.as_str()))
            }
        })
}
