//! Which block holds the KV of which tokens: a hash chain from a root over blocks of token ids, so that equal keys
//! mean equal contents *and* equal history. The key covers everything the numbers depend on; two models, numeric
//! modes or namespaces never meet. Also: which sequence is just computing a block that others may want.
//!
//! Each hash is a [`FieldHash`]: no two different lists of fields have the same bytes.

use std::collections::HashMap;

use crate::field_hash::{FieldHash, FieldTag};
use crate::ids::{BlockId, BlockKey, NamespaceKey, SeqId};

/// Version of the key's own format: which fields there are, and how they are hashed.
const FORMAT_VERSION: u32 = 1;

/// What the contents of a block depend on besides its tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvIdentity {
    /// Hash of the model's metadata and weights.
    pub fingerprint: [u8; 32],
    /// Element type and layout of stored keys and values.
    pub kv_layout: String,
    /// Device kind, instruction set, version of the kernels' numerics, weight type as run, activation precision.
    pub numerics_id: String,
    /// Adapter on top of the model; empty: none.
    pub adapter: String,
}

impl KvIdentity {
    /// Of everything in it; the parent of every namespace's root.
    pub(crate) fn hash(&self) -> [u8; 32] {
        let KvIdentity { fingerprint, kv_layout, numerics_id, adapter } = self;
        FieldHash::new()
            .field(Tag::FormatVersion, &FORMAT_VERSION.to_le_bytes())
            .field(Tag::Fingerprint, fingerprint)
            .text(Tag::KvLayout, kv_layout)
            .text(Tag::Numerics, numerics_id)
            .text(Tag::Adapter, adapter)
            .finish()
    }
}

#[derive(Clone, Copy)]
#[repr(u8)]
enum Tag {
    FormatVersion = 1,
    Fingerprint = 2,
    KvLayout = 3,
    Numerics = 4,
    Adapter = 5,
    Parent = 6,
    Namespace = 7,
    Tokens = 8,
}

impl FieldTag for Tag {
    fn number(self) -> u8 {
        self as u8
    }
}

/// Blocks by content. Maps are only looked up, never iterated: their order cannot reach a result.
#[derive(Debug)]
pub(super) struct PrefixIndex {
    root: BlockKey,
    blocks: HashMap<BlockKey, BlockId>,
    computing: HashMap<BlockKey, SeqId>,
}

impl PrefixIndex {
    pub(super) fn new(identity: &KvIdentity) -> Self {
        PrefixIndex { root: BlockKey(identity.hash()), blocks: HashMap::new(), computing: HashMap::new() }
    }

    /// Appends to `keys` until it has the first `num_blocks` keys of `tokens`.
    pub(super) fn extend_keys(
        &self,
        keys: &mut Vec<BlockKey>,
        namespace: &NamespaceKey,
        tokens: &[u32],
        block_tokens: usize,
        num_blocks: usize,
    ) {
        for block in tokens.chunks_exact(block_tokens).take(num_blocks).skip(keys.len()) {
            let parent = keys.last().copied().unwrap_or_else(|| self.namespace_root(namespace));
            keys.push(block_key(&parent, block));
        }
    }

    fn namespace_root(&self, namespace: &NamespaceKey) -> BlockKey {
        BlockKey(FieldHash::new().field(Tag::Parent, &self.root.0).field(Tag::Namespace, namespace).finish())
    }

    /// Number of published blocks.
    pub(super) fn len(&self) -> usize {
        self.blocks.len()
    }
    /// The published block of `key`.
    pub(super) fn get(&self, key: &BlockKey) -> Option<BlockId> {
        self.blocks.get(key).copied()
    }
    /// Publishes a block; false when the key has one already (identical blocks are not merged: a table that runs on
    /// the second one stays append-only).
    pub(super) fn insert(&mut self, key: BlockKey, block: BlockId) -> bool {
        let mut inserted = false;
        self.blocks.entry(key).or_insert_with(|| {
            inserted = true;
            block
        });
        inserted
    }
    /// The block was given away.
    pub(super) fn remove(&mut self, key: &BlockKey) {
        let removed = self.blocks.remove(key);
        assert!(removed.is_some(), "a block with a key is in the index");
    }

    /// No block is published any more.
    pub(super) fn clear(&mut self) {
        self.blocks.clear();
    }

    /// `seq` will compute the block of `key`, unless another said so before.
    pub(super) fn claim(&mut self, key: BlockKey, seq: SeqId) {
        self.computing.entry(key).or_insert(seq);
    }
    /// `seq` has computed the block, or will not.
    pub(super) fn unclaim(&mut self, key: &BlockKey, seq: SeqId) {
        if self.computing.get(key) == Some(&seq) {
            self.computing.remove(key);
        }
    }
    /// Who is computing the block of `key`.
    pub(super) fn claimed_by(&self, key: &BlockKey) -> Option<SeqId> {
        self.computing.get(key).copied()
    }
    /// Number of blocks that are just being computed.
    pub(super) fn num_claims(&self) -> usize {
        self.computing.len()
    }
}

/// Key of a block of `tokens` whose history is `parent`.
fn block_key(parent: &BlockKey, tokens: &[u32]) -> BlockKey {
    BlockKey(FieldHash::new().field(Tag::Parent, &parent.0).numbers(Tag::Tokens, tokens).finish())
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn identity() -> KvIdentity {
        KvIdentity {
            fingerprint: [1; 32],
            kv_layout: "f16".to_string(),
            numerics_id: "cpu".to_string(),
            adapter: String::new(),
        }
    }

    /// Keys of all full blocks of `tokens`.
    fn keys(identity: &KvIdentity, namespace: u8, block_tokens: usize, tokens: &[u32]) -> Vec<BlockKey> {
        let mut keys = Vec::new();
        PrefixIndex::new(identity).extend_keys(&mut keys, &[namespace; 32], tokens, block_tokens, usize::MAX);
        keys
    }

    /// Every field that the numbers depend on changes every key, and moving bytes from one field to the next does too:
    /// the fields are delimited, not concatenated.
    #[test]
    fn each_field_is_part_of_the_key() {
        let id = identity();
        let with = |kv_layout: &str, numerics_id: &str, adapter: &str| KvIdentity {
            kv_layout: kv_layout.to_string(),
            numerics_id: numerics_id.to_string(),
            adapter: adapter.to_string(),
            ..identity()
        };
        let cases = [
            keys(&id, 0, 2, &[1, 2, 3, 4]),
            keys(&KvIdentity { fingerprint: [2; 32], ..identity() }, 0, 2, &[1, 2, 3, 4]),
            keys(&with("f1", "6cpu", ""), 0, 2, &[1, 2, 3, 4]),
            keys(&with("f16c", "pu", ""), 0, 2, &[1, 2, 3, 4]),
            keys(&with("f16cpu", "", ""), 0, 2, &[1, 2, 3, 4]),
            keys(&with("f16", "", "cpu"), 0, 2, &[1, 2, 3, 4]),
            keys(&with("", "f16cpu", ""), 0, 2, &[1, 2, 3, 4]),
            keys(&with("f16", "cpu", "a"), 0, 2, &[1, 2, 3, 4]),
            keys(&id, 1, 2, &[1, 2, 3, 4]),
            keys(&id, 0, 4, &[1, 2, 3, 4]),
            keys(&id, 0, 2, &[1, 3, 2, 4]),
            keys(&id, 0, 2, &[3, 4, 3, 4]),
            keys(&id, 0, 1, &[1 + (2 << 8), 3]),
            keys(&id, 0, 2, &[256, 2]),
        ];
        let all: Vec<BlockKey> = cases.into_iter().flatten().collect();
        assert_eq!(all.iter().collect::<HashSet<_>>().len(), all.len());
    }

    /// The key of a block depends on all tokens before it and on none after it, and extending a list of keys gives
    /// the same as making it at once.
    #[test]
    fn keys_are_a_chain() {
        let long = keys(&identity(), 0, 3, &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
        assert_eq!(long.len(), 3);
        assert_eq!(keys(&identity(), 0, 3, &[1, 2, 3, 4, 5, 6]), long[..2]);
        let other = keys(&identity(), 0, 3, &[0, 2, 3, 4, 5, 6, 7, 8, 9]);
        assert!(long.iter().zip(&other).all(|(a, b)| a != b));
        let mut extended = long[..1].to_vec();
        let index = PrefixIndex::new(&identity());
        index.extend_keys(&mut extended, &[0; 32], &[1, 2, 3, 4, 5, 6, 7, 8, 9], 3, usize::MAX);
        assert_eq!(extended, long);
    }

    /// Version 1 of the key format, as a number that a stored cache relies on: it changes only with
    /// [`FORMAT_VERSION`].
    #[test]
    fn key_format_is_stable() {
        let key = keys(&identity(), 0, 2, &[1, 2])[0];
        let hex: String = key.0.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, "8b78afd40414312c679ad14b75ac3024cffeb2db2c53df5cd2be87900368e21a");
    }

    /// The first block of a key stays its block; a claim belongs to the first who made it and ends only with it.
    #[test]
    fn first_block_and_first_claim_count() {
        let mut index = PrefixIndex::new(&identity());
        let key = BlockKey([3; 32]);
        assert!(index.insert(key, BlockId(1)) && !index.insert(key, BlockId(2)));
        assert_eq!(index.get(&key), Some(BlockId(1)));
        index.claim(key, SeqId(1));
        index.claim(key, SeqId(2));
        index.unclaim(&key, SeqId(2));
        assert_eq!((index.claimed_by(&key), index.num_claims()), (Some(SeqId(1)), 1));
        index.unclaim(&key, SeqId(1));
        assert_eq!(index.claimed_by(&key), None);
    }
}
