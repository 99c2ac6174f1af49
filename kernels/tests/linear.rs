//! Matrix products: each instruction set against an f64 reference over ragged sizes, and bit for bit against itself
//! whatever the number of rows and threads.

use std::sync::Arc;

use half::{bf16, f16};
use ns_llm_kernels::cpu::linear::{
    Gelu, MatrixSource, Operand, OperandFormat, PackedLinear, WeightFormat, matmul, matmul_add, matmul_gelu,
    matmul_swiglu,
};
use ns_llm_kernels::cpu::pool::{Pool, PoolPriority};
use ns_llm_kernels::cpu::{Cpu, Isa};
use ns_llm_kernels::dtype::DType;
use ns_llm_kernels::error::Error;

const OUT_SIZES: [usize; 5] = [1, 31, 32, 33, 100];
const IN_SIZES: [usize; 6] = [1, 2, 31, 64, 100, 256];
const ROW_COUNTS: [usize; 9] = [0, 1, 2, 5, 6, 7, 31, 33, 49];
const FORMATS: [DType; 3] = [DType::F32, DType::F16, DType::Bf16];

/// Deterministic numbers in -1..1 (SplitMix64, Steele et al. 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z >> 40) as f32 / (1_u64 << 23) as f32 - 1.0
    }
    fn vec(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.next()).collect()
    }
}

/// A matrix `[out, in]` as a checkpoint stores it, one byte off any alignment, and its exact values.
struct Matrix {
    dtype: DType,
    bytes: Vec<u8>,
    values: Vec<f32>,
    bias: Option<Vec<f32>>,
    out_features: usize,
    in_features: usize,
}

impl Matrix {
    fn random(random: &mut Random, dtype: DType, out_features: usize, in_features: usize, has_bias: bool) -> Matrix {
        let values = random.vec(out_features * in_features);
        let encode = |value: &f32| match dtype {
            DType::F32 => value.to_le_bytes().to_vec(),
            DType::F16 => f16::from_f32(*value).to_le_bytes().to_vec(),
            DType::Bf16 => bf16::from_f32(*value).to_le_bytes().to_vec(),
        };
        let bytes: Vec<u8> = std::iter::once(0xff).chain(values.iter().flat_map(encode)).collect();
        let mut values = vec![0.0; values.len()];
        dtype.decode(&bytes[1..], &mut values);
        let bias = has_bias.then(|| random.vec(out_features));
        Matrix { dtype, bytes, values, bias, out_features, in_features }
    }
    fn source(&self) -> MatrixSource<'_> {
        MatrixSource {
            bytes: &self.bytes[1..],
            encoding: self.dtype.into(),
            out_features: self.out_features,
            in_features: self.in_features,
            bias: self.bias.as_deref(),
        }
    }
    fn pack(&self, cpu: &Cpu) -> PackedLinear {
        PackedLinear::pack(cpu, &[(self.source(), self.dtype.into())]).expect("sizes fit")
    }
    /// `x W^T + bias` in f64.
    fn product(&self, x: &[f32]) -> Vec<f64> {
        let dot = |x: &[f32], j: usize| -> f64 {
            let weights = &self.values[j * self.in_features..(j + 1) * self.in_features];
            let sum: f64 = x.iter().zip(weights).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum();
            sum + self.bias.as_ref().map_or(0.0, |bias| f64::from(bias[j]))
        };
        x.chunks_exact(self.in_features).flat_map(|x| (0..self.out_features).map(move |j| dot(x, j))).collect()
    }
}

fn cpu(isa: Isa, num_threads: usize) -> Cpu {
    let pool = Pool::new(num_threads, PoolPriority::Normal).expect("a few threads");
    Cpu::with_isa(isa, Arc::new(pool)).expect("an available instruction set")
}

/// Fails when the mean squared error, relative to the mean square, is above 1e-7; names the worst element.
fn check_close(what: &str, got: &[f32], want: &[f64]) {
    assert_eq!(got.len(), want.len(), "{what}");
    let error = |i: usize| (f64::from(got[i]) - want[i]).abs();
    let power: f64 = want.iter().map(|want| want * want).sum();
    let nmse = (0..got.len()).map(|i| error(i).powi(2)).sum::<f64>() / power.max(f64::MIN_POSITIVE);
    if got.is_empty() || nmse <= 1e-7 {
        return;
    }
    let worst = (0..got.len()).max_by(|&a, &b| error(a).total_cmp(&error(b))).expect("not empty");
    panic!("{what}: NMSE {nmse:e}, worst at {worst}: got {}, want {}", got[worst], want[worst]);
}

/// `x W^T + bias` of each instruction set and format is the f64 product of what the operand holds to rounding, over
/// ragged sizes; `matmul_add` adds it to what was there.
#[test]
fn products_match_the_reference() {
    let mut random = Random(1);
    for isa in Isa::available() {
        let cpu = cpu(isa, 2);
        for (dtype, out) in FORMATS.into_iter().flat_map(|dtype| OUT_SIZES.map(|out| (dtype, out))) {
            for (in_features, rows) in IN_SIZES.into_iter().flat_map(|size| ROW_COUNTS.map(|rows| (size, rows))) {
                let matrix = Matrix::random(&mut random, dtype, out, in_features, rows % 2 == 1);
                let weight = matrix.pack(&cpu);
                let values = random.vec(rows * in_features);
                let format = OperandFormat::for_weights(&cpu, format_of(&weight));
                let x = Operand::from_f32(format, rows, in_features, &values);
                let what = format!("{} {} [{rows}, {in_features}] x [{out}]", isa.name(), dtype.name());
                let want = matrix.product(&operand_values(&x));
                let mut got = vec![f32::NAN; rows * out];
                matmul(&cpu, &x, &weight, &mut got).expect("sizes fit");
                check_close(&what, &got, &want);

                let residual = random.vec(rows * out);
                let mut got = residual.clone();
                matmul_add(&cpu, &x, &weight, &mut got).expect("sizes fit");
                let want: Vec<f64> = want.iter().zip(&residual).map(|(a, &b)| a + f64::from(b)).collect();
                check_close(&what, &got, &want);
            }
        }
    }
}

/// SwiGLU behind gate and up is the formula in f64, with and without bias, over ragged widths.
#[test]
fn swiglu_matches_the_reference() {
    let mut random = Random(2);
    for isa in Isa::available() {
        let cpu = cpu(isa, 2);
        for (dtype, out) in FORMATS.into_iter().flat_map(|dtype| OUT_SIZES.map(|out| (dtype, out))) {
            for rows in ROW_COUNTS {
                let gate = Matrix::random(&mut random, dtype, out, 64, rows % 2 == 0);
                let up = Matrix::random(&mut random, dtype, out, 64, rows % 3 == 0);
                let weight = PackedLinear::pack_gate_up(&cpu, gate.source(), up.source(), dtype.into()).expect("sizes");
                let values = random.vec(rows * 64);
                let x = Operand::from_f32(OperandFormat::for_weights(&cpu, format_of(&weight)), rows, 64, &values);
                let mut got = Operand::zeros(OperandFormat::F32, rows, out);
                matmul_swiglu(&cpu, &x, &weight, &mut got).expect("sizes fit");
                let silu = |gate: f64| gate / (1.0 + (-gate).exp());
                let values = operand_values(&x);
                let want = gate.product(&values).into_iter().zip(up.product(&values)).map(|(gate, up)| silu(gate) * up);
                let what = format!("{} {} swiglu [{rows}, 64] x [{out}]", isa.name(), dtype.name());
                check_close(&what, &operand_values(&got), &want.collect::<Vec<f64>>());
            }
        }
    }
}

/// Both forms of GELU behind a product are their formulas in f64, with and without bias, over ragged widths.
#[test]
fn gelu_matches_the_reference() {
    /// `erf` in f64 by its Taylor series: the arguments here are below 6.
    fn erf(x: f64) -> f64 {
        let (mut term, mut sum) = (x, x);
        for n in 1..200 {
            term *= -x * x / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        (sum * 2.0 / std::f64::consts::PI.sqrt()).clamp(-1.0, 1.0)
    }
    fn gelu_erf(x: f64) -> f64 {
        let tail = x.abs() > 7.0;
        if tail { x.max(0.0) } else { 0.5 * x * (1.0 + erf(x / 2.0_f64.sqrt())) }
    }
    fn gelu_tanh(x: f64) -> f64 {
        0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
    }
    let mut random = Random(8);
    for isa in Isa::available() {
        let cpu = cpu(isa, 2);
        for (dtype, out) in FORMATS.into_iter().flat_map(|dtype| OUT_SIZES.map(|out| (dtype, out))) {
            for rows in ROW_COUNTS {
                let matrix = Matrix::random(&mut random, dtype, out, 64, rows % 2 == 0);
                let weight = matrix.pack(&cpu);
                let values = random.vec(rows * 64);
                let x = Operand::from_f32(OperandFormat::for_weights(&cpu, format_of(&weight)), rows, 64, &values);
                let product = matrix.product(&operand_values(&x));
                type Form = (Gelu, fn(f64) -> f64);
                let forms: [Form; 2] = [(Gelu::Erf, gelu_erf), (Gelu::Tanh, gelu_tanh)];
                let mut results = Vec::new();
                for (gelu, formula) in forms {
                    let mut got = Operand::zeros(OperandFormat::F32, rows, out);
                    matmul_gelu(&cpu, &x, &weight, gelu, &mut got).expect("sizes fit");
                    let want: Vec<f64> = product.iter().map(|&x| formula(x)).collect();
                    let what = format!("{} {} {gelu:?} [{rows}, 64] x [{out}]", isa.name(), dtype.name());
                    let got = operand_values(&got);
                    check_close(&what, &got, &want);
                    let worst = got.iter().zip(&want).map(|(&got, want)| (f64::from(got) - want).abs());
                    assert!(worst.fold(0.0, f64::max) < 3e-5, "{what}");
                    results.push(got);
                }
                assert!(rows * out < 100 || results[0] != results[1], "the two forms are one");
            }
        }
    }
    let matrix = Matrix::random(&mut random, DType::F32, 5, 4, false);
    let cpu = cpu(Isa::Portable, 1);
    let x = Operand::zeros(OperandFormat::F32, 2, 4);
    let mut out = Operand::zeros(OperandFormat::F32, 2, 6);
    let error = matmul_gelu(&cpu, &x, &matrix.pack(&cpu), Gelu::Erf, &mut out).expect_err("width").to_string();
    assert!(error.contains("matmul_gelu: out width is 6, must be 5"), "{error}");
}

fn format_of(weight: &PackedLinear) -> WeightFormat {
    weight.formats().next().expect("one section")
}

fn operand_values(operand: &Operand) -> Vec<f32> {
    let mut values = vec![0.0; operand.rows() * operand.width()];
    for (row, values) in values.chunks_exact_mut(operand.width()).enumerate() {
        operand.row_into(row, values);
    }
    values
}

/// AVX-512 multiplies f32 activations by the same chains of fused multiply-adds as AVX2: the same bits. Skipped where the
/// CPU has no AVX-512.
#[test]
fn avx512_has_the_bits_of_avx2() {
    if !Isa::available().contains(&Isa::Avx512) {
        return;
    }
    let mut random = Random(7);
    let cpus = [Isa::Avx2, Isa::Avx512].map(|isa| cpu(isa, 1));
    for (dtype, rows) in FORMATS.into_iter().flat_map(|dtype| [1, 9, 14].map(|rows| (dtype, rows))) {
        let matrix = Matrix::random(&mut random, dtype, 40, 131, true);
        let x = Operand::from_f32(OperandFormat::F32, rows, 131, &random.vec(rows * 131));
        let [avx2, avx512] = cpus.each_ref().map(|cpu| {
            let mut out = vec![f32::NAN; rows * 40];
            matmul(cpu, &x, &matrix.pack(cpu), &mut out).expect("sizes fit");
            out.into_iter().map(f32::to_bits).collect::<Vec<u32>>()
        });
        assert_eq!(avx2, avx512, "{} rows of {}", rows, dtype.name());
    }
}

/// A row's result has the same bits alone and among 2 to 130 rows (all tile shapes, several row blocks), on 1 to 4
/// threads, with an `in` of several column blocks. All operations.
#[test]
fn rows_do_not_depend_on_their_neighbours() {
    let (out, max_rows) = (72, 130);
    let mut random = Random(3);
    for isa in Isa::available() {
        let cpus: Vec<Cpu> = (1..=4).map(|num_threads| cpu(isa, num_threads)).collect();
        for (dtype, in_features) in FORMATS.into_iter().flat_map(|dtype| [(dtype, 37), (dtype, 2500)]) {
            let gate = Matrix::random(&mut random, dtype, out, in_features, true);
            let up = Matrix::random(&mut random, dtype, out, in_features, false);
            let stacked = gate.pack(&cpus[0]);
            let gate_up =
                PackedLinear::pack_gate_up(&cpus[0], gate.source(), up.source(), dtype.into()).expect("sizes");
            let values = random.vec(max_rows * in_features);
            let residual = random.vec(max_rows * out);
            let compute = |cpu: &Cpu, rows: std::ops::Range<usize>| {
                let format = OperandFormat::for_weights(cpu, format_of(&stacked));
                let values = &values[rows.start * in_features..rows.end * in_features];
                let x = Operand::from_f32(format, rows.len(), in_features, values);
                let mut plain = vec![0.0; rows.len() * out];
                let mut added = residual[rows.start * out..rows.end * out].to_vec();
                let mut swiglu = Operand::zeros(format, rows.len(), out);
                matmul(cpu, &x, &stacked, &mut plain).expect("sizes fit");
                matmul_add(cpu, &x, &stacked, &mut added).expect("sizes fit");
                matmul_swiglu(cpu, &x, &gate_up, &mut swiglu).expect("sizes fit");
                let gelu = [Gelu::Erf, Gelu::Tanh].map(|gelu| {
                    let mut out = Operand::zeros(format, rows.len(), out);
                    matmul_gelu(cpu, &x, &stacked, gelu, &mut out).expect("sizes fit");
                    operand_values(&out)
                });
                let [gelu_erf, gelu_tanh] = gelu;
                [plain, added, operand_values(&swiglu), gelu_erf, gelu_tanh]
            };
            let alone: Vec<[Vec<f32>; 5]> = (0..max_rows).map(|row| compute(&cpus[0], row..row + 1)).collect();
            let row_counts =
                if in_features > 100 { vec![6, 23, max_rows] } else { (2..=41).chain([max_rows]).collect() };
            for rows in row_counts {
                let cpu = &cpus[rows % 4];
                let together = compute(cpu, 0..rows);
                for (operation, together) in together.iter().enumerate() {
                    for (row, together) in together.chunks_exact(out).enumerate() {
                        let same = together.iter().zip(&alone[row][operation]).all(|(a, b)| a.to_bits() == b.to_bits());
                        let what = (isa.name(), dtype.name(), in_features);
                        assert!(same, "{what:?}: row {row} of {rows} differs in operation {operation}");
                    }
                }
            }
        }
    }
}

/// Every row that is packed, from several stacked parts and in every conversion between formats, is read back rounded to
/// nearest even; also the packed bits do not depend on the number of threads.
#[test]
fn packed_rows_are_read_back() {
    let mut random = Random(4);
    let cpu = cpu(Isa::Portable, 3);
    for (dtype, format) in FORMATS.into_iter().flat_map(|dtype| FORMATS.map(|format| (dtype, format))) {
        for in_features in [1, 31, 64, 130] {
            let parts = [5, 32, 40].map(|out| Matrix::random(&mut random, dtype, out, in_features, out == 32));
            let sources = parts.each_ref().map(|part| (part.source(), format.into()));
            let packed = PackedLinear::pack(&cpu, &sources).expect("sizes fit");
            assert_eq!((packed.out_features(), packed.in_features()), (77, in_features));
            let want = parts.iter().flat_map(|part| part.values.iter().copied()).map(|value| match format {
                DType::F32 => value,
                DType::F16 => f16::from_f32(value).to_f32(),
                DType::Bf16 => bf16::from_f32(value).to_f32(),
            });
            let mut got = vec![0.0; 77 * in_features];
            for (row, got) in got.chunks_exact_mut(in_features).enumerate() {
                packed.row_into(row, got);
            }
            assert_eq!(got, want.collect::<Vec<f32>>(), "{} to {}, in {in_features}", dtype.name(), format.name());
        }
    }
}

/// A NaN or an infinity in one row stays in that row, also where it meets the zeros that pad a panel.
#[test]
fn non_finite_rows_stay_alone() {
    let mut random = Random(5);
    for isa in Isa::available() {
        let cpu = cpu(isa, 1);
        for dtype in FORMATS {
            let matrix = Matrix::random(&mut random, dtype, 33, 31, true);
            let weight = matrix.pack(&cpu);
            let mut values = random.vec(7 * 31);
            values[3 * 31 + 30] = f32::NAN;
            values[5 * 31 + 30] = f32::INFINITY;
            let x = Operand::from_f32(OperandFormat::for_weights(&cpu, format_of(&weight)), 7, 31, &values);
            let mut out = vec![0.0; 7 * 33];
            matmul(&cpu, &x, &weight, &mut out).expect("sizes fit");
            for (row, out) in out.chunks_exact(33).enumerate() {
                let finite = out.iter().filter(|value| value.is_finite()).count();
                assert_eq!(
                    finite,
                    if row == 3 || row == 5 { 0 } else { 33 },
                    "{} {} row {row}",
                    isa.name(),
                    dtype.name()
                );
            }
        }
    }
}

/// Sizes that do not fit together are errors that name the size; nothing is computed.
#[test]
fn wrong_sizes_are_errors() {
    let mut random = Random(6);
    let cpu = cpu(Isa::Portable, 1);
    let matrix = Matrix::random(&mut random, DType::F32, 3, 4, false);
    let weight = matrix.pack(&cpu);
    let mismatch = |result: Result<(), Error>, name: &str| match result {
        Err(Error::SizeMismatch { dimension, .. }) => assert_eq!(dimension, name),
        other => panic!("{name}: {other:?}"),
    };
    let x = |width: usize| Operand::zeros(OperandFormat::F32, 2, width);
    mismatch(matmul(&cpu, &x(5), &weight, &mut [0.0; 6]), "x width");
    mismatch(matmul(&cpu, &x(4), &weight, &mut [0.0; 7]), "out elements");
    mismatch(matmul_add(&cpu, &x(4), &weight, &mut [0.0; 5]), "out elements");
    let pack = |source: MatrixSource<'_>| PackedLinear::pack(&cpu, &[(source, WeightFormat::F32)]).map(|_| ());
    let source = matrix.source();
    mismatch(pack(MatrixSource { in_features: 5, ..source }), "bytes");
    mismatch(pack(MatrixSource { out_features: usize::MAX, ..source }), "bytes");
    mismatch(pack(MatrixSource { bias: Some(&[0.0; 2]), ..source }), "bias");
    let other = Matrix::random(&mut random, DType::F32, 3, 5, false);
    let two = PackedLinear::pack(&cpu, &[source, other.source()].map(|part| (part, WeightFormat::F32)));
    mismatch(two.map(|_| ()), "in_features");
    let other = Matrix::random(&mut random, DType::F32, 4, 4, false);
    let gate_up = PackedLinear::pack_gate_up(&cpu, source, other.source(), WeightFormat::F32);
    mismatch(gate_up.map(|_| ()), "up rows");
    let gate_up = PackedLinear::pack_gate_up(&cpu, source, source, WeightFormat::F32).expect("sizes fit");
    mismatch(matmul_swiglu(&cpu, &x(4), &gate_up, &mut Operand::zeros(OperandFormat::F32, 2, 4)), "out width");
    mismatch(matmul_swiglu(&cpu, &x(4), &gate_up, &mut Operand::zeros(OperandFormat::F32, 3, 3)), "out rows");
    let bf16 = Operand::zeros(OperandFormat::Bf16, 2, 4);
    let formats = matmul(&cpu, &bf16, &weight, &mut [0.0; 6]);
    assert!(matches!(formats, Err(Error::UnsupportedFormats { operand: "bf16", weight: "f32", .. })), "{formats:?}");
}
