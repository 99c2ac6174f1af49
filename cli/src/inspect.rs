//! `ns-llm inspect`: what a model consists of, and the memory it would take, without reading its weights.

use std::fmt::Write;

use clap::Args;
use ns_llm::EngineOptions;
use ns_llm::inspect::{Inspection, inspect};
use serde_json::json;

use crate::model::ModelOptions;
use crate::{CommandResult, show};

#[derive(Args)]
pub(crate) struct Options {
    #[command(flatten)]
    model: ModelOptions,
    /// Print one JSON object instead of a table
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(options: Options) -> CommandResult {
    let engine_options = options.model.engine_options()?;
    let inspection = inspect(&engine_options)?;
    let tiers = tiers(&engine_options);
    if options.json {
        show(format_args!("{}\n", to_json(&inspection, &tiers)))?;
    } else {
        show(to_table(&inspection, &tiers)?)?;
    }
    Ok(())
}

/// The places beside the KV pool by their names, and their bytes.
fn tiers(options: &EngineOptions) -> Vec<(&'static str, u64)> {
    let host = (options.kv_host_bytes > 0).then_some(("host", options.kv_host_bytes));
    let disk = options.kv_cache_dir.as_ref().map(|_| ("disk", options.kv_disk_bytes));
    host.into_iter().chain(disk).collect()
}

fn to_json(i: &Inspection, tiers: &[(&str, u64)]) -> serde_json::Value {
    json!({
        "architecture": i.architecture,
        "hyperparameters": i.hyperparameters.iter().map(|(name, value)| (*name, value.clone())).collect::<std::collections::BTreeMap<_, _>>(),
        "tensors": i.tensors.iter().map(|t| json!({ "name": t.name, "shape": t.shape, "dtype": t.dtype })).collect::<Vec<_>>(),
        "num_parameters": i.num_parameters,
        "checkpoint_bytes": i.checkpoint_bytes,
        "tokenizer": { "vocab_size": i.tokenizer_vocab_size, "special_tokens": i.special_tokens },
        "chat_template": i.chat_template,
        "eos_token_ids": i.eos_token_ids,
        "device": i.device_name,
        "device_reason": i.device_reason,
        "memory": {
            "weights": i.weights,
            "weights_bytes": i.plan.weights_bytes,
            "workspace_bytes": i.plan.workspace_bytes,
            "kv_dtype": i.kv_dtype,
            "kv_block_bytes": i.plan.block_bytes,
            "kv_blocks": i.plan.num_blocks,
            "kv_bytes": i.plan.kv_bytes(),
            "context_tokens": i.plan.context_tokens,
            "kv_tiers": tiers.iter().map(|(name, bytes)| (name.to_string(), json!({
                "bytes": bytes,
                "blocks": bytes / i.stored_block_bytes,
            }))).collect::<serde_json::Map<_, _>>(),
            "levels": i.levels.iter().map(|level| json!({
                "weights": level.weights,
                "is_stored": level.is_stored,
                "weights_bytes": level.plan.weights_bytes,
                "kv_dtype": level.kv_dtype,
                "kv_bytes": level.plan.kv_bytes(),
                "total_bytes": level.plan.needed_bytes(),
                "context_tokens": level.plan.context_tokens,
                "fits": level.fits,
                "is_chosen": level.is_chosen,
            })).collect::<Vec<_>>(),
        },
    })
}

/// A table for people.
fn to_table(i: &Inspection, tiers: &[(&str, u64)]) -> Result<String, std::fmt::Error> {
    let mut out = String::new();
    writeln!(out, "architecture      {}", i.architecture)?;
    for (name, value) in &i.hyperparameters {
        writeln!(out, "  {name:<24}{value}")?;
    }
    writeln!(out, "parameters        {}", i.num_parameters)?;
    writeln!(out, "checkpoint        {}", mib(i.checkpoint_bytes))?;
    writeln!(out, "tokenizer         {} entries, special: {}", i.tokenizer_vocab_size, i.special_tokens.join(" "))?;
    writeln!(out, "end tokens        {:?}", i.eos_token_ids)?;
    writeln!(out, "chat template     {}", if i.chat_template.is_some() { "yes" } else { "no" })?;
    writeln!(out, "device            {}: {}", i.device_name, i.device_reason)?;
    writeln!(out, "memory plan")?;
    writeln!(out, "  weights         {} as {}", mib(i.plan.weights_bytes), i.weights)?;
    writeln!(
        out,
        "  KV pool         {} as {}: {} blocks of {} bytes",
        mib(i.plan.kv_bytes()),
        i.kv_dtype,
        i.plan.num_blocks,
        i.plan.block_bytes
    )?;
    if i.plan.workspace_bytes > 0 {
        writeln!(out, "  steps           {}", mib(i.plan.workspace_bytes))?;
    }
    for (name, bytes) in tiers {
        writeln!(out, "  KV, {name:<4}        {}: some {} blocks", mib(*bytes), bytes / i.stored_block_bytes)?;
    }
    writeln!(out, "  context         {} tokens", i.plan.context_tokens)?;
    writeln!(out, "weights in other forms (--weights; under --memory-limit-mib the first that fits)")?;
    for level in &i.levels {
        let stored = if level.is_stored { " (as stored)" } else { "" };
        let mark = match (level.is_chosen, level.fits) {
            (true, _) => "*",
            (false, true) => " ",
            (false, false) => "-",
        };
        let (weights, kv) = (mib(level.plan.weights_bytes), mib(level.plan.kv_bytes()));
        let (form, total) = (format!("{}{stored}", level.weights), mib(level.plan.needed_bytes()));
        writeln!(out, "{mark} {form:<24}{weights:>14} + KV {kv:>12} = {total:>12}")?;
    }
    writeln!(out, "                  *: would be taken   -: does not fit")?;
    writeln!(out, "tensors           {}", i.tensors.len())?;
    for tensor in &i.tensors {
        writeln!(out, "  {:<56}{:<6}{:?}", tensor.name, tensor.dtype, tensor.shape)?;
    }
    Ok(out)
}

fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}
