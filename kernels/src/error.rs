//! What can go wrong in the kernels: sizes that do not fit together, memory or threads that cannot be had.

/// Result of a kernel's entry point.
pub type Result<T> = std::result::Result<T, Error>;

/// A refusal; nothing was computed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Memory could not be had.
    #[error("{purpose} needs {needed_bytes} bytes, {available_bytes} are available")]
    OutOfMemory {
        /// What it was for.
        purpose: &'static str,
        /// What was asked.
        needed_bytes: u64,
        /// What is there.
        available_bytes: u64,
    },
    /// Two sizes that must be equal are not.
    #[error("{operation}: {dimension} is {actual}, must be {expected}")]
    SizeMismatch {
        /// Name of the entry point.
        operation: &'static str,
        /// Which size.
        dimension: &'static str,
        /// What the other arguments ask for.
        expected: usize,
        /// What was given.
        actual: usize,
    },
    /// A size is impossible by itself.
    #[error("{operation}: {dimension} is {value}, must be {expected}")]
    InvalidSize {
        /// Name of the entry point.
        operation: &'static str,
        /// Which size.
        dimension: &'static str,
        /// What was given.
        value: usize,
        /// What is possible, in words.
        expected: &'static str,
    },
    /// An index points behind the end.
    #[error("{operation}: {index} {value} is not below {limit}")]
    IndexOutOfRange {
        /// Name of the entry point.
        operation: &'static str,
        /// Which index.
        index: &'static str,
        /// What was given.
        value: usize,
        /// The first that is too large.
        limit: usize,
    },
    /// A number that must be finite is not.
    #[error("{operation}: value {value_idx} is NaN or infinite, must be finite")]
    NonFiniteValue {
        /// Name of the entry point.
        operation: &'static str,
        /// Which value, the first of several.
        value_idx: usize,
    },
    /// The activations are in a form that this product does not read.
    #[error("{operation}: no kernel of `{isa}` multiplies {operand} activations with {weight} weights")]
    UnsupportedFormats {
        /// Name of the entry point.
        operation: &'static str,
        /// Name of the instruction set.
        isa: &'static str,
        /// Form of the activations.
        operand: &'static str,
        /// Form of the weights.
        weight: &'static str,
    },
    /// An instruction set that this machine does not have, or that no kernel is written for.
    #[error("instruction set `{name}` is not available here (available: {available})")]
    UnknownIsa {
        /// What was asked for.
        name: String,
        /// Names of what there is.
        available: String,
    },
    /// The operating system refused a thread.
    #[error("compute thread {thread_idx} could not be started: {reason}")]
    ThreadSpawn {
        /// Which thread of the pool.
        thread_idx: usize,
        /// What the system said.
        reason: String,
    },
    /// A kernel could not be launched, or broke a rule while it ran.
    #[error("{kernel}: {reason}")]
    Launch {
        /// Name of the kernel.
        kernel: &'static str,
        /// What the device said.
        reason: String,
    },
    /// No CUDA driver is installed.
    #[error("no CUDA driver is installed (libcuda.so.1 could not be loaded)")]
    NoCudaDriver,
    /// The driver cannot run the embedded kernels.
    #[error("the CUDA driver supports CUDA {found}, needed is {needed} (driver 580 or later)")]
    CudaDriverTooOld {
        /// Newest CUDA version of the driver.
        found: String,
        /// That of the kernels.
        needed: String,
    },
    /// There is no such device.
    #[error("there is no CUDA device {ordinal} (devices: {count})")]
    NoCudaDevice {
        /// Which was asked for, from 0.
        ordinal: usize,
        /// How many there are.
        count: usize,
    },
    /// The device is older than the kernels.
    #[error("device `{name}` has compute capability {found}, needed is {needed}")]
    UnsupportedCudaDevice {
        /// As the driver calls it.
        name: String,
        /// What it has.
        found: String,
        /// What the kernels were compiled for.
        needed: String,
    },
    /// The device answers nothing any more: a kernel broke a rule, or the hardware failed. Nothing in its memory can be used.
    #[error("the device was lost in {call}: {reason}")]
    DeviceLost {
        /// Which function or kernel said so; what ran before it may be the cause.
        call: &'static str,
        /// What the driver said.
        reason: String,
    },
    /// A call of the CUDA driver failed.
    #[error("{call}: {reason}")]
    CudaDriver {
        /// Which function.
        call: &'static str,
        /// What the driver said.
        reason: String,
    },
}
