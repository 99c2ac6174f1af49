//! Promise: whatever bytes come from outside, they are taken or refused with an error, in memory and work that are in
//! proportion to them. Mutations of valid files and of all hand-made bad ones, by a fixed seed, for every kind of bytes.

#[path = "../../engine/tests/support/counting_allocator.rs"]
mod counting_allocator;
#[path = "../../engine/tests/support/encoder_cases.rs"]
mod encoder_cases;
#[path = "../../engine/tests/support/folder_cases.rs"]
mod folder_cases;
#[path = "../../engine/tests/support/gguf_cases.rs"]
mod gguf_cases;
#[path = "../../engine/tests/support/gguf_encoder_cases.rs"]
mod gguf_encoder_cases;
#[path = "../../engine/tests/support/gguf_file.rs"]
mod gguf_file;
#[path = "../../engine/tests/support/gguf_loading.rs"]
mod gguf_loading;
#[path = "../../engine/tests/support/tiny_model.rs"]
mod tiny_model;

use std::collections::BTreeMap;

use counting_allocator::{allocator_calls_of, peak_bytes_of};
use ns_llm_fuzz::{Outcome, Random, TARGETS, Target, mutate};
use ns_llm_kernels::quant::{self, QuantType};

/// What a kind of bytes is tried with, and how much it may cost.
struct Plan {
    name: &'static str,
    seeds: Vec<Vec<u8>>,
    /// Most mutations fall into the first so many bytes.
    reach: usize,
    rounds: usize,
    /// Bytes held at most: a constant, and for each byte of input.
    memory: (u64, u64),
    /// Calls of the allocator at most: a constant, and for each byte of input.
    calls: (u64, u64),
}

/// All plans: rounds are chosen so that each takes about the same time.
fn plans() -> Vec<Plan> {
    let plan = |name, seeds, reach, rounds, memory, calls| Plan { name, seeds, reach, rounds, memory, calls };
    let mib = 1 << 20;
    vec![
        // What loads holds packed weights and the KV pool of a megabyte.
        plan("gguf", gguf_seeds(), 4096, 400, (4 * mib, 16), (20_000, 2)),
        plan("safetensors", files_of_cases("model.safetensors"), 1400, 400, (4 * mib, 16), (20_000, 2)),
        plan("config_json", files_of_cases("config.json"), usize::MAX, 400, (4 * mib, 16), (20_000, 2)),
        plan("tokenizer_json", files_of_cases("tokenizer.json"), usize::MAX, 400, (16 * mib, 64), (50_000, 8)),
        plan("chat_template", template_seeds(), usize::MAX, 1000, (64 * mib, 64), (2_000_000, 64)),
        plan("disk_segment", segment_seeds(), usize::MAX, 1000, (mib, 8), (2_000, 1)),
        plan("quant_blocks", block_seeds(), usize::MAX, 1000, (4 * mib, 64), (2_000, 1)),
    ]
}

fn gguf_seeds() -> Vec<Vec<u8>> {
    use gguf_loading::{valid, valid_bert, valid_gpt2, valid_llama};
    let valid = [valid(), valid_llama(), valid_gpt2(), valid_bert()].map(|file| file.bytes());
    valid.into_iter().chain(gguf_cases::all_cases().into_iter().map(|case| case.bytes)).collect()
}

/// The file `name` of a valid folder, and of every bad folder in which it is another one.
fn files_of_cases(name: &str) -> Vec<Vec<u8>> {
    // What is not there, leads out of the folder or is very large (and not all on disk) is no seed.
    let read = |folder: &tiny_model::TempFolder| {
        let path = folder.path().join(name);
        let is_seed = std::fs::symlink_metadata(&path).is_ok_and(|data| data.is_file() && data.len() < 1 << 16);
        is_seed.then(|| std::fs::read(&path).expect("a file of the folder"))
    };
    let valid = read(&folder_cases::valid_folder()).expect("a file of the valid folder");
    let mut seeds = vec![valid];
    for case in folder_cases::all_cases() {
        let folder = folder_cases::valid_folder();
        (case.change)(&folder);
        seeds.extend(read(&folder).filter(|bytes| bytes != &seeds[0]));
    }
    seeds
}

fn template_seeds() -> Vec<Vec<u8>> {
    [
        "{% for message in messages %}<|{{ message.role }}|>{{ message['content'] | trim }}\n{% endfor %}",
        "{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] %}{% endif %}{{ first }}",
        "{%- macro m(x, n=3) -%}{{ x * n }}{%- endmacro -%}{{ m('a') }}{{ messages | tojson(indent=2) }}",
        "{% set n = namespace(s='x') %}{% for i in range(20) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s | length }}",
        "{{ strftime_now('%d %b %Y') }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
        "{{ raise_exception('no') }}",
        "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
        "{% for message in messages %}{{ loop.index0 }}{% if loop.last %}{% break %}{% endif %}{% endfor %}",
    ]
    .map(|source| source.as_bytes().to_vec())
    .into()
}

/// The first page of a segment and two records, one of two pages.
fn segment_seeds() -> Vec<Vec<u8>> {
    const PAGE_BYTES: usize = 4096;
    let mut segment = vec![0; 4 * PAGE_BYTES];
    let header = |bytes: &mut [u8], magic: &[u8], len: u32| {
        bytes[..8].copy_from_slice(magic);
        bytes[8..12].copy_from_slice(&1_u32.to_le_bytes());
        bytes[12..16].copy_from_slice(&len.to_le_bytes());
    };
    header(&mut segment, b"nsllmKVS", 56);
    for (page, payload_bytes, sequence) in [(1, 300_u64, 1_u64), (2, 5000, 2)] {
        let record = &mut segment[page * PAGE_BYTES..];
        header(record, b"nsllmKVR", 144);
        record[16..24].copy_from_slice(&payload_bytes.to_le_bytes());
        record[24..32].copy_from_slice(&sequence.to_le_bytes());
        record[48..112].fill(page as u8);
        record[144..144 + payload_bytes as usize].fill(0x5a);
    }
    // Checksums are set where they are checked. Cut in the middle of a record, and of a header.
    vec![segment.clone(), segment[..3 * PAGE_BYTES + 7].to_vec(), segment[..PAGE_BYTES + 100].to_vec()]
}

fn block_seeds() -> Vec<Vec<u8>> {
    let mut random = Random(1);
    QuantType::ALL
        .into_iter()
        .enumerate()
        .map(|(idx, quant_type)| {
            let values: Vec<f32> = (0..768).map(|_| random.below(1000) as f32 / 500.0 - 1.0).collect();
            let mut blocks = vec![0; quant_type.size_bytes(values.len()).expect("whole blocks")];
            quant::encode(quant_type, &values, &mut blocks).expect("finite");
            [&[idx as u8, 2][..], &blocks].concat()
        })
        .collect()
}

/// A number of the environment.
fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is {text}, must be a number")))
}

/// Runs the target, and fails with the input's digest of a name when it costs too much.
fn run(target: &Target, plan: &Plan, bytes: &[u8], name: &str) -> Outcome {
    let run = || std::panic::catch_unwind(|| (target.run)(bytes));
    let ((result, peak_bytes), calls) = allocator_calls_of(|| peak_bytes_of(run));
    let outcome = result.unwrap_or_else(|_| panic!("{}, {name}: panicked", target.name));
    let len = bytes.len() as u64;
    let (most_bytes, most_calls) = (plan.memory.0 + plan.memory.1 * len, plan.calls.0 + plan.calls.1 * len);
    assert!(peak_bytes <= most_bytes, "{}, {name}: {peak_bytes} bytes held for {len}", target.name);
    assert!(calls <= most_calls, "{}, {name}: {calls} calls of the allocator for {len} bytes", target.name);
    outcome
}

/// Every seed, then mutations of them. That the mechanism fires: of each kind some are taken and some are refused, in
/// several ways where there are several.
#[test]
fn any_bytes_are_taken_or_refused() {
    let plans = plans();
    assert_eq!(plans.iter().map(|plan| plan.name).collect::<Vec<_>>(), TARGETS.map(|target| target.name));
    let bad_files: usize = plans[..4].iter().map(|plan| plan.seeds.len()).sum();
    assert!(bad_files >= 200, "{bad_files} hand-made files");
    let seed = setting("NS_LLM_FUZZ_SEED").unwrap_or(0);
    for (target, plan) in TARGETS.iter().zip(&plans) {
        let mut outcomes = BTreeMap::new();
        let mut count = |outcome: Outcome| *outcomes.entry(outcome.err().unwrap_or("taken")).or_insert(0) += 1;
        let _ = run(target, plan, &plan.seeds[0], "to make ready what is made once");
        for (idx, bytes) in plan.seeds.iter().enumerate() {
            count(run(target, plan, bytes, &format!("seed {idx}")));
        }
        let rounds = setting("NS_LLM_FUZZ_ROUNDS").map_or(plan.rounds, |rounds| rounds as usize);
        for round in 0..rounds {
            let mut random = Random(seed ^ (round as u64) << 20);
            // Half of them from the valid one.
            let of = |random: &mut Random| random.below(2) * random.below(plan.seeds.len());
            let (mut bytes, other) = (plan.seeds[of(&mut random)].clone(), &plan.seeds[of(&mut random)]);
            mutate(&mut bytes, other, plan.reach, &mut random);
            count(run(target, plan, &bytes, &format!("seed {seed}, round {round}")));
        }
        println!("{}: {} seeds, {rounds} rounds: {outcomes:?}", plan.name, plan.seeds.len());
        assert!(outcomes.contains_key("taken"), "{}: {outcomes:?}", plan.name);
        assert!(outcomes.len() > 1, "{}: {outcomes:?}", plan.name);
    }
}
