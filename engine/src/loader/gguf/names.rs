//! Names of tensors: as GGUF files have them, and as our models (and the checkpoints of transformers) do. A name that
//! is in no table stays as it is, so that nobody asks for it and the load ends with its name.

#![deny(clippy::arithmetic_side_effects, clippy::indexing_slicing)]

use super::config::Architecture;

/// Names in files, and in models.
type Table = &'static [(&'static str, &'static str)];

/// The names of one kind of checkpoints.
struct Family {
    /// What stands before a layer's number in models; in files that is `blk.` for all.
    layers: &'static str,
    /// Outside of the layers.
    model: Table,
    /// Inside of one.
    layer: Table,
}

const LLAMA: Family = Family {
    layers: "model.layers.",
    model: &[("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")],
    layer: &[
        ("attn_norm", "input_layernorm"),
        ("attn_q", "self_attn.q_proj"),
        ("attn_k", "self_attn.k_proj"),
        ("attn_v", "self_attn.v_proj"),
        ("attn_output", "self_attn.o_proj"),
        ("attn_q_norm", "self_attn.q_norm"),
        ("attn_k_norm", "self_attn.k_norm"),
        ("ffn_norm", "post_attention_layernorm"),
        ("ffn_gate", "mlp.gate_proj"),
        ("ffn_up", "mlp.up_proj"),
        ("ffn_down", "mlp.down_proj"),
    ],
};

const GPT2: Family = Family {
    layers: "h.",
    model: &[("token_embd", "wte"), ("position_embd", "wpe"), ("output_norm", "ln_f"), ("output", "lm_head")],
    layer: &[
        ("attn_norm", "ln_1"),
        ("attn_qkv", "attn.c_attn"),
        ("attn_output", "attn.c_proj"),
        ("ffn_norm", "ln_2"),
        ("ffn_up", "mlp.c_fc"),
        ("ffn_down", "mlp.c_proj"),
    ],
};

const BERT: Family = Family {
    layers: "encoder.layer.",
    model: &[
        ("token_embd", "embeddings.word_embeddings"),
        ("position_embd", "embeddings.position_embeddings"),
        ("token_types", "embeddings.token_type_embeddings"),
        ("token_embd_norm", "embeddings.LayerNorm"),
    ],
    layer: &[
        ("attn_q", "attention.self.query"),
        ("attn_k", "attention.self.key"),
        ("attn_v", "attention.self.value"),
        ("attn_output", "attention.output.dense"),
        ("attn_output_norm", "attention.output.LayerNorm"),
        ("ffn_up", "intermediate.dense"),
        ("ffn_down", "output.dense"),
        ("layer_output_norm", "output.LayerNorm"),
    ],
};

/// The name by which a model asks for the tensor that the file calls `name`.
pub(super) fn name_in_model(architecture: Architecture, name: &str) -> String {
    let family = match architecture {
        Architecture::Llama | Architecture::Qwen2 | Architecture::Qwen3 => &LLAMA,
        Architecture::Gpt2 => &GPT2,
        Architecture::Bert => &BERT,
    };
    let translated = family.translate(name, ["blk.", family.layers], |&(file, model)| (file, model));
    translated.unwrap_or_else(|| name.to_string())
}

/// The name that a file has for the tensor that models call `name`.
pub fn name_in_file(name: &str) -> String {
    known_name_in_file(name).unwrap_or_else(|| name.to_string())
}

/// The same, if the format has one: no two families call different things the same.
pub fn known_name_in_file(name: &str) -> Option<String> {
    [&LLAMA, &GPT2, &BERT]
        .into_iter()
        .find_map(|family| family.translate(name, [family.layers, "blk."], |&(file, model)| (model, file)))
}

impl Family {
    fn translate(
        &self,
        name: &str,
        [layers, layers_there]: [&str; 2],
        direction: impl Fn(&(&'static str, &'static str)) -> (&'static str, &'static str),
    ) -> Option<String> {
        let (path, kind) = name.rsplit_once('.').filter(|(_, kind)| matches!(*kind, "weight" | "bias"))?;
        let find = |table: Table, part: &str| {
            table.iter().map(&direction).find(|(here, _)| *here == part).map(|(_, there)| there)
        };
        match path.strip_prefix(layers).and_then(|rest| rest.split_once('.')) {
            Some((layer, part)) => Some(format!("{layers_there}{layer}.{}.{kind}", find(self.layer, part)?)),
            None => Some(format!("{}.{kind}", find(self.model, path)?)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both directions undo each other for every name of every family, and leave other names alone.
    #[test]
    fn names_go_there_and_back() {
        for (architecture, family) in [
            (Architecture::Llama, LLAMA),
            (Architecture::Qwen3, LLAMA),
            (Architecture::Gpt2, GPT2),
            (Architecture::Bert, BERT),
        ] {
            let layer = family.layer.iter();
            let layer = layer.map(|(file, model)| (format!("blk.17.{file}"), format!("{}17.{model}", family.layers)));
            let model = family.model.iter().map(|(file, model)| (file.to_string(), model.to_string()));
            for (file, model) in layer.chain(model) {
                for kind in ["weight", "bias"] {
                    let (file, model) = (format!("{file}.{kind}"), format!("{model}.{kind}"));
                    assert_eq!((name_in_model(architecture, &file), name_in_file(&model)), (model, file));
                }
            }
            for name in ["rope_freqs.weight", "blk.0.attn_sinks.weight", "blk.0", "output", "output.scale", ""] {
                assert_eq!(known_name_in_file(name), None);
                let there = (name_in_model(architecture, name), name_in_file(name));
                assert_eq!(there, (name.to_string(), name.to_string()));
            }
        }
    }
}
