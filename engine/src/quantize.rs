//! From a model's files to one GGUF file of another type: `ns-llm quantize`. Tensor by tensor, so that no more than the
//! largest is in memory, and without a running engine.
//!
//! A folder is translated: hyperparameters and vocabulary become keys (`quantize/metadata.rs`), tensors get the format's
//! names, and the rows of q and k of a llama the format's order. A GGUF file keeps its keys and the order of its rows.

mod convert;
mod file_type;
mod metadata;

use std::path::{Path, PathBuf};

use ns_llm_kernels::cpu::pool::{Pool, PoolPriority};
use ns_llm_kernels::host;
use safetensors::Dtype;

use self::convert::{ConversionError, Rows};
pub use self::file_type::FileType;
use self::file_type::ModelShape;
use crate::config::{EngineOptions, LoadProgress, MAX_THREADS, ProgressCallback, WeightFormat};
use crate::error::{Error, Result};
use crate::inspect::TensorInfo;
use crate::loader::gguf::{GgufMetadata, GgufTensor, GgufWriter, ROPE_FACTORS_TENSOR, name_in_file};
use crate::loader::{ModelSource, StoredDtype, Weights};
use crate::model::config::{Architecture, ModelConfig};
use crate::open::{ModelFiles, measure_weights};
use crate::tensor::Encoding;

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
    if !(1..=MAX_THREADS).contains(&threads) {
        let expected = format!("1 to {MAX_THREADS}");
        return Err(Error::InvalidArgument { field: "threads", value: threads.to_string(), expected });
    }
    let files = ModelFiles::open(&EngineOptions::new(&options.model))?;
    // Finds what is missing or of another shape before anything is written.
    measure_weights(WeightFormat::Auto, &files.weights, &files.config)?;
    let source = ModelSource::open(&options.model)?;
    let metadata = file_metadata(&source, &files, &options)?;
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
            Origin::Stored { name, rows, interleaved_heads, encoding } => {
                stored = weights.take_stored(name, stored)?;
                let [num_rows, width] = *rows;
                let (encoding, interleaved_heads) = (*encoding, *interleaved_heads);
                let rows = Rows { bytes: &stored, encoding, num_rows, width, interleaved_heads };
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
fn file_metadata(source: &ModelSource, files: &ModelFiles, options: &QuantizeOptions) -> Result<GgufMetadata> {
    metadata::architecture_name(files.config.architecture)?;
    let mut metadata = match source {
        ModelSource::Gguf(model) => {
            let mut metadata = model.metadata().clone();
            // What was true of the files that were read alone.
            let is_of_files = |key: &str| key.starts_with("split.") || key.starts_with("quantize.imatrix.");
            metadata.retain(|key| !is_of_files(key) && key != "general.alignment");
            metadata
        }
        ModelSource::Folder(_) => metadata::of_folder(source, files, &model_name(&options.model))?,
    };
    metadata.set("general.file_type", options.file_type.id());
    metadata.set("general.quantization_version", QUANTIZATION_VERSION);
    Ok(metadata)
}

/// Version of the block formats that `kernels::quant` writes: the one of all files since 2023.
const QUANTIZATION_VERSION: u32 = 2;

/// Last component of the path, links resolved.
fn model_name(path: &Path) -> String {
    let real = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    real.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned())
}

/// A tensor of the file, and where its numbers come from.
struct PlannedTensor {
    written: GgufTensor,
    origin: Origin,
}

enum Origin {
    Stored { name: String, encoding: Encoding, rows: [usize; 2], interleaved_heads: Option<usize> },
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
    // Checkpoints that were saved to embed texts have the decoder alone.
    let prefix = if weights.contains("embed_tokens.weight") { "model." } else { "" };
    let mut tensors = Vec::new();
    for (name, shape, dtype) in weights.entries() {
        let file_name = name_in_file(&format!("{prefix}{name}"));
        // What models ignore has no name in the format.
        let is_ignored = file_name.ends_with(name) || config.tie_word_embeddings && name == "lm_head.weight";
        if is_folder && is_ignored {
            continue;
        }
        let unsupported = || Error::TensorDtype { name: name.to_string(), dtype: dtype.to_string() };
        let encoding = dtype.encoding().ok_or_else(unsupported)?;
        let width = shape.last().copied().unwrap_or(1);
        let is_matrix = shape.len() == 2 && file_name.ends_with(".weight") && !file_name.ends_with("_norm.weight");
        let written = match is_matrix {
            true => options.file_type.of_matrix(&file_name, width, &model, options.pure),
            false => StoredDtype::Plain(Dtype::F32),
        };
        let interleaved_heads = if is_folder { interleaved_heads(name, config) } else { None };
        let rows = match interleaved_heads {
            // Each number of a bias is a row of its own.
            Some(_) if shape.len() == 1 => [shape[0], 1],
            _ => [shape.iter().product::<usize>() / width, width],
        };
        tensors.push(PlannedTensor {
            written: GgufTensor { name: file_name, shape: shape.to_vec(), dtype: written },
            origin: Origin::Stored { name: name.to_string(), encoding, rows, interleaved_heads },
        });
    }
    if is_folder {
        tensors.extend(rope_factors(config)?);
    }
    tensors.sort_by_cached_key(|tensor| place(&tensor.written.name));
    Ok(tensors)
}

/// Heads of the rows that the format has in another order: q and k of a llama.
fn interleaved_heads(name: &str, config: &ModelConfig) -> Option<usize> {
    let path = name.trim_end_matches(".weight").trim_end_matches(".bias");
    match config.architecture {
        Architecture::Llama | Architecture::Mistral if path.ends_with(".self_attn.q_proj") => {
            Some(config.num_attention_heads)
        }
        Architecture::Llama | Architecture::Mistral if path.ends_with(".self_attn.k_proj") => {
            Some(config.num_key_value_heads)
        }
        _ => None,
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
    let architecture = metadata::architecture_name(config.architecture)?;
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
