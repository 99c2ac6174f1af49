//! Promise: the vectors of a model are those of its architecture's reference implementation. Small random models are
//! compared with vectors of transformers (`golden/make_golden_embeddings.py`): encoders and decoders, every pooling, on
//! the reference backend and on each instruction set.

use std::sync::Arc;

use ns_llm::WeightFormat;
use ns_llm::backend::cpu::CpuBackend;
use ns_llm::backend::{Backend, KvDtype, Pooling};
use ns_llm_kernels::cpu::Cpu;
use ns_llm_kernels::cpu::dispatch::Isa;
use ns_llm_kernels::cpu::pool::{Pool, PoolPriority};
use safetensors::Dtype;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::direct_run::DirectRun;
use crate::reference_backend::Reference;
use crate::tiny_model::{TempFolder, TensorData, weights, write_model, write_weights};

#[derive(Deserialize)]
struct GoldenModel {
    name: String,
    config: Value,
    sequences: Vec<GoldenSequence>,
}

#[derive(Deserialize)]
struct GoldenSequence {
    token_ids: Vec<u32>,
    mean: Vec<f64>,
    first: Vec<f64>,
    last: Vec<f64>,
}

fn golden() -> Vec<GoldenModel> {
    let models: Vec<GoldenModel> = serde_json::from_str(include_str!("../golden/tiny_embeddings.json"))
        .expect("as make_golden_embeddings.py writes it");
    assert_eq!(models.len(), 4);
    models
}

fn open<B: Backend>(folder: &TempFolder, backend: B) -> DirectRun<B> {
    DirectRun::open(folder.path(), backend, KvDtype::F32, 16).expect("loads")
}

/// Vectors of all sequences of a model, computed together, within `tolerance` of the golden ones in every element.
fn check<B: Backend>(model: &GoldenModel, backend: B, tolerance: f64) {
    let folder = TempFolder::new("golden-embeddings");
    write_model(&folder, &model.config, Dtype::F32, 1);
    let mut run = open(&folder, backend);
    let sequences: Vec<&[u32]> = model.sequences.iter().map(|sequence| sequence.token_ids.as_slice()).collect();
    for pooling in [Pooling::Mean, Pooling::First, Pooling::Last] {
        let vectors = run.encode(&sequences, pooling).expect("runs");
        assert_eq!(vectors.len(), sequences.len());
        for (vector, sequence) in vectors.iter().zip(&model.sequences) {
            let expected = match pooling {
                Pooling::Mean => &sequence.mean,
                Pooling::First => &sequence.first,
                Pooling::Last => &sequence.last,
            };
            assert_eq!(vector.len(), expected.len());
            for (column, (&actual, expected)) in vector.iter().zip(expected).enumerate() {
                let error = (f64::from(actual) - expected).abs();
                let tokens = sequence.token_ids.len();
                assert!(
                    error <= tolerance,
                    "{}, {pooling:?} of {tokens} tokens, element {column}: {actual}, expected {expected}",
                    model.name
                );
            }
        }
    }
}

/// Encoders and decoders give transformers' vectors at every length, for each pooling, on the reference backend.
#[test]
fn vectors_match_transformers_on_the_reference_backend() {
    golden().iter().for_each(|model| check(model, Reference, 1e-5));
}

/// And on the CPU, for each instruction set of this machine.
#[test]
fn vectors_match_transformers_on_each_instruction_set() {
    for isa in Isa::available() {
        for model in &golden() {
            let pool = Arc::new(Pool::new(2, PoolPriority::Normal).expect("threads"));
            let cpu = CpuBackend::on(Cpu::with_isa(isa, pool).expect("available"), WeightFormat::F32);
            check(model, cpu, 5e-5);
        }
    }
}

/// What makes an encoder one reaches its vectors: shown by changing it, which must move some element by more than the
/// golden values' error.
#[test]
fn each_part_of_the_encoder_is_felt() {
    let golden = golden();
    let bert = &golden[0];
    type Tensors = Vec<(String, TensorData)>;
    let vector = |config: &Value, change: &dyn Fn(&mut Tensors)| {
        let folder = TempFolder::new("encoder");
        folder.write("config.json", config.to_string());
        let mut tensors = weights(config, Dtype::F32);
        change(&mut tensors);
        write_weights(&folder, &tensors, 1);
        open(&folder, Reference).encode(&[&bert.sequences[3].token_ids], Pooling::First).expect("runs").remove(0)
    };
    let zero = |name: &'static str| {
        move |tensors: &mut Tensors| {
            tensors.iter_mut().find(|(other, _)| other == name).expect("a tensor of BERT").1.bytes.fill(0);
        }
    };
    let plain = vector(&bert.config, &|_| ());
    let changed = |field: &str, value: Value| {
        let mut config = bert.config.clone();
        config[field] = value;
        vector(&config, &|_| ())
    };
    for (what, other) in [
        ("form of GELU", changed("hidden_act", json!("gelu_new"))),
        ("number of heads", changed("num_attention_heads", json!(8))),
        ("epsilon", changed("layer_norm_eps", json!(1e-2))),
        ("positions", vector(&bert.config, &zero("embeddings.position_embeddings.weight"))),
        ("token types", vector(&bert.config, &zero("embeddings.token_type_embeddings.weight"))),
        ("a norm's bias", vector(&bert.config, &zero("encoder.layer.1.output.LayerNorm.bias"))),
    ] {
        let moved = plain.iter().zip(&other).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(moved > 5e-5, "{what} moved the vector by {moved} at most");
    }
    // The pooler is there and is not read.
    assert_eq!(plain, vector(&bert.config, &zero("pooler.dense.weight")));
}

/// A checkpoint with the head of its training, below `bert.`, with the names of the oldest norms and a table of
/// positions, is the same encoder: its vectors have the same bits.
#[test]
fn other_names_make_the_same_encoder() {
    let golden = golden();
    let bert = &golden[0];
    let vector = |is_masked_lm: bool| {
        let folder = TempFolder::new("masked-lm");
        let mut config = bert.config.clone();
        let mut tensors = weights(&config, Dtype::F32);
        if is_masked_lm {
            config["architectures"] = json!(["BertForMaskedLM"]);
            for (name, _) in &mut tensors {
                let old =
                    name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta");
                *name = format!("bert.{old}");
            }
            let bytes = |count: usize| vec![0; count];
            let positions = TensorData { dtype: Dtype::I64, shape: vec![1, 256], bytes: bytes(2048) };
            tensors.push(("bert.embeddings.position_ids".to_string(), positions));
            for (name, width) in [("predictions.bias", 200), ("predictions.transform.LayerNorm.gamma", 64)] {
                let head = TensorData { dtype: Dtype::F32, shape: vec![width], bytes: bytes(4 * width) };
                tensors.push((format!("cls.{name}"), head));
            }
        }
        folder.write("config.json", config.to_string());
        write_weights(&folder, &tensors, 1);
        open(&folder, Reference).encode(&[&bert.sequences[2].token_ids], Pooling::Mean).expect("runs")
    };
    assert_eq!(vector(true), vector(false));
}
