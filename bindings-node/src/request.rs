//! JavaScript objects as the engine's requests and options. This reads properties and refuses wrong types and unknown
//! names; which values a field may have, and every default, is the engine's business.

use napi::bindgen_prelude::{BigInt, FromNapiValue, JsObjectValue, Object, Uint32ArraySlice, Unknown};
use napi::{JsString, JsValue, ValueType};
use ns_llm::config::{
    MAX_EMBEDDING_INPUTS, MAX_LOGIT_BIAS, MAX_MESSAGES, MAX_PROMPT_BYTES, MAX_RESPONSE_TAGS, MAX_STOP_STRINGS,
};
use ns_llm::{
    CacheUse, Device, EmbeddingInput, EmbeddingRequest, EngineOptions, Error, KvDtype, KvRemoteOptions, KvTierEncoding,
    Message, Priority, Prompt, PutOptions, Request, ResponseCacheOptions, SamplingOptions, ThreadPriority,
    WeightFormat,
};

use crate::error::{Result, from_napi, invalid, to_js};

/// Largest integer that a JavaScript number holds exactly, 2^53 - 1.
pub(crate) const MAX_SAFE_INTEGER: f64 = 9_007_199_254_740_991.0;

/// Every name that [`read_request`] knows. Another name is most likely a typing error, and refused.
const REQUEST_FIELDS: &[&str] = &[
    "prompt",
    "messages",
    "tokens",
    "maxTokens",
    "temperature",
    "topK",
    "topP",
    "minP",
    "repetitionPenalty",
    "presencePenalty",
    "frequencyPenalty",
    "logitBias",
    "seed",
    "stop",
    "stopTokenIds",
    "ignoreEos",
    "n",
    "logprobs",
    "promptLogprobs",
    "priority",
    "timeoutMs",
    "namespace",
    "prefixCache",
    "responseCache",
    "responseTags",
    "responseTtlMs",
];

/// Every name that [`read_embedding_request`] knows.
const EMBEDDING_FIELDS: &[&str] = &["input", "truncate", "normalize", "dimensions", "priority", "timeoutMs"];

/// Every name that [`read_engine_options`] knows.
const ENGINE_FIELDS: &[&str] = &[
    "model",
    "device",
    "weights",
    "kvDtype",
    "threads",
    "threadPriority",
    "contextTokens",
    "kvBytes",
    "memoryLimit",
    "blockTokens",
    "maxRunningSequences",
    "maxCudaGraphs",
    "prefillBudgetTokens",
    "mixedBudgetTokens",
    "maxWaitingRequests",
    "prefixCache",
    "kvHostBytes",
    "kvCacheDir",
    "kvDiskBytes",
    "kvLoadBudgetMs",
    "kvNamespaceShare",
    "kvRemote",
    "kvTierEncoding",
    "responseCache",
];

/// Every name that [`read_response_cache_options`] knows.
const RESPONSE_CACHE_FIELDS: &[&str] =
    &["maxBytes", "maxEntries", "ttlMs", "adaptiveTtl", "version", "diskBytes", "remote"];

/// Every name that [`read_remote_options`] knows.
const REMOTE_FIELDS: &[&str] = &["url", "secret", "ttlS", "prefix", "timeoutMs", "ownerBytes"];

/// Every name that [`read_put_options`] knows.
const PUT_FIELDS: &[&str] = &["ttlMs", "tags"];

/// One request from one plain object.
pub(crate) fn read_request(object: &Object) -> Result<Request> {
    let fields = Fields::of(object, REQUEST_FIELDS)?;
    let mut request = match read_prompt(&fields)? {
        Prompt::Text(text) => Request::prompt(text),
        Prompt::Tokens(ids) => Request::tokens(ids),
        Prompt::Chat(messages) => Request::chat(messages),
    };
    request.max_tokens = fields.integer("maxTokens")?.map(as_usize);
    request.sampling = read_sampling(&fields)?;
    request.stop = fields.strings("stop", MAX_STOP_STRINGS)?;
    request.stop_token_ids = fields.token_ids("stopTokenIds")?.unwrap_or_default();
    request.ignore_eos = fields.boolean("ignoreEos")?.unwrap_or(request.ignore_eos);
    request.n = fields.integer("n")?.map_or(request.n, as_usize);
    request.logprobs = fields.integer("logprobs")?.map(as_usize);
    request.prompt_logprobs = fields.boolean("promptLogprobs")?.unwrap_or(request.prompt_logprobs);
    request.priority = fields.named("priority", Priority::from_name)?.unwrap_or(request.priority);
    request.timeout_ms = fields.integer("timeoutMs")?;
    request.namespace = fields.string("namespace")?;
    request.prefix_cache = fields.named("prefixCache", CacheUse::from_name)?.unwrap_or(request.prefix_cache);
    request.response_cache = fields.named("responseCache", CacheUse::from_name)?;
    request.response_tags = fields.strings("responseTags", MAX_RESPONSE_TAGS)?;
    request.response_ttl_ms = fields.integer("responseTtlMs")?;
    Ok(request)
}

/// One embedding request from one plain object; `input` is an array of strings and `Uint32Array`s.
pub(crate) fn read_embedding_request(object: &Object) -> Result<EmbeddingRequest> {
    let fields = Fields::of(object, EMBEDDING_FIELDS)?;
    let mut request = EmbeddingRequest::new(fields.embedding_inputs("input")?);
    request.truncate = fields.boolean("truncate")?.unwrap_or(request.truncate);
    request.normalize = fields.boolean("normalize")?.unwrap_or(request.normalize);
    request.dimensions = fields.integer("dimensions")?.map(as_usize);
    request.priority = fields.named("priority", Priority::from_name)?.unwrap_or(request.priority);
    request.timeout_ms = fields.integer("timeoutMs")?;
    Ok(request)
}

/// The options of an engine from one plain object; `model` is a path.
pub(crate) fn read_engine_options(object: &Object) -> Result<EngineOptions> {
    let fields = Fields::of(object, ENGINE_FIELDS)?;
    let model = fields.string("model")?.filter(|path| !path.is_empty() && !path.contains('\0'));
    let model =
        model.ok_or_else(|| to_js(&invalid("model", "no path", "the path of a model folder or of a GGUF file")))?;
    let mut options = EngineOptions::new(model);
    options.device = fields.named("device", Device::from_name)?.unwrap_or_default();
    options.weights = fields.named("weights", WeightFormat::from_name)?.unwrap_or_default();
    options.kv_dtype = fields.named("kvDtype", KvDtype::from_name_or_auto)?.flatten();
    options.threads = fields.integer("threads")?.map(as_usize);
    options.thread_priority = fields.named("threadPriority", ThreadPriority::from_name)?.unwrap_or_default();
    options.context_tokens = fields.integer("contextTokens")?.map(as_usize);
    options.kv_bytes = fields.integer("kvBytes")?;
    options.memory_limit_bytes = fields.integer("memoryLimit")?;
    for (name, size) in [
        ("blockTokens", &mut options.block_tokens),
        ("maxRunningSequences", &mut options.max_running_sequences),
        ("maxCudaGraphs", &mut options.max_cuda_graphs),
        ("prefillBudgetTokens", &mut options.prefill_budget_tokens),
        ("mixedBudgetTokens", &mut options.mixed_budget_tokens),
        ("maxWaitingRequests", &mut options.max_waiting_requests),
    ] {
        *size = fields.integer(name)?.map_or(*size, as_usize);
    }
    options.prefix_cache = fields.boolean("prefixCache")?.unwrap_or(options.prefix_cache);
    options.kv_host_bytes = fields.integer("kvHostBytes")?.unwrap_or(options.kv_host_bytes);
    if let Some(directory) = fields.string("kvCacheDir")? {
        if directory.is_empty() || directory.contains('\0') {
            return Err(to_js(&invalid("kvCacheDir", "no path", "the path of a directory")));
        }
        options.kv_cache_dir = Some(directory.into());
    }
    if let Some(remote) = fields.object("kvRemote", "an object of options")? {
        options.kv_remote = Some(read_remote_options(&remote)?);
    }
    options.kv_disk_bytes = fields.integer("kvDiskBytes")?.unwrap_or(options.kv_disk_bytes);
    options.kv_tier_encoding = fields.named("kvTierEncoding", KvTierEncoding::from_name)?.unwrap_or_default();
    options.kv_load_budget_ms = fields.integer("kvLoadBudgetMs")?.unwrap_or(options.kv_load_budget_ms);
    options.kv_namespace_share = fields.double("kvNamespaceShare")?.unwrap_or(options.kv_namespace_share);
    if let Some(response_cache) = fields.object("responseCache", "an object of options")? {
        options.response_cache = read_response_cache_options(&response_cache)?;
    }
    Ok(options)
}

/// The options of a response cache from one plain object.
pub(crate) fn read_response_cache_options(object: &Object) -> Result<ResponseCacheOptions> {
    let fields = Fields::of(object, RESPONSE_CACHE_FIELDS)?;
    let mut options = ResponseCacheOptions::default();
    options.max_bytes = fields.integer("maxBytes")?.unwrap_or(options.max_bytes);
    options.max_entries = fields.integer("maxEntries")?.unwrap_or(options.max_entries);
    options.ttl_ms = fields.integer("ttlMs")?.unwrap_or(options.ttl_ms);
    options.adaptive_ttl = fields.boolean("adaptiveTtl")?.unwrap_or(options.adaptive_ttl);
    options.version = fields.integer("version")?.unwrap_or(options.version);
    options.disk_bytes = fields.integer("diskBytes")?.unwrap_or(options.disk_bytes);
    options.remote = fields.boolean("remote")?.unwrap_or(options.remote);
    Ok(options)
}

/// A store that nodes share, from one plain object.
fn read_remote_options(object: &Object) -> Result<KvRemoteOptions> {
    let fields = Fields::of(object, REMOTE_FIELDS)?;
    let url = fields.string("url")?.ok_or_else(|| to_js(&invalid("kvRemote.url", "missing", "the URL of a store")))?;
    let mut remote = KvRemoteOptions::new(url);
    remote.secret = fields.string("secret")?;
    remote.ttl_s = fields.integer("ttlS")?.unwrap_or(remote.ttl_s);
    remote.prefix = fields.string("prefix")?.unwrap_or(remote.prefix);
    remote.owner_bytes = fields.integer("ownerBytes")?;
    remote.timeout_ms = fields.integer("timeoutMs")?.unwrap_or(remote.timeout_ms);
    Ok(remote)
}

/// How a caller's value is kept, from one plain object.
pub(crate) fn read_put_options(object: &Object) -> Result<PutOptions> {
    let fields = Fields::of(object, PUT_FIELDS)?;
    Ok(PutOptions { ttl_ms: fields.integer("ttlMs")?, tags: fields.strings("tags", MAX_RESPONSE_TAGS)? })
}

/// Exactly one of `prompt` (text), `messages` and `tokens`.
fn read_prompt(fields: &Fields) -> Result<Prompt> {
    let text = fields.string("prompt")?.map(Prompt::Text);
    let chat = fields.messages("messages")?.map(Prompt::Chat);
    let tokens = fields.token_ids("tokens")?.map(Prompt::Tokens);
    let mut given = [text, chat, tokens].into_iter().flatten();
    match (given.next(), given.next()) {
        (Some(prompt), None) => Ok(prompt),
        (None, _) => Err(to_js(&invalid("prompt", "not given", "a string, or `messages`, or `tokens`"))),
        (Some(_), Some(_)) => {
            Err(to_js(&invalid("prompt", "given twice", "only one of `prompt`, `messages` and `tokens`")))
        }
    }
}

fn read_sampling(fields: &Fields) -> Result<SamplingOptions> {
    let mut sampling = SamplingOptions::default();
    sampling.temperature = fields.number("temperature")?;
    sampling.top_k = fields.u32("topK")?;
    sampling.top_p = fields.number("topP")?;
    sampling.min_p = fields.number("minP")?;
    sampling.repetition_penalty = fields.number("repetitionPenalty")?;
    sampling.presence_penalty = fields.number("presencePenalty")?;
    sampling.frequency_penalty = fields.number("frequencyPenalty")?;
    sampling.logit_bias = fields.logit_bias("logitBias")?;
    sampling.seed = fields.seed("seed")?;
    Ok(sampling)
}

/// A count that is beyond the engine's limits anyway keeps being so.
pub(crate) fn as_usize(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

/// The properties of one object, read by name and type. `undefined` and `null` mean: not given.
pub(crate) struct Fields<'a, 'env> {
    object: &'a Object<'env>,
    /// Names that the object has. JavaScript is not asked for the others, which are most.
    given: Vec<String>,
}

impl<'a, 'env> Fields<'a, 'env> {
    pub(crate) fn of(object: &'a Object<'env>, known: &[&str]) -> Result<Self> {
        let given = Object::keys(object).map_err(from_napi)?;
        if let Some(name) = given.iter().find(|name| !known.contains(&name.as_str())) {
            return Err(to_js(&invalid("option", format!("\"{name}\""), &format!("one of {}", known.join(", ")))));
        }
        Ok(Fields { object, given })
    }

    fn get(&self, name: &'static str) -> Result<Option<Unknown<'env>>> {
        if !self.given.iter().any(|given| given == name) {
            return Ok(None);
        }
        let value = self.object.get::<Unknown>(name).map_err(from_napi)?;
        Ok(value.filter(|value| !matches!(value.get_type(), Ok(ValueType::Undefined | ValueType::Null))))
    }

    fn object(&self, name: &'static str, expected: &str) -> Result<Option<Object<'env>>> {
        self.get(name)?.map(|value| object(name, value, expected)).transpose()
    }

    pub(crate) fn boolean(&self, name: &'static str) -> Result<Option<bool>> {
        self.get(name)?.map(|value| cast(name, value, ValueType::Boolean, "true or false")).transpose()
    }

    fn double(&self, name: &'static str) -> Result<Option<f64>> {
        self.get(name)?.map(|value| cast(name, value, ValueType::Number, "a number")).transpose()
    }

    fn number(&self, name: &'static str) -> Result<Option<f32>> {
        Ok(self.double(name)?.map(|value| value as f32))
    }

    pub(crate) fn integer(&self, name: &'static str) -> Result<Option<u64>> {
        self.double(name)?.map(|value| integer(name, value, MAX_SAFE_INTEGER)).transpose()
    }

    pub(crate) fn u32(&self, name: &'static str) -> Result<Option<u32>> {
        let value = self.double(name)?.map(|value| integer(name, value, f64::from(u32::MAX))).transpose()?;
        Ok(value.map(|value| value as u32))
    }

    pub(crate) fn string(&self, name: &'static str) -> Result<Option<String>> {
        self.get(name)?.map(|value| read_text(name, value)).transpose()
    }

    /// An array of at most `max` objects; none when it is not there.
    pub(crate) fn objects(&self, name: &'static str, max: usize, expected: &str) -> Result<Vec<Object<'env>>> {
        let Some(value) = self.get(name)? else { return Ok(Vec::new()) };
        elements(name, value, max, expected)?.into_iter().map(|element| object(name, element, expected)).collect()
    }

    /// A string, or an array of at most `max` strings.
    pub(crate) fn strings(&self, name: &'static str, max: usize) -> Result<Vec<String>> {
        let Some(value) = self.get(name)? else { return Ok(Vec::new()) };
        if matches!(value.get_type(), Ok(ValueType::String)) {
            return Ok(vec![read_text(name, value)?]);
        }
        elements(name, value, max, "a string or an array of strings")?
            .into_iter()
            .map(|element| read_text(name, element))
            .collect()
    }

    /// A copy of a `Uint32Array`, so that the caller may change or transfer it at once.
    fn token_ids(&self, name: &'static str) -> Result<Option<Vec<u32>>> {
        self.get(name)?.map(|value| read_token_ids(name, value)).transpose()
    }

    fn embedding_inputs(&self, name: &'static str) -> Result<Vec<EmbeddingInput>> {
        let expected = "an array of strings and of Uint32Arrays";
        let value = self.get(name)?.ok_or_else(|| to_js(&invalid(name, "not given", expected)))?;
        let mut size = CopiedBytes::of(name);
        let input = |value: Unknown| {
            let input = if matches!(value.get_type(), Ok(ValueType::String)) {
                EmbeddingInput::Text(read_text(name, value)?)
            } else {
                EmbeddingInput::Tokens(read_token_ids(name, value)?)
            };
            size.add(match &input {
                EmbeddingInput::Text(text) => text.len(),
                EmbeddingInput::Tokens(ids) => size_of_val(ids.as_slice()),
            })?;
            Ok(input)
        };
        elements(name, value, MAX_EMBEDDING_INPUTS, expected)?.into_iter().map(input).collect()
    }

    fn messages(&self, name: &'static str) -> Result<Option<Vec<Message>>> {
        let Some(value) = self.get(name)? else { return Ok(None) };
        let expected = "an array of { role, content }";
        let mut size = CopiedBytes::of(name);
        let message = |value: Unknown| {
            let message = message(name, value, expected)?;
            size.add(message.role.len() + message.content.len())?;
            Ok(message)
        };
        elements(name, value, MAX_MESSAGES, expected)?.into_iter().map(message).collect::<Result<_>>().map(Some)
    }

    /// An object whose keys are token ids.
    fn logit_bias(&self, name: &'static str) -> Result<Vec<(u32, f32)>> {
        let Some(value) = self.get(name)? else { return Ok(Vec::new()) };
        let object = object(name, value, "an object from token ids to numbers")?;
        let keys = Object::keys(&object).map_err(from_napi)?;
        if keys.len() > MAX_LOGIT_BIAS {
            let limit = format!("at most {MAX_LOGIT_BIAS} entries");
            return Err(to_js(&invalid(name, format!("{} entries long", keys.len()), &limit)));
        }
        keys.iter().map(|key| bias(name, &object, key)).collect()
    }

    /// A seed has 64 bits, so it may also be a bigint.
    fn seed(&self, name: &'static str) -> Result<Option<u64>> {
        let Some(value) = self.get(name)? else { return Ok(None) };
        if !matches!(value.get_type(), Ok(ValueType::BigInt)) {
            return self.integer(name);
        }
        let (negative, seed, lossless) = BigInt::from_unknown(value).map_err(from_napi)?.get_u64();
        if negative || !lossless {
            return Err(to_js(&invalid(name, "a bigint beyond 64 bits", "0 to 2^64 - 1")));
        }
        Ok(Some(seed))
    }

    /// A value of the engine's by its name.
    pub(crate) fn named<T>(&self, name: &'static str, from_name: fn(&str) -> ns_llm::Result<T>) -> Result<Option<T>> {
        let Some(value) = self.string(name)? else { return Ok(None) };
        from_name(&value).map(Some).map_err(|error| match error {
            Error::InvalidArgument { expected, .. } => {
                to_js(&invalid(name, format!("\"{}\"", shortened(&value)), &expected))
            }
            other => to_js(&other),
        })
    }
}

/// Bytes copied from JavaScript for one field so far. Many references to one long string are cheap there, and would be
/// gigabytes here before the engine could refuse them.
struct CopiedBytes {
    name: &'static str,
    bytes: usize,
}

impl CopiedBytes {
    fn of(name: &'static str) -> Self {
        CopiedBytes { name, bytes: 0 }
    }

    fn add(&mut self, bytes: usize) -> Result<()> {
        self.bytes += bytes;
        if self.bytes > MAX_PROMPT_BYTES {
            let value = format!("longer than {MAX_PROMPT_BYTES} bytes in all");
            return Err(to_js(&invalid(self.name, value, &format!("at most {MAX_PROMPT_BYTES} bytes"))));
        }
        Ok(())
    }
}

fn message(name: &'static str, value: Unknown, expected: &str) -> Result<Message> {
    let value = object(name, value, expected)?;
    let part = |key: &'static str| -> Result<String> {
        let part = value.get::<Unknown>(key).map_err(from_napi)?;
        let part = part.ok_or_else(|| to_js(&invalid(name, format!("without a {key}"), expected)))?;
        read_text(if key == "role" { "messages[].role" } else { "messages[].content" }, part)
    };
    Ok(Message::new(part("role")?, part("content")?))
}

fn bias(name: &'static str, object: &Object, key: &str) -> Result<(u32, f32)> {
    let id = key.parse().map_err(|_| {
        to_js(&invalid(
            name,
            format!("an object with the key \"{}\"", shortened(key)),
            "an object whose keys are token ids",
        ))
    })?;
    let value = object.get::<Unknown>(key).map_err(from_napi)?;
    let value = value.ok_or_else(|| to_js(&invalid(name, "undefined", "a number for each token id")))?;
    let value: f64 = cast(name, value, ValueType::Number, "a number for each token id")?;
    Ok((id, value as f32))
}

/// An integer that `value` stands for exactly.
fn integer(name: &'static str, value: f64, max: f64) -> Result<u64> {
    // NaN is in no range.
    if (0.0..=max).contains(&value) && value.fract() == 0.0 {
        return Ok(value as u64);
    }
    Err(to_js(&invalid(name, value.to_string(), &format!("an integer from 0 to {max}"))))
}

/// A string. One that is too long for any prompt is refused before it is copied: UTF-8 is never shorter than UTF-16.
pub(crate) fn read_text(name: &'static str, value: Unknown) -> Result<String> {
    let text: JsString = cast(name, value, ValueType::String, "a string")?;
    let len = text.utf16_len().map_err(from_napi)?;
    if len > MAX_PROMPT_BYTES {
        let limit = format!("at most {MAX_PROMPT_BYTES} bytes");
        return Err(to_js(&invalid(name, format!("{len} characters long"), &limit)));
    }
    text.into_utf8().and_then(|text| text.into_owned()).map_err(from_napi)
}

/// Token ids out of a `Uint32Array`.
fn read_token_ids(name: &'static str, value: Unknown) -> Result<Vec<u32>> {
    let described = type_name(&value);
    let ids = Uint32ArraySlice::from_unknown(value);
    let ids = ids.map_err(|_| to_js(&invalid(name, described, "an array of token ids")))?;
    if ids.len() > MAX_PROMPT_BYTES / 4 {
        let limit = format!("at most {} ids", MAX_PROMPT_BYTES / 4);
        return Err(to_js(&invalid(name, format!("{} ids long", ids.len()), &limit)));
    }
    Ok(ids.to_vec())
}

fn object<'env>(name: &'static str, value: Unknown<'env>, expected: &str) -> Result<Object<'env>> {
    cast(name, value, ValueType::Object, expected)
}

/// The elements of an array of at most `max`.
fn elements<'env>(name: &'static str, value: Unknown<'env>, max: usize, expected: &str) -> Result<Vec<Unknown<'env>>> {
    let array = object(name, value, expected)?;
    if !array.is_array().map_err(from_napi)? {
        return Err(to_js(&invalid(name, "an object", expected)));
    }
    let len = array.get_array_length().map_err(from_napi)?;
    if len as usize > max {
        return Err(to_js(&invalid(name, format!("{len} entries long"), &format!("at most {max} entries"))));
    }
    (0..len).map(|index| array.get_element(index).map_err(from_napi)).collect()
}

fn cast<T: FromNapiValue>(name: &'static str, value: Unknown, wanted: ValueType, expected: &str) -> Result<T> {
    if value.get_type().map_err(from_napi)? != wanted {
        return Err(to_js(&invalid(name, type_name(&value), expected)));
    }
    T::from_unknown(value).map_err(from_napi)
}

/// What a value is, for a message.
fn type_name(value: &Unknown) -> String {
    match value.get_type() {
        Ok(ValueType::Object) => "an object".into(),
        Ok(other) => format!("a {}", other.to_string().to_lowercase()),
        Err(_) => "not readable".into(),
    }
}

/// The start of a text, for a message.
fn shortened(text: &str) -> String {
    text.chars().take(40).collect()
}
