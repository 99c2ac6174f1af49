//! How blocks lie outside the pool: as it has them, or rounded to 8 bits.

use crate::backend::{Int8Blocks, KvLayout};
use crate::config::{EngineOptions, KvDtype, KvTierEncoding};

/// Blocks as they are outside the pool.
pub(crate) struct StoredBlocks {
    pub(crate) layout: KvLayout,
    /// How they are written; `None`: as the pool has them.
    pub(crate) int8: Option<Int8Blocks>,
    pub(crate) block_bytes: u64,
}

impl StoredBlocks {
    /// `int8`: how blocks of the pool's layout are written in 8 bits.
    pub(crate) fn new(options: &EngineOptions, layout: &KvLayout, int8: Option<Int8Blocks>) -> Self {
        match int8.filter(|_| options.kv_tier_encoding == KvTierEncoding::Int8) {
            Some(int8) => {
                let block_bytes = int8.encoded_bytes() as u64;
                StoredBlocks { layout: KvLayout { dtype: KvDtype::Int8, ..*layout }, int8: Some(int8), block_bytes }
            }
            None => StoredBlocks { layout: *layout, int8: None, block_bytes: layout.block_bytes() },
        }
    }

    /// By name.
    pub(crate) fn encoding(&self) -> KvTierEncoding {
        if self.int8.is_some() { KvTierEncoding::Int8 } else { KvTierEncoding::AsComputed }
    }
}
