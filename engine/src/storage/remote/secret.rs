//! What nodes that share a store know and the store does not.

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

/// What nodes know and the store does not. Not shown by `Debug`.
#[derive(Clone)]
pub(super) struct Secret(Vec<u8>);

impl Secret {
    /// Of any length.
    pub(super) fn new(bytes: &[u8]) -> Self {
        Secret(bytes.to_vec())
    }

    /// Keyed hash of `parts`, which follow one another without a mark: the first ends with a zero byte, all others but the
    /// last have a fixed length.
    pub(super) fn code(&self, parts: &[&[u8]]) -> Hmac<Sha256> {
        let mut code = Hmac::<Sha256>::new_from_slice(&self.0).expect("a key of any length will do");
        parts.iter().for_each(|part| code.update(part));
        code
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(not shown)")
    }
}
