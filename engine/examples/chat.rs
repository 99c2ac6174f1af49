//! A conversation of three turns; each sends all that was said, of which the cache has all but the new turn:
//! `cargo run --release --example chat`.

use ns_llm::{Engine, EngineOptions, Message, Request};

fn main() -> ns_llm::Result<()> {
    let engine = Engine::open(EngineOptions::new("models/demo"))?;
    let mut messages = Vec::new();
    for question in ["My name is Mia.", "What is the capital of Italy?", "What is my name?"] {
        messages.push(Message::new("user", question));
        let request = Request::chat(messages.clone()).max_tokens(48).temperature(0.0);
        let mut completion = engine.complete(request)?;
        let answer = completion.choices.remove(0).text;
        let usage = completion.summary.usage;
        println!("> {question}\n{answer}   ({} of {} prompt tokens cached)", usage.cached_tokens, usage.prompt_tokens);
        messages.push(Message::new("assistant", answer));
    }
    Ok(())
}
