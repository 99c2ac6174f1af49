//! How a value outside its range is refused: by its name, with what it is and what it may be.

use std::fmt::Display;

use crate::error::{Error, Result};

/// A value that is none of those that are `expected`.
pub(crate) fn invalid(field: &'static str, value: impl Display, expected: String) -> Error {
    Error::InvalidArgument { field, value: value.to_string(), expected }
}

/// Fails unless the value is within both bounds. What is no number is not.
pub(crate) fn in_range<T: PartialOrd + Display + Copy>(field: &'static str, value: T, min: T, max: T) -> Result<()> {
    if (min..=max).contains(&value) { Ok(()) } else { Err(invalid(field, value, format!("{min} to {max}"))) }
}

/// Fails when the value is larger.
pub(crate) fn at_most<T: PartialOrd + Display>(field: &'static str, value: T, max: T) -> Result<()> {
    if value > max { Err(invalid(field, value, format!("at most {max}"))) } else { Ok(()) }
}
