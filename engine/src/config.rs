//! Every limit and every default of the engine, each with its unit, its reason and what happens beyond it (`DEFAULT_*` is what
//! is taken when nobody says otherwise, `MAX_*` and `MIN_*` are what may be asked for); and the options with which an engine
//! is opened. A value is checked once, where it enters, and is immutable afterwards.

mod forms;
mod limits;
mod options;
mod ranges;

pub use forms::{AUTO_WEIGHT_FORMATS, Device, KvDtype, KvTierEncoding, WeightFormat};
pub use limits::*;
pub use options::{
    EngineOptions, KvRemoteOptions, LoadProgress, ProgressCallback, ResponseCacheOptions, ThreadPriority,
};
pub(crate) use ranges::{at_most, in_range, invalid};
