//! How the K formats lay out 256 numbers of 1, 2 or 4 bits: as planes of 32 (or 64) bytes, number `i` of a plane in byte `i`,
//! so that one shift of a whole vector gives neighbouring numbers.

/// Unpacks planes of `PLANE` bytes with numbers of `BITS` bits: the lowest bits of a plane's bytes are its first `PLANE`
/// numbers, the next ones those behind, and so on up the byte; then the next plane.
pub(super) fn unpack<const BITS: usize, const PLANE: usize>(packed: &[u8]) -> [u8; 256] {
    const { assert!(8 % BITS == 0) };
    assert_eq!(packed.len(), 32 * BITS, "bytes of 256 numbers of {BITS} bits");
    let mut numbers = [0; 256];
    let planes = packed.as_chunks::<PLANE>().0.iter();
    for (plane, numbers) in planes.zip(numbers.chunks_exact_mut(PLANE * 8 / BITS)) {
        for (place, numbers) in numbers.as_chunks_mut::<PLANE>().0.iter_mut().enumerate() {
            for (number, &byte) in numbers.iter_mut().zip(plane) {
                *number = byte >> (place * BITS) & ((1 << BITS) - 1);
            }
        }
    }
    numbers
}

/// Packs the lowest `BITS` bits of each number as [`unpack`] reads them.
pub(super) fn pack<const BITS: usize, const PLANE: usize, const BYTES: usize>(numbers: &[u8; 256]) -> [u8; BYTES] {
    const { assert!(8 % BITS == 0 && BYTES == 32 * BITS) };
    let mut packed = [0; BYTES];
    let planes = packed.as_chunks_mut::<PLANE>().0.iter_mut();
    for (plane, numbers) in planes.zip(numbers.chunks_exact(PLANE * 8 / BITS)) {
        for (place, numbers) in numbers.as_chunks::<PLANE>().0.iter().enumerate() {
            for (byte, &number) in plane.iter_mut().zip(numbers) {
                *byte |= (number & ((1 << BITS) - 1)) << (place * BITS);
            }
        }
    }
    packed
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each form that a format uses: every number comes back, and each lies at the byte and bit that the formats name.
    #[test]
    fn numbers_lie_where_the_formats_say() {
        fn check<const BITS: usize, const PLANE: usize, const BYTES: usize>() {
            let numbers: [u8; 256] = std::array::from_fn(|i| ((i * 37 + 11) % 251) as u8 & ((1 << BITS) - 1));
            let packed: [u8; BYTES] = pack::<BITS, PLANE, BYTES>(&numbers);
            assert_eq!(unpack::<BITS, PLANE>(&packed), numbers);
            for (i, &number) in numbers.iter().enumerate() {
                let (plane, in_plane) = (i / (PLANE * 8 / BITS), i % (PLANE * 8 / BITS));
                let byte = packed[plane * PLANE + in_plane % PLANE];
                assert_eq!(byte >> (in_plane / PLANE * BITS) & ((1 << BITS) - 1), number, "{BITS} bits: number {i}");
            }
        }
        check::<1, 32, 32>();
        check::<2, 32, 64>();
        check::<4, 32, 128>();
        check::<4, 64, 128>();
    }
}
