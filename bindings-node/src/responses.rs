//! The response cache as JavaScript holds it: of an engine, or on its own. Every call is a look-up in memory, so none waits.

use napi::Env;
use napi::bindgen_prelude::{Buffer, BufferSlice, Object, Uint8ArraySlice, Unknown};
use napi_derive::napi;
use ns_llm::Responses;

use crate::error::{Result, from_napi, to_js};
use crate::offload::caught;
use crate::request::{read_put_options, read_response_cache_options, read_text};

/// Finished answers, and values that a caller keeps beside them.
#[napi]
pub struct NativeResponses {
    responses: Responses,
}

#[napi]
impl NativeResponses {
    pub(crate) fn of(responses: Responses) -> Self {
        NativeResponses { responses }
    }

    /// One without an engine: `{ maxBytes, maxEntries, ttlMs, adaptiveTtl, version }`.
    #[napi(constructor, catch_unwind)]
    pub fn new(#[napi(ts_arg_type = "Record<string, unknown>")] options: Object) -> Result<Self> {
        let options = read_response_cache_options(&options)?;
        Responses::new(options).map(NativeResponses::of).map_err(|error| to_js(&error))
    }

    /// Keeps a copy of `value`: whether it was kept. `options`: `{ ttlMs, tags }`.
    #[napi(catch_unwind)]
    pub fn put(
        &self,
        #[napi(ts_arg_type = "string")] name: Unknown,
        value: Uint8ArraySlice,
        #[napi(ts_arg_type = "Record<string, unknown>")] options: Object,
    ) -> Result<bool> {
        let (name, options) = (read_text("key", name)?, read_put_options(&options)?);
        caught(|| self.responses.put(&name, &value, &options)).map_err(|error| to_js(&error))
    }

    /// A copy of the value of `name`, when it is there and not too old.
    #[napi(catch_unwind, ts_return_type = "Uint8Array | null")]
    pub fn get<'env>(
        &self,
        env: &'env Env,
        #[napi(ts_arg_type = "string")] name: Unknown,
    ) -> Result<Option<BufferSlice<'env>>> {
        let value = self.responses.get(&read_text("key", name)?);
        value.map(|value| BufferSlice::copy_from(env, value)).transpose().map_err(from_napi)
    }

    /// The same, with how it was used; this time counts.
    #[napi(catch_unwind)]
    pub fn get_with_use(&self, #[napi(ts_arg_type = "string")] name: Unknown) -> Result<Option<NativeEntry>> {
        let found = self.responses.get_with_use(&read_text("key", name)?);
        Ok(found.map(|(value, used)| NativeEntry {
            value: value.to_vec().into(),
            stored_at: used.stored_ms as f64,
            last_accessed: used.last_used_ms as f64,
            access_count: used.hits as f64,
        }))
    }

    /// Whether `name` would be found.
    #[napi(catch_unwind)]
    pub fn contains(&self, #[napi(ts_arg_type = "string")] name: Unknown) -> Result<bool> {
        Ok(self.responses.contains(&read_text("key", name)?))
    }

    /// Gives a value up: whether it was there.
    #[napi(catch_unwind)]
    pub fn remove(&self, #[napi(ts_arg_type = "string")] name: Unknown) -> Result<bool> {
        Ok(self.responses.remove(&read_text("key", name)?))
    }

    /// Gives up everything with this tag: how many entries that were.
    #[napi(catch_unwind)]
    pub fn invalidate(&self, #[napi(ts_arg_type = "string")] tag: Unknown) -> Result<f64> {
        Ok(self.responses.invalidate(&read_text("tag", tag)?) as f64)
    }

    /// Moves to the next version, and gives its number.
    #[napi(catch_unwind)]
    pub fn bump_version(&self) -> f64 {
        self.responses.bump_version() as f64
    }

    /// Gives everything up.
    #[napi(catch_unwind)]
    pub fn clear(&self) {
        self.responses.clear();
    }

    /// Gives up what is too old: how many entries that were.
    #[napi(catch_unwind)]
    pub fn prune(&self) -> f64 {
        self.responses.prune() as f64
    }

    /// Counts, and what it holds.
    #[napi(catch_unwind)]
    pub fn stats(&self) -> ResponseCacheStats {
        self.responses.stats().into()
    }
}

/// A value, and how it was used: times in milliseconds since 1970.
#[napi(object, object_from_js = false)]
pub struct NativeEntry {
    /// A copy.
    #[napi(ts_type = "Uint8Array")]
    pub value: Buffer,
    /// When it was stored.
    pub stored_at: f64,
    /// When it was found last.
    pub last_accessed: f64,
    /// How often it was found.
    pub access_count: f64,
}

/// What a response cache has done and holds. Counters only grow.
#[napi(object, object_from_js = false)]
pub struct ResponseCacheStats {
    /// Requests that were answered from it.
    pub answers: f64,
    /// Look-ups, of requests and by key, that found something.
    pub hits: f64,
    /// Look-ups that did not.
    pub misses: f64,
    /// Entries stored.
    pub stores: f64,
    /// Entries given up for want of room.
    pub evictions: f64,
    /// Entries given up because their time was over.
    pub expired: f64,
    /// Entries given up by tag, by version, or all at once.
    pub invalidated: f64,
    /// Answers not stored because they had become invalid while they were computed.
    pub outdated: f64,
    /// Answers and values not stored because they were too large.
    pub too_large: f64,
    /// Entries held.
    pub entries: f64,
    /// Bytes of these.
    pub bytes: f64,
    /// The budget.
    pub max_bytes: f64,
    /// The version that every key holds.
    pub version: f64,
    /// Requests that were answered from files; each is counted as a miss above.
    pub disk_hits: f64,
    /// Answers in files.
    pub disk_entries: f64,
    /// Bytes of these files.
    pub disk_bytes: f64,
    /// Requests that were answered from a store that nodes share; each is counted as a miss above.
    pub remote_hits: f64,
    /// Answers written to files and to that store.
    pub tier_stores: f64,
    /// Answers not written there: too much waited, or the place was left alone because it failed.
    pub tier_drops: f64,
    /// Calls to these places that failed, damaged answers included. Each was a miss and no more.
    pub tier_faults: f64,
    /// Requests that were computed because these places took too long to answer.
    pub tier_give_ups: f64,
}

impl From<ns_llm::ResponseCacheStats> for ResponseCacheStats {
    fn from(stats: ns_llm::ResponseCacheStats) -> Self {
        ResponseCacheStats {
            answers: stats.answers as f64,
            hits: stats.hits as f64,
            misses: stats.misses as f64,
            stores: stats.stores as f64,
            evictions: stats.evictions as f64,
            expired: stats.expired as f64,
            invalidated: stats.invalidated as f64,
            outdated: stats.outdated as f64,
            too_large: stats.too_large as f64,
            entries: stats.entries as f64,
            bytes: stats.bytes as f64,
            max_bytes: stats.max_bytes as f64,
            version: stats.version as f64,
            disk_hits: stats.disk_hits as f64,
            disk_entries: stats.disk_entries as f64,
            disk_bytes: stats.disk_bytes as f64,
            remote_hits: stats.remote_hits as f64,
            tier_stores: stats.tier_stores as f64,
            tier_drops: stats.tier_drops as f64,
            tier_faults: stats.tier_faults as f64,
            tier_give_ups: stats.tier_give_ups as f64,
        }
    }
}
