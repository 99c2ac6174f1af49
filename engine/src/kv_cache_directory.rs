//! For those who look after a directory in which KV blocks outlive the process, and answers beneath them: what is in it,
//! whether that is as it was written, and how to make it smaller or empty. A directory that is none of ours is refused,
//! links are never followed, and nothing but segment files is ever removed.
//!
//! Looking needs no lock and may be done while an engine writes. Removing takes the lock and is refused while
//! another process has it; an engine that opens the directory at that moment only reads from it.

use std::path::Path;
use std::time::{Duration, SystemTime};

use crate::error::{Error, Result};
use crate::storage::disk::{self, Directory, FORMAT_VERSION, SegmentFile, SegmentFiles, Survey};

/// What is in a directory. Of answers, and what makes them invalid, the words about blocks and KV hold as well.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Contents {
    /// Version of the format that this build reads and writes.
    pub format_version: u32,
    /// A process writes to it now. Then the last bytes may be in the middle of being written.
    pub has_writer: bool,
    /// Segment files of that version.
    pub segments: u64,
    /// Bytes of these files.
    pub bytes: u64,
    /// Stored records that are sound, as far as they were read.
    pub records: u64,
    /// Blocks that can be found: of those that were stored twice, the newer record.
    pub live: u64,
    /// Bytes of KV in the records.
    pub payload_bytes: u64,
    /// Damaged places.
    pub damaged: u64,
    /// The first thousand of them.
    pub damage: Vec<Damage>,
    /// Bytes that were not written to the end. A process that was killed leaves some; the next opening cuts them off.
    pub torn_bytes: u64,
    /// Segment files of other versions, which are left alone.
    pub other_versions: u64,
    /// Bytes of these.
    pub other_version_bytes: u64,
    /// The answers in the directory beneath, which nothing else here counts; `None`: there is none.
    pub answers: Option<Box<Contents>>,
}

impl Contents {
    /// Damaged places, of the answers as well.
    pub fn damaged_in_all(&self) -> u64 {
        self.damaged + self.answers.as_ref().map_or(0, |answers| answers.damaged)
    }
}

/// A place where something else stands than was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// Name of the file in the directory.
    pub file: String,
    /// Byte in the file where the record begins.
    pub offset: u64,
    /// What is wrong.
    pub reason: String,
}

/// What was removed, and what is left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Removed {
    /// Segment files that were removed.
    pub segments: u64,
    /// Bytes of them.
    pub bytes: u64,
    /// Segment files that are left.
    pub kept_segments: u64,
    /// Bytes of these.
    pub kept_bytes: u64,
}

/// What may stay when a directory is pruned; `None`: no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PruneLimits {
    /// Bytes of all segment files, those of answers as well.
    pub max_bytes: Option<u64>,
    /// Time since a segment was written last.
    pub max_age: Option<Duration>,
}

/// Reads the headers of all records.
pub fn stat(path: &Path) -> Result<Contents> {
    contents_and_answers(path, false)
}

/// Reads every record, and checks both of its checksums.
pub fn verify(path: &Path) -> Result<Contents> {
    contents_and_answers(path, true)
}

/// Removes the oldest segments until the rest is within `limits`. Segments of other versions are left alone. Answers go last and
/// all at once, when they alone are too much or all of them too old: what makes some of them invalid lies among them.
pub fn prune(path: &Path, limits: PruneLimits) -> Result<Removed> {
    let mut blocks = Segments::seize(path)?;
    let answers_path = path.join(disk::ANSWERS);
    let Some(mut answers) = answers_path.is_dir().then(|| Segments::seize(&answers_path)).transpose()? else {
        blocks.remove_oldest(limits)?;
        return blocks.finish();
    };
    answers.remove_whole(limits)?;
    let left = limits.max_bytes.map(|max_bytes| max_bytes.saturating_sub(answers.removed.kept_bytes));
    blocks.remove_oldest(PruneLimits { max_bytes: left, ..limits })?;
    let (blocks, answers) = (blocks.finish()?, answers.finish()?);
    Ok(Removed {
        segments: blocks.segments + answers.segments,
        bytes: blocks.bytes + answers.bytes,
        kept_segments: blocks.kept_segments + answers.kept_segments,
        kept_bytes: blocks.kept_bytes + answers.kept_bytes,
    })
}

/// The segments of a directory that nobody writes now, oldest first.
struct Segments<'a> {
    path: &'a Path,
    directory: Directory,
    files: Vec<SegmentFile>,
    removed: Removed,
}

impl<'a> Segments<'a> {
    fn seize(path: &'a Path) -> Result<Self> {
        let mut directory = Directory::seize(path)?;
        let mut files = directory.list().map_err(|error| io_error(path, &error))?;
        files.retain(|file| file.version == FORMAT_VERSION);
        files.sort_by_key(|file| file.segment);
        let (kept_segments, kept_bytes) = (files.len() as u64, files.iter().map(|file| file.bytes).sum());
        let removed = Removed { kept_segments, kept_bytes, ..Removed::default() };
        Ok(Segments { path, directory, files, removed })
    }

    /// Time since a segment was written last.
    fn age(&self, file: &SegmentFile, now: SystemTime) -> Result<Duration> {
        let modified = self.directory.modified(file.segment).map_err(|error| io_error(self.path, &error))?;
        // A time that lies ahead is no age.
        Ok(now.duration_since(modified).unwrap_or_default())
    }

    /// Removes the oldest until the rest is not too much, and those that are too old.
    fn remove_oldest(&mut self, limits: PruneLimits) -> Result<()> {
        let now = SystemTime::now();
        for file in std::mem::take(&mut self.files) {
            let age = self.age(&file, now)?;
            let is_too_old = limits.max_age.is_some_and(|max_age| age > max_age);
            let is_too_much = limits.max_bytes.is_some_and(|max_bytes| self.removed.kept_bytes > max_bytes);
            if is_too_old || is_too_much {
                self.remove(&file)?;
            }
        }
        Ok(())
    }

    /// Removes all or none: whether they are too much, or all of them too old.
    fn remove_whole(&mut self, limits: PruneLimits) -> Result<()> {
        let now = SystemTime::now();
        let ages = self.files.iter().map(|file| self.age(file, now)).collect::<Result<Vec<_>>>()?;
        let youngest = ages.into_iter().min();
        let is_too_old = limits.max_age.zip(youngest).is_some_and(|(max_age, age)| age > max_age);
        let is_too_much = limits.max_bytes.is_some_and(|max_bytes| self.removed.kept_bytes > max_bytes);
        if is_too_old || is_too_much {
            std::mem::take(&mut self.files).iter().try_for_each(|file| self.remove(file))?;
        }
        Ok(())
    }

    fn remove(&mut self, file: &SegmentFile) -> Result<()> {
        self.directory.remove(file.segment).map_err(|error| io_error(self.path, &error))?;
        self.removed.segments += 1;
        self.removed.bytes += file.bytes;
        self.removed.kept_segments -= 1;
        self.removed.kept_bytes -= file.bytes;
        Ok(())
    }

    /// Waits until that is on the medium.
    fn finish(mut self) -> Result<Removed> {
        self.directory.sync_directory().map_err(|error| io_error(self.path, &error))?;
        Ok(self.removed)
    }
}

/// Removes the segments of all versions, and those of the answers beneath. The directories stay, with their locks and
/// whatever else is in them.
pub fn clear(path: &Path) -> Result<Removed> {
    let (mut segments, mut bytes) = Directory::seize(path)?.remove_all().map_err(|error| io_error(path, &error))?;
    let answers = path.join(disk::ANSWERS);
    if answers.is_dir() {
        let removed = Directory::seize(&answers)?.remove_all().map_err(|error| io_error(&answers, &error))?;
        segments += removed.0;
        bytes += removed.1;
    }
    Ok(Removed { segments, bytes, ..Removed::default() })
}

fn contents_and_answers(path: &Path, reads_payloads: bool) -> Result<Contents> {
    let contents = contents(path, reads_payloads)?;
    let answers = path.join(disk::ANSWERS);
    let answers = answers.is_dir().then(|| self::contents(&answers, reads_payloads)).transpose()?;
    Ok(Contents { answers: answers.map(Box::new), ..contents })
}

fn contents(path: &Path, reads_payloads: bool) -> Result<Contents> {
    let mut directory = Directory::look(path)?;
    let has_writer = directory.has_writer()?;
    let Survey {
        segments,
        bytes,
        records,
        live,
        payload_bytes,
        damaged,
        places,
        torn_bytes,
        other_versions,
        other_version_bytes,
    } = disk::survey(&mut directory, reads_payloads).map_err(|error| io_error(path, &error))?;
    let damage = places.into_iter().map(|place| Damage {
        file: disk::file_name(place.segment),
        offset: place.offset,
        reason: place.reason,
    });
    Ok(Contents {
        format_version: FORMAT_VERSION,
        has_writer,
        segments,
        bytes,
        records,
        live,
        payload_bytes,
        damaged,
        damage: damage.collect(),
        torn_bytes,
        other_versions,
        other_version_bytes,
        answers: None,
    })
}

fn io_error(path: &Path, error: &std::io::Error) -> Error {
    Error::Io { path: path.to_path_buf(), reason: error.to_string() }
}
