//! `ns-llm embed`: texts to vectors, one line each, or all of them as JSON.

use std::io::BufRead;

use clap::Args;
use ns_llm::{EmbeddingRequest, Embeddings, ModelInfo};
use serde_json::json;

use crate::model::{ModelOptions, open_default};
use crate::{CommandResult, show};

#[derive(Args)]
pub(crate) struct Options {
    #[command(flatten)]
    model: ModelOptions,
    /// A text (may be repeated); without any, each line of standard input is one
    #[arg(long, value_name = "TEXT")]
    text: Vec<String>,
    /// Leading elements of the vectors to keep
    #[arg(long, value_name = "N")]
    dimensions: Option<usize>,
    /// Fail when a text is too long for the model, instead of cutting it
    #[arg(long)]
    no_truncate: bool,
    /// Print one JSON object instead of lines of numbers
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(options: Options) -> CommandResult {
    let texts = match options.text.is_empty() {
        true => std::io::stdin().lock().lines().collect::<Result<_, _>>()?,
        false => options.text,
    };
    let mut request = EmbeddingRequest::new(texts);
    request.dimensions = options.dimensions;
    request.truncate = !options.no_truncate;
    request.validate()?;
    let engine = open_default(&options.model)?;
    let embeddings = engine.embed(request)?;
    if options.json {
        show(format_args!("{}\n", to_json(&embeddings, engine.info())))?;
        return Ok(());
    }
    for embedding in &embeddings.embeddings {
        let numbers: Vec<String> = embedding.values.iter().map(f32::to_string).collect();
        show(format_args!("{}\n", numbers.join(" ")))?;
    }
    Ok(())
}

fn to_json(embeddings: &Embeddings, info: &ModelInfo) -> serde_json::Value {
    let each = embeddings.embeddings.iter().map(|embedding| {
        json!({ "embedding": embedding.values, "tokens": embedding.tokens, "truncated": embedding.truncated })
    });
    json!({
        "model": info.name,
        "dimensions": embeddings.embeddings.first().map_or(0, |embedding| embedding.values.len()),
        "embeddings": each.collect::<Vec<_>>(),
        "usage": { "prompt_tokens": embeddings.summary.usage.prompt_tokens },
        "timings": { "load_ms": info.load_ms, "total_ms": embeddings.summary.timings.total_ms },
    })
}
