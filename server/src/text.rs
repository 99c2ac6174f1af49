//! `POST /tokenize` and `/detokenize`: text to token ids and back, in the names of vLLM and of llama.cpp's server.

use std::sync::Arc;

use axum::Extension;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::Response;
use ns_llm::config::MAX_PROMPT_BYTES;
use serde_json::json;

use crate::app::App;
use crate::error::{ApiError, ApiResult};
use crate::fields::Fields;
use crate::keys::Caller;
use crate::options::MAX_DETOKENIZE_IDS;
use crate::response::json_response;

/// Text to ids.
pub(crate) async fn tokenize(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    body: Bytes,
) -> ApiResult<Response<Body>> {
    let mut fields = Fields::parse(&body)?;
    let model = app.model(fields.text("model")?.as_deref())?;
    let text = match fields.text("prompt")? {
        Some(prompt) => Some(prompt),
        None => fields.text("content")?,
    };
    let text = text.ok_or_else(|| ApiError::invalid("prompt", "missing", "a string"))?;
    if text.len() > MAX_PROMPT_BYTES {
        let value = format!("{} bytes", text.len());
        return Err(ApiError::invalid("prompt", value, format!("at most {MAX_PROMPT_BYTES} bytes")));
    }
    let add_special = match fields.bool("add_special_tokens")? {
        Some(add_special) => add_special,
        None => fields.bool("add_special")?.unwrap_or(true),
    };
    drop((fields, body));
    let engine = model.engine.clone();
    let ids = app.text_thread.run(caller.name(), move || engine.tokenize(&text, add_special)).await??;
    Ok(json_response(
        &json!({ "count": ids.len(), "max_model_len": model.engine.info().context_tokens, "tokens": ids }),
    ))
}

/// Ids to text.
pub(crate) async fn detokenize(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    body: Bytes,
) -> ApiResult<Response<Body>> {
    let mut fields = Fields::parse(&body)?;
    let model = app.model(fields.text("model")?.as_deref())?;
    if !fields.has("tokens") {
        return Err(ApiError::invalid("tokens", "missing", "an array of token ids"));
    }
    let ids = fields.token_ids("tokens")?;
    drop((fields, body));
    if ids.len() > MAX_DETOKENIZE_IDS {
        let (value, expected) = (format!("an array of {}", ids.len()), format!("at most {MAX_DETOKENIZE_IDS} ids"));
        return Err(ApiError::invalid("tokens", value, expected));
    }
    let engine = model.engine.clone();
    let text = app.text_thread.run(caller.name(), move || engine.detokenize(&ids)).await?;
    let text = text.map_err(|error| ApiError::from(error).renamed("ids", "tokens"))?;
    Ok(json_response(&json!({ "prompt": text, "content": text })))
}
