//! GGUF files, versions 2 and 3: a header of typed metadata and tensor infos, then the tensors' data, each at a multiple of the
//! file's alignment. One file is a whole model: what a model folder says in several files is in its metadata
//! (`gguf/model.rs` answers the questions of a [`ModelFolder`](super::ModelFolder)). Tensors are read one at a time into
//! buffers of their own (no memory map: truncating a mapped file kills the process).
//!
//! Invariants after [`GgufFile::open`]: keys and names are unique; every tensor is of a known type, has one to four
//! axes none of which is empty, lies inside the file and overlaps no other. Nothing is allocated from a declared count
//! or length beyond the bytes that are there; a header has at most
//! [`MAX_GGUF_HEADER_BYTES`](crate::config::MAX_GGUF_HEADER_BYTES).

#![deny(clippy::arithmetic_side_effects, clippy::indexing_slicing)]

mod config;
mod metadata;
mod model;
mod names;
mod pre_tokenizer;
mod reader;
mod rope_factors;
mod sentence_piece;
mod tokenizer_keys;
mod types;
mod vocabulary;
mod word_piece;
mod writer;

use std::collections::HashSet;
use std::fs::File;

pub use self::metadata::{Metadata as GgufMetadata, Value as GgufValue};
use self::metadata::{Metadata, Value};
pub use self::model::GgufModel;
pub use self::names::{known_name_in_file, name_in_file};
use self::reader::{Damage, HeaderReader};
pub use self::rope_factors::{Stretching, TENSOR as ROPE_FACTORS_TENSOR};
pub use self::tokenizer_keys::set_vocabulary;
pub use self::vocabulary::GgufTokenizer;
pub use self::writer::{GgufTensor, GgufWriter};
use super::stored::{RowOrder, StoredDtype, StoredTensor};
use crate::config::{MAX_GGUF_AXES, MAX_GGUF_KEYS, MAX_GGUF_TENSORS};
use crate::error::{Error, Result};

const MAGIC: &[u8; 4] = b"GGUF";
const DEFAULT_ALIGNMENT: u64 = 32;
/// Above every alignment that has a use; a power of two up to this cannot push a sum over 64 bits.
const MAX_ALIGNMENT: u64 = 1 << 20;
/// Fewest bytes of a key and its value: a length, one letter, a type, one byte.
const MIN_KEY_BYTES: u64 = 14;
/// Fewest bytes of a tensor info: a length, one letter, axes, one size, a type, an offset.
const MIN_TENSOR_BYTES: u64 = 33;

/// An open file with a checked header.
#[derive(Debug)]
pub(super) struct GgufFile {
    name: String,
    file: File,
    metadata: Metadata,
    /// In the order of their data.
    tensors: Vec<StoredTensor>,
}

impl GgufFile {
    /// Reads and checks the header of `file`; `name` is for messages.
    pub(super) fn open(name: &str, file: File) -> Result<GgufFile> {
        let damaged = |(offset, reason): Damage| Error::Weights { file: name.to_string(), offset, reason };
        let file_bytes = file.metadata().map_err(|e| damaged((0, e.to_string())))?.len();
        let (metadata, infos, data_from) = read_header(&file, file_bytes).map_err(damaged)?;
        let alignment = alignment(&metadata)?;
        let tensors = lay_out(infos, data_from, alignment, file_bytes).map_err(damaged)?;
        Ok(GgufFile { name: name.to_string(), file, metadata, tensors })
    }
}

/// What a header says of one tensor, and where it says so.
struct TensorInfo {
    name: String,
    dtype: StoredDtype,
    /// Outermost axis first.
    shape: Vec<usize>,
    num_bytes: u64,
    /// From the start of the data.
    data_offset: u64,
    info_offset: u64,
}

/// Metadata, tensor infos, and the byte behind them.
fn read_header(file: &File, file_bytes: u64) -> Result<(Metadata, Vec<TensorInfo>, u64), Damage> {
    let reader = &mut HeaderReader::new(file, file_bytes);
    read_version(reader)?;
    let num_tensors = read_count(reader, "tensors", MIN_TENSOR_BYTES, MAX_GGUF_TENSORS)?;
    let num_keys = read_count(reader, "keys", MIN_KEY_BYTES, MAX_GGUF_KEYS)?;
    let mut metadata = Metadata::default();
    for _ in 0..num_keys {
        let start = reader.position();
        let key = reader.name("a key")?;
        let value = Value::read(reader, &key)?;
        if let Err(key) = metadata.insert(key, value) {
            return Err((start, format!("key `{key}` is there twice")));
        }
    }
    let (mut infos, mut names) = (Vec::new(), HashSet::new());
    for _ in 0..num_tensors {
        let info = read_tensor_info(reader)?;
        if !names.insert(info.name.clone()) {
            return Err((info.info_offset, format!("tensor `{}` is there twice", info.name)));
        }
        infos.push(info);
    }
    Ok((metadata, infos, reader.position()))
}

fn read_version(reader: &mut HeaderReader<'_>) -> Result<(), Damage> {
    let magic: [u8; 4] = reader.bytes("the magic number")?;
    if magic != *MAGIC {
        return Err((0, format!("is no GGUF file: it begins with {:?}", String::from_utf8_lossy(&magic))));
    }
    match reader.u32("the version")? {
        2 | 3 => Ok(()),
        1 => Err((4, "is of version 1, which is not supported (supported: 2, 3)".to_string())),
        swapped if matches!(swapped.swap_bytes(), 1..=3) => {
            Err((4, "is big-endian, which is not supported".to_string()))
        }
        other => Err((4, format!("is of version {other}, which is not supported (supported: 2, 3)"))),
    }
}

/// A count of things that take at least `min_bytes` each.
fn read_count(reader: &mut HeaderReader<'_>, things: &str, min_bytes: u64, max: u64) -> Result<u64, Damage> {
    let start = reader.position();
    let count = reader.u64(&format!("the number of {things}"))?;
    if count > max {
        return Err((start, format!("{count} {things}, at most {max} are allowed")));
    }
    match count.checked_mul(min_bytes) {
        Some(num_bytes) if num_bytes <= reader.left() => Ok(count),
        _ => Err((start, format!("{count} {things} need more than the {} bytes that are left", reader.left()))),
    }
}

fn read_tensor_info(reader: &mut HeaderReader<'_>) -> Result<TensorInfo, Damage> {
    let info_offset = reader.position();
    let name = reader.name("a tensor's name")?;
    let what = format!("tensor `{name}`");
    let refuse = |reason: String| (info_offset, format!("{what} {reason}"));
    let num_axes = reader.u32(&what)?;
    if !(1..=MAX_GGUF_AXES).contains(&num_axes) {
        return Err(refuse(format!("has {num_axes} axes, must be 1 to {MAX_GGUF_AXES}")));
    }
    // The file lists the innermost axis first.
    let mut sizes = Vec::new();
    for _ in 0..num_axes {
        sizes.push(reader.u64(&what)?);
    }
    let type_id = reader.u32(&what)?;
    let data_offset = reader.u64(&what)?;
    let dtype =
        types::tensor_type(type_id).map_err(|name| refuse(format!("is of type {name}, which is not supported")))?;
    let (unit_elements, unit_bytes) = types::unit(dtype);
    let inner = sizes.first().copied().unwrap_or_default();
    if sizes.contains(&0) {
        return Err(refuse(format!("has an empty axis, its sizes are {sizes:?}")));
    }
    if !inner.is_multiple_of(unit_elements) {
        return Err(refuse(format!("has rows of {inner}, {dtype} has blocks of {unit_elements}")));
    }
    let elements = sizes.iter().try_fold(1_u64, |product, &size| product.checked_mul(size));
    let num_bytes = elements.and_then(|n| n.checked_div(unit_elements)?.checked_mul(unit_bytes));
    let shape: Option<Vec<usize>> = sizes.iter().rev().map(|&size| usize::try_from(size).ok()).collect();
    let (Some(num_bytes), Some(shape)) = (num_bytes, shape) else {
        return Err(refuse(format!("of sizes {sizes:?} and type {dtype} has no size below 2^64 bytes")));
    };
    Ok(TensorInfo { name, dtype, shape, num_bytes, data_offset, info_offset })
}

fn alignment(metadata: &Metadata) -> Result<u64> {
    const KEY: &str = "general.alignment";
    let alignment = metadata.integer(KEY, MAX_ALIGNMENT)?.unwrap_or(DEFAULT_ALIGNMENT);
    if alignment.is_power_of_two() {
        return Ok(alignment);
    }
    Err(metadata::error(KEY, format!("is {alignment}, must be a power of two")))
}

/// Checks places. Data begins at the first multiple of `alignment` from `data_from` on.
fn lay_out(
    mut infos: Vec<TensorInfo>,
    data_from: u64,
    alignment: u64,
    file_bytes: u64,
) -> Result<Vec<StoredTensor>, Damage> {
    infos.sort_by_key(|info| info.data_offset);
    let data_start = data_from.checked_next_multiple_of(alignment).unwrap_or(u64::MAX);
    let mut end_of_last = 0_u64;
    let mut tensors = Vec::with_capacity(infos.len());
    for info in infos {
        let TensorInfo { name, dtype, shape, num_bytes, data_offset, info_offset } = info;
        let refuse = |reason: String| Err((info_offset, format!("tensor `{name}` {reason}")));
        if !data_offset.is_multiple_of(alignment) {
            return refuse(format!("begins at data byte {data_offset}, which is no multiple of {alignment}"));
        }
        let end = data_offset.checked_add(num_bytes);
        let end_in_file = end.and_then(|end| end.checked_add(data_start));
        let (Some(end), Some(_)) = (end, end_in_file.filter(|&end| end <= file_bytes)) else {
            let there = file_bytes.saturating_sub(data_start);
            return refuse(format!("needs {num_bytes} bytes from data byte {data_offset} on, the file has {there}"));
        };
        if data_offset < end_of_last {
            return refuse(format!("begins at data byte {data_offset}, the one before ends at {end_of_last}"));
        }
        end_of_last = end;
        let offset = data_start.saturating_add(data_offset);
        tensors.push(StoredTensor { name, dtype, shape, offset, num_bytes, row_order: RowOrder::AsIs });
    }
    Ok(tensors)
}
