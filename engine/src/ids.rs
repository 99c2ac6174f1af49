//! Names of what an engine counts and shares: sequences, blocks, fetches, and hashes that stand for contents and owners.

/// Identity of one sequence (one choice of one request) for the life of an engine; never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SeqId(pub u64);

/// Index of a KV block in the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockId(pub u32);

/// Hashed namespace: sequences share KV blocks only when theirs are equal.
pub type NamespaceKey = [u8; 32];

/// Hashed owner of namespaces: whom cached things count for where each may keep a share.
pub type OwnerKey = [u8; 32];

/// Content address of a full KV block: SHA-256 over everything that its numbers depend on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockKey(pub [u8; 32]);

/// A fetch of a prefix from the tiers that was begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RestoreId(pub u64);
