//! # Engine
//!
//! An engine is a loaded model with its KV blocks, its worker, its compute threads and its callback thread. It serves
//! many requests at once; a program normally opens one engine per model.

use std::ffi::c_void;
use std::sync::Arc;

use ns_llm_core::config::{MAX_REMOTE_PREFIX_BYTES, MAX_REMOTE_SECRET_BYTES, MAX_REMOTE_URL_BYTES};
use ns_llm_core::{
    Device, Engine, EngineOptions, Error, KvDtype, KvRemoteOptions, KvTierEncoding, LoadProgress, QuantType,
    ThreadPriority, WeightFormat,
};

use crate::callback::{UserData, as_callback};
use crate::dispatcher::Dispatcher;
use crate::failure::{Failure, boundary};
use crate::handle::{HandleKind, HandleTable};
use crate::log::{Log, ns_llm_log_callback};
use crate::params::{SizedStruct, at, read_struct};
use crate::process::check_process;
use crate::status::ns_llm_status;
use crate::text::{Out, ns_llm_text, read_text};

/// An engine: an id, not a pointer. 0 is never an engine.
pub type ns_llm_engine = u64;

/// Where an engine computes.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ns_llm_device {
    /// The first CUDA device, if the library was built with CUDA, the machine has a driver and a device for it, and the
    /// model fits; else the CPU. `device_reason` of ns_llm_engine_info() says why.
    NS_LLM_DEVICE_AUTO = 0,
    /// The CPU.
    NS_LLM_DEVICE_CPU = 1,
    /// The CUDA device number `device_ordinal`.
    NS_LLM_DEVICE_CUDA = 2,
}

/// In which form an engine keeps and multiplies weights. The quantized forms are those of GGUF files; weights that are stored
/// otherwise are rounded while they are loaded.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ns_llm_weights {
    /// As the model's files have them; with `memory_limit_bytes` the best form that fits.
    NS_LLM_WEIGHTS_AUTO = 0,
    /// 32-bit floats.
    NS_LLM_WEIGHTS_F32 = 1,
    /// bfloat16.
    NS_LLM_WEIGHTS_BF16 = 2,
    /// IEEE half precision.
    NS_LLM_WEIGHTS_F16 = 3,
    /// 8 bits.
    NS_LLM_WEIGHTS_Q8_0 = 4,
    /// 6 bits.
    NS_LLM_WEIGHTS_Q6_K = 5,
    /// 5 bits.
    NS_LLM_WEIGHTS_Q5_K = 6,
    /// 4 bits.
    NS_LLM_WEIGHTS_Q4_K = 7,
    /// 3 bits.
    NS_LLM_WEIGHTS_Q3_K = 8,
    /// 2 bits.
    NS_LLM_WEIGHTS_Q2_K = 9,
    /// 5 bits, an older format.
    NS_LLM_WEIGHTS_Q5_1 = 10,
    /// 5 bits, an older format.
    NS_LLM_WEIGHTS_Q5_0 = 11,
    /// 4 bits, an older format.
    NS_LLM_WEIGHTS_Q4_1 = 12,
    /// 4 bits, an older format.
    NS_LLM_WEIGHTS_Q4_0 = 13,
    /// 4 bits at uneven levels.
    NS_LLM_WEIGHTS_IQ4_NL = 14,
    /// Floats of 4 bits.
    NS_LLM_WEIGHTS_MXFP4 = 15,
}

/// How an engine keeps keys and values.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ns_llm_kv_dtype {
    /// 32-bit floats with 32-bit weights, else half precision.
    NS_LLM_KV_DTYPE_AUTO = 0,
    /// 32-bit floats.
    NS_LLM_KV_DTYPE_F32 = 1,
    /// IEEE half precision.
    NS_LLM_KV_DTYPE_F16 = 2,
    /// bfloat16.
    NS_LLM_KV_DTYPE_BF16 = 3,
    /// 8-bit integers with a scale for each token and head: half the memory of half precision.
    NS_LLM_KV_DTYPE_INT8 = 4,
}

/// How an engine keeps KV blocks outside its pool: in host memory, in `kv_cache_dir` and at `kv_remote_url`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ns_llm_kv_tier_encoding {
    /// As they were computed: what is found again equals what would be computed, bit for bit.
    NS_LLM_KV_TIER_ENCODING_AS_COMPUTED = 0,
    /// Rounded to 8-bit integers with a scale for each token and head: half the bytes of half precision. An answer over blocks
    /// that came back is a little other than one that was computed whole; no engine without this finds them.
    NS_LLM_KV_TIER_ENCODING_INT8 = 1,
}

/// A flag of `ns_llm_engine_params`: KV of earlier prompts is not used again.
pub const NS_LLM_ENGINE_NO_PREFIX_CACHE: u32 = 1;
/// A flag of `ns_llm_engine_params`: compute threads get the same priority as the program's own threads, not a lower
/// one.
pub const NS_LLM_ENGINE_NORMAL_PRIORITY: u32 = 2;
/// A flag of `ns_llm_engine_params`: a kept answer's time follows its use, from a sixth of `response_ttl_ms` to twice as
/// long.
pub const NS_LLM_ENGINE_ADAPTIVE_RESPONSE_TTL: u32 = 4;
/// A flag of `ns_llm_engine_params`: answers are not kept in `kv_cache_dir`.
pub const NS_LLM_ENGINE_NO_RESPONSE_DISK: u32 = 8;
/// A flag of `ns_llm_engine_params`: answers are not shared through `kv_remote_url`.
pub const NS_LLM_ENGINE_NO_RESPONSE_REMOTE: u32 = 16;
/// A flag of `ns_llm_engine_params`: steps on a CUDA device are launched kernel by kernel; none is captured as a graph.
pub const NS_LLM_ENGINE_NO_CUDA_GRAPHS: u32 = 32;

/// Hears how far loading is; both sizes are bytes of weights. Called by ns_llm_engine_open(), one call at a time, on
/// the calling thread or on a loading thread, and never after it has returned. Returns `true` to go on, `false` to
/// cancel: then ns_llm_engine_open() returns NS_LLM_CANCELLED. It must return: no longjmp, no C++ exception.
pub type ns_llm_progress_callback =
    Option<unsafe extern "C" fn(loaded_bytes: u64, total_bytes: u64, user_data: *mut c_void) -> bool>;

/// How to open an engine. A struct of zeros, but for `struct_size` and `model`, asks for every default.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct ns_llm_engine_params {
    /// `sizeof(ns_llm_engine_params)`.
    pub struct_size: usize,
    /// Path of the model: its folder, or a GGUF file.
    pub model: ns_llm_text,
    /// A value of `ns_llm_device`.
    pub device: u32,
    /// A value of `ns_llm_weights`.
    pub weights: u32,
    /// Any of the `NS_LLM_ENGINE_` flags.
    pub flags: u32,
    /// Compute threads. 0: all cores, less one that is left to the program if there are more than two.
    pub threads: u32,
    /// Longest sequence, prompt and answer, in tokens. 0: the model's own, as far as the KV pool holds it.
    pub context_tokens: usize,
    /// Size of the KV pool, bytes. 0: a quarter of the available memory, at most 2 GiB; on a CUDA device all that weights
    /// and steps leave of nine tenths of its free memory.
    pub kv_bytes: u64,
    /// Tokens in a KV block, a multiple of 16. 0: 16.
    pub block_tokens: usize,
    /// Sequences that may run at once; more wait. 0: 64.
    pub max_running_sequences: usize,
    /// Requests that may wait; the next one gets NS_LLM_OVERLOADED. 0: 1000.
    pub max_waiting_requests: usize,
    /// Tokens that one step may compute while nothing decodes. 0: 512.
    pub prefill_budget_tokens: usize,
    /// Tokens that one step may compute while something decodes. 0: 128.
    pub mixed_budget_tokens: usize,
    /// Hears how far loading is, or NULL.
    pub progress: ns_llm_progress_callback,
    /// Handed to `progress`.
    pub progress_user_data: *mut c_void,
    /// Hears what belongs into a log, or NULL.
    pub log: ns_llm_log_callback,
    /// Handed to `log`.
    pub log_user_data: *mut c_void,
    /// A value of `ns_llm_kv_dtype`.
    pub kv_dtype: u32,
    /// With NS_LLM_DEVICE_CUDA the number of the device, from 0; else 0.
    pub device_ordinal: u32,
    /// What weights and KV pool may take together, bytes. With NS_LLM_WEIGHTS_AUTO weights that are too large are rounded to
    /// the best form that fits: bfloat16, Q8_0, Q6_K, Q5_K, Q4_K, Q3_K or Q2_K; if none does, NS_LLM_OUT_OF_MEMORY, with what
    /// the smallest needs in the text. 0: what is available.
    pub memory_limit_bytes: u64,
    /// Host memory for KV blocks that the pool gives away, bytes. 0: none.
    pub kv_host_bytes: u64,
    /// Directory where KV blocks outlive the process: the next engine with the same model, numerics and namespace finds them
    /// again. It is made if it is missing, and belongs to engines alone. One engine at a time writes, others read. NULL: blocks
    /// end with the engine.
    pub kv_cache_dir: ns_llm_text,
    /// Bytes that the files in `kv_cache_dir` take at most. 0: 8 GiB.
    pub kv_disk_bytes: u64,
    /// How long a request waits for KV from a place that makes no progress before it computes the rest, milliseconds. 0: 50.
    pub kv_load_budget_ms: u64,
    /// Share of the KV pool, of host memory, of `kv_cache_dir` and of the kept answers, in memory and on disk, that what
    /// is cached for one owner of namespaces may keep when others need room, to 1. The owner is what stands before the
    /// first line break of a namespace. 0: 1, all of it.
    pub kv_namespace_share: f64,
    /// Bytes of answers that are kept in memory, to be given again without computing a token to requests for the same. 0: none
    /// are. With `kv_cache_dir` they outlive the process, with `kv_remote_url` nodes share them.
    pub response_cache_bytes: u64,
    /// How long an answer is kept, milliseconds, at most a year. 0: one hour.
    pub response_ttl_ms: u64,
    /// Store of KV blocks that nodes share, `redis://[[user]:password@]host[:port][/database]`; the way to it is not encrypted.
    /// NULL: none, and nothing in the fields below that say how it is used.
    pub kv_remote_url: ns_llm_text,
    /// What all nodes know and the store does not, 16 to 1,024 bytes: records that are not authenticated with it are not used.
    /// NULL: the store is trusted not to make records up.
    pub kv_remote_secret: ns_llm_text,
    /// Bytes that the files with answers take at most, in `answers` beneath `kv_cache_dir`; at least some 4 MiB. 0: 256 MiB.
    pub response_disk_bytes: u64,
    /// A value of `ns_llm_kv_tier_encoding`.
    pub kv_tier_encoding: u32,
    /// 0.
    pub reserved: u32,
    /// Bytes of KV, and as many of answers, that this engine stores at `kv_remote_url` within a day, for which they are kept, for
    /// one owner of namespaces. 0: no limit.
    pub kv_remote_owner_bytes: u64,
    /// Steps that a CUDA device keeps captured as graphs, to 256; those that ran least recently make room. 0: 32. No
    /// result depends on it. With NS_LLM_ENGINE_NO_CUDA_GRAPHS none is.
    pub max_cuda_graphs: usize,
    /// How long what is stored at `kv_remote_url` is kept there when nobody stores it again, seconds, at most thirty days. 0: one
    /// day.
    pub kv_remote_ttl_s: u64,
    /// What all names at `kv_remote_url` begin with, at most 64 bytes. NULL: "ns-llm".
    pub kv_remote_prefix: ns_llm_text,
    /// How long one call to `kv_remote_url` may take, connecting included, milliseconds, at most 10,000. 0: 500.
    pub kv_remote_timeout_ms: u64,
    /// Answers that are kept in memory at most. 0: as many as `response_cache_bytes` holds.
    pub response_max_entries: u64,
    /// Part of the key of every answer: those of another version are not found. For what answers depend on and the engine does
    /// not know.
    pub response_version: u64,
}

// SAFETY: `repr(C)`, begins with a `usize`; numbers, raw pointers and an optional function pointer.
unsafe impl SizedStruct for ns_llm_engine_params {}

/// Longest path, bytes.
const MAX_PATH_BYTES: usize = 32 << 10;

/// What an engine handle stands for.
pub(crate) struct LiveEngine {
    pub(crate) engine: Engine,
    pub(crate) dispatcher: Dispatcher,
    pub(crate) log: Arc<Log>,
}

/// All open engines.
pub(crate) static ENGINES: HandleTable<LiveEngine> = HandleTable::new(HandleKind::Engine);

/// Loads a model and starts an engine for it. Returns when it can answer, which may take seconds.
///
/// Ownership:  `params` and what it points to are copied, but `log_user_data` must stay valid until the engine is freed.
///             `*out_engine` is a new handle; free it with ns_llm_engine_free().
/// Threads:    any, also concurrently, also inside a callback.
/// NULL:       `params`, `params->model.data` and `out_engine` must not be NULL.
/// Returns:    NS_LLM_OK; NS_LLM_CANCELLED if the progress callback said so; NS_LLM_NULL_ARGUMENT,
///             NS_LLM_MISALIGNED_POINTER, NS_LLM_INVALID_UTF8, NS_LLM_INVALID_ARGUMENT or NS_LLM_UNSUPPORTED about the
///             parameters; any status from 300 to 399 about the files; NS_LLM_OUT_OF_MEMORY; NS_LLM_DEVICE_UNAVAILABLE;
///             NS_LLM_STORAGE about `kv_cache_dir`; NS_LLM_OVERLOADED if 16777216 engines are open; NS_LLM_FORKED_PROCESS in the child of a process that had
///             opened an engine; NS_LLM_INTERNAL.
/// On failure: `*out_engine` is 0, and nothing is left behind.
///
/// # Safety
/// `params` points to a `size_t` and to as many readable bytes as that says; its texts are readable and its `progress`
/// callable until this function returns, its `log` until ns_llm_engine_free() has. `out_engine` points to a writable
/// `ns_llm_engine`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ns_llm_engine_open(
    params: *const ns_llm_engine_params,
    out_engine: *mut ns_llm_engine,
) -> ns_llm_status {
    boundary(|| {
        // SAFETY: promised by the caller.
        let out = unsafe { Out::new("out_engine", out_engine, 0) }?;
        // Before the model is loaded, not after.
        check_process()?;
        // SAFETY: promised by the caller.
        let params = unsafe { read_struct("params", params) }?;
        // SAFETY: promised by the caller, about the text that `params` holds.
        let options = unsafe { read_options(&params) }?;
        // SAFETY: promised by the caller, until ns_llm_engine_free() has returned, which closes the log.
        let log = Arc::new(unsafe { Log::new(params.log, params.log_user_data) });
        let engine = Engine::open(options)?;
        let dispatcher = Dispatcher::start(log.clone())?;
        let live = Arc::new(LiveEngine { engine, dispatcher, log });
        out.set(ENGINES.insert(live.clone())?);
        live.log.opened(&live.engine);
        Ok(())
    })
}

/// Ends all requests of an engine with NS_LLM_CLOSED, stops its threads and frees its memory.
///
/// Outside of callbacks it returns when that is done and every last event has been told, so nothing of the engine calls
/// the program any more; this takes about one step, and what a disk needs to take the KV blocks that wait for it, and as
/// long as the callback that is running, so do not hold a lock that the callback takes. Inside a callback the last events
/// are told after that callback has returned. Request handles stay valid until they are freed. Calls that other threads
/// are in the middle of end with NS_LLM_CLOSED.
///
/// Ownership:  `engine` is dead afterwards; it may be freed before or after its requests.
/// Threads:    any, also inside a callback.
/// NULL:       0 is allowed and does nothing.
/// Returns:    NS_LLM_OK; NS_LLM_BAD_HANDLE if it is not an engine or was freed before; NS_LLM_FORKED_PROCESS;
///             NS_LLM_INTERNAL.
/// On failure: nothing changed.
#[unsafe(no_mangle)]
pub extern "C" fn ns_llm_engine_free(engine: ns_llm_engine) -> ns_llm_status {
    boundary(|| {
        if engine != 0 {
            let live = ENGINES.remove(engine)?;
            live.engine.close();
            live.dispatcher.close();
            live.log.closed(&live.engine);
            live.log.close();
        }
        Ok(())
    })
}

/// Waits until the KV blocks that were computed so far, and kept answers, are on disk, where they outlive a failure of power;
/// at most a minute. Without `kv_cache_dir` and `kv_remote_url` there is nothing to wait for. They are written by themselves,
/// too: this is for programs that must know.
///
/// Threads:    any, also concurrently, also inside a callback.
/// Returns:    NS_LLM_OK; NS_LLM_STORAGE if the medium did not take them; NS_LLM_NOT_STORED if some of them were not stored since
///             the last call: too much waited, a place failed or may not be written, which ns_llm_last_error() says; all else is
///             stored; NS_LLM_DEADLINE_EXCEEDED; NS_LLM_BAD_HANDLE; NS_LLM_CLOSED if the engine is freed meanwhile;
///             NS_LLM_FORKED_PROCESS; NS_LLM_INTERNAL.
/// On failure: requests are not touched, and nothing false is ever found: a block that cannot be read is computed again.
#[unsafe(no_mangle)]
pub extern "C" fn ns_llm_engine_flush(engine: ns_llm_engine) -> ns_llm_status {
    boundary(|| ENGINES.get(engine)?.engine.flush().map_err(Failure::from))
}

/// Forgets the KV that is cached for later: in the pool, in host memory and in the files of `kv_cache_dir`, for all namespaces
/// and for every model that has used the directory. Nothing of it is found any more when this returns. Requests that run are
/// not touched, and what is computed from now on is cached again. A store that nodes share is left as it is. Waits at most a
/// minute.
///
/// Threads:    any, also concurrently; inside a callback it holds up the events of all engines.
/// Returns:    NS_LLM_OK; NS_LLM_STORAGE if the files could not be removed, or if another process writes them: this engine
///             does not use them any more, another might; NS_LLM_DEADLINE_EXCEEDED; NS_LLM_BAD_HANDLE; NS_LLM_CLOSED if the
///             engine is freed meanwhile; NS_LLM_FORKED_PROCESS; NS_LLM_INTERNAL.
/// On failure: pool and host memory are cleared all the same, unless the engine is closed.
#[unsafe(no_mangle)]
pub extern "C" fn ns_llm_engine_clear_prefix_cache(engine: ns_llm_engine) -> ns_llm_status {
    boundary(|| ENGINES.get(engine)?.engine.clear_prefix_cache().map_err(Failure::from))
}

/// # Safety
/// The texts of `params` are readable, and `params.progress` callable with `params.progress_user_data` on any thread while the
/// engine is being opened.
unsafe fn read_options(params: &ns_llm_engine_params) -> Result<EngineOptions, Failure> {
    if params.model.data.is_null() {
        return Err(Failure::NullArgument { argument: "model" });
    }
    if params.reserved != 0 {
        return Err(Failure::invalid("reserved", params.reserved, "0"));
    }
    // SAFETY: promised by the caller.
    let mut options = EngineOptions::new(unsafe { read_text("model", params.model, MAX_PATH_BYTES) }?);
    options.device = device(params.device, params.device_ordinal)?;
    options.weights = weights(params.weights)?;
    options.kv_dtype = kv_dtype(params.kv_dtype)?;
    options.kv_tier_encoding = kv_tier_encoding(params.kv_tier_encoding)?;
    options.threads = unless_zero(params.threads as usize);
    options.context_tokens = unless_zero(params.context_tokens);
    options.kv_bytes = unless_zero(params.kv_bytes);
    options.memory_limit_bytes = unless_zero(params.memory_limit_bytes);
    options.kv_host_bytes = params.kv_host_bytes;
    options.response_cache.max_bytes = params.response_cache_bytes;
    options.response_cache.version = params.response_version;
    // SAFETY: promised by the caller.
    let directory = unsafe { read_text("kv_cache_dir", params.kv_cache_dir, MAX_PATH_BYTES) }?;
    options.kv_cache_dir = (!directory.is_empty()).then(|| directory.into());
    // SAFETY: promised by the caller.
    options.kv_remote = unsafe { read_remote_options(params) }?;
    options.kv_namespace_share = unless_zero(params.kv_namespace_share).unwrap_or(options.kv_namespace_share);
    let responses = &mut options.response_cache;
    for (option, given) in [
        (&mut options.kv_disk_bytes, params.kv_disk_bytes),
        (&mut options.kv_load_budget_ms, params.kv_load_budget_ms),
        (&mut responses.ttl_ms, params.response_ttl_ms),
        (&mut responses.max_entries, params.response_max_entries),
        (&mut responses.disk_bytes, params.response_disk_bytes),
    ] {
        *option = unless_zero(given).unwrap_or(*option);
    }
    for (option, given) in [
        (&mut options.block_tokens, params.block_tokens),
        (&mut options.max_running_sequences, params.max_running_sequences),
        (&mut options.max_waiting_requests, params.max_waiting_requests),
        (&mut options.prefill_budget_tokens, params.prefill_budget_tokens),
        (&mut options.mixed_budget_tokens, params.mixed_budget_tokens),
        (&mut options.max_cuda_graphs, params.max_cuda_graphs),
    ] {
        *option = unless_zero(given).unwrap_or(*option);
    }
    apply_flags(params.flags, &mut options)?;
    if let Some(function) = params.progress {
        // SAFETY: promised by the caller.
        options.on_progress = Some(Box::new(unsafe { progress(function, UserData(params.progress_user_data)) }));
    }
    Ok(options)
}

/// The store that nodes share, if there is one.
///
/// # Safety
/// The texts of `params` are readable.
unsafe fn read_remote_options(params: &ns_llm_engine_params) -> Result<Option<KvRemoteOptions>, Failure> {
    // SAFETY: promised by the caller.
    let url = unsafe { read_text("kv_remote_url", params.kv_remote_url, MAX_REMOTE_URL_BYTES) }?;
    // SAFETY: promised by the caller.
    let secret = unsafe { read_text("kv_remote_secret", params.kv_remote_secret, MAX_REMOTE_SECRET_BYTES) }?;
    // SAFETY: promised by the caller.
    let prefix = unsafe { read_text("kv_remote_prefix", params.kv_remote_prefix, MAX_REMOTE_PREFIX_BYTES) }?;
    if url.is_empty() {
        let numbers = [params.kv_remote_ttl_s, params.kv_remote_timeout_ms, params.kv_remote_owner_bytes];
        if secret.is_empty() && prefix.is_empty() && numbers == [0; 3] {
            return Ok(None);
        }
        let (field, expected) = ("kv_remote_url", "a store, where other fields say how it is used".to_string());
        return Err(Error::InvalidArgument { field, value: String::new(), expected }.into());
    }
    let mut remote = KvRemoteOptions::new(url);
    remote.secret = unless_zero(secret);
    remote.prefix = unless_zero(prefix).unwrap_or(remote.prefix);
    remote.ttl_s = unless_zero(params.kv_remote_ttl_s).unwrap_or(remote.ttl_s);
    remote.timeout_ms = unless_zero(params.kv_remote_timeout_ms).unwrap_or(remote.timeout_ms);
    remote.owner_bytes = unless_zero(params.kv_remote_owner_bytes);
    Ok(Some(remote))
}

/// # Safety
/// `function` may be called with `user_data`, on any thread, for as long as the result lives.
unsafe fn progress(
    function: unsafe extern "C" fn(u64, u64, *mut c_void) -> bool,
    user_data: UserData,
) -> impl FnMut(LoadProgress) -> bool + Send + 'static {
    move |progress: LoadProgress| {
        // Bound whole, because a closure that captured the bare pointer would not be `Send`.
        let UserData(pointer) = { user_data };
        // SAFETY: promised by the caller.
        as_callback(|| unsafe { function(progress.loaded_bytes, progress.total_bytes, pointer) })
    }
}

/// Zero, and an empty text, stands for the default.
fn unless_zero<T: Default + PartialEq>(value: T) -> Option<T> {
    (value != T::default()).then_some(value)
}

fn device(value: u32, ordinal: u32) -> Result<Device, Failure> {
    match value {
        0 | 1 if ordinal != 0 => Err(Failure::invalid("device_ordinal", ordinal, "0 without NS_LLM_DEVICE_CUDA")),
        0 => Ok(Device::Auto),
        1 => Ok(Device::Cpu),
        2 => Ok(Device::Cuda(ordinal as usize)),
        _ => Err(Failure::invalid("device", value, "a value of ns_llm_device")),
    }
}

/// The values of `ns_llm_weights`, in their order, which is not the engine's: a value never changes its meaning.
const WEIGHTS: [WeightFormat; 16] = [
    WeightFormat::Auto,
    WeightFormat::F32,
    WeightFormat::Bf16,
    WeightFormat::F16,
    WeightFormat::Quant(QuantType::Q8_0),
    WeightFormat::Quant(QuantType::Q6_K),
    WeightFormat::Quant(QuantType::Q5_K),
    WeightFormat::Quant(QuantType::Q4_K),
    WeightFormat::Quant(QuantType::Q3_K),
    WeightFormat::Quant(QuantType::Q2_K),
    WeightFormat::Quant(QuantType::Q5_1),
    WeightFormat::Quant(QuantType::Q5_0),
    WeightFormat::Quant(QuantType::Q4_1),
    WeightFormat::Quant(QuantType::Q4_0),
    WeightFormat::Quant(QuantType::IQ4_NL),
    WeightFormat::Quant(QuantType::MXFP4),
];

fn weights(value: u32) -> Result<WeightFormat, Failure> {
    at(&WEIGHTS, value).ok_or_else(|| Failure::invalid("weights", value, "a value of ns_llm_weights"))
}

fn kv_dtype(value: u32) -> Result<Option<KvDtype>, Failure> {
    const VALUES: [Option<KvDtype>; 5] =
        [None, Some(KvDtype::F32), Some(KvDtype::F16), Some(KvDtype::Bf16), Some(KvDtype::Int8)];
    at(&VALUES, value).ok_or_else(|| Failure::invalid("kv_dtype", value, "a value of ns_llm_kv_dtype"))
}

fn kv_tier_encoding(value: u32) -> Result<KvTierEncoding, Failure> {
    at(&[KvTierEncoding::AsComputed, KvTierEncoding::Int8], value)
        .ok_or_else(|| Failure::invalid("kv_tier_encoding", value, "a value of ns_llm_kv_tier_encoding"))
}

fn apply_flags(flags: u32, options: &mut EngineOptions) -> Result<(), Failure> {
    let known = NS_LLM_ENGINE_NO_PREFIX_CACHE
        | NS_LLM_ENGINE_NORMAL_PRIORITY
        | NS_LLM_ENGINE_ADAPTIVE_RESPONSE_TTL
        | NS_LLM_ENGINE_NO_RESPONSE_DISK
        | NS_LLM_ENGINE_NO_RESPONSE_REMOTE
        | NS_LLM_ENGINE_NO_CUDA_GRAPHS;
    if flags & !known != 0 {
        return Err(Failure::Unsupported { argument: "params", reason: format!("flags {:#x}", flags & !known) });
    }
    options.prefix_cache = flags & NS_LLM_ENGINE_NO_PREFIX_CACHE == 0;
    options.response_cache.adaptive_ttl = flags & NS_LLM_ENGINE_ADAPTIVE_RESPONSE_TTL != 0;
    options.response_cache.remote = flags & NS_LLM_ENGINE_NO_RESPONSE_REMOTE == 0;
    if flags & NS_LLM_ENGINE_NO_RESPONSE_DISK != 0 {
        // Said twice, the flag is meant: 0 is the default of `response_disk_bytes`.
        options.response_cache.disk_bytes = 0;
    }
    if flags & NS_LLM_ENGINE_NO_CUDA_GRAPHS != 0 {
        options.max_cuda_graphs = 0;
    }
    if flags & NS_LLM_ENGINE_NORMAL_PRIORITY != 0 {
        options.thread_priority = ThreadPriority::Normal;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use ns_llm_core::option_names::options_by_name;
    use serde_json::Value;

    use super::*;
    use crate::params::tests::check_names;

    fn text(text: &'static str) -> ns_llm_text {
        ns_llm_text { data: text.as_ptr().cast(), size: text.len() }
    }

    /// A struct of zeros but for `model`, which every program gives.
    fn params() -> ns_llm_engine_params {
        // SAFETY: any bytes are a valid value, as `SizedStruct` promises.
        ns_llm_engine_params { model: text("model"), ..unsafe { std::mem::zeroed() } }
    }

    fn options(params: &ns_llm_engine_params) -> BTreeMap<&'static str, String> {
        // SAFETY: the texts of these tests live for ever; `progress` is not called by reading.
        let options = unsafe { read_options(params) }.unwrap_or_else(|failure| panic!("{failure}"));
        options_by_name(&options).into_iter().collect()
    }

    unsafe extern "C" fn go_on(_: u64, _: u64, _: *mut c_void) -> bool {
        true
    }

    type Set = fn(&mut ns_llm_engine_params);

    /// Each option of C, by its name there, set to the value of the table.
    const OPTIONS: [(&str, Set); 36] = [
        ("model", |p| p.model = text("/models/m")),
        ("device", |p| p.device = ns_llm_device::NS_LLM_DEVICE_CPU as u32),
        ("weights", |p| p.weights = ns_llm_weights::NS_LLM_WEIGHTS_Q8_0 as u32),
        ("kv_dtype", |p| p.kv_dtype = ns_llm_kv_dtype::NS_LLM_KV_DTYPE_BF16 as u32),
        ("threads", |p| p.threads = 3),
        ("NS_LLM_ENGINE_NORMAL_PRIORITY", |p| p.flags = NS_LLM_ENGINE_NORMAL_PRIORITY),
        ("context_tokens", |p| p.context_tokens = 512),
        ("kv_bytes", |p| p.kv_bytes = 64 << 20),
        ("memory_limit_bytes", |p| p.memory_limit_bytes = 64 << 20),
        ("block_tokens", |p| p.block_tokens = 32),
        ("max_running_sequences", |p| p.max_running_sequences = 7),
        ("max_cuda_graphs", |p| p.max_cuda_graphs = 5),
        ("prefill_budget_tokens", |p| p.prefill_budget_tokens = 96),
        ("mixed_budget_tokens", |p| p.mixed_budget_tokens = 96),
        ("max_waiting_requests", |p| p.max_waiting_requests = 9),
        ("NS_LLM_ENGINE_NO_PREFIX_CACHE", |p| p.flags = NS_LLM_ENGINE_NO_PREFIX_CACHE),
        ("kv_host_bytes", |p| p.kv_host_bytes = 64 << 20),
        ("kv_cache_dir", |p| p.kv_cache_dir = text("/kv")),
        ("kv_disk_bytes", |p| p.kv_disk_bytes = 64 << 20),
        ("kv_remote_url", |p| p.kv_remote_url = text("redis://store:1")),
        ("kv_remote_secret", |p| p.kv_remote_secret = text("a secret of sixteen")),
        ("kv_remote_ttl_s", |p| p.kv_remote_ttl_s = 60),
        ("kv_remote_prefix", |p| p.kv_remote_prefix = text("mine")),
        ("kv_remote_timeout_ms", |p| p.kv_remote_timeout_ms = 70),
        ("kv_remote_owner_bytes", |p| p.kv_remote_owner_bytes = 64 << 20),
        ("kv_tier_encoding", |p| p.kv_tier_encoding = ns_llm_kv_tier_encoding::NS_LLM_KV_TIER_ENCODING_INT8 as u32),
        ("kv_load_budget_ms", |p| p.kv_load_budget_ms = 80),
        ("kv_namespace_share", |p| p.kv_namespace_share = 0.25),
        ("response_cache_bytes", |p| p.response_cache_bytes = 64 << 20),
        ("response_max_entries", |p| p.response_max_entries = 11),
        ("response_ttl_ms", |p| p.response_ttl_ms = 90),
        ("NS_LLM_ENGINE_ADAPTIVE_RESPONSE_TTL", |p| p.flags = NS_LLM_ENGINE_ADAPTIVE_RESPONSE_TTL),
        ("response_version", |p| p.response_version = 12),
        ("response_disk_bytes", |p| p.response_disk_bytes = 64 << 20),
        ("NS_LLM_ENGINE_NO_RESPONSE_REMOTE", |p| p.flags = NS_LLM_ENGINE_NO_RESPONSE_REMOTE),
        ("progress", |p| p.progress = Some(go_on)),
    ];

    /// Fields of the struct and flags that are no option of their own: they belong to others, or to this face alone.
    const OTHERS: [&str; 9] = [
        "struct_size",
        "flags",
        "device_ordinal",
        "progress_user_data",
        "log",
        "log_user_data",
        "reserved",
        // A second way to say `response_disk_bytes`, of which 0 means the default.
        "NS_LLM_ENGINE_NO_RESPONSE_DISK",
        // The same of `max_cuda_graphs`.
        "NS_LLM_ENGINE_NO_CUDA_GRAPHS",
    ];

    /// Every option that the table gives C is there under its name, sets the engine's option of that name, and no other; and C
    /// has none beside them.
    #[test]
    fn options_are_those_of_the_table() {
        let table: Value = serde_json::from_str(include_str!("../../engine/engine_options.json")).unwrap();
        let rows = table["options"].as_array().unwrap();
        let names: BTreeSet<&str> = rows.iter().filter_map(|row| row["c"].as_str()).collect();
        let sets = BTreeMap::from(OPTIONS);
        assert_eq!(names, sets.keys().copied().collect());
        for row in rows {
            let (Some(option), Some(name)) = (row["option"].as_str(), row["c"].as_str()) else { continue };
            let mut given = params();
            if option.starts_with("kv_remote.") {
                given.kv_remote_url = text("redis://store");
            }
            let before = options(&given);
            sets[name](&mut given);
            let after = options(&given);
            let changed: Vec<_> = after.iter().filter(|(option, value)| before[*option] != **value).collect();
            assert_eq!(changed, [(&option, &row["value"].as_str().unwrap().to_string())], "{name}");
        }
        let header = include_str!("../../include/ns_llm.h");
        let flags = header.lines().filter_map(|line| line.strip_prefix("#define ")?.split_once(' '));
        let flags = flags.map(|(name, _)| name).filter(|name| name.starts_with("NS_LLM_ENGINE_"));
        let (_, fields) = header.split_once("typedef struct ns_llm_engine_params {").unwrap();
        let (fields, _) = fields.split_once("} ns_llm_engine_params;").unwrap();
        let fields = fields.lines().map(str::trim).filter(|line| !line.starts_with(['/', '*']) && line.ends_with(';'));
        let fields = fields.filter_map(|line| line.trim_end_matches(';').rsplit([' ', '*']).next());
        let in_header: BTreeSet<&str> = flags.chain(fields).collect();
        assert_eq!(in_header, names.into_iter().chain(OTHERS).collect());
    }

    /// The values of C's enums are those of the engine, under the engine's names.
    #[test]
    fn values_of_enums_are_the_engines() {
        check_names("NS_LLM_WEIGHTS_", WeightFormat::all().count(), weights, WeightFormat::from_name);
        check_names("NS_LLM_KV_DTYPE_", KvDtype::ALL.len() + 1, kv_dtype, KvDtype::from_name_or_auto);
        let encodings = KvTierEncoding::ALL.len();
        check_names("NS_LLM_KV_TIER_ENCODING_", encodings, kv_tier_encoding, KvTierEncoding::from_name);
    }
}
