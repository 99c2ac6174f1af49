//! The remote tier: KV blocks in a store that several nodes share ([`RemoteStore`]; [`RedisStore`] for servers that speak
//! Redis's protocol).
//!
//! **Contract.** It never returns bytes that were not stored under the key; each call ends within its time; a fault is a
//! miss. The store is not trusted: what it answers is bounded before it is taken in, and believed only when it is the whole
//! record ([`record`]) of that very block.
//!
//! **What is found out.** Without a secret: damage of any kind, another block's record, another length, layout or version.
//! A store that *makes* a sound record with wrong numbers is found out only by nodes that share a secret: then each record
//! carries a keyed authentication code. The store can read what it holds, and that is as private as the prompts it
//! came from; the way to it is not encrypted either. Give it a network of its own.
//!
//! **Names.** `PREFIX:kv:1:AUTH:BLOCK:LAYOUT` (of the response cache `answer` instead of `kv`): the version of the record's format; `open`, or eight digits that belong to the
//! secret; both halves of the key in hexadecimal. Nodes of another version or secret use other names, and never meet.
//! Every record has a time to live, which is new again when a node finds that what it wants to store is there.

mod record;
mod redis;
mod resp;
mod server_url;

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use super::disk::Damage;
use super::{Fault, Job, Outcome, StoredKey, TierId, TierStats, TierStore};
use crate::config::{
    DEFAULT_REMOTE_PREFIX, DEFAULT_REMOTE_TTL_S, MAX_REMOTE_PREFIX_BYTES, MAX_REMOTE_SECRET_BYTES, MAX_REMOTE_TTL_S,
    MIN_REMOTE_SECRET_BYTES,
};
use crate::error::{Error, Result};
pub use record::{HEADER_BYTES, VERSION};
pub use redis::{RedisStore, StoreReport};
pub use server_url::ServerUrl;

/// A store of values by name that others use at the same time, and that forgets. Each call ends within a time that the
/// store knows; what it gives may be anything.
pub trait RemoteStore: Send {
    /// The value of `name`; `None`: it has none. Of one that is longer than `max_bytes` nothing is returned.
    fn get(&mut self, name: &str, max_bytes: u64) -> Result<Option<Vec<u8>>, Fault>;
    /// Gives `name` a value for `ttl_s` seconds. False: it has one already, for `ttl_s` seconds from now.
    fn put(&mut self, name: &str, value: &[u8], ttl_s: u64) -> Result<bool, Fault>;
    /// Gives `name` this value for `ttl_s` seconds, in the place of one that it may have.
    fn replace(&mut self, name: &str, value: &[u8], ttl_s: u64) -> Result<(), Fault>;
    /// Takes the value of `name` away, if it has one.
    fn remove(&mut self, name: &str) -> Result<(), Fault>;
}

/// What nodes know and the store does not. Not shown by `Debug`.
#[derive(Clone)]
pub(crate) struct Secret(Vec<u8>);

impl Secret {
    /// Keyed hash of `parts`, which follow one another without a mark: the first ends with a zero byte, all others but the
    /// last have a fixed length.
    fn code(&self, parts: &[&[u8]]) -> Hmac<Sha256> {
        let mut code = Hmac::<Sha256>::new_from_slice(&self.0).expect("a key of any length will do");
        parts.iter().for_each(|part| code.update(part));
        code
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(not shown)")
    }
}

/// How blocks are kept in a store; fixed for the life of a tier.
#[derive(Debug, Clone)]
pub struct RemoteOptions {
    max_payload_bytes: u64,
    ttl_s: u64,
    prefix: String,
    kind: &'static str,
    secret: Option<Secret>,
}

impl RemoteOptions {
    /// Blocks of at most `max_payload_bytes`, with every default.
    pub fn new(max_payload_bytes: u64) -> Self {
        let prefix = DEFAULT_REMOTE_PREFIX.to_string();
        RemoteOptions { max_payload_bytes, ttl_s: DEFAULT_REMOTE_TTL_S, prefix, kind: "kv", secret: None }
    }

    /// What stands in all names behind the beginning: what is kept for one purpose is never met by another.
    pub fn kind(mut self, kind: &'static str) -> Self {
        self.kind = kind;
        self
    }

    /// How long a block is kept that nobody stores again, seconds.
    pub fn ttl_s(mut self, ttl_s: u64) -> Result<Self> {
        if !(1..=MAX_REMOTE_TTL_S).contains(&ttl_s) {
            let expected = format!("1 to {MAX_REMOTE_TTL_S} seconds");
            return Err(Error::InvalidArgument { field: "kv_remote_ttl_s", value: ttl_s.to_string(), expected });
        }
        self.ttl_s = ttl_s;
        Ok(self)
    }

    /// What all names begin with.
    pub fn prefix(mut self, prefix: &str) -> Result<Self> {
        let is_plain = prefix.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-:{}".contains(&byte));
        if prefix.is_empty() || prefix.len() > MAX_REMOTE_PREFIX_BYTES || !is_plain {
            return Err(Error::InvalidArgument {
                field: "kv_remote_prefix",
                value: format!("{:?}", prefix.chars().take(MAX_REMOTE_PREFIX_BYTES).collect::<String>()),
                expected: format!("1 to {MAX_REMOTE_PREFIX_BYTES} letters, digits and ._-:{{}}"),
            });
        }
        self.prefix = prefix.to_string();
        Ok(self)
    }

    /// What all nodes know and the store does not: records are authenticated with it.
    pub fn secret(mut self, secret: &[u8]) -> Result<Self> {
        if !(MIN_REMOTE_SECRET_BYTES..=MAX_REMOTE_SECRET_BYTES).contains(&secret.len()) {
            return Err(Error::InvalidArgument {
                field: "kv_remote_secret",
                value: format!("{} bytes long", secret.len()),
                expected: format!("{MIN_REMOTE_SECRET_BYTES} to {MAX_REMOTE_SECRET_BYTES} bytes long"),
            });
        }
        self.secret = Some(Secret(secret.to_vec()));
        Ok(self)
    }
}

/// The blocks of one store.
pub struct RemoteTier {
    store: Box<dyn RemoteStore>,
    options: RemoteOptions,
    /// Beginning of all names.
    names: String,
    stats: TierStats,
    damaged: u64,
}

impl RemoteTier {
    /// Asks the store for nothing yet.
    pub fn new(store: Box<dyn RemoteStore>, options: RemoteOptions) -> Self {
        let auth = match &options.secret {
            None => "open".to_string(),
            Some(secret) => {
                let code = secret.code(&[b"ns-llm remote names\0"]).finalize().into_bytes();
                hexadecimal(code.iter().take(4))
            }
        };
        let names = format!("{}:{}:{VERSION}:{auth}", options.prefix, options.kind);
        RemoteTier { store, options, names, stats: TierStats::default(), damaged: 0 }
    }

    /// Stores a block; false: the store has a value for it already.
    pub fn put(&mut self, key: &StoredKey, payload: &[u8]) -> Result<bool, Fault> {
        let stored = self.try_put(key, payload);
        match &stored {
            Ok(is_new) => self.stats.stored += u64::from(*is_new),
            Err(_) => self.stats.faults += 1,
        }
        stored
    }

    /// Stores what is found by `key` from now on, in the place of what was there, for at most `ttl_s` seconds.
    pub fn replace(&mut self, key: &StoredKey, payload: &[u8], ttl_s: u64) -> Result<(), Fault> {
        let stored = self.record(key, payload).and_then(|it| self.store.replace(&self.name(key), &it, ttl_s));
        match &stored {
            Ok(()) => self.stats.stored += 1,
            Err(_) => self.stats.faults += 1,
        }
        stored
    }

    /// Fetches a block and checks it. `None`: it is not there.
    pub fn get(&mut self, key: &StoredKey) -> Result<Option<Vec<u8>>, Fault> {
        let name = self.name(key);
        let found = self.try_get(key, &name);
        match &found {
            Ok(Some(payload)) => {
                self.stats.hits += 1;
                self.stats.hit_bytes += payload.len() as u64;
            }
            Ok(None) => self.stats.misses += 1,
            Err(fault) => {
                self.stats.faults += 1;
                if let Fault::Damaged(_) = fault {
                    self.damaged += 1;
                    // It would stand in the way of a sound one. If it cannot be removed it ends with its time.
                    let _ = self.store.remove(&name);
                }
            }
        }
        found
    }

    /// Takes a block away, for all nodes.
    pub fn remove(&mut self, key: &StoredKey) -> Result<(), Fault> {
        let removed = self.store.remove(&self.name(key));
        self.stats.faults += u64::from(removed.is_err());
        removed
    }

    /// How long what is stored is kept at most, seconds.
    pub fn max_ttl_s(&self) -> u64 {
        self.options.ttl_s
    }
    /// What has happened. What the store holds is not known: others use it too.
    pub fn stats(&self) -> TierStats {
        self.stats
    }
    /// Records that were not what they should be, and so were no hits.
    pub fn num_damaged(&self) -> u64 {
        self.damaged
    }

    fn try_put(&mut self, key: &StoredKey, payload: &[u8]) -> Result<bool, Fault> {
        let record = self.record(key, payload)?;
        self.store.put(&self.name(key), &record, self.options.ttl_s)
    }

    fn record(&self, key: &StoredKey, payload: &[u8]) -> Result<Vec<u8>, Fault> {
        let (bytes, limit_bytes) = (payload.len() as u64, self.options.max_payload_bytes);
        if bytes > limit_bytes {
            return Err(Fault::TooLong { bytes, limit_bytes });
        }
        Ok(record::record(key, payload, self.options.secret.as_ref()))
    }

    fn try_get(&mut self, key: &StoredKey, name: &str) -> Result<Option<Vec<u8>>, Fault> {
        let max_bytes = self.options.max_payload_bytes.saturating_add(HEADER_BYTES as u64);
        let Some(mut value) = self.store.get(name, max_bytes)? else { return Ok(None) };
        if value.len() as u64 > max_bytes {
            return Err(Damage::Length { found_bytes: value.len() as u64, limit_bytes: max_bytes }.into());
        }
        record::check(&value, key, self.options.secret.as_ref())?;
        value.drain(..HEADER_BYTES);
        Ok(Some(value))
    }

    fn name(&self, key: &StoredKey) -> String {
        format!("{}:{}:{}", self.names, hexadecimal(&key.block.0), hexadecimal(&key.layout.0))
    }
}

impl TierStore for RemoteTier {
    fn id(&self) -> TierId {
        TierId::Remote
    }

    fn run(&mut self, job: Job) -> Outcome {
        let done = match job {
            Job::Read(key) => {
                self.get(&key).map(|found| found.map_or(Outcome::Missing, |it| Outcome::Found(it.into())))
            }
            Job::Write(key, bytes, _) => self.put(&key, &bytes).map(|_| Outcome::Stored),
            Job::Quarantine(key) => self.remove(&key).map(|()| Outcome::Missing),
            // Others use it too: what is in it ends with its time.
            Job::Clear => Ok(Outcome::Missing),
        };
        done.unwrap_or_else(Outcome::Fault)
    }

    /// What others or the time have taken away is found out when it is asked for.
    fn take_lost(&mut self) -> Vec<StoredKey> {
        Vec::new()
    }

    /// How durable the store is is its own affair.
    fn flush(&mut self) -> Result<(), Fault> {
        Ok(())
    }
}

impl std::fmt::Debug for RemoteTier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RemoteTier").field("names", &self.names).field("stats", &self.stats).finish_non_exhaustive()
    }
}

fn hexadecimal<'a>(bytes: impl IntoIterator<Item = &'a u8>) -> String {
    bytes.into_iter().map(|byte| format!("{byte:02x}")).collect()
}
