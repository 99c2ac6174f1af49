//! Spans posted to their collector, by who has a runtime.

use std::sync::atomic::Ordering;

use axum::body::{Body, to_bytes};
use axum::http::header::{CONTENT_TYPE, HOST};
use axum::http::{HeaderValue, Request};
use hyper::client::conn::http1::handshake;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;

use super::{Exporter, export_request};
use crate::options::{OTLP_INTERVAL, OTLP_TIMEOUT};

impl Exporter {
    /// Sends what there is, now and then, for ever.
    pub(crate) async fn run(&self) {
        loop {
            tokio::time::sleep(OTLP_INTERVAL).await;
            self.flush().await;
        }
    }

    /// Sends what there is.
    pub(crate) async fn flush(&self) {
        let spans: Vec<Value> = self.lock().drain(..).collect();
        if spans.is_empty() {
            return;
        }
        let num = spans.len() as u64;
        let sent = tokio::time::timeout(OTLP_TIMEOUT, self.post(export_request(&spans).to_string())).await;
        let counter = if sent == Ok(Some(())) { &self.num_sent } else { &self.num_dropped };
        counter.fetch_add(num, Ordering::Relaxed);
    }

    /// Nothing when it was not taken, whatever the reason.
    async fn post(&self, body: String) -> Option<()> {
        let stream = TcpStream::connect(&self.authority).await.ok()?;
        let (mut sender, connection) = handshake::<_, Body>(TokioIo::new(stream)).await.ok()?;
        tokio::spawn(connection);
        let request = Request::post(&self.path)
            .header(HOST, &self.authority)
            .header(CONTENT_TYPE, HeaderValue::from_static("application/json"))
            .body(Body::from(body))
            .ok()?;
        let response = sender.send_request(request).await.ok()?;
        let status = response.status();
        // Read to its end, so that the collector is not cut off; what it says beside its status is of no use here.
        to_bytes(Body::new(response.into_body()), 64 << 10).await.ok()?;
        status.is_success().then_some(())
    }
}
