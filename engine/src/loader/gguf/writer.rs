//! Writes a GGUF file, version 3. The types and shapes of all tensors are known before the first of their bytes is, so
//! the header is written first and data is written as it is made, never held.
//!
//! Invariant: under the name that was asked for there is a whole file or what was there before. Writing goes to a
//! temporary file beside it, which is flushed to the disk and renamed at the end, and removed otherwise.

#![deny(clippy::arithmetic_side_effects, clippy::indexing_slicing)]

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use super::metadata::{Kind, Metadata, Value};
use super::{DEFAULT_ALIGNMENT, MAGIC, types};
use crate::error::{Error, Result};
use crate::loader::io_error;
use crate::loader::stored::StoredDtype;

/// A tensor as the header says it.
#[derive(Debug, Clone, PartialEq)]
pub struct GgufTensor {
    /// As the format calls it.
    pub name: String,
    /// Outermost axis first.
    pub shape: Vec<usize>,
    /// How its numbers are written.
    pub dtype: StoredDtype,
}

impl GgufTensor {
    /// Bytes of its data; `None` where the innermost axis is no whole number of blocks.
    pub fn num_bytes(&self) -> Option<u64> {
        let (unit_elements, unit_bytes) = types::unit(self.dtype);
        let inner = u64::try_from(*self.shape.last()?).ok()?;
        let elements =
            self.shape.iter().try_fold(1_u64, |product, &size| product.checked_mul(size.try_into().ok()?))?;
        let units = elements.checked_div(unit_elements).filter(|_| inner.is_multiple_of(unit_elements))?;
        units.checked_mul(unit_bytes)
    }
}

/// A file that is being written.
#[derive(Debug)]
pub struct GgufWriter {
    path: PathBuf,
    temporary: PathBuf,
    overwrite: bool,
    /// `None` once the file has its name.
    file: Option<BufWriter<File>>,
    position: u64,
    /// Bytes of each tensor, those that are written taken away from the front.
    sizes: std::vec::IntoIter<u64>,
}

impl GgufWriter {
    /// Begins `path` with `metadata` and the infos of `tensors`, whose data is then to be written in the same order.
    /// Fails when there is something at `path`, unless `overwrite` is set and it is a file.
    pub fn create(path: &Path, overwrite: bool, metadata: &Metadata, tensors: &[GgufTensor]) -> Result<GgufWriter> {
        check_place(path, overwrite)?;
        let (header, sizes) = header(metadata, tensors)?;
        let name = path.file_name().ok_or_else(|| io_error(path, "is no name for a file"))?.to_string_lossy();
        let temporary = path.with_file_name(format!(".{name}.{}.part", std::process::id()));
        let file = File::create_new(&temporary).map_err(|e| io_error(&temporary, e))?;
        let mut writer = GgufWriter {
            path: path.to_path_buf(),
            temporary,
            overwrite,
            file: Some(BufWriter::with_capacity(1 << 20, file)),
            position: 0,
            sizes: sizes.into_iter(),
        };
        writer.append(&header)?;
        Ok(writer)
    }

    /// Writes the data of the next tensor.
    pub fn write(&mut self, data: &[u8]) -> Result<()> {
        let expected = self.sizes.next();
        assert_eq!(expected, data.len().try_into().ok(), "bytes of the next tensor");
        let padding = self.position.next_multiple_of(DEFAULT_ALIGNMENT).saturating_sub(self.position);
        let zeros = [0; DEFAULT_ALIGNMENT as usize];
        self.append(zeros.get(..usize::try_from(padding).unwrap_or_default()).unwrap_or_default())?;
        self.append(data)
    }

    /// Gives the file its name. Returns its bytes.
    pub fn finish(mut self) -> Result<u64> {
        assert_eq!(self.sizes.len(), 0, "tensors without data");
        let file = self.file.take().expect("taken only here");
        let file = file.into_inner().map_err(|e| io_error(&self.temporary, e.error()));
        let renamed = file.and_then(|file| {
            file.sync_all().map_err(|e| io_error(&self.temporary, e))?;
            // It took a while.
            check_place(&self.path, self.overwrite)?;
            fs::rename(&self.temporary, &self.path).map_err(|e| io_error(&self.path, e))
        });
        if renamed.is_err() {
            let _ = fs::remove_file(&self.temporary);
        }
        renamed.map(|()| self.position)
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        let file = self.file.as_mut().expect("taken only at the end");
        file.write_all(bytes).map_err(|e| io_error(&self.temporary, e))?;
        self.position = self.position.saturating_add(bytes.len().try_into().unwrap_or(u64::MAX));
        Ok(())
    }
}

impl Drop for GgufWriter {
    fn drop(&mut self) {
        if self.file.take().is_some() {
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

fn check_place(path: &Path, overwrite: bool) -> Result<()> {
    match fs::symlink_metadata(path) {
        Ok(there) if !overwrite => {
            let what = if there.is_dir() { "is a folder" } else { "is already there" };
            Err(io_error(path, format!("{what}; nothing was written")))
        }
        Ok(there) if there.is_dir() => Err(io_error(path, "is a folder; nothing was written")),
        _ => Ok(()),
    }
}

/// Everything before the data, and the bytes of each tensor.
fn header(metadata: &Metadata, tensors: &[GgufTensor]) -> Result<(Vec<u8>, Vec<u64>)> {
    let mut out = MAGIC.to_vec();
    out.extend(3_u32.to_le_bytes());
    push_len(&mut out, tensors.len());
    push_len(&mut out, metadata.iter().len());
    push_metadata(&mut out, metadata);
    let (mut offset, mut sizes) = (0_u64, Vec::new());
    for tensor in tensors {
        let unfit = || Error::TensorDtype { name: tensor.name.clone(), dtype: tensor.dtype.to_string() };
        let num_bytes = tensor.num_bytes().ok_or_else(unfit)?;
        let type_id = types::type_id(tensor.dtype).ok_or_else(unfit)?;
        push_string(&mut out, tensor.name.as_bytes());
        out.extend(u32::try_from(tensor.shape.len()).unwrap_or(u32::MAX).to_le_bytes());
        // The file lists the innermost axis first.
        tensor.shape.iter().rev().for_each(|&size| push_len(&mut out, size));
        out.extend(type_id.to_le_bytes());
        out.extend(offset.to_le_bytes());
        offset = offset.saturating_add(num_bytes).next_multiple_of(DEFAULT_ALIGNMENT);
        sizes.push(num_bytes);
    }
    let end = out.len().next_multiple_of(DEFAULT_ALIGNMENT as usize);
    out.resize(end, 0);
    Ok((out, sizes))
}

/// All keys and values, as a file has them. A tokenizer is known by these bytes ([`GgufTokenizer::identity_bytes`]): written in
/// another way it is another one.
///
/// [`GgufTokenizer::identity_bytes`]: super::GgufTokenizer::identity_bytes
pub(super) fn push_metadata(out: &mut Vec<u8>, metadata: &Metadata) {
    for (key, value) in metadata.iter() {
        push_string(out, key.as_bytes());
        push_value(out, value);
    }
}

fn push_len(out: &mut Vec<u8>, len: usize) {
    out.extend(u64::try_from(len).unwrap_or(u64::MAX).to_le_bytes());
}

fn push_string(out: &mut Vec<u8>, bytes: &[u8]) {
    push_len(out, bytes.len());
    out.extend_from_slice(bytes);
}

fn push_kind(out: &mut Vec<u8>, kind: Kind) {
    out.extend((kind as u32).to_le_bytes());
}

/// Type and value. Numbers are written in 32 bits where these hold them: readers of the format expect that width.
fn push_value(out: &mut Vec<u8>, value: &Value) {
    match value {
        Value::Unsigned(value) => match u32::try_from(*value) {
            Ok(value) => {
                push_kind(out, Kind::U32);
                out.extend(value.to_le_bytes());
            }
            Err(_) => {
                push_kind(out, Kind::U64);
                out.extend(value.to_le_bytes());
            }
        },
        Value::Signed(value) => match i32::try_from(*value) {
            Ok(value) => {
                push_kind(out, Kind::I32);
                out.extend(value.to_le_bytes());
            }
            Err(_) => {
                push_kind(out, Kind::I64);
                out.extend(value.to_le_bytes());
            }
        },
        Value::Float(value) if f64::from(*value as f32) == *value || value.is_nan() => {
            push_kind(out, Kind::F32);
            out.extend((*value as f32).to_le_bytes());
        }
        Value::Float(value) => {
            push_kind(out, Kind::F64);
            out.extend(value.to_le_bytes());
        }
        Value::Bool(value) => {
            push_kind(out, Kind::Bool);
            out.push(u8::from(*value));
        }
        Value::String(bytes) => {
            push_kind(out, Kind::String);
            push_string(out, bytes);
        }
        Value::Strings(strings) => {
            push_kind(out, Kind::Array);
            push_kind(out, Kind::String);
            push_len(out, strings.len());
            strings.iter().for_each(|bytes| push_string(out, bytes));
        }
        Value::Numbers { kind, len, bytes } => {
            push_kind(out, Kind::Array);
            push_kind(out, *kind);
            push_len(out, *len);
            out.extend_from_slice(bytes);
        }
    }
}
