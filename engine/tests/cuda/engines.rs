//! Whole engines on the shim: batching, the prefix cache, preemption, the host tier and sampling keep their promises there.

use std::sync::Arc;

use ns_llm::{Completion, Engine, Event, Priority, Request};
use ns_llm_cuda_shim::ShimDevice;

use crate::demo::{Rng, fingerprint, with_logprobs};
use crate::{Test, shim};

/// The tests of this file.
pub(crate) const TESTS: &[Test] = &[
    ("an engine on a device answers alike alone, in company and from its cache", answers_are_the_requests_alone),
    ("tokens drawn on the device are those of the host's sampler", draws_are_the_samplers),
    ("blocks go to host memory and come back as they were", blocks_come_back_from_the_host),
];
/// Those that look into the shim.
pub(crate) const TESTS_OF_THE_SHIM: &[Test] = &[
    ("a device gives its memory back", memory_comes_back),
    ("kernels that are begun early change no bit", early_kernels_change_no_bit),
    ("blocks leave a device several at a time, through pinned memory", blocks_leave_together),
];

/// All at once.
fn together(engine: &Engine, requests: Vec<Request>) -> Vec<Completion> {
    std::thread::scope(|scope| {
        let run = |request| scope.spawn(move || engine.complete(request).expect("runs"));
        let running: Vec<_> = requests.into_iter().map(run).collect();
        running.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    })
}

/// Tokens and bits of the logprobs are those of the request alone: beside others that begin with it, from cached blocks,
/// and preempted in a pool that is too small for all. Each mechanism is shown to have been at work.
fn answers_are_the_requests_alone() {
    let mut random = Rng(23);
    let shared = random.prompt(40);
    let requests: Vec<Vec<u32>> = [3, 9].iter().map(|&more| [shared.clone(), random.prompt(more)].concat()).collect();
    let request = |tokens: &Vec<u32>| with_logprobs(Request::tokens(tokens.clone()).max_tokens(5).temperature(0.0));
    let alone: Vec<_> = requests
        .iter()
        .map(|tokens| {
            let engine = shim::open(|options| options.prefix_cache = false);
            assert!(engine.info().device == "cuda" && engine.info().isa.starts_with("sm_"));
            fingerprint(&engine.complete(request(tokens)).expect("runs"))
        })
        .collect();
    let engine = shim::open(|_| ());
    let in_company = together(&engine, requests.iter().map(request).collect());
    let cached = together(&engine, requests.iter().map(request).collect());
    for (idx, want) in alone.iter().enumerate() {
        assert_eq!(fingerprint(&in_company[idx]), *want, "in company");
        assert_eq!(fingerprint(&cached[idx]), *want, "from the cache");
        assert!(cached[idx].summary.usage.cached_tokens >= 32, "{:?}", cached[idx].summary.usage);
    }
    // Six blocks: the requests take four and three. The second to come goes first.
    let block_bytes = 2 * 2 * 6 * 16 * 2 * 64;
    let small = shim::open(|options| {
        options.kv_bytes = Some(6 * block_bytes);
        options.prefix_cache = false;
    });
    assert_eq!(small.stats().kv_blocks_total, 6);
    let (mut patient, mut urgent) = (request(&requests[1]), request(&requests[0]));
    patient.priority = Priority::Background;
    urgent.priority = Priority::High;
    let squeezed = std::thread::scope(|scope| {
        let patient = scope.spawn(|| small.complete(patient).expect("runs"));
        while small.stats().generation_tokens_total == 0 {
            std::thread::yield_now();
        }
        let urgent = small.complete(urgent).expect("runs");
        [urgent, patient.join().expect("no panic")]
    });
    assert!(small.stats().preemptions_total > 0, "nobody was preempted");
    for (got, want) in squeezed.iter().zip(&alone) {
        assert_eq!(fingerprint(got), *want, "preempted");
    }
}

/// The same seed gives the same tokens when they are chosen on the device and, because logprobs are asked for, on the host; with
/// penalties, bias and every truncation; and alone as beside others.
fn draws_are_the_samplers() {
    let engine = shim::open(|_| ());
    let prompt = Rng(31).prompt(12);
    let request = |seed: u64| {
        let mut request = Request::tokens(prompt.clone()).max_tokens(4).temperature(1.3).seed(seed);
        (request.sampling.top_k, request.sampling.top_p) = (Some(300), Some(0.98));
        (request.sampling.min_p, request.sampling.repetition_penalty) = (Some(1e-4), Some(1.3));
        request.sampling.frequency_penalty = Some(0.4);
        request.sampling.logit_bias = vec![(17, 2.5), (1100, -3.0)];
        request
    };
    let on_device = together(&engine, (0..4).map(request).collect());
    let on_host = together(&engine, (0..4).map(|seed| with_logprobs(request(seed))).collect());
    let tokens = |completion: &Completion| completion.choices[0].token_ids.clone();
    for (device, host) in on_device.iter().zip(&on_host) {
        assert!(device.choices[0].logprobs.is_empty() && !host.choices[0].logprobs.is_empty());
        assert_eq!(tokens(device), tokens(host));
    }
    assert!(on_device.iter().any(|other| tokens(other) != tokens(&on_device[0])), "no seed made a difference");
}

/// A prompt whose blocks were evicted to host memory is continued with the bits of one that was computed, and the tier
/// says that it gave them.
fn blocks_come_back_from_the_host() {
    let block_bytes = 2 * 2 * 6 * 16 * 2 * 64;
    let prompt = Rng(41).prompt(50);
    let request = || with_logprobs(Request::tokens(prompt.clone()).max_tokens(2).temperature(0.0));
    let engine = shim::open(|options| {
        options.kv_bytes = Some(6 * block_bytes);
        options.kv_host_bytes = 64 * block_bytes;
    });
    let first = fingerprint(&engine.complete(request()).expect("runs"));
    let others = Request::tokens(Rng(42).prompt(80)).max_tokens(1);
    engine.complete(others).expect("takes the place of the first one's blocks");
    let again = engine.complete(request()).expect("runs");
    assert_eq!(fingerprint(&again), first);
    let tiers = engine.stats().kv_tiers;
    assert!(tiers.iter().any(|tier| tier.name == "host" && tier.hits > 0), "{tiers:?}");
}

/// Blocks that a long prompt drives out together come to the host in fewer waits than they are, through pinned memory,
/// where the shim lets them arrive as late as it may; and continue with the bits that were computed.
fn blocks_leave_together() {
    let block_bytes = 2 * 2 * 6 * 16 * 2 * 64;
    let device = shim::shim();
    let options = shim::options(|options| {
        options.kv_bytes = Some(6 * block_bytes);
        options.kv_host_bytes = 64 * block_bytes;
    });
    let engine = Engine::open_among(options, shim::One(device.clone())).expect("opens");
    let request = || with_logprobs(Request::tokens(Rng(43).prompt(66)).max_tokens(1).temperature(0.0));
    let first = fingerprint(&engine.complete(request()).expect("runs"));
    engine
        .complete(Request::tokens(Rng(44).prompt(90)).max_tokens(1))
        .expect("takes the place of the first one's blocks");
    let (copies, waits) = device.pinned_copies();
    assert!(copies >= 4 && waits < copies, "{copies} blocks in {waits} waits");
    let again = engine.complete(request()).expect("runs");
    assert!(again.summary.usage.cached_tokens >= 32, "{:?}", again.summary.usage);
    assert_eq!(fingerprint(&again), first);
}

/// A device that begins kernels before those in front of them have run gives the bits of one that does not: of prompts and of
/// captured steps.
fn early_kernels_change_no_bit() {
    let answers = |device: Arc<ShimDevice>| {
        let engine = Engine::open_among(shim::options(|_| ()), shim::One(device.clone())).expect("opens");
        let request = |seed| Request::tokens(Rng(seed).prompt(40)).max_tokens(12).temperature(0.0);
        let mut answers = together(&engine, (50..53).map(request).collect());
        assert!(engine.stats().cuda_graphs.is_some_and(|graphs| graphs.launched > 0));
        answers.extend(together(&engine, (54..57).map(|seed| with_logprobs(request(seed))).collect()));
        (answers.iter().map(fingerprint).collect::<Vec<_>>(), device.early_kernels())
    };
    let ((early, num_early), (in_order, none)) = (answers(shim::shim()), answers(shim::shim_in_order()));
    assert_eq!(early, in_order);
    assert!(num_early > 100 && none == 0, "{num_early} and {none} kernels");
}

/// What an engine took of a device is free again when it is closed.
fn memory_comes_back() {
    let device = shim::shim();
    let engine = Engine::open_among(shim::options(|_| ()), shim::One(device.clone())).expect("opens");
    assert!(device.used_bytes() > 10 << 20, "weights are on the device");
    let stream = engine.generate(Request::tokens(vec![5, 6, 7]).max_tokens(2)).expect("admitted");
    assert!(stream.into_iter().any(|event| matches!(event, Ok(Event::Done(_)))));
    engine.close();
    drop(engine);
    assert_eq!(device.used_bytes(), 0);
}
