//! Names of tensors: as GGUF files have them, and as our models (and the checkpoints of transformers) do. A name that
//! is in neither table stays as it is, so that nobody asks for it and the load ends with its name.

#![deny(clippy::arithmetic_side_effects, clippy::indexing_slicing)]

/// Outside of the layers.
const MODEL: &[(&str, &str)] =
    &[("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")];

/// Below `blk.N.` and `model.layers.N.`.
const LAYER: &[(&str, &str)] = &[
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
];

/// The name by which a model asks for the tensor that the file calls `name`.
pub(super) fn name_in_model(name: &str) -> String {
    translate(name, "blk.", "model.layers.", |&(file, model)| (file, model))
}

/// The name that a file has for the tensor that models call `name`.
pub fn name_in_file(name: &str) -> String {
    translate(name, "model.layers.", "blk.", |&(file, model)| (model, file))
}

fn translate(
    name: &str,
    layers: &str,
    layers_there: &str,
    direction: impl Fn(&(&'static str, &'static str)) -> (&'static str, &'static str),
) -> String {
    let translated = || {
        let (path, kind) = name.rsplit_once('.').filter(|(_, kind)| matches!(*kind, "weight" | "bias"))?;
        let find = |table: &[(&'static str, &'static str)], part: &str| {
            table.iter().map(&direction).find(|(here, _)| *here == part).map(|(_, there)| there)
        };
        match path.strip_prefix(layers).and_then(|rest| rest.split_once('.')) {
            Some((layer, part)) => Some(format!("{layers_there}{layer}.{}.{kind}", find(LAYER, part)?)),
            None => Some(format!("{}.{kind}", find(MODEL, path)?)),
        }
    };
    translated().unwrap_or_else(|| name.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both directions undo each other for every name of the tables, and leave other names alone.
    #[test]
    fn names_go_there_and_back() {
        let layer = LAYER.iter().map(|(file, model)| (format!("blk.17.{file}"), format!("model.layers.17.{model}")));
        let model = MODEL.iter().map(|(file, model)| (file.to_string(), model.to_string()));
        for (file, model) in layer.chain(model) {
            for kind in ["weight", "bias"] {
                let (file, model) = (format!("{file}.{kind}"), format!("{model}.{kind}"));
                assert_eq!((name_in_model(&file), name_in_file(&model)), (model, file));
            }
        }
        for name in ["rope_freqs.weight", "blk.0.attn_qkv.weight", "blk.0", "output", "output.scale", ""] {
            assert_eq!((name_in_model(name), name_in_file(name)), (name.to_string(), name.to_string()));
        }
    }
}
