//! `/api/gpu/*`: which GPUs are in this machine, and where a request would be computed. Devices are looked at when they
//! are asked for; a machine without any is a normal case. Sizes are MiB.

use std::sync::Arc;

use axum::Extension;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{Response, Uri};
use ns_llm::{Gpu, GpuVendor};
use serde::Serialize;
use serde_json::{Value, json};

use crate::app::App;
use crate::clock::unix_millis;
use crate::error::PlainResult;
use crate::fields::Fields;
use crate::gpu_watch::mean_utilization;
use crate::keys::Caller;
use crate::ns_node::cluster;
use crate::ns_node::machine::{load_average, memory, processor};
use crate::query;
use crate::response::json_response;

/// Change of utilization that makes a trend, points of percent.
const TREND_POINTS: f64 = 10.0;
const MEBIBYTE: u64 = 1 << 20;

/// `GET /api/gpu/status`.
pub(crate) async fn status(State(app): State<Arc<App>>) -> PlainResult {
    let gpus = app.gpus.look(&app).await;
    let capabilities = capabilities(&app, &gpus);
    let now = unix_millis();
    let current = (!gpus.is_empty()).then(|| {
        json!({
            "vendor": capabilities.vendor,
            "deviceCount": capabilities.device_count,
            "totalVram": capabilities.total_vram,
            "devices": gpus.iter().map(device).collect::<Vec<_>>(),
            "timestamp": now,
        })
    });
    let (model, cores) = processor();
    Ok(json_response(&json!({
        "capabilities": capabilities,
        "current": current,
        "lastUpdate": (!gpus.is_empty()).then_some(now),
        "cpuInfo": { "model": model, "cores": cores, "loadAverage": load_average() },
    })))
}

/// `POST /api/gpu/can-handle`: the least busy GPU with room, when an engine computes on GPUs at all; else the processor.
pub(crate) async fn can_handle(State(app): State<Arc<App>>, body: Bytes) -> PlainResult {
    let mut fields = if body.is_empty() { Fields::default() } else { Fields::parse(&body)? };
    let required = fields.number("requiredVram")?.map_or(0, |mebibytes| mebibytes.max(0.0) as u64);
    drop((fields, body));
    let gpus = app.gpus.look(&app).await;
    let has_gpu_engine = app.models.iter().any(|model| model.engine.info().device != "cpu");
    Ok(json_response(&placement(required, &gpus, has_gpu_engine, memory().total / MEBIBYTE)))
}

fn placement(required: u64, gpus: &[Gpu], has_gpu_engine: bool, memory_mib: u64) -> Value {
    let usable = if has_gpu_engine { gpus } else { &[] };
    let with_room = usable.iter().filter(|gpu| free_mib(gpu) >= required);
    let busy = |gpu: &Gpu| gpu.utilization_percent.unwrap_or(0.0);
    if let Some(best) = with_room.min_by(|a, b| busy(a).total_cmp(&busy(b)).then(free_mib(b).cmp(&free_mib(a)))) {
        let (available, utilization) = (free_mib(best), busy(best));
        return json!({ "capable": true, "device": "gpu", "deviceIndex": best.index, "availableVram": available, "utilization": utilization });
    }
    if required > memory_mib {
        let reason = format!("{required} MiB are needed, the machine has {memory_mib} MiB");
        return json!({ "capable": false, "device": null, "reason": reason });
    }
    let reason = match (gpus.is_empty(), usable.iter().map(free_mib).max()) {
        (true, _) => "no GPU is there".to_string(),
        (false, None) => "no engine of this server computes on a GPU".to_string(),
        (false, Some(most)) => format!("{required} MiB are needed, the GPU with most room has {most} MiB"),
    };
    json!({ "capable": true, "device": "cpu", "reason": reason })
}

/// `GET /api/gpu/utilization?minutes=`: over the looks of the last minutes.
pub(crate) async fn utilization(State(app): State<Arc<App>>, uri: Uri) -> PlainResult {
    app.gpus.look(&app).await;
    let minutes = query::number(&uri, "minutes").unwrap_or(5.0);
    let samples = app.gpus.utilization_since(unix_millis().saturating_sub((minutes * 60_000.0) as u64));
    Ok(json_response(&trend(&samples)))
}

fn trend(samples: &[f64]) -> Value {
    if samples.is_empty() {
        return json!({ "trend": "unknown", "average": 0, "samples": 0 });
    }
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    let quarter = samples.len() / 4;
    let change = match quarter {
        0 => 0.0,
        quarter => mean(&samples[samples.len() - quarter..]) - mean(&samples[..quarter]),
    };
    let trend = match change {
        change if change > TREND_POINTS => "increasing",
        change if change < -TREND_POINTS => "decreasing",
        _ => "stable",
    };
    json!({ "trend": trend, "average": mean(samples), "samples": samples.len(), "change": change })
}

/// `GET /api/gpu/metadata`: what a node tells its peers.
pub(crate) async fn metadata(State(app): State<Arc<App>>, Extension(caller): Extension<Caller>) -> PlainResult {
    let gpus = app.gpus.look(&app).await;
    let capabilities = capabilities(&app, &gpus);
    let (model, cores) = processor();
    let mut metadata = cluster::view(&app, caller.name());
    metadata["gpu"] = json!({
            "available": capabilities.has_gpu,
            "vendor": capabilities.vendor,
            "deviceCount": capabilities.device_count,
            "totalVram": capabilities.total_vram,
            "computeCapability": capabilities.compute_capability,
            "currentLoad": mean_utilization(&gpus),
    });
    metadata["cpu"] = json!({ "model": model, "cores": cores, "loadAverage": load_average()[0] });
    Ok(json_response(&metadata))
}

/// `GET /api/gpu/peers`: this server knows none.
pub(crate) async fn peers() -> Response<Body> {
    json_response(&json!({ "peers": [], "count": 0 }))
}

/// What the devices of the machine are, and on which kinds of them engines compute.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Capabilities {
    has_gpu: bool,
    vendor: &'static str,
    device_count: usize,
    total_vram: u64,
    compute_capability: Option<String>,
    providers: Vec<&'static str>,
}

fn capabilities(app: &App, gpus: &[Gpu]) -> Capabilities {
    let vendor = match gpus.first().map(|gpu| gpu.vendor) {
        Some(GpuVendor::Nvidia) => "nvidia",
        Some(GpuVendor::Amd) => "amd",
        None => "none",
    };
    let mut providers: Vec<&'static str> = app.models.iter().map(|model| model.engine.info().device).collect();
    providers.retain(|device| *device != "cpu");
    providers.sort_unstable();
    providers.dedup();
    providers.push("cpu");
    Capabilities {
        has_gpu: !gpus.is_empty(),
        vendor,
        device_count: gpus.len(),
        total_vram: gpus.iter().map(|gpu| mib(gpu.memory_total_bytes)).sum(),
        compute_capability: gpus.first().and_then(capability),
        providers,
    }
}

/// A value that a device does not tell is 0.
fn device(gpu: &Gpu) -> Value {
    json!({
        "index": gpu.index,
        "name": gpu.name,
        "memoryTotal": mib(gpu.memory_total_bytes),
        "memoryUsed": mib(gpu.memory_used_bytes),
        "memoryFree": free_mib(gpu),
        "utilization": gpu.utilization_percent.unwrap_or(0.0),
        "temperature": gpu.temperature_celsius.unwrap_or(0.0),
        "powerDraw": gpu.power_watts.unwrap_or(0.0),
        "computeCapability": capability(gpu),
    })
}

fn capability(gpu: &Gpu) -> Option<String> {
    gpu.compute_capability.map(|(major, minor)| format!("{major}.{minor}"))
}

fn mib(bytes: Option<u64>) -> u64 {
    bytes.unwrap_or(0) / MEBIBYTE
}

fn free_mib(gpu: &Gpu) -> u64 {
    mib(gpu.memory_total_bytes).saturating_sub(mib(gpu.memory_used_bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpu(index: usize, total_mib: u64, used_mib: u64, utilization: f64) -> Gpu {
        Gpu {
            vendor: GpuVendor::Nvidia,
            index,
            name: "a device".to_string(),
            memory_total_bytes: Some(total_mib * MEBIBYTE),
            memory_used_bytes: Some(used_mib * MEBIBYTE),
            utilization_percent: Some(utilization),
            temperature_celsius: None,
            power_watts: None,
            compute_capability: Some((8, 6)),
        }
    }

    /// The least busy device with room, if an engine uses devices; else the processor, with the reason; or nothing.
    #[test]
    fn requests_find_their_device() {
        let gpus = [gpu(0, 8192, 8000, 1.0), gpu(1, 8192, 2048, 50.0), gpu(2, 8192, 2048, 15.0)];
        let on_gpu = placement(2048, &gpus, true, 16_000);
        assert_eq!((&on_gpu["deviceIndex"], &on_gpu["availableVram"]), (&json!(2), &json!(6144)));
        for (required, gpus, has_gpu_engine, reason) in [
            (2048, &gpus[..0], true, "no GPU"),
            (2048, &gpus[..], false, "no engine"),
            (9000, &gpus[..], true, "6144 MiB"),
        ] {
            let on_cpu = placement(required, gpus, has_gpu_engine, 16_000);
            assert_eq!((&on_cpu["capable"], &on_cpu["device"]), (&json!(true), &json!("cpu")));
            assert!(on_cpu["reason"].as_str().is_some_and(|text| text.contains(reason)), "{on_cpu}");
        }
        assert_eq!(placement(20_000, &gpus, true, 16_000)["capable"], false);
        assert_eq!(device(&gpus[2])["temperature"], 0.0);
    }

    /// A trend is the difference between the first and the last quarter.
    #[test]
    fn trends_are_told() {
        assert_eq!(trend(&[])["trend"], "unknown");
        assert_eq!(trend(&[10.0, 10.0, 50.0, 50.0])["trend"], "increasing");
        assert_eq!(trend(&[50.0, 10.0, 10.0, 10.0])["trend"], "decreasing");
        assert_eq!(
            (&trend(&[50.0, 55.0])["trend"], &trend(&[50.0, 55.0])["average"]),
            (&json!("stable"), &json!(52.5))
        );
    }
}
