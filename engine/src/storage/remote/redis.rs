//! A store that speaks Redis's protocol (Redis, Valkey and others), over one connection of its own.
//!
//! Each call ends within the time that the store was given, whatever the server does: connecting, logging in, sending and
//! all of the reply have one deadline together, so that a server that sends a byte now and then gains nothing. (But for the
//! system's search for the address of a host name, which has a time of its own.) After anything but a clean reply the
//! connection is given up: what would come next on it means nothing. A connection that ended while nothing happened on it
//! is made again within the same call; one that cannot be made is left alone for a while, and calls fail at once.
//!
//! The `redis` crate is not used: its connection bounds neither the whole time of a call nor the length of a reply.

use std::io::{self, BufReader, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use super::resp::{Broken, Reply, command, read_reply};
use super::server_url::ServerUrl;
use super::values::ValueStore;
use crate::config::{MAX_REMOTE_TIMEOUT_MS, in_range};
use crate::error::Result;
use crate::storage::fault::{Damage, Fault};

/// How long a server is left alone after a failure at least. It is never less than the time of a call, so that a server
/// that hangs costs at most half of the time; each further failure doubles it.
const MIN_PAUSE: Duration = Duration::from_millis(100);
/// How long at most, unless a call may take longer.
const MAX_PAUSE: Duration = Duration::from_secs(5);

/// What has happened on the way to a server. Counters only grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StoreReport {
    /// Connections that were made, logged in where asked.
    pub connections: u64,
    /// Calls that failed on the way, refusals of the server not counted.
    pub failures: u64,
    /// Calls that failed at once because the server was left alone.
    pub skipped: u64,
}

/// One server.
pub struct RedisStore {
    url: ServerUrl,
    timeout: Duration,
    connection: Option<BufReader<Wire>>,
    /// Left alone until then.
    paused_until: Option<Instant>,
    next_pause: Duration,
    report: StoreReport,
}

impl RedisStore {
    /// A store whose calls take at most `timeout_ms`. Connects when it is first asked.
    pub fn new(url: ServerUrl, timeout_ms: u64) -> Result<Self> {
        in_range("kv_remote_timeout_ms", timeout_ms, 1, MAX_REMOTE_TIMEOUT_MS)?;
        let mut store = RedisStore {
            url,
            timeout: Duration::from_millis(timeout_ms),
            connection: None,
            paused_until: None,
            next_pause: Duration::ZERO,
            report: StoreReport::default(),
        };
        store.next_pause = store.first_pause();
        Ok(store)
    }

    /// What has happened.
    pub fn report(&self) -> StoreReport {
        self.report
    }

    fn first_pause(&self) -> Duration {
        self.timeout.max(MIN_PAUSE)
    }

    /// Sends `arguments` and reads the reply, in which a string has at most `max_bytes`. `deadline` is that of the call.
    fn ask(&mut self, deadline: Instant, arguments: &[&[u8]], max_bytes: u64) -> Result<Reply, Fault> {
        let operation = operation_of(arguments);
        if self.paused_until.is_some_and(|until| Instant::now() < until) {
            self.report.skipped += 1;
            let reason = "the store failed just now and is left alone for a moment".to_string();
            return Err(Fault::Io { operation, kind: io::ErrorKind::NotConnected, reason });
        }
        let was_idle = self.connection.is_some();
        let mut answer = self.exchange(deadline, arguments, max_bytes);
        if was_idle && matches!(&answer, Err(Broken::Io(error)) if has_ended(error)) {
            answer = self.exchange(deadline, arguments, max_bytes);
        }
        match answer {
            // The connection is as good as before.
            Ok(reply) => {
                (self.paused_until, self.next_pause) = (None, self.first_pause());
                match reply {
                    Reply::Error(code) => Err(Fault::Refused { operation, code }),
                    reply => Ok(reply),
                }
            }
            Err(broken) => {
                self.give_up();
                Err(match broken {
                    Broken::Protocol(reason) => Fault::Protocol { operation, reason },
                    Broken::Refused { operation, code } => Fault::Refused { operation, code },
                    Broken::Io(error) => {
                        let kind = if is_timeout(&error) { io::ErrorKind::TimedOut } else { error.kind() };
                        Fault::Io { operation, kind, reason: format!("{}: {error}", self.url) }
                    }
                })
            }
        }
    }

    /// One command on the connection that there is, or a new one. Keeps it only when all went well.
    fn exchange(&mut self, deadline: Instant, arguments: &[&[u8]], max_bytes: u64) -> Result<Reply, Broken> {
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => self.connect(deadline)?,
        };
        let reply = round_trip(&mut connection, deadline, arguments, max_bytes)?;
        self.connection = Some(connection);
        Ok(reply)
    }

    /// A connection that is logged in.
    fn connect(&mut self, deadline: Instant) -> Result<BufReader<Wire>, Broken> {
        let stream = connect_to(&self.url, deadline)?;
        stream.set_nodelay(true)?;
        let mut connection = BufReader::new(Wire { stream, deadline });
        let mut log_in = |arguments: &[&[u8]]| match round_trip(&mut connection, deadline, arguments, 0)? {
            Reply::Ok => Ok(()),
            Reply::Error(code) => Err(Broken::Refused { operation: operation_of(arguments), code }),
            _ => Err(Broken::Protocol("the answer to a login is neither OK nor an error".to_string())),
        };
        match &self.url.login {
            None => {}
            Some((None, password)) => log_in(&[b"AUTH", password.as_bytes()])?,
            Some((Some(user), password)) => log_in(&[b"AUTH", user.as_bytes(), password.as_bytes()])?,
        }
        if self.url.database != 0 {
            log_in(&[b"SELECT", self.url.database.to_string().as_bytes()])?;
        }
        self.report.connections += 1;
        Ok(connection)
    }

    fn set(&mut self, deadline: Instant, name: &str, value: &[u8], ttl_s: &str) -> Result<(), Fault> {
        match self.ask(deadline, &[b"SET", name.as_bytes(), value, b"EX", ttl_s.as_bytes()], 0)? {
            Reply::Ok => Ok(()),
            other => Err(self.unexpected("SET", &other)),
        }
    }

    /// Ends the connection, and leaves the server alone for a while.
    fn give_up(&mut self) {
        self.connection = None;
        self.report.failures += 1;
        self.paused_until = Some(Instant::now() + self.next_pause);
        self.next_pause = (2 * self.next_pause).min(MAX_PAUSE.max(self.first_pause()));
    }

    /// The server has answered, but with what `arguments` cannot mean.
    fn unexpected(&mut self, operation: &'static str, reply: &Reply) -> Fault {
        self.give_up();
        let kind = match reply {
            Reply::Ok => "OK",
            Reply::Error(_) => "an error",
            Reply::Integer(_) => "a number",
            Reply::Bytes(_) => "a string",
            Reply::Nothing => "nothing",
        };
        Fault::Protocol { operation, reason: format!("the answer is {kind}, which it cannot be") }
    }
}

impl ValueStore for RedisStore {
    fn get(&mut self, name: &str, max_bytes: u64) -> Result<Option<Vec<u8>>, Fault> {
        let deadline = Instant::now() + self.timeout;
        // A part, whose end is counted in: an honest server does not send more than one byte too many, however long the
        // value is. Of a name without a value it is empty.
        let end = max_bytes.to_string();
        let limit = max_bytes.saturating_add(1);
        match self.ask(deadline, &[b"GETRANGE", name.as_bytes(), b"0", end.as_bytes()], limit)? {
            Reply::Bytes(bytes) if bytes.len() as u64 > max_bytes => {
                Err(Damage::Length { found_bytes: bytes.len() as u64, limit_bytes: max_bytes }.into())
            }
            Reply::Bytes(bytes) => Ok(Some(bytes).filter(|bytes| !bytes.is_empty())),
            Reply::Nothing => Ok(None),
            other => Err(self.unexpected("GETRANGE", &other)),
        }
    }

    fn put(&mut self, name: &str, value: &[u8], ttl_s: u64) -> Result<bool, Fault> {
        let deadline = Instant::now() + self.timeout;
        let ttl = ttl_s.to_string();
        // Asks before it sends the value: another node may have stored it.
        match self.ask(deadline, &[b"EXPIRE", name.as_bytes(), ttl.as_bytes()], 0)? {
            Reply::Integer(1) => return Ok(false),
            Reply::Integer(0) => {}
            other => return Err(self.unexpected("EXPIRE", &other)),
        }
        self.set(deadline, name, value, &ttl).map(|()| true)
    }

    fn replace(&mut self, name: &str, value: &[u8], ttl_s: u64) -> Result<(), Fault> {
        self.set(Instant::now() + self.timeout, name, value, &ttl_s.to_string())
    }

    fn remove(&mut self, name: &str) -> Result<(), Fault> {
        let deadline = Instant::now() + self.timeout;
        match self.ask(deadline, &[b"DEL", name.as_bytes()], 0)? {
            Reply::Integer(0 | 1) => Ok(()),
            other => Err(self.unexpected("DEL", &other)),
        }
    }
}

impl std::fmt::Debug for RedisStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RedisStore").field("url", &self.url).field("report", &self.report).finish_non_exhaustive()
    }
}

/// A socket on which everything ends at the deadline of the call that uses it.
struct Wire {
    stream: TcpStream,
    deadline: Instant,
}

impl Wire {
    fn left(&self) -> io::Result<Option<Duration>> {
        left_until(self.deadline).map(Some)
    }
}

impl Read for Wire {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(self.left()?)?;
        self.stream.read(buffer)
    }
}

impl Write for Wire {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(self.left()?)?;
        self.stream.write(bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

fn left_until(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}

fn round_trip(
    connection: &mut BufReader<Wire>,
    deadline: Instant,
    arguments: &[&[u8]],
    max_bytes: u64,
) -> Result<Reply, Broken> {
    if !connection.buffer().is_empty() {
        return Err(Broken::Protocol("an answer that nobody asked for".to_string()));
    }
    let wire = connection.get_mut();
    wire.deadline = deadline;
    wire.write_all(&command(arguments))?;
    read_reply(connection, max_bytes)
}

/// Tries the addresses of the host one after the other, each with its share of the time that is left.
fn connect_to(url: &ServerUrl, deadline: Instant) -> io::Result<TcpStream> {
    let addresses: Vec<_> = (url.host.as_str(), url.port).to_socket_addrs()?.collect();
    let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for (idx, address) in addresses.iter().enumerate() {
        let share = left_until(deadline)? / (addresses.len() - idx) as u32;
        match TcpStream::connect_timeout(address, share.max(Duration::from_millis(1))) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// The other side has ended the connection.
fn has_ended(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), BrokenPipe | ConnectionAborted | ConnectionReset | UnexpectedEof)
}

/// Systems have two words for it.
fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

/// The command's name, for messages.
fn operation_of(arguments: &[&[u8]]) -> &'static str {
    const NAMES: [&str; 6] = ["GETRANGE", "EXPIRE", "SET", "DEL", "AUTH", "SELECT"];
    let name = arguments.first().copied().unwrap_or_default();
    NAMES.into_iter().find(|known| known.as_bytes() == name).unwrap_or("a command")
}
