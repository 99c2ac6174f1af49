//! What Rust's standard library asks of glibc and musl (Alpine) does not have: two functions, when a host's name is not
//! found. An addon that asks for them would not load there. Where glibc is, its own come first; these are found where they
//! are not.
#![allow(non_snake_case, reason = "the names of the C library")]

use std::ffi::{c_char, c_int};

/// A version since which nothing has to be read again before names are looked up; see [`__res_init`].
#[unsafe(no_mangle)]
extern "C" fn gnu_get_libc_version() -> *const c_char {
    c"2.26".as_ptr()
}

/// Reads the resolver's settings again: musl does so for every name.
#[unsafe(no_mangle)]
extern "C" fn __res_init() -> c_int {
    0
}
