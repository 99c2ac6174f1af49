//! GGUF files that tests build for themselves: any keys and tensors in any order, right or wrong, and the translation of a
//! small model of `tiny_model.rs` as converters do it.
#![allow(dead_code, reason = "each test program uses a part")]

use std::f64::consts::TAU;

use safetensors::Dtype;
use serde_json::Value as Json;

use crate::tiny_model::TensorData;

pub const DEFAULT_ALIGNMENT: usize = 32;

/// A file that is to be written.
#[derive(Clone)]
pub struct GgufFile {
    pub version: u32,
    /// What the header says, if not the truth.
    pub num_tensors: Option<u64>,
    pub num_keys: Option<u64>,
    pub keys: Vec<(Vec<u8>, Value)>,
    pub tensors: Vec<GgufTensor>,
    pub alignment: usize,
}

/// The number of a type, and the bytes of a value.
#[derive(Clone)]
pub struct Value {
    pub kind: u32,
    pub bytes: Vec<u8>,
}

#[derive(Clone)]
pub struct GgufTensor {
    pub name: Vec<u8>,
    /// Innermost axis first, as the file has them.
    pub sizes: Vec<u64>,
    pub kind: u32,
    pub data: Vec<u8>,
    /// What the header says of its place, if not the truth.
    pub offset: Option<u64>,
}

impl Value {
    pub fn new(kind: u32, bytes: impl Into<Vec<u8>>) -> Value {
        Value { kind, bytes: bytes.into() }
    }
    pub fn u32(value: u32) -> Value {
        Value::new(4, value.to_le_bytes())
    }
    pub fn i32(value: i32) -> Value {
        Value::new(5, value.to_le_bytes())
    }
    pub fn f32(value: f32) -> Value {
        Value::new(6, value.to_le_bytes())
    }
    pub fn bool(value: bool) -> Value {
        Value::new(7, [value.into()])
    }
    pub fn string(text: impl AsRef<[u8]>) -> Value {
        Value::new(8, string(text.as_ref()))
    }
    pub fn strings(texts: &[impl AsRef<[u8]>]) -> Value {
        Value::array(8, texts.len() as u64, texts.iter().flat_map(|text| string(text.as_ref())).collect())
    }
    pub fn i32s(values: &[i32]) -> Value {
        Value::array(5, values.len() as u64, values.iter().flat_map(|value| value.to_le_bytes()).collect())
    }
    pub fn f32s(values: &[f32]) -> Value {
        Value::array(6, values.len() as u64, values.iter().flat_map(|value| value.to_le_bytes()).collect())
    }
    /// An array that is said to have `len` entries of type `kind`.
    pub fn array(kind: u32, len: u64, items: Vec<u8>) -> Value {
        Value::new(9, [&kind.to_le_bytes()[..], &len.to_le_bytes(), &items].concat())
    }
}

/// Length and bytes.
pub fn string(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u64).to_le_bytes()[..], bytes].concat()
}

impl GgufFile {
    pub fn set(&mut self, key: &str, value: Value) {
        match self.keys.iter_mut().find(|(other, _)| other == key.as_bytes()) {
            Some((_, old)) => *old = value,
            None => self.keys.push((key.into(), value)),
        }
    }

    pub fn remove(&mut self, key: &str) {
        self.keys.retain(|(other, _)| other != key.as_bytes());
    }

    pub fn tensor(&mut self, name: &str) -> &mut GgufTensor {
        let found = self.tensors.iter_mut().find(|tensor| tensor.name == name.as_bytes());
        found.unwrap_or_else(|| panic!("no tensor {name}"))
    }

    /// The header, and the data of the tensors in their order.
    pub fn bytes(&self) -> Vec<u8> {
        let mut file = self.header();
        for tensor in &self.tensors {
            file.resize(file.len().next_multiple_of(self.alignment), 0);
            file.extend(&tensor.data);
        }
        file
    }

    pub fn header(&self) -> Vec<u8> {
        let mut file = b"GGUF".to_vec();
        file.extend(self.version.to_le_bytes());
        file.extend(self.num_tensors.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        file.extend(self.num_keys.unwrap_or(self.keys.len() as u64).to_le_bytes());
        for (key, value) in &self.keys {
            file.extend(string(key));
            file.extend(value.kind.to_le_bytes());
            file.extend(&value.bytes);
        }
        let mut offset = 0_usize;
        for tensor in &self.tensors {
            offset = offset.next_multiple_of(self.alignment);
            file.extend(string(&tensor.name));
            file.extend((tensor.sizes.len() as u32).to_le_bytes());
            tensor.sizes.iter().for_each(|size| file.extend(size.to_le_bytes()));
            file.extend(tensor.kind.to_le_bytes());
            file.extend(tensor.offset.unwrap_or(offset as u64).to_le_bytes());
            offset += tensor.data.len();
        }
        file
    }
}

/// The model of `config.json` and its tensors, as a converter writes it, with a vocabulary of three tokens.
pub fn converted(config: &Json, tensors: &[(String, TensorData)]) -> GgufFile {
    let mut file = GgufFile {
        version: 3,
        num_tensors: None,
        num_keys: None,
        keys: Vec::new(),
        tensors: Vec::new(),
        alignment: DEFAULT_ALIGNMENT,
    };
    let architecture = match config["architectures"][0].as_str().expect("one architecture") {
        "LlamaForCausalLM" | "MistralForCausalLM" => "llama",
        "Qwen2ForCausalLM" => "qwen2",
        "Qwen3ForCausalLM" => "qwen3",
        "GPT2LMHeadModel" => "gpt2",
        "BertModel" => "bert",
        other => panic!("no converter for {other}"),
    };
    file.set("general.architecture", Value::string(architecture));
    for (key, field) in [
        ("context_length", "n_positions"),
        ("embedding_length", "n_embd"),
        ("feed_forward_length", "n_inner"),
        ("block_count", "n_layer"),
        ("attention.head_count", "n_head"),
        ("context_length", "max_position_embeddings"),
        ("embedding_length", "hidden_size"),
        ("feed_forward_length", "intermediate_size"),
        ("block_count", "num_hidden_layers"),
        ("attention.head_count", "num_attention_heads"),
        ("attention.head_count_kv", "num_key_value_heads"),
        ("attention.key_length", "head_dim"),
        ("attention.value_length", "head_dim"),
        ("attention.sliding_window", "sliding_window"),
    ] {
        if let Some(value) = config[field].as_u64() {
            file.set(&format!("{architecture}.{key}"), Value::u32(value as u32));
        }
    }
    match architecture {
        "gpt2" | "bert" => {
            let (field, default) =
                if architecture == "bert" { ("layer_norm_eps", 1e-12) } else { ("layer_norm_epsilon", 1e-5) };
            let eps = config[field].as_f64().unwrap_or(default);
            file.set(&format!("{architecture}.attention.layer_norm_epsilon"), Value::f32(eps as f32));
        }
        _ => set_rotary(&mut file, architecture, config),
    }
    if architecture == "bert" {
        file.set("bert.attention.causal", Value::bool(false));
        file.set(
            "tokenizer.ggml.token_type_count",
            Value::u32(config["type_vocab_size"].as_u64().expect("a number") as u32),
        );
    }
    file.set("tokenizer.ggml.model", Value::string("gpt2"));
    file.set("tokenizer.ggml.pre", Value::string("gpt-2"));
    file.set("tokenizer.ggml.tokens", Value::strings(&["a", "b", "ab"]));
    file.set("tokenizer.ggml.token_type", Value::i32s(&[1, 1, 1]));
    file.set("tokenizer.ggml.merges", Value::strings(&["a b"]));
    file.set("tokenizer.ggml.eos_token_id", Value::u32(2));
    // Converters of BERT drop what only its training used.
    let kept = tensors.iter().filter(|(name, _)| !name.starts_with("pooler."));
    file.tensors.extend(kept.map(|(name, data)| tensor(config, architecture, name, data)));
    file
}

/// Norms and positions of Llama and its kin.
fn set_rotary(file: &mut GgufFile, architecture: &str, config: &Json) {
    let eps = config["rms_norm_eps"].as_f64().unwrap_or(1e-6);
    file.set(&format!("{architecture}.attention.layer_norm_rms_epsilon"), Value::f32(eps as f32));
    let rope = if config["rope_parameters"].is_object() { &config["rope_parameters"] } else { &config["rope_scaling"] };
    let theta = rope["rope_theta"].as_f64().or(config["rope_theta"].as_f64()).unwrap_or(10_000.0);
    file.set(&format!("{architecture}.rope.freq_base"), Value::f32(theta as f32));
    let number = |field: &str| rope[field].as_f64().expect("a number");
    match rope["rope_type"].as_str() {
        Some("linear") => {
            file.set(&format!("{architecture}.rope.scaling.type"), Value::string("linear"));
            file.set(&format!("{architecture}.rope.scaling.factor"), Value::f32(number("factor") as f32));
        }
        Some("llama3") => {
            let original = number("original_max_position_embeddings");
            let key = format!("{architecture}.rope.scaling.original_context_length");
            file.set(&key, Value::u32(original as u32));
            file.tensors.push(rope_factors(config, theta, [number("factor"), original]));
        }
        _ => {}
    }
}

fn tensor(config: &Json, architecture: &str, name: &str, data: &TensorData) -> GgufTensor {
    let heads = |field: &str| config[field].as_u64().expect("a number") as usize;
    let data_bytes = match name {
        _ if is_conv1d(name) => transposed(&data.bytes, &data.shape),
        _ if architecture != "llama" => data.bytes.clone(),
        _ if name.contains("q_proj") => interleaved(&data.bytes, data.shape[0], heads("num_attention_heads")),
        _ if name.contains("k_proj") => interleaved(&data.bytes, data.shape[0], heads("num_key_value_heads")),
        _ => data.bytes.clone(),
    };
    let kind = match data.dtype {
        Dtype::F32 => 0,
        Dtype::F16 => 1,
        Dtype::BF16 => 30,
        other => panic!("no converter for {other}"),
    };
    let mut sizes: Vec<u64> = data.shape.iter().rev().map(|&size| size as u64).collect();
    if is_conv1d(name) {
        sizes.reverse();
    }
    GgufTensor { name: file_name(architecture, name).into(), sizes, kind, data: data_bytes, offset: None }
}

/// GPT-2's matrices are stored the other way round.
fn is_conv1d(name: &str) -> bool {
    [".c_attn.weight", ".c_proj.weight", ".c_fc.weight"].iter().any(|end| name.ends_with(end))
}

fn transposed(bytes: &[u8], shape: &[usize]) -> Vec<u8> {
    let &[rows, columns] = shape else { panic!("no matrix: {shape:?}") };
    let size = bytes.len() / rows / columns;
    let element = |row: usize, column: usize| &bytes[(row * columns + column) * size..][..size];
    (0..columns).flat_map(|column| (0..rows).flat_map(move |row| element(row, column))).copied().collect()
}

/// Names as the format's converters write them. Longer ones come before those that end them.
fn file_name(architecture: &str, name: &str) -> String {
    let replaced: &[(&str, &str)] = match architecture {
        "gpt2" => &[
            ("transformer.", ""),
            ("h.", "blk."),
            ("wte", "token_embd"),
            ("wpe", "position_embd"),
            ("ln_f", "output_norm"),
            ("lm_head", "output"),
            ("ln_1", "attn_norm"),
            ("ln_2", "ffn_norm"),
            ("attn.c_attn", "attn_qkv"),
            ("attn.c_proj", "attn_output"),
            ("mlp.c_fc", "ffn_up"),
            ("mlp.c_proj", "ffn_down"),
        ],
        "bert" => &[
            ("encoder.layer.", "blk."),
            ("embeddings.word_embeddings", "token_embd"),
            ("embeddings.position_embeddings", "position_embd"),
            ("embeddings.token_type_embeddings", "token_types"),
            ("embeddings.LayerNorm", "token_embd_norm"),
            ("attention.self.query", "attn_q"),
            ("attention.self.key", "attn_k"),
            ("attention.self.value", "attn_v"),
            ("attention.output.dense", "attn_output"),
            ("attention.output.LayerNorm", "attn_output_norm"),
            ("intermediate.dense", "ffn_up"),
            ("output.dense", "ffn_down"),
            ("output.LayerNorm", "layer_output_norm"),
        ],
        _ => &[
            ("model.layers.", "blk."),
            ("model.embed_tokens", "token_embd"),
            ("model.norm", "output_norm"),
            ("lm_head", "output"),
            ("input_layernorm", "attn_norm"),
            ("post_attention_layernorm", "ffn_norm"),
            ("self_attn.q_proj", "attn_q"),
            ("self_attn.k_proj", "attn_k"),
            ("self_attn.v_proj", "attn_v"),
            ("self_attn.o_proj", "attn_output"),
            ("self_attn.q_norm", "attn_q_norm"),
            ("self_attn.k_norm", "attn_k_norm"),
            ("mlp.gate_proj", "ffn_gate"),
            ("mlp.up_proj", "ffn_up"),
            ("mlp.down_proj", "ffn_down"),
        ],
    };
    replaced.iter().fold(name.to_string(), |name, (from, to)| name.replace(from, to))
}

/// Rows `[heads, 2, half, width]` as `[heads, half, 2, width]`.
fn interleaved(bytes: &[u8], rows: usize, heads: usize) -> Vec<u8> {
    let (width, half) = (bytes.len() / rows, rows / heads / 2);
    let row = |head: usize, i: usize, which: usize| {
        let row = (head * 2 + which) * half + i;
        &bytes[row * width..(row + 1) * width]
    };
    let order = (0..heads).flat_map(|head| (0..half).flat_map(move |i| [0, 1].map(|which| (head, i, which))));
    order.flat_map(|(head, i, which)| row(head, i, which)).copied().collect()
}

/// By what the frequencies are divided, with the two turning points of Llama 3.1: 1 and 4 turns in the original context.
fn rope_factors(config: &Json, theta: f64, [factor, original]: [f64; 2]) -> GgufTensor {
    let size = |field: &str| config[field].as_u64().expect("a number") as usize;
    let head_dim =
        config["head_dim"].as_u64().map_or_else(|| size("hidden_size") / size("num_attention_heads"), |n| n as usize);
    let divisor = |i: usize| {
        let wavelength = TAU * theta.powf(i as f64 / head_dim as f64);
        if wavelength < original / 4.0 {
            1.0
        } else if wavelength > original {
            factor
        } else {
            let smooth = (original / wavelength - 1.0) / 3.0;
            1.0 / ((1.0 - smooth) / factor + smooth)
        }
    };
    let data: Vec<u8> = (0..head_dim).step_by(2).flat_map(|i| (divisor(i) as f32).to_le_bytes()).collect();
    GgufTensor { name: "rope_freqs.weight".into(), sizes: vec![data.len() as u64 / 4], kind: 0, data, offset: None }
}
