//! One `.safetensors` file: eight bytes of header length, a JSON header, then the data of all tensors. The header is
//! read and checked before a byte of data; tensors are read one at a time into buffers of their own (no memory map:
//! truncating a mapped file kills the process).
//!
//! Invariants after [`open`]: names are unique; the bytes of each tensor equal the product of its
//! shape and element size, and lie inside the file; tensors follow one another without hole or overlap and end where
//! the file ends. Nothing is allocated from a declared length beyond the bytes that are there.
//!
//! The element types are those of the `safetensors` crate. Its reader is not used: it wants the whole file in one
//! slice, and its errors do not name the tensor or the offset.

#![deny(clippy::arithmetic_side_effects)]

use std::collections::HashSet;
use std::fmt;
use std::fs::File;
use std::io::Read;

use safetensors::Dtype;
use serde::Deserialize;
use serde::de::{self, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::json::without_position;
use super::stored::{RowOrder, StoredDtype, StoredTensor, WeightsFile, read_exactly};
use crate::config::{MAX_SAFETENSORS_HEADER_BYTES, MAX_TENSOR_AXES};
use crate::error::{Error, Result};

const LENGTH_BYTES: u64 = 8;

/// Reads and checks the header of `file`; `name` is for messages.
pub(super) fn open(name: &str, mut file: File) -> Result<WeightsFile> {
    let damaged = |offset, reason: String| Error::Weights { file: name.to_string(), offset, reason };
    let file_bytes = file.metadata().map_err(|e| damaged(0, e.to_string()))?.len();
    let header_bytes = header_length(&mut file, file_bytes).map_err(|reason| damaged(0, reason))?;
    let header = read_exactly(&mut file, header_bytes, Vec::new()).map_err(|e| damaged(LENGTH_BYTES, e))?;
    let entries = parse_header(&header)
        .map_err(|(at, reason)| damaged(LENGTH_BYTES.saturating_add(at.try_into().unwrap_or(u64::MAX)), reason))?;
    let data_start = LENGTH_BYTES.saturating_add(header_bytes);
    let tensors = lay_out(entries, data_start, file_bytes).map_err(|(offset, reason)| damaged(offset, reason))?;
    Ok(WeightsFile { name: name.to_string(), file, tensors })
}

fn header_length(file: &mut File, file_bytes: u64) -> Result<u64, String> {
    if file_bytes < LENGTH_BYTES {
        return Err(format!("the file has {file_bytes} bytes, its header length alone takes {LENGTH_BYTES}"));
    }
    let mut length = [0; LENGTH_BYTES as usize];
    file.read_exact(&mut length).map_err(|e| e.to_string())?;
    let length = u64::from_le_bytes(length);
    if length > MAX_SAFETENSORS_HEADER_BYTES {
        return Err(format!("header of {length} bytes, at most {MAX_SAFETENSORS_HEADER_BYTES} are allowed"));
    }
    let left = file_bytes.saturating_sub(LENGTH_BYTES);
    if length > left {
        return Err(format!("header of {length} bytes, the file has {left} left"));
    }
    Ok(length)
}

/// Gives the entries in the order of the header; the error carries its offset inside the header.
fn parse_header(header: &[u8]) -> Result<Vec<(String, Entry)>, (usize, String)> {
    let text = std::str::from_utf8(header).map_err(|e| (e.valid_up_to(), "the header is not UTF-8".to_string()))?;
    let Header(entries) = serde_json::from_str(text).map_err(|e| {
        let line_start: usize = text.split_inclusive('\n').take(e.line().saturating_sub(1)).map(str::len).sum();
        (line_start.saturating_add(e.column()).min(text.len()), format!("header: {}", without_position(&e)))
    })?;
    let mut names = HashSet::with_capacity(entries.len());
    for (name, _) in &entries {
        if !names.insert(name.as_str()) {
            return Err((0, format!("header: tensor `{name}` is listed twice")));
        }
    }
    Ok(entries)
}

/// Checks sizes and places. The error carries the offset of the tensor in the file.
fn lay_out(
    mut entries: Vec<(String, Entry)>,
    data_start: u64,
    file_bytes: u64,
) -> Result<Vec<StoredTensor>, (u64, String)> {
    entries.sort_by_key(|(_, entry)| entry.data_offsets);
    let data_bytes = file_bytes.saturating_sub(data_start);
    let mut end_of_last = 0;
    let mut tensors = Vec::with_capacity(entries.len());
    for (name, Entry { dtype, shape, data_offsets: (start, end) }) in entries {
        let offset = data_start.saturating_add(start);
        let refuse = |reason: String| Err((offset, format!("tensor `{name}` {reason}")));
        let Some(num_bytes) = bytes_of(&shape, dtype) else {
            return refuse(format!("of shape {shape:?} and type {dtype} has no size in whole bytes below 2^64"));
        };
        if end > data_bytes || start > end {
            return refuse(format!("is said to be data bytes {start}..{end}, the file has {data_bytes}"));
        }
        if end.saturating_sub(start) != num_bytes {
            return refuse(format!(
                "of shape {shape:?} and type {dtype} needs {num_bytes} bytes, data_offsets are {start}..{end}"
            ));
        }
        if start != end_of_last {
            return refuse(format!("begins at data byte {start}, the one before ends at {end_of_last}"));
        }
        end_of_last = end;
        let (dtype, row_order) = (StoredDtype::Plain(dtype), RowOrder::AsIs);
        tensors.push(StoredTensor { name, dtype, shape, offset, num_bytes, row_order });
    }
    if end_of_last != data_bytes {
        let surplus = data_bytes.saturating_sub(end_of_last);
        return Err((data_start.saturating_add(end_of_last), format!("{surplus} bytes belong to no tensor")));
    }
    Ok(tensors)
}

fn bytes_of(shape: &[usize], dtype: Dtype) -> Option<u64> {
    let elements = shape.iter().try_fold(1_u64, |product, &size| product.checked_mul(size.try_into().ok()?))?;
    let bits = elements.checked_mul(dtype.bitsize().try_into().ok()?)?;
    bits.is_multiple_of(8).then(|| bits.div_euclid(8))
}

/// What the header says of one tensor.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    dtype: Dtype,
    #[serde(deserialize_with = "bounded_shape")]
    shape: Vec<usize>,
    /// From the end of the header: first byte, and the one after the last.
    data_offsets: (u64, u64),
}

/// A list of sizes that stops at [`MAX_TENSOR_AXES`]: a header of 100 MB must not become one shape of 400 MB.
fn bounded_shape<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<usize>, D::Error> {
    struct Shape;
    impl<'de> Visitor<'de> for Shape {
        type Value = Vec<usize>;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "a shape of at most {MAX_TENSOR_AXES} sizes")
        }
        fn visit_seq<A: SeqAccess<'de>>(self, mut sizes: A) -> Result<Vec<usize>, A::Error> {
            let mut shape = Vec::new();
            while let Some(size) = sizes.next_element()? {
                if shape.len() == MAX_TENSOR_AXES {
                    return Err(de::Error::invalid_length(MAX_TENSOR_AXES.saturating_add(1), &self));
                }
                shape.push(size);
            }
            Ok(shape)
        }
    }
    deserializer.deserialize_seq(Shape)
}

/// The header in its own order, repeated names included. `__metadata__` is free text for people and is skipped.
struct Header(Vec<(String, Entry)>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Header;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object with one entry for each tensor")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                    } else {
                        entries.push((name, map.next_value()?));
                    }
                }
                Ok(Header(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(dtype: Dtype, shape: &[usize], start: u64, end: u64) -> Entry {
        Entry { dtype, shape: shape.to_vec(), data_offsets: (start, end) }
    }

    /// Tensors come out in the order of their data whatever the order of the header, with offsets that count the
    /// header: shown by laying out two of them backwards.
    #[test]
    fn layout_follows_the_data() {
        let entries = vec![
            ("b".to_string(), entry(Dtype::F32, &[3], 8, 20)),
            ("a".to_string(), entry(Dtype::BF16, &[2, 2], 0, 8)),
        ];
        let tensors = lay_out(entries, 100, 120).unwrap();
        let places: Vec<_> = tensors.iter().map(|t| (t.name.as_str(), t.offset, t.num_bytes)).collect();
        assert_eq!(places, [("a", 100, 8), ("b", 108, 12)]);
    }

    /// Sizes never wrap: products that leave 64 bits, and bit counts that leave whole bytes, have no size.
    #[test]
    fn sizes_are_checked() {
        assert_eq!(bytes_of(&[2, 3], Dtype::F32), Some(24));
        assert_eq!(bytes_of(&[], Dtype::F16), Some(2));
        assert_eq!(bytes_of(&[1 << 32, 1 << 32], Dtype::U8), None);
        assert_eq!(bytes_of(&[1 << 59], Dtype::F64), None);
        assert_eq!(bytes_of(&[usize::MAX, 0, usize::MAX], Dtype::U8), Some(0));
        assert_eq!(bytes_of(&[3], Dtype::F4), None);
    }

    /// The rejection of a long header costs memory and time in proportion to its text: shown with a shape of a million
    /// sizes, refused at the ninth.
    #[test]
    fn a_shape_stops_at_the_limit() {
        let header = format!(r#"{{"a":{{"dtype":"F32","shape":[{}1],"data_offsets":[0,4]}}}}"#, "1,".repeat(1_000_000));
        let (at, reason) = parse_header(header.as_bytes()).unwrap_err();
        assert!(at < 60, "{at}");
        assert!(reason.contains("shape of at most 8 sizes"), "{reason}");
    }
}
