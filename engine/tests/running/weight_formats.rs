//! Promise: weights take the form that was asked for, or under a memory limit the best that fits, and the bytes that were
//! planned from the headers alone are the bytes that they then take.

use std::path::Path;
use std::sync::{Arc, Mutex};

use ns_llm::config::AUTO_WEIGHT_FORMATS;
use ns_llm::inspect::inspect;
use ns_llm::quantize::{FileType, QuantizeOptions, quantize};
use ns_llm::{Engine, EngineOptions, Error, Message, QuantType, Request, WeightFormat};
use safetensors::Dtype;
use serde_json::{Value as Json, json};

use crate::demo;
use crate::tiny_model::{TempFolder, weights, write_weights};

const KV_BYTES: u64 = 4 << 20;

fn options(model: &Path, weights: WeightFormat) -> EngineOptions {
    EngineOptions::new(model).threads(2).weights(weights).kv_bytes(KV_BYTES)
}

fn answer(engine: &Engine) -> String {
    let question = Request::chat([Message::new("user", "What is the capital of France?")]);
    engine.complete(question.max_tokens(24).temperature(0.0)).unwrap().choices[0].text.clone()
}

/// The plan of every form is what loading then takes, to the byte: every architecture, odd widths whose rows fit no block,
/// stacked matrices, tied and transposed ones.
#[test]
fn plans_are_exact() {
    let golden: Json = serde_json::from_str(include_str!("../golden/tiny_models.json")).unwrap();
    let mut models = golden["models"].as_array().unwrap().clone();
    let wide = json!({
        "architectures": ["LlamaForCausalLM"], "vocab_size": 70, "hidden_size": 256, "intermediate_size": 352,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 20,
        "max_position_embeddings": 64, "attention_bias": true, "mlp_bias": true, "tie_word_embeddings": false,
    });
    models.push(json!({"name": "wide", "config": wide, "dtype": "BF16"}));
    let encoder = json!({
        "architectures": ["BertModel"], "vocab_size": 70, "hidden_size": 96, "intermediate_size": 256,
        "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64, "type_vocab_size": 2,
    });
    models.push(json!({"name": "encoder", "config": encoder, "dtype": "F32"}));
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let tokenizer = json!({
        "version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": byte_level, "post_processor": null,
        "decoder": byte_level, "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
    });
    let mut compared = std::collections::BTreeSet::new();
    for model in &models {
        let dtype: Dtype = serde_json::from_value(model["dtype"].clone()).unwrap();
        let folder = TempFolder::new("weight-formats");
        folder.write("config.json", model["config"].to_string());
        folder.write("tokenizer.json", tokenizer.to_string());
        write_weights(&folder, &weights(&model["config"], dtype), 1);
        for format in WeightFormat::all() {
            let planned = inspect(&options(folder.path(), format)).unwrap();
            let engine = Engine::open(options(folder.path(), format)).unwrap();
            let name = format!("{} as {}", model["name"], format.name());
            assert_eq!(planned.plan.weights_bytes, engine.memory().weights_bytes, "{name}");
            assert_eq!(planned.plan.kv_bytes(), engine.memory().kv_reserved_bytes, "{name}");
            assert_eq!(planned.weights, engine.info().weights, "{name}");
            compared.insert((planned.architecture, format.name()));
        }
    }
    assert_eq!(compared.len(), 6 * 16);
}

/// Every format answers as the model does, and takes about as many bits as its name says.
#[test]
fn every_form_answers() {
    let stored = inspect(&options(&demo::path(), WeightFormat::Auto)).unwrap();
    for format in WeightFormat::all() {
        let engine = Engine::open(options(&demo::path(), format)).unwrap();
        assert_eq!(engine.info().weights, if format == WeightFormat::Auto { "bf16" } else { format.name() });
        if let WeightFormat::Quant(quant_type) = format {
            let bits = 8.0 * engine.memory().weights_bytes as f64 / stored.num_parameters as f64;
            let in_blocks = 8.0 * quant_type.block_bytes() as f64 / quant_type.block_values() as f64;
            assert!((in_blocks - 0.1..in_blocks + 2.0).contains(&bits), "{}: {bits} bits", format.name());
        }
        if ![WeightFormat::Quant(QuantType::Q2_K), WeightFormat::Quant(QuantType::Q3_K)].contains(&format) {
            assert!(answer(&engine).contains("Paris"), "{}: {}", format.name(), answer(&engine));
        }
    }
}

/// Under a falling limit the weights take one form after the other, best first; each is chosen exactly as far down as it
/// fits; what fits nowhere is refused with the need of the smallest, and opens with that.
#[test]
fn a_limit_chooses_the_best_form_that_fits() {
    let with_limit = |limit: u64| options(&demo::path(), WeightFormat::Auto).memory_limit_bytes(limit);
    let levels = inspect(&with_limit(1 << 40)).unwrap().levels;
    let names: Vec<_> = levels.iter().map(|level| level.weights).collect();
    assert_eq!(names, ["bf16", "q8_0", "q6_k", "q5_k", "q4_k", "q3_k", "q2_k"]);
    assert!(levels[0].is_stored && levels[0].is_chosen && !levels[1].is_stored);
    assert!(names[1..].iter().all(|name| AUTO_WEIGHT_FORMATS.iter().any(|format| format.name() == *name)));
    for level in &levels {
        let needed = level.plan.needed_bytes();
        let engine = Engine::open(with_limit(needed)).unwrap();
        assert_eq!(engine.info().weights, level.weights);
        let memory = engine.memory();
        assert_eq!(memory.weights_bytes + memory.kv_reserved_bytes, needed);
        let seen = inspect(&with_limit(needed - 1)).unwrap();
        assert!(seen.levels.iter().find(|other| other.weights == level.weights).is_some_and(|other| !other.fits));
    }
    let smallest = levels.last().unwrap().plan.needed_bytes();
    let e = Engine::open(with_limit(smallest - 1)).err().unwrap();
    assert!(
        matches!(e, Error::OutOfMemory { needed_bytes, available_bytes, .. } if (needed_bytes, available_bytes) == (smallest, smallest - 1)),
        "{e}"
    );
    assert!(inspect(&with_limit(smallest - 1)).unwrap().levels.iter().all(|level| !level.fits && !level.is_chosen));
    // A form that was asked for is not exchanged for a smaller one.
    let fixed = options(&demo::path(), WeightFormat::Bf16).memory_limit_bytes(smallest);
    assert_eq!(Engine::open(fixed).err().unwrap().code(), "out_of_memory");
}

/// A file of mixed types stays as it is stored: its matrices of more bits are not rounded to those of the others.
#[test]
fn mixed_files_stay_mixed() {
    let folder = TempFolder::new("weight-formats-mixed");
    let (mixed, pure) = (folder.path().join("mixed.gguf"), folder.path().join("pure.gguf"));
    quantize(QuantizeOptions::new(demo::path(), &mixed, FileType::Q4_K_M)).unwrap();
    let mut alike = QuantizeOptions::new(demo::path(), &pure, FileType::Q4_K_M);
    alike.pure = true;
    quantize(alike).unwrap();
    let open = |path: &Path, format| Engine::open(options(path, format)).unwrap();
    let [as_stored, rounded, pure] = [
        open(&mixed, WeightFormat::Auto),
        open(&mixed, WeightFormat::Quant(QuantType::Q4_K)),
        open(&pure, WeightFormat::Auto),
    ];
    assert_eq!((as_stored.info().weights, pure.info().weights), ("q4_k", "q4_k"));
    assert!(as_stored.memory().weights_bytes > pure.memory().weights_bytes);
    assert_eq!(rounded.memory().weights_bytes, pure.memory().weights_bytes);
    assert!(answer(&as_stored).contains("Paris"));
}

/// Loading reports while it rounds weights, and ends between two tensors when it is told to.
#[test]
fn rounding_reports_and_can_be_cancelled() {
    let heard = Arc::new(Mutex::new(Vec::new()));
    let hearing = heard.clone();
    let quantized = || options(&demo::path(), WeightFormat::Quant(QuantType::Q4_K));
    let all = quantized().on_progress(move |progress| {
        hearing.lock().unwrap().push(progress.fraction());
        true
    });
    drop(Engine::open(all).unwrap());
    let heard = heard.lock().unwrap();
    assert!(heard.len() > 40 && heard.is_sorted() && heard.first() == Some(&0.0) && heard.last() == Some(&1.0));
    let calls = Arc::new(Mutex::new(0));
    let counting = calls.clone();
    let half = quantized().on_progress(move |progress| {
        *counting.lock().unwrap() += 1;
        progress.fraction() < 0.5
    });
    assert_eq!(Engine::open(half).err(), Some(Error::Cancelled));
    assert!(*calls.lock().unwrap() < heard.len(), "no tensor is read after that");
}
