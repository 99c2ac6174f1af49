//! Promise: a kept answer is the answer that would be computed, bit for bit, and only that. It is given without computing
//! a token; nothing that ended otherwise than it should is kept; namespaces, tags, times and versions part what must be
//! parted. With a directory for KV all that holds across restarts, also when its files are damaged.

use std::path::{Path, PathBuf};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use ns_llm::{CacheUse, Completion, Delta, Engine, Error, Event, Message, PutOptions, Request};

use crate::demo;
use crate::demo::{Rng, fingerprint, with_logprobs};

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

/// The answer to an equal request is there when `submit` returns, without a step of its way: text and conversations. What is
/// forgotten since, or asked in another namespace, is not.
#[test]
fn an_equal_request_is_answered_at_once() {
    let engine = open();
    let events_at_once = |request: &Request| {
        let mut stream = engine.submit(request.clone()).expect("in range");
        let mut cx = Context::from_waker(Waker::noop());
        let events = std::iter::from_fn(|| match stream.poll_next(&mut cx) {
            Poll::Ready(event) => event,
            Poll::Pending => None,
        });
        events.map(|event| event.expect("no error")).collect::<Vec<_>>()
    };
    let mut tagged = greedy("Once upon a time");
    tagged.response_tags = vec!["story".into()];
    let chat = Request::chat([Message::new("user", "Tell me of a fox.")]).max_tokens(8).temperature(0.0);
    for request in [&tagged, &chat] {
        let first = complete(&engine, request);
        let events = events_at_once(request);
        assert!(
            matches!(&events[..], [Event::Delta(delta), Event::Finished { .. }, Event::Done(summary)]
            if delta.text == first.choices[0].text && summary.from_response_cache),
            "{events:?}"
        );
        let mut elsewhere = request.clone();
        elsewhere.namespace = Some("else".into());
        assert!(!is_kept(&engine, &elsewhere));
    }
    let stats = engine.responses().stats();
    assert_eq!((stats.answers, stats.hits, stats.misses), (2, 2, 4));
    assert_eq!(engine.responses().invalidate("story"), 2, "in both namespaces");
    assert!(!is_kept(&engine, &tagged), "it was forgotten");
    engine.responses().bump_version();
    assert!(!is_kept(&engine, &chat), "of another version");
    engine.close();
    assert_eq!(engine.submit(chat).map(drop), Err(Error::Closed));
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

/// A directory of its own, gone with its value.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("ns-llm-answers-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        Folder(path)
    }

    fn open(&self) -> Engine {
        open_in(&self.0, demo::path())
    }

    /// The files in which answers lie.
    fn segments(&self) -> Vec<PathBuf> {
        let files = std::fs::read_dir(self.0.join("answers")).expect("answers lie beneath the directory of the KV");
        files.map(|entry| entry.expect("readable").path()).filter(|it| it.extension().is_some()).collect()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn open_in(folder: &Path, model: PathBuf) -> Engine {
    demo::open(|options| {
        options.model = model;
        options.response_cache.max_bytes = 8 << 20;
        options.kv_cache_dir = Some(folder.to_path_buf());
        // A busy machine is no stalled disk.
        options.kv_load_budget_ms = 20_000;
    })
}

/// What one engine has answered the next one finds, bit for bit, without a step; then it is in memory. What memory had no
/// room for is found too.
#[test]
fn answers_survive_a_restart() {
    let folder = Folder::new("restart");
    let mut several = Request::prompt("The fox").max_tokens(10).temperature(0.8).seed(3);
    several.n = 3;
    let chat = Request::chat([Message::new("user", "Tell me of a fox.")]).max_tokens(8).temperature(0.0);
    let requests = [greedy("Once upon a time"), with_logprobs(several), chat];
    let first = folder.open();
    let computed: Vec<Completion> = requests.iter().map(|request| complete(&first, request)).collect();
    assert!(computed.iter().all(|answer| !answer.summary.from_response_cache));
    first.flush().expect("written");
    let stats = first.responses().stats();
    assert_eq!((stats.tier_stores, stats.disk_entries, stats.disk_hits), (3, 3, 0), "{stats:?}");
    first.close();
    let second = folder.open();
    for (request, computed) in requests.iter().zip(&computed) {
        for turn in 0..2 {
            let answer = complete(&second, request);
            assert!(answer.summary.from_response_cache, "{turn}: {request:?}");
            assert_eq!((fingerprint(&answer), &answer.choices), (fingerprint(computed), &computed.choices));
            assert_eq!(answer.summary.usage.prompt_tokens, computed.summary.usage.prompt_tokens);
        }
    }
    let (cache, stats) = (second.responses().stats(), second.stats());
    assert_eq!((cache.disk_hits, cache.hits, cache.misses, cache.answers), (3, 3, 3, 6), "{cache:?}");
    assert_eq!((stats.steps_total, stats.requests_finished, cache.tier_faults), (0, 6, 0));
    assert_eq!(second.memory().response_cache_bytes, cache.bytes);
    second.close();
    // One entry of memory, so that the disk has what memory gives up.
    let small = demo::open(|options| {
        (options.response_cache.max_bytes, options.response_cache.max_entries) = (8 << 20, 1);
        (options.kv_cache_dir, options.kv_load_budget_ms) = (Some(folder.0.clone()), 20_000);
    });
    assert!((0..6).all(|turn| is_kept(&small, &requests[turn % 3])));
    assert_eq!((small.responses().stats().disk_hits, small.responses().stats().entries), (6, 1));
}

/// What a tag, a version or clearing has made invalid, and what is over, is not found after a restart; what was computed
/// afterwards is.
#[test]
fn what_is_invalid_stays_invalid() {
    let folder = Folder::new("invalid");
    let tagged = |prompt: &str, tag: &str| {
        let mut request = greedy(prompt);
        request.response_tags = vec![tag.to_string()];
        request
    };
    let (one, two, mut short) = (tagged("One", "one"), tagged("Two", "two"), greedy("Short"));
    short.response_ttl_ms = Some(1);
    let restart = |engine: Engine| {
        engine.flush().expect("written");
        engine.close();
        folder.open()
    };
    let engine = folder.open();
    for request in [&one, &two, &short] {
        assert!(!is_kept(&engine, request));
    }
    engine.flush().expect("written");
    assert_eq!(engine.responses().invalidate("one"), 1);
    std::thread::sleep(Duration::from_millis(5));
    let engine = restart(engine);
    assert!(!is_kept(&engine, &short), "its time was over");
    assert!(!is_kept(&engine, &one), "its tag was invalid");
    assert!(is_kept(&engine, &two));
    let engine = restart(engine);
    assert!(is_kept(&engine, &one), "it was computed again");
    // Not in memory of this engine, but on disk.
    assert_eq!(engine.responses().invalidate("two"), 0);
    assert!(!is_kept(&engine, &two), "at once");
    engine.responses().bump_version();
    assert!(!is_kept(&engine, &one) && is_kept(&engine, &one));
    let engine = restart(engine);
    assert_eq!(engine.responses().stats().version, 0);
    assert!(!is_kept(&engine, &one), "nobody comes back to a version that was left");
    engine.responses().clear();
    let engine = restart(engine);
    assert_eq!(engine.responses().stats().disk_entries, 0);
    assert!(!is_kept(&engine, &one));
}

/// Whatever byte of the files is changed or cut off, an answer is the right one; most of them are computed again.
#[test]
fn damaged_files_are_misses() {
    let folder = Folder::new("damage");
    let requests: Vec<Request> = (0..4).map(|i| greedy(&format!("Number {i}"))).collect();
    let first = folder.open();
    let right: Vec<Completion> = requests.iter().map(|request| complete(&first, request)).collect();
    first.flush().expect("written");
    first.close();
    let [segment] = &folder.segments()[..] else { panic!("one segment") };
    let sound = std::fs::read(segment).expect("readable");
    let (page, record) = (4_096, 4_096);
    // The page of the file; the second record's header, its payload, and its end.
    let changes: [(usize, Option<usize>, u64); 4] = [
        (9, None, 0),
        (page + record + 50, None, 0),
        (page + record + 200, None, 3),
        (0, Some(page + 3 * record + 9), 3),
    ];
    for (at, cut, num_found) in changes {
        let mut bytes = sound.clone();
        bytes[at] ^= u8::from(cut.is_none());
        bytes.truncate(cut.unwrap_or(sound.len()));
        for file in folder.segments() {
            std::fs::remove_file(file).expect("removed");
        }
        std::fs::write(segment, bytes).expect("written");
        let engine = folder.open();
        for (request, right) in requests.iter().zip(&right) {
            assert_eq!(complete(&engine, request).choices, right.choices, "byte {at}, cut {cut:?}");
        }
        assert_eq!(engine.responses().stats().disk_hits, num_found, "byte {at}, cut {cut:?}");
        engine.close();
    }
}

/// Another chat template or tokenizer beside the same weights is another model; so is another length of its context.
#[test]
fn the_text_of_a_model_is_part_of_it() {
    let folder = Folder::new("text");
    let model = folder.0.join("model");
    std::fs::create_dir_all(&model).expect("made");
    for name in
        ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    {
        std::fs::copy(demo::path().join(name), model.join(name)).expect("copied");
    }
    let answers = folder.0.join("kv");
    let request = greedy("Once upon a time");
    let finds = || {
        let engine = open_in(&answers, model.clone());
        let is_found = is_kept(&engine, &request);
        engine.flush().expect("written");
        engine.close();
        is_found
    };
    assert!(!finds() && finds());
    let change = |name: &str, from: &str, to: &str| {
        let text = std::fs::read_to_string(model.join(name)).expect("text");
        assert!(text.contains(from), "{name} has no {from}");
        std::fs::write(model.join(name), text.replacen(from, to, 1)).expect("written");
    };
    change("tokenizer_config.json", "\"chat_template\": \"", "\"chat_template\": \"{# another #}");
    assert!(!finds() && finds(), "another template");
    change("tokenizer.json", "{", "{ ");
    assert!(!finds() && finds(), "another tokenizer, byte for byte");
}

/// A second engine does not use the answers of a directory that another one writes: it would not hear what becomes invalid.
#[test]
fn one_process_has_the_answers() {
    let folder = Folder::new("second");
    let (first, request) = (folder.open(), greedy("Once"));
    assert!(!is_kept(&first, &request));
    first.flush().expect("written");
    let second = folder.open();
    assert!(!is_kept(&second, &request) && is_kept(&second, &request), "from its own memory");
    assert_eq!(second.responses().stats().disk_hits, 0);
    drop(first);
    // A size for which the directory is too small is refused by name.
    let refused = Engine::open({
        let mut options = ns_llm::EngineOptions::new(demo::path()).threads(1).kv_cache_dir(&folder.0);
        (options.response_cache.max_bytes, options.response_cache.disk_bytes) = (1 << 20, 1 << 20);
        options
    });
    assert!(matches!(refused.err(), Some(Error::InvalidArgument { field: "response_cache.disk_bytes", .. })));
}
