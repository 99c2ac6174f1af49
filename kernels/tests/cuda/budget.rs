//! `budget.toml` against what ptxas says of each kernel: registers, shared memory, and how many blocks fit a multiprocessor.

use std::collections::BTreeMap;
use std::path::Path;

use crate::ptx::broken_promises;
use crate::shim::entry_points;
use crate::{Test, toolkit};

/// The tests of this file.
pub(crate) const TESTS: &[Test] =
    &[("kernels stay inside their budget, and their PTX keeps its promises", kernels_stay_inside)];
/// Those that need no toolkit.
pub(crate) const TESTS_OF_THE_RULE: &[Test] = &[("what exceeds a budget shows", what_exceeds_shows)];

/// What ptxas says of a kernel on one architecture.
#[derive(Debug, Default, Clone, PartialEq)]
struct Usage {
    registers: usize,
    shared_bytes: usize,
    stack_bytes: usize,
}

/// One entry of `budget.toml`.
struct Budget {
    threads: usize,
    registers: usize,
    shared_bytes: usize,
    dynamic_shared_bytes: usize,
    blocks_per_sm: usize,
}

impl Budget {
    fn read(kernel: &str, entry: &toml::Value) -> Budget {
        let number = |name: &str| {
            let number = entry.get(name).and_then(toml::Value::as_integer);
            number.unwrap_or_else(|| panic!("{kernel} has no number `{name}`")) as usize
        };
        let fields = entry.as_table().map_or(0, |table| table.len());
        assert_eq!(fields, 5, "{kernel} has five numbers");
        Budget {
            threads: number("threads"),
            registers: number("registers"),
            shared_bytes: number("shared_bytes"),
            dynamic_shared_bytes: number("dynamic_shared_bytes"),
            blocks_per_sm: number("blocks_per_sm"),
        }
    }

    /// What is wrong with a kernel that uses `usage`.
    fn exceeded_by(&self, usage: &Usage) -> Vec<String> {
        let fitting = self.blocks_that_fit(usage);
        let mut broken = Vec::new();
        if usage.registers > self.registers {
            broken.push(format!("{} registers, budget {}", usage.registers, self.registers));
        }
        if usage.shared_bytes != self.shared_bytes {
            broken.push(format!("{} bytes of static shared memory, budget {}", usage.shared_bytes, self.shared_bytes));
        }
        if usage.stack_bytes > 0 {
            broken.push(format!("{} bytes of stack: an array did not fit the registers", usage.stack_bytes));
        }
        if fitting < self.blocks_per_sm {
            broken.push(format!("{fitting} blocks fit a multiprocessor, budget {}", self.blocks_per_sm));
        }
        broken
    }

    /// On sm_90: registers are given to warps by 256, each block takes 1 KiB of shared memory for itself.
    fn blocks_that_fit(&self, usage: &Usage) -> usize {
        let warp_registers = (usage.registers * 32).next_multiple_of(256);
        let by_registers = (64 << 10) / warp_registers / self.threads.div_ceil(32);
        let block_shared = usage.shared_bytes + self.dynamic_shared_bytes + (1 << 10);
        by_registers.min((228 << 10) / block_shared).min(2048 / self.threads).min(32)
    }
}

/// Kernels and architectures in the messages of ptxas.
fn usages(messages: &str) -> BTreeMap<(String, String), Usage> {
    let mut found = BTreeMap::new();
    let mut current = None;
    let before = |line: &str, unit: &str| -> usize {
        let number = line.split(unit).next().and_then(|start| start.split_whitespace().last());
        number.and_then(|number| number.parse().ok()).unwrap_or_else(|| panic!("a number before `{unit}` in `{line}`"))
    };
    for line in messages.lines() {
        if line.contains("Compiling entry function") {
            let mut names = line.split('\'').skip(1).step_by(2).map(str::to_owned);
            let key = (names.next().expect("a kernel"), names.next().expect("an architecture"));
            found.insert(key.clone(), Usage::default());
            current = Some(key);
        }
        let Some(usage) = current.as_ref().and_then(|key| found.get_mut(key)) else { continue };
        if line.contains("bytes stack frame") {
            usage.stack_bytes = before(line, " bytes stack frame");
        }
        if line.contains("Used ") {
            usage.registers = before(line, " registers");
            usage.shared_bytes = if line.contains(" bytes smem") { before(line, " bytes smem") } else { 0 };
        }
    }
    found
}

/// Every kernel of every file is in the budget and inside it on each architecture, and the budget names no others. Spills are
/// errors of the compilation itself. The same compilation leaves its PTX.
fn kernels_stay_inside() {
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(kernels.join("budget.toml")).expect("budget.toml is there");
    let mut budget: toml::Table = text.parse().expect("budget.toml is TOML");
    let nvcc = toolkit::nvcc(kernels.parent().expect("a root")).expect("the test is ignored without it");
    let mut broken = Vec::new();
    for source in toolkit::sources(kernels) {
        let stem = source.file_stem().expect("a name").to_string_lossy().into_owned();
        let mut entries =
            budget.remove(&stem).and_then(|entries| entries.try_into::<toml::Table>().ok()).unwrap_or_default();
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{stem}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder");
        let mut compilation = toolkit::compilation(&nvcc, &source, &folder.join("fatbin"));
        let output = compilation.arg("--keep").arg("--keep-dir").arg(&folder).output().expect("nvcc runs");
        let messages = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "nvcc refuses {stem}.cu:\n{messages}");
        broken.extend(broken_promises_of(&folder).into_iter().map(|line| format!("{stem}.{line}")));
        std::fs::remove_dir_all(&folder).expect("nvcc wrote it");
        let usages = usages(&messages);
        for kernel in entry_points(&std::fs::read_to_string(&source).expect("readable")) {
            let Some(entry) = entries.remove(kernel) else {
                broken.push(format!("{stem}.{kernel}: not in budget.toml"));
                continue;
            };
            let kernel_budget = Budget::read(kernel, &entry);
            let of_kernel: Vec<_> = usages.iter().filter(|((name, _), _)| name == kernel).collect();
            assert!(!of_kernel.is_empty(), "ptxas says nothing of {kernel}:\n{messages}");
            for ((_, architecture), usage) in of_kernel {
                let lines = kernel_budget.exceeded_by(usage);
                broken.extend(lines.into_iter().map(|line| format!("{stem}.{kernel} on {architecture}: {line}")));
            }
        }
        broken.extend(
            entries.keys().map(|kernel| format!("{stem}.{kernel}: in budget.toml, but there is no such kernel")),
        );
    }
    broken.extend(budget.keys().map(|file| format!("{file}: in budget.toml, but there is no such file")));
    assert!(broken.is_empty(), "budget.toml:\n  {}", broken.join("\n  "));
}

/// Of all PTX that nvcc left in the folder.
fn broken_promises_of(folder: &Path) -> Vec<String> {
    let files = std::fs::read_dir(folder).expect("nvcc wrote there").flatten().map(|entry| entry.path());
    let texts = files.filter(|path| path.extension().is_some_and(|extension| extension == "ptx"));
    let texts: Vec<String> = texts.map(|path| std::fs::read_to_string(path).expect("readable")).collect();
    assert!(!texts.is_empty(), "no PTX in {}", folder.display());
    texts.iter().flat_map(|text| broken_promises(text)).collect()
}

/// Messages of ptxas become numbers, and each number beyond its budget is told.
fn what_exceeds_shows() {
    let messages = "ptxas info    : Compiling entry function 'one' for 'sm_80'\n\
                    ptxas info    : Function properties for one\n\
                    \x20   0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n\
                    ptxas info    : Used 22 registers, used 1 barriers, 128 bytes smem, 392 bytes cmem[0]\n\
                    ptxas info    : Compiling entry function 'one' for 'sm_90'\n\
                    \x20   40 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n\
                    ptxas info    : Used 41 registers, used 1 barriers\n";
    let usages = usages(messages);
    let on = |architecture: &str| &usages[&("one".to_owned(), architecture.to_owned())];
    assert_eq!(on("sm_80"), &Usage { registers: 22, shared_bytes: 128, stack_bytes: 0 });
    assert_eq!(on("sm_90"), &Usage { registers: 41, shared_bytes: 0, stack_bytes: 40 });
    let budget = Budget { threads: 256, registers: 32, shared_bytes: 128, dynamic_shared_bytes: 0, blocks_per_sm: 8 };
    assert_eq!(budget.exceeded_by(on("sm_80")), Vec::<String>::new());
    let broken = budget.exceeded_by(on("sm_90"));
    for what in ["41 registers", "0 bytes of static", "40 bytes of stack", "5 blocks fit"] {
        assert!(broken.iter().any(|line| line.starts_with(what)), "{what}: {broken:?}");
    }
    // 49,152 bytes and the system's 1,024 four times in 228 KiB.
    let large =
        Budget { threads: 128, registers: 128, shared_bytes: 0, dynamic_shared_bytes: 49_152, blocks_per_sm: 4 };
    assert_eq!(large.blocks_that_fit(&Usage { registers: 122, ..Usage::default() }), 4);
}
