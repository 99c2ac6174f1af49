//! How to sample, when to stop, who goes first: parameters that several routes share, in OpenAI's names and in those that
//! vLLM and llama.cpp's server have added. What would change the answer and cannot be followed is an error.

use ns_llm::{CacheUse, Priority, Request};
use serde_json::Value;

use crate::error::{ApiError, ApiResult};
use crate::fields::{Fields, shown};
use crate::keys::Caller;
use crate::options::MAX_CACHE_SALT_BYTES;

/// A parameter that asks for what is not there, and the values of it that ask for nothing.
struct NotSupported {
    name: &'static str,
    is_neutral: fn(&Value) -> bool,
    expected: &'static str,
}

const NOT_SUPPORTED: &[NotSupported] = &[
    NotSupported { name: "tools", is_neutral: is_empty, expected: "empty" },
    NotSupported {
        name: "tool_choice",
        is_neutral: |v| is_one_of(v, &["none", "auto"]),
        expected: "\"none\" or \"auto\"",
    },
    NotSupported { name: "functions", is_neutral: is_empty, expected: "empty" },
    NotSupported {
        name: "function_call",
        is_neutral: |v| is_one_of(v, &["none", "auto"]),
        expected: "\"none\" or \"auto\"",
    },
    NotSupported { name: "response_format", is_neutral: is_text_type, expected: "{\"type\": \"text\"}" },
    NotSupported { name: "modalities", is_neutral: is_text_only, expected: "[\"text\"]" },
    NotSupported { name: "audio", is_neutral: |_| false, expected: "unset" },
    NotSupported { name: "reasoning_effort", is_neutral: |v| is_one_of(v, &["none"]), expected: "\"none\"" },
    NotSupported { name: "verbosity", is_neutral: |v| is_one_of(v, &["medium"]), expected: "\"medium\"" },
    NotSupported { name: "web_search_options", is_neutral: |_| false, expected: "unset" },
    NotSupported { name: "guided_json", is_neutral: |_| false, expected: "unset" },
    NotSupported { name: "guided_regex", is_neutral: |_| false, expected: "unset" },
    NotSupported { name: "guided_choice", is_neutral: |_| false, expected: "unset" },
    NotSupported { name: "guided_grammar", is_neutral: |_| false, expected: "unset" },
    NotSupported { name: "structured_outputs", is_neutral: |_| false, expected: "unset" },
    NotSupported { name: "grammar", is_neutral: |_| false, expected: "unset" },
    NotSupported { name: "chat_template_kwargs", is_neutral: is_empty, expected: "empty" },
    NotSupported { name: "suffix", is_neutral: is_empty, expected: "unset" },
    NotSupported { name: "echo", is_neutral: |v| v == &Value::Bool(false), expected: "false" },
    NotSupported { name: "background", is_neutral: |v| v == &Value::Bool(false), expected: "false" },
];

/// Refuses what cannot be followed. Unknown names pass.
pub(crate) fn check_supported(fields: &Fields) -> ApiResult<()> {
    for NotSupported { name, is_neutral, expected } in NOT_SUPPORTED {
        match fields.get(name) {
            Some(value) if !is_neutral(value) => {
                return Err(ApiError::not_supported(fields.path(name), shown(value), expected));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Reads into `request` what every route of OpenAI's kind has.
pub(crate) fn read_shared(fields: &mut Fields, request: &mut Request, caller: &Caller) -> ApiResult<()> {
    check_supported(fields)?;
    let sampling = &mut request.sampling;
    sampling.temperature = fields.number("temperature")?;
    sampling.top_p = fields.number("top_p")?;
    sampling.min_p = fields.number("min_p")?;
    sampling.top_k = read_top_k(fields)?;
    sampling.repetition_penalty = fields.number("repetition_penalty")?;
    sampling.presence_penalty = fields.number("presence_penalty")?;
    sampling.frequency_penalty = fields.number("frequency_penalty")?;
    sampling.logit_bias = read_logit_bias(fields)?;
    // Any 64 bits are a key; OpenAI's is signed.
    sampling.seed = read_seed(fields)?;
    request.stop = fields.texts("stop")?;
    request.stop_token_ids = fields.token_ids("stop_token_ids")?;
    request.ignore_eos = fields.bool("ignore_eos")?.unwrap_or(false);
    request.n = fields.count("n")?.unwrap_or(1);
    if fields.bool("cache_prompt")? == Some(false) {
        request.prefix_cache = CacheUse::Off;
    }
    request.priority = read_priority(fields)?;
    request.timeout_ms = fields.count("timeout_ms")?.map(|timeout_ms| timeout_ms as u64);
    request.namespace = read_namespace(fields, caller)?;
    Ok(())
}

pub(crate) fn read_seed(fields: &mut Fields) -> ApiResult<Option<u64>> {
    match fields.get("seed").and_then(Value::as_u64) {
        Some(seed) => {
            fields.take("seed");
            Ok(Some(seed))
        }
        None => Ok(fields.integer("seed")?.map(|seed| seed as u64)),
    }
}

/// vLLM writes "all" as -1.
fn read_top_k(fields: &mut Fields) -> ApiResult<Option<u32>> {
    let path = fields.path("top_k");
    let top_k = fields.integer("top_k")?.map(|top_k| match top_k {
        -1 => Ok(0),
        top_k => u32::try_from(top_k).map_err(|_| ApiError::invalid(path, top_k.to_string(), "at least 0, or -1")),
    });
    top_k.transpose()
}

fn read_logit_bias(fields: &mut Fields) -> ApiResult<Vec<(u32, f32)>> {
    let path = fields.path("logit_bias");
    let entries = match fields.take("logit_bias") {
        None => return Ok(Vec::new()),
        Some(Value::Object(entries)) => entries,
        Some(other) => return Err(ApiError::invalid(path, shown(&other), "an object of token ids and numbers")),
    };
    let entry = |(id, bias): (String, Value)| {
        let id_of_token = id.parse::<u32>();
        let id_of_token =
            id_of_token.map_err(|_| ApiError::invalid(path.clone(), shown(&Value::from(id.as_str())), "a token id"));
        let bias = bias.as_f64().ok_or_else(|| ApiError::invalid(format!("{path}.{id}"), shown(&bias), "a number"));
        Ok((id_of_token?, bias? as f32))
    };
    entries.into_iter().map(entry).collect()
}

/// vLLM's number, lower first; OpenAI's tiers; or a class by its name.
pub(crate) fn read_priority(fields: &mut Fields) -> ApiResult<Priority> {
    let path = fields.path("priority");
    let tier = fields.text("service_tier")?;
    match fields.take("priority") {
        None => Ok(match tier.as_deref() {
            Some("priority") => Priority::High,
            Some("flex") => Priority::Background,
            _ => Priority::Normal,
        }),
        Some(value) => match (value.as_i64(), value.as_str()) {
            (Some(..0), _) => Ok(Priority::High),
            (Some(0), _) => Ok(Priority::Normal),
            (Some(_), _) => Ok(Priority::Background),
            (None, name) => name.and_then(|name| Priority::from_name(name).ok()).ok_or_else(|| {
                ApiError::invalid(path, shown(&value), "a whole number, \"high\", \"normal\" or \"background\"")
            }),
        },
    }
}

/// Where cached prefixes are shared: within a key, and within the salt that the caller adds.
fn read_namespace(fields: &mut Fields, caller: &Caller) -> ApiResult<Option<String>> {
    let salt = fields.text("cache_salt")?;
    if let Some(salt) = &salt
        && salt.len() > MAX_CACHE_SALT_BYTES
    {
        let (value, expected) = (format!("{} bytes", salt.len()), format!("at most {MAX_CACHE_SALT_BYTES} bytes"));
        return Err(ApiError::invalid(fields.path("cache_salt"), value, expected));
    }
    Ok(namespace(caller, salt.as_deref()))
}

/// The namespace of a caller's requests; `None`: that of the engine.
pub(crate) fn namespace(caller: &Caller, salt: Option<&str>) -> Option<String> {
    // Names of keys have no line breaks, so that no salt makes one key's namespace another's.
    match (caller.name(), salt) {
        (None, None) => None,
        (name, salt) => Some(format!("{}\n{}", name.unwrap_or_default(), salt.unwrap_or_default())),
    }
}

/// Most new tokens, under whichever of its names is given; the newer name wins.
pub(crate) fn read_max_tokens(fields: &mut Fields) -> ApiResult<(Option<usize>, &'static str)> {
    let older = fields.count("max_tokens")?;
    match fields.count("max_completion_tokens")? {
        Some(newer) => Ok((Some(newer), "max_completion_tokens")),
        None => Ok((older, "max_tokens")),
    }
}

/// Whether the answer comes in pieces, and whether its counts come with them.
pub(crate) fn read_stream(fields: &mut Fields) -> ApiResult<(bool, bool)> {
    let stream = fields.bool("stream")?.unwrap_or(false);
    let path = fields.path("stream_options");
    let Some(mut options) = fields.object("stream_options")? else { return Ok((stream, false)) };
    if !stream {
        return Err(ApiError::invalid(path, "given", "unset unless stream is true"));
    }
    Ok((stream, options.bool("include_usage")?.unwrap_or(false)))
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Array(values) => values.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::String(text) => text.is_empty(),
        _ => false,
    }
}

fn is_one_of(value: &Value, names: &[&str]) -> bool {
    value.as_str().is_some_and(|name| names.contains(&name))
}

/// `{"type": "text"}`.
pub(crate) fn is_text_type(value: &Value) -> bool {
    value.get("type").is_some_and(|kind| kind == "text")
}

fn is_text_only(value: &Value) -> bool {
    value.as_array().is_some_and(|values| values.iter().all(|value| value == "text"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the list of both faces says of each parameter of OpenAI's that cannot be followed; the package for Node is held to
    /// the same list.
    #[test]
    fn parameters_of_the_list_are_refused() {
        let list: Vec<Value> =
            serde_json::from_str(include_str!("../unsupported-parameters.json")).expect("the list is JSON");
        assert!(list.len() >= 10);
        for row in list {
            let name = row["name"].as_str().expect("a name");
            let check = |value: &Value| {
                let body = serde_json::json!({ name: value }).to_string();
                check_supported(&Fields::parse(body.as_bytes()).expect("an object"))
            };
            for value in row["neutral"].as_array().expect("values").iter().chain([&Value::Null]) {
                assert!(check(value).is_ok(), "{name}: {value}");
            }
            for value in row["refused"].as_array().expect("values") {
                let error = check(value).expect_err("refused");
                assert_eq!((error.code, error.param.as_deref()), ("not_supported", Some(name)), "{value}");
            }
        }
    }
}
