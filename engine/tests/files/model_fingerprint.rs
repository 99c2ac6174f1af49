//! Promise: KV that outlives a process is found again by what the model *is*. The same weights have the same fingerprint in
//! any folder, in any number of files and with any number of threads; one flipped byte anywhere in any tensor, another
//! configuration, name, type or shape gives another one.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use ns_llm::loader::ModelSource;
use safetensors::Dtype;
use serde_json::{Value, json};

use crate::tiny_model::{TempFolder, TensorData, small_config, weights, write_model, write_weights};

/// Stands for the hash of a configuration.
const CONFIGURATION: [u8; 32] = [7; 32];

fn fingerprint(folder: &Path, configuration: [u8; 32], num_threads: usize) -> [u8; 32] {
    let weights = ModelSource::open(folder).and_then(ModelSource::weights).expect("a valid model");
    weights.fingerprint(&configuration, num_threads).expect("readable")
}

/// Four layers and a vocabulary that makes the embedding longer than two chunks.
fn long_config() -> Value {
    let mut config = small_config();
    config["vocab_size"] = json!(70_000);
    config
}

/// Path, sharding and threads are no part of it; the last chunk of the embedding is a short one.
#[test]
fn same_content_has_the_same_fingerprint() {
    let config = long_config();
    let (whole, sharded) = (TempFolder::new("fingerprint-whole"), TempFolder::new("fingerprint-sharded"));
    write_model(&whole, &config, Dtype::F32, 1);
    write_model(&sharded, &config, Dtype::F32, 3);
    let expected = fingerprint(whole.path(), CONFIGURATION, 1);
    for threads in [2, 3, 64] {
        assert_eq!(fingerprint(whole.path(), CONFIGURATION, threads), expected, "{threads} threads");
    }
    assert_eq!(fingerprint(sharded.path(), CONFIGURATION, 2), expected, "three files");
    // A copy under another name, with everything changed that is no weight.
    let copy = TempFolder::new("fingerprint-copy");
    fs::copy(whole.path().join("model.safetensors"), copy.path().join("model.safetensors")).expect("writable");
    copy.write("config.json", json!({"architectures": ["unknown"]}).to_string());
    copy.write("tokenizer.json", "no tokenizer at all");
    assert_eq!(fingerprint(copy.path(), CONFIGURATION, 2), expected, "another path");
}

/// A bit of each chunk's first, middle and last byte, in every tensor.
#[test]
fn one_flipped_byte_is_another_model() {
    let config = long_config();
    let folder = TempFolder::new("fingerprint-flip");
    write_model(&folder, &config, Dtype::F32, 1);
    let path = folder.path().join("model.safetensors");
    let file = fs::read(&path).expect("just written");
    let header_bytes = 8 + u64::from_le_bytes(file[..8].try_into().expect("8 bytes")) as usize;
    let header: Value = serde_json::from_slice(&file[8..header_bytes]).expect("JSON");
    let mut seen = BTreeSet::from([fingerprint(folder.path(), CONFIGURATION, 2)]);
    let mut num_flips = 0;
    for (name, tensor) in header.as_object().expect("an object").iter().filter(|(name, _)| *name != "__metadata__") {
        let offset = |idx: usize| tensor["data_offsets"][idx].as_u64().expect("a number") as usize;
        let (start, end) = (offset(0), offset(1));
        let chunk_edges = (start..end).step_by(4 << 20).flat_map(|chunk| [chunk.saturating_sub(1).max(start), chunk]);
        for at in chunk_edges.chain([(start + end) / 2, end - 1]).collect::<BTreeSet<_>>() {
            let mut flipped = file.clone();
            flipped[header_bytes + at] ^= 1 << (at % 8);
            fs::write(&path, flipped).expect("writable");
            num_flips += 1;
            assert!(seen.insert(fingerprint(folder.path(), CONFIGURATION, 2)), "byte {at} of the data, in {name}");
        }
    }
    assert!(num_flips > 60, "{num_flips} flips");
}

/// What the bytes mean is part of it, also when the bytes are the same.
#[test]
fn meaning_is_part_of_it() {
    let folder = TempFolder::new("fingerprint-meaning");
    let tensors = weights(&small_config(), Dtype::F16);
    folder.write("config.json", small_config().to_string());
    let mut seen = BTreeSet::new();
    let mut add = |what: &str, tensors: &[(String, TensorData)], configuration: [u8; 32]| {
        write_weights(&folder, tensors, 1);
        assert!(seen.insert(fingerprint(folder.path(), configuration, 1)), "{what}");
    };
    add("as it is", &tensors, CONFIGURATION);
    add("another configuration", &tensors, [8; 32]);
    let change = |change: fn(&mut Vec<(String, TensorData)>)| {
        let mut changed = tensors.clone();
        change(&mut changed);
        changed
    };
    add("another type", &change(|tensors| tensors[0].1.dtype = Dtype::BF16), CONFIGURATION);
    add("another shape", &change(|tensors| tensors[0].1.shape.reverse()), CONFIGURATION);
    add("another name", &change(|tensors| tensors[0].0.push('x')), CONFIGURATION);
    add("one tensor less", &change(|tensors| drop(tensors.pop())), CONFIGURATION);
    let swap_contents = |tensors: &mut Vec<(String, TensorData)>| {
        let same = |name: &str| tensors.iter().position(|(other, _)| other == name).expect("there");
        let (a, b) =
            (same("model.layers.0.input_layernorm.weight"), same("model.layers.0.post_attention_layernorm.weight"));
        let bytes = std::mem::take(&mut tensors[a].1.bytes);
        tensors[a].1.bytes = std::mem::replace(&mut tensors[b].1.bytes, bytes);
    };
    add("contents of two tensors swapped", &change(swap_contents), CONFIGURATION);
}

/// A file that became shorter after it was opened is an error that names the tensor, with any number of threads.
#[test]
fn truncated_file_is_an_error() {
    let folder = TempFolder::new("fingerprint-short");
    write_model(&folder, &long_config(), Dtype::F32, 1);
    let path = folder.path().join("model.safetensors");
    for threads in [1, 4] {
        let weights = ModelSource::open(folder.path()).and_then(ModelSource::weights).expect("a valid model");
        let bytes = fs::metadata(&path).expect("there").len();
        let file = fs::OpenOptions::new().write(true).open(&path).expect("writable");
        file.set_len(bytes / 2).expect("writable");
        let error = weights.fingerprint(&CONFIGURATION, threads).expect_err("half of it is gone");
        assert_eq!(error.code(), "weights", "{error}");
        file.set_len(bytes).expect("writable");
    }
}
