//! `POST /v1/embeddings`: texts or token ids to vectors of unit length, as numbers or as base64 of little-endian floats.

use std::sync::Arc;

use axum::Extension;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::Response;
use ns_llm::{EmbeddingInput, EmbeddingRequest};
use serde::Serialize;
use serde_json::Value;

use crate::app::App;
use crate::error::{ApiError, ApiResult};
use crate::fields::{Fields, shown, token_ids};
use crate::generation::{EngineRequest, Generation};
use crate::keys::Caller;
use crate::parameters::read_priority;
use crate::response::json_response;

#[derive(Serialize)]
struct EmbeddingList {
    object: &'static str,
    data: Vec<EmbeddingObject>,
    model: String,
    usage: EmbeddingUsage,
}

#[derive(Serialize)]
struct EmbeddingObject {
    object: &'static str,
    index: usize,
    embedding: Vector,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Vector {
    Numbers(Vec<f32>),
    Base64(String),
}

#[derive(Serialize)]
struct EmbeddingUsage {
    prompt_tokens: usize,
    total_tokens: usize,
}

/// The route. An input that is too long for the model is an error: the answer has no place to say that it was cut.
pub(crate) async fn create(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    body: Bytes,
) -> ApiResult<Response<Body>> {
    let mut fields = Fields::parse(&body)?;
    drop(body);
    let model = app.model(fields.text("model")?.as_deref())?;
    let inputs = read_inputs(fields.require("input", "a string, token ids, or an array of either")?)?;
    let is_base64 = match fields.text("encoding_format")?.as_deref() {
        None | Some("float") => false,
        Some("base64") => true,
        Some(other) => {
            return Err(ApiError::invalid("encoding_format", shown(&Value::from(other)), "\"float\" or \"base64\""));
        }
    };
    let num_inputs = inputs.len();
    let mut request = EmbeddingRequest::new(inputs);
    request.truncate = false;
    request.dimensions = fields.count("dimensions")?;
    request.priority = read_priority(&mut fields)?;
    request.timeout_ms = fields.count("timeout_ms")?.map(|timeout_ms| timeout_ms as u64);
    drop(fields);
    let generation = Generation::start(&app, &caller, model, EngineRequest::Embed(request)).await?;
    let (embeddings, summary) = generation.finish_embedding(num_inputs).await?;
    let vector = |values: Vec<f32>| if is_base64 { Vector::Base64(base64(&values)) } else { Vector::Numbers(values) };
    let objects = embeddings.into_iter().enumerate().map(|(index, embedding)| EmbeddingObject {
        object: "embedding",
        index,
        embedding: vector(embedding.values),
    });
    let tokens = summary.usage.prompt_tokens;
    Ok(json_response(&EmbeddingList {
        object: "list",
        data: objects.collect(),
        model: model.name.clone(),
        usage: EmbeddingUsage { prompt_tokens: tokens, total_tokens: tokens },
    }))
}

fn read_inputs(value: Value) -> ApiResult<Vec<EmbeddingInput>> {
    let values = match value {
        Value::String(text) => return Ok(vec![EmbeddingInput::Text(text)]),
        Value::Array(values) => values,
        other => {
            return Err(ApiError::invalid("input", shown(&other), "a string, token ids, or an array of either"));
        }
    };
    if values.first().is_some_and(Value::is_number) {
        return Ok(vec![EmbeddingInput::Tokens(token_ids(&values, "input")?)]);
    }
    let input = |(idx, value): (usize, Value)| match value {
        Value::String(text) => Ok(EmbeddingInput::Text(text)),
        Value::Array(ids) => Ok(EmbeddingInput::Tokens(token_ids(&ids, &format!("input[{idx}]"))?)),
        other => Err(ApiError::invalid(format!("input[{idx}]"), shown(&other), "a string or token ids")),
    };
    values.into_iter().enumerate().map(input).collect()
}

/// RFC 4648, section 4, of the numbers' little-endian bytes.
fn base64(values: &[f32]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for three in bytes.chunks(3) {
        let bits = three.iter().enumerate().fold(0u32, |bits, (idx, &byte)| bits | u32::from(byte) << (16 - 8 * idx));
        for digit in 0..4 {
            let symbol = ALPHABET[(bits >> (18 - 6 * digit) & 63) as usize] as char;
            text.push(if digit <= three.len() { symbol } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes as RFC 4648 writes them, with each length of padding.
    #[test]
    fn vectors_become_base64() {
        assert_eq!(base64(&[1.0]), "AACAPw==");
        assert_eq!(base64(&[1.0, -2.0]), "AACAPwAAAMA=");
        assert_eq!(base64(&[0.0, 0.0, 0.5]), "AAAAAAAAAAAAAAA/");
        assert_eq!(base64(&[]), "");
    }
}
