//! `norm.cu` against the portable norms of `cpu::norm`.

use half::bf16;
use ns_llm_kernels::cpu::linear::{Operand, OperandFormat};
use ns_llm_kernels::cuda::norm::{RmsNorm, add_rms_norm, rms_norm, rms_norm_rows};

use crate::Test;
use crate::check::{BF16, F32, Random, check, widened};
use crate::scalar;
use crate::shim::{Schedule, Shim, schedules, slice, slice_mut};

/// The tests of this file.
pub(crate) const TESTS: &[Test] = &[
    ("norms are those of the scalar code", norms_are_the_scalar_ones),
    ("a norm is the same in any company", norm_is_row_invariant),
    ("norms refuse sizes that do not fit", norms_check_sizes),
];

const EPS: f32 = 1e-6;

fn scalar_norm(x: &[f32], weight: &[f32]) -> Vec<f32> {
    let mut out = Operand::zeros(OperandFormat::F32, x.len() / weight.len(), weight.len());
    ns_llm_kernels::cpu::norm::rms_norm(&scalar::cpu(), x, weight, EPS, &mut out).expect("sizes fit");
    scalar::rows_of(&out)
}

/// All three kernels over widths around a warp, a block and several vectors a thread, in every schedule.
fn norms_are_the_scalar_ones() {
    let mut random = Random(1);
    for width in [4, 32, 36, 124, 128, 132, 1024, 2048, 2052, 4100] {
        for rows in [0, 1, 3] {
            let (x, added) = (random.floats(rows * width), random.floats(rows * width));
            let weight = random.floats(width);
            let sum: Vec<f32> = x.iter().zip(&added).map(|(x, added)| x + added).collect();
            let (want, want_of_sum) = (scalar_norm(&x, &weight), scalar_norm(&sum, &weight));
            for schedule in schedules() {
                let what = format!("{rows} rows of {width}, {schedule:?}");
                let (shim, norm) = (Shim::new(schedule), RmsNorm { weight: slice(&weight), eps: EPS });
                let mut out = vec![bf16::NAN; x.len()];
                rms_norm(&shim, slice(&x), &norm, &mut slice_mut(&mut out)).expect(&what);
                check(&widened(&out), &want, BF16, &what);

                let mut out = vec![f32::NAN; x.len()];
                rms_norm_rows(&shim, slice(&x), &norm, &mut slice_mut(&mut out)).expect(&what);
                check(&out, &want, F32, &what);

                let (mut hidden, mut out) = (x.clone(), vec![bf16::NAN; x.len()]);
                add_rms_norm(&shim, &mut slice_mut(&mut hidden), slice(&added), &norm, &mut slice_mut(&mut out))
                    .expect(&what);
                assert_eq!(hidden, sum, "{what}");
                check(&widened(&out), &want_of_sum, BF16, &what);
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
        out
    };
    let together = norm_of(&x, Schedule::TAME);
    for schedule in schedules() {
        for (x, want) in x.chunks_exact(width).zip(together.chunks_exact(width)) {
            assert_eq!(norm_of(x, schedule), want, "{schedule:?}");
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
}
