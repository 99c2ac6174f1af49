//! Promise: an engine with a KV cache directory may be killed at any moment. The next engine opens, finds KV that the killed
//! one had computed and answers that it had given, and gives the same answers bit for bit.
//!
//! The engine is killed in a child: this test program itself, asked for the test `child_generates_until_it_is_killed` only.
//! `NS_LLM_KILLS` sets how often.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use ns_llm::{CacheUse, Engine, EngineOptions, Request};

use crate::demo;
use crate::demo::{Fingerprint, Rng, fingerprint, with_logprobs};

/// Where the child's engine keeps its KV.
const FOLDER: &str = "NS_LLM_KILL_TEST_FOLDER";
const NUM_PROMPTS: u64 = 8;
const DEFAULT_KILLS: u64 = 20;
const KILLS_OF_A_FOLDER: u64 = 2;

fn open(folder: &Path) -> Engine {
    let mut options = EngineOptions::new(demo::path()).threads(1).kv_cache_dir(folder).kv_disk_bytes(48 << 20);
    // A busy machine is no stalled disk.
    options.kv_load_budget_ms = 20_000;
    options.response_cache.max_bytes = 8 << 20;
    Engine::open(options).expect("an engine opens over whatever a killed one has left")
}

/// Another one each time: its answer is kept.
fn short_request(turn: u64) -> Request {
    Request::tokens(Rng(1_000 + turn).prompt(9)).max_tokens(2).temperature(0.0)
}

/// What asks for KV and for no answer.
fn computed(mut request: Request) -> Request {
    request.response_cache = Some(CacheUse::Off);
    request
}

/// All begin alike, so that also one that was never run to its end finds something.
fn request(name: u64) -> Request {
    let prompt = [Rng(1).prompt(160), Rng(100 + name).prompt(120)].concat();
    with_logprobs(Request::tokens(prompt).max_tokens(24).temperature(0.0))
}

/// Not a test of its own: answers until it is killed, and tells of each answer. Only what it has computed by the first is
/// surely written by then.
#[test]
#[ignore = "run by killed_engine_is_found_again, as a child"]
fn child_generates_until_it_is_killed() {
    let engine = open(&PathBuf::from(std::env::var_os(FOLDER).expect("set by the parent")));
    for turn in 0.. {
        engine.complete(computed(request(turn % NUM_PROMPTS))).expect("runs");
        engine.complete(short_request(turn)).expect("runs");
        if turn == 0 {
            engine.flush().expect("written");
        }
        println!("answered {turn}");
    }
}

fn start_child(folder: &Path) -> Child {
    Command::new(std::env::current_exe().expect("this program"))
        .args([
            "--exact",
            "kv_tiers_kill::child_generates_until_it_is_killed",
            "--ignored",
            "--nocapture",
            "--test-threads=1",
        ])
        .env(FOLDER, folder)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("the child starts")
}

/// Lets a child work until it has told of its first answer, and then for `delay` more.
fn kill_after(folder: &Path, delay: Duration) {
    let mut child = start_child(folder);
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    lines.find(|line| line.as_ref().is_ok_and(|line| line.contains("answered"))).expect("an answer").expect("read");
    std::thread::sleep(delay);
    child.kill().expect("killed");
    child.wait().expect("gone");
}

#[test]
fn killed_engine_is_found_again() {
    let num_kills = std::env::var("NS_LLM_KILLS").map_or(DEFAULT_KILLS, |kills| kills.parse().expect("a number"));
    let root = std::env::temp_dir().join(format!("ns-llm-kv-tiers-kill-{}", std::process::id()));
    std::fs::create_dir_all(&root).expect("a folder");
    let cold = demo::open(|options| {
        options.prefix_cache = false;
        options.threads = Some(1);
    });
    let right: Vec<Fingerprint> =
        (0..NUM_PROMPTS).map(|name| fingerprint(&cold.complete(request(name)).expect("runs"))).collect();
    let mut rng = Rng(7);
    let (mut cached_tokens, mut whole, mut answers) = (0, 0, 0);
    let short: Vec<Fingerprint> =
        (0..NUM_PROMPTS).map(|name| fingerprint(&cold.complete(short_request(name)).expect("runs"))).collect();
    for kill in 0..num_kills {
        // New ones, so that there is something to write when it is killed.
        let folder = root.join((kill / KILLS_OF_A_FOLDER).to_string());
        kill_after(&folder, Duration::from_micros(rng.below(60_000) as u64));
        let engine = open(&folder);
        for name in 0..NUM_PROMPTS {
            let kept = engine.complete(short_request(name)).expect("runs");
            assert_eq!(fingerprint(&kept), short[name as usize], "kill {kill}, answer {name}");
            assert!(name > 0 || kept.summary.from_response_cache, "kill {kill}: it was flushed");
            answers += u64::from(kept.summary.from_response_cache);
            let answer = engine.complete(computed(request(name))).expect("runs");
            assert_eq!(fingerprint(&answer), right[name as usize], "kill {kill}, prompt {name}");
            let found = answer.summary.usage.cached_by_tier;
            assert!(name > 0 || found.disk >= 160, "kill {kill}: the common prefix was computed before: {found:?}");
            cached_tokens += found.disk;
            whole += u64::from(found.total() == 272);
        }
        let disk = engine.stats().kv_tiers.iter().find(|tier| tier.name == "disk").copied().expect("a disk tier");
        assert_eq!(disk.faults, 0, "kill {kill}: {disk:?}");
        engine.close();
    }
    println!(
        "{num_kills} kills, {cached_tokens} tokens from disk, {whole} prompts found whole, {answers} answers found"
    );
    assert!(cached_tokens as u64 >= num_kills * 160 && whole > 0);
    std::fs::remove_dir_all(&root).expect("removed");
}
