//! The table of rotary position embedding (Su et al. 2021, arXiv:2104.09864), with the ways in which frequencies are
//! stretched for longer contexts. Computed once, when a model is loaded.
//!
//! The arithmetic is single precision where that of the reference implementations is: at position 100,000 an angle in
//! f32 differs from the exact one by a hundredth, and the models were trained with the former.

use std::f32::consts::TAU;

use crate::backend::RopeTable;
use crate::error::{Error, Result};
use crate::model::config::{RopeConfig, RopeScaling};

/// Cosines and sines for `positions` positions of heads of width `head_dim`.
pub fn rope_table(config: &RopeConfig, head_dim: usize, positions: usize) -> Result<RopeTable> {
    let inverse_frequencies = inverse_frequencies(config, head_dim);
    let len = positions.saturating_mul(inverse_frequencies.len());
    let (mut cos, mut sin) = (Vec::new(), Vec::new());
    for table in [&mut cos, &mut sin] {
        table.try_reserve_exact(len).map_err(|_| Error::OutOfMemory {
            purpose: "the table of rotary position embedding",
            needed_bytes: (len as u64).saturating_mul(8),
            available_bytes: 0,
        })?;
    }
    for position in 0..positions {
        for inverse_frequency in &inverse_frequencies {
            let angle = f64::from(position as f32 * inverse_frequency);
            cos.push(angle.cos() as f32);
            sin.push(angle.sin() as f32);
        }
    }
    Ok(RopeTable { rotary_dim: head_dim, cos, sin })
}

/// `theta^(-2i / head_dim)` for each pair `i`, scaled: `[head_dim / 2]`, radians per position.
fn inverse_frequencies(config: &RopeConfig, head_dim: usize) -> Vec<f32> {
    let pairs = (0..head_dim).step_by(2);
    let plain = pairs.map(|i| 1.0 / config.rope_theta.powf(f64::from(i as f32 / head_dim as f32)) as f32);
    match config.scaling {
        RopeScaling::Default => plain.collect(),
        RopeScaling::Linear { factor } => plain.map(|f| f / factor as f32).collect(),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
            let (factor, low, high) = (factor as f32, low_freq_factor as f32, high_freq_factor as f32);
            let original = original_max_position_embeddings as f32;
            plain.map(|f| llama3(f, original * f / TAU, factor, low, high)).collect()
        }
    }
}

/// `turns`: how often this pair turns around in the original context, which decides between the three cases.
fn llama3(inverse_frequency: f32, turns: f32, factor: f32, low: f32, high: f32) -> f32 {
    if turns > high {
        inverse_frequency
    } else if turns < low {
        inverse_frequency / factor
    } else {
        let blend = (turns - low) / (high - low);
        (1.0 - blend) * inverse_frequency / factor + blend * inverse_frequency
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(scaling: RopeScaling) -> RopeConfig {
        RopeConfig { rope_theta: 10_000.0, scaling }
    }

    /// The table is cos and sin of position times `theta^(-2i/d)`: shown against the formula in double precision.
    #[test]
    fn table_follows_the_formula() {
        let table = rope_table(&config(RopeScaling::Default), 8, 300).unwrap();
        assert_eq!((table.rotary_dim, table.cos.len(), table.sin.len()), (8, 1200, 1200));
        for (position, pair) in [(0, 0), (1, 3), (17, 1), (299, 0), (299, 3)] {
            let angle = position as f64 * 10_000_f64.powf(-2.0 * pair as f64 / 8.0);
            assert!((f64::from(table.cos[position * 4 + pair]) - angle.cos()).abs() < 1e-4);
            assert!((f64::from(table.sin[position * 4 + pair]) - angle.sin()).abs() < 1e-4);
        }
    }

    /// Llama 3 scaling leaves high frequencies, divides low ones and blends between, without a jump at either edge.
    #[test]
    fn llama3_scaling_is_continuous() {
        assert_eq!(llama3(0.5, 4.1, 8.0, 1.0, 4.0), 0.5);
        assert_eq!(llama3(0.5, 0.9, 8.0, 1.0, 4.0), 0.0625);
        assert_eq!(llama3(0.5, 4.0, 8.0, 1.0, 4.0), 0.5);
        assert_eq!(llama3(0.5, 1.0, 8.0, 1.0, 4.0), 0.0625);
        let middle = llama3(0.5, 2.5, 8.0, 1.0, 4.0);
        assert!((middle - 0.28125).abs() < 1e-6, "{middle}");
    }

    /// Linear scaling is the plain table at stretched positions.
    #[test]
    fn linear_scaling_stretches_positions() {
        let plain = rope_table(&config(RopeScaling::Default), 8, 10).unwrap();
        let stretched = rope_table(&config(RopeScaling::Linear { factor: 2.0 }), 8, 19).unwrap();
        assert_eq!(plain.cos[9 * 4..], stretched.cos[18 * 4..]);
    }
}
