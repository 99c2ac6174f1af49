//! Steps that are captured and launched as one, and a host that is one step ahead: no bit of an answer depends on either,
//! whatever joins, leaves, is cancelled or preempted; a device that captures nothing serves as before; and one that is
//! lost in a captured step ends its engine. Each mechanism is shown to have been at work.

use std::sync::Arc;

use ns_llm::{Completion, CudaGraphStats, EmbeddingRequest, Engine, EngineOptions, Error, Event, Priority, Request};
use ns_llm_cuda_shim::{Fault, FaultyDevice, IdleDevice};

use crate::demo::{Rng, fingerprint, with_logprobs};
use crate::{Test, shim};

/// The tests of this file.
pub(crate) const TESTS: &[Test] = &[
    ("captured steps change no bit, whoever joins and leaves", mixes_are_the_requests_alone),
    ("keys and values of captured steps are those of plain ones", captured_steps_store_the_same_keys),
];
/// Those that need devices that do nothing, or fail.
pub(crate) const TESTS_OF_FAULTS: &[Test] = &[
    ("a device that captures nothing is served kernel by kernel, and says so", a_refused_capture_is_told),
    ("a device that is lost in a captured step ends its engine", a_device_is_lost_in_a_captured_step),
    (
        "a token that ends an answer is seen one step late, and what was computed behind it is dropped",
        ends_are_seen_late,
    ),
    ("vectors are computed while a host is a step ahead", encodings_are_not_starved),
];

fn graphs(engine: &Engine) -> CudaGraphStats {
    engine.stats().cuda_graphs.expect("an engine on a device has them")
}

/// The one that is given up.
const GIVEN_UP: u64 = 5;

/// Every way to choose a token: greedy, drawn, truncated, with a bias, with penalties.
fn request(seed: u64) -> Request {
    let mut random = Rng(seed);
    let prompt = random.prompt(5 + (seed * 7 % 40) as usize);
    let max_tokens = if seed == GIVEN_UP { 40 } else { 3 + seed as usize % 4 };
    let mut request = Request::tokens(prompt).max_tokens(max_tokens).seed(seed);
    request.ignore_eos = true;
    request.sampling.temperature = Some([0.0, 1.2, 0.8][seed as usize % 3]);
    match seed % 4 {
        1 => (request.sampling.top_k, request.sampling.top_p) = (Some(200), Some(0.97)),
        2 => request.sampling.logit_bias = vec![(17, 2.5), (1100, -3.0)],
        3 => request.sampling.repetition_penalty = Some(1.3),
        _ => {}
    }
    request
}

/// Six requests in a pool that is too small for all of them, which begin one by one; one is given up after its first
/// token. Gives the tokens of the others.
fn mixed(engine: &Engine) -> Vec<Vec<u32>> {
    let run = |seed: u64| {
        let mut request = request(seed);
        request.priority = if seed.is_multiple_of(2) { Priority::Background } else { Priority::High };
        let stream = engine.generate(request).expect("admitted");
        let gives_up = seed == GIVEN_UP;
        let mut tokens = Vec::new();
        for event in stream {
            match event.expect("runs") {
                Event::Delta(delta) => tokens.extend(delta.token_ids),
                Event::Done(_) => break,
                _ => {}
            }
            if gives_up && !tokens.is_empty() {
                return Vec::new();
            }
        }
        tokens
    };
    std::thread::scope(|scope| {
        let mut running = Vec::new();
        for seed in 0..6 {
            // When there is a token of the one before, if not earlier: then the numbers of rows differ from step to step.
            let generated = engine.stats().generation_tokens_total;
            running.push(scope.spawn(move || run(seed)));
            while engine.stats().generation_tokens_total == generated && !running[running.len() - 1].is_finished() {
                std::thread::yield_now();
            }
        }
        running.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    })
}

/// The tokens of a mix of requests are those of each request alone, kernel by kernel: with graphs for all buckets, and
/// with one graph that each bucket takes from the last.
fn mixes_are_the_requests_alone() {
    let block_bytes = 2 * 2 * 6 * 16 * 2 * 64;
    let plain = shim::open(|options| (options.max_cuda_graphs, options.prefix_cache) = (0, false));
    let tokens = |completion: &Completion| completion.choices[0].token_ids.clone();
    let alone: Vec<_> = (0..GIVEN_UP).map(|seed| tokens(&plain.complete(request(seed)).expect("runs"))).collect();
    let of_plain = graphs(&plain);
    assert_eq!((of_plain.captured, of_plain.launched), (0, 0));
    assert_eq!(of_plain.refusal.as_deref(), Some("it was not asked for"));
    // Twice with all graphs: what the first has captured, the second launches.
    for (max_cuda_graphs, rounds) in [(32, 2), (1, 1)] {
        let small = |options: &mut EngineOptions| {
            (options.max_cuda_graphs, options.prefix_cache) = (max_cuda_graphs, false);
            options.kv_bytes = Some(6 * block_bytes);
        };
        let engine = shim::open(small);
        for _ in 0..rounds {
            let answers = mixed(&engine);
            for (seed, want) in alone.iter().enumerate() {
                assert_eq!(answers[seed], *want, "request {seed}, {max_cuda_graphs} graphs");
            }
        }
        // One row, two, one: each takes the place of the other where there is but one.
        for num_choices in [1, 2, 1] {
            let mut request = request(0).max_tokens(5);
            request.n = num_choices;
            let answer = engine.complete(request).expect("runs");
            assert!(answer.choices.iter().all(|choice| choice.token_ids[..3] == alone[0]), "{num_choices} choices");
        }
        let (found, stats) = (graphs(&engine), engine.stats());
        assert_eq!(found.refusal, None);
        assert!(found.captured > 0 && found.launched > found.captured, "{max_cuda_graphs}: {found:?}");
        assert_eq!(found.evicted > 0, max_cuda_graphs == 1, "{found:?}");
        assert!(found.kept <= max_cuda_graphs as u64, "{found:?}");
        assert!(stats.preemptions_total > 0 && stats.requests_cancelled > 0, "{stats:?}");
        assert_eq!(stats.kv_blocks_used, 0);
    }
}

/// An answer that was computed in captured steps is continued from its cached blocks, with logprobs: their bits are those
/// of an engine that captures nothing, so the keys and values are.
fn captured_steps_store_the_same_keys() {
    let prompt = Rng(77).prompt(20);
    let answer = |engine: &Engine| {
        let mut request = Request::tokens(prompt.clone()).max_tokens(14).temperature(0.0);
        request.ignore_eos = true;
        let answer = engine.complete(request).expect("runs").choices[0].token_ids.clone();
        let longer = [prompt.clone(), answer].concat();
        let next =
            engine.complete(with_logprobs(Request::tokens(longer).max_tokens(2).temperature(0.0))).expect("runs");
        assert!(next.summary.usage.cached_tokens >= 32, "{:?}", next.summary.usage);
        fingerprint(&next)
    };
    let (plain, captured) = (shim::open(|options| options.max_cuda_graphs = 0), shim::open(|_| ()));
    assert_eq!(answer(&captured), answer(&plain));
    assert!(graphs(&captured).launched >= 10 && graphs(&plain).launched == 0, "{:?}", graphs(&captured));
}

fn faulty(fault: Fault) -> (Arc<IdleDevice>, Arc<FaultyDevice>) {
    let idle = IdleDevice::new(shim::MEMORY_BYTES);
    (idle.clone(), FaultyDevice::new(idle, fault))
}

/// The driver is asked once, its refusal is in the statistics, and no request notices.
fn a_refused_capture_is_told() {
    let (_, device) = faulty(Fault::Capture);
    device.fail_from(Some(0));
    let engine = Engine::open_among(shim::options(|_| ()), shim::One(device.clone())).expect("opens");
    for seed in 0..3 {
        let answer = engine.complete(request(seed).max_tokens(8)).expect("runs");
        assert_eq!(answer.choices[0].token_ids.len(), 8);
    }
    assert_eq!(device.num_faults(), 1);
    let found = graphs(&engine);
    let refusal = found.refusal.expect("why there are none");
    assert!(refusal.contains("cuStreamBeginCapture") && refusal.contains("a test forbade it"), "{refusal}");
    assert_eq!((found.captured, found.launched, found.kept), (0, 0, 0));
}

/// Lost, refused or without end at a captured step: the first and the last end the engine, the second its request alone;
/// nothing is left.
fn a_device_is_lost_in_a_captured_step() {
    for fault in [Fault::Lost, Fault::Launch, Fault::Hang] {
        let (idle, device) = faulty(fault);
        let engine = Engine::open_among(shim::options(|_| ()), shim::One(device.clone())).expect("opens");
        device.fail_from_replay(5);
        let stream = engine.submit(request(0).max_tokens(50)).expect("admitted");
        let error = stream.into_iter().last().expect("an end").expect_err("the device fails");
        assert!(device.num_replays() >= 6 && device.num_faults() > 0);
        match fault {
            Fault::Launch => {
                assert!(matches!(error, Error::Internal { .. }), "{error}");
                device.fail_from(None);
                assert_eq!(engine.complete(request(4)).expect("serves again").choices[0].token_ids.len(), 3);
            }
            _ => assert!(matches!(error, Error::DeviceLost { .. }), "{error}"),
        }
        assert_eq!(device.num_endless_calls(), 0);
        engine.close();
        drop(engine);
        if fault != Fault::Hang {
            assert_eq!(idle.used_bytes(), 0, "{fault:?}");
        }
    }
}

/// A device that does nothing draws token 0, which ends a text: when the host sees it, the next step has been launched.
/// Its token is nobody's, and no block stays in use. Where the number of tokens is the end, the host knows it, and
/// launches nothing behind it.
fn ends_are_seen_late() {
    let open = || Engine::open_among(shim::options(|_| ()), shim::One(IdleDevice::new(shim::MEMORY_BYTES)));
    let engine = open().expect("opens");
    let prompt = Rng(3).prompt(18);
    let answer = engine.complete(Request::tokens(prompt.clone()).max_tokens(50)).expect("runs");
    assert_eq!(answer.choices[0].token_ids.len(), answer.summary.usage.completion_tokens);
    // Settled when the step behind it is.
    while engine.stats().computed_tokens_total < 19 {
        std::thread::yield_now();
    }
    let stats = engine.stats();
    assert_eq!((stats.generation_tokens_total, stats.computed_tokens_total), (1, 19), "the prompt, and one in vain");
    assert_eq!(stats.kv_blocks_used, 0);

    let engine = open().expect("opens");
    let mut request = Request::tokens(prompt).max_tokens(5);
    request.ignore_eos = true;
    engine.complete(request).expect("runs");
    let stats = engine.stats();
    assert_eq!((stats.generation_tokens_total, stats.computed_tokens_total), (5, 22), "nothing in vain");
}

/// A text for a vector is computed when no step is in flight, and a generation that is always a step ahead does not keep
/// it out: while it runs, vectors are answered.
fn encodings_are_not_starved() {
    let options = shim::options(|options| (options.context_tokens, options.kv_bytes) = (Some(1_024), Some(16 << 20)));
    let engine = Engine::open_among(options, shim::One(IdleDevice::new(shim::MEMORY_BYTES))).expect("opens");
    let mut request = Request::tokens(Rng(5).prompt(18)).max_tokens(600);
    request.ignore_eos = true;
    let mut stream = engine.generate(request).expect("admitted");
    stream.next_event().expect("an event").expect("no error");
    let mut num_meanwhile = 0;
    for _ in 0..5 {
        let answer = engine.embed(EmbeddingRequest::new([vec![7, 8, 9]])).expect("embeds");
        assert_eq!(answer.embeddings.len(), 1);
        num_meanwhile += usize::from(engine.stats().generation_tokens_total < 600);
    }
    assert!(num_meanwhile > 0, "the generation was over first");
    assert!(graphs(&engine).launched > 0, "it was a step ahead");
    let ended = stream.find_map(|event| match event.expect("no error") {
        Event::Done(summary) => Some(summary),
        _ => None,
    });
    assert_eq!(ended.expect("an end").usage.completion_tokens, 600);
}
