//! What compiled kernels read before they have waited for those in front of them (`wait_for_kernels_before`): nothing but
//! weights. The source says so; a compiler that takes an argument for memory which nobody writes may move a load.

use crate::Test;

/// Those that need no toolkit.
pub(crate) const TESTS_OF_THE_RULE: &[Test] = &[("what is read before the wait shows", early_reads_show)];

/// The wait, in PTX.
const WAIT: &str = "griddepcontrol.wait";
/// Loads of weights (`load_streaming`), which no kernel writes.
const OF_WEIGHTS: &str = "L1::no_allocate";
/// What touches memory that another kernel may touch.
const ACCESSES: [&str; 7] = ["ld.global", "st.global", "atom.", "red.", "cp.async", "ld.volatile", "st.volatile"];

/// The kernels of a file of PTX that wait too late or never, each with why.
pub(crate) fn early_reads(ptx: &str) -> Vec<String> {
    let of_kernel = |text: &str| {
        let name = text.split('(').next().unwrap_or_default();
        let Some(wait) = text.find(WAIT) else { return vec![format!("{name} never waits")] };
        let statements = text[..wait].lines().map(str::trim).filter(|line| !line.starts_with("//"));
        let early = statements.filter(|line| {
            // A statement may stand behind a predicate.
            let operation = line.split_whitespace().find(|word| !word.starts_with('@')).unwrap_or_default();
            ACCESSES.iter().any(|access| operation.starts_with(access)) && !operation.contains(OF_WEIGHTS)
        });
        early.map(|line| format!("{name}, before it waits: {line}")).collect()
    };
    ptx.split(".entry ").skip(1).flat_map(of_kernel).collect()
}

/// A load, a store and a copy in front of the wait are told, and a kernel without it; weights are not.
fn early_reads_show() {
    let kernel = |name: &str, before: &str| {
        format!(
            ".visible .entry {name}(\n.param .u64 x\n)\n{{\n{before}\ngriddepcontrol.wait;\nld.global.f32 %f1, [%rd1];\nret;\n}}\n"
        )
    };
    let weights = "ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%r1,%r2,%r3,%r4}, [%rd2];\nld.param.u64 %rd1, [x];";
    assert_eq!(early_reads(&kernel("good", weights)), Vec::<String>::new());
    for access in [
        "ld.global.nc.f32 %f1, [%rd1];",
        "@%p1 st.global.f32 [%rd1], %f1;",
        "cp.async.cg.shared.global [%r1], [%rd1], 16;",
    ] {
        assert_eq!(early_reads(&kernel("bad", access)), [format!("bad, before it waits: {access}")]);
    }
    assert_eq!(early_reads(".entry lazy(\n)\n{\nret;\n}\n"), ["lazy never waits"]);
}
