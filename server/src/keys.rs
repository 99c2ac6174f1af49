//! API keys: who calls, what that caller may, and how much of it. Secrets are kept as digests and compared in constant
//! time; a key is also a namespace of the caches, so that no caller can learn by timing what another has asked.

use std::fmt;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use axum::http::header::AUTHORIZATION;
use axum::http::{HeaderMap, StatusCode};
use ns_llm::Priority;
use sha2::{Digest, Sha256};

use crate::error::{ApiError, ApiResult};
use crate::options::{MAX_KEY_NAME_BYTES, MIN_SECRET_BYTES, OptionsError};
use crate::otlp::TraceParent;

/// One key, as the operator gives it.
#[derive(Clone, PartialEq)]
pub struct ApiKey {
    /// Who it belongs to: the namespace of its cache entries. Not secret.
    pub name: String,
    digest: [u8; 32],
    /// Requests in a minute; `None`: any number.
    pub requests_per_minute: Option<u32>,
    /// Tokens, of prompts and answers, in a minute; `None`: any number.
    pub tokens_per_minute: Option<u32>,
    /// The best class that its requests may ask for.
    pub best_priority: Priority,
    /// Whether it may do what touches all callers: empty the caches, forget what was measured, record a trace.
    pub is_admin: bool,
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ApiKey").field("name", &self.name).finish_non_exhaustive()
    }
}

impl ApiKey {
    /// A key of this name. The secret is any text of at least 16 bytes without spaces.
    pub fn new(name: &str, secret: &str) -> Result<ApiKey, OptionsError> {
        let is_name =
            (1..=MAX_KEY_NAME_BYTES).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_graphic());
        if !is_name {
            let reason = format!("a name has 1 to {MAX_KEY_NAME_BYTES} visible ASCII characters");
            return Err(OptionsError::ApiKey { name: name.chars().take(MAX_KEY_NAME_BYTES).collect(), reason });
        }
        if secret.len() < MIN_SECRET_BYTES || !secret.bytes().all(|byte| byte.is_ascii_graphic()) {
            let reason = format!("a secret has at least {MIN_SECRET_BYTES} visible ASCII characters");
            return Err(OptionsError::ApiKey { name: name.to_string(), reason });
        }
        Ok(ApiKey {
            name: name.to_string(),
            digest: digest(secret),
            requests_per_minute: None,
            tokens_per_minute: None,
            best_priority: Priority::High,
            is_admin: false,
        })
    }

    /// A key that has no name but its digest's beginning.
    pub fn unnamed(secret: &str) -> Result<ApiKey, OptionsError> {
        let beginning = digest(secret)[..4].iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        ApiKey::new(&format!("key-{beginning}"), secret)
    }

    /// Keys of a file: a line is `NAME SECRET`, then any of `requests_per_minute=N`, `tokens_per_minute=N`,
    /// `priority=high|normal|background` and `admin`; `#` at its beginning or after a space begins a comment. A file without a key is
    /// an error: its server would let everybody in.
    pub fn parse_file(text: &str) -> Result<Vec<ApiKey>, OptionsError> {
        let lines = text.lines().enumerate().map(|(idx, line)| (idx + 1, without_comment(line)));
        let keys =
            lines.filter(|(_, line)| !line.trim().is_empty()).map(|(number, line)| ApiKey::parse_line(number, line));
        let keys = keys.collect::<Result<Vec<_>, _>>()?;
        if keys.is_empty() { Err(OptionsError::NoApiKeys) } else { Ok(keys) }
    }

    fn parse_line(number: usize, line: &str) -> Result<ApiKey, OptionsError> {
        let wrong = |reason: String| OptionsError::ApiKeyFile { line: number, reason };
        let mut words = line.split_whitespace();
        let (Some(name), Some(secret)) = (words.next(), words.next()) else {
            return Err(wrong("a line is NAME SECRET and settings".to_string()));
        };
        let mut key = ApiKey::new(name, secret).map_err(|error| wrong(error.to_string()))?;
        for word in words {
            let count = |value: &str| match value.parse::<u32>() {
                Ok(count) if count > 0 => Ok(Some(count)),
                _ => Err(wrong(format!("{word}: a number of at least 1 is needed"))),
            };
            match word.split_once('=') {
                Some(("requests_per_minute", value)) => key.requests_per_minute = count(value)?,
                Some(("tokens_per_minute", value)) => key.tokens_per_minute = count(value)?,
                Some(("priority", name)) => {
                    key.best_priority = Priority::from_name(name).map_err(|error| wrong(error.to_string()))?;
                }
                None if word == "admin" => key.is_admin = true,
                _ => return Err(wrong(format!("{word} is no setting of a key"))),
            }
        }
        Ok(key)
    }
}

/// A secret may have a `#` in it.
fn without_comment(line: &str) -> &str {
    let begins = |idx: usize| line[..idx].chars().next_back().is_none_or(char::is_whitespace);
    let comment = line.match_indices('#').map(|(idx, _)| idx).find(|&idx| begins(idx));
    &line[..comment.unwrap_or(line.len())]
}

fn digest(secret: &str) -> [u8; 32] {
    Sha256::digest(secret.as_bytes()).into()
}

/// Who calls: what the guard found out about a request, for its route.
#[derive(Clone)]
pub(crate) struct Caller {
    /// Of the caches, of stored responses and of the fair queue; `None` when no keys are set.
    account: Option<Arc<Account>>,
    /// What the request is called, here and at its client: its own id, or the one it came with.
    pub(crate) request_id: Arc<str>,
    /// The span of the client's that it is part of.
    pub(crate) trace_parent: Option<Arc<TraceParent>>,
}

/// A key in use, with what is left of its rates. Shared by all requests of the key; locked for some arithmetic.
struct Account {
    key: ApiKey,
    requests: Option<Mutex<Bucket>>,
    tokens: Option<Mutex<Bucket>>,
    /// Bytes of bodies in memory; counted by [`crate::bodies`].
    body_bytes: AtomicUsize,
}

impl Caller {
    fn of(account: Option<Arc<Account>>) -> Caller {
        Caller { account, request_id: Arc::default(), trace_parent: None }
    }

    /// What the engine's recordings call the request: its id, and the trace that it is part of.
    pub(crate) fn label(&self) -> Arc<str> {
        match &self.trace_parent {
            Some(parent) => format!("{} trace {}", self.request_id, parent.trace_id).into(),
            None => self.request_id.clone(),
        }
    }

    /// The name of the caller's key.
    pub(crate) fn name(&self) -> Option<&str> {
        self.account.as_ref().map(|account| account.key.name.as_str())
    }

    /// The best class that it may ask for.
    pub(crate) fn best_priority(&self) -> Priority {
        self.account.as_ref().map_or(Priority::High, |account| account.key.best_priority)
    }

    /// The key's count of what it has in memory.
    pub(crate) fn body_bytes(&self) -> Option<&AtomicUsize> {
        self.account.as_ref().map(|account| &account.body_bytes)
    }

    /// Whether it may do what touches all callers: an error names what is needed.
    pub(crate) fn check_admin(&self) -> ApiResult<()> {
        match &self.account {
            Some(account) if !account.key.is_admin => {
                let message = "this touches all callers: a key that is marked as admin is needed";
                Err(ApiError::new(StatusCode::FORBIDDEN, "admin_needed", message))
            }
            _ => Ok(()),
        }
    }

    /// Takes one request from the key's rate, if there is one left and its tokens are not used up.
    pub(crate) fn take_request(&self, now: Instant) -> ApiResult<()> {
        let Some(account) = &self.account else { return Ok(()) };
        let refused = |what: &str, per_minute: u32, wait_s: f64| {
            let message = format!("{what} per minute: the limit of this key is {per_minute}");
            ApiError::new(StatusCode::TOO_MANY_REQUESTS, "rate_limited", message)
                .retry_after(wait_s.ceil().max(1.0) as u64)
        };
        if let Some(tokens) = &account.tokens
            && let Err(wait_s) = lock(tokens).take(0.0, now)
        {
            return Err(refused("tokens", account.key.tokens_per_minute.unwrap_or_default(), wait_s));
        }
        if let Some(requests) = &account.requests
            && let Err(wait_s) = lock(requests).take(1.0, now)
        {
            return Err(refused("requests", account.key.requests_per_minute.unwrap_or_default(), wait_s));
        }
        Ok(())
    }

    /// Tokens that a request of this caller has used: what is known only afterwards is paid by the next ones.
    pub(crate) fn charge_tokens(&self, tokens: usize, now: Instant) {
        if let Some(bucket) = self.account.as_ref().and_then(|account| account.tokens.as_ref()) {
            lock(bucket).charge(tokens as f64, now);
        }
    }
}

fn lock(bucket: &Mutex<Bucket>) -> std::sync::MutexGuard<'_, Bucket> {
    bucket.lock().unwrap_or_else(PoisonError::into_inner)
}

/// All keys of a server.
pub(crate) struct Keys {
    accounts: Vec<Arc<Account>>,
}

impl Keys {
    pub(crate) fn new(keys: &[ApiKey], now: Instant) -> Keys {
        let bucket = |per_minute: Option<u32>| per_minute.map(|limit| Mutex::new(Bucket::new(limit, now)));
        let account = |key: &ApiKey| {
            let (requests, tokens) = (bucket(key.requests_per_minute), bucket(key.tokens_per_minute));
            Arc::new(Account { key: key.clone(), requests, tokens, body_bytes: AtomicUsize::new(0) })
        };
        Keys { accounts: keys.iter().map(account).collect() }
    }

    /// The caller whose secret `headers` carry. Without keys everybody is let in.
    pub(crate) fn caller(&self, headers: &HeaderMap) -> ApiResult<Caller> {
        if self.accounts.is_empty() {
            return Ok(Caller::of(None));
        }
        let unauthorized = |message: &str| ApiError::new(StatusCode::UNAUTHORIZED, "invalid_api_key", message);
        let secret = secret(headers).ok_or_else(|| unauthorized("an API key is needed: Authorization: Bearer KEY"))?;
        let given = digest(secret);
        // Every key is looked at, whole, whichever fits: time tells neither which nor how much of it.
        let mut found = None;
        for account in &self.accounts {
            let difference = account.key.digest.iter().zip(&given).fold(0, |all, (a, b)| all | (a ^ b));
            if difference == 0 {
                found = Some(account);
            }
        }
        match found {
            Some(account) => Ok(Caller::of(Some(account.clone()))),
            None => Err(unauthorized("this API key is not known")),
        }
    }
}

/// The secret of `Authorization: Bearer`, or of `x-api-key`.
fn secret(headers: &HeaderMap) -> Option<&str> {
    if let Some(value) = headers.get(AUTHORIZATION) {
        let (scheme, secret) = value.to_str().ok()?.split_once(' ')?;
        return scheme.eq_ignore_ascii_case("bearer").then(|| secret.trim());
    }
    headers.get("x-api-key")?.to_str().ok()
}

/// An amount that grows back steadily, up to that of one minute.
struct Bucket {
    per_minute: f64,
    left: f64,
    updated: Instant,
}

impl Bucket {
    fn new(per_minute: u32, now: Instant) -> Bucket {
        Bucket { per_minute: f64::from(per_minute), left: f64::from(per_minute), updated: now }
    }

    fn refill(&mut self, now: Instant) {
        let seconds = now.saturating_duration_since(self.updated).as_secs_f64();
        self.left = (self.left + seconds * self.per_minute / 60.0).min(self.per_minute);
        self.updated = self.updated.max(now);
    }

    /// Takes `amount`; otherwise the seconds until it is there. What is overdrawn must grow back first.
    fn take(&mut self, amount: f64, now: Instant) -> Result<(), f64> {
        self.refill(now);
        if self.left >= amount {
            self.left -= amount;
            return Ok(());
        }
        Err((amount - self.left) * 60.0 / self.per_minute)
    }

    fn charge(&mut self, amount: f64, now: Instant) {
        self.refill(now);
        self.left -= amount;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use axum::http::HeaderValue;

    use super::*;

    const SECRET: &str = "a-secret-of-some-length";

    fn headers(name: &'static str, value: &str) -> HeaderMap {
        HeaderMap::from_iter([(
            axum::http::HeaderName::from_static(name),
            HeaderValue::from_str(value).expect("visible characters"),
        )])
    }

    /// Each key finds its owner by either header; anything else is 401, and without keys everybody is let in.
    #[test]
    fn keys_find_their_owners() {
        let now = Instant::now();
        let other = ApiKey::new("other", "another-secret-text").expect("valid");
        let keys = Keys::new(&[ApiKey::new("one", SECRET).expect("valid"), other], now);
        let name = |headers: &HeaderMap| keys.caller(headers).map(|caller| caller.name().map(str::to_string));
        assert_eq!(name(&headers("authorization", &format!("Bearer {SECRET}"))), Ok(Some("one".to_string())));
        assert_eq!(name(&headers("authorization", "bearer another-secret-text")), Ok(Some("other".to_string())));
        assert_eq!(name(&headers("x-api-key", SECRET)), Ok(Some("one".to_string())));
        for (header, value) in [
            ("authorization", "Bearer a-secret-of-some-lengtH"),
            ("authorization", SECRET),
            ("x-api-key", ""),
            ("host", "x"),
        ] {
            let error = name(&headers(header, value)).expect_err("no key");
            assert_eq!((error.status.as_u16(), error.code), (401, "invalid_api_key"), "{header}: {value}");
            assert!(value.is_empty() || !error.message.contains(value), "{}", error.message);
        }
        assert!(Keys::new(&[], now).caller(&HeaderMap::new()).is_ok_and(|caller| caller.name().is_none()));
    }

    /// A file of keys has settings per line, and errors that name the line and never the secret.
    #[test]
    fn files_of_keys_are_read() {
        let text = format!(
            "# keys\none {SECRET} requests_per_minute=5 priority=normal # first\n\ntwo {SECRET}2 admin tokens_per_minute=9"
        );
        let keys = ApiKey::parse_file(&text).expect("valid");
        assert_eq!((keys.len(), keys[0].requests_per_minute, keys[1].tokens_per_minute), (2, Some(5), Some(9)));
        assert_eq!((keys[0].best_priority, keys[1].best_priority), (Priority::Normal, Priority::High));
        assert_eq!((keys[0].is_admin, keys[1].is_admin), (false, true));
        for wrong in [
            "one",
            "one short",
            &format!("one {SECRET} administrator"),
            &format!("one {SECRET} speed=9"),
            &format!("one {SECRET} tokens_per_minute=0"),
        ] {
            let error = ApiKey::parse_file(&format!("\n{wrong}")).expect_err("wrong").to_string();
            assert!(error.contains("line 2") && !error.contains(SECRET), "{error}");
        }
        assert!(!format!("{:?}", keys[0]).contains(SECRET));
    }

    /// A file without a key opens no server, and a secret with a `#` in it is whole.
    #[test]
    fn files_of_keys_hide_nothing() {
        for empty in ["", "\n \n", "# one a-secret-of-some-length\n\t# two"] {
            assert_eq!(ApiKey::parse_file(empty), Err(OptionsError::NoApiKeys), "{empty:?}");
        }
        let secret = "a-secret-of#some-length#";
        let keys = ApiKey::parse_file(&format!("one {secret} # mine")).expect("valid");
        assert_eq!(keys, [ApiKey::new("one", secret).expect("valid")]);
    }

    /// Rates are spent, refused with the time to wait, and grow back; tokens are paid afterwards.
    #[test]
    fn rates_are_spent_and_grow_back() {
        let now = Instant::now();
        let mut key = ApiKey::new("one", SECRET).expect("valid");
        (key.requests_per_minute, key.tokens_per_minute) = (Some(2), Some(60));
        let keys = Keys::new(&[key], now);
        let caller = keys.caller(&headers("x-api-key", SECRET)).expect("known");
        assert!(caller.take_request(now).is_ok() && caller.take_request(now).is_ok());
        let error = caller.take_request(now).expect_err("two in a minute");
        assert_eq!((error.status.as_u16(), error.code, error.retry_after_s), (429, "rate_limited", Some(30)));
        let later = now + Duration::from_secs(30);
        assert!(caller.take_request(later).is_ok());
        caller.charge_tokens(90, later);
        let much_later = later + Duration::from_secs(20);
        let error = caller.take_request(much_later).expect_err("overdrawn by 30, of which 20 grew back");
        assert!(error.message.starts_with("tokens per minute") && error.retry_after_s == Some(10), "{error:?}");
        assert!(caller.take_request(later + Duration::from_secs(60)).is_ok());
    }
}
