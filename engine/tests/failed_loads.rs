//! Promise: a load that fails leaves nothing behind, however often it fails, and costs no more than its files justify.
//! Through `Engine::open`, threads and all.

#[path = "support/gguf_file.rs"]
mod gguf_file;
#[path = "support/tiny_model.rs"]
mod tiny_model;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use gguf_file::{GgufFile, converted};
use ns_llm::{Engine, EngineOptions, Error};
use safetensors::Dtype;
use serde_json::json;
use tiny_model::{TempFolder, small_config, weights, write_model};

/// Threads and files belong to the process: one test at a time.
static ALONE: Mutex<()> = Mutex::new(());

fn open(folder: &TempFolder) -> Error {
    let file = folder.path().join("model.gguf");
    let mut options = EngineOptions::new(if file.exists() { &file } else { folder.path() });
    options.threads = Some(2);
    options.kv_bytes = Some(1 << 20);
    Engine::open(options).map(drop).expect_err("the folder is bad")
}

/// A folder or a GGUF file for each stage of loading at which it can fail.
fn bad_folders() -> Vec<(TempFolder, &'static str)> {
    let folder = |change: &dyn Fn(&TempFolder)| {
        let folder = TempFolder::new("failed-load");
        write_model(&folder, &small_config(), Dtype::F32, 1);
        folder.write("tokenizer.json", TOKENIZER);
        change(&folder);
        folder
    };
    let with = |field: &str, value: serde_json::Value| {
        let mut config = small_config();
        config[field] = value;
        config.to_string()
    };
    let wide = with("intermediate_size", json!(64));
    vec![
        (folder(&|f| f.write("config.json", "{")), "invalid_json"),
        (folder(&|f| f.write("tokenizer.json", r#"{"model": {"type": "none"}}"#)), "config"),
        (folder(&|f| f.write("model.safetensors", [0xff; 64])), "weights"),
        // Threads, pool and some packed weights are there when the third tensor does not fit.
        (folder(&|f| f.write("config.json", &wide)), "tensor_shape"),
        (gguf(&|file| file.alignment = 1), "weights"),
        (gguf(&|file| file.remove("qwen3.context_length")), "config"),
        (gguf(&|file| file.remove("tokenizer.ggml.merges")), "config"),
        (gguf(&|file| file.tensor("blk.1.ffn_up.weight").sizes.reverse()), "tensor_shape"),
    ]
}

/// The same model in a file, but for a change.
fn gguf(change: &dyn Fn(&mut GgufFile)) -> TempFolder {
    let mut file = converted(&small_config(), &weights(&small_config(), Dtype::F32));
    change(&mut file);
    let folder = TempFolder::new("failed-load");
    folder.write("model.gguf", file.bytes());
    folder
}

const TOKENIZER: &str = r#"{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
    "post_processor": null,
    "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
    "model": {"type": "BPE", "dropout": null, "unk_token": null, "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}}"#;

#[cfg(target_os = "linux")]
fn resources() -> (usize, usize, usize) {
    let count = |path: &str| std::fs::read_dir(path).expect("procfs").count();
    let status = std::fs::read_to_string("/proc/self/statm").expect("procfs");
    let pages: usize = status.split(' ').nth(1).and_then(|pages| pages.parse().ok()).expect("resident pages");
    (count("/proc/self/task"), count("/proc/self/fd"), pages * 4096)
}

/// A thousand failed loads, at every stage: no thread, no file and no memory stays.
#[cfg(target_os = "linux")]
#[test]
fn nothing_is_left_of_a_thousand_failed_loads() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let folders = bad_folders();
    let fail_all = |rounds: usize| {
        for _ in 0..rounds {
            for (folder, code) in &folders {
                let error = open(folder);
                assert_eq!(error.code(), *code, "{error}");
            }
        }
    };
    fail_all(40);
    let (threads, files, bytes) = settled_resources();
    fail_all(100);
    let (threads_after, files_after, bytes_after) = settled_resources();
    assert_eq!((threads_after, files_after), (threads, files));
    // A few pages more in one arena or another; what each load left would be a hundred times as much.
    assert!(bytes_after <= bytes + (4 << 20), "{bytes} bytes resident became {bytes_after}");
}

/// A thread that was joined may take a moment to leave the list.
#[cfg(target_os = "linux")]
fn settled_resources() -> (usize, usize, usize) {
    let deadline = Instant::now() + Duration::from_secs(5);
    let mut last = resources();
    loop {
        std::thread::sleep(Duration::from_millis(50));
        let now = resources();
        if (now.0, now.1) == (last.0, last.1) || Instant::now() > deadline {
            return now;
        }
        last = now;
    }
}

/// A tokenizer that cannot be built ends the load of the weights beside which it is built, with its own error.
#[test]
fn bad_tokenizers_end_the_load_of_weights() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let reports = |tokenizer: &str| {
        let folder = TempFolder::new("failed-load");
        write_model(&folder, &small_config(), Dtype::F32, 1);
        folder.write("tokenizer.json", tokenizer);
        let num_reports = Arc::new(AtomicUsize::new(0));
        let counted = num_reports.clone();
        let options = EngineOptions::new(folder.path()).threads(1).on_progress(move |_| {
            if counted.fetch_add(1, Ordering::Relaxed) == 0 {
                // Long enough for the other thread to end.
                std::thread::sleep(Duration::from_millis(500));
            }
            true
        });
        let code = Engine::open(options).map(drop).map_err(|error| error.code());
        (code, num_reports.load(Ordering::Relaxed))
    };
    let (good, num_reports) = reports(TOKENIZER);
    assert!(good.is_ok() && num_reports > 5, "{good:?} after {num_reports} reports");
    assert_eq!(reports(r#"{"model": {"type": "none"}}"#), (Err("config"), 1));
}

/// Refusing a header takes time in proportion to its length: ten times the tensors, at most some thirty times the time.
#[test]
fn refusal_is_linear_in_the_header() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let refusal = |num_tensors: usize| {
        let folder = TempFolder::new("long-header");
        write_model(&folder, &small_config(), Dtype::F32, 1);
        folder.write("tokenizer.json", TOKENIZER);
        let entries: Vec<String> = (0..num_tensors)
            .map(|i| format!(r#""t{i}": {{"dtype": "F32", "shape": [1], "data_offsets": [{}, {}]}}"#, 4 * i, 4 * i + 4))
            .collect();
        let header = format!("{{{}}}", entries.join(","));
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.into_bytes());
        file.resize(file.len() + 4 * num_tensors, 0);
        folder.write("model.safetensors", file);
        let times = (0..3).map(|_| {
            let start = Instant::now();
            let code = open(&folder).code();
            assert_eq!(code, "missing_tensor");
            start.elapsed()
        });
        times.min().expect("three times")
    };
    let (short, long) = (refusal(5_000), refusal(50_000));
    assert!(long < short.max(Duration::from_millis(5)) * 30, "{short:?} became {long:?}");
}
