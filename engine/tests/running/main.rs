//! Promise: a running engine answers each request as if it were alone, with the same tokens whatever is cached or runs
//! beside it, and gives back what it took. All through `Engine`.

mod bad_requests;
mod cancellation;
mod continuous_batching;
mod determinism;
mod embeddings;
mod kv_remote;
mod kv_tiers;
mod kv_tiers_kill;
mod learned_positions;
mod prefix_cache;
mod prefix_miss;
mod response_cache;
mod weight_formats;

mod driver;

#[path = "../support/demo.rs"]
mod demo;
#[path = "../support/direct_run.rs"]
mod direct_run;
#[path = "../support/redis_server.rs"]
mod redis_server;
#[path = "../support/reference_backend.rs"]
mod reference_backend;
#[path = "../support/tiny_model.rs"]
mod tiny_model;
