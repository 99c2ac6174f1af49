//! `/api/kv-cache/*`: the engines' prefix cache in the shape of ns-node's cache service. Entries are blocks of keys and
//! values, found by content: none has a name by which it could be asked for, and none expires.

use std::sync::Arc;

use axum::Extension;
use axum::body::Body;
use axum::extract::State;
use axum::http::Response;
use ns_llm::{Engine, Error, KvTierStats, ResponseCacheStats, Stats};
use serde_json::{Value, json};

use crate::app::App;
use crate::error::{ApiError, PlainError};
use crate::keys::Caller;
use crate::observe::found_nowhere;
use crate::response::json_response;

/// `GET /api/kv-cache/stats`: generations that found the beginning of their prompt, and how much of it; what lies in each tier; and
/// the response cache.
pub(crate) async fn stats(State(app): State<Arc<App>>) -> Response<Body> {
    let (hits, misses) = app.metrics.prefix_hits();
    let total = hits + misses;
    let stats: Vec<Stats> = app.models.iter().map(|model| model.engine.stats()).collect();
    let responses: Vec<ResponseCacheStats> = app.models.iter().map(|model| model.engine.responses().stats()).collect();
    let sum = |count: fn(&Stats) -> u64| stats.iter().map(count).sum::<u64>();
    let cached_blocks = sum(|stats| stats.kv_blocks_cached as u64);
    let tiers = tiers(&stats);
    let of_tier = |name: &str| tiers.iter().find(|tier| tier.name == name).copied().unwrap_or_default();
    let (disk, remote) = (of_tier("disk"), of_tier("remote"));
    let hit_rate = if total == 0 { 0.0 } else { (hits as f64 / total as f64 * 1e4).round() / 1e2 };
    json_response(&json!({
        "hits": hits,
        "misses": misses,
        "evictions": tiers.iter().map(|tier| tier.evictions).sum::<u64>(),
        "stores": tiers.iter().map(|tier| tier.stored).sum::<u64>(),
        "retrievals": hits,
        "diskReads": disk.hits,
        "diskWrites": disk.stored,
        "federatedQueries": remote.hits + remote.misses,
        "totalRequests": total,
        "hitRate": hit_rate,
        "memorySize": cached_blocks,
        "diskSize": disk.blocks,
        "enabled": true,
        "prefix": {
            "queryTokens": sum(|stats| stats.prefix_cache_queries_total),
            "hitTokens": sum(|stats| stats.prefix_cache_hits_total),
            "hitTokensByTier": {
                "pool": sum(|stats| stats.prefix_cache_hits_by_tier.pool as u64),
                "host": sum(|stats| stats.prefix_cache_hits_by_tier.host as u64),
                "disk": sum(|stats| stats.prefix_cache_hits_by_tier.disk as u64),
                "remote": sum(|stats| stats.prefix_cache_hits_by_tier.remote as u64),
            },
            "cachedBlocks": cached_blocks,
            "usedBlocks": sum(|stats| stats.kv_blocks_used as u64),
            "totalBlocks": sum(|stats| stats.kv_blocks_total as u64),
        },
        "tiers": tiers.iter().map(tier_object).collect::<Vec<_>>(),
        "responses": response_object(&responses),
    }))
}

/// Those of all models, by their names.
fn tiers(stats: &[Stats]) -> Vec<KvTierStats> {
    let mut tiers: Vec<KvTierStats> = Vec::new();
    for tier in stats.iter().flat_map(|stats| &stats.kv_tiers) {
        let Some(known) = tiers.iter_mut().find(|known| known.name == tier.name) else {
            tiers.push(*tier);
            continue;
        };
        *known = KvTierStats {
            name: tier.name,
            blocks: known.blocks + tier.blocks,
            bytes: known.bytes + tier.bytes,
            hits: known.hits + tier.hits,
            hit_bytes: known.hit_bytes + tier.hit_bytes,
            misses: known.misses + tier.misses,
            stored: known.stored + tier.stored,
            evictions: known.evictions + tier.evictions,
            faults: known.faults + tier.faults,
        };
    }
    tiers
}

fn tier_object(tier: &KvTierStats) -> Value {
    let KvTierStats { name, blocks, bytes, hits, hit_bytes, misses, stored, evictions, faults } = *tier;
    json!({
        "name": name, "entries": blocks, "bytes": bytes, "hits": hits, "hitBytes": hit_bytes, "misses": misses,
        "stores": stored, "evictions": evictions, "faults": faults,
    })
}

/// Hits by the place where the answer was.
fn response_object(stats: &[ResponseCacheStats]) -> Value {
    let sum = |count: fn(&ResponseCacheStats) -> u64| stats.iter().map(count).sum::<u64>();
    json!({
        "enabled": stats.iter().any(|stats| stats.max_bytes > 0),
        "answers": sum(|stats| stats.answers),
        "hits": { "memory": sum(|stats| stats.hits), "disk": sum(|stats| stats.disk_hits), "remote": sum(|stats| stats.remote_hits) },
        "misses": sum(found_nowhere),
        "stores": sum(|stats| stats.stores),
        "evictions": sum(|stats| stats.evictions),
        "entries": { "memory": sum(|stats| stats.entries), "disk": sum(|stats| stats.disk_entries) },
        "bytes": { "memory": sum(|stats| stats.bytes), "disk": sum(|stats| stats.disk_bytes) },
        "maxBytes": sum(|stats| stats.max_bytes),
        "faults": sum(|stats| stats.tier_faults),
    })
}

/// `POST /api/kv-cache/clear`: the prefixes and the kept answers of all models and callers, in memory and in files. Requests that
/// run are not touched.
pub(crate) async fn clear(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
) -> Result<Response<Body>, PlainError> {
    caller.check_admin()?;
    let engines: Vec<Engine> = app.models.iter().map(|model| model.engine.clone()).collect();
    // Files are removed, which may take its time.
    let work = move || {
        engines.iter().for_each(|engine| engine.responses().clear());
        // All of them, also when one fails.
        let results: Vec<_> = engines.iter().map(Engine::clear_prefix_cache).collect();
        results.into_iter().collect::<Result<(), Error>>()
    };
    let error = match app.cache_thread.run(caller.name(), work).await {
        Ok(Ok(())) => return Ok(json_response(&json!({ "success": true, "message": "Cache cleared" }))),
        Ok(Err(error)) => ApiError::from(error),
        Err(error) => error,
    };
    Ok(error.respond(&json!({ "success": false, "message": error.message, "error": error.message })))
}

/// `POST /api/kv-cache/prune`: answers that are too old. Keys and values never are.
pub(crate) async fn prune(State(app): State<Arc<App>>) -> Response<Body> {
    let pruned: usize = app.models.iter().map(|model| model.engine.responses().prune()).sum();
    json_response(&json!({ "success": true, "message": "Cache pruned", "pruned": pruned }))
}

/// `GET /api/kv-cache/{key}/exists`.
pub(crate) async fn exists() -> Response<Body> {
    json_response(&json!({ "exists": false }))
}

/// `DELETE /api/kv-cache/{key}`.
pub(crate) async fn remove() -> Response<Body> {
    json_response(&json!({ "success": false }))
}
