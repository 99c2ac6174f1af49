//! The options of a model that every command has, and opening it.

use std::io::IsTerminal;
use std::ops::Deref;
use std::path::PathBuf;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use ns_llm::{
    Device, Engine, EngineOptions, Error, KvDtype, KvRemoteOptions, KvTierEncoding, KvTierStats, ProgressCallback,
    Result, ThreadPriority, WeightFormat,
};
use serde_json::{Value, json};

/// Which model, and how to run it.
#[derive(Args, Clone)]
pub(crate) struct ModelOptions {
    /// Folder of the model, or its .gguf file
    #[arg(long, value_name = "PATH", default_value = "models/demo")]
    pub(crate) model: PathBuf,
    /// Compute threads (default: all cores; one is left to the system when there are more than two)
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<usize>,
    /// Where to compute: auto (a CUDA device if there is one and the model fits, else the CPU), cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "auto", value_parser = |name: &str| Device::from_name(name))]
    pub(crate) device: Device,
    /// Form in which weights are kept: auto, f32, bf16, f16, or quantized as q8_0, q6_k, q5_k, q4_k, q3_k, q2_k, q5_1,
    /// q5_0, q4_1, q4_0, iq4_nl, mxfp4
    #[arg(long, value_name = "FORM", default_value = "auto", value_parser = |name: &str| WeightFormat::from_name(name))]
    pub(crate) weights: WeightFormat,
    /// Form in which keys and values are kept: auto (f32 with f32 weights, else f16), f32, f16, bf16, int8
    #[arg(long, value_name = "FORM", default_value = "auto", value_parser = |name: &str| kv_dtype(name))]
    pub(crate) kv_dtype: KvForm,
    /// Longest sequence, prompt and answer (tokens)
    #[arg(long, value_name = "TOKENS")]
    pub(crate) context: Option<usize>,
    /// Size of the KV pool (MiB)
    #[arg(long, value_name = "MIB")]
    pub(crate) kv_mib: Option<u64>,
    /// What weights and KV pool may take together (MiB); weights that are too large are rounded to the best form that fits
    #[arg(long, value_name = "MIB")]
    pub(crate) memory_limit_mib: Option<u64>,
    /// Tokens of a KV block, the unit in which prefixes are kept and found again
    #[arg(long, value_name = "TOKENS")]
    pub(crate) block_tokens: Option<usize>,
    /// Steps that a CUDA device keeps captured as graphs (0: steps are launched kernel by kernel; default: 32)
    #[arg(long, value_name = "N")]
    pub(crate) max_cuda_graphs: Option<usize>,
    /// Part of the KV pool and of host memory that one namespace may keep while others want it (0 to 1; default: 1)
    #[arg(long, value_name = "PART")]
    pub(crate) kv_namespace_share: Option<f64>,
    /// Tokens of prompts that one step may compute while nothing decodes (default: 512)
    #[arg(long, value_name = "TOKENS")]
    pub(crate) prefill_budget: Option<usize>,
    /// Tokens that one step may compute while something decodes (default: 128)
    #[arg(long, value_name = "TOKENS")]
    pub(crate) mixed_budget: Option<usize>,
    /// Compute each prompt whole, also where another has begun alike
    #[arg(long)]
    pub(crate) no_prefix_cache: bool,
    /// Directory where keys and values are kept, and found again by the next run with the same model
    #[arg(long, value_name = "DIRECTORY")]
    pub(crate) kv_cache_dir: Option<PathBuf>,
    /// What the files in --kv-cache-dir take at most (MiB; default: 8192)
    #[arg(long, value_name = "MIB", requires = "kv_cache_dir")]
    pub(crate) kv_disk_mib: Option<u64>,
    /// Host memory for keys and values that the KV pool gives away (MiB; default: 0)
    #[arg(long, value_name = "MIB")]
    pub(crate) kv_host_mib: Option<u64>,
    /// How keys and values are kept outside the KV pool: as-computed, or int8 (rounded to 8 bits, in half the bytes)
    #[arg(long, value_name = "FORM", default_value = "as-computed", value_parser = |name: &str| KvTierEncoding::from_name(name))]
    pub(crate) kv_tier_encoding: KvTierEncoding,
    /// How long to wait for keys and values from a place that makes no progress before computing them (ms; default: 50)
    #[arg(long, value_name = "MS")]
    pub(crate) kv_load_budget_ms: Option<u64>,
    /// Store of keys and values that nodes share: redis://[[user]:password@]host[:port][/database]
    #[arg(long, value_name = "URL")]
    pub(crate) kv_remote_url: Option<String>,
    /// File with what all nodes know and the store does not: records that it does not authenticate are not used
    #[arg(long, value_name = "FILE", requires = "kv_remote_url")]
    pub(crate) kv_remote_secret_file: Option<PathBuf>,
    /// Seconds after which the store forgets what was written to it
    #[arg(long, value_name = "SECONDS", requires = "kv_remote_url")]
    pub(crate) kv_remote_ttl_s: Option<u64>,
    /// What the names of all records in the store begin with
    #[arg(long, value_name = "TEXT", requires = "kv_remote_url")]
    pub(crate) kv_remote_prefix: Option<String>,
    /// Longest time of one call to the store (ms)
    #[arg(long, value_name = "MS", requires = "kv_remote_url")]
    pub(crate) kv_remote_timeout_ms: Option<u64>,
    /// What is stored at --kv-remote-url within a day for one owner of namespaces, a key of `serve` (MiB; default: no limit)
    #[arg(long, value_name = "MIB", requires = "kv_remote_url")]
    pub(crate) kv_remote_owner_mib: Option<u64>,
    /// Keep whole answers in so much memory, and give them again to requests for the same (MiB; default: 0). They are found
    /// again in --kv-cache-dir, and shared through --kv-remote-url
    #[arg(long, value_name = "MIB")]
    pub(crate) response_cache_mib: Option<u64>,
    /// How long an answer is kept (milliseconds; default: one hour)
    #[arg(long, value_name = "MS")]
    pub(crate) response_ttl_ms: Option<u64>,
    /// Keep an answer longer the more often it is asked for
    #[arg(long)]
    pub(crate) response_adaptive_ttl: bool,
    /// What the files with answers take at most, beneath --kv-cache-dir (MiB; 0: no answers there; default: 256)
    #[arg(long, value_name = "MIB")]
    pub(crate) response_disk_mib: Option<u64>,
    /// Do not share answers through --kv-remote-url
    #[arg(long)]
    pub(crate) no_response_remote: bool,
    /// Answers kept in memory at most (default: as many as fit)
    #[arg(long, value_name = "N")]
    pub(crate) response_max_entries: Option<u64>,
    /// Number of what answers depend on beside the request, such as documents: answers of another version are not found
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) response_version: u64,
}

/// A form of keys and values, or `None`: the one that suits the weights. Not an `Option`, which clap takes for an option
/// that may be missing.
#[derive(Clone, Copy)]
pub(crate) struct KvForm(Option<KvDtype>);

fn kv_dtype(name: &str) -> Result<KvForm> {
    KvDtype::from_name_or_auto(name).map(KvForm)
}

impl ModelOptions {
    /// The engine's options; a command may change them before [`open`].
    pub(crate) fn engine_options(&self) -> Result<EngineOptions> {
        let mut options = EngineOptions::new(&self.model);
        options.threads = self.threads;
        options.thread_priority = ThreadPriority::Normal;
        options.device = self.device;
        options.weights = self.weights;
        options.kv_dtype = self.kv_dtype.0;
        options.context_tokens = self.context;
        let bytes = |mib: Option<u64>| mib.map(|mib| mib.saturating_mul(1 << 20));
        options.kv_bytes = bytes(self.kv_mib);
        options.memory_limit_bytes = bytes(self.memory_limit_mib);
        options.block_tokens = self.block_tokens.unwrap_or(options.block_tokens);
        options.max_cuda_graphs = self.max_cuda_graphs.unwrap_or(options.max_cuda_graphs);
        options.prefill_budget_tokens = self.prefill_budget.unwrap_or(options.prefill_budget_tokens);
        options.mixed_budget_tokens = self.mixed_budget.unwrap_or(options.mixed_budget_tokens);
        options.prefix_cache = !self.no_prefix_cache;
        options.kv_namespace_share = self.kv_namespace_share.unwrap_or(options.kv_namespace_share);
        options.kv_cache_dir = self.kv_cache_dir.clone();
        options.kv_disk_bytes = bytes(self.kv_disk_mib).unwrap_or(options.kv_disk_bytes);
        options.kv_host_bytes = bytes(self.kv_host_mib).unwrap_or(options.kv_host_bytes);
        options.kv_load_budget_ms = self.kv_load_budget_ms.unwrap_or(options.kv_load_budget_ms);
        options.kv_remote = self.kv_remote()?;
        options.kv_tier_encoding = self.kv_tier_encoding;
        options.response_cache.max_bytes = bytes(self.response_cache_mib).unwrap_or(0);
        options.response_cache.ttl_ms = self.response_ttl_ms.unwrap_or(options.response_cache.ttl_ms);
        options.response_cache.adaptive_ttl = self.response_adaptive_ttl;
        options.response_cache.disk_bytes = bytes(self.response_disk_mib).unwrap_or(options.response_cache.disk_bytes);
        options.response_cache.remote = !self.no_response_remote;
        options.response_cache.max_entries = self.response_max_entries.unwrap_or(options.response_cache.max_entries);
        options.response_cache.version = self.response_version;
        Ok(options)
    }

    /// The secret comes from a file: arguments are seen by everyone on the machine.
    fn kv_remote(&self) -> Result<Option<KvRemoteOptions>> {
        let Some(url) = &self.kv_remote_url else { return Ok(None) };
        let mut remote = KvRemoteOptions::new(url);
        remote.ttl_s = self.kv_remote_ttl_s.unwrap_or(remote.ttl_s);
        remote.timeout_ms = self.kv_remote_timeout_ms.unwrap_or(remote.timeout_ms);
        if let Some(prefix) = &self.kv_remote_prefix {
            remote.prefix.clone_from(prefix);
        }
        remote.owner_bytes = self.kv_remote_owner_mib.map(|mib| mib.saturating_mul(1 << 20));
        let Some(path) = &self.kv_remote_secret_file else { return Ok(Some(remote)) };
        let secret = std::fs::read_to_string(path)
            .map_err(|error| Error::Io { path: path.clone(), reason: error.to_string() })?;
        Ok(Some(remote.secret(secret.trim_end_matches(['\r', '\n']))))
    }
}

/// A bar on standard error while something long is done, when that is a terminal.
pub(crate) struct Bar(Option<ProgressBar>);

impl Bar {
    pub(crate) fn new(verb: &str) -> Bar {
        let style = || {
            ProgressStyle::with_template(&format!("{verb} {{bar:30}} {{bytes}}/{{total_bytes}} {{bytes_per_sec}}"))
                .expect("the template is constant")
        };
        Bar(std::io::stderr().is_terminal().then(|| ProgressBar::new(0).with_style(style())))
    }

    /// What moves the bar.
    pub(crate) fn callback(&self) -> Option<ProgressCallback> {
        let shown = self.0.clone()?;
        Some(Box::new(move |progress| {
            shown.set_length(progress.total_bytes);
            shown.set_position(progress.loaded_bytes);
            true
        }))
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}

/// The engine of a command. However the command ends, what it computed is written to the places that outlive it.
pub(crate) struct OpenModel(Engine);

impl Deref for OpenModel {
    type Target = Engine;

    fn deref(&self) -> &Engine {
        &self.0
    }
}

impl Drop for OpenModel {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// Opens a model behind a bar.
pub(crate) fn open(mut options: EngineOptions) -> Result<OpenModel> {
    let bar = Bar::new("loading");
    options.on_progress = bar.callback();
    let engine = Engine::open(options)?;
    drop(bar);
    if let Some(refusal) = &engine.info().kv_disk_refusal {
        eprintln!("warning: nothing is stored in the KV cache directory: {refusal}");
    }
    Ok(OpenModel(engine))
}

/// What the places beside the KV pool hold and did, by their names.
pub(crate) fn kv_tiers(engine: &Engine) -> Value {
    let tier = |tier: &KvTierStats| {
        let report = json!({
            "blocks": tier.blocks,
            "bytes": tier.bytes,
            "hits": tier.hits,
            "hit_bytes": tier.hit_bytes,
            "misses": tier.misses,
            "stored": tier.stored,
            "evictions": tier.evictions,
            "faults": tier.faults,
        });
        (tier.name.to_string(), report)
    };
    Value::Object(engine.stats().kv_tiers.iter().map(tier).collect())
}

/// What became of steps that a CUDA device captures; `null` on the CPU.
pub(crate) fn cuda_graphs(engine: &Engine) -> Value {
    engine.stats().cuda_graphs.map_or(Value::Null, |graphs| {
        json!({
            "kept": graphs.kept,
            "captured": graphs.captured,
            "launched": graphs.launched,
            "evicted": graphs.evicted,
            "refusal": graphs.refusal,
        })
    })
}

/// Opens a model with the options as they are.
pub(crate) fn open_default(options: &ModelOptions) -> Result<OpenModel> {
    open(options.engine_options()?)
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use clap::{CommandFactory, Parser};
    use ns_llm::option_names::options_by_name;

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        model: ModelOptions,
    }

    fn options(arguments: &[&str]) -> BTreeMap<&'static str, String> {
        let command =
            Command::try_parse_from([&["ns-llm"], arguments].concat()).unwrap_or_else(|error| panic!("{error}"));
        let options = command.model.engine_options().unwrap_or_else(|error| panic!("{error}"));
        options_by_name(&options).into_iter().collect()
    }

    /// Every option that the table gives the command line is there under its name, sets the engine's option of that name, and
    /// no other; and no flag is there that the table does not have.
    #[test]
    fn options_are_those_of_the_table() {
        let table: Value =
            serde_json::from_str(include_str!("../../engine/engine_options.json")).expect("the table is JSON");
        // Any file will do for a secret.
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
        let mut flags = BTreeSet::new();
        for row in table["options"].as_array().expect("rows") {
            let (Some(option), Some(flag)) = (row["option"].as_str(), row["cli"].as_str()) else { continue };
            let flag = flag.replace("SECRET_FILE", file);
            let others: &[&str] = match option.split_once('.') {
                Some(("kv_remote", name)) if name != "url" => &["--kv-remote-url=redis://store"],
                _ if option == "kv_disk_bytes" => &["--kv-cache-dir=/elsewhere"],
                _ => &[],
            };
            let before = options(others);
            let after = options(&[others, &[&flag]].concat());
            let changed: Vec<_> = after.iter().filter(|(option, value)| before[*option] != **value).collect();
            assert_eq!(changed, [(&option, &row["value"].as_str().expect("a value").to_string())], "{flag}");
            flags.extend(flag.trim_start_matches("--").split('=').next().map(str::to_string));
        }
        let command = Command::command();
        let known = command.get_arguments().filter_map(|argument| argument.get_long().map(str::to_string));
        assert_eq!(known.collect::<BTreeSet<_>>(), flags);
    }
}
