//! Vocabularies that were trained with SentencePiece (Kudo & Richardson 2018, arXiv:1808.06226) as byte-pair encoding:
//! a score for each token instead of a list of merges. The pair whose merged token has the highest score is merged
//! first, so the list is every way to put a token together from two others, in the order of scores. Spaces are written
//! `▁`, one of which goes before a text; characters that are no token become tokens of single bytes.

#![deny(clippy::arithmetic_side_effects, clippy::indexing_slicing)]

use serde_json::{Value as Json, json};

use super::metadata;
use super::vocabulary::Vocab;
use crate::config::{MAX_MERGES, MAX_PIECE_BYTES};
use crate::error::Result;

/// Pairs of tokens that become one, highest score first; of one token's pairs that with the longest first part.
/// `pieces`: place, text and score of every token that text can become.
pub(super) fn merges<'a>(
    key: &str,
    pieces: impl Iterator<Item = (u32, &'a str, f64)>,
    vocab: &Vocab<'_>,
) -> Result<Vec<(&'a str, &'a str)>> {
    let mut ranked = Vec::new();
    for (id, piece, score) in pieces {
        if piece.len() > MAX_PIECE_BYTES {
            let reason = format!("has {} bytes, at most {MAX_PIECE_BYTES} are allowed", piece.len());
            return Err(metadata::error(&format!("{key}[{id}]"), reason));
        }
        // The first cut leaves nothing on the left, which is no token.
        let cuts = piece.char_indices().rev().map(|(at, _)| piece.split_at(at));
        let pairs = cuts.filter(|(left, right)| vocab.contains(left) && vocab.contains(right));
        ranked.extend(pairs.map(|pair| (score, pair)));
        if ranked.len() > MAX_MERGES {
            let reason = format!("has more than {MAX_MERGES} ways to put a token together from two others");
            return Err(metadata::error(key, reason));
        }
    }
    // Stable: pairs of one token stay in their order.
    ranked.sort_by(|(a, _), (b, _)| b.total_cmp(a));
    Ok(ranked.into_iter().map(|(_, pair)| pair).collect())
}

/// `normalizer` of `tokenizer.json`.
pub(super) fn normalizer(add_space_prefix: bool) -> Json {
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    let prepend = json!({"type": "Prepend", "prepend": "▁"});
    let steps = if add_space_prefix { vec![prepend, replace] } else { vec![replace] };
    json!({"type": "Sequence", "normalizers": steps})
}

/// `decoder` of `tokenizer.json`: takes away the space that was added.
pub(super) fn decoder(add_space_prefix: bool) -> Json {
    let mut steps = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    steps.extend(add_space_prefix.then(|| json!({"type": "Strip", "content": " ", "start": 1, "stop": 0})));
    json!({"type": "Sequence", "decoders": steps})
}
