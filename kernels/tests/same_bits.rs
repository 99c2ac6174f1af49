//! AVX2 and NEON multiply, add and round in one order: the digests of each operation's results are the same, and written
//! down here, because no machine has both. (Another digest means other bits: stored keys and values are keyed by the
//! instruction set's name, which must change with it.)

use std::sync::Arc;

use ns_llm_kernels::cpu::attention::{AttentionBatch, AttentionSequence, AttentionShape, paged_attention};
use ns_llm_kernels::cpu::kv_blocks::{KvBlocks, KvBlocksLayout, KvDtype};
use ns_llm_kernels::cpu::linear::{
    Gelu, MatrixSource, Operand, OperandFormat, PackedLinear, matmul, matmul_gelu, matmul_swiglu,
};
use ns_llm_kernels::cpu::norm::{LayerNorm, layer_norm, rms_norm};
use ns_llm_kernels::cpu::pool::{Pool, PoolPriority};
use ns_llm_kernels::cpu::rope::{HeadNorm, RopeLayer, RopeTable, rope_and_store};
use ns_llm_kernels::cpu::{Cpu, Isa};
use ns_llm_kernels::dtype::DType;
use sha2::{Digest, Sha256};

/// Instruction sets that have these digests.
const ISAS: [&str; 4] = ["avx2", "neon", "neondotprod", "neoni8mm"];

/// Numbers in `-1.0..1.0` that look random.
fn floats(len: usize, seed: usize) -> Vec<f32> {
    (0..len as u64)
        .map(|i| {
            let mixed = (i * 7919 + seed as u64 * 104_729).wrapping_mul(2_654_435_761);
            (mixed >> 8 & 0xffff) as f32 / 32768.0 - 1.0
        })
        .collect()
}

/// The first eight digits of the digest of the bits.
fn digest(values: &[f32]) -> String {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_bits().to_le_bytes()).collect();
    Sha256::digest(bytes)[..4].iter().map(|byte| format!("{byte:02x}")).collect()
}

fn rows_of(operand: &Operand) -> Vec<f32> {
    let mut rows = vec![0.0; operand.rows() * operand.width()];
    for (i, row) in rows.chunks_exact_mut(operand.width()).enumerate() {
        operand.row_into(i, row);
    }
    rows
}

/// Calls `run` for each instruction set that this machine has, and compares what it gives.
fn check(expected: &[&str], run: impl Fn(&Cpu) -> Vec<String>) {
    for isa in Isa::available().into_iter().filter(|isa| ISAS.contains(&isa.name())) {
        let pool = Pool::new(2, PoolPriority::Normal).expect("threads");
        let cpu = Cpu::with_isa(isa, Arc::new(pool)).expect("available");
        assert_eq!(run(&cpu), expected, "{}", isa.name());
    }
}

/// Products with all plain weights, and what is fused behind them.
#[test]
fn products() {
    let (rows, out, width) = (9, 40, 131);
    let (x, weights, bias) = (floats(rows * width, 1), floats(out * width, 2), floats(out, 3));
    let encoded = |dtype: DType| -> Vec<u8> {
        let bits = weights.iter().map(|weight| weight.to_bits());
        match dtype {
            DType::F32 => bits.flat_map(|bits| bits.to_le_bytes()).collect(),
            // Any 16 bits are a number, but for those of exponents that are all ones.
            DType::F16 => bits.flat_map(|bits| ((bits >> 12 & 0x3fff) as u16).to_le_bytes()).collect(),
            DType::Bf16 => bits.flat_map(|bits| ((bits >> 16) as u16).to_le_bytes()).collect(),
        }
    };
    check(
        &[
            // f32, f16, bf16: plain, both forms of GELU, SwiGLU.
            "80d1bdc2", "83bdff7a", "e1e3fef4", "a2cff5d7", "f4bb600c", "722edc98", "b0194443", "dc0eaf84", "ef5e7446",
            "79998a13", "4311be93", "3cb36996",
        ],
        |cpu| {
            let mut digests = Vec::new();
            for dtype in [DType::F32, DType::F16, DType::Bf16] {
                let bytes = encoded(dtype);
                let source = MatrixSource {
                    bytes: &bytes,
                    encoding: dtype.into(),
                    out_features: out,
                    in_features: width,
                    bias: Some(&bias),
                };
                let x = Operand::from_f32(OperandFormat::F32, rows, width, &x);
                let weight = PackedLinear::pack(cpu, &[(source, dtype.into())]).expect("sizes fit");
                let mut product = vec![0.0; rows * out];
                matmul(cpu, &x, &weight, &mut product).expect("sizes fit");
                digests.push(digest(&product));
                for gelu in [Gelu::Erf, Gelu::Tanh] {
                    let mut activated = Operand::zeros(OperandFormat::F32, rows, out);
                    matmul_gelu(cpu, &x, &weight, gelu, &mut activated).expect("sizes fit");
                    digests.push(digest(&rows_of(&activated)));
                }
                let gate_up = PackedLinear::pack_gate_up(cpu, source, source, dtype.into()).expect("sizes fit");
                let mut gated = Operand::zeros(OperandFormat::F32, rows, out);
                matmul_swiglu(cpu, &x, &gate_up, &mut gated).expect("sizes fit");
                digests.push(digest(&rows_of(&gated)));
            }
            digests
        },
    );
}

/// Both norms.
#[test]
fn norms() {
    let (rows, width) = (3, 1000);
    let (x, weight, bias) = (floats(rows * width, 4), floats(width, 5), floats(width, 6));
    check(&["d55b67fc", "453dcfe3"], |cpu| {
        let mut out = [(); 2].map(|()| Operand::zeros(OperandFormat::F32, rows, width));
        rms_norm(cpu, &x, &weight, 1e-6, &mut out[0]).expect("sizes fit");
        layer_norm(cpu, &x, &LayerNorm { weight: &weight, bias: &bias, eps: 1e-5 }, &mut out[1]).expect("sizes fit");
        out.iter().map(|out| digest(&rows_of(out))).collect()
    });
}

/// Norms of heads, rotation, storing, and attention over all types of keys and values: of 150 rows at once, and of a
/// last one alone.
#[test]
fn attention() {
    let (num_heads, num_kv_heads, head_dim, tokens) = (6, 2, 40, 151_usize);
    let shape = AttentionShape {
        num_heads,
        num_kv_heads,
        head_dim,
        scale: 0.3,
        sliding_window_tokens: Some(140),
        causal: true,
    };
    let (width, block_tokens) = ((num_heads + 2 * num_kv_heads) * head_dim, 16);
    let (cos, sin) = (floats(tokens * head_dim / 2, 7), floats(tokens * head_dim / 2, 8));
    let rope = RopeTable { rotary_dim: head_dim, cos: &cos, sin: &sin };
    let (q_weight, k_weight) = (floats(head_dim, 9), floats(head_dim, 10));
    let norm = |weight| HeadNorm { weight, eps: 1e-6 };
    let layer = RopeLayer { layer_idx: 0, shape, qk_norm: Some((norm(&q_weight), norm(&k_weight))), rope };
    let block_tables: Vec<u32> = (0..tokens.div_ceil(block_tokens) as u32).collect();
    check(&["aee177f9", "fd212f6f", "57091d77", "288d4a62"], |cpu| {
        let attend = |dtype| {
            let num_blocks = block_tables.len();
            let layout = KvBlocksLayout { num_layers: 1, num_blocks, block_tokens, num_kv_heads, head_dim, dtype };
            let mut kv = KvBlocks::new(layout).expect("a small pool");
            let mut results = Vec::new();
            for span in [0..tokens - 1, tokens - 1..tokens] {
                let positions: Vec<u32> = span.clone().map(|position| position as u32).collect();
                let mut qkv = floats(tokens * width, 11)[span.start * width..span.end * width].to_vec();
                rope_and_store(cpu, &mut qkv, &layer, &positions, &positions, &mut kv).expect("sizes fit");
                let mut result = Operand::zeros(OperandFormat::F32, span.len(), num_heads * head_dim);
                let sequences =
                    [AttentionSequence { rows: 0..span.len(), first_position: span.start, blocks: 0..num_blocks }];
                let batch =
                    AttentionBatch { q: &qkv, q_stride: width, sequences: &sequences, block_tables: &block_tables };
                paged_attention(cpu, (0, &shape), &batch, &kv, &mut result).expect("sizes fit");
                results.extend(rows_of(&result));
            }
            assert!(results.iter().all(|value| value.is_finite()));
            digest(&results)
        };
        [KvDtype::F32, KvDtype::F16, KvDtype::Bf16, KvDtype::Int8].map(attend).to_vec()
    });
}
