//! Answers that are one JSON value or one text.

use axum::body::Body;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderValue, Response, StatusCode};
use serde::Serialize;

/// 200 and `value`.
pub(crate) fn json_response(value: &impl Serialize) -> Response<Body> {
    json_with_status(StatusCode::OK, value)
}

/// Any status and `value`.
pub(crate) fn json_with_status(status: StatusCode, value: &impl Serialize) -> Response<Body> {
    // Strings, numbers and lists of them cannot fail to be written.
    let mut response = typed("application/json", serde_json::to_vec(value).unwrap_or_default());
    *response.status_mut() = status;
    response
}

/// 200 and a body of that type.
pub(crate) fn typed(content_type: &'static str, body: impl Into<Body>) -> Response<Body> {
    let mut response = Response::new(body.into());
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}
