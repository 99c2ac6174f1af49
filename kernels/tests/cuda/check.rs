//! Numbers for kernels, and the comparison with what they should make of them.

use half::bf16;

/// Deterministic numbers in -1..1 (SplitMix64, Steele et al. 2014).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    /// Numbers that use all of an f32's mantissa.
    pub(crate) fn floats(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| (self.next() >> 40) as f32 / (1_u64 << 23) as f32 - 1.0).collect()
    }
    /// Numbers that bf16 has.
    pub(crate) fn bf16s(&mut self, len: usize) -> Vec<bf16> {
        self.floats(len).into_iter().map(bf16::from_f32).collect()
    }
}

/// As floats.
pub(crate) fn widened(values: &[bf16]) -> Vec<f32> {
    values.iter().map(|value| value.to_f32()).collect()
}

/// What a result may be off by.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tolerance {
    /// Of the size of the wanted number.
    pub(crate) relative: f32,
    /// Whatever its size.
    pub(crate) absolute: f32,
}

/// Half the last bit of bf16, and a little of the operation itself.
pub(crate) const BF16: Tolerance = Tolerance { relative: 1.0 / 256.0 + 1e-5, absolute: 1e-6 };
/// Sums of some thousand f32 numbers in another order.
pub(crate) const F32: Tolerance = Tolerance { relative: 1e-5, absolute: 1e-5 };

/// Whether all elements are what they should be; the worst one otherwise.
pub(crate) fn compare(got: &[f32], want: &[f32], tolerance: Tolerance) -> Result<(), String> {
    assert_eq!(got.len(), want.len(), "number of elements");
    let excess = |(&got, &want): (&f32, &f32)| {
        let error = (got - want).abs() - (tolerance.relative * want.abs() + tolerance.absolute);
        if error.is_nan() { f32::INFINITY } else { error }
    };
    let worst = got.iter().zip(want).map(excess).enumerate().max_by(|a, b| a.1.total_cmp(&b.1));
    match worst {
        Some((i, excess)) if excess > 0.0 => Err(format!("element {i} is {}, must be {}", got[i], want[i])),
        _ => Ok(()),
    }
}

/// Panics, naming the worst element, unless all are what they should be.
pub(crate) fn check(got: &[f32], want: &[f32], tolerance: Tolerance, what: &str) {
    compare(got, want, tolerance).unwrap_or_else(|worst| panic!("{what}: {worst}"));
}
