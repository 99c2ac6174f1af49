//! What options are called, the same in every face: each enum of which an option takes one value lists its values, names
//! each, and finds it by that name. And all options of an engine by name, with which a test holds every face to
//! `engine/engine_options.json`: which option each of them has, under which name, or why not.

use crate::config::{EngineOptions, KvDtype, KvRemoteOptions, KvTierEncoding, ResponseCacheOptions, ThreadPriority};
use crate::error::{Error, Result};
use crate::request::{CacheUse, Priority};

/// `ALL` and `from_name` of an enum whose values have a `name`; `field` is what errors call the option.
macro_rules! named {
    ($option:ident, $field:literal, $($value:ident),+) => {
        impl $option {
            /// Every value.
            pub const ALL: &'static [$option] = &[$($option::$value),+];

            /// The value of that name, in any case.
            pub fn from_name(name: &str) -> Result<$option> {
                found(Self::ALL.iter().copied().find(|value| value.name().eq_ignore_ascii_case(name)), || {
                    unknown($field, name, Self::ALL.iter().map(|value| value.name()))
                })
            }
        }

        // A value that is not listed above does not compile.
        const _: fn($option) = |value| match value {
            $($option::$value => ()),+
        };
    };
}

named!(KvDtype, "kv_dtype", F32, F16, Bf16, Int8);
named!(KvTierEncoding, "kv_tier_encoding", AsComputed, Int8);
named!(ThreadPriority, "thread_priority", BelowNormal, Normal);
named!(Priority, "priority", High, Normal, Background);
named!(CacheUse, "cache use", Off, Read, ReadWrite);

fn found<T>(value: Option<T>, error: impl FnOnce() -> Error) -> Result<T> {
    value.ok_or_else(error)
}

fn unknown(field: &'static str, name: &str, names: impl Iterator<Item = &'static str>) -> Error {
    let expected = format!("one of {}", names.collect::<Vec<_>>().join(", "));
    Error::InvalidArgument { field, value: name.to_string(), expected }
}

/// What [`EngineOptions::kv_dtype`] is called when it is not given.
const AUTO: &str = "auto";

impl KvDtype {
    /// The value of [`EngineOptions::kv_dtype`] of that name: "auto" is `None`.
    pub fn from_name_or_auto(name: &str) -> Result<Option<KvDtype>> {
        if name.eq_ignore_ascii_case(AUTO) {
            return Ok(None);
        }
        let names = [AUTO].into_iter().chain(Self::ALL.iter().map(|dtype| dtype.name()));
        Self::from_name(name).map(Some).map_err(|_| unknown("kv_dtype", name, names))
    }
}

impl ThreadPriority {
    /// Name as in options.
    pub fn name(self) -> &'static str {
        match self {
            ThreadPriority::BelowNormal => "below-normal",
            ThreadPriority::Normal => "normal",
        }
    }
}

impl Priority {
    /// Name as in options.
    pub fn name(self) -> &'static str {
        match self {
            Priority::High => "high",
            Priority::Normal => "normal",
            Priority::Background => "background",
        }
    }
}

impl CacheUse {
    /// Name as in options.
    pub fn name(self) -> &'static str {
        match self {
            CacheUse::Off => "off",
            CacheUse::Read => "read",
            CacheUse::ReadWrite => "read-write",
        }
    }
}

/// Every option of an engine by its name, and its value as text; of a secret and of a callback only whether it is given.
/// For the tests that hold the faces to their table. A new option does not compile until it is here.
#[doc(hidden)]
pub fn options_by_name(options: &EngineOptions) -> Vec<(&'static str, String)> {
    macro_rules! listed {
        ($($name:literal: $value:expr),+ $(,)?) => {
            vec![$(($name, format!("{:?}", $value))),+]
        };
    }
    let EngineOptions {
        model,
        device,
        weights,
        kv_dtype,
        threads,
        thread_priority,
        context_tokens,
        kv_bytes,
        memory_limit_bytes,
        block_tokens,
        max_running_sequences,
        max_cuda_graphs,
        prefill_budget_tokens,
        mixed_budget_tokens,
        max_waiting_requests,
        prefix_cache,
        kv_host_bytes,
        kv_cache_dir,
        kv_disk_bytes,
        kv_remote,
        kv_tier_encoding,
        kv_load_budget_ms,
        kv_namespace_share,
        response_cache,
        on_progress,
    } = options;
    let none = KvRemoteOptions::new("");
    let KvRemoteOptions { url, secret, ttl_s, prefix, timeout_ms, owner_bytes } = kv_remote.as_ref().unwrap_or(&none);
    let ResponseCacheOptions { max_bytes, max_entries, ttl_ms, adaptive_ttl, version, disk_bytes, remote } =
        response_cache;
    listed! {
        "model": model,
        "device": device,
        "weights": weights,
        "kv_dtype": kv_dtype,
        "threads": threads,
        "thread_priority": thread_priority,
        "context_tokens": context_tokens,
        "kv_bytes": kv_bytes,
        "memory_limit_bytes": memory_limit_bytes,
        "block_tokens": block_tokens,
        "max_running_sequences": max_running_sequences,
        "max_cuda_graphs": max_cuda_graphs,
        "prefill_budget_tokens": prefill_budget_tokens,
        "mixed_budget_tokens": mixed_budget_tokens,
        "max_waiting_requests": max_waiting_requests,
        "prefix_cache": prefix_cache,
        "kv_host_bytes": kv_host_bytes,
        "kv_cache_dir": kv_cache_dir,
        "kv_disk_bytes": kv_disk_bytes,
        "kv_remote.url": url,
        "kv_remote.secret": secret.is_some(),
        "kv_remote.ttl_s": ttl_s,
        "kv_remote.prefix": prefix,
        "kv_remote.timeout_ms": timeout_ms,
        "kv_remote.owner_bytes": owner_bytes,
        "kv_tier_encoding": kv_tier_encoding,
        "kv_load_budget_ms": kv_load_budget_ms,
        "kv_namespace_share": kv_namespace_share,
        "response_cache.max_bytes": max_bytes,
        "response_cache.max_entries": max_entries,
        "response_cache.ttl_ms": ttl_ms,
        "response_cache.adaptive_ttl": adaptive_ttl,
        "response_cache.version": version,
        "response_cache.disk_bytes": disk_bytes,
        "response_cache.remote": remote,
        "on_progress": on_progress.is_some(),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Each name finds its value in any case; an unknown one is told all names.
    #[test]
    fn names_find_their_values() {
        fn check<T: PartialEq + Copy + std::fmt::Debug>(
            all: &[T],
            name: fn(T) -> &'static str,
            from_name: fn(&str) -> Result<T>,
        ) {
            for &value in all {
                assert_eq!(from_name(&name(value).to_uppercase()), Ok(value));
            }
            let error = from_name("sometimes").expect_err("unknown").to_string();
            assert!(all.iter().all(|&value| error.contains(name(value))), "{error}");
        }
        check(KvDtype::ALL, KvDtype::name, KvDtype::from_name);
        check(KvTierEncoding::ALL, KvTierEncoding::name, KvTierEncoding::from_name);
        check(ThreadPriority::ALL, ThreadPriority::name, ThreadPriority::from_name);
        check(Priority::ALL, Priority::name, Priority::from_name);
        check(CacheUse::ALL, CacheUse::name, CacheUse::from_name);
        assert_eq!(KvDtype::from_name_or_auto("Auto"), Ok(None));
        assert_eq!(KvDtype::from_name_or_auto("bf16"), Ok(Some(KvDtype::Bf16)));
        let error = KvDtype::from_name_or_auto("f8").expect_err("unknown").to_string();
        assert!(error.contains("auto, f32"), "{error}");
    }

    /// The table of the faces has each option once, and for each face a name or a reason why it has none.
    #[test]
    fn the_table_of_the_faces_has_every_option() {
        let table: serde_json::Value =
            serde_json::from_str(include_str!("../engine_options.json")).expect("the table is JSON");
        let rows = table["options"].as_array().expect("rows");
        let named: Vec<&str> = rows.iter().filter_map(|row| row["option"].as_str()).collect();
        let options: Vec<&str> = options_by_name(&EngineOptions::new("")).into_iter().map(|(name, _)| name).collect();
        assert_eq!(named.iter().collect::<BTreeSet<_>>(), options.iter().collect::<BTreeSet<_>>());
        assert_eq!(named.len(), options.len(), "an option is in the table twice");
        for row in rows {
            for face in ["c", "node", "cli"] {
                let reason = row[face]["none"].as_str().is_some_and(|reason| reason.len() > 10);
                assert!(row[face].is_string() || reason, "{}: neither a name nor a reason in {face}", row["option"]);
            }
        }
    }
}
