//! Engine errors as JavaScript errors: one function, so that each error has the same `code` in Rust, C and JavaScript.
//! Field names are written as JavaScript writes them (`maxTokens`, not `max_tokens`).

use napi::Status;
use ns_llm::Error;
use ns_llm_server::OptionsError;

/// Result of every function that JavaScript calls.
pub(crate) type Result<T> = std::result::Result<T, napi::Error<Code>>;

/// The `code` of a JavaScript error: one of [`Error::code`].
pub struct Code(&'static str);

impl AsRef<str> for Code {
    fn as_ref(&self) -> &str {
        self.0
    }
}

impl From<Status> for Code {
    /// A value of another type than the generated glue expects is the caller's fault; all else is ours.
    fn from(status: Status) -> Self {
        let expected = status.as_ref().ends_with("Expected");
        Code(if expected || status == Status::InvalidArg { "invalid_argument" } else { "internal" })
    }
}

/// The one way from an error of the engine to an error of JavaScript.
pub(crate) fn to_js(error: &Error) -> napi::Error<Code> {
    let message = match error {
        Error::InvalidArgument { field, value, expected } => {
            format!("{} is {value}, must be {expected}", camel_case(field))
        }
        other => other.to_string(),
    };
    napi::Error::new(Code(error.code()), message)
}

/// A server that cannot be made like this.
pub(crate) fn invalid_server_options(error: &OptionsError) -> napi::Error<Code> {
    let message = match error {
        OptionsError::OutOfRange { field, value, expected } => {
            // Times are durations there and milliseconds here.
            let unit = if field.ends_with("timeout") || field.ends_with("interval") { "_ms" } else { "" };
            format!("{} is {value}, must be {expected}", camel_case(&format!("{field}{unit}")))
        }
        other => other.to_string(),
    };
    napi::Error::new(Code("invalid_argument"), message)
}

/// Carries an error of the JavaScript interface itself (such as an exception thrown by a getter) outwards.
pub(crate) fn from_napi(error: napi::Error) -> napi::Error<Code> {
    napi::Error::new(Code::from(error.status), error.reason.clone())
}

/// A field that has another type, or another form, than it must have.
pub(crate) fn invalid(field: &'static str, value: impl Into<String>, expected: &str) -> Error {
    Error::InvalidArgument { field, value: value.into(), expected: expected.to_string() }
}

/// `max_tokens` becomes `maxTokens`; words after a space, such as units in brackets, stay.
fn camel_case(field: &str) -> String {
    let mut name = String::with_capacity(field.len());
    let mut upper = false;
    for c in field.chars() {
        match c {
            '_' => upper = true,
            _ if upper => {
                name.extend(c.to_uppercase());
                upper = false;
            }
            _ => name.push(c),
        }
    }
    name
}
