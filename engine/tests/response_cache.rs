//! Promise: a kept answer is the answer that would be computed, bit for bit, and only that. It is given without computing
//! a token; nothing that ended otherwise than it should is kept; namespaces, tags, times and versions part what must be
//! parted.

#[path = "support/demo.rs"]
#[allow(dead_code)]
mod demo;

use std::time::Duration;

use demo::{Rng, fingerprint, with_logprobs};
use ns_llm::{CacheUse, Completion, Delta, Engine, Error, Event, Message, PutOptions, Request};

fn open() -> Engine {
    demo::open(|options| options.response_cache.max_bytes = 8 << 20)
}

fn complete(engine: &Engine, request: &Request) -> Completion {
    engine.complete(request.clone()).expect("runs")
}

fn is_kept(engine: &Engine, request: &Request) -> bool {
    complete(engine, request).summary.from_response_cache
}

fn greedy(prompt: &str) -> Request {
    Request::prompt(prompt).max_tokens(12).temperature(0.0)
}

/// Requests of every kind: what is found equals what another engine computes, in all that its reader can see, and not a step
/// is run for it.
#[test]
fn a_kept_answer_is_the_answer() {
    let drawn = || Request::prompt("Once upon a time").max_tokens(16).temperature(0.9).seed(7);
    let changed = |change: fn(&mut Request)| {
        let mut request = drawn();
        change(&mut request);
        request
    };
    let requests = [
        greedy("Once upon a time"),
        drawn(),
        with_logprobs(drawn()),
        changed(|r| r.n = 3),
        changed(|r| (r.n, r.logprobs) = (2, Some(0))),
        changed(|r| r.stop = vec!["e".into(), " the".into()]),
        changed(|r| (r.sampling.top_k, r.sampling.top_p, r.sampling.min_p) = (Some(40), Some(0.9), Some(0.01))),
        changed(|r| r.sampling.repetition_penalty = Some(1.3)),
        changed(|r| r.sampling.logit_bias = vec![(20, 5.0), (30, -5.0)]),
        changed(|r| (r.prompt_logprobs, r.logprobs, r.max_tokens) = (true, Some(2), Some(0))),
        Request::tokens(Rng(1).prompt(200)).max_tokens(3).temperature(0.0),
        Request::chat([Message::new("user", "Tell me of a fox.")]).max_tokens(8).temperature(0.0),
    ];
    let (keeping, computing) = (open(), demo::open(|_| ()));
    for request in &requests {
        let computed = complete(&computing, request);
        let first = complete(&keeping, request);
        let steps = keeping.stats().steps_total;
        let second = complete(&keeping, request);
        assert!(!computed.summary.from_response_cache && !first.summary.from_response_cache, "{request:?}");
        assert!(second.summary.from_response_cache, "{request:?}");
        assert_eq!(keeping.stats().steps_total, steps, "{request:?}");
        for other in [&first, &second] {
            assert_eq!(fingerprint(other), fingerprint(&computed), "{request:?}");
            assert_eq!(other.choices, computed.choices, "{request:?}");
            assert_eq!(other.summary.prompt_logprobs, computed.summary.prompt_logprobs, "{request:?}");
            let (usage, expected) = (other.summary.usage, computed.summary.usage);
            assert_eq!(usage.prompt_tokens, expected.prompt_tokens);
            assert_eq!(usage.completion_tokens, expected.completion_tokens);
        }
        assert_eq!(second.summary.usage.cached_tokens, second.summary.usage.prompt_tokens);
        if request.sampling.seed.is_some() {
            assert_eq!(second.summary.seed, computed.summary.seed, "{request:?}");
        }
    }
    let (stats, cache) = (keeping.stats(), keeping.responses().stats());
    let count = requests.len() as u64;
    assert_eq!((cache.answers, cache.hits, cache.misses, cache.stores), (count, count, count, count));
    assert_eq!((stats.requests_total, stats.requests_finished), (2 * count, 2 * count));
    assert_eq!(computing.responses().stats().misses, 0, "an engine without a cache does not look");
    // Histograms count both kinds, and steps only where some were run.
    let histograms = &stats.histograms;
    for (name, histogram) in [
        ("end_to_end", &histograms.end_to_end_seconds),
        ("queue", &histograms.queue_seconds),
        ("prompt_tokens", &histograms.prompt_tokens),
        ("generation_tokens", &histograms.generation_tokens),
    ] {
        assert_eq!(histogram.count(), 2 * count, "{name}");
    }
    // One of the requests asks for no token.
    assert_eq!(histograms.first_token_seconds.count(), 2 * (count - 1));
    assert_eq!(histograms.generation_tokens.sum, 2.0 * stats.generation_tokens_total as f64);
    assert_eq!(
        (histograms.step_seconds.count(), histograms.step_tokens.count()),
        (stats.steps_total, stats.steps_total)
    );
    assert_eq!(histograms.step_tokens.sum, stats.computed_tokens_total as f64);
    assert!(0.0 < histograms.decode_seconds.sum && histograms.decode_seconds.sum < histograms.end_to_end_seconds.sum);
}

/// A text prompt, its token ids and another priority ask for the same answer.
#[test]
fn other_ways_to_ask_find_it() {
    let engine = open();
    let request = greedy("Once upon a time");
    complete(&engine, &request);
    let ids = engine.tokenize("Once upon a time", true).expect("tokenizes");
    let mut urgent = Request::tokens(ids).max_tokens(12).temperature(0.0);
    (urgent.priority, urgent.prefix_cache) = (ns_llm::Priority::High, ns_llm::CacheUse::Off);
    assert!(is_kept(&engine, &urgent));
}

/// A reader of a kept answer hears one delta of each choice, its end, and the end of all; leaving early harms nobody.
#[test]
fn a_kept_answer_has_the_events_of_an_answer() {
    let engine = open();
    let mut request = Request::prompt("The fox").max_tokens(10).temperature(0.8).seed(3);
    request.n = 2;
    let expected = complete(&engine, &request);
    let events: Vec<Event> =
        engine.generate(request.clone()).expect("admitted").map(|e| e.expect("no error")).collect();
    let choices: Vec<_> = expected.choices.iter().enumerate().collect();
    for (index, choice) in choices {
        let delta = Delta {
            choice: index,
            text: choice.text.clone(),
            token_ids: choice.token_ids.clone(),
            logprobs: Vec::new(),
        };
        assert_eq!(events[2 * index], Event::Delta(delta));
        assert_eq!(events[2 * index + 1], Event::Finished { choice: index, reason: choice.finish_reason });
    }
    assert!(matches!(&events[4..], [Event::Done(summary)] if summary.from_response_cache));
    for _ in 0..20 {
        drop(engine.submit(request.clone()).expect("submitted"));
        let stream = engine.submit(request.clone()).expect("submitted");
        stream.canceller().cancel();
        // Cancelled before intake saw it, or answered.
        match stream.last() {
            Some(Ok(Event::Done(summary))) => assert!(summary.from_response_cache),
            Some(Err(error)) => assert_eq!(error, Error::Cancelled),
            other => panic!("{other:?}"),
        }
    }
    assert!(is_kept(&engine, &request));
}

/// What is drawn without a seed is neither kept nor given, unless the request says that it wants that.
#[test]
fn only_repeatable_answers_are_kept() {
    let engine = open();
    let random = Request::prompt("Once").max_tokens(8).temperature(1.0);
    assert!(!is_kept(&engine, &random) && !is_kept(&engine, &random));
    assert_eq!(engine.responses().stats(), ns_llm::ResponseCacheStats { max_bytes: 8 << 20, ..Default::default() });
    let mut named = random.clone();
    named.response_cache = Some(CacheUse::ReadWrite);
    let first = complete(&engine, &named);
    let second = complete(&engine, &named);
    assert!(!first.summary.from_response_cache && second.summary.from_response_cache);
    assert_eq!((&second.choices, second.summary.seed), (&first.choices, first.summary.seed));
    assert!(!is_kept(&engine, &random), "who does not ask for it computes");
    // The reported seed is the one that gives this answer.
    assert_eq!(complete(&engine, &random.seed(second.summary.seed)).choices, first.choices);
}

/// A request says what part the cache has in it; one that is to fill the prefix cache is always computed.
#[test]
fn requests_say_what_they_want() {
    let engine = open();
    let with = |cache_use| {
        let mut request = greedy("A fox");
        request.response_cache = cache_use;
        request
    };
    assert!(!is_kept(&engine, &with(Some(CacheUse::Read))), "nothing is there");
    assert!(!is_kept(&engine, &with(Some(CacheUse::Off))));
    assert!(!is_kept(&engine, &with(None)), "neither of them has kept it");
    assert!(!is_kept(&engine, &with(Some(CacheUse::Off))), "is computed though it is there");
    for finds in [None, Some(CacheUse::Read), Some(CacheUse::ReadWrite)] {
        assert!(is_kept(&engine, &with(finds)), "{finds:?}");
    }
    let warm = greedy("A fox").max_tokens(0);
    assert!(!is_kept(&engine, &warm) && !is_kept(&engine, &warm));
    assert_eq!(engine.responses().stats().stores, 1);
}

/// The same request in another namespace is computed there, and each then finds its own.
#[test]
fn namespaces_do_not_share() {
    let engine = open();
    let of = |namespace: Option<&str>| {
        let mut request = greedy("A secret");
        request.namespace = namespace.map(str::to_string);
        request
    };
    let namespaces = [None, Some(""), Some("a"), Some("b")];
    for namespace in namespaces {
        assert!(!is_kept(&engine, &of(namespace)), "{namespace:?}");
    }
    assert!(namespaces.iter().all(|&namespace| is_kept(&engine, &of(namespace))));
    assert_eq!(engine.responses().stats().entries, 4);
}

/// Cancelled, timed out and refused requests leave nothing; the next one computes the whole answer.
#[test]
fn unfinished_answers_are_not_kept() {
    let engine = open();
    let mut long = Request::prompt("Once upon a time").max_tokens(400).temperature(0.0);
    long.ignore_eos = true;
    let mut stream = engine.generate(long.clone()).expect("admitted");
    assert!(matches!(stream.next_event(), Some(Ok(Event::Delta(_)))));
    stream.canceller().cancel();
    assert!(stream.any(|event| event == Err(Error::Cancelled)));
    long.timeout_ms = Some(1);
    assert_eq!(engine.complete(long.clone()), Err(Error::DeadlineExceeded { timeout_ms: 1 }));
    let too_long = Request::tokens(vec![5; engine.info().context_tokens + 1]).temperature(0.0);
    assert!(engine.complete(too_long).is_err());
    assert_eq!(engine.responses().stats().stores, 0);
    long.timeout_ms = None;
    let whole = complete(&engine, &long);
    assert_eq!((whole.choices[0].token_ids.len(), whole.summary.from_response_cache), (400, false));
    long.timeout_ms = Some(1);
    assert!(is_kept(&engine, &long), "what is known needs no time");
}

/// A tag takes the answers along that have it, also one that is just being computed.
#[test]
fn tags_reach_what_is_being_computed() {
    let engine = open();
    let tagged = |prompt: &str, tag: &str| {
        let mut request = greedy(prompt);
        request.response_tags = vec![tag.to_string(), "all".to_string()];
        request
    };
    let (one, two) = (tagged("One", "one"), tagged("Two", "two"));
    assert!(!is_kept(&engine, &one) && !is_kept(&engine, &two));
    assert_eq!(engine.responses().invalidate("one"), 1);
    assert!(!is_kept(&engine, &one) && is_kept(&engine, &two));
    assert_eq!(engine.responses().invalidate("all"), 2);
    let mut slow = tagged("Three", "three").max_tokens(300);
    slow.ignore_eos = true;
    let mut stream = engine.generate(slow.clone()).expect("admitted");
    assert!(matches!(stream.next_event(), Some(Ok(Event::Delta(_)))));
    assert_eq!(engine.responses().invalidate("three"), 0);
    assert!(stream.all(|event| event.is_ok()));
    assert_eq!(engine.responses().stats().outdated, 1);
    assert!(!is_kept(&engine, &slow) && is_kept(&engine, &slow));
}

/// Time, version and clearing: what is over is computed again.
#[test]
fn what_is_over_is_computed_again() {
    let engine = open();
    let mut short = greedy("Short");
    short.response_ttl_ms = Some(1);
    assert!(!is_kept(&engine, &short));
    std::thread::sleep(Duration::from_millis(5));
    assert!(!is_kept(&engine, &short));
    let long = greedy("Long");
    let end: [fn(&Engine); 2] = [
        |engine| {
            engine.responses().bump_version();
        },
        |engine| engine.responses().clear(),
    ];
    for end in end {
        assert!(!is_kept(&engine, &long) && is_kept(&engine, &long));
        end(&engine);
    }
    assert!(!is_kept(&engine, &long));
    engine.responses().set_version(0);
    assert!(!is_kept(&engine, &long), "nothing of an earlier version comes back");
}

/// Answers share their budget with the values of callers, never exceed it, and are gone when the engine is closed.
#[test]
fn the_budget_holds_and_ends() {
    let engine = demo::open(|options| options.response_cache.max_bytes = 8_000);
    let responses = engine.responses().clone();
    assert_eq!(responses.put("mine", b"value", &PutOptions::default()), Ok(true));
    assert_eq!(responses.get("mine").as_deref(), Some(b"value".as_slice()));
    for i in 0..40 {
        complete(&engine, &greedy(&format!("Number {i}")));
        assert!(responses.stats().bytes <= 8_000, "{:?}", responses.stats());
    }
    let stats = responses.stats();
    assert!(stats.evictions > 20 && stats.entries > 3, "{stats:?}");
    assert_eq!(responses.get("mine"), None, "the least recently used went first");
    engine.close();
    assert_eq!((responses.stats().entries, responses.stats().bytes), (0, 0));
    assert_eq!(responses.put("mine", b"value", &PutOptions::default()), Ok(false));
}

/// Many threads at once, most of whose requests are found: every answer is the right one.
#[test]
fn many_readers_get_right_answers() {
    let engine = open();
    let requests: Vec<Request> =
        (0..12).map(|seed| Request::prompt("There was").max_tokens(6).temperature(1.0).seed(seed)).collect();
    let cold = demo::open(|_| ());
    let expected: Vec<_> = requests.iter().map(|request| complete(&cold, request).choices).collect();
    std::thread::scope(|scope| {
        for thread in 0..6 {
            let (engine, requests, expected) = (&engine, &requests, &expected);
            scope.spawn(move || {
                let mut rng = Rng(thread);
                for _ in 0..150 {
                    let index = rng.below(requests.len());
                    if rng.below(40) == 0 {
                        engine.responses().clear();
                    }
                    assert_eq!(complete(engine, &requests[index]).choices, expected[index], "request {index}");
                }
            });
        }
    });
    let stats = engine.responses().stats();
    assert!(stats.answers > 300 && stats.stores > 12, "{stats:?}");
    assert_eq!(engine.stats().requests_finished, 900);
}
