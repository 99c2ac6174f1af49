//! Promise: KV that the pool had to give away, or that an earlier process has computed, is found again, and an answer from
//! it is the answer, bit for bit. What cannot be found is computed; a bad cache costs time and nothing else.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use ns_llm::config::WRITE_QUEUE_BYTES;
use ns_llm::{CachedTokens, Completion, Engine, EngineOptions, Error, KvDtype, KvTierEncoding, Request, Warmed};
use safetensors::Dtype;

use crate::demo;
use crate::demo::{Rng, fingerprint, with_logprobs};
use crate::tiny_model::{TempFolder, small_config, write_model};

/// A folder that is gone with the test.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Folder {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("ns-llm-kv-tiers-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        Folder(std::env::temp_dir().join(name))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn request(prompt: &[u32]) -> Request {
    with_logprobs(Request::tokens(prompt).max_tokens(6))
}

fn run(engine: &Engine, prompt: &[u32]) -> Completion {
    engine.complete(request(prompt)).expect("runs")
}

fn cached(completion: &Completion) -> CachedTokens {
    let usage = &completion.summary.usage;
    assert_eq!(usage.cached_tokens, usage.cached_by_tier.total());
    usage.cached_by_tier
}

/// An engine whose pool holds 20 blocks of the demo model, and a KV cache in `folder`.
fn open(folder: &Path, change: impl FnOnce(&mut EngineOptions)) -> Engine {
    demo::open(|options| {
        options.kv_bytes = Some(20 * block_bytes());
        options.kv_cache_dir = Some(folder.to_path_buf());
        options.kv_disk_bytes = 64 << 20;
        // A busy machine is no stalled disk.
        options.kv_load_budget_ms = 20_000;
        change(options);
    })
}

fn block_bytes() -> u64 {
    let engine = demo::open(|_| ());
    engine.memory().kv_reserved_bytes / engine.stats().kv_blocks_total as u64
}

fn tier(engine: &Engine, name: &str) -> ns_llm::KvTierStats {
    *engine.stats().kv_tiers.iter().find(|tier| tier.name == name).expect("such a tier")
}

/// Prompts that together need several times the pool: each comes back from host memory instead of being computed, with the
/// same bits as without any cache, and host memory stays within its budget.
#[test]
fn evicted_blocks_come_back_from_host_memory() {
    let budget_bytes = 200 * (block_bytes() + 512);
    let engine = demo::open(|options| {
        options.kv_bytes = Some(20 * block_bytes());
        options.kv_host_bytes = budget_bytes;
    });
    let cold = demo::open(|options| options.prefix_cache = false);
    let prompts: Vec<Vec<u32>> = (0..6).map(|i| Rng(20 + i).prompt(200)).collect();
    for prompt in &prompts {
        assert_eq!(cached(&run(&engine, prompt)).total(), 0, "new");
    }
    for prompt in &prompts {
        let warm = run(&engine, prompt);
        assert_eq!(fingerprint(&warm), fingerprint(&run(&cold, prompt)));
        let found = cached(&warm);
        assert_eq!((found.total(), found.disk, found.remote), (192, 0, 0), "{found:?}");
        assert!(found.host >= 96, "{found:?}");
    }
    let host = tier(&engine, "host");
    assert!(host.hits >= 6 * 6 && host.stored > 0 && host.bytes <= budget_bytes, "{host:?}");
    assert!(cold.stats().kv_tiers.is_empty(), "no tiers without options");
}

/// What one engine has computed, prompt and answer, another engine over the same directory finds after the first has
/// closed; bits are those of a cold run.
#[test]
fn blocks_outlive_the_engine() {
    let folder = Folder::new();
    let cold = demo::open(|options| options.prefix_cache = false);
    let prompt = Rng(31).prompt(150);
    let first = open(&folder.0, |_| ());
    let answer = run(&first, &prompt);
    assert_eq!(cached(&answer).total(), 0);
    first.close();
    let second = open(&folder.0, |_| ());
    assert_eq!(second.start_trace(1_000), Ok(true));
    let again = run(&second, &prompt);
    // The reads are on the time line, and the steps have only the rest of the prompt.
    let trace = second.stop_trace().expect("recorded");
    assert_eq!(trace.matches("\"name\":\"read\"").count(), 9, "{trace}");
    assert!(trace.contains("\"name\":\"tier disk\"") && trace.contains("\"prefill_tokens\":6"), "{trace}");
    assert_eq!((second.stop_trace(), second.start_trace(1_000_001).is_err()), (None, true));
    assert_eq!(cached(&again), CachedTokens { disk: 144, ..CachedTokens::default() });
    assert_eq!(fingerprint(&again), fingerprint(&run(&cold, &prompt)));
    // Also in company of what the pool has.
    let longer = [prompt.clone(), answer.choices[0].token_ids.clone(), Rng(32).prompt(30)].concat();
    let warm = run(&second, &longer);
    assert_eq!(cached(&warm), CachedTokens { pool: 144, ..CachedTokens::default() });
    assert_eq!(fingerprint(&warm), fingerprint(&run(&cold, &longer)));
    let disk = tier(&second, "disk");
    assert!((disk.hits, disk.faults) == (9, 0) && disk.stored >= 1, "{disk:?}");
}

/// Another namespace, another form of the numbers, another model: nothing of it is found. The directory serves all of them.
#[test]
fn nobody_finds_what_is_not_his() {
    let folder = Folder::new();
    let prompt = Rng(41).prompt(100);
    let first = open(&folder.0, |_| ());
    run(&first, &prompt);
    first.close();
    let other = open(&folder.0, |_| ());
    let mut elsewhere = request(&prompt);
    elsewhere.namespace = Some("others".to_string());
    let stranger = other.complete(elsewhere).expect("runs");
    assert_eq!(cached(&stranger).total(), 0, "another namespace");
    other.close();
    let int8 = open(&folder.0, |options| options.kv_dtype = Some(KvDtype::Int8));
    assert_eq!(cached(&run(&int8, &prompt)).total(), 0, "another type of keys and values");
    int8.close();
    let changed = Folder::new();
    copy_with_one_weight_changed(&demo::path(), &changed.0);
    let changed_model = open(&folder.0, |options| options.model = changed.0.clone());
    assert_eq!(cached(&run(&changed_model, &prompt)).total(), 0, "another model under the same names");
    changed_model.close();
    let same = open(&folder.0, |_| ());
    assert_eq!(cached(&run(&same, &prompt)).disk, 96, "it is still there for its own");
}

fn copy_with_one_weight_changed(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("a folder");
    for name in ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(from.join(name), to.join(name)).expect("copied");
    }
    let mut weights = std::fs::read(from.join("model.safetensors")).expect("weights");
    let last = weights.len() - 2;
    weights[last] ^= 1;
    std::fs::write(to.join("model.safetensors"), weights).expect("written");
}

/// While one process writes, another reads what was there when it opened, stores nothing, and is in nobody's way.
#[test]
fn second_engine_reads() {
    let folder = Folder::new();
    let prompt = Rng(51).prompt(80);
    let writer = open(&folder.0, |_| ());
    run(&writer, &prompt);
    writer.flush().expect("on disk");
    let reader = open(&folder.0, |_| ());
    assert_eq!(cached(&run(&reader, &prompt)).disk, 64);
    run(&reader, &Rng(52).prompt(80));
    assert!(reader.flush().is_err_and(|error| error.code() == "not_stored"), "it may not write");
    let disk = tier(&reader, "disk");
    assert_eq!((disk.stored, disk.faults), (0, 0), "{disk:?}");
    assert!(tier(&writer, "disk").stored >= 5);
}

/// Every byte of the files may be wrong: the answer is right, and the damage is counted.
#[test]
fn damaged_files_are_misses() {
    let folder = Folder::new();
    let cold = demo::open(|options| options.prefix_cache = false);
    let prompt = Rng(61).prompt(120);
    let right = fingerprint(&run(&cold, &prompt));
    let first = open(&folder.0, |_| ());
    run(&first, &prompt);
    first.close();
    let segment = std::fs::read_dir(&folder.0)
        .expect("a directory")
        .map(|entry| entry.expect("an entry").path())
        .find(|path| path.extension().is_some_and(|extension| extension == "segment"))
        .expect("a segment");
    let sound = std::fs::read(&segment).expect("read");
    let (mut faults, mut hits) = (0, 0);
    for damage in 0..12 {
        let mut bytes = sound.clone();
        let at = bytes.len() * (2 * damage + 1) / 24;
        bytes[at] ^= 0x10;
        std::fs::write(&segment, &bytes).expect("written");
        let engine = open(&folder.0, |_| ());
        assert_eq!(fingerprint(&run(&engine, &prompt)), right, "byte {at}");
        faults += tier(&engine, "disk").faults;
        hits += tier(&engine, "disk").hits;
        engine.close();
        // What the engine mended is put back to what it was.
        for entry in std::fs::read_dir(&folder.0).expect("a directory") {
            let path = entry.expect("an entry").path();
            if path.extension().is_some_and(|extension| extension == "segment") {
                std::fs::remove_file(path).expect("removed");
            }
        }
    }
    assert!(faults > 0 && hits > 0, "{faults} faults, {hits} hits");
}

/// Sequences that lose their blocks get them back from host memory: nothing of their prompts is computed again, and the
/// tokens are the same.
#[test]
fn preempted_sequences_come_back_from_host_memory() {
    let run_all = |host_bytes: u64| {
        let engine = demo::open(|options| {
            options.kv_bytes = Some(24 * block_bytes());
            options.kv_host_bytes = host_bytes;
        });
        let streams: Vec<_> = (0..6)
            .map(|i| engine.submit(Request::tokens(Rng(70 + i).prompt(60)).max_tokens(100).temperature(0.0)))
            .map(|stream| stream.expect("admitted"))
            .collect();
        let texts: Vec<Vec<u32>> = streams
            .into_iter()
            .map(|stream| {
                let mut tokens = Vec::new();
                for event in stream {
                    if let ns_llm::Event::Delta(delta) = event.expect("runs") {
                        tokens.extend(delta.token_ids);
                    }
                }
                tokens
            })
            .collect();
        (texts, engine.stats())
    };
    let (with, with_stats) = run_all(64 << 20);
    let (without, without_stats) = run_all(0);
    assert_eq!(with, without);
    assert!(with_stats.preemptions_total > 0 && without_stats.preemptions_total > 0, "nobody was preempted");
    let host = with_stats.kv_tiers.iter().find(|tier| tier.name == "host").expect("host memory");
    assert!(host.hits > 0, "{host:?}");
    assert!(with_stats.computed_tokens_total < without_stats.computed_tokens_total);
}

/// Prompts that were warmed, more of them than may wait at once, are found by whoever asks next, and by the next engine; what
/// was there already is told apart.
#[test]
fn warmed_prompts_are_found() {
    let folder = Folder::new();
    let prompts: Vec<Vec<u32>> = (0..12).map(|i| Rng(80 + i).prompt(65)).collect();
    let requests = || prompts.iter().map(|prompt| request(prompt));
    let first = open(&folder.0, |options| {
        options.kv_bytes = None;
        options.max_waiting_requests = 2;
    });
    let cold = first.warm(requests()).expect("runs");
    assert_eq!(cold, Warmed { computed_tokens: 12 * 65, cached_tokens: 0 });
    assert_eq!(first.stats().generation_tokens_total, 0, "prompts only");
    let pool = CachedTokens { pool: 64, ..CachedTokens::default() };
    assert_eq!(cached(&run(&first, &prompts[7])), pool);
    assert_eq!(first.warm(requests()).expect("runs"), Warmed { computed_tokens: 12, cached_tokens: 12 * 64 });
    let by_tier = first.stats().prefix_cache_hits_by_tier;
    assert_eq!(by_tier, CachedTokens { pool: 13 * 64, ..CachedTokens::default() });
    first.close();
    assert_eq!(first.warm(requests()).map_err(|error| error.code()), Err("closed"));
    let second = open(&folder.0, |options| options.kv_bytes = None);
    assert_eq!(cached(&run(&second, &prompts[11])), CachedTokens { disk: 64, ..CachedTokens::default() });
    assert_eq!(second.stats().prefix_cache_hits_by_tier.disk, 64);
}

/// M7: the flood of one owner evicts what is its own, once it holds more than its share of pool and host memory, or of the
/// directory: another finds its KV again, also after a restart. Without shares it does not. That each request has a namespace
/// of its own does not help the flood.
#[test]
fn flood_of_one_owner_leaves_others_theirs() {
    for (share, is_found) in [(0.5, true), (1.0, false)] {
        let folder = Folder::new();
        let shared = |options: &mut EngineOptions| {
            (options.kv_namespace_share, options.kv_disk_bytes) = (share, 60 * (block_bytes() + 4_096));
        };
        let ask = |engine: &Engine, namespace: &str, seed: u64| {
            let mut request = request(&Rng(seed).prompt(100));
            request.namespace = Some(namespace.to_string());
            cached(&engine.complete(request).expect("runs"))
        };
        let engine = open(&folder.0, shared);
        ask(&engine, "small\nsalt", 1);
        (100..130).for_each(|seed| assert_eq!(ask(&engine, &format!("flood\n{seed}"), seed).total(), 0));
        engine.close();
        let engine = open(&folder.0, shared);
        let found = ask(&engine, "small\nsalt", 1).disk;
        assert_eq!(found == 96, is_found, "{found} of the directory, share {share}");
        assert_eq!(ask(&engine, "small\nother", 1).disk, 0, "an owner's namespaces are apart");
    }
    for (share, is_found) in [(0.5, true), (1.0, false)] {
        let engine = demo::open(|options| {
            options.kv_bytes = Some(24 * block_bytes());
            options.kv_host_bytes = 24 * (block_bytes() + 512);
            options.kv_namespace_share = share;
        });
        let ask = |namespace: &str, seed: u64| {
            let mut request = request(&Rng(seed).prompt(100));
            request.namespace = Some(namespace.to_string());
            cached(&engine.complete(request).expect("runs"))
        };
        ask("small", 1);
        (100..120).for_each(|seed| assert_eq!(ask(&format!("flood\n{seed}"), seed).total(), 0));
        assert_eq!(ask("small", 1).total() == 96, is_found, "share {share}");
    }
}

/// M4: whoever guesses another's prompt learns nothing from the work that it costs: steps and computed tokens are those of a
/// prompt that nobody ever sent, whether the other's KV is in the pool, in host memory or on disk. (What that means in time,
/// `cargo bench -p ns-llm --bench tenant_timing` measures.)
#[test]
fn guess_of_another_namespace_costs_what_a_new_prompt_costs() {
    let folder = Folder::new();
    let engine = open(&folder.0, |options| options.kv_host_bytes = 40 * (block_bytes() + 512));
    let ask = |namespace: &str, seed: u64| {
        let mut request = request(&Rng(seed).prompt(100));
        request.ignore_eos = true;
        request.namespace = Some(namespace.to_string());
        let before = engine.stats();
        let answer = engine.complete(request).expect("runs");
        let after = engine.stats();
        let work = after.computed_tokens_total - before.computed_tokens_total;
        (cached(&answer).total(), work, after.steps_total - before.steps_total)
    };
    let mut known = 0;
    for seed in 0..24 {
        ask("victim", seed);
    }
    let new = ask("attacker", 1_000);
    for seed in 0..24 {
        assert_eq!(ask("attacker", seed), new, "guess {seed}");
        known += ask("victim", seed).0;
    }
    assert!(known > 0, "the guesses were right");
}

/// What cannot be a cache directory, or has no room for one, is refused by name before anything is loaded.
#[test]
fn bad_directories_are_typed_errors() {
    let folder = Folder::new();
    std::fs::create_dir_all(&folder.0).expect("a folder");
    std::fs::write(folder.0.join("somebody's.txt"), "not ours").expect("a file");
    let open = |directory: PathBuf, bytes: u64| {
        let options = EngineOptions::new(demo::path()).threads(1).kv_cache_dir(directory).kv_disk_bytes(bytes);
        Engine::open(options).map(|_| ()).expect_err("refused")
    };
    assert!(matches!(open(folder.0.join("somebody's.txt"), 1 << 30), Error::Io { .. }));
    let small = open(folder.0.join("cache"), 1_000);
    assert!(matches!(&small, Error::InvalidArgument { field: "kv_disk_bytes", .. }), "{small}");
}

/// What is cleared is not found again: neither in the pool nor in host memory nor on disk, now or after a restart. A request
/// that runs meanwhile is not touched, and what is computed afterwards is cached again.
#[test]
fn cleared_blocks_are_gone() {
    let folder = Folder::new();
    let engine = open(&folder.0, |options| options.kv_host_bytes = 200 * (block_bytes() + 512));
    let cold = demo::open(|options| options.prefix_cache = false);
    let prompts: Vec<Vec<u32>> = (0..4).map(|i| Rng(60 + i).prompt(150)).collect();
    let hits = |engine: &Engine| {
        let found: Vec<_> = prompts.iter().map(|prompt| cached(&run(engine, prompt))).collect();
        found.iter().fold(CachedTokens::default(), |mut sum, found| {
            sum += *found;
            sum
        })
    };
    assert_eq!(hits(&engine).total(), 0, "new");
    assert!(hits(&engine).host > 0, "the pool is too small for all");
    engine.flush().expect("written");
    assert!(tier(&engine, "disk").blocks >= 36 && tier(&engine, "host").blocks > 0);
    let long = with_logprobs(Request::tokens(&prompts[0][..40]).max_tokens(120).temperature(0.0));
    let mut stream = engine.generate(long.clone()).expect("admitted");
    let first = stream.next_event().expect("an event").expect("no error");
    engine.clear_prefix_cache().expect("cleared");
    // The running request goes on and stores what it computes, but what was stored before (36 blocks and more) is gone.
    let running = (40 + 120) / 16;
    assert!(tier(&engine, "disk").blocks <= running && tier(&engine, "host").blocks <= running);
    let mut token_ids = Vec::new();
    for event in std::iter::once(Ok(first)).chain(stream) {
        if let ns_llm::Event::Delta(delta) = event.expect("the running request is not touched") {
            token_ids.extend(delta.token_ids);
        }
    }
    assert_eq!(token_ids, cold.complete(long).expect("runs").choices[0].token_ids);
    engine.clear_prefix_cache().expect("cleared");
    assert_eq!((tier(&engine, "disk").blocks, tier(&engine, "host").blocks), (0, 0));
    assert_eq!(hits(&engine).total(), 0, "nothing is found");
    assert!(hits(&engine).total() > 0, "what was computed since is");
    engine.clear_prefix_cache().expect("cleared");
    engine.close();
    let next = open(&folder.0, |_| ());
    assert_eq!(hits(&next).total(), 0, "nor after a restart");
    // Who only reads cannot clear the files, and says so; it uses nothing of them.
    next.flush().expect("written");
    let reader = open(&folder.0, |_| ());
    assert!(hits(&reader).disk > 0);
    assert!(reader.clear_prefix_cache().is_err_and(|error| error.code() == "storage"));
    assert_eq!(hits(&reader).total(), 0);
    assert_eq!(engine.clear_prefix_cache(), Err(Error::Closed));
}

/// Steps whose blocks take more than half of what may wait to be written: what is written during a step makes room for what it
/// computed. (A disk that is slower than computing may lose blocks of one prompt, but not of ten.)
#[test]
fn long_prompts_are_stored_whole() {
    let mut config = small_config();
    // 16 tokens of keys and values: 1 MiB.
    for (field, value) in [
        ("num_hidden_layers", 1),
        ("num_attention_heads", 32),
        ("num_key_value_heads", 32),
        ("head_dim", 256),
        ("max_position_embeddings", 4_096),
        ("vocab_size", 2_048),
    ] {
        config[field] = value.into();
    }
    let (model, folder) = (TempFolder::new("wide-kv"), Folder::new());
    write_model(&model, &config, Dtype::F32, 1);
    std::fs::copy(demo::path().join("tokenizer.json"), model.path().join("tokenizer.json")).expect("copied");
    const STEP_TOKENS: usize = 640;
    let mut options = EngineOptions::new(model.path()).threads(2).kv_cache_dir(&folder.0).kv_bytes(300 << 20);
    (options.prefill_budget_tokens, options.kv_dtype) = (STEP_TOKENS, Some(KvDtype::F32));
    let engine = Engine::open(options).expect("it opens");
    let step_blocks = (STEP_TOKENS / 16) as u64;
    let block_bytes = engine.memory().kv_reserved_bytes / engine.stats().kv_blocks_total as u64;
    assert!(2 * step_blocks * block_bytes > WRITE_QUEUE_BYTES, "the steps are large");
    let is_whole = (0..10).any(|round| {
        let prompt: Vec<u32> = (0..3 * STEP_TOKENS as u32).map(|i| (i * 31 + round * 7 + 5) % 2_048).collect();
        let before = tier(&engine, "disk").stored;
        run(&engine, &prompt);
        engine.flush().is_ok() && tier(&engine, "disk").stored - before >= 3 * step_blocks
    });
    assert!(is_whole, "{:?}", tier(&engine, "disk"));
}

/// A flush that has not stored everything says so, once, and how much that is: here because another process writes the
/// directory. Whoever writes it has nothing to say.
#[test]
fn flush_tells_what_was_not_stored() {
    let folder = Folder::new();
    let writer = open(&folder.0, |_| ());
    let reader = open(&folder.0, |_| ());
    assert_eq!((writer.flush(), reader.flush()), (Ok(()), Ok(())), "there was nothing to store");
    assert_eq!(writer.info().kv_disk_refusal, None);
    assert_eq!(reader.info().kv_disk_refusal.as_deref(), Some("another process writes to this tier"));
    for engine in [&writer, &reader] {
        run(engine, &Rng(81).prompt(100));
    }
    assert_eq!(writer.flush(), Ok(()));
    let error = reader.flush().expect_err("it may not write");
    let reason = "another process writes to this tier".to_string();
    assert_eq!(error, Error::NotStored { tier: "disk", count: 6, what: "KV blocks", reason });
    assert_eq!((error.code(), reader.flush()), ("not_stored", Ok(())), "told once");
}

/// A directory that a newer version has written stays as it is; the engine opens without it, says why, and a flush says what
/// is not there. The same beneath it, for answers.
#[test]
fn directory_of_a_newer_version_is_left_alone() {
    let (folder, prompt) = (Folder::new(), Rng(82).prompt(100));
    open(&folder.0, |_| ()).close();
    let newer = folder.0.join("v2-0000000000000000.segment");
    std::fs::write(&newer, b"of another time").expect("written");
    let engine = open(&folder.0, |_| ());
    assert_eq!(engine.info().kv_disk_refusal.as_deref(), Some("format version 2 is newer than 1"));
    run(&engine, &prompt);
    assert_eq!((tier(&engine, "disk").stored, cached(&run(&engine, &prompt)).pool), (0, 96));
    assert!(matches!(engine.flush(), Err(Error::NotStored { count: 6, .. })));
    assert!(engine.clear_prefix_cache().is_err_and(|error| error.to_string().contains("format version 2")));
    engine.close();
    assert_eq!(std::fs::read(&newer).expect("still there"), b"of another time");
    std::fs::remove_file(&newer).expect("removed");
    let answers = folder.0.join("answers");
    let keeps_answers = |options: &mut EngineOptions| options.response_cache.max_bytes = 1 << 20;
    open(&folder.0, keeps_answers).close();
    std::fs::write(answers.join("v2-0000000000000000.segment"), b"of another time").expect("written");
    let engine = open(&folder.0, keeps_answers);
    assert_eq!(engine.info().kv_disk_refusal.as_deref(), Some("answers: format version 2 is newer than 1"));
    run(&engine, &prompt);
    assert_eq!((engine.flush(), tier(&engine, "disk").stored), (Ok(()), 6), "KV is stored as ever");
}

/// Blocks that are kept in 8 bits take half the bytes, come back from host memory and disk, and are found by engines that keep
/// them so and by no other. They change an answer by little: how much is told, and bounded, as the error of the logprobs of
/// the token that follows a restored prefix.
#[test]
fn rounded_blocks_are_half_as_large_and_nearly_right() {
    let folder = Folder::new();
    let rounded = |options: &mut EngineOptions| options.kv_tier_encoding = KvTierEncoding::Int8;
    let text = std::fs::read_to_string(demo::path().join("README.md")).expect("some text");
    let cold = demo::open(|options| options.prefix_cache = false);
    let ids = cold.tokenize(&text, false).expect("tokenizes");
    let asked = |prompt: &[u32]| with_logprobs(Request::tokens(prompt).max_tokens(1).temperature(0.0));
    let prompts: Vec<&[u32]> = ids.chunks_exact(161).take(10).collect();
    let writer = open(&folder.0, rounded);
    assert_eq!((writer.info().kv_tier_encoding, cold.info().kv_tier_encoding), ("int8", "as-computed"));
    for prompt in &prompts {
        let computed = writer.complete(asked(prompt)).expect("runs");
        assert_eq!(
            fingerprint(&computed),
            fingerprint(&cold.complete(asked(prompt)).expect("runs")),
            "nothing came back"
        );
    }
    writer.flush().expect("written");
    let disk = tier(&writer, "disk");
    let ratio = (disk.blocks * block_bytes()) as f64 / disk.bytes as f64;
    assert!(disk.blocks >= 80 && (1.7..2.0).contains(&ratio), "{ratio} of {disk:?}");
    writer.close();
    let reader = open(&folder.0, |options| {
        rounded(options);
        options.kv_host_bytes = 64 << 20;
    });
    let (mut squares, mut errors, mut worst, mut count, mut same) = (0.0, 0.0, 0.0_f64, 0, 0);
    for prompt in &prompts {
        let (warm, right) =
            (reader.complete(asked(prompt)).expect("runs"), cold.complete(asked(prompt)).expect("runs"));
        assert_eq!(cached(&warm), CachedTokens { disk: 160, ..CachedTokens::default() });
        let (warm, right) = (&warm.choices[0].logprobs[0], &right.choices[0].logprobs[0]);
        same += usize::from(warm.chosen.token_id == right.chosen.token_id);
        for expected in right.top.iter() {
            if let Some(found) = warm.top.iter().find(|found| found.token_id == expected.token_id) {
                let off = f64::from(found.logprob - expected.logprob);
                (squares, errors) = (squares + f64::from(expected.logprob).powi(2), errors + off * off);
                (worst, count) = (worst.max(off.abs()), count + 1);
            }
        }
    }
    let nmse = errors / squares;
    println!(
        "NMSE {nmse:.2e} of {count} logprobs, largest error {worst:.4}, {same} of {} tokens the same",
        prompts.len()
    );
    assert!(nmse > 0.0, "nothing was rounded");
    assert!(count >= 20 && nmse < 1e-4 && worst < 0.25 && same >= 9, "{nmse:.2e} of {count}, {worst}, {same}");
    // What the pool gave away comes back from host memory, in the same form.
    let again = reader.complete(asked(prompts[0])).expect("runs");
    assert!(cached(&again).host > 0, "{:?}", cached(&again));
    // Neither finds what the other has kept.
    reader.close();
    let lossless = open(&folder.0, |_| ());
    assert_eq!(cached(&lossless.complete(asked(prompts[0])).expect("runs")).total(), 0);
    lossless.close();
    let again = open(&folder.0, rounded);
    assert_eq!(cached(&again.complete(asked(prompts[0])).expect("runs")).disk, 160);
    again.close();
    // A pool of 8-bit integers has nothing to round.
    let narrow = open(&folder.0, |options| {
        rounded(options);
        options.kv_dtype = Some(KvDtype::Int8);
    });
    assert_eq!(narrow.info().kv_tier_encoding, "as-computed");
}
