//! What all routes of one server share: the models, who may call, who is next, what is counted, and what is going on.

use std::collections::HashMap;
use std::future::{Future, poll_fn};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::{Duration, Instant};

use ns_llm::{Canceller, Engine, Stats};
use sha2::{Digest, Sha256};

use crate::admission::Admission;
use crate::affinity::PrefixLog;
use crate::clock::unix_seconds;
use crate::error::{ApiError, ApiResult};
use crate::helper::Helper;
use crate::keys::Keys;
use crate::metrics::Metrics;
use crate::ns_node::gpu::GpuHistory;
use crate::options::{OptionsError, STEP_STALL, ServerOptions};
use crate::stored::StoredResponses;

/// A model to serve, and what it is called.
#[derive(Clone)]
pub struct Model {
    /// Answers for it.
    pub engine: Engine,
    /// Its name in lists and answers.
    pub name: String,
    /// Other names by which it may be asked for.
    pub aliases: Vec<String>,
}

impl Model {
    /// `engine` under the name of its model.
    pub fn new(engine: Engine) -> Model {
        Model { name: engine.info().name.clone(), engine, aliases: Vec::new() }
    }
}

/// A model that is served.
pub(crate) struct Served {
    /// Its place in the list.
    pub(crate) idx: usize,
    pub(crate) engine: Engine,
    pub(crate) name: String,
    pub(crate) aliases: Vec<String>,
    /// Model, number formats and instruction set: with an equal fingerprint the same request gives the same answer.
    pub(crate) fingerprint: String,
    /// Seconds since 1970.
    pub(crate) created: u64,
    progress: Mutex<Progress>,
}

/// When the engine was last seen to get on.
#[derive(Default)]
struct Progress {
    steps: u64,
    /// Since when the engine has had work and made no step, as far as was looked.
    stuck_since: Option<Instant>,
}

impl Served {
    fn new(idx: usize, model: Model) -> Served {
        let info = model.engine.info();
        let fingerprint = [&info.name, info.weights, info.kv_dtype, info.device, info.isa].join("-");
        let Model { engine, name, aliases } = model;
        Served { idx, engine, name, aliases, fingerprint, created: unix_seconds(), progress: Mutex::default() }
    }

    fn is_called(&self, name: &str) -> bool {
        // Ollama's clients name a tag where none was given.
        let bare = name.strip_suffix(":latest").unwrap_or(name);
        [name, bare].into_iter().any(|name| self.name == name || self.aliases.iter().any(|alias| alias == name))
    }

    /// Why it cannot be relied on now, if it cannot: it has ended, or it has work and gets nothing done.
    pub(crate) fn trouble(&self, now: Instant) -> Option<&'static str> {
        if self.engine.health().is_err() {
            return Some("the engine has ended");
        }
        let stuck = self.progress.lock().unwrap_or_else(PoisonError::into_inner).look(&self.engine.stats(), now);
        stuck.then_some("work is waiting and no step was completed")
    }
}

impl Progress {
    /// Whether there was work at two looks, [`STEP_STALL`] or more apart, and no step between them.
    fn look(&mut self, stats: &Stats, now: Instant) -> bool {
        let has_work = stats.num_requests_running + stats.num_requests_waiting > 0;
        if !has_work || stats.steps_total != self.steps {
            self.steps = stats.steps_total;
            self.stuck_since = has_work.then_some(now);
            return false;
        }
        let since = *self.stuck_since.get_or_insert(now);
        now.saturating_duration_since(since) >= STEP_STALL
    }
}

/// The server's state. One for all connections; every part has its own lock, held for some arithmetic only.
pub(crate) struct App {
    pub(crate) models: Vec<Served>,
    pub(crate) options: ServerOptions,
    pub(crate) keys: Keys,
    pub(crate) admission: Arc<Admission>,
    pub(crate) metrics: Metrics,
    pub(crate) stored: StoredResponses,
    pub(crate) helper: Helper,
    pub(crate) gpu_history: GpuHistory,
    pub(crate) prefixes: PrefixLog,
    pub(crate) started: Instant,
    /// Set once, by the listener: new work is refused from then on.
    stopping: AtomicBool,
    /// What can be cancelled, by the number of the request.
    live: Mutex<HashMap<u64, Canceller>>,
    next_number: AtomicU64,
    /// Makes ids that cannot be guessed from one another.
    id_key: [u8; 16],
}

impl App {
    pub(crate) fn new(models: Vec<Model>, options: ServerOptions) -> Result<App, OptionsError> {
        options.validate()?;
        if models.is_empty() {
            return Err(OptionsError::NoModel);
        }
        let mut names: Vec<&str> =
            models.iter().flat_map(|model| model.aliases.iter().chain([&model.name])).map(String::as_str).collect();
        names.sort_unstable();
        if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(OptionsError::DuplicateModel { name: twice[0].to_string() });
        }
        let now = Instant::now();
        let mut id_key = [0; 16];
        for half in id_key.chunks_exact_mut(8) {
            // Keyed by the operating system.
            half.copy_from_slice(&RandomState::new().build_hasher().finish().to_le_bytes());
        }
        Ok(App {
            metrics: Metrics::new(models.len()),
            models: models.into_iter().enumerate().map(|(idx, model)| Served::new(idx, model)).collect(),
            keys: Keys::new(&options.api_keys, now),
            admission: Admission::new(options.max_running_requests, options.max_waiting_requests),
            stored: StoredResponses::default(),
            helper: Helper::default(),
            gpu_history: GpuHistory::default(),
            prefixes: PrefixLog::default(),
            started: now,
            stopping: AtomicBool::new(false),
            live: Mutex::default(),
            next_number: AtomicU64::new(0),
            id_key,
            options,
        })
    }

    /// The model of that name; the first one when none is named.
    pub(crate) fn model(&self, name: Option<&str>) -> ApiResult<&Served> {
        let first = &self.models[0];
        let Some(name) = name else { return Ok(first) };
        match self.models.iter().find(|model| model.is_called(name)) {
            Some(model) => Ok(model),
            None if self.options.any_model => Ok(first),
            None => {
                let shown: String = name.chars().take(64).collect();
                let names = self.models.iter().map(|model| model.name.as_str()).collect::<Vec<_>>().join(", ");
                let message = format!("model {shown:?} is not served here, there is: {names}");
                Err(ApiError { param: Some("model".into()), ..ApiError::not_found("model_not_found", message) })
            }
        }
    }

    /// A new id, such as `chatcmpl-…`.
    pub(crate) fn new_id(&self, prefix: &str) -> String {
        let mut hash = Sha256::new();
        hash.update(self.id_key);
        hash.update(self.next_number.fetch_add(1, Ordering::Relaxed).to_le_bytes());
        let hex: String = hash.finalize()[..12].iter().map(|byte| format!("{byte:02x}")).collect();
        format!("{prefix}{hex}")
    }

    /// New work is refused from now on.
    pub(crate) fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Notes something that can be cancelled; to be forgotten by its number.
    pub(crate) fn register(&self, canceller: Canceller) -> u64 {
        let number = self.next_number.fetch_add(1, Ordering::Relaxed);
        self.live().insert(number, canceller);
        number
    }

    pub(crate) fn forget(&self, number: u64) {
        self.live().remove(&number);
    }

    pub(crate) fn cancel_all(&self) {
        let live: Vec<Canceller> = self.live().values().cloned().collect();
        live.iter().for_each(Canceller::cancel);
    }

    fn live(&self) -> MutexGuard<'_, HashMap<u64, Canceller>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends after `duration`; never without a timer.
    pub(crate) fn sleep(&self, duration: Duration) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        match &self.options.timer {
            Some(timer) => {
                let sleep = timer.sleep(duration);
                Box::pin(sleep)
            }
            None => Box::pin(std::future::pending()),
        }
    }

    /// What `work` gives, unless `duration` is over first.
    pub(crate) async fn within<T>(&self, duration: Duration, work: impl Future<Output = T>) -> Option<T> {
        let mut work = pin!(work);
        let mut sleep = self.sleep(duration);
        poll_fn(|cx| match work.as_mut().poll(cx) {
            Poll::Ready(value) => Poll::Ready(Some(value)),
            Poll::Pending => sleep.as_mut().poll(cx).map(|()| None),
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Work without a step makes an engine stuck after its time; a step, or no work, begins the time anew.
    #[test]
    fn an_engine_without_steps_is_stuck() {
        let (mut progress, start) = (Progress::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        let busy = |steps_total| Stats { steps_total, num_requests_running: 1, ..Stats::default() };
        let idle = Stats { steps_total: 5, ..Stats::default() };
        assert!(!progress.look(&busy(5), at(0)));
        assert!(!progress.look(&busy(5), at(9)));
        assert!(progress.look(&busy(5), at(10)));
        assert!(!progress.look(&busy(6), at(11)), "a step was made");
        assert!(!progress.look(&idle, at(30)));
        assert!(!progress.look(&busy(5), at(60)), "the work is new");
        assert!(progress.look(&busy(5), at(70)));
    }
}
