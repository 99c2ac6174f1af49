//! Finds stop strings in text that arrives in pieces, and never lets out a part of one.
//!
//! The strings form one automaton (Aho & Corasick 1975): after each byte its state is the longest suffix of the text
//! that begins a stop string, which is exactly what must be held back. Time is linear in the text, whatever it is.
//!
//! Which match counts depends on the text alone, never on how it was cut: the one that ends first, and of several that
//! end there the longest. (Waiting for a match that began earlier but is not complete could wait for ever.)

use std::sync::Arc;

/// The stop strings of a request. Cheap to clone.
#[derive(Debug, Clone)]
pub struct StopStrings(Arc<Automaton>);

impl StopStrings {
    /// Empty strings are ignored ([`Request::validate`](crate::Request::validate) refuses them).
    pub fn new<S: AsRef<str>>(strings: &[S]) -> Self {
        StopStrings(Arc::new(Automaton::new(strings.iter().map(|string| string.as_ref().as_bytes()))))
    }
}

/// Matcher of one growing text.
#[derive(Debug, Clone)]
pub struct StopMatcher {
    strings: StopStrings,
    state: usize,
    /// The text that `state` stands for.
    held: String,
    stopped: bool,
}

impl StopMatcher {
    /// A matcher at the beginning of a text.
    pub fn new(strings: StopStrings) -> Self {
        StopMatcher { strings, state: ROOT, held: String::new(), stopped: false }
    }

    /// Appends to `out` what of the text so far cannot be part of a stop string any more. Returns whether one is
    /// complete; from then on nothing comes out.
    pub fn push(&mut self, piece: &str, out: &mut String) -> bool {
        if self.stopped {
            return true;
        }
        let automaton = &self.strings.0;
        self.held.push_str(piece);
        let start = self.held.len() - piece.len();
        for (idx, &byte) in piece.as_bytes().iter().enumerate() {
            self.state = automaton.next(self.state, byte);
            if let Some(match_bytes) = automaton.nodes[self.state].match_bytes {
                self.stopped = true;
                out.push_str(&self.held[..start + idx + 1 - match_bytes]);
                self.held.clear();
                return true;
            }
        }
        // A stop string begins with a whole character, so the text before one ends with one.
        let free = self.held.len() - automaton.nodes[self.state].depth;
        out.push_str(&self.held[..free]);
        self.held.drain(..free);
        false
    }

    /// Appends what was held back: the text is at its end, so it is no stop string.
    pub fn finish(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.held.clear();
        self.state = ROOT;
    }
}

const ROOT: usize = 0;

#[derive(Debug)]
struct Automaton {
    /// The first is the root. A state is an index.
    nodes: Vec<Node>,
}

/// A prefix of one or more stop strings.
#[derive(Debug, Default)]
struct Node {
    /// By the next byte, in ascending order.
    children: Vec<(u8, usize)>,
    /// The longest proper suffix of this prefix that is a node.
    fallback: usize,
    /// Length of this prefix, bytes.
    depth: usize,
    /// Length of the longest stop string that ends here.
    match_bytes: Option<usize>,
}

impl Node {
    fn child(&self, byte: u8) -> Option<usize> {
        self.children.binary_search_by_key(&byte, |&(byte, _)| byte).ok().map(|idx| self.children[idx].1)
    }
}

impl Automaton {
    fn new<'a>(strings: impl Iterator<Item = &'a [u8]>) -> Self {
        let mut automaton = Automaton { nodes: vec![Node::default()] };
        strings.filter(|string| !string.is_empty()).for_each(|string| automaton.insert(string));
        automaton.link();
        automaton
    }

    fn insert(&mut self, string: &[u8]) {
        let mut state = ROOT;
        for &byte in string {
            state = match self.nodes[state].children.binary_search_by_key(&byte, |&(byte, _)| byte) {
                Ok(idx) => self.nodes[state].children[idx].1,
                Err(idx) => {
                    let new = self.nodes.len();
                    self.nodes[state].children.insert(idx, (byte, new));
                    self.nodes.push(Node { depth: self.nodes[state].depth + 1, ..Node::default() });
                    new
                }
            };
        }
        self.nodes[state].match_bytes = Some(string.len());
    }

    /// Sets the fallbacks, the shorter prefixes first.
    fn link(&mut self) {
        let mut order: Vec<usize> = vec![ROOT];
        let mut next = 0;
        while next < order.len() {
            let parent = order[next];
            next += 1;
            for (byte, child) in self.nodes[parent].children.clone() {
                let fallback = if parent == ROOT { ROOT } else { self.next(self.nodes[parent].fallback, byte) };
                self.nodes[child].fallback = fallback;
                // What ends at the fallback ends here too, but is shorter than a string of this node's own.
                self.nodes[child].match_bytes = self.nodes[child].match_bytes.or(self.nodes[fallback].match_bytes);
                order.push(child);
            }
        }
    }

    fn next(&self, mut state: usize, byte: u8) -> usize {
        loop {
            if let Some(child) = self.nodes[state].child(byte) {
                return child;
            }
            if state == ROOT {
                return ROOT;
            }
            state = self.nodes[state].fallback;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampler::random_at;

    fn run(stops: &[&str], pieces: &[&str]) -> (String, bool, usize) {
        let mut matcher = StopMatcher::new(StopStrings::new(stops));
        let (mut out, mut held_most) = (String::new(), 0);
        for piece in pieces {
            if matcher.push(piece, &mut out) {
                return (out, true, held_most);
            }
            held_most = held_most.max(matcher.held.len());
        }
        matcher.finish(&mut out);
        (out, false, held_most)
    }

    /// Search in the whole text by the documented rule.
    fn naive(stops: &[&str], text: &str) -> (String, bool) {
        for end in (1..=text.len()).filter(|&end| text.is_char_boundary(end)) {
            let matches = stops.iter().filter(|stop| text[..end].ends_with(**stop));
            if let Some(longest) = matches.map(|stop| stop.len()).max() {
                return (text[..end - longest].to_string(), true);
            }
        }
        (text.to_string(), false)
    }

    /// On random texts over few characters, in random pieces, the matcher says what a search in the whole text says, and
    /// what it lets out before the end is a prefix of that.
    #[test]
    fn equals_a_search_in_the_whole_text() {
        const STOPS: [&[&str]; 6] =
            [&["ab"], &["aab", "ab", "b🙂"], &["abab", "bb", "é"], &["aaaa", "aaab"], &["🙂é", "é🙂a"], &[]];
        let (mut stopped, mut held) = (0, 0);
        for seed in 0..6_000u64 {
            let stops = STOPS[seed as usize % STOPS.len()];
            let chars: Vec<char> =
                (0..1 + seed % 17).map(|i| ['a', 'b', 'é', '🙂'][random_at(seed, i) as usize % 4]).collect();
            let text: String = chars.iter().collect();
            let pieces: Vec<String> =
                chars.chunks(1 + random_at(seed, 99) as usize % 4).map(|chunk| chunk.iter().collect()).collect();
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            let (out, was_stopped, held_most) = run(stops, &pieces);
            assert_eq!((out, was_stopped), naive(stops, &text), "{text:?}, stops {stops:?}, pieces {pieces:?}");
            stopped += usize::from(was_stopped);
            held += usize::from(held_most > 0);
        }
        assert!(stopped > 1_000 && held > 1_000, "{stopped} stopped, {held} held something back");
    }

    /// No part of a stop string comes out before it is clear that it is none, and then all of it does at once.
    #[test]
    fn parts_are_held_back() {
        let mut matcher = StopMatcher::new(StopStrings::new(&["\n\nUser:"]));
        let mut out = String::new();
        for (piece, expected) in
            [("Hi\n", "Hi"), ("\nUs", "Hi"), ("e", "Hi"), ("!", "Hi\n\nUse!"), ("\n", "Hi\n\nUse!")]
        {
            assert!(!matcher.push(piece, &mut out));
            assert_eq!(out, expected, "after {piece:?}");
        }
        assert!(matcher.push("\nUser: more", &mut out));
        assert!(matcher.push("and more", &mut out));
        matcher.finish(&mut out);
        assert_eq!(out, "Hi\n\nUse!");
    }

    /// The worst text for a naive matcher costs one visit per byte plus one per fallback: counted, not timed.
    #[test]
    fn work_is_linear() {
        let stop = format!("{}b", "a".repeat(255));
        let automaton = Automaton::new([stop.as_bytes()].into_iter());
        let (mut state, mut visits) = (ROOT, 0usize);
        for _ in 0..1 << 16 {
            let before = automaton.nodes[state].depth;
            state = automaton.next(state, b'a');
            visits += 1 + (before + 1 - automaton.nodes[state].depth);
        }
        assert!(visits < 3 << 16, "{visits} visits");
    }
}
