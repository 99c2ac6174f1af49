//! In which forms numbers are kept, and where they are computed with: named choices of who opens an engine.

use ns_llm_kernels::quant::QuantType;

use crate::error::{Error, Result};

/// Where the arithmetic runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Device {
    /// The first CUDA device, if this build has CUDA, the machine a driver and a device that it can use, and the model
    /// fits; else the CPU. [`ModelInfo::device_reason`](crate::ModelInfo::device_reason) says why.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The CUDA device of this number, from 0.
    Cuda(usize),
}

impl Device {
    /// The device of that name: "auto", "cpu", "cuda" (the first) or "cuda:N".
    pub fn from_name(name: &str) -> Result<Device> {
        let refused = || Error::InvalidArgument {
            field: "device",
            value: name.to_string(),
            expected: "auto, cpu, cuda or cuda:N".to_string(),
        };
        match name {
            "auto" => Ok(Device::Auto),
            "cpu" => Ok(Device::Cpu),
            "cuda" => Ok(Device::Cuda(0)),
            // Digits alone: a number may also begin with a plus sign.
            _ => match name.strip_prefix("cuda:") {
                Some(ordinal) if !ordinal.is_empty() && ordinal.bytes().all(|byte| byte.is_ascii_digit()) => {
                    ordinal.parse().map(Device::Cuda).map_err(|_| refused())
                }
                _ => Err(refused()),
            },
        }
    }
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Device::Auto => f.write_str("auto"),
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

/// In which form weights are kept and multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum WeightFormat {
    /// As the checkpoint has them; under a [`memory limit`](super::EngineOptions::memory_limit_bytes) the best form that fits it.
    #[default]
    Auto,
    /// 32-bit floats.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    F16,
    /// Integers with scales, multiplied with activations of 8 bits. A matrix whose rows are no whole number of blocks is
    /// kept in the next larger format with blocks of 32, or in f16.
    Quant(QuantType),
}

/// What [`WeightFormat::Auto`] chooses from under a memory limit when the weights as stored do not fit, best first.
pub const AUTO_WEIGHT_FORMATS: [WeightFormat; 7] = [
    WeightFormat::Bf16,
    WeightFormat::Quant(QuantType::Q8_0),
    WeightFormat::Quant(QuantType::Q6_K),
    WeightFormat::Quant(QuantType::Q5_K),
    WeightFormat::Quant(QuantType::Q4_K),
    WeightFormat::Quant(QuantType::Q3_K),
    WeightFormat::Quant(QuantType::Q2_K),
];

impl WeightFormat {
    /// Every form.
    pub fn all() -> impl Iterator<Item = WeightFormat> {
        let plain = [WeightFormat::Auto, WeightFormat::F32, WeightFormat::Bf16, WeightFormat::F16];
        plain.into_iter().chain(QuantType::ALL.map(WeightFormat::Quant))
    }

    /// The form of that name, in any case.
    pub fn from_name(name: &str) -> Result<WeightFormat> {
        let found = WeightFormat::all().find(|format| format.name().eq_ignore_ascii_case(name));
        found.ok_or_else(|| {
            let names: Vec<_> = WeightFormat::all().map(WeightFormat::name).collect();
            let expected = format!("one of {}", names.join(", "));
            Error::InvalidArgument { field: "weights", value: name.to_string(), expected }
        })
    }

    /// Name as in options and reports.
    pub fn name(self) -> &'static str {
        match self {
            WeightFormat::Auto => "auto",
            WeightFormat::F32 => "f32",
            WeightFormat::Bf16 => "bf16",
            WeightFormat::F16 => "f16",
            WeightFormat::Quant(quant_type) => quant_type.name(),
        }
    }
}

/// How keys and values are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum KvDtype {
    /// 32-bit floats.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16: half the memory of f32 with its range, coarser than f16.
    Bf16,
    /// 8-bit integers with one scale for each token and head, half the memory of f16. Steps that make vectors keep
    /// nothing, and compute as if this was not set.
    Int8,
}

impl KvDtype {
    /// Name as in options and reports.
    pub fn name(self) -> &'static str {
        match self {
            KvDtype::F32 => "f32",
            KvDtype::F16 => "f16",
            KvDtype::Bf16 => "bf16",
            KvDtype::Int8 => "int8",
        }
    }
}

/// How blocks are kept outside the pool: in host memory, on disk, in a store that nodes share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum KvTierEncoding {
    /// As they were computed: what is found again equals what would be computed, bit for bit.
    #[default]
    AsComputed,
    /// Rounded to 8-bit integers with one scale for each token and head: half the bytes of f16 and bf16, a quarter of f32. An
    /// answer over blocks that came back, of a preempted sequence as well, is a little other than one that was computed whole.
    /// Blocks are in a key space of their own: no engine without this finds them. With a pool of 8-bit integers the same as
    /// `AsComputed`.
    Int8,
}

impl KvTierEncoding {
    /// Name as in options and reports.
    pub fn name(self) -> &'static str {
        match self {
            KvTierEncoding::AsComputed => "as-computed",
            KvTierEncoding::Int8 => "int8",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every form has a name that finds it; an unknown one is told all of them.
    #[test]
    fn forms_of_weights_have_names() {
        for format in WeightFormat::all() {
            assert_eq!(WeightFormat::from_name(&format.name().to_uppercase()), Ok(format));
        }
        let e = WeightFormat::from_name("q9_9").expect_err("unknown").to_string();
        assert!(e.contains("q9_9") && e.contains("auto, f32, bf16, f16, q8_0") && e.contains("q2_k"), "{e}");
    }
}
