//! A thread for what may take its time and must not hold up a connection, of one kind each: tokenizing long texts, looking at
//! GPUs, emptying caches. It is started by its first task, takes one after the other, callers in turn, and ends with the
//! server.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use axum::http::StatusCode;
use ns_llm::Priority;
use tokio::sync::oneshot;

use crate::admission::Admission;
use crate::error::{ApiError, ApiResult};

/// Tasks that may wait for one thread; the next one is told to come again.
const MAX_TASKS: usize = 64;

type Task = Box<dyn FnOnce() + Send>;

/// The thread's handle.
pub(crate) struct SideThread {
    thread_name: &'static str,
    /// Whose task is next: one is at the thread.
    turns: Arc<Admission>,
    /// `None` until it is needed. Locked to start it, and for a `try_send`.
    tasks: Mutex<Option<SyncSender<Task>>>,
}

impl SideThread {
    pub(crate) fn new(thread_name: &'static str) -> SideThread {
        let turns = Admission::new("the list of tasks", 1, MAX_TASKS);
        SideThread { thread_name, turns, tasks: Mutex::default() }
    }

    /// What `work` gives, done on this thread when it is the caller's turn. A task whose caller is gone by then is not
    /// begun.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        caller: Option<&str>,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> ApiResult<T> {
        let place = self.turns.enter(caller, Priority::Normal).await?;
        let (sender, result) = oneshot::channel();
        let task = Box::new(move || {
            // A defect in one task is that task's alone: its sender is dropped without a word.
            let value = catch_unwind(AssertUnwindSafe(work));
            drop(place);
            if let Ok(value) = value {
                let _ = sender.send(value);
            }
        });
        self.give(task)?;
        let failed = || ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", "the task failed");
        result.await.map_err(|_| failed())
    }

    fn give(&self, task: Task) -> ApiResult<()> {
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        let sender = match tasks.take() {
            Some(sender) => sender,
            None => self.start().map_err(|error| {
                let message = format!("the thread {} cannot be started: {error}", self.thread_name);
                ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "no_thread", message)
            })?,
        };
        let given = sender.try_send(task);
        *tasks = Some(sender);
        given.map_err(|_| ApiError::overloaded("the list of tasks", MAX_TASKS, MAX_TASKS))
    }

    fn start(&self) -> std::io::Result<SyncSender<Task>> {
        // The next task may come while the last one is not quite over.
        let (sender, tasks) = sync_channel::<Task>(MAX_TASKS);
        thread::Builder::new()
            .name(self.thread_name.to_string())
            .spawn(move || tasks.into_iter().for_each(|task| task()))?;
        Ok(sender)
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::Pin;
    use std::sync::mpsc::channel;
    use std::task::{Context, Poll, Waker};

    use super::*;

    type Running<T> = Pin<Box<dyn Future<Output = ApiResult<T>>>>;

    fn poll<T>(task: &mut Running<T>) -> Poll<ApiResult<T>> {
        task.as_mut().poll(&mut Context::from_waker(Waker::noop()))
    }

    fn wait<T>(task: &mut Running<T>) -> ApiResult<T> {
        loop {
            match poll(task) {
                Poll::Ready(result) => return result,
                Poll::Pending => thread::yield_now(),
            }
        }
    }

    /// While a task runs, one caller's crowd waits; another caller's task is next all the same, and has room where the crowd has
    /// filled the list. A task that panics is its own.
    #[test]
    fn one_crowd_holds_up_nobody_else() {
        let side_thread = Arc::new(SideThread::new("test-side-thread"));
        let (go_on, held) = channel::<()>();
        let order = Arc::new(Mutex::new(Vec::new()));
        let run = |caller: &'static str, work: Box<dyn FnOnce() + Send>| -> Running<()> {
            let (side_thread, order) = (side_thread.clone(), order.clone());
            let work = move || {
                work();
                order.lock().expect("no panic").push(caller);
            };
            Box::pin(async move { side_thread.run(Some(caller), work).await })
        };
        let mut holding = run(
            "crowd",
            Box::new(move || {
                let _ = held.recv();
            }),
        );
        assert!(poll(&mut holding).is_pending());
        let mut crowd: Vec<_> = (0..MAX_TASKS + 1).map(|_| Some(run("crowd", Box::new(|| ())))).collect();
        // What has ended is not polled again.
        let mut poll_all = |codes: &mut Vec<&'static str>| {
            for slot in &mut crowd {
                if let Some(Poll::Ready(result)) = slot.as_mut().map(poll) {
                    codes.extend(result.err().map(|error| error.code));
                    *slot = None;
                }
            }
        };
        let mut refused = Vec::new();
        poll_all(&mut refused);
        assert_eq!(refused, ["overloaded"]);
        let mut panicking = Some(run("other", Box::new(|| panic!("a defect"))));
        let mut other = run("other", Box::new(|| ()));
        assert!(
            panicking.as_mut().map(poll).is_some_and(|result| result.is_pending()) && poll(&mut other).is_pending()
        );
        drop(go_on);
        wait(&mut holding).expect("it ran");
        loop {
            poll_all(&mut refused);
            if let Some(Poll::Ready(result)) = panicking.as_mut().map(poll) {
                assert_eq!(result.expect_err("it panicked").code, "internal");
                panicking = None;
            }
            if let Poll::Ready(result) = poll(&mut other) {
                result.expect("it ran");
                break;
            }
        }
        assert_eq!(refused, ["overloaded"; 3], "two of the crowd made room");
        let before = order.lock().expect("no panic").iter().position(|caller| *caller == "other");
        assert!(before.is_some_and(|before| before <= 4), "{before:?}");
    }
}
