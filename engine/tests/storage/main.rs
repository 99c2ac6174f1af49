//! Promise: what a disk or a shared store keeps comes back whole or not at all, whatever fails, ends or lies. Without an engine.

mod disk_mutations;
mod disk_tier;
mod disk_tier_kill;
mod older_files;
mod remote_redis;
mod remote_tier;

mod sim_disk;

#[path = "../support/redis_server.rs"]
mod redis_server;
