//! Bad GGUF files of GPT-2 and BERT: a part of the table of `gguf_files.rs`.

use crate::gguf_cases::{Case, case};
use crate::gguf_file::{GgufFile, Value};
use crate::gguf_loading::{valid_bert, valid_gpt2};

/// The table.
pub fn encoder_cases() -> Vec<Case> {
    let changed =
        |valid: fn() -> GgufFile, name: &str, change: &dyn Fn(&mut GgufFile), code: &'static str, text: &str| {
            let mut file = valid();
            change(&mut file);
            case(name, file.bytes(), code, text)
        };
    let key = |valid: fn() -> GgufFile, key: &str, value: Value, text: &str| {
        let named = format!("GGUF metadata: field `{key}`: {text}");
        changed(valid, &named, &|file| file.set(key, value.clone()), "config", &named)
    };
    let missing = |valid: fn() -> GgufFile, key: &str| {
        let named = format!("GGUF metadata: field `{key}`: is missing");
        changed(valid, &named, &|file| file.remove(key), "config", &named)
    };
    vec![
        missing(valid_bert, "bert.attention.layer_norm_epsilon"),
        missing(valid_bert, "bert.context_length"),
        missing(valid_gpt2, "gpt2.attention.layer_norm_epsilon"),
        missing(valid_gpt2, "gpt2.context_length"),
        key(valid_bert, "bert.attention.layer_norm_epsilon", Value::f32(1e-13), "is 0.0000000000001, must be"),
        key(valid_bert, "bert.attention.causal", Value::bool(true), "is true, which is not supported for this"),
        key(valid_gpt2, "gpt2.attention.causal", Value::bool(false), "is false, which is not supported for this"),
        key(valid_bert, "bert.attention.causal", Value::u32(0), "is an integer, must be a boolean"),
        key(valid_bert, "bert.attention.head_count", Value::u32(3), "is 3, must divide hidden_size"),
        key(valid_bert, "bert.attention.head_count", Value::u32(0), "is 0, must be an integer of 1 to"),
        key(valid_gpt2, "gpt2.attention.head_count_kv", Value::u32(1), "is 1, which is not supported for this"),
        key(valid_gpt2, "gpt2.attention.key_length", Value::u32(8), "is 8, a head's keys have 16"),
        key(valid_bert, "bert.pooling_type", Value::u32(4), "is 4, which is not supported (supported: 0 none,"),
        key(valid_bert, "bert.pooling_type", Value::string("cls"), "is a string, must be an integer"),
        key(valid_bert, "tokenizer.ggml.token_type_count", Value::u32(0), "is 0, must be an integer of 1 to"),
        key(valid_bert, "tokenizer.ggml.cls_token_id", Value::u32(9), "is 9, must be an integer of 0 to 4"),
        key(valid_bert, "tokenizer.ggml.seperator_token_id", Value::i32(-1), "is -1, must be an integer of 0 to 4"),
        key(valid_bert, "tokenizer.ggml.normalizer.lowercase", Value::u32(1), "is an integer, must be a boolean"),
        key(valid_bert, "tokenizer.ggml.normalizer.strip_accents", Value::string(""), "is a string, must be a boolean"),
        key(
            valid_bert,
            "tokenizer.ggml.tokens",
            Value::strings(&["[UNK]", "[CLS]", "[SEP]", "\u{2581}a", "\u{2581}a"]),
            "has \"\u{2581}a\" twice, at 3 and 4",
        ),
        changed(
            valid_bert,
            "no beginning of a text",
            &|f| f.remove("tokenizer.ggml.cls_token_id"),
            "config",
            "field `tokenizer.ggml.cls_token_id`: is missing, and its default, 101, is no token",
        ),
        changed(
            valid_bert,
            "more kinds of types than rows",
            &|f| f.set("tokenizer.ggml.token_type_count", Value::u32(3)),
            "tensor_shape",
            "`token_types.weight` has shape [2, 32], the model needs [3, 32]",
        ),
        changed(
            valid_bert,
            "no token types",
            &|f| f.tensors.retain(|t| t.name != b"token_types.weight"),
            "missing_tensor",
            "`token_types.weight`",
        ),
        changed(
            valid_bert,
            "a head that ranks",
            &|f| f.tensor("token_embd_norm.bias").name = b"cls.output.bias".into(),
            "missing_tensor",
            "`token_embd_norm.bias`",
        ),
        changed(
            valid_gpt2,
            "a matrix that was not turned",
            &|f| f.tensor("blk.0.ffn_up.weight").sizes.reverse(),
            "tensor_shape",
            "`blk.0.ffn_up.weight` has shape [32, 128], the model needs [128, 32]",
        ),
        changed(
            valid_gpt2,
            "a context of more positions than rows",
            &|f| f.set("gpt2.context_length", Value::u32(33)),
            "tensor_shape",
            "`position_embd.weight` has shape [32, 32], the model needs [33, 32]",
        ),
        changed(
            valid_gpt2,
            "queries apart from keys",
            &|f| f.tensor("blk.0.attn_qkv.weight").name = b"blk.0.attn_q.weight".into(),
            "missing_tensor",
            "`blk.0.attn_qkv.weight`",
        ),
    ]
}
