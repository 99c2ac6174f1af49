//! Promise: the remote tier works with a real server, and gets over whatever happens to that: blocks are shared between tiers
//! and processes, end with their time, and a server that is killed, stopped, full or locked costs a bounded time and no block.
//!
//! Every test starts a server of its own. Where there is none they cannot run, so `cargo test` counts them as ignored; `npm
//! test` runs them where `redis-server` is found (`NS_LLM_REDIS_SERVER` names another program, such as `valkey-server`).

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use ns_llm::kv_cache::tiers::{Done, Outcome, RestoredBlock, TierStore, Tiers, TiersConfig};
use ns_llm::sampler::random_at;
use ns_llm::storage::remote::{RedisStore, RemoteOptions, RemoteStore, ServerUrl, ValueStore};
use ns_llm::storage::{Fault, LayoutId, RecordKey, TierId};

use crate::redis_server::RedisServer;

const BLOCK_BYTES: usize = 100_000;
/// Calls that work take microseconds; this is for a machine that does other things.
const TIMEOUT_MS: u64 = 5_000;
/// Far less than what would follow from a call without a bound.
const PATIENCE: Duration = Duration::from_secs(60);

fn key(name: u64) -> RecordKey {
    let mut content = [0; 32];
    content[..8].copy_from_slice(&name.to_le_bytes());
    RecordKey { content, layout: LayoutId([7; 32]) }
}

fn payload(name: u64) -> Vec<u8> {
    (0..BLOCK_BYTES as u64 / 8).flat_map(|i| random_at(name, i).to_le_bytes()).collect()
}

fn store(url: &str, timeout_ms: u64) -> RedisStore {
    RedisStore::new(ServerUrl::parse(url).expect("a URL"), timeout_ms).expect("in range")
}

fn options() -> RemoteOptions {
    RemoteOptions::new(BLOCK_BYTES as u64)
}

fn tier_at(url: &str) -> RemoteStore {
    RemoteStore::new(Box::new(store(url, TIMEOUT_MS)), options())
}

/// Tiers with a remote one only, on a clock that the test moves.
struct Machine {
    tiers: Tiers,
    remote: RemoteStore,
    now_us: u64,
}

impl Machine {
    fn new(remote: RemoteStore) -> Machine {
        let config = TiersConfig {
            layout: LayoutId([7; 32]),
            block_tokens: 16,
            block_bytes: BLOCK_BYTES,
            host_bytes: 0,
            write_queue_bytes: 1 << 30,
            load_budget_us: 1_000_000,
            tiers: vec![TierId::Remote],
        };
        let tiers = Tiers::new(config, 1.0);
        Machine { tiers, remote, now_us: 0 }
    }

    /// Does every job that there is, and says how each ended.
    fn drive(&mut self) -> Vec<Outcome> {
        let mut outcomes = Vec::new();
        while let Some((job_id, job)) = self.tiers.next_job(TierId::Remote, self.now_us) {
            let outcome = self.remote.run(job);
            self.now_us += 100;
            outcomes.push(outcome.clone());
            self.tiers.complete(TierId::Remote, job_id, Done { outcome, elapsed_us: 100 }, self.now_us);
            self.tiers.check_invariants().expect("sound");
        }
        outcomes
    }

    fn persist(&mut self, names: std::ops::Range<u64>) {
        for name in names {
            self.tiers.persist(key(name), payload(name).into(), [0; 32], self.now_us);
        }
    }

    /// The blocks of `names` as far as they come.
    fn restore(&mut self, names: std::ops::Range<u64>) -> Vec<RestoredBlock> {
        let keys: Vec<RecordKey> = names.map(key).collect();
        let Some(id) = self.tiers.begin(&keys, [0; 32], self.now_us).restore else { return Vec::new() };
        self.drive();
        let arrived = self.tiers.poll(id, self.now_us);
        assert!(arrived.has_ended, "nothing is left to do");
        arrived.blocks
    }
}

/// Fails on a wrong byte; says how many blocks there are.
fn count_right(restored: &[RestoredBlock]) -> usize {
    for RestoredBlock { key, bytes, .. } in restored {
        let name = u64::from_le_bytes(key.content[..8].try_into().expect("8 bytes"));
        assert!(bytes[..] == payload(name), "block {name}");
    }
    restored.len()
}

fn faults(outcomes: &[Outcome]) -> usize {
    outcomes.iter().filter(|outcome| matches!(outcome, Outcome::Fault(_))).count()
}

/// Blocks that one tier stores another finds, in another database nobody does; taken away they are gone for both. All
/// names begin with the prefix and end with their time.
#[test]
#[ignore = "needs redis-server; `npm test` runs it where that is found"]
fn tiers_share_blocks() {
    let server = RedisServer::start(&[]);
    let secret = |options: RemoteOptions| options.secret(b"a secret of the cluster").expect("long enough");
    for options in [options(), secret(options())] {
        let tier = |url: &str| RemoteStore::new(Box::new(store(url, TIMEOUT_MS)), options.clone());
        let (mut one, mut two) = (tier(&server.url()), tier(&server.url()));
        let mut elsewhere = tier(&format!("{}/1", server.url()));
        for name in 0..20 {
            assert_eq!(one.put(&key(name), &payload(name)), Ok(true));
            assert_eq!(two.put(&key(name), &payload(name)), Ok(false), "it is there already");
            assert_eq!(two.get(&key(name)), Ok(Some(payload(name))));
            assert_eq!(elsewhere.get(&key(name)), Ok(None));
        }
        assert_eq!(two.remove(&key(3)), Ok(()));
        assert_eq!((one.get(&key(3)), one.get(&key(4))), (Ok(None), Ok(Some(payload(4)))));
        assert_eq!((one.stats().stored, two.stats().hits, elsewhere.stats().misses), (20, 20, 20));
        for tier in [one, two, elsewhere] {
            assert_eq!((tier.stats().faults, tier.num_damaged()), (0, 0));
        }
    }
}

/// A record ends with its time, and that begins anew when a node finds that it is there.
#[test]
#[ignore = "needs redis-server; `npm test` runs it where that is found"]
fn records_end_with_their_time() {
    let server = RedisServer::start(&[]);
    let tier = |ttl_s| {
        let options = options().ttl_s(ttl_s).expect("in range");
        RemoteStore::new(Box::new(store(&server.url(), TIMEOUT_MS)), options)
    };
    let (mut short, mut long) = (tier(1), tier(1_000));
    for name in [1, 2] {
        assert_eq!(short.put(&key(name), &payload(name)), Ok(true));
    }
    // The second is stored once more, for longer. (On a machine that stands still for a second it is new.)
    long.put(&key(2), &payload(2)).expect("stored");
    let start = Instant::now();
    while short.get(&key(1)).expect("no fault").is_some() {
        assert!(start.elapsed() < PATIENCE, "it does not end");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(short.get(&key(2)), Ok(Some(payload(2))));
}

/// A value under the name of a block that is damaged, of another type, or far too long, put there by someone else.
#[test]
#[ignore = "needs redis-server; `npm test` runs it where that is found"]
fn foreign_values_are_misses() {
    let server = RedisServer::start(&[]);
    let mut tier = tier_at(&server.url());
    tier.put(&key(1), &payload(1)).expect("stored");
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let name = format!("ns-llm:kv:1:open:{}:{}", hex(&key(1).content), hex(&key(1).layout.0));
    let mut other = store(&server.url(), TIMEOUT_MS);
    let sound = other.get(&name, 1 << 20).expect("no fault").expect("this is its name");
    let mut damaged = sound.clone();
    damaged[50_000] ^= 4;
    for value in [damaged, sound[..sound.len() - 1].to_vec(), b"x".to_vec(), vec![0; 50 << 20]] {
        other.remove(&name).expect("no fault");
        assert_eq!(other.put(&name, &value, 100), Ok(true));
        let fault = tier.get(&key(1)).expect_err("not the block");
        assert!(matches!(fault, Fault::Damaged(_)), "{fault}");
        assert_eq!(other.get(&name, 1 << 20), Ok(None), "it was removed");
    }
    assert_eq!((tier.num_damaged(), other.report().connections), (4, 1), "no connection was given up for it");
    assert_eq!(tier.put(&key(1), &payload(1)), Ok(true));
    assert_eq!(tier.get(&key(1)), Ok(Some(payload(1))));
}

/// A server that is killed in the middle of work costs five faults, after which it is left alone: nothing is asked of it, and
/// writes are dropped. When it is back, so are the blocks that are stored from then on.
#[test]
#[ignore = "needs redis-server; `npm test` runs it where that is found"]
fn killed_server_is_left_alone() {
    let mut server = RedisServer::start(&[]);
    let mut machine = Machine::new(tier_at(&server.url()));
    machine.persist(0..20);
    assert_eq!(faults(&machine.drive()), 0);
    assert_eq!(count_right(&machine.restore(0..20)), 20);

    machine.persist(20..60);
    server.kill();
    let start = Instant::now();
    let outcomes = machine.drive();
    assert_eq!((outcomes.len(), faults(&outcomes)), (5, 5));
    assert!(start.elapsed() < PATIENCE, "{:?}", start.elapsed());
    assert_eq!(machine.tiers.num_rests(TierId::Remote), 1);
    assert_eq!(machine.tiers.tier_stats(TierId::Remote).faults, 5);
    assert_eq!(machine.tiers.counters().dropped_writes, 35);
    assert_eq!(machine.restore(0..20), [], "it is not asked");

    server.restart();
    let start = Instant::now();
    loop {
        machine.now_us += 30_000_000;
        machine.persist(60..61);
        if machine.drive() == [Outcome::Stored] {
            break;
        }
        assert!(start.elapsed() < PATIENCE, "it is not tried again");
        std::thread::sleep(Duration::from_millis(50));
    }
    machine.persist(61..70);
    assert_eq!(faults(&machine.drive()), 0);
    assert_eq!(count_right(&machine.restore(60..70)), 10);
    assert_eq!(machine.restore(0..20), [], "it came back empty");
}

/// A server that stands still costs the time of one call, once; the calls after it fail at once. When it goes on it is used
/// again, and what it answers late is not believed.
#[test]
#[ignore = "needs redis-server; `npm test` runs it where that is found"]
fn stopped_server_costs_its_time_once() {
    const SHORT_MS: u64 = 2_000;
    let server = RedisServer::start(&[]);
    let mut direct = store(&server.url(), SHORT_MS);
    assert_eq!(direct.put("a", b"1", 1_000), Ok(true));
    let mut machine = Machine::new(RemoteStore::new(Box::new(store(&server.url(), SHORT_MS)), options()));
    machine.persist(0..10);
    assert_eq!(faults(&machine.drive()), 0);

    server.set_stopped(true);
    machine.persist(10..40);
    let start = Instant::now();
    assert_eq!(faults(&machine.drive()), 5);
    let elapsed = start.elapsed();
    assert!(
        (Duration::from_millis(SHORT_MS - 50)..Duration::from_millis(2 * SHORT_MS)).contains(&elapsed),
        "{elapsed:?}"
    );
    assert_eq!(machine.tiers.num_rests(TierId::Remote), 1);
    for _ in 0..5 {
        assert!(direct.get("a", 10).is_err());
    }
    assert_eq!((direct.report().failures, direct.report().skipped), (1, 4));

    server.set_stopped(false);
    let start = Instant::now();
    while direct.get("a", 10) != Ok(Some(b"1".to_vec())) {
        assert!(start.elapsed() < PATIENCE, "it is not used again");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(direct.report().connections, 2);
    machine.now_us += 30_000_000;
    assert_eq!(count_right(&machine.restore(0..10)), 10);
}

/// A wrong password, none, a wrong user: refused with the server's code, and the password is nowhere shown. The right ones
/// work, a user of an access list too.
#[test]
#[ignore = "needs redis-server; `npm test` runs it where that is found"]
fn passwords_open_and_are_not_shown() {
    let user = "--user cache on >hunter3 ~ns-llm:* +getrange +set +expire +del".split(' ');
    let server = RedisServer::start(&["--requirepass", "hunter2 and more"].into_iter().chain(user).collect::<Vec<_>>());
    let at = |login: &str| format!("redis://{login}127.0.0.1:{}", server.port);
    for (login, operation, code) in [
        ("", "GETRANGE", "NOAUTH"),
        (":hunter%20wrong@", "AUTH", "WRONGPASS"),
        ("nobody:hunter2%20and%20more@", "AUTH", "WRONGPASS"),
    ] {
        let mut tier = tier_at(&at(login));
        let fault = tier.get(&key(1)).expect_err("refused");
        assert_eq!(fault, Fault::Refused { operation, code: code.to_string() });
        assert!(!format!("{fault:?} {tier:?}").contains("hunter"));
    }
    let (mut one, mut two) = (tier_at(&at(":hunter2%20and%20more@")), tier_at(&at("cache:hunter3@")));
    assert_eq!(one.put(&key(1), &payload(1)), Ok(true));
    assert_eq!(two.get(&key(1)), Ok(Some(payload(1))));
    assert_eq!(two.put(&key(2), &payload(2)), Ok(true));
    let mut elsewhere = store(&at("cache:hunter3@"), TIMEOUT_MS);
    assert_eq!(
        elsewhere.get("other", 10),
        Err(Fault::Refused { operation: "GETRANGE", code: "NOPERM".to_string() }),
        "the list holds for others"
    );
}

/// A server that may hold no more refuses, or gives up what was used least, as it was told; both are only misses.
#[test]
#[ignore = "needs redis-server; `npm test` runs it where that is found"]
fn full_server_refuses_or_evicts() {
    let strict = RedisServer::start(&["--maxmemory", "8mb", "--maxmemory-policy", "noeviction"]);
    let mut tier = tier_at(&strict.url());
    let stored: Vec<_> = (0..200).map(|name| tier.put(&key(name), &payload(name))).collect();
    let num_stored = stored.iter().filter(|stored| **stored == Ok(true)).count();
    let refused = Fault::Refused { operation: "SET", code: "OOM".to_string() };
    assert!(num_stored > 5 && stored.last() == Some(&Err(refused)), "{num_stored} stored, then {:?}", stored.last());
    assert_eq!(tier.get(&key(0)), Ok(Some(payload(0))), "what is there is served");

    let lru = RedisServer::start(&["--maxmemory", "8mb", "--maxmemory-policy", "allkeys-lru"]);
    let mut tier = tier_at(&lru.url());
    for name in 0..200 {
        assert_eq!(tier.put(&key(name), &payload(name)), Ok(true));
    }
    let found = (0..200).filter(|&name| tier.get(&key(name)).expect("no fault").is_some_and(|it| it == payload(name)));
    let num_found = found.count();
    assert!(num_found > 5 && num_found < 150, "{num_found} of 200 are left");
    assert_eq!((tier.stats().faults, tier.stats().misses), (0, 200 - num_found as u64));
}

const CHILD_URL: &str = "NS_LLM_REMOTE_TEST_URL";
const CHILD_FIRST: &str = "NS_LLM_REMOTE_TEST_FIRST";

/// Not a test of its own: stores twenty blocks, and checks those of the others.
#[test]
#[ignore = "run by processes_share_one_server, as a child"]
fn child_shares_blocks() {
    let url = std::env::var(CHILD_URL).expect("set by the parent");
    let first: u64 = std::env::var(CHILD_FIRST).expect("set by the parent").parse().expect("a number");
    let mut tier = tier_at(&url);
    for name in first..first + 20 {
        tier.put(&key(name), &payload(name)).expect("no fault");
        for other in 0..80 {
            if let Some(bytes) = tier.get(&key(other)).expect("no fault") {
                assert!(bytes == payload(other), "block {other}");
            }
        }
    }
    println!("hits {}", tier.stats().hits);
}

/// Several processes store and read at the same time, some of the same blocks: every block is right, and each process finds
/// blocks of others.
#[test]
#[ignore = "needs redis-server; `npm test` runs it where that is found"]
fn processes_share_one_server() {
    let server = RedisServer::start(&[]);
    let child = |first: u64| {
        Command::new(std::env::current_exe().expect("this program"))
            .args(["--exact", "remote_redis::child_shares_blocks", "--ignored", "--nocapture", "--test-threads=1"])
            .env(CHILD_URL, server.url())
            .env(CHILD_FIRST, first.to_string())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .expect("the child starts")
    };
    // Neighbours store ten blocks both.
    let children: Vec<_> = (0..4).map(|idx| child(idx * 10)).collect();
    let mut hits = 0;
    for child in children {
        let output = child.wait_with_output().expect("it ends");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{text}");
        let number = text.lines().find_map(|line| line.split_once("hits ")?.1.parse::<usize>().ok());
        hits += number.unwrap_or_else(|| panic!("no count in {text}"));
    }
    let mut tier = tier_at(&server.url());
    assert!((0..50).all(|name| tier.get(&key(name)) == Ok(Some(payload(name)))));
    // Alone each would find only its own: 1 + 2 + .. + 20.
    assert!(hits > 4 * 210, "{hits} hits");
}
