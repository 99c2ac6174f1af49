//! Bodies of requests that are in memory: read from their connections and not yet answered, since a prompt that waits for its
//! turn is as large as it was. Counted as they come, so that what is announced and never sent holds nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::app::App;
use crate::error::{ApiError, ApiResult};
use crate::keys::Caller;
use crate::options::MAX_HELD_BODIES;

/// How much there is, and may be.
pub(crate) struct Bodies {
    max_bytes: usize,
    bytes: AtomicUsize,
}

impl Bodies {
    pub(crate) fn new(max_body_bytes: usize) -> Bodies {
        Bodies { max_bytes: max_body_bytes.saturating_mul(MAX_HELD_BODIES), bytes: AtomicUsize::new(0) }
    }
}

/// The bytes of one body, given back when dropped.
pub(crate) struct HeldBody {
    app: Arc<App>,
    caller: Caller,
    bytes: usize,
}

impl HeldBody {
    /// Nothing yet.
    pub(crate) fn new(app: &Arc<App>, caller: &Caller) -> HeldBody {
        HeldBody { app: app.clone(), caller: caller.clone(), bytes: 0 }
    }

    /// More of it has come, if there is room for it: among all, and among those of the same key, which gets half.
    pub(crate) fn grow(&mut self, bytes: usize) -> ApiResult<()> {
        let Bodies { max_bytes, bytes: held } = &self.app.bodies;
        let full = |limit: usize| ApiError::overloaded("the memory for bodies (bytes)", limit, limit);
        if !take(held, bytes, *max_bytes) {
            return Err(full(*max_bytes));
        }
        if let Some(own) = self.caller.body_bytes()
            && !take(own, bytes, max_bytes / 2)
        {
            held.fetch_sub(bytes, Ordering::Relaxed);
            return Err(full(max_bytes / 2));
        }
        self.bytes += bytes;
        Ok(())
    }
}

impl Drop for HeldBody {
    fn drop(&mut self) {
        self.app.bodies.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
        if let Some(own) = self.caller.body_bytes() {
            own.fetch_sub(self.bytes, Ordering::Relaxed);
        }
    }
}

/// Adds to a count unless it would be above its limit.
fn take(count: &AtomicUsize, more: usize, limit: usize) -> bool {
    let sum = |held: usize| held.checked_add(more).filter(|&sum| sum <= limit);
    count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, sum).is_ok()
}
