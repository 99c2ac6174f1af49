//! Opening a model and the handle of an open one.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Waker};

use napi::Env;
use napi::bindgen_prelude::{
    Either, FnArgs, Function, FunctionRef, Object, ObjectFinalize, PromiseRaw, Uint32ArraySlice, Unknown,
};
use napi_derive::napi;
use ns_llm::{Engine, EngineOptions, Error, LoadProgress};

use crate::embedding::NativeEmbedding;
use crate::error::{Result, from_napi, to_js};
use crate::event_loop::promise;
use crate::offload::{caught, lock, on_own_thread, on_text_thread};
use crate::request::{read_embedding_request, read_engine_options, read_request, read_text};
use crate::responses::NativeResponses;
use crate::stats::{MemoryUse, ModelInfo, Stats};
use crate::stream::NativeStream;

/// What the loading thread and JavaScript's thread share.
#[derive(Default)]
struct Loading {
    cancelled: AtomicBool,
    /// The newest report, and who waits for it. Reports that came faster than JavaScript runs are skipped.
    report: Mutex<(Option<LoadProgress>, Option<Waker>)>,
}

/// Cancels a load when nobody can receive it any more.
struct CancelOnDrop(Arc<Loading>);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.cancelled.store(true, Ordering::Relaxed);
    }
}

/// A model that is about to be loaded.
#[napi]
pub struct NativeOpening {
    options: Cell<Option<EngineOptions>>,
    loading: Arc<Loading>,
}

type ProgressArgs = FnArgs<(f64, f64)>;

#[napi]
impl NativeOpening {
    /// Checks the types of the options; the engine checks their values.
    #[napi(constructor, catch_unwind)]
    pub fn new(#[napi(ts_arg_type = "Record<string, unknown>")] options: Object) -> Result<Self> {
        Ok(NativeOpening { options: Cell::new(Some(read_engine_options(&options)?)), loading: Arc::default() })
    }

    /// Loads on a thread of its own. `onProgress` hears loaded and total bytes; it must not throw. Works once.
    #[napi(catch_unwind, ts_args_type = "onProgress?: (loadedBytes: number, totalBytes: number) => void")]
    pub fn start<'env>(
        &self,
        env: &'env Env,
        on_progress: Option<Function<'env, ProgressArgs, ()>>,
    ) -> Result<PromiseRaw<'env, NativeEngine>> {
        let Some(options) = self.options.take() else {
            return Err(to_js(&Error::Internal { reason: "start() was called twice".into() }));
        };
        let on_progress = on_progress.map(|f| f.create_ref()).transpose().map_err(from_napi)?;
        let loading = CancelOnDrop(Arc::clone(&self.loading));
        let options = with_reports(options, &self.loading);
        let opening = on_own_thread("ns-llm-open", move || Engine::open(options));
        let poll = move |env: &Env, cx: &mut Context<'_>| {
            if let Some(on_progress) = &on_progress {
                report(env, cx, &loading.0, on_progress);
            }
            opening.poll(cx).map(|engine| engine.map(|engine| NativeEngine::new(env, engine)))
        };
        promise(env, poll).map_err(from_napi)
    }

    /// Ends the load at its next report; the promise then rejects with `cancelled`.
    #[napi(catch_unwind)]
    pub fn cancel(&self) {
        self.loading.cancelled.store(true, Ordering::Relaxed);
    }
}

fn with_reports(options: EngineOptions, loading: &Arc<Loading>) -> EngineOptions {
    let loading = Arc::clone(loading);
    options.on_progress(move |progress| {
        let mut report = lock(&loading.report);
        report.0 = Some(progress);
        let waker = report.1.take();
        drop(report);
        if let Some(waker) = waker {
            waker.wake();
        }
        !loading.cancelled.load(Ordering::Relaxed)
    })
}

/// Passes the newest report on, and asks for the next.
fn report(env: &Env, cx: &mut Context<'_>, loading: &Loading, on_progress: &FunctionRef<ProgressArgs, ()>) {
    let progress = {
        let mut report = lock(&loading.report);
        report.1 = Some(cx.waker().clone());
        report.0.take()
    };
    if let (Some(progress), Ok(function)) = (progress, on_progress.borrow_back(env)) {
        // It fails only when the environment ends: the TypeScript side catches what the user's function throws.
        let _ = function.call((progress.loaded_bytes as f64, progress.total_bytes as f64).into());
    }
}

/// What is left of an engine.
enum State {
    Open(Engine),
    /// On its way to be closed; it still tells what it does and holds.
    Closing(Engine),
    /// What it did.
    Closed(Box<ns_llm::Stats>),
}

/// An engine. It closes when this and all its streams are gone, or by [`NativeEngine::close`].
#[napi(custom_finalize)]
pub struct NativeEngine {
    state: Rc<RefCell<State>>,
    /// Answers that [`NativeEngine::submit_whole`] gave at once.
    num_given_at_once: Cell<u32>,
    /// Bytes that the garbage collector was told of.
    reported_bytes: Rc<Cell<i64>>,
}

impl ObjectFinalize for NativeEngine {
    fn finalize(self, env: Env) -> napi::Result<()> {
        adjust_external_memory(&env, -self.reported_bytes.take());
        release(self.state.replace(State::Closed(Box::default())));
        Ok(())
    }
}

/// Freeing a large vocabulary takes milliseconds, which the event loop should not pay for.
fn release(state: State) {
    if let State::Open(engine) | State::Closing(engine) = state {
        drop(on_own_thread("ns-llm-close", move || {
            drop(engine);
            Ok(())
        }));
    }
}

#[napi]
impl NativeEngine {
    fn new(env: &Env, engine: Engine) -> Self {
        let memory = engine.memory();
        let bytes = i64::try_from(memory.weights_bytes.saturating_add(memory.kv_reserved_bytes)).unwrap_or(i64::MAX);
        adjust_external_memory(env, bytes);
        NativeEngine {
            state: Rc::new(RefCell::new(State::Open(engine))),
            num_given_at_once: Cell::new(0),
            reported_bytes: Rc::new(Cell::new(bytes)),
        }
    }

    pub(crate) fn open_engine(&self) -> Result<Engine> {
        match &*self.state.borrow() {
            State::Open(engine) => Ok(engine.clone()),
            State::Closing(_) | State::Closed(_) => Err(to_js(&Error::Closed)),
        }
    }

    /// Submits a request; never waits.
    #[napi(catch_unwind)]
    pub fn submit(&self, #[napi(ts_arg_type = "Record<string, unknown>")] request: Object) -> Result<NativeStream> {
        let engine = self.open_engine()?;
        let request = read_request(&request)?;
        let events = caught(|| engine.submit(request)).map_err(|error| to_js(&error))?;
        Ok(NativeStream::new(events))
    }

    /// As [`NativeEngine::submit`], for who wants the whole answer and no part of it: one that was kept comes at once, as the
    /// JSON text of its [`NativeBatch`](crate::stream::NativeBatch).
    #[napi(catch_unwind, ts_return_type = "string | NativeStream")]
    pub fn submit_whole(
        &self,
        #[napi(ts_arg_type = "Record<string, unknown>")] request: Object,
    ) -> Result<Either<String, NativeStream>> {
        let stream = self.submit(request)?;
        Ok(match stream.whole_as_json() {
            Some(json) => {
                self.num_given_at_once.set(self.num_given_at_once.get().wrapping_add(1));
                Either::A(json)
            }
            None => Either::B(stream),
        })
    }

    /// How many answers [`NativeEngine::submit_whole`] gave at once.
    #[napi(catch_unwind)]
    pub fn num_given_at_once(&self) -> u32 {
        self.num_given_at_once.get()
    }

    /// Submits inputs to be turned into vectors; never waits.
    #[napi(catch_unwind)]
    pub fn embed(&self, #[napi(ts_arg_type = "Record<string, unknown>")] request: Object) -> Result<NativeEmbedding> {
        let engine = self.open_engine()?;
        let request = read_embedding_request(&request)?;
        let num_inputs = request.inputs.len();
        let events = caught(|| engine.submit_embedding(request)).map_err(|error| to_js(&error))?;
        Ok(NativeEmbedding::new(events, num_inputs))
    }

    /// Tokens of `text`.
    #[napi(catch_unwind)]
    pub fn tokenize<'env>(
        &self,
        env: &'env Env,
        #[napi(ts_arg_type = "string")] text: Unknown<'env>,
        add_special: bool,
    ) -> Result<PromiseRaw<'env, Vec<u32>>> {
        let engine = self.open_engine()?;
        let text = read_text("text", text)?;
        let pending = on_text_thread(move || engine.tokenize(&text, add_special));
        promise(env, move |_, cx| pending.poll(cx)).map_err(from_napi)
    }

    /// Text of `ids`.
    #[napi(catch_unwind)]
    pub fn detokenize<'env>(&self, env: &'env Env, ids: Uint32ArraySlice) -> Result<PromiseRaw<'env, String>> {
        let engine = self.open_engine()?;
        let ids = ids.to_vec();
        let pending = on_text_thread(move || engine.detokenize(&ids));
        promise(env, move |_, cx| pending.poll(cx)).map_err(from_napi)
    }

    /// The bytes that each token stands for; none for an id without a token. A look-up, so it does not wait.
    #[napi(catch_unwind, ts_return_type = "Array<Array<number>>")]
    pub fn token_bytes(&self, ids: Uint32ArraySlice) -> Result<Vec<Vec<u8>>> {
        let engine = self.open_engine()?;
        Ok(ids.iter().map(|&id| engine.token_bytes(id).to_vec()).collect())
    }

    /// The engine's response cache. It stays when the engine is closed, and then keeps nothing.
    #[napi(catch_unwind)]
    pub fn responses(&self) -> Result<NativeResponses> {
        Ok(NativeResponses::of(self.open_engine()?.responses().clone()))
    }

    /// Forgets the KV that is cached for later, but for a store that nodes share.
    #[napi(catch_unwind)]
    pub fn clear_prefix_cache<'env>(&self, env: &'env Env) -> Result<PromiseRaw<'env, ()>> {
        let engine = self.open_engine()?;
        let pending = on_own_thread("ns-llm-clear", move || engine.clear_prefix_cache());
        promise(env, move |_, cx| pending.poll(cx)).map_err(from_napi)
    }

    /// Waits until the KV that was computed so far is on disk.
    #[napi(catch_unwind)]
    pub fn flush<'env>(&self, env: &'env Env) -> Result<PromiseRaw<'env, ()>> {
        let engine = self.open_engine()?;
        let pending = on_own_thread("ns-llm-flush", move || engine.flush());
        promise(env, move |_, cx| pending.poll(cx)).map_err(from_napi)
    }

    /// What is loaded.
    #[napi(catch_unwind)]
    pub fn info(&self) -> Result<ModelInfo> {
        Ok(self.open_engine()?.info().into())
    }

    /// What was done so far; after `close`, what was done in all.
    #[napi(catch_unwind)]
    pub fn stats(&self) -> Result<Stats> {
        Ok(match &*self.state.borrow() {
            State::Open(engine) | State::Closing(engine) => engine.stats().into(),
            State::Closed(stats) => (**stats).clone().into(),
        })
    }

    /// Whether it takes requests: it is neither closed nor ended by a defect.
    #[napi(catch_unwind)]
    pub fn is_healthy(&self) -> bool {
        matches!(&*self.state.borrow(), State::Open(engine) if engine.health().is_ok())
    }

    /// Bytes held; after `close`, none.
    #[napi(catch_unwind)]
    pub fn memory(&self) -> Result<MemoryUse> {
        Ok(match &*self.state.borrow() {
            State::Open(engine) | State::Closing(engine) => engine.memory().into(),
            State::Closed(_) => ns_llm::MemoryUse::default().into(),
        })
    }

    /// Bytes outside its heap that JavaScript's garbage collector knows of, those of other addons included.
    #[napi(catch_unwind)]
    pub fn external_memory(env: &Env) -> Result<f64> {
        env.adjust_external_memory(0).map(|bytes| bytes as f64).map_err(from_napi)
    }

    /// Ends every request with `closed` and frees the model. Idempotent.
    #[napi(catch_unwind)]
    pub fn close<'env>(&self, env: &'env Env) -> Result<PromiseRaw<'env, ()>> {
        let engine = self.start_closing();
        let state = Rc::clone(&self.state);
        let reported_bytes = Rc::clone(&self.reported_bytes);
        let pending = on_own_thread("ns-llm-close", move || {
            Ok(engine.map(|engine| {
                engine.close();
                engine.stats()
            }))
        });
        let poll = move |env: &Env, cx: &mut Context<'_>| {
            pending.poll(cx).map_ok(|stats| {
                if let Some(stats) = stats {
                    release(state.replace(State::Closed(Box::new(stats))));
                }
                adjust_external_memory(env, -reported_bytes.take());
            })
        };
        promise(env, poll).map_err(from_napi)
    }

    /// The engine, when it is still to be closed. A second `close` waits for the same end.
    fn start_closing(&self) -> Option<Engine> {
        let mut state = self.state.borrow_mut();
        let engine = match &*state {
            State::Open(engine) | State::Closing(engine) => engine.clone(),
            State::Closed(_) => return None,
        };
        *state = State::Closing(engine.clone());
        Some(engine)
    }
}

/// Tells the garbage collector about memory that it does not see. A failure changes only its timing.
fn adjust_external_memory(env: &Env, bytes: i64) {
    if bytes != 0 {
        let _ = env.adjust_external_memory(bytes);
    }
}
