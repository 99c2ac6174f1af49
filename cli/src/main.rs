//! The command line. Each command is one file; this one holds what they share: the options of a model, opening it
//! behind a progress bar, and the rule that standard output carries only the result.

mod bench;
mod cache;
mod chat;
mod embed;
mod eval;
mod generate;
mod inspect;
mod model;
mod quantize;
mod serve;
mod trace;

use std::io::Write;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Native LLM inference: one engine, from the command line.
#[derive(Parser)]
#[command(name = "ns-llm", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Continue a prompt, or answer a message.
    Generate(generate::Options),
    /// Talk with a model.
    Chat(chat::Options),
    /// Turn texts into vectors.
    Embed(embed::Options),
    /// Answer over HTTP: OpenAI's routes, Ollama's, and ns-node's.
    Serve(serve::Options),
    /// Measure speed: one prompt, one stream, many streams.
    Bench(bench::Options),
    /// Show what a model consists of and the memory it needs.
    Inspect(inspect::Options),
    /// Write a model as a GGUF file of smaller numbers.
    Quantize(quantize::Options),
    /// Measure quality: perplexity of a text, exact match of tasks.
    Eval(eval::Options),
    /// Look after a directory of KV blocks: stat, verify, prune, clear.
    Cache(cache::Options),
}

/// What a command can fail with: an engine's error, or one of reading and writing files.
pub(crate) type CommandResult = Result<(), Box<dyn std::error::Error>>;

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Generate(options) => generate::run(options),
        Command::Chat(options) => chat::run(options),
        Command::Embed(options) => embed::run(options),
        Command::Serve(options) => serve::run(options),
        Command::Bench(options) => bench::run(options),
        Command::Inspect(options) => inspect::run(options),
        Command::Quantize(options) => quantize::run(options),
        Command::Eval(options) => eval::run(options),
        Command::Cache(options) => cache::run(options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read our output has read enough of it.
        Err(error) if is_broken_pipe(error.as_ref()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ns-llm: {error}");
            ExitCode::FAILURE
        }
    }
}

fn is_broken_pipe(error: &(dyn std::error::Error + 'static)) -> bool {
    error.downcast_ref::<std::io::Error>().is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}

/// Writes to standard output at once; a reader that is gone is an error, not a panic.
pub(crate) fn show(text: impl std::fmt::Display) -> std::io::Result<()> {
    let mut stdout = std::io::stdout().lock();
    write!(stdout, "{text}")?;
    stdout.flush()
}
