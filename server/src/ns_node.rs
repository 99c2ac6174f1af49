//! The routes of ns-node, and of the NS-LLM service beside it: shapes that their pages and scripts read, filled from the
//! engines and from what this server has counted.

pub(crate) mod cluster;
pub(crate) mod generate;
pub(crate) mod gpu;
pub(crate) mod kv_cache;
pub(crate) mod machine;
pub(crate) mod performance;

use axum::http::Uri;

/// The number that `name` has in the query, if it has one.
pub(crate) fn query_number(uri: &Uri, name: &str) -> Option<f64> {
    let pairs = uri.query()?.split('&').filter_map(|pair| pair.split_once('='));
    let value = pairs.filter(|(key, _)| *key == name).map(|(_, value)| value).next_back()?;
    value.parse().ok().filter(|number: &f64| number.is_finite() && *number > 0.0)
}
