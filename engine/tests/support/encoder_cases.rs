//! Bad folders of BERT, of GPT-2 and of sentence-transformers: a part of the table of `malformed_files.rs`.

use std::fs;

use safetensors::Dtype;
use serde_json::{Value, json};

use crate::folder_cases::{Case, case, tensor};
use crate::tiny_model::{TempFolder, TensorData, weights, write_weights};

/// A folder of `config` that `change` turns into a bad one.
fn model_case(
    name: &str,
    config: &'static (dyn Fn() -> Value + Sync),
    change: impl Fn(&TempFolder, &mut Value, &mut Vec<(String, TensorData)>) + 'static,
    code: &'static str,
    text: &str,
) -> Case {
    let change = move |folder: &TempFolder| {
        let mut config = config();
        let mut tensors = weights(&config, Dtype::F32);
        change(folder, &mut config, &mut tensors);
        folder.write("config.json", config.to_string());
        write_weights(folder, &tensors, 1);
    };
    case(name, change, code, text)
}

/// A small encoder.
pub fn bert_config() -> Value {
    json!({
        "architectures": ["BertModel"], "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 48, "max_position_embeddings": 32, "type_vocab_size": 2,
    })
}

/// A small GPT-2.
pub fn gpt2_config() -> Value {
    json!({"architectures": ["GPT2LMHeadModel"], "vocab_size": 96, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32})
}

fn write_below(folder: &TempFolder, path: &str, content: &str) {
    fs::create_dir_all(folder.path().join("1_Pooling")).unwrap();
    folder.write(path, content);
}

/// The table.
pub fn encoder_cases() -> Vec<Case> {
    let with = |field: &'static str, value: Value| {
        move |_: &TempFolder, config: &mut Value, _: &mut Vec<(String, TensorData)>| config[field] = value.clone()
    };
    let without = |name: &'static str| {
        move |_: &TempFolder, _: &mut Value, tensors: &mut Vec<(String, TensorData)>| {
            tensors.retain(|(other, _)| other != name);
        }
    };
    let file = |path: &'static str, content: &'static str| {
        move |folder: &TempFolder, _: &mut Value, _: &mut Vec<(String, TensorData)>| write_below(folder, path, content)
    };
    let twice = |_: &TempFolder, _: &mut Value, tensors: &mut Vec<(String, TensorData)>| {
        let word = tensors[0].1.clone();
        tensors.push(("bert.embeddings.word_embeddings.weight".to_string(), word));
    };
    let turned = |_: &TempFolder, _: &mut Value, tensors: &mut Vec<(String, TensorData)>| {
        tensor(tensors, "transformer.h.0.mlp.c_fc.weight").shape.reverse();
    };
    let whole = |_: &TempFolder, _: &mut Value, tensors: &mut Vec<(String, TensorData)>| {
        tensor(tensors, "transformer.h.0.ln_1.bias").dtype = Dtype::I32;
    };
    let pooling_folder = |folder: &TempFolder, _: &mut Value, _: &mut Vec<(String, TensorData)>| {
        fs::create_dir_all(folder.path().join("1_Pooling/config.json")).unwrap();
    };
    let modules = r#"[{"type": "x.Transformer", "path": ""}, {"type": "x.Pooling", "path": "1_Pooling"}]"#;
    let bomb = |folder: &TempFolder, _: &mut Value, _: &mut Vec<(String, TensorData)>| {
        folder.write("modules.json", "[".repeat(1_000_000));
    };
    let large = |folder: &TempFolder, _: &mut Value, _: &mut Vec<(String, TensorData)>| {
        write_below(folder, "1_Pooling/config.json", &" ".repeat((4 << 20) + 1));
    };
    let bert = &bert_config;
    let gpt2 = &gpt2_config;
    vec![
        model_case("BERT with ReLU", bert, with("hidden_act", json!("relu")), "config", "`hidden_act`: is \"relu\""),
        model_case(
            "BERT with relative positions",
            bert,
            with("position_embedding_type", json!("relative_key")),
            "config",
            "`position_embedding_type`: is \"relative_key\"",
        ),
        model_case("BERT as a decoder", bert, with("is_decoder", json!(true)), "config", "`is_decoder`: is true"),
        model_case("BERT of uneven heads", bert, with("num_attention_heads", json!(3)), "config", "is 3, must divide"),
        model_case(
            "BERT of more positions than rows",
            bert,
            with("max_position_embeddings", json!(33)),
            "tensor_shape",
            "position_embeddings.weight` has shape [32, 32], the model needs [33, 32]",
        ),
        model_case(
            "BERT without token types",
            bert,
            without("embeddings.token_type_embeddings.weight"),
            "missing_tensor",
            "`embeddings.token_type_embeddings.weight`",
        ),
        model_case(
            "BERT without a norm's bias",
            bert,
            without("encoder.layer.0.output.LayerNorm.bias"),
            "missing_tensor",
            "`encoder.layer.0.output.LayerNorm.bias`",
        ),
        model_case(
            "BERT of two prefixes",
            bert,
            twice,
            "missing_tensor",
            "`bert.embeddings.position_embeddings.weight`",
        ),
        model_case(
            "BERT of fewer layers",
            bert,
            with("num_hidden_layers", json!(2)),
            "missing_tensor",
            "encoder.layer.1.",
        ),
        model_case(
            "GPT-2 of a row-major matrix",
            gpt2,
            turned,
            "tensor_shape",
            "c_fc.weight` has shape [128, 32], the model needs [32, 128]",
        ),
        model_case("GPT-2 of whole numbers", gpt2, whole, "tensor_dtype", "`transformer.h.0.ln_1.bias` is I32"),
        model_case(
            "GPT-2 without positions",
            gpt2,
            without("transformer.wpe.weight"),
            "missing_tensor",
            "`transformer.wpe.weight`",
        ),
        model_case(
            "GPT-2 with a head",
            gpt2,
            with("tie_word_embeddings", json!(false)),
            "missing_tensor",
            "`lm_head.weight`",
        ),
        model_case(
            "GPT-2 of another activation",
            gpt2,
            with("activation_function", json!("swish")),
            "config",
            "`activation_function`: is \"swish\"",
        ),
        model_case(
            "GPT-2 of odd scales",
            gpt2,
            with("scale_attn_by_inverse_layer_idx", json!(true)),
            "config",
            "`scale_attn_by_inverse_layer_idx`: is true",
        ),
        model_case(
            "GPT-2 of a wide feed-forward",
            gpt2,
            with("n_inner", json!(u64::MAX)),
            "config",
            "`n_inner`: is 18446744073709551615",
        ),
        model_case("modules.json is no list", bert, file("modules.json", "{}"), "invalid_json", "modules.json"),
        model_case("modules.json nests too deep", bert, bomb, "invalid_json", "modules.json"),
        model_case(
            "modules.json without the pooling's file",
            bert,
            file("modules.json", modules),
            "config",
            "has no config.json",
        ),
        model_case(
            "modules.json with a dense layer",
            bert,
            file("modules.json", r#"[{"type": "x.Transformer", "path": ""}, {"type": "x.Dense", "path": "1_Dense"}]"#),
            "config",
            "modules.json: field `[1].type`: is \"x.Dense\"",
        ),
        model_case(
            "modules.json leaves the folder",
            bert,
            file("modules.json", r#"[{"type": "x.Transformer", "path": "../other"}]"#),
            "config",
            "modules.json: field `[0].path`: is \"../other\"",
        ),
        model_case(
            "pooling by the maximum",
            bert,
            file("1_Pooling/config.json", r#"{"pooling_mode_max_tokens": true}"#),
            "config",
            "1_Pooling/config.json: field `pooling_mode_max_tokens`",
        ),
        model_case(
            "pooling of another width",
            bert,
            file("1_Pooling/config.json", r#"{"pooling_mode_cls_token": true, "word_embedding_dimension": 384}"#),
            "config",
            "`word_embedding_dimension`: is 384, the model's hidden_size is 32",
        ),
        model_case("pooling in a folder's place", bert, pooling_folder, "io", "is not a regular file"),
        model_case("pooling's file is too large", bert, large, "io", "is larger than 4194304 bytes"),
        model_case(
            "a length of no token",
            bert,
            file("sentence_bert_config.json", r#"{"max_seq_length": 0}"#),
            "config",
            "sentence_bert_config.json: field `max_seq_length`: is 0",
        ),
        model_case(
            "lower case by the library",
            gpt2,
            file("sentence_bert_config.json", r#"{"do_lower_case": true}"#),
            "config",
            "sentence_bert_config.json: field `do_lower_case`",
        ),
    ]
}
