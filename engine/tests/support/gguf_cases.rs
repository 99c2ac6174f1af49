//! Bad GGUF files, each a valid one with one thing changed, and the error that it must give: the table of `gguf_files.rs`,
//! and what the fuzzing of GGUF begins from.
#![allow(dead_code, reason = "each test program uses a part")]

use crate::gguf_encoder_cases::encoder_cases;
use crate::gguf_file::{GgufFile, GgufTensor, Value, string};
use crate::gguf_loading::{valid, valid_llama};

/// Bytes of a file, the code of its error, and a text that must occur in the message.
pub struct Case {
    pub name: String,
    pub bytes: Vec<u8>,
    pub code: &'static str,
    pub text: String,
}

pub fn case(name: impl Into<String>, bytes: Vec<u8>, code: &'static str, text: impl Into<String>) -> Case {
    Case { name: name.into(), bytes, code, text: text.into() }
}

/// The valid file but for a change.
fn changed(name: &str, change: impl FnOnce(&mut GgufFile), code: &'static str, text: &str) -> Case {
    let mut file = valid();
    change(&mut file);
    case(name, file.bytes(), code, text)
}

fn damaged(name: &str, change: impl FnOnce(&mut GgufFile), text: &str) -> Case {
    changed(name, change, "weights", text)
}

/// One key has another value.
fn key_case(key: &str, value: Value, text: &str) -> Case {
    let named = format!("GGUF metadata: field `{key}`: {text}");
    changed(&format!("{key}: {text}"), |file| file.set(key, value), "config", &named)
}

/// Nothing but a header that begins with `bytes`.
fn raw_case(name: &str, parts: &[&[u8]], text: &str) -> Case {
    case(name, parts.concat(), "weights", text)
}

const NORM: &str = "output_norm.weight";

// ---- the table ----------------------------------------------------------------------------------------------------------

pub fn header_cases() -> Vec<Case> {
    let start = |version: u32, tensors: u64, keys: u64| {
        [&b"GGUF"[..], &version.to_le_bytes(), &tensors.to_le_bytes(), &keys.to_le_bytes()].concat()
    };
    let filled = |start: Vec<u8>| [start, vec![0; 512]].concat();
    let key = |name: &[u8], kind: u32, value: &[u8]| {
        [&start(3, 0, 1)[..], &string(name), &kind.to_le_bytes(), value, &[0; 64]].concat()
    };
    let array = |kind: u32, len: u64| [&kind.to_le_bytes()[..], &len.to_le_bytes()].concat();
    vec![
        raw_case("empty file", &[], "the magic number needs 4 bytes, the file has 0 left"),
        raw_case("half a magic number", &[b"GG"], "the magic number needs 4 bytes, the file has 2 left"),
        raw_case("another format", &[b"GGML", &[0; 64]], "at byte 0: is no GGUF file: it begins with \"GGML\""),
        raw_case("an archive", &[b"PK\x03\x04", &[0; 64]], "is no GGUF file"),
        raw_case("no version", &[b"GGUF"], "at byte 4: the version needs 4 bytes, the file has 0 left"),
        raw_case("version 0", &[&start(0, 0, 0)], "at byte 4: is of version 0"),
        raw_case("version 1", &[&start(1, 0, 0)], "is of version 1, which is not supported (supported: 2, 3)"),
        raw_case("version 4", &[&start(4, 0, 0)], "is of version 4"),
        raw_case("big-endian", &[b"GGUF", &3_u32.to_be_bytes(), &[0; 16]], "is big-endian"),
        raw_case("no counts", &[b"GGUF", &3_u32.to_le_bytes()], "at byte 8: the number of tensors needs 8 bytes"),
        raw_case("more tensors than fit", &[&filled(start(3, 1000, 0))], "at byte 8: 1000 tensors need more than the"),
        raw_case("2^64 - 1 tensors", &[&filled(start(3, u64::MAX, 0))], "18446744073709551615 tensors, at most 100000"),
        raw_case("2^60 tensors", &[&filled(start(3, 1 << 60, 0))], "at most 100000 are allowed"),
        raw_case("more keys than fit", &[&filled(start(3, 0, 1000))], "at byte 16: 1000 keys need more than the"),
        raw_case("2^63 keys", &[&filled(start(3, 0, 1 << 63))], "9223372036854775808 keys, at most 65536"),
        raw_case("key without a name", &[&filled(start(3, 0, 1))], "at byte 24: a key of 0 bytes, must be 1 to 65535"),
        raw_case(
            "key of 2^64 - 1 bytes",
            &[&start(3, 0, 1), &u64::MAX.to_le_bytes(), &[0; 64]],
            "a key of 18446744073709551615 bytes, must be 1 to 65535",
        ),
        raw_case(
            "key beyond the file",
            &[&start(3, 0, 1), &1000_u64.to_le_bytes(), &[b'a'; 64]],
            "at byte 32: a key needs 1000 bytes, the file has 64 left",
        ),
        raw_case("key is not UTF-8", &[&key(b"a\xFF", 4, &[0; 4])], "at byte 32: a key is not UTF-8 from byte 1"),
        raw_case("value of type 13", &[&key(b"a", 13, &[0; 4])], "at byte 33: `a` is of type number 13"),
        raw_case("value of type 2^32 - 1", &[&key(b"a", u32::MAX, &[])], "`a` is of type number 4294967295"),
        raw_case("boolean of 2", &[&key(b"a", 7, &[2])], "`a` is a boolean of [2], must be 0 or 1"),
        raw_case(
            "string beyond the file",
            &[&key(b"a", 8, &1000_u64.to_le_bytes())],
            "at byte 45: `a` needs 1000 bytes, the file has 64 left",
        ),
        raw_case(
            "string of 2^64 - 1 bytes",
            &[&key(b"a", 8, &u64::MAX.to_le_bytes())],
            "`a` needs 18446744073709551615 bytes",
        ),
        raw_case(
            "array beyond the file",
            &[&key(b"a", 9, &array(4, 17))],
            "`a` of 17 entries needs 68 bytes, the file has 64 left",
        ),
        raw_case(
            "array whose bytes wrap",
            &[&key(b"a", 9, &array(10, 1 << 61))],
            "`a` has 2305843009213693952 entries",
        ),
        raw_case(
            "array of 2^40 strings",
            &[&key(b"a", 9, &array(8, 1 << 40))],
            "`a` of 1099511627776 entries needs 8796093022208 bytes",
        ),
        raw_case("array of arrays", &[&key(b"a", 9, &array(9, 1))], "`a` is an array of arrays"),
        raw_case("array of type 13", &[&key(b"a", 9, &array(13, 1))], "`a` is of type number 13"),
        raw_case(
            "key without a value",
            &[&start(3, 0, 1), &string(b"general.x")],
            "the type of `general.x` needs 4 bytes",
        ),
        damaged(
            "a key twice",
            |file| file.keys.push(file.keys[0].clone()),
            "key `general.architecture` is there twice",
        ),
        damaged(
            "one key fewer than said",
            |file| file.num_keys = Some(file.keys.len() as u64 + 1),
            "must be 1 to 65535",
        ),
    ]
}

fn tensor_cases() -> Vec<Case> {
    vec![
        damaged(
            "a tensor twice",
            |f| f.tensors.push(f.tensors[0].clone()),
            "tensor `token_embd.weight` is there twice",
        ),
        damaged("a tensor without a name", |f| f.tensor(NORM).name.clear(), "a tensor's name of 0 bytes"),
        damaged(
            "a tensor's name is not UTF-8",
            |f| f.tensor(NORM).name = vec![0xC3, 0x28],
            "a tensor's name is not UTF-8",
        ),
        damaged("no axes", |f| f.tensor(NORM).sizes.clear(), "tensor `output_norm.weight` has 0 axes, must be 1 to 4"),
        damaged("five axes", |f| f.tensor(NORM).sizes = vec![32, 1, 1, 1, 1], "has 5 axes, must be 1 to 4"),
        damaged("an empty axis", |f| f.tensor(NORM).sizes = vec![32, 0], "has an empty axis, its sizes are [32, 0]"),
        damaged(
            "a product that wraps",
            |f| f.tensor(NORM).sizes = vec![1 << 32, 1 << 32],
            "has no size below 2^64 bytes",
        ),
        damaged("bytes that wrap", |f| f.tensor(NORM).sizes = vec![1 << 63], "has no size below 2^64 bytes"),
        damaged(
            "a product that wraps to something small",
            |f| f.tensor(NORM).sizes = vec![(1 << 62) + 8, 4],
            "has no size below 2^64 bytes",
        ),
        damaged(
            "blocks that wrap",
            |f| {
                f.tensor(NORM).kind = 8;
                f.tensor(NORM).sizes = vec![u64::MAX - 31];
            },
            "of sizes [18446744073709551584] and type Q8_0 has no size below 2^64 bytes",
        ),
        damaged("type of number 99", |f| f.tensor(NORM).kind = 99, "`output_norm.weight` is of type number 99"),
        damaged("type IQ2_XXS", |f| f.tensor(NORM).kind = 16, "is of type IQ2_XXS, which is not supported"),
        damaged("type that was removed", |f| f.tensor(NORM).kind = 4, "is of type Q4_2, which is not supported"),
        damaged(
            "rows that are no whole blocks",
            |f| {
                f.tensor(NORM).kind = 12;
                f.tensor(NORM).sizes = vec![32];
            },
            "has rows of 32, Q4_K has blocks of 256",
        ),
        damaged(
            "a place that is not aligned",
            |f| f.tensor(NORM).offset = Some(7),
            "data byte 7, which is no multiple of 32",
        ),
        damaged(
            "a place beyond the file",
            |f| f.tensor(NORM).offset = Some(1 << 40),
            "from data byte 1099511627776 on",
        ),
        damaged(
            "a place that wraps",
            |f| f.tensor(NORM).offset = Some(u64::MAX - 31),
            "from data byte 18446744073709551584",
        ),
        damaged(
            "two tensors in one place",
            |f| f.tensor(NORM).offset = Some(0),
            "begins at data byte 0, the one before ends at",
        ),
        damaged("a tensor inside another", |f| f.tensor(NORM).offset = Some(64), "begins at data byte"),
        damaged("a tensor larger than the file", |f| f.tensor(NORM).sizes = vec![1 << 40], "needs 2199023255552 bytes"),
        damaged(
            "one tensor fewer than said",
            |f| f.num_tensors = Some(f.tensors.len() as u64 + 1),
            "a tensor's name of 0 bytes",
        ),
        changed(
            "a norm is missing",
            |f| f.tensors.retain(|tensor| tensor.name != NORM.as_bytes()),
            "missing_tensor",
            "tensor `output_norm.weight` is missing",
        ),
        changed("no tensors at all", |f| f.tensors.clear(), "config", "field `qwen3.vocab_size`: is missing"),
        changed(
            "a tensor too many",
            |f| f.tensors.push(GgufTensor { name: "blk.9.attn_q.weight".into(), ..f.tensors[0].clone() }),
            "unused_tensors",
            "1 tensors are not used by the model, the first is `blk.9.attn_q.weight`",
        ),
        changed(
            "fused projections",
            |f| f.tensor("blk.0.attn_q.weight").name = b"blk.0.attn_qkv.weight".into(),
            "missing_tensor",
            "`blk.0.attn_q.weight` is missing",
        ),
        changed(
            "a tensor under both of its names",
            |f| {
                let tensor = f.tensor(NORM).clone();
                f.tensors.push(GgufTensor { name: "model.norm.weight".into(), ..tensor });
            },
            "weights",
            "tensor `output_norm.weight` is also in",
        ),
        changed(
            "a transposed matrix",
            |f| f.tensor("blk.1.ffn_up.weight").sizes.reverse(),
            "tensor_shape",
            "`blk.1.ffn_up.weight` has shape [32, 48], the model needs [48, 32]",
        ),
        changed("a tensor of integers", |f| f.tensor(NORM).kind = 25, "tensor_dtype", "`output_norm.weight` is I16"),
        changed(
            "frequencies that are not llama's",
            |f| {
                let tensor = GgufTensor { sizes: vec![8], kind: 0, data: vec![0; 32], ..f.tensor(NORM).clone() };
                f.tensors.push(GgufTensor { name: "rope_freqs.weight".into(), ..tensor });
            },
            "unused_tensors",
            "`rope_freqs.weight`",
        ),
    ]
}

fn config_cases() -> Vec<Case> {
    vec![
        changed(
            "no architecture",
            |f| f.remove("general.architecture"),
            "config",
            "GGUF metadata: field `general.architecture`: is missing",
        ),
        changed(
            "an unknown architecture",
            |f| f.set("general.architecture", Value::string("mamba")),
            "unknown_architecture",
            "`mamba` is not supported (supported: llama, qwen2, qwen3, gpt2, bert)",
        ),
        key_case("general.architecture", Value::u32(1), "is an integer, must be a string"),
        key_case("general.architecture", Value::string([0xFF]), "is not UTF-8 from byte 0"),
        key_case("general.alignment", Value::u32(0), "is 0, must be a power of two"),
        key_case("general.alignment", Value::u32(48), "is 48, must be a power of two"),
        key_case("general.alignment", Value::u32(1 << 31), "is 2147483648, must be an integer of 0 to 1048576"),
        key_case("general.alignment", Value::i32(-32), "is -32, must be an integer of 0 to 1048576"),
        key_case("general.alignment", Value::string("32"), "is a string, must be an integer"),
        key_case("qwen3.block_count", Value::u32(0), "is 0, must be an integer of 1 to 1024"),
        key_case("qwen3.block_count", Value::u32(u32::MAX), "is 4294967295, must be an integer of 1 to 1024"),
        key_case("qwen3.block_count", Value::f32(2.0), "is 2.0, must be an integer"),
        key_case("qwen3.embedding_length", Value::string("32"), "is a string, must be an integer"),
        key_case("qwen3.attention.head_count_kv", Value::i32s(&[1, 2]), "differs from layer to layer"),
        key_case("qwen3.attention.head_count_kv", Value::u32(3), "is 3, must divide num_attention_heads"),
        changed(
            "odd heads",
            |f| {
                f.set("qwen3.attention.key_length", Value::u32(15));
                f.set("qwen3.attention.value_length", Value::u32(15));
            },
            "config",
            "GGUF metadata: field `qwen3.attention.key_length`: is 15, must be even",
        ),
        key_case("qwen3.attention.value_length", Value::u32(8), "is 8, a head's keys have 16"),
        key_case("qwen3.rope.dimension_count", Value::u32(8), "is 8, a head's keys have 16"),
        key_case("qwen3.attention.layer_norm_rms_epsilon", Value::f32(f32::NAN), "is NaN, must be finite"),
        key_case("qwen3.attention.layer_norm_rms_epsilon", Value::f32(-1.0), "is -1, must be"),
        key_case("qwen3.rope.freq_base", Value::f32(0.0), "is 0, must be 1"),
        key_case("qwen3.rope.freq_base", Value::f32(f32::INFINITY), "is inf, must be finite"),
        key_case("qwen3.rope.scaling.type", Value::string("yarn"), "is \"yarn\", which is not supported"),
        key_case("qwen3.rope.scaling.type", Value::bool(true), "is a boolean, must be a string"),
        key_case("qwen3.expert_count", Value::u32(8), "is 8, which is not supported"),
        key_case(
            "qwen3.attention.sliding_window",
            Value::u32(8),
            "is set, which is not supported for this architecture",
        ),
        changed(
            "linear scaling without a factor",
            |f| f.set("qwen3.rope.scaling.type", Value::string("linear")),
            "config",
            "GGUF metadata: field `qwen3.rope.scaling.factor`: is missing",
        ),
        changed(
            "no layers",
            |f| f.remove("qwen3.block_count"),
            "config",
            "GGUF metadata: field `qwen3.block_count`: is missing",
        ),
        changed(
            "a layer more than there is",
            |f| f.set("qwen3.block_count", Value::u32(3)),
            "missing_tensor",
            "`blk.2.",
        ),
    ]
}

fn vocabulary_cases() -> Vec<Case> {
    let key = |suffix: &str, value: Value, text: &str| key_case(&format!("tokenizer.ggml.{suffix}"), value, text);
    let missing = |suffix: &str| {
        let key = format!("tokenizer.ggml.{suffix}");
        changed(&format!("no {key}"), |file| file.remove(&key), "config", &format!("field `{key}`: is missing"))
    };
    let entry = |key: &str, value: Value, text: &str| {
        let named = format!("field `tokenizer.ggml.{key}[1]`: {text}");
        changed(&named, |file| file.set(&format!("tokenizer.ggml.{key}"), value), "config", &named)
    };
    let scored = |name: &str, change: fn(&mut GgufFile), text: &str| {
        let scored = |file: &mut GgufFile| {
            file.set("tokenizer.ggml.model", Value::string("llama"));
            file.set("tokenizer.ggml.scores", Value::f32s(&[0.0, -1.0, -2.0]));
            change(file);
        };
        changed(name, scored, "config", &format!("GGUF metadata: field `tokenizer.ggml.{text}"))
    };
    let none: [&str; 0] = [];
    vec![
        missing("model"),
        missing("tokens"),
        missing("merges"),
        key("model", Value::string("rwkv"), "is \"rwkv\", which is not supported"),
        key("model", Value::u32(0), "is an integer, must be a string"),
        scored("no scores", |f| f.remove("tokenizer.ggml.scores"), "scores`: is missing"),
        scored(
            "two scores",
            |f| f.set("tokenizer.ggml.scores", Value::f32s(&[0.0, 0.0])),
            "scores`: has 2 entries, must",
        ),
        scored(
            "scores that are bytes",
            |f| f.set("tokenizer.ggml.scores", Value::array(0, 3, vec![1, 2, 3])),
            "scores`: holds something else, must be an array of finite floats",
        ),
        scored(
            "a score that is no number",
            |f| f.set("tokenizer.ggml.scores", Value::f32s(&[0.0, f32::NAN, 0.0])),
            "scores`: holds something else, must be an array of finite floats",
        ),
        scored(
            "a piece of a kilobyte",
            |f| f.set("tokenizer.ggml.tokens", Value::strings(&["a", "b", &"a".repeat(1000)])),
            "tokens[2]`: has 1000 bytes, at most 256 are allowed",
        ),
        key("pre", Value::string("fancy"), "is \"fancy\", which is not supported (supported: default, gpt-2,"),
        key("tokens", Value::strings(&none), "has 0 entries, must have 1 to 4194304"),
        key("tokens", Value::string("ab"), "is a string, must be an array of strings"),
        key("tokens", Value::i32s(&[1, 2, 3]), "is an array of numbers, must be an array of strings"),
        key("tokens", Value::strings(&["a"; 97]), "has 97 entries, the embedding has 96 rows"),
        key("tokens", Value::strings(&["a", "b", "a"]), "has \"a\" twice, at 0 and 2"),
        entry("tokens", Value::strings(&[&b"a"[..], b"b\xFF", b"ab"]), "is not UTF-8 from byte 1"),
        key("token_type", Value::i32s(&[1, 1]), "has 2 entries, must have 3"),
        key("token_type", Value::strings(&["1", "1", "1"]), "is an array of strings, must be an array of integers"),
        key("token_type", Value::f32s(&[1.0, 1.0, 1.0]), "holds something else, must be an array of integers"),
        entry("token_type", Value::i32s(&[1, 7, 1]), "is 7, types are 0 to 6"),
        entry("token_type", Value::i32s(&[1, -1, 1]), "is -1, types are 0 to 6"),
        key("merges", Value::u32(1), "is an integer, must be an array of strings"),
        entry("merges", Value::strings(&["a b", "ab"]), "is \"ab\", must be two tokens"),
        entry("merges", Value::strings(&["a b", " b"]), "is \" b\", must be two tokens"),
        entry("merges", Value::strings(&["a b", "b a"]), "needs the token \"ba\", which is not in the vocabulary"),
        entry("merges", Value::strings(&[&b"a b"[..], b"\xFF b"]), "is not UTF-8 from byte 0"),
        key("eos_token_id", Value::u32(3), "is 3, must be an integer of 0 to 2"),
        key("eos_token_id", Value::i32(-1), "is -1, must be an integer of 0 to 95"),
        key("bos_token_id", Value::string("a"), "is a string, must be an integer"),
        key("eot_token_id", Value::u32(u32::MAX), "is 4294967295, must be an integer of 0 to 2"),
        key("add_bos_token", Value::u32(1), "is an integer, must be a boolean"),
        key("add_bos_token", Value::bool(true), "is set, but no bos_token is named"),
        key_case("tokenizer.chat_template", Value::u32(1), "is an integer, must be a string"),
        key_case(
            "tokenizer.chat_template",
            Value::string(vec![b' '; (1 << 20) + 1]),
            "has 1048577 bytes, at most 1048576",
        ),
        changed(
            "a template that does not end",
            |f| f.set("tokenizer.chat_template", Value::string("{% for message in messages %}")),
            "template",
            "expected end of block (line 1)",
        ),
        changed(
            "an end token that is unused",
            |f| f.set("tokenizer.ggml.token_type", Value::i32s(&[1, 1, 5])),
            "config",
            "field `tokenizer.ggml.eos_token_id`: is 2, a token that is empty or said to be unused",
        ),
        changed(
            "a merge of unused tokens",
            |f| {
                f.remove("tokenizer.ggml.eos_token_id");
                f.set("tokenizer.ggml.token_type", Value::i32s(&[1, 1, 5]));
            },
            "config",
            "field `tokenizer.ggml.merges[0]`: needs the token \"ab\"",
        ),
    ]
}

fn llama_cases() -> Vec<Case> {
    let llama = |name: &str, change: &dyn Fn(&mut GgufFile), code: &'static str, text: &str| {
        let mut file = valid_llama();
        change(&mut file);
        case(name, file.bytes(), code, text)
    };
    let factors = |change: fn(&mut GgufTensor)| move |file: &mut GgufFile| change(file.tensor("rope_freqs.weight"));
    let unrecognised = "tensor `rope_freqs.weight` does not stretch frequencies as Llama 3.1 does";
    vec![
        llama("other factors", &factors(|t| t.data[3] = 0x40), "weights", unrecognised),
        llama("factors that are no numbers", &factors(|t| t.data.fill(0xFF)), "weights", unrecognised),
        llama(
            "factors of another type",
            &factors(|t| t.kind = 26),
            "weights",
            "is not one of at most 256 numbers of type F32",
        ),
        llama(
            "too many factors",
            &factors(|t| (t.sizes, t.data) = (vec![257], vec![0; 257 * 4])),
            "weights",
            "is not one of at most 256 numbers",
        ),
        llama(
            "heads that do not fit the rows",
            &|f| f.set("llama.attention.head_count", Value::u32(4)),
            "tensor_shape",
            "`blk.0.attn_q.weight` has shape [32, 32], the model needs [64, 32]",
        ),
        llama(
            "a bias in blocks",
            &|f| {
                let bias = f.tensor("blk.0.attn_q.bias");
                (bias.kind, bias.data) = (8, vec![0; 34]);
            },
            "tensor_dtype",
            "`model.layers.0.self_attn.q_proj.bias` is Q8_0",
        ),
        llama(
            "a bias that is missing",
            &|f| f.tensors.retain(|t| t.name != b"blk.0.attn_output.bias"),
            "missing_tensor",
            "`blk.0.attn_output.bias`",
        ),
    ]
}

/// All of them.
pub fn all_cases() -> Vec<Case> {
    let tables = [header_cases(), tensor_cases(), config_cases(), vocabulary_cases(), llama_cases(), encoder_cases()];
    tables.into_iter().flatten().collect()
}
