//! The server under load: its address, connections to it that are kept, and one request with the moments at which its answer
//! came, piece by piece. HTTP/1.1 without TLS, as such servers speak themselves.

use std::fmt;
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::net::TcpStream;

/// Longest line of an event stream, bytes; a server that sends more speaks another protocol.
const MAX_LINE_BYTES: usize = 16 << 20;

/// Where a server is: `http://host[:port][/prefix]`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ServerUrl {
    /// As it connects.
    pub(crate) address: String,
    /// As `Host` says it.
    pub(crate) host: String,
    /// Before every path; without a slash at its end, and without `/v1`.
    pub(crate) prefix: String,
}

impl FromStr for ServerUrl {
    type Err = String;

    fn from_str(url: &str) -> Result<ServerUrl, String> {
        let rest = url.strip_prefix("http://").ok_or("must begin with http:// (TLS is a proxy's part)")?;
        let (host, path) = rest.split_once('/').map_or((rest, ""), |(host, path)| (host, path));
        if host.is_empty() || !host.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'@') {
            return Err("must be http://HOST[:PORT][/PATH]".to_string());
        }
        let has_port = host.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
        let address = if has_port { host.to_string() } else { format!("{host}:80") };
        let path = path.trim_end_matches('/');
        let path = path.strip_suffix("v1").unwrap_or(path).trim_end_matches('/');
        let prefix = if path.is_empty() { String::new() } else { format!("/{path}") };
        Ok(ServerUrl { address, host: host.to_string(), prefix })
    }
}

/// Why a request has no answer that counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Failure {
    /// No connection was had.
    Connect,
    /// The whole did not come in time.
    Timeout,
    /// The connection ended before the answer did.
    Closed,
    /// Refused.
    Status(u16),
    /// Told in the middle of the stream.
    Stream,
    /// No answer of this protocol.
    Malformed,
    /// Never sent: too many waited for a connection.
    NotSent,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Connect => f.write_str("connect"),
            Failure::Timeout => f.write_str("timeout"),
            Failure::Closed => f.write_str("closed"),
            Failure::Status(status) => write!(f, "status_{status}"),
            Failure::Stream => f.write_str("error_in_stream"),
            Failure::Malformed => f.write_str("malformed"),
            Failure::NotSent => f.write_str("not_sent"),
        }
    }
}

/// What one request gave. Times count from when it was to be sent.
#[derive(Debug, Default, Clone, PartialEq)]
pub(crate) struct Sample {
    /// How much later it was sent.
    pub(crate) start_delay: Duration,
    /// To the first text, of a stream.
    pub(crate) first_token: Option<Duration>,
    /// Between texts that follow each other.
    pub(crate) gaps: Vec<Duration>,
    /// To the last byte.
    pub(crate) whole: Duration,
    pub(crate) prompt_tokens: u64,
    pub(crate) completion_tokens: u64,
    pub(crate) cached_tokens: u64,
    /// What the server says its engine took, if it does.
    pub(crate) engine: Option<Duration>,
}

/// Connections that wait for their next request.
pub(crate) struct Target {
    url: ServerUrl,
    path: String,
    authorization: Option<String>,
    timeout: Duration,
    /// Locked for a push or a pop.
    idle: Mutex<Vec<SendRequest<Full<Bytes>>>>,
}

impl Target {
    pub(crate) fn new(url: ServerUrl, route: &str, api_key: Option<&str>, timeout: Duration) -> Target {
        let path = format!("{}{route}", url.prefix);
        let authorization = api_key.map(|key| format!("Bearer {key}"));
        Target { url, path, authorization, timeout, idle: Mutex::default() }
    }

    /// Sends `body` and reads all of the answer. `intended`: when it was to be sent.
    pub(crate) async fn ask(&self, body: Bytes, intended: Instant) -> Result<Sample, Failure> {
        let sent = Instant::now();
        let mut sample = Sample { start_delay: sent.saturating_duration_since(intended), ..Sample::default() };
        let left = self.timeout.saturating_sub(sample.start_delay);
        let asked = tokio::time::timeout(left, self.exchange(body, intended, &mut sample)).await;
        asked.unwrap_or(Err(Failure::Timeout)).map(|()| sample)
    }

    async fn exchange(&self, body: Bytes, intended: Instant, sample: &mut Sample) -> Result<(), Failure> {
        let mut connection = self.connection().await?;
        let mut request =
            Request::post(&self.path).header(HOST, &self.url.host).header(CONTENT_TYPE, "application/json");
        if let Some(authorization) = &self.authorization {
            request = request.header(AUTHORIZATION, authorization);
        }
        let request = request.body(Full::new(body)).map_err(|_| Failure::Malformed)?;
        let response = connection.send_request(request).await.map_err(|_| Failure::Closed)?;
        let read = read_answer(response, intended, sample).await;
        // After any answer that was read to its end the connection is as good as before.
        if matches!(read, Ok(()) | Err(Failure::Status(_) | Failure::Stream)) && !connection.is_closed() {
            self.lock().push(connection);
        }
        read
    }

    /// One that is idle, or a new one.
    async fn connection(&self) -> Result<SendRequest<Full<Bytes>>, Failure> {
        loop {
            let Some(mut connection) = self.lock().pop() else { break };
            // The server may have hung up meanwhile.
            if connection.ready().await.is_ok() {
                return Ok(connection);
            }
        }
        let stream = TcpStream::connect(&self.url.address).await.map_err(|_| Failure::Connect)?;
        stream.set_nodelay(true).map_err(|_| Failure::Connect)?;
        let (sender, connection) = handshake(TokioIo::new(stream)).await.map_err(|_| Failure::Connect)?;
        tokio::spawn(async move {
            // What goes wrong is an error of the request on it.
            let _ = connection.await;
        });
        Ok(sender)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<SendRequest<Full<Bytes>>>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An answer, or a chunk of a stream: what is read of either.
#[derive(Deserialize)]
struct Answer {
    #[serde(default)]
    choices: Vec<AnswerChoice>,
    usage: Option<AnswerUsage>,
    timings: Option<AnswerTimings>,
    error: Option<serde::de::IgnoredAny>,
}

#[derive(Deserialize)]
struct AnswerChoice {
    text: Option<String>,
    delta: Option<AnswerDelta>,
}

#[derive(Deserialize)]
struct AnswerDelta {
    content: Option<String>,
    reasoning_content: Option<String>,
}

#[derive(Deserialize)]
struct AnswerUsage {
    #[serde(default)]
    prompt_tokens: u64,
    #[serde(default)]
    completion_tokens: u64,
    prompt_tokens_details: Option<AnswerPromptTokens>,
}

#[derive(Deserialize)]
struct AnswerPromptTokens {
    cached_tokens: Option<u64>,
}

/// As llama.cpp's server names them.
#[derive(Deserialize)]
struct AnswerTimings {
    #[serde(default)]
    queue_ms: f64,
    prompt_ms: f64,
    predicted_ms: f64,
}

impl Answer {
    /// Notes counts; whether there is text in it.
    fn note(&self, sample: &mut Sample) -> bool {
        if let Some(usage) = &self.usage {
            sample.prompt_tokens = usage.prompt_tokens;
            sample.completion_tokens = usage.completion_tokens;
            let details = usage.prompt_tokens_details.as_ref();
            sample.cached_tokens = details.and_then(|details| details.cached_tokens).unwrap_or(0);
        }
        if let Some(times) = &self.timings {
            let ms = times.queue_ms + times.prompt_ms + times.predicted_ms;
            sample.engine = Duration::try_from_secs_f64(ms / 1e3).ok();
        }
        let is_text = |text: &Option<String>| text.as_ref().is_some_and(|text| !text.is_empty());
        self.choices.iter().any(|choice| {
            let delta = choice.delta.as_ref();
            is_text(&choice.text)
                || delta.is_some_and(|delta| is_text(&delta.content) || is_text(&delta.reasoning_content))
        })
    }
}

async fn read_answer(response: Response<Incoming>, intended: Instant, sample: &mut Sample) -> Result<(), Failure> {
    let status = response.status();
    let is_stream =
        response.headers().get(CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"text/event-stream"));
    let body = response.into_body();
    if !status.is_success() {
        read_whole(body).await?;
        return Err(Failure::Status(status.as_u16()));
    }
    if is_stream {
        return read_stream(body, intended, sample).await;
    }
    let bytes = read_whole(body).await?;
    let answer: Answer = serde_json::from_slice(&bytes).map_err(|_| Failure::Malformed)?;
    answer.note(sample);
    sample.whole = intended.elapsed();
    Ok(())
}

async fn read_whole(body: Incoming) -> Result<Bytes, Failure> {
    Ok(body.collect().await.map_err(|_| Failure::Closed)?.to_bytes())
}

/// Reads events to the connection's word that there are no more; the last must be `[DONE]`.
async fn read_stream(mut body: Incoming, intended: Instant, sample: &mut Sample) -> Result<(), Failure> {
    let (mut line, mut last_text, mut outcome) = (Vec::new(), None, Err(Failure::Closed));
    while let Some(frame) = body.frame().await {
        let Ok(bytes) = frame.map_err(|_| Failure::Closed)?.into_data() else { continue };
        let now = Instant::now();
        let mut rest: &[u8] = &bytes;
        while let Some(end) = rest.iter().position(|&byte| byte == b'\n') {
            line.extend_from_slice(&rest[..end]);
            rest = &rest[end + 1..];
            let event = read_line(&line);
            line.clear();
            match event? {
                Line::Other => {}
                Line::Done if outcome == Err(Failure::Closed) => outcome = Ok(()),
                Line::Done => {}
                Line::Data(answer) if answer.error.is_some() => outcome = Err(Failure::Stream),
                Line::Data(answer) => {
                    if answer.note(sample) {
                        sample.first_token.get_or_insert_with(|| now.saturating_duration_since(intended));
                        if let Some(last) = last_text.replace(now) {
                            sample.gaps.push(now.saturating_duration_since(last));
                        }
                    }
                }
            }
        }
        line.extend_from_slice(rest);
        if line.len() > MAX_LINE_BYTES {
            return Err(Failure::Malformed);
        }
    }
    sample.whole = intended.elapsed();
    outcome
}

enum Line {
    Data(Answer),
    /// `data: [DONE]`.
    Done,
    /// A comment, or the blank line behind an event.
    Other,
}

fn read_line(line: &[u8]) -> Result<Line, Failure> {
    let Some(data) = line.strip_prefix(b"data:") else { return Ok(Line::Other) };
    match data.trim_ascii() {
        b"[DONE]" => Ok(Line::Done),
        json => serde_json::from_slice(json).map(Line::Data).map_err(|_| Failure::Malformed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// URLs as people write them lead to one place; others are refused with what is missing.
    #[test]
    fn urls_are_read() {
        let url = |text: &str| text.parse::<ServerUrl>();
        let local =
            ServerUrl { address: "127.0.0.1:8080".into(), host: "127.0.0.1:8080".into(), prefix: String::new() };
        for text in
            ["http://127.0.0.1:8080", "http://127.0.0.1:8080/", "http://127.0.0.1:8080/v1", "http://127.0.0.1:8080/v1/"]
        {
            assert_eq!(url(text).as_ref(), Ok(&local), "{text}");
        }
        let behind = url("http://app.example/llm/v1").expect("valid");
        assert_eq!((behind.address.as_str(), behind.prefix.as_str()), ("app.example:80", "/llm"));
        assert_eq!(url("http://[::1]:80").expect("valid").address, "[::1]:80");
        for wrong in ["https://x", "x:80", "http://", "http://a b", "http://name:secret@x"] {
            assert!(url(wrong).is_err(), "{wrong}");
        }
    }
}
