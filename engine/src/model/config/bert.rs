//! `config.json` of BERT.

use super::{
    Architecture, MAX_HEAD_DIM, MAX_HEADS, MAX_HIDDEN_SIZE, MAX_INTERMEDIATE_SIZE, MAX_LAYERS, MAX_POSITIONS,
    MAX_VOCAB_SIZE, ModelConfig, expect_flag, gelu, norm_eps, split_width,
};
use crate::backend::Gelu;
use crate::error::Result;
use crate::loader::JsonObject;

/// Kinds of token types; BERT has two, no published model more than a few.
const MAX_TOKEN_TYPES: usize = 1024;

/// Reads and checks the file.
pub(super) fn read(root: &JsonObject<'_>) -> Result<ModelConfig> {
    let size = |field: &str, max: usize| root.required(field, root.size(field, 1..=max)?);
    expect_flag(root, "is_decoder", false)?;
    expect_flag(root, "add_cross_attention", false)?;
    if let Some(other) = root.string("position_embedding_type")?.filter(|kind| *kind != "absolute") {
        let reason = format!("is {other:?}, which is not supported (supported: absolute)");
        return Err(root.error("position_embedding_type", reason));
    }
    let hidden_size = size("hidden_size", MAX_HIDDEN_SIZE)?;
    let (num_heads, num_layers) = (size("num_attention_heads", MAX_HEADS)?, size("num_hidden_layers", MAX_LAYERS)?);
    let head_dim = split_width(root, ("num_attention_heads", num_heads), ("hidden_size", hidden_size))?;
    if head_dim > MAX_HEAD_DIM {
        let reason =
            format!("is {num_heads}, which makes heads of {head_dim} numbers, at most {MAX_HEAD_DIM} are supported");
        return Err(root.error("num_attention_heads", reason));
    }
    Ok(ModelConfig {
        architecture: Architecture::Bert,
        vocab_size: size("vocab_size", MAX_VOCAB_SIZE)?,
        hidden_size,
        intermediate_size: size("intermediate_size", MAX_INTERMEDIATE_SIZE)?,
        num_hidden_layers: num_layers,
        num_attention_heads: num_heads,
        num_key_value_heads: num_heads,
        head_dim,
        max_position_embeddings: size("max_position_embeddings", MAX_POSITIONS)?,
        norm_eps: norm_eps(root, "layer_norm_eps", 1e-12)?,
        activation: gelu(root, "hidden_act", Gelu::Erf)?,
        rope: None,
        type_vocab_size: root.size("type_vocab_size", 1..=MAX_TOKEN_TYPES)?.unwrap_or(2),
        sliding_windows: vec![None; num_layers],
        tie_word_embeddings: true,
        attention_bias: true,
        mlp_bias: true,
        bos_token_id: None,
        eos_token_ids: Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::loader::JsonFile;
    use crate::model::config::Activation;
    use serde_json::{Value, json};

    fn parse(changes: &Value) -> Result<ModelConfig> {
        let mut config = json!({
            "architectures": ["BertModel"], "vocab_size": 100, "hidden_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 3, "intermediate_size": 96, "max_position_embeddings": 64,
        });
        for (field, value) in changes.as_object().unwrap() {
            config[field] = value.clone();
        }
        ModelConfig::from_json(&JsonFile::parse("config.json", config.to_string().as_bytes())?)
    }

    /// What is not written has the default of the class; a checkpoint with a head for masked words is one too.
    #[test]
    fn defaults_are_those_of_the_class() {
        let config = parse(&json!({"architectures": ["BertForMaskedLM"]})).unwrap();
        assert_eq!((config.type_vocab_size, config.head_dim, config.num_key_value_heads), (2, 16, 3));
        assert_eq!((config.norm_eps, config.activation), (1e-12, Activation::Gelu(Gelu::Erf)));
        assert!(!config.architecture.can_generate() && config.rope.is_none());
        assert_eq!(config.num_layer_parameters(), 2 * 48 * (4 * 48 + 2 * 96));
        assert_eq!(parse(&json!({"hidden_act": "gelu_new"})).unwrap().gelu(), Gelu::Tanh);
    }

    /// Every field that is read refuses wrong values with its name.
    #[test]
    fn refuses_each_field_by_name() {
        for (field, value) in [
            ("vocab_size", json!(null)),
            ("hidden_size", json!(0)),
            ("hidden_size", json!("48")),
            ("num_hidden_layers", json!(2000)),
            ("num_attention_heads", json!(5)),
            ("num_attention_heads", json!(null)),
            ("intermediate_size", json!(-96)),
            ("max_position_embeddings", json!(1e30)),
            ("type_vocab_size", json!(0)),
            ("layer_norm_eps", json!(1)),
            ("hidden_act", json!("relu")),
            ("position_embedding_type", json!("relative_key")),
            ("is_decoder", json!(true)),
            ("add_cross_attention", json!(true)),
        ] {
            let e = parse(&json!({ field: value })).unwrap_err().to_string();
            assert!(e.contains(&format!("field `{field}`")), "{field} = {value}: {e}");
        }
    }
}
