//! The options with which an engine is opened, and what they hold.

use std::path::PathBuf;

use super::forms::{Device, KvDtype, KvTierEncoding, WeightFormat};
use super::limits::{
    BLOCK_TOKENS_MULTIPLE, DEFAULT_BLOCK_TOKENS, DEFAULT_KV_DISK_BYTES, DEFAULT_KV_LOAD_BUDGET_MS,
    DEFAULT_MAX_CUDA_GRAPHS, DEFAULT_MAX_RUNNING_SEQUENCES, DEFAULT_MAX_WAITING_REQUESTS, DEFAULT_MIXED_BUDGET_TOKENS,
    DEFAULT_PREFILL_BUDGET_TOKENS, DEFAULT_REMOTE_PREFIX, DEFAULT_REMOTE_TIMEOUT_MS, DEFAULT_REMOTE_TTL_S,
    DEFAULT_RESPONSE_DISK_BYTES, DEFAULT_RESPONSE_TTL_MS, MAX_BLOCK_TOKENS, MAX_BUDGET_TOKENS, MAX_CUDA_GRAPHS,
    MAX_KV_LOAD_BUDGET_MS, MAX_KV_TIER_BYTES, MAX_RESPONSE_CACHE_BYTES, MAX_RESPONSE_TTL_MS, MAX_RUNNING_SEQUENCES,
    MAX_THREADS, MAX_WAITING_REQUESTS_LIMIT,
};
use super::ranges::{at_most, in_range, invalid};
use crate::error::Result;

/// How the compute threads stand to the other threads of the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ThreadPriority {
    /// Below: an event loop in the same process keeps its latency.
    #[default]
    BelowNormal,
    /// The same.
    Normal,
}

/// How far the loading of weights is.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct LoadProgress {
    /// Bytes of weights that are packed.
    pub loaded_bytes: u64,
    /// Bytes of weights in all.
    pub total_bytes: u64,
}

impl LoadProgress {
    /// Share that is done, 0.0 to 1.0.
    pub fn fraction(&self) -> f64 {
        if self.total_bytes == 0 { 1.0 } else { self.loaded_bytes as f64 / self.total_bytes as f64 }
    }
}

/// Called while a model loads; returning `false` cancels the load with [`Error::Cancelled`](crate::Error::Cancelled).
pub type ProgressCallback = Box<dyn FnMut(LoadProgress) -> bool + Send>;

/// A store of KV blocks that nodes share, which speaks Redis's protocol. The way to it is not encrypted, and what it holds is
/// as private as the prompts: give it a network of its own. `Debug` shows neither secret nor password.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct KvRemoteOptions {
    /// `redis://[[user]:password@]host[:port][/database]`
    pub url: String,
    /// What all nodes know and the store does not, 16 to 1,024 bytes: records that are not authenticated with it are not
    /// used. `None`: the store is trusted not to make records up; damage is found all the same.
    pub secret: Option<String>,
    /// How long a block is kept that nobody stores again, seconds.
    pub ttl_s: u64,
    /// What all names in the store begin with.
    pub prefix: String,
    /// How long one call may take, milliseconds.
    pub timeout_ms: u64,
    /// Bytes of KV, and as many of answers, that this node stores there within `ttl_s` for one owner of namespaces
    /// (see [`EngineOptions::kv_namespace_share`]); `None`: no limit. What goes first there is the store's affair: this keeps
    /// one owner's flood from filling it.
    pub owner_bytes: Option<u64>,
}

impl KvRemoteOptions {
    /// The store at `url`, with every default.
    pub fn new(url: impl Into<String>) -> Self {
        KvRemoteOptions {
            url: url.into(),
            secret: None,
            ttl_s: DEFAULT_REMOTE_TTL_S,
            prefix: DEFAULT_REMOTE_PREFIX.to_string(),
            timeout_ms: DEFAULT_REMOTE_TIMEOUT_MS,
            owner_bytes: None,
        }
    }
    /// What an owner may store, and for how long it counts, seconds.
    pub(crate) fn owner_limit(&self) -> Option<(u64, u64)> {
        Some((self.owner_bytes?, self.ttl_s))
    }
    /// Sets what this node stores for one owner, bytes.
    pub fn owner_bytes(mut self, bytes: u64) -> Self {
        self.owner_bytes = Some(bytes);
        self
    }
    /// Sets what all nodes know and the store does not.
    pub fn secret(mut self, secret: impl Into<String>) -> Self {
        self.secret = Some(secret.into());
        self
    }
    /// Sets how long a block is kept.
    pub fn ttl_s(mut self, seconds: u64) -> Self {
        self.ttl_s = seconds;
        self
    }
    /// Sets what all names begin with.
    pub fn prefix(mut self, prefix: impl Into<String>) -> Self {
        self.prefix = prefix.into();
        self
    }
    /// Sets how long one call may take.
    pub fn timeout_ms(mut self, milliseconds: u64) -> Self {
        self.timeout_ms = milliseconds;
        self
    }
}

impl std::fmt::Debug for KvRemoteOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KvRemoteOptions").field("prefix", &self.prefix).finish_non_exhaustive()
    }
}

/// Sizes and times of a response cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct ResponseCacheOptions {
    /// Bytes of all entries, their places in the maps included; 0: nothing is kept.
    pub max_bytes: u64,
    /// Entries at most.
    pub max_entries: u64,
    /// How long an entry is found after it was stored, milliseconds.
    pub ttl_ms: u64,
    /// Whether an entry's time follows its use: from a sixth of `ttl_ms` to twice as long, once it was found.
    pub adaptive_ttl: bool,
    /// Part of every key: entries of another version are not found.
    pub version: u64,
    /// Bytes of the files in which answers outlive the process, in `answers` beneath
    /// [`kv_cache_dir`](EngineOptions::kv_cache_dir); 0, or no such directory: they end with it. The process that writes KV
    /// there writes answers too; others do not use them.
    pub disk_bytes: u64,
    /// Whether answers are shared through [`kv_remote`](EngineOptions::kv_remote), if there is one.
    pub remote: bool,
}

impl Default for ResponseCacheOptions {
    fn default() -> Self {
        ResponseCacheOptions {
            max_bytes: 0,
            max_entries: u64::MAX,
            ttl_ms: DEFAULT_RESPONSE_TTL_MS,
            adaptive_ttl: false,
            version: 0,
            disk_bytes: DEFAULT_RESPONSE_DISK_BYTES,
            remote: true,
        }
    }
}

impl ResponseCacheOptions {
    /// A cache of so many bytes.
    pub fn new(max_bytes: u64) -> Self {
        ResponseCacheOptions { max_bytes, ..ResponseCacheOptions::default() }
    }

    /// Checks every range.
    pub fn validate(&self) -> Result<()> {
        in_range("response_cache.max_bytes", self.max_bytes, 0, MAX_RESPONSE_CACHE_BYTES)?;
        in_range("response_cache.disk_bytes", self.disk_bytes, 0, MAX_KV_TIER_BYTES)?;
        in_range("response_cache.ttl_ms", self.ttl_ms, 1, MAX_RESPONSE_TTL_MS)
    }
}

/// How to open an engine. Build it with [`EngineOptions::new`] and the methods below; [`Engine::open`] checks it.
///
/// [`Engine::open`]: crate::Engine::open
#[non_exhaustive]
pub struct EngineOptions {
    /// Folder of the model, or its GGUF file (of a split one, the first).
    pub model: PathBuf,
    /// Where to compute.
    pub device: Device,
    /// Form of the weights.
    pub weights: WeightFormat,
    /// How keys and values are kept; `None`: f32 with f32 weights, else f16. Part of every block's key.
    pub kv_dtype: Option<KvDtype>,
    /// Compute threads; `None`: all cores, but one is left to the host when there are more than two.
    pub threads: Option<usize>,
    /// Priority of the compute threads.
    pub thread_priority: ThreadPriority,
    /// Longest sequence, prompt and answer, in tokens; `None`: the model's own, as far as the pool holds it.
    pub context_tokens: Option<usize>,
    /// Bytes of the KV pool; `None`: a quarter of the available memory, at most 2 GiB; on a CUDA device all that weights
    /// and working memory leave of [`DEVICE_MEMORY_SHARE`](super::DEVICE_MEMORY_SHARE).
    pub kv_bytes: Option<u64>,
    /// Bytes that weights and KV pool may take together; `None`: what is available. With [`WeightFormat::Auto`] weights
    /// that are too large as they are stored are rounded to the best form that fits: the first of
    /// [`AUTO_WEIGHT_FORMATS`](super::AUTO_WEIGHT_FORMATS). If none does, the error says how much the smallest needs.
    pub memory_limit_bytes: Option<u64>,
    /// Tokens in a KV block: a multiple of 16.
    pub block_tokens: usize,
    /// Sequences that may run at once.
    pub max_running_sequences: usize,
    /// Steps that a CUDA device keeps captured as graphs, one for each number of sequences (rounded up to a power of two)
    /// and length of contexts; those that ran least recently make room. 0: steps are launched kernel by kernel. No result
    /// depends on it.
    pub max_cuda_graphs: usize,
    /// Tokens one step may compute while nothing decodes (the chunk size of a long prompt).
    pub prefill_budget_tokens: usize,
    /// Tokens one step may compute while something decodes.
    pub mixed_budget_tokens: usize,
    /// Requests that may wait.
    pub max_waiting_requests: usize,
    /// Whether KV of earlier prompts may be used again.
    pub prefix_cache: bool,
    /// Host memory for blocks that the pool gives away, bytes; 0: none. On a CPU a larger pool does the same without copying.
    pub kv_host_bytes: u64,
    /// Directory where KV blocks outlive the process: found again by the next engine with the same model, numerics and
    /// namespace. It is made if it is missing, and belongs to engines alone (mode 0700). One process writes, others read.
    /// `None`: blocks end with the process.
    pub kv_cache_dir: Option<PathBuf>,
    /// Bytes that the files in `kv_cache_dir` take at most.
    pub kv_disk_bytes: u64,
    /// A store that nodes share, for blocks beyond the disk; `None`: none.
    pub kv_remote: Option<KvRemoteOptions>,
    /// How blocks are kept in all these places.
    pub kv_tier_encoding: KvTierEncoding,
    /// How long a request waits for KV from a tier that makes no progress before it computes the rest, milliseconds.
    pub kv_load_budget_ms: u64,
    /// Share of the KV pool, of host memory, of the directory and of the response cache, in memory and on disk, that what is
    /// cached for one owner of namespaces may keep when others need room, above 0.0, to 1.0: with less than 1.0 the flood of
    /// one leaves others theirs. The owner is what stands before the first line break of a namespace.
    pub kv_namespace_share: f64,
    /// Whole answers that are kept and given again; off by default.
    pub response_cache: ResponseCacheOptions,
    /// Hears how far loading is.
    pub on_progress: Option<ProgressCallback>,
}

impl EngineOptions {
    /// Options with every default, for the model in `model`.
    pub fn new(model: impl Into<PathBuf>) -> Self {
        EngineOptions {
            model: model.into(),
            device: Device::default(),
            weights: WeightFormat::default(),
            kv_dtype: None,
            threads: None,
            thread_priority: ThreadPriority::default(),
            context_tokens: None,
            kv_bytes: None,
            memory_limit_bytes: None,
            block_tokens: DEFAULT_BLOCK_TOKENS,
            max_running_sequences: DEFAULT_MAX_RUNNING_SEQUENCES,
            max_cuda_graphs: DEFAULT_MAX_CUDA_GRAPHS,
            prefill_budget_tokens: DEFAULT_PREFILL_BUDGET_TOKENS,
            mixed_budget_tokens: DEFAULT_MIXED_BUDGET_TOKENS,
            max_waiting_requests: DEFAULT_MAX_WAITING_REQUESTS,
            prefix_cache: true,
            kv_host_bytes: 0,
            kv_cache_dir: None,
            kv_disk_bytes: DEFAULT_KV_DISK_BYTES,
            kv_remote: None,
            kv_tier_encoding: KvTierEncoding::default(),
            kv_load_budget_ms: DEFAULT_KV_LOAD_BUDGET_MS,
            kv_namespace_share: 1.0,
            response_cache: ResponseCacheOptions::default(),
            on_progress: None,
        }
    }
    /// Checks every range that does not depend on a model.
    pub fn validate(&self) -> Result<()> {
        if let Some(threads) = self.threads {
            in_range("threads", threads, 1, MAX_THREADS)?;
        }
        if !self.block_tokens.is_multiple_of(BLOCK_TOKENS_MULTIPLE) {
            return Err(invalid("block_tokens", self.block_tokens, format!("a multiple of {BLOCK_TOKENS_MULTIPLE}")));
        }
        in_range("block_tokens", self.block_tokens, BLOCK_TOKENS_MULTIPLE, MAX_BLOCK_TOKENS)?;
        in_range("max_running_sequences", self.max_running_sequences, 1, MAX_RUNNING_SEQUENCES)?;
        in_range("max_cuda_graphs", self.max_cuda_graphs, 0, MAX_CUDA_GRAPHS)?;
        in_range("prefill_budget_tokens", self.prefill_budget_tokens, 1, MAX_BUDGET_TOKENS)?;
        in_range("mixed_budget_tokens", self.mixed_budget_tokens, 1, MAX_BUDGET_TOKENS)?;
        if !(self.kv_namespace_share > 0.0 && self.kv_namespace_share <= 1.0) {
            return Err(invalid("kv_namespace_share", self.kv_namespace_share, "above 0.0, to 1.0".to_string()));
        }
        in_range("kv_load_budget_ms", self.kv_load_budget_ms, 1, MAX_KV_LOAD_BUDGET_MS)?;
        in_range("max_waiting_requests", self.max_waiting_requests, 1, MAX_WAITING_REQUESTS_LIMIT)?;
        let owner_bytes = self.kv_remote.as_ref().and_then(|remote| remote.owner_bytes).unwrap_or(0);
        at_most("kv_host_bytes", self.kv_host_bytes, MAX_KV_TIER_BYTES)?;
        at_most("kv_disk_bytes", self.kv_disk_bytes, MAX_KV_TIER_BYTES)?;
        at_most("kv_remote_owner_bytes", owner_bytes, MAX_KV_TIER_BYTES)?;
        self.response_cache.validate()
    }

    /// Sets the number of compute threads.
    pub fn threads(mut self, threads: usize) -> Self {
        self.threads = Some(threads);
        self
    }
    /// Sets the form of the weights.
    pub fn weights(mut self, weights: WeightFormat) -> Self {
        self.weights = weights;
        self
    }
    /// Sets how keys and values are kept.
    pub fn kv_dtype(mut self, dtype: KvDtype) -> Self {
        self.kv_dtype = Some(dtype);
        self
    }
    /// Sets the longest sequence.
    pub fn context_tokens(mut self, tokens: usize) -> Self {
        self.context_tokens = Some(tokens);
        self
    }
    /// Sets the size of the KV pool.
    pub fn kv_bytes(mut self, bytes: u64) -> Self {
        self.kv_bytes = Some(bytes);
        self
    }
    /// Sets what weights and KV pool may take together.
    pub fn memory_limit_bytes(mut self, bytes: u64) -> Self {
        self.memory_limit_bytes = Some(bytes);
        self
    }
    /// Sets how much host memory keeps blocks that the pool gives away.
    pub fn kv_host_bytes(mut self, bytes: u64) -> Self {
        self.kv_host_bytes = bytes;
        self
    }
    /// Sets where KV blocks outlive the process.
    pub fn kv_cache_dir(mut self, directory: impl Into<PathBuf>) -> Self {
        self.kv_cache_dir = Some(directory.into());
        self
    }
    /// Sets a store that nodes share.
    pub fn kv_remote(mut self, remote: KvRemoteOptions) -> Self {
        self.kv_remote = Some(remote);
        self
    }
    /// Sets what the files of the KV cache take at most.
    pub fn kv_disk_bytes(mut self, bytes: u64) -> Self {
        self.kv_disk_bytes = bytes;
        self
    }
    /// Keeps whole answers in so many bytes.
    pub fn response_cache_bytes(mut self, bytes: u64) -> Self {
        self.response_cache.max_bytes = bytes;
        self
    }
    /// Sets who hears how far loading is.
    pub fn on_progress(mut self, callback: impl FnMut(LoadProgress) -> bool + Send + 'static) -> Self {
        self.on_progress = Some(Box::new(callback));
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    /// Each option is refused by name outside its range, and accepted at its ends.
    #[test]
    fn options_have_ranges() {
        type Set = fn(&mut EngineOptions, usize);
        let ranges: [(&str, usize, usize, Set); 8] = [
            ("threads", 1, MAX_THREADS, |o, v| o.threads = Some(v)),
            ("block_tokens", 16, MAX_BLOCK_TOKENS, |o, v| o.block_tokens = v),
            ("max_cuda_graphs", 0, MAX_CUDA_GRAPHS, |o, v| o.max_cuda_graphs = v),
            ("max_running_sequences", 1, MAX_RUNNING_SEQUENCES, |o, v| o.max_running_sequences = v),
            ("prefill_budget_tokens", 1, MAX_BUDGET_TOKENS, |o, v| o.prefill_budget_tokens = v),
            ("mixed_budget_tokens", 1, MAX_BUDGET_TOKENS, |o, v| o.mixed_budget_tokens = v),
            ("kv_load_budget_ms", 1, MAX_KV_LOAD_BUDGET_MS as usize, |o, v| o.kv_load_budget_ms = v as u64),
            ("max_waiting_requests", 1, MAX_WAITING_REQUESTS_LIMIT, |o, v| o.max_waiting_requests = v),
        ];
        for (name, min, max, set) in ranges {
            for (value, is_good) in [(min, true), (max, true), (0, min == 0), (max + 16, false), (usize::MAX, false)] {
                let mut options = EngineOptions::new("");
                set(&mut options, value);
                match options.validate() {
                    Ok(()) => assert!(is_good, "{name} = {value} was accepted"),
                    Err(Error::InvalidArgument { field, .. }) => {
                        assert!(field == name && !is_good, "{field} = {value}")
                    }
                    Err(other) => panic!("{other}"),
                }
            }
        }
        for (name, set) in [
            ("kv_host_bytes", (|o, bytes| o.kv_host_bytes = bytes) as fn(&mut EngineOptions, u64)),
            ("kv_disk_bytes", |o, bytes| o.kv_disk_bytes = bytes),
            ("kv_remote_owner_bytes", |o, bytes| o.kv_remote = Some(KvRemoteOptions::new("").owner_bytes(bytes))),
        ] {
            for (bytes, is_good) in [(0, true), (MAX_KV_TIER_BYTES, true), (MAX_KV_TIER_BYTES + 1, false)] {
                let mut options = EngineOptions::new("");
                set(&mut options, bytes);
                match options.validate() {
                    Err(Error::InvalidArgument { field, .. }) => assert!(field == name && !is_good, "{field}"),
                    other => assert!(other.is_ok() && is_good, "{name} = {bytes}: {other:?}"),
                }
            }
        }
        for (share, is_good) in [(0.0, false), (1e-9, true), (1.0, true), (1.1, false), (f64::NAN, false)] {
            let mut options = EngineOptions::new("");
            options.kv_namespace_share = share;
            assert_eq!(options.validate().is_ok(), is_good, "{share}");
        }
        let responses: [(&str, ResponseCacheOptions, bool); 4] = [
            ("response_cache.ttl_ms", ResponseCacheOptions { ttl_ms: 0, ..ResponseCacheOptions::default() }, false),
            (
                "response_cache.ttl_ms",
                ResponseCacheOptions { ttl_ms: MAX_RESPONSE_TTL_MS + 1, ..Default::default() },
                false,
            ),
            ("response_cache.max_bytes", ResponseCacheOptions::new(MAX_RESPONSE_CACHE_BYTES), true),
            ("response_cache.max_bytes", ResponseCacheOptions::new(MAX_RESPONSE_CACHE_BYTES + 1), false),
        ];
        for (name, response_cache, is_good) in responses {
            let mut options = EngineOptions::new("");
            options.response_cache = response_cache;
            match options.validate() {
                Err(Error::InvalidArgument { field, .. }) => assert!(field == name && !is_good, "{field}"),
                other => assert!(other.is_ok() && is_good, "{name}: {other:?}"),
            }
        }
        let mut odd = EngineOptions::new("");
        odd.block_tokens = 24;
        assert_eq!(odd.validate().expect_err("not a multiple").code(), "invalid_argument");
    }
}
