//! The compute threads, and how the items of one operation are shared among them. Knows nothing of what is computed.
//!
//! A job is a number of items, cut into chunks of `grain` items. Each thread has a contiguous share of the chunks, takes
//! them one at a time, and then takes chunks from the shares of others. The caller is thread 0. The join counts finished
//! chunks, not threads: a helper that is asleep or descheduled is waited for only while it holds a chunk, so one busy
//! core delays one chunk, not the operation.
//!
//! Invariants:
//! - Each chunk of a job is executed exactly once, by whichever thread; results must not depend on by whom.
//! - `job` is written only while no chunk is unfinished, and read only by the holder of an unfinished chunk.
//! - The claim word of a share carries the job's epoch: a thread that is late finds another epoch, claims nothing, and
//!   never looks at a job that is over. (The 32-bit epoch would have to go round exactly once between a load and the
//!   compare-exchange that follows it; at one job a microsecond that thread slept for over an hour.)

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::marker::PhantomData;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::host;

/// How long a thread without work looks for some before it sleeps. The operations of one step follow each other within
/// this time; waking a sleeping thread costs 2 to 30 microseconds.
const SPIN_TIME: Duration = Duration::from_micros(50);
/// Looks at the condition between two looks at the clock.
const SPINS_PER_CLOCK: u32 = 32;

/// How the helper threads compete with other threads of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PoolPriority {
    /// Like any thread.
    Normal,
    /// A little less than the host program's own threads, an event loop for example.
    BelowNormal,
}

/// Persistent compute threads. Dropping it ends and joins them.
pub struct Pool {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
    /// Held by the one caller whose job is running: callers of several engines take turns, job by job.
    turn: Mutex<()>,
}

impl Pool {
    /// A pool of `num_threads`: the calling thread of each job and `num_threads - 1` helpers, started here.
    pub fn new(num_threads: usize, priority: PoolPriority) -> Result<Pool> {
        let num_threads = num_threads.max(1);
        let mut pool = Pool { shared: Arc::new(Shared::new(num_threads)), helpers: Vec::new(), turn: Mutex::new(()) };
        for thread_idx in 1..num_threads {
            let shared = Arc::clone(&pool.shared);
            let helper = std::thread::Builder::new().name(format!("ns-llm-compute-{thread_idx}")).spawn(move || {
                if priority == PoolPriority::BelowNormal {
                    host::lower_thread_priority();
                }
                shared.help(thread_idx);
            });
            // On failure the pool is dropped, which ends the helpers that were started.
            pool.helpers.push(helper.map_err(|e| Error::ThreadSpawn { thread_idx, reason: e.to_string() })?);
        }
        Ok(pool)
    }

    /// Threads of a job, the caller included.
    pub fn num_threads(&self) -> usize {
        self.shared.shares.len()
    }

    /// Calls `body` for the items `0..num_items`, in ranges of at most `grain` items that start at multiples of `grain`,
    /// on all threads, and returns when all are done. If `body` panics, the rest of the job is completed and the first
    /// panic is raised again here. From inside a job, items run on the calling thread.
    pub fn run(&self, num_items: usize, grain: usize, body: impl Fn(Range<usize>) + Sync) {
        let grain = grain.max(1).max(num_items.div_ceil(u32::MAX as usize));
        let num_chunks = num_items.div_ceil(grain);
        if num_chunks <= 1 || self.num_threads() == 1 || IN_JOB.get() {
            (0..num_chunks).for_each(|chunk| body(chunk_items(chunk, grain, num_items)));
            return;
        }
        let turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let job = Job::new(&body, num_items, grain, num_chunks, self.num_threads());
        // SAFETY: `turn` makes this the only caller, and `run_job` returns when no thread uses `body` any more.
        unsafe { self.run_job(job) };
        let panic = self.shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(turn);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    /// Calls `body` for each element, on all threads, and returns when all are done.
    pub fn for_each_mut<T: Send>(&self, elements: &mut [T], body: impl Fn(&mut T) + Sync) {
        let num_elements = elements.len();
        let elements = DisjointMut::new(elements);
        self.run(num_elements, 1, |range| {
            // SAFETY: `run` gives each index to one call.
            unsafe { elements.range_mut(range) }.iter_mut().for_each(&body);
        });
    }

    /// # Safety
    /// One caller at a time; what `job.body` points to lives until this returns.
    unsafe fn run_job(&self, job: Job) {
        let shared = &*self.shared;
        let num_chunks = u64::from(job.num_chunks);
        let num_shares = job.num_shares;
        // SAFETY: the last job is over (`wait_finished` returned), so no thread holds a chunk, and only such a thread
        // reads the cell.
        let epoch = unsafe { shared.publish(job) };
        for (helper, sleeping) in self.helpers.iter().zip(&shared.sleeping).take(num_shares - 1) {
            // Pairs with `sleep_until_new_epoch`: both sides store, then load, in one total order, so that either the
            // helper sees the new epoch or we see that it sleeps.
            if sleeping.load(Ordering::SeqCst) {
                helper.thread().unpark();
            }
        }
        shared.work(0, epoch);
        shared.wait_finished(num_chunks);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.shutdown.store(true, Ordering::SeqCst);
        for helper in self.helpers.drain(..) {
            helper.thread().unpark();
            // Helpers catch the panics of jobs; there is no other they could end with.
            let _ = helper.join();
        }
    }
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("num_threads", &self.num_threads()).finish_non_exhaustive()
    }
}

thread_local! {
    /// Whether this thread is executing a chunk: a job inside a job runs where it is, it would wait for itself.
    static IN_JOB: Cell<bool> = const { Cell::new(false) };
}

/// One operation, without the lifetime of its body.
#[derive(Clone, Copy)]
struct Job {
    body: *const (dyn Fn(Range<usize>) + Sync),
    num_items: usize,
    grain: usize,
    num_chunks: u32,
    num_shares: usize,
}

impl Job {
    fn new(body: &(dyn Fn(Range<usize>) + Sync), num_items: usize, grain: usize, chunks: usize, threads: usize) -> Job {
        // SAFETY: only the lifetime in the type changes; `Pool::run` returns when nobody uses the pointer any more.
        let body = unsafe {
            std::mem::transmute::<
                *const (dyn Fn(Range<usize>) + Sync + '_),
                *const (dyn Fn(Range<usize>) + Sync + 'static),
            >(body)
        };
        let num_chunks = u32::try_from(chunks).expect("`run` widens the grain until the chunks fit");
        Job { body, num_items, grain, num_chunks, num_shares: threads.min(chunks) }
    }
    /// Chunks of thread `share_idx`; threads beyond `num_shares` have none.
    fn share(&self, share_idx: usize) -> Range<u32> {
        let bound = |idx: usize| {
            let idx = idx.min(self.num_shares) as u64;
            (idx * u64::from(self.num_chunks) / self.num_shares as u64) as u32
        };
        bound(share_idx)..bound(share_idx + 1)
    }
}

fn chunk_items(chunk: usize, grain: usize, num_items: usize) -> Range<usize> {
    chunk * grain..((chunk + 1) * grain).min(num_items)
}

/// Unclaimed chunks of one thread: the epoch of the job in the upper half, how many are left in the lower half. On a
/// pair of cache lines of its own (the adjacent line is fetched with it).
#[repr(align(128))]
struct Share(AtomicU64);

/// Bit of `finished` that says that the caller sleeps.
const CALLER_SLEEPS: u64 = 1 << 63;

struct Shared {
    /// Number of the current job. Stored last when a job is published.
    epoch: AtomicU32,
    /// One claim word per thread.
    shares: Box<[Share]>,
    /// Finished chunks of the current job, and [`CALLER_SLEEPS`].
    finished: AtomicU64,
    /// The current job; see the invariants above.
    job: UnsafeCell<Option<Job>>,
    /// Helpers that sleep or are about to; helper `i` is thread `i + 1`.
    sleeping: Box<[AtomicBool]>,
    /// Who to wake when the last chunk is finished and the caller sleeps.
    caller: Mutex<Option<Thread>>,
    /// First panic of the current job.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    /// The helpers shall end.
    shutdown: AtomicBool,
    /// [`SPIN_TIME`], or none when there are more threads than cores: spinning would keep the others from running.
    spin_time: Duration,
}

// SAFETY: all fields but `job` are `Sync`; access to `job` follows the invariants at the top of this file, and what it
// points to is `Sync`.
unsafe impl Sync for Shared {}
// SAFETY: as above.
unsafe impl Send for Shared {}

impl Shared {
    fn new(num_threads: usize) -> Shared {
        Shared {
            epoch: AtomicU32::new(0),
            shares: (0..num_threads).map(|_| Share(AtomicU64::new(0))).collect(),
            finished: AtomicU64::new(0),
            job: UnsafeCell::new(None),
            sleeping: (1..num_threads).map(|_| AtomicBool::new(false)).collect(),
            caller: Mutex::new(None),
            panic: Mutex::new(None),
            shutdown: AtomicBool::new(false),
            spin_time: if num_threads <= host::usable_cores() { SPIN_TIME } else { Duration::ZERO },
        }
    }

    /// Makes `job` the current one and returns its epoch.
    ///
    /// # Safety
    /// The job before is over: all its chunks are finished.
    unsafe fn publish(&self, job: Job) -> u32 {
        let epoch = self.epoch.load(Ordering::Relaxed).wrapping_add(1);
        // SAFETY: nobody holds a chunk (promise of the caller), so nobody reads the cell.
        unsafe { *self.job.get() = Some(job) };
        self.finished.store(0, Ordering::Relaxed);
        for (share_idx, share) in self.shares.iter().enumerate() {
            let left = job.share(share_idx).len() as u64;
            // Release: whoever claims from this word sees the job and the zeroed counter.
            share.0.store(u64::from(epoch) << 32 | left, Ordering::Release);
        }
        self.epoch.store(epoch, Ordering::SeqCst);
        epoch
    }

    /// Takes chunks of the job `epoch` until none is left: first of the own share, then of the others.
    fn work(&self, thread_idx: usize, epoch: u32) {
        let num_shares = self.shares.len();
        for offset in 0..num_shares {
            let share_idx = (thread_idx + offset) % num_shares;
            while let Some(left) = self.claim(share_idx, epoch) {
                // SAFETY: we hold an unfinished chunk of this job.
                unsafe { self.execute(share_idx, left) };
            }
        }
    }

    /// Takes one chunk of a share; returns how many were left with it. `None`: no more, or the job is over.
    fn claim(&self, share_idx: usize, epoch: u32) -> Option<u32> {
        let word = &self.shares[share_idx].0;
        let mut current = word.load(Ordering::Relaxed);
        loop {
            let left = current as u32;
            if (current >> 32) as u32 != epoch || left == 0 {
                return None;
            }
            // Acquire: the job that `publish` wrote before this word. Relaxed on failure: nothing is read then.
            match word.compare_exchange_weak(current, current - 1, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return Some(left),
                Err(seen) => current = seen,
            }
        }
    }

    /// Executes the chunk that was claimed when `left` chunks were left in the share, and counts it as finished.
    ///
    /// # Safety
    /// The chunk was claimed by this thread and is not finished.
    unsafe fn execute(&self, share_idx: usize, left: u32) {
        // SAFETY: the cell is not written while a chunk is unfinished, and `claim` acquired what was written before.
        let job = unsafe { *self.job.get() }.expect("a chunk can be claimed only after `publish`");
        let chunk = (job.share(share_idx).end - left) as usize;
        IN_JOB.set(true);
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            // SAFETY: `Pool::run` keeps the body alive until all chunks are finished; ours is not.
            unsafe { (*job.body)(chunk_items(chunk, job.grain, job.num_items)) }
        }));
        IN_JOB.set(false);
        if let Err(panic) = outcome {
            self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(panic);
        }
        // Release: the caller, who acquires, sees what the chunk wrote. From here on the job may be gone.
        let before = self.finished.fetch_add(1, Ordering::AcqRel);
        if before == CALLER_SLEEPS | (u64::from(job.num_chunks) - 1) {
            // Not taken out: a finisher that was delayed here may meet the caller of a later job, who then looks at its
            // condition once more than needed, but must still be found by its own last finisher.
            if let Some(caller) = &*self.caller.lock().unwrap_or_else(PoisonError::into_inner) {
                caller.unpark();
            }
        }
    }

    /// Waits for the chunks that other threads still hold.
    fn wait_finished(&self, num_chunks: u64) {
        // Acquire: pairs with the release in `execute`; all that the chunks wrote is visible afterwards.
        let is_finished = || self.finished.load(Ordering::Acquire) & !CALLER_SLEEPS == num_chunks;
        if spin_until(self.spin_time, is_finished) {
            return;
        }
        *self.caller.lock().unwrap_or_else(PoisonError::into_inner) = Some(std::thread::current());
        // The last finisher sees this bit, or this sees its count: both are read-modify-writes of one atomic.
        self.finished.fetch_or(CALLER_SLEEPS, Ordering::AcqRel);
        while !is_finished() {
            std::thread::park();
        }
        self.caller.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    /// Body of a helper thread.
    fn help(&self, thread_idx: usize) {
        let mut epoch = 0;
        loop {
            let is_called = || self.shutdown.load(Ordering::SeqCst) || self.epoch.load(Ordering::SeqCst) != epoch;
            if !spin_until(self.spin_time, is_called) {
                self.sleep_until(thread_idx, is_called);
            }
            if self.shutdown.load(Ordering::SeqCst) {
                return;
            }
            // What the claim words hold decides; an epoch that is already over only costs a look at them.
            epoch = self.epoch.load(Ordering::SeqCst);
            self.work(thread_idx, epoch);
        }
    }

    /// Parks a helper until `is_called`. The flag is set before the condition is looked at again; see `run_job`.
    fn sleep_until(&self, thread_idx: usize, is_called: impl Fn() -> bool) {
        let sleeping = &self.sleeping[thread_idx - 1];
        sleeping.store(true, Ordering::SeqCst);
        while !is_called() {
            std::thread::park();
        }
        sleeping.store(false, Ordering::SeqCst);
    }
}

/// Looks at `is_done` for at most `time`, at least once; returns what it saw last.
fn spin_until(time: Duration, is_done: impl Fn() -> bool) -> bool {
    if is_done() {
        return true;
    }
    if time.is_zero() {
        return false;
    }
    let start = Instant::now();
    while start.elapsed() < time {
        for _ in 0..SPINS_PER_CLOCK {
            std::hint::spin_loop();
            if is_done() {
                return true;
            }
        }
    }
    false
}

/// A slice that the threads of one job write at the same time, each its own elements.
pub struct DisjointMut<'a, T> {
    start: *mut T,
    len: usize,
    slice: PhantomData<&'a mut [T]>,
}

// SAFETY: elements are handed out as `&mut T` to other threads, one at a time (promise of `range_mut`'s callers).
unsafe impl<T: Send> Sync for DisjointMut<'_, T> {}
// SAFETY: as for `&mut [T]`.
unsafe impl<T: Send> Send for DisjointMut<'_, T> {}

impl<'a, T> DisjointMut<'a, T> {
    /// Takes the slice for the time of a job.
    pub fn new(slice: &'a mut [T]) -> DisjointMut<'a, T> {
        DisjointMut { start: slice.as_mut_ptr(), len: slice.len(), slice: PhantomData }
    }
    /// Some elements, for writing. Panics when the range is outside the slice.
    ///
    /// # Safety
    /// While the returned slice lives, no other one that was handed out overlaps it.
    #[allow(clippy::mut_from_ref)] // that is its purpose; the promise replaces the borrow checker
    pub unsafe fn range_mut(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of a slice of {}", self.len);
        // SAFETY: inside the slice (checked), which is borrowed mutably for 'a; the caller vouches for no overlap.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}
