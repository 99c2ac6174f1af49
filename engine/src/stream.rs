//! The two ends of one request's events: [`EventSender`] with the worker, [`RequestStream`] with whoever waits for the
//! answer, in a blocking form (an iterator), a polling form and a runtime-neutral async form.
//!
//! Invariants: a stream ends exactly once, with [`Event::Done`] or an error, also when its sender is lost; a slow
//! reader costs no more memory than its answer, because text that nobody has read yet grows in one event per choice;
//! the worker never waits for a reader. Dropping the stream cancels the request.

use std::any::Any;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::request::{Delta, Event};

/// What both ends share. The lock is held for a push or a pop only, by the worker, the intake thread and one reader.
struct Channel {
    state: Mutex<State>,
    /// Signalled when `state` changes; for blocking readers.
    changed: Condvar,
    /// Set by the reader, read by intake and worker: the request shall end.
    cancelled: AtomicBool,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Result<Event>>,
    admitted: bool,
    /// The last event was pushed.
    ended: bool,
    /// Blocking readers that sleep. To notify nobody is a system call all the same.
    num_sleeping: usize,
    /// For the async reader.
    waker: Option<Waker>,
    /// That reader waits for the end, not for the next event.
    waits_for_end: bool,
    /// Called at the end, whether or not anybody reads.
    on_end: Option<Box<dyn FnOnce() + Send>>,
}

impl Channel {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic while the lock is held leaves a queue that is whole: every change below is a single push or pop.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sleeps until the state changes, or the time is over.
    fn sleep<'a>(&self, mut state: MutexGuard<'a, State>, at_most: Option<Duration>) -> MutexGuard<'a, State> {
        state.num_sleeping += 1;
        let mut state = match at_most {
            Some(at_most) => self.changed.wait_timeout(state, at_most).unwrap_or_else(PoisonError::into_inner).0,
            None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
        };
        state.num_sleeping -= 1;
        state
    }
}

/// The writing end. Losing it without [`EventSender::end`] ends the stream with [`EventSender::closed`].
pub struct EventSender {
    channel: Arc<Channel>,
    /// Why the engine ended; set by its worker before it lets go of anything.
    engine_ended: Option<Arc<OnceLock<Error>>>,
}

/// Makes the two ends; `on_cancel` is called (once, on the cancelling thread) when the reader wants no more.
pub fn channel(on_cancel: impl Fn() + Send + Sync + 'static) -> (EventSender, RequestStream) {
    let channel =
        Arc::new(Channel { state: Mutex::default(), changed: Condvar::new(), cancelled: AtomicBool::new(false) });
    let canceller = Canceller { channel: channel.clone(), on_cancel: Arc::new(on_cancel) };
    (EventSender { channel, engine_ended: None }, RequestStream { canceller, _keep_alive: None })
}

impl EventSender {
    /// Of an engine whose worker says there why it ended.
    pub(crate) fn of_engine(mut self, ended: Arc<OnceLock<Error>>) -> EventSender {
        self.engine_ended = Some(ended);
        self
    }

    /// What a request gets that comes too late: why the engine ended, or that it was closed.
    pub fn closed(&self) -> Error {
        self.engine_ended.as_ref().and_then(|ended| ended.get()).cloned().unwrap_or(Error::Closed)
    }

    /// Whether the reader wants no more.
    pub fn is_cancelled(&self) -> bool {
        self.channel.cancelled.load(Ordering::Acquire)
    }

    /// Tells a reader in [`RequestStream::wait_admitted`] that the request will run.
    pub fn admit(&self) {
        self.update(|state| state.admitted = true);
    }

    /// Appends an event; a delta is merged into the unread delta of the same choice, if there is one.
    pub fn send(&self, event: Event) {
        self.update(|state| match event {
            Event::Delta(new) => match unread_delta(&mut state.queue, new.choice) {
                Some(unread) => merge(unread, new),
                None => state.queue.push_back(Ok(Event::Delta(new))),
            },
            event => state.queue.push_back(Ok(event)),
        });
    }

    /// Appends the last event.
    pub fn end(self, last: Result<Event>) {
        self.end_once(last);
    }

    fn end_once(&self, last: Result<Event>) {
        let mut on_end = None;
        self.update(|state| {
            if !state.ended {
                state.ended = true;
                state.queue.push_back(last);
                on_end = state.on_end.take();
            }
        });
        if let Some(on_end) = on_end {
            call(on_end);
        }
    }

    fn update(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.channel.lock();
        change(&mut state);
        let waker = if state.waits_for_end && !state.ended { None } else { state.waker.take() };
        let is_waited_for = state.num_sleeping > 0;
        drop(state);
        if is_waited_for {
            self.channel.changed.notify_all();
        }
        if let Some(waker) = waker {
            wake_or_hold_back(waker);
        }
    }
}

thread_local! {
    /// What this thread will wake at the end of its [`Delivery`]; `None` outside of one.
    static HELD_BACK: RefCell<Option<Vec<Waker>>> = const { RefCell::new(None) };
}

/// While it lives, events sent from this thread wake no polling reader; its end wakes them all. An event loop that reads
/// many streams so runs once per step, and not once per stream, in a race with the rest of the step's events.
pub(crate) struct Delivery {
    /// One inside another changes nothing.
    is_outermost: bool,
}

impl Delivery {
    /// Holds wakers back from now on.
    pub(crate) fn start() -> Self {
        HELD_BACK.with_borrow_mut(|held_back| {
            let is_outermost = held_back.is_none();
            held_back.get_or_insert_default();
            Delivery { is_outermost }
        })
    }
}

impl Drop for Delivery {
    fn drop(&mut self) {
        if self.is_outermost {
            HELD_BACK.take().into_iter().flatten().for_each(wake);
        }
    }
}

fn wake_or_hold_back(waker: Waker) {
    let at_once = HELD_BACK.with_borrow_mut(|held_back| match held_back {
        Some(held_back) => {
            held_back.push(waker);
            None
        }
        None => Some(waker),
    });
    at_once.into_iter().for_each(wake);
}

/// What a reader asked for is foreign code, as a waker is.
fn call(on_end: Box<dyn FnOnce() + Send>) {
    let _ = catch_unwind(AssertUnwindSafe(on_end));
}

/// A waker is foreign code: it runs outside of every lock, and its panic is not the worker's.
fn wake(waker: Waker) {
    let _ = catch_unwind(AssertUnwindSafe(|| waker.wake()));
}

impl Drop for EventSender {
    fn drop(&mut self) {
        // Such as a command that reached a worker which was just leaving.
        self.end_once(Err(self.closed()));
    }
}

/// The delta of `choice` that nobody has read. A choice that has ended gets none, so the search is one per choice.
fn unread_delta(queue: &mut VecDeque<Result<Event>>, choice: usize) -> Option<&mut Delta> {
    queue.iter_mut().rev().find_map(|event| match event {
        Ok(Event::Delta(delta)) if delta.choice == choice => Some(delta),
        _ => None,
    })
}

fn merge(unread: &mut Delta, new: Delta) {
    unread.text.push_str(&new.text);
    unread.token_ids.extend(new.token_ids);
    unread.logprobs.extend(new.logprobs);
}

/// Events of one request, in order. The last item is [`Event::Done`] or an error; after it there is `None` for ever.
/// Dropping it cancels the request.
pub struct RequestStream {
    canceller: Canceller,
    /// Whatever must live as long as the answer is read.
    _keep_alive: Option<Arc<dyn Any + Send + Sync>>,
}

/// Cancels one request from anywhere; cheap to clone. Cancelling twice, or after the end, has no effect.
#[derive(Clone)]
pub struct Canceller {
    channel: Arc<Channel>,
    on_cancel: Arc<dyn Fn() + Send + Sync>,
}

impl Canceller {
    /// Asks for the end; the stream then gives [`Error::Cancelled`] within one step of the engine.
    pub fn cancel(&self) {
        let has_ended = self.channel.lock().ended;
        if !has_ended && !self.channel.cancelled.swap(true, Ordering::AcqRel) {
            (self.on_cancel)();
        }
    }
}

impl RequestStream {
    /// Keeps `engine` alive as long as this stream.
    pub(crate) fn keep_alive(mut self, engine: Arc<dyn Any + Send + Sync>) -> Self {
        self._keep_alive = Some(engine);
        self
    }

    /// Waits for the next event.
    pub fn next_event(&mut self) -> Option<Result<Event>> {
        let mut state = self.channel().lock();
        loop {
            if let Poll::Ready(event) = pop(&mut state) {
                return event;
            }
            state = self.channel().sleep(state, None);
        }
    }

    /// Waits at most `timeout`; `Poll::Pending` when nothing came.
    pub fn next_timeout(&mut self, timeout: Duration) -> Poll<Option<Result<Event>>> {
        // A timeout beyond the clock's range is as good as none.
        let Some(deadline) = Instant::now().checked_add(timeout) else { return Poll::Ready(self.next_event()) };
        let mut state = self.channel().lock();
        loop {
            if let Poll::Ready(event) = pop(&mut state) {
                return Poll::Ready(event);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Poll::Pending;
            }
            state = self.channel().sleep(state, Some(left));
        }
    }

    /// The next event if it is there; otherwise wakes `cx` when there is one. Same contract as `Stream::poll_next`.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Event>>> {
        // Foreign code runs outside the lock: the clone before it, the drop of the last waker after it.
        let waker = cx.waker().clone();
        let mut state = self.channel().lock();
        state.waits_for_end = false;
        let event = pop(&mut state);
        let unused = if event.is_pending() { state.waker.replace(waker) } else { Some(waker) };
        drop(state);
        drop(unused);
        event
    }

    /// Ready when the last event is there, so that all can be taken without waiting; until then `cx` is woken by nothing
    /// else. For readers to whom the parts are no use: one wake-up per request, and not one per step.
    pub fn poll_ended(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let waker = cx.waker().clone();
        let mut state = self.channel().lock();
        let has_ended = state.ended;
        state.waits_for_end = !has_ended;
        let unused = if has_ended { Some(waker) } else { state.waker.replace(waker) };
        drop(state);
        drop(unused);
        if has_ended { Poll::Ready(()) } else { Poll::Pending }
    }

    /// Calls `on_end` once, when the engine has ended the request, whether or not its events were read: from the engine's
    /// thread, so that it must be short; at once when that has happened. A second one takes the place of the first.
    pub fn on_end(&mut self, on_end: impl FnOnce() + Send + 'static) {
        let on_end: Box<dyn FnOnce() + Send> = Box::new(on_end);
        let mut state = self.channel().lock();
        let has_ended = state.ended;
        // The earlier one is foreign code too, and so is its drop.
        let left = if has_ended { Some(on_end) } else { state.on_end.replace(on_end) };
        drop(state);
        if has_ended && let Some(on_end) = left {
            call(on_end);
        }
    }

    /// Waits until the request is admitted or refused; a refusal is the error, and ends the stream.
    pub(crate) fn wait_admitted(&mut self) -> Result<()> {
        let mut state = self.channel().lock();
        while !state.admitted && !state.ended {
            state = self.channel().sleep(state, None);
        }
        if state.admitted {
            return Ok(());
        }
        match state.queue.pop_front() {
            Some(Err(error)) => Err(error),
            _ => Ok(()),
        }
    }

    /// A handle that cancels this request from anywhere.
    pub fn canceller(&self) -> Canceller {
        self.canceller.clone()
    }

    fn channel(&self) -> &Channel {
        &self.canceller.channel
    }
}

fn pop(state: &mut State) -> Poll<Option<Result<Event>>> {
    match state.queue.pop_front() {
        Some(event) => Poll::Ready(Some(event)),
        None if state.ended => Poll::Ready(None),
        None => Poll::Pending,
    }
}

impl Iterator for RequestStream {
    type Item = Result<Event>;
    fn next(&mut self) -> Option<Result<Event>> {
        self.next_event()
    }
}

impl Drop for RequestStream {
    fn drop(&mut self) {
        self.canceller.cancel();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;
    use crate::request::Summary;

    fn delta(choice: usize, text: &str) -> Event {
        Event::Delta(Delta { choice, text: text.to_string(), token_ids: vec![1], ..Delta::default() })
    }

    fn quiet() -> (EventSender, RequestStream) {
        channel(|| ())
    }

    /// Unread deltas of one choice become one event with all text and tokens, also when those of another choice come
    /// between them.
    #[test]
    fn a_slow_reader_gets_merged_deltas() {
        let (sender, mut stream) = quiet();
        for _ in 0..1000 {
            sender.send(delta(0, "a"));
            sender.send(delta(1, "b"));
        }
        sender.end(Ok(Event::Done(Summary::default())));
        let events: Vec<Event> = stream.by_ref().map(|event| event.expect("no error was sent")).collect();
        assert_eq!(events.len(), 3);
        let Event::Delta(first) = &events[0] else { panic!("a delta comes first") };
        assert_eq!((first.text.len(), first.token_ids.len()), (1000, 1000));
        assert!(stream.next_event().is_none(), "after the end there is nothing, for ever");
    }

    /// A sender that is lost ends the stream with an error, exactly once; one that ended it adds nothing.
    #[test]
    fn every_stream_ends_once() {
        let (sender, stream) = quiet();
        drop(sender);
        let events: Vec<_> = stream.collect();
        assert_eq!(events, [Err(Error::Closed)]);
        let (sender, stream) = quiet();
        sender.end(Err(Error::Closed));
        assert_eq!(stream.collect::<Vec<_>>(), [Err(Error::Closed)]);
    }

    /// A sender that is lost after its engine has ended says why the engine ended; before that, that it was closed.
    #[test]
    fn a_late_request_hears_why_the_engine_ended() {
        let ended = Arc::new(OnceLock::new());
        let late = |ended: &Arc<OnceLock<Error>>| {
            let (sender, stream) = quiet();
            drop(sender.of_engine(ended.clone()));
            stream.collect::<Vec<_>>()
        };
        assert_eq!(late(&ended), [Err(Error::Closed)]);
        let lost = Error::DeviceLost { device: "cuda:0".to_string(), reason: "gone".to_string() };
        ended.set(lost.clone()).expect("set once");
        assert_eq!(late(&ended), [Err(lost)]);
    }

    /// Cancelling, by hand or by dropping the stream, is heard once, and not at all after the end.
    #[test]
    fn cancel_is_heard_once() {
        let heard = Arc::new(AtomicUsize::new(0));
        let listen = |heard: &Arc<AtomicUsize>| {
            let heard = heard.clone();
            move || {
                heard.fetch_add(1, Ordering::Relaxed);
            }
        };
        let (sender, stream) = channel(listen(&heard));
        stream.canceller().cancel();
        drop(stream);
        assert_eq!(heard.load(Ordering::Relaxed), 1);
        assert!(sender.is_cancelled());
        let (sender, stream) = channel(listen(&heard));
        sender.end(Err(Error::Closed));
        drop(stream);
        assert_eq!(heard.load(Ordering::Relaxed), 1, "a request that has ended is not cancelled");
    }

    /// The end is told once, to one who reads nothing as well as to one who comes late; its panic harms nobody.
    #[test]
    fn the_end_is_told_without_a_reader() {
        let told = Arc::new(AtomicUsize::new(0));
        let tell = |told: &Arc<AtomicUsize>| {
            let told = told.clone();
            move || {
                told.fetch_add(1, Ordering::Relaxed);
            }
        };
        let (sender, mut stream) = quiet();
        stream.on_end(tell(&told));
        sender.send(delta(0, "unread"));
        assert_eq!(told.load(Ordering::Relaxed), 0);
        sender.end(Ok(Event::Done(Summary::default())));
        assert_eq!(told.load(Ordering::Relaxed), 1);
        stream.on_end(tell(&told));
        assert_eq!(told.load(Ordering::Relaxed), 2, "it had ended");
        let (sender, mut stream) = quiet();
        stream.on_end(|| panic!("a reader's own defect"));
        drop(sender);
        assert_eq!(stream.next_event(), Some(Err(Error::Closed)));
    }

    /// A reader's waker that panics harms nobody else, and a wait beyond the range of the clock is no panic.
    #[test]
    fn foreign_code_is_contained() {
        struct Angry;
        impl std::task::Wake for Angry {
            fn wake(self: Arc<Self>) {
                panic!("a waker's own defect");
            }
        }
        let (sender, mut stream) = quiet();
        let waker = Waker::from(Arc::new(Angry));
        assert!(stream.poll_next(&mut Context::from_waker(&waker)).is_pending());
        sender.send(delta(0, "x"));
        assert!(matches!(stream.next_timeout(Duration::MAX), Poll::Ready(Some(Ok(Event::Delta(_))))));
    }

    /// The async form registers its waker before it answers "pending", so that no event is missed.
    #[test]
    fn poll_wakes_its_reader() {
        struct Count(AtomicUsize);
        impl std::task::Wake for Count {
            fn wake(self: Arc<Self>) {
                self.0.fetch_add(1, Ordering::Relaxed);
            }
        }
        let wakes = Arc::new(Count(AtomicUsize::new(0)));
        let waker = Waker::from(wakes.clone());
        let (sender, mut stream) = quiet();
        assert!(stream.poll_next(&mut Context::from_waker(&waker)).is_pending());
        sender.send(delta(0, "x"));
        assert_eq!(wakes.0.load(Ordering::Relaxed), 1);
        assert!(stream.poll_next(&mut Context::from_waker(&waker)).is_ready());
    }

    /// Who waits for the end is woken by the last event alone, and then finds everything; who polls for the next event
    /// afterwards is woken by that again.
    #[test]
    fn the_end_can_be_waited_for() {
        struct Count(AtomicUsize);
        impl std::task::Wake for Count {
            fn wake(self: Arc<Self>) {
                self.0.fetch_add(1, Ordering::Relaxed);
            }
        }
        let wakes = Arc::new(Count(AtomicUsize::new(0)));
        let waker = Waker::from(wakes.clone());
        let mut cx = Context::from_waker(&waker);
        let (sender, mut stream) = quiet();
        assert!(stream.poll_ended(&mut cx).is_pending());
        sender.send(delta(0, "a"));
        sender.send(delta(0, "b"));
        assert_eq!(wakes.0.load(Ordering::Relaxed), 0, "a part woke the reader");
        assert!(stream.poll_ended(&mut cx).is_pending());
        assert!(stream.poll_next(&mut cx).is_ready() && stream.poll_next(&mut cx).is_pending());
        sender.send(delta(0, "c"));
        assert_eq!(wakes.0.load(Ordering::Relaxed), 1, "the next event was waited for");
        assert!(stream.poll_ended(&mut cx).is_pending());
        sender.end(Ok(Event::Done(Summary::default())));
        assert_eq!(wakes.0.load(Ordering::Relaxed), 2);
        assert!(stream.poll_ended(&mut cx).is_ready());
        assert_eq!(stream.count(), 2);
    }

    /// While a thread delivers, readers are not woken; the end of the outermost delivery wakes each once.
    #[test]
    fn a_delivery_wakes_at_its_end() {
        struct Count(AtomicUsize);
        impl std::task::Wake for Count {
            fn wake(self: Arc<Self>) {
                self.0.fetch_add(1, Ordering::Relaxed);
            }
        }
        let wakes = Arc::new(Count(AtomicUsize::new(0)));
        let waker = Waker::from(wakes.clone());
        let mut ends: Vec<_> = (0..3).map(|_| quiet()).collect();
        for (_, stream) in &mut ends {
            assert!(stream.poll_next(&mut Context::from_waker(&waker)).is_pending());
        }
        let delivery = Delivery::start();
        {
            let _inner = Delivery::start();
            ends.iter().for_each(|(sender, _)| sender.send(delta(0, "x")));
            ends.iter().for_each(|(sender, _)| sender.send(delta(0, "y")));
        }
        assert_eq!(wakes.0.load(Ordering::Relaxed), 0);
        drop(delivery);
        assert_eq!(wakes.0.load(Ordering::Relaxed), 3);
        assert!(ends[0].1.poll_next(&mut Context::from_waker(&waker)).is_ready());
        assert!(ends[0].1.poll_next(&mut Context::from_waker(&waker)).is_pending());
        ends[0].0.send(delta(0, "z"));
        assert_eq!(wakes.0.load(Ordering::Relaxed), 4, "outside of a delivery a reader is woken at once");
    }

    /// A blocking reader on another thread gets the event that is sent later, and a bounded wait gives up.
    #[test]
    fn blocking_readers_wait() {
        let (sender, mut stream) = quiet();
        assert!(stream.next_timeout(Duration::from_millis(1)).is_pending());
        let reader = std::thread::spawn(move || stream.next_event());
        sender.send(delta(0, "late"));
        assert!(matches!(reader.join().expect("the reader does not panic"), Some(Ok(Event::Delta(_)))));
    }
}
