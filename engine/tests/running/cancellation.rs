//! Promise: a request that nobody wants any more costs nothing: cancelled, dropped or abandoned in any state, its blocks
//! are free within a step, its mates do not notice, and it ends exactly once.

use std::time::{Duration, Instant};

use ns_llm::{Engine, Error, Event, Request};

use crate::demo;
use crate::demo::{Rng, fingerprint, with_logprobs};

fn long_request(seed: u64) -> Request {
    let mut request = Request::tokens(Rng(seed).prompt(200)).max_tokens(1500);
    request.ignore_eos = true;
    request
}

/// Waits until `done` holds; the bound is generous, a broken promise never fulfils it.
fn eventually(engine: &Engine, what: &str, done: impl Fn(&ns_llm::Stats) -> bool) {
    let start = Instant::now();
    while !done(&engine.stats()) {
        assert!(start.elapsed() < Duration::from_secs(20), "{what}: {:?}", engine.stats());
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Cancelled while decoding: the stream ends with `Cancelled`, blocks are free, and the token count stands still.
#[test]
fn cancel_while_decoding_frees_blocks() {
    let engine = demo::open(|_| ());
    let mut stream = engine.generate(long_request(1)).expect("admitted");
    let first = stream.next_event().expect("it runs");
    assert!(matches!(first, Ok(Event::Delta(_))), "{first:?}");
    eventually(&engine, "it holds blocks", |stats| stats.kv_blocks_used > 0);
    stream.canceller().cancel();
    assert_eq!(stream.by_ref().last(), Some(Err(Error::Cancelled)));
    assert!(stream.next_event().is_none());
    eventually(&engine, "blocks come back", |stats| stats.kv_blocks_used == 0);
    let tokens = engine.stats().generation_tokens_total;
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(engine.stats().generation_tokens_total, tokens, "nothing is computed for nobody");
    assert_eq!(engine.stats().requests_cancelled, 1);
}

/// Cancelled in every other state: waiting in the queue, during the prompt, twice, after the end, by dropping.
#[test]
fn cancel_in_every_state_settles_once() {
    let engine = demo::open(|options| {
        options.max_running_sequences = 1;
        options.prefill_budget_tokens = 8;
        options.mixed_budget_tokens = 8;
    });
    let running = engine.generate(long_request(1)).expect("admitted");
    let waiting = engine.generate(long_request(2)).expect("admitted");
    waiting.canceller().cancel();
    waiting.canceller().cancel();
    assert_eq!(waiting.collect::<Vec<_>>(), [Err(Error::Cancelled)], "it never ran");
    drop(running); // during its prompt: 200 tokens are 25 steps
    eventually(&engine, "blocks come back", |stats| stats.kv_blocks_used == 0);
    let mut ended = engine.generate(Request::tokens([5]).max_tokens(2)).expect("admitted");
    let canceller = ended.canceller();
    assert!(ended.by_ref().all(|event| event.is_ok()));
    canceller.cancel();
    assert!(ended.next_event().is_none(), "after the end a cancel has no effect");
    eventually(&engine, "counters add up", |stats| {
        stats.requests_total == stats.requests_finished + stats.requests_cancelled
    });
    assert_eq!(engine.stats().requests_cancelled, 2);
}

/// Cancelling a batch mate at any step does not change a bit of the others.
#[test]
fn mates_do_not_notice_a_cancel() {
    let engine = demo::open(|options| options.prefix_cache = false);
    let request = || with_logprobs(Request::tokens(Rng(9).prompt(50)).max_tokens(40));
    let expected = fingerprint(&engine.complete(request()).expect("runs"));
    for cancel_after in [0, 1, 2, 5, 13, 29] {
        let mut mate = engine.generate(long_request(2)).expect("admitted");
        let observed = {
            let engine = engine.clone();
            std::thread::spawn(move || fingerprint(&engine.complete(request()).expect("runs")))
        };
        for _ in 0..cancel_after {
            mate.next_event();
        }
        drop(mate);
        assert_eq!(observed.join().expect("no panic"), expected, "mate cancelled after {cancel_after} events");
    }
    eventually(&engine, "all mates are counted", |stats| stats.requests_cancelled == 6);
}

/// Closing ends every request, running and waiting, with `Closed`; what comes later is refused; closing again is fine.
#[test]
fn close_settles_everything() {
    let engine = demo::open(|options| options.max_running_sequences = 2);
    let streams: Vec<_> = (0..20).map(|seed| engine.submit(long_request(seed)).expect("accepted")).collect();
    let clone = engine.clone();
    assert_eq!(clone.health(), Ok(()));
    engine.close();
    for stream in streams {
        assert_eq!(stream.last(), Some(Err(Error::Closed)));
    }
    clone.close();
    assert_eq!(clone.health(), Err(Error::Closed));
    assert_eq!(clone.submit(long_request(1)).err(), Some(Error::Closed));
    assert_eq!(clone.memory(), ns_llm::MemoryUse::default());
}

/// A stream outlives the handle that made it; the last of both to go ends the worker.
#[test]
fn a_stream_keeps_its_engine_alive() {
    let stream = {
        let engine = demo::open(|_| ());
        engine.generate(Request::tokens([5, 6, 7]).max_tokens(8)).expect("admitted")
    };
    assert!(matches!(stream.last(), Some(Ok(Event::Done(_)))));
}
