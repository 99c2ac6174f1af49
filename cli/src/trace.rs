//! `--trace FILE`: what the engine did while a command ran, for `chrome://tracing` and Perfetto.

use std::path::PathBuf;

use clap::Args;
use ns_llm::Engine;
use ns_llm::config::MAX_TRACE_EVENTS;

use crate::CommandResult;

#[derive(Args, Clone)]
pub(crate) struct TraceOptions {
    /// Write what the engine does step by step to a file, as Chrome's trace events
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
}

impl TraceOptions {
    /// Begins to record, if that is wanted.
    pub(crate) fn start(&self, engine: &Engine) -> CommandResult {
        if self.trace.is_some() {
            engine.start_trace(MAX_TRACE_EVENTS)?;
        }
        Ok(())
    }

    /// Ends the recording and writes it.
    pub(crate) fn finish(&self, engine: &Engine) -> CommandResult {
        if let (Some(path), Some(trace)) = (&self.trace, engine.stop_trace()) {
            std::fs::write(path, trace).map_err(|error| format!("{}: {error}", path.display()))?;
        }
        Ok(())
    }
}
