//! Promise: a model in a GGUF file is the model that it was made from. Small models of every architecture, converted by
//! the test, give logits of the same bits as their safetensors; quantized ones those of their decoded numbers; the demo
//! model converted gives the same tokens and the same answers.

use std::fs;
use std::path::{Path, PathBuf};

use ns_llm::backend::KvDtype;
use ns_llm::loader::ModelSource;
use ns_llm::tokenizer::{Tokenizer, TokenizerConfig};
use ns_llm::{Embedding, EmbeddingRequest, Engine, EngineOptions, Message, Request};
use ns_llm_kernels::quant::{QuantType, decode, encode};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value as Json, json};

use crate::demo;
use crate::demo::{Rng, fingerprint, with_logprobs};
use crate::direct_run::{DirectRun, Rows};
use crate::gguf_file::{GgufFile, Value, converted};
use crate::reference_backend::Reference;
use crate::tiny_model::{TempFolder, TensorData, weights, write_weights};

/// Bits of all logits of one sequence.
fn logit_bits(path: &Path, token_ids: &[u32]) -> Vec<u32> {
    let mut run = DirectRun::open(path, Reference, KvDtype::F32, 96).unwrap_or_else(|e| panic!("{e}"));
    let sequence = run.begin();
    let logits = run.step(&[(sequence, token_ids)], Rows::All).unwrap();
    logits.iter().flatten().map(|logit| logit.to_bits()).collect()
}

/// Every architecture and variant that a file can say has the logits of the folder it was converted from, to the bit:
/// rows of q and k are put back, GPT-2's matrices were turned, stretched frequencies are found again, tied and biased
/// matrices are seen.
#[test]
fn converted_models_have_the_same_logits() {
    let golden: Json = serde_json::from_str(include_str!("../golden/tiny_models.json")).unwrap();
    let (mut compared, mut reordered, mut stretched, mut turned) = (0, 0, 0, 0);
    for model in golden["models"].as_array().unwrap() {
        let (name, mut config) = (model["name"].as_str().unwrap(), model["config"].clone());
        if config["use_sliding_window"] == true {
            continue;
        }
        // The format has no key for it.
        config.as_object_mut().unwrap().remove("activation_function");
        let config = &config;
        let dtype: Dtype = serde_json::from_value(model["dtype"].clone()).unwrap();
        let tensors = weights(config, dtype);
        let folder = TempFolder::new("gguf-models");
        folder.write("config.json", config.to_string());
        write_weights(&folder, &tensors, 1);
        let file = converted(config, &tensors);
        folder.write("model.gguf", file.bytes());
        let in_file =
            |name: &[u8]| file.tensors.iter().find(|tensor| tensor.name == name).map(|tensor| tensor.data.clone());
        let in_folder =
            |end: &str| tensors.iter().find(|(name, _)| name.ends_with(end)).map(|(_, tensor)| tensor.bytes.clone());
        reordered += usize::from(in_file(b"blk.0.attn_q.weight") != in_folder("0.self_attn.q_proj.weight"));
        turned += usize::from(
            in_file(b"blk.0.attn_output.weight")
                != in_folder("attn.c_proj.weight").or(in_folder("0.self_attn.o_proj.weight")),
        );
        stretched += usize::from(file.tensors.iter().any(|tensor| tensor.name == b"rope_freqs.weight"));
        let token_ids: Vec<u32> = serde_json::from_value(model["sequences"][1]["token_ids"].clone()).unwrap();
        let expected = logit_bits(folder.path(), &token_ids);
        assert!(expected.len() >= 200 * 10);
        assert!(logit_bits(&folder.path().join("model.gguf"), &token_ids) == expected, "{name}");
        compared += 1;
    }
    assert_eq!((compared, reordered, stretched, turned), (9, 4, 1, 2));
}

/// A tensor of blocks is the tensor of the numbers that its blocks stand for, for each of the formats, also where rows
/// were reordered: shown on a Llama whose matrices are all quantized.
#[test]
fn quantized_models_have_the_logits_of_their_numbers() {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 256, "intermediate_size": 256,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    });
    let tensors = weights(&config, Dtype::F32);
    let floats = |bytes: &[u8]| -> Vec<f32> {
        bytes.chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
    };
    let quantized = |quant_type: QuantType, bytes: &[u8]| {
        let values = floats(bytes);
        let mut blocks = vec![0; quant_type.size_bytes(values.len()).unwrap()];
        encode(quant_type, &values, &mut blocks).unwrap();
        blocks
    };
    let mut seen = std::collections::HashSet::new();
    for quant_type in QuantType::ALL {
        let folder = TempFolder::new("gguf-quantized");
        let mut file = converted(&config, &tensors);
        for tensor in file.tensors.iter_mut().filter(|tensor| tensor.sizes.len() == 2) {
            (tensor.kind, tensor.data) = (quant_type.ggml_id(), quantized(quant_type, &tensor.data));
        }
        folder.write("model.gguf", file.bytes());
        let decoded = tensors.iter().map(|(name, tensor)| {
            let mut tensor: TensorData = tensor.clone();
            if tensor.shape.len() == 2 {
                let mut values = floats(&tensor.bytes);
                decode(quant_type, &quantized(quant_type, &tensor.bytes), &mut values).unwrap();
                tensor.bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            }
            (name.clone(), tensor)
        });
        folder.write("config.json", config.to_string());
        write_weights(&folder, &decoded.collect::<Vec<_>>(), 1);
        let token_ids = [1, 5, 9, 33, 2];
        let expected = logit_bits(folder.path(), &token_ids);
        assert!(logit_bits(&folder.path().join("model.gguf"), &token_ids) == expected, "{}", quant_type.name());
        seen.insert(expected);
        let engine = Engine::open(EngineOptions::new(folder.path().join("model.gguf")).threads(1)).unwrap();
        assert_eq!(engine.info().weights, quant_type.name());
        assert_eq!(engine.complete(Request::tokens(vec![1, 2]).max_tokens(4)).unwrap().choices.len(), 1);
    }
    assert_eq!(seen.len(), QuantType::ALL.len(), "each format rounds in its own way");
}

/// An encoder of a file gives the vectors of the folder it was made from, to the bit, with the pooling that the file
/// names: for texts, so that the vocabulary is felt too. Without that key it is the mean; a pooling that is not built is
/// refused.
#[test]
fn converted_encoders_have_the_same_vectors() {
    let config = json!({
        "architectures": ["BertModel"], "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 16, "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
    });
    let tensors = weights(&config, Dtype::F32);
    let folder = TempFolder::new("gguf-encoder");
    folder.write("config.json", config.to_string());
    write_weights(&folder, &tensors, 1);
    folder.write("tokenizer.json", word_pieces().to_string());
    fs::create_dir_all(folder.path().join("1_Pooling")).unwrap();

    let mut file = converted(&config, &tensors);
    let phantom = |(id, word): (usize, &&str)| match word.strip_prefix("##") {
        _ if id < 4 => word.to_string(),
        Some(rest) => rest.to_string(),
        None => format!("\u{2581}{word}"),
    };
    let types: Vec<i32> = (0..WORDS.len()).map(|id| if id < 4 { 3 } else { 1 }).collect();
    file.set("tokenizer.ggml.model", Value::string("bert"));
    file.set("tokenizer.ggml.tokens", Value::strings(&WORDS.iter().enumerate().map(phantom).collect::<Vec<_>>()));
    file.set("tokenizer.ggml.token_type", Value::i32s(&types));
    for (key, id) in [("padding", 0), ("unknown", 1), ("cls", 2), ("seperator", 3)] {
        file.set(&format!("tokenizer.ggml.{key}_token_id"), Value::u32(id));
    }
    for key in ["pre", "merges", "eos_token_id"] {
        file.remove(&format!("tokenizer.ggml.{key}"));
    }
    let path = folder.path().join("model.gguf");
    let mut seen = Vec::new();
    for (pooling, mode) in [(1, "mean_tokens"), (2, "cls_token"), (3, "lasttoken")] {
        let switch = json!({ format!("pooling_mode_{mode}"): true });
        folder.write("1_Pooling/config.json", switch.to_string());
        file.set("bert.pooling_type", Value::u32(pooling));
        folder.write("model.gguf", file.bytes());
        let expected = vectors(folder.path());
        assert!(expected[0].0 == 11 && expected[3].1, "{expected:?}");
        assert!(vectors(&path) == expected, "{mode}");
        seen.push(expected);
    }
    assert!(seen[0] != seen[1] && seen[1] != seen[2] && seen[0] != seen[2]);
    for unsaid in [Some(0), None] {
        file.remove("bert.pooling_type");
        if let Some(pooling) = unsaid {
            file.set("bert.pooling_type", Value::u32(pooling));
        }
        folder.write("model.gguf", file.bytes());
        assert!(vectors(&path) == seen[0], "{unsaid:?}");
    }
    // A head that ranks pairs of texts.
    file.set("bert.pooling_type", Value::u32(4));
    folder.write("model.gguf", file.bytes());
    let refused = Engine::open(EngineOptions::new(&path)).map(drop).unwrap_err().to_string();
    assert!(refused.contains("`bert.pooling_type`: is 4, which is not supported"), "{refused}");
}

const WORDS: [&str; 14] =
    ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "fox", "jump", "##s", "over", "a", "dog", ",", "cafe", "\u{72D0}"];

fn word_pieces() -> Json {
    let special = |id: usize| {
        json!({"id": id, "content": WORDS[id], "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    let vocab: serde_json::Map<_, _> =
        WORDS.iter().enumerate().map(|(id, word)| (word.to_string(), json!(id))).collect();
    json!({
        "version": "1.0", "added_tokens": (0..4).map(special).collect::<Vec<_>>(),
        "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
                       "strip_accents": null, "lowercase": true},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                  "max_input_chars_per_word": 100, "vocab": vocab},
    })
}

/// Of some texts: tokens, whether it was cut, and the bits of its vector.
fn vectors(path: &Path) -> Vec<(usize, bool, Vec<u32>)> {
    let long = "dog ".repeat(15);
    let texts = ["The fox jumps over a Caf\u{E9}, \u{72D0}", "zebra", "", long.as_str()];
    let engine = Engine::open(EngineOptions::new(path).threads(1)).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!((engine.info().architecture.as_str(), engine.info().can_generate), ("BertModel", false));
    let bits = |embedding: &Embedding| embedding.values.iter().map(|value| value.to_bits()).collect();
    let embeddings = engine.embed(EmbeddingRequest::new(texts)).unwrap().embeddings;
    embeddings.iter().map(|embedding| (embedding.tokens, embedding.truncated, bits(embedding))).collect()
}

// ---- the demo model -----------------------------------------------------------------------------------------------------

fn read_json(path: PathBuf) -> Json {
    serde_json::from_slice(&fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))).unwrap()
}

/// The demo model as one file, weights as they are.
fn converted_demo() -> GgufFile {
    let bytes = fs::read(demo::path().join("model.safetensors")).unwrap();
    let tensors: Vec<(String, TensorData)> = SafeTensors::deserialize(&bytes)
        .unwrap()
        .iter()
        .map(|(name, view)| {
            let (dtype, shape, bytes) = (view.dtype(), view.shape().to_vec(), view.data().to_vec());
            (name.to_string(), TensorData { dtype, shape, bytes })
        })
        .collect();
    let mut file = converted(&read_json(demo::path().join("config.json")), &tensors);
    let tokenizer = read_json(demo::path().join("tokenizer.json"));
    let vocab = tokenizer["model"]["vocab"].as_object().unwrap();
    let mut tokens = vec![String::new(); vocab.len()];
    vocab.iter().for_each(|(token, id)| tokens[id.as_u64().unwrap() as usize] = token.clone());
    let mut types = vec![1; tokens.len()];
    let special = tokenizer["added_tokens"].as_array().unwrap();
    special.iter().for_each(|token| types[token["id"].as_u64().unwrap() as usize] = 3);
    let merge = |merge: &Json| format!("{} {}", merge[0].as_str().unwrap(), merge[1].as_str().unwrap());
    let merges: Vec<String> = tokenizer["model"]["merges"].as_array().unwrap().iter().map(merge).collect();
    let template = read_json(demo::path().join("tokenizer_config.json"))["chat_template"].clone();
    file.set("tokenizer.ggml.pre", Value::string("qwen2"));
    file.set("tokenizer.ggml.tokens", Value::strings(&tokens));
    file.set("tokenizer.ggml.token_type", Value::i32s(&types));
    file.set("tokenizer.ggml.merges", Value::strings(&merges));
    file.set("tokenizer.ggml.padding_token_id", Value::u32(0));
    file.set("tokenizer.chat_template", Value::string(template.as_str().unwrap()));
    file
}

fn tokenizer(path: &Path) -> Tokenizer {
    let source = ModelSource::open(path).unwrap();
    let config = TokenizerConfig::parse(&source.tokenizer_config().unwrap().unwrap().into_value()).unwrap();
    Tokenizer::from_json(&source.tokenizer().unwrap().json().unwrap(), &config).unwrap()
}

/// The converted vocabulary gives the original's ids: for the texts of the golden file in many languages, code and
/// emoji, and for random mixtures of such characters, with special tokens counting and as plain text. What Qwen's
/// tokenizer does and the demo's does not: it composes characters first.
#[test]
fn converted_vocabulary_gives_the_same_tokens() {
    let folder = TempFolder::new("gguf-demo");
    folder.write("demo.gguf", converted_demo().bytes());
    let (original, converted) = (tokenizer(&demo::path()), tokenizer(&folder.path().join("demo.gguf")));
    let vectors = read_json(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/text_vectors.json"));
    let mut texts: Vec<String> =
        vectors["demo"].as_array().unwrap().iter().map(|row| row["text"].as_str().unwrap().to_string()).collect();
    let pieces: Vec<&str> = "the| and|'LL|n't| 1234|5|\u{00E9}|\u{00DF}|\u{0436}\u{0443}\u{043A}|\u{4F60}\u{597D}|\u{1F600}|\
        \u{1F468}\u{200D}\u{1F469}|\u{0627}\u{0644}|\u{D55C}|\u{A0}|\u{0}|\u{7F}|\u{FFFD}|\u{FEFF}|\t|\n|\r\n|  |   x|fn main() {|</p>|<|im_start|\
        |>|<|im_end|>|!!|...|\u{2026}|_|-"
        .split('|')
        .collect();
    let mut rng = Rng(7);
    for _ in 0..2_000 {
        texts.push((0..1 + rng.below(12)).map(|_| pieces[rng.below(pieces.len())]).collect());
    }
    texts.push("<|im_start|>user\nhi<|im_end|>\n".to_string());
    assert!(texts.len() > 2_025);
    let (mut special, mut composed) = (0, 0);
    for text in &texts {
        let wanted = text.replace("e\u{301}", "\u{E9}");
        let ids = original.encode(&wanted, true).unwrap();
        assert_eq!(converted.encode(text, true).unwrap(), ids, "{text:?}");
        assert_eq!(converted.encode_plain(text).unwrap(), original.encode_plain(&wanted).unwrap(), "plain {text:?}");
        assert_eq!(converted.decode(&ids, false), wanted);
        special += usize::from(ids.iter().any(|&id| converted.is_special(id)));
        composed += usize::from(wanted != *text);
    }
    assert!(special > 0 && composed > 0);
    assert!(converted.special_tokens().eq(original.special_tokens()));
}

/// A vocabulary with scores instead of merges gives the ids, the frame around a prompt and the text that Python gives
/// its original, in every text of the golden file.
#[test]
fn scored_vocabulary_gives_the_same_tokens() {
    let golden = |name: &str| read_json(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name));
    let original = golden("sentencepiece.json");
    let vocab = original["model"]["vocab"].as_object().unwrap();
    let mut tokens = vec![String::new(); vocab.len()];
    vocab.iter().for_each(|(token, id)| tokens[id.as_u64().unwrap() as usize] = token.clone());
    let kind = |(id, token): (usize, &String)| match id {
        0 => 2,
        1 | 2 => 3,
        _ if token.starts_with("<0x") => 6,
        _ => 1,
    };
    let types: Vec<i32> = tokens.iter().enumerate().map(kind).collect();
    let scores: Vec<f32> = (0..tokens.len()).map(|id| -(id as f32)).collect();
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "vocab_size": 512, "hidden_size": 32, "intermediate_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64,
    });
    let mut file = converted(&config, &weights(&config, Dtype::F32));
    file.remove("tokenizer.ggml.merges");
    file.set("tokenizer.ggml.model", Value::string("llama"));
    file.set("tokenizer.ggml.pre", Value::string("default"));
    file.set("tokenizer.ggml.tokens", Value::strings(&tokens));
    file.set("tokenizer.ggml.token_type", Value::i32s(&types));
    file.set("tokenizer.ggml.scores", Value::f32s(&scores));
    for (key, id) in [("unknown", 0), ("bos", 1), ("eos", 2)] {
        file.set(&format!("tokenizer.ggml.{key}_token_id"), Value::u32(id));
    }
    let folder = TempFolder::new("gguf-scores");
    folder.write("model.gguf", file.bytes());
    let tokenizer = tokenizer(&folder.path().join("model.gguf"));
    let rows = golden("text_vectors.json")["sentencepiece"].as_array().unwrap().clone();
    assert!(rows.len() >= 25);
    for row in rows {
        let ids = |field: &str| -> Vec<u32> { serde_json::from_value(row[field].clone()).unwrap() };
        let text = row["text"].as_str().unwrap();
        assert_eq!(tokenizer.encode(text, false).unwrap(), ids("ids"), "{text:?}");
        assert_eq!(tokenizer.encode(text, true).unwrap(), ids("framed_ids"), "{text:?}");
        assert_eq!(tokenizer.decode(&ids("ids"), true), row["decoded"].as_str().unwrap(), "{text:?}");
    }
    assert!(Engine::open(EngineOptions::new(folder.path().join("model.gguf")).threads(1)).is_ok());
}

/// The converted model answers as the original does, to the bits of its logprobs, for a prompt and for a conversation
/// through the template in the file; also after the file was cut to nothing: an open engine reads no file.
#[test]
fn converted_demo_gives_the_same_answers() {
    let folder = TempFolder::new("gguf-demo");
    folder.write("demo.gguf", converted_demo().bytes());
    let open = |path: PathBuf| Engine::open(EngineOptions::new(path).threads(1)).unwrap_or_else(|e| panic!("{e}"));
    let (original, converted) = (open(demo::path()), open(folder.path().join("demo.gguf")));
    assert_eq!((converted.info().weights, converted.info().vocab_size), ("bf16", original.info().vocab_size));
    assert!(converted.info().has_chat_template);
    folder.write("demo.gguf", "");
    let prompt = || Request::prompt("Once upon a time").max_tokens(48).temperature(0.0);
    let messages = || Request::chat(vec![Message::new("user", "Tell me a story.")]).max_tokens(48).temperature(0.0);
    for request in [prompt, messages] {
        let answers =
            [&original, &converted].map(|engine| fingerprint(&engine.complete(with_logprobs(request())).unwrap()));
        assert!(answers[0].token_ids[0].len() > 8, "{:?}", answers[0].text);
        assert_eq!(answers[0], answers[1]);
    }
}
