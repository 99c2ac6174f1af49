//! The disk tier: KV blocks in append-only segment files, found again after a restart and after `kill -9`.
//!
//! **Contract.** It always opens; it never returns bytes that were not stored under the key; it loses at most what was not
//! flushed; its files never exceed the budget, not while it writes either; a fault is a miss.
//!
//! **How.** A block is one record ([`record`]): all layers or nothing. Records are appended and never changed. The index
//! lives in memory and is rebuilt from the records' headers at opening: a torn end is cut off, damaged records are
//! skipped and counted. A payload is checked each time it is read. Room is made by removing whole segments, the least
//! recently used first; a file is never used again for something else.
//!
//! **Sync policy.** Writing does not wait for the medium: for a cache a torn record is a miss. [`DiskTier::flush`] does:
//! what was stored before it returned `Ok` outlives a power failure. A sync that failed is not tried again, for the system
//! may have dropped the bytes and forgotten that it had to write them: the segment is removed.
//!
//! Owns no thread and no clock; its files are behind [`SegmentFiles`]. Invariants: [`DiskTier::check_invariants`].

mod directory;
mod record;
mod survey;

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::{Fault, Job, Outcome, StoredKey, TierId, TierStats, TierStore};
use crate::config::{DISK_MIN_SEGMENTS, DISK_SEGMENT_BYTES, MAX_DISK_ENTRIES, MAX_DISK_SEGMENTS};
use crate::error::Error;
pub use directory::{ANSWERS, Access, Directory, SegmentFile, SegmentFiles, draw_seed, file_name};
pub use record::{Damage, FORMAT_VERSION, Nonce, PAGE_BYTES, record_bytes};
use record::{Expected, HEADER_BYTES, RecordHeader, parse_segment_page, segment_page};
pub use survey::{DamagedPlace, Survey, survey};

/// Sizes of a disk tier; fixed for its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskOptions {
    budget_bytes: u64,
    max_payload_bytes: u64,
    segment_bytes: u64,
}

impl DiskOptions {
    /// A tier whose files take at most `budget_bytes`, for blocks of at most `max_payload_bytes`.
    pub fn new(budget_bytes: u64, max_payload_bytes: u64) -> crate::Result<Self> {
        let max_segment_bytes = PAGE_BYTES + record_bytes(max_payload_bytes.min(u64::MAX / 4));
        let min_bytes = max_segment_bytes.saturating_mul(2);
        if budget_bytes < min_bytes {
            return Err(Error::InvalidArgument {
                field: "kv_disk_bytes",
                value: budget_bytes.to_string(),
                expected: format!("at least {min_bytes}, two segments of one block each"),
            });
        }
        let segment_bytes = (budget_bytes / DISK_MIN_SEGMENTS).min(DISK_SEGMENT_BYTES).max(max_segment_bytes);
        Ok(DiskOptions { budget_bytes, max_payload_bytes, segment_bytes })
    }

    /// Bytes that the files take at most.
    pub fn budget_bytes(&self) -> u64 {
        self.budget_bytes
    }
    /// Longest segment file.
    pub fn segment_bytes(&self) -> u64 {
        self.segment_bytes
    }
}

/// What opening found and what has happened since, beyond [`TierStats`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DiskReport {
    /// Segment files.
    pub segments: u64,
    /// Bytes of torn ends that were cut off.
    pub cut_bytes: u64,
    /// Runs of bytes that should have been records, at opening; and records that were damaged when they were read.
    pub damaged_records: u64,
    /// Those of the damages at opening that no torn end explains: what was stored there was whole once.
    pub inner_damage: u64,
    /// Segments whose first page was damaged.
    pub damaged_segments: u64,
    /// Segments that were removed because a sync failed or a block of theirs was quarantined.
    pub dropped_segments: u64,
    /// Segments that were evicted.
    pub evicted_segments: u64,
}

/// What [`DiskTier::verify`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Verification {
    /// Blocks that are as they were written.
    pub intact: u64,
    /// Blocks that were not, and are forgotten now.
    pub damaged: u64,
    /// Blocks that could not be read.
    pub unreadable: u64,
}

#[derive(Debug, Clone, Copy)]
struct Place {
    segment: u64,
    offset: u64,
    payload_bytes: u64,
    sequence: u64,
}

#[derive(Debug)]
struct Segment {
    /// `None`: nothing in it is believed; it waits for its removal.
    nonce: Option<Nonce>,
    /// Upper bound of the file's length.
    bytes: u64,
    /// Keys of its records, in their order.
    keys: Vec<StoredKey>,
    /// On [`DiskTier::clock`], a count of uses.
    last_used: u64,
    /// Written since its last sync.
    is_dirty: bool,
    /// Its name is on the medium.
    name_is_durable: bool,
}

/// The blocks of one directory.
pub struct DiskTier {
    files: Box<dyn SegmentFiles>,
    options: DiskOptions,
    access: Access,
    seed: [u8; 16],
    segments: BTreeMap<u64, Segment>,
    /// The segment that records are appended to.
    open: Option<u64>,
    /// Only looked up, never iterated: its order reaches no result.
    index: HashMap<StoredKey, Place>,
    total_bytes: u64,
    next_segment: u64,
    next_sequence: u64,
    clock: u64,
    lost: Vec<StoredKey>,
    stats: TierStats,
    report: DiskReport,
}

impl DiskTier {
    /// Finds the blocks of earlier lives. `seed`: random bytes, new for each opening. Fails only when the directory
    /// cannot be listed or was written by a newer version.
    pub fn open(
        mut files: Box<dyn SegmentFiles>,
        access: Access,
        options: DiskOptions,
        seed: [u8; 16],
    ) -> Result<Self, Fault> {
        let mut found = files.list().map_err(|error| io_fault("list the directory", &error))?;
        if let Some(newer) = found.iter().map(|file| file.version).filter(|&version| version > FORMAT_VERSION).max() {
            return Err(Fault::NewerFormat { found: newer, known: FORMAT_VERSION });
        }
        found.retain(|file| file.version == FORMAT_VERSION);
        found.sort_by_key(|file| file.segment);
        let mut tier = DiskTier {
            files,
            options,
            access,
            seed,
            segments: BTreeMap::new(),
            open: None,
            index: HashMap::new(),
            total_bytes: 0,
            next_segment: found.last().map_or(0, |file| file.segment + 1),
            next_sequence: 0,
            clock: 0,
            lost: Vec::new(),
            stats: TierStats::default(),
            report: DiskReport::default(),
        };
        for file in found {
            tier.open = None;
            tier.scan(file);
            tier.trim();
        }
        // What was lost before anyone could know that it was there is no news.
        tier.lost.clear();
        Ok(tier)
    }

    /// Whether the block is here. It may still turn out to be damaged.
    pub fn contains(&self, key: &StoredKey) -> bool {
        self.index.contains_key(key)
    }

    /// Keys of all blocks, oldest record first.
    pub fn keys(&self) -> impl Iterator<Item = &StoredKey> {
        let is_here = |(id, key): &(&u64, &StoredKey)| self.index.get(key).is_some_and(|place| place.segment == **id);
        let all = self.segments.iter().flat_map(|(id, segment)| segment.keys.iter().map(move |key| (id, key)));
        all.filter(is_here).map(|(_, key)| key)
    }

    /// Stores a block; false: it was here already. Others may go for it ([`DiskTier::take_lost`]).
    pub fn put(&mut self, key: StoredKey, payload: &[u8]) -> Result<bool, Fault> {
        let stored = self.try_put(key, payload);
        self.stats.faults += u64::from(stored.is_err());
        stored
    }

    /// Stores what is found by `key` from now on, in the place of what was there: also after a restart, for the later of
    /// two records counts.
    pub fn replace(&mut self, key: StoredKey, payload: &[u8]) -> Result<(), Fault> {
        let stored = self.try_append(key, payload);
        self.stats.faults += u64::from(stored.is_err());
        stored
    }

    /// Reads a block and checks it. `None`: it is not here.
    pub fn get(&mut self, key: &StoredKey) -> Result<Option<Arc<[u8]>>, Fault> {
        let Some(&place) = self.index.get(key) else {
            self.stats.misses += 1;
            return Ok(None);
        };
        match self.read(key, place) {
            Ok(payload) => {
                self.touch(place.segment);
                self.stats.hits += 1;
                self.stats.hit_bytes += place.payload_bytes;
                Ok(Some(payload))
            }
            // A reader's index is as old as its opening: the writer has evicted the segment meanwhile.
            Err(Fault::Io { kind: io::ErrorKind::NotFound, .. }) => {
                self.forget_segment(place.segment);
                self.stats.misses += 1;
                Ok(None)
            }
            Err(fault) => {
                self.stats.faults += 1;
                if let Fault::Damaged(_) = fault {
                    self.forget_damaged(key);
                }
                Err(fault)
            }
        }
    }

    /// Waits until everything that was stored is on the medium. What could not be brought there is gone afterwards; the
    /// first fault is returned.
    pub fn flush(&mut self) -> Result<(), Fault> {
        let mut first = Ok(());
        let dirty: Vec<u64> = self.segments.iter().filter(|(_, segment)| segment.is_dirty).map(|(&id, _)| id).collect();
        for id in dirty {
            match self.files.sync(id) {
                Ok(()) => self.segments.entry(id).and_modify(|segment| segment.is_dirty = false),
                Err(error) => {
                    keep_first(&mut first, self.failed("sync a segment", &error));
                    self.drop_segment(id);
                    continue;
                }
            };
        }
        let unnamed: Vec<u64> =
            self.segments.iter().filter(|(_, segment)| !segment.name_is_durable).map(|(&id, _)| id).collect();
        if !unnamed.is_empty() {
            match self.files.sync_directory() {
                Ok(()) => self.segments.values_mut().for_each(|segment| segment.name_is_durable = true),
                Err(error) => {
                    keep_first(&mut first, self.failed("sync the directory", &error));
                    unnamed.into_iter().for_each(|id| self.drop_segment(id));
                }
            }
        }
        first
    }

    /// Removes every block, and waits until that is on the medium.
    pub fn clear(&mut self) -> Result<(), Fault> {
        self.check_writer()?;
        let ids: Vec<u64> = self.segments.keys().copied().collect();
        let mut first = Ok(());
        for id in ids {
            keep_first(&mut first, self.remove_segment(id));
        }
        if let Err(error) = self.files.sync_directory() {
            keep_first(&mut first, self.failed("sync the directory", &error));
        }
        first
    }

    /// Reads and checks every block.
    pub fn verify(&mut self) -> Verification {
        let keys: Vec<StoredKey> = self.keys().copied().collect();
        let mut verification = Verification::default();
        for key in keys {
            let Some(&place) = self.index.get(&key) else { continue };
            match self.read(&key, place) {
                Ok(_) => verification.intact += 1,
                Err(Fault::Damaged(_)) => {
                    verification.damaged += 1;
                    self.forget_damaged(&key);
                }
                Err(_) => verification.unreadable += 1,
            }
        }
        verification
    }

    /// The use of a block ended in an error of the engine: neither it nor what was written beside it is used again, also
    /// not after a restart. (Removing the one record would mean to change a file in place.)
    pub fn quarantine(&mut self, key: &StoredKey) {
        let Some(&place) = self.index.get(key) else { return };
        self.drop_segment(place.segment);
    }

    /// Keys of the blocks that were here and are not any more, since the last call.
    pub fn take_lost(&mut self) -> Vec<StoredKey> {
        std::mem::take(&mut self.lost)
    }

    /// What is held and what has happened.
    pub fn stats(&self) -> TierStats {
        TierStats { entries: self.index.len() as u64, bytes: self.total_bytes, ..self.stats }
    }
    /// The same about files.
    pub fn report(&self) -> DiskReport {
        DiskReport { segments: self.segments.len() as u64, ..self.report }
    }
    /// What this process may do here.
    pub fn access(&self) -> Access {
        self.access
    }

    /// The index names records of believed segments under the keys that these list; the bytes add up and stay within the
    /// budget; the open segment is the newest.
    pub fn check_invariants(&self) -> crate::Result<()> {
        let broken = |reason: String| Err(Error::Internal { reason });
        let total_bytes: u64 = self.segments.values().map(|segment| segment.bytes).sum();
        if total_bytes != self.total_bytes {
            return broken(format!("segments have {total_bytes} bytes, {} are counted", self.total_bytes));
        }
        if self.access == Access::Write && total_bytes > self.options.budget_bytes && self.stats.faults == 0 {
            return broken(format!("{total_bytes} bytes exceed the budget of {}", self.options.budget_bytes));
        }
        if self.keys().count() != self.index.len() {
            return broken(format!("{} keys are listed, {} indexed", self.keys().count(), self.index.len()));
        }
        for (key, place) in &self.index {
            let end = place.offset + record_bytes(place.payload_bytes);
            let is_sound = self.segments.get(&place.segment).is_some_and(|s| s.nonce.is_some() && end <= s.bytes);
            if !is_sound {
                return broken(format!("{key:?} is at {place:?}"));
            }
        }
        match self.open.is_some() && self.open != self.segments.keys().last().copied() {
            true => broken("the open segment is not the newest".to_string()),
            false => Ok(()),
        }
    }
}

impl TierStore for DiskTier {
    fn id(&self) -> TierId {
        TierId::Disk
    }

    fn run(&mut self, job: Job) -> Outcome {
        let outcome = match job {
            Job::Read(key) => self.get(&key).map(|found| found.map_or(Outcome::Missing, Outcome::Found)),
            Job::Write(key, bytes) => self.put(key, &bytes).map(|_| Outcome::Stored),
            Job::Quarantine(key) => {
                DiskTier::quarantine(self, &key);
                Ok(Outcome::Missing)
            }
            Job::Clear => DiskTier::clear(self).map(|()| Outcome::Missing),
        };
        outcome.unwrap_or_else(Outcome::Fault)
    }

    fn take_lost(&mut self) -> Vec<StoredKey> {
        DiskTier::take_lost(self)
    }

    fn flush(&mut self) -> Result<(), Fault> {
        DiskTier::flush(self)
    }
}

// Writing.
impl DiskTier {
    fn try_put(&mut self, key: StoredKey, payload: &[u8]) -> Result<bool, Fault> {
        self.check_writer()?;
        if let Some(place) = self.index.get(&key) {
            self.touch(place.segment);
            return Ok(false);
        }
        self.try_append(key, payload).map(|()| true)
    }

    fn try_append(&mut self, key: StoredKey, payload: &[u8]) -> Result<(), Fault> {
        self.check_writer()?;
        let (bytes, limit_bytes) = (payload.len() as u64, self.options.max_payload_bytes);
        if bytes > limit_bytes {
            return Err(Fault::TooLong { bytes, limit_bytes });
        }
        let record_bytes = record_bytes(bytes);
        let (id, nonce) = self.segment_with_room(record_bytes)?;
        self.make_room(record_bytes, 1)?;
        let sequence = self.next_sequence;
        let record = RecordHeader::record(key, nonce, sequence, payload);
        let offset = self.append(id, &record)?;
        self.next_sequence += 1;
        self.index_place(key, Place { segment: id, offset, payload_bytes: bytes, sequence });
        self.touch(id);
        self.stats.stored += 1;
        Ok(())
    }

    /// The open segment, or a new one when it has no room for `record_bytes`.
    fn segment_with_room(&mut self, record_bytes: u64) -> Result<(u64, Nonce), Fault> {
        if let Some((id, segment)) = self.open.and_then(|id| Some((id, self.segments.get(&id)?)))
            && let Some(nonce) = segment.nonce
            && segment.bytes + record_bytes <= self.options.segment_bytes
        {
            return Ok((id, nonce));
        }
        self.open = None;
        self.make_room(PAGE_BYTES + record_bytes, 1)?;
        // A number is used once, also when this fails: the file may be there all the same.
        let id = self.next_segment;
        self.next_segment += 1;
        self.files.create(id).map_err(|error| io_fault("create a segment", &error))?;
        let nonce = self.nonce(id);
        let segment = Segment {
            nonce: Some(nonce),
            bytes: 0,
            keys: Vec::new(),
            last_used: self.clock,
            is_dirty: true,
            name_is_durable: false,
        };
        self.segments.insert(id, segment);
        self.open = Some(id);
        let written = self.append(id, &segment_page(id, nonce));
        if let Err(fault) = written {
            // Without its first page nothing in it would be believed.
            let _ = self.remove_segment(id);
            return Err(fault);
        }
        Ok((id, nonce))
    }

    /// Writes at the end of the open segment and says where. After a failure the file is cut to what it was, or closed
    /// when that fails too.
    fn append(&mut self, id: u64, bytes: &[u8]) -> Result<u64, Fault> {
        let offset = self.segments.get(&id).expect("the open segment is listed").bytes;
        // Counted before it is written: no failure can leave more on the disk than is counted.
        self.grow(id, bytes.len() as u64);
        let mut written = 0;
        let failure = loop {
            match self.files.write_at(id, offset + written as u64, &bytes[written..]) {
                Ok(0) => break io::Error::from(io::ErrorKind::WriteZero),
                Ok(count) => written += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => break error,
            }
            if written == bytes.len() {
                return Ok(offset);
            }
        };
        match self.files.truncate(id, offset) {
            Ok(()) => self.shrink(id, bytes.len() as u64),
            Err(_) => self.open = None,
        }
        Err(io_fault("write a record", &failure))
    }

    /// Evicts until `new_bytes` and `new_entries` more fit.
    fn make_room(&mut self, new_bytes: u64, new_entries: usize) -> Result<(), Fault> {
        while self.total_bytes + new_bytes > self.options.budget_bytes
            || self.index.len() + new_entries > MAX_DISK_ENTRIES
            || self.segments.len() >= MAX_DISK_SEGMENTS
        {
            let Some(id) = self.victim() else {
                return Err(Fault::Full { held_bytes: self.total_bytes, budget_bytes: self.options.budget_bytes });
            };
            let before = self.index.len() as u64;
            self.remove_segment(id)?;
            self.stats.evictions += before - self.index.len() as u64;
            self.report.evicted_segments += 1;
        }
        Ok(())
    }

    /// The segment that is given up next: one that holds nothing, else the least recently used, of these the oldest.
    fn victim(&self) -> Option<u64> {
        let closed = self.segments.iter().filter(|(id, _)| Some(**id) != self.open);
        closed.min_by_key(|(id, segment)| (segment.nonce.is_some(), segment.last_used, **id)).map(|(&id, _)| id)
    }

    fn drop_segment(&mut self, id: u64) {
        self.report.dropped_segments += 1;
        if self.access == Access::Write {
            // When it cannot be removed its place stays counted, and it goes first when room is needed.
            let _ = self.remove_segment(id);
        } else {
            self.forget_segment(id);
        }
    }

    /// Forgets a segment's blocks, and removes its file. When the file stays it is still counted.
    fn remove_segment(&mut self, id: u64) -> Result<(), Fault> {
        self.forget_segment(id);
        match self.files.remove(id) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_fault("remove a segment", &error)),
            _ => {
                let removed = self.segments.remove(&id);
                self.total_bytes -= removed.map_or(0, |segment| segment.bytes);
                Ok(())
            }
        }
    }

    fn forget_segment(&mut self, id: u64) {
        if self.open == Some(id) {
            self.open = None;
        }
        let Some(segment) = self.segments.get_mut(&id) else { return };
        segment.nonce = None;
        for key in std::mem::take(&mut segment.keys) {
            if self.index.get(&key).is_some_and(|place| place.segment == id) {
                self.index.remove(&key);
                self.lost.push(key);
            }
        }
    }

    fn forget_damaged(&mut self, key: &StoredKey) {
        self.report.damaged_records += 1;
        if let Some(place) = self.index.remove(key) {
            self.segments.entry(place.segment).and_modify(|segment| segment.keys.retain(|other| other != key));
            self.lost.push(*key);
        }
    }

    fn check_writer(&self) -> Result<(), Fault> {
        if self.access == Access::Write { Ok(()) } else { Err(Fault::ReadOnly) }
    }

    fn touch(&mut self, id: u64) {
        self.clock += 1;
        self.segments.entry(id).and_modify(|segment| segment.last_used = self.clock);
    }

    fn grow(&mut self, id: u64, bytes: u64) {
        self.total_bytes += bytes;
        self.segments.entry(id).and_modify(|segment| {
            segment.bytes += bytes;
            segment.is_dirty = true;
        });
    }

    fn shrink(&mut self, id: u64, bytes: u64) {
        self.total_bytes -= bytes;
        self.segments.entry(id).and_modify(|segment| segment.bytes -= bytes);
    }

    fn nonce(&self, segment: u64) -> Nonce {
        let mut hasher = Sha256::new();
        hasher.update(b"ns-llm segment nonce v1\0");
        hasher.update(self.seed);
        hasher.update(segment.to_le_bytes());
        let hash: [u8; 32] = hasher.finalize().into();
        Nonce(std::array::from_fn(|i| hash[i]))
    }

    fn failed(&mut self, operation: &'static str, error: &io::Error) -> Result<(), Fault> {
        self.stats.faults += 1;
        Err(io_fault(operation, error))
    }
}

// Reading.
impl DiskTier {
    /// The payload of the record at `place`, checked.
    fn read(&mut self, key: &StoredKey, place: Place) -> Result<Arc<[u8]>, Fault> {
        let segment = self.segments.get(&place.segment).expect("the index names listed segments");
        let expected = Expected {
            nonce: segment.nonce.expect("the index names believed segments"),
            last_sequence: place.sequence.checked_sub(1),
            max_payload_bytes: place.payload_bytes,
            rest_bytes: segment.bytes - place.offset,
        };
        let mut header = [0; HEADER_BYTES];
        self.read_exact(place.segment, place.offset, &mut header)?;
        let parsed = RecordHeader::parse(&header, &expected)?;
        if (parsed.key, parsed.payload_bytes, parsed.sequence) != (*key, place.payload_bytes, place.sequence) {
            return Err(Damage::Key.into());
        }
        // Made where it will stay: blocks are large, and fresh memory is slow.
        let mut payload: Arc<[u8]> = std::iter::repeat_n(0, place.payload_bytes as usize).collect();
        let place_of_payload = place.offset + HEADER_BYTES as u64;
        self.read_exact(place.segment, place_of_payload, Arc::get_mut(&mut payload).expect("nobody else has it yet"))?;
        parsed.check_payload(&header, &payload)?;
        Ok(payload)
    }

    fn read_exact(&mut self, segment: u64, offset: u64, buffer: &mut [u8]) -> Result<(), Fault> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.files.read_at(segment, offset + filled as u64, &mut buffer[filled..]) {
                Ok(0) => return Err(Damage::Truncated.into()),
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(io_fault("read a record", &error)),
            }
        }
        Ok(())
    }

    /// Takes a file's records into the index, and cuts its torn end.
    fn scan(&mut self, file: SegmentFile) {
        let SegmentFile { segment: id, bytes, .. } = file;
        let mut page = vec![0; PAGE_BYTES as usize];
        let nonce = self.read_exact(id, 0, &mut page).and_then(|()| Ok(parse_segment_page(&page, id)?));
        self.total_bytes += bytes;
        self.clock += 1;
        let segment = Segment {
            nonce: nonce.as_ref().ok().copied(),
            bytes,
            keys: Vec::new(),
            last_used: self.clock,
            // The process before may have ended without a flush: nothing says that the medium has what can be read.
            is_dirty: self.access == Access::Write,
            name_is_durable: self.access == Access::Read,
        };
        self.segments.insert(id, segment);
        match nonce {
            Ok(nonce) => self.scan_records(id, nonce, bytes),
            Err(Fault::Damaged(_)) => {
                self.report.damaged_segments += 1;
                self.report.inner_damage += u64::from(bytes > PAGE_BYTES);
                if self.access == Access::Write {
                    let removed = self.remove_segment(id);
                    self.stats.faults += u64::from(removed.is_err());
                }
            }
            Err(_) => {
                self.stats.faults += 1;
                self.report.inner_damage += 1;
            }
        }
    }

    fn scan_records(&mut self, id: u64, nonce: Nonce, bytes: u64) {
        let (mut offset, mut sound_end) = (PAGE_BYTES, PAGE_BYTES);
        let (mut last_sequence, mut is_in_damage) = (None, false);
        let mut header = [0; HEADER_BYTES];
        while offset + HEADER_BYTES as u64 <= bytes {
            if self.read_exact(id, offset, &mut header).is_err() {
                // What follows is not known, so nothing is cut and nothing is appended.
                self.stats.faults += 1;
                self.report.inner_damage += 1;
                return;
            }
            // Engines with larger blocks may share the directory; the file bounds what a header can claim.
            let max_payload_bytes = u64::MAX;
            let expected = Expected { nonce, last_sequence, max_payload_bytes, rest_bytes: bytes - offset };
            match RecordHeader::parse(&header, &expected) {
                Ok(record) => {
                    self.index_record(id, offset, &record);
                    last_sequence = Some(record.sequence);
                    offset += record_bytes(record.payload_bytes);
                    sound_end = offset;
                    self.report.inner_damage += u64::from(is_in_damage);
                    is_in_damage = false;
                }
                // Its length is not to be trusted: the next record is looked for on each page.
                Err(_) => {
                    self.report.damaged_records += u64::from(!is_in_damage);
                    is_in_damage = true;
                    offset += PAGE_BYTES;
                }
            }
        }
        self.cut(id, sound_end, bytes);
    }

    fn index_record(&mut self, id: u64, offset: u64, record: &RecordHeader) {
        let place = Place { segment: id, offset, payload_bytes: record.payload_bytes, sequence: record.sequence };
        self.index_place(record.key, place);
        self.next_sequence = self.next_sequence.max(record.sequence + 1);
    }

    /// The block is found at `place`, and no longer where it was.
    fn index_place(&mut self, key: StoredKey, place: Place) {
        if let Some(older) = self.index.insert(key, place) {
            self.segments.entry(older.segment).and_modify(|segment| segment.keys.retain(|other| *other != key));
        }
        self.segments.entry(place.segment).and_modify(|segment| segment.keys.push(key));
    }

    /// Removes what follows the last sound record; then records may be appended.
    fn cut(&mut self, id: u64, sound_end: u64, bytes: u64) {
        if self.access == Access::Read {
            return;
        }
        if sound_end < bytes {
            if self.files.truncate(id, sound_end).is_err() {
                self.stats.faults += 1;
                return;
            }
            self.shrink(id, bytes - sound_end);
            self.report.cut_bytes += bytes - sound_end;
        }
        // One that is longer than segments are now would only stand in the way of eviction.
        self.open = Some(id).filter(|_| sound_end <= self.options.segment_bytes);
    }

    /// After opening: less budget than last time, or more blocks than are remembered.
    fn trim(&mut self) {
        let fitted = match self.access {
            Access::Write => self.make_room(0, 0),
            Access::Read => {
                while self.index.len() > MAX_DISK_ENTRIES {
                    let Some(id) = self.segments.iter().find(|(_, segment)| segment.nonce.is_some()) else { break };
                    let id = *id.0;
                    self.forget_segment(id);
                }
                Ok(())
            }
        };
        self.stats.faults += u64::from(fitted.is_err());
    }
}

fn io_fault(operation: &'static str, error: &io::Error) -> Fault {
    Fault::Io { operation, kind: error.kind(), reason: error.to_string() }
}

/// Keeps the first fault of several.
fn keep_first(first: &mut Result<(), Fault>, next: Result<(), Fault>) {
    if first.is_ok() {
        *first = next;
    }
}

impl std::fmt::Debug for DiskTier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DiskTier")
            .field("options", &self.options)
            .field("report", &self.report())
            .finish_non_exhaustive()
    }
}
