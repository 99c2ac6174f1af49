//! Where a store is and how to get in: `redis://[[USER]:PASSWORD@]HOST[:PORT][/DATABASE]`. What is secret in it is shown by
//! no message and no `Debug`.

use crate::config::MAX_REMOTE_URL_BYTES;
use crate::error::{Error, Result};

const DEFAULT_PORT: u16 = 6379;
const FORM: &str = "redis://[[USER]:PASSWORD@]HOST[:PORT][/DATABASE]";

/// A parsed URL.
#[derive(Clone, PartialEq, Eq)]
pub struct ServerUrl {
    pub(super) host: String,
    pub(super) port: u16,
    pub(super) database: u32,
    /// User, if one is named, and password.
    pub(super) login: Option<(Option<String>, String)>,
}

impl ServerUrl {
    /// Parses `url`. The error says what is wrong without repeating what may be secret.
    pub fn parse(url: &str) -> Result<Self> {
        let refuse = |reason: &str| Error::InvalidArgument {
            field: "kv_remote_url",
            value: "not shown, for it may hold a password".to_string(),
            expected: format!("{FORM}: {reason}"),
        };
        if url.len() > MAX_REMOTE_URL_BYTES {
            return Err(refuse(&format!("at most {MAX_REMOTE_URL_BYTES} bytes")));
        }
        if url.starts_with("rediss://") {
            return Err(refuse("TLS is not supported; lead the connection through a tunnel"));
        }
        let rest = url.strip_prefix("redis://").ok_or_else(|| refuse("it must begin with redis://"))?;
        if rest.contains(['?', '#']) {
            return Err(refuse("? and # have no meaning here; in a password they are %3F and %23"));
        }
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let (login, place) = match authority.rsplit_once('@') {
            Some((login, place)) => (Some(parse_login(login).map_err(refuse)?), place),
            None => (None, authority),
        };
        let (host, port) = parse_place(place).map_err(refuse)?;
        let database = match path {
            "" => 0,
            number => parse_number(number).ok_or_else(|| refuse("the database is a number"))?,
        };
        Ok(ServerUrl { host, port, database, login })
    }
}

/// Without the login.
impl std::fmt::Display for ServerUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ServerUrl { host, port, database, .. } = self;
        match host.contains(':') {
            true => write!(f, "redis://[{host}]:{port}/{database}"),
            false => write!(f, "redis://{host}:{port}/{database}"),
        }
    }
}

impl std::fmt::Debug for ServerUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ServerUrl({self}{})", if self.login.is_some() { ", login not shown" } else { "" })
    }
}

fn parse_login(text: &str) -> Result<(Option<String>, String), &'static str> {
    let (user, password) = text.split_once(':').ok_or("a user has a password, after a colon")?;
    let user = Some(decode(user)?).filter(|user| !user.is_empty());
    let password = decode(password)?;
    if password.is_empty() { Err("the password is empty") } else { Ok((user, password)) }
}

fn parse_place(text: &str) -> Result<(String, u16), &'static str> {
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (host, after) = rest.split_once(']').ok_or("an address in [ needs its ]")?;
            if host.parse::<std::net::Ipv6Addr>().is_err() {
                return Err("in [ ] stands an IPv6 address");
            }
            (host, after)
        }
        None => text.split_at(text.find(':').unwrap_or(text.len())),
    };
    let is_name = |byte: u8| byte.is_ascii_alphanumeric() || b".-_:".contains(&byte);
    if host.is_empty() || !host.bytes().all(is_name) {
        return Err("a host has letters, digits and .-_ (in a user or password, @ / : are %40 %2F %3A)");
    }
    let port = match port {
        "" => DEFAULT_PORT,
        port => port
            .strip_prefix(':')
            .and_then(parse_number)
            .filter(|&port| port != 0)
            .ok_or("the port is a number from 1 to 65535")?,
    };
    Ok((host.to_string(), port))
}

/// Digits only: no sign, no space.
fn parse_number<N: std::str::FromStr>(text: &str) -> Option<N> {
    if text.bytes().all(|byte| byte.is_ascii_digit()) { text.parse().ok() } else { None }
}

/// `%41` becomes `A`.
fn decode(text: &str) -> Result<String, &'static str> {
    let mut pieces = text.split('%');
    let mut bytes = pieces.next().unwrap_or_default().as_bytes().to_vec();
    for piece in pieces {
        let digits = piece.get(..2).filter(|digits| digits.bytes().all(|byte| byte.is_ascii_hexdigit()));
        let byte = digits.and_then(|digits| u8::from_str_radix(digits, 16).ok());
        bytes.push(byte.ok_or("after % stand two hexadecimal digits")?);
        bytes.extend(piece.bytes().skip(2));
    }
    String::from_utf8(bytes).map_err(|_| "user and password are UTF-8")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every part is read, and the login is nowhere shown.
    #[test]
    fn parts_are_read() {
        let parse = |url: &str| ServerUrl::parse(url).unwrap_or_else(|e| panic!("{url}: {e}"));
        let plain = parse("redis://cache.example");
        assert_eq!((plain.to_string(), plain.login), ("redis://cache.example:6379/0".to_string(), None));
        let url = parse("redis://us%65r:p%40ss%2F:%C3%A9@10.0.0.7:7000/3");
        assert_eq!(url.login, Some((Some("user".to_string()), "p@ss/:é".to_string())));
        for shown in [format!("{url:?}"), url.to_string()] {
            assert!(shown.contains("redis://10.0.0.7:7000/3"), "{shown}");
            assert!(!shown.contains("user") && !shown.contains("p@ss"), "{shown}");
        }
        let url = parse("redis://:only@[::1]:1/");
        assert_eq!((url.login.clone(), url.host.as_str()), (Some((None, "only".to_string())), "::1"));
        assert_eq!(url.to_string(), "redis://[::1]:1/0");
    }

    /// What is not of the form is refused with a reason, and no refusal repeats a password.
    #[test]
    fn refusals_say_why_and_hide_the_login() {
        for (url, reason) in [
            ("", "must begin"),
            ("http://u:hunter2@h", "must begin"),
            ("rediss://u:hunter2@h", "TLS"),
            ("redis://", "a host"),
            ("redis://u:hunter2@", "a host"),
            ("redis://u:hunter2@h/x", "the database"),
            ("redis://u:hunter2@h/-1", "the database"),
            ("redis://u:hunter2@h:0", "the port"),
            ("redis://u:hunter2@h:70000", "the port"),
            ("redis://u:hunter2@h:+7", "the port"),
            ("redis://u:hunter2@h?x", "? and #"),
            ("redis://u:hunter2/@h", "the port"),
            ("redis://u:hunter2%4@h", "after %"),
            ("redis://u:hunter2%FF@h", "UTF-8"),
            ("redis://hunter2@h", "a user has a password"),
            ("redis://u:@h", "the password is empty"),
            ("redis://u:hunter2@[::1", "needs its ]"),
            ("redis://u:hunter2@[x]", "IPv6"),
            ("redis://u:hunter2@a b", "a host"),
            ("redis://u:hunter2@h\r\nFLUSHALL", "a host"),
        ] {
            let error = ServerUrl::parse(url).expect_err(url).to_string();
            assert!(error.contains(reason) && !error.contains("hunter2"), "{url}: {error}");
        }
        let long = format!("redis://:{}@h", "hunter2".repeat(400));
        assert!(ServerUrl::parse(&long).expect_err("too long").to_string().contains("at most 2048"));
    }
}
