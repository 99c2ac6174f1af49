//! `sm90_matmul.cu` against the portable products and, bit for bit, against `matmul.cu`; and on which devices the choice falls on it.

use half::bf16;
use ns_llm_cuda_shim::ShimDevice;
use ns_llm_kernels::cuda::forms::Forms;
use ns_llm_kernels::cuda::launch::{Argument, Launch, Stream, Tiles};
use ns_llm_kernels::cuda::memory::Memory;
use ns_llm_kernels::cuda::product::{Form, Output, multiply, multiply_swiglu};

use crate::Test;
use crate::check::{F32, Random, compare, widened};
use crate::product::{check_finishes, check_stored, matrix, random_weights};
use crate::scalar;
use crate::shim::{Schedule, Shim, schedules, slice, slice_mut};

/// The tests of this file. On a GPU they need one of compute capability 9.0.
pub(crate) const TESTS: &[Test] = &[
    ("products of warpgroups are the scalar ones", products_are_the_scalar_ones),
    ("what follows a product of warpgroups is the scalar one", finishes_are_the_scalar_ones),
    ("warpgroups give the bits of the other kernels", bits_are_those_of_the_other_kernels),
    ("warpgroups refuse a result between multiples of 16", results_begin_at_multiples_of_16),
];

/// Those about devices that the shim plays, and tests of the tests: kernels with a bug.
pub(crate) const PLANTED: &[Test] = &[
    ("warpgroups are chosen on compute capability 9.0 alone", choice_follows_the_device),
    ("warpgroups with other bits are not chosen", other_bits_are_not_chosen),
    ("a stage that is filled while it is read shows", || shows("PLANT_NO_WAIT_FOR_ROOM", None)),
    ("a stage that is read before it is filled shows", || shows("PLANT_NO_WAIT_FOR_COPIES", None)),
    ("a stage that is left before its products end shows", || shows("PLANT_EARLY_LEAVE", None)),
    ("sums that are read before they are there show", || shows("PLANT_MISSING_WAIT", None)),
    ("a barrier that counts other bytes shows", || shows("PLANT_WRONG_BYTES", None)),
    ("a descriptor of another layout shows", || shows("PLANT_WRONG_DESCRIPTOR", None)),
    ("a product without a fence is refused", || {
        shows("PLANT_MISSING_FENCE", Some("wgmma without a fence behind other use of its registers"));
    }),
    ("a copy by no tensor map is refused", what_is_no_map_is_refused),
];

/// Two blocks, so that each has several tiles of a large product.
const FORM: Form = Form::Warpgroups { max_blocks: 2 };

/// Sizes around tiles, warpgroups' halves, stages and slices; fewer stages than the pipeline has, and more; more tiles
/// than blocks.
fn products_are_the_scalar_ones() {
    let shapes = [(1, 1, 8), (63, 40, 72), (70, 24, 712), (65, 129, 328), (130, 257, 256), (0, 8, 64)];
    check_stored(&[FORM], &shapes);
}

/// In whole pairs of features, and with one left over.
fn finishes_are_the_scalar_ones() {
    check_finishes(&[FORM], (67, 37, 264));
    check_finishes(&[FORM], (11, 70, 264));
}

/// Whatever the device says of itself is so: the bits of all rows are those of `matmul.cu`, for any number of blocks and with
/// neighbours or without, where it says that they are.
fn bits_are_those_of_the_other_kernels() {
    let (mut random, rows, features, columns) = (Random(5), 131, 70, 600);
    let [weights, up] = [true, true].map(|has_bias| random_weights(&mut random, features, columns, has_bias));
    let (x, shim) = (random.bf16s(rows * columns), Shim::new(Schedule::TAME));
    let bits = |form, x: &[bf16]| {
        let mut out = vec![f32::NAN; x.len() / columns * features];
        multiply(&shim, form, slice(x), &matrix(&weights), Output::Store(&mut slice_mut(&mut out))).expect("sizes fit");
        let mut both = vec![bf16::NAN; out.len()];
        let matrices = [&matrix(&weights), &matrix(&up)];
        multiply_swiglu(&shim, form, slice(x), matrices, &mut slice_mut(&mut both)).expect("sizes fit");
        (
            out.iter().map(|sum| sum.to_bits()).collect::<Vec<_>>(),
            both.iter().map(|it| it.to_bits()).collect::<Vec<_>>(),
        )
    };
    let want = bits(FORM, &x);
    assert_eq!(bits(Form::Warpgroups { max_blocks: 1 }, &x), want);
    assert_eq!(bits(Form::Warpgroups { max_blocks: 100 }, &x), want);
    for (first, rows) in [(0, 64), (64, 67), (130, 1)] {
        let (x, results) = (&x[first * columns..(first + rows) * columns], first * features..(first + rows) * features);
        let (sums, both) = bits(FORM, x);
        assert_eq!(
            (&sums[..], &both[..]),
            (&want.0[results.clone()], &want.1[results]),
            "rows {first}..{}",
            first + rows
        );
    }
    assert_eq!(bits(Form::Tile64, &x) == want, says_same_bits(), "the device says otherwise");
}

/// What the device that the tests run on says.
fn says_same_bits() -> bool {
    #[cfg(feature = "cuda")]
    if let Some(gpu) = crate::gpu::Gpu::wanted() {
        return gpu.forms().has_warpgroups();
    }
    forms_of((9, 0), None).has_warpgroups()
}

/// A result that begins between multiples of 16 bytes is refused by name; the other kernels take it.
fn results_begin_at_multiples_of_16() {
    let (mut random, mut out) = (Random(6), vec![0.0_f32; 20]);
    let (weights, x) = (random_weights(&mut random, 4, 8, false), random.bf16s(32));
    let start = 1 + out.as_ptr().align_offset(16);
    let mut store = |form| {
        let out = &mut out[start..start + 16];
        multiply(&Shim::new(Schedule::TAME), form, slice(&x), &matrix(&weights), Output::Store(&mut slice_mut(out)))
    };
    let error = store(FORM).expect_err("refused").to_string();
    assert!(error.starts_with("multiply: address of out is "), "{error}");
    assert_eq!(store(Form::Tile64), Ok(()));
}

fn forms_of(compute_capability: (i32, i32), plant: Option<&'static str>) -> Forms {
    let kernels = ns_llm_cuda_shim::Shim::new(env!("CARGO_TARGET_TMPDIR"), Schedule::TAME).with_planted(plant);
    Forms::of(&Memory::new(ShimDevice::of_capability(kernels, 4 << 20, compute_capability)))
}

/// Only Hopper has the instructions; what came before has not, and what came later has others.
fn choice_follows_the_device() {
    for capability in [(8, 0), (8, 6), (8, 9), (10, 0), (10, 3), (12, 0)] {
        assert_eq!(forms_of(capability, None), Forms::PORTABLE, "{capability:?}");
    }
    let hopper = forms_of((9, 0), None);
    assert_eq!(hopper.for_sizes(2048, 4096), Form::Warpgroups { max_blocks: 1 });
    assert_eq!(Forms::PORTABLE.for_sizes(2048, 4096), Form::Tile128);
}

/// A device whose `wgmma` rounds once more than its `mma.sync` is asked, and not believed.
fn other_bits_are_not_chosen() {
    assert_eq!(forms_of((9, 0), Some("PLANT_OTHER_ARITHMETIC")), Forms::PORTABLE);
}

/// A planted bug is wrong, or `refused` with these words, in at least one schedule. More stages than the pipeline has, so
/// that each is filled again. (That there is no bug without one is what the tests above show, in the same schedules.)
fn shows(plant: &'static str, refused: Option<&str>) {
    let (mut random, rows, features, columns) = (Random(7), 70, 24, 712);
    let weights = random_weights(&mut random, features, columns, false);
    let x = random.bf16s(rows * columns);
    let want = scalar::product(&widened(&x), &weights);
    let wrong = |schedule| {
        let (shim, mut out) = (Shim::with_planted(schedule, plant), vec![f32::NAN; rows * features]);
        let result = multiply(&shim, FORM, slice(&x), &matrix(&weights), Output::Store(&mut slice_mut(&mut out)));
        result.map_err(|error| error.to_string()).and_then(|()| compare(&out, &want, F32)).err()
    };
    let said: Vec<String> = schedules().filter_map(wrong).collect();
    assert!(!said.is_empty(), "{plant} went unseen");
    if let Some(words) = refused {
        assert!(said.iter().all(|said| said.contains(words)), "{said:?}");
    }
}

/// An argument that has a map's size and is none.
fn what_is_no_map_is_refused() {
    let (numbers, mut out) = (vec![bf16::ONE; 64], vec![0.0_f32; 1]);
    let tiles = Tiles::new(slice(&numbers).address(), [1, 64], 128);
    let arguments = [
        Argument::Tiles(&tiles),
        Argument::Struct(&[0; 128]),
        Argument::Address(0),
        slice_mut(&mut out).argument(),
        Argument::Int(1),
        Argument::Int(64),
        Argument::Int(1),
        Argument::Int(0),
    ];
    let (file, kernel, shared_bytes) = ("sm90_matmul", "sm90_matmul", 220 << 10);
    let launch = Launch { file, kernel, grid: [1, 1, 1], threads: 288, shared_bytes, arguments: &arguments };
    let error = Shim::new(Schedule::TAME).launch(&launch).expect_err("refused").to_string();
    assert_eq!(error, "sm90_matmul: a copy by something that is no tensor map");
}
