//! A model's fingerprint: a hash of everything that its numbers depend on, the same for the same content under any path
//! and in any number of files. Blocks of KV that outlive the process are found by it, so it is cryptographic: no two
//! models can be made to have the same one.
//!
//! A hash tree, so that several threads can compute it: each tensor's bytes are cut into chunks of [`CHUNK_BYTES`], each
//! chunk is hashed with its place, and the root is hashed over the description of the model and, tensor by tensor in
//! alphabetical order, the name, type, shape and order of rows and the hashes of its chunks. All fields carry their length.
//! Not covered: padding, tokenizer, templates and where the files lie.

#![deny(clippy::arithmetic_side_effects, clippy::indexing_slicing)]

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use sha2::{Digest, Sha256};

use super::Weights;
use super::stored::StoredTensor;
use crate::error::{Error, Result};

/// Bytes that one thread reads and hashes at a time. Part of the format: it changes every fingerprint.
const CHUNK_BYTES: u64 = 4 << 20;
const LEAF: &[u8] = b"ns-llm fingerprint v1 chunk\0";
const ROOT: &[u8] = b"ns-llm fingerprint v1 model\0";

type Hash = [u8; 32];

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
        let mut hasher = Sha256::new();
        hasher.update(LEAF);
        hasher.update(self.idx.to_le_bytes());
        hasher.update(&*bytes);
        Ok(hasher.finalize().into())
    }
}

impl Weights {
    /// The fingerprint of a model of these weights. `description`: whatever else its numbers depend on, the architecture
    /// and its hyperparameters. Reads every byte of the weights, with `num_threads` threads.
    pub fn fingerprint(&self, description: &str, num_threads: usize) -> Result<Hash> {
        let chunks = self.chunks()?;
        let hashes = hash_chunks(&chunks, num_threads)?;
        let mut root = Sha256::new();
        root.update(ROOT);
        let mut field = |bytes: &[u8]| {
            root.update((bytes.len() as u64).to_le_bytes());
            root.update(bytes);
        };
        field(description.as_bytes());
        field(&[u8::from(self.conv1d_is_linear)]);
        let mut hashes = hashes.iter();
        for (name, (_, tensor)) in &self.tensors {
            field(name.as_bytes());
            field(format!("{:?} {:?}", tensor.dtype, tensor.row_order).as_bytes());
            let shape: Vec<u8> = tensor.shape.iter().flat_map(|&size| (size as u64).to_le_bytes()).collect();
            field(&shape);
            let num_chunks = tensor.num_bytes.div_ceil(CHUNK_BYTES) as usize;
            let leaves: Vec<u8> = hashes.by_ref().take(num_chunks).flatten().copied().collect();
            field(&leaves);
        }
        Ok(root.finalize().into())
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
