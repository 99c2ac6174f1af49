//! In which form a matrix is kept, and how many bytes it then takes: said once, for those who pack and those who plan.

use ns_llm_kernels::cpu::linear::WeightFormat as PackedFormat;

use crate::backend::{LinearPart, LinearWeight};
use crate::config::WeightFormat;
use crate::tensor::{Encoding, Tensor, fitting};

/// The form of a matrix `[_, in_features]` that is stored as `stored`, when the user wants `wanted`.
pub(super) fn packed_format(wanted: WeightFormat, stored: Encoding, in_features: usize) -> PackedFormat {
    let quantized = |quant_type| PackedFormat::from(fitting(quant_type, in_features));
    match (wanted, stored) {
        (WeightFormat::Auto, Encoding::Plain(dtype)) => dtype.into(),
        (WeightFormat::Auto, Encoding::Blocks(quant_type)) | (WeightFormat::Quant(quant_type), _) => {
            quantized(quant_type)
        }
        (WeightFormat::F32, _) => PackedFormat::F32,
        (WeightFormat::Bf16, _) => PackedFormat::Bf16,
        (WeightFormat::F16, _) => PackedFormat::F16,
    }
}

/// The form of a gate and an up projection: both share an item of work, and so a form, the plainest where they are stored in
/// two.
pub(super) fn gate_up_format(wanted: WeightFormat, parts: [(Encoding, usize); 2]) -> PackedFormat {
    let [gate, up] = parts.map(|(stored, in_features)| packed_format(wanted, stored, in_features));
    if gate == up { gate } else { PackedFormat::F32 }
}

/// Bytes of a packed matrix; `None` if no `usize` counts them. Parts have two axes.
pub(super) fn packed_bytes(wanted: WeightFormat, weight: &LinearWeight<'_>) -> Option<u64> {
    let sizes = |part: &LinearPart<'_>| {
        let Tensor { shape, encoding, .. } = part.weight;
        Some((*encoding, *shape.first()?, *shape.get(1)?))
    };
    match weight {
        LinearWeight::Stacked(parts) => {
            let parts: Option<Vec<_>> = parts.iter().map(sizes).collect();
            let parts: Vec<_> = parts?
                .into_iter()
                .map(|(stored, rows, in_features)| (packed_format(wanted, stored, in_features), rows, in_features))
                .collect();
            // Neighbours of one form share their last panel.
            let section = |parts: &[(PackedFormat, usize, usize)]| {
                let &(format, _, in_features) = parts.first()?;
                let rows = parts.iter().try_fold(0_usize, |sum, (_, rows, _)| sum.checked_add(*rows))?;
                u64::try_from(format.packed_bytes(rows, in_features)?).ok()
            };
            parts.chunk_by(|(a, ..), (b, ..)| a == b).map(section).sum()
        }
        LinearWeight::GateUp { gate, up } => {
            let (gate, up) = (sizes(gate)?, sizes(up)?);
            let format = gate_up_format(wanted, [(gate.0, gate.2), (up.0, up.2)]);
            let one: u64 = format.packed_bytes(gate.1, gate.2)?.try_into().ok()?;
            one.checked_mul(2)
        }
    }
}
