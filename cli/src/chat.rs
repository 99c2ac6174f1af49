//! `ns-llm chat`: a conversation on the terminal. Every turn sends the whole conversation; what was said before is
//! found in the prefix cache.

use std::io::{BufRead, IsTerminal, Write};

use clap::Args;
use ns_llm::{Delta, Engine, Event, Message, Request};

use crate::generate::Sampling;
use crate::model::{ModelOptions, open_default};
use crate::{CommandResult, show};

#[derive(Args)]
pub(crate) struct Options {
    #[command(flatten)]
    model: ModelOptions,
    #[command(flatten)]
    sampling: Sampling,
    /// The system message
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
}

pub(crate) fn run(options: Options) -> CommandResult {
    let engine = open_default(&options.model)?;
    let stdin = std::io::stdin();
    let is_terminal = stdin.is_terminal();
    if is_terminal {
        eprintln!(
            "{} on {} ({}). An empty line or Ctrl-D ends it.",
            engine.info().name,
            engine.info().device_name,
            engine.info().isa
        );
    }
    let mut messages: Vec<Message> = options.system.iter().map(|text| Message::new("system", text.clone())).collect();
    let mut lines = stdin.lock().lines();
    loop {
        if is_terminal {
            eprint!("> ");
            std::io::stderr().flush()?;
        }
        let Some(line) = lines.next().transpose()?.filter(|line| !line.trim().is_empty()) else {
            return Ok(());
        };
        messages.push(Message::new("user", line));
        match answer(&engine, options.sampling.apply(Request::chat(messages.clone()))) {
            Ok(text) => messages.push(Message::new("assistant", text)),
            Err(error) if error.is::<ns_llm::Error>() => {
                // The conversation goes on without what could not be answered.
                messages.pop();
                eprintln!("ns-llm: {error}");
            }
            Err(error) => return Err(error),
        }
    }
}

/// Shows an answer as it is made, and returns it.
fn answer(engine: &Engine, request: Request) -> Result<String, Box<dyn std::error::Error>> {
    let mut answer = String::new();
    for event in engine.generate(request)? {
        if let Event::Delta(Delta { text, .. }) = event? {
            show(&text)?;
            answer.push_str(&text);
        }
    }
    show("\n")?;
    Ok(answer)
}
