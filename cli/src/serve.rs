//! `ns-llm serve`: the model behind HTTP routes, until the process is told to end.

use std::future::poll_fn;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use clap::Args;
use ns_llm::config::MAX_RUNNING_SEQUENCES;
use ns_llm_server::{ApiKey, Model, Server, ServerOptions};

use crate::CommandResult;
use crate::model::{ModelOptions, open};
use crate::trace::TraceOptions;

/// Exit status of a process that was told twice to end, as shells have it.
const INTERRUPTED: i32 = 130;

#[derive(Args)]
pub(crate) struct Options {
    #[command(flatten)]
    model: ModelOptions,
    /// Address to listen at; one that others can reach needs an API key
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    host: IpAddr,
    /// Port to listen at (0: any that is free)
    #[arg(long, value_name = "PORT", default_value_t = 8080)]
    port: u16,
    /// A key that callers must have (may be repeated). Other users of the machine can see a command line: better give it in
    /// the environment variable NS_LLM_API_KEY, or in a file
    #[arg(long, value_name = "SECRET")]
    api_key: Vec<String>,
    /// Keys from a file: lines of NAME SECRET, then requests_per_minute=N, tokens_per_minute=N, priority=high|normal|background,
    /// admin (may empty the caches, forget what was measured, and record traces, as keys given otherwise may)
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// Name of the model in lists and answers (default: that of its folder or file)
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Another name by which the model may be asked for (may be repeated)
    #[arg(long, value_name = "NAME")]
    alias: Vec<String>,
    /// Take any model name for this one
    #[arg(long)]
    any_model: bool,
    /// A host name by which the server is reached (may be repeated; "*": any)
    #[arg(long, value_name = "NAME")]
    allowed_host: Vec<String>,
    /// Origin of web pages that may ask, such as https://app.example (may be repeated)
    #[arg(long, value_name = "ORIGIN")]
    cors_origin: Vec<String>,
    /// Let /health and /ready be asked without a key
    #[arg(long)]
    public_probes: bool,
    /// Serve no page at /
    #[arg(long)]
    no_page: bool,
    /// Call metrics as vLLM calls its own
    #[arg(long)]
    vllm_metric_names: bool,
    /// Let callers record what the engine does, at /trace: they see how long all requests are
    #[arg(long)]
    trace_route: bool,
    /// OpenTelemetry collector that gets a trace of each request, such as http://127.0.0.1:4318
    #[arg(long, value_name = "URL")]
    otlp_endpoint: Option<String>,
    #[command(flatten)]
    trace: TraceOptions,
    /// Longest body of a request (MiB)
    #[arg(long, value_name = "MIB", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=1024))]
    max_body_mib: u16,
    /// Connections at once
    #[arg(long, value_name = "N", default_value_t = ns_llm_server::options::MAX_CONNECTIONS)]
    max_connections: usize,
    /// Requests that the engine is given at once; more wait in turn
    #[arg(long, value_name = "N", default_value_t = ns_llm_server::options::MAX_RUNNING_REQUESTS)]
    max_running: usize,
    /// Requests that may wait; more are refused
    #[arg(long, value_name = "N", default_value_t = ns_llm_server::options::MAX_WAITING_REQUESTS)]
    max_waiting: usize,
    /// Longest time of a request, waiting and answering (seconds)
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    request_timeout: u64,
    /// Time that running requests get to finish in when the server is told to end (seconds)
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    grace: u64,
}

pub(crate) fn run(options: Options) -> CommandResult {
    let address = SocketAddr::new(options.host, options.port);
    let server_options = server_options(&options)?;
    // Before the model is loaded, which takes its time.
    server_options.check_address(address.ip())?;
    let mut engine_options = options.model.engine_options()?;
    // What it is given at once is computed at once.
    let given = options.max_running.min(MAX_RUNNING_SEQUENCES);
    engine_options.max_running_sequences = engine_options.max_running_sequences.max(given);
    let engine = open(engine_options)?;
    options.trace.start(&engine)?;
    let name = options.name.unwrap_or_else(|| engine.info().name.clone());
    let server = Server::new(vec![Model { engine: (*engine).clone(), name, aliases: options.alias }], server_options)?;
    let listener = server.bind(address)?;
    let (info, address) = (engine.info(), listener.local_addr()?);
    eprintln!("{} on {} ({}), listening at http://{address}", info.name, info.device_name, info.isa);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let served = runtime.block_on(async { server.serve(listener, told_to_end()?).await });
    let traced = options.trace.finish(&engine);
    served?;
    traced?;
    Ok(())
}

fn server_options(options: &Options) -> Result<ServerOptions, Box<dyn std::error::Error>> {
    let mut server = ServerOptions::default();
    let in_environment = std::env::var("NS_LLM_API_KEY").ok().filter(|secret| !secret.is_empty());
    let secrets = options.api_key.iter().chain(&in_environment);
    // Who starts the server is its operator.
    server.api_keys = secrets.map(|secret| ApiKey::unnamed(secret)).collect::<Result<_, _>>()?;
    server.api_keys.iter_mut().for_each(|key| key.is_admin = true);
    if let Some(path) = &options.api_key_file {
        let text = std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
        server.api_keys.extend(ApiKey::parse_file(&text).map_err(|error| format!("{}: {error}", path.display()))?);
    }
    server.allowed_hosts.extend(options.allowed_host.iter().map(|host| host.to_ascii_lowercase()));
    if !options.host.is_unspecified() {
        server.allowed_hosts.push(match options.host {
            IpAddr::V4(address) => address.to_string(),
            IpAddr::V6(address) => format!("[{address}]"),
        });
    }
    server.cors_origins = options.cors_origin.clone();
    server.public_probes = options.public_probes;
    server.any_model = options.any_model;
    server.vllm_metric_names = options.vllm_metric_names;
    server.trace_route = options.trace_route;
    server.otlp_endpoint = options.otlp_endpoint.clone();
    server.page = !options.no_page;
    server.max_body_bytes = usize::from(options.max_body_mib) << 20;
    server.max_connections = options.max_connections;
    server.max_running_requests = options.max_running;
    server.max_waiting_requests = options.max_waiting;
    server.request_timeout = Duration::from_secs(options.request_timeout);
    server.grace = Duration::from_secs(options.grace);
    server.log = Some(Arc::new(|line: &str| eprintln!("{line}")));
    server.timer = Some(Server::tokio_timer());
    Ok(server)
}

/// Ready when the process gets SIGTERM or is interrupted. From then on a second one ends the process at once.
fn told_to_end() -> std::io::Result<impl Future<Output = ()>> {
    let told = signalled()?;
    Ok(async move {
        told.await;
        // A thread of its own: the other one may be busy with the end when the second comes.
        let waiting = std::thread::Builder::new().name("ns-llm-signals".to_string());
        if let Err(error) = waiting.spawn(end_at_once_when_told) {
            eprintln!("a second signal will not end the process at once: {error}");
        }
    })
}

fn end_at_once_when_told() {
    let told = || -> std::io::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            signalled()?.await;
            Ok(())
        })
    };
    match told() {
        Ok(()) => std::process::exit(INTERRUPTED),
        Err(error) => eprintln!("a second signal will not end the process at once: {error}"),
    }
}

/// Ready with the next SIGTERM or interrupt.
#[cfg(unix)]
fn signalled() -> std::io::Result<impl Future<Output = ()>> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    Ok(poll_fn(move |cx| {
        let is_told = terminate.poll_recv(cx).is_ready() || interrupt.poll_recv(cx).is_ready();
        if is_told { Poll::Ready(()) } else { Poll::Pending }
    }))
}

#[cfg(not(unix))]
fn signalled() -> std::io::Result<impl Future<Output = ()>> {
    Ok(async {
        let _ = tokio::signal::ctrl_c().await;
    })
}
