//! Conversations, from the forms in which clients write them to the engine's: contents as plain text, and nothing in them
//! that would be lost.

use ns_llm::Message;
use serde_json::Value;

use crate::error::{ApiError, ApiResult};
use crate::fields::{Fields, shown};

/// The conversation in an array of `{role, content}`, found at `path`.
pub(crate) fn read_messages(value: Value, path: &str) -> ApiResult<Vec<Message>> {
    match value {
        Value::Array(messages) => {
            let messages = messages.into_iter().enumerate();
            messages.map(|(idx, message)| read_message(message, &format!("{path}[{idx}]"))).collect()
        }
        other => Err(ApiError::invalid(path, shown(&other), "an array of {role, content}")),
    }
}

fn read_message(value: Value, path: &str) -> ApiResult<Message> {
    let mut fields = Fields::of(value, path)?;
    let role = fields.text("role")?.ok_or_else(|| ApiError::invalid(fields.path("role"), "missing", "a string"))?;
    if role == "tool" || role == "function" {
        let expected = "\"system\", \"developer\", \"user\" or \"assistant\"";
        return Err(ApiError::not_supported(fields.path("role"), shown(&Value::from(role)), expected));
    }
    for name in ["tool_calls", "function_call", "audio", "images"] {
        match fields.get(name) {
            Some(Value::Array(values)) if values.is_empty() => {}
            Some(value) => return Err(ApiError::not_supported(fields.path(name), shown(value), "unset")),
            None => {}
        }
    }
    let path = fields.path("content");
    let content = match fields.take("content") {
        // An assistant that has called tools or refused says nothing.
        None if role == "assistant" => String::new(),
        None => return Err(ApiError::invalid(path, "missing", "a string or an array of parts")),
        Some(content) => read_content(content, &path)?,
    };
    Ok(Message { role: if role == "developer" { "system".to_string() } else { role }, content })
}

/// A text, whole or in parts.
pub(crate) fn read_content(value: Value, path: &str) -> ApiResult<String> {
    match value {
        Value::String(text) => Ok(text),
        Value::Array(parts) => {
            let parts = parts.into_iter().enumerate();
            parts.map(|(idx, part)| read_part(part, &format!("{path}[{idx}]"))).collect()
        }
        other => Err(ApiError::invalid(path, shown(&other), "a string or an array of parts")),
    }
}

fn read_part(value: Value, path: &str) -> ApiResult<String> {
    let mut part = Fields::of(value, path)?;
    let kind = part.text("type")?.unwrap_or_default();
    if !["text", "input_text", "output_text"].contains(&kind.as_str()) {
        return Err(ApiError::not_supported(part.path("type"), shown(&Value::from(kind)), "\"text\""));
    }
    part.text("text")?.ok_or_else(|| ApiError::invalid(part.path("text"), "missing", "a string"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Parts are joined, a developer is a system, an assistant may have said nothing; what would be lost is refused by
    /// its full name.
    #[test]
    fn conversations_are_read_whole() {
        let parts = json!([{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}]);
        let given =
            json!([{"role": "developer", "content": parts, "name": "x"}, {"role": "assistant", "content": null}]);
        let messages = read_messages(given, "messages").expect("valid");
        assert_eq!(messages, [Message::new("system", "ab"), Message::new("assistant", "")]);
        let cases = [
            (json!("hello"), "messages"),
            (json!([1]), "messages[0]"),
            (json!([{"content": "x"}]), "messages[0].role"),
            (json!([{"role": "user"}]), "messages[0].content"),
            (json!([{"role": "tool", "content": "x"}]), "messages[0].role"),
            (json!([{"role": "assistant", "tool_calls": [{}]}]), "messages[0].tool_calls"),
            (json!([{"role": "user", "content": [{"type": "image_url"}]}]), "messages[0].content[0].type"),
            (json!([{"role": "user", "content": [{"type": "text"}]}]), "messages[0].content[0].text"),
        ];
        for (given, param) in cases {
            let error = read_messages(given.clone(), "messages").expect_err("refused");
            assert_eq!((error.status.as_u16(), error.param.as_deref()), (400, Some(param)), "{given}");
        }
    }
}
