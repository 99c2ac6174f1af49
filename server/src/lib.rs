//! The HTTP face: OpenAI's routes, and what a server needs around them, over one or several [`ns_llm::Engine`]s. HTTP/1.1,
//! no TLS of its own. [`Server::router`] is a `tower` service that needs no socket and no runtime, so that another server
//! can mount it, with [`Server::ask`] for one that is no Rust; [`Server::serve`] listens by itself, on tokio (feature `listen`).
//!
//! ```no_run
//! use ns_llm::{Engine, EngineOptions};
//! use ns_llm_server::{Model, Server, ServerOptions};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let engine = Engine::open(EngineOptions::new("models/demo"))?;
//! let server = Server::new(vec![Model::new(engine)], ServerOptions::default())?;
//! let listener = server.bind("127.0.0.1:8080".parse()?)?;
//! let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
//! runtime.block_on(server.serve(listener, std::future::pending()))?;
//! # Ok(())
//! # }
//! ```
//!
//! Invariants: every route is behind the [`guard`], which knows the caller; a request whose client is gone is cancelled,
//! because its stream is dropped with its connection; nothing here blocks a connection's thread; everything that a client
//! can make grow is bounded in [`options`].

mod admission;
mod affinity;
mod api_document;
mod app;
mod bodies;
mod clock;
mod error;
mod event_body;
mod exchange;
mod fields;
mod generation;
mod gpu_watch;
mod guard;
mod health;
mod keys;
#[cfg(feature = "listen")]
mod listen;
mod messages;
mod metrics;
mod ns_node;
mod observe;
mod ollama;
mod openai;
pub mod options;
mod otlp;
mod page;
mod parameters;
mod patience;
mod query;
mod response;
mod routes;
mod side_thread;
mod stored;
mod text;
mod timer;
mod trace;

use std::sync::Arc;

use axum::Router;

pub use affinity::prefix_affinity;
use app::App;
pub use app::Model;
pub use axum::body::Bytes;
pub use axum::http;
pub use exchange::{BodySender, Exchange, Head};
pub use guard::LocalAddress;
pub use keys::ApiKey;
pub use options::{OptionsError, ServerOptions};

/// Engines behind HTTP routes. Cheap to clone.
#[derive(Clone)]
pub struct Server {
    app: Arc<App>,
    router: Router,
    /// Of all routes.
    paths: Arc<[&'static str]>,
}

impl Server {
    /// A server of `models`; the first one answers requests that name none.
    pub fn new(models: Vec<Model>, options: ServerOptions) -> Result<Server, OptionsError> {
        let app = Arc::new(App::new(models, options)?);
        let router = routes::router(&app);
        let paths = routes::table().into_iter().map(|route| route.path).collect();
        Ok(Server { app, router, paths })
    }

    /// All routes, as a service that takes requests and gives answers. It runs anywhere; where nothing sleeps for it (see
    /// [`ServerOptions::timer`]) it sends no pings.
    pub fn router(&self) -> Router {
        self.router.clone()
    }

    /// Method and path of every route; the files of the page at `/`, which need no key, are beside them.
    pub fn routes() -> Vec<(&'static str, &'static str)> {
        routes::table().into_iter().map(|route| (route.method, route.path)).collect()
    }

    /// The OpenAPI document of all routes, as `/openapi.json` gives it.
    pub fn api_document() -> serde_json::Value {
        api_document::document()
    }

    /// Whether there is a route at `path`, of any method: what a server that has other routes, too, asks first.
    pub fn has_path(&self, path: &str) -> bool {
        self.paths.iter().any(|pattern| routes::fits(pattern, path))
    }

    /// The limits and times that it keeps.
    pub fn options(&self) -> &ServerOptions {
        &self.app.options
    }

    /// Refuses new work from now on, with 503; what runs may finish.
    pub fn stop(&self) {
        self.app.stop();
    }

    /// Ends every request that runs.
    pub fn cancel_all(&self) {
        self.app.cancel_all();
    }

    /// A timer for [`ServerOptions::timer`] that needs no runtime: one thread for all timers of the process.
    pub fn thread_timer() -> Arc<dyn hyper::rt::Timer + Send + Sync> {
        Arc::new(timer::ThreadTimer)
    }
}

#[cfg(feature = "listen")]
impl Server {
    /// A listener at `address`, which must be a loopback one unless there are keys.
    pub fn bind(&self, address: std::net::SocketAddr) -> std::io::Result<std::net::TcpListener> {
        listen::bind(&self.app, address)
    }

    /// Answers connections, on a tokio runtime, until `stop` is ready; then lets running requests finish within
    /// [`ServerOptions::grace`], and refuses new ones.
    pub async fn serve(&self, listener: std::net::TcpListener, stop: impl Future<Output = ()>) -> std::io::Result<()> {
        listen::serve(&self.app, &self.router, listener, stop).await
    }

    /// A timer for [`ServerOptions::timer`], where a tokio runtime is.
    pub fn tokio_timer() -> Arc<dyn hyper::rt::Timer + Send + Sync> {
        Arc::new(hyper_util::rt::TokioTimer::new())
    }
}
