//! Tests are written once, with numbers in vectors. Where kernels cannot read those, a mirror stands between: for each launch
//! it copies what the arguments point to into memory that kernels can read, lets them point there, and copies back what may
//! have been written.
//!
//! Which bytes an address stands for is known from [`slice`] and [`slice_mut`], which note them.

use std::cell::RefCell;

use ns_llm_kernels::cuda::launch::{Argument, Launch, Slice, SliceMut, Stream};
use ns_llm_kernels::error::Result;

use crate::Test;
use crate::shim::{Schedule, Shim};

/// The tests of this file.
pub(crate) const TESTS: &[Test] = &[("a mirror leaves a kernel nothing but its copies", a_mirror_moves_everything)];

/// Bytes that were lent to kernels.
#[derive(Debug, Clone, Copy)]
struct Lent {
    address: u64,
    bytes: usize,
    is_mutable: bool,
}

thread_local! {
    /// Of the last slices of this thread. A later one is right where two overlap: it was made while the memory was its own.
    static LENT: RefCell<Vec<Lent>> = const { RefCell::new(Vec::new()) };
}

/// More slices than a launch has arguments, so that all of its own are there.
const MAX_LENT: usize = 256;

fn lend<T>(address: u64, len: usize, is_mutable: bool) {
    LENT.with_borrow_mut(|lent| {
        if lent.len() == MAX_LENT {
            lent.remove(0);
        }
        lent.push(Lent { address, bytes: len * size_of::<T>(), is_mutable });
    });
}

/// Numbers for kernels to read.
pub(crate) fn slice<T>(values: &[T]) -> Slice<'_, T> {
    lend::<T>(values.as_ptr() as u64, values.len(), false);
    // SAFETY: a test's kernels run inside the call that launches them, on the host's memory or on copies of it.
    unsafe { Slice::from_raw(values.as_ptr() as u64, values.len()) }
}

/// Numbers for kernels to write.
pub(crate) fn slice_mut<T>(values: &mut [T]) -> SliceMut<'_, T> {
    lend::<T>(values.as_ptr() as u64, values.len(), true);
    // SAFETY: as above, and the borrow is exclusive.
    unsafe { SliceMut::from_raw(values.as_mut_ptr() as u64, values.len()) }
}

/// Memory that the kernels of a stream can use.
pub(crate) trait Memory: Stream {
    /// Bytes there; freed when dropped.
    type Copy;
    /// Copies bytes there.
    fn upload(&self, bytes: &[u8]) -> Result<Self::Copy>;
    /// Where the copy begins.
    fn address(copy: &Self::Copy) -> u64;
    /// Waits for the kernels and copies back.
    fn download(&self, copy: &Self::Copy, bytes: &mut [u8]) -> Result<()>;
}

/// Launches on `memory` what has its arguments here.
pub(crate) fn launch_mirrored<M: Memory>(memory: &M, launch: &Launch<'_>) -> Result<()> {
    let mut copies: Vec<(Lent, M::Copy)> = Vec::new();
    let mut moved = |address: u64| -> Result<u64> {
        let is_inside = |lent: &Lent| lent.address <= address && address < lent.address + lent.bytes as u64;
        let lent = LENT.with_borrow(|lent| lent.iter().rev().copied().find(is_inside));
        let Some(lent) = lent else { return Ok(address) };
        let known = copies.iter().position(|(known, _)| known.address == lent.address && known.bytes == lent.bytes);
        let place = match known {
            Some(place) => place,
            None => {
                // SAFETY: the latest slice over this address is the argument's own, whose borrow lasts until after the launch.
                let bytes = unsafe { std::slice::from_raw_parts(lent.address as *const u8, lent.bytes) };
                copies.push((lent, memory.upload(bytes)?));
                copies.len() - 1
            }
        };
        Ok(M::address(&copies[place].1) + (address - lent.address))
    };
    // Structs first: arguments borrow the changed bytes.
    let (mut structs, mut tiles) = (Vec::new(), Vec::new());
    for argument in launch.arguments {
        if let Argument::Tiles(of) = argument {
            tiles.push(of.moved_to(moved(of.address)?));
        }
        if let Argument::Struct(bytes) = argument {
            let mut bytes = bytes.to_vec();
            // Addresses are fields of 8 bytes, aligned in a struct of C. A size that looks like an address of this process
            // would have to be beyond 2^40.
            for word in bytes.as_chunks_mut::<8>().0 {
                *word = moved(u64::from_ne_bytes(*word))?.to_ne_bytes();
            }
            structs.push(bytes);
        }
    }
    let (mut next_struct, mut next_tiles) = (structs.iter(), tiles.iter());
    let mut arguments = Vec::new();
    for argument in launch.arguments {
        arguments.push(match argument {
            Argument::Address(address) => Argument::Address(moved(*address)?),
            Argument::Struct(_) => Argument::Struct(next_struct.next().expect("one for each")),
            Argument::Tiles(_) => Argument::Tiles(next_tiles.next().expect("one for each")),
            other => *other,
        });
    }
    memory.launch(&Launch { arguments: &arguments, ..*launch })?;
    for (lent, copy) in copies.iter().filter(|(lent, _)| lent.is_mutable) {
        // SAFETY: a mutable slice borrows these bytes alone until after the launch.
        let bytes = unsafe { std::slice::from_raw_parts_mut(lent.address as *mut u8, lent.bytes) };
        memory.download(copy, bytes)?;
    }
    Ok(())
}

/// The shim with memory of its own: what a device is to a mirror.
struct ShimMemory(Shim);

impl Stream for ShimMemory {
    fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        self.0.launch_here(launch)
    }
}

impl Memory for ShimMemory {
    type Copy = Vec<u128>;
    fn upload(&self, bytes: &[u8]) -> Result<Vec<u128>> {
        let mut copy = vec![0_u128; bytes.len().div_ceil(16)];
        // SAFETY: the vector has at least as many bytes.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), copy.as_mut_ptr().cast(), bytes.len()) };
        Ok(copy)
    }
    fn address(copy: &Vec<u128>) -> u64 {
        copy.as_ptr() as u64
    }
    fn download(&self, copy: &Vec<u128>, bytes: &mut [u8]) -> Result<()> {
        // SAFETY: as in `upload`.
        unsafe { std::ptr::copy_nonoverlapping(copy.as_ptr().cast(), bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }
}

/// Through a mirror a kernel with a struct of addresses, some inside an array, gives what it gives without; and a kernel
/// cannot reach the original: what it writes to a slice that is only read is not copied back.
fn a_mirror_moves_everything() {
    struct Mirrored(ShimMemory);
    impl Stream for Mirrored {
        fn launch(&self, launch: &Launch<'_>) -> Result<()> {
            launch_mirrored(&self.0, launch)
        }
    }
    let mirrored = Mirrored(ShimMemory(Shim::new(Schedule::TAME)));
    crate::elementwise::check_mirrored(&mirrored);
    let (mut out, table) = (vec![7.0_f32; 8], vec![1.0_f32; 8]);
    let arguments = [slice(&table).argument(), slice(&[0_u32]).argument(), slice(&out).argument()];
    let arguments = [&arguments[..], &[Argument::Int(1), Argument::Int(8)]].concat();
    let launch = |arguments: &[Argument<'_>]| {
        let (file, kernel) = ("embedding", "select_rows");
        mirrored.launch(&Launch { file, kernel, grid: [1, 1, 1], threads: 32, shared_bytes: 0, arguments })
    };
    launch(&arguments).expect("sizes fit");
    assert_eq!(out, [7.0; 8]);
    let _ = slice_mut(&mut out);
    launch(&arguments).expect("sizes fit");
    assert_eq!(out, [1.0; 8]);
}
