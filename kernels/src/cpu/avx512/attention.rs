//! Attention of one partition of keys. See [`crate::cpu::attention`] for the whole.
//!
//! A chunk of 16 keys is one vector, a partition four: a score tile is up to 6 rows times the whole partition, 24
//! accumulators in registers. A value tile is up to 6 rows times four vectors of the head. Keys and values are read where
//! they lie and converted to f32 in registers, once per tile: at 24 multiply-adds per four loads that is cheaper than a
//! converted copy.

use std::arch::x86_64::*;
use std::ops::Range;

use half::{bf16, f16};

use super::math::exp;
use super::{LANES, first_lanes};
use crate::cpu::attention::{
    AttentionItem, AttentionKernels, Line, PARTITION_CHUNKS, PARTITION_TOKENS, Partition, Scales, Scratch,
};
use crate::cpu::kv_blocks::{CHUNK_TOKENS, KvElement};
use crate::cpu::prefetch::CACHE_LINE_BYTES;

/// The AVX-512 kernels.
pub(crate) const KERNELS: AttentionKernels = AttentionKernels { f32: attend, f16: attend, bf16: attend, int8: attend };

/// Rows of a register tile.
const TILE_ROWS: usize = 6;
/// A chunk is one vector.
const _: () = assert!(CHUNK_TOKENS == LANES);

/// A type of which 16 elements can be read as a vector of floats.
trait Load: KvElement {
    /// The elements of `lanes`, zeros in the other ones.
    ///
    /// # Safety
    /// The CPU has AVX-512, and the elements of `lanes`, counted from `elements`, can be read.
    unsafe fn load(lanes: __mmask16, elements: *const Self) -> __m512;
}

impl Load for f32 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    unsafe fn load(lanes: __mmask16, elements: *const f32) -> __m512 {
        // SAFETY: promised by the caller.
        unsafe { _mm512_maskz_loadu_ps(lanes, elements) }
    }
}

impl Load for f16 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    unsafe fn load(lanes: __mmask16, elements: *const f16) -> __m512 {
        // SAFETY: promised by the caller; an f16 is its 16 bits.
        _mm512_cvtph_ps(unsafe { _mm256_maskz_loadu_epi16(lanes, elements.cast()) })
    }
}

impl Load for bf16 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    unsafe fn load(lanes: __mmask16, elements: *const bf16) -> __m512 {
        // SAFETY: promised by the caller; a bf16 is its 16 bits.
        let upper_halves = _mm512_cvtepu16_epi32(unsafe { _mm256_maskz_loadu_epi16(lanes, elements.cast()) });
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(upper_halves))
    }
}

impl Load for i8 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    unsafe fn load(lanes: __mmask16, elements: *const i8) -> __m512 {
        // SAFETY: promised by the caller.
        _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(unsafe { _mm_maskz_loadu_epi8(lanes, elements) }))
    }
}

const ALL_LANES: __mmask16 = __mmask16::MAX;

/// Softmax-weighted sum of the values that each row of `item` sees in `partition`, merged into `scratch`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn attend<E: Load>(item: &AttentionItem<'_>, partition: &Partition<'_, E>, scratch: &mut Scratch) {
    let rows = visible_rows(item, partition.start);
    if rows.is_empty() {
        return;
    }
    // With more rows arithmetic takes longer than reading.
    if rows.len() <= TILE_ROWS {
        fetch_soon(partition);
    }
    score_rows(item, partition, rows.clone(), scratch);
    for row in rows.clone() {
        let visible = item.visible(row, partition.start);
        let (max, sum) = exponentials(&mut scratch.scores[row], visible, item.scale, partition.scales.as_ref());
        scratch.rows[row].merge(max, sum, |x| exp_one(x));
    }
    value_rows(item, partition, rows, scratch);
}

/// Asks for the keys and values of the next partition. Into L2: L1 is full of what is read now.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn fetch_soon<E: Load>(partition: &Partition<'_, E>) {
    let Some((keys, values)) = partition.soon else { return };
    let line = CACHE_LINE_BYTES / size_of::<E>();
    for (keys, values) in keys.iter().zip(values) {
        // Of blocks of more tokens, the chunk's part.
        let values = &values[..values.len().min(CHUNK_TOKENS * partition.value_stride)];
        let lines = keys.chunks(line.max(partition.key_stride)).chain(values.chunks(line));
        lines.for_each(|line| _mm_prefetch::<_MM_HINT_T1>(line.as_ptr().cast()));
    }
}

/// The rows that see any key of the partition. Visibility moves one way with the row, so they are consecutive.
fn visible_rows(item: &AttentionItem<'_>, start: usize) -> Range<usize> {
    let mut rows = 0..item.num_rows();
    while !rows.is_empty() && item.visible(rows.start, start).is_empty() {
        rows.start += item.group;
    }
    while !rows.is_empty() && item.visible(rows.end - 1, start).is_empty() {
        rows.end -= item.group;
    }
    rows
}

/// Splits `rows` into tiles of at most [`TILE_ROWS`], of nearly equal size.
fn tiles(rows: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let mut next = rows.start;
    std::iter::from_fn(move || {
        let left = rows.end - next;
        let len = left.div_ceil(left.div_ceil(TILE_ROWS).max(1));
        next += len;
        (len > 0).then(|| next - len..next)
    })
}

/// Scores of `rows`: with all chunks at once where a tile sees the whole partition, else chunk by chunk.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn score_rows<E: Load>(
    item: &AttentionItem<'_>,
    partition: &Partition<'_, E>,
    rows: Range<usize>,
    scratch: &mut Scratch,
) {
    for tile in tiles(rows) {
        let first = item.visible(tile.start, partition.start).start / CHUNK_TOKENS;
        let end = item.visible(tile.end - 1, partition.start).end.div_ceil(CHUNK_TOKENS);
        let wide = if end - first == PARTITION_CHUNKS { PARTITION_CHUNKS } else { 1 };
        for chunk in (first..end).step_by(wide) {
            let mut scores = ScoreTile { item, partition, first_row: tile.start, chunk, scratch };
            match (tile.len(), wide) {
                (1, 1) => scores.run::<1, 1>(),
                (2, 1) => scores.run::<2, 1>(),
                (3, 1) => scores.run::<3, 1>(),
                (4, 1) => scores.run::<4, 1>(),
                (5, 1) => scores.run::<5, 1>(),
                (_, 1) => scores.run::<TILE_ROWS, 1>(),
                (1, _) => scores.run::<1, PARTITION_CHUNKS>(),
                (2, _) => scores.run::<2, PARTITION_CHUNKS>(),
                (3, _) => scores.run::<3, PARTITION_CHUNKS>(),
                (4, _) => scores.run::<4, PARTITION_CHUNKS>(),
                (5, _) => scores.run::<5, PARTITION_CHUNKS>(),
                _ => scores.run::<TILE_ROWS, PARTITION_CHUNKS>(),
            }
        }
    }
}

/// Some rows × some chunks of keys.
struct ScoreTile<'a, 'b, E> {
    item: &'a AttentionItem<'a>,
    partition: &'a Partition<'a, E>,
    first_row: usize,
    /// The first chunk.
    chunk: usize,
    scratch: &'b mut Scratch,
}

impl<E: Load> ScoreTile<'_, '_, E> {
    /// `scores[r][key] = sum over d of q[r][d] * keys[d][key]`, each one chain in the order of `d`.
    #[inline(never)]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    fn run<const R: usize, const C: usize>(&mut self) {
        let (head_dim, key_stride) = (self.item.head_dim, self.partition.key_stride);
        let q: [&[f32]; R] =
            std::array::from_fn(|r| &self.item.q[self.item.q_offset(self.first_row + r)..][..head_dim]);
        let keys = &self.partition.keys[self.chunk..self.chunk + C];
        assert!(keys.iter().all(|keys| keys.len() >= (head_dim - 1) * key_stride + CHUNK_TOKENS));
        let mut keys: [*const E; C] = std::array::from_fn(|c| keys[c].as_ptr());
        let mut sums = [[_mm512_setzero_ps(); C]; R];
        for d in 0..head_dim {
            let mut k = [_mm512_setzero_ps(); C];
            for c in 0..C {
                // SAFETY: the assertion above: 16 keys can be read at each `d`.
                k[c] = unsafe { E::load(ALL_LANES, keys[c]) };
                keys[c] = keys[c].wrapping_add(key_stride);
            }
            for r in 0..R {
                // SAFETY: each query has `head_dim` elements.
                let x = _mm512_set1_ps(unsafe { *q[r].get_unchecked(d) });
                for c in 0..C {
                    sums[r][c] = _mm512_fmadd_ps(x, k[c], sums[r][c]);
                }
            }
        }
        let scores = &mut self.scratch.scores[self.first_row..self.first_row + R];
        for r in 0..R {
            for c in 0..C {
                // SAFETY: a line holds 16 floats.
                unsafe { _mm512_storeu_ps(scores[r][self.chunk + c].0.as_mut_ptr(), sums[r][c]) };
            }
        }
    }
}

/// Turns the scores of the visible keys into exponentials of their distance to the largest, times the scales of the
/// values, all others into zeros; returns the largest score and the sum of the exponentials.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn exponentials(
    scores: &mut [Line; PARTITION_CHUNKS],
    visible: Range<usize>,
    scale: f32,
    scales: Option<&Scales>,
) -> (f32, f32) {
    const { assert!(PARTITION_TOKENS == u64::BITS as usize) };
    let lanes = (u64::MAX << visible.start) & (u64::MAX >> (PARTITION_TOKENS - visible.end));
    let lanes: [__mmask16; PARTITION_CHUNKS] = std::array::from_fn(|chunk| (lanes >> (chunk * LANES)) as __mmask16);
    let lowest = _mm512_set1_ps(f32::NEG_INFINITY);
    let mut score = [lowest; PARTITION_CHUNKS];
    for (chunk, (score, line)) in score.iter_mut().zip(&*scores).enumerate() {
        let factor = match scales {
            None => _mm512_set1_ps(scale),
            Some(scales) => _mm512_mul_ps(load_line(&scales.keys[chunk]), _mm512_set1_ps(scale)),
        };
        *score = _mm512_mask_mul_ps(lowest, lanes[chunk], load_line(line), factor);
    }
    let max = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(score[0], score[1]), _mm512_max_ps(score[2], score[3])));
    for (chunk, (score, line)) in score.iter_mut().zip(scores).enumerate() {
        *score = _mm512_maskz_mov_ps(lanes[chunk], exp(_mm512_sub_ps(*score, _mm512_set1_ps(max))));
        let weight = match scales {
            None => *score,
            Some(scales) => _mm512_maskz_mul_ps(lanes[chunk], *score, load_line(&scales.values[chunk])),
        };
        // SAFETY: a line holds 16 floats.
        unsafe { _mm512_storeu_ps(line.0.as_mut_ptr(), weight) };
    }
    let sum = _mm512_add_ps(_mm512_add_ps(score[0], score[1]), _mm512_add_ps(score[2], score[3]));
    (max, _mm512_reduce_add_ps(sum))
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn load_line(line: &Line) -> __m512 {
    // SAFETY: a line holds 16 floats.
    unsafe { _mm512_loadu_ps(line.0.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn exp_one(x: f32) -> f32 {
    _mm512_cvtss_f32(exp(_mm512_set1_ps(x)))
}

/// Adds the weighted values to the running outputs of `rows`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn value_rows<E: Load>(
    item: &AttentionItem<'_>,
    partition: &Partition<'_, E>,
    rows: Range<usize>,
    scratch: &mut Scratch,
) {
    let full_vectors = item.head_dim / LANES;
    for tile in tiles(rows) {
        // One row: more vectors at once, to have enough independent chains.
        let wide = if tile.len() == 1 { 8 } else { 4 };
        let mut vector = 0;
        while vector * LANES < item.head_dim {
            let left = full_vectors - vector;
            let (width, lanes) = match [8, 4, 2, 1].into_iter().find(|&width| width <= wide && width <= left) {
                Some(width) => (width, ALL_LANES),
                None => (1, first_lanes(item.head_dim % LANES)),
            };
            let mut values = ValueTile { item, partition, first_row: tile.start, vector, lanes, scratch };
            match (tile.len(), width) {
                (1, 8) => values.run::<1, 8>(),
                (1, 4) => values.run::<1, 4>(),
                (1, 2) => values.run::<1, 2>(),
                (1, _) => values.run::<1, 1>(),
                (2, 4) => values.run::<2, 4>(),
                (2, 2) => values.run::<2, 2>(),
                (2, _) => values.run::<2, 1>(),
                (3, 4) => values.run::<3, 4>(),
                (3, 2) => values.run::<3, 2>(),
                (3, _) => values.run::<3, 1>(),
                (4, 4) => values.run::<4, 4>(),
                (4, 2) => values.run::<4, 2>(),
                (4, _) => values.run::<4, 1>(),
                (5, 4) => values.run::<5, 4>(),
                (5, 2) => values.run::<5, 2>(),
                (5, _) => values.run::<5, 1>(),
                (_, 4) => values.run::<TILE_ROWS, 4>(),
                (_, 2) => values.run::<TILE_ROWS, 2>(),
                _ => values.run::<TILE_ROWS, 1>(),
            }
            vector += width;
        }
    }
}

/// Some rows × some vectors of the head.
struct ValueTile<'a, 'b, E> {
    item: &'a AttentionItem<'a>,
    partition: &'a Partition<'a, E>,
    first_row: usize,
    /// First vector of the head.
    vector: usize,
    /// Lanes of each vector that belong to the head.
    lanes: __mmask16,
    scratch: &'b mut Scratch,
}

impl<E: Load> ValueTile<'_, '_, E> {
    /// `out[r] = out[r] * keep[r] + add[r] * (sum over the visible keys of weight[r][key] * values[key])`, each sum one
    /// chain in the order of the keys.
    #[inline(never)]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    fn run<const R: usize, const W: usize>(&mut self) {
        let visible: [_; R] = std::array::from_fn(|r| self.item.visible(self.first_row + r, self.partition.start));
        let rows = self.first_row..self.first_row + R;
        let common_start = visible[R - 1].start;
        let common_end = visible[0].end.max(common_start);
        self.check_chunks(visible[0].start..visible[R - 1].end, W);
        let mut sums = [[_mm512_setzero_ps(); W]; R];
        // SAFETY: the chunks of these keys were checked, and all rows see those of the second call.
        unsafe {
            self.add_keys::<R, W, true>(visible[0].start..common_start, &visible, &mut sums);
            self.add_keys::<R, W, false>(common_start..common_end, &visible, &mut sums);
            self.add_keys::<R, W, true>(common_end..visible[R - 1].end, &visible, &mut sums);
        }
        for (row, sums) in rows.zip(&sums) {
            let state = self.scratch.rows[row];
            let line = row * self.scratch.out_lines + self.vector;
            let (keep, add) = (_mm512_set1_ps(state.keep), _mm512_set1_ps(state.add));
            for (out, &sum) in self.scratch.out[line..line + W].iter_mut().zip(sums) {
                // SAFETY: a line holds 16 floats.
                unsafe {
                    let out = out.0.as_mut_ptr();
                    _mm512_storeu_ps(out, _mm512_fmadd_ps(sum, add, _mm512_mul_ps(_mm512_loadu_ps(out), keep)));
                }
            }
        }
    }

    /// Adds the weighted values of `keys`; those that a row does not see (`IS_EDGE`: there may be such) leave its sums
    /// alone.
    ///
    /// # Safety
    /// The CPU has AVX-512; the values of `keys` can be read, `W` vectors of them.
    // No feature of its own: only so can it be inlined by force, without which the sums live in memory.
    #[inline(always)]
    unsafe fn add_keys<const R: usize, const W: usize, const IS_EDGE: bool>(
        &self,
        keys: Range<usize>,
        visible: &[Range<usize>; R],
        sums: &mut [[__m512; W]; R],
    ) {
        // The weights of row `r` begin `r * PARTITION_TOKENS` floats behind those of the first.
        let weights = self.scratch.scores[self.first_row..self.first_row + R].as_ptr().cast::<f32>();
        let stride = self.partition.value_stride;
        let mut key = keys.start;
        while key < keys.end {
            let chunk_end = keys.end.min(key / CHUNK_TOKENS * CHUNK_TOKENS + CHUNK_TOKENS);
            let chunk = self.partition.values[key / CHUNK_TOKENS].as_ptr();
            let mut values = chunk.wrapping_add(self.vector * LANES + key % CHUNK_TOKENS * stride);
            while key < chunk_end {
                // SAFETY: promised by the caller; the weights are `R` times 64.
                unsafe {
                    let mut v = [_mm512_setzero_ps(); W];
                    for (w, v) in v.iter_mut().enumerate() {
                        *v = E::load(self.lanes, values.wrapping_add(w * LANES));
                    }
                    for r in 0..R {
                        let weight = _mm512_set1_ps(*weights.add(r * PARTITION_TOKENS + key));
                        let seen = if !IS_EDGE || visible[r].contains(&key) { ALL_LANES } else { 0 };
                        for w in 0..W {
                            sums[r][w] = match IS_EDGE {
                                true => _mm512_mask3_fmadd_ps(weight, v[w], sums[r][w], seen),
                                false => _mm512_fmadd_ps(weight, v[w], sums[r][w]),
                            };
                        }
                    }
                }
                values = values.wrapping_add(stride);
                key += 1;
            }
        }
    }

    /// Asserts that the values of `keys` can be read, `width` vectors of them.
    fn check_chunks(&self, keys: Range<usize>, width: usize) {
        let len = (self.vector + width - 1) * LANES + self.lanes.count_ones() as usize;
        for chunk in keys.start / CHUNK_TOKENS..keys.end.div_ceil(CHUNK_TOKENS) {
            let needed = (CHUNK_TOKENS - 1) * self.partition.value_stride + len;
            assert!(self.partition.values[chunk].len() >= needed, "values of chunk {chunk}");
        }
    }
}
