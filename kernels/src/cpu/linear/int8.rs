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
}

/// 32 columns of a row.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C, align(8))]
pub(crate) struct Int8Group {
    /// The codes, for products of 16 bits.
    pub(crate) wide: [i16; GROUP_COLUMNS],
    /// The codes, for products of bytes.
    pub(crate) codes: [i8; GROUP_COLUMNS],
    /// Sums of the codes of the first and of the second half.
    pub(crate) sums: [i16; 2],
    /// What a code of one stands for; NaN when a number was not finite.
    pub(crate) scale: f32,
}

impl Int8Group {
    /// Up to 32 numbers; the rest is zero.
    fn new(values: &[f32]) -> Int8Group {
        let mut padded = [0.0; GROUP_COLUMNS];
        padded[..values.len()].copy_from_slice(values);
        // Compared as integers, magnitudes have the order of numbers, infinity and NaN above all.
        let peak_bits = padded.iter().fold(0, |peak, value| (value.to_bits() & 0x7fff_ffff).max(peak));
        let peak = f32::from_bits(peak_bits);
        if !peak.is_finite() {
            return Int8Group { scale: f32::NAN, ..Int8Group::default() };
        }
        if peak < MIN_PEAK {
            return Int8Group::default();
        }
        let inverse = MAX_CODE / peak;
        let mut group = Int8Group { scale: peak / MAX_CODE, ..Int8Group::default() };
        for (wide, value) in group.wide.iter_mut().zip(padded) {
            *wide = (value * inverse + ROUND).to_bits() as i16;
        }
        for (code, &wide) in group.codes.iter_mut().zip(&group.wide) {
            *code = wide as i8;
        }
        let (first, second) = group.wide.split_at(GROUP_COLUMNS / 2);
        group.sums = [first.iter().sum(), second.iter().sum()];
        group
    }
}

impl Int8Rows {
    pub(super) fn resize(&mut self, rows: usize, width: usize) {
        self.groups_per_row = width.div_ceil(GROUP_COLUMNS);
        self.groups.resize(rows * self.groups_per_row, Int8Group::default());
    }
    pub(super) fn writer(&mut self) -> Int8Writer<'_> {
        Int8Writer { groups_per_row: self.groups_per_row, groups: DisjointMut::new(&mut self.groups) }
    }
    /// Groups from one row to the next.
    pub(crate) fn groups_per_row(&self) -> usize {
        self.groups_per_row
    }
    /// The groups of all rows from `row` on.
    pub(crate) fn groups_from(&self, row: usize) -> &[Int8Group] {
        &self.groups[row * self.groups_per_row..]
    }
    pub(super) fn row_into(&self, row: usize, out: &mut [f32]) {
        for (out, group) in out.chunks_mut(GROUP_COLUMNS).zip(self.groups_from(row)) {
            out.iter_mut().zip(group.codes).for_each(|(out, code)| *out = group.scale * f32::from(code));
        }
    }
    pub(super) fn copy_rows_from(&mut self, x: &Int8Rows, first_row: usize, rows: usize) {
        self.groups.copy_from_slice(&x.groups_from(first_row)[..rows * self.groups_per_row]);
    }
}

/// Shared access for the threads of one job.
pub(super) struct Int8Writer<'a> {
    groups_per_row: usize,
    groups: DisjointMut<'a, Int8Group>,
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
        // SAFETY: `range_mut` checks the end; the caller vouches for no overlap.
        let groups = unsafe { self.groups.range_mut(range) };
        for (group, values) in groups.iter_mut().zip(values.chunks(GROUP_COLUMNS)) {
            *group = Int8Group::new(values);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Codes are the nearest, ties to even, the largest magnitude is 127, sums are exact.
    #[test]
    fn numbers_become_nearest_codes() {
        let values: [f32; 32] = std::array::from_fn(|i| if i == 7 { -127.0 } else { i as f32 * 1.5 - 20.0 });
        let group = Int8Group::new(&values);
        assert_eq!(group.scale, 1.0);
        for (i, &value) in values.iter().enumerate() {
            assert_eq!(f32::from(group.codes[i]), value.round_ties_even(), "{value}");
            assert_eq!(i16::from(group.codes[i]), group.wide[i]);
        }
        let sums = [0, 16].map(|start| group.wide[start..start + 16].iter().sum());
        assert_eq!(group.sums, sums);
        let short = Int8Group::new(&[0.5, -2.0]);
        assert_eq!((short.codes[0], short.codes[1], short.codes[2], short.scale), (32, -127, 0, 2.0 / 127.0));
    }

    /// What is not finite makes a NaN of the scale; nothing else does, from zeros to numbers near the largest.
    #[test]
    fn what_is_not_finite_shows() {
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(Int8Group::new(&[1.0, value]).scale.is_nan());
        }
        for value in [0.0, -0.0, f32::MIN_POSITIVE, 1e-44, 1e-35, 2e-35, 1.0, 3e38, -3e38] {
            let group = Int8Group::new(&[value, 0.0]);
            assert!(group.scale.is_finite() && group.codes[1] == 0, "{value:e}");
            let error = (group.scale * f32::from(group.codes[0]) - value).abs();
            assert!(error <= value.abs() * 1e-6 || value.abs() < MIN_PEAK, "{value:e}: {error:e}");
        }
    }
}
