//! For those who look after a directory in which KV blocks outlive the process: what is in it, whether that is as it was
//! written, and how to make it smaller or empty. A directory that is none of ours is refused, links are never followed, and
//! nothing but segment files is ever removed.
//!
//! Looking needs no lock and may be done while an engine writes. Removing takes the lock and is refused while
//! another process has it; an engine that opens the directory at that moment only reads from it.

use std::path::Path;
use std::time::{Duration, SystemTime};

use crate::error::{Error, Result};
use crate::kv_cache::tiers::disk::{self, Directory, FORMAT_VERSION, SegmentFiles, Survey};

/// What is in a directory.
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
    /// Bytes of all segment files.
    pub max_bytes: Option<u64>,
    /// Time since a segment was written last.
    pub max_age: Option<Duration>,
}

/// Reads the headers of all records.
pub fn stat(path: &Path) -> Result<Contents> {
    contents(path, false)
}

/// Reads every record, and checks both of its checksums.
pub fn verify(path: &Path) -> Result<Contents> {
    contents(path, true)
}

/// Removes the oldest segments until the rest is within `limits`. Segments of other versions are left alone.
pub fn prune(path: &Path, limits: PruneLimits) -> Result<Removed> {
    let mut directory = Directory::seize(path)?;
    let failed = |error: std::io::Error| io_error(path, &error);
    let mut files = directory.list().map_err(failed)?;
    files.retain(|file| file.version == FORMAT_VERSION);
    files.sort_by_key(|file| file.segment);
    let mut removed = Removed {
        kept_segments: files.len() as u64,
        kept_bytes: files.iter().map(|file| file.bytes).sum(),
        ..Removed::default()
    };
    let now = SystemTime::now();
    for file in files {
        let modified = directory.modified(file.segment).map_err(failed)?;
        // A time that lies ahead is no age.
        let age = now.duration_since(modified).unwrap_or_default();
        let is_too_old = limits.max_age.is_some_and(|max_age| age > max_age);
        let is_too_much = limits.max_bytes.is_some_and(|max_bytes| removed.kept_bytes > max_bytes);
        if is_too_old || is_too_much {
            directory.remove(file.segment).map_err(failed)?;
            removed.segments += 1;
            removed.bytes += file.bytes;
            removed.kept_segments -= 1;
            removed.kept_bytes -= file.bytes;
        }
    }
    directory.sync_directory().map_err(failed)?;
    Ok(removed)
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
    })
}

fn io_error(path: &Path, error: &std::io::Error) -> Error {
    Error::Io { path: path.to_path_buf(), reason: error.to_string() }
}
