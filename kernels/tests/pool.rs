//! The compute pool: every item once, whatever the sizes; panics come back to the caller; sleep and shutdown.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use ns_llm_kernels::cpu::pool::{DisjointMut, Pool, PoolPriority};

fn pool(num_threads: usize) -> Pool {
    Pool::new(num_threads, PoolPriority::BelowNormal).expect("a few threads")
}

/// Runs a job and checks that each item was computed exactly once, in ranges that respect the grain.
fn check_each_item_once(pool: &Pool, num_items: usize, grain: usize) {
    let mut counts = vec![0_u8; num_items];
    let shared = DisjointMut::new(&mut counts);
    pool.run(num_items, grain, |range| {
        assert!(!range.is_empty() && range.len() <= grain && range.start % grain == 0, "{range:?} of grain {grain}");
        // SAFETY: each item is in one range; were it in two, the count below would show it.
        unsafe { shared.range_mut(range) }.iter_mut().for_each(|count| *count += 1);
    });
    assert!(counts.iter().all(|&count| count == 1), "{num_items} items, grain {grain}: {counts:?}");
}

/// Each item is computed exactly once for many sizes, grains and thread numbers, more threads than cores included.
#[test]
fn each_item_once() {
    for num_threads in [1, 2, 3, 4, 7] {
        let pool = pool(num_threads);
        assert_eq!(pool.num_threads(), num_threads);
        for num_items in [0, 1, 2, 3, 5, 8, 31, 100, 1000] {
            for grain in [1, 2, 7, 2000] {
                check_each_item_once(&pool, num_items, grain);
            }
        }
    }
}

/// Ten thousand jobs on one pool, some after a pause in which the helpers fall asleep: none is lost.
#[test]
fn reuse_with_and_without_sleep() {
    let pool = pool(3);
    for job in 0..10_000 {
        if job % 500 == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
        check_each_item_once(&pool, job % 17, 1);
    }
}

/// Helpers really take part: two items that wait for each other can only end on two threads.
#[test]
fn items_run_at_the_same_time() {
    let pool = pool(2);
    let arrived = AtomicUsize::new(0);
    pool.run(2, 1, |_| {
        arrived.fetch_add(1, Ordering::SeqCst);
        while arrived.load(Ordering::SeqCst) < 2 {
            std::thread::yield_now();
        }
    });
    assert_eq!(arrived.load(Ordering::SeqCst), 2);
}

/// A thread that is stuck in its first item does not hold up the items of its share: others take them.
#[test]
fn idle_threads_steal() {
    let pool = pool(2);
    let others = AtomicUsize::new(0);
    pool.run(64, 1, |range| {
        if range.start == 0 {
            while others.load(Ordering::SeqCst) < 63 {
                std::thread::yield_now();
            }
        } else {
            others.fetch_add(1, Ordering::SeqCst);
        }
    });
    assert_eq!(others.load(Ordering::SeqCst), 63);
}

/// A panic in an item reaches the caller with its message after all other items are done, wherever it happened, and the
/// pool works on.
#[test]
fn panics_reach_the_caller() {
    let pool = pool(3);
    for bad in [0, 20, 49] {
        let done = AtomicUsize::new(0);
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            pool.run(50, 1, |range| {
                assert_ne!(range.start, bad, "item {bad} is bad");
                done.fetch_add(1, Ordering::SeqCst);
            });
        }));
        let panic = outcome.expect_err("the panic is raised again");
        assert!(panic.downcast_ref::<String>().is_some_and(|text| text.contains("is bad")));
        assert_eq!(done.load(Ordering::SeqCst), 49);
        check_each_item_once(&pool, 100, 3);
    }
}

/// A job inside a job runs on the thread that asked for it, instead of waiting for itself.
#[test]
fn jobs_nest() {
    let pool = pool(2);
    let inner = AtomicUsize::new(0);
    pool.run(4, 1, |_| pool.run(10, 1, |range| _ = inner.fetch_add(range.len(), Ordering::SeqCst)));
    assert_eq!(inner.load(Ordering::SeqCst), 40);
}

/// Several callers share one pool: their jobs take turns and all of them end.
#[test]
fn callers_take_turns() {
    let pool = pool(2);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| (0..200).for_each(|job| check_each_item_once(&pool, job % 23, 2)));
        }
    });
}

/// Dropping a pool ends its threads, whether they spin, sleep or never had work.
#[test]
fn drop_joins() {
    for round in 0..20 {
        let pool = pool(4);
        if round % 2 == 0 {
            check_each_item_once(&pool, 16, 1);
        }
        if round % 4 < 2 {
            std::thread::sleep(Duration::from_millis(1));
        }
        drop(pool);
    }
}
