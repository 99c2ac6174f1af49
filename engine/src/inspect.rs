//! What a model's files hold and what running it would take, from its headers alone: no weight is read.

use crate::backend::cpu::CpuBackend;
use crate::backend::cuda::CudaBackend;
use crate::backend::{Backend, KvLayout};
use crate::config::{Device, EngineOptions, WeightFormat};
use crate::device::{self, CudaDevices, MachineDevices, Target};
use crate::error::Result;
use crate::loader::PoolingMode;
use crate::memory_plan::{MemoryPlan, StoredBlocks};
use crate::model_files::ModelFiles;
use crate::weight_levels::{WeightLevel, memory_limit_bytes, plan_memory, weight_levels};

/// One tensor of the checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Path in the checkpoint.
    pub name: String,
    /// Sizes, outermost axis first.
    pub shape: Vec<usize>,
    /// As the file calls it.
    pub dtype: String,
}

/// Everything that can be said without reading weights.
#[derive(Debug, Clone, PartialEq)]
pub struct Inspection {
    /// As in `config.json`.
    pub architecture: String,
    /// Names as in `config.json`.
    pub hyperparameters: Vec<(&'static str, String)>,
    /// In alphabetical order.
    pub tensors: Vec<TensorInfo>,
    /// Numbers in all tensors.
    pub num_parameters: u64,
    /// Bytes of all tensors.
    pub checkpoint_bytes: u64,
    /// Entries of the tokenizer.
    pub tokenizer_vocab_size: usize,
    /// Texts of the control tokens.
    pub special_tokens: Vec<String>,
    /// Source of the chat template.
    pub chat_template: Option<String>,
    /// Tokens that end an answer.
    pub eos_token_ids: Vec<u32>,
    /// Where it would run: as in [`ModelInfo::device_name`](crate::ModelInfo::device_name).
    pub device_name: String,
    /// Why there.
    pub device_reason: String,
    /// How the weights would be kept.
    pub weights: &'static str,
    /// How keys and values would be kept.
    pub kv_dtype: &'static str,
    /// What it would hold, whether that fits this machine now or not.
    pub plan: MemoryPlan,
    /// Bytes of a KV block outside the pool.
    pub stored_block_bytes: u64,
    /// The forms of the weights that `auto` chooses from under a memory limit, best first.
    pub levels: Vec<WeightPlan>,
}

/// What a form of the weights would take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WeightPlan {
    /// How most weights would be kept.
    pub weights: &'static str,
    /// Whether all are as the files have them.
    pub is_stored: bool,
    /// How keys and values would be kept.
    pub kv_dtype: &'static str,
    /// Bytes.
    pub plan: MemoryPlan,
    /// Whether that is within the limit, and within what is available now.
    pub fits: bool,
    /// Whether an engine with these options would take it.
    pub is_chosen: bool,
}

/// Looks at the model that `options` name, as an engine with these options would run it.
pub fn inspect(options: &EngineOptions) -> Result<Inspection> {
    inspect_among(options, &MachineDevices)
}

/// The same with these CUDA devices instead of the machine's own: for tests.
#[doc(hidden)]
pub fn inspect_among(options: &EngineOptions, devices: &dyn CudaDevices) -> Result<Inspection> {
    options.validate()?;
    let (files, text) = ModelFiles::open(options)?;
    let tokenizer = text.finish()?.tokenizer;
    let (place, (levels, planned, limit_bytes)) = device::place(options.device, devices, |target| {
        let limit_bytes = memory_limit_bytes(options, target)?;
        let (levels, planned) = (weight_levels(options, &files, target)?, plan_memory(options, &files, target));
        if options.device == Device::Auto && matches!(target, Target::Cuda(_)) {
            // Then it would run elsewhere.
            planned.clone()?.plan.check(limit_bytes)?;
        }
        Ok((levels, planned, limit_bytes))
    })?;
    // A model that fits in no form is still shown, in its smallest.
    let smallest = levels.last().copied().expect("the weights as stored are always a level");
    let WeightLevel { format, layout, plan, .. } = *planned.as_ref().unwrap_or(&smallest);
    let levels = levels.into_iter().map(|level| WeightPlan {
        weights: level.format.name(),
        is_stored: level.wanted == WeightFormat::Auto,
        kv_dtype: level.layout.dtype.name(),
        plan: level.plan,
        fits: level.plan.check(limit_bytes).is_ok(),
        is_chosen: planned.as_ref().is_ok_and(|planned| planned.wanted == level.wanted),
    });
    let levels = levels.collect();
    let stored_block_bytes = stored_block_bytes(options, &layout, &place.target)?;
    let config = &files.config;
    let tensors: Vec<TensorInfo> = files
        .weights
        .entries()
        .map(|(name, shape, dtype)| TensorInfo {
            name: name.to_string(),
            shape: shape.to_vec(),
            dtype: dtype.to_string(),
        })
        .collect();
    Ok(Inspection {
        architecture: config.architecture.name().to_string(),
        hyperparameters: vec![
            ("vocab_size", config.vocab_size.to_string()),
            ("hidden_size", config.hidden_size.to_string()),
            ("intermediate_size", config.intermediate_size.to_string()),
            ("num_hidden_layers", config.num_hidden_layers.to_string()),
            ("num_attention_heads", config.num_attention_heads.to_string()),
            ("num_key_value_heads", config.num_key_value_heads.to_string()),
            ("head_dim", config.head_dim.to_string()),
            ("max_position_embeddings", config.max_position_embeddings.to_string()),
            ("rope", config.rope.as_ref().map_or("none".to_string(), |rope| format!("{rope:?}"))),
            ("activation", format!("{:?}", config.activation)),
            ("tie_word_embeddings", config.tie_word_embeddings.to_string()),
            ("pooling", files.sentence.pooling.map_or("mean", PoolingMode::name).to_string()),
            ("max_embedding_tokens", files.max_embedding_tokens(plan.context_tokens).to_string()),
        ],
        num_parameters: tensors.iter().map(|tensor| tensor.shape.iter().map(|&n| n as u64).product::<u64>()).sum(),
        tensors,
        checkpoint_bytes: files.weights.total_bytes(),
        tokenizer_vocab_size: tokenizer.vocab_size(),
        special_tokens: tokenizer.special_tokens().map(|(_, text)| text.to_string()).collect(),
        chat_template: files.tokenizer_config.chat_template.clone(),
        eos_token_ids: files.eos_token_ids.clone(),
        device_name: place.target.name(),
        device_reason: place.reason,
        weights: format.name(),
        kv_dtype: layout.dtype.name(),
        plan,
        stored_block_bytes,
        levels,
    })
}

/// Bytes of a block outside the pool.
fn stored_block_bytes(options: &EngineOptions, layout: &KvLayout, target: &Target) -> Result<u64> {
    let int8 = match target {
        Target::Cpu => CpuBackend::int8_blocks(*layout)?,
        Target::Cuda(_) => CudaBackend::int8_blocks(*layout)?,
    };
    Ok(StoredBlocks::new(options, layout, int8).block_bytes)
}
