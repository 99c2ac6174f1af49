//! A configuration as one hash: what a model's numbers and answers depend on besides its weights. Every field is named, so
//! that a new one does not compile until somebody has decided what it means here.

use super::{Activation, ModelConfig, RopeConfig, RopeScaling};
use crate::backend::Gelu;
use crate::field_hash::{FieldHash, FieldTag};

#[derive(Clone, Copy)]
#[repr(u8)]
enum Tag {
    What = 1,
    Architecture,
    VocabSize,
    HiddenSize,
    IntermediateSize,
    NumHiddenLayers,
    NumAttentionHeads,
    NumKeyValueHeads,
    HeadDim,
    MaxPositionEmbeddings,
    NormEps,
    Activation,
    RopeTheta,
    RopeScaling,
    RopeScalingValues,
    TypeVocabSize,
    SlidingWindow,
    TieWordEmbeddings,
    AttentionBias,
    MlpBias,
    BosTokenId,
    EosTokenIds,
}

impl FieldTag for Tag {
    fn number(self) -> u8 {
        self as u8
    }
}

impl ModelConfig {
    /// Two configurations have the same hash only when every value is the same.
    pub fn identity(&self) -> [u8; 32] {
        let ModelConfig {
            architecture,
            vocab_size,
            hidden_size,
            intermediate_size,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            max_position_embeddings,
            norm_eps,
            activation,
            rope,
            type_vocab_size,
            sliding_windows,
            tie_word_embeddings,
            attention_bias,
            mlp_bias,
            bos_token_id,
            eos_token_ids,
        } = self;
        let mut hash = FieldHash::new()
            .text(Tag::What, "configuration of a model")
            .text(Tag::Architecture, architecture.name())
            .number(Tag::VocabSize, *vocab_size as u64)
            .number(Tag::HiddenSize, *hidden_size as u64)
            .number(Tag::IntermediateSize, *intermediate_size as u64)
            .number(Tag::NumHiddenLayers, *num_hidden_layers as u64)
            .number(Tag::NumAttentionHeads, *num_attention_heads as u64)
            .number(Tag::NumKeyValueHeads, *num_key_value_heads as u64)
            .number(Tag::HeadDim, *head_dim as u64)
            .number(Tag::MaxPositionEmbeddings, *max_position_embeddings as u64)
            .float(Tag::NormEps, *norm_eps)
            .text(Tag::Activation, activation_name(*activation));
        if let Some(rope) = rope {
            hash = add_rope(hash, rope);
        }
        for window in sliding_windows {
            hash = hash.optional(Tag::SlidingWindow, window.map(|tokens| tokens as u64));
        }
        hash.number(Tag::TypeVocabSize, *type_vocab_size as u64)
            .flag(Tag::TieWordEmbeddings, *tie_word_embeddings)
            .flag(Tag::AttentionBias, *attention_bias)
            .flag(Tag::MlpBias, *mlp_bias)
            .optional(Tag::BosTokenId, bos_token_id.map(u64::from))
            .numbers(Tag::EosTokenIds, eos_token_ids)
            .finish()
    }
}

fn activation_name(activation: Activation) -> &'static str {
    match activation {
        Activation::SwiGlu => "swiglu",
        Activation::Gelu(Gelu::Erf) => "gelu, erf",
        Activation::Gelu(Gelu::Tanh) => "gelu, tanh",
    }
}

fn add_rope(hash: FieldHash<Tag>, rope: &RopeConfig) -> FieldHash<Tag> {
    let RopeConfig { rope_theta, scaling } = rope;
    let (name, values) = match scaling {
        RopeScaling::Default => ("default", Vec::new()),
        RopeScaling::Linear { factor } => ("linear", vec![*factor]),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
            ("llama3", vec![*factor, *low_freq_factor, *high_freq_factor, *original_max_position_embeddings as f64])
        }
    };
    let values: Vec<u8> = values.into_iter().flat_map(|value| value.to_bits().to_le_bytes()).collect();
    hash.number(Tag::RopeTheta, rope_theta.to_bits())
        .text(Tag::RopeScaling, name)
        .field(Tag::RopeScalingValues, &values)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::model::config::Architecture;

    fn config() -> ModelConfig {
        ModelConfig {
            architecture: Architecture::Llama,
            vocab_size: 1,
            hidden_size: 2,
            intermediate_size: 3,
            num_hidden_layers: 4,
            num_attention_heads: 5,
            num_key_value_heads: 6,
            head_dim: 7,
            max_position_embeddings: 8,
            norm_eps: 9.0,
            activation: Activation::SwiGlu,
            rope: Some(RopeConfig { rope_theta: 10.0, scaling: RopeScaling::Default }),
            type_vocab_size: 11,
            sliding_windows: vec![None, Some(12)],
            tie_word_embeddings: false,
            attention_bias: false,
            mlp_bias: false,
            bos_token_id: None,
            eos_token_ids: vec![13],
        }
    }

    /// Another value of any one field is another hash, and no two of these changes meet.
    #[test]
    fn every_field_counts() {
        type Change = fn(&mut ModelConfig);
        let rope = |scaling| Some(RopeConfig { rope_theta: 10.0, scaling });
        let llama3 = |factor: f64, low_freq_factor: f64| RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8_192,
        };
        let changes: &[Change] = &[
            |_| (),
            |c| c.architecture = Architecture::Mistral,
            |c| c.vocab_size += 1,
            |c| c.hidden_size += 1,
            |c| c.intermediate_size += 1,
            |c| c.num_hidden_layers += 1,
            |c| c.num_attention_heads += 1,
            |c| c.num_key_value_heads += 1,
            |c| c.head_dim += 1,
            |c| c.max_position_embeddings += 1,
            |c| c.norm_eps = 9.5,
            |c| c.activation = Activation::Gelu(Gelu::Erf),
            |c| c.activation = Activation::Gelu(Gelu::Tanh),
            |c| c.rope = None,
            |c| c.rope = Some(RopeConfig { rope_theta: 11.0, scaling: RopeScaling::Default }),
            |c| c.type_vocab_size += 1,
            |c| c.sliding_windows.reverse(),
            |c| c.sliding_windows.push(None),
            |c| c.sliding_windows[1] = Some(13),
            |c| c.tie_word_embeddings = true,
            |c| c.attention_bias = true,
            |c| c.mlp_bias = true,
            |c| c.bos_token_id = Some(0),
            |c| c.eos_token_ids.push(14),
        ];
        let scalings = [RopeScaling::Linear { factor: 2.0 }, llama3(2.0, 1.0), llama3(1.0, 2.0), llama3(2.0, 2.0)];
        let changed = |change: &Change| {
            let mut config = config();
            change(&mut config);
            config
        };
        let scaled = scalings.map(|scaling| ModelConfig { rope: rope(scaling), ..config() });
        let hashes: Vec<_> = changes.iter().map(changed).chain(scaled).map(|config| config.identity()).collect();
        assert_eq!(hashes.iter().collect::<HashSet<_>>().len(), hashes.len());
    }

    /// The hash of one configuration, as a number that stored caches rely on: it changes only on purpose.
    #[test]
    fn hash_is_stable() {
        let hex: String = config().identity().iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, "9231b20a27aa363bf1b060815b0cf235bb81ed18d7dfd7c815cedeccda81312a");
    }
}
