//! Launches `rope.cu`: norms of heads, rotary embedding, and storing k and v into their slots, in one kernel.

use super::kv_blocks::{KvBlocks, KvDtype};
use super::launch::{Argument, DeviceStruct, Launch, MAX_GRID_YZ, Sizes, Slice, SliceMut, Stream};
use super::norm::RmsNorm;
use crate::error::Result;

/// Warps of a block, a head each.
const HEADS_PER_BLOCK: usize = 8;

/// Cosines and sines, both `[positions, rotary_dim / 2]`.
#[derive(Debug, Clone, Copy)]
pub struct RopeTable<'a> {
    /// Leading dimensions of a head that are rotated; even.
    pub rotary_dim: usize,
    /// Cosines.
    pub cosines: Slice<'a, f32>,
    /// Sines.
    pub sines: Slice<'a, f32>,
}

impl RopeTable<'_> {
    /// Nothing rotates.
    pub const NONE: RopeTable<'static> = RopeTable { rotary_dim: 0, cosines: Slice::NOTHING, sines: Slice::NOTHING };
}

/// The constants of one layer.
#[derive(Debug, Clone, Copy)]
pub struct RopeLayer<'a> {
    /// Which layer's blocks are written.
    pub layer_idx: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Norms of q's and of k's heads.
    pub qk_norm: Option<(RmsNorm<'a>, RmsNorm<'a>)>,
    /// The angles.
    pub rope: RopeTable<'a>,
}

/// `RopeArguments` of `rope.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct RopeArguments {
    qkv: u64,
    q_norm: u64,
    k_norm: u64,
    cosines: u64,
    sines: u64,
    positions: u64,
    slots: u64,
    kv: u64,
    block_stride: i64,
    head_stride: i32,
    block_shift: u32,
    num_slots: u32,
    num_heads: i32,
    num_kv_heads: i32,
    head_dim: i32,
    rotary_dim: i32,
    q_eps: f32,
    k_eps: f32,
    num_positions: u32,
}

const _: () = assert!(size_of::<RopeArguments>() == 9 * 8 + 10 * 4);

// SAFETY: `repr(C)`, as `rope.cu` has it; the assertion shows that nothing lies between the fields.
unsafe impl DeviceStruct for RopeArguments {}

/// Normalises and rotates the heads of q and k in place in `qkv` `[tokens, (heads + 2 kv_heads) * head_dim]`, and stores k
/// and v of token `t` into slot `slots[t]` (`block * block_tokens + offset`) of the layer.
///
/// Positions and slots are on the device and cannot be looked at here: a slot that no block has is not written, a position
/// behind the table takes its last angles.
pub fn rope_and_store(
    stream: &impl Stream,
    qkv: &mut SliceMut<'_, f32>,
    layer: &RopeLayer<'_>,
    positions: Slice<'_, u32>,
    slots: Slice<'_, u32>,
    kv: &mut KvBlocks<'_>,
) -> Result<()> {
    let (sizes, layout) = (Sizes { operation: "rope_and_store" }, kv.layout);
    layout.check(sizes)?;
    let heads = layer.num_heads + 2 * layout.num_kv_heads;
    sizes.equal("slots", positions.len(), slots.len())?;
    sizes.equal("qkv", positions.len() * heads * layout.head_dim, qkv.len())?;
    let num_positions = check_layer(sizes, layer, layout.head_dim)?;
    let head_blocks = heads.div_ceil(HEADS_PER_BLOCK);
    sizes.require("heads", heads, head_blocks <= MAX_GRID_YZ, "at most 524,280")?;
    let norm = |norm: Option<RmsNorm<'_>>| norm.map_or((0, 0.0), |norm| (norm.weight.address(), norm.eps));
    let (q_norm, k_norm) = layer.qk_norm.unzip();
    let ((q_norm, q_eps), (k_norm, k_eps)) = (norm(q_norm), norm(k_norm));
    let arguments = RopeArguments {
        qkv: qkv.address(),
        q_norm,
        k_norm,
        cosines: layer.rope.cosines.address(),
        sines: layer.rope.sines.address(),
        positions: positions.address(),
        slots: slots.address(),
        kv: kv.layer(sizes, layer.layer_idx)?,
        block_stride: layout.block_len() as i64,
        head_stride: sizes.int("block_tokens", layout.head_len())?,
        block_shift: layout.block_shift(),
        num_slots: (layout.num_blocks * layout.block_tokens) as u32,
        num_heads: sizes.int("heads", layer.num_heads)?,
        num_kv_heads: sizes.int("heads", layout.num_kv_heads)?,
        head_dim: sizes.int("head_dim", layout.head_dim)?,
        rotary_dim: sizes.int("rotary_dim", layer.rope.rotary_dim)?,
        q_eps,
        k_eps,
        num_positions: sizes.blocks("positions", num_positions)?,
    };
    if positions.len() == 0 {
        return Ok(());
    }
    stream.launch(&Launch {
        file: "rope",
        kernel: match layout.dtype {
            KvDtype::F16 => "rope_and_store_f16",
            KvDtype::Bf16 => "rope_and_store_bf16",
        },
        grid: [sizes.blocks("tokens", positions.len())?, head_blocks as u32, 1],
        threads: 32 * HEADS_PER_BLOCK as u32,
        shared_bytes: 0,
        arguments: &[Argument::of(&arguments)],
    })
}

/// Returns how many positions the table has.
fn check_layer(sizes: Sizes, layer: &RopeLayer<'_>, head_dim: usize) -> Result<usize> {
    let RopeTable { rotary_dim, cosines, sines } = layer.rope;
    sizes.require("head_dim", head_dim, head_dim > 0, "at least 1")?;
    sizes.equal("rotary_dim", rotary_dim.min(head_dim) / 2 * 2, rotary_dim)?;
    sizes.equal("cosines", sines.len(), cosines.len())?;
    if let Some((q, k)) = &layer.qk_norm {
        sizes.equal("q_norm", head_dim, q.weight.len())?;
        sizes.equal("k_norm", head_dim, k.weight.len())?;
    }
    let half = rotary_dim / 2;
    let num_positions = cosines.len().checked_div(half).unwrap_or(1);
    sizes.require("positions", num_positions, num_positions > 0, "at least 1")?;
    if half > 0 {
        sizes.equal("cosines", num_positions * half, cosines.len())?;
    }
    Ok(num_positions)
}
