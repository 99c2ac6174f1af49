//! `ns-llm quantize`: a model's files as one GGUF file of another type.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::Args;
use ns_llm::quantize::{FileType, QuantizeOptions, Quantized, quantize};
use serde_json::json;

use crate::model::Bar;
use crate::{CommandResult, show};

#[derive(Args)]
pub(crate) struct Options {
    /// Folder of the model, or its .gguf file
    #[arg(long, value_name = "PATH")]
    model: PathBuf,
    /// How matrices are stored: f32, f16, bf16, q8_0, q4_0, q4_1, q5_0, q5_1, iq4_nl, mxfp4, or a mix: q2_k, q3_k_s,
    /// q3_k_m, q3_k_l, q4_k_s, q4_k_m, q5_k_s, q5_k_m, q6_k (q3_k, q4_k and q5_k are the medium ones)
    #[arg(long = "type", value_name = "TYPE", value_parser = |name: &str| FileType::from_name(name))]
    file_type: FileType,
    /// The .gguf file to write
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// Replace the file if it is there
    #[arg(long)]
    force: bool,
    /// Store all matrices alike instead of giving some of a mix more bits
    #[arg(long)]
    pure: bool,
    /// Compute threads (default: all cores)
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(options: Options) -> CommandResult {
    let mut wanted = QuantizeOptions::new(&options.model, &options.output, options.file_type);
    (wanted.pure, wanted.overwrite, wanted.threads) = (options.pure, options.force, options.threads);
    let bar = Bar::new("quantizing");
    wanted.on_progress = bar.callback();
    let quantized = quantize(wanted);
    drop(bar);
    let quantized = quantized?;
    if options.json {
        show(format_args!("{}\n", to_json(&options, &quantized)))?;
    } else {
        show(to_text(&options, &quantized))?;
    }
    Ok(())
}

/// How many tensors have each type.
fn counts(quantized: &Quantized) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for tensor in &quantized.tensors {
        *counts.entry(tensor.dtype.to_lowercase()).or_default() += 1;
    }
    counts
}

fn bits_per_weight(quantized: &Quantized) -> f64 {
    8.0 * quantized.file_bytes as f64 / quantized.num_parameters as f64
}

fn to_json(options: &Options, quantized: &Quantized) -> serde_json::Value {
    json!({
        "output": options.output,
        "type": options.file_type.name(),
        "source_bytes": quantized.source_bytes,
        "file_bytes": quantized.file_bytes,
        "num_parameters": quantized.num_parameters,
        "bits_per_weight": bits_per_weight(quantized),
        "tensors": counts(quantized),
    })
}

fn to_text(options: &Options, quantized: &Quantized) -> String {
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let counts: Vec<String> = counts(quantized).iter().map(|(dtype, count)| format!("{count} {dtype}")).collect();
    format!(
        "{}: {:.1} MiB from {:.1} MiB, {:.2} bits a weight (tensors: {})\n",
        options.output.display(),
        mib(quantized.file_bytes),
        mib(quantized.source_bytes),
        bits_per_weight(quantized),
        counts.join(", ")
    )
}
