//! The table of all routes. What is not in it does not exist; what is in it is behind the guard, and in the test that
//! asks every route without a key; but for the files of the page, which hold nothing that a key protects.

use std::sync::Arc;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::http::StatusCode;
use axum::middleware::from_fn_with_state;
use axum::routing::{MethodRouter, delete, get, post};

use crate::api_document;
use crate::app::App;
use crate::error::ApiError;
use crate::guard::guard;
use crate::{ns_node, observe, ollama, openai, page, text, trace};

/// One route.
pub(crate) struct Route {
    pub(crate) method: &'static str,
    pub(crate) path: &'static str,
    handler: MethodRouter<Arc<App>>,
}

/// Every route.
pub(crate) fn table() -> Vec<Route> {
    let route = |method, path, handler| Route { method, path, handler };
    vec![
        route("GET", "/openapi.json", get(api_document::get)),
        route("GET", "/health", get(observe::health)),
        route("GET", "/ready", get(observe::ready)),
        route("GET", "/metrics", get(observe::metrics)),
        route("GET", "/trace", get(trace::record)),
        route("GET", "/v1/models", get(openai::models::list)),
        route("GET", "/v1/models/{*id}", get(openai::models::get)),
        route("POST", "/v1/chat/completions", post(openai::chat::create)),
        route("POST", "/v1/completions", post(openai::completions::create)),
        route("POST", "/v1/embeddings", post(openai::embeddings::create)),
        route("POST", "/v1/responses", post(openai::responses::create)),
        route("GET", "/v1/responses/{id}", get(openai::responses::get)),
        route("DELETE", "/v1/responses/{id}", delete(openai::responses::delete)),
        route("POST", "/v1/responses/{id}/cancel", post(openai::responses::cancel)),
        route("POST", "/tokenize", post(text::tokenize)),
        route("POST", "/detokenize", post(text::detokenize)),
        // Ollama's. Two of them are also those of ns-node's older service, which names its prompt `text`.
        route("GET", "/api/version", get(ollama::version)),
        route("GET", "/api/tags", get(ollama::tags)),
        route("GET", "/api/ps", get(ollama::loaded)),
        route("POST", "/api/show", post(ollama::show)),
        route("POST", "/api/generate", post(ollama::generate)),
        route("POST", "/api/chat", post(ollama::chat)),
        route("POST", "/api/embed", post(ollama::embed)),
        route("POST", "/api/embeddings", post(ollama::embeddings)),
        // ns-node's, and its older service's.
        route("POST", "/api/generate/stream", post(ns_node::generate::stream)),
        route("GET", "/api/gpu/status", get(ns_node::gpu::status)),
        route("POST", "/api/gpu/can-handle", post(ns_node::gpu::can_handle)),
        route("GET", "/api/gpu/utilization", get(ns_node::gpu::utilization)),
        route("GET", "/api/gpu/metadata", get(ns_node::gpu::metadata)),
        route("GET", "/api/gpu/peers", get(ns_node::gpu::peers)),
        route("GET", "/api/kv-cache/stats", get(ns_node::kv_cache::stats)),
        route("POST", "/api/kv-cache/clear", post(ns_node::kv_cache::clear)),
        route("POST", "/api/kv-cache/prune", post(ns_node::kv_cache::prune)),
        route("GET", "/api/kv-cache/{key}/exists", get(ns_node::kv_cache::exists)),
        route("DELETE", "/api/kv-cache/{key}", delete(ns_node::kv_cache::remove)),
        route("GET", "/api/performance/metrics", get(ns_node::performance::metrics)),
        route("GET", "/api/performance/report", get(ns_node::performance::report)),
        route("GET", "/api/performance/bottlenecks", get(ns_node::performance::bottlenecks)),
        route("POST", "/api/performance/clear", post(ns_node::performance::clear)),
    ]
}

/// Whether `path` is one that `pattern` stands for, as the router reads patterns: only at its end is a part not empty.
pub(crate) fn fits(pattern: &str, path: &str) -> bool {
    let (mut pattern, mut path) = (pattern.split('/'), path.split('/').peekable());
    loop {
        match (pattern.next(), path.next()) {
            (None, None) => return true,
            (Some(wanted), Some(given)) => {
                let is_something = !given.is_empty() || path.peek().is_some();
                if wanted.starts_with("{*") {
                    return is_something;
                }
                if wanted != given && !(wanted.starts_with('{') && is_something) {
                    return false;
                }
            }
            _ => return false,
        }
    }
}

pub(crate) fn router(app: &Arc<App>) -> Router {
    let mut router = table().into_iter().fold(Router::new(), |router, route| router.route(route.path, route.handler));
    router = match app.options.page {
        true => page::paths().fold(router, |router, path| router.route(path, get(page::file))),
        false => router.route("/", get(page::absent)),
    };
    router
        .fallback(async || ApiError::not_found("unknown_route", "there is no such route"))
        .method_not_allowed_fallback(async || {
            ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", "this route has another method")
        })
        // The guard reads bodies, with its own limit.
        .layer(DefaultBodyLimit::disable())
        .layer(from_fn_with_state(app.clone(), guard))
        .with_state(app.clone())
}
