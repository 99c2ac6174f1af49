//! What a machine can do, measured beside what is done with it: the FMA peak from the core clock, a plain read of memory,
//! and times that other processes disturb as little as can be.

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use ns_llm_kernels::cpu::{Cpu, Isa};
use ns_llm_kernels::host::HugeBuffer;

/// Bytes that one pass over "memory" reads: far more than any cache.
pub(crate) const STREAM_BYTES: usize = 320 << 20;

/// GFLOP/s in f32 multiply-adds, which count twice.
pub(crate) fn peak_gflops(cpu: &Cpu) -> f64 {
    let flops_per_cycle = match cpu.isa() {
        Isa::Portable => 8.0,
        _ => 32.0, // two FMAs of eight lanes, or one of sixteen; more on servers that have two of sixteen
    };
    cpu.pool().num_threads() as f64 * core_clock_ghz() * flops_per_cycle
}

/// Seconds of the calling thread's CPU when it computes alone, else of the clock on the wall.
fn seconds(threads: usize) -> f64 {
    #[cfg(target_os = "linux")]
    if threads == 1 {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: writes one timespec.
        unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
        return time.tv_sec as f64 + 1e-9 * time.tv_nsec as f64;
    }
    static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_secs_f64()
}

/// Shortest of `repeats` runs, in seconds.
pub(crate) fn best_of(threads: usize, repeats: usize, mut run: impl FnMut()) -> f64 {
    let time = |_| {
        let start = seconds(threads);
        run();
        seconds(threads) - start
    };
    (0..repeats).map(time).fold(f64::INFINITY, f64::min)
}

/// A chain of one "or" and one multiplication takes four cycles a link on the cores this was written for.
fn core_clock_ghz() -> f64 {
    const LINKS: u64 = 2_000_000;
    let best = best_of(1, 5, || {
        let chain = (0..LINKS).fold(black_box(3_u64), |x, _| x.wrapping_mul(x | 1));
        black_box(chain);
    });
    4.0 * LINKS as f64 / best / 1e9
}

/// GB/s of plain sums over memory, on all threads.
pub(crate) fn read_gbytes(cpu: &Cpu) -> f64 {
    const ITEM: usize = 1 << 20;
    let mut buffer = HugeBuffer::zeroed("bench", STREAM_BYTES).expect("less than a GiB");
    buffer.as_mut_slice::<u64>().fill(1);
    let numbers = buffer.as_slice::<u64>();
    let best = best_of(cpu.pool().num_threads(), 5, || {
        let total = AtomicU64::new(0);
        cpu.pool().run(numbers.len().div_ceil(ITEM), 1, |items| {
            let part = &numbers[items.start * ITEM..numbers.len().min(items.end * ITEM)];
            total.fetch_add(part.iter().sum(), Ordering::Relaxed);
        });
        black_box(total);
    });
    buffer.len_bytes() as f64 / best / 1e9
}
