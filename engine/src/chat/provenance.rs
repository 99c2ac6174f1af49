//! Marks that tell, in a rendered prompt, what came from a message: private-use characters that occur in no message.

use std::ops::Range;

use crate::request::Message;

/// Where to look for unused characters: the supplementary private use areas.
const PRIVATE_USE: [std::ops::RangeInclusive<char>; 2] = ['\u{F0000}'..='\u{FFFFD}', '\u{100000}'..='\u{10FFFD}'];

/// Two characters that no message holds.
#[derive(Debug, Clone, Copy)]
pub(super) struct Marks {
    start: char,
    end: char,
}

impl Marks {
    /// `None` when messages hold (nearly) all of them.
    pub(super) fn unused_in(messages: &[Message]) -> Option<Self> {
        let is_private = |c: &char| *c >= '\u{F0000}';
        let used: std::collections::HashSet<char> =
            messages.iter().flat_map(|message| message.content.chars().filter(is_private)).collect();
        let mut unused = PRIVATE_USE.into_iter().flatten().filter(|c| !used.contains(c));
        Some(Marks { start: unused.next()?, end: unused.next()? })
    }

    /// Each content between two marks. Space at its ends stays outside: templates trim it.
    pub(super) fn wrap(&self, messages: &[Message]) -> Vec<Message> {
        map_content(messages, |content| {
            let core = trimmed(content);
            if core.is_empty() {
                return content.to_string();
            }
            let Range { start, end } = core;
            [&content[..start], self.start.encode_utf8(&mut [0; 4]), &content[start..end]].concat()
                + self.end.encode_utf8(&mut [0; 4])
                + &content[end..]
        })
    }

    /// The ranges of `text` that are between marks in `marked`; `None` unless `marked` is `text` with marks in pairs.
    pub(super) fn ranges(&self, marked: &str, text: &str) -> Option<Vec<Range<usize>>> {
        let (mut ranges, mut open, mut plain) = (Vec::new(), None, 0);
        for c in marked.chars() {
            if c == self.start {
                if open.replace(plain).is_some() {
                    return None;
                }
            } else if c == self.end {
                ranges.push(open.take()?..plain);
            } else {
                plain += c.len_utf8();
            }
        }
        let same = marked.chars().filter(|&c| c != self.start && c != self.end).eq(text.chars());
        (same && open.is_none()).then_some(ranges)
    }

    /// Each content with a mark behind the first character of every text of a special token, and at an end that could
    /// be part of one together with what the template puts beside it.
    pub(super) fn break_tokens(&self, messages: &[Message], tokens: &[String]) -> Vec<Message> {
        map_content(messages, |content| {
            let mut marked = String::with_capacity(content.len());
            let mut done = 0;
            for place in places_to_break(content, tokens) {
                marked.push_str(&content[done..place]);
                marked.push(self.start);
                done = place;
            }
            marked + &content[done..]
        })
    }

    /// The text without marks, and their places in it as empty ranges.
    pub(super) fn places(&self, marked: &str) -> (String, Vec<Range<usize>>) {
        let (mut text, mut places) = (String::with_capacity(marked.len()), Vec::new());
        for c in marked.chars() {
            if c == self.start {
                places.push(text.len()..text.len());
            } else {
                text.push(c);
            }
        }
        places.dedup();
        (text, places)
    }
}

fn map_content(messages: &[Message], map: impl Fn(&str) -> String) -> Vec<Message> {
    messages.iter().map(|message| Message { role: message.role.clone(), content: map(&message.content) }).collect()
}

/// The range of `content` without whitespace at its ends.
fn trimmed(content: &str) -> Range<usize> {
    let end = content.trim_end().len();
    let start = end - content[..end].trim_start().len();
    start..end
}

/// In ascending order, each once.
fn places_to_break(content: &str, tokens: &[String]) -> Vec<usize> {
    let core = trimmed(content);
    let mut places = Vec::new();
    for token in tokens {
        let first_bytes = token.chars().next().map_or(0, char::len_utf8);
        // Occurrences may overlap, so each search goes on behind the first character of the last one.
        let mut from = 0;
        while let Some(at) = content[from..].find(token.as_str()) {
            from += at + first_bytes;
            places.push(from);
        }
        let inner = token.char_indices().map(|(at, _)| at).skip(1);
        for at in inner {
            if content[core.clone()].ends_with(&token[..at]) {
                places.push(core.end);
            }
            if content[core.clone()].starts_with(&token[at..]) {
                places.push(core.start);
            }
        }
        if !core.is_empty() && token.contains(&content[core.clone()]) {
            places.extend([core.start, core.end]);
        }
    }
    places.sort_unstable();
    places.dedup();
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(content: &str) -> Message {
        Message::new("user", content)
    }

    /// Marks are characters that no message holds, also when the first ones are taken.
    #[test]
    fn marks_are_unused() {
        let marks = Marks::unused_in(&[message("\u{F0000}a\u{F0002}")]).unwrap();
        assert_eq!((marks.start, marks.end), ('\u{F0001}', '\u{F0003}'));
        let all: String = PRIVATE_USE.into_iter().flatten().collect();
        assert!(Marks::unused_in(&[message(&all)]).is_none());
    }

    /// Ranges are those between the marks, without them; a lost mark or another text gives none.
    #[test]
    fn ranges_need_paired_marks_and_the_same_text() {
        let marks = Marks::unused_in(&[]).unwrap();
        let wrapped = marks.wrap(&[message(" hé\n"), message(" \n")]);
        assert_eq!(wrapped[1].content, " \n");
        let rendered = format!("[{}]{}", wrapped[0].content, wrapped[0].content);
        assert_eq!(marks.ranges(&rendered, "[ hé\n] hé\n"), Some(vec![2..5, 8..11]));
        assert_eq!(marks.ranges(&rendered, "[ hé\n] he\n"), None);
        assert_eq!(marks.ranges(&rendered.replacen(marks.end, "", 1), "[ hé\n] hé\n"), None);
        assert_eq!(marks.ranges(&rendered.replacen(marks.start, "", 1), "[ hé\n] hé\n"), None);
    }

    /// Every whole token is broken, overlapping ones too, and every end that could complete or begin one.
    #[test]
    fn whatever_could_be_a_token_is_broken() {
        let tokens = ["<|x|>".to_string(), "||".to_string()];
        for (content, expected) in [
            ("a<|x|>b", vec![2]),
            ("|||", vec![0, 1, 2, 3]),
            ("end <", vec![5]),
            (" >quote", vec![1]),
            ("x", vec![0, 1]),
            ("", vec![]),
            ("plain é", vec![]),
        ] {
            assert_eq!(places_to_break(content, &tokens), expected, "{content:?}");
        }
    }
}
