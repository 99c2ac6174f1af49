//! One thread for what may take its time and must not hold up a connection: tokenizing long texts, looking at GPUs. It is
//! started by its first task, takes one after the other, and ends with the server.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::thread;

use axum::http::StatusCode;
use tokio::sync::oneshot;

use crate::error::{ApiError, ApiResult};

/// Tasks that may wait; the next one is told to come again.
const MAX_TASKS: usize = 64;

type Task = Box<dyn FnOnce() + Send>;

/// The thread's handle.
#[derive(Default)]
pub(crate) struct Helper {
    /// `None` until it is needed. Locked to start it, and for a `try_send`.
    tasks: Mutex<Option<SyncSender<Task>>>,
}

impl Helper {
    /// What `work` gives, done on the helper's thread.
    pub(crate) async fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> ApiResult<T> {
        let (sender, result) = oneshot::channel();
        let task = Box::new(move || {
            // A defect in one task is that task's alone: its sender is dropped without a word.
            if let Ok(value) = catch_unwind(AssertUnwindSafe(work)) {
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
            None => start().map_err(|_| ApiError::overloaded("the list of threads", 0, 0))?,
        };
        let given = sender.try_send(task);
        *tasks = Some(sender);
        given.map_err(|_| ApiError::overloaded("the list of tasks", MAX_TASKS, MAX_TASKS))
    }
}

fn start() -> std::io::Result<SyncSender<Task>> {
    let (sender, tasks) = sync_channel::<Task>(MAX_TASKS);
    thread::Builder::new()
        .name("ns-llm-helper".to_string())
        .spawn(move || tasks.into_iter().for_each(|task| task()))?;
    Ok(sender)
}
