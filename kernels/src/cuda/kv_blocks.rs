//! Where keys and values lie in a device's paged KV cache (Kwon et al. 2023, arXiv:2309.06180).
//!
//! Layout, outermost first: `[block][layer][kv_head]`, then the block's keys `[block_tokens][head_dim]`, then its values
//! `[block_tokens][head_dim]`, numbers of 16 bits. As on the CPU the layers of a block lie together, so that a block is copied in one
//! piece; unlike there, keys are not transposed: a row of `head_dim` numbers is what a tensor core takes.

use super::launch::{Sizes, SliceMut};
use crate::error::Result;
use crate::kv_int8::{Float, Int8Blocks};

/// How a key or a value is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KvDtype {
    /// IEEE 754 half precision.
    F16,
    /// bfloat16.
    Bf16,
}

/// Sizes of the KV blocks of all layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvLayout {
    /// Decoder layers.
    pub num_layers: usize,
    /// Blocks of the pool.
    pub num_blocks: usize,
    /// Tokens of a block: a power of two, at least 16.
    pub block_tokens: usize,
    /// Key and value heads.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// How keys and values are stored.
    pub dtype: KvDtype,
}

/// The blocks of all layers, in a device's memory.
#[derive(Debug)]
pub struct KvBlocks<'a> {
    /// All elements.
    pub elements: SliceMut<'a, u16>,
    /// Their layout.
    pub layout: KvLayout,
}

impl KvLayout {
    /// Elements of keys and values of one head in one block.
    pub fn head_len(&self) -> usize {
        2 * self.block_tokens * self.head_dim
    }
    /// Elements of one block, all layers.
    pub fn block_len(&self) -> usize {
        self.num_layers * self.num_kv_heads * self.head_len()
    }
    /// Bytes of one block over all layers, keys and values.
    pub fn block_bytes(&self) -> usize {
        self.block_len() * size_of::<u16>()
    }
    /// How a block is written in 8 bits.
    pub fn int8_blocks(&self) -> Int8Blocks {
        Int8Blocks {
            num_heads: self.num_layers * self.num_kv_heads,
            block_tokens: self.block_tokens,
            head_dim: self.head_dim,
            value_stride: self.head_dim,
            keys_are_transposed: false,
            float: match self.dtype {
                KvDtype::F16 => Float::F16,
                KvDtype::Bf16 => Float::Bf16,
            },
        }
    }
    /// Where the keys of a token begin; its values begin half a [`head_len`](Self::head_len) behind them.
    pub fn key_start(&self, slot: usize, layer_idx: usize, kv_head: usize) -> usize {
        let (block, offset) = (slot / self.block_tokens, slot % self.block_tokens);
        let head = layer_idx * self.num_kv_heads + kv_head;
        block * self.block_len() + head * self.head_len() + offset * self.head_dim
    }
    /// Tokens of a block as a power of two.
    pub(crate) fn block_shift(&self) -> u32 {
        self.block_tokens.trailing_zeros()
    }
    /// Refuses sizes that no kernel takes.
    pub(crate) fn check(&self, sizes: Sizes) -> Result<()> {
        let whole_tiles = self.block_tokens >= 16 && self.block_tokens.is_power_of_two();
        sizes.require("block_tokens", self.block_tokens, whole_tiles, "a power of two, at least 16")?;
        let slots = self.num_blocks.checked_mul(self.block_tokens).filter(|&slots| slots <= u32::MAX as usize);
        sizes.require("num_blocks", self.num_blocks, slots.is_some(), "at most 2^32 slots in all")?;
        sizes.require("num_layers", self.num_layers, self.num_layers > 0, "at least 1")
    }
}

impl KvBlocks<'_> {
    /// Where a layer's first head begins in block 0; the caller has checked the layout.
    pub(crate) fn layer(&self, sizes: Sizes, layer_idx: usize) -> Result<u64> {
        sizes.equal("elements of the blocks", self.layout.num_blocks * self.layout.block_len(), self.elements.len())?;
        sizes.require("layer", layer_idx, layer_idx < self.layout.num_layers, "one of the layers")?;
        Ok(self.elements.address()
            + (layer_idx * self.layout.num_kv_heads * self.layout.head_len() * size_of::<u16>()) as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Keys and values of all tokens, heads and layers tile the pool without gap or overlap.
    #[test]
    fn tokens_tile_the_pool() {
        let layout = KvLayout {
            num_layers: 3,
            num_blocks: 4,
            block_tokens: 16,
            num_kv_heads: 2,
            head_dim: 20,
            dtype: KvDtype::F16,
        };
        let mut seen = vec![0; layout.num_blocks * layout.block_len()];
        for slot in 0..layout.num_blocks * layout.block_tokens {
            for (layer_idx, kv_head) in (0..3).flat_map(|layer_idx| [(layer_idx, 0), (layer_idx, 1)]) {
                let key = layout.key_start(slot, layer_idx, kv_head);
                for start in [key, key + layout.head_len() / 2] {
                    seen[start..start + 20].iter_mut().for_each(|count| *count += 1);
                }
            }
        }
        assert!(seen.iter().all(|&count| count == 1));
        assert_eq!(layout.block_bytes(), 3 * 2 * 2 * 16 * 20 * 2);
        assert_eq!(layout.int8_blocks().block_bytes(), layout.block_bytes());
    }
}
