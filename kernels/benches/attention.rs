//! How near attention comes to what the machine can do: prefill in GFLOP/s beside the FMA peak, decoding in GB/s of keys
//! and values beside a plain read of memory, by type of the KV blocks and length of the context. Heads of a 0.6B model.
//! Plain loops and the best of several runs; one thread is timed in CPU time, which other processes disturb less.
//!
//! `cargo bench -p ns-llm-kernels --bench attention [-- threads...]`

#[path = "support/machine.rs"]
mod machine;

use std::sync::Arc;

use machine::{STREAM_BYTES, best_of, peak_gflops, read_gbytes};
use ns_llm_kernels::cpu::Cpu;
use ns_llm_kernels::cpu::attention::{AttentionBatch, AttentionSequence, AttentionShape, paged_attention};
use ns_llm_kernels::cpu::kv_blocks::{KvBlocks, KvBlocksLayout, KvDtype};
use ns_llm_kernels::cpu::linear::{Operand, OperandFormat};
use ns_llm_kernels::cpu::pool::{Pool, PoolPriority};

const SHAPE: AttentionShape = AttentionShape {
    num_heads: 16,
    num_kv_heads: 8,
    head_dim: 128,
    scale: 0.09,
    sliding_window_tokens: None,
    causal: true,
};
const BLOCK_TOKENS: usize = 16;
/// Rows of a step of prefill.
const PREFILL_ROWS: usize = 512;

fn main() {
    let arguments: Vec<usize> = std::env::args().filter_map(|argument| argument.parse().ok()).collect();
    let thread_counts = if arguments.is_empty() { vec![1, 2] } else { arguments };
    for threads in thread_counts {
        let pool = Pool::new(threads, PoolPriority::Normal).expect("a few threads");
        let cpu = Cpu::new(Arc::new(pool)).expect("a known instruction set");
        let (peak_gflops, peak_gbytes) = (peak_gflops(&cpu), read_gbytes(&cpu));
        println!(
            "{}, {threads} threads: peak {peak_gflops:.0} GFLOP/s, memory {peak_gbytes:.1} GB/s",
            cpu.isa().name()
        );
        for dtype in [KvDtype::F32, KvDtype::F16, KvDtype::Bf16, KvDtype::Int8] {
            for context in [512, 4096, 16384] {
                let mut bench = Bench::new(dtype, context, &[PREFILL_ROWS]);
                let gflops = bench.flops() / bench.seconds_of_layer(&cpu) / 1e9;
                let share = 100.0 * gflops / peak_gflops;
                println!(
                    "  {dtype:?} {PREFILL_ROWS} rows up to {context:5}: {gflops:5.1} GFLOP/s = {share:2.0} % of peak"
                );
            }
            for (sequences, context) in [(1, 512), (1, 4096), (1, 16384), (16, 1024), (256, 64)] {
                let mut bench = Bench::new(dtype, context, &vec![1; sequences]);
                let seconds = bench.seconds_of_layer(&cpu);
                let (gbytes, gflops) = (bench.kv_bytes() / seconds / 1e9, bench.flops() / seconds / 1e9);
                let (memory, compute) = (100.0 * gbytes / peak_gbytes, 100.0 * gflops / peak_gflops);
                println!(
                    "  {dtype:?} {sequences:3} sequences of {context:5}: {:7.1} us a layer, {gbytes:4.1} GB/s = {memory:3.0} %, {gflops:5.1} GFLOP/s = {compute:2.0} %",
                    1e6 * seconds
                );
            }
        }
    }
}

/// One step over as many layers as make the caches forget each before it comes again.
struct Bench {
    kv: KvBlocks,
    context: usize,
    q: Vec<f32>,
    sequences: Vec<AttentionSequence>,
    block_tables: Vec<u32>,
    out: Operand,
}

impl Bench {
    /// Sequences of `context` tokens each, of which the last `rows[i]` are the step's.
    fn new(dtype: KvDtype, context: usize, rows: &[usize]) -> Bench {
        let table_blocks = context.div_ceil(BLOCK_TOKENS);
        let layout = KvBlocksLayout {
            num_layers: 1,
            num_blocks: table_blocks * rows.len(),
            block_tokens: BLOCK_TOKENS,
            num_kv_heads: SHAPE.num_kv_heads,
            head_dim: SHAPE.head_dim,
            dtype,
        };
        let num_layers = STREAM_BYTES.div_ceil(layout.num_blocks * layout.block_bytes());
        let layout = KvBlocksLayout { num_layers, ..layout };
        let mut kv = KvBlocks::new(layout).expect("less than a GiB");
        // Each byte so: a small number in every type, its scale too.
        (0..layout.num_blocks as u32).for_each(|block| kv.block_mut(block).fill(0x3c));
        let num_rows: usize = rows.iter().sum();
        let width = SHAPE.num_heads * SHAPE.head_dim;
        let mut next_row = 0;
        let sequences = rows.iter().enumerate().map(|(idx, &rows)| {
            next_row += rows;
            AttentionSequence {
                rows: next_row - rows..next_row,
                first_position: context - rows,
                blocks: idx * table_blocks..(idx + 1) * table_blocks,
            }
        });
        Bench {
            kv,
            context,
            q: (0..num_rows * width).map(|i| (i * 31 % 997) as f32 * 1e-3 - 0.5).collect(),
            sequences: sequences.collect(),
            // Out of order, as a pool in use deals them.
            block_tables: (0..layout.num_blocks as u32).rev().collect(),
            out: Operand::zeros(OperandFormat::F32, num_rows, width),
        }
    }

    /// Time of one layer when none is in the caches.
    fn seconds_of_layer(&mut self, cpu: &Cpu) -> f64 {
        let Bench { kv, q, sequences, block_tables, out, .. } = self;
        let batch = AttentionBatch { q, q_stride: SHAPE.num_heads * SHAPE.head_dim, sequences, block_tables };
        let num_layers = kv.layout().num_layers;
        // Prefill is arithmetic: a few layers tell.
        let layers = if out.rows() >= PREFILL_ROWS { num_layers.min(2) } else { num_layers };
        let best = best_of(cpu.pool().num_threads(), 5, || {
            for layer_idx in 0..layers {
                paged_attention(cpu, (layer_idx, &SHAPE), &batch, kv, out).expect("sizes fit");
            }
        });
        best / layers as f64
    }

    /// Multiply-adds of one layer, which count twice: a score and a weighted value for each key that a row sees.
    fn flops(&self) -> f64 {
        let keys_seen = self.sequences.iter().flat_map(|s| (0..s.rows.len()).map(|row| s.first_position + row + 1));
        4.0 * (SHAPE.num_heads * SHAPE.head_dim * keys_seen.sum::<usize>()) as f64
    }

    /// Bytes of one layer's keys and values.
    fn kv_bytes(&self) -> f64 {
        let layout = self.kv.layout();
        let blocks = self.sequences.len() * self.context.div_ceil(BLOCK_TOKENS);
        (blocks * layout.block_bytes() / layout.num_layers) as f64
    }
}
