//! Text to ids and back agrees with Python's `tokenizers` (`golden/text_vectors.py` made the values), and a stream of
//! ids gives the same text as decoding them at once, whole characters at a time.

use std::path::Path;
use std::slice::from_ref;

use ns_llm::sampler::random_at;
use ns_llm::tokenizer::{StopStrings, TextDecoder, TextStart, TextStream, Tokenizer, TokenizerConfig};
use serde_json::Value;

fn read(path: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn read_json(path: &str) -> Value {
    serde_json::from_slice(&read(path)).expect("the repository's own JSON")
}

fn demo() -> Tokenizer {
    let config = TokenizerConfig::parse(&read_json("../models/demo/tokenizer_config.json")).unwrap();
    Tokenizer::from_json(&read("../models/demo/tokenizer.json"), &config).unwrap()
}

fn golden(name: &str) -> Tokenizer {
    Tokenizer::from_json(&read(&format!("tests/golden/{name}.json")), &TokenizerConfig::default()).unwrap()
}

/// Rows of one part of the golden file.
fn vectors(part: &str) -> Vec<Value> {
    let rows = read_json("tests/golden/text_vectors.json")[part].as_array().unwrap().clone();
    assert!(rows.len() >= 25, "only {} rows of {part}", rows.len());
    rows
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// Each text of the golden file, in many languages, code and emoji, has the ids that Python gives it, with special tokens
/// counting and as plain text, and comes back unchanged.
#[test]
fn demo_tokenizer_agrees_with_python() {
    let tokenizer = demo();
    let mut with_special = 0;
    for row in vectors("demo") {
        let text = row["text"].as_str().unwrap();
        let (expected, plain) = (ids(&row["ids"]), ids(&row["plain_ids"]));
        assert_eq!(tokenizer.encode(text, true).unwrap(), expected, "{text:?}");
        assert_eq!(tokenizer.encode_plain(text).unwrap(), plain, "plain {text:?}");
        assert_eq!(tokenizer.decode(&expected, true), row["decoded"].as_str().unwrap());
        assert_eq!(tokenizer.decode(&plain, true), text);
        assert_eq!(tokenizer.decode(&expected, false), text);
        with_special += usize::from(plain != expected);
    }
    assert_eq!(with_special, 2, "texts with special tokens in them");
}

/// Tokenizers that write spaces as a marker and unknown characters as bytes: ids, the frame around a prompt, and text
/// agree with Python, for both ways of putting a space before the text.
#[test]
fn sentencepiece_like_tokenizers_agree_with_python() {
    for name in ["sentencepiece", "metaspace"] {
        let tokenizer = golden(name);
        for row in vectors(name) {
            let text = row["text"].as_str().unwrap();
            let expected = ids(&row["ids"]);
            assert_eq!(tokenizer.encode(text, false).unwrap(), expected, "{name}: {text:?}");
            assert_eq!(tokenizer.encode(text, true).unwrap(), ids(&row["framed_ids"]), "{name}: {text:?}");
            assert_eq!(tokenizer.decode(&expected, true), row["decoded"].as_str().unwrap(), "{name}: {text:?}");
        }
    }
}

/// The configuration overrules what `tokenizer.json` puts around a prompt; a token it asks for must exist.
#[test]
fn configuration_decides_about_the_frame() {
    let file = read("tests/golden/sentencepiece.json");
    let with = |json: Value| Tokenizer::from_json(&file, &TokenizerConfig::parse(&json).unwrap());
    let encode = |json| with(json).unwrap().encode("hi", true).unwrap();
    let tokens = |add_bos, add_eos| {
        serde_json::json!({
            "add_bos_token": add_bos, "add_eos_token": add_eos, "bos_token": "<s>", "eos_token": {"content": "</s>"}
        })
    };
    let bare = encode(tokens(Some(false), None));
    assert_eq!(encode(tokens(None, None)), [&[1], &bare[..]].concat());
    assert_eq!(encode(tokens(Some(true), Some(true))), [&[1], &bare[..], &[2]].concat());
    assert_eq!(encode(tokens(Some(false), Some(false))), bare);
    let missing = with(serde_json::json!({"add_bos_token": true, "bos_token": "<none>"})).err().unwrap();
    assert_eq!(missing.code(), "config");
    assert!(missing.to_string().contains("`bos_token`"), "{missing}");
}

/// For each prompt of the reference the ids are the reference's, and its answer's ids have the reference's text.
#[test]
fn reference_prompts() {
    let (tokenizer, mut plain) = (demo(), 0);
    for row in read_json("../models/demo/evaluation/reference.json").as_array().unwrap() {
        if row.get("messages").is_none() {
            let text = row["text"].as_str().unwrap();
            assert_eq!(tokenizer.encode(text, true).unwrap(), ids(&row["prompt_ids"]), "{text}");
            plain += 1;
        }
        let mut answer = ids(&row["greedy_ids"]);
        answer.truncate(row["stop"].as_u64().map_or(usize::MAX, |stop| stop as usize));
        assert_eq!(tokenizer.decode(&answer, false), row["greedy_text"].as_str().unwrap());
    }
    assert_eq!(plain, 5);
}

/// On random ids, which are full of broken characters, the pieces of a stream put together are the text of all bytes
/// decoded at once; a replacement character never comes before it is certain.
#[test]
fn streams_give_the_whole_text() {
    let tokenizer = demo();
    let (mut waited, mut replaced) = (0, 0);
    for seed in 0..3_000u64 {
        // Bytes (ids below 259) are frequent, so that characters are cut and completed over tokens.
        let id = |i| match random_at(seed, i) {
            random if random % 3 == 0 => (random >> 8) % tokenizer.vocab_size() as u64,
            random => 3 + (random >> 8) % 256,
        };
        let ids: Vec<u32> = (0..1 + seed % 40).map(|i| id(i) as u32).collect();
        let bytes: Vec<u8> = ids.iter().flat_map(|&id| tokenizer.token_bytes(id)).copied().collect();
        let mut decoder = TextDecoder::new(&tokenizer, TextStart::Beginning, false);
        let (mut text, mut num_bytes) = (String::new(), 0);
        for &id in &ids {
            decoder.push(&tokenizer, id, &mut text);
            num_bytes += tokenizer.token_bytes(id).len();
            let so_far = String::from_utf8_lossy(&bytes[..num_bytes]);
            assert!(so_far.starts_with(&text), "seed {seed}: {text:?} was given out, but the text is {so_far:?}");
            assert!(String::from_utf8_lossy(&bytes).starts_with(&text), "seed {seed}: given out too early");
            waited += usize::from(so_far.len() > text.len());
        }
        decoder.finish(&mut text);
        assert_eq!(text, String::from_utf8_lossy(&bytes), "seed {seed}");
        replaced += usize::from(text.contains('\u{FFFD}'));
    }
    assert!(waited > 1_000 && replaced > 1_000, "{waited} waits, {replaced} texts with replacements");
}

/// Characters of several bytes come out with the token that completes them, not before and not in parts.
#[test]
fn characters_come_out_whole() {
    for tokenizer in [demo(), golden("sentencepiece"), golden("metaspace")] {
        let text = "né 👩‍👩‍👧‍👦 日本";
        let ids = tokenizer.encode(text, false).unwrap();
        assert!(ids.len() > text.chars().count(), "some character takes several tokens");
        let mut decoder = TextDecoder::new(&tokenizer, TextStart::Beginning, true);
        let mut so_far = String::new();
        for &id in &ids {
            decoder.push(&tokenizer, id, &mut so_far);
            assert!(text.starts_with(&so_far), "{so_far:?}");
        }
        assert_eq!(so_far, text, "nothing is left for the end");
    }
}

/// The space that the encoder puts before a text is dropped at the beginning of a text, and kept where one goes on.
#[test]
fn leading_spaces() {
    for tokenizer in [golden("sentencepiece"), golden("metaspace")] {
        let ids = tokenizer.encode("the", false).unwrap();
        assert_eq!(tokenizer.decode(&ids, true), "the");
        let mut decoder = TextDecoder::new(&tokenizer, TextStart::Continuation, true);
        let mut text = String::new();
        ids.iter().for_each(|&id| decoder.push(&tokenizer, id, &mut text));
        assert_eq!(text, " the");
    }
}

/// A stop string across tokens ends the stream without a part of it; special tokens leave no text.
#[test]
fn text_streams_stop() {
    let tokenizer = demo();
    let ids = tokenizer.encode("Once upon<|im_end|> a time, the end. More", false).unwrap();
    let mut stream = TextStream::new(&tokenizer, TextStart::Continuation, StopStrings::new(&["time, the end", "zzz"]));
    let (mut text, mut stopped_at) = (String::new(), None);
    for (idx, &id) in ids.iter().enumerate() {
        let stopped = stream.push(&tokenizer, id, &mut text);
        assert!("Once upon a ".starts_with(&text), "{text:?} holds a part of the stop string");
        stopped_at = stopped_at.or(stopped.then_some(idx));
    }
    assert_eq!(text, "Once upon a ");
    assert!(stopped_at.is_some_and(|idx| idx < ids.len() - 1), "{stopped_at:?} of {}", ids.len());
}

/// In a text of which a part is content, tokens outside of it count, those in it or across its border do not, and when
/// there are none the ids are those of plain encoding.
#[test]
fn content_is_plain() {
    let tokenizer = demo();
    let text = "<|im_start|>user\nhi <|im_end|> you<|im_end|>\n";
    let content = 17..34;
    assert_eq!(&text[content.clone()], "hi <|im_end|> you");
    let ids = tokenizer.encode_with_content(text, &[content]).unwrap();
    let special: Vec<u32> = ids.iter().copied().filter(|&id| tokenizer.is_special(id)).collect();
    assert_eq!(special, [1, 2]);
    assert_eq!((ids[0], ids[ids.len() - 2]), (1, 2));
    assert_eq!(tokenizer.decode(&ids, false), text);
    // A border, or a single place, inside what looks like a token.
    for content in [17..24, 24..24] {
        let ids = tokenizer.encode_with_content("<|im_start|>aaaa <|im_end|>", &[content]).unwrap();
        assert_eq!(ids.iter().filter(|&&id| tokenizer.is_special(id)).count(), 1);
    }
    let ordinary = "<|im_start|>user\nhi you<|im_end|>\n";
    let ids = tokenizer.encode_with_content(ordinary, from_ref(&(17..23))).unwrap();
    assert_eq!(ids, tokenizer.encode(ordinary, false).unwrap());
}

/// Damaged and hostile files are errors, never panics: every truncation of a small file, wrong types, absurd ids.
#[test]
fn damaged_files_are_refused() {
    let file = read("tests/golden/sentencepiece.json");
    let config = TokenizerConfig::default();
    for len in (0..file.len()).step_by(97) {
        let error = Tokenizer::from_json(&file[..len], &config).err().expect("a truncated file");
        assert_eq!(error.code(), "config");
    }
    let change = |edit: &dyn Fn(&mut Value)| {
        let mut json: Value = serde_json::from_slice(&file).unwrap();
        edit(&mut json);
        Tokenizer::from_json(&serde_json::to_vec(&json).unwrap(), &config).err().map(|error| error.to_string())
    };
    assert_eq!(change(&|_| ()), None);
    for (edit, part) in [
        (
            (&|json: &mut Value| json["model"]["vocab"]["absurd"] = 4_000_000_000u32.into()) as &dyn Fn(&mut Value),
            "field `model.vocab`: has token id 4000000000, at most 4194303",
        ),
        (
            &|json| {
                json["decoder"] = serde_json::json!({"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": true});
            },
            "CTC",
        ),
        (&|json| json["decoder"] = Value::Null, "decoder"),
        (&|json| json["model"] = Value::Null, "tokenizer.json"),
        (&|json| json["pre_tokenizer"] = serde_json::json!({"type": "Split", "pattern": {"Regex": "("}}), "tokenizer"),
    ] {
        let message = change(edit).unwrap_or_else(|| panic!("a file was taken that should say {part}"));
        assert!(message.contains(part), "{message}");
    }
}

/// Hostile texts of 64 KiB come back unchanged, in at most a generous multiple of the time of an English one of that
/// size; a quadratic step anywhere would take thousands of times as long.
#[test]
fn hostile_texts_take_linear_time() {
    const BYTES: usize = 64 << 10;
    let tokenizer = demo();
    let time = |unit: &str| {
        let text = unit.repeat(BYTES / unit.len());
        let start = std::time::Instant::now();
        let ids = tokenizer.encode_with_content(&text, from_ref(&(1..text.len()))).unwrap();
        let elapsed = start.elapsed();
        assert_eq!(tokenizer.decode(&ids, false), text, "{unit:?}");
        elapsed
    };
    let english = time("Once upon a time, there was a brave cat named Milo who lived by the sea. ");
    for unit in [
        "a",
        "A",
        " ",
        "\n",
        "\r",
        "\t",
        "^",
        "'",
        "'s",
        "0",
        " a",
        "a ",
        "é",
        "🙂",
        "\u{200d}",
        "\u{301}",
        "\0",
        "ab",
        "<|",
        "<|im_end|",
        "<|im_end|>",
        "aA",
        "a\n",
        " \n",
        "\n ",
        "!",
        "! ",
        "…",
        "日",
        "ा",
        "\u{202e}",
        "\u{feff}",
        "1a",
        "a1",
        ".",
        "..a",
        "\u{a0}",
        "  a",
        "\u{fffd}",
        "><",
    ] {
        let ratio = time(unit).as_secs_f64() / english.as_secs_f64();
        assert!(ratio < 60.0, "{unit:?} takes {ratio:.1} times as long as English");
    }
}
