//! Promise: whoever finds less of his prompt in the cache than he hoped for is told where that ended, and why. Each reason is
//! brought about; most of them with the cache alone, whose time and tiers are the test's.

use std::sync::Arc;

use ns_llm::config::MAX_LOST_BLOCKS;
use ns_llm::ids::SeqId;
use ns_llm::kv_cache::tiers::{Done, Job, Outcome, TiersConfig, host};
use ns_llm::kv_cache::{BlockTransfer, KvCache, KvCacheConfig, KvIdentity};
use ns_llm::sequence::{Sequence, SequenceSpec};
use ns_llm::storage::{Fault, LayoutId, TierId};
use ns_llm::{CacheTier, CacheUse, MissReason, PrefixMiss, Priority, Request, SamplingParams};

use crate::demo;
use crate::demo::Rng;

const BLOCK: usize = 16;
const BLOCK_BYTES: usize = 100;
const BUDGET_US: u64 = 50_000;

/// A pool, and below it host memory for some blocks, and a disk or a shared store.
fn cache(pool_blocks: usize, host_blocks: u64, tiers: &[TierId]) -> KvCache {
    let identity = KvIdentity {
        fingerprint: [1; 32],
        kv_layout: "test".to_string(),
        numerics_id: "test".to_string(),
        adapter: String::new(),
    };
    let tiers = TiersConfig {
        layout: LayoutId([0; 32]),
        block_tokens: BLOCK,
        block_bytes: BLOCK_BYTES,
        host_bytes: host_blocks * (BLOCK_BYTES as u64 + host::ENTRY_BYTES),
        write_queue_bytes: 1 << 20,
        load_budget_us: BUDGET_US,
        tiers: tiers.to_vec(),
    };
    KvCache::new(KvCacheConfig {
        num_blocks: pool_blocks,
        block_tokens: BLOCK,
        identity,
        prefix_cache: true,
        owner_share: 1.0,
        tiers: Some(tiers),
    })
}

fn sequence(prompt: &[u32]) -> Sequence {
    let spec = SequenceSpec {
        priority: Priority::Normal,
        prompt: Arc::from(prompt),
        max_new_tokens: 1,
        stop_token_ids: Arc::from([]),
        deadline_ms: None,
        timeout_ms: 0,
        namespace: [0; 32],
        owner: [0; 32],
        prefix_cache: CacheUse::ReadWrite,
        prompt_logprobs: None,
        logprobs: None,
        sampling: Arc::new(SamplingParams::greedy()),
    };
    Sequence::new(SeqId(1), SeqId(1), spec)
}

fn prompt(name: u64, num_blocks: usize) -> Vec<u32> {
    Rng(name).prompt(num_blocks * BLOCK + 1)
}

/// Admits a sequence, and carries out what is to be moved.
fn admit(kv: &mut KvCache, seq: &mut Sequence, now_us: u64) {
    let plan = kv.plan_admission(seq);
    kv.admit(seq, plan);
    kv.begin_restore(seq, now_us);
    kv.advance_restore(seq, now_us);
    keep(kv, now_us);
}

fn keep(kv: &mut KvCache, now_us: u64) {
    for transfer in kv.take_transfers() {
        if let BlockTransfer::Keep { kept, .. } = transfer {
            kv.keep(&kept, vec![7; BLOCK_BYTES].into(), now_us);
        }
    }
}

/// What a prompt misses; it is computed and given back.
fn miss_of(kv: &mut KvCache, prompt: &[u32], now_us: u64) -> Option<PrefixMiss> {
    let mut seq = sequence(prompt);
    admit(kv, &mut seq, now_us);
    while seq.restore.is_some() {
        serve(kv, now_us, 1, |_| Outcome::Found(vec![7; BLOCK_BYTES].into()));
        kv.advance_restore(&mut seq, now_us);
    }
    let miss = seq.prefix_miss;
    give_back(kv, seq, now_us);
    miss
}

fn give_back(kv: &mut KvCache, mut seq: Sequence, now_us: u64) {
    seq.num_computed = seq.tokens.len();
    kv.publish(&mut seq);
    kv.release(&mut seq);
    keep(kv, now_us);
}

/// Does all jobs of the first tier.
fn serve(kv: &mut KvCache, now_us: u64, elapsed_us: u64, outcome: impl Fn(usize) -> Outcome) {
    let tiers = kv.tiers().expect("there are some");
    let id = tiers.ids().next().expect("one below host memory");
    let mut num_reads = 0;
    while let Some((job_id, job)) = tiers.next_job(id, now_us) {
        let outcome = match job {
            Job::Read(_) => outcome(num_reads),
            Job::Write(..) => Outcome::Stored,
            Job::Quarantine(_) | Job::Clear => Outcome::Done,
        };
        num_reads += usize::from(matches!(job, Job::Read(_)));
        tiers.complete(id, job_id, Done { outcome, elapsed_us }, now_us);
    }
}

fn at(block: usize, reason: MissReason) -> Option<PrefixMiss> {
    Some(PrefixMiss { token: block * BLOCK, reason })
}

/// A cache with a disk that holds all blocks of this prompt, and a pool that does not.
fn on_disk(prompt: &[u32]) -> KvCache {
    let mut kv = cache(8, 0, &[TierId::Disk]);
    assert_eq!(miss_of(&mut kv, prompt, 0), at(0, MissReason::NeverSeen));
    serve(&mut kv, 0, 1, |_| Outcome::Missing);
    let mut flood = sequence(&self::prompt(999, 7));
    admit(&mut kv, &mut flood, 0);
    kv.release(&mut flood);
    assert_eq!(kv.num_evictions() as usize, prompt.len() / BLOCK);
    kv
}

fn fault() -> Outcome {
    Outcome::Fault(Fault::Io { operation: "read", kind: std::io::ErrorKind::Other, reason: "simulated".to_string() })
}

/// What nobody has asked before was never seen; what is there whole misses nothing; what begins alike misses its own end.
#[test]
fn new_prompts_were_never_seen() {
    let mut kv = cache(20, 0, &[]);
    let first = prompt(1, 4);
    assert_eq!(miss_of(&mut kv, &first, 0), at(0, MissReason::NeverSeen));
    assert_eq!(miss_of(&mut kv, &first, 0), None);
    assert_eq!(miss_of(&mut kv, &first[..4 * BLOCK], 0), None, "the last token is always computed");
    let longer = [&first[..3 * BLOCK], &prompt(2, 2)].concat();
    assert_eq!(miss_of(&mut kv, &longer, 0), at(3, MissReason::NeverSeen));
    assert_eq!(miss_of(&mut kv, &first[..BLOCK], 0), None, "it has no block that could be found");
}

/// Who gave a block up last is told: the pool, host memory, or the disk.
#[test]
fn evicted_blocks_name_their_place() {
    let first = prompt(1, 4);
    let mut kv = cache(8, 0, &[]);
    miss_of(&mut kv, &first, 0);
    miss_of(&mut kv, &prompt(2, 6), 0);
    assert_eq!(miss_of(&mut kv, &first, 0), at(1, MissReason::Evicted(CacheTier::Pool)), "its end went first");

    let mut kv = cache(8, 3, &[]);
    miss_of(&mut kv, &first, 0);
    for name in 10..14 {
        miss_of(&mut kv, &prompt(name, 7), 0);
    }
    assert_eq!(miss_of(&mut kv, &first, 0), at(0, MissReason::Evicted(CacheTier::Host)));

    let mut kv = on_disk(&first);
    let mut seq = sequence(&first);
    kv.plan_admission(&mut seq);
    let tiers = kv.tiers().expect("a disk");
    let lost = tiers.record_key(seq.block_keys[2]);
    tiers.lost(TierId::Disk, [lost]);
    let mut seq = sequence(&first);
    admit(&mut kv, &mut seq, 0);
    assert_eq!(seq.prefix_miss, at(2, MissReason::Evicted(CacheTier::Disk)), "known before anything has arrived");
    give_back(&mut kv, seq, 0);

    // It was held when the reading began, and was gone when it came to it.
    let mut kv = on_disk(&first);
    let mut seq = sequence(&first);
    admit(&mut kv, &mut seq, 0);
    assert_eq!(seq.prefix_miss, None, "all of it is on its way");
    let found = |idx| if idx == 3 { Outcome::Missing } else { Outcome::Found(vec![7; BLOCK_BYTES].into()) };
    serve(&mut kv, 0, 1, found);
    kv.advance_restore(&mut seq, 0);
    assert_eq!(seq.prefix_miss, at(3, MissReason::Evicted(CacheTier::Disk)));
}

/// A store that is asked for everything and has nothing has not evicted it; what the pool gave up stays known.
#[test]
fn missing_in_a_shared_store_is_not_evicted() {
    for (was_there, reason) in [(false, MissReason::NeverSeen), (true, MissReason::Evicted(CacheTier::Pool))] {
        let mut kv = cache(8, 0, &[TierId::Remote]);
        kv.tiers().expect("a store").forbid_writes(TierId::Remote, Fault::ReadOnly);
        let first = prompt(1, 4);
        let ask = |kv: &mut KvCache, prompt: &[u32]| {
            let mut seq = sequence(prompt);
            admit(kv, &mut seq, 0);
            serve(kv, 0, 1, |_| Outcome::Missing);
            kv.advance_restore(&mut seq, 0);
            let miss = seq.prefix_miss;
            give_back(kv, seq, 0);
            miss
        };
        if was_there {
            ask(&mut kv, &first);
            ask(&mut kv, &prompt(2, 7));
        }
        assert_eq!(ask(&mut kv, &first), at(0, reason));
    }
}

/// A read that fails, a disk that rests after failures, and a block that led to a failure are faults, at their block.
#[test]
fn failing_tiers_are_faults() {
    let first = prompt(1, 4);
    let mut kv = on_disk(&first);
    let mut seq = sequence(&first);
    admit(&mut kv, &mut seq, 0);
    serve(&mut kv, 0, 1, |idx| if idx == 1 { fault() } else { Outcome::Found(vec![7; BLOCK_BYTES].into()) });
    kv.advance_restore(&mut seq, 0);
    assert_eq!((seq.prefix_miss, seq.num_computed), (at(1, MissReason::Fault), BLOCK));

    let mut kv = on_disk(&first);
    for _ in 0..100 {
        let mut seq = sequence(&first);
        admit(&mut kv, &mut seq, 0);
        serve(&mut kv, 0, 1, |_| fault());
        kv.advance_restore(&mut seq, 0);
        assert_eq!(seq.prefix_miss, at(0, MissReason::Fault));
        kv.release(&mut seq);
    }
    assert!(kv.tiers().expect("a disk").num_rests(TierId::Disk) > 0, "it is left alone");

    let mut kv = on_disk(&first);
    let mut seq = sequence(&first);
    kv.plan_admission(&mut seq);
    let tiers = kv.tiers().expect("a disk");
    tiers.quarantine(tiers.record_key(seq.block_keys[2]));
    assert_eq!(miss_of(&mut kv, &first, 0), at(2, MissReason::Fault));
}

/// A disk that hangs is given up; one that was measured as slower than computing is not asked.
#[test]
fn slow_tiers_are_told_apart() {
    let first = prompt(1, 4);
    let mut kv = on_disk(&first);
    let mut seq = sequence(&first);
    admit(&mut kv, &mut seq, 0);
    let tiers = kv.tiers().expect("a disk");
    let done = Done { outcome: Outcome::Found(vec![7; BLOCK_BYTES].into()), elapsed_us: 1 };
    let (job_id, _) = tiers.next_job(TierId::Disk, 0).expect("a read");
    tiers.complete(TierId::Disk, job_id, done, 0);
    kv.advance_restore(&mut seq, 0);
    assert!(seq.prefix_miss.is_none() && seq.restore.is_some(), "it waits");
    kv.advance_restore(&mut seq, BUDGET_US);
    assert_eq!((seq.prefix_miss, seq.restore), (at(1, MissReason::GaveUp), None));

    let mut kv = on_disk(&first);
    // 16 tokens take 1 ms, a block takes 5 ms.
    kv.tiers().expect("a disk").note_prefill(16_000, 1_000_000, 0);
    let mut seq = sequence(&first);
    admit(&mut kv, &mut seq, 0);
    serve(&mut kv, 0, 5_000, |_| Outcome::Found(vec![7; BLOCK_BYTES].into()));
    kv.advance_restore(&mut seq, 0);
    assert_eq!(seq.prefix_miss, None, "never measured, so it was tried");
    give_back(&mut kv, seq, 0);
    let mut flood = sequence(&prompt(998, 7));
    admit(&mut kv, &mut flood, 0);
    kv.release(&mut flood);
    assert_eq!(miss_of(&mut kv, &first, 0), at(0, MissReason::Slower));
}

/// What is remembered of lost blocks is bounded: the oldest is forgotten, and then was never seen.
#[test]
fn memory_of_lost_blocks_is_bounded() {
    let mut kv = cache(2, 0, &[]);
    for name in 0..MAX_LOST_BLOCKS as u64 + 2 {
        assert_eq!(miss_of(&mut kv, &prompt(name, 1), 0), at(0, MissReason::NeverSeen), "{name}");
    }
    assert!(kv.num_evictions() > MAX_LOST_BLOCKS as u64);
    assert_eq!(miss_of(&mut kv, &prompt(0, 1), 0), at(0, MissReason::NeverSeen));
    assert_eq!(miss_of(&mut kv, &prompt(100, 1), 0), at(0, MissReason::Evicted(CacheTier::Pool)));
}

/// An engine tells it with each answer; a request or an engine that does not read the cache says so.
#[test]
fn answers_tell_what_was_missed() {
    let engine = demo::open(|_| ());
    let prompt = Rng(5).prompt(100);
    let miss = |engine: &ns_llm::Engine, change: fn(&mut Request)| {
        let mut request = Request::tokens(prompt.clone()).max_tokens(2);
        change(&mut request);
        engine.complete(request).expect("runs").summary.usage.prefix_miss
    };
    assert_eq!(miss(&engine, |_| ()), at(0, MissReason::NeverSeen));
    assert_eq!(miss(&engine, |_| ()), None);
    assert_eq!(miss(&engine, |request| request.n = 3), None);
    assert_eq!(miss(&engine, |request| request.namespace = Some("other".into())), at(0, MissReason::NeverSeen));
    assert_eq!(miss(&engine, |request| request.prefix_cache = CacheUse::Off), at(0, MissReason::Disabled));
    assert_eq!(miss(&engine, |request| request.prefix_cache = CacheUse::Read), None);
    assert_eq!(miss(&engine, |request| request.prompt_logprobs = true), at(0, MissReason::Disabled));
    let without = demo::open(|options| options.prefix_cache = false);
    assert_eq!(miss(&without, |_| ()), at(0, MissReason::Disabled));
    assert_eq!(MissReason::Evicted(CacheTier::Disk).tier().map(CacheTier::as_str), Some("disk"));
}
