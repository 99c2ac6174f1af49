//! Attention of one partition of keys. See [`crate::cpu::attention`] for the whole.
//!
//! Two shapes of one computation, with the same bits:
//! - few rows (decode): keys and values are read where they lie, converted in registers, once per tile of rows, and those
//!   of the next partition are asked for on the way;
//! - many rows (prefill): a partition is first converted to f32 panels, line by line, then tiles of [`TILE_ROWS`] rows × 16
//!   lanes run over them.
//!
//! Lanes are counted by eight, as two vectors: sums over the keys of a partition have the order of the AVX2 kernels.

// Loops over the constants of a tile: an index names a register.
#![allow(clippy::needless_range_loop)]

use std::arch::aarch64::*;
use std::arch::asm;
use std::ops::Range;

use half::{bf16, f16};

use super::math::exp;
use super::{bf16_to_f32, f16_to_f32, tiles};
use crate::cpu::attention::{
    AttentionItem, AttentionKernels, Line, PARTITION_CHUNKS, PARTITION_TOKENS, Partition, PartitionChunks, Scales,
    Scratch,
};
use crate::cpu::kv_blocks::{CHUNK_TOKENS, KvElement};

/// The NEON kernels.
pub(crate) const KERNELS: AttentionKernels = AttentionKernels { f32: attend, f16: attend, bf16: attend, int8: attend };

/// Rows of a register tile.
const TILE_ROWS: usize = 6;
/// With more rows than this a partition is converted once instead of once per tile.
const DIRECT_ROWS: usize = 2 * TILE_ROWS;
/// Floats of [`Eight`].
const LANES: usize = 8;

/// Eight floats.
#[derive(Clone, Copy)]
struct Eight([float32x4_t; 2]);

impl Eight {
    #[inline]
    #[target_feature(enable = "neon")]
    fn splat(x: f32) -> Eight {
        Eight([vdupq_n_f32(x); 2])
    }
    /// # Safety
    /// 8 floats from `floats` on can be read.
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn load(floats: *const f32) -> Eight {
        // SAFETY: promised by the caller.
        unsafe { Eight([vld1q_f32(floats), vld1q_f32(floats.add(4))]) }
    }
    /// # Safety
    /// 8 floats from `floats` on can be written.
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn store(self, floats: *mut f32) {
        // SAFETY: promised by the caller.
        unsafe {
            vst1q_f32(floats, self.0[0]);
            vst1q_f32(floats.add(4), self.0[1]);
        }
    }
    /// `self + x * y`, rounded once.
    #[inline]
    #[target_feature(enable = "neon")]
    fn add_product(self, x: Eight, y: f32) -> Eight {
        Eight([vfmaq_n_f32(self.0[0], x.0[0], y), vfmaq_n_f32(self.0[1], x.0[1], y)])
    }
    /// Both halves, each by itself.
    #[inline]
    #[target_feature(enable = "neon")]
    fn zip(self, other: Eight, f: impl Fn(float32x4_t, float32x4_t) -> float32x4_t) -> Eight {
        Eight([f(self.0[0], other.0[0]), f(self.0[1], other.0[1])])
    }
}

/// A type of which 8 elements can be read as a vector of floats.
trait Load: KvElement {
    /// # Safety
    /// 8 elements from `elements` on can be read.
    unsafe fn load(elements: *const Self) -> Eight;
}

impl Load for f32 {
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn load(elements: *const f32) -> Eight {
        // SAFETY: the caller promises 8 readable elements.
        unsafe { Eight::load(elements) }
    }
}

impl Load for f16 {
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn load(elements: *const f16) -> Eight {
        // SAFETY: the caller promises 8 readable elements, 16 bytes.
        Eight(f16_to_f32(unsafe { vld1q_u16(elements.cast()) }))
    }
}

impl Load for bf16 {
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn load(elements: *const bf16) -> Eight {
        // SAFETY: the caller promises 8 readable elements, 16 bytes.
        Eight(bf16_to_f32(unsafe { vld1q_u16(elements.cast()) }))
    }
}

impl Load for i8 {
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn load(elements: *const i8) -> Eight {
        // SAFETY: the caller promises 8 readable elements, 8 bytes.
        let integers = vmovl_s8(unsafe { vld1_s8(elements) });
        Eight([vcvtq_f32_s32(vmovl_s16(vget_low_s16(integers))), vcvtq_f32_s32(vmovl_high_s16(integers))])
    }
}

/// Softmax-weighted sum of the values that each row of `item` sees in `partition`, merged into `scratch`.
#[target_feature(enable = "neon")]
fn attend<E: Load>(item: &AttentionItem<'_>, partition: &Partition<'_, E>, scratch: &mut Scratch) {
    let rows = visible_rows(item, partition.start);
    if rows.is_empty() {
        return;
    }
    if rows.len() <= DIRECT_ROWS {
        let panels = Panels {
            keys: partition.keys,
            key_stride: partition.key_stride,
            values: partition.values,
            value_stride: partition.value_stride,
            panel_stride: 2 * LANES,
            scales: partition.scales.as_ref(),
            soon: partition.soon,
        };
        attend_panels(item, &panels, partition.start, rows, scratch);
    } else {
        let (mut keys, mut values) = (std::mem::take(&mut scratch.keys), std::mem::take(&mut scratch.values));
        convert(item.head_dim, partition, &mut keys, &mut values);
        let panels = Panels {
            keys: std::array::from_fn(|chunk| Line::floats(&keys[chunk * item.head_dim..(chunk + 1) * item.head_dim])),
            key_stride: CHUNK_TOKENS,
            values: std::array::from_fn(|chunk| Line::floats(&values[chunk * CHUNK_TOKENS..])),
            value_stride: 2 * LANES,
            panel_stride: PARTITION_TOKENS * 2 * LANES,
            scales: partition.scales.as_ref(),
            soon: None,
        };
        attend_panels(item, &panels, partition.start, rows, scratch);
        (scratch.keys, scratch.values) = (keys, values);
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

/// Keys and values of a partition as the register tiles read them.
struct Panels<'a, E> {
    /// Per chunk `[head_dim][key_stride]`, of which 16 lanes are read.
    keys: [&'a [E]; PARTITION_CHUNKS],
    key_stride: usize,
    /// Per chunk: element `d` of token `t` is at `d / 16 * panel_stride + t * value_stride + d % 16`.
    values: [&'a [E]; PARTITION_CHUNKS],
    value_stride: usize,
    panel_stride: usize,
    scales: Option<&'a Scales>,
    /// What is read next, in the same shape.
    soon: Option<PartitionChunks<'a, E>>,
}

impl<E> Panels<'_, E> {
    /// How far behind the keys of a chunk those of the next partition are, in elements.
    fn keys_ahead(&self, chunk: usize) -> isize {
        self.soon.map_or(0, |(keys, _)| distance(self.keys[chunk], keys[chunk]))
    }
    /// The same of the values.
    fn values_ahead(&self, chunk: usize) -> isize {
        self.soon.map_or(0, |(_, values)| distance(self.values[chunk], values[chunk]))
    }
}

/// Elements from the begin of one slice to that of another of the same buffer; 0 to an empty one.
fn distance<E>(from: &[E], to: &[E]) -> isize {
    match to.is_empty() {
        true => 0,
        false => (to.as_ptr() as isize - from.as_ptr() as isize) / size_of::<E>() as isize,
    }
}

/// Asks for the cache line of an element, which need not exist: a prefetch never faults. Into L2: L1 is full of what is read now.
#[inline]
#[target_feature(enable = "neon")]
fn prefetch<E>(element: *const E) {
    // SAFETY: it has no effect that could be seen.
    unsafe { asm!("prfm pldl2keep, [{}]", in(reg) element, options(readonly, nostack, preserves_flags)) };
}

/// Copies a partition as f32 into `keys` `[4][head_dim][16]` and `values` `[head_dim / 16][64][16]`.
#[target_feature(enable = "neon")]
fn convert<E: Load>(head_dim: usize, partition: &Partition<'_, E>, keys: &mut Vec<Line>, values: &mut Vec<Line>) {
    let num_panels = head_dim.div_ceil(16);
    keys.resize(keys.len().max(PARTITION_CHUNKS * head_dim), Line([0.0; 16]));
    values.resize(values.len().max(PARTITION_TOKENS * num_panels), Line([0.0; 16]));
    for (chunk, keys) in keys.chunks_exact_mut(head_dim).take(PARTITION_CHUNKS).enumerate() {
        if partition.keys[chunk].is_empty() {
            continue;
        }
        for (d, line) in keys.iter_mut().enumerate() {
            convert_line(&partition.keys[chunk][d * partition.key_stride..][..16], line);
        }
        for token in 0..CHUNK_TOKENS {
            let row = &partition.values[chunk][token * partition.value_stride..][..partition.value_stride];
            for (panel, elements) in row.chunks(16).enumerate() {
                convert_line(elements, &mut values[panel * PARTITION_TOKENS + chunk * CHUNK_TOKENS + token]);
            }
        }
    }
}

/// Converts 8 or 16 elements.
#[inline]
#[target_feature(enable = "neon")]
fn convert_line<E: Load>(elements: &[E], line: &mut Line) {
    for (elements, floats) in elements.chunks_exact(LANES).zip(line.0.chunks_exact_mut(LANES)) {
        // SAFETY: both chunks are 8 elements long.
        unsafe { E::load(elements.as_ptr()).store(floats.as_mut_ptr()) };
    }
}

/// Scores, softmax and weighted values of `rows`, tile by tile.
#[target_feature(enable = "neon")]
fn attend_panels<E: Load>(
    item: &AttentionItem<'_>,
    panels: &Panels<'_, E>,
    start: usize,
    rows: Range<usize>,
    scratch: &mut Scratch,
) {
    score_rows(item, panels, start, rows.clone(), scratch);
    for row in rows.clone() {
        let visible = item.visible(row, start);
        let (max, sum) = exponentials(&mut scratch.scores[row], visible, item.scale, panels.scales);
        scratch.rows[row].merge(max, sum, |x| exp_one(x));
    }
    value_rows(item, panels, start, rows, scratch);
}

#[target_feature(enable = "neon")]
fn score_rows<E: Load>(
    item: &AttentionItem<'_>,
    panels: &Panels<'_, E>,
    start: usize,
    rows: Range<usize>,
    scratch: &mut Scratch,
) {
    let all = item.visible(rows.start, start).start..item.visible(rows.end - 1, start).end;
    let mut chunk = all.start / CHUNK_TOKENS;
    let chunks_end = all.end.div_ceil(CHUNK_TOKENS);
    // Few rows: several chunks at once, to have enough independent chains.
    let wide = match rows.len() {
        1 => 4,
        2 => 2,
        _ => 1,
    };
    while chunk < chunks_end {
        let num_chunks = if chunks_end - chunk >= wide { wide } else { 1 };
        for tile in tiles(rows.clone(), TILE_ROWS) {
            let reach = item.visible(tile.end - 1, start).end;
            if chunk * CHUNK_TOKENS >= reach {
                continue;
            }
            let (tile_rows, scores) = (tile.len(), &mut scratch.scores[tile.clone()]);
            let tile = ScoreTile { item, first_row: tile.start, panels, chunk };
            match (tile_rows, num_chunks) {
                (1, 4) => tile.run::<1, 4>(scores),
                (1, _) => tile.run::<1, 1>(scores),
                (2, 2) => tile.run::<2, 2>(scores),
                (2, _) => tile.run::<2, 1>(scores),
                (3, _) => tile.run::<3, 1>(scores),
                (4, _) => tile.run::<4, 1>(scores),
                (5, _) => tile.run::<5, 1>(scores),
                _ => tile.run::<TILE_ROWS, 1>(scores),
            }
        }
        chunk += num_chunks;
    }
}

/// Some rows × some chunks of keys.
struct ScoreTile<'a, E> {
    item: &'a AttentionItem<'a>,
    first_row: usize,
    panels: &'a Panels<'a, E>,
    /// First chunk.
    chunk: usize,
}

impl<E: Load> ScoreTile<'_, E> {
    /// `scores[r][chunk + c][lane] = sum over d of q[r][d] * keys[c][d][lane]`, each sum one chain in the order of `d`.
    #[target_feature(enable = "neon")]
    fn run<const R: usize, const C: usize>(&self, scores: &mut [[Line; PARTITION_CHUNKS]]) {
        let keys = &self.panels.keys[self.chunk..self.chunk + C];
        let (stride, head_dim) = (self.panels.key_stride, self.item.head_dim);
        let reach = (head_dim - 1) * stride + CHUNK_TOKENS;
        assert!(scores.len() == R && keys.iter().all(|keys| keys.len() >= reach));
        let q: [*const f32; R] =
            std::array::from_fn(|r| self.item.q[self.item.q_offset(self.first_row + r)..][..head_dim].as_ptr());
        let mut k: [*const E; C] = std::array::from_fn(|c| keys[c].as_ptr());
        let ahead: [isize; C] = std::array::from_fn(|c| self.panels.keys_ahead(self.chunk + c));
        let mut sums = [[[Eight::splat(0.0); 2]; C]; R];
        for d in 0..head_dim {
            for c in 0..C {
                // SAFETY: 16 keys are readable at each `d` (asserted), and each query has `head_dim` elements.
                let (low, high) = unsafe { (E::load(k[c]), E::load(k[c].add(LANES))) };
                prefetch(k[c].wrapping_offset(ahead[c]));
                k[c] = k[c].wrapping_add(stride);
                for r in 0..R {
                    // SAFETY: as above.
                    let x = unsafe { *q[r].add(d) };
                    sums[r][c][0] = sums[r][c][0].add_product(low, x);
                    sums[r][c][1] = sums[r][c][1].add_product(high, x);
                }
            }
        }
        for r in 0..R {
            for c in 0..C {
                let line = scores[r][self.chunk + c].0.as_mut_ptr();
                // SAFETY: a line holds 16 floats.
                unsafe {
                    sums[r][c][0].store(line);
                    sums[r][c][1].store(line.add(LANES));
                }
            }
        }
    }
}

/// Turns the scores of the visible keys into exponentials of their distance to the largest, times the scales of the
/// values, all others into zeros; returns the largest score and the sum of the exponentials.
#[target_feature(enable = "neon")]
fn exponentials(
    scores: &mut [Line; PARTITION_CHUNKS],
    visible: Range<usize>,
    scale: f32,
    scales: Option<&Scales>,
) -> (f32, f32) {
    const EIGHTS: usize = PARTITION_TOKENS / LANES;
    let scores = Line::floats_mut(scores).as_mut_ptr();
    let lanes: [i32; 4] = [0, 1, 2, 3];
    // SAFETY: four integers.
    let lanes = unsafe { vld1q_s32(lanes.as_ptr()) };
    let (first, end) = (vdupq_n_s32(visible.start as i32), vdupq_n_s32(visible.end as i32));
    let mask = |vector: usize| {
        let key = vaddq_s32(lanes, vdupq_n_s32(4 * vector as i32));
        vandq_u32(vcgeq_s32(key, first), vcltq_s32(key, end))
    };
    let minus_infinity = vdupq_n_f32(f32::NEG_INFINITY);
    let mut score = [Eight::splat(0.0); EIGHTS];
    for i in 0..EIGHTS {
        // SAFETY: 8 times 8 floats are the 64 scores of the row.
        let raw = unsafe { Eight::load(scores.add(i * LANES)) };
        let factor = match scales {
            None => Eight::splat(scale),
            Some(scales) => load_lanes(&scales.keys, i).zip(Eight::splat(scale), |a, b| vmulq_f32(a, b)),
        };
        let [low, high] = raw.zip(factor, |a, b| vmulq_f32(a, b)).0;
        score[i] =
            Eight([vbslq_f32(mask(2 * i), low, minus_infinity), vbslq_f32(mask(2 * i + 1), high, minus_infinity)]);
    }
    // A score that is not a number is passed over here, and shows in the sum.
    let Eight([low, high]) = tree(score, |a, b| vmaxnmq_f32(a, b));
    let max = vmaxnmvq_f32(vmaxnmq_f32(low, high));
    for i in 0..EIGHTS {
        let [low, high] = score[i].0.map(|score| exp(vsubq_f32(score, vdupq_n_f32(max))));
        let visible_only =
            |x: float32x4_t, vector| vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(x), mask(vector)));
        score[i] = Eight([visible_only(low, 2 * i), visible_only(high, 2 * i + 1)]);
        let weight = match scales {
            None => score[i],
            Some(scales) => score[i].zip(load_lanes(&scales.values, i), |a, b| vmulq_f32(a, b)),
        };
        // SAFETY: as above.
        unsafe { weight.store(scores.add(i * LANES)) };
    }
    (max, horizontal_sum(tree(score, |a, b| vaddq_f32(a, b))))
}

/// Vector `idx` of some lines.
#[inline]
#[target_feature(enable = "neon")]
fn load_lanes(lines: &[Line; PARTITION_CHUNKS], idx: usize) -> Eight {
    let lanes = &Line::floats(lines)[idx * LANES..][..LANES];
    // SAFETY: 8 floats.
    unsafe { Eight::load(lanes.as_ptr()) }
}

/// Folds pairwise.
#[inline]
#[target_feature(enable = "neon")]
fn tree(v: [Eight; 8], fold: impl Fn(float32x4_t, float32x4_t) -> float32x4_t) -> Eight {
    let fold = |a: Eight, b: Eight| a.zip(b, &fold);
    fold(fold(fold(v[0], v[1]), fold(v[2], v[3])), fold(fold(v[4], v[5]), fold(v[6], v[7])))
}

#[inline]
#[target_feature(enable = "neon")]
fn exp_one(x: f32) -> f32 {
    vgetq_lane_f32::<0>(exp(vdupq_n_f32(x)))
}

#[target_feature(enable = "neon")]
fn value_rows<E: Load>(
    item: &AttentionItem<'_>,
    panels: &Panels<'_, E>,
    start: usize,
    rows: Range<usize>,
    scratch: &mut Scratch,
) {
    let vectors = item.head_dim.div_ceil(LANES);
    // Few rows: more vectors at once, to have enough independent chains. Panels are two vectors wide.
    let wide = match rows.len() {
        _ if panels.panel_stride != 2 * LANES => 2,
        1 => 8,
        2 => 4,
        _ => 2,
    };
    let mut vector = 0;
    while vector < vectors {
        let left = vectors - vector;
        let width = [8, 4, 2, 1].into_iter().find(|&w| w <= wide && w <= left).expect("1 fits");
        let element = vector / 2 * panels.panel_stride + vector % 2 * LANES;
        for tile in tiles(rows.clone(), TILE_ROWS) {
            let mut tile_rows = ValueTile { item, panels, start, first_row: tile.start, element, vector, scratch };
            match (tile.len(), width) {
                (1, 8) => tile_rows.run::<1, 8>(),
                (1, 4) => tile_rows.run::<1, 4>(),
                (1, 2) => tile_rows.run::<1, 2>(),
                (1, _) => tile_rows.run::<1, 1>(),
                (2, 4) => tile_rows.run::<2, 4>(),
                (2, 2) => tile_rows.run::<2, 2>(),
                (2, _) => tile_rows.run::<2, 1>(),
                (3, 2) => tile_rows.run::<3, 2>(),
                (3, _) => tile_rows.run::<3, 1>(),
                (4, 2) => tile_rows.run::<4, 2>(),
                (4, _) => tile_rows.run::<4, 1>(),
                (5, 2) => tile_rows.run::<5, 2>(),
                (5, _) => tile_rows.run::<5, 1>(),
                (_, 2) => tile_rows.run::<TILE_ROWS, 2>(),
                _ => tile_rows.run::<TILE_ROWS, 1>(),
            }
        }
        vector += width;
    }
}

/// Some rows × some vectors of the head.
struct ValueTile<'a, 'b, E> {
    item: &'a AttentionItem<'a>,
    panels: &'a Panels<'a, E>,
    start: usize,
    first_row: usize,
    /// Where the tile's first element of token 0 is in a chunk of values.
    element: usize,
    /// First vector of the head.
    vector: usize,
    scratch: &'b mut Scratch,
}

impl<E: Load> ValueTile<'_, '_, E> {
    /// `out[r] = out[r] * keep[r] + add[r] * (sum over the visible keys of weight[r][key] * values[key])`, each sum one
    /// chain in the order of the keys. Keys that all rows see are read once for all of them; those before (of a window)
    /// and behind (of the diagonal) row by row.
    #[target_feature(enable = "neon")]
    fn run<const R: usize, const W: usize>(&mut self) {
        let visible: [_; R] = std::array::from_fn(|r| self.item.visible(self.first_row + r, self.start));
        let common_start = visible.iter().map(|keys| keys.start).max().expect("R > 0");
        let common_end = visible.iter().map(|keys| keys.end).min().expect("R > 0").max(common_start);
        self.check_chunks(visible[0].start..visible[R - 1].end, W);
        let mut sums = [[Eight::splat(0.0); W]; R];
        for r in 0..R {
            let before = visible[r].start..common_start.min(visible[r].end);
            // SAFETY: the row sees these keys, so their chunks were checked.
            sums[r] = unsafe { self.add_keys(r, before, sums[r]) };
        }
        let mut key = common_start;
        while key < common_end {
            let end = common_end.min(key / CHUNK_TOKENS * CHUNK_TOKENS + CHUNK_TOKENS);
            // SAFETY: all rows see these keys, so their chunk was checked.
            sums = unsafe { self.add_chunk(key..end, sums) };
            key = end;
        }
        for r in 0..R {
            let behind = common_end.max(visible[r].start)..visible[r].end;
            // SAFETY: the row sees these keys, so their chunks were checked.
            sums[r] = unsafe { self.add_keys(r, behind, sums[r]) };
            self.merge(r, sums[r]);
        }
    }

    /// Asserts that the values of `keys` can be read, `width` vectors from `element` on.
    fn check_chunks(&self, keys: Range<usize>, width: usize) {
        let needed = self.element + (CHUNK_TOKENS - 1) * self.panels.value_stride + width * LANES;
        for chunk in keys.start / CHUNK_TOKENS..keys.end.div_ceil(CHUNK_TOKENS) {
            assert!(self.panels.values[chunk].len() >= needed, "values of chunk {chunk}");
        }
    }

    /// The tile's first element of a key's value.
    #[inline]
    fn value(&self, key: usize) -> *const E {
        let chunk = self.panels.values[key / CHUNK_TOKENS].as_ptr();
        chunk.wrapping_add(self.element + key % CHUNK_TOKENS * self.panels.value_stride)
    }

    /// `sums + sum over keys of weight[r][key] * values[key]`
    ///
    /// # Safety
    /// [`check_chunks`](Self::check_chunks) was called for the keys and `W` vectors.
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn add_keys<const W: usize>(&self, r: usize, keys: Range<usize>, mut sums: [Eight; W]) -> [Eight; W] {
        let weights = Line::floats(&self.scratch.scores[self.first_row + r]);
        for key in keys {
            for w in 0..W {
                // SAFETY: promised by the caller.
                let value = unsafe { E::load(self.value(key).add(w * LANES)) };
                sums[w] = sums[w].add_product(value, weights[key]);
            }
        }
        sums
    }

    /// The same for `R` rows and keys of one chunk.
    ///
    /// # Safety
    /// As for [`add_keys`](Self::add_keys).
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn add_chunk<const R: usize, const W: usize>(
        &self,
        keys: Range<usize>,
        mut sums: [[Eight; W]; R],
    ) -> [[Eight; W]; R] {
        // The weights of row `r` begin `r * PARTITION_TOKENS` floats behind those of the first: one pointer for all.
        let rows = &self.scratch.scores[self.first_row..self.first_row + R];
        let mut weights = rows.as_ptr().cast::<f32>().wrapping_add(keys.start);
        let mut values = self.value(keys.start);
        let ahead = self.panels.values_ahead(keys.start / CHUNK_TOKENS);
        for _ in keys {
            let mut value = [Eight::splat(0.0); W];
            for w in 0..W {
                // SAFETY: promised by the caller.
                value[w] = unsafe { E::load(values.add(w * LANES)) };
            }
            prefetch(values.wrapping_offset(ahead));
            for r in 0..R {
                // SAFETY: keys are below 64, and the rows are `R` times 64 weights.
                let weight = unsafe { *weights.add(r * PARTITION_TOKENS) };
                for w in 0..W {
                    sums[r][w] = sums[r][w].add_product(value[w], weight);
                }
            }
            values = values.wrapping_add(self.panels.value_stride);
            weights = weights.wrapping_add(1);
        }
        sums
    }

    /// Merges the partition's sums of row `r` into its running output.
    #[inline]
    #[target_feature(enable = "neon")]
    fn merge<const W: usize>(&mut self, r: usize, sums: [Eight; W]) {
        let (row, out_lines) = (self.first_row + r, self.scratch.out_lines);
        let state = self.scratch.rows[row];
        let out = Line::floats_mut(&mut self.scratch.out[row * out_lines..(row + 1) * out_lines]);
        let out = &mut out[self.vector * LANES..][..W * LANES];
        for (sum, out) in sums.into_iter().zip(out.chunks_exact_mut(LANES)) {
            // SAFETY: a chunk is one vector.
            unsafe {
                let kept = Eight::load(out.as_ptr()).zip(Eight::splat(state.keep), |a, b| vmulq_f32(a, b));
                kept.add_product(sum, state.add).store(out.as_mut_ptr());
            }
        }
    }
}

#[inline]
#[target_feature(enable = "neon")]
fn horizontal_sum(Eight([low, high]): Eight) -> f32 {
    let four = vaddq_f32(low, high);
    let two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    vget_lane_f32::<0>(two) + vget_lane_f32::<1>(two)
}
