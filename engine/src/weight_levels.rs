//! What a model takes on a target, in each form that its weights may have: decided from the headers alone. Which forms
//! there are is the target's to say.

use ns_llm_kernels::host;

use crate::backend::cuda::plan::{
    KV_DTYPES, ModelSizes, WEIGHT_FORMAT_NAMES, WEIGHT_FORMATS, graph_bytes, missing_kernel, workspace_bytes,
};
use crate::backend::measure::Measure;
use crate::backend::{KvLayout, StepLimits};
use crate::config::{
    AUTO_WEIGHT_FORMATS, DEVICE_MEMORY_SHARE, EngineOptions, KvDtype, MAX_DECODER_EMBEDDING_TOKENS,
    MAX_ENCODE_STEP_SEQUENCES, WeightFormat,
};
use crate::device::{CudaTarget, Target};
use crate::error::{DeviceRefusal, Error, Result};
use crate::loader::Weights;
use crate::memory_plan::{MemoryPlan, MemoryRoom};
use crate::model;
use crate::model::config::ModelConfig;
use crate::model_files::ModelFiles;
use crate::tensor::{DType, Encoding, QuantType};

/// A form of the weights, the KV pool beside it, and the bytes of both.
#[derive(Debug, Clone, Copy)]
pub(crate) struct WeightLevel {
    /// What the backend is told: [`WeightFormat::Auto`] for weights as they are stored.
    pub(crate) wanted: WeightFormat,
    /// The form of most weights.
    pub(crate) format: WeightFormat,
    pub(crate) layout: KvLayout,
    pub(crate) plan: MemoryPlan,
}

/// The level that an engine with these options gets on `target`: the one that is asked for, or the best that fits the limit.
pub(crate) fn plan_memory(options: &EngineOptions, files: &ModelFiles, target: &Target) -> Result<WeightLevel> {
    let limit_bytes = memory_limit_bytes(options, target)?;
    if options.weights != WeightFormat::Auto || options.memory_limit_bytes.is_none() {
        return weight_level(options, files, options.weights, target, limit_bytes);
    }
    let levels = weight_levels(options, files, target)?;
    let smallest = levels.iter().map(|level| level.plan.needed_bytes()).min().unwrap_or(u64::MAX);
    levels.into_iter().find(|level| level.plan.check(limit_bytes).is_ok()).ok_or(Error::OutOfMemory {
        purpose: "KV pool and weights in their smallest form",
        needed_bytes: smallest,
        available_bytes: limit_bytes,
    })
}

/// Every level that may be chosen, best first: the weights as they are stored, then each form of
/// [`AUTO_WEIGHT_FORMATS`] that the target has and that is smaller than those before it.
pub(crate) fn weight_levels(options: &EngineOptions, files: &ModelFiles, target: &Target) -> Result<Vec<WeightLevel>> {
    let limit_bytes = memory_limit_bytes(options, target)?;
    let mut levels = vec![weight_level(options, files, WeightFormat::Auto, target, limit_bytes)?];
    for wanted in AUTO_WEIGHT_FORMATS.into_iter().filter(|&wanted| has_format(target, wanted)) {
        let level = weight_level(options, files, wanted, target, limit_bytes)?;
        if levels.iter().all(|other| level.plan.weights_bytes < other.plan.weights_bytes) {
            levels.push(level);
        }
    }
    Ok(levels)
}

fn has_format(target: &Target, wanted: WeightFormat) -> bool {
    match target {
        Target::Cpu => true,
        Target::Cuda(_) => WEIGHT_FORMATS.contains(&wanted),
    }
}

fn weight_level(
    options: &EngineOptions,
    files: &ModelFiles,
    wanted: WeightFormat,
    target: &Target,
    limit_bytes: u64,
) -> Result<WeightLevel> {
    let stored = if wanted == WeightFormat::Auto { stored_format(&files.weights) } else { wanted };
    match target {
        Target::Cpu => cpu_level(options, files, (wanted, stored), limit_bytes),
        Target::Cuda(cuda) => cuda_level(options, files, (wanted, stored), cuda, limit_bytes),
    }
}

fn cpu_level(
    options: &EngineOptions,
    files: &ModelFiles,
    (wanted, format): (WeightFormat, WeightFormat),
    limit_bytes: u64,
) -> Result<WeightLevel> {
    let dtype = options.kv_dtype.unwrap_or(default_kv_dtype(format));
    let can_generate = files.config.architecture.can_generate();
    let dtype = if can_generate { dtype } else { encode_kv_dtype(dtype, format) };
    let layout = files.config.kv_layout(0, options.block_tokens, dtype);
    let weights_bytes = measure_weights(wanted, &files.weights, &files.config)?;
    let model_context_tokens = files.config.max_position_embeddings;
    let plan = if can_generate {
        let room = MemoryRoom::host(limit_bytes);
        MemoryPlan::new(options, &layout, weights_bytes, model_context_tokens, room)?
    } else {
        MemoryPlan::for_encoder(options, &layout, weights_bytes, model_context_tokens)?
    };
    Ok(WeightLevel { wanted, format, layout: KvLayout { num_blocks: plan.num_blocks, ..layout }, plan })
}

/// Fails with what is missing where there are no kernels for the model.
fn cuda_level(
    options: &EngineOptions,
    files: &ModelFiles,
    (wanted, stored): (WeightFormat, WeightFormat),
    cuda: &CudaTarget,
    limit_bytes: u64,
) -> Result<WeightLevel> {
    let config = &files.config;
    if !WEIGHT_FORMATS.contains(&wanted) {
        let (value, expected) = (wanted.name().to_string(), WEIGHT_FORMAT_NAMES.to_string());
        return Err(Error::InvalidArgument { field: "weights", value, expected });
    }
    let dtype = options.kv_dtype.unwrap_or(KvDtype::F16);
    if !matches!(dtype, KvDtype::F16 | KvDtype::Bf16) {
        let (value, expected) = (dtype.name().to_string(), KV_DTYPES.to_string());
        return Err(Error::InvalidArgument { field: "kv_dtype", value, expected });
    }
    let layout = config.kv_layout(0, options.block_tokens, dtype);
    let sizes = ModelSizes {
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        num_heads: config.num_attention_heads,
        vocab_size: config.vocab_size,
    };
    if let Some(missing) = missing_kernel(&sizes, &layout) {
        return Err(Error::DeviceUnavailable { device: cuda.name(), reason: DeviceRefusal::NoKernel { missing } });
    }
    let measure = Measure::cuda(wanted);
    model::load(&measure, files.weights.outline(), config, 1, &mut |_| true)?;
    let context_tokens = options.context_tokens.unwrap_or(config.max_position_embeddings);
    let embedding_tokens = context_tokens.min(MAX_DECODER_EMBEDDING_TOKENS);
    let max_tokens = options.prefill_budget_tokens.max(options.mixed_budget_tokens).max(embedding_tokens);
    // Keys and values of the sequences of a step that encodes are one layer's.
    let encode_blocks = max_tokens.div_ceil(layout.block_tokens) + MAX_ENCODE_STEP_SEQUENCES;
    let encode_bytes = layout.block_bytes() / layout.num_layers as u64 * encode_blocks as u64;
    let step_bytes = workspace_bytes(&sizes, &layout, max_tokens, options.max_running_sequences, context_tokens);
    let graph_bytes = match config.architecture.can_generate() {
        true => graph_bytes(&sizes, &layout, &step_limits(options, config, context_tokens)),
        false => 0,
    };
    // Cosines and sines of half of a head each.
    let rope_bytes = (context_tokens * config.head_dim * size_of::<f32>()) as u64;
    let room = MemoryRoom::device(limit_bytes, step_bytes + graph_bytes + encode_bytes + rope_bytes);
    let weights_bytes = measure.weights_bytes();
    let plan = match config.architecture.can_generate() {
        true => MemoryPlan::new(options, &layout, weights_bytes, config.max_position_embeddings, room)?,
        false => MemoryPlan {
            workspace_bytes: room.workspace_bytes,
            ..MemoryPlan::for_encoder(options, &layout, weights_bytes, config.max_position_embeddings)?
        },
    };
    let format = match stored {
        WeightFormat::Quant(QuantType::Q8_0 | QuantType::Q4_K) => stored,
        _ => WeightFormat::Bf16,
    };
    Ok(WeightLevel { wanted, format, layout: KvLayout { num_blocks: plan.num_blocks, ..layout }, plan })
}

/// What weights, KV pool and steps may take together: what is available on the target, or less if the user says so.
pub(crate) fn memory_limit_bytes(options: &EngineOptions, target: &Target) -> Result<u64> {
    let available_bytes = match target {
        Target::Cpu => host::available_memory_bytes().unwrap_or(u64::MAX),
        Target::Cuda(cuda) => (cuda.free_memory_bytes()? as f64 * DEVICE_MEMORY_SHARE) as u64,
    };
    Ok(options.memory_limit_bytes.map_or(available_bytes, |limit| limit.min(available_bytes)))
}

/// Bytes of all weights once they are packed on the CPU in the form `wanted`. Goes through the model as loading does, and
/// so fails where that would fail for what is missing, superfluous or of another shape; reads no weight.
pub(crate) fn measure_weights(wanted: WeightFormat, weights: &Weights, config: &ModelConfig) -> Result<u64> {
    let measure = Measure::cpu(wanted);
    // The context only decides the size of tables that are no weights.
    model::load(&measure, weights.outline(), config, 1, &mut |_| true)?;
    Ok(measure.weights_bytes())
}

/// As exact as the weights make it worth.
fn default_kv_dtype(format: WeightFormat) -> KvDtype {
    if format == WeightFormat::F32 { KvDtype::F32 } else { KvDtype::F16 }
}

/// In steps that encode. Their keys and values are gone with the step: 8 bits would cost accuracy and save nothing.
pub(crate) fn encode_kv_dtype(dtype: KvDtype, format: WeightFormat) -> KvDtype {
    if dtype == KvDtype::Int8 { default_kv_dtype(format) } else { dtype }
}

/// The form in which the checkpoint has most of its numbers.
fn stored_format(weights: &Weights) -> WeightFormat {
    let mut counts: Vec<(WeightFormat, u64)> = Vec::new();
    for (_, shape, dtype) in weights.entries() {
        let format = match dtype.encoding() {
            Some(Encoding::Plain(DType::F32)) => WeightFormat::F32,
            Some(Encoding::Plain(DType::F16)) => WeightFormat::F16,
            Some(Encoding::Plain(DType::Bf16)) => WeightFormat::Bf16,
            Some(Encoding::Blocks(quant_type)) => WeightFormat::Quant(quant_type),
            // No model can use it; loading will say so by name.
            None => continue,
        };
        let count = shape.iter().map(|&n| n as u64).product::<u64>();
        match counts.iter_mut().find(|(other, _)| *other == format) {
            Some((_, sum)) => *sum += count,
            None => counts.push((format, count)),
        }
    }
    counts.into_iter().max_by_key(|&(_, count)| count).map_or(WeightFormat::F32, |(format, _)| format)
}

/// What steps will be at most, in contexts of up to `context_tokens` tokens.
pub(crate) fn step_limits(options: &EngineOptions, config: &ModelConfig, context_tokens: usize) -> StepLimits {
    StepLimits {
        max_tokens: options.prefill_budget_tokens.max(options.mixed_budget_tokens),
        max_sequences: options.max_running_sequences,
        context_tokens,
        block_tokens: options.block_tokens,
        num_heads: config.num_attention_heads,
        head_dim: config.head_dim,
        max_graphs: options.max_cuda_graphs,
    }
}
