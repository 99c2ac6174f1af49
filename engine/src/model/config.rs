//! Hyperparameters of a model, from its `config.json`. Every value is checked here, against its own range and against
//! the others: a configuration that no kernel could run is refused when the model is opened, never at its first token.
//! Defaults are those of the classes that the architectures' names stand for. Each family with names of its own has a file
//! of its own; this one has those of Llama and its kin.

mod bert;
mod gpt2;
mod identity;

use crate::backend::{Gelu, KvDtype, KvLayout};
use crate::config::MAX_EOS_TOKENS;
use crate::error::{Error, Result};
use crate::loader::{JsonFile, JsonObject};

/// Architectures that can be run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// `LlamaForCausalLM`
    Llama,
    /// `MistralForCausalLM`
    Mistral,
    /// `Qwen2ForCausalLM`
    Qwen2,
    /// `Qwen3ForCausalLM`
    Qwen3,
    /// `GPT2LMHeadModel`
    Gpt2,
    /// `BertModel`, also out of a `BertForMaskedLM`
    Bert,
}

impl Architecture {
    const ALL: [Architecture; 6] = [
        Architecture::Llama,
        Architecture::Mistral,
        Architecture::Qwen2,
        Architecture::Qwen3,
        Architecture::Gpt2,
        Architecture::Bert,
    ];
    const SUPPORTED: &'static str = "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, \
                                     GPT2LMHeadModel, BertModel, BertForMaskedLM";

    fn from_name(name: &str) -> Option<Architecture> {
        match name {
            "BertForMaskedLM" => Some(Architecture::Bert),
            name => Architecture::ALL.into_iter().find(|architecture| architecture.name() == name),
        }
    }

    /// As in `config.json`.
    pub fn name(self) -> &'static str {
        match self {
            Architecture::Llama => "LlamaForCausalLM",
            Architecture::Mistral => "MistralForCausalLM",
            Architecture::Qwen2 => "Qwen2ForCausalLM",
            Architecture::Qwen3 => "Qwen3ForCausalLM",
            Architecture::Gpt2 => "GPT2LMHeadModel",
            Architecture::Bert => "BertModel",
        }
    }

    /// Whether it predicts a next token; one that does not turns texts into vectors alone.
    pub fn can_generate(self) -> bool {
        self != Architecture::Bert
    }
}

/// Hyperparameters, named as in `config.json`. Immutable after [`ModelConfig::from_json`] has checked them.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Which model it is.
    pub architecture: Architecture,
    /// Rows of the embedding; token ids are below it.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside the feed-forward.
    pub intermediate_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; divides `num_attention_heads` (Ainslie et al. 2023, arXiv:2305.13245).
    pub num_key_value_heads: usize,
    /// Width of a head; even where positions are rotary.
    pub head_dim: usize,
    /// Longest sequence that the model was made for, tokens.
    pub max_position_embeddings: usize,
    /// Added to the mean square or the variance inside a norm: `rms_norm_eps`, `layer_norm_epsilon`, `layer_norm_eps`.
    pub norm_eps: f32,
    /// In the feed-forward: `hidden_act`, `activation_function`.
    pub activation: Activation,
    /// Rotary position embedding; `None`: positions are learned (GPT-2, BERT).
    pub rope: Option<RopeConfig>,
    /// Rows of the embedding of token types (BERT); 0: there is none.
    pub type_vocab_size: usize,
    /// For each layer, how many tokens back it sees, itself included; `None`: all.
    pub sliding_windows: Vec<Option<usize>>,
    /// Whether the output matrix is the embedding.
    pub tie_word_embeddings: bool,
    /// Whether q, k, v and o have biases (Llama, Qwen3; Qwen2 always has them on q, k and v alone).
    pub attention_bias: bool,
    /// Whether gate, up and down have biases (Llama).
    pub mlp_bias: bool,
    /// Begins a sequence, if the model has such a token.
    pub bos_token_id: Option<u32>,
    /// End an answer.
    pub eos_token_ids: Vec<u32>,
}

/// The function in a feed-forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `silu(gate) * up`, between three matrices.
    SwiGlu,
    /// Between two matrices.
    Gelu(Gelu),
}

/// Rotary position embedding (Su et al. 2021, arXiv:2104.09864).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub rope_theta: f64,
    /// How the frequencies were stretched for a longer context.
    pub scaling: RopeScaling,
}

/// How frequencies are changed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    Default,
    /// All are divided by `factor` (Chen et al. 2023, arXiv:2306.15595).
    Linear {
        /// At least 1.
        factor: f64,
    },
    /// Low ones are divided by `factor`, high ones stay, those between are blended (Llama 3.1, arXiv:2407.21783).
    Llama3 {
        /// At least 1.
        factor: f64,
        /// Wavelengths beyond `original_max_position_embeddings / low_freq_factor` are low.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_position_embeddings / high_freq_factor` are high.
        high_freq_factor: f64,
        /// Context of the first training, tokens.
        original_max_position_embeddings: usize,
    },
}

// What a configuration may ask for: far above every published model, low enough that no product of two wraps.
const MAX_VOCAB_SIZE: usize = 1 << 24;
const MAX_HIDDEN_SIZE: usize = 1 << 16;
const MAX_INTERMEDIATE_SIZE: usize = 1 << 20;
const MAX_LAYERS: usize = 1024;
const MAX_HEADS: usize = 1024;
const MAX_HEAD_DIM: usize = 512;
const MAX_POSITIONS: usize = 1 << 24;
const MAX_ROPE_FACTOR: f64 = 1e6;

impl ModelConfig {
    /// Reads and checks `config.json`.
    pub fn from_json(file: &JsonFile) -> Result<ModelConfig> {
        let root = &file.object();
        match architecture(root)? {
            Architecture::Gpt2 => gpt2::read(root),
            Architecture::Bert => bert::read(root),
            architecture => ModelConfig::read(root, architecture),
        }
    }

    /// Llama and its kin.
    fn read(root: &JsonObject<'_>, architecture: Architecture) -> Result<ModelConfig> {
        let size = |field: &str, max: usize| root.required(field, root.size(field, 1..=max)?);
        let flag = |field: &str| Ok(root.boolean(field)?.unwrap_or(false));
        let num_hidden_layers = size("num_hidden_layers", MAX_LAYERS)?;
        let vocab_size = size("vocab_size", MAX_VOCAB_SIZE)?;
        let max_position_embeddings = size("max_position_embeddings", MAX_POSITIONS)?;
        let heads = attention_heads(root, architecture)?;
        activation_is_silu(root)?;
        Ok(ModelConfig {
            architecture,
            vocab_size,
            hidden_size: size("hidden_size", MAX_HIDDEN_SIZE)?,
            intermediate_size: size("intermediate_size", MAX_INTERMEDIATE_SIZE)?,
            num_hidden_layers,
            num_attention_heads: heads.num_attention_heads,
            num_key_value_heads: heads.num_key_value_heads,
            head_dim: heads.head_dim,
            max_position_embeddings,
            norm_eps: norm_eps(root, "rms_norm_eps", 1e-6)?,
            activation: Activation::SwiGlu,
            rope: Some(RopeConfig::from_json(root, max_position_embeddings)?),
            type_vocab_size: 0,
            sliding_windows: sliding_windows(root, architecture, num_hidden_layers)?,
            tie_word_embeddings: flag("tie_word_embeddings")?,
            attention_bias: matches!(architecture, Architecture::Llama | Architecture::Qwen3)
                && flag("attention_bias")?,
            mlp_bias: architecture == Architecture::Llama && flag("mlp_bias")?,
            bos_token_id: root.token_ids("bos_token_id", vocab_size, 1)?.first().copied(),
            eos_token_ids: root.token_ids("eos_token_id", vocab_size, MAX_EOS_TOKENS)?,
        })
    }

    /// Numbers in the matrices of all layers: what is multiplied with every token of a prompt.
    pub fn num_layer_parameters(&self) -> u64 {
        let hidden = self.hidden_size as u64;
        let heads = (2 * self.num_attention_heads + 2 * self.num_key_value_heads) as u64 * self.head_dim as u64;
        let feed_forward = match self.activation {
            Activation::SwiGlu => 3 * self.intermediate_size as u64,
            Activation::Gelu(_) => 2 * self.intermediate_size as u64,
        };
        self.num_hidden_layers as u64 * hidden * (heads + feed_forward)
    }

    /// The form of GELU in the feed-forward of GPT-2 and BERT.
    pub fn gelu(&self) -> Gelu {
        match self.activation {
            Activation::Gelu(gelu) => gelu,
            Activation::SwiGlu => unreachable!("GPT-2's and BERT's configurations have a GELU"),
        }
    }

    /// Whether that form is the one of the architecture's own class, which holds where nothing is said.
    pub fn has_gelu_of_its_class(&self) -> bool {
        let of_class = if self.architecture == Architecture::Gpt2 { Gelu::Tanh } else { Gelu::Erf };
        self.gelu() == of_class
    }

    /// Sizes of a pool of `num_blocks` KV blocks of `block_tokens` tokens each.
    pub fn kv_layout(&self, num_blocks: usize, block_tokens: usize, dtype: KvDtype) -> KvLayout {
        KvLayout {
            num_layers: self.num_hidden_layers,
            num_blocks,
            block_tokens,
            num_kv_heads: self.num_key_value_heads,
            head_dim: self.head_dim,
            dtype,
        }
    }
}

fn architecture(root: &JsonObject<'_>) -> Result<Architecture> {
    let names = root.required("architectures", root.array("architectures")?)?;
    let [name] = names else {
        return Err(root.error("architectures", format!("has {} entries, must have one", names.len())));
    };
    let name = name.as_str().ok_or_else(|| root.error("architectures", "has an entry that is no string"))?;
    Architecture::from_name(name)
        .ok_or_else(|| Error::UnknownArchitecture { name: name.to_string(), supported: Architecture::SUPPORTED })
}

fn norm_eps(root: &JsonObject<'_>, field: &str, default: f64) -> Result<f32> {
    Ok(root.number(field, 1e-12..=1e-1)?.unwrap_or(default) as f32)
}

/// Width of each of `num_heads` heads that share `width`, by the names of the fields that hold these.
fn split_width(
    root: &JsonObject<'_>,
    (heads, num_heads): (&str, usize),
    (field, width): (&str, usize),
) -> Result<usize> {
    match width.is_multiple_of(num_heads) {
        true => Ok(width / num_heads),
        false => Err(root.error(heads, format!("is {num_heads}, must divide {field}, which is {width}"))),
    }
}

/// The form of GELU that `field` names.
fn gelu(root: &JsonObject<'_>, field: &str, default: Gelu) -> Result<Activation> {
    let form = match root.string(field)? {
        None => default,
        Some("gelu") => Gelu::Erf,
        // One formula, written in three ways.
        Some("gelu_new" | "gelu_fast" | "gelu_pytorch_tanh") => Gelu::Tanh,
        Some(other) => {
            let supported = "gelu, gelu_new, gelu_fast, gelu_pytorch_tanh";
            return Err(root.error(field, format!("is {other:?}, which is not supported (supported: {supported})")));
        }
    };
    Ok(Activation::Gelu(form))
}

/// Fails when the flag `field` is set otherwise than `expected`, which is also what an unset one means.
fn expect_flag(root: &JsonObject<'_>, field: &str, expected: bool) -> Result<()> {
    match root.boolean(field)? {
        Some(value) if value != expected => Err(root.error(field, format!("is {value}, which is not supported"))),
        _ => Ok(()),
    }
}

struct Heads {
    num_attention_heads: usize,
    num_key_value_heads: usize,
    head_dim: usize,
}

fn attention_heads(root: &JsonObject<'_>, architecture: Architecture) -> Result<Heads> {
    let num_attention_heads = root.required("num_attention_heads", root.size("num_attention_heads", 1..=MAX_HEADS)?)?;
    let num_key_value_heads = root.size("num_key_value_heads", 1..=MAX_HEADS)?.unwrap_or(num_attention_heads);
    if !num_attention_heads.is_multiple_of(num_key_value_heads) {
        let reason =
            format!("is {num_key_value_heads}, must divide num_attention_heads, which is {num_attention_heads}");
        return Err(root.error("num_key_value_heads", reason));
    }
    let head_dim = match root.size("head_dim", 1..=MAX_HEAD_DIM)? {
        Some(head_dim) => head_dim,
        None if architecture == Architecture::Qwen3 && !root.has("head_dim") => 128,
        None => {
            let hidden_size = root.required("hidden_size", root.size("hidden_size", 1..=MAX_HIDDEN_SIZE)?)?;
            let heads = ("num_attention_heads", num_attention_heads);
            split_width(root, heads, ("hidden_size", hidden_size))?
        }
    };
    if !head_dim.is_multiple_of(2) || head_dim > MAX_HEAD_DIM {
        let reason =
            format!("is {head_dim}, must be even (rotary embedding pairs its dimensions) and at most {MAX_HEAD_DIM}");
        return Err(root.error("head_dim", reason));
    }
    Ok(Heads { num_attention_heads, num_key_value_heads, head_dim })
}

fn activation_is_silu(root: &JsonObject<'_>) -> Result<()> {
    match root.string("hidden_act")? {
        None | Some("silu") => Ok(()),
        Some(other) => Err(root.error("hidden_act", format!("is {other:?}, must be \"silu\""))),
    }
}

/// Mistral: `sliding_window` for every layer. Qwen: only with `use_sliding_window`, and only from layer
/// `max_window_layers` on. `layer_types`, which newer files have, says it layer by layer.
fn sliding_windows(root: &JsonObject<'_>, architecture: Architecture, num_layers: usize) -> Result<Vec<Option<usize>>> {
    let all = vec![None; num_layers];
    let written = root.size("sliding_window", 1..=MAX_POSITIONS)?;
    let (window, first_layer) = match architecture {
        Architecture::Llama | Architecture::Gpt2 | Architecture::Bert => return Ok(all),
        Architecture::Mistral if !root.has("sliding_window") => (Some(4096), 0),
        Architecture::Mistral => (written, 0),
        Architecture::Qwen2 | Architecture::Qwen3 if root.boolean("use_sliding_window")? == Some(true) => {
            (written.or(Some(4096)), root.size("max_window_layers", 0..=MAX_LAYERS)?.unwrap_or(28))
        }
        Architecture::Qwen2 | Architecture::Qwen3 => (None, 0),
    };
    let Some(types) = root.array("layer_types")? else {
        return Ok(all.into_iter().enumerate().map(|(layer, _)| window.filter(|_| layer >= first_layer)).collect());
    };
    if types.len() != num_layers {
        return Err(
            root.error("layer_types", format!("has {} entries, num_hidden_layers is {num_layers}", types.len()))
        );
    }
    let layer = |entry: &serde_json::Value| match (entry.as_str(), window) {
        (Some("full_attention"), _) => Ok(None),
        (Some("sliding_attention"), Some(window)) => Ok(Some(window)),
        (Some("sliding_attention"), None) => {
            Err(root.error("layer_types", "has a sliding layer, but no sliding_window is set"))
        }
        _ => {
            Err(root.error("layer_types", format!("has {entry}, must be \"full_attention\" or \"sliding_attention\"")))
        }
    };
    types.iter().map(layer).collect()
}

impl RopeConfig {
    /// Reads `rope_parameters`, the form of newer files, or else `rope_theta` beside `rope_scaling`.
    fn from_json(root: &JsonObject<'_>, max_position_embeddings: usize) -> Result<RopeConfig> {
        let new_form = root.object("rope_parameters")?;
        let scaling = match &new_form {
            Some(object) => Some(object.clone()),
            None => root.object("rope_scaling")?,
        };
        let theta = |object: &JsonObject<'_>| object.number("rope_theta", 1.0..=1e12);
        let inner_theta = new_form.as_ref().map(theta).transpose()?.flatten();
        Ok(RopeConfig {
            rope_theta: inner_theta.or(theta(root)?).unwrap_or(10_000.0),
            scaling: match scaling {
                Some(object) => RopeScaling::from_json(root, &object, max_position_embeddings)?,
                None => RopeScaling::Default,
            },
        })
    }
}

impl RopeScaling {
    fn from_json(
        root: &JsonObject<'_>,
        object: &JsonObject<'_>,
        max_position_embeddings: usize,
    ) -> Result<RopeScaling> {
        for holder in [root, object] {
            if holder.number("partial_rotary_factor", 0.0..=1.0)?.is_some_and(|factor| factor != 1.0) {
                return Err(holder.error("partial_rotary_factor", "is not 1, which is not supported"));
            }
        }
        let number = |field: &str, min: f64| object.required(field, object.number(field, min..=MAX_ROPE_FACTOR)?);
        match object.string("rope_type")?.or(object.string("type")?).unwrap_or("default") {
            "default" => Ok(RopeScaling::Default),
            "linear" => Ok(RopeScaling::Linear { factor: number("factor", 1.0)? }),
            "llama3" => {
                let (low_freq_factor, high_freq_factor) =
                    (number("low_freq_factor", 1e-6)?, number("high_freq_factor", 1e-6)?);
                if high_freq_factor <= low_freq_factor {
                    let reason =
                        format!("is {high_freq_factor}, must be above low_freq_factor, which is {low_freq_factor}");
                    return Err(object.error("high_freq_factor", reason));
                }
                let original = object.size("original_max_position_embeddings", 1..=MAX_POSITIONS)?;
                Ok(RopeScaling::Llama3 {
                    factor: number("factor", 1.0)?,
                    low_freq_factor,
                    high_freq_factor,
                    original_max_position_embeddings: original.unwrap_or(max_position_embeddings),
                })
            }
            other => {
                let reason = format!("is {other:?}, which is not supported (supported: default, linear, llama3)");
                Err(object.error("rope_type", reason))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn base(architecture: &str) -> Value {
        json!({
            "architectures": [architecture], "vocab_size": 100, "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 512,
        })
    }

    fn parse(mut config: Value, changes: &Value) -> Result<ModelConfig> {
        for (field, value) in changes.as_object().unwrap() {
            config[field] = value.clone();
        }
        ModelConfig::from_json(&JsonFile::parse("config.json", config.to_string().as_bytes())?)
    }

    /// What is not written has the default of the architecture's own class.
    #[test]
    fn defaults_are_those_of_the_architecture() {
        let llama = parse(base("LlamaForCausalLM"), &json!({"head_dim": null})).unwrap();
        assert_eq!((llama.num_key_value_heads, llama.head_dim), (4, 16));
        assert_eq!(llama.norm_eps, 1e-6);
        assert_eq!(llama.rope, Some(RopeConfig { rope_theta: 1e4, scaling: RopeScaling::Default }));
        assert!(!llama.tie_word_embeddings && !llama.attention_bias && !llama.mlp_bias);
        assert_eq!(parse(base("Qwen3ForCausalLM"), &json!({})).unwrap().head_dim, 128);
        assert_eq!(parse(base("MistralForCausalLM"), &json!({})).unwrap().sliding_windows, [Some(4096); 3]);
    }

    /// Which layers slide: by architecture, by `use_sliding_window` and `max_window_layers`, and by `layer_types`.
    #[test]
    fn sliding_layers() {
        let qwen = base("Qwen2ForCausalLM");
        for (architecture, changes, expected) in [
            ("LlamaForCausalLM", json!({"sliding_window": 8}), [None; 3]),
            ("MistralForCausalLM", json!({"sliding_window": 8}), [Some(8); 3]),
            ("MistralForCausalLM", json!({"sliding_window": null}), [None; 3]),
            ("Qwen2ForCausalLM", json!({"sliding_window": 8}), [None; 3]),
            (
                "Qwen2ForCausalLM",
                json!({"sliding_window": 8, "use_sliding_window": true, "max_window_layers": 1}),
                [None, Some(8), Some(8)],
            ),
            (
                "Qwen3ForCausalLM",
                json!({"sliding_window": 8, "use_sliding_window": true, "layer_types": ["sliding_attention", "full_attention", "full_attention"]}),
                [Some(8), None, None],
            ),
        ] {
            assert_eq!(
                parse(base(architecture), &changes).unwrap().sliding_windows,
                expected,
                "{architecture} {changes}"
            );
        }
        let without_window = json!({"layer_types": ["sliding_attention", "full_attention", "full_attention"]});
        assert!(parse(qwen, &without_window).unwrap_err().to_string().contains("no sliding_window is set"));
    }

    /// Both ways to write rotary parameters give the same configuration.
    #[test]
    fn both_forms_of_rope_are_one() {
        let scaling = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64});
        let old = parse(base("LlamaForCausalLM"), &json!({"rope_theta": 5e5, "rope_scaling": scaling})).unwrap();
        let mut new_form = scaling;
        new_form["rope_theta"] = json!(500_000);
        assert_eq!(parse(base("LlamaForCausalLM"), &json!({"rope_parameters": new_form})).unwrap().rope, old.rope);
        let rope = old.rope.unwrap();
        assert_eq!(rope.rope_theta, 5e5);
        assert!(matches!(rope.scaling, RopeScaling::Llama3 { original_max_position_embeddings: 64, .. }));
        let linear =
            parse(base("LlamaForCausalLM"), &json!({"rope_scaling": {"type": "linear", "factor": 2}})).unwrap();
        assert_eq!(linear.rope.unwrap().scaling, RopeScaling::Linear { factor: 2.0 });
    }

    /// Every field that is read refuses every wrong value with its name: a matrix of field and value.
    #[test]
    fn refuses_each_field_by_name() {
        let integers =
            [json!(0), json!(-1), json!(1.5), json!("4"), json!([4]), json!({}), json!(true), json!(u64::MAX)];
        let mut refused = 0;
        for field in [
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
            "sliding_window",
        ] {
            for value in &integers {
                let e = parse(base("MistralForCausalLM"), &json!({ field: value })).unwrap_err().to_string();
                assert!(e.contains(&format!("field `{field}`")), "{field} = {value}: {e}");
                refused += 1;
            }
        }
        for (field, value) in [
            ("rms_norm_eps", json!(0)),
            ("rms_norm_eps", json!(-1e-6)),
            ("rms_norm_eps", json!("1e-6")),
            ("rope_theta", json!(0)),
            ("rope_theta", json!("10000")),
            ("tie_word_embeddings", json!("true")),
            ("attention_bias", json!(1)),
            ("mlp_bias", json!([])),
            ("hidden_act", json!("gelu")),
            ("hidden_act", json!(1)),
            ("bos_token_id", json!(100)),
            ("eos_token_id", json!([1, 100])),
            ("eos_token_id", json!("2")),
            ("num_key_value_heads", json!(3)),
            ("head_dim", json!(15)),
            ("num_attention_heads", json!(5)),
            ("rope_scaling", json!(2)),
            ("architectures", json!([])),
            ("architectures", json!("LlamaForCausalLM")),
            ("architectures", json!([1])),
            ("partial_rotary_factor", json!(0.5)),
            ("rope_scaling.rope_type", json!({"rope_type": "yarn", "factor": 4})),
            ("rope_scaling.factor", json!({"type": "linear"})),
        ] {
            let mut config = base("LlamaForCausalLM");
            config["rope_scaling"] = json!({"type": "default"});
            let e = parse(config, &json!({ field.split('.').next().unwrap(): value })).unwrap_err().to_string();
            assert!(e.contains(&format!("field `{field}`")), "{field} = {value}: {e}");
            refused += 1;
        }
        assert_eq!(refused, 9 * 8 + 23);
        assert_eq!(parse(base("MambaForCausalLM"), &json!({})).unwrap_err().code(), "unknown_architecture");
    }
}
