//! What a node tells of its models to those who choose between nodes: what is loaded, how much room and how much work there
//! is, and which beginnings of prompts it has lately answered.

use ns_llm::Stats;
use serde_json::{Value, json};

use crate::app::{App, Served};

/// `models`, `queue` and `prefixes` of `GET /api/gpu/metadata`. `owner`: name of the caller's key, which is told of its own
/// prompts only.
pub(crate) fn view(app: &App, owner: Option<&str>) -> Value {
    let models: Vec<(&Served, Stats)> = app.models.iter().map(|model| (model, model.engine.stats())).collect();
    let (running, waiting) = app.admission.counts();
    // What waits: requests in the line in front of the engines, which let them in, and sequences in those of the engines.
    let depth = waiting + models.iter().map(|(_, stats)| stats.num_sequences_waiting).sum::<usize>();
    json!({
        "models": models.iter().map(|(model, stats)| of_model(model, stats)).collect::<Vec<_>>(),
        "queue": { "depth": depth, "running": running, "waiting": waiting, "maxWaiting": app.options.max_waiting_requests },
        "prefixes": app.prefixes.of(owner),
        "accepting": !app.is_stopping(),
    })
}

fn of_model(model: &Served, stats: &Stats) -> Value {
    let info = model.engine.info();
    let tiers = stats.kv_tiers.iter().map(|tier| {
        json!({
            "name": tier.name,
            "blocks": tier.blocks,
            "bytes": tier.bytes,
            "hits": tier.hits,
            "misses": tier.misses,
            "stored": tier.stored,
            "evictions": tier.evictions,
            "faults": tier.faults,
        })
    });
    let hits = stats.prefix_cache_hits_by_tier;
    json!({
        "name": model.name,
        "device": info.device,
        "contextTokens": info.context_tokens,
        "running": stats.num_sequences_running,
        "waiting": stats.num_sequences_waiting,
        "preparing": stats.num_requests_preparing,
        // Blocks that are cached are given to whoever needs them.
        "kvBlocks": {
            "total": stats.kv_blocks_total,
            "used": stats.kv_blocks_used,
            "cached": stats.kv_blocks_cached,
            "free": stats.kv_blocks_free,
        },
        "hitTokens": { "pool": hits.pool, "host": hits.host, "disk": hits.disk, "remote": hits.remote },
        "tiers": tiers.collect::<Vec<_>>(),
    })
}
