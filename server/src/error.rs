//! What a client is told when something is wrong: a status, and OpenAI's error object. Each error of the engine has its
//! status here, and keeps its stable code. A message names field, value and limit, and nothing of the machine: failures of
//! files and memory are not the client's to know.

use axum::body::Body;
use axum::http::header::{CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE};
use axum::http::{HeaderName, HeaderValue, Response, StatusCode};
use axum::response::IntoResponse;
use ns_llm::Error;
use serde_json::{Value, json};

/// Result of a route.
pub(crate) type ApiResult<T> = Result<T, ApiError>;

/// Seconds after which a client that met a full queue may try again.
const OVERLOAD_RETRY_S: u64 = 1;

/// An answer that is an error.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    /// Stable, in snake case; for errors of the engine its own.
    pub(crate) code: &'static str,
    pub(crate) message: String,
    /// The parameter that it is about.
    pub(crate) param: Option<String>,
    /// When to try again.
    pub(crate) retry_after_s: Option<u64>,
    /// What only the operator is told.
    pub(crate) detail: Option<String>,
}

/// Of an answer that is an error: its code, and what only the operator is told of it. As an extension of the answer, for the
/// guard, which knows the request's id.
#[derive(Clone)]
pub(crate) struct Untold {
    pub(crate) code: &'static str,
    pub(crate) detail: String,
}

impl ApiError {
    pub(crate) fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        ApiError { status, code, message: message.into(), param: None, retry_after_s: None, detail: None }
    }

    /// A parameter outside of what is allowed.
    pub(crate) fn invalid(param: impl Into<String>, value: impl AsRef<str>, expected: impl AsRef<str>) -> Self {
        Self::of_param(StatusCode::BAD_REQUEST, "invalid_argument", param.into(), value.as_ref(), expected.as_ref())
    }

    /// A parameter that asks for what is not there.
    pub(crate) fn not_supported(param: impl Into<String>, value: impl AsRef<str>, expected: impl AsRef<str>) -> Self {
        Self::of_param(StatusCode::BAD_REQUEST, "not_supported", param.into(), value.as_ref(), expected.as_ref())
    }

    fn of_param(status: StatusCode, code: &'static str, param: String, value: &str, expected: &str) -> Self {
        let message = format!("{param} is {value}, must be {expected}");
        ApiError { param: Some(param), ..ApiError::new(status, code, message) }
    }

    /// A name that nothing has.
    pub(crate) fn not_found(code: &'static str, message: impl Into<String>) -> Self {
        ApiError::new(StatusCode::NOT_FOUND, code, message)
    }

    /// The server is going away.
    pub(crate) fn stopping() -> Self {
        let error = ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "closed", "the server is stopping");
        error.retry_after(OVERLOAD_RETRY_S)
    }

    /// A bounded queue is full.
    pub(crate) fn overloaded(queue: &str, waiting: usize, limit: usize) -> Self {
        let message = format!("{queue} holds {waiting} of at most {limit}, try again later");
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "overloaded", message).retry_after(OVERLOAD_RETRY_S)
    }

    /// The engine does nothing, for this cause.
    pub(crate) fn stalled(cause: &str) -> Self {
        let message = format!("the engine stands still: {cause}");
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "stalled", message).retry_after(OVERLOAD_RETRY_S)
    }

    /// The time that the request was given is over.
    pub(crate) fn deadline(timeout_ms: u64) -> Self {
        ApiError::from(Error::DeadlineExceeded { timeout_ms })
    }

    pub(crate) fn retry_after(mut self, seconds: u64) -> Self {
        self.retry_after_s = Some(seconds);
        self
    }

    /// The same error, with the engine's name of a parameter replaced by the one that the caller used.
    pub(crate) fn renamed(mut self, from: &str, to: &str) -> Self {
        if self.param.as_deref() == Some(from) && from != to {
            self.message = format!("{to}{}", self.message.strip_prefix(from).unwrap_or(&self.message));
            self.param = Some(to.to_string());
        }
        self
    }

    /// OpenAI's kind of error.
    fn kind(&self) -> &'static str {
        match self.status.as_u16() {
            401 => "authentication_error",
            403 | 421 => "permission_error",
            404 => "not_found_error",
            429 => "rate_limit_error",
            408 | 500.. => "server_error",
            _ => "invalid_request_error",
        }
    }

    /// OpenAI's object, with its `error` around it.
    pub(crate) fn to_json(&self) -> Value {
        json!({ "error": { "message": self.message, "type": self.kind(), "param": self.param, "code": self.code } })
    }

    /// The form of Ollama and of ns-node: a text alone.
    pub(crate) fn to_plain_json(&self) -> Value {
        json!({ "error": self.message })
    }

    /// An answer with this error's status and headers, and a body of the caller's form.
    pub(crate) fn respond(&self, body: &Value) -> Response<Body> {
        let mut response = Response::new(Body::from(body.to_string()));
        *response.status_mut() = self.status;
        if let Some(detail) = &self.detail {
            response.extensions_mut().insert(Untold { code: self.code, detail: detail.clone() });
        }
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(seconds) = self.retry_after_s {
            headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        if matches!(self.code, "deadline_exceeded" | "cancelled") {
            // OpenAI's clients would ask again after 408 and 409, for work that was ended on purpose.
            headers.insert(HeaderName::from_static("x-should-retry"), HeaderValue::from_static("false"));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response<Body> {
        self.respond(&self.to_json())
    }
}

/// An error on a route of Ollama's or ns-node's: the same, in their form.
pub(crate) struct PlainError(pub(crate) ApiError);

/// Result of a route whose errors are plain.
pub(crate) type PlainResult = Result<Response<Body>, PlainError>;

impl<E: Into<ApiError>> From<E> for PlainError {
    fn from(error: E) -> Self {
        PlainError(error.into())
    }
}

impl IntoResponse for PlainError {
    fn into_response(self) -> Response<Body> {
        self.0.respond(&self.0.to_plain_json())
    }
}

impl From<Error> for ApiError {
    fn from(error: Error) -> Self {
        let (code, message) = (error.code(), error.to_string());
        match error {
            Error::InvalidArgument { field, .. } => {
                // "stop (strings)" is about `stop`.
                let param = field.split(' ').next().map(str::to_string);
                ApiError { param, ..ApiError::new(StatusCode::BAD_REQUEST, code, message) }
            }
            Error::PromptTooLong { .. }
            | Error::ExceedsKvPool { .. }
            | Error::Template { .. }
            | Error::Tokenizer { .. }
            | Error::NoChatTemplate
            | Error::NotSupported { .. } => ApiError::new(StatusCode::BAD_REQUEST, code, message),
            Error::Overloaded { .. } => {
                ApiError::new(StatusCode::SERVICE_UNAVAILABLE, code, message).retry_after(OVERLOAD_RETRY_S)
            }
            Error::DeadlineExceeded { .. } => ApiError::new(StatusCode::REQUEST_TIMEOUT, code, message),
            Error::Cancelled => ApiError::new(StatusCode::CONFLICT, code, message),
            Error::Closed => {
                ApiError::new(StatusCode::SERVICE_UNAVAILABLE, code, message).retry_after(OVERLOAD_RETRY_S)
            }
            Error::NonFiniteLogits { .. } | Error::NonFiniteEmbedding { .. } => {
                ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, code, message)
            }
            // Paths, reasons of the operating system and texts of panics stay here.
            _ => {
                let shown = "the engine failed, see the server's log";
                ApiError { detail: Some(message), ..ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, code, shown) }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An engine's error keeps its code and its words, and gets the status that a client can act on.
    #[test]
    fn errors_of_the_engine_have_a_status() {
        let range = |field| Error::InvalidArgument { field, value: "7".into(), expected: "at most 2".into() };
        let cases = [
            (range("stop (strings)"), 400, "invalid_request_error", Some("stop")),
            (Error::Overloaded { queue: "queue", waiting: 2, limit: 2 }, 503, "server_error", None),
            (Error::DeadlineExceeded { timeout_ms: 5 }, 408, "server_error", None),
            (Error::Closed, 503, "server_error", None),
            (Error::NoChatTemplate, 400, "invalid_request_error", None),
        ];
        for (error, status, kind, param) in cases {
            let (code, message) = (error.code(), error.to_string());
            let api = ApiError::from(error);
            assert_eq!((api.status.as_u16(), api.kind(), api.param.as_deref()), (status, kind, param), "{code}");
            assert_eq!(api.to_json()["error"]["code"], code);
            assert_eq!(api.to_json()["error"]["message"], message);
            assert_eq!(api.retry_after_s.is_some(), status == 503, "{code}");
        }
    }

    /// Work that was ended on purpose is not asked for again by clients that retry 408 and 409; a full queue is.
    #[test]
    fn what_was_ended_is_not_retried() {
        let retry = |error: Error| {
            let response = ApiError::from(error).into_response();
            response.headers().get("x-should-retry").map(|value| value.as_bytes().to_vec())
        };
        assert_eq!(retry(Error::DeadlineExceeded { timeout_ms: 5 }).as_deref(), Some(&b"false"[..]));
        assert_eq!(retry(Error::Cancelled).as_deref(), Some(&b"false"[..]));
        assert_eq!(retry(Error::Overloaded { queue: "queue", waiting: 2, limit: 2 }), None);
    }

    /// What an engine says about files, memory and its own defects is told to nobody but the operator.
    #[test]
    fn the_machine_stays_unnamed() {
        let secrets = [
            Error::Io { path: "secret/place".into(), reason: "secret".into() },
            Error::Internal { reason: "secret at line 7".into() },
        ];
        for error in secrets {
            let api = ApiError::from(error);
            assert_eq!(api.status.as_u16(), 500);
            assert!(!api.to_json().to_string().contains("secret"), "{api:?}");
            assert!(api.detail.is_some_and(|detail| detail.contains("secret")), "the operator is told");
        }
    }

    /// A parameter is called what its caller called it.
    #[test]
    fn parameters_keep_the_callers_names() {
        let error = ApiError::invalid("logprobs", "30", "at most 20").renamed("logprobs", "top_logprobs");
        assert_eq!(error.message, "top_logprobs is 30, must be at most 20");
        assert_eq!(error.param.as_deref(), Some("top_logprobs"));
        let other = ApiError::invalid("n", "0", "1 to 8").renamed("logprobs", "top_logprobs");
        assert_eq!(other.param.as_deref(), Some("n"));
    }
}
