//! `norm.cu` against the portable norms of `cpu::norm`.

use half::bf16;
use ns_llm_kernels::cpu::linear::{Operand, OperandFormat};
use ns_llm_kernels::cuda::norm::{
    LayerNorm, RmsNorm, layer_norm, layer_norm_both, layer_norm_rows, rms_norm, rms_norm_rows,
};

use crate::Test;
use crate::check::{BF16, F32, Random, Tolerance, check, widened};
use crate::scalar;
use crate::shim::{Schedule, Shim, schedules, slice, slice_mut};

/// The tests of this file.
pub(crate) const TESTS: &[Test] = &[
    ("norms are those of the scalar code", norms_are_the_scalar_ones),
    ("a norm around the mean is that of f64", layer_norms_are_exact),
    ("a norm is the same in any company", norm_is_row_invariant),
    ("norms refuse sizes that do not fit", norms_check_sizes),
];

const EPS: f32 = 1e-6;

fn scalar_norm(x: &[f32], weight: &[f32]) -> Vec<f32> {
    let mut out = Operand::zeros(OperandFormat::F32, x.len() / weight.len(), weight.len());
    ns_llm_kernels::cpu::norm::rms_norm(&scalar::cpu(), x, weight, EPS, &mut out).expect("sizes fit");
    scalar::rows_of(&out)
}

/// Both kernels over widths around a warp, a block and several vectors a thread, in every schedule.
fn norms_are_the_scalar_ones() {
    let mut random = Random(1);
    for width in [4, 32, 36, 124, 128, 132, 1024, 2048, 2052, 4100] {
        for rows in [0, 1, 3] {
            let (x, weight) = (random.floats(rows * width), random.floats(width));
            let want = scalar_norm(&x, &weight);
            for schedule in schedules() {
                let what = format!("{rows} rows of {width}, {schedule:?}");
                let (shim, norm) = (Shim::new(schedule), RmsNorm { weight: slice(&weight), eps: EPS });
                let mut out = vec![bf16::NAN; x.len()];
                rms_norm(&shim, slice(&x), &norm, &mut slice_mut(&mut out)).expect(&what);
                check(&widened(&out), &want, BF16, &what);

                let mut out = vec![f32::NAN; x.len()];
                rms_norm_rows(&shim, slice(&x), &norm, &mut slice_mut(&mut out)).expect(&what);
                check(&out, &want, F32, &what);
            }
        }
    }
}

/// In f64: the scalar code's sum of a long row in one chain is off by more than the kernels'.
fn exact_layer_norm(x: &[f32], weight: &[f32], bias: &[f32]) -> Vec<f32> {
    let width = weight.len() as f64;
    let normed = x.chunks_exact(weight.len()).flat_map(|row| {
        let mean = row.iter().map(|&x| f64::from(x)).sum::<f64>() / width;
        let variance = row.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / width;
        let factor = (variance + f64::from(EPS)).sqrt().recip();
        let norm = move |((&x, &weight), &bias): ((&f32, &f32), &f32)| {
            ((f64::from(x) - mean) * factor * f64::from(weight) + f64::from(bias)) as f32
        };
        row.iter().zip(weight).zip(bias).map(norm)
    });
    normed.collect()
}

/// All three kernels of LayerNorm over the same widths, of rows far from zero, whose variance cancels if it is not summed
/// around the mean; both results of the third are those of the others, to the bit.
fn layer_norms_are_exact() {
    let mut random = Random(3);
    for width in [4, 36, 128, 768, 2052, 4100] {
        for rows in [0, 1, 3] {
            let x: Vec<f32> = random.floats(rows * width).iter().map(|x| x + 40.0).collect();
            let (weight, bias) = (random.floats(width), random.floats(width));
            let want = exact_layer_norm(&x, &weight, &bias);
            // Numbers near 40 have 2^-18 as their last bit, and a row's mean is off by some of these.
            let tolerance = Tolerance { relative: 1e-5, absolute: 5e-5 };
            for schedule in schedules() {
                let what = format!("{rows} rows of {width}, {schedule:?}");
                let shim = Shim::new(schedule);
                let norm = LayerNorm { weight: slice(&weight), bias: slice(&bias), eps: EPS };
                let mut exact = vec![f32::NAN; x.len()];
                layer_norm_rows(&shim, slice(&x), &norm, &mut slice_mut(&mut exact)).expect(&what);
                check(&exact, &want, tolerance, &what);

                let mut out = vec![bf16::NAN; x.len()];
                layer_norm(&shim, slice(&x), &norm, &mut slice_mut(&mut out)).expect(&what);
                let rounded: Vec<bf16> = exact.iter().map(|x| bf16::from_f32(*x)).collect();
                assert_eq!(out, rounded, "{what}");

                let (mut normed, mut out) = (vec![f32::NAN; x.len()], vec![bf16::NAN; x.len()]);
                let to = &mut slice_mut(&mut normed);
                layer_norm_both(&shim, slice(&x), &norm, to, &mut slice_mut(&mut out)).expect(&what);
                assert!(normed == exact && out == rounded, "{what}");
            }
        }
    }
}

/// Each row has the same bits alone as among others, in whatever order the threads run.
fn norm_is_row_invariant() {
    let (mut random, width) = (Random(2), 516);
    let (x, weight) = (random.floats(5 * width), random.floats(width));
    let norm_of = |x: &[f32], schedule| {
        let mut out = vec![f32::NAN; x.len()];
        let norm = RmsNorm { weight: slice(&weight), eps: EPS };
        rms_norm_rows(&Shim::new(schedule), slice(x), &norm, &mut slice_mut(&mut out)).expect("sizes fit");
        let (mut centered, norm) =
            (vec![f32::NAN; x.len()], LayerNorm { weight: slice(&weight), bias: slice(&weight), eps: EPS });
        layer_norm_rows(&Shim::new(schedule), slice(x), &norm, &mut slice_mut(&mut centered)).expect("sizes fit");
        assert!(out != centered, "one norm twice");
        out.chunks_exact(width)
            .zip(centered.chunks_exact(width))
            .map(|rows| [rows.0, rows.1].concat())
            .collect::<Vec<_>>()
    };
    let together = norm_of(&x, Schedule::TAME);
    for schedule in schedules() {
        for (x, want) in x.chunks_exact(width).zip(&together) {
            assert_eq!(norm_of(x, schedule), [want.as_slice()], "{schedule:?}");
        }
    }
}

/// Sizes that do not fit are refused by name, before anything is launched.
fn norms_check_sizes() {
    let shim = Shim::new(Schedule::TAME);
    let refused = |width: usize, x: usize, out: usize| {
        let (weight, x, mut out) = (vec![1.0; width], vec![0.0; x], vec![0.0; out]);
        let norm = RmsNorm { weight: slice(&weight), eps: EPS };
        rms_norm_rows(&shim, slice(&x), &norm, &mut slice_mut(&mut out)).expect_err("refused").to_string()
    };
    assert_eq!(refused(6, 12, 12), "rms_norm_rows: width is 6, must be a positive multiple of 4");
    assert_eq!(refused(0, 12, 12), "rms_norm_rows: width is 0, must be a positive multiple of 4");
    assert_eq!(refused(8, 12, 12), "rms_norm_rows: elements of x is 12, must be 8");
    assert_eq!(refused(8, 16, 8), "rms_norm_rows: elements of out is 8, must be 16");
    let (weight, bias, x, mut out) = (vec![1.0; 8], vec![1.0; 12], vec![0.0; 16], vec![0.0; 16]);
    let norm = LayerNorm { weight: slice(&weight), bias: slice(&bias), eps: EPS };
    let error = layer_norm_rows(&shim, slice(&x), &norm, &mut slice_mut(&mut out)).expect_err("refused");
    assert_eq!(error.to_string(), "layer_norm_rows: elements of bias is 12, must be 8");
}
