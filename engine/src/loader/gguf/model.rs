//! A GGUF file, or the first of a split one, as a whole model: answers the questions of a model folder.
//!
//! The other files of a split are found by the name of the first, `STEM-00001-of-00003.gguf`, which the caller gave; no
//! text inside a file becomes a path.

#![deny(clippy::arithmetic_side_effects, clippy::indexing_slicing)]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;

use ::safetensors::Dtype;

use super::config::{self, Architecture};
use super::metadata::{self, Metadata};
use super::rope_factors::{self, Stretching};
use super::vocabulary::{self, GgufTokenizer};
use super::{GgufFile, name_in_file, names};
use crate::config::MAX_SHARDS;
use crate::error::{Error, Result};
use crate::loader::stored::{RowOrder, StoredDtype, StoredTensor, WeightsFile};
use crate::loader::{GenerationConfig, JsonFile, ModelFolder, SentenceConfig, Weights, io_error};

const SPLIT_COUNT: &str = "split.count";
const SPLIT_NUMBER: &str = "split.no";
const SPLIT_TENSORS: &str = "split.tensors.count";

/// All files of a model, with checked headers.
#[derive(Debug)]
pub struct GgufModel {
    metadata: Metadata,
    files: Vec<WeightsFile>,
    stretching: Option<Stretching>,
}

impl GgufModel {
    /// Opens the file `path` and, if it is the first of a split, the others beside it.
    pub fn open(path: &Path) -> Result<GgufModel> {
        let real = fs::canonicalize(path).map_err(|e| io_error(path, e))?;
        if !real.is_file() {
            return Err(io_error(path, "is not a regular file"));
        }
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let first = GgufFile::open(&name, File::open(&real).map_err(|e| io_error(path, e))?)?;
        let others = other_files(path, &name, &first.metadata)?;
        let num_tensors = others.iter().map(|file| file.tensors.len()).fold(first.tensors.len(), usize::saturating_add);
        if let Some(declared) = first.metadata.integer(SPLIT_TENSORS, u32::MAX.into())?
            && usize::try_from(declared) != Ok(num_tensors)
        {
            return Err(metadata::error(SPLIT_TENSORS, format!("is {declared}, the files have {num_tensors}")));
        }
        let GgufFile { name, file, metadata, tensors } = first;
        let mut files = vec![WeightsFile { name, file, tensors }];
        files.extend(others.into_iter().map(|GgufFile { name, file, tensors, .. }| WeightsFile {
            name,
            file,
            tensors,
        }));
        let architecture = Architecture::of(&metadata)?;
        for tensor in files.iter_mut().flat_map(|file| &mut file.tensors) {
            tensor.name = names::name_in_model(architecture, &tensor.name);
        }
        let mut model = GgufModel { metadata, files, stretching: None };
        model.set_row_orders()?;
        model.stretching = model.read_stretching()?;
        Ok(model)
    }

    /// What `config.json` would say.
    pub fn config(&self) -> Result<JsonFile> {
        let tensors = self.files.iter().flat_map(|file| &file.tensors);
        let by_name: BTreeMap<&str, &StoredTensor> = tensors.map(|tensor| (tensor.name.as_str(), tensor)).collect();
        config::model_config(&self.metadata, &by_name, self.stretching)
    }

    /// What `generation_config.json` would say: which tokens end an answer.
    pub fn generation_config(&self) -> Result<GenerationConfig> {
        Ok(GenerationConfig { eos_token_ids: vocabulary::end_tokens(&self.metadata)?, ..GenerationConfig::default() })
    }

    /// What the files of sentence-transformers would say.
    pub fn sentence_config(&self) -> Result<SentenceConfig> {
        config::sentence_config(&self.metadata)
    }

    /// What `tokenizer_config.json` would say.
    pub fn tokenizer_config(&self) -> Result<JsonFile> {
        vocabulary::tokenizer_config(&self.metadata)
    }

    /// What `tokenizer.json` would say.
    pub fn tokenizer(&self) -> GgufTokenizer {
        GgufTokenizer::of(&self.metadata)
    }

    /// Everything that the file says but for its tensors.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// The tensors of all files, by the names that models have for them.
    pub fn weights(self) -> Result<Weights> {
        let is_gpt2 = Architecture::of(&self.metadata)? == Architecture::Gpt2;
        let mut weights = Weights::from_files(self.files, name_in_file)?;
        weights.conv1d_is_linear = is_gpt2;
        if self.stretching.is_some() {
            weights.ignore(rope_factors::TENSOR);
        }
        Ok(weights)
    }

    /// Marks the tensors whose rows the converter put into another order.
    fn set_row_orders(&mut self) -> Result<()> {
        let architecture = Architecture::of(&self.metadata)?;
        if architecture != Architecture::Llama {
            return Ok(());
        }
        let heads = |suffix: &str| {
            let value = self.metadata.json(&architecture.key(suffix))?;
            Ok(value.and_then(|value| usize::try_from(value.as_u64()?).ok()).filter(|&heads| heads > 0))
        };
        // What is missing or no number here is refused with the configuration.
        let Some(query_heads) = heads("attention.head_count")? else { return Ok(()) };
        let key_heads = heads("attention.head_count_kv")?.unwrap_or(query_heads);
        for file in &mut self.files {
            for tensor in &mut file.tensors {
                let name = tensor.name.trim_end_matches(".weight").trim_end_matches(".bias");
                let heads = match name {
                    _ if name.ends_with(".self_attn.q_proj") => query_heads,
                    _ if name.ends_with(".self_attn.k_proj") => key_heads,
                    _ => continue,
                };
                tensor.row_order = RowOrder::InterleavedHeads(heads);
            }
        }
        Ok(())
    }

    /// Reads `rope_freqs.weight`, if the file of a llama has it.
    fn read_stretching(&mut self) -> Result<Option<Stretching>> {
        let architecture = Architecture::of(&self.metadata)?;
        let mut places = self.files.iter_mut().filter_map(|file| {
            let place = file.tensors.iter().position(|tensor| tensor.name == rope_factors::TENSOR)?;
            Some((file.tensors.get(place)?.clone(), file))
        });
        let Some((tensor, file)) = places.next().filter(|_| architecture == Architecture::Llama) else {
            return Ok(None);
        };
        let refuse = |reason: &str| {
            let reason = format!("tensor `{}` {reason}", rope_factors::TENSOR);
            Error::Weights { file: file.name.clone(), offset: tensor.offset, reason }
        };
        // Heads are at most 512 wide, and each factor is for a pair.
        if tensor.dtype != StoredDtype::Plain(Dtype::F32) || tensor.num_bytes > 1024 {
            return Err(refuse("is not one of at most 256 numbers of type F32"));
        }
        let unrecognised = refuse("does not stretch frequencies as Llama 3.1 does; other ways are not supported");
        let bytes = file.read(&tensor, Vec::new())?;
        let factors: Vec<f32> =
            bytes.chunks_exact(4).filter_map(|bytes| Some(f32::from_le_bytes(bytes.try_into().ok()?))).collect();
        let number = |suffix: &str| Ok(self.metadata.json(&architecture.key(suffix))?.and_then(|value| value.as_f64()));
        let theta = number("rope.freq_base")?.unwrap_or(10_000.0);
        let original = self.metadata.integer(&architecture.key("rope.scaling.original_context_length"), 1 << 24)?;
        let stretching = rope_factors::recognise(&factors, theta, original).ok_or(unrecognised)?;
        let pairs_of_head = number("rope.dimension_count")?.map(|width| width / 2.0);
        match pairs_of_head {
            Some(pairs) if pairs != factors.len() as f64 => Err(metadata::error(
                &architecture.key("rope.dimension_count"),
                format!("does not fit `{}` of {} numbers", rope_factors::TENSOR, factors.len()),
            )),
            _ => Ok(Some(stretching)),
        }
    }
}

/// The files after the first, each of which must say that it is what its name says.
fn other_files(path: &Path, name: &str, metadata: &Metadata) -> Result<Vec<GgufFile>> {
    let max = MAX_SHARDS.try_into().unwrap_or(u64::MAX);
    let count = metadata.integer(SPLIT_COUNT, max)?.unwrap_or(1);
    let number = metadata.integer(SPLIT_NUMBER, max)?.unwrap_or(0);
    if number != 0 {
        return Err(metadata::error(
            SPLIT_NUMBER,
            format!("is {number}: open the first file of the split, which is 0"),
        ));
    }
    if count <= 1 {
        return Ok(Vec::new());
    }
    let stem = name.strip_suffix(&format!("-00001-of-{count:05}.gguf")).filter(|stem| !stem.is_empty());
    let stem = stem.ok_or_else(|| {
        metadata::error(SPLIT_COUNT, format!("is {count}, so the file must be called NAME-00001-of-{count:05}.gguf"))
    })?;
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let folder = ModelFolder::open(parent)?;
    let mut files = Vec::new();
    for idx in 1..count {
        let name = format!("{stem}-{:05}-of-{count:05}.gguf", idx.saturating_add(1));
        let file = folder.file(&name)?;
        let file = file.ok_or_else(|| io_error(&parent.join(&name), "belongs to the split, but is not there"))?;
        let file = GgufFile::open(&name, file)?;
        for (key, expected) in [(SPLIT_NUMBER, idx), (SPLIT_COUNT, count)] {
            let actual = file.metadata.integer(key, max)?;
            if actual != Some(expected) {
                let actual = actual.map_or("missing".to_string(), |actual| actual.to_string());
                return Err(metadata::error(key, format!("is {actual} in {name}, must be {expected}")));
            }
        }
        files.push(file);
    }
    Ok(files)
}
