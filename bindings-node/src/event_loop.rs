//! Promises and callbacks on JavaScript's thread: a small executor whose tasks are polled there and woken from anywhere.
//!
//! Each environment (main thread or worker) has one thread-safe function for all its tasks. A waker puts its task's
//! number into the mailbox and calls that function when the mailbox was empty, so a step that gives tokens to 32 streams
//! costs the event loop one wake-up. There is no thread per stream and no busy polling.
//!
//! Invariants:
//! * Other threads call the function only under the lock of `function` and only while that is set. The environment's
//!   cleanup hook unsets it, and hooks run last added first, so this happens before Node frees the function: a thread of
//!   the engine can outlive the environment, but never call into a freed one.
//! * JavaScript's thread takes that lock at the teardown only. The call wakes it while the lock is still held, so that it
//!   would otherwise go to sleep again at each wake-up.
//! * The function keeps the process alive exactly while a task is pending.
//! * A task that panics ends with an error; nothing unwinds into Node.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};

use napi::bindgen_prelude::{Function, JsValuesTupleIntoVec, PromiseRaw, ToNapiValue};
use napi::{Env, JsError, JsValue, check_status, sys};
use ns_llm::{Error, Result};

use crate::error::to_js;
use crate::offload::{caught, lock};

thread_local! {
    /// The loops of this thread by environment; an environment is in here from its first promise to its teardown.
    static LOOPS: RefCell<HashMap<sys::napi_env, Rc<EventLoop>>> = RefCell::default();
}

/// A promise that is settled when `poll` is ready. `poll` runs on JavaScript's thread, first at once, then after each
/// wake-up; it must not block. A pending promise keeps the process alive.
pub(crate) fn promise<'env, T, P>(env: &'env Env, mut poll: P) -> napi::Result<PromiseRaw<'env, T>>
where
    T: ToNapiValue + 'static,
    P: FnMut(&Env, &mut Context<'_>) -> Poll<Result<T>> + 'static,
{
    let event_loop = EventLoop::of(env.raw())?;
    let (mut deferred, mut value) = (ptr::null_mut(), ptr::null_mut());
    // SAFETY: the environment is alive, since JavaScript is calling us; both out-parameters live on this frame.
    check_status!(unsafe { sys::napi_create_promise(env.raw(), &mut deferred, &mut value) })?;
    let advance = move |env: &Env, cx: &mut Context<'_>| match poll(env, cx) {
        Poll::Pending => Poll::Pending,
        Poll::Ready(outcome) => {
            settle(env.raw(), deferred, outcome);
            Poll::Ready(())
        }
    };
    event_loop.start(Task { listener: Listener::Promise(deferred), advance: Box::new(advance) });
    Ok(PromiseRaw::new(env.raw(), value))
}

/// As [`promise`], but calls `function` with `null` and the values, or with an error: per token, a call and its arguments
/// cost a fraction of a promise and an object. It may be called before this returns. It must not throw.
pub(crate) fn callback<A, P>(env: &Env, function: &Function<'_, A, ()>, mut poll: P) -> napi::Result<()>
where
    A: JsValuesTupleIntoVec + 'static,
    P: FnMut(&Env, &mut Context<'_>) -> Poll<Result<A>> + 'static,
{
    let event_loop = EventLoop::of(env.raw())?;
    let callback = Rc::new(Callback::new(env, function)?);
    let listener = Listener::Callback(Rc::clone(&callback));
    let advance = move |env: &Env, cx: &mut Context<'_>| match poll(env, cx) {
        Poll::Pending => Poll::Pending,
        Poll::Ready(outcome) => {
            callback.call(outcome);
            Poll::Ready(())
        }
    };
    event_loop.start(Task { listener, advance: Box::new(advance) });
    Ok(())
}

/// What is pending, and who hears of its end.
struct Task {
    listener: Listener,
    advance: Advance,
}

enum Listener {
    Promise(sys::napi_deferred),
    Callback(Rc<Callback>),
}

impl Listener {
    /// Tells of a task that ended in a panic.
    fn fail(&self, env: sys::napi_env, error: Error) {
        match self {
            Listener::Promise(deferred) => settle::<()>(env, *deferred, Err(error)),
            Listener::Callback(callback) => callback.call::<()>(Err(error)),
        }
    }
}

/// Polls, and tells the listener when ready.
type Advance = Box<dyn FnMut(&Env, &mut Context<'_>) -> Poll<()>>;

/// All pending tasks of one environment. Lives on its thread.
struct EventLoop {
    env: sys::napi_env,
    /// `None` once the environment is being torn down.
    function: Cell<Option<WakeFunction>>,
    mailbox: Arc<Mailbox>,
    tasks: RefCell<HashMap<u64, Task>>,
    /// Tasks that are not settled, the one being polled included.
    num_pending: Cell<usize>,
    next_id: Cell<u64>,
}

impl EventLoop {
    fn of(env: sys::napi_env) -> napi::Result<Rc<EventLoop>> {
        if let Some(event_loop) = LOOPS.with_borrow(|loops| loops.get(&env).cloned()) {
            return Ok(event_loop);
        }
        let function = create_function(env)?;
        // SAFETY: the environment is alive; the hook's argument is only compared, never read.
        check_status!(unsafe { sys::napi_add_env_cleanup_hook(env, Some(on_teardown), env.cast()) })?;
        let mailbox = Mailbox { woken: Mutex::default(), function: Mutex::new(Some(function)) };
        let event_loop = Rc::new(EventLoop {
            env,
            function: Cell::new(Some(function)),
            mailbox: Arc::new(mailbox),
            tasks: RefCell::default(),
            num_pending: Cell::new(0),
            next_id: Cell::new(0),
        });
        LOOPS.with_borrow_mut(|loops| loops.insert(env, Rc::clone(&event_loop)));
        Ok(event_loop)
    }

    fn start(&self, task: Task) {
        let id = self.next_id.replace(self.next_id.get() + 1);
        if self.num_pending.replace(self.num_pending.get() + 1) == 0 {
            self.keep_alive(true);
        }
        self.advance(id, task);
    }

    /// Polls one task. It is outside the table meanwhile, so it may call JavaScript, which may start another.
    fn advance(&self, id: u64, mut task: Task) {
        let waker = Waker::from(Arc::new(TaskWaker { id, mailbox: Arc::clone(&self.mailbox) }));
        let env = Env::from_raw(self.env);
        let polled = caught(|| Ok((task.advance)(&env, &mut Context::from_waker(&waker))));
        match polled {
            Ok(Poll::Pending) => {
                self.tasks.borrow_mut().insert(id, task);
                return;
            }
            Ok(Poll::Ready(())) => {}
            Err(error) => task.listener.fail(self.env, error),
        }
        self.num_pending.set(self.num_pending.get() - 1);
        if self.num_pending.get() == 0 {
            self.keep_alive(false);
        }
    }

    fn run_woken(&self) {
        let woken = std::mem::take(&mut *lock(&self.mailbox.woken));
        for id in woken {
            // A task may be woken twice, or just after it was settled.
            let task = self.tasks.borrow_mut().remove(&id);
            if let Some(task) = task {
                self.advance(id, task);
            }
        }
    }

    fn keep_alive(&self, keep: bool) {
        let Some(function) = self.function.get() else { return };
        // SAFETY: this is the environment's own thread, and the function is set, so it is not freed. A failure would
        // only mean that the process ends too early or too late.
        unsafe {
            if keep {
                sys::napi_ref_threadsafe_function(self.env, function.0);
            } else {
                sys::napi_unref_threadsafe_function(self.env, function.0);
            }
        }
    }
}

/// Numbers of woken tasks, on their way to JavaScript's thread.
struct Mailbox {
    /// Locked by wakers (any thread) for one push and by JavaScript's thread for one swap.
    woken: Mutex<Vec<u64>>,
    /// `None` once the environment is being torn down. Locked by wakers for a call and by JavaScript's thread to unset it.
    function: Mutex<Option<WakeFunction>>,
}

#[derive(Clone, Copy)]
struct WakeFunction(sys::napi_threadsafe_function);

// SAFETY: being called from any thread is what a thread-safe function is for; its life is guarded by the mailbox.
unsafe impl Send for WakeFunction {}

struct TaskWaker {
    id: u64,
    mailbox: Arc<Mailbox>,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        let is_first = {
            let mut woken = lock(&self.mailbox.woken);
            woken.push(self.id);
            woken.len() == 1
        };
        if !is_first {
            return;
        }
        if let Some(function) = *lock(&self.mailbox.function) {
            // SAFETY: the function is set and the lock is held, so the teardown hook has not run: it is alive.
            // Non-blocking on an unbounded queue: it fails only when the environment closes, and then nobody listens.
            unsafe {
                sys::napi_call_threadsafe_function(
                    function.0,
                    ptr::null_mut(),
                    sys::ThreadsafeFunctionCallMode::nonblocking,
                )
            };
        }
    }
}

/// The thread-safe function that runs [`on_wake`], not keeping the process alive yet.
fn create_function(env: sys::napi_env) -> napi::Result<WakeFunction> {
    let (mut name, mut function) = (ptr::null_mut(), ptr::null_mut());
    let text = "ns-llm";
    // SAFETY: the environment is alive; the text is as long as is said; the out-parameters live on this frame. No
    // JavaScript function is given, so Node calls `on_wake` alone.
    unsafe {
        check_status!(sys::napi_create_string_utf8(env, text.as_ptr().cast(), text.len() as isize, &mut name))?;
        check_status!(sys::napi_create_threadsafe_function(
            env,
            ptr::null_mut(),
            ptr::null_mut(),
            name,
            0,
            1,
            ptr::null_mut(),
            None,
            ptr::null_mut(),
            Some(on_wake),
            &mut function,
        ))?;
        check_status!(sys::napi_unref_threadsafe_function(env, function))?;
    }
    Ok(WakeFunction(function))
}

/// Called by Node on JavaScript's thread, at some time after a waker asked for it.
unsafe extern "C" fn on_wake(
    env: sys::napi_env,
    _function: sys::napi_value,
    _context: *mut c_void,
    _data: *mut c_void,
) {
    // Node passes no environment while it drains the queue of one that ends.
    if env.is_null() {
        return;
    }
    let event_loop = LOOPS.with_borrow(|loops| loops.get(&env).cloned());
    if let Some(event_loop) = event_loop {
        let _ = catch_unwind(AssertUnwindSafe(|| event_loop.run_woken()));
    }
}

/// Called by Node when the environment ends, before it frees the thread-safe function. Pending tasks are dropped: their
/// streams cancel, their promises stay pending, as all promises of an ended environment do.
unsafe extern "C" fn on_teardown(env: *mut c_void) {
    let Some(event_loop) = LOOPS.with_borrow_mut(|loops| loops.remove(&env.cast())) else { return };
    event_loop.function.set(None);
    let function = lock(&event_loop.mailbox.function).take();
    if let Some(function) = function {
        // SAFETY: hooks run last added first, so Node's own, which frees the function, is still to come; no other
        // thread can reach the function any more.
        unsafe { sys::napi_release_threadsafe_function(function.0, sys::ThreadsafeFunctionReleaseMode::abort) };
    }
    let _ = catch_unwind(AssertUnwindSafe(|| event_loop.tasks.take()));
}

/// Settles a promise, once. Statuses are not looked at: they fail only when the environment ends.
fn settle<T: ToNapiValue>(env: sys::napi_env, deferred: sys::napi_deferred, outcome: Result<T>) {
    // SAFETY: called once per promise, on the environment's own thread, inside the handle scope of Node's call.
    unsafe {
        let error = match outcome {
            Ok(value) => match T::to_napi_value(env, value) {
                Ok(value) => {
                    sys::napi_resolve_deferred(env, deferred, value);
                    return;
                }
                Err(error) => JsError::from(error).into_value(env),
            },
            Err(error) => JsError::from(to_js(&error)).into_value(env),
        };
        sys::napi_reject_deferred(env, deferred, error);
    }
}

/// A function of JavaScript that is held until it was called. Lives on its environment's thread.
struct Callback {
    env: sys::napi_env,
    reference: sys::napi_ref,
}

impl Callback {
    fn new<A: JsValuesTupleIntoVec>(env: &Env, function: &Function<'_, A, ()>) -> napi::Result<Self> {
        let mut reference = ptr::null_mut();
        // SAFETY: the environment is alive and the function its own, since JavaScript is calling us with it.
        check_status!(unsafe { sys::napi_create_reference(env.raw(), function.raw(), 1, &mut reference) })?;
        Ok(Callback { env: env.raw(), reference })
    }

    /// Calls it with `null` and the values, or with the error. Statuses are not looked at: they fail only when the
    /// environment ends.
    fn call<A: JsValuesTupleIntoVec>(&self, outcome: Result<A>) {
        let (env, mut function, mut null, mut receiver) = (self.env, ptr::null_mut(), ptr::null_mut(), ptr::null_mut());
        // SAFETY: on the environment's own thread, inside the handle scope of Node's call; the reference is not deleted
        // before `self` is; all out-parameters live on this frame, and the arguments are as many as is said.
        unsafe {
            sys::napi_get_null(env, &mut null);
            sys::napi_get_undefined(env, &mut receiver);
            sys::napi_get_reference_value(env, self.reference, &mut function);
            let arguments = match outcome.map(|values| values.into_vec(env)) {
                Ok(Ok(mut values)) => {
                    values.insert(0, null);
                    values
                }
                Ok(Err(error)) => vec![JsError::from(error).into_value(env)],
                Err(error) => vec![JsError::from(to_js(&error)).into_value(env)],
            };
            let mut returned = ptr::null_mut();
            sys::napi_call_function(env, receiver, function, arguments.len(), arguments.as_ptr(), &mut returned);
        }
    }
}

impl Drop for Callback {
    fn drop(&mut self) {
        // SAFETY: on the environment's own thread and before its end: tasks are dropped by its teardown hook at the latest.
        unsafe { sys::napi_delete_reference(self.env, self.reference) };
    }
}
