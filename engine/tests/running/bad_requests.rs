//! Whatever a request says, it gets its answer or its typed error, and nobody else's request notices (the process
//! lives on in each test to show it).

use ns_llm::config::*;
use ns_llm::{Error, Message, Request};

use crate::demo;

/// Every numeric field has a closed range: a value outside is refused by name before any work, values at the ends are
/// not.
#[test]
fn numbers_out_of_range_are_refused_by_name() {
    type Set = fn(&mut Request, f32);
    let floats: [(&str, Set, &[f32], &[f32]); 6] = [
        ("temperature", |r, v| r.sampling.temperature = Some(v), &[-0.1, 100.1], &[0.0, 100.0]),
        ("top_p", |r, v| r.sampling.top_p = Some(v), &[0.0, -1.0, 1.01], &[0.01, 1.0]),
        ("min_p", |r, v| r.sampling.min_p = Some(v), &[-0.01, 1.01], &[0.0, 1.0]),
        ("repetition_penalty", |r, v| r.sampling.repetition_penalty = Some(v), &[0.0, -1.0, 101.0], &[0.5, 100.0]),
        ("presence_penalty", |r, v| r.sampling.presence_penalty = Some(v), &[-2.1, 2.1], &[-2.0, 2.0]),
        ("frequency_penalty", |r, v| r.sampling.frequency_penalty = Some(v), &[-2.1, 2.1], &[-2.0, 2.0]),
    ];
    for (name, set, bad, good) in floats {
        for &value in bad.iter().chain(&[f32::NAN, f32::INFINITY, f32::NEG_INFINITY]) {
            let mut request = Request::prompt("x");
            set(&mut request, value);
            assert_refused(&request, name);
        }
        for &value in good {
            let mut request = Request::prompt("x");
            set(&mut request, value);
            assert_eq!(request.validate(), Ok(()), "{name} = {value}");
        }
    }
}

/// Counts and lengths end at their documented limits: the limit passes, one more is refused by name.
#[test]
fn sizes_beyond_their_limits_are_refused_by_name() {
    type Set = fn(&mut Request, usize);
    let sizes: [(&str, usize, Set); 10] = [
        ("n", MAX_CHOICES, |r, v| r.n = v),
        ("logprobs", MAX_LOGPROBS, |r, v| r.logprobs = Some(v)),
        ("max_tokens", MAX_NEW_TOKENS, |r, v| r.max_tokens = Some(v)),
        ("stop (strings)", MAX_STOP_STRINGS, |r, v| r.stop = vec!["s".to_string(); v]),
        ("stop (bytes", MAX_STOP_STRING_BYTES, |r, v| r.stop = vec!["s".repeat(v)]),
        ("stop_token_ids", MAX_STOP_TOKENS, |r, v| r.stop_token_ids = vec![1; v]),
        ("logit_bias (entries)", MAX_LOGIT_BIAS, |r, v| r.sampling.logit_bias = vec![(1, 0.0); v]),
        ("timeout_ms", MAX_TIMEOUT_MS as usize, |r, v| r.timeout_ms = Some(v as u64)),
        ("namespace", MAX_NAME_BYTES, |r, v| r.namespace = Some("n".repeat(v))),
        ("prompt (bytes)", MAX_PROMPT_BYTES, |r, v| r.prompt = ns_llm::Prompt::Text("p".repeat(v))),
    ];
    for (name, limit, set) in sizes {
        let mut request = Request::prompt("x");
        set(&mut request, limit);
        assert_eq!(request.validate(), Ok(()), "{name} at its limit of {limit}");
        set(&mut request, limit + 1);
        assert_refused(&request, name);
    }
    let zero: [(&str, Set); 3] = [
        ("n", |r, v| r.n = v),
        ("timeout_ms", |r, v| r.timeout_ms = Some(v as u64)),
        ("stop", |r, _| r.stop = vec![String::new()]),
    ];
    for (name, set) in zero {
        let mut request = Request::prompt("x");
        set(&mut request, 0);
        assert_refused(&request, name);
    }
    assert_refused(&Request::chat(Vec::new()), "messages");
    assert_refused(&Request::chat(vec![Message::new("user", ""); MAX_MESSAGES + 1]), "messages (entries)");
    assert_refused(&Request::chat([Message::new("user", "x".repeat(MAX_PROMPT_BYTES))]), "messages (bytes)");
    for bias in [-100.5, 100.5, f32::NAN] {
        let mut request = Request::prompt("x");
        request.sampling.logit_bias = vec![(1, bias)];
        assert_refused(&request, "logit_bias");
    }
}

fn assert_refused(request: &Request, name: &str) {
    match request.validate() {
        Err(Error::InvalidArgument { field, value, expected }) => {
            assert!(field.starts_with(name), "{name} was refused as {field}");
            assert!(!value.is_empty() && !expected.is_empty(), "the message tells value and range");
        }
        other => panic!("{name}: {other:?}"),
    }
}

/// Token ids outside the vocabulary are refused on their way in, wherever they stand.
#[test]
fn foreign_token_ids_are_refused() {
    let engine = demo::open(|_| ());
    let vocab = engine.info().vocab_size as u32;
    let mut bias = Request::prompt("x");
    bias.sampling.logit_bias = vec![(vocab, 1.0)];
    let mut stop = Request::prompt("x");
    stop.stop_token_ids = vec![u32::MAX];
    for request in [Request::tokens([vocab]), bias, stop] {
        let error = engine.generate(request.max_tokens(1)).err().expect("must be refused");
        assert_eq!(error.code(), "invalid_argument", "{error}");
    }
    let good = engine.complete(Request::tokens([vocab - 1]).max_tokens(1)).expect("the last id exists");
    assert_eq!(good.choices[0].token_ids.len(), 1);
}

/// Prompts around the length of the context, with 0 and 1 new tokens, have defined results.
#[test]
fn prompts_around_the_context_are_defined() {
    let context = 64;
    let engine = demo::open(|options| options.context_tokens = Some(context));
    let run = |prompt: usize, max_tokens: usize| {
        let mut request = Request::tokens(vec![5; prompt]).max_tokens(max_tokens);
        request.ignore_eos = true;
        engine.complete(request).map(|completion| {
            let choice = &completion.choices[0];
            (choice.token_ids.len(), choice.finish_reason.as_str())
        })
    };
    assert_eq!(run(context - 1, 0), Ok((0, "length")));
    assert_eq!(run(context - 1, 1), Ok((1, "length")));
    assert_eq!(run(context - 1, 50), Ok((1, "length")), "the end of the context bounds the answer");
    assert_eq!(run(context, 0), Ok((0, "length")));
    for (prompt, max_tokens) in [(context, 1), (context + 1, 0), (context + 1, 1)] {
        assert_eq!(run(prompt, max_tokens).expect_err("too long").code(), "prompt_too_long", "{prompt} {max_tokens}");
    }
    assert_eq!(run(0, 1).expect_err("empty").code(), "invalid_argument");
}

/// A request that could not run on an empty pool is refused at once instead of waiting for ever; its neighbours run.
#[test]
fn requests_that_never_fit_are_refused() {
    let engine = demo::open(|options| {
        options.kv_bytes = Some(4 * 16 * 6 * 2 * 2 * 64 * 2); // 4 blocks of 16 tokens
    });
    assert_eq!(engine.stats().kv_blocks_total, 4);
    assert_eq!(engine.info().context_tokens, 64, "the pool bounds the context");
    let mut neighbour = engine.generate(Request::tokens(vec![5; 8]).max_tokens(8)).expect("fits");
    let error = engine.generate(Request::tokens(vec![5; 65]).max_tokens(1)).err().expect("does not fit");
    assert!(["prompt_too_long", "exceeds_kv_pool"].contains(&error.code()), "{error}");
    assert!(neighbour.by_ref().all(|event| event.is_ok()));
}

/// Any UTF-8 up to the limit is a namespace; it separates caches and changes nothing else.
#[test]
fn any_text_is_a_namespace() {
    let engine = demo::open(|_| ());
    let ask = |namespace: Option<&str>| {
        let mut request = Request::tokens((3..103).collect::<Vec<u32>>()).max_tokens(4);
        request.namespace = namespace.map(str::to_string);
        engine.complete(request).expect("runs")
    };
    let first = ask(None);
    for namespace in ["", "a", "../../etc/passwd", "\0\u{1f600}\n", &"é".repeat(256)] {
        let (cold, warm) = (ask(Some(namespace)), ask(Some(namespace)));
        assert_eq!(cold.summary.usage.cached_tokens, 0, "{namespace:?} shares nothing with the others");
        assert!(warm.summary.usage.cached_tokens > 0, "{namespace:?} shares with itself");
        assert_eq!((&cold.choices, &warm.choices), (&first.choices, &first.choices), "{namespace:?}");
    }
}

/// A queue that is full refuses the next request at once, with what waits and the limit; the others are answered.
#[test]
fn a_full_queue_refuses() {
    let engine = demo::open(|options| {
        options.max_waiting_requests = 4;
        options.max_running_sequences = 1;
    });
    let submit = || engine.generate(Request::tokens(vec![5; 32]).max_tokens(64));
    let mut streams = Vec::new();
    let refused = (0..64).find_map(|_| match submit() {
        Ok(stream) => {
            streams.push(stream);
            None
        }
        Err(error) => Some(error),
    });
    assert_eq!(refused.expect("the queue is bounded").code(), "overloaded");
    assert!(streams.len() >= 4);
    for stream in streams {
        assert!(stream.into_iter().all(|event| event.is_ok()), "an accepted request is answered");
    }
}

/// A deadline that passes ends the request with its own error, running or still waiting.
#[test]
fn deadlines_end_requests() {
    let engine = demo::open(|options| options.max_running_sequences = 1);
    let request = |tokens| {
        let mut request = Request::tokens(vec![5; 16]).max_tokens(tokens);
        request.ignore_eos = true;
        request.timeout_ms = Some(30);
        request
    };
    let running = engine.generate(request(2000)).expect("admitted");
    let waiting = engine.generate(request(2000)).expect("admitted");
    for stream in [running, waiting] {
        let last = stream.last().expect("a stream has a last event");
        assert_eq!(last, Err(Error::DeadlineExceeded { timeout_ms: 30 }));
    }
    let after = engine.complete(Request::tokens(vec![5; 16]).max_tokens(1)).expect("the engine goes on");
    assert_eq!(after.choices[0].token_ids.len(), 1);
    assert_eq!(engine.stats().kv_blocks_used, 0, "nothing is left behind");
}
