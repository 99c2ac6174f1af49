//! A request on its way through the engine, as the server sees it: it waits for its place, is submitted, read without
//! blocking, counted and paid for; and it is cancelled when nobody wants it any more, by being dropped.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker, ready};
use std::time::{Duration, Instant};

use ns_llm::{Canceller, Embedding, EmbeddingRequest, Error, Event, FinishReason, Priority, Request, RequestStream};
use ns_llm::{EmbeddingInput, Origin, Prompt, Summary, TokenLogprobs};

use crate::admission::Place;
use crate::affinity::prefix_affinity;
use crate::app::{App, Served};
use crate::error::{ApiError, ApiResult};
use crate::keys::Caller;
use crate::metrics::{Kind, Operation, OperationOutcome, millis};
use crate::otlp::EndedRequest;
use crate::patience::Patience;

/// Bytes of text that one token stands for, about.
const BYTES_PER_TOKEN: usize = 4;

/// What is asked of the engine.
pub(crate) enum EngineRequest {
    Generate(Box<Request>),
    Embed(EmbeddingRequest),
}

/// A request that the engine has. Dropping it cancels it.
pub(crate) struct Generation {
    stream: RequestStream,
    ticket: Ticket,
    patience: Patience,
}

/// What is to be settled when a request ends, however it does.
struct Ticket {
    app: Arc<App>,
    caller: Caller,
    model: usize,
    kind: Kind,
    /// How the prompt begins, for those who choose between servers.
    prefix: Option<String>,
    /// Given back when the engine has ended the request: a reader that is slow to take the rest holds up nobody.
    place: HeldPlace,
    /// What its prompt costs a caller who does not wait for the end, tokens; as far as can be told without a tokenizer.
    prompt_estimate: usize,
    /// In the server's list of what can be cancelled.
    number: u64,
    arrived: Instant,
    first_token: Option<Instant>,
    num_tokens: usize,
    reasons: Vec<FinishReason>,
    settled: bool,
}

/// A place at the engine, given back by whoever does so first.
#[derive(Clone)]
struct HeldPlace(Arc<Mutex<Option<Place>>>);

impl HeldPlace {
    fn give_back(&self) {
        // It goes to the next outside of the lock.
        let place = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(place);
    }
}

/// One finished choice.
#[derive(Default)]
pub(crate) struct FinishedChoice {
    pub(crate) text: String,
    pub(crate) token_ids: Vec<u32>,
    pub(crate) logprobs: Vec<TokenLogprobs>,
    pub(crate) reason: Option<FinishReason>,
}

impl EngineRequest {
    fn priority(&mut self) -> &mut Priority {
        match self {
            EngineRequest::Generate(request) => &mut request.priority,
            EngineRequest::Embed(request) => &mut request.priority,
        }
    }

    fn timeout_ms(&mut self) -> &mut Option<u64> {
        match self {
            EngineRequest::Generate(request) => &mut request.timeout_ms,
            EngineRequest::Embed(request) => &mut request.timeout_ms,
        }
    }

    /// How the prompt begins. What a caller adds to its namespace stands behind the name of its key.
    fn prefix(&self, model: &str) -> Option<String> {
        let EngineRequest::Generate(request) = self else { return None };
        let salt = request.namespace.as_deref().and_then(|namespace| namespace.split_once('\n')).map(|(_, salt)| salt);
        Some(prefix_affinity(model, salt, &request.prompt))
    }

    /// Tokens of its prompt, about: text has some four bytes for each.
    fn prompt_estimate(&self) -> usize {
        let of_text = |text: &str| text.len().div_ceil(BYTES_PER_TOKEN);
        match self {
            EngineRequest::Generate(request) => match &request.prompt {
                Prompt::Text(text) => of_text(text),
                Prompt::Tokens(ids) => ids.len(),
                Prompt::Chat(messages) => messages.iter().map(|message| of_text(&message.content)).sum(),
            },
            EngineRequest::Embed(request) => request.inputs.iter().fold(0, |sum, input| {
                sum + match input {
                    EmbeddingInput::Text(text) => of_text(text),
                    EmbeddingInput::Tokens(ids) => ids.len(),
                }
            }),
        }
    }

    /// Ranges are told before anything waits.
    fn validate(&self) -> ApiResult<()> {
        match self {
            EngineRequest::Generate(request) => request.validate()?,
            EngineRequest::Embed(request) => request.validate()?,
        }
        Ok(())
    }
}

/// What the parts of one call have in common until they are submitted.
struct Call<'a> {
    app: &'a Arc<App>,
    caller: &'a Caller,
    model: &'a Served,
    arrived: Instant,
    /// The best of them.
    priority: Priority,
    /// The shortest of them.
    timeout_ms: u64,
}

impl<'a> Call<'a> {
    /// Checks every part, and gives none a better class or a longer time than its caller has.
    fn of(
        app: &'a Arc<App>,
        caller: &'a Caller,
        model: &'a Served,
        requests: &mut [EngineRequest],
    ) -> ApiResult<Call<'a>> {
        let arrived = Instant::now();
        let (mut priority, mut timeout_ms) = (Priority::Background, app.options.request_timeout.as_millis() as u64);
        for request in requests {
            request.validate()?;
            *request.priority() = (*request.priority()).max(caller.best_priority());
            priority = priority.min(*request.priority());
            timeout_ms = request.timeout_ms().map_or(timeout_ms, |wanted| wanted.min(timeout_ms));
        }
        Ok(Call { app, caller, model, arrived, priority, timeout_ms })
    }

    /// Waits for a place, as long as there is time and the engine gets on.
    async fn enter(&self) -> ApiResult<Place> {
        let mut entering = pin!(self.app.admission.enter(self.caller.name(), self.priority));
        let mut patience = Patience::default();
        let entering = poll_fn(|cx| match entering.as_mut().poll(cx) {
            Poll::Ready(place) => Poll::Ready(place),
            Poll::Pending => patience.poll(self.app, self.model.idx, cx).map(Err),
        });
        let left = Duration::from_millis(self.timeout_ms).saturating_sub(self.arrived.elapsed());
        let place = self.app.within(left, entering).await;
        place.ok_or_else(|| ApiError::deadline(self.timeout_ms))?
    }

    /// Gives the engine one part, which holds its place until it has ended there.
    fn submit(&self, mut request: EngineRequest, place: Place) -> ApiResult<Generation> {
        let &Call { app, caller, model, arrived, timeout_ms, .. } = self;
        // A request whose time is over is never computed.
        if arrived.elapsed().as_millis() as u64 >= timeout_ms {
            return Err(ApiError::deadline(timeout_ms));
        }
        // It counts from the arrival: what the queue has taken is not left for the engine.
        *request.timeout_ms() = Some(timeout_ms);
        let origin = Origin { arrived, label: Some(caller.label()) };
        let (prefix, prompt_estimate) = (request.prefix(&model.name), request.prompt_estimate());
        let (kind, mut stream) = match request {
            EngineRequest::Generate(request) => (Kind::Generate, model.engine.submit_from(*request, origin)?),
            EngineRequest::Embed(request) => (Kind::Embed, model.engine.submit_embedding_from(request, origin)?),
        };
        app.metrics.begin();
        let ticket = Ticket {
            number: app.register(stream.canceller()),
            app: app.clone(),
            caller: caller.clone(),
            model: model.idx,
            kind,
            prefix,
            place: HeldPlace(Arc::new(Mutex::new(Some(place)))),
            prompt_estimate,
            arrived,
            first_token: None,
            num_tokens: 0,
            reasons: Vec::new(),
            settled: false,
        };
        let place = ticket.place.clone();
        stream.on_end(move || place.give_back());
        Ok(Generation { stream, ticket, patience: Patience::default() })
    }
}

impl Generation {
    /// Waits for a place and submits.
    pub(crate) async fn start(
        app: &Arc<App>,
        caller: &Caller,
        model: &Served,
        request: EngineRequest,
    ) -> ApiResult<Generation> {
        let mut all = Generation::start_all(app, caller, model, vec![request]).await?;
        all.pop().ok_or_else(|| Error::Closed.into())
    }

    /// Submits everything that one caller asks for at once, each part when it has a place of its own: many prompts of one
    /// request wait for their turns as many requests do. If one part is refused, all are.
    pub(crate) async fn start_all(
        app: &Arc<App>,
        caller: &Caller,
        model: &Served,
        mut requests: Vec<EngineRequest>,
    ) -> ApiResult<Vec<Generation>> {
        let call = Call::of(app, caller, model, &mut requests)?;
        let mut generations = Vec::with_capacity(requests.len());
        for request in requests {
            // Those that were submitted before it give their places back when they have ended, read or not.
            let place = call.enter().await?;
            // What has begun may finish.
            if app.is_stopping() && generations.is_empty() {
                return Err(ApiError::stopping());
            }
            generations.push(call.submit(request, place)?);
        }
        Ok(generations)
    }

    /// What its request is called.
    pub(crate) fn request_id(&self) -> &str {
        &self.ticket.caller.request_id
    }

    /// A handle that cancels it from anywhere.
    pub(crate) fn canceller(&self) -> Canceller {
        self.stream.canceller()
    }

    /// The next event; `None` after the last one.
    pub(crate) fn poll_event(&mut self, cx: &mut Context<'_>) -> Poll<Option<ApiResult<Event>>> {
        match self.stream.poll_next(cx) {
            Poll::Ready(event) => Poll::Ready(event.map(|event| self.ticket.see(event))),
            Poll::Pending => self.poll_stalled(cx).map(|error| Some(Err(error))),
        }
    }

    /// Waits until all events are there. The reader is woken once, at the end.
    async fn ended(&mut self) -> ApiResult<()> {
        poll_fn(|cx| match self.stream.poll_ended(cx) {
            Poll::Ready(()) => Poll::Ready(Ok(())),
            Poll::Pending => self.poll_stalled(cx).map(Err),
        })
        .await
    }

    /// Ready when the engine does nothing any more; the request has then failed.
    fn poll_stalled(&mut self, cx: &mut Context<'_>) -> Poll<ApiError> {
        let error = ready!(self.patience.poll(&self.ticket.app, self.ticket.model, cx));
        self.ticket.settle(OperationOutcome::Failed, None);
        Poll::Ready(error)
    }

    /// Everything about a generation of `n` choices.
    pub(crate) async fn finish(mut self, n: usize) -> ApiResult<(Vec<FinishedChoice>, Summary)> {
        self.ended().await?;
        let mut choices: Vec<FinishedChoice> = (0..n).map(|_| FinishedChoice::default()).collect();
        loop {
            match poll_fn(|cx| self.poll_event(cx)).await.transpose()? {
                Some(Event::Delta(delta)) => {
                    let choice = &mut choices[delta.choice];
                    choice.text.push_str(&delta.text);
                    choice.token_ids.extend(delta.token_ids);
                    choice.logprobs.extend(delta.logprobs);
                }
                Some(Event::Finished { choice, reason }) => choices[choice].reason = Some(reason),
                Some(Event::Done(summary)) => return Ok((choices, summary)),
                Some(_) => {}
                None => return Err(Error::Closed.into()),
            }
        }
    }

    /// Everything about an embedding request of `n` inputs.
    pub(crate) async fn finish_embedding(mut self, n: usize) -> ApiResult<(Vec<Embedding>, Summary)> {
        self.ended().await?;
        let mut embeddings = vec![Embedding::default(); n];
        loop {
            match poll_fn(|cx| self.poll_event(cx)).await.transpose()? {
                Some(Event::Embedding { input, embedding }) => embeddings[input] = embedding,
                Some(Event::Done(summary)) => return Ok((embeddings, summary)),
                Some(_) => {}
                None => return Err(Error::Closed.into()),
            }
        }
    }
}

impl Ticket {
    /// Looks at an event on its way to the reader.
    fn see(&mut self, event: ns_llm::Result<Event>) -> ApiResult<Event> {
        match event {
            Ok(event) => {
                match &event {
                    Event::Delta(delta) => {
                        self.first_token.get_or_insert_with(Instant::now);
                        self.num_tokens += delta.token_ids.len();
                    }
                    Event::Finished { reason, .. } => self.reasons.push(*reason),
                    Event::Done(summary) => self.settle(OperationOutcome::Success, Some(summary)),
                    _ => {}
                }
                Ok(event)
            }
            Err(error) => {
                let is_cancelled = error == Error::Cancelled;
                if is_cancelled || matches!(error, Error::DeadlineExceeded { .. }) {
                    self.charge_prompt();
                }
                self.settle(if is_cancelled { OperationOutcome::Cancelled } else { OperationOutcome::Failed }, None);
                match is_cancelled && self.app.is_stopping() {
                    true => Err(ApiError::stopping()),
                    false => Err(error.into()),
                }
            }
        }
    }

    /// Pays for the prompt of a request that ends before its end. What is refused is not computed, and costs nothing.
    fn charge_prompt(&self) {
        if !self.settled {
            self.caller.charge_tokens(self.prompt_estimate, Instant::now());
        }
    }

    /// Counts and pays, once.
    fn settle(&mut self, outcome: OperationOutcome, summary: Option<&Summary>) {
        if std::mem::replace(&mut self.settled, true) {
            return;
        }
        let now = Instant::now();
        if let (Some(_), Some(prefix)) = (summary, self.prefix.take()) {
            self.app.prefixes.note(self.caller.name(), prefix);
        }
        let usage = summary.map(|summary| summary.usage).unwrap_or_default();
        let tokens = if summary.is_some() { usage.completion_tokens } else { self.num_tokens };
        let since_arrival = |moment: Instant| millis(moment.saturating_duration_since(self.arrived));
        let first_token_ms = match summary {
            Some(summary) if usage.completion_tokens > 0 => Some(summary.timings.first_token_ms),
            Some(_) => None,
            None => self.first_token.map(since_arrival),
        };
        let operation = Operation {
            kind: self.kind,
            outcome,
            started: self.arrived,
            ended: now,
            tokens,
            cached_tokens: usage.cached_tokens,
            first_token_ms,
        };
        if let Some(exporter) = &self.app.exporter {
            let parent = self.caller.trace_parent.as_deref();
            let (model, request_id) = (self.app.models[self.model].name.as_str(), &*self.caller.request_id);
            let name = if self.kind == Kind::Generate { "generate" } else { "embed" };
            let took = now.saturating_duration_since(self.arrived);
            exporter.record(&EndedRequest { name, model, request_id, parent, took, summary }, || self.app.new_id(""));
        }
        self.app.metrics.end(self.model, operation, &self.reasons);
        self.caller.charge_tokens(usage.prompt_tokens + tokens, now);
        self.app.forget(self.number);
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        // What was computed and not read is paid for all the same; and before the engine is told that nobody wants more.
        let mut cx = Context::from_waker(Waker::noop());
        while let Poll::Ready(Some(event)) = self.stream.poll_next(&mut cx) {
            let _ = self.ticket.see(event);
        }
        self.ticket.charge_prompt();
        self.ticket.settle(OperationOutcome::Cancelled, None);
        self.ticket.place.give_back();
    }
}
