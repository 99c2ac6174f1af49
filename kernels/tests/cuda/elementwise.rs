//! `embedding.cu`, `activation.cu` and `rope.cu` against the portable operations of `cpu::`.

use half::{bf16, f16};
use ns_llm_kernels::cpu;
use ns_llm_kernels::cuda::activation::{gelu, gelu_rows, round_rows, swiglu, swiglu_rows};
use ns_llm_kernels::cuda::embedding::{Table, add_embedding, add_rows, embed, feed_back, select_rows};
use ns_llm_kernels::cuda::kv_blocks::{KvBlocks, KvDtype, KvLayout};
use ns_llm_kernels::cuda::launch::Stream;
use ns_llm_kernels::cuda::norm::RmsNorm;
use ns_llm_kernels::cuda::product::Gelu;
use ns_llm_kernels::cuda::rope::{RopeLayer, RopeTable, rope_and_store};
use ns_llm_kernels::error::Result;

use crate::Test;
use crate::check::{F32, Random, check, widened};
use crate::scalar::{self, Weights};
use crate::shim::{Schedule, Shim, schedules, slice, slice_mut};

/// The tests of this file.
pub(crate) const TESTS: &[Test] = &[
    ("rows are taken by their index", rows_are_taken),
    ("tokens are fed back where a row says so", tokens_are_fed_back),
    ("activations have the bits of the scalar ones", activations_have_the_scalar_bits),
    ("heads are normed and rotated as by the scalar code", heads_are_the_scalar_ones),
    ("keys and values lie in their slots and nowhere else", keys_and_values_are_stored),
    ("elementwise operations refuse sizes that do not fit", sizes_are_checked),
];

/// Tests of the tests: kernels with a bug.
pub(crate) const PLANTED: &[Test] = &[("a key one slot off shows", an_offset_slot_shows)];

/// Written, added and selected rows are those of the table, also where an index repeats; an index without a row makes its own
/// row NaN and no other.
fn rows_are_taken() {
    let mut random = Random(7);
    for width in [8, 264, 4104] {
        let (table, before) = (random.bf16s(5 * width), random.floats(4 * width));
        let indices = [4, 0, 4, 5];
        let row = |i: usize| table[i * width..(i + 1) * width].iter().map(|x| x.to_f32());
        let want: Vec<f32> = [4, 0, 4].into_iter().flat_map(row).collect();
        let wide = widened(&table);
        for schedule in schedules() {
            let shim = Shim::new(schedule);
            let (taken, added) = (Table { rows: slice(&table), width }, Table { rows: slice(&wide), width });
            let mut out = vec![-1.0; 4 * width];
            embed(&shim, &taken, slice(&indices), &mut slice_mut(&mut out)).expect("sizes fit");
            assert_eq!(out[..3 * width], want);
            assert!(out[3 * width..].iter().all(|x| x.is_nan()));

            let mut out = vec![-1.0; 3 * width];
            select_rows(&shim, &added, slice(&indices[..3]), &mut slice_mut(&mut out)).expect("sizes fit");
            assert_eq!(out, want);

            let mut out = before.clone();
            add_embedding(&shim, &taken, slice(&indices), &mut slice_mut(&mut out)).expect("sizes fit");
            let sums = before.iter().zip(&want).map(|(before, want)| before + want);
            assert!(out.iter().zip(sums).all(|(out, sum)| *out == sum));
            assert!(out[3 * width..].iter().all(|x| x.is_nan()));

            let mut sums = before[..3 * width].to_vec();
            add_rows(&shim, slice(&want), &mut slice_mut(&mut sums)).expect("sizes fit");
            assert_eq!(sums, out[..3 * width], "rows that were made first");
        }
    }
}

/// Each row gets the token of the row that it names, and keeps its own where no row has that number; in one block of
/// threads and in two.
fn tokens_are_fed_back() {
    for num_tokens in [1, 31, 257] {
        let given: Vec<u32> = (0..num_tokens).map(|i| 1000 + i).collect();
        let chosen = [7, u32::MAX, 9];
        let sources: Vec<u32> = (0..num_tokens).map(|i| [u32::MAX, 2, 0, 3, 1][i as usize % 5]).collect();
        let want = |i: usize| chosen.get(sources[i] as usize).copied().unwrap_or(given[i]);
        for schedule in schedules() {
            let (shim, mut got) = (Shim::new(schedule), vec![1; num_tokens as usize]);
            feed_back(&shim, slice(&given), slice(&sources), slice(&chosen), &mut slice_mut(&mut got))
                .expect("sizes fit");
            assert!(got.iter().enumerate().all(|(i, &id)| id == want(i)), "{num_tokens} tokens: {got:?}");
        }
    }
}

/// SwiGLU and both forms of GELU give the bits of the scalar code, rounded once: small, large and special numbers.
fn activations_have_the_scalar_bits() {
    let (width, rows) = (24, 9);
    let mut x: Vec<f32> = Random(8).floats(rows * 2 * width);
    for (i, x) in x.iter_mut().enumerate() {
        *x *= [1.0, 12.0, 1e-6, 90.0][i % 4];
    }
    x[..8].copy_from_slice(&[0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 1e38, -1e38, 1e-44]);
    let bits = |want: &[f32]| want.iter().map(|&want| bf16::from_f32(want)).collect::<Vec<_>>();
    let same = |got: &[bf16], want: &[bf16], what: &str| {
        for (i, (got, want)) in got.iter().zip(want).enumerate() {
            assert!(got == want || got.is_nan() && want.is_nan(), "{what}: element {i} is {got}, must be {want}");
        }
    };
    let shim = Shim::new(Schedule::TAME);
    for form in [Gelu::Erf, Gelu::Tanh] {
        let mut out = vec![bf16::NAN; x.len()];
        gelu(&shim, form, slice(&x), &mut slice_mut(&mut out)).expect("sizes fit");
        // One by one, so that what is not finite meets no zero of the selection.
        let one = Weights::selection(0, 1, 1);
        same(&out, &bits(&scalar::product_gelu(&x, &one, form)), &format!("{form:?}"));
        let (mut unrounded, mut rounded) = (vec![f32::NAN; x.len()], vec![bf16::NAN; x.len()]);
        gelu_rows(&shim, form, slice(&x), &mut slice_mut(&mut unrounded)).expect("sizes fit");
        round_rows(&shim, slice(&unrounded), &mut slice_mut(&mut rounded)).expect("sizes fit");
        same(&rounded, &out, "GELU in two passes");
        assert!(unrounded.iter().zip(&rounded).any(|(x, rounded)| *x != rounded.to_f32()), "nothing was rounded");
    }
    let finite: Vec<f32> = x.iter().map(|x| if x.is_finite() { *x } else { 3.0 }).collect();
    let mut out = vec![bf16::NAN; rows * width];
    swiglu(&shim, slice(&finite), width, &mut slice_mut(&mut out)).expect("sizes fit");
    let [gate, up] = [0, width].map(|first| Weights::selection(first, width, 2 * width));
    same(&out, &bits(&scalar::product_swiglu(&finite, &gate, &up)), "swiglu");
    let (mut unrounded, mut rounded) = (vec![f32::NAN; rows * width], vec![bf16::NAN; rows * width]);
    swiglu_rows(&shim, slice(&finite), width, &mut slice_mut(&mut unrounded)).expect("sizes fit");
    round_rows(&shim, slice(&unrounded), &mut slice_mut(&mut rounded)).expect("sizes fit");
    assert_eq!(rounded, out, "swiglu in two passes");
    assert!(unrounded.iter().zip(&rounded).any(|(x, rounded)| *x != rounded.to_f32()), "nothing was rounded");
}

/// A layer and a batch for [`rope_and_store`].
struct Heads {
    num_heads: usize,
    layout: KvLayout,
    rotary_dim: usize,
    norms: Option<[Vec<f32>; 2]>,
    cosines: Vec<f32>,
    sines: Vec<f32>,
    positions: Vec<u32>,
    slots: Vec<u32>,
    qkv: Vec<f32>,
}

const EPS: f32 = 1e-6;
const LAYER_IDX: usize = 1;

impl Heads {
    /// `num_heads` over two kv heads; tokens at positions that jump, in slots all over four blocks.
    fn new(num_heads: usize, head_dim: usize, rotary_dim: usize, has_norms: bool, dtype: KvDtype) -> Heads {
        let (mut random, half, tokens) = (Random(9), rotary_dim / 2, 6);
        let layout = KvLayout { num_layers: 3, num_blocks: 4, block_tokens: 16, num_kv_heads: 2, head_dim, dtype };
        let angles: Vec<f32> = random.floats(40 * half);
        Heads {
            num_heads,
            layout,
            rotary_dim,
            norms: has_norms.then(|| [random.floats(head_dim), random.floats(head_dim)]),
            cosines: angles.iter().map(|x| x.cos()).collect(),
            sines: angles.iter().map(|x| x.sin()).collect(),
            positions: vec![0, 39, 7, 8, 9, 1],
            slots: vec![0, 63, 15, 16, 31, 40],
            qkv: random.floats(tokens * (num_heads + 4) * head_dim),
        }
    }

    /// What the kernel makes of qkv and of blocks that held 0x5555 everywhere.
    fn run(&self, stream: &impl Stream) -> (Vec<f32>, Vec<u16>) {
        self.try_run(stream).expect("sizes fit")
    }

    fn try_run(&self, stream: &impl Stream) -> Result<(Vec<f32>, Vec<u16>)> {
        let mut qkv = self.qkv.clone();
        let mut elements = vec![0x5555; self.layout.num_blocks * self.layout.block_len()];
        let norms = self.norms.as_ref().map(|[q, k]| [q, k].map(|weight| RmsNorm { weight: slice(weight), eps: EPS }));
        let layer = RopeLayer {
            layer_idx: LAYER_IDX,
            num_heads: self.num_heads,
            qk_norm: norms.map(|[q, k]| (q, k)),
            rope: RopeTable { rotary_dim: self.rotary_dim, cosines: slice(&self.cosines), sines: slice(&self.sines) },
        };
        let mut kv = KvBlocks { elements: slice_mut(&mut elements), layout: self.layout };
        let (positions, slots) = (slice(&self.positions), slice(&self.slots));
        rope_and_store(stream, &mut slice_mut(&mut qkv), &layer, positions, slots, &mut kv)?;
        Ok((qkv, elements))
    }

    /// What the scalar code makes of qkv.
    fn scalar_qkv(&self) -> Vec<f32> {
        let (cpu, layout) = (scalar::cpu(), self.layout);
        let mut kv = cpu::kv_blocks::KvBlocks::new(cpu::kv_blocks::KvBlocksLayout {
            num_layers: layout.num_layers,
            num_blocks: layout.num_blocks,
            block_tokens: layout.block_tokens,
            num_kv_heads: layout.num_kv_heads,
            head_dim: layout.head_dim,
            dtype: cpu::kv_blocks::KvDtype::F32,
        });
        let kv = kv.as_mut().expect("small");
        let norms = self.norms.as_ref().map(|[q, k]| [q, k].map(|weight| cpu::rope::HeadNorm { weight, eps: EPS }));
        let layer = cpu::rope::RopeLayer {
            layer_idx: LAYER_IDX,
            shape: cpu::attention::AttentionShape {
                num_heads: self.num_heads,
                num_kv_heads: layout.num_kv_heads,
                head_dim: layout.head_dim,
                scale: 1.0,
                sliding_window_tokens: None,
                causal: true,
            },
            qk_norm: norms.map(|[q, k]| (q, k)),
            rope: cpu::rope::RopeTable { rotary_dim: self.rotary_dim, cos: &self.cosines, sin: &self.sines },
        };
        let mut qkv = self.qkv.clone();
        cpu::rope::rope_and_store(&cpu, &mut qkv, &layer, &self.positions, &self.slots, kv).expect("sizes fit");
        qkv
    }

    /// Blocks that hold what `qkv` has of k and v, in the batch's slots, and 0x5555 elsewhere.
    fn blocks_of(&self, qkv: &[f32]) -> Vec<u16> {
        let KvLayout { head_dim, num_kv_heads, dtype, .. } = self.layout;
        let mut elements = vec![0x5555; self.layout.num_blocks * self.layout.block_len()];
        let rows = qkv.chunks_exact((self.num_heads + 2 * num_kv_heads) * head_dim);
        for (row, &slot) in rows.zip(&self.slots) {
            for kv_head in 0..num_kv_heads {
                let key_start = self.layout.key_start(slot as usize, LAYER_IDX, kv_head);
                let value_start = key_start + self.layout.head_len() / 2;
                for (start, head) in [(key_start, kv_head), (value_start, num_kv_heads + kv_head)] {
                    let x = &row[(self.num_heads + head) * head_dim..][..head_dim];
                    for (element, &x) in elements[start..start + head_dim].iter_mut().zip(x) {
                        *element = match dtype {
                            KvDtype::F16 => f16::from_f32(x).to_bits(),
                            KvDtype::Bf16 => bf16::from_f32(x).to_bits(),
                        };
                    }
                }
            }
        }
        elements
    }
}

/// With and without norms, with whole, partial and no rotation, odd numbers of heads and of dimensions.
fn all_heads() -> Vec<Heads> {
    use KvDtype::{Bf16, F16};
    vec![
        Heads::new(2, 64, 64, true, F16),
        Heads::new(6, 128, 128, true, Bf16),
        Heads::new(10, 20, 12, false, F16),
        Heads::new(2, 80, 0, false, Bf16),
        Heads::new(14, 256, 256, true, F16),
    ]
}

fn heads_are_the_scalar_ones() {
    for heads in all_heads() {
        let want = heads.scalar_qkv();
        for schedule in schedules() {
            let what = format!("{} heads of {}, {schedule:?}", heads.num_heads, heads.layout.head_dim);
            check(&heads.run(&Shim::new(schedule)).0, &want, F32, &what);
        }
    }
}

/// Slots hold the nearest 16-bit numbers of what stands in qkv; every other element is as it was.
fn keys_and_values_are_stored() {
    for heads in all_heads() {
        for schedule in schedules() {
            let (qkv, elements) = heads.run(&Shim::new(schedule));
            assert!(elements == heads.blocks_of(&qkv), "{} heads of {}", heads.num_heads, heads.layout.head_dim);
        }
    }
    // A slot that no block has is left out; the others are stored.
    let mut heads = Heads::new(2, 64, 64, true, KvDtype::F16);
    heads.slots[2] = 64;
    let (qkv, elements) = heads.run(&Shim::new(Schedule::TAME));
    heads.slots.remove(2);
    let row = heads.qkv.len() / 6;
    assert!(elements == heads.blocks_of(&[&qkv[..2 * row], &qkv[3 * row..]].concat()));
}

/// A kernel whose arguments are a struct gives through `mirrored` what it gives without.
pub(crate) fn check_mirrored(mirrored: &impl Stream) {
    for heads in all_heads() {
        let (qkv, elements) = heads.run(mirrored);
        let (want_qkv, want_elements) = heads.run(&Shim::new(Schedule::TAME));
        assert!(qkv == want_qkv && elements == want_elements, "{} heads of {}", heads.num_heads, heads.layout.head_dim);
    }
}

/// A kernel that stores one slot further on writes other elements.
fn an_offset_slot_shows() {
    let heads = Heads::new(2, 64, 64, true, KvDtype::F16);
    let (qkv, elements) = heads.run(&Shim::with_planted(Schedule::TAME, "PLANT_PAGE_OFF_BY_ONE"));
    assert!(elements != heads.blocks_of(&qkv), "a key one slot off went unseen");
}

/// Each size that does not fit is refused by name.
fn sizes_are_checked() {
    let shim = Shim::new(Schedule::TAME);
    let embedded = |table: usize, width, out: usize| {
        let (table, mut out) = (vec![bf16::ZERO; table], vec![0.0; out]);
        let table = Table { rows: slice(&table), width };
        embed(&shim, &table, slice(&[0]), &mut slice_mut(&mut out)).expect_err("refused").to_string()
    };
    assert_eq!(embedded(12, 12, 12), "embed: width is 12, must be a positive multiple of 8");
    assert_eq!(embedded(7, 8, 8), "embed: rows of the table is 0, must be at least 1");
    assert_eq!(embedded(12, 8, 8), "embed: elements of the table is 12, must be 8");
    assert_eq!(embedded(16, 8, 16), "embed: elements of out is 16, must be 8");

    let mut out = vec![bf16::ZERO; 16];
    let error = swiglu(&shim, slice(&[0.0; 16]), 8, &mut slice_mut(&mut out)).expect_err("two rows").to_string();
    assert_eq!(error, "swiglu: elements of gate and up is 16, must be 32");
    let error = gelu(&shim, Gelu::Erf, slice(&[0.0; 8]), &mut slice_mut(&mut out)).expect_err("16").to_string();
    assert_eq!(error, "gelu: elements of out is 16, must be 8");

    let refused = |change: fn(&mut Heads)| {
        let mut heads = Heads::new(2, 64, 64, true, KvDtype::F16);
        change(&mut heads);
        heads.try_run(&shim).expect_err("refused").to_string()
    };
    assert_eq!(refused(|heads| heads.slots.truncate(5)), "rope_and_store: slots is 5, must be 6");
    assert_eq!(refused(|heads| heads.qkv.truncate(5)), "rope_and_store: qkv is 5, must be 2304");
    assert_eq!(refused(|heads| heads.rotary_dim = 63), "rope_and_store: rotary_dim is 63, must be 62");
    assert_eq!(refused(|heads| heads.rotary_dim = 66), "rope_and_store: rotary_dim is 66, must be 64");
    assert_eq!(refused(|heads| heads.cosines.truncate(40)), "rope_and_store: cosines is 40, must be 1280");
    let error = refused(|heads| heads.layout.block_tokens = 24);
    assert_eq!(error, "rope_and_store: block_tokens is 24, must be a power of two, at least 16");
}
