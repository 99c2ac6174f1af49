//! What the source of a kernel says and its PTX has to keep: before a kernel has waited for those in front of it
//! (`wait_for_kernels_before`) it reads nothing but weights, though a compiler may move the load of what it takes for memory
//! that nobody writes; and each sum and product names its rounding, so that no driver fuses two when it compiles this text for
//! a device of its own.

use crate::Test;

/// Those that need no toolkit.
pub(crate) const TESTS_OF_THE_RULE: &[Test] = &[("what PTX does not keep shows", broken_promises_show)];

/// The wait.
const WAIT: &str = "griddepcontrol.wait";
/// Loads of weights (`load_streaming`), which no kernel writes.
const OF_WEIGHTS: &str = "L1::no_allocate";
/// The architecture from which kernels may be launched early.
const WAITS_FROM: u32 = 90;
/// What touches memory, and the memory that is a kernel's own.
const ACCESSES: [&str; 5] = ["ld.", "st.", "atom.", "red.", "cp.async"];
const OWN_MEMORY: [&str; 4] = [".param", ".shared", ".local", ".const"];
/// What a compiler may fuse where no rounding is named.
const FUSIBLE: [&str; 3] = ["add", "sub", "mul"];
const FLOATS: [&str; 4] = ["f32", "ftz.f32", "ftz.sat.f32", "f64"];

/// What the kernels of a file of PTX do not keep.
pub(crate) fn broken_promises(ptx: &str) -> Vec<String> {
    let target = ptx.split(".target sm_").nth(1).expect("PTX names its target");
    let digits = target.split(|letter: char| !letter.is_ascii_digit()).next().unwrap_or_default();
    let waits = digits.parse::<u32>().expect("a number") >= WAITS_FROM;
    ptx.split(".entry ").skip(1).flat_map(|text| of_kernel(text, waits)).collect()
}

fn of_kernel(text: &str, waits: bool) -> Vec<String> {
    let name = text.split('(').next().unwrap_or_default();
    let mut broken = match text.find(WAIT) {
        _ if !waits => Vec::new(),
        None => vec![format!("{name} never waits")],
        Some(wait) => with_operation(&text[..wait], |operation| {
            let is_access = ACCESSES.iter().any(|access| operation.starts_with(access));
            let is_own =
                OWN_MEMORY.iter().any(|memory| operation.contains(memory)) && !operation.starts_with("cp.async");
            is_access && !is_own && !operation.contains(OF_WEIGHTS)
        })
        .map(|line| format!("{name}, before it waits: {line}"))
        .collect(),
    };
    let fusible = with_operation(text, |operation| {
        operation.split_once('.').is_some_and(|(name, float)| FUSIBLE.contains(&name) && FLOATS.contains(&float))
    });
    broken.extend(fusible.map(|line| format!("{name}, rounded in whatever way: {line}")));
    broken
}

/// Lines with such an operation. It may stand behind a predicate.
fn with_operation(text: &str, is_wanted: impl Fn(&str) -> bool) -> impl Iterator<Item = &str> {
    let statements = text.lines().map(str::trim).filter(|line| !line.starts_with("//"));
    statements.filter(move |line| {
        let operation = line.split_whitespace().find(|word| !word.starts_with('@'));
        operation.is_some_and(&is_wanted)
    })
}

/// A load, a store and a copy in front of the wait are told, a kernel without it, and a product without a rounding; weights
/// are not, nor what older devices do not wait for.
fn broken_promises_show() {
    let kernel = |before: &str, after: &str| {
        format!(
            ".target sm_90\n.visible .entry one(\n.param .u64 x\n)\n{{\n{before}\n{WAIT};\nld.global.f32 %f1, [%rd1];\n{after}\nret;\n}}\n"
        )
    };
    let weights = "ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%r1,%r2,%r3,%r4}, [%rd2];\nld.param.u64 %rd1, [x];";
    assert_eq!(broken_promises(&kernel(weights, "mul.rn.f32 %f2, %f1, %f1;")), Vec::<String>::new());
    let early = [
        "ld.global.nc.f32 %f1, [%rd1];",
        "@%p1 st.global.f32 [%rd1], %f1;",
        "ld.u32 %r1, [%rd1];",
        "cp.async.cg.shared.global [%r1], [%rd1], 16;",
    ];
    for access in early {
        assert_eq!(broken_promises(&kernel(access, "")), [format!("one, before it waits: {access}")]);
    }
    for product in ["@%p1 mul.f32 %f2, %f1, %f1;", "add.f64 %fd2, %fd1, %fd1;"] {
        assert_eq!(broken_promises(&kernel("", product)), [format!("one, rounded in whatever way: {product}")]);
    }
    assert_eq!(broken_promises(".target sm_100\n.entry lazy(\n)\n{\nret;\n}\n"), ["lazy never waits"]);
    assert_eq!(broken_promises(".target sm_80\n.entry old(\n)\n{\nret;\n}\n"), Vec::<String>::new());
}
