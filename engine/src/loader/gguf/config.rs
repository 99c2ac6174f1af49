//! The hyperparameters of a GGUF file, said as `config.json` says them: one table of keys, and what only the tensors
//! tell (a tied output matrix, biases, the size of the vocabulary, llama's stretched frequencies). Errors about a
//! field name the key that it came from. The form of GELU is in no key: GPT-2's and BERT's are those of their classes.

#![deny(clippy::arithmetic_side_effects, clippy::indexing_slicing)]

use std::collections::BTreeMap;

use serde_json::{Map, Value as Json, json};

use super::metadata::{self, Metadata};
use super::rope_factors::Stretching;
use super::vocabulary;
use crate::error::{Error, Result};
use crate::loader::stored::StoredTensor;
use crate::loader::{JsonFile, PoolingMode, SentenceConfig};

/// Architectures of the format that can be run. What the format calls `llama` includes Mistral.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Architecture {
    Llama,
    Qwen2,
    Qwen3,
    Gpt2,
    Bert,
}

const SUPPORTED: &str = "llama, qwen2, qwen3, gpt2, bert";

/// Keys below the architecture's name, and the fields of `config.json` that they are.
type Fields = &'static [(&'static str, &'static str)];

/// Of Llama and its kin.
const FIELDS: Fields = &[
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

const GPT2_FIELDS: Fields = &[
    ("vocab_size", "vocab_size"),
    ("context_length", "n_positions"),
    ("embedding_length", "n_embd"),
    ("feed_forward_length", "n_inner"),
    ("block_count", "n_layer"),
    ("attention.head_count", "n_head"),
    ("attention.layer_norm_epsilon", "layer_norm_epsilon"),
];

const BERT_FIELDS: Fields = &[
    ("vocab_size", "vocab_size"),
    ("context_length", "max_position_embeddings"),
    ("embedding_length", "hidden_size"),
    ("feed_forward_length", "intermediate_size"),
    ("block_count", "num_hidden_layers"),
    ("attention.head_count", "num_attention_heads"),
    ("attention.layer_norm_epsilon", "layer_norm_eps"),
];

/// How many kinds of token types an encoder has; not below the architecture's name.
const TOKEN_TYPE_COUNT: &str = "tokenizer.ggml.token_type_count";

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
            "gpt2" => Ok(Architecture::Gpt2),
            "bert" => Ok(Architecture::Bert),
            other => Err(Error::UnknownArchitecture { name: other.to_string(), supported: SUPPORTED }),
        }
    }

    /// What its keys begin with.
    pub(super) fn key(self, suffix: &str) -> String {
        let name = match self {
            Architecture::Llama => "llama",
            Architecture::Qwen2 => "qwen2",
            Architecture::Qwen3 => "qwen3",
            Architecture::Gpt2 => "gpt2",
            Architecture::Bert => "bert",
        };
        format!("{name}.{suffix}")
    }

    /// Whether it is one of Llama and its kin: rotary positions, heads that may share keys.
    fn is_kin_of_llama(self) -> bool {
        !matches!(self, Architecture::Gpt2 | Architecture::Bert)
    }

    fn fields(self) -> Fields {
        match self {
            Architecture::Llama | Architecture::Qwen2 | Architecture::Qwen3 => FIELDS,
            Architecture::Gpt2 => GPT2_FIELDS,
            Architecture::Bert => BERT_FIELDS,
        }
    }

    /// Name of the embedding of tokens, and the field of the number that norms add.
    fn embedding_and_eps(self) -> (&'static str, &'static str) {
        match self {
            Architecture::Llama | Architecture::Qwen2 | Architecture::Qwen3 => {
                ("model.embed_tokens.weight", "rms_norm_eps")
            }
            Architecture::Gpt2 => ("wte.weight", "layer_norm_epsilon"),
            Architecture::Bert => ("embeddings.word_embeddings.weight", "layer_norm_eps"),
        }
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
    for &(suffix, field) in architecture.fields() {
        let key = architecture.key(suffix);
        config.set(field, metadata.json(&key)?, key);
    }
    for (key, field) in
        [("tokenizer.ggml.bos_token_id", "bos_token_id"), ("tokenizer.ggml.eos_token_id", "eos_token_id")]
    {
        config.set(field, metadata.json(key)?, key.to_string());
    }
    let rows = |name: &str| match tensors.get(name)?.shape.as_slice() {
        &[rows, _] => Some(rows),
        _ => None,
    };
    let (embedding, eps) = architecture.embedding_and_eps();
    // Embeddings may have more rows than there are tokens; models go by the rows.
    if let Some(rows) = rows(embedding) {
        vocabulary::fits(metadata, rows)?;
        config.fields.insert("vocab_size".to_string(), json!(rows));
    }
    let has = |name: &str| tensors.contains_key(name);
    let class = match architecture {
        Architecture::Llama if config.fields.contains_key("sliding_window") => "MistralForCausalLM",
        Architecture::Llama => "LlamaForCausalLM",
        Architecture::Qwen2 => "Qwen2ForCausalLM",
        Architecture::Qwen3 => "Qwen3ForCausalLM",
        Architecture::Gpt2 => "GPT2LMHeadModel",
        Architecture::Bert => "BertModel",
    };
    config.fields.insert("architectures".to_string(), json!([class]));
    config.fields.insert("tie_word_embeddings".to_string(), json!(!has("lm_head.weight")));
    if architecture.is_kin_of_llama() {
        // Unlike Qwen3's `config.json`, the format's own default is always the even share.
        config.fields.entry("head_dim").or_insert(Json::Null);
        config.fields.insert("attention_bias".to_string(), json!(has("model.layers.0.self_attn.q_proj.bias")));
        config.fields.insert("mlp_bias".to_string(), json!(has("model.layers.0.mlp.gate_proj.bias")));
        config.scale_rope(architecture, stretching)?;
    }
    if architecture == Architecture::Bert {
        let counted = metadata.json(TOKEN_TYPE_COUNT)?;
        let counted = counted.or_else(|| rows("embeddings.token_type_embeddings.weight").map(Json::from));
        config.set("type_vocab_size", counted, TOKEN_TYPE_COUNT.to_string());
    }
    for required in [eps, "vocab_size"] {
        if !config.fields.contains_key(required) {
            return Err(metadata::error(config.key_of(required), "is missing"));
        }
    }
    Ok(JsonFile::translated(metadata::FILE, config.fields, config.names))
}

/// What the files of sentence-transformers would say: how states become a vector.
pub(super) fn sentence_config(metadata: &Metadata) -> Result<SentenceConfig> {
    let key = Architecture::of(metadata)?.key("pooling_type");
    let pooling = match metadata.integer(&key, u32::MAX.into())? {
        None | Some(0) => None,
        Some(1) => Some(PoolingMode::MeanTokens),
        Some(2) => Some(PoolingMode::ClsToken),
        Some(3) => Some(PoolingMode::LastToken),
        Some(other) => {
            let reason = format!("is {other}, which is not supported (supported: 0 none, 1 mean, 2 cls, 3 last)");
            return Err(metadata::error(&key, reason));
        }
    };
    Ok(SentenceConfig { pooling, ..SentenceConfig::default() })
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
    let (causal, is_encoder) = (architecture.key("attention.causal"), architecture == Architecture::Bert);
    match metadata.boolean(&causal)? {
        Some(value) if value == is_encoder => {
            return Err(metadata::error(&causal, format!("is {value}, which is not supported for this architecture")));
        }
        _ => {}
    }
    refuse_uneven_heads(metadata, architecture)
}

/// The widths of a head's key, value and rotated part are one number here; in GPT-2 and BERT that is the even share,
/// and each head has keys of its own.
fn refuse_uneven_heads(metadata: &Metadata, architecture: Architecture) -> Result<()> {
    let size = |suffix: &str| metadata.integer(&architecture.key(suffix), u32::MAX.into());
    // What is missing or no number here is refused with the configuration.
    let number = |suffix: &str| metadata.json(&architecture.key(suffix)).ok().flatten()?.as_u64();
    let heads = number("attention.head_count");
    let even_share = || number("embedding_length")?.checked_div(heads?);
    let head_dim = match architecture.is_kin_of_llama() {
        true => size("attention.key_length")?.or_else(even_share),
        false => even_share(),
    };
    for suffix in ["attention.key_length", "attention.value_length", "rope.dimension_count"] {
        match (size(suffix)?, head_dim) {
            (Some(other), Some(head_dim)) if other != head_dim => {
                let reason = format!("is {other}, a head's keys have {head_dim}: different widths are not supported");
                return Err(metadata::error(&architecture.key(suffix), reason));
            }
            _ => {}
        }
    }
    let kv_heads = metadata.json(&architecture.key("attention.head_count_kv"))?;
    match kv_heads {
        Some(kv_heads) if !architecture.is_kin_of_llama() && heads.is_some() && kv_heads.as_u64() != heads => {
            let reason = format!("is {kv_heads}, which is not supported for this architecture: heads share no keys");
            Err(metadata::error(&architecture.key("attention.head_count_kv"), reason))
        }
        _ => Ok(()),
    }
}
