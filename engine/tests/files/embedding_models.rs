//! Promise: a folder of an encoder, as sentence-transformers writes it or without its files, opens as an engine that
//! embeds: as its files say, with the same bits for an input whatever is computed beside it, and that refuses to
//! generate. A decoder in such a folder is pooled as the folder says.

use ns_llm::inspect::inspect;
use ns_llm::{Embedding, EmbeddingRequest, Engine, EngineOptions, Error, Request, Result};
use safetensors::Dtype;
use serde_json::{Value, json};

use crate::tiny_model::{TempFolder, small_config, write_model};

const CLS: u32 = 1;
const SEP: u32 = 2;
const UNKNOWN: u32 = 3;

const WORDS: [&str; 18] = [
    "[PAD]", "[CLS]", "[SEP]", "[UNK]", "the", "fox", "jump", "##s", "##ed", "over", "a", "dog", ",", ".", "!", "cafe",
    "狐", "quick",
];

fn bert_config() -> Value {
    json!({
        "architectures": ["BertModel"], "model_type": "bert", "vocab_size": 96, "hidden_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 64,
        "hidden_act": "gelu", "type_vocab_size": 2, "layer_norm_eps": 1e-12, "pad_token_id": 0,
    })
}

/// A tokenizer of BERT's kind, with the padding and cutting that the files of published models carry.
fn word_piece(post_processor: Value) -> Value {
    let special = |id: usize| {
        json!({"id": id, "content": WORDS[id], "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    let vocab: serde_json::Map<_, _> =
        WORDS.iter().enumerate().map(|(id, word)| (word.to_string(), json!(id))).collect();
    json!({
        "version": "1.0",
        "truncation": {"max_length": 8, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
        "padding": {"strategy": {"Fixed": 24}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
                    "pad_type_id": 0, "pad_token": "[PAD]"},
        "added_tokens": (0..4).map(special).collect::<Vec<_>>(),
        "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
                       "strip_accents": null, "lowercase": true},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": post_processor,
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                  "max_input_chars_per_word": 100, "vocab": vocab},
    })
}

fn template() -> Value {
    let piece = |id: &str| json!({"SpecialToken": {"id": id, "type_id": 0}});
    let token = |id: usize| json!({"id": WORDS[id], "ids": [id], "tokens": [WORDS[id]]});
    let text = |id: &str, type_id: usize| json!({"Sequence": {"id": id, "type_id": type_id}});
    json!({
        "type": "TemplateProcessing",
        "single": [piece("[CLS]"), text("A", 0), piece("[SEP]")],
        "pair": [piece("[CLS]"), text("A", 0), piece("[SEP]"), text("B", 1), piece("[SEP]")],
        "special_tokens": {"[CLS]": token(1), "[SEP]": token(2)},
    })
}

fn bert_folder() -> TempFolder {
    let folder = TempFolder::new("bert");
    write_model(&folder, &bert_config(), Dtype::F32, 1);
    folder.write("tokenizer.json", word_piece(template()).to_string());
    folder
}

/// The files of sentence-transformers, with this switch of the pooling on.
fn add_sentence_files(folder: &TempFolder, mode: &str, max_seq_length: usize) {
    let module = |idx: usize, path: &str, kind: &str| json!({"idx": idx, "name": idx.to_string(), "path": path, "type": format!("sentence_transformers.models.{kind}")});
    let modules =
        [module(0, "", "Transformer"), module(1, "1_Pooling", "Pooling"), module(2, "2_Normalize", "Normalize")];
    folder.write("modules.json", json!(modules).to_string());
    let sizes = json!({"max_seq_length": max_seq_length, "do_lower_case": false});
    folder.write("sentence_bert_config.json", sizes.to_string());
    std::fs::create_dir_all(folder.path().join("1_Pooling")).expect("writable");
    let mut pooling = json!({
        "word_embedding_dimension": 32, "pooling_mode_cls_token": false, "pooling_mode_mean_tokens": false,
        "pooling_mode_max_tokens": false, "pooling_mode_mean_sqrt_len_tokens": false, "pooling_mode_lasttoken": false,
    });
    pooling[mode] = json!(true);
    folder.write("1_Pooling/config.json", pooling.to_string());
}

fn open(folder: &TempFolder, threads: usize) -> Result<Engine> {
    Engine::open(EngineOptions::new(folder.path()).threads(threads))
}

fn bits(embedding: &Embedding) -> Vec<u32> {
    embedding.values.iter().map(|value| value.to_bits()).collect()
}

fn embed_ids(engine: &Engine, ids: &[u32]) -> Embedding {
    engine.embed(EmbeddingRequest::new([ids.to_vec()])).expect("embeds").embeddings.remove(0)
}

fn inputs(count: usize) -> Vec<Vec<u32>> {
    let id = |i: usize, position: usize| ((i * 31 + position * position * 7 + position) % 96) as u32;
    (0..count).map(|i| (0..1 + (i * 29) % 64).map(|position| id(i, position)).collect()).collect()
}

/// The vector of an input has the same bits alone and among 15 others, with 1 to 3 threads; others are other vectors.
#[test]
fn vectors_of_an_encoder_depend_on_their_input_alone() {
    let folder = bert_folder();
    let inputs = inputs(16);
    let engine = open(&folder, 1).expect("opens");
    let alone: Vec<_> = inputs.iter().map(|ids| bits(&embed_ids(&engine, ids))).collect();
    assert!((1..16).all(|i| alone[i] != alone[i - 1]), "different inputs, one vector");
    for threads in 1..=3 {
        let engine = open(&folder, threads).expect("opens");
        let together = engine.embed(EmbeddingRequest::new(inputs.clone())).expect("embeds");
        assert_eq!(together.embeddings.iter().map(bits).collect::<Vec<_>>(), alone, "{threads} threads");
        let tokens: usize = inputs.iter().map(Vec::len).sum();
        assert_eq!(together.summary.usage.prompt_tokens, tokens);
        assert_eq!(engine.stats().embedding_tokens_total, tokens as u64);
    }
}

/// A later word changes the state of an earlier one: attention goes both ways. Shown with the pooling that takes the
/// first state; a decoder's does not change.
#[test]
fn an_encoder_looks_ahead_and_a_decoder_does_not() {
    let encoder = bert_folder();
    add_sentence_files(&encoder, "pooling_mode_cls_token", 64);
    let decoder = TempFolder::new("decoder");
    write_model(&decoder, &small_config(), Dtype::F32, 1);
    decoder.write("tokenizer.json", word_piece(Value::Null).to_string());
    add_sentence_files(&decoder, "pooling_mode_cls_token", 64);
    for (folder, looks_ahead) in [(encoder, true), (decoder, false)] {
        let engine = open(&folder, 1).expect("opens");
        let (a, b) = (embed_ids(&engine, &[CLS, 4, 5, 6]), embed_ids(&engine, &[CLS, 4, 5, 7]));
        assert_eq!(bits(&a) != bits(&b), looks_ahead);
    }
}

/// An encoder's engine says what it is, needs no pool, and refuses to generate with a typed error; then it still embeds.
#[test]
fn an_encoder_does_not_generate() {
    let engine = open(&bert_folder(), 1).expect("opens");
    let info = engine.info();
    assert_eq!((info.architecture.as_str(), info.can_generate), ("BertModel", false));
    assert_eq!((info.embedding_dimensions, info.max_embedding_tokens, info.context_tokens), (32, 64, 64));
    assert_eq!(engine.stats().kv_blocks_total, 1);
    for request in [Request::prompt("the fox"), Request::tokens([CLS, 5, SEP])] {
        let refused = engine.generate(request).map(drop);
        assert!(
            matches!(&refused, Err(Error::NotSupported { feature: "generate text", architecture }) if architecture == "BertModel"),
            "{refused:?}"
        );
    }
    assert_eq!(embed_ids(&engine, &[CLS, 5, SEP]).values.len(), 32);
}

/// Texts become BERT's tokens: lower case, accents off, punctuation and ideographs apart, word pieces, [CLS] and [SEP]
/// around them, whichever post-processor says so; what the file says of padding and cutting is not followed.
#[test]
fn texts_become_word_pieces() {
    let bert_processing = json!({"type": "BertProcessing", "sep": ["[SEP]", 2], "cls": ["[CLS]", 1]});
    for post_processor in [template(), bert_processing] {
        let folder = bert_folder();
        folder.write("tokenizer.json", word_piece(post_processor).to_string());
        let engine = open(&folder, 1).expect("opens");
        let ids = engine.tokenize("The fox JUMPED over a Café, 狐狐 zebra!", true).expect("encodes");
        assert_eq!(ids, [CLS, 4, 5, 6, 8, 9, 10, 15, 12, 16, 16, UNKNOWN, 14, SEP]);
        assert_eq!(engine.detokenize(&ids[1..9]).expect("decodes"), "the fox jumped over a cafe,");
        let text = engine.embed(EmbeddingRequest::new(["The fox jumps."])).expect("embeds").embeddings.remove(0);
        assert_eq!((text.tokens, text.truncated), (7, false));
        assert_eq!(bits(&text), bits(&embed_ids(&engine, &[CLS, 4, 5, 6, 7, 13, SEP])));
        // Nothing but what goes around it is a text too.
        assert_eq!(engine.embed(EmbeddingRequest::new([""])).expect("embeds").embeddings[0].tokens, 2);
    }
}

/// A long text is cut inside of [CLS] and [SEP], to the shorter of the folder's length and the model's, or refused when
/// it may not be cut.
#[test]
fn long_texts_are_cut_inside_their_frame() {
    for (max_seq_length, limit) in [(10, 10), (64, 64), (512, 64)] {
        let folder = bert_folder();
        add_sentence_files(&folder, "pooling_mode_mean_tokens", max_seq_length);
        let engine = open(&folder, 1).expect("opens");
        assert_eq!(engine.info().max_embedding_tokens, limit);
        let text = "fox dog ".repeat(50);
        let cut = engine.embed(EmbeddingRequest::new([text.as_str()])).expect("is cut").embeddings.remove(0);
        assert_eq!((cut.tokens, cut.truncated), (limit, true));
        let inside = [5, 11].into_iter().cycle().take(limit - 2);
        let ids: Vec<u32> = [CLS].into_iter().chain(inside).chain([SEP]).collect();
        assert_eq!(bits(&cut), bits(&embed_ids(&engine, &ids)));
        let mut strict = EmbeddingRequest::new([text]);
        strict.truncate = false;
        let refused = engine.embed(strict);
        assert!(
            matches!(refused, Err(Error::PromptTooLong { prompt_tokens: 102, limit_tokens, .. }) if limit_tokens == limit)
        );
    }
}

/// The folder decides how states become a vector: the three poolings give three vectors, a folder without the files is
/// pooled by the mean; for an encoder and for a decoder.
#[test]
fn the_folder_decides_the_pooling() {
    let ids = [CLS, 4, 5, 6, 7, SEP];
    let bert = |folder: &TempFolder| {
        write_model(folder, &bert_config(), Dtype::F32, 1);
        folder.write("tokenizer.json", word_piece(template()).to_string());
    };
    let qwen3 = |folder: &TempFolder| {
        let mut config = small_config();
        config["architectures"] = json!(["Qwen3ForCausalLM"]);
        write_model(folder, &config, Dtype::F32, 1);
        folder.write("tokenizer.json", word_piece(Value::Null).to_string());
    };
    for write in [&bert as &dyn Fn(&TempFolder), &qwen3] {
        let vector = |mode: Option<&str>| {
            let folder = TempFolder::new("pooling");
            write(&folder);
            if let Some(mode) = mode {
                add_sentence_files(&folder, mode, 64);
            }
            bits(&embed_ids(&open(&folder, 1).expect("opens"), &ids))
        };
        let [mean, first, last] = ["pooling_mode_mean_tokens", "pooling_mode_cls_token", "pooling_mode_lasttoken"]
            .map(|mode| vector(Some(mode)));
        assert!(mean != first && first != last && last != mean);
        assert_eq!(vector(None), mean);
    }
}

/// Such a folder can be looked at without reading its weights.
#[test]
fn encoders_can_be_inspected() {
    let folder = bert_folder();
    add_sentence_files(&folder, "pooling_mode_cls_token", 48);
    let inspection = inspect(&EngineOptions::new(folder.path())).expect("is looked at");
    assert_eq!((inspection.architecture.as_str(), inspection.plan.num_blocks), ("BertModel", 1));
    let value = |name: &str| inspection.hyperparameters.iter().find(|(other, _)| *other == name).expect(name).1.clone();
    assert_eq!(
        (value("pooling"), value("max_embedding_tokens"), value("rope")),
        ("cls".into(), "48".into(), "none".into())
    );
    assert!(inspection.special_tokens.contains(&"[CLS]".to_string()));
}
