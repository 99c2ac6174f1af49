//! Bad model folders, each a valid one with one thing changed, and the error that it must give: the table of
//! `malformed_files.rs`, and what the fuzzing of folders begins from.
#![allow(dead_code, reason = "each test program uses a part")]

use std::fs;

use safetensors::Dtype;
use serde_json::{Value, json};

use crate::encoder_cases::encoder_cases;
use crate::tiny_model::{TempFolder, TensorData, small_config, weights, write_model, write_weights};

// ---- how a folder is made -----------------------------------------------------------------------------------------------

/// A valid folder that `change` turns into a bad one, the code of its error, and a text that must occur in the message.
pub struct Case {
    pub name: String,
    pub change: Box<dyn Fn(&TempFolder)>,
    pub code: &'static str,
    pub text: String,
}

pub fn case(name: &str, change: impl Fn(&TempFolder) + 'static, code: &'static str, text: &str) -> Case {
    Case { name: name.to_string(), change: Box::new(change), code, text: text.to_string() }
}

pub fn valid_folder() -> TempFolder {
    let folder = TempFolder::new("malformed");
    write_model(&folder, &small_config(), Dtype::BF16, 1);
    folder.write("generation_config.json", r#"{"eos_token_id": [2], "temperature": 0.7}"#);
    folder.write("tokenizer_config.json", r#"{"eos_token": "b", "chat_template": "{{ messages[0].content }}"}"#);
    folder.write("tokenizer.json", tokenizer().to_string());
    folder
}

/// The smallest tokenizer that can encode something.
fn tokenizer() -> Value {
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
    })
}

fn remove(folder: &TempFolder, name: &str) {
    fs::remove_file(folder.path().join(name)).unwrap();
}

/// A change of one field of `config.json`.
fn config_case(field: &'static str, value: Value, code: &'static str, text: &str) -> Case {
    let name = format!("config.json with {field} = {value}");
    let change = move |folder: &TempFolder| {
        let mut config = small_config();
        config[field] = value.clone();
        folder.write("config.json", config.to_string());
    };
    case(&name, change, code, text)
}

/// A `model.safetensors` of this header and so many bytes of data.
fn header_case(name: &str, header: impl Into<Vec<u8>>, data_bytes: usize, text: &str) -> Case {
    let header = header.into();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    file.resize(file.len() + data_bytes, 0);
    file_case(name, file, text)
}

fn file_case(name: &str, file: Vec<u8>, text: &str) -> Case {
    case(name, move |folder| folder.write("model.safetensors", &file), "weights", text)
}

/// The right tensors but for a change.
fn tensor_case(
    name: &str,
    change: impl Fn(&mut Vec<(String, TensorData)>) + 'static,
    code: &'static str,
    text: &str,
) -> Case {
    let change = move |folder: &TempFolder| {
        let mut tensors = weights(&small_config(), Dtype::BF16);
        change(&mut tensors);
        write_weights(folder, &tensors, 1);
    };
    case(name, change, code, text)
}

/// The model in two shards, and a change of the index.
fn index_case(name: &str, change: impl Fn(&mut Value) + 'static, code: &'static str, text: &str) -> Case {
    let change = move |folder: &TempFolder| {
        sharded(folder);
        let path = folder.path().join("model.safetensors.index.json");
        let mut index = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        change(&mut index);
        fs::write(path, index.to_string()).unwrap();
    };
    case(name, change, code, text)
}

fn sharded(folder: &TempFolder) {
    remove(folder, "model.safetensors");
    write_weights(folder, &weights(&small_config(), Dtype::BF16), 2);
}

const NORM: &str = "model.norm.weight";

pub fn tensor<'a>(tensors: &'a mut [(String, TensorData)], name: &str) -> &'a mut TensorData {
    &mut tensors.iter_mut().find(|(other, _)| other == name).expect("a tensor of the small model").1
}

// ---- the table ----------------------------------------------------------------------------------------------------------

fn folder_cases() -> Vec<Case> {
    let write = |name: &'static str, content: &'static str| move |folder: &TempFolder| folder.write(name, content);
    let without = |name: &'static str| move |folder: &TempFolder| remove(folder, name);
    let bomb = |folder: &TempFolder| folder.write("config.json", format!("{{\"a\":{}", "[".repeat(1_000_000)));
    let large = |folder: &TempFolder| folder.write("generation_config.json", vec![b' '; (4 << 20) + 1]);
    let pipe = |folder: &TempFolder| {
        remove(folder, "config.json");
        fs::create_dir(folder.path().join("config.json")).unwrap();
    };
    vec![
        case("no config.json", without("config.json"), "missing_file", "has no config.json"),
        case("no weights", without("model.safetensors"), "missing_file", "model.safetensors.index.json"),
        case("no tokenizer.json", without("tokenizer.json"), "missing_file", "has no tokenizer.json"),
        case(
            "config.json is empty",
            write("config.json", ""),
            "invalid_json",
            "config.json is not valid JSON at line 1",
        ),
        case("config.json is cut off", write("config.json", "{\"a\":"), "invalid_json", "EOF"),
        case("config.json is a list", write("config.json", "[]"), "invalid_json", "expected a map"),
        case("config.json holds NaN", write("config.json", "{\"rms_norm_eps\": NaN}"), "invalid_json", "expected"),
        case("config.json nests a million deep", bomb, "invalid_json", "recursion limit"),
        case("config.json is no file", pipe, "io", "is not a regular file"),
        case("generation_config.json is too large", large, "io", "is larger than 4194304 bytes"),
        case(
            "generation_config.json of a wrong type",
            write("generation_config.json", r#"{"top_k": "many"}"#),
            "config",
            "field `top_k`",
        ),
        case(
            "generation_config.json out of range",
            write("generation_config.json", r#"{"top_p": 1.5}"#),
            "config",
            "is 1.5, must be",
        ),
        case(
            "generation_config.json ends nowhere",
            write("generation_config.json", r#"{"eos_token_id": -1}"#),
            "config",
            "`eos_token_id`: is -1",
        ),
        case(
            "tokenizer_config.json of a wrong type",
            write("tokenizer_config.json", r#"{"eos_token": 2}"#),
            "config",
            "field `eos_token`",
        ),
        case(
            "tokenizer_config.json is not UTF-8",
            |f| f.write("tokenizer_config.json", [b'"', 0xFF]),
            "invalid_json",
            "tokenizer_config.json",
        ),
        case(
            "chat_template.jinja is not UTF-8",
            |f| f.write("chat_template.jinja", [b'a', 0xFF]),
            "io",
            "is not UTF-8 at byte 1",
        ),
    ]
}

fn text_cases() -> Vec<Case> {
    let tokenizer_with = |field: &'static str, value: Value| {
        move |folder: &TempFolder| {
            let mut changed = tokenizer();
            changed[field] = value.clone();
            folder.write("tokenizer.json", changed.to_string());
        }
    };
    let template = |text: &'static str| {
        move |folder: &TempFolder| {
            folder.write("tokenizer_config.json", json!({ "chat_template": text }).to_string());
        }
    };
    let long = |folder: &TempFolder| folder.write("chat_template.jinja", vec![b' '; (1 << 20) + 1]);
    let far_eos = |folder: &TempFolder| folder.write("generation_config.json", r#"{"eos_token_id": 96}"#);
    vec![
        case(
            "tokenizer.json is empty",
            |f| f.write("tokenizer.json", ""),
            "config",
            "tokenizer.json: field `(root)`: EOF",
        ),
        case("tokenizer.json is a list", |f| f.write("tokenizer.json", "[]"), "config", "invalid type: sequence"),
        case(
            "tokenizer.json without a model",
            tokenizer_with("model", json!(null)),
            "config",
            "tokenizer.json: field `(root)`: data did not match",
        ),
        case(
            "tokenizer.json of an unknown decoder",
            tokenizer_with("decoder", json!({"type": "Fancy"})),
            "config",
            "tokenizer.json: field `(root)`: data did not match",
        ),
        case(
            "tokenizer.json nests too deep",
            |f| f.write("tokenizer.json", "[".repeat(100_000)),
            "config",
            "recursion limit exceeded",
        ),
        case(
            "chat template with an open block",
            template("{% for message in messages %}"),
            "template",
            "expected end of block (line 1)",
        ),
        case(
            "chat template of the wrong type",
            |f| f.write("tokenizer_config.json", r#"{"chat_template": 1}"#),
            "config",
            "`chat_template`: is neither a string nor a list",
        ),
        case("chat template too long", long, "io", "is larger than 1048576 bytes"),
        case(
            "end token outside the vocabulary",
            far_eos,
            "config",
            "`eos_token_id`: 96 is outside the vocabulary of 96",
        ),
    ]
}

fn config_cases() -> Vec<Case> {
    let llama3 =
        |high: f64| json!({"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": high});
    vec![
        config_case("architectures", json!(["MambaForCausalLM"]), "unknown_architecture", "MambaForCausalLM"),
        config_case("architectures", json!(null), "config", "`architectures`: is missing"),
        config_case("architectures", json!([]), "config", "has 0 entries, must have one"),
        config_case("vocab_size", json!(0), "config", "`vocab_size`: is 0, must be an integer of 1 to 16777216"),
        config_case("vocab_size", json!("96"), "config", "`vocab_size`: is a string, must be an integer"),
        config_case("hidden_size", json!(null), "config", "`hidden_size`: is missing"),
        config_case("hidden_size", json!(-32), "config", "`hidden_size`: is -32"),
        config_case("hidden_size", json!(1e30), "config", "`hidden_size`: is 1e+30, must be an integer"),
        config_case("hidden_size", json!(33), "tensor_shape", "model.embed_tokens.weight"),
        config_case("intermediate_size", json!(32.5), "config", "`intermediate_size`: is 32.5"),
        config_case("num_hidden_layers", json!(u64::MAX), "config", "`num_hidden_layers`: is 18446744073709551615"),
        config_case("num_hidden_layers", json!(3), "missing_tensor", "model.layers.2."),
        config_case("num_hidden_layers", json!(1), "unused_tensors", "11 tensors"),
        config_case("num_attention_heads", json!(0), "config", "`num_attention_heads`: is 0"),
        config_case("num_key_value_heads", json!(3), "config", "is 3, must divide num_attention_heads, which is 2"),
        config_case(
            "num_key_value_heads",
            json!(2),
            "tensor_shape",
            "k_proj.weight` has shape [16, 32], the model needs [32, 32]",
        ),
        config_case("head_dim", json!(15), "config", "`head_dim`: is 15, must be even"),
        config_case("head_dim", json!(100_000), "config", "`head_dim`: is 100000"),
        config_case("max_position_embeddings", json!([]), "config", "`max_position_embeddings`: is an array"),
        config_case("rms_norm_eps", json!(-1e-6), "config", "`rms_norm_eps`: is -0.000001"),
        config_case("rope_theta", json!(0), "config", "`rope_theta`: is 0"),
        config_case(
            "rope_scaling",
            json!({"rope_type": "yarn", "factor": 4}),
            "config",
            "is \"yarn\", which is not supported",
        ),
        config_case("rope_scaling", json!({"rope_type": "linear"}), "config", "`rope_scaling.factor`: is missing"),
        config_case("rope_scaling", llama3(4.0), "config", "`rope_scaling.high_freq_factor`: is 4, must be above"),
        config_case("hidden_act", json!("gelu"), "config", "is \"gelu\", must be \"silu\""),
        config_case("tie_word_embeddings", json!("yes"), "config", "`tie_word_embeddings`: is a string"),
        config_case("tie_word_embeddings", json!(false), "missing_tensor", "lm_head.weight"),
        config_case("attention_bias", json!(true), "missing_tensor", "q_proj.bias"),
        config_case("eos_token_id", json!(96), "config", "`eos_token_id`: is 96, must be an integer of 0 to 95"),
    ]
}

pub fn header_cases() -> Vec<Case> {
    let entry = |dtype: &str, shape: &str, start: u64, end: u64| {
        format!(r#"{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{start},{end}]}}"#)
    };
    let one =
        |dtype: &str, shape: &str, start: u64, end: u64| format!(r#"{{"a":{}}}"#, entry(dtype, shape, start, end));
    let two = |a: String, b: String| format!(r#"{{"a":{a},"b":{b}}}"#);
    let declares = |len: u64| [&len.to_le_bytes()[..], b"{}"].concat();
    vec![
        file_case("empty file", vec![], "the file has 0 bytes"),
        file_case("half a header length", vec![1, 0, 0], "the file has 3 bytes"),
        file_case("header beyond the file", declares(3), "header of 3 bytes, the file has 2 left"),
        file_case("header of 2^63 bytes", declares(1 << 63), "header of 9223372036854775808 bytes, at most 100000000"),
        file_case("header of 2^64 - 1 bytes", declares(u64::MAX), "header of 18446744073709551615 bytes"),
        header_case("header is not UTF-8", [b'{', 0xFF, b'}'], 0, "at byte 9: the header is not UTF-8"),
        header_case("header is not JSON", "{\"a\": nonsense}", 0, "model.safetensors at byte"),
        header_case("header is a list", "[]", 0, "an object with one entry for each tensor"),
        header_case("header nests too deep", format!("{{\"a\":{}", "[".repeat(100_000)), 0, "header: "),
        header_case(
            "header lists a tensor twice",
            r#"{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#,
            0,
            "tensor `a` is listed twice",
        ),
        header_case(
            "metadata hides a depth bomb",
            format!("{{\"__metadata__\":{}", "{\"a\":".repeat(100_000)),
            0,
            "header: EOF",
        ),
        header_case("element type is unknown", one("F7", "[1]", 0, 4), 4, "unknown variant `F7`"),
        header_case("entry has no shape", r#"{"a":{"dtype":"F32","data_offsets":[0,4]}}"#, 4, "missing field `shape`"),
        header_case(
            "entry has a stray field",
            r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"b":1}}"#,
            4,
            "unknown field `b`",
        ),
        header_case("shape is negative", one("F32", "[-1]", 0, 4), 4, "invalid value: integer `-1`"),
        header_case("shape has nine axes", one("F32", "[1,1,1,1,1,1,1,1,1]", 0, 4), 4, "a shape of at most 8 sizes"),
        header_case(
            "shape product wraps",
            one("F32", "[4294967296,4294967296]", 0, 0),
            0,
            "has no size in whole bytes below 2^64",
        ),
        header_case(
            "byte count wraps",
            one("F32", "[4611686018427387904]", 0, 0),
            0,
            "has no size in whole bytes below 2^64",
        ),
        header_case("three offsets", r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4,8]}}"#, 4, "header: "),
        header_case(
            "tensor beyond the file",
            one("F32", "[1000000000000]", 0, 4_000_000_000_000),
            4,
            "is said to be data bytes 0..4000000000000, the file has 4",
        ),
        header_case("offsets run backwards", one("F32", "[1]", 4, 0), 4, "is said to be data bytes 4..0"),
        header_case("offsets and shape differ", one("F32", "[2]", 0, 4), 4, "needs 8 bytes, data_offsets are 0..4"),
        header_case(
            "tensors overlap",
            two(entry("F32", "[2]", 0, 8), entry("F32", "[2]", 4, 12)),
            12,
            "tensor `b` begins at data byte 4, the one before ends at 8",
        ),
        header_case(
            "hole between tensors",
            two(entry("F32", "[1]", 0, 4), entry("F32", "[1]", 8, 12)),
            12,
            "tensor `b` begins at data byte 8, the one before ends at 4",
        ),
        header_case("data after the last tensor", one("F32", "[1]", 0, 4), 5, "1 bytes belong to no tensor"),
    ]
}

fn tensor_cases() -> Vec<Case> {
    vec![
        tensor_case(
            "a norm is missing",
            |t| t.retain(|(name, _)| name != NORM),
            "missing_tensor",
            "`model.norm.weight` is missing",
        ),
        tensor_case("no tensors at all", Vec::clear, "missing_tensor", "`model.embed_tokens.weight` is missing"),
        tensor_case(
            "a tensor too many",
            |t| t.push(("extra.weight".to_string(), t[0].1.clone())),
            "unused_tensors",
            "1 tensors are not used by the model, the first is `extra.weight`",
        ),
        tensor_case(
            "a bias without its flag",
            |t| {
                t.push((
                    "model.layers.0.self_attn.q_proj.bias".to_string(),
                    TensorData { dtype: Dtype::F32, shape: vec![32], bytes: vec![0; 128] },
                ))
            },
            "unused_tensors",
            "q_proj.bias",
        ),
        tensor_case(
            "a matrix is transposed",
            |t| tensor(t, "model.layers.0.mlp.up_proj.weight").shape.reverse(),
            "tensor_shape",
            "up_proj.weight` has shape [32, 48], the model needs [48, 32]",
        ),
        tensor_case(
            "a vector has two axes",
            |t| tensor(t, NORM).shape = vec![1, 32],
            "tensor_shape",
            "has shape [1, 32], the model needs [32]",
        ),
        tensor_case(
            "a tensor is empty",
            |t| *tensor(t, NORM) = TensorData { dtype: Dtype::F32, shape: vec![0], bytes: vec![] },
            "tensor_shape",
            "has shape [0]",
        ),
        tensor_case(
            "a tensor of integers",
            |t| tensor(t, NORM).dtype = Dtype::I16,
            "tensor_dtype",
            "`model.norm.weight` is I16",
        ),
        tensor_case(
            "a tensor of 8-bit floats",
            |t| *tensor(t, NORM) = TensorData { dtype: Dtype::F8_E4M3, shape: vec![32], bytes: vec![0; 32] },
            "tensor_dtype",
            "is F8_E4M3",
        ),
    ]
}

fn index_cases() -> Vec<Case> {
    let shard = |value: Value| move |index: &mut Value| index["weight_map"][NORM] = value.clone();
    let not_plain = "is not a plain file name";
    let swapped = |index: &mut Value| {
        let other =
            index["weight_map"].as_object().unwrap().values().find(|shard| **shard != index["weight_map"][NORM]);
        index["weight_map"][NORM] = other.unwrap().clone();
    };
    let same_shard_twice = |folder: &TempFolder| {
        sharded(folder);
        let name = |i| folder.path().join(format!("model-0000{i}-of-00002.safetensors"));
        fs::copy(name(1), name(2)).unwrap();
    };
    vec![
        index_case("index without a map", |index| *index = json!({}), "config", "`weight_map`: is missing"),
        index_case(
            "index with an empty map",
            |index| *index = json!({"weight_map": {}}),
            "config",
            "names 0 shards, must be 1 to 512",
        ),
        index_case(
            "index of a wrong type",
            shard(json!(7)),
            "config",
            "`weight_map.model.norm.weight`: is a number, must be a string",
        ),
        index_case("shard in the parent folder", shard(json!("../model.safetensors")), "config", not_plain),
        index_case("shard by absolute path", shard(json!("/etc/passwd.safetensors")), "config", not_plain),
        index_case("shard by a path of Windows", shard(json!("C:\\model.safetensors")), "config", not_plain),
        index_case("shard of another kind", shard(json!("pytorch_model.bin")), "config", not_plain),
        index_case("shard with a zero byte", shard(json!("a\0.safetensors")), "config", not_plain),
        index_case(
            "shard that is not there",
            shard(json!("model-9.safetensors")),
            "io",
            "model-9.safetensors: is named by the index, but not there",
        ),
        index_case("tensor in the other shard", swapped, "config", "is said to be in"),
        index_case(
            "tensor in no shard",
            |index| index["weight_map"]["b"] = index["weight_map"][NORM].clone(),
            "missing_tensor",
            "`b` is missing",
        ),
        case(
            "shard with the tensors of another",
            same_shard_twice,
            "weights",
            "is also in model-00001-of-00002.safetensors",
        ),
    ]
}

/// Links out of the folder, which only some systems have.
/// All of them.
pub fn all_cases() -> Vec<Case> {
    let tables = [
        folder_cases(),
        text_cases(),
        config_cases(),
        header_cases(),
        tensor_cases(),
        index_cases(),
        encoder_cases(),
        link_cases(),
    ];
    tables.into_iter().flatten().collect()
}

#[cfg(unix)]
fn link_cases() -> Vec<Case> {
    use std::os::unix::fs::symlink;
    let link = |name: &'static str, target: &'static str| {
        move |folder: &TempFolder| {
            let path = folder.path().join(name);
            let _ = fs::remove_file(&path);
            symlink(target, path).unwrap();
        }
    };
    vec![
        case(
            "config.json links to the system",
            link("config.json", "/etc/hostname"),
            "io",
            "is a link that leaves the model folder",
        ),
        case(
            "weights link to a device",
            link("model.safetensors", "/dev/zero"),
            "io",
            "is a link that leaves the model folder",
        ),
        case(
            "the pooling's file links to the system",
            |folder| {
                fs::create_dir(folder.path().join("1_Pooling")).unwrap();
                symlink("/etc/hostname", folder.path().join("1_Pooling/config.json")).unwrap();
            },
            "io",
            "is a link that leaves the model folder",
        ),
        case("tokenizer.json links to itself", link("tokenizer.json", "tokenizer.json"), "io", "tokenizer.json"),
        case("tokenizer.json links nowhere", link("tokenizer.json", "gone.json"), "io", "tokenizer.json"),
    ]
}

#[cfg(not(unix))]
fn link_cases() -> Vec<Case> {
    Vec::new()
}
