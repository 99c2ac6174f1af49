//! The machine's GPUs as JavaScript sees them, and the engine's limits that it must know. GPUs are asked for on a thread
//! of its own: a driver may take seconds.

use napi::Env;
use napi::bindgen_prelude::PromiseRaw;
use napi_derive::napi;
use ns_llm::config::{DEFAULT_BLOCK_TOKENS, DEFAULT_MAX_TOKENS, MAX_TIMEOUT_MS};
use ns_llm::{Gpu, GpuVendor};

use crate::error::{Result, from_napi};
use crate::event_loop::promise;
use crate::offload::on_own_thread;

/// One GPU of this machine, at one moment. What a device does not tell is not there.
#[napi(object, object_from_js = false)]
pub struct NativeGpu {
    /// Who made it: "nvidia" or "amd".
    pub vendor: String,
    /// Its number among the devices of the list.
    pub index: f64,
    /// As the driver calls it.
    pub name: String,
    /// Memory of the device.
    pub memory_total_bytes: Option<f64>,
    /// The part of it that is in use, by whichever process.
    pub memory_used_bytes: Option<f64>,
    /// Share of the time in which it computed, 0 to 100.
    pub utilization_percent: Option<f64>,
    /// Temperature of the chip.
    pub temperature_celsius: Option<f64>,
    /// Power that it draws.
    pub power_watts: Option<f64>,
    /// CUDA compute capability, such as "8.6".
    pub compute_capability: Option<String>,
}

impl From<Gpu> for NativeGpu {
    fn from(gpu: Gpu) -> Self {
        let vendor = match gpu.vendor {
            GpuVendor::Nvidia => "nvidia",
            GpuVendor::Amd => "amd",
        };
        NativeGpu {
            vendor: vendor.into(),
            index: gpu.index as f64,
            name: gpu.name,
            memory_total_bytes: gpu.memory_total_bytes.map(|bytes| bytes as f64),
            memory_used_bytes: gpu.memory_used_bytes.map(|bytes| bytes as f64),
            utilization_percent: gpu.utilization_percent,
            temperature_celsius: gpu.temperature_celsius,
            power_watts: gpu.power_watts,
            compute_capability: gpu.compute_capability.map(|(major, minor)| format!("{major}.{minor}")),
        }
    }
}

/// Limits and defaults of the engine that JavaScript's own checks must agree with.
#[napi(object, object_from_js = false)]
pub struct NativeLimits {
    /// New tokens when a request does not say.
    pub default_max_tokens: u32,
    /// Tokens in a KV block when the options do not say.
    pub default_block_tokens: u32,
    /// Longest timeout of a request, milliseconds.
    pub max_timeout_ms: f64,
}

/// What the machine has, if anything, and what any engine on it keeps to.
#[napi]
pub struct NativeHost;

#[napi]
impl NativeHost {
    /// Limits and defaults.
    #[napi(catch_unwind)]
    pub fn limits() -> NativeLimits {
        NativeLimits {
            default_max_tokens: DEFAULT_MAX_TOKENS as u32,
            default_block_tokens: DEFAULT_BLOCK_TOKENS as u32,
            max_timeout_ms: MAX_TIMEOUT_MS as f64,
        }
    }

    /// The GPUs of this machine, NVIDIA's first.
    #[napi(catch_unwind)]
    pub fn gpus(env: &Env) -> Result<PromiseRaw<'_, Vec<NativeGpu>>> {
        let pending = on_own_thread("ns-llm-gpus", || Ok(ns_llm::gpus().into_iter().map(NativeGpu::from).collect()));
        promise(env, move |_, cx| pending.poll(cx)).map_err(from_napi)
    }
}
