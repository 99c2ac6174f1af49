//! What a model folder says in several files, as the keys of a GGUF file.

use crate::error::{Error, Result};
use crate::loader::gguf::{GgufMetadata, Stretching, set_vocabulary};
use crate::loader::{JsonFile, ModelSource, PoolingMode};
use crate::model::config::{Architecture, ModelConfig, RopeScaling};
use crate::model_files::ModelFiles;
use crate::tokenizer::Tokenizer;

/// Keys of hyperparameters and vocabulary.
pub(super) fn of_folder(
    source: &ModelSource,
    files: &ModelFiles,
    tokenizer: &Tokenizer,
    name: &str,
) -> Result<GgufMetadata> {
    let mut metadata = GgufMetadata::default();
    metadata.set("general.name", name);
    set_hyperparameters(&mut metadata, &files.config)?;
    set_pooling(&mut metadata, files);
    set_vocabulary(&mut metadata, &source.tokenizer()?.json()?, files.config.vocab_size)?;
    match files.config.architecture {
        Architecture::Bert => set_encoder_roles(&mut metadata, files, tokenizer)?,
        _ => set_roles(&mut metadata, source, files, tokenizer)?,
    }
    if let Some(template) = &files.tokenizer_config.chat_template {
        metadata.set("tokenizer.chat_template", template.as_str());
    }
    Ok(metadata)
}

/// What the format calls the architecture.
pub(super) fn architecture_name(architecture: Architecture) -> &'static str {
    match architecture {
        Architecture::Llama | Architecture::Mistral => "llama",
        Architecture::Qwen2 => "qwen2",
        Architecture::Qwen3 => "qwen3",
        Architecture::Gpt2 => "gpt2",
        Architecture::Bert => "bert",
    }
}

/// The stretching that `rope_freqs.weight` stands for.
pub(super) fn stretching(config: &ModelConfig) -> Option<Stretching> {
    match config.rope?.scaling {
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
            let original_positions = original_max_position_embeddings as u64;
            Some(Stretching { factor, low_freq_factor, high_freq_factor, original_positions })
        }
        RopeScaling::Default | RopeScaling::Linear { .. } => None,
    }
}

fn set_hyperparameters(metadata: &mut GgufMetadata, config: &ModelConfig) -> Result<()> {
    let architecture = architecture_name(config.architecture);
    metadata.set("general.architecture", architecture);
    metadata.set("general.type", "model");
    let key = |suffix: &str| format!("{architecture}.{suffix}");
    for (suffix, size) in [
        ("vocab_size", config.vocab_size),
        ("context_length", config.max_position_embeddings),
        ("embedding_length", config.hidden_size),
        ("feed_forward_length", config.intermediate_size),
        ("block_count", config.num_hidden_layers),
        ("attention.head_count", config.num_attention_heads),
        ("attention.head_count_kv", config.num_key_value_heads),
    ] {
        metadata.set(key(suffix), size as u32);
    }
    if let Architecture::Gpt2 | Architecture::Bert = config.architecture {
        metadata.set(key("attention.layer_norm_epsilon"), config.norm_eps);
        metadata.set(key("attention.causal"), config.architecture == Architecture::Gpt2);
        return check_gelu(config);
    }
    for suffix in ["attention.key_length", "attention.value_length", "rope.dimension_count"] {
        metadata.set(key(suffix), config.head_dim as u32);
    }
    metadata.set(key("attention.layer_norm_rms_epsilon"), config.norm_eps);
    if let Some(rope) = &config.rope {
        metadata.set(key("rope.freq_base"), rope.rope_theta as f32);
        match rope.scaling {
            RopeScaling::Default => {}
            RopeScaling::Linear { factor } => {
                metadata.set(key("rope.scaling.type"), "linear");
                metadata.set(key("rope.scaling.factor"), factor as f32);
            }
            RopeScaling::Llama3 { original_max_position_embeddings, .. } => {
                metadata.set(key("rope.scaling.original_context_length"), original_max_position_embeddings as u32);
            }
        }
    }
    if let Some(window) = sliding_window(config)? {
        metadata.set(key("attention.sliding_window"), window as u32);
    }
    Ok(())
}

/// The form of GELU is in no key: readers take that of the class.
fn check_gelu(config: &ModelConfig) -> Result<()> {
    if config.has_gelu_of_its_class() {
        return Ok(());
    }
    let field = if config.architecture == Architecture::Gpt2 { "activation_function" } else { "hidden_act" };
    let reason = "is another form of GELU than the architecture's own, for which a GGUF file has no words";
    Err(Error::Config { file: "config.json", field: field.to_string(), reason: reason.to_string() })
}

/// How states become a vector. (How long a text may be, which sentence-transformers says too, is in no key: readers go by
/// the positions that the model has.)
fn set_pooling(metadata: &mut GgufMetadata, files: &ModelFiles) {
    let number: u32 = match files.sentence.pooling {
        None => return,
        Some(PoolingMode::MeanTokens) => 1,
        Some(PoolingMode::ClsToken) => 2,
        Some(PoolingMode::LastToken) => 3,
    };
    metadata.set(format!("{}.pooling_type", architecture_name(files.config.architecture)), number);
}

/// The special tokens of an encoder, which are what it puts around every text.
fn set_encoder_roles(metadata: &mut GgufMetadata, files: &ModelFiles, tokenizer: &Tokenizer) -> Result<()> {
    let role = |name: &str, default: &str| {
        let text = files.tokenizer_config.special_tokens.get(name).map_or(default, String::as_str);
        tokenizer.token_id(text)
    };
    let (cls, sep) = (role("cls_token", "[CLS]"), role("sep_token", "[SEP]"));
    let (bare, framed) = (tokenizer.encode("a", false)?, tokenizer.encode("a", true)?);
    let is_framed = cls.into_iter().chain(bare).chain(sep).eq(framed);
    if cls.is_none() || sep.is_none() || !is_framed {
        return Err(Error::Config {
            file: "tokenizer.json",
            field: "post_processor".to_string(),
            reason: "puts other tokens around a text than [CLS] and [SEP]".to_string(),
        });
    }
    for (key, token_id) in [
        ("tokenizer.ggml.cls_token_id", cls),
        // The format's own spelling.
        ("tokenizer.ggml.seperator_token_id", sep),
        ("tokenizer.ggml.padding_token_id", role("pad_token", "[PAD]")),
        ("tokenizer.ggml.mask_token_id", role("mask_token", "[MASK]")),
    ] {
        if let Some(token_id) = token_id {
            metadata.set(key, token_id);
        }
    }
    metadata.set("tokenizer.ggml.token_type_count", files.config.type_vocab_size as u32);
    Ok(())
}

/// The window of all layers. The format has one for all, and for Mistral alone as far as this engine reads it.
fn sliding_window(config: &ModelConfig) -> Result<Option<usize>> {
    let first = config.sliding_windows.first().copied().flatten();
    let is_one = config.sliding_windows.iter().all(|&window| window == first);
    if is_one && (first.is_none() || config.architecture == Architecture::Mistral) {
        return Ok(first);
    }
    let reason = "has layers with a window beside layers without, or in an architecture for which a GGUF file has none";
    Err(Error::Config { file: "config.json", field: "sliding_window".to_string(), reason: reason.to_string() })
}

/// Which tokens begin, end and fill up.
fn set_roles(
    metadata: &mut GgufMetadata,
    source: &ModelSource,
    files: &ModelFiles,
    tokenizer: &Tokenizer,
) -> Result<()> {
    let config = source.config()?;
    let role = |name: &str| {
        let by_text = files.tokenizer_config.special_tokens.get(name).and_then(|text| tokenizer.token_id(text));
        by_text.map_or_else(|| token_id(&config, &format!("{name}_id"), files.config.vocab_size), |id| Ok(Some(id)))
    };
    let bos = role("bos_token")?;
    for (key, token_id) in [
        ("tokenizer.ggml.bos_token_id", bos),
        ("tokenizer.ggml.unknown_token_id", role("unk_token")?),
        ("tokenizer.ggml.padding_token_id", role("pad_token")?),
    ] {
        if let Some(token_id) = token_id {
            metadata.set(key, token_id);
        }
    }
    // The format has three names for what ends an answer; readers know the usual others by their texts.
    let end_keys = ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"];
    for (key, &token_id) in end_keys.into_iter().zip(&files.eos_token_ids) {
        metadata.set(key, token_id);
    }
    // What the tokenizer puts around a prompt.
    let (bare, framed) = (tokenizer.encode("a", false)?, tokenizer.encode("a", true)?);
    let refuse = || Error::Config {
        file: "tokenizer.json",
        field: "post_processor".to_string(),
        reason: "puts other tokens around a text than one that begins and one that ends it".to_string(),
    };
    let eos = files.eos_token_ids.first().copied();
    let frames = [(false, false), (true, false), (false, true), (true, true)].into_iter().find(|&(begins, ends)| {
        let (prefix, suffix) = (bos.filter(|_| begins), eos.filter(|_| ends));
        let expected = prefix.into_iter().chain(bare.iter().copied()).chain(suffix);
        (!begins || bos.is_some()) && (!ends || eos.is_some()) && expected.eq(framed.iter().copied())
    });
    let (begins, ends) = frames.ok_or_else(refuse)?;
    metadata.set("tokenizer.ggml.add_bos_token", begins);
    metadata.set("tokenizer.ggml.add_eos_token", ends);
    Ok(())
}

/// A token of `config.json`.
fn token_id(config: &JsonFile, field: &str, vocab_size: usize) -> Result<Option<u32>> {
    Ok(config.object().token_ids(field, vocab_size, 1)?.first().copied())
}
