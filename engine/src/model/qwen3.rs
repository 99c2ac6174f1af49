//! Qwen3 (Yang et al. 2025, arXiv:2505.09388): Llama's layer, in which each head of q and k goes through a norm before
//! it is rotated, so that the biases of Qwen2 are no longer needed.

use crate::backend::{AttentionLayer, Backend};
use crate::batch::Batch;
use crate::error::Result;
use crate::model::config::ModelConfig;
use crate::model::layers::decoder::{Decoder, DecoderLayer};
use crate::model::load::WeightLoader;

/// `Qwen3ForCausalLM`
pub type Qwen3<B> = Decoder<B, Qwen3Layer<B>>;

/// One decoder layer; fields are named as in the checkpoint, in the order of computation.
pub struct Qwen3Layer<B: Backend> {
    input_layernorm: B::Norm,
    /// `[(heads + 2 kv_heads) * head_dim, hidden_size]`; with biases if `attention_bias`
    qkv_proj: B::Linear,
    attention: AttentionLayer<B>,
    /// `[hidden_size, heads * head_dim]`
    o_proj: B::Linear,
    post_attention_layernorm: B::Norm,
    /// Gate and up, `[intermediate_size, hidden_size]` each.
    gate_up_proj: B::Linear,
    /// `[hidden_size, intermediate_size]`
    down_proj: B::Linear,
}

impl<B: Backend> DecoderLayer<B> for Qwen3Layer<B> {
    fn load(weights: &mut WeightLoader<'_, B>, config: &ModelConfig, mut attention: AttentionLayer<B>) -> Result<Self> {
        let (hidden, intermediate, eps) = (config.hidden_size, config.intermediate_size, config.norm_eps);
        let q = config.num_attention_heads * config.head_dim;
        let kv = config.num_key_value_heads * config.head_dim;
        let q_norm = weights.norm("self_attn.q_norm", config.head_dim, eps)?;
        let k_norm = weights.norm("self_attn.k_norm", config.head_dim, eps)?;
        attention.qk_norm = Some((q_norm, k_norm));
        Ok(Qwen3Layer {
            input_layernorm: weights.norm("input_layernorm", hidden, eps)?,
            qkv_proj: weights.stacked(
                &[("self_attn.q_proj", q), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv)],
                hidden,
                config.attention_bias,
            )?,
            attention,
            o_proj: weights.linear("self_attn.o_proj", [hidden, q], config.attention_bias)?,
            post_attention_layernorm: weights.norm("post_attention_layernorm", hidden, eps)?,
            gate_up_proj: weights.gate_up("mlp.gate_proj", "mlp.up_proj", [intermediate, hidden], false)?,
            down_proj: weights.linear("mlp.down_proj", [hidden, intermediate], false)?,
        })
    }

    fn forward(&self, b: &B, hidden: &mut B::Rows, batch: &Batch, kv: &mut B::Kv) -> Result<()> {
        let x = b.rms_norm(hidden, &self.input_layernorm)?; //             [tokens, hidden_size]
        let qkv = b.linear(&x, &self.qkv_proj)?; //                        [tokens, (heads + 2 kv_heads) * head_dim]
        let q = b.rope_and_store(qkv, &self.attention, batch, kv)?; //     [tokens, heads * head_dim]; q and k are normalised; K and V go to the blocks
        let x = b.paged_attention(&q, &self.attention, batch, kv)?; //     [tokens, heads * head_dim]
        b.linear_add(hidden, &x, &self.o_proj)?; //                        hidden += x W_o
        let x = b.rms_norm(hidden, &self.post_attention_layernorm)?; //    [tokens, hidden_size]
        let x = b.linear_swiglu(&x, &self.gate_up_proj)?; //               [tokens, intermediate_size]
        b.linear_add(hidden, &x, &self.down_proj) //                       hidden += x W_down
    }
}
