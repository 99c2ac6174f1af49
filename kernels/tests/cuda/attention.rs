//! `attention_decode.cu` and `attention_prefill.cu` against attention in f64, and against each other bit for bit.

use half::{bf16, f16};
use ns_llm_kernels::cpu::attention::AttentionSequence;
use ns_llm_kernels::cuda::attention::{
    ActivationRows, ActivationType, AttentionLayer, AttentionPlan, AttentionScratch, DevicePlan, paged_attention,
};
use ns_llm_kernels::cuda::kv_blocks::{KvBlocks, KvDtype, KvLayout};
use ns_llm_kernels::error::Result;

use crate::Test;
use crate::check::Random;
use crate::mirror::{slice, slice_mut};
use crate::shim::{Schedule, Shim, schedules};

/// The tests of this file.
pub(crate) const TESTS: &[Test] = &[
    ("attention is that of f64, in every schedule", attention_is_exact),
    ("a row's attention has the same bits in any chunk and kernel", chunks_and_kernels_agree),
    ("a NaN stays with its sequence", a_nan_stays_with_its_sequence),
    ("attention refuses sizes that do not fit", sizes_are_checked),
];
/// Those that need the shim.
pub(crate) const PLANTED: &[Test] = &[("attention that is planted wrong shows", planted_bugs_show)];

/// Heads, blocks and constants of a case.
#[derive(Clone, Copy)]
struct Heads {
    num_heads: usize,
    num_kv_heads: usize,
    head_dim: usize,
    block_tokens: usize,
    dtype: KvDtype,
    window: Option<usize>,
    causal: bool,
    scale: f32,
}

impl Heads {
    fn new(num_heads: usize, num_kv_heads: usize, head_dim: usize, dtype: KvDtype) -> Heads {
        let (block_tokens, scale) = (16, 1.0 / (head_dim as f32).sqrt());
        Heads { num_heads, num_kv_heads, head_dim, block_tokens, dtype, window: None, causal: true, scale }
    }
    fn width(&self) -> usize {
        self.num_heads * self.head_dim
    }
    fn bits(&self, x: f32) -> u16 {
        match self.dtype {
            KvDtype::F16 => f16::from_f32(x).to_bits(),
            KvDtype::Bf16 => bf16::from_f32(x).to_bits(),
        }
    }
    fn value(&self, bits: u16) -> f64 {
        match self.dtype {
            KvDtype::F16 => f16::from_bits(bits).to_f64(),
            KvDtype::Bf16 => bf16::from_bits(bits).to_f64(),
        }
    }
}

/// Sequences with keys and values at all of their positions; every slot beyond is NaN.
struct Case {
    heads: Heads,
    layout: KvLayout,
    elements: Vec<u16>,
    block_tables: Vec<u32>,
    /// Tokens of each sequence, and where its blocks are in the tables.
    sequences: Vec<(usize, std::ops::Range<usize>)>,
    /// Of each sequence, `[tokens][width]`: a query for every position.
    queries: Vec<Vec<f32>>,
}

const LAYER_IDX: usize = 1;

impl Case {
    fn new(heads: Heads, tokens: &[usize]) -> Case {
        let mut random = Random(tokens.len() as u64 + heads.width() as u64);
        let (mut sequences, mut num_blocks) = (Vec::new(), 0);
        for &tokens in tokens {
            let blocks = num_blocks..num_blocks + tokens.div_ceil(heads.block_tokens);
            num_blocks = blocks.end;
            sequences.push((tokens, blocks));
        }
        // 7 is no divisor of any number of blocks here plus one: the table is a permutation.
        let num_slots = (1..).map(|more| num_blocks + more).find(|n| n % 7 != 0).expect("one of two");
        let block_tables = (0..num_blocks).map(|i| ((i + 1) * 7 % num_slots) as u32).collect();
        let layout = KvLayout {
            num_layers: 2,
            num_blocks: num_slots,
            block_tokens: heads.block_tokens,
            num_kv_heads: heads.num_kv_heads,
            head_dim: heads.head_dim,
            dtype: heads.dtype,
        };
        let elements = vec![0xffff; layout.num_blocks * layout.block_len()];
        let mut case = Case { heads, layout, elements, block_tables, sequences, queries: Vec::new() };
        for (sequence, &tokens) in tokens.iter().enumerate() {
            for (position, kv_head) in (0..tokens).flat_map(|p| (0..heads.num_kv_heads).map(move |h| (p, h))) {
                let key = case.key_start(sequence, position, kv_head);
                for start in [key, key + layout.head_len() / 2] {
                    let numbers = random.floats(heads.head_dim);
                    let bits = numbers.into_iter().map(|x| heads.bits(x));
                    case.elements.splice(start..start + heads.head_dim, bits);
                }
            }
            case.queries.push(random.floats(tokens * heads.width()).iter().map(|x| 2.0 * x).collect());
        }
        case
    }

    fn key_start(&self, sequence: usize, position: usize, kv_head: usize) -> usize {
        let block = self.block_tables[self.sequences[sequence].1.start + position / self.heads.block_tokens] as usize;
        let slot = block * self.heads.block_tokens + position % self.heads.block_tokens;
        self.layout.key_start(slot, LAYER_IDX, kv_head)
    }

    fn layer(&self) -> AttentionLayer {
        let Heads { num_heads, scale, window: sliding_window_tokens, causal, .. } = self.heads;
        AttentionLayer { layer_idx: LAYER_IDX, num_heads, scale, sliding_window_tokens, causal }
    }

    /// Attention of the chunks (sequence, positions), one behind the other: `[rows, width]`.
    fn run(&self, shim: &Shim, chunks: &[(usize, std::ops::Range<usize>)]) -> Result<Vec<f32>> {
        let heads = &self.heads;
        // Rows lie farther apart than they are wide, as those of q beside k and v do.
        let stride = heads.width() + 6;
        let (mut q, mut batch) = (Vec::new(), Vec::new());
        for (sequence, positions) in chunks {
            let first = batch.last().map_or(0, |last: &AttentionSequence| last.rows.end);
            let (rows, blocks) = (first..first + positions.len(), self.sequences[*sequence].1.clone());
            batch.push(AttentionSequence { rows, first_position: positions.start, blocks });
            for position in positions.clone() {
                q.extend_from_slice(&self.queries[*sequence][position * heads.width()..][..heads.width()]);
                q.extend([f32::NAN; 6]);
            }
        }
        q.truncate(q.len() - 6);
        let q: Vec<u8> = q.iter().flat_map(|x| x.to_ne_bytes()).collect();
        let num_rows = batch.last().map_or(0, |last| last.rows.end);
        let plan = AttentionPlan::new(&batch, heads.num_heads, heads.num_kv_heads, heads.head_dim)?;
        let (partials_len, arrivals_len) = plan.scratch_len();
        let (mut partials, mut arrivals) = (vec![f32::NAN; partials_len], vec![0; arrivals_len]);
        let mut out = vec![0xff; num_rows * heads.width() * 4];
        let mut elements = self.elements.clone();
        let device_plan = DevicePlan {
            plan: &plan,
            sequences: slice(&plan.sequences),
            tiles: slice(&plan.tiles),
            block_tables: slice(&self.block_tables),
        };
        paged_attention(
            shim,
            &self.layer(),
            &device_plan,
            &ActivationRows { bytes: slice(&q), activation_type: ActivationType::F32, stride },
            &KvBlocks { elements: slice_mut(&mut elements), layout: self.layout },
            &mut AttentionScratch { partials: slice_mut(&mut partials), arrivals: slice_mut(&mut arrivals) },
            (&mut slice_mut(&mut out), ActivationType::F32),
        )?;
        assert!(arrivals.iter().all(|&count| count == 0), "arrivals are left as they were found");
        Ok(out.as_chunks().0.iter().map(|&bytes| f32::from_ne_bytes(bytes)).collect())
    }

    /// The same in f64, and the mean of the values' magnitudes with the same weights.
    fn exact(&self, chunks: &[(usize, std::ops::Range<usize>)]) -> Vec<(f64, f64)> {
        let Heads { num_heads, num_kv_heads, head_dim, .. } = self.heads;
        let mut out = Vec::new();
        for (sequence, positions) in chunks {
            for (position, head) in positions.clone().flat_map(|p| (0..num_heads).map(move |h| (p, h))) {
                let kv_head = head / (num_heads / num_kv_heads);
                let end = if self.heads.causal { position + 1 } else { positions.end };
                let begin = self.heads.window.map_or(0, |window| (position + 1).saturating_sub(window));
                let q = &self.queries[*sequence][(position * num_heads + head) * head_dim..][..head_dim];
                let score = |key| {
                    let start = self.key_start(*sequence, key, kv_head);
                    let keys = &self.elements[start..start + head_dim];
                    let product = |(&q, &k): (&f32, &u16)| self.heads.value(self.heads.bits(q)) * self.heads.value(k);
                    q.iter().zip(keys).map(product).sum::<f64>() * f64::from(self.heads.scale)
                };
                let scores: Vec<f64> = (begin..end).map(score).collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = scores.iter().map(|score| (score - max).exp()).sum();
                for d in 0..head_dim {
                    let (mut mean, mut magnitude) = (0.0, 0.0);
                    for (key, score) in (begin..end).zip(&scores) {
                        let start = self.key_start(*sequence, key, kv_head) + self.layout.head_len() / 2;
                        let value = self.heads.value(self.elements[start + d]) * (score - max).exp() / sum;
                        (mean, magnitude) = (mean + value, magnitude + value.abs());
                    }
                    out.push((mean, magnitude));
                }
            }
        }
        out
    }

    /// Whether each result is off by less than one rounding of all weights; the worst one otherwise.
    fn compare(&self, got: &[f32], chunks: &[(usize, std::ops::Range<usize>)]) -> std::result::Result<(), String> {
        let rounding = match self.heads.dtype {
            KvDtype::F16 => 1.0 / 2048.0,
            KvDtype::Bf16 => 1.0 / 256.0,
        };
        for (i, (&got, (want, magnitude))) in got.iter().zip(self.exact(chunks)).enumerate() {
            let error = (f64::from(got) - want).abs() / (rounding * magnitude);
            if error.is_nan() || error >= 1.0 {
                return Err(format!("element {i} is {got}, must be {want}: {error} roundings"));
            }
        }
        Ok(())
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Ragged sequences, both kernels at once, all widths and types, windows, chunks behind a prefix, groups beyond a tile:
/// within one rounding of the weights of attention in f64, with the same bits whoever runs when. No slot that is not a
/// sequence's own is seen: those are NaN.
fn attention_is_exact() {
    let check = |heads: Heads, chunks: &[std::ops::Range<usize>]| {
        let tokens: Vec<usize> = chunks.iter().map(|positions| positions.end).collect();
        let case = Case::new(heads, &tokens);
        let chunks: Vec<_> = chunks.iter().cloned().enumerate().collect();
        let what = format!("{} heads of {}, window {:?}", heads.num_heads, heads.head_dim, heads.window);
        let mut first: Option<Vec<f32>> = None;
        for schedule in schedules() {
            let got = case.run(&Shim::new(schedule), &chunks).expect("sizes fit");
            let first = first.get_or_insert_with(|| got.clone());
            assert!(bits(first) == bits(&got), "{what}: {schedule:?} gives other bits");
        }
        case.compare(&first.expect("there are schedules"), &chunks).unwrap_or_else(|worst| panic!("{what}: {worst}"));
    };
    let (f16, bf16) = (KvDtype::F16, KvDtype::Bf16);
    let last = |tokens: usize| tokens - 1..tokens;
    let ends = [1, 16, 17, 64, 65, 256, 257, 600];
    check(Heads::new(4, 2, 64, f16), &ends.map(last));
    check(Heads::new(4, 2, 128, bf16), &[last(78), last(514), 250..255, 0..37]);
    check(Heads { block_tokens: 32, ..Heads::new(6, 2, 80, f16) }, &[last(1), 100..103, 300..322]);
    check(Heads { block_tokens: 64, ..Heads::new(2, 2, 96, bf16) }, &[last(91), 250..268]);
    check(Heads::new(4, 4, 32, f16), &[last(300), 250..268]);
    check(Heads { causal: false, ..Heads::new(3, 3, 32, bf16) }, &[0..70, 0..3]);
    check(Heads::new(2, 1, 256, f16), &[last(91), 255..266]);
    check(Heads::new(20, 1, 64, f16), &[last(71), 258..260]);
    check(Heads { scale: 8.0, ..Heads::new(2, 1, 64, f16) }, &[last(601), 500..520]);
    for window in [1, 100, 300] {
        let heads = Heads { window: Some(window), ..Heads::new(4, 2, 64, f16) };
        check(heads, &[last(1), last(101), last(601), 480..513]);
    }
    check(Heads { causal: false, ..Heads::new(4, 4, 64, f16) }, &[0..70, 0..1, 0..64]);
}

/// A sequence computed whole, in chunks of several sizes and token by token, beside others and alone: every row has the
/// same bits, though its tile, its place in the tile and the kernel differ.
fn chunks_and_kernels_agree() {
    for window in [None, Some(90)] {
        let case = Case::new(Heads { window, ..Heads::new(4, 2, 64, KvDtype::F16) }, &[330, 40]);
        let width = case.heads.width();
        let shim = Shim::new(Schedule::TAME);
        let whole = case.run(&shim, &[(0, 0..330)]).expect("sizes fit");
        let beside = case.run(&shim, &[(1, 3..40), (0, 0..330)]).expect("sizes fit");
        assert!(bits(&beside[37 * width..]) == bits(&whole), "beside another sequence");
        for chunk in [1, 7, 47] {
            let starts = (0..330).step_by(chunk).filter(|start| chunk > 1 || start % 13 == 0 || *start > 250);
            let chunks: Vec<_> = starts.map(|start| (0, start..(start + chunk).min(330))).collect();
            let got = case.run(&shim, &chunks).expect("sizes fit");
            let rows = chunks.iter().flat_map(|(_, positions)| positions.clone());
            for (row, position) in rows.enumerate() {
                let (got, want) = (&got[row * width..][..width], &whole[position * width..][..width]);
                assert!(bits(got) == bits(want), "position {position} in chunks of {chunk}");
            }
        }
    }
}

/// A NaN among the values of one head of a sequence makes that head NaN in every later row, whichever kernel has it, and
/// no bit of another sequence, of another kv head or of a chunk before it differs.
fn a_nan_stays_with_its_sequence() {
    let mut case = Case::new(Heads::new(4, 2, 64, KvDtype::F16), &[300, 290]);
    let width = case.heads.width();
    // Rows 0..100 before it, a decoded row and 40 rows behind it, and the other sequence.
    let chunks = [(0, 0..100), (0, 199..200), (0, 260..300), (1, 280..290)];
    let before = case.run(&Shim::new(Schedule::TAME), &chunks).expect("sizes fit");
    let start = case.key_start(0, 150, 1) + case.layout.head_len() / 2;
    case.elements[start + 5] = f16::NAN.to_bits();
    let after = case.run(&Shim::new(Schedule::TAME), &chunks).expect("sizes fit");
    for (row, (before, after)) in before.chunks_exact(width).zip(after.chunks_exact(width)).enumerate() {
        let behind = (100..141).contains(&row);
        for (column, (before, after)) in before.iter().zip(after).enumerate() {
            // Two query heads share the second kv head.
            let hit = behind && column >= width / 2 && column % 64 == 5;
            assert_eq!(after.is_nan(), hit, "row {row}, column {column}");
            assert!(hit || before.to_bits() == after.to_bits(), "row {row}, column {column}");
        }
    }
}

/// Each planted bug is caught in some schedule by the comparison that the kernels pass without it.
fn planted_bugs_show() {
    let case = Case::new(Heads::new(2, 1, 64, KvDtype::F16), &[600, 300]);
    let decode = [(0, 599..600), (1, 299..300)];
    let prefill = [(0, 560..600), (1, 200..300)];
    let shows = |shim: &dyn Fn(Schedule) -> Shim, chunks: &[(usize, std::ops::Range<usize>)]| {
        schedules().any(|schedule| {
            let got = case.run(&shim(schedule), chunks);
            got.map_or(true, |got| case.compare(&got, chunks).is_err())
        })
    };
    assert!(!shows(&Shim::new, &decode) && !shows(&Shim::new, &prefill));
    for (plant, chunks) in
        [("PLANT_PAGE_OFF_BY_ONE", &decode), ("PLANT_LOOSE_WAIT", &decode), ("PLANT_MISSING_BARRIER", &prefill)]
    {
        assert!(shows(&|schedule| Shim::with_planted(schedule, plant), chunks), "{plant} went unseen");
    }
}

/// Widths, groups, windows and pools that the kernels cannot take are errors that name them.
fn sizes_are_checked() {
    let refused = |num_heads, num_kv_heads, head_dim| {
        AttentionPlan::new(&[], num_heads, num_kv_heads, head_dim).expect_err("refused").to_string()
    };
    assert!(refused(4, 2, 72).contains("head_dim is 72"), "{}", refused(4, 2, 72));
    assert!(refused(5, 2, 64).contains("heads is 5"), "{}", refused(5, 2, 64));
    let wrong = |change: fn(&mut Case)| {
        let mut case = Case::new(Heads::new(4, 2, 64, KvDtype::F16), &[20]);
        change(&mut case);
        case.run(&Shim::new(Schedule::TAME), &[(0, 19..20)]).expect_err("refused").to_string()
    };
    for (error, names) in [
        (wrong(|case| case.heads.window = Some(0)), "sliding_window_tokens is 0"),
        (wrong(|case| (case.heads.window, case.heads.causal) = (Some(5), false)), "sliding_window_tokens is 5"),
        (wrong(|case| case.elements.truncate(100)), "elements of the blocks"),
        (wrong(|case| case.block_tables.truncate(1)), "block tables"),
        // The table goes on behind the sequence's own blocks: in another one's.
        (
            wrong(|case| case.sequences[0].1.end = 1),
            "block_tokens, of as many blocks as each sequence has is 16, must be 20",
        ),
        (wrong(|case| case.sequences[0].1.end = 0), "block_tokens, of as many blocks as each sequence has"),
        (wrong(|case| case.layout.num_kv_heads = 4), "kv heads"),
        (wrong(|case| case.layout.block_tokens = 8), "block_tokens is 8"),
    ] {
        assert!(error.contains(names), "{error}");
    }
}
