//! Question: how much sooner is the first token there when the KV of a long prefix is found in the pool, in host memory or on
//! disk instead of being computed? Beside each: bytes moved, and how fast this machine copies memory and reads a file.
//!
//! `cargo bench -p ns-llm --bench prefix_tiers -- MODEL [PREFIX_TOKENS [ROUNDS]]`; the page cache is dropped only where the
//! user may do that; `NS_LLM_BENCH_REDIS_URL` names a store of its own to measure as well. Prints a table and, last, one JSON
//! object.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Instant;

use ns_llm::{CacheUse, CachedTokens, Engine, EngineOptions, KvRemoteOptions, Request};

const NEW_TOKENS: usize = 32;

struct Setup {
    model: PathBuf,
    folder: PathBuf,
    prefix_tokens: usize,
}

impl Setup {
    fn open(&self, host_bytes: u64, directory: bool) -> Engine {
        let mut options = EngineOptions::new(&self.model).context_tokens(self.prefix_tokens + 256);
        options.kv_host_bytes = host_bytes;
        options.kv_load_budget_ms = 1_000;
        options.kv_cache_dir = directory.then(|| self.folder.clone());
        // Room for one prompt and its answer, not for two.
        options.kv_bytes = Some(self.block_bytes() * (self.prefix_tokens as u64 / 16 + 16));
        Engine::open(options).expect("the model opens")
    }

    fn open_remote(&self, url: &str) -> Engine {
        let mut options = EngineOptions::new(&self.model).context_tokens(self.prefix_tokens + 256);
        options.kv_bytes = Some(self.block_bytes() * (self.prefix_tokens as u64 / 16 + 16));
        options.kv_load_budget_ms = 10_000;
        Engine::open(options.kv_remote(KvRemoteOptions::new(url).timeout_ms(10_000))).expect("the model opens")
    }

    fn block_bytes(&self) -> u64 {
        let options = EngineOptions::new(&self.model).context_tokens(64).kv_bytes(1 << 28);
        ns_llm::inspect::inspect(&options).expect("the model can be inspected").plan.block_bytes
    }
}

/// One answer: milliseconds to its first token and to its last, and where its prefix was.
#[derive(Clone, Copy)]
struct Answer {
    first_token_ms: f64,
    total_ms: f64,
    cached: CachedTokens,
}

fn answer(engine: &Engine, prompt: &[u32], prefix_cache: CacheUse) -> Answer {
    let mut request = Request::tokens(prompt).max_tokens(NEW_TOKENS).temperature(0.0);
    request.ignore_eos = true;
    request.prefix_cache = prefix_cache;
    let start = Instant::now();
    let completion = engine.complete(request).expect("runs");
    let first_token_ms = completion.summary.timings.first_token_ms;
    let cached = completion.summary.usage.cached_by_tier;
    Answer { first_token_ms, total_ms: start.elapsed().as_secs_f64() * 1e3, cached }
}

/// Tokens of the middle of the vocabulary, away from the special ones.
fn prompt(name: u32, num_tokens: usize, vocab_size: u32) -> Vec<u32> {
    let draw = |i: u32| (i.wrapping_mul(2_654_435_761) ^ name.wrapping_mul(97)) >> 7;
    (0..num_tokens as u32).map(|i| vocab_size / 4 + draw(i) % (vocab_size / 2)).collect()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Whether the page cache is empty of files now.
fn drop_page_cache() -> bool {
    let _ = std::process::Command::new("sync").status();
    std::fs::write("/proc/sys/vm/drop_caches", "1").is_ok()
}

/// Bytes per second of reading all segment files from beginning to end.
fn read_speed(folder: &Path) -> f64 {
    let mut buffer = vec![0; 4 << 20];
    let (mut bytes, start) = (0, Instant::now());
    for entry in std::fs::read_dir(folder).expect("the directory").flatten() {
        let Ok(mut file) = File::open(entry.path()) else { continue };
        while let Ok(count @ 1..) = file.read(&mut buffer) {
            bytes += count;
        }
    }
    bytes as f64 / start.elapsed().as_secs_f64()
}

/// Bytes per second of copying between buffers that are there already.
fn copy_speed() -> f64 {
    let from = vec![1_u8; 256 << 20];
    let mut to = vec![2_u8; 256 << 20];
    let start = Instant::now();
    to.copy_from_slice(&from);
    let elapsed = start.elapsed();
    assert_eq!(to[17], 1);
    from.len() as f64 / elapsed.as_secs_f64()
}

fn main() {
    let mut args = std::env::args().skip(1).filter(|arg| !arg.starts_with("--"));
    let default_model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo");
    let model = args.next().map_or(default_model, PathBuf::from);
    let mut number = |default| args.next().map_or(default, |text| text.parse().expect("a number"));
    let (prefix_tokens, rounds) = (number(400), number(3));
    let folder = std::env::temp_dir().join(format!("ns-llm-prefix-tiers-{}", std::process::id()));
    let setup = Setup { model, folder, prefix_tokens };
    let block_bytes = setup.block_bytes();

    let mut rows: Vec<(&str, Vec<Answer>)> = Vec::new();
    let engine = setup.open(1 << 40, true);
    let vocab_size = engine.info().vocab_size as u32;
    let prompt_of = |name| [prompt(name, prefix_tokens, vocab_size), vec![vocab_size / 4; 8]].concat();
    let (wanted, other) = (prompt_of(1), prompt_of(2));
    rows.push(("computed", vec![answer(&engine, &wanted, CacheUse::ReadWrite)]));
    rows.push(("pool", (0..rounds).map(|_| answer(&engine, &wanted, CacheUse::ReadWrite)).collect()));
    let mut from_host = Vec::new();
    for _ in 0..rounds {
        answer(&engine, &other, CacheUse::ReadWrite);
        from_host.push(answer(&engine, &wanted, CacheUse::ReadWrite));
    }
    rows.push(("host memory", from_host));
    engine.flush().expect("on disk");
    engine.close();
    let (mut warm, mut dropped) = (Vec::new(), Vec::new());
    let (mut warm_read, mut dropped_read) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        read_speed(&setup.folder);
        let engine = setup.open(0, true);
        warm.push(answer(&engine, &wanted, CacheUse::Read));
        engine.close();
        warm_read.push(read_speed(&setup.folder));
        let engine = setup.open(0, true);
        if drop_page_cache() {
            dropped.push(answer(&engine, &wanted, CacheUse::Read));
            drop_page_cache();
            dropped_read.push(read_speed(&setup.folder));
        }
        engine.close();
    }
    rows.push(("disk, in the page cache", warm));
    rows.push(("disk, page cache dropped", dropped));

    if let Ok(url) = std::env::var("NS_LLM_BENCH_REDIS_URL") {
        // Not every block is stored at the pace at which a small model computes them: what is missing is stored the next time.
        let engine = setup.open_remote(&url);
        for _ in 0..2 {
            answer(&engine, &wanted, CacheUse::ReadWrite);
            engine.flush().expect("stored");
            answer(&engine, &other, CacheUse::ReadWrite);
            engine.flush().expect("stored");
        }
        engine.close();
        let shared = (0..rounds).map(|_| {
            let engine = setup.open_remote(&url);
            answer(&engine, &wanted, CacheUse::Read)
        });
        rows.push(("shared store", shared.collect()));
    }

    let computed_ms = rows[0].1[0].first_token_ms;
    println!("{prefix_tokens} tokens of prefix, {NEW_TOKENS} new ones; {rounds} rounds, medians");
    println!("{:<26} {:>12} {:>9} {:>12} {:>9} {:>8}", "prefix from", "first token", "times", "all", "moved", "speed");
    let mut json = Vec::new();
    for (name, answers) in &rows {
        let Some(Answer { cached, .. }) = answers.first() else { continue };
        let first_ms = median(answers.iter().map(|answer| answer.first_token_ms).collect());
        let total_ms = median(answers.iter().map(|answer| answer.total_ms).collect());
        let moved_bytes = (cached.host + cached.disk + cached.remote) as u64 / 16 * block_bytes;
        let per_second = moved_bytes as f64 / first_ms * 1e3;
        println!(
            "{name:<26} {first_ms:>9.1} ms {:>8.1}x {total_ms:>9.1} ms {:>6.0} MB {:>5.2} GB/s",
            computed_ms / first_ms,
            moved_bytes as f64 / 1e6,
            per_second / 1e9,
        );
        json.push(format!(
            "{{\"from\":\"{name}\",\"first_token_ms\":{first_ms:.2},\"total_ms\":{total_ms:.2},\"moved_bytes\":{moved_bytes},\"cached_tokens\":{}}}",
            cached.total()
        ));
    }
    let (warm_read, dropped_read) =
        (median(warm_read), if dropped_read.is_empty() { 0.0 } else { median(dropped_read) });
    let copy = median((0..5).map(|_| copy_speed()).collect());
    println!(
        "this machine: copying memory {:.2} GB/s; reading the files {:.2} GB/s from the page cache, {:.2} GB/s from the disk",
        copy / 1e9,
        warm_read / 1e9,
        dropped_read / 1e9
    );
    println!(
        "{{\"rows\":[{}],\"copy_bytes_per_s\":{copy:.0},\"warm_read_bytes_per_s\":{warm_read:.0},\"disk_read_bytes_per_s\":{dropped_read:.0}}}",
        json.join(",")
    );
    let _ = std::fs::remove_dir_all(&setup.folder);
}
