//! The memory of the paged KV cache (Kwon et al. 2023, arXiv:2309.06180): K and V of all layers, in blocks of a fixed
//! number of tokens. It is memory with a layout and nothing else: who owns which block is the engine's business.
//!
//! Layout, outermost first: `[block][layer][kv_head]`, then the block's keys `[head_dim][block_tokens]`, then its values
//! `[block_tokens][value_stride]`, then, with 8-bit integers, f32 scales: of the keys `[block_tokens]` and of the values
//! `[block_tokens]`.
//! - A block's layers lie together: a block goes to a tier and comes back in one piece, and a pool that is hardly used touches few pages.
//! - Keys are transposed, so that the 16 tokens of a chunk are the lanes of one score product and each score is one
//!   chain of multiply-adds over `head_dim`, whatever the number of queries.
//! - `value_stride` is `head_dim` rounded up to 8: vector code reads whole vectors and needs no tail. The surplus is
//!   never written and stays zero.
//! - An 8-bit element stands for its product with the scale of its token in this head: `max |x| / 127`. A token's bits
//!   then depend on that token alone, whatever was written to the block before, and a head of a block is still one piece.
//!
//! Invariants: `block_tokens` is a multiple of [`CHUNK_TOKENS`], so a chunk never crosses a block; fresh memory reads as
//! zeros and is backed by pages only when first written.

use std::ops::Range;

use half::{bf16, f16};

use crate::error::{Error, Result};
use crate::host::{HugeBuffer, Plain};
use crate::kv_int8::{Float, Int8Blocks};

/// Tokens whose keys are the lanes of one score product.
pub const CHUNK_TOKENS: usize = 16;
/// Values of a token are padded to a multiple of this many elements.
const VALUE_LANES: usize = 8;
/// Widest head.
pub const MAX_HEAD_DIM: usize = 1024;

/// How a key or a value is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KvDtype {
    /// IEEE 754 single precision.
    F32,
    /// IEEE 754 half precision.
    F16,
    /// bfloat16: coarser than f16 by three bits, with the range of an f32.
    Bf16,
    /// An 8-bit integer, with one scale for each token, head, and key or value.
    Int8,
}

impl KvDtype {
    /// Bytes of one element.
    pub fn size_bytes(self) -> usize {
        match self {
            KvDtype::F32 => 4,
            KvDtype::F16 | KvDtype::Bf16 => 2,
            KvDtype::Int8 => 1,
        }
    }
    /// Elements in whose place one scale lies.
    pub(crate) fn scale_len(self) -> usize {
        match self {
            KvDtype::Int8 => size_of::<f32>(),
            _ => 0,
        }
    }
}

/// Sizes of the KV blocks of all layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvBlocksLayout {
    /// Decoder layers.
    pub num_layers: usize,
    /// Blocks of the pool.
    pub num_blocks: usize,
    /// Tokens of a block, a multiple of [`CHUNK_TOKENS`].
    pub block_tokens: usize,
    /// Key and value heads.
    pub num_kv_heads: usize,
    /// Width of a head, at most [`MAX_HEAD_DIM`].
    pub head_dim: usize,
    /// How keys and values are stored.
    pub dtype: KvDtype,
}

impl KvBlocksLayout {
    /// Elements between the values of two tokens.
    pub fn value_stride(&self) -> usize {
        self.head_dim.next_multiple_of(VALUE_LANES)
    }
    /// Elements of the keys of one head in one block.
    pub(crate) fn keys_len(&self) -> usize {
        self.head_dim * self.block_tokens
    }
    /// Elements of keys and values of one head in one block.
    pub(crate) fn scales_start(&self) -> usize {
        self.keys_len() + self.block_tokens * self.value_stride()
    }
    /// Elements of keys, values and scales of one head in one block. The scales are aligned: all parts are multiples of 16
    /// elements.
    fn head_len(&self) -> usize {
        self.scales_start() + 2 * self.block_tokens * self.dtype.scale_len()
    }
    /// Elements of one block, all layers.
    fn block_len(&self) -> usize {
        self.num_layers * self.num_kv_heads * self.head_len()
    }
    /// Where one head of one layer is in a block: its keys, then its values, then its scales.
    pub(crate) fn head_range(&self, block: usize, layer_idx: usize, kv_head: usize) -> Range<usize> {
        let start = block * self.block_len() + (layer_idx * self.num_kv_heads + kv_head) * self.head_len();
        start..start + self.head_len()
    }
    /// Bytes of one block over all layers, keys and values.
    pub fn block_bytes(&self) -> usize {
        self.block_len() * self.dtype.size_bytes()
    }

    /// How a block is written in 8 bits; `None`: it is.
    pub fn int8_blocks(&self) -> Option<Int8Blocks> {
        let float = match self.dtype {
            KvDtype::F32 => Float::F32,
            KvDtype::F16 => Float::F16,
            KvDtype::Bf16 => Float::Bf16,
            KvDtype::Int8 => return None,
        };
        Some(Int8Blocks {
            num_heads: self.num_layers * self.num_kv_heads,
            block_tokens: self.block_tokens,
            head_dim: self.head_dim,
            value_stride: self.value_stride(),
            keys_are_transposed: true,
            float,
        })
    }

    /// Bytes of the whole pool, when the sizes are possible.
    fn check(&self) -> Result<usize> {
        let require = |dimension, value, holds, expected| match holds {
            true => Ok(()),
            false => Err(Error::InvalidSize { operation: "KV blocks", dimension, value, expected }),
        };
        require("num_layers", self.num_layers, self.num_layers > 0, "at least 1")?;
        require("num_kv_heads", self.num_kv_heads, self.num_kv_heads > 0, "at least 1")?;
        require("head_dim", self.head_dim, (1..=MAX_HEAD_DIM).contains(&self.head_dim), "1 to 1024")?;
        let whole_chunks = self.block_tokens > 0 && self.block_tokens.is_multiple_of(CHUNK_TOKENS);
        require("block_tokens", self.block_tokens, whole_chunks, "a multiple of 16")?;
        let slots = self.num_blocks.checked_mul(self.block_tokens).filter(|&slots| slots <= u32::MAX as usize);
        require("num_blocks", self.num_blocks, slots.is_some(), "at most 2^32 slots in all")?;
        let sizes = [self.num_layers, self.num_kv_heads, self.block_tokens, 2 * MAX_HEAD_DIM, size_of::<f32>()];
        let bound = sizes.iter().try_fold(self.num_blocks, |product, &n| product.checked_mul(n));
        require("num_blocks", self.num_blocks, bound.is_some(), "a pool that fits the address space")?;
        Ok(self.num_blocks * self.block_bytes())
    }
}

/// K and V of all layers.
#[derive(Debug)]
pub struct KvBlocks {
    layout: KvBlocksLayout,
    memory: HugeBuffer,
}

/// Type of stored keys and values.
pub(crate) trait KvElement: Plain + Default {
    /// In the layout.
    const DTYPE: KvDtype;
    /// The number without its scale; exact.
    fn to_f32(self) -> f32;
}

impl KvElement for f32 {
    const DTYPE: KvDtype = KvDtype::F32;
    fn to_f32(self) -> f32 {
        self
    }
}

impl KvElement for f16 {
    const DTYPE: KvDtype = KvDtype::F16;
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
}

impl KvElement for bf16 {
    const DTYPE: KvDtype = KvDtype::Bf16;
    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }
}

impl KvElement for i8 {
    const DTYPE: KvDtype = KvDtype::Int8;
    fn to_f32(self) -> f32 {
        f32::from(self)
    }
}

impl KvBlocks {
    /// Reserves the memory; pages are taken when a block is first written.
    pub fn new(layout: KvBlocksLayout) -> Result<Self> {
        let bytes = layout.check()?;
        Ok(KvBlocks { layout, memory: HugeBuffer::zeroed("KV blocks", bytes)? })
    }

    /// Its sizes.
    pub fn layout(&self) -> &KvBlocksLayout {
        &self.layout
    }

    /// All layers of one block as bytes, in the order of the layout. Panics when there is no such block.
    pub fn block(&self, block_id: u32) -> &[u8] {
        &self.memory.as_slice()[self.block_range(block_id)]
    }

    /// The same, for writing: what a slower tier gives back.
    pub fn block_mut(&mut self, block_id: u32) -> &mut [u8] {
        let range = self.block_range(block_id);
        &mut self.memory.as_mut_slice()[range]
    }

    fn block_range(&self, block_id: u32) -> Range<usize> {
        assert!((block_id as usize) < self.layout.num_blocks, "block {block_id} of {}", self.layout.num_blocks);
        let bytes = self.layout.block_bytes();
        block_id as usize * bytes..(block_id as usize + 1) * bytes
    }

    /// All elements. Panics unless `E` is the type of the layout.
    pub(crate) fn elements<E: KvElement>(&self) -> &[E] {
        assert_eq!(E::DTYPE, self.layout.dtype);
        self.memory.as_slice()
    }

    /// Scales of the keys and of the values of one head of one layer in a block, `[block_tokens]` each. Panics unless the
    /// layout has scales.
    pub(crate) fn scales(&self, block: usize, layer_idx: usize, kv_head: usize) -> (&[f32], &[f32]) {
        assert_eq!(KvDtype::Int8, self.layout.dtype);
        let start = self.layout.head_range(block, layer_idx, kv_head).start + self.layout.scales_start();
        let scales = &self.memory.as_slice::<f32>()[start / size_of::<f32>()..][..2 * self.layout.block_tokens];
        scales.split_at(self.layout.block_tokens)
    }

    /// The same, for writing.
    pub(crate) fn elements_mut<E: KvElement>(&mut self) -> &mut [E] {
        assert_eq!(E::DTYPE, self.layout.dtype);
        self.memory.as_mut_slice()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout() -> KvBlocksLayout {
        let (num_layers, num_blocks, block_tokens) = (3, 5, 16);
        KvBlocksLayout { num_layers, num_blocks, block_tokens, num_kv_heads: 2, head_dim: 20, dtype: KvDtype::F16 }
    }

    /// Each size outside its range is an error that names it and its value; the layout itself is accepted.
    #[test]
    fn sizes_are_checked() {
        let refused = |change: fn(&mut KvBlocksLayout), name: &str| {
            let mut layout = layout();
            change(&mut layout);
            let error = KvBlocks::new(layout).expect_err(name).to_string();
            assert!(error.contains(name), "{error} does not name {name}");
        };
        assert!(KvBlocks::new(layout()).is_ok());
        refused(|l| l.num_layers = 0, "num_layers is 0");
        refused(|l| l.num_kv_heads = 0, "num_kv_heads is 0");
        refused(|l| l.head_dim = 0, "head_dim is 0");
        refused(|l| l.head_dim = 1025, "head_dim is 1025");
        refused(|l| l.block_tokens = 0, "block_tokens is 0");
        refused(|l| l.block_tokens = 24, "block_tokens is 24");
        refused(|l| l.num_blocks = 1 << 28, "num_blocks is 268435456");
        refused(|l| l.num_layers = 1 << 50, "num_blocks is 5");
        refused(|l| l.num_layers = 1 << 24, "KV blocks needs");
    }

    /// A block that is written in 8 bits has the bytes of a block of a pool of 8-bit integers.
    #[test]
    fn eight_bits_are_those_of_the_pool() {
        for dtype in [KvDtype::F32, KvDtype::F16, KvDtype::Bf16] {
            let blocks = KvBlocksLayout { dtype, ..layout() };
            let encoded = blocks.int8_blocks().expect("floats");
            assert_eq!(encoded.block_bytes(), blocks.block_bytes());
            assert_eq!(encoded.encoded_bytes(), KvBlocksLayout { dtype: KvDtype::Int8, ..layout() }.block_bytes());
        }
        assert_eq!(KvBlocksLayout { dtype: KvDtype::Int8, ..layout() }.int8_blocks(), None);
    }

    /// Heads tile the pool without gap or overlap in every type: writing each with its own number and reading all back
    /// shows it. An 8-bit head is half an f16 one and its scales.
    #[test]
    fn heads_tile_the_pool() {
        for dtype in [KvDtype::F32, KvDtype::F16, KvDtype::Bf16, KvDtype::Int8] {
            let layout = KvBlocksLayout { dtype, ..layout() };
            let mut seen = vec![0_u32; layout.num_blocks * layout.block_len()];
            for block in 0..layout.num_blocks {
                for layer_idx in 0..layout.num_layers {
                    for kv_head in 0..layout.num_kv_heads {
                        seen[layout.head_range(block, layer_idx, kv_head)].iter_mut().for_each(|count| *count += 1);
                    }
                }
            }
            assert!(seen.iter().all(|&count| count == 1));
            assert_eq!(seen.len() * dtype.size_bytes(), layout.num_blocks * layout.block_bytes());
            // Keys of 20 and values of 24 elements for 16 tokens, in 6 heads of layers.
            let scales = if dtype == KvDtype::Int8 { 8 } else { 0 };
            assert_eq!(layout.block_bytes(), 6 * 16 * ((20 + 24) * dtype.size_bytes() + scales));
        }
    }

    /// Scales of each head lie behind its values and nowhere else: each is found where the bytes of its block have it.
    #[test]
    fn scales_lie_behind_the_values() {
        let layout = KvBlocksLayout { dtype: KvDtype::Int8, ..layout() };
        let mut kv = KvBlocks::new(layout).expect("small");
        for (i, number) in kv.memory.as_mut_slice::<f32>().iter_mut().enumerate() {
            *number = i as f32;
        }
        let head_bytes = 16 * (20 + 24 + 8);
        for (block, layer_idx, kv_head) in [(0, 0, 0), (1, 0, 1), (4, 2, 1)] {
            let head = ((block * 3 + layer_idx) * 2 + kv_head) * head_bytes;
            let (keys, values) = kv.scales(block, layer_idx, kv_head);
            assert_eq!((keys.len(), values.len()), (16, 16));
            assert_eq!((keys[0], values[15]), (((head + 16 * 44) / 4) as f32, ((head + head_bytes) / 4 - 1) as f32));
        }
    }

    /// A block's bytes are all its own and no other's.
    #[test]
    fn blocks_are_apart() {
        let mut kv = KvBlocks::new(layout()).expect("small");
        kv.block_mut(1).fill(7);
        for block in 0..5 {
            let want = if block == 1 { 7 } else { 0 };
            assert!(kv.block(block).iter().all(|&byte| byte == want), "block {block}");
        }
    }
}
