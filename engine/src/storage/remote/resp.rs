//! The part of Redis's protocol (RESP, version 2) that a cache needs: commands of byte strings; replies that are a status,
//! an error, an integer or one string. Everything else is refused, so there is no nesting and nothing grows: a line is
//! bounded, a string is at most as long as was asked for, and both are checked before they are taken in.

#![deny(clippy::arithmetic_side_effects, clippy::indexing_slicing)]

use std::io::{self, BufRead, Read};

use crate::config::MAX_REMOTE_LINE_BYTES;

/// Longest error code that is repeated.
const MAX_CODE_BYTES: usize = 32;

/// What a server answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Reply {
    /// `OK`.
    Ok,
    /// The command failed; the first word of the text. The rest may repeat what was sent, a password too.
    Error(String),
    Integer(i64),
    Bytes(Vec<u8>),
    /// There is no such value.
    Nothing,
}

/// Why there is no reply. What comes after it on the same connection means nothing.
#[derive(Debug)]
pub(super) enum Broken {
    Io(io::Error),
    /// What came is not what the protocol allows, or more than was asked for.
    Protocol(String),
    /// The server does not let us in.
    Refused {
        operation: &'static str,
        code: String,
    },
}

impl From<io::Error> for Broken {
    fn from(error: io::Error) -> Self {
        Broken::Io(error)
    }
}

/// A command as it is sent.
pub(super) fn command(arguments: &[&[u8]]) -> Vec<u8> {
    let mut bytes = format!("*{}\r\n", arguments.len()).into_bytes();
    for argument in arguments {
        bytes.extend(format!("${}\r\n", argument.len()).into_bytes());
        bytes.extend(*argument);
        bytes.extend(b"\r\n");
    }
    bytes
}

/// Reads one reply, in which a string has at most `max_bytes`.
pub(super) fn read_reply(from: &mut impl BufRead, max_bytes: u64) -> Result<Reply, Broken> {
    let line = read_line(from)?;
    let (kind, text) = line.split_first().ok_or_else(|| refuse("an empty line"))?;
    match kind {
        b'+' if text == b"OK" => Ok(Reply::Ok),
        b'-' => Ok(Reply::Error(error_code(text))),
        b':' => Ok(Reply::Integer(parse_integer(text)?)),
        b'$' => match parse_integer(text)? {
            -1 => Ok(Reply::Nothing),
            length => match u64::try_from(length) {
                Ok(length) if length <= max_bytes => Ok(Reply::Bytes(read_bytes(from, length)?)),
                _ => Err(refuse(&format!("a string of {length} bytes, at most {max_bytes} were asked for"))),
            },
        },
        _ => Err(refuse(&format!("a reply that begins with byte {kind:#04x}"))),
    }
}

/// A line without its end.
fn read_line(from: &mut impl BufRead) -> Result<Vec<u8>, Broken> {
    let mut line = Vec::new();
    from.take(MAX_REMOTE_LINE_BYTES).read_until(b'\n', &mut line)?;
    if let Some(text) = line.strip_suffix(b"\r\n") {
        return Ok(text.to_vec());
    }
    match line.len() as u64 >= MAX_REMOTE_LINE_BYTES || line.ends_with(b"\n") {
        true => Err(refuse(&format!("a line that does not end within {MAX_REMOTE_LINE_BYTES} bytes as lines do"))),
        false => Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
    }
}

/// `length` has been compared with what was asked for.
fn read_bytes(from: &mut impl BufRead, length: u64) -> Result<Vec<u8>, Broken> {
    let mut bytes = Vec::new();
    let len = usize::try_from(length).map_err(|e| refuse(&e.to_string()))?;
    bytes.try_reserve_exact(len).map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
    from.take(length).read_to_end(&mut bytes)?;
    if bytes.len() != len {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    }
    let mut end = [0; 2];
    from.read_exact(&mut end)?;
    if end == *b"\r\n" { Ok(bytes) } else { Err(refuse("a string that does not end where it says")) }
}

fn parse_integer(text: &[u8]) -> Result<i64, Broken> {
    let digits = text.strip_prefix(b"-").unwrap_or(text);
    let is_number = !digits.is_empty() && digits.iter().all(u8::is_ascii_digit);
    let number = std::str::from_utf8(text).ok().filter(|_| is_number).and_then(|text| text.parse().ok());
    number.ok_or_else(|| refuse("a length or number that is none"))
}

fn error_code(text: &[u8]) -> String {
    let is_letter = |byte: &&u8| byte.is_ascii_uppercase() || byte.is_ascii_digit() || **byte == b'_';
    let code: String = text.iter().take_while(is_letter).take(MAX_CODE_BYTES).map(|&byte| char::from(byte)).collect();
    if code.is_empty() { "an error without a code".to_string() } else { code }
}

fn refuse(reason: &str) -> Broken {
    Broken::Protocol(reason.to_string())
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects, clippy::indexing_slicing, reason = "a test may panic")]
mod tests {
    use super::*;

    fn read(bytes: &[u8]) -> Result<Reply, Broken> {
        read_reply(&mut &bytes[..], 10)
    }

    /// A command is lengths and bytes; what stands in an argument can be nothing but an argument.
    #[test]
    fn commands_are_framed() {
        assert_eq!(command(&[b"DEL", b"a\r\nb"]), b"*2\r\n$3\r\nDEL\r\n$4\r\na\r\nb\r\n");
    }

    /// The replies that there are; of an error only its code.
    #[test]
    fn replies_are_read() {
        for (bytes, expected) in [
            (&b"+OK\r\n"[..], Reply::Ok),
            (b":-12\r\n", Reply::Integer(-12)),
            (b"$-1\r\n", Reply::Nothing),
            (b"$0\r\n\r\n", Reply::Bytes(Vec::new())),
            (b"$10\r\n01234\r\n789\r\n", Reply::Bytes(b"01234\r\n789".to_vec())),
            (b"-WRONGPASS invalid hunter2\r\n", Reply::Error("WRONGPASS".to_string())),
            (b"-ERR unknown command 'AUTH', with args beginning with: 'hunter2'\r\n", Reply::Error("ERR".to_string())),
            (b"-hunter2\r\n", Reply::Error("an error without a code".to_string())),
        ] {
            assert_eq!(read(bytes).expect("a reply"), expected);
            // Cut at each byte it is none.
            for len in 0..bytes.len() {
                assert!(matches!(read(&bytes[..len]), Err(Broken::Io(_))), "{len} of {bytes:?}");
            }
        }
    }

    /// What the protocol has beside these is refused, and so is what is longer than was asked for, before it is read.
    #[test]
    fn everything_else_is_refused() {
        let long_line = [b"+".repeat(5_000), b"\r\n".to_vec()].concat();
        for bytes in [
            &b"+PONG\r\n"[..],
            b"\r\n",
            b"+OK\n",
            b"*1\r\n+OK\r\n",
            b"*9223372036854775807\r\n",
            b"%1\r\n+a\r\n+b\r\n",
            b"_\r\n",
            b">1\r\n$1\r\na\r\n",
            b"$11\r\n01234567890\r\n",
            b"$9223372036854775807\r\n",
            b"$9223372036854775808\r\n",
            b"$-2\r\n",
            b"$+1\r\na\r\n",
            b"$\r\n",
            b"$ 1\r\na\r\n",
            b"$1\r\nab\r\n",
            b":1x\r\n",
            b":\r\n",
            b"HTTP/1.1 400 Bad Request\r\n",
            &long_line,
        ] {
            let is_refused = matches!(read(bytes), Err(Broken::Protocol(_)));
            assert!(is_refused, "{:?}", String::from_utf8_lossy(&bytes[..bytes.len().min(40)]));
        }
    }
}
