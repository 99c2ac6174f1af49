//! Answers many questions at once: they share one engine, one batch, and the prefix that they have in common.

use ns_llm::{Engine, EngineOptions, Message, Request, RequestStream};

fn main() -> ns_llm::Result<()> {
    let engine = Engine::open(EngineOptions::new("models/demo"))?;
    let countries = ["France", "Spain", "Italy", "Japan", "Egypt", "Peru"];
    let ask = |country: &&str| -> ns_llm::Result<RequestStream> {
        let question = format!("What is the capital of {country}?");
        engine.generate(Request::chat([Message::new("user", question)]).max_tokens(32))
    };
    // All are submitted before the first is read.
    let streams = countries.iter().map(ask).collect::<ns_llm::Result<Vec<_>>>()?;
    for (country, stream) in countries.iter().zip(streams) {
        let mut answer = String::new();
        for event in stream {
            if let ns_llm::Event::Delta(delta) = event? {
                answer.push_str(&delta.text);
            }
        }
        println!("{country}: {answer}");
    }
    println!("{:?}", engine.stats());
    Ok(())
}
