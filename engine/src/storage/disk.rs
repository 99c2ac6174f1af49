//! The disk store: records in append-only segment files, found again after a restart and after `kill -9`.
//!
//! **Contract.** It always opens; it never returns bytes that were not stored under the key; it loses at most what was not
//! flushed; its files never exceed the budget, not while it writes either; a fault is a miss.
//!
//! **How.** A record ([`record`]) is there whole or not at all. Records are appended and never changed. The index
//! lives in memory and is rebuilt from the records' headers at opening: a torn end is cut off, damaged records are
//! skipped and counted. A payload is checked each time it is read. Room is made by removing whole segments, the least
//! recently used first; a file is never used again for something else. Where owners have a share, each has segments of his
//! own, and those of one over his share go first.
//!
//! **Sync policy.** Writing does not wait for the medium: for a cache a torn record is a miss. [`DiskStore::flush`] does:
//! what was stored before it returned `Ok` outlives a power failure. A sync that failed is not tried again, for the system
//! may have dropped the bytes and forgotten that it had to write them: the segment is removed.
//!
//! Owns no thread and no clock; its files are behind [`SegmentFiles`]. Invariants: [`DiskStore::check_invariants`].

mod buffers;
mod directory;
mod options;
mod record;
mod survey;

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::Arc;

use sha2::{Digest, Sha256};

use crate::config::{MAX_DISK_ENTRIES, MAX_DISK_SEGMENTS};
use crate::error::Error;
use crate::ids::OwnerKey;
use crate::storage::fault::{Damage, Fault};
use crate::storage::key::RecordKey;
use crate::storage::tier::TierStats;
use buffers::ReadBuffers;
pub use directory::{ANSWERS, Access, Directory, SegmentFile, SegmentFiles, draw_seed, file_name};
pub use options::{DiskOptions, DiskReport};
use record::{
    Expected, HEADER_BYTES, RecordHeader, SegmentOwner, parse_segment_owner, parse_segment_page, segment_page,
};
pub use record::{FORMAT_VERSION, Nonce, PAGE_BYTES, record_bytes};
pub use survey::{DamagedPlace, Survey, survey};

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
    /// Whom its records count for.
    owner: SegmentOwner,
    /// Upper bound of the file's length.
    bytes: u64,
    /// Keys of its records, in their order.
    keys: Vec<RecordKey>,
    /// On [`DiskStore::clock`], a count of uses.
    last_used: u64,
    /// Written since its last sync.
    is_dirty: bool,
    /// Its name is on the medium.
    name_is_durable: bool,
}

/// The records of one directory.
pub struct DiskStore {
    files: Box<dyn SegmentFiles>,
    options: DiskOptions,
    access: Access,
    seed: [u8; 16],
    segments: BTreeMap<u64, Segment>,
    /// The segment that records of an owner are appended to: his newest.
    open: BTreeMap<SegmentOwner, u64>,
    /// Only looked up, never iterated: its order reaches no result.
    index: HashMap<RecordKey, Place>,
    total_bytes: u64,
    next_segment: u64,
    next_sequence: u64,
    clock: u64,
    lost: Vec<RecordKey>,
    buffers: ReadBuffers,
    stats: TierStats,
    report: DiskReport,
}

impl DiskStore {
    /// Finds the records of earlier lives. `seed`: random bytes, new for each opening. Fails only when the directory
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
        let mut tier = DiskStore {
            files,
            options,
            access,
            seed,
            segments: BTreeMap::new(),
            open: BTreeMap::new(),
            index: HashMap::new(),
            total_bytes: 0,
            next_segment: found.last().map_or(0, |file| file.segment + 1),
            next_sequence: 0,
            clock: 0,
            lost: Vec::new(),
            buffers: ReadBuffers::default(),
            stats: TierStats::default(),
            report: DiskReport::default(),
        };
        for file in found {
            tier.scan(file);
            tier.trim();
        }
        // What was lost before anyone could know that it was there is no news.
        tier.lost.clear();
        Ok(tier)
    }

    /// Whether the record is here. It may still turn out to be damaged.
    pub fn contains(&self, key: &RecordKey) -> bool {
        self.index.contains_key(key)
    }

    /// Keys of all records, oldest record first.
    pub fn keys(&self) -> impl Iterator<Item = &RecordKey> {
        let is_here = |(id, key): &(&u64, &RecordKey)| self.index.get(key).is_some_and(|place| place.segment == **id);
        let all = self.segments.iter().flat_map(|(id, segment)| segment.keys.iter().map(move |key| (id, key)));
        all.filter(is_here).map(|(_, key)| key)
    }

    /// Stores a record of no owner in particular; false: it was here already. Others may go for it ([`DiskStore::take_lost`]).
    pub fn put(&mut self, key: RecordKey, payload: &[u8]) -> Result<bool, Fault> {
        self.put_for(&OwnerKey::default(), key, payload)
    }

    /// The same for an owner.
    pub fn put_for(&mut self, owner: &OwnerKey, key: RecordKey, payload: &[u8]) -> Result<bool, Fault> {
        let stored = self.try_put(self.segment_owner(owner), key, payload);
        self.stats.faults += u64::from(stored.is_err());
        stored
    }

    /// Stores what is found by `key` from now on, in the place of what was there: also after a restart, for the later of
    /// two records counts.
    pub fn replace(&mut self, owner: &OwnerKey, key: RecordKey, payload: &[u8]) -> Result<(), Fault> {
        let stored = self.try_append(self.segment_owner(owner), key, payload);
        self.stats.faults += u64::from(stored.is_err());
        stored
    }

    /// Reads a record and checks it. `None`: it is not here.
    pub fn get(&mut self, key: &RecordKey) -> Result<Option<Arc<[u8]>>, Fault> {
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

    /// Removes every record, and waits until that is on the medium.
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

    /// The use of a record ended in an error of the engine: neither it nor what was written beside it is used again, also
    /// not after a restart. (Removing the one record would mean to change a file in place.)
    pub fn quarantine(&mut self, key: &RecordKey) {
        let Some(&place) = self.index.get(key) else { return };
        self.drop_segment(place.segment);
    }

    /// Keys of the records that were here and are not any more, since the last call.
    pub fn take_lost(&mut self) -> Vec<RecordKey> {
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
    /// budget; an open segment is the newest of its owner.
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
        let newest_of =
            |owner| self.segments.iter().rev().find(|(_, segment)| segment.owner == owner).map(|(&id, _)| id);
        match self.open.iter().find(|&(&owner, &id)| newest_of(owner) != Some(id)) {
            Some((_, id)) => broken(format!("the open segment {id} is not the newest of its owner")),
            None => Ok(()),
        }
    }
}

// Writing.
impl DiskStore {
    /// Whose segments his records are in.
    fn segment_owner(&self, owner: &OwnerKey) -> SegmentOwner {
        match self.options.quota_bytes {
            Some(_) => SegmentOwner(std::array::from_fn(|i| owner[i])),
            None => SegmentOwner::default(),
        }
    }

    fn try_put(&mut self, owner: SegmentOwner, key: RecordKey, payload: &[u8]) -> Result<bool, Fault> {
        self.check_writer()?;
        if let Some(place) = self.index.get(&key) {
            self.touch(place.segment);
            return Ok(false);
        }
        self.try_append(owner, key, payload).map(|()| true)
    }

    fn try_append(&mut self, owner: SegmentOwner, key: RecordKey, payload: &[u8]) -> Result<(), Fault> {
        self.check_writer()?;
        let (bytes, limit_bytes) = (payload.len() as u64, self.options.max_payload_bytes);
        if bytes > limit_bytes {
            return Err(Fault::TooLong { bytes, limit_bytes });
        }
        let record_bytes = record_bytes(bytes);
        let (id, nonce) = self.segment_with_room(owner, record_bytes)?;
        self.make_room(record_bytes, 1, Some(id))?;
        let sequence = self.next_sequence;
        let record = RecordHeader::record(key, nonce, sequence, payload);
        let offset = self.append(id, &record)?;
        self.next_sequence += 1;
        self.index_place(key, Place { segment: id, offset, payload_bytes: bytes, sequence });
        self.touch(id);
        self.stats.stored += 1;
        Ok(())
    }

    /// The owner's open segment, or a new one when it has no room for `record_bytes`.
    fn segment_with_room(&mut self, owner: SegmentOwner, record_bytes: u64) -> Result<(u64, Nonce), Fault> {
        if let Some((id, segment)) = self.open.get(&owner).and_then(|&id| Some((id, self.segments.get(&id)?)))
            && let Some(nonce) = segment.nonce
            && segment.bytes + record_bytes <= self.options.segment_bytes
        {
            return Ok((id, nonce));
        }
        self.open.remove(&owner);
        self.make_room(PAGE_BYTES + record_bytes, 1, None)?;
        // A number is used once, also when this fails: the file may be there all the same.
        let id = self.next_segment;
        self.next_segment += 1;
        self.files.create(id).map_err(|error| io_fault("create a segment", &error))?;
        let nonce = self.nonce(id);
        let segment = Segment {
            nonce: Some(nonce),
            owner,
            bytes: 0,
            keys: Vec::new(),
            last_used: self.clock,
            is_dirty: true,
            name_is_durable: false,
        };
        self.segments.insert(id, segment);
        self.open.insert(owner, id);
        let written = self.append(id, &segment_page(id, nonce, owner));
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
            Err(_) => self.close_segment(id),
        }
        Err(io_fault("write a record", &failure))
    }

    /// Nothing is appended to it any more.
    fn close_segment(&mut self, id: u64) {
        self.open.retain(|_, open| *open != id);
    }

    /// Evicts until `new_bytes` and `new_entries` more fit, which go to the segment `target`.
    fn make_room(&mut self, new_bytes: u64, new_entries: usize, target: Option<u64>) -> Result<(), Fault> {
        while self.total_bytes + new_bytes > self.options.budget_bytes
            || self.index.len() + new_entries > MAX_DISK_ENTRIES
            || self.segments.len() >= MAX_DISK_SEGMENTS
        {
            let Some(id) = self.victim(target) else {
                return Err(Fault::Full { held_bytes: self.total_bytes, budget_bytes: self.options.budget_bytes });
            };
            let before = self.index.len() as u64;
            self.remove_segment(id)?;
            self.stats.evictions += before - self.index.len() as u64;
            self.report.evicted_segments += 1;
        }
        Ok(())
    }

    /// The segment that is given up next, but `kept`: one that holds nothing, else one of the owner who is over his quota by
    /// most, else any; of these the least recently used, then the oldest. Without owners the open one stays.
    fn victim(&self, kept: Option<u64>) -> Option<u64> {
        let kept = kept.or_else(|| self.open.get(&SegmentOwner::default()).copied());
        let over_quota = self.options.quota_bytes.and_then(|quota_bytes| self.heaviest_over(quota_bytes));
        let rank = |(id, segment): &(&u64, &Segment)| {
            let is_his = over_quota == Some(segment.owner);
            (segment.nonce.is_some(), !is_his, segment.last_used, **id)
        };
        self.segments.iter().filter(|(id, _)| Some(**id) != kept).min_by_key(rank).map(|(&id, _)| id)
    }

    /// Who holds most, if that is more than his quota.
    fn heaviest_over(&self, quota_bytes: u64) -> Option<SegmentOwner> {
        let mut held_bytes: BTreeMap<SegmentOwner, u64> = BTreeMap::new();
        self.segments.values().for_each(|segment| *held_bytes.entry(segment.owner).or_default() += segment.bytes);
        let over = held_bytes.into_iter().filter(|(_, bytes)| *bytes > quota_bytes);
        over.max_by_key(|(_, bytes)| *bytes).map(|(owner, _)| owner)
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

    /// Forgets a segment's records, and removes its file. When the file stays it is still counted.
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
        self.close_segment(id);
        let Some(segment) = self.segments.get_mut(&id) else { return };
        segment.nonce = None;
        for key in std::mem::take(&mut segment.keys) {
            if self.index.get(&key).is_some_and(|place| place.segment == id) {
                self.index.remove(&key);
                self.lost.push(key);
            }
        }
    }

    fn forget_damaged(&mut self, key: &RecordKey) {
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
impl DiskStore {
    /// The payload of the record at `place`, checked.
    fn read(&mut self, key: &RecordKey, place: Place) -> Result<Arc<[u8]>, Fault> {
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
        let mut payload = self.buffers.take(place.payload_bytes as usize);
        let place_of_payload = place.offset + HEADER_BYTES as u64;
        self.read_exact(place.segment, place_of_payload, Arc::get_mut(&mut payload).expect("nobody else has it yet"))?;
        parsed.check_payload(&header, &payload)?;
        self.buffers.note(&payload);
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
        let owner = if nonce.is_ok() { parse_segment_owner(&page) } else { SegmentOwner::default() };
        // This one is newer.
        self.open.remove(&owner);
        self.total_bytes += bytes;
        self.clock += 1;
        let segment = Segment {
            nonce: nonce.as_ref().ok().copied(),
            owner,
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
            // Engines with larger records may share the directory; the file bounds what a header can claim.
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
        // Segments of several owners are written side by side: the later record may be in the older one.
        let is_newer = |older: &Place| older.sequence <= record.sequence;
        if self.index.get(&record.key).is_none_or(is_newer) {
            self.index_place(record.key, place);
        }
        self.next_sequence = self.next_sequence.max(record.sequence + 1);
    }

    /// The record is found at `place`, and no longer where it was.
    fn index_place(&mut self, key: RecordKey, place: Place) {
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
        if sound_end <= self.options.segment_bytes
            && let Some(segment) = self.segments.get(&id)
        {
            self.open.insert(segment.owner, id);
        }
    }

    /// After opening: less budget than last time, or more records than are remembered.
    fn trim(&mut self) {
        let fitted = match self.access {
            Access::Write => self.make_room(0, 0, None),
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

impl std::fmt::Debug for DiskStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DiskStore")
            .field("options", &self.options)
            .field("report", &self.report())
            .finish_non_exhaustive()
    }
}
