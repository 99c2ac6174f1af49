//! From a path to a loaded model, and to a running engine ([`start`]): the only place where a model's files
//! (`model_files.rs`), its architecture and a backend meet.

mod identity;
mod storage;
mod threads;

use std::sync::Arc;
use std::time::Instant;

use ns_llm_kernels::host;
use ns_llm_kernels::{cpu, cuda};

use crate::backend::cpu::{CpuBackend, CpuBackendOptions};
use crate::backend::cuda::CudaBackend;
use crate::backend::{Backend, KvLayout, Pooling};
use crate::config::{
    EngineOptions, KvTierEncoding, LoadProgress, MAX_ENCODE_STEP_SEQUENCES, MAX_THREADS, MAX_WAITING_TOKENS,
};
use crate::device::{self, CudaDevices, MachineDevices, Place, Target};
use crate::error::Result;
use crate::executor::{Executor, ModelExecutor};
use crate::kv_cache::tiers::TierStore;
use crate::kv_cache::{KvCache, KvCacheConfig};
use crate::loader::{GenerationConfig, PoolingMode, SentenceConfig};
use crate::memory_plan::{MemoryPlan, StoredBlocks};
use crate::model;
use crate::model::config::ModelConfig;
use crate::model_files::{ModelFiles, ModelText, PendingText, model_name};
use crate::request::SamplingDefaults;
use crate::response_tiers::AnswerStore;
use crate::scheduler::{Scheduler, SchedulerConfig};
use crate::stats::ModelInfo;
use crate::text_model::TextModel;
use crate::weight_levels::{WeightLevel, encode_kv_dtype, memory_limit_bytes, plan_memory, step_limits};
use identity::Identity;
use storage::Stores;
pub(crate) use threads::start;

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

/// Loads a model on the calling thread, where `options` say.
pub fn load(options: EngineOptions) -> Result<Loaded> {
    load_among(options, &MachineDevices)
}

/// Loads a model as [`load`] does, with these CUDA devices in the place of the machine's.
pub fn load_among(options: EngineOptions, devices: &dyn CudaDevices) -> Result<Loaded> {
    let start = Instant::now();
    let (files, text) = ModelFiles::open(&options)?;
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
            let numerics = format!("cpu {isa} v{}", cpu::NUMERICS_VERSION);
            let compute = Compute { backend, weights_bytes, isa, threads, numerics };
            load_on(options, (files, text), level, &place, compute, start)
        }
        Target::Cuda(cuda) => {
            let backend = CudaBackend::new(cuda.driver.clone(), cuda.name(), level.wanted);
            let (architecture, weights_bytes) = (cuda.architecture(), CudaBackend::weights_bytes);
            // The form of a product shows in no bit, so that it is no part of this.
            let numerics = format!("cuda {architecture} v{}", cuda::NUMERICS_VERSION);
            let isa = if backend.has_warpgroups() { "sm_90a" } else { architecture };
            let compute = Compute { backend, weights_bytes, isa, threads: 0, numerics };
            load_on(options, (files, text), level, &place, compute, start)
        }
    }
}

/// All cores, but one is left to the host program where there are more than two.
fn default_threads() -> usize {
    match host::usable_cores() {
        cores @ ..=2 => cores.max(1),
        cores => (cores - 1).min(MAX_THREADS),
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
    (files, mut text): (ModelFiles, PendingText),
    level: WeightLevel,
    place: &Place,
    compute: Compute<B>,
    start: Instant,
) -> Result<Loaded> {
    let Compute { mut backend, weights_bytes, isa, threads, numerics } = compute;
    let WeightLevel { layout, mut plan, .. } = level;
    if !files.config.architecture.can_generate() {
        storage::keep_nothing(&mut options)?;
    }
    let max_embedding_tokens = files.max_embedding_tokens(plan.context_tokens);
    let stored = StoredBlocks::new(&options, &layout, B::int8_blocks(layout)?);
    let identity = Identity::new(&options, &files, &level, &stored, numerics, threads.max(1))?;
    let mut stores = Stores::open(&options, stored.block_bytes, identity.answers)?;
    let answer_stores = std::mem::take(&mut stores.answers);
    let kv_disk_refusal = stores.disk_refusal().map(str::to_string);
    let mut on_progress = options.on_progress.take().unwrap_or_else(|| Box::new(|_: LoadProgress| true));
    let ModelFiles { config, generation, sentence, eos_token_ids, weights, .. } = files;
    let mut go_on = |progress| text.check().is_ok() && on_progress(progress);
    let loaded = model::load(&backend, weights, &config, plan.context_tokens, &mut go_on);
    text.check()?;
    let loaded = loaded?;
    debug_assert_eq!(plan.weights_bytes, weights_bytes(&backend), "the plan of {}", options.model.display());
    plan.weights_bytes = weights_bytes(&backend);
    let kv = backend.allocate_kv(layout)?;
    let ModelText { tokenizer, chat_template } = text.finish()?;
    let text = Arc::new(TextModel {
        tokenizer,
        chat_template,
        sampling_defaults: sampling_defaults(&generation),
        eos_token_ids,
        vocab_size: config.vocab_size,
        context_tokens: plan.context_tokens,
        max_embedding_tokens,
        embedding_dimensions: config.hidden_size,
        identity: identity.answers,
    });
    let num_parameters = loaded.num_parameters;
    let (encoding, isa_and_threads) = (stored.encoding(), (isa, threads));
    let run = Run { place, level, encoding, kv_disk_refusal, isa_and_threads, num_parameters, start };
    let info = model_info(&options, &config, &text, run);
    let encode_layout = KvLayout { dtype: encode_kv_dtype(layout.dtype, level.format), ..layout };
    let encode_kv = encode_kv_layout(&options, &encode_layout, max_embedding_tokens);
    if config.architecture.can_generate() {
        backend.prepare(&step_limits(&options, &config, text.context_tokens))?;
    }
    let executor = ModelExecutor::new(backend, loaded.model, kv, encode_kv, pooling(&sentence))?;
    let executor = executor.written_as(stored.int8);
    let mut scheduler = Scheduler::new(
        scheduler_config(&options, &plan, max_embedding_tokens, executor.max_in_flight()),
        KvCache::new(KvCacheConfig {
            num_blocks: plan.num_blocks,
            block_tokens: options.block_tokens,
            identity: identity.kv,
            prefix_cache: options.prefix_cache,
            owner_share: options.kv_namespace_share,
            tiers: storage::tiers_config(&options, &stored, &place.target),
        }),
    );
    let tier_stores = stores.attach(&options, scheduler.tiers());
    Ok(Loaded { executor: Box::new(executor), scheduler, tier_stores, answer_stores, text, info, plan })
}

/// How a model was loaded: what is said of an engine beside what its files say.
struct Run<'a> {
    place: &'a Place,
    level: WeightLevel,
    encoding: KvTierEncoding,
    kv_disk_refusal: Option<String>,
    isa_and_threads: (&'static str, usize),
    num_parameters: u64,
    /// When loading began.
    start: Instant,
}

fn model_info(options: &EngineOptions, config: &ModelConfig, text: &TextModel, run: Run<'_>) -> ModelInfo {
    let Run { place, level, encoding, kv_disk_refusal, isa_and_threads: (isa, threads), num_parameters, start } = run;
    ModelInfo {
        name: model_name(&options.model),
        architecture: config.architecture.name().to_string(),
        num_parameters,
        num_layer_parameters: config.num_layer_parameters(),
        vocab_size: config.vocab_size,
        context_tokens: text.context_tokens,
        can_generate: config.architecture.can_generate(),
        embedding_dimensions: config.hidden_size,
        max_embedding_tokens: text.max_embedding_tokens,
        has_chat_template: text.chat_template.is_some(),
        weights: level.format.name(),
        kv_dtype: level.layout.dtype.name(),
        kv_tier_encoding: encoding.name(),
        kv_disk_refusal,
        device: place.target.kind(),
        device_name: place.target.name(),
        device_reason: place.reason.clone(),
        isa,
        threads,
        load_ms: start.elapsed().as_secs_f64() * 1e3,
    }
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
