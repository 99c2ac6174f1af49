//! The response cache: whole answers, found again by everything that they depend on, and given without computing a token.
//! That is correct because of row invariance: the same request gives the same tokens, whatever else runs.
//!
//! Pure state: bytes by key in a budget, with time as an argument. No thread, clock, lock or file; those who share one
//! do it through [`Responses`](crate::Responses). It knows neither scheduler nor model: an entry is an encoded
//! [`CachedAnswer`], or a value that a caller keeps.
//!
//! What lies beyond the process ([`StoredEntry`]) is read and written by `response_tiers`.
//!
//! Not to be confused with the prefix cache (`kv_cache`), which holds keys and values of prompts, block by block.

mod answer;
mod key;
mod known;
mod record;
mod store;
mod ttl;

pub use answer::{CachedAnswer, CachedChoice, DecodeError};
pub use key::{KeyContext, ResponseKey, answer_key, mark_key, request_key, value_key};
pub use known::{KnownRequest, KnownRequests};
pub use record::{MAX_ENTRY_BYTES, StoredEntry, decode_mark, encode_mark};
pub use store::{Contents, EntryOptions, EntryUse, ResponseStore, Ticket};
pub use ttl::adaptive_ttl_ms;
