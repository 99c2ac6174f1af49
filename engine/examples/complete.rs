//! Continues a prompt, token by token: `cargo run --release --example complete -- "Once upon a time"`.

use std::io::Write;

use ns_llm::{Engine, EngineOptions, Event, Request};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let prompt = std::env::args().nth(1).unwrap_or_else(|| "Once upon a time".to_string());
    let engine = Engine::open(EngineOptions::new("models/demo"))?;
    print!("{prompt}");
    for event in engine.generate(Request::prompt(prompt).max_tokens(200))? {
        match event? {
            Event::Delta(delta) => {
                print!("{}", delta.text);
                std::io::stdout().flush()?;
            }
            Event::Done(summary) => println!("\n{:?}\n{:?}", summary.usage, summary.timings),
            _ => {}
        }
    }
    Ok(())
}
