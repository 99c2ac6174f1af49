//! Where records outlive the process: files of a directory ([`disk`]), and a store that nodes share ([`remote`]). A record is
//! bytes under a [`RecordKey`]; what they mean is known above: KV blocks, and answers. A store forgets, but never lies: what it
//! gives is what was stored under that key, and a [`Fault`] is a miss.
//!
//! The parts: [`disk::DiskStore`] and [`remote::ValueStore`] do; [`Breaker`] leaves alone what keeps failing, [`Unstored`]
//! remembers what was to be stored and is not. The stores alone know files, sockets and clocks; the rest is plain state.

pub mod breaker;
pub mod disk;
mod fault;
mod key;
pub mod remote;
mod tier;
mod unstored;

pub use breaker::Breaker;
pub use fault::{Damage, Fault};
pub use key::{LayoutId, RecordKey};
pub use tier::{TierId, TierStats};
pub use unstored::Unstored;
