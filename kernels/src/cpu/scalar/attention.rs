//! Attention of one partition of keys, written for the eye. See [`crate::cpu::attention`] for the whole.

use super::math::exp;
use crate::cpu::attention::{AttentionItem, AttentionKernels, Line, Partition, Scratch};
use crate::cpu::kv_blocks::{CHUNK_TOKENS, KvElement};

/// The portable kernels.
pub(crate) const KERNELS: AttentionKernels = AttentionKernels { f32: attend, f16: attend, bf16: attend, int8: attend };

/// Softmax-weighted sum of the values that each row of `item` sees in `partition`, merged into `scratch`.
fn attend<E: KvElement>(item: &AttentionItem<'_>, partition: &Partition<'_, E>, scratch: &mut Scratch) {
    for row in 0..item.num_rows() {
        let visible = item.visible(row, partition.start);
        if visible.is_empty() {
            continue;
        }
        let q = &item.q[item.q_offset(row)..][..item.head_dim];
        let weights = Line::floats_mut(&mut scratch.scores[row]);
        let mut max = f32::NEG_INFINITY;
        for key in visible.clone() {
            let (keys, lane) = (partition.keys[key / CHUNK_TOKENS], key % CHUNK_TOKENS);
            let mut score = 0.0;
            for (d, &x) in q.iter().enumerate() {
                score += x * keys[d * partition.key_stride + lane].to_f32();
            }
            let key_scale = partition.scales.as_ref().map_or(1.0, |scales| Line::floats(&scales.keys)[key]);
            weights[key] = score * (key_scale * item.scale);
            max = if weights[key] > max { weights[key] } else { max };
        }
        let mut sum = 0.0;
        for key in visible.clone() {
            weights[key] = exp(weights[key] - max);
            sum += weights[key];
            if let Some(scales) = &partition.scales {
                weights[key] *= Line::floats(&scales.values)[key];
            }
        }
        let state = &mut scratch.rows[row];
        state.merge(max, sum, exp);
        let out = Line::floats_mut(&mut scratch.out[row * scratch.out_lines..]);
        for d in 0..item.head_dim {
            let mut value = 0.0;
            for key in visible.clone() {
                let values = partition.values[key / CHUNK_TOKENS];
                value += weights[key] * values[key % CHUNK_TOKENS * partition.value_stride + d].to_f32();
            }
            out[d] = out[d] * state.keep + value * state.add;
        }
    }
}
