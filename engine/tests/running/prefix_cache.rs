//! Promise: a prefix that the engine has computed is not computed again, between requests that follow each other and
//! between live ones, never across namespaces; and an answer from the cache is the answer, bit for bit.

use ns_llm::{Engine, Request};

use crate::demo;
use crate::demo::{Rng, fingerprint, with_logprobs};

const BLOCK: usize = 16;

/// Warm answers equal cold ones for prompts around every block edge, with exactly the hits that whole blocks give; the
/// last token is always computed.
#[test]
fn warm_equals_cold_at_every_block_edge() {
    let warm = demo::open(|_| ());
    let cold = demo::open(|options| options.prefix_cache = false);
    let prompt = Rng(3).prompt(130);
    for length in (1..=8).flat_map(|block| [block * BLOCK - 1, block * BLOCK, block * BLOCK + 1]) {
        let request = || with_logprobs(Request::tokens(&prompt[..length]).max_tokens(4));
        let first = cold.complete(request()).expect("runs");
        warm.complete(request()).expect("fills the cache");
        let second = warm.complete(request()).expect("runs");
        assert_eq!(fingerprint(&second), fingerprint(&first), "{length} tokens");
        assert_eq!(second.summary.usage.cached_tokens, (length - 1) / BLOCK * BLOCK, "{length} tokens");
        assert_eq!(first.summary.usage.cached_tokens, 0);
    }
    assert_eq!(cold.stats().prefix_cache_hits_total, 0);
}

/// A conversation's next turn finds the last one: answer tokens are in the cache as well as prompt tokens.
#[test]
fn answers_are_cached_too() {
    let engine = demo::open(|_| ());
    let first = engine.complete(Request::tokens(Rng(4).prompt(40)).max_tokens(60).temperature(0.0)).expect("runs");
    let mut longer = Rng(4).prompt(40);
    longer.extend(&first.choices[0].token_ids);
    let written = longer.len();
    longer.extend(Rng(5).prompt(20));
    let second = engine.complete(Request::tokens(longer).max_tokens(1)).expect("runs");
    // The last token of the first answer was never an input, so its block may be one short.
    assert!(second.summary.usage.cached_tokens >= (written - 1) / BLOCK * BLOCK);
    assert!(second.summary.usage.cached_tokens > 40, "more than the prompt was found");
}

/// Live requests that arrive together compute their common prefix once.
#[test]
fn live_requests_share_a_prefix() {
    let shared = Rng(6).prompt(160);
    let prompts: Vec<Vec<u32>> = (0..8).map(|i| [shared.clone(), Rng(100 + i).prompt(10)].concat()).collect();
    let submit_all = |engine: &Engine| {
        let streams: Vec<_> = prompts
            .iter()
            .map(|prompt| engine.submit(Request::tokens(prompt.clone()).max_tokens(2)).expect("admitted"))
            .collect();
        streams.into_iter().for_each(|stream| assert!(stream.into_iter().all(|event| event.is_ok())));
        engine.stats()
    };
    let with = submit_all(&demo::open(|_| ()));
    let without = submit_all(&demo::open(|options| options.prefix_cache = false));
    assert_eq!(with.prefix_cache_hits_total, 7 * 160);
    // One computes 170 prompt tokens, seven compute 10; each then computes one token of its answer.
    assert!(with.computed_tokens_total <= 170 + 7 * 10 + 8 * 2, "{}", with.computed_tokens_total);
    assert!(without.computed_tokens_total >= 8 * 170);
}

/// Prompt logprobs are never taken from a cache that has no logits: they equal those of a cold run.
#[test]
fn prompt_logprobs_are_computed() {
    let engine = demo::open(|_| ());
    let prompt = Rng(8).prompt(70);
    let score = || {
        let mut request = Request::tokens(prompt.clone()).max_tokens(0);
        request.prompt_logprobs = true;
        engine.complete(request).expect("runs").summary
    };
    let (first, second) = (score(), score());
    assert_eq!(first.prompt_logprobs.len(), 69);
    assert_eq!(first.prompt_logprobs, second.prompt_logprobs);
    assert_eq!(second.usage.cached_tokens, 0);
    for (entry, token_id) in first.prompt_logprobs.iter().zip(&prompt[1..]) {
        assert_eq!(entry.chosen.token_id, *token_id);
        assert!(entry.chosen.logprob <= 0.0);
    }
}

/// A pool that is too small for all prefixes evicts the oldest and goes on answering.
#[test]
fn eviction_forgets_but_never_lies() {
    let block_bytes = 16 * 6 * 2 * 2 * 64 * 2;
    let engine = demo::open(|options| options.kv_bytes = Some(12 * block_bytes));
    let cold = demo::open(|options| options.prefix_cache = false);
    let mut hits = 0;
    for round in 0..3 {
        for seed in 0..4 {
            let request = || with_logprobs(Request::tokens(Rng(seed).prompt(70)).max_tokens(4));
            let answer = engine.complete(request()).expect("runs");
            hits += answer.summary.usage.cached_tokens;
            assert_eq!(fingerprint(&answer), fingerprint(&cold.complete(request()).expect("runs")), "round {round}");
            let again = engine.complete(request()).expect("runs");
            hits += again.summary.usage.cached_tokens;
            assert_eq!(again.choices, answer.choices);
        }
    }
    assert!(hits > 0, "some prefixes stayed");
    let stats = engine.stats();
    assert!(stats.prefix_cache_hits_total < stats.prefix_cache_queries_total / 2 + 1, "others were evicted");
}
