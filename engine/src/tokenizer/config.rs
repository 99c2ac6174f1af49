//! `tokenizer_config.json`: which tokens go around a prompt, the names of special tokens, the chat template. Only what
//! text needs; unknown fields are ignored, known ones of a wrong type are errors.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::error::{Error, Result};

const FILE: &str = "tokenizer_config.json";

/// What `tokenizer_config.json` says; every part of it is optional, and so is the file.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct TokenizerConfig {
    /// Whether a prompt begins with `bos_token`; `None`: as `tokenizer.json` says.
    pub add_bos_token: Option<bool>,
    /// Whether a prompt ends with `eos_token`; `None`: as `tokenizer.json` says.
    pub add_eos_token: Option<bool>,
    /// Text of the special tokens by role: `bos_token`, `eos_token`, `pad_token`, ... Templates see them under these
    /// names.
    pub special_tokens: BTreeMap<String, String>,
    /// Source of the chat template: the only one, or the one called "default".
    pub chat_template: Option<String>,
}

impl TokenizerConfig {
    /// Reads the parsed file.
    pub fn parse(json: &Value) -> Result<Self> {
        let fields = json.as_object().ok_or_else(|| error("(root)", "is not an object"))?;
        let mut special_tokens = BTreeMap::new();
        for (name, value) in fields.iter().filter(|(name, _)| is_token_name(name)) {
            if let Some(text) = token_text(name, value)? {
                special_tokens.insert(name.clone(), text);
            }
        }
        Ok(TokenizerConfig {
            add_bos_token: optional_bool(json, "add_bos_token")?,
            add_eos_token: optional_bool(json, "add_eos_token")?,
            special_tokens,
            chat_template: chat_template(json.get("chat_template"))?,
        })
    }
}

/// `add_bos_token` is a switch, not a token.
fn is_token_name(name: &str) -> bool {
    name.ends_with("_token") && !name.starts_with("add_")
}

/// A token is written as its text, as an object with its text in `content`, or as null.
fn token_text(name: &str, value: &Value) -> Result<Option<String>> {
    match value {
        Value::Null | Value::Bool(_) => Ok(None),
        Value::String(text) => Ok(Some(text.clone())),
        Value::Object(object) => match object.get("content") {
            Some(Value::String(text)) => Ok(Some(text.clone())),
            _ => Err(error(&format!("{name}.content"), "is not a string")),
        },
        _ => Err(error(name, "is neither a string nor an object")),
    }
}

fn optional_bool(json: &Value, field: &str) -> Result<Option<bool>> {
    match json.get(field) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Bool(value)) => Ok(Some(*value)),
        Some(_) => Err(error(field, "is not a boolean")),
    }
}

/// A template is a string, or a list of named ones; without a "default" among them there is none for plain chats.
fn chat_template(value: Option<&Value>) -> Result<Option<String>> {
    let named = match value {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::String(source)) => return Ok(Some(source.clone())),
        Some(Value::Array(named)) => named,
        Some(_) => return Err(error("chat_template", "is neither a string nor a list")),
    };
    for (idx, entry) in named.iter().enumerate() {
        let text = |field: &str| match entry.get(field) {
            Some(Value::String(text)) => Ok(text.clone()),
            _ => Err(error(&format!("chat_template[{idx}].{field}"), "is not a string")),
        };
        if text("name")? == "default" {
            return text("template").map(Some);
        }
    }
    Ok(None)
}

fn error(field: &str, reason: &str) -> Error {
    Error::Config { file: FILE, field: field.to_string(), reason: reason.to_string() }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Both spellings of a token, the switches, and the default of several templates are found.
    #[test]
    fn reads_every_spelling() {
        let config = TokenizerConfig::parse(&json!({
            "add_bos_token": true,
            "add_eos_token": null,
            "bos_token": "<s>",
            "eos_token": {"content": "</s>", "special": true},
            "unk_token": null,
            "chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}],
            "model_max_length": 1e30,
        }))
        .unwrap();
        assert_eq!((config.add_bos_token, config.add_eos_token), (Some(true), None));
        assert_eq!((&*config.special_tokens["bos_token"], &*config.special_tokens["eos_token"]), ("<s>", "</s>"));
        assert_eq!(config.special_tokens.len(), 2);
        assert_eq!(config.chat_template.as_deref(), Some("d"));
        assert_eq!(TokenizerConfig::parse(&json!({})).unwrap(), TokenizerConfig::default());
    }

    /// A field of a wrong type is an error that names it.
    #[test]
    fn wrong_types_name_their_field() {
        for (json, field) in [
            (json!([]), "(root)"),
            (json!({"add_bos_token": 1}), "add_bos_token"),
            (json!({"bos_token": 7}), "bos_token"),
            (json!({"eos_token": {"content": 1}}), "eos_token.content"),
            (json!({"chat_template": 3}), "chat_template"),
            (json!({"chat_template": [{"name": "default"}]}), "chat_template[0].template"),
            (json!({"chat_template": [{"template": "x"}]}), "chat_template[0].name"),
        ] {
            match TokenizerConfig::parse(&json) {
                Err(Error::Config { file, field: named, .. }) => assert_eq!((file, named.as_str()), (FILE, field)),
                other => panic!("{json}: {other:?}"),
            }
        }
    }
}
