//! Every limit and every default of the engine, each with its unit, its reason and what happens beyond it; and the
//! options with which an engine is opened. A value is checked once, where it enters, and is immutable afterwards.

use std::path::PathBuf;

use ns_llm_kernels::quant::QuantType;

use crate::error::{Error, Result};

/// Tokens in one KV block.
pub const DEFAULT_BLOCK_TOKENS: usize = 16;
/// Tokens one step may compute while no sequence is decoding.
pub const PREFILL_BUDGET_TOKENS: usize = 512;
/// Tokens one step may compute while some sequence is decoding: a long prompt must not stall the streams.
pub const MIXED_BUDGET_TOKENS: usize = 128;
/// Sequences that may run at once; more wait.
pub const DEFAULT_MAX_RUNNING_SEQUENCES: usize = 64;
/// Steps that a CUDA device keeps captured: numbers of rows (up to 9) times lengths of contexts, of which a few are in use at a time.
pub const DEFAULT_MAX_CUDA_GRAPHS: usize = 32;
/// Most that can be asked for.
pub const MAX_CUDA_GRAPHS: usize = 256;
/// Steps of waiting that lift a class of waiting sequences by one rank.
pub const AGE_STEPS: u64 = 256;
/// Share of the available memory that the KV pool takes by default.
pub const DEFAULT_KV_MEMORY_SHARE: f64 = 0.25;
/// Upper bound of the default KV pool.
pub const DEFAULT_KV_MAX_BYTES: u64 = 2 << 30;
/// The default pool holds at least one sequence of this many tokens.
pub const DEFAULT_KV_MIN_TOKENS: usize = 4096;

/// Longest segment file of the disk tier, bytes: the disk tier forgets a whole segment at a time.
pub const DISK_SEGMENT_BYTES: u64 = 256 << 20;
/// Segments that the disk tier's budget is divided into at least: what one eviction forgets is a small share of all.
pub const DISK_MIN_SEGMENTS: u64 = 16;
/// Segment files of one disk tier; beyond it the least recently used one goes.
pub const MAX_DISK_SEGMENTS: usize = 4_096;
/// Blocks that one disk tier remembers (some 250 bytes of memory each); beyond it the least recently used segment goes.
pub const MAX_DISK_ENTRIES: usize = 1 << 20;
/// Blocks whose use led to an error and that the tiers therefore avoid; beyond it the oldest is forgotten.
pub const MAX_QUARANTINED_BLOCKS: usize = 1_024;
/// Reads that a tier is given at once: it need not wait for the next step of the model after each block.
pub const MAX_TIER_READS: usize = 16;
/// Blocks that may wait to be written to one tier, bytes, but at least those of one step and [`MIN_WRITE_QUEUE_BLOCKS`] more;
/// what comes beyond is not stored.
pub const WRITE_QUEUE_BYTES: u64 = 64 << 20;
/// Blocks that may wait to be written to one tier beside those of one step, however large they are.
pub const MIN_WRITE_QUEUE_BLOCKS: u64 = 4;
/// How long a sequence waits by default for blocks from a tier that makes no progress, milliseconds; it computes them then.
pub const DEFAULT_KV_LOAD_BUDGET_MS: u64 = 50;
/// Longest such wait, milliseconds.
pub const MAX_KV_LOAD_BUDGET_MS: u64 = 60_000;
/// How long closing waits for blocks that are still to be written, milliseconds.
pub const CLOSE_WRITES_MS: u64 = 5_000;
/// How long [`Engine::flush`](crate::Engine::flush) waits, milliseconds.
pub const FLUSH_MS: u64 = 60_000;
/// Events of a trace that [`Engine::start_trace`](crate::Engine::start_trace) may be asked to keep, some 200 bytes each.
pub const MAX_TRACE_EVENTS: usize = 1_000_000;
/// Bytes of the disk tier when a directory is given without a size.
pub const DEFAULT_KV_DISK_BYTES: u64 = 8 << 30;
/// Blocks of which the KV cache remembers that it had them, and who gave them up: some 2 MiB.
pub const MAX_LOST_BLOCKS: usize = 16_384;
/// Blocks of which an engine remembers that a store that nodes share has them: some 16 MiB. Of more it may store some again.
pub const MAX_REMOTE_KNOWN_BLOCKS: usize = 1 << 17;
/// Owners of whom it is remembered what they have stored in a place that nodes share, some 200 bytes each; of more the one who
/// stored longest ago begins anew.
pub const MAX_KNOWN_OWNERS: usize = 16_384;
/// Things that a tier was to have and has not, of which it is remembered which they are, until somebody asks: some 2 MiB. More
/// are only counted.
pub const MAX_UNSTORED: usize = 16_384;
/// Most bytes that a tier of the KV cache may be told to keep.
pub const MAX_KV_TIER_BYTES: u64 = 1 << 50;
/// Blocks that leave the pool and are read back together: more wait for the device once more.
pub const MAX_BLOCKS_READ_TOGETHER: usize = 16;
/// Smallest step that tells how fast prompts are computed, tokens.
pub const MIN_MEASURED_PREFILL_TOKENS: usize = 32;
/// Segment files that are held open at once.
pub const MAX_OPEN_SEGMENTS: usize = 64;
/// How long one call to the remote tier may take, connecting included, milliseconds.
pub const DEFAULT_REMOTE_TIMEOUT_MS: u64 = 500;
/// The longest that may be chosen for it.
pub const MAX_REMOTE_TIMEOUT_MS: u64 = 10_000;
/// How long the remote tier keeps a block that nobody stores again, seconds (one day).
pub const DEFAULT_REMOTE_TTL_S: u64 = 86_400;
/// The longest that may be chosen for it (thirty days).
pub const MAX_REMOTE_TTL_S: u64 = 30 * 86_400;
/// What all names in the remote tier begin with.
pub const DEFAULT_REMOTE_PREFIX: &str = "ns-llm";
/// Longest beginning that may be chosen for them, bytes.
pub const MAX_REMOTE_PREFIX_BYTES: usize = 64;
/// Shortest secret that records in the remote tier may be authenticated with, bytes.
pub const MIN_REMOTE_SECRET_BYTES: usize = 16;
/// Longest one.
pub const MAX_REMOTE_SECRET_BYTES: usize = 1_024;
/// Longest URL of a remote tier, bytes.
pub const MAX_REMOTE_URL_BYTES: usize = 2_048;
/// Longest line of a server's reply, bytes: errors are the longest.
pub const MAX_REMOTE_LINE_BYTES: u64 = 4_096;

/// How long the response cache finds an entry unless told otherwise, milliseconds (one hour).
pub const DEFAULT_RESPONSE_TTL_MS: u64 = 3_600_000;
/// Longest time that the response cache may be told to find an entry, milliseconds (one year).
pub const MAX_RESPONSE_TTL_MS: u64 = 31_536_000_000;
/// Largest budget of a response cache, bytes.
pub const MAX_RESPONSE_CACHE_BYTES: u64 = 1 << 40;
/// Largest answer or value in the response cache, bytes; what is larger is not kept.
pub const MAX_RESPONSE_BYTES: usize = 2 << 20;
/// Name of a value that a caller keeps in the response cache, bytes.
pub const MAX_RESPONSE_KEY_BYTES: usize = 4_096;
/// Tags of one entry of the response cache.
pub const MAX_RESPONSE_TAGS: usize = 16;
/// What an entry of the response cache counts for beside its value and tags, bytes: its places in the maps.
pub const RESPONSE_ENTRY_BYTES: u64 = 512;
/// What a tag of an entry counts for beside its text, bytes.
pub const RESPONSE_TAG_BYTES: u64 = 128;
/// Invalidated tags that the response cache remembers; an answer whose computation began before the oldest is not kept.
pub const MAX_REMEMBERED_INVALIDATIONS: usize = 1_024;
/// Requests of which an engine remembers which answer they ask for (some 150 bytes each), so that one that is kept needs
/// neither template nor tokenizer.
pub const MAX_KNOWN_REQUESTS: usize = 1 << 14;

/// Bytes that the files of the response cache take at most, beneath a directory for KV, unless told otherwise.
pub const DEFAULT_RESPONSE_DISK_BYTES: u64 = 256 << 20;
/// Answers that may wait to be written to one tier, bytes; what comes beyond is not written.
pub const RESPONSE_WRITE_QUEUE_BYTES: u64 = 16 << 20;
/// Requests that may wait for one tier's look-up; what comes beyond is computed.
pub const MAX_RESPONSE_LOOKUPS: usize = 256;
/// Tags whose invalidation a tier remembers at once, while it cannot be written or as long as it lies on disk; beyond it
/// everything in the tier is given up.
pub const MAX_RESPONSE_MARKS: usize = 65_536;
/// How far the clocks of those who share answers may be apart, milliseconds: an answer that was stored later than that
/// from now is not used.
pub const MAX_CLOCK_SKEW_MS: u64 = 60_000;

/// Requests that may wait; the next one is [`Error::Overloaded`](crate::Error::Overloaded).
pub const MAX_WAITING_REQUESTS: usize = 1_000;
/// Prompt tokens that may wait in all, beyond the first request.
pub const MAX_WAITING_TOKENS: usize = 4_000_000;
/// Bytes of prompts that may be between submission and admission, beyond the first request.
pub const MAX_PENDING_PROMPT_BYTES: usize = 64 << 20;
/// Choices of one request.
pub const MAX_CHOICES: usize = 8;
/// Alternatives reported with each token.
pub const MAX_LOGPROBS: usize = 20;
/// Stop strings of one request.
pub const MAX_STOP_STRINGS: usize = 16;
/// Length of one stop string, bytes.
pub const MAX_STOP_STRING_BYTES: usize = 256;
/// Stop tokens of one request.
pub const MAX_STOP_TOKENS: usize = 64;
/// Entries of `logit_bias`.
pub const MAX_LOGIT_BIAS: usize = 1_024;
/// Text of a prompt or of all messages together, bytes.
pub const MAX_PROMPT_BYTES: usize = 4 << 20;
/// Messages of one conversation.
pub const MAX_MESSAGES: usize = 4_096;
/// Inputs of one embedding request.
pub const MAX_EMBEDDING_INPUTS: usize = 2_048;
/// Longest input that a decoder turns into a vector, tokens: it is computed in one step, while nobody else is served.
pub const MAX_DECODER_EMBEDDING_TOKENS: usize = 512;
/// Sequences that one step turns into vectors at most.
pub const MAX_ENCODE_STEP_SEQUENCES: usize = 64;
/// Namespace strings, bytes.
pub const MAX_NAME_BYTES: usize = 512;
/// New tokens of one request, before the context bounds them.
pub const MAX_NEW_TOKENS: usize = 1 << 20;
/// New tokens when the request does not say: a prompt alone must not run to the end of the context.
pub const DEFAULT_MAX_TOKENS: usize = 64;
/// Longest timeout of a request, milliseconds (one day).
pub const MAX_TIMEOUT_MS: u64 = 86_400_000;
/// Output of a chat template, bytes per token of the context. Tokens of plain English have four; those of long words and
/// indented code more, and a prompt that has too many tokens is to be told so by their number.
pub const TEMPLATE_OUTPUT_BYTES_PER_CONTEXT_TOKEN: usize = 32;
/// Wall-clock limit of one template rendering, milliseconds. A rendering takes well under one; the rest is room for a
/// machine that is busy with other things.
pub const TEMPLATE_TIME_MS: u64 = 250;
/// Instructions one template rendering may take.
pub const TEMPLATE_FUEL: u64 = 2_000_000;
/// Source text of a chat template, bytes.
pub const MAX_TEMPLATE_BYTES: usize = 1 << 20;
/// Header of a safetensors file, bytes (the format's own cap).
pub const MAX_SAFETENSORS_HEADER_BYTES: u64 = 100_000_000;
/// Header of a GGUF file (metadata, vocabulary, tensor infos), bytes: several times that of the largest vocabularies.
pub const MAX_GGUF_HEADER_BYTES: u64 = 64 << 20;
/// Keys in the metadata of a GGUF file.
pub const MAX_GGUF_KEYS: u64 = 1 << 16;
/// Name of a key or tensor of a GGUF file, bytes (the format's own cap for keys).
pub const MAX_GGUF_NAME_BYTES: u64 = (1 << 16) - 1;
/// Tensors in one GGUF file.
pub const MAX_GGUF_TENSORS: u64 = 100_000;
/// Axes of a tensor in a GGUF file (the format's own cap).
pub const MAX_GGUF_AXES: u32 = 4;
/// Text of a token of a SentencePiece vocabulary, bytes: the longest in use are rows of some 30 spaces.
pub const MAX_PIECE_BYTES: usize = 256;
/// Token ids of one vocabulary; the largest in use have some 260,000.
pub const MAX_TOKEN_IDS: u32 = 1 << 22;
/// JSON files of a model folder (configuration, index, tokenizer), bytes.
pub const MAX_JSON_BYTES: u64 = 256 << 20;
/// JSON files that are kept as a tree while they are read (`config.json`, `generation_config.json`,
/// `tokenizer_config.json`, the index of shards), bytes. A tree takes up to sixteen times its text.
pub const MAX_CONFIG_BYTES: u64 = 4 << 20;
/// Files a checkpoint may be split into: each is held open while the model loads.
pub const MAX_SHARDS: usize = 512;
/// Axes of a tensor.
pub const MAX_TENSOR_AXES: usize = 8;
/// End tokens a model may name.
pub const MAX_EOS_TOKENS: usize = 64;
/// Compute threads.
pub const MAX_THREADS: usize = 256;

/// Blocks are whole vectors of keys: their tokens are a multiple of this.
pub const BLOCK_TOKENS_MULTIPLE: usize = 16;
/// Largest block, tokens.
pub const MAX_BLOCK_TOKENS: usize = 1_024;
/// Most sequences that an engine may be told to run at once.
pub const MAX_RUNNING_SEQUENCES: usize = 4_096;
/// Largest token budget of a step.
pub const MAX_BUDGET_TOKENS: usize = 65_536;
/// Longest waiting queue that an engine may be told to keep, requests.
pub const MAX_WAITING_REQUESTS_LIMIT: usize = 1_000_000;

/// Share of a CUDA device's free memory that an engine takes: the rest is for its driver, and for whoever else uses the device.
pub const DEVICE_MEMORY_SHARE: f64 = 0.9;

/// Where the arithmetic runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Device {
    /// The first CUDA device, if this build has CUDA, the machine a driver and a device that it can use, and the model fits; else the
    /// CPU. [`ModelInfo::device_reason`](crate::ModelInfo::device_reason) says why.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The CUDA device of this number, from 0.
    Cuda(usize),
}

impl Device {
    /// The device of that name: "auto", "cpu", "cuda" (the first) or "cuda:N".
    pub fn from_name(name: &str) -> Result<Device> {
        let refused = || Error::InvalidArgument {
            field: "device",
            value: name.to_string(),
            expected: "auto, cpu, cuda or cuda:N".to_string(),
        };
        match name {
            "auto" => Ok(Device::Auto),
            "cpu" => Ok(Device::Cpu),
            "cuda" => Ok(Device::Cuda(0)),
            // Digits alone: a number may also begin with a plus sign.
            _ => match name.strip_prefix("cuda:") {
                Some(ordinal) if !ordinal.is_empty() && ordinal.bytes().all(|byte| byte.is_ascii_digit()) => {
                    ordinal.parse().map(Device::Cuda).map_err(|_| refused())
                }
                _ => Err(refused()),
            },
        }
    }
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Device::Auto => f.write_str("auto"),
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

/// In which form weights are kept and multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum WeightFormat {
    /// As the checkpoint has them; under a [`memory limit`](EngineOptions::memory_limit_bytes) the best form that fits it.
    #[default]
    Auto,
    /// 32-bit floats.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    F16,
    /// Integers with scales, multiplied with activations of 8 bits. A matrix whose rows are no whole number of blocks is
    /// kept in the next larger format with blocks of 32, or in f16.
    Quant(QuantType),
}

/// What [`WeightFormat::Auto`] chooses from under a memory limit when the weights as stored do not fit, best first.
pub const AUTO_WEIGHT_FORMATS: [WeightFormat; 7] = [
    WeightFormat::Bf16,
    WeightFormat::Quant(QuantType::Q8_0),
    WeightFormat::Quant(QuantType::Q6_K),
    WeightFormat::Quant(QuantType::Q5_K),
    WeightFormat::Quant(QuantType::Q4_K),
    WeightFormat::Quant(QuantType::Q3_K),
    WeightFormat::Quant(QuantType::Q2_K),
];

impl WeightFormat {
    /// Every form.
    pub fn all() -> impl Iterator<Item = WeightFormat> {
        let plain = [WeightFormat::Auto, WeightFormat::F32, WeightFormat::Bf16, WeightFormat::F16];
        plain.into_iter().chain(QuantType::ALL.map(WeightFormat::Quant))
    }

    /// The form of that name, in any case.
    pub fn from_name(name: &str) -> Result<WeightFormat> {
        let found = WeightFormat::all().find(|format| format.name().eq_ignore_ascii_case(name));
        found.ok_or_else(|| {
            let names: Vec<_> = WeightFormat::all().map(WeightFormat::name).collect();
            let expected = format!("one of {}", names.join(", "));
            Error::InvalidArgument { field: "weights", value: name.to_string(), expected }
        })
    }

    /// Name as in options and reports.
    pub fn name(self) -> &'static str {
        match self {
            WeightFormat::Auto => "auto",
            WeightFormat::F32 => "f32",
            WeightFormat::Bf16 => "bf16",
            WeightFormat::F16 => "f16",
            WeightFormat::Quant(quant_type) => quant_type.name(),
        }
    }
}

/// How keys and values are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum KvDtype {
    /// 32-bit floats.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16: half the memory of f32 with its range, coarser than f16.
    Bf16,
    /// 8-bit integers with one scale for each token and head, half the memory of f16. Steps that make vectors keep
    /// nothing, and compute as if this was not set.
    Int8,
}

impl KvDtype {
    /// Name as in options and reports.
    pub fn name(self) -> &'static str {
        match self {
            KvDtype::F32 => "f32",
            KvDtype::F16 => "f16",
            KvDtype::Bf16 => "bf16",
            KvDtype::Int8 => "int8",
        }
    }
}

/// How blocks are kept outside the pool: in host memory, on disk, in a store that nodes share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum KvTierEncoding {
    /// As they were computed: what is found again equals what would be computed, bit for bit.
    #[default]
    AsComputed,
    /// Rounded to 8-bit integers with one scale for each token and head: half the bytes of f16 and bf16, a quarter of f32. An
    /// answer over blocks that came back, of a preempted sequence as well, is a little other than one that was computed whole.
    /// Blocks are in a key space of their own: no engine without this finds them. With a pool of 8-bit integers the same as
    /// `AsComputed`.
    Int8,
}

impl KvTierEncoding {
    /// Name as in options and reports.
    pub fn name(self) -> &'static str {
        match self {
            KvTierEncoding::AsComputed => "as-computed",
            KvTierEncoding::Int8 => "int8",
        }
    }
}

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
        let check = |field: &'static str, value: u64, min: u64, max: u64| match (min..=max).contains(&value) {
            true => Ok(()),
            false => {
                Err(Error::InvalidArgument { field, value: value.to_string(), expected: format!("{min} to {max}") })
            }
        };
        check("response_cache.max_bytes", self.max_bytes, 0, MAX_RESPONSE_CACHE_BYTES)?;
        check("response_cache.disk_bytes", self.disk_bytes, 0, MAX_KV_TIER_BYTES)?;
        check("response_cache.ttl_ms", self.ttl_ms, 1, MAX_RESPONSE_TTL_MS)
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
    /// Bytes of the KV pool; `None`: a quarter of the available memory, at most 2 GiB; on a CUDA device all that weights and working
    /// memory leave of [`DEVICE_MEMORY_SHARE`].
    pub kv_bytes: Option<u64>,
    /// Bytes that weights and KV pool may take together; `None`: what is available. With [`WeightFormat::Auto`] weights
    /// that are too large as they are stored are rounded to the best form that fits: the first of
    /// [`AUTO_WEIGHT_FORMATS`]. If none does, the error says how much the smallest needs.
    pub memory_limit_bytes: Option<u64>,
    /// Tokens in a KV block: a multiple of 16.
    pub block_tokens: usize,
    /// Sequences that may run at once.
    pub max_running_sequences: usize,
    /// Steps that a CUDA device keeps captured as graphs, one for each number of sequences (rounded up to a power of two) and length of
    /// contexts; those that ran least recently make room. 0: steps are launched kernel by kernel. No result depends on it.
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
            prefill_budget_tokens: PREFILL_BUDGET_TOKENS,
            mixed_budget_tokens: MIXED_BUDGET_TOKENS,
            max_waiting_requests: MAX_WAITING_REQUESTS,
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
        let check = |field: &'static str, value: usize, min: usize, max: usize| match (min..=max).contains(&value) {
            true => Ok(()),
            false => {
                Err(Error::InvalidArgument { field, value: value.to_string(), expected: format!("{min} to {max}") })
            }
        };
        if let Some(threads) = self.threads {
            check("threads", threads, 1, MAX_THREADS)?;
        }
        if !self.block_tokens.is_multiple_of(BLOCK_TOKENS_MULTIPLE) {
            return Err(Error::InvalidArgument {
                field: "block_tokens",
                value: self.block_tokens.to_string(),
                expected: format!("a multiple of {BLOCK_TOKENS_MULTIPLE}"),
            });
        }
        check("block_tokens", self.block_tokens, BLOCK_TOKENS_MULTIPLE, MAX_BLOCK_TOKENS)?;
        check("max_running_sequences", self.max_running_sequences, 1, MAX_RUNNING_SEQUENCES)?;
        check("max_cuda_graphs", self.max_cuda_graphs, 0, MAX_CUDA_GRAPHS)?;
        check("prefill_budget_tokens", self.prefill_budget_tokens, 1, MAX_BUDGET_TOKENS)?;
        check("mixed_budget_tokens", self.mixed_budget_tokens, 1, MAX_BUDGET_TOKENS)?;
        if !(self.kv_namespace_share > 0.0 && self.kv_namespace_share <= 1.0) {
            let value = self.kv_namespace_share.to_string();
            let expected = "above 0.0, to 1.0".to_string();
            return Err(Error::InvalidArgument { field: "kv_namespace_share", value, expected });
        }
        let load_budget_ms = usize::try_from(self.kv_load_budget_ms).unwrap_or(usize::MAX);
        check("kv_load_budget_ms", load_budget_ms, 1, MAX_KV_LOAD_BUDGET_MS as usize)?;
        check("max_waiting_requests", self.max_waiting_requests, 1, MAX_WAITING_REQUESTS_LIMIT)?;
        let owner_bytes = self.kv_remote.as_ref().and_then(|remote| remote.owner_bytes).unwrap_or(0);
        for (field, bytes) in [
            ("kv_host_bytes", self.kv_host_bytes),
            ("kv_disk_bytes", self.kv_disk_bytes),
            ("kv_remote_owner_bytes", owner_bytes),
        ] {
            if bytes > MAX_KV_TIER_BYTES {
                let expected = format!("at most {MAX_KV_TIER_BYTES}");
                return Err(Error::InvalidArgument { field, value: bytes.to_string(), expected });
            }
        }
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

    /// Every form has a name that finds it; an unknown one is told all of them.
    #[test]
    fn forms_of_weights_have_names() {
        for format in WeightFormat::all() {
            assert_eq!(WeightFormat::from_name(&format.name().to_uppercase()), Ok(format));
        }
        let e = WeightFormat::from_name("q9_9").expect_err("unknown").to_string();
        assert!(e.contains("q9_9") && e.contains("auto, f32, bf16, f16, q8_0") && e.contains("q2_k"), "{e}");
    }

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
