//! Which of many cached things goes first: what was used least recently, but before that what belongs to an owner who
//! holds more than its quota. So the flood of one tenant takes from others at most its quota and what nobody uses.
//!
//! Invariants: every entry is in both orders; each owner's weight is the sum of its entries' weights.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::Hash;

use crate::error::{Error, Result};
use crate::ids::OwnerKey;

/// Things by their last use and by their owner. Maps that are hashed are only looked up, never iterated.
#[derive(Debug)]
pub(crate) struct FairLru<K> {
    quota: u64,
    entries: HashMap<K, Entry>,
    /// By the moment of their last use.
    order: BTreeMap<u64, K>,
    /// The same moments, by owner.
    by_owner: BTreeSet<(OwnerKey, u64)>,
    weights: HashMap<OwnerKey, u64>,
    /// Owners by their weight.
    heaviest: BTreeSet<(u64, OwnerKey)>,
    /// Counts uses.
    clock: u64,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    owner: OwnerKey,
    weight: u64,
    used_at: u64,
}

impl<K: Copy + Eq + Hash> FairLru<K> {
    /// Nothing yet. `quota`: the weight beyond which an owner's entries go first.
    pub(crate) fn new(quota: u64) -> Self {
        FairLru {
            quota,
            entries: HashMap::new(),
            order: BTreeMap::new(),
            by_owner: BTreeSet::new(),
            weights: HashMap::new(),
            heaviest: BTreeSet::new(),
            clock: 0,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }
    /// All of them, least recently used first.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &K> {
        self.order.values()
    }

    /// A new entry, used now.
    pub(crate) fn insert(&mut self, key: K, owner: OwnerKey, weight: u64) {
        self.remove(&key);
        self.clock += 1;
        let entry = Entry { owner, weight, used_at: self.clock };
        self.entries.insert(key, entry);
        self.order.insert(entry.used_at, key);
        self.by_owner.insert((owner, entry.used_at));
        self.change_weight(owner, |held| held + weight);
    }

    /// The entry was used.
    pub(crate) fn touch(&mut self, key: &K) {
        if let Some(Entry { owner, weight, .. }) = self.remove(key) {
            self.insert(*key, owner, weight);
        }
    }

    /// Takes the entry that is to go first.
    pub(crate) fn pop(&mut self) -> Option<K> {
        let over_quota = self.heaviest.last().filter(|(weight, _)| *weight > self.quota);
        let oldest_of = |owner: OwnerKey| self.by_owner.range((owner, 0)..).next().map(|&(_, used_at)| used_at);
        let used_at = match over_quota {
            Some(&(_, owner)) => oldest_of(owner)?,
            None => *self.order.first_key_value()?.0,
        };
        let key = self.order[&used_at];
        self.remove(&key);
        Some(key)
    }

    pub(crate) fn forget(&mut self, key: &K) {
        self.remove(key);
    }

    pub(crate) fn clear(&mut self) {
        *self = FairLru::new(self.quota);
    }

    fn remove(&mut self, key: &K) -> Option<Entry> {
        let entry = self.entries.remove(key)?;
        self.order.remove(&entry.used_at);
        self.by_owner.remove(&(entry.owner, entry.used_at));
        self.change_weight(entry.owner, |held| held - entry.weight);
        Some(entry)
    }

    fn change_weight(&mut self, owner: OwnerKey, change: impl FnOnce(u64) -> u64) {
        let before = self.weights.get(&owner).copied().unwrap_or(0);
        self.heaviest.remove(&(before, owner));
        match change(before) {
            0 => drop(self.weights.remove(&owner)),
            after => {
                self.weights.insert(owner, after);
                self.heaviest.insert((after, owner));
            }
        }
    }

    /// See the head of this file.
    pub(crate) fn check_invariants(&self) -> Result<()> {
        let violated = |is_violated: bool, reason: &dyn Fn() -> String| match is_violated {
            true => Err(Error::Internal { reason: reason() }),
            false => Ok(()),
        };
        let mut weights: HashMap<OwnerKey, u64> = HashMap::new();
        for (used_at, key) in &self.order {
            let entry = self.entries.get(key).filter(|entry| entry.used_at == *used_at);
            let is_owned = entry.is_some_and(|entry| self.by_owner.contains(&(entry.owner, *used_at)));
            violated(!is_owned, &|| format!("a cached entry of moment {used_at} is in one order only"))?;
            entry.into_iter().for_each(|entry| *weights.entry(entry.owner).or_default() += entry.weight);
        }
        weights.retain(|_, weight| *weight > 0);
        violated(self.entries.len() != self.order.len() || self.by_owner.len() != self.order.len(), &|| {
            "the orders of cached entries differ".to_string()
        })?;
        let agree = weights == self.weights && self.heaviest.len() == self.weights.len();
        violated(!agree, &|| "weights of owners do not add up".to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner(name: u8) -> OwnerKey {
        [name; 32]
    }

    /// Without anyone over quota the least recently used goes; an owner over it loses its own oldest, however recently they
    /// were used, until it is within.
    #[test]
    fn who_holds_too_much_gives_first() {
        let mut lru = FairLru::new(3);
        for name in 0..3 {
            lru.insert(name, owner(1), 1);
        }
        for name in 10..15 {
            lru.insert(name, owner(2), 1);
        }
        lru.touch(&10);
        let gone: Vec<u32> = std::iter::from_fn(|| lru.pop()).collect();
        assert_eq!(gone, [11, 12, 0, 1, 2, 13, 14, 10]);
        assert_eq!(lru.len(), 0);
    }

    /// A flood by one tenant takes from another no more than what the quota and unused room allow.
    #[test]
    fn flood_leaves_others_their_share() {
        let (capacity, quota) = (100, 40);
        let mut lru = FairLru::new(quota);
        (0..40).for_each(|name| lru.insert(name, owner(1), 1));
        for name in 1_000..11_000 {
            lru.insert(name, owner(2), 1);
            while lru.len() > capacity {
                lru.pop();
            }
        }
        let left = (0..40).filter(|name| lru.entries.contains_key(name)).count();
        assert_eq!((left, lru.len()), (40, 100), "who is within the quota keeps everything");
        lru.check_invariants().expect("sound");
    }

    /// Under random use the orders and weights stay true.
    #[test]
    fn orders_stay_true() {
        let mut lru = FairLru::new(200);
        let mut pops = 0;
        for step in 0..5_000_u64 {
            let draw = step.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
            let key = draw % 50;
            match draw % 11 {
                0 => lru.forget(&key),
                1..4 => lru.touch(&key),
                4 => pops += usize::from(lru.pop().is_some()),
                _ => lru.insert(key, owner((draw % 4) as u8), draw % 20),
            }
            lru.check_invariants().expect("sound");
        }
        assert!(pops > 100, "{pops}");
        lru.clear();
        assert_eq!(lru.len(), 0);
    }
}
