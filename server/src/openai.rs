//! OpenAI's routes: what their objects have in common. Shapes are those that the official clients parse; beyond them are
//! only fields that vLLM's and llama.cpp's servers have made usual.

pub(crate) mod chat;
pub(crate) mod completions;
pub(crate) mod embeddings;
pub(crate) mod models;
pub(crate) mod responses;

use ns_llm::{CacheTier, Engine, Logprob, PrefixMiss, Summary, Timings, Usage};
use serde::Serialize;

use crate::app::{App, Served};
use crate::clock::unix_seconds;

/// Lowest logprob that OpenAI's interface has.
pub(crate) const MIN_LOGPROB: f32 = -9999.0;

/// What all objects of one answer begin with.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Head {
    pub(crate) id: String,
    pub(crate) object: &'static str,
    pub(crate) created: u64,
    pub(crate) model: String,
    pub(crate) system_fingerprint: String,
}

impl Head {
    pub(crate) fn new(app: &App, model: &Served, prefix: &str, object: &'static str) -> Head {
        Head {
            id: app.new_id(prefix),
            object,
            created: unix_seconds(),
            model: model.name.clone(),
            system_fingerprint: model.fingerprint.clone(),
        }
    }
}

/// OpenAI's counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(crate) struct UsageObject {
    prompt_tokens: usize,
    completion_tokens: usize,
    total_tokens: usize,
    prompt_tokens_details: PromptTokensDetails,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
struct PromptTokensDetails {
    cached_tokens: usize,
    /// The same by the place where their keys and values were.
    cached_by_tier: CachedByTier,
    /// Why the rest was computed; null when all was found that can be.
    prefix_miss: Option<PrefixMissObject>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
struct CachedByTier {
    pool: usize,
    host: usize,
    disk: usize,
    remote: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
struct PrefixMissObject {
    /// Position of the first prompt token that was not found.
    token: usize,
    reason: &'static str,
    /// Who has given it up.
    tier: Option<&'static str>,
}

impl UsageObject {
    pub(crate) fn add(&mut self, usage: &Usage) {
        self.prompt_tokens += usage.prompt_tokens;
        self.completion_tokens += usage.completion_tokens;
        self.total_tokens += usage.prompt_tokens + usage.completion_tokens;
        let details = &mut self.prompt_tokens_details;
        details.cached_tokens += usage.cached_tokens;
        let (sum, more) = (&mut details.cached_by_tier, usage.cached_by_tier);
        (sum.pool, sum.host) = (sum.pool + more.pool, sum.host + more.host);
        (sum.disk, sum.remote) = (sum.disk + more.disk, sum.remote + more.remote);
        let miss = |miss: PrefixMiss| {
            let tier = miss.reason.tier().map(CacheTier::as_str);
            PrefixMissObject { token: miss.token, reason: miss.reason.as_str(), tier }
        };
        // Of several prompts it is the first that says why.
        details.prefix_miss = details.prefix_miss.or(usage.prefix_miss.map(miss));
    }
}

impl From<Usage> for UsageObject {
    fn from(usage: Usage) -> Self {
        let mut object = UsageObject::default();
        object.add(&usage);
        object
    }
}

/// Times as llama.cpp's server names them.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct TimingsObject {
    cache_n: usize,
    prompt_n: usize,
    prompt_ms: f64,
    predicted_n: usize,
    predicted_ms: f64,
    queue_ms: f64,
}

impl From<&Summary> for TimingsObject {
    fn from(summary: &Summary) -> Self {
        let Summary { usage, timings: Timings { queue_ms, prompt_ms, decode_ms, .. }, .. } = *summary;
        TimingsObject {
            cache_n: usage.cached_tokens,
            prompt_n: usage.prompt_tokens.saturating_sub(usage.cached_tokens),
            prompt_ms,
            predicted_n: usage.completion_tokens,
            predicted_ms: decode_ms,
            queue_ms,
        }
    }
}

/// A token and its logprob.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct TokenEntry {
    /// Its text; bytes that are no whole character show as U+FFFD.
    pub(crate) token: String,
    pub(crate) bytes: Vec<u8>,
    pub(crate) logprob: f32,
}

impl TokenEntry {
    pub(crate) fn new(engine: &Engine, logprob: Logprob) -> TokenEntry {
        let bytes = engine.token_bytes(logprob.token_id);
        TokenEntry {
            token: String::from_utf8_lossy(bytes).into_owned(),
            bytes: bytes.to_vec(),
            logprob: logprob.logprob.max(MIN_LOGPROB),
        }
    }
}

/// Writes one event of a stream: `data:` and the object in one line.
pub(crate) fn write_data(out: &mut String, object: &impl Serialize) {
    // Strings, numbers and lists of them cannot fail to be written.
    let json = serde_json::to_string(object).unwrap_or_default();
    out.push_str("data: ");
    out.push_str(&json);
    out.push_str("\n\n");
}

/// What ends a stream of OpenAI's.
pub(crate) const DONE: &str = "data: [DONE]\n\n";
