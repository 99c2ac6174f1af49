//! The decoder that the architectures have in common: embedding, layers one after the other, a last norm, and the
//! output matrix. What happens inside a layer is each architecture's own.

use std::sync::Arc;

use crate::backend::{AttentionLayer, AttentionShape, Backend};
use crate::batch::Batch;
use crate::error::Result;
use crate::model::Model;
use crate::model::config::ModelConfig;
use crate::model::layers::rope::rope_table;
use crate::model::load::WeightLoader;

/// One decoder layer of an architecture.
pub trait DecoderLayer<B: Backend>: Sized + Send {
    /// Takes the layer's weights; names are relative to `model.layers.N.`. `attention` holds the layer's sizes and
    /// position in the KV blocks.
    fn load(weights: &mut WeightLoader<'_, B>, config: &ModelConfig, attention: AttentionLayer<B>) -> Result<Self>;
    /// `hidden`: `[tokens, hidden_size]`, updated in place. Writes this layer's K and V of the batch into `kv`.
    fn forward(&self, b: &B, hidden: &mut B::Rows, batch: &Batch, kv: &mut B::Kv) -> Result<()>;
}

/// A decoder-only model with layers `L`.
pub struct Decoder<B: Backend, L> {
    /// `[vocab_size, hidden_size]`
    embed_tokens: B::Linear,
    layers: Vec<L>,
    norm: B::Norm,
    /// `[vocab_size, hidden_size]`; `None`: it is the embedding.
    lm_head: Option<B::Linear>,
}

impl<B: Backend, L: DecoderLayer<B>> Decoder<B, L> {
    /// Takes all weights, for sequences of at most `context_tokens`.
    pub fn load(weights: &mut WeightLoader<'_, B>, config: &ModelConfig, context_tokens: usize) -> Result<Self> {
        let rope = config.rope.as_ref().expect("the architectures with this decoder have rotary positions");
        let rope = Arc::new(weights.backend().load_rope(rope_table(rope, config.head_dim, context_tokens)?)?);
        let vocabulary = [config.vocab_size, config.hidden_size];
        // Checkpoints that were saved to embed texts have the decoder alone.
        let prefix = if weights.contains("embed_tokens.weight") { "" } else { "model." };
        let (embed_tokens, layers, norm) = weights.below(prefix, |weights| {
            let embed_tokens = weights.linear("embed_tokens", vocabulary, false)?;
            let mut layers = Vec::with_capacity(config.num_hidden_layers);
            for layer_idx in 0..config.num_hidden_layers {
                let attention = attention_layer(config, layer_idx, rope.clone());
                layers.push(
                    weights.below(&format!("layers.{layer_idx}."), |weights| L::load(weights, config, attention))?,
                );
            }
            Ok((embed_tokens, layers, weights.norm("norm", config.hidden_size, config.norm_eps)?))
        })?;
        let lm_head = match config.tie_word_embeddings {
            true => weights.ignore("lm_head.weight"),
            false => Some(weights.linear("lm_head", vocabulary, false)?),
        };
        Ok(Decoder { embed_tokens, layers, norm, lm_head })
    }
}

fn attention_layer<B: Backend>(config: &ModelConfig, layer_idx: usize, rope: Arc<B::Rope>) -> AttentionLayer<B> {
    let shape = AttentionShape {
        num_heads: config.num_attention_heads,
        num_kv_heads: config.num_key_value_heads,
        head_dim: config.head_dim,
        scale: (config.head_dim as f32).sqrt().recip(),
        sliding_window_tokens: config.sliding_windows[layer_idx],
        causal: true,
    };
    AttentionLayer { layer_idx, shape, qk_norm: None, rope: Some(rope) }
}

impl<B: Backend, L: DecoderLayer<B>> Decoder<B, L> {
    /// The residual stream behind the last layer: `[tokens, hidden_size]`.
    fn hidden_states(&self, b: &B, batch: &Batch, kv: &mut B::Kv) -> Result<B::Rows> {
        let mut hidden = b.embed(&self.embed_tokens, batch)?;
        for layer in &self.layers {
            layer.forward(b, &mut hidden, batch, kv)?;
        }
        Ok(hidden)
    }
}

impl<B: Backend, L: DecoderLayer<B>> Model<B> for Decoder<B, L> {
    fn forward(&self, b: &B, batch: &Batch, kv: &mut B::Kv) -> Result<B::Operand> {
        let hidden = self.hidden_states(b, batch, kv)?; //                [tokens, hidden_size]
        let outputs = b.select_outputs(&hidden, batch)?; //               [outputs, hidden_size]
        b.rms_norm(&outputs, &self.norm)
    }

    fn output(&self) -> Result<&B::Linear> {
        Ok(self.lm_head.as_ref().unwrap_or(&self.embed_tokens))
    }

    fn encode(&self, b: &B, batch: &Batch, kv: &mut B::Kv) -> Result<B::Rows> {
        let hidden = self.hidden_states(b, batch, kv)?;
        b.rms_norm_rows(&hidden, &self.norm)
    }
}
