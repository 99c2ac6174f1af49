//! Promise: a model with learned positions (GPT-2) generates and embeds as any other, with the same bits whatever runs
//! beside it, up to the last position that it has and no further.

use ns_llm::{EmbeddingRequest, Engine, EngineOptions, Error, FinishReason, Request};
use safetensors::Dtype;
use serde_json::json;

use crate::demo::{fingerprint, with_logprobs};
use crate::tiny_model::{TempFolder, write_model};

const POSITIONS: usize = 80;

fn folder() -> TempFolder {
    let folder = TempFolder::new("gpt2");
    let config = json!({
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 96, "n_embd": 48, "n_layer": 2,
        "n_head": 3, "n_positions": POSITIONS, "n_ctx": POSITIONS, "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5, "bos_token_id": 95, "eos_token_id": 95,
    });
    write_model(&folder, &config, Dtype::F32, 1);
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": byte_level, "post_processor": byte_level, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
    });
    folder.write("tokenizer.json", tokenizer.to_string());
    folder
}

fn open(folder: &TempFolder, change: impl FnOnce(&mut EngineOptions)) -> Engine {
    let mut options = EngineOptions::new(folder.path()).threads(1);
    change(&mut options);
    Engine::open(options).expect("opens")
}

fn requests() -> Vec<Request> {
    let prompt =
        |i: usize| (0..1 + i * 7).map(move |position| ((i * 31 + position * 17) % 95) as u32).collect::<Vec<_>>();
    (0..8).map(|i| with_logprobs(Request::tokens(prompt(i)).max_tokens(20).seed(i as u64).temperature(0.8))).collect()
}

/// Alone, all at once, in small chunks, with 1 to 3 threads: the same tokens and logprob bits, and the same vectors.
#[test]
fn answers_do_not_depend_on_what_runs_beside() {
    let folder = folder();
    let engine = open(&folder, |options| options.prefix_cache = false);
    let alone: Vec<_> =
        requests().into_iter().map(|request| fingerprint(&engine.complete(request).expect("runs"))).collect();
    let inputs = || EmbeddingRequest::new((1..9).map(|i| (0..i * 9).map(|id| id as u32).collect::<Vec<_>>()));
    let vectors = engine.embed(inputs()).expect("embeds").embeddings;
    assert!(vectors.iter().all(|vector| vector.values.len() == 48));
    for threads in 1..=3 {
        let engine = open(&folder, |options| {
            options.threads = Some(threads);
            (options.prefill_budget_tokens, options.mixed_budget_tokens) = (16, 16);
        });
        let streams: Vec<_> = requests().into_iter().map(|request| engine.submit(request).expect("submits")).collect();
        assert_eq!(engine.embed(inputs()).expect("embeds").embeddings, vectors, "{threads} threads");
        let ids = |stream: ns_llm::RequestStream| {
            stream.fold(Vec::new(), |mut ids, event| {
                if let ns_llm::Event::Delta(delta) = event.expect("no error") {
                    ids.extend(delta.token_ids);
                }
                ids
            })
        };
        for (stream, alone) in streams.into_iter().zip(&alone) {
            assert_eq!([ids(stream)], alone.token_ids.as_slice(), "{threads} threads");
        }
        for (request, alone) in requests().into_iter().zip(&alone) {
            assert_eq!(&fingerprint(&engine.complete(request).expect("runs")), alone, "{threads} threads, cached");
        }
        assert!(engine.stats().prefix_cache_hits_total > 0, "nothing came from the cache");
    }
}

/// The context is the table of positions: an answer ends with it, a longer prompt and a longer context are refused, a
/// longer text is cut to it.
#[test]
fn positions_end_where_the_table_does() {
    let folder = folder();
    let engine = open(&folder, |_| ());
    assert_eq!((engine.info().context_tokens, engine.info().max_embedding_tokens), (POSITIONS, POSITIONS));
    assert!(engine.info().can_generate);
    let mut request = Request::tokens(vec![7; 70]).max_tokens(1000).temperature(0.0);
    request.ignore_eos = true;
    let answer = engine.complete(request).expect("runs");
    assert_eq!(answer.choices[0].finish_reason, FinishReason::Length);
    // The last token is predicted from the last position and needs none of its own.
    let produced = answer.choices[0].token_ids.len();
    assert!(produced == POSITIONS - 70 || produced == POSITIONS - 70 + 1, "{produced}");
    let refused = engine.complete(Request::tokens(vec![7; POSITIONS + 1]).max_tokens(1));
    assert!(matches!(refused, Err(Error::PromptTooLong { .. })), "{refused:?}");
    let cut = engine.embed(EmbeddingRequest::new([vec![7; 300]])).expect("is cut").embeddings.remove(0);
    assert_eq!((cut.tokens, cut.truncated), (POSITIONS, true));
    let mut options = EngineOptions::new(folder.path());
    options.context_tokens = Some(POSITIONS + 1);
    let longer = Engine::open(options).map(drop);
    assert!(matches!(longer, Err(Error::InvalidArgument { field: "context_tokens", .. })));
}
