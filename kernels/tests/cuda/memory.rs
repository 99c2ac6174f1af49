//! A device's memory: what is read back several pieces at a time.

use ns_llm_cuda_shim::{Fault, FaultyDevice, IdleDevice};
use ns_llm_kernels::cuda::memory::Memory;

use crate::Test;

/// The tests of this file. They need no compiler: no kernel runs.
pub(crate) const TESTS: &[Test] =
    &[("pieces are read with and without pinned memory", pieces_are_read_with_and_without_pinned_memory)];

/// More pieces than pinned memory holds, out of order: each is what was written there. Where there is no pinned memory to be had, which is
/// seen to have been refused, they come one by one.
fn pieces_are_read_with_and_without_pinned_memory() {
    const PIECE_BYTES: usize = 6 << 20;
    let numbers: Vec<u32> = (0..3 * PIECE_BYTES as u32 / 4).collect();
    let starts = [PIECE_BYTES, 0, 2 * PIECE_BYTES];
    for is_full in [false, true] {
        let device = FaultyDevice::new(IdleDevice::new(32 << 20), Fault::OutOfMemory);
        let buffer = Memory::new(device.clone()).filled("a test's numbers", &[&numbers]).expect("it fits");
        device.fail_from(is_full.then(|| device.num_calls()));
        let pieces = buffer.download_pieces(&starts, PIECE_BYTES).expect("they are read");
        assert_eq!(pieces.len(), starts.len());
        for (piece, start) in pieces.iter().zip(starts) {
            let want = numbers[start / 4..(start + PIECE_BYTES) / 4].iter().map(|number| number.to_ne_bytes());
            assert!(
                piece.as_chunks().0.iter().copied().eq(want),
                "the piece at {start}, pinned memory refused: {is_full}"
            );
        }
        assert_eq!(device.num_faults() > 0, is_full);
    }
}
