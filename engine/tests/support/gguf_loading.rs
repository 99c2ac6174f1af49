//! Small GGUF models that load, and the way in which tests load files that may not: what came of it and what it cost.
#![allow(dead_code, reason = "each test program uses a part")]

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use ns_llm::{EngineOptions, Result};
use safetensors::Dtype;
use serde_json::json;

use crate::counting_allocator::peak_bytes_of;
use crate::gguf_file::{GgufFile, Value, converted};
use crate::tiny_model::{small_config, weights};

/// Opens a model as an engine's worker does, on this thread.
pub fn load(path: &Path) -> Result<()> {
    ns_llm::open::load(EngineOptions::new(path).threads(1).kv_bytes(1 << 20)).map(drop)
}

/// A small Qwen3 that loads.
pub fn valid() -> GgufFile {
    converted(&small_config(), &weights(&small_config(), Dtype::BF16))
}

/// A small Llama that loads, with stretched frequencies and biases.
pub fn valid_llama() -> GgufFile {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
        "max_position_embeddings": 128, "attention_bias": true, "rope_theta": 5e5,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    });
    converted(&config, &weights(&config, Dtype::F32))
}

/// A small GPT-2 that loads.
pub fn valid_gpt2() -> GgufFile {
    let config = json!({
        "architectures": ["GPT2LMHeadModel"], "vocab_size": 96, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32,
    });
    converted(&config, &weights(&config, Dtype::F16))
}

/// A small BERT that loads, with five word pieces.
pub fn valid_bert() -> GgufFile {
    let config = json!({
        "architectures": ["BertModel"], "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 48, "max_position_embeddings": 32, "type_vocab_size": 2,
    });
    let mut file = converted(&config, &weights(&config, Dtype::F32));
    for key in ["pre", "merges", "eos_token_id"] {
        file.remove(&format!("tokenizer.ggml.{key}"));
    }
    file.set("tokenizer.ggml.model", Value::string("bert"));
    file.set("tokenizer.ggml.tokens", Value::strings(&["[UNK]", "[CLS]", "[SEP]", "\u{2581}a", "b"]));
    file.set("tokenizer.ggml.token_type", Value::i32s(&[3, 3, 3, 1, 1]));
    for (key, id) in [("unknown", 0), ("cls", 1), ("seperator", 2)] {
        file.set(&format!("tokenizer.ggml.{key}_token_id"), Value::u32(id));
    }
    file
}

/// Loads `bytes` as a file; what came of it, and the most bytes that were held.
pub fn try_bytes(path: &Path, bytes: &[u8], name: &str) -> (Result<()>, u64) {
    fs::write(path, bytes).unwrap();
    let (result, peak_bytes) = peak_bytes_of(|| catch_unwind(AssertUnwindSafe(|| load(path))));
    (result.unwrap_or_else(|_| panic!("{name}: panicked")), peak_bytes)
}

/// How many files below `path` this process has open (0 where the system does not tell).
pub fn open_files_below(path: &Path) -> usize {
    let path = fs::canonicalize(path).unwrap();
    let Ok(handles) = fs::read_dir("/proc/self/fd") else { return 0 };
    let targets = handles.filter_map(|handle| fs::read_link(handle.ok()?.path()).ok());
    targets.filter(|target| target.starts_with(&path)).count()
}
