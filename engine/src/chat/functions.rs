//! What templates expect of their surroundings beside the language itself: the functions and filters that transformers
//! gives them, with Python's spelling of JSON and of dates.

use minijinja::value::{Kwargs, Value};
use minijinja::{Environment, Error, ErrorKind};
use serde::Serialize;
use serde_json::ser::{CompactFormatter, Formatter, PrettyFormatter, Serializer};

/// Deepest indentation per level of `tojson`, spaces: more only makes an answer long.
const MAX_INDENT: usize = 16;

/// Registers what does not depend on a request.
pub(super) fn register(environment: &mut Environment<'static>) {
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", raise_exception);
    environment.add_filter("tojson", to_json);
}

/// The function `strftime_now`, for a clock that stands at `unix_seconds` (UTC).
pub(super) fn strftime_now(unix_seconds: i64) -> Value {
    Value::from_function(move |format: &str| strftime(format, unix_seconds))
}

fn raise_exception(message: &str) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message.to_string()))
}

/// `json.dumps` with `ensure_ascii=False`: nothing is escaped for HTML, as the language's own filter would do.
fn to_json(value: &Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    for ignored in ["ensure_ascii", "separators", "sort_keys"] {
        let _: Option<Value> = options.get(ignored)?;
    }
    options.assert_all_used()?;
    let json = match indent {
        None => serialize(value, PythonFormatter),
        Some(indent) if indent <= MAX_INDENT => serialize(value, PrettyFormatter::with_indent(&b" ".repeat(indent))),
        Some(indent) => {
            let reason = format!("tojson: indent is {indent}, must be at most {MAX_INDENT}");
            return Err(Error::new(ErrorKind::InvalidOperation, reason));
        }
    };
    let json = json.map_err(|e| Error::new(ErrorKind::BadSerialization, format!("tojson: {e}")))?;
    Ok(Value::from_safe_string(json))
}

fn serialize(value: &Value, formatter: impl Formatter) -> Result<String, serde_json::Error> {
    let mut json = Vec::new();
    value.serialize(&mut Serializer::with_formatter(&mut json, formatter))?;
    Ok(String::from_utf8(json).expect("JSON is written as UTF-8"))
}

/// JSON as Python writes it on one line: with a space behind each comma and colon.
struct PythonFormatter;

impl Formatter for PythonFormatter {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }
    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }
    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        CompactFormatter.begin_object_value(writer)?;
        writer.write_all(b" ")
    }
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];

/// The conversions of C's `strftime` that prompts use, in English.
fn strftime(format: &str, unix_seconds: i64) -> Result<String, Error> {
    let days = unix_seconds.div_euclid(86_400);
    let seconds = unix_seconds.rem_euclid(86_400);
    let (year, month, day) = civil_from_days(days);
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    let month_name = MONTHS[month as usize - 1];
    // Day 0 was a Thursday.
    let weekday = WEEKDAYS[(days + 3).rem_euclid(7) as usize];
    let hour_of_12 = (hour + 11) % 12 + 1;
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let conversion = chars.next();
        let (unpadded, conversion) = if conversion == Some('-') { (true, chars.next()) } else { (false, conversion) };
        let two_digits = |n: i64| if unpadded { n.to_string() } else { format!("{n:02}") };
        out.push_str(&match conversion {
            Some('Y') => year.to_string(),
            Some('y') => two_digits(year.rem_euclid(100)),
            Some('m') => two_digits(month),
            Some('d') => two_digits(day),
            Some('e') => format!("{day:2}"),
            Some('H') => two_digits(hour),
            Some('I') => two_digits(hour_of_12),
            Some('M') => two_digits(minute),
            Some('S') => two_digits(second),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.to_string(),
            Some('B') => month_name.to_string(),
            Some('b') => month_name[..3].to_string(),
            Some('A') => weekday.to_string(),
            Some('a') => weekday[..3].to_string(),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('T') => format!("{hour:02}:{minute:02}:{second:02}"),
            Some('Z') => "UTC".to_string(),
            Some('%') => "%".to_string(),
            other => {
                let other: String = other.into_iter().collect();
                return Err(Error::new(ErrorKind::InvalidOperation, format!("strftime_now: %{other} is not known")));
            }
        });
    }
    Ok(out)
}

/// Year, month and day of the Gregorian calendar, `days` after 1970-01-01 (Hinnant 2013, "chrono-compatible low-level
/// date algorithms"): years begin in March there, so that the leap day is the last.
fn civil_from_days(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Dates around leap days, the epoch and midnight are written as Python's `datetime.strftime` writes them.
    #[test]
    fn dates_are_those_of_python() {
        for (unix_seconds, format, expected) in [
            (0, "%A %d %B %Y %H:%M:%S", "Thursday 01 January 1970 00:00:00"),
            (951_782_399, "%a %d %b %y %I:%M %p", "Mon 28 Feb 00 11:59 PM"),
            (951_782_400, "%F %T", "2000-02-29 00:00:00"),
            (1_722_038_400, "%d %b %Y %%", "27 Jul 2024 %"),
            (4_107_542_400, "%-d.%-m.%Y|%e", "1.3.2100| 1"),
            (-1, "%Y-%m-%d %H %I %Z", "1969-12-31 23 11 UTC"),
        ] {
            assert_eq!(strftime(format, unix_seconds).unwrap(), expected);
        }
        assert!(strftime("%Q", 0).unwrap_err().to_string().contains("%Q"));
    }
}
