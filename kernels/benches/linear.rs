//! How near matrix products come to what the machine can do: prefill and batched decode in GFLOP/s beside the FMA peak
//! (core clock times the FMA lanes of the instruction set), decode of one row in GB/s of weights beside a plain read of
//! memory. Plain loops and the best of several runs; one thread is timed in CPU time, which other processes disturb less.
//!
//! Quantized weights are multiplied in integers: their share of the FMA peak may exceed 100 %.
//!
//! `cargo bench -p ns-llm-kernels --bench linear [-- threads... formats...]`

#[path = "support/machine.rs"]
mod machine;

use std::sync::Arc;

use machine::{STREAM_BYTES, best_of, peak_gflops, read_gbytes};
use ns_llm_kernels::cpu::Cpu;
use ns_llm_kernels::cpu::linear::{MatrixSource, Operand, OperandFormat, PackedLinear, WeightFormat, matmul};
use ns_llm_kernels::cpu::pool::{Pool, PoolPriority};
use ns_llm_kernels::dtype::DType;
use ns_llm_kernels::quant::QuantType;

/// Shapes of a layer of a 0.6B model, `[in, out]`.
const SHAPES: [(usize, usize); 2] = [(1024, 3072), (3072, 1024)];

fn main() {
    let arguments: Vec<usize> = std::env::args().filter_map(|argument| argument.parse().ok()).collect();
    let names: Vec<String> = std::env::args().skip(1).filter(|name| !name.starts_with('-')).collect();
    let names: Vec<String> = names.into_iter().filter(|name| name.parse::<usize>().is_err()).collect();
    let thread_counts = if arguments.is_empty() { vec![1, 2] } else { arguments };
    for threads in thread_counts {
        let pool = Pool::new(threads, PoolPriority::Normal).expect("a few threads");
        let cpu = Cpu::new(Arc::new(pool)).expect("a known instruction set");
        let peak_gflops = peak_gflops(&cpu);
        let peak_gbytes = read_gbytes(&cpu);
        println!(
            "{}, {threads} threads: peak {peak_gflops:.0} GFLOP/s, memory {peak_gbytes:.1} GB/s",
            cpu.isa().name()
        );
        let quantized = [QuantType::Q8_0, QuantType::Q4_K, QuantType::Q6_K, QuantType::Q4_0].map(WeightFormat::Quant);
        let formats = quantized.into_iter().chain([WeightFormat::Bf16, WeightFormat::F16, WeightFormat::F32]);
        for format in formats.filter(|format| names.is_empty() || names.iter().any(|name| name == format.name())) {
            for (in_features, out_features) in SHAPES {
                let weight = packed(&cpu, format, in_features, out_features);
                for rows in [512, 16] {
                    let gflops = product_gflops(&cpu, &weight, rows);
                    let share = 100.0 * gflops / peak_gflops;
                    println!(
                        "  {:4} [{rows:3}, {in_features}] x [{out_features}]: {gflops:5.1} GFLOP/s = {share:2.0} % of peak",
                        format.name()
                    );
                }
            }
            let (in_features, out_features) = SHAPES[0];
            let weight_bytes = packed(&cpu, format, in_features, out_features).len_bytes();
            let weights: Vec<PackedLinear> =
                (0..STREAM_BYTES / weight_bytes).map(|_| packed(&cpu, format, in_features, out_features)).collect();
            for rows in [1, 2, 4, 8, 16, 32] {
                let (gbytes, gflops) = stream(&cpu, &weights, rows);
                let (memory, compute) = (100.0 * gbytes / peak_gbytes, 100.0 * gflops / peak_gflops);
                println!(
                    "  {:4} {rows:2} rows, weights from memory: {gbytes:4.1} GB/s = {memory:3.0} %, {gflops:5.1} GFLOP/s = {compute:2.0} %",
                    format.name()
                );
            }
        }
    }
}

fn packed(cpu: &Cpu, format: WeightFormat, in_features: usize, out_features: usize) -> PackedLinear {
    // bf16 between 0.5 and 1: any numbers do, as long as they are normal.
    let bytes: Vec<u8> = (0..in_features * out_features).flat_map(|i| [(i * 7919 % 128) as u8, 0x3f]).collect();
    let source = MatrixSource { bytes: &bytes, encoding: DType::Bf16.into(), out_features, in_features, bias: None };
    PackedLinear::pack(cpu, &[(source, format)]).expect("sizes fit")
}

fn operand(cpu: &Cpu, weight: &PackedLinear, rows: usize) -> Operand {
    let values: Vec<f32> = (0..rows * weight.in_features()).map(|i| (i * 31 % 997) as f32 * 1e-3).collect();
    Operand::from_f32(
        OperandFormat::for_weights(cpu, weight.formats().next().expect("one section")),
        rows,
        weight.in_features(),
        &values,
    )
}

/// One matrix again and again.
fn product_gflops(cpu: &Cpu, weight: &PackedLinear, rows: usize) -> f64 {
    let x = operand(cpu, weight, rows);
    let mut out = vec![0.0; rows * weight.out_features()];
    let best = best_of(cpu.pool().num_threads(), 10_000 / (rows + 500), || {
        matmul(cpu, &x, weight, &mut out).expect("sizes fit");
    });
    2.0 * (out.len() * weight.in_features()) as f64 / best / 1e9
}

/// All matrices one after the other: GB/s of weights and GFLOP/s.
fn stream(cpu: &Cpu, weights: &[PackedLinear], rows: usize) -> (f64, f64) {
    let x = operand(cpu, &weights[0], rows);
    let mut out = vec![0.0; rows * weights[0].out_features()];
    let best = best_of(cpu.pool().num_threads(), 3, || {
        for weight in weights {
            matmul(cpu, &x, weight, &mut out).expect("sizes fit");
        }
    });
    let bytes: usize = weights.iter().map(PackedLinear::len_bytes).sum();
    let flops = 2.0 * (out.len() * weights[0].in_features() * weights.len()) as f64;
    (bytes as f64 / best / 1e9, flops / best / 1e9)
}
