//! Why a store could not do what it was asked, and how bytes can be other than they should be. Neither leaves the engine: a
//! fault is a miss, and is counted.

use std::io;

use thiserror::Error;

/// Why a store could not do what it was asked. It never leaves the engine: a fault is a miss, and is counted; so it is not
/// a variant of [`Error`](crate::Error), whose codes are promises to users.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Fault {
    /// The system refused.
    #[error("{operation}: {reason}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// What the system said, as a kind.
        kind: io::ErrorKind,
        /// The same, as text.
        reason: String,
    },
    /// What was stored is not what was written. It is forgotten.
    #[error("a stored block is damaged: {0}")]
    Damaged(#[from] Damage),
    /// The directory was written by a newer version; it is left as it is.
    #[error("format version {found} is newer than {known}")]
    NewerFormat {
        /// The newest that was found.
        found: u32,
        /// The newest that is known here.
        known: u32,
    },
    /// The record is longer than the store was told that records are.
    #[error("a block of {bytes} bytes, at most {limit_bytes} are possible")]
    TooLong {
        /// Its length.
        bytes: u64,
        /// The limit.
        limit_bytes: u64,
    },
    /// Another process writes to this store.
    #[error("another process writes to this tier")]
    ReadOnly,
    /// A server refused a command.
    #[error("{operation}: the server answers {code}")]
    Refused {
        /// The command.
        operation: &'static str,
        /// First word of the answer; the rest may repeat what was sent.
        code: String,
    },
    /// A server answered what it must not.
    #[error("{operation}: {reason}")]
    Protocol {
        /// The command.
        operation: &'static str,
        /// What is wrong with the answer.
        reason: String,
    },
    /// Nothing more could be evicted to make room.
    #[error("{held_bytes} of {budget_bytes} bytes are held by what cannot be evicted")]
    Full {
        /// What is held.
        held_bytes: u64,
        /// The budget.
        budget_bytes: u64,
    },
}

/// Why bytes are not what they should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Damage {
    /// The file ends before the bytes that were asked for.
    #[error("the file ends within it")]
    Truncated,
    /// It does not begin as it must.
    #[error("magic is wrong")]
    Magic,
    /// Version, or the length of the header, is that of another format.
    #[error("format version or header length is wrong")]
    Version,
    /// The header's checksum differs.
    #[error("checksum of the header differs")]
    HeaderChecksum,
    /// It was written for another file.
    #[error("it belongs to another segment")]
    Nonce,
    /// It does not follow the record before.
    #[error("sequence {found} does not follow {last}")]
    Sequence {
        /// What it says.
        found: u64,
        /// Of the last record before it.
        last: u64,
    },
    /// It is longer than a payload may be, or than the file.
    #[error("payload of {found_bytes} bytes, at most {limit_bytes} are possible")]
    Length {
        /// What it says.
        found_bytes: u64,
        /// The smaller of both limits.
        limit_bytes: u64,
    },
    /// It is not the record that the index names.
    #[error("it is the record of another block")]
    Key,
    /// The payload's checksum differs.
    #[error("checksum of the payload differs")]
    PayloadChecksum,
    /// It was not written by who knows the secret (in a store that nodes share).
    #[error("authentication code differs")]
    Code,
}
