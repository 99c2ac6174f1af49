//! What an engine's cached things depend on, as hashes: a block of KV or an answer that was computed by a model, a machine or
//! a version of which anything differs is never found. Everything is named field by field, so an identity changes when one of
//! its values does, and not when the source is rearranged.
//!
//! The versions stand beside what they are versions of: of numerics in `kernels` ([`NUMERICS_VERSION`]), of the layout of
//! blocks in `backend` ([`KV_LAYOUT_VERSION`]).
//!
//! [`NUMERICS_VERSION`]: ns_llm_kernels::cpu::NUMERICS_VERSION

use ns_llm_kernels::kv_int8;

use crate::backend::{KV_LAYOUT_VERSION, KvLayout};
use crate::config::{EngineOptions, KvTierEncoding};
use crate::device::Target;
use crate::error::Result;
use crate::field_hash::{FieldHash, FieldTag};
use crate::kv_cache::KvIdentity;
use crate::memory_plan::StoredBlocks;
use crate::model_files::ModelFiles;
use crate::storage::LayoutId;
use crate::weight_levels::WeightLevel;

/// Of what an engine keeps.
pub(super) struct Identity {
    /// Of KV blocks.
    pub(super) kv: KvIdentity,
    /// Of answers.
    pub(super) answers: [u8; 32],
}

impl Identity {
    /// `numerics`: whatever may change the bits of a result. `num_threads`: that hash the weights, where that is needed.
    pub(super) fn new(
        options: &EngineOptions,
        files: &ModelFiles,
        level: &WeightLevel,
        stored: &StoredBlocks,
        numerics: String,
        num_threads: usize,
    ) -> Result<Self> {
        let fingerprint = fingerprint(options, files, num_threads)?;
        let kv = KvIdentity {
            fingerprint,
            kv_layout: kv_layout(&level.layout, stored.encoding()),
            numerics_id: format!("{numerics} weights {}", level.wanted.name()),
            adapter: String::new(),
        };
        let answers = answer_identity(&kv, level.plan.context_tokens, &files.text_fingerprint);
        Ok(Identity { kv, answers })
    }
}

#[derive(Clone, Copy)]
#[repr(u8)]
enum Tag {
    What = 1,
    Version,
    Configuration,
    TensorName,
    TensorShape,
    TensorType,
    NumLayers,
    NumKvHeads,
    HeadDim,
    BlockTokens,
    KvDtype,
    Device,
    KvIdentity,
    ContextTokens,
    TextFingerprint,
}

impl FieldTag for Tag {
    fn number(self) -> u8 {
        self as u8
    }
}

/// Blocks that leave the process are found by the weights' contents. Those that do not need only tell engines of one
/// process apart, so names, shapes and types will do, which cost nothing to hash.
fn fingerprint(options: &EngineOptions, files: &ModelFiles, num_threads: usize) -> Result<[u8; 32]> {
    let configuration = files.config.identity();
    let is_kept = options.prefix_cache || options.response_cache.max_bytes > 0;
    if is_kept && (options.kv_cache_dir.is_some() || options.kv_remote.is_some()) {
        return files.weights.fingerprint(&configuration, num_threads);
    }
    let mut hash = FieldHash::new().text(Tag::What, "outline of a model").field(Tag::Configuration, &configuration);
    for (name, shape, dtype) in files.weights.entries() {
        let shape: Vec<u8> = shape.iter().flat_map(|&size| (size as u64).to_le_bytes()).collect();
        hash = hash.text(Tag::TensorName, name).field(Tag::TensorShape, &shape);
        hash = hash.text(Tag::TensorType, &dtype.to_string());
    }
    Ok(hash.finish())
}

/// How the numbers of a block are kept. A block that was rounded on its way is another one, and so is what was computed from
/// it.
fn kv_layout(layout: &KvLayout, encoding: KvTierEncoding) -> String {
    let kept = match encoding {
        KvTierEncoding::AsComputed => String::new(),
        rounded => format!(" kept as {} v{}", rounded.name(), kv_int8::VERSION),
    };
    format!("v{KV_LAYOUT_VERSION} {} block {}{kept}", layout.dtype.name(), layout.block_tokens)
}

/// What the engine's answers depend on: what KV does, the text that goes in and comes out, and how tokens are drawn and
/// answers are cut, which another version of this engine may do otherwise.
fn answer_identity(kv: &KvIdentity, context_tokens: usize, text_fingerprint: &[u8; 32]) -> [u8; 32] {
    FieldHash::new()
        .text(Tag::What, "answers")
        .text(Tag::Version, env!("CARGO_PKG_VERSION"))
        .field(Tag::KvIdentity, &kv.hash())
        .number(Tag::ContextTokens, context_tokens as u64)
        .field(Tag::TextFingerprint, text_fingerprint)
        .finish()
}

/// Everything that says what the bytes of a block mean. Keys lie transposed on the CPU alone.
pub(super) fn layout_id(layout: &KvLayout, target: &Target) -> LayoutId {
    let KvLayout { num_layers, num_blocks: _, block_tokens, num_kv_heads, head_dim, dtype } = layout;
    let hash = FieldHash::new()
        .text(Tag::What, "layout of a KV block")
        .number(Tag::Version, u64::from(KV_LAYOUT_VERSION))
        .number(Tag::NumLayers, *num_layers as u64)
        .number(Tag::NumKvHeads, *num_kv_heads as u64)
        .number(Tag::HeadDim, *head_dim as u64)
        .number(Tag::BlockTokens, *block_tokens as u64)
        .text(Tag::KvDtype, dtype.name())
        .text(Tag::Device, target.kind());
    LayoutId(hash.finish())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::KvDtype;
    use crate::weight_levels::plan_memory;

    /// Blocks of one element type are never found under the keys of another, and a smaller type has more blocks in the
    /// same bytes.
    #[test]
    fn each_kv_dtype_has_its_own_block_keys() {
        let mut options = EngineOptions::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo")).threads(1);
        options.kv_bytes = Some(32 << 20);
        let (files, _text) = ModelFiles::open(&options).expect("the model that ships");
        let mut seen = Vec::new();
        for dtype in [None, Some(KvDtype::F32), Some(KvDtype::Bf16), Some(KvDtype::Int8)] {
            options.kv_dtype = dtype;
            let WeightLevel { layout, plan, .. } = plan_memory(&options, &files, &Target::Cpu).expect("fits");
            assert_eq!(layout.dtype, dtype.unwrap_or(KvDtype::F16));
            let hash = layout_id(&layout, &Target::Cpu);
            seen.push((kv_layout(&layout, KvTierEncoding::AsComputed), hash, plan.num_blocks));
        }
        for ids in [
            seen.iter().map(|(name, ..)| name.clone()).collect::<std::collections::BTreeSet<_>>().len(),
            seen.iter().map(|(_, hash, _)| *hash).collect::<std::collections::BTreeSet<_>>().len(),
        ] {
            assert_eq!(ids, 4, "{seen:?}");
        }
        let blocks: Vec<_> = seen.iter().map(|&(.., blocks)| blocks).collect();
        assert!(blocks[1] * 2 == blocks[0] && blocks[2] == blocks[0], "{seen:?}");
        assert!(blocks[3] * 10 > blocks[0] * 18 && blocks[3] < blocks[0] * 2, "{seen:?}");
    }
}
