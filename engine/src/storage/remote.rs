//! The remote store: records in a store of values that several nodes share ([`ValueStore`]; [`RedisStore`] for servers that
//! speak Redis's protocol).
//!
//! **Contract.** It never returns bytes that were not stored under the key; each call ends within its time; a fault is a
//! miss. The store is not trusted: what it answers is bounded before it is taken in, and believed only when it is the whole
//! record ([`record`]) of that very key.
//!
//! **What is found out.** Without a secret: damage of any kind, the record of another key, another length, layout or version.
//! A store that *makes* a sound record with wrong numbers is found out only by nodes that share a secret: then each record
//! carries a keyed authentication code. The store can read what it holds, and that is as private as the prompts it
//! came from; the way to it is not encrypted either. Give it a network of its own.
//!
//! **Names.** `PREFIX:KIND:1:AUTH:CONTENT:LAYOUT`: what it is kept for (`kv`, or `answer` of the response cache); the
//! version of the record's format; `open`, or eight digits that belong to the secret; both halves of the key in hexadecimal.
//! Nodes of another version or secret use other names, and never meet.
//! Every record has a time to live, which is new again when a node finds that what it wants to store is there.

mod record;
mod redis;
mod resp;
mod secret;
mod server_url;
mod values;

use hmac::Mac;

use crate::config::{
    DEFAULT_REMOTE_PREFIX, DEFAULT_REMOTE_TTL_S, MAX_REMOTE_PREFIX_BYTES, MAX_REMOTE_SECRET_BYTES, MAX_REMOTE_TTL_S,
    MIN_REMOTE_SECRET_BYTES,
};
use crate::error::{Error, Result};
use crate::storage::fault::{Damage, Fault};
use crate::storage::key::RecordKey;
use crate::storage::tier::TierStats;
pub use record::{HEADER_BYTES, VERSION};
pub use redis::{RedisStore, StoreReport};
use secret::Secret;
pub use server_url::ServerUrl;
pub use values::ValueStore;

/// How records are kept there; fixed for the life of a [`RemoteStore`].
#[derive(Debug, Clone)]
pub struct RemoteOptions {
    max_payload_bytes: u64,
    ttl_s: u64,
    prefix: String,
    kind: &'static str,
    secret: Option<Secret>,
}

impl RemoteOptions {
    /// Records of at most `max_payload_bytes`, with every default.
    pub fn new(max_payload_bytes: u64) -> Self {
        let prefix = DEFAULT_REMOTE_PREFIX.to_string();
        RemoteOptions { max_payload_bytes, ttl_s: DEFAULT_REMOTE_TTL_S, prefix, kind: "kv", secret: None }
    }

    /// What stands in all names behind the beginning: what is kept for one purpose is never met by another.
    pub fn kind(mut self, kind: &'static str) -> Self {
        self.kind = kind;
        self
    }

    /// How long a record is kept that nobody stores again, seconds.
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
        self.secret = Some(Secret::new(secret));
        Ok(self)
    }
}

/// The records of one store.
pub struct RemoteStore {
    store: Box<dyn ValueStore>,
    options: RemoteOptions,
    /// Beginning of all names.
    names: String,
    stats: TierStats,
    damaged: u64,
}

impl RemoteStore {
    /// Asks the store for nothing yet.
    pub fn new(store: Box<dyn ValueStore>, options: RemoteOptions) -> Self {
        let auth = match &options.secret {
            None => "open".to_string(),
            Some(secret) => {
                let code = secret.code(&[b"ns-llm remote names\0"]).finalize().into_bytes();
                hexadecimal(code.iter().take(4))
            }
        };
        let names = format!("{}:{}:{VERSION}:{auth}", options.prefix, options.kind);
        RemoteStore { store, options, names, stats: TierStats::default(), damaged: 0 }
    }

    /// Stores a record; false: the store has a value for it already.
    pub fn put(&mut self, key: &RecordKey, payload: &[u8]) -> Result<bool, Fault> {
        let stored = self.try_put(key, payload);
        match &stored {
            Ok(is_new) => self.stats.stored += u64::from(*is_new),
            Err(_) => self.stats.faults += 1,
        }
        stored
    }

    /// Stores what is found by `key` from now on, in the place of what was there, for at most `ttl_s` seconds.
    pub fn replace(&mut self, key: &RecordKey, payload: &[u8], ttl_s: u64) -> Result<(), Fault> {
        let stored = self.record(key, payload).and_then(|it| self.store.replace(&self.name(key), &it, ttl_s));
        match &stored {
            Ok(()) => self.stats.stored += 1,
            Err(_) => self.stats.faults += 1,
        }
        stored
    }

    /// Fetches a record and checks it. `None`: it is not there.
    pub fn get(&mut self, key: &RecordKey) -> Result<Option<Vec<u8>>, Fault> {
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

    /// Takes a record away, for all nodes.
    pub fn remove(&mut self, key: &RecordKey) -> Result<(), Fault> {
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

    fn try_put(&mut self, key: &RecordKey, payload: &[u8]) -> Result<bool, Fault> {
        let record = self.record(key, payload)?;
        self.store.put(&self.name(key), &record, self.options.ttl_s)
    }

    fn record(&self, key: &RecordKey, payload: &[u8]) -> Result<Vec<u8>, Fault> {
        let (bytes, limit_bytes) = (payload.len() as u64, self.options.max_payload_bytes);
        if bytes > limit_bytes {
            return Err(Fault::TooLong { bytes, limit_bytes });
        }
        Ok(record::record(key, payload, self.options.secret.as_ref()))
    }

    fn try_get(&mut self, key: &RecordKey, name: &str) -> Result<Option<Vec<u8>>, Fault> {
        let max_bytes = self.options.max_payload_bytes.saturating_add(HEADER_BYTES as u64);
        let Some(mut value) = self.store.get(name, max_bytes)? else { return Ok(None) };
        if value.len() as u64 > max_bytes {
            return Err(Damage::Length { found_bytes: value.len() as u64, limit_bytes: max_bytes }.into());
        }
        record::check(&value, key, self.options.secret.as_ref())?;
        value.drain(..HEADER_BYTES);
        Ok(Some(value))
    }

    fn name(&self, key: &RecordKey) -> String {
        format!("{}:{}:{}", self.names, hexadecimal(&key.content), hexadecimal(&key.layout.0))
    }
}

impl std::fmt::Debug for RemoteStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RemoteStore").field("names", &self.names).field("stats", &self.stats).finish_non_exhaustive()
    }
}

fn hexadecimal<'a>(bytes: impl IntoIterator<Item = &'a u8>) -> String {
    bytes.into_iter().map(|byte| format!("{byte:02x}")).collect()
}
