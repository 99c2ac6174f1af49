//! Which forms of a product a device has, and which one is taken. `wgmma` computes products of many rows on Hopper, where
//! its bits are those of `mma.sync`: no manual promises that, so the device itself is asked when it is opened, with
//! numbers that tell one arithmetic from another. Where a bit differs, and on every other device, `mma.sync` computes all
//! products. So a row's bits depend neither on how many rows are computed with it nor on the form, on any device.

use std::sync::Arc;

use half::bf16;

use super::driver::DeviceInfo;
use super::memory::Memory;
use super::product::{Form, Matrix, Output, multiply};
use super::sm90_matmul;
use crate::error::Result;

/// Environment variable that keeps a device from `wgmma` when it says "off".
pub const WARPGROUPS_VARIABLE: &str = "NS_LLM_CUDA_WARPGROUPS";
/// The compute capability that has `wgmma`; those that came later have other instructions in its place.
const WARPGROUP_CAPABILITY: (i32, i32) = (9, 0);
/// Fewer tiles than this leave so many multiprocessors without work that small tiles of `mma.sync` are as fast.
const MIN_WARPGROUP_TILES: usize = 64;

/// Rows, features and columns of the question that is asked: one tile, two slices and a ragged third.
const ASKED: (usize, usize, usize) = (128, 128, 584);

/// The forms of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Forms {
    /// Blocks of `sm90_matmul.cu` that run at the same time; `None`: the device has no such form, or not with these bits.
    warpgroup_blocks: Option<u32>,
}

impl Forms {
    /// Those that every device has.
    pub const PORTABLE: Forms = Forms { warpgroup_blocks: None };

    /// Those of the device whose memory it is. Runs two small kernels where there is something to ask; a device that cannot
    /// answer has the portable ones.
    pub fn of(memory: &Arc<Memory>) -> Forms {
        let info = memory.driver().info();
        let is_off = std::env::var_os(WARPGROUPS_VARIABLE).is_some_and(|value| value == "off");
        if is_off || !has_warpgroups(info) {
            return Forms::PORTABLE;
        }
        let warpgroups = Forms { warpgroup_blocks: Some(info.num_multiprocessors.max(1).unsigned_abs()) };
        match same_bits(memory, Form::Warpgroups { max_blocks: 1 }) {
            Ok(true) => warpgroups,
            Ok(false) | Err(_) => Forms::PORTABLE,
        }
    }

    /// Whether `sm90_matmul.cu` is among them.
    pub fn has_warpgroups(&self) -> bool {
        self.warpgroup_blocks.is_some()
    }

    /// The one that is expected to be fastest for a product of `rows` rows with a matrix of `features` rows.
    pub fn for_sizes(&self, rows: usize, features: usize) -> Form {
        let has_work = rows.div_ceil(sm90_matmul::TILE) * features.div_ceil(sm90_matmul::TILE) >= MIN_WARPGROUP_TILES;
        match (Form::for_sizes(rows, features), self.warpgroup_blocks) {
            (Form::Tile64 | Form::Tile128, Some(max_blocks)) if has_work => Form::Warpgroups { max_blocks },
            (form, _) => form,
        }
    }
}

/// Whether the device has the instructions, the driver its part of them, and a block the room.
fn has_warpgroups(info: &DeviceInfo) -> bool {
    info.compute_capability == WARPGROUP_CAPABILITY
        && info.has_tensor_maps
        && info.max_shared_bytes >= sm90_matmul::SHARED_BYTES as i32
}

/// Whether `form` gives the bits of `mma.sync`.
fn same_bits(memory: &Arc<Memory>, form: Form) -> Result<bool> {
    const PURPOSE: &str = "a question to the device";
    let (rows, features, columns) = ASKED;
    let (x, weight) = (telling_numbers(1, rows * columns), telling_numbers(2, features * columns));
    let (x, weight) = (memory.filled(PURPOSE, &[&x])?, memory.filled(PURPOSE, &[&weight])?);
    let matrix = Matrix { weight: weight.all(), bias: None, features, columns };
    let product = |form| -> Result<Vec<u32>> {
        let mut out = memory.zeroed::<f32>(PURPOSE, rows * features)?;
        multiply(memory.driver(), form, x.all(), &matrix, Output::Store(&mut out.all_mut()))?;
        let mut sums = vec![0.0; out.len()];
        out.download(0, &mut sums)?;
        Ok(sums.into_iter().map(f32::to_bits).collect())
    };
    Ok(product(form)? == product(Form::Tile64)?)
}

/// Numbers of either sign between 2^-12 and 2^12 (SplitMix64, Steele et al. 2014). Their products lie so far apart that a sum
/// shows how many bits are kept below the largest, how they are rounded, and how many are added at once.
fn telling_numbers(seed: u64, len: usize) -> Vec<bf16> {
    let mut state = seed;
    let number = |_| {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        let (sign_and_mantissa, exponent) = (z as u16 & 0x807f, 115 + (z >> 16) as u16 % 24);
        bf16::from_bits(sign_and_mantissa | exponent << 7)
    };
    (0..len).map(number).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Many rows of a wide matrix take warpgroups where a device has them; few rows, and few tiles, do not.
    #[test]
    fn forms_follow_sizes_and_device() {
        let (portable, hopper) = (Forms::PORTABLE, Forms { warpgroup_blocks: Some(132) });
        let warpgroups = Form::Warpgroups { max_blocks: 132 };
        for (rows, features, of_hopper) in [
            (1, 4096, Form::Matvec),
            (16, 151_936, Form::Matvec),
            (17, 4096, Form::Tile64),
            (512, 1024, Form::Tile64),
            (256, 4096, warpgroups),
            (512, 4096, warpgroups),
            (2048, 1024, warpgroups),
            (256, 151_936, warpgroups),
        ] {
            assert_eq!(hopper.for_sizes(rows, features), of_hopper, "{rows} rows, {features} features");
            assert_eq!(portable.for_sizes(rows, features), Form::for_sizes(rows, features));
        }
    }

    /// The numbers of the question are finite, of both signs, and spread over the exponents they should.
    #[test]
    fn the_question_is_a_telling_one() {
        let numbers = telling_numbers(1, 4096);
        let exponent = |number: &bf16| number.to_bits() >> 7 & 0xff;
        let mut exponents: Vec<u16> = numbers.iter().map(exponent).collect();
        exponents.sort_unstable();
        exponents.dedup();
        assert_eq!(exponents, (115..139).collect::<Vec<_>>());
        assert!(numbers.iter().any(|number| number.is_sign_negative()));
        assert!(numbers.iter().any(|number| number.is_sign_positive()));
        assert_ne!(numbers, telling_numbers(2, 4096));
    }
}
