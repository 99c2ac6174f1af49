//! A folder for each thread, with a model of two small layers that loads.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Map, Value, json};

/// Removed when its thread ends.
struct Folder(PathBuf);

thread_local! {
    static FOLDER: Folder = Folder::new();
}

/// Calls `run` with the folder of this thread.
pub(crate) fn with_folder<T>(run: impl FnOnce(&Path) -> T) -> T {
    FOLDER.with(|folder| run(&folder.0))
}

impl Folder {
    fn new() -> Folder {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let name = format!("ns-llm-fuzz-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).expect("the system's temporary folder is writable");
        for (name, content) in [
            ("config.json", config().to_string().into_bytes()),
            ("tokenizer.json", tokenizer().to_string().into_bytes()),
            ("model.safetensors", weights()),
        ] {
            std::fs::write(path.join(name), content).expect("the system's temporary folder is writable");
        }
        Folder(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn config() -> Value {
    json!({
        "architectures": ["Qwen3ForCausalLM"], "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
        "max_position_embeddings": 128, "tie_word_embeddings": true, "eos_token_id": 2,
    })
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

/// Zeros for every tensor of [`config`].
fn weights() -> Vec<u8> {
    let layer = [
        ("input_layernorm", &[32][..]),
        ("post_attention_layernorm", &[32]),
        ("self_attn.q_norm", &[16]),
        ("self_attn.k_norm", &[16]),
        ("self_attn.q_proj", &[32, 32]),
        ("self_attn.k_proj", &[16, 32]),
        ("self_attn.v_proj", &[16, 32]),
        ("self_attn.o_proj", &[32, 32]),
        ("mlp.gate_proj", &[48, 32]),
        ("mlp.up_proj", &[48, 32]),
        ("mlp.down_proj", &[32, 48]),
    ];
    let layers = (0..2).flat_map(|idx| layer.map(|(name, shape)| (format!("model.layers.{idx}.{name}.weight"), shape)));
    let ends = [("model.embed_tokens.weight".to_owned(), &[96, 32][..]), ("model.norm.weight".to_owned(), &[32])];
    let (mut header, mut end) = (Map::new(), 0);
    for (name, shape) in layers.chain(ends) {
        let start = end;
        end += 2 * shape.iter().product::<usize>();
        header.insert(name, json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}));
    }
    let header = Value::Object(header).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.into_bytes());
    file.resize(file.len() + end, 0);
    file
}
