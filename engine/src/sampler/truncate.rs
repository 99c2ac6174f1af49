//! Which tokens may be drawn: top-k (Fan et al. 2018, arXiv:1805.04833), top-p (nucleus sampling, Holtzman et al. 2019,
//! arXiv:1904.09751) and min-p (Nguyen et al. 2024, arXiv:2407.01082).
//!
//! All three keep a prefix of one order: logits descending, equal ones by ascending id. Nothing is sorted: a prefix is
//! found by selection, in time linear in the vocabulary, and weights are exact integers, so the way it is found cannot
//! show in the result.

use std::cmp::Reverse;
use std::ops::Range;

use super::weights::Softmax;

/// A token that may still be drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Candidate {
    pub(super) token_id: u32,
    pub(super) logit: f32,
    /// 0 until it is known.
    pub(super) weight: u64,
}

impl Candidate {
    pub(super) fn new(token_id: usize, logit: f32) -> Self {
        Candidate { token_id: token_id as u32, logit, weight: 0 }
    }

    /// Sorts the best first: a float's bits with the sign folded in order as the float does; -0 counts as 0.
    fn rank(&self) -> (Reverse<u32>, u32) {
        let bits = (self.logit + 0.0).to_bits();
        let ordered = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
        (Reverse(ordered), self.token_id)
    }
}

/// Fills `kept` with the `k` best of `logits` (`[vocab_size]`), in no particular order; masked ones are left out.
///
/// Keeps a buffer of the best so far, with room for as many again; when it is full the worse half is dropped, and what
/// is not above the worst kept one need not enter. `k` is at least 1.
pub(super) fn top_k(logits: &[f32], k: usize, kept: &mut Vec<Candidate>) {
    kept.clear();
    let capacity = k.max(32).saturating_mul(2);
    let mut worst_kept = f32::NEG_INFINITY;
    for (token_id, &logit) in logits.iter().enumerate() {
        // An equal logit with a higher id ranks behind, so it need not enter; nor does a masked one, ever.
        if logit > worst_kept {
            kept.push(Candidate::new(token_id, logit));
            if kept.len() == capacity {
                worst_kept = keep_best(kept, k);
            }
        }
    }
    if kept.len() > k {
        keep_best(kept, k);
    }
}

/// Drops all but the `k` best of more than `k`; returns the worst that is left.
fn keep_best(kept: &mut Vec<Candidate>, k: usize) -> f32 {
    kept.select_nth_unstable_by_key(k - 1, Candidate::rank);
    kept.truncate(k);
    kept[k - 1].logit
}

/// Puts the best first.
pub(super) fn sort(kept: &mut [Candidate]) {
    kept.sort_unstable_by_key(Candidate::rank);
}

/// Fills `kept` with every token that can be drawn at all, weighed and in the order of ids. Returns the sum.
pub(super) fn keep_all(logits: &[f32], softmax: Softmax, kept: &mut Vec<Candidate>) -> u64 {
    kept.clear();
    kept.reserve(logits.len());
    let mut total = 0;
    for (token_id, &logit) in logits.iter().enumerate() {
        let weight = softmax.weight(logit);
        if weight > 0 {
            kept.push(Candidate { token_id: token_id as u32, logit, weight });
            total += weight;
        }
    }
    total
}

/// Gives each candidate its weight and drops those that weigh nothing. Returns the sum.
pub(super) fn weigh(kept: &mut Vec<Candidate>, softmax: Softmax) -> u64 {
    let mut total = 0;
    kept.retain_mut(|candidate| {
        candidate.weight = softmax.weight(candidate.logit);
        total += candidate.weight;
        candidate.weight > 0
    });
    total
}

/// Keeps the shortest prefix of the order whose weight reaches `p` of the total; at least one token. Returns its weight.
pub(super) fn top_p(kept: &mut Vec<Candidate>, total: u64, p: f32) -> u64 {
    // Exact enough: a weight has 40 bits, and f64 holds the product of 24 bits with the first 53 of a sum.
    let needed = ((total as f64 * f64::from(p)).ceil() as u64).clamp(1, total);
    drop_improbable(kept, total, needed);
    let last = position_at(kept, needed - 1, Candidate::rank);
    kept.truncate(last + 1);
    kept.iter().map(|candidate| candidate.weight).sum()
}

/// Drops candidates so light that all of them together are not needed to reach `needed`. Usually this leaves a small
/// part of the vocabulary to the selection.
fn drop_improbable(kept: &mut Vec<Candidate>, total: u64, needed: u64) {
    let spare = total - needed;
    let each = spare / kept.len() as u64;
    kept.retain(|candidate| candidate.weight >= each);
}

/// Keeps the tokens of at least `min_p` times the best one's weight. Returns their weight.
pub(super) fn min_p(kept: &mut Vec<Candidate>, min_p: f32) -> u64 {
    let best = kept.iter().map(|candidate| candidate.weight).max().unwrap_or(0);
    let least = (best as f64 * f64::from(min_p)).ceil() as u64;
    let mut total = 0;
    kept.retain(|candidate| {
        let keep = candidate.weight >= least;
        total += if keep { candidate.weight } else { 0 };
        keep
    });
    total
}

/// The token at cumulative weight `target` (below the total) when the candidates stand in the order of their ids.
pub(super) fn token_at(kept: &mut [Candidate], target: u64) -> u32 {
    if kept.is_sorted_by_key(|candidate| candidate.token_id) {
        let mut weight = 0;
        let reaches = |candidate: &&Candidate| {
            weight += candidate.weight;
            weight > target
        };
        return kept.iter().find(reaches).expect("the target is below the total").token_id;
    }
    let position = position_at(kept, target, |candidate| candidate.token_id);
    kept[position].token_id
}

/// Reorders `candidates` so that all before the returned position come before it in the order of `key`, and the weight
/// up to and with it is the first to exceed `target`.
///
/// A quickselect that goes into the half where the weight is: linear time, no sort of more than [`SORTED`] elements.
fn position_at<K: Ord>(candidates: &mut [Candidate], target: u64, key: impl Fn(&Candidate) -> K) -> usize {
    /// Below this a sort is cheaper.
    const SORTED: usize = 32;
    let mut range: Range<usize> = 0..candidates.len();
    let mut weight_before = 0;
    while range.len() > SORTED {
        let half = range.len() / 2;
        let part = &mut candidates[range.clone()];
        part.select_nth_unstable_by_key(half, &key);
        let weight: u64 = part[..half].iter().map(|candidate| candidate.weight).sum();
        if weight_before + weight > target {
            range.end = range.start + half;
        } else {
            weight_before += weight;
            range.start += half;
        }
    }
    candidates[range.clone()].sort_unstable_by_key(&key);
    for position in range.clone() {
        weight_before += candidates[position].weight;
        if weight_before > target {
            return position;
        }
    }
    range.end - 1
}

#[cfg(test)]
mod tests {
    use super::super::rng::random_at;
    use super::*;

    /// Random logits, coarse enough for many ties when `levels` is small; one in ten is masked.
    fn random_logits(seed: u64, len: usize, levels: u64) -> Vec<f32> {
        (0..len as u64)
            .map(|i| match random_at(seed, i) {
                random if random % 10 == 0 => f32::NEG_INFINITY,
                random => ((random >> 8) % levels) as f32 * (20.0 / levels as f32) - 10.0,
            })
            .collect()
    }

    /// Everything that can be drawn, in the documented order, by a full sort.
    fn naive_order(logits: &[f32]) -> Vec<Candidate> {
        let all = logits.iter().enumerate().map(|(token_id, &logit)| Candidate::new(token_id, logit));
        let mut order: Vec<Candidate> = all.filter(|candidate| candidate.logit != f32::NEG_INFINITY).collect();
        order.sort_by(|a, b| b.logit.partial_cmp(&a.logit).unwrap().then(a.token_id.cmp(&b.token_id)));
        order
    }

    fn ids(candidates: &[Candidate]) -> Vec<u32> {
        let mut ids: Vec<u32> = candidates.iter().map(|candidate| candidate.token_id).collect();
        ids.sort_unstable();
        ids
    }

    const SIZES: [usize; 7] = [1, 2, 31, 33, 64, 257, 3000];

    /// Selection keeps exactly what the first k of a full sort are, ties and masked tokens included.
    #[test]
    fn top_k_is_the_head_of_the_order() {
        let (mut kept, mut checked) = (Vec::new(), 0);
        for (seed, len) in (0..30).flat_map(|seed| SIZES.map(|len| (seed, len))) {
            let logits = random_logits(seed, len, [3, 50, 1 << 20][seed as usize % 3]);
            let order = naive_order(&logits);
            for k in [1, 2, 32, len / 2 + 1, len] {
                top_k(&logits, k, &mut kept);
                assert_eq!(ids(&kept), ids(&order[..k.min(order.len())]), "seed {seed}, {len} logits, k {k}");
                checked += 1;
            }
        }
        assert_eq!(checked, 30 * SIZES.len() * 5);
    }

    /// The nucleus is the shortest head of a full sort that reaches p; it is never empty and p near 1 keeps almost all.
    #[test]
    fn top_p_is_the_shortest_head_that_reaches_p() {
        let mut kept = Vec::new();
        for (seed, len) in (0..30).flat_map(|seed| SIZES.map(|len| (seed, len))) {
            let logits = random_logits(seed, len, [3, 50, 1 << 20][seed as usize % 3]);
            let mut order = naive_order(&logits);
            let Some(max) = order.first().map(|best| best.logit) else { continue };
            let softmax = Softmax::new(max, [0.3, 1.0, 30.0][seed as usize / 3 % 3]);
            let total = weigh(&mut order, softmax);
            for p in [f32::MIN_POSITIVE, 0.1, 0.5, 0.9, 0.999, 1.0 - f32::EPSILON / 2.0] {
                let needed = ((total as f64 * f64::from(p)).ceil() as u64).max(1);
                let mut sum = 0;
                let reaches = |c: &Candidate| {
                    sum += c.weight;
                    sum >= needed
                };
                let head = order.iter().position(reaches).expect("all of them reach every share") + 1;
                assert_eq!(keep_all(&logits, softmax, &mut kept), total);
                let kept_weight = top_p(&mut kept, total, p);
                assert_eq!(ids(&kept), ids(&order[..head]), "seed {seed}, {len} logits, p {p}");
                assert_eq!(kept_weight, order[..head].iter().map(|c| c.weight).sum::<u64>());
            }
        }
    }

    /// A probability exactly at the boundary: two tokens of one half each, p = 0.5 keeps the first alone, any more both.
    #[test]
    fn top_p_at_the_boundary() {
        for (p, expected) in [(0.5, vec![0]), (0.500_001, vec![0, 1])] {
            let mut kept = Vec::new();
            let total = keep_all(&[1.0, 1.0], Softmax::new(1.0, 1.0), &mut kept);
            top_p(&mut kept, total, p);
            assert_eq!(ids(&kept), expected, "p {p}");
        }
    }

    /// Min-p keeps exactly the tokens whose probability is at least that share of the best one's; 1 keeps the best ones.
    #[test]
    fn min_p_compares_with_the_best() {
        for seed in 0..30 {
            let logits = random_logits(seed, 500, 40);
            let order = naive_order(&logits);
            for share in [1e-6, 0.05, 0.5, 1.0] {
                let mut kept = Vec::new();
                keep_all(&logits, Softmax::new(order[0].logit, 1.0), &mut kept);
                let total = min_p(&mut kept, share);
                let least = f64::from(order[0].logit) + f64::from(share).ln() - 1e-5;
                let expected: Vec<Candidate> = order.iter().copied().filter(|c| f64::from(c.logit) >= least).collect();
                assert_eq!(ids(&kept), ids(&expected), "seed {seed}, min_p {share}");
                assert_eq!(total, kept.iter().map(|c| c.weight).sum::<u64>());
            }
        }
    }

    /// The token at a cumulative weight is the one that a walk along the ids finds, at every boundary between two.
    #[test]
    fn token_at_walks_along_the_ids() {
        for len in SIZES {
            let logits = random_logits(7, len, 50);
            let mut kept = Vec::new();
            keep_all(&logits, Softmax::new(10.0, 1.0), &mut kept);
            let walk = kept.clone();
            let mut reversed: Vec<Candidate> = walk.iter().rev().copied().collect();
            for candidate in walk.iter().step_by(1 + len / 50) {
                let before = walk.iter().take_while(|c| c.token_id < candidate.token_id).map(|c| c.weight).sum::<u64>();
                assert_eq!(token_at(&mut kept, before), candidate.token_id);
                assert_eq!(token_at(&mut kept, before + candidate.weight - 1), candidate.token_id);
                assert_eq!(token_at(&mut reversed, before), candidate.token_id);
                assert_eq!(token_at(&mut reversed, before + candidate.weight - 1), candidate.token_id);
            }
        }
    }
}
