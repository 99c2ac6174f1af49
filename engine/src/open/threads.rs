//! The threads of an engine, and how they begin. The worker thread loads the model itself: what it will own is made where it
//! will live, and the compute pool packs weights with the same threads that later multiply them. A load that fails ends that
//! thread and leaves nothing.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ns_llm_kernels::host;

use super::{Loaded, load_among};
use crate::command::{Command, Submission};
use crate::config::{EngineOptions, KvRemoteOptions, ThreadPriority};
use crate::device::CudaDevices;
use crate::error::{Error, Result, panic_text};
use crate::instruments::Instruments;
use crate::intake;
use crate::memory_plan::MemoryPlan;
use crate::response_tiers::{AnswerStore, ResponseTiers};
use crate::responses::Responses;
use crate::stats::ModelInfo;
use crate::storage::TierId;
use crate::text_model::TextModel;
use crate::tier_thread::TierThread;
use crate::worker::Worker;

/// The threads of a running engine, and the ways to them.
pub(crate) struct Running {
    pub(crate) commands: Sender<Command>,
    pub(crate) submissions: SyncSender<Submission>,
    pub(crate) worker: JoinHandle<()>,
    pub(crate) intake: JoinHandle<()>,
    /// Set when the engine shall close: intake then prepares nothing more.
    pub(crate) is_closing: Arc<AtomicBool>,
    pub(crate) instruments: Arc<Instruments>,
    /// Why the worker ended; set by it.
    pub(crate) ended: Arc<OnceLock<Error>>,
    pub(crate) text: Arc<TextModel>,
    pub(crate) responses: Responses,
    pub(crate) info: ModelInfo,
    pub(crate) plan: MemoryPlan,
}

/// What the worker thread says when its model is loaded.
struct Ready {
    text: Arc<TextModel>,
    info: ModelInfo,
    plan: MemoryPlan,
    answer_stores: Vec<Box<dyn AnswerStore>>,
}

/// Loads a model on a worker thread of its own and starts the intake thread.
pub(crate) fn start(options: EngineOptions, devices: impl CudaDevices + 'static) -> Result<Running> {
    options.validate()?;
    let epoch = Instant::now();
    let responses = Responses::shared_by_owners(options.response_cache, options.kv_namespace_share)?;
    let max_waiting_requests = options.max_waiting_requests;
    let load_budget = Duration::from_millis(options.kv_load_budget_ms);
    let remote_owner_limit = options.kv_remote.as_ref().and_then(KvRemoteOptions::owner_limit);
    let (command_sender, commands) = channel();
    let (ready_sender, ready) = sync_channel(1);
    let instruments = Arc::new(Instruments::new());
    let ended = Arc::new(OnceLock::new());
    let worker = StartedWorker::new(command_sender.clone(), {
        let (instruments, ended, tier_answers) = (instruments.clone(), ended.clone(), command_sender.clone());
        spawn("ns-llm-worker", move || {
            let priority = options.thread_priority;
            if let Some((loaded, ready)) = load_and_report(options, &devices, &ready_sender) {
                // The worker computes too. Only now: the threads that it started have inherited its priority.
                if priority == ThreadPriority::BelowNormal {
                    host::lower_thread_priority();
                }
                let Loaded { executor, scheduler, tier_stores, text, .. } = loaded;
                let spawned = tier_stores.into_iter().map(|store| TierThread::spawn(store, tier_answers.clone()));
                match spawned.collect() {
                    Ok(tiers) => {
                        let worker = Worker::new(executor, scheduler, text, commands, instruments, tiers, epoch);
                        // Building a tokenizer has taken several times what it keeps.
                        host::return_free_memory();
                        // From here on `Engine::open` may return.
                        let _ = ready_sender.send(Ok(ready));
                        worker.run(&ended);
                    }
                    Err(error) => drop(ready_sender.send(Err(error))),
                }
            }
            host::return_free_memory();
        })?
    });
    let Ready { text, info, plan, answer_stores } = ready.recv().unwrap_or(Err(Error::Closed))?;
    if !answer_stores.is_empty() {
        let tiers = ResponseTiers::start(answer_stores, text.identity, load_budget)?;
        if let Some((limit_bytes, ttl_s)) = remote_owner_limit {
            tiers.limit_owners(TierId::Remote, limit_bytes, ttl_s);
        }
        responses.keep_in(tiers);
    }
    let (submission_sender, submissions) = sync_channel(max_waiting_requests);
    let is_closing = Arc::new(AtomicBool::new(false));
    let intake = {
        let (text, commands, is_closing) = (text.clone(), command_sender.clone(), is_closing.clone());
        let (responses, instruments) = (responses.clone(), instruments.clone());
        spawn("ns-llm-intake", move || {
            intake::run(&text, &responses, &instruments, epoch, &submissions, &commands, &is_closing)
        })?
    };
    let (commands, submissions, worker) = (command_sender, submission_sender, worker.keep());
    Ok(Running { commands, submissions, worker, intake, is_closing, instruments, ended, text, responses, info, plan })
}

/// The worker of an engine that is not complete. Dropped, it ends: nobody else could tell it to, and it holds the model.
struct StartedWorker {
    commands: Sender<Command>,
    thread: Option<JoinHandle<()>>,
}

impl StartedWorker {
    fn new(commands: Sender<Command>, thread: JoinHandle<()>) -> Self {
        StartedWorker { commands, thread: Some(thread) }
    }

    /// The engine is complete, and ends it itself.
    fn keep(mut self) -> JoinHandle<()> {
        self.thread.take().expect("it is taken once")
    }
}

impl Drop for StartedWorker {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            // One that has failed to load listens no more; either way its end is near.
            let _ = self.commands.send(Command::Close);
            let _ = thread.join();
        }
    }
}

/// Loads, or reports why not; a panic while loading is a typed error like any other.
fn load_and_report(
    options: EngineOptions,
    devices: &dyn CudaDevices,
    ready: &SyncSender<Result<Ready>>,
) -> Option<(Loaded, Ready)> {
    let loaded = catch_unwind(AssertUnwindSafe(|| load_among(options, devices)))
        .unwrap_or_else(|panic| Err(Error::Internal { reason: panic_text(panic.as_ref()) }));
    match loaded {
        Ok(mut loaded) => {
            let answer_stores = std::mem::take(&mut loaded.answer_stores);
            let ready =
                Ready { text: loaded.text.clone(), info: loaded.info.clone(), plan: loaded.plan, answer_stores };
            Some((loaded, ready))
        }
        Err(error) => {
            let _ = ready.send(Err(error));
            None
        }
    }
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name(name.to_string())
        .spawn(body)
        .map_err(|e| Error::Internal { reason: format!("thread {name} could not be started: {e}") })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An engine that is not completed takes its worker with it, which holds the model and nobody else could end.
    #[test]
    fn worker_of_an_incomplete_engine_ends() {
        let (model, (commands, taken)) = (Arc::new(()), channel());
        let held = model.clone();
        let thread = spawn("ns-llm-worker", move || {
            while let Ok(command) = taken.recv() {
                if matches!(command, Command::Close) {
                    break;
                }
            }
            drop(held);
        });
        // Another way to the worker stays open, as that of the tiers' threads does.
        let _other = commands.clone();
        drop(StartedWorker::new(commands, thread.expect("starts")));
        assert_eq!(Arc::strong_count(&model), 1, "it has ended");
    }
}
