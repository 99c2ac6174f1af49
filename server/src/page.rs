//! The page at `/`: a playground and a dashboard, as files in the program, so that it needs no build and no network. It gets
//! no more than any client does: it asks the server's own routes, with a key where one is needed. The files themselves hold
//! nothing that a key protects, and are given without one. Their policy lets a browser run and load what comes from this
//! server and nothing else; what a model says can only ever be text.

use axum::body::Body;
use axum::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, ETAG, IF_NONE_MATCH, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, Uri};
use sha2::{Digest, Sha256};

use crate::app::App;
use crate::error::{ApiError, ApiResult};
use crate::response::typed;

/// What the page may do. No inline script or style, no other site, no frame around it, no text that becomes markup.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; \
    base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'";
const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";

/// Path, type and contents of each file.
const FILES: &[(&str, &str, &str)] = &[
    ("/", HTML, include_str!("../page/index.html")),
    ("/page/page.css", CSS, include_str!("../page/page.css")),
    ("/page/icon.svg", "image/svg+xml", include_str!("../page/icon.svg")),
    ("/page/main.mjs", SCRIPT, include_str!("../page/main.mjs")),
    ("/page/chat.mjs", SCRIPT, include_str!("../page/chat.mjs")),
    ("/page/dashboard.mjs", SCRIPT, include_str!("../page/dashboard.mjs")),
    ("/page/charts.mjs", SCRIPT, include_str!("../page/charts.mjs")),
    ("/page/server.mjs", SCRIPT, include_str!("../page/server.mjs")),
    ("/page/prometheus.mjs", SCRIPT, include_str!("../page/prometheus.mjs")),
    ("/page/uplot/uPlot.js", SCRIPT, include_str!("../page/uplot/uPlot.iife.min.js")),
    ("/page/uplot/uPlot.css", CSS, include_str!("../page/uplot/uPlot.min.css")),
    ("/page/uplot/LICENSE", "text/plain; charset=utf-8", include_str!("../page/uplot/LICENSE")),
];

/// The paths of all files.
pub(crate) fn paths() -> impl Iterator<Item = &'static str> {
    FILES.iter().map(|(path, ..)| *path)
}

/// Whether there is something at `path` that needs no key.
pub(crate) fn answers(app: &App, path: &str) -> bool {
    path == "/" || (app.options.page && paths().any(|known| known == path))
}

/// `GET /` where there is no page: Ollama's command line asks for it before anything else.
pub(crate) async fn absent() -> Response<Body> {
    typed("text/plain; charset=utf-8", "ns-llm is running")
}

/// The route of each file.
pub(crate) async fn file(uri: Uri, headers: HeaderMap) -> ApiResult<Response<Body>> {
    let found = FILES.iter().find(|(path, ..)| *path == uri.path());
    let (_, content_type, text) =
        found.ok_or_else(|| ApiError::not_found("unknown_route", "there is no such route"))?;
    let tag: String = Sha256::digest(text)[..12].iter().map(|byte| format!("{byte:02x}")).collect();
    let tag = format!("\"{tag}\"");
    let is_known = headers.get(IF_NONE_MATCH).is_some_and(|known| known.as_bytes() == tag.as_bytes());
    let mut response = Response::new(if is_known { Body::empty() } else { Body::from(*text) });
    if is_known {
        *response.status_mut() = StatusCode::NOT_MODIFIED;
    }
    let fixed: [(HeaderName, &'static str); 6] = [
        (CONTENT_TYPE, content_type),
        (CONTENT_SECURITY_POLICY, POLICY),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (REFERRER_POLICY, "no-referrer"),
        (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
        // A new version of the program has new files: a browser asks each time, and mostly hears that its own are right.
        (CACHE_CONTROL, "no-cache"),
    ];
    for (name, value) in fixed {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    if let Ok(tag) = HeaderValue::from_str(&tag) {
        response.headers_mut().insert(ETAG, tag);
    }
    Ok(response)
}
