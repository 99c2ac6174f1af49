//! Which answer a request asks for, where an equal one has come before: an answer that is kept is then found by what the
//! request says, without its prompt being rendered and encoded again.

use std::num::NonZero;

use lru::LruCache;

use super::key::ResponseKey;
use crate::config::MAX_KNOWN_REQUESTS;

/// What is known of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KnownRequest {
    /// The answer it asks for.
    pub answer: ResponseKey,
    /// Of its prompt, rendered and encoded.
    pub prompt_tokens: usize,
}

/// The latest [`MAX_KNOWN_REQUESTS`] requests by their [`request_key`](super::request_key). What it says stays true: of an
/// answer that is not kept any more, too.
#[derive(Debug)]
pub struct KnownRequests(LruCache<ResponseKey, KnownRequest>);

impl Default for KnownRequests {
    fn default() -> Self {
        KnownRequests(LruCache::new(NonZero::new(MAX_KNOWN_REQUESTS).expect("not 0")))
    }
}

impl KnownRequests {
    /// What is known of the request of that key.
    pub fn get(&mut self, request: &ResponseKey) -> Option<KnownRequest> {
        self.0.get(request).copied()
    }
    /// The request of that key was rendered and encoded.
    pub fn learn(&mut self, request: ResponseKey, known: KnownRequest) {
        self.0.put(request, known);
    }
}
