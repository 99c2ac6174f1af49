//! What a launcher gives to a device: the name of a kernel, its grid and its arguments; and how it speaks of memory there.

use std::ffi::c_void;
use std::marker::PhantomData;

use crate::error::{Error, Result};

/// Most blocks along the second and third axis of a grid. (Along the first there may be 2^31 - 1.)
pub const MAX_GRID_YZ: usize = 65_535;

/// What kernels load and copy at once.
const LOAD_BYTES: u64 = 16;

/// Where kernels are enqueued: on a device one after the other, in the order of calls.
pub trait Stream {
    /// Enqueues a kernel; does not wait for it.
    fn launch(&self, launch: &Launch<'_>) -> Result<()>;
}

impl<S: Stream + ?Sized> Stream for std::sync::Arc<S> {
    fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        (**self).launch(launch)
    }
}

/// One kernel with its grid and arguments.
#[derive(Debug)]
pub struct Launch<'a> {
    /// Stem of the `.cu` file.
    pub file: &'static str,
    /// Name of the entry point.
    pub kernel: &'static str,
    /// Blocks along x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
    /// In the order of the kernel's parameters.
    pub arguments: &'a [Argument<'a>],
}

/// A parameter of a kernel.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Argument<'a> {
    /// Where an array begins on the device.
    Address(u64),
    /// `int`
    Int(i32),
    /// `unsigned`
    Unsigned(u32),
    /// `float`
    Float(f32),
    /// A `struct`, as it lies in memory.
    Struct(&'a [u8]),
    /// A tensor map of these tiles, which the stream makes of them.
    Tiles(&'a Tiles),
}

/// A matrix of bf16 and the tiles that kernels copy of it: 64 columns, in shared memory a row of 128 bytes whose pieces
/// are permuted (`kernels/cuda/sm90.cuh`). On a device the driver makes an opaque map of it; for the CPU that plays one
/// this is the map.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tiles {
    kind: u64,
    /// Where the matrix begins; a multiple of 16.
    pub address: u64,
    /// Rows of the matrix.
    pub rows: u64,
    /// Its columns, a multiple of 8; rows lie one behind the other.
    pub columns: u64,
    /// Rows of a tile; at most 256.
    pub tile_rows: u64,
    unused: [u64; 11],
}

/// Bytes of a tensor map.
const MAP_BYTES: usize = 128;
const _: () = assert!(size_of::<Tiles>() == MAP_BYTES);

impl Tiles {
    /// Columns of a tile.
    pub const COLUMNS: u32 = 64;
    /// Marks the CPU's maps (`kernels/shim/wgmma.h`).
    const KIND: u64 = 0x5449_4c45_444d_4150;

    /// Tiles of `tile_rows` rows of a matrix `[rows, columns]`.
    pub fn new(address: u64, [rows, columns]: [usize; 2], tile_rows: usize) -> Tiles {
        let [rows, columns, tile_rows] = [rows, columns, tile_rows].map(|size| size as u64);
        Tiles { kind: Tiles::KIND, address, rows, columns, tile_rows, unused: [0; 11] }
    }
    /// The same of a copy of the matrix.
    pub fn moved_to(self, address: u64) -> Tiles {
        Tiles { address, ..self }
    }
}

/// What may be a [`Argument::Struct`].
///
/// # Safety
/// `repr(C)` without padding, and field for field what the kernel's `struct` has.
pub unsafe trait DeviceStruct: Copy {}

impl<'a> Argument<'a> {
    /// A `struct` by value.
    pub fn of<T: DeviceStruct>(value: &'a T) -> Self {
        // SAFETY: the trait's promise is that there is no padding, so all bytes are initialized.
        Argument::Struct(unsafe { std::slice::from_raw_parts((&raw const *value).cast(), size_of::<T>()) })
    }
    /// Where the value lies in the host's memory, as the driver takes it; but of tiles, of which it takes a map.
    pub fn value(&self) -> *const c_void {
        match self {
            Argument::Address(value) => (&raw const *value).cast(),
            Argument::Int(value) => (&raw const *value).cast(),
            Argument::Unsigned(value) => (&raw const *value).cast(),
            Argument::Float(value) => (&raw const *value).cast(),
            Argument::Struct(bytes) => bytes.as_ptr().cast(),
            Argument::Tiles(tiles) => (&raw const **tiles).cast(),
        }
    }
    /// Bytes of the value.
    pub fn size_bytes(&self) -> usize {
        match self {
            Argument::Address(_) => 8,
            Argument::Int(_) | Argument::Unsigned(_) | Argument::Float(_) => 4,
            Argument::Struct(bytes) => bytes.len(),
            Argument::Tiles(_) => MAP_BYTES,
        }
    }
}

/// Numbers in a device's memory that a kernel reads.
#[derive(Debug)]
pub struct Slice<'a, T> {
    address: u64,
    len: usize,
    memory: PhantomData<&'a [T]>,
}

/// Numbers in a device's memory that a kernel writes.
#[derive(Debug)]
pub struct SliceMut<'a, T> {
    address: u64,
    len: usize,
    memory: PhantomData<&'a mut [T]>,
}

/// Where an array is, and how long.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    address: u64,
    len: usize,
}

impl Place {
    pub(crate) fn len(self) -> usize {
        self.len
    }
}

impl<T> Clone for Slice<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Slice<'_, T> {}

impl<T> Slice<'static, T> {
    /// No numbers, nowhere.
    pub const NOTHING: Slice<'static, T> = Slice { address: 0, len: 0, memory: PhantomData };
}

impl<'a, T> Slice<'a, T> {
    /// `len` numbers from `address` on.
    ///
    /// # Safety
    /// They are in memory that kernels of the stream may read, until the kernels launched with this slice have ended; and
    /// written by then.
    pub unsafe fn from_raw(address: u64, len: usize) -> Self {
        Slice { address, len, memory: PhantomData }
    }
    /// How many numbers.
    #[allow(clippy::len_without_is_empty, reason = "sizes are compared, emptiness is never asked")]
    pub fn len(&self) -> usize {
        self.len
    }
    /// For a kernel's parameter.
    pub fn argument(&self) -> Argument<'static> {
        Argument::Address(self.address)
    }
    /// For a field of a kernel's parameter.
    pub fn address(&self) -> u64 {
        self.address
    }
    /// For [`Sizes::aligned`].
    pub(crate) fn place(&self) -> Place {
        Place { address: self.address, len: self.len }
    }
}

impl<'a, T> SliceMut<'a, T> {
    /// `len` numbers from `address` on.
    ///
    /// # Safety
    /// They are in memory that kernels of the stream may write and nobody else uses until the kernels launched with this
    /// slice have ended.
    pub unsafe fn from_raw(address: u64, len: usize) -> Self {
        SliceMut { address, len, memory: PhantomData }
    }
    /// How many numbers.
    #[allow(clippy::len_without_is_empty, reason = "sizes are compared, emptiness is never asked")]
    pub fn len(&self) -> usize {
        self.len
    }
    /// For a kernel's parameter.
    pub fn argument(&self) -> Argument<'static> {
        Argument::Address(self.address)
    }
    /// For a field of a kernel's parameter.
    pub fn address(&self) -> u64 {
        self.address
    }
    /// For [`Sizes::aligned`].
    pub(crate) fn place(&self) -> Place {
        Place { address: self.address, len: self.len }
    }
}

/// The sizes of one operation, each compared and converted by its name.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sizes {
    pub(crate) operation: &'static str,
}

impl Sizes {
    /// Refuses unless `actual` is what the other arguments ask for.
    pub(crate) fn equal(self, dimension: &'static str, expected: usize, actual: usize) -> Result<()> {
        match expected == actual {
            true => Ok(()),
            false => Err(Error::SizeMismatch { operation: self.operation, dimension, expected, actual }),
        }
    }
    /// Refuses a size that is impossible by itself.
    pub(crate) fn require(
        self,
        dimension: &'static str,
        value: usize,
        holds: bool,
        expected: &'static str,
    ) -> Result<()> {
        match holds {
            true => Ok(()),
            false => Err(Error::InvalidSize { operation: self.operation, dimension, value, expected }),
        }
    }
    /// Refuses an array that kernels could not read 16 bytes at a time: on a device that ends the context. An array of nothing
    /// is nowhere.
    pub(crate) fn aligned<const N: usize>(self, arrays: [(&'static str, Place); N]) -> Result<()> {
        let (operation, expected) = (self.operation, "a multiple of 16");
        match arrays.into_iter().find(|(_, Place { address, len })| *len > 0 && !address.is_multiple_of(LOAD_BYTES)) {
            None => Ok(()),
            Some((dimension, Place { address, .. })) => {
                Err(Error::InvalidSize { operation, dimension, value: address as usize, expected })
            }
        }
    }
    /// As a kernel's `int`.
    pub(crate) fn int(self, dimension: &'static str, value: usize) -> Result<i32> {
        let (operation, expected) = (self.operation, "below 2^31");
        i32::try_from(value).map_err(|_| Error::InvalidSize { operation, dimension, value, expected })
    }
    /// Blocks along the first axis of a grid.
    pub(crate) fn blocks(self, dimension: &'static str, value: usize) -> Result<u32> {
        Ok(self.int(dimension, value)?.unsigned_abs())
    }
}
