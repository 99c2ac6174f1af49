//! Giving everything up: host memory at once, a tier by a job. What was given to a tier before is answered as if nothing had
//! happened to those who wait for it, but is not kept.

use std::collections::VecDeque;
use std::io;

use super::{Job, Tier, Tiers};
use crate::request::MissReason;
use crate::storage::{Fault, RecordKey, TierId};

/// What has become of the last [`Tiers::clear`] in one tier.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum ClearState {
    /// Nothing of what was there is left.
    #[default]
    Done,
    /// The tier is to do it.
    Pending,
    /// It could not, and is asked again when it works. Until then nothing that was there is used here.
    Failed(Fault),
}

impl Tiers {
    /// Gives up every block that is kept here. A store that nodes share is left as it is.
    pub fn clear(&mut self, now_us: u64) {
        self.host.clear();
        self.lost.clear();
        for id in self.ids().collect::<Vec<_>>() {
            // Whoever waits for what is not being read yet computes it.
            let reads: Vec<_> = self.tier_mut(id).reads.drain(..).collect();
            reads.iter().for_each(|key| self.fail_wanted(key, MissReason::NeverSeen));
            let tier = self.tier_mut(id);
            tier.held.clear();
            tier.drop_writes();
            tier.unstored.clear();
            tier.first_valid_job = tier.next_job;
            if id == TierId::Disk {
                tier.clear = if let Some(refusal) = &tier.refusal {
                    ClearState::Failed(refusal.clone())
                } else if tier.breaker.allows(now_us) {
                    ClearState::Pending
                } else {
                    let reason = "it failed just now and is left alone for a while".to_string();
                    ClearState::Failed(Fault::Io { operation: "clear", kind: io::ErrorKind::NotConnected, reason })
                };
            }
        }
    }

    /// What has become of that.
    pub fn clear_state(&self, id: TierId) -> &ClearState {
        &self.tier(id).clear
    }
}

impl Tier {
    /// The job that clears, when it is to be done. It goes before all others.
    pub(super) fn next_clear(&self) -> Option<Job> {
        let is_given = self.jobs.iter().any(|(_, job)| *job == Job::Clear);
        (self.refusal.is_none() && self.clear != ClearState::Done && !is_given).then_some(Job::Clear)
    }

    /// What waits to be written is not; which blocks that are.
    pub(super) fn drop_writes(&mut self) -> Vec<RecordKey> {
        let writes: VecDeque<_> = std::mem::take(&mut self.writes);
        self.write_queue_bytes -= writes.iter().map(|write| write.bytes.len() as u64).sum::<u64>();
        let keys: Vec<_> = writes.into_iter().map(|write| write.key).collect();
        keys.iter().for_each(|key| {
            self.writing.remove(key);
        });
        keys
    }
}
