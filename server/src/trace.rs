//! `GET /trace?seconds=`: what an engine does for so long, as Chrome's trace events. It names other callers' requests and
//! tells how long they are, so it is there only where the operator has asked for it.

use std::sync::Arc;
use std::time::Duration;

use axum::Extension;
use axum::body::Body;
use axum::extract::State;
use axum::http::{Response, StatusCode, Uri};
use ns_llm::Engine;

use crate::app::App;
use crate::error::{ApiError, ApiResult};
use crate::keys::Caller;
use crate::options::{DEFAULT_TRACE_SECONDS, MAX_TRACE_SECONDS, TRACE_EVENTS};
use crate::query;
use crate::response::typed;

/// Ends what it began, also when the client is gone before the time is over.
struct Recording(Option<Engine>);

impl Recording {
    fn finish(mut self) -> Option<String> {
        self.0.take()?.stop_trace()
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        if let Some(engine) = &self.0 {
            engine.stop_trace();
        }
    }
}

/// Records the model of the query's `model`, or the first one.
pub(crate) async fn record(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    uri: Uri,
) -> ApiResult<Response<Body>> {
    if !app.options.trace_route {
        return Err(ApiError::not_found("unknown_route", "there is no such route"));
    }
    caller.check_admin()?;
    let seconds = match query::value(&uri, "seconds") {
        None => DEFAULT_TRACE_SECONDS,
        Some(text) => match text.parse::<f64>() {
            Ok(seconds) if seconds > 0.0 && seconds <= MAX_TRACE_SECONDS => seconds,
            _ => return Err(ApiError::invalid("seconds", text, format!("above 0, at most {MAX_TRACE_SECONDS}"))),
        },
    };
    let model = app.model(query::value(&uri, "model").as_deref())?;
    if !model.engine.start_trace(TRACE_EVENTS)? {
        let message = "another trace of this model is being recorded";
        return Err(ApiError::new(StatusCode::CONFLICT, "trace_running", message));
    }
    let recording = Recording(Some(model.engine.clone()));
    app.sleep(Duration::from_secs_f64(seconds)).await;
    // Only whoever began it ends it, so that it is there.
    Ok(typed("application/json", recording.finish().unwrap_or_default()))
}
