//! What an engine keeps beyond its process: a directory, and a store that nodes share, each for KV blocks and for answers.

use std::path::Path;

use super::identity;
use crate::config::{EngineOptions, KvRemoteOptions, MIN_WRITE_QUEUE_BLOCKS, ResponseCacheOptions, WRITE_QUEUE_BYTES};
use crate::device::Target;
use crate::error::{Error, Result};
use crate::kv_cache::tiers::{TierStore, Tiers, TiersConfig};
use crate::memory_plan::StoredBlocks;
use crate::response_cache::MAX_ENTRY_BYTES;
use crate::response_tiers::{AnswerStore, DiskAnswers, RemoteAnswers};
use crate::storage::disk::{ANSWERS, Access, Directory, DiskOptions, DiskStore, draw_seed};
use crate::storage::remote::{RedisStore, RemoteOptions, RemoteStore, ServerUrl};
use crate::storage::{Fault, TierId};

/// All that was opened.
pub(super) struct Stores {
    /// `None`: no directory was given. A directory that is not understood is left alone.
    disk: Option<std::result::Result<DiskStore, Fault>>,
    /// Of KV blocks; asked for nothing yet.
    remote: Option<RemoteStore>,
    /// Where answers are kept.
    pub(super) answers: Vec<Box<dyn AnswerStore>>,
    disk_refusal: Option<String>,
}

impl Stores {
    /// Opens what `options` name, for blocks of `block_bytes`; `identity`: of the answers.
    pub(super) fn open(options: &EngineOptions, block_bytes: u64, identity: [u8; 32]) -> Result<Self> {
        let disk = options.kv_cache_dir.as_deref().map(|path| open_disk(path, options, block_bytes)).transpose()?;
        let mut disk_refusal = disk.as_ref().and_then(refusal).map(|fault| fault.to_string());
        let remote = options.kv_remote.as_ref().map(|remote| open_remote(remote, "kv", block_bytes)).transpose()?;
        let answers = open_answers(options, identity, &mut disk_refusal)?;
        Ok(Stores { disk, remote, answers, disk_refusal })
    }

    /// Why nothing is stored in the directory.
    pub(super) fn disk_refusal(&self) -> Option<&str> {
        self.disk_refusal.as_deref()
    }

    /// Tells the state machine of the tiers what it has; gives what does its jobs.
    pub(super) fn attach(self, options: &EngineOptions, tiers: Option<&mut Tiers>) -> Vec<Box<dyn TierStore>> {
        let mut tier_stores: Vec<Box<dyn TierStore>> = Vec::new();
        let Some(tiers) = tiers else { return tier_stores };
        if let Some(disk) = self.disk {
            if let Some(fault) = refusal(&disk) {
                tiers.forbid_writes(TierId::Disk, fault);
            }
            // What is not understood is left alone, and the engine does without.
            if let Ok(disk) = disk {
                tiers.found(TierId::Disk, disk.keys().copied());
                tier_stores.push(Box::new(disk));
            }
        }
        if let Some(remote) = self.remote {
            if let Some((limit_bytes, ttl_s)) = options.kv_remote.as_ref().and_then(KvRemoteOptions::owner_limit) {
                tiers.limit_owners(TierId::Remote, limit_bytes, ttl_s);
            }
            tier_stores.push(Box::new(remote));
        }
        tier_stores
    }
}

/// An engine whose keys and values end with each step keeps nothing. What was given for that is checked all the same.
pub(super) fn keep_nothing(options: &mut EngineOptions) -> Result<()> {
    let remote = options.kv_remote.take();
    remote.map(|remote| open_remote(&remote, "kv", 0)).transpose()?;
    (options.kv_host_bytes, options.kv_cache_dir) = (0, None);
    options.response_cache.max_bytes = 0;
    Ok(())
}

/// The blocks of earlier lives in a directory. A directory that cannot be made or entered is an error of who named it; what
/// is wrong inside is a fault of the tier.
fn open_disk(path: &Path, options: &EngineOptions, block_bytes: u64) -> Result<Result<DiskStore, Fault>> {
    let sizes = DiskOptions::new(options.kv_disk_bytes, block_bytes)?.owner_share(options.kv_namespace_share);
    let directory = Directory::open(path)?;
    let access = directory.access();
    Ok(DiskStore::open(Box::new(directory), access, sizes, draw_seed()))
}

/// Why nothing is written there.
fn refusal(disk: &Result<DiskStore, Fault>) -> Option<Fault> {
    match disk {
        Ok(disk) => (disk.access() == Access::Read).then_some(Fault::ReadOnly),
        Err(fault) => Some(fault.clone()),
    }
}

/// The places beyond the process where answers are kept: beneath the directory of the KV blocks, if this process writes
/// there, and in the store that has KV blocks too. Answers that are not understood are left alone; `refusal` says why, unless
/// the KV blocks have said so.
fn open_answers(
    options: &EngineOptions,
    identity: [u8; 32],
    refusal: &mut Option<String>,
) -> Result<Vec<Box<dyn AnswerStore>>> {
    let ResponseCacheOptions { max_bytes, disk_bytes, remote: is_shared, .. } = options.response_cache;
    let mut stores: Vec<Box<dyn AnswerStore>> = Vec::new();
    if max_bytes == 0 {
        return Ok(stores);
    }
    if let (Some(path), true) = (&options.kv_cache_dir, disk_bytes > 0) {
        let sizes = DiskOptions::new(disk_bytes, MAX_ENTRY_BYTES as u64).map_err(|error| match error {
            Error::InvalidArgument { value, expected, .. } => {
                Error::InvalidArgument { field: "response_cache.disk_bytes", value, expected }
            }
            other => other,
        })?;
        let sizes = sizes.owner_share(options.kv_namespace_share);
        let directory = Directory::open(&path.join(ANSWERS))?;
        // Who only reads does not hear what the writer makes invalid.
        if directory.access() == Access::Write {
            match DiskStore::open(Box::new(directory), Access::Write, sizes, draw_seed()) {
                Ok(tier) => stores.push(Box::new(DiskAnswers::open(tier))),
                Err(fault) => drop(refusal.get_or_insert_with(|| format!("answers: {fault}"))),
            }
        }
    }
    if let (Some(remote), true) = (&options.kv_remote, is_shared) {
        stores.push(Box::new(RemoteAnswers::new(open_remote(remote, "answer", MAX_ENTRY_BYTES as u64)?, identity)));
    }
    Ok(stores)
}

/// A store that nodes share; asked for nothing yet.
fn open_remote(options: &KvRemoteOptions, kind: &'static str, max_payload_bytes: u64) -> Result<RemoteStore> {
    let store = RedisStore::new(ServerUrl::parse(&options.url)?, options.timeout_ms)?;
    let records = RemoteOptions::new(max_payload_bytes).kind(kind);
    let mut records = records.ttl_s(options.ttl_s)?.prefix(&options.prefix)?;
    if let Some(secret) = &options.secret {
        records = records.secret(secret.as_bytes())?;
    }
    Ok(RemoteStore::new(Box::new(store), records))
}

/// `None`: the pool is all that there is.
pub(super) fn tiers_config(options: &EngineOptions, stored: &StoredBlocks, target: &Target) -> Option<TiersConfig> {
    let StoredBlocks { layout, block_bytes, .. } = stored;
    let disk = options.kv_cache_dir.iter().map(|_| TierId::Disk);
    let tiers: Vec<TierId> = disk.chain(options.kv_remote.iter().map(|_| TierId::Remote)).collect();
    if tiers.is_empty() && options.kv_host_bytes == 0 {
        return None;
    }
    // What the longest step publishes at once.
    let step_blocks = (options.prefill_budget_tokens / layout.block_tokens) as u64 + MIN_WRITE_QUEUE_BLOCKS;
    Some(TiersConfig {
        layout: identity::layout_id(layout, target),
        block_tokens: layout.block_tokens,
        block_bytes: usize::try_from(*block_bytes).ok()?,
        host_bytes: options.kv_host_bytes,
        write_queue_bytes: WRITE_QUEUE_BYTES.max(step_blocks.saturating_mul(*block_bytes)),
        load_budget_us: options.kv_load_budget_ms * 1_000,
        tiers,
    })
}
