//! Ids in, whole UTF-8 out, a piece at a time. The pieces put together are the text of all ids decoded at once; none
//! ends within a character, and U+FFFD comes only once it is certain that a character will not be completed. Time is
//! linear in the bytes: at most three of them wait for a next token, and nothing is decoded twice.

use super::Tokenizer;
use super::pieces::LeadingSpaces;
use super::stop::{StopMatcher, StopStrings};

/// Where a decoded text stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TextStart {
    /// It begins here: SentencePiece-like tokenizers drop the space that their encoder puts before a text.
    Beginning,
    /// It goes on where a prompt ends, so a space at its beginning is part of it.
    Continuation,
}

/// Decoder of one growing sequence of ids. Owns no tokenizer, so that it can live wherever the sequence does.
#[derive(Debug, Clone)]
pub struct TextDecoder {
    /// Bytes that may be the beginning of a character; at most three.
    pending: Vec<u8>,
    leading_spaces: LeadingSpaces,
    skip_special: bool,
}

impl TextDecoder {
    /// `skip_special`: special tokens leave no text.
    pub fn new(tokenizer: &Tokenizer, start: TextStart, skip_special: bool) -> Self {
        let leading_spaces = match start {
            TextStart::Beginning => tokenizer.pieces.leading_spaces,
            TextStart::Continuation => LeadingSpaces::Kept,
        };
        TextDecoder { pending: Vec::new(), leading_spaces, skip_special }
    }

    /// Appends to `text` what `token_id` completes. Ids without a token are ignored.
    pub fn push(&mut self, tokenizer: &Tokenizer, token_id: u32, text: &mut String) {
        if self.skip_special && tokenizer.is_special(token_id) {
            return;
        }
        let piece = tokenizer.pieces.bytes(token_id);
        match self.leading_spaces {
            LeadingSpaces::Kept => self.pending.extend_from_slice(piece),
            LeadingSpaces::Dropped(at_most) => {
                let dropped = piece.iter().take(at_most).take_while(|&&byte| byte == b' ').count();
                if dropped < piece.len() {
                    self.leading_spaces = LeadingSpaces::Kept;
                } else {
                    self.leading_spaces = LeadingSpaces::Dropped(at_most - dropped);
                }
                self.pending.extend_from_slice(&piece[dropped..]);
            }
            LeadingSpaces::DroppedInFirstToken => {
                self.pending.extend(piece.iter().filter(|&&byte| byte != b' '));
                self.leading_spaces = LeadingSpaces::Kept;
            }
        }
        self.take_complete(text);
    }

    /// Appends to `text` what is left: a character that was never completed becomes U+FFFD.
    pub fn finish(&mut self, text: &mut String) {
        if !self.pending.is_empty() {
            text.push_str(&String::from_utf8_lossy(&self.pending));
            self.pending.clear();
        }
    }

    /// Moves whole characters, and U+FFFD for what can no longer become one (the maximal subparts of Unicode 3.9, as
    /// in the standard library), to `text`; leaves the beginning of a character.
    fn take_complete(&mut self, text: &mut String) {
        let mut done = 0;
        loop {
            let error = match std::str::from_utf8(&self.pending[done..]) {
                Ok(valid) => {
                    text.push_str(valid);
                    return self.pending.clear();
                }
                Err(error) => error,
            };
            let valid = &self.pending[done..done + error.valid_up_to()];
            text.push_str(std::str::from_utf8(valid).expect("checked up to here"));
            done += valid.len();
            let Some(invalid_bytes) = error.error_len() else { break };
            text.push(char::REPLACEMENT_CHARACTER);
            done += invalid_bytes;
        }
        self.pending.drain(..done);
    }
}

/// The text of one answer on its way to a reader: decoded, and held back where it may become a stop string.
#[derive(Debug, Clone)]
pub struct TextStream {
    decoder: TextDecoder,
    stop: StopMatcher,
    decoded: String,
}

impl TextStream {
    /// Special tokens leave no text. The stop strings are shared by all choices of a request.
    pub fn new(tokenizer: &Tokenizer, start: TextStart, stop: StopStrings) -> Self {
        let decoder = TextDecoder::new(tokenizer, start, true);
        TextStream { decoder, stop: StopMatcher::new(stop), decoded: String::new() }
    }

    /// Appends to `text` what a reader may see after `token_id`. Returns whether a stop string is complete: the answer
    /// ends there, and further tokens leave no text.
    pub fn push(&mut self, tokenizer: &Tokenizer, token_id: u32, text: &mut String) -> bool {
        self.decoded.clear();
        self.decoder.push(tokenizer, token_id, &mut self.decoded);
        self.stop.push(&self.decoded, text)
    }

    /// Appends to `text` what was held back, at the end of an answer. Returns whether that completed a stop string.
    pub fn finish(&mut self, text: &mut String) -> bool {
        self.decoded.clear();
        self.decoder.finish(&mut self.decoded);
        let stopped = self.stop.push(&self.decoded, text);
        self.stop.finish(text);
        stopped
    }
}
