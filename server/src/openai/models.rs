//! `GET /v1/models` and `/v1/models/{id}`: what is served.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::Response;
use serde_json::{Value, json};

use crate::app::{App, Served};
use crate::error::{ApiError, ApiResult};
use crate::response::json_response;

/// All models.
pub(crate) async fn list(State(app): State<Arc<App>>) -> Response<Body> {
    let models: Vec<Value> = app.models.iter().map(object).collect();
    json_response(&json!({ "object": "list", "data": models }))
}

/// One model, by any of its names.
pub(crate) async fn get(State(app): State<Arc<App>>, Path(id): Path<String>) -> ApiResult<Response<Body>> {
    // A name has slashes in many a list of models.
    let model = app.model(Some(&id)).map_err(|error| ApiError { param: None, ..error })?;
    Ok(json_response(&object(model)))
}

fn object(model: &Served) -> Value {
    let info = model.engine.info();
    json!({
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "ns-llm",
        // vLLM's name of it.
        "max_model_len": info.context_tokens,
    })
}
