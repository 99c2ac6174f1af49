//! A model's fingerprint: a hash of everything that its numbers depend on, the same for the same content under any path
//! and in any number of files. Blocks of KV that outlive the process are found by it, so it is cryptographic: no two
//! models can be made to have the same one.
//!
//! A hash tree, so that several threads can compute it: each tensor's bytes are cut into chunks of [`CHUNK_BYTES`], each
//! chunk is hashed with its place, and the root is hashed over the configuration of the model and, tensor by tensor in
//! alphabetical order, the name, type, shape and order of rows and the hashes of its chunks.
//! Not covered: padding, tokenizer, templates and where the files lie.

#![deny(clippy::arithmetic_side_effects, clippy::indexing_slicing)]

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use super::Weights;
use super::stored::{RowOrder, StoredTensor};
use crate::error::{Error, Result};
use crate::field_hash::{FieldHash, FieldTag};

/// Bytes that one thread reads and hashes at a time. Part of the format: it changes every fingerprint.
const CHUNK_BYTES: u64 = 4 << 20;
const LEAF: &str = "chunk of a tensor, version 2";
const ROOT: &str = "weights of a model, version 2";

type Hash = [u8; 32];

#[derive(Clone, Copy)]
#[repr(u8)]
enum Tag {
    What = 1,
    ChunkIdx,
    Bytes,
    Configuration,
    Conv1dIsLinear,
    TensorName,
    TensorType,
    InterleavedHeads,
    TensorShape,
    Chunks,
}

impl FieldTag for Tag {
    fn number(self) -> u8 {
        self as u8
    }
}

/// A piece of a tensor.
struct Chunk<'a> {
    tensor: &'a StoredTensor,
    file: &'a File,
    /// Name of the file, for messages.
    file_name: &'a str,
    /// Place in the tensor, counted in chunks.
    idx: u64,
    /// Place in the file.
    offset: u64,
    num_bytes: u64,
}

impl Chunk<'_> {
    /// `buffer` is as long as the longest chunk.
    fn hash(&self, buffer: &mut [u8]) -> Result<Hash> {
        let failed = |reason: String| {
            let reason = format!("tensor `{}`: {reason}", self.tensor.name);
            Error::Weights { file: self.file_name.to_string(), offset: self.offset, reason }
        };
        let len = usize::try_from(self.num_bytes).map_err(|e| failed(e.to_string()))?;
        let bytes = buffer.get_mut(..len).ok_or_else(|| failed(format!("a chunk of {len} bytes")))?;
        read_exact_at(self.file, bytes, self.offset).map_err(|e| failed(e.to_string()))?;
        Ok(FieldHash::new().text(Tag::What, LEAF).number(Tag::ChunkIdx, self.idx).field(Tag::Bytes, bytes).finish())
    }
}

impl Weights {
    /// The fingerprint of a model of these weights. `configuration`: hash of whatever else its numbers depend on, the
    /// architecture and its hyperparameters. Reads every byte of the weights, with `num_threads` threads.
    pub fn fingerprint(&self, configuration: &[u8; 32], num_threads: usize) -> Result<Hash> {
        let chunks = self.chunks()?;
        let hashes = hash_chunks(&chunks, num_threads)?;
        let mut root = FieldHash::new()
            .text(Tag::What, ROOT)
            .field(Tag::Configuration, configuration)
            .flag(Tag::Conv1dIsLinear, self.conv1d_is_linear);
        let mut hashes = hashes.iter();
        for (name, (_, tensor)) in &self.tensors {
            let interleaved_heads = match tensor.row_order {
                RowOrder::AsIs => None,
                RowOrder::InterleavedHeads(heads) => Some(heads as u64),
            };
            let shape: Vec<u8> = tensor.shape.iter().flat_map(|&size| (size as u64).to_le_bytes()).collect();
            let num_chunks = tensor.num_bytes.div_ceil(CHUNK_BYTES) as usize;
            let leaves: Vec<u8> = hashes.by_ref().take(num_chunks).flatten().copied().collect();
            root = root
                .text(Tag::TensorName, name)
                .text(Tag::TensorType, &tensor.dtype.to_string())
                .optional(Tag::InterleavedHeads, interleaved_heads)
                .field(Tag::TensorShape, &shape)
                .field(Tag::Chunks, &leaves);
        }
        Ok(root.finish())
    }

    /// All chunks of all tensors, in the order in which the root takes them.
    fn chunks(&self) -> Result<Vec<Chunk<'_>>> {
        let mut chunks = Vec::new();
        for (file_idx, tensor) in self.tensors.values() {
            let file = self.files.get(*file_idx).ok_or_else(|| Error::Internal {
                reason: format!("the fingerprint needs the bytes of `{}`, and its file is not open", tensor.name),
            })?;
            for (idx, start) in (0..tensor.num_bytes).step_by(CHUNK_BYTES as usize).enumerate() {
                chunks.push(Chunk {
                    tensor,
                    file: &file.file,
                    file_name: &file.name,
                    idx: idx as u64,
                    offset: tensor.offset.saturating_add(start),
                    num_bytes: CHUNK_BYTES.min(tensor.num_bytes.saturating_sub(start)),
                });
            }
        }
        Ok(chunks)
    }
}

/// One hash per chunk. The threads take chunks as they come free; which one hashes what reaches no result.
fn hash_chunks(chunks: &[Chunk<'_>], num_threads: usize) -> Result<Vec<Hash>> {
    let (next, has_failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    // As they lie in the files: the system reads ahead.
    let mut order: Vec<(usize, &Chunk<'_>)> = chunks.iter().enumerate().collect();
    order.sort_by_key(|(_, chunk)| (chunk.file_name, chunk.offset));
    let longest = chunks.iter().map(|chunk| chunk.num_bytes).max().unwrap_or(0);
    let work = || -> Result<Vec<(usize, Hash)>> {
        let mut buffer = vec![0; longest as usize];
        let mut hashes = Vec::new();
        while !has_failed.load(Ordering::Relaxed) {
            let Some((idx, chunk)) = order.get(next.fetch_add(1, Ordering::Relaxed)) else { break };
            match chunk.hash(&mut buffer) {
                Ok(hash) => hashes.push((*idx, hash)),
                Err(error) => {
                    has_failed.store(true, Ordering::Relaxed);
                    return Err(error);
                }
            }
        }
        Ok(hashes)
    };
    let parts = thread::scope(|scope| {
        let start = || thread::Builder::new().name("ns-llm-hash".to_string()).spawn_scoped(scope, work);
        // A thread that does not start is work for the others.
        let helpers: Vec<_> = (1..num_threads.min(chunks.len())).filter_map(|_| start().ok()).collect();
        let mut parts = vec![work()];
        parts.extend(helpers.into_iter().map(|helper| {
            helper.join().unwrap_or_else(|_| Err(Error::Internal { reason: "a hashing thread panicked".to_string() }))
        }));
        parts
    });
    let mut hashes = parts.into_iter().collect::<Result<Vec<_>>>()?.concat();
    hashes.sort_unstable_by_key(|&(idx, _)| idx);
    Ok(hashes.into_iter().map(|(_, hash)| hash).collect())
}

/// Fills `buffer`; the file's own position, which threads would share, is not used.
#[cfg(unix)]
fn read_exact_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, buffer, offset)
}

/// The same; moves the file's position, which nobody relies on.
#[cfg(windows)]
fn read_exact_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    let (mut rest, mut offset) = (buffer, offset);
    while !rest.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, rest, offset) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                rest = rest.split_at_mut(count).1;
                offset = offset.saturating_add(count as u64);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
