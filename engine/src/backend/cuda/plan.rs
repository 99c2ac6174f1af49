//! What can be said about a model on a CUDA device before anything is loaded: whether there are kernels for it, and how
//! many bytes its steps take.

use ns_llm_kernels::cuda::attention::{HEAD_DIMS, SPAN_KEYS};
use ns_llm_kernels::cuda::memory::scratch_size;
use ns_llm_kernels::cuda::product::{MAX_COLUMNS, VECTOR};
use ns_llm_kernels::cuda::sampling::MAX_VOCAB_SIZE;

use super::bucket::{Bucket, max_rows};
use super::sample::TILE_ROWS;
use crate::backend::{KvLayout, StepLimits};
use crate::config::WeightFormat;
use crate::tensor::QuantType;

/// Types of keys and values that there are kernels for, in words.
pub(crate) const KV_DTYPES: &str = "f16 or bf16 on CUDA";
/// Forms of weights that there are kernels for.
pub(crate) const WEIGHT_FORMATS: [WeightFormat; 4] = [
    WeightFormat::Auto,
    WeightFormat::Bf16,
    WeightFormat::Quant(QuantType::Q8_0),
    WeightFormat::Quant(QuantType::Q4_K),
];
/// The same, in words.
pub(crate) const WEIGHT_FORMAT_NAMES: &str = "auto, bf16, q8_0 or q4_k on CUDA";
/// Most memory that is set aside for partial results of attention. A step that needs more asks for it.
const MAX_PARTIAL_BYTES: usize = 1 << 30;

/// Sizes of a model that decide what its steps take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ModelSizes {
    pub(crate) hidden_size: usize,
    pub(crate) intermediate_size: usize,
    pub(crate) num_heads: usize,
    pub(crate) vocab_size: usize,
}

/// What there is no kernel for, in words; `None`: nothing is missing.
pub(crate) fn missing_kernel(sizes: &ModelSizes, layout: &KvLayout) -> Option<String> {
    if !HEAD_DIMS.contains(&layout.head_dim) {
        return Some(format!("attention with heads of {} numbers (there are {HEAD_DIMS:?})", layout.head_dim));
    }
    if !layout.block_tokens.is_power_of_two() {
        return Some(format!("KV blocks of {} tokens (there are powers of two)", layout.block_tokens));
    }
    for (name, width) in [("hidden_size", sizes.hidden_size), ("intermediate_size", sizes.intermediate_size)] {
        if !width.is_multiple_of(VECTOR) || width > MAX_COLUMNS {
            return Some(format!("{name} {width} (there are multiples of {VECTOR} up to {MAX_COLUMNS})"));
        }
    }
    // The pair of gate and up has twice the sums.
    if sizes.hidden_size > MAX_COLUMNS / 2 {
        return Some(format!("hidden_size {} (there is none above {})", sizes.hidden_size, MAX_COLUMNS / 2));
    }
    (sizes.vocab_size > MAX_VOCAB_SIZE)
        .then(|| format!("a vocabulary of {} (there is none above {MAX_VOCAB_SIZE})", sizes.vocab_size))
}

/// Bytes of a graph on the device: some 250 kernels with their arguments. How much a driver really takes is its own affair.
const GRAPH_BYTES: u64 = 1 << 20;

/// Bytes of what steps in flight and captured steps have beside the others: their numbers and tokens, memory of their own
/// in each bucket size by size, and the graphs.
pub(crate) fn graph_bytes(sizes: &ModelSizes, layout: &KvLayout, limits: &StepLimits) -> u64 {
    let chosen = scratch_size(limits.max_tokens.max(limits.max_sequences) * size_of::<u32>()) as u64;
    if limits.max_graphs == 0 {
        return chosen;
    }
    let ModelSizes { hidden_size, intermediate_size, num_heads, vocab_size } = *sizes;
    let attention_width = num_heads * layout.head_dim;
    let qkv_width = attention_width + 2 * layout.num_kv_heads * layout.head_dim;
    let bucket_bytes = |rows: usize| {
        let mut buffers = vec![
            rows * size_of::<u32>(),
            rows * qkv_width * size_of::<f32>(),
            // Gate and up.
            2 * rows * intermediate_size * size_of::<f32>(),
            TILE_ROWS.min(rows) * vocab_size * size_of::<f32>(),
            rows % TILE_ROWS * vocab_size * size_of::<f32>(),
        ];
        for width in [hidden_size, attention_width, intermediate_size] {
            let operand = [2 * rows * width, rows * width, rows * width / 8, rows * width / 8];
            buffers.extend(operand.into_iter().chain([rows * width * size_of::<f32>(); 3]));
        }
        buffers.iter().map(|&bytes| scratch_size(bytes) as u64).sum::<u64>()
    };
    let lasting = [
        Bucket::buffer_len(limits) * size_of::<u32>(),
        max_rows(limits) * num_heads * size_of::<u32>(),
        Bucket::partial_bytes(limits),
        // Where the partial results of single spans have the least size there is.
        Bucket::all_rows(limits).count() * scratch_size(1),
    ];
    let lasting = lasting.iter().map(|&bytes| scratch_size(bytes) as u64).sum::<u64>();
    let buckets = Bucket::all_rows(limits).map(bucket_bytes).sum::<u64>();
    chosen + lasting + buckets + limits.max_graphs as u64 * GRAPH_BYTES
}

/// Bytes of the buffers that steps of up to `max_tokens` tokens and `max_sequences` sequences of `context_tokens` keep.
/// Decoding beside prompts of a few tokens in contexts of many may ask for more.
pub(crate) fn workspace_bytes(
    sizes: &ModelSizes,
    layout: &KvLayout,
    max_tokens: usize,
    max_sequences: usize,
    context_tokens: usize,
) -> u64 {
    let ModelSizes { hidden_size, intermediate_size, num_heads, vocab_size } = *sizes;
    let attention_width = num_heads * layout.head_dim;
    let qkv_width = attention_width + 2 * layout.num_kv_heads * layout.head_dim;
    let widest = hidden_size.max(attention_width).max(intermediate_size);
    let spans = context_tokens.div_ceil(SPAN_KEYS);
    let partials = max_sequences * num_heads * spans * (layout.head_dim + 2) * size_of::<f32>();
    let buffers = [
        2 * max_tokens * hidden_size * size_of::<f32>(),
        max_tokens * qkv_width * size_of::<f32>(),
        // Gate and up, their product, and an operand in both of its forms.
        3 * max_tokens * intermediate_size * size_of::<f32>(),
        max_tokens * widest * (2 * size_of::<u16>() + size_of::<f32>()),
        // Logits, and the counters of sampling.
        2 * TILE_ROWS * vocab_size * size_of::<f32>(),
        partials.min(MAX_PARTIAL_BYTES),
        max_sequences * context_tokens.div_ceil(layout.block_tokens) * size_of::<u32>(),
    ];
    buffers.iter().map(|&bytes| scratch_size(bytes) as u64).sum()
}
