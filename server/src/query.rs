//! What stands after the question mark of a request's address.

use axum::http::Uri;

/// The value of `name`, decoded, if it is given: the last one, as ns-node reads it. Bytes that are not UTF-8 become U+FFFD.
pub(crate) fn value(uri: &Uri, name: &str) -> Option<String> {
    let pairs = uri.query()?.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    let mut values = pairs.filter(|(key, _)| decoded(key) == name).map(|(_, value)| decoded(value));
    values.next_back()
}

/// The number above 0 that `name` has, if it has one.
pub(crate) fn number(uri: &Uri, name: &str) -> Option<f64> {
    value(uri, name)?.parse().ok().filter(|number: &f64| number.is_finite() && *number > 0.0)
}

/// As forms are written: a plus is a blank, and a percent sign before two hexadecimal digits is a byte.
fn decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        rest = after;
        match (first, after) {
            (b'+', _) => bytes.push(b' '),
            (b'%', &[high, low, ref after @ ..]) if high.is_ascii_hexdigit() && low.is_ascii_hexdigit() => {
                bytes.push(nibble(high) << 4 | nibble(low));
                rest = after;
            }
            _ => bytes.push(first),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn nibble(digit: u8) -> u8 {
    match digit {
        b'0'..=b'9' => digit - b'0',
        _ => digit.to_ascii_lowercase() - b'a' + 10,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Names and values are decoded; the last of a name counts; what is no escape stays as it is.
    #[test]
    fn values_are_decoded() {
        let uri: Uri =
            "/trace?model=a&x&mod%65l=Qwen%2f3+0.6b%C3%a9&half=%4&none=%zz&seconds=1e1".parse().expect("valid");
        assert_eq!(value(&uri, "model").as_deref(), Some("Qwen/3 0.6b\u{e9}"));
        assert_eq!([value(&uri, "x"), value(&uri, "y")], [Some(String::new()), None]);
        assert_eq!([value(&uri, "half"), value(&uri, "none")].map(Option::unwrap), ["%4", "%zz"]);
        assert_eq!((number(&uri, "seconds"), number(&uri, "model")), (Some(10.0), None));
        let none: Uri = "/trace".parse().expect("valid");
        assert_eq!(value(&none, "model"), None);
    }
}
