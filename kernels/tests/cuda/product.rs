//! `matvec.cu` and `matmul.cu` against the portable products of `cpu::linear`, and bit for bit against each other.

use half::bf16;
use ns_llm_kernels::cuda::launch::Stream;
use ns_llm_kernels::cuda::product::{Form, Gelu, Matrix, Output, multiply, multiply_swiglu};

use crate::Test;
use crate::check::{BF16, F32, Random, check, compare, widened};
use crate::scalar::{self, Weights};
use crate::shim::{Schedule, Shim, schedules, slice, slice_mut};

/// The tests of this file.
pub(crate) const TESTS: &[Test] = &[
    ("products of few rows are the scalar ones", matvec_is_the_scalar_product),
    ("products of many rows are the scalar ones", matmul_is_the_scalar_product),
    ("what follows a product is the scalar one", finishes_are_the_scalar_ones),
    ("a row has the same bits in every kernel and company", products_are_row_invariant),
    ("products refuse sizes that do not fit", products_check_sizes),
    ("gate and up of different shapes are refused", gate_and_up_have_one_shape),
    ("arrays that kernels cannot load from are refused", arrays_begin_at_multiples_of_16),
];

/// Tests of the tests: kernels with a bug.
pub(crate) const PLANTED: &[Test] = &[
    ("a missing barrier in matvec shows", matvec_shows_a_missing_barrier),
    ("a missing barrier in matmul shows", matmul_shows_a_missing_barrier),
    ("a wait that allows too many copies in flight shows", matmul_shows_a_loose_wait),
    ("lanes that leave their warp are a deadlock", matvec_shows_divergent_lanes),
];

pub(crate) fn random_weights(random: &mut Random, features: usize, columns: usize, has_bias: bool) -> Weights {
    let (values, bias) = (random.bf16s(features * columns), has_bias.then(|| random.floats(features)));
    Weights { values, bias, features, columns }
}

pub(crate) fn matrix(weights: &Weights) -> Matrix<'_> {
    let &Weights { ref values, ref bias, features, columns } = weights;
    Matrix { weight: slice(values), bias: bias.as_deref().map(slice), features, columns }
}

/// `x W^T + bias` into memory that was NaN.
fn stored(stream: &impl Stream, form: Form, x: &[bf16], weights: &Weights) -> Vec<f32> {
    let mut out = vec![f32::NAN; x.len() / weights.columns * weights.features];
    let result = multiply(stream, form, slice(x), &matrix(weights), Output::Store(&mut slice_mut(&mut out)));
    result.unwrap_or_else(|error| panic!("{form:?}: {error}"));
    out
}

pub(crate) fn check_stored(forms: &[Form], shapes: &[(usize, usize, usize)]) {
    let mut random = Random(3);
    for &(rows, features, columns) in shapes {
        let weights = random_weights(&mut random, features, columns, features % 2 == 1);
        let x = random.bf16s(rows * columns);
        let want = scalar::product(&widened(&x), &weights);
        for (schedule, &form) in schedules().flat_map(|schedule| forms.iter().map(move |form| (schedule, form))) {
            let what = format!("{form:?}, {rows} x {columns} by {features}, {schedule:?}");
            check(&stored(&Shim::new(schedule), form, &x, &weights), &want, F32, &what);
        }
    }
}

/// Rows around half a tile and a whole one; features and columns around tiles, groups, slices and more slices than warps.
fn matvec_is_the_scalar_product() {
    let shapes =
        [(1, 8, 32), (2, 1, 8), (7, 9, 40), (8, 16, 256), (9, 33, 264), (16, 5, 520), (3, 8, 2312), (0, 8, 64)];
    check_stored(&[Form::Matvec], &shapes);
}

/// Both tile sizes; sizes around tiles, stages and slices, and fewer stages than are in flight.
fn matmul_is_the_scalar_product() {
    let shapes = [(1, 1, 8), (33, 63, 72), (64, 64, 256), (65, 129, 328), (130, 40, 520), (0, 8, 64)];
    check_stored(&[Form::Tile64, Form::Tile128], &shapes);
}

/// In every kernel that every device has.
fn finishes_are_the_scalar_ones() {
    check_finishes(&[Form::Matvec, Form::Tile64, Form::Tile128], (11, 37, 264));
}

/// Sums into a residual, both forms of GELU and SwiGLU.
pub(crate) fn check_finishes(forms: &[Form], (rows, features, columns): (usize, usize, usize)) {
    let mut random = Random(4);
    let [gate, up] = [true, false].map(|has_bias| random_weights(&mut random, features, columns, has_bias));
    let (x, residual) = (random.bf16s(rows * columns), random.floats(rows * features));
    let wide_x = widened(&x);
    let sums: Vec<f32> = scalar::product(&wide_x, &gate).iter().zip(&residual).map(|(sum, r)| r + sum).collect();
    for &form in forms {
        let (shim, what) = (Shim::new(Schedule::TAME), format!("{form:?}"));
        let mut out = residual.clone();
        let result = multiply(&shim, form, slice(&x), &matrix(&gate), Output::Add(&mut slice_mut(&mut out)));
        result.expect("sizes fit");
        check(&out, &sums, F32, &what);
        for gelu in [Gelu::Erf, Gelu::Tanh] {
            let mut out = vec![bf16::NAN; rows * features];
            let output = Output::Gelu(gelu, &mut slice_mut(&mut out));
            multiply(&shim, form, slice(&x), &matrix(&gate), output).expect("sizes fit");
            check(&widened(&out), &scalar::product_gelu(&wide_x, &gate, gelu), BF16, &format!("{form:?} {gelu:?}"));
        }
        let mut out = vec![bf16::NAN; rows * features];
        let matrices = [&matrix(&gate), &matrix(&up)];
        multiply_swiglu(&shim, form, slice(&x), matrices, &mut slice_mut(&mut out)).expect("sizes fit");
        check(&widened(&out), &scalar::product_swiglu(&wide_x, &gate, &up), BF16, &what);
    }
}

/// The bits of a row are the same alone, among 16, and among more in tiles of either size: the promise that lets decoding and
/// prefill of one model take different kernels. Several slices and a ragged last one take part.
fn products_are_row_invariant() {
    let (mut random, rows, features, columns) = (Random(5), 67, 24, 600);
    let [weights, up] = [true, true].map(|has_bias| random_weights(&mut random, features, columns, has_bias));
    let x = random.bf16s(rows * columns);
    let shim = Shim::new(Schedule::TAME);
    let swiglu_of = |form, x: &[bf16]| {
        let mut out = vec![bf16::NAN; x.len() / columns * features];
        let matrices = [&matrix(&weights), &matrix(&up)];
        multiply_swiglu(&shim, form, slice(x), matrices, &mut slice_mut(&mut out)).expect("sizes fit");
        out.iter().map(|value| value.to_bits()).collect::<Vec<_>>()
    };
    let bits = |form, x: &[bf16]| stored(&shim, form, x, &weights).iter().map(|sum| sum.to_bits()).collect::<Vec<_>>();
    let (want, want_swiglu) = (bits(Form::Tile64, &x), swiglu_of(Form::Tile64, &x));
    assert_eq!(bits(Form::Tile128, &x), want);
    assert_eq!(swiglu_of(Form::Tile128, &x), want_swiglu);
    for (first, rows) in [(0, 16), (16, 16), (32, 9), (5, 1), (66, 1)] {
        let (x, results) = (&x[first * columns..(first + rows) * columns], first * features..(first + rows) * features);
        assert_eq!(bits(Form::Matvec, x), want[results.clone()], "rows {first}..{}", first + rows);
        assert_eq!(swiglu_of(Form::Matvec, x), want_swiglu[results], "rows {first}..{}", first + rows);
    }
}

/// In how many schedules a product of kernels with a planted bug is wrong.
fn wrong_schedules(plant: Option<&'static str>, form: Form, (rows, features, columns): (usize, usize, usize)) -> usize {
    let mut random = Random(6);
    let weights = random_weights(&mut random, features, columns, false);
    let x = random.bf16s(rows * columns);
    let want = scalar::product(&widened(&x), &weights);
    let is_wrong = |schedule: &Schedule| {
        let shim = plant.map_or(Shim::new(*schedule), |plant| Shim::with_planted(*schedule, plant));
        compare(&stored(&shim, form, &x, &weights), &want, F32).is_err()
    };
    schedules().filter(is_wrong).count()
}

fn shows(plant: &'static str, form: Form, shape: (usize, usize, usize)) {
    assert_eq!(wrong_schedules(None, form, shape), 0, "{form:?} without a bug");
    assert!(wrong_schedules(Some(plant), form, shape) > 0, "{form:?} with {plant} went unseen");
}

/// Without the barrier behind the slices, a warp adds up slices that others have not computed.
fn matvec_shows_a_missing_barrier() {
    shows("PLANT_MISSING_BARRIER", Form::Matvec, (4, 8, 1024));
}

/// Without its one barrier a stage, a warp reads copies that have not arrived, or others fill what it still reads.
fn matmul_shows_a_missing_barrier() {
    shows("PLANT_MISSING_BARRIER", Form::Tile64, (64, 64, 512));
}

/// One group too many in flight, and a stage is read before its copies have arrived.
fn matmul_shows_a_loose_wait() {
    shows("PLANT_LOOSE_WAIT", Form::Tile64, (64, 64, 512));
}

/// Lanes that skip a warp's instruction leave the others waiting: told, in every schedule, not waited for.
fn matvec_shows_divergent_lanes() {
    let weights = random_weights(&mut Random(6), 8, 512, false);
    let (matrix, x) = (matrix(&weights), vec![bf16::ONE; 512]);
    for schedule in schedules() {
        let (shim, mut out) = (Shim::with_planted(schedule, "PLANT_DIVERGENT_GROUP"), vec![0.0; 8]);
        let output = Output::Store(&mut slice_mut(&mut out));
        let error = multiply(&shim, Form::Matvec, slice(&x), &matrix, output).expect_err("a deadlock").to_string();
        let want = "matvec: deadlock in block (0, 0, 0): 32 of 64 live threads wait at a barrier";
        assert_eq!(error, want, "{schedule:?}");
    }
}

/// Sizes that do not fit, or that a kernel does not take, are refused by name.
fn products_check_sizes() {
    let refused = |form, [x, weight, out]: [usize; 3], bias: Option<usize>, features, columns| {
        let (x, weight, mut out) = (vec![bf16::ZERO; x], vec![bf16::ZERO; weight], vec![0.0; out]);
        let bias = bias.map(|len| vec![0.0; len]);
        let matrix = Matrix { weight: slice(&weight), bias: bias.as_deref().map(slice), features, columns };
        let output = Output::Store(&mut slice_mut(&mut out));
        multiply(&Shim::new(Schedule::TAME), form, slice(&x), &matrix, output).expect_err("refused").to_string()
    };
    let few = |sizes, bias, features, columns| refused(Form::Matvec, sizes, bias, features, columns);
    assert_eq!(few([12, 24, 2], None, 2, 12), "multiply: columns is 12, must be a positive multiple of 8");
    assert_eq!(few([16, 0, 2], None, 0, 16), "multiply: features is 0, must be at least 1");
    assert_eq!(few([16, 24, 2], None, 2, 16), "multiply: elements of weight is 24, must be 32");
    assert_eq!(few([17, 32, 2], None, 2, 16), "multiply: elements of x is 17, must be 16");
    assert_eq!(few([16, 32, 3], None, 2, 16), "multiply: elements of out is 3, must be 2");
    assert_eq!(few([16, 32, 2], Some(3), 2, 16), "multiply: elements of bias is 3, must be 2");
    assert_eq!(few([17 * 8, 8, 17], None, 1, 8), "multiply: rows is 17, must be at most 16");
    let wide = few([50_184, 50_184, 1], None, 1, 50_184);
    assert_eq!(wide, "multiply: columns is 50184, must be at most 50,176, or half as many for gate and up");
    let tiled = refused(Form::Tile64, [8, 8 * 4_194_241, 4_194_241], None, 4_194_241, 8);
    assert_eq!(tiled, "multiply: features is 4194241, must be at most 65,535 tiles");
}

/// Gate and up whose shapes differ are refused, also where each of them fits `x` by itself: the kernels read both by
/// gate's columns.
fn gate_and_up_have_one_shape() {
    let refused = |[gate_features, gate_columns]: [usize; 2], [features, columns]: [usize; 2]| {
        let (x, mut out) = (vec![bf16::ZERO; 32], vec![bf16::ZERO; 32 / gate_columns * gate_features]);
        let weights = [vec![bf16::ZERO; gate_features * gate_columns], vec![bf16::ZERO; features * columns]];
        let [gate, up] = [&weights[0], &weights[1]].map(|weight| slice(weight));
        let gate = Matrix { weight: gate, bias: None, features: gate_features, columns: gate_columns };
        let up = Matrix { weight: up, bias: None, features, columns };
        let (shim, mut out) = (Shim::new(Schedule::TAME), slice_mut(&mut out));
        multiply_swiglu(&shim, Form::Matvec, slice(&x), [&gate, &up], &mut out).expect_err("refused").to_string()
    };
    assert_eq!(refused([2, 16], [2, 8]), "multiply_swiglu: columns of up is 8, must be 16");
    assert_eq!(refused([2, 8], [2, 16]), "multiply_swiglu: columns of up is 16, must be 8");
    assert_eq!(refused([2, 8], [3, 8]), "multiply_swiglu: features of up is 3, must be 2");
}

/// Arrays that begin between multiples of 16 bytes, where a load on a device would end its context, are refused by name.
fn arrays_begin_at_multiples_of_16() {
    #[repr(align(16))]
    struct Aligned([bf16; 64]);
    let (numbers, shim) = (Aligned([bf16::ZERO; 64]), Shim::new(Schedule::TAME));
    let refused = |x: &[bf16], weight: &[bf16]| {
        let (matrix, mut out) = (Matrix { weight: slice(weight), bias: None, features: 1, columns: 8 }, [0.0]);
        multiply(&shim, Form::Matvec, slice(x), &matrix, Output::Store(&mut slice_mut(&mut out)))
    };
    let numbers = &numbers.0;
    for (error, array) in [
        (refused(&numbers[1..9], &numbers[16..24]), "x"),
        (refused(&numbers[12..20], &numbers[..8]), "x"),
        (refused(&numbers[..8], &numbers[20..28]), "weight"),
    ] {
        let error = error.expect_err("refused").to_string();
        assert!(error.starts_with(&format!("multiply: address of {array} is ")), "{error}");
        assert!(error.ends_with(", must be a multiple of 16"), "{error}");
    }
    assert_eq!(refused(&numbers[8..16], &numbers[16..24]), Ok(()));
}
