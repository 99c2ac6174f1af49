//! Promise: loading tells how far it is, can be cancelled, accepts what harmless checkpoints carry, and reads folders as
//! they lie in the hub's own cache.

use std::fs;

use ns_llm::loader::ModelFolder;
use ns_llm::model::{self, LoadedModel, config::ModelConfig};
use ns_llm::{Error, LoadProgress, Result};
use safetensors::Dtype;

use crate::reference_backend::Reference;
use crate::tiny_model::{TempFolder, TensorData, small_config, tensor_shapes, weights, write_model, write_weights};

fn load(folder: &ModelFolder, on_progress: &mut dyn FnMut(LoadProgress) -> bool) -> Result<LoadedModel<Reference>> {
    let config = ModelConfig::from_json(&folder.config()?)?;
    model::load(&Reference, folder.weights()?, &config, 16, on_progress)
}

fn small_folder(num_shards: usize) -> TempFolder {
    let folder = TempFolder::new("loading");
    write_model(&folder, &small_config(), Dtype::BF16, num_shards);
    folder
}

/// Progress begins at nothing with the whole size known, never falls, and ends with every byte; parameters are counted.
#[test]
fn progress_counts_every_byte() {
    let folder = small_folder(2);
    let mut heard = Vec::new();
    let loaded = load(&ModelFolder::open(folder.path()).unwrap(), &mut |progress| {
        heard.push(progress);
        true
    });
    let parameters: usize =
        tensor_shapes(&small_config()).iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
    let total_bytes = 2 * parameters as u64;
    assert_eq!(heard.first(), Some(&LoadProgress { loaded_bytes: 0, total_bytes }));
    assert_eq!(heard.last(), Some(&LoadProgress { loaded_bytes: total_bytes, total_bytes }));
    assert!(heard.is_sorted_by_key(|progress| progress.loaded_bytes) && heard.len() > 10);
    let loaded = loaded.unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(loaded.num_parameters, parameters as u64);
}

/// A load ends where its listener says so: shown by cancelling at each of its reports.
#[test]
fn a_load_can_be_cancelled_at_every_report() {
    let folder = small_folder(1);
    let folder = ModelFolder::open(folder.path()).unwrap();
    let mut reports = 0;
    assert!(
        load(&folder, &mut |_| {
            reports += 1;
            true
        })
        .is_ok()
    );
    for cancel_at in 1..=reports {
        let mut heard = 0;
        let result = load(&folder, &mut |_| {
            heard += 1;
            heard < cancel_at
        });
        assert!(matches!(result, Err(Error::Cancelled)), "cancelled at {cancel_at} of {reports}");
        assert_eq!(heard, cancel_at, "nothing is loaded after the cancellation");
    }
}

/// Old checkpoints carry rotary tables, and some tied ones their output matrix: neither is an error.
#[test]
fn harmless_leftovers_are_ignored() {
    let folder = small_folder(1);
    let mut tensors = weights(&small_config(), Dtype::BF16);
    let embedding = tensors[0].1.clone();
    let table = TensorData { dtype: Dtype::F32, shape: vec![8], bytes: vec![0; 32] };
    tensors.push(("model.layers.0.self_attn.rotary_emb.inv_freq".to_string(), table));
    tensors.push(("lm_head.weight".to_string(), embedding));
    write_weights(&folder, &tensors, 1);
    assert!(load(&ModelFolder::open(folder.path()).unwrap(), &mut |_| true).is_ok());
}

/// The hub's cache keeps files as links from `snapshots/REVISION` into `blobs`: such a folder loads, and a link from it
/// to anywhere else is refused.
#[cfg(unix)]
#[test]
fn folders_of_the_hub_cache_load() {
    use std::os::unix::fs::symlink;
    let cache = TempFolder::new("hub");
    let source = small_folder(1);
    let (blobs, snapshot) = (cache.path().join("blobs"), cache.path().join("snapshots/0123abcd"));
    fs::create_dir_all(&blobs).unwrap();
    fs::create_dir_all(&snapshot).unwrap();
    for (name, blob) in [("config.json", "aaaa"), ("model.safetensors", "bbbb")] {
        fs::copy(source.path().join(name), blobs.join(blob)).unwrap();
        symlink(format!("../../blobs/{blob}"), snapshot.join(name)).unwrap();
    }
    assert!(load(&ModelFolder::open(&snapshot).unwrap(), &mut |_| true).is_ok());

    fs::remove_file(snapshot.join("config.json")).unwrap();
    symlink(source.path().join("config.json"), snapshot.join("config.json")).unwrap();
    let error = ModelFolder::open(&snapshot).unwrap().config().unwrap_err();
    assert!(error.to_string().contains("leaves the model folder"), "{error}");
}

/// A file that is cut while it is being read gives an error that names the tensor: the header was checked before.
#[test]
fn a_file_cut_after_its_check_is_an_error() {
    let folder = small_folder(1);
    let path = folder.path().join("model.safetensors");
    let mut open = ModelFolder::open(folder.path()).unwrap().weights().unwrap();
    let len = fs::metadata(&path).unwrap().len();
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(len / 2).unwrap();
    let errors: Vec<_> =
        tensor_shapes(&small_config()).iter().filter_map(|(name, shape)| open.take(name, shape).err()).collect();
    assert!(!errors.is_empty());
    for error in errors {
        assert!(error.to_string().contains("bytes are there"), "{error}");
    }
}
