//! Typed reading of the JSON files of a model folder. Every getter names file and field when the value is not what it
//! should be; `null` counts as absent, as the writers of these files mean it. No getter converts: `"3"` and `3.5` are
//! not integers, `1` is not `true`.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// Fields are called what they are.
static NO_NAMES: BTreeMap<String, String> = BTreeMap::new();

/// A parsed file whose outermost value is an object. Nesting is bounded by the parser (128 levels).
#[derive(Debug, Clone)]
pub struct JsonFile {
    name: &'static str,
    root: Map<String, Value>,
    /// What fields are called where they came from, if that is another kind of file.
    names: BTreeMap<String, String>,
}

impl JsonFile {
    /// Parses `bytes`, the content of the file `name`.
    pub fn parse(name: &'static str, bytes: &[u8]) -> Result<JsonFile> {
        Ok(JsonFile { name, root: parse(name, bytes)?, names: BTreeMap::new() })
    }

    /// What another kind of file says, in the words of a JSON file. Errors about a field of `names` (with dots for
    /// nesting) call it by its name there.
    pub(super) fn translated(
        name: &'static str,
        root: Map<String, Value>,
        names: BTreeMap<String, String>,
    ) -> JsonFile {
        JsonFile { name, root, names }
    }

    /// The whole file as a tree.
    pub fn into_value(self) -> Value {
        Value::Object(self.root)
    }

    /// The outermost object.
    pub fn object(&self) -> JsonObject<'_> {
        JsonObject { file: self.name, path: String::new(), fields: &self.root, names: &self.names }
    }
}

/// A parsed file whose outermost value is a list of objects.
#[derive(Debug, Clone)]
pub struct JsonList {
    name: &'static str,
    entries: Vec<Map<String, Value>>,
}

impl JsonList {
    /// Parses `bytes`, the content of the file `name`.
    pub fn parse(name: &'static str, bytes: &[u8]) -> Result<JsonList> {
        Ok(JsonList { name, entries: parse(name, bytes)? })
    }

    /// An error about the list as a whole.
    pub fn error(&self, reason: impl Into<String>) -> Error {
        Error::Config { file: self.name, field: "(root)".to_string(), reason: reason.into() }
    }

    /// The objects, in order.
    pub fn objects(&self) -> Vec<JsonObject<'_>> {
        let object =
            |(idx, fields)| JsonObject { file: self.name, path: format!("[{idx}]."), fields, names: &NO_NAMES };
        self.entries.iter().enumerate().map(object).collect()
    }
}

fn parse<T: DeserializeOwned>(name: &'static str, bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|e| Error::InvalidJson {
        file: name.to_string(),
        line: e.line(),
        column: e.column(),
        reason: without_position(&e),
    })
}

/// What a JSON parser says, without the position that it appends: errors carry that in fields of their own.
pub(super) fn without_position(error: &serde_json::Error) -> String {
    let text = error.to_string();
    text.split(" at line ").next().unwrap_or_default().to_string()
}

/// An object inside a [`JsonFile`], which knows where it is.
#[derive(Debug, Clone)]
pub struct JsonObject<'a> {
    file: &'static str,
    /// Path of this object with a trailing dot, empty for the outermost.
    path: String,
    fields: &'a Map<String, Value>,
    /// As in [`JsonFile`].
    names: &'a BTreeMap<String, String>,
}

impl<'a> JsonObject<'a> {
    /// An error about `field` of this object.
    pub fn error(&self, field: &str, reason: impl Into<String>) -> Error {
        let path = format!("{}{field}", self.path);
        let field = self.names.get(&path).cloned().unwrap_or(path);
        Error::Config { file: self.file, field, reason: reason.into() }
    }

    /// Whether the field is written at all, be it as `null`.
    pub fn has(&self, field: &str) -> bool {
        self.fields.contains_key(field)
    }

    /// The value, unless it is absent or `null`.
    pub fn value(&self, field: &str) -> Option<&'a Value> {
        self.fields.get(field).filter(|value| !value.is_null())
    }

    /// Names of all fields.
    pub fn names(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        self.fields.keys().map(String::as_str)
    }

    /// `value`, which must be there.
    pub fn required<T>(&self, field: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| self.error(field, "is missing"))
    }

    /// A boolean.
    pub fn boolean(&self, field: &str) -> Result<Option<bool>> {
        self.typed(field, "a boolean", Value::as_bool)
    }

    /// A string.
    pub fn string(&self, field: &str) -> Result<Option<&'a str>> {
        self.typed(field, "a string", Value::as_str)
    }

    /// An array.
    pub fn array(&self, field: &str) -> Result<Option<&'a [Value]>> {
        self.typed(field, "an array", |value| value.as_array().map(Vec::as_slice))
    }

    /// An object.
    pub fn object(&self, field: &str) -> Result<Option<JsonObject<'a>>> {
        let fields = self.typed(field, "an object", Value::as_object)?;
        Ok(fields.map(|fields| JsonObject {
            file: self.file,
            path: format!("{}{field}.", self.path),
            fields,
            names: self.names,
        }))
    }

    /// An integer of `range`.
    pub fn integer(&self, field: &str, range: RangeInclusive<u64>) -> Result<Option<u64>> {
        self.value(field).map(|value| self.checked_integer(field, value, &range)).transpose()
    }

    /// An integer of `range`, as a size.
    pub fn size(&self, field: &str, range: RangeInclusive<usize>) -> Result<Option<usize>> {
        let value = self.integer(field, *range.start() as u64..=*range.end() as u64)?;
        Ok(value.map(|value| usize::try_from(value).expect("bounded by a usize")))
    }

    /// A finite number of `range`.
    pub fn number(&self, field: &str, range: RangeInclusive<f64>) -> Result<Option<f64>> {
        let Some(value) = self.typed(field, "a number", Value::as_f64)? else { return Ok(None) };
        if range.contains(&value) {
            return Ok(Some(value));
        }
        Err(self.error(field, format!("is {value}, must be {} to {}", range.start(), range.end())))
    }

    /// Token ids below `vocab_size`: one integer or a list of at most `max_len`. Absent: none.
    pub fn token_ids(&self, field: &str, vocab_size: usize, max_len: usize) -> Result<Vec<u32>> {
        let range = 0..=(vocab_size as u64).saturating_sub(1).min(u64::from(u32::MAX));
        let values = match self.value(field) {
            None => return Ok(Vec::new()),
            Some(Value::Array(values)) => values.as_slice(),
            Some(value) => std::slice::from_ref(value),
        };
        if values.len() > max_len {
            return Err(self.error(field, format!("has {} entries, at most {max_len} are allowed", values.len())));
        }
        let id = |value| Ok(self.checked_integer(field, value, &range)? as u32);
        values.iter().map(id).collect()
    }

    fn checked_integer(&self, field: &str, value: &Value, range: &RangeInclusive<u64>) -> Result<u64> {
        match value.as_u64() {
            Some(integer) if range.contains(&integer) => Ok(integer),
            _ if value.is_number() => {
                let (min, max) = (range.start(), range.end());
                Err(self.error(field, format!("is {value}, must be an integer of {min} to {max}")))
            }
            _ => Err(self.error(field, format!("is {}, must be an integer", kind(value)))),
        }
    }

    fn typed<T>(&self, field: &str, expected: &str, convert: impl Fn(&'a Value) -> Option<T>) -> Result<Option<T>> {
        let Some(value) = self.value(field) else { return Ok(None) };
        let converted = convert(value);
        if converted.is_none() {
            return Err(self.error(field, format!("is {}, must be {expected}", kind(value))));
        }
        Ok(converted)
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every getter refuses every other type with the path of the field, and takes `null` for absent: shown by asking
    /// each getter for a field of each type.
    #[test]
    fn getters_refuse_other_types_by_path() {
        let text = br#"{"a": {"null": null, "bool": true, "int": 3, "float": 3.5, "string": "3", "array": [3], "object": {}}}"#;
        let file = JsonFile::parse("config.json", text).unwrap();
        let a = file.object().object("a").unwrap().unwrap();
        type Getter = (&'static [&'static str], Box<dyn Fn(&JsonObject<'_>, &str) -> Result<bool>>);
        let getters: Vec<Getter> = vec![
            (&["bool"], Box::new(|o, f| Ok(o.boolean(f)?.is_some()))),
            (&["string"], Box::new(|o, f| Ok(o.string(f)?.is_some()))),
            (&["array"], Box::new(|o, f| Ok(o.array(f)?.is_some()))),
            (&["object"], Box::new(|o, f| Ok(o.object(f)?.is_some()))),
            (&["int"], Box::new(|o, f| Ok(o.size(f, 0..=9)?.is_some()))),
            (&["int", "float"], Box::new(|o, f| Ok(o.number(f, 0.0..=9.0)?.is_some()))),
            (&["int", "array"], Box::new(|o, f| Ok(!o.token_ids(f, 9, 1)?.is_empty()))),
        ];
        let mut refused = 0;
        for (i, (accepts, getter)) in getters.iter().enumerate() {
            assert_eq!(getter(&a, "null"), Ok(false));
            assert_eq!(getter(&a, "absent"), Ok(false));
            for field in ["bool", "int", "float", "string", "array", "object"] {
                match getter(&a, field) {
                    Ok(found) => assert!(found && accepts.contains(&field), "getter {i} took {field}"),
                    Err(e) => {
                        assert!(!accepts.contains(&field), "getter {i} refused {field}: {e}");
                        assert!(e.to_string().starts_with(&format!("config.json: field `a.{field}`: is ")), "{e}");
                        refused += 1;
                    }
                }
            }
        }
        assert_eq!(refused, 7 * 6 - 9);
    }

    /// Ranges are closed, and what lies outside is named with both limits.
    #[test]
    fn ranges_are_closed() {
        let file = JsonFile::parse("config.json", br#"{"n": 8, "big": 1e300, "neg": -1, "ids": [1, 8]}"#).unwrap();
        let o = file.object();
        assert_eq!(o.size("n", 1..=8), Ok(Some(8)));
        assert_eq!(
            o.size("n", 1..=7).unwrap_err().to_string(),
            "config.json: field `n`: is 8, must be an integer of 1 to 7"
        );
        assert!(o.size("neg", 0..=7).unwrap_err().to_string().contains("is -1, must be an integer of 0 to 7"));
        assert!(o.size("big", 0..=7).is_err());
        assert!(o.number("big", 0.0..=1e9).unwrap_err().to_string().contains("must be 0 to 1000000000"));
        assert!(o.token_ids("ids", 8, 2).is_err());
        assert_eq!(o.token_ids("ids", 9, 2), Ok(vec![1, 8]));
        assert!(o.token_ids("ids", 9, 1).unwrap_err().to_string().contains("has 2 entries, at most 1"));
    }

    /// What is not JSON is refused with its position: shown for text cut off, a NaN and a nesting beyond the parser's bound.
    #[test]
    fn syntax_errors_carry_their_position() {
        let bomb = "[".repeat(100_000);
        for (text, reason) in [("{\n\"a\": ", "EOF"), ("{\"a\": NaN}", "expected"), ("[1]", "invalid type")] {
            let e = JsonFile::parse("config.json", text.as_bytes()).unwrap_err();
            assert_eq!(e.code(), "invalid_json");
            assert!(e.to_string().contains(reason), "{e}");
        }
        let nested = format!("{{\"a\": {bomb}");
        assert!(JsonFile::parse("config.json", nested.as_bytes()).unwrap_err().to_string().contains("recursion limit"));
    }
}
