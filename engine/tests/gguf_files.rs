//! Promise: no GGUF file of any content does more than fail to load, with an error that names the byte or the key. A
//! table of hand-made files, each a valid one with one thing changed, and the error that it must give; a matrix of keys
//! and wrong values; every truncation; every way in which split files can disagree. None may panic, keep a file open, or allocate more than
//! the file justifies.

#[path = "support/counting_allocator.rs"]
mod counting_allocator;
#[path = "support/gguf_encoder_cases.rs"]
mod gguf_encoder_cases;
#[path = "support/gguf_file.rs"]
mod gguf_file;
#[path = "support/gguf_loading.rs"]
mod gguf_loading;
#[path = "support/tiny_model.rs"]
mod tiny_model;

use std::fs;
use std::path::PathBuf;

use counting_allocator::peak_bytes_of;
use gguf_encoder_cases::encoder_cases;
use gguf_file::{GgufFile, GgufTensor, Value, converted, string};
use gguf_loading::{load, open_files_below, try_bytes, valid, valid_bert, valid_gpt2, valid_llama};
use ns_llm::Error;
use safetensors::Dtype;
use tiny_model::{TempFolder, small_config, weights};

/// Bytes of a file, the code of its error, and a text that must occur in the message.
struct Case {
    name: String,
    bytes: Vec<u8>,
    code: &'static str,
    text: String,
}

fn case(name: impl Into<String>, bytes: Vec<u8>, code: &'static str, text: impl Into<String>) -> Case {
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

fn header_cases() -> Vec<Case> {
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

// ---- the promise --------------------------------------------------------------------------------------------------------

/// Every file of the table gives its error and leaves nothing behind; the files they were made from load.
#[test]
fn every_bad_file_gives_its_error() {
    let folder = TempFolder::new("gguf");
    let path = folder.path().join("model.gguf");
    for file in [valid(), valid_llama(), valid_gpt2(), valid_bert()] {
        assert_eq!(try_bytes(&path, &file.bytes(), "valid").0, Ok(()));
    }
    let tables = [header_cases(), tensor_cases(), config_cases(), vocabulary_cases(), llama_cases(), encoder_cases()];
    let cases: Vec<Case> = tables.into_iter().flatten().collect();
    assert!(cases.len() >= 147, "{} cases", cases.len());
    let mut wrong = Vec::new();
    for Case { name, bytes, code, text } in &cases {
        let (result, peak_bytes) = try_bytes(&path, bytes, name);
        match result {
            Err(error) if error.code() == *code && error.to_string().contains(text.as_str()) => {}
            other => wrong.push(format!("{name}: {other:?}")),
        }
        assert!(peak_bytes <= (1 << 20) + 16 * bytes.len() as u64, "{name}: {peak_bytes} bytes for {}", bytes.len());
        assert_eq!(open_files_below(folder.path()), 0, "{name}");
    }
    assert!(wrong.is_empty(), "{} of {} cases:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}

/// A file of less than a kilobyte never makes the loader hold more than a megabyte, whatever it declares.
#[test]
fn small_files_cost_little() {
    let folder = TempFolder::new("gguf");
    let path = folder.path().join("model.gguf");
    let (_, counted) = peak_bytes_of(|| drop(vec![0_u8; 1 << 20]));
    assert!(counted >= 1 << 20, "the counter does not count");
    let mut small = 0;
    for Case { name, bytes, .. } in header_cases().into_iter().filter(|case| case.bytes.len() < 1024) {
        let (result, peak_bytes) = try_bytes(&path, &bytes, &name);
        assert!(matches!(result, Err(Error::Weights { .. })), "{name}");
        assert!(peak_bytes < 1 << 20, "{name}: {peak_bytes} bytes");
        small += 1;
    }
    assert!(small > 25);
}

/// A header of many keys and tensors is read in time and memory in proportion to its bytes: shown with nine thousand of
/// each and ten times as many; a quadratic step would take a hundred times as long.
#[test]
fn long_headers_cost_in_proportion() {
    let folder = TempFolder::new("gguf-long");
    let path = folder.path().join("model.gguf");
    let time_of = |count: usize| {
        let mut file = valid();
        file.keys.extend((0..count / 2).map(|i| (format!("extra.{i}").into_bytes(), Value::bool(true))));
        let data = vec![0; 4];
        file.tensors.extend((0..count).map(|i| GgufTensor {
            name: format!("extra.{i}").into_bytes(),
            sizes: vec![1],
            kind: 0,
            data: data.clone(),
            offset: None,
        }));
        let bytes = file.bytes();
        let start = std::time::Instant::now();
        let (result, peak_bytes) = try_bytes(&path, &bytes, "long");
        assert_eq!(result.map_err(|e| e.code()), Err("unused_tensors"));
        assert!(peak_bytes <= (64 << 20) + 4 * bytes.len() as u64, "{peak_bytes} bytes for {}", bytes.len());
        start.elapsed().as_secs_f64()
    };
    let (short, long) = (time_of(9_000), time_of(90_000));
    println!("{:.0} ms, ten times as long: {:.0} ms", short * 1e3, long * 1e3);
    assert!(long <= 40.0 * short.max(0.005), "{short} s, then {long} s");
}

/// Every key that is read refuses every value of another kind with its name, and a value of the right kind never ends
/// in a panic: a matrix of keys and values.
#[test]
fn every_key_refuses_every_wrong_value() {
    let folder = TempFolder::new("gguf");
    let path = folder.path().join("model.gguf");
    let none: [&str; 0] = [];
    let values = [
        Value::u32(u32::MAX),
        Value::i32(i32::MIN),
        Value::new(10, u64::MAX.to_le_bytes()),
        Value::f32(f32::NAN),
        Value::f32(-1.0),
        Value::bool(true),
        Value::string(""),
        Value::string([0xFF; 3]),
        Value::strings(&none),
        Value::strings(&["x", "y"]),
        Value::i32s(&[]),
        Value::i32s(&[-1, 1]),
        Value::array(7, 2, vec![7, 7]),
        Value::array(6, 1, f32::NAN.to_le_bytes().into()),
    ];
    let mut refused = 0;
    type Valid = fn() -> GgufFile;
    let families: [(Valid, &[&str]); 3] = [
        (
            valid,
            &[
                "general.architecture",
                "general.alignment",
                "qwen3.context_length",
                "qwen3.embedding_length",
                "qwen3.feed_forward_length",
                "qwen3.block_count",
                "qwen3.attention.head_count",
                "qwen3.attention.head_count_kv",
                "qwen3.attention.key_length",
                "qwen3.attention.value_length",
                "qwen3.attention.layer_norm_rms_epsilon",
                "qwen3.rope.freq_base",
                "qwen3.rope.scaling.type",
                "qwen3.pooling_type",
                "tokenizer.ggml.model",
                "tokenizer.ggml.pre",
                "tokenizer.ggml.tokens",
                "tokenizer.ggml.token_type",
                "tokenizer.ggml.eos_token_id",
            ],
        ),
        (
            valid_gpt2,
            &[
                "gpt2.context_length",
                "gpt2.embedding_length",
                "gpt2.feed_forward_length",
                "gpt2.block_count",
                "gpt2.attention.head_count",
                "gpt2.attention.head_count_kv",
                "gpt2.attention.layer_norm_epsilon",
            ],
        ),
        (
            valid_bert,
            &[
                "bert.context_length",
                "bert.embedding_length",
                "bert.feed_forward_length",
                "bert.block_count",
                "bert.attention.head_count",
                "bert.attention.layer_norm_epsilon",
                "bert.attention.causal",
                "bert.pooling_type",
                "tokenizer.ggml.token_type_count",
                "tokenizer.ggml.cls_token_id",
                "tokenizer.ggml.seperator_token_id",
                "tokenizer.ggml.unknown_token_id",
            ],
        ),
    ];
    let keys = families.iter().flat_map(|(valid, keys)| keys.iter().map(move |key| (valid, *key)));
    for (valid, key) in keys {
        for (idx, value) in values.iter().enumerate() {
            // A base of 4,294,967,295 is odd, but a base.
            if (key, idx) == ("qwen3.rope.freq_base", 0) {
                continue;
            }
            let mut file = valid();
            file.set(key, value.clone());
            let (result, _) = try_bytes(&path, &file.bytes(), key);
            let error = result.expect_err(&format!("{key}, value {idx}"));
            let named = error.to_string().contains(key)
                || matches!(error, Error::UnknownArchitecture { .. })
                || matches!(&error, Error::Config { file: "GGUF metadata", .. });
            assert!(named, "{key}, value {idx}: {error}");
            refused += 1;
        }
    }
    assert_eq!(refused, (19 + 7 + 12) * 14 - 1);
}

/// A file of any prefix of a valid one is refused: shown by cutting it at every third byte of its header and at many
/// places of its data.
#[test]
fn every_truncation_is_an_error() {
    let folder = TempFolder::new("gguf");
    let path = folder.path().join("model.gguf");
    let file = valid();
    let (whole, header) = (file.bytes(), file.header().len());
    let mut refused = 0;
    for len in (0..header).step_by(3).chain((header..whole.len()).step_by(997)) {
        let (result, _) = try_bytes(&path, &whole[..len], "truncated");
        assert!(matches!(result, Err(Error::Weights { .. })), "{len} of {}: {result:?}", whole.len());
        refused += 1;
    }
    assert!(refused > 500, "{refused}");
    assert_eq!(try_bytes(&path, &whole, "whole").0, Ok(()));
}

/// A model that no machine has the memory for is refused before its weights are read: shown with a file of two
/// terabytes of nothing, which only has a header.
#[cfg(target_os = "linux")]
#[test]
fn a_model_beyond_all_memory_is_refused_unread() {
    let folder = TempFolder::new("gguf-large");
    let path = folder.path().join("model.gguf");
    let (rows, width) = (1_u64 << 24, 1_u64 << 16);
    // The rest is as wide, so that memory is all that is wrong.
    let mut config = small_config();
    (config["hidden_size"], config["num_hidden_layers"]) = (width.into(), 1.into());
    let mut file = converted(&config, &weights(&config, Dtype::BF16));
    let embedding = file.tensor("token_embd.weight");
    (embedding.sizes, embedding.data) = (vec![width, rows], Vec::new());
    // Data lies in the order of the tensors: the large one goes last.
    let embedding = embedding.clone();
    file.tensors.retain(|tensor| tensor.name != embedding.name);
    file.tensors.push(embedding);
    let bytes = file.bytes();
    fs::write(&path, &bytes).unwrap();
    fs::File::options().write(true).open(&path).unwrap().set_len(bytes.len() as u64 + 2 * rows * width).unwrap();
    let (result, peak_bytes) = peak_bytes_of(|| load(&path));
    assert_eq!(result.map_err(|e| e.code()), Err("out_of_memory"));
    assert!(peak_bytes < 1 << 20, "{peak_bytes} bytes");
}

// ---- split files --------------------------------------------------------------------------------------------------------

/// The small model in `count` files, with what `change` does to file `idx` of them. Returns the first.
fn split(folder: &TempFolder, count: usize, change: impl Fn(usize, &mut GgufFile)) -> PathBuf {
    let whole = valid();
    for idx in 0..count {
        let mut file = whole.clone();
        if idx > 0 {
            file.keys.clear();
        }
        file.tensors = whole.tensors.iter().skip(idx).step_by(count).cloned().collect();
        file.set("split.no", Value::new(2, (idx as u16).to_le_bytes()));
        file.set("split.count", Value::new(2, (count as u16).to_le_bytes()));
        file.set("split.tensors.count", Value::i32(whole.tensors.len() as i32));
        change(idx, &mut file);
        folder.write(&format!("m-{:05}-of-{count:05}.gguf", idx + 1), file.bytes());
    }
    folder.path().join(format!("m-00001-of-{count:05}.gguf"))
}

/// A split model loads from its first file; every way in which its files can disagree is an error that names what.
#[test]
fn split_files_load_together_or_not_at_all() {
    let folder = TempFolder::new("gguf-split");
    assert_eq!(load(&split(&folder, 3, |_, _| ())), Ok(()));
    let second = folder.path().join("m-00002-of-00003.gguf");
    let error = load(&second).unwrap_err().to_string();
    assert!(error.contains("`split.no`: is 1: open the first file"), "{error}");
    type Change = fn(usize, &mut GgufFile);
    let changes: [(Change, &str); 6] = [
        (
            |idx, f| {
                if idx == 1 {
                    f.set("split.no", Value::u32(2))
                }
            },
            "`split.no`: is 2 in m-00002-of-00003.gguf, must be 1",
        ),
        (
            |idx, f| {
                if idx == 1 {
                    f.remove("split.no")
                }
            },
            "`split.no`: is missing in m-00002-of-00003.gguf",
        ),
        (
            |idx, f| {
                if idx == 2 {
                    f.set("split.count", Value::u32(4))
                }
            },
            "`split.count`: is 4 in m-00003-of-00003.gguf",
        ),
        (|_, f| f.set("split.tensors.count", Value::i32(1)), "`split.tensors.count`: is 1, the files have"),
        (|_, f| f.set("split.count", Value::u32(513)), "`split.count`: is 513, must be an integer of 0 to 512"),
        (|_, f| f.set("split.count", Value::u32(2)), "must be called NAME-00001-of-00002.gguf"),
    ];
    for (change, text) in changes {
        let folder = TempFolder::new("gguf-split");
        let error = load(&split(&folder, 3, change)).unwrap_err();
        assert_eq!(error.code(), "config", "{error}");
        assert!(error.to_string().contains(text), "{error}");
        assert_eq!(open_files_below(folder.path()), 0);
    }
    let folder = TempFolder::new("gguf-split");
    let first = split(&folder, 3, |_, _| ());
    fs::copy(folder.path().join("m-00002-of-00003.gguf"), folder.path().join("m-00003-of-00003.gguf")).unwrap();
    assert!(load(&first).unwrap_err().to_string().contains("`split.no`: is 1 in m-00003-of-00003.gguf"));
    fs::remove_file(folder.path().join("m-00003-of-00003.gguf")).unwrap();
    assert!(load(&first).unwrap_err().to_string().contains("belongs to the split, but is not there"));
}

/// A file of a split that is a link to another folder is refused; the file that the caller names may be one.
#[cfg(unix)]
#[test]
fn links_out_of_the_folder_are_refused() {
    use std::os::unix::fs::symlink;
    let (folder, outside) = (TempFolder::new("gguf-links"), TempFolder::new("gguf-outside"));
    let first = split(&folder, 2, |_, _| ());
    let second = folder.path().join("m-00002-of-00002.gguf");
    fs::rename(&second, outside.path().join("second.gguf")).unwrap();
    symlink(outside.path().join("second.gguf"), &second).unwrap();
    let error = load(&first).unwrap_err();
    assert_eq!(error.code(), "io");
    assert!(error.to_string().contains("is a link that leaves the model folder"), "{error}");
    outside.write("whole.gguf", valid().bytes());
    symlink(outside.path().join("whole.gguf"), folder.path().join("link.gguf")).unwrap();
    assert_eq!(load(&folder.path().join("link.gguf")), Ok(()));
    for (name, text) in [("gone.gguf", "gone.gguf"), ("", "has no config.json")] {
        let error = load(&folder.path().join(name)).unwrap_err();
        assert!(error.to_string().contains(text), "{error}");
    }
}
