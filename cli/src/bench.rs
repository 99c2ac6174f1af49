//! `ns-llm bench`: how fast a model runs here. Rules, the same as for the engines it is compared with: the prompt is
//! random token ids of which only the last position's logits are needed; decoding is greedy after a prompt of one token,
//! or of `--depth` tokens, the first token left out and the end of text ignored; n parallel sequences have different
//! prompts, and their generated tokens are counted while all n of them are generating. No prompt repeats, so the prefix
//! cache is off, unless a KV cache directory or host memory for KV is given, whose cost is then measured; and prompts are
//! computed in full chunks also while others decode, since it is their speed that is measured. `ns-llm bench serve` is
//! another: it loads a server.

mod arrivals;
mod figures;
mod prompt_mix;
mod serve;
mod target;

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use clap::{Args, Subcommand};
use ns_llm::{Engine, Event, Request, ResponseCacheOptions, Result};
use serde_json::{Value, json};

use crate::model::{ModelOptions, cuda_graphs, kv_tiers, open};
use crate::trace::TraceOptions;
use crate::{CommandResult, show};
use prompt_mix::Rng;

/// Sizes of one parallel sequence.
const PARALLEL_PROMPT_TOKENS: usize = 128;
const PARALLEL_GEN_TOKENS: usize = 64;
/// Lowest token id of a random prompt: below are bytes and control tokens in most vocabularies.
const FIRST_RANDOM_ID: u64 = 300;
const LAST_RANDOM_ID: u64 = 100_000;

#[derive(Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct Options {
    #[command(subcommand)]
    other: Option<Other>,
    #[command(flatten)]
    model: ModelOptions,
    #[command(flatten)]
    trace: TraceOptions,
    /// Length of the prompt
    #[arg(long, value_name = "N", default_value_t = 512)]
    prompt_tokens: usize,
    /// Length of the answer
    #[arg(long, value_name = "N", default_value_t = 128)]
    gen_tokens: usize,
    /// Length of the context that decoding starts after
    #[arg(long, value_name = "N", default_value_t = 1)]
    depth: usize,
    /// Numbers of parallel sequences, such as 1,4,8 (empty: none)
    #[arg(long, value_name = "LIST", default_value = "")]
    parallel: String,
    /// Runs of each figure; the median is shown
    #[arg(long, value_name = "N", default_value_t = 3)]
    repeat: usize,
    /// Print the JSON object on one line
    #[arg(long)]
    json: bool,
}

/// What is measured in place of an engine.
#[derive(Subcommand)]
enum Other {
    /// Load a server that speaks OpenAI's protocol: this one or another
    Serve(serve::Options),
}

/// One run of the figures of a single stream.
struct Single {
    prompt_ms: f64,
    decode_tps: f64,
    /// Tokens of context before the first that is counted as decoded, as the engine counted them.
    depth: usize,
}

struct Parallel {
    n: usize,
    gen_tps: f64,
    prompt_tps: f64,
    total_tps: f64,
}

pub(crate) fn run(options: Options) -> CommandResult {
    if let Some(Other::Serve(options)) = &options.other {
        return serve::run(options);
    }
    let counts: Vec<usize> = options
        .parallel
        .split(',')
        .map(str::trim)
        .filter(|n| !n.is_empty())
        .map(str::parse)
        .collect::<Result<_, _>>()?;
    let longest = counts.iter().max().copied().unwrap_or(1);
    let mut engine_options = options.model.engine_options()?;
    let keeps_kv = engine_options.kv_cache_dir.is_some() || engine_options.kv_host_bytes > 0;
    engine_options.prefix_cache &= keeps_kv;
    engine_options.response_cache = ResponseCacheOptions::default();
    engine_options.mixed_budget_tokens = engine_options.prefill_budget_tokens;
    engine_options.max_running_sequences = longest.max(1);
    let block_tokens = engine_options.block_tokens;
    let engine = open(engine_options)?;
    options.trace.start(&engine)?;

    // What an earlier run has left in the directory are other prompts.
    let state = if keeps_kv { nanoseconds_now() } else { 1 };
    let mut prompts = RandomPrompts { rng: Rng(state), vocab_size: engine.info().vocab_size as u64 };
    one_stream(&engine, prompts.next(16), 2)?; // first touch of buffers and threads
    let single =
        (0..options.repeat.max(1)).map(|_| single_run(&engine, &mut prompts, &options)).collect::<Result<Vec<_>>>()?;
    let parallel = counts
        .into_iter()
        .map(|n| {
            let runs = (0..options.repeat.max(1))
                .map(|_| parallel_run(&engine, &mut prompts, n))
                .collect::<Result<Vec<_>>>()?;
            Ok(median_by(runs, |run| run.gen_tps))
        })
        .collect::<Result<Vec<_>>>()?;
    options.trace.finish(&engine)?;
    let report = report(&engine, &options, block_tokens, &single, &parallel);
    show(format_args!("{}\n", if options.json { report.to_string() } else { serde_json::to_string_pretty(&report)? }))?;
    Ok(())
}

fn report(engine: &Engine, options: &Options, block_tokens: usize, single: &[Single], parallel: &[Parallel]) -> Value {
    let info = engine.info();
    let prompt_ms = median(single.iter().map(|run| run.prompt_ms).collect());
    let decode_tps = median(single.iter().map(|run| run.decode_tps).collect());
    let depth = single[0].depth;
    let prompt_tps = options.prompt_tokens as f64 / (prompt_ms / 1e3);
    // A token reads every weight, and the keys and values of every token before it.
    let mean_context = depth as f64 + options.gen_tokens as f64 / 2.0;
    let pool_tokens = engine.stats().kv_blocks_total * block_tokens;
    let memory = engine.memory();
    let kv_token_bytes = memory.kv_reserved_bytes as f64 / pool_tokens as f64;
    let decode_token_bytes = memory.weights_bytes as f64 + mean_context * kv_token_bytes;
    let round = |x: f64| (x * 100.0).round() / 100.0;
    json!({
        "model": info.name,
        "weights": info.weights,
        "kv_dtype": info.kv_dtype,
        "device": info.device_name,
        "isa": info.isa,
        "threads": info.threads,
        "load_ms": round(info.load_ms),
        "peak_rss_mib": peak_rss_mib(),
        "weights_bytes": memory.weights_bytes,
        "kv_token_bytes": kv_token_bytes,
        "prompt_tokens": options.prompt_tokens,
        "gen_tokens": options.gen_tokens,
        "depth": depth,
        "prompt_tps": round(prompt_tps),
        "decode_tps": round(decode_tps),
        "ttft_ms": round(prompt_ms),
        "decode_gb_per_s": round(decode_token_bytes * decode_tps / 1e9),
        "prompt_gops": round(2.0 * info.num_layer_parameters as f64 * prompt_tps / 1e9),
        "parallel": parallel.iter().map(|run| json!({
            "n": run.n,
            "gen_tps": round(run.gen_tps),
            "prompt_tps": round(run.prompt_tps),
            "total_tps": round(run.total_tps),
        })).collect::<Vec<_>>(),
        "kv_tiers": kv_tiers(engine),
        "cuda_graphs": cuda_graphs(engine),
    })
}

/// A prompt's time and the speed of decoding. A prompt that is as long as the depth is computed once for both: of many
/// thousand tokens it takes minutes.
fn single_run(engine: &Engine, prompts: &mut RandomPrompts, options: &Options) -> Result<Single> {
    let decode = one_stream(engine, prompts.next(options.depth), options.gen_tokens)?;
    let prompt_ms = if options.depth == options.prompt_tokens {
        decode.timings.prompt_ms
    } else {
        one_stream(engine, prompts.next(options.prompt_tokens), 1)?.timings.prompt_ms
    };
    let decode_tps = decode.usage.completion_tokens.saturating_sub(1) as f64 / (decode.timings.decode_ms / 1e3);
    Ok(Single { prompt_ms, decode_tps, depth: decode.usage.prompt_tokens })
}

fn one_stream(engine: &Engine, prompt: Vec<u32>, max_tokens: usize) -> Result<ns_llm::Summary> {
    Ok(engine.complete(greedy(prompt, max_tokens))?.summary)
}

fn greedy(prompt: Vec<u32>, max_tokens: usize) -> Request {
    let mut request = Request::tokens(prompt).max_tokens(max_tokens).temperature(0.0);
    request.ignore_eos = true;
    request
}

/// `n` sequences at once. One thread reads each stream, so that arrival times are those of the engine.
fn parallel_run(engine: &Engine, prompts: &mut RandomPrompts, n: usize) -> Result<Parallel> {
    let start = Instant::now();
    let streams = (0..n)
        .map(|_| engine.submit(greedy(prompts.next(PARALLEL_PROMPT_TOKENS), PARALLEL_GEN_TOKENS)))
        .collect::<Result<Vec<_>>>()?;
    let readers: Vec<_> = streams
        .into_iter()
        .map(|stream| {
            std::thread::spawn(move || -> Result<Vec<f64>> {
                let mut arrivals = Vec::with_capacity(PARALLEL_GEN_TOKENS);
                for event in stream {
                    if let Event::Delta(delta) = event? {
                        arrivals.resize(arrivals.len() + delta.token_ids.len(), start.elapsed().as_secs_f64());
                    }
                }
                Ok(arrivals)
            })
        })
        .collect();
    let arrivals = readers
        .into_iter()
        .map(|reader| reader.join().expect("a reader does not panic"))
        .collect::<Result<Vec<Vec<f64>>>>()?;
    let all_started = arrivals.iter().map(|times| times[0]).fold(0.0, f64::max);
    let first_ended = arrivals.iter().map(|times| times[times.len() - 1]).fold(f64::INFINITY, f64::min);
    let last_ended = arrivals.iter().map(|times| times[times.len() - 1]).fold(0.0, f64::max);
    let in_window = arrivals.iter().flatten().filter(|&&at| at > all_started && at <= first_ended).count();
    Ok(Parallel {
        n,
        gen_tps: in_window as f64 / (first_ended - all_started),
        prompt_tps: (n * PARALLEL_PROMPT_TOKENS) as f64 / all_started,
        total_tps: (n * (PARALLEL_PROMPT_TOKENS + PARALLEL_GEN_TOKENS)) as f64 / last_ended,
    })
}

/// Prompts of random ids that never repeat.
struct RandomPrompts {
    rng: Rng,
    vocab_size: u64,
}

impl RandomPrompts {
    fn next(&mut self, tokens: usize) -> Vec<u32> {
        let last = LAST_RANDOM_ID.min(self.vocab_size - 1);
        let first = FIRST_RANDOM_ID.min(last);
        (0..tokens).map(|_| (first + self.rng.next() % (last - first + 1)) as u32).collect()
    }
}

fn nanoseconds_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.as_nanos() as u64)
}

fn median(values: Vec<f64>) -> f64 {
    median_by(values, |&value| value)
}

fn median_by<T>(mut runs: Vec<T>, figure: impl Fn(&T) -> f64) -> T {
    runs.sort_by(|a, b| figure(a).total_cmp(&figure(b)));
    let middle = runs.len() / 2;
    runs.swap_remove(middle)
}

/// Largest resident size so far; `None` where the system does not tell.
fn peak_rss_mib() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().trim_end_matches(" kB").trim().parse::<u64>().ok().map(|kib| kib / 1024)
}
