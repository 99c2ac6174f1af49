//! Promise: a vocabulary in a GGUF file gives the ids of the `tokenizer.json` that it was made from, for every kind of
//! vocabulary and every way of cutting words, in many languages, code, emoji, control characters and runs of spaces.
//!
//! The originals are small vocabularies that the test trains, with the cutting that published tokenizers of each name
//! have (`golden/pre_tokenizers.json`); files are written as converters do.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use ns_llm::loader::ModelSource;
use ns_llm::tokenizer::{Tokenizer, TokenizerConfig};
use safetensors::Dtype;
use serde_json::{Value as Json, json};
use tokenizers::AddedToken;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::BpeTrainer;
use tokenizers::models::wordpiece::WordPieceTrainer;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

use crate::demo::Rng;
use crate::gguf_file::{GgufFile, Value, converted};
use crate::tiny_model::{TempFolder, small_config, weights};

/// Numbers of the format for what a token is for.
const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
const BYTE: i32 = 6;

fn golden(name: &str) -> Json {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    serde_json::from_slice(&std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))).unwrap()
}

/// Texts of the golden file, and seeded mixtures of pieces of words in all their languages, marks and spaces.
fn texts() -> Vec<String> {
    let golden = golden("text_vectors.json");
    let rows = golden["demo"].as_array().unwrap();
    let mut texts: Vec<String> = rows.iter().map(|row| row["text"].as_str().unwrap().to_string()).collect();
    let of_words = |text: &String| text.split(' ').map(str::to_string).collect::<Vec<_>>();
    let mut pieces: Vec<String> = texts.iter().filter(|text| text.len() < 200).flat_map(of_words).collect();
    pieces.extend(
        [
            " ",
            "  ",
            "\n",
            "\r\n",
            "\n\n \n",
            "\t",
            "\u{A0}",
            "\u{3000}",
            "'LL",
            "n't",
            "12345",
            "½Ⅷ٣",
            "a\u{301}\u{323}",
        ]
        .map(str::to_string),
    );
    pieces.extend(
        [
            "camelCaseHTTPServer",
            "\u{1F468}\u{200D}\u{1F469}",
            "。、！？",
            "«—»",
            "$+<=>^~|",
            "İı",
            "ǅ",
            "\u{FFFD}",
            "\u{AD}",
        ]
        .map(str::to_string),
    );
    let mut rng = Rng(11);
    for _ in 0..1_000 {
        let separator = ["", " "][rng.below(2)];
        let chosen: Vec<&str> = (0..1 + rng.below(10)).map(|_| pieces[rng.below(pieces.len())].as_str()).collect();
        texts.push(chosen.join(separator));
    }
    texts
}

/// Trains the empty vocabulary of `tokenizer_json` on the texts. Returns the whole file.
fn trained(tokenizer_json: &Json, trainer: TrainerWrapper) -> Json {
    let mut tokenizer = tokenizers::Tokenizer::from_bytes(tokenizer_json.to_string()).unwrap();
    tokenizer.train(&mut { trainer }, texts().into_iter()).unwrap();
    serde_json::from_str(&tokenizer.to_string(false).unwrap()).unwrap()
}

fn special(texts: &[&str]) -> Vec<AddedToken> {
    texts.iter().map(|text| AddedToken::from(text.to_string(), true)).collect()
}

/// Texts and types of all tokens, in the order of their ids, as converters take them from `tokenizer.json`.
fn tokens_and_types(original: &Json) -> (Vec<String>, Vec<i32>) {
    let vocab = original["model"]["vocab"].as_object().unwrap();
    let mut tokens = vec![String::new(); vocab.len()];
    vocab.iter().for_each(|(token, id)| tokens[id.as_u64().unwrap() as usize] = token.clone());
    let added = original["added_tokens"].as_array().unwrap().iter();
    let controls: HashMap<u64, i32> = added.map(|token| (token["id"].as_u64().unwrap(), CONTROL)).collect();
    let types = (0..).map(|id| controls.get(&id).copied().unwrap_or(NORMAL)).take(tokens.len()).collect();
    (tokens, types)
}

/// A file with this vocabulary, around a small model.
fn file_with(kind: &str, tokens: &[String], types: &[i32]) -> GgufFile {
    let mut file = converted(&small_config(), &weights(&small_config(), Dtype::F32));
    for key in ["pre", "merges", "eos_token_id"] {
        file.remove(&format!("tokenizer.ggml.{key}"));
    }
    file.set("tokenizer.ggml.model", Value::string(kind));
    file.set("tokenizer.ggml.tokens", Value::strings(tokens));
    file.set("tokenizer.ggml.token_type", Value::i32s(types));
    file
}

fn tokenizer_of(file: &GgufFile) -> Tokenizer {
    let folder = TempFolder::new("gguf-tokenizers");
    folder.write("model.gguf", file.bytes());
    let source = ModelSource::open(&folder.path().join("model.gguf")).unwrap();
    let config = TokenizerConfig::parse(&source.tokenizer_config().unwrap().unwrap().into_value()).unwrap();
    Tokenizer::from_json(&source.tokenizer().unwrap().json().unwrap(), &config).unwrap_or_else(|e| panic!("{e}"))
}

/// Both give the same ids for every text, as it is and with special tokens as plain text, and the same text for them.
/// Returns how many different ids there were.
fn check(name: &str, original: &Json, converted: &Tokenizer) -> usize {
    let original = Tokenizer::from_json(original.to_string().as_bytes(), &TokenizerConfig::default()).unwrap();
    assert!(converted.special_tokens().eq(original.special_tokens()), "{name}");
    let mut seen = HashSet::new();
    for text in texts() {
        let ids = original.encode(&text, true).unwrap();
        assert_eq!(converted.encode(&text, true).unwrap(), ids, "{name}: {text:?}");
        assert_eq!(converted.encode_plain(&text).unwrap(), original.encode_plain(&text).unwrap(), "{name}: {text:?}");
        assert_eq!(converted.decode(&ids, false), original.decode(&ids, false), "{name}: {text:?}");
        assert_eq!(converted.decode(&ids, true), original.decode(&ids, true), "{name}: {text:?}");
        seen.extend(ids);
    }
    seen.len()
}

/// Byte-level vocabularies of each name that is known, against the published way of cutting of that name. No two of
/// them give the same ids for all texts: a name that was taken for another would be seen.
#[test]
fn byte_level_vocabularies_give_the_same_tokens() {
    let published = golden("pre_tokenizers.json");
    let some_texts = &texts()[..200];
    let mut cuts = HashMap::new();
    for (name, rules) in published.as_object().unwrap() {
        let byte_level =
            json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
        let empty = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
            "normalizer": rules["normalizer"], "pre_tokenizer": rules["pre_tokenizer"], "post_processor": null,
            "decoder": byte_level,
            "model": {"type": "BPE", "ignore_merges": rules["ignore_merges"], "vocab": {}, "merges": []},
        });
        let trainer = BpeTrainer::builder()
            .vocab_size(900)
            .show_progress(false)
            .special_tokens(special(&["<|endoftext|>", "<|im_start|>", "<|im_end|>"]))
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect());
        let original = trained(&empty, TrainerWrapper::BpeTrainer(trainer.build()));
        let (tokens, types) = tokens_and_types(&original);
        assert!(tokens.len() > 800, "{name}: {} tokens", tokens.len());
        let mut file = file_with("gpt2", &tokens, &types);
        let merge = |pair: &Json| format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap());
        let merges: Vec<String> = original["model"]["merges"].as_array().unwrap().iter().map(merge).collect();
        file.set("tokenizer.ggml.merges", Value::strings(&merges));
        file.set("tokenizer.ggml.pre", Value::string(name));
        let converted = tokenizer_of(&file);
        let seen = check(name, &original, &converted);
        assert!(seen > 250, "{name}: {seen} ids seen");
        // Under another name the same vocabulary cuts otherwise.
        for other in published.as_object().unwrap().keys().filter(|other| *other != name) {
            file.set("tokenizer.ggml.pre", Value::string(other));
            let other_tokenizer = tokenizer_of(&file);
            let ids = |tokenizer: &Tokenizer, text: &str| tokenizer.encode(text, true).unwrap();
            let differ = some_texts.iter().filter(|text| ids(&converted, text) != ids(&other_tokenizer, text)).count();
            cuts.insert((name.clone(), other.clone()), differ);
        }
    }
    assert_eq!(cuts.len(), 7 * 6);
    // Where one cuts less than another, its words hold the other's tokens; the other way round that shows.
    let either = |a: &String, b: &String| cuts[&(a.clone(), b.clone())] + cuts[&(b.clone(), a.clone())];
    assert!(cuts.keys().all(|(a, b)| either(a, b) > 0), "{cuts:?}");
}

/// Vocabularies with scores, with the file's own word on the space before a text.
#[test]
fn scored_vocabularies_give_the_same_tokens() {
    for add_space_prefix in [true, false] {
        let mut original = golden("sentencepiece.json");
        if !add_space_prefix {
            original["normalizer"]["normalizers"].as_array_mut().unwrap().remove(0);
            original["decoder"]["decoders"].as_array_mut().unwrap().pop();
        }
        let (tokens, mut types) = tokens_and_types(&original);
        for (token, kind) in tokens.iter().zip(&mut types).filter(|(token, _)| token.starts_with("<0x")) {
            assert_eq!(token.len(), 6);
            *kind = BYTE;
        }
        types[0] = 2;
        let mut file = file_with("llama", &tokens, &types);
        let scores: Vec<f32> = (0..tokens.len()).map(|id| -(id as f32)).collect();
        file.set("tokenizer.ggml.scores", Value::f32s(&scores));
        file.set("tokenizer.ggml.add_space_prefix", Value::bool(add_space_prefix));
        for (key, id) in [("unknown", 0), ("bos", 1), ("eos", 2)] {
            file.set(&format!("tokenizer.ggml.{key}_token_id"), Value::u32(id));
        }
        let seen = check("llama", &original, &tokenizer_of(&file));
        assert!(seen > 200, "{seen} ids seen");
    }
}

/// As `tokenizer.json` of BERT has it, with an empty vocabulary.
fn word_piece(lowercase: bool, strip_accents: Json) -> Json {
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
                       "strip_accents": strip_accents, "lowercase": lowercase},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": null,
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                  "max_input_chars_per_word": 100, "vocab": {}},
    })
}

/// As the format writes a piece: what begins a word is marked instead of what goes on.
fn phantom_spaces(tokens: &[String], types: &[i32]) -> Vec<String> {
    let piece = |(token, kind): (&String, &i32)| match token.strip_prefix("##") {
        _ if *kind == CONTROL => token.clone(),
        Some(rest) => rest.to_string(),
        None => format!("\u{2581}{token}"),
    };
    tokens.iter().zip(types).map(piece).collect()
}

/// Word pieces with and without capitals and accents, around which go [CLS] and [SEP]; a word that cannot be put
/// together is unknown.
#[test]
fn word_pieces_give_the_same_tokens() {
    let mut vectors = HashSet::new();
    for (lowercase, strip_accents) in
        [(true, Json::Null), (false, Json::Null), (true, json!(false)), (false, json!(true))]
    {
        let trainer = WordPieceTrainer::builder()
            .vocab_size(900)
            .show_progress(false)
            .min_frequency(0)
            .special_tokens(special(&["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused0]"]))
            .continuing_subword_prefix("##".to_string());
        let trained =
            trained(&word_piece(lowercase, strip_accents.clone()), TrainerWrapper::WordPieceTrainer(trainer.build()));
        let mut original = trained.clone();
        original["post_processor"] = json!({"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]});
        // Published vocabularies have such places, which are no special tokens.
        original["added_tokens"].as_array_mut().unwrap().retain(|token| token["content"] != "[unused0]");
        // Some word must be unknown.
        original["model"]["vocab"].as_object_mut().unwrap().remove("狐");
        let (mut tokens, types) = tokens_and_types_with_gap(&original);
        let id = |token: &str| tokens.iter().position(|other| other == token).unwrap() as u32;
        let ids =
            [("cls", id("[CLS]")), ("seperator", id("[SEP]")), ("unknown", id("[UNK]")), ("padding", id("[PAD]"))];
        tokens = phantom_spaces(&tokens, &types);
        let mut file = file_with("bert", &tokens, &types);
        ids.iter().for_each(|(key, id)| file.set(&format!("tokenizer.ggml.{key}_token_id"), Value::u32(*id)));
        if !lowercase {
            file.set("tokenizer.ggml.normalizer.lowercase", Value::bool(false));
        }
        if let Some(strip_accents) = strip_accents.as_bool() {
            file.set("tokenizer.ggml.normalizer.strip_accents", Value::bool(strip_accents));
        }
        let converted = tokenizer_of(&file);
        let name = format!("bert, {lowercase}, {strip_accents}");
        let seen = check(&name, &original, &converted);
        assert!(seen > 250, "{name}: {seen} ids seen");
        let ids = converted.encode("Déjà vu 狐 [unused0] [MASK]", true).unwrap();
        assert!(ids.first() == Some(&2) && ids.last() == Some(&3) && ids.contains(&1) && ids.contains(&4), "{ids:?}");
        assert!(!ids.contains(&5), "{ids:?}");
        let long = format!("{} {}", "a".repeat(100), "a".repeat(101));
        assert_eq!(*converted.encode(&long, false).unwrap().last().unwrap(), 1, "a word of 101 characters is unknown");
        vectors.insert(tokens);
    }
    assert_eq!(vectors.len(), 4, "each choice trains another vocabulary");
}

/// As [`tokens_and_types`]; an id without a token is said to be unused, with the text that converters give it.
fn tokens_and_types_with_gap(original: &Json) -> (Vec<String>, Vec<i32>) {
    let mut filled = original.clone();
    let vocab = filled["model"]["vocab"].as_object_mut().unwrap();
    let used: HashSet<u64> = vocab.values().map(|id| id.as_u64().unwrap()).collect();
    let gaps: Vec<u64> = (0..=*used.iter().max().unwrap()).filter(|id| !used.contains(id)).collect();
    vocab.extend(gaps.iter().map(|id| (format!("[PAD{id}]"), json!(id))));
    let (tokens, mut types) = tokens_and_types(&filled);
    gaps.iter().for_each(|&id| types[id as usize] = 5);
    (tokens, types)
}

/// Older files do not say which tokens are special and name none by its id; the places of the published vocabularies
/// and the brackets tell. A file in which these places hold no token is refused with the key that would say more.
#[test]
fn older_word_pieces_are_read() {
    let mut tokens: Vec<String> = (0..104).map(|id| format!("[unused{id}]")).collect();
    for (id, token) in [(0, "[PAD]"), (100, "[UNK]"), (101, "[CLS]"), (102, "[SEP]"), (103, "[MASK]")] {
        tokens[id] = token.to_string();
    }
    tokens.extend(["\u{2581}the", "\u{2581}fox", "es", "\u{2581}[", "]", "\u{2581}\u{2581}"].map(str::to_string));
    let mut file = file_with("bert", &tokens, &[]);
    file.remove("tokenizer.ggml.token_type");
    let tokenizer = tokenizer_of(&file);
    assert_eq!(tokenizer.encode("The foxes [ cat", true).unwrap(), [101, 104, 105, 106, 107, 100, 102]);
    assert_eq!(tokenizer.decode(&[104, 105, 106], true), "the foxes");
    file.set("tokenizer.ggml.tokens", Value::strings(&tokens[..100]));
    let folder = TempFolder::new("gguf-tokenizers");
    folder.write("model.gguf", file.bytes());
    let source = ModelSource::open(&folder.path().join("model.gguf")).unwrap();
    let refused = source.tokenizer().unwrap().json().unwrap_err().to_string();
    assert!(
        refused.contains("`tokenizer.ggml.cls_token_id`: is missing, and its default, 101, is no token"),
        "{refused}"
    );
}

/// What text becomes is known by the keys that say it, and by no others.
#[test]
fn tokenizers_are_known_by_their_keys() {
    let identity = |change: &dyn Fn(&mut GgufFile)| {
        let mut file = converted(&small_config(), &weights(&small_config(), Dtype::F32));
        change(&mut file);
        let folder = TempFolder::new("gguf-tokenizers");
        folder.write("model.gguf", file.bytes());
        let source = ModelSource::open(&folder.path().join("model.gguf")).unwrap();
        source.tokenizer().unwrap().identity_bytes().into_owned()
    };
    let same = identity(&|_| ());
    assert_eq!(identity(&|file| file.set("general.name", Value::string("another"))), same);
    let mut seen = HashSet::from([same]);
    let changes: [&dyn Fn(&mut GgufFile); 5] = [
        &|file| file.set("tokenizer.ggml.pre", Value::string("qwen2")),
        &|file| file.set("tokenizer.ggml.merges", Value::strings(&["d c"])),
        &|file| file.set("tokenizer.ggml.token_type", Value::i32s(&[NORMAL, CONTROL])),
        &|file| file.set("tokenizer.ggml.add_space_prefix", Value::bool(false)),
        &|file| file.remove("tokenizer.ggml.merges"),
    ];
    for (idx, change) in changes.into_iter().enumerate() {
        assert!(seen.insert(identity(change)), "change {idx} shows");
    }
}

/// Tokens that are all substrings of one text can be put together in more ways than memory has room for: refused by the
/// key and the limit.
#[test]
fn merges_that_follow_from_scores_are_bounded() {
    let mut rng = Rng(7);
    let text: String = (0..400).map(|_| char::from(b'a' + rng.below(26) as u8)).collect();
    let ends = |from: usize| from + 1..=text.len().min(from + 256);
    let tokens: HashSet<&str> = (0..text.len())
        .flat_map(|from| ends(from).map(move |to| (from, to)))
        .map(|(from, to)| &text[from..to])
        .collect();
    let tokens: Vec<String> = tokens.into_iter().map(str::to_string).collect();
    let mut file = file_with("llama", &tokens, &vec![NORMAL; tokens.len()]);
    file.set("tokenizer.ggml.scores", Value::f32s(&vec![0.0; tokens.len()]));
    let folder = TempFolder::new("gguf-tokenizers");
    folder.write("model.gguf", file.bytes());
    let source = ModelSource::open(&folder.path().join("model.gguf")).unwrap();
    let refused = source.tokenizer().unwrap().json().unwrap_err().to_string();
    assert!(refused.contains("`tokenizer.ggml.tokens`: has more than 4194304 ways"), "{refused}");
}
