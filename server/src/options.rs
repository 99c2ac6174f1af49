//! Every limit and default of the HTTP face, each with its unit and what happens beyond it; and the options with which a
//! server is made. What the engine limits (prompts, stop strings, choices) is limited there.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper::rt::Timer;
use thiserror::Error;

use crate::keys::ApiKey;

/// Body of a request, bytes; beyond it 413. The engine's longest prompt is 4 MiB of text, which JSON may write longer.
pub const MAX_BODY_BYTES: usize = 8 << 20;
/// Bodies that are in memory at once and have no answer yet, as so many of the largest; beyond it 503. One key has half of it.
pub const MAX_HELD_BODIES: usize = 32;
/// Objects and arrays in a body, some 700 bytes of memory each; beyond it 400. Eight for each message of a conversation.
pub const MAX_BODY_CONTAINERS: usize = 1 << 15;
/// Commas between the values of a body, some 32 bytes of memory each; beyond it 400. Prompts may be lists of token ids.
pub const MAX_BODY_VALUES: usize = 1 << 19;
/// Target of a request line, bytes; beyond it 414.
pub const MAX_URI_BYTES: usize = 8 << 10;
/// Request line and headers together, bytes; beyond it 431.
pub const MAX_HEAD_BYTES: usize = 16 << 10;
/// Headers of a request; beyond it 431.
pub const MAX_HEADERS: usize = 64;
/// Connections at once; the next ones wait to be accepted.
pub const MAX_CONNECTIONS: usize = 4_096;
/// Requests that the engine is given at once: as many as it runs by default. The rest waits in a fair queue.
pub const MAX_RUNNING_REQUESTS: usize = ns_llm::config::DEFAULT_MAX_RUNNING_SEQUENCES;
/// Requests in that queue; the next one is told 503 and when to try again.
pub const MAX_WAITING_REQUESTS: usize = ns_llm::config::DEFAULT_MAX_WAITING_REQUESTS;
/// From a connection's start, or its last answer, to the last byte of the next head. An idle connection ends with it.
pub const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// From a head to the last byte of its body; beyond it 408.
pub const BODY_TIMEOUT: Duration = Duration::from_secs(30);
/// A client that takes nothing of its answer for so long is hung up, and its request cancelled.
pub const STALL_TIMEOUT: Duration = Duration::from_secs(30);
/// Comments keep a silent stream open this often.
pub const PING_INTERVAL: Duration = Duration::from_secs(15);
/// What running requests get to finish in when the server stops.
pub const GRACE: Duration = Duration::from_secs(30);
/// A request's time in the engine and in the queue before it, when it names none; beyond it 408.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(600);
/// Work of which the engine does nothing for so long makes the server not ready, and ends the calls that wait for it. A step
/// that runs has at least so long, and eight times what steps of its size took of late.
pub const STEP_STALL: Duration = Duration::from_secs(10);
/// A look at the GPUs takes no longer, or the one before counts.
pub const GPU_LOOK_TIMEOUT: Duration = Duration::from_secs(1);
/// Time of a trace that names none, and the longest, seconds.
pub const DEFAULT_TRACE_SECONDS: f64 = 5.0;
/// See [`DEFAULT_TRACE_SECONDS`].
pub const MAX_TRACE_SECONDS: f64 = 60.0;
/// Events of a trace, some 200 bytes each; what comes on top is counted in it.
pub const TRACE_EVENTS: usize = 200_000;
/// Spans that wait to be sent to a collector; those that come on top are counted and lost.
pub const MAX_SPANS: usize = 4_096;
/// How often they are sent.
pub const OTLP_INTERVAL: Duration = Duration::from_secs(1);
/// What a collector gets to take them in; after it they are lost.
pub const OTLP_TIMEOUT: Duration = Duration::from_secs(5);
/// Prompts of one `/v1/completions` request.
pub const MAX_PROMPTS: usize = 64;
/// Stored answers of `/v1/responses`.
pub const MAX_STORED_RESPONSES: usize = 1_024;
/// Bytes of all of them, as objects and as conversations. Beyond either the oldest of the key with most of it is forgotten.
pub const MAX_STORED_RESPONSE_BYTES: usize = 64 << 20;
/// Bytes of a prompt whose hash is its `x-ns-llm-prefix`: requests that share so much go to one server. Shorter shared
/// beginnings are computed sooner than a queue is waited for.
pub const PREFIX_AFFINITY_BYTES: usize = 256;
/// Answered prompts whose `x-ns-llm-prefix` a server remembers; beyond it the oldest is forgotten.
pub const MAX_REMEMBERED_PREFIXES: usize = 256;
/// Bytes of those of one key; beyond it that key's oldest is forgotten.
pub const MAX_STORED_BYTES_PER_KEY: usize = 16 << 20;
/// Pairs in the `metadata` of a response, as OpenAI has it; beyond it 400, as beyond the next three.
pub const MAX_METADATA_PAIRS: usize = 16;
/// Name of such a pair, characters.
pub const MAX_METADATA_KEY_CHARS: usize = 64;
/// Its value, characters.
pub const MAX_METADATA_VALUE_CHARS: usize = 512;
/// `user` of a response, characters.
pub const MAX_USER_CHARS: usize = 512;
/// Token ids of one `/detokenize` request; beyond it 400.
pub const MAX_DETOKENIZE_IDS: usize = 1 << 18;
/// Operations whose times the performance routes look at.
pub const MAX_OPERATIONS: usize = 10_000;
/// `X-Request-Id` of a client, bytes; a longer one is replaced.
pub const MAX_REQUEST_ID_BYTES: usize = 128;
/// Name of an API key, bytes.
pub const MAX_KEY_NAME_BYTES: usize = 64;
/// `cache_salt` of a request, bytes.
pub const MAX_CACHE_SALT_BYTES: usize = 256;
/// An API key's secret has at least so many bytes.
pub const MIN_SECRET_BYTES: usize = 16;

/// Why a server cannot be made like this.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum OptionsError {
    /// There is nothing to serve.
    #[error("no model is given")]
    NoModel,
    /// Two models have one name.
    #[error("two models are called {name}")]
    DuplicateModel {
        /// The name.
        name: String,
    },
    /// A key's name or secret is not one.
    #[error("API key {name}: {reason}")]
    ApiKey {
        /// The name.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// A line of a file of keys is not one.
    #[error("file of API keys, line {line}: {reason}")]
    ApiKeyFile {
        /// From 1.
        line: usize,
        /// What is wrong.
        reason: String,
    },
    /// A file of keys has none: a server with it would be open to all.
    #[error("file of API keys: there is no key in it")]
    NoApiKeys,
    /// Others could reach the server, and nothing would keep them out.
    #[error("address {address} can be reached from outside: an API key is needed, or a loopback address")]
    OpenToAll {
        /// Where it was to listen.
        address: IpAddr,
    },
    /// A limit is outside its range.
    #[error("{field} is {value}, must be {expected}")]
    OutOfRange {
        /// Name of the option.
        field: &'static str,
        /// Its value.
        value: String,
        /// What is allowed.
        expected: &'static str,
    },
}

/// Takes lines for an operator; called by any thread, while others wait.
pub type Log = Arc<dyn Fn(&str) + Send + Sync>;

/// How to serve. Every field has a default that suits a server on its own machine.
#[derive(Clone)]
pub struct ServerOptions {
    /// Who may call; empty: everybody who reaches the server.
    pub api_keys: Vec<ApiKey>,
    /// Whether something in front decides who may call: then no key is needed where others reach the server.
    pub behind_auth: bool,
    /// Values of `Host` that are answered, without port and in lower case; one that is `*` allows all. A page of another
    /// site that has its own name point at this machine is told 421.
    pub allowed_hosts: Vec<String>,
    /// Web pages that may read answers: exact origins such as `https://app.example`. Pages of other sites are refused.
    pub cors_origins: Vec<String>,
    /// Whether `/health` and `/ready` need no key.
    pub public_probes: bool,
    /// Whether any model name is taken for the first model; otherwise an unknown one is 404.
    pub any_model: bool,
    /// Whether metrics are named as vLLM names its own, for dashboards that cannot be changed.
    pub vllm_metric_names: bool,
    /// Whether `/trace` is there: keys that are marked as admin, or everybody without keys, see how long all requests are, and
    /// what they are called.
    pub trace_route: bool,
    /// Address of an OpenTelemetry collector, `http://host:port`, that gets a trace of each request (OTLP over HTTP,
    /// JSON); only of a server that listens by itself.
    pub otlp_endpoint: Option<String>,
    /// Whether there is a page at `/`.
    pub page: bool,
    /// See [`MAX_BODY_BYTES`].
    pub max_body_bytes: usize,
    /// See [`MAX_CONNECTIONS`].
    pub max_connections: usize,
    /// See [`MAX_RUNNING_REQUESTS`].
    pub max_running_requests: usize,
    /// See [`MAX_WAITING_REQUESTS`].
    pub max_waiting_requests: usize,
    /// See [`HEAD_TIMEOUT`].
    pub head_timeout: Duration,
    /// See [`BODY_TIMEOUT`].
    pub body_timeout: Duration,
    /// See [`STALL_TIMEOUT`].
    pub stall_timeout: Duration,
    /// See [`PING_INTERVAL`].
    pub ping_interval: Duration,
    /// See [`REQUEST_TIMEOUT`].
    pub request_timeout: Duration,
    /// See [`STEP_STALL`].
    pub step_stall: Duration,
    /// See [`GRACE`].
    pub grace: Duration,
    /// Hears of failures that clients are told nothing of but their code, one line each.
    pub log: Option<Log>,
    /// What sleeps; without one there are no pings, and a deadline is seen only when something else happens.
    pub timer: Option<Arc<dyn Timer + Send + Sync>>,
}

impl Default for ServerOptions {
    fn default() -> Self {
        ServerOptions {
            api_keys: Vec::new(),
            behind_auth: false,
            allowed_hosts: ["localhost", "127.0.0.1", "[::1]"].map(str::to_string).to_vec(),
            cors_origins: Vec::new(),
            public_probes: false,
            any_model: false,
            vllm_metric_names: false,
            trace_route: false,
            otlp_endpoint: None,
            page: true,
            max_body_bytes: MAX_BODY_BYTES,
            max_connections: MAX_CONNECTIONS,
            max_running_requests: MAX_RUNNING_REQUESTS,
            max_waiting_requests: MAX_WAITING_REQUESTS,
            head_timeout: HEAD_TIMEOUT,
            body_timeout: BODY_TIMEOUT,
            stall_timeout: STALL_TIMEOUT,
            ping_interval: PING_INTERVAL,
            request_timeout: REQUEST_TIMEOUT,
            step_stall: STEP_STALL,
            grace: GRACE,
            log: None,
            timer: None,
        }
    }
}

impl ServerOptions {
    /// Checks every range.
    pub(crate) fn validate(&self) -> Result<(), OptionsError> {
        let counts = [
            ("max_body_bytes", self.max_body_bytes),
            ("max_connections", self.max_connections),
            ("max_running_requests", self.max_running_requests),
        ];
        for (field, value) in counts {
            if value == 0 {
                return Err(OptionsError::OutOfRange { field, value: "0".to_string(), expected: "at least 1" });
            }
        }
        let times = [
            ("head_timeout", self.head_timeout),
            ("body_timeout", self.body_timeout),
            ("stall_timeout", self.stall_timeout),
            ("ping_interval", self.ping_interval),
            ("request_timeout", self.request_timeout),
            ("step_stall", self.step_stall),
        ];
        for (field, value) in times {
            let longest = Duration::from_millis(ns_llm::config::MAX_TIMEOUT_MS);
            if value < Duration::from_millis(1) || value > longest {
                let value = format!("{value:?}");
                return Err(OptionsError::OutOfRange { field, value, expected: "one millisecond to one day" });
            }
        }
        Ok(())
    }

    /// Whether a server with these options may listen at `address`.
    pub fn check_address(&self, address: IpAddr) -> Result<(), OptionsError> {
        match address.is_loopback() || !self.api_keys.is_empty() || self.behind_auth {
            true => Ok(()),
            false => Err(OptionsError::OpenToAll { address }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Without a key only loopback addresses may be listened at.
    #[test]
    fn other_addresses_need_a_key() {
        let address = |text: &str| text.parse::<IpAddr>().expect("an address");
        let mut options = ServerOptions::default();
        for loopback in ["127.0.0.1", "127.3.4.5", "::1"] {
            assert_eq!(options.check_address(address(loopback)), Ok(()));
        }
        for open in ["0.0.0.0", "::", "192.168.1.2", "8.8.8.8"] {
            let error = options.check_address(address(open)).expect_err("open to all").to_string();
            assert!(error.contains(open) && error.contains("API key"), "{error}");
        }
        options.api_keys = vec![ApiKey::unnamed("a-secret-of-some-length").expect("valid")];
        assert_eq!(options.check_address(address("0.0.0.0")), Ok(()));
        options = ServerOptions { behind_auth: true, ..ServerOptions::default() };
        assert_eq!(options.check_address(address("0.0.0.0")), Ok(()));
    }

    /// Limits that would stop everything are refused by name.
    #[test]
    fn options_have_ranges() {
        assert_eq!(ServerOptions::default().validate(), Ok(()));
        let none = ServerOptions { max_running_requests: 0, ..ServerOptions::default() };
        let never = ServerOptions { body_timeout: Duration::ZERO, ..ServerOptions::default() };
        for (options, name) in [(none, "max_running_requests"), (never, "body_timeout")] {
            let error = options.validate().expect_err("out of range");
            assert!(matches!(error, OptionsError::OutOfRange { field, .. } if field == name), "{error}");
        }
    }
}
