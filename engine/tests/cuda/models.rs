//! Models on the shim, without scheduler or worker: logits near those of the CPU, and equal to the bit however a step was cut.

use std::path::Path;
use std::sync::OnceLock;

use ns_llm::backend::cpu::{CpuBackend, CpuBackendOptions};
use ns_llm::backend::cuda::CudaBackend;
use ns_llm::backend::{KvDtype, Pooling};
use ns_llm::{Device, EmbeddingRequest, Engine, EngineOptions, QuantType, Request, ThreadPriority, WeightFormat};
use safetensors::Dtype;
use serde_json::{Value, json};

use crate::direct_run::{DirectRun, Rows};
use crate::tiny_model::{TempFolder, write_model};
use crate::{Test, demo, shim};

/// The tests of this file.
pub(crate) const TESTS: &[Test] = &[
    ("logits are near the CPU's in every form of weights", logits_are_near_the_cpus),
    ("greedy tokens are the reference's", greedy_tokens_are_the_references),
    ("logits do not depend on chunks or mates", logits_depend_on_nothing_else),
    ("vectors are near the CPU's", vectors_are_near_the_cpus),
    ("a model with learned positions is near the CPU's", learned_positions_are_near_the_cpus),
    ("an encoder's vectors are near the CPU's, in any company", encoders_are_near_the_cpus),
    ("engines of both are planned and opened on a device", engines_of_both_run),
];

/// Tokens of all sequences of a run.
const POOL_TOKENS: usize = 512;

fn on_cuda(weights: WeightFormat, dtype: KvDtype) -> DirectRun<CudaBackend> {
    open_on_cuda(&shim::model(), weights, dtype)
}

fn open_on_cuda(model: &Path, weights: WeightFormat, dtype: KvDtype) -> DirectRun<CudaBackend> {
    let backend = CudaBackend::new(shim::device(), "cuda:0", weights);
    let mut run = DirectRun::open(model, backend, dtype, POOL_TOKENS).expect("the model loads");
    run.encode_dtype = KvDtype::F16;
    run
}

fn on_cpu(weights: WeightFormat) -> DirectRun<CpuBackend> {
    open_on_cpu(&shim::model(), weights)
}

fn open_on_cpu(model: &Path, weights: WeightFormat) -> DirectRun<CpuBackend> {
    let options = CpuBackendOptions { threads: 1, priority: ThreadPriority::Normal, weights };
    let backend = CpuBackend::new(options).expect("one thread");
    DirectRun::open(model, backend, KvDtype::F16, POOL_TOKENS).expect("the model loads")
}

/// A prompt and the greedy answer of the reference implementation, and how much its best logit is above the second at each token.
struct Reference {
    prompt: Vec<u32>,
    greedy: Vec<u32>,
    margins: Vec<f64>,
}

fn references() -> &'static [Reference] {
    static REFERENCES: OnceLock<Vec<Reference>> = OnceLock::new();
    REFERENCES.get_or_init(|| {
        let path = shim::model().join("evaluation/reference.json");
        let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let golden: Value = serde_json::from_str(&text).expect("JSON");
        let ids = |value: &Value| -> Vec<u32> {
            value.as_array().expect("a list").iter().map(|id| id.as_u64().expect("an id") as u32).collect()
        };
        let read = |entry: &Value| Reference {
            prompt: ids(&entry["prompt_ids"]),
            greedy: ids(&entry["greedy_ids"]),
            margins: entry["margin"].as_array().expect("a list").iter().filter_map(Value::as_f64).collect(),
        };
        golden.as_array().expect("a list").iter().map(read).collect()
    })
}

fn argmax(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().max_by(|(i, a), (j, b)| a.total_cmp(b).then(j.cmp(i)));
    best.expect("a vocabulary").0 as u32
}

/// Of all numbers together.
fn normalised_mean_square_error(got: &[Vec<f32>], want: &[Vec<f32>]) -> f64 {
    let (mut error, mut power) = (0.0, 0.0);
    for (got, want) in got.iter().flatten().zip(want.iter().flatten()) {
        error += f64::from(got - want).powi(2);
        power += f64::from(*want).powi(2);
    }
    error / power
}

/// Logits of each position of a prompt on the shim against those on the CPU with the same weights and f16 keys and
/// values: what is left is the rounding of activations to bf16 inside products (8 bits beside quantized weights, on
/// both). Shown by a normalised mean square error, which is above zero: both were computed.
fn logits_are_near_the_cpus() {
    let q8_0 = WeightFormat::Quant(QuantType::Q8_0);
    let q4_k = WeightFormat::Quant(QuantType::Q4_K);
    let prompt = &references()[0].prompt;
    for (weights, dtype, limit) in [
        (WeightFormat::Auto, KvDtype::F16, 2e-4),
        (WeightFormat::Auto, KvDtype::Bf16, 3e-4),
        (q8_0, KvDtype::F16, 2e-4),
        (q4_k, KvDtype::F16, 2e-4),
    ] {
        let (mut cuda, mut cpu) = (on_cuda(weights, dtype), on_cpu(weights));
        let (on_cuda, on_cpu) = (cuda.begin(), cpu.begin());
        let got = cuda.step(&[(on_cuda, prompt)], Rows::All).expect("runs on the shim");
        let want = cpu.step(&[(on_cpu, prompt)], Rows::All).expect("runs on the CPU");
        let nmse = normalised_mean_square_error(&got, &want);
        println!("weights {}, KV {}: NMSE {nmse:.2e}", weights.name(), dtype.name());
        assert!(nmse > 0.0, "both runs used the same numbers: nothing was compared");
        assert!(nmse <= limit, "weights {}, KV {}: {nmse:e}", weights.name(), dtype.name());
    }
}

/// The first tokens of the reference's greedy answers, up to the first that was decided by less than bf16 rounds, prompts
/// of several chunks and decoding together.
fn greedy_tokens_are_the_references() {
    const TOLERANCE: f64 = 0.25;
    const NUM_TOKENS: usize = 6;
    let mut run = on_cuda(WeightFormat::Auto, KvDtype::F16);
    let references = &references()[..4];
    let mut answers: Vec<Vec<u32>> = Vec::new();
    for reference in references {
        let sequence = run.begin();
        let logits = run.step(&[(sequence, &reference.prompt)], Rows::Last).expect("runs").remove(0);
        answers.push(vec![argmax(&logits)]);
    }
    for _ in 1..NUM_TOKENS {
        let last: Vec<[u32; 1]> = answers.iter().map(|answer| [*answer.last().expect("a token")]).collect();
        let chunks: Vec<_> = last.iter().enumerate().map(|(sequence, id)| (sequence, id.as_slice())).collect();
        let logits = run.step(&chunks, Rows::Last).expect("runs");
        answers.iter_mut().zip(&logits).for_each(|(answer, logits)| answer.push(argmax(logits)));
    }
    let mut compared = 0;
    for (Reference { greedy, margins, .. }, answer) in references.iter().zip(&answers) {
        let open = margins.iter().position(|margin| *margin < TOLERANCE);
        let decided = open.unwrap_or(NUM_TOKENS).min(NUM_TOKENS);
        assert_eq!(answer[..decided], greedy[..decided]);
        compared += decided;
    }
    assert!(compared >= 12, "only {compared} tokens were decided by more than {TOLERANCE}");
}

/// The logits of a prompt's last token have the same bits whether the prompt was one chunk or several, alone or beside
/// others of other lengths (so: in every kernel for few and for many rows), and in blocks of any order.
fn logits_depend_on_nothing_else() {
    let mut run = on_cuda(WeightFormat::Auto, KvDtype::F16);
    let mut random = demo::Rng(17);
    let (prompt, mate, short) = (random.prompt(45), random.prompt(33), random.prompt(3));
    let alone = run.begin();
    let want = run.step(&[(alone, &prompt)], Rows::Last).expect("runs").remove(0);
    for (what, cuts) in [("chunks of 7 and 38", vec![7]), ("chunks around a block", vec![15, 17, 44])] {
        let sequence = run.begin();
        let mut start = 0;
        for end in cuts.into_iter().chain([prompt.len() - 1]) {
            run.step(&[(sequence, &prompt[start..end])], Rows::Last).expect("runs");
            start = end;
            if start == prompt.len() - 1 {
                break;
            }
        }
        let got = run.step(&[(sequence, &prompt[start..])], Rows::Last).expect("runs").remove(0);
        assert!(got == want, "{what}");
    }
    let [first, second, third] = [run.begin(), run.begin(), run.begin()];
    let chunks: [(usize, &[u32]); 3] = [(first, &short), (second, &prompt), (third, &mate)];
    let got = run.step(&chunks, Rows::Last).expect("runs").remove(1);
    assert!(got == want, "beside two others");
    assert!(want.iter().any(|&logit| logit != want[0]), "all logits are equal: nothing was compared");
}

/// Pooled states of whole sequences, two at a time, point where the CPU's do.
fn vectors_are_near_the_cpus() {
    let mut random = demo::Rng(5);
    let inputs = [random.prompt(9), random.prompt(21)];
    let inputs: Vec<&[u32]> = inputs.iter().map(Vec::as_slice).collect();
    for pooling in [Pooling::Mean, Pooling::Last] {
        let mut run = on_cuda(WeightFormat::Auto, KvDtype::F16);
        let got = run.encode(&inputs, pooling).expect("runs on the shim");
        let want = on_cpu(WeightFormat::Auto).encode(&inputs, pooling).expect("runs on the CPU");
        for (got, want) in got.iter().zip(&want) {
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>();
            let cosine = dot(got, want) / (dot(got, got) * dot(want, want)).sqrt();
            assert!(cosine > 0.999 && got != want, "{pooling:?}: {cosine}");
        }
    }
}

/// A small GPT-2: LayerNorm, GELU, learned positions, heads of 32.
fn gpt2() -> TempFolder {
    let config = json!({
        "architectures": ["GPT2LMHeadModel"], "vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 96,
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
    });
    let folder = TempFolder::new("gpt2-on-a-device");
    write_model(&folder, &config, Dtype::BF16, 1);
    folder
}

/// A small BERT, with heads as wide as those of the published small encoders.
fn bert() -> TempFolder {
    let config = json!({
        "architectures": ["BertModel"], "model_type": "bert", "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 96, "max_position_embeddings": 96, "hidden_act": "gelu",
        "type_vocab_size": 2, "layer_norm_eps": 1e-12,
    });
    let folder = TempFolder::new("bert-on-a-device");
    write_model(&folder, &config, Dtype::BF16, 1);
    folder
}

fn ids(seed: u64, len: usize) -> Vec<u32> {
    demo::Rng(seed).prompt(len).iter().map(|id| id % 96).collect()
}

/// GPT-2 with weights in bf16 and in 8 bits, where positions and GELU have kernels of their own: logits near the CPU's,
/// the same to the bit in chunks and beside another prompt.
fn learned_positions_are_near_the_cpus() {
    let (folder, prompt, mate) = (gpt2(), ids(3, 41), ids(4, 19));
    for weights in [WeightFormat::Auto, WeightFormat::Quant(QuantType::Q8_0)] {
        let (mut cuda, mut cpu) =
            (open_on_cuda(folder.path(), weights, KvDtype::F16), open_on_cpu(folder.path(), weights));
        let (on_cuda, on_cpu) = (cuda.begin(), cpu.begin());
        let got = cuda.step(&[(on_cuda, &prompt)], Rows::All).expect("runs on the shim");
        let want = cpu.step(&[(on_cpu, &prompt)], Rows::All).expect("runs on the CPU");
        let nmse = normalised_mean_square_error(&got, &want);
        println!("GPT-2, weights {}: NMSE {nmse:.2e}", weights.name());
        assert!(nmse > 0.0 && nmse <= 3e-4, "weights {}: {nmse:e}", weights.name());
        let [again, beside] = [cuda.begin(), cuda.begin()];
        cuda.step(&[(beside, &mate[..7]), (again, &prompt[..18])], Rows::Last).expect("runs");
        cuda.step(&[(again, &prompt[18..40])], Rows::Last).expect("runs");
        let last = cuda.step(&[(again, &prompt[40..]), (beside, &mate[7..])], Rows::Last).expect("runs").remove(0);
        assert!(Some(&last) == got.last(), "weights {}: in chunks beside another", weights.name());
    }
}

/// BERT: vectors near the CPU's in both forms of weights, and the same to the bit alone as together.
fn encoders_are_near_the_cpus() {
    let (folder, inputs) = (bert(), [ids(5, 9), ids(6, 33), ids(7, 1)]);
    let inputs: Vec<&[u32]> = inputs.iter().map(Vec::as_slice).collect();
    for weights in [WeightFormat::Auto, WeightFormat::Quant(QuantType::Q8_0)] {
        let mut cuda = open_on_cuda(folder.path(), weights, KvDtype::F16);
        let got = cuda.encode(&inputs, Pooling::Mean).expect("runs on the shim");
        let want = open_on_cpu(folder.path(), weights).encode(&inputs, Pooling::Mean).expect("runs on the CPU");
        let nmse = normalised_mean_square_error(&got, &want);
        println!("BERT, weights {}: NMSE {nmse:.2e}", weights.name());
        assert!(nmse > 0.0 && nmse <= 3e-4, "weights {}: {nmse:e}", weights.name());
        for (input, together) in inputs.iter().zip(&got) {
            assert!(cuda.encode(&[input], Pooling::Mean).expect("runs")[0] == *together, "{} tokens", input.len());
        }
    }
}

/// Whole engines of both, planned to the byte, loaded and asked on the device; the encoder keeps no pool but the one
/// block that there has to be.
fn engines_of_both_run() {
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": byte_level, "post_processor": byte_level, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
    });
    let open = |folder: &TempFolder| {
        folder.write("tokenizer.json", tokenizer.to_string());
        let mut options = EngineOptions::new(folder.path()).threads(1).kv_bytes(1 << 20);
        options.device = Device::Cuda(0);
        let engine = Engine::open_among(options, shim::One(shim::device())).expect("opens");
        assert_eq!(engine.info().device, "cuda", "{}", engine.info().device_reason);
        engine
    };
    let (gpt2, bert) = (gpt2(), bert());
    let mut request = Request::tokens(ids(8, 20)).max_tokens(3).temperature(0.0);
    request.ignore_eos = true;
    let answer = open(&gpt2).complete(request).expect("runs");
    assert_eq!(answer.choices[0].token_ids.len(), 3);
    let encoder = open(&bert);
    assert_eq!((encoder.info().can_generate, encoder.stats().kv_blocks_total), (false, 1));
    let vectors = encoder.embed(EmbeddingRequest::new([ids(9, 12), ids(10, 5)])).expect("runs").embeddings;
    assert!(vectors.iter().all(|vector| vector.values.len() == 64) && vectors[0].values != vectors[1].values);
}
