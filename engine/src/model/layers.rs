//! What the architectures share: the decoder around their layers, and the rotary table.

pub mod decoder;
pub mod rope;
