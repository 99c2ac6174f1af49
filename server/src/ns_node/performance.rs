//! `/api/performance/*`: how fast this server answers, from every request that it has answered. All numbers are of one
//! time window and finite; rates are texts, as ns-node's pages expect them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Extension;
use axum::body::Body;
use axum::extract::State;
use axum::http::{Response, Uri};
use serde::{Serialize, Serializer};
use serde_json::json;

use crate::app::App;
use crate::clock::rfc3339;
use crate::error::PlainError;
use crate::keys::Caller;
use crate::metrics::{Kind, Operation, OperationOutcome, millis};
use crate::ns_node::machine::{Memory, load_average, memory};
use crate::query;
use crate::response::json_response;

const DEFAULT_WINDOW_MS: f64 = 60_000.0;
/// Newest operations among which bottlenecks are looked for.
const DEFAULT_LIMIT: f64 = 100.0;
/// 95 of 100 generations take at most this for a token.
const PER_TOKEN_TARGET_MS: f64 = 80.0;
/// Mean time to the first token.
const FIRST_TOKEN_TARGET_MS: f64 = 100.0;
const TOKENS_PER_SECOND_TARGET: f64 = 12.0;
/// Below it throughput is a bottleneck.
const LOW_TOKENS_PER_SECOND: f64 = 10.0;
/// Generations from which on throughput is judged.
const MIN_GENERATIONS: usize = 10;
const MAX_FAILURE_PERCENT: f64 = 5.0;
const MAX_MEMORY_PERCENT: f64 = 80.0;

/// A few numbers about many, milliseconds. Percentiles are nearest-rank: each is one of the values.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
struct Distribution {
    p50: f64,
    p95: f64,
    p99: f64,
    avg: f64,
}

impl Distribution {
    fn of(values: impl IntoIterator<Item = f64>) -> Distribution {
        let mut sorted: Vec<f64> = values.into_iter().collect();
        if sorted.is_empty() {
            return Distribution::default();
        }
        sorted.sort_by(f64::total_cmp);
        let to_micros = |value: f64| (value * 1e3).round() / 1e3;
        let rank = |share: f64| to_micros(sorted[((share * sorted.len() as f64).ceil() as usize).max(1) - 1]);
        let avg = to_micros(sorted.iter().sum::<f64>() / sorted.len() as f64);
        Distribution { p50: rank(0.5), p95: rank(0.95), p99: rank(0.99), avg }
    }
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct PerformanceMetrics {
    latency: Latency,
    throughput: Throughput,
    requests: Requests,
    resources: Resources,
    time_window: String,
    sample_size: usize,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Latency {
    ttft: Distribution,
    end_to_end: Distribution,
    per_token: Distribution,
    embedding: Distribution,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Throughput {
    #[serde(serialize_with = "two_decimals")]
    requests_per_second: f64,
    /// Of all generations, over the time in which at least one ran.
    #[serde(serialize_with = "two_decimals")]
    tokens_per_second: f64,
    concurrent_requests: usize,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Requests {
    total: usize,
    successful: usize,
    failed: usize,
    cancelled: usize,
    cached: usize,
    /// Percent of those that were not given up.
    #[serde(serialize_with = "two_decimals")]
    success_rate: f64,
}

/// A rate as ns-node's pages expect it, which is a text.
fn two_decimals<S: Serializer>(rate: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{rate:.2}"))
}

#[derive(Debug, Serialize)]
struct Resources {
    cpu: Cpu,
    memory: Memory,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Cpu {
    load_average: [f64; 3],
}

#[derive(Debug, Clone, PartialEq, Serialize)]
struct Bottleneck {
    #[serde(rename = "type")]
    kind: &'static str,
    severity: &'static str,
    current: String,
    target: String,
    suggestion: &'static str,
}

#[derive(Debug, Serialize)]
struct Analysis {
    bottlenecks: Vec<Bottleneck>,
    analyzed: usize,
    timeframe: String,
}

#[derive(Debug, PartialEq, Serialize)]
struct Recommendation {
    priority: &'static str,
    category: &'static str,
    action: &'static str,
}

/// `GET /api/performance/metrics?window=`, milliseconds.
pub(crate) async fn metrics(State(app): State<Arc<App>>, uri: Uri) -> Response<Body> {
    json_response(&metrics_of(&app, query::number(&uri, "window").unwrap_or(DEFAULT_WINDOW_MS)))
}

/// `GET /api/performance/bottlenecks?limit=`.
pub(crate) async fn bottlenecks(State(app): State<Arc<App>>, uri: Uri) -> Response<Body> {
    json_response(&analyze(&app, query::number(&uri, "limit").unwrap_or(DEFAULT_LIMIT) as usize))
}

/// `GET /api/performance/report`: a score with its grade, and what to do. A server that did nothing has no grade.
pub(crate) async fn report(State(app): State<Arc<App>>) -> Response<Body> {
    let (metrics, analysis) = (metrics_of(&app, DEFAULT_WINDOW_MS), analyze(&app, DEFAULT_LIMIT as usize));
    let is_judged = metrics.requests.successful + metrics.requests.failed > 0;
    let score = if is_judged { score(&metrics, &analysis.bottlenecks) } else { 0 };
    let grade = match score {
        _ if !is_judged => "N/A",
        80.. => "A",
        60.. => "B",
        _ => "C",
    };
    let recommendations = recommendations(&metrics, &analysis.bottlenecks);
    json_response(&json!({
        "summary": { "score": score, "grade": grade, "timestamp": rfc3339() },
        "metrics": metrics,
        "bottlenecks": analysis,
        "recommendations": recommendations,
    }))
}

/// `POST /api/performance/clear`.
pub(crate) async fn clear(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
) -> Result<Response<Body>, PlainError> {
    caller.check_admin()?;
    app.metrics.clear(Instant::now());
    Ok(json_response(&json!({ "success": true, "message": "Performance history cleared" })))
}

fn is_success(operation: &&Operation, kind: Kind) -> bool {
    operation.kind == kind && operation.outcome == OperationOutcome::Success
}

fn metrics_of(app: &App, window_ms: f64) -> PerformanceMetrics {
    let now = Instant::now();
    // A window beyond the clock's range is as good as none.
    let window = Duration::try_from_secs_f64(window_ms / 1e3).ok();
    let operations = app.metrics.operations(window, now);
    let since = app.metrics.cleared().unwrap_or(app.started);
    let seconds = (millis(now.saturating_duration_since(since)).min(window_ms) / 1e3).max(1.0);
    let generations: Vec<&Operation> = operations.iter().filter(|it| is_success(it, Kind::Generate)).collect();
    let embeddings = operations.iter().filter(|it| is_success(it, Kind::Embed));
    let count = |outcome| operations.iter().filter(|operation| operation.outcome == outcome).count();
    let (successful, failed, cancelled) =
        (count(OperationOutcome::Success), count(OperationOutcome::Failed), count(OperationOutcome::Cancelled));
    PerformanceMetrics {
        latency: Latency {
            ttft: Distribution::of(generations.iter().filter_map(|it| it.first_token_ms)),
            end_to_end: Distribution::of(generations.iter().map(|it| it.total_ms())),
            per_token: Distribution::of(generations.iter().filter_map(|it| it.per_token_ms())),
            embedding: Distribution::of(embeddings.map(Operation::total_ms)),
        },
        throughput: Throughput {
            requests_per_second: operations.len() as f64 / seconds,
            tokens_per_second: tokens_per_second(&generations),
            concurrent_requests: app.metrics.num_active(),
        },
        requests: Requests {
            total: operations.len(),
            successful,
            failed,
            cancelled,
            cached: generations.iter().filter(|operation| operation.cached_tokens > 0).count(),
            success_rate: 100.0 - failure_percent(successful, failed).unwrap_or(100.0),
        },
        resources: Resources { cpu: Cpu { load_average: load_average() }, memory: memory() },
        time_window: format!("{}s", window_ms / 1e3),
        sample_size: operations.len(),
    }
}

fn analyze(app: &App, limit: usize) -> Analysis {
    let operations = app.metrics.operations(None, Instant::now());
    let newest = &operations[operations.len().saturating_sub(limit)..];
    let Memory { total, free, .. } = memory();
    let memory_percent = if total == 0 { 0.0 } else { 100.0 - free as f64 / total as f64 * 100.0 };
    let bottlenecks = find_bottlenecks(newest, memory_percent);
    Analysis { bottlenecks, analyzed: newest.len(), timeframe: format!("last {limit} operations") }
}

/// Of those that were not given up; `None` when there were none.
fn failure_percent(successful: usize, failed: usize) -> Option<f64> {
    let judged = successful + failed;
    (judged > 0).then(|| failed as f64 / judged as f64 * 100.0)
}

/// In the order of their weight.
fn find_bottlenecks(operations: &[Operation], memory_percent: f64) -> Vec<Bottleneck> {
    let mut found = Vec::new();
    let count = |outcome| operations.iter().filter(|operation| operation.outcome == outcome).count();
    let failures = failure_percent(count(OperationOutcome::Success), count(OperationOutcome::Failed)).unwrap_or(0.0);
    if failures > MAX_FAILURE_PERCENT {
        found.push(Bottleneck {
            kind: "high_failure_rate",
            severity: "high",
            current: format!("{failures:.2} %"),
            target: format!("at most {MAX_FAILURE_PERCENT} %"),
            suggestion: "Look at the errors of the failed requests: deadlines that are too short, or an engine that ended",
        });
    }
    if memory_percent > MAX_MEMORY_PERCENT {
        found.push(Bottleneck {
            kind: "high_memory_usage",
            severity: "high",
            current: format!("{memory_percent:.1} % of the machine's memory"),
            target: format!("at most {MAX_MEMORY_PERCENT} %"),
            suggestion: "Use smaller weights or a smaller KV pool",
        });
    }
    let generations: Vec<&Operation> = operations.iter().filter(|it| is_success(it, Kind::Generate)).collect();
    let per_token = Distribution::of(generations.iter().filter_map(|it| it.per_token_ms()));
    if per_token.p95 > PER_TOKEN_TARGET_MS {
        found.push(Bottleneck {
            kind: "slow_operations",
            severity: "medium",
            current: format!("{:.1} ms per token (p95)", per_token.p95),
            target: format!("{PER_TOKEN_TARGET_MS} ms per token"),
            suggestion: "Use a smaller model or smaller weights, or give the engine more threads",
        });
    }
    let throughput = tokens_per_second(&generations);
    if generations.len() > MIN_GENERATIONS && throughput < LOW_TOKENS_PER_SECOND {
        found.push(Bottleneck {
            kind: "low_throughput",
            severity: "medium",
            current: format!("{throughput:.1} tokens/sec"),
            target: format!("{TOKENS_PER_SECOND_TARGET}+ tokens/sec"),
            suggestion: "Compute on a GPU, or use a smaller model",
        });
    }
    found
}

/// Tokens of all, over the time in which at least one of them ran: generations that run together are not slower for it.
fn tokens_per_second(generations: &[&Operation]) -> f64 {
    let mut spans: Vec<(Instant, Instant)> = generations.iter().map(|it| (it.started, it.ended)).collect();
    spans.sort_unstable();
    let mut busy = Duration::ZERO;
    let mut busy_until: Option<Instant> = None;
    for (started, ended) in spans {
        let from = busy_until.map_or(started, |until| started.max(until));
        busy += ended.saturating_duration_since(from);
        busy_until = busy_until.max(Some(ended));
    }
    let tokens: usize = generations.iter().map(|operation| operation.tokens).sum();
    if busy.is_zero() { 0.0 } else { tokens as f64 / busy.as_secs_f64() }
}

fn score(metrics: &PerformanceMetrics, bottlenecks: &[Bottleneck]) -> u32 {
    let mut score = 100.0;
    let p95 = metrics.latency.end_to_end.p95;
    score -= if p95 > 1_000.0 {
        20.0
    } else if p95 > 500.0 {
        10.0
    } else {
        0.0
    };
    // Embeddings make no tokens: without a generation there is no throughput to judge.
    let throughput = metrics.throughput.tokens_per_second;
    score -= if p95 > 0.0 && throughput < LOW_TOKENS_PER_SECOND { 15.0 } else { 0.0 };
    let success_rate = metrics.requests.success_rate;
    score -= if success_rate < 95.0 { 100.0 - success_rate } else { 0.0 };
    score -= bottlenecks.iter().map(|it| if it.severity == "high" { 10.0 } else { 5.0 }).sum::<f64>();
    score.round().max(0.0) as u32
}

fn recommendations(metrics: &PerformanceMetrics, bottlenecks: &[Bottleneck]) -> Vec<Recommendation> {
    let of = |it: &Bottleneck| Recommendation { priority: it.severity, category: it.kind, action: it.suggestion };
    let mut recommendations: Vec<Recommendation> = bottlenecks.iter().map(of).collect();
    let throughput = metrics.throughput.tokens_per_second;
    if metrics.latency.end_to_end.p95 > 0.0 && throughput < TOKENS_PER_SECOND_TARGET {
        let action = "Enable GPU acceleration for inference";
        recommendations.push(Recommendation { priority: "high", category: "performance", action });
    }
    if metrics.latency.ttft.avg > FIRST_TOKEN_TARGET_MS {
        let action = "Give prompts a common beginning, which is computed once";
        recommendations.push(Recommendation { priority: "medium", category: "latency", action });
    }
    recommendations
}

#[cfg(test)]
mod tests {
    use super::*;

    fn operation(outcome: OperationOutcome, start: Instant, from_ms: u64, to_ms: u64, tokens: usize) -> Operation {
        let at = |ms| start + Duration::from_millis(ms);
        let (started, ended) = (at(from_ms), at(to_ms));
        Operation { kind: Kind::Generate, outcome, started, ended, tokens, cached_tokens: 0, first_token_ms: Some(0.0) }
    }

    /// Percentiles are values that occurred; without one everything is 0.
    #[test]
    fn percentiles_are_nearest_rank() {
        assert_eq!(Distribution::of([]), Distribution::default());
        let of_hundred = Distribution::of((1..=100).map(f64::from));
        assert_eq!(of_hundred, Distribution { p50: 50.0, p95: 95.0, p99: 99.0, avg: 50.5 });
        assert_eq!(Distribution::of([7.0]).p99, 7.0);
    }

    /// Generations that run together share their time; pauses do not count.
    #[test]
    fn throughput_is_over_busy_time() {
        let start = Instant::now();
        let of = |from, to| operation(OperationOutcome::Success, start, from, to, 10);
        let operations = [of(500, 1_500), of(0, 1_000), of(9_000, 9_500)];
        assert_eq!(tokens_per_second(&operations.iter().collect::<Vec<_>>()), 15.0);
        assert_eq!(tokens_per_second(&[]), 0.0);
    }

    /// Each bottleneck is found at its bound and not before.
    #[test]
    fn bottlenecks_are_found() {
        let start = Instant::now();
        let kinds = |operations: &[Operation], memory| -> Vec<&str> {
            find_bottlenecks(operations, memory).iter().map(|it| it.kind).collect()
        };
        let fast = vec![operation(OperationOutcome::Success, start, 0, 100, 11); 20];
        assert_eq!(kinds(&fast, 80.0), [""; 0]);
        assert_eq!(kinds(&fast, 81.0), ["high_memory_usage"]);
        let with_failures = [fast.clone(), vec![operation(OperationOutcome::Failed, start, 0, 1, 0); 2]].concat();
        assert_eq!(kinds(&with_failures, 0.0), ["high_failure_rate"]);
        let slow: Vec<_> =
            (0..11).map(|n| operation(OperationOutcome::Success, start, n * 1_000, n * 1_000 + 900, 2)).collect();
        assert_eq!(kinds(&slow, 0.0), ["slow_operations", "low_throughput"]);
    }
}
