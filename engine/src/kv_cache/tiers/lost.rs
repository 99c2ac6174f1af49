//! What was given up and nobody has asked for yet, oldest first.

use std::collections::VecDeque;

use crate::config::MAX_LOST_BLOCKS;

/// Remembers what was given up, of too many the newest.
pub(super) fn note_lost<T>(lost: &mut VecDeque<T>, what: T) {
    if lost.len() >= MAX_LOST_BLOCKS {
        lost.pop_front();
    }
    lost.push_back(what);
}
