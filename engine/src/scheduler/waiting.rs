//! Who is admitted next. Three classes, first come first served inside each; a class is lifted by one rank for every
//! `age_steps` steps that its longest-waiting sequence has waited, so that no class starves.
//!
//! Invariant: the order of a class is that of the ids, which is that of arrival, so a preempted sequence returns
//! to the front of its class by itself.

use std::collections::{BTreeMap, BTreeSet};

use crate::ids::SeqId;
use crate::request::Priority;

/// What the queue knows of a sequence.
#[derive(Debug, Clone, Copy)]
pub(super) struct Waiting {
    /// First choice of its request.
    pub(super) request: SeqId,
    /// Its class.
    pub(super) priority: Priority,
    /// Tokens of its prompt.
    pub(super) prompt_tokens: usize,
    /// Step at which it was queued, the last time.
    pub(super) since_step: u64,
}

/// The waiting sequences.
#[derive(Debug, Default)]
pub(super) struct WaitingQueue {
    entries: BTreeMap<SeqId, Waiting>,
    /// By class; rank 0, which goes first, is High.
    classes: [Class; 3],
    /// Waiting sequences of each request.
    requests: BTreeMap<SeqId, usize>,
    num_tokens: usize,
}

#[derive(Debug, Default)]
struct Class {
    order: BTreeSet<SeqId>,
    by_age: BTreeSet<(u64, SeqId)>,
}

impl Class {
    fn rank(&self, own_rank: usize, step: u64, age_steps: u64) -> usize {
        let lift = self.by_age.first().map_or(0, |&(since, _)| (step - since) / age_steps);
        own_rank.saturating_sub(usize::try_from(lift).unwrap_or(usize::MAX))
    }
}

impl WaitingQueue {
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }
    /// Requests that have a waiting sequence.
    pub(super) fn num_requests(&self) -> usize {
        self.requests.len()
    }
    /// Prompt tokens that wait.
    pub(super) fn num_tokens(&self) -> usize {
        self.num_tokens
    }
    pub(super) fn contains(&self, seq: SeqId) -> bool {
        self.entries.contains_key(&seq)
    }
    pub(super) fn get(&self, seq: SeqId) -> Option<&Waiting> {
        self.entries.get(&seq)
    }
    /// Whether a sequence of a better class than `priority` waits.
    pub(super) fn has_better_than(&self, priority: Priority) -> bool {
        self.classes[..priority as usize].iter().any(|class| !class.order.is_empty())
    }

    pub(super) fn insert(&mut self, seq: SeqId, waiting: Waiting) {
        let class = &mut self.classes[waiting.priority as usize];
        class.order.insert(seq);
        class.by_age.insert((waiting.since_step, seq));
        *self.requests.entry(waiting.request).or_default() += 1;
        self.num_tokens += waiting.prompt_tokens;
        self.entries.insert(seq, waiting);
    }

    /// `None`: it does not wait.
    pub(super) fn remove(&mut self, seq: SeqId) -> Option<Waiting> {
        let waiting = self.entries.remove(&seq)?;
        let class = &mut self.classes[waiting.priority as usize];
        class.order.remove(&seq);
        class.by_age.remove(&(waiting.since_step, seq));
        let siblings = self.requests.get_mut(&waiting.request).expect("each waiting sequence counts for its request");
        *siblings -= 1;
        if *siblings == 0 {
            self.requests.remove(&waiting.request);
        }
        self.num_tokens -= waiting.prompt_tokens;
        Some(waiting)
    }

    /// The first `limit` sequences by (rank of the class at `step`, arrival), with their ranks.
    pub(super) fn first(&self, step: u64, age_steps: u64, limit: usize) -> Vec<(usize, SeqId)> {
        let mut classes: Vec<_> = self
            .classes
            .iter()
            .enumerate()
            .map(|(own_rank, class)| (class.rank(own_rank, step, age_steps), class.order.iter().peekable()))
            .collect();
        let mut first = Vec::new();
        while first.len() < limit {
            let next = classes
                .iter_mut()
                .filter_map(|(rank, order)| Some(((*rank, **order.peek()?), order)))
                .min_by_key(|(key, _)| *key);
            let Some((ranked, order)) = next else { break };
            order.next();
            first.push(ranked);
        }
        first
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue(entries: &[(u64, Priority, u64)]) -> WaitingQueue {
        let mut queue = WaitingQueue::default();
        for &(id, priority, since_step) in entries {
            queue.insert(SeqId(id), Waiting { request: SeqId(id / 2), priority, prompt_tokens: 10, since_step });
        }
        queue
    }

    fn order(queue: &WaitingQueue, step: u64) -> Vec<u64> {
        queue.first(step, 10, 100).into_iter().map(|(_, seq)| seq.0).collect()
    }

    /// Classes go in order and arrival decides inside a class; after `age_steps` steps of waiting a class has caught up
    /// by one rank, and then arrival decides between the two.
    #[test]
    fn waiting_lifts_a_class() {
        use Priority::{Background, High, Normal};
        let queue = queue(&[(1, Background, 0), (2, Normal, 0), (3, High, 0), (4, Normal, 5), (5, High, 12)]);
        assert_eq!(order(&queue, 9), [3, 5, 2, 4, 1]);
        assert_eq!(order(&queue, 12), [2, 3, 4, 5, 1]);
        assert_eq!(order(&queue, 20), [1, 2, 3, 4, 5]);
        assert_eq!(queue.first(12, 10, 2), [(0, SeqId(2)), (0, SeqId(3))]);
    }

    /// One that comes back after a preemption is first of its class, and the class stays lifted by the one that has
    /// waited longest, wherever it stands.
    #[test]
    fn preempted_returns_to_the_front_of_its_class() {
        let mut queue = queue(&[(4, Priority::Normal, 0), (5, Priority::High, 9)]);
        queue.insert(SeqId(1), Waiting { since_step: 11, ..*queue.get(SeqId(4)).expect("it waits") });
        assert_eq!(order(&queue, 11), [1, 4, 5]);
        assert!(queue.remove(SeqId(4)).is_some() && queue.remove(SeqId(4)).is_none());
        assert_eq!(order(&queue, 11), [5, 1], "nobody who has waited long is left in the class");
    }

    /// Requests are counted once however many of their sequences wait; tokens are counted for each.
    #[test]
    fn counts_requests_and_tokens() {
        let mut queue = queue(&[(0, Priority::High, 0), (1, Priority::High, 0), (2, Priority::Normal, 0)]);
        assert_eq!((queue.len(), queue.num_requests(), queue.num_tokens()), (3, 2, 30));
        assert!(queue.has_better_than(Priority::Normal) && !queue.has_better_than(Priority::High));
        queue.remove(SeqId(0));
        assert_eq!((queue.len(), queue.num_requests(), queue.num_tokens()), (2, 2, 20));
        queue.remove(SeqId(1));
        assert_eq!((queue.len(), queue.num_requests(), queue.num_tokens()), (1, 1, 10));
    }
}
