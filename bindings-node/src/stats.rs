//! Counters, times and sizes as JavaScript sees them: the same names in camel case. 64-bit counts become numbers, which
//! are exact up to 2^53.

use napi_derive::napi;
use serde::Serialize;

/// What an engine has done and is doing. Counters only grow.
#[napi(object, object_from_js = false)]
pub struct Stats {
    /// Sequences that are being computed.
    pub num_sequences_running: f64,
    /// Sequences that wait.
    pub num_sequences_waiting: f64,
    /// Requests that are not sequences yet, one for each choice or input: being rendered and tokenized, or next to be.
    pub num_requests_preparing: f64,
    /// Blocks of the KV pool.
    pub kv_blocks_total: f64,
    /// Blocks that live sequences hold.
    pub kv_blocks_used: f64,
    /// Blocks that hold KV for later, and are given away when needed.
    pub kv_blocks_cached: f64,
    /// Blocks that hold nothing.
    pub kv_blocks_free: f64,
    /// Requests admitted: the finished, cancelled, failed and live ones.
    pub requests_total: f64,
    /// Requests that ended by themselves.
    pub requests_finished: f64,
    /// Requests that were cancelled.
    pub requests_cancelled: f64,
    /// Admitted requests that ended in an error.
    pub requests_failed: f64,
    /// Requests that were refused or given up before they were admitted.
    pub requests_refused: f64,
    /// Prompt tokens of admitted requests.
    pub prompt_tokens_total: f64,
    /// Prompt tokens that the prefix cache was asked for.
    pub prefix_cache_queries_total: f64,
    /// Prompt tokens that it had.
    pub prefix_cache_hits_total: f64,
    /// The same by the place where they were.
    pub prefix_cache_hits_by_tier: CachedTokens,
    /// Tokens produced.
    pub generation_tokens_total: f64,
    /// Tokens of inputs that were turned into vectors.
    pub embedding_tokens_total: f64,
    /// Tokens computed, those of preempted sequences again.
    pub computed_tokens_total: f64,
    /// Sequences that lost their blocks and were computed again.
    pub preemptions_total: f64,
    /// Steps run.
    pub steps_total: f64,
    /// The places beside the pool where blocks are kept, in the order in which they are asked.
    pub kv_tiers: Vec<KvTierStats>,
    /// Steps that a CUDA device captures and launches again; not there on the CPU.
    pub cuda_graphs: Option<CudaGraphStats>,
    /// Milliseconds since the engine was opened.
    pub uptime_ms: f64,
}

impl From<ns_llm::Stats> for Stats {
    fn from(stats: ns_llm::Stats) -> Self {
        Stats {
            num_sequences_running: stats.num_sequences_running as f64,
            num_sequences_waiting: stats.num_sequences_waiting as f64,
            num_requests_preparing: stats.num_requests_preparing as f64,
            kv_blocks_total: stats.kv_blocks_total as f64,
            kv_blocks_used: stats.kv_blocks_used as f64,
            kv_blocks_cached: stats.kv_blocks_cached as f64,
            kv_blocks_free: stats.kv_blocks_free as f64,
            requests_total: stats.requests_total as f64,
            requests_finished: stats.requests_finished as f64,
            requests_cancelled: stats.requests_cancelled as f64,
            requests_failed: stats.requests_failed as f64,
            requests_refused: stats.requests_refused as f64,
            prompt_tokens_total: stats.prompt_tokens_total as f64,
            prefix_cache_queries_total: stats.prefix_cache_queries_total as f64,
            prefix_cache_hits_total: stats.prefix_cache_hits_total as f64,
            prefix_cache_hits_by_tier: stats.prefix_cache_hits_by_tier.into(),
            generation_tokens_total: stats.generation_tokens_total as f64,
            embedding_tokens_total: stats.embedding_tokens_total as f64,
            computed_tokens_total: stats.computed_tokens_total as f64,
            preemptions_total: stats.preemptions_total as f64,
            steps_total: stats.steps_total as f64,
            kv_tiers: stats.kv_tiers.into_iter().map(KvTierStats::from).collect(),
            cuda_graphs: stats.cuda_graphs.map(CudaGraphStats::from),
            uptime_ms: stats.uptime_ms as f64,
        }
    }
}

/// Steps that are captured as CUDA graphs: one for each number of sequences (rounded up to a power of two) and length of
/// contexts.
#[napi(object, object_from_js = false)]
pub struct CudaGraphStats {
    /// Graphs that are kept now.
    pub kept: f64,
    /// Steps that were captured.
    pub captured: f64,
    /// Steps that ran as one of them.
    pub launched: f64,
    /// Graphs that made room for others.
    pub evicted: f64,
    /// Why no step is captured; not there if they are.
    pub refusal: Option<String>,
}

impl From<ns_llm::CudaGraphStats> for CudaGraphStats {
    fn from(graphs: ns_llm::CudaGraphStats) -> Self {
        CudaGraphStats {
            kept: graphs.kept as f64,
            captured: graphs.captured as f64,
            launched: graphs.launched as f64,
            evicted: graphs.evicted as f64,
            refusal: graphs.refusal,
        }
    }
}

/// What a cache tier holds and what became of what it was asked. Counters count blocks and only grow.
#[napi(object, object_from_js = false)]
pub struct KvTierStats {
    /// "host", "disk" or "remote".
    #[napi(ts_type = "'host' | 'disk' | 'remote'")]
    pub name: String,
    /// Blocks held now, as far as this engine knows.
    pub blocks: f64,
    /// Bytes of them.
    pub bytes: f64,
    /// Asked for and given.
    pub hits: f64,
    /// Bytes of them.
    pub hit_bytes: f64,
    /// Asked for and not there.
    pub misses: f64,
    /// Taken in.
    pub stored: f64,
    /// Given up for others.
    pub evictions: f64,
    /// Calls that failed, damaged blocks included.
    pub faults: f64,
}

impl From<ns_llm::KvTierStats> for KvTierStats {
    fn from(tier: ns_llm::KvTierStats) -> Self {
        KvTierStats {
            name: tier.name.to_string(),
            blocks: tier.blocks as f64,
            bytes: tier.bytes as f64,
            hits: tier.hits as f64,
            hit_bytes: tier.hit_bytes as f64,
            misses: tier.misses as f64,
            stored: tier.stored as f64,
            evictions: tier.evictions as f64,
            faults: tier.faults as f64,
        }
    }
}

/// Prompt tokens whose KV did not have to be computed, by the place where it was.
#[napi(object, object_from_js = false)]
#[derive(Serialize)]
pub struct CachedTokens {
    /// In the KV pool.
    pub pool: f64,
    /// In host memory: the pool had given the blocks away.
    pub host: f64,
    /// On disk.
    pub disk: f64,
    /// In a store that nodes share.
    pub remote: f64,
}

impl From<ns_llm::CachedTokens> for CachedTokens {
    fn from(tokens: ns_llm::CachedTokens) -> Self {
        CachedTokens {
            pool: tokens.pool as f64,
            host: tokens.host as f64,
            disk: tokens.disk as f64,
            remote: tokens.remote as f64,
        }
    }
}

/// Bytes that an engine holds outside JavaScript's heap.
#[napi(object, object_from_js = false)]
pub struct MemoryUse {
    /// Packed weights.
    pub weights_bytes: f64,
    /// The KV pool, as reserved.
    pub kv_reserved_bytes: f64,
    /// The part of it that live sequences hold.
    pub kv_used_bytes: f64,
    /// The part of it that is kept for later.
    pub kv_cached_bytes: f64,
    /// Answers that are kept, and values of callers beside them.
    pub response_cache_bytes: f64,
}

impl From<ns_llm::MemoryUse> for MemoryUse {
    fn from(memory: ns_llm::MemoryUse) -> Self {
        MemoryUse {
            weights_bytes: memory.weights_bytes as f64,
            kv_reserved_bytes: memory.kv_reserved_bytes as f64,
            kv_used_bytes: memory.kv_used_bytes as f64,
            kv_cached_bytes: memory.kv_cached_bytes as f64,
            response_cache_bytes: memory.response_cache_bytes as f64,
        }
    }
}

/// What is loaded, and how it is run.
#[napi(object, object_from_js = false)]
pub struct ModelInfo {
    /// Last component of the model's path.
    pub name: String,
    /// As in `config.json`, such as `Qwen3ForCausalLM`.
    pub architecture: String,
    /// Numbers in all weights.
    pub num_parameters: f64,
    /// Those that are multiplied with every token of a prompt: the matrices of the layers.
    pub num_layer_parameters: f64,
    /// Entries of the vocabulary.
    pub vocab_size: f64,
    /// Longest sequence of this engine, tokens.
    pub context_tokens: f64,
    /// Whether it can write text; otherwise it makes vectors only.
    pub can_generate: bool,
    /// Numbers in a vector of `embed`.
    pub embedding_dimensions: f64,
    /// Longest input of `embed`, tokens; more is cut.
    pub max_embedding_tokens: f64,
    /// Whether messages can be rendered.
    pub has_chat_template: bool,
    /// How most weights are kept, such as "bf16" or "q4_k".
    pub weights: String,
    /// How keys and values are kept: "f32", "f16".
    pub kv_dtype: String,
    /// How they are kept outside the pool: "as-computed", or "int8", rounded: then an answer over blocks that came back from
    /// there is a little other than one that was computed whole.
    pub kv_tier_encoding: String,
    /// Why nothing is stored in `kvCacheDir`: another process writes it, or a newer version has. The engine does without what
    /// it may not use. Absent: it stores there, or none was given.
    pub kv_disk_refusal: Option<String>,
    /// Device kind: "cpu" or "cuda".
    pub device: String,
    /// Which device: "cpu", or number and name of a CUDA device, such as "cuda:0 NVIDIA H200".
    pub device_name: String,
    /// Why it was chosen: that it was asked for, or what `auto` found.
    pub device_reason: String,
    /// Instruction set in use (on a CUDA device its architecture, such as "sm_90"): "avx512bf16", "avx512", "avx2",
    /// "neoni8mm", "neondotprod", "neon", "portable".
    pub isa: String,
    /// Compute threads; 0 on a CUDA device.
    pub threads: f64,
    /// Milliseconds that opening took.
    pub load_ms: f64,
}

impl From<&ns_llm::ModelInfo> for ModelInfo {
    fn from(info: &ns_llm::ModelInfo) -> Self {
        ModelInfo {
            name: info.name.clone(),
            architecture: info.architecture.clone(),
            num_parameters: info.num_parameters as f64,
            num_layer_parameters: info.num_layer_parameters as f64,
            vocab_size: info.vocab_size as f64,
            context_tokens: info.context_tokens as f64,
            can_generate: info.can_generate,
            embedding_dimensions: info.embedding_dimensions as f64,
            max_embedding_tokens: info.max_embedding_tokens as f64,
            has_chat_template: info.has_chat_template,
            weights: info.weights.to_string(),
            kv_dtype: info.kv_dtype.to_string(),
            kv_tier_encoding: info.kv_tier_encoding.to_string(),
            kv_disk_refusal: info.kv_disk_refusal.clone(),
            device: info.device.to_string(),
            device_name: info.device_name.clone(),
            device_reason: info.device_reason.clone(),
            isa: info.isa.to_string(),
            threads: info.threads as f64,
            load_ms: info.load_ms,
        }
    }
}
