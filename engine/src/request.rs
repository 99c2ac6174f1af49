//! What a user submits and what comes back: plain public values, no behaviour but the checks of their ranges.
//! Rust, C and Node all build this one [`Request`]; nothing else reaches the scheduler.

use std::sync::Arc;
use std::time::Instant;

use crate::config::*;
use crate::error::Result;

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Message {
    /// "system", "user", "assistant" or what the model's template knows.
    pub role: String,
    /// Plain text. Text of special tokens in here stays text.
    pub content: String,
}

impl Message {
    /// A message of `role` saying `content`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Message { role: role.into(), content: content.into() }
    }
}

/// What to continue.
#[derive(Debug, Clone, PartialEq)]
pub enum Prompt {
    /// Text, encoded as the tokenizer's configuration says; special tokens written in it count as special tokens.
    Text(String),
    /// Token ids, taken as they are.
    Tokens(Vec<u32>),
    /// A conversation, rendered by the model's chat template with the assistant's turn opened.
    Chat(Vec<Message>),
}

/// Who goes first. Waiting raises a request's rank, so that no class starves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Priority {
    /// Before the others, also by preempting them.
    High,
    /// The default.
    #[default]
    Normal,
    /// When there is room.
    Background,
}

/// How a token is chosen from the logits. `None` means: as `generation_config.json` says, else the neutral value.
#[derive(Debug, Clone, PartialEq, Default)]
#[non_exhaustive]
pub struct SamplingOptions {
    /// 0 is greedy; 0.0 to 100.0.
    pub temperature: Option<f32>,
    /// Keep the `k` most likely; 0 keeps all.
    pub top_k: Option<u32>,
    /// Keep the most likely tokens whose probabilities reach this sum; above 0.0, to 1.0.
    pub top_p: Option<f32>,
    /// Keep tokens of at least this share of the best one's probability; 0.0 to 1.0.
    pub min_p: Option<f32>,
    /// Divides positive and multiplies negative logits of tokens seen in prompt or answer; above 0.0, to 100.0.
    pub repetition_penalty: Option<f32>,
    /// Subtracted once from the logit of each token seen in the answer; -2.0 to 2.0.
    pub presence_penalty: Option<f32>,
    /// Subtracted per occurrence in the answer; -2.0 to 2.0.
    pub frequency_penalty: Option<f32>,
    /// Added to logits by token id; -100.0 to 100.0 each.
    pub logit_bias: Vec<(u32, f32)>,
    /// Key of the draws; an unset one is drawn at admission and reported.
    pub seed: Option<u64>,
}

/// What part a cache has in a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CacheUse {
    /// None.
    Off,
    /// What is cached is used; nothing is added.
    Read,
    /// What is cached is used, and what is computed is kept for others.
    #[default]
    ReadWrite,
}

/// One request, with every option. Build it with [`Request::prompt`], [`Request::tokens`] or [`Request::chat`].
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Request {
    /// What to continue.
    pub prompt: Prompt,
    /// Most new tokens of each choice; `None`: [`DEFAULT_MAX_TOKENS`]. 0 computes the prompt only.
    pub max_tokens: Option<usize>,
    /// How tokens are chosen.
    pub sampling: SamplingOptions,
    /// Text at which a choice ends; it is not part of the answer. Special tokens leave no text: name them in
    /// `stop_token_ids`.
    pub stop: Vec<String>,
    /// Tokens at which a choice ends, besides the model's own end tokens.
    pub stop_token_ids: Vec<u32>,
    /// Whether the model's end tokens are ignored (for measurements).
    pub ignore_eos: bool,
    /// Number of choices.
    pub n: usize,
    /// Alternatives to report with each new token; `None`: no logprobs at all.
    pub logprobs: Option<usize>,
    /// Whether to report the logprob of every prompt token (from the second on). Such a request computes its whole
    /// prompt: cached blocks hold no logits.
    pub prompt_logprobs: bool,
    /// Who goes first.
    pub priority: Priority,
    /// Limit from submission to the end, milliseconds.
    pub timeout_ms: Option<u64>,
    /// Requests share prefix KV only within one namespace; `None`: the namespace of this engine. What stands before the first
    /// line break in it is its owner: shares of the caches
    /// ([`kv_namespace_share`](crate::EngineOptions::kv_namespace_share)) are counted by owner, so that nobody gains by
    /// dividing his namespace.
    pub namespace: Option<String>,
    /// Whether this request may use KV of earlier prompts, in the pool and in the tiers, and whether others may use its own.
    pub prefix_cache: CacheUse,
    /// What part the response cache has in it, if the engine has one. `None`: [`CacheUse::ReadWrite`] where the
    /// answer is the same each time (greedy, or with a seed), else none. A request that draws without a seed takes part
    /// when it says so here, and then shares its answer with all such requests of its namespace.
    pub response_cache: Option<CacheUse>,
    /// Names under which its kept answer can be made invalid.
    pub response_tags: Vec<String>,
    /// How long its kept answer is found, milliseconds; `None`: as the engine's options say.
    pub response_ttl_ms: Option<u64>,
}

impl Request {
    fn new(prompt: Prompt) -> Self {
        Request {
            prompt,
            max_tokens: None,
            sampling: SamplingOptions::default(),
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            n: 1,
            logprobs: None,
            prompt_logprobs: false,
            priority: Priority::Normal,
            timeout_ms: None,
            namespace: None,
            prefix_cache: CacheUse::ReadWrite,
            response_cache: None,
            response_tags: Vec::new(),
            response_ttl_ms: None,
        }
    }
    /// A request that continues `text`.
    pub fn prompt(text: impl Into<String>) -> Self {
        Request::new(Prompt::Text(text.into()))
    }
    /// A request that continues `ids`.
    pub fn tokens(ids: impl Into<Vec<u32>>) -> Self {
        Request::new(Prompt::Tokens(ids.into()))
    }
    /// A request that answers a conversation.
    pub fn chat(messages: impl Into<Vec<Message>>) -> Self {
        Request::new(Prompt::Chat(messages.into()))
    }
    /// Sets the most new tokens of each choice.
    pub fn max_tokens(mut self, max_tokens: usize) -> Self {
        self.max_tokens = Some(max_tokens);
        self
    }
    /// Most new tokens of each choice, the default where the request says nothing.
    pub(crate) fn max_new_tokens(&self) -> usize {
        self.max_tokens.unwrap_or(DEFAULT_MAX_TOKENS)
    }
    /// Sets the temperature.
    pub fn temperature(mut self, temperature: f32) -> Self {
        self.sampling.temperature = Some(temperature);
        self
    }
    /// Sets the key of the draws.
    pub fn seed(mut self, seed: u64) -> Self {
        self.sampling.seed = Some(seed);
        self
    }
    /// Adds a text at which a choice ends.
    pub fn stop(mut self, text: impl Into<String>) -> Self {
        self.stop.push(text.into());
        self
    }

    /// Checks every range that does not depend on a model. Costs no more than reading the request once.
    pub fn validate(&self) -> Result<()> {
        let s = &self.sampling;
        for (field, value, min, max) in [
            ("temperature", s.temperature, 0.0, 100.0),
            ("top_p", s.top_p, f32::MIN_POSITIVE, 1.0),
            ("min_p", s.min_p, 0.0, 1.0),
            ("repetition_penalty", s.repetition_penalty, f32::MIN_POSITIVE, 100.0),
            ("presence_penalty", s.presence_penalty, -2.0, 2.0),
            ("frequency_penalty", s.frequency_penalty, -2.0, 2.0),
        ] {
            value.map_or(Ok(()), |value| in_range(field, value, min, max))?;
        }
        at_most("logit_bias (entries)", s.logit_bias.len(), MAX_LOGIT_BIAS)?;
        for &(_, bias) in &s.logit_bias {
            in_range("logit_bias", bias, -100.0, 100.0)?;
        }
        if let Some(max_tokens) = self.max_tokens {
            at_most("max_tokens", max_tokens, MAX_NEW_TOKENS)?;
        }
        in_range("n", self.n, 1, MAX_CHOICES)?;
        if let Some(logprobs) = self.logprobs {
            at_most("logprobs", logprobs, MAX_LOGPROBS)?;
        }
        at_most("stop (strings)", self.stop.len(), MAX_STOP_STRINGS)?;
        for stop in &self.stop {
            if stop.is_empty() {
                return Err(invalid("stop", "\"\"", "not empty".to_string()));
            }
            at_most("stop (bytes of one string)", stop.len(), MAX_STOP_STRING_BYTES)?;
        }
        at_most("stop_token_ids (entries)", self.stop_token_ids.len(), MAX_STOP_TOKENS)?;
        check_timeout(self.timeout_ms)?;
        if let Some(namespace) = &self.namespace {
            at_most("namespace (bytes)", namespace.len(), MAX_NAME_BYTES)?;
        }
        check_response_tags("response_tags", &self.response_tags)?;
        check_response_ttl("response_ttl_ms", self.response_ttl_ms)?;
        match &self.prompt {
            Prompt::Text(text) => at_most("prompt (bytes)", text.len(), MAX_PROMPT_BYTES),
            Prompt::Tokens(ids) => at_most("prompt (bytes)", ids.len().saturating_mul(4), MAX_PROMPT_BYTES),
            Prompt::Chat(messages) => {
                if messages.is_empty() {
                    return Err(invalid("messages", "[]", "at least one message".to_string()));
                }
                at_most("messages (entries)", messages.len(), MAX_MESSAGES)?;
                let bytes = messages.iter().map(|m| m.role.len() + m.content.len()).fold(0, usize::saturating_add);
                at_most("messages (bytes)", bytes, MAX_PROMPT_BYTES)
            }
        }
    }
}

pub(crate) fn check_timeout(timeout_ms: Option<u64>) -> Result<()> {
    timeout_ms.map_or(Ok(()), |timeout_ms| in_range("timeout_ms", timeout_ms, 1, MAX_TIMEOUT_MS))
}

pub(crate) fn check_response_tags(field: &'static str, tags: &[String]) -> Result<()> {
    at_most(field, tags.len(), MAX_RESPONSE_TAGS)?;
    match tags.iter().find(|tag| tag.is_empty() || tag.len() > MAX_NAME_BYTES) {
        Some(tag) => {
            Err(invalid(field, format!("a tag of {} bytes", tag.len()), format!("1 to {MAX_NAME_BYTES} bytes")))
        }
        None => Ok(()),
    }
}

pub(crate) fn check_response_ttl(field: &'static str, ttl_ms: Option<u64>) -> Result<()> {
    ttl_ms.map_or(Ok(()), |ttl_ms| in_range(field, ttl_ms, 1, MAX_RESPONSE_TTL_MS))
}

/// A token and the natural logarithm of its probability under the model (before temperature, truncation and penalties).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Logprob {
    /// The token.
    pub token_id: u32,
    /// Its log-probability.
    pub logprob: f32,
}

/// Logprob of a chosen token, and of the most likely ones at its position.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    /// The token that was chosen (or was given, in a prompt).
    pub chosen: Logprob,
    /// The most likely tokens, best first; as many as were asked for.
    pub top: Arc<[Logprob]>,
}

/// Why a choice ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FinishReason {
    /// A stop string, a stop token or one of the model's end tokens.
    Stop,
    /// `max_tokens` or the end of the context.
    Length,
}

impl FinishReason {
    /// "stop" or "length", as OpenAI's interface writes them.
    pub fn as_str(self) -> &'static str {
        match self {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
        }
    }
}

/// Something new about a request, in order. The last event of a request is [`Event::Done`] or an error.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Event {
    /// New tokens and text of one choice.
    Delta(Delta),
    /// One choice has ended.
    Finished {
        /// Which choice, from 0.
        choice: usize,
        /// Why.
        reason: FinishReason,
    },
    /// The vector of one input of an embedding request.
    Embedding {
        /// Which input, from 0.
        input: usize,
        /// Its vector.
        embedding: Embedding,
    },
    /// Everything has ended.
    Done(Summary),
}

/// New tokens of one choice and the text they complete. Text is always whole UTF-8 and never holds a part of a stop
/// string; what may still become one is held back, so `text` can be empty and can lag behind `token_ids`.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Delta {
    /// Which choice, from 0.
    pub choice: usize,
    /// New text.
    pub text: String,
    /// New tokens.
    pub token_ids: Vec<u32>,
    /// One entry per token when asked for.
    pub logprobs: Vec<TokenLogprobs>,
}

/// The vector of one input.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Embedding {
    /// [`ModelInfo::embedding_dimensions`](crate::ModelInfo::embedding_dimensions) numbers, or as many as were asked for.
    pub values: Vec<f32>,
    /// Tokens that it was computed from.
    pub tokens: usize,
    /// Whether the input was longer and lost its end.
    pub truncated: bool,
}

/// Counts and times of a finished request.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Summary {
    /// Token counts.
    pub usage: Usage,
    /// Times.
    pub timings: Timings,
    /// The seed that was used; give it again to get the same answer.
    pub seed: u64,
    /// For each prompt token from the second on, when asked for.
    pub prompt_logprobs: Vec<TokenLogprobs>,
    /// Whether the answer was kept from an earlier request: nothing was computed.
    pub from_response_cache: bool,
}

/// Token counts of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens of all answers, stop tokens included.
    pub completion_tokens: usize,
    /// Tokens of the prompt that were not computed: their KV was found in the cache (of the first choice), or the whole
    /// answer was kept.
    pub cached_tokens: usize,
    /// The same by the place where their KV was found; all zero where the whole answer was kept.
    pub cached_by_tier: CachedTokens,
    /// How often a sequence of this request was preempted.
    pub preemptions: usize,
    /// Why the rest of the prompt was not found (for the first choice). `None`: everything was that can be, which is all full
    /// blocks but what the last token needs.
    pub prefix_miss: Option<PrefixMiss>,
}

/// Where a search for a prompt's KV ended, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PrefixMiss {
    /// Position of the first prompt token that was not found: the first of a block.
    pub token: usize,
    /// Why.
    pub reason: MissReason,
}

/// Why KV was not found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum MissReason {
    /// Nobody has computed it in this namespace, as far as is known. What other namespaces have computed is not told: it would
    /// say what others ask.
    NeverSeen,
    /// It was there, and was given up for others: last by this place.
    Evicted(CacheTier),
    /// It is there, and computing it was estimated to be faster than fetching it.
    Slower,
    /// It is there, and the place failed or rests after failures; or it led to a failure and is not used again.
    Fault,
    /// It was being fetched, and nothing arrived for too long.
    GaveUp,
    /// The request does not read the cache, or not so far (for logprobs of its prompt), or the engine has none.
    Disabled,
}

impl MissReason {
    /// Stable name, in snake case.
    pub fn as_str(self) -> &'static str {
        match self {
            MissReason::NeverSeen => "never_seen",
            MissReason::Evicted(_) => "evicted",
            MissReason::Slower => "slower",
            MissReason::Fault => "fault",
            MissReason::GaveUp => "gave_up",
            MissReason::Disabled => "disabled",
        }
    }
    /// Who has given it up.
    pub fn tier(self) -> Option<CacheTier> {
        match self {
            MissReason::Evicted(tier) => Some(tier),
            _ => None,
        }
    }
}

/// A place where KV is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheTier {
    /// The KV pool.
    Pool,
    /// Host memory.
    Host,
    /// Disk.
    Disk,
    /// A store that nodes share.
    Remote,
}

impl CacheTier {
    /// Name as in reports.
    pub fn as_str(self) -> &'static str {
        match self {
            CacheTier::Pool => "pool",
            CacheTier::Host => "host",
            CacheTier::Disk => "disk",
            CacheTier::Remote => "remote",
        }
    }
}

/// Prompt tokens whose KV did not have to be computed, by the place where it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CachedTokens {
    /// In the KV pool.
    pub pool: usize,
    /// In host memory: the pool had given the blocks away.
    pub host: usize,
    /// On disk.
    pub disk: usize,
    /// In a store that nodes share.
    pub remote: usize,
}

impl CachedTokens {
    /// Those of one place, to count more.
    pub(crate) fn at_mut(&mut self, tier: CacheTier) -> &mut usize {
        match tier {
            CacheTier::Pool => &mut self.pool,
            CacheTier::Host => &mut self.host,
            CacheTier::Disk => &mut self.disk,
            CacheTier::Remote => &mut self.remote,
        }
    }
    /// Wherever they were.
    pub fn total(&self) -> usize {
        self.pool + self.host + self.disk + self.remote
    }
}

impl std::ops::AddAssign for CachedTokens {
    fn add_assign(&mut self, other: Self) {
        self.pool += other.pool;
        self.host += other.host;
        self.disk += other.disk;
        self.remote += other.remote;
    }
}

/// What happened to a request before the engine got it: for its times, its deadline and what is recorded of it. It changes
/// nothing about the answer.
#[derive(Debug, Clone)]
pub struct Origin {
    /// When it came; not later than now.
    pub arrived: Instant,
    /// What it is called there, such as the id in a header of its HTTP request.
    pub label: Option<Arc<str>>,
}

impl Default for Origin {
    /// It begins now and has no name.
    fn default() -> Self {
        Origin { arrived: Instant::now(), label: None }
    }
}

/// Times of a request, milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Timings {
    /// From submission to the first step that computed it.
    pub queue_ms: f64,
    /// From that step to the first token.
    pub prompt_ms: f64,
    /// From submission to the first token.
    pub first_token_ms: f64,
    /// From the first token to the last.
    pub decode_ms: f64,
    /// From submission to the end.
    pub total_ms: f64,
}

/// Sampling that a model's `generation_config.json` recommends; `None` where it says nothing. A file with
/// `"do_sample": false` recommends a temperature of 0.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct SamplingDefaults {
    /// 0 is greedy.
    pub temperature: Option<f32>,
    /// 0 keeps all.
    pub top_k: Option<u32>,
    /// 1 keeps all.
    pub top_p: Option<f32>,
    /// 0 keeps all.
    pub min_p: Option<f32>,
    /// 1 changes nothing.
    pub repetition_penalty: Option<f32>,
}

/// Sampling as it will be done: every value definite. Made at admission from [`SamplingOptions`], the model's
/// `generation_config.json` and the neutral values of [`SamplingParams::greedy`], in this order.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy.
    pub temperature: f32,
    /// 0 keeps all.
    pub top_k: u32,
    /// 1 keeps all.
    pub top_p: f32,
    /// 0 keeps all.
    pub min_p: f32,
    /// 1 changes nothing.
    pub repetition_penalty: f32,
    /// 0 changes nothing.
    pub presence_penalty: f32,
    /// 0 changes nothing.
    pub frequency_penalty: f32,
    /// Sorted by token id, each id once.
    pub logit_bias: Vec<(u32, f32)>,
    /// Key of the draws of this choice.
    pub seed: u64,
}

impl SamplingParams {
    /// Greedy, with nothing else applied.
    pub fn greedy() -> Self {
        SamplingParams {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
    /// What `options` ask for; where they are silent what the model's author recommends; else the neutral value.
    /// `seed` is used when the options name none. An id that `logit_bias` holds twice counts once, with its last value.
    pub fn resolve(options: &SamplingOptions, defaults: &SamplingDefaults, seed: u64) -> Self {
        let neutral = SamplingParams::greedy();
        let mut logit_bias: Vec<(u32, f32)> = options.logit_bias.iter().rev().copied().collect();
        logit_bias.sort_by_key(|&(token_id, _)| token_id);
        logit_bias.dedup_by_key(|&mut (token_id, _)| token_id);
        SamplingParams {
            temperature: options.temperature.or(defaults.temperature).unwrap_or(neutral.temperature),
            top_k: options.top_k.or(defaults.top_k).unwrap_or(neutral.top_k),
            top_p: options.top_p.or(defaults.top_p).unwrap_or(neutral.top_p),
            min_p: options.min_p.or(defaults.min_p).unwrap_or(neutral.min_p),
            repetition_penalty: options
                .repetition_penalty
                .or(defaults.repetition_penalty)
                .unwrap_or(neutral.repetition_penalty),
            presence_penalty: options.presence_penalty.unwrap_or(neutral.presence_penalty),
            frequency_penalty: options.frequency_penalty.unwrap_or(neutral.frequency_penalty),
            logit_bias,
            seed: options.seed.unwrap_or(seed),
        }
    }
    /// Whether the tokens so far change the logits.
    pub fn reads_history(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }
}
