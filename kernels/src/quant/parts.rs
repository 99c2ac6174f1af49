//! A block taken apart: what products with integer arithmetic multiply, in one shape for all formats.

use super::PackedScales;

/// The parts of one block. A format writes those that it has; the others keep what they held.
///
/// A number of group `g` is `d scales[g] v - d_min mins[g]`, where `v` is what the format makes of its code `q`: the code
/// itself, the code less an offset, or an entry of a table. Formats of one group of 32 have neither `scales` nor `mins`:
/// both count as one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BlockParts {
    /// Codes, as many as the block has numbers. Signed ones as their bits.
    pub(crate) q: [u8; 256],
    /// Integer scale of each group.
    pub(crate) scales: [i8; 16],
    /// Integer minimum of each group.
    pub(crate) mins: [u8; 16],
    /// Bits of the block's scale: an f16, of MXFP4 a bf16.
    pub(crate) d: u16,
    /// Bits of the scale of the minimums, an f16.
    pub(crate) d_min: u16,
}

impl Default for BlockParts {
    fn default() -> Self {
        BlockParts { q: [0; 256], scales: [1; 16], mins: [1; 16], d: 0, d_min: 0 }
    }
}

impl BlockParts {
    /// Codes of 4 bits of a block of 32: the lower halves first.
    pub(super) fn set_nibbles(&mut self, q: &[u8; 16]) {
        for (i, &byte) in q.iter().enumerate() {
            (self.q[i], self.q[16 + i]) = (byte & 15, byte >> 4);
        }
    }
    /// Scales and minimums of eight groups.
    pub(super) fn set_group_scales(&mut self, packed: &PackedScales) {
        let (scales, mins) = packed.unpack();
        self.scales[..8].copy_from_slice(&scales.map(|scale| scale as i8));
        self.mins[..8].copy_from_slice(&mins);
    }
    /// Codes of a block of 32. (From an iterator: an array that is mapped first is not kept in registers.)
    pub(super) fn set_codes(&mut self, q: impl IntoIterator<Item = u8>) {
        let codes: &mut [u8; 32] = self.q.first_chunk_mut().expect("256 codes");
        codes.iter_mut().zip(q).for_each(|(code, q)| *code = q);
    }
}
