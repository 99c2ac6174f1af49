//! Promise: the vector of an input depends on that input alone, bit for bit: not on what else is embedded or generated
//! at the same time, nor on the number of threads; and generation does not notice either.

use ns_llm::backend::cpu::{CpuBackend, CpuBackendOptions};
use ns_llm::backend::{KvDtype, Pooling};
use ns_llm::{
    Embedding, EmbeddingRequest, Engine, EngineOptions, Error, Event, KvRemoteOptions, Priority, Request,
    ThreadPriority, WeightFormat,
};
use safetensors::Dtype;
use serde_json::json;

use crate::demo;
use crate::demo::Rng;
use crate::direct_run::DirectRun;
use crate::reference_backend::Reference;
use crate::tiny_model::{TempFolder, write_model};

fn inputs(count: usize) -> Vec<Vec<u32>> {
    let mut rng = Rng(77);
    (0..count).map(|i| rng.prompt(1 + i * 37 % 200)).collect()
}

fn bits(embedding: &Embedding) -> Vec<u32> {
    embedding.values.iter().map(|value| value.to_bits()).collect()
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

/// Alone, all in one request, beside running generations, with 1 to 4 threads: the same bits.
#[test]
fn vectors_depend_on_their_input_alone() {
    let inputs = inputs(24);
    let engine = demo::open(|options| options.threads = Some(1));
    let alone: Vec<_> = inputs
        .iter()
        .map(|ids| bits(&engine.embed(EmbeddingRequest::new([ids.clone()])).expect("embeds").embeddings[0]))
        .collect();
    let alone_stats = engine.stats();
    assert!(
        alone_stats.embedding_tokens_total > 0 && alone_stats.generation_tokens_total == 0,
        "nothing was generated"
    );
    for threads in 2..=4 {
        let engine = demo::open(|options| options.threads = Some(threads));
        let mates: Vec<_> = (0..4)
            .map(|i| engine.submit(Request::tokens(Rng(i).prompt(60)).max_tokens(60).seed(i)).expect("submits"))
            .collect();
        let together = engine.embed(EmbeddingRequest::new(inputs.clone())).expect("embeds");
        let together: Vec<_> = together.embeddings.iter().map(bits).collect();
        assert_eq!(together, alone, "{threads} threads");
        mates.into_iter().flatten().for_each(|event| assert!(event.is_ok()));
        assert!(engine.stats().generation_tokens_total > 0, "generations ran beside");
    }
}

/// Keys and values in 8 bits are for what is kept: vectors have the bits that they have without them, answers do not.
#[test]
fn vectors_are_not_made_of_8_bit_keys() {
    let vectors_and_answer = |kv_dtype| {
        let engine = demo::open(|options| options.kv_dtype = kv_dtype);
        let made = engine.embed(EmbeddingRequest::new(inputs(3))).expect("embeds");
        let answer =
            engine.complete(demo::with_logprobs(Request::tokens(Rng(5).prompt(40)).max_tokens(8).temperature(0.0)));
        (made.embeddings.iter().map(bits).collect::<Vec<_>>(), demo::fingerprint(&answer.expect("runs")))
    };
    let (vectors, answer) = vectors_and_answer(None);
    let (int8_vectors, int8_answer) = vectors_and_answer(Some(KvDtype::Int8));
    assert_eq!(vectors, int8_vectors);
    assert_ne!(answer.logprob_bits, int8_answer.logprob_bits);
    assert_ne!(vectors, vectors_and_answer(Some(KvDtype::Bf16)).0, "other types are used as asked");
}

/// A generation's tokens are the same with and without embeddings between its steps; both make progress.
#[test]
fn generation_does_not_notice() {
    let engine = demo::open(|_| ());
    let request = || Request::tokens(Rng(5).prompt(40)).max_tokens(80).seed(9);
    let quiet = engine.complete(request()).expect("runs").choices[0].token_ids.clone();
    let mut stream = engine.submit(request()).expect("submits");
    let mut ids = Vec::new();
    let mut embedded = 0;
    while let Some(event) = stream.next_event() {
        if let Event::Delta(delta) = event.expect("no error") {
            ids.extend(delta.token_ids);
            if ids.len() < 60 {
                embedded += engine.embed(EmbeddingRequest::new(inputs(3))).expect("embeds").embeddings.len();
            }
        }
    }
    assert_eq!(ids, quiet);
    assert!(embedded >= 3, "embeddings ran between the steps");
}

/// The vectors are those of the model in double precision.
#[test]
fn vectors_are_right() {
    let inputs = inputs(6);
    let sequences: Vec<&[u32]> = inputs.iter().map(Vec::as_slice).collect();
    let mut reference = DirectRun::open(&demo::path(), Reference, KvDtype::F32, 16).expect("loads");
    let options = CpuBackendOptions { threads: 2, priority: ThreadPriority::Normal, weights: WeightFormat::F32 };
    let cpu = CpuBackend::new(options).expect("starts");
    let mut cpu = DirectRun::open(&demo::path(), cpu, KvDtype::F32, 16).expect("loads");
    let expected = reference.encode(&sequences, Pooling::Mean).expect("runs");
    let actual = cpu.encode(&sequences, Pooling::Mean).expect("runs");
    for (expected, actual) in expected.iter().zip(&actual) {
        let cosine = dot(expected, actual) / (dot(expected, expected) * dot(actual, actual)).sqrt();
        assert!(cosine > 0.999_999, "{cosine}");
    }
}

/// Unit length by default, cut dimensions are scaled again, long inputs are cut and say so, or refused when asked to.
#[test]
fn forms_of_a_vector() {
    let engine = demo::open(|_| ());
    let info = engine.info().clone();
    assert_eq!(info.max_embedding_tokens, 512);
    let long = Rng(8).prompt(600);
    let whole = engine.embed(EmbeddingRequest::new([long.clone()])).expect("is cut");
    let cut = engine.embed(EmbeddingRequest::new([long[..512].to_vec()])).expect("fits");
    assert_eq!(bits(&whole.embeddings[0]), bits(&cut.embeddings[0]));
    assert!(whole.embeddings[0].truncated && !cut.embeddings[0].truncated);
    assert_eq!((whole.embeddings[0].tokens, whole.summary.usage.prompt_tokens), (512, 512));
    assert_eq!(whole.embeddings[0].values.len(), info.embedding_dimensions);
    assert!((dot(&whole.embeddings[0].values, &whole.embeddings[0].values) - 1.0).abs() < 1e-6);
    let mut request = EmbeddingRequest::new([long.clone()]);
    request.dimensions = Some(16);
    let short = &engine.embed(request.clone()).expect("embeds").embeddings[0];
    assert!(short.values.len() == 16 && (dot(&short.values, &short.values) - 1.0).abs() < 1e-6);
    request.normalize = false;
    let plain = &engine.embed(request).expect("embeds").embeddings[0];
    let cosine = dot(&plain.values, &short.values) / dot(&plain.values, &plain.values).sqrt();
    assert!((cosine - 1.0).abs() < 1e-6 && dot(&plain.values, &plain.values) > 1.5);
    let mut strict = EmbeddingRequest::new([long]);
    strict.truncate = false;
    assert!(matches!(engine.embed(strict), Err(Error::PromptTooLong { prompt_tokens: 600, limit_tokens: 512, .. })));
}

/// A step has room for as many inputs as its budgets allow, whichever of the two counts: short inputs by the hundred,
/// beside a generation, with a budget for mixed steps above the one for prompts.
#[test]
fn many_short_inputs_beside_a_generation() {
    let engine = demo::open(|options| (options.prefill_budget_tokens, options.mixed_budget_tokens) = (16, 4096));
    let mut story = Request::tokens(Rng(5).prompt(20)).max_tokens(1900);
    story.ignore_eos = true;
    let mut story = engine.submit(story).expect("submits");
    assert!(matches!(story.next_event(), Some(Ok(Event::Delta(_)))), "it decodes");
    let inputs: Vec<_> = (0..600).map(|i| vec![i % 50 + 1]).collect();
    assert_eq!(engine.embed(EmbeddingRequest::new(inputs)).expect("embeds").embeddings.len(), 600);
    assert!(engine.stats().num_sequences_running > 0, "the generation still runs");
}

/// Each bad request has its typed error, and the next good one works.
#[test]
fn bad_requests_are_typed_errors() {
    let engine = demo::open(|_| ());
    let vocab = engine.info().vocab_size as u32;
    let refused = |request: EmbeddingRequest| match engine.embed(request) {
        Err(Error::InvalidArgument { field, .. }) => field,
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(EmbeddingRequest::new([vec![1, vocab]])), "input");
    assert_eq!(refused(EmbeddingRequest::new([Vec::<u32>::new()])), "input");
    assert_eq!(refused(EmbeddingRequest::new([""])), "input");
    let mut wide = EmbeddingRequest::new(["x"]);
    wide.dimensions = Some(engine.info().embedding_dimensions + 1);
    assert_eq!(refused(wide), "dimensions");
    assert_eq!(engine.embed(EmbeddingRequest::new(["still here"])).expect("works").embeddings.len(), 1);
}

/// A dropped stream ends its work, a deadline passes by name, and a better class goes first.
#[test]
fn cancel_deadline_and_priority() {
    let engine = demo::open(|options| options.threads = Some(1));
    let many = || EmbeddingRequest::new(vec![Rng(3).prompt(500); 64]);
    drop(engine.submit_embedding(many()).expect("submits"));
    let mut hurried = many();
    hurried.timeout_ms = Some(1);
    assert_eq!(engine.embed(hurried), Err(Error::DeadlineExceeded { timeout_ms: 1 }));
    let mut background = many();
    background.priority = Priority::Background;
    let background = engine.submit_embedding(background).expect("submits");
    let mut high = EmbeddingRequest::new(["quick"]);
    high.priority = Priority::High;
    engine.embed(high).expect("embeds");
    let computed = engine.stats().embedding_tokens_total;
    let vectors = background.filter(|event| matches!(event, Ok(Event::Embedding { .. }))).count();
    assert_eq!(vectors, 64);
    assert!(engine.stats().embedding_tokens_total > computed, "the better class did not wait for the other");
    let stats = engine.stats();
    assert!(stats.requests_cancelled + stats.requests_refused >= 1, "{stats:?}");
    assert_eq!(stats.num_sequences_waiting, 0);
}

/// A model that only makes vectors keeps nothing for later: what is given for that is checked, and then nobody is asked, no
/// thread waits for anybody and no weight is hashed.
#[test]
fn encoder_uses_no_shared_store() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.set_nonblocking(true).expect("a socket");
    let url = format!("redis://{}", listener.local_addr().expect("bound"));
    let folder = tiny_encoder();
    let options = |url: &str| {
        let options = EngineOptions::new(folder.path()).threads(1);
        options.kv_remote(KvRemoteOptions::new(url)).response_cache_bytes(1 << 20)
    };
    let refused = Engine::open(options("http://elsewhere")).err().expect("no such store");
    assert!(matches!(refused, Error::InvalidArgument { field: "kv_remote_url", .. }), "{refused}");
    let engine = Engine::open(options(&url)).expect("opens");
    assert_eq!(engine.embed(EmbeddingRequest::new([vec![1, 2, 3]])).expect("embeds").embeddings.len(), 1);
    assert_eq!(engine.stats().kv_tiers, []);
    engine.flush().expect("nothing to store");
    drop(engine);
    assert!(listener.accept().is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock), "somebody came");
}

fn tiny_encoder() -> TempFolder {
    let config = json!({
        "architectures": ["BertModel"], "vocab_size": 70, "hidden_size": 96, "intermediate_size": 256,
        "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64, "type_vocab_size": 2,
    });
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let tokenizer = json!({
        "version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": byte_level, "post_processor": null,
        "decoder": byte_level, "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
    });
    let folder = TempFolder::new("tiny-encoder");
    folder.write("tokenizer.json", tokenizer.to_string());
    write_model(&folder, &config, Dtype::F32, 1);
    folder
}
