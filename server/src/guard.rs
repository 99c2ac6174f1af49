//! What every request passes before its route, whichever that is: its id, its size, the host it was sent to, the page it
//! comes from, its key, that key's rate, and its body, read whole and in time. Routes added later are behind it too.

use std::future::poll_fn;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{Request, State};
use axum::http::header::{
    ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN,
    ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, ACCESS_CONTROL_REQUEST_HEADERS,
    ACCESS_CONTROL_REQUEST_METHOD, CONNECTION, CONTENT_ENCODING, CONTENT_LENGTH, HOST, ORIGIN, VARY,
};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode, Uri};
use axum::middleware::Next;
use axum::response::IntoResponse;

use crate::app::App;
use crate::bodies::HeldBody;
use crate::error::{ApiError, ApiResult, PlainError, Untold};
use crate::options::{MAX_HEAD_BYTES, MAX_HEADERS, MAX_REQUEST_ID_BYTES, MAX_URI_BYTES};
use crate::otlp::TraceParent;
use crate::page;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Paths of probes, which may be open to all.
const PROBES: [&str; 2] = ["/health", "/ready"];

/// The server's own end of the connection that a request came by, as an extension of it: a host that mounts the router says so,
/// and the guard keeps [`crate::ServerOptions::check_address`] for it.
#[derive(Debug, Clone, Copy)]
pub struct LocalAddress(pub IpAddr);

/// The layer around all routes.
pub(crate) async fn guard(State(app): State<Arc<App>>, request: Request, next: Next) -> Response<Body> {
    let id = request_id(&app, request.headers());
    let has_plain_errors = request.uri().path().starts_with("/api/");
    let origin = allowed_origin(&app, request.headers());
    let result = match check(&app, request, &id).await {
        // Its body counts until it has an answer, or the beginning of one.
        Ok(Checked::Route(request, _held)) => Ok(next.run(*request).await),
        Ok(Checked::Preflight(wanted)) => Ok(preflight(wanted)),
        Err(error) => Err(error),
    };
    let mut response = result.unwrap_or_else(|error| match has_plain_errors {
        true => PlainError(error).into_response(),
        false => error.into_response(),
    });
    if let Some(Untold { code, detail }) = response.extensions_mut().remove() {
        app.report(id.to_str().unwrap_or_default(), code, &detail);
    }
    let headers = response.headers_mut();
    headers.insert(REQUEST_ID, id);
    if app.is_stopping() {
        headers.insert(CONNECTION, HeaderValue::from_static("close"));
    }
    if let Some(origin) = origin {
        headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        headers.insert(ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static("x-request-id, retry-after"));
        headers.append(VARY, HeaderValue::from_static("origin"));
    }
    response
}

enum Checked {
    /// It may go to its route.
    Route(Box<Request>, Option<HeldBody>),
    /// A browser asks whether it may ask, with these headers.
    Preflight(Option<HeaderValue>),
}

async fn check(app: &Arc<App>, request: Request, id: &HeaderValue) -> ApiResult<Checked> {
    check_head(request.uri(), request.headers())?;
    check_address(app, request.extensions().get())?;
    check_host(app, request.uri(), request.headers())?;
    check_origin(app, request.headers())?;
    if request.method() == Method::OPTIONS && request.headers().contains_key(ACCESS_CONTROL_REQUEST_METHOD) {
        // Carries no key, and does nothing. Without a page that may ask, `check_origin` has refused it.
        return Ok(Checked::Preflight(request.headers().get(ACCESS_CONTROL_REQUEST_HEADERS).cloned()));
    }
    let path = request.uri().path();
    let is_open = app.options.public_probes && PROBES.contains(&path);
    let is_page = page::answers(app, path) && matches!(*request.method(), Method::GET | Method::HEAD);
    if is_open || is_page {
        return Ok(Checked::Route(Box::new(request), None));
    }
    let mut caller = app.keys.caller(request.headers())?;
    let is_work = !matches!(*request.method(), Method::GET | Method::HEAD | Method::OPTIONS);
    if is_work {
        if app.is_stopping() {
            return Err(ApiError::stopping());
        }
        caller.take_request(Instant::now())?;
    }
    let (mut parts, body) = request.into_parts();
    caller.request_id = id.to_str().unwrap_or_default().into();
    caller.trace_parent = TraceParent::read(&parts.headers).map(Arc::new);
    let mut held = HeldBody::new(app, &caller);
    parts.extensions.insert(caller);
    let body = read_body(app, &parts.headers, body, &mut held).await?;
    Ok(Checked::Route(Box::new(Request::from_parts(parts, Body::from(body))), Some(held)))
}

/// The client's id of the request when it can be repeated, else a new one.
fn request_id(app: &App, headers: &HeaderMap) -> HeaderValue {
    let is_fit = |id: &&HeaderValue| {
        let bytes = id.as_bytes();
        (1..=MAX_REQUEST_ID_BYTES).contains(&bytes.len()) && bytes.iter().all(u8::is_ascii_graphic)
    };
    match headers.get(REQUEST_ID).filter(is_fit) {
        Some(id) => id.clone(),
        None => HeaderValue::from_str(&app.new_id("req_")).unwrap_or(HeaderValue::from_static("req_unknown")),
    }
}

fn check_head(uri: &Uri, headers: &HeaderMap) -> ApiResult<()> {
    let uri_bytes = uri.path_and_query().map_or(0, |target| target.as_str().len());
    if uri_bytes > MAX_URI_BYTES {
        let message = format!("the target has {uri_bytes} bytes, at most {MAX_URI_BYTES} are allowed");
        return Err(ApiError::new(StatusCode::URI_TOO_LONG, "uri_too_long", message));
    }
    if !is_text(uri.path()) {
        let message = "the path is not UTF-8 when it is decoded";
        return Err(ApiError::new(StatusCode::BAD_REQUEST, "invalid_path", message));
    }
    let bytes: usize = headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 4).sum();
    if headers.len() > MAX_HEADERS || bytes > MAX_HEAD_BYTES {
        let message = format!(
            "the request has {} headers of {bytes} bytes, at most {MAX_HEADERS} of {MAX_HEAD_BYTES} are allowed",
            headers.len()
        );
        return Err(ApiError::new(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, "headers_too_large", message));
    }
    Ok(())
}

/// Whether a path is text as its routes decode it (RFC 3986, section 2.1); what is no code is taken as it stands.
fn is_text(path: &str) -> bool {
    if !path.contains('%') {
        return true;
    }
    let (mut rest, mut decoded) = (path.as_bytes(), Vec::with_capacity(path.len()));
    while let [first, after @ ..] = rest {
        let digit = |idx: usize| after.get(idx).and_then(|&byte| (byte as char).to_digit(16));
        match (first, digit(0), digit(1)) {
            (b'%', Some(high), Some(low)) => {
                decoded.push((high * 16 + low) as u8);
                rest = &after[2..];
            }
            _ => {
                decoded.push(*first);
                rest = after;
            }
        }
    }
    std::str::from_utf8(&decoded).is_ok()
}

/// Without a key, only those on this machine are answered.
fn check_address(app: &App, address: Option<&LocalAddress>) -> ApiResult<()> {
    let is_closed = address.is_some_and(|address| app.options.check_address(address.0.to_canonical()).is_err());
    match is_closed {
        true => {
            let message = "this server has no API key: it answers on its own machine alone";
            Err(ApiError::new(StatusCode::FORBIDDEN, "open_to_all", message))
        }
        false => Ok(()),
    }
}

/// The name by which the server was asked for must be one of its own: a page whose name was made to point here is not.
fn check_host(app: &App, uri: &Uri, headers: &HeaderMap) -> ApiResult<()> {
    let allowed = &app.options.allowed_hosts;
    if allowed.iter().any(|host| host == "*") {
        return Ok(());
    }
    let mut hosts = headers.get_all(HOST).iter();
    let (host, second) = (hosts.next(), hosts.next());
    let (Some(host), None) = (host.and_then(|host| host.to_str().ok()), second) else {
        return Err(ApiError::new(StatusCode::BAD_REQUEST, "invalid_host", "exactly one Host header is needed"));
    };
    let named = [Some(host), uri.authority().map(|authority| authority.as_str())];
    let is_own = |name: &str| allowed.iter().any(|host| host.eq_ignore_ascii_case(without_port(name)));
    match named.into_iter().flatten().all(is_own) {
        true => Ok(()),
        false => Err(ApiError::new(StatusCode::MISDIRECTED_REQUEST, "invalid_host", "this host is not served here")),
    }
}

fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    }
}

/// Pages of other sites are refused, also where a browser would send their request without asking first.
fn check_origin(app: &App, headers: &HeaderMap) -> ApiResult<()> {
    let Some(origin) = headers.get(ORIGIN) else { return Ok(()) };
    let is_own_page = || {
        let (origin, host) = (origin.to_str().ok()?, headers.get(HOST)?.to_str().ok()?);
        let (_, site) = origin.split_once("://")?;
        Some(site.eq_ignore_ascii_case(host))
    };
    match allowed_origin(app, headers).is_some() || is_own_page() == Some(true) {
        true => Ok(()),
        false => {
            Err(ApiError::new(StatusCode::FORBIDDEN, "origin_not_allowed", "pages of this origin may not ask here"))
        }
    }
}

/// The page that may read the answer.
fn allowed_origin(app: &App, headers: &HeaderMap) -> Option<HeaderValue> {
    let origin = headers.get(ORIGIN)?;
    app.options.cors_origins.iter().any(|allowed| allowed.as_bytes() == origin.as_bytes()).then(|| origin.clone())
}

/// Clients add headers of their own, none of which says more than the key: a page that may ask may send what it likes.
fn preflight(wanted: Option<HeaderValue>) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::NO_CONTENT;
    let headers = response.headers_mut();
    headers.insert(ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, POST, DELETE"));
    let usual = HeaderValue::from_static("authorization, content-type, x-api-key, x-request-id");
    headers.insert(ACCESS_CONTROL_ALLOW_HEADERS, wanted.unwrap_or(usual));
    headers.append(VARY, HeaderValue::from_static("access-control-request-headers"));
    headers.insert(ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("600"));
    response
}

/// The body, whole. What announces itself as too long is refused unread.
async fn read_body(app: &App, headers: &HeaderMap, body: Body, held: &mut HeldBody) -> ApiResult<Bytes> {
    let limit = app.options.max_body_bytes;
    if headers.get(CONTENT_ENCODING).is_some_and(|encoding| encoding != "identity") {
        let message = "a body must not be encoded";
        return Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "encoding_not_supported", message));
    }
    let announced = headers.get(CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|bytes| bytes > limit as u64) {
        return Err(too_large(limit));
    }
    app.within(app.options.body_timeout, collect(body, limit, held)).await.unwrap_or_else(|| {
        let message = format!("the body did not come within {:?}", app.options.body_timeout);
        Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, "body_timeout", message))
    })
}

async fn collect(mut body: Body, limit: usize, held: &mut HeldBody) -> ApiResult<Bytes> {
    let (mut first, mut whole) = (Bytes::new(), Vec::new());
    while let Some(frame) = poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {
        let unreadable =
            |_| ApiError::new(StatusCode::BAD_REQUEST, "body_unreadable", "the body ended early or is not framed");
        let Ok(piece) = frame.map_err(unreadable)?.into_data() else { continue };
        let bytes = first.len() + whole.len();
        if piece.len() > limit - bytes {
            return Err(too_large(limit));
        }
        held.grow(piece.len())?;
        if bytes == 0 {
            first = piece;
        } else {
            // A small piece may hold the whole of the buffer that it came in.
            whole.extend_from_slice(&std::mem::take(&mut first));
            whole.extend_from_slice(&piece);
        }
    }
    Ok(if whole.is_empty() { first } else { Bytes::from(whole) })
}

fn too_large(limit: usize) -> ApiError {
    let message = format!("the body has more than {limit} bytes");
    ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message)
}
