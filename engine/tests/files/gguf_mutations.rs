//! Promise: whatever happens to the bytes of a GGUF file, it loads or fails with an error. Seeded mutations of valid files:
//! none may panic, keep a file open, or allocate more than the file justifies.

use std::collections::BTreeMap;

use crate::demo::Rng;
use crate::gguf_loading::{open_files_below, try_bytes, valid, valid_bert, valid_gpt2, valid_llama};
use crate::tiny_model::TempFolder;

/// One to four changes of the kinds that break parsers: bits, extreme numbers, pieces moved, doubled, cut out or off.
fn mutate(bytes: &mut Vec<u8>, header: usize, rng: &mut Rng) {
    const EXTREMES: [u64; 8] = [0, 1, 0x7F, 0xFFFF_FFFF, 1 << 31, 1 << 32, 1 << 63, u64::MAX];
    for _ in 0..=rng.below(4) {
        let at = rng.below(header.min(bytes.len()));
        let end = (at + 1 + rng.below(16)).min(bytes.len());
        match rng.below(6) {
            0 => bytes[at] ^= 1 << rng.below(8),
            1 => bytes[at] = rng.next() as u8,
            2 => {
                let (extreme, width) = (EXTREMES[rng.below(EXTREMES.len())], [1, 4, 8][rng.below(3)]);
                let extreme = extreme.wrapping_sub(rng.below(3) as u64).to_le_bytes();
                bytes.iter_mut().skip(at).zip(&extreme[..width]).for_each(|(byte, new)| *byte = *new);
            }
            3 => drop(bytes.drain(at..end)),
            4 => {
                let piece = bytes[at..end].to_vec();
                let to = rng.below(bytes.len());
                bytes.splice(to..to, piece);
            }
            _ => bytes.truncate(if rng.below(8) == 0 { at } else { bytes.len() }),
        }
        if bytes.is_empty() {
            return;
        }
    }
}

/// Thousands of mutated files load or fail with an error, within the memory that their bytes justify: shown with a
/// fixed seed, over small models of four kinds.
#[test]
fn mutated_files_load_or_fail() {
    const ROUNDS: u64 = 2_000;
    let folder = TempFolder::new("gguf-mutations");
    let path = folder.path().join("model.gguf");
    let seeds = [valid(), valid_llama(), valid_gpt2(), valid_bert()].map(|file| (file.bytes(), file.header().len()));
    let (mut loaded, mut codes) = (0, BTreeMap::new());
    for round in 0..ROUNDS {
        let (whole, header) = &seeds[(round % 4) as usize];
        let mut bytes = whole.clone();
        mutate(&mut bytes, *header, &mut Rng(round));
        let (result, peak_bytes) = try_bytes(&path, &bytes, &format!("round {round}"));
        match result {
            Ok(()) => loaded += 1,
            Err(error) => *codes.entry(error.code()).or_insert(0) += 1,
        }
        // What loads holds packed weights and the KV pool that `load` asks for.
        let limit_bytes = (4 << 20) + 16 * bytes.len() as u64;
        assert!(peak_bytes <= limit_bytes, "round {round}: {peak_bytes} bytes for {}", bytes.len());
    }
    println!("{loaded} of {ROUNDS} loaded; errors: {codes:?}");
    assert!(loaded > 20, "{loaded}: the mutator leaves nothing whole");
    assert!(codes.get("weights") > Some(&500) && codes.get("config") > Some(&50), "{codes:?}");
    assert!(!codes.contains_key("internal"), "{codes:?}");
    assert_eq!(open_files_below(folder.path()), 0);
}
