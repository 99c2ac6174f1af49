//! Promise: no GGUF file of any content does more than fail to load, with an error that names the byte or the key. A
//! table of hand-made files, each a valid one with one thing changed, and the error that it must give; a matrix of keys
//! and wrong values; every truncation; every way in which split files can disagree. None may panic, keep a file open, or
//! allocate more than the file justifies.

use std::fs;
use std::path::PathBuf;

use ns_llm::Error;
use safetensors::Dtype;

use crate::counting_allocator::peak_bytes_of;
use crate::gguf_cases::{Case, all_cases, header_cases};
use crate::gguf_file::{GgufFile, GgufTensor, Value, converted};
use crate::gguf_loading::{load, open_files_below, try_bytes, valid, valid_bert, valid_gpt2, valid_llama};
use crate::tiny_model::{TempFolder, small_config, weights};

// ---- the promise --------------------------------------------------------------------------------------------------------

/// Every file of the table gives its error and leaves nothing behind; the files they were made from load.
#[test]
fn every_bad_file_gives_its_error() {
    let folder = TempFolder::new("gguf");
    let path = folder.path().join("model.gguf");
    for file in [valid(), valid_llama(), valid_gpt2(), valid_bert()] {
        assert_eq!(try_bytes(&path, &file.bytes(), "valid").0, Ok(()));
    }
    let cases = all_cases();
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

/// What a load costs beyond reading the numbers is in proportion to the headers, not to the file: each byte is read once,
/// and what is read again, to check sizes before anything is packed, is less than a twentieth.
#[cfg(target_os = "linux")]
#[test]
fn a_load_reads_the_file_once() {
    let bytes_read = || -> u64 {
        let counters = fs::read_to_string("/proc/thread-self/io").expect("the system counts what is read");
        counters.lines().find_map(|line| line.strip_prefix("rchar: ")?.parse().ok()).expect("a number")
    };
    let mut config = small_config();
    config["vocab_size"] = 20_000.into();
    let folder = TempFolder::new("gguf-once");
    let path = folder.path().join("model.gguf");
    fs::write(&path, converted(&config, &weights(&config, Dtype::BF16)).bytes()).unwrap();
    let file_bytes = fs::metadata(&path).unwrap().len();
    let before = bytes_read();
    assert_eq!(load(&path), Ok(()));
    let read = bytes_read() - before;
    assert!((file_bytes..file_bytes + file_bytes / 20).contains(&read), "{read} bytes were read of {file_bytes}");
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
