//! `ns-llm generate`: one prompt, its text as it is made, or all of it as JSON.

use std::io::Read;
use std::path::PathBuf;

use clap::Args;
use ns_llm::{CacheTier, Completion, Delta, Event, Message, ModelInfo, Request};
use serde_json::json;

use crate::model::{ModelOptions, open_default};
use crate::trace::TraceOptions;
use crate::{CommandResult, show};

#[derive(Args)]
pub(crate) struct Options {
    #[command(flatten)]
    model: ModelOptions,
    #[command(flatten)]
    trace: TraceOptions,
    /// The prompt
    #[arg(long, value_name = "TEXT", required_unless_present = "prompt_file")]
    prompt: Option<String>,
    /// Read the prompt from a file ("-": standard input)
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    prompt_file: Option<PathBuf>,
    /// Treat the prompt as a user's message and answer it
    #[arg(long)]
    chat: bool,
    #[command(flatten)]
    sampling: Sampling,
    /// Print one JSON object instead of the text
    #[arg(long)]
    json: bool,
}

/// How to sample and when to stop.
#[derive(Args, Clone)]
pub(crate) struct Sampling {
    /// Most new tokens
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_tokens: usize,
    /// 0 is greedy (default: as the model says, else greedy)
    #[arg(long, value_name = "T")]
    temperature: Option<f32>,
    /// Sample from the K most likely tokens
    #[arg(long, value_name = "K")]
    top_k: Option<u32>,
    /// Sample from the most likely tokens that reach this probability in sum
    #[arg(long, value_name = "P")]
    top_p: Option<f32>,
    /// Sample from tokens of at least this share of the best one's probability
    #[arg(long, value_name = "P")]
    min_p: Option<f32>,
    /// Key of the draws
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
    /// Text at which to stop (may be repeated)
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
}

impl Sampling {
    pub(crate) fn apply(&self, mut request: Request) -> Request {
        request.max_tokens = Some(self.max_tokens);
        request.sampling.temperature = self.temperature;
        request.sampling.top_k = self.top_k;
        request.sampling.top_p = self.top_p;
        request.sampling.min_p = self.min_p;
        request.sampling.seed = self.seed;
        request.stop = self.stop.clone();
        request
    }
}

pub(crate) fn run(options: Options) -> CommandResult {
    let prompt = read_prompt(&options)?;
    let engine = open_default(&options.model)?;
    options.trace.start(&engine)?;
    let request = if options.chat { Request::chat([Message::new("user", prompt)]) } else { Request::prompt(prompt) };
    let request = options.sampling.apply(request);
    if options.json {
        let completion = engine.complete(request)?;
        show(format_args!("{}\n", to_json(&completion, engine.info())))?;
    } else {
        for event in engine.generate(request)? {
            if let Event::Delta(Delta { text, .. }) = event? {
                show(text)?;
            }
        }
        show("\n")?;
    }
    options.trace.finish(&engine)?;
    Ok(())
}

fn read_prompt(options: &Options) -> std::io::Result<String> {
    match (&options.prompt, &options.prompt_file) {
        (Some(prompt), _) => Ok(prompt.clone()),
        (None, Some(path)) if path.as_os_str() == "-" => {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text)?;
            Ok(text)
        }
        (None, Some(path)) => std::fs::read_to_string(path),
        (None, None) => Ok(String::new()),
    }
}

fn to_json(completion: &Completion, info: &ModelInfo) -> serde_json::Value {
    let choice = &completion.choices[0];
    let (usage, timings) = (completion.summary.usage, completion.summary.timings);
    let by_tier = usage.cached_by_tier;
    json!({
        "text": choice.text,
        "token_ids": choice.token_ids,
        "finish_reason": choice.finish_reason.as_str(),
        "seed": completion.summary.seed,
        "from_response_cache": completion.summary.from_response_cache,
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "cached_tokens": usage.cached_tokens,
            "cached_by_tier": {
                "pool": by_tier.pool,
                "host": by_tier.host,
                "disk": by_tier.disk,
                "remote": by_tier.remote,
            },
            "prefix_miss": usage.prefix_miss.map(|miss| json!({
                "token": miss.token,
                "reason": miss.reason.as_str(),
                "tier": miss.reason.tier().map(CacheTier::as_str),
            })),
        },
        "timings": {
            "load_ms": info.load_ms,
            "queue_ms": timings.queue_ms,
            "prompt_ms": timings.prompt_ms,
            "first_token_ms": timings.first_token_ms,
            "decode_ms": timings.decode_ms,
        },
    })
}
