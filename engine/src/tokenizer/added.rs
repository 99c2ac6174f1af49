//! Finds added tokens (control tokens and other fixed texts that never reach the model's splitting) in a text, with a
//! say in which of the special ones count: those that a chat template wrote do, those that a user typed do not.
//!
//! The leftmost occurrence wins, of several there the longest that counts. Linear in the text for a given vocabulary.

use std::ops::Range;

use tokenizers::AddedToken;

/// The added tokens of a vocabulary.
#[derive(Debug)]
pub(super) struct AddedTokens {
    tokens: Vec<(u32, AddedToken)>,
    /// By the first byte of their text: indices into `tokens`, longest first.
    by_first_byte: Vec<Vec<usize>>,
}

/// An added token in a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) token_id: u32,
    /// Its bytes, and whitespace that it takes along.
    pub(super) range: Range<usize>,
}

impl AddedTokens {
    pub(super) fn new(tokens: impl IntoIterator<Item = (u32, AddedToken)>) -> Self {
        let mut tokens: Vec<_> = tokens.into_iter().filter(|(_, token)| !token.content.is_empty()).collect();
        tokens.sort_by(|(a_id, a), (b_id, b)| (b.content.len(), a_id).cmp(&(a.content.len(), b_id)));
        let mut by_first_byte = vec![Vec::new(); 256];
        for (idx, (_, token)) in tokens.iter().enumerate() {
            by_first_byte[usize::from(token.content.as_bytes()[0])].push(idx);
        }
        AddedTokens { tokens, by_first_byte }
    }

    pub(super) fn special(&self) -> impl Iterator<Item = (u32, &str)> {
        self.tokens.iter().filter(|(_, token)| token.special).map(|(id, token)| (*id, token.content.as_str()))
    }

    /// All occurrences that count, in the order of the text: of tokens that are not special, and of special ones where
    /// `special_counts` says so of their bytes.
    pub(super) fn find(&self, text: &str, special_counts: impl Fn(Range<usize>) -> bool) -> Vec<Found> {
        let mut found: Vec<Found> = Vec::new();
        let (mut at, mut free_from) = (0, 0);
        while at < text.len() {
            let candidates = &self.by_first_byte[usize::from(text.as_bytes()[at])];
            let hit = candidates.iter().map(|&idx| &self.tokens[idx]).find(|(_, token)| {
                let range = at..at + token.content.len();
                text.as_bytes()[at..].starts_with(token.content.as_bytes())
                    && (!token.single_word || is_word(text, &range))
                    && (!token.special || special_counts(range))
            });
            let Some((token_id, token)) = hit else {
                at += 1;
                continue;
            };
            let range = with_whitespace(text, at..at + token.content.len(), token, free_from);
            (at, free_from) = (range.end, range.end);
            found.push(Found { token_id: *token_id, range });
        }
        found
    }
}

/// Whether no letter, digit or underscore touches the range.
fn is_word(text: &str, range: &Range<usize>) -> bool {
    let of_word = |c: char| c.is_alphanumeric() || c == '_';
    !text[..range.start].chars().next_back().is_some_and(of_word)
        && !text[range.end..].chars().next().is_some_and(of_word)
}

/// Tokens may be declared to swallow the whitespace before (not what another token has) or behind them.
fn with_whitespace(text: &str, range: Range<usize>, token: &AddedToken, free_from: usize) -> Range<usize> {
    let (mut start, mut end) = (range.start, range.end);
    if token.lstrip {
        start = free_from + text[free_from..start].trim_end().len();
    }
    if token.rstrip {
        end = text.len() - text[end..].trim_start().len();
    }
    start..end
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vocabulary() -> AddedTokens {
        AddedTokens::new([
            (1, AddedToken::from("<a>", true)),
            (2, AddedToken::from("<a><b>", false)),
            (3, AddedToken::from("<m>", true).lstrip(true).rstrip(true)),
            (4, AddedToken::from("word", false).single_word(true)),
            (5, AddedToken::from("é", false)),
        ])
    }

    fn ids(text: &str, special_counts: impl Fn(Range<usize>) -> bool) -> Vec<(u32, Range<usize>)> {
        vocabulary().find(text, special_counts).into_iter().map(|found| (found.token_id, found.range)).collect()
    }

    /// Leftmost, then longest; whitespace goes along where declared; single words only where nothing touches them.
    #[test]
    fn finds_by_the_rules() {
        assert_eq!(ids("x<a><b><a>", |_| true), [(2, 1..7), (1, 7..10)]);
        assert_eq!(ids("a  <m> <m>  b", |_| true), [(3, 1..7), (3, 7..12)]);
        assert_eq!(ids("word words wordé", |_| true), [(4, 0..4), (5, 15..17)]);
        assert_eq!(ids("", |_| true), []);
    }

    /// A special token that does not count is text, also where it would have hidden another token.
    #[test]
    fn special_tokens_count_where_they_may() {
        assert_eq!(ids("<a>é<a>", |range| range.start > 3), [(5, 3..5), (1, 5..8)]);
        assert_eq!(ids("<a><b>", |_| false), [(2, 0..6)]);
    }
}
