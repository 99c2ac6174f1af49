//! Products with quantized weights, every format: against an f64 product of the numbers that the blocks stand for, bit
//! for bit between instruction sets, and bit for bit whatever the number of rows and threads.

use std::sync::Arc;

use ns_llm_kernels::cpu::linear::{
    MatrixSource, Operand, OperandFormat, PackedLinear, WeightFormat, matmul, matmul_add, matmul_swiglu,
};
use ns_llm_kernels::cpu::pool::{Pool, PoolPriority};
use ns_llm_kernels::cpu::{Cpu, Isa};
use ns_llm_kernels::dtype::{DType, Encoding};
use ns_llm_kernels::error::Error;
use ns_llm_kernels::quant::{self, QuantType};

/// Deterministic numbers (SplitMix64, Steele et al. 2014).
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    /// In -1..1.
    fn next(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1_u64 << 23) as f32 - 1.0
    }
    fn vec(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.next()).collect()
    }
}

/// A matrix of blocks, one byte off any alignment, and the numbers that they stand for.
struct Matrix {
    quant_type: QuantType,
    bytes: Vec<u8>,
    values: Vec<f32>,
    out_features: usize,
    in_features: usize,
}

impl Matrix {
    fn new(quant_type: QuantType, out_features: usize, in_features: usize, blocks: &[u8]) -> Matrix {
        let bytes: Vec<u8> = std::iter::once(0xff).chain(blocks.iter().copied()).collect();
        let mut values = vec![0.0; out_features * in_features];
        quant::decode(quant_type, &bytes[1..], &mut values).expect("whole blocks");
        Matrix { quant_type, bytes, values, out_features, in_features }
    }
    /// Numbers encoded.
    fn encoded(random: &mut Random, quant_type: QuantType, out_features: usize, in_features: usize) -> Matrix {
        let values = random.vec(out_features * in_features);
        let mut blocks = vec![0; quant_type.size_bytes(values.len()).expect("whole blocks")];
        quant::encode(quant_type, &values, &mut blocks).expect("finite");
        Matrix::new(quant_type, out_features, in_features, &blocks)
    }
    /// Any bits in the codes and integer scales, finite scales: what no encoder writes, but a file may hold.
    fn arbitrary(random: &mut Random, quant_type: QuantType, out_features: usize, in_features: usize) -> Matrix {
        let num_bytes = quant_type.size_bytes(out_features * in_features).expect("whole blocks");
        let mut blocks: Vec<u8> = (0..num_bytes).map(|_| random.bits() as u8).collect();
        for block in blocks.chunks_exact_mut(quant_type.block_bytes()) {
            for start in scale_places(quant_type) {
                // f16 of magnitude 2^-4 to 2^-3, the upper byte last.
                block[start + 1] = 0x2c | block[start + 1] & 0x83;
            }
            if quant_type == QuantType::MXFP4 {
                block[0] = 120;
            }
        }
        Matrix::new(quant_type, out_features, in_features, &blocks)
    }
    fn source(&self) -> MatrixSource<'_> {
        MatrixSource {
            bytes: &self.bytes[1..],
            encoding: self.quant_type.into(),
            out_features: self.out_features,
            in_features: self.in_features,
            bias: None,
        }
    }
    fn format(&self) -> WeightFormat {
        WeightFormat::Quant(self.quant_type)
    }
    fn pack(&self, cpu: &Cpu) -> PackedLinear {
        PackedLinear::pack(cpu, &[(self.source(), self.format())]).expect("sizes fit")
    }
    /// `x W^T` in f64.
    fn product(&self, x: &[f32]) -> Vec<f64> {
        let dot = |x: &[f32], j: usize| -> f64 {
            let weights = &self.values[j * self.in_features..(j + 1) * self.in_features];
            x.iter().zip(weights).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum()
        };
        x.chunks_exact(self.in_features).flat_map(|x| (0..self.out_features).map(move |j| dot(x, j))).collect()
    }
}

/// First bytes of the f16 of a block.
fn scale_places(quant_type: QuantType) -> Vec<usize> {
    match quant_type {
        QuantType::Q8_0 | QuantType::Q4_0 | QuantType::Q5_0 | QuantType::IQ4_NL => vec![0],
        QuantType::Q4_1 | QuantType::Q5_1 | QuantType::Q4_K | QuantType::Q5_K => vec![0, 2],
        QuantType::Q2_K => vec![80, 82],
        QuantType::Q3_K => vec![108],
        QuantType::Q6_K => vec![208],
        QuantType::MXFP4 => vec![],
    }
}

fn cpu(isa: Isa, num_threads: usize) -> Cpu {
    let pool = Pool::new(num_threads, PoolPriority::Normal).expect("a few threads");
    Cpu::with_isa(isa, Arc::new(pool)).expect("an available instruction set")
}

fn operand_values(operand: &Operand) -> Vec<f32> {
    let mut values = vec![0.0; operand.rows() * operand.width()];
    for (row, values) in values.chunks_exact_mut(operand.width()).enumerate() {
        operand.row_into(row, values);
    }
    values
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Columns: a single block, whole chunks, for blocks of 32 also a chunk that is not whole.
fn in_sizes(quant_type: QuantType) -> Vec<usize> {
    if quant_type.block_values() == 32 { vec![32, 96, 256, 480] } else { vec![256, 768] }
}

/// The product with every format is that of the numbers that the blocks stand for and the numbers that the 8-bit
/// activations stand for, to rounding; in encoded blocks and in blocks of arbitrary bits; all instruction sets have the
/// same bits; `matmul_add` adds the same.
#[test]
fn products_match_the_reference() {
    let mut random = Random(1);
    for quant_type in QuantType::ALL {
        for (in_features, out) in in_sizes(quant_type).into_iter().flat_map(|size| [(size, 33), (size, 64)]) {
            let matrices =
                [Matrix::encoded, Matrix::arbitrary].map(|new| new(&mut random, quant_type, out, in_features));
            for (matrix, rows) in matrices.iter().flat_map(|matrix| [0, 1, 2, 3, 7, 14, 50].map(|rows| (matrix, rows)))
            {
                let values = random.vec(rows * in_features);
                let mut bits_before: Option<Vec<u32>> = None;
                for isa in Isa::available() {
                    let cpu = cpu(isa, 2);
                    let weight = matrix.pack(&cpu);
                    let x = Operand::from_f32(OperandFormat::Int8, rows, in_features, &values);
                    let mut got = vec![f32::NAN; rows * out];
                    matmul(&cpu, &x, &weight, &mut got).expect("sizes fit");
                    let what = format!("{} {} [{rows}, {in_features}] x [{out}]", isa.name(), quant_type.name());
                    let want = matrix.product(&operand_values(&x));
                    let power: f64 = want.iter().map(|want| want * want).sum();
                    let error: f64 = got.iter().zip(&want).map(|(&got, want)| (f64::from(got) - want).powi(2)).sum();
                    assert!(error <= 1e-11 * power, "{what}: NMSE {:e}", error / power);
                    if let Some(before) = bits_before.replace(bits(&got)) {
                        assert_eq!(before, bits(&got), "{what}: other bits than the instruction set before");
                    }
                    let residual = random.vec(rows * out);
                    let mut sum = residual.clone();
                    matmul_add(&cpu, &x, &weight, &mut sum).expect("sizes fit");
                    let want: Vec<f32> = got.iter().zip(&residual).map(|(got, residual)| residual + got).collect();
                    assert_eq!(bits(&sum), bits(&want), "{what}");
                }
            }
        }
    }
}

/// A row's result has the same bits alone and among 2 to 100 rows (all tile shapes, several row blocks), on 1 to 4
/// threads; also behind SwiGLU, whose result is rounded to 8 bits again.
#[test]
fn rows_do_not_depend_on_their_neighbours() {
    let (out, in_features, max_rows) = (72, 512, 100);
    let mut random = Random(2);
    for (isa, quant_type) in Isa::available().into_iter().flat_map(|isa| QuantType::ALL.map(|format| (isa, format))) {
        let cpus: Vec<Cpu> = (1..=4).map(|num_threads| cpu(isa, num_threads)).collect();
        let [gate, up] = [(); 2].map(|()| Matrix::encoded(&mut random, quant_type, out, in_features));
        let stacked = gate.pack(&cpus[0]);
        let gate_up = PackedLinear::pack_gate_up(&cpus[0], gate.source(), up.source(), gate.format()).expect("sizes");
        let values = random.vec(max_rows * in_features);
        let compute = |cpu: &Cpu, rows: std::ops::Range<usize>| {
            let values = &values[rows.start * in_features..rows.end * in_features];
            let x = Operand::from_f32(OperandFormat::Int8, rows.len(), in_features, values);
            let mut plain = vec![0.0; rows.len() * out];
            let mut swiglu = Operand::zeros(OperandFormat::Int8, rows.len(), out);
            matmul(cpu, &x, &stacked, &mut plain).expect("sizes fit");
            matmul_swiglu(cpu, &x, &gate_up, &mut swiglu).expect("sizes fit");
            [plain, operand_values(&swiglu)]
        };
        let alone: Vec<[Vec<f32>; 2]> = (0..max_rows).map(|row| compute(&cpus[0], row..row + 1)).collect();
        for rows in (2..=21).chain([max_rows]) {
            let together = compute(&cpus[rows % 4], 0..rows);
            for (operation, together) in together.iter().enumerate() {
                for (row, together) in together.chunks_exact(out).enumerate() {
                    let same = bits(together) == bits(&alone[row][operation]);
                    assert!(same, "{} {} row {row} of {rows}, {operation}", isa.name(), quant_type.name());
                }
            }
        }
    }
}

/// Rows are read back as the numbers that their blocks stand for, bit for bit, from parts of several formats in one matrix;
/// their products are those of each part alone.
#[test]
fn parts_of_several_formats_are_one_matrix() {
    let mut random = Random(3);
    for isa in Isa::available() {
        let cpu = cpu(isa, 3);
        let parts = QuantType::ALL.map(|quant_type| Matrix::arbitrary(&mut random, quant_type, 37, 512));
        let bf16: Vec<u8> = (0..40 * 512).flat_map(|i| [(i % 251) as u8, 0x3e]).collect();
        let plain = MatrixSource {
            bytes: &bf16,
            encoding: DType::Bf16.into(),
            out_features: 40,
            in_features: 512,
            bias: Some(&[2.0; 40]),
        };
        let mut sources: Vec<_> = parts.iter().map(|part| (part.source(), part.format())).collect();
        sources.insert(5, (plain, WeightFormat::Bf16));
        sources.insert(7, sources[6]);
        let packed = PackedLinear::pack(&cpu, &sources).expect("sizes fit");
        assert_eq!((packed.out_features(), packed.formats().count()), (13 * 37 + 40, 13));
        let bytes = sources.iter().map(|(part, format)| {
            let rows = if part.bias.is_none() && format == &sources[6].1 { 0 } else { part.out_features };
            format.packed_bytes(rows, 512).expect("whole blocks")
        });
        // The two neighbours of one format share panels.
        let shared = sources[6].1.packed_bytes(74, 512).expect("whole blocks");
        assert_eq!(packed.len_bytes(), bytes.sum::<usize>() + shared);

        let x = Operand::from_f32(OperandFormat::F32AndInt8, 9, 512, &random.vec(9 * 512));
        let mut together = vec![0.0; 9 * packed.out_features()];
        matmul(&cpu, &x, &packed, &mut together).expect("sizes fit");
        let mut first = 0;
        for source in &sources {
            let alone = PackedLinear::pack(&cpu, &[*source]).expect("sizes fit");
            let mut product = vec![0.0; 9 * source.0.out_features];
            matmul(&cpu, &x, &alone, &mut product).expect("sizes fit");
            for row in 0..source.0.out_features {
                let (mut got, mut want) = (vec![0.0; 512], vec![0.0; 512]);
                packed.row_into(first + row, &mut got);
                let row_bytes = source.0.bytes.len() / source.0.out_features;
                source.0.encoding.decode(&source.0.bytes[row * row_bytes..][..row_bytes], &mut want);
                assert_eq!(bits(&got), bits(&want), "{} row {row}", source.1.name());
                for x_row in 0..9 {
                    let together = together[x_row * packed.out_features() + first + row];
                    assert_eq!(together.to_bits(), product[x_row * source.0.out_features + row].to_bits());
                }
            }
            first += source.0.out_features;
        }
    }
}

/// Numbers that are stored in another way are encoded as [`quant::encode`] does, and blocks are decoded for plain formats.
#[test]
fn packing_converts() {
    let mut random = Random(4);
    let cpu = cpu(Isa::Portable, 2);
    let values = random.vec(50 * 256);
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let plain =
        MatrixSource { bytes: &bytes, encoding: DType::F32.into(), out_features: 50, in_features: 256, bias: None };
    for quant_type in QuantType::ALL {
        let mut blocks = vec![0; quant_type.size_bytes(values.len()).expect("whole blocks")];
        quant::encode(quant_type, &values, &mut blocks).expect("finite");
        let stored = Matrix::new(quant_type, 50, 256, &blocks);
        let from_plain = PackedLinear::pack(&cpu, &[(plain, WeightFormat::Quant(quant_type))]).expect("sizes fit");
        let to_plain = PackedLinear::pack(&cpu, &[(stored.source(), WeightFormat::F32)]).expect("sizes fit");
        for (row, want) in stored.values.chunks_exact(256).enumerate() {
            for packed in [&from_plain, &to_plain] {
                let mut got = vec![0.0; 256];
                packed.row_into(row, &mut got);
                assert_eq!(bits(&got), bits(want), "{} row {row}", quant_type.name());
            }
        }
    }
}

/// A NaN or an infinity in one row makes that row's results NaN, and no other's.
#[test]
fn non_finite_rows_stay_alone() {
    let mut random = Random(5);
    for (isa, quant_type) in Isa::available().into_iter().flat_map(|isa| QuantType::ALL.map(|format| (isa, format))) {
        let cpu = cpu(isa, 1);
        let weight = Matrix::encoded(&mut random, quant_type, 33, 256).pack(&cpu);
        let mut values = random.vec(7 * 256);
        values[3 * 256 + 30] = f32::NAN;
        values[5 * 256 + 255] = f32::NEG_INFINITY;
        let x = Operand::from_f32(OperandFormat::Int8, 7, 256, &values);
        let mut out = vec![0.0; 7 * 33];
        matmul(&cpu, &x, &weight, &mut out).expect("sizes fit");
        for (row, out) in out.chunks_exact(33).enumerate() {
            let is_bad = row == 3 || row == 5;
            assert!(out.iter().all(|value| value.is_nan() == is_bad), "{} {} row {row}", isa.name(), quant_type.name());
        }
    }
}

/// What cannot be stored or multiplied is refused by name.
#[test]
fn impossible_products_are_refused() {
    let cpu = cpu(Isa::Portable, 1);
    let bytes = vec![0; 4 * 48 * 2];
    let source =
        MatrixSource { bytes: &bytes, encoding: DType::F32.into(), out_features: 2, in_features: 48, bias: None };
    let error = PackedLinear::pack(&cpu, &[(source, WeightFormat::Quant(QuantType::Q8_0))]).expect_err("48 columns");
    assert!(matches!(error, Error::InvalidSize { dimension: "in_features", value: 48, .. }), "{error}");
    assert_eq!(WeightFormat::Quant(QuantType::Q8_0).packed_bytes(2, 48), None);
    let blocks = MatrixSource { encoding: Encoding::Blocks(QuantType::Q4_K), in_features: 256, ..source };
    let error = PackedLinear::pack(&cpu, &[(blocks, WeightFormat::F32)]).expect_err("bytes").to_string();
    assert!(error.contains("bytes is 384, must be 288"), "{error}");
    let mut bytes = vec![0; 4 * 32 * 2];
    bytes[4 * 40..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
    let source = MatrixSource { bytes: &bytes, in_features: 32, ..source };
    let error = PackedLinear::pack(&cpu, &[(source, WeightFormat::Quant(QuantType::Q8_0))]).expect_err("a NaN");
    assert!(matches!(error, Error::NonFiniteValue { .. }), "{error}");
    let weight = Matrix::encoded(&mut Random(6), QuantType::Q4_0, 3, 32).pack(&cpu);
    let x = Operand::zeros(OperandFormat::F32, 2, 32);
    let error = matmul(&cpu, &x, &weight, &mut [0.0; 6]).expect_err("f32 activations").to_string();
    assert!(error.contains("multiplies f32 activations with q4_0 weights"), "{error}");
}
