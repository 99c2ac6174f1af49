//! Structs that cross the border and may grow. Each begins with `struct_size`, the caller's `sizeof`, so that a program
//! and a library of different versions can tell how much of the struct the other side knows:
//!
//! - smaller than ours (an older program): what is missing has its default, which is why a default is always zero;
//! - larger than ours (a newer program): the part that we do not know must be zero, else the program relies on
//!   something that would be ignored, and gets [`Failure::Unsupported`];
//! - zero, huge or not whole (a forgotten or uninitialised field): an invalid argument.
//!
//! Fields are never removed, moved or reordered, and sizes are multiples of the alignment, so no field is ever cut in
//! two.

use std::mem::MaybeUninit;
use std::{ptr, slice};

use crate::failure::Failure;
use crate::text::check_pointer;

/// Largest `struct_size` that is taken for real, bytes.
const MAX_STRUCT_BYTES: usize = 4096;

/// A struct that begins with `struct_size`.
///
/// # Safety
/// The type is `repr(C)`, its first field is a `usize`, and any bytes are a valid value: numbers, raw pointers and
/// optional function pointers only.
pub(crate) unsafe trait SizedStruct: Copy {}

/// Copies the caller's struct into the one that this library knows.
///
/// # Safety
/// If `params` is neither NULL nor misaligned, it points to a readable `size_t`, and if that is between 8 and 4096, to
/// that many readable bytes.
pub(crate) unsafe fn read_struct<T: SizedStruct>(argument: &'static str, params: *const T) -> Result<T, Failure> {
    // SAFETY: forwarded promise.
    let declared = unsafe { check_struct(argument, params) }?;
    let known = size_of::<T>();
    let mut value = MaybeUninit::<T>::zeroed();
    // SAFETY: the smaller of the two sizes is readable at `params`, as promised, and writable in `value`; one is the
    // caller's, the other ours, so they do not overlap.
    unsafe { ptr::copy_nonoverlapping(params.cast::<u8>(), value.as_mut_ptr().cast::<u8>(), declared.min(known)) };
    if declared > known {
        // SAFETY: the caller promised `declared` readable bytes, and these are the last of them.
        let tail = unsafe { slice::from_raw_parts(params.cast::<u8>().add(known), declared - known) };
        if let Some(offset) = tail.iter().position(|&byte| byte != 0) {
            let reason = format!("byte {} is used, this version knows {known}", known + offset);
            return Err(Failure::Unsupported { argument, reason });
        }
    }
    // SAFETY: zeros and the caller's bytes are valid, because any bytes are, as `SizedStruct` promises.
    Ok(unsafe { value.assume_init() })
}

/// What a number in C stands for, when it is the value of an enum whose constants are numbered from 0.
pub(crate) fn at<T: Copy>(values: &[T], value: u32) -> Option<T> {
    values.get(value as usize).copied()
}

/// Writes `value` to the caller's struct, as far as the caller knows it, and zeros beyond what this library knows.
/// The caller's `struct_size` stays.
///
/// # Safety
/// As [`read_struct`], with writable in place of readable.
pub(crate) unsafe fn write_struct<T: SizedStruct>(
    argument: &'static str,
    target: *mut T,
    value: &T,
) -> Result<(), Failure> {
    // SAFETY: forwarded promise.
    let declared = unsafe { check_struct(argument, target) }?;
    let known = size_of::<T>();
    // SAFETY: `declared` bytes are writable; the copied part lies within both `declared` and `known`, starts after
    // `struct_size`, and `value` is ours, so nothing overlaps.
    unsafe {
        let target = target.cast::<u8>();
        let head = size_of::<usize>();
        ptr::copy_nonoverlapping(
            ptr::from_ref(value).cast::<u8>().add(head),
            target.add(head),
            declared.min(known) - head,
        );
        ptr::write_bytes(target.add(declared.min(known)), 0, declared.saturating_sub(known));
    }
    Ok(())
}

/// Reads and checks `struct_size`, and nothing else.
///
/// # Safety
/// If `params` is neither NULL nor misaligned, it points to a readable `size_t`.
pub(crate) unsafe fn check_struct<T: SizedStruct>(argument: &'static str, params: *const T) -> Result<usize, Failure> {
    check_pointer(argument, params)?;
    // SAFETY: not NULL and aligned for `T`, hence for its first field, a `usize` that the caller promised.
    let declared = unsafe { params.cast::<usize>().read() };
    let (min, unit) = (size_of::<usize>(), align_of::<T>());
    if declared < min || declared > MAX_STRUCT_BYTES || declared % unit != 0 {
        let expected =
            format!("the size of a struct: {min} to {MAX_STRUCT_BYTES}, a multiple of {unit} (for {argument})");
        return Err(Failure::invalid("struct_size", declared, expected));
    }
    Ok(declared)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::fmt::Debug;

    use super::*;

    /// Reads the header: each constant that begins with `prefix` means what the engine calls by the rest of its name, and
    /// there are `count` of them.
    pub(crate) fn check_names<T: PartialEq + Debug>(
        prefix: &str,
        count: usize,
        by_value: fn(u32) -> Result<T, Failure>,
        from_name: impl Fn(&str) -> ns_llm_core::Result<T>,
    ) {
        let header = include_str!("../../include/ns_llm.h");
        let constants = header.lines().filter_map(|line| line.trim().strip_prefix(prefix)?.split_once(" = "));
        let mut found = 0;
        for (name, value) in constants {
            let value = value.trim_end_matches(',').parse().expect("a number");
            let meant = from_name(name).or_else(|_| from_name(&name.replace('_', "-")));
            assert_eq!(by_value(value).expect("a value"), meant.expect("a name of the engine's"), "{prefix}{name}");
            found += 1;
        }
        assert_eq!(found, count, "constants {prefix}*");
        assert!(by_value(found as u32).is_err(), "a value that no constant of {prefix}* has");
    }

    #[repr(C)]
    #[derive(Debug, Clone, Copy, PartialEq)]
    struct Known {
        struct_size: usize,
        first: u64,
        second: u64,
    }
    // SAFETY: `repr(C)`, begins with a `usize`, all numbers.
    unsafe impl SizedStruct for Known {}

    #[repr(C)]
    struct Newer {
        known: Known,
        third: u64,
    }

    fn read(struct_size: usize, third: u64) -> Result<Known, Failure> {
        let newer = Newer { known: Known { struct_size, first: 1, second: 2 }, third };
        // SAFETY: sizes up to that of `Newer` are readable; the tests below use others only where they are refused.
        unsafe { read_struct("params", ptr::from_ref(&newer).cast()) }
    }

    /// Older callers get defaults for what they do not know; newer ones are served unless they use what we do not know.
    #[test]
    fn other_versions_are_understood() {
        assert_eq!(read(24, 7).unwrap(), Known { struct_size: 24, first: 1, second: 2 });
        assert_eq!(read(16, 7).unwrap(), Known { struct_size: 16, first: 1, second: 0 });
        assert_eq!(read(8, 7).unwrap(), Known { struct_size: 8, first: 0, second: 0 });
        assert_eq!(read(32, 0).unwrap(), Known { struct_size: 32, first: 1, second: 2 });
        assert!(matches!(read(32, 7), Err(Failure::Unsupported { .. })));
    }

    /// A size that no struct has is refused before anything else is read.
    #[test]
    fn absurd_sizes_are_refused() {
        for size in [0, 1, 7, 12, 23, MAX_STRUCT_BYTES + 8, usize::MAX, usize::MAX - 7] {
            let failure = read(size, 0).unwrap_err();
            assert!(failure.to_string().starts_with(&format!("struct_size is {size}, ")), "{failure}");
        }
    }

    /// A result fills what the caller knows and not a byte more; what we do not know is zero.
    #[test]
    fn results_stay_inside_the_callers_struct() {
        let value = Known { struct_size: 0, first: 1, second: 2 };
        for (struct_size, expected) in [(8, [9, 9, 9]), (16, [1, 9, 9]), (24, [1, 2, 9]), (32, [1, 2, 0])] {
            let mut target = Newer { known: Known { struct_size, first: 9, second: 9 }, third: 9 };
            // SAFETY: `target` has 32 writable bytes, as many as the largest size that is declared.
            unsafe { write_struct("out", ptr::from_mut(&mut target).cast::<Known>(), &value) }.unwrap();
            assert_eq!([target.known.first, target.known.second, target.third], expected);
            assert_eq!(target.known.struct_size, struct_size);
        }
    }
}
