//! What the C face costs: CPU time per token of the same requests read through Rust's iterator, through
//! ns_llm_request_next() and through a callback, at 1, 16 and 64 streams.
//!
//! Each measurement is a process of its own (`boundary.c` for C, this program for Rust), the ways take turns, and the median
//! of the rounds counts. `process` is the CPU time of everything, computing included: its differences are small against
//! its spread, which is printed too. `readers` is the CPU time of the threads that read, the callback thread included: the
//! part where the faces differ, and steady.
//!
//! `cargo bench -p ns-llm-ffi --bench boundary [-- ROUNDS [MODEL]]`

#[path = "../tests/support/programs.rs"]
mod programs;
#[path = "../tests/support/project.rs"]
mod support;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};

use ns_llm_core::{Engine, EngineOptions, Event, Request};

/// Streams at once, and how often they all run in one process.
const LOADS: &[(usize, usize)] = &[(1, 12), (16, 3), (64, 2)];
const TOKENS: usize = 64;
const WAYS: &[&str] = &["iterator", "next", "callback"];
/// As in `boundary.c`, which says why.
const STACK_BYTES: usize = 1 << 20;
const PROMPT: &str = "Once upon a time";

/// Microseconds of CPU time per token.
#[derive(Clone, Copy)]
struct Cost {
    process: f64,
    readers: f64,
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["iterator", streams, repeats, model] => {
            println!("{}", iterate(Path::new(model), number(streams), number(repeats)));
        }
        [] => compare(7, &programs::model()),
        [rounds] => compare(number(rounds), &programs::model()),
        [rounds, model] => compare(number(rounds), Path::new(model)),
        _ => panic!("usage: boundary [ROUNDS [MODEL]]"),
    }
}

fn number(text: &str) -> usize {
    text.parse().unwrap_or_else(|_| panic!("{text} is not a number"))
}

/// Measures every way at every load in turns, and prints the medians.
fn compare(num_rounds: usize, model: &Path) {
    let program = programs::build(&support::crate_dir().join("benches/boundary.c"), programs::Linkage::Shared);
    println!("microseconds of CPU time per token, median of {num_rounds} rounds (spread of the middle half)");
    println!("{:>7}  {:<9} {:>20} {:>20}  {:>22}", "streams", "way", "process", "readers", "over the iterator");
    for &(streams, repeats) in LOADS {
        let mut costs = vec![Vec::new(); WAYS.len()];
        for _ in 0..num_rounds {
            for (way, costs) in WAYS.iter().zip(&mut costs) {
                costs.push(measure(&program, way, streams, repeats, model));
            }
        }
        let base = median(&costs[0], |cost| cost.readers).0;
        for (way, costs) in WAYS.iter().zip(&costs) {
            let (process, process_spread) = median(costs, |cost| cost.process);
            let (readers, readers_spread) = median(costs, |cost| cost.readers);
            println!(
                "{streams:>7}  {way:<9} {process:>11.2} ({process_spread:>6.2}) {readers:>11.2} ({readers_spread:>6.2})  {:>+22.2}",
                readers - base
            );
        }
    }
}

/// One process.
fn measure(program: &Path, way: &str, streams: usize, repeats: usize, model: &Path) -> Cost {
    let this: PathBuf = std::env::current_exe().expect("this program has a path");
    let mut command = Command::new(if way == "iterator" { this.as_path() } else { program });
    let output = programs::succeed(command.arg(way).args([streams.to_string(), repeats.to_string()]).arg(model));
    let text = String::from_utf8(output.stdout).expect("figures are text");
    let figures: Vec<f64> = text.split_whitespace().map(|word| word.parse().expect("a figure")).collect();
    let [process_ns, readers_ns, tokens] = figures[..] else { panic!("{text:?} is not three figures") };
    assert_eq!(tokens, (streams * repeats * TOKENS) as f64, "{way} did not do the whole work");
    Cost { process: process_ns / tokens / 1e3, readers: readers_ns / tokens / 1e3 }
}

/// Median, and the distance between the quartiles.
fn median(costs: &[Cost], of: impl Fn(&Cost) -> f64) -> (f64, f64) {
    let mut values: Vec<f64> = costs.iter().map(of).collect();
    values.sort_by(f64::total_cmp);
    let at = |share: f64| values[((values.len() - 1) as f64 * share).round() as usize];
    (at(0.5), at(0.75) - at(0.25))
}

/// The Rust face: one thread a stream, each with its iterator. `boundary.c` does the same with ns_llm_request_next().
fn iterate(model: &Path, streams: usize, repeats: usize) -> String {
    let engine = Engine::open(EngineOptions::new(model).threads(1)).expect("the model opens");
    let (readers_ns, tokens) = (AtomicU64::new(0), AtomicU64::new(0));
    let run = || {
        std::thread::scope(|scope| {
            for _ in 0..streams {
                let reader = || {
                    let started_ns = cpu_ns(libc::CLOCK_THREAD_CPUTIME_ID);
                    tokens.fetch_add(read_one(&engine), Ordering::Relaxed);
                    readers_ns.fetch_add(cpu_ns(libc::CLOCK_THREAD_CPUTIME_ID) - started_ns, Ordering::Relaxed);
                };
                let small = std::thread::Builder::new().stack_size(STACK_BYTES);
                small.spawn_scoped(scope, reader).expect("a thread starts");
            }
        });
    };
    run();
    readers_ns.store(0, Ordering::Relaxed);
    tokens.store(0, Ordering::Relaxed);
    let before = cpu_ns(libc::CLOCK_PROCESS_CPUTIME_ID);
    for _ in 0..repeats {
        run();
    }
    let process_ns = cpu_ns(libc::CLOCK_PROCESS_CPUTIME_ID) - before;
    format!("{process_ns} {} {}", readers_ns.into_inner(), tokens.into_inner())
}

fn read_one(engine: &Engine) -> u64 {
    let mut request = Request::prompt(PROMPT).max_tokens(TOKENS).temperature(0.0);
    request.ignore_eos = true;
    let stream = engine.generate(request).expect("the request is admitted");
    let mut num_tokens = 0;
    for event in stream {
        if let Event::Delta(delta) = event.expect("the request ends by itself") {
            num_tokens += delta.token_ids.len() as u64;
            std::hint::black_box(delta.text.len());
        }
    }
    num_tokens
}

fn cpu_ns(clock: libc::clockid_t) -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a writable `timespec`; both clocks exist on Linux.
    let result = unsafe { libc::clock_gettime(clock, &mut time) };
    assert_eq!(result, 0, "the clock exists");
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}
