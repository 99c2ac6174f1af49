//! Paged attention: each instruction set against a naive f64 attention over ragged sizes, and row invariance as exact
//! equality. The slots that no row may see are poisoned with NaN in every case, their scales too.

use std::ops::Range;
use std::sync::Arc;

use ns_llm_kernels::cpu::attention::{AttentionBatch, AttentionSequence, AttentionShape, paged_attention};
use ns_llm_kernels::cpu::kv_blocks::{KvBlocks, KvBlocksLayout, KvDtype};
use ns_llm_kernels::cpu::linear::{Operand, OperandFormat};
use ns_llm_kernels::cpu::pool::{Pool, PoolPriority};
use ns_llm_kernels::cpu::rope::{RopeLayer, RopeTable, rope_and_store};
use ns_llm_kernels::cpu::{Cpu, Isa};

/// A small generator of numbers in `-1.0..1.0` (Marsaglia 2003, xorshift).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    fn below(&mut self, bound: usize) -> usize {
        (self.next() >> 33) as usize % bound
    }
    fn float(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1_u64 << 23) as f32 - 1.0
    }
    fn floats(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.float()).collect()
    }
}

/// One model layer and the whole `[q | k | v]` rows of some sequences, from position 0.
struct Case {
    shape: AttentionShape,
    block_tokens: usize,
    dtype: KvDtype,
    sequences: Vec<Vec<f32>>,
    block_tables: Vec<Vec<u32>>,
}

impl Case {
    /// Random sequences of these lengths, with shuffled block tables.
    fn new(shape: AttentionShape, block_tokens: usize, dtype: KvDtype, lens: &[usize], seed: u64) -> Case {
        let mut random = Random(seed | 1);
        let width = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim;
        let sequences = lens.iter().map(|len| random.floats(len * width)).collect();
        let mut blocks: Vec<u32> =
            (0..lens.iter().map(|len| len.div_ceil(block_tokens) as u32).sum::<u32>() + 3).collect();
        for i in (1..blocks.len()).rev() {
            blocks.swap(i, random.below(i + 1));
        }
        let mut blocks = blocks.into_iter();
        let block_tables = lens.iter().map(|len| blocks.by_ref().take(len.div_ceil(block_tokens)).collect()).collect();
        Case { shape, block_tokens, dtype, sequences, block_tables }
    }

    fn width(&self) -> usize {
        (self.shape.num_heads + 2 * self.shape.num_kv_heads) * self.shape.head_dim
    }

    fn len(&self, sequence: usize) -> usize {
        self.sequences[sequence].len() / self.width()
    }

    /// A pool of two layers in which every element is NaN.
    fn poisoned_pool(&self) -> KvBlocks {
        let num_blocks = self.block_tables.iter().map(Vec::len).sum::<usize>() + 3;
        let AttentionShape { num_kv_heads, head_dim, .. } = self.shape;
        let (block_tokens, dtype) = (self.block_tokens, self.dtype);
        let layout = KvBlocksLayout { num_layers: 2, num_blocks, block_tokens, num_kv_heads, head_dim, dtype };
        let mut kv = KvBlocks::new(layout).expect("a small pool");
        (0..num_blocks as u32).for_each(|block| kv.block_mut(block).fill(0xff));
        kv
    }

    /// Stores and attends the given positions of the given sequences in one step; appends each row's result to `out`.
    fn step(&self, cpu: &Cpu, kv: &mut KvBlocks, parts: &[(usize, Range<usize>)], out: &mut [Vec<f32>]) {
        let (mut qkv, mut positions, mut slots) = (Vec::new(), Vec::new(), Vec::new());
        let (mut sequences, mut block_tables) = (Vec::new(), Vec::new());
        for (sequence, span) in parts {
            let (first_row, first_block) = (positions.len(), block_tables.len());
            qkv.extend_from_slice(&self.sequences[*sequence][span.start * self.width()..span.end * self.width()]);
            positions.extend(span.clone().map(|position| position as u32));
            let table = &self.block_tables[*sequence];
            let slot =
                |p: usize| table[p / self.block_tokens] * self.block_tokens as u32 + (p % self.block_tokens) as u32;
            slots.extend(span.clone().map(slot));
            block_tables.extend_from_slice(table);
            sequences.push(AttentionSequence {
                rows: first_row..positions.len(),
                first_position: span.start,
                blocks: first_block..block_tables.len(),
            });
        }
        let rope = RopeTable { rotary_dim: 0, cos: &[], sin: &[] };
        let layer = RopeLayer { layer_idx: 1, shape: self.shape, qk_norm: None, rope };
        rope_and_store(cpu, &mut qkv, &layer, &positions, &slots, kv).expect("sizes fit");
        let width = self.shape.num_heads * self.shape.head_dim;
        let mut result = Operand::zeros(OperandFormat::F32, positions.len(), width);
        let (q, q_stride) = (&qkv[..], self.width());
        let batch = AttentionBatch { q, q_stride, sequences: &sequences, block_tables: &block_tables };
        paged_attention(cpu, (1, &self.shape), &batch, kv, &mut result).expect("sizes fit");
        let mut row = vec![0.0; width];
        for ((sequence, _), rows) in parts.iter().zip(sequences.iter().map(|s| s.rows.clone())) {
            for i in rows {
                result.row_into(i, &mut row);
                out[*sequence].extend_from_slice(&row);
            }
        }
    }

    /// All sequences, one after the other, in chunks of `chunk` tokens.
    fn alone(&self, cpu: &Cpu, chunk: usize) -> Vec<Vec<f32>> {
        let mut kv = self.poisoned_pool();
        let mut out = vec![Vec::new(); self.sequences.len()];
        for sequence in 0..self.sequences.len() {
            for start in (0..self.len(sequence)).step_by(chunk) {
                let span = start..start.saturating_add(chunk).min(self.len(sequence));
                self.step(cpu, &mut kv, &[(sequence, span)], &mut out);
            }
        }
        out
    }

    /// All sequences together, in chunks of random length.
    fn together(&self, cpu: &Cpu, seed: u64) -> Vec<Vec<f32>> {
        let mut random = Random(seed | 1);
        let mut kv = self.poisoned_pool();
        let mut out = vec![Vec::new(); self.sequences.len()];
        let mut done = vec![0; self.sequences.len()];
        while (0..done.len()).any(|s| done[s] < self.len(s)) {
            let mut parts = Vec::new();
            for (sequence, done) in done.iter_mut().enumerate() {
                let end = self.len(sequence).min(*done + [0, 1, 1, 5, 40][random.below(5)]);
                if end > *done {
                    parts.push((sequence, *done..end));
                    *done = end;
                }
            }
            self.step(cpu, &mut kv, &parts, &mut out);
        }
        out
    }

    /// The definition, in f64, from keys and values as they are stored.
    fn naive(&self, sequence: usize) -> Vec<f32> {
        let AttentionShape { num_heads, num_kv_heads, head_dim, scale, sliding_window_tokens, causal } = self.shape;
        let rows: Vec<&[f32]> = self.sequences[sequence].chunks_exact(self.width()).collect();
        // Head `head` of a row, those of k behind those of q, those of v behind both.
        let stored = |row: &[f32], head: usize| stored(self.dtype, &row[head * head_dim..][..head_dim]);
        let heads = |head: usize| rows.iter().map(|row| stored(row, head)).collect::<Vec<_>>();
        let keys: Vec<_> = (0..num_kv_heads).map(|head| heads(num_heads + head)).collect();
        let values: Vec<_> = (0..num_kv_heads).map(|head| heads(num_heads + num_kv_heads + head)).collect();
        let mut out = Vec::new();
        for (position, row) in rows.iter().enumerate() {
            let first = (position + 1).saturating_sub(sliding_window_tokens.unwrap_or(usize::MAX));
            let end = if causal { position + 1 } else { rows.len() };
            for head in 0..num_heads {
                let kv_head = head / (num_heads / num_kv_heads);
                let q = &row[head * head_dim..(head + 1) * head_dim];
                let dot = |k: &[f64]| q.iter().zip(k).map(|(&q, &k)| f64::from(q) * k).sum::<f64>();
                let scores: Vec<f64> = (first..end).map(|k| dot(&keys[kv_head][k]) * f64::from(scale)).collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
                let sum: f64 = weights.iter().sum();
                let of_head = &values[kv_head][first..end];
                let weighted = |d: usize| weights.iter().zip(of_head).map(|(w, value)| w * value[d]).sum::<f64>();
                out.extend((0..head_dim).map(|d| (weighted(d) / sum) as f32));
            }
        }
        out
    }
}

const DTYPES: [KvDtype; 4] = [KvDtype::F32, KvDtype::F16, KvDtype::Bf16, KvDtype::Int8];

/// A key or a value of one head as it is kept.
fn stored(dtype: KvDtype, head: &[f32]) -> Vec<f64> {
    let max = head.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
    let each = head.iter().map(|&x| match dtype {
        KvDtype::F32 => f64::from(x),
        KvDtype::F16 => half::f16::from_f32(x).to_f64(),
        KvDtype::Bf16 => half::bf16::from_f32(x).to_f64(),
        KvDtype::Int8 => f64::from((x * (127.0 / max)).round_ties_even()) * f64::from(max / 127.0),
    });
    each.collect()
}

fn shape(num_heads: usize, num_kv_heads: usize, head_dim: usize, window: Option<usize>) -> AttentionShape {
    let scale = 4.0 / (head_dim as f32).sqrt();
    AttentionShape { num_heads, num_kv_heads, head_dim, scale, sliding_window_tokens: window, causal: true }
}

fn cpu(isa: Isa, threads: usize) -> Cpu {
    let pool = Pool::new(threads, PoolPriority::Normal).expect("threads");
    Cpu::with_isa(isa, Arc::new(pool)).expect("available")
}

/// Normalised mean squared error; says where the worst element is.
fn check(got: &[f32], want: &[f32], limit: f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    let (mut error, mut power, mut worst) = (0.0, 0.0, (0.0, 0));
    for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
        let difference = f64::from(got) - f64::from(want);
        error += difference * difference;
        power += f64::from(want) * f64::from(want);
        if difference.abs() > worst.0 || difference.is_nan() {
            worst = (difference.abs(), i);
        }
    }
    let i = worst.1;
    assert!(error <= limit * power, "{what}: NMSE {:e}, worst at {i}: {} for {}", error / power, got[i], want[i]);
}

fn bits(rows: &[Vec<f32>]) -> Vec<Vec<u32>> {
    rows.iter().map(|row| row.iter().map(|x| x.to_bits()).collect()).collect()
}

/// Every instruction set computes the definition: over head widths, groups, contexts around the edges of chunks and
/// partitions, block sizes, windows and element types.
#[test]
fn agrees_with_the_definition() {
    let heads = [(1, 1), (2, 1), (3, 1), (8, 1), (4, 2), (5, 5), (8, 8), (14, 2)];
    let windows = [None, None, Some(1), Some(17), Some(64), Some(100)];
    let mut num_cases = 0;
    for (i, head_dim) in [16, 20, 32, 40, 64, 72, 80, 96, 100, 128, 256].into_iter().enumerate() {
        for (j, len) in [1, 15, 16, 17, 63, 64, 65, 200].into_iter().enumerate() {
            let (num_heads, num_kv_heads) = heads[(i + 3 * j) % heads.len()];
            let shape = shape(num_heads, num_kv_heads, head_dim, windows[(2 * i + j) % windows.len()]);
            let block_tokens = [16, 32, 48][(i + j) % 3];
            for dtype in DTYPES {
                let case = Case::new(shape, block_tokens, dtype, &[len], (i * 8 + j) as u64 * 7919 + 1);
                let want = case.naive(0);
                for isa in Isa::available() {
                    let cpu = cpu(isa, 1);
                    let what = format!("{isa:?} {shape:?} {dtype:?}, {len} tokens in blocks of {block_tokens}");
                    check(&case.alone(&cpu, len)[0], &want, 1e-11, &what);
                    num_cases += 1;
                }
            }
        }
    }
    assert!(num_cases >= 4 * 88);
}

/// A row's bits do not depend on how the prompt is cut into chunks, on batch mates, on the number of threads, on the
/// block size or on which blocks are used.
#[test]
fn rows_are_invariant() {
    let shapes = [shape(4, 2, 64, None), shape(14, 2, 32, Some(70)), shape(7, 1, 40, Some(33))];
    for (i, dtype) in DTYPES.into_iter().enumerate() {
        let shape = shapes[i % shapes.len()];
        let lens = [140, 1, 67];
        let case = Case::new(shape, 16, dtype, &lens, 42);
        for isa in Isa::available() {
            let want = bits(&case.alone(&cpu(isa, 1), 1000));
            assert!(want.iter().flatten().all(|&bits| f32::from_bits(bits).is_finite()), "poison was read");
            for chunk in [1, 7, 16, 64] {
                assert!(bits(&case.alone(&cpu(isa, 1), chunk)) == want, "{isa:?} {shape:?}, chunks of {chunk}");
            }
            for threads in 1..=4 {
                let together = case.together(&cpu(isa, threads), 9 + threads as u64);
                assert!(bits(&together) == want, "{isa:?} {shape:?}, together on {threads} threads");
            }
            let mut other = Case::new(shape, 32, dtype, &lens, 1234);
            other.sequences = case.sequences.clone();
            assert_ne!(other.block_tables, case.block_tables);
            assert!(bits(&other.alone(&cpu(isa, 2), 40)) == want, "{isa:?} {shape:?}, other blocks");
        }
    }
}

/// Without a causal mask every row sees all keys of its own sequence and no other: every instruction set computes the
/// definition, over head widths (odd ones too), groups and lengths around the edges of chunks, partitions and items; a
/// row's bits do not depend on batch mates, threads or blocks.
#[test]
fn bidirectional_rows_see_their_whole_sequence() {
    let heads = [(1, 1), (12, 12), (3, 1), (4, 2)];
    for (i, head_dim) in [13, 16, 32, 64, 100].into_iter().enumerate() {
        let (num_heads, num_kv_heads) = heads[i % heads.len()];
        let shape = AttentionShape { causal: false, ..shape(num_heads, num_kv_heads, head_dim, None) };
        let dtype = DTYPES[i % DTYPES.len()];
        let lens = [1, 15, 16, 17, 63, 64, 65, 97, 200];
        let case = Case::new(shape, 16, dtype, &lens, 77 + i as u64);
        for isa in Isa::available() {
            let want = case.alone(&cpu(isa, 1), usize::MAX / 2);
            for (sequence, want) in want.iter().enumerate() {
                let what = format!("{isa:?} {shape:?} {dtype:?}, {} tokens", lens[sequence]);
                check(want, &case.naive(sequence), 1e-11, &what);
            }
            let mut other = Case::new(shape, 32, dtype, &lens, 4321);
            other.sequences = case.sequences.clone();
            for threads in 1..=4 {
                for case in [&case, &other] {
                    let whole: Vec<_> = lens.iter().enumerate().map(|(idx, &len)| (idx, 0..len)).collect();
                    let mut together = vec![Vec::new(); lens.len()];
                    case.step(&cpu(isa, threads), &mut case.poisoned_pool(), &whole, &mut together);
                    assert!(bits(&together) == bits(&want), "{isa:?} {shape:?}, together on {threads} threads");
                }
            }
        }
    }
}

/// Keys and values that are not finite reach the rows that see them, and no others.
#[test]
fn damage_stays_with_its_readers() {
    for isa in Isa::available() {
        for (part, dtype) in [0, 1, 2].into_iter().flat_map(|part| DTYPES.map(|dtype| (part, dtype))) {
            let shape = shape(2, 1, 32, None);
            let mut case = Case::new(shape, 16, dtype, &[80, 80], 5);
            // q, k or v of position 70 of the first sequence.
            let damaged = 70 * case.width() + [0, 64, 96][part];
            case.sequences[0][damaged] = f32::NAN;
            let out = case.together(&cpu(isa, 2), 3);
            let is_nan =
                |sequence: usize, position: usize| out[sequence][position * 64..][..64].iter().any(|x| x.is_nan());
            assert!((0..80).all(|position| !is_nan(1, position)), "{isa:?}: reached another sequence");
            assert!((0..70).all(|position| !is_nan(0, position)), "{isa:?}: reached an earlier position");
            assert!(is_nan(0, 70), "{isa:?} {dtype:?}: part {part} was not read");
            assert_eq!(is_nan(0, 79), part > 0, "{isa:?}: k and v are seen later, q is not");
        }
    }
}

/// Sizes and indices that do not fit are refused by name, before anything is computed.
#[test]
fn misuse_is_refused() {
    let case = Case::new(shape(4, 2, 32, None), 16, KvDtype::F32, &[20], 1);
    let kv = case.poisoned_pool();
    let cpu = cpu(Isa::Portable, 1);
    let q = vec![0.0; 20 * 128];
    let sequence = |rows, first_position, blocks| AttentionSequence { rows, first_position, blocks };
    let refused = |shape: AttentionShape, layer: usize, sequences: &[AttentionSequence], table: &[u32], name: &str| {
        let mut out = Operand::zeros(OperandFormat::F32, 20, 128);
        let batch = AttentionBatch { q: &q, q_stride: 128, sequences, block_tables: table };
        let error = paged_attention(&cpu, (layer, &shape), &batch, &kv, &mut out).expect_err(name).to_string();
        assert!(error.contains(name), "{error} does not name {name}");
    };
    let good = case.shape;
    refused(good, 2, &[], &[], "layer_idx 2");
    refused(AttentionShape { num_heads: 3, ..good }, 0, &[], &[], "num_heads is 3");
    refused(AttentionShape { num_kv_heads: 1, ..good }, 0, &[], &[], "num_kv_heads is 1");
    refused(AttentionShape { head_dim: 16, ..good }, 0, &[], &[], "head_dim is 16");
    refused(AttentionShape { num_heads: 2, ..good }, 0, &[], &[], "out width is 128");
    refused(AttentionShape { sliding_window_tokens: Some(0), ..good }, 0, &[], &[], "sliding_window_tokens is 0");
    let window_behind = AttentionShape { sliding_window_tokens: Some(4), causal: false, ..good };
    refused(window_behind, 0, &[], &[], "sliding_window_tokens is 4, must be none");
    refused(good, 0, &[sequence(0..21, 0, 0..2)], &[0, 1], "last row of a sequence 21");
    refused(good, 0, &[sequence(0..20, 20, 0..2)], &[0, 1], "position 39");
    refused(good, 0, &[sequence(0..20, 0, 0..3)], &[0, 1], "last block of a sequence 3");
    refused(good, 0, &[sequence(0..20, 0, 0..2)], &[0, 99], "block 99");
    refused(good, 0, &[sequence(0..9, 0, 0..1), sequence(8..10, 0, 0..1)], &[0], "end of the rows before 9");
}
