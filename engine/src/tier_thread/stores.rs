//! The stores of records as tiers of KV blocks: what each does for a job.

use crate::kv_cache::tiers::{Job, Outcome, TierStore};
use crate::storage::disk::DiskStore;
use crate::storage::remote::RemoteStore;
use crate::storage::{Fault, RecordKey, TierId};

impl TierStore for DiskStore {
    fn id(&self) -> TierId {
        TierId::Disk
    }

    fn run(&mut self, job: Job) -> Outcome {
        let outcome = match job {
            Job::Read(key) => self.get(&key).map(|found| found.map_or(Outcome::Missing, Outcome::Found)),
            Job::Write(key, bytes, owner) => self.put_for(&owner, key, &bytes).map(|_| Outcome::Stored),
            Job::Quarantine(key) => {
                DiskStore::quarantine(self, &key);
                Ok(Outcome::Done)
            }
            Job::Clear => DiskStore::clear(self).map(|()| Outcome::Done),
        };
        outcome.unwrap_or_else(Outcome::Fault)
    }

    fn take_lost(&mut self) -> Vec<RecordKey> {
        DiskStore::take_lost(self)
    }

    fn flush(&mut self) -> Result<(), Fault> {
        DiskStore::flush(self)
    }
}

impl TierStore for RemoteStore {
    fn id(&self) -> TierId {
        TierId::Remote
    }

    fn run(&mut self, job: Job) -> Outcome {
        let done = match job {
            Job::Read(key) => {
                self.get(&key).map(|found| found.map_or(Outcome::Missing, |it| Outcome::Found(it.into())))
            }
            Job::Write(key, bytes, _) => self.put(&key, &bytes).map(|_| Outcome::Stored),
            Job::Quarantine(key) => self.remove(&key).map(|()| Outcome::Done),
            // Others use it too: what is in it ends with its time.
            Job::Clear => Ok(Outcome::Done),
        };
        done.unwrap_or_else(Outcome::Fault)
    }

    /// What others or the time have taken away is found out when it is asked for.
    fn take_lost(&mut self) -> Vec<RecordKey> {
        Vec::new()
    }

    /// How durable the store is is its own affair.
    fn flush(&mut self) -> Result<(), Fault> {
        Ok(())
    }
}
