//! Norms, rotary embedding, storing of keys and values, embedding rows and the largest logit: each instruction set
//! against a naive f64 form, and exact equality where rows are computed alone or together, by one thread or several.

use std::sync::Arc;

use half::{bf16, f16};
use ns_llm_kernels::cpu::attention::AttentionShape;
use ns_llm_kernels::cpu::embedding::{add_embedding, copy_rows, embed};
use ns_llm_kernels::cpu::kv_blocks::{KvBlocks, KvBlocksLayout, KvDtype};
use ns_llm_kernels::cpu::linear::{MatrixSource, Operand, OperandFormat, PackedLinear, WeightFormat};
use ns_llm_kernels::cpu::logits::max_logit;
use ns_llm_kernels::cpu::norm::{LayerNorm, layer_norm, layer_norm_in_place, rms_norm};
use ns_llm_kernels::cpu::pool::{Pool, PoolPriority};
use ns_llm_kernels::cpu::rope::{HeadNorm, RopeLayer, RopeTable, rope_and_store};
use ns_llm_kernels::cpu::{Cpu, Isa};
use ns_llm_kernels::dtype::DType;

fn cpu(isa: Isa, threads: usize) -> Cpu {
    let pool = Pool::new(threads, PoolPriority::Normal).expect("threads");
    Cpu::with_isa(isa, Arc::new(pool)).expect("available")
}

/// Numbers in `-1.0..1.0` that look random.
fn floats(len: usize, seed: usize) -> Vec<f32> {
    (0..len).map(|i| (((i * 7919 + seed * 104_729) * 2_654_435_761) >> 8 & 0xffff) as f32 / 32768.0 - 1.0).collect()
}

fn operand_rows(operand: &Operand) -> Vec<f32> {
    let mut rows = vec![0.0; operand.rows() * operand.width()];
    for (i, row) in rows.chunks_exact_mut(operand.width()).enumerate() {
        operand.row_into(i, row);
    }
    rows
}

/// Says where the first element is that is off by more than `tolerance` of its size.
fn check(got: &[f32], want: &[f64], tolerance: f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
        let error = (f64::from(got) - want).abs();
        assert!(error <= tolerance * want.abs().max(0.1), "{what}: element {i} is {got}, must be {want}");
    }
}

fn naive_norm(x: &[f32], weight: &[f32], eps: f64) -> Vec<f64> {
    let mean = x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / x.len() as f64;
    x.iter().zip(weight).map(|(&x, &w)| f64::from(x) / (mean + eps).sqrt() * f64::from(w)).collect()
}

/// RMSNorm is the definition at every width around a vector and a segment; rows have the same bits alone, together and
/// on several threads.
#[test]
fn rms_norm_is_the_definition() {
    for isa in Isa::available() {
        for width in [1, 7, 31, 32, 33, 100, 511, 512, 513, 1024] {
            let rows = 40_000 / width + 1;
            let (x, weight) = (floats(rows * width, 1), floats(width, 2));
            let norm = |cpu: &Cpu, x: &[f32]| {
                let mut out = Operand::zeros(OperandFormat::F32, x.len() / width, width);
                rms_norm(cpu, x, &weight, 1e-6, &mut out).expect("sizes fit");
                operand_rows(&out)
            };
            let together = norm(&cpu(isa, 3), &x);
            let alone = cpu(isa, 1);
            for (x, got) in x.chunks_exact(width).zip(together.chunks_exact(width)).step_by(rows / 8 + 1) {
                check(got, &naive_norm(x, &weight, 1e-6), 1e-6, &format!("{isa:?}, width {width}"));
                assert_eq!(got, norm(&alone, x), "{isa:?}, width {width}");
            }
        }
    }
}

/// RMSNorm refuses sizes that do not fit.
#[test]
fn rms_norm_checks_sizes() {
    let cpu = cpu(Isa::Portable, 1);
    let mut out = Operand::zeros(OperandFormat::F32, 2, 8);
    let error = rms_norm(&cpu, &[0.0; 16], &[1.0; 7], 0.0, &mut out).expect_err("width").to_string();
    assert!(error.contains("out width is 8, must be 7"), "{error}");
    let error = rms_norm(&cpu, &[0.0; 15], &[1.0; 8], 0.0, &mut out).expect_err("elements").to_string();
    assert!(error.contains("elements of x is 15, must be 16"), "{error}");
}

fn naive_layer_norm(x: &[f32], norm: &LayerNorm<'_>) -> Vec<f64> {
    let width = x.len() as f64;
    let mean = x.iter().map(|&x| f64::from(x)).sum::<f64>() / width;
    let variance = x.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / width;
    let factor = 1.0 / (variance + f64::from(norm.eps)).sqrt();
    let parameters = norm.weight.iter().zip(norm.bias);
    x.iter()
        .zip(parameters)
        .map(|(&x, (&w, &b))| (f64::from(x) - mean) * factor * f64::from(w) + f64::from(b))
        .collect()
}

/// LayerNorm is the definition at every width around a vector and a segment, also of rows whose mean is far from zero;
/// in place and into an operand it has the same bits, and rows have the same bits alone, together and on several threads.
#[test]
fn layer_norm_is_the_definition() {
    for isa in Isa::available() {
        for (width, offset) in
            [(1, 0.0), (7, 0.0), (31, 3.0), (32, 0.0), (33, 50.0), (100, -7.0), (511, 0.0), (513, 50.0), (1024, 0.0)]
        {
            let rows = 40_000 / width + 1;
            let x: Vec<f32> = floats(rows * width, 1).into_iter().map(|x| x + offset).collect();
            let (weight, bias) = (floats(width, 2), floats(width, 3));
            let norm = LayerNorm { weight: &weight, bias: &bias, eps: 1e-5 };
            let run = |cpu: &Cpu, x: &[f32]| {
                let mut out = Operand::zeros(OperandFormat::F32, x.len() / width, width);
                layer_norm(cpu, x, &norm, &mut out).expect("sizes fit");
                let mut in_place = x.to_vec();
                let mut also = Operand::zeros(OperandFormat::F32, x.len() / width, width);
                layer_norm_in_place(cpu, &mut in_place, &norm, &mut also).expect("sizes fit");
                let out = operand_rows(&out);
                assert!(out == in_place && out == operand_rows(&also), "{isa:?}, width {width}");
                out
            };
            let together = run(&cpu(isa, 3), &x);
            let alone = cpu(isa, 1);
            for (x, got) in x.chunks_exact(width).zip(together.chunks_exact(width)).step_by(rows / 8 + 1) {
                let tolerance = 5e-6 * f64::from(offset.abs().max(1.0));
                check(got, &naive_layer_norm(x, &norm), tolerance, &format!("{isa:?}, width {width}"));
                assert_eq!(got, run(&alone, x), "{isa:?}, width {width}");
            }
        }
    }
}

/// LayerNorm refuses sizes that do not fit, by name.
#[test]
fn layer_norm_checks_sizes() {
    let cpu = cpu(Isa::Portable, 1);
    let refused = |weight: usize, bias: usize, elements: usize, name: &str| {
        let (weight, bias) = (vec![1.0; weight], vec![0.0; bias]);
        let norm = LayerNorm { weight: &weight, bias: &bias, eps: 0.0 };
        let mut out = Operand::zeros(OperandFormat::F32, 2, 8);
        let error = layer_norm(&cpu, &vec![0.0; elements], &norm, &mut out).expect_err(name).to_string();
        assert!(error.contains(name), "{error} does not name {name}");
        let error = layer_norm_in_place(&cpu, &mut vec![0.0; elements], &norm, &mut out).expect_err(name).to_string();
        assert!(error.contains(name), "{error} does not name {name}");
    };
    refused(8, 7, 16, "bias is 7, must be 8");
    refused(7, 7, 16, "out width is 8, must be 7");
    refused(8, 8, 15, "elements of x is 15, must be 16");
}

/// What [`rope_and_store`] is given, and its results.
struct RopeCase {
    shape: AttentionShape,
    rotary_dim: usize,
    tokens: usize,
    dtype: KvDtype,
    /// `[tokens, (heads + 2 kv_heads) * head_dim]`
    qkv: Vec<f32>,
    /// `[positions, rotary_dim / 2]`
    angles: Vec<f32>,
}

impl RopeCase {
    const EPS: f32 = 1e-5;
    const POSITIONS: usize = 1000;

    fn position(token: usize) -> usize {
        (token * 37 + 11) % Self::POSITIONS
    }
    /// Slots in no order, some blocks half full.
    fn slot(&self, token: usize) -> usize {
        (token * 5 + 3) % (2 * self.tokens).next_multiple_of(32)
    }

    /// q, k and v rows as they lie in `qkv`, and the pool, after the operation.
    fn run(&self, cpu: &Cpu) -> (Vec<f32>, KvBlocks) {
        let (head_dim, num_kv_heads) = (self.shape.head_dim, self.shape.num_kv_heads);
        let num_blocks = (2 * self.tokens).div_ceil(32);
        let (block_tokens, dtype) = (32, self.dtype);
        let layout = KvBlocksLayout { num_layers: 3, num_blocks, block_tokens, num_kv_heads, head_dim, dtype };
        let mut kv = KvBlocks::new(layout).expect("small");
        let (cos, sin): (Vec<f32>, Vec<f32>) = self.angles.iter().map(|a| (a.cos(), a.sin())).unzip();
        let (q_weight, k_weight) = (floats(head_dim, 5), floats(head_dim, 6));
        let q_norm = HeadNorm { weight: &q_weight, eps: Self::EPS };
        let qk_norm = Some((q_norm, HeadNorm { weight: &k_weight, ..q_norm }));
        let rope = RopeTable { rotary_dim: self.rotary_dim, cos: &cos, sin: &sin };
        let layer = RopeLayer { layer_idx: 1, shape: self.shape, qk_norm, rope };
        let positions: Vec<u32> = (0..self.tokens).map(|token| Self::position(token) as u32).collect();
        let slots: Vec<u32> = (0..self.tokens).map(|token| self.slot(token) as u32).collect();
        let mut qkv = self.qkv.clone();
        rope_and_store(cpu, &mut qkv, &layer, &positions, &slots, &mut kv).expect("sizes fit");
        (qkv, kv)
    }

    /// Head `head` of token `token` after norm and rotation, in f64.
    fn naive_head(&self, token: usize, head: usize) -> Vec<f64> {
        let AttentionShape { num_heads, num_kv_heads, head_dim, .. } = self.shape;
        let x = &self.qkv[(token * (num_heads + 2 * num_kv_heads) + head) * head_dim..][..head_dim];
        if head >= num_heads + num_kv_heads {
            return x.iter().map(|&x| f64::from(x)).collect();
        }
        let weight = floats(head_dim, if head < num_heads { 5 } else { 6 });
        let mut x = naive_norm(x, &weight, f64::from(Self::EPS));
        let half = self.rotary_dim / 2;
        for i in 0..half {
            let angle = f64::from(self.angles[Self::position(token) * half + i]);
            let (a, b) = (x[i], x[i + half]);
            (x[i], x[i + half]) = (a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin());
        }
        x
    }
}

/// A stored element of the pool, by its place in the documented layout.
fn stored(kv: &KvBlocks, slot: usize, kv_head: usize, is_key: bool, d: usize) -> f64 {
    let layout = kv.layout();
    let keys = layout.head_dim * layout.block_tokens;
    let values = layout.block_tokens * layout.value_stride();
    let scales = if layout.dtype == KvDtype::Int8 { 8 * layout.block_tokens } else { 0 };
    let head = (layout.num_kv_heads + kv_head) * (keys + values + scales);
    let (block, token) = (slot / layout.block_tokens, slot % layout.block_tokens);
    let element =
        head + if is_key { d * layout.block_tokens + token } else { keys + token * layout.value_stride() + d };
    let bytes = kv.block(block as u32);
    let float = |start: usize| f64::from(f32::from_le_bytes(bytes[start..][..4].try_into().expect("four bytes")));
    let half_bits = || [bytes[2 * element], bytes[2 * element + 1]];
    match layout.dtype {
        KvDtype::F32 => float(4 * element),
        KvDtype::F16 => f16::from_le_bytes(half_bits()).to_f64(),
        KvDtype::Bf16 => bf16::from_le_bytes(half_bits()).to_f64(),
        KvDtype::Int8 => {
            let scale = head + keys + values + 4 * (token + if is_key { 0 } else { layout.block_tokens });
            f64::from(bytes[element] as i8) * float(scale)
        }
    }
}

/// Elements and scales of the pool that are not zero.
fn count_written(kv: &KvBlocks) -> (usize, usize) {
    let layout = kv.layout();
    let size = layout.dtype.size_bytes();
    let elements_bytes = layout.block_tokens * (layout.head_dim + layout.value_stride()) * size;
    let head_bytes = layout.block_bytes() / (layout.num_layers * layout.num_kv_heads);
    // The sign of a zero is no number; an integer has none.
    let sign = if layout.dtype == KvDtype::Int8 { 0xff } else { 0x7f };
    let is_written = |bytes: &&[u8]| {
        let (last, others) = bytes.split_last().expect("a byte at least");
        others.iter().any(|&byte| byte != 0) || last & sign != 0
    };
    let (mut num_elements, mut num_scales) = (0, 0);
    for block in 0..layout.num_blocks as u32 {
        for head in kv.block(block).chunks_exact(head_bytes) {
            let (elements, scales) = head.split_at(elements_bytes);
            num_elements += elements.chunks_exact(size).filter(is_written).count();
            num_scales += scales.chunks_exact(4).filter(is_written).count();
        }
    }
    (num_elements, num_scales)
}

/// q comes back normalised and rotated; k and v lie in their slots of the right layer, rounded as their type asks; every
/// other byte of the pool is as it was. Over partial rotation, odd widths, and sizes below and above the pool's threshold,
/// where several threads give the same bits.
#[test]
fn rope_and_store_is_the_definition() {
    let cases = [(4, 2, 32, 32, 5), (3, 1, 20, 8, 9), (2, 2, 64, 0, 3), (16, 8, 128, 128, 20), (5, 5, 100, 50, 40)];
    for (isa, (i, (num_heads, num_kv_heads, head_dim, rotary_dim, tokens))) in
        Isa::available().into_iter().flat_map(|isa| cases.into_iter().enumerate().map(move |case| (isa, case)))
    {
        let shape =
            AttentionShape { num_heads, num_kv_heads, head_dim, scale: 1.0, sliding_window_tokens: None, causal: true };
        let dtype = [KvDtype::F16, KvDtype::F32, KvDtype::Bf16, KvDtype::Int8][i % 4];
        let qkv = floats(tokens * (num_heads + 2 * num_kv_heads) * head_dim, 3);
        let angles = floats(RopeCase::POSITIONS * rotary_dim / 2, 4).into_iter().map(|x| 3.0 * x).collect();
        let case = RopeCase { shape, rotary_dim, tokens, dtype, qkv, angles };
        let (qkv, kv) = case.run(&cpu(isa, 1));
        let (on_threads, kv_on_threads) = case.run(&cpu(isa, 4));
        assert_eq!(qkv, on_threads, "{isa:?} {shape:?}");
        let mut expected_nonzero = 0;
        for block in 0..kv.layout().num_blocks as u32 {
            assert!(kv.block(block) == kv_on_threads.block(block), "{isa:?} {shape:?}, block {block}");
        }
        for token in 0..tokens {
            for head in 0..num_heads + 2 * num_kv_heads {
                let want = case.naive_head(token, head);
                let what = format!("{isa:?} {shape:?} {dtype:?}, token {token}, head {head}");
                if head < num_heads {
                    let row = token * (num_heads + 2 * num_kv_heads) + head;
                    check(&qkv[row * head_dim..][..head_dim], &want, 2e-6, &what);
                    continue;
                }
                let (is_key, kv_head) = (head < num_heads + num_kv_heads, (head - num_heads) % num_kv_heads);
                let got: Vec<f64> = (0..head_dim).map(|d| stored(&kv, case.slot(token), kv_head, is_key, d)).collect();
                expected_nonzero += got.iter().filter(|&&x| x != 0.0).count();
                let got: Vec<f32> = got.into_iter().map(|x| x as f32).collect();
                let tolerance = match dtype {
                    KvDtype::F32 => 2e-6,
                    KvDtype::F16 => 6e-4,
                    KvDtype::Bf16 => 5e-3,
                    KvDtype::Int8 => {
                        let step = want.iter().fold(0.0_f64, |max, x| max.max(x.abs())) / 127.0;
                        let is_near = |(got, want): (&f32, &f64)| (f64::from(*got) - want).abs() <= 0.501 * step;
                        assert!(got.iter().zip(&want).all(is_near), "{what}: {got:?}, must be {want:?}");
                        continue;
                    }
                };
                check(&got, &want, tolerance, &what);
            }
        }
        let (num_elements, num_scales) = count_written(&kv);
        assert_eq!(num_elements, expected_nonzero, "{isa:?} {shape:?}: wrote beside its slots");
        let scales = if dtype == KvDtype::Int8 { 2 * tokens * num_kv_heads } else { 0 };
        assert_eq!(num_scales, scales, "{isa:?} {shape:?}: wrote scales beside its slots");
    }
}

/// Positions, slots and tables that do not fit are refused by name.
#[test]
fn rope_and_store_checks_sizes() {
    let shape = AttentionShape {
        num_heads: 2,
        num_kv_heads: 1,
        head_dim: 8,
        scale: 1.0,
        sliding_window_tokens: None,
        causal: true,
    };
    let layout = KvBlocksLayout {
        num_layers: 1,
        num_blocks: 2,
        block_tokens: 16,
        num_kv_heads: 1,
        head_dim: 8,
        dtype: KvDtype::F32,
    };
    let mut kv = KvBlocks::new(layout).expect("small");
    let angles = [0.0; 12];
    let mut refused = |rotary_dim: usize, cos: usize, positions: &[u32], slots: &[u32], norm: usize, name: &str| {
        let weight = vec![1.0; norm];
        let norm = HeadNorm { weight: &weight, eps: 0.0 };
        let rope = RopeTable { rotary_dim, cos: &angles[..cos], sin: &angles };
        let layer = RopeLayer { layer_idx: 0, shape, qk_norm: Some((norm, norm)), rope };
        let error = rope_and_store(&cpu(Isa::Portable, 1), &mut [0.0; 64], &layer, positions, slots, &mut kv);
        let error = error.expect_err(name).to_string();
        assert!(error.contains(name), "{error} does not name {name}");
    };
    refused(8, 12, &[0, 3], &[0, 1], 8, "position 3 is not below 3");
    refused(8, 12, &[0, 1], &[0, 32], 8, "slot 32 is not below 32");
    refused(8, 12, &[0, 1], &[0], 8, "slots is 1, must be 2");
    refused(8, 12, &[0], &[0], 8, "qkv is 64, must be 32");
    refused(8, 11, &[0, 1], &[0, 1], 8, "cos is 11, must be 12");
    refused(7, 12, &[0, 1], &[0, 1], 8, "rotary_dim is 7");
    refused(10, 12, &[0, 1], &[0, 1], 8, "rotary_dim is 10");
    refused(8, 12, &[0, 1], &[0, 1], 7, "q_norm is 7, must be 8");
}

/// Embedding rows are the rows of the matrix, in each form, copied or added; an index behind the end is an error. Rows of
/// an operand are copied exactly.
#[test]
fn rows_are_copied() {
    let (vocab, width) = (100, 48);
    let values: Vec<f32> = (0..vocab * width).map(|i| (i % 251) as f32 - 125.0).collect();
    let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    let cpu = cpu(Isa::Portable, 2);
    let source = MatrixSource {
        bytes: &bytes,
        encoding: DType::F32.into(),
        out_features: vocab,
        in_features: width,
        bias: None,
    };
    for format in [WeightFormat::F32, WeightFormat::F16, WeightFormat::Bf16] {
        let matrix = PackedLinear::pack(&cpu, &[(source, format)]).expect("packs");
        for tokens in [1, 3, 1000] {
            let token_ids: Vec<u32> = (0..tokens).map(|i| (i * 67 + 5) % vocab as u32).collect();
            let mut out = vec![0.0; token_ids.len() * width];
            embed(&cpu, &matrix, &token_ids, &mut out).expect("in range");
            for (id, row) in token_ids.iter().zip(out.chunks_exact(width)) {
                assert_eq!(row, &values[*id as usize * width..][..width], "{format:?}, token {id}");
            }
            add_embedding(&cpu, &matrix, &token_ids, &mut out).expect("in range");
            for (id, row) in token_ids.iter().zip(out.chunks_exact(width)) {
                let twice: Vec<f32> = values[*id as usize * width..][..width].iter().map(|x| 2.0 * x).collect();
                assert_eq!(row, twice, "{format:?}, token {id}");
            }
        }
        let error = embed(&cpu, &matrix, &[100], &mut vec![0.0; width]).expect_err("range").to_string();
        assert!(error.contains("token id 100 is not below 100"), "{error}");
        let error = add_embedding(&cpu, &matrix, &[7, 100], &mut vec![0.0; 2 * width]).expect_err("range").to_string();
        assert!(error.contains("row 100 is not below 100"), "{error}");
        let error = add_embedding(&cpu, &matrix, &[7], &mut vec![0.0; 2 * width]).expect_err("size").to_string();
        assert!(error.contains("elements of out is 96, must be 48"), "{error}");
    }
    for format in [OperandFormat::F32, OperandFormat::Bf16] {
        let all = Operand::from_f32(format, vocab, width, &values);
        let mut some = Operand::zeros(format, 7, width);
        copy_rows(&all, 93, &mut some).expect("in range");
        assert_eq!(operand_rows(&some), values[93 * width..]);
        assert!(copy_rows(&all, 94, &mut some).is_err());
    }
}

/// The first of the largest logits is found at every length and place; NaN and +inf are reported, -inf is not.
#[test]
fn largest_logit_is_found() {
    for isa in Isa::available() {
        let cpu = cpu(isa, 1);
        for len in [1, 7, 8, 9, 31, 32, 33, 63, 64, 65, 1000] {
            for at in [0, len / 3, len / 2, len - 1] {
                let mut logits = vec![-5.5; len];
                logits[at..].iter_mut().step_by(11).for_each(|x| *x = -1.25);
                let max = max_logit(&cpu, &logits);
                assert_eq!((max.value, max.index, max.all_below_infinity), (-1.25, at, true), "{isa:?} {len} {at}");
                for (special, is_fine) in [(f32::NAN, false), (f32::INFINITY, false), (f32::NEG_INFINITY, true)] {
                    logits[at] = special;
                    assert_eq!(max_logit(&cpu, &logits).all_below_infinity, is_fine, "{isa:?} {len} {special} at {at}");
                }
            }
        }
    }
}
