//! Promise: the same request gets the same tokens and the same logit bits, whatever else the engine does. Shown on the
//! model that ships, by comparing everything a request reports with a run of it alone. (Chunk sizes, threads, caches
//! and preemption are in `determinism.rs`.)

use ns_llm::{Completion, Engine, Request};

use crate::demo;
use crate::demo::{Fingerprint, Rng, fingerprint, with_logprobs};

/// A request of random length and kind: greedy or sampled, with or without penalties, text or chat.
fn random_request(rng: &mut Rng) -> Request {
    let length = 1 + rng.below(120);
    let mut request = Request::tokens(rng.prompt(length)).max_tokens(1 + rng.below(24)).seed(rng.next());
    if rng.below(2) == 0 {
        request = request.temperature(0.8);
        request.sampling.top_k = Some(20);
        request.sampling.top_p = Some(0.9);
    }
    if rng.below(3) == 0 {
        request.sampling.repetition_penalty = Some(1.2);
        request.sampling.frequency_penalty = Some(0.4);
    }
    request.ignore_eos = rng.below(2) == 0;
    with_logprobs(request)
}

fn complete_all(engine: &Engine, requests: &[Request]) -> Vec<Completion> {
    let handles: Vec<_> = requests
        .iter()
        .cloned()
        .map(|request| {
            let engine = engine.clone();
            std::thread::spawn(move || engine.complete(request).expect("runs"))
        })
        .collect();
    handles.into_iter().map(|handle| handle.join().expect("no panic")).collect()
}

/// Requests in batches of 2 to 32 random mates equal themselves alone, bit for bit; fewer steps than tokens prove that
/// they really were computed together.
#[test]
fn batch_mates_do_not_change_an_answer() {
    let alone = demo::open(|options| {
        options.max_running_sequences = 1;
        options.prefix_cache = false;
    });
    let together = demo::open(|_| ());
    let mut rng = Rng(11);
    let mut comparisons = 0;
    for batch in [2, 3, 5, 8, 16, 32] {
        let requests: Vec<Request> = (0..batch).map(|_| random_request(&mut rng)).collect();
        let expected: Vec<Fingerprint> =
            requests.iter().map(|request| fingerprint(&alone.complete(request.clone()).expect("runs"))).collect();
        for (idx, (completion, expected)) in complete_all(&together, &requests).iter().zip(&expected).enumerate() {
            assert_eq!(fingerprint(completion), *expected, "request {idx} of a batch of {batch}");
            comparisons += 1;
        }
    }
    let (solo, shared) = (alone.stats(), together.stats());
    assert_eq!(comparisons, 66);
    assert_eq!(solo.generation_tokens_total, shared.generation_tokens_total);
    assert!(shared.steps_total * 2 < solo.steps_total, "{} against {} steps", shared.steps_total, solo.steps_total);
}

/// The choices of one request equal separate requests with the documented derived seeds, and differ from each other.
#[test]
fn choices_equal_separate_requests() {
    let engine = demo::open(|_| ());
    let request = || Request::prompt("Once upon a time").max_tokens(24).temperature(1.0).seed(7);
    let mut three = request();
    three.n = 3;
    let three = engine.complete(three).expect("runs");
    let texts: Vec<&str> = three.choices.iter().map(|choice| choice.text.as_str()).collect();
    assert!(texts[0] != texts[1] && texts[1] != texts[2], "{texts:?}");
    for (idx, choice) in three.choices.iter().enumerate() {
        let single = request().seed(ns_llm::sampler::choice_seed(7, idx));
        assert_eq!(&engine.complete(single).expect("runs").choices[0], choice);
    }
    assert_eq!(three.summary.seed, 7);
}

/// An unset seed is drawn and reported, and gives the same answer again.
#[test]
fn a_drawn_seed_is_reported() {
    let engine = demo::open(|_| ());
    let first = engine.complete(Request::prompt("One day").max_tokens(16).temperature(1.5)).expect("runs");
    let other = engine.complete(Request::prompt("One day").max_tokens(16).temperature(1.5)).expect("runs");
    assert_ne!(first.summary.seed, other.summary.seed);
    let again = Request::prompt("One day").max_tokens(16).temperature(1.5).seed(first.summary.seed);
    assert_eq!(engine.complete(again).expect("runs").choices, first.choices);
}

/// Pieces of a stream join to the text of the finished request, each one whole, and stop strings never leak a part.
#[test]
fn streams_join_to_the_answer() {
    let engine = demo::open(|_| ());
    let message = ns_llm::Message::new("user", "Repeat after me: 🐶 🌈 ❤️ 日本 café");
    let whole = engine.complete(Request::chat([message.clone()]).max_tokens(64)).expect("runs");
    assert!(whole.choices[0].text.contains('🌈'), "{}", whole.choices[0].text);
    assert!(!whole.choices[0].text.contains('\u{fffd}'));
    let mut joined = String::new();
    for event in engine.generate(Request::chat([message.clone()]).max_tokens(64)).expect("admitted") {
        if let ns_llm::Event::Delta(delta) = event.expect("runs") {
            joined.push_str(&delta.text);
        }
    }
    assert_eq!(joined, whole.choices[0].text);
    let stopped = engine.complete(Request::chat([message]).max_tokens(64).stop("日本")).expect("runs");
    let expected = whole.choices[0].text.split("日本").next().expect("split gives one part");
    assert_eq!(stopped.choices[0].text, expected);
    assert_eq!(stopped.choices[0].finish_reason, ns_llm::FinishReason::Stop);
}

/// While a step is computed the engine tells how large it is and since when, and once steps were done, what to expect of
/// it; an idle engine computes none.
#[test]
fn the_running_step_is_told() {
    let engine = demo::open(|_| ());
    let mut rng = Rng(5);
    assert_eq!(engine.running_step(), None);
    // Looks until it has met one in the middle.
    let mut caught = || loop {
        let stream = engine.generate(Request::tokens(rng.prompt(1_000)).max_tokens(1)).expect("admitted");
        let mut found = None;
        while found.is_none() && engine.stats().num_sequences_running + engine.stats().num_requests_preparing > 0 {
            found = engine.running_step();
        }
        stream.for_each(|event| drop(event.expect("runs")));
        if let Some(step) = found {
            break step;
        }
    };
    assert!((1..=512).contains(&caught().num_tokens));
    let step = caught();
    assert!(step.expected.is_some_and(|expected| !expected.is_zero()), "{step:?}");
    // The last token is told of before its step is over.
    while engine.running_step().is_some() {}
}
