//! What a place was to have and has not: so that whoever waits until everything is stored hears of what is not. What is
//! stored later after all is no longer counted.

use std::collections::HashSet;
use std::hash::Hash;

use crate::config::MAX_UNSTORED;

/// Since somebody asked last.
#[derive(Debug, Clone)]
pub struct Unstored<K> {
    /// At most [`MAX_UNSTORED`].
    keys: HashSet<K>,
    /// Those beyond, which are only counted.
    num_more: u64,
    /// Why the last of them is not there.
    reason: String,
}

impl<K> Default for Unstored<K> {
    fn default() -> Self {
        Unstored { keys: HashSet::new(), num_more: 0, reason: String::new() }
    }
}

impl<K: Eq + Hash> Unstored<K> {
    /// It was not stored.
    pub fn note(&mut self, key: K, reason: &str) {
        let has_room = self.keys.len() < MAX_UNSTORED || self.keys.contains(&key);
        match has_room {
            true => drop(self.keys.insert(key)),
            false => self.num_more += 1,
        }
        self.reason.clear();
        self.reason.push_str(reason);
    }

    /// It is there now.
    pub fn is_stored(&mut self, key: &K) {
        self.keys.remove(key);
    }

    /// How many there are, and why the last of them; from now on they are known.
    pub fn take(&mut self) -> Option<(u64, String)> {
        let Unstored { keys, num_more, reason } = std::mem::take(self);
        let count = keys.len() as u64 + num_more;
        (count > 0).then_some((count, reason))
    }

    /// It was given up on purpose.
    pub fn clear(&mut self) {
        *self = Unstored::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each thing counts once, not any more when it is stored after all, and is told once; the memory for it is bounded.
    #[test]
    fn what_is_missing_is_told_once() {
        let mut unstored = Unstored::default();
        [1, 2, 2, 3].iter().for_each(|key| unstored.note(*key, "no room"));
        unstored.is_stored(&1);
        unstored.note(3, "no disk");
        assert_eq!(unstored.take(), Some((2, "no disk".to_string())));
        assert_eq!(unstored.take(), None);
        (0..MAX_UNSTORED + 10).for_each(|key| unstored.note(key, "no room"));
        assert_eq!(unstored.keys.len(), MAX_UNSTORED);
        assert_eq!(unstored.take().map(|(count, _)| count), Some(MAX_UNSTORED as u64 + 10));
    }
}
