//! A disk in memory that fails when it is told to: the n-th call, in one of six ways. It keeps what was synced apart from
//! what was only written, so that a crash can lose, reorder and tear the rest. It checks on each call that the files stay
//! within a budget.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::sync::{Arc, Mutex, MutexGuard};

use ns_llm::sampler::random_at;
use ns_llm::storage::disk::{SegmentFile, SegmentFiles};

/// Unit in which a device writes: a torn write keeps whole ones.
const SECTOR_BYTES: usize = 512;
/// Calls for which a full disk stays full.
const FULL_CALLS: u64 = 20;

/// How a call fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultKind {
    /// An error, and nothing was done.
    Error,
    /// Half of a read or a write, which is no error; an error for other calls.
    Short,
    /// An error, though a part was done: some sectors of a write, all of another call.
    Torn,
    /// The process and the machine end: unsynced bytes and names are lost, in part and in any order.
    Crash,
    /// A bit is another one than was written or stored.
    BitFlip,
    /// No space is left, for some time: first a short write, then errors.
    NoSpace,
}

/// All of them.
pub const FAULT_KINDS: [FaultKind; 6] =
    [FaultKind::Error, FaultKind::Short, FaultKind::Torn, FaultKind::Crash, FaultKind::BitFlip, FaultKind::NoSpace];

#[derive(Debug, Clone, Default)]
struct SimFile {
    /// As the process sees it.
    bytes: Vec<u8>,
    /// As the medium surely has it.
    synced: Vec<u8>,
    /// What happened since, in order.
    unsynced: Vec<Change>,
}

#[derive(Debug, Clone)]
enum Change {
    Write(usize, Vec<u8>),
    Truncate(usize),
}

#[derive(Debug)]
enum NameChange {
    Created(u64),
    Removed(u64, SimFile),
}

#[derive(Debug, Default)]
struct State {
    files: BTreeMap<u64, SimFile>,
    /// Since the directory was synced. A journal keeps their order, so a crash loses the last ones.
    names: Vec<NameChange>,
    version: u32,
    num_calls: u64,
    fault: Option<(u64, FaultKind)>,
    num_injected: u64,
    is_down: bool,
    seed: u64,
    num_draws: u64,
    max_bytes: u64,
}

/// A handle on the disk; the tier has another one.
#[derive(Debug, Clone)]
pub struct SimDisk(Arc<Mutex<State>>);

impl SimDisk {
    pub fn new(seed: u64) -> Self {
        SimDisk(Arc::new(Mutex::new(State { version: 1, seed, ..State::default() })))
    }
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("no call panics")
    }
    /// What the disk's random numbers begin with.
    pub fn seed(&self) -> u64 {
        self.state().seed
    }
    pub fn num_calls(&self) -> u64 {
        self.state().num_calls
    }
    /// The call of this number, counted from 0, fails.
    pub fn fail(&self, call: u64, kind: FaultKind) {
        self.state().fault = Some((call, kind));
    }
    /// From now on all is well.
    pub fn heal(&self) {
        self.state().fault = None;
    }
    /// Faults that had an effect.
    pub fn num_injected(&self) -> u64 {
        self.state().num_injected
    }
    /// Most bytes that there were after any call, since the last time.
    pub fn take_max_bytes(&self) -> u64 {
        std::mem::take(&mut self.state().max_bytes)
    }
    /// The version that the names of all files tell.
    pub fn set_version(&self, version: u32) {
        self.state().version = version;
    }
    /// All files.
    pub fn contents(&self) -> BTreeMap<u64, Vec<u8>> {
        self.state().files.iter().map(|(&id, file)| (id, file.bytes.clone())).collect()
    }
    /// Replaces all files; they are on the medium.
    pub fn set_contents(&self, files: BTreeMap<u64, Vec<u8>>) {
        let files =
            files.into_iter().map(|(id, bytes)| (id, SimFile { synced: bytes.clone(), bytes, unsynced: Vec::new() }));
        let files = files.collect();
        let mut state = self.state();
        state.files = files;
        state.names.clear();
    }
    /// The power goes: what was not synced is there in part.
    pub fn crash(&self) {
        self.state().crash();
    }
    /// The machine starts again, if it crashed.
    pub fn start_if_down(&self) -> bool {
        let mut state = self.state();
        let was_down = std::mem::take(&mut state.is_down);
        if was_down {
            state.fault = None;
        }
        was_down
    }
}

impl State {
    fn draw(&mut self, bound: usize) -> usize {
        self.num_draws += 1;
        (random_at(self.seed, self.num_draws) % bound.max(1) as u64) as usize
    }

    /// Counts a call, and says how it fails. `None`: it does not.
    fn begin(&mut self, writes: bool) -> io::Result<Option<FaultKind>> {
        let call = self.num_calls;
        self.num_calls += 1;
        if self.is_down {
            return Err(io::Error::other("the machine is down"));
        }
        let Some((at, kind)) = self.fault else { return Ok(None) };
        let is_full = kind == FaultKind::NoSpace && writes && (at + 1..at + FULL_CALLS).contains(&call);
        if call != at && !is_full {
            return Ok(None);
        }
        self.num_injected += 1;
        match kind {
            FaultKind::Crash => {
                self.crash();
                Err(io::Error::other("the machine crashed"))
            }
            FaultKind::Error => Err(io::Error::other("simulated")),
            FaultKind::NoSpace if is_full => Err(ErrorKind::StorageFull.into()),
            _ => Ok(Some(kind)),
        }
    }

    /// For calls that cannot be done by halves: what `kind` means for them, once they are done.
    fn end(&mut self, kind: Option<FaultKind>) -> io::Result<()> {
        self.max_bytes = self.max_bytes.max(self.files.values().map(|file| file.bytes.len() as u64).sum());
        match kind {
            Some(FaultKind::Torn | FaultKind::Short) => Err(io::Error::other("simulated, though it was done")),
            Some(_) => {
                // A flipped bit or a full disk does nothing to such a call.
                self.num_injected -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn file(&mut self, segment: u64) -> io::Result<&mut SimFile> {
        self.files.get_mut(&segment).ok_or_else(|| ErrorKind::NotFound.into())
    }

    fn crash(&mut self) {
        self.is_down = true;
        let kept = self.draw(self.names.len() + 1);
        for change in self.names.split_off(kept).into_iter().rev() {
            match change {
                NameChange::Created(id) => drop(self.files.remove(&id)),
                NameChange::Removed(id, file) => drop(self.files.insert(id, file)),
            }
        }
        self.names.clear();
        let ids: Vec<u64> = self.files.keys().copied().collect();
        for id in ids {
            let mut file = self.files.remove(&id).expect("listed");
            for change in std::mem::take(&mut file.unsynced) {
                match (change, self.draw(4)) {
                    (_, 0) => {}
                    (Change::Truncate(bytes), _) => file.synced.truncate(bytes),
                    (Change::Write(offset, bytes), 1 | 2) => {
                        for (idx, sector) in bytes.chunks(SECTOR_BYTES).enumerate() {
                            if self.draw(2) == 0 {
                                put_at(&mut file.synced, offset + idx * SECTOR_BYTES, sector);
                            }
                        }
                    }
                    (Change::Write(offset, bytes), _) => put_at(&mut file.synced, offset, &bytes),
                }
            }
            file.bytes = file.synced.clone();
            self.files.insert(id, file);
        }
    }
}

fn put_at(target: &mut Vec<u8>, offset: usize, bytes: &[u8]) {
    target.resize(target.len().max(offset + bytes.len()), 0);
    target[offset..offset + bytes.len()].copy_from_slice(bytes);
}

impl SegmentFiles for SimDisk {
    fn list(&mut self) -> io::Result<Vec<SegmentFile>> {
        let mut state = self.state();
        let kind = state.begin(false)?;
        let version = state.version;
        let listed =
            state.files.iter().map(|(&segment, file)| SegmentFile { version, segment, bytes: file.bytes.len() as u64 });
        let listed = listed.collect();
        state.end(kind)?;
        Ok(listed)
    }

    fn create(&mut self, segment: u64) -> io::Result<()> {
        let mut state = self.state();
        let kind = state.begin(true)?;
        if kind == Some(FaultKind::NoSpace) {
            return Err(ErrorKind::StorageFull.into());
        }
        if state.files.contains_key(&segment) {
            return Err(ErrorKind::AlreadyExists.into());
        }
        state.files.insert(segment, SimFile::default());
        state.names.push(NameChange::Created(segment));
        state.end(kind)
    }

    fn read_at(&mut self, segment: u64, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let mut state = self.state();
        let kind = state.begin(false)?;
        let bytes = &state.file(segment)?.bytes;
        let rest = bytes.get(offset as usize..).unwrap_or(&[]);
        let mut count = rest.len().min(buffer.len());
        if kind == Some(FaultKind::Short) && count > 1 {
            count /= 2;
        }
        buffer[..count].copy_from_slice(&rest[..count]);
        match kind {
            Some(FaultKind::Torn) => return Err(io::Error::other("simulated, though a part was read")),
            Some(FaultKind::BitFlip) if count > 0 => {
                let bit = state.draw(count * 8);
                buffer[bit / 8] ^= 1 << (bit % 8);
            }
            Some(FaultKind::NoSpace) => state.num_injected -= 1,
            _ => {}
        }
        Ok(count)
    }

    fn write_at(&mut self, segment: u64, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        let mut state = self.state();
        let kind = state.begin(true)?;
        let mut stored = bytes.to_vec();
        match kind {
            Some(FaultKind::Short | FaultKind::NoSpace) => stored.truncate(bytes.len().div_ceil(2)),
            Some(FaultKind::Torn) => {
                let sectors = state.draw(bytes.len() / SECTOR_BYTES + 1);
                stored.truncate(sectors * SECTOR_BYTES);
            }
            Some(FaultKind::BitFlip) => {
                let bit = state.draw(bytes.len() * 8);
                stored[bit / 8] ^= 1 << (bit % 8);
            }
            _ => {}
        }
        let count = stored.len();
        let file = state.file(segment)?;
        put_at(&mut file.bytes, offset as usize, &stored);
        file.unsynced.push(Change::Write(offset as usize, stored));
        if kind == Some(FaultKind::Torn) {
            state.end(kind)?;
        }
        state.end(None)?;
        Ok(count)
    }

    fn truncate(&mut self, segment: u64, bytes: u64) -> io::Result<()> {
        let mut state = self.state();
        let kind = state.begin(false)?;
        let file = state.file(segment)?;
        file.bytes.truncate(bytes as usize);
        file.unsynced.push(Change::Truncate(bytes as usize));
        state.end(kind)
    }

    fn sync(&mut self, segment: u64) -> io::Result<()> {
        let mut state = self.state();
        let kind = state.begin(false)?;
        // As systems do: after a sync that failed the bytes count as written, and are not on the medium.
        let fails = matches!(kind, Some(FaultKind::Torn | FaultKind::Short));
        let file = state.file(segment)?;
        file.unsynced.clear();
        if !fails {
            file.synced = file.bytes.clone();
        }
        state.end(kind)
    }

    fn sync_directory(&mut self) -> io::Result<()> {
        let mut state = self.state();
        let kind = state.begin(false)?;
        if !matches!(kind, Some(FaultKind::Torn | FaultKind::Short)) {
            state.names.clear();
        }
        state.end(kind)
    }

    fn remove(&mut self, segment: u64) -> io::Result<()> {
        let mut state = self.state();
        let kind = state.begin(false)?;
        let file = state.files.remove(&segment).ok_or(ErrorKind::NotFound)?;
        state.names.push(NameChange::Removed(segment, file));
        state.end(kind)
    }
}
