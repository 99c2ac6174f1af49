//! Reference of every operation, written for the eye: the portable path, and the oracle of all tests.

pub(crate) mod attention;
pub(crate) mod linear;
pub(crate) mod logits;
pub(crate) mod math;
pub(crate) mod norm;
pub(crate) mod rope;
