//! What happens to q, k and v between their projection and attention: the norm of each head (Qwen3), rotary position
//! embedding (Su et al. 2021, arXiv:2104.09864) in the "rotate half" form, and storing k and v into their slots.
//!
//! bf16 and 8-bit numbers are made by plain loops that every instruction set's baseline turns into vectors: the same bits
//! on all of them.
//!
//! The work is split by kv head: no two threads can write the same slot, whatever the slots are.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::cpu::Cpu;
use crate::cpu::attention::AttentionShape;
use crate::cpu::kv_blocks::{KvBlocks, KvDtype, KvElement, MAX_HEAD_DIM};
use crate::cpu::norm::MIN_PARALLEL_ELEMENTS;
use crate::cpu::pool::DisjointMut;
use crate::dtype::encode_bf16;
use crate::error::{Error, Result};

/// Function pointers of one instruction set.
pub(crate) struct RopeKernels {
    /// Turns the pairs (`x[i]`, `x[i + cos.len()]`) by the angles with these cosines and sines.
    pub(crate) rotate: unsafe fn(&mut [f32], &[f32], &[f32]),
    /// Rounds to nearest even.
    pub(crate) round_f16: unsafe fn(&[f32], &mut [f16]),
}

/// Cosines and sines, both `[positions, rotary_dim / 2]`.
#[derive(Debug, Clone, Copy)]
pub struct RopeTable<'a> {
    /// Leading dimensions of a head that are rotated; even.
    pub rotary_dim: usize,
    /// Cosines.
    pub cos: &'a [f32],
    /// Sines.
    pub sin: &'a [f32],
}

/// Norm of each head: weight `[head_dim]` and epsilon.
#[derive(Debug, Clone, Copy)]
pub struct HeadNorm<'a> {
    /// `[head_dim]`
    pub weight: &'a [f32],
    /// Added to the mean square.
    pub eps: f32,
}

/// The constants of one layer.
#[derive(Debug, Clone, Copy)]
pub struct RopeLayer<'a> {
    /// Which layer's blocks are written.
    pub layer_idx: usize,
    /// Its sizes.
    pub shape: AttentionShape,
    /// Norms of q's and of k's heads.
    pub qk_norm: Option<(HeadNorm<'a>, HeadNorm<'a>)>,
    /// The angles.
    pub rope: RopeTable<'a>,
}

/// Normalises and rotates the heads of q and k in place in `qkv` `[tokens, (heads + 2 kv_heads) * head_dim]`, and stores
/// k and v of token `t` into slot `slots[t]` (`block * block_tokens + offset`) of the layer.
pub fn rope_and_store(
    cpu: &Cpu,
    qkv: &mut [f32],
    layer: &RopeLayer<'_>,
    positions: &[u32],
    slots: &[u32],
    kv: &mut KvBlocks,
) -> Result<()> {
    check(qkv, layer, positions, slots, kv)?;
    match kv.layout().dtype {
        KvDtype::F32 => run::<f32>(cpu, qkv, layer, positions, slots, kv),
        KvDtype::F16 => run::<f16>(cpu, qkv, layer, positions, slots, kv),
        KvDtype::Bf16 => run::<bf16>(cpu, qkv, layer, positions, slots, kv),
        KvDtype::Int8 => run::<i8>(cpu, qkv, layer, positions, slots, kv),
    }
    Ok(())
}

fn check(qkv: &[f32], layer: &RopeLayer<'_>, positions: &[u32], slots: &[u32], kv: &KvBlocks) -> Result<()> {
    let (shape, layout) = (&layer.shape, kv.layout());
    shape.check("rope_and_store", layer.layer_idx, layout)?;
    let equal = |dimension, expected, actual| match expected == actual {
        true => Ok(()),
        false => Err(Error::SizeMismatch { operation: "rope_and_store", dimension, expected, actual }),
    };
    equal("slots", positions.len(), slots.len())?;
    equal("qkv", positions.len() * shape.qkv_width(), qkv.len())?;
    equal("cos", layer.rope.sin.len(), layer.rope.cos.len())?;
    equal("rotary_dim", layer.rope.rotary_dim.min(shape.head_dim) / 2 * 2, layer.rope.rotary_dim)?;
    if let Some((q, k)) = &layer.qk_norm {
        equal("q_norm", shape.head_dim, q.weight.len())?;
        equal("k_norm", shape.head_dim, k.weight.len())?;
    }
    let below = |index, limit: usize, values: &[u32]| match values.iter().find(|&&value| value as usize >= limit) {
        None => Ok(()),
        Some(&value) => {
            Err(Error::IndexOutOfRange { operation: "rope_and_store", index, value: value as usize, limit })
        }
    };
    below("slot", layout.num_blocks * layout.block_tokens, slots)?;
    match layer.rope.rotary_dim / 2 {
        0 => Ok(()),
        half => below("position", layer.rope.cos.len() / half, positions),
    }
}

/// A stored element, and how a head's floats become it.
trait Store: KvElement {
    /// `scale` is the place of the scale of `x`; it is empty where the type has none.
    fn store(kernels: &RopeKernels, x: &[f32], out: &mut [Self], scale: &mut [Self]);
}

impl Store for f32 {
    fn store(_: &RopeKernels, x: &[f32], out: &mut [f32], _: &mut [f32]) {
        out.copy_from_slice(x);
    }
}

impl Store for f16 {
    fn store(kernels: &RopeKernels, x: &[f32], out: &mut [f16], _: &mut [f16]) {
        // SAFETY: `kernels` belong to a `Cpu`, which holds only those of an instruction set that this machine has.
        unsafe { (kernels.round_f16)(x, out) };
    }
}

impl Store for bf16 {
    fn store(_: &RopeKernels, x: &[f32], out: &mut [bf16], _: &mut [bf16]) {
        encode_bf16(x, out.reinterpret_cast_mut());
    }
}

impl Store for i8 {
    fn store(_: &RopeKernels, x: &[f32], out: &mut [i8], scale: &mut [i8]) {
        scale.copy_from_slice(&quantize(x, out).to_ne_bytes().map(|byte| byte as i8));
    }
}

/// Rounds `x / scale` to nearest even, where the largest magnitude becomes 127; returns the scale. Where a number is not
/// finite the scale is NaN: whoever reads the head sees it.
fn quantize(x: &[f32], out: &mut [i8]) -> f32 {
    // In the order of integers infinity is above all finite magnitudes, and NaN above infinity.
    let magnitude = |x: &f32| (x.to_bits() & !(1 << 31)) as i32;
    let max = f32::from_bits(x.iter().map(magnitude).fold(0, i32::max) as u32);
    let inverse = 127.0 / max;
    if !max.is_finite() || inverse.is_infinite() {
        // Below 2^-121 all is zero: its inverse is no number.
        out.fill(0);
        return if max.is_finite() { 0.0 } else { f32::NAN };
    }
    // Its last bit is worth 1: adding it rounds to an integer, whose low byte are the last eight bits of the sum.
    const INTEGERS: f32 = (3 << 22) as f32;
    for (out, &x) in out.iter_mut().zip(x) {
        *out = (x * inverse + INTEGERS).to_bits() as i8;
    }
    max / 127.0
}

fn run<E: Store>(
    cpu: &Cpu,
    qkv: &mut [f32],
    layer: &RopeLayer<'_>,
    positions: &[u32],
    slots: &[u32],
    kv: &mut KvBlocks,
) {
    let (shape, is_small) = (&layer.shape, qkv.len() < MIN_PARALLEL_ELEMENTS);
    let (head_dim, group) = (shape.head_dim, shape.group());
    let layout = *kv.layout();
    let scale_len = layout.dtype.scale_len();
    let elements = DisjointMut::new(kv.elements_mut::<E>());
    let qkv = DisjointMut::new(qkv);
    let kernels = cpu.kernels();
    let kv_heads = |kv_heads: std::ops::Range<usize>| {
        let mut rounded = [E::default(); MAX_HEAD_DIM];
        for (kv_head, token) in kv_heads.flat_map(|kv_head| (0..slots.len()).map(move |token| (kv_head, token))) {
            let (q_norm, k_norm) = layer.qk_norm.unzip();
            let angles = layer.rope.at(positions[token] as usize);
            let row = token * shape.qkv_width();
            // SAFETY: a head of a token belongs to one kv head, and a kv head to one thread; so does its part of a block.
            let head = |head: usize| unsafe { qkv.range_mut(row + head * head_dim..row + (head + 1) * head_dim) };
            for q_head in kv_head * group..(kv_head + 1) * group {
                norm_and_rotate(cpu, head(q_head), q_norm, angles);
            }
            let key = head(shape.num_heads + kv_head);
            norm_and_rotate(cpu, key, k_norm, angles);
            let value = head(shape.num_heads + shape.num_kv_heads + kv_head);

            let (block, offset) =
                (slots[token] as usize / layout.block_tokens, slots[token] as usize % layout.block_tokens);
            // SAFETY: as above.
            let stored = unsafe { elements.range_mut(layout.head_range(block, layer.layer_idx, kv_head)) };
            let (keys, values) = stored.split_at_mut(layout.keys_len());
            let (values, scales) = values.split_at_mut(layout.scales_start() - layout.keys_len());
            let (key_scales, value_scales) = scales.split_at_mut(layout.block_tokens * scale_len);
            let scale = offset * scale_len..(offset + 1) * scale_len;
            E::store(&kernels.rope, key, &mut rounded[..head_dim], &mut key_scales[scale.clone()]);
            for (column, &element) in keys[offset..].iter_mut().step_by(layout.block_tokens).zip(&rounded[..head_dim]) {
                *column = element;
            }
            let value_place = &mut values[offset * layout.value_stride()..][..head_dim];
            E::store(&kernels.rope, value, value_place, &mut value_scales[scale]);
        }
    };
    if is_small {
        kv_heads(0..shape.num_kv_heads);
    } else {
        cpu.pool().run(shape.num_kv_heads, 1, kv_heads);
    }
}

impl<'a> RopeTable<'a> {
    /// Cosines and sines of a position.
    fn at(&self, position: usize) -> (&'a [f32], &'a [f32]) {
        let half = self.rotary_dim / 2;
        let angles = position * half..(position + 1) * half;
        (&self.cos[angles.clone()], &self.sin[angles])
    }
}

fn norm_and_rotate(cpu: &Cpu, head: &mut [f32], norm: Option<HeadNorm<'_>>, (cos, sin): (&[f32], &[f32])) {
    let kernels = cpu.kernels();
    // SAFETY: a `Cpu` holds only kernels of an instruction set that this machine has.
    unsafe {
        if let Some(norm) = norm {
            let factor = (kernels.norm.inverse_rms)(head, norm.eps);
            (kernels.norm.scale_in_place)(head, factor, norm.weight);
        }
        (kernels.rope.rotate)(head, cos, sin);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 8-bit numbers are `x / scale` to the nearest integer, ties to even, with 127 as the largest; zeros, tiny heads and
    /// heads that are not finite keep what they are.
    #[test]
    fn quantizes_to_nearest_even() {
        let quantized = |x: &[f32]| {
            let mut out = vec![99_i8; x.len()];
            let scale = quantize(x, &mut out);
            (scale, out)
        };
        assert_eq!(quantized(&[254.0, -254.0, 1.0, 3.0, -1.0, 5.0]), (2.0, vec![127, -127, 0, 2, 0, 2]));
        assert_eq!(quantized(&[0.0, -0.0, 0.0]), (0.0, vec![0; 3]));
        assert_eq!(quantized(&[1e-38, -1e-40]), (0.0, vec![0; 2]));
        assert_eq!(quantized(&[f32::MAX, f32::MIN]).1, [127, -127]);
        for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -f32::NAN] {
            let (scale, out) = quantized(&[1.0, odd, 2.0]);
            assert!(scale.is_nan() && out == [0; 3], "{odd}: {scale} {out:?}");
        }
        let mut bits = 1_u32;
        for _ in 0..2000 {
            let x: Vec<f32> = (0..61)
                .map(|_| {
                    bits = bits.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    (bits >> 8) as f32 / (1 << 23) as f32 - 1.0
                })
                .collect();
            let (scale, out) = quantized(&x);
            let inverse = 127.0 / x.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
            for (&x, &got) in x.iter().zip(&out) {
                assert_eq!(f32::from(got), (x * inverse).round_ties_even(), "{x} with scale {scale}");
                assert!((x - f32::from(got) * scale).abs() <= 0.5001 * scale, "{x} became {got} times {scale}");
            }
            assert!(out.iter().any(|&x| x == 127 || x == -127));
        }
    }
}
