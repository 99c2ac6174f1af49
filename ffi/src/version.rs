//! # Version
//!
//! `NS_LLM_VERSION_NUMBER` is what you compiled against, ns_llm_version_number() is what you run with. A program works
//! with any library that has its `NS_LLM_ABI_VERSION` and is at least as new. That number is the same for all versions
//! with the same major version; while the major version is 0, for all with the same minor version. The shared library's
//! name carries it too (libns_llm.so.0.1), so a linked program gets no other; one that loads the library by itself should
//! compare it with ns_llm_abi_version().

use std::ffi::{CStr, c_char};

use crate::panic::boundary_or;

/// `major * 1000000 + minor * 1000 + patch`, from the package's own version.
const VERSION_NUMBER: u32 = decimal(env!("CARGO_PKG_VERSION_MAJOR")) * 1_000_000
    + decimal(env!("CARGO_PKG_VERSION_MINOR")) * 1_000
    + decimal(env!("CARGO_PKG_VERSION_PATCH"));

/// `major * 1000`, and while that is 0 the minor version: what the program and the library must have in common.
const ABI_VERSION: u32 = match decimal(env!("CARGO_PKG_VERSION_MAJOR")) {
    0 => decimal(env!("CARGO_PKG_VERSION_MINOR")),
    major => major * 1_000,
};

const VERSION: &CStr = match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
    Ok(version) => version,
    Err(_) => panic!("a package version holds no NUL"),
};

/// Value of a decimal number; a constant function, so that the version is computed and not typed.
const fn decimal(digits: &str) -> u32 {
    let mut value = 0;
    let mut rest = digits.as_bytes();
    while let [digit, tail @ ..] = rest {
        value = value * 10 + (*digit - b'0') as u32;
        rest = tail;
    }
    value
}

/// The version of the library that is running, in the form of `NS_LLM_VERSION_NUMBER`: 1002003 is 1.2.3.
///
/// Threads:    any. Cannot fail.
#[unsafe(no_mangle)]
pub extern "C" fn ns_llm_version_number() -> u32 {
    boundary_or(0, || VERSION_NUMBER)
}

/// The ABI version of the library that is running: programs that were compiled with this `NS_LLM_ABI_VERSION` work with it.
///
/// Threads:    any. Cannot fail.
#[unsafe(no_mangle)]
pub extern "C" fn ns_llm_abi_version() -> u32 {
    boundary_or(0, || ABI_VERSION)
}

/// The version of the library that is running, as text such as "1.2.3".
///
/// Ownership:  the text is the library's, ends with NUL and lives as long as the library is loaded.
/// Threads:    any. Cannot fail.
#[unsafe(no_mangle)]
pub extern "C" fn ns_llm_version() -> *const c_char {
    boundary_or(c"".as_ptr(), || VERSION.as_ptr())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The number and the text are the same version: the number is taken apart and written as the text.
    #[test]
    fn number_and_text_agree() {
        let number = ns_llm_version_number();
        let written = format!("{}.{}.{}", number / 1_000_000, number / 1_000 % 1_000, number % 1_000);
        assert_eq!(VERSION.to_str().unwrap(), written);
        assert_eq!(decimal("10203"), 10203);
    }
}
