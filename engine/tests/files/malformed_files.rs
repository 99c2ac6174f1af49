//! Promise: no model folder of any content does more than fail to load, with an error that names file, field or tensor.
//! A table of hand-made folders, each a valid one with one thing changed, and the error that it must give. None may
//! panic, keep a file open, or allocate more than its files justify.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use ns_llm::{EngineOptions, Error, Result};
use safetensors::Dtype;

use crate::counting_allocator::peak_bytes_of;
use crate::encoder_cases::{bert_config, gpt2_config};
use crate::folder_cases::{all_cases, header_cases, valid_folder};
use crate::tiny_model::write_model;

// ---- how a folder is opened ---------------------------------------------------------------------------------------------

/// Opens a model as an engine's worker does, on this thread.
fn load(path: &Path) -> Result<()> {
    ns_llm::open::load(EngineOptions::new(path).threads(1).kv_bytes(1 << 20)).map(drop)
}

// ---- the promise --------------------------------------------------------------------------------------------------------

/// Every folder of the table gives its error and leaves nothing behind; the folder they were made from loads.
#[test]
fn every_bad_folder_gives_its_error() {
    assert_eq!(load(valid_folder().path()), Ok(()));
    for config in [bert_config(), gpt2_config()] {
        let folder = valid_folder();
        write_model(&folder, &config, Dtype::F32, 1);
        assert_eq!(load(folder.path()), Ok(()), "{config}");
    }
    let cases = all_cases();
    assert!(cases.len() >= 60, "{} cases", cases.len());
    for case in &cases {
        let folder = valid_folder();
        (case.change)(&folder);
        let folders = [folder.path().to_path_buf(), folder.path().join("1_Pooling")];
        let entries = folders.iter().filter_map(|folder| fs::read_dir(folder).ok()).flatten();
        let files = entries.filter_map(|entry| entry.ok()?.metadata().ok()).filter(fs::Metadata::is_file);
        let file_bytes: u64 = files.map(|file| file.len()).sum();
        let (result, peak_bytes) = peak_bytes_of(|| catch_unwind(AssertUnwindSafe(|| load(folder.path()))));
        let result = result.unwrap_or_else(|_| panic!("{}: panicked", case.name));
        let error = result.expect_err(&case.name);
        assert_eq!(error.code(), case.code, "{}: {error}", case.name);
        assert!(error.to_string().contains(&case.text), "{}: {error}", case.name);
        let limit_bytes = (1 << 20) + 16 * file_bytes;
        assert!(peak_bytes <= limit_bytes, "{}: {peak_bytes} bytes held for {file_bytes} bytes of files", case.name);
        assert_eq!(open_files_below(folder.path()), 0, "{}", case.name);
    }
}

/// How many files below `path` this process has open (0 where the system does not tell).
fn open_files_below(path: &Path) -> usize {
    let path = fs::canonicalize(path).unwrap();
    let Ok(handles) = fs::read_dir("/proc/self/fd") else { return 0 };
    handles
        .filter_map(|handle| fs::read_link(handle.ok()?.path()).ok())
        .filter(|target| target.starts_with(&path))
        .count()
}

/// A file of less than a kilobyte never makes the loader hold more than a megabyte, whatever sizes it declares: shown
/// with the counter that the table uses, which sees an allocation of that size.
#[test]
fn small_files_cost_little() {
    let (_, counted) = peak_bytes_of(|| drop(vec![0_u8; 1 << 20]));
    assert!(counted >= 1 << 20, "the counter does not count");
    let folder = valid_folder();
    for case in header_cases() {
        (case.change)(&folder);
        let path = folder.path().join("model.safetensors");
        if fs::metadata(&path).unwrap().len() < 1024 {
            let (result, peak_bytes) = peak_bytes_of(|| load(folder.path()));
            assert!(matches!(result, Err(Error::Weights { .. })), "{}", case.name);
            assert!(peak_bytes < 1 << 20, "{}: {peak_bytes} bytes", case.name);
        }
    }
}

/// A file of any prefix of a valid one is refused: shown by cutting a checkpoint at every third byte of its header
/// and at many places of its data.
#[test]
fn every_truncation_is_an_error() {
    let folder = valid_folder();
    let whole = fs::read(folder.path().join("model.safetensors")).unwrap();
    let header_end = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let mut refused = 0;
    for len in (0..header_end).step_by(3).chain((header_end..whole.len()).step_by(997)) {
        folder.write("model.safetensors", &whole[..len]);
        assert!(matches!(load(folder.path()), Err(Error::Weights { .. })), "{len} of {} bytes", whole.len());
        refused += 1;
    }
    assert!(refused > 500);
    folder.write("model.safetensors", &whole);
    assert_eq!(load(folder.path()), Ok(()));
}
