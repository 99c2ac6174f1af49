//! What an answer depends on, as one hash. Two requests that could be answered differently never have the same key; two that
//! must be answered alike have it wherever that is easy to see (a prompt as text or as its token ids, a sampling value
//! given or taken from the model's recommendation).
//!
//! The hash is a [`FieldHash`]: no two different lists of fields have the same bytes. A request
//! is taken apart with every field named, so that a new field does not compile until somebody has decided what it
//! means here.

use std::fmt;

use crate::field_hash::{FieldHash, FieldTag};
use crate::request::{Message, Prompt, Request, SamplingOptions, SamplingParams};

/// Version of the key's own format and of what is kept under it. It changes with either.
const FORMAT_VERSION: u32 = 1;

/// Name of an entry.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ResponseKey(pub [u8; 32]);

impl fmt::Debug for ResponseKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0[..8].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// What an answer depends on besides its request.
#[derive(Debug, Clone, Copy)]
pub struct KeyContext<'a> {
    /// Of the engine: hash of model, tokenizer, numerics and context length.
    pub identity: &'a [u8; 32],
    /// Of the cache; see [`Responses::set_version`](crate::Responses::set_version).
    pub version: u64,
    /// Hash of the request's namespace.
    pub namespace: &'a [u8; 32],
    /// The prompt as it is computed: rendered and encoded.
    pub prompt: &'a [u32],
    /// All tokens that end a choice, those of the model among them unless they are ignored.
    pub stop_token_ids: &'a [u32],
    /// Sampling as it will be done.
    pub sampling: &'a SamplingParams,
}

#[derive(Clone, Copy)]
#[repr(u8)]
enum Tag {
    FormatVersion = 1,
    Identity,
    Version,
    Namespace,
    Prompt,
    MaxTokens,
    StopStrings,
    StopTokens,
    IgnoreEos,
    Choices,
    Logprobs,
    PromptLogprobs,
    Temperature,
    TopK,
    TopP,
    MinP,
    RepetitionPenalty,
    PresencePenalty,
    FrequencyPenalty,
    LogitBias,
    Seed,
    Value,
    Mark,
    Request,
    PromptText,
    Role,
    Content,
    CacheUse,
}

impl FieldTag for Tag {
    fn number(self) -> u8 {
        self as u8
    }
}

/// What every key begins with.
fn key_hash(version: u64) -> FieldHash<Tag> {
    let hash = FieldHash::new().field(Tag::FormatVersion, &FORMAT_VERSION.to_le_bytes());
    hash.number(Tag::Version, version)
}

/// The key of the answer to `request`.
///
/// The seed counts where something is drawn: a greedy answer is the same with each. A request that draws and gives no seed
/// (which only takes part when it says so) shares its key with all such requests.
pub fn answer_key(request: &Request, context: &KeyContext<'_>) -> ResponseKey {
    let Request {
        // As it is computed.
        max_tokens: _,
        stop,
        ignore_eos,
        n,
        logprobs,
        prompt_logprobs,
        sampling: SamplingOptions { seed, temperature: _, top_k: _, top_p: _, min_p: _, .. },
        // In the context, as they are computed.
        prompt: _,
        stop_token_ids: _,
        namespace: _,
        // Who goes first, when it fails, what is read from caches: the answer is the same.
        priority: _,
        timeout_ms: _,
        prefix_cache: _,
        response_cache: _,
        response_tags: _,
        response_ttl_ms: _,
    } = request;
    let SamplingParams {
        temperature,
        top_k,
        top_p,
        min_p,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        logit_bias,
        // Drawn, unless the request gives one.
        seed: _,
    } = context.sampling;
    let mut stop_token_ids = context.stop_token_ids.to_vec();
    stop_token_ids.sort_unstable();
    stop_token_ids.dedup();
    let stop_strings: Vec<u8> =
        stop.iter().flat_map(|text| (text.len() as u64).to_le_bytes().into_iter().chain(text.bytes())).collect();
    let biases: Vec<u32> = logit_bias.iter().flat_map(|&(id, bias)| [id, bias.to_bits()]).collect();
    let is_drawn = *temperature > 0.0;
    let hash = key_hash(context.version)
        .field(Tag::Identity, context.identity)
        .field(Tag::Namespace, context.namespace)
        .numbers(Tag::Prompt, context.prompt)
        .optional(Tag::MaxTokens, Some(request.max_new_tokens() as u64))
        .field(Tag::StopStrings, &stop_strings)
        .numbers(Tag::StopTokens, &stop_token_ids)
        .flag(Tag::IgnoreEos, *ignore_eos)
        .optional(Tag::Choices, Some(*n as u64))
        .optional(Tag::Logprobs, logprobs.map(|count| count as u64))
        .flag(Tag::PromptLogprobs, *prompt_logprobs)
        .float(Tag::Temperature, *temperature)
        .numbers(Tag::TopK, &[*top_k])
        .float(Tag::TopP, *top_p)
        .float(Tag::MinP, *min_p)
        .float(Tag::RepetitionPenalty, *repetition_penalty)
        .float(Tag::PresencePenalty, *presence_penalty)
        .float(Tag::FrequencyPenalty, *frequency_penalty)
        .numbers(Tag::LogitBias, &biases)
        .optional(Tag::Seed, if is_drawn { *seed } else { None });
    ResponseKey(hash.finish())
}

/// The key of a request as it was asked, by all that its answer depends on before it is rendered, encoded and resolved: equal
/// keys ask one engine for one answer, unless its template tells the time. No request has the key of an answer or a value.
pub fn request_key(request: &Request, version: u64) -> ResponseKey {
    let Request {
        prompt,
        max_tokens,
        sampling,
        stop,
        stop_token_ids,
        ignore_eos,
        n,
        logprobs,
        prompt_logprobs,
        namespace,
        // With the values of sampling it says whether the cache takes part.
        response_cache,
        // Who goes first, when it fails, how it is kept: the answer is the same.
        priority: _,
        timeout_ms: _,
        prefix_cache: _,
        response_tags: _,
        response_ttl_ms: _,
    } = request;
    let SamplingOptions {
        temperature,
        top_k,
        top_p,
        min_p,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        logit_bias,
        seed,
    } = sampling;
    let mut hash = key_hash(version).field(Tag::Request, &[]);
    hash = match prompt {
        Prompt::Text(text) => hash.field(Tag::PromptText, text.as_bytes()),
        Prompt::Tokens(ids) => hash.numbers(Tag::Prompt, ids),
        Prompt::Chat(messages) => messages.iter().fold(hash, |hash, Message { role, content }| {
            hash.field(Tag::Role, role.as_bytes()).field(Tag::Content, content.as_bytes())
        }),
    };
    hash = stop.iter().fold(hash, |hash, text| hash.field(Tag::StopStrings, text.as_bytes()));
    let cache_use = response_cache.map(|cache_use| cache_use as u64);
    let biases: Vec<u32> = logit_bias.iter().flat_map(|&(id, bias)| [id, bias.to_bits()]).collect();
    let bits = |value: &Option<f32>| value.map(|value| u64::from(value.to_bits()));
    hash = match namespace {
        None => hash,
        Some(name) => hash.field(Tag::Namespace, name.as_bytes()),
    };
    hash = hash
        .numbers(Tag::StopTokens, stop_token_ids)
        .optional(Tag::CacheUse, cache_use)
        .optional(Tag::MaxTokens, max_tokens.map(|count| count as u64))
        .flag(Tag::IgnoreEos, *ignore_eos)
        .optional(Tag::Choices, Some(*n as u64))
        .optional(Tag::Logprobs, logprobs.map(|count| count as u64))
        .flag(Tag::PromptLogprobs, *prompt_logprobs)
        .optional(Tag::Temperature, bits(temperature))
        .optional(Tag::TopK, top_k.map(u64::from))
        .optional(Tag::TopP, bits(top_p))
        .optional(Tag::MinP, bits(min_p))
        .optional(Tag::RepetitionPenalty, bits(repetition_penalty))
        .optional(Tag::PresencePenalty, bits(presence_penalty))
        .optional(Tag::FrequencyPenalty, bits(frequency_penalty))
        .numbers(Tag::LogitBias, &biases)
        .optional(Tag::Seed, *seed);
    ResponseKey(hash.finish())
}

/// The key of a value that a caller keeps under a name of its own. No name has the key of an answer.
pub fn value_key(version: u64, name: &str) -> ResponseKey {
    ResponseKey(key_hash(version).text(Tag::Value, name).finish())
}

/// The key of the mark that makes an engine's answers with this tag invalid in a tier; `None`: all its answers. Of every
/// version: a tag knows none.
pub fn mark_key(identity: &[u8; 32], tag: Option<&str>) -> ResponseKey {
    let scope = [u8::from(tag.is_some())];
    let name = [&scope, tag.unwrap_or_default().as_bytes()].concat();
    ResponseKey(key_hash(0).field(Tag::Identity, identity).field(Tag::Mark, &name).finish())
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::config::DEFAULT_MAX_TOKENS;
    use crate::request::{CacheUse, SamplingDefaults};

    /// Everything that makes a key, each part free to change.
    #[derive(Clone)]
    struct Case {
        request: Request,
        identity: [u8; 32],
        version: u64,
        namespace: [u8; 32],
        prompt: Vec<u32>,
        eos: Vec<u32>,
        defaults: SamplingDefaults,
    }

    impl Case {
        fn key(&self) -> ResponseKey {
            let sampling = SamplingParams::resolve(&self.request.sampling, &self.defaults, 99);
            let stop_token_ids = [self.request.stop_token_ids.clone(), self.eos.clone()].concat();
            let Case { identity, version, namespace, prompt, .. } = self;
            let (version, stop_token_ids) = (*version, &stop_token_ids);
            let context = KeyContext { identity, version, namespace, prompt, stop_token_ids, sampling: &sampling };
            answer_key(&self.request, &context)
        }
    }

    fn case() -> Case {
        Case {
            request: Request::tokens([1, 2]).temperature(0.5).seed(3),
            identity: [1; 32],
            version: 0,
            namespace: [2; 32],
            prompt: vec![1, 2],
            eos: vec![0],
            defaults: SamplingDefaults::default(),
        }
    }

    /// Another value of any one thing that an answer depends on is another key, and no two of these changes meet.
    #[test]
    fn every_part_counts() {
        type Change = fn(&mut Case);
        let changes: &[(&str, Change)] = &[
            ("nothing", |_| ()),
            ("identity", |c| c.identity[31] ^= 1),
            ("version", |c| c.version = 1),
            ("namespace", |c| c.namespace[0] ^= 1),
            ("prompt", |c| c.prompt.push(2)),
            ("prompt order", |c| c.prompt.reverse()),
            ("end tokens", |c| c.eos.push(7)),
            ("max_tokens", |c| c.request.max_tokens = Some(65)),
            ("max_tokens 0", |c| c.request.max_tokens = Some(0)),
            ("stop", |c| c.request.stop = vec!["ab".into()]),
            ("stop cut elsewhere", |c| c.request.stop = vec!["a".into(), "b".into()]),
            ("stop_token_ids", |c| c.request.stop_token_ids = vec![5]),
            ("ignore_eos", |c| c.request.ignore_eos = true),
            ("n", |c| c.request.n = 2),
            ("logprobs", |c| c.request.logprobs = Some(0)),
            ("more logprobs", |c| c.request.logprobs = Some(1)),
            ("prompt_logprobs", |c| c.request.prompt_logprobs = true),
            ("temperature", |c| c.request.sampling.temperature = Some(0.6)),
            ("greedy", |c| c.request.sampling.temperature = Some(0.0)),
            ("top_k", |c| c.request.sampling.top_k = Some(40)),
            ("top_p", |c| c.request.sampling.top_p = Some(0.9)),
            ("min_p", |c| c.request.sampling.min_p = Some(0.1)),
            ("repetition_penalty", |c| c.request.sampling.repetition_penalty = Some(1.1)),
            ("presence_penalty", |c| c.request.sampling.presence_penalty = Some(0.1)),
            ("frequency_penalty", |c| c.request.sampling.frequency_penalty = Some(0.1)),
            ("logit_bias", |c| c.request.sampling.logit_bias = vec![(1, 1.0)]),
            ("logit_bias of another", |c| c.request.sampling.logit_bias = vec![(2, 1.0)]),
            ("seed", |c| c.request.sampling.seed = Some(4)),
            ("no seed", |c| c.request.sampling.seed = None),
            ("recommended top_k", |c| c.defaults.top_k = Some(41)),
        ];
        let mut keys = HashSet::new();
        for (name, change) in changes {
            let mut changed = case();
            change(&mut changed);
            assert!(keys.insert(changed.key()), "{name} makes no other key");
        }
        for name in ["", "a", "\u{1}"] {
            assert!(keys.insert(value_key(0, name)), "{name:?}");
        }
        assert_ne!(value_key(0, "a"), value_key(1, "a"));
    }

    /// Another value of anything that a request says of its answer is another key of the request, and no two of these
    /// changes meet; what says nothing of it makes none.
    #[test]
    fn every_part_of_a_request_counts() {
        type Change = fn(&mut Request);
        let changes: &[(&str, Change)] = &[
            ("nothing", |_| ()),
            ("prompt", |r| r.prompt = Prompt::Tokens(vec![1, 3])),
            ("prompt as text", |r| r.prompt = Prompt::Text("a".into())),
            ("another text", |r| r.prompt = Prompt::Text("b".into())),
            ("no messages", |r| r.prompt = Prompt::Chat(vec![])),
            ("a message", |r| r.prompt = Prompt::Chat(vec![Message::new("a", "bc")])),
            ("a message cut elsewhere", |r| r.prompt = Prompt::Chat(vec![Message::new("ab", "c")])),
            ("two messages", |r| r.prompt = Prompt::Chat(vec![Message::new("a", "b"), Message::new("a", "c")])),
            ("namespace", |r| r.namespace = Some(String::new())),
            ("another namespace", |r| r.namespace = Some("a".into())),
            ("max_tokens", |r| r.max_tokens = Some(65)),
            ("stop", |r| r.stop = vec!["ab".into()]),
            ("stop cut elsewhere", |r| r.stop = vec!["a".into(), "b".into()]),
            ("stop_token_ids", |r| r.stop_token_ids = vec![5]),
            ("ignore_eos", |r| r.ignore_eos = true),
            ("n", |r| r.n = 2),
            ("logprobs", |r| r.logprobs = Some(0)),
            ("more logprobs", |r| r.logprobs = Some(1)),
            ("prompt_logprobs", |r| r.prompt_logprobs = true),
            ("temperature", |r| r.sampling.temperature = Some(0.6)),
            ("no temperature", |r| r.sampling.temperature = None),
            ("top_k", |r| r.sampling.top_k = Some(40)),
            ("top_p", |r| r.sampling.top_p = Some(0.9)),
            ("min_p", |r| r.sampling.min_p = Some(0.1)),
            ("repetition_penalty", |r| r.sampling.repetition_penalty = Some(1.1)),
            ("presence_penalty", |r| r.sampling.presence_penalty = Some(0.1)),
            ("frequency_penalty", |r| r.sampling.frequency_penalty = Some(0.1)),
            ("logit_bias", |r| r.sampling.logit_bias = vec![(1, 1.0)]),
            ("seed", |r| r.sampling.seed = Some(4)),
            ("no seed", |r| r.sampling.seed = None),
            ("cache off", |r| r.response_cache = Some(CacheUse::Off)),
            ("cache read", |r| r.response_cache = Some(CacheUse::Read)),
            ("cache read and write", |r| r.response_cache = Some(CacheUse::ReadWrite)),
        ];
        let key = |change: Change, version| {
            let mut request = case().request;
            change(&mut request);
            request_key(&request, version)
        };
        let mut keys = HashSet::from([case().key(), value_key(0, "")]);
        for &(name, change) in changes {
            assert!(keys.insert(key(change, 0)), "{name} makes no other key");
            assert!(keys.insert(key(change, 1)), "{name} of another version makes no other key");
        }
        let silent: &[Change] = &[
            |r| r.priority = crate::request::Priority::High,
            |r| r.timeout_ms = Some(7),
            |r| r.prefix_cache = CacheUse::Off,
            |r| r.response_tags = vec!["x".into()],
            |r| r.response_ttl_ms = Some(1),
        ];
        assert!(silent.iter().all(|&change| key(change, 0) == key(|_| (), 0)));
    }

    /// What an answer does not depend on makes no other key; nor does another way to ask for the same.
    #[test]
    fn what_does_not_matter_does_not_count() {
        type Change = fn(&mut Case);
        let changes: &[(&str, Change)] = &[
            ("form of the prompt", |c| c.request.prompt = crate::request::Prompt::Text("x".into())),
            ("priority", |c| c.request.priority = crate::request::Priority::High),
            ("timeout", |c| c.request.timeout_ms = Some(7)),
            ("prefix cache", |c| c.request.prefix_cache = CacheUse::Off),
            ("tags", |c| c.request.response_tags = vec!["x".into()]),
            ("its own time", |c| c.request.response_ttl_ms = Some(1)),
            ("the default in words", |c| c.request.max_tokens = Some(DEFAULT_MAX_TOKENS)),
            ("a stop token twice", |c| c.request.stop_token_ids = vec![0]),
            ("a recommendation that is overruled", |c| c.defaults.temperature = Some(0.9)),
        ];
        for (name, change) in changes {
            let mut changed = case();
            change(&mut changed);
            assert_eq!(changed.key(), case().key(), "{name}");
        }
        let greedy = |seed| {
            let mut case = case();
            case.request.sampling = SamplingOptions { temperature: Some(0.0), seed, ..SamplingOptions::default() };
            case.key()
        };
        assert_eq!(greedy(Some(1)), greedy(None), "a greedy answer draws nothing");
    }

    /// Long prompts are hashed piece by piece, and are the same as in one piece: each length around the pieces is another key.
    #[test]
    fn long_prompts_are_whole() {
        let mut keys = HashSet::new();
        for length in [0, 1, 255, 256, 257, 511, 512, 513, 1000] {
            let mut long = case();
            long.prompt = (0..length).collect();
            assert!(keys.insert(long.key()), "{length}");
            if let Some(last) = long.prompt.last_mut() {
                *last += 1;
                assert!(keys.insert(long.key()), "{length}: the last token does not count");
            }
        }
    }
}
