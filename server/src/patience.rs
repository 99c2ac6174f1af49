//! How long a call waits for an engine: as long as that gets on.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use crate::app::App;
use crate::error::ApiError;

/// The patience of a call that waits for an engine: looks now and then whether it still gets on.
#[derive(Default)]
pub(crate) struct Patience {
    /// Until the next look; none before the call had to wait.
    sleep: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
}

impl Patience {
    /// Ready with an error when the engine stands still. To be asked when what is waited for is not there.
    pub(crate) fn poll(&mut self, app: &App, model: usize, cx: &mut Context<'_>) -> Poll<ApiError> {
        loop {
            let between_looks = app.options.step_stall / 2;
            let sleep = self.sleep.get_or_insert_with(|| app.sleep(between_looks));
            ready!(sleep.as_mut().poll(cx));
            self.sleep = None;
            if let Some(cause) = app.models[model].trouble(Instant::now()) {
                return Poll::Ready(ApiError::stalled(cause));
            }
        }
    }
}
