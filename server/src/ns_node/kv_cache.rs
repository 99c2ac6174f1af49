//! `/api/kv-cache/*`: the engines' prefix cache in the shape of ns-node's cache service. Entries are blocks of keys and
//! values, found by content: none has a name by which it could be asked for, and none expires.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::http::{Response, StatusCode};
use ns_llm::{Engine, Error, Stats};
use serde_json::json;

use crate::app::App;
use crate::response::{json_response, json_with_status};

/// `GET /api/kv-cache/stats`: generations that found the beginning of their prompt, and how much of it.
pub(crate) async fn stats(State(app): State<Arc<App>>) -> Response<Body> {
    let (hits, misses) = app.metrics.prefix_hits();
    let total = hits + misses;
    let stats: Vec<Stats> = app.models.iter().map(|model| model.engine.stats()).collect();
    let sum = |count: fn(&Stats) -> u64| stats.iter().map(count).sum::<u64>();
    let cached_blocks = sum(|stats| stats.kv_blocks_cached as u64);
    let hit_rate = if total == 0 { 0.0 } else { (hits as f64 / total as f64 * 1e4).round() / 1e2 };
    json_response(&json!({
        "hits": hits,
        "misses": misses,
        "evictions": 0,
        "stores": 0,
        "retrievals": hits,
        "diskReads": 0,
        "diskWrites": 0,
        "federatedQueries": 0,
        "totalRequests": total,
        "hitRate": hit_rate,
        "memorySize": cached_blocks,
        "diskSize": 0,
        "enabled": true,
        "prefix": {
            "queryTokens": sum(|stats| stats.prefix_cache_queries_total),
            "hitTokens": sum(|stats| stats.prefix_cache_hits_total),
            "cachedBlocks": cached_blocks,
            "usedBlocks": sum(|stats| stats.kv_blocks_used as u64),
            "totalBlocks": sum(|stats| stats.kv_blocks_total as u64),
        },
    }))
}

/// `POST /api/kv-cache/clear`: the prefixes and the kept answers of all models, in memory and in files. Requests that run are
/// not touched.
pub(crate) async fn clear(State(app): State<Arc<App>>) -> Response<Body> {
    let engines: Vec<Engine> = app.models.iter().map(|model| model.engine.clone()).collect();
    // Files are removed, which may take its time.
    let work = move || {
        engines.iter().for_each(|engine| engine.responses().clear());
        // All of them, also when one fails.
        let results: Vec<_> = engines.iter().map(Engine::clear_prefix_cache).collect();
        results.into_iter().collect::<Result<(), Error>>()
    };
    match app.helper.run(work).await {
        Ok(Ok(())) => json_response(&json!({ "success": true, "message": "Cache cleared" })),
        Ok(Err(error)) => failed(&error.to_string()),
        Err(_) => failed("the cache could not be cleared now"),
    }
}

fn failed(message: &str) -> Response<Body> {
    let object = json!({ "success": false, "message": message, "error": message });
    json_with_status(StatusCode::INTERNAL_SERVER_ERROR, &object)
}

/// `POST /api/kv-cache/prune`: nothing is ever out of date, so nothing is left of what was.
pub(crate) async fn prune() -> Response<Body> {
    json_response(&json!({ "success": true, "message": "Cache pruned" }))
}

/// `GET /api/kv-cache/{key}/exists`.
pub(crate) async fn exists() -> Response<Body> {
    json_response(&json!({ "exists": false }))
}

/// `DELETE /api/kv-cache/{key}`.
pub(crate) async fn remove() -> Response<Body> {
    json_response(&json!({ "success": false }))
}
