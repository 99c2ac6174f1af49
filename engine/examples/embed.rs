//! Texts to vectors: `embed MODEL TEXTS OUT [THREADS]`. `TEXTS` is a JSON list of strings; `OUT` gets their vectors in the
//! same order, the tokens of each, and the seconds that all of them took together.

use std::error::Error;
use std::time::Instant;

use ns_llm::{EmbeddingRequest, Engine, EngineOptions};
use serde_json::json;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (model, texts, out, threads) = match arguments.as_slice() {
        [model, texts, out] => (model, texts, out, None),
        [model, texts, out, threads] => (model, texts, out, Some(threads.parse()?)),
        _ => return Err("usage: embed MODEL TEXTS OUT [THREADS]".into()),
    };
    let texts: Vec<String> = serde_json::from_slice(&std::fs::read(texts)?)?;
    let mut options = EngineOptions::new(model);
    options.threads = threads;
    let engine = Engine::open(options)?;
    // The first use of memory costs more than its second.
    engine.embed(EmbeddingRequest::new([texts[0].as_str()]))?;
    let start = Instant::now();
    let embeddings = engine.embed(EmbeddingRequest::new(texts))?.embeddings;
    let seconds = start.elapsed().as_secs_f64();
    let (vectors, tokens): (Vec<_>, Vec<_>) = embeddings.into_iter().map(|e| (e.values, e.tokens)).unzip();
    let (isa, threads) = (engine.info().isa, engine.info().threads);
    let result = json!({ "vectors": vectors, "tokens": tokens, "seconds": seconds, "isa": isa, "threads": threads });
    std::fs::write(out, result.to_string())?;
    Ok(())
}
