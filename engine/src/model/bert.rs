//! BERT (Devlin et al. 2018, arXiv:1810.04805): an encoder. The embeddings of word, position and token type are added and
//! normalised; each layer attends in both directions and normalises behind each half, so that the residual stream
//! itself is what the next product reads. It gives states, no next token.

use crate::backend::{AttentionLayer, AttentionShape, Backend, Gelu};
use crate::batch::Batch;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::model::config::ModelConfig;
use crate::model::load::WeightLoader;

/// `BertModel`; fields are named as in the checkpoint.
pub struct Bert<B: Backend> {
    /// As in `config.json`.
    architecture: &'static str,
    /// `[vocab_size, hidden_size]`
    word_embeddings: B::Linear,
    /// `[max_position_embeddings, hidden_size]`
    position_embeddings: B::Linear,
    /// `[type_vocab_size, hidden_size]`
    token_type_embeddings: B::Linear,
    layer_norm: B::LayerNorm,
    layers: Vec<BertLayer<B>>,
}

/// One encoder layer; fields are named as in the checkpoint, in the order of computation.
struct BertLayer<B: Backend> {
    /// `[3 * hidden_size, hidden_size]`
    attention_self_qkv: B::Linear,
    attention: AttentionLayer<B>,
    /// `[hidden_size, hidden_size]`
    attention_output_dense: B::Linear,
    attention_output_layer_norm: B::LayerNorm,
    /// `[intermediate_size, hidden_size]`
    intermediate_dense: B::Linear,
    gelu: Gelu,
    /// `[hidden_size, intermediate_size]`
    output_dense: B::Linear,
    output_layer_norm: B::LayerNorm,
}

/// What checkpoints have beside the encoder: the heads of its training.
const HEADS: [&str; 9] = [
    "cls.predictions.bias",
    "cls.predictions.decoder.weight",
    "cls.predictions.decoder.bias",
    "cls.predictions.transform.dense.weight",
    "cls.predictions.transform.dense.bias",
    "cls.predictions.transform.LayerNorm.weight",
    "cls.predictions.transform.LayerNorm.bias",
    "cls.seq_relationship.weight",
    "cls.seq_relationship.bias",
];

impl<B: Backend> Bert<B> {
    /// Takes all weights. Checkpoints with heads have the encoder below `bert.`.
    pub fn load(weights: &mut WeightLoader<'_, B>, config: &ModelConfig) -> Result<Self> {
        let prefix = if weights.contains("bert.embeddings.word_embeddings.weight") { "bert." } else { "" };
        for head in HEADS {
            weights.ignore::<()>(head);
            // The oldest ones call a norm's weight and bias so.
            weights.ignore::<()>(
                &head.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"),
            );
        }
        weights.below(prefix, |weights| Bert::load_encoder(weights, config))
    }

    fn load_encoder(weights: &mut WeightLoader<'_, B>, config: &ModelConfig) -> Result<Self> {
        for unused in ["embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias"] {
            weights.ignore::<()>(unused);
        }
        let mut embedding = |name: &str, rows| weights.linear(name, [rows, config.hidden_size], false);
        let word_embeddings = embedding("embeddings.word_embeddings", config.vocab_size)?;
        let position_embeddings = embedding("embeddings.position_embeddings", config.max_position_embeddings)?;
        let token_type_embeddings = embedding("embeddings.token_type_embeddings", config.type_vocab_size)?;
        let layer_norm = weights.layer_norm("embeddings.LayerNorm", config.hidden_size, config.norm_eps)?;
        let mut layers = Vec::with_capacity(config.num_hidden_layers);
        for layer_idx in 0..config.num_hidden_layers {
            let load = |weights: &mut WeightLoader<'_, B>| BertLayer::load(weights, config, layer_idx);
            layers.push(weights.below(&format!("encoder.layer.{layer_idx}."), load)?);
        }
        let architecture = config.architecture.name();
        Ok(Bert { architecture, word_embeddings, position_embeddings, token_type_embeddings, layer_norm, layers })
    }

    fn generates_nothing(&self) -> Error {
        Error::NotSupported { feature: "generate text", architecture: self.architecture.to_string() }
    }
}

impl<B: Backend> BertLayer<B> {
    fn load(weights: &mut WeightLoader<'_, B>, config: &ModelConfig, layer_idx: usize) -> Result<Self> {
        let (hidden, intermediate, eps) = (config.hidden_size, config.intermediate_size, config.norm_eps);
        let shape = AttentionShape {
            num_heads: config.num_attention_heads,
            num_kv_heads: config.num_attention_heads,
            head_dim: config.head_dim,
            scale: (config.head_dim as f32).sqrt().recip(),
            sliding_window_tokens: None,
            causal: false,
        };
        let qkv = ["attention.self.query", "attention.self.key", "attention.self.value"].map(|name| (name, hidden));
        Ok(BertLayer {
            attention_self_qkv: weights.stacked(&qkv, hidden, true)?,
            attention: AttentionLayer { layer_idx, shape, qk_norm: None, rope: None },
            attention_output_dense: weights.linear("attention.output.dense", [hidden, hidden], true)?,
            attention_output_layer_norm: weights.layer_norm("attention.output.LayerNorm", hidden, eps)?,
            intermediate_dense: weights.linear("intermediate.dense", [intermediate, hidden], true)?,
            gelu: config.gelu(),
            output_dense: weights.linear("output.dense", [hidden, intermediate], true)?,
            output_layer_norm: weights.layer_norm("output.LayerNorm", hidden, eps)?,
        })
    }

    /// `hidden`: `[tokens, hidden_size]`, updated in place; `x`: the same, as an operand. Returns the new `x`.
    fn forward(
        &self,
        b: &B,
        hidden: &mut B::Rows,
        x: &B::Operand,
        batch: &Batch,
        kv: &mut B::Kv,
    ) -> Result<B::Operand> {
        let qkv = b.linear(x, &self.attention_self_qkv)?; //                               [tokens, 3 * hidden_size]
        let q = b.rope_and_store(qkv, &self.attention, batch, kv)?; //                     [tokens, hidden_size]; nothing rotates; K and V go to the blocks
        let x = b.paged_attention(&q, &self.attention, batch, kv)?; //                     [tokens, hidden_size]
        b.linear_add(hidden, &x, &self.attention_output_dense)?; //                        hidden += x W_o + b_o
        let x = b.layer_norm_in_place(hidden, &self.attention_output_layer_norm)?; //      [tokens, hidden_size]
        let x = b.linear_gelu(&x, &self.intermediate_dense, self.gelu)?; //                [tokens, intermediate_size]
        b.linear_add(hidden, &x, &self.output_dense)?; //                                  hidden += x W_2 + b_2
        b.layer_norm_in_place(hidden, &self.output_layer_norm)
    }
}

impl<B: Backend> Model<B> for Bert<B> {
    fn forward(&self, _: &B, _: &Batch, _: &mut B::Kv) -> Result<B::Operand> {
        Err(self.generates_nothing())
    }

    fn output(&self) -> Result<&B::Linear> {
        Err(self.generates_nothing())
    }

    fn encode(&self, b: &B, batch: &Batch, kv: &mut B::Kv) -> Result<B::Rows> {
        let mut hidden = b.embed(&self.word_embeddings, batch)?; //                        [tokens, hidden_size]
        b.add_position_embedding(&mut hidden, &self.position_embeddings, batch)?;
        // One text is all of the first type.
        b.add_embedding(&mut hidden, &self.token_type_embeddings, &vec![0; batch.num_tokens()])?;
        let mut x = b.layer_norm_in_place(&mut hidden, &self.layer_norm)?;
        for layer in &self.layers {
            x = layer.forward(b, &mut hidden, &x, batch, kv)?;
        }
        Ok(hidden)
    }
}
