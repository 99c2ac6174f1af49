//! GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"): learned positions, LayerNorm
//! before each half of a layer and behind the last one, one matrix for q, k and v, a GELU feed-forward, biases
//! everywhere, and the embedding as output matrix.

use crate::backend::{AttentionLayer, AttentionShape, Backend, Gelu};
use crate::batch::Batch;
use crate::error::Result;
use crate::model::Model;
use crate::model::config::ModelConfig;
use crate::model::load::WeightLoader;

/// `GPT2LMHeadModel`; fields are named as in the checkpoint.
pub struct Gpt2<B: Backend> {
    /// `[vocab_size, n_embd]`
    wte: B::Linear,
    /// `[n_positions, n_embd]`
    wpe: B::Linear,
    h: Vec<Gpt2Block<B>>,
    ln_f: B::LayerNorm,
    /// `[vocab_size, n_embd]`; `None`: it is the embedding.
    lm_head: Option<B::Linear>,
}

/// One layer; fields are named as in the checkpoint, in the order of computation.
struct Gpt2Block<B: Backend> {
    ln_1: B::LayerNorm,
    /// `[3 * n_embd, n_embd]`
    attn_c_attn: B::Linear,
    attention: AttentionLayer<B>,
    /// `[n_embd, n_embd]`
    attn_c_proj: B::Linear,
    ln_2: B::LayerNorm,
    /// `[n_inner, n_embd]`
    mlp_c_fc: B::Linear,
    gelu: Gelu,
    /// `[n_embd, n_inner]`
    mlp_c_proj: B::Linear,
}

impl<B: Backend> Gpt2<B> {
    /// Takes all weights. The names of the oldest checkpoints have no `transformer.` before them.
    pub fn load(weights: &mut WeightLoader<'_, B>, config: &ModelConfig) -> Result<Self> {
        let (vocab, positions, width) = (config.vocab_size, config.max_position_embeddings, config.hidden_size);
        let prefix = if weights.contains("wte.weight") { "" } else { "transformer." };
        let (wte, wpe, h, ln_f) = weights.below(prefix, |weights| {
            let wte = weights.linear("wte", [vocab, width], false)?;
            let wpe = weights.linear("wpe", [positions, width], false)?;
            let mut h = Vec::with_capacity(config.num_hidden_layers);
            for layer_idx in 0..config.num_hidden_layers {
                h.push(
                    weights.below(&format!("h.{layer_idx}."), |weights| Gpt2Block::load(weights, config, layer_idx))?,
                );
            }
            Ok((wte, wpe, h, weights.layer_norm("ln_f", width, config.norm_eps)?))
        })?;
        let lm_head = match config.tie_word_embeddings {
            true => weights.ignore("lm_head.weight"),
            false => Some(weights.linear("lm_head", [vocab, width], false)?),
        };
        Ok(Gpt2 { wte, wpe, h, ln_f, lm_head })
    }

    /// The residual stream behind the last layer: `[tokens, n_embd]`.
    fn hidden_states(&self, b: &B, batch: &Batch, kv: &mut B::Kv) -> Result<B::Rows> {
        let mut hidden = b.embed(&self.wte, batch)?; //                   [tokens, n_embd]
        b.add_position_embedding(&mut hidden, &self.wpe, batch)?; //     hidden += wpe[positions]
        for block in &self.h {
            block.forward(b, &mut hidden, batch, kv)?;
        }
        Ok(hidden)
    }
}

impl<B: Backend> Gpt2Block<B> {
    fn load(weights: &mut WeightLoader<'_, B>, config: &ModelConfig, layer_idx: usize) -> Result<Self> {
        let (width, inner, eps) = (config.hidden_size, config.intermediate_size, config.norm_eps);
        // The causal mask and its filling, which old checkpoints carry.
        for buffer in ["attn.bias", "attn.masked_bias"] {
            weights.ignore::<()>(buffer);
        }
        let shape = AttentionShape {
            num_heads: config.num_attention_heads,
            num_kv_heads: config.num_attention_heads,
            head_dim: config.head_dim,
            scale: (config.head_dim as f32).sqrt().recip(),
            sliding_window_tokens: None,
            causal: true,
        };
        Ok(Gpt2Block {
            ln_1: weights.layer_norm("ln_1", width, eps)?,
            attn_c_attn: weights.conv1d("attn.c_attn", [width, 3 * width])?,
            attention: AttentionLayer { layer_idx, shape, qk_norm: None, rope: None },
            attn_c_proj: weights.conv1d("attn.c_proj", [width, width])?,
            ln_2: weights.layer_norm("ln_2", width, eps)?,
            mlp_c_fc: weights.conv1d("mlp.c_fc", [width, inner])?,
            gelu: config.gelu(),
            mlp_c_proj: weights.conv1d("mlp.c_proj", [inner, width])?,
        })
    }

    /// `hidden`: `[tokens, n_embd]`, updated in place. Writes this layer's K and V of the batch into `kv`.
    fn forward(&self, b: &B, hidden: &mut B::Rows, batch: &Batch, kv: &mut B::Kv) -> Result<()> {
        let x = b.layer_norm(hidden, &self.ln_1)?; //                     [tokens, n_embd]
        let qkv = b.linear(&x, &self.attn_c_attn)?; //                    [tokens, 3 * n_embd]
        let q = b.rope_and_store(qkv, &self.attention, batch, kv)?; //    [tokens, n_embd]; nothing rotates; K and V go to the blocks
        let x = b.paged_attention(&q, &self.attention, batch, kv)?; //    [tokens, n_embd]
        b.linear_add(hidden, &x, &self.attn_c_proj)?; //                  hidden += x W_o + b_o
        let x = b.layer_norm(hidden, &self.ln_2)?; //                     [tokens, n_embd]
        let x = b.linear_gelu(&x, &self.mlp_c_fc, self.gelu)?; //         [tokens, n_inner]
        b.linear_add(hidden, &x, &self.mlp_c_proj) //                     hidden += x W_proj + b_proj
    }
}

impl<B: Backend> Model<B> for Gpt2<B> {
    fn forward(&self, b: &B, batch: &Batch, kv: &mut B::Kv) -> Result<B::Operand> {
        let hidden = self.hidden_states(b, batch, kv)?; //                [tokens, n_embd]
        let outputs = b.select_outputs(&hidden, batch)?; //               [outputs, n_embd]
        b.layer_norm(&outputs, &self.ln_f)
    }

    fn output(&self) -> Result<&B::Linear> {
        Ok(self.lm_head.as_ref().unwrap_or(&self.wte))
    }

    fn encode(&self, b: &B, batch: &Batch, kv: &mut B::Kv) -> Result<B::Rows> {
        let mut hidden = self.hidden_states(b, batch, kv)?;
        b.layer_norm_in_place(&mut hidden, &self.ln_f)?;
        Ok(hidden)
    }
}
