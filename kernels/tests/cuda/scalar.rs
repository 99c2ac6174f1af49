//! The portable operations of `cpu::` as oracles: plain vectors in, plain vectors out.

use std::sync::Arc;

use half::bf16;
use ns_llm_kernels::cpu::linear::{Gelu, MatrixSource, Operand, OperandFormat, PackedLinear, matmul, matmul_gelu};
use ns_llm_kernels::cpu::linear::{WeightFormat, matmul_swiglu};
use ns_llm_kernels::cpu::pool::{Pool, PoolPriority};
use ns_llm_kernels::cpu::{Cpu, Isa};
use ns_llm_kernels::dtype::{DType, Encoding};

/// The portable instruction set on one thread.
pub(crate) fn cpu() -> Cpu {
    let pool = Pool::new(1, PoolPriority::Normal).expect("the caller's thread");
    Cpu::with_isa(Isa::Portable, Arc::new(pool)).expect("available everywhere")
}

/// A weight matrix `[features, columns]` with its bias.
pub(crate) struct Weights {
    pub(crate) values: Vec<bf16>,
    pub(crate) bias: Option<Vec<f32>>,
    pub(crate) features: usize,
    pub(crate) columns: usize,
}

impl Weights {
    /// Takes columns `first..first + features` of `columns` as they are.
    pub(crate) fn selection(first: usize, features: usize, columns: usize) -> Weights {
        let one = |i: usize| if i % columns == first + i / columns { bf16::ONE } else { bf16::ZERO };
        Weights { values: (0..features * columns).map(one).collect(), bias: None, features, columns }
    }
    fn source<'a>(&'a self, bytes: &'a [u8]) -> MatrixSource<'a> {
        MatrixSource {
            bytes,
            encoding: Encoding::Plain(DType::Bf16),
            out_features: self.features,
            in_features: self.columns,
            bias: self.bias.as_deref(),
        }
    }
    fn bytes(&self) -> Vec<u8> {
        self.values.iter().flat_map(|value| value.to_le_bytes()).collect()
    }
    fn pack(&self, cpu: &Cpu) -> PackedLinear {
        let bytes = self.bytes();
        PackedLinear::pack(cpu, &[(self.source(&bytes), WeightFormat::from(DType::Bf16))]).expect("sizes fit")
    }
}

/// f32 rows.
fn operand(x: &[f32], columns: usize) -> Operand {
    Operand::from_f32(OperandFormat::F32, x.len() / columns, columns, x)
}

/// All rows of an operand.
pub(crate) fn rows_of(operand: &Operand) -> Vec<f32> {
    let mut rows = vec![0.0; operand.rows() * operand.width()];
    for (i, row) in rows.chunks_exact_mut(operand.width()).enumerate() {
        operand.row_into(i, row);
    }
    rows
}

/// `x W^T + bias`
pub(crate) fn product(x: &[f32], weights: &Weights) -> Vec<f32> {
    let cpu = cpu();
    let mut out = vec![0.0; x.len() / weights.columns * weights.features];
    matmul(&cpu, &operand(x, weights.columns), &weights.pack(&cpu), &mut out).expect("sizes fit");
    out
}

/// `gelu(x W^T + bias)`
pub(crate) fn product_gelu(x: &[f32], weights: &Weights, gelu: Gelu) -> Vec<f32> {
    let cpu = cpu();
    let mut out = Operand::zeros(OperandFormat::F32, x.len() / weights.columns, weights.features);
    matmul_gelu(&cpu, &operand(x, weights.columns), &weights.pack(&cpu), gelu, &mut out).expect("sizes fit");
    rows_of(&out)
}

/// `silu(x W_gate^T) * (x W_up^T)`, with biases
pub(crate) fn product_swiglu(x: &[f32], gate: &Weights, up: &Weights) -> Vec<f32> {
    let (cpu, gate_bytes, up_bytes) = (cpu(), gate.bytes(), up.bytes());
    let (gate_source, up_source) = (gate.source(&gate_bytes), up.source(&up_bytes));
    let packed = PackedLinear::pack_gate_up(&cpu, gate_source, up_source, WeightFormat::from(DType::Bf16));
    let mut out = Operand::zeros(OperandFormat::F32, x.len() / gate.columns, gate.features);
    matmul_swiglu(&cpu, &operand(x, gate.columns), &packed.expect("sizes fit"), &mut out).expect("sizes fit");
    rows_of(&out)
}
