//! Llama (Touvron et al. 2023, arXiv:2302.13971; version 3: Grattafiori et al. 2024, arXiv:2407.21783): norm before
//! each half of a layer, grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245) with rotary positions, SwiGLU.
//! Biases exist where the configuration says so; version 3.1's stretched frequencies are in the rotary table.

use crate::backend::{AttentionLayer, Backend};
use crate::batch::Batch;
use crate::error::Result;
use crate::model::config::ModelConfig;
use crate::model::layers::decoder::{Decoder, DecoderLayer};
use crate::model::load::WeightLoader;

/// `LlamaForCausalLM`
pub type Llama<B> = Decoder<B, LlamaLayer<B>>;

/// One decoder layer; fields are named as in the checkpoint, in the order of computation.
pub struct LlamaLayer<B: Backend> {
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

impl<B: Backend> DecoderLayer<B> for LlamaLayer<B> {
    fn load(weights: &mut WeightLoader<'_, B>, config: &ModelConfig, attention: AttentionLayer<B>) -> Result<Self> {
        let (hidden, intermediate, eps) = (config.hidden_size, config.intermediate_size, config.norm_eps);
        let q = config.num_attention_heads * config.head_dim;
        let kv = config.num_key_value_heads * config.head_dim;
        Ok(LlamaLayer {
            input_layernorm: weights.norm("input_layernorm", hidden, eps)?,
            qkv_proj: weights.stacked(
                &[("self_attn.q_proj", q), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv)],
                hidden,
                config.attention_bias,
            )?,
            attention,
            o_proj: weights.linear("self_attn.o_proj", [hidden, q], config.attention_bias)?,
            post_attention_layernorm: weights.norm("post_attention_layernorm", hidden, eps)?,
            gate_up_proj: weights.gate_up("mlp.gate_proj", "mlp.up_proj", [intermediate, hidden], config.mlp_bias)?,
            down_proj: weights.linear("mlp.down_proj", [hidden, intermediate], config.mlp_bias)?,
        })
    }

    fn forward(&self, b: &B, hidden: &mut B::Rows, batch: &Batch, kv: &mut B::Kv) -> Result<()> {
        let x = b.rms_norm(hidden, &self.input_layernorm)?; //             [tokens, hidden_size]
        let qkv = b.linear(&x, &self.qkv_proj)?; //                        [tokens, (heads + 2 kv_heads) * head_dim]
        let q = b.rope_and_store(qkv, &self.attention, batch, kv)?; //     [tokens, heads * head_dim]; K and V go to the blocks
        let x = b.paged_attention(&q, &self.attention, batch, kv)?; //     [tokens, heads * head_dim]
        b.linear_add(hidden, &x, &self.o_proj)?; //                        hidden += x W_o
        let x = b.rms_norm(hidden, &self.post_attention_layernorm)?; //    [tokens, hidden_size]
        let x = b.linear_swiglu(&x, &self.gate_up_proj)?; //               [tokens, intermediate_size]
        b.linear_add(hidden, &x, &self.down_proj) //                       hidden += x W_down
    }
}
