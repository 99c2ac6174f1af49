//! The machine as ns-node's pages show it: load, processor, memory, as Linux tells them; elsewhere zeros.

use std::fs::read_to_string;
use std::thread::available_parallelism;

use serde::Serialize;

/// Bytes of a page, on every system that has `/proc/self/statm` and runs this engine.
const PAGE_BYTES: u64 = 4096;

/// Mean numbers of tasks that could run, over 1, 5 and 15 minutes.
pub(crate) fn load_average() -> [f64; 3] {
    let text = read_to_string("/proc/loadavg").unwrap_or_default();
    let mut words = text.split_whitespace().map(|word| word.parse().unwrap_or(0.0));
    [(); 3].map(|()| words.next().unwrap_or(0.0))
}

/// What the processor is called, and its cores.
pub(crate) fn processor() -> (String, usize) {
    let text = read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let model = model.map_or("unknown", |(_, name)| name).to_string();
    (model, available_parallelism().map_or(1, usize::from))
}

/// Bytes.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(crate) struct Memory {
    pub(crate) total: u64,
    pub(crate) free: u64,
    pub(crate) process: ProcessMemory,
}

/// Bytes.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(crate) struct ProcessMemory {
    pub(crate) rss: u64,
}

pub(crate) fn memory() -> Memory {
    let text = read_to_string("/proc/meminfo").unwrap_or_default();
    let bytes = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let kibibytes = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
        kibibytes.unwrap_or(0) << 10
    };
    let statm = read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = statm.split_whitespace().nth(1).and_then(|pages| pages.parse::<u64>().ok()).unwrap_or(0);
    Memory { total: bytes("MemTotal"), free: bytes("MemAvailable"), process: ProcessMemory { rss: pages * PAGE_BYTES } }
}
