//! Attention of one partition of keys with AVX2, FMA and F16C. See [`crate::cpu::attention`] for the whole.
//!
//! Two shapes of one computation, with the same bits:
//! - few rows (decode): keys and values are read where they lie, converted in registers, once per tile of rows, and those
//!   of the next partition are asked for on the way (its blocks lie elsewhere, and the hardware looks no further than a
//!   page: 17 to 25 % more GB/s on Zen 3 in f16, 28 % in 8 bits; all at once at the begin of a partition it was slower);
//! - many rows (prefill): a partition is first converted to f32 panels that fit the L1 cache line by line, then tiles of
//!   [`TILE_ROWS`] rows × 16 lanes run over them: 12 accumulators hide the latency of the multiply-add.

// Loops over the constants of a tile: an index names a register.
#![allow(clippy::needless_range_loop)]

use core::arch::x86_64::*;
use std::ops::Range;

use half::{bf16, f16};

use super::math::exp;
use crate::cpu::attention::{
    AttentionItem, AttentionKernels, Line, PARTITION_CHUNKS, PARTITION_TOKENS, Partition, PartitionChunks, Scales,
    Scratch,
};
use crate::cpu::kv_blocks::{CHUNK_TOKENS, KvElement};

/// The AVX2 kernels.
pub(crate) const KERNELS: AttentionKernels = AttentionKernels { f32: attend, f16: attend, bf16: attend, int8: attend };

/// Rows of a register tile.
const TILE_ROWS: usize = 6;
/// With more rows than this a partition is converted once instead of once per tile.
const DIRECT_ROWS: usize = 2 * TILE_ROWS;
/// Floats of a vector.
const LANES: usize = 8;

/// A type of which 8 elements can be read as a vector of floats.
trait Load: KvElement {
    /// # Safety
    /// The CPU has AVX2 and F16C, and 8 elements from `elements` on can be read.
    unsafe fn load(elements: *const Self) -> __m256;
}

impl Load for f32 {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load(elements: *const f32) -> __m256 {
        // SAFETY: the caller promises 8 readable elements.
        unsafe { _mm256_loadu_ps(elements) }
    }
}

impl Load for f16 {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load(elements: *const f16) -> __m256 {
        // SAFETY: the caller promises 8 readable elements, 16 bytes.
        _mm256_cvtph_ps(unsafe { _mm_loadu_si128(elements.cast()) })
    }
}

impl Load for bf16 {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load(elements: *const bf16) -> __m256 {
        // SAFETY: the caller promises 8 readable elements, 16 bytes.
        let upper_halves = _mm256_cvtepu16_epi32(unsafe { _mm_loadu_si128(elements.cast()) });
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(upper_halves))
    }
}

impl Load for i8 {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load(elements: *const i8) -> __m256 {
        // SAFETY: the caller promises 8 readable elements, 8 bytes.
        _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(unsafe { _mm_loadl_epi64(elements.cast()) }))
    }
}

/// Softmax-weighted sum of the values that each row of `item` sees in `partition`, merged into `scratch`.
#[target_feature(enable = "avx2,fma,f16c")]
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
#[target_feature(enable = "avx2,fma,f16c")]
fn prefetch<E>(element: *const E) {
    _mm_prefetch::<_MM_HINT_T1>(element.cast());
}

/// Copies a partition as f32 into `keys` `[4][head_dim][16]` and `values` `[head_dim / 16][64][16]`.
#[target_feature(enable = "avx2,fma,f16c")]
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
#[target_feature(enable = "avx2,fma,f16c")]
fn convert_line<E: Load>(elements: &[E], line: &mut Line) {
    for (elements, floats) in elements.chunks_exact(LANES).zip(line.0.chunks_exact_mut(LANES)) {
        // SAFETY: both chunks are 8 elements long.
        unsafe { _mm256_storeu_ps(floats.as_mut_ptr(), E::load(elements.as_ptr())) };
    }
}

/// Scores, softmax and weighted values of `rows`, tile by tile.
#[target_feature(enable = "avx2,fma,f16c")]
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

#[target_feature(enable = "avx2,fma,f16c")]
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
        for tile in tiles(rows.clone()) {
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
    #[target_feature(enable = "avx2,fma,f16c")]
    fn run<const R: usize, const C: usize>(&self, scores: &mut [[Line; PARTITION_CHUNKS]]) {
        let keys = &self.panels.keys[self.chunk..self.chunk + C];
        let (stride, head_dim) = (self.panels.key_stride, self.item.head_dim);
        let reach = (head_dim - 1) * stride + CHUNK_TOKENS;
        assert!(scores.len() == R && keys.iter().all(|keys| keys.len() >= reach));
        let q: [*const f32; R] =
            std::array::from_fn(|r| self.item.q[self.item.q_offset(self.first_row + r)..][..head_dim].as_ptr());
        let mut k: [*const E; C] = std::array::from_fn(|c| keys[c].as_ptr());
        let ahead: [isize; C] = std::array::from_fn(|c| self.panels.keys_ahead(self.chunk + c));
        let mut sums = [[[_mm256_setzero_ps(); 2]; C]; R];
        for d in 0..head_dim {
            for c in 0..C {
                // SAFETY: 16 keys are readable at each `d` (asserted), and each query has `head_dim` elements.
                let (low, high) = unsafe { (E::load(k[c]), E::load(k[c].add(LANES))) };
                prefetch(k[c].wrapping_offset(ahead[c]));
                k[c] = k[c].wrapping_add(stride);
                for r in 0..R {
                    // SAFETY: as above.
                    let x = unsafe { _mm256_broadcast_ss(&*q[r].add(d)) };
                    sums[r][c][0] = _mm256_fmadd_ps(x, low, sums[r][c][0]);
                    sums[r][c][1] = _mm256_fmadd_ps(x, high, sums[r][c][1]);
                }
            }
        }
        for r in 0..R {
            for c in 0..C {
                let line = scores[r][self.chunk + c].0.as_mut_ptr();
                // SAFETY: a line holds 16 floats.
                unsafe {
                    _mm256_storeu_ps(line, sums[r][c][0]);
                    _mm256_storeu_ps(line.add(LANES), sums[r][c][1]);
                }
            }
        }
    }
}

/// Turns the scores of the visible keys into exponentials of their distance to the largest, times the scales of the
/// values, all others into zeros; returns the largest score and the sum of the exponentials.
#[target_feature(enable = "avx2,fma,f16c")]
fn exponentials(
    scores: &mut [Line; PARTITION_CHUNKS],
    visible: Range<usize>,
    scale: f32,
    scales: Option<&Scales>,
) -> (f32, f32) {
    const VECTORS: usize = PARTITION_TOKENS / LANES;
    let scores = Line::floats_mut(scores).as_mut_ptr();
    let (first, end) = (_mm256_set1_epi32(visible.start as i32 - 1), _mm256_set1_epi32(visible.end as i32));
    let lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    let minus_infinity = _mm256_set1_ps(f32::NEG_INFINITY);
    let mut score = [_mm256_setzero_ps(); VECTORS];
    let mut mask = [_mm256_setzero_ps(); VECTORS];
    for i in 0..VECTORS {
        let key = _mm256_add_epi32(lane, _mm256_set1_epi32((i * LANES) as i32));
        mask[i] = _mm256_castsi256_ps(_mm256_and_si256(_mm256_cmpgt_epi32(key, first), _mm256_cmpgt_epi32(end, key)));
        // SAFETY: 8 vectors of 8 floats are the 64 scores of the row.
        let raw = unsafe { _mm256_loadu_ps(scores.add(i * LANES)) };
        let factor = match scales {
            None => _mm256_set1_ps(scale),
            Some(scales) => _mm256_mul_ps(load_lanes(&scales.keys, i), _mm256_set1_ps(scale)),
        };
        score[i] = _mm256_blendv_ps(minus_infinity, _mm256_mul_ps(raw, factor), mask[i]);
    }
    let max = horizontal_max(tree(score, |a, b| _mm256_max_ps(a, b)));
    for i in 0..VECTORS {
        score[i] = _mm256_and_ps(exp(_mm256_sub_ps(score[i], _mm256_set1_ps(max))), mask[i]);
        let weight = match scales {
            None => score[i],
            Some(scales) => _mm256_and_ps(_mm256_mul_ps(score[i], load_lanes(&scales.values, i)), mask[i]),
        };
        // SAFETY: as above.
        unsafe { _mm256_storeu_ps(scores.add(i * LANES), weight) };
    }
    (max, horizontal_sum(tree(score, |a, b| _mm256_add_ps(a, b))))
}

/// Vector `idx` of some lines.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load_lanes(lines: &[Line; PARTITION_CHUNKS], idx: usize) -> __m256 {
    let lanes = &Line::floats(lines)[idx * LANES..][..LANES];
    // SAFETY: 8 floats.
    unsafe { _mm256_loadu_ps(lanes.as_ptr()) }
}

/// Folds 8 vectors pairwise.
#[inline]
fn tree(v: [__m256; 8], fold: impl Fn(__m256, __m256) -> __m256) -> __m256 {
    fold(fold(fold(v[0], v[1]), fold(v[2], v[3])), fold(fold(v[4], v[5]), fold(v[6], v[7])))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn exp_one(x: f32) -> f32 {
    _mm256_cvtss_f32(exp(_mm256_set1_ps(x)))
}

#[target_feature(enable = "avx2,fma,f16c")]
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
        for tile in tiles(rows.clone()) {
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
    #[target_feature(enable = "avx2,fma,f16c")]
    fn run<const R: usize, const W: usize>(&mut self) {
        let visible: [_; R] = std::array::from_fn(|r| self.item.visible(self.first_row + r, self.start));
        let common_start = visible.iter().map(|keys| keys.start).max().expect("R > 0");
        let common_end = visible.iter().map(|keys| keys.end).min().expect("R > 0").max(common_start);
        self.check_chunks(visible[0].start..visible[R - 1].end, W);
        let mut sums = [[_mm256_setzero_ps(); W]; R];
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
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn add_keys<const W: usize>(&self, r: usize, keys: Range<usize>, mut sums: [__m256; W]) -> [__m256; W] {
        let weights = Line::floats(&self.scratch.scores[self.first_row + r]);
        for key in keys {
            let weight = _mm256_set1_ps(weights[key]);
            for w in 0..W {
                // SAFETY: promised by the caller.
                let value = unsafe { E::load(self.value(key).add(w * LANES)) };
                sums[w] = _mm256_fmadd_ps(weight, value, sums[w]);
            }
        }
        sums
    }

    /// The same for `R` rows and keys of one chunk.
    ///
    /// # Safety
    /// As for [`add_keys`](Self::add_keys).
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn add_chunk<const R: usize, const W: usize>(
        &self,
        keys: Range<usize>,
        mut sums: [[__m256; W]; R],
    ) -> [[__m256; W]; R] {
        // The weights of row `r` begin `r * PARTITION_TOKENS` floats behind those of the first: one pointer for all.
        let rows = &self.scratch.scores[self.first_row..self.first_row + R];
        let mut weights = rows.as_ptr().cast::<f32>().wrapping_add(keys.start);
        let mut values = self.value(keys.start);
        let ahead = self.panels.values_ahead(keys.start / CHUNK_TOKENS);
        for _ in keys {
            let mut value = [_mm256_setzero_ps(); W];
            for w in 0..W {
                // SAFETY: promised by the caller.
                value[w] = unsafe { E::load(values.add(w * LANES)) };
            }
            prefetch(values.wrapping_offset(ahead));
            for r in 0..R {
                // SAFETY: keys are below 64, and the rows are `R` times 64 weights.
                let weight = unsafe { _mm256_broadcast_ss(&*weights.add(r * PARTITION_TOKENS)) };
                for w in 0..W {
                    sums[r][w] = _mm256_fmadd_ps(weight, value[w], sums[r][w]);
                }
            }
            values = values.wrapping_add(self.panels.value_stride);
            weights = weights.wrapping_add(1);
        }
        sums
    }

    /// Merges the partition's sums of row `r` into its running output.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn merge<const W: usize>(&mut self, r: usize, sums: [__m256; W]) {
        let (row, out_lines) = (self.first_row + r, self.scratch.out_lines);
        let state = self.scratch.rows[row];
        let (keep, add) = (_mm256_set1_ps(state.keep), _mm256_set1_ps(state.add));
        let out = Line::floats_mut(&mut self.scratch.out[row * out_lines..(row + 1) * out_lines]);
        let out = &mut out[self.vector * LANES..][..W * LANES];
        for (sum, out) in sums.into_iter().zip(out.chunks_exact_mut(LANES)) {
            // SAFETY: a chunk is one vector.
            unsafe {
                let merged = _mm256_fmadd_ps(sum, add, _mm256_mul_ps(_mm256_loadu_ps(out.as_ptr()), keep));
                _mm256_storeu_ps(out.as_mut_ptr(), merged);
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn horizontal_max(v: __m256) -> f32 {
    let v = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
    let v = _mm_max_ps(v, _mm_movehl_ps(v, v));
    _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn horizontal_sum(v: __m256) -> f32 {
    let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
    let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
    _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
}
