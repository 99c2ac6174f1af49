//! Requests as spans for an OpenTelemetry collector: OTLP over HTTP in its JSON form, which needs no more than a POST. A span of
//! the whole request, child of the one that its `traceparent` names, and below it where its time went: queue, prefill, decode.
//! Spans are given off in batches, by a task beside the connections; a collector that is slow or away costs spans, which are
//! counted, and nothing else.

#[cfg(feature = "listen")]
mod post;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::http::{HeaderMap, Uri};
use ns_llm::Summary;
use serde_json::{Value, json};

use crate::options::{MAX_SPANS, OptionsError};

/// Where traces are posted, below the collector's address.
const TRACES_PATH: &str = "/v1/traces";
/// Kinds of spans: one that answers somebody, and a part of it.
const KIND_SERVER: u32 = 2;
const KIND_INTERNAL: u32 = 1;
const STATUS_OK: u32 = 1;
const STATUS_ERROR: u32 = 2;

/// The place of a request in a trace that began elsewhere (W3C Trace Context, `traceparent`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TraceParent {
    /// 32 hexadecimal digits.
    pub(crate) trace_id: String,
    /// 16 of them.
    pub(crate) span_id: String,
}

impl TraceParent {
    /// Of `version-trace-parent-flags`; nothing when it is not well-formed.
    pub(crate) fn read(headers: &HeaderMap) -> Option<TraceParent> {
        let mut parts = headers.get("traceparent")?.to_str().ok()?.split('-');
        let (version, trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        let is_hex = |part: &str, length: usize| {
            part.len() == length && part.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
        };
        let is_named = |part: &str| part.bytes().any(|byte| byte != b'0');
        let is_whole =
            is_hex(version, 2) && version != "ff" && is_hex(trace, 32) && is_hex(span, 16) && is_hex(flags, 2);
        let parent = || TraceParent { trace_id: trace.to_string(), span_id: span.to_string() };
        (is_whole && is_named(trace) && is_named(span)).then(parent)
    }
}

/// A request that has ended.
pub(crate) struct EndedRequest<'a> {
    /// "generate" or "embed".
    pub(crate) name: &'static str,
    pub(crate) model: &'a str,
    pub(crate) request_id: &'a str,
    pub(crate) parent: Option<&'a TraceParent>,
    pub(crate) took: Duration,
    /// Of one that succeeded.
    pub(crate) summary: Option<&'a Summary>,
}

/// Spans on their way to a collector.
pub(crate) struct Exporter {
    /// `host:port`.
    #[cfg_attr(not(feature = "listen"), allow(dead_code, reason = "only who listens posts"))]
    authority: String,
    #[cfg_attr(not(feature = "listen"), allow(dead_code, reason = "only who listens posts"))]
    path: String,
    /// Locked for a push, or to take all.
    queue: Mutex<VecDeque<Value>>,
    pub(crate) num_sent: AtomicU64,
    pub(crate) num_dropped: AtomicU64,
}

impl Exporter {
    /// For the collector at `http://host:port[/path]`.
    pub(crate) fn new(endpoint: &str) -> Result<Exporter, OptionsError> {
        let wrong = || OptionsError::OutOfRange {
            field: "otlp_endpoint",
            value: endpoint.to_string(),
            expected: "http://HOST:PORT, the address of an OTLP collector",
        };
        let uri: Uri = endpoint.parse().map_err(|_| wrong())?;
        let authority = uri.authority().filter(|authority| authority.port_u16().is_some()).ok_or_else(wrong)?;
        if uri.scheme_str() != Some("http") || authority.as_str().contains('@') {
            return Err(wrong());
        }
        Ok(Exporter {
            authority: authority.to_string(),
            path: format!("{}{TRACES_PATH}", uri.path().trim_end_matches('/')),
            queue: Mutex::default(),
            num_sent: AtomicU64::new(0),
            num_dropped: AtomicU64::new(0),
        })
    }

    /// Notes the spans of a request that ended just now. `ids`: gives hexadecimal digits that come once, 24 at a time.
    pub(crate) fn record(&self, request: &EndedRequest<'_>, mut ids: impl FnMut() -> String) {
        let spans = spans_of(request, SystemTime::now(), &mut ids);
        let mut queue = self.lock();
        let num_dropped = (queue.len() + spans.len()).saturating_sub(MAX_SPANS);
        if num_dropped > 0 {
            self.num_dropped.fetch_add(spans.len() as u64, Ordering::Relaxed);
            return;
        }
        queue.extend(spans);
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Value>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn spans_of(request: &EndedRequest<'_>, now: SystemTime, ids: &mut impl FnMut() -> String) -> Vec<Value> {
    let end = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    let start = end.saturating_sub(request.took);
    let trace_id = match request.parent {
        Some(parent) => parent.trace_id.clone(),
        None => (ids() + &ids())[..32].to_string(),
    };
    let mut attributes = vec![
        text_attribute("gen_ai.request.model", request.model),
        text_attribute("gen_ai.request.id", request.request_id),
    ];
    let span_id = ids()[..16].to_string();
    let mut parts = Vec::new();
    if let Some(summary) = request.summary {
        let (usage, times) = (summary.usage, summary.timings);
        let count = |name: &str, value: usize| json!({ "key": name, "value": { "intValue": value.to_string() } });
        let seconds = |name: &str, ms: f64| json!({ "key": name, "value": { "doubleValue": ms / 1e3 } });
        attributes.extend([
            count("gen_ai.usage.prompt_tokens", usage.prompt_tokens),
            count("gen_ai.usage.completion_tokens", usage.completion_tokens),
            count("gen_ai.usage.cached_tokens", usage.cached_tokens),
            seconds("gen_ai.latency.time_in_queue", times.queue_ms),
            seconds("gen_ai.latency.time_to_first_token", times.first_token_ms),
            seconds("gen_ai.latency.e2e", times.total_ms),
        ]);
        let mut from = start;
        for (name, ms) in [("queue", times.queue_ms), ("prefill", times.prompt_ms), ("decode", times.decode_ms)] {
            let to = from + Duration::try_from_secs_f64(ms / 1e3).unwrap_or_default();
            let (part_id, kind) = (ids()[..16].to_string(), KIND_INTERNAL);
            let (parent, attributes) = (Some(span_id.as_str()), &[][..]);
            let part =
                Span { span_id: &part_id, parent, name, kind, start: from, end: to, status: STATUS_OK, attributes };
            parts.push(part.to_json(&trace_id));
            from = to;
        }
    }
    let status = if request.summary.is_some() { STATUS_OK } else { STATUS_ERROR };
    let parent = request.parent.map(|parent| parent.span_id.as_str());
    let (span_id, name, kind, attributes) = (span_id.as_str(), request.name, KIND_SERVER, attributes.as_slice());
    let whole = Span { span_id, parent, name, kind, start, end, status, attributes }.to_json(&trace_id);
    [vec![whole], parts].concat()
}

/// One span of a trace. Times count from 1970.
struct Span<'a> {
    span_id: &'a str,
    parent: Option<&'a str>,
    name: &'static str,
    kind: u32,
    start: Duration,
    end: Duration,
    status: u32,
    attributes: &'a [Value],
}

impl Span<'_> {
    /// As OTLP writes it.
    fn to_json(&self, trace_id: &str) -> Value {
        json!({
            "traceId": trace_id,
            "spanId": self.span_id,
            "parentSpanId": self.parent.unwrap_or_default(),
            "name": self.name,
            "kind": self.kind,
            "startTimeUnixNano": self.start.as_nanos().to_string(),
            "endTimeUnixNano": self.end.as_nanos().to_string(),
            "attributes": self.attributes,
            "status": { "code": self.status },
        })
    }
}

fn text_attribute(name: &str, value: &str) -> Value {
    json!({ "key": name, "value": { "stringValue": value } })
}

#[cfg(any(feature = "listen", test))]
fn export_request(spans: &[Value]) -> Value {
    let resource = json!({ "attributes": [text_attribute("service.name", "ns-llm")] });
    let scope = json!({ "name": "ns-llm", "version": env!("CARGO_PKG_VERSION") });
    json!({ "resourceSpans": [{ "resource": resource, "scopeSpans": [{ "scope": scope, "spans": spans }] }] })
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    /// Only addresses that can be posted to are taken, and a `traceparent` is read or left.
    #[test]
    fn addresses_and_parents_are_read() {
        let exporter = Exporter::new("http://collector:4318/otel/").expect("valid");
        assert_eq!((exporter.authority.as_str(), exporter.path.as_str()), ("collector:4318", "/otel/v1/traces"));
        for wrong in ["", "collector:4318", "https://collector:4318", "http://collector", "http://a:b@c:1"] {
            assert!(Exporter::new(wrong).is_err(), "{wrong}");
        }
        let read = |value: &'static str| {
            TraceParent::read(&HeaderMap::from_iter([(
                "traceparent".parse().expect("a name"),
                HeaderValue::from_static(value),
            )]))
        };
        let parent = read("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01").expect("well-formed");
        assert_eq!((&parent.trace_id[..4], &parent.span_id[..4]), ("0af7", "b7ad"));
        for wrong in [
            "",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
        ] {
            assert_eq!(read(wrong), None, "{wrong}");
        }
    }

    /// What does not fit the queue is counted, and nothing more.
    #[test]
    fn the_queue_is_bounded() {
        let exporter = Exporter::new("http://127.0.0.1:1").expect("valid");
        let took = Duration::from_millis(5);
        let request =
            EndedRequest { name: "generate", model: "demo", request_id: "r", parent: None, took, summary: None };
        (0..MAX_SPANS + 3).for_each(|_| exporter.record(&request, || "0123456789abcdef01234567".to_string()));
        assert_eq!((exporter.lock().len(), exporter.num_dropped.load(Ordering::Relaxed)), (MAX_SPANS, 3));
        let span = exporter.lock()[0].clone();
        assert_eq!(
            (&span["status"]["code"], &span["traceId"]),
            (&json!(2), &json!("0123456789abcdef012345670123456789abcdef01234567"[..32]))
        );
        let nanos = |name: &str| span[name].as_str().and_then(|text| text.parse::<u64>().ok()).expect("a number");
        assert_eq!(nanos("endTimeUnixNano") - nanos("startTimeUnixNano"), 5_000_000);
    }
}
