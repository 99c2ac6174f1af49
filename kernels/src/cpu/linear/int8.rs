//! Activations in 8 bits: each group of 32 columns of a row has one scale, `x = scale q`, `q` in -127..=127. Rounding is a
//! function of the group's own numbers, so that a row is the same in any company.

use super::super::pool::DisjointMut;
use super::quant_panel::GROUP_COLUMNS;

/// Largest magnitude of a code.
const MAX_CODE: f32 = 127.0;
/// Groups whose numbers are all smaller are zero: the inverse of their scale would not be finite.
const MIN_PEAK: f32 = 1e-35;
/// Adding it rounds a number below 2^22 to the nearest integer, ties to even, which are then its lowest bits.
const ROUND: f32 = 12_582_912.0;

/// Rows of groups.
#[derive(Debug, Clone, Default)]
pub(crate) struct Int8Rows {
    groups_per_row: usize,
    groups: Vec<Int8Group>,
    /// The same codes for products of 16 bits; where there are products of bytes nobody writes or reads them. They lie apart:
    /// without them a group is so small that those of a block stay in the L1 cache.
    wide: Vec<WideCodes>,
}

/// Codes of a group in 16 bits.
pub(crate) type WideCodes = [i16; GROUP_COLUMNS];

/// 32 columns of a row.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C, align(8))]
pub(crate) struct Int8Group {
    pub(crate) codes: [i8; GROUP_COLUMNS],
    /// Sums of the codes of the first and of the second half.
    pub(crate) sums: [i16; 2],
    /// What a code of one stands for; NaN when a number was not finite.
    pub(crate) scale: f32,
}

/// `groups[i]`, and their codes in 16 bits, of `values[32 i..]`: as many as there are, the rest of the last group zero.
///
/// # Safety
/// The CPU has the instruction set of the table that holds the function.
pub(crate) type RoundKernel = unsafe fn(values: &[f32], groups: &mut [Int8Group], wide: &mut [WideCodes]);

/// The [`RoundKernel`] of any instruction set: it becomes vector code of the function that it ends up in. Products of bytes
/// need no codes in 16 bits.
#[inline(always)]
pub(crate) fn round_groups<const WIDE: bool>(values: &[f32], groups: &mut [Int8Group], wide: &mut [WideCodes]) {
    let (whole, rest) = values.as_chunks::<GROUP_COLUMNS>();
    assert!(groups.len() == values.len().div_ceil(GROUP_COLUMNS) && wide.len() == groups.len(), "groups of the values");
    for ((group, wide), values) in groups.iter_mut().zip(wide.iter_mut()).zip(whole) {
        group.round::<WIDE>(values, wide);
    }
    if !rest.is_empty() {
        let mut padded = [0.0; GROUP_COLUMNS];
        padded[..rest.len()].copy_from_slice(rest);
        groups[whole.len()].round::<WIDE>(&padded, &mut wide[whole.len()]);
    }
}

impl Int8Group {
    #[inline(always)]
    fn round<const WIDE: bool>(&mut self, values: &[f32; GROUP_COLUMNS], wide: &mut WideCodes) {
        // Compared as integers, magnitudes have the order of numbers, infinity and NaN above all.
        let peak_bits = values.iter().fold(0, |peak, value| (value.to_bits() & 0x7fff_ffff).max(peak));
        let peak = f32::from_bits(peak_bits);
        if !peak.is_finite() || peak < MIN_PEAK {
            let scale = if peak.is_finite() { 0.0 } else { f32::NAN };
            (*self, *wide) = (Int8Group { scale, ..Int8Group::default() }, [0; GROUP_COLUMNS]);
            return;
        }
        let inverse = MAX_CODE / peak;
        let mut rounded: WideCodes = [0; GROUP_COLUMNS];
        for (rounded, value) in rounded.iter_mut().zip(values) {
            *rounded = (value * inverse + ROUND).to_bits() as i16;
        }
        let (first, second) = rounded.split_at(GROUP_COLUMNS / 2);
        self.sums = [first.iter().sum(), second.iter().sum()];
        self.scale = peak / MAX_CODE;
        for (code, &rounded) in self.codes.iter_mut().zip(&rounded) {
            *code = rounded as i8;
        }
        if WIDE {
            *wide = rounded;
        }
    }
}

impl Int8Rows {
    pub(super) fn resize(&mut self, rows: usize, width: usize) {
        self.groups_per_row = width.div_ceil(GROUP_COLUMNS);
        self.groups.resize(rows * self.groups_per_row, Int8Group::default());
        self.wide.resize(self.groups.len(), [0; GROUP_COLUMNS]);
    }
    /// # Safety
    /// The CPU has the instruction set of `round`.
    pub(super) unsafe fn writer(&mut self, round: RoundKernel) -> Int8Writer<'_> {
        let (groups, wide) = (DisjointMut::new(&mut self.groups), DisjointMut::new(&mut self.wide));
        Int8Writer { groups_per_row: self.groups_per_row, groups, wide, round }
    }
    /// Groups from one row to the next.
    pub(crate) fn groups_per_row(&self) -> usize {
        self.groups_per_row
    }
    /// The groups of all rows from `row` on.
    pub(crate) fn groups_from(&self, row: usize) -> &[Int8Group] {
        &self.groups[row * self.groups_per_row..]
    }
    /// Their codes in 16 bits.
    pub(crate) fn wide_from(&self, row: usize) -> &[WideCodes] {
        &self.wide[row * self.groups_per_row..]
    }
    pub(super) fn row_into(&self, row: usize, out: &mut [f32]) {
        for (out, group) in out.chunks_mut(GROUP_COLUMNS).zip(self.groups_from(row)) {
            out.iter_mut().zip(group.codes).for_each(|(out, code)| *out = group.scale * f32::from(code));
        }
    }
    pub(super) fn copy_rows_from(&mut self, x: &Int8Rows, first_row: usize, rows: usize) {
        self.groups.copy_from_slice(&x.groups_from(first_row)[..rows * self.groups_per_row]);
        self.wide.copy_from_slice(&x.wide_from(first_row)[..rows * self.groups_per_row]);
    }
}

/// Shared access for the threads of one job.
pub(super) struct Int8Writer<'a> {
    groups_per_row: usize,
    groups: DisjointMut<'a, Int8Group>,
    wide: DisjointMut<'a, WideCodes>,
    round: RoundKernel,
}

impl Int8Writer<'_> {
    /// # Safety
    /// No other thread stores to the same groups at the same time.
    pub(super) unsafe fn store(&self, row: usize, column: usize, values: &[f32], width: usize) {
        let is_whole = column.is_multiple_of(GROUP_COLUMNS)
            && (values.len().is_multiple_of(GROUP_COLUMNS) || column + values.len() == width);
        assert!(is_whole, "{} values at {column} are not whole groups of {GROUP_COLUMNS}", values.len());
        let first = row * self.groups_per_row + column / GROUP_COLUMNS;
        let range = first..first + values.len().div_ceil(GROUP_COLUMNS);
        // SAFETY: `range_mut` checks the end; the caller vouches for no overlap, and who made the writer for the instructions.
        unsafe { (self.round)(values, self.groups.range_mut(range.clone()), self.wide.range_mut(range)) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rounded(values: &[f32]) -> (Int8Group, WideCodes) {
        let (mut group, mut wide) = (Int8Group::default(), [0; GROUP_COLUMNS]);
        round_groups::<true>(values, std::slice::from_mut(&mut group), std::slice::from_mut(&mut wide));
        (group, wide)
    }

    /// Codes are the nearest, ties to even, the largest magnitude is 127, sums are exact.
    #[test]
    fn numbers_become_nearest_codes() {
        let values: [f32; 32] = std::array::from_fn(|i| if i == 7 { -127.0 } else { i as f32 * 1.5 - 20.0 });
        let (group, wide) = rounded(&values);
        assert_eq!(group.scale, 1.0);
        for (i, &value) in values.iter().enumerate() {
            assert_eq!(f32::from(group.codes[i]), value.round_ties_even(), "{value}");
            assert_eq!(i16::from(group.codes[i]), wide[i]);
        }
        let sums = [0, 16].map(|start| wide[start..start + 16].iter().sum());
        assert_eq!(group.sums, sums);
        let (short, _) = rounded(&[0.5, -2.0]);
        assert_eq!((short.codes[0], short.codes[1], short.codes[2], short.scale), (32, -127, 0, 2.0 / 127.0));
    }

    /// What is not finite makes a NaN of the scale; nothing else does, from zeros to numbers near the largest.
    #[test]
    fn what_is_not_finite_shows() {
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(rounded(&[1.0, value]).0.scale.is_nan());
        }
        for value in [0.0, -0.0, f32::MIN_POSITIVE, 1e-44, 1e-35, 2e-35, 1.0, 3e38, -3e38] {
            let (group, _) = rounded(&[value, 0.0]);
            assert!(group.scale.is_finite() && group.codes[1] == 0, "{value:e}");
            let error = (group.scale * f32::from(group.codes[0]) - value).abs();
            assert!(error <= value.abs() * 1e-6 || value.abs() < MIN_PEAK, "{value:e}: {error:e}");
        }
    }
}
