//! The options of a model that every command has, and opening it.

use std::io::IsTerminal;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use ns_llm::{Device, Engine, EngineOptions, KvDtype, Result, ThreadPriority, WeightFormat};

/// Which model, and how to run it.
#[derive(Args, Clone)]
pub(crate) struct ModelOptions {
    /// Folder of the model, or its .gguf file
    #[arg(long, value_name = "PATH", default_value = "models/demo")]
    pub(crate) model: PathBuf,
    /// Compute threads (default: all cores; one is left to the system when there are more than two)
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<usize>,
    /// Where to compute
    #[arg(long, value_enum, default_value_t)]
    pub(crate) device: DeviceName,
    /// Form in which weights are kept
    #[arg(long, value_enum, default_value_t)]
    pub(crate) weights: WeightsName,
    /// Form in which keys and values are kept (auto: f32 with f32 weights, else f16)
    #[arg(long, value_enum, default_value_t)]
    pub(crate) kv_dtype: KvDtypeName,
    /// Longest sequence, prompt and answer (tokens)
    #[arg(long, value_name = "TOKENS")]
    pub(crate) context: Option<usize>,
    /// Size of the KV pool (MiB)
    #[arg(long, value_name = "MIB")]
    pub(crate) kv_mib: Option<u64>,
}

#[derive(Clone, Copy, Default, ValueEnum)]
pub(crate) enum DeviceName {
    #[default]
    Auto,
    Cpu,
    Cuda,
}

#[derive(Clone, Copy, Default, ValueEnum)]
pub(crate) enum WeightsName {
    #[default]
    Auto,
    F32,
    Bf16,
    F16,
}

#[derive(Clone, Copy, Default, ValueEnum)]
pub(crate) enum KvDtypeName {
    #[default]
    Auto,
    F32,
    F16,
    Bf16,
    Int8,
}

impl ModelOptions {
    /// The engine's options; a command may change them before [`open`].
    pub(crate) fn engine_options(&self) -> EngineOptions {
        let mut options = EngineOptions::new(&self.model);
        options.threads = self.threads;
        options.thread_priority = ThreadPriority::Normal;
        options.device = match self.device {
            DeviceName::Auto => Device::Auto,
            DeviceName::Cpu => Device::Cpu,
            DeviceName::Cuda => Device::Cuda,
        };
        options.weights = match self.weights {
            WeightsName::Auto => WeightFormat::Auto,
            WeightsName::F32 => WeightFormat::F32,
            WeightsName::Bf16 => WeightFormat::Bf16,
            WeightsName::F16 => WeightFormat::F16,
        };
        options.kv_dtype = match self.kv_dtype {
            KvDtypeName::Auto => None,
            KvDtypeName::F32 => Some(KvDtype::F32),
            KvDtypeName::F16 => Some(KvDtype::F16),
            KvDtypeName::Bf16 => Some(KvDtype::Bf16),
            KvDtypeName::Int8 => Some(KvDtype::Int8),
        };
        options.context_tokens = self.context;
        options.kv_bytes = self.kv_mib.map(|mib| mib << 20);
        options
    }
}

/// Opens a model; shows a bar while it loads when standard error is a terminal.
pub(crate) fn open(mut options: EngineOptions) -> Result<Engine> {
    if !std::io::stderr().is_terminal() {
        return Engine::open(options);
    }
    let bar = ProgressBar::new(0).with_style(
        ProgressStyle::with_template("loading {bar:30} {bytes}/{total_bytes} {bytes_per_sec}")
            .expect("the template is constant"),
    );
    let shown = bar.clone();
    options.on_progress = Some(Box::new(move |progress| {
        shown.set_length(progress.total_bytes);
        shown.set_position(progress.loaded_bytes);
        true
    }));
    let engine = Engine::open(options);
    bar.finish_and_clear();
    engine
}

/// Opens a model with the options as they are.
pub(crate) fn open_default(options: &ModelOptions) -> Result<Engine> {
    open(options.engine_options())
}
