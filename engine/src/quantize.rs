//! From a model's files to one GGUF file of another type: `ns-llm quantize`. Tensor by tensor, so that no more than the
//! largest is in memory, and without a running engine.
//!
//! A folder is translated: hyperparameters and vocabulary become keys (`quantize/metadata.rs`), tensors get the format's
//! names, the rows of q and k of a llama the format's order, and GPT-2's matrices are turned. A GGUF file keeps its keys and
//! the order of its rows.

mod convert;
mod file_type;
mod metadata;

use std::path::PathBuf;

use ns_llm_kernels::cpu::pool::{Pool, PoolPriority};
use ns_llm_kernels::host;
use safetensors::Dtype;

use self::convert::{ConversionError, Rows, StoredOrder};
pub use self::file_type::FileType;
use self::file_type::ModelShape;
use crate::config::{EngineOptions, LoadProgress, MAX_THREADS, ProgressCallback, WeightFormat, in_range};
use crate::error::{Error, Result};
use crate::inspect::TensorInfo;
use crate::loader::gguf::{
    GgufMetadata, GgufTensor, GgufWriter, ROPE_FACTORS_TENSOR, known_name_in_file, name_in_file,
};
use crate::loader::{ModelSource, StoredDtype, Weights};
use crate::model::config::{Architecture, ModelConfig};
use crate::model_files::{ModelFiles, model_name};
use crate::tensor::Encoding;
use crate::tokenizer::Tokenizer;
use crate::weight_levels::measure_weights;

/// What to make of what, and where.
#[non_exhaustive]
pub struct QuantizeOptions {
    /// Folder of the model, or its GGUF file (of a split one, the first).
    pub model: PathBuf,
    /// The GGUF file to write.
    pub output: PathBuf,
    /// How its matrices are stored.
    pub file_type: FileType,
    /// All matrices in the type's base instead of a mix.
    pub pure: bool,
    /// Whether a file that is there is replaced.
    pub overwrite: bool,
    /// Compute threads; `None`: all cores.
    pub threads: Option<usize>,
    /// Hears how many bytes are read; returning `false` ends with [`Error::Cancelled`], and nothing is left.
    pub on_progress: Option<ProgressCallback>,
}

impl QuantizeOptions {
    /// `model` as `file_type` into `output`, which must not be there.
    pub fn new(model: impl Into<PathBuf>, output: impl Into<PathBuf>, file_type: FileType) -> Self {
        QuantizeOptions {
            model: model.into(),
            output: output.into(),
            file_type,
            pure: false,
            overwrite: false,
            threads: None,
            on_progress: None,
        }
    }
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quantized {
    /// Every tensor of the file in its order, by the format's names.
    pub tensors: Vec<TensorInfo>,
    /// Numbers in all tensors.
    pub num_parameters: u64,
    /// Bytes of the tensors that were read.
    pub source_bytes: u64,
    /// Bytes of the file.
    pub file_bytes: u64,
}

/// Writes the file. Whatever fails, nothing is left at [`QuantizeOptions::output`] but what was there.
pub fn quantize(mut options: QuantizeOptions) -> Result<Quantized> {
    let threads = options.threads.unwrap_or_else(|| host::usable_cores().clamp(1, MAX_THREADS));
    in_range("threads", threads, 1, MAX_THREADS)?;
    let (files, text) = ModelFiles::open(&EngineOptions::new(&options.model))?;
    let tokenizer = text.finish()?.tokenizer;
    // Finds what is missing or of another shape before anything is written.
    measure_weights(WeightFormat::Auto, &files.weights, &files.config)?;
    let source = ModelSource::open(&options.model)?;
    let metadata = file_metadata(&source, &files, &tokenizer, &options)?;
    let is_folder = matches!(source, ModelSource::Folder(_));
    let ModelFiles { config, mut weights, .. } = files;
    let tensors = planned_tensors(&weights, &config, is_folder, &options)?;
    let infos: Vec<GgufTensor> = tensors.iter().map(|tensor| tensor.written.clone()).collect();
    let mut writer = GgufWriter::create(&options.output, options.overwrite, &metadata, &infos)?;
    let pool = Pool::new(threads, PoolPriority::Normal).map_err(|e| Error::Internal { reason: e.to_string() })?;
    let mut progress = Progress { callback: options.on_progress.take(), at: LoadProgress::default() };
    progress.at.total_bytes = tensors.iter().map(|tensor| tensor.source_bytes(&weights)).sum();
    progress.add(0)?;
    let (mut stored, mut converted) = (Vec::new(), Vec::new());
    for tensor in &tensors {
        match &tensor.origin {
            Origin::Computed(data) => writer.write(data)?,
            Origin::Stored { name, rows, order, encoding } => {
                stored = weights.take_stored(name, stored)?;
                let [num_rows, width] = *rows;
                let rows = Rows { bytes: &stored, encoding: *encoding, num_rows, width, order: *order };
                let written = tensor.written.dtype.encoding().expect("chosen among what can be read");
                convert::convert(&pool, &rows, written, &mut converted).map_err(|e| match e {
                    ConversionError::NotFinite { row } => {
                        weights.error(name, format!("has numbers in row {row} that are not finite"))
                    }
                    ConversionError::NoMemory(_) => Error::OutOfMemory {
                        purpose: "a tensor of the file",
                        needed_bytes: tensor.written.num_bytes().unwrap_or(u64::MAX),
                        available_bytes: host::available_memory_bytes().unwrap_or(0),
                    },
                })?;
                writer.write(&converted)?;
            }
        }
        progress.add(tensor.source_bytes(&weights))?;
    }
    let count = |shape: &[usize]| shape.iter().map(|&size| size as u64).product::<u64>();
    Ok(Quantized {
        num_parameters: infos.iter().map(|tensor| count(&tensor.shape)).sum(),
        tensors: infos
            .into_iter()
            .map(|GgufTensor { name, shape, dtype }| TensorInfo { name, shape, dtype: dtype.to_string() })
            .collect(),
        source_bytes: progress.at.total_bytes,
        file_bytes: writer.finish()?,
    })
}

struct Progress {
    callback: Option<ProgressCallback>,
    at: LoadProgress,
}

impl Progress {
    fn add(&mut self, num_bytes: u64) -> Result<()> {
        self.at.loaded_bytes += num_bytes;
        match self.callback.as_mut().is_none_or(|callback| callback(self.at)) {
            true => Ok(()),
            false => Err(Error::Cancelled),
        }
    }
}

/// The keys of the file.
fn file_metadata(
    source: &ModelSource,
    files: &ModelFiles,
    tokenizer: &Tokenizer,
    options: &QuantizeOptions,
) -> Result<GgufMetadata> {
    let mut metadata = match source {
        ModelSource::Gguf(model) => {
            let mut metadata = model.metadata().clone();
            // What was true of the files that were read alone.
            let is_of_files = |key: &str| key.starts_with("split.") || key.starts_with("quantize.imatrix.");
            metadata.retain(|key| !is_of_files(key) && key != "general.alignment");
            metadata
        }
        ModelSource::Folder(_) => metadata::of_folder(source, files, tokenizer, &model_name(&options.model))?,
    };
    metadata.set("general.file_type", options.file_type.id());
    metadata.set("general.quantization_version", QUANTIZATION_VERSION);
    Ok(metadata)
}

/// Version of the block formats that `kernels::quant` writes: the one of all files since 2023.
const QUANTIZATION_VERSION: u32 = 2;

/// A tensor of the file, and where its numbers come from.
struct PlannedTensor {
    written: GgufTensor,
    origin: Origin,
}

enum Origin {
    Stored { name: String, encoding: Encoding, rows: [usize; 2], order: StoredOrder },
    Computed(Vec<u8>),
}

impl PlannedTensor {
    fn source_bytes(&self, weights: &Weights) -> u64 {
        match &self.origin {
            Origin::Stored { name, .. } => weights.stored_bytes(name),
            Origin::Computed(_) => 0,
        }
    }
}

/// All tensors in the order of the file: what is before the layers, the layers, what is behind them.
fn planned_tensors(
    weights: &Weights,
    config: &ModelConfig,
    is_folder: bool,
    options: &QuantizeOptions,
) -> Result<Vec<PlannedTensor>> {
    let model = ModelShape {
        num_layers: config.num_hidden_layers,
        heads_per_kv_head: config.num_attention_heads / config.num_key_value_heads,
        is_tied: config.tie_word_embeddings,
    };
    let mut tensors = Vec::new();
    for (name, shape, dtype) in weights.entries() {
        // What models ignore has no name in the format: all others were asked for before.
        let file_name = match is_folder {
            true => known_name_in_file(&canonical_name(name, config.architecture)),
            false => Some(name_in_file(name)),
        };
        let is_copy = is_folder && config.tie_word_embeddings && name == "lm_head.weight";
        let Some(file_name) = file_name.filter(|_| !is_copy) else { continue };
        let unsupported = || Error::TensorDtype { name: name.to_string(), dtype: dtype.to_string() };
        let encoding = dtype.encoding().ok_or_else(unsupported)?;
        let order = if is_folder { stored_order(name, shape, config) } else { StoredOrder::Rows };
        let mut shape = shape.to_vec();
        if order == StoredOrder::Columns {
            shape.reverse();
        }
        let width = shape.last().copied().unwrap_or(1);
        let written = match shape.len() == 2 && is_product(&file_name) {
            true => options.file_type.of_matrix(&file_name, width, &model, options.pure),
            false => StoredDtype::Plain(Dtype::F32),
        };
        let rows = match order {
            // Each number of a bias is a row of its own.
            StoredOrder::HalvesOfHeads(_) if shape.len() == 1 => [shape[0], 1],
            _ => [shape.iter().product::<usize>() / width, width],
        };
        tensors.push(PlannedTensor {
            written: GgufTensor { name: file_name, shape, dtype: written },
            origin: Origin::Stored { name: name.to_string(), encoding, rows, order },
        });
    }
    if is_folder {
        tensors.extend(rope_factors(config)?);
    }
    tensors.sort_by_cached_key(|tensor| place(&tensor.written.name));
    Ok(tensors)
}

/// The name that models ask for first: checkpoints saved for another purpose have a prefix more or less, the oldest ones
/// call a norm's weight and bias gamma and beta.
fn canonical_name(name: &str, architecture: Architecture) -> String {
    let renamed = |prefix: &str| {
        let name = name.strip_prefix(prefix).unwrap_or(name);
        let old_norm = [(".gamma", ".weight"), (".beta", ".bias")];
        let old = old_norm.into_iter().find_map(|(old, new)| Some(format!("{}{new}", name.strip_suffix(old)?)));
        old.unwrap_or_else(|| name.to_string())
    };
    match architecture {
        Architecture::Gpt2 => renamed("transformer."),
        Architecture::Bert => renamed("bert."),
        _ if name.starts_with("model.") || name.starts_with("lm_head.") => name.to_string(),
        _ => format!("model.{name}"),
    }
}

/// Whether the tensor that the file calls so is multiplied with, or is the embedding of tokens: what else has two axes is
/// small, and readers take it as f32.
fn is_product(file_name: &str) -> bool {
    let is_small = ["position_embd.weight", "token_types.weight"].contains(&file_name);
    file_name.ends_with(".weight") && !file_name.ends_with("_norm.weight") && !is_small
}

/// How the numbers lie where the format has them in another order: q and k of a llama, GPT-2's `Conv1D`.
fn stored_order(name: &str, shape: &[usize], config: &ModelConfig) -> StoredOrder {
    let path = name.trim_end_matches(".weight").trim_end_matches(".bias");
    match config.architecture {
        Architecture::Llama | Architecture::Mistral if path.ends_with(".self_attn.q_proj") => {
            StoredOrder::HalvesOfHeads(config.num_attention_heads)
        }
        Architecture::Llama | Architecture::Mistral if path.ends_with(".self_attn.k_proj") => {
            StoredOrder::HalvesOfHeads(config.num_key_value_heads)
        }
        Architecture::Gpt2 if shape.len() == 2 && (path.contains(".attn.c_") || path.contains(".mlp.c_")) => {
            StoredOrder::Columns
        }
        _ => StoredOrder::Rows,
    }
}

/// `rope_freqs.weight` of a model whose frequencies are stretched as in Llama 3.1.
fn rope_factors(config: &ModelConfig) -> Result<Option<PlannedTensor>> {
    let (Some(rope), Some(stretching)) = (config.rope, metadata::stretching(config)) else { return Ok(None) };
    let refuse = || Error::Config {
        file: "config.json",
        field: "rope_scaling".to_string(),
        reason: "has other parameters than low_freq_factor 1 and high_freq_factor 4, which a GGUF file does not tell"
            .to_string(),
    };
    let architecture = metadata::architecture_name(config.architecture);
    let divisors = stretching.divisors(config.head_dim / 2, rope.rope_theta).filter(|_| architecture == "llama");
    let divisors = divisors.ok_or_else(refuse)?;
    let data = divisors.iter().flat_map(|divisor| divisor.to_le_bytes()).collect();
    let written = GgufTensor {
        name: ROPE_FACTORS_TENSOR.to_string(),
        shape: vec![divisors.len()],
        dtype: StoredDtype::Plain(Dtype::F32),
    };
    Ok(Some(PlannedTensor { written, origin: Origin::Computed(data) }))
}

/// Where in the file a tensor stands: by layer, then by name.
fn place(name: &str) -> (u8, usize, String) {
    let layer = name.strip_prefix("blk.").and_then(|rest| rest.split('.').next()?.parse().ok());
    match layer {
        Some(layer) => (1, layer, name.to_string()),
        None if name.starts_with("output") => (2, 0, name.to_string()),
        None => (0, 0, name.to_string()),
    }
}
