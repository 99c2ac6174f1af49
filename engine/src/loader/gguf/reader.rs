//! Reads the fields of a GGUF header one after the other. Knows at each moment how many bytes the file has left, and
//! never takes a declared length for more than that.

#![deny(clippy::arithmetic_side_effects, clippy::indexing_slicing)]

use std::fs::File;
use std::io::{BufReader, Read};

use crate::config::{MAX_GGUF_HEADER_BYTES, MAX_GGUF_NAME_BYTES};

/// What is wrong, and at which byte of the file.
pub(super) type Damage = (u64, String);

/// A position in the header of a file.
pub(super) struct HeaderReader<'a> {
    file: BufReader<&'a File>,
    /// Bytes read so far.
    position: u64,
    /// Bytes that may be read in all: those of the file, or the cap of a header.
    limit: u64,
    file_bytes: u64,
}

impl<'a> HeaderReader<'a> {
    /// Begins where `file`, of `file_bytes` bytes, stands: at its start.
    pub(super) fn new(file: &'a File, file_bytes: u64) -> Self {
        let limit = file_bytes.min(MAX_GGUF_HEADER_BYTES);
        HeaderReader { file: BufReader::new(file), position: 0, limit, file_bytes }
    }

    /// Byte of the file that is read next.
    pub(super) fn position(&self) -> u64 {
        self.position
    }

    /// Bytes that are left to read.
    pub(super) fn left(&self) -> u64 {
        self.limit.saturating_sub(self.position)
    }

    /// Fails unless `num_bytes` are left. `what` is said to need them.
    pub(super) fn expect(&self, num_bytes: u64, what: &str) -> Result<(), Damage> {
        let left = self.left();
        if num_bytes <= left {
            return Ok(());
        }
        let who = if self.limit < self.file_bytes { "a header may have" } else { "the file has" };
        Err((self.position, format!("{what} needs {num_bytes} bytes, {who} {left} left")))
    }

    /// A number of the format: little-endian, of `N` bytes.
    pub(super) fn bytes<const N: usize>(&mut self, what: &str) -> Result<[u8; N], Damage> {
        let num_bytes = u64::try_from(N).unwrap_or(u64::MAX);
        self.expect(num_bytes, what)?;
        let mut bytes = [0; N];
        self.file.read_exact(&mut bytes).map_err(|e| (self.position, format!("{what}: {e}")))?;
        self.position = self.position.saturating_add(num_bytes);
        Ok(bytes)
    }

    pub(super) fn u32(&mut self, what: &str) -> Result<u32, Damage> {
        self.bytes(what).map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self, what: &str) -> Result<u64, Damage> {
        self.bytes(what).map(u64::from_le_bytes)
    }

    /// Appends `num_bytes` to `buffer`, which grows by what is there and no more.
    pub(super) fn append(&mut self, num_bytes: u64, buffer: &mut Vec<u8>, what: &str) -> Result<(), Damage> {
        self.expect(num_bytes, what)?;
        let start = buffer.len();
        let wanted = usize::try_from(num_bytes).ok().and_then(|len| start.checked_add(len));
        let wanted = wanted.ok_or_else(|| (self.position, format!("{what} does not fit this machine's memory")))?;
        buffer
            .try_reserve(wanted.saturating_sub(start))
            .map_err(|e| (self.position, format!("{what} of {num_bytes} bytes: {e}")))?;
        let read = self.file.by_ref().take(num_bytes).read_to_end(buffer);
        read.map_err(|e| (self.position, format!("{what}: {e}")))?;
        if buffer.len() != wanted {
            let there = buffer.len().saturating_sub(start);
            return Err((self.position, format!("{what}: {there} of {num_bytes} bytes are there")));
        }
        self.position = self.position.saturating_add(num_bytes);
        Ok(())
    }

    /// The name of a key or a tensor: UTF-8, not empty, of bounded length.
    pub(super) fn name(&mut self, what: &str) -> Result<String, Damage> {
        let start = self.position;
        let len = self.u64(what)?;
        if len == 0 || len > MAX_GGUF_NAME_BYTES {
            return Err((start, format!("{what} of {len} bytes, must be 1 to {MAX_GGUF_NAME_BYTES}")));
        }
        let mut bytes = Vec::new();
        self.append(len, &mut bytes, what)?;
        String::from_utf8(bytes).map_err(|e| {
            (start.saturating_add(8), format!("{what} is not UTF-8 from byte {}", e.utf8_error().valid_up_to()))
        })
    }
}
