//! Reading a JSON body field by field: what is there has its type or is an error that names it; null means absent; what
//! nobody asks for is let pass, as OpenAI does.

use serde_json::{Map, Value};

use crate::error::{ApiError, ApiResult};
use crate::options::{MAX_BODY_CONTAINERS, MAX_BODY_VALUES};

/// Nesting of a body. What is parsed recursively is bounded before it is parsed.
const MAX_DEPTH: usize = 64;
/// Characters of a value that an error repeats.
const MAX_SHOWN_CHARS: usize = 40;

/// The fields of one JSON object.
#[derive(Debug, Default)]
pub(crate) struct Fields {
    map: Map<String, Value>,
    /// What leads to this object, with its dot; empty for the body itself.
    path: String,
}

impl Fields {
    /// The object that is a request's body.
    pub(crate) fn parse(body: &[u8]) -> ApiResult<Fields> {
        let Shape { depth, containers, commas } = shape(body);
        // What is parsed takes many times the memory of its text.
        for (param, value, limit) in [
            ("body (nesting)", depth, MAX_DEPTH),
            ("body (objects and arrays)", containers, MAX_BODY_CONTAINERS),
            ("body (values)", commas, MAX_BODY_VALUES),
        ] {
            if value > limit {
                return Err(ApiError::invalid(param, value.to_string(), format!("at most {limit}")));
            }
        }
        let value = serde_json::from_slice(body).map_err(|error| {
            // The parser's own words quote no content beyond a character.
            let place = format!("not JSON at line {}, column {}", error.line(), error.column());
            ApiError::invalid("body", place, "a JSON object")
        })?;
        Fields::of(value, "body")
    }

    /// The object that `value`, found at `path`, is.
    pub(crate) fn of(value: Value, path: &str) -> ApiResult<Fields> {
        match value {
            Value::Object(map) => {
                let path = if path == "body" { String::new() } else { format!("{path}.") };
                Ok(Fields { map, path })
            }
            other => Err(ApiError::invalid(path, shown(&other), "an object")),
        }
    }

    /// The full name of a field.
    pub(crate) fn path(&self, name: &str) -> String {
        format!("{}{name}", self.path)
    }

    /// Whether it is there and not null.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.get(name).is_some()
    }

    /// A value to look at.
    pub(crate) fn get(&self, name: &str) -> Option<&Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    /// A value of any type.
    pub(crate) fn take(&mut self, name: &str) -> Option<Value> {
        self.map.remove(name).filter(|value| !value.is_null())
    }

    /// Sets a value, in place of what is there.
    pub(crate) fn put(&mut self, name: &str, value: Value) {
        self.map.insert(name.to_string(), value);
    }

    /// A value that must be there.
    pub(crate) fn require(&mut self, name: &str, expected: &str) -> ApiResult<Value> {
        self.take(name).ok_or_else(|| ApiError::invalid(self.path(name), "missing", expected))
    }

    pub(crate) fn bool(&mut self, name: &str) -> ApiResult<Option<bool>> {
        self.typed(name, "true or false", |value| value.as_bool())
    }

    pub(crate) fn text(&mut self, name: &str) -> ApiResult<Option<String>> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(ApiError::invalid(self.path(name), shown(&other), "a string")),
        }
    }

    pub(crate) fn number(&mut self, name: &str) -> ApiResult<Option<f32>> {
        // Beyond the range of f32 it becomes infinite, which no range of the engine holds.
        self.typed(name, "a number", |value| value.as_f64().map(|number| number as f32))
    }

    /// A whole number that is not negative.
    pub(crate) fn count(&mut self, name: &str) -> ApiResult<Option<usize>> {
        self.typed(name, "a whole number of at least 0", |value| value.as_u64().and_then(|n| usize::try_from(n).ok()))
    }

    /// A whole number.
    pub(crate) fn integer(&mut self, name: &str) -> ApiResult<Option<i64>> {
        self.typed(name, "a whole number", Value::as_i64)
    }

    /// An object.
    pub(crate) fn object(&mut self, name: &str) -> ApiResult<Option<Fields>> {
        let path = self.path(name);
        self.take(name).map(|value| Fields::of(value, &path)).transpose()
    }

    /// A string, or an array of strings; none when it is not there.
    pub(crate) fn texts(&mut self, name: &str) -> ApiResult<Vec<String>> {
        let path = self.path(name);
        match self.take(name) {
            None => Ok(Vec::new()),
            Some(Value::String(text)) => Ok(vec![text]),
            Some(Value::Array(values)) => values
                .into_iter()
                .enumerate()
                .map(|(idx, value)| match value {
                    Value::String(text) => Ok(text),
                    other => Err(ApiError::invalid(format!("{path}[{idx}]"), shown(&other), "a string")),
                })
                .collect(),
            Some(other) => Err(ApiError::invalid(path, shown(&other), "a string or an array of strings")),
        }
    }

    /// Token ids.
    pub(crate) fn token_ids(&mut self, name: &str) -> ApiResult<Vec<u32>> {
        let path = self.path(name);
        match self.take(name) {
            None => Ok(Vec::new()),
            Some(Value::Array(values)) => token_ids(&values, &path),
            Some(other) => Err(ApiError::invalid(path, shown(&other), "an array of token ids")),
        }
    }

    fn typed<T>(&mut self, name: &str, expected: &str, read: impl Fn(&Value) -> Option<T>) -> ApiResult<Option<T>> {
        let Some(value) = self.take(name) else { return Ok(None) };
        match read(&value) {
            Some(typed) => Ok(Some(typed)),
            None => Err(ApiError::invalid(self.path(name), shown(&value), expected)),
        }
    }
}

/// The token ids in an array that was found at `path`.
pub(crate) fn token_ids(values: &[Value], path: &str) -> ApiResult<Vec<u32>> {
    let id = |(idx, value): (usize, &Value)| {
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        id.ok_or_else(|| ApiError::invalid(format!("{path}[{idx}]"), shown(value), "a token id"))
    };
    values.iter().enumerate().map(id).collect()
}

/// A value, for a message: short ones as they are, others by their kind.
pub(crate) fn shown(value: &Value) -> String {
    match value {
        Value::Null => "null".to_string(),
        Value::Bool(_) | Value::Number(_) => value.to_string(),
        Value::String(text) if text.chars().count() > MAX_SHOWN_CHARS => {
            format!("{:?}", text.chars().take(MAX_SHOWN_CHARS).chain(['…']).collect::<String>())
        }
        Value::String(text) => format!("{text:?}"),
        Value::Array(values) => format!("an array of {}", values.len()),
        Value::Object(map) => match map.get("type").and_then(Value::as_str) {
            Some(kind) => format!("an object of type {}", shown(&Value::from(kind))),
            None => "an object".to_string(),
        },
    }
}

/// What a body is made of, outside of its strings.
#[derive(Debug, Default, PartialEq)]
struct Shape {
    /// The deepest nesting of brackets.
    depth: usize,
    containers: usize,
    commas: usize,
}

fn shape(body: &[u8]) -> Shape {
    let (mut shape, mut depth, mut in_string, mut escaped) = (Shape::default(), 0usize, false, false);
    for &byte in body {
        match (in_string, byte) {
            (true, _) if escaped => escaped = false,
            (true, b'\\') => escaped = true,
            (true, b'"') => in_string = false,
            (false, b'"') => in_string = true,
            (false, b'{' | b'[') => {
                depth += 1;
                shape.depth = shape.depth.max(depth);
                shape.containers += 1;
            }
            (false, b',') => shape.commas += 1,
            (false, b'}' | b']') => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    shape
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Nesting is counted outside of strings only, and refused beyond its limit before anything recurses.
    #[test]
    fn nesting_is_bounded() {
        assert_eq!(shape(br#"{"a": ["[[,[[\"[[", {}]}"#), Shape { depth: 3, containers: 3, commas: 1 });
        let nested = |n: usize| format!("{{\"a\":{}{}}}", "[".repeat(n), "]".repeat(n));
        assert!(Fields::parse(nested(MAX_DEPTH - 1).as_bytes()).is_ok());
        let error = Fields::parse(nested(MAX_DEPTH).as_bytes()).expect_err("too deep");
        assert!(error.message.contains("65") && error.message.contains("64"), "{}", error.message);
        assert!(Fields::parse("[".repeat(1 << 20).as_bytes()).is_err());
    }

    /// A small text does not become a large tree: objects, arrays and values are counted before they are parsed.
    #[test]
    fn values_are_counted_before_they_are_parsed() {
        let of = |value: &str, n: usize| format!("{{\"x\":[{}]}}", vec![value; n].join(","));
        // The body and its array are containers, too; between n values are n - 1 commas.
        assert!(Fields::parse(of("{}", MAX_BODY_CONTAINERS - 2).as_bytes()).is_ok());
        assert!(Fields::parse(of("0", MAX_BODY_VALUES + 1).as_bytes()).is_ok());
        for (body, limit) in
            [(of("{}", MAX_BODY_CONTAINERS - 1), MAX_BODY_CONTAINERS), (of("0", MAX_BODY_VALUES + 2), MAX_BODY_VALUES)]
        {
            let error = Fields::parse(body.as_bytes()).expect_err("too many");
            assert!(error.message.contains(&(limit + 1).to_string()), "{}", error.message);
        }
    }

    /// Each type is refused by the field's full name; null is as good as nothing.
    #[test]
    fn fields_have_types_and_names() {
        let body = br#"{"a": 1.5, "b": null, "o": {"x": "y"}, "s": ["u", 3], "ids": [1, -1]}"#;
        let read = || Fields::parse(body).expect("an object");
        assert_eq!(read().number("a").expect("a number"), Some(1.5));
        assert_eq!(read().count("a").expect_err("no count").param.as_deref(), Some("a"));
        assert_eq!(read().bool("b").expect("absent"), None);
        let mut inner = read().object("o").expect("an object").expect("there");
        assert_eq!(inner.count("x").expect_err("a string").param.as_deref(), Some("o.x"));
        assert_eq!(read().texts("s").expect_err("one is none").param.as_deref(), Some("s[1]"));
        assert_eq!(read().token_ids("ids").expect_err("negative").param.as_deref(), Some("ids[1]"));
        assert_eq!(Fields::parse(b"[]").expect_err("no object").param.as_deref(), Some("body"));
        assert_eq!(Fields::parse(b"{\"a\":").expect_err("no JSON").status.as_u16(), 400);
    }

    /// An error repeats a bounded part of what it was given.
    #[test]
    fn errors_repeat_little() {
        let text = shown(&Value::from("x".repeat(1000)));
        assert!(text.chars().count() <= MAX_SHOWN_CHARS + 3, "{text}");
    }
}
