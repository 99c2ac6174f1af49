//! A device's memory: what is read back several pieces at a time, what goes there and comes back while nobody waits, and
//! what captured steps keep.

use ns_llm_cuda_shim::{Fault, FaultyDevice, IdleDevice};
use ns_llm_kernels::cuda::memory::Memory;
use ns_llm_kernels::cuda::transfer::Transfer;
use ns_llm_kernels::error::Error;

use crate::Test;

/// The tests of this file. They need no compiler: no kernel runs.
pub(crate) const TESTS: &[Test] = &[
    ("pieces are read with and without pinned memory", pieces_are_read_with_and_without_pinned_memory),
    ("two steps' numbers are under way at once", transfers_overlap),
    ("captured steps keep the memory that they use", captured_steps_keep_their_memory),
];

/// What was sent for a step arrives behind what was sent for the one before, also when both are under way: the device
/// begins when somebody waits. A transfer that is dropped waits for what it started.
fn transfers_overlap() {
    let memory = Memory::new(IdleDevice::new(1 << 20));
    let mut buffer = memory.filled("a test's numbers", &[&[0_u32; 8]]).expect("it fits");
    let [mut first, mut second, mut third] = std::array::from_fn(|_| Transfer::new(&memory, 8, 4).expect("it fits"));
    first.send(&[1, 2, 3, 4, 5], &mut buffer).expect("sent");
    first.fetch(&buffer, 4).expect("fetched");
    second.send(&[6, 7], &mut buffer).expect("sent");
    second.fetch(&buffer, 3).expect("fetched");
    third.send(&[8; 8], &mut buffer).expect("sent");
    assert_eq!(first.take(), Ok(vec![1, 2, 3, 4]), "not what was sent behind it");
    assert_eq!(second.take(), Ok(vec![6, 7, 3]), "not what was there before");
    third.abandon().expect("nothing hangs");
    first.send(&[9], &mut buffer).expect("sent again");
    first.fetch(&buffer, 1).expect("fetched");
    drop(first);
    let mut all = [0; 8];
    buffer.download(0, &mut all).expect("read");
    assert_eq!(all, [9, 8, 8, 8, 8, 8, 8, 8]);
}

/// A second step of the same sizes, captured, asks the driver for nothing, whatever plain steps did in between; a buffer
/// that lasted and is dropped stays allocated until no captured step can use it; and a capture that asks for more fails,
/// typed, with nothing kept.
fn captured_steps_keep_their_memory() {
    let device = IdleDevice::new(1 << 20);
    let memory = Memory::new(device.clone());
    let step = || {
        let first = memory.scratch::<u32>("a step", 5_000)?;
        drop(memory.scratch::<u32>("a step", 100)?);
        memory.scratch::<u32>("a step", 3_000).map(|_| drop(first))
    };
    {
        let _scratch = memory.captured_scratch();
        step().expect("it fits");
    }
    let used = device.used_bytes();
    drop(memory.scratch::<u32>("a plain step", 200).expect("it fits"));
    assert!(device.used_bytes() > used, "a plain step got the memory of captured ones");
    let used = device.used_bytes();
    let mut captured = memory.capture(&mut || step()).expect("nothing is allocated");
    captured.launch().expect("runs");
    assert_eq!(device.used_bytes(), used);
    let more = memory.capture(&mut || memory.scratch::<u32>("more", 50_000).map(drop));
    assert!(matches!(more.err(), Some(Error::CudaDriver { call: "cuMemAlloc", .. })), "a capture has allocated");
    let lasting = memory.zeroed::<u32>("weights", 1_000).expect("it fits");
    let used = device.used_bytes();
    drop(lasting);
    assert_eq!(device.used_bytes(), used, "a captured step may use it");
    drop(captured);
    assert_eq!(device.used_bytes(), used - 4_000);
    memory.forget_captured();
    assert!(device.used_bytes() < 10_000, "{} bytes of plain steps", device.used_bytes());
}

/// More pieces than pinned memory holds, out of order: each is what was written there. Where there is no pinned memory to
/// be had, which is seen to have been refused, they come one by one.
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
