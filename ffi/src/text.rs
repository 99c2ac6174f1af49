//! # Text
//!
//! A text is a pointer and a size in bytes, in UTF-8, without a NUL at the end. It may hold any character, NUL too.

use std::ffi::c_char;
use std::slice;

use crate::failure::Failure;

/// A text inside a struct or an array. `data` may be NULL where `size` is 0.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ns_llm_text {
    /// The first byte.
    pub data: *const c_char,
    /// Number of bytes.
    pub size: usize,
}

impl ns_llm_text {
    /// A view of `text`, for C to read while `text` lives.
    pub(crate) fn view(text: &str) -> Self {
        ns_llm_text { data: text.as_ptr().cast(), size: text.len() }
    }
}

/// Refuses a pointer that is NULL or not aligned for `T`.
pub(crate) fn check_pointer<T>(argument: &'static str, pointer: *const T) -> Result<(), Failure> {
    if pointer.is_null() {
        return Err(Failure::NullArgument { argument });
    }
    if !pointer.is_aligned() {
        return Err(Failure::Misaligned { argument, address: pointer.addr(), alignment: align_of::<T>() });
    }
    Ok(())
}

/// Copies an array that the caller described by pointer and number of elements. The limit is checked before anything is
/// read, so an absurd number costs nothing; no elements need no pointer.
///
/// # Safety
/// If `num` is from 1 to `limit` and `data` is neither NULL nor misaligned, `data` points to `num` readable values of
/// `T`.
pub(crate) unsafe fn read_array<T: Copy>(
    argument: &'static str,
    data: *const T,
    num: usize,
    limit: usize,
) -> Result<Vec<T>, Failure> {
    if num > limit {
        return Err(Failure::invalid(argument, num, format!("at most {limit}")));
    }
    if num == 0 {
        return Ok(Vec::new());
    }
    check_pointer(argument, data)?;
    // SAFETY: not NULL, aligned, and `num` was found to be in 1..=limit, for which the caller promises readable values.
    Ok(unsafe { slice::from_raw_parts(data, num) }.to_vec())
}

/// Copies a text of at most `limit` bytes; bytes that are not UTF-8 are a failure that names the first of them.
///
/// # Safety
/// As [`read_array`], for `text.data` and `text.size`.
pub(crate) unsafe fn read_text(argument: &'static str, text: ns_llm_text, limit: usize) -> Result<String, Failure> {
    // SAFETY: forwarded promise.
    let bytes = unsafe { read_array::<u8>(argument, text.data.cast(), text.size, limit) }?;
    String::from_utf8(bytes)
        .map_err(|error| Failure::InvalidUtf8 { argument, offset: error.utf8_error().valid_up_to() })
}

/// Where the caller wants a result. Making one writes `initial`, so that the caller finds a defined value whatever
/// happens next.
pub(crate) struct Out<T> {
    /// Not NULL, aligned, writable for the duration of the call: promised to [`Out::new`].
    target: *mut T,
}

impl<T> Out<T> {
    /// # Safety
    /// If `target` is neither NULL nor misaligned, it points to memory for a `T` that stays writable, and is used by
    /// nobody else, as long as this value is used.
    pub(crate) unsafe fn new(argument: &'static str, target: *mut T, initial: T) -> Result<Self, Failure> {
        check_pointer(argument, target)?;
        let out = Out { target };
        out.set(initial);
        Ok(out)
    }

    pub(crate) fn set(&self, value: T) {
        // SAFETY: `target` was checked by `new`, whose caller promised that it is writable for as long as `self` is
        // used.
        unsafe { self.target.write(value) };
    }
}

/// Gives the caller `values` in a buffer of its own; `out_num` gets their number, also when they do not fit, so that a
/// call without a buffer measures.
///
/// # Safety
/// If `capacity` is not 0 and `buffer` is neither NULL nor misaligned, `buffer` points to `capacity` writable values
/// that nobody else uses meanwhile.
pub(crate) unsafe fn fill_buffer<T: Copy>(
    buffer: *mut T,
    capacity: usize,
    out_num: &Out<usize>,
    values: &[T],
) -> Result<(), Failure> {
    out_num.set(values.len());
    if values.len() > capacity {
        return Err(Failure::BufferTooSmall { argument: "buffer", capacity, needed: values.len() });
    }
    if !values.is_empty() {
        check_pointer("buffer", buffer)?;
        // SAFETY: `capacity` values are writable at `buffer`, as promised, and there are no more than that; `values` is
        // ours, so nothing overlaps.
        unsafe { buffer.copy_from_nonoverlapping(values.as_ptr(), values.len()) };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(bytes: &[u8]) -> ns_llm_text {
        ns_llm_text { data: bytes.as_ptr().cast(), size: bytes.len() }
    }

    /// Every lie about a text is its own failure, and none of them is read: absurd sizes come with pointers to nothing.
    #[test]
    fn lies_about_texts_are_failures() {
        let nowhere = ns_llm_text { data: std::ptr::without_provenance(8), size: usize::MAX };
        let null = ns_llm_text { data: std::ptr::null(), size: 1 };
        // SAFETY: `nowhere` is beyond the limit, `null` is NULL, the others are slices.
        unsafe {
            assert!(matches!(read_text("t", nowhere, 10), Err(Failure::Engine(_))));
            assert!(matches!(read_text("t", null, 10), Err(Failure::NullArgument { argument: "t" })));
            assert!(matches!(read_text("t", text(b"ab\xff"), 10), Err(Failure::InvalidUtf8 { offset: 2, .. })));
            assert!(matches!(read_text("t", text(b"four"), 3), Err(Failure::Engine(_))));
            assert_eq!(read_text("t", text(b"a\0b"), 3).unwrap(), "a\0b");
            assert_eq!(read_text("t", ns_llm_text { size: 0, ..null }, 3).unwrap(), "");
        }
    }

    /// An array at an odd address is refused before it is read.
    #[test]
    fn misaligned_arrays_are_refused() {
        let odd = std::ptr::without_provenance::<u32>(4097);
        // SAFETY: misaligned, so nothing is promised and nothing is read.
        let failure = unsafe { read_array("ids", odd, 2, 10) }.unwrap_err();
        assert!(matches!(failure, Failure::Misaligned { address: 4097, alignment: 4, .. }), "{failure}");
    }
}
