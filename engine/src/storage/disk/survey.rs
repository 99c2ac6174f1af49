//! What is in the segment files, record by record, for people who look after a directory. Changes nothing, needs no lock,
//! and may run while another process writes: a file that vanishes meanwhile was evicted, and the end of the newest one may
//! just be being written.

use std::collections::HashSet;
use std::io;

use super::directory::{SegmentFile, SegmentFiles};
use super::record::{
    Expected, FORMAT_VERSION, HEADER_BYTES, PAGE_BYTES, RecordHeader, parse_segment_page, record_bytes,
};
use crate::storage::fault::Damage;
use crate::storage::key::RecordKey;

/// Damaged places that are listed; more are only counted.
const MAX_LISTED: usize = 1_000;
/// Longer payloads are damage: the largest records of the largest models have less.
const MAX_PAYLOAD_BYTES: u64 = 1 << 30;

/// A place where something else stands than was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DamagedPlace {
    /// Number of the segment.
    pub segment: u64,
    /// Byte in its file.
    pub offset: u64,
    /// What is wrong.
    pub reason: String,
}

/// What was found. Counts are of segments of this format, unless they say otherwise.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Survey {
    /// Segment files.
    pub segments: u64,
    /// Bytes of them.
    pub bytes: u64,
    /// Records with a sound header, and with a sound payload if payloads were read.
    pub records: u64,
    /// Records: some may have been stored more than once.
    pub live: u64,
    /// Bytes of payload of all records that were counted.
    pub payload_bytes: u64,
    /// Damaged places.
    pub damaged: u64,
    /// The first of them.
    pub places: Vec<DamagedPlace>,
    /// Bytes at the ends of files that were not written whole: what a killed process leaves, which the next opening cuts.
    pub torn_bytes: u64,
    /// Segment files of other versions of the format.
    pub other_versions: u64,
    /// Bytes of them.
    pub other_version_bytes: u64,
}

/// Looks at all records' headers; with `reads_payloads` at every byte.
pub fn survey(files: &mut dyn SegmentFiles, reads_payloads: bool) -> io::Result<Survey> {
    let mut found = files.list()?;
    found.sort_by_key(|file| (file.version, file.segment));
    let mut surveyor =
        Surveyor { files, reads_payloads, keys: HashSet::new(), survey: Survey::default(), payload: Vec::new() };
    for file in found {
        if file.version != FORMAT_VERSION {
            surveyor.survey.other_versions += 1;
            surveyor.survey.other_version_bytes += file.bytes;
            continue;
        }
        match surveyor.segment(file) {
            Ok(()) => {
                surveyor.survey.segments += 1;
                surveyor.survey.bytes += file.bytes;
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(Survey { live: surveyor.keys.len() as u64, ..surveyor.survey })
}

struct Surveyor<'a> {
    files: &'a mut dyn SegmentFiles,
    reads_payloads: bool,
    keys: HashSet<RecordKey>,
    survey: Survey,
    /// Used again for each record.
    payload: Vec<u8>,
}

/// What a read gave.
enum Bytes {
    All,
    /// The file ends before.
    Short,
    /// The system could not read it.
    Unreadable(String),
}

impl Surveyor<'_> {
    /// Fails only when the file is not there.
    fn segment(&mut self, file: SegmentFile) -> io::Result<()> {
        let SegmentFile { segment, bytes, .. } = file;
        let mut page = vec![0; PAGE_BYTES as usize];
        let nonce = match self.read(segment, 0, &mut page)? {
            Bytes::All => match parse_segment_page(&page, segment) {
                Ok(nonce) => nonce,
                Err(damage) => return self.damaged(segment, 0, format!("first page of the file: {damage}")),
            },
            Bytes::Short => {
                self.survey.torn_bytes += bytes;
                return Ok(());
            }
            Bytes::Unreadable(reason) => return self.damaged(segment, 0, reason),
        };
        let (mut offset, mut last_sequence) = (PAGE_BYTES, None);
        // Where the damage began in which `offset` is.
        let mut damage: Option<(u64, Damage, bool)> = None;
        while offset < bytes {
            let mut header = [0; HEADER_BYTES];
            let read = self.read(segment, offset, &mut header)?;
            if let Bytes::Unreadable(reason) = read {
                self.end_of_damage(segment, &mut damage);
                return self.damaged(segment, offset, reason);
            }
            let expected =
                Expected { nonce, last_sequence, max_payload_bytes: MAX_PAYLOAD_BYTES, rest_bytes: bytes - offset };
            match RecordHeader::parse(&header, &expected) {
                Ok(record) => {
                    self.end_of_damage(segment, &mut damage);
                    self.record(segment, offset, &header, &record)?;
                    last_sequence = Some(record.sequence);
                    offset += record_bytes(record.payload_bytes);
                }
                Err(found) => {
                    // A header that was written while its payload was not, or no header yet.
                    let is_unfinished = matches!(found, Damage::Length { .. })
                        || matches!(read, Bytes::Short)
                        || header.iter().all(|byte| *byte == 0);
                    damage.get_or_insert((offset, found, is_unfinished));
                    offset += PAGE_BYTES;
                }
            }
        }
        match damage {
            Some((start, _, true)) => self.survey.torn_bytes += bytes - start,
            _ => self.end_of_damage(segment, &mut damage),
        }
        Ok(())
    }

    /// What follows is sound: what stands before was not torn off.
    fn end_of_damage(&mut self, segment: u64, damage: &mut Option<(u64, Damage, bool)>) {
        if let Some((start, found, _)) = damage.take() {
            let _ = self.damaged(segment, start, found.to_string());
        }
    }

    fn record(&mut self, segment: u64, offset: u64, header: &[u8], record: &RecordHeader) -> io::Result<()> {
        if self.reads_payloads
            && let Some(reason) = self.payload_damage(segment, offset, header, record)?
        {
            return self.damaged(segment, offset, reason);
        }
        self.survey.records += 1;
        self.survey.payload_bytes += record.payload_bytes;
        self.keys.insert(record.key);
        Ok(())
    }

    /// What is wrong with the payload of a record.
    fn payload_damage(
        &mut self,
        segment: u64,
        offset: u64,
        header: &[u8],
        record: &RecordHeader,
    ) -> io::Result<Option<String>> {
        let mut payload = std::mem::take(&mut self.payload);
        payload.clear();
        let wanted = record.payload_bytes as usize;
        if let Err(error) = payload.try_reserve_exact(wanted) {
            return Ok(Some(format!("payload of {wanted} bytes: {error}")));
        }
        payload.resize(wanted, 0);
        let reason = match self.read(segment, offset + HEADER_BYTES as u64, &mut payload)? {
            Bytes::All => record.check_payload(header, &payload).err().map(|damage| damage.to_string()),
            Bytes::Short => Some(Damage::Truncated.to_string()),
            Bytes::Unreadable(reason) => Some(reason),
        };
        self.payload = payload;
        Ok(reason)
    }

    /// Counts a damaged place.
    fn damaged(&mut self, segment: u64, offset: u64, reason: String) -> io::Result<()> {
        self.survey.damaged += 1;
        if self.survey.places.len() < MAX_LISTED {
            self.survey.places.push(DamagedPlace { segment, offset, reason });
        }
        Ok(())
    }

    fn read(&mut self, segment: u64, offset: u64, buffer: &mut [u8]) -> io::Result<Bytes> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.files.read_at(segment, offset + filled as u64, &mut buffer[filled..]) {
                Ok(0) => return Ok(Bytes::Short),
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(error),
                Err(error) => return Ok(Bytes::Unreadable(error.to_string())),
            }
        }
        Ok(Bytes::All)
    }
}
