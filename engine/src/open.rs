//! From a path to a running engine: the only place where loader, tokenizer, chat, model and backend meet.
//!
//! The worker thread loads the model itself: what it will own is made where it will live, and the compute pool packs
//! weights with the same threads that later multiply them. A load that fails ends that thread and leaves nothing.

mod levels;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ns_llm_kernels::host;
pub(crate) use ns_llm_kernels::host::return_free_memory;
use sha2::{Digest, Sha256};

use crate::backend::cpu::{CpuBackend, CpuBackendOptions};
use crate::backend::cuda::CudaBackend;
use crate::backend::{Backend, Int8Blocks, KvDtype, KvLayout, Pooling, StepLimits};
use crate::chat::{ChatTemplate, SpecialTokens};
use crate::command::{Command, Submission};
use crate::config::{
    EngineOptions, KvRemoteOptions, KvTierEncoding, LoadProgress, MAX_DECODER_EMBEDDING_TOKENS,
    MAX_ENCODE_STEP_SEQUENCES, MAX_THREADS, MAX_WAITING_TOKENS, MIN_WRITE_QUEUE_BLOCKS, ResponseCacheOptions,
    ThreadPriority, WRITE_QUEUE_BYTES, WeightFormat,
};
use crate::device::{self, CudaDevices, MachineDevices, Place, Target};
use crate::error::{Error, Result, panic_text};
use crate::executor::{Executor, ModelExecutor};
use crate::instruments::Instruments;
use crate::intake;
use crate::kv_cache::tiers::disk::{ANSWERS, Access, Directory, DiskOptions, DiskTier, draw_seed};
use crate::kv_cache::tiers::remote::{RedisStore, RemoteOptions, RemoteTier, ServerUrl};
use crate::kv_cache::tiers::{Fault, LayoutId, TierId, TierStore, TiersConfig};
use crate::kv_cache::{KvCache, KvCacheConfig, KvIdentity};
use crate::loader::{GenerationConfig, ModelSource, PoolingMode, SentenceConfig, Weights};
use crate::memory_plan::MemoryPlan;
use crate::model;
use crate::model::config::ModelConfig;
use crate::request::SamplingDefaults;
use crate::response_cache::MAX_ENTRY_BYTES;
use crate::response_tiers::{AnswerStore, DiskAnswers, RemoteAnswers, ResponseTiers};
use crate::responses::Responses;
use crate::scheduler::{Scheduler, SchedulerConfig};
use crate::stats::ModelInfo;
use crate::text_model::TextModel;
use crate::tier_thread::TierThread;
use crate::tokenizer::{Tokenizer, TokenizerConfig};
use crate::worker::Worker;
use levels::encode_kv_dtype;
pub(crate) use levels::{WeightLevel, measure_weights, memory_limit_bytes, plan_memory, weight_levels};

/// Version of the CPU kernels' numerics: changes when any of them may give other bits than before.
const CPU_NUMERICS_VERSION: u32 = 1;
/// The same of the CUDA kernels.
const CUDA_NUMERICS_VERSION: u32 = 1;
/// Version of the layout of a KV block.
const KV_LAYOUT_VERSION: u32 = 1;

/// Version of the rounding of blocks to 8 bits.
const INT8_BLOCKS_VERSION: u32 = 1;

/// A loaded model with everything that runs it.
pub struct Loaded {
    /// Weights, KV blocks and device.
    pub executor: Box<dyn Executor>,
    /// Over an empty pool.
    pub scheduler: Scheduler,
    /// What does the jobs of the tiers that the scheduler's pool has below it.
    pub tier_stores: Vec<Box<dyn TierStore>>,
    /// Where answers are kept beyond the process.
    pub(crate) answer_stores: Vec<Box<dyn AnswerStore>>,
    /// Tokenizer, template and defaults.
    pub text: Arc<TextModel>,
    /// What is loaded.
    pub info: ModelInfo,
    /// Bytes.
    pub plan: MemoryPlan,
}

/// The threads of a running engine, and the ways to them.
pub(crate) struct Running {
    pub(crate) commands: Sender<Command>,
    pub(crate) submissions: SyncSender<Submission>,
    pub(crate) worker: JoinHandle<()>,
    pub(crate) intake: JoinHandle<()>,
    /// Set when the engine shall close: intake then prepares nothing more.
    pub(crate) is_closing: Arc<AtomicBool>,
    pub(crate) instruments: Arc<Instruments>,
    /// Why the worker ended; set by it.
    pub(crate) ended: Arc<OnceLock<Error>>,
    pub(crate) text: Arc<TextModel>,
    pub(crate) responses: Responses,
    pub(crate) info: ModelInfo,
    pub(crate) plan: MemoryPlan,
}

/// What the worker thread says when its model is loaded.
struct Ready {
    text: Arc<TextModel>,
    info: ModelInfo,
    plan: MemoryPlan,
    answer_stores: Vec<Box<dyn AnswerStore>>,
}

/// Loads a model on a worker thread of its own and starts the intake thread.
pub(crate) fn start(options: EngineOptions, devices: impl CudaDevices + 'static) -> Result<Running> {
    options.validate()?;
    let epoch = Instant::now();
    let responses = Responses::shared_by_owners(options.response_cache, options.kv_namespace_share)?;
    let max_waiting_requests = options.max_waiting_requests;
    let load_budget = Duration::from_millis(options.kv_load_budget_ms);
    let remote_owner_limit = options.kv_remote.as_ref().and_then(KvRemoteOptions::owner_limit);
    let (command_sender, commands) = channel();
    let (ready_sender, ready) = sync_channel(1);
    let instruments = Arc::new(Instruments::new());
    let ended = Arc::new(OnceLock::new());
    let worker = StartedWorker::new(command_sender.clone(), {
        let (instruments, ended, tier_answers) = (instruments.clone(), ended.clone(), command_sender.clone());
        spawn("ns-llm-worker", move || {
            let priority = options.thread_priority;
            if let Some((loaded, ready)) = load_and_report(options, &devices, &ready_sender) {
                // The worker computes too. Only now: the threads that it started have inherited its priority.
                if priority == ThreadPriority::BelowNormal {
                    host::lower_thread_priority();
                }
                let Loaded { executor, scheduler, tier_stores, text, .. } = loaded;
                let spawned = tier_stores.into_iter().map(|store| TierThread::spawn(store, tier_answers.clone()));
                match spawned.collect() {
                    Ok(tiers) => {
                        let worker = Worker::new(executor, scheduler, text, commands, instruments, tiers, epoch);
                        // From here on `Engine::open` may return.
                        let _ = ready_sender.send(Ok(ready));
                        worker.run(&ended);
                    }
                    Err(error) => drop(ready_sender.send(Err(error))),
                }
            }
            host::return_free_memory();
        })?
    });
    let Ready { text, info, plan, answer_stores } = ready.recv().unwrap_or(Err(Error::Closed))?;
    if !answer_stores.is_empty() {
        let tiers = ResponseTiers::start(answer_stores, text.identity, load_budget)?;
        if let Some((limit_bytes, ttl_s)) = remote_owner_limit {
            tiers.limit_owners(TierId::Remote, limit_bytes, ttl_s);
        }
        responses.keep_in(tiers);
    }
    let (submission_sender, submissions) = sync_channel(max_waiting_requests);
    let is_closing = Arc::new(AtomicBool::new(false));
    let intake = {
        let (text, commands, is_closing) = (text.clone(), command_sender.clone(), is_closing.clone());
        let (responses, instruments) = (responses.clone(), instruments.clone());
        spawn("ns-llm-intake", move || {
            intake::run(&text, &responses, &instruments, epoch, &submissions, &commands, &is_closing)
        })?
    };
    let (commands, submissions, worker) = (command_sender, submission_sender, worker.keep());
    Ok(Running { commands, submissions, worker, intake, is_closing, instruments, ended, text, responses, info, plan })
}

/// The worker of an engine that is not complete. Dropped, it ends: nobody else could tell it to, and it holds the model.
struct StartedWorker {
    commands: Sender<Command>,
    thread: Option<JoinHandle<()>>,
}

impl StartedWorker {
    fn new(commands: Sender<Command>, thread: JoinHandle<()>) -> Self {
        StartedWorker { commands, thread: Some(thread) }
    }

    /// The engine is complete, and ends it itself.
    fn keep(mut self) -> JoinHandle<()> {
        self.thread.take().expect("it is taken once")
    }
}

impl Drop for StartedWorker {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            // One that has failed to load listens no more; either way its end is near.
            let _ = self.commands.send(Command::Close);
            let _ = thread.join();
        }
    }
}

/// Loads, or reports why not; a panic while loading is a typed error like any other.
fn load_and_report(
    options: EngineOptions,
    devices: &dyn CudaDevices,
    ready: &SyncSender<Result<Ready>>,
) -> Option<(Loaded, Ready)> {
    let loaded = catch_unwind(AssertUnwindSafe(|| load_among(options, devices)))
        .unwrap_or_else(|panic| Err(Error::Internal { reason: panic_text(panic.as_ref()) }));
    match loaded {
        Ok(mut loaded) => {
            let answer_stores = std::mem::take(&mut loaded.answer_stores);
            let ready =
                Ready { text: loaded.text.clone(), info: loaded.info.clone(), plan: loaded.plan, answer_stores };
            Some((loaded, ready))
        }
        Err(error) => {
            let _ = ready.send(Err(error));
            None
        }
    }
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name(name.to_string())
        .spawn(body)
        .map_err(|e| Error::Internal { reason: format!("thread {name} could not be started: {e}") })
}

/// The files of a model, read as far as it can be without its weights: everything is checked that can be.
pub(crate) struct ModelFiles {
    pub(crate) config: ModelConfig,
    pub(crate) generation: GenerationConfig,
    pub(crate) sentence: SentenceConfig,
    pub(crate) tokenizer_config: TokenizerConfig,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) chat_template: Option<ChatTemplate>,
    pub(crate) eos_token_ids: Vec<u32>,
    /// Hash of the tokenizer and the chat template.
    pub(crate) text_fingerprint: [u8; 32],
    pub(crate) weights: Weights,
}

impl ModelFiles {
    pub(crate) fn open(options: &EngineOptions) -> Result<ModelFiles> {
        let source = ModelSource::open(&options.model)?;
        let config = ModelConfig::from_json(&source.config()?)?;
        let generation = source.generation_config()?;
        let sentence = sentence_config(&source, &config)?;
        let tokenizer_config = tokenizer_config(&source)?;
        let tokenizer_json = source.tokenizer_json()?;
        let tokenizer = Tokenizer::from_json(&tokenizer_json, &tokenizer_config)?;
        Ok(ModelFiles {
            text_fingerprint: text_fingerprint(&tokenizer_json, &tokenizer_config),
            chat_template: chat_template(&tokenizer_config, &tokenizer)?,
            tokenizer,
            eos_token_ids: eos_token_ids(&generation, &config)?,
            weights: source.weights()?,
            config,
            generation,
            sentence,
            tokenizer_config,
        })
    }
}

/// What the files of sentence-transformers say, when it fits the model.
fn sentence_config(source: &ModelSource, config: &ModelConfig) -> Result<SentenceConfig> {
    let sentence = source.sentence_config()?;
    match sentence.word_embedding_dimension {
        Some(dimension) if dimension != config.hidden_size => Err(Error::Config {
            file: "1_Pooling/config.json",
            field: "word_embedding_dimension".to_string(),
            reason: format!("is {dimension}, the model's hidden_size is {}", config.hidden_size),
        }),
        _ => Ok(sentence),
    }
}

/// `tokenizer_config.json`, every part of which is optional; a `chat_template.jinja` goes before its template.
fn tokenizer_config(source: &ModelSource) -> Result<TokenizerConfig> {
    let mut config = match source.tokenizer_config()? {
        Some(file) => TokenizerConfig::parse(&file.into_value())?,
        None => TokenizerConfig::default(),
    };
    config.chat_template = source.chat_template()?.or(config.chat_template);
    Ok(config)
}

/// The compiled template, if the model has one.
fn chat_template(config: &TokenizerConfig, tokenizer: &Tokenizer) -> Result<Option<ChatTemplate>> {
    let special = SpecialTokens {
        named: config.special_tokens.clone(),
        texts: tokenizer.special_tokens().map(|(_, text)| text.to_string()).collect(),
    };
    config.chat_template.as_ref().map(|source| ChatTemplate::new(source, special)).transpose()
}

/// What `generation_config.json` recommends.
fn sampling_defaults(generation: &GenerationConfig) -> SamplingDefaults {
    SamplingDefaults {
        temperature: generation.temperature,
        top_k: generation.top_k,
        top_p: generation.top_p,
        min_p: generation.min_p,
        repetition_penalty: generation.repetition_penalty,
    }
}

/// End tokens of `generation_config.json`, else those of `config.json`, all in the vocabulary.
fn eos_token_ids(generation: &GenerationConfig, config: &ModelConfig) -> Result<Vec<u32>> {
    let ids = if generation.eos_token_ids.is_empty() { &config.eos_token_ids } else { &generation.eos_token_ids };
    match ids.iter().find(|&&id| id as usize >= config.vocab_size) {
        None => Ok(ids.clone()),
        Some(id) => Err(Error::Config {
            file: "generation_config.json",
            field: "eos_token_id".to_string(),
            reason: format!("{id} is outside the vocabulary of {} entries", config.vocab_size),
        }),
    }
}

/// All cores, but one is left to the host program where there are more than two.
fn default_threads() -> usize {
    match host::usable_cores() {
        cores @ ..=2 => cores.max(1),
        cores => (cores - 1).min(MAX_THREADS),
    }
}

/// Loads a model on the calling thread, where `options` say.
pub fn load(options: EngineOptions) -> Result<Loaded> {
    load_among(options, &MachineDevices)
}

/// The same with these CUDA devices.
pub fn load_among(options: EngineOptions, devices: &dyn CudaDevices) -> Result<Loaded> {
    let start = Instant::now();
    let files = ModelFiles::open(&options)?;
    let (place, level) = device::place(options.device, devices, |target| {
        let level = plan_memory(&options, &files, target)?;
        level.plan.check(memory_limit_bytes(&options, target)?)?;
        Ok(level)
    })?;
    let threads = options.threads.unwrap_or_else(default_threads);
    match &place.target {
        Target::Cpu => {
            let (priority, weights) = (options.thread_priority, level.wanted);
            let backend = CpuBackend::new(CpuBackendOptions { threads, priority, weights })?;
            let (isa, weights_bytes) = (backend.isa_name(), CpuBackend::weights_bytes);
            let numerics = format!("cpu {isa} v{CPU_NUMERICS_VERSION}");
            let compute = Compute { backend, weights_bytes, isa, threads, numerics };
            load_on(options, files, level, &place, compute, start)
        }
        Target::Cuda(cuda) => {
            let backend = CudaBackend::new(cuda.driver.clone(), cuda.name(), level.wanted);
            let (isa, weights_bytes) = (cuda.architecture(), CudaBackend::weights_bytes);
            let numerics = format!("cuda {isa} v{CUDA_NUMERICS_VERSION}");
            let compute = Compute { backend, weights_bytes, isa, threads: 0, numerics };
            load_on(options, files, level, &place, compute, start)
        }
    }
}

/// A backend that is ready, and what there is to say about it.
struct Compute<B> {
    backend: B,
    /// Bytes of what was loaded so far.
    weights_bytes: fn(&B) -> u64,
    isa: &'static str,
    threads: usize,
    /// Whatever may change the bits of a result.
    numerics: String,
}

fn load_on<B: Backend>(
    mut options: EngineOptions,
    files: ModelFiles,
    level: WeightLevel,
    place: &Place,
    compute: Compute<B>,
    start: Instant,
) -> Result<Loaded> {
    let Compute { mut backend, weights_bytes, isa, threads, numerics } = compute;
    let WeightLevel { wanted, format, layout, mut plan } = level;
    if !files.config.architecture.can_generate() {
        // Its keys and values end with each step.
        (options.kv_host_bytes, options.kv_cache_dir) = (0, None);
        options.response_cache.max_bytes = 0;
    }
    let fingerprint = fingerprint(&options, &files, threads.max(1))?;
    let stored = StoredBlocks::new(&options, &layout, B::int8_blocks(layout)?);
    let identity = kv_identity(fingerprint, wanted, &layout, stored.encoding(), &numerics);
    let disk = options.kv_cache_dir.as_deref().map(|it| open_disk(it, &options, stored.block_bytes)).transpose()?;
    let mut kv_disk_refusal = disk.as_ref().and_then(refusal).map(|fault| fault.to_string());
    let remote = options.kv_remote.as_ref().map(|remote| open_remote(remote, "kv", stored.block_bytes)).transpose()?;
    let answer_identity = answer_identity(&identity, plan.context_tokens, &files.text_fingerprint);
    let answer_stores = open_answers(&options, answer_identity, &mut kv_disk_refusal)?;
    let config = files.config;
    let mut on_progress = options.on_progress.take().unwrap_or_else(|| Box::new(|_: LoadProgress| true));
    let weights = files.weights;
    let loaded = model::load(&backend, weights, &config, plan.context_tokens, &mut *on_progress)?;
    debug_assert_eq!(plan.weights_bytes, weights_bytes(&backend), "the plan of {}", options.model.display());
    plan.weights_bytes = weights_bytes(&backend);
    let kv = backend.allocate_kv(layout)?;
    let max_embedding_tokens = max_embedding_tokens(&config, &files.sentence, &plan);
    let info = ModelInfo {
        name: model_name(&options.model),
        architecture: config.architecture.name().to_string(),
        num_parameters: loaded.num_parameters,
        num_layer_parameters: config.num_layer_parameters(),
        vocab_size: config.vocab_size,
        context_tokens: plan.context_tokens,
        can_generate: config.architecture.can_generate(),
        embedding_dimensions: config.hidden_size,
        max_embedding_tokens,
        has_chat_template: files.chat_template.is_some(),
        weights: format.name(),
        kv_dtype: layout.dtype.name(),
        kv_tier_encoding: stored.encoding().name(),
        kv_disk_refusal,
        device: place.target.kind(),
        device_name: place.target.name(),
        device_reason: place.reason.clone(),
        isa,
        threads,
        load_ms: start.elapsed().as_secs_f64() * 1e3,
    };
    let text = Arc::new(TextModel {
        tokenizer: files.tokenizer,
        chat_template: files.chat_template,
        sampling_defaults: sampling_defaults(&files.generation),
        eos_token_ids: files.eos_token_ids,
        vocab_size: config.vocab_size,
        context_tokens: plan.context_tokens,
        max_embedding_tokens,
        embedding_dimensions: config.hidden_size,
        identity: answer_identity,
    });
    let encode_layout = KvLayout { dtype: encode_kv_dtype(layout.dtype, format), ..layout };
    let encode_kv = encode_kv_layout(&options, &encode_layout, max_embedding_tokens);
    if config.architecture.can_generate() {
        backend.prepare(&step_limits(&options, &config, plan.context_tokens))?;
    }
    let executor = ModelExecutor::new(backend, loaded.model, kv, encode_kv, pooling(&files.sentence))?;
    let executor = executor.written_as(stored.int8);
    let mut scheduler = Scheduler::new(
        scheduler_config(&options, &plan, max_embedding_tokens, executor.max_in_flight()),
        KvCache::new(KvCacheConfig {
            num_blocks: plan.num_blocks,
            block_tokens: options.block_tokens,
            identity,
            prefix_cache: options.prefix_cache,
            owner_share: options.kv_namespace_share,
            tiers: tiers_config(&options, &stored, &place.target),
        }),
    );
    let mut tier_stores: Vec<Box<dyn TierStore>> = Vec::new();
    if let Some((disk, tiers)) = disk.zip(scheduler.tiers()) {
        if let Some(fault) = refusal(&disk) {
            tiers.forbid_writes(TierId::Disk, fault);
        }
        // What is not understood is left alone, and the engine does without.
        if let Ok(disk) = disk {
            tiers.found(TierId::Disk, disk.keys().copied());
            tier_stores.push(Box::new(disk));
        }
    }
    if let Some((remote, tiers)) = remote.zip(scheduler.tiers()) {
        if let Some((limit_bytes, ttl_s)) = options.kv_remote.as_ref().and_then(KvRemoteOptions::owner_limit) {
            tiers.limit_owners(TierId::Remote, limit_bytes, ttl_s);
        }
        tier_stores.push(Box::new(remote));
    }
    Ok(Loaded { executor: Box::new(executor), scheduler, tier_stores, answer_stores, text, info, plan })
}

/// What steps will be at most, in contexts of up to `context_tokens` tokens.
fn step_limits(options: &EngineOptions, config: &ModelConfig, context_tokens: usize) -> StepLimits {
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

/// Blocks that leave the process are found by the weights' contents. Those that do not need only tell engines of one
/// process apart, so names, shapes and types will do, which cost nothing to hash.
fn fingerprint(options: &EngineOptions, files: &ModelFiles, num_threads: usize) -> Result<[u8; 32]> {
    let description = format!("{:?}", files.config);
    let is_kept = options.prefix_cache || options.response_cache.max_bytes > 0;
    if is_kept && (options.kv_cache_dir.is_some() || options.kv_remote.is_some()) {
        return files.weights.fingerprint(&description, num_threads);
    }
    let mut hash = Sha256::new();
    hash.update(description);
    for (name, shape, dtype) in files.weights.entries() {
        hash.update(format!("{name} {shape:?} {dtype:?}\n"));
    }
    Ok(hash.finalize().into())
}

/// The blocks of earlier lives in a directory. A directory that cannot be made or entered is an error of who named it; what
/// is wrong inside is a fault of the tier.
fn open_disk(path: &Path, options: &EngineOptions, block_bytes: u64) -> Result<Result<DiskTier, Fault>> {
    let sizes = DiskOptions::new(options.kv_disk_bytes, block_bytes)?.owner_share(options.kv_namespace_share);
    let directory = Directory::open(path)?;
    let access = directory.access();
    Ok(DiskTier::open(Box::new(directory), access, sizes, draw_seed()))
}

/// Why nothing is written there.
fn refusal(disk: &Result<DiskTier, Fault>) -> Option<Fault> {
    match disk {
        Ok(disk) => (disk.access() == Access::Read).then_some(Fault::ReadOnly),
        Err(fault) => Some(fault.clone()),
    }
}

/// The places beyond the process where answers are kept: beneath the directory of the KV blocks, if this process writes
/// there, and in the store that has KV blocks too. Answers that are not understood are left alone; `refusal` says why, unless
/// the KV blocks have said so.
fn open_answers(
    options: &EngineOptions,
    identity: [u8; 32],
    refusal: &mut Option<String>,
) -> Result<Vec<Box<dyn AnswerStore>>> {
    let ResponseCacheOptions { max_bytes, disk_bytes, remote: is_shared, .. } = options.response_cache;
    let mut stores: Vec<Box<dyn AnswerStore>> = Vec::new();
    if max_bytes == 0 {
        return Ok(stores);
    }
    if let (Some(path), true) = (&options.kv_cache_dir, disk_bytes > 0) {
        let sizes = DiskOptions::new(disk_bytes, MAX_ENTRY_BYTES as u64).map_err(|error| match error {
            Error::InvalidArgument { value, expected, .. } => {
                Error::InvalidArgument { field: "response_cache.disk_bytes", value, expected }
            }
            other => other,
        })?;
        let sizes = sizes.owner_share(options.kv_namespace_share);
        let directory = Directory::open(&path.join(ANSWERS))?;
        // Who only reads does not hear what the writer makes invalid.
        if directory.access() == Access::Write {
            match DiskTier::open(Box::new(directory), Access::Write, sizes, draw_seed()) {
                Ok(tier) => stores.push(Box::new(DiskAnswers::open(tier))),
                Err(fault) => drop(refusal.get_or_insert_with(|| format!("answers: {fault}"))),
            }
        }
    }
    if let (Some(remote), true) = (&options.kv_remote, is_shared) {
        stores.push(Box::new(RemoteAnswers::new(open_remote(remote, "answer", MAX_ENTRY_BYTES as u64)?, identity)));
    }
    Ok(stores)
}

/// A store that nodes share; asked for nothing yet.
fn open_remote(options: &KvRemoteOptions, kind: &'static str, max_payload_bytes: u64) -> Result<RemoteTier> {
    let store = RedisStore::new(ServerUrl::parse(&options.url)?, options.timeout_ms)?;
    let records = RemoteOptions::new(max_payload_bytes).kind(kind);
    let mut records = records.ttl_s(options.ttl_s)?.prefix(&options.prefix)?;
    if let Some(secret) = &options.secret {
        records = records.secret(secret.as_bytes())?;
    }
    Ok(RemoteTier::new(Box::new(store), records))
}

/// Blocks as they are outside the pool.
struct StoredBlocks {
    layout: KvLayout,
    /// How they are written; `None`: as the pool has them.
    int8: Option<Int8Blocks>,
    block_bytes: u64,
}

impl StoredBlocks {
    /// `int8`: how blocks of the pool's layout are written in 8 bits.
    fn new(options: &EngineOptions, layout: &KvLayout, int8: Option<Int8Blocks>) -> Self {
        match int8.filter(|_| options.kv_tier_encoding == KvTierEncoding::Int8) {
            Some(int8) => {
                let block_bytes = int8.encoded_bytes() as u64;
                StoredBlocks { layout: KvLayout { dtype: KvDtype::Int8, ..*layout }, int8: Some(int8), block_bytes }
            }
            None => StoredBlocks { layout: *layout, int8: None, block_bytes: layout.block_bytes() },
        }
    }

    fn encoding(&self) -> KvTierEncoding {
        if self.int8.is_some() { KvTierEncoding::Int8 } else { KvTierEncoding::AsComputed }
    }
}

/// Bytes of a block outside the pool.
pub(crate) fn stored_block_bytes(options: &EngineOptions, layout: &KvLayout, target: &Target) -> Result<u64> {
    let int8 = match target {
        Target::Cpu => CpuBackend::int8_blocks(*layout)?,
        Target::Cuda(_) => CudaBackend::int8_blocks(*layout)?,
    };
    Ok(StoredBlocks::new(options, layout, int8).block_bytes)
}

/// `None`: the pool is all that there is.
fn tiers_config(options: &EngineOptions, stored: &StoredBlocks, target: &Target) -> Option<TiersConfig> {
    let StoredBlocks { layout, block_bytes, .. } = stored;
    let disk = options.kv_cache_dir.iter().map(|_| TierId::Disk);
    let tiers: Vec<TierId> = disk.chain(options.kv_remote.iter().map(|_| TierId::Remote)).collect();
    if tiers.is_empty() && options.kv_host_bytes == 0 {
        return None;
    }
    // What the longest step publishes at once.
    let step_blocks = (options.prefill_budget_tokens / layout.block_tokens) as u64 + MIN_WRITE_QUEUE_BLOCKS;
    Some(TiersConfig {
        layout: layout_id(layout, target),
        block_tokens: layout.block_tokens,
        block_bytes: usize::try_from(*block_bytes).ok()?,
        host_bytes: options.kv_host_bytes,
        write_queue_bytes: WRITE_QUEUE_BYTES.max(step_blocks.saturating_mul(*block_bytes)),
        load_budget_us: options.kv_load_budget_ms * 1_000,
        tiers,
    })
}

/// Everything that says what the bytes of a block mean. Keys lie transposed on the CPU alone.
fn layout_id(layout: &KvLayout, target: &Target) -> LayoutId {
    let KvLayout { num_layers, num_blocks: _, block_tokens, num_kv_heads, head_dim, dtype } = layout;
    let sizes = format!("{num_layers} layers {num_kv_heads} heads of {head_dim} block {block_tokens} {}", dtype.name());
    let of_device = match target {
        Target::Cpu => "",
        Target::Cuda(_) => " cuda",
    };
    LayoutId(Sha256::digest(format!("ns-llm KV layout v{KV_LAYOUT_VERSION} {sizes}{of_device}")).into())
}

/// Longest input that is turned into a vector, tokens. A decoder has others to serve beside.
pub(crate) fn max_embedding_tokens(config: &ModelConfig, sentence: &SentenceConfig, plan: &MemoryPlan) -> usize {
    let limit = if config.architecture.can_generate() { MAX_DECODER_EMBEDDING_TOKENS } else { usize::MAX };
    plan.context_tokens.min(limit).min(sentence.max_seq_length.unwrap_or(usize::MAX))
}

/// The mean of all states, unless the folder says otherwise.
fn pooling(sentence: &SentenceConfig) -> Pooling {
    match sentence.pooling.unwrap_or(PoolingMode::MeanTokens) {
        PoolingMode::MeanTokens => Pooling::Mean,
        PoolingMode::ClsToken => Pooling::First,
        PoolingMode::LastToken => Pooling::Last,
    }
}

/// Blocks of one layer for the sequences of a step that encodes: for its tokens, and for what each sequence leaves empty of
/// its last block. What is never written takes no memory.
fn encode_kv_layout(options: &EngineOptions, layout: &KvLayout, max_embedding_tokens: usize) -> KvLayout {
    let max_step_tokens = options.prefill_budget_tokens.max(options.mixed_budget_tokens).max(max_embedding_tokens);
    let num_blocks = max_step_tokens.div_ceil(layout.block_tokens) + MAX_ENCODE_STEP_SEQUENCES;
    KvLayout { num_layers: 1, num_blocks, ..*layout }
}

fn scheduler_config(
    options: &EngineOptions,
    plan: &MemoryPlan,
    max_encode_tokens: usize,
    max_in_flight: usize,
) -> SchedulerConfig {
    SchedulerConfig {
        max_encode_tokens,
        max_running_sequences: options.max_running_sequences,
        prefill_budget_tokens: options.prefill_budget_tokens,
        mixed_budget_tokens: options.mixed_budget_tokens,
        max_waiting_requests: options.max_waiting_requests,
        max_waiting_tokens: MAX_WAITING_TOKENS,
        max_in_flight,
        ..SchedulerConfig::new(plan.context_tokens)
    }
}

/// What the contents of a block depend on. A block that was rounded on its way is another one, and so is what was computed
/// from it.
fn kv_identity(
    fingerprint: [u8; 32],
    weights: WeightFormat,
    layout: &KvLayout,
    encoding: KvTierEncoding,
    numerics: &str,
) -> KvIdentity {
    let kept = match encoding {
        KvTierEncoding::AsComputed => String::new(),
        rounded => format!(" kept as {} v{INT8_BLOCKS_VERSION}", rounded.name()),
    };
    KvIdentity {
        fingerprint,
        kv_layout: format!("v{KV_LAYOUT_VERSION} {} block {}{kept}", layout.dtype.name(), layout.block_tokens),
        numerics_id: format!("{numerics} weights {}", weights.name()),
        adapter: String::new(),
    }
}

/// What the engine's answers depend on: what KV does, the text that goes in and comes out, and how tokens are drawn and
/// answers are cut, which another version of this engine may do otherwise.
fn answer_identity(identity: &KvIdentity, context_tokens: usize, text_fingerprint: &[u8; 32]) -> [u8; 32] {
    let version = env!("CARGO_PKG_VERSION");
    let answers = format!("answers of {version} {identity:?} within {context_tokens} text {text_fingerprint:?}");
    Sha256::digest(answers).into()
}

/// Tokenizer and chat template, byte for byte.
fn text_fingerprint(tokenizer_json: &[u8], config: &TokenizerConfig) -> [u8; 32] {
    let mut hash = Sha256::new();
    for part in [tokenizer_json, format!("{config:?}").as_bytes()] {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hash.finalize().into()
}

/// Last component of the path as the caller gave it, links resolved.
pub(crate) fn model_name(path: &Path) -> String {
    let real = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    real.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An engine that is not completed takes its worker with it, which holds the model and nobody else could end.
    #[test]
    fn worker_of_an_incomplete_engine_ends() {
        let (model, (commands, taken)) = (Arc::new(()), channel());
        let held = model.clone();
        let thread = spawn("ns-llm-worker", move || {
            while let Ok(command) = taken.recv() {
                if matches!(command, Command::Close) {
                    break;
                }
            }
            drop(held);
        });
        // Another way to the worker stays open, as that of the tiers' threads does.
        let _other = commands.clone();
        drop(StartedWorker::new(commands, thread.expect("starts")));
        assert_eq!(Arc::strong_count(&model), 1, "it has ended");
    }

    /// Blocks of one element type are never found under the keys of another, and a smaller type has more blocks in the
    /// same bytes.
    #[test]
    fn each_kv_dtype_has_its_own_block_keys() {
        let mut options = EngineOptions::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo")).threads(1);
        options.kv_bytes = Some(32 << 20);
        let files = ModelFiles::open(&options).expect("the model that ships");
        let mut seen = Vec::new();
        for dtype in [None, Some(KvDtype::F32), Some(KvDtype::Bf16), Some(KvDtype::Int8)] {
            options.kv_dtype = dtype;
            let WeightLevel { wanted, layout, plan, .. } = plan_memory(&options, &files, &Target::Cpu).expect("fits");
            assert_eq!(layout.dtype, dtype.unwrap_or(KvDtype::F16));
            seen.push((
                kv_identity([0; 32], wanted, &layout, KvTierEncoding::AsComputed, "cpu").kv_layout,
                plan.num_blocks,
            ));
        }
        let mut names: Vec<_> = seen.iter().map(|(name, _)| name).collect();
        names.dedup();
        assert_eq!(names.len(), 4, "{seen:?}");
        let blocks: Vec<_> = seen.iter().map(|&(_, blocks)| blocks).collect();
        assert!(blocks[1] * 2 == blocks[0] && blocks[2] == blocks[0], "{seen:?}");
        assert!(blocks[3] * 10 > blocks[0] * 18 && blocks[3] < blocks[0] * 2, "{seen:?}");
    }
}
