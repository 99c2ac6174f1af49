//! # Log
//!
//! An engine has little to say beside its answers, and prints nothing; a program that keeps a log gives each engine a
//! callback for what an operator wants to find there. INFO: a model was loaded, with its figures; an engine was freed,
//! with its counts. WARN: a request was refused because a queue is full. ERROR: a request ended by a defect of this
//! library (told once for an engine).

use std::ffi::{c_char, c_void};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};

use ns_llm_core::{Engine, Error};

use crate::callback::{UserData, as_callback, in_callback};

/// How much a line of the log matters.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ns_llm_log_level {
    /// Something went wrong that should not be possible.
    NS_LLM_LOG_ERROR = 1,
    /// Something was refused that a larger limit or a smaller load would have allowed.
    NS_LLM_LOG_WARN = 2,
    /// Something that happens once in the life of an engine.
    NS_LLM_LOG_INFO = 3,
}

/// Receives one line: `size` bytes of UTF-8 without a line break, the library's, valid until the callback returns. Called
/// on the thread that caused it, the engine's callback thread included, so calls can overlap; never after
/// ns_llm_engine_free() has returned, unless that was called inside a callback. It may call any function of this header,
/// except those that say NS_LLM_IN_CALLBACK. It must return: no longjmp, no C++ exception.
pub type ns_llm_log_callback =
    Option<unsafe extern "C" fn(level: ns_llm_log_level, line: *const c_char, size: usize, user_data: *mut c_void)>;

/// The log of one engine.
pub(crate) struct Log {
    /// `None`: the program keeps no log.
    sink: Option<Sink>,
    /// Calls into C that have not returned. Held for counting, never while C is called: what a line causes may be a line.
    running: Mutex<Running>,
    /// Signalled when a call has returned.
    returned: Condvar,
    has_told_defect: AtomicBool,
}

struct Sink {
    function: unsafe extern "C" fn(ns_llm_log_level, *const c_char, usize, *mut c_void),
    user_data: UserData,
}

// SAFETY: the header tells the caller that the callback is called on many threads, and its pointer with it.
unsafe impl Sync for Sink {}

#[derive(Default)]
struct Running {
    num_calls: usize,
    is_closed: bool,
}

impl Log {
    /// # Safety
    /// `callback` may be called with `user_data`, on any thread, until [`Log::close`] has returned.
    pub(crate) unsafe fn new(callback: ns_llm_log_callback, user_data: *mut c_void) -> Self {
        Log {
            sink: callback.map(|function| Sink { function, user_data: UserData(user_data) }),
            running: Mutex::default(),
            returned: Condvar::new(),
            has_told_defect: AtomicBool::new(false),
        }
    }

    pub(crate) fn opened(&self, engine: &Engine) {
        self.line(ns_llm_log_level::NS_LLM_LOG_INFO, || {
            let (info, memory) = (engine.info(), engine.memory());
            format!(
                "loaded {} ({}, {} parameters) in {:.0} ms: weights {} in {} bytes, KV pool {} in {} bytes, \
                 context {} tokens, {} ({}) {} with {} threads",
                info.name,
                info.architecture,
                info.num_parameters,
                info.load_ms,
                info.weights,
                memory.weights_bytes,
                info.kv_dtype,
                memory.kv_reserved_bytes,
                info.context_tokens,
                info.device_name,
                info.device_reason,
                info.isa,
                info.threads,
            )
        });
        if let Some(refusal) = &engine.info().kv_disk_refusal {
            let line = || format!("nothing is stored in the KV cache directory: {refusal}");
            self.line(ns_llm_log_level::NS_LLM_LOG_WARN, line);
        }
    }

    /// A request was refused or ended like this.
    pub(crate) fn failed(&self, error: &Error) {
        match error {
            Error::Overloaded { .. } => {
                self.line(ns_llm_log_level::NS_LLM_LOG_WARN, || format!("refused a request: {error}"));
            }
            Error::Internal { .. } if !self.has_told_defect.swap(true, Ordering::Relaxed) => {
                self.line(ns_llm_log_level::NS_LLM_LOG_ERROR, || format!("a request ended by a defect: {error}"));
            }
            _ => {}
        }
    }

    pub(crate) fn closed(&self, engine: &Engine) {
        self.line(ns_llm_log_level::NS_LLM_LOG_INFO, || {
            let stats = engine.stats();
            format!(
                "freed {} after {} ms: {} requests, {} finished, {} cancelled, {} failed, {} refused",
                engine.info().name,
                stats.uptime_ms,
                stats.requests_total,
                stats.requests_finished,
                stats.requests_cancelled,
                stats.requests_failed,
                stats.requests_refused,
            )
        });
    }

    /// Says no more, and waits for the calls that are running, unless called from inside a callback: one of them may be
    /// that.
    pub(crate) fn close(&self) {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        running.is_closed = true;
        while running.num_calls > 0 && !in_callback() {
            running = self.returned.wait(running).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn line(&self, level: ns_llm_log_level, text: impl FnOnce() -> String) {
        let Some(sink) = &self.sink else { return };
        // What an error quotes may hold anything.
        let text = text().replace(['\n', '\r'], " ");
        if !self.count(1) {
            return;
        }
        // SAFETY: promised to `new`; `close` waits for the count to be taken back.
        as_callback(|| unsafe { (sink.function)(level, text.as_ptr().cast(), text.len(), sink.user_data.0) });
        self.count(-1);
    }

    /// Counts a call in or out; a new one is refused after the end.
    fn count(&self, change: isize) -> bool {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if change > 0 && running.is_closed {
            return false;
        }
        running.num_calls = running.num_calls.saturating_add_signed(change);
        drop(running);
        self.returned.notify_all();
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Heard(Mutex<Vec<(ns_llm_log_level, String)>>);

    unsafe extern "C" fn listen(level: ns_llm_log_level, line: *const c_char, size: usize, user_data: *mut c_void) {
        // SAFETY: the tests hand over a `Heard` that outlives the log, and the log a text of `size` bytes.
        let (heard, line) =
            unsafe { (&*user_data.cast::<Heard>(), std::slice::from_raw_parts(line.cast::<u8>(), size)) };
        heard.0.lock().unwrap().push((level, String::from_utf8(line.to_vec()).unwrap()));
        assert!(in_callback());
    }

    /// Overload is told each time, a defect once, other ends never, and nothing at all after the end; a line is one line.
    #[test]
    fn what_matters_is_told() {
        let heard = Heard(Mutex::default());
        // SAFETY: `heard` outlives `log`, and `listen` may be called anywhere.
        let log = unsafe { Log::new(Some(listen), std::ptr::from_ref(&heard).cast_mut().cast()) };
        let overloaded = Error::Overloaded { queue: "waiting queue (requests)", waiting: 3, limit: 3 };
        log.failed(&overloaded);
        log.failed(&overloaded);
        log.failed(&Error::NoChatTemplate);
        log.failed(&Error::Cancelled);
        log.failed(&Error::Internal { reason: "first\nline".to_string() });
        log.failed(&Error::Internal { reason: "second".to_string() });
        log.close();
        log.failed(&overloaded);
        let heard = heard.0.lock().unwrap();
        let levels: Vec<_> = heard.iter().map(|(level, _)| *level).collect();
        use ns_llm_log_level::*;
        assert_eq!(levels, [NS_LLM_LOG_WARN, NS_LLM_LOG_WARN, NS_LLM_LOG_ERROR]);
        assert!(heard[0].1.contains("holds 3 of at most 3"), "{heard:?}");
        assert!(heard[2].1.ends_with("first line"), "{heard:?}");
    }

    /// `close` waits for a line that is being told: the line is held until the closing thread has had time to pass.
    #[test]
    fn close_waits_for_running_lines() {
        static HELD: (Mutex<[bool; 2]>, Condvar) = (Mutex::new([false; 2]), Condvar::new());
        unsafe extern "C" fn hold(_: ns_llm_log_level, _: *const c_char, _: usize, _: *mut c_void) {
            let mut held = HELD.0.lock().unwrap();
            held[0] = true;
            HELD.1.notify_all();
            while !held[1] {
                held = HELD.1.wait(held).unwrap();
            }
        }
        // SAFETY: `hold` uses no `user_data`.
        let log = unsafe { Log::new(Some(hold), std::ptr::null_mut()) };
        std::thread::scope(|scope| {
            scope.spawn(|| log.failed(&Error::Internal { reason: "held".to_string() }));
            let mut held = HELD.0.lock().unwrap();
            while !held[0] {
                held = HELD.1.wait(held).unwrap();
            }
            drop(held);
            let closing = scope.spawn(|| log.close());
            std::thread::sleep(std::time::Duration::from_millis(30));
            assert!(!closing.is_finished(), "a line was still being told");
            HELD.0.lock().unwrap()[1] = true;
            HELD.1.notify_all();
            closing.join().unwrap();
        });
    }
}
