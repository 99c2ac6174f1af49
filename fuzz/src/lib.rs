//! What must hold for any bytes in the place of a model's files, a function for each kind of them: the bytes are taken, or
//! refused by an error of a known kind. A panic is a defect; so is an error that says so (`internal`).
//!
//! The functions are deterministic, and keep nothing but a folder for each thread, into which the bytes are written where
//! a loader reads files.

mod folder;
mod mutate;
mod segment;

use std::sync::{Arc, OnceLock};

use folder::with_folder;
pub use mutate::{Random, mutate};
use ns_llm::chat::{ChatTemplate, RenderContext, SpecialTokens};
use ns_llm::tokenizer::{Tokenizer, TokenizerConfig};
use ns_llm::{EngineOptions, Error, Message, Result};
use ns_llm_kernels::cpu::linear::{MatrixSource, PackedLinear, WeightFormat};
use ns_llm_kernels::cpu::pool::{Pool, PoolPriority};
use ns_llm_kernels::cpu::{Cpu, Isa};
use ns_llm_kernels::quant::{self, QuantType};
pub use segment::disk_segment;

/// Whether bytes were taken, or the code of the error that refused them.
pub type Outcome = std::result::Result<(), &'static str>;

/// A kind of bytes.
#[derive(Clone, Copy)]
pub struct Target {
    /// Its name, also of the target for libFuzzer.
    pub name: &'static str,
    /// What must hold.
    pub run: fn(&[u8]) -> Outcome,
}

/// All kinds.
pub const TARGETS: [Target; 7] = [
    Target { name: "gguf", run: gguf },
    Target { name: "safetensors", run: safetensors },
    Target { name: "config_json", run: config_json },
    Target { name: "tokenizer_json", run: tokenizer_json },
    Target { name: "chat_template", run: chat_template },
    Target { name: "disk_segment", run: disk_segment },
    Target { name: "quant_blocks", run: quant_blocks },
];

/// A GGUF file is loaded as an engine's worker does it, on this thread.
pub fn gguf(bytes: &[u8]) -> Outcome {
    with_folder(|folder| {
        let path = folder.join("model.gguf");
        std::fs::write(&path, bytes).expect("the folder is writable");
        outcome(load(&path))
    })
}

/// `model.safetensors` beside a valid `config.json` and `tokenizer.json`.
pub fn safetensors(bytes: &[u8]) -> Outcome {
    file_of_a_folder("model.safetensors", bytes)
}

/// `config.json` beside valid weights: what it asks for does not fit them, or it is refused, or the model loads.
pub fn config_json(bytes: &[u8]) -> Outcome {
    file_of_a_folder("config.json", bytes)
}

/// One file of a valid folder is replaced, and put back.
fn file_of_a_folder(name: &str, bytes: &[u8]) -> Outcome {
    with_folder(|folder| {
        let path = folder.join(name);
        let valid = std::fs::read(&path).expect("a file of the valid folder");
        std::fs::write(&path, bytes).expect("the folder is writable");
        let result = load(folder);
        std::fs::write(&path, valid).expect("the folder is writable");
        outcome(result)
    })
}

fn load(path: &std::path::Path) -> Result<()> {
    ns_llm::open::load(EngineOptions::new(path).threads(1).kv_bytes(1 << 20)).map(drop)
}

/// `tokenizer.json`: what loads encodes and decodes texts, with ids of its vocabulary.
pub fn tokenizer_json(bytes: &[u8]) -> Outcome {
    const TEXTS: [&str; 6] =
        ["", "ab", "a b\n\n  c1234", "<s>a</s>", "\u{e9}\u{301}\u{1f44d}\u{1f3fd}", "\0\u{feff}a\u{fffd}"];
    let tokenizer = match Tokenizer::from_json(bytes, &TokenizerConfig::default()) {
        Ok(tokenizer) => tokenizer,
        Err(error) => return outcome(Err(error)),
    };
    for text in TEXTS {
        for ids in [tokenizer.encode(text, true), tokenizer.encode_plain(text)] {
            match ids {
                Ok(ids) => drop(tokenizer.decode(&ids, false)),
                Err(error) => return outcome(Err(error)),
            }
        }
    }
    // Ids that no text gives, too.
    drop(tokenizer.decode(&[0, u32::MAX, tokenizer.vocab_size() as u32], true));
    Ok(())
}

/// A chat template: what compiles renders a conversation, within its bounds.
pub fn chat_template(bytes: &[u8]) -> Outcome {
    const MAX_OUTPUT_BYTES: usize = 4096;
    let Ok(source) = std::str::from_utf8(bytes) else { return Err("not_utf8") };
    let special = SpecialTokens::default();
    let messages = [Message::new("system", "Be brief."), Message::new("user", "What is <b>?")];
    let context = RenderContext { unix_seconds: 0, max_output_bytes: MAX_OUTPUT_BYTES, expired: &|| false };
    let rendered = ChatTemplate::new(source, special).and_then(|template| template.render(&messages, &context));
    if let Ok(rendered) = &rendered {
        assert!(rendered.text.len() <= MAX_OUTPUT_BYTES, "{} bytes were rendered", rendered.text.len());
        for content in &rendered.content {
            assert!(rendered.text.get(content.clone()).is_some(), "{content:?} is no part of the text");
        }
    }
    outcome(rendered.map(drop))
}

/// Blocks of quantized weights: the first byte names the format, the second the number of rows, the rest are the blocks.
/// Packed for any instruction set, they stand for the numbers that they are decoded to, bit for bit.
pub fn quant_blocks(bytes: &[u8]) -> Outcome {
    static CPUS: OnceLock<Vec<Cpu>> = OnceLock::new();
    let [quant_type, rows, blocks @ ..] = bytes else { return Err("too_short") };
    let quant_type = QuantType::ALL[usize::from(*quant_type) % QuantType::ALL.len()];
    let out_features = 1 + usize::from(*rows) % 40;
    let columns = blocks.len() / quant_type.block_bytes() / out_features * quant_type.block_values();
    if columns == 0 {
        let mut number = [0.0];
        assert!(quant::decode(quant_type, blocks, &mut number).is_err(), "one number is no whole block");
        return Err("no_whole_rows");
    }
    let num_bytes = quant_type.size_bytes(out_features * columns).expect("whole blocks");
    let mut expected = vec![0.0; out_features * columns];
    quant::decode(quant_type, &blocks[..num_bytes], &mut expected).expect("whole blocks");
    let cpus = CPUS.get_or_init(|| {
        let pool = Arc::new(Pool::new(1, PoolPriority::Normal).expect("no thread is started"));
        Isa::available().into_iter().map(|isa| Cpu::with_isa(isa, pool.clone()).expect("available")).collect()
    });
    for cpu in cpus {
        let source = MatrixSource {
            bytes: &blocks[..num_bytes],
            encoding: quant_type.into(),
            out_features,
            in_features: columns,
            bias: None,
        };
        let packed = PackedLinear::pack(cpu, &[(source, WeightFormat::Quant(quant_type))]).expect("whole rows");
        let mut row = vec![0.0; columns];
        for (idx, expected) in expected.chunks_exact(columns).enumerate() {
            packed.row_into(idx, &mut row);
            let same = |(got, want): (&f32, &f32)| got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan();
            assert!(row.iter().zip(expected).all(same), "{} row {idx}, {}", quant_type.name(), cpu.isa().name());
        }
    }
    Ok(())
}

fn outcome(result: Result<()>) -> Outcome {
    let error = match result {
        Ok(()) => return Ok(()),
        Err(error) => error,
    };
    assert!(!matches!(error, Error::Internal { .. }), "{error}");
    assert!(!error.to_string().is_empty(), "{error:?} says nothing");
    Err(error.code())
}
