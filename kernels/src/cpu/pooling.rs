//! From the states of a sequence's tokens to one vector.

use crate::error::{Error, Result};

/// Mean of `rows` `[count, mean.len()]`, element by element: one sum over the rows in order, divided by their count.
/// Fails when there is no row, or a part of one.
pub fn mean_rows(rows: &[f32], mean: &mut [f32]) -> Result<()> {
    let width = mean.len();
    if width == 0 || rows.is_empty() || !rows.len().is_multiple_of(width) {
        let (operation, dimension, value) = ("mean_rows", "elements of rows", rows.len());
        return Err(Error::InvalidSize { operation, dimension, value, expected: "whole rows, at least one" });
    }
    mean.fill(0.0);
    for row in rows.chunks_exact(width) {
        mean.iter_mut().zip(row).for_each(|(sum, value)| *sum += value);
    }
    let count = (rows.len() / width) as f32;
    mean.iter_mut().for_each(|sum| *sum /= count);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The mean of each column; a part of a row and no row at all are refused.
    #[test]
    fn means_are_by_column() {
        let mut mean = [9.0; 2];
        mean_rows(&[1.0, 10.0, 2.0, 20.0, 6.0, 30.0], &mut mean).expect("three rows");
        assert_eq!(mean, [3.0, 20.0]);
        assert!(mean_rows(&[1.0, 2.0, 3.0], &mut mean).is_err());
        assert!(mean_rows(&[], &mut mean).is_err());
    }
}
