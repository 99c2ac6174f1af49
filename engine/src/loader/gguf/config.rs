//! The hyperparameters of a GGUF file, said as `config.json` says them: one table of keys, and what only the tensors
//! tell (a tied output matrix, biases, the size of the vocabulary, llama's stretched frequencies). Errors about a
//! field name the key that it came from.

#![deny(clippy::arithmetic_side_effects, clippy::indexing_slicing)]

use std::collections::BTreeMap;

use serde_json::{Map, Value as Json, json};

use super::metadata::{self, Metadata};
use super::rope_factors::Stretching;
use super::vocabulary;
use crate::error::{Error, Result};
use crate::loader::JsonFile;
use crate::loader::stored::StoredTensor;

/// Architectures of the format that can be run. What the format calls `llama` includes Mistral.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Architecture {
    Llama,
    Qwen2,
    Qwen3,
}

const SUPPORTED: &str = "llama, qwen2, qwen3";

/// Keys below the architecture's name, and the fields of `config.json` that they are.
const FIELDS: &[(&str, &str)] = &[
    ("vocab_size", "vocab_size"),
    ("context_length", "max_position_embeddings"),
    ("embedding_length", "hidden_size"),
    ("feed_forward_length", "intermediate_size"),
    ("block_count", "num_hidden_layers"),
    ("attention.head_count", "num_attention_heads"),
    ("attention.head_count_kv", "num_key_value_heads"),
    ("attention.key_length", "head_dim"),
    ("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
    ("attention.sliding_window", "sliding_window"),
    ("rope.freq_base", "rope_theta"),
    ("rope.scaling.type", "rope_scaling.rope_type"),
    ("rope.scaling.factor", "rope_scaling.factor"),
];

/// Keys that must not say anything but nothing: each changes what the model computes in a way that is not built.
const REFUSED: &[&str] =
    &["expert_count", "rope.scale_linear", "attention.clamp_kqv", "attention.max_alibi_bias", "logit_scale"];

impl Architecture {
    pub(super) fn of(metadata: &Metadata) -> Result<Architecture> {
        let name = metadata.string("general.architecture")?;
        match name.ok_or_else(|| metadata::error("general.architecture", "is missing"))? {
            "llama" => Ok(Architecture::Llama),
            "qwen2" => Ok(Architecture::Qwen2),
            "qwen3" => Ok(Architecture::Qwen3),
            other => Err(Error::UnknownArchitecture { name: other.to_string(), supported: SUPPORTED }),
        }
    }

    /// What its keys begin with.
    pub(super) fn key(self, suffix: &str) -> String {
        let name = match self {
            Architecture::Llama => "llama",
            Architecture::Qwen2 => "qwen2",
            Architecture::Qwen3 => "qwen3",
        };
        format!("{name}.{suffix}")
    }
}

/// `config.json` of the model. `tensors` are those of all its files, by the names that models have for them.
pub(super) fn model_config(
    metadata: &Metadata,
    tensors: &BTreeMap<&str, &StoredTensor>,
    stretching: Option<Stretching>,
) -> Result<JsonFile> {
    let architecture = Architecture::of(metadata)?;
    refuse_unbuilt(metadata, architecture)?;
    let mut config = Translation::default();
    for &(suffix, field) in FIELDS {
        let key = architecture.key(suffix);
        config.set(field, metadata.json(&key)?, key);
    }
    for (key, field) in
        [("tokenizer.ggml.bos_token_id", "bos_token_id"), ("tokenizer.ggml.eos_token_id", "eos_token_id")]
    {
        config.set(field, metadata.json(key)?, key.to_string());
    }
    let has = |name: &str| tensors.contains_key(name);
    // Embeddings may have more rows than there are tokens; models go by the rows.
    if let Some(&[rows, _]) = tensors.get("model.embed_tokens.weight").map(|tensor| tensor.shape.as_slice()) {
        vocabulary::fits(metadata, rows)?;
        config.fields.insert("vocab_size".to_string(), json!(rows));
    }
    let class = match architecture {
        Architecture::Llama if config.fields.contains_key("sliding_window") => "MistralForCausalLM",
        Architecture::Llama => "LlamaForCausalLM",
        Architecture::Qwen2 => "Qwen2ForCausalLM",
        Architecture::Qwen3 => "Qwen3ForCausalLM",
    };
    config.fields.insert("architectures".to_string(), json!([class]));
    // Unlike Qwen3's `config.json`, the format's own default is always the even share.
    config.fields.entry("head_dim").or_insert(Json::Null);
    config.fields.insert("tie_word_embeddings".to_string(), json!(!has("lm_head.weight")));
    config.fields.insert("attention_bias".to_string(), json!(has("model.layers.0.self_attn.q_proj.bias")));
    config.fields.insert("mlp_bias".to_string(), json!(has("model.layers.0.mlp.gate_proj.bias")));
    config.scale_rope(architecture, stretching)?;
    for required in ["rms_norm_eps", "vocab_size"] {
        if !config.fields.contains_key(required) {
            return Err(metadata::error(config.key_of(required), "is missing"));
        }
    }
    Ok(JsonFile::translated(metadata::FILE, config.fields, config.names))
}

/// Fields, and the keys that errors about them name.
#[derive(Default)]
struct Translation {
    fields: Map<String, Json>,
    names: BTreeMap<String, String>,
}

impl Translation {
    fn set(&mut self, field: &str, value: Option<Json>, key: String) {
        self.names.insert(field.to_string(), key);
        let Some(value) = value else { return };
        match field.split_once('.') {
            None => {
                self.fields.insert(field.to_string(), value);
            }
            Some((object, field)) => {
                let object = self.fields.entry(object).or_insert_with(|| json!({}));
                object.as_object_mut().map(|object| object.insert(field.to_string(), value));
            }
        }
    }

    fn key_of<'a>(&'a self, field: &'a str) -> &'a str {
        self.names.get(field).map_or(field, String::as_str)
    }

    /// Says `rope_scaling` in the words of `config.json`.
    fn scale_rope(&mut self, architecture: Architecture, stretching: Option<Stretching>) -> Result<()> {
        let rope = self.fields.entry("rope_scaling").or_insert_with(|| json!({}));
        let Some(rope) = rope.as_object_mut() else { return Ok(()) };
        if rope.get("rope_type").is_some_and(|kind| kind == "none") {
            rope.insert("rope_type".to_string(), json!("default"));
        }
        let Some(Stretching { factor, low_freq_factor, high_freq_factor, original_positions }) = stretching else {
            return Ok(());
        };
        if rope.get("rope_type").is_some_and(|kind| kind != "default") {
            let key = architecture.key("rope.scaling.type");
            return Err(metadata::error(&key, "is set beside the tensor `rope_freqs.weight`; only one is supported"));
        }
        *rope = Map::from_iter([
            ("rope_type".to_string(), json!("llama3")),
            ("factor".to_string(), json!(factor)),
            ("low_freq_factor".to_string(), json!(low_freq_factor)),
            ("high_freq_factor".to_string(), json!(high_freq_factor)),
            ("original_max_position_embeddings".to_string(), json!(original_positions)),
        ]);
        Ok(())
    }
}

/// Fails where the file asks for something that would silently be left out.
fn refuse_unbuilt(metadata: &Metadata, architecture: Architecture) -> Result<()> {
    for suffix in REFUSED {
        let key = architecture.key(suffix);
        let value = metadata.json(&key)?;
        let is_nothing = |value: &Json| value.as_f64() == Some(0.0);
        if let Some(value) = value.filter(|value| !is_nothing(value)) {
            return Err(metadata::error(&key, format!("is {value}, which is not supported")));
        }
    }
    let window = architecture.key("attention.sliding_window");
    if architecture != Architecture::Llama && metadata.has(&window) {
        return Err(metadata::error(&window, "is set, which is not supported for this architecture"));
    }
    // The widths of a head's key, value and rotated part are one number here.
    let size = |suffix: &str| metadata.integer(&architecture.key(suffix), u32::MAX.into());
    let even_share = || {
        let hidden = size("embedding_length").ok().flatten()?;
        hidden.checked_div(size("attention.head_count").ok().flatten()?)
    };
    let head_dim = size("attention.key_length")?.or_else(even_share);
    for suffix in ["attention.value_length", "rope.dimension_count"] {
        match (size(suffix)?, head_dim) {
            (Some(other), Some(head_dim)) if other != head_dim => {
                let reason = format!("is {other}, a head's keys have {head_dim}: different widths are not supported");
                return Err(metadata::error(&architecture.key(suffix), reason));
            }
            _ => {}
        }
    }
    Ok(())
}
