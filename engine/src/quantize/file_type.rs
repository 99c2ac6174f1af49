//! Kinds of quantized files: which matrix is stored in which type. The K mixes give more bits to what hurts most when it is
//! rough: the output matrix, and the value and down projections of the layers at both ends and of every third between.
//! Names, numbers and rules are llama.cpp's, so that a file is what its name makes people expect.

use safetensors::Dtype;

use crate::error::{Error, Result};
use crate::loader::StoredDtype;
use crate::tensor::{Encoding, QuantType, fitting};

/// How the matrices of a file are stored. Everything else (norms, biases) is always f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types, reason = "the names are the formats' own")]
#[allow(missing_docs, reason = "the names say it")]
#[non_exhaustive]
pub enum FileType {
    F32,
    F16,
    BF16,
    Q8_0,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q2_K,
    Q3_K_S,
    Q3_K_M,
    Q3_K_L,
    Q4_K_S,
    Q4_K_M,
    Q5_K_S,
    Q5_K_M,
    Q6_K,
    IQ4_NL,
    MXFP4,
}

/// What decides beside the file's type.
#[derive(Debug, Clone, Copy)]
pub(super) struct ModelShape {
    pub(super) num_layers: usize,
    /// Query heads that share one head of keys and values.
    pub(super) heads_per_kv_head: usize,
    /// Whether the embedding is the output matrix, too.
    pub(super) is_tied: bool,
}

impl FileType {
    /// All of them.
    pub const ALL: [FileType; 19] = [
        FileType::F32,
        FileType::F16,
        FileType::BF16,
        FileType::Q8_0,
        FileType::Q4_0,
        FileType::Q4_1,
        FileType::Q5_0,
        FileType::Q5_1,
        FileType::Q2_K,
        FileType::Q3_K_S,
        FileType::Q3_K_M,
        FileType::Q3_K_L,
        FileType::Q4_K_S,
        FileType::Q4_K_M,
        FileType::Q5_K_S,
        FileType::Q5_K_M,
        FileType::Q6_K,
        FileType::IQ4_NL,
        FileType::MXFP4,
    ];

    /// The type of that name, in any case. `q3_k`, `q4_k` and `q5_k` are the mixes of medium size.
    pub fn from_name(name: &str) -> Result<FileType> {
        let wanted = name.to_ascii_lowercase();
        let full = match wanted.as_str() {
            "q3_k" | "q4_k" | "q5_k" => format!("{wanted}_m"),
            _ => wanted,
        };
        let found = FileType::ALL.into_iter().find(|file_type| file_type.name() == full);
        found.ok_or_else(|| Error::InvalidArgument {
            field: "type",
            value: name.to_string(),
            expected: format!("one of {}", FileType::ALL.map(FileType::name).join(", ")),
        })
    }

    /// As options and file names write it.
    pub fn name(self) -> &'static str {
        self.row().0
    }

    /// The number that `general.file_type` has for it.
    pub(super) fn id(self) -> u32 {
        self.row().1
    }

    /// The type of most matrices.
    fn base(self) -> StoredDtype {
        self.row().2
    }

    fn row(self) -> (&'static str, u32, StoredDtype) {
        const fn blocks(quant_type: QuantType) -> StoredDtype {
            StoredDtype::Blocks(quant_type)
        }
        match self {
            FileType::F32 => ("f32", 0, StoredDtype::Plain(Dtype::F32)),
            FileType::F16 => ("f16", 1, StoredDtype::Plain(Dtype::F16)),
            FileType::BF16 => ("bf16", 32, StoredDtype::Plain(Dtype::BF16)),
            FileType::Q8_0 => ("q8_0", 7, blocks(QuantType::Q8_0)),
            FileType::Q4_0 => ("q4_0", 2, blocks(QuantType::Q4_0)),
            FileType::Q4_1 => ("q4_1", 3, blocks(QuantType::Q4_1)),
            FileType::Q5_0 => ("q5_0", 8, blocks(QuantType::Q5_0)),
            FileType::Q5_1 => ("q5_1", 9, blocks(QuantType::Q5_1)),
            FileType::Q2_K => ("q2_k", 10, blocks(QuantType::Q2_K)),
            FileType::Q3_K_S => ("q3_k_s", 11, blocks(QuantType::Q3_K)),
            FileType::Q3_K_M => ("q3_k_m", 12, blocks(QuantType::Q3_K)),
            FileType::Q3_K_L => ("q3_k_l", 13, blocks(QuantType::Q3_K)),
            FileType::Q4_K_S => ("q4_k_s", 14, blocks(QuantType::Q4_K)),
            FileType::Q4_K_M => ("q4_k_m", 15, blocks(QuantType::Q4_K)),
            FileType::Q5_K_S => ("q5_k_s", 16, blocks(QuantType::Q5_K)),
            FileType::Q5_K_M => ("q5_k_m", 17, blocks(QuantType::Q5_K)),
            FileType::Q6_K => ("q6_k", 18, blocks(QuantType::Q6_K)),
            FileType::IQ4_NL => ("iq4_nl", 25, blocks(QuantType::IQ4_NL)),
            FileType::MXFP4 => ("mxfp4", 38, blocks(QuantType::MXFP4)),
        }
    }

    /// The type of the matrix that the file calls `name`, whose rows have `width` numbers. `is_pure`: the base type
    /// wherever it fits.
    pub(super) fn of_matrix(self, name: &str, width: usize, model: &ModelShape, is_pure: bool) -> StoredDtype {
        let StoredDtype::Blocks(base) = self.base() else { return self.base() };
        let chosen = if is_pure { base } else { self.mixed(base, name, width, model) };
        match fitting(chosen, width) {
            Encoding::Blocks(blocks) => StoredDtype::Blocks(blocks),
            Encoding::Plain(_) => StoredDtype::Plain(Dtype::F16),
        }
    }

    fn mixed(self, base: QuantType, name: &str, width: usize, model: &ModelShape) -> QuantType {
        use FileType::*;
        let path = name.trim_end_matches(".weight");
        if path == "output" || path == "token_embd" && model.is_tied {
            let takes_eight_bits = matches!(self, Q8_0 | MXFP4) || !width.is_multiple_of(base.block_values());
            return if takes_eight_bits { QuantType::Q8_0 } else { QuantType::Q6_K };
        }
        if path == "token_embd" {
            return if self == MXFP4 { QuantType::Q8_0 } else { base };
        }
        let place = path.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
        let Some((layer, matrix)) = place.and_then(|(layer, matrix)| Some((layer.parse().ok()?, matrix))) else {
            return base;
        };
        match matrix {
            "attn_v" => self.attention_value(base, layer, model),
            "ffn_down" => self.feed_forward_down(base, layer, model.num_layers),
            "attn_qkv" => match self {
                Q3_K_M | Q3_K_L => QuantType::Q4_K,
                Q4_K_M => QuantType::Q5_K,
                Q5_K_M => QuantType::Q6_K,
                _ => base,
            },
            "attn_output" => match self {
                Q2_K => QuantType::Q3_K,
                Q3_K_M => QuantType::Q4_K,
                Q3_K_L => QuantType::Q5_K,
                _ => base,
            },
            _ => base,
        }
    }

    fn attention_value(self, base: QuantType, layer: usize, model: &ModelShape) -> QuantType {
        use FileType::*;
        // A head that many share is small and matters to all of them.
        let is_shared = model.heads_per_kv_head >= 4;
        let chosen = match self {
            Q2_K if is_shared => QuantType::Q4_K,
            Q2_K => QuantType::Q3_K,
            Q3_K_M if layer >= 2 => QuantType::Q4_K,
            Q3_K_M | Q3_K_L => QuantType::Q5_K,
            Q4_K_S if layer < 4 => QuantType::Q5_K,
            Q4_K_M | Q5_K_M if takes_more_bits(layer, model.num_layers) => QuantType::Q6_K,
            IQ4_NL if is_shared => QuantType::Q5_K,
            _ => base,
        };
        let is_of_70b = model.num_layers == 80 && model.heads_per_kv_head > 1;
        match chosen {
            QuantType::Q3_K | QuantType::Q4_K if is_of_70b => QuantType::Q5_K,
            chosen => chosen,
        }
    }

    fn feed_forward_down(self, base: QuantType, layer: usize, num_layers: usize) -> QuantType {
        use FileType::*;
        match self {
            Q2_K => QuantType::Q3_K,
            Q3_K_M if layer < num_layers / 16 => QuantType::Q5_K,
            Q3_K_M => QuantType::Q4_K,
            Q3_K_L => QuantType::Q5_K,
            Q4_K_M | Q5_K_M if takes_more_bits(layer, num_layers) => QuantType::Q6_K,
            Q4_K_S | IQ4_NL if layer < num_layers / 8 => QuantType::Q5_K,
            _ => base,
        }
    }
}

/// The first and last eighth of the layers, and every third between.
fn takes_more_bits(layer: usize, num_layers: usize) -> bool {
    let eighth = num_layers / 8;
    layer < eighth || layer >= 7 * num_layers / 8 || (layer - eighth) % 3 == 2
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every name finds its type, an unknown one is told all of them.
    #[test]
    fn names_are_found() {
        for file_type in FileType::ALL {
            assert_eq!(FileType::from_name(&file_type.name().to_uppercase()), Ok(file_type));
        }
        assert_eq!(FileType::from_name("q4_k"), Ok(FileType::Q4_K_M));
        let e = FileType::from_name("q9_0").expect_err("unknown");
        assert!(e.code() == "invalid_argument" && e.to_string().contains("q4_k_m, q5_k_s"), "{e}");
    }

    /// The mixes of a model of 28 layers, matrix by matrix, and what takes the place of a type that does not fit.
    #[test]
    fn mixes_follow_their_rules() {
        use QuantType::*;
        let model = ModelShape { num_layers: 28, heads_per_kv_head: 2, is_tied: true };
        let of = |file_type: FileType, name: &str| file_type.of_matrix(&format!("{name}.weight"), 1024, &model, false);
        let layers_with = |file_type: FileType, matrix: &str, wanted: QuantType| -> Vec<usize> {
            let is_wanted =
                |layer: &usize| of(file_type, &format!("blk.{layer}.{matrix}")) == StoredDtype::Blocks(wanted);
            (0..28).filter(is_wanted).collect()
        };
        let rich = [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 24, 25, 26, 27];
        for matrix in ["attn_v", "ffn_down"] {
            assert_eq!(layers_with(FileType::Q4_K_M, matrix, Q6_K), rich);
            assert_eq!(layers_with(FileType::Q5_K_M, matrix, Q6_K), rich);
        }
        assert_eq!(layers_with(FileType::Q4_K_S, "attn_v", Q5_K), [0, 1, 2, 3]);
        assert_eq!(layers_with(FileType::Q4_K_S, "ffn_down", Q5_K), [0, 1, 2]);
        assert_eq!(layers_with(FileType::Q3_K_M, "attn_v", Q5_K), [0, 1]);
        assert_eq!(layers_with(FileType::Q3_K_M, "ffn_down", Q5_K), [0]);
        assert_eq!(layers_with(FileType::Q3_K_M, "attn_output", Q4_K).len(), 28);
        assert_eq!(layers_with(FileType::Q2_K, "attn_v", Q3_K).len(), 28);
        assert_eq!(layers_with(FileType::Q4_K_M, "attn_q", Q4_K).len(), 28);
        assert_eq!(layers_with(FileType::Q4_K_M, "attn_qkv", Q5_K).len(), 28);
        assert_eq!(layers_with(FileType::Q4_K_S, "attn_qkv", Q4_K).len(), 28);
        assert_eq!(of(FileType::Q4_K_M, "token_embd"), StoredDtype::Blocks(Q6_K));
        assert_eq!(of(FileType::Q8_0, "token_embd"), StoredDtype::Blocks(Q8_0));
        let pure = FileType::Q4_K_M.of_matrix("blk.0.attn_v.weight", 1024, &model, true);
        assert_eq!(pure, StoredDtype::Blocks(Q4_K));
        let untied = ModelShape { is_tied: false, ..model };
        assert_eq!(FileType::Q4_K_M.of_matrix("token_embd.weight", 1024, &untied, false), StoredDtype::Blocks(Q4_K));
        for (file_type, width, expected) in [
            (FileType::Q4_K_M, 96, StoredDtype::Blocks(Q5_0)),
            (FileType::Q5_K_M, 96, StoredDtype::Blocks(Q5_1)),
            (FileType::Q6_K, 96, StoredDtype::Blocks(Q8_0)),
            (FileType::Q2_K, 96, StoredDtype::Blocks(Q4_0)),
            (FileType::Q8_0, 48, StoredDtype::Plain(Dtype::F16)),
            (FileType::BF16, 48, StoredDtype::Plain(Dtype::BF16)),
        ] {
            assert_eq!(file_type.of_matrix("blk.0.attn_q.weight", width, &model, false), expected);
        }
    }
}
