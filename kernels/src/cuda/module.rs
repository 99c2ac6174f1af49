//! The embedded kernels, loaded into a device's context: by file, then by name.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::sync::{Mutex, PoisonError};

use cudarc::driver::{result, sys};

use super::driver::DeviceInfo;
use super::driver_error::failed;
use crate::error::{Error, Result};

include!(concat!(env!("OUT_DIR"), "/fatbins.rs"));

/// Whether the code that a device of 9.0 or later has of these files is for 9.0 at least: none for older ones runs there but what
/// its driver compiles, and that is the newest.
pub(super) const HAS_CODE_FOR_HOPPER: bool = NEWEST_ARCHITECTURE >= 90;

/// All kernels of a context. Loaded at once: a first use in the middle of a captured step may not load anything.
pub(super) struct Modules {
    modules: BTreeMap<&'static str, sys::CUmodule>,
    /// Entry points that were asked for; any thread may launch.
    functions: Mutex<BTreeMap<(&'static str, &'static str), sys::CUfunction>>,
    /// Most shared memory of a block on this device.
    max_shared_bytes: i32,
}

impl Modules {
    /// Loads every file that has code for this device. The context is current.
    pub(super) fn load(info: &DeviceInfo) -> Result<Modules> {
        let max_shared_bytes = info.max_shared_bytes;
        let mut loaded = Modules { modules: BTreeMap::new(), functions: Mutex::default(), max_shared_bytes };
        for (file, fatbin) in FATBINS.iter().filter(|(file, _)| has_code_for(file, info.compute_capability)) {
            // SAFETY: nvcc wrote the image; its size is in its header.
            let module = unsafe { result::module::load_data(fatbin.as_ptr().cast()) };
            loaded.modules.insert(file, module.map_err(failed("cuModuleLoadData"))?);
        }
        Ok(loaded)
    }

    /// The entry point `kernel` of `cuda/FILE.cu`. The context is current.
    pub(super) fn function(&self, file: &'static str, kernel: &'static str) -> Result<sys::CUfunction> {
        let mut functions = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(function) = functions.get(&(file, kernel)) {
            return Ok(*function);
        }
        let missing = || Error::Launch { kernel, reason: format!("no file `{file}` is embedded") };
        let module = *self.modules.get(file).ok_or_else(missing)?;
        let name = CString::new(kernel).expect("names have no zero byte");
        // SAFETY: the module is loaded as long as `self` lives.
        let function = unsafe { result::module::get_function(module, name) }.map_err(failed("cuModuleGetFunction"))?;
        self.allow_all_shared_memory(function)?;
        functions.insert((file, kernel), function);
        Ok(function)
    }

    /// Lets a launch ask for more dynamic shared memory than the 48 KiB that need no question.
    fn allow_all_shared_memory(&self, function: sys::CUfunction) -> Result<()> {
        use sys::CUfunction_attribute_enum as Attribute;
        // SAFETY: the function is one of a loaded module.
        unsafe {
            let static_bytes =
                result::function::get_function_attribute(function, Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)
                    .map_err(failed("cuFuncGetAttribute"))?;
            result::function::set_function_attribute(
                function,
                Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                self.max_shared_bytes - static_bytes,
            )
            .map_err(failed("cuFuncSetAttribute"))
        }
    }
}

/// Whether the file is compiled for devices of this compute capability: `sm90_*.cu` is for one alone (`kernels/toolkit.rs`).
fn has_code_for(file: &str, compute_capability: (i32, i32)) -> bool {
    !file.starts_with("sm90_") || compute_capability == (9, 0)
}

impl Drop for Modules {
    fn drop(&mut self) {
        for module in self.modules.values() {
            // SAFETY: it was loaded and is unloaded once; the device has waited for its stream, so no kernel of it runs. There is
            // nobody to tell an error to.
            let _ = unsafe { result::module::unload(*module) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A device is given no file that it could not load; Hopper is given all.
    #[test]
    fn files_of_one_capability_are_loaded_there_alone() {
        assert!(FATBINS.iter().all(|(file, _)| has_code_for(file, (9, 0))));
        for capability in [(8, 0), (8, 9), (10, 0), (12, 0)] {
            let left_out: Vec<&str> =
                FATBINS.iter().map(|(file, _)| *file).filter(|file| !has_code_for(file, capability)).collect();
            assert_eq!(left_out, ["sm90_matmul"], "{capability:?}");
        }
    }

    /// Every kernel file of the tree is embedded, and as a fat binary.
    #[test]
    fn all_kernel_files_are_embedded() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda");
        let paths = std::fs::read_dir(folder).expect("the folder is there").flatten().map(|entry| entry.path());
        let mut stems: Vec<String> = paths
            .filter(|path| path.extension().is_some_and(|extension| extension == "cu"))
            .map(|path| path.file_stem().expect("a name").to_string_lossy().into_owned())
            .collect();
        stems.sort();
        assert_eq!(FATBINS.iter().map(|(stem, _)| *stem).collect::<Vec<_>>(), stems);
        assert!(stems.contains(&"matmul".to_owned()));
        // The magic number of a fat binary, 0xba55ed50.
        assert!(FATBINS.iter().all(|(_, bytes)| bytes.starts_with(&[0x50, 0xed, 0x55, 0xba])));
    }
}
