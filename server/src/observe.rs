//! `GET /health`, `/ready` and `/metrics`: for those who watch the server.

use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use axum::body::Body;
use axum::extract::State;
use axum::http::{Response, StatusCode};
use ns_llm::{CudaGraphStats, Gpu, Histogram, Histograms, KvTierStats, ResponseCacheStats, Stats};
use serde_json::json;

use crate::app::{App, Served};
use crate::gpu_watch::mean_utilization;
use crate::metrics::ModelMetrics;
use crate::response::{json_with_status, typed};

/// The `Content-Type` of [`metrics`].
const PROMETHEUS_CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Whether the process does what it is for, or should be started anew: an engine that has ended does not come back.
pub(crate) async fn health(State(app): State<Arc<App>>) -> Response<Body> {
    let is_healthy = app.models.iter().all(|model| model.engine.health().is_ok());
    let (status, word) = match is_healthy {
        true => (StatusCode::OK, "ok"),
        false => (StatusCode::SERVICE_UNAVAILABLE, "unhealthy"),
    };
    json_with_status(status, &json!({ "status": word, "uptime_seconds": app.started.elapsed().as_secs() }))
}

/// Whether new requests should be sent here, and if not, why: engines, their last step, the queue, the device.
pub(crate) async fn ready(State(app): State<Arc<App>>) -> Response<Body> {
    let now = Instant::now();
    let (running, waiting) = app.admission.counts();
    let mut reason = None;
    let mut models = Vec::new();
    for model in &app.models {
        let trouble = model.trouble(now);
        reason = reason.or(trouble);
        let stats = model.engine.stats();
        models.push(json!({
            "id": model.name,
            "device": model.engine.info().device,
            "ready": trouble.is_none(),
            "reason": trouble,
            "steps_total": stats.steps_total,
            "sequences_running": stats.num_sequences_running,
            "sequences_waiting": stats.num_sequences_waiting,
            "requests_preparing": stats.num_requests_preparing,
        }));
    }
    if waiting >= app.options.max_waiting_requests && waiting > 0 {
        reason = reason.or(Some("the queue of requests is full"));
    }
    if app.is_stopping() {
        reason = Some("the server is stopping");
    }
    let status = if reason.is_none() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let queue = json!({ "running": running, "waiting": waiting, "max_waiting": app.options.max_waiting_requests });
    json_with_status(status, &json!({ "ready": reason.is_none(), "reason": reason, "queue": queue, "models": models }))
}

type Family = (&'static str, &'static str, &'static str, fn(&Stats) -> f64);

/// Of each model: its engine's own counts.
const OF_ENGINES: &[Family] = &[
    // vLLM's names; it counts sequences, too.
    ("num_requests_running", "gauge", "Sequences that are being computed.", |s| s.num_sequences_running as f64),
    ("num_requests_waiting", "gauge", "Sequences that wait.", |s| s.num_sequences_waiting as f64),
    ("num_requests_preparing", "gauge", "Requests that are being rendered and tokenized, or next to be.", |s| {
        s.num_requests_preparing as f64
    }),
    ("kv_cache_usage_perc", "gauge", "Share of the KV blocks that live sequences hold, 0 to 1.", kv_usage),
    ("prompt_tokens_total", "counter", "Prompt tokens of admitted requests.", |s| s.prompt_tokens_total as f64),
    ("generation_tokens_total", "counter", "Tokens produced.", |s| s.generation_tokens_total as f64),
    ("prefix_cache_queries_total", "counter", "Prompt tokens that were looked for in the prefix cache.", |s| {
        s.prefix_cache_queries_total as f64
    }),
    ("prefix_cache_hits_total", "counter", "Prompt tokens that were found there.", |s| {
        s.prefix_cache_hits_total as f64
    }),
    ("num_preemptions_total", "counter", "Sequences that lost their blocks and were computed again.", |s| {
        s.preemptions_total as f64
    }),
    ("iterations_total", "counter", "Steps run.", |s| s.steps_total as f64),
    ("embedding_tokens_total", "counter", "Tokens of inputs that were turned into vectors.", |s| {
        s.embedding_tokens_total as f64
    }),
];

/// A name, a kind, what it says, and the count of it in one set of statistics.
type CountFamily<S> = (&'static str, &'static str, &'static str, fn(&S) -> u64);

/// Of each tier of each model's prefix cache.
const OF_TIERS: &[CountFamily<KvTierStats>] = &[
    ("kv_tier_blocks", "gauge", "KV blocks in a tier beside the pool.", |t| t.blocks),
    ("kv_tier_bytes", "gauge", "Bytes of them.", |t| t.bytes),
    ("kv_tier_hits_total", "counter", "Blocks that it was asked for and had.", |t| t.hits),
    ("kv_tier_misses_total", "counter", "Blocks that it was asked for and had not.", |t| t.misses),
    ("kv_tier_stores_total", "counter", "Blocks taken in.", |t| t.stored),
    ("kv_tier_evictions_total", "counter", "Blocks given up for others.", |t| t.evictions),
    ("kv_tier_faults_total", "counter", "Calls that failed, damaged blocks included.", |t| t.faults),
];

type PlacesFamily = (&'static str, &'static str, &'static str, fn(&ResponseCacheStats) -> Vec<(&'static str, u64)>);

/// Of each model's response cache, by the place where answers lie.
const OF_RESPONSES_BY_TIER: &[PlacesFamily] = &[
    ("response_cache_hits_total", "counter", "Look-ups that found an answer or a value.", |r| {
        vec![("memory", r.hits), ("disk", r.disk_hits), ("remote", r.remote_hits)]
    }),
    ("response_cache_entries", "gauge", "Entries held.", |r| vec![("memory", r.entries), ("disk", r.disk_entries)]),
    ("response_cache_bytes", "gauge", "Bytes of them.", |r| vec![("memory", r.bytes), ("disk", r.disk_bytes)]),
];

/// Of each model's response cache.
const OF_RESPONSES: &[CountFamily<ResponseCacheStats>] = &[
    ("response_cache_misses_total", "counter", "Look-ups that found nothing anywhere.", found_nowhere),
    ("response_cache_stores_total", "counter", "Entries stored.", |r| r.stores),
    ("response_cache_evictions_total", "counter", "Entries given up for want of room.", |r| r.evictions),
    ("response_cache_max_bytes", "gauge", "Bytes that it may hold in memory; 0: it is off.", |r| r.max_bytes),
    ("response_cache_faults_total", "counter", "Calls to disk and remote store that failed.", |r| r.tier_faults),
];

/// What another place had was a miss of memory.
pub(crate) fn found_nowhere(stats: &ResponseCacheStats) -> u64 {
    stats.misses.saturating_sub(stats.disk_hits + stats.remote_hits)
}

type HistogramFamily = (&'static str, &'static str, fn(&Histograms) -> &Histogram);

/// Of each model: times and sizes, with the buckets that vLLM has.
const HISTOGRAMS: &[HistogramFamily] = &[
    ("time_to_first_token_seconds", "From a generation's arrival to its first token.", |h| &h.first_token_seconds),
    ("inter_token_latency_seconds", "Between two tokens of a choice.", |h| &h.inter_token_seconds),
    ("request_time_per_output_token_seconds", "The same, a mean of each generation.", |h| &h.per_output_token_seconds),
    ("e2e_request_latency_seconds", "From a generation's arrival to its end.", |h| &h.end_to_end_seconds),
    ("request_queue_time_seconds", "From a generation's arrival to its first step.", |h| &h.queue_seconds),
    ("request_prefill_time_seconds", "From its first step to its first token.", |h| &h.prefill_seconds),
    ("request_decode_time_seconds", "From its first token to its last.", |h| &h.decode_seconds),
    ("request_inference_time_seconds", "From its first step to its last token.", |h| &h.inference_seconds),
    ("request_prompt_tokens", "Tokens of a prompt.", |h| &h.prompt_tokens),
    ("request_generation_tokens", "Tokens of an answer.", |h| &h.generation_tokens),
    ("iteration_tokens_total", "Tokens of a step.", |h| &h.step_tokens),
    ("iteration_time_seconds", "Of a step.", |h| &h.step_seconds),
];

/// Of each model on a CUDA device: its decoding steps as graphs.
const OF_CUDA_GRAPHS: &[CountFamily<CudaGraphStats>] = &[
    ("cuda_graphs_kept", "gauge", "Graphs that are kept.", |g| g.kept),
    ("cuda_graph_captures_total", "counter", "Steps that were captured as a graph.", |g| g.captured),
    ("cuda_graph_launches_total", "counter", "Steps that ran as one.", |g| g.launched),
    ("cuda_graph_evictions_total", "counter", "Graphs that made room for others.", |g| g.evicted),
];

type GpuFamily = (&'static str, &'static str, fn(&Gpu) -> Option<f64>);

/// Of each device of the machine, whoever uses it.
const OF_GPUS: &[GpuFamily] = &[
    ("gpu_memory_total_bytes", "Memory of a device.", |gpu| gpu.memory_total_bytes.map(|bytes| bytes as f64)),
    ("gpu_memory_used_bytes", "The part of it that is in use.", |gpu| gpu.memory_used_bytes.map(|bytes| bytes as f64)),
    ("gpu_utilization_perc", "Share of the time in which it computed, 0 to 1.", |gpu| {
        gpu.utilization_percent.map(|percent| percent / 100.0)
    }),
    ("gpu_temperature_celsius", "Temperature of its chip.", |gpu| gpu.temperature_celsius),
    ("gpu_power_watts", "Power that it draws.", |gpu| gpu.power_watts),
];

/// Everything that is counted, as Prometheus reads it.
pub(crate) async fn metrics(State(app): State<Arc<App>>) -> Response<Body> {
    typed(PROMETHEUS_CONTENT_TYPE, prometheus_text(&app, &app.gpus.look(&app).await))
}

fn prometheus_text(app: &App, gpus: &[Gpu]) -> String {
    let prefix = if app.options.vllm_metric_names { "vllm:" } else { "ns_llm:" };
    let mut text = String::new();
    let labels: Vec<String> =
        app.models.iter().map(|model| format!("model_name=\"{}\"", escaped(&model.name))).collect();
    let stats: Vec<Stats> = app.models.iter().map(|model| model.engine.stats()).collect();
    for (name, kind, help, value) in OF_ENGINES {
        head(&mut text, prefix, name, kind, help);
        for (label, stats) in labels.iter().zip(&stats) {
            line(&mut text, &format!("{prefix}{name}{{{label}}}"), value(stats));
        }
    }
    cache_lines(app, &mut text, prefix, &labels, &stats);
    graph_lines(&mut text, prefix, labels.iter().zip(stats.iter().map(|stats| stats.cuda_graphs.as_ref())));
    let requests: Vec<ModelMetrics> = app.models.iter().map(|model| app.metrics.model(model.idx)).collect();
    head(&mut text, prefix, "request_success_total", "counter", "Choices that ended, by why.");
    for (label, metrics) in labels.iter().zip(&requests) {
        let [stop, length] = metrics.finished;
        let reasons = [("stop", stop), ("length", length), ("abort", metrics.aborted), ("error", metrics.failed)];
        for (reason, count) in reasons {
            let series = format!("{prefix}request_success_total{{{label},finished_reason=\"{reason}\"}}");
            line(&mut text, &series, count as f64);
        }
    }
    for (name, help, histogram) in HISTOGRAMS {
        head(&mut text, prefix, name, "histogram", help);
        for (label, stats) in labels.iter().zip(&stats) {
            histogram_lines(&mut text, &format!("{prefix}{name}"), label, histogram(&stats.histograms));
        }
    }
    head(&mut text, prefix, "cache_config_info", "gauge", "How the KV cache is set up.");
    for ((label, stats), model) in labels.iter().zip(&stats).zip(&app.models) {
        let Served { engine, .. } = model;
        let (blocks, dtype) = (stats.kv_blocks_total, engine.info().kv_dtype);
        let series =
            format!("{prefix}cache_config_info{{{label},num_gpu_blocks=\"{blocks}\",cache_dtype=\"{dtype}\"}}");
        line(&mut text, &series, 1.0);
    }
    let (_, waiting) = app.admission.counts();
    let waiting = waiting + stats.iter().map(|stats| stats.num_sequences_waiting).sum::<usize>();
    let gauges = [
        (
            "request_queue_depth",
            "Requests in the server's line, and sequences in those of the engines.",
            waiting as f64,
        ),
        ("active_requests", "Operations that are going on.", app.metrics.num_active() as f64),
        ("avg_latency_ms", "Mean time of all operations since the start.", app.metrics.average_ms()),
        ("gpu_utilization", "Percent, the mean over all devices; 0 without one.", mean_utilization(gpus)),
    ];
    if let Some(exporter) = &app.exporter {
        let counters = [("sent", &exporter.num_sent), ("dropped", &exporter.num_dropped)];
        head(&mut text, prefix, "otlp_spans_total", "counter", "Spans for the collector, by what became of them.");
        for (outcome, count) in counters {
            let series = format!("{prefix}otlp_spans_total{{outcome=\"{outcome}\"}}");
            line(&mut text, &series, count.load(Ordering::Relaxed) as f64);
        }
    }
    for (name, help, value) in gauges {
        head(&mut text, "", name, "gauge", help);
        line(&mut text, name, value);
    }
    gpu_lines(&mut text, prefix, gpus);
    text
}

/// Of each device what it tells. A machine without one has none of these families.
fn gpu_lines(text: &mut String, prefix: &str, gpus: &[Gpu]) {
    for (name, help, value) in OF_GPUS {
        let told: Vec<(&Gpu, f64)> = gpus.iter().filter_map(|gpu| Some((gpu, value(gpu)?))).collect();
        if !told.is_empty() {
            head(text, prefix, name, "gauge", help);
        }
        for (gpu, value) in told {
            let (index, device) = (gpu.index, escaped(&gpu.name));
            line(text, &format!("{prefix}{name}{{gpu=\"{index}\",gpu_name=\"{device}\"}}"), value);
        }
    }
}

/// Of each model that has graphs, how many. Where none is on a CUDA device there are no such families.
fn graph_lines<'a>(
    text: &mut String,
    prefix: &str,
    models: impl Iterator<Item = (&'a String, Option<&'a CudaGraphStats>)>,
) {
    let told: Vec<(&String, &CudaGraphStats)> = models.filter_map(|(label, graphs)| Some((label, graphs?))).collect();
    for (name, kind, help, value) in OF_CUDA_GRAPHS.iter().filter(|_| !told.is_empty()) {
        head(text, prefix, name, kind, help);
        for (label, graphs) in &told {
            line(text, &format!("{prefix}{name}{{{label}}}"), value(graphs) as f64);
        }
    }
}

/// Prefix cache and response cache, by the places where things lie.
fn cache_lines(app: &App, text: &mut String, prefix: &str, labels: &[String], stats: &[Stats]) {
    let series = |text: &mut String, name: &str, label: &str, tier: &str, value: u64| {
        line(text, &format!("{prefix}{name}{{{label},tier=\"{tier}\"}}"), value as f64);
    };
    head(text, prefix, "cached_tokens_total", "counter", "Prompt tokens that were found, by where they were.");
    for (label, stats) in labels.iter().zip(stats) {
        let hits = stats.prefix_cache_hits_by_tier;
        for (tier, tokens) in [("pool", hits.pool), ("host", hits.host), ("disk", hits.disk), ("remote", hits.remote)] {
            series(text, "cached_tokens_total", label, tier, tokens as u64);
        }
    }
    for (name, kind, help, value) in OF_TIERS {
        head(text, prefix, name, kind, help);
        for (label, tier) in
            labels.iter().zip(stats).flat_map(|(label, stats)| stats.kv_tiers.iter().map(move |tier| (label, tier)))
        {
            series(text, name, label, tier.name, value(tier));
        }
    }
    let responses: Vec<ResponseCacheStats> = app.models.iter().map(|model| model.engine.responses().stats()).collect();
    for (name, kind, help, values) in OF_RESPONSES_BY_TIER {
        head(text, prefix, name, kind, help);
        for (label, stats) in labels.iter().zip(&responses) {
            values(stats).into_iter().for_each(|(tier, value)| series(text, name, label, tier, value));
        }
    }
    for (name, kind, help, value) in OF_RESPONSES {
        head(text, prefix, name, kind, help);
        for (label, stats) in labels.iter().zip(&responses) {
            line(text, &format!("{prefix}{name}{{{label}}}"), value(stats) as f64);
        }
    }
}

fn head(text: &mut String, prefix: &str, name: &str, kind: &str, help: &str) {
    // Writing to a string does not fail.
    let _ = writeln!(text, "# HELP {prefix}{name} {help}\n# TYPE {prefix}{name} {kind}");
}

fn line(text: &mut String, series: &str, value: f64) {
    let _ = writeln!(text, "{series} {value}");
}

fn histogram_lines(text: &mut String, name: &str, label: &str, histogram: &Histogram) {
    let bounds = histogram.bounds.iter().map(f64::to_string).chain(["+Inf".to_string()]);
    let mut total = 0;
    for (bound, count) in bounds.zip(histogram.cumulative()) {
        total = count;
        line(text, &format!("{name}_bucket{{{label},le=\"{bound}\"}}"), count as f64);
    }
    line(text, &format!("{name}_sum{{{label}}}"), histogram.sum);
    line(text, &format!("{name}_count{{{label}}}"), total as f64);
}

fn kv_usage(stats: &Stats) -> f64 {
    if stats.kv_blocks_total == 0 { 0.0 } else { stats.kv_blocks_used as f64 / stats.kv_blocks_total as f64 }
}

fn escaped(label: &str) -> String {
    label.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use ns_llm::GpuVendor;

    use super::*;

    /// Each device has a line for each value that it tells, in base units, with its number and its name; values that it
    /// does not tell, and machines without a device, have none.
    #[test]
    fn devices_have_lines_of_their_own() {
        let full = Gpu {
            vendor: GpuVendor::Nvidia,
            index: 0,
            name: "A \"100\"".to_string(),
            memory_total_bytes: Some(80 << 30),
            memory_used_bytes: Some(1024),
            utilization_percent: Some(50.0),
            temperature_celsius: Some(41.5),
            power_watts: None,
            compute_capability: Some((8, 0)),
        };
        let bare = Gpu { index: 1, memory_used_bytes: None, temperature_celsius: None, ..full.clone() };
        let mut text = String::new();
        gpu_lines(&mut text, "ns_llm:", &[full, bare]);
        let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
        let of = |name: &str, gpu: usize| format!("ns_llm:{name}{{gpu=\"{gpu}\",gpu_name=\"A \\\"100\\\"\"}}");
        let want = [
            format!("{} 85899345920", of("gpu_memory_total_bytes", 0)),
            format!("{} 85899345920", of("gpu_memory_total_bytes", 1)),
            format!("{} 1024", of("gpu_memory_used_bytes", 0)),
            format!("{} 0.5", of("gpu_utilization_perc", 0)),
            format!("{} 0.5", of("gpu_utilization_perc", 1)),
            format!("{} 41.5", of("gpu_temperature_celsius", 0)),
        ];
        assert_eq!(lines, want);
        assert!(!text.contains("power"), "nobody told it:\n{text}");
        let mut none = String::new();
        gpu_lines(&mut none, "ns_llm:", &[]);
        assert_eq!(none, "");
    }

    /// A model on the CPU has no graphs, and says nothing of them.
    #[test]
    fn graphs_are_told_where_there_are_any() {
        let graphs = CudaGraphStats { kept: 3, captured: 5, launched: 400, evicted: 2, refusal: None };
        let labels = ["model_name=\"a\"".to_string(), "model_name=\"b\"".to_string()];
        let mut text = String::new();
        graph_lines(&mut text, "ns_llm:", labels.iter().zip([None, Some(&graphs)]));
        let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
        let want = [
            "ns_llm:cuda_graphs_kept{model_name=\"b\"} 3",
            "ns_llm:cuda_graph_captures_total{model_name=\"b\"} 5",
            "ns_llm:cuda_graph_launches_total{model_name=\"b\"} 400",
            "ns_llm:cuda_graph_evictions_total{model_name=\"b\"} 2",
        ];
        assert_eq!(lines, want);
        let mut none = String::new();
        graph_lines(&mut none, "ns_llm:", labels.iter().zip([None, None]));
        assert_eq!(none, "");
    }
}
