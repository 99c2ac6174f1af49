//! What a shared store is asked for, as little as a cache needs.

use crate::storage::fault::Fault;

/// A store of values by name that others use at the same time, and that forgets. Each call ends within a time that the
/// store knows; what it gives may be anything.
pub trait ValueStore: Send {
    /// The value of `name`; `None`: it has none. Of one that is longer than `max_bytes` nothing is returned.
    fn get(&mut self, name: &str, max_bytes: u64) -> Result<Option<Vec<u8>>, Fault>;
    /// Gives `name` a value for `ttl_s` seconds. False: it has one already, for `ttl_s` seconds from now.
    fn put(&mut self, name: &str, value: &[u8], ttl_s: u64) -> Result<bool, Fault>;
    /// Gives `name` this value for `ttl_s` seconds, in the place of one that it may have.
    fn replace(&mut self, name: &str, value: &[u8], ttl_s: u64) -> Result<(), Fault>;
    /// Takes the value of `name` away, if it has one.
    fn remove(&mut self, name: &str) -> Result<(), Fault>;
}
