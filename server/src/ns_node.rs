//! The routes of ns-node, and of the service called NS-LLM that had its models before (not this project, which is
//! ns-llm): shapes that their pages and scripts read, filled from the engines and from what this server has counted.

pub(crate) mod cluster;
pub(crate) mod generate;
pub(crate) mod gpu;
pub(crate) mod kv_cache;
pub(crate) mod machine;
pub(crate) mod performance;
