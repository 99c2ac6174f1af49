//! The typed values at the head of a GGUF file, and getters that name the key when a value is not what it should be. No
//! getter converts between kinds: a string of digits is no integer, an integer no boolean. Widths of integers and
//! floats do not matter, since writers choose them freely.
//!
//! Invariant: values take memory in proportion to their bytes in the file. Arrays of numbers stay as they are written,
//! arrays of strings are one buffer of text and one of ends; arrays of arrays, which no key of the format has, are
//! refused.

#![deny(clippy::arithmetic_side_effects, clippy::indexing_slicing)]

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use serde_json::{Number, Value as Json};

use super::reader::{Damage, HeaderReader};
use crate::error::{Error, Result};

/// What stands for the file in errors about its metadata.
pub(super) const FILE: &str = "GGUF metadata";

/// Keys and values.
#[derive(Debug, Clone, Default)]
pub struct Metadata {
    values: BTreeMap<String, Value>,
}

/// One value.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// An integer that was written without a sign.
    Unsigned(u64),
    /// An integer that was written with one.
    Signed(i64),
    /// A float of either width.
    Float(f64),
    /// A boolean.
    Bool(bool),
    /// Texts are checked for UTF-8 when they are asked for.
    String(Vec<u8>),
    /// An array of texts.
    Strings(Strings),
    /// `len` numbers or booleans as they are written.
    Numbers {
        /// The type of each.
        kind: Kind,
        /// How many.
        len: usize,
        /// Little-endian, one behind the other.
        bytes: Vec<u8>,
    },
}

/// The types of values; the discriminants are the format's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the types")]
pub enum Kind {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    String,
    Array,
    U64,
    I64,
    F64,
}

impl Kind {
    fn of(id: u32) -> Option<Kind> {
        use Kind::*;
        let kinds = [U8, I8, U16, I16, U32, I32, F32, Bool, String, Array, U64, I64, F64];
        kinds.get(usize::try_from(id).ok()?).copied()
    }

    /// Bytes of a value; `None` where that differs from value to value.
    fn size_bytes(self) -> Option<usize> {
        match self {
            Kind::U8 | Kind::I8 | Kind::Bool => Some(1),
            Kind::U16 | Kind::I16 => Some(2),
            Kind::U32 | Kind::I32 | Kind::F32 => Some(4),
            Kind::U64 | Kind::I64 | Kind::F64 => Some(8),
            Kind::String | Kind::Array => None,
        }
    }

    /// A number or boolean of this kind from exactly its bytes.
    fn scalar(self, bytes: &[u8]) -> Option<Value> {
        Some(match self {
            Kind::U8 => Value::Unsigned(u8::from_le_bytes(bytes.try_into().ok()?).into()),
            Kind::U16 => Value::Unsigned(u16::from_le_bytes(bytes.try_into().ok()?).into()),
            Kind::U32 => Value::Unsigned(u32::from_le_bytes(bytes.try_into().ok()?).into()),
            Kind::U64 => Value::Unsigned(u64::from_le_bytes(bytes.try_into().ok()?)),
            Kind::I8 => Value::Signed(i8::from_le_bytes(bytes.try_into().ok()?).into()),
            Kind::I16 => Value::Signed(i16::from_le_bytes(bytes.try_into().ok()?).into()),
            Kind::I32 => Value::Signed(i32::from_le_bytes(bytes.try_into().ok()?).into()),
            Kind::I64 => Value::Signed(i64::from_le_bytes(bytes.try_into().ok()?)),
            Kind::F32 => Value::Float(f32::from_le_bytes(bytes.try_into().ok()?).into()),
            Kind::F64 => Value::Float(f64::from_le_bytes(bytes.try_into().ok()?)),
            Kind::Bool => match bytes {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                _ => return None,
            },
            Kind::String | Kind::Array => return None,
        })
    }
}

/// An array of strings.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Strings {
    bytes: Vec<u8>,
    /// String `i` ends before `bytes[ends[i]]` and begins where the one before ends.
    ends: Vec<usize>,
}

impl Strings {
    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    /// All strings in their order.
    pub(super) fn iter(&self) -> impl Iterator<Item = &[u8]> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        starts.zip(&self.ends).map(|(start, &end)| self.bytes.get(start..end).unwrap_or_default())
    }
}

impl<S: AsRef<str>> FromIterator<S> for Strings {
    fn from_iter<I: IntoIterator<Item = S>>(texts: I) -> Strings {
        let mut strings = Strings::default();
        for text in texts {
            strings.bytes.extend_from_slice(text.as_ref().as_bytes());
            strings.ends.push(strings.bytes.len());
        }
        strings
    }
}

impl From<u32> for Value {
    fn from(value: u32) -> Value {
        Value::Unsigned(value.into())
    }
}

impl From<f32> for Value {
    fn from(value: f32) -> Value {
        Value::Float(value.into())
    }
}

impl From<bool> for Value {
    fn from(value: bool) -> Value {
        Value::Bool(value)
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Value {
        Value::String(text.into())
    }
}

impl From<Strings> for Value {
    fn from(strings: Strings) -> Value {
        Value::Strings(strings)
    }
}

impl From<&[i32]> for Value {
    fn from(values: &[i32]) -> Value {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Value::Numbers { kind: Kind::I32, len: values.len(), bytes }
    }
}

impl From<&[f32]> for Value {
    fn from(values: &[f32]) -> Value {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Value::Numbers { kind: Kind::F32, len: values.len(), bytes }
    }
}

impl Value {
    /// Reads a type and a value of it.
    pub(super) fn read(reader: &mut HeaderReader<'_>, key: &str) -> Result<Value, Damage> {
        match read_kind(reader, key)? {
            Kind::Array => read_array(reader, key),
            Kind::String => {
                let mut bytes = Vec::new();
                append_string(reader, &format!("`{key}`"), &mut bytes)?;
                Ok(Value::String(bytes))
            }
            kind => read_scalar(reader, kind, key),
        }
    }

    fn kind_name(&self) -> &'static str {
        match self {
            Value::Unsigned(_) | Value::Signed(_) => "an integer",
            Value::Float(_) => "a float",
            Value::Bool(_) => "a boolean",
            Value::String(_) => "a string",
            Value::Strings(_) => "an array of strings",
            Value::Numbers { .. } => "an array of numbers",
        }
    }

    fn as_integer(&self) -> Option<i128> {
        match *self {
            Value::Unsigned(value) => Some(value.into()),
            Value::Signed(value) => Some(value.into()),
            _ => None,
        }
    }
}

fn read_kind(reader: &mut HeaderReader<'_>, key: &str) -> Result<Kind, Damage> {
    let start = reader.position();
    let id = reader.u32(&format!("the type of `{key}`"))?;
    Kind::of(id).ok_or_else(|| (start, format!("`{key}` is of type number {id}, types are 0 to 12")))
}

fn read_scalar(reader: &mut HeaderReader<'_>, kind: Kind, key: &str) -> Result<Value, Damage> {
    let start = reader.position();
    let mut bytes = Vec::new();
    let size = kind.size_bytes().and_then(|size| u64::try_from(size).ok()).unwrap_or_default();
    reader.append(size, &mut bytes, &format!("`{key}`"))?;
    kind.scalar(&bytes).ok_or_else(|| (start, format!("`{key}` is a boolean of {bytes:?}, must be 0 or 1")))
}

fn append_string(reader: &mut HeaderReader<'_>, what: &str, buffer: &mut Vec<u8>) -> Result<(), Damage> {
    let len = reader.u64(what)?;
    reader.append(len, buffer, what)
}

fn read_array(reader: &mut HeaderReader<'_>, key: &str) -> Result<Value, Damage> {
    let start = reader.position();
    let kind = read_kind(reader, key)?;
    let what = format!("`{key}`");
    let declared = reader.u64(&what)?;
    // Every string has its length before it, so the count is bounded before anything is made.
    let item_bytes = kind.size_bytes().unwrap_or(8);
    let num_bytes = declared.checked_mul(item_bytes.try_into().unwrap_or(u64::MAX));
    let num_bytes = num_bytes.ok_or_else(|| (start, format!("{what} has {declared} entries")))?;
    reader.expect(num_bytes, &format!("{what} of {declared} entries"))?;
    let len = usize::try_from(declared).map_err(|_| (start, format!("{what} has {declared} entries")))?;
    match kind {
        Kind::Array => Err((start, format!("{what} is an array of arrays, which no key of the format is"))),
        Kind::String => {
            let mut strings = Strings::default();
            strings.ends.try_reserve_exact(len).map_err(|e| (start, format!("{what} of {declared} entries: {e}")))?;
            for _ in 0..len {
                append_string(reader, &what, &mut strings.bytes)?;
                strings.ends.push(strings.bytes.len());
            }
            strings.bytes.shrink_to_fit();
            Ok(Value::Strings(strings))
        }
        _ => {
            let mut bytes = Vec::new();
            reader.append(num_bytes, &mut bytes, &what)?;
            Ok(Value::Numbers { kind, len, bytes })
        }
    }
}

impl Metadata {
    /// Keeps a value; gives the key back if it has one already.
    pub(super) fn insert(&mut self, key: String, value: Value) -> Result<(), String> {
        match self.values.entry(key) {
            Entry::Vacant(vacant) => {
                vacant.insert(value);
                Ok(())
            }
            Entry::Occupied(occupied) => Err(occupied.key().clone()),
        }
    }

    /// Sets a value, whether the key has one already or not.
    pub fn set(&mut self, key: impl Into<String>, value: impl Into<Value>) {
        self.values.insert(key.into(), value.into());
    }

    /// Drops the keys for which `keep` is false.
    pub fn retain(&mut self, keep: impl Fn(&str) -> bool) {
        self.values.retain(|key, _| keep(key));
    }

    /// The keys that begin with `prefix`, with their values.
    pub(super) fn with_prefix(&self, prefix: &str) -> Metadata {
        let values = self.values.iter().filter(|(key, _)| key.starts_with(prefix));
        Metadata { values: values.map(|(key, value)| (key.clone(), value.clone())).collect() }
    }

    /// All keys in alphabetical order, with their values.
    pub(super) fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Value)> {
        self.values.iter().map(|(key, value)| (key.as_str(), value))
    }

    pub(super) fn has(&self, key: &str) -> bool {
        self.values.contains_key(key)
    }

    /// A text.
    pub(super) fn string(&self, key: &str) -> Result<Option<&str>> {
        let Some(bytes) = self.typed(key, "a string", |value| match value {
            Value::String(bytes) => Some(bytes),
            _ => None,
        })?
        else {
            return Ok(None);
        };
        let text = std::str::from_utf8(bytes);
        text.map(Some).map_err(|e| error(key, format!("is not UTF-8 from byte {}", e.valid_up_to())))
    }

    pub(super) fn boolean(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "a boolean", |value| match value {
            Value::Bool(value) => Some(*value),
            _ => None,
        })
    }

    /// An integer of `0..=max`.
    pub(super) fn integer(&self, key: &str, max: u64) -> Result<Option<u64>> {
        let Some(value) = self.typed(key, "an integer", Value::as_integer)? else { return Ok(None) };
        let in_range = u64::try_from(value).ok().filter(|&value| value <= max);
        in_range.map(Some).ok_or_else(|| error(key, format!("is {value}, must be an integer of 0 to {max}")))
    }

    /// An array of strings.
    pub(super) fn strings(&self, key: &str) -> Result<Option<&Strings>> {
        self.typed(key, "an array of strings", |value| match value {
            Value::Strings(strings) => Some(strings),
            _ => None,
        })
    }

    /// An array of `len` integers.
    pub(super) fn integers(&self, key: &str, len: usize) -> Result<Option<Vec<i128>>> {
        self.numbers(key, "an array of integers", len, |value| value.as_integer())
    }

    /// An array of `len` finite floats.
    pub(super) fn floats(&self, key: &str, len: usize) -> Result<Option<Vec<f64>>> {
        self.numbers(key, "an array of finite floats", len, |value| match value {
            Value::Float(value) if value.is_finite() => Some(value),
            _ => None,
        })
    }

    /// `expected_len` is what the caller has already in memory: only then are the numbers unpacked.
    fn numbers<T>(
        &self,
        key: &str,
        expected: &str,
        expected_len: usize,
        convert: impl Fn(Value) -> Option<T>,
    ) -> Result<Option<Vec<T>>> {
        let Some(Value::Numbers { kind, len, bytes }) = self.typed(key, expected, |value| match value {
            Value::Numbers { .. } => Some(value),
            _ => None,
        })?
        else {
            return Ok(None);
        };
        if *len != expected_len {
            return Err(error(key, format!("has {len} entries, must have {expected_len}")));
        }
        let converted: Option<Vec<T>> = items(*kind, bytes).map(|item| convert(item?)).collect();
        converted.map(Some).ok_or_else(|| error(key, format!("holds something else, must be {expected}")))
    }

    /// The value as JSON has it, for the readers of configuration: numbers, booleans and texts as they are, an array
    /// of one repeated number as that number, other arrays as an empty one, which every reader of a number refuses.
    pub(super) fn json(&self, key: &str) -> Result<Option<Json>> {
        let Some(value) = self.values.get(key) else { return Ok(None) };
        let Value::Numbers { kind, bytes, .. } = value else { return self.scalar_json(key, value).map(Some) };
        let mut numbers = items(*kind, bytes);
        match numbers.next() {
            None => Ok(Some(Json::Array(Vec::new()))),
            Some(Some(first)) if numbers.all(|item| item.as_ref() == Some(&first)) => {
                self.scalar_json(key, &first).map(Some)
            }
            Some(_) => Err(error(key, "differs from layer to layer, which is not supported")),
        }
    }

    fn scalar_json(&self, key: &str, value: &Value) -> Result<Json> {
        Ok(match value {
            Value::Unsigned(value) => Json::from(*value),
            Value::Signed(value) => Json::from(*value),
            Value::Float(value) => {
                let number = Number::from_f64(as_meant(*value));
                Json::Number(number.ok_or_else(|| error(key, format!("is {value}, must be finite")))?)
            }
            Value::Bool(value) => Json::Bool(*value),
            Value::String(_) => Json::from(self.string(key)?.unwrap_or_default()),
            Value::Strings(_) | Value::Numbers { .. } => Json::Array(Vec::new()),
        })
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        convert: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.values.get(key) else { return Ok(None) };
        let converted = convert(value);
        converted.map(Some).ok_or_else(|| error(key, format!("is {}, must be {expected}", value.kind_name())))
    }
}

/// The shortest decimal number that is rounded to `value` where that is of single precision: what the configuration said
/// from which a converter made it. Widened, an epsilon of 1e-12 would be below itself.
fn as_meant(value: f64) -> f64 {
    let single = value as f32;
    if f64::from(single) == value { single.to_string().parse().unwrap_or(value) } else { value }
}

/// The entries of an array of numbers; an entry is `None` where it has no value.
fn items(kind: Kind, bytes: &[u8]) -> impl Iterator<Item = Option<Value>> {
    bytes.chunks_exact(kind.size_bytes().unwrap_or(1)).map(move |bytes| kind.scalar(bytes))
}

/// An error about the value of `key`.
pub(super) fn error(key: &str, reason: impl Into<String>) -> Error {
    Error::Config { file: FILE, field: key.to_string(), reason: reason.into() }
}
