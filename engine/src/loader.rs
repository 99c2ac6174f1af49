//! From a model's files to typed configuration and to weights by name. Says what is missing, what is damaged and what
//! is unused; knows no model and does no arithmetic on weights.
//!
//! Invariants: only files inside the folder are opened (see [`ModelFolder`]), regular ones, each of bounded size; a
//! name that a file contains reaches the file system only after it has matched the pattern of shard names; nothing is
//! allocated from a declared length beyond the bytes of the file; a failed load leaves nothing behind.

mod fingerprint;
mod generation_config;
pub mod gguf;
mod json;
mod safetensors;
mod sentence_transformers;
mod source;
mod stored;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

pub use self::generation_config::GenerationConfig;
pub use self::json::{JsonFile, JsonList, JsonObject};
pub use self::sentence_transformers::{PoolingMode, SentenceConfig};
pub use self::source::{ModelSource, StoredTokenizer};
pub use self::stored::StoredDtype;
use self::stored::{StoredTensor, WeightsFile};
use crate::config::{MAX_CONFIG_BYTES, MAX_JSON_BYTES, MAX_SHARDS, MAX_TEMPLATE_BYTES};
use crate::error::{Error, Result};
use crate::tensor::Tensor;

const SINGLE_FILE: &str = "model.safetensors";
/// Larger buffers are given back to the system: an embedding's would stay until the end of the load.
const MAX_SPARE_BYTES: usize = 64 << 20;
const INDEX_FILE: &str = "model.safetensors.index.json";

/// A folder as the Hugging Face hub lays it out. Files are looked up by fixed names. A symbolic link may point to
/// another file of the folder, or into the `blobs` beside its `snapshots` (the layout of the hub's own cache); a link
/// that leads elsewhere is refused.
#[derive(Debug, Clone)]
pub struct ModelFolder {
    path: PathBuf,
    /// Real paths below which files may lie.
    roots: Vec<PathBuf>,
}

impl ModelFolder {
    /// Fails unless `path` is a folder.
    pub fn open(path: &Path) -> Result<ModelFolder> {
        let real = fs::canonicalize(path).map_err(|e| io_error(path, e))?;
        if !real.is_dir() {
            return Err(io_error(path, "is not a folder"));
        }
        let blobs = match real.parent() {
            Some(parent) if parent.file_name().is_some_and(|name| name == "snapshots") => {
                parent.parent().map(|repository| repository.join("blobs"))
            }
            _ => None,
        };
        Ok(ModelFolder { path: path.to_path_buf(), roots: [Some(real), blobs].into_iter().flatten().collect() })
    }

    /// The path as the caller gave it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// `config.json`, which must be there.
    pub fn config(&self) -> Result<JsonFile> {
        self.json("config.json")?.ok_or_else(|| self.missing("config.json"))
    }

    /// `generation_config.json`; without it, every field is unset.
    pub fn generation_config(&self) -> Result<GenerationConfig> {
        let file = self.json("generation_config.json")?;
        file.map_or_else(|| Ok(GenerationConfig::default()), |file| GenerationConfig::from_json(&file))
    }

    /// `tokenizer_config.json`, if it is there.
    pub fn tokenizer_config(&self) -> Result<Option<JsonFile>> {
        self.json("tokenizer_config.json")
    }

    /// `chat_template.jinja`, if it is there; it goes before the template in `tokenizer_config.json`.
    pub fn chat_template(&self) -> Result<Option<String>> {
        self.text("chat_template.jinja", MAX_TEMPLATE_BYTES as u64)
    }

    /// `tokenizer.json` as it is, which must be there.
    pub fn tokenizer_json(&self) -> Result<Vec<u8>> {
        self.read("tokenizer.json", MAX_JSON_BYTES)?.ok_or_else(|| self.missing("tokenizer.json"))
    }

    /// What the files of sentence-transformers say about turning texts into vectors; without them, every field is unset.
    pub fn sentence_config(&self) -> Result<SentenceConfig> {
        let modules = self.read("modules.json", MAX_CONFIG_BYTES)?;
        let modules = modules.map(|bytes| JsonList::parse("modules.json", &bytes)).transpose()?;
        let pooling = self.json("1_Pooling/config.json")?;
        let transformer = self.json("sentence_bert_config.json")?;
        SentenceConfig::read(modules.as_ref(), pooling.as_ref(), transformer.as_ref())
    }

    /// The weights: `model.safetensors`, else the shards that `model.safetensors.index.json` names.
    pub fn weights(&self) -> Result<Weights> {
        if let Some(file) = self.file(SINGLE_FILE)? {
            return Weights::from_files(vec![self::safetensors::open(SINGLE_FILE, file)?], str::to_string);
        }
        let index =
            self.json(INDEX_FILE)?.ok_or_else(|| self.missing("model.safetensors or model.safetensors.index.json"))?;
        let (tensors, shards) = read_index(&index)?;
        let open = |shard: &String| {
            let file = self
                .file(shard)?
                .ok_or_else(|| io_error(&self.path.join(shard), "is named by the index, but not there"))?;
            self::safetensors::open(shard, file)
        };
        let weights = Weights::from_files(shards.iter().map(open).collect::<Result<_>>()?, str::to_string)?;
        weights.agree_with_index(&tensors)?;
        Ok(weights)
    }

    fn json(&self, name: &'static str) -> Result<Option<JsonFile>> {
        self.read(name, MAX_CONFIG_BYTES)?.map(|bytes| JsonFile::parse(name, &bytes)).transpose()
    }

    fn text(&self, name: &'static str, max_bytes: u64) -> Result<Option<String>> {
        let text = self.read(name, max_bytes)?.map(String::from_utf8).transpose();
        text.map_err(|e| {
            io_error(&self.path.join(name), format!("is not UTF-8 at byte {}", e.utf8_error().valid_up_to()))
        })
    }

    /// Whole content of a file of at most `max_bytes`.
    fn read(&self, name: &str, max_bytes: u64) -> Result<Option<Vec<u8>>> {
        let Some(file) = self.file(name)? else { return Ok(None) };
        let path = self.path.join(name);
        let mut bytes = Vec::new();
        file.take(max_bytes.saturating_add(1)).read_to_end(&mut bytes).map_err(|e| io_error(&path, e))?;
        if bytes.len() as u64 > max_bytes {
            return Err(io_error(&path, format!("is larger than {max_bytes} bytes")));
        }
        Ok(Some(bytes))
    }

    /// Opens a regular file of the folder. What is no regular file is refused before it is opened: opening a pipe waits.
    fn file(&self, name: &str) -> Result<Option<File>> {
        let path = self.path.join(name);
        let real = match fs::canonicalize(&path) {
            Ok(real) => real,
            Err(e) if e.kind() == ErrorKind::NotFound && fs::symlink_metadata(&path).is_err() => return Ok(None),
            Err(e) => return Err(io_error(&path, e)),
        };
        if !self.roots.iter().any(|root| real.starts_with(root)) {
            return Err(io_error(&path, "is a link that leaves the model folder"));
        }
        if !real.is_file() {
            return Err(io_error(&path, "is not a regular file"));
        }
        File::open(&real).map(Some).map_err(|e| io_error(&path, e))
    }

    fn missing(&self, name: &'static str) -> Error {
        Error::MissingFile { path: self.path.clone(), missing: name }
    }
}

fn io_error(path: &Path, reason: impl ToString) -> Error {
    Error::Io { path: path.to_path_buf(), reason: reason.to_string() }
}

/// Which shard each tensor is in, and the names of all shards.
fn read_index(index: &JsonFile) -> Result<(BTreeMap<String, String>, BTreeSet<String>)> {
    let root = index.object();
    let map = root.required("weight_map", root.object("weight_map")?)?;
    let mut tensors = BTreeMap::new();
    for name in map.names() {
        let shard = map.required(name, map.string(name)?)?;
        if !is_shard_name(shard) {
            return Err(map.error(
                name,
                format!("names the shard {shard:?}, which is not a plain file name ending in .safetensors"),
            ));
        }
        tensors.insert(name.to_string(), shard.to_string());
    }
    let shards: BTreeSet<String> = tensors.values().cloned().collect();
    if shards.is_empty() || shards.len() > MAX_SHARDS {
        return Err(root.error("weight_map", format!("names {} shards, must be 1 to {MAX_SHARDS}", shards.len())));
    }
    Ok((tensors, shards))
}

/// Letters, digits, `.`, `_`, `-`, not beginning with a dot, at most 128 bytes, ending in `.safetensors`: no separator
/// of any system, no parent folder, no drive, no device name.
fn is_shard_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    name.ends_with(".safetensors") && name.len() <= 128 && !name.starts_with('.') && name.bytes().all(plain)
}

/// The tensors of a checkpoint by name, each to be taken once. Reads a tensor when it is taken.
#[derive(Debug)]
pub struct Weights {
    files: Vec<WeightsFile>,
    /// What the files call a tensor, for messages.
    name_in_file: fn(&str) -> String,
    /// By name: index into `files`, and where it is there.
    tensors: BTreeMap<String, (usize, StoredTensor)>,
    taken: HashSet<String>,
    ignored: HashSet<String>,
    total_bytes: u64,
    conv1d_is_linear: bool,
    /// Buffers of tensors that were given back.
    spare: Vec<Vec<u8>>,
    /// Whether tensors come without their data.
    is_outline: bool,
}

impl Weights {
    fn from_files(files: Vec<WeightsFile>, name_in_file: fn(&str) -> String) -> Result<Weights> {
        let mut tensors: BTreeMap<String, (usize, StoredTensor)> = BTreeMap::new();
        let mut total_bytes = 0_u64;
        for (file_idx, file) in files.iter().enumerate() {
            for tensor in &file.tensors {
                total_bytes = total_bytes.saturating_add(tensor.num_bytes);
                if let Some((other, _)) = tensors.insert(tensor.name.clone(), (file_idx, tensor.clone())) {
                    let reason = format!("tensor `{}` is also in {}", name_in_file(&tensor.name), files[other].name);
                    return Err(Error::Weights { file: file.name.clone(), offset: tensor.offset, reason });
                }
            }
        }
        let (taken, ignored) = (HashSet::new(), HashSet::new());
        Ok(Weights {
            files,
            name_in_file,
            tensors,
            taken,
            ignored,
            total_bytes,
            conv1d_is_linear: false,
            spare: Vec::new(),
            is_outline: false,
        })
    }

    /// The same tensors without their data: [`take`](Weights::take) gives names, shapes and types, and reads nothing.
    pub fn outline(&self) -> Weights {
        Weights {
            files: Vec::new(),
            name_in_file: self.name_in_file,
            tensors: self.tensors.clone(),
            taken: HashSet::new(),
            ignored: self.ignored.clone(),
            total_bytes: self.total_bytes,
            conv1d_is_linear: self.conv1d_is_linear,
            spare: Vec::new(),
            is_outline: true,
        }
    }

    /// Fails unless every tensor of the index is in the shard that the index names.
    fn agree_with_index(&self, index: &BTreeMap<String, String>) -> Result<()> {
        for (name, shard) in index {
            let (file_idx, _) = self.tensors.get(name).ok_or_else(|| Error::MissingTensor { name: name.clone() })?;
            let actual = &self.files[*file_idx].name;
            if actual != shard {
                let reason = format!("is said to be in {shard}, it is in {actual}");
                return Err(Error::Config { file: INDEX_FILE, field: format!("weight_map.{name}"), reason });
            }
        }
        Ok(())
    }

    /// Name, shape and element type (as the file calls it) of all tensors, in alphabetical order.
    pub fn entries(&self) -> impl Iterator<Item = (&str, &[usize], StoredDtype)> {
        self.tensors.iter().map(|(name, (_, tensor))| (name.as_str(), tensor.shape.as_slice(), tensor.dtype))
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Bytes of all tensors.
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    /// Reads a tensor, which must have `shape`. Each can be taken once.
    pub fn take(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let shown_name = || (self.name_in_file)(name);
        let (file_idx, stored) = self.tensors.get(name).ok_or_else(|| Error::MissingTensor { name: shown_name() })?;
        if stored.shape != shape {
            let (expected, actual) = (shape.to_vec(), stored.shape.clone());
            return Err(Error::TensorShape { name: shown_name(), expected, actual });
        }
        if stored.dtype.encoding().is_none() {
            return Err(Error::TensorDtype { name: shown_name(), dtype: stored.dtype.to_string() });
        }
        assert!(self.taken.insert(name.to_string()), "tensor `{name}` was taken before");
        let data = match self.is_outline {
            false => self.files[*file_idx].read(stored, take_spare(&mut self.spare, stored.num_bytes))?,
            true => Vec::new(),
        };
        stored::to_tensor(stored, data)
    }

    /// The bytes of a tensor exactly as its file has them: encoded, and with rows in the file's order. Each can be taken
    /// once.
    pub fn take_stored(&mut self, name: &str, buffer: Vec<u8>) -> Result<Vec<u8>> {
        let missing = || Error::MissingTensor { name: (self.name_in_file)(name) };
        let (file_idx, stored) = self.tensors.get(name).ok_or_else(missing)?;
        assert!(self.taken.insert(name.to_string()), "tensor `{name}` was taken before");
        self.files[*file_idx].read(stored, buffer)
    }

    /// An error about the content of a tensor, with its place.
    pub fn error(&self, name: &str, reason: impl std::fmt::Display) -> Error {
        let (file, offset) = match self.tensors.get(name) {
            Some((file_idx, stored)) => (self.files[*file_idx].name.clone(), stored.offset),
            None => (String::new(), 0),
        };
        Error::Weights { file, offset, reason: format!("tensor `{}` {reason}", (self.name_in_file)(name)) }
    }

    /// Whether the matrices of GPT-2's `Conv1D` are `[out, in]`, as all others: converters to GGUF turn them.
    pub fn conv1d_is_linear(&self) -> bool {
        self.conv1d_is_linear
    }

    /// Bytes that a tensor takes in its file; 0 if there is none of this name.
    pub fn stored_bytes(&self, name: &str) -> u64 {
        self.tensors.get(name).map_or(0, |(_, stored)| stored.num_bytes)
    }

    /// Gives back the memory of a tensor that has been packed, for the next ones: fresh pages cost more than reading.
    pub fn recycle(&mut self, tensor: Tensor) {
        if tensor.data.capacity() <= MAX_SPARE_BYTES {
            self.spare.push(tensor.data);
        }
    }

    /// Says that `name` may be there without being used.
    pub fn ignore(&mut self, name: &str) {
        self.ignored.insert(name.to_string());
    }

    /// Fails if tensors are left that nobody took. Tables of rotary frequencies, which old checkpoints carry and every
    /// model computes itself, do not count.
    pub fn finish(self) -> Result<()> {
        let is_unused = |name: &&String| {
            !(self.taken.contains(*name) || self.ignored.contains(*name) || name.ends_with("rotary_emb.inv_freq"))
        };
        let mut unused = self.tensors.keys().filter(is_unused);
        match unused.next() {
            Some(first) => Err(Error::UnusedTensors { name: (self.name_in_file)(first), count: unused.count() + 1 }),
            None => Ok(()),
        }
    }
}

/// The smallest buffer that holds `num_bytes`; otherwise the largest, which will grow.
fn take_spare(spare: &mut Vec<Vec<u8>>, num_bytes: u64) -> Vec<u8> {
    spare.sort_by_key(Vec::capacity);
    let fitting = spare.partition_point(|buffer| (buffer.capacity() as u64) < num_bytes);
    match spare.len() {
        0 => Vec::new(),
        len => spare.swap_remove(fitting.min(len - 1)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Only plain file names pass for shards: each refused one could reach another file on some system.
    #[test]
    fn shard_names_are_plain() {
        for name in ["model-00001-of-00002.safetensors", "model.safetensors", "a_b.safetensors"] {
            assert!(is_shard_name(name), "{name}");
        }
        let long = format!("{}.safetensors", "a".repeat(200));
        for name in [
            "../model.safetensors",
            "/etc/model.safetensors",
            "a/b.safetensors",
            "a\\b.safetensors",
            "c:model.safetensors",
            ".safetensors",
            "..safetensors",
            "model.bin",
            "model.safetensors\0",
            "modèl.safetensors",
            "",
            long.as_str(),
        ] {
            assert!(!is_shard_name(name), "{name}");
        }
    }
}
