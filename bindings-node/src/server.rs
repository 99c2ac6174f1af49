//! The HTTP face inside Node: the router that `ns-llm serve` has, without a socket. Node's own server gives it heads and bodies,
//! and takes answers piece by piece as its client does. The router runs on JavaScript's thread, between its other work.

use std::cell::{OnceCell, RefCell};
use std::net::IpAddr;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use napi::Env;
use napi::bindgen_prelude::{Buffer, FnArgs, Function, Object, PromiseRaw, Uint8ArraySlice};
use napi_derive::napi;
use ns_llm::{Error, Priority};
use ns_llm_server::http::{HeaderMap, HeaderName, HeaderValue, Request};
use ns_llm_server::{ApiKey, BodySender, Bytes, Exchange, Head, LocalAddress, Model, Server, ServerOptions};

use crate::engine::NativeEngine;
use crate::error::{Result, from_napi, invalid, invalid_server_options, to_js};
use crate::event_loop::{callback, promise};
use crate::request::{Fields, as_usize};

/// Every name that [`read_server_options`] knows.
const SERVER_FIELDS: &[&str] = &[
    "apiKeys",
    "behindAuth",
    "allowedHosts",
    "corsOrigins",
    "publicProbes",
    "anyModel",
    "vllmMetricNames",
    "maxBodyBytes",
    "maxRunningRequests",
    "maxWaitingRequests",
    "bodyTimeoutMs",
    "stallTimeoutMs",
    "pingIntervalMs",
    "requestTimeoutMs",
];

/// Every name that [`read_api_key`] knows.
const API_KEY_FIELDS: &[&str] = &["name", "secret", "requestsPerMinute", "tokensPerMinute", "bestPriority", "admin"];

/// Keys, hosts and origins that one server may be given.
const MAX_NAMES: usize = 1_024;

/// A router over engines.
#[napi]
pub struct NativeServer {
    options: ServerOptions,
    models: RefCell<Vec<Model>>,
    /// Made by [`NativeServer::start`].
    server: OnceCell<Server>,
}

#[napi]
impl NativeServer {
    /// Checks the types of the options.
    #[napi(constructor, catch_unwind)]
    pub fn new(#[napi(ts_arg_type = "Record<string, unknown>")] options: Object) -> Result<Self> {
        let options = read_server_options(&options)?;
        Ok(NativeServer { options, models: RefCell::default(), server: OnceCell::new() })
    }

    /// Adds an engine, under the name of its model unless there is another. Before [`NativeServer::start`].
    #[napi(catch_unwind)]
    pub fn add_model(&self, engine: &NativeEngine, name: Option<String>, aliases: Vec<String>) -> Result<()> {
        let model = Model::new(engine.open_engine()?);
        let name = name.unwrap_or_else(|| model.name.clone());
        self.models.borrow_mut().push(Model { name, aliases, ..model });
        Ok(())
    }

    /// Checks the values of the options, and makes the router.
    #[napi(catch_unwind)]
    pub fn start(&self) -> Result<()> {
        let server = Server::new(self.models.take(), self.options.clone());
        let server = server.map_err(|error| invalid_server_options(&error))?;
        self.server.set(server).map_err(|_| to_js(&Error::Internal { reason: "start() was called twice".into() }))
    }

    /// Whether there is a route at this path, of any method.
    #[napi(catch_unwind)]
    pub fn has_path(&self, path: String) -> Result<bool> {
        Ok(self.server()?.has_path(&path))
    }

    /// How long a client may take nothing of its answer, milliseconds.
    #[napi(catch_unwind)]
    pub fn stall_timeout_ms(&self) -> f64 {
        self.options.stall_timeout.as_millis() as f64
    }

    /// Refuses new work from now on, with 503.
    #[napi(catch_unwind)]
    pub fn stop(&self) -> Result<()> {
        self.server()?.stop();
        Ok(())
    }

    /// Gives the router a request; nothing of it is done before [`NativeExchange::head`].
    #[napi(catch_unwind)]
    pub fn ask(&self, request: NativeRequest) -> Result<NativeExchange> {
        let server = self.server()?;
        let streams_body = request.streams_body;
        let body = request.body.as_deref().map(Bytes::copy_from_slice).unwrap_or_default();
        let request = request.read()?;
        let (exchange, sender) = match streams_body {
            true => {
                let (exchange, sender) = server.ask_with_body(request);
                (exchange, Some(sender))
            }
            false => (server.ask(request.map(|()| body)), None),
        };
        Ok(NativeExchange {
            asked: Rc::new(RefCell::new(Asked { exchange, waiting: None })),
            sender: Rc::new(RefCell::new(sender)),
        })
    }

    fn server(&self) -> Result<&Server> {
        self.server.get().ok_or_else(|| to_js(&Error::Internal { reason: "start() was not called".into() }))
    }
}

/// A request, as Node's parser has read it.
#[napi(object, object_to_js = false)]
pub struct NativeRequest {
    /// Such as `POST`.
    pub method: String,
    /// Path and query.
    pub target: String,
    /// Names and values in turn.
    pub headers: Vec<String>,
    /// The server's own end of the connection, where it has one.
    pub local_address: Option<String>,
    /// The body, where it is there.
    #[napi(ts_type = "Uint8Array")]
    pub body: Option<Buffer>,
    /// Whether the body comes through `write`.
    pub streams_body: bool,
}

impl NativeRequest {
    fn read(self) -> Result<Request<()>> {
        let wrong = |field: &'static str| to_js(&invalid(field, "malformed", "as HTTP has it"));
        let mut headers = HeaderMap::new();
        for pair in self.headers.chunks_exact(2) {
            let name = HeaderName::from_bytes(pair[0].as_bytes()).map_err(|_| wrong("header"))?;
            let value = HeaderValue::from_bytes(pair[1].as_bytes()).map_err(|_| wrong("header"))?;
            headers.try_append(name, value).map_err(|_| wrong("header"))?;
        }
        let mut request = Request::new(());
        *request.method_mut() = self.method.parse().map_err(|_| wrong("method"))?;
        *request.uri_mut() = self.target.parse().map_err(|_| wrong("target"))?;
        *request.headers_mut() = headers;
        if let Some(address) = self.local_address.and_then(|address| address.parse::<IpAddr>().ok()) {
            request.extensions_mut().insert(LocalAddress(address));
        }
        Ok(request)
    }
}

/// A request on its way, and its answer. Dropping it cancels the request.
#[napi]
pub struct NativeExchange {
    asked: Rc<RefCell<Asked>>,
    /// Where the request's body goes; `None` when it was given, has ended or is not wanted.
    sender: Rc<RefCell<Option<BodySender>>>,
}

struct Asked {
    exchange: Exchange,
    /// Waits for the answer's next part.
    waiting: Option<Waker>,
}

#[napi]
impl NativeExchange {
    /// Calls `onHead` once with the answer's head: before this returns, if the body is not wanted or was given and nothing has to
    /// be waited for. `onHead` must not throw.
    #[napi(catch_unwind, ts_args_type = "onHead: (error: unknown, head: NativeHead | null) => void")]
    pub fn head(&self, env: &Env, on_head: Function<'_, FnArgs<(Option<NativeHead>,)>, ()>) -> Result<()> {
        let asked = Rc::clone(&self.asked);
        let poll = move |_: &Env, cx: &mut Context<'_>| {
            let head = asked.borrow_mut().poll(cx, Exchange::poll_head);
            head.map(|head| head.map(|head| (Some(NativeHead::from(head)),).into()).ok_or(Error::Cancelled))
        };
        callback(env, &on_head, poll).map_err(from_napi)
    }

    /// Calls `onPiece` once with the next piece of the answer's body, `null` after the last one; nothing is made before it is
    /// asked for. `onPiece` must not throw.
    #[napi(catch_unwind, ts_args_type = "onPiece: (error: unknown, piece: Uint8Array | null) => void")]
    pub fn read(&self, env: &Env, on_piece: Function<'_, FnArgs<(Option<Buffer>,)>, ()>) -> Result<()> {
        let asked = Rc::clone(&self.asked);
        let poll = move |_: &Env, cx: &mut Context<'_>| {
            let piece = asked.borrow_mut().poll(cx, Exchange::poll_piece);
            piece.map(|piece| Ok((piece.map(to_buffer),).into()))
        };
        callback(env, &on_piece, poll).map_err(from_napi)
    }

    /// Sends a piece of the request's body: whether more of it is wanted, when there is room for more.
    #[napi(catch_unwind)]
    pub fn write<'env>(&self, env: &'env Env, piece: Uint8ArraySlice) -> Result<PromiseRaw<'env, bool>> {
        let sender = Rc::clone(&self.sender);
        let mut piece = Some(Bytes::copy_from_slice(&piece));
        let poll = move |_: &Env, cx: &mut Context<'_>| match &*sender.borrow() {
            Some(sender) => sender.poll_send(cx, &mut piece).map(Ok),
            None => Poll::Ready(Ok(false)),
        };
        promise(env, poll).map_err(from_napi)
    }

    /// Says that the request's body was sent.
    #[napi(catch_unwind)]
    pub fn end(&self) {
        if let Some(sender) = self.sender.take() {
            sender.end();
        }
    }

    /// Cancels what was asked for; whoever waits for its answer is told.
    #[napi(catch_unwind)]
    pub fn cancel(&self) {
        self.sender.take();
        let mut asked = self.asked.borrow_mut();
        asked.exchange.cancel();
        let waiting = asked.waiting.take();
        drop(asked);
        if let Some(waker) = waiting {
            waker.wake();
        }
    }
}

impl Asked {
    fn poll<T>(
        &mut self,
        cx: &mut Context<'_>,
        poll: impl FnOnce(&mut Exchange, &mut Context<'_>) -> Poll<T>,
    ) -> Poll<T> {
        let polled = poll(&mut self.exchange, cx);
        self.waiting = polled.is_pending().then(|| cx.waker().clone());
        polled
    }
}

fn to_buffer(bytes: Bytes) -> Buffer {
    Buffer::from(Vec::from(bytes))
}

/// What an answer begins with.
#[napi(object, object_from_js = false)]
pub struct NativeHead {
    /// HTTP's status code.
    pub status: u16,
    /// Names and values in turn.
    pub headers: Vec<String>,
    /// What of the body was there at once.
    #[napi(ts_type = "Uint8Array")]
    pub piece: Option<Buffer>,
    /// Whether that is all of it.
    pub is_whole: bool,
}

impl From<Head> for NativeHead {
    fn from(head: Head) -> Self {
        let text = |value: &HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
        NativeHead {
            status: head.status,
            headers: head.headers.iter().flat_map(|(name, value)| [name.to_string(), text(value)]).collect(),
            piece: head.piece.map(to_buffer),
            is_whole: head.is_whole,
        }
    }
}

/// The options of a server from one plain object. What is not given is as for a server of its own, but for hosts: where
/// keys or the host's own rules keep strangers out, any name of the host is answered for.
fn read_server_options(object: &Object) -> Result<ServerOptions> {
    let fields = Fields::of(object, SERVER_FIELDS)?;
    let mut options = ServerOptions { timer: Some(Server::thread_timer()), ..ServerOptions::default() };
    let keys = fields.objects("apiKeys", MAX_NAMES, "an array of API keys")?;
    options.api_keys = keys.iter().map(read_api_key).collect::<Result<_>>()?;
    options.behind_auth = fields.boolean("behindAuth")?.unwrap_or(options.behind_auth);
    let hosts = fields.strings("allowedHosts", MAX_NAMES)?;
    if !hosts.is_empty() {
        options.allowed_hosts = hosts.iter().map(|host| host.to_ascii_lowercase()).collect();
    } else if options.behind_auth || !options.api_keys.is_empty() {
        options.allowed_hosts = vec!["*".to_string()];
    }
    options.cors_origins = fields.strings("corsOrigins", MAX_NAMES)?;
    for (name, switch) in [
        ("publicProbes", &mut options.public_probes),
        ("anyModel", &mut options.any_model),
        ("vllmMetricNames", &mut options.vllm_metric_names),
    ] {
        *switch = fields.boolean(name)?.unwrap_or(*switch);
    }
    for (name, size) in [
        ("maxBodyBytes", &mut options.max_body_bytes),
        ("maxRunningRequests", &mut options.max_running_requests),
        ("maxWaitingRequests", &mut options.max_waiting_requests),
    ] {
        *size = fields.integer(name)?.map_or(*size, as_usize);
    }
    for (name, time) in [
        ("bodyTimeoutMs", &mut options.body_timeout),
        ("stallTimeoutMs", &mut options.stall_timeout),
        ("pingIntervalMs", &mut options.ping_interval),
        ("requestTimeoutMs", &mut options.request_timeout),
    ] {
        *time = fields.integer(name)?.map_or(*time, Duration::from_millis);
    }
    Ok(options)
}

fn read_api_key(object: &Object) -> Result<ApiKey> {
    let fields = Fields::of(object, API_KEY_FIELDS)?;
    let secret = fields.string("secret")?.ok_or_else(|| to_js(&invalid("apiKeys[].secret", "missing", "a string")))?;
    let key = match fields.string("name")? {
        Some(name) => ApiKey::new(&name, &secret),
        None => ApiKey::unnamed(&secret),
    };
    let mut key = key.map_err(|error| invalid_server_options(&error))?;
    for (name, rate) in
        [("requestsPerMinute", &mut key.requests_per_minute), ("tokensPerMinute", &mut key.tokens_per_minute)]
    {
        *rate = fields.u32(name)?;
        if *rate == Some(0) {
            return Err(to_js(&invalid(name, "0", "at least 1")));
        }
    }
    key.best_priority = fields.named("bestPriority", Priority::from_name)?.unwrap_or(key.best_priority);
    key.is_admin = fields.boolean("admin")?.unwrap_or(key.is_admin);
    Ok(key)
}
