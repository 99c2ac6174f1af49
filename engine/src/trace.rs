//! What an engine did, step by step, on a time line: recorded only between start and stop, and written as Chrome's trace
//! events, which `chrome://tracing` and Perfetto show. There is a lane for the steps, one for each tier, and one for each choice
//! of each request. When nothing is recorded it costs one look at a flag per step.
//!
//! Invariant: a recording is bounded; what does not fit is counted.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use serde_json::{Map, Value, json};

/// Processes of the time line: what computes, and who is computed for.
const ENGINE_PID: u32 = 1;
const REQUESTS_PID: u32 = 2;

/// Where on the time line something is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Lane {
    /// The worker's steps.
    Steps,
    /// The jobs of the tier of that name.
    Tier(&'static str),
    /// A request, by its number in the engine, and its choice (or its input).
    Choice(u64, usize),
}

/// Something that took from one moment to another.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Slice {
    pub(crate) lane: Lane,
    pub(crate) name: &'static str,
    pub(crate) start: Instant,
    pub(crate) end: Instant,
    pub(crate) args: Vec<(&'static str, u64)>,
}

/// The recorder. Written by the worker, started and stopped by the engine's handles.
#[derive(Default)]
pub(crate) struct Tracer {
    is_on: AtomicBool,
    /// Locked for a push, or to take all. `None` when nothing is recorded.
    recording: Mutex<Option<Recording>>,
}

struct Recording {
    start: Instant,
    max_events: usize,
    slices: Vec<Slice>,
    /// What callers call their requests.
    labels: HashMap<u64, Arc<str>>,
    num_dropped: u64,
}

impl Tracer {
    pub(crate) fn is_on(&self) -> bool {
        self.is_on.load(Ordering::Relaxed)
    }

    /// Whether a recording was started; not while one runs.
    pub(crate) fn start(&self, max_events: usize) -> bool {
        let mut recording = self.lock();
        if recording.is_some() {
            return false;
        }
        let start = Instant::now();
        let (slices, labels) = (Vec::new(), HashMap::new());
        *recording = Some(Recording { start, max_events, slices, labels, num_dropped: 0 });
        self.is_on.store(true, Ordering::Relaxed);
        true
    }

    /// Ends the recording, and writes it.
    pub(crate) fn stop(&self) -> Option<String> {
        let recording = {
            let mut recording = self.lock();
            self.is_on.store(false, Ordering::Relaxed);
            recording.take()
        };
        recording.map(|recording| recording.to_json().to_string())
    }

    /// Notes something that is over. What began before the recording is shown from its start on.
    pub(crate) fn add(&self, slice: Slice) {
        let mut guard = self.lock();
        let Some(recording) = guard.as_mut() else { return };
        match recording.slices.len() < recording.max_events {
            true => recording.slices.push(slice),
            false => recording.num_dropped += 1,
        }
    }

    /// Notes what a request is called. Bounded as the slices are: a request without one has no lane.
    pub(crate) fn label(&self, request: u64, label: &Arc<str>) {
        let mut guard = self.lock();
        let Some(recording) = guard.as_mut() else { return };
        if recording.labels.len() < recording.max_events {
            recording.labels.entry(request).or_insert_with(|| label.clone());
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Recording>> {
        self.recording.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Recording {
    fn to_json(&self) -> Value {
        let mut lanes: Vec<Lane> = self.slices.iter().map(|slice| slice.lane).collect();
        lanes.sort_unstable();
        lanes.dedup();
        let place: HashMap<Lane, usize> = lanes.iter().enumerate().map(|(tid, lane)| (*lane, tid + 1)).collect();
        let process =
            |pid: u32, name: &str| json!({ "ph": "M", "pid": pid, "name": "process_name", "args": { "name": name } });
        let mut events = vec![process(ENGINE_PID, "engine"), process(REQUESTS_PID, "requests")];
        for lane in &lanes {
            let name = json!({ "name": self.lane_name(*lane) });
            events.push(json!({
                "ph": "M", "pid": pid(*lane), "tid": place[lane], "name": "thread_name", "args": name,
            }));
        }
        let micros = |moment: Instant| moment.saturating_duration_since(self.start).as_nanos() as f64 / 1e3;
        for Slice { lane, name, start, end, args } in &self.slices {
            let args: Map<String, Value> =
                args.iter().map(|(name, value)| (name.to_string(), (*value).into())).collect();
            let (from, to) = (micros(*start), micros(*end));
            events.push(json!({
                "ph": "X", "pid": pid(*lane), "tid": place[lane], "name": name, "ts": from, "dur": to - from, "args": args,
            }));
        }
        json!({
            "displayTimeUnit": "ms",
            "otherData": { "dropped_events": self.num_dropped },
            "traceEvents": events,
        })
    }

    fn lane_name(&self, lane: Lane) -> String {
        match lane {
            Lane::Steps => "steps".to_string(),
            Lane::Tier(name) => format!("tier {name}"),
            Lane::Choice(request, choice) => {
                let label = self.labels.get(&request).map(|label| format!(" {label}")).unwrap_or_default();
                format!("request {request}{label}, {choice}")
            }
        }
    }
}

fn pid(lane: Lane) -> u32 {
    match lane {
        Lane::Steps | Lane::Tier(_) => ENGINE_PID,
        Lane::Choice(..) => REQUESTS_PID,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// Only what happens between start and stop is kept, up to the bound; the rest is counted, and lanes have their names.
    #[test]
    fn recordings_are_bounded() {
        let tracer = Tracer::default();
        let start = Instant::now();
        let slice = |lane| Slice {
            lane,
            name: "work",
            start,
            end: start + Duration::from_millis(2),
            args: vec![("tokens", 3)],
        };
        tracer.add(slice(Lane::Steps));
        assert_eq!((tracer.is_on(), tracer.stop()), (false, None));
        assert!(tracer.start(2) && tracer.is_on() && !tracer.start(2));
        [Lane::Choice(7, 1), Lane::Tier("disk"), Lane::Steps].into_iter().for_each(|lane| tracer.add(slice(lane)));
        tracer.label(7, &Arc::from("from-outside"));
        let trace: Value = serde_json::from_str(&tracer.stop().expect("recorded")).expect("JSON");
        assert_eq!(trace["otherData"]["dropped_events"], 1);
        let events = trace["traceEvents"].as_array().expect("a list");
        let names: Vec<_> =
            events.iter().filter(|event| event["name"] == "thread_name").map(|e| &e["args"]["name"]).collect();
        assert_eq!(names, ["tier disk", "request 7 from-outside, 1"]);
        let slices: Vec<_> = events.iter().filter(|event| event["ph"] == "X").collect();
        assert_eq!((slices.len(), &slices[0]["args"]), (2, &json!({ "tokens": 3 })));
        assert_eq!((slices[0]["pid"].as_u64(), slices[1]["pid"].as_u64()), (Some(2), Some(1)));
        assert!(tracer.stop().is_none() && tracer.start(1), "it can be started again");
    }
}
