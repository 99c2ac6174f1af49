//! # Figures
//!
//! What is loaded, what was done, and how many bytes it takes. The program gives a struct with its `struct_size` set, and
//! finds it filled.

use ns_llm_core::{KvTierStats, MemoryUse, ModelInfo, Stats};

use crate::engine::{ENGINES, ns_llm_engine};
use crate::failure::{Failure, boundary};
use crate::params::{SizedStruct, check_struct, write_struct};
use crate::status::ns_llm_status;
use crate::text::ns_llm_text;

/// What is loaded. The texts are the library's and valid until the engine is freed.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ns_llm_model_info {
    /// `sizeof(ns_llm_model_info)`.
    pub struct_size: usize,
    /// Last component of the model's path.
    pub name: ns_llm_text,
    /// As in the model's config.json, such as "Qwen3ForCausalLM".
    pub architecture: ns_llm_text,
    /// How the weights are kept, such as "bf16".
    pub weights: ns_llm_text,
    /// How keys and values are kept, such as "f16".
    pub kv_dtype: ns_llm_text,
    /// "cpu" or "cuda".
    pub device: ns_llm_text,
    /// The instruction set in use, such as "avx2" or "portable"; on a CUDA device its architecture, such as "sm_90".
    pub isa: ns_llm_text,
    /// Numbers in all weights.
    pub num_parameters: u64,
    /// Those that are multiplied with every token of a prompt: the matrices of the layers.
    pub num_layer_parameters: u64,
    /// Entries of the vocabulary: token ids are below this.
    pub vocab_size: u64,
    /// Longest sequence, prompt and answer, in tokens.
    pub context_tokens: u64,
    /// Elements of the vector that an embedding request gets.
    pub embedding_dimensions: u64,
    /// Longest input of an embedding request, tokens; more is cut.
    pub max_embedding_tokens: u64,
    /// Compute threads; 0 on a CUDA device.
    pub threads: u64,
    /// What opening took, milliseconds.
    pub load_ms: f64,
    /// 1 if the model can write text; 0 if it makes vectors only.
    pub can_generate: u32,
    /// 1 if messages can be turned into a prompt, else 0.
    pub has_chat_template: u32,
    /// Which device: "cpu", or number and name of a CUDA device, such as "cuda:0 NVIDIA H200".
    pub device_name: ns_llm_text,
    /// Why it was chosen: that it was asked for, or what NS_LLM_DEVICE_AUTO found.
    pub device_reason: ns_llm_text,
    /// How keys and values are kept outside the pool: "as-computed", or "int8", rounded: then an answer over blocks that came
    /// back from there is a little other than one that was computed whole.
    pub kv_tier_encoding: ns_llm_text,
    /// Why nothing is stored in `kv_cache_dir`: another process writes it, or a newer version has. The engine does without what
    /// it may not use. Empty: it stores there, or none was given.
    pub kv_disk_refusal: ns_llm_text,
}

// SAFETY: `repr(C)`, begins with a `usize`; numbers and raw pointers.
unsafe impl SizedStruct for ns_llm_model_info {}

/// What an engine has done and is doing. Those named `_total` only grow.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ns_llm_stats {
    /// `sizeof(ns_llm_stats)`.
    pub struct_size: usize,
    /// Sequences that are being computed.
    pub num_sequences_running: u64,
    /// Sequences that wait.
    pub num_sequences_waiting: u64,
    /// Blocks of the KV pool.
    pub kv_blocks_total: u64,
    /// Blocks that live sequences hold.
    pub kv_blocks_used: u64,
    /// Blocks that hold KV for later, and are given away when needed.
    pub kv_blocks_cached: u64,
    /// Blocks that hold nothing.
    pub kv_blocks_free: u64,
    /// Requests admitted: the finished, cancelled, failed and live ones.
    pub requests_total: u64,
    /// Requests that ended by themselves.
    pub requests_finished_total: u64,
    /// Requests that were cancelled.
    pub requests_cancelled_total: u64,
    /// Admitted requests that ended in an error.
    pub requests_failed_total: u64,
    /// Requests that were refused or given up before they were admitted.
    pub requests_refused_total: u64,
    /// Prompt tokens of admitted requests.
    pub prompt_tokens_total: u64,
    /// Prompt tokens that the prefix cache was asked for.
    pub prefix_cache_queries_total: u64,
    /// Prompt tokens that it had.
    pub prefix_cache_hits_total: u64,
    /// Tokens produced.
    pub generation_tokens_total: u64,
    /// Tokens of inputs that were turned into vectors.
    pub embedding_tokens_total: u64,
    /// Tokens computed, those of preempted sequences again.
    pub computed_tokens_total: u64,
    /// Sequences that lost their blocks and were computed again.
    pub preemptions_total: u64,
    /// Steps run.
    pub steps_total: u64,
    /// Milliseconds since the engine was opened.
    pub uptime_ms: u64,
    /// Of `prefix_cache_hits_total`, tokens whose KV was in the pool.
    pub prefix_cache_pool_hits_total: u64,
    /// Those that the pool had given away and host memory had kept.
    pub prefix_cache_host_hits_total: u64,
    /// Those that were read from disk.
    pub prefix_cache_disk_hits_total: u64,
    /// Those that came from a store that nodes share.
    pub prefix_cache_remote_hits_total: u64,
    /// Graphs of steps that a CUDA device keeps now. This and the next four are 0 on the CPU.
    pub cuda_graphs_kept: u64,
    /// Steps that were captured as graphs.
    pub cuda_graphs_captured_total: u64,
    /// Steps that ran as one of them.
    pub cuda_graphs_launched_total: u64,
    /// Graphs that made room for others.
    pub cuda_graphs_evicted_total: u64,
    /// 1: no step of this engine is captured, because it was not asked for or a capture failed.
    pub cuda_graphs_refused: u64,
    /// Requests that are not sequences yet, one for each choice or input: being rendered and tokenized, or next to be.
    pub num_requests_preparing: u64,
}

// SAFETY: `repr(C)`, begins with a `usize`, all numbers.
unsafe impl SizedStruct for ns_llm_stats {}

/// A place beside the pool where an engine keeps KV blocks.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ns_llm_kv_tier {
    /// Host memory: `kv_host_bytes`.
    NS_LLM_KV_TIER_HOST = 0,
    /// Files: `kv_cache_dir`.
    NS_LLM_KV_TIER_DISK = 1,
    /// A store that nodes share.
    NS_LLM_KV_TIER_REMOTE = 2,
}

/// The names of `ns_llm_kv_tier` in the engine's reports, in their order.
const TIER_NAMES: [&str; 3] = ["host", "disk", "remote"];

/// What a tier holds and what became of what it was asked. All but `bytes` and `hit_bytes` count blocks; those named `_total`
/// only grow.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ns_llm_kv_tier_stats {
    /// `sizeof(ns_llm_kv_tier_stats)`.
    pub struct_size: usize,
    /// 1 if the engine has this tier; else everything here is 0.
    pub is_there: u64,
    /// Held now, as far as this engine knows.
    pub blocks: u64,
    /// Bytes of them.
    pub bytes: u64,
    /// Asked for and given.
    pub hits_total: u64,
    /// Bytes of them.
    pub hit_bytes_total: u64,
    /// Asked for and not there.
    pub misses_total: u64,
    /// Taken in.
    pub stored_total: u64,
    /// Given up for others.
    pub evictions_total: u64,
    /// Calls that failed, damaged blocks included. Each was a miss and no more.
    pub faults_total: u64,
}

// SAFETY: `repr(C)`, begins with a `usize`, all numbers.
unsafe impl SizedStruct for ns_llm_kv_tier_stats {}

/// Bytes that an engine holds.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ns_llm_memory_use {
    /// `sizeof(ns_llm_memory_use)`.
    pub struct_size: usize,
    /// Weights, as they are kept.
    pub weights_bytes: u64,
    /// The KV pool, as reserved.
    pub kv_reserved_bytes: u64,
    /// The part of it that live sequences hold.
    pub kv_used_bytes: u64,
    /// The part of it that is kept for later.
    pub kv_cached_bytes: u64,
    /// Answers that are kept in memory.
    pub response_cache_bytes: u64,
}

// SAFETY: `repr(C)`, begins with a `usize`, all numbers.
unsafe impl SizedStruct for ns_llm_memory_use {}

/// Says what is loaded.
///
/// Ownership:  `*out_info` is the caller's, its texts the library's until the engine is freed.
/// Threads:    any, also inside a callback.
/// NULL:       `out_info` must not be NULL.
/// Returns:    NS_LLM_OK; NS_LLM_BAD_HANDLE; NS_LLM_NULL_ARGUMENT; NS_LLM_MISALIGNED_POINTER; NS_LLM_INVALID_ARGUMENT
///             about `struct_size`; NS_LLM_FORKED_PROCESS; NS_LLM_INTERNAL.
/// On failure: `*out_info` is unchanged.
///
/// # Safety
/// `out_info` points to a `size_t` and to as many writable bytes as that says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ns_llm_engine_info(engine: ns_llm_engine, out_info: *mut ns_llm_model_info) -> ns_llm_status {
    boundary(|| {
        // SAFETY: promised by the caller.
        unsafe { check_struct("out_info", out_info) }?;
        let live = ENGINES.get(engine)?;
        // SAFETY: promised by the caller.
        unsafe { write_struct("out_info", out_info, &live.engine.info().into()) }
    })
}

/// Says what an engine has done so far, as of its last step.
///
/// Ownership:  `*out_stats` is the caller's.
/// Threads:    any, also inside a callback.
/// NULL:       `out_stats` must not be NULL.
/// Returns:    NS_LLM_OK; NS_LLM_BAD_HANDLE; NS_LLM_NULL_ARGUMENT; NS_LLM_MISALIGNED_POINTER; NS_LLM_INVALID_ARGUMENT
///             about `struct_size`; NS_LLM_FORKED_PROCESS; NS_LLM_INTERNAL.
/// On failure: `*out_stats` is unchanged.
///
/// # Safety
/// `out_stats` points to a `size_t` and to as many writable bytes as that says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ns_llm_engine_stats(engine: ns_llm_engine, out_stats: *mut ns_llm_stats) -> ns_llm_status {
    boundary(|| {
        // SAFETY: promised by the caller.
        unsafe { check_struct("out_stats", out_stats) }?;
        let live = ENGINES.get(engine)?;
        // SAFETY: promised by the caller.
        unsafe { write_struct("out_stats", out_stats, &live.engine.stats().into()) }
    })
}

/// Says what one of the places beside the pool, a value of `ns_llm_kv_tier`, holds and has done, as of the last step.
///
/// Ownership:  `*out_stats` is the caller's.
/// Threads:    any, also inside a callback.
/// NULL:       `out_stats` must not be NULL.
/// Returns:    NS_LLM_OK, also if the engine does not have this tier; NS_LLM_UNSUPPORTED if the library does not know it;
///             NS_LLM_BAD_HANDLE; NS_LLM_NULL_ARGUMENT; NS_LLM_MISALIGNED_POINTER; NS_LLM_INVALID_ARGUMENT about
///             `struct_size`; NS_LLM_FORKED_PROCESS; NS_LLM_INTERNAL.
/// On failure: `*out_stats` is unchanged.
///
/// # Safety
/// `out_stats` points to a `size_t` and to as many writable bytes as that says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ns_llm_engine_kv_tier(
    engine: ns_llm_engine,
    tier: u32,
    out_stats: *mut ns_llm_kv_tier_stats,
) -> ns_llm_status {
    boundary(|| {
        // SAFETY: promised by the caller.
        unsafe { check_struct("out_stats", out_stats) }?;
        let live = ENGINES.get(engine)?;
        let name = TIER_NAMES.get(tier as usize);
        let name = name.ok_or_else(|| Failure::Unsupported { argument: "tier", reason: format!("tier {tier}") })?;
        let stats = live.engine.stats();
        let found = stats.kv_tiers.iter().find(|stats| stats.name == *name);
        // SAFETY: promised by the caller.
        unsafe { write_struct("out_stats", out_stats, &found.into()) }
    })
}

/// Says how many bytes an engine holds.
///
/// Ownership:  `*out_memory` is the caller's.
/// Threads:    any, also inside a callback.
/// NULL:       `out_memory` must not be NULL.
/// Returns:    NS_LLM_OK; NS_LLM_BAD_HANDLE; NS_LLM_NULL_ARGUMENT; NS_LLM_MISALIGNED_POINTER; NS_LLM_INVALID_ARGUMENT
///             about `struct_size`; NS_LLM_FORKED_PROCESS; NS_LLM_INTERNAL.
/// On failure: `*out_memory` is unchanged.
///
/// # Safety
/// `out_memory` points to a `size_t` and to as many writable bytes as that says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ns_llm_engine_memory(
    engine: ns_llm_engine,
    out_memory: *mut ns_llm_memory_use,
) -> ns_llm_status {
    boundary(|| {
        // SAFETY: promised by the caller.
        unsafe { check_struct("out_memory", out_memory) }?;
        let live = ENGINES.get(engine)?;
        // SAFETY: promised by the caller.
        unsafe { write_struct("out_memory", out_memory, &live.engine.memory().into()) }
    })
}

/// Says whether an engine takes requests. Costs next to nothing: made for a health check.
///
/// Threads:    any, also inside a callback.
/// Returns:    NS_LLM_OK; NS_LLM_INTERNAL if a defect of this library ended the engine, with the reason in
///             ns_llm_last_error(): free it and open a new one; NS_LLM_BAD_HANDLE (also for 0); NS_LLM_CLOSED if it is just
///             being freed; NS_LLM_FORKED_PROCESS.
#[unsafe(no_mangle)]
pub extern "C" fn ns_llm_engine_health(engine: ns_llm_engine) -> ns_llm_status {
    boundary(|| ENGINES.get(engine)?.engine.health().map_err(Failure::from))
}

impl From<&ModelInfo> for ns_llm_model_info {
    fn from(info: &ModelInfo) -> Self {
        ns_llm_model_info {
            struct_size: size_of::<ns_llm_model_info>(),
            name: ns_llm_text::view(&info.name),
            architecture: ns_llm_text::view(&info.architecture),
            weights: ns_llm_text::view(info.weights),
            kv_dtype: ns_llm_text::view(info.kv_dtype),
            device: ns_llm_text::view(info.device),
            isa: ns_llm_text::view(info.isa),
            num_parameters: info.num_parameters,
            num_layer_parameters: info.num_layer_parameters,
            vocab_size: info.vocab_size as u64,
            context_tokens: info.context_tokens as u64,
            embedding_dimensions: info.embedding_dimensions as u64,
            max_embedding_tokens: info.max_embedding_tokens as u64,
            threads: info.threads as u64,
            load_ms: info.load_ms,
            can_generate: u32::from(info.can_generate),
            has_chat_template: u32::from(info.has_chat_template),
            device_name: ns_llm_text::view(&info.device_name),
            device_reason: ns_llm_text::view(&info.device_reason),
            kv_tier_encoding: ns_llm_text::view(info.kv_tier_encoding),
            kv_disk_refusal: ns_llm_text::view(info.kv_disk_refusal.as_deref().unwrap_or("")),
        }
    }
}

impl From<Stats> for ns_llm_stats {
    fn from(stats: Stats) -> Self {
        let graphs = stats.cuda_graphs.unwrap_or_default();
        ns_llm_stats {
            struct_size: size_of::<ns_llm_stats>(),
            num_sequences_running: stats.num_sequences_running as u64,
            num_sequences_waiting: stats.num_sequences_waiting as u64,
            kv_blocks_total: stats.kv_blocks_total as u64,
            kv_blocks_used: stats.kv_blocks_used as u64,
            kv_blocks_cached: stats.kv_blocks_cached as u64,
            kv_blocks_free: stats.kv_blocks_free as u64,
            requests_total: stats.requests_total,
            requests_finished_total: stats.requests_finished,
            requests_cancelled_total: stats.requests_cancelled,
            requests_failed_total: stats.requests_failed,
            requests_refused_total: stats.requests_refused,
            prompt_tokens_total: stats.prompt_tokens_total,
            prefix_cache_queries_total: stats.prefix_cache_queries_total,
            prefix_cache_hits_total: stats.prefix_cache_hits_total,
            generation_tokens_total: stats.generation_tokens_total,
            embedding_tokens_total: stats.embedding_tokens_total,
            computed_tokens_total: stats.computed_tokens_total,
            preemptions_total: stats.preemptions_total,
            steps_total: stats.steps_total,
            uptime_ms: stats.uptime_ms,
            prefix_cache_pool_hits_total: stats.prefix_cache_hits_by_tier.pool as u64,
            prefix_cache_host_hits_total: stats.prefix_cache_hits_by_tier.host as u64,
            prefix_cache_disk_hits_total: stats.prefix_cache_hits_by_tier.disk as u64,
            prefix_cache_remote_hits_total: stats.prefix_cache_hits_by_tier.remote as u64,
            cuda_graphs_kept: graphs.kept,
            cuda_graphs_captured_total: graphs.captured,
            cuda_graphs_launched_total: graphs.launched,
            cuda_graphs_evicted_total: graphs.evicted,
            cuda_graphs_refused: u64::from(graphs.refusal.is_some()),
            num_requests_preparing: stats.num_requests_preparing as u64,
        }
    }
}

impl From<Option<&KvTierStats>> for ns_llm_kv_tier_stats {
    fn from(found: Option<&KvTierStats>) -> Self {
        let stats = found.copied().unwrap_or_default();
        ns_llm_kv_tier_stats {
            struct_size: size_of::<ns_llm_kv_tier_stats>(),
            is_there: u64::from(found.is_some()),
            blocks: stats.blocks,
            bytes: stats.bytes,
            hits_total: stats.hits,
            hit_bytes_total: stats.hit_bytes,
            misses_total: stats.misses,
            stored_total: stats.stored,
            evictions_total: stats.evictions,
            faults_total: stats.faults,
        }
    }
}

impl From<MemoryUse> for ns_llm_memory_use {
    fn from(memory: MemoryUse) -> Self {
        ns_llm_memory_use {
            struct_size: size_of::<ns_llm_memory_use>(),
            weights_bytes: memory.weights_bytes,
            kv_reserved_bytes: memory.kv_reserved_bytes,
            kv_used_bytes: memory.kv_used_bytes,
            kv_cached_bytes: memory.kv_cached_bytes,
            response_cache_bytes: memory.response_cache_bytes,
        }
    }
}
