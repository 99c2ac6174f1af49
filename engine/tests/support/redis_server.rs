//! A real server for tests, on a free port of this machine, with nothing on disk; it ends with its value.
#![allow(dead_code, reason = "each test program uses a part")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long a server may take to start on a busy machine.
const START: Duration = Duration::from_secs(30);

/// A running server.
pub struct RedisServer {
    child: Child,
    arguments: Vec<String>,
    pub port: u16,
}

impl RedisServer {
    /// Starts `NS_LLM_REDIS_SERVER` or `redis-server` with these options beside the usual ones.
    pub fn start(options: &[&str]) -> RedisServer {
        for _ in 0..5 {
            let port = TcpListener::bind(("127.0.0.1", 0)).and_then(|it| it.local_addr()).expect("a free port").port();
            let mut arguments: Vec<String> =
                ["--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--port"].map(String::from).to_vec();
            arguments.push(port.to_string());
            arguments.extend(options.iter().map(ToString::to_string));
            // Another process may have taken the port meanwhile.
            if let Some(child) = launch(&arguments, port) {
                return RedisServer { child, arguments, port };
            }
        }
        panic!("no server could be started");
    }

    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// As `kill -9`.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Starts it again on the same port, empty.
    pub fn restart(&mut self) {
        self.kill();
        self.child = launch(&self.arguments, self.port).expect("the port was its own");
    }

    /// Stops the process, whose connections stay as they are, or lets it go on.
    pub fn set_stopped(&self, is_stopped: bool) {
        let signal = if is_stopped { "-STOP" } else { "-CONT" };
        let status = Command::new("kill").args([signal, &self.child.id().to_string()]).status();
        assert!(status.is_ok_and(|status| status.success()), "kill {signal}");
    }
}

/// A client of its own, for tests that look into the store or change it.
pub struct Connection(BufReader<TcpStream>);

impl RedisServer {
    pub fn connect(&self) -> Connection {
        let stream = TcpStream::connect(("127.0.0.1", self.port)).expect("it listens");
        Connection(BufReader::new(stream))
    }
}

impl Connection {
    /// All names that there are.
    pub fn names(&mut self) -> Vec<String> {
        self.send(&[b"KEYS", b"*"]);
        let count: usize = self.line().trim_start_matches('*').parse().expect("a count");
        (0..count).map(|_| String::from_utf8(self.bulk()).expect("names are text")).collect()
    }
    /// A value that is there.
    pub fn get(&mut self, name: &str) -> Vec<u8> {
        self.send(&[b"GET", name.as_bytes()]);
        self.bulk()
    }
    pub fn set(&mut self, name: &str, value: &[u8]) {
        self.send(&[b"SET", name.as_bytes(), value]);
        assert_eq!(self.line(), "+OK");
    }

    fn send(&mut self, parts: &[&[u8]]) {
        let mut command = format!("*{}\r\n", parts.len()).into_bytes();
        for part in parts {
            command.extend(format!("${}\r\n", part.len()).into_bytes());
            command.extend(*part);
            command.extend(b"\r\n");
        }
        self.0.get_mut().write_all(&command).expect("sent");
    }
    fn line(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).expect("a line");
        line.trim_end().to_string()
    }
    fn bulk(&mut self) -> Vec<u8> {
        let length: usize = self.line().trim_start_matches('$').parse().expect("a length");
        let mut bytes = vec![0; length + 2];
        self.0.read_exact(&mut bytes).expect("all of it");
        bytes.truncate(length);
        bytes
    }
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        self.kill();
    }
}

/// It listens before it has read all of its options; when it answers, with whatever, it has.
fn answers(port: u16) -> bool {
    let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port)) else { return false };
    stream.set_read_timeout(Some(START)).is_ok()
        && stream.write_all(b"PING\r\n").is_ok()
        && stream.read_exact(&mut [0]).is_ok()
}

/// `None`: it ended, or does not listen.
fn launch(arguments: &[String], port: u16) -> Option<Child> {
    let program = std::env::var("NS_LLM_REDIS_SERVER").unwrap_or_else(|_| "redis-server".to_string());
    let mut child = Command::new(&program)
        .args(arguments)
        .current_dir(env!("CARGO_TARGET_TMPDIR"))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    let start = Instant::now();
    while start.elapsed() < START {
        if answers(port) {
            return Some(child);
        }
        if child.try_wait().is_ok_and(|status| status.is_some()) {
            return None;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let _ = child.kill();
    let _ = child.wait();
    None
}
