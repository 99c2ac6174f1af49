//! What the disk store asks of a directory ([`SegmentFiles`], which a test replaces to make every call fail), and the real
//! one. The only place of the storage that writes files.
//!
//! - Names are made here from a version and a number; no text of a request or a file becomes a path.
//! - The directory belongs to the store alone: mode 0700, files 0600, for its contents are as private as the prompts they
//!   came from. A directory that others may enter is made private when it holds nothing but the store's own files, and
//!   refused otherwise.
//! - Links are never followed: neither the directory itself nor a file in it may be one. What does not look like the
//!   store's own file is not opened, counted or removed.
//! - One writer: it holds a lock on the file `lock` for its life, which the system releases at once when the process dies.
//!   Everyone else may read.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use lru::LruCache;

use super::record::{FORMAT_VERSION, MAX_NUMBER};
use crate::config::MAX_OPEN_SEGMENTS;
use crate::error::{Error, Result};

/// A segment file as its directory shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentFile {
    /// Version of its format.
    pub version: u32,
    /// Its number.
    pub segment: u64,
    /// Its length.
    pub bytes: u64,
}

/// The segment files of one directory, by number. Reads and writes may be short, as those of the system.
pub trait SegmentFiles: Send {
    /// All segment files, of any version.
    fn list(&mut self) -> io::Result<Vec<SegmentFile>>;
    /// Makes an empty file; one that is there already is an error.
    fn create(&mut self, segment: u64) -> io::Result<()>;
    /// Reads from `offset`; 0 bytes: the file ends there.
    fn read_at(&mut self, segment: u64, offset: u64, buffer: &mut [u8]) -> io::Result<usize>;
    /// Writes at `offset`.
    fn write_at(&mut self, segment: u64, offset: u64, bytes: &[u8]) -> io::Result<usize>;
    /// Cuts the file to `bytes`.
    fn truncate(&mut self, segment: u64, bytes: u64) -> io::Result<()>;
    /// Returns when the file's bytes are on the medium.
    fn sync(&mut self, segment: u64) -> io::Result<()>;
    /// Returns when the directory's entries are on the medium.
    fn sync_directory(&mut self) -> io::Result<()>;
    /// Removes the file.
    fn remove(&mut self, segment: u64) -> io::Result<()>;
}

/// What a process may do in a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Nobody else writes while this one lives.
    Write,
    /// Another process writes.
    Read,
}

/// A directory of the file system.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    /// Held, never read: the lock ends with it. `None`: this one only looks.
    _lock: Option<File>,
    open: LruCache<u64, File>,
    access: Access,
}

/// Name of the lock.
const LOCK: &str = "lock";
/// Name of the directory beneath that of the KV cache in which the response cache has its answers.
pub const ANSWERS: &str = "answers";
/// How often the lock is tried for by one who comes to write, and by one who only looks whether somebody has it; how long is
/// waited between.
const LOCK_ATTEMPTS: u32 = 40;
const LOOK_ATTEMPTS: u32 = 3;
const LOCK_PAUSE: Duration = Duration::from_millis(5);

impl Directory {
    /// Makes or enters the directory, and takes its lock unless another has it.
    pub fn open(path: &Path) -> Result<Self> {
        let failed = |error: io::Error| failed(path, &error);
        make_private(path).map_err(failed)?;
        let lock_path = path.join(LOCK);
        refuse_unless_file(&lock_path).or_else(missing_is_fine).map_err(failed)?;
        let lock = options().read(true).write(true).create(true).truncate(false).open(&lock_path).map_err(failed)?;
        let access = match take(&lock, LOCK_ATTEMPTS).map_err(failed)? {
            true => Access::Write,
            false => Access::Read,
        };
        Ok(Directory::new(path, Some(lock), access))
    }

    /// Enters a directory that is a store's already, to read. Makes nothing, changes nothing and takes no lock.
    pub fn look(path: &Path) -> Result<Self> {
        refuse_unless_cache(path).map_err(|error| failed(path, &error))?;
        Ok(Directory::new(path, None, Access::Read))
    }

    /// Enters a directory that is a store's already, to remove what is in it. Fails when another process writes to it.
    pub fn seize(path: &Path) -> Result<Self> {
        refuse_unless_cache(path).map_err(|error| failed(path, &error))?;
        let directory = Directory::open(path)?;
        match directory.access {
            Access::Write => Ok(directory),
            Access::Read => Err(Error::Io {
                path: path.to_path_buf(),
                reason: "another process writes to this KV cache; end it first".to_string(),
            }),
        }
    }

    /// Whether a process writes to this directory now. Holds the lock for the moment of looking.
    pub fn has_writer(&self) -> Result<bool> {
        let lock_path = self.path.join(LOCK);
        let look = || match refuse_unless_file(&lock_path) {
            Ok(()) => Ok(!take(&options().read(true).write(true).open(&lock_path)?, LOOK_ATTEMPTS)?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        };
        look().map_err(|error| failed(&lock_path, &error))
    }

    /// When a segment was written last.
    pub fn modified(&self, segment: u64) -> io::Result<SystemTime> {
        fs::symlink_metadata(self.path_of(segment))?.modified()
    }

    /// Removes the segment files of all versions of the format, and nothing else. Gives their number and bytes.
    pub fn remove_all(&mut self) -> io::Result<(u64, u64)> {
        let (mut removed, mut removed_bytes) = (0, 0);
        for SegmentFile { version, segment, bytes } in self.list()? {
            self.open.pop(&segment);
            fs::remove_file(self.path.join(versioned_name(version, segment)))?;
            removed += 1;
            removed_bytes += bytes;
        }
        self.sync_directory()?;
        Ok((removed, removed_bytes))
    }

    fn new(path: &Path, lock: Option<File>, access: Access) -> Self {
        let max_open = NonZeroUsize::new(MAX_OPEN_SEGMENTS).expect("not zero");
        Directory { path: path.to_path_buf(), _lock: lock, open: LruCache::new(max_open), access }
    }

    /// What this process may do here.
    pub fn access(&self) -> Access {
        self.access
    }

    fn path_of(&self, segment: u64) -> PathBuf {
        self.path.join(file_name(segment))
    }

    fn file(&mut self, segment: u64) -> io::Result<&mut File> {
        if !self.open.contains(&segment) {
            let path = self.path_of(segment);
            refuse_unless_file(&path)?;
            let file = options().read(true).write(self.access == Access::Write).open(path)?;
            self.open.put(segment, file);
        }
        Ok(self.open.get_mut(&segment).expect("just put"))
    }
}

impl SegmentFiles for Directory {
    fn list(&mut self) -> io::Result<Vec<SegmentFile>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.path)? {
            let entry = entry?;
            let Some((version, segment)) = entry.file_name().to_str().and_then(parse_name) else { continue };
            // Of the entry itself: a link is not a file.
            let metadata = match entry.metadata() {
                Ok(metadata) => metadata,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            if metadata.is_file() {
                found.push(SegmentFile { version, segment, bytes: metadata.len() });
            }
        }
        Ok(found)
    }

    fn create(&mut self, segment: u64) -> io::Result<()> {
        let file = options().read(true).write(true).create_new(true).open(self.path_of(segment))?;
        self.open.put(segment, file);
        Ok(())
    }

    fn read_at(&mut self, segment: u64, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let file = self.file(segment)?;
        file.seek(SeekFrom::Start(offset))?;
        file.read(buffer)
    }

    fn write_at(&mut self, segment: u64, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        let file = self.file(segment)?;
        file.seek(SeekFrom::Start(offset))?;
        file.write(bytes)
    }

    fn truncate(&mut self, segment: u64, bytes: u64) -> io::Result<()> {
        self.file(segment)?.set_len(bytes)
    }

    fn sync(&mut self, segment: u64) -> io::Result<()> {
        self.file(segment)?.sync_all()
    }

    fn sync_directory(&mut self) -> io::Result<()> {
        File::open(&self.path)?.sync_all()
    }

    fn remove(&mut self, segment: u64) -> io::Result<()> {
        self.open.pop(&segment);
        fs::remove_file(self.path_of(segment))
    }
}

/// Random bytes for [`DiskStore::open`](super::DiskStore::open): the standard library's keyed hasher is keyed by the
/// operating system.
pub fn draw_seed() -> [u8; 16] {
    let draw = || RandomState::new().build_hasher().finish().to_le_bytes();
    let mut seed = [0; 16];
    seed[..8].copy_from_slice(&draw());
    seed[8..].copy_from_slice(&draw());
    seed
}

/// Name of a segment file of this format.
pub fn file_name(segment: u64) -> String {
    versioned_name(FORMAT_VERSION, segment)
}

fn versioned_name(version: u32, segment: u64) -> String {
    format!("v{version}-{segment:016x}.segment")
}

/// Version and number in a segment's name; `None`: it is not one.
fn parse_name(name: &str) -> Option<(u32, u64)> {
    let (version, number) = name.strip_prefix('v')?.strip_suffix(".segment")?.split_once('-')?;
    let is_number = number.len() == 16 && number.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    let is_version = !version.starts_with('0') && version.bytes().all(|b| b.is_ascii_digit());
    if !is_number || !is_version {
        return None;
    }
    let number = u64::from_str_radix(number, 16).ok().filter(|number| *number < MAX_NUMBER)?;
    Some((version.parse().ok()?, number))
}

fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options
}

/// Makes `path` a directory that only its owner enters.
fn make_private(path: &Path) -> io::Result<()> {
    let found = match fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            if let Some(parent) = path.parent() {
                fs::create_dir_all(parent)?;
            }
            let mut builder = DirBuilder::new();
            #[cfg(unix)]
            std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
            // Another process may have made it meanwhile.
            return builder.create(path).or_else(|error| match error.kind() {
                io::ErrorKind::AlreadyExists => Ok(()),
                _ => Err(error),
            });
        }
        Err(error) => return Err(error),
    };
    if !found.is_dir() {
        return Err(io::Error::new(io::ErrorKind::NotADirectory, "not a directory, or a link to one"));
    }
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        if found.permissions().mode() & 0o077 != 0 {
            refuse_foreign(path)?;
            fs::set_permissions(path, fs::Permissions::from_mode(0o700))?;
        }
    }
    Ok(())
}

/// Takes the lock; false: another has it. Some have it for a moment only, and must not make a reader of one who comes to
/// write, so it is tried again: who looks whether somebody has it ([`Directory::has_writer`]), and each program that was
/// started by a process that wrote, until it has become that program.
fn take(lock: &File, num_attempts: u32) -> io::Result<bool> {
    for attempt in 0..num_attempts {
        if attempt > 0 {
            std::thread::sleep(LOCK_PAUSE);
        }
        match lock.try_lock() {
            Ok(()) => return Ok(true),
            Err(fs::TryLockError::WouldBlock) => {}
            Err(fs::TryLockError::Error(error)) => return Err(error),
        }
    }
    Ok(false)
}

/// `path` is a directory, no link to one, and looks like that of a store: it has segments, or a lock and nothing else.
fn refuse_unless_cache(path: &Path) -> io::Result<()> {
    if !fs::symlink_metadata(path)?.is_dir() {
        return Err(io::Error::new(io::ErrorKind::NotADirectory, "not a directory, or a link to one"));
    }
    let (mut has_segments, mut has_lock, mut has_others) = (false, false, false);
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        let (is_file, is_dir) = (entry.file_type()?.is_file(), entry.file_type()?.is_dir());
        match entry.file_name().to_str() {
            Some(LOCK) if is_file => has_lock = true,
            Some(ANSWERS) if is_dir => {}
            Some(name) if is_file && parse_name(name).is_some() => has_segments = true,
            _ => has_others = true,
        }
    }
    match has_segments || has_lock && !has_others {
        true => Ok(()),
        false => Err(io::Error::new(io::ErrorKind::InvalidInput, "no KV cache is in this directory")),
    }
}

fn failed(path: &Path, error: &io::Error) -> Error {
    Error::Io { path: path.to_path_buf(), reason: error.to_string() }
}

/// Nothing but the store's own files is in `path`: its mode may be changed.
#[cfg(unix)]
fn refuse_foreign(path: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path)? {
        let name = entry?.file_name();
        let is_own = name.to_str().is_some_and(|name| [LOCK, ANSWERS].contains(&name) || parse_name(name).is_some());
        if !is_own {
            let reason = "others may enter it and it holds other files; give a directory of mode 0700 or a new one";
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, reason));
        }
    }
    Ok(())
}

/// A link, a pipe or a device under a name of the store is not opened. (Between this look and the opening only the owner
/// of the directory could change it: nobody else may enter.)
fn refuse_unless_file(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path)?.is_file() {
        true => Ok(()),
        false => Err(io::Error::new(io::ErrorKind::InvalidInput, "not a plain file")),
    }
}

fn missing_is_fine(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Only the store's own spelling is a segment; each number and version has one spelling.
    #[test]
    fn names_have_one_spelling() {
        assert_eq!(parse_name(&file_name(0x1f)), Some((1, 0x1f)));
        assert_eq!(parse_name("v27-000000000000000a.segment"), Some((27, 10)));
        for name in [
            "v1-1f.segment",
            "v1-000000000000001F.segment",
            "v01-000000000000001f.segment",
            "v-000000000000001f.segment",
            "v+1-000000000000001f.segment",
            "v99999999999-000000000000001f.segment",
            "v1-ffffffffffffffff.segment",
            "v1-000000000000001f.segment.bak",
            "v1-00000000000001/.segment",
            "lock",
            "",
        ] {
            assert_eq!(parse_name(name), None, "{name}");
        }
    }
}
