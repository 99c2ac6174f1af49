//! Promise: what `quantize` writes is the model that it read, in other numbers. Small models of every architecture keep the
//! bits of their logits in a file of their own type; every other type has exactly the blocks that its format's encoder
//! makes; the demo model keeps its tokens, its template and its answers; and a run that fails leaves nothing behind.

use std::fs;
use std::path::{Path, PathBuf};

use ns_llm::backend::KvDtype;
use ns_llm::inspect::inspect;
use ns_llm::loader::ModelSource;
use ns_llm::quantize::{FileType, QuantizeOptions, Quantized, quantize};
use ns_llm::tokenizer::{Tokenizer, TokenizerConfig};
use ns_llm::{EmbeddingRequest, Engine, EngineOptions, Error, Message, Request};
use ns_llm_kernels::quant::{QuantType, encode};
use safetensors::Dtype;
use serde_json::{Value as Json, json};

use crate::demo;
use crate::demo::{Rng, fingerprint, with_logprobs};
use crate::direct_run::{DirectRun, Rows};
use crate::reference_backend::Reference;
use crate::tiny_model::{TempFolder, TensorData, weights, write_weights};

/// A vocabulary of three tokens, cut as GPT-2 does.
fn small_tokenizer() -> Json {
    json!({
        "version": "1.0", "added_tokens": [], "normalizer": null, "post_processor": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
    })
}

fn model_folder(config: &Json, tensors: &[(String, TensorData)]) -> TempFolder {
    let folder = TempFolder::new("quantized-files");
    folder.write("config.json", config.to_string());
    folder.write("tokenizer.json", small_tokenizer().to_string());
    write_weights(&folder, tensors, 1);
    folder
}

fn quantized(model: &Path, output: &Path, file_type: FileType) -> Quantized {
    let mut options = QuantizeOptions::new(model, output, file_type);
    options.threads = Some(2);
    quantize(options).unwrap_or_else(|e| panic!("{} as {}: {e}", model.display(), file_type.name()))
}

fn logit_bits(path: &Path, token_ids: &[u32]) -> Vec<u32> {
    let mut run = DirectRun::open(path, Reference, KvDtype::F32, 96).unwrap_or_else(|e| panic!("{e}"));
    let sequence = run.begin();
    let logits = run.step(&[(sequence, token_ids)], Rows::All).unwrap();
    logits.iter().flatten().map(|logit| logit.to_bits()).collect()
}

/// Every tensor of a file as it is stored.
fn stored(path: &Path, tensors: &[ns_llm::inspect::TensorInfo]) -> Vec<Vec<u8>> {
    let mut weights = ModelSource::open(path).unwrap().weights().unwrap();
    let names: Vec<String> = weights.entries().map(|(name, ..)| name.to_string()).collect();
    assert_eq!(names.len(), tensors.len());
    names.iter().map(|name| weights.take_stored(name, Vec::new()).unwrap()).collect()
}

/// Every architecture and variant that the format can say has the logits of its folder, to the bit, in a file of the
/// folder's own type: names, order of rows, stretched frequencies, ties and biases are right.
#[test]
fn files_of_the_same_type_have_the_same_logits() {
    let golden: Json = serde_json::from_str(include_str!("../golden/tiny_models.json")).unwrap();
    let (mut compared, mut refused) = (Vec::new(), 0);
    for model in golden["models"].as_array().unwrap() {
        let (name, config) = (model["name"].as_str().unwrap(), &model["config"]);
        let dtype: Dtype = serde_json::from_value(model["dtype"].clone()).unwrap();
        let file_type = FileType::from_name(&dtype.to_string()).unwrap();
        let folder = model_folder(config, &weights(config, dtype));
        let file = folder.path().join("model.gguf");
        let architecture = config["architectures"][0].as_str().unwrap();
        let other_gelu = architecture == "GPT2LMHeadModel" && config["activation_function"] == "gelu";
        // The tokenizer of these folders is no encoder's.
        if config["use_sliding_window"] == true || other_gelu || architecture == "BertModel" {
            let e = quantize(QuantizeOptions::new(folder.path(), &file, file_type)).expect_err(name);
            assert!(["not_supported", "config"].contains(&e.code()) && !file.exists(), "{name}: {e}");
            refused += 1;
            continue;
        }
        quantized(folder.path(), &file, file_type);
        let token_ids: Vec<u32> = serde_json::from_value(model["sequences"][1]["token_ids"].clone()).unwrap();
        let expected = logit_bits(folder.path(), &token_ids);
        assert!(expected.len() >= 200 * 10);
        assert!(logit_bits(&file, &token_ids) == expected, "{name}");
        compared.push(architecture);
    }
    assert!(compared.len() >= 8, "{compared:?}");
    assert!(refused >= 1);
    for architecture in
        ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "GPT2LMHeadModel"]
    {
        assert!(compared.contains(&architecture), "{architecture}");
    }
}

/// An encoder whose checkpoint has the head of its training, below `bert.`, with word pieces and a pooling.
fn encoder_folder() -> TempFolder {
    let config = json!({
        "architectures": ["BertModel"], "vocab_size": 16, "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 96, "max_position_embeddings": 32, "type_vocab_size": 2,
    });
    let mut tensors = weights(&config, Dtype::F32);
    for (name, _) in &mut tensors {
        *name = format!("bert.{name}")
            .replace("LayerNorm.weight", "LayerNorm.gamma")
            .replace("LayerNorm.bias", "LayerNorm.beta");
    }
    let folder = model_folder(&config, &tensors);
    let tokens =
        ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused0]", "a", "b", "##b", "##a", "fox", "##es", "!", "é"];
    let vocab: serde_json::Map<_, _> =
        tokens.iter().enumerate().map(|(id, token)| (token.to_string(), json!(id))).collect();
    let added = |id: usize| {
        json!({"id": id, "content": tokens[id], "special": true, "single_word": false, "lstrip": false,
               "rstrip": false, "normalized": false})
    };
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": (0..5).map(added).collect::<Vec<_>>(),
        "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
                       "strip_accents": false, "lowercase": true},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]},
        "decoder": null,
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                  "max_input_chars_per_word": 100, "vocab": vocab},
    });
    folder.write("tokenizer.json", tokenizer.to_string());
    fs::create_dir(folder.path().join("1_Pooling")).unwrap();
    folder.write("1_Pooling/config.json", r#"{"word_embedding_dimension": 64, "pooling_mode_cls_token": true}"#);
    folder
}

/// An encoder in a file of its folder's own type reads every text as the folder does, and gives the same vectors to the
/// bit; in 8 bits it gives nearly the same; what a file cannot say is refused.
#[test]
fn encoders_give_the_same_vectors() {
    let folder = encoder_folder();
    let [same, small, other] = ["same.gguf", "small.gguf", "other.gguf"].map(|name| folder.path().join(name));
    quantized(folder.path(), &same, FileType::F32);
    let small_file = quantized(folder.path(), &small, FileType::Q8_0);
    let type_of = |name: &str| small_file.tensors.iter().find(|t| t.name == name).unwrap().dtype.clone();
    assert_eq!((type_of("blk.1.attn_q.weight"), type_of("token_types.weight")), ("Q8_0".into(), "F32".into()));
    let texts = ["a b", "abab Foxes!", "[SEP] a", "unknown é words", "", "fox ab foxes [unused0] b"];
    let (before, after) = (tokenizer(folder.path()), tokenizer(&same));
    for text in texts {
        assert_eq!(after.encode(text, true).unwrap(), before.encode(text, true).unwrap(), "{text:?}");
    }
    let vectors = |path: &Path| -> Vec<Vec<f32>> {
        let engine = Engine::open(EngineOptions::new(path).threads(1)).unwrap();
        let vectors = engine.embed(EmbeddingRequest::new(texts)).unwrap();
        vectors.embeddings.into_iter().map(|embedding| embedding.values).collect()
    };
    let bits = |vectors: &[Vec<f32>]| -> Vec<u32> { vectors.iter().flatten().map(|x| x.to_bits()).collect() };
    let expected = vectors(folder.path());
    assert_ne!(expected[0], expected[1]);
    assert!(bits(&vectors(&same)) == bits(&expected));
    for (vector, expected) in vectors(&small).iter().zip(&expected) {
        let cosine: f32 = vector.iter().zip(expected).map(|(a, b)| a * b).sum();
        assert!((0.99..0.999_999_9).contains(&cosine), "{cosine}");
    }
    let config = fs::read_to_string(folder.path().join("config.json")).unwrap();
    folder.write("config.json", config.replacen('{', r#"{"hidden_act": "gelu_new", "#, 1));
    let e = quantize(QuantizeOptions::new(folder.path(), &other, FileType::F32)).expect_err("another GELU");
    assert!(e.to_string().contains("`hidden_act`"), "{e}");
    folder.write("config.json", config);
    let text = fs::read_to_string(folder.path().join("tokenizer.json")).unwrap();
    for (field, from, to) in [
        ("normalizer", r#""handle_chinese_chars":true"#, r#""handle_chinese_chars":false"#),
        ("pre_tokenizer", r#""BertPreTokenizer""#, r#""Whitespace""#),
        ("model.max_input_chars_per_word", r#""max_input_chars_per_word":100"#, r#""max_input_chars_per_word":50"#),
        ("post_processor", r#"["[CLS]",2]"#, r#"["[MASK]",4]"#),
    ] {
        assert!(text.contains(from), "{from}");
        folder.write("tokenizer.json", text.replace(from, to));
        let e = quantize(QuantizeOptions::new(folder.path(), &other, FileType::F32)).expect_err(field);
        assert!(e.to_string().contains(&format!("field `{field}`")) && !other.exists(), "{field}: {e}");
    }
}

/// A Llama with every kind of matrix and with biases: rows of 256, but for those of `down_proj`.
fn llama() -> Json {
    json!({
        "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 256, "intermediate_size": 96,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "attention_bias": true, "eos_token_id": 2,
    })
}

/// Every type: matrices have the blocks that the format's encoder makes of their numbers, or those of the type that takes
/// its place where rows do not fit; norms and biases stay f32; the file runs; and quantizing a file instead of a folder
/// gives the same bytes, also where rows were reordered.
#[test]
fn every_type_is_written_as_its_format_says() {
    let tensors = weights(&llama(), Dtype::F32);
    let folder = model_folder(&llama(), &tensors);
    let floats = |name: &str| -> Vec<f32> {
        let bytes = &tensors.iter().find(|(other, _)| other == name).unwrap().1.bytes;
        bytes.chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
    };
    let plain = folder.path().join("plain.gguf");
    quantized(folder.path(), &plain, FileType::F32);
    for file_type in FileType::ALL {
        let (file, again) = (folder.path().join("a.gguf"), folder.path().join("b.gguf"));
        let from_folder = quantized(folder.path(), &file, file_type);
        let from_file = quantized(&plain, &again, file_type);
        assert_eq!(from_folder.tensors, from_file.tensors);
        let (data, again_data) = (stored(&file, &from_folder.tensors), stored(&again, &from_file.tensors));
        assert!(data == again_data, "{}", file_type.name());
        assert_eq!(from_folder.file_bytes, fs::metadata(&file).unwrap().len());
        let of = |name: &str| from_folder.tensors.iter().find(|tensor| tensor.name == name).unwrap().dtype.clone();
        for one_dimensional in ["blk.0.attn_norm.weight", "blk.1.attn_q.bias", "output_norm.weight"] {
            assert_eq!(of(one_dimensional), "F32");
        }
        // Rows of 96 are no whole blocks of 256.
        assert!(!of("blk.0.ffn_down.weight").contains("_K"), "{}", of("blk.0.ffn_down.weight"));
        let name = "model.layers.1.mlp.gate_proj.weight";
        if let Some(quant_type) = QuantType::from_name(&of("blk.1.ffn_gate.weight")) {
            let values = floats(name);
            let mut expected = vec![0; quant_type.size_bytes(values.len()).unwrap()];
            encode(quant_type, &values, &mut expected).unwrap();
            let actual = ModelSource::open(&file).unwrap().weights().unwrap().take_stored(name, Vec::new()).unwrap();
            assert!(actual == expected, "{}", file_type.name());
            assert!(from_folder.file_bytes < from_folder.source_bytes / 2);
        } else {
            assert!(["f32", "f16", "bf16"].contains(&file_type.name()));
        }
        let engine = Engine::open(EngineOptions::new(&file).threads(1)).unwrap();
        assert_eq!(engine.complete(Request::tokens(vec![1, 0]).max_tokens(2)).unwrap().choices.len(), 1);
        fs::remove_file(&file).unwrap();
        fs::remove_file(&again).unwrap();
    }
    let mut pure = QuantizeOptions::new(folder.path(), folder.path().join("pure.gguf"), FileType::Q4_K_M);
    pure.pure = true;
    let tensors = quantize(pure).unwrap().tensors;
    let of = |name: &str| tensors.iter().find(|tensor| tensor.name == name).unwrap().dtype.as_str();
    assert_eq!((of("output.weight"), of("blk.2.attn_v.weight"), of("blk.0.ffn_down.weight")), ("Q4_K", "Q4_K", "Q5_0"));
}

fn tokenizer(path: &Path) -> Tokenizer {
    let source = ModelSource::open(path).unwrap();
    let config = source.tokenizer_config().unwrap().map(|config| TokenizerConfig::parse(&config.into_value()).unwrap());
    let config = config.unwrap_or_default();
    Tokenizer::from_json(&source.tokenizer().unwrap().json().unwrap(), &config).unwrap()
}

/// The demo model in a file has the folder's ids, special tokens, end tokens and template, and gives the same answers to the
/// bits of their logprobs; in 4 bits it still knows the capital of France.
#[test]
fn the_demo_model_stays_itself() {
    let folder = TempFolder::new("quantized-demo");
    let (same, small) = (folder.path().join("same.gguf"), folder.path().join("small.gguf"));
    quantized(&demo::path(), &same, FileType::BF16);
    quantized(&same, &small, FileType::Q4_K_M);
    let (original, written) = (tokenizer(&demo::path()), tokenizer(&same));
    let mut rng = Rng(11);
    for _ in 0..500 {
        let text = original.decode(&rng.prompt(12), false);
        assert_eq!(written.encode(&text, true).unwrap(), original.encode(&text, true).unwrap(), "{text:?}");
    }
    assert!(written.special_tokens().eq(original.special_tokens()));
    let [before, after] = [demo::path(), same.clone()].map(|path| inspect(&EngineOptions::new(path)).unwrap());
    assert_eq!(
        (after.architecture, after.hyperparameters, after.chat_template, after.eos_token_ids),
        (before.architecture, before.hyperparameters, before.chat_template, before.eos_token_ids)
    );
    let open = |path: PathBuf| Engine::open(EngineOptions::new(path).threads(1)).unwrap();
    let question =
        || Request::chat([Message::new("user", "What is the capital of France?")]).max_tokens(24).temperature(0.0);
    let answers =
        [demo::path(), same].map(|path| fingerprint(&open(path).complete(with_logprobs(question())).unwrap()));
    assert_eq!(answers[0], answers[1]);
    assert!(open(small).complete(question()).unwrap().choices[0].text.contains("Paris"));
}

/// A vocabulary of SentencePiece's kind, as its folder has it, gives the same ids out of the file: its merges become
/// scores, and these merges again.
#[test]
fn scored_vocabularies_give_the_same_tokens() {
    let golden = |name: &str| -> Json {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
        serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
    };
    let mut config = llama();
    (config["vocab_size"], config["bos_token_id"]) = (json!(512), json!(1));
    let folder = model_folder(&config, &weights(&config, Dtype::F32));
    folder.write("tokenizer.json", golden("sentencepiece.json").to_string());
    let file = folder.path().join("model.gguf");
    quantized(folder.path(), &file, FileType::Q8_0);
    let tokenizer = tokenizer(&file);
    let rows = golden("text_vectors.json")["sentencepiece"].as_array().unwrap().clone();
    assert!(rows.len() >= 25);
    for row in rows {
        let ids = |field: &str| -> Vec<u32> { serde_json::from_value(row[field].clone()).unwrap() };
        let text = row["text"].as_str().unwrap();
        assert_eq!(tokenizer.encode(text, false).unwrap(), ids("ids"), "{text:?}");
        assert_eq!(tokenizer.encode(text, true).unwrap(), ids("framed_ids"), "{text:?}");
    }
}

fn entries(folder: &Path) -> usize {
    fs::read_dir(folder).unwrap().count()
}

/// Whatever goes wrong, the folder of the output holds what it held: a file that is there stays unless it is to be
/// replaced, and no temporary file is left by a refusal, a cancelled run or a number that has no form in blocks.
#[test]
fn failures_leave_nothing() {
    let (config, mut tensors) = (llama(), weights(&llama(), Dtype::F32));
    let folder = model_folder(&config, &tensors);
    let place = TempFolder::new("quantized-place");
    let output = place.path().join("model.gguf");
    let options = |output: &Path| QuantizeOptions::new(folder.path(), output, FileType::Q8_0);
    let fails = |options: QuantizeOptions, code: &str, word: &str| {
        let e = quantize(options).expect_err(word);
        assert!(e.code() == code && e.to_string().contains(word), "{e}");
    };
    place.write("model.gguf", "something");
    fails(options(&output), "io", "already there");
    assert_eq!(fs::read(&output).unwrap(), b"something");
    fails(options(place.path()), "io", "is a folder");
    fails(options(&place.path().join("missing/model.gguf")), "io", "missing");
    let mut cancelled = options(&output);
    cancelled.overwrite = true;
    cancelled.on_progress = Some(Box::new(|progress| progress.loaded_bytes * 2 < progress.total_bytes));
    assert_eq!(quantize(cancelled), Err(Error::Cancelled));
    assert_eq!((fs::read(&output).unwrap().as_slice(), entries(place.path())), (&b"something"[..], 1));
    for threads in [0, 1000] {
        let mut wrong = options(&output);
        (wrong.overwrite, wrong.threads) = (true, Some(threads));
        fails(wrong, "invalid_argument", "threads");
    }
    // Half the bytes, but to the end this time.
    let heard = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let mut replacing = options(&output);
    replacing.overwrite = true;
    let hearing = heard.clone();
    replacing.on_progress = Some(Box::new(move |progress| {
        hearing.lock().unwrap().push((progress.loaded_bytes, progress.total_bytes));
        true
    }));
    let done = quantize(replacing).unwrap();
    let heard = heard.lock().unwrap();
    assert_eq!((heard.first().unwrap().0, heard.last().unwrap().0), (0, done.source_bytes));
    assert!(heard.is_sorted() && heard.iter().all(|(_, total)| *total == done.source_bytes));
    assert_eq!((&fs::read(&output).unwrap()[..4], entries(place.path())), (&b"GGUF"[..], 1));

    let bad = tensors.iter().position(|(name, _)| name == "model.layers.1.mlp.up_proj.weight").unwrap();
    tensors[bad].1.bytes[4 * 256 * 5..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
    write_weights(&folder, &tensors, 1);
    let other = place.path().join("other.gguf");
    fails(options(&other), "weights", "`model.layers.1.mlp.up_proj.weight` has numbers in row 5");
    // What the model would miss, or has no use for, is found before anything is written.
    let whole = tensors.clone();
    tensors[bad].0 = "model.layers.1.mlp.extra.weight".to_string();
    write_weights(&folder, &tensors, 1);
    fails(options(&other), "missing_tensor", "model.layers.1.mlp.up_proj.weight");
    let extra = tensors[bad].clone();
    write_weights(&folder, &[whole, vec![extra]].concat(), 1);
    fails(options(&other), "unused_tensors", "model.layers.1.mlp.extra.weight");
    assert_eq!(entries(place.path()), 1);
}
