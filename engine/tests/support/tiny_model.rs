//! Model folders that tests build for themselves: `config.json` and weights of a counter-based generator keyed by each
//! tensor's name, the same as in `golden/make_golden.py`. Nothing is downloaded and nothing large is stored.
#![allow(dead_code, reason = "each test program uses a part")]

use std::borrow::Cow;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use half::{bf16, f16};
use safetensors::{Dtype, View};
use serde_json::{Value, json};

/// A folder that is removed when it is dropped.
pub struct TempFolder(PathBuf);

impl TempFolder {
    /// A new, empty folder, different for each call and each process.
    pub fn new(name: &str) -> TempFolder {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let unique = format!("{name}-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        // A test that was carried to another machine finds no such folder there.
        let built = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let path = if built.is_dir() { built.join(unique) } else { std::env::temp_dir().join(unique) };
        fs::create_dir_all(&path).expect("the build's temporary folder is writable");
        TempFolder(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        fs::write(self.0.join(name), content).expect("the build's temporary folder is writable");
    }
}

impl Drop for TempFolder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A tensor as the tests write it.
#[derive(Clone)]
pub struct TensorData {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

impl View for &TensorData {
    fn dtype(&self) -> Dtype {
        self.dtype
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.bytes)
    }
    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

/// A Qwen3 of two small layers, for tests that need any valid model.
pub fn small_config() -> Value {
    json!({
        "architectures": ["Qwen3ForCausalLM"], "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
        "max_position_embeddings": 128, "tie_word_embeddings": true, "eos_token_id": 2,
    })
}

/// Writes `config` and the weights it asks for in `num_shards` files.
pub fn write_model(folder: &TempFolder, config: &Value, dtype: Dtype, num_shards: usize) {
    folder.write("config.json", config.to_string());
    write_weights(folder, &weights(config, dtype), num_shards);
}

/// Writes `tensors` into one file, or into several with their index, dealt out in turn.
pub fn write_weights(folder: &TempFolder, tensors: &[(String, TensorData)], num_shards: usize) {
    let file = |tensors: Vec<(&String, &TensorData)>| safetensors::serialize(tensors, None).expect("valid tensors");
    if num_shards == 1 {
        return folder.write("model.safetensors", file(tensors.iter().map(|(name, data)| (name, data)).collect()));
    }
    let mut weight_map = serde_json::Map::new();
    for shard in 0..num_shards {
        let name = format!("model-{:05}-of-{num_shards:05}.safetensors", shard + 1);
        let part = tensors.iter().skip(shard).step_by(num_shards).map(|(name, data)| (name, data));
        weight_map.extend(part.clone().map(|(tensor, _)| (tensor.clone(), Value::String(name.clone()))));
        folder.write(&name, file(part.collect()));
    }
    folder.write("model.safetensors.index.json", json!({"metadata": {}, "weight_map": weight_map}).to_string());
}

/// All tensors of the model that `config` describes, stored as `dtype`.
pub fn weights(config: &Value, dtype: Dtype) -> Vec<(String, TensorData)> {
    let tensor = |(name, shape): (String, Vec<usize>)| {
        let values = tensor_values(&name, shape.iter().product());
        let bytes = match dtype {
            Dtype::F32 => values.flat_map(|x| x.to_le_bytes()).collect(),
            Dtype::F16 => values.flat_map(|x| f16::from_f32(x).to_le_bytes()).collect(),
            Dtype::BF16 => values.flat_map(|x| bf16::from_f32(x).to_le_bytes()).collect(),
            other => panic!("no generator for {other}"),
        };
        (name, TensorData { dtype, shape, bytes })
    };
    tensor_shapes(config).into_iter().map(tensor).collect()
}

/// Names and shapes, as transformers has them.
pub fn tensor_shapes(config: &Value) -> Vec<(String, Vec<usize>)> {
    match config["architectures"][0].as_str().expect("one architecture") {
        "GPT2LMHeadModel" => gpt2_shapes(config),
        "BertModel" => bert_shapes(config),
        architecture => llama_shapes(config, architecture),
    }
}

fn size(config: &Value, field: &str) -> usize {
    config[field].as_u64().unwrap_or_else(|| panic!("{field}")) as usize
}

fn gpt2_shapes(config: &Value) -> Vec<(String, Vec<usize>)> {
    let (vocab, width) = (size(config, "vocab_size"), size(config, "n_embd"));
    let inner = config["n_inner"].as_u64().map_or(4 * width, |n| n as usize);
    let mut shapes = vec![
        ("transformer.wte.weight".to_string(), vec![vocab, width]),
        ("transformer.wpe.weight".to_string(), vec![size(config, "n_positions"), width]),
    ];
    let mut with_bias = |name: String, shape: Vec<usize>| {
        shapes.push((format!("{name}.bias"), vec![shape[shape.len() - 1]]));
        shapes.push((format!("{name}.weight"), shape));
    };
    for layer in 0..size(config, "n_layer") {
        for (name, shape) in [
            ("ln_1", vec![width]),
            ("attn.c_attn", vec![width, 3 * width]),
            ("attn.c_proj", vec![width, width]),
            ("ln_2", vec![width]),
            ("mlp.c_fc", vec![width, inner]),
            ("mlp.c_proj", vec![inner, width]),
        ] {
            with_bias(format!("transformer.h.{layer}.{name}"), shape);
        }
    }
    with_bias("transformer.ln_f".to_string(), vec![width]);
    if config["tie_word_embeddings"] == json!(false) {
        shapes.push(("lm_head.weight".to_string(), vec![vocab, width]));
    }
    shapes
}

/// With the head of its training, which nothing reads.
fn bert_shapes(config: &Value) -> Vec<(String, Vec<usize>)> {
    let (hidden, intermediate) = (size(config, "hidden_size"), size(config, "intermediate_size"));
    let mut shapes = Vec::new();
    for (name, field) in [
        ("word_embeddings", "vocab_size"),
        ("position_embeddings", "max_position_embeddings"),
        ("token_type_embeddings", "type_vocab_size"),
    ] {
        shapes.push((format!("embeddings.{name}.weight"), vec![size(config, field), hidden]));
    }
    let mut with_bias = |name: String, shape: Vec<usize>| {
        shapes.push((format!("{name}.bias"), vec![shape[0]]));
        shapes.push((format!("{name}.weight"), shape));
    };
    with_bias("embeddings.LayerNorm".to_string(), vec![hidden]);
    for layer in 0..size(config, "num_hidden_layers") {
        for (name, shape) in [
            ("attention.self.query", vec![hidden, hidden]),
            ("attention.self.key", vec![hidden, hidden]),
            ("attention.self.value", vec![hidden, hidden]),
            ("attention.output.dense", vec![hidden, hidden]),
            ("attention.output.LayerNorm", vec![hidden]),
            ("intermediate.dense", vec![intermediate, hidden]),
            ("output.dense", vec![hidden, intermediate]),
            ("output.LayerNorm", vec![hidden]),
        ] {
            with_bias(format!("encoder.layer.{layer}.{name}"), shape);
        }
    }
    with_bias("pooler.dense".to_string(), vec![hidden, hidden]);
    shapes
}

fn llama_shapes(config: &Value, architecture: &str) -> Vec<(String, Vec<usize>)> {
    let size = |field: &str| size(config, field);
    let flag = |field: &str| config[field].as_bool().unwrap_or(false);
    let (hidden, intermediate, vocab) = (size("hidden_size"), size("intermediate_size"), size("vocab_size"));
    let heads = size("num_attention_heads");
    let head_dim = config["head_dim"].as_u64().map_or(hidden / heads, |n| n as usize);
    let (q, kv) = (heads * head_dim, size("num_key_value_heads") * head_dim);
    let is_qwen2 = architecture == "Qwen2ForCausalLM";
    let (qkv_bias, o_bias, mlp_bias) = (is_qwen2 || flag("attention_bias"), flag("attention_bias"), flag("mlp_bias"));

    let mut shapes = vec![("model.embed_tokens.weight".to_string(), vec![vocab, hidden])];
    for layer in 0..size("num_hidden_layers") {
        let mut norm = |name: &str, width| shapes.push((format!("model.layers.{layer}.{name}.weight"), vec![width]));
        norm("input_layernorm", hidden);
        norm("post_attention_layernorm", hidden);
        if architecture == "Qwen3ForCausalLM" {
            norm("self_attn.q_norm", head_dim);
            norm("self_attn.k_norm", head_dim);
        }
        for (name, out, width, bias) in [
            ("self_attn.q_proj", q, hidden, qkv_bias),
            ("self_attn.k_proj", kv, hidden, qkv_bias),
            ("self_attn.v_proj", kv, hidden, qkv_bias),
            ("self_attn.o_proj", hidden, q, o_bias),
            ("mlp.gate_proj", intermediate, hidden, mlp_bias),
            ("mlp.up_proj", intermediate, hidden, mlp_bias),
            ("mlp.down_proj", hidden, intermediate, mlp_bias),
        ] {
            shapes.push((format!("model.layers.{layer}.{name}.weight"), vec![out, width]));
            shapes.extend(bias.then(|| (format!("model.layers.{layer}.{name}.bias"), vec![out])));
        }
    }
    shapes.push(("model.norm.weight".to_string(), vec![hidden]));
    shapes.extend((!flag("tie_word_embeddings")).then(|| ("lm_head.weight".to_string(), vec![vocab, hidden])));
    shapes
}

fn tensor_values(name: &str, count: usize) -> Box<dyn Iterator<Item = f32>> {
    let draws = draws(name).take(count);
    let is_one_of = |ends: &[&str]| ends.iter().any(|end| name.ends_with(end));
    if is_one_of(&["norm.weight", "Norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight"]) {
        Box::new(draws.map(|u| 1.0 + u / 8.0))
    } else if name.ends_with(".bias") {
        Box::new(draws.map(|u| u / 8.0))
    } else if is_one_of(&["embed_tokens.weight", "wte.weight", "word_embeddings.weight"]) {
        Box::new(draws)
    } else {
        Box::new(draws.map(|u| u / 4.0))
    }
}

/// Uniform numbers of [-1, 1): SplitMix64 (Steele et al. 2014) of the FNV-1a hash of `name` plus the index.
fn draws(name: &str) -> impl Iterator<Item = f32> + use<> {
    let hash = |key: u64, byte: u8| (key ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01B3);
    let key = name.bytes().fold(0xCBF2_9CE4_8422_2325, hash);
    (1..).map(move |index: u64| {
        let z = key.wrapping_add(index).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 40) as f32 / (1 << 23) as f32 - 1.0
    })
}
