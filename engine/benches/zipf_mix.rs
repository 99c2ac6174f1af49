//! Question: what do the caches bring where some prompts are asked far more often than others, and do they keep to their
//! budgets? A mix of prompts of 100 B to 10 KB, drawn by Zipf's law (rank to the power of -1), several at once, without
//! caches, with the pool alone, and with host memory and disk below it. Memory and files are watched every 100 ms.
//!
//! `cargo bench -p ns-llm --bench zipf_mix -- [MODEL [PROMPTS [REQUESTS [CONCURRENCY]]]]`. Prints a table and, last, one JSON
//! object.

#[path = "../../cli/src/bench/prompt_mix.rs"]
mod prompt_mix;

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use ns_llm::{Engine, EngineOptions, Request, Stats};
use prompt_mix::{Rng, Zipf, prompt};

const NEW_TOKENS: usize = 8;
const HOST_BYTES: u64 = 256 << 20;
const DISK_BYTES: u64 = 512 << 20;

struct Run {
    stats: Stats,
    seconds: f64,
    /// Sorted, milliseconds.
    latencies: Vec<f64>,
    first_token_ms: Vec<f64>,
    max_resident_bytes: u64,
    max_disk_bytes: u64,
    max_host_bytes: u64,
}

struct Mix {
    num_prompts: usize,
    num_requests: usize,
    concurrency: usize,
}

impl Mix {
    fn run(&self, engine: &Engine, folder: &Path) -> Run {
        let zipf = Zipf::new(self.num_prompts);
        // A token of the demo model has three to four bytes; the answer needs room too.
        let max_bytes = engine.info().context_tokens * 2;
        let (next, done) = (AtomicUsize::new(0), AtomicBool::new(false));
        let latencies = Mutex::new(Vec::new());
        let (resident, disk, host) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
        let start = Instant::now();
        let mut seconds = 0.0;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    resident.fetch_max(resident_bytes(), Ordering::Relaxed);
                    disk.fetch_max(folder_bytes(folder), Ordering::Relaxed);
                    let host_bytes = engine.stats().kv_tiers.first().map_or(0, |tier| tier.bytes);
                    host.fetch_max(host_bytes, Ordering::Relaxed);
                    std::thread::sleep(Duration::from_millis(100));
                }
            });
            let clients: Vec<_> = (0..self.concurrency)
                .map(|_| {
                    scope.spawn(|| {
                        loop {
                            let idx = next.fetch_add(1, Ordering::Relaxed);
                            if idx >= self.num_requests {
                                return;
                            }
                            let text = prompt(zipf.draw(&mut Rng(idx as u64)), max_bytes);
                            let request = Request::prompt(text).max_tokens(NEW_TOKENS).temperature(0.0);
                            let start = Instant::now();
                            let completion = engine.complete(request).expect("runs");
                            let elapsed_ms = start.elapsed().as_secs_f64() * 1e3;
                            let first_ms = completion.summary.timings.first_token_ms;
                            latencies.lock().expect("no panic").push((elapsed_ms, first_ms));
                        }
                    })
                })
                .collect();
            clients.into_iter().for_each(|client| client.join().expect("no panic"));
            seconds = start.elapsed().as_secs_f64();
            done.store(true, Ordering::Relaxed);
        });
        let (mut latencies, mut first_token_ms): (Vec<f64>, Vec<f64>) =
            latencies.into_inner().expect("no panic").into_iter().unzip();
        latencies.sort_by(f64::total_cmp);
        first_token_ms.sort_by(f64::total_cmp);
        Run {
            stats: engine.stats(),
            seconds,
            latencies,
            first_token_ms,
            max_resident_bytes: resident.into_inner(),
            max_disk_bytes: disk.into_inner(),
            max_host_bytes: host.into_inner(),
        }
    }
}

fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok()).map_or(0, |kib| kib * 1024)
}

fn folder_bytes(folder: &Path) -> u64 {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| Some(entry.metadata().ok()?.len())).sum()
}

fn percentile(sorted: &[f64], share: f64) -> f64 {
    sorted[((sorted.len() as f64 * share) as usize).min(sorted.len() - 1)]
}

fn main() {
    let mut args = std::env::args().skip(1).filter(|arg| !arg.starts_with("--"));
    let default_model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo");
    let model = args.next().map_or(default_model, PathBuf::from);
    let mut number = |default| args.next().map_or(default, |text| text.parse().expect("a number"));
    let mix = Mix { num_prompts: number(10_000), num_requests: number(2_000), concurrency: number(8) };
    let folder = std::env::temp_dir().join(format!("ns-llm-zipf-mix-{}", std::process::id()));
    println!(
        "{} requests of {} prompts (Zipf, 100 B to 10 KB), {} at once, {NEW_TOKENS} new tokens each",
        mix.num_requests, mix.num_prompts, mix.concurrency
    );
    println!(
        "{:<22} {:>8} {:>10} {:>8} {:>8} {:>8} {:>8} {:>9} {:>9} {:>9}",
        "caches", "found", "computed", "req/s", "p50 ms", "p95 ms", "p99 ms", "resident", "host", "disk"
    );
    let mut json = Vec::new();
    for (name, prefix_cache, host_bytes, directory) in [
        ("none", false, 0, false),
        ("pool", true, 0, false),
        ("pool, host", true, HOST_BYTES, false),
        ("pool, host, disk", true, HOST_BYTES, true),
        ("the same, restarted", true, HOST_BYTES, true),
    ] {
        let mut options = EngineOptions::new(&model).kv_bytes(64 << 20);
        options.prefix_cache = prefix_cache;
        options.kv_host_bytes = host_bytes;
        options.kv_cache_dir = directory.then(|| folder.clone());
        options.kv_disk_bytes = DISK_BYTES;
        let engine = Engine::open(options).expect("the model opens");
        let run = mix.run(&engine, &folder);
        engine.close();
        let stats = &run.stats;
        let found = stats.prefix_cache_hits_total as f64 / stats.prompt_tokens_total as f64 * 100.0;
        let rate = mix.num_requests as f64 / run.seconds;
        let [p50, p95, p99] = [0.5, 0.95, 0.99].map(|share| percentile(&run.latencies, share));
        println!(
            "{name:<22} {found:>7.1}% {:>10} {rate:>8.1} {p50:>8.1} {p95:>8.1} {p99:>8.1} {:>6} MB {:>6} MB {:>6} MB",
            stats.computed_tokens_total,
            run.max_resident_bytes >> 20,
            run.max_host_bytes >> 20,
            run.max_disk_bytes >> 20,
        );
        assert!(run.max_host_bytes <= HOST_BYTES && run.max_disk_bytes <= DISK_BYTES, "a budget was exceeded");
        json.push(format!(
            "{{\"caches\":\"{name}\",\"found_percent\":{found:.2},\"computed_tokens\":{},\"requests_per_s\":{rate:.2},\"p50_ms\":{p50:.2},\"p95_ms\":{p95:.2},\"p99_ms\":{p99:.2},\"first_token_p50_ms\":{:.2},\"resident_bytes\":{},\"host_bytes\":{},\"disk_bytes\":{}}}",
            stats.computed_tokens_total,
            percentile(&run.first_token_ms, 0.5),
            run.max_resident_bytes,
            run.max_host_bytes,
            run.max_disk_bytes,
        ));
    }
    println!("{{\"runs\":[{}]}}", json.join(","));
    let _ = std::fs::remove_dir_all(&folder);
}
