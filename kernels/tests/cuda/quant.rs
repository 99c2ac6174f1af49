//! `matmul_quant.cu` against the portable products of `cpu::linear` with the same blocks, and against itself.

use half::f16;
use ns_llm_kernels::cpu::linear::{MatrixSource, Operand, OperandFormat, PackedLinear, WeightFormat, matmul};
use ns_llm_kernels::cuda::matmul_quant::{
    QuantMatrix, QuantOutput, QuantRows, QuantRowsMut, QuantWeights, embed_quant, multiply_quant, quantize_rows,
    split_q8_0,
};
use ns_llm_kernels::dtype::Encoding;
use ns_llm_kernels::quant::{self, QuantType};

use crate::Test;
use crate::check::{Random, Tolerance, check};
use crate::scalar;
use crate::shim::{Schedule, Shim, schedules, slice, slice_mut};

/// The tests of this file.
pub(crate) const TESTS: &[Test] = &[
    ("products with quantized weights are the scalar ones", products_are_the_scalar_ones),
    ("a row of quantized products is the same in any company", products_are_row_invariant),
    ("what is not finite makes its own row NaN", what_is_not_finite_shows),
    ("rows of quantized matrices are those of the blocks", rows_are_decoded),
    ("quantized products refuse sizes that do not fit", sizes_are_checked),
];

/// A quantized matrix with its bias, and what kernels read of it.
struct Weights {
    quant_type: QuantType,
    blocks: Vec<u8>,
    q8_0: (Vec<i8>, Vec<f16>),
    bias: Vec<f32>,
    features: usize,
    columns: usize,
}

impl Weights {
    fn random(random: &mut Random, quant_type: QuantType, features: usize, columns: usize) -> Weights {
        let values = random.floats(features * columns);
        let mut blocks = vec![0; quant_type.size_bytes(values.len()).expect("whole blocks")];
        quant::encode(quant_type, &values, &mut blocks).expect("whole blocks");
        let q8_0 = if quant_type == QuantType::Q8_0 { split_q8_0(&blocks) } else { Default::default() };
        Weights { quant_type, blocks, q8_0, bias: random.floats(features), features, columns }
    }

    fn matrix(&self) -> QuantMatrix<'_> {
        let weights = match self.quant_type {
            QuantType::Q8_0 => QuantWeights::Q8_0 { codes: slice(&self.q8_0.0), scales: slice(&self.q8_0.1) },
            _ => QuantWeights::Q4K { blocks: slice(&self.blocks) },
        };
        QuantMatrix { weights, bias: Some(slice(&self.bias)), features: self.features, columns: self.columns }
    }

    /// `x W^T + bias` by the portable kernels, with activations in 8 bits.
    fn scalar_product(&self, x: &[f32]) -> Vec<f32> {
        let (cpu, rows) = (scalar::cpu(), x.len() / self.columns);
        let source = MatrixSource {
            bytes: &self.blocks,
            encoding: Encoding::Blocks(self.quant_type),
            out_features: self.features,
            in_features: self.columns,
            bias: Some(&self.bias),
        };
        let packed = PackedLinear::pack(&cpu, &[(source, WeightFormat::Quant(self.quant_type))]).expect("sizes fit");
        let mut out = vec![0.0; rows * self.features];
        let x = Operand::from_f32(OperandFormat::Int8, rows, self.columns, x);
        matmul(&cpu, &x, &packed, &mut out).expect("sizes fit");
        out
    }

    /// The same by the kernels: `out` was NaN, or a residual that the product is added to.
    fn product(&self, shim: &Shim, x: &[f32], residual: Option<&[f32]>) -> Vec<f32> {
        let groups = x.len() / 32;
        let (mut codes, mut scales, mut sums) = (vec![99; x.len()], vec![f32::NAN; groups], vec![9999; groups]);
        let mut rows =
            QuantRowsMut { codes: slice_mut(&mut codes), scales: slice_mut(&mut scales), sums: slice_mut(&mut sums) };
        quantize_rows(shim, slice(x), self.columns, &mut rows).expect("sizes fit");
        let rows = QuantRows { codes: slice(&codes), scales: slice(&scales), sums: slice(&sums) };
        let mut out = residual.map_or(vec![f32::NAN; x.len() / self.columns * self.features], <[f32]>::to_vec);
        let mut out_slice = slice_mut(&mut out);
        let output = match residual {
            Some(_) => QuantOutput::Add(&mut out_slice),
            None => QuantOutput::Store(&mut out_slice),
        };
        multiply_quant(shim, &rows, &self.matrix(), output).expect("sizes fit");
        out
    }
}

/// Both formats over rows, features and columns around tiles and slices. Within one slice the bits are those of the CPU;
/// beyond it slices are added in another order.
fn products_are_the_scalar_ones() {
    let mut random = Random(11);
    let shapes: [(usize, usize, usize); 8] =
        [(1, 8, 256), (2, 1, 256), (9, 33, 512), (16, 5, 2560), (7, 9, 32), (3, 8, 544), (37, 9, 256), (0, 8, 256)];
    for (quant_type, (rows, features, columns)) in
        [QuantType::Q8_0, QuantType::Q4_K].into_iter().flat_map(|quant_type| shapes.map(|shape| (quant_type, shape)))
    {
        if !columns.is_multiple_of(quant_type.block_values()) {
            continue;
        }
        let weights = Weights::random(&mut random, quant_type, features, columns);
        let (x, residual) = (random.floats(rows * columns), random.floats(rows * features));
        let want = weights.scalar_product(&x);
        for schedule in schedules() {
            let what = format!("{quant_type:?}, {rows} x {columns} by {features}, {schedule:?}");
            let shim = Shim::new(schedule);
            let got = weights.product(&shim, &x, None);
            check(&got, &want, Tolerance { relative: 1e-5, absolute: 1e-4 }, &what);
            if columns <= 256 {
                assert_eq!(got, want, "{what}");
            }
            let sums: Vec<f32> = residual.iter().zip(&got).map(|(residual, sum)| residual + sum).collect();
            assert_eq!(weights.product(&shim, &x, Some(&residual)), sums, "{what}");
        }
    }
}

/// A row has the same bits alone as among 35, in whichever tile of 16.
fn products_are_row_invariant() {
    let (mut random, shim) = (Random(12), Shim::new(Schedule::TAME));
    for quant_type in [QuantType::Q8_0, QuantType::Q4_K] {
        let weights = Weights::random(&mut random, quant_type, 17, 1024);
        let x = random.floats(35 * 1024);
        let together = weights.product(&shim, &x, None);
        for (x, want) in x.chunks_exact(1024).zip(together.chunks_exact(17)) {
            assert_eq!(weights.product(&shim, x, None), want, "{quant_type:?}");
        }
    }
}

/// NaN and infinity reach every feature of their row and no other row; zeros and tiny numbers are zeros.
fn what_is_not_finite_shows() {
    let (mut random, shim) = (Random(13), Shim::new(Schedule::TAME));
    for quant_type in [QuantType::Q8_0, QuantType::Q4_K] {
        let weights = Weights::random(&mut random, quant_type, 9, 512);
        let mut x = random.floats(4 * 512);
        (x[300], x[512 + 511]) = (f32::NAN, f32::NEG_INFINITY);
        x[2 * 512..3 * 512].fill(1e-40);
        let out = weights.product(&shim, &x, None);
        assert!(out[..2 * 9].iter().all(|x| x.is_nan()), "{quant_type:?}: {out:?}");
        assert_eq!(out[2 * 9..3 * 9], weights.bias, "{quant_type:?}");
        assert!(out[3 * 9..].iter().all(|x| x.is_finite()), "{quant_type:?}");
    }
}

/// Rows by their index are the numbers that the blocks stand for, in any order and twice; an index that no row has gives NaN.
fn rows_are_decoded() {
    let (mut random, indices) = (Random(15), [6_u32, 0, 6, 7, 3]);
    for (quant_type, columns) in [(QuantType::Q8_0, 96), (QuantType::Q4_K, 512)] {
        let weights = Weights::random(&mut random, quant_type, 7, columns);
        let mut decoded = vec![0.0; 7 * columns];
        quant::decode(quant_type, &weights.blocks, &mut decoded).expect("whole blocks");
        for schedule in schedules() {
            let mut out = vec![7.0_f32; indices.len() * columns];
            embed_quant(&Shim::new(schedule), &weights.matrix(), slice(&indices), &mut slice_mut(&mut out))
                .expect("sizes fit");
            for (row, &index) in out.chunks_exact(columns).zip(&indices) {
                match decoded.chunks_exact(columns).nth(index as usize) {
                    Some(want) => check(row, want, Tolerance { relative: 1e-6, absolute: 1e-7 }, "a row"),
                    None => assert!(row.iter().all(|x| x.is_nan()), "{quant_type:?}: row {index}"),
                }
            }
        }
    }
}

/// Each size that does not fit is refused by name.
fn sizes_are_checked() {
    let shim = Shim::new(Schedule::TAME);
    let mut random = Random(14);
    let refused = |weights: &Weights, rows: usize, change: fn(&mut QuantMatrix<'_>), out: usize| {
        let (codes, groups) = (vec![0; rows * weights.columns], rows * weights.columns / 32);
        let (scales, sums) = (vec![0.0; groups], vec![0; groups]);
        let x = QuantRows { codes: slice(&codes), scales: slice(&scales), sums: slice(&sums) };
        let (mut matrix, mut out) = (weights.matrix(), vec![0.0; out]);
        change(&mut matrix);
        let output = QuantOutput::Store(&mut slice_mut(&mut out));
        multiply_quant(&shim, &x, &matrix, output).expect_err("refused").to_string()
    };
    let q8_0 = Weights::random(&mut random, QuantType::Q8_0, 2, 64);
    let q4_k = Weights::random(&mut random, QuantType::Q4_K, 2, 256);
    assert_eq!(refused(&q8_0, 1, |_| (), 3), "multiply_quant: elements of out is 3, must be 2");
    let columns = refused(&q8_0, 1, |matrix| matrix.columns = 48, 2);
    assert_eq!(columns, "multiply_quant: columns is 48, must be a positive multiple of 32");
    let columns = refused(&q4_k, 1, |matrix| matrix.columns = 128, 2);
    assert_eq!(columns, "multiply_quant: columns is 128, must be a positive multiple of 256");
    let features = refused(&q8_0, 1, |matrix| matrix.features = 3, 3);
    assert_eq!(features, "multiply_quant: codes of the weights is 128, must be 192");
    let features = refused(&q4_k, 1, |matrix| matrix.features = 3, 3);
    assert_eq!(features, "multiply_quant: bytes of the weights is 288, must be 432");
    assert_eq!(refused(&q8_0, 1, |matrix| matrix.features = 0, 2), "multiply_quant: features is 0, must be at least 1");
}
