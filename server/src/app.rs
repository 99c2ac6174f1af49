//! What all routes of one server share: the models, who may call, who is next, what is counted, and what is going on.

use std::collections::HashMap;
use std::future::{Future, poll_fn};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::{Duration, Instant};

use ns_llm::{Canceller, Engine};
use sha2::{Digest, Sha256};

use crate::admission::Admission;
use crate::affinity::PrefixLog;
use crate::bodies::Bodies;
use crate::clock::unix_seconds;
use crate::error::{ApiError, ApiResult};
use crate::gpu_watch::GpuWatch;
use crate::health::Health;
use crate::keys::Keys;
use crate::metrics::Metrics;
use crate::options::{OptionsError, ServerOptions};
use crate::otlp::Exporter;
use crate::side_thread::SideThread;
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
    health: Health,
}

impl Served {
    fn new(idx: usize, model: Model, step_stall: Duration) -> Served {
        let info = model.engine.info();
        let fingerprint = [&info.name, info.weights, info.kv_dtype, info.device, info.isa].join("-");
        let Model { engine, name, aliases } = model;
        let (created, health) = (unix_seconds(), Health::new(step_stall));
        Served { idx, engine, name, aliases, fingerprint, created, health }
    }

    fn is_called(&self, name: &str) -> bool {
        // Ollama's clients name a tag where none was given.
        let bare = name.strip_suffix(":latest").unwrap_or(name);
        [name, bare].into_iter().any(|name| self.name == name || self.aliases.iter().any(|alias| alias == name))
    }

    /// Why it cannot be relied on now, if it cannot.
    pub(crate) fn trouble(&self, now: Instant) -> Option<&'static str> {
        self.health.trouble(&self.engine, now)
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
    /// Tokenizes.
    pub(crate) text_thread: SideThread,
    /// Empties caches, which may remove files.
    pub(crate) cache_thread: SideThread,
    pub(crate) gpus: GpuWatch,
    /// Bodies of requests that have no answer yet.
    pub(crate) bodies: Bodies,
    /// Where spans go, if they go anywhere.
    pub(crate) exporter: Option<Exporter>,
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
        let exporter = options.otlp_endpoint.as_deref().map(Exporter::new).transpose()?;
        let now = Instant::now();
        let mut id_key = [0; 16];
        for half in id_key.chunks_exact_mut(8) {
            // Keyed by the operating system.
            half.copy_from_slice(&RandomState::new().build_hasher().finish().to_le_bytes());
        }
        Ok(App {
            metrics: Metrics::new(models.len()),
            models: models
                .into_iter()
                .enumerate()
                .map(|(idx, model)| Served::new(idx, model, options.step_stall))
                .collect(),
            keys: Keys::new(&options.api_keys, now),
            admission: Admission::new(
                "the queue of requests",
                options.max_running_requests,
                options.max_waiting_requests,
            ),
            stored: StoredResponses::default(),
            text_thread: SideThread::new("ns-llm-text"),
            cache_thread: SideThread::new("ns-llm-caches"),
            gpus: GpuWatch::new(ns_llm::gpus),
            bodies: Bodies::new(options.max_body_bytes),
            exporter,
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

    /// Tells the operator what a client was not told about its request.
    pub(crate) fn report(&self, request_id: &str, code: &str, detail: &str) {
        if let Some(log) = &self.options.log {
            log(&format!("request {request_id} failed: {code}: {detail}"));
        }
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

    /// What `work` gives, unless `duration` is over first. What is ready at once needs no timer.
    pub(crate) async fn within<T>(&self, duration: Duration, work: impl Future<Output = T>) -> Option<T> {
        let mut work = pin!(work);
        let mut sleep = None;
        poll_fn(|cx| match work.as_mut().poll(cx) {
            Poll::Ready(value) => Poll::Ready(Some(value)),
            Poll::Pending => sleep.get_or_insert_with(|| self.sleep(duration)).as_mut().poll(cx).map(|()| None),
        })
        .await
    }
}
