//! Promise: same build, same instruction set, same model, same request and seed give the same tokens and the same logit
//! bits, whatever the chunk size, the number of threads, the state of the cache, and however often the request is
//! preempted. Shown on the model that ships, step by step; each test proves that its mechanism fired.

use ns_llm::sequence::SequenceSpec;
use ns_llm::{EngineOptions, KvDtype, QuantType, SamplingParams, WeightFormat};

use crate::demo;
use crate::demo::Rng;
use crate::driver::{Driver, Trace, spec};

const NEW_TOKENS: usize = 24;

fn open(change: impl FnOnce(&mut EngineOptions)) -> Driver {
    let mut options = EngineOptions::new(demo::path()).threads(1);
    options.prefix_cache = false;
    change(&mut options);
    Driver::open(options)
}

/// Prompts of several lengths, greedy and sampled.
fn specs() -> Vec<SequenceSpec> {
    let mut rng = Rng(21);
    [1, 15, 16, 17, 64, 65, 150, 300]
        .into_iter()
        .enumerate()
        .map(|(idx, length)| {
            let sampled =
                SamplingParams { temperature: 0.9, top_k: 50, top_p: 0.95, seed: 5, ..SamplingParams::greedy() };
            spec(&rng.prompt(length), NEW_TOKENS, if idx % 2 == 0 { SamplingParams::greedy() } else { sampled })
        })
        .collect()
}

/// Each sequence alone, its prompt in one go.
fn reference() -> Vec<Trace> {
    let mut driver = open(|_| ());
    let traces: Vec<Trace> = specs().into_iter().flat_map(|spec| driver.run(vec![spec], |_, _, _| ())).collect();
    assert!(
        traces.iter().all(|trace| trace.token_ids.len() == NEW_TOKENS && trace.logprob_bits.len() == 20 * NEW_TOKENS)
    );
    traces
}

fn assert_same(actual: &[Trace], expected: &[Trace], what: &str) {
    for (idx, (actual, expected)) in actual.iter().zip(expected).enumerate() {
        assert_eq!(actual.token_ids, expected.token_ids, "tokens of sequence {idx}: {what}");
        let first = actual.logprob_bits.iter().zip(&expected.logprob_bits).position(|(a, b)| a != b);
        assert_eq!(first, None, "first logprob of sequence {idx} with other bits: {what}");
    }
}

/// Chunks of 1, 7, 16, 64 and 512 tokens give the same bits; the number of steps proves the chunking.
#[test]
fn chunk_sizes_do_not_change_a_bit() {
    let expected = reference();
    let mut steps = Vec::new();
    for chunk in [1, 7, 16, 64, 512] {
        let mut driver = open(|options| {
            options.prefill_budget_tokens = chunk;
            options.mixed_budget_tokens = chunk;
        });
        let traces: Vec<Trace> = specs().into_iter().flat_map(|spec| driver.run(vec![spec], |_, _, _| ())).collect();
        assert_same(&traces, &expected, &format!("chunks of {chunk}"));
        steps.push(driver.loaded.scheduler.counters().steps);
    }
    assert!(steps.windows(2).all(|pair| pair[0] >= pair[1]) && steps[0] > steps[4] + 300, "{steps:?}");
}

/// 1, 2, 3 and 4 threads give the same bits, alone and in one batch.
#[test]
fn thread_counts_do_not_change_a_bit() {
    let expected = reference();
    for threads in [1, 2, 3, 4] {
        let mut driver = open(|options| options.threads = Some(threads));
        assert_eq!(driver.loaded.info.threads, threads);
        assert_same(&driver.run(specs(), |_, _, _| ()), &expected, &format!("{threads} threads, one batch"));
    }
}

/// A second run finds its prefixes in the cache and gives the same bits.
#[test]
fn a_warm_cache_does_not_change_a_bit() {
    let expected = reference();
    let mut driver = open(|options| options.prefix_cache = true);
    assert_same(&driver.run(specs(), |_, _, _| ()), &expected, "cold");
    assert_same(&driver.run(specs(), |_, _, _| ()), &expected, "warm");
    let counters = driver.loaded.scheduler.counters();
    assert_eq!(counters.prefix_hit_tokens, 16 + 48 + 64 + 144 + 288, "every full block but the last token's");
}

/// Sequences preempted before any one step of their lives, by recomputing, give the same bits; with the cache on and off.
#[test]
fn preemption_at_every_step_does_not_change_a_bit() {
    let some = || specs().into_iter().step_by(3); // 1, 17 and 150 tokens: decoding, decoding, in its prompt
    let expected: Vec<Trace> = reference().into_iter().step_by(3).collect();
    for prefix_cache in [false, true] {
        let mut driver = open(|options| {
            options.prefix_cache = prefix_cache;
            options.prefill_budget_tokens = 64;
            options.mixed_budget_tokens = 64;
        });
        for preempted_at in 1..NEW_TOKENS {
            let mut preempted = 0;
            let traces = driver.run(some().collect(), |scheduler, seqs, step| {
                if step == preempted_at {
                    preempted += seqs.iter().filter(|&&seq| scheduler.preempt(seq)).count();
                }
            });
            assert!(preempted > 0, "nothing was preempted at step {preempted_at}");
            assert_same(&traces, &expected, &format!("preempted before step {preempted_at}, cache {prefix_cache}"));
        }
        let counters = driver.loaded.scheduler.counters();
        assert!(counters.preemptions > 60 && counters.recomputed_tokens > 0, "{counters:?}");
    }
}

/// A pool too small for the answers of all that were admitted preempts by itself, and still nobody's bits change.
#[test]
fn a_small_pool_does_not_change_a_bit() {
    let many = || (0..12).map(|seed| spec(&Rng(seed).prompt(15), 50, SamplingParams::greedy()));
    let mut roomy = open(|_| ());
    let expected: Vec<Trace> = many().flat_map(|spec| roomy.run(vec![spec], |_, _, _| ())).collect();
    assert_eq!(roomy.loaded.scheduler.counters().preemptions, 0);
    let mut driver = open(|options| {
        options.kv_bytes = Some(24 * 16 * 6 * 2 * 2 * 64 * 2); // 24 blocks, and each sequence grows from 1 to 4
    });
    assert_same(&driver.run(many().collect(), |_, _, _| ()), &expected, "24 blocks");
    assert!(driver.loaded.scheduler.counters().preemptions > 0, "{:?}", driver.loaded.scheduler.counters());
}

/// The same holds for f32 weights and f32 KV.
#[test]
fn f32_is_invariant_too() {
    let run = |batch: bool, chunk: usize| {
        let mut driver = open(|options| {
            options.weights = WeightFormat::F32;
            options.threads = Some(2);
            options.prefill_budget_tokens = chunk;
            options.mixed_budget_tokens = chunk;
        });
        assert_eq!((driver.loaded.info.weights, driver.loaded.info.kv_dtype), ("f32", "f32"));
        match batch {
            true => driver.run(specs(), |_, _, _| ()),
            false => specs().into_iter().flat_map(|spec| driver.run(vec![spec], |_, _, _| ())).collect(),
        }
    };
    assert_same(&run(true, 19), &run(false, 512), "a batch in chunks of 19 against each alone");
}

/// And for keys and values in bf16 and in 8 bits: in one batch and in chunks of 19, cold and warm, and preempted in the
/// middle. Other bits than those of f16 prove that they were kept so.
#[test]
fn small_kv_is_invariant_too() {
    let stored = reference();
    for (dtype, name) in [(KvDtype::Bf16, "bf16"), (KvDtype::Int8, "int8")] {
        let mut alone = open(|options| options.kv_dtype = Some(dtype));
        assert_eq!(alone.loaded.info.kv_dtype, name);
        let expected: Vec<Trace> = specs().into_iter().flat_map(|spec| alone.run(vec![spec], |_, _, _| ())).collect();
        let differ = expected.iter().zip(&stored).filter(|(a, b)| a.logprob_bits != b.logprob_bits).count();
        assert!(differ >= specs().len() - 1, "{name}: {differ} differ from f16");
        assert_same_in_company(name, &expected, |options| options.kv_dtype = Some(dtype));
    }
}

/// And for quantized weights of every format: in one batch and in chunks of 19, cold and warm, and preempted in the middle.
/// Other bits than those of the stored weights prove that the weights were kept so.
#[test]
fn quantized_weights_are_invariant_too() {
    let stored = reference();
    for quant_type in QuantType::ALL {
        let (weights, name) = (WeightFormat::Quant(quant_type), quant_type.name());
        let mut alone = open(|options| options.weights = weights);
        assert_eq!(alone.loaded.info.weights, name);
        let expected: Vec<Trace> = specs().into_iter().flat_map(|spec| alone.run(vec![spec], |_, _, _| ())).collect();
        assert!(expected.iter().zip(&stored).all(|(a, b)| a.logprob_bits != b.logprob_bits), "{name}: as stored");
        assert_same_in_company(name, &expected, |options| options.weights = weights);
    }
}

/// With these options the bits are the same in one batch and in chunks of 19, cold, and warm with preemptions in the middle.
fn assert_same_in_company(name: &str, expected: &[Trace], change: impl Fn(&mut EngineOptions)) {
    let mut driver = open(|options| {
        change(options);
        options.threads = Some(2);
        options.prefill_budget_tokens = 19;
        options.mixed_budget_tokens = 19;
        options.prefix_cache = true;
    });
    assert_same(&driver.run(specs(), |_, _, _| ()), expected, &format!("{name}, a batch in chunks of 19"));
    let mut preempted = 0;
    let warm = driver.run(specs(), |scheduler, seqs, step| {
        if step % 7 == 3 {
            preempted += seqs.iter().filter(|&&seq| scheduler.preempt(seq)).count();
        }
    });
    assert_same(&warm, expected, &format!("{name}, warm and preempted"));
    let counters = driver.loaded.scheduler.counters();
    assert!(preempted > 8 && counters.prefix_hit_tokens > 500, "{name}: {preempted} preempted, {counters:?}");
}

/// Golden tokens of the model that ships: a change of numerics shows here first, and needs a written reason.
#[test]
fn golden_tokens_of_the_demo_model() {
    let mut driver = open(|options| options.weights = WeightFormat::F32);
    let prompt = driver.loaded.text.tokenizer.encode("Once upon a time", true).expect("encodes");
    assert_eq!(prompt, [1133, 960, 261, 676]);
    let traces = driver.run(vec![spec(&prompt, 12, SamplingParams::greedy())], |_, _, _| ());
    assert_eq!(traces[0].token_ids, [14, 261, 1221, 928, 464, 1001, 425, 297, 262, 1431, 16, 1682]);
}
