//! Work that would block: opening and closing an engine run on a thread of their own, text is tokenized on one thread
//! shared by all. libuv's pool is left alone: four loads there would stall every file and DNS operation of the host.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, mpsc};
use std::task::{Context, Poll, Waker};
use std::thread;

use ns_llm::{Error, Result, panic_text};

/// Where a thread leaves its result and JavaScript's thread looks for it.
struct Slot<T> {
    result: Option<Result<T>>,
    waker: Option<Waker>,
}

/// A result that another thread is working on.
pub(crate) struct Pending<T>(Arc<Mutex<Slot<T>>>);

impl<T> Pending<T> {
    fn new() -> (Self, impl FnOnce(Result<T>)) {
        let slot = Arc::new(Mutex::new(Slot { result: None, waker: None }));
        let written = Arc::clone(&slot);
        let settle = move |result| {
            let mut slot = lock(&written);
            slot.result = Some(result);
            let waker = slot.waker.take();
            drop(slot);
            if let Some(waker) = waker {
                waker.wake();
            }
        };
        (Pending(slot), settle)
    }

    /// The result, once; until then `cx` is woken when it is there.
    pub(crate) fn poll(&self, cx: &mut Context<'_>) -> Poll<Result<T>> {
        let mut slot = lock(&self.0);
        match slot.result.take() {
            Some(result) => Poll::Ready(result),
            None => {
                slot.waker = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }
}

/// Runs `work` on a new thread of this name. For what is rare and long.
pub(crate) fn on_own_thread<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Pending<T> {
    let (pending, settle) = Pending::new();
    let settle = Arc::new(Mutex::new(Some(settle)));
    let settled = Arc::clone(&settle);
    let spawned = thread::Builder::new().name(name.into()).spawn(move || {
        let result = caught(work);
        if let Some(settle) = lock(&settled).take() {
            settle(result);
        }
    });
    if let Err(error) = spawned
        && let Some(settle) = lock(&settle).take()
    {
        settle(Err(Error::Internal { reason: format!("no thread could be started: {error}") }));
    }
    pending
}

type Job = Box<dyn FnOnce() + Send>;

/// Texts that may wait for the thread for text; each may have megabytes.
const MAX_WAITING_TEXTS: usize = 256;

/// Runs `work` after what was given before, on the one thread for text.
pub(crate) fn on_text_thread<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Pending<T> {
    static JOBS: OnceLock<mpsc::SyncSender<Job>> = OnceLock::new();
    let jobs = JOBS.get_or_init(|| {
        let (sender, receiver) = mpsc::sync_channel::<Job>(MAX_WAITING_TEXTS);
        // Without the thread the receiver is gone, and each job is answered with the error below.
        let _ = thread::Builder::new().name("ns-llm-text".into()).spawn(move || receiver.iter().for_each(|job| job()));
        sender
    });
    let (pending, settle) = Pending::new();
    let job = move || settle(caught(work));
    let refused = match jobs.try_send(Box::new(job)) {
        Ok(()) => return pending,
        Err(mpsc::TrySendError::Full(_)) => {
            let (waiting, limit) = (MAX_WAITING_TEXTS, MAX_WAITING_TEXTS);
            Error::Overloaded { queue: "texts to tokenize or detokenize", waiting, limit }
        }
        Err(mpsc::TrySendError::Disconnected(_)) => {
            Error::Internal { reason: "the thread for text could not be started".into() }
        }
    };
    let (pending, settle) = Pending::new();
    settle(Err(refused));
    pending
}

/// `work`, with a panic turned into an error: a thread that dies silently would leave its promise unsettled for ever.
pub(crate) fn caught<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|panic| Err(Error::Internal { reason: panic_text(panic.as_ref()) }))
}

/// The lock, whatever happened to a thread that held it: the values behind it are replaced whole, never half.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
