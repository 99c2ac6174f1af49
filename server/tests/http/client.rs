//! A server on a free port of this machine, and a client of few words: what goes through the socket is written and read
//! here, byte by byte.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ns_llm::{Engine, EngineOptions, Stats};
use ns_llm_server::{Model, Server, ServerOptions};
use serde_json::Value;
use tokio::sync::oneshot;

/// No answer takes longer, unless something hangs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(1_000);

/// Size of a test: the small one, or with `NS_LLM_SOAK` set the one that takes its time.
pub(crate) fn scaled(short: usize, long: usize) -> usize {
    if std::env::var_os("NS_LLM_SOAK").is_some() { long } else { short }
}

/// A small seeded generator (Vigna's splitmix64), so that a failure can be repeated.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % n as u64) as usize
    }
}

/// Bytes of this process that are in memory, where the system tells.
pub(crate) fn resident_bytes() -> Option<usize> {
    let text = std::fs::read_to_string("/proc/self/statm").ok()?;
    text.split(' ').nth(1)?.parse::<usize>().ok().map(|pages| pages * 4096)
}

/// The model that ships, on one thread.
pub(crate) fn demo_engine() -> Engine {
    Engine::open(demo_options()).expect("the model is there")
}

pub(crate) fn demo_options() -> EngineOptions {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../models/demo");
    EngineOptions::new(path).threads(1).kv_bytes(48 << 20)
}

/// A server with its engine; it stops when dropped.
pub(crate) struct Running {
    pub(crate) address: SocketAddr,
    pub(crate) engine: Engine,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    pub(crate) fn start() -> Running {
        Running::with(ServerOptions::default())
    }

    pub(crate) fn with(options: ServerOptions) -> Running {
        let engine = demo_engine();
        let model = Model { aliases: vec!["llama3.2".to_string()], ..Model::new(engine.clone()) };
        Running::serving(engine, vec![model], options)
    }

    /// With an engine of these options.
    pub(crate) fn over(engine: EngineOptions, options: ServerOptions) -> Running {
        let engine = Engine::open(engine).expect("the model is there");
        Running::serving(engine.clone(), vec![Model::new(engine)], options)
    }

    pub(crate) fn serving(engine: Engine, models: Vec<Model>, options: ServerOptions) -> Running {
        let options = ServerOptions { timer: Some(Server::tokio_timer()), ..options };
        let server = Server::new(models, options).expect("valid options");
        let listener = server.bind(SocketAddr::from(([127, 0, 0, 1], 0))).expect("a free port");
        let address = listener.local_addr().expect("bound");
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            let stopped = async {
                let _ = stopped.await;
            };
            runtime.block_on(server.serve(listener, stopped)).expect("it serves");
        });
        Running { address, engine, stop: Some(stop), thread: Some(thread) }
    }

    pub(crate) fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).expect("it listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        stream
    }

    /// Sends bytes as they are and reads until the server closes.
    pub(crate) fn raw(&self, bytes: &[u8]) -> Answer {
        let mut stream = self.connect();
        // A server that refuses early may close before all is written.
        let _ = stream.write_all(bytes);
        Answer::read(&mut stream)
    }

    pub(crate) fn send(&self, method: &str, path: &str, headers: &[&str], body: &str) -> Answer {
        self.raw(request(method, path, headers, body).as_bytes())
    }

    pub(crate) fn get(&self, path: &str) -> Answer {
        self.send("GET", path, &[], "")
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> Answer {
        self.send("POST", path, &[], &body.to_string())
    }

    /// Waits until nothing runs or waits in the engine, and gives its counts.
    pub(crate) fn idle_stats(&self) -> Stats {
        let start = Instant::now();
        loop {
            let stats = self.engine.stats();
            let settled = stats.requests_finished + stats.requests_cancelled + stats.requests_failed;
            if stats.num_sequences_running + stats.num_sequences_waiting == 0 && settled == stats.requests_total {
                return stats;
            }
            assert!(start.elapsed() < PATIENCE, "requests are left: {stats:?}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Asks the server to stop, and does not wait.
    pub(crate) fn begin_stop(&mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
    }

    pub(crate) fn has_stopped(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.begin_stop();
        self.engine.close();
        if let Some(thread) = self.thread.take()
            && !std::thread::panicking()
        {
            thread.join().expect("the server did not panic");
        }
    }
}

/// A request of one connection.
pub(crate) fn request(method: &str, path: &str, headers: &[&str], body: &str) -> String {
    let mut text = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n");
    for header in headers {
        text += &format!("{header}\r\n");
    }
    if !body.is_empty() {
        text += &format!("Content-Type: application/json\r\nContent-Length: {}\r\n", body.len());
    }
    text + "\r\n" + body
}

/// What came back.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    /// Names in lower case.
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: String,
}

impl Answer {
    /// Reads one answer, to its end or the connection's.
    pub(crate) fn read(stream: &mut TcpStream) -> Answer {
        let mut bytes = Vec::new();
        // A reset after the answer is as good as its end.
        let _ = stream.read_to_end(&mut bytes);
        Answer::parse(&bytes)
    }

    pub(crate) fn parse(bytes: &[u8]) -> Answer {
        let text = String::from_utf8_lossy(bytes);
        let Some((head, body)) = text.split_once("\r\n\r\n") else {
            return Answer { status: 0, headers: Vec::new(), body: text.into_owned() };
        };
        let mut lines = head.lines();
        let status = lines.next().and_then(|line| line.split(' ').nth(1)).and_then(|code| code.parse().ok());
        let header =
            |line: &str| line.split_once(": ").map(|(name, value)| (name.to_ascii_lowercase(), value.to_string()));
        let headers: Vec<_> = lines.filter_map(header).collect();
        let is_chunked = headers.iter().any(|(name, value)| name == "transfer-encoding" && value == "chunked");
        let body = if is_chunked { unchunked(body) } else { body.to_string() };
        Answer { status: status.unwrap_or(0), headers, body }
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(header, _)| header == name).map(|(_, value)| value.as_str())
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// The same, of an answer that succeeded.
    pub(crate) fn ok(&self) -> Value {
        assert_eq!(self.status, 200, "{self:?}");
        self.json()
    }

    /// The objects of an event stream that ended as OpenAI's do.
    pub(crate) fn chunks(&self) -> Vec<Value> {
        assert_eq!((self.status, self.header("content-type")), (200, Some("text/event-stream")), "{self:?}");
        // Lines that begin with a colon are comments: they say only that the stream lives.
        let mut frames: Vec<&str> = self.body.split("\n\n").filter(|frame| !frame.starts_with(':')).collect();
        assert_eq!(frames.pop(), Some(""), "each frame ends with a blank line");
        assert_eq!(frames.pop(), Some("data: [DONE]"), "{}", self.body);
        let object = |frame: &&str| {
            let data = frame.strip_prefix("data: ").unwrap_or_else(|| panic!("a frame of data: {frame:?}"));
            assert!(!data.contains('\n'), "one line: {frame:?}");
            serde_json::from_str(data).expect("JSON")
        };
        frames.iter().map(object).collect()
    }
}

fn unchunked(mut body: &str) -> String {
    let mut whole = Vec::new();
    while let Some((size, rest)) = body.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).expect("a chunk's size");
        if size == 0 {
            break;
        }
        whole.extend_from_slice(&rest.as_bytes()[..size]);
        body = &rest[size + 2..];
    }
    String::from_utf8(whole).expect("whole text")
}
