//! `config.json` of GPT-2, which has names of its own for everything.

use super::{
    Architecture, MAX_HEAD_DIM, MAX_HEADS, MAX_HIDDEN_SIZE, MAX_INTERMEDIATE_SIZE, MAX_LAYERS, MAX_POSITIONS,
    MAX_VOCAB_SIZE, ModelConfig, expect_flag, gelu, norm_eps, split_width,
};
use crate::backend::Gelu;
use crate::config::MAX_EOS_TOKENS;
use crate::error::Result;
use crate::loader::JsonObject;

/// Reads and checks the file.
pub(super) fn read(root: &JsonObject<'_>) -> Result<ModelConfig> {
    let size = |field: &str, max: usize| root.required(field, root.size(field, 1..=max)?);
    expect_flag(root, "scale_attn_weights", true)?;
    expect_flag(root, "scale_attn_by_inverse_layer_idx", false)?;
    expect_flag(root, "add_cross_attention", false)?;
    let (n_embd, n_head, n_layer) =
        (size("n_embd", MAX_HIDDEN_SIZE)?, size("n_head", MAX_HEADS)?, size("n_layer", MAX_LAYERS)?);
    let head_dim = split_width(root, ("n_head", n_head), ("n_embd", n_embd))?;
    if head_dim > MAX_HEAD_DIM {
        let reason =
            format!("is {n_head}, which makes heads of {head_dim} numbers, at most {MAX_HEAD_DIM} are supported");
        return Err(root.error("n_head", reason));
    }
    let n_positions = match root.size("n_positions", 1..=MAX_POSITIONS)? {
        Some(n_positions) => n_positions,
        None => root.required("n_positions", root.size("n_ctx", 1..=MAX_POSITIONS)?)?,
    };
    let vocab_size = size("vocab_size", MAX_VOCAB_SIZE)?;
    Ok(ModelConfig {
        architecture: Architecture::Gpt2,
        vocab_size,
        hidden_size: n_embd,
        intermediate_size: root.size("n_inner", 1..=MAX_INTERMEDIATE_SIZE)?.unwrap_or(4 * n_embd),
        num_hidden_layers: n_layer,
        num_attention_heads: n_head,
        num_key_value_heads: n_head,
        head_dim,
        max_position_embeddings: n_positions,
        norm_eps: norm_eps(root, "layer_norm_epsilon", 1e-5)?,
        activation: gelu(root, "activation_function", Gelu::Tanh)?,
        rope: None,
        type_vocab_size: 0,
        sliding_windows: vec![None; n_layer],
        tie_word_embeddings: root.boolean("tie_word_embeddings")?.unwrap_or(true),
        attention_bias: true,
        mlp_bias: true,
        bos_token_id: root.token_ids("bos_token_id", vocab_size, 1)?.first().copied(),
        eos_token_ids: root.token_ids("eos_token_id", vocab_size, MAX_EOS_TOKENS)?,
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
            "architectures": ["GPT2LMHeadModel"], "vocab_size": 100, "n_embd": 48, "n_layer": 2, "n_head": 3, "n_ctx": 64,
        });
        for (field, value) in changes.as_object().unwrap() {
            config[field] = value.clone();
        }
        ModelConfig::from_json(&JsonFile::parse("config.json", config.to_string().as_bytes())?)
    }

    /// What is not written has the default of the class; `n_positions` goes before `n_ctx`.
    #[test]
    fn defaults_are_those_of_the_class() {
        let config = parse(&json!({"n_inner": null})).unwrap();
        assert_eq!((config.intermediate_size, config.head_dim, config.max_position_embeddings), (192, 16, 64));
        assert_eq!((config.norm_eps, config.activation), (1e-5, Activation::Gelu(Gelu::Tanh)));
        assert!(config.tie_word_embeddings && config.rope.is_none());
        assert_eq!(config.num_layer_parameters(), 2 * 48 * (4 * 48 + 2 * 192));
        assert_eq!(parse(&json!({"n_positions": 32})).unwrap().max_position_embeddings, 32);
        assert_eq!(parse(&json!({"activation_function": "gelu"})).unwrap().gelu(), Gelu::Erf);
    }

    /// Every field that is read refuses wrong values with its name.
    #[test]
    fn refuses_each_field_by_name() {
        for (field, value) in [
            ("n_embd", json!(null)),
            ("n_embd", json!(0)),
            ("n_head", json!(5)),
            ("n_head", json!("3")),
            ("n_layer", json!(-1)),
            ("n_positions", json!(0)),
            ("n_inner", json!(1.5)),
            ("vocab_size", json!(u64::MAX)),
            ("layer_norm_epsilon", json!(0)),
            ("activation_function", json!("relu")),
            ("activation_function", json!(1)),
            ("scale_attn_weights", json!(false)),
            ("scale_attn_by_inverse_layer_idx", json!(true)),
            ("add_cross_attention", json!(true)),
            ("tie_word_embeddings", json!(1)),
            ("eos_token_id", json!(100)),
        ] {
            let e = parse(&json!({ field: value })).unwrap_err().to_string();
            assert!(e.contains(&format!("field `{field}`")), "{field} = {value}: {e}");
        }
        let e = parse(&json!({"n_ctx": null})).unwrap_err().to_string();
        assert!(e.contains("field `n_positions`: is missing"), "{e}");
        let e = parse(&json!({"n_embd": 3072})).unwrap_err().to_string();
        assert!(e.contains("heads of 1024 numbers, at most 512"), "{e}");
    }
}
