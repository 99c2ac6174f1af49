//! What a record is found by in any store.

/// Hash of what the bytes of a record mean: number format, shape, order, or the version of an encoding. A store holds bytes
/// and knows no more of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LayoutId(pub [u8; 32]);

/// What a record is found by. One content may be stored in several layouts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RecordKey {
    /// Hash of everything that the content depends on.
    pub content: [u8; 32],
    /// How it is written down.
    pub layout: LayoutId,
}
