//! Promise: the remote tier returns a block that was stored under the key or none, whatever the store says, and each call
//! ends within its time. The store here is a lying one in memory, or a peer that speaks the protocol badly on purpose; a
//! real server is in `remote_redis.rs`.
//!
//! | | Promise | Test, here unless another file is named |
//! | --- | --- | --- |
//! | R1 | A store that is killed, hangs, trickles or flaps costs a bounded time and no block | `every_hang_ends_with_its_time`, `connection_that_ended_while_idle_is_made_again`, `store_is_left_alone_after_a_failure`; `remote_redis.rs` |
//! | R2 | Every partial answer is a miss | `answer_cut_at_each_byte_is_a_fault` |
//! | R3 | Wrong bytes, another key's value, an older value, shifted replies | `no_changed_byte_is_believed`, `value_of_another_block_is_a_miss`, `shifted_replies_are_misses` |
//! | R4 | Nothing is taken in beyond what was asked for | `peer_that_breaks_the_protocol_is_a_fault`; `resp.rs` |
//! | R6 | Credentials are never shown | `server_url.rs`, `refusal_shows_no_password`; `remote_redis.rs` |

use std::collections::HashMap;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ns_llm::kv_cache::tiers::{Job, Outcome, TierStore};
use ns_llm::sampler::random_at;
use ns_llm::storage::remote::{HEADER_BYTES, RedisStore, RemoteOptions, RemoteStore, ServerUrl, ValueStore};
use ns_llm::storage::{Damage, Fault, LayoutId, RecordKey};

const MAX_PAYLOAD_BYTES: u64 = 600;
const SECRET: &[u8] = b"sixteen bytes at least";

fn key(name: u8) -> RecordKey {
    RecordKey { content: [name; 32], layout: LayoutId([7; 32]) }
}

fn payload(name: u8) -> Vec<u8> {
    let length = 300 + u64::from(name);
    (0..length).map(|i| random_at(name.into(), i) as u8).collect()
}

/// A store in memory that any number of tiers share. A test changes its values behind their backs.
#[derive(Clone, Default)]
struct SharedStore(Arc<Mutex<HashMap<String, Vec<u8>>>>);

impl SharedStore {
    fn tier(&self, options: RemoteOptions) -> RemoteStore {
        RemoteStore::new(Box::new(self.clone()), options)
    }
    fn values(&self) -> HashMap<String, Vec<u8>> {
        self.0.lock().expect("no panic").clone()
    }
    fn set(&self, name: &str, value: Vec<u8>) {
        self.0.lock().expect("no panic").insert(name.to_string(), value);
    }
    fn only_name(&self) -> String {
        let values = self.values();
        assert_eq!(values.len(), 1);
        values.into_keys().next().expect("one")
    }
}

impl ValueStore for SharedStore {
    fn get(&mut self, name: &str, _: u64) -> Result<Option<Vec<u8>>, Fault> {
        Ok(self.values().remove(name))
    }
    fn put(&mut self, name: &str, value: &[u8], ttl_s: u64) -> Result<bool, Fault> {
        assert!(ttl_s > 0, "every record ends");
        let is_new = !self.values().contains_key(name);
        self.set(name, value.to_vec());
        Ok(is_new)
    }
    fn replace(&mut self, name: &str, value: &[u8], ttl_s: u64) -> Result<(), Fault> {
        self.put(name, value, ttl_s).map(drop)
    }
    fn remove(&mut self, name: &str) -> Result<(), Fault> {
        self.0.lock().expect("no panic").remove(name);
        Ok(())
    }
}

fn open_options() -> RemoteOptions {
    RemoteOptions::new(MAX_PAYLOAD_BYTES)
}
fn keyed_options() -> RemoteOptions {
    open_options().secret(SECRET).expect("long enough")
}

/// What one tier stores another finds, with a secret and without; a tier of another prefix or secret does not, and counts
/// that as a miss and not as a fault.
#[test]
fn nodes_share_what_they_agree_on() {
    let other_secret = open_options().secret(b"another secret of theirs").expect("long enough");
    let other_prefix = open_options().prefix("staging").expect("plain");
    let store = SharedStore::default();
    let all = [open_options(), keyed_options(), other_secret, other_prefix];
    for (idx, options) in all.iter().enumerate() {
        let (mut writer, mut reader) = (store.tier(options.clone()), store.tier(options.clone()));
        assert_eq!(reader.get(&key(1)), Ok(None), "what the options before have stored is not seen");
        assert_eq!(writer.put(&key(1), &payload(1)), Ok(true));
        assert_eq!(writer.put(&key(1), &payload(1)), Ok(false));
        assert_eq!(reader.get(&key(1)), Ok(Some(payload(1))));
        assert_eq!(reader.run(Job::Read(key(1))), Outcome::Found(payload(1).into()));
        assert_eq!(reader.run(Job::Read(key(2))), Outcome::Missing);
        let stats = reader.stats();
        assert_eq!((stats.hits, stats.hit_bytes, stats.misses, stats.faults), (2, 2 * 301, 2, 0));
        assert_eq!((writer.stats().stored, store.values().len()), (1, idx + 1));
        assert_eq!(reader.num_damaged(), 0);
    }
    let mut tier = store.tier(open_options());
    assert_eq!(tier.run(Job::Quarantine(key(1))), Outcome::Done);
    assert_eq!(tier.get(&key(1)), Ok(None), "taken away for all");
    assert_eq!(tier.run(Job::Write(key(1), payload(1).into(), [0; 32])), Outcome::Stored);
    let too_long = vec![0; MAX_PAYLOAD_BYTES as usize + 1];
    assert_eq!(tier.put(&key(3), &too_long), Err(Fault::TooLong { bytes: 601, limit_bytes: 600 }));
}

/// Every byte of a record changed, every length of it, bytes added: never a block, always a counted fault, and the record is
/// removed so that a sound one can take its place. With a secret no forged checksum helps (`record.rs`).
#[test]
fn no_changed_byte_is_believed() {
    for options in [open_options(), keyed_options()] {
        let store = SharedStore::default();
        let mut tier = store.tier(options);
        tier.put(&key(1), &payload(1)).expect("stored");
        let (name, sound) = (store.only_name(), store.values().into_values().next().expect("one"));
        assert_eq!(sound.len(), HEADER_BYTES + payload(1).len());
        let mut num_lies = 0;
        let mut lie = |value: Vec<u8>| {
            store.set(&name, value);
            let fault = tier.get(&key(1)).expect_err("a lie");
            assert!(matches!(fault, Fault::Damaged(_)), "{fault}");
            assert!(store.values().is_empty(), "it would stand in the way");
            num_lies += 1;
            assert_eq!((tier.stats().faults, tier.num_damaged(), tier.stats().hits), (num_lies, num_lies, 0));
        };
        for at in 0..sound.len() {
            for change in [0x01, 0x80, 0xff] {
                let mut changed = sound.clone();
                changed[at] ^= change;
                lie(changed);
            }
            lie(sound[..at].to_vec());
        }
        for added in [1, 16, 300, 100_000] {
            lie([sound.clone(), vec![0; added]].concat());
        }
        for seed in 0..2_000 {
            let mut changed = sound.clone();
            let from = random_at(seed, 0) as usize % changed.len();
            let to = (from + 1 + random_at(seed, 1) as usize % 64).min(changed.len());
            changed[from..to].iter_mut().enumerate().for_each(|(i, byte)| *byte = random_at(seed, 2 + i as u64) as u8);
            if changed != sound {
                lie(changed);
            }
        }
        store.set(&name, sound);
        assert_eq!(tier.get(&key(1)), Ok(Some(payload(1))), "it was the lies");
    }
}

/// The sound record of another block, layout, secret or of none is not the record that was asked for.
#[test]
fn value_of_another_block_is_a_miss() {
    let store = SharedStore::default();
    let other_layout = RecordKey { layout: LayoutId([8; 32]), ..key(1) };
    store.tier(open_options()).put(&key(1), &payload(1)).expect("stored");
    let name = store.only_name();
    for (options, other) in [(open_options(), key(2)), (open_options(), other_layout), (keyed_options(), key(1))] {
        let others = SharedStore::default();
        others.tier(options).put(&other, &payload(1)).expect("stored");
        store.set(&name, others.values().into_values().next().expect("one"));
        let expected = if other == key(1) { Damage::Code } else { Damage::Key };
        assert_eq!(store.tier(open_options()).get(&key(1)), Err(Fault::Damaged(expected)));
    }
    // Larger than a block: refused before its content is looked at.
    store.set(&name, vec![0; HEADER_BYTES + MAX_PAYLOAD_BYTES as usize + 1]);
    let fault = store.tier(open_options()).get(&key(1)).expect_err("too long");
    assert!(matches!(fault, Fault::Damaged(Damage::Length { limit_bytes: 744, .. })), "{fault}");
}

/// Options are refused by name outside their ranges, and a secret is not shown.
#[test]
fn options_have_ranges() {
    let fields = [
        open_options().ttl_s(0).map(drop),
        open_options().ttl_s(1 << 40).map(drop),
        open_options().prefix("").map(drop),
        open_options().prefix("a b").map(drop),
        open_options().prefix(&"a".repeat(65)).map(drop),
        open_options().secret(b"short").map(drop),
        open_options().secret(&[0; 2_000]).map(drop),
        store_at(1, 0).map(drop),
        store_at(1, 1 << 40).map(drop),
    ]
    .map(|result| result.expect_err("outside").to_string());
    let names = ["kv_remote_ttl_s", "kv_remote_prefix", "kv_remote_secret", "kv_remote_timeout_ms"];
    for error in &fields {
        assert!(names.iter().any(|name| error.starts_with(name)) && error.contains("must be"), "{error}");
    }
    assert!(!fields.concat().contains("short") && !format!("{:?}", keyed_options()).contains("sixteen"));
}

// ---- A peer on the network ---------------------------------------------------------------------------------------------

/// What a peer does with a command whose name is given: it writes something, or nothing; false: it hangs up then.
type Answer = dyn Fn(&str, &mut TcpStream) -> bool + Send + Sync;

/// A peer on a port of its own, until the test ends.
struct Peer {
    port: u16,
    num_connections: Arc<AtomicU64>,
}

impl Peer {
    fn new(answer: impl Fn(&str, &mut TcpStream) -> bool + Send + Sync + 'static) -> Peer {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
        let port = listener.local_addr().expect("bound").port();
        let num_connections = Arc::new(AtomicU64::new(0));
        let (count, answer): (_, Arc<Answer>) = (Arc::clone(&num_connections), Arc::new(answer));
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                count.fetch_add(1, Ordering::SeqCst);
                let answer = Arc::clone(&answer);
                std::thread::spawn(move || serve(stream, &*answer));
            }
        });
        Peer { port, num_connections }
    }

    fn tier(&self, timeout_ms: u64) -> RemoteStore {
        let store = store_at(self.port, timeout_ms).expect("in range");
        RemoteStore::new(Box::new(store), open_options())
    }
    fn num_connections(&self) -> u64 {
        self.num_connections.load(Ordering::SeqCst)
    }
}

fn store_at(port: u16, timeout_ms: u64) -> ns_llm::Result<RedisStore> {
    RedisStore::new(ServerUrl::parse(&format!("redis://127.0.0.1:{port}")).expect("a URL"), timeout_ms)
}

fn serve(stream: TcpStream, answer: &Answer) {
    let mut writer = stream.try_clone().expect("a second handle");
    let mut reader = BufReader::new(stream);
    while let Some(name) = read_command(&mut reader) {
        if !answer(&name, &mut writer) {
            return;
        }
    }
}

/// The name of the next command, the rest of which is thrown away.
fn read_command(reader: &mut BufReader<TcpStream>) -> Option<String> {
    let mut name = None;
    for _ in 0..read_number(reader, '*')? {
        let mut bytes = vec![0; read_number(reader, '$')? + 2];
        reader.read_exact(&mut bytes).ok()?;
        name = name.or_else(|| Some(String::from_utf8_lossy(&bytes[..bytes.len() - 2]).into_owned()));
    }
    name
}

fn read_number(reader: &mut BufReader<TcpStream>, mark: char) -> Option<usize> {
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    line.trim_end().strip_prefix(mark)?.parse().ok()
}

/// The record of `key(1)` as a server sends it.
fn sound_reply() -> Vec<u8> {
    let store = SharedStore::default();
    store.tier(open_options()).put(&key(1), &payload(1)).expect("stored");
    let record = store.values().into_values().next().expect("one");
    [format!("${}\r\n", record.len()).as_bytes(), &record, b"\r\n"].concat()
}

/// Time enough for a machine that does other things; far less than what hangs would take.
const PATIENCE: Duration = Duration::from_secs(30);
const LONG_TIMEOUT_MS: u64 = 10_000;

/// The answer to a read is cut at each of its bytes, and the peer hangs up: always a fault, never a part of a block.
#[test]
fn answer_cut_at_each_byte_is_a_fault() {
    let reply = sound_reply();
    let cut = Arc::new(AtomicU64::new(0));
    let peer = {
        let (reply, cut) = (reply.clone(), Arc::clone(&cut));
        Peer::new(move |name, stream| {
            let cut = cut.load(Ordering::SeqCst) as usize;
            match name {
                "GETRANGE" => stream.write_all(&reply[..cut]).is_ok() && cut == reply.len(),
                // Removing what was damaged.
                _ => stream.write_all(b":0\r\n").is_ok(),
            }
        })
    };
    for len in 0..reply.len() {
        cut.store(len as u64, Ordering::SeqCst);
        let fault = peer.tier(LONG_TIMEOUT_MS).get(&key(1)).expect_err("a part");
        assert!(matches!(fault, Fault::Io { .. }), "{len} bytes: {fault}");
    }
    cut.store(reply.len() as u64, Ordering::SeqCst);
    assert_eq!(peer.tier(LONG_TIMEOUT_MS).get(&key(1)), Ok(Some(payload(1))));
    assert!(peer.num_connections() > reply.len() as u64);
}

/// Answers that the protocol does not allow, or that are longer than what was asked for: a fault at once, and the
/// connection is not used again.
#[test]
fn peer_that_breaks_the_protocol_is_a_fault() {
    let lies: [&[u8]; 14] = [
        b"$9223372036854775807\r\n",
        b"$1000000\r\n",
        b"$-7\r\n",
        b"*1000000000\r\n",
        b"*-1\r\n",
        b"%1\r\n+a\r\n+b\r\n",
        b"~1000000000\r\n",
        b">2\r\n+a\r\n+b\r\n",
        b":5\r\n",
        b"+OK\r\n",
        b"+nothing\r\n",
        b"$3\r\nabcdef\r\n",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        &[b'-'; 5_000],
    ];
    for lie in lies {
        let reply = lie.to_vec();
        let peer = Peer::new(move |_, stream| stream.write_all(&reply).is_ok());
        let mut tier = peer.tier(LONG_TIMEOUT_MS);
        let start = Instant::now();
        let fault = tier.get(&key(1)).expect_err("a lie");
        let shown = String::from_utf8_lossy(&lie[..lie.len().min(30)]).into_owned();
        assert!(matches!(fault, Fault::Protocol { .. }), "{shown:?}: {fault}");
        let refused = tier.put(&key(1), &payload(1)).expect_err("left alone");
        assert!(matches!(refused, Fault::Io { kind: ErrorKind::NotConnected, .. }), "{shown:?}: {refused}");
        assert!(start.elapsed() < PATIENCE && tier.stats().faults == 2 && peer.num_connections() == 1);
    }
}

/// A peer that never answers, one that sends a byte now and then, one that reads nothing: each ends with the call's time,
/// and what comes late is thrown away.
#[test]
fn every_hang_ends_with_its_time() {
    let reply = sound_reply();
    let trickle = move |_: &str, stream: &mut TcpStream| {
        // The whole answer would take a minute.
        reply.iter().all(|byte| {
            std::thread::sleep(Duration::from_millis(130));
            stream.write_all(&[*byte]).is_ok()
        })
    };
    for (what, peer) in [
        ("silent", Peer::new(|_, _| true)),
        ("trickling", Peer::new(trickle)),
        (
            "with an endless line",
            Peer::new(|_, stream| {
                stream.write_all(b"-ERR").is_ok()
                    && (0..).all(|_| {
                        std::thread::sleep(Duration::from_millis(130));
                        stream.write_all(b" ").is_ok()
                    })
            }),
        ),
    ] {
        let mut tier = peer.tier(400);
        let start = Instant::now();
        let fault = tier.get(&key(1)).expect_err("it hangs");
        assert!(matches!(fault, Fault::Io { kind: ErrorKind::TimedOut, .. }), "{what}: {fault}");
        assert!(start.elapsed() >= Duration::from_millis(390), "{what}: it was waited for");
        assert!(start.elapsed() < PATIENCE, "{what}: {:?}", start.elapsed());
    }
    // Nobody reads: a value that the buffers of the system do not hold is never sent whole.
    let peer = Peer::new(|name, stream| {
        let is_first = stream.write_all(b":0\r\n").is_ok();
        if name == "EXPIRE" {
            std::thread::sleep(PATIENCE);
        }
        is_first
    });
    let store = store_at(peer.port, 400).expect("in range");
    let mut tier = RemoteStore::new(Box::new(store), RemoteOptions::new(1 << 30));
    let start = Instant::now();
    let fault = tier.put(&key(1), &vec![0; 64 << 20]).expect_err("it hangs");
    assert!(matches!(fault, Fault::Io { operation: "SET", kind: ErrorKind::TimedOut, .. }), "{fault}");
    assert!(start.elapsed() < PATIENCE, "{:?}", start.elapsed());
}

/// A connection that the peer closed while nothing happened on it is made again, and the call works.
#[test]
fn connection_that_ended_while_idle_is_made_again() {
    let reply = sound_reply();
    // Hangs up after each answer, as a server with a short idle time does.
    let peer = Peer::new(move |_, stream| {
        let _ = stream.write_all(&reply);
        false
    });
    let mut tier = peer.tier(LONG_TIMEOUT_MS);
    for call in 1..=5 {
        assert_eq!(tier.get(&key(1)), Ok(Some(payload(1))));
        assert_eq!((peer.num_connections(), tier.stats().faults), (call, 0));
    }
}

/// After a failure calls fail at once for a while, which costs nobody anything; then the store is tried again.
#[test]
fn store_is_left_alone_after_a_failure() {
    // A port that nobody listens on: taken, and given back.
    let port = TcpListener::bind(("127.0.0.1", 0)).and_then(|it| it.local_addr()).expect("a free port").port();
    let mut store = store_at(port, 2_000).expect("in range");
    assert!(store.get("a", 1).is_err());
    for _ in 0..100 {
        assert!(matches!(store.get("a", 1), Err(Fault::Io { kind: ErrorKind::NotConnected, .. })));
    }
    assert_eq!((store.report().failures, store.report().skipped, store.report().connections), (1, 100, 0));
    let start = Instant::now();
    while store.report().failures < 2 && start.elapsed() < PATIENCE {
        std::thread::sleep(Duration::from_millis(20));
        let _ = store.get("a", 1);
    }
    assert_eq!(store.report().failures, 2, "it is tried again");
    assert!(start.elapsed() > Duration::from_millis(1_500), "after its pause");
}

/// Answers that come one call too late are not believed: the record of another block is damage, and a string where a number
/// must be ends the connection.
#[test]
fn shifted_replies_are_misses() {
    let store = SharedStore::default();
    store.tier(open_options()).put(&key(1), &payload(1)).expect("stored");
    let record = store.values().into_values().next().expect("one");
    let reply = [format!("${}\r\n", record.len()).as_bytes(), &record, b"\r\n"].concat();
    let peer = Peer::new(move |_, stream| stream.write_all(&reply).is_ok());
    let mut tier = peer.tier(LONG_TIMEOUT_MS);
    assert_eq!(tier.get(&key(1)), Ok(Some(payload(1))));
    assert_eq!(tier.get(&key(2)), Err(Fault::Damaged(Damage::Key)));
    // Removing it got a string for an answer, and the connection is gone with it.
    assert_eq!((tier.stats().hits, tier.num_damaged(), peer.num_connections()), (1, 1, 1));
    let fault = tier.get(&key(1)).expect_err("left alone");
    assert!(matches!(fault, Fault::Io { kind: ErrorKind::NotConnected, .. }), "{fault}");
}

/// What a server says of a login may repeat it; nothing of that is shown.
#[test]
fn refusal_shows_no_password() {
    let peer = Peer::new(|_, stream| {
        stream.write_all(b"-ERR unknown command `AUTH`, with args beginning with: `hunter2`\r\n").is_ok()
    });
    let url = ServerUrl::parse(&format!("redis://:hunter2@127.0.0.1:{}", peer.port)).expect("a URL");
    let store = RedisStore::new(url, LONG_TIMEOUT_MS).expect("in range");
    let mut shown = format!("{store:?}");
    let mut tier = RemoteStore::new(Box::new(store), open_options());
    let fault = tier.get(&key(1)).expect_err("refused");
    assert_eq!(fault, Fault::Refused { operation: "AUTH", code: "ERR".to_string() });
    shown += &format!("{fault} {fault:?} {tier:?}");
    assert!(!shown.contains("hunter2") && shown.contains("127.0.0.1"), "{shown}");
}
