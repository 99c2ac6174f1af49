//! Promise: engines that share a store find each other's KV and answers, the same bit for bit, and none of them fails or
//! waits long because of it: not when it is killed in the middle, not when it hangs, not when it makes records up.
//!
//! Every test starts a server of its own; where there is none, see `remote_redis.rs`.

use std::process::Command;
use std::time::{Duration, Instant};

use ns_llm::{CachedTokens, Choice, Completion, Engine, KvRemoteOptions, KvTierStats, Request};

use crate::demo;
use crate::demo::{Rng, fingerprint, with_logprobs};
use crate::redis_server::RedisServer;

/// Set for the child: where the store is.
const URL: &str = "NS_LLM_KV_REMOTE_TEST_URL";
const SECRET: &str = "known to the nodes and to nobody else";

fn open(url: &str, secret: bool) -> Engine {
    demo::open(|options| {
        let remote = KvRemoteOptions::new(url).timeout_ms(5_000);
        options.kv_remote = Some(if secret { remote.secret(SECRET) } else { remote });
        // A busy machine is no stalled store.
        options.kv_load_budget_ms = 20_000;
    })
}

/// An engine that shares answers and no KV.
fn open_for_answers(url: &str, secret: bool) -> Engine {
    demo::open(|options| {
        let remote = KvRemoteOptions::new(url).timeout_ms(5_000);
        options.kv_remote = Some(if secret { remote.secret(SECRET) } else { remote });
        options.response_cache.max_bytes = 8 << 20;
        options.prefix_cache = false;
        options.kv_load_budget_ms = 20_000;
    })
}

fn greedy(prompt: &[u32], tag: &str) -> Request {
    let mut request = Request::tokens(prompt).max_tokens(6).temperature(0.0);
    request.response_tags = vec![tag.to_string()];
    request
}

/// Its choices, and whether they were kept.
fn ask(engine: &Engine, request: &Request) -> (Vec<Choice>, bool) {
    let answer = engine.complete(request.clone()).expect("runs");
    (answer.choices, answer.summary.from_response_cache)
}

fn run(engine: &Engine, prompt: &[u32]) -> Completion {
    engine.complete(with_logprobs(Request::tokens(prompt).max_tokens(6))).expect("runs")
}

fn remote(engine: &Engine) -> KvTierStats {
    *engine.stats().kv_tiers.iter().find(|tier| tier.name == "remote").expect("a remote tier")
}

/// What one engine has computed another finds, in the same process and in another one.
#[test]
#[ignore = "needs redis-server; `npm test` runs it where that is found"]
fn engines_share_prefixes() {
    let server = RedisServer::start(&[]);
    let cold = demo::open(|options| options.prefix_cache = false);
    let (one, two) = (open(&server.url(), true), open(&server.url(), true));
    let prompt = Rng(1).prompt(150);
    assert_eq!(run(&one, &prompt).summary.usage.cached_tokens, 0);
    one.flush().expect("stored");
    let shared = run(&two, &prompt);
    assert_eq!(shared.summary.usage.cached_by_tier, CachedTokens { remote: 144, ..CachedTokens::default() });
    assert_eq!(fingerprint(&shared), fingerprint(&run(&cold, &prompt)));
    assert_eq!((remote(&two).hits, remote(&two).faults), (9, 0));
    // Who does not know the secret finds nothing, and is not found.
    let stranger = open(&server.url(), false);
    assert_eq!(run(&stranger, &prompt).summary.usage.cached_tokens, 0);
    let child = Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", "kv_remote::child_finds_what_the_parent_computed", "--ignored", "--nocapture"])
        .env(URL, server.url())
        .output()
        .expect("the child runs");
    let told = String::from_utf8_lossy(&child.stdout).into_owned();
    assert!(child.status.success() && told.contains("found 144 tokens"), "{told}");
}

/// Not a test of its own.
#[test]
#[ignore = "run by engines_share_prefixes, as a child"]
fn child_finds_what_the_parent_computed() {
    let Ok(url) = std::env::var(URL) else { return };
    let engine = open(&url, true);
    println!("found {} tokens", run(&engine, &Rng(1).prompt(150)).summary.usage.cached_by_tier.remote);
}

/// R1: a store that is killed and started again while requests run fails none of them and changes no token.
#[test]
#[ignore = "needs redis-server; `npm test` runs it where that is found"]
fn store_that_dies_fails_nobody() {
    let mut server = RedisServer::start(&[]);
    let cold = demo::open(|options| options.prefix_cache = false);
    let engine = open(&server.url(), true);
    let prompts: Vec<Vec<u32>> = (0..12).map(|name| Rng(50 + name).prompt(90)).collect();
    for (turn, prompt) in prompts.iter().enumerate() {
        match turn {
            4 => server.kill(),
            8 => server.restart(),
            _ => {}
        }
        let answer = run(&engine, prompt);
        assert_eq!(fingerprint(&answer), fingerprint(&run(&cold, prompt)), "turn {turn}");
    }
    assert!(remote(&engine).faults > 0, "nobody noticed");
    assert!(remote(&engine).stored > 0);
}

/// R1: a store that hangs costs a request no more than the load budget, and is left alone after a few faults.
#[test]
#[ignore = "needs redis-server; `npm test` runs it where that is found"]
fn store_that_hangs_costs_the_load_budget() {
    let server = RedisServer::start(&[]);
    let engine = demo::open(|options| {
        options.kv_remote = Some(KvRemoteOptions::new(server.url()).timeout_ms(200));
        options.kv_load_budget_ms = 50;
    });
    run(&engine, &Rng(70).prompt(90));
    server.set_stopped(true);
    let start = Instant::now();
    for name in 0..20 {
        run(&engine, &Rng(80 + name).prompt(90));
    }
    let elapsed = start.elapsed();
    server.set_stopped(false);
    assert!(remote(&engine).faults >= 1, "{:?}", remote(&engine));
    // Twenty times the budget, and far less than twenty times the timeouts of nine blocks each.
    assert!(elapsed < Duration::from_secs(15), "{elapsed:?}");
}

/// R3: a store whose records are another's, cut short or made of other bytes is a store of misses.
#[test]
#[ignore = "needs redis-server; `npm test` runs it where that is found"]
fn store_that_lies_is_a_store_of_misses() {
    let server = RedisServer::start(&[]);
    let cold = demo::open(|options| options.prefix_cache = false);
    let prompt = Rng(90).prompt(100);
    let writer = open(&server.url(), true);
    run(&writer, &prompt);
    writer.flush().expect("stored");
    let mut connection = server.connect();
    let names = connection.names();
    assert_eq!(names.len(), 6);
    let first = connection.get(&names[0]);
    for (idx, name) in names.iter().enumerate().skip(1) {
        match idx % 3 {
            0 => connection.set(name, &first),
            1 => connection.set(name, &first[..first.len() / 2]),
            _ => {
                let mut bytes = connection.get(name);
                let middle = bytes.len() / 2;
                bytes[middle] ^= 1;
                connection.set(name, &bytes);
            }
        }
    }
    let reader = open(&server.url(), true);
    let answer = run(&reader, &prompt);
    assert_eq!(fingerprint(&answer), fingerprint(&run(&cold, &prompt)));
    // Which of the blocks is the first one is not known here: at most that one is found.
    assert!(answer.summary.usage.cached_tokens <= 16, "{:?}", answer.summary.usage);
    assert!(remote(&reader).faults + remote(&reader).misses > 0);
}

/// What one engine has answered another gives without a step, if it knows the secret; what one of them makes invalid no
/// other finds in the store, and what is answered afterwards is shared again.
#[test]
#[ignore = "needs redis-server; `npm test` runs it where that is found"]
fn engines_share_answers() {
    let server = RedisServer::start(&[]);
    let open = |secret| open_for_answers(&server.url(), secret);
    let (one, two) = (open(true), open(true));
    let (tagged, other) = (greedy(&Rng(1).prompt(40), "a"), greedy(&Rng(2).prompt(40), "b"));
    let computed: Vec<_> = [&tagged, &other].map(|request| ask(&one, request)).into();
    assert!(computed.iter().all(|(_, kept)| !kept));
    one.flush().expect("stored");
    let found: Vec<_> = [&tagged, &other].map(|request| ask(&two, request)).into();
    assert!(found.iter().zip(&computed).all(|(found, computed)| found.1 && found.0 == computed.0));
    let (steps, cache) = (two.stats().steps_total, two.responses().stats());
    assert_eq!((steps, cache.remote_hits, cache.answers, cache.tier_faults), (0, 2, 2, 0), "{cache:?}");
    let (stranger, third) = (open(false), open(true));
    assert!(!ask(&stranger, &tagged).1, "it does not know the secret");
    assert_eq!(two.responses().invalidate("a"), 1);
    two.flush().expect("stored");
    // What is begun in the same millisecond is invalid, too.
    std::thread::sleep(Duration::from_millis(5));
    assert!(!ask(&third, &tagged).1 && ask(&third, &other).1);
    assert!(ask(&one, &tagged).1, "what is in memory lives until its time is over");
    third.flush().expect("stored");
    assert!(ask(&open(true), &tagged).1, "it was answered again");
    one.responses().clear();
    one.flush().expect("stored");
    let last = open(true);
    assert!(!ask(&last, &tagged).1 && !ask(&last, &other).1, "all were given up");
}

/// R1, R3: a store that gives other answers, cut ones and changed ones is a store of misses; one that hangs costs a request
/// the load budget and the next ones nothing.
#[test]
#[ignore = "needs redis-server; `npm test` runs it where that is found"]
fn stores_of_answers_that_lie_or_hang_are_misses() {
    let server = RedisServer::start(&[]);
    let requests: Vec<Request> = (0..4).map(|seed| greedy(&Rng(seed).prompt(30), "t")).collect();
    let writer = open_for_answers(&server.url(), true);
    let right: Vec<_> = requests.iter().map(|request| ask(&writer, request).0).collect();
    writer.flush().expect("stored");
    let mut connection = server.connect();
    let names = connection.names();
    assert!(names.len() == 4 && names.iter().all(|name| name.starts_with("ns-llm:answer:1:")), "{names:?}");
    let values: Vec<_> = names.iter().map(|name| connection.get(name)).collect();
    connection.set(&names[0], &values[1]);
    connection.set(&names[1], &values[1][..values[1].len() - 1]);
    let mut changed = values[2].clone();
    *changed.last_mut().expect("bytes") ^= 1;
    connection.set(&names[2], &changed);
    let reader = open_for_answers(&server.url(), true);
    for (request, right) in requests.iter().zip(&right) {
        assert_eq!(ask(&reader, request).0, *right);
    }
    let cache = reader.responses().stats();
    assert_eq!((cache.remote_hits, cache.tier_faults), (1, 3), "{cache:?}");
    let engine = demo::open(|options| {
        options.kv_remote = Some(KvRemoteOptions::new(server.url()).timeout_ms(10_000));
        options.response_cache.max_bytes = 8 << 20;
        (options.prefix_cache, options.kv_load_budget_ms) = (false, 50);
    });
    server.set_stopped(true);
    for (request, right) in requests.iter().zip(&right) {
        assert_eq!(ask(&engine, request), (right.clone(), false));
    }
    server.set_stopped(false);
    let cache = engine.responses().stats();
    assert!(cache.tier_give_ups >= 1 && cache.remote_hits == 0, "{cache:?}");
}
