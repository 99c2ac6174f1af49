//! Counters, times and sizes of an engine, as a snapshot of plain values.

mod meters;
mod pace;

use std::time::Duration;

use crate::request::CachedTokens;
pub(crate) use meters::Meters;
pub(crate) use pace::Pace;

/// What an engine has done and is doing. Counters only grow.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Stats {
    /// Sequences that are being computed.
    pub num_sequences_running: usize,
    /// Sequences that wait.
    pub num_sequences_waiting: usize,
    /// Requests that are not sequences yet, one for each choice or input: being rendered and tokenized, or next to be.
    pub num_requests_preparing: usize,
    /// Blocks of the KV pool.
    pub kv_blocks_total: usize,
    /// Blocks that live sequences hold.
    pub kv_blocks_used: usize,
    /// Blocks that hold KV for later, and are given away when needed.
    pub kv_blocks_cached: usize,
    /// Blocks that hold nothing.
    pub kv_blocks_free: usize,
    /// Requests admitted: the finished, cancelled, failed and live ones.
    pub requests_total: u64,
    /// Requests that ended by themselves.
    pub requests_finished: u64,
    /// Requests that were cancelled (a dropped stream counts).
    pub requests_cancelled: u64,
    /// Admitted requests that ended in an error.
    pub requests_failed: u64,
    /// Requests that were refused or given up before they were admitted.
    pub requests_refused: u64,
    /// Prompt tokens of admitted requests that generate.
    pub prompt_tokens_total: u64,
    /// Prompt tokens that the prefix cache was asked for.
    pub prefix_cache_queries_total: u64,
    /// Prompt tokens that it had.
    pub prefix_cache_hits_total: u64,
    /// The same by the place where they were.
    pub prefix_cache_hits_by_tier: CachedTokens,
    /// Tokens produced.
    pub generation_tokens_total: u64,
    /// Tokens of inputs that were turned into vectors.
    pub embedding_tokens_total: u64,
    /// Tokens computed, for text and for vectors; those of preempted sequences again.
    pub computed_tokens_total: u64,
    /// Sequences that lost their blocks and were computed again.
    pub preemptions_total: u64,
    /// Steps run, of either kind.
    pub steps_total: u64,
    /// The places beside the pool where blocks are kept, in the order in which they are asked.
    pub kv_tiers: Vec<KvTierStats>,
    /// Steps that a CUDA device captures and launches again; `None` on the CPU.
    pub cuda_graphs: Option<CudaGraphStats>,
    /// How long things took, and how large they were.
    pub histograms: Histograms,
    /// Milliseconds since the engine was opened.
    pub uptime_ms: u64,
}

/// Steps that are captured as CUDA graphs: one for each number of rows (rounded up to a power of two) and length of contexts that
/// decoding steps have.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CudaGraphStats {
    /// Graphs that are kept now.
    pub kept: u64,
    /// Steps that were captured.
    pub captured: u64,
    /// Steps that ran as one of them.
    pub launched: u64,
    /// Graphs that made room for others.
    pub evicted: u64,
    /// Why no step is captured; `None`: they are.
    pub refusal: Option<String>,
}

/// Times and sizes since the engine was opened. Those of whole generations count the ones that ended by themselves, from the
/// response cache too; a request's times count from its arrival, wherever that was.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Histograms {
    /// From a generation's arrival to its first token.
    pub first_token_seconds: Histogram,
    /// Between two tokens of a choice.
    pub inter_token_seconds: Histogram,
    /// The same as a mean of each generation.
    pub per_output_token_seconds: Histogram,
    /// From a generation's arrival to its end.
    pub end_to_end_seconds: Histogram,
    /// From its arrival to its first step.
    pub queue_seconds: Histogram,
    /// From its first step to its first token.
    pub prefill_seconds: Histogram,
    /// From its first token to its last.
    pub decode_seconds: Histogram,
    /// From its first step to its last token.
    pub inference_seconds: Histogram,
    /// Of a step, of either kind.
    pub step_seconds: Histogram,
    /// Tokens of a prompt.
    pub prompt_tokens: Histogram,
    /// Tokens of an answer, all choices.
    pub generation_tokens: Histogram,
    /// Tokens of a step.
    pub step_tokens: Histogram,
}

/// How often which values came. Counts only grow.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Histogram {
    /// The largest value of each bucket but the last, which has no bound; ascending.
    pub bounds: &'static [f64],
    /// Values in each bucket alone.
    pub counts: Vec<u64>,
    /// Of all values.
    pub sum: f64,
}

impl Histogram {
    /// Values that are no larger than each bound, and at last all of them.
    pub fn cumulative(&self) -> impl Iterator<Item = u64> + '_ {
        self.counts.iter().scan(0, |total, count| {
            *total += count;
            Some(*total)
        })
    }

    /// All values.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// 0 without values.
    pub fn mean(&self) -> f64 {
        if self.count() == 0 { 0.0 } else { self.sum / self.count() as f64 }
    }

    /// About the value that a `share` (0.0 to 1.0) of all values does not exceed, as Prometheus reckons it: evenly between the
    /// bounds of its bucket. Above all bounds the last one; 0 without values.
    pub fn quantile(&self, share: f64) -> f64 {
        let rank = share * self.count() as f64;
        let Some(bucket) = self.cumulative().position(|count| count > 0 && count as f64 >= rank) else { return 0.0 };
        let below: u64 = self.counts[..bucket].iter().sum();
        let low = if bucket == 0 { 0.0 } else { self.bounds[bucket - 1] };
        let Some(high) = self.bounds.get(bucket) else { return low };
        low + (high - low) * (rank - below as f64) / self.counts[bucket] as f64
    }
}

/// A step that is being computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RunningStep {
    /// Tokens of it.
    pub num_tokens: usize,
    /// Since when it runs.
    pub elapsed: Duration,
    /// What it should take at most, by what steps took of late; `None` before the first one was done.
    pub expected: Option<Duration>,
}

/// What a cache tier holds and what became of what it was asked. Counters count blocks and only grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct KvTierStats {
    /// "host", "disk" or "remote".
    pub name: &'static str,
    /// Blocks held now, as far as this engine knows.
    pub blocks: u64,
    /// Bytes of them.
    pub bytes: u64,
    /// Asked for and given.
    pub hits: u64,
    /// Bytes of them.
    pub hit_bytes: u64,
    /// Asked for and not there.
    pub misses: u64,
    /// Taken in.
    pub stored: u64,
    /// Given up for others.
    pub evictions: u64,
    /// Calls that failed, damaged blocks included.
    pub faults: u64,
}

/// Bytes that an engine holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MemoryUse {
    /// Packed weights.
    pub weights_bytes: u64,
    /// The KV pool, as reserved.
    pub kv_reserved_bytes: u64,
    /// The part of it that live sequences hold.
    pub kv_used_bytes: u64,
    /// The part of it that is kept for later.
    pub kv_cached_bytes: u64,
    /// Answers that are kept, their places in the maps included.
    pub response_cache_bytes: u64,
}

/// What a response cache has done and holds. Counters only grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ResponseCacheStats {
    /// Requests that were answered from it.
    pub answers: u64,
    /// Look-ups, of requests and by name, that found something.
    pub hits: u64,
    /// Look-ups that did not.
    pub misses: u64,
    /// Entries stored.
    pub stores: u64,
    /// Entries given up for want of room.
    pub evictions: u64,
    /// Entries given up because their time was over.
    pub expired: u64,
    /// Entries given up by tag, by version, or all at once.
    pub invalidated: u64,
    /// Answers not stored because they had become invalid while they were computed.
    pub outdated: u64,
    /// Answers and values not stored because they were too large.
    pub too_large: u64,
    /// Entries held.
    pub entries: u64,
    /// Bytes of these.
    pub bytes: u64,
    /// The budget.
    pub max_bytes: u64,
    /// The version that every key holds.
    pub version: u64,
    /// Requests that were answered from disk; each is counted as a miss above.
    pub disk_hits: u64,
    /// Answers on disk.
    pub disk_entries: u64,
    /// Bytes of the files there.
    pub disk_bytes: u64,
    /// Requests that were answered from a store that nodes share; each is counted as a miss above.
    pub remote_hits: u64,
    /// Answers written to disk and to that store.
    pub tier_stores: u64,
    /// Answers not written there: too much waited, or the place was left alone because it failed.
    pub tier_drops: u64,
    /// Calls to these places that failed, damaged answers included.
    pub tier_faults: u64,
    /// Requests that were computed because these places took too long to answer.
    pub tier_give_ups: u64,
}

/// What is loaded.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelInfo {
    /// Last component of the model's path.
    pub name: String,
    /// As in `config.json`, such as `Qwen3ForCausalLM`.
    pub architecture: String,
    /// Numbers in all weights.
    pub num_parameters: u64,
    /// Those that are multiplied with every token of a prompt: the matrices of the layers.
    pub num_layer_parameters: u64,
    /// Entries of the vocabulary.
    pub vocab_size: usize,
    /// Longest sequence of this engine, tokens.
    pub context_tokens: usize,
    /// Whether it can write text; otherwise it makes vectors only.
    pub can_generate: bool,
    /// Elements of a vector that an embedding request gets.
    pub embedding_dimensions: usize,
    /// Longest input of an embedding request, tokens; more is cut.
    pub max_embedding_tokens: usize,
    /// Whether messages can be rendered.
    pub has_chat_template: bool,
    /// Form in which the weights are kept, by [`WeightFormat::name`](crate::WeightFormat::name).
    pub weights: &'static str,
    /// Form in which keys and values are kept, by [`KvDtype::name`](crate::KvDtype::name).
    pub kv_dtype: &'static str,
    /// How they are kept in the tiers: "as-computed", or "int8", rounded: then an answer over blocks that came back from there is
    /// a little other than one that was computed whole.
    pub kv_tier_encoding: &'static str,
    /// Why nothing is stored in the directory that was given for KV: another process writes it, or a newer version has. The
    /// engine does without what it may not use. `None`: it stores there, or none was given.
    pub kv_disk_refusal: Option<String>,
    /// Device kind: "cpu" or "cuda".
    pub device: &'static str,
    /// Which device: "cpu", or a CUDA device's number and name, such as "cuda:0 NVIDIA H200".
    pub device_name: String,
    /// Why it was chosen: that it was asked for, or what `auto` found.
    pub device_reason: String,
    /// Instruction set in use, such as "avx2" or "portable"; on a CUDA device its architecture, such as "sm_90", or
    /// "sm_90a" where products of many rows use Hopper's own instructions.
    pub isa: &'static str,
    /// Compute threads; 0 on a CUDA device.
    pub threads: usize,
    /// Milliseconds that opening took.
    pub load_ms: f64,
}
