//! What was enqueued on a device that plays a GPU: kernels, fills and copies wait there, with their arguments, until
//! somebody waits for them, as late as a driver may run them. So whoever reads a result before it has arrived, or writes
//! over what a copy has yet to read, is found out. What is captured waits there too, and runs again with the addresses
//! that it had; memory that is not there any more is named.

use std::collections::VecDeque;
use std::sync::Arc;

use ns_llm_kernels::cuda::driver::Mark;
use ns_llm_kernels::cuda::launch::{Argument, Launch, Tiles};

/// One thing that was enqueued.
#[derive(Clone)]
pub(crate) enum Work {
    Launch(OwnedLaunch),
    Fill {
        address: u64,
        byte: u8,
        num_bytes: usize,
    },
    Upload {
        address: u64,
        bytes: Vec<u8>,
    },
    /// Reads pinned memory, when it runs.
    UploadPinned {
        address: u64,
        source: u64,
        num_bytes: usize,
    },
    DownloadPinned {
        target: u64,
        address: u64,
        num_bytes: usize,
    },
    /// All of a captured step.
    Replay(Arc<Vec<Captured>>),
    Mark(Mark),
}

/// Something that was captured, and the allocations that it names: address and number of each.
pub(crate) struct Captured {
    pub(crate) work: Work,
    pub(crate) allocations: Vec<(u64, u64)>,
}

/// A launch whose arguments are its own.
#[derive(Clone)]
pub(crate) struct OwnedLaunch {
    file: &'static str,
    kernel: &'static str,
    grid: [u32; 3],
    threads: u32,
    shared_bytes: u32,
    arguments: Vec<OwnedArgument>,
}

#[derive(Clone)]
enum OwnedArgument {
    Address(u64),
    Int(i32),
    Unsigned(u32),
    Float(f32),
    Struct(Vec<u8>),
    Tiles(Tiles),
}

/// What waits, oldest first, and what was noted for a capture.
#[derive(Default)]
pub(crate) struct Queue {
    pub(crate) waiting: VecDeque<Work>,
    pub(crate) capturing: Option<Vec<Captured>>,
    /// Marks that were asked for once before what lies in front of them had run.
    pub(crate) asked: Vec<Mark>,
}

impl OwnedLaunch {
    pub(crate) fn new(launch: &Launch<'_>) -> OwnedLaunch {
        let &Launch { file, kernel, grid, threads, shared_bytes, arguments } = launch;
        let owned = arguments.iter().map(|argument| match *argument {
            Argument::Address(address) => OwnedArgument::Address(address),
            Argument::Int(value) => OwnedArgument::Int(value),
            Argument::Unsigned(value) => OwnedArgument::Unsigned(value),
            Argument::Float(value) => OwnedArgument::Float(value),
            Argument::Struct(bytes) => OwnedArgument::Struct(bytes.to_vec()),
            Argument::Tiles(tiles) => OwnedArgument::Tiles(*tiles),
        });
        OwnedLaunch { file, kernel, grid, threads, shared_bytes, arguments: owned.collect() }
    }

    /// Gives it to `run` as it was.
    pub(crate) fn run<R>(&self, run: impl FnOnce(&Launch<'_>) -> R) -> R {
        let &OwnedLaunch { file, kernel, grid, threads, shared_bytes, ref arguments } = self;
        let arguments = arguments.iter().map(|argument| match argument {
            OwnedArgument::Address(address) => Argument::Address(*address),
            OwnedArgument::Int(value) => Argument::Int(*value),
            OwnedArgument::Unsigned(value) => Argument::Unsigned(*value),
            OwnedArgument::Float(value) => Argument::Float(*value),
            OwnedArgument::Struct(bytes) => Argument::Struct(bytes),
            OwnedArgument::Tiles(tiles) => Argument::Tiles(tiles),
        });
        let arguments: Vec<Argument<'_>> = arguments.collect();
        run(&Launch { file, kernel, grid, threads, shared_bytes, arguments: &arguments })
    }

    /// Whatever in the arguments may be an address: those of arrays and tiles, and each aligned word of a `struct`.
    pub(crate) fn addresses(&self) -> impl Iterator<Item = u64> + '_ {
        self.arguments.iter().flat_map(|argument| match argument {
            OwnedArgument::Address(address) => vec![*address],
            OwnedArgument::Tiles(tiles) => vec![tiles.address],
            OwnedArgument::Struct(bytes) => {
                bytes.as_chunks::<8>().0.iter().map(|word| u64::from_ne_bytes(*word)).collect()
            }
            OwnedArgument::Int(_) | OwnedArgument::Unsigned(_) | OwnedArgument::Float(_) => Vec::new(),
        })
    }
}

impl Work {
    /// Addresses on the device that it names.
    pub(crate) fn addresses(&self) -> Vec<u64> {
        match self {
            Work::Launch(launch) => launch.addresses().collect(),
            Work::Fill { address, .. } => vec![*address],
            _ => Vec::new(),
        }
    }
}
