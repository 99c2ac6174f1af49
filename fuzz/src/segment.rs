//! A segment file of the disk tier.

use std::io::{self, ErrorKind};

use ns_llm::storage::disk::{Access, DiskOptions, DiskStore, PAGE_BYTES, SegmentFile, SegmentFiles};
use ns_llm::storage::{Fault, LayoutId, RecordKey};
use twox_hash::XxHash3_128;

use crate::Outcome;

/// Longest payload, bytes.
pub(crate) const MAX_PAYLOAD_BYTES: u64 = 6_000;
/// Bytes of the tier.
const BUDGET_BYTES: u64 = 44 * PAGE_BYTES;
const HEADER_BYTES: usize = 144;

/// Files in memory.
struct Files(Vec<Option<Vec<u8>>>);

impl Files {
    fn file(&mut self, segment: u64) -> io::Result<&mut Vec<u8>> {
        let file = usize::try_from(segment).ok().and_then(|segment| self.0.get_mut(segment)?.as_mut());
        file.ok_or_else(|| ErrorKind::NotFound.into())
    }
}

impl SegmentFiles for Files {
    fn list(&mut self) -> io::Result<Vec<SegmentFile>> {
        let files = self.0.iter().enumerate();
        let file = |(segment, file): (usize, &Option<Vec<u8>>)| {
            let bytes = file.as_ref()?.len() as u64;
            Some(SegmentFile { version: 1, segment: segment as u64, bytes })
        };
        Ok(files.filter_map(file).collect())
    }
    fn create(&mut self, segment: u64) -> io::Result<()> {
        let segment = usize::try_from(segment).map_err(|_| ErrorKind::InvalidInput)?;
        // Numbers count on from the largest.
        assert!(segment < 1000, "segment {segment}");
        self.0.resize(self.0.len().max(segment + 1), None);
        match &mut self.0[segment] {
            Some(_) => Err(ErrorKind::AlreadyExists.into()),
            file => {
                *file = Some(Vec::new());
                Ok(())
            }
        }
    }
    fn read_at(&mut self, segment: u64, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let file = self.file(segment)?;
        let rest = file.get(usize::try_from(offset).unwrap_or(usize::MAX)..).unwrap_or_default();
        let len = rest.len().min(buffer.len());
        buffer[..len].copy_from_slice(&rest[..len]);
        Ok(len)
    }
    fn write_at(&mut self, segment: u64, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        let end = offset as usize + bytes.len();
        assert!(end as u64 <= BUDGET_BYTES, "{end} bytes of a segment");
        let file = self.file(segment)?;
        file.resize(file.len().max(end), 0);
        file[offset as usize..end].copy_from_slice(bytes);
        Ok(bytes.len())
    }
    fn truncate(&mut self, segment: u64, bytes: u64) -> io::Result<()> {
        self.file(segment)?.truncate(bytes as usize);
        Ok(())
    }
    fn sync(&mut self, segment: u64) -> io::Result<()> {
        self.file(segment).map(drop)
    }
    fn sync_directory(&mut self) -> io::Result<()> {
        Ok(())
    }
    fn remove(&mut self, segment: u64) -> io::Result<()> {
        self.file(segment)?;
        self.0[segment as usize] = None;
        Ok(())
    }
}

/// A segment file: the tier opens, whatever it holds; what it says it has is there or is not, and it takes and gives back a
/// block afterwards. The bytes are taken as they are, and once more with checksums that are right: an accident rarely
/// gets past them, someone who writes files does.
pub fn disk_segment(bytes: &[u8]) -> Outcome {
    let (as_it_is, sealed) = (open(bytes), open(&resealed(bytes)));
    match as_it_is + sealed {
        0 => Err("no_block"),
        _ => Ok(()),
    }
}

/// How many blocks were found and read.
fn open(bytes: &[u8]) -> usize {
    let options = DiskOptions::new(BUDGET_BYTES, MAX_PAYLOAD_BYTES).expect("room for two segments");
    let files = Box::new(Files(vec![Some(bytes.to_vec())]));
    let mut tier = DiskStore::open(files, Access::Write, options, [3; 16]).expect("any content opens");
    let keys: Vec<RecordKey> = tier.keys().copied().collect();
    let mut found = 0;
    for key in &keys {
        match tier.get(key) {
            Ok(Some(payload)) => {
                assert!(payload.len() as u64 <= MAX_PAYLOAD_BYTES, "a payload of {} bytes", payload.len());
                found += 1;
            }
            // Headers are read when the tier opens, payloads when they are asked for.
            Ok(None) | Err(Fault::Damaged(_)) => {}
            Err(fault) => panic!("{fault}"),
        }
    }
    let key = RecordKey { content: [9; 32], layout: LayoutId([9; 32]) };
    // It may be there already; then what is there was checked to belong to the key.
    if tier.put(key, b"payload").expect("no file fails") {
        assert_eq!(tier.get(&key).expect("no file fails").as_deref(), Some(&b"payload"[..]));
    }
    tier.check_invariants().expect("what the tier says of itself");
    found
}

/// The same bytes with the checksums that belong to them, of the segment and of every record that begins on a page.
fn resealed(bytes: &[u8]) -> Vec<u8> {
    let mut sealed = bytes.to_vec();
    for page in (0..bytes.len()).step_by(PAGE_BYTES as usize) {
        let file = &mut sealed[page..];
        if page == 0 && file.len() >= 56 {
            let check = XxHash3_128::oneshot(&file[..40]).to_le_bytes();
            file[40..56].copy_from_slice(&check);
        } else if page > 0 && file.len() >= HEADER_BYTES && file.starts_with(b"nsllmKVR") {
            let payload_bytes = u64::from_le_bytes(file[16..24].try_into().expect("8 bytes"));
            let end = usize::try_from(payload_bytes).ok().and_then(|len| HEADER_BYTES.checked_add(len));
            if let Some(end) = end.filter(|&end| end <= file.len()) {
                let mut hasher = XxHash3_128::new();
                hasher.write(&file[..112]);
                hasher.write(&file[HEADER_BYTES..end]);
                file[112..128].copy_from_slice(&hasher.finish_128().to_le_bytes());
            }
            let check = XxHash3_128::oneshot(&file[..128]).to_le_bytes();
            file[128..HEADER_BYTES].copy_from_slice(&check);
        }
    }
    sealed
}
