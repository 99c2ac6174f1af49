//! Promise: a model computes what its architecture's reference implementation computes. Small random models of every
//! architecture and variant are compared with logits of transformers (`golden/make_golden.py`), and the demo model
//! with its own golden values, through the real loader, on KV blocks.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use ns_llm::WeightFormat;
use ns_llm::backend::cpu::CpuBackend;
use ns_llm::backend::{Backend, KvDtype};
use ns_llm_kernels::cpu::Cpu;
use ns_llm_kernels::cpu::dispatch::Isa;
use ns_llm_kernels::cpu::pool::{Pool, PoolPriority};
use safetensors::Dtype;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::direct_run::{DirectRun, Rows};
use crate::reference_backend::Reference;
use crate::tiny_model::{TempFolder, TensorData, weights, write_model, write_weights};

#[derive(Deserialize)]
struct Golden {
    /// Logits are stored for each `column_step`-th token.
    column_step: usize,
    models: Vec<GoldenModel>,
}

#[derive(Deserialize)]
struct GoldenModel {
    name: String,
    dtype: Dtype,
    config: Value,
    sequences: Vec<GoldenSequence>,
}

#[derive(Deserialize)]
struct GoldenSequence {
    token_ids: Vec<u32>,
    /// `[positions, vocab_size / column_step]`
    logits: Vec<Vec<f64>>,
    /// `[positions]`, over the whole vocabulary
    log_sum_exp: Vec<f64>,
}

fn golden() -> Golden {
    serde_json::from_str(include_str!("../golden/tiny_models.json")).expect("as make_golden.py writes it")
}

/// How a sequence is cut into steps.
#[derive(Clone, Copy, Debug)]
enum Steps {
    /// All sequences whole, in one batch.
    Whole,
    /// One sequence after the other, so many tokens at a time.
    Chunks(usize),
}

/// Logits of every position of every sequence.
fn all_logits<B: Backend>(run: &mut DirectRun<B>, sequences: &[&[u32]], steps: Steps) -> Vec<Vec<Vec<f32>>> {
    match steps {
        Steps::Whole => {
            let chunks: Vec<_> = sequences.iter().map(|ids| (run.begin(), *ids)).collect();
            let mut rows = run.step(&chunks, Rows::All).unwrap().into_iter();
            sequences.iter().map(|ids| rows.by_ref().take(ids.len()).collect()).collect()
        }
        Steps::Chunks(tokens) => {
            let mut one = |ids: &&[u32]| {
                let sequence = run.begin();
                ids.chunks(tokens).flat_map(|chunk| run.step(&[(sequence, chunk)], Rows::All).unwrap()).collect()
            };
            sequences.iter().map(&mut one).collect()
        }
    }
}

fn log_sum_exp(logits: &[f32]) -> f64 {
    logits.iter().map(|&logit| f64::from(logit).exp()).sum::<f64>().ln()
}

/// Compares one model with its golden values and gives the largest error, which must be at most `tolerance`.
fn check<B: Backend>(golden: &Golden, model: &GoldenModel, backend: B, steps: Steps, tolerance: f64) -> f64 {
    let folder = TempFolder::new("golden");
    write_model(&folder, &model.config, model.dtype, 1);
    let mut run = DirectRun::open(folder.path(), backend, KvDtype::F32, 96).unwrap();
    let token_ids: Vec<&[u32]> = model.sequences.iter().map(|sequence| sequence.token_ids.as_slice()).collect();
    let logits = all_logits(&mut run, &token_ids, steps);
    let mut worst = (0.0, String::new());
    let mut compare = |actual: f64, expected: f64, place: &dyn Fn() -> String| {
        let error = (actual - expected).abs();
        if error.is_nan() || error > worst.0 {
            worst = (error, format!("{}: {actual}, expected {expected}", place()));
        }
        assert!(error <= tolerance, "{}, {steps:?}: error {error} at {}", model.name, worst.1);
    };
    for (sequence_idx, (expected, actual)) in model.sequences.iter().zip(&logits).enumerate() {
        assert_eq!(expected.logits.len(), actual.len());
        for (position, (expected_row, row)) in expected.logits.iter().zip(actual).enumerate() {
            let place = |what: &str| format!("sequence {sequence_idx}, position {position}, {what}");
            for (column, &expected) in expected_row.iter().enumerate() {
                let token_id = column * golden.column_step;
                compare(row[token_id].into(), expected, &|| place(&format!("token {token_id}")));
            }
            compare(log_sum_exp(row), expected.log_sum_exp[position], &|| place("log-sum-exp"));
        }
    }
    worst.0
}

/// Every architecture and variant gives transformers' logits at every position, computed whole or in chunks that cross
/// block edges: shown on the reference backend, whose own error is below that of the golden values.
#[test]
fn models_match_transformers_on_the_reference_backend() {
    let golden = golden();
    assert_eq!(golden.models.len(), 10);
    for model in &golden.models {
        for steps in [Steps::Whole, Steps::Chunks(7)] {
            check(&golden, model, Reference, steps, 5e-5);
        }
    }
}

/// What makes a variant a variant reaches the logits: shown by taking it out of the configuration, which must move some
/// logit away from its golden value. (Biases and norms of heads need no such proof: their tensors would be unused.)
#[test]
fn each_variant_is_felt() {
    let golden = golden();
    for (name, field, without) in [
        ("llama, scaled frequencies, all biases", "rope_scaling", json!(null)),
        ("llama, linear scaling, one key head", "rope_parameters", json!({"rope_theta": 10_000})),
        ("mistral, sliding window", "sliding_window", json!(null)),
        ("mistral, sliding window", "sliding_window", json!(9)),
        ("qwen2, upper layers slide", "max_window_layers", json!(3)),
        ("qwen2", "rope_theta", json!(10_000)),
        ("qwen3", "rms_norm_eps", json!(1e-2)),
        ("gpt2", "layer_norm_epsilon", json!(1e-1)),
        ("gpt2", "n_head", json!(8)),
    ] {
        let model = golden.models.iter().find(|model| model.name == name).expect("one of make_golden.py");
        let mut changed = model.config.clone();
        changed[field] = without;
        let last_row = |config: &Value| {
            let folder = TempFolder::new("variant");
            write_model(&folder, config, model.dtype, 1);
            let mut run = DirectRun::open(folder.path(), Reference, KvDtype::F32, 96).unwrap();
            all_logits(&mut run, &[&model.sequences[1].token_ids], Steps::Whole)[0].pop().unwrap()
        };
        let (with, without) = (last_row(&model.config), last_row(&changed));
        let moved = with.iter().zip(&without).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(moved > 1e-2, "{name}: {field} moved the logits by {moved} at most");
    }
}

/// The forms of GELU differ by less than a thousandth, and yet by more than the golden values' error: shown by
/// exchanging them.
#[test]
fn the_form_of_gelu_is_felt() {
    let golden = golden();
    for (name, other) in [("gpt2", "gelu"), ("gpt2, exact gelu, untied", "gelu_new")] {
        let model = golden.models.iter().find(|model| model.name == name).expect("one of make_golden.py");
        let mut changed = model.config.clone();
        changed["activation_function"] = json!(other);
        let logits = |config: &Value| {
            let folder = TempFolder::new("gelu");
            write_model(&folder, config, model.dtype, 1);
            let mut run = DirectRun::open(folder.path(), Reference, KvDtype::F32, 96).unwrap();
            all_logits(&mut run, &[&model.sequences[1].token_ids], Steps::Whole).remove(0)
        };
        let (with, without) = (logits(&model.config), logits(&changed));
        let moved = with.iter().flatten().zip(without.iter().flatten()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(moved > 5e-4, "{name}: {other} moved the logits by {moved} at most");
    }
}

/// Checkpoints whose names begin otherwise are the same model: GPT-2 without `transformer.`, with the buffers of its
/// mask; a decoder that was saved without `model.` around it. Their logits have the same bits.
#[test]
fn other_names_make_the_same_model() {
    let golden = golden();
    for (name, prefix) in [("gpt2", "transformer."), ("qwen3", "model.")] {
        let model = golden.models.iter().find(|model| model.name == name).expect("one of make_golden.py");
        let logits = |is_bare: bool| {
            let folder = TempFolder::new("names");
            folder.write("config.json", model.config.to_string());
            let mut tensors = weights(&model.config, model.dtype);
            if is_bare {
                tensors.iter_mut().for_each(|(name, _)| *name = name.strip_prefix(prefix).unwrap_or(name).to_string());
                if name == "gpt2" {
                    let mask = TensorData { dtype: Dtype::U8, shape: vec![1, 1, 4, 4], bytes: vec![1; 16] };
                    tensors.push(("h.1.attn.bias".to_string(), mask));
                    let filling = TensorData { dtype: Dtype::F32, shape: vec![], bytes: vec![0; 4] };
                    tensors.push(("h.0.attn.masked_bias".to_string(), filling));
                }
            }
            write_weights(&folder, &tensors, 1);
            let mut run = DirectRun::open(folder.path(), Reference, KvDtype::F32, 96).unwrap();
            all_logits(&mut run, &[&model.sequences[0].token_ids], Steps::Whole)
        };
        assert_eq!(logits(true), logits(false), "{name}");
    }
}

/// A checkpoint in three shards is the same model as in one file: its logits have the same bits.
#[test]
fn shards_make_the_same_model() {
    let golden = golden();
    let model = &golden.models[0];
    let logits = |num_shards| {
        let folder = TempFolder::new("shards");
        write_model(&folder, &model.config, model.dtype, num_shards);
        let mut run = DirectRun::open(folder.path(), Reference, KvDtype::F32, 96).unwrap();
        all_logits(&mut run, &[&model.sequences[0].token_ids], Steps::Whole)
    };
    assert_eq!(logits(1), logits(3));
}

fn cpu(isa: Isa, weights: WeightFormat) -> CpuBackend {
    let pool = Arc::new(Pool::new(2, PoolPriority::Normal).unwrap());
    CpuBackend::on(Cpu::with_isa(isa, pool).unwrap(), weights)
}

/// Every architecture and variant gives transformers' logits on the CPU too, with weights in f32: shown for each
/// instruction set of this machine, whole and in chunks.
#[test]
fn models_match_transformers_on_each_instruction_set() {
    let golden = golden();
    assert!(Isa::available().contains(&Isa::Portable));
    for isa in Isa::available() {
        for model in &golden.models {
            for steps in [Steps::Whole, Steps::Chunks(7)] {
                check(&golden, model, cpu(isa, WeightFormat::F32), steps, 2e-4);
            }
        }
    }
}

/// Weights of 16 bits are multiplied as they are stored: both kinds stay near the golden values.
#[test]
fn half_precision_weights_stay_near_the_golden_values() {
    let golden = golden();
    let stored_small: Vec<_> = golden.models.iter().filter(|model| model.dtype != Dtype::F32).collect();
    let dtypes: Vec<_> = stored_small.iter().map(|model| model.dtype).collect();
    assert_eq!(dtypes, [Dtype::F16, Dtype::BF16, Dtype::F16]);
    for isa in Isa::available() {
        for model in &stored_small {
            check(&golden, model, cpu(isa, WeightFormat::Auto), Steps::Whole, 5e-2);
        }
    }
}

// ---- the demo model ---------------------------------------------------------------------------------------------------

fn demo_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo")
}

/// One entry of `models/demo/evaluation/reference.json`.
#[derive(Deserialize)]
struct DemoReference {
    id: String,
    prompt_ids: Vec<u32>,
    greedy_ids: Vec<u32>,
    first_top10: Top10,
    /// Gap between the two best logits at each new position.
    margin: Vec<f64>,
}

#[derive(Deserialize)]
struct Top10 {
    ids: Vec<u32>,
    logits: Vec<f64>,
}

fn demo_reference() -> Vec<DemoReference> {
    let path = demo_folder().join("evaluation/reference.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn demo(weights: WeightFormat, kv_dtype: KvDtype) -> DirectRun<CpuBackend> {
    DirectRun::open(&demo_folder(), cpu(Isa::detect().unwrap(), weights), kv_dtype, 5_120).unwrap()
}

fn argmax(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().max_by(|(i, a), (j, b)| a.total_cmp(b).then(j.cmp(i)));
    best.expect("a vocabulary").0 as u32
}

/// The demo model with f32 weights gives the reference's first logits to 1e-3 and its greedy tokens, up to the first
/// position where the reference's two best logits are closer than 1e-3: shown by prefilling each of the 20 prompts and
/// decoding all of them together.
#[test]
fn demo_model_gives_the_reference_tokens() {
    const TOLERANCE: f64 = 1e-3;
    let references = demo_reference();
    assert_eq!(references.len(), 20);
    let mut run = demo(WeightFormat::F32, KvDtype::F32);
    let mut answers: Vec<Vec<u32>> = Vec::new();
    for reference in &references {
        let sequence = run.begin();
        let logits = run.step(&[(sequence, &reference.prompt_ids)], Rows::Last).unwrap().remove(0);
        for (&id, &expected) in reference.first_top10.ids.iter().zip(&reference.first_top10.logits) {
            let actual = f64::from(logits[id as usize]);
            assert!(
                (actual - expected).abs() <= TOLERANCE,
                "{}, token {id}: {actual}, expected {expected}",
                reference.id
            );
        }
        answers.push(vec![argmax(&logits)]);
    }
    for _ in 1..references[0].greedy_ids.len() {
        let last: Vec<[u32; 1]> = answers.iter().map(|answer| [*answer.last().unwrap()]).collect();
        let chunks: Vec<_> = last.iter().enumerate().map(|(sequence, id)| (sequence, id.as_slice())).collect();
        let logits = run.step(&chunks, Rows::Last).unwrap();
        answers.iter_mut().zip(&logits).for_each(|(answer, logits)| answer.push(argmax(logits)));
    }
    let mut compared = 0;
    for (reference, answer) in references.iter().zip(&answers) {
        let is_open = |margin: &f64| *margin < TOLERANCE;
        let decided = reference.margin.iter().position(is_open).unwrap_or(reference.margin.len());
        assert_eq!(answer[..decided], reference.greedy_ids[..decided], "{}", reference.id);
        compared += decided;
    }
    assert!(compared > 1_150, "{compared} of 1280 tokens were decided by more than {TOLERANCE}");
}

/// Normalised mean square error of the logits at every position of all prompts, and the share of positions whose largest
/// logit is another one.
fn distance(exact: &mut DirectRun<CpuBackend>, other: &mut DirectRun<CpuBackend>) -> (f64, f64) {
    let (mut error, mut power, mut positions, mut moved) = (0.0, 0.0, 0, 0);
    for reference in &demo_reference() {
        let logits = |run: &mut DirectRun<CpuBackend>| {
            run.clear();
            let sequence = run.begin();
            run.step(&[(sequence, &reference.prompt_ids)], Rows::All).unwrap()
        };
        let (exact, other) = (logits(exact), logits(other));
        for (a, b) in exact.iter().flatten().zip(other.iter().flatten()) {
            error += (f64::from(*a) - f64::from(*b)).powi(2);
            power += f64::from(*a).powi(2);
        }
        moved += exact.iter().zip(&other).filter(|(a, b)| argmax(a) != argmax(b)).count();
        positions += reference.prompt_ids.len();
    }
    assert!(positions > 1_200);
    (error / power, moved as f64 / positions as f64)
}

/// Smaller keys and values stay within a normalised mean square error of f32 ones: f16 1e-7, bf16 6e-6, 8 bits 5e-5; one
/// largest logit in a hundred may be another one. Shown over every position of all prompts. The weights are f32: where
/// products round activations to bf16, that alone is 5e-6 as soon as one number differs.
#[test]
fn small_kv_stays_near_f32() {
    let mut exact = demo(WeightFormat::F32, KvDtype::F32);
    for (dtype, limit) in [(KvDtype::F16, 1e-7), (KvDtype::Bf16, 6e-6), (KvDtype::Int8, 5e-5)] {
        let (nmse, moved) = distance(&mut exact, &mut demo(WeightFormat::F32, dtype));
        println!("KV in {}: NMSE {nmse:.2e}, {:.2} % of the largest logits moved", dtype.name(), 100.0 * moved);
        assert!(nmse > 0.0, "{dtype:?}: both runs used the same numbers");
        assert!(nmse <= limit && moved <= 0.01, "{dtype:?}: {nmse:e}, {moved}");
    }
}

/// The demo model as it is stored (bf16 weights, f16 keys and values) stays within a normalised mean square error of
/// 1e-4 of f32 weights: shown over every position of all prompts.
#[test]
fn demo_model_in_bf16_stays_near_f32() {
    let (mut exact, mut stored) = (demo(WeightFormat::F32, KvDtype::F32), demo(WeightFormat::Auto, KvDtype::F16));
    let (nmse, _) = distance(&mut exact, &mut stored);
    println!("NMSE of the stored weights: {nmse:.2e}");
    assert!(nmse > 0.0, "both runs used the same numbers: the test compared nothing");
    assert!(nmse <= 1e-4, "{nmse}");
}
