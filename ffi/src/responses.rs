//! # Response cache
//!
//! Whole answers, given again without computing a token to requests for the same: `response_cache_bytes` of
//! `ns_llm_engine_params` turns it on, `response_cache` of `ns_llm_request_params` says what part it has in a request. This is
//! to forget and to count.

use std::ffi::c_char;

use ns_llm_core::ResponseCacheStats;
use ns_llm_core::config::MAX_NAME_BYTES;

use crate::engine::{ENGINES, ns_llm_engine};
use crate::failure::boundary;
use crate::params::{SizedStruct, check_struct, write_struct};
use crate::status::ns_llm_status;
use crate::text::{Out, ns_llm_text, read_text};

/// What the response cache of an engine has done and holds. Those named `_total` only grow.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ns_llm_response_cache_stats {
    /// `sizeof(ns_llm_response_cache_stats)`.
    pub struct_size: usize,
    /// Requests that were answered from it.
    pub answers_total: u64,
    /// Look-ups that found something.
    pub hits_total: u64,
    /// Look-ups that did not.
    pub misses_total: u64,
    /// Entries stored.
    pub stores_total: u64,
    /// Entries given up for want of room.
    pub evictions_total: u64,
    /// Entries given up because their time was over.
    pub expired_total: u64,
    /// Entries given up by tag, or all at once.
    pub invalidated_total: u64,
    /// Answers not stored because they had become invalid while they were computed.
    pub outdated_total: u64,
    /// Answers not stored because they were too large.
    pub too_large_total: u64,
    /// Entries held.
    pub entries: u64,
    /// Bytes of these.
    pub bytes: u64,
    /// The budget.
    pub max_bytes: u64,
    /// Requests that were answered from files; each is counted as a miss above.
    pub disk_hits_total: u64,
    /// Answers in files.
    pub disk_entries: u64,
    /// Bytes of these files.
    pub disk_bytes: u64,
    /// Requests that were answered from a store that nodes share; each is counted as a miss above.
    pub remote_hits_total: u64,
    /// Answers written to files and to that store.
    pub tier_stores_total: u64,
    /// Answers not written there: too much waited, or the place was left alone because it failed.
    pub tier_drops_total: u64,
    /// Calls to these places that failed, damaged answers included. Each was a miss and no more.
    pub tier_faults_total: u64,
    /// Requests that were computed because these places took too long to answer.
    pub tier_give_ups_total: u64,
}

// SAFETY: `repr(C)`, begins with a `usize`, all numbers.
unsafe impl SizedStruct for ns_llm_response_cache_stats {}

/// Says what the response cache of an engine has done and holds.
///
/// Ownership:  `*out_stats` is the caller's.
/// Threads:    any, also inside a callback.
/// NULL:       `out_stats` must not be NULL.
/// Returns:    NS_LLM_OK; NS_LLM_BAD_HANDLE; NS_LLM_NULL_ARGUMENT; NS_LLM_MISALIGNED_POINTER; NS_LLM_INVALID_ARGUMENT
///             about `struct_size`; NS_LLM_FORKED_PROCESS; NS_LLM_INTERNAL.
/// On failure: `*out_stats` is unchanged.
///
/// # Safety
/// `out_stats` points to a `size_t` and to as many writable bytes as that says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ns_llm_responses_stats(
    engine: ns_llm_engine,
    out_stats: *mut ns_llm_response_cache_stats,
) -> ns_llm_status {
    boundary(|| {
        // SAFETY: promised by the caller.
        unsafe { check_struct("out_stats", out_stats) }?;
        let live = ENGINES.get(engine)?;
        // SAFETY: promised by the caller.
        unsafe { write_struct("out_stats", out_stats, &live.engine.responses().stats().into()) }
    })
}

/// Forgets every kept answer whose request had this tag, in all namespaces. Answers with it that are just being computed are
/// not kept either. In files and in a shared store they are not found any more; that is written behind, and outlives the
/// process once ns_llm_engine_flush() has returned. Other nodes keep what they have in memory until its time is over.
///
/// Ownership:  `tag` is the caller's.
/// Threads:    any, also inside a callback.
/// NULL:       `tag` may be NULL if `tag_size` is 0; `out_num` must not be NULL.
/// Returns:    NS_LLM_OK, also if no answer had it; NS_LLM_BAD_HANDLE; NS_LLM_NULL_ARGUMENT; NS_LLM_MISALIGNED_POINTER;
///             NS_LLM_INVALID_UTF8; NS_LLM_INVALID_ARGUMENT if the tag has more than 512 bytes; NS_LLM_FORKED_PROCESS;
///             NS_LLM_INTERNAL.
/// On failure: nothing is forgotten, and `*out_num` is 0; else it is the number of answers that were, in memory.
///
/// # Safety
/// `tag` points to `tag_size` readable bytes, `out_num` to a writable `size_t`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ns_llm_responses_invalidate(
    engine: ns_llm_engine,
    tag: *const c_char,
    tag_size: usize,
    out_num: *mut usize,
) -> ns_llm_status {
    boundary(|| {
        // SAFETY: promised by the caller.
        let out = unsafe { Out::new("out_num", out_num, 0) }?;
        let live = ENGINES.get(engine)?;
        // SAFETY: promised by the caller.
        let tag = unsafe { read_text("tag", ns_llm_text { data: tag, size: tag_size }, MAX_NAME_BYTES) }?;
        out.set(live.engine.responses().invalidate(&tag));
        Ok(())
    })
}

/// Forgets every kept answer, and does not keep those that are just being computed: also in files, and for all nodes in a
/// shared store, as ns_llm_responses_invalidate() does.
///
/// Threads:    any, also inside a callback.
/// Returns:    NS_LLM_OK; NS_LLM_BAD_HANDLE (also for 0); NS_LLM_FORKED_PROCESS; NS_LLM_INTERNAL.
#[unsafe(no_mangle)]
pub extern "C" fn ns_llm_responses_clear(engine: ns_llm_engine) -> ns_llm_status {
    boundary(|| {
        ENGINES.get(engine)?.engine.responses().clear();
        Ok(())
    })
}

impl From<ResponseCacheStats> for ns_llm_response_cache_stats {
    fn from(stats: ResponseCacheStats) -> Self {
        ns_llm_response_cache_stats {
            struct_size: size_of::<ns_llm_response_cache_stats>(),
            answers_total: stats.answers,
            hits_total: stats.hits,
            misses_total: stats.misses,
            stores_total: stats.stores,
            evictions_total: stats.evictions,
            expired_total: stats.expired,
            invalidated_total: stats.invalidated,
            outdated_total: stats.outdated,
            too_large_total: stats.too_large,
            entries: stats.entries,
            bytes: stats.bytes,
            max_bytes: stats.max_bytes,
            disk_hits_total: stats.disk_hits,
            disk_entries: stats.disk_entries,
            disk_bytes: stats.disk_bytes,
            remote_hits_total: stats.remote_hits,
            tier_stores_total: stats.tier_stores,
            tier_drops_total: stats.tier_drops,
            tier_faults_total: stats.tier_faults,
            tier_give_ups_total: stats.tier_give_ups,
        }
    }
}
