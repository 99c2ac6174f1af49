//! The engine's handle: open, submit, close, ask. What it hands out is decided elsewhere: a request goes to the intake
//! thread, from there to the worker, and comes back through its stream.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::{JoinHandle, ThreadId};
use std::time::{Duration, Instant};

use ns_llm_kernels::host::return_free_memory;

use crate::command::{Command, Pending, RequestId, Submission, Work};
use crate::config::{EngineOptions, FLUSH_MS, MAX_TRACE_EVENTS, at_most};
use crate::device::{CudaDevices, MachineDevices};
use crate::embedding::{EmbeddingRequest, Embeddings};
use crate::error::{Error, Result};
use crate::instruments::Instruments;
use crate::intake::{check_embedding_request, check_request_token_ids, replay};
use crate::memory_plan::MemoryPlan;
use crate::open;
use crate::request::{Embedding, Event, FinishReason, Origin, Request, Summary, TokenLogprobs};
use crate::responses::Responses;
use crate::sampler::check_token_ids;
use crate::stats::{MemoryUse, ModelInfo, RunningStep, Stats};
use crate::stream::{RequestStream, channel};
use crate::text_model::TextModel;

/// A model, ready to answer. Cheap to clone, `Send + Sync`. It closes when its last clone and the last stream are
/// dropped, or when [`Engine::close`] is called.
#[derive(Clone)]
pub struct Engine {
    inner: Arc<Inner>,
}

/// What all clones share. Handles only; the model itself belongs to the worker thread.
struct Inner {
    commands: Sender<Command>,
    /// `None` once closed. Locked for a `try_send`; callers of any thread.
    submissions: Mutex<Option<SyncSender<Submission>>>,
    text: Arc<TextModel>,
    responses: Responses,
    info: ModelInfo,
    plan: MemoryPlan,
    instruments: Arc<Instruments>,
    /// Why the worker ended; set by it.
    ended: Arc<OnceLock<Error>>,
    is_closing: Arc<AtomicBool>,
    pending: Arc<Pending>,
    /// Worker and intake. Taken by the first `close`, which holds the lock while it waits, so that a second one waits too.
    threads: Mutex<Vec<JoinHandle<()>>>,
    thread_ids: [ThreadId; 2],
    next_request: AtomicU64,
}

/// One finished answer of [`Engine::complete`].
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// The text, without the prompt.
    pub text: String,
    /// Its tokens, the stop token included.
    pub token_ids: Vec<u32>,
    /// One entry per token when asked for.
    pub logprobs: Vec<TokenLogprobs>,
    /// Why it ended.
    pub finish_reason: FinishReason,
}

/// What [`Engine::warm`] did, tokens of prompts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Warmed {
    /// Computed: their KV is cached now.
    pub computed_tokens: usize,
    /// Found in the cache.
    pub cached_tokens: usize,
}

/// Everything about a finished request.
#[derive(Debug, Clone, PartialEq)]
pub struct Completion {
    /// The answers, by choice.
    pub choices: Vec<Choice>,
    /// Counts and times.
    pub summary: Summary,
}

impl Warmed {
    /// Waits for a prompt and counts it.
    fn add(&mut self, stream: RequestStream) -> Result<()> {
        for event in stream {
            if let Event::Done(Summary { usage, .. }) = event? {
                self.computed_tokens += usage.prompt_tokens - usage.cached_tokens;
                self.cached_tokens += usage.cached_tokens;
            }
        }
        Ok(())
    }
}

impl Engine {
    /// Loads a model and starts its worker. Blocks until it can answer; see
    /// [`EngineOptions::on_progress`] to watch or cancel.
    pub fn open(options: EngineOptions) -> Result<Engine> {
        Engine::open_among(options, MachineDevices)
    }

    /// The same with these CUDA devices instead of the machine's own: for tests.
    #[doc(hidden)]
    pub fn open_among(options: EngineOptions, devices: impl CudaDevices + 'static) -> Result<Engine> {
        let max_waiting_requests = options.max_waiting_requests;
        let running = open::start(options, devices)?;
        let inner = Inner {
            commands: running.commands,
            submissions: Mutex::new(Some(running.submissions)),
            pending: Pending::new(max_waiting_requests),
            is_closing: running.is_closing,
            thread_ids: [running.worker.thread().id(), running.intake.thread().id()],
            threads: Mutex::new(vec![running.worker, running.intake]),
            text: running.text,
            responses: running.responses,
            info: running.info,
            plan: running.plan,
            instruments: running.instruments,
            ended: running.ended,
            next_request: AtomicU64::new(0),
        };
        Ok(Engine { inner: Arc::new(inner) })
    }

    /// Submits a request and waits until it is admitted (tokenized, checked, queued): every fault of the request is an
    /// error here. Its tokens arrive through the stream.
    pub fn generate(&self, request: Request) -> Result<RequestStream> {
        let mut stream = self.submit(request)?;
        stream.wait_admitted()?;
        Ok(stream)
    }

    /// Submits a request without waiting: never blocks and never does more than check ranges. Faults that need the
    /// tokenizer or the template arrive as the stream's error. This is what an event loop calls.
    pub fn submit(&self, request: Request) -> Result<RequestStream> {
        self.submit_from(request, Origin::default())
    }

    /// The same for a request that has waited elsewhere before, or that has a name there: its times, its deadline and what is
    /// recorded of it begin with its arrival.
    pub fn submit_from(&self, request: Request, origin: Origin) -> Result<RequestStream> {
        request.validate()?;
        let info = &self.inner.info;
        check_request_token_ids(&request, info.vocab_size)?;
        if !info.can_generate {
            return Err(Error::NotSupported { feature: "generate text", architecture: info.architecture.clone() });
        }
        match self.recall(&request, &origin) {
            Some(stream) => Ok(stream),
            None => self.submit_work(Work::Generate(Box::new(request)), origin),
        }
    }

    /// What an equal request was answered before, if that is kept: all of it is there at once.
    fn recall(&self, request: &Request, origin: &Origin) -> Option<RequestStream> {
        // Who is closed says so where requests are queued.
        self.health().ok()?;
        let answer = self.inner.responses.recall(request, self.inner.info.vocab_size)?;
        let (sender, stream) = channel(|| ());
        replay(sender, answer, request.sampling.seed, origin.arrived, &self.inner.instruments.meters);
        Some(stream.keep_alive(self.inner.clone()))
    }

    /// Submits inputs to be turned into vectors, without waiting. Each comes as an [`Event::Embedding`], in any order.
    /// Faults that need the tokenizer arrive as the stream's error.
    pub fn submit_embedding(&self, request: EmbeddingRequest) -> Result<RequestStream> {
        self.submit_embedding_from(request, Origin::default())
    }

    /// The same for a request from elsewhere, as [`Engine::submit_from`].
    pub fn submit_embedding_from(&self, request: EmbeddingRequest, origin: Origin) -> Result<RequestStream> {
        request.validate()?;
        check_embedding_request(&request, self.inner.info.vocab_size, self.inner.info.embedding_dimensions)?;
        self.submit_work(Work::Embed(request), origin)
    }

    fn submit_work(&self, work: Work, origin: Origin) -> Result<RequestStream> {
        let slot = self.inner.pending.take(&work)?;
        let id = RequestId(self.inner.next_request.fetch_add(1, Ordering::Relaxed));
        let commands = self.inner.commands.clone();
        let (sender, stream) = channel(move || {
            let _ = commands.send(Command::Cancel(id));
        });
        let sender = sender.of_engine(self.inner.ended.clone());
        self.inner.enqueue(Submission { id, work, sender, origin, slot })?;
        // An answer outlives the handle that asked for it.
        Ok(stream.keep_alive(self.inner.clone()))
    }

    /// Submits a request and waits for all of it.
    pub fn complete(&self, request: Request) -> Result<Completion> {
        let empty = Choice {
            text: String::new(),
            token_ids: Vec::new(),
            logprobs: Vec::new(),
            finish_reason: FinishReason::Length,
        };
        // `n` is within its range once the request is accepted.
        let num_choices = request.n;
        let stream = self.generate(request)?;
        let mut choices = vec![empty; num_choices];
        for event in stream {
            match event? {
                Event::Delta(delta) => {
                    let choice = &mut choices[delta.choice];
                    choice.text.push_str(&delta.text);
                    choice.token_ids.extend(delta.token_ids);
                    choice.logprobs.extend(delta.logprobs);
                }
                Event::Finished { choice, reason } => choices[choice].finish_reason = reason,
                Event::Embedding { .. } => unreachable!("a generation has no vectors"),
                Event::Done(summary) => return Ok(Completion { choices, summary }),
            }
        }
        Err(Error::Closed)
    }

    /// Computes the prompts of `requests` and nothing else, so that their KV is cached for whoever asks next: as many at a
    /// time as the queue takes. The first error ends it, with what is done by then.
    pub fn warm(&self, requests: impl IntoIterator<Item = Request>) -> Result<Warmed> {
        let mut warmed = Warmed::default();
        let mut streams = VecDeque::new();
        for mut request in requests {
            (request.max_tokens, request.n, request.logprobs, request.prompt_logprobs) = (Some(0), 1, None, false);
            let mut admitted = self.generate(request.clone());
            while let Err(Error::Overloaded { .. }) = admitted {
                let Some(first) = streams.pop_front() else { break };
                warmed.add(first)?;
                admitted = self.generate(request.clone());
            }
            streams.push_back(admitted?);
        }
        streams.into_iter().try_for_each(|stream| warmed.add(stream)).map(|()| warmed)
    }

    /// Turns inputs into vectors and waits for all of them. Any model can: one that was made for it, or a decoder, whose
    /// final states are averaged.
    pub fn embed(&self, request: EmbeddingRequest) -> Result<Embeddings> {
        let num_inputs = request.inputs.len();
        let stream = self.submit_embedding(request)?;
        let mut embeddings = vec![Embedding::default(); num_inputs];
        for event in stream {
            match event? {
                Event::Embedding { input, embedding } => embeddings[input] = embedding,
                Event::Done(summary) => return Ok(Embeddings { embeddings, summary }),
                Event::Delta(_) | Event::Finished { .. } => unreachable!("vectors have no text"),
            }
        }
        Err(Error::Closed)
    }

    /// Tokens of `text`; `add_special` adds what the tokenizer's configuration puts around a prompt.
    pub fn tokenize(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        self.inner.text.tokenizer.encode(text, add_special)
    }

    /// Text of `ids`, that of special tokens too; bytes that are not UTF-8 become U+FFFD.
    pub fn detokenize(&self, ids: &[u32]) -> Result<String> {
        check_token_ids("ids", ids.iter().copied(), self.inner.info.vocab_size)?;
        Ok(self.inner.text.tokenizer.decode(ids, false))
    }

    /// The bytes that a token stands for; empty for an id that has no token. Several tokens may make one character.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.inner.text.tokenizer.token_bytes(id)
    }

    /// What is loaded.
    pub fn info(&self) -> &ModelInfo {
        &self.inner.info
    }

    /// What was done so far.
    pub fn stats(&self) -> Stats {
        let mut stats = self.inner.instruments.stats();
        stats.num_requests_preparing = self.inner.pending.num_requests();
        // The worker never hears of requests that the response cache answers.
        let answered = self.inner.responses.answers();
        stats.requests_total += answered;
        stats.requests_finished += answered;
        stats
    }

    /// The step that is being computed now, if one is: how long already, beside how long it should take. For those who watch
    /// whether the engine gets on.
    pub fn running_step(&self) -> Option<RunningStep> {
        self.inner.instruments.pace.running(Instant::now())
    }

    /// Begins to record what the engine does: steps, what each request gets of them, the tiers' jobs. At most `max_events` of
    /// these are kept, the rest is counted. False, and nothing changes, while a recording runs.
    pub fn start_trace(&self, max_events: usize) -> Result<bool> {
        at_most("max_events", max_events, MAX_TRACE_EVENTS)?;
        Ok(self.inner.instruments.tracer.start(max_events))
    }

    /// Ends the recording and gives it as Chrome's trace events (JSON), which `chrome://tracing` and Perfetto show; `None` when
    /// nothing was recorded.
    pub fn stop_trace(&self) -> Option<String> {
        self.inner.instruments.tracer.stop()
    }

    /// The response cache: what it holds, what is to be forgotten, and values of the caller's own.
    pub fn responses(&self) -> &Responses {
        &self.inner.responses
    }

    /// Whether it takes requests; the error is what the next one would get, such as the defect that ended the worker.
    pub fn health(&self) -> Result<()> {
        match self.inner.ended.get() {
            Some(error) => Err(error.clone()),
            None if self.inner.is_closing.load(Ordering::Acquire) => Err(Error::Closed),
            None => Ok(()),
        }
    }

    /// Bytes held.
    pub fn memory(&self) -> MemoryUse {
        if self.inner.ended.get().is_some() {
            return MemoryUse::default();
        }
        let stats = self.stats();
        MemoryUse {
            weights_bytes: self.inner.plan.weights_bytes,
            kv_reserved_bytes: stats.kv_blocks_total as u64 * self.inner.plan.block_bytes,
            kv_used_bytes: stats.kv_blocks_used as u64 * self.inner.plan.block_bytes,
            kv_cached_bytes: stats.kv_blocks_cached as u64 * self.inner.plan.block_bytes,
            response_cache_bytes: self.inner.responses.stats().bytes,
        }
    }

    /// Waits until the KV blocks that were computed so far are on disk, where they outlive a failure of power, as far as the
    /// engine has a directory for them and the directory's budget goes, and answers that are kept beside them; at most
    /// [`FLUSH_MS`]. [`Error::Storage`] when a tier could not do that now. [`Error::NotStored`] when some of what was to be
    /// stored since the last flush was not: too much waited to be written, the tier failed or may not be written. That is told
    /// once, all else is stored, and nothing needs to be done: a cache may forget.
    pub fn flush(&self) -> Result<()> {
        let deadline = Instant::now() + Duration::from_millis(FLUSH_MS);
        let kv = self.ask_worker(Command::Flush);
        // What KV could not do, answers may.
        kv.and(self.inner.responses.flush(deadline)).and_then(|()| self.inner.responses.check_stored())
    }

    /// Forgets the KV that is cached for later: in the pool, in host memory and in the files of a directory, for all
    /// namespaces, and for every model that has used the directory. Nothing of it is found any more when this returns.
    /// Requests that run keep what they hold, and what is computed from now on is cached again. A store that nodes share is
    /// left as it is: what is in it ends with its time. [`Error::Storage`] when the files could not be removed: this engine
    /// does not use them until they are, another might.
    pub fn clear_prefix_cache(&self) -> Result<()> {
        self.ask_worker(Command::Clear)
    }

    /// Asks the worker for something that takes a tier's time, at most [`FLUSH_MS`].
    fn ask_worker(&self, command: fn(SyncSender<Result<()>>) -> Command) -> Result<()> {
        let (reply, done) = sync_channel(1);
        self.inner.commands.send(command(reply)).map_err(|_| self.inner.closed())?;
        match done.recv_timeout(Duration::from_millis(FLUSH_MS)) {
            Ok(result) => result,
            Err(RecvTimeoutError::Timeout) => Err(Error::DeadlineExceeded { timeout_ms: FLUSH_MS }),
            Err(RecvTimeoutError::Disconnected) => Err(self.inner.closed()),
        }
    }

    /// Ends every request with [`Error::Closed`], stops the worker and frees the model. Blocks until that is done (about
    /// one step, and what a disk needs to take the KV blocks that wait for it); idempotent; all clones are closed.
    pub fn close(&self) {
        self.inner.request_close();
        // A reader's waker may run on one of the engine's own threads, which cannot wait for its own end.
        if self.inner.thread_ids.contains(&std::thread::current().id()) {
            return;
        }
        let mut threads = self.inner.threads.lock().unwrap_or_else(PoisonError::into_inner);
        for handle in threads.drain(..) {
            // They catch panics; their results say nothing more.
            let _ = handle.join();
        }
        self.inner.responses.close();
        return_free_memory();
    }
}

impl Inner {
    fn enqueue(&self, submission: Submission) -> Result<()> {
        let submissions = self.submissions.lock().unwrap_or_else(PoisonError::into_inner);
        match (self.ended.get(), submissions.as_ref()) {
            (Some(error), _) => Err(error.clone()),
            (None, None) => Err(Error::Closed),
            // The channel has room for every pending slot, so a failure means that intake is gone.
            (None, Some(submissions)) => submissions.try_send(submission).map_err(|_| self.closed()),
        }
    }

    /// Why the worker ended, or that this handle was closed.
    fn closed(&self) -> Error {
        self.ended.get().cloned().unwrap_or(Error::Closed)
    }

    fn request_close(&self) {
        self.is_closing.store(true, Ordering::Release);
        self.submissions.lock().unwrap_or_else(PoisonError::into_inner).take();
        let _ = self.commands.send(Command::Close);
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Not joined: the last handle may be dropped where nothing may block, such as an event loop.
        self.request_close();
        self.responses.begin_close();
    }
}
