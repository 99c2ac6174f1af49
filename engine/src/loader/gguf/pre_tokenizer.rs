//! How text is cut into words before merging. A GGUF file only has the name of a known tokenizer; its expressions are
//! facts of that tokenizer, as its own `tokenizer.json` has them.

#![deny(clippy::arithmetic_side_effects, clippy::indexing_slicing)]

use serde_json::{Value as Json, json};

use super::metadata::{self, Metadata};
use crate::error::Result;

const KEY: &str = "tokenizer.ggml.pre";
const SUPPORTED: &str = "default, gpt-2, llama-bpe, qwen2, smollm, tekken, deepseek-llm, deepseek-coder";

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const DIGIT: &str = r"\p{N}";
const DIGITS_TOGETHER: &str = r"\p{N}+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const LINE_ENDS: &str = r"[\r\n]";
/// Letters that have a case.
const DEEPSEEK_LETTERS: &str = r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+";
const DEEPSEEK_MARKS: &str = r"\s?[!-/:-~！-／：-～‘-‟　-。]+";
const DEEPSEEK_IDEOGRAPHS: &str = r"[一-龥ࠀ-一가-퟿]+";

/// Ways of cutting that are known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PreTokenizer {
    /// What files without a name mean: punctuation, then words as in GPT-2, then digits by threes.
    Default,
    Gpt2,
    Llama3,
    Qwen2,
    SmolLm,
    /// Mistral's, since Nemo: words end where small letters are followed by capitals.
    Tekken,
    DeepSeekLlm,
    DeepSeekCoder,
}

impl PreTokenizer {
    const ALL: [PreTokenizer; 8] = [
        PreTokenizer::Default,
        PreTokenizer::Gpt2,
        PreTokenizer::Llama3,
        PreTokenizer::Qwen2,
        PreTokenizer::SmolLm,
        PreTokenizer::Tekken,
        PreTokenizer::DeepSeekLlm,
        PreTokenizer::DeepSeekCoder,
    ];

    pub(super) fn of(metadata: &Metadata) -> Result<PreTokenizer> {
        match metadata.string(KEY)?.unwrap_or("default") {
            "default" => Ok(PreTokenizer::Default),
            "gpt-2" => Ok(PreTokenizer::Gpt2),
            "llama-bpe" | "llama3" | "llama-v3" => Ok(PreTokenizer::Llama3),
            "qwen2" | "deepseek-r1-qwen" => Ok(PreTokenizer::Qwen2),
            "smollm" => Ok(PreTokenizer::SmolLm),
            "tekken" => Ok(PreTokenizer::Tekken),
            "deepseek-llm" => Ok(PreTokenizer::DeepSeekLlm),
            "deepseek-coder" => Ok(PreTokenizer::DeepSeekCoder),
            other => {
                let reason = format!("is {other:?}, which is not supported (supported: {SUPPORTED})");
                Err(metadata::error(KEY, reason))
            }
        }
    }

    /// The way in which the `pre_tokenizer` of a `tokenizer.json` cuts; `None` for one that no name stands for.
    pub(super) fn recognise(pre_tokenizer: &Json) -> Option<PreTokenizer> {
        let mut found = Vec::new();
        expressions(pre_tokenizer, &mut found)?;
        PreTokenizer::ALL.into_iter().find(|known| known.expressions() == found)
    }

    /// As [`KEY`] has it.
    pub(super) fn name(self) -> &'static str {
        match self {
            PreTokenizer::Default => "default",
            PreTokenizer::Gpt2 => "gpt-2",
            PreTokenizer::Llama3 => "llama-bpe",
            PreTokenizer::Qwen2 => "qwen2",
            PreTokenizer::SmolLm => "smollm",
            PreTokenizer::Tekken => "tekken",
            PreTokenizer::DeepSeekLlm => "deepseek-llm",
            PreTokenizer::DeepSeekCoder => "deepseek-coder",
        }
    }

    /// Whether a prompt begins with the token of that role when the file does not say.
    pub(super) fn adds_bos(self) -> bool {
        matches!(self, PreTokenizer::Llama3 | PreTokenizer::Tekken)
    }

    /// Whether a word that is a token is taken whole.
    pub(super) fn ignores_merges(self) -> bool {
        matches!(self, PreTokenizer::Llama3 | PreTokenizer::Tekken)
    }

    /// `normalizer` of `tokenizer.json`: Qwen composes characters.
    pub(super) fn normalizer(self) -> Json {
        if self == PreTokenizer::Qwen2 { json!({"type": "NFC"}) } else { Json::Null }
    }

    /// `pre_tokenizer` of `tokenizer.json`: each expression cuts what the ones before it left, then bytes become the
    /// characters that stand for them.
    pub(super) fn json(self) -> Json {
        let split = |expression: &&str| json!({"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": false});
        let mut steps: Vec<Json> = self.expressions().iter().map(split).collect();
        steps.push(json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}));
        json!({"type": "Sequence", "pretokenizers": steps})
    }

    fn expressions(self) -> &'static [&'static str] {
        match self {
            PreTokenizer::Default => &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, DIGITS_TOGETHER, "[0-9][0-9][0-9]"],
            PreTokenizer::Gpt2 => &[GPT2],
            PreTokenizer::Llama3 => &[LLAMA3],
            PreTokenizer::Qwen2 => &[QWEN2],
            PreTokenizer::SmolLm => &[DIGIT, GPT2],
            PreTokenizer::Tekken => &[TEKKEN],
            PreTokenizer::DeepSeekLlm => {
                &[LINE_ENDS, DEEPSEEK_LETTERS, DEEPSEEK_MARKS, r"\s+$", DEEPSEEK_IDEOGRAPHS, DIGIT]
            }
            PreTokenizer::DeepSeekCoder => &[LINE_ENDS, r"\s?\p{L}+", r"\s?\p{P}+", DEEPSEEK_IDEOGRAPHS, DIGIT],
        }
    }
}

/// Appends the expressions by which `step` cuts, in their order. `None` for a step that does anything else.
fn expressions<'a>(step: &'a Json, found: &mut Vec<&'a str>) -> Option<()> {
    let flag = |field: &str| step.get(field).and_then(Json::as_bool);
    match step.get("type")?.as_str()? {
        "Sequence" => step.get("pretokenizers")?.as_array()?.iter().try_for_each(|step| expressions(step, found)),
        "Split" => {
            let behavior = step.get("behavior")?.as_str()?;
            // What is between the words is empty for the expressions that match everything.
            if !matches!((behavior, flag("invert")?), ("Isolated", false) | ("Removed", true)) {
                return None;
            }
            found.push(step.get("pattern")?.get("Regex")?.as_str()?);
            Some(())
        }
        "Digits" => {
            found.push(if flag("individual_digits")? { DIGIT } else { DIGITS_TOGETHER });
            Some(())
        }
        "ByteLevel" if flag("add_prefix_space")? => None,
        "ByteLevel" => {
            found.extend(flag("use_regex").unwrap_or(true).then_some(GPT2));
            Some(())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer as _, PreTokenizerWrapper};

    use super::*;

    /// Each way is recognised as it is written here and as tokenizers of its kind write it; others are not.
    #[test]
    fn ways_to_cut_are_recognised() {
        use PreTokenizer::*;
        for known in PreTokenizer::ALL {
            assert_eq!(PreTokenizer::recognise(&known.json()), Some(known));
            let mut metadata = Metadata::default();
            metadata.set(KEY, known.name());
            assert_eq!(PreTokenizer::of(&metadata).expect("a known name"), known);
        }
        let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true});
        let digits = json!({"type": "Digits", "individual_digits": true});
        let smollm = json!({"type": "Sequence", "pretokenizers": [digits, byte_level]});
        assert_eq!(PreTokenizer::recognise(&byte_level), Some(Gpt2));
        assert_eq!(PreTokenizer::recognise(&smollm), Some(SmolLm));
        let mut deepseek = DeepSeekLlm.json();
        *deepseek.pointer_mut("/pretokenizers/5").expect("the digits") = digits.clone();
        assert_eq!(PreTokenizer::recognise(&deepseek), Some(DeepSeekLlm));
        for unknown in [
            json!(null),
            json!({"type": "Whitespace"}),
            json!({"type": "ByteLevel", "add_prefix_space": true}),
            json!({"type": "Sequence", "pretokenizers": [byte_level, digits]}),
            json!({"type": "Split", "pattern": {"Regex": GPT2}, "behavior": "Removed", "invert": false}),
            json!({"type": "Split", "pattern": {"String": " "}, "behavior": "Isolated", "invert": false}),
        ] {
            assert_eq!(PreTokenizer::recognise(&unknown), None, "{unknown}");
        }
    }

    /// Each name cuts as its tokenizer does: contractions, digits, runs of punctuation and whitespace all differ.
    #[test]
    fn each_name_cuts_in_its_own_way() {
        for (name, expected) in [
            (PreTokenizer::Gpt2, "It|'s| 12345| foo|!!|\n | x"),
            (PreTokenizer::Llama3, "It|'s| |123|45| foo|!!\n| | x"),
            (PreTokenizer::Qwen2, "It|'s| |1|2|3|4|5| foo|!!\n| | x"),
            (PreTokenizer::SmolLm, "It|'s| |1|2|3|4|5| foo|!!|\n | x"),
            (PreTokenizer::Default, "It|'|s| |123|45| foo|!!|\n | x"),
            (PreTokenizer::Tekken, "It|'s| |1|2|3|4|5| foo|!!\n| | x"),
            (PreTokenizer::DeepSeekLlm, "It|'|s| |1|2|3|4|5| foo|!!|\n| | x"),
            (PreTokenizer::DeepSeekCoder, "It|'|s| |1|2|3|4|5| foo|!!|\n| | x"),
        ] {
            let pre_tokenizer: PreTokenizerWrapper = serde_json::from_value(name.json()).unwrap();
            let mut text = PreTokenizedString::from("It's 12345 foo!!\n  x");
            pre_tokenizer.pre_tokenize(&mut text).unwrap();
            let splits = text.get_splits(OffsetReferential::Original, OffsetType::Byte);
            let words: Vec<String> =
                splits.iter().map(|(word, _, _)| word.replace('\u{120}', " ").replace('\u{10A}', "\n")).collect();
            assert_eq!(words.join("|"), expected, "{name:?}");
        }
    }
}
